"""Heads, windows and sinks of a model, measured on one short text."""

import numpy as np

from interp.core.errors import UndertowError
from interp.doctor.lanes import sentence
from interp.doctor.report import Report, Sink
from interp.doctor.tokens import short_text
from interp.models.model import Model
from interp.models.windows import windows
from interp.sinks.first_token import sink_rate_from_importance


def examine_attention(model: Model, report: Report) -> None:
    """Note the windows, the query-to-key-value map and the sink of a model in the report."""
    try:
        report.windows = windows(model)
    except (UndertowError, ValueError, RuntimeError) as error:
        report.limit("windows", f"which layers have a window could not be seen: {sentence(error)}")
    report.kv_heads = _kv_heads(model, report)
    try:
        report.sink = _sink(model)
    except (UndertowError, ValueError, RuntimeError) as error:
        report.limit("sink", f"attention on the first token could not be measured: "
                             f"{sentence(error)}")


def _kv_heads(model: Model, report: Report) -> tuple[int, ...]:
    """Which key-value head every query head reads, from the activations where they are readable.

    What a head gives is its weights times the values of its own key-value head, and of no other.
    """
    group = model.n_heads // model.n_kv_heads
    expected = tuple(head // group for head in range(model.n_heads))
    layer = model.n_layers // 2
    names = [f"{name}.{layer}" for name in ("pattern", "v", "z")]
    if not {"pattern", "v", "z"} <= set(model.sites()) or group == 1:
        return expected
    prompt, _ = short_text(model, 16)
    run = model.run(prompt, read=names, logits="none")
    pattern, v, z = (run.reads[name].values[0, 0] for name in names)
    made = np.einsum("hqk,kgd->ghqd", pattern, v)
    gap = np.abs(made - z.transpose(1, 0, 2)[None]).max((2, 3))
    best = gap.argmin(0)
    alike = gap.min(0) <= 0.05 * np.abs(z).max((0, 2))
    if not alike.all():  # outputs that are gated before they can be read
        return expected
    found = tuple(int(head) for head in best)
    if found != expected:
        report.fault("heads", f"query heads read the key-value heads {found} instead of {expected}")
    return found


def _sink(model: Model) -> Sink:
    prompt, text = short_text(model)
    length = len(prompt)
    asked = ["received", "row_deficit"] if model.sink_kind == "learned" else ["received"]
    run = model.run(prompt, stats=asked, logits="none")
    received = run.stats["received"]
    mean = received.mean(("prompt", "layer", "head"))
    visible = np.arange(1, length + 1) if model.kind == "decoder" else np.full(length, length)
    external = float(run.stats["row_deficit"].mean()) if len(asked) > 1 else None
    return Sink(
        model.sink_kind, length, text, float(mean[0]), float(mean[max(1, length // 4)]),
        float((1 / visible).mean()), float(sink_rate_from_importance(received.values)[0]), external,
    )
