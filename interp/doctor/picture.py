"""Where image tokens look, drawn over a picture whose content is known."""

import io
import math
from pathlib import Path
from typing import Optional

import numpy as np
from PIL import Image

from interp.core.errors import PromptError, UndertowError
from interp.core.prompt import Prompt
from interp.core.result import write_atomically
from interp.core.segment import Segment
from interp.doctor.lanes import sentence
from interp.doctor.report import Picture, Report
from interp.figures import patch_grid
from interp.figures.style import canvas, style
from interp.models.model import Model
from interp.prompts import scenes

FILE = "image_tokens.png"
QUESTION = "what color is the circle ?"


def examine_picture(model: Model, report: Report, out: Optional[Path] = None) -> Optional[Prompt]:
    """Note the geometry of image tokens and draw it into `out`; the prompt with the picture."""
    if not model.has_images:
        return None
    if model.tokenizer is None or model.processor is None:
        lacking = "tokenizer" if model.tokenizer is None else "processor"
        report.limit("pictures", f"the model takes pictures, but no {lacking} was found beside its "
                                 f"weights: save it there with {lacking}.save_pretrained(folder).")
        return None
    try:
        prompt = _shown(model, wide=False)
    except (UndertowError, ValueError, TypeError, KeyError, RuntimeError) as error:
        report.fault("pictures", f"a picture cannot be turned into a prompt: {sentence(error)}")
        return None
    segment = prompt.of_kind("image")[0]
    size, positions = prompt.images[0].size, segment.positions
    parts = tuple(f"{s.name} {s.grid[0]} x {s.grid[1]}" for s in prompt.of_kind("image_part")
                  if s.grid)
    if not segment.boxes:
        report.limit("pictures", "which pixels an image token sees is not known for this "
                                 "architecture: image tokens can be read and edited, but not drawn "
                                 "on the picture.")
        report.picture = Picture(len(positions), min(positions), max(positions), None, parts, size,
                                 None, None)
        return prompt
    assumed = bool(prompt.of_kind("assumed"))
    if assumed:
        report.limit("pictures", "the grid of image tokens is assumed (a square over the whole "
                                 "picture), not read from the processor.")
    wide = None
    try:
        other = _shown(model, wide=True)
        wide = covered(other.of_kind("image")[0], other.images[0].size)
    except (UndertowError, ValueError, TypeError, KeyError, RuntimeError) as error:
        report.limit("pictures", f"a picture twice as wide as high was refused: {sentence(error)}")
    file = None
    if out is not None:
        write_atomically(out / FILE, draw(prompt))
        file = FILE
    report.picture = Picture(
        len(positions), min(positions), max(positions), segment.grid, parts, size,
        covered(segment, size), wide, assumed, file,
    )
    return prompt


def _shown(model: Model, wide: bool) -> Prompt:
    """A scene with a question, as large as the vision tower likes and the context allows."""
    edge = getattr(getattr(model.config, "vision_config", None), "image_size", None)
    scale = max(1, math.ceil((edge if isinstance(edge, int) else 8 * scenes.SIDE) / scenes.SIDE))
    count = 2 if wide else 1
    made = scenes.scenes(np.random.default_rng(0), count, shapes=6, numbers=1)
    while True:
        pixels = np.concatenate([np.asarray(scenes.draw(one, scale)) for one in made], axis=1)
        try:
            return model.prompt(QUESTION, images=[Image.fromarray(pixels)])
        except PromptError as error:
            if scale == 1 or "tokens" not in str(error):
                raise
            scale = scale // 2


def covered(segment: Segment, size: tuple[int, int]) -> float:
    """The share of a picture's pixels that lie in the box of some token.

    Example:
        >>> covered(Segment("image", (3, 4), boxes=((0, 0, 2, 4), (1, 0, 3, 4))), (4, 4))
        0.75
    """
    seen = np.zeros((size[1], size[0]), bool)
    for box in segment.boxes:
        if box is not None:
            left, top, right, bottom = (int(round(edge)) for edge in box)
            seen[top:bottom, left:right] = True
    return float(seen.mean())


@style()
def draw(prompt: Prompt) -> bytes:
    """The picture of a prompt with the grid of its tokens and their positions, as PNG."""
    shown = [s for s in prompt.of_kind("image_part") if s.boxes] or [prompt.of_kind("image")[0]]
    figure, axes = canvas(1, len(shown), width=4.2 * len(shown), height=4.4, squeeze=False)
    for ax, segment in zip(axes[0], shown):
        patch_grid.draw(ax, prompt.images[0], segment)
        grid = f", {segment.grid[0]} x {segment.grid[1]}" if segment.grid else ""
        ax.set_title(f"{segment.name}: tokens {min(segment.positions)} to "
                     f"{max(segment.positions)}{grid}")
    made = io.BytesIO()
    figure.savefig(made, format="png", dpi=160)
    return made.getvalue()
