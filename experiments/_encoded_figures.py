"""Figures of `encoded_features`: scores and selectivity by layer, and what erasing changes."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from interp.core import Result
from interp.figures.style import PAGE, canvas, color, note


def scores(known: Mapping[str, Result]) -> Figure:
    """Held-out score of every feature by layer, beside its nulls."""
    columns = 4 if len(known) > 6 else 3
    rows = -(-len(known) // columns)
    figure, axes = canvas(rows, columns, width=PAGE, height=1.85 * rows, squeeze=False,
                          sharex=True, sharey=True)
    for ax, (key, found) in zip(axes.flat, known.items()):
        at = found["layer"].values
        low, high = np.nanquantile(found["null"].values, (0.025, 0.975), axis=0)
        ax.fill_between(at, low, high, color=color("control"), alpha=0.35, linewidth=0,
                        label="permuted labels, 95 % of them")
        ax.plot(at, found["untrained"], ":", color=color("control"), label="untrained model")
        if "control" in found.data:
            ax.plot(at, found["control"], "--", color=color("control"),
                    label="control task (share right)")
        ax.plot(at, found["score"], "-o", markersize=2.5, color=color("primary"),
                label="probe (score as titled)")
        ax.axhline(float(found["chance"]), color=color("control"), linewidth=0.7)
        metric = "AUC" if found.manifest["metric"] == "auc" else "balanced acc."
        ax.set_title(f"{key}\n({metric}, n = {found.manifest['n_samples']})")
        ax.set_ylim(-0.03, 1.05)
        ax.xaxis.set_major_locator(MaxNLocator(5, integer=True))
    for ax in axes.flat[len(known):]:
        ax.set_visible(False)
    for ax in axes[-1]:
        ax.set_xlabel("layer")
    for ax in axes[:, 0]:
        ax.set_ylabel("held-out score")
    handles, names = [], []
    for ax in axes.flat[: len(known)]:
        for handle, name in zip(*ax.get_legend_handles_labels()):
            if name not in names:
                handles.append(handle)
                names.append(name)
    figure.legend(handles, names, loc="outside lower center", ncols=4)
    return figure


def selectivity(known: Mapping[str, Result], features: Sequence[Any]) -> Figure:
    """Share right on the labels minus that on the control task, one panel per place."""
    places = sorted({f.place for f in features if f.key in known})
    figure, axes = canvas(1, len(places), width=PAGE, height=2.7, squeeze=False, sharey=True)
    for ax, place in zip(axes[0], places):
        for feature in features:
            if feature.place == place and feature.key in known:
                found = known[feature.key]
                ax.plot(found["layer"], found["share_right"] - found["control"], "-o",
                        markersize=3, label=feature.name)
        ax.axhline(0, color=color("control"), linewidth=0.8)
        ax.set_title(place)
        ax.set_xlabel("layer (-1: what enters block 0)")
        ax.xaxis.set_major_locator(MaxNLocator(6, integer=True))
        ax.legend()
    axes[0][0].set_ylabel("selectivity (share right,\nlabels minus control task)")
    return figure


def erased(ax: Any, key: str, found: Result) -> None:
    """Change of the answer by layer: a feature erased, and the controls, of which bands hold all."""
    at, clean = found["layer"].values, found["clean"].mean("prompt")
    for kind, look, text in (("projection", "-s", "random, equal rank"),
                             ("permuted", "--", "permuted labels")):
        drawn = found["random"].sel(kind=kind).mean("prompt") - clean
        ax.fill_between(at, drawn.min("control"), drawn.max("control"), color=color("control"),
                        alpha=0.25, linewidth=0,
                        label="range of these controls" if kind == "permuted" else None)
        ax.plot(at, drawn.mean("control"), look, color=color("control"),
                label=f"{found['random'].sizes['control']} {text}")
    ax.plot(at, found["erased"].mean("prompt") - clean, "-o", color=color("primary"), label="erased")
    ax.axhline(0, color="black", linestyle=":", linewidth=0.6)
    ax.set_title(f"{key}, rank {found.manifest['rank']}")
    note(ax, f"means, n = {found.data.sizes['prompt']} prompts")
    ax.set_xlabel("layer whose output is changed")
    ax.set_ylabel("change of log probability (nats)")
    ax.xaxis.set_major_locator(MaxNLocator(6, integer=True))
    ax.legend()
