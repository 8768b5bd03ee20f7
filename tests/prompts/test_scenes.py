"""Scenes: the layout that is claimed is the layout that is painted, and every question has one
right answer.
"""

import re
from dataclasses import replace

import numpy as np
import pytest

from interp.prompts import scenes as module
from interp.prompts.scenes import (
    CELL,
    COLORS,
    COUNTS,
    GRID,
    SHAPES,
    SIDE,
    TASKS,
    Question,
    Scene,
    cell_box,
    draw,
    handwriting,
    questions,
    scene,
    scenes,
    words,
)


def generator(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


def painted(picture: Scene) -> np.ndarray:
    """Pixels that differ from the (noiseless) background."""
    flat = picture.pixels.reshape(-1, 3)
    colors, counts = np.unique(flat, axis=0, return_counts=True)
    background = colors[counts.argmax()].astype(int)
    return (np.abs(picture.pixels.astype(int) - background) > 8).any(-1)


def inside(boxes) -> np.ndarray:
    mask = np.zeros((SIDE, SIDE), bool)
    for left, top, right, bottom in boxes:
        mask[top:bottom, left:right] = True
    return mask


def test_the_same_seed_gives_the_same_scene_and_another_seed_another_one():
    one, same, other = (scene(generator(seed)) for seed in (3, 3, 4))
    assert np.array_equal(one.pixels, same.pixels) and one.objects == same.objects
    assert not np.array_equal(one.pixels, other.pixels) and one.objects != other.objects


def test_every_painted_pixel_lies_in_a_box_and_every_box_is_filled():
    for picture in scenes(generator(), 40, noise=0.0):
        mask = painted(picture)
        boxes = [box for thing in picture.objects for box in thing.boxes]
        assert not (mask & ~inside(boxes)).any()
        for left, top, right, bottom in boxes:
            assert mask[top:bottom, left:right].mean() > 0.15
        # the control: boxes of another place do not hold the picture's objects
        moved = [
            (left, (top + 3 * CELL) % SIDE, right, (top + 3 * CELL) % SIDE + bottom - top)
            for left, top, right, bottom in boxes
        ]
        assert (mask & ~inside(moved)).any()


def test_shape_boxes_are_tight():
    for picture in scenes(generator(1), 20, numbers=0, noise=0.0):
        mask = painted(picture)
        for thing in picture.objects:
            left, top, right, bottom = thing.box
            cut = mask[top:bottom, left:right]
            # a pointed shape fades out over at most one row or column
            assert cut[:2].any() and cut[-2:].any() and cut[:, :2].any() and cut[:, -2:].any()


def test_each_box_lies_in_its_cell_and_no_cell_is_used_twice():
    for picture in scenes(generator(2), 30):
        cells = [cell for thing in picture.objects for cell in thing.cells]
        assert len(set(cells)) == len(cells)
        for thing in picture.objects:
            for (left, top, right, bottom), cell in zip(thing.boxes, thing.cells, strict=True):
                x0, y0, x1, y1 = cell_box(cell)
                assert x0 <= left < right <= x1 and y0 <= top < bottom <= y1


def test_numbers_stand_in_one_row_apart_from_each_other_and_objects_are_in_reading_order():
    for picture in scenes(generator(3), 60, numbers=(2, 3)):
        assert [thing.cells[0] for thing in picture.objects] == sorted(
            thing.cells[0] for thing in picture.objects
        )
        owner = {}
        for index, thing in enumerate(picture.objects):
            if thing.kind != "number":
                continue
            assert len({row for row, _ in thing.cells}) == 1
            columns = [column for _, column in thing.cells]
            assert columns == list(range(columns[0], columns[0] + len(thing.digits)))
            assert thing.name == " ".join(map(str, thing.digits))
            owner |= dict.fromkeys(thing.cells, index)
        for (row, column), index in owner.items():
            assert owner.get((row, column + 1), index) == index


def test_the_color_that_is_named_is_the_color_that_is_painted():
    for picture in scenes(generator(4), 60, numbers=0):
        for thing in picture.objects:
            left, top, right, bottom = thing.box
            pixels = picture.pixels[top:bottom, left:right].reshape(-1, 3).astype(float)
            # edges mix with the background: compare the pixels nearest to each name
            far = {
                name: np.quantile(np.linalg.norm(pixels - np.array(rgb), axis=1), 0.2)
                for name, rgb in COLORS.items()
            }
            assert min(far, key=far.get) == thing.color


# --------------------------------------------------------------------------------- handwriting


def test_held_out_handwriting_is_never_in_the_training_split():
    train, held = handwriting(False), handwriting(True)
    assert len(train[0]) + len(held[0]) == 1797
    assert not {image.tobytes() for image in train[0]} & {image.tobytes() for image in held[0]}
    assert set(train[1]) == set(held[1]) == set(range(10))


@pytest.mark.parametrize("held_out", [True, False])
def test_a_scene_is_written_with_the_handwriting_of_its_split(held_out):
    own = module._digit_bank(held_out, 0 if held_out else 12)[1].reshape(-1, 144)
    foreign = module._digit_bank(not held_out, 0 if not held_out else 12)[1].reshape(-1, 144)

    def best(bank, ink):
        bank = bank - bank.mean(1, keepdims=True)
        return ((bank @ (ink - ink.mean())) / np.linalg.norm(bank, axis=1)).max()

    checked = 0
    for picture in scenes(generator(5), 12, shapes=0, numbers=1, held_out=held_out, noise=0.0):
        gray = picture.pixels.astype(float).mean(-1)
        for cell in picture.numbers[0].cells:
            x, y = cell_box(cell)[:2]
            places = [
                gray[y + dy : y + dy + 12, x + dx : x + dx + 12].ravel()
                for dy in range(3)
                for dx in range(3)
            ]
            assert max(best(own, p) for p in places) > max(best(foreign, p) for p in places)
            checked += 1
    assert checked > 12


# --------------------------------------------------------------------------------- questions


def right_answers(picture: Scene, question: Question) -> set[str]:
    """Every answer a reader of the question could defend, found again from the objects alone."""
    shapes = [thing for thing in picture.objects if thing.kind == "shape"]
    numbers = [thing for thing in picture.objects if thing.kind == "number"]
    text = question.text
    if found := re.fullmatch(r"what color is the (\w+) \?", text):
        return {
            (thing.color) if list(s.shape for s in shapes).count(found[1]) == 1 else "ambiguous"
            for thing in shapes
            if thing.shape == found[1]
        }
    if found := re.fullmatch(r"what shape is the (\w+) thing \?", text):
        hits = [thing.shape for thing in shapes if thing.color == found[1]]
        return set(hits) if len(hits) == 1 else {"ambiguous"}
    if found := re.fullmatch(r"is there an? (\w+) (\w+) \?", text):
        return {"yes" if any((t.color, t.shape) == found.groups() for t in shapes) else "no"}
    if found := re.fullmatch(r"how many (\w+)( things)? are there \?", text):
        word = {"crosses": "cross"}.get(found[1], found[1].removesuffix("s"))
        hits = [
            t
            for t in shapes
            if found[1] == "shapes" or word == t.shape or (found[2] and found[1] == t.color)
        ]
        return {COUNTS[len(hits)]}
    if found := re.fullmatch(r"where is the (\w+) (\w+) \?", text):
        hits = [t for t in shapes if (t.color, t.shape) == found.groups()]
        left, top, right, bottom = hits[0].box
        place = ("top " if bottom <= SIDE // 2 else "bottom ") + (
            "left" if right <= SIDE // 2 else "right"
        )
        return {place} if len(hits) == 1 else {"ambiguous"}
    if text == "what is the number ?":
        return {" ".join(map(str, t.digits)) for t in numbers}
    if found := re.fullmatch(r"what is the number at the (top|bottom) (left|right) \?", text):
        y, x = (found[1] == "bottom") * SIDE // 2, (found[2] == "right") * SIDE // 2
        quarter = inside([(x, y, x + SIDE // 2, y + SIDE // 2)])
        touching = [t for t in numbers if (inside(t.boxes) & quarter).any()]
        whole = [t for t in touching if not (inside(t.boxes) & ~quarter).any()]
        return {t.name for t in whole} if len(touching) == 1 else {"ambiguous"}
    assert text == "describe the picture ."
    return {question.answer}


def test_every_question_has_exactly_one_right_answer():
    rng, counts = generator(6), dict.fromkeys(TASKS, 0)
    for picture in scenes(rng, 150, shapes=(0, 8), numbers=(0, 3)):
        for question in questions(picture, rng, every=True):
            assert right_answers(picture, question) == {question.answer}, question
            counts[question.task] += 1
    assert min(counts.values()) >= 60, counts


def test_ambiguous_questions_are_not_asked():
    base = scene(generator(7), shapes=2, numbers=0)
    one, two = base.objects
    twins = replace(
        base,
        objects=(
            replace(one, color="red", shape="ring", name="red ring"),
            replace(two, color="red", shape="ring", name="red ring"),
        ),
    )
    tasks = ("color", "shape", "position")
    assert questions(twins, generator(), tasks=tasks, every=True) == []
    apart = replace(
        base,
        objects=(
            replace(one, color="red", shape="ring", name="red ring"),
            replace(two, color="blue", shape="ring", name="blue ring"),
        ),
    )
    asked = questions(apart, generator(), tasks=tasks, every=True)
    assert sorted({q.task for q in asked}) == ["position", "shape"]
    assert questions(base, generator(), tasks=("read",)) == []


def test_evidence_boxes_are_those_of_the_named_objects():
    rng = generator(8)
    for picture in scenes(rng, 40):
        for question in questions(picture, rng, every=True):
            assert set(question.boxes) <= {b for t in picture.objects for b in (*t.boxes, t.box)}
            if question.task == "read":
                assert len(question.boxes) == len(question.answer.split())
                assert question.boxes == picture.objects[question.objects[0]].boxes
            if question.answer in ("no", "zero"):
                assert question.boxes == () == question.objects
            if question.task == "count":
                assert len(question.boxes) == COUNTS.index(question.answer)


def test_existence_is_balanced_and_its_hard_negatives_are_hard():
    rng, answers, hard = generator(9), [], []
    for picture in scenes(rng, 200):
        for question in questions(picture, rng, tasks=("existence",)):
            answers.append(question.answer)
            if question.answer == "no":
                hard.append(question.hard)
                color, shape = question.text.split()[3:5]
                both = any(t.color == color for t in picture.objects) and any(
                    t.shape == shape for t in picture.objects
                )
                assert both == question.hard
    assert answers.count("yes") == answers.count("no") == 200
    assert 0.3 < np.mean(hard) < 0.7


def test_every_word_is_in_the_vocabulary():
    rng, known = generator(10), set(words())
    used = {
        word
        for picture in scenes(rng, 100, shapes=(0, 8), numbers=(0, 2))
        for q in questions(picture, rng, every=True)
        for word in (q.text + " " + q.answer).split()
    }
    assert used <= known
    assert set(COLORS) | set(SHAPES) <= used


def test_draw_keeps_the_pixels_and_enlarges_without_mixing():
    picture = scene(generator(11))
    assert np.array_equal(np.asarray(draw(picture)), picture.pixels)
    assert np.array_equal(np.asarray(draw(picture, 3))[1::3, 1::3], picture.pixels)


def test_bad_requests_are_named():
    with pytest.raises(ValueError, match="shapes=40"):
        scene(generator(), shapes=40)
    with pytest.raises(ValueError, match=r"numbers=\(2, 1\)"):
        scene(generator(), numbers=(2, 1))
    with pytest.raises(ValueError, match="unknown task 'colour'"):
        questions(scene(generator()), generator(), tasks=("colour",))
    with pytest.raises(ValueError, match="9 shapes"):
        questions(scene(generator(), shapes=9), generator())


def test_the_grid_is_what_the_sizes_say():
    assert GRID * CELL == SIDE == scene(generator()).pixels.shape[0]
    assert inside([cell_box((r, c)) for r in range(GRID) for c in range(GRID)]).all()
