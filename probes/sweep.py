"""Where is it encoded? A probe in every layer, with the selection of the best one paid for.

The highest of many noisy scores is high: over 32 layers of pure noise the best AUC is about 0.62.
So every sweep comes with a permutation null of the *maximum* over all cells, which corrects for the
choice under any dependence between layers, and with the score of a nested choice, where layers are
chosen on training folds and scored on the fold left out. Splits keep groups together.

The quick probe is ridge regression: what it predicts for held-out samples is a matrix times the
labels, the matrix does not depend on the labels, and so all permutations are one product.
"""

from collections.abc import Sequence
from typing import Any, Literal, Optional, SupportsFloat, SupportsIndex, Union

import numpy as np
import xarray as xr
from jaxtyping import Bool, Float
from matplotlib.axes import Axes
from scipy.stats import rankdata
from sklearn.base import BaseEstimator, clone
from sklearn.metrics import balanced_accuracy_score, roc_auc_score
from sklearn.model_selection import GroupKFold, KFold, StratifiedGroupKFold, StratifiedKFold

from interp.core import Claim, Result
from interp.figures.style import color, note, style

Kind = Literal["auc", "balanced_accuracy", "r2"]
CHANCE = {"auc": 0.5, "r2": 0.0}


def sweep(
    states: Any,
    labels: Any,
    *,
    groups: Optional[Any],
    task: Literal["auto", "classification", "regression"] = "auto",
    estimator: Union[Literal["ridge"], BaseEstimator] = "ridge",
    alpha: Optional[SupportsFloat] = None,
    folds: SupportsIndex = 5,
    permutations: SupportsIndex = 200,
    seed: SupportsIndex = 0,
) -> Result:
    """Cross-validated score of a probe in every cell, with its null and a nested choice.

    Example:
        >>> rng = np.random.default_rng(0)
        >>> y = np.arange(80) % 2
        >>> states = rng.standard_normal((4, 80, 6))
        >>> states[2, :, 1] += 2 * y
        >>> found = sweep(states, y, groups=None)
        >>> int(found["score"].argmax()), bool(found["p"][2] < 0.05), bool(found["p"][0] > 0.05)
        (2, True, True)

    Args:
        states: `[layer, sample, d_model]`, or labelled with dims `sample` and, last, the features;
            all other dims (layer, position, head) are the cells of the sweep.
        labels: one per sample. Two classes are scored by ROC-AUC, more by balanced accuracy,
            numbers by R^2.
        task: "auto" takes labels as numbers if some of them is no whole number, else as classes;
            to predict whole numbers (a position, say) as numbers, say "regression".
        groups: what may not be split between training and test: the template, entity, document or
            question that samples share. None says that samples are independent, and has to be said.
        estimator: "ridge", or any scikit-learn estimator, which is cloned and refitted everywhere
            (each permutation then costs a fit per fold and cell).
        alpha: penalty of the ridge on standardized features; the number of features for None.
        folds, permutations, seed: cross-validation and null.

    Returns:
        `score` [cell], the mean over folds, and `fold_score` [cell, fold]; `null` [permutation,
        cell]; `p` [cell] from the maximum of the null over cells (family-wise), `p_alone` [cell];
        `nested_score` [fold] with `nested_cell` [fold]; `chance`, `majority`. NaN where a fold
        cannot be scored, with the reason in the manifest under `notes`.

    Raises:
        ValueError: one class only, too few groups, values that are not numbers, wrong lengths.

    Source: the maximum statistic of Westfall and Young (1993); nested choice as in Varma and Simon
    (2006).
    """
    array = _labelled(states)
    cells = [str(dim) for dim in array.dims[:-2]]
    X = array.stack(cell=cells).transpose("cell", ...).values if len(cells) > 1 else array.values
    X = np.asarray(X, dtype=np.float64)
    y, kind, classes = targets(labels, X.shape[1], task)
    _check(X, y, classes)
    blocks = None if groups is None else _blocks(groups, len(y))
    rng = np.random.default_rng(int(seed))
    splits = folds_of(y, kind, blocks, int(folds), int(seed))
    orders = np.stack([np.arange(len(y)), *(
        shuffled(y, blocks, rng) for _ in range(int(permutations)))])
    penalty = float(X.shape[2] if alpha is None else alpha)
    each = np.stack([_cell(x, y, kind, classes, splits, orders, estimator, penalty) for x in X])
    notes = []
    with np.errstate(invalid="ignore"):
        means = _mean(each, 2)  # [cell, permutation]
    if np.isnan(each[:, 0]).any():
        notes.append("some folds hold one class only and are left out of the mean")
    score, null = means[:, 0], means[:, 1:]
    highest = null.max(0)
    p = (1 + (highest[None] >= score[:, None] - 1e-12).sum(1)) / (1 + null.shape[1])
    alone = (1 + (null >= score[:, None] - 1e-12).sum(1)) / (1 + null.shape[1])
    nested, chosen = _nested(X, y, kind, classes, blocks, splits, estimator, penalty, int(folds),
                             int(seed))
    chance = CHANCE.get(kind, 1.0 / max(1, len(classes)))
    shape = tuple(array.sizes[dim] for dim in cells)
    coords = {dim: array.coords[dim].values if dim in array.coords else np.arange(array.sizes[dim])
              for dim in cells}
    labels_of = [", ".join(f"{dim} {coords[dim][i]}" for dim, i in zip(cells, np.unravel_index(
        c, shape))) for c in range(len(X))]
    data = xr.Dataset(
        {"score": (cells, score.reshape(shape)),
         "fold_score": ([*cells, "fold"], each[:, 0].reshape(*shape, -1)),
         "null": (["permutation", *cells], null.T.reshape(-1, *shape)),
         "p": (cells, p.reshape(shape)), "p_alone": (cells, alone.reshape(shape)),
         "nested_score": ("fold", nested),
         "nested_cell": ("fold", [labels_of[c] for c in chosen]),
         "chance": chance, "majority": _majority(y, kind)},
        coords,
    )
    return Result(data, {
        "measure": "probe sweep", "metric": kind, "estimator": str(estimator), "alpha": penalty,
        "folds": int(folds), "permutations": int(permutations), "seed": int(seed),
        "n_samples": len(y), "n_groups": len(y) if blocks is None else int(blocks.max()) + 1,
        "grouped": blocks is not None, "classes": [str(c) for c in classes], "notes": notes,
    })


