"""Visual heads: weight and concentration as defined, sinks taken out, planted heads found."""

import functools
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import interp
from interp.core.errors import NumericalError, OutOfRange, PromptError
from interp.heads import visual
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


# -- the two quantities -----------------------------------------------------------------------


@settings(max_examples=60, deadline=None)
@given(n=st.integers(2, 40), text=st.integers(0, 5), mass=st.floats(0.05, 1.0), seed=st.integers(0, 99))
def test_concentration_runs_from_even_to_one_token_at_every_size(n, text, mass, seed):
    rng = np.random.default_rng(seed)
    image = slice(text, text + n)
    rows = np.zeros((3, text + n))
    rows[0, image] = mass / n
    rows[1, text + int(rng.integers(n))] = mass
    rows[2, image] = rng.dirichlet(np.ones(n)) * mass
    even, one, some = visual.concentration(rows, image).tolist()
    assert even == pytest.approx(0, abs=1e-6) and one == pytest.approx(1)
    assert -1e-9 <= some <= 1
    nats = visual.concentration(rows, image, "none")
    assert torch.allclose(nats, visual.concentration(rows, image) * math.log(n), atol=1e-6)
    q = rows[2, image] / mass
    assert some == pytest.approx(1 + (q * np.log(np.maximum(q, 1e-300))).sum() / math.log(n))
    assert visual.weight(rows, image).tolist() == pytest.approx([mass] * 3)


def test_only_what_is_on_the_image_matters_and_in_no_order():
    rng = np.random.default_rng(0)
    rows = rng.dirichlet(np.ones(13), size=(3, 4))
    image = slice(4, 11)
    base = visual.score(rows, image)
    shuffled, moved = rows.copy(), rows.copy()
    shuffled[..., 4:11] = rows[..., 4:11][..., rng.permutation(7)]
    moved[..., :4] = rows[..., :4].sum(-1, keepdims=True) / 4
    assert torch.allclose(visual.score(shuffled, image), base, atol=1e-12)
    assert torch.allclose(visual.score(moved, image), base, atol=1e-12)
    # Rows below one, as with learned sinks: W shrinks with them, C does not change.
    halved = visual.concentration(0.5 * rows, image)
    assert torch.allclose(halved, visual.concentration(rows, image), atol=1e-12)
    assert torch.allclose(visual.score(0.5 * rows, image), 0.5 * base, atol=1e-12)


def test_a_head_that_rests_on_a_sink_looks_like_a_visual_head_until_sinks_are_taken_out():
    rows = np.full((1, 3, 10), 0.0)
    rows[0, 0, 3] = 0.9  # on the sink ...
    rows[0, 0, [2, 4, 5, 6]] = 0.025  # ... and a little of everything
    rows[0, 1, 5] = 0.9  # on content
    rows[0, 2, 2:7] = 0.18  # on the whole image
    image = slice(2, 7)
    both = visual.score(rows, image)[0]
    without = visual.score(rows, image, sinks={0: [3, 8]})[0]
    assert both[0] > 0.5 and without[0] == pytest.approx(0.0, abs=1e-6)
    assert both[1] == pytest.approx(0.9) == pytest.approx(float(without[1]))
    assert both[2] == pytest.approx(0, abs=1e-6) == pytest.approx(float(without[2]), abs=1e-6)
    # A sink of another layer is none here.
    assert torch.allclose(visual.score(rows, image, sinks={1: [3]}), visual.score(rows, image))


def test_nothing_on_the_image_has_no_concentration_and_scores_zero():
    row = np.array([[[1.0, 0.0, 0.0]]])
    assert torch.isnan(visual.concentration(row, slice(1, 3))).all()
    assert visual.score(row, slice(1, 3)).tolist() == [[0.0]]
    assert visual.concentration(np.array([0.5, 0.5]), [1]).item() == 1.0


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 200), top=st.integers(1, 12))
def test_region_versions_are_those_of_a_loop(seed, top):
    rng = np.random.default_rng(seed)
    row = rng.dirichlet(np.ones(12))
    image = sorted(rng.choice(12, 8, replace=False).tolist())
    inside = sorted(rng.choice(image, 3, replace=False).tolist())
    found = {k: float(v) for k, v in visual.region(row, image, inside, top).items()}
    ranked = sorted(image, key=lambda p: -row[p])[:top]
    hits = [p for p in ranked if p in inside]
    assert found["region_weight"] == pytest.approx(row[inside].sum())
    assert found["region_share"] == pytest.approx(row[inside].sum() / row[image].sum())
    assert found["topk_region_density"] == pytest.approx(len(hits) / len(ranked))
    assert found["region_topk_value"] == pytest.approx(sum(row[p] for p in hits))
    assert found["region_topk_ratio"] == pytest.approx(
        sum(row[p] for p in hits) / sum(row[p] for p in ranked))
    whole = visual.region(row, image, image, top)
    assert float(whole["region_share"]) == pytest.approx(1) == pytest.approx(
        float(whole["region_topk_ratio"]))


