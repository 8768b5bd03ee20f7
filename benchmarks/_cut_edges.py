"""The peers' ways to cut edges of attention: whole passes, a cell at a time, with a mask or hooks.

A cell is a range of layers and which keys every query loses in them, `[query, key]`.
"""

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor

from benchmarks._models import bridge
from benchmarks._race import Contender

Cell = tuple[range, Tensor]


def peers(hf: Any, ids: Tensor, cells: Sequence[Cell], start_at_layer: bool = True) -> list[Contender]:
    """One contender per peer; each returns the last rows of logits `[cell, vocab]`."""
    made = [Contender("HF sdpa, mask hooks", make=lambda: _masked(hf, ids, cells)),
            Contender("TransformerLens hooks", make=lambda: _hooked(hf, ids, cells)),
            Contender("nnsight, a trace per cell", make=lambda: _traced(hf, ids, cells))]
    if start_at_layer:
        made.insert(2, Contender("TransformerLens start_at_layer",
                                 make=lambda: _started(hf, ids, cells)))
    return made


def additive(cut: Tensor) -> Tensor:
    """The causal mask without the edges of a cell, as HF takes it: `[1, 1, query, key]`."""
    hidden = cut | torch.ones_like(cut).triu(1)
    return torch.zeros(cut.shape).masked_fill_(hidden, torch.finfo(torch.float32).min)[None, None]


def _masked(hf: Any, ids: Tensor, cells: Sequence[Cell]) -> Callable[[], Tensor]:
    def one(layers: range, cut: Tensor) -> Tensor:
        mask = additive(cut)

        def give(module: Any, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
            return args, {**kwargs, "attention_mask": mask}

        with ExitStack() as stack, torch.inference_mode():
            for layer in layers:
                handle = hf.model.layers[layer].register_forward_pre_hook(give, with_kwargs=True)
                stack.callback(handle.remove)
            return hf(ids, use_cache=False, logits_to_keep=1).logits[0, -1]

    return lambda: torch.stack([one(*cell) for cell in cells])


def _hooked(hf: Any, ids: Tensor, cells: Sequence[Cell]) -> Callable[[], Tensor]:
    model = bridge(hf)

    def one(layers: range, cut: Tensor) -> Tensor:
        def hide(scores: Tensor, hook: Any) -> Tensor:
            return scores.masked_fill(cut, torch.finfo(torch.float32).min)

        hooks = [(f"blocks.{layer}.attn.hook_attn_scores", hide) for layer in layers]
        with torch.inference_mode():
            return model.run_with_hooks(ids, fwd_hooks=hooks)[0, -1]

    return lambda: torch.stack([one(*cell) for cell in cells])


def _started(hf: Any, ids: Tensor, cells: Sequence[Cell]) -> Callable[[], Tensor]:
    model = bridge(hf)

    def run() -> Tensor:
        with torch.inference_mode():
            _, cache = model.run_with_cache(ids, names_filter=lambda name: name.endswith("hook_in"))
            found = []
            for layers, cut in cells:
                def hide(scores: Tensor, hook: Any, cut: Tensor = cut) -> Tensor:
                    return scores.masked_fill(cut, torch.finfo(torch.float32).min)

                begin = layers.start
                hooks = [(f"blocks.{layer}.attn.hook_attn_scores", hide) for layer in layers]
                with model.hooks(fwd_hooks=hooks):
                    found.append(model(cache[f"blocks.{begin}.hook_in"], start_at_layer=begin)[0, -1])
        return torch.stack(found)

    return run


def _traced(hf: Any, ids: Tensor, cells: Sequence[Cell]) -> Callable[[], Tensor]:
    from nnsight import NNsight

    model = NNsight(hf)

    def one(layers: range, cut: Tensor) -> Tensor:
        mask = additive(cut)
        with torch.inference_mode(), model.trace(ids, use_cache=False, logits_to_keep=1):
            for layer in layers:
                args, kwargs = model.model.layers[layer].inputs
                model.model.layers[layer].inputs = (args, {**kwargs, "attention_mask": mask})
            found = model.lm_head.output[0, -1].save()
        return found

    return lambda: torch.stack([one(*cell) for cell in cells])
