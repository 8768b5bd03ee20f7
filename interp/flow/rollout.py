"""Attention rollout: attention of all layers multiplied into one map from outputs to inputs.

Paper     arXiv:2005.00928
Question  Which input positions does a position's state after layer l come from?
Measure   R_l = A_l R_(l-1), with the residual connection added to every layer's attention; beside it
          the same with measured norms, and with uniform attention (what the mask alone does)
Cause     none: rollout is correlational and ignores MLPs and norms; report it beside a knockout
"""

from collections.abc import Mapping, Sequence
from typing import Any, SupportsIndex, Union

import numpy as np
import torch
import xarray as xr
from jaxtyping import Float
from matplotlib.axes import Axes
from torch import Tensor

from interp.core import Prompt, PromptError, Result, SiteRefused
from interp.core.errors import NumericalError, OutOfRange
from interp.core.prompt import Where
from interp.figures import layer_curve
from interp.flow.mixing import residual_share, token_weights, transformed, value_weighted
from interp.models.model import Model

VARIANTS = ("raw", "rollout", "norms", "values", "transformed")
"""Attention itself; its rollout; with the measured share of the residual; also with the norms of
what is moved instead of the weights; with attention weighted by how tokens are transformed."""
MEMORY = 512 * 2**20
"""Bytes that attention maps of one prompt may take."""


def with_residual(
    attention: Float[Tensor | np.ndarray, "layer query key"],
    residual: bool | float | Float[Tensor | np.ndarray, "layer query"] = True,
) -> Float[Tensor, "layer query key"]:
    """Attention with the residual connection as a self-edge, rows normalized to one.

    Example:
        >>> with_residual(torch.tensor([[[1.0, 0.0], [0.5, 0.5]]]))
        tensor([[[1.0000, 0.0000],
                 [0.2500, 0.7500]]], dtype=torch.float64)

    Args:
        attention: one map per layer, heads already averaged.
        residual: True adds the identity and normalizes each row (half and half where rows sum to
            one, the paper's guess); False leaves the attention as it is; a number or
            `[layer, query]` is the residual's share, for example a measured ratio of norms.

    Returns:
        float64.

    Raises:
        ValueError: maps that are not square, or a share outside [0, 1].
        NumericalError: NaN in the attention.

    Source: arXiv:2005.00928.
    """
    maps = torch.as_tensor(attention).double()
    n = maps.shape[-1]
    if maps.shape[-2] != n:
        raise ValueError(
            f"attention must be square in [layer, query, key], not {maps.shape[-2]} by {n}: "
            "rollout multiplies the layers' maps."
        )
    if not torch.isfinite(maps).all():
        raise NumericalError("attention contains NaN or infinity; recompute it in float32.")
    if residual is False:
        return maps
    identity = torch.eye(n, dtype=maps.dtype, device=maps.device)
    if residual is True:
        added = maps + identity
        return added / added.sum(-1, keepdim=True)
    share = torch.as_tensor(residual, dtype=maps.dtype, device=maps.device)
    if float(share.min()) < 0 or float(share.max()) > 1:
        raise ValueError("the residual's share must lie between 0 and 1.")
    share = share[..., None] if share.ndim else share
    total = maps.sum(-1, keepdim=True)
    rows = maps / torch.where(total > 0, total, torch.ones_like(total))
    return share * identity + (1 - share) * rows


def rollout(
    attention: Float[Tensor | np.ndarray, "layer query key"],
    residual: bool | float | Float[Tensor | np.ndarray, "layer query"] = True,
) -> Float[Tensor, "layer query key"]:
    """Relevance of every input position for every position after each layer.

    Example:
        >>> attention = torch.tensor([[[1.0, 0.0], [1.0, 0.0]]]).repeat(2, 1, 1)
        >>> rollout(attention)[:, 1]
        tensor([[0.5000, 0.5000],
                [0.7500, 0.2500]], dtype=torch.float64)

    Args:
        attention, residual: as in `with_residual`.

    Returns:
        `[layer, query, key]` in float64: row [l, i] is the relevance of the inputs for position i
        after layer l. Rows sum to one if the attention's do.

    In a causal model even uniform attention rolls out to the first positions: divide by, or
    compare with, `uniform_rollout`.

    Source: arXiv:2005.00928, R_0 = A_0 and R_l = A_l R_(l-1).
    """
    maps = with_residual(attention, residual)
    rolled = torch.empty_like(maps)
    for layer in range(len(maps)):
        rolled[layer] = maps[layer] @ rolled[layer - 1] if layer else maps[layer]
    return rolled


