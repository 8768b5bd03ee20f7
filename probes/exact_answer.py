"""Where the exact answer stands in what a model said, and which tokens to read it from.

The exact answer is the part of an answer whose change makes it right or wrong ("Paris" in "It is the
city of Paris."). Published work asks a language model for it; here it is the first of the answers
that a question could have (those of its relation), or what a pattern finds. What is not found is
counted: leaving it out without a word flatters any probe.

Source    arXiv:2410.02707
"""

import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Optional, SupportsIndex

from interp.models.offsets import Span, char_spans, tokens_in

TOKENS = ("last question", "first answer", "before exact", "first exact", "last exact",
          "after exact", "last answer")
"""Places that `places` names, in the order of the text."""

NOTHING, NOT_FOUND, NO_OFFSETS = "nothing said", "no exact answer in it", "tokens without text"


@dataclass(frozen=True)
class Exact:
    """The exact answer: its text, and its tokens in the answer, first and last."""

    text: str
    first: int
    last: int


class Log:
    """How often exact answers were found, and why not.

    Example:
        >>> log = Log()
        >>> log.add(None, NOT_FOUND); log.add(Exact("Paris", 3, 3))
        >>> log.n, log.rate, str(log)
        (2, 0.5, '1 of 2 without exact answer (1 no exact answer in it)')
    """

    def __init__(self) -> None:
        self.n, self.failures = 0, Counter[str]()

    def add(self, found: Optional[Exact], reason: str = "") -> None:
        """Count one answer; `reason` says why nothing was found."""
        self.n += 1
        if found is None:
            self.failures[reason or NOT_FOUND] += 1

    @property
    def rate(self) -> float:
        """Share of answers without an exact answer; NaN where there were none."""
        return sum(self.failures.values()) / self.n if self.n else float("nan")

    def __str__(self) -> str:
        why = ", ".join(f"{count} {reason}" for reason, count in sorted(self.failures.items()))
        return f"{sum(self.failures.values())} of {self.n} without exact answer" + (
            f" ({why})" if why else "")


def mention(text: str, candidates: Iterable[str] = (), pattern: str = "") -> Optional[Span]:
    """Characters of the first candidate in a text, else of the first match of `pattern`.

    Example:
        >>> text = "It is Paris, not Lyon."
        >>> [text[a:b] for a, b in [mention(text, ["lyon", "paris"])]], mention(text, ["Rome"])
        (['Paris'], None)
        >>> mention("in Niger", ["Nigeria"]), mention("12 + 3 = 15", pattern=r"\\d+$")
        (None, (9, 11))

    Whole words, whatever their case; of candidates that begin together the longest.
    """
    best: Optional[Span] = None
    for candidate in candidates:
        # \b does not hold beside signs, so the neighbors are checked instead.
        found = re.search(rf"(?<!\w){re.escape(candidate)}(?!\w)", text, re.IGNORECASE)
        if found and (best is None or (found.start(), -found.end()) < (best[0], -best[1])):
            best = found.span()
    if best is None and pattern:
        found = re.search(pattern, text)
        best = found.span() if found else None
    return best


def find(
    tokenizer: Any, tokens: Sequence[SupportsIndex], candidates: Iterable[str] = (),
    pattern: str = "", log: Optional[Log] = None,
) -> Optional[Exact]:
    """The exact answer among the tokens that a model said.

    Example:
        >>> from interp.organisms import reader
        >>> ids = [reader.TOKEN[word] for word in "note amber seven ten two ;".split()]
        >>> find(reader.tokenizer(), ids, ["seven ten two"])
        Exact(text='seven ten two', first=2, last=4)

    Tokens are found by the tokenizer's offsets, or by decoding piece by piece where it has none.
    None where there is no exact answer; `log` counts it with the reason.
    """
    ids = [int(token) for token in tokens]
    found, reason = None, NOTHING
    text = tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False) \
        if ids else ""
    if text.strip():
        span, reason = mention(text, candidates, pattern), NOT_FOUND
        if span is not None:
            spans, reason = char_spans(tokenizer, text, ids), NO_OFFSETS
            held = tokens_in(spans, *span) if spans else ()
            if held:
                found = Exact(text[slice(*span)], held[0], held[-1])
    if log is not None:
        log.add(found, reason)
    return found


def places(exact: Exact, said: SupportsIndex) -> dict[str, Optional[int]]:
    """Tokens to read an answer from, counted from the answer's first token; -1 is the question's last.

    Example:
        >>> places(Exact("Paris", 2, 3), said=6)["after exact"]
        4
        >>> places(Exact("Paris", 0, 5), said=6)["before exact"], places(
        ...     Exact("Paris", 0, 5), said=6)["after exact"]
        (-1, None)

    `said` is the number of tokens of the answer. What does not exist is None.
    """
    n = int(said)
    if not 0 <= exact.first <= exact.last < n:
        raise ValueError(f"an exact answer at tokens {exact.first} to {exact.last} of {n}.")
    after = exact.last + 1 if exact.last + 1 < n else None
    return dict(zip(TOKENS, (-1, 0, exact.first - 1, exact.first, exact.last, after, n - 1)))
