"""Random controls: matched, disjoint from what they control for, and honest where they cannot be."""

from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from interp.causal.controls import most_excludable, random_heads
from interp.core import Head
from interp.core.errors import OutOfRange

LAYERS, HEADS = 5, 9
ANY = st.tuples(st.integers(0, LAYERS - 1), st.integers(0, HEADS - 1))


@settings(deadline=None, max_examples=60)
@given(chosen=st.sets(ANY, min_size=1, max_size=7), barred=st.sets(ANY, max_size=8),
       seed=st.integers(0, 99))
def test_controls_match_the_layers_and_never_hit_what_is_excluded(chosen, barred, seed):
    try:
        drawn = random_heads(chosen, LAYERS, HEADS, seed=seed, exclude=barred)
    except OutOfRange:
        per_layer = Counter(layer for layer, _ in chosen)
        taken = Counter(layer for layer, _ in chosen | barred)
        assert any(HEADS - taken[layer] < n for layer, n in per_layer.items())
        return
    assert len(set(drawn)) == len(chosen)
    assert not set(drawn) & ({Head(*x) for x in chosen} | {Head(*x) for x in barred})
    assert Counter(h.layer for h in drawn) == Counter(layer for layer, _ in chosen)
    assert drawn == random_heads(chosen, LAYERS, HEADS, seed=seed, exclude=barred)


def test_seeds_differ_and_cover_every_free_head():
    drawn = [random_heads(["L1H0", "L1H1"], 3, 6, seed=s, exclude=["L1H2"]) for s in range(60)]
    assert len(set(drawn)) == 3
    assert {h.head for one in drawn for h in one} == {3, 4, 5}


def test_heads_that_are_not_eligible_are_not_drawn_and_layers_can_be_left_free():
    eligible = np.zeros((3, 6), dtype=bool)
    eligible[:, 4:] = True
    drawn = [random_heads(["L1H0"], 3, 6, seed=s, eligible=eligible, layer_matched=False)
             for s in range(40)]
    assert {h.head for (h,) in drawn} == {4, 5} and {h.layer for (h,) in drawn} == {0, 1, 2}


def test_too_few_heads_and_heads_that_do_not_exist_are_named():
    with pytest.raises(OutOfRange, match="2 control heads are needed in layer 1, but only 1 of 4"):
        random_heads(["L1H0", "L1H1"], 3, 4, seed=0, exclude=["L1H3"])
    with pytest.raises(OutOfRange, match="L9H0 does not exist"):
        random_heads(["L9H0"], 3, 4, seed=0)
    with pytest.raises(OutOfRange, match="L0H7 does not exist"):
        random_heads(["L1H0"], 3, 4, seed=0, exclude=["L0H7"])


@settings(deadline=None, max_examples=60)
@given(order=st.permutations([(a, b) for a in range(3) for b in range(4)]), k=st.integers(1, 4))
def test_what_can_be_excluded_leaves_controls_in_every_layer_and_is_maximal(order, k):
    chosen = order[:k]
    kept = most_excludable(order, chosen, 4)
    room = Counter(layer for layer, _ in chosen)
    if any(n > 2 for n in room.values()):
        return  # not even the chosen ones leave room
    random_heads(chosen, 3, 4, seed=0, exclude=kept)
    assert list(kept) == sorted(Head(*x) for x in order[: len(kept)])
    if len(kept) < len(order):
        one_more = {Head(*x) for x in order[: len(kept) + 1]} | {Head(*x) for x in chosen}
        assert any(4 - sum(h.layer == layer for h in one_more) < n for layer, n in room.items())