def rollout_rows(
    attention: Float[Tensor | np.ndarray, "layer query key"],
    queries: Union[SupportsIndex, Sequence[SupportsIndex]],
    residual: bool | float | Float[Tensor | np.ndarray, "layer query"] = True,
) -> Float[Tensor, "layer key"]:
    """The rollout of one position after every layer, or the mean over some of them.

    Example:
        >>> attention = torch.tensor([[[1.0, 0.0], [1.0, 0.0]]]).repeat(2, 1, 1)
        >>> rollout_rows(attention, 1)
        tensor([[0.5000, 0.5000],
                [0.7500, 0.2500]], dtype=torch.float64)

    Each row is a product of a vector and matrices: layers^2 n^2 operations, none of n^3.
    """
    maps = with_residual(attention, residual)
    start = _start(queries, maps)
    found = []
    for top in range(len(maps)):
        row = start
        for layer in range(top, -1, -1):
            row = row @ maps[layer]
        found.append(row)
    return torch.stack(found)


def rollout_row(
    attention: Float[Tensor | np.ndarray, "layer query key"],
    query: SupportsIndex,
    residual: bool | float | Float[Tensor | np.ndarray, "layer query"] = True,
) -> Float[Tensor, "key"]:
    """The last layer's rollout for one position: layers n^2 operations instead of layers n^3.

    Example:
        >>> attention = torch.tensor([[[1.0, 0.0], [1.0, 0.0]]]).repeat(2, 1, 1)
        >>> rollout_row(attention, 1)
        tensor([0.7500, 0.2500], dtype=torch.float64)

    Raises:
        OutOfRange: a query that does not exist.
    """
    maps = with_residual(attention, residual)
    row = _start(query, maps)
    for layer in range(len(maps) - 1, -1, -1):
        row = row @ maps[layer]
    return row


def uniform_rollout(
    n_layers: SupportsIndex, n_positions: SupportsIndex, residual: bool | float = True
) -> Float[Tensor, "layer query key"]:
    """Rollout of uniform causal attention: what the causal mask alone does.

    Example:
        >>> uniform_rollout(3, 2)[-1, 1]
        tensor([0.5781, 0.4219], dtype=torch.float64)
    """
    n = int(n_positions)
    seen = torch.ones(n, n, dtype=torch.float64).tril()
    return rollout(uniform(seen).expand(int(n_layers), n, n), residual)


def uniform(
    attention: Float[Tensor | np.ndarray, "*layer query key"]
) -> Float[Tensor, "*layer query key"]:
    """Attention spread evenly over the keys that each row sees: the null of any mask.

    Example:
        >>> uniform(torch.tensor([[1.0, 0.0], [0.9, 0.1]]))
        tensor([[1.0000, 0.0000],
                [0.5000, 0.5000]], dtype=torch.float64)
    """
    seen = (torch.as_tensor(attention) > 0).double()
    return seen / seen.sum(-1, keepdim=True).clamp_min(1)


def without(
    relevance: Float[Tensor | np.ndarray, "*row key"], positions: Sequence[SupportsIndex] = (0,)
) -> Float[Tensor, "*row key"]:
    """Rows with some keys taken out, the others scaled to sum to one: BOS and other sinks aside.

    Example:
        >>> without(torch.tensor([0.5, 0.25, 0.25]))
        tensor([0.0000, 0.5000, 0.5000], dtype=torch.float64)

    A row with nothing left stays zero.
    """
    rows = torch.as_tensor(relevance).double().clone()
    rows[..., [_position(p, rows.shape[-1]) for p in positions]] = 0.0
    total = rows.sum(-1, keepdim=True)
    return rows / torch.where(total > 0, total, torch.ones_like(total))


