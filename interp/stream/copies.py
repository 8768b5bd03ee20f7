"""Attention at fixed offsets, summed over the queries for which the offset means something."""

from collections.abc import Mapping
from typing import SupportsIndex

import numpy as np
import torch
import xarray as xr

from interp.stream.reducer import Reducer
from interp.stream.tile import Tile


class Copies(Reducer):
    """Sum of the attention at each offset over the queries from a given one on [head, offset].

    Example:
        >>> reducer = Copies({-1: 1, -2: 2})
        >>> rows = torch.tensor([[[[1.0, 0, 0], [0.5, 0.5, 0], [0.25, 0.5, 0.25]]]])
        >>> reducer.add(Tile(rows, torch.arange(3), torch.arange(3)))
        >>> reducer.finish().sel(quantity="mass").values
        array([[1.  , 0.25]], dtype=float32)

    Args:
        first: offset (key minus query) -> the first query that counts.

    The last axis, `quantity`, holds the sum ("mass") and how many of these queries see the key
    ("count"). Unlike the statistic "offsets", by whose name it goes, every offset has queries of
    its own and no query is kept. Banded: O(query x offset).
    """

    name = "offsets"
    axes = {"mass": ("offset",), "count": ("offset",)}

    def __init__(self, first: Mapping[int, SupportsIndex]) -> None:
        if not first:
            raise ValueError("Copies needs offsets: {-1: 1} for the token before every query.")
        self.first = {int(offset): int(query) for offset, query in first.items()}
        super().__init__()

    def sizes(self) -> dict[str, int]:
        return {"offset": len(self.first)}

    def _add(self, tile: Tile) -> None:
        start, stop = tile.columns.start, tile.columns.stop
        low, high = min(self.first), max(self.first)
        if tile.last_query + high < start or tile.first_query + low >= stop:
            return
        query = tile.query_positions[:, None]
        offsets = torch.tensor(list(self.first), device=query.device)
        column = query + offsets - start
        there = (column >= 0) & (column < stop - start)
        there &= query >= torch.tensor(list(self.first.values()), device=query.device)
        shape = tile.weights.shape
        column = column.clamp(0, stop - start - 1).expand(*shape[:2], -1, -1)
        there = there.expand_as(column)
        if tile.visible is not None:
            there = there & tile.visible.expand(shape).gather(-1, column)
        mass = tile.scaled(tile.weights.gather(-1, column) * there)
        self._state["mass"][tile.sequences, tile.heads] += mass.sum(-2)
        self._state["count"][tile.sequences, tile.heads] += there.sum(-2)

    def _finish(self) -> xr.DataArray:
        both = torch.stack([self._state["mass"], self._state["count"]], -1)
        values = both.cpu().numpy().astype(np.float32)
        return self._labelled(values, "offset", "quantity", offset=list(self.first),
                              quantity=["mass", "count"])
