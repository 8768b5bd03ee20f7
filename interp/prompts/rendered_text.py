"""Text as pictures: pages of lines with every word's box, and passkeys to be read from them."""

import textwrap
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from interp.core import PromptError
from interp.prompts.image import BLACK, WHITE, Color, Rectangle, TextPicture, rendered_text

CHARACTERS, LINES = 50, 15
"""Of a page as the OCR-head paper renders them (arXiv:2505.15865)."""

FILLER = (
    "The river is slow in summer.", "A train leaves every hour.", "Bread is baked before dawn.",
    "The old bridge was painted again.", "Rain is expected in the north.",
    "Two cats sleep on the wall.", "The market opens early.", "Snow fell on the higher roads.",
    "A letter came without a name.", "The garden needs some water.",
)
"""Sentences that say nothing about numbers."""

QUESTION = "What is the pass key in the picture? Answer with the numbers only."


@dataclass(frozen=True, eq=False)
class RenderedPasskey:
    """Groups of digits hidden in rendered text.

    Example:
        >>> hidden = passkey(np.random.default_rng(0), characters=200)
        >>> len(hidden.groups) == len(hidden.places) == 3
        True

    `places` holds (page number, pixel box) for every group; `text` is what was rendered."""

    pages: tuple[TextPicture, ...]
    text: str
    groups: tuple[str, ...]
    places: tuple[tuple[int, Rectangle], ...]

    @property
    def answer(self) -> str:
        """The groups with spaces between them."""
        return " ".join(self.groups)

    @property
    def images(self) -> list[Image.Image]:
        """The pages as pictures, for `model.prompt(..., images=...)`."""
        return [page.image for page in self.pages]


def pages(
    text: str,
    characters: int = CHARACTERS,
    lines: int = LINES,
    font_size: int = 16,
    color: Color = BLACK,
    background: Color = WHITE,
    margin: int = 8,
    square: bool = False,
) -> tuple[TextPicture, ...]:
    """Wrapped text on as many pages of one size as it needs, every word with its box.

    Example:
        >>> made = pages("one two three four", characters=9, lines=1)
        >>> [[word.text for word in page.words] for page in made]
        [['one', 'two'], ['three'], ['four']]

    Args:
        characters: of a line at most. lines: of a page.
        font_size: in pixels.
        square: add empty space at the right or bottom, for processors that crop to a square.

    Raises:
        PromptError: text without words, or a word longer than a line.

    Source: arXiv:2505.15865 (50 characters, 15 lines, white background).
    """
    wrapped = [line for part in text.split("\n") for line in textwrap.wrap(
        part, characters, break_long_words=False, break_on_hyphens=False)]
    if not wrapped:
        raise PromptError("the text has no words to render.")
    longest = max(wrapped, key=len)
    if len(longest) > characters:
        raise PromptError(f"the word {longest!r} is longer than a line of {characters} characters.")
    font = ImageFont.load_default(font_size)
    pen = ImageDraw.Draw(Image.new("L", (1, 1)))
    space = pen.textlength(" ", font=font)
    width = max(sum(pen.textlength(word, font=font) + space for word in line.split())
                for line in wrapped)
    height = pen.textbbox((0, 0), "Ég|y", font=font)[3] + max(2, font_size // 4)
    size = (int(width) + 2 * margin + 2, int(height) * lines + 2 * margin)
    size = (max(size), max(size)) if square else size
    return tuple(
        rendered_text("\n".join(wrapped[first : first + lines]), size, font_size, color,
                      background, margin)
        for first in range(0, len(wrapped), lines))


def passkey(
    rng: np.random.Generator,
    characters: int = 600,
    groups: int = 3,
    depth: float = 0.5,
    font_size: int = 16,
    square: bool = False,
) -> RenderedPasskey:
    """A text of about so many characters with a key of digit groups in it, rendered on pages.

    Example:
        >>> hidden = passkey(np.random.default_rng(1), characters=300)
        >>> page, (left, top, right, bottom) = hidden.places[0]
        >>> hidden.pages[page].image.crop((left, top, right, bottom)).getextrema()[0][0] < 128
        True

    Args:
        groups: number of groups, two or three digits each, all different; each is a word with a
            box of its own.
        depth: where in the text, from 0 (first sentence) to 1 (last).
        square: see `pages`.

    Raises:
        ValueError: a depth outside [0, 1], or no groups.
    """
    if not 0 <= depth <= 1 or groups < 1:
        raise ValueError(f"depth must lie in 0 to 1 and groups be 1 or more, not {depth}, {groups}.")
    drawn = rng.choice(np.arange(10, 1000), groups, replace=False)
    key = tuple(str(number) for number in drawn)
    sentences: list[str] = []
    while sum(map(len, sentences)) < characters:
        sentences.append(FILLER[int(rng.integers(len(FILLER)))])
    sentences.insert(round(depth * len(sentences)),
                     f"Remember that {' '.join(key)} is the pass key.")
    text = " ".join(sentences)
    made = pages(text, font_size=font_size, square=square)
    boxes = {word.text: (number, word.box) for number, page in enumerate(made)
             for word in page.words}
    return RenderedPasskey(made, text, key, tuple(boxes[group] for group in key))


def word_of_token(pieces: Sequence[str], words: Sequence[str]) -> tuple[int, ...]:
    """Which word each token of an answer belongs to, from the tokens' printed pieces.

    Example:
        >>> word_of_token(["4", "8", " ", "91", "5"], ["48", "915"])
        (0, 0, 1, 1, 1)

    White space belongs to the word that follows it (to the last one at the end).

    Raises:
        PromptError: pieces that do not spell the words.
    """
    spelled = "".join("".join(pieces).split())
    if spelled != "".join(words):
        raise PromptError(f"the tokens spell {spelled!r}, not {''.join(words)!r}.")
    ends = np.cumsum([len(word) for word in words])
    found, at = [], 0
    for piece in pieces:
        found.append(int(min(np.searchsorted(ends, at, "right"), len(words) - 1)))
        at += len("".join(piece.split()))
    return tuple(found)
