"""Tokens as they stand in the text, colored by a score, with special tokens readable."""

from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Any, NamedTuple, Optional

import numpy as np
import xarray as xr
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize
from matplotlib.font_manager import FontProperties, findfont, get_font
from matplotlib.patches import Patch, Rectangle

from interp.figures.style import DIVERGING, UNDER_TEXT, Real, color, style

FONT, POINTS, ADVANCE = "DejaVu Sans Mono", 7.0, 0.602
"""The font of the tokens, its size, and the width of a character relative to its size."""

LINE = 0.26
"""Inches from one line of tokens to the next."""

VISIBLE = {"Ġ": "·", "▁": "·", " ": "·", "Ċ": "⏎", "\n": "⏎", "ĉ": "⇥", "\t": "⇥", "\r": "␍"}


@lru_cache(maxsize=1)
def _glyphs() -> frozenset[int]:
    return frozenset(get_font(findfont(FontProperties(family=FONT))).get_charmap())


def readable(token: str, most: int = 18) -> str:
    """A token as it can be printed: spaces and line ends visible, long ones shortened.

    A character that the font lacks is written as its code point.

    Example:
        >>> readable("Ġsink"), readable("▁\\n"), readable(""), readable("水")
        ('·sink', '·⏎', '∅', 'u6c34')
        >>> readable("<|start_header_id|>", most=12)
        '<|star…r_id|>'
    """
    text = "".join(VISIBLE.get(character, character) for character in token)
    text = "".join(
        character if ord(character) in _glyphs() else f"u{ord(character):04x}"
        for character in text
    )
    if len(text) > most:
        text = text[: most // 2] + "…" + text[-(most - most // 2):]
        text = text[:most + 1]
    return text or "∅"


class Box(NamedTuple):
    """One box of the strip: positions start to stop - 1, drawn on a line from a column on."""

    start: int
    stop: int
    text: str
    line: int
    column: float
    width: float


def layout(tokens: Sequence[str], per_line: int = 90, collapse: int = 8) -> list[Box]:
    """Where every token goes when lines hold `per_line` characters.

    A run of at least `collapse` equal tokens (an image's placeholders) becomes one box.

    Example:
        >>> [(box.text, box.line) for box in layout(["a", "b"] + ["<image>"] * 9, per_line=12)]
        [('a', 0), ('b', 0), ('<image> × 9', 1)]
    """
    boxes: list[Box] = []
    line, column, start = 0, 0.0, 0
    while start < len(tokens):
        stop = start + 1
        while stop < len(tokens) and tokens[stop] == tokens[start]:
            stop += 1
        text = readable(tokens[start])
        if stop - start >= max(2, collapse):
            text = f"{text} × {stop - start}"
        else:
            stop = start + 1
        width = len(text) + 0.8
        if column and column + width > per_line:
            line, column = line + 1, 0.0
        boxes.append(Box(start, stop, text, line, column, width))
        column += width + 0.25
        start = stop
    return boxes


def height(tokens: Sequence[str], width: Real, collapse: int = 8) -> float:
    """Inches a figure `width` inches wide should be high to hold these tokens.

    Example:
        >>> height(["token"] * 5, width=7.2) < height(["a", "b"] * 300, width=7.2)
        True
    """
    lines = layout(tokens, _per_line(width * 0.775), collapse)[-1].line + 1 if tokens else 1
    return 0.45 + LINE * lines


def _per_line(inches: float) -> int:
    return max(20, int(inches * 72 / (POINTS * ADVANCE)))


@style()
def draw(
    ax: Axes,
    tokens: Sequence[str],
    scores: Any,
    *,
    label: str,
    mark: Optional[Mapping[int, str]] = None,
    limits: Optional[tuple[Real, Real]] = None,
    collapse: int = 8,
    first: int = 0,
    bar: bool = True,
) -> Axes:
    """Draw tokens in reading order, each on the color of its score.

    Example:
        >>> from interp.figures.style import PAGE, canvas
        >>> words = ["<s>", "▁The", "▁cat", "▁sat", "."]
        >>> figure, ax = canvas(width=PAGE, height=height(words, PAGE))
        >>> ax = draw(ax, words, [0.9, 0.1, 0.0, 0.0, 0.3], label="attention received",
        ...           mark={0: "primary", 4: "secondary"})
        >>> [text.get_text() for text in ax.texts if text.get_fontsize() > 6]
        ['<s>', '·The', '·cat', '·sat', '.']

    Args:
        tokens: printable tokens, one per position.
        scores: one number per token; NaN leaves the box white.
        label: what the color says, with its unit.
        mark: position -> role (see `style.COLORS`): outlined, with its position below.
        limits: values of the first and last color.
        collapse: runs of that many equal tokens become one box, with the largest score.
        first: the position of the first token, where the strip is a part of a prompt.

    Raises:
        ValueError: no tokens, scores of another length, or a mark outside the strip.
    """
    values = np.asarray(scores.values if isinstance(scores, xr.DataArray) else scores, float)
    if not len(tokens) or values.shape != (len(tokens),):
        raise ValueError(
            f"{len(tokens)} tokens and scores of the shape {values.shape}: give one score for "
            "every token, and at least one token."
        )
    mark = dict(mark or {})
    for position in mark:
        if not first <= position < first + len(tokens):
            raise ValueError(
                f"position {position} cannot be marked: the strip shows {first} to "
                f"{first + len(tokens) - 1}."
            )
    known = values[np.isfinite(values)]
    low, high = limits or (
        (float(known.min()), float(known.max())) if known.size else (0.0, 1.0)
    )
    signed = limits is None and low < 0 < high
    if signed:
        low, high = -max(-low, high), max(-low, high)
    colors = ScalarMappable(
        Normalize(low, high if high > low else low + 1.0), DIVERGING if signed else UNDER_TEXT
    )

    per_line = _per_line(ax.bbox.width / ax.figure.dpi)
    boxes = layout(tokens, per_line, collapse)
    for box in boxes:
        part = values[box.start:box.stop]
        known = part[np.isfinite(part)]
        face = colors.to_rgba(known.max()) if known.size else (1.0, 1.0, 1.0, 1.0)
        marked = [p for p in range(box.start + first, box.stop + first) if p in mark]
        edge = color(mark[marked[0]]) if marked else "#DDDDDD"
        patch = Rectangle((box.column, box.line), box.width, 0.72, facecolor=face,
                          edgecolor=edge, linewidth=1.6 if marked else 0.3)
        patch.set_gid(f"token {box.start + first}")
        ax.add_patch(patch)
        bright = 0.299 * face[0] + 0.587 * face[1] + 0.114 * face[2]
        ax.text(box.column + box.width / 2, box.line + 0.37, box.text, ha="center",
                va="center", family=FONT, fontsize=POINTS, parse_math=False,
                weight="bold" if special(tokens[box.start]) else "normal",
                color="black" if bright > 0.5 else "white")
        if marked:
            numbers = ", ".join(map(str, marked[:4])) + (", …" if len(marked) > 4 else "")
            ax.text(box.column + box.width / 2, box.line + 0.75, numbers, ha="center", va="top",
                    fontsize=5.5, color=edge)
    ax.set_xlim(-0.5, per_line)
    ax.set_ylim(boxes[-1].line + 1.05, -0.1)
    ax.set_axis_off()
    if mark:
        roles = dict.fromkeys(mark[position] for position in sorted(mark))
        ax.legend(
            handles=[Patch(fill=False, edgecolor=color(r), linewidth=1.6, label=r) for r in roles],
            loc="lower left", bbox_to_anchor=(0.0, 1.0), ncols=len(roles), borderaxespad=0.1,
        )
    if bar:
        ax.figure.colorbar(colors, ax=ax, label=label, pad=0.01, fraction=0.03, aspect=12,
                           shrink=0.95)
    return ax


def special(token: str) -> bool:
    """Whether a token is markup of the model rather than text.

    Example:
        >>> special("<|im_start|>"), special("[CLS]"), special("<"), special("sink")
        (True, True, False, False)
    """
    pairs = (("<", ">"), ("[", "]"), ("<|", "|>"))
    return any(
        token.startswith(a) and token.endswith(b) and len(token) > len(a) + len(b)
        for a, b in pairs
    )
