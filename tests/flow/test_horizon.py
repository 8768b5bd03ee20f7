"""Isolation information equals whole passes with blocked edges; horizons are where they are planted."""

import copy
import functools

import numpy as np
import pytest
import torch
import xarray as xr

import interp
from interp.causal import removal
from interp.core import NumericalError, OutOfRange, Prompt, PromptError, Segment, SegmentNotFound
from interp.flow import horizon
from interp.models.model import Model
from interp.organisms import plant_horizon as plant

N, IMAGE = 16, tuple(range(3, 9))
AFTER = list(range(9, N))


@pytest.fixture(scope="module")
def opened(tiny):
    return functools.cache(lambda architecture: Model(tiny(architecture), f"tiny-{architecture}"))


def prompt(seed=0):
    ids = np.random.default_rng(seed).integers(3, 90, N)
    picture = Segment("image", IMAGE, "image", (2, 3), ((0, 0, 1, 1),) * 6)
    return Prompt(tuple(int(i) for i in ids), (picture,))


def without(model, given, layer, kept):
    """The last row when later positions and kept image tokens see no dropped token from `layer` on."""
    dropped = [p for p in IMAGE if p not in kept]
    cut = interp.block([*kept, *AFTER], dropped, layers=list(range(layer, model.n_layers)))
    return model.run(given, write=cut).logits[0][-1].log_softmax(-1)


@pytest.mark.parametrize("architecture", ["llama", "gemma2", "gemma3", "gpt_oss", "gpt2", "qwen2_5_vl"])
def test_the_map_is_that_of_the_loop_over_cells(opened, architecture):
    model, given = opened(architecture), prompt()
    groups = horizon.windows(given, size=2)
    assert groups == [(3, 4, 6, 7), (5, 8)]
    found = horizon.information(model, given, 7, groups=groups, batch_size=2)
    full = model.run(given).logits[0][-1].log_softmax(-1)
    for layer in range(1, model.n_layers):
        none = without(model, given, layer, ())
        one = found.data.sel(layer=layer)
        assert float(one["none"]) == pytest.approx(float(none[7].exp()), abs=1e-6)
        kl = float((none.exp() * (none - full)).sum())
        assert float(one["kl"]) == pytest.approx(kl, abs=1e-5)
        for number, group in enumerate(groups):
            alone = float(without(model, given, layer, group)[7].exp())
            assert float(one["alone"][number]) == pytest.approx(alone, abs=1e-6)
            assert float(one["information"][number]) == pytest.approx(
                alone - float(none[7].exp()), abs=1e-6)
    lost = horizon.leave_one_out(model, given, 7, groups=groups)
    for number, group in enumerate(groups):
        rest = [p for p in IMAGE if p not in group]
        expected = float(full[7].exp() - without(model, given, 2, rest)[7].exp())
        assert float(lost["lost"].sel(layer=2)[number]) == pytest.approx(expected, abs=1e-6)


def test_cost_is_counted_and_far_below_the_loop(opened):
    model = opened("llama")
    ids = np.random.default_rng(1).integers(3, 90, 100)
    given = Prompt.from_tokens(ids, {"image": (10, 90)})
    found = horizon.information(model, given, 7)
    # One base pass; 11 rows per group and layer, 10 without any, over the blocks that remain.
    blocks = sum(model.n_layers - layer for layer in (1, 2))
    rows = (80 * 11 + 10) * blocks
    assert float(found["prefills"]) == pytest.approx(1 + rows / (100 * model.n_layers))
    assert found.manifest["naive_prefills"] / float(found["prefills"]) > 10


def test_order_of_groups_and_batches_do_not_matter(opened):
    model, given = opened("llama"), prompt()
    base = horizon.information(model, given, 7)["information"]
    turned = horizon.information(model, given, 7, groups=[(p,) for p in reversed(IMAGE)],
                                 batch_size=4)["information"]
    assert np.allclose(base.values, turned.values[:, ::-1], atol=1e-6)


def test_removals_differ_and_do_what_they_say(opened):
    model, given = opened("llama"), prompt()
    keep = horizon.information(model, given, 7)
    compact = horizon.information(model, given, 7, removal="drop_compact_ids")
    assert np.abs(keep["alone"] - compact["alone"]).max() > 1e-4
    short = Prompt.from_tokens([i for p, i in enumerate(given.ids) if p not in IMAGE])
    at_zero = horizon.information(model, given, 7, removal="drop_compact_ids", layers=[0])
    expected = model.run(short).logits[0][-1].softmax(-1)[7]
    assert float(at_zero["none"][0]) == pytest.approx(float(expected), abs=1e-6)
    # Replaced by their own mean where all tokens are equal, nothing changes.
    same = Prompt.from_tokens([5] * N, {"image": (3, 9)})
    mean = removal.mean_states(model, [same])
    assert mean.shape == (model.n_layers, model.d_model)
    still = horizon.information(model, same, 7, removal="replace_mean", states=mean, layers=[1])
    assert float(still["none"][0]) == pytest.approx(float(still["full"]), abs=1e-5)




