"""Calibration: whether what a probe calls 80 % is right in 80 % of the cases.

Bins of equal mass, as many samples in each, so that no bin's error rests on a handful of samples.
The error depends on the number of bins and is above zero for a perfectly calibrated probe, too, for
want of samples: `expected_error` is what that costs, and `debiased` what is left without it.

Sources   arXiv:1706.04599 (expected calibration error), Brier (1950)
"""

from typing import Any, Optional, SupportsIndex

import numpy as np
import xarray as xr
from matplotlib.axes import Axes
from sklearn.base import clone
from sklearn.calibration import CalibratedClassifierCV
from sklearn.metrics import brier_score_loss

from interp.core import Result
from interp.figures.style import color, note, style
from probes.folds import folds_of, targets
from probes.linear import logistic

BINS = 15


def calibrated(
    labels: Any, *, groups: Optional[Any], estimator: Optional[Any] = None, method: str = "sigmoid",
    folds: SupportsIndex = 5, seed: SupportsIndex = 0,
) -> CalibratedClassifierCV:
    """A probe whose probabilities are fitted on folds that its weights have not seen, ready to fit.

    Example:
        >>> rng = np.random.default_rng(0)
        >>> y, X = np.arange(60) % 2, rng.standard_normal((60, 3))
        >>> probe = calibrated(y, groups=np.arange(60) // 3).fit(X + y[:, None], y)
        >>> probe.predict_proba(X).shape
        (60, 2)

    The splits keep groups together, so they belong to these labels and groups: fit it on the same
    samples in the same order. `method` is "sigmoid" (Platt), "isotonic" or "temperature".

    Raises:
        ValueError: one class only, too few groups, or a fold without one of the classes.
    """
    y, kind, classes = targets(labels, len(labels), "classification")
    if len(classes) < 2:
        raise ValueError("all samples have the same label: there is nothing to calibrate.")
    splits = folds_of(y, kind, groups, int(folds), int(seed))
    for number, (train, _) in enumerate(splits):
        missing = set(range(len(classes))) - set(y[train].tolist())
        if missing:
            raise ValueError(
                f"the class {classes[missing.pop()]!r} is missing in the training part of fold "
                f"{number}: its groups lie in one fold; use fewer folds, or more groups."
            )
    return CalibratedClassifierCV(logistic() if estimator is None else estimator, method=method,
                                  cv=splits)


def predicted(
    estimator: Any, states: Any, labels: Any, *, groups: Optional[Any], folds: SupportsIndex = 5,
    seed: SupportsIndex = 0, calibrate: Optional[str] = None,
) -> np.ndarray:
    """Probabilities of every sample from a probe fitted on the other folds, `[sample, class]`.

    Example:
        >>> rng = np.random.default_rng(0)
        >>> y = np.arange(60) % 2
        >>> predicted(logistic(), rng.standard_normal((60, 3)), y, groups=None).shape
        (60, 2)

    With `calibrate` a method of `calibrated`, the probe of every fold is calibrated within its
    training part.
    """
    X = np.asarray(states, dtype=float)
    y, kind, classes = targets(labels, len(X), "classification")
    if len(classes) < 2:
        raise ValueError("all samples have the same label: a probe needs at least two classes.")
    found = np.zeros((len(X), len(classes)))
    for train, test in folds_of(y, kind, groups, int(folds), int(seed)):
        probe: Any = clone(estimator)
        if calibrate is not None:
            own = None if groups is None else np.asarray(groups)[train]
            probe = calibrated(y[train], groups=own, estimator=probe, method=calibrate,
                               folds=int(folds), seed=seed)
        probe.fit(X[train], y[train])
        found[np.ix_(test, probe.classes_)] = probe.predict_proba(X[test])
    return found


