"""Token erasure: where states forget which tokens they come from, and the words that this implies.

Paper     arXiv:2406.20086
Question  Which spans of tokens does the model treat as one word?
Measure   drop, between two early layers, of the probability that linear probes give to the tokens at
          and just before a position; a score for every span; a segmentation by the best spans
Cause     none: a reading by probes
"""

from collections.abc import Mapping, Sequence
from typing import SupportsIndex

import numpy as np
from jaxtyping import Float

OFFSETS = (0, -1, -2)
Spans = list[tuple[int, int, float]]


def erasure(
    start: Mapping[int, Float[np.ndarray, "position"]],
    end: Mapping[int, Float[np.ndarray, "position"]],
) -> dict[int, Float[np.ndarray, "position"]]:
    """delta(t, k): probability of the token at t + k read at t in the start layer, minus the end layer.

    Example:
        >>> p = {k: np.full(3, 0.9) for k in OFFSETS}
        >>> q = {k: np.full(3, 0.4) for k in OFFSETS}
        >>> erasure(p, q)[-1]
        array([nan, 0.5, 0.5])

    Undefined where t + k lies before the document (NaN). The paper's layers are 1 and 9 of 32.

    Source: arXiv:2406.20086, section 4.
    """
    made = {}
    for k in OFFSETS:
        if k not in start or k not in end or start[k].shape != end[k].shape:
            raise ValueError(f"probabilities for the offset {k} are needed from both layers, alike.")
        delta = np.asarray(start[k], dtype=float) - np.asarray(end[k], dtype=float)
        delta[: -k or 0] = np.nan
        made[k] = delta
    return made


def span_scores(
    delta: Mapping[int, Float[np.ndarray, "position"]]
) -> Float[np.ndarray, "position position"]:
    """psi(p, q) for every span of tokens p..q (inclusive), NaN below the diagonal.

    Example:
        >>> delta = {0: np.array([0.0, 0.6]), -1: np.array([np.nan, 0.3]), -2: np.full(2, np.nan)}
        >>> [round(float(x), 3) for x in span_scores(delta)[np.triu_indices(2)]]
        [0.0, 0.45, 0.15]

    Forgetting the last token, and in the whole span the tokens of the span before each one, counts
    for it; forgetting tokens outside of it (leaking context) counts against. By cumulative sums,
    O(n^2) for all spans.

    Source: arXiv:2406.20086, equation 2, with the released code's handling of the document's start.
    """
    n = len(delta[0])
    c1, c2 = (np.concatenate([[0.0], np.nancumsum(delta[k])]) for k in (-1, -2))
    known1, known2 = (np.concatenate([[0], np.cumsum(np.isfinite(delta[k]))]) for k in (-1, -2))
    d1, d2 = np.nan_to_num(delta[-1]), np.nan_to_num(delta[-2])
    p, q = np.arange(n)[:, None], np.arange(n)[None, :]
    inside = (c1[1:][None, :] - c1[:-1][:, None]) + (c2[1:][None, :] - c2[:-1][:, None])
    # The first token's offsets, and the second one's offset -2, point outside of the span.
    outside = d1[:, None] + d2[:, None] + np.where(q > p, np.append(d2[1:], 0.0)[:, None], 0.0)
    terms = 1 + (known1[1:][None, :] - known1[:-1][:, None]) + (
        known2[1:][None, :] - known2[:-1][:, None])
    scores = (np.nan_to_num(delta[0])[None, :] + inside - 2 * outside) / np.where(q >= p, terms, 1)
    return np.where(q >= p, scores, np.nan)


def segment(
    scores: Float[np.ndarray, "position position"], longest: SupportsIndex = 64
) -> Spans:
    """Spans that cover the document: the best first, none overlapping, single tokens in between.

    Example:
        >>> scores = np.array([[0.1, 0.9, 0.2], [np.nan, 0.0, 0.8], [np.nan, np.nan, 0.1]])
        >>> segment(scores)
        [(0, 1, 0.9), (2, 2, 0.1)]

    Source: arXiv:2406.20086, algorithm 1.
    """
    n = len(scores)
    p, q = np.triu_indices(n)
    short = q - p < int(longest)
    p, q = p[short], q[short]
    order = np.argsort(-scores[p, q], kind="stable")
    taken = np.zeros(n, bool)
    chosen: Spans = []
    for i in order:
        if not taken[p[i] : q[i] + 1].any():
            taken[p[i] : q[i] + 1] = True
            chosen.append((int(p[i]), int(q[i]), float(scores[p[i], q[i]])))
        if taken.all():
            break
    return sorted(chosen)


def vocabulary(
    documents: Sequence[Spans], texts: Sequence[Sequence[str]], fewest: SupportsIndex = 1
) -> list[tuple[str, float, int]]:
    """Words of several tokens that the segmentations imply: text, mean score, how often; best first.

    Example:
        >>> vocabulary([[(0, 1, 0.5), (2, 2, 0.1)]], [["New", " York", " is"]])
        [('New York', 0.5, 1)]
    """
    found: dict[str, list[float]] = {}
    for spans, tokens in zip(documents, texts, strict=True):
        for p, q, value in spans:
            if q > p:
                found.setdefault("".join(tokens[p : q + 1]), []).append(value)
    words = [(text, float(np.mean(v)), len(v)) for text, v in found.items() if len(v) >= int(fewest)]
    return sorted(words, key=lambda word: -word[1])
