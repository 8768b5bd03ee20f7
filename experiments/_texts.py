"""Ordinary text for a model: in its own language if it is a bundled one, else plain English."""

from typing import Any

import numpy as np

from interp.core import Prompt, PromptError
from interp.organisms import backcopy, reader
from interp.organisms.asking import speaks as knows
from interp.prompts.text import drawable

PLACES = ("harbor", "market", "orchard", "station", "valley", "library", "kitchen", "bridge")
WEATHER = ("warm", "cold", "windy", "quiet", "bright", "grey", "dry", "stormy")
DOINGS = ("closed the gate", "counted the boats", "lit the lamps", "carried the letters",
          "mended the roof", "followed the river", "sold the last apples", "rang the bell")


def prose(rng: np.random.Generator, sentences: int = 4) -> str:
    """Short plain sentences, different at every call."""
    made = []
    for _ in range(sentences):
        a, b = rng.choice(PLACES, 2, replace=False)
        made.append(str(rng.choice((
            f"The {a} was {rng.choice(WEATHER)} in the morning, and by noon everyone had walked "
            f"to the {b}.",
            f"Nobody remembered who had {rng.choice(DOINGS)}, but the {b} stayed "
            f"{rng.choice(WEATHER)} until evening.",
            f"After they had {rng.choice(DOINGS)}, the children ran from the {a} to the {b} and "
            f"talked about the journey home.",
            f"It was a {rng.choice(WEATHER)} day at the {a}; someone had {rng.choice(DOINGS)}.",
        ))))
    return " ".join(made)


def code(rng: np.random.Generator) -> str:
    """A short function; two calls hardly ever give the same one."""
    a, b = rng.choice(PLACES, 2, replace=False)
    k = int(rng.integers(2, 1000))
    return (
        f"def {a}_{b}(items, limit={k}):\n    total = 0\n    for i, item in enumerate(items):\n"
        f"        if item['{a}'] > limit:\n            total += item['{b}'] * {k}\n"
        f"    return {{'{b}': total, 'count': len(items)}}\n"
    )


def natural(model: Any, count: int, length: int, rng: np.random.Generator) -> list[Prompt]:
    """Prompts of exactly `length` tokens of ordinary text, as the model's tokenizer starts them.

    Raises `PromptError` if the model is too short for them or has no tokenizer.
    """
    if model.max_positions and length > model.max_positions:
        raise PromptError(f"{model.name} has {model.max_positions} positions, not {length}.")
    if knows(model, backcopy):
        return [Prompt.from_tokens(row) for row in backcopy.sample(rng, count, length)[0]]
    if knows(model, reader):
        bos = np.full((count, 1), reader.BOS)
        rows = np.concatenate([bos, reader.prose(rng, count, length - 1)], 1)
        return [Prompt.from_tokens(row) for row in rows]
    if model.tokenizer is None:
        raise PromptError(f"{model.name} has no tokenizer, so it cannot be given text.")
    made = []
    for _ in range(count):
        ids, n = [], 2
        while len(ids) < length:
            if n > 8 * length:
                raise PromptError(f"the tokenizer of {model.name} makes {len(ids)} token(s) of "
                                  f"{n // 2} sentences, so it cannot be given text.")
            ids = list(model.tokenizer(prose(rng, n))["input_ids"])
            n *= 2
        end = ids[-1] if ids[-1] in _closing(model.tokenizer) else None
        made.append(ids[:length] if end is None else [*ids[: length - 1], end])
    return [Prompt.from_tokens(ids) for ids in made]


def random_tokens(
    model: Any, count: int, length: int, rng: np.random.Generator
) -> list[Prompt]:
    """Prompts of exactly `length` random tokens, after what starts a text of the model."""
    front = first_ids(model)
    special = {*front, *(getattr(model.tokenizer, "all_special_ids", None) or ())}
    allowed = drawable(min(model.d_vocab, 50_000), special)
    rest = length - len(front)
    return [Prompt.from_tokens([*front, *rng.choice(allowed, rest)]) for _ in range(count)]


def _closing(tokenizer: Any) -> set[int]:
    return {x for x in (tokenizer.sep_token_id, tokenizer.eos_token_id) if x is not None}


def first_ids(model: Any) -> list[int]:
    """What starts a text: usually one BOS token, or nothing.

    As the tokenizer does it; without one, the BOS token that the configuration names.
    """
    if model.tokenizer is None:
        bos = getattr(model.config.get_text_config(), "bos_token_id", None)
        return [] if bos is None or model.kind != "decoder" else [int(bos)]
    return [model.tokenizer("a")["input_ids"][0]] if model.first_token_is_bos else []
