"""The OCR sink's redistribution: what the pure function does, composable, and nothing at beta 1."""

import functools

import numpy as np
import pytest
import torch

import interp
from interp.causal import redistribute as pure
from interp.causal.redistribute import ocr_sink_redistribution
from interp.core.errors import SegmentNotFound
from interp.models.model import Model

IMAGE = list(range(3, 10))


@pytest.fixture(scope="module")
def opened(tiny):
    """architecture -> the tiny model, opened once."""
    return functools.cache(lambda architecture: Model(tiny(architecture), f"tiny-{architecture}"))


def prompt() -> interp.Prompt:
    ids = np.random.default_rng(0).integers(3, 90, 15)
    return interp.Prompt.from_tokens(ids, {"image": (3, 10), "evidence": [4, 7]})


@pytest.mark.parametrize("architecture", ["llama", "gemma2", "gpt_oss"])
@pytest.mark.parametrize("where, keys", [("all", range(15)), ("visual", IMAGE), ("evidence", [4, 7])])
def test_the_pattern_is_that_of_the_pure_function(opened, architecture, where, keys):
    model, heads = opened(architecture), ["L1H4", "L1H1"]
    before = model.run(prompt(), read="pattern.1").reads["pattern.1"].values[0, 0]
    edit = ocr_sink_redistribution(heads, 0.4, destination=where)
    after = model.run(prompt(), read="pattern", write=edit).reads["pattern"].values[0]
    rows = np.zeros(before.shape[:2], dtype=bool)
    rows[[1, 4]] = True
    expected = pure.redistribute(before, rows, [0], list(keys), 0.6).numpy()
    assert np.allclose(after[1], expected, atol=2e-6)
    # Rows of these heads that see the destination give 60 % of what they had on the first key.
    seen = before[[1, 4]][..., [k for k in keys if k]].sum(-1) > 0
    kept = after[1][[1, 4]][..., 0][seen] / before[[1, 4]][..., 0][seen]
    assert np.allclose(kept, 0.4, atol=1e-4) and seen.sum() > 10
    assert np.allclose(after[1].sum(-1), before.sum(-1), atol=1e-5)
    # Heads of the same key group are left alone.
    assert np.allclose(after[1][[0, 2, 3, 5]], before[[0, 2, 3, 5]], atol=1e-7)


def test_beta_one_changes_nothing_and_beta_zero_empties_the_sink(opened):
    model = opened("llama")
    base = model.run(prompt()).logits[0]
    same = model.run(prompt(), write=ocr_sink_redistribution("L1H4", 1)).logits[0]
    assert torch.allclose(same, base, atol=1e-6)
    gone = model.run(prompt(), read="pattern.1", write=ocr_sink_redistribution("L1H4", 0))
    assert gone.reads["pattern.1"].values[0, 0, 4, 1:, 0] == pytest.approx(np.zeros(14), abs=1e-6)
    assert not torch.allclose(gone.logits[0], base, atol=1e-3)


def test_other_sinks_by_layer_take_the_place_of_the_first_key(opened):
    model = opened("llama")
    edit = ocr_sink_redistribution(["L1H4", "L2H0"], 0.0, sinks={1: (0, 5), 2: (8,)},
                                   destination="image")
    p = model.run(prompt(), read="pattern", write=edit).reads["pattern"].values[0]
    assert np.abs(p[1, 4, 9:][:, [0, 5]]).max() < 1e-6 and p[1, 4, 9:, 8].min() > 0
    assert np.abs(p[2, 0, 9:, 8]).max() < 1e-6 and p[2, 0, 9:, 0].min() > 0


def test_it_composes_with_other_interventions_and_works_while_generating(opened):
    model, one = opened("llama"), prompt()
    edit, cut = ocr_sink_redistribution("L1H4", 0.0), interp.ablate("L2H3")
    both = model.run(one, read=("pattern.1", "z.2"), write=[edit, cut], new_tokens=3)
    p = both.reads["pattern.1"].values[0, 0]
    assert p.shape[1] == 18 and np.abs(p[4, 1:, 0]).max() < 1e-6
    only = model.run(one, read="pattern.1", write=cut, new_tokens=3).reads["pattern.1"].values[0, 0]
    assert (only[4, :, 0] > 1e-4).any()
    made = model.generate([one], new_tokens=3, write=[edit, cut])
    assert made[0] == both.new_tokens[0][: len(made[0])] and len(made[0]) > 0
    late = model.run(one, read="pattern.1", new_tokens=3, write=ocr_sink_redistribution(
        "L1H4", 0.0, phase="decode")).reads["pattern.1"].values[0, 0]
    assert np.abs(late[4, 15:, 0]).max() < 1e-6 and (late[4, 1:15, 0] > 1e-6).any()


def test_bad_input_is_one_sentence(opened):
    with pytest.raises(ValueError, match="beta must lie between 0 and 1, not 1.5"):
        ocr_sink_redistribution("L0H0", 1.5)
    bare = interp.Prompt.from_tokens(range(3, 12))
    with pytest.raises(SegmentNotFound, match="'evidence'"):
        opened("llama").run(bare, write=ocr_sink_redistribution("L0H0", destination="evidence"))
