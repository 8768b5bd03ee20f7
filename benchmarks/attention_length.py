"""Attention statistics at length: received mass, entropy, mean distance and top key of every head.

Ours streams them through `Model.run`; the peers store every attention matrix and reduce it. The
plain forward with PyTorch's fused attention, which gives no statistics, is what time is held
against. The results are compared with those of HF's eager attention where that fits into memory,
beyond with rows of the attention of a few queries, computed from the same queries and keys.
"""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, Optional
from unittest.mock import patch

import numpy as np
import torch
from torch import Tensor

from benchmarks._fresh import peak_memory
from benchmarks._models import SHAPE, bridge, llama, opened, prompts, tokens
from benchmarks._race import Contender, Race, Target, measure
from interp.core import Prompt
from interp.core.statistics import Estimate
from interp.stream import fused

NAME = "attention_length"
LIMIT = 8e9
"""Bytes that a contender may allocate: what the peers meet at 8,192 tokens."""

PLAIN, OURS = "plain sdpa forward", "undertow, streamed"
EAGER, BRIDGE = "HF eager output_attentions", "TransformerLens run_with_cache"
REAL = {"hidden_size": 2048, "intermediate_size": 5632, "num_attention_heads": 16,
        "num_key_value_heads": 4, "num_hidden_layers": 2, "initializer_range": 0.02 / 8**0.5}
"""Heads of width 128, as real models have them: with those of width 32 of the other races what the
statistics add to every weight, which does not depend on the width, counts four times as much. The
smaller weights make logits as large as in those races."""
WIDE = "4,096 tokens, heads of width 128"
EIGHT_BILLION = {
    "vocab_size": 128256, "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32,
    "num_attention_heads": 32, "num_key_value_heads": 8, "max_position_embeddings": 1 << 17,
    "initializer_range": 0.02 / 16**0.5, "dtype": "bfloat16"}
"""The shape of a model of eight billion parameters, for a GPU."""
TILES = "undertow, torch tiles"
STATISTICS = ("received", "entropy", "distance", "top_keys")


def _growth(races: Mapping[str, Race]) -> float:
    """Memory over that of the process before, per token: longest prompt to a quarter of it."""
    short, long = (races.get(_name(length)) for length in (4096, 16384))
    if short is None or long is None:
        raise LookupError("4,096 and 16,384 tokens were not both measured")
    one, other = (race.memory(OURS) - race.sizes["bytes before"] for race in (short, long))
    return other / one / 4


def _name(length: int) -> str:
    return f"{length:,} tokens"


def _to_plain(length: int) -> Callable[[Mapping[str, Race]], Estimate]:
    def ratio(races: Mapping[str, Race]) -> Estimate:
        if _name(length) not in races:
            raise LookupError(f"{_name(length)} were not measured")
        return races[_name(length)].ratio(OURS, PLAIN)

    return ratio


TARGETS = (
    Target("streamed statistics to the plain forward at 4,096 tokens", at_most=1.3,
           value=_to_plain(4096)),
    Target("the same with heads of width 128", at_most=1.3, race=WIDE, of=OURS, to=PLAIN),
    Target("streamed statistics to the plain forward at 16,384 tokens", at_most=1.5,
           value=_to_plain(16384)),
    Target("memory per token, 16,384 tokens to 4,096 (1: linear)", at_most=1.1, value=_growth),
    Target("on a GPU, 32 x 32 heads: streamed statistics to the plain forward at 32,768 tokens",
           at_most=1.5, race="32 x 32 heads, 32,768 tokens", of=OURS, to=PLAIN),
    Target("HF eager to streamed at 4,096 tokens", at_least=5.0, race=_name(4096), of=EAGER,
           to=OURS),
)


def prepare(
    contender: str, length: int, device: str = "cpu", layers: int = 8, wide: bool = False,
    shape: Optional[dict[str, Any]] = None,
) -> Callable[[], Any]:
    """What a contender does with one random prompt; runs in this process or in a fresh one."""
    ids = tokens(1, length, device=device)
    shape = shape or (REAL if wide else {"num_hidden_layers": layers})
    hf = llama(device, "eager" if contender == EAGER else "sdpa", **shape)
    if contender == PLAIN:
        return partial(_plain, hf, ids)
    if contender == OURS:
        model, prompt = opened(hf), prompts(ids)
        return lambda: _ours(model.run(prompt, stats=STATISTICS, logits="last").stats)
    if contender == TILES:
        model, prompt = opened(hf), prompts(ids)
        return partial(_tiled, model, prompt)
    if contender == EAGER:
        return partial(_eager, hf, ids)
    return partial(_cached, bridge(hf), ids)


@torch.inference_mode()
def _plain(hf: Any, ids: Tensor) -> None:
    hf(ids, use_cache=False, logits_to_keep=1)


