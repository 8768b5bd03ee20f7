"""OCR heads: evidence, graded hits, rows, filters; planted heads are found, in their row only."""

import functools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import interp
from interp.core import Prompt, PromptError, Segment
from interp.core.errors import NumericalError
from interp.heads import ocr
from interp.models.model import Model

IMAGE_TOKEN, START, END = 96, 94, 93


def image_prompt(architecture: str, seed: int = 0, after: int = 5) -> interp.Prompt:
    """A picture made by hand: 9 tokens for LLaVA, 6 for Qwen."""
    rng = np.random.default_rng(seed)
    front, back = rng.integers(3, 90, 3), rng.integers(3, 90, after)
    if architecture == "llava":
        ids, span = [*front, *[IMAGE_TOKEN] * 9, *back], (3, 12)
        inputs = {"pixel_values": rng.standard_normal((1, 3, 24, 24)).astype(np.float32)}
    else:
        ids, span = [*front, START, *[IMAGE_TOKEN] * 6, END, *back], (4, 10)
        inputs = {"pixel_values": rng.standard_normal((24, 96)).astype(np.float32),
                  "image_grid_thw": np.array([[1, 4, 6]]),
                  "mm_token_type_ids": np.array([[int(i == IMAGE_TOKEN) for i in ids]])}
    prompt = interp.Prompt.from_tokens(ids, {"image": span})
    return interp.Prompt(prompt.ids, prompt.segments, inputs=inputs)


@pytest.fixture(scope="module")
def opened(tiny):
    """architecture -> the tiny model, opened once."""
    return functools.cache(lambda architecture: Model(tiny(architecture), f"tiny-{architecture}"))


def planted(model: Model, write) -> Model:
    """The same model, in which every run is written to."""
    run, other = model.run, Model.__new__(Model)
    other.__dict__.update(model.__dict__)
    other.run = lambda p, **more: run(p, write=write, **more)
    return other


def looks(layer: int, head: int, query: int, key: int, n: int):
    """All attention of one row is moved to one key."""
    return interp.redistribute(
        [p for p in range(n) if p != key], [key], 1.0, queries=[query],
        heads=[interp.Head(layer, head)], min_nonsink_share=None, min_image_mass=None)


# -- evidence ---------------------------------------------------------------------------------

GRID = Segment("image", tuple(range(5, 17)), "image", (3, 4),
               tuple((28 * c, 28 * r, 28 * c + 28, 28 * r + 28) for r in range(3) for c in range(4)))


def test_a_word_over_many_patches_and_a_small_digit_both_have_evidence():
    wide, small = (2, 30, 110, 54), (60, 2, 64, 8)
    assert ocr.evidence(GRID, wide) == (9, 10, 11, 12)
    assert ocr.evidence(GRID, small) == (7,)
    # A single rule about the patch loses the digit, one about the box loses words of many patches.
    with pytest.raises(PromptError, match="no image token overlaps"):
        ocr.evidence(GRID, small, of="patch")
    with pytest.raises(PromptError, match="no image token overlaps"):
        ocr.evidence(GRID, wide, 0.3, of="box")


@settings(max_examples=60, deadline=None)
@given(st.tuples(*[st.integers(0, 80)] * 2, *[st.integers(1, 30)] * 2))
def test_overlaps_are_shares_of_the_same_area(corner):
    x, y, w, h = corner
    box, patch = (x, y, x + w, y + h), (28, 28, 56, 56)
    xs = set(range(x, x + w)) & set(range(28, 56))
    ys = set(range(y, y + h)) & set(range(28, 56))
    shared = len(xs) * len(ys)
    of = {kind: ocr.overlap(patch, box, kind) for kind in
          ("patch", "box", "smaller", "union", "released")}
    assert of["patch"] == pytest.approx(shared / 784) and of["box"] == pytest.approx(shared / (w * h))
    assert of["smaller"] == pytest.approx(max(of["patch"], of["box"]))
    assert of["union"] == pytest.approx(shared / (784 + w * h - shared))
    assert of["released"] == pytest.approx(100 * of["box"])
    assert of["union"] <= min(of["patch"], of["box"]) + 1e-12 and of["smaller"] <= 1 + 1e-12


