"""Image tokens: which cell of the patch grid each one is, and which pixels of the user's picture.

Nothing here is guessed: the path from the picture to the model's input (padding, resizing, center
crop, tiles) is read from the processor, the path from there to tokens (patch size, class token,
merging, pooling, newline tokens) from the configuration, and the two must give exactly the number
of image tokens that stand in the prompt. Where they do not, or where the architecture is not one
of those below, the segment carries no boxes.

LLaVA, VipLLaVA, PaliGemma   resize (and center crop, or pad to a square), one token per patch
Qwen2-VL, 2.5-VL, 3-VL, GLM-4V   resize without crop, `merge_size` x `merge_size` patches per token
LLaVA-NeXT, LLaVA-OneVision  thumbnail, then tiles without their padding and a newline token per row
Gemma 3                      a square grid of pooled patches; crops of the picture after it, if any
other, with a fixed square number of tokens   a square grid over the whole picture; the segment is
    then repeated under the name "..._assumed_grid" with kind "assumed"
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any, Optional

import numpy as np
from transformers.image_processing_backends import PilBackend
from transformers.image_processing_utils import get_patch_output_size, select_best_resolution
from transformers.image_utils import ChannelDimension

from interp.core import Segment
from interp.core.segment import Box
from interp.models.frame import Frame, Size, blank, entry, model_frame, processor_name

Boxes = tuple[Optional[Box], ...]

CLASS_TOKENS = {"clip_vision_model": 1, "siglip_vision_model": 0}
"""How many tokens a vision tower puts before its patches."""
RESIZE_ONLY = {"Qwen2VLImageProcessor", "Glm4vImageProcessor"}


@dataclass(frozen=True)
class ImageTokens:
    """The tokens of one picture in order: boxes (None for class and newline tokens) and grid.

    `grid` is None where several grids are involved; `parts` then names them, as (name, which of
    the tokens, grid).
    """

    boxes: Boxes
    grid: Optional[tuple[int, int]] = None
    parts: tuple[tuple[str, tuple[int, ...], tuple[int, int]], ...] = ()
    assumed: bool = False


def image_token_ids(config: Any, processor: Any = None) -> tuple[int, ...]:
    """The ids that stand for pieces of an image in a prompt; empty for a text model.

    Example:
        >>> from types import SimpleNamespace
        >>> image_token_ids(SimpleNamespace(image_token_id=7))
        (7,)
    """
    for name in ("image_token_id", "image_token_index"):
        found = getattr(config, name, None)
        if found is not None:
            return (int(found),)
    found = getattr(processor, "image_token_ids", None) or [None]
    return tuple(int(i) for i in found if i is not None)


def _one_token_per_patch(
    inputs: Mapping[str, Any], sizes: Sequence[Size], config: Any, processor: Any
) -> Optional[list[ImageTokens]]:
    vision = config.vision_config
    if vision.model_type not in CLASS_TOKENS:
        return None
    height, width = np.shape(inputs["pixel_values"])[-2:]
    patch = int(vision.patch_size)
    rows, columns = height // patch, width // patch
    # The convolution that makes patches drops what does not fill one.
    strategy = {"vipllava": "default", "paligemma": "full"}.get(
        config.model_type, getattr(config, "vision_feature_select_strategy", "default")
    )
    found = []
    for size in sizes:
        frame = model_frame(processor.image_processor, size)
        if frame is None or (frame.height, frame.width) != (height, width):
            return None
        cells = frame.cut(0, 0, columns * patch, rows * patch).cells(rows, columns)
        boxes = (None,) * CLASS_TOKENS[vision.model_type] + cells
        if strategy == "default":
            boxes = boxes[1:]
        whole = sum(box is not None for box in boxes) == rows * columns
        found.append(ImageTokens(boxes, (rows, columns) if whole else None))
    return found


def _merged_patches(
    inputs: Mapping[str, Any], sizes: Sequence[Size], config: Any, processor: Any
) -> Optional[list[ImageTokens]]:
    image_processor = processor.image_processor
    if len(inputs["image_grid_thw"]) != len(sizes):
        return None
    merge, patch = (getattr(image_processor, name, None) for name in ("merge_size", "patch_size"))
    found = []
    for (frames, height, width), size in zip(np.asarray(inputs["image_grid_thw"]), sizes):
        if frames != 1 or not merge or not patch:
            return None
        rows, columns = int(height) // merge, int(width) // merge
        resized = (int(width) * patch, int(height) * patch)
        if not image_processor.do_resize and resized != size:
            return None
        cells = Frame.of(size).resized(*resized).cells(rows, columns)
        assumed = processor_name(image_processor) not in RESIZE_ONLY
        found.append(ImageTokens(cells, (rows, columns), assumed=assumed))
    return found


def without_padding(rows: int, columns: int, picture: Size) -> tuple[slice, slice]:
    """The rows and columns of a tile grid that LLaVA-NeXT keeps, because they hold picture.

    Example:
        >>> without_padding(4, 4, (100, 50))
        (slice(1, 3, None), slice(0, 4, None))
    """
    width, height = picture
    if width / height > columns / rows:
        padding = (rows - int(round(height * (columns / width), 7))) // 2
        return slice(padding, rows - padding), slice(0, columns)
    padding = (columns - int(round(width * (rows / height), 7))) // 2
    return slice(0, rows), slice(padding, columns - padding)


def tile_spans(
    start: int, stop: int, tile: int, side: int, patch: int, count: int
) -> list[tuple[float, float]]:
    """(start, stop) in pixels of the patches start, ..., stop - 1 along a row of tiles.

    Example:
        >>> tile_spans(1, 4, tile=30, side=2, patch=14, count=3)
        [(14.0, 28.0), (30.0, 44.0), (44.0, 58.0)]

    A tile has `side` patches; what is left of it beyond them is not seen. With a smaller `count`
    the patches are pooled to that many equal shares.
    """

    def edge(at: float, is_stop: bool) -> float:
        whole = math.floor(at)
        if is_stop and whole == at:
            whole -= 1
        return float(whole // side * tile + whole % side * patch + (at - whole) * patch)

    marks = [start + (stop - start) * i / count for i in range(count + 1)]
    return [(edge(a, False), edge(b, True)) for a, b in zip(marks, marks[1:])]


def _tiles(
    inputs: Mapping[str, Any], sizes: Sequence[Size], config: Any, processor: Any
) -> Optional[list[ImageTokens]]:
    image_processor, vision = processor.image_processor, config.vision_config
    tile, patch = int(np.shape(inputs["pixel_values"])[-1]), int(vision.patch_size)
    side = tile // patch
    extra = CLASS_TOKENS.get(vision.model_type)
    strategy = getattr(config, "vision_feature_select_strategy", "default")
    # Only where every tile gives exactly its patches are the tiles stitched as below; a tile that
    # is resized or cropped again after cutting would leave gaps.
    if extra is None or extra != int(strategy == "default") or tile != int(vision.image_size):
        return None
    edges = [entry(getattr(image_processor, name, None) or {}, edge)
             for name in ("size", "crop_size") for edge in ("height", "width", "shortest_edge")]
    if {edge for edge in edges if edge is not None} != {tile}:
        return None
    seen = [(float(i * patch), float((i + 1) * patch)) for i in range(side)]
    together = [int(n) for n in np.atleast_1d(inputs.get("batch_num_images", [1] * len(sizes)))]
    found = []
    for size, is_alone in zip(sizes, [n == 1 for n in together for _ in range(n)]):
        if not is_alone:  # several pictures of one prompt are padded to squares, without tiles
            frame = Frame.of(size).padded_to_square().resized(tile, tile)
            found.append(ImageTokens((*frame.boxes(seen, seen), None), (side, side)))
            continue
        target_h, target_w = select_best_resolution(
            (size[1], size[0]), image_processor.image_grid_pinpoints
        )
        new_h, new_w = get_patch_output_size(
            blank(size), (target_h, target_w), ChannelDimension.FIRST
        )
        left, top = (target_w - new_w) // 2, (target_h - new_h) // 2
        frame = Frame.of(size).resized(new_w, new_h).cut(-left, -top, target_w, target_h)
        keep = without_padding(target_h // tile * side, target_w // tile * side, size)
        rows, columns = (axis.stop - axis.start for axis in keep)
        if config.model_type == "llava_onevision":  # a large stitched grid is interpolated down
            most = int(config.vision_aspect_ratio.removeprefix("anyres_max_"))
            ratio = math.sqrt(rows * columns / (most * side**2))
            if ratio > 1.1:
                rows, columns = int(rows // ratio), int(columns // ratio)
        cells = frame.boxes(*(
            tile_spans(axis.start, axis.stop, tile, side, patch, count)
            for axis, count in zip(keep, (rows, columns))
        ))
        boxes: list[Optional[Box]] = list(Frame.of(size).resized(tile, tile).boxes(seen, seen))
        thumbnail, tiles = tuple(range(len(boxes))), []
        for row in range(rows):
            tiles += range(len(boxes), len(boxes) + columns)
            boxes += [*cells[row * columns : (row + 1) * columns], None]
        found.append(ImageTokens(tuple(boxes), parts=(
            ("thumbnail", thumbnail, (side, side)), ("tiles", tuple(tiles), (rows, columns)),
        )))
    return found


def _pooled_square(
    inputs: Mapping[str, Any], sizes: Sequence[Size], config: Any, processor: Any
) -> Optional[list[ImageTokens]]:
    vision = config.vision_config
    side = math.isqrt(int(config.mm_tokens_per_image))
    kernel = int(vision.image_size) // int(vision.patch_size) // side
    covered = side * kernel * int(vision.patch_size)
    edge = int(vision.image_size)
    if np.shape(inputs["pixel_values"])[-2:] != (edge, edge):
        return None
    found = []
    for size in sizes:
        frames = [Frame.of(size)]
        if len(inputs["pixel_values"]) != len(sizes):
            crops = _crops(processor, size)
            if crops is None:
                return None
            frames += crops
        boxes: tuple[Box, ...] = ()
        parts = []
        for number, frame in enumerate(frames):
            name = "whole" if number == 0 else f"crop_{number - 1}"
            parts.append((name, tuple(range(len(boxes), len(boxes) + side**2)), (side, side)))
            boxes += frame.resized(edge, edge).cut(0, 0, covered, covered).cells(side, side)
        if len(frames) == 1:
            found.append(ImageTokens(boxes, (side, side)))
        else:
            found.append(ImageTokens(boxes, parts=tuple(parts)))
    return found


def _crops(processor: Any, size: Size) -> Optional[list[Frame]]:
    """Gemma 3's pan-and-scan crops, found by cropping pictures whose pixels are coordinates."""
    image_processor = processor.image_processor
    if not isinstance(image_processor, PilBackend):
        return None
    crop: Any = image_processor.pan_and_scan  # type: ignore[attr-defined]
    width, height = size
    # What the processor passes on wins over what its image processor was made with.
    passed = getattr(processor, "images_kwargs", {})
    limits = [passed.get(name, getattr(image_processor, name)) for name in (
        "pan_and_scan_min_crop_size", "pan_and_scan_max_num_crops",
        "pan_and_scan_min_ratio_to_activate")]
    xs = np.broadcast_to(np.arange(width), (1, height, width))
    ys = np.broadcast_to(np.arange(height)[:, None], (1, height, width))
    return [
        Frame.of(size).cut(int(x[0, 0, 0]), int(y[0, 0, 0]), x.shape[2], x.shape[1])
        for x, y in zip(*(crop(plane, *limits) for plane in (xs, ys)))
    ]


