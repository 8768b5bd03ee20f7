"""The same tokens in another order: a text cut into blocks that change places."""

from collections.abc import Sequence
from dataclasses import replace
from typing import SupportsIndex

import numpy as np
from jaxtyping import Int

from interp.core import Prompt


def shuffled_blocks(
    n: SupportsIndex, level: SupportsIndex, rng: np.random.Generator
) -> Int[np.ndarray, "position"]:
    """An order of n tokens: cut into 4^level equal blocks that are permuted, each left as it is.

    Example:
        >>> order = shuffled_blocks(16, 1, np.random.default_rng(0))
        >>> [order[i:i + 4].tolist() for i in range(0, 16, 4)]
        [[8, 9, 10, 11], [0, 1, 2, 3], [4, 5, 6, 7], [12, 13, 14, 15]]

    Level 0 changes nothing; a level with 4^level = n permutes single tokens.

    Source: arXiv:2501.10573, as second-hand notes tell it.
    """
    blocks = 4 ** int(level)
    if int(level) < 0 or blocks > int(n):
        raise ValueError(f"{int(n)} tokens cannot be cut into 4^{int(level)} = {blocks} blocks.")
    parts = np.array_split(np.arange(int(n)), blocks)
    return np.concatenate([parts[i] for i in rng.permutation(blocks)])


def reordered(
    prompt: Prompt, places: Sequence[SupportsIndex], order: Int[np.ndarray, "position"]
) -> Prompt:
    """The prompt with the tokens at some places in another order; its segments are lost.

    Example:
        >>> reordered(Prompt.from_tokens([9, 5, 6, 7]), (1, 2, 3), np.array([2, 0, 1])).ids
        (9, 7, 5, 6)
    """
    ids = list(prompt.ids)
    for at, source in zip(places, order):
        ids[int(at)] = prompt.ids[int(places[int(source)])]
    return replace(prompt, ids=tuple(ids), segments=(), tokens=(), text="")
