"""Pictures whose contents are known to the pixel: flat colors, placed boxes, rendered words."""

from collections.abc import Sequence
from dataclasses import dataclass

from PIL import Image, ImageDraw, ImageFont

from interp.core import PromptError

Color = tuple[int, int, int]
Size = tuple[int, int]
"""(width, height) in pixels."""
Rectangle = tuple[int, int, int, int]
"""(left, top, right, bottom) in pixels, right and bottom exclusive."""

BLACK: Color = (0, 0, 0)
WHITE: Color = (255, 255, 255)


@dataclass(frozen=True)
class Word:
    """A word in a picture and the smallest box around its ink."""

    text: str
    box: Rectangle


@dataclass(frozen=True, eq=False)
class TextPicture:
    """A picture of text, with every word's box in reading order.

    Example:
        >>> picture = rendered_text("one two", size=(90, 30))
        >>> [word.text for word in picture.words]
        ['one', 'two']
    """

    image: Image.Image
    words: tuple[Word, ...]

    def box(self, text: str) -> Rectangle:
        """The box of the only word that reads `text`. Raises `PromptError`."""
        found = [word.box for word in self.words if word.text == text]
        if len(found) != 1:
            raise PromptError(
                f"the word {text!r} is {len(found)} times in the picture; use `words` to choose."
            )
        return found[0]


def flat(color: Color, size: Size) -> Image.Image:
    """A picture of one color.

    Example:
        >>> flat((255, 0, 0), (3, 2)).getpixel((2, 1))
        (255, 0, 0)
    """
    if min(size) < 1:
        raise PromptError(f"a picture of {size[0]} x {size[1]} pixels is empty.")
    return Image.new("RGB", size, color)


def cell_box(size: Size, grid: tuple[int, int], row: int, column: int) -> Rectangle:
    """The pixels of one cell of a (rows, columns) grid that divides the picture evenly.

    Example:
        >>> cell_box((60, 40), (2, 3), row=1, column=2)
        (40, 20, 60, 40)

    Raises `PromptError` for a grid that does not divide the picture, or a cell outside.
    """
    (width, height), (rows, columns) = size, grid
    if width % columns or height % rows:
        raise PromptError(
            f"a grid of {rows} x {columns} does not divide {width} x {height} pixels evenly."
        )
    if not (0 <= row < rows and 0 <= column < columns):
        raise PromptError(f"cell ({row}, {column}) is outside the {rows} x {columns} grid.")
    w, h = width // columns, height // rows
    return (column * w, row * h, (column + 1) * w, (row + 1) * h)


def placed(
    background: Image.Image, boxes: Sequence[tuple[Rectangle, Color | Image.Image]]
) -> Image.Image:
    """A copy of the background with boxes filled by a color or a picture (resized to the box).

    Example:
        >>> image = placed(flat(BLACK, (4, 4)), [((1, 1, 3, 2), (9, 8, 7))])
        >>> image.getpixel((2, 1)), image.getpixel((2, 2))
        ((9, 8, 7), (0, 0, 0))

    Raises `PromptError` for a box that is empty, outside, or overlaps another: what a box holds
    would not be known.
    """
    image = background.convert("RGB")
    done: list[Rectangle] = []
    for box, content in boxes:
        left, top, right, bottom = box
        if not (0 <= left < right <= image.width and 0 <= top < bottom <= image.height):
            raise PromptError(
                f"the box {box} is empty or outside the picture of {image.width} x "
                f"{image.height} pixels."
            )
        for other in done:
            if left < other[2] and other[0] < right and top < other[3] and other[1] < bottom:
                raise PromptError(f"the boxes {other} and {box} overlap.")
        done.append(box)
        if isinstance(content, Image.Image):
            content = content.convert("RGB").resize((right - left, bottom - top))
        image.paste(content, box)
    return image


def rendered_text(
    text: str,
    size: Size,
    font_size: int = 16,
    color: Color = BLACK,
    background: Color = WHITE,
    margin: int = 4,
) -> TextPicture:
    """Words from the top left, wrapped at the right edge, in Pillow's own font.

    Example:
        >>> picture = rendered_text("The code is 7", size=(80, 60))
        >>> left, top, right, bottom = picture.box("7")
        >>> 0 <= left < right <= 80 and 0 <= top < bottom <= 60
        True

    Boxes are measured in the drawn pixels, so they are exact. Line ends in the text start a new
    line. Raises `PromptError` for text without ink, or if a word does not fit.
    """
    if color == background:
        raise PromptError(f"text and background are both {color}, so the text cannot be seen.")
    image = flat(background, size)
    font = ImageFont.load_default(font_size)
    draw = ImageDraw.Draw(image)
    space = draw.textlength(" ", font=font)
    ascent_descent = draw.textbbox((0, 0), "Ég|y", font=font)
    line_height = int(ascent_descent[3] + max(2, font_size // 4))
    words: list[Word] = []
    y = float(margin)
    for line in text.split("\n"):
        x = float(margin)
        for word in line.split():
            width = draw.textlength(word, font=font)
            if x > margin and x + width > size[0] - margin:
                x, y = float(margin), y + line_height
            alone = Image.new("L", size)
            ImageDraw.Draw(alone).text((round(x), round(y)), word, fill=255, font=font)
            ink = alone.getbbox()
            if ink is None or x + width > size[0] - margin or y + line_height > size[1]:
                raise PromptError(
                    f"the word {word!r} does not fit in {size[0]} x {size[1]} pixels at font size "
                    f"{font_size}; make the picture larger or the font smaller."
                )
            image.paste(color, (0, 0), alone)
            words.append(Word(word, ink))
            x += width + space
        y += line_height
    if not words:
        raise PromptError("the text has no words to render.")
    return TextPicture(image, tuple(words))
