"""Choices of image tokens that differ from each other, or that the others do not explain.

Paper     DivPrune, DART, ToDRE, ApET, AgilePruner, Representation Shift
Question  Which few tokens cover what all of them hold?
Measure   plain procedures on features or states; they give the kept tokens, ascending
Cause     `interp.flow.pruning` removes the others and looks at the answer
"""

import math
from collections.abc import Sequence
from typing import Any, Optional, SupportsFloat, SupportsIndex

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from interp.core import OutOfRange
from interp.flow.pruning_by_attention import Scores, numbers, top

Features = Float[Tensor, "token width"] | Float[np.ndarray, "token width"]


def cosine_distance(features: Features) -> Float[Tensor, "token token"]:
    """1 - cosine, of every pair."""
    x = torch.nn.functional.normalize(numbers(features), dim=-1)
    return 1 - x @ x.T


def divprune(features: Features, keep: SupportsIndex) -> tuple[int, ...]:
    """Greedy max-min diversity: always the token farthest from the nearest kept one.

    Example:
        >>> x = torch.tensor([[1.0, 0.0], [1.0, 0.1], [0.0, 1.0], [-1.0, 0.0]])
        >>> divprune(x, 3)
        (0, 2, 3)

    The first is the token that is farthest from its own nearest neighbor. Source: DivPrune, code.
    """
    distance = cosine_distance(features)
    number = _checked(len(distance), keep)
    if number == 0:
        return ()
    others = distance.clone().fill_diagonal_(float("inf"))
    return _farthest(distance, int(others.min(1).values.argmax()), number)


def k_center(
    features: Features, keep: SupportsIndex, first: Optional[SupportsIndex] = None
) -> tuple[int, ...]:
    """Farthest points by cosine, from `first` (the token farthest from all others, for None).

    Source: ToDRE, version 1, of which no start is known.
    """
    distance = cosine_distance(features)
    number = _checked(len(distance), keep)
    start = int(distance.sum(1).argmax()) if first is None else int(first)
    return _farthest(distance, start, number) if number else ()


def max_sum(features: Features, keep: SupportsIndex) -> tuple[int, ...]:
    """Greedy max-sum diversity: always the token with the largest sum of distances to the kept.

    Source: ToDRE, version 2.
    """
    distance = cosine_distance(features)
    number = _checked(len(distance), keep)
    if number == 0:
        return ()
    kept = [int(distance.sum(1).argmax())]
    total = distance[kept[0]].clone()
    while len(kept) < number:
        total[kept[-1]] = -math.inf
        kept.append(int(total.argmax()))
        total += distance[kept[-1]]
    return tuple(sorted(kept))


def sensitive_and_diverse(
    sensitivity: Scores, features: Features, keep: SupportsIndex
) -> tuple[int, ...]:
    """Greedy product of a score and the distance to the nearest kept token: ZOO-Prune's second step."""
    score, distance = numbers(sensitivity), cosine_distance(features)
    number = _checked(len(distance), keep)
    kept: list[int] = []
    nearest = torch.ones(len(distance), dtype=distance.dtype)
    while len(kept) < number:
        value = score.to(nearest) * nearest
        value[kept] = -math.inf
        kept.append(int(value.argmax()))
        nearest = torch.minimum(nearest, distance[kept[-1]].clamp_min(0))
    return tuple(sorted(kept))


def dart(
    states: Features, keys: Float[Tensor, "kv_head token d_head"],
    text_states: Float[Tensor, "query width"], text_keys: Float[Tensor, "kv_head query d_head"],
    keep: SupportsIndex, *, image_pivots: SupportsIndex = 4, text_pivots: SupportsIndex = 4,
) -> tuple[int, ...]:
    """Tokens that resemble the pivots least; image pivots are kept too.

    Pivots are the tokens with the largest L1 norm of the previous block's keys (after RoPE), 4 of
    the image and 4 of the text; each keeps an equal share of its least similar tokens by cosine,
    and what integer shares leave over goes to the last pivot. The released code compares states
    after the final norm; here they are compared as they are given.

    Source: DART as shipped with arXiv:2512.07580, code.
    """
    x = torch.nn.functional.normalize(numbers(states), dim=-1)
    t = torch.nn.functional.normalize(numbers(text_states), dim=-1)
    number = _checked(len(x), keep)
    norms, text_norms = (numbers(k).abs().sum((0, 2)) for k in (keys, text_keys))
    own = norms.sort(descending=True, stable=True).indices[: min(int(image_pivots), number)].tolist()
    said = text_norms.sort(descending=True, stable=True).indices[: int(text_pivots)].tolist()
    pivots = [x[i] for i in own] + [t[i] for i in said]
    kept = list(own)
    rest = number - len(kept)
    for at, pivot in enumerate(pivots):
        share = rest // len(pivots) if at < len(pivots) - 1 else number - len(kept)
        likeness = x @ pivot
        likeness[kept] = math.inf
        kept += likeness.sort(stable=True).indices[:share].tolist()
    return tuple(sorted(int(i) for i in kept))


def apet(
    features: Features, keep: SupportsIndex, *, basis: SupportsIndex = 10,
    first: SupportsIndex = 0, ridge: SupportsFloat = 1e-5,
) -> tuple[int, ...]:
    """Tokens that a basis of farthest points explains worst, and that basis.

    `apet_error` is the score; `first` starts the farthest points (random in the released code). The
    method then merges the others into the nearest kept token (`merge_into_nearest`).
    """
    x = numbers(features)
    number = _checked(len(x), keep)
    chosen = _farthest(torch.cdist(x, x), int(first), min(int(basis), number)) if number else ()
    score = apet_error(x, chosen, ridge)
    score[list(chosen)] = math.inf
    return top(score, number)


