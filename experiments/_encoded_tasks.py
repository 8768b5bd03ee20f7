"""What is looked for in a model's states: labels of picture cells, of questions, and of texts.

Pictures  color, shape, digit and place of every object, at the image token that holds it; the same
          of the object that a question asks for, at the last token
Texts     which key is asked for, whether the context states an answer, whether that contradicts what
          was memorized, and the position of a token
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Optional

import numpy as np

from experiments import _conflicts, _texts
from experiments import _picture_questions as questions
from experiments._paper import Settings
from interp.core import Prompt, PromptError
from interp.heads import ocr
from interp.organisms import reader
from interp.prompts import scenes
from interp.prompts.conflict import Conflict

QUARTER = scenes.GRID // 2
"""Cells per side of a place: the grid has 2 x 2 places, which is what questions ask for."""
BINS = 8
TASKS = {"color": "color", "shape": "shape", "digit": "read", "place": "position"}
ALONE = "samples of one {} are kept together and nothing else recurs in other folds, so there is no " \
    "type that a control task could give labels to"


@dataclass(frozen=True, eq=False)
class Batch:
    """Prompts, and the positions of each whose states are wanted."""

    prompts: list[Prompt]
    places: list[list[int]]


@dataclass(frozen=True, eq=False)
class Feature:
    """What a probe is to read: a label for some samples of a batch.

    `groups` may not be split; `types` recur in training and test and carry the control labels (None
    with a reason in `why`).
    """

    name: str
    place: str
    batch: str
    rows: np.ndarray
    labels: np.ndarray
    groups: np.ndarray
    types: Optional[np.ndarray]
    why: str = ""

    @property
    def key(self) -> str:
        return f"{self.name} {self.place}"

    def of_frequent_labels(self, least: int) -> "Feature":
        """Without samples whose label is rarer than that: some folds would not have it."""
        _, number, counts = np.unique(self.labels, return_inverse=True, return_counts=True)
        kept = counts[number] >= least
        return replace(self, rows=self.rows[kept], labels=self.labels[kept], groups=self.groups[kept],
                       types=None if self.types is None else self.types[kept])


@dataclass(eq=False)
class Tasks:
    """Everything about one model: its prompts, what is looked for in them, what is erased."""

    batches: dict[str, Batch]
    features: list[Feature]
    erased: dict[str, tuple[list[Prompt], list[int], list[list[int]], np.ndarray]] = field(
        default_factory=dict)
    """Feature -> prompts, first answer tokens, positions to erase at, and groups."""

    reason: str = ""
    """Why features are missing, if some are."""


def pictures(model: Any, settings: Settings) -> Tasks:
    """Of a vision-language model. Raises `PromptError` where tokens have no boxes."""
    rng, say = settings.rng(1), questions._spelling(model)
    made: dict[str, list[tuple[Any, Any, questions.Asked]]] = {}
    for task, kind in TASKS.items():
        count = settings.pick(96, tiny=40) if task == "color" else settings.pick(64, tiny=24)
        made[task] = []
        while len(made[task]) < count:
            for scene in scenes.scenes(rng, count - len(made[task])):
                options = scenes.questions(scene, rng, tasks=(kind,))
                if options:
                    asked = questions._ask(model, scene, options[0], options[0].text, say)
                    made[task].append((scene, options[0], asked))
    batches, features = {}, [*_cells(model, made["color"])]
    batches["cells"] = features.pop()
    for task, found in made.items():
        batches[task] = Batch([a.prompt for *_, a in found], [[-1]] * len(found))
        things = [scene.objects[question.objects[0]] for scene, question, _ in found]
        number = np.arange(len(found))
        features.append(Feature(
            task, "at the last token", task, number,
            np.array([_label(task, thing, 0) for thing in things]), number,
            np.array([_type(task, thing, 0) for thing in things])))
    asked = [a for *_, a in made["color"]]
    answers, groups = [a.answer[0] for a in asked], np.arange(len(asked))
    return Tasks(batches, features, {
        "color at its image token": ([a.prompt for a in asked], answers,
                                     [list(a.region) for a in asked], groups),
        "color at the last token": ([a.prompt for a in asked], answers, [[-1]] * len(asked), groups)})


def _cells(model: Any, found: Sequence[Any]) -> list[Any]:
    """Features at the image tokens of objects, and their batch at the end."""
    scale = 1 if questions.is_looker(model) else questions.SCALE
    places: list[list[int]] = []
    rows: list[tuple[int, int, Any, int]] = []
    for number, (scene, _, asked) in enumerate(found[: max(20, len(found) // 2)]):
        image = asked.prompt.of_kind("image")[0]
        if not image.boxes:
            raise PromptError(f"{model.name} does not say which pixels an image token holds")
        mine = []
        for thing in scene.objects:
            for at, box in enumerate(thing.boxes):
                tokens = ocr.evidence(image, (scale * box[0], scale * box[1], scale * box[2],
                                              scale * box[3]))
                # The one in the middle, where a cell takes several tokens.
                mine.append(tokens[len(tokens) // 2])
                rows.append((len(rows), number, thing, at))
        places.append(mine)
    where = "at its image token"
    made: list[Any] = []
    for task in TASKS:
        kind = "number" if task == "digit" else "shape"
        own = [row for row in rows if task == "place" or row[2].kind == kind]
        made.append(Feature(
            task, where, "cells", np.array([row[0] for row in own]),
            np.array([_label(task, row[2], row[3]) for row in own]),
            np.array([row[1] for row in own]), np.array([_type(task, row[2], row[3]) for row in own])))
    return [*made, Batch([a.prompt for *_, a in found[: len(places)]], places)]


def _label(task: str, thing: Any, at: int) -> str:
    if task == "digit":
        return str(thing.digits[at])
    if task == "place":
        row, column = thing.cells[at]
        return f"{row // QUARTER},{column // QUARTER}"
    return getattr(thing, task)


def _type(task: str, thing: Any, at: int) -> str:
    """What recurs from picture to picture and has nothing to do with the label: the cell; where the
    label is of the cell, the thing in it."""
    return thing.name if task == "place" else str(thing.cells[at])


def texts(model: Any, settings: Settings) -> Tasks:
    """Of a language model, in its own language or in English. Raises `PromptError`."""
    if model.kind != "decoder":
        raise PromptError(f"{model.name} is an encoder: it does not continue a question")
    made = Tasks({}, [])
    _positions(model, settings, made.batches, made.features)
    try:
        cases = _conflicts.cases_for(model, settings)
    except PromptError as error:
        made.reason = str(error).rstrip(".")
        return made
    own = _texts.knows(model, reader)
    # A few keys, each often, and many subjects, each a few times.
    often = _conflicts.reader_conflicts(
        settings.rng(2), settings.pick(8, tiny=4), cities=reader.CITIES[:8]) if own else _often(cases)
    made.batches["key"], keys = _keys(often)
    made.features = [*keys, *_sources(cases, made.batches), *made.features]
    stated = [case.clean for case in often if case.format == "substitution"]
    answers = [case.context[0] for case in often if case.format == "substitution"]
    made.erased["key at the last token"] = (
        stated, answers, [[-1]] * len(stated), np.arange(len(stated)))
    return made


def _often(cases: Sequence[Conflict], most: int = 8) -> list[Conflict]:
    """Cases of the subjects that occur in most relations."""
    subjects = [case.subject for case in cases]
    ranked = sorted(set(subjects), key=lambda s: (-subjects.count(s), s))[:most]
    return [case for case in cases if case.subject in ranked]


def _keys(cases: Sequence[Conflict]) -> tuple[Batch, list[Feature]]:
    """Which key is asked for: at the last token, and at the end of the answer that is stated."""
    batch = Batch([case.clean for case in cases], [
        [-1] if case.format == "none" else [_stated(case.clean)[-1], -1] for case in cases])
    owner = np.repeat(np.arange(len(cases)), [len(places) for places in batch.places])
    last = np.array([place == -1 for places in batch.places for place in places])
    features = []
    for place, rows in (("at the last token", last), ("at the stated answer", ~last)):
        own = [cases[i] for i in owner[rows]]
        # Formats of one fact share its words.
        facts = [f"{case.subject}/{case.relation}/{case.context}" for case in own]
        features.append(Feature(
            "key", place, "key", np.flatnonzero(rows), np.array([c.subject for c in own]),
            np.array(facts), np.array([str(case.context[0]) for case in own])))
    return batch, features


def _stated(prompt: Prompt) -> tuple[int, ...]:
    return prompt.positions("object")


def _sources(cases: Sequence[Conflict], batches: dict[str, Batch]) -> list[Feature]:
    """Whether the context states an answer, and whether that is not the memorized one."""
    own = [case for case in cases if case.format in ("none", "substitution")]
    batches["source"] = Batch([case.clean for case in own], [[-1]] * len(own))
    features = [Feature(
        "source", "at the last token", "source", np.arange(len(own)),
        np.array(["memory" if c.format == "none" else "context" for c in own]),
        np.array([c.subject for c in own]), None, ALONE.format("subject"))]
    pairs = [(case, agreeing(case)) for case in cases if case.format == "substitution"]
    both = [(case, prompt, said) for case, other in pairs if other is not None
            for prompt, said in ((case.clean, "contradicts"), (other, "agrees"))]
    batches["contradiction"] = Batch(
        [prompt for _, prompt, _ in both], [[_stated(prompt)[-1], -1] for _, prompt, _ in both])
    for place, at in (("at the last token", 1), ("at the stated answer", 0)):
        features.append(Feature(
            "contradiction", place, "contradiction", 2 * np.arange(len(both)) + at,
            np.array([said for *_, said in both]), np.array([c.subject for c, *_ in both]), None,
            ALONE.format("subject")))
    return features


def agreeing(case: Conflict) -> Optional[Prompt]:
    """The prompt that states what is memorized; None where the stated answer is not whole tokens.

    Example:
        >>> case = _conflicts.reader_conflicts(np.random.default_rng(0), 1, cities=["oslo"])[1]
        >>> made = agreeing(case)
        >>> start = made.segment("object").start
        >>> made.ids[start : start + 3] == case.memory, len(made) == len(case.clean)
        (True, True)
    """
    segment = case.clean.segment("object")
    ids, start, stop = list(case.clean.ids), segment.start, segment.stop
    if tuple(ids[start:stop]) != tuple(case.context):
        return None
    made = [*ids[:start], *case.memory, *ids[stop:]]
    return Prompt.from_tokens(made, {"object": (start, start + len(case.memory))})


def _positions(
    model: Any, settings: Settings, batches: dict[str, Batch], features: list[Feature]
) -> None:
    """The position of words of plain text, in bins: not of the words, which recur anywhere."""
    length, rng = min(65, model.max_positions or 65), settings.rng(3)
    count, each = settings.pick(60, tiny=16), 6
    prompts = _texts.natural(model, count, length, rng)
    places = [sorted(int(p) for p in 1 + rng.choice(length - 1, each, replace=False)) for _ in prompts]
    batches["text"] = Batch(prompts, places)
    at = np.concatenate(places)
    words = np.array([prompt.ids[p] for prompt, own in zip(prompts, places) for p in own])
    features.append(Feature(
        "position", "at any token", "text", np.arange(len(at)), (at - 1) * BINS // (length - 1),
        np.repeat(np.arange(count), each), words))
