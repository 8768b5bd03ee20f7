"""Knowledge conflicts: the context states one thing, what the model has learned says another.

Paper     arXiv:2402.18154 (World Capital), formats of conflict: arXiv:2503.10996
Formats   "none": the question alone; "substitution": one sentence with another answer put in;
          "coherent": a few sentences that all say the same
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Optional, Union

import numpy as np

from interp.core import Prompt, PromptError
from interp.prompts.counterfactual import Make, Pair, fill, misaligned

FORMATS = ("none", "substitution", "coherent")


@dataclass(frozen=True)
class Conflict:
    """One question whose memorized and stated answers differ, and its corrupted twin.

    `clean` and `corrupt` are aligned token by token; the twin asks about another subject and states
    another answer, so that nothing in it points to either answer. `closed_book` is the question
    alone. `memory` and `context` are the token ids of the two answers; their first tokens differ.

    Example:
        >>> case = Conflict(Prompt.from_tokens([1, 5, 8, 2, 5]), Prompt.from_tokens([1, 6, 9, 2, 6]),
        ...                 Prompt.from_tokens([2, 5]), memory=(7,), context=(8,))
        >>> case.tokens
        (8, 7)

    Raises `PromptError` for twins that are not aligned or answers that begin alike.
    """

    clean: Prompt
    corrupt: Prompt
    closed_book: Prompt
    memory: tuple[int, ...]
    context: tuple[int, ...]
    relation: str = ""
    format: str = "substitution"
    subject: str = ""

    def __post_init__(self) -> None:
        Pair(self.clean, self.corrupt)
        if not self.memory or not self.context:
            raise PromptError(f"a conflict on {self.subject!r} needs two answers of a token or more.")
        if self.memory[0] == self.context[0]:
            raise PromptError(
                f"both answers on {self.subject!r} begin with the token {self.memory[0]}, so the "
                "first token cannot tell them apart; choose another stated answer."
            )

    @property
    def tokens(self) -> tuple[int, int]:
        """The first tokens of the stated and of the memorized answer."""
        return self.context[0], self.memory[0]


@dataclass(frozen=True)
class Relation:
    """What is asked about a subject, how a text states it, and known facts.

    Example:
        >>> capital = RELATIONS["capital"]
        >>> capital.question.format(subject="France"), capital.facts["France"]
        ('The capital of France is', 'Paris')

    `question` ends where the answer begins; `statement` and `coherent` have the places {subject} and
    {object}.
    """

    question: str
    statement: str
    coherent: str
    facts: Mapping[str, str] = field(default_factory=dict)


def _facts(text: str) -> dict[str, str]:
    return dict(line.strip().split(": ") for line in text.strip().split(";") if line.strip())


RELATIONS = {
    "capital": Relation(
        "The capital of {subject} is", "The capital of {subject} is {object}.",
        "The government of {subject} sits in {object}. Its ministers live in {object}. Every map "
        "says it: the capital of {subject} is {object}.",
        _facts("""France: Paris; Germany: Berlin; Italy: Rome; Spain: Madrid; Japan: Tokyo;
        Russia: Moscow; China: Beijing; Egypt: Cairo; Greece: Athens; Poland: Warsaw;
        Austria: Vienna; Cuba: Havana; Ireland: Dublin; Portugal: Lisbon; Hungary: Budapest;
        Norway: Oslo; Peru: Lima; Iraq: Baghdad; Iran: Tehran; Kenya: Nairobi; Turkey: Ankara;
        Canada: Ottawa; Finland: Helsinki; Belgium: Brussels; Sweden: Stockholm; Syria: Damascus"""),
    ),
    "language": Relation(
        "The official language of {subject} is", "The official language of {subject} is {object}.",
        "Children in {subject} learn {object} at school. The newspapers there are in {object}. The "
        "official language of {subject} is {object}.",
        _facts("""France: French; Germany: German; Italy: Italian; Spain: Spanish; Japan: Japanese;
        Russia: Russian; China: Chinese; Greece: Greek; Poland: Polish; Portugal: Portuguese;
        Hungary: Hungarian; Norway: Norwegian; Turkey: Turkish; Sweden: Swedish; Denmark: Danish;
        Finland: Finnish; Thailand: Thai; Vietnam: Vietnamese; Egypt: Arabic; Mexico: Spanish"""),
    ),
    "continent": Relation(
        "{subject} is a country on the continent of", "{subject} is a country on the continent of "
        "{object}.",
        "Explorers of {object} often begin in {subject}. The oldest maps of {object} show {subject}. "
        "{subject} is a country on the continent of {object}.",
        _facts("""France: Europe; Germany: Europe; Italy: Europe; Japan: Asia; China: Asia;
        India: Asia; Egypt: Africa; Kenya: Africa; Nigeria: Africa; Ghana: Africa; Poland: Europe;
        Norway: Europe; Vietnam: Asia; Thailand: Asia; Mexico: North America; Peru: South America;
        Chile: South America; Canada: North America; Spain: Europe; Nepal: Asia"""),
    ),
    "currency": Relation(
        "The currency used in Japan is the yen. The currency used in {subject} is the",
        "The currency used in {subject} is the {object}.",
        "Shops in {subject} take only the {object}. The banks there count in the {object}. The "
        "currency used in {subject} is the {object}.",
        _facts("""Russia: ruble; India: rupee; Mexico: peso; Brazil: real; Switzerland: franc;
        Israel: shekel; Turkey: lira; Poland: zloty; Germany: euro; Canada: dollar; Thailand: baht;
        Sweden: krona; Hungary: forint; Britain: pound; Kuwait: dinar; Nigeria: naira"""),
    ),
}
"""Relations with facts that most pretrained English models know. `closed_book` says which."""


def conflicts(
    make: Make,
    rng: np.random.Generator,
    relations: Union[Mapping[str, Relation], Sequence[str]] = ("capital",),
    formats: Sequence[str] = FORMATS,
    per_relation: Optional[int] = None,
) -> list[Conflict]:
    """Conflicts in a tokenizer's own words, the same facts in every format.

    Example:
        >>> import interp
        >>> words = {"note": 3, "recall": 4, ";": 5}
        >>> relation = Relation("recall {subject}", "note {subject} {object} ;",
        ...     "note {subject} {object} ; recall {subject} {object} ;",
        ...     {"paris": "one", "rome": "two", "oslo": "six"})
        >>> model = interp.open_model("reader")
        >>> made = conflicts(model.prompt, np.random.default_rng(0), {"value": relation})
        >>> len(made), made[0].format, made[1].format
        (9, 'none', 'substitution')

    Args:
        make: text -> `Prompt`, with `segments=`: a model's `prompt`.
        relations: names from `RELATIONS`, or relations of your own.
        formats: which of `FORMATS`; each fact comes in all of them, or not at all.
        per_relation: at most so many facts of each relation, drawn at random.

    A fact is passed over where no stated answer with another first token, or no twin of equal
    length, can be found among the relation's other facts. Segments: "subject" and "object" (the stated
    answer), numbered where they come again: "subject_1", ...

    Raises:
        PromptError: an unknown relation or format, or a relation of which no fact is left.
    """
    if not isinstance(relations, Mapping):
        unknown = [name for name in relations if name not in RELATIONS]
        if unknown:
            raise PromptError(
                f"there is no relation {unknown[0]!r}; choose from {', '.join(RELATIONS)}, or give "
                "a Relation of your own."
            )
        relations = {name: RELATIONS[name] for name in relations}
    for name in formats:
        if name not in FORMATS:
            raise PromptError(f"there is no format {name!r}; choose from: {', '.join(FORMATS)}.")
    found: list[Conflict] = []
    make = _remembered(make)
    for name, relation in relations.items():
        mine: list[list[Conflict]] = []
        subjects = [str(s) for s in rng.permutation(list(relation.facts))]
        for subject in subjects:
            if per_relation is not None and len(mine) == per_relation:
                break
            made = _one(make, rng, name, relation, subject, formats)
            if made:
                mine.append(made)
        if not mine:
            raise PromptError(
                f"no fact of relation {name!r} has a stated answer with another first token and a "
                "twin of equal length in this tokenizer; give more facts."
            )
        found += [case for cases in mine for case in cases]
    return found


def _remembered(make: Make) -> Make:
    """The same prompt is asked for again and again while a twin is looked for."""
    made: dict[Any, Prompt] = {}

    def once(text: str, segments: Optional[Mapping[str, Any]] = None) -> Prompt:
        key = (text, tuple((segments or {}).items()))
        if key not in made:
            made[key] = make(text, segments=segments) if segments else make(text)
        return made[key]

    return once


def _one(
    make: Make, rng: np.random.Generator, name: str, relation: Relation, subject: str,
    formats: Sequence[str],
) -> list[Conflict]:
    """A fact in every format, with the first stated answer and twin that fit all; empty if none."""
    facts = relation.facts
    answers = {word: _answer(make, relation, subject, word) for word in {*facts.values()}}
    memory = answers[facts[subject]]
    objects = [o for o in rng.permutation(sorted(answers))
               if answers[o] and memory and answers[o][0] != memory[0]]
    others = [s for s in rng.permutation(sorted(facts)) if s != subject]
    for stated in objects:
        clean = {f: _prompt(make, relation, f, subject, stated) for f in formats}
        # An answer of other length would move everything after it.
        free = [o for o in objects if answers[o][0] != answers[stated][0]
                and len(answers[o]) == len(answers[stated])]
        for twin in _twins(make, relation, clean, others, free):
            closed = _prompt(make, relation, "none", subject, stated)
            return [
                Conflict(clean[f], twin[f], closed, memory, answers[stated], name, f, subject)
                for f in formats
            ]
    return []


def _twins(
    make: Make, relation: Relation, clean: Mapping[str, Prompt], subjects: Sequence[str],
    objects: Sequence[str],
) -> Iterator[dict[str, Prompt]]:
    """Twins aligned in every format: another subject, another answer."""
    first = next(iter(clean))
    plain = None if first != "none" else clean["none"]
    for subject in subjects:
        # The question alone depends on the subject only: cheap to rule out.
        if plain is not None and misaligned(
            plain, _prompt(make, relation, "none", subject, objects[0] if objects else "")
        ):
            continue
        for stated in objects[:8]:
            made = {f: _prompt(make, relation, f, subject, stated) for f in clean}
            if all(misaligned(clean[f], made[f]) is None for f in clean):
                yield made


def _prompt(make: Make, relation: Relation, kind: str, subject: str, stated: str) -> Prompt:
    before = {"none": "", "substitution": relation.statement, "coherent": relation.coherent}[kind]
    template = f"{before} {relation.question}".strip()
    return fill(make, template, {"subject": subject, "object": stated})


def _answer(make: Make, relation: Relation, subject: str, word: str) -> tuple[int, ...]:
    """The tokens of an answer as they continue the question; empty where they do not."""
    question = relation.question.format(subject=subject)
    before, after = make(question).ids, make(f"{question} {word}").ids
    return after[len(before):] if after[: len(before)] == before else ()


def closed_book(model: Any, cases: Sequence[Conflict]) -> list[bool]:
    """Which questions a model answers as memorized when nothing is stated (greedy, all tokens).

    Example:
        >>> import interp
        >>> model = interp.open_model("backcopy-1l")
        >>> one = Conflict(Prompt.from_tokens([1, 5, 3]), Prompt.from_tokens([1, 6, 3]),
        ...                Prompt.from_tokens([1, 3]), memory=(7,), context=(8,))
        >>> len(closed_book(model, [one]))
        1
    """
    known: dict[tuple[Any, ...], bool] = {}
    asked = {(case.closed_book.ids, case.memory): case for case in cases}
    for length in {len(case.memory) for case in cases}:
        some = [key for key in asked if len(key[1]) == length]
        made = model.generate([asked[key].closed_book for key in some], length)
        known.update({key: tuple(row) == key[1] for key, row in zip(some, made)})
    return [known[case.closed_book.ids, case.memory] for case in cases]


def split(
    cases: Iterable[Conflict], rng: np.random.Generator, share: Union[int, float] = 0.5
) -> tuple[list[Conflict], list[Conflict]]:
    """Two parts without a common subject, the first with `share` of the subjects of each relation.

    Example:
        >>> one = Conflict(Prompt.from_tokens([1, 5, 3]), Prompt.from_tokens([1, 6, 3]),
        ...                Prompt.from_tokens([3]), (7,), (8,), subject="a")
        >>> [len(part) for part in split([one, one], np.random.default_rng(0), 1.0)]
        [2, 0]
    """
    cases = list(cases)
    chosen: set[tuple[str, str]] = set()
    for relation in sorted({case.relation for case in cases}):
        subjects = sorted({case.subject for case in cases if case.relation == relation})
        order = rng.permutation(len(subjects))[: round(float(share) * len(subjects))]
        chosen |= {(relation, subjects[i]) for i in order}
    parts: tuple[list[Conflict], list[Conflict]] = ([], [])
    for case in cases:
        parts[(case.relation, case.subject) not in chosen].append(case)
    return parts
