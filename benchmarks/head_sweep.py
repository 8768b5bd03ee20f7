"""Every head ablated to zero, one at a time, and what that does to the last row of logits.

Two sizes, as cells cost a different thing in each: eight prompts of 128 tokens (matrix products), and
one of 16 (calls). The floor is a replay of a Llama in plain PyTorch, batched as is best for it.
"""

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from typing import Any, Optional

import torch
from torch import Tensor

from benchmarks import _models, _plain
from benchmarks._race import Contender, Race, Target, measure
from interp.causal.cell_makers import every_head
from interp.causal.grid import Sweep
from interp.causal.metrics import LogitDifference

NAME = "head_sweep"
OURS, FLOOR, ONE = "undertow", "floor, a layer's heads in a batch", "floor, one head at a time"
HOOKS, LENS = "HF sdpa, torch hooks", "TransformerLens get_act_patch_attn_head_out"
TRACE, INVOKES, PYVENE = "nnsight, a trace per head", "nnsight, invokes batched", "pyvene"
PEERS = (HOOKS, LENS, TRACE, INVOKES, PYVENE)
LONG, SHORT = "8 x 128", "1 x 16"
TARGETS = (
    Target("8 x 128 tokens: time against the floor", at_most=1.3, race=LONG, of=OURS,
           to=(FLOOR, ONE)),
    Target("1 x 16 tokens: time against the floor", at_most=1.3, race=SHORT, of=OURS,
           to=(FLOOR, ONE)),
    Target("8 x 128 tokens: the fastest peer's time against ours", at_least=1.8, race=LONG,
           of=PEERS, to=OURS),
    Target("1 x 16 tokens: TransformerLens' time against ours", at_least=7.0, race=SHORT, of=LENS,
           to=OURS),
)
TOKENS = (5, 6)
"""The metric is the difference of these tokens' logits."""


def difference(rows: Tensor) -> Tensor:
    return rows[..., TOKENS[0]] - rows[..., TOKENS[1]]


def undertow(model: Any, ids: Tensor) -> Callable[[], Any]:
    """The whole sweep as a user writes it, plain passes included: `[layer, head, prompt]`."""
    prompts = _models.prompts(ids)
    metric = LogitDifference(*([token] * len(prompts) for token in TOKENS))
    return lambda: Sweep(model, prompts, every_head(), metric).run()["value"].values


def hooked(hf: Any, ids: Tensor) -> Callable[[int, int], Tensor]:
    """A whole pass for a head, its part of the projection's input set to zero."""
    width = hf.config.hidden_size // hf.config.num_attention_heads

    def one(layer: int, head: int) -> Tensor:
        def zero(module: Any, args: tuple) -> tuple:
            z = args[0].clone()
            z[..., head * width : (head + 1) * width] = 0.0
            return (z,)

        handle = hf.model.layers[layer].self_attn.o_proj.register_forward_pre_hook(zero)
        try:
            return difference(hf(ids, use_cache=False, logits_to_keep=1).logits[:, -1])
        finally:
            handle.remove()

    return one


def every(hf: Any, ids: Tensor) -> Callable[[], Tensor]:
    """All heads, one after the other."""
    layers, heads = hf.config.num_hidden_layers, hf.config.num_attention_heads
    one = hooked(hf, ids)

    def run() -> Tensor:
        with torch.inference_mode():
            return torch.stack([torch.stack([one(a, b) for b in range(heads)])
                                for a in range(layers)])
    return run


