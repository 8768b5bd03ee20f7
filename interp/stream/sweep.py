"""The two sweeps over the keys: sums of each row first, probabilities second."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Optional

import torch
from torch import Tensor

from interp.stream.masks import Mask
from interp.stream.plan import Plan, indices
from interp.stream.tile import Tile

SAFE_LOGIT = 36.0
"""Logits that surely stay below it need no maximum subtracted: no probability leaves float32."""

PIECE = 1 << 18
"""Numbers that a CPU takes through the first sweep at a time, so that they stay in the cache."""

FLOOR = -70.0
"""Smallest exponent. Denormal numbers, a hundred times slower on a CPU, lie beyond."""


class Sweep:
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
        self.bounds = self._bounds()
        self.entropy = False
        self.pool: list[Tensor] = []

    def _bounds(self) -> Optional[Tensor]:
        """No logit of [batch, kv_head, block of rows] is larger than this (Cauchy-Schwarz)."""
        plan = self.plan
        if self.mask.bias is not None:
            return None
        if self.softcap is not None and self.softcap <= SAFE_LOGIT:
            return torch.zeros(plan.batch, plan.kv_heads, -(-plan.n_queries // plan.rows))
        query, key = (torch.linalg.vector_norm(x, dim=-1, dtype=plan.dtype)
                      for x in (plan.query, plan.key))
        query = query.reshape(plan.batch, plan.kv_heads, -1, plan.n_queries).amax(2)
        longest = torch.stack([part.amax(-1) for part in query.split(plan.rows, -1)], -1)
        return (abs(self.scaling) * longest * key.amax(-1, keepdim=True)).cpu()

    def buffer(self, number: int, shape: Sequence[int]) -> Tensor:
        """Working memory, used again by every block of rows; new memory is slow at first touch."""
        plan = self.plan
        while len(self.pool) <= number:
            self.pool.append(torch.empty(plan.tile_size, dtype=plan.dtype, device=plan.device))
        return self.pool[number][: math.prod(shape)].view(shape)


class Block:
    """A block of rows: the tiles that it needs, with what the mask shows in them."""

    def __init__(self, sweep: Sweep, number: int, rows: slice) -> None:
        self.sweep, self.number, self.rows, plan = sweep, number, rows, sweep.plan
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
        shape = (1, 1) if self.visible is None else self.visible.shape
        self.alike = (shape[0] == 1, shape[1] == 1)
        self.hidden = None if self.visible is None else ~self.visible[..., self.partial]


def _as(values: Tensor, dtype: torch.dtype) -> Tensor:
    return values if values.dtype == dtype else values.to(dtype)


def _of(values: Any, sequences: slice, heads: slice) -> Any:
    """A part of something that may be the same for all sequences or heads."""
    if values is None:
        return None
    return values[sequences if values.shape[0] > 1 else slice(None),
                  heads if values.shape[1] > 1 else slice(None)]


class Part:
    """Some heads of a block of rows: their log-sum-exp and output, their tiles when asked.

    Inside, heads are [pair, group]: a pair of a sequence and a key-value head, and the query heads
    that share it.
    """

    def __init__(
        self, block: Block, sequences: slice, heads: slice, kv_heads: slice,
        lse: Optional[Tensor], want_output: bool,
    ) -> None:
        self.block, self.sweep, self.plan = block, block.sweep, block.sweep.plan
        plan = self.plan
        self.sequences, self.heads, self.want_output = sequences, heads, want_output
        query = plan.query[sequences, heads, block.rows]
        self.outside = query.shape[:3]
        self.key = plan.key[sequences, kv_heads].flatten(0, 1)
        self.value = None if plan.value is None else plan.value[sequences, kv_heads].flatten(0, 1)
        scale = self.sweep.scaling / (self.sweep.softcap or 1.0)
        query = _as(query, plan.dtype) * scale
        self.query = query.reshape(len(self.key), -1, *query.shape[2:]).contiguous()
        self.inside = self.query.shape[:3]
        bounds = self.sweep.bounds
        self.safe = lse is None and bounds is not None and bool(
            (bounds[sequences, kv_heads, block.number] <= SAFE_LOGIT).all())
        self.kept: list[tuple[Tensor, Optional[Tensor], Tensor]] = []
        self.shift = None if self.safe else self.query.new_full(self.inside, -1e30)
        self.total = self.query.new_zeros(self.inside)
        self.part = torch.empty_like(self.total)
        self.spread = torch.zeros_like(self.total) if self.sweep.entropy else None
        self.gathered: Optional[Tensor] = None
        if want_output and self.value is not None:
            self.gathered = self.query.new_zeros((*self.inside, self.value.shape[-1]))
        self.row_entropy: Optional[Tensor] = None
        if lse is None:
            self._find_sums()
        else:
            self._take_sums(lse)
        whole = self.total
        if self.sweep.sinks is not None:
            sinks = self.sweep.sinks[sequences, heads, block.rows].reshape(self.inside)
            whole = whole + (sinks if self.shift is None else sinks - self.shift).exp()
        self.factor = (1 / whole).masked_fill_(self.total == 0, 0.0)

    def _pieces(self, width: int) -> Iterator[tuple[slice, slice]]:
        """Pairs and heads that go through all steps of the first sweep while in the cache."""
        pairs, group, rows = self.inside
        if self.plan.device.type != "cpu":
            yield slice(0, pairs), slice(0, group)
            return
        room = PIECE if self.sweep.entropy else 2 * PIECE
        step = max(1, room // (rows * width))
        if step >= pairs * group:
            yield slice(0, pairs), slice(0, group)
            return
        for pair in range(pairs):
            for head in range(0, group, step):
                yield slice(pair, pair + 1), slice(head, min(head + step, group))

    def _per_head(self, values: Optional[Tensor], alike: tuple[bool, bool]) -> Optional[Tensor]:
        """A mask or bias with axes [pair, group, query, key], or the same for all."""
        if values is None or all(alike):
            return values
        part = _of(values, self.sequences, self.heads)
        return part.expand(*self.outside[:2], *part.shape[2:]).reshape(
            *self.inside[:2], *part.shape[2:])

    def _find_sums(self) -> None:
        for number, span in enumerate(self.block.spans):
            place = number + 1 if self.plan.keep else 1
            weights = self._weights(place, span, find=True)
            if self.plan.keep:
                shift = None if self.shift is None else self.shift.clone()
                self.kept.append((weights, shift, self.part.clone()))
        log = self.total.log()
        self.lse = (log if self.shift is None else log + self.shift).view(self.outside)
        if self.spread is not None:
            # log sum exp(x) - sum p x, with x counted from the maximum (or from zero).
            entropy = (log - self.spread / self.total).clamp_min_(0)
            self.row_entropy = entropy.view(self.outside)

    def _take_sums(self, lse: Tensor) -> None:
        self.lse = lse.to(self.plan.dtype)
        # Rows that see nothing have no finite log-sum-exp to subtract.
        self.shift = self.lse.clamp_min(-1e30).reshape(self.inside)
        self.total = (self.lse > -torch.inf).to(self.plan.dtype).reshape(self.inside)
        if self.want_output:
            for span in self.block.spans:
                self._weights(1, span, gather=True)

    def _weights(
        self, place: int, span: _Span, find: bool = False, gather: bool = False
    ) -> Tensor:
        """exp(logits - shift) of a tile, zero where hidden; `find` also finds shift and sums."""
        pairs, group, rows = self.inside
        width = span.last - span.first
        weights = self.sweep.buffer(place, (pairs, group, rows, width))
        key = _as(self.key[:, span.first : span.last], self.plan.dtype).transpose(1, 2)
        value = None
        if self.gathered is not None and self.value is not None and (find or gather):
            value = _as(self.value[:, span.first : span.last], self.plan.dtype)
        hidden = self._per_head(span.hidden, span.alike)
        bias = self.sweep.mask.bias
        if bias is not None:
            bias = bias(self.block.queries[:, None], span.keys)
            bias = bias[(None,) * (4 - bias.ndim)]
            bias = self._per_head(bias, (bias.shape[0] == 1, bias.shape[1] == 1))
        for some in self._pieces(width):
            self._piece(some, weights[some], key[some[0]], value, hidden, bias, span, find)
        return weights

    def _piece(
        self, some: tuple[slice, slice], weights: Tensor, key: Tensor, value: Optional[Tensor],
        hidden: Optional[Tensor], bias: Optional[Tensor], span: _Span, find: bool,
    ) -> None:
        flat = (weights.shape[0], -1, weights.shape[-1])
        spread = self.spread if find else None
        logits = weights if spread is None else self.sweep.buffer(0, weights.shape)
        query = self.query[some].view(flat[0], -1, self.query.shape[-1])
        torch.bmm(query, key, out=logits.view(flat))
        if self.sweep.softcap is not None:
            logits.tanh_().mul_(self.sweep.softcap)
        if bias is not None:
            logits += bias if bias.shape[:2] == (1, 1) else bias[some]
        if hidden is not None and hidden.shape[:2] != (1, 1):
            hidden = hidden[some]
        if self.shift is not None:
            if find:
                self._raise_shift(some, logits, hidden, span.partial)
            logits -= self.shift[some][..., None]
            logits.clamp_min_(FLOOR)
        # exp(-inf) is slow: what is hidden is set to zero after the exponential.
        torch.exp(logits, out=weights)
        if hidden is not None:
            weights[..., span.partial].masked_fill_(hidden, 0.0)
        if find:
            self.total[some] += torch.sum(weights, -1, out=self.part[some])
        if spread is not None:
            spread[some] += logits.mul_(weights).sum(-1)
        if value is not None and self.gathered is not None:
            made = self.gathered[some].view(flat[0], -1, value.shape[-1])
            made.baddbmm_(weights.view(flat), value[some[0]])

    def _raise_shift(
        self, some: tuple[slice, slice], logits: Tensor, hidden: Optional[Tensor], partial: slice
    ) -> None:
        """Let the shift be the highest logit so far, and what was summed up follow."""
        assert self.shift is not None
        if hidden is not None:
            logits[..., partial].masked_fill_(hidden, -torch.inf)
        before, total = self.shift[some], self.total[some]
        after = torch.maximum(before, logits.amax(-1))
        down = before - after
        shrink = down.exp()
        if self.spread is not None:
            spread = self.spread[some]
            spread += total * down.clamp_min(FLOOR)
            spread *= shrink
        total *= shrink
        if self.gathered is not None:
            self.gathered[some].mul_(shrink[..., None])
        before.copy_(after)

    def output(self) -> Tensor:
        """Attention output; zero in rows that see nothing."""
        assert self.gathered is not None
        return (self.gathered * self.factor[..., None]).view(*self.outside, -1)

    def tiles(self, layer: Optional[int]) -> Iterator[Tile]:
        """Tiles from the first visible key to the last."""
        block, row_sum = self.block, (self.total * self.factor).view(self.outside)
        for number, span in enumerate(block.spans):
            scale, mass = self.factor, None
            if self.kept:
                weights, shift, mass = self.kept[number]
                if shift is not None and self.shift is not None:
                    scale = scale * (shift - self.shift).exp_()
            else:
                weights = self._weights(1, span)
            value = self.value
            if value is not None:
                value = _as(value[:, span.first : span.last], self.plan.dtype)
                value = value.view(self.outside[0], -1, *value.shape[1:])
            tile = Tile(
                weights.view(*self.outside, -1), block.queries, span.keys,
                _of(span.visible, self.sequences, self.heads), value, layer, row_sum,
                self.row_entropy, number == 0, self.sequences, self.heads, span.partial,
                block.index, span.columns, scale.view(self.outside),
                None if mass is None else (mass * scale).view(self.outside),
            )
            tile.announced, tile.alike = True, span.alike
            yield tile
