"""Pictures of objects whose places are known, for `position_probes`: states, answers, turned words."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import xarray as xr

from experiments import _picture_questions as questions
from interp.causal.metrics import AnswerLogProb
from interp.core import Prompt
from interp.heads import ocr
from interp.models.model import Model
from interp.prompts import scenes
from probes import nulls, object_position

CORNERS = ("top left", "top right", "bottom left", "bottom right")
BATCH = 8


@dataclass(frozen=True, eq=False)
class Looked:
    """Pictures with their objects, and one question on the place of an object in each.

    Per object: `tokens` that show it, `places` (center and size as shares of the picture), `picture`
    and `kind`. Per picture: the prompt, and the corner in which the object asked about lies.
    """

    prompts: tuple[Prompt, ...]
    tokens: tuple[tuple[int, ...], ...]
    places: np.ndarray
    picture: np.ndarray
    kind: np.ndarray
    corner: tuple[str, ...]
    flipped: tuple[str, ...]


def look(model: Model, count: int, rng: np.random.Generator) -> Looked:
    """Scenes of three to five shapes, one of which is asked about.

    Raises `PromptError` where the processor gives no boxes for its tokens.
    """
    prompts, tokens, boxes, picture, kinds, corners, flipped = [], [], [], [], [], [], []
    own = questions.is_looker(model)
    scale = 1 if own else questions.SCALE
    while len(prompts) < count:
        for scene in scenes.scenes(rng, count - len(prompts), shapes=(3, 5), numbers=0):
            asked = scenes.questions(scene, rng, tasks=("position",))
            if not asked:
                continue
            text = asked[0].text if own else (
                f"{asked[0].text.replace(' ?', '?').capitalize()} Answer with one of: "
                f"{', '.join(CORNERS)}.")
            prompt = model.prompt(text, images=[scenes.draw(scene, scale)],
                                  chat=questions.has_chat(model))
            image = prompt.of_kind("image")[0]
            for thing in scene.shapes:
                left, top, right, bottom = thing.box
                box = (scale * left, scale * top, scale * right, scale * bottom)
                tokens.append(ocr.evidence(image, box))
                boxes.append(thing.box)
                picture.append(len(prompts))
                kinds.append(thing.name)
            prompts.append(prompt)
            corners.append(asked[0].answer)
            # One of the two words, drawn at random, turned around.
            word = ("top", "left")[int(rng.integers(2))]
            flipped.append(object_position.opposite(asked[0].answer, [word]))
    places = object_position.coordinates(np.array(boxes, dtype=float), (scenes.SIDE, scenes.SIDE))
    return Looked(tuple(prompts), tuple(tokens), places, np.array(picture), np.array(kinds),
                  tuple(corners), tuple(flipped))


def states(
    model: Model, looked: Looked, layers: Sequence[int]
) -> tuple[xr.DataArray, xr.DataArray]:
    """Mean state of each object's tokens, and the last token's: `[layer, sample, d_model]` each."""
    objects, last = [], []
    for first in range(0, len(looked.prompts), BATCH):
        some = looked.prompts[first : first + BATCH]
        members = [i for i, p in enumerate(looked.picture) if first <= p < first + len(some)]
        mine = [[i for i in members if looked.picture[i] == first + n] for n in range(len(some))]
        wanted = [sorted({t for i in own for t in looked.tokens[i]} | {len(p) - 1})
                  for own, p in zip(mine, some)]
        found = nulls.layer_states(model, some, wanted, layers=layers, batch_size=BATCH)
        number, place = found["prompt"].values, found["position"].values
        for n, own in enumerate(mine):
            here = found.values[:, number == n]
            at = {int(p): i for i, p in enumerate(place[number == n])}
            objects += [here[:, [at[t] for t in looked.tokens[i]]].mean(1) for i in own]
            last.append(here[:, at[len(some[n]) - 1]])
    dims, where = ("layer", "sample", "d_model"), {"layer": found["layer"].values}
    return (xr.DataArray(np.stack(objects, 1), dims=dims, coords=where),
            xr.DataArray(np.stack(last, 1), dims=dims, coords=where))


def captions(model: Model, looked: Looked) -> tuple[np.ndarray, np.ndarray]:
    """Log probability of the right corner, and of the one that differs in a single word."""
    return (_log_p(model, looked.prompts, looked.corner), _log_p(model, looked.prompts, looked.flipped))


def questions_that_differ(
    model: Model, count: int, rng: np.random.Generator
) -> tuple[np.ndarray, np.ndarray]:
    """Two numbers in two corners, asked for one after the other: log probability of the right and of
    the exchanged answers, summed over both questions (so that likely numbers gain nothing)."""
    own = questions.is_looker(model)
    scale = 1 if own else questions.SCALE
    prompts: list[Prompt] = []
    right: list[str] = []
    while len(prompts) < 2 * count:
        for scene in scenes.scenes(rng, count, shapes=(0, 2), numbers=2):
            asked = scenes.questions(scene, rng, tasks=("read",), every=True)
            if len(asked) != 2 or asked[0].answer == asked[1].answer or len(prompts) >= 2 * count:
                continue
            for one in asked:
                text = one.text if own else one.text.replace(" ?", "?").capitalize() + questions.SHORT
                prompts.append(model.prompt(text, images=[scenes.draw(scene, scale)],
                                            chat=questions.has_chat(model)))
                right.append(one.answer if own else one.answer.replace(" ", ""))
    exchanged = [right[i ^ 1] for i in range(len(right))]
    return (_log_p(model, prompts, right).reshape(-1, 2).sum(1),
            _log_p(model, prompts, exchanged).reshape(-1, 2).sum(1))


def _log_p(model: Model, prompts: Sequence[Prompt], answers: Sequence[str]) -> np.ndarray:
    tokenizer: Any = model.tokenizer
    ids = [tokenizer(answer, add_special_tokens=False)["input_ids"] for answer in answers]
    return np.asarray(AnswerLogProb(ids)(model, list(prompts)), dtype=float)
