"""From the user's picture to the pixels a model reads, and back: padding, resizing, cropping.

A `Frame` remembers where a rectangle of model pixels lies in the picture, through every step of an
image processor; the boxes of patches are then simple arithmetic.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Optional

import numpy as np
from transformers.image_processing_backends import PilBackend
from transformers.image_transforms import get_resize_output_image_size
from transformers.image_utils import ChannelDimension

from interp.core.segment import Box

Size = tuple[int, int]
"""(width, height) in pixels."""
Span = tuple[float, float]

RESIZE_AND_CROP = {"CLIPImageProcessor", "LlavaImageProcessor", "SiglipImageProcessor"}
"""Image processors that pad, resize and crop, and do nothing else to the geometry."""


@dataclass(frozen=True)
class Frame:
    """A rectangle of pixels that a model reads, and how it lies in the user's picture.

    `left`, `top` is the frame's corner in picture pixels (negative inside padding), `step_x`,
    `step_y` are picture pixels per frame pixel, `width`, `height` is the size in frame pixels.

    Example:
        >>> frame = Frame.of((60, 40)).resized(42, 28).center_cropped(28, 28)
        >>> frame.cells(2, 2)[0]
        (10.0, 0.0, 30.0, 20.0)
    """

    picture: Size
    left: float
    top: float
    step_x: float
    step_y: float
    width: int
    height: int

    @classmethod
    def of(cls, picture: Size) -> "Frame":
        """The whole picture, pixel for pixel."""
        return cls(picture, 0.0, 0.0, 1.0, 1.0, *picture)

    def cut(self, x: int, y: int, width: int, height: int) -> "Frame":
        """The rectangle at (x, y) of this frame; it may reach outside (padding)."""
        left, top = self.left + x * self.step_x, self.top + y * self.step_y
        return Frame(self.picture, left, top, self.step_x, self.step_y, width, height)

    def resized(self, width: int, height: int) -> "Frame":
        """The same part of the picture in width x height pixels."""
        return Frame(
            self.picture, self.left, self.top, self.step_x * self.width / width,
            self.step_y * self.height / height, width, height,
        )

    def padded_to_square(self) -> "Frame":
        """Padding on both sides of the shorter edge, the smaller half first."""
        side = max(self.width, self.height)
        return self.cut(-((side - self.width) // 2), -((side - self.height) // 2), side, side)

    def center_cropped(self, width: int, height: int, pil: bool = True) -> "Frame":
        """The middle; a frame that is too small is padded, where PIL and torchvision processors
        differ by one pixel for an odd difference."""

        def start(have: int, want: int) -> int:
            if have >= want:
                return (have - want) // 2
            return -((want - have + int(pil)) // 2)

        return self.cut(start(self.width, width), start(self.height, height), width, height)

    def boxes(self, ys: Sequence[Span], xs: Sequence[Span]) -> tuple[Box, ...]:
        """The rectangles y x x, given as (start, stop) in frame pixels, row by row; clipped."""
        width, height = self.picture

        def across(x: float) -> float:
            return min(max(self.left + x * self.step_x, 0.0), float(width))

        def down(y: float) -> float:
            return min(max(self.top + y * self.step_y, 0.0), float(height))

        return tuple((across(x[0]), down(y[0]), across(x[1]), down(y[1])) for y in ys for x in xs)

    def cells(self, rows: int, columns: int) -> tuple[Box, ...]:
        """Boxes of a rows x columns grid over the frame, row by row."""
        # The same expression for the end of a cell and the start of the next: no gap, no overlap.
        xs = [i * self.width / columns for i in range(columns + 1)]
        ys = [i * self.height / rows for i in range(rows + 1)]
        return self.boxes(list(zip(ys, ys[1:])), list(zip(xs, xs[1:])))


def box_of_patch(frame: Frame, grid: tuple[int, int], row: int, column: int) -> Box:
    """The pixels of the user's picture that one cell of a (rows, columns) grid covers.

    Example:
        >>> box_of_patch(Frame.of((8, 8)).resized(28, 28), (2, 2), 1, 0)
        (0.0, 4.0, 4.0, 8.0)

    A cell that sees only padding gets a box of zero area at the picture's edge.
    """
    rows, columns = grid
    if not (0 <= row < rows and 0 <= column < columns):
        raise ValueError(f"cell ({row}, {column}) is outside the {rows} x {columns} grid.")
    return frame.cells(rows, columns)[row * columns + column]


def blank(picture: Size) -> np.ndarray:
    """A picture of this size that takes no memory, for functions that ask an array its shape."""
    return np.broadcast_to(np.uint8(0), (3, picture[1], picture[0]))


def entry(sizes: Any, name: str) -> Optional[int]:
    """An entry of a processor's size, which is a dict or an object by version."""
    value = sizes.get(name) if isinstance(sizes, Mapping) else getattr(sizes, name, None)
    return None if value is None else int(value)


def processor_name(image_processor: Any) -> str:
    """The class name without its backend."""
    return type(image_processor).__name__.removesuffix("Pil").removesuffix("Fast")


def model_frame(image_processor: Any, picture: Size) -> Optional[Frame]:
    """What a CLIP- or SigLIP-style image processor hands to the model, or None if it does more.

    Example:
        >>> from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
        >>> clip = CLIPImageProcessorPil(size={"shortest_edge": 28},
        ...                              crop_size={"height": 28, "width": 28})
        >>> model_frame(clip, (60, 40)).cells(1, 1)
        ((10.0, 0.0, 50.0, 40.0),)
    """
    if processor_name(image_processor) not in RESIZE_AND_CROP:
        return None
    frame = Frame.of(picture)
    if getattr(image_processor, "do_pad", False):
        if processor_name(image_processor) != "LlavaImageProcessor":
            return None
        frame = frame.padded_to_square()
    if image_processor.do_resize:
        size = image_processor.size
        height, width = entry(size, "height"), entry(size, "width")
        shortest = entry(size, "shortest_edge")
        if shortest is not None and entry(size, "longest_edge") is None:
            height, width = get_resize_output_image_size(
                blank((frame.width, frame.height)), shortest, default_to_square=False,
                input_data_format=ChannelDimension.FIRST,
            )
        if height is None or width is None:
            return None
        frame = frame.resized(int(width), int(height))
    if getattr(image_processor, "do_center_crop", False):
        crop = image_processor.crop_size
        width, height = entry(crop, "width"), entry(crop, "height")
        if width is None or height is None:
            return None
        frame = frame.center_cropped(width, height, isinstance(image_processor, PilBackend))
    return frame
