"""How the cost of a sweep over heads grows with tokens, prompts, layers, heads and cells.

The sizes of one axis are raced against each other, everything else held fixed: ratios are to the
smallest of them. Ours, and a whole pass per cell for comparison; "of floor" is the share of the
operations that the cells need at least, at the machine's matrix rate.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from benchmarks import _models
from benchmarks._race import Contender, Race, Target, measure
from benchmarks.head_sweep import TOKENS, flops, hooked
from interp.causal.cell_makers import every_head
from interp.causal.grid import Sweep
from interp.causal.metrics import LogitDifference

NAME = "growth"
OURS, HOOKS = "undertow", "HF sdpa, torch hooks"
TARGETS: tuple[Target, ...] = ()
"""None: it shows how far a measured ratio carries."""

START = {"prompts": 1, "tokens": 64, "layers": 4, "heads": 8, "cells": 32}
AXES: dict[str, tuple[int, ...]] = {
    "tokens": (16, 64, 256, 1024), "prompts": (1, 2, 4, 8), "layers": (2, 4, 8, 16),
    "heads": (4, 8, 16, 32), "cells": (4, 8, 16, 32),
}
WIDTH = 32
"""Of a head: more heads make a wider model."""


def _model(layers: int, heads: int) -> Any:
    return _models.llama(
        num_hidden_layers=layers, num_attention_heads=heads, num_key_value_heads=heads // 2,
        hidden_size=WIDTH * heads, intermediate_size=86 * heads)


def chosen(layers: int, heads: int, cells: int) -> list[tuple[int, int]]:
    """So many heads, evenly over the layers."""
    every = [(layer, head) for head in range(heads) for layer in range(layers)]
    return sorted(every[:cells])


def _ours(model: Any, ids: Tensor, cells: Sequence[tuple[int, int]]) -> None:
    prompts = _models.prompts(ids)
    metric = LogitDifference(*([token] * len(prompts) for token in TOKENS))
    Sweep(model, prompts, every_head(heads=[f"L{a}H{b}" for a, b in cells]), metric).run()


@torch.inference_mode()
def _hooks(one: Callable[[int, int], Tensor], cells: Sequence[tuple[int, int]]) -> None:
    for layer, head in cells:
        one(layer, head)


def _contenders(axis: str, n: int) -> list[Contender]:
    sizes = {**START, axis: n}
    if axis in ("layers", "heads"):
        sizes["cells"] = sizes["layers"] * sizes["heads"]
    hf = _model(sizes["layers"], sizes["heads"])
    model, ids = _models.opened(hf), _models.tokens(sizes["prompts"], sizes["tokens"])
    cells = chosen(sizes["layers"], sizes["heads"], sizes["cells"])
    needed = flops(hf, sizes["prompts"], sizes["tokens"], cells)
    return [
        Contender(f"{OURS}, {n} {axis}", partial(_ours, model, ids, cells), flops=needed),
        Contender(f"{HOOKS}, {n} {axis}", partial(_hooks, hooked(hf, ids), cells), flops=needed),
    ]


def race(quick: bool = False, device: str = "cpu") -> list[Race]:
    """One race per axis; with `quick` two small sizes each."""
    found = []
    for axis, sizes in AXES.items():
        contenders = [one for n in sizes[: 2 if quick else None] for one in _contenders(axis, n)]
        contenders.sort(key=lambda one: one.name.startswith(HOOKS))  # stable: sizes stay in order
        found.append(measure(
            axis, contenders, contenders[0].name, rounds=1 if quick else 7, seconds=100,
            device=device, sizes={**START, axis: list(sizes)}, flops=1.0))
    return found
