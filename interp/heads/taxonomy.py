"""Kinds of heads side by side: which detector finds which head, which kinds overlap, how deep.

Paper     arXiv:2409.03752 (survey)
Question  Are two kinds of heads the same heads? Does a stage sit at a depth of its own?
Measure   a head x detector table of scores, nulls and p values; overlaps of the found sets against
          the hypergeometric null; relative depth per stage
Cause     a column `effect` for causal changes measured elsewhere
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Optional, SupportsFloat, SupportsIndex

import numpy as np
import pandas as pd
import xarray as xr
from jaxtyping import Float
from matplotlib.axes import Axes
from scipy import stats

from interp.core import Head, HeadScores, OutOfRange, Result
from interp.core.head import HeadLike, check_heads, heads
from interp.figures.style import CYCLE, note, style

STAGES = {
    "knowledge recalling": ("associative memory", "memory", "constant", "single letter", "negative"),
    "in-context identification": (
        "previous", "positional", "rare words", "duplicate", "retrieval", "global retrieval", "echo",
        "subword merge", "syntactic", "mover", "name mover", "backup name mover",
        "negative name mover", "letter mover", "context", "content gatherer",
        "sentiment summarizer", "semantic induction", "subject", "relation"),
    "latent reasoning": (
        "summary reader", "function vector", "induction", "in-context", "truthfulness", "accuracy",
        "consistency", "vulnerable", "correct letter", "iteration", "successor", "inhibition"),
    "expression preparation": (
        "mixed", "amplification", "correct", "coherence", "faithfulness"),
}
"""Stage -> kinds of heads, in the survey's order: typically from shallow to deep."""


@dataclass(frozen=True)
class Detector:
    """One kind of head: its scores, what chance gives, and the heads that it calls found.

    Attributes:
        scores: with standard errors and eligibility, where they are known.
        found: the heads of this kind, by whatever rule the detector has.
        null: chance level of the score, [layer, head].
        effect: causal change when a head is ablated, [layer, head], from a sweep with a control.
        stage: of `STAGES`, or any other; "" if it belongs to none.
    """

    scores: HeadScores
    found: tuple[Head, ...]
    null: Optional[xr.DataArray] = None
    effect: Optional[xr.DataArray] = None
    stage: str = ""


def stage_of(kind: str) -> str:
    """The survey's stage of a kind of head, "" if it does not name it.

    Example:
        >>> stage_of("retrieval"), stage_of("memory head"), stage_of("visual sink")
        ('in-context identification', 'knowledge recalling', '')
    """
    plain = kind.lower().replace("_", " ").removesuffix(" heads").removesuffix(" head")
    return next((stage for stage, kinds in STAGES.items() if plain in kinds), "")


def detector(
    given: HeadScores | Result,
    kind: str = "",
    *,
    top: Optional[SupportsIndex] = None,
    above: Optional[SupportsFloat] = None,
    effect: Optional[xr.DataArray] = None,
) -> Detector:
    """A detector from head scores, or from the `Result` of a scorer's `measure`.

    Example:
        >>> scores = HeadScores.of(np.array([[0.1, 0.9], [0.4, 0.2]]))
        >>> detector(scores, "retrieval", top=1).found
        (L0H1,)

    Args:
        kind: names the stage (`stage_of`).
        top: so many of the highest heads are found; or `above`: those over a threshold.
        effect: causal change by ablating each head.

    Raises:
        ValueError: neither or both of `top` and `above`.
    """
    if (top is None) == (above is None):
        raise ValueError("say which heads are found: either top=10 or above=0.1.")
    null = None
    if isinstance(given, Result):
        data = given.data
        null = data["null"] if "null" in data else None
        scores = HeadScores(
            data["score"].transpose("layer", "head"), data.get("frequency"),
            data.get("standard_error"), data.get("eligible"))
    else:
        scores = given
    found = scores.top(int(top)) if top is not None else scores.above(float(above or 0.0))
    return Detector(scores, tuple(sorted(found)), null, effect, stage_of(kind))