def lens(hf: Any, ids: Tensor) -> Callable[[], Tensor]:
    """TransformerLens' own tool; its cache of the other prompt holds zeros."""
    from transformer_lens import ActivationCache, patching

    bridge = _models.bridge(hf)
    layers, heads = hf.config.num_hidden_layers, hf.config.num_attention_heads
    zeros = torch.zeros(*ids.shape, heads, hf.config.hidden_size // heads)
    cache = ActivationCache({f"blocks.{a}.attn.hook_z": zeros for a in range(layers)}, bridge)

    return gathered(lambda metric: patching.get_act_patch_attn_head_out_all_pos(
        bridge, ids, cache, metric), (layers, heads))


def gathered(tool: Callable[[Callable], Any], shape: tuple[int, int]) -> Callable[[], Tensor]:
    """A tool of TransformerLens, run; what its metric sees of every prompt, cell by cell."""
    from transformer_lens import patching

    def run() -> Tensor:
        rows: list[Tensor] = []

        def metric(logits: Tensor) -> Tensor:
            rows.append(difference(logits[:, -1]))
            return rows[-1].mean()

        with torch.inference_mode(), quiet(patching):
            tool(metric)
        return torch.stack(rows).unflatten(0, shape)
    return run


def quiet(patching: Any) -> ExitStack:
    """TransformerLens without a progress bar."""
    stack, before = ExitStack(), patching.tqdm
    patching.tqdm = lambda items, **_: items
    stack.callback(setattr, patching, "tqdm", before)
    return stack


def traced(hf: Any, ids: Tensor) -> Callable[[], Tensor]:
    """nnsight, a trace per head."""
    from nnsight import NNsight

    model = NNsight(hf)
    layers, heads = hf.config.num_hidden_layers, hf.config.num_attention_heads
    width = hf.config.hidden_size // heads

    def one(layer: int, head: int) -> Tensor:
        with torch.inference_mode(), model.trace(ids, use_cache=False, logits_to_keep=1):
            z = model.model.layers[layer].self_attn.o_proj.input.clone()
            z[..., head * width : (head + 1) * width] = 0.0
            model.model.layers[layer].self_attn.o_proj.input = z
            found = model.lm_head.output[:, -1].save()
        return difference(found)

    return lambda: torch.stack([torch.stack([one(a, b) for b in range(heads)])
                                for a in range(layers)])


def batched(hf: Any) -> Any:
    """nnsight's wrapper for which every invoke is a row of one batch."""
    from nnsight import NNsight

    class Rows(NNsight):
        def _batch_size(self, *inputs: Any, **kwargs: Any) -> int:
            return sum(len(ids) for ids in inputs)

        def _batch(self, invokes: list[tuple], fn: Any) -> tuple:
            kwargs = {name: value for _, more in invokes for name, value in more.items()}
            return (torch.cat([ids for inputs, _ in invokes for ids in inputs]),), kwargs

    return Rows(hf)


def invoked(hf: Any, ids: Tensor) -> Callable[[], Tensor]:
    """nnsight, the heads of a layer as invokes of one trace."""
    model = batched(hf)
    layers, heads = hf.config.num_hidden_layers, hf.config.num_attention_heads
    width = hf.config.hidden_size // heads

    def layer_of(layer: int) -> Tensor:
        found = []
        with torch.inference_mode(), model.trace(use_cache=False, logits_to_keep=1) as tracer:
            for head in range(heads):
                with tracer.invoke(ids):
                    z = model.model.layers[layer].self_attn.o_proj.input.clone()
                    z[..., head * width : (head + 1) * width] = 0.0
                    model.model.layers[layer].self_attn.o_proj.input = z
                    found.append(model.lm_head.output[:, -1].save())
        return torch.stack([difference(rows) for rows in found])

    return lambda: torch.stack([layer_of(a) for a in range(layers)])


def pyvened(hf: Any, ids: Tensor) -> Callable[[], Tensor]:
    """pyvene, an intervenable model per head."""
    import pyvene

    layers, heads = hf.config.num_hidden_layers, hf.config.num_attention_heads
    width = hf.config.hidden_size // heads

    def one(layer: int, head: int) -> Any:
        def zero(base: Tensor, source: Any = None) -> Tensor:
            base = base.clone()
            base[..., head * width : (head + 1) * width] = 0.0
            return base

        return pyvene.IntervenableModel(
            {"component": f"model.layers[{layer}].self_attn.o_proj.input", "intervention": zero},
            model=hf)

    made = [[one(a, b) for b in range(heads)] for a in range(layers)]

    def run() -> Tensor:
        with torch.inference_mode():
            return torch.stack([torch.stack([
                difference(cell({"input_ids": ids})[1].logits[:, -1]) for cell in row])
                for row in made])
    return run


def flops(
    hf: Any, prompts: int, length: int, chosen: Optional[Sequence[tuple[int, int]]] = None
) -> float:
    """Operations of the floor's matrix products: what differs and can reach the last row.

    Of all cells, or of the chosen ones (layer, head).
    """
    c = hf.config
    d, inner, kv = c.hidden_size, c.intermediate_size, c.hidden_size * c.num_key_value_heads
    kv = 2 * d * kv // c.num_attention_heads
    after, whole = d * d + 3 * d * inner, 2 * d * d + kv + 3 * d * inner
    layers, heads = c.num_hidden_layers, c.num_attention_heads
    where = [a for a in range(layers) for _ in range(heads)] if chosen is None else [
        a for a, _ in chosen]
    cells = sum(after * (length if a < layers - 1 else 1)
                + whole * length * max(0, layers - 2 - a)
                + (kv * length + whole if a < layers - 1 else 0) for a in where)
    return 2.0 * prompts * (cells + whole * length * layers)


def race(quick: bool, device: str = "cpu") -> list[Race]:
    """Both sizes; with `quick` 3 layers, 2 x 24 and 1 x 8 tokens."""
    hf = _models.llama(num_hidden_layers=3) if quick else _models.llama()
    model, found = _models.opened(hf), []
    for name, count, length in ((LONG, 2 if quick else 8, 24 if quick else 128),
                                (SHORT, 1, 8 if quick else 16)):
        ids = _models.tokens(count, length)
        contenders = [
            Contender(FLOOR, lambda ids=ids: difference(_plain.head_sweep(hf, ids, 8))),
            Contender(ONE, lambda ids=ids: difference(_plain.head_sweep(hf, ids, 1))),
            Contender(OURS, make=lambda ids=ids: undertow(model, ids)),
            *(Contender(peer, make=lambda make=make, ids=ids: make(hf, ids)) for peer, make in (
                (HOOKS, every), (LENS, lens), (TRACE, traced), (INVOKES, invoked),
                (PYVENE, pyvened))),
        ]
        found.append(measure(
            name, contenders, FLOOR, rounds=3 if quick or name == LONG else 11, seconds=120,
            sizes={"prompts": count, "tokens": length, "layers": model.n_layers,
                   "heads": model.n_heads, "cells": model.n_layers * model.n_heads},
            flops=flops(hf, count, length)))
    return found
