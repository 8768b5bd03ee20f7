"""Peaks of "mutual information" along a reasoning trace: the released score, and what it really is.

Paper     arXiv:2506.02867
Question  At which generated tokens does the state know the solution?
Measure   normalized HSIC between the state of a step and the state of the worked solution
Cause     none: a reading of states

The released code gives the estimator one vector for the step and one for the solution, so that its
samples are the coordinates of these two: it says how alike two vectors are, close to their squared
cosine, and one coordinate of massive size decides it. Beside it stand that cosine, the score without
the largest coordinates, the solution of another problem, and an estimator whose samples are problems.
"""

from collections.abc import Sequence
from typing import Any, Literal, Optional, SupportsFloat, SupportsIndex

import numpy as np
import torch
import xarray as xr
from jaxtyping import Bool, Float
from matplotlib.axes import Axes

from interp.core import Result
from interp.figures.style import color, style

SIGMA, EPSILON = 50.0, 1e-5
"""Width of the kernel and regularization in the released code."""


def coordinate_hsic(
    x: Float[np.ndarray, "coordinate"], y: Float[np.ndarray, "other"], *,
    sigma: SupportsFloat = SIGMA, epsilon: SupportsFloat = EPSILON, rounded: bool = False,
) -> float:
    """Normalized HSIC of two vectors over their coordinates: the released estimator.

    Example:
        >>> x, y = np.random.default_rng(0).standard_normal((2, 256))
        >>> abs(coordinate_hsic(x, y)) < 0.05, round(coordinate_hsic(x, x), 2)
        (True, 0.95)
        >>> x[3] = y[3] = 300.0
        >>> round(coordinate_hsic(x, y), 2)
        1.0

    R = KH (KH + epsilon m I)^-1 of a Gaussian kernel, centered from the right only, and the sum of
    R_x * R_y^T: not symmetrized, so it can be below zero. The kernels are smooth and of low rank, which
    gives the same number without inverting a matrix of the model's width. Where the coordinates vary
    little beside sigma, a vector with itself gives (v / (v + epsilon sigma^2))^2, v their variance.

    Args:
        rounded: invert the whole matrices in single precision as the released code does. Its rounding
            alone takes a vector with itself from 0.95 to between 0.75 and 0.9, and adds noise of 0.02.

    Source: arXiv:2506.02867, released code.
    """
    if rounded:
        a, b = (_rounded(v, float(sigma), float(epsilon)) for v in (x, y))
        return float((a * b.T).sum())
    return _score(_side(x, float(sigma), float(epsilon)), _side(y, float(sigma), float(epsilon)))


def squared_cosine(
    x: Float[np.ndarray, "*step coordinate"], y: Float[np.ndarray, "coordinate"], *,
    centered: bool = False,
) -> Float[np.ndarray, "*step"]:
    """cos^2 of vectors with one vector; of deviations from the mean over coordinates if `centered`.

    Example:
        >>> squared_cosine(np.array([[1.0, 1.0], [1.0, -1.0]]), np.array([2.0, 2.0])).round(6)
        array([1., 0.])

    NaN for a vector of zeros.
    """
    a, b = np.asarray(x, dtype=float), np.asarray(y, dtype=float)
    if centered:
        a, b = a - a.mean(-1, keepdims=True), b - b.mean()
    size = (a * a).sum(-1) * (b * b).sum()
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.asarray((a @ b) ** 2 / np.where(size > 0, size, np.nan))