@pytest.mark.parametrize("layer", [1, 2])
def test_the_horizon_is_where_reading_ends(tiny, layer):
    """Planted in the weights: from a block on, attention writes nothing."""
    hf = copy.deepcopy(tiny("llama"))
    with torch.no_grad():
        for block in hf.model.layers[layer:]:
            block.self_attn.o_proj.weight.zero_()
    model = Model(hf, "planted")
    found = horizon.information(model, prompt(), 7, layers=[0, 1, 2])
    assert np.abs(found["information"].sel(layer=layer)).max() < 1e-6
    assert np.abs(found["information"].sel(layer=layer - 1)).max() > 1e-5
    got = horizon.horizons(found, epsilon=1e-6, eta=1e-6)
    assert got == {"H_info": layer, "H_out": layer}


def test_horizons_of_curves():
    assert horizon.horizon(np.array([0.0, 0.0]), 0.1) == 0
    assert horizon.horizon(np.array([0.3, np.nan, 0.0]), 0.1, [4, 5, 6]) == 6
    full = np.ones(40)
    correct = np.ones((40, 4))
    correct[:20, :2] = 0
    assert horizon.task_horizon(correct, full, [1, 2, 3, 4]) == 3
    noisy = np.r_[np.ones(30), np.zeros(10)]
    fewer = np.repeat(noisy[:, None], 2, 1)
    fewer[0, 1] = 0  # one sample fewer is within a standard error
    assert horizon.task_horizon(fewer, noisy, [1, 2]) == 1


@pytest.fixture(scope="module")
def planted():
    """A LLaVA with 6 x 6 image tokens that cannot read them from block 3 of 5 on."""
    rng = np.random.default_rng(5)
    hf = plant.tiny_llava(rng, n_layers=5, side=6)
    given = plant.picture_prompt(hf, rng)
    made = plant.image_horizon(hf, 3, plant.as_inputs(given))
    return Model(made.model, "planted"), given


def test_differences_of_logits_go_on_where_probabilities_are_certain(planted):
    model, given = planted
    groups = horizon.windows(given, size=3)
    found = horizon.information(model, given, 7, groups=groups, against=[9, 11, 30])
    row = model.run(given).logits[0][-1]
    foil = max((9, 11, 30), key=lambda t: float(row[t]))
    assert found.manifest["foil"] == foil and found.manifest["image_attention"] == "causal"
    assert int(found["full_top"]) == int(row.argmax())
    assert float(found["difference_full"]) == pytest.approx(float(row[7] - row[foil]), abs=1e-5)
    cut = interp.block(given.positions(slice(38, None)), given.positions("image"), layers=[2, 3, 4])
    none = model.run(given, write=cut).logits[0][-1]
    at = found.data.sel(layer=2)
    assert float(at["difference_none"]) == pytest.approx(float(none[7] - none[foil]), abs=1e-4)
    assert int(at["top"]) == int(none.argmax())
    # Without any token the answer is held against, it is the likeliest other token.
    free = horizon.information(model, given, int(row.argmax()), groups=groups, layers=[1])
    assert free.manifest["foil"] == int(row.topk(2).indices[1])
    got = horizon.horizons(found, 1e-6, 1e-5, delta=1e-4)
    assert got == {"H_info": 3, "H_out": 3, "H_logit": 3}


def test_bisection_finds_the_same_horizon_with_fewer_evaluations(planted):
    model, given = planted
    for eta in (1e-5, 1e9):
        whole = horizon.information(model, given, 7, groups=[given.positions("image")])
        found = horizon.output_horizon(model, given, eta)
        assert int(found["H_out"]) == horizon.horizons(whole, eta=eta)["H_out"]
    assert found.manifest["monotone"] and found.data.sizes["layer"] < model.n_layers - 1
    assert float(found["prefills"]) < float(whole["prefills"])


def test_bisection_of_a_curve_that_rises_looks_at_all_layers(planted, monkeypatch):
    model, given = planted
    curve = {1: 0.0, 2: 0.0, 3: 0.1, 4: 0.9}
    real = horizon.Removal.logits

    def logits(self, layer, kept, batch_size=64):
        rows = real(self, layer, kept, batch_size)
        full = self.base.logits[-1].float().cpu().expand_as(rows).clone()
        full[:, 0] += 10 * curve[int(layer)]
        return full

    monkeypatch.setattr(horizon.Removal, "logits", logits)
    found = horizon.output_horizon(model, given, 1e-4)
    assert not found.manifest["monotone"] and list(found["layer"].values) == [1, 2, 3, 4]
    assert int(found["H_out"]) == 5