def apet_error(
    features: Features, basis: Sequence[SupportsIndex], ridge: SupportsFloat = 1e-5
) -> Float[Tensor, "token"]:
    """Distance of each token from its ridge projection on the basis tokens.

    Example:
        >>> apet_error(torch.eye(3)[[0, 1, 1]], [0]).round(decimals=3).tolist()
        [0.0, 1.0, 1.0]
    """
    x = numbers(features)
    b = x[[int(i) for i in basis]]
    gram = b @ b.T + float(ridge) * torch.eye(len(b), dtype=x.dtype)
    return (x - (x @ b.T) @ torch.linalg.solve(gram, b)).norm(dim=-1)


def agile(
    attention: Scores, features: Features, keep: SupportsIndex,
    similarity: Optional[SupportsFloat] = None,
) -> tuple[int, ...]:
    """Walk tokens by attention; skip those too similar to a kept one; fill up in the same order.

    Without `similarity` the bound is 1 - H / (2 H_max) with the entropy H of the attention: close to
    plain attention for simple images, to diversity for complex ones. The direction is second-hand
    (AgilePruner has no public code); this formula is the toolkit's.
    """
    score, distance = numbers(attention), cosine_distance(features)
    number = _checked(len(distance), keep)
    bound = 1 - _relative_entropy(score) / 2 if similarity is None else float(similarity)
    kept: list[int] = []
    order = score.sort(descending=True, stable=True).indices.tolist()
    for token in order:
        if len(kept) < number and (not kept or 1 - float(distance[token, kept].min()) <= bound):
            kept.append(token)
    kept += [token for token in order if token not in set(kept)][: number - len(kept)]
    return tuple(sorted(kept))


def representation_shift(before: Features, after: Features) -> Float[Tensor, "token"]:
    """||F(h) - h|| per token, F the MLP of a block and h what it is given (second-hand)."""
    return (numbers(after) - numbers(before)).norm(dim=-1)


def merge_into_nearest(
    states: Features, kept: Sequence[SupportsIndex], by: Optional[Any] = None
) -> Float[Tensor, "kept width"]:
    """States of kept tokens, each the mean of itself and the others that resemble it most.

    Example:
        >>> merge_into_nearest(torch.tensor([[2.0, 0.0], [0.0, 3.0], [4.0, 0.0]]), [0, 1])
        tensor([[3., 0.],
                [0., 3.]])

    Likeness is the cosine of `by`, one row per token, or of the states themselves.
    """
    x = numbers(states)
    chosen = [int(i) for i in kept]
    if not chosen:
        return x[:0]
    like = cosine_distance(x if by is None else by)[:, chosen]
    nearest = like.argmin(1)
    nearest[chosen] = torch.arange(len(chosen))
    total = torch.zeros(len(chosen), x.shape[1], dtype=x.dtype).index_add_(0, nearest, x)
    return total / torch.bincount(nearest, minlength=len(chosen))[:, None].to(x)


def recycled(
    states: Features, score: Scores, kept: Sequence[SupportsIndex], share: SupportsFloat = 0.3
) -> Float[Tensor, "center width"]:
    """Dropped tokens of the highest scores as n / 10 + 1 cluster means: what SparseVLM v1 adds.

    Centers are farthest points (the released code finds them by density).
    """
    x, chosen = numbers(states), {int(i) for i in kept}
    dropped = [i for i in range(len(x)) if i not in chosen]
    number = math.ceil(float(share) * len(dropped))
    if number == 0:
        return x[:0]
    some = x[[dropped[i] for i in top(numbers(score)[dropped], number)]]
    return merge_into_nearest(some, k_center(some, number // 10 + 1))


def effective_rank(features: Features) -> float:
    """exp of the entropy of the singular values brought to a sum of one.

    Example:
        >>> round(effective_rank(torch.eye(4)), 4), round(effective_rank(torch.ones(4, 3)), 4)
        (4.0, 1.0)
    """
    x = numbers(features)
    if not len(x):
        return 0.0
    sigma = torch.linalg.svdvals(x.double())
    p = sigma / sigma.sum().clamp_min(1e-300)
    p = p[p > 0]
    return float((-(p * p.log()).sum()).exp())


def _farthest(distance: Tensor, first: int, keep: int) -> tuple[int, ...]:
    """Farthest point sampling on a table of distances."""
    kept = [first]
    nearest = distance[first].clone()
    while len(kept) < keep:
        nearest[kept] = -math.inf
        kept.append(int(nearest.argmax()))
        nearest = torch.minimum(nearest, distance[kept[-1]])
    return tuple(sorted(kept[:keep]))


def _relative_entropy(score: Tensor) -> float:
    p = score.clamp_min(0).double()
    p = p / p.sum().clamp_min(1e-300)
    known = p[p > 0]
    return float(-(known * known.log()).sum()) / max(math.log(len(p)), 1e-12)


def _checked(count: int, keep: SupportsIndex) -> int:
    if not 0 <= int(keep) <= count:
        raise OutOfRange(f"cannot keep {int(keep)} of {count} image tokens.")
    return int(keep)
