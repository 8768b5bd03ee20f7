"""Pictures of scenes whose image tokens have names: which token shows what, and pictures of nothing."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image

from experiments import _picture_questions as questions
from experiments import _visual_flow as flow
from experiments._picture_questions import Asked
from interp.core import Prompt, PromptError, Segment
from interp.heads import ocr
from interp.models.model import Model
from interp.prompts import scenes

MATCH = 0.5
"""A token shows a thing if so much of the smaller of the two lies on the other."""


@dataclass(frozen=True, eq=False)
class Patch:
    """An image token on an object: `words` are token ids that name it, `color` is "" for digits."""

    picture: int
    position: int
    words: tuple[int, ...]
    color: str
    name: str


@dataclass(frozen=True, eq=False)
class Shown:
    """A question about a scene, and the tokens of everything in it."""

    asked: Asked
    scene: scenes.Scene
    image: Segment
    patches: tuple[Patch, ...]

    @property
    def prompt(self) -> Prompt:
        return self.asked.prompt


def shown(model: Model, count: int, rng: np.random.Generator, tasks: Sequence[str]) -> list[Shown]:
    """Questions about scenes, one per scene, the tasks in turn.

    Raises:
        PromptError: the processor gives no boxes, or does not mark image tokens.
    """
    say, found, known = questions._spelling(model), [], dict[str, tuple[int, ...]]()
    while len(found) < count:
        scene = scenes.scene(rng)
        options = scenes.questions(scene, rng, tasks=(tasks[len(found) % len(tasks)],))
        if not options:
            continue
        question = options[int(rng.integers(len(options)))]
        asked = questions._ask(model, scene, question, question.text, say)
        image = asked.prompt.of_kind("image")[0]
        if not image.boxes:
            raise PromptError(f"the processor of {model.name} gives no pixel boxes for its tokens")
        scale = 1 if questions.is_looker(model) else questions.SCALE
        patches = []
        for thing in scene.objects:
            for place, box in enumerate(thing.boxes):
                names = [thing.color, thing.shape] if thing.kind == "shape" else [
                    str(thing.digits[place])]
                words = tuple(i for name in names
                              for i in known.setdefault(name, flow._word_ids(model, [name])))
                left, top, right, bottom = (float(scale * edge) for edge in box)
                for position in ocr.evidence(image, (left, top, right, bottom), MATCH):
                    patches.append(Patch(len(found), position, words, thing.color, " ".join(names)))
        found.append(Shown(asked, scene, image, tuple(patches)))
    return found


def empty(model: Model, count: int, rng: np.random.Generator) -> list[Prompt]:
    """Pictures of nothing: the background of scenes alone."""
    scale = 1 if questions.is_looker(model) else questions.SCALE
    return [model.prompt(questions.GENERAL, images=[scenes.draw(scene, scale)],
                         chat=questions.has_chat(model))
            for scene in scenes.scenes(rng, count, shapes=0, numbers=0)]


def without_content(model: Model, count: int, rng: np.random.Generator) -> list[Prompt]:
    """Pictures that are no scenes: black, of one color, and noise, in turn."""
    side = scenes.SIDE * (1 if questions.is_looker(model) else questions.SCALE)
    made = []
    for number in range(count):
        pixels = np.zeros((side, side, 3), np.uint8)
        if number % 3 == 1:
            pixels[:] = rng.integers(0, 256, 3, dtype=np.uint8)
        elif number % 3 == 2:
            pixels = rng.integers(0, 256, pixels.shape, dtype=np.uint8)
        made.append(model.prompt(questions.GENERAL, images=[Image.fromarray(pixels)],
                                 chat=questions.has_chat(model)))
    return made
