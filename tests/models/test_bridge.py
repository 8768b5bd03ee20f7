"""The bridge: one set of weights, nothing installed, no silent edit, everything put back."""

import copy
import socket
import subprocess

import numpy as np
import pytest
import torch
import transformers
from tokenizers import Tokenizer, models, pre_tokenizers

import interp
from interp.core.errors import ModelRefused, SiteRefused
from interp.models import attention as attend
from interp.models import bridging
from interp.models.edits import Edits
from interp.models.lane_bridge import LaneBridge
from interp.models.model import Model

ALL = ("gpt2", "llama", "mistral", "qwen3", "gemma2", "gemma3", "gpt_oss", "gpt_neox", "opt",
       "bert", "llava", "qwen2_5_vl")
IDS = [5, 17, 3, 41, 29, 60, 8]


def fresh(tiny, architecture, **changes):
    """A model of its own, so that it may be changed."""
    hf = copy.deepcopy(tiny(architecture))
    for name, value in changes.items():
        setattr(hf, name, value)
    return hf


def logits(hf):
    with torch.no_grad():
        return hf(input_ids=torch.tensor([IDS])).logits[0]


def implementations(hf):
    configs = [getattr(module, "config", None) for module in hf.modules()]
    return [config._attn_implementation_internal for config in configs
            if isinstance(config, transformers.PreTrainedConfig)]


# -- one set of weights ------------------------------------------------------------------------


@pytest.mark.parametrize("architecture", ALL)
def test_every_weight_is_the_same_memory(lanes, architecture):
    hf = lanes(architecture)["hf"].hf
    bridge = lanes(architecture)["bridge"].bridge
    theirs = {x.untyped_storage().data_ptr() for x in (*hf.parameters(), *hf.buffers())}
    for name, weight in torch.nn.Module.named_parameters(bridge):
        assert weight.untyped_storage().data_ptr() in theirs, name
    inside = {id(x) for x in torch.nn.Module.parameters(bridge.original_model)}
    assert {id(x) for x in hf.parameters()} <= inside
    buffers = {id(x): x for x in bridge.original_model.buffers()}
    assert {id(x) for x in hf.buffers()} <= buffers.keys()
    # What it has beside that: an empty bias of the unembedding, the numbers of fused rows.
    more = [x for x in buffers.values() if x.untyped_storage().data_ptr() not in theirs]
    assert all(x.ndim == 1 for x in more) and sum(map(torch.numel, more)) <= 97 + 3 * 3 * 48


@pytest.mark.parametrize("architecture", ("gpt2", "gpt_neox", "llama"))
def test_a_weight_edited_in_place_is_edited_in_both_lanes(tiny, architecture):
    """Also where q, k and v are one fused projection, of which TransformerLens makes copies."""
    hf = fresh(tiny, architecture)
    bridge = LaneBridge(hf, None, "edited")
    before = logits(hf)
    with torch.no_grad():
        for name, weight in hf.named_parameters():
            if any(part in name for part in ("c_attn", "query_key_value", "q_proj")):
                weight.data.mul_(-0.5)
    after = logits(hf)
    assert (after - before).abs().max() > 0.05 * before.std()
    torch.testing.assert_close(logits(bridge.hf), after, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("architecture", ALL)
def test_the_plain_model_is_left_as_it_was(tiny, hooks, architecture):
    hf = fresh(tiny, architecture)
    expected, config = logits(hf), hf.config.to_dict()
    kinds = [(name, type(module)) for name, module in hf.named_modules()]
    used, hooked = implementations(hf), hooks(hf)
    lane = LaneBridge(hf, None, "untouched")
    lane.run([interp.Prompt.from_tokens(IDS)],
             [Edits(interp.Prompt.from_tokens(IDS), (), lane.shape)],
             _reads(lane), lambda *_: [], lambda *_: [], [0])
    assert torch.equal(logits(hf), expected)
    assert hf.config.to_dict() == config and implementations(hf) == used
    assert set(implementations(lane.hf)) == {"eager"}
    assert ("sdpa" in used) == (architecture not in ("gemma2", "gpt_oss")), "the control"
    assert [(name, type(module)) for name, module in hf.named_modules()] == kinds
    assert hooks(hf) == hooked


def _reads(lane):
    from interp.core.site import Site
    from interp.models.run import Reads

    return Reads([Site.parse("pattern")], lane.shape.n_layers, 1)


# -- nothing installed, no network -------------------------------------------------------------


@pytest.fixture
def sealed(monkeypatch):
    """No process is started and no connection opened."""

    def refuse(*args, **kwargs):
        raise AssertionError(f"must not happen: {args[:1]}")

    for name in ("check_call", "run", "Popen", "call", "check_output"):
        monkeypatch.setattr(subprocess, name, refuse)
    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "create_connection", refuse)


