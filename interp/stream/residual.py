"""Statistics of the residual stream by name: norm, largest coordinates, cosine to a position.

Question  Which positions carry a large state, in which coordinates, and which states point alike?
Measure   each class says; one reducer per prompt and layer, fed pass after pass in order
"""

import copy
from collections.abc import Mapping
from typing import Any, Optional

import numpy as np
import torch
import xarray as xr
from jaxtyping import Float
from torch import Tensor

from interp.core.errors import OutOfRange, did_you_mean


class ResidualReducer:
    """Takes in states of consecutive positions, answers at the end; subclasses say what."""

    name = ""

    def __init__(self) -> None:
        self.start()

    def start(self, n_positions: int = 0) -> None:
        """Forget everything; `n_positions` is how many are expected (0: unknown)."""
        self._parts: dict[int, dict[str, Tensor]] = {}

    def add(self, residual: Float[Tensor, "position d_model"], first: int = 0) -> None:
        """Take in the states of positions first, first + 1, ...

        Raises:
            ValueError: a position that is there already, or states of another width.
        """
        if not len(residual):
            return
        states = residual.detach()
        states = states.to(torch.promote_types(states.dtype, torch.float32))
        self._insert(first, {k: v.cpu() for k, v in self._of(states, first).items()})

    def _insert(self, first: int, part: dict[str, Tensor]) -> None:
        size = len(next(iter(part.values())))
        for start, other in self._parts.items():
            stop = start + len(next(iter(other.values())))
            if start < first + size and first < stop:
                raise ValueError(
                    f"position {max(start, first)} was already added to the statistic "
                    f"{self.name!r}; call start() before a new sequence."
                )
        self._parts[first] = part

    def merge(self, other: "ResidualReducer") -> "ResidualReducer":
        """Both together, as if all positions had gone through one reducer.

        Raises:
            ValueError: settings differ, or a position is in both.
        """
        if type(self) is not type(other) or self._settings() != other._settings():
            raise ValueError(f"cannot merge {self!r} with {other!r}: they are not the same.")
        both = copy.deepcopy(self)
        for first, part in other._parts.items():
            both._insert(first, part)
        return both

    def _settings(self) -> dict[str, Any]:
        return {k: v for k, v in vars(self).items() if not k.startswith("_")}

    def __repr__(self) -> str:
        inner = ", ".join(f"{k}={v!r}" for k, v in self._settings().items())
        return f"{type(self).__name__}({inner})"

    def _joined(self) -> dict[str, Tensor]:
        if not self._parts:
            raise ValueError(f"the statistic {self.name!r} saw no states; run a model first.")
        ordered = [self._parts[first] for first in sorted(self._parts)]
        return {k: torch.cat([part[k] for part in ordered]) for k in ordered[0]}

    def finish(self) -> xr.DataArray:
        """The statistic as a labelled array, positions in order; more may follow.

        Raises:
            ValueError: nothing was added.
        """
        array = self._finish({k: v.numpy() for k, v in self._joined().items()})
        held = [np.arange(first, first + len(next(iter(part.values()))))
                for first, part in sorted(self._parts.items())]
        array = array.assign_coords(position=np.concatenate(held))
        array.name = self.name
        return array

    def _of(self, states: Tensor, first: int) -> dict[str, Tensor]:
        raise NotImplementedError

    def _finish(self, values: Mapping[str, np.ndarray]) -> xr.DataArray:
        raise NotImplementedError


class Norm(ResidualReducer):
    """Euclidean norm of every state [position].

    Example:
        >>> reducer = Norm()
        >>> reducer.add(torch.tensor([[3.0, 4.0], [0.0, 1.0]]))
        >>> reducer.finish().values
        array([5., 1.], dtype=float32)
    """

    name = "norm"

    def _of(self, states: Tensor, first: int) -> dict[str, Tensor]:
        return {"norm": states.norm(dim=-1)}

    def _finish(self, values: Mapping[str, np.ndarray]) -> xr.DataArray:
        return xr.DataArray(values["norm"], dims="position")


