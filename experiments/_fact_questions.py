"""Questions on facts with one right answer, what a model answers, and the states it answers from.

`reader` is asked for facts of lists so long that it errs, for cities it knows by heart after such a
list, and for facts that other notes contradict. Other models get general knowledge in English.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Optional

import numpy as np

from experiments._texts import knows
from interp.core import Prompt, PromptError
from interp.models.branches import Branches, Followed
from interp.models.model import Model
from interp.organisms import backcopy, reader
from probes import exact_answer
from probes.exact_answer import Exact, Log

READER = ("contradicted", "listed", "memorized")
FACTS, LENGTHS = 60, (600, 570, 540, 500, 440, 390)
"""Facts in a list, and the lengths of texts with such a list that `reader` is tried on (it was trained
on up to 512 tokens): the first after which it is right often enough."""

WRONG_AT_MOST = 0.6
CONTRADICTIONS, FEW = 3, 4
"""Further notes that say something else of what is asked, and facts beside it."""

KEPT = 2**28
FEWEST = 12
"""With fewer right or wrong answers nothing is said about them."""

TABLES: dict[str, tuple[str, dict[str, str]]] = {
    "capital": ("What is the capital of {}?", {
        "Norway": "Oslo", "Kenya": "Nairobi", "Peru": "Lima", "Mongolia": "Ulaanbaatar",
        "Bhutan": "Thimphu", "Latvia": "Riga", "Ghana": "Accra", "Uruguay": "Montevideo",
        "Laos": "Vientiane", "Slovenia": "Ljubljana", "Zambia": "Lusaka", "Nepal": "Kathmandu",
        "Malta": "Valletta", "Fiji": "Suva", "Chad": "N'Djamena", "Paraguay": "Asuncion",
        "Estonia": "Tallinn", "Oman": "Muscat", "Rwanda": "Kigali", "Honduras": "Tegucigalpa",
        "Tonga": "Nuku'alofa", "Suriname": "Paramaribo", "Canada": "Ottawa", "Turkey": "Ankara"}),
    "symbol": ("What is the chemical symbol of {}?", {
        "oxygen": "O", "iron": "Fe", "gold": "Au", "tin": "Sn", "tungsten": "W", "sodium": "Na",
        "lead": "Pb", "silver": "Ag", "antimony": "Sb", "mercury": "Hg", "potassium": "K",
        "helium": "He", "rhenium": "Re", "cerium": "Ce", "zinc": "Zn", "radon": "Rn",
        "thulium": "Tm", "hafnium": "Hf", "copper": "Cu", "niobium": "Nb"}),
    "number": ("What is the atomic number of {}?", {
        "hydrogen": "1", "carbon": "6", "neon": "10", "iron": "26", "gold": "79", "iodine": "53",
        "krypton": "36", "uranium": "92", "titanium": "22", "calcium": "20", "xenon": "54",
        "cobalt": "27", "barium": "56", "osmium": "76", "yttrium": "39", "sulfur": "16",
        "gallium": "31", "palladium": "46", "bismuth": "83", "platinum": "78"}),
    "opposite": ("What is the opposite of {}?", {
        "hot": "cold", "early": "late", "shallow": "deep", "ancient": "modern", "victory": "defeat",
        "expand": "contract", "scarce": "abundant", "arrive": "depart", "humid": "dry",
        "generous": "stingy", "rough": "smooth", "guilty": "innocent", "vague": "clear",
        "inner": "outer", "rise": "fall", "permanent": "temporary"}),
    "product": ("What is {}?", {f"{a} times {b}": str(a * b) for a, b in (
        (3, 4), (12, 11), (17, 6), (23, 14), (36, 27), (48, 19), (57, 63), (71, 88), (94, 37),
        (123, 45), (208, 76), (15, 15), (64, 29), (83, 52), (39, 91), (146, 33), (7, 9), (27, 44),
        (312, 58), (69, 78))}),
    "plural": ("What is the plural of the word {}?", {
        "dog": "dogs", "mouse": "mice", "ox": "oxen", "wolf": "wolves", "crisis": "crises",
        "goose": "geese", "fungus": "fungi", "tooth": "teeth", "sheep": "sheep",
        "phenomenon": "phenomena", "hero": "heroes", "knife": "knives", "axis": "axes",
        "vertex": "vertices", "child": "children", "appendix": "appendices"}),
}
"""Relation -> question and facts. The first entry is shown as an example to base models, not asked."""

NUMERIC = ("number", "product")
VALUES = tuple(reader.TOKEN[word] for word in reader.VALUES)
BRIEF = " Give only the answer, nothing else."
DIGITS = r"-?\d[\d,]*"


@dataclass(frozen=True, eq=False)
class Question:
    """A question: its words, what it is about, the right answer, and that answer's tokens."""

    prompt: Prompt
    text: str
    relation: str
    entity: str
    gold: str
    gold_ids: tuple[int, ...]