@pytest.fixture
def tokenizer():
    words = {f"w{i}": i for i in range(97)}
    inner = Tokenizer(models.WordLevel(words, unk_token="w0"))
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    # A name that only the hub could resolve: asking for it would show.
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=inner, bos_token="w1", unk_token="w0", name_or_path="nobody/nothing"
    )


@pytest.mark.parametrize("architecture", ("llama", "llava", "qwen2_5_vl"))
def test_opening_starts_no_process_and_asks_no_server(tiny, sealed, tokenizer, architecture):
    before = dict(tokenizer.special_tokens_map), tokenizer.padding_side
    lane = LaneBridge(tiny(architecture), tokenizer, "nobody/nothing")
    assert lane.bridge.to_tokens("w5 w6", prepend_bos=False).tolist() == [[5, 6]]
    assert lane.bridge.to_tokens("w5 w6", prepend_bos=True).tolist() == [[1, 5, 6]]
    assert (dict(tokenizer.special_tokens_map), tokenizer.padding_side) == before


def test_torchvision_is_never_installed(sealed):
    from transformer_lens.model_bridge.architecture_adapter import ArchitectureAdapter
    from transformer_lens.model_bridge.sources import _hf_format
    from transformer_lens.model_bridge.sources.transformers import helpers

    owners = [(helpers, "_ensure_torchvision"), (_hf_format, "get_tokenizer_with_bos"),
              (ArchitectureAdapter, "_check_required_libraries")]
    before = [getattr(*owner) for owner in owners]
    with pytest.raises(KeyboardInterrupt), bridging.nothing_installed():
        assert helpers._ensure_torchvision() is False
        raise KeyboardInterrupt
    assert [getattr(*owner) for owner in owners] == before


# -- no silent edits -----------------------------------------------------------------------------


@pytest.mark.parametrize("architecture, moves", [("opt", False), ("qwen2_5_vl", False),
                                                 ("llama", True), ("gpt2", True)])
def test_what_transformerlens_does_with_an_edited_pattern(lanes, architecture, moves):
    """The reason for the proof: in some architectures such an edit is dropped."""
    model = lanes(architecture)["bridge"]

    def first_key(pattern, hook):
        return torch.zeros_like(pattern).index_fill(-1, torch.tensor([0]), 1.0)

    import warnings

    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        edited = model.bridge.run_with_hooks(
            torch.tensor([IDS]), fwd_hooks=[("blocks.1.attn.hook_pattern", first_key)])[0]
    moved = float((edited - logits(model.hf)).abs().max() / edited.std())
    assert (moved > 0.05) if moves else (moved < 1e-4)


@pytest.mark.parametrize("architecture", ("opt", "qwen2_5_vl", "bert"))
@pytest.mark.parametrize("site, edit", [
    ("pattern", interp.edit("pattern.1", "multiply", 0.5)),
    ("pattern", interp.ablate("L1H1", by="uniform")),
    ("scores", interp.block([5], [3], layers=1)),
])
def test_an_edit_that_would_be_dropped_is_refused_by_name(lanes, architecture, site, edit):
    model = lanes(architecture)["bridge"]
    with pytest.raises(SiteRefused) as refused:
        model.run(interp.Prompt.from_tokens(IDS), write=edit)
    for word in (f"cannot write '{site}'", f"tiny-{architecture}", "lane 'bridge'", "lane 'hf'"):
        assert word in str(refused.value)
    assert site not in model.sites("write") and site in lanes(architecture)["hf"].sites("write")


def test_the_other_lane_is_named_even_if_nobody_has_tried_it(tiny):
    model = Model(tiny("opt"), "tiny-opt", lane="bridge")
    with pytest.raises(SiteRefused, match=r"left the outcome unchanged.\n  Try lane 'hf'"):
        model.run(interp.Prompt.from_tokens(IDS), write=interp.edit("pattern.1", "multiply", 0.5))


@pytest.mark.parametrize("architecture, missing", [
    ("gpt_neox", {"resid_mid", "q", "k"}), ("opt", {"q", "scores"}), ("bert", {"scores"}),
    ("qwen2_5_vl", {"q", "k", "scores"}), ("llama", set()), ("gpt2", set()), ("mistral", set()),
    ("qwen3", set()), ("gemma2", set()), ("gemma3", set()), ("gpt_oss", set()), ("llava", set()),
])
def test_which_sites_transformerlens_does_not_show(lanes, architecture, missing):
    proofs = lanes(architecture)["bridge"].proofs()
    assert {name for name, proof in proofs.items() if not proof.readable} == missing
    for name in missing:
        assert len(proofs[name].reason) > 20


# -- architectures of their own ------------------------------------------------------------------


