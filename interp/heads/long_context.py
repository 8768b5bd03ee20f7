"""Long-context heads: does this query of this head need far keys, and can that be told cheaply?

Paper     arXiv:2502.09647 (QAdA)
Question  Which (query, head) pairs could do with the first and the last keys alone?
Measure   share of the attention mass on these local keys: exact (the oracle), and with the far
          ("bulk") keys modelled as Gaussian, which needs only their mean and covariance
Cause     cut the far keys where the rule calls a head local (`interp.causal.ablate`, `block`)
"""

import math
from collections.abc import Sequence
from typing import NamedTuple, Optional, SupportsFloat, SupportsIndex

import numpy as np
import torch
import xarray as xr
from jaxtyping import Float
from matplotlib.axes import Axes
from torch import Tensor

from interp.core import Prompt, Result
from interp.core.errors import NumericalError, PromptError
from interp.figures.style import color
from interp.heads.plain_attention import read_layer
from interp.models.model import Model

N_SINKS, WINDOW = 16, 1024
"""Local keys: the first 16 and the last 1024. The window is not confirmed from the paper."""


class Mass(NamedTuple):
    """Log masses of one head at some queries, and what the Gaussian misses.

    `local`, `bulk` (exact) and `predicted` are log sums of exponentials of scores; `skewness` is
    that of the bulk's scores, zero for a Gaussian.
    """

    local: Float[Tensor, "*batch query"]
    bulk: Float[Tensor, "*batch query"]
    predicted: Float[Tensor, "*batch query"]
    skewness: Float[Tensor, "*batch query"]


def moments(
    keys: Float[Tensor | np.ndarray, "*batch key d_head"], shrink: bool = True
) -> tuple[Float[Tensor, "*batch d_head"], Float[Tensor, "*batch d_head d_head"]]:
    """Mean and covariance of bulk keys, after position encoding.

    Example:
        >>> mean, covariance = moments(torch.tensor([[0.0, 0.0], [2.0, 0.0]]), shrink=False)
        >>> mean, covariance
        (tensor([1., 0.]), tensor([[1., 0.],
                [0., 0.]]))

    Args:
        shrink: draw the covariance toward a multiple of the identity where there are fewer than 10
            keys per dimension, by d / (d + keys).

    Raises:
        ValueError: no keys.
    """
    k = torch.as_tensor(keys).float()
    count, d = k.shape[-2:]
    if not count:
        raise ValueError("there are no bulk keys: the prompt is not longer than the local window.")
    mean = k.mean(-2)
    centered = k - mean[..., None, :]
    covariance = centered.transpose(-1, -2) @ centered / count
    if shrink and count < 10 * d:
        weight = d / (d + count)
        level = covariance.diagonal(dim1=-2, dim2=-1).mean(-1)[..., None, None]
        covariance = (1 - weight) * covariance + weight * level * torch.eye(d, device=k.device)
    return mean, covariance


def predicted_mass(
    query: Float[Tensor | np.ndarray, "*batch query d_head"],
    mean: Float[Tensor | np.ndarray, "*batch d_head"],
    covariance: Float[Tensor | np.ndarray, "*batch d_head d_head"],
    count: SupportsIndex,
    scaling: Optional[SupportsFloat] = None,
) -> Float[Tensor, "*batch query"]:
    """Log of the exponential sum over `count` Gaussian keys: log T + q mu + q Sigma q / 2, scaled.

    Example:
        >>> predicted_mass(torch.zeros(1, 2), torch.zeros(2), torch.eye(2), 1).tolist()
        [0.0]

    Exact in expectation for Gaussian scores; spikes on single keys, which retrieval makes, are
    what it misses.

    Source: arXiv:2502.09647 (structure confirmed second-hand).
    """
    q = torch.as_tensor(query).float()
    scale = q.shape[-1] ** -0.5 if scaling is None else float(scaling)
    mu, sigma = torch.as_tensor(mean).float(), torch.as_tensor(covariance).float()
    first = (q * mu[..., None, :]).sum(-1) * scale
    second = ((q @ sigma) * q).sum(-1) * scale**2 / 2
    return math.log(int(count)) + first + second


