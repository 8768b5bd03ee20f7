"""What every statistic of attention is: start, add tiles, merge, finish."""

import copy
from collections.abc import Sequence
from typing import Any, ClassVar, Optional, Union

import numpy as np
import torch
import xarray as xr
from torch import Tensor

from interp.stream.fused import Found
from interp.stream.tile import Tile

Positions = Union[slice, range, Sequence[int], np.ndarray, Tensor]
"""A set of positions: indices, a range, or a slice (an open one goes to the last position)."""


class Reducer:
    """Sums over tiles, kept per head and per query or key; subclasses say which and what.

    Example:
        >>> from interp.stream.reducers import Entropy
        >>> rows = torch.tensor([[[[1.0, 0.0], [0.5, 0.5]]]])
        >>> reducer = Entropy()
        >>> reducer.add(Tile(rows, torch.arange(2), torch.arange(2)))
        >>> reducer.finish().values.round(3)
        array([[0.   , 0.693]], dtype=float32)

    Every entry of the state is a sum over tiles (or a set that grows), zero where nothing was
    added, so that the order of tiles and the split of queries do not matter.
    """

    name: ClassVar[str]
    axes: ClassVar[dict[str, tuple[str, ...]]]
    """Axes of each entry of the state after [batch, head]: "query", "key" or a named size."""

    def __init__(self) -> None:
        self.start()

    def start(self, n_heads: Optional[int] = None, n_queries: int = 0, n_keys: int = 0) -> None:
        """Forget everything; the sizes, where known, save the state from growing later."""
        self._n_heads, self._capacity = n_heads, {"query": n_queries, "key": n_keys}
        self._state: dict[str, Tensor] = {}
        self._seen = np.zeros(n_queries, dtype=bool)
        self._sighted = np.zeros(n_queries, dtype=bool)
        self._n_keys = self._batch = 0

    def sizes(self) -> dict[str, int]:
        """Lengths of axes other than query and key."""
        return {}

    def dtype(self, entry: str) -> torch.dtype:
        """The type of an entry of the state."""
        return torch.float64

    def only_rows(self) -> Optional["Where"]:
        """The only queries that this statistic looks at, None for all: others are not computed."""
        return None

    def fused(self) -> bool:
        """Whether a kernel's statistics of whole rows, handed to `take`, spare it the tiles."""
        return False

    def take(self, found: Found) -> None:
        """Take in whole rows instead of tiles (`interp.stream.fused`)."""
        self._increase("sighted", found, found.seen)
        self._take(found)

    def _take(self, found: Found) -> None:
        raise NotImplementedError

    def register(
        self, batch: int, n_heads: int, queries: Sequence[int], n_keys: int,
        device: Optional[torch.device] = None,
    ) -> None:
        """Announce queries that will be added; those that are there already are refused."""
        if self._n_heads not in (None, n_heads):
            raise ValueError(
                f"the statistic {self.name!r} was started for {self._n_heads} heads, "
                f"but is given {n_heads}."
            )
        if self._batch not in (0, batch):
            raise ValueError(
                f"the statistic {self.name!r} holds {self._batch} sequences, but is given {batch}; "
                "use one reducer for each batch."
            )
        self._n_heads, self._batch = n_heads, batch
        index = np.asarray(queries)
        self._reserve(int(index.max()) + 1, n_keys)
        if self._seen[index].any():
            twice = int(index[self._seen[index]][0])
            raise ValueError(
                f"query {twice} was already added to the statistic {self.name!r}; call start() "
                "before a new sequence, or use one reducer for each."
            )
        self._seen[index] = True
        if not self._state:
            self._allocate(device)

    def _reserve(self, n_queries: int, n_keys: int) -> None:
        """Make room; capacities double, so that decoding token by token stays linear."""
        self._n_keys = max(self._n_keys, n_keys)
        needed = {"query": n_queries, "key": n_keys}
        if any(size > self._capacity[axis] for axis, size in needed.items()):
            for axis, size in needed.items():
                old = self._capacity[axis]
                self._capacity[axis] = max(size, 2 * old if 0 < old < size else old)
            self._grow()

    def _grow(self) -> None:
        missing = self._capacity["query"] - len(self._seen)
        self._seen = np.pad(self._seen, (0, missing))
        self._sighted = np.pad(self._sighted, (0, missing))
        for entry, values in self._state.items():
            made = values.new_zeros([*values.shape[:2], *self._shape(entry)])
            made[tuple(slice(n) for n in values.shape)] = values
            self._state[entry] = made

    def _shape(self, entry: str) -> list[int]:
        sizes = {**self._capacity, **self.sizes()}
        return [sizes[axis] for axis in ({**self.axes, "sighted": ("query",)})[entry]]

    def _allocate(self, device: Optional[torch.device]) -> None:
        for entry in (*self.axes, "sighted"):
            kind = torch.bool if entry == "sighted" else self.dtype(entry)
            if kind == torch.float64 and device is not None and device.type == "mps":
                kind = torch.float32
            shape = [self._batch, self._n_heads or 0, *self._shape(entry)]
            self._state[entry] = torch.zeros(shape, dtype=kind, device=device)

    def add(self, tile: Tile) -> None:
        """Take in one tile."""
        if not tile.announced:
            known = tile.last_query < len(self._seen) and self._seen[tile.rows].all()
            if not known:
                batch, heads = tile.weights.shape[:2]
                self.register(batch, heads, _positions(tile.rows), tile.columns.stop,
                              tile.weights.device)
            elif tile.columns.stop > self._n_keys:
                self._reserve(0, tile.columns.stop)
        if tile.visible is None or tile.partial.indices(tile.width) != (0, tile.width, 1):
            self._sighted[tile.rows] = True
        else:
            self._increase("sighted", tile, tile.visible.any(-1))
        self._add(tile)

    @staticmethod
    def _rows(tile: Union[Tile, Found]) -> tuple[slice, slice, Any]:
        """Where the tile's queries are in the state."""
        return tile.sequences, tile.heads, tile.rows

    def _increase(self, entry: str, tile: Union[Tile, Found], values: Tensor) -> None:
        """Add to the state of the tile's queries."""
        where = self._rows(tile)
        if isinstance(tile.rows, slice):
            self._state[entry][where].add_(values)
        else:
            self._state[entry][where] += values

    def _add(self, tile: Tile) -> None:
        raise NotImplementedError

    def merge(self, other: "Reducer", axis: str = "query") -> "Reducer":
        """Both together, as if their queries (or sequences) had gone through one reducer.

        Args:
            axis: "query" for further queries of the same sequences; "batch" for further sequences
                with the same queries.

        Raises:
            ValueError: settings differ, or queries overlap ("query") or differ ("batch").
        """
        if type(self) is not type(other) or self._settings() != other._settings():
            raise ValueError(f"cannot merge {self!r} with {other!r}: they are not the same.")
        if axis not in ("query", "batch"):
            raise ValueError(f"axis must be 'query' or 'batch', not {axis!r}.")
        one, two = copy.deepcopy(self), copy.deepcopy(other)
        for axis_name in ("query", "key"):
            size = max(self._capacity[axis_name], other._capacity[axis_name])
            one._capacity[axis_name] = two._capacity[axis_name] = size
        for each in (one, two):
            each._grow()
        one._n_keys = max(self._n_keys, other._n_keys)
        if axis == "batch":
            one._join_sequences(two)
        else:
            one._join_queries(two)
        return one

    def _join_queries(self, other: "Reducer") -> None:
        both = self._seen & other._seen
        if both.any():
            raise ValueError(
                f"query {int(both.argmax())} is in both parts of the statistic {self.name!r}; "
                "merge parts with different queries, or axis='batch' for different sequences."
            )
        for entry, values in other._state.items():
            mine = self._state.get(entry)
            self._state[entry] = values if mine is None else mine + values.to(mine.device)
        self._seen |= other._seen
        self._sighted |= other._sighted

    def _join_sequences(self, other: "Reducer") -> None:
        if (self._seen != other._seen).any() or not self._state or not other._state:
            raise ValueError(
                f"sequences of the statistic {self.name!r} can be joined only if both have "
                "the same queries."
            )
        for each in (self, other):
            # What all sequences of a part could see becomes explicit: the other part may differ.
            sighted = each._state["sighted"]
            sighted |= torch.as_tensor(each._sighted, device=sighted.device)
            each._sighted = np.zeros_like(each._sighted)
        self._batch += other._batch
        self._state = {
            k: torch.cat([v, other._state[k].to(v.device)]) for k, v in self._state.items()
        }

    def _settings(self) -> dict[str, Any]:
        return {k: repr(v) for k, v in vars(self).items() if not k.startswith("_")}

    def __repr__(self) -> str:
        inner = ", ".join(f"{k}={v}" for k, v in self._settings().items())
        return f"{type(self).__name__}({inner})"

    def finish(self, keep_batch: bool = False) -> xr.DataArray:
        """The statistic as a labelled array; more tiles may follow.

        Args:
            keep_batch: keep the leading axis `batch` also for a single sequence.

        Raises:
            ValueError: nothing was added.
        """
        if not self._state:
            raise ValueError(f"the statistic {self.name!r} saw no attention; run a model first.")
        array = self._finish()
        array.name = self.name
        return array if keep_batch or array.sizes["batch"] > 1 else array.isel(batch=0, drop=True)

    def _finish(self) -> xr.DataArray:
        raise NotImplementedError

    def _queries(self) -> np.ndarray:
        return np.flatnonzero(self._seen)

    def _per_query(self, values: Tensor) -> np.ndarray:
        """State [batch, head, query, ...] of the queries seen; NaN where a row saw nothing."""
        sighted = self._state["sighted"].cpu().numpy() | self._sighted
        found = values.cpu().numpy().astype(np.float32)
        found[~sighted] = np.nan
        return found[:, :, self._queries()]

    def _labelled(self, values: np.ndarray, *axes: str, **coords: Any) -> xr.DataArray:
        labels: dict[str, Any] = {"head": np.arange(values.shape[1])}
        if "query" in axes:
            labels["query"] = self._queries()
        if "key" in axes:
            labels["key"] = np.arange(self._n_keys)
        return xr.DataArray(values, {**labels, **coords}, ("batch", "head", *axes))


