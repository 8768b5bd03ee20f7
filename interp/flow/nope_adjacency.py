"""Adjacent positions' states are alike in causal models, even untrained and without positions.

Paper     arXiv:2501.00073
Question  Does the similarity of two states tell how near their positions are?
Measure   share of triples i > j > k in which state i is more similar to j than to k, by layer
Cause     the same model untrained; without position encodings; without the causal mask
"""

from collections.abc import Sequence
from typing import Any, SupportsIndex, Union

import numpy as np
import xarray as xr
from jaxtyping import Float
from matplotlib.axes import Axes
from scipy import stats

from interp.core import Prompt, PromptError, Result
from interp.figures import heat
from interp.models.model import Model
from interp.stream.similarity import cosines

SHORT = 200
"""Rows of up to so many keys are compared pair by pair, which is faster than sorting them."""


def adjacency(cosine: Float[np.ndarray, "*layer position position"]) -> Float[np.ndarray, "*layer"]:
    """AP: how often a position is more similar to the nearer of two earlier ones; 0.5 is chance.

    Example:
        >>> near = -np.abs(np.subtract.outer(np.arange(6.0), np.arange(6.0)))
        >>> float(adjacency(near)), float(adjacency(-near)), float(adjacency(0 * near))
        (1.0, 0.0, 0.5)

    Over all triples i > j > k, exactly, in O(n^2 log n): per row (1 + Kendall's tau) / 2 between
    similarity and position, weighted by the row's pairs. A tie counts one half.

    Source: arXiv:2501.00073 names an adjacency probability; this estimator is the toolkit's.
    """
    matrix = np.asarray(cosine, dtype=float)
    n = matrix.shape[-1]
    if n < 3:
        raise ValueError("a triple of positions needs at least three of them.")
    flat = matrix.reshape(-1, n, n)
    net, size = np.zeros(len(flat)), np.arange(n)
    for i in range(2, n):
        if i <= SHORT:
            one = flat[:, i, :i]
            net += (np.sign(one[:, :, None] - one[:, None, :]) * np.tri(i, k=-1)).sum((1, 2))
        else:
            net += [_net_concordant(row) for row in flat[:, i, :i]]
    return np.asarray(0.5 + 0.5 * net / (size * (size - 1) / 2).sum()).reshape(matrix.shape[:-2])


def _net_concordant(values: np.ndarray) -> int:
    """Pairs in rising order minus pairs in falling order; ties are neither. O(n log n)."""
    ranks = np.unique(values, return_inverse=True)[1]
    order, net = np.arange(len(ranks)), 0
    # From the highest bit of the rank on: two ranks differ first in one bit, and there it is decided.
    for bit in range(int(ranks.max()).bit_length() - 1, -1, -1):
        sorted_ranks = ranks[order]
        group = sorted_ranks >> (bit + 1)
        one = (sorted_ranks >> bit) & 1
        start = np.concatenate([[True], group[1:] != group[:-1]])
        first = np.maximum.accumulate(np.where(start, np.arange(len(one)), 0))
        before = np.cumsum(one) - one
        ones = before - before[first]
        zeros = (np.arange(len(one)) - first) - ones
        net += int((zeros * one).sum() - (ones * (1 - one)).sum())
        order = order[np.lexsort((np.arange(len(one)), one, group))]
    return net


def nearest_first(
    cosine: Float[np.ndarray, "*layer position position"]
) -> Float[np.ndarray, "*layer"]:
    """Share of positions whose most similar earlier one is their neighbor; see `chance`.

    Example:
        >>> near = -np.abs(np.subtract.outer(np.arange(6.0), np.arange(6.0)))
        >>> float(nearest_first(near)), round(chance(6), 3)
        (1.0, 0.321)
    """
    matrix = np.asarray(cosine, dtype=float)
    n = matrix.shape[-1]
    hits = [matrix[..., i, i - 1] >= matrix[..., i, : i - 1].max(-1) for i in range(2, n)]
    return np.asarray(np.mean(hits, axis=0))


def chance(n: SupportsIndex) -> float:
    """`nearest_first` of states that know nothing of their position."""
    return float(np.mean(1 / np.arange(2, int(n))))


