"""Statistics of attention by name: received mass, entropy, distance, segments, offsets, top keys...

Question  How much does each key receive, how sharp is each row, how far and where does it look?
Measure   each class says; row sums, denominators and NaN follow the conventions of the sink papers
"""

import inspect
from collections.abc import Iterable, Mapping
from typing import Any, Optional

import numpy as np
import torch
import xarray as xr
from torch import Tensor

from interp.core.errors import did_you_mean
from interp.stream.fused import Found
from interp.stream.received import Received, ValueWeighted
from interp.stream.reducer import Positions, Reducer, Where
from interp.stream.tile import Tile


class Entropy(Reducer):
    """Entropy of each row in nats [head, query].

    Example:
        >>> reducer = Entropy()
        >>> reducer.add(Tile(torch.full((1, 1, 1, 4), 0.2), torch.tensor([3]), torch.arange(4)))
        >>> round(float(reducer.finish()[0, 0]), 4), round(float(np.log(4)), 4)
        (1.3863, 1.3863)

    A row that sums to less than one (learned sink logits) is divided by its sum first.
    """

    name = "entropy"
    axes = {"entropy": ("query",)}
    wants_row_entropy = True

    def fused(self) -> bool:
        """As in `Reducer`."""
        return True

    def _take(self, found: Found) -> None:
        self._increase("entropy", found, found.entropy)

    def _add(self, tile: Tile) -> None:
        if tile.row_entropy is not None:
            if tile.first:
                self._increase("entropy", tile, tile.row_entropy)
            return
        # Divided before the logarithm: beside a learned sink that takes nearly all, probabilities
        # may be too small for float32 where the weights that they are made of are not.
        total = tile.mass if tile.row_sum is None else tile.row_sum
        share = total.reciprocal() if tile.scale is None else tile.scale / total
        p = tile.weights * share[..., None]
        # Zeros become tiny numbers: the logarithm of zero is slow, and no number.
        self._increase("entropy", tile, -torch.clamp(p, min=1e-37).log_().mul_(p).sum(-1))

    def _finish(self) -> xr.DataArray:
        entropy = self._state["entropy"].clamp_min(0)
        return self._labelled(self._per_query(entropy), "query").assign_attrs(units="nats")


class RowDeficit(Reducer):
    """What each row lacks to one: mass on learned sinks, outside of the sequence [head, query].

    Example:
        >>> reducer = RowDeficit()
        >>> reducer.add(Tile(torch.full((1, 1, 1, 4), 0.2), torch.tensor([3]), torch.arange(4)))
        >>> round(float(reducer.finish()[0, 0]), 4)
        0.2

    Source: arXiv:2309.17453 (SoftMax-off-by-one), s = 1 - sum_j A_tj.
    """

    name = "row_deficit"
    axes = {"mass": ("query",)}

    def fused(self) -> bool:
        """As in `Reducer`."""
        return True

    def _take(self, found: Found) -> None:
        self._increase("mass", found, found.mass)

    def _add(self, tile: Tile) -> None:
        self._increase("mass", tile, tile.mass)

    def _finish(self) -> xr.DataArray:
        return self._labelled(self._per_query(1 - self._state["mass"]), "query")


class Distance(Reducer):
    """Mean distance between a query and the keys it attends to, in tokens [head, query].

    Example:
        >>> reducer = Distance()
        >>> rows = torch.tensor([[[[0.25, 0.0, 0.0, 0.75]]]])
        >>> reducer.add(Tile(rows, torch.tensor([3]), torch.arange(4)))
        >>> float(reducer.finish()[0, 0])
        0.75

    Args:
        normalize: divide by the row's sum, for models with learned sink logits.

    Distances are absolute, also for keys after the query (bidirectional attention).

    Source: arXiv:2510.13554, attention span d = sum_s A_ts (t - s).
    """

    name = "distance"
    axes = {"distance": ("query",), "mass": ("query",)}

    def __init__(self, normalize: bool = False) -> None:
        self.normalize = normalize
        super().__init__()

    def fused(self) -> bool:
        """As in `Reducer`."""
        return True

    def _take(self, found: Found) -> None:
        self._increase("distance", found, found.distance)
        if self.normalize:
            self._increase("mass", found, found.mass)

    def _add(self, tile: Tile) -> None:
        w, first = tile.weights, tile.columns.start
        key = tile.key_positions - tile.first_query
        late = tile.query_positions - tile.first_query
        # With t0 the first query, t - s = (t - t0) + (t0 - s): for keys s <= t0 two sums that
        # cannot cancel, of which the second is a product with a vector.
        behind = min(max(tile.first_query + 1 - first, 0), tile.width)
        distance = torch.zeros_like(w[..., 0])
        if behind:
            whole = behind == tile.width and tile.scale is None
            mass = tile.mass if whole else w[..., :behind].sum(-1)
            distance = late * mass - torch.matmul(w[..., :behind], key[:behind].to(w.dtype))
        if behind < tile.width:
            distance += (w[..., behind:] * (late[:, None] - key[behind:]).abs()).sum(-1)
        distance = tile.scaled(distance)
        self._increase("distance", tile, distance)
        if self.normalize:
            self._increase("mass", tile, tile.mass)

    def _finish(self) -> xr.DataArray:
        distance = self._state["distance"]
        if self.normalize:
            distance = distance / self._state["mass"]
        array = self._labelled(self._per_query(distance), "query")
        return array.assign_attrs(units="tokens", normalize=int(self.normalize))