def test_coarse_windows_lead_to_the_strongest_fine_ones(planted):
    model, given = planted
    whole = horizon.information(model, given, 7, groups=horizon.windows(given, size=1))
    found = horizon.coarse_to_fine(model, given, 7, coarse=2, fine=1, share=0.25)
    assert found.data.sizes["window"] == 9 and len(found.manifest["refined"]) == 3
    assert found.data.sizes["group"] == 12
    assert float(found["prefills"]) < float(whole["prefills"])
    number = {tuple(group): i for i, group in enumerate(whole.manifest["groups"])}
    same = [number[tuple(group)] for group in found.manifest["groups"]]
    assert np.allclose(found["information"], whole["information"][:, same], atol=1e-6)
    coarse = np.abs(found["coarse"].values).max(0)
    assert set(found.manifest["refined"]) == set(np.argsort(-coarse)[:3].tolist())
    with pytest.raises(PromptError, match="windows of 3 cannot be refined to windows of 2"):
        horizon.coarse_to_fine(model, given, 7, coarse=3, fine=2)


def test_rank_correlation_of_two_maps_layer_by_layer():
    rng = np.random.default_rng(0)
    one = rng.standard_normal((3, 9))
    other = np.stack([np.exp(one[0]), -one[1], np.zeros(9)])
    assert np.array_equal(horizon.agreement(one, other), [1.0, -1.0, np.nan], equal_nan=True)
    with pytest.raises(ValueError, match="must be equal"):
        horizon.agreement(one, xr.DataArray(other[:2]))


def test_relative_information_needs_a_base(planted):
    model, given = planted
    row = model.run(given).logits[0][-1].softmax(-1)
    likely, rare = int(row.argmax()), int(row.argmin())
    found = horizon.information(model, given, likely, layers=[1])
    assert np.allclose(horizon.relative(found, 0.01), found["information"] / float(row.max()),
                       atol=1e-6)
    scarce = horizon.information(model, given, rare, layers=[1])
    with pytest.raises(NumericalError, match="no relative change can be told"):
        horizon.relative(scarce)


def test_horizons_of_sets_have_intervals_over_prompts():
    layers, curves = [1, 2, 3], np.zeros((40, 3))
    curves[:, 0] = 1.0
    curves[:20, 1] = 0.03  # half of the prompts read one block longer
    assert horizon.each_horizon(curves, 0.01, layers, 4).tolist() == [3.0] * 20 + [2.0] * 20
    mean = horizon.horizon_of_task(curves, 0.01, layers, 4)
    assert mean.value == 3 and mean.interval[0] >= 2 and mean.n == 40
    never = horizon.horizon_of_task(np.ones((10, 3)), 0.01, layers, 4)
    assert never.value == 4 and never.interval == (4.0, 4.0)
    full = np.r_[np.ones(30), np.zeros(10)]
    correct = np.repeat(full[:, None], 3, 1)
    correct[:, 0] = 0
    score = horizon.horizon_of_score(correct, full, layers, 4)
    assert score.value == 2 and score.interval == (2.0, 2.0)


def test_bad_input_is_one_sentence(opened):
    model, given = opened("llama"), prompt()
    bare = Prompt.from_tokens(given.ids)
    with pytest.raises(SegmentNotFound, match=r"no segment 'image'.*images="):
        horizon.information(model, bare, 7)
    with pytest.raises(OutOfRange, match="position 12 is in a group, but not among the image tokens"):
        horizon.information(model, given, 7, groups=[[3, 12]])
    with pytest.raises(OutOfRange, match="layer 3 does not exist"):
        horizon.information(model, given, 7, layers=[3])
    with pytest.raises(PromptError, match="drop_keep_ids, drop_compact_ids, mask_keys"):
        horizon.information(model, given, 7, removal="mask")
    with pytest.raises(PromptError, match="needs states="):
        horizon.information(model, given, 7, removal="replace_mean")
    with pytest.raises(PromptError, match="token 7 begins the answer and one of the others"):
        horizon.information(model, given, 7, against=[8, 7])
    with pytest.raises(PromptError, match="several axes"):
        horizon.information(opened("qwen2_5_vl"), given, 7, removal="drop_compact_ids")
    tiled = Prompt(given.ids, (Segment("image", IMAGE, "image"),))
    with pytest.raises(PromptError, match="no one grid"):
        horizon.windows(tiled)
    wrong = Prompt(given.ids, (Segment("image", IMAGE, "image", (2, 2)),))
    with pytest.raises(PromptError, match="6 cells, but its grid is 2 x 2"):
        horizon.windows(wrong)
