"""Continuations of many places in one run equal one run per place; carried states equal edits."""

import numpy as np
import pytest
import torch

import interp
from interp.core import ModelRefused, OutOfRange, Prompt, SiteRefused
from interp.models.futures import Readout, carried_logits, embedded, greedy_futures

ARCHITECTURES = ("llama", "gpt2", "mistral", "gemma2", "gpt_oss", "opt")
PLACES = [0, 7, 8, 13]  # neighbors whose continuations overlap, and the last position


@pytest.fixture
def prompt():
    return Prompt.from_tokens([1, *np.random.default_rng(3).integers(5, 90, 13)])


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_futures_equal_a_run_of_every_beginning(lanes, prompt, architecture):
    model = lanes(architecture)["hf"]
    found = greedy_futures(model, prompt, PLACES, steps=4)
    for i, place in enumerate(PLACES):
        start = Prompt(prompt.ids[: place + 1])
        run = model.run(start, new_tokens=4, read=("resid_post", "embed"))
        assert found.tokens[i].tolist() == run.new_tokens[0]
        states = run.reads["resid_post"].values[0]
        at = np.concatenate([run.reads["embed"].values[0, place][None], states[:, place]])
        size = np.abs(states).max()
        assert np.abs(found.states[:, i].numpy() - at).max() < 1e-4 * size
        assert np.abs(found.ahead[i].numpy() - states[-1, place : place + 4]).max() < 1e-4 * size


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_the_readout_is_what_follows_the_last_block(lanes, prompt, architecture):
    model = lanes(architecture)["hf"]
    run = model.run(prompt, read="resid_post.2")
    states = torch.tensor(run.reads["resid_post.2"].values[0, 0]).requires_grad_()
    logits = Readout(model, batch_size=4)(states)
    assert torch.allclose(logits, run.logits[0], atol=1e-3 * float(run.logits[0].abs().max()))
    (slope,) = torch.autograd.grad(logits[3, 7], states)
    assert bool(slope[3].any()) and not bool(slope[[0, 1, 2, 4]].any())
    assert all(p.requires_grad for p in model.hf.parameters())


@pytest.mark.parametrize("architecture", ("llama", "gpt2", "gemma2", "gpt_oss"))
@pytest.mark.parametrize("layer", (-1, 0, 2))
def test_a_carried_state_is_an_edit_of_the_last_prompt_position(lanes, prompt, architecture, layer):
    model = lanes(architecture)["hf"]
    first, rest = torch.tensor([prompt.ids[:6]]), torch.tensor([prompt.ids[6:9]] * 2)
    prefix = embedded(model._engine("hf"), first, {})[0]
    generator = torch.Generator().manual_seed(layer + 5)
    states = torch.randn(2, model.d_model, generator=generator)
    found = carried_logits(model, prefix, states, layer, rest)
    site = "embed" if layer < 0 else f"resid_post.{layer}"
    for row, state in zip(found, states):
        edit = interp.edit(site, "replace", state.numpy(), positions=[5])
        (logits,) = model.run(Prompt(prompt.ids[:9]), write=edit).logits
        assert torch.allclose(row, logits[5:9], atol=1e-3 * float(logits.abs().max()))
    # Without a state the prompt is an ordinary one.
    (plain,) = model.run(Prompt(prompt.ids[:9])).logits
    own = carried_logits(model, prefix, None, layer, rest)[0]
    assert torch.allclose(own, plain[5:9], atol=1e-3 * float(plain.abs().max()))


def test_after_the_last_block_nothing_is_carried_on(lanes, prompt):
    """No later position reads it: N = 0 is the state's own, all later logits are the prompt's."""
    model = lanes("llama")["hf"]
    prefix = torch.randn(5, model.d_model, generator=torch.Generator().manual_seed(0))
    states, tokens = torch.randn(3, model.d_model), torch.full((3, 2), 9)
    carried = carried_logits(model, prefix, states, model.n_layers - 1, tokens)
    none = carried_logits(model, prefix, None, model.n_layers - 1, tokens)
    assert torch.allclose(carried[:, 1:], none[:, 1:], atol=1e-5)
    assert torch.allclose(carried[:, 0], Readout(model)(states), atol=1e-4)
    middle = carried_logits(model, prefix, states, 0, tokens)
    assert not torch.allclose(middle[:, 1:], none[:, 1:], atol=1e-2)


def test_hooks_and_weights_are_left_as_they_were(lanes, prompt, hooks):
    model = lanes("llama")["hf"]
    before = model.run(prompt).logits[0]
    hooked = hooks(model.hf)
    with pytest.raises(IndexError):  # no such token: found out when the hooks are in place
        carried_logits(model, torch.zeros(4, model.d_model), torch.zeros(1, model.d_model), 0,
                       torch.tensor([[10_000]]))
    greedy_futures(model, prompt, [2], steps=2)
    assert hooks(model.hf) == hooked
    assert all(p.requires_grad for p in model.hf.parameters())
    assert torch.equal(model.run(prompt).logits[0], before)


def test_bad_input_is_one_sentence(lanes, prompt):
    model = lanes("llama")["hf"]
    with pytest.raises(OutOfRange, match="give at least one of each"):
        greedy_futures(model, prompt, [2], steps=0)
    with pytest.raises(OutOfRange, match="layer 3 does not exist"):
        carried_logits(model, torch.zeros(4, model.d_model), None, 3, torch.zeros(1, 1).long())
    with pytest.raises(SiteRefused, match="needs lane 'hf'"):
        Readout(lanes("llama")["bridge"])
    with pytest.raises(ModelRefused, match="is an encoder"):
        greedy_futures(lanes("bert")["hf"], prompt, [2])
