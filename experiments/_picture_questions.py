"""Questions about pictures with known boxes, for any vision-language model: colors, shapes, reading.

`looker` gets scenes in its own words, with handwritten numbers to read. Other models get the same
scenes enlarged, with the way to answer spelled out, and passkeys in rendered text.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from PIL import Image, ImageDraw

import interp
from experiments import visual_sinks
from experiments._output import Output
from experiments._paper import Paper, Settings, opened
from interp.causal.metrics import AnswerLogProb
from interp.core import Prompt, PromptError, statistics
from interp.heads import ocr
from interp.models.model import Model
from interp.organisms import looker
from interp.organisms.asking import SCALE, SHORT, has_chat, speaks
from interp.prompts import rendered_text, scenes

PLANTED = visual_sinks.PLANTED
GENERAL = "what color is it ?"
"""A question that does not name the object."""

NO_HEADS = ", so it has no such heads"
"""What `subjects` adds for experiments on heads."""

VARIANTS = ("plain", "outlined", "general")


@dataclass(frozen=True, eq=False)
class Asked:
    """One question about one picture.

    `answer` are token ids; `where` holds, for every one of them, the image tokens on what answers
    it, `region` all of these together (both empty where the processor gives no boxes).
    """

    prompt: Prompt
    answer: tuple[int, ...]
    task: str
    where: tuple[tuple[int, ...], ...]
    region: tuple[int, ...]
    picture: Image.Image
    text: str


def open_subject(name: str, settings: Settings) -> Model:
    """A model by name; "planted-looker" is `looker` with visual sinks planted in it."""
    if name == PLANTED:
        return visual_sinks._planted(settings)
    return interp.open_model(name, **settings.opening())


def subjects(
    paper: Paper, settings: Settings, out: Output, give_up: Callable[[str, str], None],
    so: str = "",
) -> Iterator[Model]:
    """The models of a run that can be asked about pictures; of the others `give_up` is told why.

    `so` is what follows for an experiment from a model's having no image tokens.
    """
    for model in opened(paper, settings, give_up, open_subject):
        reason = unfit(model, so)
        if reason:
            out.record(model)
            give_up(model.name, reason)
            continue
        yield model


def unfit(model: Model, so: str = "") -> str:
    """Why a model cannot be asked about pictures, "" if it can."""
    if not model.has_images:
        return f"{model.name} is a text model: it has no image tokens{so}"
    if model.processor is None:
        return f"{model.name} has no image processor here, so pictures cannot be given to it"
    if model.kind != "decoder":
        return f"{model.name} is no decoder: the text after an image does not read it causally"
    return ""


def is_looker(model: Model) -> bool:
    """Whether the model speaks the language of scenes."""
    return speaks(model, looker)


def about_scenes(
    model: Model, tasks: Sequence[str], count: int, rng: np.random.Generator
) -> list[Asked]:
    """Questions about scenes, `count` in all, one per scene, a task drawn for each."""
    say = _spelling(model)
    found: list[Asked] = []
    while len(found) < count:
        for scene in scenes.scenes(rng, count - len(found)):
            task = tasks[int(rng.integers(len(tasks)))]
            options = scenes.questions(scene, rng, tasks=(task,))
            if options:
                question = options[int(rng.integers(len(options)))]
                found.append(_ask(model, scene, question, question.text, say))
    return found


def reading(model: Model, count: int, rng: np.random.Generator) -> list[Asked]:
    """Numbers to be read: handwritten in scenes for `looker`, rendered passkeys for others.

    Raises `PromptError` where the processor gives no boxes for its tokens.
    """
    if is_looker(model):
        return about_scenes(model, ("read",), count, rng)
    return [_passkey(model, rng) for _ in range(count)]


def in_text(model: Model, count: int, rng: np.random.Generator) -> list[Asked]:
    """The same kind of number in text instead of a picture: what retrieval heads are for."""
    found = []
    for _ in range(count):
        if is_looker(model):
            number = " ".join(str(d) for d in rng.integers(10, size=int(rng.integers(1, 4))))
            text, key = f"the number is {number} . what is the number ?", number
        else:
            hidden = rendered_text.passkey(rng)
            question = rendered_text.QUESTION.replace(" in the picture", "")
            text, key = f"{hidden.text}\n{question}", hidden.answer
        prompt = model.prompt(text, chat=has_chat(model))
        found.append(Asked(prompt, _ids(model, key), "text", (), (), Image.new("RGB", (1, 1)), text))
    return found


def variants(
    model: Model, count: int, rng: np.random.Generator
) -> dict[str, list[Asked]]:
    """The same color question three times: as it is, with a box drawn around the object, and
    without naming the object."""
    say = _spelling(model)
    found: dict[str, list[Asked]] = {name: [] for name in VARIANTS}
    while len(found["plain"]) < count:
        for scene in scenes.scenes(rng, count - len(found["plain"])):
            options = scenes.questions(scene, rng, tasks=("color",))
            if not options:
                continue
            found["plain"].append(_ask(model, scene, options[0], options[0].text, say))
            found["outlined"].append(
                _ask(model, scene, options[0], options[0].text, say, outline=True))
            found["general"].append(_ask(model, scene, options[0], GENERAL, say))
    return found


def answers(asked: Sequence[Asked]) -> list[list[int]]:
    """The token ids of every answer."""
    return [list(one.answer) for one in asked]


def prompts(asked: Sequence[Asked]) -> list[Prompt]:
    """The prompt of every question."""
    return [one.prompt for one in asked]


def share(right: np.ndarray) -> statistics.Estimate:
    """Of right answers, with a Wilson interval; where means of several draws are given, bootstrapped."""
    if np.isin(right, (0, 1)).all():
        return statistics.rate(int(right.sum()), len(right))
    return statistics.mean(right, resamples=2000)


def chance(asked: Sequence[Asked]) -> float:
    """Accuracy of always giving the most frequent answer."""
    given = [one.answer for one in asked]
    return max(given.count(a) for a in set(given)) / len(given)


def _ask(
    model: Model, scene: scenes.Scene, question: scenes.Question, text: str,
    say: Callable[[str], str], outline: bool = False,
) -> Asked:
    own = is_looker(model)
    scale = 1 if own else SCALE
    picture = scenes.draw(scene, scale)
    if outline:
        pen = ImageDraw.Draw(picture)
        for left, top, right, bottom in question.boxes:
            pen.rectangle((scale * left - 1, scale * top - 1, scale * right, scale * bottom),
                          outline=(255, 255, 255), width=max(1, scale // 2))
    prompt = model.prompt(text if own else text.replace(" ?", "?").capitalize() + SHORT,
                          images=[picture], chat=has_chat(model))
    answer = _ids(model, say(question.answer))
    boxes = [(scale * a, scale * b, scale * c, scale * d) for a, b, c, d in question.boxes]
    image = prompt.of_kind("image")[0]
    each = [ocr.evidence(image, box) for box in boxes] if image.boxes else []
    region = tuple(sorted({p for places in each for p in places}))
    # A number has one box per digit, and looker one token per digit; else all boxes together.
    apart = question.task == "read" and len(each) == len(answer)
    where = tuple(each) if apart else (region,) * len(answer)
    return Asked(prompt, answer, question.task, where, region, picture, text)


def _passkey(model: Model, rng: np.random.Generator) -> Asked:
    hidden = rendered_text.passkey(rng, depth=float(rng.uniform()), square=True)
    prompt = model.prompt(rendered_text.QUESTION, images=hidden.images, chat=has_chat(model))
    answer = _ids(model, hidden.answer)
    images = prompt.of_kind("image")
    if len(images) != len(hidden.pages):
        raise PromptError(f"{model.name} does not tell the tokens of several pictures apart.")
    pieces = [model.tokenizer.decode(answer[: i + 1]) for i in range(len(answer))]
    ends = ["", *pieces]
    shown = [after[len(before):] for before, after in zip(ends, pieces)]
    words = rendered_text.word_of_token(shown, hidden.groups)
    each = [ocr.evidence(images[page], box) for page, box in hidden.places]
    return Asked(prompt, answer, "read", tuple(each[w] for w in words),
                 tuple(sorted({p for places in each for p in places})), hidden.images[0],
                 rendered_text.QUESTION)


@lru_cache(maxsize=4)
def _spelling(model: Model) -> Callable[[str], str]:
    """How answers are written: looker's words as they are, else as the model prefers them."""
    if is_looker(model):
        return str
    rng = np.random.default_rng(0)
    options: tuple[Callable[[str], str], ...] = (str.lower, str.capitalize)
    tried = []
    for say in options:
        some = []
        for scene in scenes.scenes(rng, 6, shapes=(2, 4)):
            for question in scenes.questions(scene, rng, tasks=("color",)):
                some.append(_ask(model, scene, question, question.text, say))
        tried.append(float(AnswerLogProb(answers(some))(model, prompts(some)).mean()) if some else 0)
    return options[int(np.argmax(tried))]


def _ids(model: Model, answer: str) -> tuple[int, ...]:
    return tuple(int(i) for i in model.tokenizer(answer, add_special_tokens=False)["input_ids"])
