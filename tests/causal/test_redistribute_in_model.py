"""Redistribution inside a model: the pure function on the dense pattern, times the values."""

import functools

import numpy as np
import pytest
import torch

import interp
from interp.causal import redistribute as pure
from interp.core.errors import OutOfRange, SegmentNotFound
from interp.heads import image_centric
from interp.models.model import Model

IMAGE = list(range(3, 10))
LATER = list(range(10, 15))
SINKS = {0: [0, 4], 1: [0, 5, 11], 2: [1, 4, 8]}
ARCHITECTURES = ("llama", "gemma2", "gpt_oss")
"""Grouped keys; soft-capped logits and a sliding window; learned sinks, rows below one."""


@pytest.fixture(scope="module")
def opened(tiny):
    """(architecture, lane) -> the tiny model, opened once."""
    @functools.cache
    def made(architecture: str, lane: str = "hf") -> Model:
        if lane != "hf":
            return made(architecture).using(lane)
        return Model(tiny(architecture), f"tiny-{architecture}")

    return made


def prompt(seed: int = 0) -> interp.Prompt:
    ids = np.random.default_rng(seed).integers(3, 90, 15)
    return interp.Prompt.from_tokens(ids, {"image": (3, 10), "words": (10, 15)})


def attend(p: np.ndarray, v: np.ndarray) -> np.ndarray:
    """z [query, head, d_head] from a pattern [head, query, key] and values [key, kv_head, d_head]."""
    group = p.shape[0] // v.shape[1]
    return np.einsum("hqk,khd->qhd", p, np.repeat(v, group, axis=1))


def expected(p: np.ndarray, layer: int, destination: list[int], fraction: float,
             share: float | None, mass: float | None, heads: list[int]) -> torch.Tensor:
    """The pattern of one layer after the pure functions."""
    weights = torch.tensor(p)
    rows = torch.zeros(weights.shape[:2], dtype=torch.bool)
    if share is None and mass is None:
        rows[:, LATER] = True
    else:
        rows = image_centric.select(weights, IMAGE, SINKS[layer], share or 0.0, mass or 0.0,
                                    queries=LATER)
    keep = torch.zeros(weights.shape[0], dtype=torch.bool)
    keep[heads] = True
    return pure.redistribute(weights, rows & keep[:, None], SINKS[layer], destination, fraction)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("share, mass", [(0.5, 0.2), (0.8, None), (None, None)])
@pytest.mark.parametrize("destination", ["image", "words"])
def test_a_run_redistributes_as_the_pure_function_does(
    opened, architecture, share, mass, destination
):
    model, one = opened(architecture), prompt()
    keys = IMAGE if destination == "image" else LATER
    edit = interp.redistribute(SINKS, destination, 0.6, queries="words", min_nonsink_share=share,
                               min_image_mass=mass)
    found = model.run(one, read=("pattern", "z", "v"), write=edit).reads
    changed = 0
    for layer in range(3):
        # The pattern before the edit of this layer: with only the earlier layers edited.
        earlier = {k: v for k, v in SINKS.items() if k < layer}
        before = model.run(one, read=f"pattern.{layer}", write=interp.redistribute(
            earlier, destination, 0.6, queries="words", min_nonsink_share=share,
            min_image_mass=mass) if earlier else ()).reads[f"pattern.{layer}"].values[0, 0]
        after = expected(before, layer, keys, 0.6, share, mass, list(range(6))).numpy()
        assert np.allclose(found["pattern"].values[0, layer], after, atol=2e-6)
        z = attend(after, found["v"].values[0, layer])
        assert np.allclose(found["z"].values[0, layer], z, atol=2e-5 * max(1, np.abs(z).max()))
        sums = before.sum(-1)
        assert np.allclose(found["pattern"].values[0, layer].sum(-1), sums, atol=1e-5)
        assert (sums.min() < 0.95) == (architecture == "gpt_oss")
        changed += int((np.abs(after - before).max(-1) > 1e-4).sum())
    assert changed > 5  # the theorem is about something


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_rows_chosen_inside_are_those_of_select_and_no_others_change(opened, architecture):
    model, total = opened(architecture), 0
    for seed in range(3):
        one = prompt(seed)
        before = model.run(one, read="pattern.1").reads["pattern.1"].values[0, 0]
        share = image_centric.nonsink_share(before, IMAGE, SINKS[1])[:, LATER].median().item()
        edit = interp.redistribute({1: SINKS[1]}, "image", 1.0, queries="words",
                                   min_nonsink_share=share)
        after = model.run(one, read="pattern.1", write=edit).reads["pattern.1"].values[0, 0]
        chosen = image_centric.select(before, IMAGE, SINKS[1], share, queries=LATER).numpy()
        on_sinks = before[..., SINKS[1]].sum(-1)
        moved = np.abs(after - before).max(-1) > 0
        # A chosen row without mass on a sink has nothing to move.
        assert np.array_equal(moved, chosen & (on_sinks > 0))
        assert np.abs(after[chosen][:, SINKS[1]]).max(initial=0) < 1e-6
        total += int(chosen.sum())
        assert not chosen[:, LATER].all()
    assert total > 0


