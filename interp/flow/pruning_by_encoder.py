"""Choices of image tokens from the vision tower and the projector, before any language is read.

Paper     FasterVLM, VTC-CLS, HiPrune, FlowCut, HoloV, HiRED, VFlowOpt, ZOO-Prune
Question  Which patches does the picture's own encoder hold important?
Measure   plain functions of the tower's attention, values and features
Cause     `interp.flow.pruning` removes the others and looks at the answer
"""

import math
from collections.abc import Callable, Sequence
from typing import Any, Optional, SupportsFloat, SupportsIndex

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn

from interp.core import ModelRefused, NumericalError, OutOfRange, PromptError
from interp.flow.pruning_by_attention import Scores, numbers, top
from interp.flow.pruning_by_diversity import Features, cosine_distance


def summed_cls_attention(
    attention: Float[Tensor, "layer head token"], first: SupportsIndex, last: SupportsIndex
) -> Float[Tensor, "token"]:
    """Attention of the class token, mean over heads, summed over blocks `first` to `last` (VTC-CLS)."""
    return numbers(attention)[int(first) : int(last) + 1].mean(1).sum(0)


def hiprune(
    middle: Scores, late: Scores, keep: SupportsIndex, width: SupportsIndex, alpha: SupportsFloat = 0.1
) -> tuple[int, ...]:
    """Anchors of a middle block with their neighbors, then registers of the last one.

    Example:
        >>> hiprune(torch.tensor([0., 0, 0, 0, 9, 0, 0, 0, 0]), torch.arange(9.0), 6, 3, alpha=0.9)
        (1, 3, 4, 5, 7, 8)

    Args:
        middle, late: attention received by each token, mean over heads and queries, in the object
            block (9 of 24 in CLIP) and the block whose output is projected.
        width: tokens per row of the grid. alpha: anchors are round(alpha keep / 5) tokens.

    Neighbors are left, right, above and below by number, clamped to the picture. Source: HiPrune,
    code.
    """
    first, second = numbers(middle), numbers(late)
    count, number, step = len(first), int(keep), int(width)
    if not 0 <= number <= count:
        raise OutOfRange(f"cannot keep {number} of {count} image tokens.")
    kept: list[int] = []
    anchors = min(round(float(alpha) * number / 5), number)
    for anchor in first.sort(descending=True, stable=True).indices[:anchors].tolist():
        for token in (anchor, anchor - 1, anchor + 1, anchor - step, anchor + step):
            token = min(max(token, 0), count - 1)
            if token not in kept and len(kept) < number:
                kept.append(token)
    rest = second.clone()
    rest[kept] = -math.inf
    return tuple(sorted([*kept, *top(rest, number - len(kept))]))


def flowcut(
    attention: Float[Tensor, "layer head token"],
    values: Float[Tensor, "layer head token d_head"],
    class_values: Float[Tensor, "layer head d_head"],
    keep: SupportsIndex,
) -> tuple[int, ...]:
    """Tokens that keep the flow to the class token, cut every second block of the tower.

    Score per block: (attention of the class token + likeness of the class token's value) x L1 norm
    of the value; half of it is carried on. Before the last cut, (N - n) / sqrt(blocks left) x
    (1 - (H / H_max)^2) tokens go. The method runs the tower without what it cut; here the tower has
    run once and its class attention is shared out again among the tokens that are left.

    Source: FlowCut, code.
    """
    rows, v = numbers(attention), numbers(values)
    cls = numbers(class_values).to(v)
    number, layers = int(keep), len(rows)
    left = list(range(rows.shape[2]))
    if not 0 <= number <= len(left):
        raise OutOfRange(f"cannot keep {number} of {len(left)} image tokens.")
    carried = torch.zeros(len(left), dtype=rows.dtype)
    for layer in range(layers):
        flow = rows[layer].mean(0)[left]
        flow = flow / flow.sum().clamp_min(1e-30)
        alike = torch.einsum("hd,htd->ht", cls[layer], v[layer][:, left]).softmax(1).mean(0)
        size = v[layer][:, left].mean(0).abs().sum(-1)
        carried = carried.clone()
        carried[left] = 0.5 * carried[left] + 0.5 * (flow + alike / alike.sum()) * size
        if layer == layers - 1 or layer % 2 == 0:
            continue
        known = flow[flow > 0]
        even = float(-(known * known.log()).sum()) / max(math.log(len(left)), 1e-12)
        gone = int((len(left) - number) / math.sqrt(layers - 1 - layer) * (1 - even**2))
        left = [left[i] for i in top(carried[left], max(number, len(left) - gone))]
    return tuple(left[i] for i in top(carried[left], number))


