"""A block of attention probabilities, as it is handed to reducers."""

from dataclasses import dataclass, field
from typing import Any, Optional

from jaxtyping import Bool, Float, Int
from torch import Tensor

from interp.stream.plan import indices


@dataclass
class Tile:
    """A block of attention probabilities, as reducers get it.

    Example:
        >>> import torch
        >>> tile = Tile(torch.full((1, 2, 3, 4), 0.25), torch.arange(1, 4), torch.arange(4))
        >>> tile.rows, tile.columns, tile.probabilities.shape
        (slice(1, 4, None), slice(0, 4, None), torch.Size([1, 2, 3, 4]))

    `stream` reuses the memory of the weights for the next tile: a reducer must not keep them.
    A tile made by hand holds whole rows of all heads, unless further fields say otherwise.

    Attributes:
        weights: probabilities after the softmax (rows may sum to less than one, with learned sink
            logits), or, with `scale`, what they are a multiple of. `probabilities` are the product.
        query_positions: absolute, in any order.
        key_positions: absolute and consecutive.
        visible: what the mask allows; None if it allows all of the tile.
        value: value vectors of these keys, if they were given to `stream`.
        layer: number of the block, for whoever cares.
        row_sum: sums of the whole rows, of which the tile holds a part.
        row_entropy: entropies of the whole rows, if a reducer wants them and they are known.
        first: this is the first tile of its rows.
        sequences, heads: which part of the batch and of the heads this is.
        partial: columns of the tile outside of which everything is visible.
        rows, columns: the positions once more, as slices or lists.
        scale: of each row; reducers that only add up weights save a pass over them with it.
        known_mass: `mass`, where it has been summed up already.
    """

    weights: Float[Tensor, "batch head query key"]
    query_positions: Int[Tensor, "query"]
    key_positions: Int[Tensor, "key"]
    visible: Optional[Bool[Tensor, "#batch #head #query #key"]] = None
    value: Optional[Float[Tensor, "batch kv_head key d_value"]] = None
    layer: Optional[int] = None
    row_sum: Optional[Float[Tensor, "batch head query"]] = None
    row_entropy: Optional[Float[Tensor, "batch head query"]] = None
    first: bool = True
    sequences: Any = field(default_factory=lambda: slice(None))
    heads: Any = field(default_factory=lambda: slice(None))
    partial: Any = field(default_factory=lambda: slice(None))
    rows: Any = None
    columns: Any = None
    scale: Optional[Float[Tensor, "batch head query"]] = None
    known_mass: Optional[Float[Tensor, "batch head query"]] = None

    def __post_init__(self) -> None:
        if self.rows is None:
            self.rows = indices(self.query_positions.tolist())
        if self.columns is None:
            self.columns = indices(self.key_positions.tolist())
            if not isinstance(self.columns, slice):
                raise ValueError("the keys of a tile must be consecutive positions.")
        contiguous = isinstance(self.rows, slice)
        self.first_query: int = self.rows.start if contiguous else min(self.rows)
        self.last_query: int = self.rows.stop - 1 if contiguous else max(self.rows)
        self.width: int = self.weights.shape[-1]
        self.announced = False
        # Whether all sequences, and all heads, see the same.
        self.alike = (True, True) if self.visible is None else tuple(
            n == 1 for n in self.visible.shape[:2])

    @property
    def probabilities(self) -> Float[Tensor, "batch head query key"]:
        """What each query gives to each key."""
        if self.scale is not None:
            self.weights *= self.scale[..., None]
            self.scale = None
        return self.weights

    @property
    def mass(self) -> Float[Tensor, "batch head query"]:
        """How much of each row lies in this tile."""
        if self.known_mass is None:
            self.known_mass = self.scaled(self.weights.sum(-1))
        return self.known_mass

    def scaled(self, sums: Float[Tensor, "batch head query *more"]) -> Tensor:
        """Sums of probabilities from sums of weights over keys."""
        if self.scale is None:
            return sums
        return sums * self.scale.reshape(*self.scale.shape, *[1] * (sums.ndim - 3))
