"""Questions about pictures whose answer one token decides, and whether a model answers them at all."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from experiments import _picture_questions as questions
from experiments._picture_questions import Asked
from interp.core import Prompt, statistics
from interp.models.model import Model
from interp.prompts import scenes
from interp.prompts.first_token import told_apart

TASKS = ("color", "shape", "existence", "count", "position", "read")
WORDS = {
    "color": tuple(scenes.COLORS), "shape": scenes.SHAPES, "existence": ("yes", "no"),
    "count": scenes.COUNTS,
    "position": tuple(f"{a} {b}" for a in ("top", "bottom") for b in ("left", "right")),
}
"""All possible answers of a task; a number may be any."""


@dataclass(frozen=True, eq=False)
class Decisive:
    """A question, with the beginning of the answer in `prompt` where answers begin alike.

    `token` decides: the next one, if the answer is right. It is held `against` those that the other
    possible answers would have there.
    """

    asked: Asked
    prompt: Prompt
    token: int
    against: tuple[int, ...]
    task: str


def ask(model: Model, task: str, count: int, rng: np.random.Generator) -> list[Decisive]:
    """Questions of one task about scenes, or numbers to be read.

    Raises `PromptError` where no token tells the possible answers apart, or tokens have no boxes.
    """
    say, firsts = questions._spelling(model), set()
    if task == "read":
        asked = questions.reading(model, count, rng)
        firsts = {one.answer[0] for one in asked}
        firsts |= {questions._ids(model, str(digit))[0] for digit in range(10)}
    else:
        asked = questions.about_scenes(model, (task,), count, rng)
    found = []
    for one in asked:
        others = [(t,) for t in sorted(firsts - {one.answer[0]})] if task == "read" else [
            questions._ids(model, say(word)) for word in WORDS[task]]
        said, token, against = told_apart(one.answer, others)
        found.append(Decisive(one, saying(model, one.prompt, said), token, tuple(against), task))
    return found


def saying(model: Model, prompt: Prompt, said: Sequence[int]) -> Prompt:
    """The prompt with the beginning of the answer, so that the next token decides."""
    if not said:
        return prompt
    inputs = dict(prompt.inputs)
    for name, value in inputs.items():
        given = np.asarray(value)
        if given.ndim == 2 and given.shape[-1] == len(prompt):
            fill = 1 if name == "attention_mask" else 0
            inputs[name] = np.pad(given, ((0, 0), (0, len(said))), constant_values=fill)
    tokens = prompt.tokens and (*prompt.tokens, *(model.tokenizer.decode([t]) for t in said))
    return replace(prompt, ids=(*prompt.ids, *map(int, said)), inputs=inputs, tokens=tokens)


def guessing(
    name: str, tasks: Sequence[str], tokens: Sequence[int], right: Sequence[float]
) -> str:
    """Why answers say nothing about pictures: they are no better than always the most frequent one.

    Example:
        >>> guessing("m", ["color"] * 6, [1, 2, 3, 4, 5, 6], [1.0] * 6)
        ''

    "" if they are better, by a bootstrap interval over questions.
    """
    task, token, hit = (np.asarray(x) for x in (tasks, tokens, right))
    most = np.zeros(len(hit))
    for one in set(task.tolist()):
        here = task == one
        most[here] = np.unique(token[here], return_counts=True)[1].max() / here.sum()
    if statistics.mean(hit - most, resamples=1000).interval[0] > 0:
        return ""
    return (f"{name} answers {100 * hit.mean():.0f} % of {len(hit)} questions right, and always giving "
            f"the most frequent answer would be right in {100 * most.mean():.0f} %")
