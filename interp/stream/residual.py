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

from interp.core.errors import OutOfRange


class ResidualReducer:
    """Takes in states of consecutive positions, answers at the end; subclasses say what."""

    name = ""

    def __init__(self) -> None:
        self.start()

    def start(self, n_positions: int = 0) -> None:
        """Forget everything; `n_positions` is how many are expected (0: unknown)."""
        self._parts: dict[int, dict[str, Tensor]] = {}

    def add(self, residual: Float[Tensor, "position d_model"], first: int = 0) -> None:
        """Take in the states of positions first, first + 1, ..."""
        if first in self._parts:
            raise ValueError(
                f"position {first} was already added to the statistic {self.name!r}; call start() "
                "before a new sequence."
            )
        states = residual.detach()
        states = states.to(torch.promote_types(states.dtype, torch.float32))
        self._parts[first] = {k: v.cpu() for k, v in self._of(states, first).items()}

    def merge(self, other: "ResidualReducer") -> "ResidualReducer":
        """Both together, as if all positions had gone through one reducer."""
        if type(self) is not type(other) or self._settings() != other._settings():
            raise ValueError(f"cannot merge {self!r} with {other!r}: they measure different things.")
        both = copy.deepcopy(self)
        for first, part in other._parts.items():
            if first in both._parts:
                raise ValueError(f"position {first} is in both parts of {self.name!r}.")
            both._parts[first] = part
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
        """The statistic as a labelled array."""
        array = self._finish({k: v.numpy() for k, v in self._joined().items()})
        array = array.assign_coords(position=np.arange(array.sizes["position"]))
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
    """The largest coordinates by absolute value, with their dimension, and the median.

    Example:
        >>> reducer = TopDimensions(k=1)
        >>> reducer.add(torch.tensor([[1.0, -9.0, 2.0]]))
        >>> found = reducer.finish()
        >>> found.sel(quantity="value").values, found.sel(quantity="dimension").values
        (array([[-9.]]), array([[1.]]))

    Returns [position, rank, quantity]: "value" (signed), "dimension", and "median" of the absolute
    coordinates of the state (the same at every rank).

    Source: massive activations, arXiv:2402.17762 (there the median is over positions too).
    """

    name = "top_dimensions"

    def __init__(self, k: int = 3) -> None:
        if k < 1:
            raise ValueError(f"k is {k}; ask for at least one coordinate.")
        self.k = int(k)
        super().__init__()

    def _of(self, states: Tensor, first: int) -> dict[str, Tensor]:
        if self.k > states.shape[-1]:
            raise OutOfRange(f"k is {self.k}, but a state has {states.shape[-1]} coordinates.")
        size = states.abs()
        where = size.topk(self.k, dim=-1).indices
        return {"value": states.gather(-1, where), "dimension": where,
                "median": size.median(-1).values}

    def _finish(self, values: Mapping[str, np.ndarray]) -> xr.DataArray:
        median = np.repeat(values["median"][:, None], self.k, 1)
        found = np.stack([values["value"], values["dimension"], median], -1).astype(np.float64)
        return xr.DataArray(
            found, {"quantity": ["value", "dimension", "median"], "rank": np.arange(self.k)},
            ("position", "rank", "quantity"),
        )


class Cosine(ResidualReducer):
    """Signed cosine of every state to the state at a reference position [position].

    Example:
        >>> reducer = Cosine()
        >>> reducer.add(torch.tensor([[2.0, 0.0], [-1.0, 0.0], [0.0, 3.0]]))
        >>> reducer.finish().values
        array([ 1., -1.,  0.], dtype=float32)

    Args:
        reference: the position compared with; it must be in the first part that is added.

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
        self._state: Optional[Tensor] = None

    def _of(self, states: Tensor, first: int) -> dict[str, Tensor]:
        if self._state is None:
            index = self.reference - first
            if not 0 <= index < len(states):
                raise OutOfRange(
                    f"the reference position {self.reference} is not among positions {first} to "
                    f"{first + len(states) - 1}; add the part that holds it first."
                )
            self._state = states[index].clone()
        return {"cosine": torch.cosine_similarity(states, self._state[None], dim=-1)}

    def _finish(self, values: Mapping[str, np.ndarray]) -> xr.DataArray:
        return xr.DataArray(values["cosine"], dims="position")


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
        raise ValueError(f"there is no statistic {name!r}; choose from: {', '.join(NAMES)}.")
    return _REGISTERED[name](**settings)
