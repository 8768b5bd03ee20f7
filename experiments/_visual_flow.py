"""What the experiments on image information share: objects with their tokens, windows, depths."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Optional

import numpy as np
from jaxtyping import Float

from experiments import _picture_questions as questions
from experiments._picture_questions import Asked
from interp.core import Prompt, PromptError, Segment
from interp.flow import object_ablation
from interp.models.model import Model
from interp.prompts import scenes

BANDS = {"early": (0.0, 0.3), "early to middle": (0.15, 0.45), "middle": (0.35, 0.65),
         "middle to late": (0.45, 0.75), "late": (0.65, 1.0), "all": (0.0, 1.0)}
"""Windows of arXiv:2410.07149 as shares of the depth."""


def bands(n_layers: int) -> dict[str, range]:
    """The layers of every window, at least one each.

    Example:
        >>> bands(32)["early"], bands(32)["middle"], bands(6)["late"]
        (range(0, 10), range(11, 21), range(4, 6))
    """
    found = {}
    for name, (start, stop) in BANDS.items():
        first = min(round(start * n_layers), n_layers - 1)
        found[name] = range(first, max(first + 1, round(stop * n_layers)))
    return found


def depth(loss: Float[np.ndarray, "prompt layer"], layers: Sequence[int], n_layers: int) -> float:
    """The mean depth of a loss, 0 the first layer and 1 the last; NaN where nothing is lost.

    Example:
        >>> depth(np.array([[0.0, 0.2, 0.0]]), [0, 1, 2], 3)
        0.5
    """
    weight = np.clip(loss.mean(0), 0, None)
    if weight.sum() <= 1e-6:
        return float("nan")
    return float((weight * np.asarray(layers)).sum() / weight.sum() / max(n_layers - 1, 1))


def needed(change: Float[np.ndarray, "prompt layer"], share: float = 0.9) -> float:
    """The smallest share of layers that together hold `share` of the absolute change.

    Example:
        >>> needed(np.array([[0.0, 1.0, 0.0, 0.0]]))
        0.25
    """
    weight = np.sort(np.abs(change).mean(0))[::-1]
    if weight.sum() <= 1e-6:
        return float("nan")
    held = np.cumsum(weight) / weight.sum()
    return float((np.searchsorted(held, share - 1e-9) + 1) / len(weight))


@dataclass(frozen=True, eq=False)
class Shown:
    """A question about one object of a picture, with the image tokens on and around it.

    `near` and `wide` are the object with one and two rings of neighbors; `words` are token ids that
    name its color and shape, `absent` those of colors and shapes that are not in the picture.
    """

    asked: Asked
    image: Segment
    object: tuple[int, ...]
    near: tuple[int, ...]
    wide: tuple[int, ...]
    name: str
    words: tuple[int, ...]
    absent: tuple[int, ...]

    @property
    def prompt(self) -> Prompt:
        return self.asked.prompt

    @property
    def cells(self) -> tuple[int, ...]:
        """Every image token that is a cell of the picture."""
        boxes = self.image.boxes
        return tuple(p for p, box in zip(self.image.positions, boxes) if box is not None)

    def last_row(self) -> tuple[int, ...]:
        """The lowest row of cells."""
        assert self.image.grid is not None
        return self.cells[-self.image.grid[1]:]


def shown(model: Model, count: int, rng: np.random.Generator,
          tasks: Sequence[str] = ("color", "shape")) -> list[Shown]:
    """Questions on the color or shape of an object, one per scene.

    Raises:
        PromptError: the processor gives no boxes, or the picture has no one grid of tokens.
    """
    say, found = questions._spelling(model), []
    while len(found) < count:
        scene = scenes.scene(rng)
        options = scenes.questions(scene, rng, tasks=(tasks[int(rng.integers(len(tasks)))],))
        if not options:
            continue
        question = options[0]
        one = questions._ask(model, scene, question, question.text, say)
        image = one.prompt.of_kind("image")[0]
        if not one.region:
            raise PromptError(f"the processor of {model.name} gives no pixel boxes for its tokens")
        thing = scene.objects[question.objects[0]]
        others = [_one_of(rng, [w for w in words if w not in {getattr(x, kind) for x in scene.shapes}])
                  for words, kind in ((tuple(scenes.COLORS), "color"), (scenes.SHAPES, "shape"))]
        rings = [object_ablation.ring(image, one.region, width) for width in (1, 2)]
        found.append(Shown(
            one, image, one.region, *rings, thing.name,
            _word_ids(model, [thing.color, thing.shape]), _word_ids(model, others)))
    return found


def _one_of(rng: np.random.Generator, words: Sequence[str]) -> str:
    return words[int(rng.integers(len(words)))]


def _word_ids(model: Model, words: Sequence[str]) -> tuple[int, ...]:
    """First tokens of words, with and without a space and a capital; unknown ones are left out."""
    unknown = model.tokenizer.unk_token_id
    found = []
    for word in words:
        for form in (word, f" {word}", word.capitalize(), f" {word.capitalize()}"):
            ids = model.tokenizer(form, add_special_tokens=False)["input_ids"]
            shown = [i for i in ids if model.tokenizer.decode([i]).strip()]
            if shown and shown[0] != unknown:
                found.append(int(shown[0]))
    return tuple(dict.fromkeys(found))


def cannot(model: Model, some: Sequence[Asked], accuracy: float) -> Optional[str]:
    """Why nothing can be learned from questions that are not answered above chance."""
    chance = questions.chance(some)
    if accuracy >= chance + 0.05:
        return None
    return (f"{model.name} answers {accuracy:.0%} of these questions, and always the same answer "
            f"would be right in {chance:.0%}: there is nothing to lose")


class Mentions:
    """Whether a description, generated greedily, holds a name: 1 or 0 per prompt."""

    name, unit, dim = "accuracy", "share of prompts", "prompt"

    def __init__(self, names: Sequence[str], new_tokens: int, batch_size: int = 32) -> None:
        self.names, self.new_tokens, self.batch_size = list(names), new_tokens, batch_size

    @property
    def shared(self) -> str:
        return f"mentions {self.names} {self.new_tokens}"

    def passes(self, model: Model, prompts: Sequence[Prompt], write: Any) -> list[str]:
        """The descriptions."""
        made = model.generate(prompts, self.new_tokens, write, batch_size=self.batch_size)
        return [model.tokenizer.decode(tokens).lower() for tokens in made]

    def values(self, outcome: Any) -> np.ndarray:
        return np.array([float(name in text) for name, text in zip(self.names, outcome)])
