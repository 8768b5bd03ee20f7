"""Scenes: colored shapes and handwritten numbers on a grid, with questions whose answers are known.

A picture is 6 x 6 cells of 14 x 14 pixels. A shape fills one cell; a number is one to three digits
in horizontally adjacent cells, written with real handwriting (the 8 x 8 digits of scikit-learn, of
which 397 images are never used for training). Because the layout is known, every object has its
pixel boxes and its grid cells, and every question names the boxes that hold its answer: the ground
truth for OCR heads, object ablation and hallucination tests."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
from jaxtyping import Float, Int, UInt8
from PIL import Image, ImageDraw

GRID = 6
CELL = 14
SIDE = GRID * CELL
COLORS = {
    "red": (220, 40, 40),
    "orange": (240, 140, 30),
    "yellow": (240, 230, 60),
    "green": (50, 170, 60),
    "cyan": (70, 210, 220),
    "blue": (50, 80, 220),
    "purple": (140, 60, 190),
    "pink": (245, 150, 200),
}
SHAPES = ("circle", "square", "triangle", "diamond", "cross", "ring")
COUNTS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight")
TASKS = ("color", "shape", "existence", "count", "position", "read", "describe")
SIZES = (8, 10, 12)
_INK = 12  # a digit is drawn 12 x 12 pixels
_HELD_OUT = 397

Box = tuple[int, int, int, int]
Cell = tuple[int, int]


def _quadrant(cell: Cell) -> str:
    return (
        f"{'top' if cell[0] < GRID // 2 else 'bottom'} {'left' if cell[1] < GRID // 2 else 'right'}"
    )


@dataclass(frozen=True)
class SceneObject:
    """A shape or a number in a scene.

    Example:
        >>> thing = scene(np.random.default_rng(0), shapes=1, numbers=0).objects[0]
        >>> thing.kind, len(thing.cells) == len(thing.boxes) == 1
        ('shape', True)

    `cells` are (row, column), `boxes` are (left, top, right, bottom) in pixels, right and bottom
    exclusive; a number has one of each per digit, in reading order. `name` is "red circle" or the
    digits, "4 7"."""

    kind: str
    name: str
    cells: tuple[Cell, ...]
    boxes: tuple[Box, ...]
    color: str = ""
    shape: str = ""
    digits: tuple[int, ...] = ()

    @property
    def box(self) -> Box:
        """The smallest box around all boxes of the object."""
        left, top, right, bottom = zip(*self.boxes, strict=True)
        return min(left), min(top), max(right), max(bottom)

    @property
    def quadrant(self) -> str:
        """Where the (first cell of the) object lies: "top left", "top right", "bottom left" or
        "bottom right".
        """
        return _quadrant(self.cells[0])


@dataclass(frozen=True)
class Scene:
    """A picture and what is in it; objects are in reading order (rows from the top, then from the
    left).

    Example:
        >>> scene(np.random.default_rng(0)).pixels.shape
        (84, 84, 3)
    """

    pixels: UInt8[np.ndarray, "height width 3"]
    objects: tuple[SceneObject, ...]

    @property
    def shapes(self) -> tuple[SceneObject, ...]:
        """The colored shapes."""
        return tuple(thing for thing in self.objects if thing.kind == "shape")

    @property
    def numbers(self) -> tuple[SceneObject, ...]:
        """The handwritten numbers."""
        return tuple(thing for thing in self.objects if thing.kind == "number")


@dataclass(frozen=True)
class Question:
    """A question about a scene, its only right answer, and where that answer is to be seen.

    Example:
        >>> a = scene(np.random.default_rng(0), numbers=1)
        >>> [q.text for q in questions(a, np.random.default_rng(0), tasks=("read",))]
        ['what is the number ?']

    `objects` are indices into `scene.objects`; `boxes` are pixel boxes: those of the evidence, for
    `read` one box per answer digit in order, none for a "no" or a count of zero. `hard` marks a
    "no" whose color and shape both occur."""

    task: str
    text: str
    answer: str
    objects: tuple[int, ...] = ()
    boxes: tuple[Box, ...] = ()
    hard: bool = False


# ---------------------------------------------------------------------- drawing


@cache
def handwriting(held_out: bool) -> tuple[UInt8[np.ndarray, "image 8 8"], Int[np.ndarray, "image"]]:
    """Real handwritten digits and their labels; the held-out ones are never used for training.

    Example:
        >>> len(handwriting(False)[0]), len(handwriting(True)[0])
        (1400, 397)

    The 1797 images of scikit-learn's `load_digits`, values 0 to 16, split once by a fixed
    permutation: the images are held out, the writers are not."""
    from sklearn.datasets import load_digits

    data: Any = load_digits()
    order = np.random.default_rng(0).permutation(len(data.target))
    chosen = order[-_HELD_OUT:] if held_out else order[:-_HELD_OUT]
    return data.images[chosen].astype(np.uint8), data.target[chosen].astype(np.int64)


@cache
def _digit_bank(
    held_out: bool, warps: int
) -> tuple[list[np.ndarray], Float[np.ndarray, "sprite 12 12"]]:
    """Digits as 12 x 12 alpha masks: the images, then (training only) slightly rotated, scaled and
    sheared copies.
    """
    images, labels = handwriting(held_out)
    rng = np.random.default_rng(1)
    sprites, names = [], []
    for copy in range(1 + warps):
        for image, label in zip(images, labels, strict=True):
            picture = Image.fromarray((image * 15).astype(np.uint8)).resize(
                (_INK, _INK), Image.Resampling.BILINEAR
            )
            if copy:
                angle, shear = rng.normal(0, 0.12), rng.normal(0, 0.12)
                scale = rng.uniform(0.9, 1.1, 2)
                turn = np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
                matrix = turn @ np.array([[1, shear], [0, 1]]) @ np.diag(1 / scale)
                middle = np.full(2, _INK / 2)
                offset = middle - matrix @ middle
                picture = picture.transform(
                    (_INK, _INK),
                    Image.Transform.AFFINE,
                    (*matrix[0], offset[0], *matrix[1], offset[1]),
                    Image.Resampling.BILINEAR,
                )
            sprites.append(np.asarray(picture, np.float32) / 255)
            names.append(label)
    names = np.array(names)
    return [np.flatnonzero(names == digit) for digit in range(10)], np.stack(sprites)


@cache
def _shape_bank() -> tuple[
    dict[tuple[str, int], list[int]], Float[np.ndarray, "sprite 14 14"], list[Box]
]:
    """Every shape, size and position inside a cell as an alpha mask, with its tight box."""
    index: dict[tuple[str, int], list[int]] = {}
    masks, boxes, fine = [], [], 8
    for shape in SHAPES:
        for size in SIZES:
            end = size * fine - 1
            picture = Image.new("L", (size * fine, size * fine))
            pen = ImageDraw.Draw(picture)
            if shape in ("circle", "ring"):
                pen.ellipse((0, 0, end, end), fill=255)
                if shape == "ring":
                    hole = int(end * 0.27)
                    pen.ellipse((hole, hole, end - hole, end - hole), fill=0)
            elif shape == "square":
                pen.rectangle((end * 0.06, end * 0.06, end * 0.94, end * 0.94), fill=255)
            elif shape == "triangle":
                pen.polygon([(end / 2, 0), (end, end), (0, end)], fill=255)
            elif shape == "diamond":
                pen.polygon([(end / 2, 0), (end, end / 2), (end / 2, end), (0, end / 2)], fill=255)
            else:
                pen.rectangle((end * 0.34, 0, end * 0.66, end), fill=255)
                pen.rectangle((0, end * 0.34, end, end * 0.66), fill=255)
            small = np.asarray(picture.resize((size, size), Image.Resampling.BOX), np.float32) / 255
            for top in range(CELL - size + 1):
                for left in range(CELL - size + 1):
                    mask = np.zeros((CELL, CELL), np.float32)
                    mask[top : top + size, left : left + size] = small
                    index.setdefault((shape, size), []).append(len(masks))
                    masks.append(mask)
                    boxes.append(_tight(mask))
    return index, np.stack(masks), boxes


def _tight(mask: np.ndarray) -> Box:
    rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    return int(columns[0]), int(rows[0]), int(columns[-1]) + 1, int(rows[-1]) + 1


def _at(box: Box, cell: Cell) -> Box:
    left, top, right, bottom = box
    x, y = cell[1] * CELL, cell[0] * CELL
    return left + x, top + y, right + x, bottom + y


def cell_box(cell: Cell) -> Box:
    """Pixel box of a grid cell (row, column); visual token i of `looker` is the cell divmod(i, 6).

    Example:
        >>> cell_box((1, 0))
        (0, 14, 14, 28)
    """
    return _at((0, 0, CELL, CELL), cell)


def scenes(
    rng: np.random.Generator,
    count: int,
    *,
    shapes: int | tuple[int, int] = (2, 6),
    numbers: int | tuple[int, int] = (1, 2),
    held_out: bool = True,
    noise: float = 1.0,
) -> list[Scene]:
    """Random scenes, painted together (this is the fast way to make a training batch).

    Example:
        >>> [len(s.shapes) for s in scenes(np.random.default_rng(0), 2, shapes=3)]
        [3, 3]

    `shapes` and `numbers` are a number of objects or an inclusive range; `held_out` picks the
    handwriting (training copies are also warped); `noise` scales the background noise. The same
    `rng` state gives the same scenes. Raises ValueError if the objects cannot fit on the grid."""
    low, high = (shapes, shapes) if isinstance(shapes, int) else shapes
    few, many = (numbers, numbers) if isinstance(numbers, int) else numbers
    if not 0 <= low <= high or not 0 <= few <= many or high + 5 * many > GRID * GRID:
        raise ValueError(
            f"shapes={shapes} and numbers={numbers}: give counts (or ranges low, high) that fit on "
            f"{GRID * GRID} cells, 5 for each number"
        )
    index, masks, mask_boxes = _shape_bank()
    by_digit, inks = _digit_bank(held_out, 0 if held_out else 12)
    rgb, names = np.array(list(COLORS.values()), np.float32), list(COLORS)

    alpha = np.zeros((count, GRID, GRID, CELL, CELL), np.float32)
    paint = np.zeros((count, GRID, GRID, 3), np.float32)
    layouts: list[list[SceneObject]] = []
    for picture in range(count):
        things: list[SceneObject] = []
        free = np.ones((GRID, GRID), bool)
        for length in rng.choice(
            (1, 2, 3), size=int(rng.integers(few, many + 1)), p=(0.3, 0.4, 0.3)
        ):
            spots = [
                (row, column)
                for row in range(GRID)
                for column in range(GRID - length + 1)
                if free[row, max(column - 1, 0) : column + length + 1].all()
            ]
            row, column = spots[rng.integers(len(spots))]
            cells = tuple((row, column + step) for step in range(int(length)))
            digits = tuple(int(digit) for digit in rng.integers(10, size=int(length)))
            light, boxes = rng.uniform(215, 255), []
            for digit, cell in zip(digits, cells, strict=True):
                ink = inks[by_digit[digit][rng.integers(len(by_digit[digit]))]]
                top, left = rng.integers(CELL - _INK + 1, size=2)
                target = alpha[picture, cell[0], cell[1]]
                target[top : top + _INK, left : left + _INK] = ink * rng.uniform(0.8, 1.0)
                boxes.append(_at(_tight(target > 0.02), cell))
                paint[picture, cell[0], cell[1]] = light
                free[cell] = False
            name = " ".join(map(str, digits))
            things.append(SceneObject("number", name, cells, tuple(boxes), digits=digits))
        spots = np.flatnonzero(free)
        for spot in rng.choice(spots, size=int(rng.integers(low, high + 1)), replace=False):
            cell = divmod(int(spot), GRID)
            color, shape = int(rng.integers(len(names))), SHAPES[rng.integers(len(SHAPES))]
            options = index[shape, SIZES[rng.integers(len(SIZES))]]
            sprite = options[rng.integers(len(options))]
            alpha[picture, cell[0], cell[1]] = masks[sprite]
            paint[picture, cell[0], cell[1]] = rgb[color] + rng.uniform(-14, 14, 3)
            box = _at(mask_boxes[sprite], cell)
            things.append(
                SceneObject(
                    "shape",
                    f"{names[color]} {shape}",
                    (cell,),
                    (box,),
                    color=names[color],
                    shape=shape,
                )
            )
        layouts.append(sorted(things, key=lambda thing: thing.cells[0]))

    base = rng.uniform(15, 65, (count, 1, 1, 1, 1, 3)).astype(np.float32)
    grain = rng.integers(0, 256, (count, GRID, GRID, CELL, CELL, 3), np.uint8).astype(np.float32)
    pixels = base + (grain - 127.5) * (noise * 0.18)
    pixels += alpha[..., None] * (paint[:, :, :, None, None] - pixels)
    pixels = (
        pixels.clip(0, 255)
        .round()
        .astype(np.uint8)
        .transpose(0, 1, 3, 2, 4, 5)
        .reshape(count, SIDE, SIDE, 3)
    )
    return [Scene(pixels[picture], tuple(layouts[picture])) for picture in range(count)]


def scene(
    rng: np.random.Generator,
    *,
    shapes: int | tuple[int, int] = (2, 6),
    numbers: int | tuple[int, int] = (1, 2),
    held_out: bool = True,
    noise: float = 1.0,
) -> Scene:
    """One random scene; see `scenes` for the arguments.

    Example:
        >>> len(scene(np.random.default_rng(0), shapes=2, numbers=0).objects)
        2
    """
    return scenes(rng, 1, shapes=shapes, numbers=numbers, held_out=held_out, noise=noise)[0]


def draw(picture: Scene, scale: int = 1) -> Image.Image:
    """The scene as an image; `scale` enlarges it for people (a model takes scale 1).

    Example:
        >>> draw(scene(np.random.default_rng(0)), scale=4).size
        (336, 336)
    """
    image = Image.fromarray(picture.pixels)
    return (
        image
        if scale == 1
        else image.resize((SIDE * scale, SIDE * scale), Image.Resampling.NEAREST)
    )


# ---------------------------------------------------------------------- asking


def with_article(name: str) -> str:
    """A name with its article.

    Example:
        >>> with_article("orange ring"), with_article("red circle")
        ('an orange ring', 'a red circle')
    """
    return f"{'an' if name[0] in 'aeiou' else 'a'} {name}"


def describe(picture: Scene) -> str:
    """All objects of a scene in reading order, as one sentence.

    Example:
        >>> describe(scene(np.random.default_rng(0), shapes=0, numbers=0))
        'nothing .'
    """
    phrases = [
        with_article(thing.name) if thing.kind == "shape" else f"the number {thing.name}"
        for thing in picture.objects
    ]
    return " , ".join(phrases) + " ." if phrases else "nothing ."


def _only(values: Iterable[str]) -> set[str]:
    seen: dict[str, int] = {}
    for value in values:
        seen[value] = seen.get(value, 0) + 1
    return {value for value, times in seen.items() if times == 1}


def _existence(picture: Scene, rng: np.random.Generator) -> list[Question]:
    """One yes and one no; half of the noes are hard: the color is there, the shape is there, not
    together.
    """
    present = {thing.name for thing in picture.shapes}
    colors = sorted({thing.color for thing in picture.shapes})
    shapes = sorted({thing.shape for thing in picture.shapes})
    asked: list[Question] = []
    if present:
        name = sorted(present)[rng.integers(len(present))]
        where = tuple(i for i, thing in enumerate(picture.objects) if thing.name == name)
        boxes = tuple(picture.objects[i].box for i in where)
        asked.append(Question("existence", f"is there {with_article(name)} ?", "yes", where, boxes))
    mixed = [
        f"{color} {shape}"
        for color in colors
        for shape in shapes
        if f"{color} {shape}" not in present
    ]
    half = [f"{c} {s}" for c in COLORS for s in SHAPES if (c in colors) != (s in shapes)]
    other = [f"{c} {s}" for c in COLORS for s in SHAPES if c not in colors and s not in shapes]
    pools = [pool for pool in ((mixed, mixed, half, other) if mixed else (half, other)) if pool]
    pool = pools[rng.integers(len(pools))]
    name = pool[rng.integers(len(pool))]
    asked.append(
        Question("existence", f"is there {with_article(name)} ?", "no", hard=pool is mixed)
    )
    return asked


def _count(picture: Scene, rng: np.random.Generator) -> list[Question]:
    words = {"thing": lambda thing: True}
    words |= {f"{shape}": (lambda thing, shape=shape: thing.shape == shape) for shape in SHAPES}
    words |= {
        f"{color} thing": (lambda thing, color=color: thing.color == color) for color in COLORS
    }
    hits = {
        word: tuple(
            i for i, thing in enumerate(picture.objects) if thing.kind == "shape" and test(thing)
        )
        for word, test in words.items()
    }
    full = [word for word in hits if hits[word] and word != "thing"]
    empty = [word for word in hits if not hits[word]]
    # the numbers above one are rare: ask for them more often than they occur
    plural = [word for word in full if len(hits[word]) > 1]
    pools = [pool for pool in (full, plural, plural, empty, ["thing"]) if pool]
    pool = pools[rng.integers(len(pools))]
    word = pool[rng.integers(len(pool))]
    found = hits[word]
    plural_word = {"thing": "shapes", "cross": "crosses"}.get(word, f"{word}s")
    boxes = tuple(picture.objects[i].box for i in found)
    return [
        Question("count", f"how many {plural_word} are there ?", COUNTS[len(found)], found, boxes)
    ]


def questions(
    picture: Scene, rng: np.random.Generator, *, tasks: Sequence[str] = TASKS, every: bool = False
) -> list[Question]:
    """Questions with exactly one right answer, at most one per task (two for existence: a yes and a
    no).

    Example:
        >>> a = scene(np.random.default_rng(3), shapes=4, numbers=1)
        >>> asked = questions(a, np.random.default_rng(0), tasks=("color", "existence", "read"))
        >>> [q.task for q in asked]
        ['color', 'existence', 'existence', 'read']

    A task is left out where no unambiguous question exists (no shape that occurs once, no number).
    With `every`, all color, shape, position and read questions of the scene. Raises ValueError for
    an unknown task."""
    unknown = sorted(set(tasks) - set(TASKS))
    if unknown:
        raise ValueError(f"unknown task {unknown[0]!r}: choose among {', '.join(TASKS)}")
    if len(picture.shapes) >= len(COUNTS):
        raise ValueError(
            f"{len(picture.shapes)} shapes: questions can count at most {len(COUNTS) - 1}"
        )
    things = list(enumerate(picture.objects))
    shapes, numbers = picture.shapes, picture.numbers
    lone = {
        key: _only(getattr(thing, key) for thing in shapes) for key in ("shape", "color", "name")
    }
    corners = _only(
        corner for thing in numbers for corner in {_quadrant(cell) for cell in thing.cells}
    )
    asked: list[Question] = []
    for task in tasks:
        found: list[Question] = []
        if task == "color":
            found = [
                Question(task, f"what color is the {thing.shape} ?", thing.color, (i,), thing.boxes)
                for i, thing in things
                if thing.shape in lone["shape"]
            ]
        elif task == "shape":
            found = [
                Question(
                    task, f"what shape is the {thing.color} thing ?", thing.shape, (i,), thing.boxes
                )
                for i, thing in things
                if thing.color in lone["color"]
            ]
        elif task == "position":
            found = [
                Question(task, f"where is the {thing.name} ?", thing.quadrant, (i,), thing.boxes)
                for i, thing in things
                if thing.kind == "shape" and thing.name in lone["name"]
            ]
        elif task == "read":
            for i, thing in things:
                if thing.kind != "number":
                    continue
                if len(numbers) == 1:
                    found.append(
                        Question(task, "what is the number ?", thing.name, (i,), thing.boxes)
                    )
                elif (
                    thing.quadrant in corners
                    and len({_quadrant(cell) for cell in thing.cells}) == 1
                ):
                    text = f"what is the number at the {thing.quadrant} ?"
                    found.append(Question(task, text, thing.name, (i,), thing.boxes))
        elif task == "existence":
            asked += _existence(picture, rng)
        elif task == "count":
            asked += _count(picture, rng)
        else:
            boxes = tuple(box for _, thing in things for box in thing.boxes)
            asked.append(
                Question(
                    task,
                    "describe the picture .",
                    describe(picture),
                    tuple(range(len(things))),
                    boxes,
                )
            )
        if found:
            asked += found if every else [found[rng.integers(len(found))]]
    return asked


def words() -> list[str]:
    """Every word that questions and answers use: the vocabulary of a word-level tokenizer, in a
    fixed order.

    Example:
        >>> "circle" in words() and "7" in words()
        True
    """
    text = (
        "what color is the shape thing things there a an how many are shapes crosses where number "
        "at describe picture top bottom left right yes no nothing and . , ? : in of it"
    )
    plurals = [f"{shape}s" for shape in SHAPES if shape != "cross"]
    listed = [*text.split(), *COLORS, *SHAPES, *plurals, *COUNTS, *map(str, range(10))]
    return list(dict.fromkeys(listed))
