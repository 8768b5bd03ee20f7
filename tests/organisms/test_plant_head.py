"""A planted head gains exactly the logits that its dial says, and no other head sees anything of it."""

import numpy as np
import pytest
import torch
from torch import nn

from interp.core import ModelRefused, OutOfRange
from interp.organisms.dial import Dial
from interp.organisms.plant_head import CodeBook, circle

LAYER, HEAD = 1, 4
TOKENS = (20, 30, 40)
PAIRS = ((2, 1), (4, 3), (6, 5))


def attention(model, ids):
    model.set_attn_implementation("eager")
    with torch.no_grad():
        return torch.stack(model(input_ids=ids, use_cache=False, output_attentions=True).attentions)


def planted(model, **more):
    """Token 50 + i asks for TOKENS[i]."""
    book = CodeBook(model, axes=6)
    asks = book.code({50 + i: a for i, a in enumerate(circle(TOKENS).values())})
    has = book.code(circle(TOKENS))
    # Near enough for a window of five.
    ids = torch.tensor([[1, 20, 50, 30, 51, 40, 52, 7, 8, 9]])
    matched = torch.zeros(1, 10, 10, dtype=torch.bool)
    for query, key in PAIRS:
        matched[0, query, key] = True
    return book, book.head(LAYER, HEAD, {"input_ids": ids}, asks, has, matched, **more), ids, matched


@pytest.mark.parametrize("architecture", ["llama", "mistral"])
def test_the_head_gains_the_logits_that_the_dial_says(tiny, architecture):
    book, head, ids, _ = planted(tiny(architecture))
    off = attention(book.model, ids)
    head.look.set(book.model, 3.0)
    on = attention(book.model, ids)
    # Against a key without a code (itself), the log odds move by the logit.
    gained = []
    for q, k in PAIRS:
        odds = [float((w[LAYER, 0, HEAD, q, k] / w[LAYER, 0, HEAD, q, q]).log()) for w in (off, on)]
        gained.append(odds[1] - odds[0])
    assert np.median(gained) == pytest.approx(3.0, rel=0.1)
    # Nothing before it moves, nor its neighbors, those included that share its keys.
    assert torch.equal(off[:LAYER], on[:LAYER])
    others = [h for h in range(off.shape[2]) if h != HEAD]
    assert torch.allclose(off[LAYER, :, others], on[LAYER, :, others], atol=1e-6)
    # A token that asks for nothing looks where it looked.
    assert torch.allclose(off[LAYER, 0, HEAD, 8], on[LAYER, 0, HEAD, 8], atol=1e-6)
    head.look.set(book.model, 0.0)
    assert torch.equal(attention(book.model, ids), off)


def test_what_it_writes_is_read_by_the_unembedding_alone_and_in_proportion(tiny):
    book = CodeBook(tiny("llama"), axes=8)
    asks, has, says = book.code({50: 0.0}), book.code({20: 0.0}), book.axes(2)
    book.read_out(says, {60: 0.0, 61: np.pi}, 1.0)
    ids = torch.tensor([[1, 20, 7, 8, 50]])
    matched = torch.zeros(1, 5, 5, dtype=torch.bool)
    matched[0, 4, 1] = True
    head = book.head(LAYER, HEAD, {"input_ids": ids}, asks, has, matched, value=has, out=says)
    head.look.set(book.model, 30.0)

    def logits():
        with torch.no_grad():
            return book.model(input_ids=ids, use_cache=False).logits[0, -1]

    still = logits()
    moved = []
    for size in (0.01, 0.02):
        head.write.set(book.model, size)
        moved.append(logits() - still)
    rest = [t for t in range(97) if t not in (60, 61)]
    assert moved[0][60] > 10 * moved[0][rest].abs().max() and moved[0][61] == pytest.approx(
        -float(moved[0][60]), rel=0.05)
    assert float(moved[1][60] / moved[0][60]) == pytest.approx(2.0, rel=0.02)


def test_room_alone_changes_nothing_and_models_without_room_are_refused(tiny):
    model = tiny("llama")
    book = CodeBook(model, axes=4)
    ids = torch.tensor([[1, 5, 6, 7]])
    with torch.no_grad():
        assert torch.allclose(book.model(ids).logits, model(ids).logits, atol=1e-5)
    assert book.model is not model
    with pytest.raises(ModelRefused, match="normalized here"):
        CodeBook(tiny("qwen3"), axes=4)
    with pytest.raises(ModelRefused, match="no free residual coordinates"):
        CodeBook(tiny("gpt2"), axes=4)
    with pytest.raises(ModelRefused, match="no free coordinate is left"):
        book.axes(99)


def test_bad_places_are_one_sentence(tiny):
    book, _, ids, matched = planted(tiny("llama"))
    flag = book.flag([5])
    with pytest.raises(OutOfRange, match="no head L9H0: the model has 3 layers of 6 heads"):
        book.head(9, 0, {"input_ids": ids}, flag, flag, matched)
    with pytest.raises(ValueError, match="keys are shared"):
        # Heads 3 to 5 share one key-value head.
        book.head(LAYER, HEAD - 1, {"input_ids": ids}, flag, flag, matched)
    with pytest.raises(ModelRefused, match="no query of the prompts"):
        book.head(0, 0, {"input_ids": ids}, flag, flag, torch.zeros_like(matched))


def test_a_dial_needs_two_models_that_differ():
    one, other = nn.Linear(2, 2), nn.Linear(2, 3)
    with pytest.raises(ValueError, match="nothing between them"):
        Dial.between(one, one)
    with pytest.raises(ValueError, match="not of one shape"):
        Dial.between(one, other)
