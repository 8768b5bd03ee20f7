"""Answers told apart by one token: which token that is, and what has to be said before it.

What is read from one row of logits says something about an answer only if the token that is looked
at differs from that of every other possible answer. "top left" and "top right" begin alike.
"""

import warnings
from collections.abc import Callable, Sequence
from typing import Any, Literal, Optional, SupportsIndex

from interp.core import PromptError

Decode = Callable[[list[int]], str]


def token_id(answer: Any) -> int:
    """One token id, where a text may have been given by mistake.

    Example:
        >>> token_id(7)
        7

    Raises `PromptError` for anything but one number.
    """
    if isinstance(answer, SupportsIndex):
        return int(answer)
    raise PromptError(
        f"an answer is one token id, not {answer!r:.60}; take the first of model.tokenizer(' '+text, "
        "add_special_tokens=False)['input_ids'] that tells the answers apart (told_apart)."
    )


def discriminative(
    answer: Sequence[SupportsIndex],
    others: Sequence[Sequence[SupportsIndex]],
    *,
    shared: Literal["refuse", "warn"] = "refuse",
    decode: Optional[Decode] = None,
) -> int:
    """The first token of an answer, if no other possible answer begins with it.

    Example:
        >>> discriminative([7, 3], [[8, 3], [9]])
        7

    Args:
        shared: "refuse" an answer that begins as another does, or "warn" and give the token anyway.
        decode: token ids -> text, to name the answers in the message.

    Raises:
        PromptError: an empty answer, or a first token that is shared.
    """
    own = _tokens(answer)
    alike = [other for other in map(_tokens, others) if other != own and other[0] == own[0]]
    if alike:
        def say(tokens: list[int]) -> str:
            return repr(decode(tokens)) if decode else str(tokens)

        message = (
            f"the answers {say(own)} and {say(alike[0])} begin with the same token {say(own[:1])}, "
            "so the first token cannot tell them apart; follow a later token (told_apart)."
        )
        if shared == "refuse":
            raise PromptError(message)
        warnings.warn(message, stacklevel=2)
    return own[0]


def told_apart(
    answer: Sequence[SupportsIndex], others: Sequence[Sequence[SupportsIndex]]
) -> tuple[list[int], int, list[int]]:
    """What to say first, the token that then decides, and the tokens it is held against.

    The first place at which the answer leaves all others behind: what comes before it belongs into
    the prompt. Held against are the tokens of those that share what was said.

    Example:
        >>> told_apart([1, 2], [[1, 3], [4, 2], [4, 3]])
        ([1], 2, [3])
        >>> told_apart([4], [[1, 3]])
        ([], 4, [1])

    Raises:
        PromptError: an empty answer, or one that begins with another, or is its beginning.
    """
    own = _tokens(answer)
    rest = [other for other in map(_tokens, others) if other != own]
    for place, token in enumerate(own):
        alike = [other for other in rest if other[:place] == own[:place] and len(other) > place]
        if all(other[place] != token for other in alike):
            against = list(dict.fromkeys(other[place] for other in alike))
            if against or not rest:
                return own[:place], token, against
    raise PromptError(
        f"of the answer {own} and another possible answer one is the beginning of the other, so no "
        "token tells them apart."
    )


def _tokens(answer: Sequence[SupportsIndex]) -> list[int]:
    tokens = [int(token) for token in answer]
    if not tokens:
        raise PromptError("an answer is empty: give its token ids.")
    return tokens
