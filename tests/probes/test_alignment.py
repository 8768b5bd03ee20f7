"""Alignment equals naive loops, sees pairs that were planted and none that were not."""

import numpy as np
import pytest
import torch

import interp
from interp.core import ModelRefused, Prompt, PromptError
from probes import alignment
from probes.alignment import important, mask_overlap, measure, pair_p, similarities


def pairs(seed=0, n=14, layers=3, d=11, shared=0.0, at=1):
    """Two modalities in cones of their own; in one layer images carry a part of their text."""
    rng = np.random.default_rng(seed)
    image, text = (rng.standard_normal((layers, n, d)) for _ in range(2))
    image[at] += shared * text[at]
    return image + 6 * rng.standard_normal(d), text + 6 * rng.standard_normal(d)


def cosine(a, b):
    return float(a @ b / np.linalg.norm(a) / np.linalg.norm(b))


@pytest.mark.parametrize("centered", [False, True])
def test_similarities_are_those_of_a_loop_over_pairs(centered):
    image, text = (x[0] for x in pairs())
    a, b = (x - x.mean(0) if centered else x for x in (image, text))
    found, n = similarities(image, text, centered), len(a)
    for i in range(n):
        others = [j for j in range(n) if j != i]
        assert found["matched"][i] == pytest.approx(cosine(a[i], b[i]))
        assert found["image"][i] == pytest.approx(np.mean([cosine(a[i], a[j]) for j in others]))
        assert found["text"][i] == pytest.approx(np.mean([cosine(b[i], b[j]) for j in others]))
        assert found["mismatched"][i] == pytest.approx(np.mean(
            [(cosine(a[i], b[j]) + cosine(a[j], b[i])) / 2 for j in others]))
    # Cones make cosines; without them nothing is left within a modality.
    assert (found["image"].mean() > 0.7) != centered


def test_pairs_are_found_where_they_were_planted_and_nowhere_else():
    gap, p = pair_p(*pairs(shared=1.5), permutations=399)
    assert p.argmin() == 1 and p[1] == 1 / 400 and (p[[0, 2]] > 0.05).all() and gap[1] > 0.4
    low = [pair_p(*pairs(seed), permutations=99)[1].min() for seed in range(40)]
    assert np.mean(np.array(low) <= 0.05) <= 0.15
    # The pairing decides, not the order.
    image, text = pairs(shared=1.5)
    order = np.random.default_rng(0).permutation(image.shape[1])
    assert np.allclose(pair_p(image[:, order], text[:, order], permutations=9)[0], gap)
    assert pair_p(image, text[:, order], permutations=99)[1][1] > 0.05


def prompts(count=5, seed=0):
    rng = np.random.default_rng(seed)
    return [Prompt.from_tokens(rng.integers(3, 20, 12), {"image": (1, 5)}) for _ in range(count)]


def test_states_of_a_model_are_pooled_layer_by_layer():
    model, given = interp.open_model("backcopy-3l"), prompts()
    states = model.run(given, read=["resid_pre.0", "resid_post"], logits="none").reads
    by_layer = np.concatenate([states["resid_pre.0"].values, states["resid_post"].values], 1)
    found = measure(model, given, permutations=19, vocabulary=2, batch_size=2)
    assert found["layer"].values.tolist() == [-1, 0, 1, 2]
    for layer in range(4):
        image, text = by_layer[:, layer, 1:5].mean(1), by_layer[:, layer, 5:].mean(1)
        want = similarities(image.astype(float), text.astype(float))
        for name, values in want.items():
            assert np.allclose(found[name].values[:, layer], values, atol=1e-5)
        norms = np.linalg.norm(by_layer[:, layer], axis=-1)
        assert np.allclose(found["norm"].values[:, layer, 0], norms[:, 1:5].mean(1), rtol=1e-5)
    step = np.mean([cosine(by_layer[2, 1, i], by_layer[2, 2, i]) for i in range(5, 12)])
    assert found["step"].values[2, 1, 1] == pytest.approx(step, abs=1e-5)
    # The entropy of the last layer is that of the model's own predictions.
    logits = model.run(given[0]).logits[0][1:5].double().log_softmax(-1)
    assert found["entropy"].values[0, -1, 0] == pytest.approx(
        float(-(logits.exp() * logits).sum(-1).mean()), abs=1e-4)
    assert (found["kl"].values[:2] >= 0).all() and np.isnan(found["kl"].values[2:]).all()
    tokens = measure(model, given, pool="tokens", permutations=9)
    a, b = by_layer[1, 2, 1:5], by_layer[1, 2, 5:]
    assert tokens["matched"].values[1, 2] == pytest.approx(
        np.mean([cosine(x, y) for x in a for y in b]), abs=1e-5)
    fixed = measure(model, given, image_layer=-1, permutations=9)
    assert np.ptp(fixed["image"].values, axis=1).max() == 0
    assert np.allclose(fixed["text"], found["text"])


