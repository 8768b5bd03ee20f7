"""Image-centric heads in models: streamed per layer as the pure selection on the dense pattern."""

import functools

import numpy as np
import pytest
import torch

import interp
from interp.core.errors import PromptError
from interp.heads import image_centric
from interp.models.model import Model


@pytest.fixture(scope="module")
def opened(tiny):
    """architecture -> the tiny model, opened once."""
    return functools.cache(lambda architecture: Model(tiny(architecture), f"tiny-{architecture}"))


def prompts() -> list[interp.Prompt]:
    """Three lengths; the last has two pictures with text between them."""
    rng = np.random.default_rng(0)
    spans = [{"image": (3, 9)}, {"image": (2, 10)},
             {"image_1": [1, 2, 3, 4], "image_2": [7, 8, 9]}]
    return [interp.Prompt.from_tokens(rng.integers(3, 90, n), where)
            for n, where in zip((14, 17, 15), spans)]


SINKS = [{0: [0, 4], 1: [0, 4, 6], 2: [5]}, {1: [2, 3, 9], 2: [0]}, {0: [2, 8], 2: [1, 2, 3, 11]}]


@pytest.mark.parametrize("architecture", ["llama", "gemma2", "gpt_oss"])
@pytest.mark.parametrize("share, mass", [(0.5, 0.2), (0.8, 0.05), (0, 0)])
def test_streamed_selection_equals_the_pure_one_layer_by_layer(opened, architecture, share, mass):
    model, given = opened(architecture), prompts()
    found = image_centric.measure(model, given, SINKS, min_nonsink_share=share,
                                  min_image_mass=mass)
    assert found["selected"].dims == ("prompt", "layer", "head", "query")
    flags = []
    for i, prompt in enumerate(given):
        n = len(prompt)
        image = [p for s in prompt.of_kind("image") for p in s.positions]
        later = np.arange(max(image) + 1, n)
        p = model.run(prompt, read="pattern").reads["pattern"].values[0]
        for layer in range(3):
            sinks = SINKS[i].get(layer, [])
            chosen = image_centric.select(p[layer], image, sinks, share, mass, queries=later)
            one = found.data.isel(prompt=i, layer=layer, query=slice(n))
            assert np.array_equal(one["selected"], chosen.numpy())
            on_image = image_centric.image_mass(p[layer], image).numpy()[:, later]
            content = image_centric.nonsink_share(p[layer], image, sinks).numpy()[:, later]
            assert np.allclose(one["image_mass"].values[:, later], on_image, atol=1e-6)
            streamed = one["nonsink_share"].values[:, later]
            assert np.allclose(streamed[on_image > 0], content[on_image > 0], atol=1e-5)
            assert np.isnan(streamed[on_image == 0]).all()
            flags.append(chosen[:, later].float())
        early = found.data.isel(prompt=i, query=slice(0, max(image) + 1))
        rest = found.data.isel(prompt=i, query=slice(n, None))
        for part in (early, rest):
            assert part["image_mass"].isnull().all() and not part["selected"].any()
    rate = torch.stack([torch.cat(flags[layer::3], 1).mean(1) for layer in range(3)])
    assert np.allclose(found["rate"], rate, atol=1e-6)
    if mass:
        assert 0 < float(rate.mean()) < 1


def test_a_head_is_found_only_where_its_attention_was_put(opened):
    """Planted in a run: one head's rows are written to look at content, another's at the sink."""
    model, prompt = opened("llama"), prompts()[0]
    n = len(prompt)
    base = model.run(prompt, read="pattern.1").reads["pattern.1"].values[0, 0]
    rows = base.copy()
    rows[:, 9:] = 0.0
    rows[:, 9:, 0] = 1.0  # every head rests on token 0 ...
    for head, key in ((2, 5), (4, 4)):
        rows[head, 9:] = 0.0
        rows[head, 9:, key] = 1.0  # ... but one reads content, and one the visual sink
    run, put = model.run, interp.patch("pattern.1", rows)
    sinks = [{1: [0, 4]}]
    planted = Model.__new__(Model)
    planted.__dict__.update(model.__dict__)
    planted.run = lambda p, write=(), **more: run(p, write=[put, *write], **more)
    found = image_centric.measure(planted, [prompt], sinks)
    chosen = found["selected"].isel(prompt=0, layer=1, query=slice(9, n)).values
    assert chosen[2].all() and not chosen[[0, 1, 3, 4, 5]].any()
    assert found["rate"].values[1].tolist() == [0, 0, 1, 0, 0, 0]
    assert float(found["nonsink_share"][0, 1, 4, 9]) == 0.0
    # With the other token named a sink it is the other head.
    swapped = image_centric.measure(planted, [prompt], [{1: [0, 5]}])
    assert swapped["rate"].values[1].tolist() == [0, 0, 0, 0, 1, 0]


def test_without_sinks_only_the_image_mass_decides(opened):
    model, given = opened("llama"), prompts()
    found = image_centric.measure(model, given, [{}, {}, {}])
    looked = found["image_mass"] >= 0.2
    assert np.array_equal(found["selected"], looked)
    assert np.allclose(found["nonsink_share"].values[looked.values], 1.0, atol=1e-6)


def test_chance_is_even_attention_and_short_windows_are_not_eligible(opened):
    model, given = opened("llama"), prompts()
    found = image_centric.measure(model, given, SINKS)
    for layer in range(3):
        flags = []
        for prompt, sinks in zip(given, SINKS):
            image = {p for s in prompt.of_kind("image") for p in s.positions}
            content = image - set(sinks.get(layer, ()))
            for query in range(max(image) + 1, len(prompt)):
                mass, share = len(image) / (query + 1), len(content) / len(image)
                flags.append(mass >= 0.2 and share >= 0.5)
        assert np.allclose(found["null"].sel(layer=layer), np.mean(flags), atol=1e-6)
    assert found["eligible"].all() and (found["frequency"] >= found["rate"]).all()
    each = found["selected"].sum("query").values / np.array([5, 7, 5])[:, None, None]
    assert np.allclose(found["standard_error"], each.std(0, ddof=1) / np.sqrt(3), atol=1e-6)
    scores = image_centric.scores_of(found)
    assert scores.top(1) == [interp.Head(*np.argwhere(
        found["rate"].values == found["rate"].values.max())[0].tolist())]
    # Every second layer of this Gemma sees only a few tokens back.
    far = interp.Prompt.from_tokens(np.arange(3, 33), {"image": (1, 5)})
    windowed = image_centric.measure(opened("gemma2"), [far], [{}])["eligible"].all("head").values
    assert windowed.any() and not windowed.all()


def test_a_prompt_without_a_picture_or_a_question_is_named(opened):
    model, good = opened("llama"), prompts()[0]
    for bad in (interp.Prompt.from_tokens(range(3, 12)),
                interp.Prompt.from_tokens(range(3, 12), {"image": (4, 9)})):
        with pytest.raises(PromptError, match=r"prompt 1 has no image with text behind it.*images="):
            image_centric.measure(model, [good, bad], [{}, {}])


def test_the_figure_is_drawn_from_the_result_alone(opened):
    from interp.figures.style import canvas

    found = image_centric.measure(opened("llama"), prompts(), SINKS)
    _, ax = canvas(1, 1)
    image_centric.draw(found, ax)
    assert ax.get_xlabel() and ax.get_ylabel()
