"""Attention flow: the largest amount that can flow from an input to a position through attention.

Paper     arXiv:2005.00928
Question  Which inputs can a position's state come from, if attention weights are pipe capacities?
Measure   maximum flow from the position after layer l down to each input, one flow per input
Cause     none: capacities are attention, not information; report it beside a knockout
"""

from collections.abc import Mapping, Sequence
from typing import Any, Optional, SupportsIndex, Union

import numpy as np
import torch
import xarray as xr
from jaxtyping import Float
from matplotlib.axes import Axes
from scipy.sparse import coo_array, csr_array
from scipy.sparse.csgraph import maximum_flow
from torch import Tensor

from interp.core import Prompt, PromptError, Result
from interp.core.errors import OutOfRange
from interp.core.prompt import Where
from interp.figures import heat
from interp.flow.rollout import MEMORY, attention_maps, with_residual
from interp.models.model import Model

SCALE = 2**30
"""Capacities are rounded to multiples of 1/SCALE, since the solver counts in 32-bit integers; see
`rounding_bound`. With k sources a unit is k times as large."""
MOST_POSITIONS, MOST_EDGES = 256, 10_000_000
"""Above these, one flow per input, and any flow at all, take too long."""
Residual = Union[bool, float, Float[Tensor | np.ndarray, "layer query"]]
Positions = Union[SupportsIndex, Sequence[SupportsIndex]]