def masses(
    query: Float[Tensor | np.ndarray, "*batch query d_head"],
    key: Float[Tensor | np.ndarray, "*batch key d_head"],
    *,
    n_sinks: SupportsIndex = N_SINKS,
    window: SupportsIndex = WINDOW,
    scaling: Optional[SupportsFloat] = None,
    given: Optional[tuple[Tensor, Tensor]] = None,
) -> Mass:
    """Exact and predicted log masses for queries that are the last positions of a sequence.

    Example:
        >>> g = torch.Generator().manual_seed(0)
        >>> query, key = torch.randn(3, 8, generator=g), torch.randn(400, 8, generator=g)
        >>> found = masses(query, key, n_sinks=4, window=16)
        >>> bool((found.predicted - found.bulk).abs().max() < 0.2)
        True

    Args:
        query, key: after position encoding; the bulk is what lies between the first `n_sinks` keys
            and the last `window` keys of the first of these queries, the same for all of them.
        given: mean and covariance from elsewhere (other prompts), instead of this bulk's own.

    Raises:
        ValueError: a sequence that is not longer than the local keys.
        NumericalError: NaN in query or key.
    """
    q, k = torch.as_tensor(query).float(), torch.as_tensor(key).float()
    if not (torch.isfinite(q).all() and torch.isfinite(k).all()):
        raise NumericalError("query or key contains NaN or infinity; recompute them in float32.")
    n_queries, n_keys = q.shape[-2], k.shape[-2]
    first, last = int(n_sinks), n_keys - n_queries + 1 - int(window)
    if last <= first or int(window) < 1:
        raise ValueError(
            f"{n_keys} keys are not more than {first} first and {int(window)} last ones before "
            f"{n_queries} queries: there is no bulk; give a longer prompt or a smaller window."
        )
    scale = q.shape[-1] ** -0.5 if scaling is None else float(scaling)
    scores = q @ k.transpose(-1, -2) * scale
    position = torch.arange(n_keys, device=k.device)
    row = position[n_keys - n_queries :, None]
    bulk = (position >= first) & (position < last)
    local = ~bulk & (position <= row)
    inside = scores[..., first:last]
    centered = inside - inside.mean(-1, keepdim=True)
    spread = centered.square().mean(-1).sqrt().clamp_min(1e-12)
    mean, covariance = moments(k[..., first:last, :]) if given is None else given
    return Mass(
        scores.masked_fill(~local, -torch.inf).logsumexp(-1), inside.logsumexp(-1),
        predicted_mass(q, mean, covariance, last - first, scale),
        (centered / spread[..., None]).pow(3).mean(-1),
    )


def local_share(
    local: Float[Tensor | np.ndarray, "*batch query"],
    bulk: Float[Tensor | np.ndarray, "*batch query"],
) -> Float[Tensor, "*batch query"]:
    """Share of the attention mass on local keys, from log masses.

    Example:
        >>> local_share(torch.tensor([0.0]), torch.tensor([0.0]))
        tensor([0.5000])

    A head is local for a query if this is at least tau (swept: 0.5 to 0.99, no universal value).
    """
    return torch.sigmoid(torch.as_tensor(local).float() - torch.as_tensor(bulk).float())


