"""Chat templates: rendering messages, and finding in the result what a person typed.

A template may trim texts, add a system prompt of its own, or contain the same words as a message.
So it is rendered a second time with a marker in place of every text: what lies between the markers
is the template's own, and the real rendering must be those pieces with the texts between them.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Optional

from jinja2 import TemplateError

from interp.core import PromptError

Span = tuple[int, int]
Message = dict[str, Any]
Render = Callable[[list[Message], bool], str]
"""(messages, add the assistant's header) -> text"""

_MARKER = re.compile("\ue000(\\d+)\ue001")


@dataclass(frozen=True)
class Typed:
    """A stretch of the rendered text that came from a message."""

    start: int
    stop: int
    role: str
    message: int


@dataclass(frozen=True)
class Rendered:
    """A rendered conversation: its text, the typed stretches, and two of the template's own.

    `header` is what stands between the last message and the answer; `system` is the system prompt
    that the template adds when the conversation has none.
    """

    text: str
    typed: tuple[Typed, ...]
    header: Optional[Span] = None
    system: Optional[Span] = None


def as_messages(given: Any) -> tuple[list[Message], list[Any]]:
    """Messages with content as a list of parts, and the pictures that parts carry (or None).

    Example:
        >>> as_messages("hi")
        ([{'role': 'user', 'content': [{'type': 'text', 'text': 'hi'}]}], [])

    Accepts a string (one user message) or messages {"role", "content"} whose content is a string
    or a list of {"type": "text", "text": ...} and {"type": "image"}; an image part may bring its
    picture under "image", "path" or "url". Raises `PromptError`.
    """
    if isinstance(given, str):
        given = [{"role": "user", "content": given}]
    if not isinstance(given, Sequence) or not given:
        raise PromptError(
            "the conversation is empty: give a string or at least one message like "
            "{'role': 'user', 'content': '...'}."
        )
    messages: list[Message] = []
    pictures: list[Any] = []
    for number, message in enumerate(given):
        if not isinstance(message, Mapping) or not {"role", "content"} <= set(message):
            raise PromptError(
                f"message {number} is {message!r:.80}; write it like "
                "{'role': 'user', 'content': '...'}."
            )
        content, parts = message["content"], []
        for part in [{"type": "text", "text": content}] if isinstance(content, str) else content:
            kind = part.get("type") if isinstance(part, Mapping) else None
            if kind == "text" and isinstance(part.get("text"), str):
                parts.append({"type": "text", "text": part["text"]})
            elif kind in ("image", "image_url"):
                own = [part[key] for key in ("image", "path", "url") if part.get(key) is not None]
                pictures.append(own[0] if own else None)
                parts.append({"type": "image"})
            else:
                raise PromptError(
                    f"message {number} has the part {part!r:.80}, but only "
                    "{'type': 'text', 'text': '...'} and {'type': 'image'} are understood."
                )
        messages.append({**message, "content": parts})
    return messages, pictures


def with_pictures(messages: list[Message], count: int) -> list[Message]:
    """A copy with `count` image parts before the text of the first user message."""
    for number, message in enumerate(messages):
        if message["role"] == "user":
            content = [{"type": "image"}] * count + message["content"]
            changed = {**message, "content": content}
            return messages[:number] + [changed] + messages[number + 1 :]
    raise PromptError("there is no user message to put the images in; add one.")


def _texts(messages: list[Message]) -> list[tuple[int, str, str]]:
    """(message number, role, text) of every text that is not empty."""
    return [
        (number, message["role"], part["text"])
        for number, message in enumerate(messages)
        for part in message["content"]
        if part["type"] == "text" and part["text"].strip()
    ]


def _marked(messages: list[Message]) -> list[Message]:
    number = -1
    marked = []
    for message in messages:
        parts = []
        for part in message["content"]:
            if part["type"] == "text" and part["text"].strip():
                number += 1
                part = {"type": "text", "text": f"\ue000{number}\ue001"}
            parts.append(part)
        marked.append({**message, "content": parts})
    return marked


def _as_strings(messages: list[Message], image: str) -> list[Message]:
    """Content as one string, for templates that know no parts."""
    return [
        {**message, "content": "".join(
            part["text"] if part["type"] == "text" else image for part in message["content"]
        )}
        for message in messages
    ]


def _between(text: str, count: int) -> Optional[list[str]]:
    """What stands between the markers 0, ..., count - 1; None if they are not all there once."""
    pieces = _MARKER.split(text)
    if pieces[1::2] != [str(number) for number in range(count)]:
        return None
    return pieces[0::2]


def _places(text: str, between: list[str], texts: list[str]) -> Optional[list[Span]]:
    """Where the texts stand between the template's own pieces, as written or trimmed."""
    if not text.startswith(between[0]):
        return None
    at, found = len(between[0]), []
    for own, after in zip(texts, between[1:]):
        for form in (own, own.strip(), own.lstrip(), own.rstrip()):
            if text.startswith(form + after, at):
                found.append((at, at + len(form)))
                at += len(form) + len(after)
                break
        else:
            return None
    return found if at == len(text) else None


def _search(text: str, texts: list[str], name: str) -> list[Optional[Span]]:
    """The texts one after another, for templates that treat texts by their content."""
    at, found = 0, []
    for number, own in enumerate(texts):
        start = text.find(own.strip(), at)
        if start < 0:
            if number == len(texts) - 1:
                raise PromptError(
                    f"the chat template of {name} changed or dropped the last message, so its "
                    "tokens cannot be found; render the text yourself and pass it without chat."
                )
            found.append(None)
            continue
        found.append((start, start + len(own.strip())))
        at = start + len(own.strip())
    return found


def render(messages: list[Message], template: Render, image: str, name: str) -> Rendered:
    """Apply a chat template and say where every text, the header and a default system prompt are.

    `image` is what stands for a picture where the template only takes strings; `name` is the
    model's, for messages. Raises `PromptError` where the template refuses the messages or drops
    the last of them.
    """
    texts = [text for _, _, text in _texts(messages)]

    def probe(given: list[Message], as_strings: bool) -> Optional[list[str]]:
        marked, count = _marked(given), len(_texts(given))
        try:
            out = template(_as_strings(marked, image) if as_strings else marked, True)
        except (TemplateError, TypeError, ValueError, KeyError, AttributeError):
            return None
        # A template for strings prints lists of parts as Python or JSON.
        if re.search("['\"]text['\"]: *['\"]\ue000", out) or "'type': 'image'" in out:
            return None
        return _between(out, count)

    has_parts = any(part["type"] == "image" for m in messages for part in m["content"])
    forms = (False, True) if has_parts or _needs_parts(template) else (True, False)
    as_strings, between = forms[0], None
    for form in forms:
        between = probe(messages, form)
        if between is not None:
            as_strings = form
            break
    given = _as_strings(messages, image) if as_strings else messages
    try:
        text = template(given, True)
    except (TemplateError, TypeError, ValueError, KeyError, AttributeError) as error:
        raise PromptError(
            f"the chat template of {name} refused the messages: {str(error) or repr(error)}."
        ) from None
    places: Optional[list[Any]] = _places(text, between, texts) if between else None
    if places is None:
        places = _search(text, texts, name)
    typed = tuple(
        Typed(*place, role=role, message=number)
        for place, (number, role, _) in zip(places, _texts(messages)) if place is not None
    )
    system = None
    if between is not None and all(message["role"] != "system" for message in messages):
        first = [{"role": "system", "content": [{"type": "text", "text": "."}]}]
        system = _default_system(between, probe(first + messages, as_strings))
    return Rendered(text, typed, _header(template, given, text, typed), system)


def _needs_parts(template: Render) -> bool:
    """Whether a template drops content that is a plain string."""
    try:
        return "\ue000" not in template([{"role": "user", "content": "\ue000"}], True)
    except (TemplateError, TypeError, ValueError, KeyError, AttributeError):
        return False


def _header(
    template: Render, given: list[Message], text: str, typed: tuple[Typed, ...]
) -> Optional[Span]:
    try:
        without = template(given, False)
    except (TemplateError, TypeError, ValueError, KeyError, AttributeError):
        without = text
    start = len(without) if text.startswith(without) else len(text)
    if start == len(text) and typed:  # no header of its own: what closes the user's turn
        rest = text[typed[-1].stop :]
        start = len(text) - len(rest.lstrip())
    return (start, len(text)) if text[start:].strip() else None


def _default_system(between: list[str], explicit: Optional[list[str]]) -> Optional[Span]:
    """The template's own system prompt: what an explicit one would replace."""
    if explicit is None or len(explicit) < 2:
        return None
    before, after = explicit[0], explicit[1]
    own = between[0]
    start, stop = len(before), len(own) - len(after)
    if not (own.startswith(before) and own.endswith(after) and start < stop):
        return None
    return (start, stop) if own[start:stop].strip() else None
