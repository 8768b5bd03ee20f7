"""Questions in two hops: in the language of the written circuits, or about landmarks in English."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Optional

import numpy as np

import interp
from experiments._paper import Settings
from interp.core import Prompt, PromptError
from interp.models.model import Model
from interp.organisms import hop_circuit
from interp.organisms.hop_circuit import Hops

CIRCUITS = {"hop-circuit": Hops(), "hop-circuit-in-time": Hops(table=6)}
"""Written models: the second hop's table is too early in the first, and late enough in the other."""

LANDMARKS = {
    "the Eiffel Tower": "France", "the Colosseum": "Italy", "Mount Fuji": "Japan",
    "the Brandenburg Gate": "Germany", "the Kremlin": "Russia", "the Taj Mahal": "India",
    "Machu Picchu": "Peru", "the Great Sphinx": "Egypt", "the Acropolis": "Greece",
    "the Great Wall": "China", "the Alhambra": "Spain", "Chichen Itza": "Mexico",
}
FACTS = {
    "capital": {"France": "Paris", "Italy": "Rome", "Japan": "Tokyo", "Germany": "Berlin",
                "Russia": "Moscow", "India": "New Delhi", "Peru": "Lima", "Egypt": "Cairo",
                "Greece": "Athens", "China": "Beijing", "Spain": "Madrid", "Mexico": "Mexico City"},
    "main language": {"France": "French", "Italy": "Italian", "Japan": "Japanese",
                      "Germany": "German", "Russia": "Russian", "India": "Hindi", "Peru": "Spanish",
                      "Egypt": "Arabic", "Greece": "Greek", "China": "Chinese", "Spain": "Spanish",
                      "Mexico": "Spanish"},
    "continent": {"France": "Europe", "Italy": "Europe", "Japan": "Asia", "Germany": "Europe",
                  "India": "Asia", "Peru": "South America", "Egypt": "Africa", "Greece": "Europe",
                  "China": "Asia", "Spain": "Europe", "Mexico": "North America"},
}
DESCRIBING = ("Norway: Norway is a country in Europe, Marie Curie: Marie Curie was a scientist, "
              "Toyota: Toyota makes cars, x:")


@dataclass(frozen=True)
class TwoHops:
    """A question with the first tokens of its bridge and of its answer; `hops` are its single ones."""

    prompt: Prompt
    bridge: int
    answer: int
    hops: tuple[tuple[Prompt, int], ...]


@dataclass(frozen=True)
class Describing:
    """Prompts that describe what stands at a place: for the entity's state, and for the last one's."""

    entity: tuple[Prompt, int]
    last: tuple[Prompt, int]


def open_subject(name: str, settings: Settings) -> Model:
    """A written circuit by its name, or any other model."""
    if name in CIRCUITS:
        made = hop_circuit.build(CIRCUITS[name])
        if settings.device:
            made.to(settings.device)
        return Model(made, name, hop_circuit.words())
    return interp.open_model(name, **settings.opening())


def questions(
    model: Model, count: int, rng: np.random.Generator
) -> tuple[list[TwoHops], Describing, Optional[Hops]]:
    """Questions of which both single hops are known, and what is known about the model.

    Raises `PromptError` for a model that cannot be asked, or knows too little to be asked.
    """
    if model.kind != "decoder":
        raise PromptError(f"{model.name} is an encoder: it answers no questions")
    if model.tokenizer is None:
        raise PromptError(f"{model.name} has no tokenizer, so it cannot be asked")
    circuit = model.tokenizer.get_vocab() == hop_circuit.words().get_vocab()
    made = _circuit() if circuit else _english(model)
    made = [made[int(i)] for i in rng.permutation(len(made))]
    known = _known(model, made)
    if len(known) < 5:
        raise PromptError(f"{model.name} answers both single hops of {len(known)} of {len(made)} "
                          "questions: it does not know enough to be asked in two hops")
    if circuit:
        ids = [hop_circuit.TOKEN[word] for word in ("<bos>", hop_circuit.BRIDGES[0], "is")]
        short = Prompt.from_tokens(ids)
        return known[:count], Describing((short, 1), (short, 2)), CIRCUITS.get(model.name)
    prompt = model.prompt(DESCRIBING, segments={"x": "x:"})
    place = prompt.positions("x")[0]
    return known[:count], Describing((prompt, place), (prompt, place)), None


def _circuit() -> list[TwoHops]:
    made = []
    for (person, first), bridge in hop_circuit.FACTS.items():
        for second in hop_circuit.SECOND:
            prompt, answer = hop_circuit.two_hops(person, first, second)
            hops = (hop_circuit.one_hop(person, first), hop_circuit.one_hop(bridge, second))
            made.append(TwoHops(prompt, hop_circuit.TOKEN[bridge], answer, hops))
    return made


def _english(model: Model) -> list[TwoHops]:
    made = []
    for relation, facts in FACTS.items():
        for place, country in LANDMARKS.items():
            if country not in facts:
                continue
            text = f"The {relation} of the country of {place} is"
            one, two = f"The country of {place} is", f"The {relation} of {country} is"
            made.append(TwoHops(
                model.prompt(text, segments={"entity": place}),
                _first(model, one, country), _first(model, text, facts[country]),
                ((model.prompt(one), _first(model, one, country)),
                 (model.prompt(two), _first(model, two, facts[country])))))
    return made


def _first(model: Model, text: str, answer: str) -> int:
    """The token that an answer begins with after a text."""
    before, after = (model.prompt(t).ids for t in (text, f"{text} {answer}"))
    return int(next((b for a, b in zip(before, after) if a != b), after[min(
        len(before), len(after) - 1)]))


def _known(model: Model, made: Sequence[TwoHops]) -> list[TwoHops]:
    """Those of which the model answers both single hops (likeliest token)."""
    flat: list[Any] = [hop for one in made for hop in one.hops]
    run = model.run([prompt for prompt, _ in flat], logits="last")
    right = [int(rows[-1].argmax()) == token for rows, (_, token) in zip(run.logits, flat)]
    return [one for i, one in enumerate(made) if right[2 * i] and right[2 * i + 1]]
