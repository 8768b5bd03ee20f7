"""The three input types have the lengths, tokens and segments they promise."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from interp.core import PromptError, SegmentNotFound
from interp.prompts.text import drawable, natural, random_tokens, repeated_token, with_bos

seeds, lengths = st.integers(0, 99), st.integers(2, 12)


@settings(max_examples=50, deadline=None)
@given(seeds, lengths, st.integers(1, 5), st.sampled_from([None, 4]), st.sets(st.integers(0, 6)))
def test_random_prompts_draw_only_what_may_be_drawn(seed, length, n, bos, exclude):
    prompts = random_tokens(np.random.default_rng(seed), 9, n, length, bos, exclude)
    assert [len(prompt) for prompt in prompts] == [length] * n
    for prompt in prompts:
        drawn = prompt.ids if bos is None else prompt.ids[1:]
        assert set(drawn) <= set(range(9)) - exclude - {bos}
        assert prompt.positions("text") == tuple(range(int(bos is not None), length))
        if bos is not None:
            assert prompt.ids[0] == bos and prompt.positions("bos") == (0,)
    again = random_tokens(np.random.default_rng(seed), 9, n, length, bos, exclude)
    assert [prompt.ids for prompt in prompts] == [prompt.ids for prompt in again]


def test_random_tokens_are_uniform_over_the_vocabulary():
    prompts = random_tokens(np.random.default_rng(0), 8, n=200, length=50, exclude=[5])
    counts = np.bincount(np.concatenate([prompt.ids for prompt in prompts]), minlength=8)
    assert counts[5] == 0
    assert abs(np.delete(counts, 5) / 10_000 - 1 / 7).max() < 0.02


def test_natural_prompts_are_beginnings_in_order():
    texts = [[1, 2, 3, 4], [5, 6], [7, 8, 9]]
    assert [p.ids for p in natural(texts, 3)] == [(1, 2, 3), (7, 8, 9)]
    assert [p.ids for p in natural(texts, 3, bos=0)] == [(0, 1, 2), (0, 5, 6), (0, 7, 8)]
    assert [p.ids for p in natural(texts, 3, n=1)] == [(1, 2, 3)]
    assert [p.ids for p in natural((np.array(text) for text in texts), 4)] == [(1, 2, 3, 4)]


def test_too_few_or_too_short_texts_are_refused():
    with pytest.raises(PromptError, match=r"2 text.s. have 3 tokens or more, but 3 are needed"):
        natural([[1, 2, 3], [4], [5, 6, 7]], 3, n=3)
    with pytest.raises(PromptError, match="but at least 1 are needed"):
        natural([[1]], 3)
    with pytest.raises(PromptError, match="a length of 1 leaves no room"):
        repeated_token(3, 1, bos=0)
    with pytest.raises(PromptError, match="leaves none to draw"):
        drawable(2, [0, 1])


def test_a_repeated_token_is_repeated():
    assert repeated_token(7, 4).ids == (7, 7, 7, 7)
    assert repeated_token(7, 4, bos=1).ids == (1, 7, 7, 7)


def test_without_bos_there_is_no_bos_segment():
    with pytest.raises(SegmentNotFound):
        with_bos([3, 4], None).positions("bos")
    assert with_bos([], 3).ids == (3,)
