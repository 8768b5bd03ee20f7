"""Pictures hold what their boxes say, and nothing outside them."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from interp.core import PromptError
from interp.prompts.image import BLACK, WHITE, cell_box, flat, placed, rendered_text

TEXT = "The code of amber is 7\nTopaz: 12, g|y"


@pytest.mark.parametrize("font_size, size", [(10, (90, 80)), (16, (150, 110)), (31, (260, 200))])
@pytest.mark.parametrize("color, background", [(BLACK, WHITE), ((250, 240, 10), (10, 30, 60))])
def test_every_drawn_pixel_is_in_a_words_box_and_every_box_is_tight(
    font_size, size, color, background
):
    picture = rendered_text(TEXT, size, font_size, color, background)
    ink = (np.asarray(picture.image) != np.array(background)).any(2)
    assert [word.text for word in picture.words] == TEXT.split()
    covered = np.zeros_like(ink)
    for word in picture.words:
        left, top, right, bottom = word.box
        own = ink[top:bottom, left:right]
        assert not covered[top:bottom, left:right].any(), "two words share pixels"
        covered[top:bottom, left:right] = True
        assert own[0].any() and own[-1].any() and own[:, 0].any() and own[:, -1].any()
    assert not (ink & ~covered).any()


def test_words_are_in_reading_order_and_lines_wrap():
    picture = rendered_text(TEXT, (90, 110), 14)
    places = [(word.box[3] // 19, word.box[0]) for word in picture.words]
    assert places == sorted(places)
    assert len({row for row, _ in places}) > TEXT.count("\n") + 1
    assert all(word.box[2] <= 90 - 4 + 1 for word in picture.words)


def test_erasing_a_words_box_erases_that_word_only():
    picture = rendered_text("one two", (100, 30))
    erased = placed(picture.image, [(picture.box("two"), WHITE)])
    alone = rendered_text("one", (100, 30))
    assert np.array_equal(np.asarray(erased), np.asarray(alone.image))


def test_a_word_is_found_by_its_text_only_if_it_is_alone():
    picture = rendered_text("one two one", (120, 30))
    assert picture.box("two") == picture.words[1].box
    with pytest.raises(PromptError, match="'one' is 2 times"):
        picture.box("one")
    with pytest.raises(PromptError, match="'three' is 0 times"):
        picture.box("three")


@pytest.mark.parametrize("text, size, options, sentence", [
    ("unfittable", (30, 40), {}, "'unfittable' does not fit in 30 x 40 pixels at font size 16"),
    ("one two three four", (60, 30), {}, "does not fit"),
    (" ", (60, 30), {}, "no words"),
    ("one", (60, 30), {"color": WHITE}, "cannot be seen"),
])
def test_text_that_cannot_be_shown_is_refused(text, size, options, sentence):
    with pytest.raises(PromptError, match=sentence):
        rendered_text(text, size, **options)


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 5), st.integers(1, 4), st.integers(1, 6), st.integers(1, 7))
def test_cells_tile_the_picture(rows, columns, w, h):
    size = (columns * w, rows * h)
    image = flat(BLACK, size)
    cells = [(cell_box(size, (rows, columns), r, c), (r + 1, c + 1, 9))
             for r in range(rows) for c in range(columns)]
    pixels = np.asarray(placed(image, cells))
    expected = np.stack(np.meshgrid(np.arange(rows) + 1, np.arange(columns) + 1, indexing="ij"), -1)
    assert np.array_equal(pixels[..., :2], expected.repeat(h, 0).repeat(w, 1))


def test_placing_leaves_the_background_alone_and_takes_pictures():
    background = flat((1, 2, 3), (6, 5))
    image = placed(background, [((0, 0, 2, 2), WHITE), ((2, 1, 6, 5), Image.new("L", (2, 2), 77))])
    assert background.getpixel((0, 0)) == (1, 2, 3)
    pixels = np.asarray(image)
    assert (pixels[:2, :2] == 255).all() and (pixels[1:, 2:] == 77).all()
    assert (pixels[0, 2:] == [1, 2, 3]).all() and (pixels[2:, :2] == [1, 2, 3]).all()


@pytest.mark.parametrize("boxes, sentence", [
    ([((0, 0, 7, 2), WHITE)], "outside the picture of 6 x 5 pixels"),
    ([((2, 2, 2, 4), WHITE)], "is empty or outside"),
    ([((0, 0, 3, 3), WHITE), ((2, 2, 4, 4), BLACK)], "overlap"),
])
def test_boxes_whose_content_would_not_be_known_are_refused(boxes, sentence):
    with pytest.raises(PromptError, match=sentence):
        placed(flat(BLACK, (6, 5)), boxes)


def test_cells_that_do_not_exist_are_refused():
    with pytest.raises(PromptError, match="does not divide 7 x 6 pixels"):
        cell_box((7, 6), (2, 2), 0, 0)
    with pytest.raises(PromptError, match=r"cell \(2, 0\) is outside"):
        cell_box((8, 6), (2, 2), 2, 0)
    with pytest.raises(PromptError, match="is empty"):
        flat(BLACK, (0, 4))