def beyond_mask(
    relevance: Float[Tensor | np.ndarray, "*row key"],
    null: Float[Tensor | np.ndarray, "*row key"],
) -> Float[Tensor, "*row key"]:
    """Relevance over that of uniform attention: 1 is what the mask gives; NaN where it gives none.

    Example:
        >>> beyond_mask(torch.tensor([0.8, 0.2, 0.0]), torch.tensor([0.4, 0.6, 0.0]))
        tensor([2.0000, 0.3333,    nan], dtype=torch.float64)
    """
    given, base = torch.as_tensor(relevance).double(), torch.as_tensor(null).double()
    return torch.where(base > 0, given / base.clamp_min(1e-300), torch.nan)


# -- on a model -------------------------------------------------------------------------------------


def attention_maps(
    model: Model,
    prompt: Prompt,
    *,
    outputs: Sequence[Float[Tensor, "head d_head d_model"]] = (),
    memory: SupportsIndex = MEMORY,
) -> dict[str, Float[Tensor, "layer query key"]]:
    """Every layer's attention, heads averaged: `mean`; with `outputs` also the `value_weighted` maps.

    Example:
        >>> import interp
        >>> model = interp.open_model("backcopy-3l")
        >>> attention_maps(model, Prompt.from_tokens(range(3, 9)))["mean"].shape
        torch.Size([3, 6, 6])

    For short prompts: as many layers are read in one pass as fit into `memory` bytes.

    Args:
        outputs: `model.w_o(layer)` of every layer, for the maps `values`.

    Raises:
        PromptError: the averaged maps, or all heads of one layer, do not fit.
    """
    n, n_layers, values = len(prompt), model.n_layers, len(outputs) > 0
    layer_bytes, kept = 4 * model.n_heads * n * n, (16 if values else 8) * n_layers * n * n
    at_once = (int(memory) - kept) // layer_bytes
    if at_once < 1:
        longest = int((int(memory) / (layer_bytes + kept)) ** 0.5 * n)
        raise PromptError(
            f"attention maps of {n} positions in {n_layers} layers take "
            f"{(kept + layer_bytes) / 2**20:.0f} MiB, and {int(memory) / 2**20:.0f} are allowed; cut "
            f"the prompt to {longest} tokens, or allow more memory."
        )
    found: dict[str, list[Tensor]] = {"mean": [], **({"values": []} if values else {})}
    for first in range(0, n_layers, at_once):
        layers = range(first, min(n_layers, first + at_once))
        sites = [f"{name}.{layer}" for layer in layers
                 for name in (("pattern", "v") if values else ("pattern",))]
        reads = model.run(prompt, read=sites, logits="none").reads
        for layer in layers:
            pattern = torch.as_tensor(reads[f"pattern.{layer}"].values[0, 0])
            found["mean"].append(pattern.double().mean(0))
            if values:
                v = reads[f"v.{layer}"].values[0, 0]
                found["values"].append(value_weighted(pattern, v, outputs[layer].float().cpu()))
    return {name: torch.stack(maps) for name, maps in found.items()}


