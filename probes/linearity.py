"""Linearity: how much of a block is one linear map, the same for all tokens?

Paper     arXiv:2502.15007 (score), arXiv:2405.12250
Question  Is the next block's input a linear function of this one's?
Measure   share of the variance that the best linear map predicts, on documents it was not fitted on;
          for the whole state and for what the block adds to it
Cause     none: two clouds are compared
"""

from typing import Any, Optional, SupportsFloat, SupportsIndex

import numpy as np
import torch
import xarray as xr
from jaxtyping import Bool, Float
from matplotlib.axes import Axes
from sklearn.model_selection import GroupKFold, KFold

from interp.core import Result
from interp.figures.style import color, style


def score(
    X: Float[np.ndarray, "sample d_model"],
    Y: Float[np.ndarray, "target d_model"],
    *,
    test: Optional[Bool[np.ndarray, "sample"]] = None,
    ridge: SupportsFloat = 0.0,
) -> float:
    """1 - |XA - Y|^2 / |Y|^2 with the best linear map A, both clouds centered.

    Example:
        >>> X = np.random.default_rng(0).standard_normal((50, 4))
        >>> round(score(X, X @ np.arange(16.0).reshape(4, 4)), 6)
        1.0

    Args:
        test: samples to score on; A and the means are fitted on the others. None scores on the
            samples of the fit, as the paper's released code does: that is near 1 for any two clouds
            with no more samples than dimensions, and d/n for independent ones.
        ridge: penalty relative to the mean variance of a coordinate of X.

    Returns the share of variance; negative on held-out samples where the map is worse than the mean.

    Source: arXiv:2502.15007, released code; least squares by SVD with a cut-off, not by 1/S.
    """
    X, Y = np.asarray(X, dtype=np.float64), np.asarray(Y, dtype=np.float64)
    if X.shape[0] != Y.shape[0] or X.ndim != 2 or Y.ndim != 2:
        raise ValueError(f"clouds of {X.shape} and {Y.shape}: give the same samples of both.")
    if not (np.isfinite(X).all() and np.isfinite(Y).all()):
        raise ValueError("the clouds hold values that are not numbers; leave those samples out.")
    train = np.ones(len(X), bool) if test is None else ~np.asarray(test)
    scored = train if test is None else np.asarray(test)
    if train.sum() < 2 or scored.sum() < 2:
        raise ValueError(
            f"{int(train.sum())} samples to fit and {int(scored.sum())} to score on: at least two each."
        )
    mean_x, mean_y = X[train].mean(0), Y[train].mean(0)
    a, b = X[train] - mean_x, Y[train] - mean_y
    if float(ridge):
        penalty = float(ridge) * np.trace(a.T @ a) / a.shape[1]
        a = np.concatenate([a, np.sqrt(penalty) * np.eye(a.shape[1])])
        b = np.concatenate([b, np.zeros((a.shape[1], b.shape[1]))])
    A = np.linalg.lstsq(a, b, rcond=None)[0]
    left = (X[scored] - mean_x) @ A - (Y[scored] - mean_y)
    spread = ((Y[scored] - Y[scored].mean(0)) ** 2).sum()
    return float(1 - (left**2).sum() / spread) if spread else float("nan")


def measure(
    states: Any,
    *,
    groups: Optional[Any],
    folds: SupportsIndex = 5,
    drop: SupportsIndex = 0,
    ridge: SupportsFloat = 1e-6,
    seed: SupportsIndex = 0,
) -> Result:
    """Linearity of every block, held out, with its increment and the in-sample number beside.

    Example:
        >>> rng = np.random.default_rng(0)
        >>> x = rng.standard_normal((200, 5))
        >>> states = np.stack([x, x + np.tanh(x @ rng.standard_normal((5, 5)))])
        >>> found = measure(states, groups=None)
        >>> bool(found["increment"][0] < found["whole"][0])
        True

    Args:
        states: `[layer, sample, d_model]`, what enters each block (and last, what leaves the last
            one): from layer l to l + 1 leads block l.
        groups: the document of every sample, which is not split; None if samples are independent.
        drop: coordinates of largest variance to leave out: one massive coordinate can dominate.

    Returns:
        [layer] for all but the last: `whole` (held-out score of the next state), `increment` (of
        what the block adds), `in_sample`, `relative_step` (length of what is added, relative to the
        state); `fold` values in `whole_fold`.

    Source: arXiv:2502.15007; held-out scoring is this toolkit's.
    """
    X = np.asarray(states, dtype=np.float64)
    if X.ndim != 3 or X.shape[0] < 2:
        raise ValueError(f"states must be [layer, sample, d_model] with two layers, not {X.shape}.")
    if not 0 <= int(drop) < X.shape[2]:
        raise ValueError(f"{int(drop)} of {X.shape[2]} coordinates cannot be left out.")
    if int(drop):
        kept = np.argsort(X.var(1).max(0))[: X.shape[2] - int(drop)]
        X = X[:, :, kept]
    blocks = None if groups is None else np.asarray(groups)
    made: Any = KFold(int(folds), shuffle=True, random_state=int(seed)) if blocks is None else \
        GroupKFold(int(folds), shuffle=True, random_state=int(seed))
    tests = []
    for _, test in made.split(X[0], groups=blocks):
        mask = np.zeros(X.shape[1], bool)
        mask[test] = True
        tests.append(mask)
    n = X.shape[0] - 1
    whole, increment = np.zeros((n, len(tests))), np.zeros((n, len(tests)))
    for layer in range(n):
        for fold, test in enumerate(tests):
            step = X[layer + 1] - X[layer]
            whole[layer, fold] = score(X[layer], X[layer + 1], test=test, ridge=ridge)
            increment[layer, fold] = score(X[layer], step, test=test, ridge=ridge)
    length = np.linalg.norm(np.diff(X, axis=0), axis=2).mean(1) / np.linalg.norm(X[:-1], axis=2).mean(1)
    data = xr.Dataset(
        {"whole": ("layer", whole.mean(1)), "increment": ("layer", increment.mean(1)),
         "whole_fold": (("layer", "fold"), whole),
         "in_sample": ("layer", [score(X[i], X[i + 1]) for i in range(n)]),
         "relative_step": ("layer", length)}, {"layer": np.arange(n)})
    return Result(data, {"measure": "linearity", "folds": len(tests), "dropped": int(drop),
                         "ridge": float(ridge), "n_samples": X.shape[1], "d_model": X.shape[2],
                         "grouped": blocks is not None})


