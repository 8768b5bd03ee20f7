"""Scores of samples by probes that saw nothing of what these samples share: question, entity, relation.

`probes.sweep` says how well a layer does; here every sample gets the score of a probe fitted without
it, so that scores can be compared question by question, ranked, calibrated and bootstrapped. Which
layer or position is used, or how all are combined, is decided on the training part alone.

Areas under the ROC curve compare samples of the same fold only (`auc` with `strata`): scores of
different probes have no common scale, and pooling them pulls a useless probe below one half.
"""

import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from itertools import product
from typing import Any, Literal, Optional, SupportsFloat, SupportsIndex, Union

import numpy as np
from scipy.stats import rankdata
from sklearn.base import BaseEstimator
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import StratifiedGroupKFold, StratifiedKFold
from sklearn.pipeline import make_pipeline

from probes.folds import blocks_of, targets
from probes.linear import fitted_copy, logistic
from probes.quick import hat, stacked

Split = tuple[np.ndarray, np.ndarray]


@dataclass(frozen=True, eq=False)
class HeldOut:
    """Every sample's score by a probe that was fitted without its groups.

    Attributes:
        scores: higher means the second class; NaN where no probe could be fitted (see `notes`).
        probability: of the second class, calibrated on the training part; NaN alike.
        fold: which probe scored the sample. labels: True for the second class.
        chosen: cell used in every fold ("all" where all are combined).
    """

    scores: np.ndarray
    probability: np.ndarray
    fold: np.ndarray
    labels: np.ndarray
    chosen: tuple[str, ...]
    notes: tuple[str, ...] = field(default=())

    @property
    def auc(self) -> float:
        """Area under the ROC curve, comparing samples of the same fold."""
        known = np.isfinite(self.scores)
        return auc(self.scores[known], self.labels[known], self.fold[known])


def auc(scores: Any, labels: Any, strata: Any = None) -> float:
    """Share of (positive, negative) pairs in order, ties counting half; NaN without a pair.

    Example:
        >>> auc([0.1, 0.4, 0.4, 0.9], [0, 0, 1, 1])
        0.875
        >>> auc([1, 2, 11, 12], [0, 1, 0, 1], strata=[0, 0, 1, 1])
        1.0

    With `strata`, only pairs within a stratum count (all pairs equally).
    """
    s, y = np.asarray(scores, dtype=float), np.asarray(labels).astype(bool)
    if s.shape != y.shape or s.ndim != 1:
        raise ValueError(f"{s.shape} scores and {y.shape} labels: give one of each per sample.")
    if not np.isfinite(s).all():
        raise ValueError("scores hold values that are not numbers; leave those samples out.")
    n = len(s)
    if strata is None:
        part = np.zeros(n, dtype=int)
    else:
        part = np.unique(np.asarray(strata), return_inverse=True)[1]
    # One ranking for all strata: scores of a later stratum stand above those of an earlier one.
    ranks = rankdata(part * (n + 1.0) + np.unique(s, return_inverse=True)[1])
    size = np.bincount(part)
    positive = np.bincount(part, y)
    before = np.cumsum(size) - size
    above = np.bincount(part[y], ranks[y], len(size)) - before * positive
    right = (above - positive * (positive + 1) / 2).sum()
    pairs = (positive * (size - positive)).sum()
    return float(right / pairs) if pairs else float("nan")