def test_the_released_rule_takes_every_touch():
    box = (0, 0, 56.2, 28)  # two patches, and a fifth of a pixel of the third
    assert ocr.evidence(GRID, box) == (5, 6)
    assert ocr.evidence(GRID, box, 0.1, of="released") == (5, 6, 7)


def test_separators_and_unknown_geometry():
    boxes = ((0, 0, 8, 8), None, (8, 0, 16, 8))
    image = Segment("image", (3, 4, 5), "image", None, boxes)
    assert ocr.evidence(image, (0, 0, 16, 8)) == (3, 5)
    with pytest.raises(PromptError, match="no pixel boxes"):
        ocr.evidence(Segment("image", (3, 4), "image"), (0, 0, 1, 1))
    with pytest.raises(PromptError, match=r"box \(90, 0, 95, 5\)"):
        ocr.evidence(image, (90, 0, 95, 5))


# -- grading ----------------------------------------------------------------------------------


@settings(max_examples=80, deadline=None)
@given(st.lists(st.integers(0, 3), min_size=1, max_size=7), st.lists(st.integers(0, 3), max_size=8))
def test_the_longest_run_is_that_of_all_substrings(answer, output):
    start, at, length = ocr.longest_run(answer, output)
    assert answer[start : start + length] == output[at : at + length]
    every = [answer[i:j] for i in range(len(answer)) for j in range(i + 1, len(answer) + 1)]
    said = [output[i:j] for i in range(len(output)) for j in range(i + 1, len(output) + 1)]
    assert length == max([len(x) for x in every if x in said], default=0)
    assert ocr.correctness(answer, output) == length / len(answer)


def test_a_sample_is_hits_of_what_was_said_times_correctness():
    where = [[5], [6, 7], [8]]
    top = torch.tensor([[[0, 5]], [[5, 5]], [[6, 5]], [[8, 5]]])
    # Said in full, one token later than the output begins.
    full = ocr.score(top, [9, 1, 2, 3], [1, 2, 3], where)
    assert full.flatten().tolist() == pytest.approx([1.0, 1 / 3])
    # Only the last two tokens: hits (2 of 2) times correctness (2 of 3).
    part = ocr.score(top, [9, 9, 2, 3], [1, 2, 3], where)
    assert part.flatten().tolist() == pytest.approx([2 / 3, 0.0])
    assert ocr.score(top, [9, 9, 9, 9], [1, 2, 3], where).tolist() == [[0.0, 0.0]]
    # The rows of what was not said do not count, whatever they look at.
    noisy = top.clone()
    noisy[0] = 8
    assert torch.equal(ocr.score(noisy, [9, 1, 2, 3], [1, 2, 3], where), full)
    assert ocr.score(torch.full_like(top, -1), [9, 1, 2, 3], [1, 2, 3], where).sum() == 0


def test_text_retrieval_is_graded_the_same_way():
    ids = [4, 1, 2, 1, 3]
    top = torch.tensor([[[1, 0]], [[2, 2]], [[3, 4]]])
    found = ocr.text_retrieval_score(top, [1, 2, 3], [1, 2, 3], ids)
    assert found.flatten().tolist() == pytest.approx([2 / 3, 2 / 3])
    # Another place with the same token counts as well: that is its definition.
    top[0, 0, 0] = 3
    assert torch.equal(ocr.text_retrieval_score(top, [1, 2, 3], [1, 2, 3], ids), found)


def test_the_released_filter_is_the_inverse_of_the_described_one():
    rng = np.random.default_rng(0)
    samples = np.zeros((20, 1, 4))
    samples[:, 0, 0] = 1.0  # always reads
    samples[:12, 0, 1] = 1.0  # reads in some samples
    samples[:1, 0, 2] = 0.9  # hardly ever
    samples[:, 0, 3] = rng.uniform(0.2, 0.4, 20)  # always, a little
    assert ocr.select(samples).tolist() == [[True, True, False, True]]
    assert ocr.select(samples, filter="activated").tolist() == [[True, True, False, True]]
    assert ocr.select(samples, filter="released").tolist() == [[False, True, False, False]]
    # Rare but high: the described filter drops it, the released one keeps it.
    rare = np.zeros((20, 1, 1))
    rare[:1] = 3.0
    assert ocr.select(rare).item() and not ocr.select(rare, filter="activated").item()
    assert ocr.select(rare, filter="released").item()
    with pytest.raises(NumericalError, match="NaN"):
        ocr.select(samples * np.nan)


