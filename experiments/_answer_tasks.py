"""Tasks with one right answer each, for any model: questions over documents, and labels.

`reader` is asked for facts that stand in the prompt ("qa") and for cities that it knows by heart
("classification": one answer of a fixed list); other models for facts in invented documents, and
whether an invented remark is positive or negative.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np

from experiments import _document_tasks as tasks
from experiments._texts import knows
from interp.core import Prompt, PromptError
from interp.organisms import backcopy, reader
from interp.prompts import needle

GOOD = ("wonderful", "excellent", "delightful", "charming", "splendid", "lovely")
BAD = ("terrible", "awful", "dreadful", "disappointing", "horrible", "miserable")
SUBJECTS = ("meal", "concert", "journey", "hotel", "film", "lesson", "garden", "book")
LABELS = ("positive", "negative")
LABEL_TEMPLATE = "Remark: {text}\nIs the remark positive or negative?\nAnswer:"


@dataclass(frozen=True)
class Task:
    """Prompts with their answers; `starts` are the tokens that begin an answer of any kind."""

    name: str
    prompts: list[Prompt]
    answers: list[list[int]]
    starts: frozenset[int]
    what: str

    def __len__(self) -> int:
        return len(self.prompts)

    def valid(self, number: int, token: int) -> bool:
        """Whether a first token begins an answer that the task allows."""
        return token in self.starts

    def half(self, which: int) -> "Task":
        """Every second item, from item 0 or 1: one half to choose on, the other to test on."""
        chosen = range(which, len(self), 2)
        return Task(self.name, [self.prompts[i] for i in chosen],
                    [self.answers[i] for i in chosen], self.starts, self.what)


def qa(model: Any, rng: np.random.Generator, count: int, *, documents: int, words: int = 0) -> Task:
    """Questions over documents. Raises `PromptError` for a model that cannot be asked."""
    n_places = min(5, documents)
    each = -(-count // n_places)
    asked = tasks.questions(model, rng, count=documents, each=each, words=words,
                            n_places=n_places)[:count]
    answers = tasks.answers_of(asked)
    if knows(model, reader):
        starts = {reader.TOKEN[word] for word in reader.VALUES}
    else:
        starts = {answer[0] for answer in answers}
        for word in needle.COLORS:
            for spelled in (word, f" {word}"):
                starts.add(model.tokenizer(spelled, add_special_tokens=False)["input_ids"][0])
    return Task("qa", tasks.prompts_of(asked), answers, frozenset(starts),
                f"{documents} documents, {len(asked[0].prompt)} tokens")


def classification(model: Any, rng: np.random.Generator, count: int, length: int = 600) -> Task:
    """One answer of a fixed list. Raises `PromptError` as `qa` does."""
    if model.kind == "encoder":
        raise PromptError(f"{model.name} is an encoder: it answers no questions")
    if knows(model, backcopy):
        raise PromptError(f"the language of {model.name} has no facts to ask for")
    if knows(model, reader):
        made = [reader.conflict(length, float(rng.random()), rng, fact=False,
                                distractors=max(0, length // 30)) for _ in range(count)]
        starts = {reader.TOKEN[word] for word in reader.VALUES}
        return Task("classification", [Prompt.from_tokens(one.tokens) for one in made],
                    [list(one.answers["memory"]) for one in made], frozenset(starts),
                    f"memorized cities after {length} tokens of other text")
    if model.tokenizer is None:
        raise PromptError(f"{model.name} has no tokenizer, so it cannot be asked")
    chat = getattr(model.tokenizer, "chat_template", None) is not None
    front = "" if chat else " "
    ids = {label: [int(i) for i in model.tokenizer(front + label, add_special_tokens=False)[
        "input_ids"]] for label in LABELS}
    starts = {model.tokenizer(lead + label, add_special_tokens=False)["input_ids"][0]
              for label in (*LABELS, *(x.capitalize() for x in LABELS)) for lead in ("", " ")}
    prompts, answers = [], []
    for _ in range(count):
        label = int(rng.integers(2))
        subject, word = rng.choice(SUBJECTS), rng.choice((GOOD, BAD)[label])
        other = rng.choice(SUBJECTS)
        text = str(rng.choice((
            f"The {subject} was {word}.", f"We all thought the {subject} was {word}.",
            f"After the {other} came the {subject}, and it was {word}.",
            f"I have never seen such a {word} {subject}.",
        )))
        prompts.append(model.prompt(LABEL_TEMPLATE.format(text=text), chat=chat))
        answers.append(ids[LABELS[label]])
    return Task("classification", prompts, answers, frozenset(starts), "remarks, two labels")
