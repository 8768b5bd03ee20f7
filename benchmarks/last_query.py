"""Edits that concern the last query alone: knockout windows, and redistribution on the answer row.

No other position changes, so one token goes through the blocks again, in all cells at once. Two
races: 16 sets of image tokens cut from the last position in 8 windows of 3 layers; and a share of
the first token's attention moved to the image in the last row, for 16 shares in the same windows.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from benchmarks import _models
from benchmarks._cut_edges import Cell, peers
from benchmarks._race import Contender, Race, Target, measure
from interp.core import Prompt, redistribute
from interp.flow import knockout

NAME = "last_query"
OURS, TWICE = "undertow", "plain pass, twice"
PEERS = ("HF sdpa, mask hooks", "TransformerLens hooks", "nnsight, a trace per cell")
MOVING = ("HF eager, attention replaced", "TransformerLens hooks")
TARGETS = (
    Target("knockout windows: the fastest peer's time against ours", at_least=30.0,
           race="knockout", of=PEERS, to=OURS),
    Target("redistribution on the answer row: the fastest peer's time against ours",
           at_least=30.0, race="redistribution", of=MOVING, to=OURS),
)


def race(quick: bool, device: str = "cpu") -> list[Race]:
    """128 cells of one prompt of 128 tokens, the plain pass included; with `quick` 4 of 32."""
    length, image = (32, (8, 24)) if quick else (128, (32, 96))
    hf = _models.llama(num_hidden_layers=3) if quick else _models.llama()
    model, ids = _models.opened(hf), _models.tokens(1, length)
    given = Prompt.from_tokens(ids[0].tolist(), {"image": image})
    centers = range(2 if quick else model.n_layers)
    spans = [knockout.window(center, 3, model.n_layers) for center in centers]
    count = 2 if quick else 16
    parts = torch.arange(*image).chunk(count)
    shares = [(number + 1) / count for number in range(count)]
    answer = int(model.run(given, logits="last").logits[0][-1].argmax())
    sizes = {"tokens": length, "windows": len(spans), "cells": len(spans) * count}
    return [_knockout(model, hf, ids, given, parts, spans, answer, sizes, quick),
            _moved(model, hf, ids, given, image, shares, spans, answer, sizes, quick)]


def _knockout(
    model: Any, hf: Any, ids: Tensor, given: Prompt, parts: Any, spans: list[range], answer: int,
    sizes: dict[str, int], quick: bool,
) -> Race:
    cells: list[Cell] = []
    for part in parts:
        for span in spans:
            cut = torch.zeros(len(given), len(given), dtype=torch.bool)
            cut[-1, part] = True
            cells.append((span, cut))

    def ours() -> Tensor:
        sets = {str(number): part.tolist() for number, part in enumerate(parts)}
        found = knockout.measure(model, given, sets, answers=[answer], width=3,
                                 layers=range(len(spans)), min_probability=0)
        return torch.as_tensor(found["p"].values[0])

    def of(contender: Contender) -> Contender:
        def make() -> Callable[[], Tensor]:
            run = contender.make()  # type: ignore[misc]
            return lambda: run().softmax(-1)[:, answer].reshape(len(parts), len(spans))

        return Contender(contender.name, make=make)

    return measure("knockout", [Contender(OURS, ours), _plain(hf, ids), *map(
        of, peers(hf, ids, cells, start_at_layer=False))], OURS, truth=PEERS[0],
        rounds=3 if quick else 7, seconds=100, sizes=sizes)


def _plain(hf: Any, ids: Tensor) -> Contender:
    def run() -> None:
        with torch.inference_mode():
            for _ in range(2):
                hf(ids, use_cache=False, logits_to_keep=1)

    return Contender(TWICE, run)


def _moved(
    model: Any, hf: Any, ids: Tensor, given: Prompt, image: tuple[int, int], shares: list[float],
    spans: list[range], answer: int, sizes: dict[str, int], quick: bool,
) -> Race:
    """A share of what the last row gives to the first token goes to the image, pro rata."""
    cells = [(span, share) for share in shares for span in spans]

    def move(pattern: Tensor, share: float) -> Tensor:
        made = pattern.clone()
        row = made[..., -1, :]
        freed = share * row[..., :1]
        there = row[..., image[0] : image[1]]
        there *= 1 + freed / there.sum(-1, keepdim=True)
        row[..., :1] *= 1 - share
        return made

    def ours() -> Tensor:
        from interp.causal.answer_row import answer_row

        writes = [redistribute([0], "image", share, queries="last", layers=span,
                               min_nonsink_share=None, min_image_mass=None)
                  for span, share in cells]
        return answer_row(model, given, writes).softmax(-1)[:, answer]

    def eager() -> Callable[[], Tensor]:
        from transformers.models.llama.modeling_llama import repeat_kv

        other = _models.llama(num_hidden_layers=model.n_layers, implementation="eager")
        now: dict[str, Any] = {}

        def attention(
            module: Any, q: Tensor, k: Tensor, v: Tensor, mask: Any, scaling: float, **_: Any
        ) -> tuple[Tensor, None]:
            k, v = (repeat_kv(x, module.num_key_value_groups) for x in (k, v))
            p = (q @ k.transpose(2, 3) * scaling + now["mask"]).softmax(-1)
            if module.layer_idx in now["span"]:
                p = move(p, now["share"])
            return (p @ v).transpose(1, 2).contiguous(), None

        from transformers import AttentionInterface

        AttentionInterface.register("benchmark_moved", attention)
        other.config._attn_implementation = "benchmark_moved"
        now["mask"] = torch.full((len(given),) * 2, torch.finfo(torch.float32).min).triu(1)

        def run() -> Tensor:
            found = []
            with torch.inference_mode():
                for now["span"], now["share"] in cells:
                    found.append(other(ids, use_cache=False, logits_to_keep=1).logits[0, -1])
            return torch.stack(found).softmax(-1)[:, answer]

        return run

    def hooked() -> Callable[[], Tensor]:
        bridge = _models.bridge(hf)

        def one(span: range, share: float) -> Tensor:
            hooks = [(f"blocks.{layer}.attn.hook_pattern", lambda p, hook: move(p, share))
                     for layer in span]
            with torch.inference_mode():
                return bridge.run_with_hooks(ids, fwd_hooks=hooks)[0, -1]

        return lambda: torch.stack([one(*cell) for cell in cells]).softmax(-1)[:, answer]

    return measure("redistribution", [
        Contender(OURS, ours), _plain(hf, ids), Contender(MOVING[0], make=eager),
        Contender(MOVING[1], make=hooked)], OURS, truth=MOVING[0], rounds=3 if quick else 7,
        seconds=100, sizes=sizes)