def score(
    states: Float[np.ndarray, "step d_model"], solution: Float[np.ndarray, "d_model"], *,
    drop: SupportsIndex = 3,
) -> xr.Dataset:
    """The released score of every step with its controls.

    Example:
        >>> rng = np.random.default_rng(0)
        >>> solution = rng.standard_normal(64)
        >>> found = score(np.stack([rng.standard_normal(64), solution]), solution)
        >>> list(found), int(found["hsic"].values.argmax())
        (['hsic', 'cosine', 'centered_cosine', 'hsic_without'], 1)

    Args:
        drop: coordinates that `hsic_without` leaves out: those of largest mean square over the steps
            and the solution.

    Returns:
        [step]: `hsic` as released, `cosine` and `centered_cosine` (squared), `hsic_without`.

    Raises:
        ValueError: vectors of different size, values that are not numbers, too few coordinates.
    """
    X, y = np.asarray(states, dtype=float), np.asarray(solution, dtype=float)
    if X.shape[1] != len(y) or not np.isfinite(X).all() or not np.isfinite(y).all():
        raise ValueError(f"states of {X.shape[1]} and a solution of {len(y)} coordinates: finite "
                         "numbers of one size are needed.")
    if not 0 <= int(drop) < len(y) - 1:
        raise ValueError(f"{int(drop)} of {len(y)} coordinates cannot be left out.")
    size = (X**2).mean(0) + y**2
    kept = np.sort(np.argsort(size)[: len(y) - int(drop)])
    whole, part = _side(y, SIGMA, EPSILON), _side(y[kept], SIGMA, EPSILON)
    return xr.Dataset({
        "hsic": ("step", [_score(_side(x, SIGMA, EPSILON), whole) for x in X]),
        "cosine": ("step", squared_cosine(X, y)),
        "centered_cosine": ("step", squared_cosine(X, y, centered=True)),
        "hsic_without": ("step", [_score(_side(x[kept], SIGMA, EPSILON), part) for x in X])})


def peaks(values: Float[np.ndarray, "step"]) -> Bool[np.ndarray, "step"]:
    """Steps above the third quartile by more than 1.5 times the distance between the quartiles.

    Example:
        >>> np.flatnonzero(peaks(np.array([1.0, 1.1, 0.9, 1.0, 5.0, 1.2]))).tolist()
        [4]
    """
    low, high = np.nanquantile(values, [0.25, 0.75])
    return np.asarray(values) > high + 1.5 * (high - low)


def dependence(
    X: Float[np.ndarray, "step item feature"], Y: Float[np.ndarray, "item other"], *,
    kernel: Literal["linear", "gaussian"] = "linear", permutations: SupportsIndex = 200,
    seed: SupportsIndex = 0,
) -> xr.Dataset:
    """Dependence over items: CKA (normalized HSIC) of every step's states with the items' targets.

    Example:
        >>> rng = np.random.default_rng(0)
        >>> Y = rng.standard_normal((40, 3))
        >>> X = np.stack([rng.standard_normal((40, 8)), Y @ rng.standard_normal((3, 8))])
        >>> dependence(X, Y)["p"].values.round(3).tolist()
        [0.98, 0.005]

    Args:
        kernel: "linear" is CKA as it is known; "gaussian" takes the median distance for its width.
        permutations: of the items of Y.

    Returns:
        [step]: `cka`, `excess` over the mean of the permuted ones (with more features than items, CKA
        of independent clouds is far above zero), `p` against the maximum over steps, `p_alone`;
        `null` [permutation, step].

    Raises:
        ValueError: other items, fewer than four of them, or values that are not numbers.
    """
    X, Y = np.asarray(X, dtype=float), np.asarray(Y, dtype=float)
    if X.shape[1] != len(Y) or len(Y) < 4:
        raise ValueError(f"states of {X.shape[1]} and targets of {len(Y)} items: give the same ones, "
                         "at least four.")
    if not np.isfinite(X).all() or not np.isfinite(Y).all():
        raise ValueError("the states hold values that are not numbers; leave those items out.")
    right = _gram(Y, kernel)
    left = np.stack([_gram(x, kernel) for x in X])
    rng = np.random.default_rng(int(seed))
    orders = np.stack([np.arange(len(Y)), *(rng.permutation(len(Y)) for _ in range(int(permutations)))])
    permuted = right[orders[:, :, None], orders[:, None, :]].reshape(len(orders), -1)
    found = permuted @ left.reshape(len(left), -1).T
    null = found[1:]
    low = np.where(np.isfinite(found[0]), 1 + (null >= found[:1] - 1e-12).sum(0), np.nan)
    high = np.where(np.isfinite(found[0]),
                    1 + (null.max(1)[:, None] >= found[:1] - 1e-12).sum(0), np.nan)
    return xr.Dataset({
        "cka": ("step", found[0]), "excess": ("step", found[0] - null.mean(0)),
        "p": ("step", high / (1 + len(null))), "p_alone": ("step", low / (1 + len(null))),
        "null": (("permutation", "step"), null)})


