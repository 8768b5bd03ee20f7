"""Keys given more or less of a row: the pure operation, and inside models in both lanes."""

import functools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import interp
from interp.models.model import Model
from interp.stream.rows import reweigh_rows

ARCHITECTURES = ("llama", "gemma2", "gpt_oss")
"""Grouped keys; soft-capped logits and a sliding window; learned sinks, rows below one."""
PLACES, HEADS = (0, 4), (interp.Head(0, 1), interp.Head(2, 3), interp.Head(2, 5))


def rows(seed: int, deficit: float = 0.0) -> torch.Tensor:
    """Attention [head, query, key] of its own size on each axis, rows of sum 1 - deficit."""
    made = torch.rand(3, 4, 7, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return made / made.sum(-1, keepdim=True) * (1 - deficit)


def mask(*places: int) -> torch.Tensor:
    return torch.isin(torch.arange(7), torch.tensor(places))


ALL = torch.ones(3, 4, dtype=torch.bool)


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 999), st.floats(0.01, 50.0), st.floats(0.0, 0.9))
def test_a_factor_is_a_shift_of_logits_and_keeps_sums_and_ratios(seed, factor, deficit):
    before = rows(seed, deficit)
    after = reweigh_rows(before, ALL, mask(1, 5), factor)
    assert torch.allclose(after.sum(-1), before.sum(-1), atol=1e-12)
    shifted = before.log() + np.log(factor) * mask(1, 5)
    wanted = shifted.softmax(-1) * before.sum(-1, keepdim=True)
    assert torch.allclose(after, wanted, atol=1e-12)
    # Differences between the others shrink by what the keys gained, their ratios stay.
    others = ~mask(1, 5)
    ratio = after[..., others] / before[..., others]
    assert torch.allclose(ratio, ratio[..., :1].expand_as(ratio), atol=1e-9)


def test_factors_compose_and_one_changes_nothing():
    before = rows(3)
    twice = reweigh_rows(reweigh_rows(before, ALL, mask(0), 3.0), ALL, mask(0), 0.2)
    assert torch.allclose(twice, reweigh_rows(before, ALL, mask(0), 0.6), atol=1e-12)
    assert torch.equal(reweigh_rows(before, ALL, mask(0), 1.0), before)
    assert not torch.allclose(twice, before)


def test_a_power_sets_the_share_and_a_zero_factor_empties_the_keys():
    before = rows(4, deficit=0.3)
    share = before[..., mask(2, 3)].sum(-1) / before.sum(-1)
    after = reweigh_rows(before, ALL, mask(2, 3), power=0.1)
    assert torch.allclose(after[..., mask(2, 3)].sum(-1) / before.sum(-1), share**0.1)
    assert torch.allclose(after.sum(-1), before.sum(-1))
    gone = reweigh_rows(before, ALL, mask(2, 3), 0.0)
    assert float(gone[..., mask(2, 3)].abs().max()) == 0.0
    assert torch.allclose(gone.sum(-1), before.sum(-1))


def test_only_the_chosen_rows_change_and_empty_ones_do_not():
    before = rows(5)
    before[1, 2] = 0.0
    before[1, 2, 0] = 1.0  # all of it on the key
    before[2, 1, 0] = 0.0  # nothing on the key
    chosen = ALL.clone()
    chosen[0] = False
    after = reweigh_rows(before, chosen, mask(0), 5.0)
    same = (after == before).all(-1)
    assert same[0].all() and same[1, 2] and same[2, 1] and int(same.sum()) == 6


@pytest.fixture(scope="module")
def opened(tiny):
    @functools.cache
    def made(architecture: str, lane: str = "hf") -> Model:
        if lane != "hf":
            return made(architecture).using(lane)
        return Model(tiny(architecture), f"tiny-{architecture}")

    return made