def token_errors(
    X: Float[np.ndarray, "sample d_model"],
    Y: Float[np.ndarray, "sample d_model"],
    *,
    groups: Any,
    folds: SupportsIndex = 5,
    ridge: SupportsFloat = 1e-6,
    drop: SupportsIndex = 0,
    seed: SupportsIndex = 0,
    device: Optional[str] = None,
) -> xr.Dataset:
    """How far every token is from the linear map that fits the tokens of other documents.

    Example:
        >>> rng = np.random.default_rng(0)
        >>> X = rng.standard_normal((60, 3))
        >>> Y = X @ rng.standard_normal((3, 3))
        >>> Y[7] += 9
        >>> found = token_errors(X, Y, groups=np.arange(60) // 6)
        >>> int(found["error"].values.argmax())
        7

    Args:
        groups: the document of every token. folds, ridge, seed: as in `measure`.
        drop: coordinates of largest variance in Y to leave out of both clouds.
        device: where to solve; normal equations in double precision.

    Returns:
        [sample]: `error`, the length of what is left, relative to the root mean square length of a
        centered next state; `relative`, to that of the token's own; and the squares whose sums give
        held-out scores: `left`, `spread` (of the next state) and `step_spread` (of what the block adds),
        around the means of the training tokens. `fold` [sample]. The same map predicts the state and
        what is added to it, so that 1 - left / spread and 1 - left / step_spread differ by their
        denominators alone.

    Source: arXiv:2502.15007; which normalization its token score uses is not known here.
    """
    if X.shape != Y.shape or X.ndim != 2:
        raise ValueError(f"clouds of {X.shape} and {Y.shape}: give the same samples of both.")
    if not (np.isfinite(X).all() and np.isfinite(Y).all()):
        raise ValueError("the clouds hold values that are not numbers; leave those samples out.")
    x, y = (torch.as_tensor(np.asarray(v), device=device).double() for v in (X, Y))
    if int(drop):
        kept = y.var(0).argsort()[: y.shape[1] - int(drop)].sort().values
        x, y = x[:, kept], y[:, kept]
    shift_x, shift_y = x.mean(0), y.mean(0)
    x, y = x - shift_x, y - shift_y
    fold = np.empty(len(x), dtype=int)
    made = GroupKFold(int(folds), shuffle=True, random_state=int(seed))
    for number, (_, test) in enumerate(made.split(X, groups=np.asarray(groups))):
        fold[test] = number
    names = ("left", "spread", "step_spread")
    found = {name: np.empty(len(x)) for name in names}
    total = (x.T @ x, x.T @ y, x.sum(0), y.sum(0))
    for number in range(int(folds)):
        test = torch.as_tensor(fold == number, device=x.device)
        a, b = x[test], y[test]
        n = len(x) - len(a)
        xx, xy, sx, sy = (whole - part for whole, part in zip(total, (a.T @ a, a.T @ b, a.sum(0),
                                                                      b.sum(0))))
        mx, my = sx / n, sy / n
        xx, xy = xx - n * torch.outer(mx, mx), xy - n * torch.outer(mx, my)
        xx.diagonal().add_(float(ridge) * xx.trace() / len(xx))
        map_ = torch.linalg.solve(xx, xy)
        after, before = b - my, a - mx
        rows = (after - before @ map_, after, after - before)
        for name, row in zip(names, rows):
            found[name][fold == number] = (row**2).sum(1).cpu().numpy()
    scale = found["spread"].mean() or np.nan
    with np.errstate(invalid="ignore", divide="ignore"):
        return xr.Dataset({
            **{name: ("sample", values) for name, values in found.items()},
            "error": ("sample", np.sqrt(found["left"] / scale)),
            "relative": ("sample", np.sqrt(found["left"] / found["spread"])),
            "fold": ("sample", fold)})


@style()
def draw(found: Result, ax: Axes) -> Axes:
    """Held-out linearity of the state and of the increment by block, the in-sample score in gray."""
    layers = found["layer"].values
    ax.plot(layers, found["in_sample"], ":", color=color("control"), label="state, in sample")
    ax.plot(layers, found["whole"], "-o", markersize=3, color=color("image"), label="state")
    ax.plot(layers, found["increment"], "--s", markersize=3, color=color("question"),
            label="what the block adds")
    ax.set_ylim(top=1.02)
    ax.set_xlabel("block")
    ax.set_ylabel("linearity (held-out share of variance)")
    ax.legend()
    return ax
