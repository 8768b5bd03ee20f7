"""Existence questions and descriptions of scenes, and what of a description is there."""

import re
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image

from experiments import _picture_questions as questions
from interp.core import Prompt
from interp.models.model import Model
from interp.prompts import scenes

DESCRIBE = "describe the picture ."
LONGER = ("List every colored shape in the picture, such as a red circle, and every number, "
          "separated by commas.")
WORDS = (*scenes.COLORS, *scenes.SHAPES)
_SHAPE = re.compile(rf"\b({'|'.join(scenes.COLORS)})\s+({'|'.join(scenes.SHAPES)})(?:e?s)?\b")
_NUMBER = re.compile(r"\b(?:number|digit)s?\s+(\d(?:\s?\d)*)\b")
"""After the word for it: a list may be numbered."""


@dataclass(frozen=True, eq=False)
class Named:
    """An object that a text names: its name, and where in the text it stands."""

    name: str
    start: int
    stop: int


@dataclass(frozen=True, eq=False)
class Described:
    """A scene to be described."""

    prompt: Prompt
    scene: scenes.Scene
    picture: Image.Image

    @property
    def names(self) -> set[str]:
        """What is there: "red circle", "4 7"."""
        return {thing.name for thing in self.scene.objects}


def existence(
    model: Model, count: int, rng: np.random.Generator, noise: float
) -> list[questions.Asked]:
    """Half of them with the answer yes; `noise` scales the noise of the pictures."""
    say, found = questions._spelling(model), []
    for scene in scenes.scenes(rng, -(-count // 2), noise=noise):
        found += [questions._ask(model, scene, q, q.text, say)
                  for q in scenes.questions(scene, rng, tasks=("existence",))]
    return found[:count]


def descriptions(
    model: Model, count: int, rng: np.random.Generator, noise: float
) -> list[Described]:
    """Scenes of a few objects, each with the instruction to describe it."""
    own = questions.is_looker(model)
    found = []
    for scene in scenes.scenes(rng, count, shapes=(2, 4), numbers=1, noise=noise):
        picture = scenes.draw(scene, 1 if own else questions.SCALE)
        prompt = model.prompt(DESCRIBE if own else LONGER, images=[picture],
                              chat=questions.has_chat(model))
        found.append(Described(prompt, scene, picture))
    return found


def named(text: str) -> list[Named]:
    """The objects that a text names, in order.

    Example:
        >>> [one.name for one in named("a Red circle , the number 0 1 , and two blue squares")]
        ['red circle', '0 1', 'blue square']
    """
    low = text.lower()
    found = [Named(f"{m[1]} {m[2]}", *m.span()) for m in _SHAPE.finditer(low)]
    found += [Named(" ".join(re.sub(r"\s", "", m[1])), *m.span(1)) for m in _NUMBER.finditer(low)]
    return sorted(found, key=lambda one: one.start)


def counted(described: Described, text: str) -> tuple[int, int, int, int]:
    """Objects named, named but not there, there, and there but not named."""
    names, said = described.names, [one.name for one in named(text)]
    return (len(said), sum(name not in names for name in said), len(names),
            len(names - set(said)))


def spans(model: Model, tokens: Sequence[int]) -> list[tuple[int, int]]:
    """Where in the decoded text every token stands."""
    ends = [len(model.tokenizer.decode(list(tokens[: i + 1]))) for i in range(len(tokens))]
    return list(zip([0, *ends], ends))


def steps_of(model: Model, tokens: Sequence[int]) -> list[tuple[str, list[int]]]:
    """Every named object with the steps at which its words were said."""
    text, places = model.tokenizer.decode(list(tokens)), spans(model, tokens)
    return [(one.name, [i for i, (a, b) in enumerate(places)
                        if max(a, one.start) < min(b, one.stop)
                        and text[max(a, one.start):min(b, one.stop)].strip()])
            for one in named(text)]


def word_ids(model: Model) -> dict[str, int]:
    """The first token of every color and shape word inside a text."""
    found = {}
    for word in WORDS:
        ids = model.tokenizer(f" {word}", add_special_tokens=False)["input_ids"]
        kept = [i for i in ids if model.tokenizer.decode([i]).strip()]
        if kept:
            found[word] = int(kept[0])
    return found
