"""Schedules equal whole passes without the dropped tokens; budgets are true; planted criteria win."""

import copy

import numpy as np
import pytest
import torch

import interp
from interp.causal.removal import Removal
from interp.core import OutOfRange, Prompt, PromptError, Segment
from interp.flow import pruning
from interp.flow.pruning_criteria import criterion
from interp.flow.pruning_evidence import Evidence
from interp.models.model import Model

N, IMAGE = 16, tuple(range(3, 9))
AFTER = tuple(range(9, N))


def prompt(seed=0):
    ids = np.random.default_rng(seed).integers(3, 90, N)
    picture = Segment("image", IMAGE, "image", (2, 3), ((0, 0, 1, 1),) * 6)
    return Prompt(tuple(int(i) for i in ids), (picture,))


@pytest.fixture(scope="module")
def llama(tiny):
    return Model(tiny("llama"), "tiny-llama")


# -- budgets ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("stages, average", [
    ([(2, 252), (20, 38)], 192.0), ([(1, 60), (20, 27)], 63.8), ([(0, 284), (20, 38)], 191.8),
    ([(0, 96), (20, 10)], 63.8), ([(0, 284), (20, 0)], 177.5), ([(0, 98), (21, 0)], 64.3)])
def test_released_recipes_have_these_budgets(stages, average):
    """LLaVA-1.5-7B: 32 blocks, 576 image tokens; two of them are not what their label says."""
    found = pruning.average_tokens(stages, 32, 576)
    left, total = 576, 0
    for layer in range(32):
        left = dict(stages).get(layer, left)
        total += left
    assert found == total / 32
    assert found == pytest.approx(average, abs=0.0501)


def test_two_stages_get_the_budget_of_one():
    for keep, first, second, layers, total in ((9, 0, 4, 6, 36), (144, 2, 20, 32, 576), (3, 1, 3, 5, 9)):
        a, b = pruning.with_random(keep, first, second, layers, total)
        goal = pruning.average_tokens([(first, keep)], layers, total)
        made = pruning.average_tokens([(first, a), (second, b)], layers, total)
        assert abs(made - goal) <= (second - first) / 2 / layers and keep <= a <= total and b <= keep
    assert pruning.with_random(9, 0, 4, 6, 36) != (9, 9)


# -- schedules -------------------------------------------------------------------------------------


def last_row(model, given, stages):
    """Whole passes in which later positions and kept tokens see no dropped token from its block on."""
    cuts = []
    for layer, kept in stages:
        dropped = [p for p in IMAGE if p not in kept]
        cuts.append(interp.block([*kept, *AFTER], dropped, layers=list(range(layer, model.n_layers))))
    return model.run(given, write=cuts).logits[0][-1]


@pytest.mark.parametrize("architecture", ["llama", "gemma2", "gpt_oss", "qwen2_5_vl", "gemma3"])
def test_stages_are_whole_passes_without_the_dropped_tokens(tiny, architecture):
    model, given = Model(tiny(architecture), f"tiny-{architecture}"), prompt()
    evidence = Evidence(model, given)
    stages = [(1, (3, 5, 6, 8)), (2, (5, 8))]
    expected = last_row(model, given, stages)
    made = pruning.apply(evidence, [(layer, kept, len(kept)) for layer, kept in stages])
    assert torch.allclose(made.logits(2, [(5, 8)])[0], expected, atol=1e-4)
    one = pruning.apply(evidence, [(1, (3, 5, 6, 8), 4)])
    both = one.logits(2, [(5, 8), (3, 5, 6, 8), (6,)], batch_size=2)
    assert torch.allclose(both[0], expected, atol=1e-4)
    assert torch.allclose(both[1], last_row(model, given, stages[:1]), atol=1e-4)


@pytest.mark.parametrize("how", ["drop_keep_ids", "drop_compact_ids"])
def test_one_stage_is_removal(llama, how):
    given = prompt()
    sets = [(3, 5), (4, 8), (), (3, 4, 5, 6, 7, 8)]
    found = Evidence(llama, given, how=how).logits(1, sets)
    assert torch.allclose(found, Removal(llama, given, "image", how).logits(1, sets), atol=1e-5)
    other = Evidence(llama, given).logits(1, sets, how=how)
    assert torch.allclose(found, other, atol=1e-6)


def test_compact_ids_number_the_survivors_of_every_stage(llama):
    """At block 0 compacted survivors are the shorter prompt itself, and stages of it too."""
    given = prompt()
    evidence = Evidence(llama, given, how="drop_compact_ids")
    kept = (3, 6, 8)
    short = Prompt.from_tokens([i for p, i in enumerate(given.ids) if p not in IMAGE or p in kept],
                               {"image": (3, 6)})
    assert torch.allclose(evidence.logits(0, [kept])[0], llama.run(short).logits[0][-1], atol=1e-4)
    two = pruning.apply(evidence, [(0, kept, 3)]).logits(2, [(6,)])[0]
    same = Evidence(llama, short, how="drop_compact_ids").logits(2, [(4,)])[0]
    assert torch.allclose(two, same, atol=1e-4)
    apart = Evidence(llama, given).logits(0, [kept])[0]
    assert float((apart - llama.run(short).logits[0][-1]).abs().max()) > 1e-3


