"""Figures of the experiment `linking_failures`: see the captions in its `PAPER`."""

from collections.abc import Mapping
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from interp.core import Result
from interp.figures.style import COLUMN, CYCLE, GRAY, canvas, note
from probes.selective import RiskCoverage


def layers(found: Result, top: Mapping[str, Any], name: str) -> Figure:
    """AUC by layer at two places, against the largest value of permuted labels."""
    score = found["score"].transpose("position", "layer")
    null = found["null"].max(("layer", "position")).values
    figure, ax = canvas(1, 1, width=COLUMN * 1.6, height=2.4)
    at = score.layer.values
    low, high = np.quantile(null, (0.05, 0.95))
    ax.axhspan(low, high, color=GRAY, alpha=0.3, linewidth=0,
               label="best of permuted labels,\n5 to 95 %")
    ax.axhline(0.5, color=GRAY, linestyle=":", linewidth=0.8)
    for number, place in enumerate(score.position.values):
        ax.plot(at, score.sel(position=place), "-o", markersize=3, color=CYCLE[number], label=str(place))
    cell = top["cell"]
    ax.plot([cell["layer"]], [top["score"]], "o", markersize=8, fillstyle="none", color="black")
    ax.set_xticks(at)
    ax.set_xlabel("layer (-1: what enters block 0)")
    ax.set_ylabel("ROC-AUC, unreliable answers")
    ax.set_title(name)
    ax.legend(loc="upper left", bbox_to_anchor=(1.0, 1.0))
    note(ax, f"ring: best, p = {top['p']:.2g}; AUC {top['nested_score']:.2f} where it is chosen within "
             "training folds")
    return figure


def coverage(curves: Mapping[str, RiskCoverage], name: str) -> Figure:
    """Risk against coverage."""
    figure, ax = canvas(1, 1, width=COLUMN * 1.35, height=2.5)
    hues = {"probe": CYCLE[0], "largest probability": CYCLE[1], "entropy": CYCLE[3],
            "words of the question": GRAY, "perfect order": "#555555"}
    for label, curve in curves.items():
        ax.plot(curve.coverage, curve.risk, color=hues[label],
                linestyle=":" if label == "perfect order" else "-",
                label=f"{label}, area {curve.aurc:.2f}")
    ax.set_xlim(0, 1.01)
    ax.set_ylim(0, None)
    ax.set_xlabel("coverage (share of answers accepted)")
    ax.set_ylabel("risk (share of errors among them)")
    ax.set_title(name)
    ax.legend(loc="upper left", bbox_to_anchor=(1.0, 1.0))
    return figure