def _assumed_square(
    inputs: Mapping[str, Any], sizes: Sequence[Size], config: Any, processor: Any
) -> Optional[list[ImageTokens]]:
    image_processor = getattr(processor, "image_processor", None)
    if hasattr(config, "qformer_config"):  # queries of a Q-former have no place in the picture
        return None
    for flag in ("do_pad", "do_center_crop", "crop_to_patches", "do_image_splitting",
                 "do_pan_and_scan", "image_grid_pinpoints"):
        if getattr(image_processor, flag, None):
            return None
    size = getattr(image_processor, "size", None) or {}
    if entry(size, "height") is None or entry(size, "width") is None:
        return None
    for owner in (processor, config):
        for name in ("image_seq_length", "image_seq_len", "mm_tokens_per_image"):
            count = getattr(owner, name, None)
            if isinstance(count, int) and count >= 4 and math.isqrt(count) ** 2 == count:
                side = math.isqrt(count)
                return [ImageTokens(Frame.of(s).cells(side, side), (side, side), assumed=True)
                        for s in sizes]
    return None


Layout = Callable[[Mapping[str, Any], Sequence[Size], Any, Any], Optional[list[ImageTokens]]]
LAYOUTS: dict[str, Layout] = {
    "llava": _one_token_per_patch, "vipllava": _one_token_per_patch,
    "paligemma": _one_token_per_patch,
    "llava_next": _tiles, "llava_onevision": _tiles,
    "gemma3": _pooled_square,
}
"""How image tokens are laid out, by the configuration's model type."""


