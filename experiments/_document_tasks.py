"""Questions over documents for any model: in the language of `reader`, or in plain English."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from experiments._texts import knows
from interp.core import PromptError
from interp.organisms import backcopy, reader
from interp.prompts import documents
from interp.prompts.documents import Documents

READER_WORDS = 30
"""Words per document for `reader`: 20 of them are 603 tokens, somewhat more than the 512 it was
trained on, so that it is distracted often enough to be studied."""


def places(count: int, n: int = 5) -> tuple[int, ...]:
    """Where the gold document stands: the paper's places among 20, else evenly spread ones."""
    if count == 20 and n == 5:
        return documents.PLACES
    return tuple(sorted({int(round(x)) for x in np.linspace(0, count - 1, min(n, count))}))


def questions(
    model: Any, rng: np.random.Generator, *, count: int, each: int, words: int = 0,
    n_places: int = 5,
) -> list[Documents]:
    """Questions with the gold document at every place in turn, `each` times.

    Raises `PromptError` for a model that cannot be asked: an encoder, or one without a tokenizer.
    """
    if model.kind == "encoder":
        raise PromptError(f"{model.name} is an encoder: it answers no questions")
    if knows(model, backcopy):
        raise PromptError(f"the language of {model.name} has no facts to ask for")
    at = places(count, n_places)
    if knows(model, reader):
        return documents.synthetic(reader, rng, at, count=count, each=each,
                                   words=words or READER_WORDS)
    if model.tokenizer is None:
        raise PromptError(f"{model.name} has no tokenizer, so it cannot be asked")
    chat = getattr(model.tokenizer, "chat_template", None) is not None
    length = words or 40
    while True:
        try:
            return documents.grid(model, rng, at, count=count, each=each, words=length, chat=chat)
        except PromptError as error:
            # Shorter documents, where the model's own context is the limit.
            if "reads at most" not in str(error) or length <= 12:
                raise
            length = length * 2 // 3


def prompts_of(asked: Sequence[Documents]) -> list[Any]:
    return [one.prompt for one in asked]


def answers_of(asked: Sequence[Documents]) -> list[list[int]]:
    return [list(one.answer) for one in asked]
