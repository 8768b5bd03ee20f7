"""The same architecture with random weights: what a model does before it has learned anything.

Twins without position encodings, or without the causal mask, separate what the mask, the encoding
and training each contribute (arXiv:2501.00073, arXiv:2509.21042).
"""

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Optional, SupportsIndex

import torch
from torch import nn
from transformers import PreTrainedModel

from interp.core.errors import ModelRefused

LEARNED = ("wpe", "embed_positions", "position_embeddings", "embed_position")


def random_twin(
    hf: PreTrainedModel,
    seed: SupportsIndex,
    *,
    n_layers: Optional[SupportsIndex] = None,
    positions: bool = True,
    causal: bool = True,
) -> PreTrainedModel:
    """A model of the same configuration with fresh random weights.

    Example:
        >>> from transformers import GPT2Config, GPT2LMHeadModel
        >>> hf = GPT2LMHeadModel(GPT2Config(vocab_size=9, n_embd=8, n_layer=3, n_head=2))
        >>> twin = random_twin(hf, 0, n_layers=2, positions=False)
        >>> len(twin.transformer.h), float(twin.transformer.wpe.weight.detach().abs().sum())
        (2, 0.0)

    Args:
        n_layers: only so many blocks, all for None: the first layers of a large model.
        positions: False takes the position encodings away (rotary frequencies and learned
            embeddings become zero), and windows of attention, which tell near from far too.
        causal: False lets every position see every other one.

    Raises:
        ModelRefused: position encodings that cannot be found, or a model that sees no later tokens
            for another reason than its mask.
    """
    config = copy.deepcopy(hf.config)
    text = config.get_text_config()
    if n_layers is not None:
        _shorten(text, int(n_layers))
    if not causal:
        for each in {id(c): c for c in (config, text)}.values():
            each.is_causal = False
    if not positions:
        _widen(text)
    text.use_cache = False
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(int(seed))
        made: Any = type(hf)(config).eval()
    made.to(next(hf.parameters()).device, next(hf.parameters()).dtype)
    if not positions:
        without_positions(made)
    return made


def _shorten(text: Any, n_layers: int) -> None:
    """Fewer blocks, also in what the configuration lists per block."""
    before = int(text.num_hidden_layers)
    if not 1 <= n_layers <= before:
        n_layers = min(max(1, n_layers), before)
    for name, value in list(vars(text).items()):
        if isinstance(value, list) and len(value) == before and before > 1:
            setattr(text, name, value[:n_layers])
    text.num_hidden_layers = n_layers


def _widen(text: Any) -> None:
    """Full attention in every block."""
    types = getattr(text, "layer_types", None)
    if types is not None and all("attention" in kind for kind in types):
        # The window itself stays: masks for it may still be made, though no block asks for one.
        text.layer_types = ["full_attention"] * len(types)
    elif getattr(text, "sliding_window", None) is not None:
        text.sliding_window = None


def without_positions(hf: PreTrainedModel) -> None:
    """Set a model's position encodings to nothing, in place. Raises `ModelRefused` if none is found.

    Example:
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> hf = LlamaForCausalLM(LlamaConfig(vocab_size=9, hidden_size=8, intermediate_size=8,
        ...                                   num_hidden_layers=1, num_attention_heads=2))
        >>> without_positions(hf)
        >>> float(hf.model.rotary_emb.inv_freq.sum())
        0.0
    """
    with torch.no_grad():
        for values in _encodings(hf):
            # cos 0 = 1 and sin 0 = 0: queries and keys are turned by nothing.
            values.zero_()


@contextmanager
def positions_off(hf: PreTrainedModel) -> Iterator[None]:
    """Inside the block the model has no position encodings; they come back after it.

    Example:
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> hf = LlamaForCausalLM(LlamaConfig(vocab_size=9, hidden_size=8, intermediate_size=8,
        ...                                   num_hidden_layers=1, num_attention_heads=2))
        >>> with positions_off(hf):
        ...     inside = float(hf.model.rotary_emb.inv_freq.sum())
        >>> inside, float(hf.model.rotary_emb.inv_freq.sum()) > 0
        (0.0, True)
    """
    found = _encodings(hf)
    before = [values.clone() for values in found]
    try:
        without_positions(hf)
        yield
    finally:
        with torch.no_grad():
            for values, old in zip(found, before):
                values.copy_(old)


def _encodings(hf: PreTrainedModel) -> list[torch.Tensor]:
    """Rotary frequencies and learned position embeddings of the language part."""
    decoder: Any = hf.get_decoder() if hasattr(hf, "get_decoder") else hf
    found = [buffer for name, buffer in decoder.named_buffers() if name.endswith("inv_freq")]
    found += [module.weight.data for name, module in decoder.named_modules()
              if name.split(".")[-1] in LEARNED and isinstance(module, nn.Embedding)]
    if not found:
        raise ModelRefused(
            f"{type(hf).__name__} has no rotary frequencies and no learned position embeddings, so "
            "its positions cannot be taken away."
        )
    return found