def best(found: Result) -> dict[str, Any]:
    """The best cell, its score, its corrected p, and what a nested choice scores.

    Example:
        >>> rng = np.random.default_rng(0)
        >>> found = sweep(rng.standard_normal((3, 40, 4)), np.arange(40) % 2, groups=None)
        >>> sorted(best(found))
        ['cell', 'nested_score', 'p', 'score']
    """
    score = found["score"]
    at = np.unravel_index(int(np.nanargmax(score.values)), score.shape)
    cell = {str(dim): score.coords[dim].values[i].item() for dim, i in zip(score.dims, at)}
    return {"cell": cell, "score": float(score.values[at]), "p": float(found["p"].values[at]),
            "nested_score": float(np.nanmean(found["nested_score"].values))}


def best_claim(
    found: Result, sentence: str, source: str, *, level: SupportsFloat = 0.05, **more: Any
) -> Claim:
    """The claim that the best cell is above chance, at a level that pays for its choice.

    The interval reaches as far below the best score as the permuted maximum does above chance at
    that level, so it excludes chance exactly where the family-wise test rejects.
    """
    top, chance = best(found), float(found["chance"])
    dims = [dim for dim in found["null"].dims if dim != "permutation"]
    highest = np.sort(found["null"].max(dims).values)
    # The smallest value that at most a share `level` of permutations, the data included, reaches.
    allowed = int(np.floor(float(level) * (len(highest) + 1))) - 1
    if allowed < 0:
        raise ValueError(
            f"{len(highest)} permutations cannot reach level {float(level)}: use at least "
            f"{int(np.ceil(1 / float(level))) - 1}."
        )
    reach = float(highest[len(highest) - 1 - allowed]) - chance
    return Claim(
        sentence, source, measured=top["score"], null=chance,
        interval=(top["score"] - reach, top["score"] + reach), direction="above",
        n=found.manifest["n_groups"], unit=found.manifest["metric"],
        statistic=f"best of {int(np.prod([found.data.sizes[d] for d in dims]))} cells, against the "
                  f"maximum over cells of {len(highest)} label permutations",
        control="labels permuted "
                + ("over or within groups" if found.manifest["grouped"] else "over samples"),
        details={**top, "nested_cells": [str(c) for c in found["nested_cell"].values]}, **more)


