"""What erasure is compared with: matched ordinary tokens, random spans, and shuffled drops.

Source    arXiv:2406.20086 (claims); the matching and the nulls are this toolkit's
"""

from collections.abc import Mapping, Sequence
from typing import Optional, SupportsFloat, SupportsIndex

import numpy as np
from jaxtyping import Bool, Float, Int


def matched_pairs(
    ids: Int[np.ndarray, "sample"],
    documents: Int[np.ndarray, "sample"],
    ends: Int[np.ndarray, "end"],
    ordinary: Bool[np.ndarray, "sample"],
    offset: SupportsIndex,
    *,
    same_token: bool = True,
    level: Optional[Float[np.ndarray, "sample"]] = None,
    caliper: SupportsFloat = 0.1,
) -> Int[np.ndarray, "pair 2"]:
    """For every last token of an item an ordinary position, each used once.

    Example:
        >>> ids = np.array([7, 3, 5, 3, 9, 3])
        >>> matched_pairs(ids, np.zeros(6, int), np.array([2]), np.arange(6) > 2, -1)
        array([[2, 4]])

    Args:
        same_token: the token at the offset is the same one at both, from any document, so that what is
            to be read is equally frequent and equally well learned; else any ordinary position.
        level: how well the start layer reads it. A drop has a floor: what is hardly read at the start
            cannot be forgotten, so positions are matched by this, at most `caliper` apart (the choice
            favors ordinary positions that are high by chance and then fall, against the claim).
            Without it, the nearest place in the document counts, and without `same_token` the
            document has to be the same.

    Ends without a match are left out.
    """
    start = {int(d): int(np.flatnonzero(documents == d)[0]) for d in np.unique(documents)}
    place = np.arange(len(ids)) - np.array([start[int(d)] for d in documents])
    k = int(offset)
    at = np.arange(len(ids)) + k
    known = (at >= 0) & (at < len(ids))
    known[known] &= documents[at[known]] == documents[known]
    target = np.where(known, ids[at.clip(0, len(ids) - 1)], -1)
    free = ordinary & known
    free[ends] = False
    made = []
    for end in ends:
        if not known[end]:
            continue
        fits = free & (target == target[end]) if same_token else free
        if level is None:
            apart = np.abs(place - place[end]).astype(float)
            fits = fits if same_token else fits & (documents == documents[end])
        else:
            apart = np.abs(level - level[end])
            fits = fits & (apart <= float(caliper))
        found = np.flatnonzero(fits)
        if len(found):
            chosen = int(found[apart[found].argmin()])
            free[chosen] = False
            made.append((int(end), chosen))
    return np.array(made, dtype=np.int64).reshape(-1, 2)


def random_spans(
    spans: Sequence[tuple[int, int]], length: SupportsIndex, rng: np.random.Generator,
    draws: SupportsIndex = 20,
) -> list[list[tuple[int, int]]]:
    """For every span (inclusive) of a document, others of its length that are no such spans.

    Example:
        >>> random_spans([(0, 1)], 4, np.random.default_rng(0), draws=2)
        [[(1, 2), (2, 3)]]
    """
    made = []
    for p, q in spans:
        others = [(s, s + q - p) for s in range(int(length) - (q - p)) if (s, s + q - p) not in spans]
        count = min(int(draws), len(others))
        chosen = sorted(rng.choice(len(others), count, replace=False)) if count else []
        made.append([others[int(i)] for i in chosen])
    return made


def shuffled(
    delta: Mapping[int, Float[np.ndarray, "position"]], rng: np.random.Generator
) -> dict[int, Float[np.ndarray, "position"]]:
    """The same drops at other positions of their document, all offsets of a position together.

    Example:
        >>> drops = {0: np.array([0.1, 0.2, 0.3]), -1: np.array([np.nan, 2.0, 3.0])}
        >>> moved = shuffled(drops, np.random.default_rng(0))
        >>> sorted(moved[0].tolist()), bool(np.isnan(moved[-1][0]))
        ([0.1, 0.2, 0.3], True)

    The first positions, where an offset lies before the document, stay where they are.
    """
    length = len(delta[0])
    fixed = min(length, max((-k for k in delta if k < 0), default=0))
    order = np.concatenate([np.arange(fixed), fixed + rng.permutation(length - fixed)])
    return {k: values[order] for k, values in delta.items()}
