"""Which keys a query may see, evaluated tile by tile; its structure lets tiles be skipped."""

import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Optional

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

Keys = tuple[int, int]
"""A half-open range of key positions."""

UNBOUNDED = 1 << 30
"""Farther than any key."""


def _anywhere(first: int, last: int) -> Keys:
    return (0, sys.maxsize)


def _nowhere(first: int, last: int) -> Keys:
    return (0, 0)


@dataclass(frozen=True)
class Mask:
    """Visibility of keys, as a function of absolute query and key positions.

    Example:
        >>> mask = causal() & Mask(lambda query, key: key % 2 == 0)
        >>> mask(torch.tensor([2, 3]), torch.arange(4)).int()
        tensor([[1, 0, 1, 0],
                [1, 0, 1, 0]], dtype=torch.int32)
        >>> mask.reach(2, 3)
        (0, 4)

    Combine masks with `&` and `|`, also with a dense tensor or a function (see `as_mask`).

    Attributes:
        visible: the rule; gets query positions as a column and key positions as a row, and returns
            booleans that broadcast to [batch, head, query, key].
        reach: (first query, last query) -> range of keys outside of which nothing is visible to
            any query in between; tiles outside are never computed.
        full: (first query, last query) -> range of keys visible to every query in between; tiles
            inside are never masked.
        bias: added to the logits (after soft-capping), same arguments as `visible`.
        band: (behind, ahead), where visible is exactly -behind <= key - query <= ahead.
    """

    visible: Callable[[Tensor, Tensor], Tensor]
    reach: Callable[[int, int], Keys] = _anywhere
    full: Callable[[int, int], Keys] = _nowhere
    bias: Optional[Callable[[Tensor, Tensor], Tensor]] = None
    band: Optional[tuple[int, int]] = None

    def __call__(
        self, query: Int[Tensor, "query"], key: Int[Tensor, "key"]
    ) -> Bool[Tensor, "*shape query key"]:
        """True where the query may see the key, at least [query, key]."""
        seen = self.visible(query[:, None], key)
        return seen.expand(*seen.shape[:-2], len(query), len(key))

    def __and__(self, other: Any) -> "Mask":
        other = as_mask(other)

        def visible(query: Tensor, key: Tensor) -> Tensor:
            return self.visible(query, key) & other.visible(query, key)

        def both(mine: Callable, theirs: Callable) -> Callable[[int, int], Keys]:
            def meet(first: int, last: int) -> Keys:
                (a, b), (c, d) = mine(first, last), theirs(first, last)
                return max(a, c), min(b, d)
            return meet

        biases = [m.bias for m in (self, other) if m.bias is not None]
        bias = None
        if biases:
            bias = biases[0] if len(biases) == 1 else lambda q, k: biases[0](q, k) + biases[1](q, k)
        band = None
        if self.band is not None and other.band is not None:
            band = min(self.band[0], other.band[0]), min(self.band[1], other.band[1])
        return Mask(
            visible, both(self.reach, other.reach), both(self.full, other.full), bias, band)

    def __rand__(self, other: Any) -> "Mask":
        return as_mask(other) & self

    def __or__(self, other: Any) -> "Mask":
        other = as_mask(other)
        if self.bias is not None or other.bias is not None:
            raise ValueError(
                "masks with an additive bias cannot be joined with '|': it is not defined which "
                "bias holds where both allow a key; join boolean masks and add the bias with '&'."
            )

        def visible(query: Tensor, key: Tensor) -> Tensor:
            return self.visible(query, key) | other.visible(query, key)

        def reach(first: int, last: int) -> Keys:
            (a, b), (c, d) = self.reach(first, last), other.reach(first, last)
            return min(a, c), max(b, d)

        def full(first: int, last: int) -> Keys:
            one, two = sorted((self.full(first, last), other.full(first, last)))
            if one[0] < one[1] and two[0] < two[1] and two[0] <= one[1]:
                return one[0], max(one[1], two[1])
            return max(one, two, key=lambda keys: keys[1] - keys[0])

        return Mask(visible, reach, full)

    def __ror__(self, other: Any) -> "Mask":
        return as_mask(other) | self


def as_mask(given: Any) -> Mask:
    """A mask from a mask, a dense tensor, or a function of 1-D query and key positions.

    Example:
        >>> def itself(query, key):
        ...     return key[None] == query[:, None]
        >>> as_mask(itself)(torch.arange(2), torch.arange(2))
        tensor([[ True, False],
                [False,  True]])

    Raises:
        ValueError: it is none of these.
    """
    if isinstance(given, Mask):
        return given
    if isinstance(given, Tensor):
        return from_tensor(given)
    if callable(given):
        rule: Any = given
        return Mask(lambda query, key: rule(query.flatten(), key))
    raise ValueError(
        f"mask is a {type(given).__name__}; give causal(), sliding_window(w), bidirectional(), "
        "from_tensor(dense) or a function of query and key positions."
    )


