"""The quick probe: ridge regression on standardized features, all permutations of labels at once.

What it predicts for held-out samples is a matrix times the labels, and the matrix does not depend on
the labels.
"""

from collections.abc import Sequence
from typing import Any, Optional, SupportsFloat

import numpy as np
import xarray as xr
from jaxtyping import Bool, Float
from scipy.stats import rankdata

from probes.folds import Kind, targets


def held_out(
    states: Any, labels: Any, splits: Sequence[tuple[np.ndarray, np.ndarray]], cells: Sequence[int],
    *, alpha: Optional[SupportsFloat] = None,
) -> Float[np.ndarray, "sample"]:
    """Whether the quick probe of each fold's own cell names the class of every held-out sample.

    Example:
        >>> from probes.folds import folds_of
        >>> y = np.arange(30) % 3
        >>> X = np.eye(3)[y] + 0.01 * np.random.default_rng(0).standard_normal((2, 30, 3))
        >>> splits = folds_of(y, "balanced_accuracy", None, 2)
        >>> float(held_out(X, y, splits, [0, 1]).mean())
        1.0

    Args:
        splits: from `folds_of`, one pair per fold. cells: the number of a cell for every fold, such as
            the `nested_index` of a sweep with these splits. alpha: as in `sweep`.

    Returns:
        1 where right, 0 where wrong, so that probes of equal splits are compared sample by sample.
    """
    X = stacked(states)[0]
    y, _, classes = targets(labels, X.shape[1], "classification")
    penalty = float(X.shape[2] if alpha is None else alpha)
    found = np.full(len(y), np.nan)
    for (train, test), cell in zip(splits, cells):
        sign = 2.0 * (y[train][None] == np.arange(len(classes))[:, None]) - 1
        mean = sign.mean(1, keepdims=True)
        said = (sign - mean) @ hat(X[cell], train, test, penalty).T + mean
        found[test] = said.argmax(0) == y[test]
    return found


def hat(x: np.ndarray, train: np.ndarray, test: np.ndarray, alpha: float) -> np.ndarray:
    """`[test, train]`: what ridge on standardized features predicts, per unit of training target.

    Example:
        >>> X = np.random.default_rng(0).standard_normal((6, 2))
        >>> hat(X, np.arange(4), np.arange(4, 6), 1.0).shape
        (2, 4)
    """
    mean, scale = x[train].mean(0), x[train].std(0)
    scale[scale < 10 * np.finfo(float).eps] = 1.0
    a, b = (x[train] - mean) / scale, (x[test] - mean) / scale
    if a.shape[0] < a.shape[1]:
        return b @ a.T @ np.linalg.inv(a @ a.T + alpha * np.eye(len(a)))
    return b @ np.linalg.solve(a.T @ a + alpha * np.eye(a.shape[1]), a.T)


def ridge_scores(
    hat: np.ndarray, y: np.ndarray, train: np.ndarray, test: np.ndarray, kind: Kind, n_classes: int
) -> Float[np.ndarray, "permutation"]:
    """Score of held-out samples for every order of the labels, `y` [permutation, sample].

    Example:
        >>> X, y = np.arange(8.0)[:, None], np.array([[0, 0, 0, 0, 1, 1, 1, 1]])
        >>> train, test = np.array([0, 1, 2, 5, 6, 7]), np.array([3, 4])
        >>> ridge_scores(hat(X, train, test, 1.0), y, train, test, "auc", 2)
        array([1.])
    """
    given, asked = y[:, train], y[:, test]
    if kind == "r2":
        mean = given.mean(1, keepdims=True)
        predicted = (given - mean) @ hat.T + mean
        left = ((asked - predicted) ** 2).sum(1)
        spread = ((asked - asked.mean(1, keepdims=True)) ** 2).sum(1)
        return 1 - left / np.where(spread > 0, spread, np.nan)
    if kind == "auc":
        sign = 2.0 * given - 1
        decided = (sign - sign.mean(1, keepdims=True)) @ hat.T
        return auc(decided, asked == 1)
    decided = []
    for c in range(n_classes):
        sign = np.where(given == c, 1.0, -1.0)
        mean = sign.mean(1, keepdims=True)
        decided.append((sign - mean) @ hat.T + mean)
    chosen = np.argmax(decided, axis=0)
    hits = np.stack([np.where((asked == c).any(1), ((chosen == c) & (asked == c)).sum(1)
                              / np.maximum((asked == c).sum(1), 1), np.nan) for c in range(n_classes)])
    return known_mean(hits, 0)


def auc(
    decided: Float[np.ndarray, "permutation sample"], positive: Bool[np.ndarray, "permutation sample"]
) -> Float[np.ndarray, "permutation"]:
    """ROC-AUC of every row, ties counted half; NaN where a class is missing.

    Example:
        >>> auc(np.array([[0.1, 0.4, 0.3]]), np.array([[False, True, True]]))
        array([1.])
    """
    ranks = rankdata(decided, axis=1)
    n1 = positive.sum(1)
    n0 = positive.shape[1] - n1
    total = np.where(positive, ranks, 0.0).sum(1) - n1 * (n1 + 1) / 2
    return np.where((n1 > 0) & (n0 > 0), total / np.maximum(n1 * n0, 1), np.nan)


def stacked(states: Any) -> tuple[np.ndarray, xr.DataArray]:
    """States as `[cell, sample, feature]`, and labelled."""
    array = labelled(states)
    cells = array.dims[:-2]
    X = array.stack(cell=cells).transpose("cell", ...).values if len(cells) > 1 else array.values
    return np.asarray(X, dtype=np.float64), array


def labelled(states: Any) -> xr.DataArray:
    """States with their cells first, then `sample`, then the features; ValueError for other shapes.

    Example:
        >>> labelled(np.zeros((2, 5, 3))).dims
        ('layer', 'sample', 'd_model')
    """
    if isinstance(states, xr.DataArray):
        if "sample" not in states.dims or states.ndim < 3:
            raise ValueError(
                "states need a dim 'sample', one of features and at least one of cells, not "
                f"{states.dims}."
            )
        feature = [d for d in states.dims if d != "sample"][-1]
        cells = [d for d in states.dims if d not in ("sample", feature)]
        return states.transpose(*cells, "sample", feature)
    array = np.asarray(states)
    if array.ndim != 3:
        raise ValueError(f"states must be [layer, sample, d_model], not {array.shape}.")
    return xr.DataArray(array, dims=("layer", "sample", "d_model"))


def known_mean(values: np.ndarray, axis: int) -> np.ndarray:
    """Mean over what is a number, NaN where nothing is.

    Example:
        >>> known_mean(np.array([[1.0, np.nan], [np.nan, np.nan]]), 1)
        array([ 1., nan])
    """
    known = np.isfinite(values)
    total = np.where(known, values, 0.0).sum(axis)
    return np.where(known.any(axis), total / np.maximum(known.sum(axis), 1), np.nan)