def reliability(
    probabilities: Any, labels: Any, *, bins: SupportsIndex = BINS, draws: SupportsIndex = 200,
    seed: SupportsIndex = 0,
) -> Result:
    """Confidence against accuracy in bins of equal mass, their mean distance (ECE), Brier score.

    Example:
        >>> p = np.repeat([0.2, 0.8], 100)
        >>> y = np.r_[np.arange(100) < 20, np.arange(100) < 80]
        >>> found = reliability(p, y, bins=2)
        >>> round(float(found["ece"]), 3), round(float(found["brier"]), 3)
        (0.0, 0.16)

    Args:
        probabilities: of the second class, `[sample]` (the event itself is then judged, for p from 0
            to 1); or of all classes, `[sample, class]` (the likeliest class is judged, by whether it
            is right).
        labels: 0 and 1, or class numbers. bins: as many samples in each; fewer where samples are.
        draws: simulated outcomes of a perfectly calibrated probe with these very probabilities.

    Returns:
        [bin]: `confidence`, `accuracy`, `count`; `ece`, `brier` (summed over classes), `expected_error`
        [draw] of a perfectly calibrated probe, and `debiased`, the ECE less their mean, at least 0.

    Raises:
        ValueError: no samples, NaN, values outside 0 to 1, labels that are not class numbers.

    Source: arXiv:1706.04599, equation 3, with quantiles for edges.
    """
    p, y = np.asarray(probabilities, dtype=float), np.asarray(labels).astype(int)
    if p.ndim not in (1, 2) or y.shape != (len(p),) or not len(y):
        raise ValueError(f"probabilities {p.shape} and labels {y.shape}: give one label per sample.")
    if not np.isfinite(p).all() or p.min() < 0 or p.max() > 1 + 1e-9:
        raise ValueError("probabilities must be numbers from 0 to 1.")
    each = np.stack([1 - p, p], 1) if p.ndim == 1 else p
    if y.min() < 0 or y.max() >= each.shape[1]:
        raise ValueError(f"labels must be class numbers from 0 to {each.shape[1] - 1}.")
    if p.ndim == 1:
        confidence, right = p, (y == 1).astype(float)
    else:
        confidence, right = p.max(1), (p.argmax(1) == y).astype(float)
    parts = np.array_split(np.argsort(confidence, kind="stable"), min(int(bins), len(y)))
    ece = _error(confidence, right, parts)
    rng = np.random.default_rng(int(seed))
    chance = [_error(confidence, (rng.random(len(y)) < confidence).astype(float), parts)
              for _ in range(int(draws))]
    brier = brier_score_loss(y, each, labels=range(each.shape[1]),
                             scale_by_half=False)  # pyright: ignore[reportArgumentType]
    data = xr.Dataset({
        "confidence": ("bin", [confidence[part].mean() for part in parts]),
        "accuracy": ("bin", [right[part].mean() for part in parts]),
        "count": ("bin", [len(part) for part in parts]),
        "ece": ece, "brier": float(brier) / (2 if p.ndim == 1 else 1),
        "expected_error": ("draw", chance),
        "debiased": max(0.0, ece - float(np.mean(chance))) if chance else ece})
    return Result(data, {"measure": "calibration", "bins": len(parts), "n_samples": len(y),
                         "event": "second class" if p.ndim == 1 else "likeliest class is right"})


def _error(confidence: np.ndarray, right: np.ndarray, parts: list[np.ndarray]) -> float:
    return float(sum(abs(confidence[part].mean() - right[part].mean()) * len(part)
                     for part in parts) / len(right))


@style()
def draw(found: Result, ax: Axes) -> Axes:
    """The reliability curve: observed share against confidence, and what would be calibrated."""
    ax.plot([0, 1], [0, 1], ":", color=color("control"), label="calibrated")
    ax.plot(found["confidence"], found["accuracy"], "-o", markersize=3, color=color("primary"),
            label="probe")
    ax.set_xlabel("confidence")
    ax.set_ylabel("observed share")
    ax.set_xlim(-0.02, 1.02)
    ax.set_ylim(-0.02, 1.02)
    ax.legend()
    note(ax, f"ECE {float(found['ece']):.3f} (calibrated: "
             f"{float(found['expected_error'].mean()):.3f}), Brier {float(found['brier']):.3f}")
    return ax
