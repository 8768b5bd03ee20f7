"""Exact attention statistics without an N x N matrix: tiles of probabilities, each seen once.

Question  What do the heads attend to, at lengths where their attention cannot be stored?
Measure   reducers (interp.stream.reducers) that are handed every tile of probabilities
Method    a first sweep over the keys finds each row's log-sum-exp, a second one the probabilities;
          a block of rows that fits into memory keeps its exponentials in between, others recompute
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Optional

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from interp.stream.masks import (
    Mask,
    as_mask,
    bidirectional,
    causal,
    from_tensor,
    padding,
    sliding_window,
)
from interp.stream.plan import KEEP_BYTES, Plan, indices

__all__ = [
    "Mask", "Streamed", "Tile", "bidirectional", "causal", "from_tensor", "padding",
    "sliding_window", "stream",
]

SAFE_LOGIT = 36.0
"""Logits that surely stay below it need no maximum subtracted: no probability leaves float32."""

FLOOR = -70.0
"""Smallest exponent. Denormal numbers, a hundred times slower on a CPU, lie beyond."""


@dataclass
class Tile:
    """A block of attention probabilities, as reducers get it.

    Example:
        >>> tile = Tile(torch.full((1, 2, 3, 4), 0.25), torch.arange(1, 4), torch.arange(4))
        >>> tile.rows, tile.columns, tile.mass.shape
        (slice(1, 4, None), slice(0, 4, None), torch.Size([1, 2, 3]))

    `stream` reuses the memory of the probabilities for the next tile: a reducer must not keep it.
    A tile made by hand holds whole rows of all heads, unless further fields say otherwise.

    Attributes:
        probabilities: after the softmax; rows may sum to less than one (learned sink logits).
        query_positions: absolute, in any order.
        key_positions: absolute and consecutive.
        visible: what the mask allows; None if it allows all of the tile.
        value: value vectors of these keys, if they were given to `stream`.
        layer: number of the block, for whoever cares.
        row_sum: sums of the whole rows, of which the tile holds a part.
        row_entropy: entropies of the whole rows, if a reducer wants them and they are known.
        first: this is the first tile of its rows.
        sequences, heads: which part of the batch and of the heads this is.
        partial: columns of the tile outside of which everything is visible.
        rows, columns: the positions once more, as slices or lists.
    """

    probabilities: Float[Tensor, "batch head query key"]
    query_positions: Int[Tensor, "query"]
    key_positions: Int[Tensor, "key"]
    visible: Optional[Bool[Tensor, "#batch #head #query #key"]] = None
    value: Optional[Float[Tensor, "batch kv_head key d_value"]] = None
    layer: Optional[int] = None
    row_sum: Optional[Float[Tensor, "batch head query"]] = None
    row_entropy: Optional[Float[Tensor, "batch head query"]] = None
    first: bool = True
    sequences: Any = field(default_factory=lambda: slice(None))
    heads: Any = field(default_factory=lambda: slice(None))
    partial: Any = field(default_factory=lambda: slice(None))
    rows: Any = None
    columns: Any = None

    def __post_init__(self) -> None:
        if self.rows is None:
            self.rows = indices(self.query_positions.tolist())
        if self.columns is None:
            self.columns = indices(self.key_positions.tolist())
            if not isinstance(self.columns, slice):
                raise ValueError("the keys of a tile must be consecutive positions.")
        contiguous = isinstance(self.rows, slice)
        self.first_query: int = self.rows.start if contiguous else min(self.rows)
        self.last_query: int = self.rows.stop - 1 if contiguous else max(self.rows)
        self._mass: Optional[Tensor] = None
        self.width: int = self.probabilities.shape[-1]
        self.announced = False

    @property
    def mass(self) -> Float[Tensor, "batch head query"]:
        """How much of each row lies in this tile."""
        if self._mass is None:
            self._mass = self.probabilities.sum(-1)
        return self._mass


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
    rule = causal() if mask is None else as_mask(mask)
    sweep = _Sweep(plan, rule, scaling, softcap, sink_logits)
    sweep.entropy = any(getattr(reducer, "wants_row_entropy", False) for reducer in reducers)
    for reducer in reducers:
        reducer.register(plan.batch, plan.heads, plan.positions, plan.keys.stop, plan.device)
    if lse is not None and lse.shape != query.shape[:3]:
        raise ValueError(
            f"lse has shape {tuple(lse.shape)}; expected [batch, head, query] = "
            f"{tuple(query.shape[:3])}."
        )
    output = None
    if want_output:
        output = query.new_zeros((*query.shape[:3], value.shape[-1]))  # type: ignore[union-attr]
    found = query.new_empty(query.shape[:3], dtype=plan.dtype)
    for rows in plan.blocks():
        block = _Block(sweep, rows)
        for sequences, heads, kv_heads in plan.groups():
            where = (sequences, heads, rows)
            part = _Part(block, sequences, heads, kv_heads, None if lse is None else lse[where])
            found[where] = part.lse
            made = None
            for piece in part.tiles(layer) if reducers or want_output else ():
                for reducer in reducers:
                    reducer.add(piece)
                if output is not None:
                    made = part.weigh(piece, made)
            if output is not None and made is not None:
                output[where] = made.view(output[where].shape)
    return Streamed(output, found, tuple(reducers))


class _Sweep:
    """How logits of a tile are made; shared by all blocks of rows."""

    def __init__(
        self, plan: Plan, mask: Mask, scaling: Optional[float], softcap: Optional[float],
        sink_logits: Optional[Tensor],
    ) -> None:
        self.plan, self.mask, self.softcap = plan, mask, softcap
        self.scaling = plan.query.shape[-1] ** -0.5 if scaling is None else float(scaling)
        self.key_positions = torch.arange(plan.keys.start, plan.keys.stop, device=plan.device)
        self.query_positions = torch.tensor(plan.positions, device=plan.device)
        self.sinks = None
        if sink_logits is not None:
            if sink_logits.shape not in ((plan.heads,), plan.query.shape[:3]):
                raise ValueError(
                    f"sink_logits has shape {tuple(sink_logits.shape)}; expected one per head "
                    f"({plan.heads}) or one per row {tuple(plan.query.shape[:3])}."
                )
            sinks = sink_logits.to(plan.dtype)
            sinks = sinks[None, :, None] if sinks.ndim == 1 else sinks
            self.sinks = sinks.expand(plan.query.shape[:3])
        self.safe = mask.bias is None and self._bound() <= SAFE_LOGIT
        self.entropy = False
        self.pool: list[Tensor] = []

    def _bound(self) -> float:
        """No logit is larger than this (Cauchy-Schwarz)."""
        if self.softcap is not None and self.softcap <= SAFE_LOGIT:
            return self.softcap
        longest = [torch.linalg.vector_norm(x, dim=-1, dtype=self.plan.dtype).amax()
                   for x in (self.plan.query, self.plan.key)]
        return abs(self.scaling) * float(longest[0] * longest[1])

    def buffer(self, number: int, shape: Sequence[int]) -> Tensor:
        """Working memory, used again by every block of rows."""
        size = math.prod(shape)
        while len(self.pool) <= number:
            self.pool.append(torch.empty(0, dtype=self.plan.dtype, device=self.plan.device))
        if self.pool[number].numel() < size:
            self.pool[number] = torch.empty(size, dtype=self.plan.dtype, device=self.plan.device)
        return self.pool[number][:size].view(shape)


class _Block:
    """A block of rows: the tiles that it needs, with what the mask shows in them."""

    def __init__(self, sweep: _Sweep, rows: slice) -> None:
        self.sweep, self.rows, plan = sweep, rows, sweep.plan
        positions = plan.positions[rows]
        self.index = indices(positions)
        self.queries = sweep.query_positions[rows]
        reach, full = (
            tuple(min(max(0, end - plan.keys.start), len(plan.keys)) for end in of)
            for of in (sweep.mask.reach(min(positions), max(positions)),
                       sweep.mask.full(min(positions), max(positions)))
        )
        self.spans = [self._span(first, last, full) for first, last in self._cut(*reach)]

    def _cut(self, first: int, last: int) -> Iterator[tuple[int, int]]:
        width = self.sweep.plan.width
        while first < last:
            stop = min(last, first // width * width + width)
            yield first, stop
            first = stop

    def _span(self, first: int, last: int, full: tuple[int, ...]) -> "_Span":
        low, high = max(first, full[0]), min(last, full[1])
        keys, start = self.sweep.key_positions[first:last], self.sweep.plan.keys.start
        columns = slice(first + start, last + start)
        if low == first and high == last:
            return _Span(first, last, keys, columns, slice(0, 0), None)
        partial = slice(0, last - first)
        if low < high and low == first:
            partial = slice(high - first, last - first)
        elif low < high and high == last:
            partial = slice(0, low - first)
        visible = self.sweep.mask(self.queries, keys)
        return _Span(first, last, keys, columns, partial, visible[(None,) * (4 - visible.ndim)])


@dataclass
class _Span:
    """A range of keys, as indices, and what is visible of it (None: everything)."""

    first: int
    last: int
    keys: Tensor
    columns: slice
    partial: slice
    visible: Optional[Tensor]

    def __post_init__(self) -> None:
        self.shared = self.visible is None or self.visible.shape[:2] == (1, 1)
        self._hidden = None if self.visible is None else ~self.visible[..., self.partial]

    def seen(self, sequences: slice, heads: slice) -> Optional[Tensor]:
        """What these heads see."""
        return self.visible if self.shared else _of(self.visible, sequences, heads)

    def hidden(self, sequences: slice, heads: slice) -> Optional[Tensor]:
        """What is hidden from them in the partial columns."""
        return self._hidden if self.shared else _of(self._hidden, sequences, heads)


def _as(values: Tensor, dtype: torch.dtype) -> Tensor:
    return values if values.dtype == dtype else values.to(dtype)


def _of(values: Any, sequences: slice, heads: slice) -> Tensor:
    """A part of something that may be the same for all sequences or heads."""
    return values[sequences if values.shape[0] > 1 else slice(None),
                  heads if values.shape[1] > 1 else slice(None)]


class _Part:
    """Some heads of a block of rows: their log-sum-exp when made, their tiles when asked."""

    def __init__(
        self, block: _Block, sequences: slice, heads: slice, kv_heads: slice,
        lse: Optional[Tensor],
    ) -> None:
        self.block, self.sweep, plan = block, block.sweep, block.sweep.plan
        self.sequences, self.heads, self.kv_heads = sequences, heads, kv_heads
        scale = self.sweep.scaling / (self.sweep.softcap or 1.0)
        query = plan.query[sequences, heads, block.rows].to(plan.dtype) * scale
        self.shape = query.shape[:3]
        self.key = plan.key[sequences, kv_heads].flatten(0, 1)
        self.value = None if plan.value is None else plan.value[sequences, kv_heads]
        self.query = query.reshape(self.key.shape[0], -1, query.shape[-1])
        self.kept: Optional[list[tuple[Tensor, Optional[Tensor]]]] = None
        self.shift: Optional[Tensor] = None
        self.row_entropy: Optional[Tensor] = None
        if lse is None:
            self._first_sweep(plan)
        else:
            # Rows that see nothing have no finite log-sum-exp to subtract.
            self.lse = lse.to(plan.dtype)
            self.shift = self.lse.clamp_min(-1e30)
            self.total = (self.lse > -torch.inf).to(plan.dtype)

    def _logits(self, number: int, span: _Span) -> Tensor:
        """Logits of a tile, whatever is hidden."""
        sweep, dtype = self.sweep, self.sweep.plan.dtype
        key = _as(self.key[:, span.first : span.last], dtype)
        logits = sweep.buffer(number, (*self.query.shape[:2], span.last - span.first))
        torch.bmm(self.query, key.transpose(1, 2), out=logits)
        if sweep.softcap is not None:
            logits.tanh_().mul_(sweep.softcap)
        logits = logits.view(*self.shape, -1)
        if sweep.mask.bias is not None:
            bias = sweep.mask.bias(self.block.queries[:, None], span.keys)
            bias = bias[(None,) * (4 - bias.ndim)]
            logits += _of(bias, self.sequences, self.heads)
        return logits

    def _exponentiate(
        self, logits: Tensor, span: _Span, shift: Optional[Tensor], out: Tensor
    ) -> None:
        """exp(logits - shift), zero where hidden (exp(-inf) is slow, too)."""
        if shift is not None:
            logits -= shift[..., None]
            logits.clamp_min_(FLOOR)
        torch.exp(logits, out=out)
        hidden = span.hidden(self.sequences, self.heads)
        if hidden is not None:
            out[..., span.partial].masked_fill_(hidden, 0.0)

    def _first_sweep(self, plan: Plan) -> None:
        sweep = self.sweep
        shift = None if sweep.safe else torch.full(
            self.shape, -1e30, dtype=plan.dtype, device=plan.device)
        total = torch.zeros(self.shape, dtype=plan.dtype, device=plan.device)
        weighted = torch.zeros_like(total)
        self.kept = [] if plan.keep else None
        for number, span in enumerate(self.block.spans):
            number = number + 1 if plan.keep else 0
            logits = self._logits(0 if sweep.entropy else number, span)
            if shift is not None:
                hidden = span.hidden(self.sequences, self.heads)
                if hidden is not None:
                    logits[..., span.partial].masked_fill_(hidden, -torch.inf)
                highest = torch.maximum(shift, logits.amax(-1))
                shrink = (shift - highest).exp_()
                if sweep.entropy:
                    weighted = shrink * (weighted + total * (shift - highest).clamp_min_(FLOOR))
                total *= shrink
                shift = highest
            out = logits
            if sweep.entropy:
                out = sweep.buffer(number if plan.keep else 1, logits.shape)
            self._exponentiate(logits, span, shift, out)
            total += out.sum(-1)
            if sweep.entropy:
                weighted += logits.mul_(out).sum(-1)
            if self.kept is not None:
                self.kept.append((out, shift))
        self.shift, self.total = shift, total
        self.lse = log = total.log()
        if shift is not None:
            self.lse = log + shift
        if sweep.entropy:
            # log sum exp(x) - sum p x, with x counted from the maximum (or from zero).
            self.row_entropy = (log - weighted / total).clamp_min_(0)

    def tiles(self, layer: Optional[int]) -> Iterator[Tile]:
        """Tiles of probabilities, from the first visible key to the last."""
        sweep, block, plan = self.sweep, self.block, self.sweep.plan
        whole = self.total
        if sweep.sinks is not None:
            sinks = sweep.sinks[self.sequences, self.heads, block.rows]
            whole = whole + (sinks if self.shift is None else sinks - self.shift).exp()
        factor = (1 / whole).masked_fill_(self.total == 0, 0.0)
        row_sum = self.total * factor
        for number, span in enumerate(block.spans):
            scale = factor
            if self.kept is not None:
                p, shift = self.kept[number]
                if shift is not None and self.shift is not None:
                    scale = factor * (shift - self.shift).exp_()
            else:
                p = self._logits(0, span)
                self._exponentiate(p, span, self.shift, p)
            p *= scale[..., None]
            value = self.value
            if value is not None:
                value = _as(value[:, :, span.first : span.last], plan.dtype)
            tile = Tile(
                p, block.queries, span.keys, span.seen(self.sequences, self.heads), value, layer,
                row_sum, self.row_entropy, number == 0, self.sequences, self.heads, span.partial,
                block.index, span.columns,
            )
            tile.announced = True
            yield tile

    def weigh(self, tile: Tile, made: Optional[Tensor]) -> Tensor:
        """Add the tile's part of the attention output to `made`, [kv_head, group x query, d]."""
        assert tile.value is not None
        p = tile.probabilities.reshape(*self.query.shape[:2], -1)
        value = tile.value.flatten(0, 1)
        return torch.bmm(p, value) if made is None else made.baddbmm_(p, value)
