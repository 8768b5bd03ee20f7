"""Prompts for whichever model is asked: in a bundled model's own language, in English otherwise.

The bundled models speak small languages of their own; every other model gets plain English and, if it
has one, its chat template. So the same analysis runs on both.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, SupportsFloat, SupportsIndex, Union

import numpy as np
from jaxtyping import Float
from PIL import Image

from interp.core import Prompt, PromptError
from interp.prompts import needle, scenes
from interp.prompts.needle import Needle

SCALE = 4
"""Scenes are enlarged so much for models other than `looker`."""

SHORT = " Answer with one word."


def speaks(model: Any, language: Any) -> bool:
    """Whether a model has the vocabulary of a bundled model's module (`reader`, `looker`).

    Example:
        >>> import interp
        >>> from interp.organisms import looker, reader
        >>> model = interp.open_model("reader")
        >>> speaks(model, reader), speaks(model, looker)
        (True, False)
    """
    if model.tokenizer is None:
        return False
    return model.tokenizer.get_vocab() == language.tokenizer().get_vocab()


def has_chat(model: Any) -> bool:
    """Whether there is a chat template."""
    return bool(getattr(model.tokenizer, "chat_template", None)
                or getattr(model.processor, "chat_template", None))


def needles(
    model: Any,
    lengths: Sequence[SupportsIndex],
    depths: Union[Sequence[SupportsFloat], Float[np.ndarray, "sample"]],
    rng: np.random.Generator,
    each: int = 1,
) -> list[Needle]:
    """Facts that nobody could know, hidden in texts of these lengths (tokens) at these depths.

    Example:
        >>> import interp
        >>> model = interp.open_model("reader")
        >>> made = needles(model, (64,), (0.1, 0.9), np.random.default_rng(0))
        >>> [segment.name for segment in made[0].prompt.segments][:3]
        ['bos', 'haystack', 'question']

    Every prompt has the segments "needle", "needle_value" (the answer) and "question"; see
    `interp.prompts.needle`.

    Raises:
        PromptError: a model without a tokenizer, or a length without room for the fact.
    """
    from interp.organisms import reader

    shares = [float(depth) for depth in depths]
    if speaks(model, reader):
        made = needle.synthetic(reader.needle, lengths, shares, rng, each=each)
        return [replace(one, prompt=replace(
            one.prompt, tokens=tuple(reader.WORDS[i] for i in one.prompt.ids))) for one in made]
    if model.tokenizer is None:
        raise PromptError(
            f"{model.name} has no tokenizer, so no needle can be hidden in a text for it; save one "
            "beside its weights."
        )
    return needle.grid(model, lengths, shares, rng, each=each, chat=has_chat(model))


@dataclass(frozen=True, eq=False)
class Asked:
    """A question about a picture whose contents are known.

    Attributes:
        prompt: with the segment "image". answer: the token ids of the right answer.
        picture: as the model was given it. evidence: pixel boxes of what answers, in that picture.
        task: of `interp.prompts.scenes.TASKS`. text: the question.
    """

    prompt: Prompt
    answer: tuple[int, ...]
    picture: Image.Image
    evidence: tuple[scenes.Box, ...]
    task: str
    text: str

    def on_evidence(self) -> tuple[int, ...]:
        """The image tokens whose patches touch the evidence; empty without pixel boxes."""
        image = self.prompt.of_kind("image")[0]
        if not image.boxes:
            return ()
        return tuple(sorted({p for box in self.evidence for p in image.inside(box)}))


def pictures(
    model: Any, tasks: Sequence[str], count: SupportsIndex, rng: np.random.Generator
) -> list[Asked]:
    """Questions about scenes of shapes and handwritten numbers, the tasks taken in turn.

    Example:
        >>> import interp
        >>> model = interp.open_model("looker")
        >>> made = pictures(model, ("color", "read"), 4, np.random.default_rng(0))
        >>> [one.task for one in made], len(made[0].on_evidence()) > 0
        (['color', 'read', 'color', 'read'], True)

    Raises:
        PromptError: a model that takes no pictures.
    """
    from interp.organisms import looker

    if not model.has_images or model.processor is None:
        raise PromptError(
            f"{model.name} takes no pictures; open a vision-language model with its processor."
        )
    own, found = speaks(model, looker), []
    scale = 1 if own else SCALE
    while len(found) < int(count):
        task = tasks[len(found) % len(tasks)]
        scene = scenes.scene(rng)
        options = scenes.questions(scene, rng, tasks=(task,))
        if not options:
            continue
        question, picture = options[int(rng.integers(len(options)))], scenes.draw(scene, scale)
        text = question.text if own else question.text.replace(" ?", "?").capitalize() + SHORT
        prompt = model.prompt(text, images=[picture], chat=has_chat(model))
        answer = model.tokenizer(question.answer, add_special_tokens=False)["input_ids"]
        boxes = tuple((scale * left, scale * top, scale * right, scale * bottom)
                      for left, top, right, bottom in question.boxes)
        found.append(Asked(prompt, tuple(map(int, answer)), picture, boxes, task, text))
    return found
