"""Attention received by each key, plain or weighted by the size of its value."""

from collections.abc import Callable
from typing import Optional

import numpy as np
import torch
import xarray as xr
from jaxtyping import Float
from torch import Tensor

from interp.stream.fused import Found
from interp.stream.reducer import Positions, Reducer, Where
from interp.stream.tile import Tile

MIN_VISIBLE = 0.5
"""A key that fewer of its possible queries can see has no received mass (sliding windows)."""


class Received(Reducer):
    """Mean attention that each key receives from the queries that can see it: alpha [head, key].

    Example:
        >>> rows = torch.tensor([[[[1.0, 0.0, 0.0], [0.5, 0.5, 0.0], [0.6, 0.2, 0.2]]]])
        >>> seen = torch.ones(1, 1, 3, 3, dtype=torch.bool).tril()
        >>> reducer = Received()
        >>> reducer.add(Tile(rows, torch.arange(3), torch.arange(3), seen))
        >>> reducer.finish().values.round(2)
        array([[0.7 , 0.35, 0.2 ]], dtype=float32)

    Args:
        queries: "self" averages over all queries that can see the key, itself included (under a
            causal mask t >= k, as in the paper); "later" leaves out the query at the key itself.
        subset: only these query positions count.
        normalize: divide each row by its sum, for models with learned sink logits. Report both.

    NaN where no query, or fewer than half of the queries from the key on, can see the key (sliding
    windows). Late keys average few queries: for sinks read the first half only.

    Source: arXiv:2410.10781, alpha_k^{l,h}.
    """

    name = "received"
    axes = {"received": ("key",), "count": ("key",)}

    def __init__(
        self, queries: str = "self", subset: Optional[Positions] = None, normalize: bool = False
    ) -> None:
        if queries not in ("self", "later"):
            raise ValueError(f"queries must be 'self' or 'later', not {queries!r}.")
        self.queries, self.normalize = queries, normalize
        self.subset = None if subset is None else Where(subset, "subset")
        super().__init__()

    def dtype(self, entry: str) -> torch.dtype:
        return torch.int64 if entry == "count" else torch.float64

    def only_rows(self) -> Optional[Where]:
        """As in `Reducer`."""
        return self.subset

    def fused(self) -> bool:
        """As in `Reducer`."""
        return True

    def _take(self, found: Found) -> None:
        chosen = None if self.subset is None else self.subset.among(found.query_positions)
        received, count = found.received(self.normalize, self.queries == "later", chosen)
        self._state["received"][:, :, found.columns] += received
        self._state["count"][:, :, found.columns] += count

    def _add(self, tile: Tile) -> None:
        w, columns = tile.weights, tile.columns
        chosen = None if self.subset is None else self.subset.among(tile.query_positions)
        scale = tile.scale
        if self.normalize:
            total = tile.mass if tile.row_sum is None else tile.row_sum
            share = total.reciprocal().masked_fill(total == 0, 0.0)
            scale = share if scale is None else scale * share
        if chosen is not None:
            mine = chosen.to(w.dtype).expand(w.shape[:3])
            scale = mine if scale is None else scale * mine
        if scale is None:
            received = w.sum(-2)
        else:
            received = torch.matmul(scale[:, :, None], w)[:, :, 0]
        own = None
        if self.queries == "later" and tile.first_query < columns.stop \
                and tile.last_query >= columns.start:
            own = tile.query_positions[:, None] == tile.key_positions
            row, column = own.nonzero(as_tuple=True)
            mine = w[:, :, row, column]
            received[:, :, column] -= mine if scale is None else mine * scale[:, :, row]
        where = (tile.sequences, tile.heads, columns)
        self._state["received"][where].add_(self._weighted(received, tile))
        self._count(tile, chosen, own)

    def _count(self, tile: Tile, chosen: Optional[Tensor], own: Optional[Tensor]) -> None:
        """Add the number of queries in this tile that can see each key, and count."""
        sequences, heads, columns = tile.sequences, tile.heads, tile.columns
        seen = tile.visible
        # What is the same for all heads (or sequences) is counted once, with the first of them.
        if tile.alike[1]:
            if heads.start:
                return
            heads = slice(None)
        if tile.alike[0]:
            if sequences.start:
                return
            sequences = slice(None)
        here = self._state["count"][sequences, heads, columns]
        here += len(tile.query_positions) if chosen is None else chosen.sum()
        if seen is not None:
            hidden = ~seen[..., tile.partial]
            hidden = hidden if chosen is None else hidden & chosen[:, None]
            here[..., tile.partial] -= hidden.sum(-2)
        if own is not None:
            gone = own if chosen is None else own & chosen[:, None]
            here -= (gone if seen is None else gone & seen).sum(-2)

    def _weighted(self, received: Tensor, tile: Tile) -> Tensor:
        return received

    def _finish(self) -> xr.DataArray:
        n = self._n_keys
        received, count = (self._state[k][:, :, :n].cpu().numpy() for k in ("received", "count"))
        queries = self._queries()
        if self.subset is not None:
            queries = queries[self.subset.among(torch.as_tensor(queries)).numpy()]
        side = "left" if self.queries == "self" else "right"
        possible = len(queries) - np.searchsorted(queries, np.arange(n), side)
        enough = (count > 0) & (count >= MIN_VISIBLE * possible)
        alpha = np.where(enough, received / np.maximum(count, 1), np.nan).astype(np.float32)
        array = self._labelled(alpha, "key")
        array.attrs.update(queries=self.queries, normalize=int(self.normalize))
        return array


class ValueWeighted(Received):
    """Mean norm of what each key adds to the queries that see it: alpha times ||v|| [head, key].

    Example:
        >>> rows = torch.tensor([[[[1.0, 0.0], [0.5, 0.5]]]])
        >>> seen = torch.ones(1, 1, 2, 2, dtype=torch.bool).tril()
        >>> value = torch.tensor([[[[0.0, 0.0], [3.0, 4.0]]]])
        >>> reducer = ValueWeighted()
        >>> reducer.add(Tile(rows, torch.arange(2), torch.arange(2), seen, value))
        >>> reducer.finish().values
        array([[0. , 2.5]], dtype=float32)

    Args:
        project: what a value becomes before its norm is taken, [batch, head, key, d_head] ->
            [batch, head, key, d_model], for example by each head's part of W_O. None: itself.
        queries, subset, normalize: as in `Received`.

    Raises:
        ValueError: the tiles come without value vectors.

    Source: arXiv:2004.10102, ||alpha_ij f(x_j)||.
    """

    name = "value_weighted"

    def __init__(
        self,
        project: Optional[Callable[[Float[Tensor, "batch head key d_head"]], Tensor]] = None,
        queries: str = "self", subset: Optional[Positions] = None, normalize: bool = False,
    ) -> None:
        self.project = project
        super().__init__(queries, subset, normalize)

    def fused(self) -> bool:
        """As in `Reducer`; a kernel has no values."""
        return False

    def _weighted(self, received: Tensor, tile: Tile) -> Tensor:
        if tile.value is None:
            raise ValueError("the statistic 'value_weighted' needs the value vectors: give value.")
        value = tile.value.to(received.dtype)
        group = received.shape[1] // value.shape[1]
        if self.project is None:
            return received * value.norm(dim=-1).repeat_interleave(group, 1)
        return received * self.project(value.repeat_interleave(group, 1)).norm(dim=-1)
