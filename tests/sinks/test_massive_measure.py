"""Massive activations on models: planted coordinates are found, and their removal is felt."""

import numpy as np
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from interp.core import Prompt
from interp.core.errors import PromptError
from interp.figures.style import canvas
from interp.models.model import Model
from interp.organisms.plant import massive_coordinate
from interp.sinks import massive_activations as massive

BOS, DEPTH, LAYER, UNTIL = 1, 7, 2, 5
VALUES = {3: 700.0, 11: -400.0}
LENGTHS = (17, 26, 21)


@pytest.fixture(scope="module")
def planted():
    torch.manual_seed(8)
    base = LlamaForCausalLM(LlamaConfig(
        vocab_size=53, hidden_size=48, intermediate_size=60, num_hidden_layers=DEPTH,
        num_attention_heads=4, num_key_value_heads=2, bos_token_id=BOS, initializer_range=0.06,
        max_position_embeddings=64, tie_word_embeddings=False)).eval()
    return massive_coordinate(base, VALUES, LAYER, UNTIL)


@pytest.fixture(scope="module")
def model(planted):
    return Model(planted.model, "planted")


@pytest.fixture(scope="module")
def prompts():
    rng = np.random.default_rng(2)
    return [Prompt.from_tokens([BOS, *rng.integers(3, 53, n - 1)]) for n in LENGTHS]


@pytest.fixture(scope="module")
def found(model, prompts):
    return massive.measure(model, prompts)


def test_exactly_the_planted_coordinates_are_found(found):
    table = massive.activations(found)
    seen = set(zip(table["prompt"], table["layer"], table["position"], table["dim"]))
    assert seen == {(i, layer, 0, dim) for i in range(3) for layer in range(LAYER, UNTIL)
                    for dim in VALUES}
    for dim, value in VALUES.items():
        assert np.allclose(table["value"][table["dim"] == dim], value, rtol=0.01)
    assert found.manifest["min_value"] == 0.0  # a small model


def test_the_twin_has_none(planted, prompts):
    assert massive.activations(massive.measure(Model(planted.twin, "twin"), prompts)).empty


def test_thresholds_act(model, prompts):
    table = massive.activations(massive.measure(model, prompts, min_value=500))
    assert set(table["dim"]) == {3}
    assert massive.activations(massive.measure(model, prompts, min_ratio=1e7)).empty


def test_the_profile_is_that_of_the_residual_and_pieces_do_not_matter(
    model, prompts, found, monkeypatch
):
    for number, prompt in enumerate(prompts):
        run = model.run(prompt, read=["resid_post", "pattern"])
        residual = run.reads["resid_post"].values[0]
        size = np.abs(residual)
        np.testing.assert_allclose(found["median"][number], np.median(size, (1, 2)), rtol=1e-5)
        top = np.sort(size.reshape(DEPTH, -1))[:, :-4:-1]
        np.testing.assert_allclose(found["top"][number], top, rtol=1e-5)
        n = len(prompt)
        np.testing.assert_allclose(found["peak"].values[number, :, :n], size.max(-1), rtol=1e-5)
        # Attention that each key receives from the queries from it on.
        rows = run.reads["pattern"].values[0].mean(1)
        received = rows.sum(1) / np.arange(n, 0, -1)
        np.testing.assert_allclose(
            found["received"].values[number, :, :n], received, rtol=1e-4, atol=1e-6)
    monkeypatch.setattr(massive, "ROOM", 1)
    piecewise = massive.measure(model, prompts)
    for name in ("top", "median", "peak", "received"):
        np.testing.assert_allclose(piecewise[name], found[name], rtol=1e-5)
    assert massive.activations(piecewise).equals(massive.activations(found))


def test_zero_is_felt_the_mean_of_equal_values_and_median_ones_are_not(model, prompts, found):
    before = model.run(prompts[1]).logits[0]
    edited = massive.intervene(model, prompts, found, n_seeds=5)
    assert edited.manifest["layer"] == LAYER
    kl = edited["kl"].to_pandas()
    assert (kl.loc["none"] == 0).all()
    assert (kl.loc["mean"] < 1e-6).all()
    medians = kl[kl.index.str.startswith("median")]
    assert len(medians) == 5 and (kl.loc["zero"] > 20 * medians.max()).all()
    assert torch.equal(model.run(prompts[1]).logits[0], before)


def test_loss_is_the_next_token_loss(model, prompts, found):
    edited = massive.intervene(model, prompts, found, n_seeds=1)
    for number, prompt in enumerate(prompts):
        logits = model.run(prompt).logits[0]
        expected = torch.nn.functional.cross_entropy(logits[:-1], torch.tensor(prompt.ids[1:]))
        assert float(edited["loss"].sel(edit="none")[number]) == pytest.approx(float(expected))


def test_prompts_without_massive_activations_are_left_out(model, found):
    rng = np.random.default_rng(4)
    mixed = [Prompt.from_tokens(rng.integers(3, 53, 12)),
             Prompt.from_tokens([BOS, *rng.integers(3, 53, 12)])]
    edited = massive.intervene(model, mixed, massive.measure(model, mixed), n_seeds=1)
    assert edited["prompt"].values.tolist() == [1]


def test_controls_are_of_median_size_and_never_the_massive_ones():
    size = np.abs(np.random.default_rng(0).standard_normal((30, 50)))
    taken = [(0, 1), (3, 4), (9, 9)]
    size[0, 1] = np.median(size)
    rng = np.random.default_rng(1)
    for _ in range(50):
        places = massive._of_median_size(size, taken, rng)
        assert len(set(places)) == 3 and not set(places) & set(taken)
        # 1,000 of the 1,500 coordinates count as close to the median.
        assert all(abs(size[p] - np.median(size)) < 0.6 for p in places)


def test_nothing_to_measure_or_to_set_is_said(model, prompts, found):
    with pytest.raises(PromptError, match="no prompts"):
        massive.measure(model, [])
    with pytest.raises(ValueError, match="no massive activations"):
        massive.intervene(model, prompts, massive.measure(model, prompts, min_ratio=1e7))
    with pytest.raises(ValueError, match="layer 6"):
        massive.intervene(model, prompts, found, layer=6)


def test_the_drawing_has_a_curve_for_each_rank_and_the_median_in_gray(found):
    _, ax = canvas()
    massive.draw(found, ax)
    assert [line.get_label() for line in ax.lines] == ["top 1", "top 2", "top 3", "median"]
    assert ax.get_yscale() == "log"
    top = ax.lines[0].get_ydata()
    assert np.diff(top).argmax() + 1 == LAYER and top[LAYER] == pytest.approx(700, rel=0.01)
