"""The three input types on which sinks are measured: natural text, random tokens, one token.

Paper     arXiv:2410.10781: 100 sequences of 64 tokens each; whether the first token is still a
          sink on random and on repeated tokens separates position from content.
"""

from collections.abc import Iterable, Sequence
from typing import Any, Optional

import numpy as np

from interp.core import Prompt, PromptError

SUMMER = "Summer is warm. Winter is cold."
"""The input of the first experiment on massive activations, without special tokens
(arXiv:2402.17762)."""


def with_bos(ids: Sequence[int], bos: Optional[int]) -> Prompt:
    """A prompt of these ids, after the token `bos` if one is given.

    Example:
        >>> prompt = with_bos([5, 6], bos=1)
        >>> prompt.ids, prompt.positions("bos"), prompt.positions("text")
        ((1, 5, 6), (0,), (1, 2))
    """
    if bos is None:
        return Prompt.from_tokens(ids, segments={"text": (0, len(ids))} if len(ids) else {})
    segments: dict[str, Any] = {"bos": (0, 1)}
    if len(ids):
        segments["text"] = (1, 1 + len(ids))
    return Prompt.from_tokens([bos, *ids], segments=segments)


def natural(
    texts: Iterable[Sequence[int]], length: int, n: Optional[int] = None, bos: Optional[int] = None
) -> list[Prompt]:
    """The beginnings of tokenized texts, all of one length; shorter texts are passed over.

    Example:
        >>> [prompt.ids for prompt in natural([[1, 2, 3, 4], [5], [6, 7, 8]], length=3)]
        [(1, 2, 3), (6, 7, 8)]

    Args:
        texts: token ids of each text, without a beginning-of-sequence token.
        length: tokens per prompt, `bos` included.
        n: how many prompts; all there are if None.

    Raises `PromptError` if fewer than `n` texts (or none) are long enough.
    """
    own = _room(length, bos)
    found = []
    for ids in texts:
        if n is not None and len(found) == n:
            break
        if len(ids) >= own:
            found.append(with_bos([int(i) for i in ids[:own]], bos))
    if len(found) < (n or 1):
        raise PromptError(
            f"{len(found)} text(s) have {own} tokens or more, but {n or 'at least 1'} are needed; "
            "give longer or more texts, or a smaller length."
        )
    return found


def random_tokens(
    rng: np.random.Generator,
    d_vocab: int,
    n: int,
    length: int,
    bos: Optional[int] = None,
    exclude: Iterable[int] = (),
) -> list[Prompt]:
    """n prompts of tokens drawn uniformly from the vocabulary, without those in `exclude`.

    Example:
        >>> prompts = random_tokens(np.random.default_rng(0), d_vocab=9, n=2, length=5, exclude=[3])
        >>> len(prompts), len(prompts[0]), 3 in prompts[0].ids
        (2, 5, False)

    `length` includes `bos`, which is itself never drawn.
    """
    choices = drawable(d_vocab, [*exclude, *([] if bos is None else [bos])])
    own = _room(length, bos)
    return [with_bos(rng.choice(choices, own).tolist(), bos) for _ in range(n)]


def repeated_token(token: int, length: int, bos: Optional[int] = None) -> Prompt:
    """One token again and again.

    Example:
        >>> repeated_token(7, 3).ids
        (7, 7, 7)

    `length` includes `bos`.
    """
    return with_bos([token] * _room(length, bos), bos)


def drawable(d_vocab: int, exclude: Iterable[int] = ()) -> np.ndarray:
    """The token ids that may be drawn. Raises `PromptError` if none is left."""
    left = np.setdiff1d(np.arange(d_vocab), np.asarray(list(exclude), dtype=int))
    if not len(left):
        raise PromptError(
            f"a vocabulary of {d_vocab} tokens with {d_vocab} of them excluded leaves none to draw."
        )
    return left


def _room(length: int, bos: Optional[int]) -> int:
    own = length - (bos is not None)
    if own < 1:
        raise PromptError(f"a length of {length} leaves no room for text; make it larger.")
    return own
