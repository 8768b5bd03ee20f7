"""Active-dormant heads: found where planted, the same as dense attention, caused by what is zeroed."""

import functools

import numpy as np
import pytest
import torch
import transformers as t
import xarray as xr
from hypothesis import given, settings
from hypothesis import strategies as st

import interp
from interp.core.errors import OutOfRange, PromptError
from interp.models.model import Model
from interp.organisms.plant import primary_sink
from interp.sinks import active_dormant


def logits(seed: int, n: int = 11) -> torch.Tensor:
    """Random logits [layer, head, query, key]."""
    return torch.randn(2, 3, n, n, generator=torch.Generator().manual_seed(seed))


def loop_gap(scores: np.ndarray) -> np.ndarray:
    """The definition, one query after the other, over the keys that it can see."""
    n = scores.shape[-1]
    found = np.full(scores.shape[:-1], np.nan)
    for index in np.ndindex(found.shape):
        row = scores[index]
        others = [row[k] for k in range(1, index[-1]) if np.isfinite(row[k])]
        if others and np.isfinite(row[0]):
            found[index] = row[0] - np.mean(others)
    assert found.shape[-1] == n
    return found


# -- the logit gap ---------------------------------------------------------------------------


def test_a_raised_first_key_is_found_in_its_head_only_and_by_exactly_what_was_added():
    scores = logits(0)
    planted = scores.clone()
    planted[1, 2, :, 0] += 7.5
    change = active_dormant.logit_gap(planted) - active_dormant.logit_gap(scores)
    expected = torch.zeros(2, 3, 9)
    expected[1, 2] = 7.5
    assert torch.allclose(change[..., 2:], expected, atol=1e-5)
    assert abs(float(active_dormant.logit_gap(scores)[..., 2:].mean())) < 0.5
    assert active_dormant.logit_gap(planted)[..., :2].isnan().all()


@settings(deadline=None, max_examples=20)
@given(seed=st.integers(0, 999), order=st.permutations(range(3)), shift=st.floats(-50, 50))
def test_the_gap_follows_heads_and_ignores_what_the_softmax_ignores(seed, order, shift):
    scores = logits(seed)
    gap = active_dormant.logit_gap(scores)
    assert torch.equal(active_dormant.logit_gap(scores[:, order])[..., 2:], gap[:, order][..., 2:])
    moved = scores + shift * torch.arange(11)[:, None]
    assert torch.allclose(active_dormant.logit_gap(moved)[..., 2:], gap[..., 2:], atol=2e-3)
    hidden = scores.masked_fill(torch.ones(11, 11).triu(1).bool(), -torch.inf)
    assert torch.equal(active_dormant.logit_gap(hidden)[..., 2:], gap[..., 2:])


def test_keys_outside_a_sliding_window_are_neither_others_nor_first():
    distance = np.arange(11)[:, None] - np.arange(11)
    scores = np.where((distance >= 0) & (distance < 6), logits(1).numpy(), -np.inf)
    gap = active_dormant.logit_gap(scores).numpy()
    assert np.allclose(gap, loop_gap(scores), atol=1e-5, equal_nan=True)
    assert np.isfinite(gap[..., 2:6]).all() and np.isnan(gap[..., 6:]).all()


def test_scores_of_a_part_of_the_queries_are_refused():
    with pytest.raises(ValueError, match="one prompt"):
        active_dormant.logit_gap(logits(0)[..., 4:, :])


# -- dormancy ----------------------------------------------------------------------------------


def resting(seed: int, samples: int = 9, low: float = 0.02, high: float = 0.95):
    """Attention to token 0 [sample, layer, head, query]; L1H2 rests where it has no work."""
    rng = np.random.default_rng(seed)
    first = rng.uniform(0.05, 0.35, (samples, 2, 4, 13))
    work = rng.random((samples, 13)) < 0.3
    work[:, 3] = True
    first[:, 1, 2] = np.where(work, low, high)
    return first, work


def test_a_dormant_head_rests_where_it_has_no_work_and_leaves_where_it_has():
    first, work = resting(0)
    idle = active_dormant.dormancy(first, ~work)
    busy = active_dormant.dormancy(torch.from_numpy(first), torch.from_numpy(work))
    assert np.allclose(idle[:, 1, 2], 0.95) and np.allclose(busy[:, 1, 2], 0.02)
    best = np.unravel_index(int(idle.mean(0).argmax()), (2, 4))
    assert best == (1, 2)
    others = torch.ones(2, 4, dtype=torch.bool)
    others[1, 2] = False
    assert float((idle - busy).mean(0)[others].abs().max()) < 0.1
    order = [3, 1, 0, 2]
    assert torch.equal(active_dormant.dormancy(first[:, :, order], ~work), idle[:, :, order])