def measure(
    model: Any, prompts: Sequence[Any], traces: Sequence[Sequence[int]], solutions: Sequence[Any], *,
    layer: Optional[SupportsIndex] = None, drop: SupportsIndex = 3, seed: SupportsIndex = 0,
) -> Result:
    """The released score along generated traces, with the same for another problem's solution.

    Example:
        >>> import interp
        >>> model = interp.open_model("backcopy-1l")
        >>> prompts = [interp.Prompt.from_tokens(range(i, i + 6)) for i in (3, 9)]
        >>> found = measure(model, prompts, [[5, 6], [7, 8, 9]], prompts)
        >>> found["hsic"].shape, found.manifest["layer"]
        ((2, 3), 0)

    Args:
        traces: the tokens generated after every prompt; step t is the state at trace token t.
        solutions: worked solutions as prompts of their own; their last state is the target.
        layer: whose output is read, before any final norm; the last block's for None.

    Returns:
        [prompt, step], NaN after a trace's end: what `score` returns, and `hsic_other`,
        `centered_cosine_other` for the solution of another problem; `states` [prompt, step, d_model]
        and `solution` [prompt, d_model].

    Source: arXiv:2506.02867.
    """
    if not len(prompts) == len(traces) == len(solutions) or len(prompts) < 2:
        raise ValueError(f"{len(prompts)} prompts, {len(traces)} traces and {len(solutions)} solutions: "
                         "give one of each for two problems at least.")
    at = model.n_layers - 1 if layer is None else int(layer)
    site = f"resid_post.{at}"
    steps = max(map(len, traces))
    states = np.full((len(prompts), steps, model.d_model), np.nan, dtype=np.float32)
    targets = np.stack([model.run(s, read=site, logits="none").reads[site].values[0, 0, -1]
                        for s in solutions])
    # Every problem gets the solution of another one.
    shift = 1 + int(np.random.default_rng(int(seed)).integers(len(prompts) - 1))
    names = ("hsic", "cosine", "centered_cosine", "hsic_without", "hsic_other",
             "centered_cosine_other")
    made = {name: np.full((len(prompts), steps), np.nan) for name in names}
    for i, (prompt, trace) in enumerate(zip(prompts, traces)):
        if not len(trace):
            continue
        whole = type(prompt).from_tokens([*prompt.ids, *trace])
        found = model.run(whole, read=site, logits="none").reads[site].values[0, 0, len(prompt):]
        states[i, : len(trace)] = found
        own = score(found, targets[i], drop=drop)
        other = targets[(i + shift) % len(targets)]
        for name in own:
            made[str(name)][i, : len(trace)] = own[name].values
        side = _side(other, SIGMA, EPSILON)
        made["hsic_other"][i, : len(trace)] = [_score(_side(x, SIGMA, EPSILON), side) for x in found]
        made["centered_cosine_other"][i, : len(trace)] = squared_cosine(found, other, centered=True)
    data = xr.Dataset({name: (("prompt", "step"), made[name]) for name in names})
    data["states"] = ("prompt", "step", "d_model"), states
    data["solution"] = ("prompt", "d_model"), targets
    return Result(data, {"measure": "mutual information peaks", "layer": at, "dropped": int(drop),
                         "seed": int(seed), **model.manifest()})