def causal() -> Mask:
    """Every key up to and including the query's own position.

    Example:
        >>> causal()(torch.tensor([1]), torch.arange(3))
        tensor([[ True,  True, False]])
    """
    return Mask(
        lambda query, key: key <= query,
        reach=lambda first, last: (0, last + 1),
        full=lambda first, last: (0, first + 1),
        band=(UNBOUNDED, 0),
    )


def sliding_window(window: int, bidirectional: bool = False) -> Mask:
    """The last `window` keys, the query's own position among them.

    Example:
        >>> sliding_window(2)(torch.tensor([2]), torch.arange(4))
        tensor([[False,  True,  True, False]])
        >>> sliding_window(2, bidirectional=True)(torch.tensor([2]), torch.arange(5))
        tensor([[False,  True,  True,  True, False]])

    Args:
        window: distances below it are visible; the `sliding_window` of transformers' configs.
        bidirectional: also look ahead, for encoders.

    Raises:
        ValueError: the window is smaller than one.
    """
    if window < 1:
        raise ValueError(f"window is {window}; a query must at least see itself: give 1 or more.")
    ahead = window if bidirectional else 1
    return Mask(
        lambda query, key: (query - key < window) & (key - query < ahead),
        reach=lambda first, last: (first - window + 1, last + ahead),
        full=lambda first, last: (last - window + 1, first + ahead),
        band=(window - 1, ahead - 1),
    )


def bidirectional() -> Mask:
    """Every key.

    Example:
        >>> bidirectional()(torch.tensor([0]), torch.arange(2))
        tensor([[True, True]])
    """
    return Mask(
        lambda query, key: torch.ones_like(query >= key), reach=_anywhere, full=_anywhere,
        band=(UNBOUNDED, UNBOUNDED),
    )


def padding(valid: Bool[Tensor, "batch key"]) -> Mask:
    """Hide padding: invalid positions are neither seen nor see anything; join with `causal()`.

    Example:
        >>> valid = torch.tensor([[False, True, True]])
        >>> (causal() & padding(valid))(torch.tensor([0, 2]), torch.arange(3)).shape
        torch.Size([1, 1, 2, 3])
        >>> (causal() & padding(valid))(torch.tensor([0, 2]), torch.arange(3))[0, 0]
        tensor([[False, False, False],
                [False,  True,  True]])

    Rows that see nothing have NaN statistics and zero output.
    """
    common = valid.all(0).nonzero().flatten().tolist()
    whole = bool(common) and common[-1] - common[0] + 1 == len(common)

    def full(first: int, last: int) -> Keys:
        inside = whole and common[0] <= first and last <= common[-1]
        return (common[0], common[-1] + 1) if inside else (0, 0)

    def visible(query: Tensor, key: Tensor) -> Tensor:
        here = valid.to(key.device)
        return here[:, None, query.flatten(), None] & here[:, None, None, key]

    return Mask(visible, full=full)


def from_tensor(
    dense: Bool[Tensor, "*shape query key"] | Float[Tensor, "*shape query key"],
    query_offset: int = 0,
    key_offset: int = 0,
) -> Mask:
    """A dense mask: boolean (True is visible) or additive (large negative is hidden).

    Example:
        >>> mask = from_tensor(torch.tensor([[0.0, -3.4e38], [0.5, 0.0]]))
        >>> mask(torch.arange(2), torch.arange(2))
        tensor([[ True, False],
                [ True,  True]])
        >>> mask.bias(torch.tensor([[1]]), torch.arange(2))
        tensor([[0.5000, 0.0000]])

    Args:
        dense: its leading axes broadcast to [batch, head].
        query_offset: the position of its first row.
        key_offset: the position of its first column.

    Additive values below half of their type's most negative number hide a key; all others are
    added to the logits.
    """
    def at(values: Tensor, query: Tensor, key: Tensor) -> Tensor:
        rows = query.flatten() - query_offset
        if bool((rows < 0).any()) or bool((rows >= dense.shape[-2]).any()):
            raise ValueError(
                f"the dense mask has rows for queries {query_offset} to "
                f"{query_offset + dense.shape[-2] - 1}, but query {int(query.flatten()[0])} is "
                "asked for; give query_offset, the position of its first row."
            )
        return values.to(key.device)[..., rows, :][..., key - key_offset]

    def reach(first: int, last: int) -> Keys:
        return key_offset, key_offset + dense.shape[-1]

    if dense.dtype == torch.bool:
        return Mask(lambda query, key: at(dense, query, key), reach)
    seen = dense > torch.finfo(dense.dtype).min / 2
    added = dense.masked_fill(~seen, 0.0)

    def bias(query: Tensor, key: Tensor) -> Tensor:
        return at(added, query, key)

    adds = bool((added != 0).any())
    return Mask(lambda query, key: at(seen, query, key), reach, bias=bias if adds else None)
