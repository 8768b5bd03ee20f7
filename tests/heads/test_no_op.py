"""Derivatives by attention are finite differences; an unread token is a no-op, a read one is not."""

import functools

import numpy as np
import pytest
import torch
import transformers as t

import interp
from interp.core.errors import PromptError
from interp.heads import no_op
from interp.models.head_gradients import head_gradients
from interp.models.model import Model

IDS = [1, 5, 9, 13, 22, 40, 7, 8, 61, 33]


@pytest.fixture(scope="module")
def opened(tiny):
    """architecture -> the tiny model, opened once."""
    return functools.cache(lambda architecture: Model(tiny(architecture), f"tiny-{architecture}"))


def late(logits):
    return -logits.log_softmax(-1)[-1, 5] + logits.log_softmax(-1)[3, 7]


@pytest.mark.parametrize("architecture", ["llama", "gemma2", "gpt_oss", "mistral", "bert", "gpt2"])
def test_the_derivative_by_a_heads_output_predicts_a_small_change(opened, architecture):
    model = opened(architecture)
    prompt = interp.Prompt.from_tokens(IDS)
    found = head_gradients(model, prompt, late)
    assert found.loss == pytest.approx(float(late(model.run(prompt).logits[0])), abs=1e-4)
    step = torch.zeros(len(IDS), model.n_heads, model.d_head)
    # Along the gradient itself, where the change is largest beside rounding.
    step[3, 1] = found.z[1, 3, 1] / found.z[1, 3, 1].norm()
    def losses(size):
        write = interp.edit("z.1", "add", size * step)
        return float(late(model.run(prompt, write=write).logits[0].double()))
    slope = (losses(1e-2) - losses(-1e-2)) / 2e-2
    assert slope == pytest.approx(float((found.z[1] * step).sum()), rel=0.05, abs=1e-3)
    assert all(p.grad is None and p.requires_grad for p in model.hf.parameters())


def test_the_derivative_by_attention_predicts_an_edited_weight(opened):
    model, prompt = opened("llama"), interp.Prompt.from_tokens(IDS)
    layer, head, query, key = 2, 3, 9, 4
    slope = float(head_gradients(model, prompt, late).by_attention(layer)[head, query, key])
    def loss(size):
        step = np.zeros((model.n_heads, len(IDS), len(IDS)), dtype=np.float32)
        step[head, query, key] = size
        write = interp.edit(f"pattern.{layer}", "add", step)
        return float(late(model.run(prompt, write=write).logits[0].double()))
    assert slope == pytest.approx((loss(0.02) - loss(-0.02)) / 0.04, rel=0.05)


@pytest.fixture(scope="module")
def silenced(tiny):
    """A copy of the tiny Llama in which token 61 has no value in any head; its twin keeps it."""
    import copy

    hf = copy.deepcopy(tiny("llama"))
    with torch.no_grad():
        # A token with the embedding zero has the value zero in the first layer only.
        hf.model.embed_tokens.weight[61] = 0
        for block in hf.model.layers:
            block.mlp.down_proj.weight.zero_()
            # And it hears nothing from others: values see the tokens, not what attention added.
        for block in hf.model.layers[:-1]:
            block.self_attn.o_proj.weight.zero_()
    return Model(hf, "silenced")


def test_attention_to_a_token_without_a_value_is_a_no_op(silenced):
    prompt = interp.Prompt.from_tokens(IDS)
    aim = no_op.objective(silenced, [prompt] * 2)
    groups = [{"separator": [IDS.index(61)], "start": [0]}] * 2
    found = no_op.measure(silenced, aim, groups)["gradient"].mean(("sample", "head"))
    last = found.isel(layer=-1)
    assert float(last.sel(segment="separator")) == 0.0
    assert float(last.sel(segment="other")) > 1e-4 and float(last.sel(segment="start")) > 1e-4
    # In layers whose output goes nowhere, no attention matters at all.
    assert float(np.abs(found.isel(layer=slice(0, -1))).max()) == 0.0
    assert found.segment.values.tolist() == ["separator", "start", "other"]


def test_hidden_keys_do_not_count(opened):
    model, prompt = opened("mistral"), interp.Prompt.from_tokens(IDS)
    aim = no_op.objective(model, [prompt])
    grown = head_gradients(model, prompt, lambda x: aim.loss(0, x))
    # Key 2 is seen by the five queries from it on, in every layer.
    want = grown.by_attention(1)[:, 2:7, 2].abs().mean(-1).numpy()
    found = no_op.measure(model, aim, [{"separator": [2]}])["gradient"]
    assert np.allclose(found.sel(segment="separator").isel(sample=0, layer=1), want, atol=1e-7)


def test_hiding_a_token_costs_what_the_run_without_it_costs(opened):
    model = opened("llama")
    prompts = [interp.Prompt.from_tokens(IDS), interp.Prompt.from_tokens(IDS[:-1])]
    aim = no_op.objective(model, prompts)
    groups = [{"separator": [4]}, {"separator": []}]
    done = no_op.intervene(model, aim, groups, group="separator", layers=[1, 2])
    assert done["sample"].values.tolist() == [0] and done.manifest["left out"] == 1
    rest = [p for p in range(len(IDS)) if p != 4]
    logits = model.run(prompts[0], write=interp.block(rest, [4], layers=[1, 2])).logits[0]
    want = torch.nn.functional.cross_entropy(logits[:-1], torch.tensor(IDS[1:]))
    assert float(done["loss"][0]) == pytest.approx(float(want), abs=1e-5)
    assert float(done["loss"][0]) != float(done["baseline"][0])
    assert done["control"].shape == (5, 1) and "no group" in done.manifest["control"]
    with pytest.raises(PromptError, match="no prompt has tokens of the group 'end'"):
        no_op.intervene(model, aim, groups, group="end")


def test_every_kind_of_model_gets_the_loss_it_was_trained_with(opened, tiny):
    torch.manual_seed(0)
    headless = Model(t.BertModel(tiny("bert").config), "headless")
    prompts = [interp.Prompt.from_tokens(IDS), interp.Prompt.from_tokens(IDS[::-1])]
    aim = no_op.objective(headless, prompts, prompts)
    assert aim.kind == "contrastive"
    states = [torch.tensor(headless.run(p, read="resid_post.2").reads["resid_post.2"].values[0, 0])
              for p in prompts]
    losses = [float(aim.loss(i, s)) for i, s in enumerate(states)]
    # Each text is its own partner, so the loss is below that of guessing between two.
    assert max(losses) < np.log(2)
    assert head_gradients(headless, prompts[0], lambda x: aim.loss(0, x)).loss == pytest.approx(
        losses[0], abs=1e-5)
    with pytest.raises(PromptError, match="no vocabulary head"):
        no_op.objective(headless, prompts)

    masked = opened("bert")
    with pytest.raises(PromptError, match="no tokenizer that has a mask"):
        no_op.objective(masked, prompts)

    class Tokenizer:
        mask_token_id = 96

    masked.tokenizer, before = Tokenizer(), masked.tokenizer
    try:
        aim = no_op.objective(masked, prompts, fixed=[{"separator": [0, 9]}] * 2)
    finally:
        masked.tokenizer = before
    assert aim.kind == "masked token"
    for prompt, made, (places, targets) in zip(prompts, aim.prompts, aim.targets):
        changed = [i for i in range(10) if prompt.ids[i] != made.ids[i]]
        assert places.tolist() == changed and len(changed) == 1 and not {0, 9} & set(changed)
        assert targets.tolist() == [prompt.ids[i] for i in changed] and made.ids[changed[0]] == 96
