"""The floor: a Llama replayed in plain PyTorch, with nothing that a sweep does not need.

One pass keeps what enters every block, keys, values and the heads' outputs. An edited variant is
computed from the edit on: heads from the output projection of their block, states from their block
and only from their position, earlier positions lending their keys and values; in the last block one
row is computed, besides keys and values. Variants of one block share a batch.
"""

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F


class Plain:
    """The weights of a Llama, and one run of a batch of prompts of equal length."""

    def __init__(self, hf: Any, ids: Tensor) -> None:
        model, config = hf.model, hf.config
        self.heads, self.kv = config.num_attention_heads, config.num_key_value_heads
        self.width = config.hidden_size // self.heads
        self.eps = config.rms_norm_eps
        self.layers = []
        for block in model.layers:
            a, m = block.self_attn, block.mlp
            self.layers.append(dict(
                n1=block.input_layernorm.weight, n2=block.post_attention_layernorm.weight,
                q=a.q_proj.weight, kv=torch.cat([a.k_proj.weight, a.v_proj.weight]),
                o=a.o_proj.weight, gu=torch.cat([m.gate_proj.weight, m.up_proj.weight]),
                d=m.down_proj.weight))
        self.norm, self.head = model.norm.weight, hf.lm_head.weight
        self.length = ids.shape[1]
        at = torch.arange(self.length, device=ids.device)[None]
        cos, sin = model.rotary_emb(self.norm, at)
        self.cos, self.sin = cos[0, :, None], sin[0, :, None]
        x = model.embed_tokens(ids)
        self.x, self.k, self.v, self.z = [], [], [], []
        for layer in range(len(self.layers)):
            self.x.append(x)
            k, v = self.keys(layer, x, 0)
            z = self.attend(self.queries(layer, x, 0), k, v)
            for kept, value in ((self.k, k), (self.v, v), (self.z, z)):
                kept.append(value)
            x = self.after(layer, x, z)
        self.x.append(x)

    def _norm(self, x: Tensor, weight: Tensor) -> Tensor:
        return F.rms_norm(x, (x.shape[-1],), weight, self.eps)

    def _turn(self, x: Tensor, first: int) -> Tensor:
        x = x.unflatten(-1, (-1, self.width))
        a, b = x.chunk(2, -1)
        rows = slice(first, first + x.shape[1])
        return x * self.cos[rows] + torch.cat([-b, a], -1) * self.sin[rows]

    def queries(self, layer: int, x: Tensor, first: int) -> Tensor:
        return self._turn(F.linear(self._norm(x, self.layers[layer]["n1"]),
                                   self.layers[layer]["q"]), first)

    def keys(self, layer: int, x: Tensor, first: int) -> tuple[Tensor, Tensor]:
        made = F.linear(self._norm(x, self.layers[layer]["n1"]), self.layers[layer]["kv"])
        k, v = made.chunk(2, -1)
        return self._turn(k, first), v.unflatten(-1, (-1, self.width))

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        rows, length = q.shape[1], k.shape[1]
        mask = None
        if 1 < rows < length:
            mask = torch.ones(length, length, dtype=torch.bool, device=q.device).tril()[-rows:]
        made = F.scaled_dot_product_attention(
            q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), attn_mask=mask,
            is_causal=1 < rows == length, enable_gqa=self.heads > self.kv)
        return made.transpose(1, 2)

    def after(self, layer: int, x: Tensor, z: Tensor) -> Tensor:
        w = self.layers[layer]
        x = x + F.linear(z.flatten(2), w["o"])
        gate, up = F.linear(self._norm(x, w["n2"]), w["gu"]).chunk(2, -1)
        return x + F.linear(F.silu(gate) * up, w["d"])

    def logits(self, x: Tensor) -> Tensor:
        return F.linear(self._norm(x[:, -1], self.norm), self.head)

    def onward(self, layer: int, x: Tensor, prompts: Tensor) -> Tensor:
        """From what enters a block in the last positions (as many as given) to the last row."""
        last, first = len(self.layers) - 1, self.length - x.shape[1]
        for number in range(layer, last + 1):
            k, v = self.keys(number, x, first)
            if first:
                k = torch.cat([self.k[number][prompts, :first], k], 1)
                v = torch.cat([self.v[number][prompts, :first], v], 1)
            if number == last:
                x, first = x[:, -1:], self.length - 1
            x = self.after(number, x, self.attend(self.queries(number, x, first), k, v))
        return self.logits(x)


def head_sweep(hf: Any, ids: Tensor, together: int) -> Tensor:
    """The last rows with every head zeroed, `[layer, head, prompt, vocab]`; `together` variants of a
    block per batch (one being a head of all prompts)."""
    with torch.inference_mode():
        plain, found = Plain(hf, ids), []
        last, count = len(plain.layers) - 1, len(ids)
        for layer in range(last + 1):
            rows = slice(-1, None) if layer == last else slice(None)
            for start in range(0, plain.heads, together):
                some = range(start, min(plain.heads, start + together))
                z = plain.z[layer][:, rows].repeat(len(some), 1, 1, 1)
                for i, head in enumerate(some):
                    z[i * count : (i + 1) * count, :, head] = 0.0
                x = plain.after(layer, plain.x[layer][:, rows].repeat(len(some), 1, 1), z)
                prompts = torch.arange(count).repeat(len(some))
                end = plain.logits(x) if layer == last else plain.onward(layer + 1, x, prompts)
                found.append(end.unflatten(0, (len(some), count)))
        return torch.cat(found).unflatten(0, (last + 1, plain.heads))


def patch_sweep(hf: Any, ids: Tensor, other: Tensor, together: int) -> Tensor:
    """The last rows with every state entering a block as in `other`, `[layer, position, prompt,
    vocab]`; `together` positions per batch, all from the first of them on."""
    with torch.inference_mode():
        plain, source, found = Plain(hf, ids), Plain(hf, other), []
        count, length = len(ids), ids.shape[1]
        for layer in range(len(plain.layers)):
            for start in range(0, length, together):
                some = range(start, min(length, start + together))
                x = plain.x[layer][:, start:].repeat(len(some), 1, 1)
                for i, at in enumerate(some):
                    x[i * count : (i + 1) * count, at - start] = source.x[layer][:, at]
                end = plain.onward(layer, x, torch.arange(count).repeat(len(some)))
                found.append(end.unflatten(0, (len(some), count)))
        return torch.cat(found).unflatten(0, (len(plain.layers), length))
