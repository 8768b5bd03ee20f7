"""Attention of a few chosen queries only: where a long prompt is long, but its answer is short.

Both are asked for through `interp.stream.per_layer.PerLayer("segments", ...)`, because the rows
differ from prompt to prompt, and come back as the statistic "segments".
"""

from collections.abc import Iterable, Mapping
from typing import Optional, SupportsIndex

import numpy as np
import torch
import xarray as xr
from torch import Tensor

from interp.stream.received import MIN_VISIBLE
from interp.stream.reducer import Positions, Reducer, Where
from interp.stream.tile import Tile


class ChosenRows(Reducer):
    """What is common to both: which rows are kept, and where a tile's rows go."""

    name = "segments"

    def __init__(self, rows: Iterable[SupportsIndex]) -> None:
        self.rows = tuple(int(row) for row in rows)
        if not self.rows or len(set(self.rows)) < len(self.rows) or min(self.rows) < 0:
            raise ValueError(
                f"rows must be different query positions from 0 on, at least one, not {self.rows}."
            )
        super().__init__()

    def sizes(self) -> dict[str, int]:
        return {"row": len(self.rows)}

    def only_rows(self) -> Optional[Where]:
        """As in `Reducer`."""
        return Where(self.rows, "rows")

    def _slots(self, tile: Tile) -> tuple[list[int], list[int]]:
        """Rows of the tile that are wanted, and their places in the state."""
        if not any(tile.first_query <= row <= tile.last_query for row in self.rows):
            return [], []
        there = {query: i for i, query in enumerate(tile.query_positions.tolist())}
        pairs = [(there[row], slot) for slot, row in enumerate(self.rows) if row in there]
        return [i for i, _ in pairs], [slot for _, slot in pairs]

    @staticmethod
    def _probabilities(tile: Tile, local: list[int]) -> Tensor:
        weights = tile.weights[:, :, local]
        return weights if tile.scale is None else weights * tile.scale[:, :, local, None]


class RowMass(ChosenRows):
    """Attention of chosen queries on named segments [head, query, segment].

    Example:
        >>> reducer = RowMass({"gold": [0, 1], "rest": [2]}, rows=[2])
        >>> rows = torch.tensor([[[[1.0, 0, 0], [0.5, 0.5, 0], [0.25, 0.25, 0.5]]]])
        >>> reducer.add(Tile(rows, torch.arange(3), torch.arange(3)))
        >>> reducer.finish().sel(segment="gold").values
        array([[0.5]], dtype=float32)

    NaN where a query sees fewer than half of a segment (sliding windows): it cannot look there.
    """

    axes = {"mass": ("row", "segment"), "visible": ("row", "segment")}

    def __init__(
        self, segments: Mapping[str, Positions], rows: Iterable[SupportsIndex]
    ) -> None:
        if not segments:
            raise ValueError("RowMass needs named segments: segments={'gold': [3, 4, 5]}.")
        self.segments = {k: Where(where, f"segment {k!r}") for k, where in segments.items()}
        super().__init__(rows)

    def sizes(self) -> dict[str, int]:
        return {"row": len(self.rows), "segment": len(self.segments)}

    def _add(self, tile: Tile) -> None:
        local, slots = self._slots(tile)
        if not local:
            return
        p = self._probabilities(tile, local)
        seen = None
        if tile.visible is not None:
            seen = tile.visible.expand(tile.weights.shape)[:, :, local]
        mass, count = (self._state[k][tile.sequences, tile.heads] for k in ("mass", "visible"))
        for number, segment in enumerate(self.segments.values()):
            columns = segment.within(tile.columns)
            if isinstance(columns, list):
                columns = torch.tensor(columns, device=p.device, dtype=torch.long)
            part = p[..., columns]
            mass[:, :, slots, number] += part.sum(-1).to(mass.dtype)
            count[:, :, slots, number] += part.shape[-1] if seen is None \
                else seen[..., columns].sum(-1).to(count.dtype)

    def _finish(self) -> xr.DataArray:
        mass, count = (self._state[k].cpu().numpy() for k in ("mass", "visible"))
        whole = torch.arange(self._n_keys)
        sizes = np.array([int(where.among(whole).sum()) for where in self.segments.values()])
        known = (count > 0) & (count >= MIN_VISIBLE * sizes)
        values = np.where(known, mass, np.nan).astype(np.float32)
        return xr.DataArray(
            values, {"head": np.arange(values.shape[1]), "query": list(self.rows),
                     "segment": list(self.segments)}, ("batch", "head", "query", "segment"))


class RowWeights(ChosenRows):
    """The whole attention of chosen queries [head, query, key].

    Example:
        >>> reducer = RowWeights(rows=[1])
        >>> rows = torch.tensor([[[[1.0, 0], [0.5, 0.5]]]])
        >>> reducer.add(Tile(rows, torch.arange(2), torch.arange(2)))
        >>> reducer.finish().values
        array([[[0.5, 0.5]]], dtype=float32)
    """

    axes = {"weight": ("row", "key")}

    def dtype(self, entry: str) -> torch.dtype:
        return torch.float32

    def _add(self, tile: Tile) -> None:
        local, slots = self._slots(tile)
        if local:
            part = self._state["weight"][tile.sequences, tile.heads, :, tile.columns]
            part[:, :, slots] += self._probabilities(tile, local).float()

    def _finish(self) -> xr.DataArray:
        values = self._state["weight"][..., : self._n_keys].cpu().numpy()
        return xr.DataArray(
            values, {"head": np.arange(values.shape[1]), "query": list(self.rows),
                     "key": np.arange(self._n_keys)}, ("batch", "head", "query", "key"))
