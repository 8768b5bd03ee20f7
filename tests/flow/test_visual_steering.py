"""Steering by what the picture adds, attention by gaze and by the tower, and their controls."""

import numpy as np
import pytest
import torch

import interp
from interp.causal import decoding
from interp.causal.decoding import decode
from interp.core.errors import PromptError
from interp.flow.visual_steering import (
    GIFT,
    PAINT,
    VISTA,
    gaze_shift,
    is_content_word,
    local_and_summary,
    steering_vectors,
)
from interp.models.model import Model
from interp.models.stepping import unembed

IMAGE = 96


@pytest.fixture(scope="module")
def llava(tiny):
    return Model(tiny("llava"), "tiny-llava")


def prompt(seed=0):
    rng = np.random.default_rng(seed)
    ids = [5, 6, 7, *[IMAGE] * 9, 20, 31, 42, 53]
    made = interp.Prompt.from_tokens(ids, segments={"image": (3, 12), "question": (12, 15)})
    return interp.Prompt(made.ids, made.segments, inputs={
        "pixel_values": rng.standard_normal((1, 3, 24, 24)).astype(np.float32)},
        tokens=tuple("abc") + ("<image>",) * 9 + ("is", "red", "ring", "?"))


def test_vectors_are_the_residuals_with_minus_without_the_picture(llava):
    given = [prompt(0), prompt(1)]
    vectors = steering_vectors(llava, given)
    for one, v in zip(given, vectors):
        bare = decoding.without_pictures(one)
        with_, without = (llava.run(p, read="resid_post").reads["resid_post"].values[0, :, -1]
                          for p in (one, bare))
        assert np.allclose(v, with_ - without, atol=1e-4)
    nothing = steering_vectors(llava, given, given)
    assert nothing.abs().max() < 1e-5


def test_vista_steers_and_listens_to_earlier_layers(llava):
    # Of three layers, those at the depth of layers 25 to 30 of 32: block 1.
    method = VISTA(strength=0.2, alpha=0.3)
    (one,) = decode(llava, prompt(0), method, 1)
    write = one.plan.write
    run = llava.run(prompt(0), write=write, read="resid_post")
    assert torch.allclose(one.first[0], run.logits[0][-1], atol=1e-4)
    early = torch.tensor(run.reads["resid_post"].values[0, 1, -1])
    assert torch.allclose(one.second[0], unembed(llava, early), atol=1e-3)
    assert torch.allclose(one.combined[0], 0.3 * one.second[0] + 0.7 * one.first[0], atol=1e-4)
    assert torch.allclose(unembed(llava, early, [4, 9]), unembed(llava, early)[[4, 9]])


def test_without_strength_and_weight_vista_is_greedy_and_the_control_is_as_strong(llava):
    plain = decode(llava, prompt(0), None, 4)[0]
    same = decode(llava, prompt(0), VISTA(strength=0.0, alpha=0.0), 4)[0]
    assert same.tokens == plain.tokens and torch.equal(same.combined, plain.combined)
    own, other = (decode(llava, prompt(0), VISTA(alpha=0.0, seed=s), 1)[0] for s in (None, 3))
    sizes = [np.linalg.norm(one.plan.write[0].value.values, axis=-1) for one in (own, other)]
    assert np.allclose(sizes[0], 0.17, atol=1e-5) and np.allclose(sizes[1], 0.17, atol=1e-5)
    assert not torch.allclose(own.combined, other.combined, atol=1e-3)


def test_gaze_shift_finds_what_a_word_newly_looks_at_whatever_the_sinks():
    generator = torch.Generator().manual_seed(0)
    rows = 0.001 * torch.rand(4, 6, 30, generator=generator)
    rows[:, 3, [7, 8]] += 0.2                       # one word looks at two cells
    shift = gaze_shift(rows)
    assert shift.min() == 0 and shift.max() == 1
    assert set(shift.topk(2).indices.tolist()) == {7, 8}
    sinks = rows.clone()
    sinks[:, :, [0, 29]] += 0.5
    assert torch.allclose(gaze_shift(sinks), shift, atol=1e-4)
    # Words without content do not count, and a look that only fades is none.
    assert set(gaze_shift(rows, [True, True, False, True, True]).topk(2).indices.tolist()) != {7, 8}
    fading = torch.linspace(1, 0, 6)[None, :, None].expand(4, 6, 30)
    assert gaze_shift(fading).abs().max() == 0
    with pytest.raises(PromptError, match="two consecutive"):
        gaze_shift(rows[:, :1])
    assert [is_content_word(w) for w in ("▁Red", "the", "?", "7", "Ġand")] == [
        True, False, False, True, False]


def test_gift_multiplies_and_renormalizes_the_row_that_predicts(llava):
    method = GIFT(alpha=2.0)
    (one,) = decode(llava, prompt(0), method, 1)
    layers, shift = one.plan.found["layers"], one.plan.found["map"]
    assert layers == decoding.at_depth(range(12, 23), 3)
    first = layers[0]
    before, after = (llava.run(prompt(0), write=w, read=f"pattern.{first}").reads[
        f"pattern.{first}"].values[0, 0] for w in ((), one.plan.write))
    factor = np.ones(16)
    factor[3:12] = np.exp(2.0 * shift.numpy())
    factor[12:15] = factor[3:12].mean()
    expected = before[:, -1] * factor
    expected /= expected.sum(-1, keepdims=True)
    assert np.allclose(after[:, -1], expected, atol=1e-5)
    assert np.allclose(after[:, :-1], before[:, :-1], atol=1e-6)    # no other row
    plain = decode(llava, prompt(0), None, 3)[0].tokens
    assert decode(llava, prompt(0), GIFT(alpha=0.0), 3)[0].tokens == plain
    shuffled = decode(llava, prompt(0), GIFT(seed=1), 1)[0].plan.found["map"]
    assert torch.equal(shuffled.sort().values, shift.sort().values) and not torch.equal(
        shuffled, shift)


def test_local_and_summary_tokens_are_apart_and_an_even_tower_has_no_summary():
    rng = np.random.default_rng(0)
    early, late = rng.random((5, 40)), 0.1 * rng.random((5, 40))
    late[:, [3, 30]] += 5.0
    early[:, 3] += 9.0
    local, summary = local_and_summary(early, late)
    assert summary.nonzero()[:, 0].tolist() == [3, 30]
    assert not bool((local & summary).any()) and int(local.sum()) in (9, 10)
    even = local_and_summary(early, np.ones((5, 40)))
    assert not even[1].any() and int(even[0].sum()) == 10 and bool(even[0][3])


def test_paint_adds_a_share_of_each_logits_size_in_the_row_that_predicts(llava):
    (one,) = decode(llava, prompt(0), PAINT(), 1)
    found = one.plan.found
    local, summary = (set(map(int, found[name])) for name in ("local", "summary"))
    assert local and not local & summary and local | summary <= set(range(3, 12))
    before, after = (llava.run(prompt(0), write=w, read="scores.0").reads["scores.0"].values[0, 0]
                     for w in ((), one.plan.write))
    share = np.zeros(16)
    share[list(local)], share[list(summary)] = 0.7, 0.3
    assert np.allclose(after[:, -1], before[:, -1] + share * np.abs(before[:, -1]), atol=1e-4)
    assert np.array_equal(after[:, :-1], before[:, :-1])
    drawn = decode(llava, prompt(0), PAINT(seed=5), 1)[0].plan.found
    assert [len(drawn[n]) for n in ("local", "summary")] == [len(local), len(summary)]