def test_depth_and_stages():
    even = np.ones((7, 3))
    assert visual.center_of_mass(even) == pytest.approx(0.5)
    for layer in range(7):
        one = np.zeros((7, 3))
        one[layer, 1] = 0.4
        assert visual.center_of_mass(one) == pytest.approx(layer / 6)
    # Fewer eligible heads in a layer do not make it lighter.
    open_to = np.ones((7, 3), dtype=bool)
    open_to[5, 1:] = False
    assert visual.center_of_mass(even, open_to) == pytest.approx(0.5)
    assert math.isnan(visual.center_of_mass(np.zeros((4, 2))))
    assert [len(s) for s in visual.stages(32)] == [10, 10, 12]
    assert [len(s) for s in visual.stages(40)] == [13, 14, 13]
    for n in range(3, 90):
        flat = [layer for stage in visual.stages(n) for layer in stage]
        assert flat == list(range(n)) and all(len(s) for s in visual.stages(n))


# -- in models --------------------------------------------------------------------------------


@pytest.mark.parametrize("architecture", ["llava", "qwen2_5_vl"])
@pytest.mark.parametrize("row", ["predicting", "own"])
def test_every_number_is_that_of_the_dense_row(opened, architecture, row):
    model = opened(architecture)
    prompts = [image_prompt(architecture, 0, 5), image_prompt(architecture, 1, 8)]
    sinks = [{0: [4, 5], 2: [7]}, {1: [6, 9]}]
    regions = [[5, 6], [7, 8, 9]]
    found = visual.measure(model, prompts, row=row, sinks=sinks, regions=regions, top=4)
    for i, prompt in enumerate(prompts):
        image = list(prompt.positions("image"))
        pattern = model.run(prompt, read="pattern", new_tokens=1).reads["pattern"].values[0]
        query = len(prompt) - 1 if row == "predicting" else len(prompt)
        dense = pattern[:, :, query, : len(prompt)].astype(np.float64)
        one = found.data.isel(sample=i)
        assert np.allclose(one["weight"], dense[..., image].sum(-1), atol=1e-6)
        assert np.allclose(one["samples"], visual.score(dense, image), atol=1e-5)
        assert np.allclose(one["samples_nonsink"], visual.score(dense, image, sinks[i]), atol=1e-5)
        for layer in range(3):
            kept = [p for p in image if p not in sinks[i].get(layer, [])]
            assert np.allclose(one["weight_nonsink"][layer], dense[layer][:, kept].sum(-1), atol=1e-6)
        for key, value in visual.region(dense, image, regions[i], 4).items():
            assert np.allclose(one[key], value, atol=1e-5)
    assert np.allclose(found["score"], found["samples"].mean("sample"))
    other = visual.measure(model, prompts, row="own" if row == "predicting" else "predicting")
    assert not np.allclose(other["weight"], found["weight"], atol=1e-3)


