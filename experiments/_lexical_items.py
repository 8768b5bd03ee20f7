"""Documents with items of several tokens that belong together, and ordinary tokens between them."""

from dataclasses import dataclass
from typing import Any, Optional

import numpy as np

from experiments import _passages, _texts
from experiments._paper import Settings
from interp.core import Prompt, PromptError
from interp.models.model import Model
from interp.models.prompting import printable
from interp.organisms import reader
from probes.lookahead import within_word

FEWEST = 8
"""Items that the documents of a part must hold between them."""


@dataclass(frozen=True)
class Documents:
    """Texts with their items as inclusive spans, and where a text begins after its start tokens.

    `others` are items of another kind: in the reader's documents, records that are built alike but
    whose tokens belong together in this document only.
    """

    prompts: list[Prompt]
    items: list[list[tuple[int, int]]]
    others: list[list[tuple[int, int]]]
    begin: int
    train: int
    select: int
    what: str
    items_are: str
    others_are: str = ""


def documents(model: Model, settings: Settings) -> Documents:
    """Documents of the reader's language, or passages of English, for a model.

    Raises `PromptError` where there is no text with items for a model.
    """
    if _texts.knows(model, reader):
        sizes = settings.pick((30, 9, 21), tiny=(10, 6, 8))
        length = min(settings.pick(128, tiny=96), model.max_positions or 128)
        made = [_records(settings.rng(21, i), length) for i in range(sum(sizes))]
        prompts = [Prompt.from_tokens(ids, tokens=[reader.WORDS[t] for t in ids]) for ids, _, _ in made]
        return Documents(
            prompts, [items for _, items, _ in made], [others for _, _, others in made], 1, sizes[0],
            sizes[1], "documents of the reader's language", "a city with its value from the weights",
            "a key with a value stated in the text")
    if not _passages.readable(model):
        raise PromptError(f"words of several tokens need a text, and {model.name} reads none")
    sizes = settings.pick((9, 5, 6), tiny=(6, 5, 5))
    longest = settings.pick(300, tiny=96)
    joined, _, _ = _passages.pairs(model, sum(sizes), min(longest, model.max_positions or longest))
    begin = len(_texts.first_ids(model))
    items = [words(model.tokenizer, prompt.ids, begin) for prompt in joined]
    if sum(map(len, items)) < FEWEST:
        raise PromptError(f"{model.name} writes hardly any word as several tokens")
    prompts = [Prompt(p.ids, tokens=printable(model.tokenizer, p.ids)) for p in joined]
    return Documents(prompts, items, [[] for _ in prompts], begin, sizes[0], sizes[1],
                     "passages of English", "a word of several tokens")


def words(tokenizer: Any, ids: Any, begin: int) -> list[tuple[int, int]]:
    """Runs of tokens that make one word, as inclusive spans.

    Example:
        >>> from interp.organisms import reader
        >>> words(reader.tokenizer(), [0, 9, 10], 1)
        []

    A token goes on with the word before it where the text of the two joins letters or digits.
    """
    ids = list(ids)
    joined = within_word(tokenizer, ids[:-1], ids[1:])
    made: list[tuple[int, int]] = []
    start: Optional[int] = None
    for t in range(begin + 1, len(ids) + 1):
        inside = t < len(ids) and bool(joined[t - 1])
        if inside and start is None:
            start = t - 1
        if not inside and start is not None:
            made.append((start, t - 1))
            start = None
    return made


def _records(
    rng: np.random.Generator, length: int
) -> tuple[list[int], list[tuple[int, int]], list[tuple[int, int]]]:
    """Prose with many records in it: cities recalled from the weights, and keys noted and recalled."""
    stream, used = reader.prose(rng, 1, 2 * length)[0], 0
    keys, cities = list(rng.permutation(reader.KEYS)), list(rng.permutation(reader.CITIES))
    ids, items, others = [reader.BOS], [], []
    noted: list[tuple[int, list[int]]] = []
    while True:
        gap = int(rng.integers(2, 7))
        while reader.WORDS[stream[used]] in reader.TRIGGERS:
            used += 1
        ids += stream[used: used + gap].tolist()
        used += gap
        span = (len(ids) + 1, len(ids) + 1 + reader.VALUE_LENGTH)
        if len(ids) + reader.RECORD > length or not keys or not cities:
            return ids[:length], items, others
        kind = rng.random()
        if kind < 0.4:
            city = reader.TOKEN[cities.pop()]
            items.append(span)
            ids += [reader.RECALL, city, *reader.MEMORY[city], reader.END]
            continue
        others.append(span)
        if kind < 0.7 or not noted:
            value = [reader.TOKEN[v] for v in rng.choice(reader.VALUES, reader.VALUE_LENGTH)]
            noted.append((reader.TOKEN[keys.pop()], value))
            ids += [reader.NOTE, noted[-1][0], *value, reader.END]
        else:
            key, value = noted.pop(int(rng.integers(len(noted))))
            ids += [reader.RECALL, key, *value, reader.END]
