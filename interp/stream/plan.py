"""Checked shapes, positions and tile sizes of one call of `stream`."""

from collections.abc import Iterator, Sequence
from typing import Any, Optional

import torch
from torch import Tensor

from interp.core.errors import NumericalError

KEEP_BYTES = 1 << 28
"""Exponentials of a block of rows up to this size are kept between the two sweeps."""

TILE_SIZE = {"cpu": 1 << 20, "other": 1 << 25}
"""Probabilities in a tile: enough to hide the cost of a call, few enough for a cache."""


def indices(positions: Sequence[int]) -> Any:
    """A slice for consecutive positions, else a list.

    Example:
        >>> indices([3, 4, 5]), indices([5, 3])
        (slice(3, 6, None), [5, 3])
    """
    first = positions[0] if len(positions) else 0
    whole = list(positions) == list(range(first, first + len(positions)))
    return slice(first, first + len(positions)) if whole else list(positions)


class Plan:
    """What one call of `stream` was given, checked, and how it is cut into tiles."""

    def __init__(
        self, query: Tensor, key: Tensor, value: Optional[Tensor], query_offset: Optional[int],
        query_positions: Any, key_offset: int, tile: Optional[tuple[int, int]], keep_bytes: int,
    ) -> None:
        self.query, self.key, self.value = query, key, value
        self.batch, self.heads, self.n_queries, d_head = query.shape
        self.kv_heads, n_keys = key.shape[1], key.shape[2]
        if key.shape[0] != self.batch or key.shape[3] != d_head or self.heads % self.kv_heads:
            raise ValueError(
                f"query {tuple(query.shape)} [batch, head, query, d_head] and key "
                f"{tuple(key.shape)} [batch, kv_head, key, d_head] do not fit: batch and d_head "
                "must be equal and head a multiple of kv_head."
            )
        if value is not None and value.shape[:3] != key.shape[:3]:
            raise ValueError(
                f"value {tuple(value.shape)} and key {tuple(key.shape)} must agree in batch, "
                "kv_head and key."
            )
        if self.n_queries == 0 or n_keys == 0:
            raise ValueError(f"nothing to attend: {self.n_queries} queries, {n_keys} keys.")
        for name, x in (("query", query), ("key", key), ("value", value)):
            # A sum is finite only if all its terms are (or it overflows: then look closely).
            if x is not None and not bool(torch.isfinite(x.sum(dtype=torch.float32))):
                if not bool(torch.isfinite(x).all()):
                    raise NumericalError(
                        f"{name} contains NaN or infinity; recompute it in float32 or bfloat16."
                    )
        widest = torch.promote_types(query.dtype, key.dtype)
        self.dtype = torch.promote_types(widest, torch.float32)
        self.device = query.device
        self.keys = range(key_offset, key_offset + n_keys)
        self.positions = self._positions(query_offset, query_positions)
        self._choose_sizes(tile, keep_bytes)

    def _positions(self, offset: Optional[int], positions: Any) -> list[int]:
        if positions is not None:
            if offset is not None:
                raise ValueError("give query_offset or query_positions, not both.")
            found = [int(p) for p in positions]
            if len(found) != self.n_queries or min(found) < 0 or len(set(found)) != len(found):
                raise ValueError(
                    f"query_positions must hold {self.n_queries} different positions, one for "
                    f"each query, not {len(found)} ({len(set(found))} different)."
                )
            return found
        if offset is None:
            offset = self.keys.stop - self.n_queries
        if offset < 0:
            raise ValueError(
                f"there are {self.n_queries} queries but only {len(self.keys)} keys, so the "
                "queries cannot be the last positions; give query_offset (0 or more)."
            )
        return list(range(offset, offset + self.n_queries))

    def _choose_sizes(self, tile: Optional[tuple[int, int]], keep_bytes: int) -> None:
        """Tile sizes; how many sequences and key-value heads share a tile; whether to keep."""
        group, n_keys = self.heads // self.kv_heads, len(self.keys)
        size = TILE_SIZE["cpu" if self.device.type == "cpu" else "other"]
        if tile is None:
            self.width = min(1024 if self.device.type == "cpu" else 1 << 14, n_keys)
            self.rows = min(128, self.n_queries)
            while self.rows > 32 and group * self.rows * self.width > size:
                self.rows //= 2
            # Few queries (decoding) leave room for more keys.
            self.width = min(n_keys, max(self.width, size // (self.heads * self.rows)))
        else:
            if min(tile) < 1:
                raise ValueError(f"tile is {tile}; both sizes must be at least 1.")
            self.rows, self.width = min(tile[0], self.n_queries), min(tile[1], n_keys)
        pairs = max(1, size // (group * self.rows * self.width))
        self.kv_step = min(self.kv_heads, pairs)
        self.batch_step = max(1, min(self.batch, pairs // self.kv_heads))
        rows = self.batch_step * self.kv_step * group * self.rows
        self.tile_size = rows * self.width
        self.keep = rows * n_keys * self.dtype.itemsize <= keep_bytes

    def blocks(self) -> Iterator[slice]:
        """Blocks of rows, as slices of the query axis."""
        for first in range(0, self.n_queries, self.rows):
            yield slice(first, min(first + self.rows, self.n_queries))

    def groups(self) -> Iterator[tuple[slice, slice, slice]]:
        """Sequences, heads and their key-value heads that are worked on together."""
        group = self.heads // self.kv_heads
        for one in range(0, self.batch, self.batch_step):
            for two in range(0, self.kv_heads, self.kv_step):
                last = min(two + self.kv_step, self.kv_heads)
                yield (slice(one, min(one + self.batch_step, self.batch)),
                       slice(two * group, last * group), slice(two, last))
