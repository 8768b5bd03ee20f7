"""Attention along diagonals, averaged over chosen heads while it streams."""

from collections.abc import Iterable, Sequence
from typing import Optional

import numpy as np
import torch
import xarray as xr

from interp.stream.reducer import Reducer
from interp.stream.tile import Tile


class Band(Reducer):
    """Mean over some heads of the attention at fixed offsets, for every query [head, query, offset].

    Example:
        >>> rows = torch.tensor([[[[1.0, 0.0], [0.25, 0.75]], [[1.0, 0.0], [0.75, 0.25]]]])
        >>> reducer = Band([-1, 0], heads=[0, 1])
        >>> reducer.add(Tile(rows, torch.arange(2), torch.arange(2)))
        >>> reducer.finish().values
        array([[[nan, 1. ],
                [0.5, 0.5]]], dtype=float32)

    Args:
        offsets: key minus query; -1 is the previous token.
        heads: to be averaged; the axis `head` has the one entry 0. Without heads all is NaN.

    Zero for a key that the mask hides, NaN for one before the text. Unlike the statistic "offsets"
    it keeps one number per query and offset, however many heads there are. It goes by that name.

    Source: arXiv:2510.13554: WAAD needs the last W diagonals, FAI those of a later window.
    """

    name = "offsets"
    axes = {"mass": ("query", "offset")}

    def __init__(self, offsets: Iterable[int], heads: Sequence[int]) -> None:
        self.offsets = tuple(int(o) for o in offsets)
        if not self.offsets or len(set(self.offsets)) < len(self.offsets):
            raise ValueError(f"offsets must be different numbers, at least one, not {offsets!r}.")
        self.heads = tuple(sorted({int(h) for h in heads}))
        super().__init__()

    def sizes(self) -> dict[str, int]:
        return {"offset": len(self.offsets)}

    def _allocate(self, device: Optional[torch.device]) -> None:
        # One entry for all heads, unlike what other reducers keep.
        n_heads, self._n_heads = self._n_heads, 1
        super()._allocate(device)
        self._n_heads = n_heads
        self._state["sighted"] = self._state["sighted"].repeat(1, n_heads or 1, 1)

    def _add(self, tile: Tile) -> None:
        first, last = tile.columns.start, tile.columns.stop
        low, high = min(self.offsets), max(self.offsets)
        if tile.last_query + high < first or tile.first_query + low >= last:
            return
        start = tile.heads.start or 0
        here = [h - start for h in self.heads if 0 <= h - start < tile.weights.shape[1]]
        if not here:
            return
        offsets = torch.tensor(self.offsets, device=tile.query_positions.device)
        column = tile.query_positions[:, None] + offsets - first
        there = (column >= 0) & (column < last - first)
        column = column.clamp(0, last - first - 1)
        index = torch.tensor(here, device=tile.weights.device)
        chosen = tile.weights.index_select(1, index)
        mass = chosen.gather(-1, column.expand(*chosen.shape[:2], -1, -1)) * there
        if tile.scale is not None:
            mass = mass * tile.scale.index_select(1, index)[..., None]
        self._state["mass"][tile.sequences, :, tile.rows] += mass.sum(1, keepdim=True)

    def _finish(self) -> xr.DataArray:
        mean = self._state["mass"] / len(self.heads) if self.heads \
            else self._state["mass"] * torch.nan
        values = mean.cpu().numpy().astype(np.float32)[:, :, self._queries()]
        before = self._queries()[:, None] + np.array(self.offsets) < 0
        values[:, :, before] = np.nan
        return self._labelled(values, "query", "offset", offset=list(self.offsets))
