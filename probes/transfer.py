"""Does a probe of one data set work on another? And do three ways to a direction agree?

A probe that has found the concept, and not its data set, transfers. Groups that two data sets share
(an entity, a picture) are kept out of training wherever they are tested.

Cards     transfer between data sets; difference of means, logistic regression and linear
          discriminant analysis compared, with weights mapped back to the states' own space
"""

import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Optional, SupportsIndex

import numpy as np
import xarray as xr
from jaxtyping import Float
from matplotlib.axes import Axes
from sklearn.discriminant_analysis import LinearDiscriminantAnalysis

from interp.core import Result, statistics
from interp.figures import heat
from probes.folds import folds_of, shuffled
from probes.linear import DifferenceOfMeans, direction, fitted_copy, logistic
from probes.quick import auc


def three_ways() -> dict[str, Any]:
    """Difference of means, logistic regression, and discriminant analysis, unfitted.

    Example:
        >>> list(three_ways())
        ['difference of means', 'logistic', 'discriminant']
    """
    return {"difference of means": DifferenceOfMeans(), "logistic": logistic(),
            "discriminant": LinearDiscriminantAnalysis(solver="lsqr", shrinkage="auto")}


@dataclass(frozen=True, eq=False)
class Labelled:
    """States `[sample, d_model]`, a label for each, and what may not be split (None: nothing).

    Example:
        >>> len(Labelled(np.zeros((4, 3)), [0, 1, 0, 1], None).labels)
        4
    """

    states: Any
    labels: Any
    groups: Optional[Any]


def transfer(
    data: Mapping[str, Labelled],
    estimators: Optional[Mapping[str, Any]] = None,
    *,
    folds: SupportsIndex = 5,
    permutations: SupportsIndex = 200,
    resamples: SupportsIndex = 1000,
    seed: SupportsIndex = 0,
) -> Result:
    """Score on every data set of probes trained on every other one, with nulls and intervals.

    Example:
        >>> rng = np.random.default_rng(0)
        >>> y = np.arange(80) % 2
        >>> made = {name: Labelled(rng.standard_normal((80, 4)) + 2 * y[:, None], y, None)
        ...         for name in ("a", "b")}
        >>> found = transfer(made, resamples=100)
        >>> found["score"].dims, bool((found["score"] > 0.8).all())
        (('estimator', 'train', 'test'), True)

    All data sets are cut into the same folds by group; a cell is trained on one data set's samples
    outside a fold and tested on the other's within it. So the diagonal is cross-validation, and no
    cell has more training samples than the diagonal of its row. Groups are told apart by name: give
    equal names to what is the same in two data sets. With None, every sample is its own group.

    Args:
        estimators: name -> classifier; `three_ways()` for None.
        permutations: of the labels that are tested, in groups as in `probes.sweep.sweep`.
        resamples: of the bootstrap over groups of the tested data set.

    Returns:
        [estimator, train, test]: `score` (ROC-AUC for two classes, else balanced accuracy; mean over
        folds), `low`, `high` (95 %), `p` (family-wise, from the maximum over all cells) and `p_alone`;
        `null` [permutation, estimator, train, test]; `chance`.

    Raises:
        ValueError: no data, different classes or widths, NaN, too few groups, one class in a test.
    """
    names = [str(name) for name in data]
    sets, classes = _checked(data)
    ways = dict(three_ways() if estimators is None else estimators)
    rng = np.random.default_rng(int(seed))
    folds_in = _folds(sets, int(folds), int(seed))
    # One order per permutation and data set, for all probes alike.
    orders = [np.stack([shuffled(y, blocks, rng) for _ in range(int(permutations))])
              for _, y, blocks in sets]
    shape = (len(ways), len(names), len(names))
    score, low, high = np.full(shape, np.nan), np.full(shape, np.nan), np.full(shape, np.nan)
    null = np.full((int(permutations), *shape), np.nan)
    for w, way in enumerate(ways.values()):
        for a, (X, y, _) in enumerate(sets):
            probes = [fitted_copy(way, X[folds_in[a] != f], y[folds_in[a] != f])
                      for f in range(int(folds))]
            for b, (Z, z, blocks) in enumerate(sets):
                two = len(classes) == 2
                decided, fold = _decided(probes, Z, folds_in[b], two), folds_in[b]
                null[:, w, a, b] = _scores(z[orders[b]], decided, fold, two)
                found = statistics.bootstrap(
                    lambda y, *given, two=two: float(_scores(y[None], *given, two=two)[0]),
                    z, decided, fold, groups=blocks, resamples=int(resamples), seed=int(seed))
                score[w, a, b], (low[w, a, b], high[w, a, b]) = found.value, found.interval
    highest = np.nanmax(null, axis=(1, 2, 3))
    dims = ("estimator", "train", "test")
    data_set = xr.Dataset(
        {"score": (dims, score), "low": (dims, low), "high": (dims, high),
         "p": (dims, (1 + (highest[:, None, None, None] >= score - 1e-12).sum(0)) / (1 + len(null))),
         "p_alone": (dims, (1 + (null >= score - 1e-12).sum(0)) / (1 + len(null))),
         "null": (("permutation", *dims), null),
         "chance": 0.5 if len(classes) == 2 else 1 / len(classes)},
        {"estimator": list(ways), "train": names, "test": names})
    return Result(data_set, {
        "measure": "transfer", "metric": "auc" if len(classes) == 2 else "balanced_accuracy",
        "folds": int(folds), "permutations": int(permutations), "seed": int(seed),
        "n_samples": {name: len(y) for name, (_, y, _) in zip(names, sets)},
        "classes": [str(c) for c in classes]})


