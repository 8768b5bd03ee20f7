"""The closed form of the erasure score equals the definition, span by span."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from probes import token_offsets


def deltas(seed, n):
    rng = np.random.default_rng(seed)
    p, q = ({k: rng.random(n) for k in token_offsets.OFFSETS} for _ in range(2))
    return token_offsets.erasure(p, q)


def written_out(delta, p, q):
    """psi by the definition: one term per token and offset, undefined ones skipped."""
    total, terms = delta[0][q], 1
    for t in range(p, q + 1):
        for k in (-1, -2):
            if not np.isnan(delta[k][t]):
                total += (-1 if t + k < p else 1) * delta[k][t]
                terms += 1
    return total / terms


@settings(deadline=None, max_examples=30)
@given(st.integers(0, 10**6), st.integers(1, 14))
def test_every_span_has_the_score_of_the_definition(seed, n):
    delta = deltas(seed, n)
    scores = token_offsets.span_scores(delta)
    for p in range(n):
        for q in range(n):
            expected = written_out(delta, p, q) if q >= p else np.nan
            assert scores[p, q] == pytest.approx(expected, nan_ok=True, abs=1e-12)


@settings(deadline=None, max_examples=30)
@given(st.integers(0, 10**6), st.integers(1, 20), st.integers(1, 6))
def test_a_segmentation_covers_every_token_once(seed, n, longest):
    spans = token_offsets.segment(token_offsets.span_scores(deltas(seed, n)), longest)
    covered = [t for p, q, _ in spans for t in range(p, q + 1)]
    assert covered == list(range(n)) and all(q - p < longest for p, q, _ in spans)


def test_a_planted_word_is_found():
    """Tokens 4 to 6 forget each other in the end layer, the others nothing."""
    n = 12
    start = {k: np.full(n, 0.9) for k in token_offsets.OFFSETS}
    end = {k: np.full(n, 0.9) for k in token_offsets.OFFSETS}
    end[0][6] = end[-1][5] = end[-1][6] = end[-2][6] = 0.1
    spans = token_offsets.segment(token_offsets.span_scores(token_offsets.erasure(start, end)))
    assert [(p, q) for p, q, _ in spans if q > p] == [(4, 6)]
    words = token_offsets.vocabulary([spans, spans], [list("abcdefghijkl")] * 2, fewest=2)
    assert words == [("efg", pytest.approx(3.2 / 7), 2)]
    # Forgetting what stands before the span counts against it.
    end[-2][4] = 0.1
    weaker = token_offsets.segment(token_offsets.span_scores(token_offsets.erasure(start, end)))
    best = {(p, q): v for p, q, v in weaker}
    assert best.get((4, 6), 0) < words[0][1]


def test_bad_input_is_one_sentence():
    with pytest.raises(ValueError, match="offset -2 are needed from both layers"):
        token_offsets.erasure({0: np.ones(3), -1: np.ones(3)}, {0: np.ones(3), -1: np.ones(3)})
