"""Rendered pages: boxes hold exactly the ink of their words, keys are where they are said to be."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from interp.core import PromptError
from interp.prompts import rendered_text
from interp.prompts.rendered_text import pages, passkey, word_of_token

TEXT = "one river two bridges and a long afternoon of rain in the valley below"


def test_every_word_is_on_a_page_and_all_ink_is_in_boxes():
    made = pages(TEXT, characters=20, lines=2)
    assert [w.text for page in made for w in page.words] == TEXT.split()
    assert len(made) == 2 and len({page.image.size for page in made}) == 1
    for page in made:
        dark = np.asarray(page.image).min(-1) < 255
        covered = np.zeros_like(dark)
        for word in page.words:
            left, top, right, bottom = word.box
            own = dark[top:bottom, left:right]
            # Tight: ink on every side of the box.
            assert own[0].any() and own[-1].any() and own[:, 0].any() and own[:, -1].any()
            covered[top:bottom, left:right] = True
        assert not (dark & ~covered).any()


def test_lines_are_no_longer_than_asked_and_pages_no_fuller():
    text = " ".join(rendered_text.FILLER * 6)
    made = pages(text)
    for page in made:
        rows: dict[int, list[str]] = {}
        line, before = 0, -1
        for word in page.words:
            line += word.box[0] < before
            before = word.box[0]
            rows.setdefault(line, []).append(word.text)
        assert len(rows) <= 15 and max(len(" ".join(r)) for r in rows.values()) <= 50
    assert len(made) > 1


@pytest.mark.parametrize("depth, first, last", [(0.0, 0.0, 0.2), (0.5, 0.3, 0.7), (1.0, 0.8, 1.0)])
def test_a_key_lies_at_its_depth_and_in_its_boxes(depth, first, last):
    hidden = passkey(np.random.default_rng(4), characters=2500, depth=depth)
    assert len(hidden.pages) > 2 and hidden.answer == " ".join(hidden.groups)
    assert len(set(hidden.groups)) == 3 and all(g.isdigit() for g in hidden.groups)
    assert first <= hidden.text.index(hidden.answer) / len(hidden.text) <= last
    for group, (page, box) in zip(hidden.groups, hidden.places):
        assert hidden.pages[page].box(group) == box
    assert [p.image for p in hidden.pages] == hidden.images


def test_a_square_page_has_the_same_words_in_the_same_boxes():
    plain, square = (pages(TEXT, characters=20, lines=2, square=s) for s in (False, True))
    width, height = plain[0].image.size
    assert width != height and {p.image.size for p in square} == {(max(width, height),) * 2}
    assert [p.words for p in plain] == [p.words for p in square]


def test_keys_differ_with_the_seed_and_repeat_with_it():
    one, same, other = (passkey(np.random.default_rng(seed), 200) for seed in (0, 0, 1))
    assert one.groups == same.groups and one.text == same.text != other.text
    assert np.array_equal(np.asarray(one.images[0]), np.asarray(same.images[0]))


@settings(max_examples=40, deadline=None)
@given(st.lists(st.text("0123456789", min_size=1, max_size=4), min_size=1, max_size=4), st.data())
def test_each_token_belongs_to_the_word_it_spells(words, data):
    text = " ".join(words)
    cuts = sorted(data.draw(st.sets(st.integers(1, max(1, len(text) - 1)))))
    pieces = [text[a:b] for a, b in zip([0, *cuts], [*cuts, len(text)]) if text[a:b]]
    found = word_of_token(pieces, words)
    # By brute force: the word of a piece's first digit, else of the next digit after it.
    owner = [i for i, word in enumerate(words) for _ in word]
    at, expected = 0, []
    for piece in pieces:
        expected.append(owner[min(at, len(owner) - 1)])
        at += len(piece.replace(" ", ""))
    assert list(found) == expected


def test_bad_input_is_one_sentence():
    with pytest.raises(PromptError, match="no words"):
        pages("  \n ")
    with pytest.raises(PromptError, match="longer than a line of 5"):
        pages("afternoon", characters=5)
    with pytest.raises(ValueError, match="depth"):
        passkey(np.random.default_rng(0), depth=1.5)
    with pytest.raises(PromptError, match="spell '48', not '915'"):
        word_of_token(["48"], ["915"])
