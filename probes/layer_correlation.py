"""Does a quantity go with an outcome over texts, in some layer: ranks, with the choice paid for."""

from typing import Optional, SupportsIndex

import numpy as np
import xarray as xr
from jaxtyping import Float
from scipy import stats


def rank_correlation(
    values: Float[np.ndarray, "prompt layer"], outcome: Float[np.ndarray, "prompt"],
    given: Optional[Float[np.ndarray, "prompt covariate"]] = None, *,
    permutations: SupportsIndex = 1000, seed: SupportsIndex = 0,
) -> xr.Dataset:
    """Rank correlation of every layer's values with one outcome per text, and the highest by chance.

    Example:
        >>> rng = np.random.default_rng(1)
        >>> loss = rng.random(40)
        >>> found = rank_correlation(np.stack([loss**2, rng.random(40)], 1), loss)
        >>> round(float(found["correlation"][0]), 6), bool(found["p"][0] < 0.01 < found["p"][1])
        (1.0, True)

    Args:
        given: what to hold constant: partial correlation of ranks.

    Returns:
        `correlation` [layer]; `null` [permutation], the maximum over layers with permuted outcomes; `p`
        [layer], one-sided against that maximum. NaN for a layer whose values are constant or NaN.
    """
    n = len(outcome)
    known = np.all(np.isfinite(values), 0)
    base = [np.ones(n)] if given is None else [np.ones(n), *map(stats.rankdata, np.asarray(given).T)]
    axes, size, _ = np.linalg.svd(np.stack(base, 1), full_matrices=False)
    basis = axes[:, size > 1e-9 * size[0]]

    def left(ranks: np.ndarray) -> np.ndarray:
        ranks = ranks - basis @ (basis.T @ ranks)
        size = np.linalg.norm(ranks, axis=0)
        return np.where(size > 1e-9 * n, ranks / np.where(size > 0, size, 1.0), np.nan)

    x = left(np.stack([stats.rankdata(column) if ok else np.ones(n)
                       for column, ok in zip(np.asarray(values).T, known)], 1))
    y = left(stats.rankdata(outcome)[:, None])[:, 0]
    found = y @ x
    rng = np.random.default_rng(int(seed))
    orders = np.stack([rng.permutation(n) for _ in range(int(permutations))])
    usable = np.isfinite(found)
    # As in Freedman and Lane (1983): what is held constant is taken out of what was permuted, too.
    permuted = left(y[orders].T).T
    null = (permuted @ x[:, usable]).max(1) if usable.any() else np.full(len(orders), np.nan)
    p = (1 + (null[:, None] >= found[None] - 1e-12).sum(0)) / (1 + len(null))
    return xr.Dataset({"correlation": ("layer", found), "p": ("layer", np.where(usable, p, np.nan)),
                       "null": ("permutation", null)})
