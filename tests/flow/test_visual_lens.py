"""Early logits against the model's own norm and head; AUROC against pairs; a planted word is found."""

import numpy as np
import pytest
import torch

import interp
from interp.core import OutOfRange, Prompt, PromptError
from interp.flow import visual_lens
from interp.models.logit_lens import early_logits
from interp.models.model import Model

N, IMAGE = 11, (2, 8)


def prompt(seed=0):
    return Prompt.from_tokens(np.random.default_rng(seed).integers(3, 90, N), {"image": IMAGE})


@pytest.mark.parametrize("architecture", ["llama", "gemma2"])
def test_early_logits_are_norm_head_and_cap_of_what_enters_a_layer(tiny, architecture):
    hf = tiny(architecture)
    model, given = Model(hf, architecture), prompt()
    found = dict(early_logits(model, given, "image"))
    run = model.run(given, read="resid_pre")
    cap = getattr(hf.config, "final_logit_softcapping", None)
    for layer in range(3):
        states = torch.tensor(run.reads["resid_pre"].values[0, layer, slice(*IMAGE)])
        with torch.no_grad():
            logits = hf.lm_head(hf.model.norm(states))
        logits = logits if cap is None else torch.tanh(logits / cap) * cap
        assert torch.allclose(found[layer], logits, atol=1e-4)
    # The last state is normed once: it gives the model's logits.
    assert torch.allclose(found[3], run.logits[0][slice(*IMAGE)], atol=1e-5)
    assert list(dict(early_logits(model, given, [1], [3, 0]))) == [0, 3]
    with pytest.raises(OutOfRange):
        next(early_logits(model, given, layers=[4]))


def test_auroc_counts_pairs_and_ties_half():
    rng = np.random.default_rng(0)
    values, inside = rng.integers(0, 4, (3, 12)).astype(float), np.arange(12) % 5 == 0
    for row, found in zip(values, visual_lens.auroc(values, inside)):
        pairs = [(a > b) + 0.5 * (a == b) for a in row[inside] for b in row[~inside]]
        assert found == pytest.approx(np.mean(pairs))
    assert visual_lens.auroc(values, ~inside) == pytest.approx(1 - visual_lens.auroc(values, inside))
    assert np.isnan(visual_lens.auroc(values, np.zeros(12, bool))).all()


def test_a_planted_word_is_read_in_its_cells_and_another_is_not(tiny):
    """Cells that are written the direction of a word stand for it; those of its twin do not."""
    hf = tiny("llama")
    model, given, word = Model(hf, "llama"), prompt(), 40
    direction = hf.lm_head.weight[word].detach()
    states = torch.tensor(model.run(given, read="resid_post.1").reads["resid_post.1"].values)
    states = states.reshape(N, -1)
    planted = states.clone()
    planted[[3, 5]] += 60 * states.norm(dim=-1).max() * direction / direction.norm()
    logits = model.run(given, write=interp.patch("resid_post.1", planted)).logits[0]
    assert logits[[3, 5]].argmax(-1).tolist() == [word] * 2
    p = hf.lm_head(hf.model.norm(planted)).softmax(-1).detach()[slice(*IMAGE)].T.numpy()
    inside = np.isin(np.arange(*IMAGE), [3, 5])
    assert visual_lens.auroc(p[[word]], inside)[0] == 1
    others = visual_lens.auroc(p[3:90], inside)
    assert (others == 1).mean() < 0.5


def test_measure_is_the_probabilities_and_refuses_what_is_no_image(tiny):
    model, given = Model(tiny("llama"), "llama"), [prompt(0), prompt(1)]
    found = visual_lens.measure(model, given, [[5, 9], [7]], [[2, 3], [4]], [[11], [12, 13]])
    p = visual_lens.probabilities(model, given[0], [5, 9])
    one = found.data.isel(prompt=0).sel(condition="word")
    assert np.allclose(one["inside"], p[:, :2].mean(1)) and np.allclose(one["outside"], p[:, 2:].mean(1))
    assert np.allclose(one["auroc"], visual_lens.auroc(p, np.arange(6) < 2))
    with pytest.raises(OutOfRange, match="no image token"):
        visual_lens.measure(model, given[:1], [[5]], [[9]], [[6]])
    with pytest.raises(PromptError, match="no words"):
        visual_lens.measure(model, given[:1], [[5]], [[3]], [[]])