@style()
def draw(found: Result, ax: Axes) -> Axes:
    """Score by layer with its folds, the band of permuted labels, and chance; best cell marked."""
    score = found["score"]
    if len(score.dims) != 1:
        raise ValueError(f"cells have the dims {score.dims}: choose along all but one, then draw.")
    dim = score.dims[0]
    at = found[dim].values
    low, high = np.nanquantile(found["null"].values, (0.05, 0.95), axis=0)
    ax.fill_between(at, low, high, color=color("control"), alpha=0.3, linewidth=0,
                    label="permuted labels, 5 to 95 %")
    spread = found["fold_score"].std("fold")
    ax.fill_between(at, score - spread, score + spread, color=color("image"), alpha=0.2, linewidth=0)
    ax.plot(at, score, "-o", markersize=3, color=color("image"), label="probe")
    ax.axhline(float(found["chance"]), color=color("control"), linewidth=0.8, linestyle=":")
    top = best(found)
    ax.plot([top["cell"][dim]], [top["score"]], "o", markersize=8, fillstyle="none",
            color=color("image"))
    ax.set_xlabel(str(dim))
    ax.set_ylabel({"auc": "ROC-AUC", "r2": "$R^2$"}.get(found.manifest["metric"], "balanced accuracy"))
    ax.legend()
    note(ax, f"best: p = {top['p']:.3g}, nested {top['nested_score']:.2f}")
    return ax


# -- the parts ------------------------------------------------------------------------------------


def _labelled(states: Any) -> xr.DataArray:
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


def targets(labels: Any, n: int, task: str) -> tuple[np.ndarray, Kind, np.ndarray]:
    """Labels as class numbers or as numbers, how they are scored, and the classes.

    Example:
        >>> targets(["b", "a"], 2, "auto")
        (array([1, 0]), 'auc', array(['a', 'b'], dtype='<U1'))
    """
    given = np.asarray(labels)
    if given.shape != (n,):
        raise ValueError(f"{given.shape} labels for {n} samples: give one per sample.")
    numbers = given.dtype.kind == "f" and not np.array_equal(given, np.round(given))
    if task == "regression" or task == "auto" and numbers:
        return given.astype(float), "r2", np.zeros(0)
    classes, y = np.unique(given, return_inverse=True)
    return y, "auc" if len(classes) == 2 else "balanced_accuracy", classes


def _check(X: np.ndarray, y: np.ndarray, classes: np.ndarray) -> None:
    if not np.isfinite(X).all() or not np.isfinite(y).all():
        cell, sample, _ = (np.argwhere(~np.isfinite(X))[0] if not np.isfinite(X).all() else (0, 0, 0))
        raise ValueError(
            f"states or labels hold values that are not numbers (cell {cell}, sample {sample}); leave "
            "those samples out."
        )
    if len(classes) == 1 or (y.dtype.kind == "f" and np.ptp(y) == 0):
        raise ValueError("all samples have the same label: a probe needs at least two classes.")


def _blocks(groups: Any, n: int) -> np.ndarray:
    given = np.asarray(groups)
    if given.shape != (n,):
        raise ValueError(f"{given.shape} groups for {n} samples: give one per sample.")
    return np.unique(given, return_inverse=True)[1]


def folds_of(
    y: np.ndarray, kind: str, groups: Optional[Any], folds: SupportsIndex = 5,
    seed: SupportsIndex = 0,
) -> list[tuple[np.ndarray, np.ndarray]]:
    """Training and test samples of every fold: stratified for classes, whole groups where given.

    Example:
        >>> [len(test) for _, test in folds_of(np.arange(9) % 2, "auc", None, 3)]
        [3, 3, 3]
    """
    folds, seed = int(folds), int(seed)
    blocks = None if groups is None else _blocks(groups, len(y))
    units = len(y) if blocks is None else int(blocks.max()) + 1
    if units < folds:
        raise ValueError(
            f"{units} {'samples' if blocks is None else 'groups'} cannot be split into {folds} folds: "
            "use fewer folds, or more groups."
        )
    more = dict(shuffle=True, random_state=seed)
    if kind == "r2":
        made: Any = KFold(folds, **more) if blocks is None else GroupKFold(folds, **more)
    else:
        made = StratifiedKFold(folds, **more) if blocks is None else StratifiedGroupKFold(folds, **more)
        fewest = int(np.bincount(y).min())
        if blocks is None and fewest < folds:
            raise ValueError(
                f"the rarest class has {fewest} sample(s), fewer than the {folds} folds: use fewer "
                "folds, or leave the class out."
            )
    return list(made.split(np.zeros(len(y)), y, blocks))


def shuffled(y: np.ndarray, groups: Optional[Any], rng: np.random.Generator) -> np.ndarray:
    """An order of the samples under which labels are exchangeable if nothing is encoded.

    Example:
        >>> order = shuffled(np.array([0, 0, 1, 1]), [5, 5, 8, 8], np.random.default_rng(0))
        >>> bool(order[0] == order[1]), bool(order[2] == order[3])
        (True, True)

    Labels that are constant in their groups move with whole groups; others move within theirs.
    """
    if groups is None:
        return rng.permutation(len(y))
    blocks = _blocks(groups, len(y))
    members = [np.flatnonzero(blocks == b) for b in range(int(blocks.max()) + 1)]
    order = np.arange(len(y))
    if all(len(np.unique(y[m])) == 1 for m in members):
        # Each group takes the label of another one: any sample of that one stands for it.
        for to, source in zip(members, rng.permutation(len(members))):
            order[to] = members[source][0]
        return order
    for m in members:
        order[m] = rng.permutation(m)
    return order


