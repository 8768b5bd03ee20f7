"""Where attention goes, by segments of the prompt: maps, stacked shares, and the prompt itself."""

from typing import Any, Union

import numpy as np
import xarray as xr
from jaxtyping import Num
from matplotlib.axes import Axes
from matplotlib.patches import Patch, Rectangle

from interp.core.prompt import Prompt
from interp.figures import heat
from interp.figures.style import COLORS, CYCLE, some_ticks, style, write_number

TOLERANCE = 1e-3
"""Missing mass below this is rounding, not a learned sink."""

Shares = Union[xr.DataArray, Num[np.ndarray, "layer segment"]]


def segment_color(name: str, otherwise: int = 0) -> str:
    """The color of a segment by the first word of its name or kind; a fixed cycle for others.

    Example:
        >>> segment_color("image 2") == COLORS["image"], segment_color("caption") in CYCLE
        (True, True)
    """
    kind = name.replace("_", " ").split(" ")[0]
    return COLORS.get(name, COLORS.get(kind, CYCLE[otherwise % len(CYCLE)]))


@style()
def draw(ax: Axes, mass: Shares, *, label: str = "attention (share of the row)",
         annotate: str = ".2f", **more: Any) -> Axes:
    """Draw the attention mass of `[layer, segment]`, or `[query segment, key segment]`, as a map.

    Example:
        >>> from interp.figures.style import canvas
        >>> mass = xr.DataArray([[0.2, 0.8], [0.7, 0.3]], {"segment": ["bos", "image"]},
        ...                     ("layer", "segment"))
        >>> figure, ax = canvas()
        >>> [tick.get_text() for tick in draw(ax, mass).get_xticklabels()]
        ['bos', 'image']
    """
    if isinstance(mass, xr.DataArray) and "segment" in mass.dims:
        mass = mass.transpose(..., "segment")
    many = mass.ndim == 2 and mass.shape[0] * mass.shape[1] > 150
    more.setdefault("limits", (0.0, 1.0))
    return heat.draw(ax, mass, label=label, annotate="" if many else annotate, **more)


@style()
def stack(ax: Axes, mass: Shares, *, label: str = "attention (share of the row)") -> Axes:
    """Draw shares per segment, stacked over the layers; what is missing to one is hatched.

    Mass is missing where a learned sink takes a part of every row.

    Example:
        >>> from interp.figures.style import canvas
        >>> mass = xr.DataArray([[0.2, 0.8], [0.6, 0.3]], {"segment": ["bos", "image"]},
        ...                     ("layer", "segment"))
        >>> figure, ax = canvas()
        >>> [text.get_text() for text in stack(ax, mass).get_legend().get_texts()]
        ['outside the sequence', 'image', 'bos']

    Raises:
        ValueError: not `[layer, segment]`, or rows that sum to more than one.
    """
    if not isinstance(mass, xr.DataArray):
        mass = xr.DataArray(mass, dims=("layer", "segment"))
    if set(mass.dims) != {"layer", "segment"}:
        raise ValueError(f"stacked shares are [layer, segment], not {list(mass.dims)}.")
    mass = mass.transpose("layer", "segment")
    values = np.nan_to_num(np.asarray(mass.values, dtype=float))
    total = values.sum(1)
    if (values < -TOLERANCE).any() or (total > 1 + TOLERANCE).any():
        raise ValueError(
            f"shares lie between 0 and 1 and sum to at most 1; here a row sums to "
            f"{total.max():.3g} and the smallest share is {values.min():.3g}."
        )
    layers = mass["layer"].values.tolist() if "layer" in mass.coords else list(range(len(values)))
    if "segment" in mass.coords:
        names = [str(name) for name in mass["segment"].values]
    else:
        names = [f"segment {i}" for i in range(values.shape[1])]
    place, base = np.arange(len(values)), np.zeros(len(values))
    for i, name in enumerate(names):
        ax.bar(place, values[:, i], 0.86, bottom=base, label=name, linewidth=0,
               color=segment_color(name, i))
        base = base + values[:, i]
    missing = np.maximum(1 - base, 0)
    if (missing > TOLERANCE).any():
        ax.bar(place, missing, 0.86, bottom=base, label="outside the sequence",
               facecolor="#F4F4F4", edgecolor="#A0A0A0", hatch="/////", linewidth=0)
    chosen = some_ticks(layers)
    ax.set_xticks(chosen, [write_number(layers[i]) for i in chosen])
    ax.set(xlabel="layer", ylabel=label, ylim=(0, 1), xlim=(-0.6, len(values) - 0.4))
    ax.legend(loc="center left", bbox_to_anchor=(1.0, 0.5), reverse=True)
    return ax


@style()
def spans(ax: Axes, prompt: Prompt) -> Axes:
    """Draw the prompt as a bar: which positions belong to which segment.

    Example:
        >>> from interp.figures.style import canvas
        >>> prompt = Prompt.from_tokens(range(9), {"image": (1, 5), "question": (6, 9)})
        >>> figure, ax = canvas(height=0.9)
        >>> len(spans(ax, prompt).patches)
        3
    """
    ax.add_patch(Rectangle((-0.5, 0), len(prompt), 1, facecolor="#F4F4F4", edgecolor="none"))
    handles = []
    for i, segment in enumerate(prompt.segments):
        hue = segment_color(segment.name if segment.kind == "text" else segment.kind, i)
        for start, stop in _runs(segment.positions):
            patch = Rectangle((start - 0.5, 0), stop - start, 1, facecolor=hue, edgecolor="white",
                              linewidth=0.3)
            patch.set_gid(segment.name)
            ax.add_patch(patch)
        handles.append(Patch(color=hue, label=f"{segment.name} ({len(segment)})"))
    ax.set(xlim=(-0.5, len(prompt) - 0.5), ylim=(0, 1), xlabel="position (tokens)", yticks=[])
    ax.spines["left"].set_visible(False)
    if handles:
        ax.legend(handles=handles, loc="lower left", bbox_to_anchor=(0.0, 1.0), ncols=6,
                  columnspacing=1.2, borderaxespad=0.1)
    return ax


def _runs(positions: tuple[int, ...]) -> list[tuple[int, int]]:
    """Stretches (start, stop) of neighboring positions."""
    found: list[tuple[int, int]] = []
    for position in sorted(positions):
        if found and found[-1][1] == position:
            found[-1] = (found[-1][0], position + 1)
        else:
            found.append((position, position + 1))
    return found
