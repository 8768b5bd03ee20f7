"""Recall against strength, a panel per family, and the table of all detectors."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from experiments._ground_truth_table import FAILS, Family, recalls
from interp.figures.style import CYCLE, PAGE, canvas, color

MARKERS = ("s", "^", "x")

CALLED = {
    "secondary.measure": "secondary-sink detector", "visual.measure": "visual-sink detector",
    "retrieval.measure": "retrieval-head detector", "image_centric.measure": "image-centric detector",
    "memory_context.measure": "memory-context detector",
    "flow.horizon, H_info": "horizon detector, $H_{info}$",
    "flow.horizon, H_out": "horizon detector, $H_{out}$", "probes.sweep": "probe sweep (corrected)",
}
"""Detectors in words."""


def draw_recall(
    families: Sequence[Family], rows: Mapping[str, pd.DataFrame], table: pd.DataFrame,
    strengths: Mapping[str, Sequence[float]],
) -> Figure:
    """One panel per family: the detector in color, alternatives in gray, with markers of their own."""
    columns = min(3, len(families))
    lines = -(-len(families) // columns)
    figure, axes = canvas(lines, columns, width=PAGE, height=2.75 * lines, squeeze=False)
    for ax, family in zip(axes.flat, families):
        others = iter(MARKERS)
        packaged = iter((CYCLE[0], CYCLE[2]))
        for method in family.methods:
            mean = recalls(rows[family.key], method.name).mean(0)
            at = strengths[family.key]
            if method.detector:
                ax.plot(at, mean, "-o", color=next(packaged), zorder=3,
                        label=CALLED.get(method.name, method.name))
            else:
                ax.plot(at, mean, linestyle="-", marker=next(others), color=color("control"),
                        linewidth=0.9, label=method.name)
        line = table[(table["family"] == family.key)
                     & (table["method"] == family.detector.name)].iloc[0]
        if np.isfinite([line["fails_low"], line["fails_high"]]).all():
            ax.axvspan(line["fails_low"], line["fails_high"], color=CYCLE[0], alpha=0.12,
                       linewidth=0)
        if at[0] <= line["fails_at"] <= at[-1]:
            ax.axvline(line["fails_at"], color=CYCLE[0], linewidth=0.8, linestyle="--")
        ax.axhline(FAILS, color=color("control"), linewidth=0.6, linestyle=":")
        ax.set_xscale("log", base=2)
        ax.set(ylim=(-0.05, 1.08), xlim=(at[0] / 2.3, at[-1] * 2.3), xlabel=family.strength)
        ax.set_title(family.title, pad=4 + 10.5 * len(family.methods))
        ax.set_yticks(np.linspace(0, 1, 6))
        shown = list(at)[:: max(1, len(at) // 4)]
        ax.set_xticks(shown, [f"{x:g}" for x in shown])
        ax.minorticks_off()
        ax.legend(loc="lower left", bbox_to_anchor=(0.0, 1.0), fontsize=6, borderpad=0.2)
    for ax in axes[:, 0]:
        ax.set_ylabel("recall")
    for ax in list(axes.flat)[len(families):]:
        ax.set_axis_off()
    places = " to ".join(str(n) for n in dict.fromkeys((min(table["places"]), max(table["places"]))))
    figure.supxlabel(f"dotted: recall {FAILS:g}, below which a method fails; dashed: where the first "
                     f"detector does, with its 95 % bootstrap interval over {places} places",
                     fontsize=7, color=color("control"))
    return figure


HEADS = ("method", "recall", "precision", "layer\nerror", "wrong\nhead", "items of\ntwins",
         "decoys\nreported", "fails below")
AT = (0.0, 0.285, 0.36, 0.45, 0.525, 0.6, 0.68, 0.78)


def draw_table(families: Sequence[Family], table: pd.DataFrame) -> Figure:
    """The table as a page; detectors bold, what cannot be counted as a dash."""
    n = len(table) + len(families) + 2
    figure, ax = canvas(width=PAGE, height=0.185 * n)
    ax.set_axis_off()
    ax.set(xlim=(0, 1), ylim=(n, 0))
    for x, word in zip(AT, HEADS):
        ax.text(x, 1.2, word, va="bottom", fontsize=7, weight="bold", linespacing=0.95)
    ax.plot([0, 1], [1.45, 1.45], color="black", linewidth=0.7)
    y = 2.0
    for family in families:
        ax.text(0, y, family.title, va="center", fontsize=7.5, style="italic")
        ax.text(AT[-1], y, family.strength, va="center", fontsize=6, color=color("control"))
        y += 1
        for _, line in table[table["family"] == family.key].iterrows():
            weight = "bold" if line["kind"] == "detector" else "normal"
            cells = [CALLED.get(line["method"], line["method"]), *(_number(line[name]) for name in (
                "recall", "precision", "layer_error", "head_error", "false_in_twins",
                "false_in_decoys")), _fails(line, family)]
            for x, text in zip(AT, cells):
                ax.text(x + (0.012 if x == 0 else 0), y, text, va="center", fontsize=7, weight=weight)
            y += 1
    return figure


def _number(value: Any) -> str:
    return "–" if not np.isfinite(value) else f"{value:.2f}"


def _fails(line: Any, family: Family) -> str:
    """The failing strength; beyond the strengths that were tried, only the side is known."""
    at, low, high = (_bounded(float(line[name]), family.strengths) for name in (
        "fails_at", "fails_low", "fails_high"))
    return at if "–" in (low, high) or at == low == high else f"{at} [{low}, {high}]"


def _bounded(value: float, strengths: Sequence[float]) -> str:
    if not np.isfinite(value):
        return "–"
    if value > strengths[-1]:
        return f"> {strengths[-1]:g}"
    return f"< {strengths[0]:g}" if value < strengths[0] else f"{value:.2g}"