def flow(
    attention: Float[Tensor | np.ndarray, "layer query key"],
    residual: Residual = True,
    queries: Optional[Sequence[SupportsIndex]] = None,
    layers: Optional[Sequence[SupportsIndex]] = None,
    limit: SupportsIndex = MOST_POSITIONS,
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
        residual: as in `interp.flow.rollout`: True adds the identity and normalizes rows.
        queries, layers: rows to compute; the others are NaN. All if None.
        limit: positions above which it is refused.

    Returns:
        `[layer, query, key]` in float64. Each input has a flow of its own, so that values are
        comparable within a row only; a row from which nothing flows is zero.

    Cost: one flow per (layer, query, input); ask for the flow into sets of inputs of long prompts.

    Raises:
        PromptError: more positions than `limit`.

    Source: arXiv:2005.00928; equals the released code `attention_flow` (capacities from attention
    with residual, source at the position, sink at the input, row divided by its sum).
    """
    maps = _capacities(attention, residual)
    n = maps.shape[-1]
    if n > int(limit):
        raise PromptError(
            f"attention flow of {n} positions is one maximum flow per input and layer, and at most "
            f"{int(limit)} positions are allowed; use flow_into a set of inputs, pooled_flow, or a "
            "shorter prompt."
        )
    chosen = range(n) if queries is None else sorted({_position(q, n) for q in queries})
    wanted = range(len(maps)) if layers is None else sorted(
        {_position(x, len(maps), "layer", "layers") for x in layers})
    found = torch.full_like(maps, float("nan"))
    for layer in wanted:
        below = maps[: layer + 1]
        graph = _graph(below) if layer > 1 else None
        for query in chosen:
            found[layer, query] = _row(below, query, graph)
    total = found.sum(-1, keepdim=True)
    return found / torch.where(total > 0, total, torch.ones_like(total))


def flow_into(
    attention: Float[Tensor | np.ndarray, "layer query key"],
    inputs: Sequence[SupportsIndex],
    query: Positions,
    residual: Residual = True,
) -> float:
    """Maximum flow from one position (or several) after the last layer into a set of inputs.

    Example:
        >>> attention = torch.tensor([[[1.0, 0.0], [1.0, 0.0]]]).repeat(2, 1, 1)
        >>> flow_into(attention, [1], 1), flow_into(attention, [0, 1], 1)
        (0.5, 1.0)
        >>> flow_into(attention, [0, 1], [0, 1])
        1.5

    One flow, however many inputs: all visual tokens, or the tokens of an object. Several queries
    send one unit each, through one super-source; where they meet (here in position 0) no more than
    one unit passes. Not normalized.

    Raises:
        PromptError: a graph of more than `MOST_EDGES` edges.
    """
    maps = _capacities(attention, residual)
    n = maps.shape[-1]
    targets = sorted({_position(i, n) for i in inputs})
    if not targets:
        raise ValueError("no inputs: give at least one position.")
    given = list(query) if isinstance(query, Sequence) else [query]
    sources = sorted({_position(q, n) for q in given})
    if not sources:
        raise ValueError("no query: give at least one position.")
    if len(maps) == 1:
        return float(maps[0, sources][:, targets].sum())
    if len(maps) == 2:
        # Every middle position passes on the smaller of what reaches it and what it can give.
        reached = maps[1, sources].sum(0)
        return float(torch.minimum(reached, maps[0][:, targets].sum(-1)).sum())
    scale = SCALE // len(sources)
    graph = _graph(maps, targets, sources, scale)
    return _maximum(graph, (len(maps) + 1) * n + 1, (len(maps) + 1) * n, scale)


def flow_into_groups(
    attention: Float[Tensor | np.ndarray, "layer query key"],
    groups: Mapping[str, Sequence[SupportsIndex]],
    query: Positions,
    residual: Residual = True,
) -> dict[str, float]:
    """The flow into every one of several sets of inputs: exact, at one flow per set.

    Example:
        >>> attention = torch.tensor([[[1.0, 0.0], [1.0, 0.0]]]).repeat(2, 1, 1)
        >>> flow_into_groups(attention, {"first": [0], "both": [0, 1]}, 1)
        {'first': 1.0, 'both': 1.0}

    They do not add up: each set may use the whole capacity.
    """
    return {name: flow_into(attention, inputs, query, residual)
            for name, inputs in groups.items()}


def pooled_flow(
    attention: Float[Tensor | np.ndarray, "layer query key"],
    groups: Sequence[Sequence[SupportsIndex]],
    query: SupportsIndex,
    residual: Residual = True,
) -> Float[Tensor, "group"]:
    """An upper bound of the flow into every group, on a graph with one node per group and layer.

    Example:
        >>> attention = torch.tensor([[[1.0, 0.0], [1.0, 0.0]]]).repeat(3, 1, 1)
        >>> pooled_flow(attention, [[0], [1]], 1)
        tensor([1.0000, 0.5000], dtype=torch.float64)

    For prompts too long for `flow_into`: positions of a group become one node in every layer, with
    the sum of their capacities; the query stays by itself above the last layer, and positions in no
    group are nodes of their own. Whatever could flow still can, so the bound holds; it is exact
    where groups are single positions.

    Raises:
        ValueError: a position in two groups.
    """
    maps = _capacities(attention, residual)
    n = maps.shape[-1]
    sets = [sorted({_position(p, n) for p in group}) for group in groups]
    taken = [p for group in sets for p in group]
    if len(taken) > len(set(taken)) or not all(sets):
        raise ValueError("groups must not be empty or share positions.")
    nodes = sets + [[p] for p in range(n) if p not in set(taken)]
    member = torch.zeros(n, len(nodes), dtype=maps.dtype)
    for number, group in enumerate(nodes):
        member[group, number] = 1.0
    merged = [member.T @ one @ member for one in maps]
    top = torch.zeros(len(nodes), len(nodes), dtype=maps.dtype)
    top[0] = maps[-1, _position(query, n)] @ member
    merged[-1] = top
    capacities = torch.stack(merged)
    # Nothing above 1 can be used: that is all the query sends.
    graph = _graph(capacities.clamp_max(1.0))
    start = len(maps) * len(nodes)
    return torch.tensor([_maximum(graph, start, number) for number in range(len(sets))],
                        dtype=maps.dtype)


def rounding_bound(
    attention: Float[Tensor | np.ndarray, "layer query key"],
    residual: Residual = True,
    sources: SupportsIndex = 1,
) -> float:
    """The largest error of a flow by rounding capacities to integers.

    Example:
        >>> rounding_bound(torch.eye(4).repeat(3, 1, 1)) == 3 * 4 / 2**31
        True

    By max-flow min-cut a flow changes by no more than the capacities of a cut do: half a unit per
    edge that is not zero. One and two layers are computed in floating point, without rounding.
    """
    edges = int((_capacities(attention, residual) > 0).sum())
    return edges / (2.0 * (SCALE // int(sources)))


def measure(
    model: Model,
    prompts: Union[Prompt, Sequence[Prompt]],
    *,
    queries: Union[Where, Sequence[Where]] = "last",
    layers: Optional[Sequence[SupportsIndex]] = None,
    memory: SupportsIndex = MEMORY,
) -> Result:
    """Attention flow from the queries to every input, `[prompt, layer, key]`, rows normalized.

    Example:
        >>> import interp
        >>> model = interp.open_model("backcopy-3l")
        >>> measure(model, Prompt.from_tokens(range(3, 9)))["flow"].sizes["layer"]
        3

    Args:
        queries: positions whose rows are averaged; a list gives every prompt its own.
        layers: after which blocks; all for None.

    Raises:
        PromptError: prompts that are too long (see `flow`) or do not fit in `memory`.
    """
    given = [prompts] if isinstance(prompts, Prompt) else list(prompts)
    if not given:
        raise PromptError("no prompts to run: give at least one.")
    where: list[Any] = list(queries) if isinstance(queries, list) else [queries] * len(given)
    if len(where) != len(given):
        raise PromptError(f"queries for {len(where)} prompts, but {len(given)} prompts.")
    wanted = list(range(model.n_layers)) if layers is None else sorted({int(x) for x in layers})
    found = np.full((len(given), len(wanted), max(map(len, given))), np.nan)
    bound = 0.0
    for number, (prompt, of) in enumerate(zip(given, where)):
        maps = attention_maps(model, prompt, memory=memory)["mean"]
        rows = list(prompt.positions(of))
        made = flow(maps, queries=rows, layers=wanted)[wanted][:, rows].mean(1)
        found[number, :, : len(prompt)] = made.numpy()
        bound = max(bound, rounding_bound(maps))
    data = xr.Dataset({"flow": (("prompt", "layer", "key"), found)},
                      {"layer": wanted, "key": np.arange(found.shape[-1])})
    return Result(data, {**model.manifest(), "measure": "max_flow", "rounding": bound,
                         "queries": [list(p.positions(w)) for p, w in zip(given, where)],
                         "prompts": [prompt.digest() for prompt in given]})


def draw(found: Result, ax: Axes) -> Axes:
    """Flow into every input by layer, mean over prompts of one length."""
    mean = found["flow"].mean("prompt")
    return heat.draw(ax, mean, x="input position", y="layer", label="attention flow (share)")


def _capacities(attention: Tensor | np.ndarray, residual: Residual) -> Tensor:
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


def _graph(
    maps: Tensor, targets: Sequence[int] = (), sources: Sequence[int] = (), scale: int = SCALE
) -> csr_array:
    """Nodes (level, position), edge (l + 1, i) -> (l, j) of capacity A_l[i, j]; then one node that
    the targets drain into, and one that feeds the sources."""
    depth, n, _ = maps.shape
    layer, query, key = (index.numpy() for index in maps.nonzero(as_tuple=True))
    if len(layer) > MOST_EDGES:
        raise PromptError(
            f"a maximum flow over {len(layer)} edges takes too long, more than {MOST_EDGES} are "
            "refused; merge positions with pooled_flow, or take a shorter prompt."
        )
    drain, feed, open_ = (depth + 1) * n, (depth + 1) * n + 1, 2 * SCALE - 1
    start = np.concatenate([(layer + 1) * n + query, targets, [feed] * len(sources)])
    stop = np.concatenate([layer * n + key, [drain] * len(targets),
                           depth * n + np.asarray(sources, dtype=np.int64)])
    capacity = np.concatenate([np.rint(maps[maps != 0].numpy() * scale),
                               [open_] * (len(targets) + len(sources))])
    edges = (start.astype(np.int32), stop.astype(np.int32))
    return csr_array(coo_array((capacity.astype(np.int32), edges), shape=(feed + 1, feed + 1)))


def _maximum(graph: csr_array, source: int, sink: int, scale: int = SCALE) -> float:
    return float(maximum_flow(graph, source, sink).flow_value) / scale


def _position(
    given: SupportsIndex, n: int, what: str = "position", all_: str = "positions"
) -> int:
    position = int(given)
    if not 0 <= position < n:
        raise OutOfRange(f"{what} {position} is outside the {n} {all_}.")
    return position
