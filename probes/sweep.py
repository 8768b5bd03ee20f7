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
from jaxtyping import Float
from matplotlib.axes import Axes
from sklearn.base import BaseEstimator
from sklearn.metrics import balanced_accuracy_score, roc_auc_score

from interp.core import Claim, Result
from interp.figures.style import color, note, style
from probes.folds import Kind, blocks_of, folds_of, shuffled, targets
from probes.linear import fitted_copy
from probes.quick import hat, known_mean, ridge_scores, stacked

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
    nested: bool = True,
    inner_folds: Optional[SupportsIndex] = None,
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
        nested: whether to choose cells within training folds as well; else there is no nested score.
        inner_folds: into how many parts training folds are cut to choose; as many as `folds` for None.

    Returns:
        `score` [cell], the mean over folds, and `fold_score` [cell, fold]; `null` [permutation,
        cell]; `p` [cell] from the maximum of the null over cells (family-wise), `p_alone` [cell];
        `nested_score` [fold] with `nested_cell` and its number `nested_index` [fold]; `chance`,
        `majority`. NaN where a fold cannot be scored, with the reason in the manifest (`notes`).

    Raises:
        ValueError: one class only, too few groups, values that are not numbers, wrong lengths.

    Source: the maximum statistic of Westfall and Young (1993); nested choice as in Varma and Simon
    (2006).
    """
    X, array = stacked(states)
    cells = [str(dim) for dim in array.dims[:-2]]
    y, kind, classes = targets(labels, X.shape[1], task)
    _check(X, y, classes)
    blocks = None if groups is None else blocks_of(groups, len(y))
    rng = np.random.default_rng(int(seed))
    splits = folds_of(y, kind, blocks, int(folds), int(seed))
    orders = np.stack([np.arange(len(y)), *(
        shuffled(y, blocks, rng) for _ in range(int(permutations)))])
    penalty = float(X.shape[2] if alpha is None else alpha)
    each = np.stack([_cell(x, y, kind, classes, splits, orders, estimator, penalty) for x in X])
    notes = []
    with np.errstate(invalid="ignore"):
        means = known_mean(each, 2)  # [cell, permutation]
    if np.isnan(each[:, 0]).any():
        notes.append("some folds hold one class only and are left out of the mean")
    score, null = means[:, 0], means[:, 1:]
    highest = null.max(0)
    p = (1 + (highest[None] >= score[:, None] - 1e-12).sum(1)) / (1 + null.shape[1])
    alone = (1 + (null >= score[:, None] - 1e-12).sum(1)) / (1 + null.shape[1])
    within, chosen = np.full(len(splits), np.nan), []
    if nested:
        inner = int(folds if inner_folds is None else inner_folds)
        within, chosen = _nested(X, y, kind, classes, blocks, splits, estimator, penalty, inner,
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
         "nested_score": ("fold", within),
         "nested_cell": ("fold", [labels_of[c] for c in chosen] or [""] * len(splits)),
         "nested_index": ("fold", chosen or [-1] * len(splits)),
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
            "nested_score": float(known_mean(found["nested_score"].values, 0))}


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
    # Scores of permuted labels can all lie below chance, as R^2 does.
    reach = max(0.0, float(highest[len(highest) - 1 - allowed]) - chance)
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
    dim = str(score.dims[0])
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
    ax.set_xlabel(dim)
    ax.set_ylabel({"auc": "ROC-AUC", "r2": "$R^2$"}.get(found.manifest["metric"], "balanced accuracy"))
    ax.legend()
    nested = f", nested {top['nested_score']:.2f}" if np.isfinite(top["nested_score"]) else ""
    note(ax, f"best: p = {top['p']:.3g}{nested}")
    return ax


# -- the parts ------------------------------------------------------------------------------------



def _check(X: np.ndarray, y: np.ndarray, classes: np.ndarray) -> None:
    if not np.isfinite(X).all() or not np.isfinite(y).all():
        cell, sample, _ = (np.argwhere(~np.isfinite(X))[0] if not np.isfinite(X).all() else (0, 0, 0))
        raise ValueError(
            f"states or labels hold values that are not numbers (cell {cell}, sample {sample}); leave "
            "those samples out."
        )
    if len(classes) == 1 or (y.dtype.kind == "f" and np.ptp(y) == 0):
        raise ValueError("all samples have the same label: a probe needs at least two classes.")






def _cell(
    x: np.ndarray, y: np.ndarray, kind: Kind, classes: np.ndarray,
    splits: Sequence[tuple[np.ndarray, np.ndarray]], orders: np.ndarray, estimator: Any, alpha: float,
) -> Float[np.ndarray, "permutation fold"]:
    """Score of every fold, for the labels in every order (the first is the data's)."""
    scores = np.full((len(orders), len(splits)), np.nan)
    for fold, (train, test) in enumerate(splits):
        if isinstance(estimator, str):
            made = hat(x, train, test, alpha)
            scores[:, fold] = ridge_scores(made, y[orders], train, test, kind, len(classes))
            continue
        for number, order in enumerate(orders):
            scores[number, fold] = _fitted_score(estimator, x, y[order], train, test, kind)
    return scores




def _fitted_score(
    estimator: Any, x: np.ndarray, y: np.ndarray, train: np.ndarray, test: np.ndarray, kind: Kind
) -> float:
    if kind != "r2" and (len(np.unique(y[train])) < 2 or len(np.unique(y[test])) < 2):
        return float("nan")
    probe = fitted_copy(estimator, x[train], y[train])
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
        within = [float(known_mean(_cell(x[train], y[train], kind, classes, inner, order, estimator,
                                    alpha), 1)[0]) for x in X]
        pick = 0 if np.isnan(within).all() else int(np.nanargmax(within))
        chosen.append(pick)
        scores.append(_cell(X[pick], y, kind, classes, [(train, test)], np.arange(len(y))[None],
                            estimator, alpha)[0, 0])
    return np.array(scores), chosen



def _majority(y: np.ndarray, kind: Kind) -> float:
    return float("nan") if kind == "r2" else float(np.bincount(y).max() / len(y))
