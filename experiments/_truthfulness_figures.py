"""Figures of the experiment `truthfulness`: see the captions in its `PAPER`."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
import xarray as xr
from matplotlib.figure import Figure

from interp.core import Result
from interp.core.statistics import Estimate
from interp.figures import heat
from interp.figures.style import COLUMN, CYCLE, GRAY, PAGE, canvas, note

CONTROLS = ("shuffled", "untrained", "words alone")


def heat_map(found: Result, name: str) -> Figure:
    """AUC per layer and token; cells above the permuted maximum carry a ring."""
    score = found["score"].transpose("layer", "position")
    figure, ax = canvas(1, 1, width=COLUMN * 1.25, height=2.9)
    shown = xr.DataArray(score.values, dims=("layer", "token"),
                         coords={"layer": score.layer.values, "token": score.position.values})
    heat.draw(ax, shown, label="ROC-AUC (chance 0.5)", y="layer", x="",
              limits=(min(0.5, float(score.min())), 1.0))
    ax.set_xticks(range(score.sizes["position"]), [
        str(p).replace(" ", "\n") for p in score.position.values])
    row, column = np.nonzero((found["p"].transpose("layer", "position") < 0.05).values)
    ax.plot(column, row, "o", color="white", markeredgecolor="black", markersize=3)
    ax.set_title(f"{name}: errors told by probes")
    note(ax, "dots: p < 0.05, corrected for all cells")
    return figure


def methods(found: Mapping[str, Estimate], name: str) -> Figure:
    """One bar per method with its interval, controls in gray."""
    labels = list(found)
    figure, ax = canvas(1, 1, width=PAGE * 0.75, height=0.6 + 0.2 * len(labels))
    at = np.arange(len(labels))[::-1]
    values = np.array([found[n].value for n in labels])
    edges = np.array([found[n].interval for n in labels])
    control = [any(word in n for word in CONTROLS) for n in labels]
    colors = [GRAY if c else CYCLE[1] if n.startswith("log") else CYCLE[0]
              for n, c in zip(labels, control)]
    ax.barh(at, values - 0.5, left=0.5, color=colors, height=0.7)
    ax.errorbar(values, at, xerr=np.abs(edges.T - values), fmt="none", ecolor="black", elinewidth=0.8,
                capsize=1.5)
    ax.axvline(0.5, color=GRAY, linestyle=":", linewidth=0.8)
    ax.set_yticks(at, labels)
    ax.set_xlim(min(0.35, np.nanmin([values.min(), np.nanmin(edges)]) - 0.02), 1.0)
    ax.set_xlabel("ROC-AUC of error detection (chance 0.5)")
    ax.set_title(name)
    return figure


def transfer(matrix: np.ndarray, names: Sequence[str], name: str) -> Figure:
    """Train kind by test kind."""
    figure, ax = canvas(1, 1, width=COLUMN * 1.15, height=0.9 + 0.36 * len(matrix))
    shown = xr.DataArray(matrix, dims=("trained on", "tested on"), coords={
        "trained on": [*names, "log prob."], "tested on": list(names)})
    heat.draw(ax, shown, label="ROC-AUC (chance 0.5)", annotate=".2f", upward=False,
              limits=(min(0.5, float(np.nanmin(matrix))), 1.0))
    ax.set_title(f"{name}: tokens of the exact answer")
    return figure


def choice(accuracy: pd.DataFrame, name: str, each: int) -> Figure:
    """Accuracy of every rule, by the kind of question; the number of questions beside it."""
    kinds = accuracy.index.value_counts()
    shown = ["all", *kinds.index]
    figure, ax = canvas(1, 1, width=PAGE * 0.85, height=2.5)
    width = 0.8 / len(accuracy.columns)
    colors = {"greedy": "#555555", "random sample": GRAY, "majority": CYCLE[2],
              "log probability": CYCLE[1], "probe": CYCLE[0], "best possible": "#DDDDDD"}
    for number, rule in enumerate(accuracy.columns):
        values = [accuracy[rule].mean() if kind == "all" else
                  accuracy[rule][accuracy.index == kind].mean() for kind in shown]
        ax.bar(np.arange(len(shown)) + (number - (len(accuracy.columns) - 1) / 2) * width, values,
               width=width, label=rule, color=colors[rule])
    count = {"all": len(accuracy), **kinds.to_dict()}
    ax.set_xticks(range(len(shown)), [
        kind.replace(" ", "\n") + f"\n(n = {count[kind]})" for kind in shown])
    ax.set_ylabel("accuracy of the chosen answer")
    ax.set_ylim(0, 1.02)
    ax.set_title(f"{name}: choosing among {each} sampled answers")
    ax.legend(ncols=1, loc="upper left", bbox_to_anchor=(1.0, 1.0))
    return figure


def stack(bars: Mapping[str, float], curves: Mapping[str, Any], name: str) -> Figure:
    """Parts of the stack, and reliability of two confidences."""
    figure, (left, right) = canvas(1, 2, width=PAGE, height=2.4)
    at = np.arange(len(bars))[::-1]
    colors = [GRAY if "shuffled" in n else CYCLE[1] if "single" in n else CYCLE[0] for n in bars]
    left.barh(at, np.array(list(bars.values())) - 0.5, left=0.5, color=colors)
    left.axvline(0.5, color=GRAY, linestyle=":", linewidth=0.8)
    left.set_yticks(at, list(bars))
    lowest = min(0.5, *bars.values())
    left.set_xlim(lowest - 0.05 * (1 - lowest), 1.0)
    left.set_xlabel("ROC-AUC of error detection (chance 0.5)")
    left.set_title(f"{name}: last token of the answer")
    right.plot([0, 1], [0, 1], ":", color=GRAY)
    for number, (label, curve) in enumerate(curves.items()):
        right.plot(curve["confidence"], curve["accuracy"], "-o", markersize=3, color=CYCLE[number],
                   label=f"{label}, ECE {float(curve['ece']):.2f}")
    right.set_xlabel("confidence that the answer is right")
    right.set_ylabel("share of right answers")
    right.set_xlim(-0.02, 1.02)
    right.set_ylim(-0.02, 1.02)
    right.legend(loc="upper left")
    return figure