def test_query_zero_and_padding_never_count():
    first, _ = resting(1)
    expected = active_dormant.dormancy(first)
    moved = first.copy()
    moved[..., 0] = 1.0
    assert torch.equal(active_dormant.dormancy(moved), expected)
    padded = np.concatenate([first, np.full((9, 2, 4, 5), np.nan)], -1)
    assert torch.allclose(active_dormant.dormancy(padded), expected)
    nothing = np.zeros((9, 13), dtype=bool)
    nothing[:, 0] = True
    assert active_dormant.dormancy(first, nothing).isnan().all()


# -- domains -----------------------------------------------------------------------------------


def domains(seed: int, planted: bool, a: int = 24, b: int = 18):
    """Dormancy [sample, layer, head] of two domains; L0H1 and L2H3 differ where planted."""
    rng = np.random.default_rng(seed)
    one, two = rng.uniform(0.2, 0.6, (a, 3, 5)), rng.uniform(0.2, 0.6, (b, 3, 5))
    if planted:
        one[:, 0, 1], two[:, 0, 1] = rng.uniform(0.8, 1, a), rng.uniform(0, 0.2, b)
        one[:, 2, 3], two[:, 2, 3] = rng.uniform(0, 0.2, a), rng.uniform(0.8, 1, b)
    return {"code": one, "prose": two}


def test_domain_heads_are_found_where_planted_and_in_no_control():
    low = 0
    for seed in range(6):
        found = active_dormant.domain_heads(domains(seed, True), n_permutations=199, seed=seed)
        assert np.argwhere(found["chosen"].values).tolist() == [[0, 1], [2, 3]]
        assert found["p"].values[[0, 2], [1, 3]].max() == pytest.approx(1 / 200)
        assert found["auc"].values[[0, 2], [1, 3]].tolist() == [1.0, 0.0]
        assert found["difference"].values[0, 1] > 0.6 > -0.6 > found["difference"].values[2, 3]
        control = active_dormant.domain_heads(domains(seed, False), n_permutations=199, seed=seed)
        assert not control["chosen"].any() and control["p"].values.min() > 1 / 200
        low += int((control["p"].values < 0.05).sum())
    # 90 heads without a difference: 4 or 5 below .05 are expected, 14 is the 99.99th percentile.
    assert low <= 14


def test_a_difference_in_the_choosing_half_alone_does_not_pass_the_test():
    passed = 0
    for seed in range(10):
        data = domains(seed, False)
        data["code"][::2, 1, 4] += 0.6
        found = active_dormant.domain_heads(data, n_permutations=99)
        assert np.argwhere(found["chosen"].values).tolist() == [[1, 4]]
        assert abs(found["difference"].values[1, 4]) < 0.2
        passed += int(found["p"].values[1, 4] < 0.05)
    assert passed <= 3  # each has one chance in twenty


def test_head_order_does_not_matter_and_names_decide_the_sign():
    data, order = domains(4, True), [2, 0, 4, 1, 3]
    found = active_dormant.domain_heads(data, n_permutations=49)
    moved = active_dormant.domain_heads({k: v[..., order] for k, v in data.items()},
                                        n_permutations=49)
    for name in ("difference", "chosen", "auc", "p"):
        assert np.array_equal(moved[name].values, found[name].values[:, order])
    swapped = active_dormant.domain_heads({"code": data["prose"], "prose": data["code"]},
                                          n_permutations=49)
    assert np.allclose(swapped["difference"], -found["difference"])
    assert np.allclose(swapped["auc"], 1 - found["auc"])
    assert found.manifest["domains"] == ["code", "prose"]


def test_domains_that_cannot_be_compared_are_named():
    data = domains(0, False)
    with pytest.raises(ValueError, match=r"two domains are compared, not 1: \['code'\]"):
        active_dormant.domain_heads({"code": data["code"]})
    with pytest.raises(PromptError, match="at least 4 samples"):
        active_dormant.domain_heads({"code": data["code"][:3], "prose": data["prose"]})


# -- in a model --------------------------------------------------------------------------------


def prompts(lengths: tuple[int, ...], seed: int = 0) -> list[interp.Prompt]:
    rng = np.random.default_rng(seed)
    return [interp.Prompt.from_tokens([1, *rng.integers(3, 90, n - 1)]) for n in lengths]


