"""Parameter-free attention against its closed form and simulation; what is left of real scores."""

import copy

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from interp.core import Prompt, PromptError
from interp.flow import causal_mask
from interp.models.model import Model
from interp.organisms.twins import random_twin

ALPHAS = (0.0, 0.2, 0.5, 0.8)


def test_the_recursion_is_attention_of_wide_states():
    """Against attention on states whose inner products are exactly the given ones."""
    n, alpha, d = 7, 0.3, 24
    gram = np.full((n, n), alpha) + (1 - alpha) * np.eye(n)
    x = np.linalg.cholesky(gram) @ np.linalg.qr(
        np.random.default_rng(0).normal(size=(d, n)))[0].T
    for gain in (1.0, 3.0):
        y = x.copy()
        for layer in causal_mask.recursion(n, alpha, 3, gain=gain).numpy():
            h = y / np.linalg.norm(y, axis=1, keepdims=True)
            scores = h @ h.T
            assert np.abs(scores - layer).max() < 1e-12
            out = np.zeros_like(y)
            for i in range(n):
                weights = np.exp(scores[i, : i + 1])
                out[i] = weights / weights.sum() @ h[: i + 1]
            y = gain * out + y


@settings(max_examples=15, deadline=None)
@given(st.integers(2, 60))
def test_the_second_layer_is_the_closed_form(n):
    found = causal_mask.recursion(n, 0.0, 2)[1].tril()
    assert float((found - causal_mask.second_layer(n)).abs().max()) < 1e-12


def test_the_three_token_figures_and_the_rows_that_favor_near_keys():
    scores = causal_mask.recursion(3, 0.0, 2)[1]
    for (i, j), number in {(1, 0): 0.154, (2, 0): 0.132, (2, 1): 0.150}.items():
        assert abs(float(scores[i, j]) - number) < 1e-3
    shares = {alpha: [causal_mask.monotone_rows(s) for s in causal_mask.recursion(50, alpha, 4)]
              for alpha in ALPHAS}
    assert all(share[1] == 1.0 for share in shares.values())
    assert shares[0.0][2] == 0.5 and shares[0.0][3] == 0.625
    assert shares[0.2][1:] == shares[0.5][1:] == [1.0] * 3


@pytest.mark.parametrize("alpha", ALPHAS)
def test_without_the_mask_no_key_is_favored(alpha):
    for scores in causal_mask.recursion(20, alpha, 4, causal=False):
        off = scores[~torch.eye(20, dtype=torch.bool)]
        assert float(off.max() - off.min()) < 1e-12
        assert causal_mask.non_relative(scores, causal=False) == 0.0


def test_the_simulation_comes_closer_as_states_grow_wider():
    exact = causal_mask.recursion(12, 0.2, 3)
    gaps = []
    for width in (16, 256):
        mean, error = causal_mask.simulate(12, 0.2, 3, d_model=width, samples=600, seed=1)
        gaps.append(float((mean - exact).abs().max()))
        assert float(error.max()) < 0.2 / width**0.5
    assert gaps[1] < 0.015 < gaps[0]
    again, _ = causal_mask.simulate(12, 0.2, 3, d_model=16, samples=600, seed=1, batch_size=600)
    assert again.shape == exact.shape


def test_layer_norm_is_the_recursion_with_a_gain():
    mean, _ = causal_mask.simulate(9, 0.1, 3, d_model=400, samples=400, norm="layer_norm_d")
    exact = causal_mask.recursion(9, 0.1, 3, gain=20.0)
    unit = causal_mask.recursion(9, 0.1, 3)
    assert float((mean - exact).abs().max()) < 0.02 < float((mean - unit).abs().max())
    root, _ = causal_mask.simulate(9, 0.1, 3, d_model=100, samples=50, norm="layer_norm_sqrt_d")
    assert torch.allclose(root.diagonal(dim1=1, dim2=2).mean(), torch.tensor(10.0).double())


def test_what_depends_on_distance_alone_leaves_nothing():
    rng = np.random.default_rng(0)
    kernel = rng.normal(size=40)
    distance = np.subtract.outer(np.arange(20), np.arange(20))
    relative = kernel[distance]
    assert causal_mask.non_relative(relative) == 0.0
    planted = relative + 0.3 * np.arange(20)[None, :]
    assert causal_mask.non_relative(planted) > 0.999
    noise = relative + rng.normal(size=(20, 20))
    assert causal_mask.non_relative(noise) < 0.2
    left, used = causal_mask.residual(noise)
    assert not used[:, 0].any() and not used[np.triu_indices(20, 1)].any()
    for offset in range(18):
        assert abs(np.diagonal(left, -offset).sum()) < 1e-9
    # A sink on the first key is no positional effect, and can be looked at too.
    sink = relative.copy()
    sink[:, 0] += 5
    assert causal_mask.non_relative(sink) == 0.0
    assert causal_mask.non_relative(sink, exclude_first=False) > 0.05


