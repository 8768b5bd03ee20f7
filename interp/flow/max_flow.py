"""Attention flow: the largest amount that can flow from an input to a position through attention.

Paper     arXiv:2005.00928
Question  Which inputs can a position's state come from, if attention weights are pipe capacities?
Measure   maximum flow from the position after layer l down to each input, one flow per input
Cause     none: capacities are attention, not information; report it beside a knockout
"""

from collections.abc import Sequence
from typing import Optional, SupportsIndex

import numpy as np
import torch
from jaxtyping import Float
from scipy.sparse import coo_array, csr_array
from scipy.sparse.csgraph import maximum_flow
from torch import Tensor

from interp.core.errors import OutOfRange
from interp.flow.rollout import with_residual

SCALE = 2**30
"""Capacities are rounded to multiples of 1/SCALE, since the solver counts in 32-bit integers. By
max-flow min-cut a flow is then off by at most half a unit per edge of a cut: E / 2**31 for E
edges, 6e-5 at the very worst for 32 layers of 64 positions and in practice far less."""


def flow(
    attention: Float[Tensor | np.ndarray, "layer query key"],
    residual: bool = True,
    queries: Optional[Sequence[SupportsIndex]] = None,
) -> Float[Tensor, "layer query key"]:
    """Maximum flow from every position after each layer to every input, rows normalized.

    Example:
        >>> attention = torch.tensor([[[1.0, 0.0], [1.0, 0.0]]]).repeat(2, 1, 1)
        >>> flow(attention)[:, 1]
        tensor([[0.5000, 0.5000],
                [0.6667, 0.3333]], dtype=torch.float64)

    Position 1 can draw its whole unit from input 0 (half directly, half a layer later), but only
    half a unit from input 1.

    Args:
        attention: one map per layer, heads already averaged.
        residual: add the identity and normalize rows, as in `interp.flow.rollout`.
        queries: positions to compute; the rows of the others are NaN. All if None.

    Returns:
        `[layer, query, key]` in float64. Each input has a flow of its own, so that values are
        comparable within a row only; a row from which nothing flows is zero.

    Cost: one flow per (layer, query, input). Pool long prompts into segments first, or ask for
    `flow_into` a set of inputs.

    Source: arXiv:2005.00928; equals the released code `attention_flow` (capacities from attention
    with residual, source at the position, sink at the input, row divided by its sum).
    """
    maps = _capacities(attention, residual)
    n = maps.shape[-1]
    chosen = range(n) if queries is None else sorted({_position(q, n) for q in queries})
    found = torch.full_like(maps, float("nan"))
    for layer in range(len(maps)):
        below = maps[: layer + 1]
        graph = _graph(below) if layer > 1 else None
        for query in chosen:
            found[layer, query] = _row(below, query, graph)
    total = found.sum(-1, keepdim=True)
    return found / torch.where(total > 0, total, torch.ones_like(total))


def flow_into(
    attention: Float[Tensor | np.ndarray, "layer query key"],
    inputs: Sequence[SupportsIndex],
    query: SupportsIndex,
    residual: bool = True,
) -> float:
    """Maximum flow from one position after the last layer into a set of inputs together.

    Example:
        >>> attention = torch.tensor([[[1.0, 0.0], [1.0, 0.0]]]).repeat(2, 1, 1)
        >>> flow_into(attention, [1], 1), flow_into(attention, [0, 1], 1)
        (0.5, 1.0)

    One flow, however many inputs: all visual tokens, or the tokens of an object. Not normalized.
    """
    maps = _capacities(attention, residual)
    n = maps.shape[-1]
    targets = sorted({_position(i, n) for i in inputs})
    if not targets:
        raise ValueError("no inputs: give at least one position.")
    drain = (len(maps) + 1) * n
    return _maximum(_graph(maps, targets), len(maps) * n + _position(query, n), drain)


def _capacities(attention: Tensor | np.ndarray, residual: bool) -> Tensor:
    maps = with_residual(attention, residual).cpu()
    if float(maps.amin()) < 0 or float(maps.sum(-1).amax()) > 1.01:
        raise ValueError(
            "attention must be probabilities: no weight below 0 and no row above 1; average the "
            "heads after the softmax."
        )
    return maps


def _row(maps: Tensor, query: int, graph: Optional[csr_array]) -> Tensor:
    """Flows from (top, query) to each input, not normalized; the graph is for three layers on."""
    if graph is None:
        if len(maps) == 1:
            return maps[0, query]
        # Two layers: paths share no edge, so each carries its smaller capacity.
        return torch.minimum(maps[1, query][:, None], maps[0]).sum(0)
    depth, n, _ = maps.shape
    reach = torch.eye(n, dtype=torch.bool)[query]
    for layer in range(depth - 1, -1, -1):
        reach = (maps[layer][reach] > 0).any(0)
    flows = torch.zeros(n, dtype=maps.dtype)
    for target in reach.nonzero().flatten().tolist():
        flows[target] = _maximum(graph, depth * n + query, target)
    return flows


def _graph(maps: Tensor, targets: Sequence[int] = ()) -> csr_array:
    """Nodes (level, position), edge (l + 1, i) -> (l, j) of capacity A_l[i, j]; with targets one
    more node that all of them drain into."""
    depth, n, _ = maps.shape
    layer, query, key = (index.numpy() for index in maps.nonzero(as_tuple=True))
    start, stop = (layer + 1) * n + query, layer * n + key
    capacity = np.rint(maps[maps != 0].numpy() * SCALE)
    start = np.concatenate([start, np.asarray(targets, dtype=start.dtype)])
    stop = np.concatenate([stop, np.full(len(targets), (depth + 1) * n)])
    capacity = np.concatenate([capacity, np.full(len(targets), 2 * SCALE - 1)]).astype(np.int32)
    size = (depth + 1) * n + 1
    return csr_array(coo_array((capacity, (start, stop)), shape=(size, size)))


def _maximum(graph: csr_array, source: int, sink: int) -> float:
    return float(maximum_flow(graph, source, sink).flow_value) / SCALE


def _position(given: SupportsIndex, n: int) -> int:
    position = int(given)
    if not 0 <= position < n:
        raise OutOfRange(f"position {position} is outside the {n} positions.")
    return position
