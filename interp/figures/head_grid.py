"""A number for every head: layer by head, on the true block and head numbers."""

from collections.abc import Iterable
from typing import Any, Union

import numpy as np
import xarray as xr
from jaxtyping import Num
from matplotlib.axes import Axes
from matplotlib.patches import Rectangle

from interp.core.errors import OutOfRange
from interp.core.head import HeadLike, heads
from interp.core.scores import HeadScores
from interp.figures import heat
from interp.figures.style import VERMILION, style


@style()
def draw(
    ax: Axes,
    scores: Union[HeadScores, xr.DataArray, Num[np.ndarray, "layer head"]],
    *,
    label: str = "score",
    mark: Union[HeadLike, Iterable[HeadLike]] = (),
    **more: Any,
) -> Axes:
    """Draw head scores as a map; heads that could not have shown the behavior are hatched.

    Example:
        >>> from interp.figures.style import canvas
        >>> figure, ax = canvas()
        >>> ax = draw(ax, np.random.rand(4, 8), label="attention on key 0 (share)", mark="L1H2")
        >>> ax.get_ylabel(), len(ax.patches)
        ('layer', 1)

    Args:
        scores: `[layer, head]`; layers and heads of a labelled array keep their numbers.
        label: what the color says, with its unit.
        mark: heads to outline.
        more: `limits`, `signed`, `annotate`, `eligible`, `hatched`, `bar` of `heat.draw`.

    Raises:
        OutOfRange: a marked head that is not in the map.
        ValueError: scores that are not `[layer, head]`.
    """
    if isinstance(scores, HeadScores):
        if scores.eligible is not None and more.get("eligible") is None:
            more["eligible"] = scores.eligible.transpose("layer", "head")
        scores = scores.scores
    array = HeadScores.of(scores).scores if not isinstance(scores, xr.DataArray) else scores
    if set(array.dims) != {"layer", "head"}:
        raise ValueError(f"scores must be [layer, head], not {list(array.dims)}.")
    array = array.transpose("layer", "head")
    heat.draw(ax, array, label=label, **more)

    rows, columns = _numbers(array, "layer"), _numbers(array, "head")
    for head in heads(mark):
        if head.layer not in rows or head.head not in columns:
            raise OutOfRange(f"head {head} cannot be marked: it is not in the map.")
        corner = columns.index(head.head) - 0.5, rows.index(head.layer) - 0.5
        outline = Rectangle(corner, 1, 1, fill=False, edgecolor=VERMILION, linewidth=1.5)
        outline.set_gid(str(head))
        ax.add_patch(outline)
    return ax


def _numbers(array: xr.DataArray, dim: str) -> list[int]:
    marks = array[dim].values if dim in array.coords else range(array.sizes[dim])
    return [int(mark) for mark in marks]
