"""Repeated prompts: the second half is predictable from the first, the control is not."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from interp.core import PromptError
from interp.prompts.repeated import ORDINALS, induction_targets, repeated, unrepeated


@settings(max_examples=50, deadline=None)
@given(st.integers(0, 99), st.integers(1, 9), st.integers(2, 5), st.sampled_from([None, 3]))
def test_copies_are_equal_and_the_control_has_none(seed, length, copies, bos):
    made = repeated(np.random.default_rng(seed), 60, length, copies, bos, exclude=[0])
    control = unrepeated(np.random.default_rng(seed), 60, length, copies, bos, exclude=[0])
    assert [s.name for s in made.segments] == [s.name for s in control.segments]
    assert [s.positions for s in made.segments] == [s.positions for s in control.segments]
    blocks = [[made.ids[p] for p in made.positions(name)] for name in ORDINALS[:copies]]
    assert all(block == blocks[0] for block in blocks) and len(set(blocks[0])) == length
    assert len(set(control.ids)) == len(control.ids) == len(made.ids)
    assert 0 not in made.ids
    if bos is not None:
        assert made.ids[0] == bos and made.ids.count(bos) == 1


def test_an_induction_target_follows_the_same_token_and_holds_the_next_one():
    prompt = repeated(np.random.default_rng(1), 60, 7, copies=3, bos=2)
    targets = induction_targets(prompt)
    assert sorted(targets) == [*prompt.positions("second"), *prompt.positions("third")]
    for query, target in targets.items():
        assert prompt.ids[target - 1] == prompt.ids[query]
        if query + 1 < len(prompt):
            assert prompt.ids[target] == prompt.ids[query + 1]
    control = unrepeated(np.random.default_rng(1), 60, 7, copies=3, bos=2)
    assert all(control.ids[t - 1] != control.ids[q] for q, t in induction_targets(control).items())


def test_a_vocabulary_that_is_too_small_is_refused():
    rng = np.random.default_rng(0)
    assert len(repeated(rng, 6, 5, bos=0)) == 11
    with pytest.raises(PromptError, match="6 different tokens are wanted, but 5 may be drawn"):
        repeated(rng, 6, 6, bos=0)
    with pytest.raises(PromptError, match="10 different tokens are wanted, but 5 may be drawn"):
        unrepeated(rng, 6, 5, bos=0)
    with pytest.raises(PromptError, match="copies is 1; give 2 to 8"):
        repeated(rng, 6, 2, copies=1)