def holov(
    attention: Scores, features: Features, keep: SupportsIndex, *, crops: SupportsIndex = 16,
    attention_weight: SupportsFloat = 1e3, variance_weight: SupportsFloat = 0.09,
) -> tuple[int, ...]:
    """Quotas for contiguous raster chunks by mean score, inside each the most attended tokens.

    A token's score is 1000 a + 0.09 v, v the variance of its cosines with its chunk, divided by the
    largest of all (how the released code scales it is this toolkit's reading). Source: HoloV, code.
    """
    a, count, number = numbers(attention), len(attention), int(keep)
    if not 0 <= number <= count:
        raise OutOfRange(f"cannot keep {number} of {count} image tokens.")
    likeness = 1 - cosine_distance(features)
    parts = [part for part in np.array_split(np.arange(count), min(int(crops), count)) if len(part)]
    spread = torch.zeros(count, dtype=a.dtype)
    for part in parts:
        if len(part) > 1:
            spread[part] = likeness[np.ix_(part, part)].var(1).to(a)
    spread = spread / spread.max().clamp_min(1e-30)
    score = float(attention_weight) * a + float(variance_weight) * spread
    quota = shares([float(score[part].mean()) for part in parts], [len(p) for p in parts], number)
    kept = [int(part[i]) for part, n in zip(parts, quota) for i in top(a[part], n)]
    return tuple(sorted(kept))


def shares(
    weights: Sequence[SupportsFloat], most: Sequence[SupportsIndex], total: SupportsIndex
) -> list[int]:
    """Whole numbers proportional to weights, none above its `most`, that add up to `total`.

    Example:
        >>> shares([3.0, 1.0, 0.0], [2, 5, 5], 4)
        [2, 2, 0]
    """
    w = np.maximum(np.array([float(x) for x in weights]), 0)
    cap, left = np.array([int(x) for x in most]), int(total)
    if left > cap.sum():
        raise OutOfRange(f"cannot keep {left} of {int(cap.sum())} image tokens.")
    given = np.zeros(len(cap), dtype=int)
    while left:
        room = given < cap
        open_w = np.where(room, w, 0)
        if open_w.sum() == 0:
            open_w = room.astype(float)
        exact = open_w / open_w.sum() * left
        whole = np.minimum(np.floor(exact).astype(int), cap - given)
        if whole.sum() == 0:
            best = np.argsort(-np.where(room, exact, -1), kind="stable")[0]
            whole[best] = 1
        given, left = given + whole, left - int(whole.sum())
    return [int(x) for x in given]


def hired(
    early: Scores, late: Sequence[Float[Tensor, "_"]], parts: Sequence[SupportsIndex],
    keep: SupportsIndex, *, alpha: SupportsFloat,
) -> list[tuple[int, ...]]:
    """HiRED's tokens of every tile of a high-resolution image.

    Args:
        early: class attention of the whole (small) image in block 0, one entry per cell.
        late: class attention of each tile in a late block (22 of 24), summed over heads.
        parts: the tile that each cell of the whole image lies in.
        alpha: cells in the top 1 - alpha share of the early attention count for their tile.

    Source: HiRED, code: the share of the budget for the whole image is left to the caller.
    """
    a, where = numbers(early), [int(p) for p in parts]
    if len(where) != len(a):
        raise PromptError(f"{len(a)} cells, but {len(where)} entries say which tile they lie in.")
    order = a.sort(descending=True, stable=True)
    before = order.values.cumsum(0) - order.values
    counted = order.indices[before < (1 - float(alpha)) * float(a.sum())].tolist()
    votes = [sum(where[i] == tile for i in counted) for tile in range(len(late))]
    quota = shares(votes, [len(one) for one in late], keep)
    return [top(one, n) for one, n in zip(late, quota)]