def measure(
    model: Model,
    prompts: Sequence[Prompt],
    *,
    n_queries: SupportsIndex = 16,
    n_sinks: SupportsIndex = N_SINKS,
    window: SupportsIndex = WINDOW,
    tau: SupportsFloat = 0.9,
    other_moments: bool = False,
) -> Result:
    """Local share of every head at the last queries of every prompt: oracle and Gaussian rule.

    Example:
        >>> import interp
        >>> model = interp.open_model("backcopy-1l")
        >>> prompts = [Prompt.from_tokens(np.arange(40) % 30 + 3)]
        >>> found = measure(model, prompts, n_queries=4, n_sinks=2, window=8)
        >>> found["oracle"].dims
        ('sample', 'layer', 'head', 'query')

    Args:
        n_queries: the last rows of every prompt.
        tau: a head is local for a query from this share on.
        other_moments: mean and covariance of the keys from all other prompts (a calibration set)
            instead of the prompt's own.

    Returns:
        `oracle`, `predicted` (shares of mass on local keys), `log_bulk`, `log_predicted`,
        `skewness` [sample, layer, head, query]; `score` [layer, head]: how often the oracle calls
        the head long-context (one minus its local frequency), with `frequency`, `null` (the mass
        of far keys if all keys were equal), `standard_error`, `eligible` (all: heads with a short
        window are refused).

    Raises:
        PromptError: prompts shorter than window, sinks and queries together.
        ModelRefused: attention that is not a plain softmax over all earlier keys.

    Costs O(queries x keys x d) per head; a layer's keys of one prompt are held at a time.
    """
    count, least = int(n_queries), int(n_queries) + int(n_sinks) + int(window) + 1
    for number, prompt in enumerate(prompts):
        if len(prompt) < least:
            raise PromptError(
                f"prompt {number} has {len(prompt)} tokens, but {least} are needed for a bulk of "
                "far keys; give longer prompts or a smaller window."
            )
    if not prompts or (other_moments and len(prompts) < 2):
        raise PromptError("no prompts: give at least one, and two for moments of other prompts.")
    group = model.n_heads // model.n_kv_heads
    names = ("oracle", "predicted", "log_bulk", "log_predicted", "skewness")
    shape = (len(prompts), model.n_layers, model.n_heads, count)
    data = {name: np.full(shape, np.nan, dtype=np.float32) for name in names}
    uniform = []
    for layer in range(model.n_layers):
        own = [read_layer(model, prompt, layer, range(len(prompt) - count, len(prompt)))
               for prompt in prompts]
        keys = [one.key.transpose(0, 1) for one in own]
        # Moments belong to key-value heads; query heads that share them get the same ones.
        bulks = [k[::group, int(n_sinks) : k.shape[1] - count + 1 - int(window)] for k in keys]
        for number, (one, k) in enumerate(zip(own, keys)):
            rest = bulks[number] if not other_moments else torch.cat(
                [b for i, b in enumerate(bulks) if i != number], 1)
            mean, covariance = (x.repeat_interleave(group, 0) for x in moments(rest))
            found = masses(one.query.transpose(0, 1), k, n_sinks=n_sinks, window=window,
                           scaling=one.scaling, given=(mean, covariance))
            values = (local_share(found.local, found.bulk),
                      local_share(found.local, found.predicted), found.bulk, found.predicted,
                      found.skewness)
            for name, value in zip(names, values):
                data[name][number, layer] = value.numpy()
            uniform.append(bulks[number].shape[1] / k.shape[1])
    axes = ("sample", "layer", "head", "query")
    made = xr.Dataset({name: (axes, value) for name, value in data.items()}, {
        "sample": np.arange(len(prompts)), "layer": np.arange(model.n_layers),
        "head": np.arange(model.n_heads), "query": np.arange(-count, 0)})
    far = (made["oracle"] < float(tau)).mean("query")
    made["score"] = made["frequency"] = far.mean("sample")
    made["standard_error"] = far.std("sample", ddof=1) / np.sqrt(len(prompts)) \
        if len(prompts) > 1 else xr.full_like(made["score"], np.nan)
    made["null"] = xr.full_like(made["score"], float(np.mean(uniform)))
    made["eligible"] = xr.full_like(made["score"], True, dtype=bool)
    return Result(made, {**model.manifest(), "measure": "long_context", "n_sinks": int(n_sinks),
                         "window": int(window), "tau": float(tau), "n_queries": count,
                         "moments": "other prompts" if other_moments else "own prompt",
                         "n_prompts": len(prompts)})


def errors(found: Result, tau: SupportsFloat) -> dict[str, float]:
    """How the Gaussian rule errs at a threshold: rates of wrong calls, positive = needs far keys.

    Example:
        >>> import interp
        >>> model = interp.open_model("backcopy-1l")
        >>> made = measure(model, [Prompt.from_tokens(np.arange(40) % 30 + 3)], n_queries=4,
        ...                n_sinks=2, window=8)
        >>> sorted(errors(made, 0.9))
        ['false_negative', 'false_positive', 'local_oracle', 'local_predicted']
    """
    true = found["oracle"].values < float(tau)
    said = found["predicted"].values < float(tau)
    return {
        "false_positive": float((said & ~true).sum() / max(1, (~true).sum())),
        "false_negative": float((~said & true).sum() / max(1, true.sum())),
        "local_oracle": float((~true).mean()), "local_predicted": float((~said).mean()),
    }


def draw(found: Result, ax: Axes) -> Axes:
    """Log mass of the far keys, predicted against true, a dot per head, query and prompt."""
    true, said = (found[name].values.ravel() for name in ("log_bulk", "log_predicted"))
    keep = np.linspace(0, len(true) - 1, min(len(true), 4000)).astype(int)
    ax.plot(true[keep], said[keep], ".", markersize=2, color=color("needle"), alpha=0.4)
    ends = [float(np.min([true, said])), float(np.max([true, said]))]
    ax.plot(ends, ends, color=color("control"), linestyle=":")
    ax.set_xlabel("log mass of far keys, true")
    ax.set_ylabel("predicted by two moments")
    return ax
