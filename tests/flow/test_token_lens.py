"""Parts decoded early add up to the logits; spans, knockouts and norms against naive passes."""

import copy
import functools

import numpy as np
import pytest
import torch
from torch import nn

import interp
from interp.core import ModelRefused, Prompt, PromptError
from interp.flow import token_lens
from interp.models.early_decoding import EarlyDecoder, freeze
from interp.models.model import Model

DECODERS = ("gpt2", "llama", "qwen3", "gemma2", "gpt_oss", "gpt_neox", "opt", "qwen2_5_vl")
N = 11
SPANS = {"early": [1, 2, 3], "late": [6, 8], "last": "last"}
TARGETS = {"a": 5, "b": 17, "c": 60, "d": 88}


def biased(hf):
    """A copy in which nothing is trivial: biases are not zero and norms not one."""
    hf = copy.deepcopy(hf)
    torch.manual_seed(7)
    with torch.no_grad():
        for name, weight in hf.named_parameters():
            if weight.ndim == 1 and "sinks" not in name and "vis" not in name:
                weight.add_(0.3 * torch.randn_like(weight))
    return hf


@pytest.fixture(scope="module")
def opened(tiny):
    @functools.cache
    def made(architecture):
        model = Model(biased(tiny(architecture)), f"tiny-{architecture}")
        prompt = Prompt.from_tokens(np.random.default_rng(1).integers(3, 90, N))
        return model, prompt, EarlyDecoder(model)

    return made


@pytest.fixture(scope="module")
def measured(opened):
    @functools.cache
    def made(architecture):
        model, prompt, decoder = opened(architecture)
        return token_lens.measure(model, prompt, TARGETS, SPANS, decoder=decoder)

    return made


@pytest.mark.parametrize("architecture", DECODERS)
def test_parts_add_up_to_the_logits_of_the_model(opened, measured, architecture):
    """Over layers, heads, positions, MLPs, biases and the embedding, with either kind of norm."""
    model, prompt, decoder = opened(architecture)
    ids, found = list(TARGETS.values()), measured(architecture)
    logits = model.run(prompt).logits[0][-1]
    cap = getattr(model.config.get_text_config(), "final_logit_softcapping", None)
    if cap:
        logits = cap * torch.atanh(logits / cap)
    assert np.allclose(found["logit"][0], logits[ids], atol=2e-4)
    lens = token_lens.by_position(model, prompt, TARGETS, decoder)
    whole = lens.sum(("layer", "head", "position")) + (
        found["bias"] + found["mlp"]).isel(prompt=0).sum("layer") + found["rest"].isel(prompt=0)
    assert np.allclose(whole, logits[ids], atol=2e-4)
    # Each layer by itself: all positions and the bias are what attention adds, decoded as a whole.
    layers = lens.sum(("head", "position")) + found["bias"].isel(prompt=0)
    assert np.allclose(layers, found["attention"].isel(prompt=0), atol=1e-4)
    if architecture in ("gpt2", "gpt_neox", "opt"):
        assert float(abs(found["bias"]).max()) > 1e-3