def matrix(detectors: Mapping[str, Detector]) -> pd.DataFrame:
    """A row for every head and detector: score, null, p values, found or not, causal effect.

    Example:
        >>> scores = HeadScores.of(np.array([[0.1, 0.9]]), standard_error=np.array([[0.1, 0.1]]))
        >>> null = xr.DataArray([[0.1, 0.1]], dims=("layer", "head"))
        >>> table = matrix({"retrieval": Detector(scores, (Head(0, 1),), null)})
        >>> table[["head", "score", "found"]].values.tolist()
        [['L0H0', 0.1, False], ['L0H1', 0.9, True]]

    `p` is one-sided, of (score - null) / standard error under the normal law; `p_adjusted` is
    corrected for the number of eligible heads of the detector (Benjamini-Hochberg). NaN where the
    null or the standard error is unknown, and for heads that are not eligible.
    """
    _sizes(detectors)
    parts = []
    for name, one in detectors.items():
        score = one.scores.scores
        able = _filled(one.scores.eligible, score, True).astype(bool)
        null, error = _filled(one.null, score), _filled(one.scores.standard_error, score)
        with np.errstate(divide="ignore", invalid="ignore"):
            p = stats.norm.sf((score.values - null) / error)
        p = np.where(able & np.isfinite(p), p, np.nan)
        layer, head = (x.ravel() for x in np.indices(score.shape))
        own = [Head(int(a), int(b)) for a, b in zip(score["layer"].values[layer],
                                                    score["head"].values[head])]
        parts.append(pd.DataFrame({
            "head": [str(h) for h in own], "layer": [h.layer for h in own], "detector": name,
            "stage": one.stage, "score": score.values.ravel(), "null": null.ravel(),
            "p": p.ravel(), "p_adjusted": _adjusted(p.ravel()), "eligible": able.ravel(),
            "found": [h in one.found for h in own], "effect": _filled(one.effect, score).ravel(),
        }))
    return pd.concat(parts, ignore_index=True)


def overlap(
    first: Iterable[HeadLike], second: Iterable[HeadLike], eligible: Sequence[int],
    *, layer_matched: bool = True,
) -> dict[str, float]:
    """How many heads two sets share, against the hypergeometric null.

    Example:
        >>> found = overlap(["L0H1", "L0H2"], ["L0H1", "L1H0"], [4, 4], layer_matched=False)
        >>> {name: round(value, 3) for name, value in found.items()}
        {'shared': 1.0, 'expected': 0.5, 'jaccard': 0.333, 'expected_jaccard': 0.179, 'p': 0.464}

    Args:
        eligible: how many heads of each layer either set could have had.
        layer_matched: the null keeps the number of heads of each set in every layer. Two kinds
            that both like the middle layers overlap by chance more than the plain null says.

    Returns:
        `shared`, `jaccard`, their expectations, and `p` = P(as many shared or more), exact.
    """
    one, two = set(heads(list(first))), set(heads(list(second)))
    check_heads([*one, *two], len(eligible), 1 << 30)
    sizes = [sum(h.layer == layer for h in one) for layer in range(len(eligible))], [
        sum(h.layer == layer for h in two) for layer in range(len(eligible))]
    for layer, counts in enumerate(zip(eligible, *sizes)):
        if max(counts[1:]) > counts[0]:
            raise OutOfRange(
                f"layer {layer} has {counts[0]} eligible heads, but a set has {max(counts[1:])}.")
    groups = zip(eligible, *sizes) if layer_matched \
        else [(sum(eligible), sum(sizes[0]), sum(sizes[1]))]
    law = np.ones(1)
    for total, a, b in groups:
        # Sums of independent counts: their laws are convolved.
        law = np.convolve(law, stats.hypergeom.pmf(np.arange(min(a, b) + 1), total, a, b))
    law, shared = law / law.sum(), len(one & two)
    count = np.arange(len(law))
    union = len(one) + len(two) - count
    index = np.divide(count, union, out=np.zeros(len(law)), where=union > 0)
    return {
        "shared": float(shared), "expected": float((law * count).sum()),
        "jaccard": shared / max(1, len(one | two)), "expected_jaccard": float((law * index).sum()),
        "p": min(1.0, float(law[shared:].sum())),
    }


