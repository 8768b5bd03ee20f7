"""Activation patching: every state that enters a block, one (layer, position) at a time.

Two sizes: four prompts of 64 tokens, and one of 16. The floor is a replay of a Llama in plain
PyTorch, from the patched block and position on, batched as is best for it.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from benchmarks import _models, _plain
from benchmarks._race import Contender, Race, Target, measure
from benchmarks.head_sweep import TOKENS, batched, difference, gathered
from interp.causal.cell_makers import every_state
from interp.causal.grid import Sweep
from interp.causal.metrics import LogitDifference

NAME = "patching"
OURS, HOOKS, LENS = "undertow", "HF sdpa, torch hooks", "TransformerLens get_act_patch_resid_pre"
TRACE, INVOKES = "nnsight, a trace per cell", "nnsight, invokes batched"
BATCHES = (2, 4, 8)
FLOORS = tuple(f"floor, {count} positions in a batch" for count in BATCHES)
PEERS = (HOOKS, LENS, TRACE, INVOKES)
LONG, SHORT = "4 x 64", "1 x 16"
TARGETS = (
    Target("4 x 64 tokens: time against the floor", at_most=1.3, race=LONG, of=OURS, to=FLOORS),
    Target("1 x 16 tokens: time against the floor", at_most=1.3, race=SHORT, of=OURS, to=FLOORS),
    Target("4 x 64 tokens: the fastest peer's time against ours", at_least=2.0, race=LONG, of=PEERS,
           to=OURS),
    Target("1 x 16 tokens: TransformerLens' time against ours", at_least=7.0, race=SHORT, of=LENS,
           to=OURS),
)


def undertow(model: Any, ids: Tensor, other: Tensor) -> Callable[[], Any]:
    """The whole sweep as a user writes it, all plain passes included: `[layer, position, prompt]`."""
    prompts, source = _models.prompts(ids), _models.prompts(other)
    metric = LogitDifference(*([token] * len(prompts) for token in TOKENS))
    return lambda: Sweep(model, prompts, every_state("resid_pre", source), metric).run()[
        "value"].values


def hooked(hf: Any, ids: Tensor, other: Tensor) -> Callable[[], Tensor]:
    """A whole pass per cell, the block's input patched by a hook."""
    layers, length = hf.config.num_hidden_layers, ids.shape[1]

    def run() -> Tensor:
        with torch.inference_mode():
            states = hf(other, use_cache=False, output_hidden_states=True).hidden_states

            def one(layer: int, at: int) -> Tensor:
                def put(module: Any, args: tuple) -> tuple:
                    x = args[0].clone()
                    x[:, at] = states[layer][:, at]
                    return (x, *args[1:])

                handle = hf.model.layers[layer].register_forward_pre_hook(put)
                try:
                    return difference(hf(ids, use_cache=False, logits_to_keep=1).logits[:, -1])
                finally:
                    handle.remove()

            return torch.stack([torch.stack([one(a, b) for b in range(length)])
                                for a in range(layers)])
    return run


def lens(hf: Any, ids: Tensor, other: Tensor) -> Callable[[], Tensor]:
    """TransformerLens' own tool."""
    from transformer_lens import patching

    bridge = _models.bridge(hf)

    def tool(metric: Callable) -> None:
        _, cache = bridge.run_with_cache(
            other, names_filter=lambda name: name.endswith("hook_resid_pre"))
        patching.get_act_patch_resid_pre(bridge, ids, cache, metric)

    return gathered(tool, (hf.config.num_hidden_layers, ids.shape[1]))


def _states(model: Any, ids: Tensor, layers: int) -> list[Tensor]:
    found = []
    with torch.inference_mode(), model.trace(ids, use_cache=False):
        for layer in range(layers):
            found.append(model.model.layers[layer].input.save())
    return found


def traced(hf: Any, ids: Tensor, other: Tensor) -> Callable[[], Tensor]:
    """nnsight, a trace per cell."""
    from nnsight import NNsight

    model, layers = NNsight(hf), hf.config.num_hidden_layers

    def run() -> Tensor:
        states = _states(model, other, layers)

        def one(layer: int, at: int) -> Tensor:
            with torch.inference_mode(), model.trace(ids, use_cache=False, logits_to_keep=1):
                x = model.model.layers[layer].input.clone()
                x[:, at] = states[layer][:, at]
                model.model.layers[layer].input = x
                found = model.lm_head.output[:, -1].save()
            return difference(found)

        return torch.stack([torch.stack([one(a, b) for b in range(ids.shape[1])])
                            for a in range(layers)])
    return run


def invoked(hf: Any, ids: Tensor, other: Tensor) -> Callable[[], Tensor]:
    """nnsight, 16 positions of a layer as invokes of one trace."""
    model, plain, layers = batched(hf), batched(hf), hf.config.num_hidden_layers

    def run() -> Tensor:
        states, found = _states(plain, other, layers), []
        for layer in range(layers):
            for start in range(0, ids.shape[1], 16):
                rows = []
                with torch.inference_mode(), model.trace(
                        use_cache=False, logits_to_keep=1) as tracer:
                    for at in range(start, min(start + 16, ids.shape[1])):
                        with tracer.invoke(ids):
                            x = model.model.layers[layer].input.clone()
                            x[:, at] = states[layer][:, at]
                            model.model.layers[layer].input = x
                            rows.append(model.lm_head.output[:, -1].save())
                found += [difference(row) for row in rows]
        return torch.stack(found).unflatten(0, (layers, ids.shape[1]))
    return run


def race(quick: bool, device: str = "cpu") -> list[Race]:
    """Both sizes; with `quick` 3 layers, 2 x 12 and 1 x 8 tokens."""
    hf = _models.llama(num_hidden_layers=3) if quick else _models.llama()
    model, found = _models.opened(hf), []
    for name, count, length in ((LONG, 2 if quick else 4, 12 if quick else 64),
                                (SHORT, 1, 8 if quick else 16)):
        ids, other = _models.tokens(count, length), _models.tokens(count, length, 2)
        contenders = [
            *(Contender(floor, lambda ids=ids, other=other, batch=batch: difference(
                _plain.patch_sweep(hf, ids, other, batch)))
              for floor, batch in zip(FLOORS, BATCHES)),
            *(Contender(one, make=lambda make=make, of=of, ids=ids, other=other: make(of, ids, other))
              for one, make, of in ((OURS, undertow, model), (HOOKS, hooked, hf), (LENS, lens, hf),
                                    (TRACE, traced, hf), (INVOKES, invoked, hf))),
        ]
        found.append(measure(
            name, contenders, FLOORS[1], rounds=3 if quick or name == LONG else 9, seconds=120,
            sizes={"prompts": count, "tokens": length, "layers": model.n_layers,
                   "cells": model.n_layers * length}))
    return found