class SegmentMass(Reducer):
    """Attention on each named segment of the keys [head, query, segment].

    Example:
        >>> reducer = SegmentMass({"sink": [0], "rest": slice(1, None)})
        >>> rows = torch.tensor([[[[0.5, 0.25, 0.25]]]])
        >>> reducer.add(Tile(rows, torch.tensor([2]), torch.arange(3)))
        >>> reducer.finish().sel(segment="rest").values
        array([[0.5]], dtype=float32)

    Args:
        segments: name -> positions (indices, range or slice; an open slice goes to the last key).
            They may overlap and need not cover everything.

    Raises:
        ValueError: no segments, or a position below zero.
    """

    name = "segments"
    axes = {"mass": ("query", "segment")}

    def __init__(self, segments: Mapping[str, Positions]) -> None:
        if not segments:
            raise ValueError(
                "the statistic 'segments' needs named segments: segments={'needle': [3, 4, 5]}."
            )
        self.segments = {k: Where(where, f"segment {k!r}") for k, where in segments.items()}
        super().__init__()

    def sizes(self) -> dict[str, int]:
        return {"segment": len(self.segments)}

    def _add(self, tile: Tile) -> None:
        where = self._rows(tile)
        mass = self._state["mass"][where]
        for number, segment in enumerate(self.segments.values()):
            columns = segment.within(tile.columns)
            if isinstance(columns, slice):
                if columns.start < columns.stop:
                    mass[..., number] += tile.scaled(tile.weights[..., columns].sum(-1))
            elif columns:
                index = torch.tensor(columns, device=tile.weights.device)
                mass[..., number] += tile.scaled(tile.weights.index_select(-1, index).sum(-1))
        if not isinstance(tile.rows, slice):
            self._state["mass"][where] = mass

    def _finish(self) -> xr.DataArray:
        return self._labelled(self._per_query(self._state["mass"]), "query", "segment",
                              segment=list(self.segments))