@pytest.mark.parametrize("architecture", ["llama", "mistral", "gpt_oss"])
def test_measure_agrees_with_the_dense_reads(tiny, architecture):
    model = Model(tiny(architecture), f"tiny-{architecture}")
    given = prompts((9, 12, 7))
    found = active_dormant.measure(model, given, [[2, 4], [], [3]])
    for i, prompt in enumerate(given):
        n = len(prompt)
        reads = model.run(prompt, read=("pattern", "scores", "v", "resid_pre", "resid_post")).reads
        one = found.data.isel(prompt=i, query=slice(n), position=slice(n))
        dense = {name: array.values[0] for name, array in reads.items()}
        assert np.allclose(one["first"], dense["pattern"][..., 0], atol=1e-5)
        gap = loop_gap(dense["scores"])
        assert np.allclose(one["gap"], gap, atol=1e-3, equal_nan=True) and np.isfinite(gap).any()
        assert np.allclose(one["value_norm"].transpose("layer", "position", "kv_head"),
                           np.linalg.norm(dense["v"], axis=-1), rtol=1e-4)
        assert np.allclose(one["peak_in"], np.linalg.norm(dense["resid_pre"], axis=-1), rtol=1e-4)
        assert np.allclose(one["peak"], np.linalg.norm(dense["resid_post"], axis=-1), rtol=1e-4)
        rest = found.data.isel(prompt=i, query=slice(n, None), position=slice(n, None))
        assert rest["gap"].isnull().all() and rest["peak"].isnull().all()
    assert np.argwhere(found["is_active"].values).tolist() == [[0, 2], [0, 4], [2, 3]]
    assert found.manifest["model"] == f"tiny-{architecture}" and found.manifest["n_prompts"] == 3


def test_too_short_prompts_are_named(tiny):
    model = Model(tiny("llama"), "tiny-llama")
    with pytest.raises(PromptError, match="at least 3 tokens"):
        active_dormant.measure(model, prompts((9, 2)))
    with pytest.raises(PromptError, match="no prompts"):
        active_dormant.measure(model, [])


def test_ratio_and_gap_compare_the_first_token_with_the_mean_of_the_others():
    norms = xr.DataArray([[8.0, 2.0, 4.0, np.nan]], dims=("prompt", "position"))
    assert active_dormant.first_over_others(norms).item() == pytest.approx(8 / 3)
    assert active_dormant.peak_gap(norms).item() == pytest.approx(5)
    for call in (active_dormant.first_over_others, active_dormant.peak_gap):
        with pytest.raises(OutOfRange, match="no later position"):
            call(norms[:, :1])


# -- the cause ---------------------------------------------------------------------------------


def test_components_of_later_blocks_cannot_reach_the_peak_and_earlier_ones_do(tiny):
    model = Model(tiny("llama"), "tiny-llama")
    given = prompts((9, 12))
    for layer in (0, 1):
        found = active_dormant.intervene(model, given, layer)
        share = (found["peak"] - found["baseline"]) / np.abs(found["baseline"])
        assert float(np.abs(share.isel(layer=slice(layer + 1, None))).max()) < 1e-5
        assert float(np.abs(share.isel(layer=slice(layer + 1))).min()) > 1e-4
        reads = model.run(given, read=f"resid_post.{layer}").reads[f"resid_post.{layer}"]
        norm = np.linalg.norm(reads.values[0, 0, :9], axis=-1)
        assert float(found["baseline"][0]) == pytest.approx(norm[0] - norm[1:].mean(), rel=1e-4)
        assert found.manifest["read_layer"] == layer


@functools.cache
def peaked():
    """Six blocks; the MLP of block 1 makes the first token's peak, that of block 4 removes it."""
    torch.manual_seed(0)
    plain = t.LlamaForCausalLM(t.LlamaConfig(
        vocab_size=97, hidden_size=32, intermediate_size=40, num_hidden_layers=6,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=64, bos_token_id=1,
        pad_token_id=0, eos_token_id=2, initializer_range=0.08,
    )).eval()
    return primary_sink(plain, 1, 60.0, 4)


def test_the_planted_peak_needs_the_mlp_that_writes_it_and_nothing_else():
    plant = peaked()
    model, given = Model(plant.model, "peaked"), prompts((14, 11, 17))
    found = active_dormant.intervene(model, given)
    assert found.manifest["read_layer"] in plant.layers and float(found["baseline"].min()) > 40
    needed = found["needed"]
    where = [(str(c), int(layer)) for c in needed.component.values for layer in needed.layer.values
             if bool(needed.sel(component=c, layer=layer))]
    assert where == [("MLP", 1)]
    # The twin has no peak at all, wherever one looks.
    twin = active_dormant.intervene(Model(plant.twin, "twin"), given)
    assert float(np.abs(twin["baseline"]).max()) < 4
