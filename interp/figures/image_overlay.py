"""Scores of image tokens on the pixels they look at."""

from collections.abc import Mapping
from typing import Any, Optional

import numpy as np
import xarray as xr
from matplotlib.axes import Axes
from matplotlib.collections import PatchCollection
from matplotlib.patches import Patch, Rectangle
from matplotlib.patheffects import withStroke

from interp.core.segment import Segment
from interp.figures.style import DIVERGING, OVER_PIXELS, Real, color, style


@style()
def draw(
    ax: Axes,
    image: Any,
    segment: Segment,
    scores: Any,
    *,
    label: str,
    mark: Optional[Mapping[int, str]] = None,
    limits: Optional[tuple[Real, Real]] = None,
    alpha: Real = 0.55,
    bar: bool = True,
    gray: bool = True,
) -> Axes:
    """Draw an image with every patch under the color of its token's score.

    Example:
        >>> from interp.figures.style import canvas
        >>> boxes = ((0.0, 0.0, 8.0, 8.0), (8.0, 0.0, 16.0, 8.0), None)
        >>> segment = Segment("image", (5, 6, 7), "image", (1, 2), boxes)
        >>> figure, ax = canvas()
        >>> ax = draw(ax, np.zeros((8, 16, 3)), segment, [0.1, 0.9, 0.0], label="attention",
        ...           mark={6: "visual"})
        >>> len(ax.collections[0].get_paths()), len(ax.patches)
        (2, 1)

    Args:
        image: the user's picture, before any resizing: a PIL image or `[height, width]`, with
            or without channels.
        segment: an image segment with a pixel box for every position (None: not drawn).
        scores: one number for every position of the segment, in its order, or a mapping
            position -> number; NaN leaves the pixels bare.
        label: what the color says, with its unit.
        mark: position -> role (see `style.COLORS`): outlined, with the position written in it.
        limits: values of the first and last color; around zero the colors are those of two signs.
        alpha: how much the color covers the pixels.
        gray: show the picture in gray, so that color means the score alone.

    Raises:
        ValueError: no boxes, scores that do not fit the segment, or a mark outside it.
    """
    if not segment.boxes:
        raise ValueError(f"segment {segment.name!r} has no pixel boxes; it is not an image.")
    values = _read(segment, scores)
    mark = dict(mark or {})
    for position in mark:
        if position not in segment.positions:
            raise ValueError(f"position {position} cannot be marked: it is not in "
                             f"{segment.name!r}.")
    pixels = np.asarray(image)
    if gray and pixels.ndim == 3:
        pixels = pixels[..., :3].astype(float).mean(-1)
    if gray:
        # Lightened, so that a dark picture does not darken the colors of the scores.
        pixels = 0.2 + 0.8 * pixels / (255.0 if pixels.max(initial=0) > 1 else 1.0)
    rows, columns = pixels.shape[:2]
    # Box edges are whole pixels: the picture spans 0 to its width, not -0.5 to width - 0.5.
    ax.imshow(pixels, cmap="gray", vmin=0, vmax=1, extent=(0, columns, rows, 0),
              interpolation="nearest")

    shown = [(p, b, v) for p, b, v in zip(segment.positions, segment.boxes, values)
             if b is not None and np.isfinite(v)]
    numbers = np.array([value for _, _, value in shown])
    ends = limits or ((numbers.min(), numbers.max()) if len(numbers) else (0.0, 1.0))
    signed = bool(ends[0] < 0 < ends[1])
    patches = PatchCollection([_outline(box) for _, box, _ in shown], alpha=alpha, linewidth=0,
                              cmap=DIVERGING if signed else OVER_PIXELS)
    patches.set_array(numbers)
    patches.set_gid("scores")
    if limits is not None:
        patches.set_clim(*limits)
    elif signed:
        patches.set_clim(-np.abs(numbers).max(), np.abs(numbers).max())
    elif not len(numbers):
        patches.set_clim(0.0, 1.0)
    ax.add_collection(patches)

    where = dict(zip(segment.positions, segment.boxes))
    for position, role in mark.items():
        box = where[position]
        if box is None:
            continue
        outline = _outline(box, fill=False, edgecolor=color(role), linewidth=1.6)
        outline.set_gid(f"token {position}")
        ax.add_patch(outline)
        ax.text((box[0] + box[2]) / 2, (box[1] + box[3]) / 2, str(position), ha="center",
                va="center", fontsize=5.5, color="black", weight="bold",
                path_effects=[withStroke(linewidth=1.2, foreground="white")])
    ax.set(xlim=(0, columns), ylim=(rows, 0), xlabel="x (pixels)", ylabel="y (pixels)")
    if mark:
        roles = dict.fromkeys(mark.values())
        ax.legend(
            handles=[Patch(fill=False, edgecolor=color(r), linewidth=1.6, label=r) for r in roles],
            loc="lower left", bbox_to_anchor=(0.0, 1.0), ncols=len(roles), borderaxespad=0.1,
        )
    if bar:
        # As high as the picture, whatever room its panel has: a title stays above the picture.
        ax.figure.colorbar(patches, cax=ax.inset_axes((1.03, 0.0, 0.05, 1.0)), label=label)
    return ax


def _outline(box: Any, **look: Any) -> Rectangle:
    left, top, right, bottom = box
    return Rectangle((left, top), right - left, bottom - top, **look)


def _read(segment: Segment, scores: Any) -> list[float]:
    """One number per position of the segment, in its order."""
    if isinstance(scores, Mapping):
        strange = [position for position in scores if position not in segment.positions]
        if strange:
            raise ValueError(f"position {strange[0]} has a score but is not in {segment.name!r}.")
        return [float(scores.get(position, np.nan)) for position in segment.positions]
    values = np.asarray(scores.values if isinstance(scores, xr.DataArray) else scores, float)
    if values.shape != (len(segment),):
        raise ValueError(
            f"segment {segment.name!r} has {len(segment)} positions, but the scores have the "
            f"shape {values.shape}; give one score for every position."
        )
    return [float(value) for value in values]
