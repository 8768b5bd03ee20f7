"""Lane nnsight: one set of weights, sites that are proven and not named, nothing left behind."""

import copy
import subprocess
import sys

import numpy as np
import pytest
import torch
import transformers
from torch import nn
from transformers.models.llama import modeling_llama as llama

import interp
from interp.core.errors import ModelRefused, SiteRefused
from interp.models.edits import Pass
from interp.models.lane_nnsight import LaneNNsight
from interp.models.model import Model
from interp.models.nnsight_sites import given, mask_of

IDS = [5, 17, 3, 41, 29, 60, 8]


def logits(hf):
    with torch.no_grad():
        return hf(input_ids=torch.tensor([IDS])).logits[0]


def state(hf):
    """Everything about the modules that could change what they compute, but their weights."""
    return [
        (name, type(module), sorted(vars(module)), vars(module).get("forward"),
         [list(vars(module)[kind]) for kind in vars(module) if kind.endswith("_hooks")])
        for name, module in hf.named_modules()
    ]


@pytest.mark.parametrize("architecture", ("gpt2", "llama", "gpt_oss", "qwen2_5_vl"))
def test_every_weight_is_the_same_memory(tiny, architecture):
    hf = tiny(architecture)
    lane = LaneNNsight(hf, "shared")
    assert lane.hf is not hf
    mine, theirs = (
        {name: x.data_ptr() for name, x in (*one.named_parameters(), *one.named_buffers())}
        for one in (lane.hf, hf)
    )
    assert mine == theirs and len(mine) > 10


def test_a_trace_leaves_the_plain_model_as_it_was_also_when_it_fails(tiny):
    hf = copy.deepcopy(tiny("llama"))
    expected, before = logits(hf), state(hf)
    lane = Model(hf, "left").using("nnsight")
    prompt = interp.Prompt.from_tokens(IDS)
    base = lane.run(prompt).logits[0]
    for bad in (interp.block([4], "all"),  # raises inside the attention call of layer 0
                interp.edit("resid_post.1", "replace", np.zeros((3, 48)), positions=[1, 2, 3, 4])):
        with pytest.raises((SiteRefused, ValueError), match="without any key|has 3 rows"):
            lane.run(prompt, write=bad, read="z")
    assert torch.equal(logits(hf), expected)
    assert state(hf) == before
    assert torch.equal(lane.run(prompt).logits[0], base), "and the lane itself goes on"
    inside = lane._engine("nnsight")
    assert any("forward" in vars(module) for module in inside.hf.modules()), "the control"
    assert not inside.root.interleaver.interleaving and not inside.root.interleaver.mediators


def test_nothing_gets_a_save_method():
    """nnsight adds one to every object of the process when it is imported; here it is taken off.

    In a process of its own: where something else imported nnsight first, the method is its to keep.
    """
    script = ("import torch; from interp.models.nnsight_sites import load; load(); "
              "print(hasattr(object(), 'save'), hasattr(torch.zeros(1), 'save'))")
    said = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert said.stdout.split() == ["False", "False"]


def test_an_edit_in_place_of_a_weight_reaches_the_lane(tiny):
    hf = copy.deepcopy(tiny("llama"))
    lane, before = Model(hf, "edited").using("nnsight"), logits(hf)
    with torch.no_grad():
        hf.model.layers[1].self_attn.q_proj.weight.mul_(-0.5)
    after = logits(hf)
    assert (after - before).abs().max() > 0.05 * before.std()
    found = lane.run(interp.Prompt.from_tokens(IDS)).logits[0]
    torch.testing.assert_close(found, after, atol=1e-5, rtol=1e-4)


# -- sites are found by what they do -------------------------------------------------------------


