"""What the contenders run: one random Llama of a fixed shape, and random prompts."""

from typing import Any, Optional

import torch
import transformers
from torch import Tensor

from interp.core import Prompt

SHAPE: dict[str, Any] = dict(
    vocab_size=1000, hidden_size=256, intermediate_size=688, num_hidden_layers=8,
    num_attention_heads=8, num_key_value_heads=4, max_position_embeddings=32768, pad_token_id=0,
    bos_token_id=1, eos_token_id=2, tie_word_embeddings=False,
)
"""8 layers, 8 heads over 4 key-value heads, width 256, 1000 tokens."""


def llama(
    device: str = "cpu", implementation: str = "sdpa", dtype: Optional[str] = None, **shape: Any
) -> Any:
    """A Llama with random weights, the same in every process; larger than at initialization, so
    that attention is not uniform and what is edited matters. With `dtype` it is made in that type
    and on the device: there may be no room for it elsewhere."""
    config = transformers.LlamaConfig(**{**SHAPE, **shape})
    config._attn_implementation = implementation
    before = torch.get_default_dtype()
    with torch.random.fork_rng(devices=[]), torch.device(device if dtype else "cpu"):
        torch.manual_seed(0)
        torch.set_default_dtype(getattr(torch, dtype) if dtype else before)
        try:
            model = transformers.LlamaForCausalLM(config).eval()
        finally:
            torch.set_default_dtype(before)
        for name, weight in model.named_parameters():
            if weight.ndim > 1:
                weight.data.mul_(50.0 if "embed_tokens" in name else 3.0)
    return model.requires_grad_(False).to(device)


def opened(hf: Any) -> Any:
    """A model as ours, with its sites proven."""
    from interp.models.model import Model

    return Model(hf, "random-llama")


def tokens(prompts: int, length: int, seed: int = 1, device: str = "cpu") -> Tensor:
    """Random tokens [prompt, position], no special ones among them."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(3, SHAPE["vocab_size"], (prompts, length), generator=generator).to(device)


def prompts(ids: Tensor) -> list[Prompt]:
    """The same tokens as prompts of ours."""
    return [Prompt.from_tokens(row) for row in ids.tolist()]


def bridge(hf: Any) -> Any:
    """The same weights as TransformerLens' bridge; raises what its absence raises."""
    return opened(hf).bridge
