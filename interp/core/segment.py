"""Named stretches of a prompt: where the image, the question or a needle sits in the tokens."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Optional, Union

from interp.core.errors import OutOfRange

Real = Union[int, float]
Box = tuple[Real, Real, Real, Real]
"""Pixel rectangle (left, top, right, bottom) in the user's picture, before any resizing."""


@dataclass(frozen=True)
class Segment:
    """A set of positions with a name and a kind.

    `kind` groups segments that play one role: "bos", "system", "user", "image", "question",
    "role" (the assistant's header), "text", "needle", "generated", or any word of the user's.
    Image segments carry the patch grid (rows, columns) and one pixel box for every position, in
    the order of `positions`; separator tokens inside an image have the box None.

    Example:
        >>> needle = Segment("needle", (12, 13, 14), kind="needle")
        >>> needle.start, needle.stop, len(needle)
        (12, 15, 3)
    """

    name: str
    positions: tuple[int, ...]
    kind: str = "text"
    grid: Optional[tuple[int, int]] = None
    boxes: tuple[Optional[Box], ...] = field(default=(), repr=False)

    def __post_init__(self) -> None:
        if not self.positions:
            raise ValueError(f"segment {self.name!r} has no positions; leave it out instead.")
        if min(self.positions) < 0:
            raise OutOfRange(
                f"segment {self.name!r} has the negative position {min(self.positions)}; "
                "count positions from 0."
            )
        if len(set(self.positions)) != len(self.positions):
            raise ValueError(f"segment {self.name!r} names a position twice.")
        if self.boxes and len(self.boxes) != len(self.positions):
            raise ValueError(
                f"segment {self.name!r} has {len(self.positions)} positions but "
                f"{len(self.boxes)} boxes; give one box, or None, for each position."
            )

    @classmethod
    def span(cls, name: str, start: int, stop: int, kind: str = "text") -> "Segment":
        """The positions start, ..., stop - 1."""
        if stop <= start:
            raise ValueError(f"segment {name!r} is empty: start {start}, stop {stop}.")
        return cls(name, tuple(range(start, stop)), kind)

    @property
    def start(self) -> int:
        return min(self.positions)

    @property
    def stop(self) -> int:
        return max(self.positions) + 1

    def __len__(self) -> int:
        return len(self.positions)

    def __iter__(self) -> Iterator[int]:
        return iter(self.positions)

    def inside(self, box: Box, min_share: Real = 0.0) -> tuple[int, ...]:
        """Positions whose patch shares more than `min_share` of its own area with `box`.

        Example:
            >>> image = Segment("image", (5, 6), "image", (1, 2), ((0, 0, 8, 8), (8, 0, 16, 8)))
            >>> image.inside((6, 0, 16, 8)), image.inside((6, 0, 16, 8), min_share=0.5)
            ((5, 6), (6,))
        """
        if not self.boxes:
            raise ValueError(f"segment {self.name!r} has no pixel boxes; it is not an image.")
        found = []
        for position, own in zip(self.positions, self.boxes):
            if own is None:
                continue
            width = max(0.0, min(own[2], box[2]) - max(own[0], box[0]))
            height = max(0.0, min(own[3], box[3]) - max(own[1], box[1]))
            area = (own[2] - own[0]) * (own[3] - own[1])
            if area > 0 and width * height / area > min_share:
                found.append(position)
        return tuple(found)