def measure(
    model: Model,
    prompts: Union[Prompt, Sequence[Prompt]],
    *,
    queries: Union[Where, Sequence[Where]] = "last",
    variants: Sequence[str] = VARIANTS,
    memory: SupportsIndex = MEMORY,
) -> Result:
    """Relevance of every input for the queries after each layer, by raw attention and rollouts.

    Example:
        >>> import interp
        >>> model = interp.open_model("backcopy-3l")
        >>> found = measure(model, Prompt.from_tokens(range(3, 9)), variants=("raw", "rollout"))
        >>> found["relevance"].dims, found["uniform"].dims
        (('prompt', 'variant', 'layer', 'key'), ('prompt', 'layer', 'key'))

    Args:
        queries: positions whose rows are averaged; a list gives every prompt its own.
        variants: of `VARIANTS`.

    Returns:
        `relevance`, and `uniform`, the rollout of even attention over the same visible keys. Shorter
        prompts are NaN at the end. Where a variant is refused (no output matrix per head) it is NaN
        and the manifest says why.
    """
    given = [prompts] if isinstance(prompts, Prompt) else list(prompts)
    if not given:
        raise PromptError("no prompts to run: give at least one.")
    for name in variants:
        if name not in VARIANTS:
            raise ValueError(f"there is no variant {name!r}; choose from: {', '.join(VARIANTS)}.")
    where: list[Any] = list(queries) if isinstance(queries, list) else [queries] * len(given)
    if len(where) != len(given):
        raise PromptError(f"queries for {len(where)} prompts, but {len(given)} prompts.")
    longest = max(map(len, given))
    shape = (len(given), len(variants), model.n_layers, longest)
    relevance, null, refused = np.full(shape, np.nan), np.full((shape[0], *shape[2:]), np.nan), {}
    outputs: list[Tensor] = []
    if "values" in variants:
        try:
            outputs = [model.w_o(layer) for layer in range(model.n_layers)]
        except SiteRefused as error:
            refused["values"] = str(error)
    for number, (prompt, of) in enumerate(zip(given, where)):
        rows = prompt.positions(of)
        maps = attention_maps(model, prompt, outputs=outputs, memory=memory)
        made = _made(model, prompt, maps, rows, variants)
        for column, name in enumerate(variants):
            if name in made:
                relevance[number, column, :, : len(prompt)] = made[name].numpy()
        null[number, :, : len(prompt)] = rollout_rows(uniform(maps["mean"]), rows).numpy()
    data = xr.Dataset(
        {"relevance": (("prompt", "variant", "layer", "key"), relevance),
         "uniform": (("prompt", "layer", "key"), null)},
        {"variant": list(variants), "layer": np.arange(model.n_layers), "key": np.arange(longest)})
    return Result(data, {**model.manifest(), "measure": "rollout", "refused": refused,
                         "queries": [list(p.positions(w)) for p, w in zip(given, where)],
                         "prompts": [prompt.digest() for prompt in given]})


def _made(
    model: Model, prompt: Prompt, maps: Mapping[str, Tensor], rows: tuple[int, ...],
    variants: Sequence[str],
) -> dict[str, Tensor]:
    """The rows `[layer, key]` of every variant that can be made."""
    mean = maps["mean"]
    made = {"raw": mean[:, list(rows)].mean(1), "rollout": rollout_rows(mean, rows)}
    if {"norms", "values", "transformed"} & set(variants):
        reads = model.run(prompt, read=("resid_pre", "attn_out", "resid_post"), logits="none").reads
        before, added, after = (torch.as_tensor(reads[name].values[0])
                                for name in ("resid_pre", "attn_out", "resid_post"))
        share = residual_share(before, added)
        made["norms"] = rollout_rows(mean, rows, share)
        if "values" in maps:
            made["values"] = rollout_rows(maps["values"], rows, share)
        made["transformed"] = rollout_rows(transformed(mean, token_weights(before, after)), rows)
    return {name: made[name] for name in variants if name in made}


def draw(found: Result, ax: Axes, *, positions: Sequence[SupportsIndex] = (0,)) -> Axes:
    """Relevance of the first position (or others) by layer, the mask's own share in gray."""
    chosen = [int(p) for p in positions]
    curves: dict[str, Any] = {
        str(name): found["relevance"].sel(variant=name, key=chosen).sum("key")
        for name in found["variant"].values
        if bool(found["relevance"].sel(variant=name).notnull().any())}
    curves["uniform attention"] = found["uniform"].sel(key=chosen).sum("key")
    what = "the first position" if chosen == [0] else f"positions {chosen}"
    return layer_curve.draw(ax, curves, label=f"relevance of {what}",
                            roles={"uniform attention": "control"})


def _start(queries: Any, maps: Tensor) -> Tensor:
    """Equal shares on the queries."""
    n = maps.shape[-1]
    given = list(queries) if isinstance(queries, Sequence) else [queries]
    chosen = sorted({_position(q, n) for q in given})
    start = maps.new_zeros(n)
    start[chosen] = 1 / len(chosen)
    return start


def _position(given: SupportsIndex, n: int) -> int:
    position = int(given)
    if not 0 <= position < n:
        raise OutOfRange(f"query {position} is outside the {n} positions.")
    return position