def directions(
    states: Float[np.ndarray, "sample d_model"], labels: Any,
    estimators: Optional[Mapping[str, Any]] = None,
) -> Result:
    """The directions of several probes of one binary concept, and how far they agree.

    Example:
        >>> rng = np.random.default_rng(0)
        >>> y = np.arange(400) % 2
        >>> X = rng.standard_normal((400, 3)) + 2 * y[:, None] * np.array([1.0, 0, 0])
        >>> bool(directions(X, y)["cosine"].min() > 0.95)
        True

    Returns:
        `direction` [estimator, d_model], unit length, in the space of the states (a scaler's division
        is undone); [estimator, other]: `cosine` of two directions, and `agreement`, the correlation of
        what the two say about the states. A few huge coordinates decide a cosine, not an agreement.

    Raises:
        ValueError: not exactly two classes, or values that are not numbers.
    """
    X, classes = _finite(states), np.unique(np.asarray(labels))
    if len(classes) != 2:
        raise ValueError(f"directions of a binary concept need two classes, not {len(classes)}.")
    ways = dict(three_ways() if estimators is None else estimators)
    found = np.stack([direction(fitted_copy(way, X, np.asarray(labels)))[0] for way in ways.values()])
    said = (X - X.mean(0)) @ found.T
    names = list(ways)
    return Result(xr.Dataset(
        {"direction": (("estimator", "d_model"), found),
         "cosine": (("estimator", "other"), found @ found.T),
         "agreement": (("estimator", "other"), np.corrcoef(said.T))},
        {"estimator": names, "other": names}), {"measure": "directions", "n_samples": len(X)})


def draw(found: Result, ax: Axes, estimator: Optional[str] = None) -> Axes:
    """The matrix of one estimator (the first for None): rows are trained on, columns tested."""
    name = str(found["estimator"].values[0]) if estimator is None else estimator
    label = {"auc": "ROC-AUC"}.get(found.manifest["metric"], "balanced accuracy")
    return heat.draw(ax, found["score"].sel(estimator=name), label=label)


# -- the parts ------------------------------------------------------------------------------------

_Set = tuple[np.ndarray, np.ndarray, Optional[np.ndarray]]


def _finite(states: Any) -> np.ndarray:
    X = np.asarray(states, dtype=float)
    if X.ndim != 2 or not np.isfinite(X).all():
        raise ValueError(f"states must be [sample, d_model] and finite numbers, not {X.shape}"
                         + (" with NaN or infinity." if X.ndim == 2 else "."))
    return X