@pytest.mark.parametrize("architecture", ["llava", "qwen2_5_vl"])
def test_a_planted_head_is_the_top_one_and_its_twins_are_not(opened, architecture):
    model = opened(architecture)
    prompt = image_prompt(architecture)
    n, image = len(prompt), list(prompt.positions("image"))
    rows = np.zeros((model.n_heads, n, n), dtype=np.float32)
    rows[:, :, 0] = 1.0  # every head of layer 1 rests on the first token ...
    last, head = n - 1, 4
    rows[head, last] = 0.0
    rows[head, last, image[2]] = 1.0  # ... but one looks at one patch, in the last row only,
    rows[2, last] = 0.0
    rows[2, last, image] = 1.0 / len(image)  # one at the whole picture,
    rows[5, last - 1, 0], rows[5, last - 1, image[2]] = 0.0, 1.0  # one a row too early,
    rows[3, last, 0], rows[3, last, n - 2] = 0.0, 1.0  # and one at text
    made = planted(model, interp.patch("pattern.1", rows))
    found = visual.measure(made, [prompt], regions=[[image[2]]])
    scores = visual.head_scores(found)
    assert scores.top(1) == [interp.Head(1, head)]
    assert found["score"].values[1].tolist() == pytest.approx([0, 0, 0, 0, 1, 0], abs=1e-5)
    assert found["weight"].values[0, 1].tolist() == pytest.approx([0, 0, 1, 0, 1, 0], abs=1e-5)
    assert float(found["region_share"][0, 1, head]) == pytest.approx(1)
    assert found["frequency"].values[1].tolist()[head] == 1
    elsewhere = visual.measure(made, [prompt], regions=[[image[0]]])
    assert float(elsewhere["region_share"][0, 1, head]) == pytest.approx(0, abs=1e-6)
    # The patch named a sink: the head is no visual head any more.
    cleaned = visual.measure(made, [prompt], sinks=[{1: [image[2]]}])
    assert float(cleaned["samples_nonsink"][0, 1, head]) == 0
    assert float(cleaned["sink_share"][0, 1, head]) == pytest.approx(1)


def test_the_chance_level_is_that_of_random_keys(opened):
    """A head peaked on text gets the same chance level as one peaked on the image."""
    model, prompt = opened("llava"), image_prompt("llava")
    n, image = len(prompt), list(prompt.positions("image"))
    rows = np.zeros((model.n_heads, n, n), dtype=np.float32)
    rows[:, :, 1] = 1.0
    rows[3, n - 1, 1], rows[3, n - 1, image[0]] = 0.0, 1.0
    found = visual.measure(planted(model, interp.patch("pattern.1", rows)), [prompt],
                           permutations=400)
    share = len(image) / n  # a peaked head scores 1 if its key is drawn, else 0
    null = found["null"].values[1]
    assert null[[0, 3]] == pytest.approx([share, share], abs=0.08)
    even = np.zeros((model.n_heads, n, n), dtype=np.float32)
    even[:, n - 1] = 1 / n
    flat = visual.measure(planted(model, interp.patch("pattern.1", even)), [prompt])
    assert flat["null"].values[1] == pytest.approx(np.zeros(6), abs=1e-5)


def test_a_window_that_hides_the_image_makes_heads_ineligible(opened):
    prompt = interp.Prompt.from_tokens(range(3, 17), {"image": (2, 8)})
    for architecture, expected in (("mistral", [False] * 3), ("llama", [True] * 3),
                                   ("gemma3", [False, True, False])):
        found = visual.measure(opened(architecture), [prompt])
        assert found["eligible"].all("head").values.tolist() == expected
        top = visual.head_scores(found).top(99)
        assert {h.layer for h in top} == {i for i, ok in enumerate(expected) if ok}


def test_bad_input_is_one_sentence(opened):
    model, good = opened("llava"), image_prompt("llava")
    bare = interp.Prompt.from_tokens(range(3, 12))
    with pytest.raises(PromptError, match="prompt 1 has no image"):
        visual.measure(model, [good, bare])
    with pytest.raises(PromptError, match="1 prompts but 2 regions"):
        visual.measure(model, [good], regions=[[5], [6]])
    with pytest.raises(PromptError, match="positions of the image"):
        visual.measure(model, [good], regions=[[0]])
    with pytest.raises(OutOfRange, match="key 9"):
        visual.weight(np.ones(3) / 3, [9])
    with pytest.raises(NumericalError, match="NaN"):
        visual.weight(np.array([np.nan, 1.0]), [0])


def test_the_figures_are_drawn_from_the_result_alone(opened, tmp_path):
    from interp.core import Result
    from interp.figures.style import canvas

    found = visual.measure(opened("llava"), [image_prompt("llava")], sinks=[{0: [4]}])
    found.save(tmp_path)
    again = Result.load(tmp_path)
    _, axes = canvas(1, 3)
    visual.draw(again, axes[0])
    visual.draw_plane(again, axes[1])
    visual.draw_plane(again, axes[2], "_nonsink")
    assert axes[1].get_xlabel() and len(axes[1].collections[0].get_offsets()) == 18
