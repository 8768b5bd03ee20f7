"""What an isolation map costs: counted in plain passes, and timed, beside the loop over its cells."""

import time
from typing import Any

import numpy as np

import interp
from experiments._paper import Settings
from interp.core import Prompt
from interp.flow import horizon
from interp.models.model import Model


def cost_of_map(
    model: Model, prompt: Prompt, token: int, groups: list[tuple[int, ...]], layers: list[int],
    settings: Settings,
) -> dict[str, Any]:
    """One full isolation map against the loop of whole passes over its cells.

    Some of the cells are really run, half of them before the map and half after it. What either
    costs is counted in the blocks themselves, as tokens that pass through one, and timed.
    """
    rng, places = settings.rng(8), set(prompt.positions("image"))
    later = [p for p in range(min(places), len(prompt)) if p not in places]
    cells = [(int(rng.choice(layers)), int(rng.integers(len(groups))))
             for _ in range(settings.pick(8, tiny=4))]
    blocks = model.resumable(prompt).blocks
    spent, p, seconds = [0], [], 0.0

    def count(module: Any, args: tuple, output: Any) -> None:
        first = output[0] if isinstance(output, tuple) else output
        spent[0] += int(np.prod(first.shape[:-1]))

    def loop(part: list[tuple[int, int]]) -> None:
        for layer, number in part:
            kept = groups[number]
            cut = interp.block([*kept, *later], sorted(places - set(kept)),
                               layers=list(range(layer, model.n_layers)))
            row = model.run(prompt, write=cut, logits="last").logits[0][-1]
            p.append(float(row.float().softmax(-1)[token]))

    loop(cells[:1])
    p.clear()
    handles = [block.module.register_forward_hook(count) for block in blocks]
    try:
        for part in (cells[: len(cells) // 2], None, cells[len(cells) // 2 :]):
            began = time.perf_counter()
            if part is None:
                before = spent[0]
                found = horizon.information(model, prompt, token, groups=groups, layers=layers)
                mapped, of_map = time.perf_counter() - began, spent[0] - before
            else:
                loop(part)
                seconds += time.perf_counter() - began
    finally:
        for handle in handles:
            handle.remove()
    began = time.perf_counter()
    model.run(prompt, logits="last")
    plain = time.perf_counter() - began
    prefill, total = len(prompt) * model.n_layers, len(layers) * (len(groups) + 1)
    alone = found["alone"]
    each = (spent[0] - of_map) / len(cells) / prefill
    cost = float(found["prefills"])
    return {
        "tokens": len(prompt), "image tokens": len(places), "windows": len(groups),
        "layers": len(layers), "cells": total, "cells run": len(cells),
        "map (prefills)": cost, "loop (prefills)": each * total, "ratio": each * total / cost,
        "map (seconds)": mapped, "loop (seconds)": seconds / len(cells) * total,
        "plain pass (seconds)": plain,
        "ratio in time": seconds / len(cells) * total / mapped,
        "ratio in time to plain passes": plain * total / mapped,
        "difference": max(abs(a - float(alone.sel(layer=layer)[number]))
                          for a, (layer, number) in zip(p, cells)),
    }
