"""Multi-document questions: one document holds the answer, at a chosen place among others.

Paper     arXiv:2503.23306 (20 documents, the gold one at place 0, 4, 9, 14 or 19)

Segments: "document_0", "document_1", ... in reading order, "gold" (the same positions as the one
that answers), "irrelevant" (all the others), "gold_value" (the answer inside of it), "question".
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any, SupportsIndex

import numpy as np

from interp.core import Prompt, PromptError, Segment, SegmentNotFound
from interp.prompts.needle import facts, haystack

TEMPLATE = (
    "Read the documents, then answer in a few words. One of them holds the answer.\n\n"
    "{documents}\n\nQuestion: {question}\nAnswer:"
)
"""Documents and question; the continuation should be the answer."""

NOTHING = "N/A"
"""The question of the prompts that calibrate."""

HEADER = "Document {number}: "
"""What stands in front of each document; `number` counts from 1."""

PLACES = (0, 4, 9, 14, 19)
"""Where the paper puts the gold document among 20."""


@dataclass(frozen=True)
class Documents:
    """A finished question over several documents.

    Attributes:
        prompt: with its segments; see the head of this file.
        gold_only: the same question over the gold document alone.
        blank: the same documents with nothing asked, for calibration (arXiv:2506.09944).
        answer: token ids of the answer as they stand in the gold document.
        place: number of the gold document, from 0. count: how many documents there are.
    """

    prompt: Prompt
    gold_only: Prompt
    blank: Prompt
    answer: tuple[int, ...]
    place: int
    count: int

    def document(self, number: SupportsIndex) -> tuple[int, ...]:
        """Positions of a document."""
        return self.prompt.segment(f"document_{int(number)}").positions

    def after(self) -> tuple[int, ...]:
        """Positions behind the last document: the question and whatever stands around it."""
        end = max(self.prompt.positions("document")) + 1
        return tuple(range(end, len(self.prompt)))

    def irrelevant(self) -> list[tuple[int, ...]]:
        """Positions of every document but the gold one."""
        return [self.document(i) for i in range(self.count) if i != self.place]


@dataclass(frozen=True)
class Question:
    """A question, its answer, the text that holds it, and texts that do not.

    Example:
        >>> Question("Who keeps bees?", "Ida", "Ida keeps bees.", ("Hugo sells ink.",)).answer
        'Ida'

    Raises `PromptError` if the gold text does not hold the answer exactly once, or another does.
    """

    question: str
    answer: str
    gold: str
    others: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if not self.question.strip() or not self.answer.strip():
            raise PromptError("a question and its answer need words; one of them is empty.")
        count = self.gold.count(self.answer)
        if count != 1:
            raise PromptError(
                f"the gold document holds the answer {self.answer!r:.40} {count} times; it must "
                "hold it once."
            )
        for number, text in enumerate(self.others):
            if self.answer in text:
                raise PromptError(
                    f"document {number} of the others holds the answer {self.answer!r:.40} too; "
                    "leave it out."
                )


def invented(
    rng: np.random.Generator, count: SupportsIndex = 20, words: SupportsIndex = 40
) -> Question:
    """A question about one of `count` invented documents, which no model can know.

    Example:
        >>> made = invented(np.random.default_rng(0), 3, words=30)
        >>> len(made.others), made.answer in made.gold, made.question[:15]
        (2, True, 'What is the pas')

    Every document states a fact of the same kind about another owner, in about `words` words.
    """
    own = facts(rng, int(count))
    texts = []
    for fact in own:
        room = max(0, int(words) - len(fact.sentence.split()))
        before = int(rng.integers(room + 1))
        parts = [haystack(rng, n) if n >= 4 else "" for n in (before, room - before)]
        texts.append(" ".join(p for p in (parts[0], fact.sentence, parts[1]) if p))
    return Question(own[0].question, own[0].value, texts[0], tuple(texts[1:]))


def build(
    model: Any,
    asked: Question,
    place: SupportsIndex,
    *,
    template: str = TEMPLATE,
    header: str = HEADER,
    chat: bool = False,
) -> Documents:
    """One prompt with the gold document at `place` among the others, in their given order.

    Example:
        >>> import interp
        >>> model = interp.open_model("reader")
        >>> asked = Question("recall amber", "two ten", "note amber two ten six ;",
        ...                  ("note ivy one six ten ;", "river stone the river"))
        >>> made = build(model, asked, 1, template="{documents} {question}", header="")
        >>> made.document(1) == made.prompt.positions("gold"), made.prompt.positions("gold_value")
        (True, (9, 10))

    Args:
        model: has `tokenizer`, `name` and `prompt(text, chat=, segments=)`; a `Model` does.
        place: 0 for the first document.
        template: with {documents} and {question}, once each.
        chat: whether the prompt is one user message in the model's chat template.

    Raises:
        PromptError: no such place, a template without its parts, a model without a tokenizer, or
            an answer whose tokens are lost.
    """
    at, count = int(place), 1 + len(asked.others)
    if not 0 <= at < count:
        raise PromptError(f"there is no place {at} among {count} documents; give 0 to {count - 1}.")
    if any(template.count(part) != 1 for part in ("{documents}", "{question}")):
        raise PromptError("the template needs {documents} and {question}, once each.")
    if model.tokenizer is None:
        raise PromptError(f"{model.name} has no tokenizer, so it cannot be given documents.")
    texts = [*asked.others[:at], asked.gold, *asked.others[at:]]
    prompt = _assemble(model, asked, texts, at, template, header, chat)
    alone = _assemble(model, asked, [asked.gold], 0, template, header, chat)
    nothing = replace(asked, question=NOTHING)
    blank = _assemble(model, nothing, texts, at, template, header, chat)
    answer = tuple(prompt.ids[p] for p in prompt.positions("gold_value"))
    spoken = model.tokenizer.decode(list(answer), skip_special_tokens=True)
    if asked.answer.strip() not in " ".join(spoken.split()):
        raise PromptError(
            f"the tokenizer of {model.name} does not keep the answer {asked.answer!r:.40} apart: "
            f"its tokens read {spoken!r:.60}."
        )
    return Documents(prompt, alone, blank, answer, at, count)


def grid(
    model: Any,
    rng: np.random.Generator,
    places: Iterable[SupportsIndex] = PLACES,
    *,
    count: SupportsIndex = 20,
    each: SupportsIndex = 1,
    words: SupportsIndex = 40,
    **more: Any,
) -> list[Documents]:
    """Invented questions with the gold document at every place in turn, `each` times.

    Example:
        >>> import interp
        >>> model = interp.open_model("reader")
        >>> try:
        ...     grid(model, np.random.default_rng(0), (0,), count=2)
        ... except PromptError as error:
        ...     print("refused")
        refused

    The bundled `reader` has no such words: use `synthetic` for it. `more` goes to `build`.
    """
    return [
        build(model, invented(rng, count, words), place, **more)
        for _ in range(int(each)) for place in places
    ]


def synthetic(
    language: Any,
    rng: np.random.Generator,
    places: Iterable[SupportsIndex] = PLACES,
    *,
    count: SupportsIndex = 20,
    each: SupportsIndex = 1,
    words: SupportsIndex = 24,
) -> list[Documents]:
    """The same in the language of the bundled `reader`: documents of prose with one note each.

    Example:
        >>> from interp.organisms import reader
        >>> made = synthetic(reader, np.random.default_rng(0), (0, 2), count=3, words=10)
        >>> [len(one.prompt) for one in made], made[1].place, len(made[1].gold_only)
        ([33, 33], 2, 13)

    Args:
        language: `interp.organisms.reader`.
        words: of each document, the note's six included.

    Raises `PromptError` if a document is too short for its note, or there are too few keys.
    """
    number, length = int(count), int(words)
    if length < language.RECORD or not 1 <= number < len(language.KEYS):
        raise PromptError(
            f"{number} documents of {length} words cannot be made: a note takes "
            f"{language.RECORD} words, and there are {len(language.KEYS)} keys."
        )
    return [
        _records(language, rng, int(place), number, length)
        for _ in range(int(each)) for place in places
    ]


def _records(
    language: Any, rng: np.random.Generator, place: int, count: int, words: int
) -> Documents:
    if not 0 <= place < count:
        raise PromptError(
            f"there is no place {place} among {count} documents; give 0 to {count - 1}."
        )
    keys = rng.choice([language.TOKEN[word] for word in language.KEYS], count, replace=False)
    values = [language.TOKEN[word] for word in language.VALUES]
    texts: list[list[int]] = []
    for key in keys:
        before = int(rng.integers(words - language.RECORD + 1))
        value = [int(v) for v in rng.choice(values, language.VALUE_LENGTH)]
        prose = [
            [int(t) for t in language.prose(rng, 1, n)[0]] if n else []
            for n in (before, words - language.RECORD - before)
        ]
        texts.append([*prose[0], language.NOTE, int(key), *value, language.END, *prose[1]])
    unnamed = [language.TOKEN[word] for word in language.KEYS]
    unnamed = [key for key in unnamed if key not in keys]

    def made(chosen: Sequence[int], gold: int, key: int) -> Prompt:
        question = [language.RECALL, key]
        ids, segments = [language.BOS], {"bos": (0, 1)}
        for i, number in enumerate(chosen):
            segments[f"document_{i}"] = (len(ids), len(ids) + words)
            ids += texts[number]
        note = segments[f"document_{gold}"][0] + texts[place].index(language.NOTE)
        segments["gold_value"] = (note + 2, note + 2 + language.VALUE_LENGTH)
        segments["question"] = (len(ids), len(ids) + len(question))
        return _labelled(Prompt.from_tokens([*ids, *question], segments), gold, len(chosen))

    own = int(keys[place])
    prompt = made(range(count), place, own)
    # What is asked for in the blank prompt is named in no document.
    blank = made(range(count), place, int(rng.choice(unnamed)))
    answer = tuple(prompt.ids[p] for p in prompt.positions("gold_value"))
    return Documents(prompt, made([place], 0, own), blank, answer, place, count)


def _assemble(
    model: Any, asked: Question, texts: Sequence[str], gold: int, template: str, header: str,
    chat: bool,
) -> Prompt:
    blocks = [header.format(number=i + 1) + text for i, text in enumerate(texts)]
    starts, at = [], template.index("{documents}")
    if template.index("{question}") < at:
        at += len(asked.question) - len("{question}")
    joint = "\n" if "\n" in template else " "
    for block in blocks:
        starts.append(at)
        at += len(block) + len(joint)
    source = template.replace("{question}", asked.question, 1)
    source = source.replace("{documents}", joint.join(blocks), 1)

    def marked(text: str, begin: int) -> tuple[str, int]:
        """The text, and which of its occurrences begins there."""
        found = [i for i in range(len(source)) if source.startswith(text, i)] \
            if source.count(text) > 1 else [source.index(text)]
        return text, found.index(begin)

    segments: dict[str, Any] = {
        f"document_{i}": marked(block, start)
        for i, (block, start) in enumerate(zip(blocks, starts))
    }
    inside = starts[gold] + len(header.format(number=gold + 1)) + asked.gold.index(asked.answer)
    segments["gold_value"] = marked(asked.answer, inside)
    before = template.partition("{question}")[0]
    begin = len(before.replace("{documents}", joint.join(blocks)))
    segments["question"] = marked(asked.question, begin)
    try:
        prompt = model.prompt(source, chat=chat, segments=segments)
    except SegmentNotFound as error:
        raise PromptError(
            f"the tokenizer of {model.name} lost a part of the documents: {error}"
        ) from error
    return _labelled(prompt, gold, len(texts))


def _labelled(prompt: Prompt, gold: int, count: int) -> Prompt:
    """Segments "gold" and "irrelevant" beside the documents; a token of two documents is of none.

    A token that a tokenizer lets reach over the end of a document would be counted twice.
    """
    places = [set(prompt.segment(f"document_{i}").positions) for i in range(count)]
    shared = {p for i, one in enumerate(places) for other in places[:i] for p in one & other}
    own = [sorted(one - shared) for one in places]
    if not all(own):
        raise PromptError(f"document {[bool(x) for x in own].index(False)} has no token of its own.")
    rest = [p for i, one in enumerate(own) if i != gold for p in one]
    segments = [Segment(f"document_{i}", tuple(one), "document") for i, one in enumerate(own)]
    segments.append(Segment("gold", tuple(own[gold]), "gold"))
    segments += [Segment("irrelevant", tuple(rest), "irrelevant")] if rest else []
    return prompt.with_segments(**{segment.name: segment for segment in segments})
