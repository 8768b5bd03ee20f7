"""The floor for edits of one prompt: a replay of a Llama written out in plain PyTorch.

It restarts from the cached input of the edited layer, batches cells, and recomputes only the
positions that can change. Nothing of undertow is used.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F


class Replay:
    """One prompt run once by functional PyTorch, and its rows again from any layer on."""

    def __init__(self, hf: Any, ids: Tensor) -> None:
        self.hf, self.layers, self.ids = hf, hf.model.layers, ids
        self.heads, self.kv = hf.config.num_attention_heads, hf.config.num_key_value_heads
        self.eps, self.d = hf.config.rms_norm_eps, hf.config.hidden_size // self.heads
        self.length = ids.shape[-1]
        with torch.inference_mode():
            x = hf.model.embed_tokens(ids)
            self.cos, self.sin = hf.model.rotary_emb(x, torch.arange(self.length)[None])
            self.cos, self.sin = self.cos[0], self.sin[0]
            self.hidden: list[Tensor] = []
            self.keys: list[Tensor] = []
            self.values: list[Tensor] = []
            rows = torch.arange(self.length)
            for number in range(len(self.layers)):
                self.hidden.append(x[0])
                q, k, v = self._project(number, x, rows)
                self.keys.append(k[0])
                self.values.append(v[0])
                z = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
                x = self._rest(number, x, z)
            self.last = self.unembed(x[:, -1])[0]

    def _project(self, number: int, x: Tensor, rows: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        block = self.layers[number]
        a = block.self_attn
        normed = F.rms_norm(x, (x.shape[-1],), block.input_layernorm.weight, self.eps)
        shape = (*x.shape[:2], -1, self.d)
        q, k, v = (F.linear(normed, w).view(shape).transpose(1, 2)
                   for w in (a.q_proj.weight, a.k_proj.weight, a.v_proj.weight))
        cos, sin = self.cos[rows][..., None, :, :], self.sin[rows][..., None, :, :]
        return _rotated(q, cos, sin), _rotated(k, cos, sin), v

    def _rest(self, number: int, x: Tensor, z: Tensor) -> Tensor:
        block = self.layers[number]
        x = x + F.linear(z.transpose(1, 2).reshape(*x.shape[:2], -1), block.self_attn.o_proj.weight)
        normed = F.rms_norm(x, (x.shape[-1],), block.post_attention_layernorm.weight, self.eps)
        m = block.mlp
        gated = F.silu(F.linear(normed, m.gate_proj.weight), inplace=True)
        return x + F.linear(gated.mul_(F.linear(normed, m.up_proj.weight)), m.down_proj.weight)

    def unembed(self, x: Tensor) -> Tensor:
        normed = F.rms_norm(x, (x.shape[-1],), self.hf.model.norm.weight, self.eps)
        return F.linear(normed, self.hf.lm_head.weight)

    def from_layer(
        self, layer: int, rows: Tensor, prefix: int, seen: Tensor, short: bool = False
    ) -> Tensor:
        """The last row of logits [batch, vocab]; `rows` [batch, row] see `seen` [batch, row, key].

        Keys are those of the plain run before `prefix`, then the rows' own. With `short` the last
        block attends and goes through the MLP for its last row alone.
        """
        with torch.inference_mode():
            x, batch = self.hidden[layer][rows], len(rows)
            mask = torch.zeros(seen.shape).masked_fill_(~seen, float("-inf"))[:, None]
            end = len(self.layers) - 1
            for number in range(layer, end + 1):
                q, k, v = self._project(number, x, rows)
                if prefix:
                    k, v = (torch.cat([old[number][:, :prefix].expand(batch, -1, -1, -1), new], 2)
                            for old, new in ((self.keys, k), (self.values, v)))
                if short and number == end:
                    x, q, mask = x[:, -1:], q[:, :, -1:], mask[:, :, -1:]
                z = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=True)
                x = self._rest(number, x, z)
            return self.unembed(x[:, -1])

    def without(
        self, layers: Sequence[int], places: Sequence[int], batch: int = 8, short: bool = False
    ) -> Tensor:
        """The last row [layer, place, vocab] with one position dropped from a layer on.

        Neighboring positions share a batch, whose rows begin behind the first of them.
        """
        every = torch.arange(self.length)
        found = []
        for layer in layers:
            for at in range(0, len(places), batch):
                part = places[at : at + batch]
                prefix = min(part)
                rows = torch.stack([torch.cat([every[prefix:p], every[p + 1 :]]) for p in part])
                keys = torch.cat([every[:prefix].expand(len(part), -1), rows], 1)
                found.append(self.from_layer(layer, rows, prefix,
                                             keys[:, None, :] <= rows[:, :, None], short))
        return torch.cat(found).reshape(len(layers), len(places), -1)


def _rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    half = x.shape[-1] // 2
    return x * cos + torch.cat([-x[..., half:], x[..., :half]], -1) * sin