def _ours(stats: Mapping[str, Any]) -> dict[str, Any]:
    found = {name: stats[name].values[0] for name in STATISTICS[:3]}
    found["top"] = stats["top_keys"].sel(rank=0, quantity="value").values[0]
    return found


def _tiled(model: Any, prompt: list[Prompt]) -> dict[str, Any]:
    """Without the fused kernels of a GPU."""
    with patch.object(fused, "_fits", lambda *_: False):
        return _ours(model.run(prompt, stats=STATISTICS, logits="last").stats)


@torch.inference_mode()
def _eager(hf: Any, ids: Tensor) -> dict[str, Any]:
    out = hf(ids, use_cache=False, output_attentions=True, logits_to_keep=1)
    return _reduce([pattern[0] for pattern in out.attentions])


@torch.inference_mode()
def _cached(found: Any, ids: Tensor) -> dict[str, Any]:
    n = len(found.blocks)
    names = [f"blocks.{layer}.attn.hook_pattern" for layer in range(n)]
    _, cache = found.run_with_cache(ids, names_filter=lambda name: name in names)
    return _reduce([cache[name][0] for name in names])


def _reduce(patterns: list[Tensor]) -> dict[str, Any]:
    """The four statistics of whole attention matrices [head, query, key], a layer at a time."""
    n = patterns[0].shape[-1]
    position = torch.arange(n, device=patterns[0].device)
    seeing = (n - position).to(patterns[0])
    found: dict[str, list[Tensor]] = {"received": [], "entropy": [], "distance": [], "top": []}
    for pattern in patterns:
        found["received"].append(pattern.sum(1) / seeing)
        found["entropy"].append(torch.special.entr(pattern).sum(-1))
        # sum_s p (t - s) = t - sum_s p s, for rows that sum to one.
        found["distance"].append(position - pattern @ position.to(pattern))
        found["top"].append(pattern.amax(-1))
    return {name: torch.stack(rows).float() for name, rows in found.items()}


def _relative(result: Optional[dict[str, Any]], length: int) -> Optional[dict[str, Any]]:
    """Distances count tokens: as shares of the length they have the size of the others."""
    if result is not None:
        result["distance"] = np.asarray(result["distance"]) / length
    return result


def _contender(
    name: str, length: int, device: str, timed: bool = True, limit: float = LIMIT, **more: Any
) -> Contender:
    arguments = {"contender": name, "length": length, "device": device, **more}

    def make() -> Callable[[], Any]:
        run = prepare(**arguments)
        return lambda: _relative(run(), length)

    return Contender(
        name, make=make, timed=timed,
        memory=partial(peak_memory, "benchmarks.attention_length", "prepare", arguments, limit))


def race(quick: bool = False, device: str = "cpu") -> list[Race]:
    """Lengths at which the peers fit into memory, then lengths at which they do not."""
    layers = 2 if quick else 8
    lengths = {256: 3} if quick else {2048: 5, 4096: 4, 8192: 3, 16384: 3}
    found = []
    for length, rounds in lengths.items():
        contenders = [
            _contender(name, length, device, name in (PLAIN, OURS) or length <= 4096, layers=layers)
            for name in (PLAIN, OURS, EAGER, BRIDGE) if length <= 8192 or name in (PLAIN, OURS)
        ]
        race = measure(
            _name(length), contenders, PLAIN, truth=EAGER if length <= 4096 else OURS,
            rounds=rounds, seconds=240, device=device,
            sizes={"tokens": length, "layers": layers, "heads": SHAPE["num_attention_heads"],
                   "memory limit": LIMIT})
        race.sizes["bytes before"] = _baseline(device)
        found.append(race)
    if not quick:
        found.append(measure(
            WIDE, [_contender(name, 4096, device, wide=True)
                   for name in (PLAIN, OURS, EAGER)], PLAIN, truth=EAGER, rounds=3, seconds=150,
            device=device, sizes={"tokens": 4096, **REAL}))
    if device != "cpu" and not quick:
        found += [many_heads(length, device) for length in (1 << 15, 1 << 17)]
    return found


def many_heads(
    length: int, device: str, shape: Optional[dict[str, Any]] = None, limit: float = 256e9
) -> Race:
    """32 layers of 32 heads: the plain forward, fused kernels and torch tiles, and their memory."""
    shape = EIGHT_BILLION if shape is None else shape
    names = (PLAIN, OURS, TILES) if length <= 1 << 15 else (PLAIN, OURS)
    return measure(
        f"32 x 32 heads, {length:,} tokens",
        [_contender(name, length, device, limit=limit, shape=shape) for name in names], PLAIN,
        truth=names[-1], rounds=3, seconds=120, tolerance=1e-4, device=device,
        sizes={"tokens": length, **shape})


def _baseline(device: str) -> float:
    """Bytes of a process that has the model and a short prompt."""
    arguments = {"contender": OURS, "length": 64, "device": device, "layers": 8}
    return peak_memory("benchmarks.attention_length", "prepare", arguments, LIMIT)
