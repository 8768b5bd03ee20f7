"""Pictures as users give them: PIL images, arrays, paths."""

import os
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from interp.core import PromptError


def open_picture(given: Any) -> Image.Image:
    """A PIL image from an image, an array or a path. Raises `PromptError`.

    Example:
        >>> open_picture(np.zeros((4, 6, 3), np.uint8)).size
        (6, 4)

    Files are turned upright as their EXIF data say; nothing is downloaded.
    """
    if isinstance(given, Image.Image):
        return given
    if isinstance(given, (str, os.PathLike)):
        if str(given).startswith(("http://", "https://", "data:")):
            raise PromptError(f"the image {str(given):.60} is an address; download it first.")
        if not Path(given).is_file():
            raise PromptError(f"there is no image file {str(given)!r}; check the path.")
        try:
            with Image.open(given) as opened:
                return ImageOps.exif_transpose(opened).copy()
        except (UnidentifiedImageError, OSError) as error:
            raise PromptError(f"{str(given)!r} is not a readable image: {error}.") from None
    if hasattr(given, "detach"):
        given = given.detach().cpu().numpy()
    if not isinstance(given, np.ndarray):
        raise PromptError(
            f"an image is a {type(given).__name__}; give a PIL image, an array "
            "[height, width, 3] or a path."
        )
    if given.ndim not in (2, 3) or (given.ndim == 3 and given.shape[2] not in (1, 3, 4)):
        raise PromptError(
            f"an image array has shape {given.shape}; give [height, width, 3], or [height, width]."
        )
    if given.size == 0 or not np.isfinite(given).all():
        raise PromptError(f"an image array of shape {given.shape} is empty or has NaN in it.")
    if np.issubdtype(given.dtype, np.floating):
        if given.min() < 0 or given.max() > 1:
            raise PromptError(
                f"an image array of floats goes from {given.min():g} to {given.max():g}; give "
                "floats from 0 to 1, or uint8 from 0 to 255."
            )
        given = np.round(given * 255).astype(np.uint8)
    if given.dtype != np.uint8:
        raise PromptError(f"an image array is {given.dtype}; give uint8 or floats from 0 to 1.")
    return Image.fromarray(given[:, :, 0] if given.ndim == 3 and given.shape[2] == 1 else given)


def as_list(images: Any) -> list[Any]:
    return list(images) if isinstance(images, (list, tuple)) else [images]


def in_order(own: list[Any], images: Any) -> list[Any]:
    """Pictures in the order of the image parts: a part's own, or else the next of `images`."""
    rest = as_list(images)
    merged = [rest.pop(0) if picture is None and rest else picture for picture in own]
    missing = sum(picture is None for picture in merged)
    if missing or (own and rest):
        given = len(as_list(images))
        wanted = sum(picture is None for picture in own)
        raise PromptError(
            f"the messages have {wanted} image part(s) without a picture, but {given} image(s) "
            "were given; make the numbers equal."
        )
    return merged + rest