def test_merging_changes_nothing_where_tokens_are_equal(llama):
    same = Prompt.from_tokens([7, 8, 9, *[5] * 6, *range(20, 27)], {"image": (3, 9)})
    plain, merged = (pruning.apply(Evidence(llama, same), [(0, (4, 6), 2)], merge=m)
                     for m in (False, True))
    assert torch.allclose(plain.logits(1, [(4, 6)]), merged.logits(1, [(4, 6)]), atol=1e-5)
    evidence = Evidence(llama, prompt())
    plain, merged = (pruning.apply(evidence, [(0, (4, 6), 2)], merge=m).logits(1, [(4, 6)])
                     for m in (False, True))
    assert float((plain - merged).abs().max()) > 1e-3
    # Two tokens that stand for six: the mean state of all of them is conserved.
    states = evidence.states(0)
    made = pruning.merging(evidence, 0, (4, 6))
    assert made.shape == (2, llama.d_model)
    near = (torch.nn.functional.normalize(states, dim=1)
            @ torch.nn.functional.normalize(states[[1, 3]], dim=1).T).argmax(1)
    counts = torch.bincount(near, minlength=2)[:, None]
    assert torch.allclose((made * counts).sum(0), states.sum(0), atol=1e-3)


def test_a_cache_pruned_per_head(llama):
    evidence = Evidence(llama, prompt())
    stay = torch.rand(llama.n_layers, llama.n_heads, 6, generator=torch.Generator().manual_seed(0)) > 0.5
    found = pruning.per_head(evidence, stay)
    cuts = [interp.block([N - 1], [IMAGE[j] for j in range(6) if not stay[layer, head, j]],
                         heads=(layer, head))
            for layer in range(llama.n_layers) for head in range(llama.n_heads)]
    expected = llama.run(prompt(), write=cuts).logits[0][-1]
    assert torch.allclose(found, expected, atol=1e-4)
    whole = pruning.per_head(evidence, torch.ones_like(stay))
    assert torch.allclose(whole, evidence.base.logits[-1].float(), atol=1e-4)


# -- against random --------------------------------------------------------------------------------


def planted(tiny):
    """A model whose attention writes nothing: only the last token's own state decides."""
    hf = copy.deepcopy(tiny("llama"))
    with torch.no_grad():
        for block in hf.model.layers[2:]:
            block.self_attn.o_proj.weight.zero_()
    return Model(hf, "planted")