def test_every_head_is_in_one_bin():
    scores = np.array([[0.0, 0.0, 0.05, 0.1], [0.100001, 0.3, 0.5, 1.0]])
    assert ocr.in_bins(scores) == [2, 2, 2, 1, 1]
    assert sum(ocr.in_bins(np.random.default_rng(0).random((7, 9)))) == 63


# -- in models --------------------------------------------------------------------------------


@pytest.mark.parametrize("architecture", ["llava", "qwen2_5_vl"])
@pytest.mark.parametrize("row", ["predicting", "own"])
def test_scores_are_those_of_the_dense_rows(opened, architecture, row):
    """Generated with a cache and streamed, against the whole pattern and a loop."""
    model = opened(architecture)
    prompts = [image_prompt(architecture, seed, after) for seed, after in ((0, 5), (1, 8), (2, 5))]
    said = [model.run(p, new_tokens=3).new_tokens[0] for p in prompts]
    # All of it, the end of it, and nothing.
    answers = [said[0], [said[1][1], said[1][2], 92], [1, 1]]
    rng = np.random.default_rng(3)
    image = [list(p.positions("image")) for p in prompts]
    where = [[rng.choice(own, 4, replace=False).tolist() for _ in a]
             for own, a in zip(image, answers)]
    found = ocr.measure(model, prompts, answers, where, row=row, new_tokens=3)
    text = ocr.measure_text_retrieval(model, prompts, answers, row=row, new_tokens=3)
    total = 0.0
    for i, prompt in enumerate(prompts):
        n = len(prompt)
        pattern = model.run(prompt, read="pattern", new_tokens=3).reads["pattern"].values[0]
        first = n - 1 if row == "predicting" else n
        start, at, length = ocr.longest_run(answers[i], said[i])
        expected, chance, same = (np.zeros((3, 6)) for _ in range(3))
        for step in range(length):
            top = pattern[:, :, first + at + step, :n].argmax(-1)
            expected += np.isin(top, where[i][start + step])
            chance += np.isin(top, image[i]) * 4 / len(image[i])
            same += np.array(prompt.ids)[top] == answers[i][start + step]
        size = len(answers[i])
        assert np.allclose(found["samples"][i], expected / size)
        assert np.allclose(found["null_samples"][i], chance / size)
        assert np.allclose(text["samples"][i], same / size)
        total += expected.sum()
    assert found["correctness"].values.tolist() == pytest.approx([1, 2 / 3, 0])
    assert found.manifest["answered"] == 2 and found.manifest["answered in full"] == 1
    assert total > 0 and "note" not in found.manifest
    assert np.allclose(found["score"], found["samples"].mean("sample"))


@pytest.mark.parametrize("architecture", ["llava", "qwen2_5_vl"])
def test_a_planted_head_is_found_and_not_where_the_evidence_is_another(opened, architecture):
    model, prompt = opened(architecture), image_prompt(architecture)
    n, image = len(prompt), list(prompt.positions("image"))
    # In the last row one head looks at one patch, another at another patch, the rest at token 0;
    # one more looks at the first patch a row too early.
    seen = {**{head: 0 for head in range(6)}, 4: image[3], 2: image[0]}
    made = planted(model, [looks(1, head, n - 1, key, n) for head, key in seen.items()]
                   + [looks(1, 1, n - 2, image[3], n)])
    said = made.run(prompt, new_tokens=1).new_tokens[0]
    found = ocr.measure(made, [prompt], [said], [[[image[3]]]], new_tokens=1)
    assert found["score"].values[1].tolist() == [0, 0, 0, 0, 1, 0]
    assert interp.Head(1, 4) in ocr.head_scores(found).above(0.9)
    assert float(found["null"][1, 4]) == pytest.approx(1 / len(image))
    assert float(found["null"][1, 0]) == 0  # it does not look at the image at all
    other = ocr.measure(made, [prompt], [said], [[[image[0]]]], new_tokens=1)
    assert other["score"].values[1].tolist() == [0, 0, 1, 0, 0, 0]


