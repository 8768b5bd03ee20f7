"""Figures of the experiment on retrieval heads."""

from collections.abc import Mapping
from typing import Any

import numpy as np
import xarray as xr

from experiments._output import Output
from interp.core import Result
from interp.figures import heat, layer_curve
from interp.figures.style import BLUE, PAGE, VERMILION, canvas, color, note
from interp.heads import retrieval

EDGES = (0.0, retrieval.RETRIEVAL, retrieval.STRONG)
BINS = ("0", "0 to 0.1", "0.1 to 0.5", "0.5 to 1")
SHADES = ("#E4E4E4", "#BBD9EC", "#56A0D0", "#0B4F86")


def draw_all(
    model: Any, found: Result, scores: Any, sweeps: Mapping[tuple[str, str], Result], top: int,
    grid: Any, sink: xr.Dataset, out: Output,
) -> None:
    """Every figure about one model."""
    _bins(model, found, out)
    _ranks(model, found, out)
    figure, ax = canvas()
    retrieval.draw(found, ax)
    ax.set_title(model.name)
    out.figure("map", figure, of=model.name)
    _sweep(model, sweeps, out)
    _sink(model, sink, out)
    if grid is not None:
        _niah(model, grid, out)


def _bins(model: Any, found: Result, out: Output) -> None:
    values = found["score"].values[np.isfinite(found["score"].values)]
    which = (values > EDGES[0]).astype(int) + (values >= EDGES[1]) + (values >= EDGES[2])
    shares = 100 * np.bincount(which, minlength=4) / len(values)
    figure, ax = canvas(height=1.5)
    start = 0.0
    for share, label, shade in zip(shares, BINS, SHADES):
        ax.barh([0], [share], left=start, color=shade, label=label, edgecolor="white")
        if share > 4:
            ax.text(start + share / 2, 0, f"{share:.1f} %", ha="center", va="center", fontsize=7,
                    color="white" if shade == SHADES[3] else "black")
        start += share
    ax.set_yticks([0], [model.name])
    ax.set_xlim(0, 100)
    ax.set_xlabel("share of heads (%)")
    ax.legend(title="retrieval score", ncols=4, loc="lower center", bbox_to_anchor=(0.5, 1.0))
    note(ax, f"{len(values)} heads, {found.manifest['n_kept']} of "
             f"{found.manifest['n_prompts']} prompts kept")
    out.figure("bins", figure, of=model.name)


def _ranks(model: Any, found: Result, out: Output) -> None:
    order = np.argsort(-found["score"].values.ravel(), kind="stable")
    shown = order[: min(len(order), 100)]
    rank = np.arange(1, len(shown) + 1)
    figure, ax = canvas()
    error = found["standard_error"].values.ravel()[shown]
    score = found["score"].values.ravel()[shown]
    ax.fill_between(rank, score - 1.96 * error, score + 1.96 * error, color=BLUE, alpha=0.2,
                    linewidth=0)
    ax.plot(rank, score, color=BLUE, marker="o", label="retrieval score")
    ax.plot(rank, found["frequency"].values.ravel()[shown], color=VERMILION, marker="s",
            linestyle="--", label="activation frequency")
    ax.plot(rank, found["null"].values.ravel()[shown], color=color("control"), linestyle=":",
            label="chance")
    ax.set_xlabel("head rank")
    ax.set_ylabel("score or frequency")
    ax.set_ylim(-0.03, 1.05)
    ax.legend()
    ax.set_title(model.name)
    note(ax, f"mean, 95 % interval, n = {found.manifest['n_kept']}")
    out.figure("ranks", figure, of=model.name)


