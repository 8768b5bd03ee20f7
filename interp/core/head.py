"""One attention head, named by its true block number and query-head number."""

import re
from collections.abc import Iterable
from typing import Any, NamedTuple, Union

from interp.core.errors import OutOfRange

_NAME = re.compile(r"L(\d+)H(\d+)")


class Head(NamedTuple):
    """A query head: block `layer` and head `head`, both counted from 0.

    With grouped-query attention several query heads share one key-value head; `head`
    always counts query heads.

    Example:
        >>> Head(1, 4)
        L1H4
        >>> Head.parse("L12H3")
        L12H3
        >>> sorted([Head(1, 0), Head(0, 5)])
        [L0H5, L1H0]
    """

    layer: int
    head: int

    def __repr__(self) -> str:
        return f"L{self.layer}H{self.head}"

    __str__ = __repr__

    @classmethod
    def parse(cls, name: str) -> "Head":
        """Read "L12H3". Raises ValueError for any other spelling."""
        found = _NAME.fullmatch(name.strip())
        if found is None:
            raise ValueError(f"{name!r} is not a head; write it like 'L12H3'.")
        return cls(int(found[1]), int(found[2]))


HeadLike = Union[Head, tuple[int, int], str]


def heads(given: Union[HeadLike, Iterable[HeadLike]]) -> tuple[Head, ...]:
    """Turn one head or many, as `Head`, (layer, head) or "L1H2", into sorted unique heads.

    Example:
        >>> heads(["L1H2", (0, 3), Head(1, 2)])
        (L0H3, L1H2)
        >>> heads("L1H2")
        (L1H2,)
    """
    one = isinstance(given, str) or (
        isinstance(given, tuple) and len(given) == 2 and all(isinstance(x, int) for x in given)
    )
    if not one and not isinstance(given, Iterable):
        raise ValueError(
            f"{given!r} is neither a head nor a list of heads; write heads like 'L1H2' or (1, 2)."
        )
    several: Any = [given] if one else given
    found = {
        Head.parse(item) if isinstance(item, str) else Head(int(item[0]), int(item[1]))
        for item in several
    }
    return tuple(sorted(found))


def check_heads(given: Iterable[Head], n_layers: int, n_heads: int) -> None:
    """Raise `OutOfRange` for the first head that a model of this size does not have.

    Example:
        >>> check_heads([Head(1, 2)], n_layers=2, n_heads=4)
    """
    for head in given:
        if not (0 <= head.layer < n_layers and 0 <= head.head < n_heads):
            raise OutOfRange(
                f"head {head} does not exist: the model has layers 0 to {n_layers - 1} "
                f"with heads 0 to {n_heads - 1} each."
            )