def test_an_answer_that_is_not_given_scores_nan_and_says_so(opened):
    model, prompts = opened("llava"), [image_prompt("llava", s) for s in range(3)]
    said = [model.run(p, new_tokens=2).new_tokens[0] for p in prompts]
    never = next(t for t in range(3, 90) if all(t not in row for row in said))
    found = ocr.measure(model, prompts, [[never]] * 3, [[[4]]] * 3)
    assert found["score"].isnull().all() and found["frequency"].isnull().all()
    assert found.manifest["answered"] == 0 and found.manifest["samples"] == 3
    assert "none of 3 answers" in found.manifest["note"]
    assert ocr.head_scores(found).top(5) == []


def test_a_head_whose_window_hides_the_evidence_is_not_eligible(opened):
    prompt = Prompt.from_tokens(range(3, 17), {"image": (2, 13)})
    model = opened("gemma3")  # windows of five keys in the first and last layer
    said = model.run(prompt, new_tokens=1).new_tokens[0]
    early, late = (ocr.measure(model, [prompt], [said], [[[key]]], new_tokens=1)
                   for key in (3, 11))
    assert early["eligible"].all("head").values.tolist() == [False, True, False]
    assert late["eligible"].values.all()


def test_looker_reads_with_heads_that_look_at_the_digit():
    """On the bundled model: the same heads do not point at the digits of another picture."""
    from interp.prompts import scenes

    model, rng = interp.open_model("looker"), np.random.default_rng(5)
    prompts, answers, where = [], [], []
    for scene in scenes.scenes(rng, 12, numbers=1):
        (question,) = scenes.questions(scene, rng, tasks=("read",))
        prompt = model.prompt(question.text, images=[scenes.draw(scene)], chat=True)
        prompts.append(prompt)
        answers.append(model.tokenizer(question.answer, add_special_tokens=False)["input_ids"])
        where.append([ocr.evidence(prompt.of_kind("image")[0], box) for box in question.boxes])
    found = ocr.measure(model, prompts, answers, where)
    best = ocr.head_scores(found).top(3)
    assert found.manifest["answered in full"] >= 8
    assert ocr.head_scores(found).max() > 0.7
    own = ocr.measure(model, prompts, answers, where, row="own")
    # Digits that exist in the next picture: its first one stands for all.
    elsewhere = [[where[(i + 1) % 12][0]] * len(a) for i, a in enumerate(answers)]
    other = ocr.measure(model, prompts, answers, elsewhere)
    for head in best:
        here, late, wrong = (ocr.head_scores(x)[head] for x in (found, own, other))
        assert here > 3 * late and here > 3 * wrong
        assert here > 3 * float(found["null"].sel(layer=head.layer, head=head.head))


def test_bad_input_is_one_sentence(opened):
    model, good = opened("llava"), image_prompt("llava")
    bare = Prompt.from_tokens(range(3, 12))
    with pytest.raises(PromptError, match="prompt 1 has no image"):
        ocr.measure(model, [good, bare], [[5], [5]], [[[4]], [[4]]])
    with pytest.raises(ValueError, match="2 answer tokens but evidence for 1"):
        ocr.measure(model, [good], [[5, 6]], [[[4]]])
    with pytest.raises(ValueError, match="1 output tokens but top keys of 2 rows"):
        ocr.score(torch.zeros(2, 1, 1, dtype=torch.long), [5], [5], [[4]])
    with pytest.raises(ValueError, match="answer is empty"):
        ocr.correctness([], [5])
    with pytest.raises(PromptError, match="no prompts"):
        ocr.measure(model, [], [], [])