class Offsets(Reducer):
    """Mean attention at fixed relative positions, key minus query [head, offset].

    Example:
        >>> reducer = Offsets([-1, 0])
        >>> rows = torch.tensor([[[[1.0, 0.0], [0.25, 0.75]]]])
        >>> seen = torch.ones(1, 1, 2, 2, dtype=torch.bool).tril()
        >>> reducer.add(Tile(rows, torch.arange(2), torch.arange(2), seen))
        >>> reducer.finish().values
        array([[0.25 , 0.875]], dtype=float32)

    Args:
        offsets: -1 is the previous token, 0 the query's own.
        subset: only these query positions count.
        per_query: keep every query, [head, query, offset], instead of their mean.

    Only queries that can see a key at the offset count; NaN if there is none.
    """

    name = "offsets"

    def __init__(
        self, offsets: Iterable[int] = (-1, 0), subset: Optional[Positions] = None,
        per_query: bool = False,
    ) -> None:
        self.offsets = tuple(int(o) for o in offsets)
        if not self.offsets or len(set(self.offsets)) < len(self.offsets):
            raise ValueError(f"offsets must be different numbers, at least one, not {offsets!r}.")
        self.subset = None if subset is None else Where(subset, "subset")
        self.per_query = per_query
        super().__init__()

    @property
    def axes(self) -> dict[str, tuple[str, ...]]:  # type: ignore[override]
        """As in `Reducer`."""
        shape = ("query", "offset") if self.per_query else ("offset",)
        return {"mass": shape, "count": shape}

    def sizes(self) -> dict[str, int]:
        return {"offset": len(self.offsets)}

    def dtype(self, entry: str) -> torch.dtype:
        return torch.int64 if entry == "count" else torch.float64

    def only_rows(self) -> Optional[Where]:
        """As in `Reducer`; with `per_query` the axis has all of them."""
        return None if self.per_query else self.subset

    def _add(self, tile: Tile) -> None:
        first, last = tile.columns.start, tile.columns.stop
        low, high = min(self.offsets), max(self.offsets)
        if tile.last_query + high < first or tile.first_query + low >= last:
            return
        offsets = torch.tensor(self.offsets, device=tile.query_positions.device)
        column = tile.query_positions[:, None] + offsets - first
        there = (column >= 0) & (column < last - first)
        if self.subset is not None:
            there &= self.subset.among(tile.query_positions)[:, None]
        shape = tile.weights.shape
        column = column.clamp(0, last - first - 1).expand(*shape[:2], -1, -1)
        there = there.expand_as(column)
        if tile.visible is not None:
            there = there & tile.visible.expand(shape).gather(-1, column)
        mass = tile.scaled(tile.weights.gather(-1, column) * there)
        if self.per_query:
            self._increase("mass", tile, mass)
            self._increase("count", tile, there)
        else:
            self._state["mass"][tile.sequences, tile.heads] += mass.sum(-2)
            self._state["count"][tile.sequences, tile.heads] += there.sum(-2)

    def _finish(self) -> xr.DataArray:
        mean = self._state["mass"] / self._state["count"]
        labels = {"offset": list(self.offsets)}
        if self.per_query:
            return self._labelled(self._per_query(mean), "query", "offset", **labels)
        return self._labelled(mean.cpu().numpy().astype(np.float32), "offset", **labels)


class TopKeys(Reducer):
    """The k keys that each query attends to most [head, query, rank, quantity].

    Example:
        >>> reducer = TopKeys(2)
        >>> rows = torch.tensor([[[[0.25, 0.5, 0.25]]]])
        >>> reducer.add(Tile(rows, torch.tensor([2]), torch.arange(3)))
        >>> top = reducer.finish()
        >>> top.sel(quantity="value").values, top.sel(quantity="key").values
        (array([[[0.5 , 0.25]]]), array([[[1., 0.]]]))

    The last axis, `quantity`, holds the probability ("value") and the position ("key"); both are
    NaN where a query sees fewer than k keys. Of equal probabilities the earlier key comes first.
    """

    name = "top_keys"
    axes = {"top": ("query", "rank")}

    def __init__(self, k: int = 1) -> None:
        if k < 1:
            raise ValueError(f"k is {k}; ask for at least one key.")
        self.k = k
        super().__init__()

    def sizes(self) -> dict[str, int]:
        return {"rank": self.k}

    def dtype(self, entry: str) -> torch.dtype:
        return torch.int64

    def fused(self) -> bool:
        """As in `Reducer`; a kernel keeps one key of each row."""
        return self.k == 1

    def _take(self, found: Found) -> None:
        packed = _pack(found.top_probability, found.top_key).masked_fill(~found.seen, 0)
        self._state["top"][self._rows(found)] = packed[..., None]

    def _add(self, tile: Tile) -> None:
        w, key = tile.weights.flatten(0, 2), tile.key_positions
        before = self._state["top"][self._rows(tile)].reshape(-1, self.k)
        scale = None if tile.scale is None else tile.scale.reshape(-1, 1)
        if self.k == 1:
            best, index = _first_largest(w)
            unclear = torch.zeros_like(before[:, 0], dtype=torch.bool)
        else:
            # One more than asked for shows where equals compete for the last place.
            best, index = w.topk(min(self.k + 1, w.shape[1]), -1)
            unclear = best[:, self.k - 1 : self.k].eq(best[:, self.k :]).any(-1)
            best, index = best[:, : self.k], index[:, : self.k]
        found = self._better(before, best, scale, key[index])
        if tile.visible is not None:
            # A hidden key has probability zero; a visible one may have, too.
            unclear = unclear | ((found > 0) & (_probability(found) == 0)).any(-1)
        rows = unclear.nonzero()[:, 0]
        if len(rows):
            visible = None
            if tile.visible is not None:
                visible = tile.visible.expand(tile.weights.shape).flatten(0, 2)[rows]
            found[rows] = self._better(
                before[rows], w[rows], None if scale is None else scale[rows], key, visible)
        self._state["top"][self._rows(tile)] = found.view(*tile.weights.shape[:3], self.k)

    def _better(
        self, before: Tensor, weight: Tensor, scale: Optional[Tensor], key: Tensor,
        visible: Optional[Tensor] = None,
    ) -> Tensor:
        """The k best of those already found and these, packed."""
        packed = _pack(weight if scale is None else weight * scale, key)
        if visible is not None:
            packed = packed.masked_fill(~visible, 0)
        if self.k == 1:
            return torch.maximum(before, packed.amax(-1, True))
        return torch.cat([before, packed], -1).topk(self.k, -1).values

    def _finish(self) -> xr.DataArray:
        top = self._state["top"][:, :, self._queries()].cpu()
        both = torch.stack([_probability(top).double(), (_LAST - (top & _LAST)).double()], -1)
        both = both.masked_fill((top == 0)[..., None], torch.nan).numpy()
        return self._labelled(both, "query", "rank", "quantity", rank=np.arange(self.k),
                              quantity=["value", "key"])


