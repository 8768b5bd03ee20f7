"""A heat map that tells the truth at its edges: real numbers on the axes, hatching for no value."""

from typing import Any, Optional, Union

import numpy as np
import xarray as xr
from jaxtyping import Bool, Num
from matplotlib.axes import Axes
from matplotlib.collections import PatchCollection
from matplotlib.patches import Rectangle

from interp.figures.style import DIVERGING, SEQUENTIAL, Real, note, some_ticks, style, write_number

HATCH = "not eligible"
"""The gid of the hatched cells, for those who look for them in a figure."""

Grid = Union[xr.DataArray, Num[np.ndarray, "row column"]]


@style()
def draw(
    ax: Axes,
    values: Grid,
    *,
    x: Optional[str] = None,
    y: Optional[str] = None,
    label: str = "",
    limits: Optional[tuple[Real, Real]] = None,
    signed: Optional[bool] = None,
    eligible: Optional[Union[xr.DataArray, Bool[np.ndarray, "row column"]]] = None,
    annotate: str = "",
    upward: bool = True,
    bar: bool = True,
    hatched: str = HATCH,
) -> Axes:
    """Draw rows and columns as colored cells.

    Example:
        >>> from interp.figures.style import canvas
        >>> figure, ax = canvas()
        >>> draw(ax, np.eye(3), x="key", y="query", label="attention").get_xlabel()
        'key'

    Args:
        values: two axes, rows first. A DataArray brings its axis names and the numbers (or
            words) on them; a plain array is numbered from 0.
        x, y: axis labels, instead of the dimension names.
        label: what the color says, with its unit.
        limits: values of the first and last color; the range of what is shown by default.
        signed: colors around zero; by default where values of both signs are shown.
        eligible: cells to show; the others, and NaN, are hatched.
        annotate: number format, such as ".2f", to print the value in every cell.
        upward: the first row at the bottom.
        bar: with a color bar.
        hatched: what the hatching is called in the note below.

    Raises:
        ValueError: not two axes, nothing to draw, or `eligible` of another shape.
    """
    array, (rows, columns), names = _read(values)
    shown = np.isfinite(array)
    if eligible is not None:
        mask = np.asarray(eligible, dtype=bool)
        if mask.shape != array.shape:
            raise ValueError(
                f"eligible has the shape {mask.shape}, but the values have {array.shape}."
            )
        shown &= mask
    visible = array[shown]
    if signed is None:
        signed = bool(visible.size and visible.min() < 0 < visible.max())
    low, high = limits or _range(visible, signed)

    image = ax.imshow(
        np.ma.array(array, mask=~shown), cmap=DIVERGING if signed else SEQUENTIAL,
        vmin=low, vmax=high, aspect="auto", interpolation="nearest",
        origin="lower" if upward else "upper",
    )
    _ticks(ax, rows, columns)
    _hatch(ax, ~shown, hatched)
    ax.set_xlabel(names[1] if x is None else x)
    ax.set_ylabel(names[0] if y is None else y)
    for spine in ax.spines.values():
        spine.set_visible(True)
    if annotate:
        for i, j in zip(*np.nonzero(shown)):
            red, green, blue, _ = image.cmap(image.norm(array[i, j]))
            dark = 0.299 * red + 0.587 * green + 0.114 * blue < 0.5
            ax.text(j, i, format(array[i, j], annotate), ha="center", va="center",
                    fontsize=6, color="white" if dark else "black")
    if bar:
        ax.figure.colorbar(image, ax=ax, label=label, pad=0.02)
    return ax


def _read(values: Any) -> tuple[np.ndarray, tuple[list, list], tuple[str, str]]:
    """The numbers, what is written on either axis, and the names of the axes."""
    if values.ndim != 2:
        raise ValueError(
            f"a heat map needs two axes, not {values.ndim}; average or select the others first."
        )
    if 0 in values.shape:
        raise ValueError(f"nothing to draw: the values have the shape {tuple(values.shape)}.")
    array = np.asarray(values, dtype=float)
    if not isinstance(values, xr.DataArray):
        return array, (list(range(array.shape[0])), list(range(array.shape[1]))), ("", "")
    marks = [
        list(values[dim].values) if dim in values.coords else list(range(values.sizes[dim]))
        for dim in values.dims
    ]
    names = tuple(str(dim).replace("_", " ") for dim in values.dims)
    return array, (marks[0], marks[1]), (names[0], names[1])


def _range(visible: np.ndarray, signed: bool) -> tuple[float, float]:
    """First and last color: the range shown, symmetric about zero where signs matter."""
    if not visible.size:
        return 0.0, 1.0
    low, high = float(visible.min()), float(visible.max())
    if signed:
        reach = max(abs(low), abs(high)) or 1.0
        return -reach, reach
    return (low, high) if high > low else (low, low + (abs(low) or 1.0))


def _hatch(ax: Axes, cells: np.ndarray, called: str) -> None:
    """One hatched rectangle per cell, and a note that says what hatching means."""
    if not cells.any():
        return
    look: dict[str, Any] = {
        "facecolor": "#F4F4F4", "edgecolor": "#A0A0A0", "hatch": "/////", "linewidth": 0.0,
    }
    patches = [Rectangle((j - 0.5, i - 0.5), 1, 1) for i, j in zip(*np.nonzero(cells))]
    collection = PatchCollection(patches, **look)
    collection.set_gid(HATCH)
    ax.add_collection(collection)
    note(ax, f"▨ {called}")


def _ticks(ax: Axes, rows: list, columns: list) -> None:
    """True numbers or words on both axes; never the index where the two differ."""
    def words(marks: list) -> bool:
        return any(isinstance(mark, str) for mark in marks)

    chosen = some_ticks(columns, 40 if words(columns) else 12)
    ax.set_xticks(chosen, [write_number(columns[i]) for i in chosen])
    if words(columns):
        ax.tick_params(axis="x", rotation=35)
        for tick in ax.get_xticklabels():
            tick.set(ha="right", rotation_mode="anchor", parse_math=False)
    chosen = some_ticks(rows, 40 if words(rows) else 12)
    ax.set_yticks(chosen, [write_number(rows[i]) for i in chosen])
    for tick in ax.get_yticklabels():
        tick.set_parse_math(False)