def decoy(q, k, v, mask):
    """Given the same as attention, and an output of its shape; but it attends to nothing."""
    return v.repeat_interleave(q.shape[1] // v.shape[1], 1).transpose(1, 2) * 0.1, mask


class Renamed(llama.LlamaAttention):
    """Llama's attention in other words: no name and no position as in transformers."""

    def forward(self, hidden_states, position_embeddings=None, attention_mask=None,
                past_key_values=None, **kwargs):
        shape = (*hidden_states.shape[:-1], -1, self.head_dim)
        a, b, c = (f(hidden_states).view(shape).transpose(1, 2)
                   for f in (self.q_proj, self.k_proj, self.v_proj))
        a, b = llama.apply_rotary_pos_emb(a, b, *position_embeddings)
        if past_key_values is not None:
            b, c = past_key_values.update(b, c, self.layer_idx)
        extra, _ = decoy(a, b, c, attention_mask)
        attention_interface_1 = self.pick()
        out, weights = attention_interface_1(
            self, a, b, c, attention_mask, scaling=self.scaling, dropout=0.0)
        out = (out + self.decoys * extra).reshape(*shape[:-2], -1).contiguous()
        return self.o_proj(out), weights

    decoys = 1.0

    def pick(self):
        return llama.ALL_ATTENTION_FUNCTIONS.get_interface(
            self.config._attn_implementation, llama.eager_attention_forward)


class Nothing(Renamed):
    """Its only operation over q, k and v is not attention."""

    def pick(self):
        return lambda module, q, k, v, mask, **_: decoy(q, k, v, mask)


def rewritten(tiny, cls):
    hf = copy.deepcopy(tiny("llama"))
    for block in hf.model.layers:
        block.self_attn.__class__ = cls
    return hf


def test_the_call_that_attends_is_found_whatever_it_is_called(tiny, text_prompt):
    hf, prompt = rewritten(tiny, Renamed), text_prompt(0, 9)
    model = Model(hf, "renamed")
    lane = model.using("nnsight")
    assert lane._engine("nnsight").calls[0].name != "attention_interface_1"
    assert set(lane.sites("write")) == set(model.sites("write"))
    for write in ((), interp.ablate("L1H3"), interp.block([7], [5])):
        a, b = (one.run(prompt, read=["pattern", "z"], write=write) for one in (model, lane))
        torch.testing.assert_close(a.logits[0], b.logits[0], atol=1e-4, rtol=1e-4)
        for name in ("pattern", "z"):
            np.testing.assert_allclose(a.reads[name], b.reads[name], atol=1e-5)


def test_an_operation_that_only_looks_like_attention_is_refused(tiny):
    with pytest.raises(ModelRefused, match="no operation of Nothing.*computes attention"):
        LaneNNsight(rewritten(tiny, Nothing), "nothing")


def test_attention_of_ones_own_is_refused_with_the_lane_that_works():
    config = transformers.BloomConfig(vocab_size=50, hidden_size=16, n_layer=2, n_head=2)
    with pytest.raises(ModelRefused, match="BloomForCausalLM.*lane='bridge'"):
        LaneNNsight(transformers.BloomForCausalLM(config).eval(), "bloom")


def test_a_missing_mask_means_what_the_module_says():
    """None is causal, or a window, or everything; sdpa makes no mask where its own flag will do."""
    q = torch.zeros(1, 2, 4, 3)
    keys, queries = torch.arange(6), torch.arange(2, 6)
    k, v = torch.zeros(1, 2, 6, 3), torch.ones(1, 2, 6, 3)
    causal, full = nn.Module(), nn.Module()
    full.is_causal = False
    behind = queries[:, None] - keys
    for module, more, expected in (
        (causal, {}, behind >= 0), (full, {}, behind >= -9),
        (causal, {"sliding_window": 2}, (behind >= 0) & (behind < 2)),
        (causal, {"is_causal": False}, behind >= -9),
    ):
        found = given((module, q, k, v, None), more)
        mask = mask_of(module, found, Pass(2, 4))
        assert torch.equal(mask(0, queries, keys)[0], expected)
    dense = (behind >= 0) & (keys != 1)
    found = given((causal, q, k, v), {"attention_mask": dense[None, None]})
    assert torch.equal(mask_of(causal, found, Pass(2, 4))(0, queries, keys)[0], dense)
    assert given((causal, q, k, v, "a BlockMask"), {}) is None, "not to be mistaken for none"
    # A cache with a window has dropped the earliest keys: columns are not positions.
    found = given((causal, q[:, :, :1], k, v), {"attention_mask": dense[None, None, 3:]})
    assert torch.equal(mask_of(causal, found, Pass(9, 1))(0, torch.tensor([9]), keys + 4)[0],
                       dense[3:])