def splits(
    labels: Any, groups: Any, *, folds: SupportsIndex = 5, seed: SupportsIndex = 0
) -> Iterator[Split]:
    """(train, test) such that no training sample shares any group with a test sample.

    Example:
        >>> y = np.arange(12) % 2
        >>> entity, relation = np.arange(12) // 2, np.arange(12) % 3
        >>> parts = list(splits(y, (entity, relation), folds=3))
        >>> all(not set(entity[a]) & set(entity[b]) and not set(relation[a]) & set(relation[b])
        ...     for a, b in parts), sorted(np.concatenate([b for _, b in parts])) == list(range(12))
        (True, True)

    Args:
        groups: one array with a group per sample; a tuple of such arrays to hold out several kinds
            of group at once (entity and relation): a fold of each is tested together, and training
            keeps what is in neither; None says that samples are independent.

    Raises:
        ValueError: fewer than two groups of a kind, or wrong lengths.
    """
    y = np.asarray(labels)
    kinds: tuple[Any, ...] = groups if isinstance(groups, tuple) else (groups,)
    assigned = [_assign(y, kind, int(folds), int(seed)) for kind in kinds]
    for cell in product(*(range(int(a.max()) + 1) for a in assigned)):
        test = np.logical_and.reduce([a == f for a, f in zip(assigned, cell)])
        train = np.logical_and.reduce([a != f for a, f in zip(assigned, cell)])
        if test.any():
            yield np.flatnonzero(train), np.flatnonzero(test)


def _assign(y: np.ndarray, groups: Any, folds: int, seed: int) -> np.ndarray:
    """The fold of every sample."""
    number = np.unique(y, return_inverse=True)[1]
    blocks = None if groups is None else blocks_of(groups, len(y))
    units = len(y) if blocks is None else int(blocks.max()) + 1
    if units < 2:
        raise ValueError(
            "all samples are of one group, so none can be held out; give at least two groups.")
    k = min(folds, units)
    if blocks is None:
        k = max(2, min(k, int(np.bincount(number).min())))
    return np.array(_assigned(tuple(number.tolist()), None if blocks is None else tuple(
        blocks.tolist()), k, seed))


@lru_cache(maxsize=256)
def _assigned(
    labels: tuple[int, ...], blocks: Optional[tuple[int, ...]], k: int, seed: int
) -> tuple[int, ...]:
    """Kept, for many probes are compared on the same folds."""
    made: Any = StratifiedKFold if blocks is None else StratifiedGroupKFold
    at = np.zeros(len(labels), dtype=int)
    with warnings.catch_warnings():
        # A class rarer than the folds is no fault here: folds without it are left out later.
        warnings.simplefilter("ignore")
        try:
            parts = list(made(k, shuffle=True, random_state=seed).split(at, labels, blocks))
        except ValueError:
            # Fewer samples in every class than folds.
            parts = list(made(2, shuffle=True, random_state=seed).split(at, labels, blocks))
    for number, (_, test) in enumerate(parts):
        at[test] = number
    return tuple(np.unique(at, return_inverse=True)[1].tolist())


