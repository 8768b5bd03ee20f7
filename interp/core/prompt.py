"""A prompt: token ids, named segments, and whatever the model needs beside the ids."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Optional, SupportsIndex, Union

import numpy as np
import xxhash

from interp.core.errors import OutOfRange, PromptError, SegmentNotFound, did_you_mean
from interp.core.segment import Segment

Where = Union[str, SupportsIndex, slice, Segment, Sequence[SupportsIndex], np.ndarray]
"""Positions named by a segment, a kind, "all", "last", "image", a number, a slice or numbers."""


def is_number(where: Where) -> bool:
    """Whether this is one position: a number, or an array or tensor without axes.

    Example:
        >>> is_number(3), is_number(np.array(3)), is_number(np.array([3])), is_number("last")
        (True, True, False, False)
    """
    if isinstance(where, (int, str, slice, tuple, list, Segment)):
        return isinstance(where, int)  # asking a protocol takes a hundred times as long
    return isinstance(where, SupportsIndex) and not getattr(where, "ndim", 0)


SHOWN = 8
"""How many token ids the `repr` of a prompt shows."""


def check_named(segments: Any) -> None:
    """Raise `PromptError` unless segments are given by name.

    Example:
        >>> check_named({"needle": (3, 8)})
    """
    if segments is not None and not isinstance(segments, Mapping):
        raise PromptError(
            "segments are given by name, as a dict like {'needle': 'amber'} or {'needle': (3, 8)}, "
            f"not as {segments!r:.60}."
        )


def _where(segment: Segment) -> str:
    """Its positions in few characters: "4", "4-9" or "6 positions"."""
    first, last, count = min(segment.positions), max(segment.positions), len(segment.positions)
    if last - first + 1 != count:
        return f"{count} positions"
    return str(first) if count == 1 else f"{first}-{last}"


@dataclass(frozen=True, eq=False)
class Prompt:
    """Tokens to run, with the places that matter in them.

    `inputs` holds the further arrays a model takes (`pixel_values`, `image_grid_thw`, ...), each
    with its batch axis. `text` and `tokens` are for people: the source and a printable token per
    position.

    Example:
        >>> prompt = Prompt.from_tokens([7, 8, 9, 4], segments={"needle": (1, 3)})
        >>> len(prompt), prompt.positions("needle"), prompt.positions("last")
        (4, (1, 2), (3,))
        >>> prompt
        Prompt(4 tokens: 7, 8, 9, 4; segments needle (1-2))
    """

    ids: tuple[int, ...]
    segments: tuple[Segment, ...] = ()
    text: str = ""
    tokens: tuple[str, ...] = field(default=(), repr=False)
    inputs: Mapping[str, Any] = field(default_factory=dict, repr=False)
    images: tuple[Any, ...] = field(default=(), repr=False)

    def __post_init__(self) -> None:
        if not self.ids:
            raise PromptError("the prompt is empty: give at least one token.")
        names = [segment.name for segment in self.segments]
        for name in names:
            if names.count(name) > 1:
                raise PromptError(f"two segments are both named {name!r}; names must differ.")
        for segment in self.segments:
            if segment.stop > len(self.ids):
                raise OutOfRange(
                    f"segment {segment.name!r} reaches position {segment.stop - 1}, but the "
                    f"prompt has {len(self.ids)} tokens."
                )

    @classmethod
    def from_tokens(
        cls,
        ids: Any,
        segments: Optional[Mapping[str, Any]] = None,
        tokens: Sequence[str] = (),
    ) -> "Prompt":
        """A prompt from token ids; segments as name -> (start, stop), positions or `Segment`.

        A pair (start, stop) is a span, as in a slice; any other sequence lists positions (write
        a set of exactly two positions as a list).

        Raises `PromptError` for no ids, `OutOfRange` for a segment beyond the end.
        """
        check_named(segments)
        numbers = tuple(int(i) for i in np.asarray(ids).reshape(-1))
        found = []
        for name, where in (segments or {}).items():
            kind = "text"
            if isinstance(where, Segment):
                found.append(replace(where, name=name))
                continue
            if name.split("_")[0].split(" ")[0] in {
                "bos", "system", "user", "image", "question", "role", "needle", "generated",
            }:
                kind = name.split("_")[0].split(" ")[0]
            if isinstance(where, slice):
                where = tuple(range(*where.indices(len(numbers))))
                found.append(Segment(name, where, kind))
            elif isinstance(where, tuple) and len(where) == 2:
                found.append(Segment.span(name, int(where[0]), int(where[1]), kind))
            else:
                found.append(Segment(name, tuple(int(i) for i in np.atleast_1d(where)), kind))
        return cls(numbers, tuple(found), tokens=tuple(tokens))

    def __repr__(self) -> str:
        ids = ", ".join(map(str, self.ids[:SHOWN])) + (", ..." if len(self.ids) > SHOWN else "")
        parts = [f"{len(self.ids)} token{'' if len(self.ids) == 1 else 's'}: {ids}"]
        if self.segments:
            parts.append("segments " + ", ".join(f"{s.name} ({_where(s)})" for s in self.segments))
        if self.images:
            parts.append(f"{len(self.images)} image{'' if len(self.images) == 1 else 's'}")
        if self.text:
            cut = self.text if len(self.text) <= 5 * SHOWN else self.text[: 5 * SHOWN] + "..."
            parts.append(f"text {cut!r}")
        return f"Prompt({'; '.join(parts)})"

    def __len__(self) -> int:
        return len(self.ids)

    def segment(self, name: str) -> Segment:
        """The segment of this name. Raises `SegmentNotFound`, which lists the names there are."""
        for segment in self.segments:
            if segment.name == name:
                return segment
        have = ", ".join(repr(s.name) for s in self.segments) or "none"
        raise SegmentNotFound(
            f"the prompt has no segment {name!r}; it has: {have}."
            f"{did_you_mean(name, [s.name for s in self.segments])}"
        )

    def of_kind(self, kind: str) -> tuple[Segment, ...]:
        """Every segment of this kind, in order; empty if there is none."""
        return tuple(segment for segment in self.segments if segment.kind == kind)

    def positions(self, where: Where) -> tuple[int, ...]:
        """Sorted positions of a segment name, kind, "all", "last", number, slice or numbers.

        Negative numbers count from the end. Raises `SegmentNotFound` or `OutOfRange`.

        Example:
            >>> Prompt.from_tokens([1, 2, 3]).positions([-1, 0])
            (0, 2)
        """
        n = len(self.ids)
        if isinstance(where, Segment):
            return tuple(sorted(where.positions))
        if isinstance(where, str):
            named = [s for s in self.segments if s.name == where]
            named = named or list(self.of_kind(where))
            if named:
                return tuple(sorted({p for s in named for p in s.positions}))
            if where == "all":
                return tuple(range(n))
            if where == "last":
                return (n - 1,)
            self.segment(where)
        if isinstance(where, slice):
            return tuple(range(*where.indices(n)))
        several: Any = [where] if is_number(where) else where
        numbers = list(several)
        for number in numbers:
            if not -n <= int(number) < n:
                raise OutOfRange(
                    f"position {number} does not exist: the prompt has {n} tokens, "
                    f"0 to {n - 1}."
                )
        return tuple(sorted({int(number) % n for number in numbers}))

    def with_segments(self, **segments: Any) -> "Prompt":
        """A copy with further segments, given as in `from_tokens`; same names are replaced."""
        new = Prompt.from_tokens(self.ids, segments).segments
        kept = tuple(s for s in self.segments if s.name not in segments)
        return replace(self, segments=kept + new)

    def digest(self) -> str:
        """A short content key of ids, segments and further inputs, equal for equal prompts."""
        key = xxhash.xxh3_128()
        key.update(np.asarray(self.ids, dtype=np.int64).tobytes())
        for segment in sorted(self.segments, key=lambda s: s.name):
            key.update(f"{segment.name}|{segment.kind}|{segment.positions}".encode())
        for name in sorted(self.inputs):
            value = np.ascontiguousarray(np.asarray(self.inputs[name]))
            key.update(f"{name}|{value.dtype}|{value.shape}".encode() + value.tobytes())
        return key.hexdigest()