def order_from_cosines(
    cosine: Float[np.ndarray, "position position"]
) -> Float[np.ndarray, "position"]:
    """Where positions stand as far as their similarities tell, up to direction.

    Example:
        >>> near = np.exp(-np.abs(np.subtract.outer(np.arange(6.0), np.arange(6.0))))
        >>> round(abs(float(stats.spearmanr(order_from_cosines(near), range(6)).statistic)), 6)
        1.0

    The Fiedler vector of the graph whose weights are the similarities (from their least on).
    """
    weight = np.asarray(cosine, dtype=float)
    weight = weight - weight.min()
    np.fill_diagonal(weight, 0.0)
    laplacian = np.diag(weight.sum(0)) - weight
    return np.linalg.eigh(laplacian)[1][:, 1]


def measure(
    model: Model, prompts: Union[Prompt, Sequence[Prompt]], *, skip: SupportsIndex = 0
) -> Result:
    """Adjacency of the residual stream entering every block, and leaving the last one.

    Example:
        >>> import interp
        >>> model = interp.open_model("backcopy-3l")
        >>> measure(model, Prompt.from_tokens(range(3, 12)))["adjacency"].dims
        ('prompt', 'layer')

    Args:
        prompts: of one length; of random tokens, where nearby words are about no common topic.
        skip: positions at the start to leave out, such as a start token that is always the same.

    Returns:
        [prompt, layer]: `adjacency` (AP), `nearest_first`, `by_cosine` and `by_variance` (absolute
        rank correlation of the true order with that told by the similarities, and by the variance
        over a state's coordinates); [layer, query, key]: `cosine`, the mean map. Layer l is what
        enters block l; the last one is what leaves the model's last block.

    Source: arXiv:2501.00073.
    """
    given = [prompts] if isinstance(prompts, Prompt) else list(prompts)
    if len({len(prompt) for prompt in given}) != 1 or len(given[0]) - int(skip) < 4:
        raise PromptError("adjacency needs prompts of one length, of at least four positions.")
    last, skip = model.n_layers - 1, int(skip)
    rows: dict[str, list] = {k: [] for k in ("adjacency", "nearest_first", "by_cosine",
                                             "by_variance")}
    total: Union[float, np.ndarray] = 0.0
    for prompt in given:
        reads = model.run(prompt, read=("resid_pre", f"resid_post.{last}"), logits="none").reads
        states = np.concatenate([reads[k].values[0] for k in reads])[:, skip:].astype(float)
        cosine = cosines(states)
        total = total + cosine
        rows["adjacency"].append(adjacency(cosine))
        rows["nearest_first"].append(nearest_first(cosine))
        place = np.arange(states.shape[1])
        rows["by_cosine"].append([_rank(order_from_cosines(one), place) for one in cosine])
        rows["by_variance"].append([_rank(one.var(-1), place) for one in states])
    data = xr.Dataset({k: (("prompt", "layer"), np.array(v)) for k, v in rows.items()},
                      {"layer": np.arange(last + 2)})
    data["cosine"] = (("layer", "query", "key"), total / len(given))
    return Result(data, {
        **model.manifest(), "measure": "adjacency", "skip": skip, "chance": 0.5,
        "chance of nearest_first": chance(len(given[0]) - skip),
        "prompts": [prompt.digest() for prompt in given],
    })


def _rank(a: np.ndarray, b: np.ndarray) -> float:
    """Absolute rank correlation; 0 where the first does not vary."""
    if np.ptp(a) <= 1e-12 * (np.abs(a).max() + 1e-30):
        return 0.0
    found: Any = stats.spearmanr(a, b)
    return abs(float(found.statistic))


def draw(found: Result, ax: Axes, layer: SupportsIndex, **look: Any) -> Axes:
    """Mean cosine similarity of the states of two positions, at one layer; `look` as in `heat.draw`."""
    heat.draw(ax, found["cosine"].sel(layer=int(layer)).drop_vars("layer"), x="position",
              y="position", label="cosine", upward=False, **look)
    return ax