def test_only_the_heads_and_layers_that_were_named_are_edited(opened):
    model, one = opened("llama"), prompt()
    base = model.run(one, read="pattern").reads["pattern"].values[0]
    more = dict(queries="words", min_nonsink_share=None, min_image_mass=None)
    edit = interp.redistribute([0], "image", 0.5, heads=["L1H4", "L1H0"], **more)
    p = model.run(one, read="pattern", write=edit).reads["pattern"].values[0]
    assert np.allclose(p[0], base[0], atol=1e-7)
    assert np.allclose(p[1][[1, 2, 3, 5]], base[1][[1, 2, 3, 5]], atol=1e-7)
    assert np.allclose(p[1][[0, 4]][:, LATER, 0], 0.5 * base[1][[0, 4]][:, LATER, 0], atol=1e-6)
    layered = interp.redistribute([0], "image", 0.5, layers=[2], **more)
    q = model.run(one, read="pattern", write=layered).reads["pattern"].values[0]
    assert np.allclose(q[:2], base[:2], atol=1e-7) and not np.allclose(q[2], base[2], atol=1e-3)


def test_nothing_moves_with_fraction_zero_and_logits_move_with_one(opened):
    model, one = opened("llama"), prompt()
    base = model.run(one).logits[0]
    for fraction, same in ((0.0, True), (1.0, False)):
        edit = interp.redistribute([0], "image", fraction, queries="words",
                                   min_nonsink_share=None, min_image_mass=None)
        logits = model.run(one, write=edit).logits[0]
        assert torch.allclose(logits, base, atol=1e-5) == same
        assert torch.allclose(logits[:10], base[:10], atol=1e-5)  # before the edited queries


@pytest.mark.parametrize("architecture", ["llama", "gpt_oss"])
def test_both_lanes_redistribute_alike(opened, architecture):
    edit = interp.redistribute(SINKS, "image", 0.6, queries="words", min_nonsink_share=0.5)
    runs = [opened(architecture, lane).run(prompt(), write=edit) for lane in ("hf", "bridge")]
    plain = opened(architecture).run(prompt()).logits[0]
    assert torch.allclose(runs[0].logits[0], runs[1].logits[0], atol=1e-3)
    assert not torch.allclose(runs[0].logits[0], plain, atol=1e-2)


def test_generated_tokens_are_edited_too_where_they_are_asked_for(opened):
    """Queries "all" go on while decoding, as the released code does."""
    model, one = opened("llama"), prompt()
    edit = interp.redistribute([0], "image", 1.0, min_nonsink_share=None, min_image_mass=None)
    p = model.run(one, read="pattern.0", write=edit, new_tokens=3).reads["pattern.0"].values[0, 0]
    assert p.shape[1:] == (18, 18) and np.abs(p[:, LATER + [15, 16, 17], 0]).max() < 1e-6
    assert (p[:, :3, 0] > 0).all()  # rows that see no image key have nowhere to move it to


def test_bad_input_is_answered_in_one_sentence(opened):
    model, one = opened("llama"), prompt()
    cases = [
        (interp.redistribute([20], "image"), OutOfRange, "position 20 does not exist"),
        (interp.redistribute([0], "imgae"), SegmentNotFound, "no segment 'imgae'.*'image'"),
        (interp.redistribute({7: [0]}, "image"), OutOfRange, "layer 7"),
    ]
    for edit, error, words in cases:
        with pytest.raises(error, match=words):
            model.run(one, write=edit)
    bare = interp.Prompt.from_tokens(range(3, 12))
    with pytest.raises(SegmentNotFound, match="no segment 'image'; it has: none"):
        model.run(bare, write=interp.redistribute([0], [4, 5]))
    # Without a choice of rows the image is not needed.
    free = interp.redistribute([0], [4, 5], min_nonsink_share=None, min_image_mass=None)
    assert model.run(bare, write=free).logits[0].shape == (9, 97)
