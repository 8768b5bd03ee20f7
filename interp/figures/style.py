"""One look for every figure: sizes, fonts, and colors that keep one meaning throughout.

The colors are those of Okabe and Ito; the gray of controls is dark enough to be told from their purple
and green also by readers who see no difference between red and green.
"""

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any, Optional, Union

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.rcsetup import cycler

Real = Union[int, float]

COLUMN, PAGE = 3.5, 7.2
"""Widths in inches: one column of a paper, and the whole page."""

BLACK, ORANGE, SKY, GREEN = "#000000", "#E69F00", "#56B4E9", "#009E73"
YELLOW, BLUE, VERMILION, PURPLE = "#F0E442", "#0072B2", "#D55E00", "#CC79A7"
GRAY, PALE, INK = "#707070", "#EFEFEF", "#222222"

CYCLE = (BLUE, VERMILION, GREEN, PURPLE, ORANGE, SKY, BLACK)
"""Colors of curves that have no meaning of their own."""

COLORS = {
    "primary": VERMILION, "secondary": BLUE, "visual": PURPLE, "noise": SKY,
    "image": GREEN, "text": ORANGE, "control": GRAY, "other": GRAY,
    "bos": VERMILION, "system": SKY, "user": ORANGE, "question": BLUE, "role": GRAY,
    "needle": PURPLE, "generated": "#4D4D4D",
}
"""What a color means: kinds of sinks, kinds of segments, and controls."""

SEQUENTIAL, DIVERGING = "viridis", "RdBu_r"
UNDER_TEXT, OVER_PIXELS = "Purples", "YlOrRd"
"""Color maps that begin pale, where something must stay readable under or over the color."""

VERDICTS = {
    "supported": ("#00664A", "#DFF3EC", "✓"),
    "refuted": ("#9A3B00", "#FBE6DA", "✗"),
    "inconclusive": ("#6B5200", "#FBF1D0", "~"),
    "not testable": ("#4A4A4A", "#ECECEC", "–"),
}
"""Verdict -> (text color, background, sign); the word is always printed beside the color."""


def color(role: str) -> str:
    """The color of a kind of sink, of a kind of segment, or of a control.

    Example:
        >>> color("control")
        '#707070'

    Raises:
        ValueError: a role without a color; the message lists those that have one.
    """
    try:
        return COLORS[role]
    except KeyError:
        raise ValueError(
            f"no color is set for {role!r}; the roles are: {', '.join(COLORS)}."
        ) from None


@contextlib.contextmanager
def style() -> Iterator[None]:
    """Matplotlib's settings inside the block are those of this package; restored after it.

    Example:
        >>> before = mpl.rcParams["font.size"]
        >>> with style():
        ...     inside = mpl.rcParams["font.size"]
        >>> inside, mpl.rcParams["font.size"] == before
        (8.0, True)
    """
    settings: Any = {
        "font.size": 8.0, "axes.titlesize": 8.5, "axes.labelsize": 8.0,
        "xtick.labelsize": 7.0, "ytick.labelsize": 7.0, "legend.fontsize": 7.0,
        "legend.title_fontsize": 7.0, "figure.titlesize": 9.0, "axes.titlelocation": "left",
        "axes.spines.top": False, "axes.spines.right": False, "axes.edgecolor": INK,
        "axes.labelcolor": INK, "text.color": INK, "xtick.color": INK, "ytick.color": INK,
        "axes.linewidth": 0.7, "xtick.major.width": 0.7, "ytick.major.width": 0.7,
        "xtick.major.size": 3.0, "ytick.major.size": 3.0,
        "axes.grid": False, "grid.color": "#DDDDDD", "grid.linewidth": 0.5,
        "axes.axisbelow": True, "lines.linewidth": 1.4, "lines.markersize": 3.5,
        "legend.frameon": True, "legend.framealpha": 0.6, "legend.edgecolor": "none",
        "legend.fancybox": False, "legend.handlelength": 1.8, "hatch.linewidth": 0.6,
        "axes.prop_cycle": cycler(color=list(CYCLE)), "image.cmap": SEQUENTIAL,
        "figure.constrained_layout.use": True, "figure.dpi": 110, "savefig.dpi": 150,
        "pdf.fonttype": 42, "ps.fonttype": 42,
    }
    with mpl.rc_context(settings):
        yield


def canvas(
    rows: int = 1,
    columns: int = 1,
    *,
    width: Real = COLUMN,
    height: Optional[Real] = None,
    **more: Any,
) -> tuple[Figure, Any]:
    """A figure in this style with its axes, an `Axes` or an array of them as in `plt.subplots`.

    `width` and `height` are inches (`COLUMN`, `PAGE`); without a height every panel is a little
    wider than high.

    Example:
        >>> figure, axes = canvas(1, 2, width=PAGE)
        >>> len(axes), float(figure.get_figwidth())
        (2, 7.2)
    """
    if rows < 1 or columns < 1:
        raise ValueError(f"a figure needs at least one panel, not {rows} x {columns}.")
    if height is None:
        height = rows * max(1.8, 0.72 * width / columns)
    with style():
        # Not through pyplot: nothing to close, and no window can open.
        figure = Figure(figsize=(width, height))
        return figure, figure.subplots(rows, columns, **more)


def some_ticks(labels: Sequence[Any], most: int = 12) -> list[int]:
    """Indices at regular steps, at most `most` of them, to label an axis of many entries.

    Example:
        >>> some_ticks(range(32), most=8)
        [0, 5, 10, 15, 20, 25, 30]
        >>> some_ticks(["a", "b"])
        [0, 1]
    """
    n = len(labels)
    for step in (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000):
        if -(-n // step) <= most:
            return list(range(0, n, step))
    return [int(i) for i in np.linspace(0, n - 1, most)]


def write_number(value: Any) -> str:
    """Whole numbers without a point, others with as many digits as they need.

    Example:
        >>> write_number(3.0), write_number(0.25), write_number("image")
        ('3', '0.25', 'image')
    """
    if isinstance(value, (float, np.floating)):
        return f"{value:.4g}"
    return str(value)


def note(ax: Axes, text: str) -> None:
    """A small gray line below the x label, at the right; a second note joins the first.

    Example:
        >>> figure, ax = canvas()
        >>> note(ax, "n = 12")
        >>> note(ax, "95 % band")
        >>> ax.texts[0].get_text()
        'n = 12 · 95 % band'
    """
    for given in ax.texts:
        if given.get_gid() == "note":
            given.set_text(f"{given.get_text()} · {text}")
            return
    # Anchored to the label itself, so that long tick labels push it down too.
    written = ax.annotate(
        text, (1.0, 0.0), xycoords=("axes fraction", ax.xaxis.label), xytext=(0, -1),
        textcoords="offset points", ha="right", va="top", fontsize=6, color="#666666",
        annotation_clip=False, parse_math=False,
    )
    written.set_gid("note")