def own(architecture):
    """Tiny models whose modeling code has attention, masks or head counts of its own."""
    sizes = dict(vocab_size=97, hidden_size=48, num_hidden_layers=3, num_attention_heads=6)
    cls, config = {
        "gpt_neo": (transformers.GPTNeoForCausalLM, lambda: transformers.GPTNeoConfig(
            vocab_size=97, hidden_size=48, num_layers=2, num_heads=6, intermediate_size=56,
            attention_types=[[["global", "local"], 1]], window_size=4, max_position_embeddings=64,
            bos_token_id=1, eos_token_id=2)),
        "mpt": (transformers.MptForCausalLM, lambda: transformers.MptConfig(
            vocab_size=97, d_model=48, n_layers=3, n_heads=6, max_seq_len=64)),
        "falcon": (transformers.FalconForCausalLM, lambda: transformers.FalconConfig(
            **sizes, bos_token_id=1, eos_token_id=2)),
        "phi3": (transformers.Phi3ForCausalLM, lambda: transformers.Phi3Config(
            **sizes, num_key_value_heads=2, intermediate_size=56, pad_token_id=0, bos_token_id=1,
            eos_token_id=2)),
    }[architecture]
    torch.manual_seed(3)
    hf = cls(config()).eval()
    with torch.no_grad():
        for weight in hf.parameters():
            weight.mul_(4.0 if weight.ndim > 1 else 1.0)
    return hf


@pytest.mark.parametrize("architecture", ("gpt_neo", "mpt"))
def test_models_that_only_the_bridge_opens(architecture):
    """Their masks are of another kind; the statistics still count who could see whom."""
    hf = own(architecture)
    with pytest.raises(ModelRefused, match="attention of its own.*lane='bridge'"):
        Model(hf, architecture)
    model = Model(hf, architecture, lane="bridge")
    torch.testing.assert_close(model.run(interp.Prompt.from_tokens(IDS)).logits[0], logits(hf))
    run = model.run(interp.Prompt.from_tokens(IDS), read="pattern", stats="received")
    p = run.reads["pattern"].values[0]
    open_ = np.broadcast_to(np.tril(np.ones((7, 7))), p.shape).copy()
    if architecture == "gpt_neo":
        open_[1] *= np.triu(np.ones((7, 7)), -3)
    assert (p > 0)[open_ > 0].all() and (p[open_ == 0] == 0).all()
    expected, counts = p.sum(-2), open_.sum(-2)
    found = run.stats["received"].values[0]
    known = np.isfinite(found)
    np.testing.assert_allclose(found[known], (expected / counts)[known], rtol=1e-4)
    assert known[0].all() and known.mean() > 0.5
    if architecture == "mpt":
        cut = model.run(interp.Prompt.from_tokens(IDS), read="pattern",
                        write=interp.block([5], [2], layers=1)).reads["pattern"].values[0]
        assert (cut[1, :, 5, 2] == 0).all() and (p[1, :, 5, 2] > 0).all()
        np.testing.assert_allclose(cut.sum(-1), 1, atol=1e-5)