class TopDimensions(ResidualReducer):
    """The largest coordinates by absolute value, with their dimension, and medians.

    Example:
        >>> reducer = TopDimensions(k=1)
        >>> reducer.add(torch.tensor([[1.0, -9.0, 2.0]]))
        >>> found = reducer.finish()
        >>> found.sel(quantity="value").values, found.sel(quantity="dimension").values
        (array([[-9.]]), array([[1.]]))

    Returns [position, rank, quantity]: "value" (signed), "dimension", "median" of the absolute
    coordinates of the state, and "median_all", of those of all states. The last comes from counts
    (see `Counts`), with a relative error below 2e-4.

    Source: massive activations, arXiv:2402.17762 (the median is "median_all" there).
    """

    name = "top_dimensions"

    def __init__(self, k: int = 3) -> None:
        if k < 1:
            raise ValueError(f"k is {k}; ask for at least one coordinate.")
        self.k = int(k)
        super().__init__()

    def start(self, n_positions: int = 0) -> None:
        super().start(n_positions)
        self._counts = Counts()

    def merge(self, other: "TopDimensions") -> "TopDimensions":  # type: ignore[override]
        """As in `ResidualReducer`."""
        both: Any = super().merge(other)
        both._counts = self._counts.merge(other._counts)
        return both

    def _of(self, states: Tensor, first: int) -> dict[str, Tensor]:
        width = states.shape[-1]
        if self.k > width:
            raise OutOfRange(f"k is {self.k}, but a state has {width} coordinates.")
        size = states.abs()
        self._counts.add(size)
        where = size.topk(self.k, dim=-1).indices
        lower, upper = (size.kthvalue(n + 1, dim=-1).values for n in ((width - 1) // 2, width // 2))
        median = (lower + upper) / 2
        return {"value": states.gather(-1, where), "dimension": where, "median": median}

    def _finish(self, values: Mapping[str, np.ndarray]) -> xr.DataArray:
        median = np.repeat(values["median"][:, None], self.k, 1)
        found = np.stack(
            [values["value"], values["dimension"], median,
             np.full_like(median, self._counts.median())], -1
        ).astype(np.float64)
        names = ["value", "dimension", "median", "median_all"]
        return xr.DataArray(found, {"quantity": names, "rank": np.arange(self.k)},
                            ("position", "rank", "quantity"))


class Counts:
    """How often each magnitude occurs, rounded to 13 binary digits: medians of what is not kept.

    Example:
        >>> counts = Counts()
        >>> counts.add(torch.tensor([[1.0, 5.0], [3.0, 100.0]]))
        >>> round(counts.median(), 2)
        4.0
    """

    _DROPPED = 11
    """Low bits of a float32 that are not told apart; its sign, the highest bit, is zero."""

    def __init__(self) -> None:
        self._codes = torch.zeros(0, dtype=torch.int64)
        self._numbers = torch.zeros(0, dtype=torch.int64)

    def add(self, magnitudes: Float[Tensor, "position d_model"]) -> None:
        """Count these numbers (not negative)."""
        bits = magnitudes.float().contiguous().view(torch.int32).flatten() >> self._DROPPED
        if len(bits) < 1 << 18:
            codes, numbers = bits.to(torch.int64).unique(return_counts=True)
        else:  # sorting many is slower than counting all possible codes
            numbers = torch.bincount(bits.to(torch.int64))
            codes = numbers.nonzero()[:, 0]
            numbers = numbers[codes]
        self._take(codes.cpu(), numbers.cpu())

    def merge(self, other: "Counts") -> "Counts":
        """The counts of both."""
        both = copy.deepcopy(self)
        both._take(other._codes, other._numbers)
        return both

    def _take(self, codes: Tensor, numbers: Tensor) -> None:
        self._codes, place = torch.cat([self._codes, codes]).unique(return_inverse=True)
        counted = torch.cat([self._numbers, numbers])
        self._numbers = torch.zeros_like(self._codes).index_add_(0, place, counted)

    def median(self) -> float:
        """The middle number, or the mean of the two in the middle."""
        reached = self._numbers.cumsum(0)
        total = int(reached[-1])
        middle = torch.tensor([(total - 1) // 2, total // 2])
        code = self._codes[torch.searchsorted(reached, middle, right=True)]
        # The middle of each interval of numbers that share a code; zero is itself.
        bits = (code << self._DROPPED) + (1 << (self._DROPPED - 1)) * (code > 0)
        return float(bits.to(torch.int32).view(torch.float32).double().mean())


class Cosine(ResidualReducer):
    """Signed cosine of every state to the state at a reference position [position].

    Example:
        >>> reducer = Cosine()
        >>> reducer.add(torch.tensor([[2.0, 0.0], [-1.0, 0.0], [0.0, 3.0]]))
        >>> reducer.finish().values
        array([ 1., -1.,  0.], dtype=float32)

    Args:
        reference: the position compared with. States added before it are kept until it comes.

    Raises:
        OutOfRange: the reference is negative, or was never added.

    Source: arXiv:2512.22213 (there of post-block states, to the primary sink).
    """

    name = "cosine"

    def __init__(self, reference: int = 0) -> None:
        if reference < 0:
            raise OutOfRange(f"reference is {reference}; count positions from 0.")
        self.reference = int(reference)
        super().__init__()

    def start(self, n_positions: int = 0) -> None:
        super().start(n_positions)
        self._direction: Optional[Tensor] = None

    def merge(self, other: "Cosine") -> "Cosine":  # type: ignore[override]
        """As in `ResidualReducer`."""
        both: Any = super().merge(other)
        if both._direction is None:
            both._direction = other._direction
        both._resolve()
        return both

    def _insert(self, first: int, part: dict[str, Tensor]) -> None:
        super()._insert(first, part)
        self._resolve()

    def _resolve(self) -> None:
        """Compare what was waiting for the reference."""
        for part in self._parts.values() if self._direction is not None else ():
            if "waiting" in part:
                part["cosine"] = self._cosine(part.pop("waiting"))

    def _cosine(self, states: Tensor) -> Tensor:
        assert self._direction is not None
        return torch.cosine_similarity(states, self._direction.to(states)[None], dim=-1)

    def _of(self, states: Tensor, first: int) -> dict[str, Tensor]:
        index = self.reference - first
        if self._direction is None and 0 <= index < len(states):
            self._direction = states[index].clone()
        if self._direction is None:
            return {"waiting": states}
        return {"cosine": self._cosine(states)}

    def _finish(self, values: Mapping[str, np.ndarray]) -> xr.DataArray:
        return xr.DataArray(values["cosine"], dims="position")

    def _joined(self) -> dict[str, Tensor]:
        if self._parts and self._direction is None:
            raise OutOfRange(
                f"the reference position {self.reference} of the statistic 'cosine' was never "
                f"added; positions start at {min(self._parts)}."
            )
        return super()._joined()


_REGISTERED: dict[str, type[ResidualReducer]] = {
    each.name: each for each in (Norm, TopDimensions, Cosine)
}
NAMES = tuple(_REGISTERED)
"""Names of the statistics of the residual stream."""


def by_name(name: str, **settings: Any) -> ResidualReducer:
    """A statistic by its name.

    Example:
        >>> by_name("cosine", reference=2)
        Cosine(reference=2)

    Raises ValueError for a name that there is not.
    """
    if name not in _REGISTERED:
        raise ValueError(f"there is no statistic {name!r}; choose from: {', '.join(NAMES)}."
                         f"{did_you_mean(name, NAMES)}")
    return _REGISTERED[name](**settings)