def held_out(
    states: Any,
    labels: Any,
    *,
    groups: Any,
    use: Literal["best", "all"] = "best",
    estimator: Union[Literal["ridge"], BaseEstimator] = "ridge",
    alpha: Optional[SupportsFloat] = None,
    folds: SupportsIndex = 5,
    inner: SupportsIndex = 3,
    seed: SupportsIndex = 0,
) -> HeldOut:
    """Scores by probes on the best cell, or on all cells, both decided within the training part.

    Example:
        >>> rng = np.random.default_rng(0)
        >>> y = np.arange(80) % 2
        >>> states = rng.standard_normal((4, 80, 6))
        >>> states[2, :, 1] += 2 * y
        >>> found = held_out(states, y, groups=np.arange(80) // 4)
        >>> found.auc > 0.85, set(found.chosen)
        (True, {'layer 2'})

    In every outer fold each cell's probe is scored by inner cross-validation (grouped alike);
    "best" takes the cell with the highest inner area, "all" stacks: a logistic regression on what
    the cells' probes say of samples that these did not see. Probabilities come from the same inner
    scores (Platt's scaling), so that nothing is calibrated on test samples.

    Args:
        states: `[layer, sample, d_model]`, or labelled as in `probes.sweep.sweep`.
        labels: two classes. groups: as in `splits`.
        estimator: "ridge" (closed form) or a scikit-learn classifier, cloned everywhere.
        alpha: penalty of the ridge on standardized features; the number of features for None.

    Raises:
        ValueError: not two classes, values that are not numbers, groups that cannot be held out.

    Source: Varma and Simon (2006) for the nested choice; Wolpert (1992) for stacking.
    """
    X, array = stacked(states)
    y = _two(X, labels)
    cells = [str(dim) for dim in array.dims[:-2]]
    names = [", ".join(f"{d} {_value(array, d, i)}" for d, i in zip(cells, np.unravel_index(
        c, tuple(array.sizes[d] for d in cells)))) for c in range(len(X))]
    penalty = float(X.shape[2] if alpha is None else alpha)
    scores, probability = np.full(len(y), np.nan), np.full(len(y), np.nan)
    fold, chosen, notes = np.full(len(y), -1), [], []
    for number, (train, test) in enumerate(splits(y, groups, folds=folds, seed=seed)):
        fold[test] = number
        if len(np.unique(y[train])) < 2:
            notes.append(f"fold {number}: what may be trained on is of one class")
            continue
        within = _inner(X[:, train], y[train], _part(groups, train), estimator, penalty,
                        int(inner), int(seed))
        areas = [auc(w[ok], y[train][ok], f[ok]) for w, f in within
                 for ok in [np.isfinite(w)]] if within else [float("nan")] * len(X)
        if use == "best":
            pick = 0 if np.isnan(areas).all() else int(np.nanargmax(areas))
            used = [pick]
        else:
            used = list(range(len(X)))
        chosen.append(names[used[0]] if use == "best" else "all")
        given = np.stack([_decide(X[c], y, train, test, estimator, penalty) for c in used], 1)
        if not within:
            notes.append(f"fold {number}: too few groups for an inner choice; the first cell is used")
            scores[test] = given[:, 0]
            continue
        seen = np.stack([within[c][0] for c in used], 1)
        ok = np.isfinite(seen).all(1)
        if len(np.unique(y[train][ok])) < 2:
            scores[test] = given[:, 0] if use == "best" else np.nan
            continue
        combined = logistic().fit(seen[ok], y[train][ok])
        probability[test] = combined.predict_proba(given)[:, 1]
        scores[test] = given[:, 0] if use == "best" else combined.decision_function(given)
    return HeldOut(scores, probability, fold, y == 1, tuple(chosen), tuple(notes))


def text_baseline(
    texts: Sequence[str], labels: Any, *, groups: Any, folds: SupportsIndex = 5,
    seed: SupportsIndex = 0,
) -> HeldOut:
    """What words alone tell: TF-IDF of question and answer, then logistic regression.

    Example:
        >>> texts = [f"question {i} {'sure' if i % 2 else 'well'}" for i in range(40)]
        >>> text_baseline(texts, np.arange(40) % 2, groups=None).auc
        1.0

    Whatever a probe on states shows must be more than this. The vocabulary is that of the training
    part. Raises `ValueError` as `held_out` does.
    """
    given = np.array(list(texts), dtype=object)
    y = _two(np.zeros((1, len(given), 1)), labels)
    scores, probability = np.full(len(y), np.nan), np.full(len(y), np.nan)
    fold, notes = np.full(len(y), -1), []
    for number, (train, test) in enumerate(splits(y, groups, folds=folds, seed=seed)):
        fold[test] = number
        if len(np.unique(y[train])) < 2:
            notes.append(f"fold {number}: what may be trained on is of one class")
            continue
        probe = make_pipeline(TfidfVectorizer(token_pattern=r"\S+", ngram_range=(1, 2)),
                              LogisticRegression(max_iter=2000))
        probe.fit(given[train], y[train])
        scores[test] = probe.decision_function(given[test])
        probability[test] = probe.predict_proba(given[test])[:, 1]
    return HeldOut(scores, probability, fold, y == 1, ("text",) * (int(fold.max()) + 1),
                   tuple(notes))


