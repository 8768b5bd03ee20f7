"""Which tokens hold which characters, for fast tokenizers (offsets) and slow ones (decoding)."""

import unicodedata
from collections.abc import Sequence
from typing import Any, Optional

Span = tuple[int, int]
"""(start, stop) in characters; empty for a token that does not come from the text."""


def tokens_in(spans: Sequence[Span], start: int, stop: int) -> tuple[int, ...]:
    """Positions of the tokens that share a character with [start, stop).

    Example:
        >>> tokens_in([(0, 0), (0, 3), (3, 7), (7, 9)], 4, 8)
        (2, 3)
    """
    return tuple(
        i for i, (left, right) in enumerate(spans) if max(left, start) < min(right, stop)
    )


def covers(spans: Sequence[Span], text: str) -> bool:
    """Whether spans lie in the text, in order, and leave out nothing but spaces and controls.

    Example:
        >>> covers([(0, 2), (3, 5)], "to be"), covers([(0, 2), (2, 2)], "to be")
        (True, False)
    """
    seen = [False] * len(text)
    last = 0
    for start, stop in spans:
        if start == stop:
            continue
        if not last <= start < stop <= len(text):
            return False
        last = start
        seen[start:stop] = [True] * (stop - start)
    return all(
        found or character.isspace() or unicodedata.category(character).startswith("C")
        for found, character in zip(seen, text)
    )


def char_spans(tokenizer: Any, text: str, ids: Sequence[int]) -> Optional[list[Span]]:
    """The characters of every token of `text`, or None where they cannot be known.

    `ids` must be what the tokenizer makes of `text`, with or without its special tokens. Offsets
    of the tokenizer are used where it has them and where they cover the text (some tokenizers
    report empty ones); otherwise the ids are decoded piece by piece and matched with the text.
    """
    if getattr(tokenizer, "is_fast", False):
        for special in (True, False):
            made = tokenizer(text, add_special_tokens=special, return_offsets_mapping=True)
            if list(made["input_ids"]) == list(ids):
                spans = [(int(a), int(b)) for a, b in made["offset_mapping"]]
                if covers(spans, text):
                    return spans
    return spans_by_decoding(tokenizer, text, ids)


def spans_by_decoding(tokenizer: Any, text: str, ids: Sequence[int]) -> Optional[list[Span]]:
    """Spans found by decoding ever longer beginnings of `ids`; None if the text does not return.

    A character that is spread over several tokens is given to each of them. Special tokens that
    are not in the text get an empty span.
    """
    ids = list(ids)
    special = set(getattr(tokenizer, "all_special_ids", ()))

    def decoded(upto: int, begin: int) -> str:
        return tokenizer.decode(
            ids[begin:upto], skip_special_tokens=False, clean_up_tokenization_spaces=False
        )

    spans: list[Span] = []
    at = begin = 0
    while begin < len(ids):
        alone = decoded(begin + 1, begin)
        if ids[begin] in special and not text.startswith(alone, _past_spaces(text, at)):
            spans.append((at, at))
            begin += 1
            continue
        # What a token stands for may depend on the token before it (a leading space) and may need
        # the tokens after it (a character of several bytes).
        for stop in range(begin + 1, min(begin + 9, len(ids) + 1)):
            whole = decoded(stop, max(begin - 1, 0))
            before = decoded(begin, begin - 1) if begin else ""
            piece = whole.removeprefix(before) if whole.startswith(before) else decoded(stop, begin)
            found = _match(text, at, piece) if "\ufffd" not in piece else None
            if found is None:
                continue
            spans += [(at, found)] * (stop - begin)
            at, begin = found, stop
            break
        else:
            return None
    return spans if covers(spans, text) else None


def _past_spaces(text: str, at: int) -> int:
    while at < len(text) and text[at].isspace():
        at += 1
    return at


def _match(text: str, at: int, piece: str) -> Optional[int]:
    """Where `piece` ends if it stands at `at`, give or take spaces around it."""
    if text.startswith(piece, at):
        return at + len(piece)
    core = piece.strip()
    start = _past_spaces(text, at)
    if core and text.startswith(core, start):
        return start + len(core)
    return at if not core else None
