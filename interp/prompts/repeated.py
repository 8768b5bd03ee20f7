"""Random tokens, said twice: only the context can tell what comes next in the second half.

Every token occurs once per copy, so the place an induction head must look at is unique: for the
query at place i of a later copy, the token after the same token, place i + 1 of the copy before.
"""

from collections.abc import Iterable
from typing import Any, Optional

import numpy as np

from interp.core import Prompt, PromptError
from interp.prompts.text import drawable

ORDINALS = ("first", "second", "third", "fourth", "fifth", "sixth", "seventh", "eighth")


def repeated(
    rng: np.random.Generator,
    d_vocab: int,
    length: int,
    copies: int = 2,
    bos: Optional[int] = None,
    exclude: Iterable[int] = (),
) -> Prompt:
    """`length` different random tokens, `copies` times over, as segments "first", "second", ...

    Example:
        >>> prompt = repeated(np.random.default_rng(0), d_vocab=50, length=3, bos=0)
        >>> prompt.positions("first"), prompt.positions("second")
        ((1, 2, 3), (4, 5, 6))
        >>> prompt.ids[1:4] == prompt.ids[4:7]
        True

    `bos` comes first if given and is never drawn, as are the tokens in `exclude`.
    Raises `PromptError` if the vocabulary is too small.
    """
    drawn = _different(rng, d_vocab, length, bos, exclude)
    return _in_copies([drawn] * _checked(copies), bos)


def unrepeated(
    rng: np.random.Generator,
    d_vocab: int,
    length: int,
    copies: int = 2,
    bos: Optional[int] = None,
    exclude: Iterable[int] = (),
) -> Prompt:
    """The matched control: the same segments, but no token occurs twice in the whole prompt.

    Example:
        >>> prompt = unrepeated(np.random.default_rng(0), d_vocab=50, length=3)
        >>> len(set(prompt.ids)), prompt.positions("second")
        (6, (3, 4, 5))
    """
    drawn = _different(rng, d_vocab, length * _checked(copies), bos, exclude)
    return _in_copies([drawn[i * length : (i + 1) * length] for i in range(copies)], bos)


def induction_targets(prompt: Prompt) -> dict[int, int]:
    """For every position of the later copies, the position an induction head attends to there.

    Example:
        >>> induction_targets(repeated(np.random.default_rng(0), d_vocab=50, length=3))
        {3: 1, 4: 2, 5: 3}
    """
    copies = [prompt.positions(name) for name in ORDINALS if _has(prompt, name)]
    return {
        query: before + 1
        for earlier, later in zip(copies, copies[1:])
        for before, query in zip(earlier, later)
    }


def _has(prompt: Prompt, name: str) -> bool:
    return any(segment.name == name for segment in prompt.segments)


def _checked(copies: int) -> int:
    if not 2 <= copies <= len(ORDINALS):
        raise PromptError(f"copies is {copies}; give 2 to {len(ORDINALS)}.")
    return copies


def _different(
    rng: np.random.Generator, d_vocab: int, n: int, bos: Optional[int], exclude: Iterable[int]
) -> list[int]:
    choices = drawable(d_vocab, [*exclude, *([] if bos is None else [bos])])
    if not 1 <= n <= len(choices):
        raise PromptError(
            f"{n} different tokens are wanted, but {len(choices)} may be drawn; "
            "make the prompt shorter."
        )
    return rng.choice(choices, n, replace=False).tolist()


def _in_copies(blocks: list[list[int]], bos: Optional[int]) -> Prompt:
    ids: list[int] = [] if bos is None else [bos]
    segments: dict[str, Any] = {} if bos is None else {"bos": (0, 1)}
    for name, block in zip(ORDINALS, blocks):
        segments[name] = (len(ids), len(ids) + len(block))
        ids += block
    return Prompt.from_tokens(ids, segments=segments)
