"""Estimates of time and memory for the usual analyses, from one measured rate of this machine."""

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Optional, Union

from interp.core.prompt import Prompt
from interp.doctor.report import Cost, Report
from interp.models.lane_hf import probe_ids
from interp.models.model import Model

Real = Union[int, float]
PATIENCE = 10.0
"""Seconds after which no longer prompt is timed."""


@dataclass(frozen=True)
class Rate:
    """What this machine needs for this model.

    Attributes:
        token_layer: seconds for one token in one block, attention over few tokens included.
        pair: further seconds per pair of tokens and block for attention itself; `streamed` for
            attention with streamed statistics. None where no long prompt was timed.
        tokens: how long the longest timed prompt was.
    """

    token_layer: Real
    pair: Optional[Real]
    streamed: Optional[Real]
    tokens: int


def measure_rate(model: Model, quick: bool = False) -> Rate:
    """Time short forward passes; the shortest of two counts."""
    layers = model.n_layers
    room = model.max_positions or 1024
    short, long = min(64, room), min(128 if quick else 512, room)

    def timed(length: int, stats: tuple[str, ...] = ()) -> float:
        prompt = _prompt(model, length)

        def once() -> float:
            start = time.perf_counter()
            model.run(prompt, stats=stats, logits="last")
            return time.perf_counter() - start

        first = once()
        return first if first > PATIENCE / 4 else min(first, once())

    brief = timed(short)
    if brief * long / short > PATIENCE or long <= short:
        return Rate(brief / short / layers, None, None, short)
    plain = timed(long)
    streamed = timed(long, ("received", "entropy"))
    # Attention is a share of the work that operation counts give; noise cannot make it negative.
    linear, square = _operations(model)
    token_layer = plain / layers / (long * (1 + square * long / linear))
    pair = token_layer * square / linear
    more = max(0.0, streamed - plain) / layers / long**2
    return Rate(token_layer, pair, pair + more, long)


def _operations(model: Model) -> tuple[float, float]:
    """Multiplications per token in a block, and per pair of tokens in its attention."""
    blocks = sum(p.numel() for m in model._engine(model.lane).blocks for p in m.module.parameters())
    return max(1.0, blocks / model.n_layers), 2.0 * model.n_heads * model.d_head


def examine_costs(model: Model, report: Report, quick: bool = False) -> None:
    """Note what the usual analyses will take: token-layer counts times a measured rate."""
    rate = measure_rate(model, quick)
    layers, heads = model.n_layers, model.n_heads
    windows = report.windows or (None,) * layers
    text = model.config.get_text_config()
    d_ff = getattr(text, "intermediate_size", None) or 4 * model.d_model
    item = model.dtype.itemsize

    def activations(tokens: int) -> int:
        width = 6 * model.d_model + 2 * int(d_ff) + 2 * heads * model.d_head
        return int(tokens * width * item)

    def pairs(tokens: int) -> float:
        return sum(tokens * min(tokens, tokens if w is None else w) for w in windows) / layers

    def seconds(token_layers: int, tokens: int, per_pair: Optional[Real]) -> Optional[float]:
        if per_pair is None:
            return token_layers * rate.token_layer if tokens <= 512 else None
        return token_layers * (rate.token_layer + per_pair * pairs(tokens) / tokens)

    def add(
        analysis: str, tokens: int, token_layers: int, memory: int,
        time_of: Optional[Callable[[], Optional[float]]] = None,
    ) -> None:
        if model.max_positions and tokens > model.max_positions:
            report.costs.append(Cost(analysis, tokens, token_layers, None, None,
                                     f"the model has {model.max_positions} positions"))
            return
        took = seconds(token_layers, tokens, rate.pair) if time_of is None else time_of()
        report.costs.append(Cost(analysis, tokens, token_layers, took, int(memory)))

    n = min(128, model.max_positions or 128)
    vocabulary = n * model.d_vocab * (item + 4)
    add("forward pass, all logits", n, n * layers, activations(n) + vocabulary)
    for long in (4096, 32768):
        state = layers * heads * long * 24
        add("streamed statistics (received, entropy)", long, long * layers,
            activations(long) + state,
            lambda long=long: seconds(long * layers, long, rate.streamed))
    add("whole attention maps (read='pattern')", min(4096, model.max_positions or 4096), 
        min(4096, model.max_positions or 4096) * layers,
        4 * layers * heads * min(4096, model.max_positions or 4096) ** 2)
    cells = layers * heads
    resumed = heads * layers * (layers + 1) // 2 if model.kind == "decoder" else cells * layers
    add(f"head sweep, {cells} heads (layer x head)", n, n * resumed, 8 * activations(n))
    positions = n * layers * (layers + 1) // 2 if model.kind == "decoder" else n * layers * layers
    add(f"residual patching, {layers * n} cells (layer x position)", n, n * positions,
        8 * activations(n))


def _prompt(model: Model, length: int) -> Prompt:
    ids = probe_ids(model.hf, length)[0].tolist()
    while len(ids) < length:
        ids += ids[: length - len(ids)]
    return Prompt.from_tokens(ids)