class Where:
    """A set of positions, given as indices, range or slice."""

    def __init__(self, where: Positions, what: str) -> None:
        if isinstance(where, slice):
            start, stop, step = where.start or 0, where.stop, where.step or 1
            bad = start < 0 or step < 1 or (stop is not None and stop < 0)
            self.bounds: Any = (start, stop, step)
        else:
            self.bounds = tuple(sorted(int(p) for p in where))
            bad = bool(self.bounds) and self.bounds[0] < 0
        self.is_slice = isinstance(where, slice)
        self.consecutive = ()
        if not self.is_slice and self.bounds:
            low, high = self.bounds[0], self.bounds[-1] + 1
            if self.bounds == tuple(range(low, high)):
                self.consecutive = (low, high)
        if bad:
            raise ValueError(
                f"{what} has a position below zero ({where!r}); count from the start: positions "
                "are streamed, the length is not known."
            )

    def among(self, positions: Tensor) -> Tensor:
        """True for the positions that are in the set."""
        if not self.is_slice:
            return torch.isin(positions, torch.tensor(self.bounds, dtype=positions.dtype,
                                                      device=positions.device))
        start, stop, step = self.bounds
        inside = (positions >= start) & ((positions - start) % step == 0)
        return inside if stop is None else inside & (positions < stop)

    def within(self, keys: slice) -> Any:
        """Columns of a range of keys that are in the set: a slice, or a list."""
        if self.is_slice and self.bounds[2] == 1:
            first, last = self.bounds[0], keys.stop if self.bounds[1] is None else self.bounds[1]
        elif self.is_slice or not self.consecutive:
            inside = self.among(torch.arange(keys.start, keys.stop))
            return inside.nonzero()[:, 0].tolist()
        else:
            first, last = self.consecutive
        return slice(max(first - keys.start, 0), max(min(last, keys.stop) - keys.start, 0))

    def __repr__(self) -> str:
        return f"slice{self.bounds}" if self.is_slice else str(self.bounds)


def _positions(rows: Any) -> Sequence[int]:
    return range(rows.start, rows.stop) if isinstance(rows, slice) else rows