def _sweep(model: Any, sweeps: Mapping[tuple[str, str], Result], out: Output) -> None:
    kinds = list(dict.fromkeys(by for by, _ in sweeps))
    rows = (("decode", "accuracy"), ("all", "accuracy"), ("all", "neutral_loss"))
    names = ("needle accuracy\n(ablated in the answer)", "needle accuracy\n(ablated throughout)",
             "added neutral loss\n(nats, throughout)")
    figure, axes = canvas(3, len(kinds), width=PAGE, height=5.2, sharex=True, sharey="row",
                          squeeze=False)
    for column, by in enumerate(kinds):
        for row, ((phase, metric), name) in enumerate(zip(rows, names)):
            ax, found = axes[row, column], sweeps[by, phase]
            values = found[metric]
            dim = "sample" if metric == "neutral_loss" else "prompt"
            if metric == "neutral_loss":
                values = values - values.sel(count=0)
            lines = {"top heads": values.sel(condition="top").isel(seed=0),
                     "random heads": values.sel(condition="random").mean("seed")}
            layer_curve.draw(
                ax, {k: v.transpose(dim, "count") for k, v in lines.items()}, along="count",
                label=name if column == 0 else "", x="heads ablated" if row == 2 else "",
                roles={"top heads": "needle", "random heads": "control"},
                legend=row == 0 and column == 0)
            _open_circles(ax, found, lines["random heads"].mean(dim))
            if row == 0:
                ax.set_title(f"by {by}")
            if metric == "accuracy":
                ax.set_ylim(-0.04, 1.06)
            if row < 2:
                for text in ax.texts:
                    text.set_visible(False)
    figure.suptitle(model.name)
    out.figure("sweep", figure, of=model.name)


def _open_circles(ax: Any, found: Result, mean: xr.DataArray) -> None:
    loose = ~found["layer_matched"].values.astype(bool)
    if loose.any():
        ax.plot(found["count"].values[loose], mean.values[loose], "o", markerfacecolor="white",
                markeredgecolor=color("control"), markersize=4, zorder=4)


def _sink(model: Any, data: xr.Dataset, out: Output) -> None:
    failed = data["failed"].values
    if not failed.any() or failed.all():
        which = "fails" if not failed.any() else "succeeds"
        out.no_figure("sink", f"no prompt of this run {which}.", of=model.name)
        return
    figure, axes = canvas(1, 2, width=PAGE * 0.7, height=2.2)
    rng = np.random.default_rng(0)
    for ax, name, label in zip(axes, ("on_first", "on_needle"), ("token 0", "the needle")):
        for x, (which, hue) in enumerate(((~failed, "needle"), (failed, "control"))):
            values = data[name].values[which]
            ax.plot(x + rng.uniform(-0.15, 0.15, len(values)), values, "o", markersize=3,
                    alpha=0.6, color=color(hue), markeredgewidth=0)
            ax.plot([x - 0.25, x + 0.25], [values.mean()] * 2, color="black")
        ax.set_xticks([0, 1], [f"success\n(n = {int((~failed).sum())})",
                               f"failure\n(n = {int(failed.sum())})"])
        ax.set_ylabel(f"attention on {label}")
        ax.set_ylim(-0.03 * float(data[name].max()), None)
        ax.set_xlim(-0.5, 1.5)
    note(axes[1], "one dot per prompt, line: mean")
    figure.suptitle(model.name)
    out.figure("sink", figure, of=model.name)


def _niah(model: Any, grid: Result, out: Output) -> None:
    data = grid["recall"].mean("sample")
    figure, axes = canvas(1, data.sizes["condition"], width=PAGE, height=2.1, sharey=True)
    for number, ax in enumerate(axes):
        one = data.isel(condition=number)
        heat.draw(ax, one.transpose("depth", "length"), limits=(0, 1), signed=False,
                  x="prompt length (tokens)", y="depth of the needle (%)" if number == 0 else "",
                  label="recall", bar=number == len(axes) - 1, upward=False)
        ax.set_title(str(one["condition"].item()))
    note(axes[-1], "ablated by uniform attention, while answering")
    figure.suptitle(model.name)
    out.figure("niah", figure, of=model.name)


def draw_similarity(maps: Mapping[str, xr.DataArray], out: Output) -> None:
    """Correlations of the score maps of models of one shape; others are left blank."""
    names = list(maps)
    values = np.full((len(names), len(names)), np.nan)
    for i, a in enumerate(names):
        for j, b in enumerate(names):
            if maps[a].shape == maps[b].shape:
                values[i, j] = np.corrcoef(maps[a].values.ravel(), maps[b].values.ravel())[0, 1]
    figure, ax = canvas()
    array = xr.DataArray(values, {"model": names, "other": names}, ("model", "other"))
    heat.draw(ax, array, label="Pearson correlation", limits=(-1, 1), signed=True, annotate=".2f",
              hatched="another shape", x="", y="")
    out.figure("similarity", figure)
