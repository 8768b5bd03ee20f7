"""Detectors against the truth: what is counted, thresholds for simple alternatives, where one fails.

A *place* is one model with one planted phenomenon that can be set to any strength. It is looked at
in three conditions: planted, at every strength; as a plain twin, the same weights and prompts at
strength 0; and as a decoy, strength 0 with another edit that a detector should not react to.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Optional, Protocol, SupportsFloat, runtime_checkable

import numpy as np
import pandas as pd
from jaxtyping import Bool, Float

from interp.core import statistics

FAILS = 0.8
"""A method fails where its recall is below this."""

OBVIOUS = 2
"""So many of the largest strengths are called obvious."""

RESAMPLES = 1000

Grid = Float[np.ndarray, "item layer"]


@dataclass(frozen=True)
class Look:
    """What all methods say about one model: a score per item and layer, and where the truth is."""

    truth: Bool[np.ndarray, "item layer"]
    scores: Mapping[str, Grid]


@runtime_checkable
class Place(Protocol):
    """One planted model."""

    def look(self, strength: float, decoy: bool) -> Look:
        """All methods on it, at a strength; with the decoy that no method should react to, or not."""
        ...


@dataclass(frozen=True)
class Method:
    """A detector of the package, or a simple alternative.

    `limit` is what a score must exceed to be a report. None: the largest score that it gives to any
    plain twin of the other places, which only alternatives get; detectors have their defaults.
    """

    name: str
    limit: Optional[float] = None
    detector: bool = False


@dataclass(frozen=True)
class Family:
    """Planted models of one phenomenon.

    `items` says what the rows of a score are. "tokens": positions, found if reported in a layer in
    which they are planted. "heads": every (head, layer) is an item. "layers": there is one row, and
    every layer is an item. "depth": one row; found if the first layer reported is the planted one.
    `natural`: whether a trained model may have the phenomenon before anything is planted.
    """

    key: str
    title: str
    strength: str
    strengths: tuple[float, ...]
    methods: tuple[Method, ...]
    items: Literal["tokens", "heads", "layers", "depth"]
    planted: str
    decoy: str
    places: Callable[..., Iterator[Place]] = field(repr=False)
    natural: bool = True

    @property
    def detector(self) -> Method:
        """The package's detector that the alternatives are held against."""
        return next(method for method in self.methods if method.detector)

    @property
    def alternatives(self) -> tuple[Method, ...]:
        return tuple(method for method in self.methods if not method.detector)


def trials(family: Family, places: Iterable[Place], strengths: Sequence[float]) -> pd.DataFrame:
    """A row per method, place and condition: planted and found items, false ones, errors.

    Places are looked at one after the other, since they may share the memory of one model.
    """
    conditions = [("twin", 0.0), ("decoy", 0.0), *(("planted", s) for s in strengths)]
    looks = [[place.look(s, kind == "decoy") for kind, s in conditions] for place in places]
    rows = []
    for method in family.methods:
        highest = np.array([_highest(look[0].scores[method.name]) for look in looks])
        for number, here in enumerate(looks):
            limit = method.limit
            if limit is None:
                others = np.delete(highest, number)
                limit = float(others.max()) if len(others) else float(highest[number])
            for (kind, strength), look in zip(conditions, here):
                truth = look.truth if kind == "planted" else np.zeros_like(look.truth)
                rows.append({
                    "family": family.key, "method": method.name, "detector": method.detector,
                    "place": number, "condition": kind, "strength": strength, "limit": limit,
                    **judge(family.items, truth, look.scores[method.name], limit)})
    return pd.DataFrame(rows)


def judge(
    items: str, truth: Bool[np.ndarray, "item layer"], scores: Grid, limit: SupportsFloat
) -> dict[str, Any]:
    """Count what is planted, reported, right and wrong; NaN is never a report.

    Example:
        >>> truth = np.array([[False, True, True], [False, False, False]])
        >>> got = judge("tokens", truth, np.array([[0.0, 0.0, 2.0], [2.0, 0.0, 0.0]]), 1.0)
        >>> got["hits"], got["false"], got["layer_error"]
        (1, 1, 1.0)
    """
    reported = np.nan_to_num(np.asarray(scores, dtype=float), nan=-np.inf) > float(limit)
    nan = float("nan")
    if items in ("heads", "layers"):
        hits, planted = int((reported & truth).sum()), int(truth.sum())
        false = int(reported.sum()) - hits
        layer_error, head_error = nan, nan
        if planted and items == "layers" and reported.any():
            layer_error = abs(_first(reported[0]) - _first(truth[0]))
        if planted and items == "heads" and hits + false:
            item, layer = np.unravel_index(int(np.nanargmax(scores)), scores.shape)
            layer_error = float(np.abs(np.flatnonzero(truth.any(0)) - layer).min())
            head_error = float(not truth[item, layer])
    else:
        rows, there = truth.any(1), reported.any(1)
        if items == "depth":
            right = np.array([a and b and _first(x) == _first(y)
                              for a, b, x, y in zip(rows, there, reported, truth)])
        else:
            right = (reported & truth).any(1)
        hits, planted, false = int(right.sum()), int(rows.sum()), int((there & ~right).sum())
        known = np.flatnonzero(there & rows)
        errors = [abs(_first(reported[i]) - _first(truth[i])) for i in known]
        layer_error, head_error = (float(np.mean(errors)) if errors else nan), nan
    each = reported.any(1) if items == "tokens" else reported
    return {"planted": planted, "hits": hits, "false": false, "reports": hits + false,
            "layer_error": layer_error, "head_error": head_error,
            "items": int(each.size), "items_reported": int(each.sum())}


