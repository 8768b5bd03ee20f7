"""Small random Llamas to plant in: the spread of their weights is chosen, not left to a default."""

from typing import SupportsFloat, SupportsIndex

import numpy as np
import torch
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel


def random_llama(
    rng: np.random.Generator, n_layers: SupportsIndex, width: SupportsIndex = 64,
    spread: SupportsFloat = 0.5, *, vocabulary: SupportsIndex = 97, bos: SupportsIndex = 1,
) -> PreTrainedModel:
    """A Llama of four heads over two key-value heads with random weights.

    Example:
        >>> random_llama(np.random.default_rng(0), 2, 16).config.num_hidden_layers
        2

    Args:
        spread: standard deviation of the weights times the root of the width: with 0.5 the
            residual's norm stays near the embedding's, with 1.5 attention is far from even.
    """
    torch.manual_seed(int(rng.integers(2**31)))
    return LlamaForCausalLM(LlamaConfig(
        vocab_size=int(vocabulary), hidden_size=int(width), intermediate_size=3 * int(width) // 2,
        num_hidden_layers=int(n_layers), num_attention_heads=4, num_key_value_heads=2,
        bos_token_id=int(bos), pad_token_id=0, eos_token_id=2, max_position_embeddings=256,
        initializer_range=float(spread) / int(width) ** 0.5, tie_word_embeddings=False)).eval()
