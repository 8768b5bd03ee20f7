"""Attention of some rows to some keys, exactly: fused where nothing but a mask is asked for."""

from typing import Any, Optional

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

ROOM = 1 << 25
"""Largest number of attention weights held at once, where whole rows are made."""


def whole_rows(
    q: Float[Tensor, "batch head query d_head"], k: Float[Tensor, "batch head key d_head"],
    seen: Bool[Tensor, "#batch #head query key"], given: dict[str, Any],
) -> Float[Tensor, "batch head query key"]:
    """Attention weights with whatever caps the logits or takes a share beside the keys."""
    scores = q.float() @ k.float().transpose(2, 3) * given["scaling"]
    if given["softcap"] is not None:
        scores = torch.tanh(scores / given["softcap"]) * given["softcap"]
    scores = scores.masked_fill(~seen, float("-inf"))
    if given["sinks"] is not None:
        extra = given["sinks"].float().reshape(1, -1, 1, 1).expand(len(q), -1, q.shape[2], 1)
        scores = torch.cat([scores, extra], -1)
    return scores.softmax(-1)[..., : k.shape[2]]


def attended(
    q: Float[Tensor, "batch head query d_head"], k: Float[Tensor, "batch kv_head key d_head"],
    v: Float[Tensor, "batch kv_head key d_value"], seen: Optional[Tensor], given: dict[str, Any],
) -> Float[Tensor, "batch query head d_value"]:
    """What rows read; `seen` is `[.., query, key]`, None for causal attention."""
    group = q.shape[1] // k.shape[1]
    if given["softcap"] is None and given["sinks"] is None:
        made = nn.functional.scaled_dot_product_attention(
            q, k, v, attn_mask=seen, is_causal=seen is None, scale=given["scaling"],
            enable_gqa=group > 1)
        return made.transpose(1, 2)
    k, v = (x.repeat_interleave(group, 1) for x in (k, v))
    if seen is None:
        seen = torch.ones(q.shape[2], k.shape[2], dtype=torch.bool, device=q.device).tril()
    seen = seen[(None,) * (4 - seen.ndim)]
    step = max(1, ROOM // max(1, q.shape[0] * q.shape[1] * k.shape[2]))
    parts = [whole_rows(q[:, :, i : i + step], k, seen[:, :, i : i + step], given).to(v.dtype) @ v
             for i in range(0, q.shape[2], step)]
    return torch.cat(parts, 2).transpose(1, 2)
