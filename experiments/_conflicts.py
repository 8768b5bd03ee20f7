"""Knowledge conflicts for a model: in the reader's language, or in English for any tokenizer."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from experiments import _texts
from experiments._paper import Settings
from interp.core import Prompt, PromptError
from interp.organisms import reader
from interp.prompts import conflict
from interp.prompts.conflict import Conflict

LENGTH = 48
VALUES = [reader.TOKEN[word] for word in reader.VALUES]


def cases_for(model: Any, settings: Settings) -> list[Conflict]:
    """Conflicts in every format.

    Raises `PromptError` for a model that cannot be asked: without tokenizer, or no decoder.
    """
    if model.kind != "decoder":
        raise PromptError(f"{model.name} is an encoder: it does not continue a question")
    if model.tokenizer is None:
        raise PromptError(f"{model.name} has no tokenizer, so no fact can be put to it")
    if _texts.knows(model, reader):
        cities = reader.CITIES[: settings.pick(len(reader.CITIES), tiny=16)]
        return reader_conflicts(settings.rng(1), settings.pick(3, tiny=1), cities=cities)
    found: list[Conflict] = []
    reason: Exception = PromptError("there are no relations to ask about")
    for number, relation in enumerate(conflict.RELATIONS):
        # A tokenizer may cut all facts of one relation differently, and not those of another.
        try:
            found += conflict.conflicts(model.prompt, settings.rng(1, number), (relation,),
                                        per_relation=settings.pick(20, tiny=6))
        except PromptError as error:
            reason = error
    if not found:
        raise reason
    return found


def reader_conflicts(
    rng: np.random.Generator, per_city: int = 3, length: int = LENGTH,
    cities: Sequence[str] = tuple(reader.CITIES),
) -> list[Conflict]:
    """Memorized cities whose values a note in the context contradicts.

    Example:
        >>> made = reader_conflicts(np.random.default_rng(0), per_city=1)
        >>> len(made) == 3 * len(reader.CITIES), len(made[0].clean)
        (True, 48)

    "substitution": one note with another value. "coherent": the note, and later a recall that says
    the same. "none": prose in its place. The twin has another city and another value, in the note
    and in the question; everything else is the same.
    """
    found = []
    for city in cities:
        for _ in range(per_city):
            found += _one(rng, city, length)
    return found


def _one(rng: np.random.Generator, city: str, length: int) -> list[Conflict]:
    key = reader.TOKEN[city]
    other = int(rng.choice([k for k in reader.MEMORY if k != key
                            and reader.MEMORY[k][0] != reader.MEMORY[key][0]]))
    depth = float(rng.random())
    plain = reader.conflict(length, depth, rng, fact=False, city=city)
    noted = reader.conflict(length, depth, rng, city=city)
    short = reader.conflict(length - reader.RECORD, depth, rng, city=city)
    memory, stated = reader.MEMORY[key], noted.answers["context"]
    # No word of the twin's may be the first of either answer.
    taken = {memory[0], stated[0], reader.MEMORY[other][0]}
    twin_value = [int(rng.choice([v for v in VALUES if v not in taken])) for _ in stated]
    # The shorter prompt states the same value, and then recalls it once before it is asked for.
    start, stop = short.segments["needle_value"]
    ids = [*short.tokens[:start], *stated, *short.tokens[stop:]]
    coherent = [*ids[:-2], reader.RECALL, key, *stated, reader.END, *ids[-2:]]
    texts = {"none": (list(plain.tokens), []), "substitution": (
        list(noted.tokens), [noted.segments["needle_value"]]), "coherent": (
        coherent, [(start, stop), (length - 6, length - 3)])}
    made = []
    for kind, (tokens, places) in texts.items():
        twin = [other if token == key else token for token in tokens]
        segments: dict[str, Any] = {"bos": (0, 1), "question": (length - 2, length)}
        for number, (a, b) in enumerate(places):
            twin[a:b] = twin_value
            segments[f"object_{number}" if number else "object"] = (a, b)
        made.append(Conflict(
            *(Prompt.from_tokens(t, segments, tokens=[reader.WORDS[i] for i in t])
              for t in (tokens, twin)),
            Prompt.from_tokens(plain.tokens), tuple(memory), tuple(stated), "value", kind, city))
    return made
