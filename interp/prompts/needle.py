"""Needle in a haystack: a fact at a chosen depth of a long text, and the question that needs it.

Paper     arXiv:2404.15574 (grid of lengths and depths; the answer's own tokens are the needle)

Segments come from the tokenizer's character offsets, never from a search for equal tokens:
"needle" is the inserted sentence, "needle_value" the words of it that answer, "question" what is
asked, "fact_1", "fact_2", ... further inserted facts that nobody asks for.
"""

import re
import unicodedata
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Optional, SupportsFloat, SupportsIndex, Union

import numpy as np

from interp.core import Prompt, PromptError, SegmentNotFound

TEMPLATE = "{context}\n\nQuestion: {question}\nAnswer:"
"""Context and question; the continuation should be the answer."""

_PIECES = re.compile(r"\s*\S{1,16}")
_END = re.compile(r"[.!?。！？]['\"”’)\]]*\s*$")


@dataclass(frozen=True)
class Fact:
    """A sentence to hide, the words of it that answer, and the question.

    Example:
        >>> Fact("The parcel for Ida weighs nine pounds.", "nine pounds", "What does it weigh?")
        Fact(sentence='The parcel for Ida weighs nine pounds.', value='nine pounds', \
question='What does it weigh?')

    Raises `PromptError` if the sentence does not hold the value exactly once.
    """

    sentence: str
    value: str
    question: str

    def __post_init__(self) -> None:
        for name in ("sentence", "value", "question"):
            if not getattr(self, name).strip():
                raise PromptError(f"the {name} of a fact is empty; give some words.")
        count = self.sentence.count(self.value)
        if count != 1:
            raise PromptError(
                f"the sentence {self.sentence!r:.80} holds the value {self.value!r:.40} {count} "
                "times; it must hold it once."
            )


@dataclass(frozen=True)
class Needle:
    """A finished prompt and what should follow it.

    Attributes:
        prompt: with the segments "needle", "needle_value" and "question".
        answer: the token ids of the value as they stand in the prompt.
        length, depth: what was asked for, in tokens and as a share of the context.
    """

    prompt: Prompt
    answer: tuple[int, ...]
    length: int
    depth: float


PLACES = ("harbor", "mill", "orchard", "station", "library", "bakery", "lighthouse", "school")
NAMES = ("Ida", "Tomas", "Wren", "Oskar", "Nadia", "Felix", "Greta", "Hugo", "Mina", "Pavel")
THINGS = ("parcel", "trunk", "lantern", "ledger", "violin", "basket", "clock", "kettle")
COLORS = ("amber", "violet", "silver", "crimson", "olive", "copper", "ivory", "teal")
ANIMALS = ("otter", "falcon", "badger", "heron", "lynx", "beetle", "salmon", "raven")


def facts(rng: np.random.Generator, n: int) -> list[Fact]:
    """Invented facts that no model can know: pass phrases of three words, all different.

    Example:
        >>> made = facts(np.random.default_rng(0), 3)
        >>> len({fact.value for fact in made}), all(fact.value in fact.sentence for fact in made)
        (3, True)

    Raises `PromptError` for more facts than there are (80 owners).
    """
    owners = [(name, thing) for name in NAMES for thing in THINGS]
    if not 1 <= n <= len(owners):
        raise PromptError(f"{n} invented facts cannot be made; ask for 1 to {len(owners)}.")
    phrases = [(c, a, p) for c in COLORS for a in ANIMALS for p in PLACES]
    chosen = rng.choice(len(owners), n, replace=False)
    spoken = rng.choice(len(phrases), n, replace=False)
    made = []
    for owner, phrase in zip(chosen, spoken):
        name, thing = owners[int(owner)]
        value = " ".join(phrases[int(phrase)])
        made.append(Fact(
            f"The pass phrase for the {thing} of {name} is {value}.", value,
            f"What is the pass phrase for the {thing} of {name}?",
        ))
    return made


