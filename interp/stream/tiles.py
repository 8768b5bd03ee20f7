"""Exact attention statistics without an N x N matrix: tiles of probabilities, each seen once.

Question  What do the heads attend to, at lengths where their attention cannot be stored?
Measure   reducers (interp.stream.reducers) that are handed every tile of probabilities
Method    a first sweep over the keys finds each row's log-sum-exp, a second one the probabilities;
          a block of rows that fits into memory keeps its exponentials in between, others recompute
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Optional

import torch
from jaxtyping import Float, Int
from torch import Tensor

from interp.stream import fused
from interp.stream.masks import (
    Mask,
    as_mask,
    bidirectional,
    causal,
    from_tensor,
    padding,
    sliding_window,
)
from interp.stream.plan import KEEP_BYTES, Plan
from interp.stream.sweep import Block, Part, Sweep
from interp.stream.tile import Tile

__all__ = [
    "Mask", "Streamed", "Tile", "bidirectional", "causal", "from_tensor", "padding",
    "sliding_window", "stream",
]


@dataclass
class Streamed:
    """What `stream` returns.

    Attributes:
        output: attention output [batch, head, query, d_value] in the dtype of the input, if wanted.
        lse: log-sum-exp of the visible logits, sink logits left out; -inf where nothing is visible.
        reducers: the reducers that were given; `.finish()` makes their labelled arrays.
    """

    output: Optional[Float[Tensor, "batch head query d_value"]]
    lse: Float[Tensor, "batch head query"]
    reducers: tuple[Any, ...]


@torch.no_grad()
def stream(
    query: Float[Tensor, "batch head query d_head"],
    key: Float[Tensor, "batch kv_head key d_head"],
    value: Optional[Float[Tensor, "batch kv_head key d_value"]] = None,
    *,
    reducers: Sequence[Any] = (),
    mask: Any = None,
    scaling: Optional[float] = None,
    softcap: Optional[float] = None,
    sink_logits: Optional[Float[Tensor, "head"] | Float[Tensor, "batch head query"]] = None,
    query_offset: Optional[int] = None,
    query_positions: Optional[Int[Tensor, "query"] | Sequence[int]] = None,
    key_offset: int = 0,
    tile: Optional[tuple[int, int]] = None,
    lse: Optional[Float[Tensor, "batch head query"]] = None,
    want_output: bool = False,
    layer: Optional[int] = None,
    keep_bytes: int = KEEP_BYTES,
) -> Streamed:
    """Hand every tile of softmax(scaling q k^T) to every reducer, exactly and in linear memory.

    Example:
        >>> from interp.stream.reducers import Entropy, Received
        >>> generator = torch.Generator().manual_seed(0)
        >>> query = torch.randn(1, 4, 9, 8, generator=generator)
        >>> key = torch.randn(1, 2, 9, 8, generator=generator)
        >>> done = stream(query, key, reducers=[Received(), Entropy()])
        >>> received, entropy = (reducer.finish() for reducer in done.reducers)
        >>> received.dims, entropy.dims
        (('head', 'key'), ('head', 'query'))

    Args:
        query, key, value: after RoPE and QK-norm, as the softmax gets them, in any float type;
            query head h reads key-value head h * kv_head // head.
        reducers: of `interp.stream.reducers`; accumulate in place, also over several calls
            (prefill, then decoding).
        mask: `causal()` if None; see `interp.stream.masks`.
        scaling: 1 / sqrt(d_head) if None.
        softcap: logits become softcap * tanh(logits / softcap).
        sink_logits: logit of an extra key without value, per head (or per query): rows sum to less
            than one.
        query_offset: position of the first query; the queries are the last positions if None.
        query_positions: positions of the queries, where they are not consecutive.
        key_offset: position of the first key (caches that dropped early keys).
        tile: (queries, keys) of a tile; chosen by size if None.
        lse: the rows' log-sum-exp, if a kernel has returned it; spares the first sweep.
        want_output: also compute the attention output (needs `value`).
        keep_bytes: exponentials of a block of rows up to this size are kept between the sweeps.

    Raises:
        ValueError: shapes that do not fit together, positions that a reducer already has.
        NumericalError: NaN or infinity in query, key or value.

    Statistics are computed in float32 (float64 inputs stay float64). Memory is
    O(head x (query + key)) plus one block of rows.

    Source: online softmax as in arXiv:2205.14135, learned sink logits as in gpt-oss.
    """
    plan = Plan(query, key, value, query_offset, query_positions, key_offset, tile, keep_bytes)
    if want_output and value is None:
        raise ValueError("want_output=True needs the value vectors: give value.")
    if lse is not None and lse.shape != query.shape[:3]:
        raise ValueError(
            f"lse has shape {tuple(lse.shape)}; expected [batch, head, query] = "
            f"{tuple(query.shape[:3])}."
        )
    rule = causal() if mask is None else as_mask(mask)
    sweep = Sweep(plan, rule, scaling, softcap, sink_logits)
    for reducer in reducers:
        reducer.register(plan.batch, plan.heads, plan.positions, plan.keys.stop, plan.device)
    rest = list(reducers)
    if any(reducer.fused() for reducer in reducers):
        whole = fused.find(plan, rule, sweep.scaling, softcap, sweep.sinks)
        if whole is not None:
            rest = [reducer for reducer in reducers if not reducer.fused()]
            for reducer in reducers:
                if reducer.fused():
                    reducer.take(whole)
            if not rest and not want_output:
                return Streamed(None, whole.lse, tuple(reducers))
            lse = whole.lse
    sweep.entropy = any(getattr(reducer, "wants_row_entropy", False) for reducer in rest)
    output = None
    if want_output:
        output = query.new_zeros((*query.shape[:3], value.shape[-1]))  # type: ignore[union-attr]
    found = query.new_empty(query.shape[:3], dtype=plan.dtype)
    for number, rows in enumerate(plan.blocks()):
        block = Block(sweep, number, rows)
        for sequences, heads, kv_heads in plan.groups():
            where = (sequences, heads, rows)
            part = Part(block, sequences, heads, kv_heads, None if lse is None else lse[where],
                         want_output)
            for piece in part.tiles(layer) if rest else ():
                for reducer in rest:
                    reducer.add(piece)
            found[where] = part.lse
            if output is not None:
                output[where] = part.output()
    return Streamed(output, found, tuple(reducers))
