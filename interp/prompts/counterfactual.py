"""Pairs of prompts that differ in one fact and in nothing else, aligned token by token.

Patching puts what a model computed in one prompt into another: position i must mean the same in
both, so the two have equal length and their segments stand at the same places.
"""

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from string import Formatter
from typing import Any, Optional

from interp.core import Prompt, PromptError

Make = Callable[..., Prompt]
"""Turns text into a prompt and takes `segments=`, as `model.prompt` does."""


@dataclass(frozen=True)
class Pair:
    """A prompt and its corrupted twin.

    Example:
        >>> pair = Pair(Prompt.from_tokens([1, 2, 3]), Prompt.from_tokens([1, 7, 3]))
        >>> pair.differing
        (1,)

    Raises `PromptError` where the two are not aligned.
    """

    clean: Prompt
    corrupt: Prompt

    def __post_init__(self) -> None:
        check_aligned([self.clean], [self.corrupt])

    @property
    def differing(self) -> tuple[int, ...]:
        """Positions whose tokens differ."""
        pairs = zip(self.clean.ids, self.corrupt.ids)
        return tuple(i for i, (a, b) in enumerate(pairs) if a != b)


def misaligned(clean: Prompt, corrupt: Prompt) -> Optional[str]:
    """Why position i does not mean the same in both prompts, None if it does.

    Example:
        >>> misaligned(Prompt.from_tokens([1, 2]), Prompt.from_tokens([1, 2, 3]))
        'one has 2 tokens, the other 3'

    Segments that both prompts have must stand at the same places; further ones do not matter.
    """
    if len(clean) != len(corrupt):
        return f"one has {len(clean)} tokens, the other {len(corrupt)}"
    places = {segment.name: segment.positions for segment in corrupt.segments}
    for segment in clean.segments:
        if places.get(segment.name, segment.positions) != segment.positions:
            return f"segment {segment.name!r} stands at other places"
    return None


def check_aligned(clean: Sequence[Prompt], corrupt: Sequence[Prompt]) -> None:
    """Raise `PromptError` for the first pair that is not aligned, or if the numbers differ.

    Example:
        >>> check_aligned([Prompt.from_tokens([1, 2])], [Prompt.from_tokens([1, 3])])
    """
    if len(clean) != len(corrupt):
        raise PromptError(
            f"{len(clean)} clean prompts but {len(corrupt)} corrupted ones: give one for each."
        )
    for number, (a, b) in enumerate(zip(clean, corrupt)):
        reason = misaligned(a, b)
        if reason:
            raise PromptError(
                f"prompt {number} and its corrupted twin are not aligned: {reason}. Choose words of "
                "equally many tokens."
            )


def fill(make: Make, template: str, words: Mapping[str, str], **more: Any) -> Prompt:
    """A prompt from a template with {places}, each place a segment of the same name.

    Example:
        >>> def make(text, segments=None, **_):
        ...     letters = Prompt.from_tokens([ord(letter) for letter in text])
        ...     spans = {n: (text.index(w), text.index(w) + len(w)) for n, (w, _) in segments.items()}
        ...     return letters.with_segments(**spans)
        >>> fill(make, "a {noun}!", {"noun": "cat"}).positions("noun")
        (2, 3, 4)

    A place that comes more than once is numbered: "noun", "noun_1", ...

    Raises `PromptError` for a place without a word.
    """
    text, placed = "", []
    for literal, name, _, _ in Formatter().parse(template):
        text += literal
        if name is None:
            continue
        if name not in words:
            raise PromptError(f"the template has a place {name!r}, but no word is given for it.")
        placed.append((name, words[name], len(text)))
        text += words[name]
    segments: dict[str, Any] = {}
    count: Counter[str] = Counter()
    for name, word, start in placed:
        number, count[name] = count[name], count[name] + 1
        # The same word may stand elsewhere too: this one is the occurrence that begins here.
        before = sum(text.startswith(word, at) for at in range(start))
        segments[f"{name}_{number}" if number else name] = (word, before)
    return make(text, segments=segments, **more)


def corrupted(
    clean: Prompt,
    candidates: Iterable[Callable[[], Prompt]],
) -> Optional[Prompt]:
    """The first candidate that is aligned with `clean` and differs from it, None if none is.

    Example:
        >>> clean = Prompt.from_tokens([1, 2, 3])
        >>> made = [lambda: Prompt.from_tokens([1, 9]), lambda: Prompt.from_tokens([1, 9, 3])]
        >>> corrupted(clean, made).ids
        (1, 9, 3)

    Candidates are made one by one, only as many as are needed.
    """
    for make in candidates:
        made = make()
        if made.ids != clean.ids and misaligned(clean, made) is None:
            return made
    return None
