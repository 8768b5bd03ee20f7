"""Edits of the last row, replayed as one token, equal whole passes; other edits are refused."""

import functools

import numpy as np
import pytest
import torch

import interp
from interp.causal.answer_row import answer_row
from interp.core import Prompt, PromptError
from interp.models.model import Model

N = 13
PLAIN = {"min_nonsink_share": None, "min_image_mass": None}


@pytest.fixture(scope="module")
def opened(tiny):
    return functools.cache(lambda architecture: Model(tiny(architecture), f"tiny-{architecture}"))


def prompt(seed=0):
    # What is edited lies within the windows of those that have some.
    ids = np.random.default_rng(seed).integers(3, 90, N)
    return Prompt.from_tokens(ids, {"image": (9, 12)})


def writes():
    return [
        interp.redistribute([8], "image", 0.5, queries="last", **PLAIN),
        interp.redistribute([8], "image", 0.9, queries="last", layers=[1], **PLAIN),
        interp.redistribute([8], "image", 0.9, queries="last", layers=[2], **PLAIN),
        interp.redistribute([8, 9], "image", 0.9, queries=[N - 1], heads=["L1H2", "L1H3"], **PLAIN),
        interp.redistribute([8, 9], "image", 0.6, queries="last", min_nonsink_share=0.3,
                            min_image_mass=0.1),
        interp.reweigh("image", 3.0, queries="last", layers=[0, 2]),
        [interp.block("last", [8, 10], layers=[1]), interp.reweigh([11], 2.0, phase="last")],
        interp.block("last", "image", heads=["L2H0"]),
        (),
    ]


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "mistral", "gemma2", "gpt_oss", "llava"])
def test_every_variant_is_a_whole_pass(opened, architecture):
    model, given = opened(architecture), prompt()
    found = answer_row(model, given, writes())
    plain = model.run(given, logits="last").logits[0][-1]
    size = float(plain.abs().max())
    for logits, write in zip(found, writes()):
        expected = model.run(given, write=write, logits="last").logits[0][-1]
        assert torch.allclose(logits, expected, atol=1e-5 * size)
    moved = (found - plain).abs().amax(1)
    assert bool((moved[[0, 5, 6, 7]] > 1e-3 * size).all()) and float(moved[-1]) < 1e-5 * size


def test_one_token_goes_through_the_blocks_from_the_first_edit_on(opened, monkeypatch):
    model, given, bases = opened("llama"), prompt(), []
    make = model.resumable
    monkeypatch.setattr(model, "resumable", lambda p: bases.append(make(p)) or bases[-1])
    answer_row(model, given, writes())
    # The first blocks are 0, 1, 2, 1, 0, 0, 0, 2; a variant without edits takes the last block.
    assert bases[0].spent == 3 + 2 + 1 + 2 + 3 + 3 + 3 + 1 + 1


def test_edits_of_other_rows_are_refused(opened):
    model, given = opened("llama"), prompt()
    with pytest.raises(PromptError, match="Redistribute also edits position 0; say queries='last'"):
        answer_row(model, given, [interp.redistribute([0], "image", 0.5)])
    with pytest.raises(PromptError, match="BlockEdges also edits position 11"):
        answer_row(model, given, [interp.block([11, 12], [1])])
    with pytest.raises(PromptError, match="AblateHeads does not only change"):
        answer_row(model, given, [interp.ablate("L0H0")])
