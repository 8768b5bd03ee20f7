"""Contexts to look ahead from: documents in three parts, with the model's own continuations."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from experiments import _passages, _texts
from experiments._paper import Settings
from interp.core import Prompt, PromptError
from interp.models.futures import greedy_futures
from interp.models.model import Model
from interp.models.prompting import printable
from interp.organisms import reader

STEPS = 4
"""Tokens of a continuation: N = 0 to 3."""

CARRIERS = ("The word that she wrote on the board was", "He opened the letter and began to read:",
            "Here is how the same text goes on:", "And then the speaker said, once more,")
READER_CARRIERS = ("note amber seven ten two ; recall amber", "river stone with stone garden the garden",
                   "recall amber", "note")
"""Hand-written prompts whose last position carries a state."""


@dataclass(frozen=True)
class Contexts:
    """Places in documents, with what the model says after each of them."""

    states: Tensor  # [layer, context, d_model]
    tokens: Tensor  # [context, step]
    ahead: Tensor  # [context, step, d_model]
    last: np.ndarray  # the token at the place
    truth: np.ndarray  # [context, step]: the text's own next tokens
    document: np.ndarray

    def __len__(self) -> int:
        return len(self.last)


def documents(model: Model, settings: Settings) -> tuple[list[list[Prompt]], str]:
    """Training, validation and test documents, and what they are.

    Raises `PromptError` if the model is too short for them.
    """
    length = min(settings.pick(128, tiny=40), model.max_positions or 128)
    if length < 24:
        raise PromptError(f"{model.name} has {length} positions, too few for texts with room before "
                          "and after a place.")
    if _texts.knows(model, reader):
        sizes = settings.pick((32, 6, 16), tiny=(10, 5, 6))
        rows, _ = reader.sample(settings.rng(11), sum(sizes), length, repeated=0.15)
        made = [Prompt.from_tokens(row, tokens=[reader.WORDS[t] for t in row]) for row in rows]
        what = "documents of the reader's language"
    elif _passages.readable(model):
        sizes = settings.pick((10, 4, 6), tiny=(6, 5, 5))
        made, _, _ = _passages.pairs(model, sum(sizes), settings.pick(256, tiny=length))
        made = [Prompt(p.ids, tokens=printable(model.tokenizer, p.ids)) for p in made]
        what = "passages of English"
    else:
        sizes = settings.pick((32, 6, 16), tiny=(10, 5, 6))
        made, what = _passages.other_texts(model, sum(sizes), length, settings.rng(12))
    cuts = np.cumsum(sizes)
    return [made[: cuts[0]], made[cuts[0]: cuts[1]], made[cuts[1]: cuts[2]]], what


def collect(
    model: Model, prompts: Sequence[Prompt], layers: Sequence[int], stride: int
) -> Contexts:
    """Every `stride`th position of every document from its eighth token on, with room behind each."""
    states, tokens, ahead, last, truth, number = [], [], [], [], [], []
    for i, prompt in enumerate(prompts):
        places = list(range(min(8, len(prompt) - STEPS - 2), len(prompt) - STEPS, stride))
        found = greedy_futures(model, prompt, places, STEPS)
        states.append(found.states[[layer + 1 for layer in layers]])
        tokens.append(found.tokens)
        ahead.append(found.ahead)
        last += [prompt.ids[p] for p in places]
        truth += [prompt.ids[p + 1: p + 1 + STEPS] for p in places]
        number += [i] * len(places)
    return Contexts(torch.cat(states, 1), torch.cat(tokens), torch.cat(ahead), np.array(last),
                    np.array(truth), np.array(number))


def carriers(model: Model, settings: Settings) -> list[list[int]]:
    """Token ids of the hand-written prompts; of random tokens where nothing can be written."""
    if _texts.knows(model, reader):
        return [list(model.tokenizer(text)["input_ids"]) for text in READER_CARRIERS]
    if _passages.readable(model):
        return [list(model.tokenizer(text)["input_ids"]) for text in CARRIERS]
    made: list[Any] = _texts.random_tokens(model, len(CARRIERS), 8, settings.rng(13))
    return [list(prompt.ids) for prompt in made]


def spread(n_layers: int, most: int) -> list[int]:
    """At most so many layers, evenly over the depth, the last one left out where there are several."""
    last = max(1, n_layers - 1)
    return sorted({int(round(x)) for x in np.linspace(0, last - 1, min(most, last))})
