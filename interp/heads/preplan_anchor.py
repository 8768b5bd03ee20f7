"""The preplan-and-anchor rhythm: where local heads look back farther, and what is reread later.

Paper     arXiv:2510.13554
Question  At which tokens does a new chunk begin, and which tokens does the later text return to?
Measure   WAAD, the windowed look-back of the local heads; FAI, the later attention on a token
Cause     change a token that is reread, and others: do greedy continuations change more?
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Optional, SupportsFloat, SupportsIndex

import numpy as np
import torch
import xarray as xr
from jaxtyping import Bool, Float
from torch import Tensor

from interp.core import Prompt, Result
from interp.core.errors import NumericalError, OutOfRange
from interp.models.model import Model

WINDOW, LOW, HIGH = 10, 10, 50
PEAKS = 0.4


def waad(
    attention: Float[Tensor | np.ndarray, "query key"], window: SupportsIndex = WINDOW
) -> Float[Tensor, "query"]:
    """Windowed look-back of each query: sum over keys of A_ts min(t - s, W), in tokens.

    Example:
        >>> waad(torch.tensor([[1.0, 0.0, 0.0], [0.5, 0.5, 0.0], [1.0, 0.0, 0.0]]), 1)
        tensor([0.0000, 0.5000, 1.0000])

    `attention` is the plain mean over the local heads, causal.

    Source: arXiv:2510.13554, WAAD.
    """
    rows, distance = _checked(attention)
    return (rows * distance.clamp(0, int(window))).sum(-1)


def waad_from_band(
    band: Float[Tensor | np.ndarray, "query window"],
    row_sum: Float[Tensor | np.ndarray, "query"] | SupportsFloat = 1.0,
) -> Float[Tensor, "query"]:
    """The same from the diagonals 0 to W - 1 alone, as they are streamed.

    Example:
        >>> waad_from_band(torch.tensor([[1.0], [0.5], [0.0]]))
        tensor([0.0000, 0.5000, 1.0000])

    Args:
        band: attention at t, t - 1, ..., t - W + 1; NaN before the text counts as zero.
        row_sum: of the rows, where it is not one (learned sink logits).

    Source: WAAD_t = W (1 - sum_j a_j) + sum_j j a_j, by algebra.
    """
    near = torch.as_tensor(band).nan_to_num(0.0)
    width = near.shape[-1]
    total = torch.as_tensor(row_sum, dtype=near.dtype) if not isinstance(row_sum, Tensor) else row_sum
    return width * (total - near.sum(-1)) + (near * torch.arange(width)).sum(-1)


def fai(
    attention: Float[Tensor | np.ndarray, "query key"],
    low: SupportsIndex = LOW,
    high: SupportsIndex = HIGH,
) -> Float[Tensor, "key"]:
    """Future attention influence: mean attention that a key receives from low to high tokens later.

    Example:
        >>> rows = torch.zeros(4, 4)
        >>> rows[2:, 0] = torch.tensor([0.5, 1.0])
        >>> fai(rows, 2, 5)
        tensor([0.7500, 0.0000,    nan,    nan])

    NaN for keys that no query is late enough for. Keys before the queries given count those
    queries only.

    Source: arXiv:2510.13554, FAI.
    """
    rows, distance = _checked(attention)
    late = (distance >= int(low)) & (distance <= int(high))
    return (rows * late).sum(0) / late.sum(0)


def change(
    values: Float[np.ndarray, "position"], *, drop_only: bool = False
) -> Float[np.ndarray, "position"]:
    """Delta_t: how much a curve changes to the next token, NaN for the last.

    Example:
        >>> change(np.array([1.0, 3.0, 2.0])).tolist()
        [2.0, 1.0, nan]
        >>> change(np.array([1.0, 3.0, 2.0]), drop_only=True).tolist()
        [0.0, 1.0, nan]

    Source: arXiv:2510.13554, |WAAD_t - WAAD_{t+1}|; `drop_only` counts falls alone.
    """
    step = values[:-1] - values[1:]
    return np.append(np.maximum(step, 0) if drop_only else np.abs(step), np.nan)


def peaks(
    values: Float[np.ndarray, "position"], share: SupportsFloat = PEAKS
) -> Bool[np.ndarray, "position"]:
    """The top `share` of the positions that have a value; ties go to the earlier one.

    Example:
        >>> peaks(np.array([0.1, 0.9, np.nan, 0.5, 0.2]), 0.5).tolist()
        [False, True, False, True, False]

    Preplan tokens are the peaks of Delta, anchors the peaks of FAI. At 40 % chance overlaps are
    frequent: compare with shifted curves.

    Source: arXiv:2510.13554 (40 %).
    """
    found = np.zeros(len(values), dtype=bool)
    known = np.flatnonzero(np.isfinite(values))
    count = int(round(float(share) * len(known)))
    order = known[np.argsort(-values[known], kind="stable")]
    found[order[:count]] = True
    return found


def dominated(
    waad: Float[np.ndarray, "position"], anchors: Bool[np.ndarray, "position"],
    *, back: SupportsIndex = 3, low: Optional[SupportsFloat] = None,
    jump: Optional[SupportsFloat] = None,
) -> Bool[np.ndarray, "position"]:
    """Anchors that follow a jump of WAAD and have a low WAAD themselves: introduced by a neighbor.

    Example:
        >>> curve = np.array([5.0, 1.0, 1.0, 1.0, 4.0])
        >>> dominated(curve, np.array([False, True, False, True, True]), back=1).tolist()
        [False, True, False, False, False]

    Args:
        back: how many tokens before the anchor are looked at for the jump.
        low, jump: WAAD at most, and Delta at least; the medians if None (the paper names no
            numbers that could be confirmed).

    Source: arXiv:2510.13554, locally dominated anchors.
    """
    step = change(waad)
    low = float(np.nanmedian(waad)) if low is None else float(low)
    jump = float(np.nanmedian(step)) if jump is None else float(jump)
    found = np.zeros(len(waad), dtype=bool)
    for place in np.flatnonzero(anchors & (waad <= low)):
        before = step[max(0, place - int(back)) : place]
        found[place] = bool(len(before)) and bool(np.nanmax(before) >= jump)
    return found


def shifted(
    values: np.ndarray, rng: np.random.Generator, *, least: SupportsIndex = 5
) -> np.ndarray:
    """A curve turned around by a random number of tokens: a null that keeps its autocorrelation.

    Example:
        >>> turned = shifted(np.arange(20), np.random.default_rng(0))
        >>> sorted(turned.tolist()) == list(range(20)), bool(turned[0] == 0)
        (True, False)
    """
    n, edge = len(values), int(least)
    if n < 2 * edge + 1:
        raise ValueError(f"a curve of {n} tokens cannot be shifted by {edge} or more both ways.")
    return np.roll(values, int(rng.integers(edge, n - edge + 1)), axis=0)


@dataclass(frozen=True)
class Coupling:
    """How two curves go together, per text, and how shifted ones do.

    Attributes:
        observed: the statistic of each text. null: its mean over shifts, per text.
        p: share of shifts, applied to all texts at once, with a mean as large or larger.
    """

    observed: Float[np.ndarray, "sample"]
    null: Float[np.ndarray, "sample"]
    p: float


def coupling(
    statistic: Callable[[np.ndarray, np.ndarray], float],
    curves: Sequence[tuple[np.ndarray, np.ndarray]],
    *, shifts: int = 200, seed: int = 0,
) -> Coupling:
    """A statistic of two curves of each text against the same with one of them turned around.

    Example:
        >>> step = np.tile([1.0, 0.0, 0.0], 10)
        >>> found = coupling(lambda a, b: float((a * b).sum()), [(step, step)] * 3)
        >>> found.observed.tolist(), bool(found.null[0] < 5)
        ([10.0, 10.0, 10.0], True)

    A text in which the statistic is NaN, or that is too short to be shifted, is left out.
    """
    rng, observed, null = np.random.default_rng(seed), [], []
    for first, second in curves:
        value = statistic(first, second) if len(first) > 10 else float("nan")
        if not np.isfinite(value):
            continue
        observed.append(value)
        null.append([statistic(shifted(first, rng), second) for _ in range(shifts)])
    drawn = np.array(null).reshape(len(observed), shifts)
    if not observed:
        return Coupling(np.empty(0), np.empty(0), float("nan"))
    totals = np.nanmean(drawn, 0)
    above = int((totals >= np.mean(observed)).sum())
    return Coupling(np.array(observed), np.nanmean(drawn, 1), (1 + above) / (1 + shifts))


def intervene(
    model: Model, prompts: Sequence[Prompt], places: Mapping[str, Sequence[Sequence[int]]],
    *, new_tokens: int = 24, batch_size: int = 16,
) -> Result:
    """Change single tokens, go on greedily behind each, and compare with going on unchanged.

    Example:
        >>> import interp
        >>> model = interp.open_model("reader")
        >>> done = intervene(model, [Prompt.from_tokens(range(9))], {"anchor": [[4, 6]]},
        ...                  new_tokens=3)
        >>> done["jaccard"].dims, done["jaccard"].shape
        (('condition', 'sample', 'position'), (1, 1, 2))

    Args:
        places: condition -> for every prompt the positions to change, one at a time, equally many
            in all. The token becomes the one that the model itself would rather have put there
            than any other.

    Returns:
        `jaccard` [condition, sample, position]: tokens that both continuations have over tokens
        that one of them has; 1 where nothing changes.

    Raises:
        OutOfRange: a position that nothing comes before, or that is not in the prompt.

    Source: arXiv:2510.13554, perturbation of anchor tokens (greedy continuations).
    """
    count = len(next(iter(next(iter(places.values())))))
    for given in places.values():
        for prompt, where in zip(prompts, given):
            if len(where) != count:
                raise ValueError("every prompt needs equally many positions in every condition.")
            for place in where:
                if not 0 < place < len(prompt):
                    raise OutOfRange(
                        f"position {place} cannot be changed: choose 1 to {len(prompt) - 1}.")
    starts: list[Prompt] = []
    for number, prompt in enumerate(prompts):
        rows = model.run(prompt).logits[0]
        for given in places.values():
            for place in given[number]:
                best = rows[place - 1].clone()
                best[prompt.ids[place]] = float("-inf")
                head = prompt.ids[: place + 1]
                starts += [Prompt.from_tokens(head),
                           Prompt.from_tokens([*head[:-1], int(best.argmax())])]
    made = model.run(starts, new_tokens=new_tokens, logits="last", batch_size=batch_size).new_tokens
    pairs = [(set(a), set(b)) for a, b in zip(made[::2], made[1::2])]
    found = np.array([len(a & b) / max(1, len(a | b)) for a, b in pairs])
    found = found.reshape(len(prompts), len(places), count).transpose(1, 0, 2)
    data = xr.Dataset({"jaccard": (("condition", "sample", "position"), found)},
                      {"condition": list(places)})
    return Result(data, {**model.manifest(), "operation": "change a token", "new_tokens": new_tokens,
                         "n_samples": len(prompts)})


def _checked(attention: Tensor | np.ndarray) -> tuple[Tensor, Tensor]:
    """The rows, and how far each key lies behind each query."""
    rows = torch.as_tensor(attention)
    rows = rows.to(torch.promote_types(rows.dtype, torch.float32))
    if not torch.isfinite(rows).all():
        raise NumericalError("attention contains NaN or infinity; recompute it in float32.")
    n_queries, n_keys = rows.shape
    return rows, torch.arange(n_keys - n_queries, n_keys)[:, None] - torch.arange(n_keys)
