"""The isolation map of the information horizon against the loop over its cells.

Of all image tokens one group is left from a layer on, for every layer and group; the probability of
the answer is read. Whole passes cut the edges to the dropped tokens, which is the same. The layout
decides what can be saved: what precedes the picture is lent, the other image tokens do not exist.
"""

from typing import Any

import torch

from benchmarks import _models
from benchmarks._cut_edges import Cell, peers
from benchmarks._race import Contender, Race, Target, measure
from interp.core import Prompt
from interp.flow import horizon

NAME = "horizon_map"
OURS, NAIVE = "undertow", "HF sdpa, mask hooks"
LAYOUTS = {"short": (32, 64, 32), "as LLaVA": (35, 576, 60)}
"""Tokens before, in and behind the picture; the second is that of LLaVA-1.5 and a short question."""

TARGETS = (
    Target("layout of LLaVA: the loop over whole passes against the map", at_least=20.0,
           value=lambda races: _per_cell(races, "as LLaVA")),
    Target("64 of 128 tokens in the picture: likewise (36 of the 128 must be run in every cell)",
           at_least=20.0, value=lambda races: _per_cell(races, "short")),
)


def _per_cell(races: Any, name: str) -> float:
    """Time per cell of the loop, over time per cell of the whole map."""
    if name not in races:
        raise LookupError(f"the race {name!r} was not run")
    race = races[name]
    loop, ours = (race.lines[race.fastest(one)].median for one in (NAIVE, OURS))
    return loop / race.sizes["cells of the loop"] * race.sizes["cells"] / ours


def race(quick: bool, device: str = "cpu") -> list[Race]:
    """One map per layout; the loop is measured over a sample of cells, each with the same cost."""
    layouts = {"short": (8, 16, 8)} if quick else LAYOUTS
    return [_one(name, sizes, quick) for name, sizes in layouts.items()]


def _one(name: str, layout: tuple[int, int, int], quick: bool) -> Race:
    before, image, behind = layout
    length = sum(layout)
    hf = _models.llama(num_hidden_layers=3) if quick else _models.llama()
    model, ids = _models.opened(hf), _models.tokens(1, length)
    given = Prompt.from_tokens(ids[0].tolist(), {"image": (before, before + image)})
    places = torch.arange(before, before + image)
    groups = [one.tolist() for one in places.chunk(16 if image <= 64 else 64)]
    layers = list(range(1, model.n_layers))
    answer = int(model.run(given, logits="last").logits[0][-1].argmax())
    some = torch.Generator().manual_seed(0)
    chosen = [(int(layers[int(torch.randint(len(layers), (1,), generator=some))]),
               int(torch.randint(len(groups), (1,), generator=some)))
              for _ in range(4 if quick else 8)]
    cells: list[Cell] = []
    for layer, number in chosen:
        cut = torch.zeros(length, length, dtype=torch.bool)
        gone = [p for p in places.tolist() if p not in groups[number]]
        cut[:, gone] = True
        cut.fill_diagonal_(False)
        cells.append((range(layer, model.n_layers), cut))

    def ours() -> torch.Tensor:
        found = horizon.information(model, given, answer, groups=groups)["alone"]
        return torch.tensor([float(found.sel(layer=a)[b]) for a, b in chosen])

    def of(contender: Contender) -> Contender:
        def make() -> Any:
            run = contender.make()  # type: ignore[misc]
            return lambda: run().softmax(-1)[:, answer]

        return Contender(contender.name, make=make)

    return measure(name, [Contender(OURS, ours), of(peers(hf, ids, cells)[0])], OURS, truth=NAIVE,
                   rounds=3 if quick else 7, seconds=60, sizes={
        "tokens before, in, behind the picture": list(layout), "layers": len(layers),
        "groups": len(groups), "cells": len(layers) * (len(groups) + 1),
        "cells of the loop": len(cells)})