@pytest.mark.parametrize("architecture", ["llama", "gemma2", "gpt2"])
def test_a_span_is_the_sum_of_its_positions_and_a_naive_loop_agrees(opened, measured, architecture):
    """Head by head with its own key-value head; the norms recomputed from what the model holds."""
    model, prompt, decoder = opened(architecture)
    found = measured(architecture)
    lens = token_lens.by_position(model, prompt, TARGETS, decoder)
    for name, where in SPANS.items():
        columns = lens.isel(position=list(prompt.positions(where)))
        assert np.allclose(columns.sum(("head", "position")),
                           found["lens"].sel(segment=name)[0], atol=1e-5)
        assert np.allclose(columns.sum("position").transpose("layer", "head", "target"),
                           found["heads"].sel(segment=name)[0], atol=1e-5)
    reads = model.run(prompt, read=["pattern", "v", "z", "attn_out", "resid_post"]).reads
    values = {k: torch.tensor(a.values[0]) for k, a in reads.items()}
    group = model.n_heads // model.n_kv_heads
    state = values["resid_post"][-1, -1]
    norm, head = decoder.norm, decoder.head.weight[list(TARGETS.values())]
    for layer in range(model.n_layers):
        o, w_o = torch.zeros(model.d_model), model.w_o(layer)
        for h in range(model.n_heads):
            for j in SPANS["early"]:
                o += (values["pattern"][layer, h, -1, j] * values["v"][layer, j, h // group]) @ w_o[h]
        if decoder.post[layer] is not None:
            # RMSNorm of Gemma: the weight is stored as its difference from one.
            whole = torch.einsum("hd,hdm->m", values["z"][layer, -1], w_o)
            post = decoder.post[layer]
            o = o * (1 + post.weight) / (whole.square().mean() + post.eps).sqrt()
        if architecture == "gpt2":
            u = (o - o.mean()) * norm.weight / (state.var(unbiased=False) + norm.eps).sqrt()
        else:
            gain = 1 + norm.weight if architecture == "gemma2" else norm.weight
            eps = norm.eps if architecture == "gemma2" else norm.variance_epsilon
            u = o * gain / (state.square().mean() + eps).sqrt()
        expected = (head @ u).detach().numpy()
        assert np.allclose(found["lens"].sel(segment="early", layer=layer)[0], expected, atol=2e-5)


@pytest.mark.parametrize("architecture", ["llama", "gpt_oss", "gemma2"])
def test_the_knockout_difference_is_that_of_whole_passes(opened, measured, architecture):
    model, prompt, decoder = opened(architecture)
    found, ids = measured(architecture), list(TARGETS.values())
    def passed(write):
        reads = model.run(prompt, read=["mlp_out", "resid_post"], write=write).reads
        out, post = (torch.tensor(reads[k].values[0, :, -1]) for k in ("mlp_out", "resid_post"))
        # Each run with its own final norm.
        return (out @ decoder.final(post[-1]).pull(decoder.directions(ids))).numpy()

    plain = passed(())
    assert np.allclose(plain, found["mlp"][0], atol=1e-4)
    for name, where in SPANS.items():
        keys = list(prompt.positions(where))
        kept = np.ones((model.n_heads, N, N), dtype=np.float32)
        kept[:, -1, keys] = 0
        zeroed = passed(interp.edit("pattern", "multiply", kept))
        cut = passed(interp.block("last", keys))
        for knockout, other in (("zeroed", zeroed), ("renormalized", cut)):
            one = found["mlp_difference"].sel(knockout=knockout, segment=name)[0]
            assert np.allclose(one, plain - other, atol=2e-4), (name, knockout)
        assert not np.allclose(zeroed, cut, atol=1e-3)
    assert float(abs(found["mlp_difference"]).max()) > 1e-2


def test_a_planted_head_suppresses_what_it_reads_and_no_other_head_or_span_does(tiny):
    """Head 4 of layer 1 writes minus the word it attends to; attention is even, so all is known."""
    hf = copy.deepcopy(tiny("llama"))
    with torch.no_grad():
        for layer in hf.model.layers:
            # Next to nothing, but not nothing: a site that moves no logit cannot be told.
            layer.self_attn.o_proj.weight.mul_(0.01)
            layer.mlp.down_proj.weight.mul_(0.01)
            layer.self_attn.q_proj.weight.zero_()
        attention = hf.model.layers[1].self_attn
        # Heads 3 to 5 share one key-value head; the row of word 17 is what head 4 takes away.
        word = hf.model.embed_tokens.weight[17]
        attention.v_proj.weight[8:16] = word / word.norm() * torch.eye(8)[0][:, None]
        attention.o_proj.weight[:, 4 * 8] = -hf.lm_head.weight[17] / 10
    prompt = Prompt.from_tokens([3, 17, 9, 40, 41, 5], {"read": (1, 2), "other": (3, 4)})
    found = token_lens.measure(Model(hf, "planted"), prompt, {"word": 17, "random": 55},
                               {"read": "read", "other": "other"})
    heads = found["heads"].isel(prompt=0).sel(target="word")
    read = heads.sel(segment="read")
    assert int(read.argmin(...)["layer"]) == 1 and int(read.argmin(...)["head"]) == 4
    others = np.delete(read.values.ravel(), 1 * 6 + 4)
    assert float(read.min()) < -0.05 and abs(others).max() < 0.1 * abs(float(read.min()))
    assert abs(float(heads.sel(segment="other")[1, 4])) < 0.3 * abs(float(read.min()))
    assert np.allclose(found["mass"].sel(segment="read"), 1 / 6)


def test_biases_belong_to_no_span(opened):
    """With other biases of the projection, attention's whole changes and no position does."""
    model, prompt, _ = opened("gpt2")
    hf = copy.deepcopy(model.hf)
    with torch.no_grad():
        # In the last block: nothing that is read later changes but the final state's statistics.
        hf.transformer.h[2].attn.c_proj.bias.add_(0.2 * torch.randn(48))
    other = token_lens.measure(Model(hf, "other"), prompt, TARGETS, {"all": "all"})
    here = token_lens.measure(model, prompt, TARGETS, {"all": "all"})
    scale = (other["lens"] / here["lens"]).values[0, 0, 0]
    # The same numbers up to the one scale of the final norm.
    assert np.allclose(other["lens"], here["lens"] * scale[0], atol=1e-5)
    assert not np.allclose(other["bias"][0, 2], here["bias"][0, 2] * scale[0], atol=1e-2)


def test_a_span_that_is_all_the_row_sees_cannot_be_renormalized(opened):
    model, prompt, decoder = opened("llama")
    found = token_lens.measure(model, prompt, TARGETS, {"all": "all"}, decoder=decoder)
    difference = found["mlp_difference"].sel(segment="all")
    assert np.isnan(difference.sel(knockout="renormalized")).all()
    assert np.isfinite(difference.sel(knockout="zeroed")).all()


class Cubed(nn.Module):
    def forward(self, x):
        return x**3


def test_only_norms_that_become_linear_are_frozen():
    x = torch.randn(9, generator=torch.Generator().manual_seed(0)) * 3 + 2
    for norm in (nn.LayerNorm(9), nn.RMSNorm(9)):
        with torch.no_grad():
            for weight in norm.parameters():
                weight.add_(torch.randn(9))
        frozen, other = freeze(norm, x), torch.randn(9)
        assert torch.allclose(frozen(x) + frozen.bias, norm(x), atol=1e-5)
        directions = torch.randn(9, 2)
        assert torch.allclose(frozen(other) @ directions, other @ frozen.pull(directions), atol=1e-5)
        assert frozen.centered == isinstance(norm, nn.LayerNorm)
    with pytest.raises(ModelRefused, match="Cubed is not linear with its statistics held"):
        freeze(Cubed(), x)


def test_bad_input_is_named(opened, tiny):
    model, prompt, decoder = opened("llama")
    with pytest.raises(PromptError, match="targets of prompt 0 need .* different tokens"):
        token_lens.measure(model, prompt, {"a": 5, "b": 5}, SPANS, decoder=decoder)
    with pytest.raises(PromptError, match="1 prompts and 2 sets of targets"):
        token_lens.measure(model, prompt, [TARGETS, TARGETS], SPANS, decoder=decoder)
    with pytest.raises(interp.UndertowError, match="no segment 'subject'"):
        token_lens.measure(model, prompt, TARGETS, {"subject": "subject"}, decoder=decoder)
    with pytest.raises(ModelRefused, match="tiny-bert is an encoder"):
        EarlyDecoder(Model(tiny("bert"), "tiny-bert"))


def test_attention_that_is_more_than_its_heads_is_refused(tiny):
    hf = copy.deepcopy(tiny("llama"))
    attention = hf.model.layers[1].self_attn
    plain = attention.forward
    attention.forward = lambda *args, **kwargs: (torch.tanh((out := plain(*args, **kwargs))[0]), out[1])
    with pytest.raises(ModelRefused, match="in layer 1 of LlamaForCausalLM attention adds something"):
        EarlyDecoder(Model(hf, "twisted"))


def test_the_figure_is_drawn_from_the_result_alone(measured):
    from interp.figures.style import canvas

    _, ax = canvas()
    token_lens.draw(measured("llama"), ax, "early", "mlp_difference")
    assert ax.get_xlabel() == "layer" and "difference" in ax.get_ylabel()
    assert len(ax.get_legend_handles_labels()[0]) == len(TARGETS)