def _hat(x: np.ndarray, train: np.ndarray, test: np.ndarray, alpha: float) -> np.ndarray:
    """`[test, train]`: what ridge on standardized features predicts, per unit of training target."""
    mean, scale = x[train].mean(0), x[train].std(0)
    scale[scale < 10 * np.finfo(float).eps] = 1.0
    a, b = (x[train] - mean) / scale, (x[test] - mean) / scale
    if a.shape[0] < a.shape[1]:
        return b @ a.T @ np.linalg.inv(a @ a.T + alpha * np.eye(len(a)))
    return b @ np.linalg.solve(a.T @ a + alpha * np.eye(a.shape[1]), a.T)


def _cell(
    x: np.ndarray, y: np.ndarray, kind: Kind, classes: np.ndarray,
    splits: Sequence[tuple[np.ndarray, np.ndarray]], orders: np.ndarray, estimator: Any, alpha: float,
) -> Float[np.ndarray, "permutation fold"]:
    """Score of every fold, for the labels in every order (the first is the data's)."""
    scores = np.full((len(orders), len(splits)), np.nan)
    for fold, (train, test) in enumerate(splits):
        if isinstance(estimator, str):
            hat = _hat(x, train, test, alpha)
            scores[:, fold] = _ridge_scores(hat, y[orders], train, test, kind, len(classes))
            continue
        for number, order in enumerate(orders):
            scores[number, fold] = _fitted_score(estimator, x, y[order], train, test, kind)
    return scores


def _ridge_scores(
    hat: np.ndarray, y: np.ndarray, train: np.ndarray, test: np.ndarray, kind: Kind, n_classes: int
) -> Float[np.ndarray, "permutation"]:
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
    return _mean(hits, 0)


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


def _fitted_score(
    estimator: Any, x: np.ndarray, y: np.ndarray, train: np.ndarray, test: np.ndarray, kind: Kind
) -> float:
    if kind != "r2" and (len(np.unique(y[train])) < 2 or len(np.unique(y[test])) < 2):
        return float("nan")
    probe = clone(estimator).fit(x[train], y[train])
    if kind == "r2":
        return float(probe.score(x[test], y[test]))
    if kind == "auc":
        decided = probe.decision_function(x[test]) if hasattr(probe, "decision_function") else \
            probe.predict_proba(x[test])[:, 1]
        return float(roc_auc_score(y[test], decided))
    return float(balanced_accuracy_score(y[test], probe.predict(x[test])))


def _nested(
    X: np.ndarray, y: np.ndarray, kind: Kind, classes: np.ndarray, blocks: Optional[np.ndarray],
    splits: Sequence[tuple[np.ndarray, np.ndarray]], estimator: Any, alpha: float, folds: int, seed: int,
) -> tuple[np.ndarray, list[int]]:
    """Per outer fold: the cell that is best within the training part, scored on the part left out."""
    scores, chosen = [], []
    for train, test in splits:
        own = None if blocks is None else blocks[train]
        inner_folds = min(folds, len(train) if own is None else len(np.unique(own)))
        if kind != "r2" and own is None:
            inner_folds = min(inner_folds, int(np.bincount(y[train])[np.unique(y[train])].min()))
        if inner_folds < 2:
            scores.append(np.nan)
            chosen.append(0)
            continue
        inner = folds_of(y[train], kind, own, inner_folds, seed)
        order = np.arange(len(train))[None]
        within = [float(_mean(_cell(x[train], y[train], kind, classes, inner, order, estimator,
                                    alpha), 1)[0]) for x in X]
        pick = 0 if np.isnan(within).all() else int(np.nanargmax(within))
        chosen.append(pick)
        scores.append(_cell(X[pick], y, kind, classes, [(train, test)], np.arange(len(y))[None],
                            estimator, alpha)[0, 0])
    return np.array(scores), chosen


def _mean(values: np.ndarray, axis: int) -> np.ndarray:
    """Mean over what is a number, NaN where nothing is."""
    known = np.isfinite(values)
    total = np.where(known, values, 0.0).sum(axis)
    return np.where(known.any(axis), total / np.maximum(known.sum(axis), 1), np.nan)


def _majority(y: np.ndarray, kind: Kind) -> float:
    return float("nan") if kind == "r2" else float(np.bincount(y).max() / len(y))
