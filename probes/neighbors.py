"""Nearest neighbors by cosine in banks of any size, and hubs: the neighbors of everybody.

The bank is read piece by piece and never compared whole, so it may be larger than memory. In many
dimensions a few points are the neighbors of far too many others (hubs). `hub_skew` says how bad it is;
"csls" lowers what is near everything, "mutual" keeps a neighbor only if the query is one of its own.
"""

from collections.abc import Iterable
from typing import Any, Literal, SupportsIndex

import numpy as np
import torch
from jaxtyping import Float, Int
from scipy import stats
from torch import Tensor
from torch.nn.functional import normalize

Correction = Literal["none", "csls", "mutual"]
CORRECTIONS = ("none", "csls", "mutual")
PIECE = 1 << 24
"""Cosines held at a time."""


def cosine_neighbors(
    queries: Float[Tensor, "query d_model"] | Float[np.ndarray, "query d_model"],
    bank: Any,
    k: SupportsIndex = 5,
    *,
    correction: Correction = "none",
    reach: SupportsIndex = 10,
) -> tuple[Float[Tensor, "query k"], Int[Tensor, "query k"]]:
    """The `k` vectors of a bank with the largest cosine to each query, and their numbers.

    Example:
        >>> similarity, index = cosine_neighbors(np.eye(3)[:2], np.eye(3) + 0.1, 2)
        >>> index[:, 0].tolist(), similarity.shape
        ([0, 1], torch.Size([2, 2]))

    Args:
        bank: `[sample, d_model]`, or an iterable of such pieces, numbered through.
        correction: "csls" ranks by 2 cos(x, y) - r(x) - r(y), where r is the mean cosine to the
            `reach` nearest of the other side; "mutual" leaves out bank vectors that do not have the
            query among their own `reach` nearest queries. Both depend on which queries are asked
            together.

    Returns:
        Similarity (cosine; with "csls" the corrected one), highest first, and index. Where "mutual"
        leaves fewer than `k`: NaN and -1.

    Raises:
        ValueError: fewer vectors than neighbors, other widths, values that are not numbers or are all
            zero, an unknown correction.

    Source: CSLS, arXiv:1710.04087.
    """
    if correction not in CORRECTIONS:
        raise ValueError(f"cannot correct by {correction!r}; choose one of: {', '.join(CORRECTIONS)}.")
    x, n = _unit(queries, "queries"), int(k)
    if n < 1 or int(reach) < 1:
        raise ValueError("ask for at least one neighbor, and a reach of at least one.")
    top, at, near = x.new_zeros(len(x), 0), None, x.new_zeros(len(x), 0)
    seen = 0
    for piece in _pieces(bank):
        y = _unit(piece, "the bank").to(x)
        if y.shape[1] != x.shape[1]:
            raise ValueError(
                f"the queries have {x.shape[1]} coordinates, but the bank has {y.shape[1]}."
            )
        for start in range(0, len(y), max(1, PIECE // max(1, len(x)))):
            part = y[start : start + max(1, PIECE // max(1, len(x)))]
            cosine = x @ part.T
            ranked = cosine
            if correction != "none":
                own = cosine.topk(min(int(reach), len(x)), 0).values
                if correction == "csls":
                    ranked = 2 * cosine - own.mean(0)
                    near = torch.cat([near, cosine], 1)
                    near = near.topk(min(int(reach), near.shape[1]), 1).values
                else:
                    ranked = cosine.masked_fill(cosine < own[-1], float("-inf"))
            number = torch.arange(seen + start, seen + start + len(part), device=x.device)
            number = number.expand(len(x), -1)
            top = torch.cat([top, ranked], 1)
            at = number if at is None else torch.cat([at, number], 1)
            top, order = top.topk(min(n, top.shape[1]), 1)
            at = at.gather(1, order)
        seen += len(y)
    if at is None or seen < n:
        raise ValueError(f"{n} neighbors are asked for, but the bank has {seen} vectors.")
    if correction == "csls":
        top = top - near.mean(1, keepdim=True)
    gone = torch.isneginf(top)
    return top.masked_fill(gone, float("nan")), at.masked_fill(gone, -1)


def occurrences(
    neighbors: Int[np.ndarray, "query k"] | Int[Tensor, "query k"], size: SupportsIndex
) -> Int[np.ndarray, "sample"]:
    """How often each vector of a bank of `size` is a neighbor; -1 is nobody.

    Example:
        >>> occurrences(np.array([[0, 2], [2, -1]]), 4)
        array([1, 0, 2, 0])
    """
    flat = torch.as_tensor(neighbors).cpu().numpy().ravel()
    return np.bincount(flat[flat >= 0], minlength=int(size))


def hub_skew(
    neighbors: Int[np.ndarray, "query k"] | Int[Tensor, "query k"], size: SupportsIndex
) -> float:
    """Skewness of how often each vector of the bank is a neighbor: far above zero, there are hubs.

    Example:
        >>> hub_skew(np.array([[0], [1], [2], [3]]), 4), hub_skew(np.zeros((9, 1), int), 9) > 2
        (0.0, True)

    0 where all occur equally often. Neighbors drawn at random have a skew of their own where queries
    are few: compare with `hub_skew_by_chance`.
    """
    counts = occurrences(neighbors, size)
    return float(stats.skew(counts)) if counts.std() else 0.0


def hub_skew_by_chance(
    queries: SupportsIndex, k: SupportsIndex, size: SupportsIndex, *, draws: SupportsIndex = 20,
    seed: SupportsIndex = 0,
) -> Float[np.ndarray, "draw"]:
    """The skew of neighbors that are drawn at random, each query's without repetition.

    Example:
        >>> bool(abs(hub_skew_by_chance(1000, 5, 1000)).mean() < 1)
        True

    Every vector of the bank then occurs Binomial(queries, k / size) times.
    """
    rng = np.random.default_rng(int(seed))
    made = []
    for _ in range(int(draws)):
        counts = rng.binomial(int(queries), int(k) / int(size), int(size))
        made.append(float(stats.skew(counts)) if counts.std() else 0.0)
    return np.array(made)


def _pieces(bank: Any) -> Iterable[Any]:
    return [bank] if isinstance(bank, (np.ndarray, Tensor)) else bank


def _unit(vectors: Any, what: str) -> Tensor:
    x = torch.as_tensor(vectors)
    x = x if x.dtype == torch.float64 else x.float()
    if x.ndim != 2:
        raise ValueError(f"{what} must be [sample, d_model], not {tuple(x.shape)}.")
    if not bool(torch.isfinite(x).all()):
        raise ValueError(f"{what} hold values that are not numbers; leave those vectors out.")
    if bool((x == 0).all(1).any()):
        raise ValueError(f"{what} hold a vector of zeros, which has no direction; leave it out.")
    return normalize(x, dim=1, eps=0.0)