def test_equal_tokens_of_both_modalities_leave_no_gap():
    model = interp.open_model("backcopy-3l")
    given = prompts(4)
    same = measure(model, given, given, image=[2, 3], text=[2, 3], permutations=99)
    assert np.allclose(same["image"], same["text"]) and np.allclose(same["matched"], 1)
    assert np.allclose(same["norm"].isel(modality=0), same["norm"].isel(modality=1))


def test_kept_weights_are_those_of_a_loop():
    rng = torch.Generator().manual_seed(0)
    weight, norms = torch.randn(6, 10, generator=rng), torch.rand(10, generator=rng)
    mask = important(weight, norms, 0.3)
    for row in range(6):
        score = (weight[row].abs() * norms).tolist()
        assert set(mask[row].nonzero()[:, 0].tolist()) == set(np.argsort(score)[-7:])
    assert torch.equal(important(-weight, 5 * norms, 0.3), mask)


def test_overlap_is_one_for_equal_tokens_and_chance_for_weights_of_one_size(hooks):
    model, given = interp.open_model("looker"), prompts(3)
    hooked = hooks(model.hf)
    same = mask_overlap(model, given, given, image=[2, 3], text=[2, 3], layers=[0])
    assert np.allclose(same["iou"], 1.0)
    found = mask_overlap(model, given, sparsity=0.3, layers=[1, 4])
    assert found["iou"].dims == ("layer", "weight") and found["iou"].shape == (2, 7)
    assert float(found["random"]) == pytest.approx(0.7 / 1.3)
    # |W| is shared: also with norms in random order masks overlap more than random masks.
    assert (found["shuffled"] > found["random"]).all()
    # The model is left without hooks.
    assert hooks(model.hf) == hooked
    rng = torch.Generator().manual_seed(1)
    ones, made = torch.ones(300, 200), []
    for _ in range(20):
        a, b = (important(ones, torch.rand(200, generator=rng), 0.5) for _ in range(2))
        made.append(float((a & b).sum() / (a | b).sum()))
    assert np.mean(made) == pytest.approx(1 / 3, abs=0.03)


def test_what_cannot_be_compared_is_said():
    model = interp.open_model("backcopy-1l")
    with pytest.raises(PromptError, match="two pairs or more"):
        measure(model, prompts(1))
    with pytest.raises(PromptError, match="no text token"):
        measure(model, [Prompt.from_tokens(range(3, 9), {"image": (1, 6)})] * 2)
    with pytest.raises(ValueError, match="two pairs"):
        similarities(np.ones((1, 2)), np.ones((1, 2)))
    model = interp.open_model("looker")
    blocks = model._engine("hf").blocks
    model._engine("hf").blocks = [type("Block", (), {"module": torch.nn.LayerNorm(2)})()]
    try:
        with pytest.raises(ModelRefused, match="no linear maps"):
            mask_overlap(model, prompts(2), layers=[0])
    finally:
        model._engine("hf").blocks = blocks
    assert alignment.MODALITIES == ("image", "text")