def haystack(rng: np.random.Generator, words: SupportsIndex) -> str:
    """Plain invented sentences, at least `words` words, different at every call.

    Example:
        >>> text = haystack(np.random.default_rng(0), 50)
        >>> len(text.split()) >= 50, text.endswith(".")
        (True, True)
    """
    moments = ("In the morning", "By noon", "After supper", "Late in the week", "Every winter")
    doings = ("swept the floor", "counted the boats", "lit the lamps", "mended the roof",
              "carried letters", "sold apples", "rang the bell", "painted the door")
    manners = ("quietly", "slowly", "with great care", "without a word", "as usual")
    made: list[str] = []
    count = 0
    while count < int(words):
        when, done, how = rng.choice(moments), rng.choice(doings), rng.choice(manners)
        a, b = rng.choice(PLACES, 2, replace=False)
        made.append(str(rng.choice((
            f"{when} the people of the {a} {done} {how}.",
            f"{when} somebody walked from the {a} to the {b} and {done}.",
            f"Nobody at the {a} asked who had {done} {how} at the {b}.",
            f"The road from the {a} to the {b} was empty, and the neighbors {done} {how}.",
        ))))
        count += len(made[-1].split())
    return " ".join(made)


def build(
    model: Any,
    asked: Fact,
    length: SupportsIndex,
    depth: SupportsFloat,
    *,
    text: Optional[str] = None,
    others: Sequence[Fact] = (),
    template: str = TEMPLATE,
    chat: bool = False,
    rng: Optional[np.random.Generator] = None,
) -> Needle:
    """One prompt of at most `length` tokens with the asked fact at `depth` of its context.

    Example:
        >>> import interp
        >>> from interp.prompts.needle import Fact, build
        >>> model = interp.open_model("reader")
        >>> fact = Fact("note amber seven ten two ;", "seven ten two", "recall amber")
        >>> text = "river stone the river cloud garden lamp road " * 20
        >>> made = build(model, fact, 64, 0.5, text=text, template="{context} {question}")
        >>> len(made.prompt) <= 64, model.tokenizer.decode(list(made.answer))
        (True, 'seven ten two')

    Args:
        model: has `tokenizer`, `name` and `prompt(text, chat=, segments=)`; a `Model` does.
        length: of the whole prompt, in tokens of this model; the context is cut after a word, so
            that the prompt is this long or a few tokens shorter.
        depth: 0 puts the fact before the context, 1 behind it; between, at the nearest end of a
            sentence (of a word, in a text without sentences).
        text: the haystack; invented sentences if None. It is used from its beginning, once.
        others: facts that nobody asks for, spread evenly over the context.
        template: with {context} and {question}, once each.
        chat: whether the prompt is one user message in the model's chat template.
        rng: for the invented haystack (seed 0 if None).

    Raises:
        PromptError: it does not fit, the text is too short for the length, or the tokenizer
            does not keep the value apart from the text around it.
    """
    n_tokens, share = int(length), float(depth)
    if not 0 <= share <= 1:
        raise PromptError(f"a depth of {share} is outside the context; give 0 (start) to 1 (end).")
    if template.count("{context}") != 1 or template.count("{question}") != 1:
        raise PromptError("the template needs {context} and {question}, once each.")
    if model.tokenizer is None:
        raise PromptError(f"{model.name} has no tokenizer, so no needle can be written for it.")
    given = text is not None
    source = text if text is not None else haystack(
        rng if rng is not None else np.random.default_rng(0), n_tokens)
    pieces = _PIECES.findall(source)

    def made(count: int) -> Prompt:
        return _assemble(model, asked, others, pieces[:count], share, template, chat)

    least = len(made(0))
    if least > n_tokens:
        raise PromptError(
            f"a needle prompt of {n_tokens} tokens has no room: fact, question and template alone "
            f"take {least} tokens of {model.name}."
        )
    # The most pieces that fit. A prompt a model refuses as too long does not fit either.
    low, high = 0, min(len(pieces), 2 * n_tokens)
    while low < high:
        middle = (low + high + 1) // 2
        if _size(made, middle) <= n_tokens:
            low = middle
        else:
            high = middle - 1
    prompt = made(low)
    if given and low == len(pieces) and len(prompt) < n_tokens - 16:
        raise PromptError(
            f"the haystack gives a prompt of {len(prompt)} tokens, but {n_tokens} are asked for; "
            "give a longer text or a smaller length."
        )
    answer = tuple(prompt.ids[p] for p in prompt.segment("needle_value"))
    return Needle(prompt, answer, n_tokens, share)