def across(
    states: Any, labels: Any, train: Any, test: Any, *, groups: Any,
    alpha: Optional[SupportsFloat] = None, inner: SupportsIndex = 3, seed: SupportsIndex = 0,
) -> HeldOut:
    """Fit on some samples (the layer chosen there by cross-validation), score others: transfer.

    Example:
        >>> rng = np.random.default_rng(0)
        >>> y = np.arange(80) % 2
        >>> states = rng.standard_normal((3, 80, 6)) + 2 * y[:, None] * np.eye(6)[1]
        >>> first = np.arange(80) < 40
        >>> across(states, y, first, ~first, groups=None).auc > 0.8
        True

    `train` and `test` are boolean over samples, `groups` keep the inner folds apart; `scores` are
    NaN for samples that are not tested.
    """
    X, _ = stacked(states)
    y = _two(X, labels)
    a, b = np.flatnonzero(train), np.flatnonzero(test)
    if np.intersect1d(a, b).size or len(np.unique(y[a])) != 2:
        raise ValueError("transfer needs two classes to train on, and test samples that are others.")
    penalty = float(X.shape[2] if alpha is None else alpha)
    within = _inner(X[:, a], y[a], _part(groups, a), "ridge", penalty, int(inner), int(seed))
    areas = [auc(w[ok], y[a][ok], f[ok]) for w, f in within for ok in [np.isfinite(w)]]
    pick = int(np.nanargmax(areas)) if areas and np.isfinite(areas).any() else 0
    scores = np.full(len(y), np.nan)
    scores[b] = _decide(X[pick], y, a, b, "ridge", penalty)
    fold = np.where(np.isfinite(scores), 0, -1)
    return HeldOut(scores, np.full(len(y), np.nan), fold, y == 1, (f"cell {pick}",))


def _two(X: np.ndarray, labels: Any) -> np.ndarray:
    """Labels as 0 and 1; the states are checked."""
    y, _, classes = targets(labels, X.shape[1], "classification")
    if len(classes) != 2:
        raise ValueError(f"scores of held-out samples need two classes, not {len(classes)}.")
    if not np.isfinite(X).all():
        cell, sample, _ = np.argwhere(~np.isfinite(X))[0]
        raise ValueError(f"states hold values that are not numbers (cell {cell}, sample {sample}); "
                         "leave those samples out.")
    return y


def _value(array: Any, dim: str, i: Any) -> Any:
    return array.coords[dim].values[i] if dim in array.coords else int(i)


def _part(groups: Any, rows: np.ndarray) -> Any:
    if isinstance(groups, tuple):
        return tuple(None if g is None else np.asarray(g)[rows] for g in groups)
    return None if groups is None else np.asarray(groups)[rows]


def _inner(
    X: np.ndarray, y: np.ndarray, groups: Any, estimator: Any, alpha: float, folds: int, seed: int
) -> list[tuple[np.ndarray, np.ndarray]]:
    """For every cell: score of every sample by a probe without its groups, and its fold.

    Empty where nothing can be held out.
    """
    try:
        parts = list(splits(y, groups, folds=folds, seed=seed))
    except ValueError:
        return []
    fold = np.full(len(y), -1)
    for number, (_, test) in enumerate(parts):
        fold[test] = number
    made = []
    for x in X:
        scores = np.full(len(y), np.nan)
        for train, test in parts:
            if len(np.unique(y[train])) == 2:
                scores[test] = _decide(x, y, train, test, estimator, alpha)
        made.append((scores, fold))
    return made


def _decide(
    x: np.ndarray, y: np.ndarray, train: np.ndarray, test: np.ndarray, estimator: Any, alpha: float
) -> np.ndarray:
    """What a probe fitted on `train` says of `test`."""
    if isinstance(estimator, str):
        sign = 2.0 * y[train] - 1
        return hat(x, train, test, alpha) @ (sign - sign.mean()) + sign.mean()
    probe = fitted_copy(estimator, x[train], y[train])
    if hasattr(probe, "decision_function"):
        return np.asarray(probe.decision_function(x[test]), dtype=float)
    return np.asarray(probe.predict_proba(x[test])[:, 1], dtype=float)
