"""Which token sees which pixels: the patch grid over the picture, with token positions."""

from typing import Any, Optional

import numpy as np
from matplotlib.axes import Axes
from matplotlib.patches import Rectangle
from matplotlib.patheffects import withStroke

from interp.core.segment import Segment
from interp.figures.style import VERMILION, style


@style()
def draw(ax: Axes, image: Any, segment: Segment, *, every: Optional[int] = None) -> Axes:
    """Outline every patch of an image segment and write positions of the prompt into them.

    Example:
        >>> from interp.figures.style import canvas
        >>> boxes = ((0.0, 0.0, 8.0, 8.0), (8.0, 0.0, 16.0, 8.0))
        >>> figure, ax = canvas()
        >>> ax = draw(ax, np.zeros((8, 16, 3)), Segment("image", (5, 6), "image", (1, 2), boxes))
        >>> [text.get_text() for text in ax.texts]
        ['5', '6']

    Args:
        image: the user's picture, before any resizing.
        segment: an image segment with pixel boxes.
        every: a number in every patch of every such row and column; chosen by the space if None.
            The first and the last patch always carry theirs.

    Raises:
        ValueError: a segment without boxes.
    """
    placed = [(p, box) for p, box in zip(segment.positions, segment.boxes)
              if box is not None and box[2] > box[0] and box[3] > box[1]]
    if not placed:
        raise ValueError(f"segment {segment.name!r} has no pixel boxes, so it cannot be drawn.")
    pixels = np.asarray(image)
    rows, columns = pixels.shape[:2]
    ax.imshow(pixels, extent=(0, columns, rows, 0), interpolation="nearest", cmap="gray")
    tops, lefts = (sorted({box[side] for _, box in placed}) for side in (1, 0))
    inches = ax.bbox.width / ax.figure.dpi / len(lefts)
    if every is None:
        every = max(1, int(np.ceil(0.26 / inches)))
    size = float(np.clip(14 * inches * every, 5.5, 9.0))
    ends = {placed[0][0], placed[-1][0]}
    for position, box in placed:
        outline = Rectangle((box[0], box[1]), box[2] - box[0], box[3] - box[1], fill=False,
                            edgecolor=VERMILION, linewidth=0.5)
        outline.set_gid(f"token {position}")
        ax.add_patch(outline)
        chosen = not (tops.index(box[1]) % every or lefts.index(box[0]) % every)
        if chosen or position in ends:
            ax.text((box[0] + box[2]) / 2, (box[1] + box[3]) / 2, str(position), ha="center",
                    va="center", fontsize=size, color="black",
                    path_effects=[withStroke(linewidth=1.3, foreground="white")])
    ax.set(xlim=(0, columns), ylim=(rows, 0), xlabel="x (pixels)", ylabel="y (pixels)")
    return ax
