"""Names for the places in a prompt: what was typed, what the template wrote, what users mark."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Optional

import numpy as np

from interp.core import Prompt, PromptError, Segment, SegmentNotFound
from interp.models.chat_template import Typed
from interp.models.offsets import Span, tokens_in


@dataclass(frozen=True)
class Source:
    """The text to tokenize, before image placeholders are expanded, and what its parts are."""

    text: str
    typed: tuple[Typed, ...]
    header: Optional[Span] = None
    system: Optional[Span] = None
    is_chat: bool = False
    placeholder: str = ""
    """The string that stands for one picture, if any."""


@dataclass(frozen=True)
class Encoded:
    """Ids, further inputs, and the token positions of any stretch of the source text."""

    ids: tuple[int, ...]
    inputs: dict[str, np.ndarray]
    spans: Optional[list[Span]]
    pieces: tuple[tuple[int, int, int], ...]
    """(start, stop) in the source and where that begins in the tokenized text."""

    def tokens(self, start: int, stop: int) -> tuple[int, ...]:
        """Positions of source characters [start, stop); empty if they cannot be known."""
        found: set[int] = set()
        for left, right, there in self.pieces if self.spans is not None else ():
            a, b = max(start, left), min(stop, right)
            if a < b:
                found.update(tokens_in(self.spans or (), there + a - left, there + b - left))
        return tuple(sorted(found))


def named_segments(
    tokenizer: Any, source: Source, encoded: Encoded, images: tuple[Segment, ...]
) -> tuple[Segment, ...]:
    """The segments that every prompt has beside `images`; see `interp.models.prompting.build`."""
    taken = {position for segment in images for position in segment.positions}
    found: dict[str, set[int]] = {}
    first = {getattr(tokenizer, name, None) for name in ("bos_token_id", "cls_token_id")} - {None}
    if encoded.ids[0] in first and 0 not in taken:
        found["bos"] = {0}
        taken.add(0)
    stretches = [(t.role, t.start, t.stop) for t in source.typed]
    if source.system is not None:
        stretches.append(("system", *source.system))
    if source.header is not None:
        stretches.append(("role", *source.header))
    for kind, start, stop in stretches:
        own = set(encoded.tokens(start, stop)) - taken
        found.setdefault(kind, set()).update(own)
        taken |= own
    if encoded.spans is not None:
        found["template"] = set(range(len(encoded.ids))) - taken
    asked = question(source)
    if asked:
        kind = asked[0].role
        found["question"] = found.get(kind, set()) & {
            position for t in asked for position in encoded.tokens(t.start, t.stop)
        }
    return tuple(Segment(name, tuple(sorted(positions)), name)
                 for name, positions in found.items() if positions)


def question(source: Source) -> list[Typed]:
    """What the last user message (or the plain text) says after the last picture, trimmed."""
    after = 0
    if source.placeholder and source.placeholder in source.text:
        after = source.text.rindex(source.placeholder) + len(source.placeholder)
    elif not source.is_chat:
        return []
    asked = [t for t in source.typed if t.role in ("user", "text")]
    asked = [t for t in asked if t.message == asked[-1].message] if asked else []
    following = [replace(t, start=max(t.start, after)) for t in asked if t.stop > after]
    following = [t for t in following if source.text[t.start : t.stop].strip()] or asked
    kept = []
    for t in following:
        own = source.text[t.start : t.stop]
        start = t.start + len(own) - len(own.lstrip())
        kept.append(replace(t, start=start, stop=start + len(own.strip())))
    return kept


def with_marked(
    prompt: Prompt, source: Source, encoded: Encoded, wanted: Mapping[str, Any], name: str
) -> Prompt:
    """The user's own segments added; see `interp.models.prompting.build`. `name` is the model's."""
    given: dict[str, Any] = {}
    for segment, where in wanted.items():
        text, which = where, None
        if isinstance(where, tuple) and len(where) == 2 and isinstance(where[0], str):
            text, which = where[0], int(where[1])
        if not isinstance(text, str):
            given[segment] = where
            continue
        start = _occurrence(source, segment, text, which)
        if encoded.spans is None:
            raise PromptError(
                f"segment {segment!r} cannot be marked by text, because the tokenizer of {name} "
                "does not say which characters a token holds; give token positions (start, stop)."
            )
        positions = encoded.tokens(start, start + len(text))
        if not positions:
            raise SegmentNotFound(f"segment {segment!r}: no token holds the text {text!r:.60}.")
        given[segment] = list(positions)
    return prompt.with_segments(**given) if given else prompt


def _occurrence(source: Source, name: str, text: str, which: Optional[int]) -> int:
    """Where in the source a marked text begins."""
    if not text.strip():
        raise SegmentNotFound(f"segment {name!r} is to mark an empty text; give some words.")

    def starts(begin: int, end: int) -> list[int]:
        found, at = [], source.text.find(text, begin, end)
        while at >= 0:
            found.append(at)
            at = source.text.find(text, at + 1, end)
        return found

    found = [at for t in source.typed for at in starts(t.start, t.stop)]
    found = found or starts(0, len(source.text))
    if not found:
        raise SegmentNotFound(
            f"segment {name!r}: the text {text!r:.60} does not occur in the prompt; check its "
            "spelling and spaces."
        )
    if which is None and len(found) > 1:
        raise SegmentNotFound(
            f"segment {name!r}: the text {text!r:.60} occurs {len(found)} times; say which with "
            f"({text!r:.60}, 0) to ({text!r:.60}, {len(found) - 1})."
        )
    if which is not None and not -len(found) <= which < len(found):
        raise SegmentNotFound(
            f"segment {name!r}: the text {text!r:.60} occurs {len(found)} time(s), so there is no "
            f"occurrence {which}; count from 0."
        )
    return found[which or 0]