def recalls(rows: pd.DataFrame, method: str) -> Float[np.ndarray, "place strength"]:
    """The share of planted items that a method finds, by place and strength."""
    chosen = rows[(rows["method"] == method) & (rows["condition"] == "planted")]
    counts = chosen.pivot(index="place", columns="strength", values=["hits", "planted"])
    return (counts["hits"] / counts["planted"]).to_numpy(dtype=float)


def failing(
    recall: Float[np.ndarray, "place strength"], strengths: Sequence[float]
) -> float:
    """The strength at which a method starts to fail, coming from the obvious ones.

    Where the mean recall over places first falls below `FAILS`, on a line between the two strengths
    on both sides, strengths taken as logarithms. One that never fails gets half the smallest
    strength, one that fails everywhere twice the largest: the truth lies beyond.

    Example:
        >>> failing(np.array([[0.0, 0.6, 1.0]]), [1.0, 4.0, 16.0])
        8.0
    """
    mean, at = np.asarray(recall, dtype=float).mean(0), np.log(np.asarray(strengths, dtype=float))
    low = np.flatnonzero(mean < FAILS)
    if not len(low):
        return float(np.exp(at[0]) / 2)
    last = int(low[-1])
    if last == len(mean) - 1:
        return float(np.exp(at[-1]) * 2)
    share = (FAILS - mean[last]) / (mean[last + 1] - mean[last])
    return round(float(np.exp(at[last] + share * (at[last + 1] - at[last]))), 12)


def fails_at(rows: pd.DataFrame, method: str, strengths: Sequence[float]) -> statistics.Estimate:
    """`failing` with its bootstrap interval over places."""
    return statistics.bootstrap(lambda r: failing(r, strengths), recalls(rows, method),
                                resamples=RESAMPLES, name="failing strength")


def sooner(
    rows: pd.DataFrame, method: str, other: str, strengths: Sequence[float]
) -> statistics.Estimate:
    """How much later (in factors of two of the strength) a method fails than another, paired."""
    def octaves(a: np.ndarray, b: np.ndarray) -> float:
        return float(np.log2(failing(b, strengths) / failing(a, strengths)))

    return statistics.bootstrap(octaves, recalls(rows, method), recalls(rows, other),
                                resamples=RESAMPLES, name="log2 ratio of failing strengths")


def obvious(rows: pd.DataFrame, method: str, strengths: Sequence[float]) -> pd.DataFrame:
    """The trials of a method at the largest strengths."""
    return rows[(rows["method"] == method) & (rows["condition"] == "planted")
                & rows["strength"].isin(sorted(strengths)[-OBVIOUS:])]


def summary(family: Family, rows: pd.DataFrame, strengths: Sequence[float]) -> list[dict[str, Any]]:
    """A line of the table per method."""
    made = []
    for method in family.methods:
        clear = obvious(rows, method.name, strengths)
        sums = clear[["hits", "planted", "reports"]].sum()
        fails = fails_at(rows, method.name, strengths)
        quiet = {kind: rows[(rows["method"] == method.name) & (rows["condition"] == kind)]
                 for kind in ("twin", "decoy")}
        made.append({
            "family": family.key, "method": method.name,
            "kind": "detector" if method.detector else "alternative", "unit": family.strength,
            "places": int(rows["place"].nunique()),
            "recall": _share(sums["hits"], sums["planted"]),
            "precision": _share(sums["hits"], sums["reports"]),
            "layer_error": _mean(clear["layer_error"]), "head_error": _mean(clear["head_error"]),
            "false_in_twins": _share(quiet["twin"]["items_reported"].sum(),
                                     quiet["twin"]["items"].sum()),
            "false_in_decoys": float((quiet["decoy"]["reports"] > 0).mean()),
            "fails_at": fails.value, "fails_low": fails.interval[0], "fails_high": fails.interval[1],
            "limit": float(rows[rows["method"] == method.name]["limit"].median()),
        })
    return made


def _highest(scores: Grid) -> float:
    known = scores[np.isfinite(scores)]
    return float(known.max()) if len(known) else float("-inf")


def _first(row: Bool[np.ndarray, "layer"]) -> int:
    return int(np.flatnonzero(row)[0])


def _share(part: SupportsFloat, whole: SupportsFloat) -> float:
    return float(part) / float(whole) if float(whole) else float("nan")


def _mean(values: pd.Series) -> float:
    known = values.dropna()
    return float(known.mean()) if len(known) else float("nan")
