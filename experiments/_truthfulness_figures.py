"""Figures of the experiment `truthfulness`: see the captions in its `PAPER`."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
import xarray as xr
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from interp.core import Result
from interp.core.statistics import Estimate
from interp.figures import heat
from interp.figures.style import COLUMN, CYCLE, GRAY, PAGE, canvas, note

CONTROLS = ("shuffled", "untrained", "words alone")
SITES = {"resid_post": "block outputs", "attn_out": "attention outputs", "mlp_out": "MLP outputs"}


def heat_map(found: Result, name: str) -> Figure:
    """AUC per layer and token, colored around chance; cells above the permuted maximum carry a ring."""
    score = found["score"].transpose("layer", "position")
    figure, ax = canvas(1, 1, width=COLUMN * 1.25, height=2.9)
    shown = xr.DataArray(score.values, dims=("layer", "token"),
                         coords={"layer": score.layer.values, "token": score.position.values})
    reach = max(0.1, float(np.nanmax(np.abs(score.values - 0.5))))
    heat.draw(ax, shown, label="ROC-AUC (white: chance, 0.5)", y="layer", x="", signed=True,
              limits=(0.5 - reach, 0.5 + reach))
    ax.set_xticks(range(score.sizes["position"]), [
        str(p).replace(" ", "\n") for p in score.position.values])
    row, column = np.nonzero((found["p"].transpose("layer", "position") < 0.05).values)
    ax.plot(column, row, "o", color="white", markeredgecolor="black", markersize=3)
    ax.set_title(f"{name}: errors told by probes")
    note(ax, f"{'dots:' if len(row) else 'no cell has'} p < 0.05, corrected for all cells; "
             f"n = {found.manifest['n_samples']} answers")
    return figure


def methods(found: Mapping[str, Estimate], name: str) -> Figure:
    """One dot per method with its interval, controls in gray."""
    figure, ax = canvas(1, 1, width=PAGE * 0.75, height=0.6 + 0.2 * len(found))
    _dots(ax, found, [GRAY if any(word in n for word in CONTROLS) else
                      CYCLE[1] if n.startswith("log") else CYCLE[0] for n in found])
    ax.set_title(name)
    note(ax, _intervals(found))
    return figure


def _intervals(found: Mapping[str, Estimate]) -> str:
    return f"95 % intervals, n = {' or '.join(map(str, sorted({e.n for e in found.values()})))} entities"


def _dots(ax: Axes, found: Mapping[str, Estimate], colors: Sequence[str]) -> None:
    """One row per AUC: the estimate and its interval, chance dotted."""
    values = np.array([one.value for one in found.values()])
    edges = np.array([one.interval for one in found.values()])
    for at, (value, ends, hue) in enumerate(zip(values, edges, colors)):
        ax.plot(ends, [at, at], color=hue)
        ax.plot(value, at, "o", color=hue)
    ax.axvline(0.5, color=GRAY, linestyle=":", linewidth=0.8)
    ax.set_yticks(range(len(found)), list(found))
    ax.invert_yaxis()
    ax.set_xlim(min(0.35, np.nanmin([values.min(), np.nanmin(edges)]) - 0.02), 1.0)
    ax.set_xlabel("ROC-AUC of error detection (chance 0.5)")


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


def stack(found: Mapping[str, Estimate], curves: Mapping[str, Any], name: str) -> Figure:
    """Parts of the stack, and reliability of two confidences."""
    figure, (left, right) = canvas(1, 2, width=PAGE, height=2.5)
    _dots(left, found, [GRAY if "shuffled" in n else CYCLE[1] if "single" in n else CYCLE[0]
                        for n in found])
    left.set_title(f"{name}: last token of the answer")
    note(left, f"{_intervals(found)}; single layer: chosen within training")
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