@style()
def draw(found: Result, ax: Axes, prompt: SupportsIndex = 0) -> Axes:
    """The score along one trace, its peaks, the squared cosine, and another solution in gray."""
    here = found.data.isel(prompt=int(prompt))
    values = here["hsic"].values
    known = np.isfinite(values)
    steps = np.arange(len(values))[known]
    ax.plot(steps, here["hsic_other"].values[known], color=color("control"),
            label="score, another problem's solution")
    ax.plot(steps, here["centered_cosine"].values[known], "--", color=color("question"),
            label="centered cos², own solution")
    ax.plot(steps, values[known], color=color("image"), label="released score, own solution")
    top = np.flatnonzero(peaks(values[known]))
    ax.plot(steps[top], values[known][top], "o", color=color("primary"), label="peak")
    ax.set_xlabel("generated token")
    ax.set_ylabel("score")
    ax.legend()
    return ax


# -- the parts ------------------------------------------------------------------------------------


def _side(x: Any, sigma: float, epsilon: float) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """F, G and the small inverse with R = F (G^T F + epsilon m I)^-1 G^T, where K = F F^T, G = H F."""
    v = np.asarray(x, dtype=float).ravel()
    if not np.isfinite(v).all():
        raise ValueError("a vector holds values that are not numbers.")
    F = _factor(v, 2 * sigma**2)
    G = F - F.mean(0)
    return F, G, np.linalg.inv(G.T @ F + epsilon * len(v) * np.eye(F.shape[1]))


def _rounded(x: Any, sigma: float, epsilon: float) -> torch.Tensor:
    v = torch.as_tensor(np.asarray(x), dtype=torch.float32).reshape(-1, 1)
    square, m = (v * v).sum(1, keepdim=True), len(v)
    kernel = torch.exp(-(square - 2 * v @ v.T + square.T).abs() / (2 * sigma**2))
    centered = kernel @ (torch.eye(m) - torch.ones(m, m) / m)
    return centered @ torch.inverse(centered + epsilon * m * torch.eye(m))


def _score(a: tuple, b: tuple) -> float:
    (F, G, M), (P, Q, N) = a, b
    if len(F) != len(P):
        raise ValueError(f"vectors of {len(F)} and {len(P)} coordinates cannot be compared.")
    return float(np.trace(M @ (G.T @ P) @ N @ (Q.T @ F)))


def _factor(v: np.ndarray, width: float, small: float = 1e-13) -> np.ndarray:
    """F with F F^T = exp(-(v_i - v_j)^2 / width), by pivoted Cholesky down to rounding."""
    left = np.ones(len(v))
    columns: list[np.ndarray] = []
    while len(columns) < len(v):
        pivot = int(left.argmax())
        if left[pivot] < small:
            break
        column = np.exp(-((v - v[pivot]) ** 2) / width)
        for done in columns:
            column -= done[pivot] * done
        column /= np.sqrt(left[pivot])
        columns.append(column)
        left = left - column**2
    return np.stack(columns, 1)


def _gram(x: np.ndarray, kernel: str) -> np.ndarray:
    """The centered Gram matrix of the items, of Frobenius norm one (zero for constant items: NaN)."""
    if kernel == "linear":
        x = x - x.mean(0)
        gram = x @ x.T
    else:
        square = (x**2).sum(1)
        far = np.maximum(square[:, None] + square[None] - 2 * x @ x.T, 0)
        middle = float(np.median(far[np.triu_indices(len(x), 1)]))
        gram = np.exp(-far / (middle or 1.0))
        gram = gram - gram.mean(0) - gram.mean(1, keepdims=True) + gram.mean()
    size = np.linalg.norm(gram)
    return gram / size if size > 1e-12 * max(1.0, float((x**2).sum())) else np.full_like(gram, np.nan)