def layout(
    inputs: Mapping[str, Any], images_sizes: Sequence[Size], config: Any, processor: Any
) -> Optional[list[ImageTokens]]:
    """The tokens of every picture, or None where this architecture has no known geometry.

    `inputs` holds what the processor returned, `images_sizes` is (width, height) per picture.
    """
    if processor is None or config is None:
        return None
    if "image_grid_thw" in inputs:
        return _merged_patches(inputs, images_sizes, config, processor)
    of_model = LAYOUTS.get(getattr(config, "model_type", ""), _assumed_square)
    if "pixel_values" not in inputs:
        return None
    return of_model(inputs, images_sizes, config, processor)


def image_segments(
    ids: Sequence[int],
    inputs: Mapping[str, Any],
    images_sizes: Sequence[Size],
    config: Any,
    processor: Any,
) -> tuple[Segment, ...]:
    """One segment of kind "image" per picture, with its grid and the pixel box of every token.

    Example:
        >>> from types import SimpleNamespace
        >>> config = SimpleNamespace(image_token_id=9, model_type="qwen2_5_vl")
        >>> qwen = type("Qwen2VLImageProcessor", (), dict(merge_size=2, patch_size=14,
        ...                                               do_resize=True))()
        >>> (image,) = image_segments([1, 9, 9, 2], {"image_grid_thw": np.array([[1, 2, 4]])},
        ...                           [(60, 30)], config, SimpleNamespace(image_processor=qwen))
        >>> image.positions, image.grid, image.boxes[1]
        ((1, 2), (1, 2), (30.0, 0.0, 60.0, 30.0))

    Named "image", or "image_0", "image_1", ... for several. Boxes are (left, top, right, bottom)
    in the picture as the user gave it; a patch that sees only padding has a box of zero area at
    the edge; class and newline tokens have None. The boxed tokens of a segment with a grid are its
    cells row by row. Where a picture has several grids, `grid` is None and segments of kind
    "image_part" ("image_thumbnail", "image_tiles", "image_whole", "image_crop_0") hold them. Where
    the geometry is unknown the segment has no boxes; where it is assumed, a second segment
    "image_assumed_grid" of kind "assumed" says so. If tokens cannot be told apart by picture, one
    segment "image" holds them all.
    """
    wanted = set(image_token_ids(config, processor))
    positions = [i for i, token in enumerate(ids) if int(token) in wanted]
    if not positions or not images_sizes:
        return ()
    several = len(images_sizes) > 1
    names = [f"image_{k}" if several else "image" for k in range(len(images_sizes))]
    pictures = layout(inputs, images_sizes, config, processor)
    if pictures is None or sum(len(p.boxes) for p in pictures) != len(positions):
        return _without_boxes(positions, names)
    segments, start = [], 0
    for name, picture in zip(names, pictures):
        own = tuple(positions[start : start + len(picture.boxes)])
        start += len(own)
        segments.append(Segment(name, own, "image", picture.grid, picture.boxes))
        if picture.assumed:
            segments.append(
                Segment(f"{name}_assumed_grid", own, "assumed", picture.grid, picture.boxes)
            )
        for part, which, grid in picture.parts:
            segments.append(Segment(
                f"{name}_{part}", tuple(own[i] for i in which), "image_part", grid,
                tuple(picture.boxes[i] for i in which),
            ))
    return tuple(segments)


def _without_boxes(positions: list[int], names: list[str]) -> tuple[Segment, ...]:
    runs = [[i for _, i in run] for _, run in
            groupby(enumerate(positions), lambda pair: pair[1] - pair[0])]
    if len(names) == 1:
        return (Segment(names[0], tuple(positions), "image"),)
    if len(runs) == len(names):
        return tuple(Segment(name, tuple(run), "image") for name, run in zip(names, runs))
    return (Segment("image", tuple(positions), "image"),)