@dataclass(frozen=True, eq=False)
class Questions:
    """Questions of several relations; how an exact answer is found; how long answers may be."""

    items: list[Question]
    what: str
    new_tokens: int
    candidates: dict[str, tuple[str, ...]]
    patterns: dict[str, str]
    notes: dict[str, Any] = field(default_factory=dict)
    allowed: Optional[tuple[int, ...]] = None
    closing: tuple[int, ...] = ()
    """Where answers come from a closed set: its tokens, and what is read after an answer."""

    def only(self, items: Sequence[Question]) -> "Questions":
        """The same for some questions."""
        return replace(self, items=list(items))

    def __len__(self) -> int:
        return len(self.items)

    def exact(
        self, model: Model, question: Question, tokens: Sequence[int], log: Optional[Log] = None
    ) -> Optional[Exact]:
        """The exact answer in what was said."""
        return exact_answer.find(model.tokenizer, tokens, self.candidates[question.relation],
                                 self.patterns.get(question.relation, ""), log)

    def right(self, question: Question, exact: Exact) -> bool:
        """Whether the exact answer is the right one."""
        said = exact.text.replace(",", "") if question.relation in NUMERIC else exact.text
        # Chemical symbols differ by case alone.
        if question.relation == "symbol":
            return said == question.gold
        return said.lower() == question.gold.lower()


@dataclass(eq=False)
class Answered:
    """A question with the greedy answer and with sampled ones.

    `states` are `[layer, place, d_model]` per site: the prompt's last token, then every token of the
    greedy answer; `read` are the distinct answers, the greedy one first, as the model reads them.
    `branches` is kept, to sample more from, where all of them fit into `KEPT` numbers.
    """

    question: Question
    tokens: tuple[int, ...]
    exact: Optional[Exact]
    right: bool
    states: dict[str, np.ndarray]
    greedy: Followed
    samples: list[tuple[int, ...]]
    read: dict[tuple[int, ...], Followed]
    branches: Optional[Branches]


def unfit(model: Model) -> str:
    """Why a model cannot be asked, "" if it can."""
    if model.kind != "decoder":
        return f"{model.name} is an encoder: it answers no questions"
    if model.tokenizer is None:
        return f"{model.name} has no tokenizer, so it cannot be asked"
    if knows(model, backcopy):
        return f"the language of {model.name} has no facts to ask for"
    return ""


def questions(model: Model, count: int, rng: np.random.Generator) -> Questions:
    """About `count` questions, the relations in turn."""
    return _reader(model, count, rng) if knows(model, reader) else _english(model, count, rng)


def ask(
    model: Model, asked: Questions, *, sites: Sequence[str], samples: int, log: Log, seed: int,
    read_samples: bool = False, with_gold: bool = False,
    again: Optional[Mapping[Question, Optional[Branches]]] = None,
) -> Iterator[Answered]:
    """The answers, one question after the other: greedy, and `samples` at temperature 1.

    `again` are prompts that were run before, with at least the same sites.
    """
    numbers = 2 * model.n_layers * model.n_kv_heads * model.d_head * sum(
        len(q.prompt) for q in asked.items)
    for number, question in enumerate(asked.items):
        made = (again or {}).get(question) or Branches(
            model, question.prompt, read=sites, batch_size=32)
        drawn = [(*_line(model, row), *asked.closing) for row in made.sample(
            1 + samples, new_tokens=asked.new_tokens, seed=seed + number, with_end=True,
            greedy_first=True, allowed=asked.allowed)]
        greedy, others = drawn[0], [row for row in drawn[1:] if row]
        wanted = dict.fromkeys([greedy] if greedy else [])
        if read_samples:
            wanted |= dict.fromkeys(others)
        if with_gold:
            wanted[question.gold_ids] = None
        read = dict(zip(wanted, made.follow(list(wanted), asked.allowed))) if wanted else {}
        exact = asked.exact(model, question, greedy, log)
        if not greedy:
            continue
        states = {site: np.concatenate([made.states[site], read[greedy].states[site]], 1)
                  for site in sites}
        yield Answered(question, greedy, exact, exact is not None and asked.right(question, exact),
                       states, read[greedy], others, read, made if numbers < KEPT else None)


def _line(model: Model, tokens: Sequence[int]) -> list[int]:
    """Tokens up to the end of the first line that says something."""
    if not any("\n" in model.tokenizer.decode([token]) for token in tokens):
        return list(tokens)
    for i in range(1, len(tokens) + 1):
        text = model.tokenizer.decode(list(tokens[:i]))
        if "\n" in text.lstrip():
            return list(tokens[:i])
    return list(tokens)


# -- the reader ---------------------------------------------------------------------------------