def grid(
    model: Any,
    lengths: Sequence[SupportsIndex],
    depths: Sequence[SupportsFloat],
    rng: np.random.Generator,
    *,
    each: int = 1,
    given: Optional[Sequence[Fact]] = None,
    n_others: int = 0,
    **more: Any,
) -> list[Needle]:
    """Prompts over lengths x depths, `each` times, every one with facts and a haystack of its own.

    Example:
        >>> import interp
        >>> model = interp.open_model("reader")
        >>> fact = Fact("note amber seven ten two ;", "seven ten two", "recall amber")
        >>> made = grid(model, (48, 64), (0, 0.5, 1), np.random.default_rng(0), given=[fact],
        ...             text="river stone cloud " * 30, template="{context} {question}")
        >>> len(made), sorted({needle.length for needle in made})
        (6, [48, 64])

    Args:
        given: facts to ask for, in turn; invented ones if None.
        n_others: invented facts beside the asked one.
        more: of `build`.
    """
    needles = []
    for length in lengths:
        for depth in depths:
            for _ in range(each):
                invented = facts(rng, 1 + n_others)
                asked = invented[0] if given is None else given[len(needles) % len(given)]
                needles.append(build(model, asked, length, depth, rng=rng,
                                     others=invented[1:], **more))
    return needles


def synthetic(
    make: Callable[..., Any],
    lengths: Sequence[SupportsIndex],
    depths: Sequence[SupportsFloat],
    rng: np.random.Generator,
    *,
    each: int = 1,
    **more: Any,
) -> list[Needle]:
    """The same grid in the language of a bundled model: `make` is `interp.organisms.reader.needle`.

    Example:
        >>> from interp.organisms import reader
        >>> made = synthetic(reader.needle, (48, 64), (0, 1), np.random.default_rng(0))
        >>> [len(one.prompt) for one in made], len(made[0].answer)
        ([48, 48, 64, 64], 3)

    Args:
        make: (length, depth, rng, **more) -> tokens, segments, and answers by source, of which
            "context" stands in the needle.
    """
    needles = []
    for length in lengths:
        for depth in depths:
            for _ in range(each):
                one = make(int(length), float(depth), rng, **more)
                prompt = Prompt.from_tokens(one.tokens, dict(one.segments))
                answer = tuple(int(token) for token in one.answers["context"])
                needles.append(Needle(prompt, answer, int(length), float(depth)))
    return needles


def depth_of(prompt: Prompt) -> float:
    """Where the needle really stands: tokens before it over all tokens but its own and later ones
    of the question.

    Example:
        >>> depth_of(Prompt.from_tokens(range(10), {"needle": (2, 4), "question": (8, 10)}))
        0.3333333333333333
    """
    needle, question = prompt.segment("needle"), prompt.segment("question")
    room = question.start - len(needle)
    return needle.start / room if room > 0 else 0.0


def _size(made: Callable[[int], Prompt], count: int) -> Union[int, float]:
    try:
        return len(made(count))
    except PromptError as error:
        # Only what the model says about its own length; other faults are the caller's to see.
        if "reads at most" in str(error):
            return float("inf")
        raise


