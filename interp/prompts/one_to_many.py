"""Questions with many right answers ("three cities in France"), and what a model lists after them."""

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, SupportsIndex

from interp.core import Prompt, PromptError

CITIES = {
    "France": ("Paris", "Lyon", "Marseille", "Nice", "Toulouse", "Bordeaux", "Lille", "Nantes"),
    "Germany": ("Berlin", "Munich", "Hamburg", "Cologne", "Frankfurt", "Stuttgart", "Dresden"),
    "Italy": ("Rome", "Milan", "Naples", "Florence", "Venice", "Turin", "Bologna", "Genoa"),
    "Spain": ("Madrid", "Barcelona", "Valencia", "Seville", "Bilbao", "Granada", "Malaga"),
    "Japan": ("Tokyo", "Osaka", "Kyoto", "Nagoya", "Sapporo", "Yokohama", "Kobe", "Hiroshima"),
    "China": ("Beijing", "Shanghai", "Guangzhou", "Shenzhen", "Chengdu", "Wuhan", "Hangzhou"),
    "India": ("Mumbai", "Delhi", "Bangalore", "Chennai", "Kolkata", "Hyderabad", "Pune", "Jaipur"),
    "Canada": ("Toronto", "Vancouver", "Montreal", "Ottawa", "Calgary", "Edmonton", "Winnipeg"),
    "Australia": ("Sydney", "Melbourne", "Brisbane", "Perth", "Adelaide", "Canberra", "Darwin"),
    "Russia": ("Moscow", "Saint Petersburg", "Kazan", "Sochi", "Vladivostok", "Novosibirsk"),
    "Poland": ("Warsaw", "Krakow", "Gdansk", "Wroclaw", "Poznan", "Lodz", "Lublin"),
    "Brazil": ("Rio", "Brasilia", "Salvador", "Fortaleza", "Recife", "Curitiba", "Manaus"),
    "Turkey": ("Istanbul", "Ankara", "Izmir", "Antalya", "Bursa", "Adana", "Konya"),
    "Egypt": ("Cairo", "Alexandria", "Giza", "Luxor", "Aswan", "Suez"),
    "Portugal": ("Lisbon", "Porto", "Braga", "Coimbra", "Faro", "Evora"),
    "Switzerland": ("Zurich", "Geneva", "Basel", "Bern", "Lausanne", "Lucerne"),
}
"""Country -> well-known cities, those in the front more so."""

TEMPLATES = ("Three cities in {subject}:", "A list of three cities in {subject}:",
             "Three well-known cities in {subject}, separated by commas:")
CHAT = "Name three cities in {subject}, separated by commas. Reply with the cities only."


@dataclass(frozen=True)
class Listed:
    """A question, and the first answers of the list that a model gave to it.

    `steps[k]` is the prompt right before answer k + 1, with segments "subject", "answer 1", ... for
    what stands in it; `answers` are the first tokens of the answers, `subject_token` that of the
    subject, `group` what was asked for.
    """

    group: str
    steps: tuple[Prompt, ...]
    answers: tuple[int, ...]
    subject_token: int


def stepwise(
    group: str, prompt: Prompt, given: Sequence[SupportsIndex],
    spans: Sequence[tuple[int, int]],
) -> Listed:
    """A prompt with the segment "subject", the tokens given after it, and where answers are in them.

    Example:
        >>> question = Prompt.from_tokens([5, 6, 7], {"subject": (1, 2)})
        >>> made = stepwise("six", question, [20, 9, 21, 22], [(0, 1), (2, 4)])
        >>> made.answers, made.steps[1].ids, made.steps[1].positions("answer 1")
        ((20, 21), (5, 6, 7, 20, 9), (3,))
    """
    ids, n = [int(token) for token in given], len(prompt)
    subject = prompt.positions("subject")
    steps = []
    for step, (start, _) in enumerate(spans):
        segments: dict[str, Any] = {"subject": list(subject)}
        for number, (a, b) in enumerate(spans[:step]):
            segments[f"answer {number + 1}"] = list(range(n + a, n + b))
        steps.append(Prompt.from_tokens([*prompt.ids, *ids[:start]], segments))
    return Listed(group, tuple(steps), tuple(ids[start] for start, _ in spans),
                  prompt.ids[subject[0]])


def find(tokenizer: Any, ids: Sequence[SupportsIndex], known: Iterable[str]) -> list[tuple[int, int]]:
    """Token spans (start, stop) of the first mention of every known answer, in their order.

    The text is decoded from the front, token by token, so that any tokenizer will do.
    """
    names = sorted(known, key=len, reverse=True)
    tokens = [int(token) for token in ids]

    def text(stop: int) -> str:
        return tokenizer.decode(tokens[:stop], clean_up_tokenization_spaces=False)

    ends = [len(text(stop)) for stop in range(len(tokens) + 1)]
    pattern = re.compile(r"(?<!\w)(" + "|".join(map(re.escape, names)) + r")(?!\w)", re.IGNORECASE)
    found: dict[str, tuple[int, int]] = {}
    for match in pattern.finditer(text(len(tokens))):
        start = max(i for i in range(len(tokens)) if ends[i] <= match.start())
        stop = min(i for i in range(1, len(tokens) + 1) if ends[i] >= match.end())
        found.setdefault(match[1].lower(), (start, stop))
    return sorted(found.values())


def listed(
    model: Any, subjects: Iterable[str] = tuple(CITIES), *, count: int = 3, new_tokens: int = 24
) -> list[Listed]:
    """What a model lists for every subject and template; only lists of `count` right answers.

    Lists whose answers begin with the same token, or with the subject's, are left out.

    Raises:
        PromptError: a model without a tokenizer, or an encoder.
    """
    if model.kind != "decoder":
        raise PromptError(f"{model.name} is an encoder: it lists nothing")
    if model.tokenizer is None:
        raise PromptError(f"{model.name} has no tokenizer, so it cannot be asked for a list")
    chat = bool(getattr(model.tokenizer, "chat_template", None))
    templates = (CHAT,) if chat else TEMPLATES
    subjects = list(subjects)
    asked = [(subject, model.prompt(template.format(subject=subject), chat=chat,
                                    segments={"subject": (subject, -1)}))
             for template in templates for subject in subjects]
    made = model.generate([prompt for _, prompt in asked], new_tokens, batch_size=16)
    found = []
    for (subject, prompt), ids in zip(asked, made):
        spans = find(model.tokenizer, ids, CITIES[subject])[:count] if ids else []
        if len(spans) < count:
            continue
        one = stepwise(subject, prompt, ids, spans)
        if len({*one.answers, one.subject_token}) == count + 1:
            found.append(one)
    return found