def _reader(model: Model, count: int, rng: np.random.Generator) -> Questions:
    length, errors = _hard_enough(model, np.random.default_rng(rng.integers(2**32)))
    items = []
    for number in range(count):
        relation = READER[number % len(READER)]
        made = _one(relation, length, rng)
        gold = made.answers["memory" if relation == "memorized" else "context"]
        entity = reader.WORDS[made.tokens[-1]]
        items.append(Question(
            Prompt.from_tokens(made.tokens, made.segments), f"recall {entity}", relation, entity,
            reader.words(gold), (*gold, reader.END)))
    words = "|".join(reader.VALUES)
    pattern = rf"\b(?:{words})(?: (?:{words})){{{reader.VALUE_LENGTH - 1}}}\b"
    return Questions(
        items, f"values of the reader's language: {FACTS} facts in {length} tokens, or contradicting "
        "notes; as many words as a value has, each the likeliest among its words", reader.VALUE_LENGTH,
        dict.fromkeys(READER, ()), dict.fromkeys(READER, pattern),
        {"length of lists": length, "errors after other such lists": errors},
        # After overlong lists it ends its answers early, which would tell an error by its length.
        VALUES, (reader.END,))


def _one(relation: str, length: int, rng: np.random.Generator) -> reader.ReaderPrompt:
    if relation == "contradicted":
        return _contradicted(rng)
    if relation == "listed":
        return reader.needle(length, float(rng.random()), rng, distractors=FACTS)
    return reader.conflict(length, float(rng.random()), rng, fact=False, distractors=FACTS)


def _contradicted(rng: np.random.Generator) -> reader.ReaderPrompt:
    """Notes on one key that say different things: the first of them is right."""
    made = reader.needle(reader.RECORD * (FEW + 1) + 20, float(rng.random()), rng, distractors=FEW)
    body, question, key = made.tokens[:-2], made.tokens[-2:], made.tokens[-1]
    for _ in range(CONTRADICTIONS):
        # Before another note, or at the end: records stay whole.
        starts = [i for i, token in enumerate(body) if token == reader.NOTE]
        at = int(rng.choice([*starts, len(body)]))
        note = [reader.NOTE, key, *(int(v) for v in rng.choice(VALUES, reader.VALUE_LENGTH)), reader.END]
        body = [*body[:at], *note, *body[at:]]
    first = next(i for i in range(len(body)) if body[i : i + 2] == [reader.NOTE, key])
    value = body[first + 2 : first + 2 + reader.VALUE_LENGTH]
    return made._replace(tokens=[*body, *question], segments={}, answers={"context": value})


def _hard_enough(model: Model, rng: np.random.Generator, tried: int = 8) -> tuple[int, float]:
    """The longest text after which not too many answers are wrong, and how many are."""
    found = float("nan"), 0
    for length in LENGTHS:
        if model.max_positions and length + reader.RECORD > model.max_positions:
            continue
        made = [_one(READER[1 + i % 2], length, rng) for i in range(tried)]
        gold = [m.answers["memory" if i % 2 else "context"] for i, m in enumerate(made)]
        given = [Branches(model, Prompt.from_tokens(m.tokens)).sample(
            1, new_tokens=reader.VALUE_LENGTH, temperature=0, allowed=VALUES)[0] for m in made]
        found = float(np.mean([a != b for a, b in zip(given, gold)])), length
        if found[0] <= WRONG_AT_MOST:
            break
    if not found[1]:
        raise PromptError(f"{model.name} is too short for a list of {FACTS} facts")
    return found[1], found[0]


# -- English ------------------------------------------------------------------------------------


def _english(model: Model, count: int, rng: np.random.Generator) -> Questions:
    chat = bool(getattr(model.tokenizer, "chat_template", None))
    order = {r: [int(i) for i in 1 + rng.permutation(len(f) - 1)] for r, (_, f) in TABLES.items()}
    shown = "".join(f"Question: {text.format(entity)}\nAnswer: {answer}\n\n" for text, facts in
                    list(TABLES.values())[:3] for entity, answer in [next(iter(facts.items()))])
    chosen: list[tuple[str, int]] = []
    while len(chosen) < count and any(order.values()):
        chosen += [(relation, rest.pop()) for relation, rest in order.items() if rest]
    items = []
    for relation, number in chosen[:count]:
        template, facts = TABLES[relation]
        entity, gold = list(facts.items())[number]
        text = template.format(entity)
        prompt = model.prompt(text + BRIEF, chat=True) if chat else model.prompt(
            f"{shown}Question: {text}\nAnswer:")
        items.append(Question(prompt, text, relation, entity, gold, written(model, gold)))
    longest = max(len(q.gold_ids) for q in items)
    return Questions(
        items, "general knowledge in English", longest + 8,
        {r: () if r in NUMERIC else tuple(f.values()) for r, (_, f) in TABLES.items()},
        # What is no answer to any question of the relation is still an answer, a wrong one.
        {r: DIGITS if r in NUMERIC else r"[^\W\d_][\w'.-]*" for r in TABLES})


def written(model: Model, answer: str) -> tuple[int, ...]:
    """The tokens of an answer as the model would begin with it."""
    chat = bool(getattr(model.tokenizer, "chat_template", None))
    ids = model.tokenizer(answer if chat else f" {answer}", add_special_tokens=False)["input_ids"]
    return tuple(int(i) for i in ids)