def _first_largest(weights: Tensor) -> tuple[Tensor, Tensor]:
    """The largest of each row [row, 1] and where it is, the first of equals.

    A maximum with its index takes several times as long as one without, so all but a chunk of each
    row is looked through without.
    """
    width = weights.shape[-1]
    whole = width - width % CHUNK
    if width <= CHUNK or weights.shape[0] == 1:
        return weights.max(-1, True)
    chunks = weights[:, :whole].unflatten(-1, (-1, CHUNK))
    best, chunk = chunks.amax(-1).max(-1, True)
    rows = torch.arange(len(weights), device=weights.device)
    index = chunk * CHUNK + chunks[rows, chunk[:, 0]].max(-1, True).indices
    if whole < width:
        last, place = weights[:, whole:].max(-1, True)
        index = torch.where(last > best, place + whole, index)
        best = torch.maximum(best, last)
    return best, index


CHUNK = 64
_LAST = 0xFFFFFFFF


# A non-negative float32 orders like its bits, so that one integer (bits, reversed key) orders by
# probability and then by key, in whatever order tiles come; 0 stands for "none".
def _pack(probability: Tensor, key: Tensor) -> Tensor:
    bits = probability.float().contiguous().view(torch.int32).to(torch.int64)
    return (bits << 32) | (_LAST - key.to(torch.int64))


def _probability(packed: Tensor) -> Tensor:
    return (packed >> 32).to(torch.int32).view(torch.float32)


_REGISTERED: dict[str, type[Reducer]] = {
    kind.name: kind
    for kind in (Received, Entropy, Distance, SegmentMass, TopKeys, Offsets, RowDeficit,
                 ValueWeighted)
}
NAMES = tuple(_REGISTERED)
"""Names of the statistics of attention."""


def by_name(name: str, **context: Any) -> Reducer:
    """A statistic by its name, with those settings that it knows.

    Example:
        >>> by_name("segments", segments={"image": range(4, 40)}, k=3).name
        'segments'
        >>> by_name("nothing")
        Traceback (most recent call last):
        ...
        ValueError: there is no statistic 'nothing'; choose from: received, entropy, distance, \
segments, top_keys, offsets, row_deficit, value_weighted.

    Args:
        context: settings of any statistics (k, segments, offsets, ...); each takes its own.

    Raises:
        ValueError: the name, or a setting that no statistic has.
    """
    if name not in _REGISTERED:
        raise ValueError(f"there is no statistic {name!r}; choose from: {', '.join(NAMES)}."
                         f"{did_you_mean(name, NAMES)}")
    known = {k: set(inspect.signature(v.__init__).parameters) - {"self"}
             for k, v in _REGISTERED.items()}
    strange = set(context) - set().union(*known.values())
    if strange:
        raise ValueError(
            f"no statistic has the setting {sorted(strange)[0]!r}; {name!r} takes: "
            f"{', '.join(sorted(known[name])) or 'none'}."
        )
    given = {k: v for k, v in context.items() if k in known[name]}
    if name == "segments" and "segments" not in given:
        given["segments"] = {}
    return _REGISTERED[name](**given)
