"""Prompts, segments, heads, sites and interventions: names that resolve, or say why not."""

import numpy as np
import pytest
import torch

import interp
from interp.core import Head, HeadScores, OutOfRange, PromptError, SegmentNotFound, SiteRefused
from interp.core.intervention import Array
from interp.core.segment import Segment


@pytest.fixture
def prompt():
    return interp.Prompt.from_tokens(range(10), {"image": (2, 6), "needle": [7, 9]})


def test_places_are_found_by_name_kind_number_and_slice(prompt):
    assert prompt.positions("needle") == (7, 9)
    assert prompt.positions("image") == (2, 3, 4, 5)
    assert prompt.positions("all") == tuple(range(10))
    assert prompt.positions("last") == prompt.positions(-1) == (9,)
    assert prompt.positions(slice(8, None)) == (8, 9)


@pytest.mark.parametrize("number", [3, np.int64(3), np.array(3), torch.tensor(3)])
def test_one_position_is_one_position_whatever_holds_the_number(prompt, number):
    assert prompt.positions(number) == prompt.positions([3]) == (3,)
    assert interp.block(queries=number, keys="image") == interp.block(queries=3, keys="image")


def test_several_images_share_a_kind():
    prompt = interp.Prompt.from_tokens(range(9), {"image_0": (1, 3), "image_1": (5, 7)})
    assert prompt.positions("image") == (1, 2, 5, 6)


def test_what_does_not_exist_is_named(prompt):
    with pytest.raises(SegmentNotFound, match=r"no segment 'neddle'; it has: 'image', 'needle'"):
        prompt.positions("neddle")
    with pytest.raises(OutOfRange, match="position 10 does not exist"):
        prompt.positions([10])
    with pytest.raises(OutOfRange, match="reaches position 11"):
        interp.Prompt.from_tokens(range(10), {"a": (9, 12)})
    with pytest.raises(PromptError, match="empty"):
        interp.Prompt.from_tokens([])


def test_equal_prompts_have_equal_digests_and_others_do_not(prompt):
    same = interp.Prompt.from_tokens(range(10), {"needle": [7, 9], "image": (2, 6)})
    assert prompt.digest() == same.digest()
    others = [prompt.with_segments(needle=[7, 8]), interp.Prompt.from_tokens(range(10)),
              interp.Prompt(prompt.ids, prompt.segments, inputs={"pixel_values": np.zeros(3)})]
    assert len({p.digest() for p in [prompt, *others]}) == 4


def test_a_box_finds_the_patches_under_it():
    boxes = tuple((8.0 * c, 8.0 * r, 8.0 * c + 8, 8.0 * r + 8) for r in range(2) for c in range(3))
    image = Segment("image", tuple(range(5, 11)), "image", (2, 3), boxes)
    assert image.inside((8, 0, 16, 16)) == (6, 9)
    assert image.inside((7, 0, 16, 8), min_share=0.2) == (6,)


def test_scores_rank_without_the_heads_that_are_not_eligible():
    scores = HeadScores.of(np.array([[0.1, 0.9, 0.3], [0.9, np.nan, 0.2]]),
                           eligible=np.array([[1, 1, 0], [1, 1, 1]], dtype=bool))
    assert scores.top(2) == [Head(0, 1), Head(1, 0)]
    assert scores.above(0.15) == [Head(0, 1), Head(1, 0), Head(1, 2)]
    assert scores.without("L0H1").top(1) == [Head(1, 0)]
    assert scores["L1H2"] == 0.2


def test_interventions_are_values():
    a = interp.patch("resid_post.1", np.ones(4), positions=[3, 2])
    b = interp.patch("resid_post.1", np.ones(4), positions=(3, 2))
    c = interp.patch("resid_post.1", np.ones(4) * 2, positions=(3, 2))
    assert a == b and hash(a) == hash(b) and a.key() == b.key() and a.key() != c.key()
    with pytest.raises(ValueError):
        a.value.values[0] = 5.0
    assert Array([1]) != Array([1.0])


@pytest.mark.parametrize("make, words", [
    (lambda: interp.ablate([]), "no heads"),
    (lambda: interp.ablate("L1H2", by="magic"), "'magic'"),
    (lambda: interp.ablate("L1H2", by="mean"), "needs value"),
    (lambda: interp.ablate("L1H2", phase="sometimes"), "'sometimes'"),
    (lambda: interp.ablate("head 3"), "not a head"),
    (lambda: interp.block("a", "b", layers=[1], heads=["L0H1"]), "either layers or heads"),
    (lambda: interp.edit("z.1", "smooth", 1.0), "'smooth'"),
    (lambda: interp.redistribute([0], fraction=1.5), "1.5"),
])
def test_a_wrong_argument_is_named(make, words):
    with pytest.raises(ValueError, match=words):
        make()


def test_an_unknown_site_lists_the_sites():
    with pytest.raises(SiteRefused, match="resid_post"):
        interp.Site.parse("residual")
    with pytest.raises(SiteRefused, match="layers of site 'z.x'"):
        interp.Site.parse("z.x")


def test_a_prompt_prints_short_however_long_it_is():
    long = interp.Prompt.from_tokens(range(32_000), {"bos": [0], "needle": (9, 12), "a": [2, 5]})
    said = repr(long)
    assert len(said) < 160 and "32000 tokens: 0, 1, 2" in said
    assert "bos (0), needle (9-11), a (2 positions)" in said
    assert repr(interp.Prompt((4,), text="word" * 50)).startswith("Prompt(1 token: 4; text 'wordword")
    assert "2 images" in repr(interp.Prompt((4, 5), images=(0, 0)))