def vflowopt(
    attention: Float[Tensor, "head query key"], entropy: Scores, *, above: SupportsFloat = 1.0,
    weight: SupportsFloat = 1.0,
) -> Float[Tensor, "token"]:
    """Mean attention from the queries that are themselves attended most, plus how busy the patch is.

    Args:
        entropy: grey-level entropy of each token's patch in bits, see `patch_entropy`.
        above: a query counts when it receives more than this times the mean.
        weight: of softmax(entropy). The method finds both numbers by search, so these two defaults
            are the toolkit's.

    Source: VFlowOpt, code.
    """
    rows = numbers(attention).mean(0)
    received = rows.mean(0)
    wide = received > float(above) * received.mean()
    chosen = rows[wide] if bool(wide.any()) else rows
    return chosen.mean(0) + float(weight) * numbers(entropy).to(rows).softmax(0)


def patch_entropy(picture: Any, boxes: Sequence[Any]) -> Float[np.ndarray, "token"]:
    """Entropy in bits of the 256 grey levels inside each pixel box; 0 for a token without one."""
    grey = np.asarray(picture.convert("L"))
    found = []
    for box in boxes:
        left, upper, right, lower = (0, 0, 0, 0) if box is None else (round(float(x)) for x in box)
        counts = np.bincount(grey[upper:lower, left:right].ravel(), minlength=256)
        p = counts[counts > 0] / max(counts.sum(), 1)
        found.append(float(-(p * np.log2(p)).sum()))
    return np.array(found)


def zeroth_order(
    features: Features, first: Float[Tensor, "hidden width"], bias: Optional[Float[Tensor, "hidden"]],
    second: Float[Tensor, "d_model hidden"], activation: Callable[[Tensor], Tensor],
) -> Float[Tensor, "token"]:
    """Sensitivity of a projector W2 g(W1 x + b1) to noise on each token: ||J||_F^2, exactly.

    What ZOO-Prune estimates by random differences is, as they become small, the mean of ||J u||;
    that of its square is g'^T [(W2^T W2) o (W1 W1^T)] g', one quadratic form per token.

    Raises:
        NumericalError: the score is constant, as it is for a linear projector: it says nothing.

    Source: derived from ZOO-Prune; flow.md section 8 (g).
    """
    w1, w2 = numbers(first).detach(), numbers(second).detach()
    x = numbers(features).to(w1)
    matrix = (w2.T @ w2) * (w1 @ w1.T)
    inside = x @ w1.T + (0 if bias is None else numbers(bias).detach().to(w1))
    with torch.enable_grad():
        inside = inside.detach().requires_grad_()
        (slope,) = torch.autograd.grad(activation(inside).sum(), inside)
    score = torch.einsum("ti,ij,tj->t", slope, matrix, slope)
    if float(score.max() - score.min()) <= 1e-5 * float(score.abs().max()):
        raise NumericalError(
            "the projector responds equally to noise on every token (as a linear one does), so "
            "zeroth-order pruning has an empty criterion here."
        )
    return score


def projector_layers(
    projector: nn.Module, features: Features
) -> tuple[Tensor, Optional[Tensor], Tensor, Callable[[Tensor], Tensor]]:
    """W1, b1, W2 and g of a projector that is W2 g(W1 x + b1) + b2 and nothing else.

    Raises:
        ModelRefused: it is built in another way, or what was found does not give its output.
    """
    inside = [m for m in projector.modules() if not list(m.children())]
    linear = [m for m in inside if isinstance(m, nn.Linear)]
    between = [m for m in inside if not isinstance(m, nn.Linear)]
    name = type(projector).__name__
    if len(linear) != 2 or len(between) > 1 or any(list(m.parameters()) for m in between):
        raise ModelRefused(
            f"{name} is not two linear maps around an activation, so the exact form of zeroth-order "
            "pruning does not hold for it."
        )
    activation: Callable[[Tensor], Tensor] = between[0] if between else nn.Identity()
    one, two = linear
    x = torch.as_tensor(features).to(one.weight)
    with torch.no_grad():
        expected, made = projector(x), two(activation(one(x)))
    if expected.shape != made.shape or not torch.allclose(expected, made, rtol=1e-3, atol=1e-3):
        raise ModelRefused(f"{name} does more than its two linear maps and its activation.")
    return one.weight, one.bias, two.weight, activation
