"""Token removal at every (layer, image token): which token does the answer need, and until where?

One image token is dropped from what enters a block (the others keep their positions); the last row
of logits is read. Two races: all 64 tokens against the floor alone, and 8 of them (the middle ones,
so that as many positions follow on average) against the peers, who run a whole pass per cell.
"""

from typing import Any

import torch
from torch import Tensor

from benchmarks import _models
from benchmarks._cut_edges import peers
from benchmarks._race import Contender, Race, Target, measure
from benchmarks._replay import Replay
from interp.causal.removal import Removal
from interp.core import Prompt

NAME = "token_removal"
OURS, FLOOR = "undertow", "floor (suffix, prefix, batched)"
SHORT = "floor, last block for the last row alone"
PEERS = ("HF sdpa, mask hooks", "TransformerLens hooks", "TransformerLens start_at_layer",
         "nnsight, a trace per cell")
TARGETS = (
    Target("every image token: time against the floor", at_most=1.3, race="map", of=OURS, to=FLOOR),
    Target("8 image tokens: time against the floor", at_most=1.3, race="peers", of=OURS, to=FLOOR),
    Target("the fastest peer's time against ours", at_least=3.0, race="peers", of=PEERS, to=OURS),
)


def prompt(ids: Tensor, image: tuple[int, int]) -> Prompt:
    """The tokens, with a run of them as the picture."""
    return Prompt.from_tokens(ids[0].tolist(), {"image": image})


def undertow(model: Any, given: Prompt, layers: list[int], places: list[int]) -> Tensor:
    """The map, plain pass included."""
    removal = Removal(model, given)
    kept = [tuple(p for p in removal.places if p != place) for place in places]
    return torch.stack([removal.logits(layer, kept) for layer in layers])


def race(quick: bool, device: str = "cpu") -> list[Race]:
    """128 tokens, 64 of them a picture; with `quick` 48 and 16."""
    length, image = (48, (16, 32)) if quick else (128, (32, 96))
    hf = _models.llama(num_hidden_layers=3) if quick else _models.llama()
    model, ids = _models.opened(hf), _models.tokens(1, length)
    given, layers, places = prompt(ids, image), list(range(model.n_layers)), list(range(*image))
    middle = (image[0] + image[1]) // 2
    some = list(range(middle - 2, middle + 2) if quick else range(middle - 4, middle + 4))
    cells = []
    for layer in layers:
        for place in some:
            cut = torch.zeros(length, length, dtype=torch.bool)
            cut[place + 1 :, place] = True
            cells.append((range(layer, model.n_layers), cut))

    def contenders(places: list[int]) -> list[Contender]:
        return [
            Contender(FLOOR, lambda: Replay(hf, ids).without(layers, places)),
            Contender(SHORT, lambda: Replay(hf, ids).without(layers, places, short=True)),
            Contender(OURS, lambda: undertow(model, given, layers, places)),
        ]

    def shaped(contender: Contender) -> Contender:
        def make() -> Any:
            run = contender.make()  # type: ignore[misc]
            return lambda: run().reshape(len(layers), len(some), -1)

        return Contender(contender.name, make=make)

    sizes = {"tokens": length, "image tokens": image[1] - image[0], "layers": len(layers)}
    rounds = 3 if quick else 7
    return [
        measure("map", contenders(places), FLOOR, rounds=rounds, seconds=60,
                sizes={**sizes, "cells": len(layers) * len(places)}),
        measure("peers", [*contenders(some), *map(shaped, peers(hf, ids, cells))], FLOOR,
                rounds=rounds, seconds=100, sizes={**sizes, "cells": len(cells)}),
    ]
