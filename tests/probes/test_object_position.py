"""Positions of objects: read where planted, never from the kinds alone, captions turned word by word."""

import numpy as np
import pytest

from probes import linear
from probes import object_position as objects

IMAGES, EACH, D = 50, 3, 6


def scenes(seed=0):
    rng = np.random.default_rng(seed)
    boxes = rng.uniform(0, 60, (IMAGES * EACH, 4))
    boxes[:, 2:] = boxes[:, :2] + rng.uniform(5, 40, (IMAGES * EACH, 2))
    return objects.coordinates(boxes, (100, 100)), np.repeat(np.arange(IMAGES), EACH), rng


def test_coordinates_are_centers_and_sizes_of_each_picture():
    boxes = np.array([[0.0, 10.0, 20.0, 30.0], [0.0, 10.0, 20.0, 30.0]])
    made = objects.coordinates(boxes, [(40, 40), (80, 20)])
    assert made.tolist() == [[0.25, 0.5, 0.5, 0.5], [0.125, 1.0, 0.25, 1.0]]


def test_boxes_are_read_in_the_layer_that_holds_them_and_not_when_shuffled():
    places, images, rng = scenes()
    states = rng.standard_normal((3, len(places), D))
    states[1, :, :2] += 20 * places[:, :2]
    found = objects.regress_boxes(states, places, images, names=("x", "width"), permutations=40)
    x, width = found["x"], found["width"]
    assert int(x["score"].values.argmax()) == 1 and float(x["score"][1]) > 0.5
    assert float(x["p"][1]) < 0.05
    assert float(width["p"].min()) > 0.05 and float(width["score"].max()) < 0.2
    shuffled = objects.regress_boxes(states, rng.permutation(places), images, names=("x",),
                                     permutations=10)
    assert float(shuffled["x"]["score"].max()) < 0.2


def test_no_picture_lies_in_training_and_test():
    # States tell the picture only, and the objects of a picture lie close together.
    places, images, rng = scenes()
    places[:, 0] = rng.random(IMAGES)[images] + 0.01 * rng.random(len(images))
    states = (np.eye(IMAGES)[images] + 0.01 * rng.standard_normal((len(images), IMAGES)))[None]
    more = dict(names=("x",), permutations=5)
    assert float(objects.regress_boxes(states, places, images, **more)["x"]["score"][0]) < 0.1
    alone = np.arange(len(images))
    assert float(objects.regress_boxes(states, places, alone, **more)["x"]["score"][0]) > 0.3


def test_pairs_are_all_those_of_one_picture_in_random_order():
    places, images, _ = scenes()
    couples, left = objects.pairs(places, images)
    assert len(couples) == IMAGES * 3 and (images[couples[:, 0]] == images[couples[:, 1]]).all()
    assert (left == (places[couples[:, 0], 0] < places[couples[:, 1], 0])).all()
    assert 0.3 < left.mean() < 0.7 and 0.3 < (couples[:, 0] < couples[:, 1]).mean() < 0.7
    few, _ = objects.pairs(places, images, "above", margin=0.2)
    assert (np.abs(places[few[:, 0], 1] - places[few[:, 1], 1]) > 0.2).all() and len(few) < len(couples)
    with pytest.raises((ValueError, TypeError)):
        objects.pairs(places, images, "behind")


def test_mutual_position_is_found_where_it_was_planted():
    places, images, rng = scenes()
    states = rng.standard_normal((3, len(places), D))
    states[2, :, 0] += 30 * places[:, 0]
    couples, left = objects.pairs(places, images)
    found = objects.mutual(states, couples, left, images=images, kinds=rng.integers(
        3, size=len(places)))
    share = found["right"].mean("pair").values
    assert share[2] > 0.85 and (share[:2] < 0.65).all()
    assert found["chosen"].values.tolist() == [2] * 5
    assert (found["nested"] == found["right"].sel(layer=2)).all()
    assert objects.gain(found, resamples=300).interval[0] > 0.15


def test_the_quick_ridge_is_the_pipeline_s():
    rng = np.random.default_rng(0)
    x, y = rng.standard_normal((60, 7)) * [1, 9, 0.1, 1, 1, 1, 1], rng.random(60) < 0.4
    train, test = np.arange(40), np.arange(40, 60)
    for width in (7, 3):
        found = objects._ridge(x[:, :width], y, train, test)
        expected = linear.ridge(width).fit(x[train, :width], y[train]).predict(x[test, :width])
        assert np.array_equal(found, expected)


def test_what_the_kinds_tell_is_no_position_of_the_states():
    # Kind 0 is always left of kind 1, and states hold the kind alone.
    places, images, rng = scenes()
    kinds = np.tile([0, 1, 2], IMAGES)
    places[:, 0] = kinds + 0.1 * rng.random(len(kinds))
    states = rng.standard_normal((1, len(places), D)) * 0.1
    states[0, :, :3] += np.eye(3)[kinds]
    couples, left = objects.pairs(places, images)
    found = objects.mutual(states, couples, left, images=images, kinds=kinds)
    assert float(found["nested"].mean()) > 0.95  # which looks like position
    assert float(found["by_kind"].mean()) > 0.95
    assert abs(objects.gain(found, resamples=300).value) < 0.05
    # With kinds that say nothing the same states are no better than chance.
    blind = objects.mutual(rng.standard_normal((1, len(places), D)), couples, left, images=images,
                           kinds=np.zeros(len(kinds)))
    assert 0.3 < float(blind["nested"].mean()) < 0.7 and 0.3 < float(blind["by_kind"].mean()) < 0.7


def test_position_words_are_turned_and_nothing_else():
    text = "Left of the ring , above the copper cross"
    assert objects.opposite(text) == "Right of the ring , below the copper cross"
    assert objects.opposite(objects.opposite(text)) == text
    assert objects.opposite("bottom right", ["top"]) == "top right"
    assert objects.opposite("bottom right", ["left"]) == "bottom left"
    with pytest.raises(ValueError, match="no position word"):
        objects.opposite("a bright ring")


def test_a_model_that_does_not_heed_the_word_is_at_one_half():
    rng = np.random.default_rng(0)
    blind = objects.contrast(rng.random(200), rng.random(200))
    assert blind.interval[0] < 0.5 < blind.interval[1] and "Clopper" in blind.method
    assert objects.contrast(np.ones(50), np.zeros(50)).interval[0] > 0.9
    assert objects.contrast(np.ones(50), np.ones(50)).value == 0


def test_bad_input_is_one_sentence():
    places, images, rng = scenes()
    couples, left = objects.pairs(places, images)
    states = rng.standard_normal((1, len(places), D))
    more = dict(images=images, kinds=images)
    with pytest.raises(ValueError, match="one class only"):
        objects.mutual(states, couples[left], left[left], **more)
    with pytest.raises(ValueError, match="not numbers"):
        objects.mutual(states * np.nan, couples, left, **more)
    with pytest.raises(ValueError, match=r"pairs of 1 picture\(s\)"):
        objects.mutual(states, couples, left, images=0 * images, kinds=images)
    with pytest.raises(ValueError, match="0 pairs"):
        objects.mutual(states, couples[:0], left[:0], **more)
    with pytest.raises(ValueError, match="finite score"):
        objects.contrast(np.array([np.nan]), np.array([1.0]))
