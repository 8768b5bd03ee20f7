"""Heads that attend alike: Jensen-Shannon divergences between heads, and their map in the plane.

Paper     arXiv:1906.04341, section 6
Question  Do heads of one layer attend alike?
Measure   Jensen-Shannon divergence of two heads' rows, multidimensional scaling of all pairs
"""

import inspect
import warnings
from collections.abc import Sequence
from typing import Any, Literal, Optional, SupportsFloat, SupportsIndex

import numpy as np
import torch
import xarray as xr
from jaxtyping import Bool, Float
from torch import Tensor

from interp.core import Prompt, PromptError, Result
from interp.core.errors import NumericalError
from interp.models.model import Model

Mode = Literal["row", "official"]
SMOOTHING = 1e-3
LONGEST = 128
"""Tokens of a prompt at most: whole maps are held, one prompt at a time."""


def divergence(
    attention: Float[Tensor | np.ndarray, "head query key"],
    *,
    mode: Mode = "row",
    smoothing: SupportsFloat = SMOOTHING,
    visible: Optional[Bool[Tensor | np.ndarray, "query key"]] = None,
) -> Float[Tensor, "head head"]:
    """Jensen-Shannon divergence of every pair of heads, in nats.

    Example:
        >>> rows = torch.tensor([[[1.0, 0.0]] * 3, [[0.0, 1.0]] * 3])
        >>> divergence(rows, smoothing=0)[0, 1].exp()
        tensor(2., dtype=torch.float64)
        >>> divergence(rows, smoothing=0, mode="official")[0, 1] / divergence(rows, smoothing=0)[0, 1]
        tensor(3., dtype=torch.float64)

    Args:
        mode: "row" is the mean over rows, at most ln 2; "official" the sum over rows, as in the
            paper, which grows with the length of the text.
        smoothing: share of uniform attention mixed into each row.
        visible: what each query may see, where that is not everything (causal models).

    Rows that sum to less than one (learned sink logits) are divided by their sum.

    Source: arXiv:1906.04341, section 6; A <- .999 A + .001 / n.
    """
    rows = torch.as_tensor(attention).double()
    if not torch.isfinite(rows).all():
        raise NumericalError("attention contains NaN or infinity; recompute it in float32.")
    total, share = rows.sum(-1, keepdim=True), float(smoothing)
    rows = rows / torch.where(total > 0, total, torch.ones_like(total))
    seen = torch.ones(rows.shape[-2:], dtype=torch.bool) if visible is None \
        else torch.as_tensor(visible)
    rows = (1 - share) * rows + share * (seen / seen.sum(-1, keepdim=True).clamp_min(1))
    n_heads = len(rows)
    own = torch.xlogy(rows, rows).sum((-1, -2))
    found = torch.zeros(n_heads, n_heads, dtype=torch.float64)
    for head in range(n_heads - 1):
        middle = (rows[head + 1 :] + rows[head]) / 2
        both = torch.xlogy(middle, middle).sum((-1, -2))
        found[head, head + 1 :] = (own[head + 1 :] + own[head]) / 2 - both
    found = (found + found.T).clamp_min(0)
    return found / rows.shape[1] if mode == "row" else found


def mds(
    distances: Float[Tensor | np.ndarray, "head head"], *, seed: SupportsIndex = 0
) -> Float[np.ndarray, "head axis"]:
    """Points in the plane whose distances are as close to the given ones as can be.

    Example:
        >>> points = mds(np.array([[0.0, 3.0, 4.0], [3.0, 0.0, 5.0], [4.0, 5.0, 0.0]]))
        >>> float(np.linalg.norm(points[1] - points[2]).round(2))
        5.0

    Source: arXiv:1906.04341, figure 6 (metric scaling, 5 starts, eps 1e-10, 1000 iterations).
    """
    from sklearn.manifold import MDS

    values = np.asarray(distances, dtype=float)
    if values.ndim != 2 or values.shape[0] != values.shape[1] or not np.allclose(values, values.T):
        raise ValueError(f"distances must be a symmetric matrix, not {values.shape}.")
    if not np.isfinite(values).all():
        raise NumericalError("a distance is NaN or infinite.")
    # scikit-learn 1.8 renamed the metric and 1.9 the way to start.
    known = inspect.signature(MDS.__init__).parameters
    more: dict[str, Any] = {"metric": "precomputed"} if "metric_mds" in known \
        else {"dissimilarity": "precomputed"}
    if "init" in known:
        more["init"] = "random"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        made = MDS(2, n_init=5, eps=1e-10, max_iter=1000, random_state=int(seed), **more)
        return np.asarray(made.fit_transform(values))