def test_measure_is_the_loop_over_arms(llama):
    prompts, answers = [prompt(s) for s in range(3)], [7, 8, 9]
    found = pruning.measure(llama, prompts, answers, criteria=["FastV", "DivPrune"], share=0.5, draws=4)
    assert found["number"].values.tolist() == [3, 3, 3]
    assert np.isnan(found["p"].sel(arm="FastV", layer=0)).all()
    for i, given in enumerate(prompts):
        whole = llama.run(given).logits[0][-1].log_softmax(-1)
        assert float(found["full_p"][i]) == pytest.approx(float(whole[answers[i]].exp()), abs=1e-6)
        for arm in ("FastV", "DivPrune"):
            for layer in (1, 2):
                kept = criterion(arm).keep(Evidence(llama, given), layer, 3)
                one = found.data.sel(arm=arm, layer=layer).isel(prompt=i)
                assert np.flatnonzero(one["kept"]).tolist() == [p - 3 for p in kept]
                row = last_row(llama, given, [(layer, kept)]).log_softmax(-1)
                assert float(one["p"]) == pytest.approx(float(row[answers[i]].exp()), abs=1e-6)
                kl = float((row.exp() * (row - whole)).sum())
                assert float(one["kl"]) == pytest.approx(kl, abs=1e-5)
                assert float(one["row"]) == pytest.approx(np.mean([(p - 3) // 3 for p in kept]))
                assert float(one["correct"]) == float(int(row.argmax()) == answers[i])
    gain = pruning.advantage(found, "p")
    assert gain[1, 1, 2] == pytest.approx(
        float(found["p"][1, 1, 2] - found["random_p"][1, :, 2].mean()))
    assert (pruning.advantage(found, "kl")[:, 1, 2] == pytest.approx(
        (found["random_kl"].mean("draw") - found["kl"].sel(arm="DivPrune")).sel(layer=2).values))


def test_nothing_matters_past_a_planted_horizon(tiny):
    model = planted(tiny)
    found = pruning.measure(model, [prompt(s) for s in range(3)], [7] * 3,
                            criteria=["FastV", "DivPrune", "PyramidDrop"], draws=10)
    for key in ("p", "kl", "none_p", "random_p"):
        reference = found["full_p"] if key.endswith("p") else 0
        assert float(np.abs(found[key].sel(layer=2) - reference).max()) < 1e-6
    assert float(np.abs(found["p"].sel(layer=1) - found["full_p"]).max()) > 1e-5
    assert pruning.no_better_from(pruning.advantage(found, "p"), [0, 1, 2]) in (0, 1, 2)
    again = pruning.measure(model, [prompt(0)], [7], criteria=["DivPrune"], draws=10)
    assert np.allclose(again["random_p"], found["random_p"][:1], atol=1e-7)


def test_the_layer_from_which_nothing_is_better():
    rng = np.random.default_rng(0)
    gain = rng.normal(0, 0.1, (60, 4, 6))
    gain -= gain.mean(0)
    assert pruning.no_better_from(gain, range(6)) == 0
    gain[:, 2, :4] += 0.2
    assert pruning.no_better_from(gain, range(6)) == 4
    assert pruning.better_than_random(gain)[2].tolist() == [True] * 4 + [False] * 2
    gain[:, 1, 5] += 0.2
    assert pruning.no_better_from(gain, range(6)) is None
    gain[:, 1, 5] = np.nan  # cannot be applied there
    assert pruning.no_better_from(gain, range(6)) == 4
    worse = -np.abs(gain)
    assert pruning.no_better_from(worse, range(6)) == 0


def test_overlaps_are_jaccard(llama):
    found = pruning.measure(llama, [prompt(s) for s in range(2)], [7, 7],
                            criteria=["FastV", "DivPrune", "ToDRE"], draws=1, share=0.5, layers=[1])
    table = pruning.overlap(found)[:, :, 0]
    assert np.allclose(np.diag(table), 1) and np.allclose(table, table.T)
    kept = found["kept"].values[:, :, 0]
    expected = np.mean([(k[0] & k[1]).sum() / (k[0] | k[1]).sum() for k in kept])
    assert table[0, 1] == pytest.approx(expected)


def test_what_a_model_cannot_do_is_said_by_name(llama):
    found = pruning.measure(llama, [prompt()], [7], criteria=["[CLS] attention", "HiPrune", "DivPrune"],
                            draws=2)
    refused = found.manifest["untestable"]
    assert set(refused) == {"[CLS] attention", "HiPrune"}
    assert all("tiny-llama is a text model" in reason for reason in refused.values())
    assert np.isnan(found["p"].sel(arm="HiPrune")).all()
    assert not np.isnan(found["p"].sel(arm="DivPrune")).any()


def test_bad_input_is_one_sentence(llama):
    evidence = Evidence(llama, prompt())
    with pytest.raises(OutOfRange, match="cannot keep 7 of 6 image tokens"):
        pruning.apply(evidence, [(1, "random", 7)])
    with pytest.raises(OutOfRange, match="position 12 is to be kept"):
        pruning.apply(evidence, [(1, (12,), 1)])
    with pytest.raises(OutOfRange, match="2 positions are given, but 3"):
        pruning.apply(evidence, [(1, (3, 4), 3)])
    with pytest.raises(OutOfRange, match="block 1 is past"):
        pruning.apply(evidence, [(2, "random", 4), (1, "random", 2)])
    with pytest.raises(PromptError, match="drop_keep_ids or drop_compact_ids, not 'mask_keys'"):
        Evidence(llama, prompt(), how="mask_keys")
    with pytest.raises(OutOfRange, match="stages ascend"):
        pruning.average_tokens([(4, 3), (2, 1)], 6, 9)
    with pytest.raises(OutOfRange, match="cannot keep 10 of 9"):
        pruning.average_tokens([(2, 10)], 6, 9)
    with pytest.raises(PromptError, match="1 prompts need as many answers, not 2"):
        pruning.measure(llama, [prompt()], [1, 2])
    with pytest.raises(PromptError, match=r"shape \(3, 6, 6\)"):
        pruning.per_head(evidence, np.ones((3, 6, 5), bool))


def test_draw_shows_random_and_nothing(llama):
    from interp.figures.style import canvas

    found = pruning.measure(llama, [prompt(s) for s in range(2)], [7, 8], criteria=["FastV", "DivPrune"],
                            draws=3)
    _, ax = canvas()
    pruning.draw(found, ax, arms={"attention": ["FastV"], "diversity": ["DivPrune"]})
    assert [line.get_label() for line in ax.lines] == ["attention", "diversity", "random",
                                                       "no image token"]