@pytest.fixture(scope="module")
def prompts():
    rng = np.random.default_rng(3)
    return [Prompt.from_tokens([1, *rng.integers(3, 97, 30)]) for _ in range(12)]


def test_the_mean_scores_are_those_of_the_model(tiny, prompts):
    model = Model(tiny("llama"), "llama")
    found = causal_mask.measure(model, prompts, [0, 2], permutations=20)
    for layer in (0, 2):
        naive = np.mean([model.run(p, read=f"scores.{layer}").reads[f"scores.{layer}"].values[0, 0]
                         for p in prompts], axis=(0, 1))
        lower = np.tri(31, dtype=bool)
        assert np.allclose(found["scores"].sel(layer=layer).values[lower], naive[lower], atol=1e-5)
        assert np.isnan(found["scores"].sel(layer=layer).values[~lower]).all()
        estimate = causal_mask.interval(found, layer, resamples=200)
        assert estimate.value == pytest.approx(float(found["non_relative"].sel(layer=layer)))
        assert estimate.interval[0] <= estimate.value + 0.1 and estimate.n == 12


def comparing(tiny, causal):
    """A random Llama whose queries are its keys: scores are similarities, as without parameters."""
    config = copy.deepcopy(tiny("llama").config)
    text = config.get_text_config()
    text.hidden_size, text.num_key_value_heads = 192, text.num_attention_heads
    hf = random_twin(type(tiny("llama"))(config), 0, positions=False, causal=causal)
    with torch.no_grad():
        for block in hf.model.layers:
            block.self_attn.k_proj.weight.copy_(block.self_attn.q_proj.weight)
    return Model(hf, "comparing")


def test_the_mask_writes_position_into_scores_and_nothing_else_does(tiny):
    """With the mask and without it, the rest being equal; the first layer cannot know yet."""
    rng = np.random.default_rng(3)
    prompts = [Prompt.from_tokens(rng.integers(3, 97, 40)) for _ in range(20)]
    found = {}
    for causal in (True, False):
        model = comparing(tiny, causal)
        assert model.kind == ("decoder" if causal else "encoder")
        found[causal] = causal_mask.measure(model, prompts, permutations=40)
    with_mask, without = (found[c]["non_relative"].values for c in (True, False))
    null = np.quantile(found[True]["null"].values, 0.99, axis=1)
    assert (with_mask[1:] > 0.1).all() and (with_mask[1:] > 2 * null[1:]).all()
    assert with_mask[0] < 0.05 and (without < 0.05).all()
    repeated = {c: [causal_mask.interval(found[c], layer, "repeated", 200) for layer in range(3)]
                for c in found}
    assert all(one.interval[0] > 0.1 for one in repeated[True][1:])
    assert all(abs(one.value) < 0.25 for one in (*repeated[False], repeated[True][0]))
    # Nearer keys score higher, as in the recursion.
    mean = found[True]["scores"].sel(layer=1).values
    assert mean[39, 30:39].mean() > mean[39, 1:10].mean()


def test_a_window_hides_keys_and_does_not_count(tiny, prompts):
    model = Model(tiny("mistral"), "mistral")
    found = causal_mask.measure(model, prompts[:4], [1], permutations=5)
    seen = np.isfinite(found["residual"].values[0])
    distance = np.subtract.outer(np.arange(31), np.arange(31))
    assert (distance[seen] < 5).all() and (distance[seen] >= 0).all()
    assert np.isfinite(float(found["non_relative"][0]))


def test_what_cannot_be_measured_is_said(tiny, prompts):
    model = Model(tiny("llama"), "llama")
    with pytest.raises(PromptError, match="need one length"):
        causal_mask.measure(model, [prompts[0], Prompt.from_tokens([1, 2, 3, 4])])
    with pytest.raises(PromptError, match="need 4 to 1024"):
        causal_mask.measure(model, Prompt.from_tokens([1, 2, 3]))
    with pytest.raises(IndexError, match="layers run from 0 to 2"):
        causal_mask.measure(model, prompts, [3])
    for bad in (dict(n=1), dict(n=5, alpha=1.0), dict(n=5, n_layers=0)):
        with pytest.raises(ValueError, match="not possible"):
            causal_mask.recursion(**bad)