def overlaps(
    detectors: Mapping[str, Detector], *, layer_matched: bool = True
) -> pd.DataFrame:
    """Every pair of detectors: shared heads, Jaccard index, p against chance, corrected.

    Example:
        >>> scores = HeadScores.of(np.arange(12.0).reshape(3, 4))
        >>> pair = {"a": detector(scores, top=2), "b": detector(scores, top=3)}
        >>> overlaps(pair, layer_matched=False)[["shared", "jaccard"]].round(3).values.tolist()
        [[2.0, 0.667]]

    `p_adjusted` is corrected for the number of pairs (Benjamini-Hochberg). Heads count as eligible
    if both detectors could have found them; a set is cut to those.
    """
    sizes = _sizes(detectors)
    names, rows = list(detectors), []
    for i, a in enumerate(names):
        for b in names[i + 1 :]:
            able = _able(detectors[a], sizes) & _able(detectors[b], sizes)
            sets = [[h for h in detectors[n].found if able[h.layer, h.head]] for n in (a, b)]
            found = overlap(sets[0], sets[1], able.sum(1).tolist(), layer_matched=layer_matched)
            rows.append({"first": a, "second": b, **found})
    table = pd.DataFrame(rows, columns=["first", "second", "shared", "expected", "jaccard",
                                        "expected_jaccard", "p"])
    return table.assign(p_adjusted=_adjusted(table["p"].to_numpy(dtype=float)))


def depths(detectors: Mapping[str, Detector]) -> pd.DataFrame:
    """The relative depth of every found head, 0 for the first layer and 1 for the last.

    Example:
        >>> scores = HeadScores.of(np.arange(12.0).reshape(3, 4))
        >>> depths({"retrieval": detector(scores, "retrieval", top=1)}).values.tolist()
        [['retrieval', 'in-context identification', 'L2H3', 1.0]]
    """
    n_layers, _ = _sizes(detectors)
    rows = [(name, one.stage, str(h), h.layer / max(1, n_layers - 1))
            for name, one in detectors.items() for h in one.found]
    return pd.DataFrame(rows, columns=["detector", "stage", "head", "depth"])


@style()
def draw(detectors: Mapping[str, Detector], ax: Axes, *, seed: int = 0) -> Axes:
    """Relative depth of the found heads, a row per detector, stages from bottom to top."""
    order = [*STAGES, ""]
    names = sorted(detectors, key=lambda n: order.index(detectors[n].stage)
                   if detectors[n].stage in order else len(order))
    table, rng = depths(detectors), np.random.default_rng(seed)
    stages = list(dict.fromkeys(detectors[n].stage for n in names))
    for row, name in enumerate(names):
        own = table.loc[table["detector"] == name, "depth"].to_numpy(dtype=float)
        stage = detectors[name].stage
        first = all(detectors[n].stage != stage for n in names[:row])
        hue = CYCLE[stages.index(stage) % len(CYCLE)]
        ax.plot(own, row + rng.uniform(-0.18, 0.18, len(own)), "o", color=hue, alpha=0.7,
                label=(stage or "no stage") if first else None)
        if len(own):
            ax.plot([np.median(own)] * 2, [row - 0.35, row + 0.35], color=hue)
    ax.set_yticks(range(len(names)), names)
    ax.set_ylim(-0.6, len(names) - 0.4)
    ax.set_xlim(-0.03, 1.03)
    ax.set_xlabel("relative depth (0 first layer, 1 last)")
    ax.legend(loc="upper center", bbox_to_anchor=(0.5, 1.0 + 0.12 * len(stages)), ncols=1)
    note(ax, "bar: median")
    return ax


def _sizes(detectors: Mapping[str, Detector]) -> tuple[int, int]:
    if not detectors:
        raise ValueError("no detectors to compare: give at least one.")
    shapes = {name: one.scores.scores.shape for name, one in detectors.items()}
    if len(set(shapes.values())) > 1:
        raise ValueError(f"the detectors are not about one model: their scores have {shapes}.")
    shape = next(iter(shapes.values()))
    for one in detectors.values():
        check_heads(one.found, *shape)
    return shape[0], shape[1]


def _able(one: Detector, shape: tuple[int, int]) -> np.ndarray:
    values = one.scores.scores
    return _filled(one.scores.eligible, values, True).astype(bool) & np.isfinite(values.values)


def _filled(
    given: Optional[xr.DataArray], like: xr.DataArray, value: Any = np.nan
) -> Float[np.ndarray, "layer head"]:
    if given is None:
        return np.full(like.shape, value, dtype=float)
    return np.asarray(given.transpose("layer", "head").values, dtype=float)


def _adjusted(p: np.ndarray) -> np.ndarray:
    """Benjamini-Hochberg over the p values that there are."""
    found, known = np.full(len(p), np.nan), np.isfinite(p)
    if known.any():
        found[known] = stats.false_discovery_control(p[known])
    return found