@pytest.mark.parametrize("architecture, kv_heads", [("falcon", 1), ("phi3", 2)])
def test_fused_projections_with_shared_keys(architecture, kv_heads):
    """One projection for q, k and v, with fewer key-value heads: cut where the weights are."""
    hf = own(architecture)
    model, prompt = Model(hf, architecture, lane="bridge"), interp.Prompt.from_tokens(IDS)
    assert model.n_kv_heads == kv_heads
    reads = model.run(prompt, read=["v", "z", "pattern"]).reads
    assert reads["v"].shape == (1, 3, 7, kv_heads, 8)
    wide = np.repeat(reads["v"].values, 6 // kv_heads, axis=3)
    weighted = np.einsum("plhqk,plkhd->plqhd", reads["pattern"].values, wide)
    np.testing.assert_allclose(reads["z"].values, weighted, atol=1e-4)
    if architecture == "phi3":
        other = model.using("hf").run(prompt, read="v").reads["v"]
        np.testing.assert_allclose(reads["v"], other, atol=1e-5)
    with torch.no_grad():
        for name, weight in hf.named_parameters():
            if "qkv" in name or "query_key_value" in name:
                weight.data.mul_(-0.5)
    torch.testing.assert_close(model.run(prompt).logits[0], logits(hf), atol=1e-4, rtol=1e-4)


# -- refusals ------------------------------------------------------------------------------------


def test_an_architecture_that_transformerlens_does_not_know():
    config = transformers.BertConfig(vocab_size=97, hidden_size=48, intermediate_size=56,
                                     num_hidden_layers=2, num_attention_heads=6)
    hf = transformers.BertModel(config).eval()
    model = Model(hf, "headless")
    with pytest.raises(ModelRefused, match=r"TransformerLens cannot bridge headless \(BertModel\).*"
                                           "Use lane='hf'"):
        model.using("bridge")
    assert model.lane == "hf" and model.run(interp.Prompt.from_tokens(IDS)).prompts


def test_a_bridge_that_gives_other_logits_is_refused(tiny, monkeypatch):
    from transformer_lens.model_bridge.generalized_components import position_embeddings_attention

    broken = position_embeddings_attention.PositionEmbeddingsAttentionBridge
    forward = broken.forward

    def half(self, *args, **kwargs):
        out, weights = forward(self, *args, **kwargs)
        return out * 0.5, weights

    monkeypatch.setattr(broken, "forward", half)
    with pytest.raises(ModelRefused, match="does not reproduce tiny-llama .*Use lane='hf'"):
        LaneBridge(tiny("llama"), None, "tiny-llama")


def test_compatibility_mode_is_refused(tiny):
    hf = fresh(tiny, "gpt2")
    model = Model(hf, "tiny-gpt2", lane="bridge")
    expected = logits(hf)
    model.bridge.enable_compatibility_mode()
    with pytest.raises(ModelRefused, match="compatibility mode"):
        model.run(interp.Prompt.from_tokens(IDS))
    assert torch.equal(logits(hf), expected), "the plain model must keep its weights"


# -- everything is put back ------------------------------------------------------------------------


def state(model, hooks):
    """Everything a run could leave behind, in both lanes."""
    bridge = model.bridge
    return (
        hooks(model.hf), hooks(bridge),
        [len(getattr(module, "fwd_hooks", ())) for module in (*model.hf.modules(), *bridge.modules())],
        implementations(model.hf), implementations(bridge.original_model), len(attend._SESSIONS),
        transformers.AttentionInterface._global_mapping.get(attend.NAME),
        model._engine("bridge")._values,
    )


class Interrupted(Exception):
    pass


@pytest.mark.parametrize("lane", ("hf", "bridge"))
@pytest.mark.parametrize("architecture", ("gemma2", "llava"))
@pytest.mark.parametrize("error", (None, Interrupted, KeyboardInterrupt))
@pytest.mark.parametrize("where", ("apply", "pattern", "visible"))
def test_hooks_are_removed_whatever_happens(lanes, hooks, monkeypatch, architecture, lane, error, where):
    model = lanes(architecture)[lane]
    prompt = interp.Prompt.from_tokens(IDS)
    before, expected = state(model, hooks), model.run(prompt).logits[0]
    write = [interp.edit("resid_mid.1", "multiply", 0.5), interp.ablate("L1H1", by="uniform"),
             interp.ablate("L2H2"), interp.block([5], [3])]
    if error is None:
        model.run(prompt, read=["pattern", "q", "resid_post"], write=write, stats="received",
                  new_tokens=2)
    else:
        method, calls = getattr(Edits, where), []

        def fail(self, layer, *args, **kwargs):
            calls.append(layer)
            if layer == 1 and len(calls) > 1:
                raise error("in the middle of a pass")
            return method(self, layer, *args, **kwargs)

        with monkeypatch.context() as patched, pytest.raises(error):
            patched.setattr(Edits, where, fail)
            model.run(prompt, read=["pattern", "q", "resid_post"], write=write, stats="received",
                      new_tokens=2)
        assert calls
    assert state(model, hooks) == before
    assert torch.equal(model.run(prompt).logits[0], expected)


def test_hooks_of_the_user_stay(tiny):
    model = Model(fresh(tiny, "llama"), "tiny-llama", lane="bridge")
    fired = []
    model.bridge.add_hook("blocks.1.hook_mlp_out", lambda x, hook: fired.append(x.shape))
    point = model.bridge.hook_dict["blocks.1.hook_mlp_out"]
    model.run(interp.Prompt.from_tokens(IDS), read="mlp_out")
    assert len(fired) == 1 and len(point.fwd_hooks) == 1


def test_the_bridge_is_transformerlens_own(lanes):
    from transformer_lens.model_bridge import TransformerBridge

    model = lanes("gemma3")["hf"]
    assert isinstance(model.bridge, TransformerBridge) and model.lane == "hf"
    with torch.no_grad():
        out, cache = model.bridge.run_with_cache(torch.tensor([IDS]))
    torch.testing.assert_close(out[0], logits(model.hf), atol=1e-4, rtol=1e-4)
    read = model.using("bridge").run(interp.Prompt.from_tokens(IDS), read="pattern.1")
    np.testing.assert_allclose(read.reads["pattern.1"].values[0, 0],
                               cache["blocks.1.attn.hook_pattern"][0], atol=1e-6)
