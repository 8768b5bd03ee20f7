"""Tasks of one template with slots of one token each: arithmetic, and retrieval as its control."""

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from experiments import _texts as texts
from interp.core import Prompt, PromptError
from interp.flow.all_for_one import SlotTask
from interp.organisms import reader

SUMS = ("{a} + {b} + {c} =", "Calculate: {a} + {b} + {c} =",
        "Question: What is {a} + {b} + {c}? Answer:")
RANGES = (10, 4)
"""Numbers below this; with the smaller one every sum is one digit."""
NAMES = ("Anna", "Tom", "Mary", "Peter", "Sarah", "Paul", "Jack", "Emma")
LOOKUP = ("{p} has {x} apples. {q} has {y} apples. {r} has {z} apples. The number of apples that "
          "{asked} has is")


def arithmetic(model: Any, rng: np.random.Generator, count: int, contexts: int) -> SlotTask:
    """a + b + c, in the template that the model answers best. Raises `PromptError` if it cannot."""
    _check(model)
    if texts.knows(model, reader):
        raise PromptError(f"the language of {model.name} has no arithmetic")
    found: list[tuple[int, SlotTask]] = []
    reason = PromptError("no template to ask with")
    for template in SUMS:
        for below in RANGES:
            def draw(below: int = below) -> dict[str, str]:
                return {slot: str(rng.integers(below)) for slot in "abc"}

            try:
                task = _task(model, "sum", template, draw, draw, count, contexts,
                             lambda v: str(sum(map(int, v.values()))))
            except PromptError as error:
                reason = error
                continue
            found.append((_right(model, task), task))
            break
    if not found:
        raise reason
    return max(found, key=lambda pair: pair[0])[1]


def retrieval(model: Any, rng: np.random.Generator, count: int, contexts: int) -> SlotTask:
    """Facts of the prompt, one of them asked for: what a token means depends on its context."""
    _check(model)
    if texts.knows(model, reader):
        return _recall(rng, count, contexts)

    def context() -> dict[str, str]:
        names = rng.choice(NAMES, 4)
        return {**dict(zip(("p", "q", "r", "asked"), map(str, names))),
                **{slot: str(rng.integers(2, 10)) for slot in "xyz"}}

    def asked() -> dict[str, str]:
        made = context()
        made.update(zip("pqr", map(str, rng.choice(NAMES, 3, replace=False))))
        return {**made, "asked": made[str(rng.choice(list("pqr")))]}

    def answer(values: Mapping[str, str]) -> str:
        return {values[name]: values[number] for name, number in zip("rqp", "zyx")}.get(
            values["asked"], values["x"])

    return _task(model, "retrieval", LOOKUP, asked, context, count, contexts, answer)


def _recall(rng: np.random.Generator, count: int, contexts: int, facts: int = 3) -> SlotTask:
    """`facts` notes in the reader's language and a question on one key."""
    keys = np.array([reader.TOKEN[word] for word in reader.KEYS[:6]])
    values = np.array([reader.TOKEN[word] for word in reader.VALUES[:6]])

    def made(names: np.ndarray, asked: int) -> list[int]:
        ids = [reader.BOS]
        for name in names:
            ids += [reader.NOTE, int(name), *map(int, rng.choice(values, 3)), reader.END]
        return [*ids, reader.RECALL, int(asked)]

    pool = [made(rng.choice(keys, facts), int(rng.choice(keys))) for _ in range(contexts)]
    prompts, answers = [], []
    for _ in range(count):
        names = rng.choice(keys, facts, replace=False)
        which = int(rng.integers(facts))
        prompts.append(made(names, int(names[which])))
        answers.append(prompts[-1][1 + which * reader.RECORD + 2])
    return SlotTask("retrieval", np.array(prompts), np.array(answers), np.array(pool),
                    f"one of {facts} facts in the prompt is asked for")


def _check(model: Any) -> None:
    if model.kind != "decoder":
        raise PromptError(f"{model.name} is an encoder: it answers no questions")
    if model.tokenizer is None:
        raise PromptError(f"{model.name} has no tokenizer, so it cannot be asked")


def _task(
    model: Any, name: str, template: str, asked: Callable[[], dict[str, str]],
    context: Callable[[], dict[str, str]], count: int, contexts: int,
    answer: Callable[[Mapping[str, str]], str],
) -> SlotTask:
    """Prompts and contexts as tokens. Raises `PromptError` where a slot is not one token."""
    given = [asked() for _ in range(count)] + [context() for _ in range(contexts)]
    rows = [list(model.tokenizer(f"{template.format(**v)} {answer(v)}")["input_ids"]) for v in given]
    size = Counter(map(len, rows)).most_common(1)[0][0]
    if any(len(row) != size for row in rows):
        raise PromptError(f"the tokenizer of {model.name} does not make one token of every word in "
                          f"{template!r}, so its slots cannot be told apart")
    ids = np.array(rows)
    # The answer is the last token; where it begins with a space of its own, that is in the prompt.
    prompts, answers = ids[:, :-1], ids[:count, -1]
    _check_slots(model, template, prompts, given)
    told: dict[str, set[int]] = {}
    for values, token in zip(given, answers):
        told.setdefault(answer(values), set()).add(int(token))
    if any(len(tokens) > 1 for tokens in told.values()) or len(told) != len(set(answers.tolist())):
        raise PromptError(f"the tokenizer of {model.name} does not give every answer a token of its "
                          f"own after {template!r}")
    return SlotTask(name, prompts[:count], answers, prompts[count:],
                    f"{template!r}, {prompts.shape[1]} tokens")


def _check_slots(
    model: Any, template: str, ids: np.ndarray, given: Sequence[Mapping[str, str]]
) -> None:
    """Every position that varies is one slot's, and says what that slot says."""
    moving = [t for t in range(ids.shape[1]) if len(set(ids[:, t].tolist())) > 1]
    free = list(given[0])
    for t in moving:
        for slot in free:
            pairs = {(values[slot], int(token)) for values, token in zip(given, ids[:, t])}
            if len(pairs) == len({a for a, _ in pairs}) == len({b for _, b in pairs}):
                free.remove(slot)
                break
        else:
            raise PromptError(f"the tokenizer of {model.name} mixes the slots of {template!r}: "
                              f"position {t} belongs to no single one")
    if free:
        raise PromptError(f"the tokenizer of {model.name} shows no token for {free[0]!r} in "
                          f"{template!r}")


def _right(model: Any, task: SlotTask) -> int:
    rows = model.run([Prompt.from_tokens(row) for row in task.prompts], logits="last",
                     batch_size=32).logits
    return sum(int(row[-1].argmax()) == int(a) for row, a in zip(rows, task.answers))
