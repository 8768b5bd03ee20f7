"""Attention rollout: attention of all layers multiplied into one map from outputs to inputs.

Paper     arXiv:2005.00928
Question  Which input positions does a position's state after layer l come from?
Measure   R_l = A_l R_(l-1), with the residual connection added to every layer's attention
Cause     none: rollout is correlational and ignores MLPs and norms; report it beside a knockout
"""

from typing import SupportsIndex

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from interp.core.errors import NumericalError, OutOfRange


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


def rollout_row(
    attention: Float[Tensor | np.ndarray, "layer query key"],
    query: SupportsIndex,
    residual: bool | float | Float[Tensor | np.ndarray, "layer query"] = True,
) -> Float[Tensor, "key"]:
    """The last layer's rollout for one position, at the cost of vectors instead of matrices.

    Example:
        >>> attention = torch.tensor([[[1.0, 0.0], [1.0, 0.0]]]).repeat(2, 1, 1)
        >>> rollout_row(attention, 1)
        tensor([0.7500, 0.2500], dtype=torch.float64)

    Raises:
        OutOfRange: a query that does not exist.
    """
    maps = with_residual(attention, residual)
    position = int(query)
    if not 0 <= position < maps.shape[-1]:
        raise OutOfRange(f"query {position} is outside the {maps.shape[-1]} positions.")
    row = maps[-1, position]
    for layer in range(len(maps) - 2, -1, -1):
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
    uniform = seen / seen.sum(-1, keepdim=True)
    return rollout(uniform.expand(int(n_layers), n, n), residual)