def measure(
    model: Model, prompts: Sequence[Prompt], *, mode: Mode = "row", max_rows: int = 64,
    seed: int = 0,
) -> Result:
    """Divergence of every pair of heads over texts, and of pairs within and between layers.

    Example:
        >>> import interp
        >>> model = interp.open_model("reader")
        >>> found = measure(model, [model.prompt("note amber one two ten ; river")])
        >>> found["divergence"].dims, found["divergence"].shape
        (('head', 'other'), (32, 32))

    Args:
        prompts: of at most 128 tokens each: whole maps are held, of one prompt at a time.
        mode: "row" averages over rows, then over texts; "official" sums over rows and texts.
        max_rows: queries per text, drawn at random where there are more.

    Returns:
        `divergence` [head, other], heads named as "L1H2"; `within`, `between` [sample]: mean
        divergence of two heads of one layer, and of two layers.

    Raises:
        PromptError: a prompt that is too long, or no prompts.
    """
    longest = max(map(len, prompts), default=0)
    if not 1 < longest <= LONGEST:
        raise PromptError(
            f"divergences of heads need prompts of 2 to {LONGEST} tokens, not {longest}: whole maps "
            "are compared; cut the prompts."
        )
    names = [f"L{layer}H{head}" for layer in range(model.n_layers) for head in range(model.n_heads)]
    layer = np.repeat(np.arange(model.n_layers), model.n_heads)
    pairs = np.triu(np.ones((len(names), len(names)), dtype=bool), 1)
    alike = layer[:, None] == layer
    rng, total, within, between = np.random.default_rng(seed), 0.0, [], []
    for prompt in prompts:
        maps = model.run(prompt, read="pattern", logits="none").reads["pattern"].values[0]
        maps = torch.tensor(maps.reshape(len(names), *maps.shape[-2:]))
        rows = np.sort(rng.permutation(maps.shape[1])[:max_rows])
        # A key on which no head puts anything is hidden, by the mask of every layer.
        seen = (maps[:, rows] > 0).any(0)
        found = divergence(maps[:, rows], mode=mode, visible=seen).numpy()
        total = total + found
        within.append(found[pairs & alike].mean() if (pairs & alike).any() else np.nan)
        between.append(found[pairs & ~alike].mean() if (pairs & ~alike).any() else np.nan)
    total = np.asarray(total) / (len(prompts) if mode == "row" else 1)
    data = xr.Dataset(
        {"divergence": (("head", "other"), total), "within": ("sample", np.array(within)),
         "between": ("sample", np.array(between))},
        {"head": names, "other": names})
    return Result(data, {**model.manifest(), "measure": "head_clusters", "mode": mode,
                         "max_rows": max_rows, "seed": seed, "n_samples": len(prompts)})


def layer_gap(
    distances: Float[np.ndarray, "head head"], n_heads: int, *, resamples: int = 1000,
    seed: int = 0,
) -> tuple[float, float, float]:
    """How much farther heads of different layers are apart than heads of one, against chance.

    Example:
        >>> near = np.kron(np.eye(4), np.ones((3, 3)))
        >>> gap, p, chance = layer_gap(1.0 - near, 3)
        >>> gap, p < 0.01, chance < 0.3
        (1.0, True, True)

    Returns the gap, its one-sided p value, and the 95th percentile of gaps by chance: heads change
    places at random, `n_heads` to a layer as before.
    """
    values = np.asarray(distances, dtype=float)
    layer = np.arange(len(values)) // n_heads
    pairs = np.triu(np.ones(values.shape, dtype=bool), 1)
    if n_heads < 2 or len(values) < 2 * n_heads:
        raise ValueError("a comparison within layers needs two layers of two heads at least.")

    def gap(order: np.ndarray) -> float:
        alike = (layer[order][:, None] == layer[order])[pairs]
        flat = values[pairs]
        return float(flat[~alike].mean() - flat[alike].mean())

    rng = np.random.default_rng(seed)
    observed = gap(np.arange(len(values)))
    drawn = np.array([gap(rng.permutation(len(values))) for _ in range(resamples)])
    p = (1 + int((drawn >= observed).sum())) / (1 + resamples)
    return observed, p, float(np.quantile(drawn, 0.95))
