"""Settings of the whole test run, and tiny random models of real architectures."""

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("MPLBACKEND", "Agg")
# Threads of several processes on few cores wait for each other: kernels of notebooks, workers.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import functools
import inspect
import typing
from pathlib import Path
from typing import Any

import beartype
import jaxtyping
import pytest
import torch
import transformers as t

torch.set_num_threads(1)

_with_shapes = jaxtyping.jaxtyped
_without_shapes = beartype.beartype(conf=beartype.BeartypeConf(
    violation_type=jaxtyping.TypeCheckError))


def _names_axes(annotation: Any) -> bool:
    """Whether an annotation has an array with named axes somewhere in it."""
    if isinstance(annotation, str):  # a forward reference
        return "[Tensor" in annotation or "[np.ndarray" in annotation
    if inspect.isclass(annotation) and issubclass(annotation, jaxtyping.AbstractArray):
        return True
    return any(_names_axes(part) for part in typing.get_args(annotation) if part is not ...)


def _checked(this: Any = None, *, typechecker: Any) -> Any:
    """What `--jaxtyping-packages` puts on every function, without what costs time for nothing.

    Only where shapes are named must the arguments of a call be held against each other; elsewhere
    beartype alone makes the same checks. Closures are not checked: they would be decorated anew in
    every call of the function that holds them. This halves the time of the test run.
    """
    if this is None:
        return functools.partial(_checked, typechecker=typechecker)
    if inspect.isfunction(this):
        if "<locals>" in this.__qualname__:
            return this
        if not any(map(_names_axes, this.__annotations__.values())):
            return _without_shapes(this) if this.__annotations__ else this
    return _with_shapes(this, typechecker=typechecker)


jaxtyping.jaxtyped = _checked

REFERENCE = Path(__file__).resolve().parents[2] / "shared" / "reference"

# Every size differs from every other, so that no two axes can be mistaken for each other.
LLAMA = dict(vocab_size=97, hidden_size=48, intermediate_size=56, num_hidden_layers=3,
             num_attention_heads=6, num_key_value_heads=2, head_dim=8,
             max_position_embeddings=640, pad_token_id=0, bos_token_id=1, eos_token_id=2)
CLIP = dict(hidden_size=40, intermediate_size=44, num_hidden_layers=2, num_attention_heads=5,
            image_size=24, patch_size=8)


def _config(architecture: str) -> tuple[type, object]:
    text = dict(LLAMA)
    if architecture == "gpt2":
        return t.GPT2LMHeadModel, t.GPT2Config(
            vocab_size=97, n_embd=48, n_layer=3, n_head=6, n_positions=640, bos_token_id=1,
            eos_token_id=2)
    if architecture == "gpt_neox":
        return t.GPTNeoXForCausalLM, t.GPTNeoXConfig(
            vocab_size=97, hidden_size=48, intermediate_size=56, num_hidden_layers=3,
            num_attention_heads=6, max_position_embeddings=640, bos_token_id=1, eos_token_id=2)
    if architecture == "opt":
        return t.OPTForCausalLM, t.OPTConfig(
            vocab_size=97, hidden_size=48, ffn_dim=56, num_hidden_layers=3, num_attention_heads=6,
            max_position_embeddings=640, word_embed_proj_dim=48, pad_token_id=0, bos_token_id=1,
            eos_token_id=2, init_std=0.2)
    if architecture == "llama":
        return t.LlamaForCausalLM, t.LlamaConfig(**text)
    if architecture == "mistral":
        return t.MistralForCausalLM, t.MistralConfig(**text, sliding_window=5)
    if architecture == "qwen3":
        return t.Qwen3ForCausalLM, t.Qwen3Config(**text)
    if architecture == "gemma2":
        return t.Gemma2ForCausalLM, t.Gemma2Config(
            **text, sliding_window=5, query_pre_attn_scalar=8, attn_logit_softcapping=2.0,
            final_logit_softcapping=5.0)
    if architecture == "gemma3":
        return t.Gemma3ForCausalLM, t.Gemma3TextConfig(
            **text, sliding_window=5, query_pre_attn_scalar=8,
            layer_types=["sliding_attention", "full_attention", "sliding_attention"])
    if architecture == "gpt_oss":
        return t.GptOssForCausalLM, t.GptOssConfig(
            **text, num_local_experts=4, num_experts_per_tok=2, sliding_window=5,
            layer_types=["sliding_attention", "full_attention", "sliding_attention"])
    if architecture == "bert":
        return t.BertForMaskedLM, t.BertConfig(
            vocab_size=97, hidden_size=48, intermediate_size=56, num_hidden_layers=3,
            num_attention_heads=6, max_position_embeddings=640, pad_token_id=0)
    if architecture == "llava":
        return t.LlavaForConditionalGeneration, t.LlavaConfig(
            text_config=t.LlamaConfig(**text), vision_config=t.CLIPVisionConfig(**CLIP),
            image_token_index=96, vision_feature_layer=-1,
            vision_feature_select_strategy="default")
    if architecture == "qwen2_5_vl":
        return t.Qwen2_5_VLForConditionalGeneration, t.Qwen2_5_VLConfig(
            text_config={**text, "rope_parameters": {
                "rope_type": "default", "mrope_section": [2, 1, 1], "rope_theta": 10000.0}},
            vision_config=dict(depth=2, hidden_size=40, intermediate_size=44, num_heads=5,
                               patch_size=4, spatial_merge_size=2, temporal_patch_size=2,
                               window_size=16, out_hidden_size=48, fullatt_block_indexes=[1]),
            image_token_id=96, video_token_id=95, vision_start_token_id=94, vision_end_token_id=93)
    raise ValueError(architecture)


TEXT_ARCHITECTURES = ("gpt2", "llama", "mistral", "qwen3", "gemma2", "gemma3", "gpt_oss",
                      "gpt_neox", "opt")
IMAGE_ARCHITECTURES = ("llava", "qwen2_5_vl")


@functools.cache
def _tiny(architecture: str):
    cls, config = _config(architecture)
    torch.manual_seed(sum(architecture.encode()))
    model = cls(config).eval()
    with torch.no_grad():
        for name, weight in model.named_parameters():
            # Larger than at initialization, so that attention is far from uniform.
            if weight.ndim > 1:
                weight.mul_(4.0 if "embed" not in name and "wte" not in name else 8.0)
            elif "sinks" in name:
                weight.copy_(torch.linspace(-1.0, 2.0, weight.numel()))
    return model


@pytest.fixture(scope="session")
def tiny():
    """A tiny random model of a real architecture, by name; shared, so leave it as it was."""
    return _tiny


HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks",
         "_forward_hooks_with_kwargs", "_forward_pre_hooks_with_kwargs")


def _hooks(hf):
    return [(name, kind, list(getattr(module, kind))) for name, module in hf.named_modules()
            for kind in HOOKS]


@pytest.fixture(scope="session")
def hooks():
    """The hooks of every module of a model, to be compared before and after.

    Not "none at all": transformers leaves some of its own where states were once recorded, and the
    tiny models are shared by all tests.
    """
    return _hooks


@pytest.fixture(scope="session")
def reference() -> Path:
    """The folder of reference data beside the project; the test is skipped without it."""
    if not REFERENCE.is_dir():
        pytest.skip("the reference data are not beside this checkout (../shared/reference)")
    return REFERENCE
