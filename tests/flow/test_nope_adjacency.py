"""Adjacency of states: the estimator against all triples, and random models with and without mask."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from interp.core import ModelRefused, NumericalError, Prompt, PromptError
from interp.flow import nope_adjacency
from interp.models.model import Model
from interp.organisms.twins import random_twin


def by_triples(cosine):
    hits, count = 0.0, 0
    for i in range(len(cosine)):
        for j in range(i):
            for k in range(j):
                hits += (cosine[i, j] > cosine[i, k]) + 0.5 * (cosine[i, j] == cosine[i, k])
                count += 1
    return hits / count


@settings(max_examples=40, deadline=None)
@given(st.integers(3, 17), st.integers(1, 9), st.integers(0, 1000))
def test_adjacency_counts_every_triple(n, levels, seed):
    """With ties, which few levels make frequent."""
    cosine = np.random.default_rng(seed).integers(0, levels, (2, n, n)).astype(float)
    found = nope_adjacency.adjacency(cosine)
    assert found == pytest.approx([by_triples(one) for one in cosine], abs=1e-12)


@pytest.mark.parametrize("levels", [3, 1000])
def test_sorting_counts_what_comparing_counts(monkeypatch, levels):
    cosine = np.random.default_rng(2).integers(0, levels, (2, 30, 30)).astype(float)
    compared = nope_adjacency.adjacency(cosine)
    monkeypatch.setattr(nope_adjacency, "SHORT", 1)
    assert np.allclose(nope_adjacency.adjacency(cosine), compared, atol=1e-12)


def test_states_that_know_their_position_and_states_that_do_not():
    rng = np.random.default_rng(0)
    walk = np.cumsum(rng.normal(size=(60, 300)), 0)
    noise = rng.normal(size=(60, 300))
    near, none = (nope_adjacency.cosines(x) for x in (walk, noise))
    assert nope_adjacency.adjacency(near) > 0.95
    assert abs(nope_adjacency.adjacency(none) - 0.5) < 0.05
    assert nope_adjacency.nearest_first(near) > 0.95
    assert nope_adjacency.nearest_first(none) < 3 * nope_adjacency.chance(60)
    order = nope_adjacency.order_from_cosines(near)
    assert abs(np.corrcoef(np.argsort(np.argsort(order)), np.arange(60))[0, 1]) > 0.9
    # Turned and stretched, the states have the same similarities.
    turn = np.linalg.qr(rng.normal(size=(300, 300)))[0]
    assert np.allclose(nope_adjacency.cosines(7 * walk @ turn), near)


@pytest.fixture(scope="module")
def prompts():
    rng = np.random.default_rng(1)
    return [Prompt.from_tokens(rng.integers(3, 97, 40)) for _ in range(6)]


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "gemma2", "gpt_oss"])
def test_the_mask_makes_neighbors_alike_without_positions_or_training(wide, prompts, architecture):
    found = {}
    for causal in (True, False):
        twin = random_twin(wide(architecture), 0, positions=False, causal=causal)
        found[causal] = nope_adjacency.measure(Model(twin, "twin"), prompts)["adjacency"]
    assert found[True].sizes == {"prompt": 6, "layer": 4}
    mean = {causal: one.mean("prompt").values for causal, one in found.items()}
    assert abs(mean[True][0] - 0.5) < 0.04
    assert mean[True][1] > 0.52 and mean[True][3] > 0.56
    assert (np.abs(mean[False] - 0.5) < 0.06).all()


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "opt", "gemma3", "gpt_neox", "gpt_oss"])
def test_a_twin_without_positions_cannot_tell_the_order_of_what_it_reads(tiny, architecture):
    """After one block the last state is a function of the set of tokens before it."""
    def last(hf, ids):
        return Model(hf, "twin").run(Prompt.from_tokens(ids), read="resid_post.0").reads[
            "resid_post.0"].values[0, 0, -1]

    one, other = [5, 9, 7, 4, 8], [7, 5, 4, 9, 8]
    bare = random_twin(tiny(architecture), 3, positions=False)
    assert np.allclose(last(bare, one), last(bare, other), rtol=1e-4, atol=1e-5)
    whole = tiny(architecture)
    assert not np.allclose(last(whole, one), last(whole, other), rtol=1e-3, atol=1e-4)


def test_twins_are_random_reproducible_and_leave_the_model_alone(tiny):
    hf = tiny("gemma3")
    before = {k: v.clone() for k, v in hf.state_dict().items()}
    state = torch.random.get_rng_state()
    one, same, other = (random_twin(hf, seed, n_layers=2, causal=False) for seed in (0, 0, 1))
    assert torch.equal(state, torch.random.get_rng_state())
    for (name, a), b, c in zip(one.named_parameters(), same.parameters(), other.parameters()):
        assert torch.equal(a, b)
        assert a.ndim < 2 or not torch.equal(a, c), name
    assert one.config.num_hidden_layers == 2 and hf.config.num_hidden_layers == 3
    assert len(one.config.layer_types) == 2
    assert getattr(hf.config, "is_causal", True) is True
    assert all(torch.equal(v, before[k]) for k, v in hf.state_dict().items())


def test_what_has_no_positions_to_take_away_is_refused():
    from transformers import BloomConfig, BloomForCausalLM

    hf = BloomForCausalLM(BloomConfig(vocab_size=19, hidden_size=8, n_layer=1, n_head=2))
    with pytest.raises(ModelRefused, match="cannot be taken away"):
        random_twin(hf, 0, positions=False)


def test_bad_input_is_one_sentence(tiny):
    model = Model(tiny("llama"), "llama")
    with pytest.raises(PromptError, match="one length"):
        nope_adjacency.measure(model, [Prompt.from_tokens(range(9)), Prompt.from_tokens(range(8))])
    with pytest.raises(NumericalError, match="NaN"):
        nope_adjacency.cosines(np.full((4, 5), np.nan))
    with pytest.raises(ValueError, match="at least three"):
        nope_adjacency.adjacency(np.ones((2, 2)))