def prompt() -> interp.Prompt:
    ids = np.random.default_rng(0).integers(3, 90, 11)
    return interp.Prompt.from_tokens(ids, {"front": [0, 4], "late": (6, 11)})


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_run_reweighs_as_the_pure_function_does(opened, architecture):
    model, one = opened(architecture), prompt()
    edit = interp.reweigh("front", 4.0, queries="late", heads=HEADS)
    found = model.run(one, read="pattern", write=edit).reads["pattern"].values[0]
    for layer in range(3):
        earlier = [h for h in HEADS if h.layer < layer]
        write = interp.reweigh("front", 4.0, queries="late", heads=earlier) if earlier else ()
        before = model.run(one, read=f"pattern.{layer}", write=write).reads[f"pattern.{layer}"]
        chosen = torch.zeros(6, 11, dtype=torch.bool)
        for head in HEADS:
            chosen[head.head, 6:] |= head.layer == layer
        keys = torch.isin(torch.arange(11), torch.tensor(PLACES))
        wanted = reweigh_rows(torch.tensor(before.values[0, 0]), chosen, keys, 4.0)
        assert np.allclose(found[layer], wanted, atol=2e-6)
        assert np.allclose(found[layer].sum(-1), before.values[0, 0].sum(-1), atol=2e-6)
    clean = model.run(one, read="pattern").reads["pattern"].values[0]
    assert np.abs(found - clean).max() > 0.01


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_both_lanes_agree(opened, architecture):
    edit = interp.reweigh([0], 5.0, layers=[0, 1])
    one, base = prompt(), opened(architecture).run(prompt()).logits[0]
    mine, theirs = (opened(architecture, lane).run(one, write=edit).logits[0]
                    for lane in ("hf", "bridge"))
    assert torch.allclose(mine, theirs, atol=2e-3)
    assert (mine - base).abs().max() > 0.05


@pytest.mark.parametrize("lane", ["hf", "bridge"])
def test_it_equals_a_shift_of_the_logits(opened, lane):
    """ln(gamma) on the key's logit, for a model whose rows sum to one."""
    shift = torch.zeros(1, 1, 11)
    shift[..., 0] = float(np.log(0.3))
    model = opened("llama", lane)
    by_logit = model.run(prompt(), write=interp.edit("scores", "add", shift)).logits[0]
    by_factor = model.run(prompt(), write=interp.reweigh([0], 0.3)).logits[0]
    assert torch.allclose(by_logit, by_factor, atol=1e-4)


def test_it_acts_in_generation_and_a_factor_of_one_does_not(opened):
    model, one = opened("llama"), prompt()
    plain = model.run(one, new_tokens=6, logits="last")
    same = model.run(one, new_tokens=6, logits="last", write=interp.reweigh([0], 1.0))
    late = model.run(one, new_tokens=6, write=interp.reweigh([0], 30.0, phase="decode"))
    assert same.new_tokens == plain.new_tokens
    clean = model.run(one, new_tokens=6).logits[0]
    assert torch.allclose(late.logits[0][:11], clean[:11], atol=1e-5)
    assert (late.logits[0][11] - clean[11]).abs().max() > 0.01


@pytest.mark.parametrize("given, words", [
    (dict(), "either a factor or a power"),
    (dict(factor=2.0, power=0.5), "either a factor or a power"),
    (dict(factor=-1.0), "from 0 on"),
    (dict(power=0.0), "from 0 on"),
    (dict(factor=float("nan")), "from 0 on"),
    (dict(factor=2.0, layers=[0], heads="L0H0"), "either layers or heads"),
])
def test_bad_settings_are_one_sentence(given, words):
    with pytest.raises(ValueError, match=words):
        interp.reweigh([0], **given)


def test_heads_that_do_not_exist_are_refused(opened):
    with pytest.raises(IndexError, match="L7H0 does not exist"):
        opened("llama").run(prompt(), write=interp.reweigh([0], 2.0, heads="L7H0"))