def _assemble(
    model: Any, asked: Fact, others: Sequence[Fact], pieces: Sequence[str], depth: float,
    template: str, chat: bool,
) -> Prompt:
    """The prompt with these pieces of haystack, its facts put in and marked."""
    stops = _stops(pieces)
    places = [(_nearest(stops, depth * len(pieces)), -1)]
    for number in range(len(others)):
        # Never at the asked fact's own depth by construction: evenly spread, half a step in.
        at = (number + 0.5) / len(others) * len(pieces)
        places.append((_nearest(stops, at), number))
    context, start, starts = "", 0, {}
    for place, number in sorted(places):
        fact = asked if number < 0 else others[number]
        context = _joined(context, "".join(pieces[start:place]))
        start = place
        context = _joined(context, fact.sentence)
        starts[number] = len(context) - len(fact.sentence)
    context = _joined(context, "".join(pieces[start:]))
    before = template.partition("{context}")[0].replace("{question}", asked.question)
    source = template.replace("{question}", asked.question).replace("{context}", context)

    def marked(text: str, at: int) -> tuple[str, int]:
        """The text, and which of its occurrences stands at `at` of the source."""
        return text, sum(1 for i in _occurrences(source, text) if i < at)

    begin = len(before) + starts[-1]
    segments: dict[str, Any] = {
        "needle": marked(asked.sentence, begin),
        "needle_value": marked(asked.value, begin + asked.sentence.index(asked.value)),
        "question": marked(asked.question, _question_at(template, asked, context)),
    }
    for number, fact in enumerate(others):
        segments[f"fact_{number + 1}"] = marked(fact.sentence, len(before) + starts[number])
    try:
        prompt = model.prompt(source, chat=chat, segments=segments)
    except SegmentNotFound as error:
        raise PromptError(
            f"the tokenizer of {model.name} lost the needle {asked.value!r:.40}: {error}"
        ) from error
    _check_value(model, prompt, asked)
    return prompt


def _question_at(template: str, asked: Fact, context: str) -> int:
    first = template.partition("{question}")[0]
    return len(first.replace("{context}", context))


def _occurrences(source: str, text: str) -> Iterable[int]:
    at = source.find(text)
    while at >= 0:
        yield at
        at = source.find(text, at + 1)


def _joined(left: str, right: str) -> str:
    """Two stretches of text with one space between them, where both have words."""
    if not right.strip():
        return left
    return f"{left.rstrip()} {right.strip()}" if left.strip() else right.strip()


def _stops(pieces: Sequence[str]) -> list[int]:
    """Numbers of pieces after which a sentence ends; every word's end where there is none."""
    ends = [i + 1 for i, piece in enumerate(pieces)
            if _END.search(piece) and (i + 1 == len(pieces) or pieces[i + 1][:1].isspace())]
    if not ends:
        ends = [i for i in range(1, len(pieces)) if pieces[i][:1].isspace()]
    return sorted({0, *ends, len(pieces)})


def _nearest(stops: Sequence[int], at: float) -> int:
    return min(stops, key=lambda stop: (abs(stop - at), stop))


def _check_value(model: Any, prompt: Prompt, asked: Fact) -> None:
    """Refuse a value whose tokens are unknown, torn apart, or shared with the text around it."""
    places = prompt.segment("needle_value").positions
    ids = [prompt.ids[p] for p in places]
    unknown = getattr(model.tokenizer, "unk_token_id", None)
    if unknown is not None and unknown in ids:
        raise PromptError(
            f"the tokenizer of {model.name} does not know every word of the value "
            f"{asked.value!r:.40}; choose words of its vocabulary."
        )
    spoken = _plain(model.tokenizer.decode(ids, skip_special_tokens=True))
    if places != tuple(range(places[0], places[-1] + 1)) or spoken != _plain(asked.value):
        raise PromptError(
            f"the tokenizer of {model.name} does not keep the value {asked.value!r:.40} apart: its "
            f"tokens read {spoken!r:.60}; put spaces around the value, or choose another."
        )


def _plain(text: str) -> str:
    """Text without what tokenizers change: case, spaces and compatibility forms."""
    folded = unicodedata.normalize("NFKC", text).casefold()
    kept = unicodedata.normalize("NFD", folded)
    return "".join(c for c in kept if not c.isspace() and not unicodedata.combining(c))
