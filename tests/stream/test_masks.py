"""The structure that a mask promises (reach, full) is true of what it shows."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from interp.stream.masks import (
    Mask,
    as_mask,
    bidirectional,
    causal,
    from_tensor,
    padding,
    sliding_window,
)

N = 17


def left_padded() -> Mask:
    valid = torch.ones(3, N, dtype=torch.bool)
    valid[1, :4], valid[2, :9] = False, False
    return padding(valid)


def holes() -> Mask:
    valid = torch.ones(3, N, dtype=torch.bool)
    valid[0, 5] = False
    return padding(valid)


MASKS = {
    "causal": causal(),
    "window": sliding_window(5),
    "window of one": sliding_window(1),
    "window both ways": sliding_window(4, bidirectional=True),
    "bidirectional": bidirectional(),
    "left padding": left_padded(),
    "holes": holes(),
    "dense": from_tensor(torch.arange(N * N).reshape(N, N) % 3 > 0),
    "a function": as_mask(lambda query, key: (key < 3)[None] & (query > 1)[:, None]),
}


def pairs() -> dict[str, Mask]:
    made = dict(MASKS)
    for one in MASKS:
        for two in MASKS:
            made[f"{one} and {two}"] = MASKS[one] & MASKS[two]
            made[f"{one} or {two}"] = MASKS[one] | MASKS[two]
    return made


PAIRS = pairs()


@settings(deadline=None, max_examples=300)
@given(name=st.sampled_from(sorted(PAIRS)), first=st.integers(0, N - 1), more=st.integers(0, 6))
def test_nothing_is_visible_beyond_reach_and_everything_inside_full(name, first, more):
    mask, last = PAIRS[name], min(first + more, N - 1)
    keys = torch.arange(N)
    seen = mask(torch.arange(first, last + 1), keys)
    low, high = mask.reach(first, last)
    outside = (keys < low) | (keys >= high)
    assert not seen[..., outside].any()
    low, high = mask.full(first, last)
    inside = (keys >= low) & (keys < high)
    assert seen[..., inside].all()


def test_structure_is_as_tight_as_it_can_be():
    assert causal().reach(3, 7) == (0, 8) and causal().full(3, 7) == (0, 4)
    window = sliding_window(6)
    assert window.reach(8, 10) == (3, 11) and window.full(8, 10) == (5, 9)
    both = causal() & left_padded()
    assert both.reach(10, 12) == (0, 13) and both.full(10, 12) == (9, 11)
    assert (sliding_window(3) | (causal() & sliding_window(9))).full(9, 9) == (1, 10)


@pytest.mark.parametrize("kind", ["and", "or"])
def test_combinations_are_those_of_the_booleans(kind):
    query, key = torch.arange(N), torch.arange(N)
    for one in MASKS.values():
        for two in MASKS.values():
            a, b = one(query, key), two(query, key)
            if a.ndim == b.ndim == 4 and a.shape[0] != b.shape[0]:
                continue
            want = a & b if kind == "and" else a | b
            got = (one & two if kind == "and" else one | two)(query, key)
            assert got.equal(want.expand_as(got))


def test_a_sliding_window_counts_the_query_itself():
    seen = sliding_window(3)(torch.tensor([7]), torch.arange(N))[0]
    assert seen.nonzero().flatten().tolist() == [5, 6, 7]


def test_additive_masks_hide_what_is_far_below_and_add_the_rest():
    lowest = torch.finfo(torch.bfloat16).min
    dense = torch.tensor([[0.0, lowest, -2.0], [1.0, -torch.inf, 0.0]], dtype=torch.bfloat16)
    mask = from_tensor(dense, query_offset=4)
    query, key = torch.tensor([5, 4]), torch.arange(3)
    assert mask(query, key).tolist() == [[True, False, True], [True, False, True]]
    assert mask.bias(query[:, None], key)[:, [0, 2]].tolist() == [[1.0, 0.0], [0.0, -2.0]]
    assert from_tensor(torch.zeros(2, 3)).bias is None
    joined = (mask & from_tensor(dense, query_offset=4)).bias(query[:, None], key)
    assert joined[:, [0, 2]].tolist() == [[2.0, 0.0], [0.0, -4.0]]


@pytest.mark.parametrize(("make", "sentence"), [
    (lambda: sliding_window(0), "must at least see itself"),
    (lambda: as_mask(3), "mask is a int; give causal()"),
    (lambda: from_tensor(torch.ones(2, 4)) | causal(), "additive bias cannot be joined"),
    (lambda: from_tensor(torch.ones(2, 4) > 0)(torch.tensor([3]), torch.arange(4)),
     "rows for queries 0 to 1, but query 3"),
])
def test_bad_masks_are_refused_in_a_sentence(make, sentence):
    with pytest.raises(ValueError, match=sentence.replace("(", r"\(").replace(")", r"\)")):
        make()