def _checked(data: Mapping[str, Labelled]) -> tuple[list[_Set], np.ndarray]:
    if not data:
        raise ValueError("no data sets: give at least one.")
    sets: list[_Set] = []
    classes = np.unique(np.concatenate([np.asarray(one.labels) for one in data.values()]))
    widths = set()
    for name, one in data.items():
        X, given = _finite(one.states), np.asarray(one.labels)
        if given.shape != (len(X),):
            raise ValueError(f"{given.shape} labels for {len(X)} samples of {name!r}.")
        if len(np.unique(given)) < len(classes) or len(classes) < 2:
            raise ValueError(
                f"{name!r} has {len(np.unique(given))} of {max(2, len(classes))} classes: every data "
                "set needs all of them, at least two."
            )
        groups = None if one.groups is None else np.asarray(one.groups)
        if groups is not None and groups.shape != (len(X),):
            raise ValueError(f"{groups.shape} groups for {len(X)} samples of {name!r}.")
        widths.add(X.shape[1])
        sets.append((X, np.searchsorted(classes, given), groups))
    if len(widths) > 1:
        raise ValueError(f"states of different width, {sorted(widths)}, cannot share a probe.")
    return sets, classes


def _folds(sets: list[_Set], folds: int, seed: int) -> list[np.ndarray]:
    """The fold of every sample of every data set; a group is in one fold, wherever it occurs."""
    whose = [np.array([f"sample {a} {i}" for i in range(len(y))]) if groups is None
             else np.array([f"group {g}" for g in groups]) for a, (_, y, groups) in enumerate(sets)]
    y = np.concatenate([y for _, y, _ in sets])
    # Stratified by data set and class, so that every fold has something of all of them.
    strata = np.concatenate([y_ + 1000 * a for a, (_, y_, _) in enumerate(sets)])
    strata = np.unique(strata, return_inverse=True)[1]
    fold = np.zeros(len(y), dtype=int)
    for number, (_, test) in enumerate(folds_of(strata, "auc", np.concatenate(whose), folds, seed)):
        fold[test] = number
    return np.split(fold, np.cumsum([len(y_) for _, y_, _ in sets])[:-1])


def _decided(probes: list[Any], Z: np.ndarray, fold: np.ndarray, two: bool) -> np.ndarray:
    """What each sample's own fold's probe says: a score for two classes, else the class."""
    found = np.zeros(len(Z))
    for number, probe in enumerate(probes):
        own = fold == number
        if not own.any():
            continue
        if not two:
            found[own] = probe.predict(Z[own])
        elif hasattr(probe, "decision_function"):
            found[own] = probe.decision_function(Z[own])
        else:
            found[own] = probe.predict_proba(Z[own])[:, 1]
    return found


def _scores(
    y: np.ndarray, decided: np.ndarray, fold: np.ndarray, two: bool
) -> Float[np.ndarray, "permutation"]:
    """Mean over folds, since scores of different probes have no common scale; `y` [permutation,
    sample]."""
    each = []
    for number in np.unique(fold):
        own = fold == number
        given, said = y[:, own], decided[own]
        if two:
            each.append(auc(np.broadcast_to(said, given.shape), given == 1))
        elif given.size:
            hits = [_mean_over((given == c) * (said == c), given == c) for c in np.unique(given)]
            each.append(np.nanmean(hits, axis=0) if hits else np.full(len(given), np.nan))
    with warnings.catch_warnings():
        # A resample may leave a class out of every fold: NaN then.
        warnings.simplefilter("ignore", RuntimeWarning)
        return np.nanmean(each, axis=0)


def _mean_over(values: np.ndarray, kept: np.ndarray) -> np.ndarray:
    """Mean of every row over what is kept, NaN where nothing is."""
    count = kept.sum(1)
    return np.where(count > 0, values.sum(1) / np.maximum(count, 1), np.nan)
