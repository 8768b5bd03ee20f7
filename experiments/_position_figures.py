"""Figures of `position_probes`."""

from collections.abc import Mapping

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from interp.core import Result, statistics
from interp.figures import layer_curve
from interp.figures.style import CYCLE, GRAY, PAGE, canvas, color
from probes import position

RELEASED = {
    "none": (337.16, 286.43, 79.89, 16.93, 16.46, 20.96, 31.03, 133.30),
    "learned": (11.24, 6.45, 7.64, 6.95, 8.82, 16.31, 28.88, 128.99),
    "sinusoidal": (0.008, 0.009, 0.022, 0.253, 0.402, 1.30, 15.99, 92.10),
    "ALiBi": (337.01, 331.35, 288.31, 183.51, 72.83, 52.66, 79.59, 170.57),
}
"""Mean distance in tokens of 1024 positions, 1.3 billion parameters: released results of the paper."""

AFTER = (0, 1, 2, 4, 6, 11, 18, 24)
BLOCK = "block (-1: what enters block 0)"


def distance(found: Mapping[str, Result], name: str, control: str) -> Figure:
    """Error by layer, beside the paper's."""
    figure, (ax, paper) = canvas(1, 2, width=PAGE, height=2.7, sharey=True)
    curves = {key: (one["mad_median"] / one["constant"].mean()).transpose("document", "layer")
              for key, one in found.items()}
    layer_curve.draw(ax, curves, label="distance / constant guess's", x=BLOCK, roles={
        key: "control" for key in curves if key == control})
    guess = found["random tokens"]
    likeliest = guess["mad"].mean("document") / guess["constant"].mean()
    ax.plot(likeliest["layer"], likeliest, ":", color=CYCLE[0], label="random tokens, most probable")
    _beneath(ax)
    ax.legend(fontsize=6, loc="lower left")
    for each, other in ((ax, float(guess["uniform"].mean() / guess["constant"].mean())),
                        (paper, 341.33 / 256)):
        each.axhline(1.0, color=GRAY, linewidth=0.8, linestyle="--", zorder=0)
        each.axhline(other, color=GRAY, linewidth=0.8, linestyle=":", zorder=0)
        each.set_ylim(0, 1.45)
    ax.set_title(f"{name}, probe of {int(guess.manifest['n_positions'])} positions")
    for hue, (key, values) in zip(CYCLE, RELEASED.items()):
        paper.plot(AFTER, np.array(values) / 256, "-o", color=hue, markersize=3, label=key)
    paper.set_xlabel("after so many blocks")
    paper.set_title("the paper's models, by position encoding")
    paper.grid(True, axis="y")
    paper.legend()
    return figure


def _beneath(ax: Axes) -> None:
    """Untrained models with and without encodings may coincide: the lower line is the wider one."""
    for line in ax.lines:
        if line.get_label() == "untrained":
            line.set(linewidth=3.5, markersize=6.5)


def predicted(found: Result, name: str) -> Figure:
    """Predicted against true position in the layer of least error."""
    figure, ax = canvas(1, 1, width=PAGE * 0.5, height=2.6)
    layer = int(found["layer"].values[int(found["mad"].mean("document").values.argmin())])
    position.draw(found, ax, layer)
    ax.legend(loc="lower center", bbox_to_anchor=(0.45, 1.0), ncols=3, fontsize=6)
    figure.suptitle(f"{name}, block {layer}" if layer >= 0 else f"{name}, what enters block 0")
    return figure


def cosine(alike: Mapping[str, Result], name: str) -> Figure:
    """Maps of similarity, of the deepest block common to all."""
    figure, axes = canvas(1, len(alike), width=PAGE, height=2.5, squeeze=False)
    layer = int(next(iter(alike.values()))["layer"].values[1])
    maps = [one["cosine"].sel(layer=layer, drop=True).values.copy() for one in alike.values()]
    for values in maps:
        np.fill_diagonal(values, np.nan)
    reach = max(float(np.nanmax(np.abs(values))) for values in maps)
    for ax, key, values in zip(axes[0], alike, maps):
        n = len(values)
        image = ax.imshow(values, cmap="RdBu_r", vmin=-reach, vmax=reach, extent=(0.5, n + 0.5, n + 0.5,
                                                                                  0.5))
        if ax is axes[0][-1]:
            figure.colorbar(image, ax=list(axes[0]), shrink=0.75, label="cosine")
        ax.set_title("\n".join([*key.split(", "), f"(block {layer})"]), fontsize=7)
        ax.set_xlabel("position")
        ax.set_ylabel("position" if ax is axes[0][0] else "")
        marks = [1, n // 2, n]
        ax.set_xticks(marks)
        ax.set_yticks(marks)
    figure.suptitle(name)
    return figure


def adjacency(alike: Mapping[str, Result], name: str, control: str) -> Figure:
    """APS and R2 by layer."""
    figure, (left, right) = canvas(1, 2, width=PAGE, height=3.1)
    roles = {key: "control" for key in alike if key == control}
    layer_curve.draw(left, {key: one["aps"].transpose("document", "layer")
                            for key, one in alike.items()}, x=BLOCK, roles=roles, legend=False,
                     label="nearer one more similar (share, APS)")
    _beneath(left)
    left.axhline(0.5, color=GRAY, linewidth=0.8, linestyle="--", zorder=0)
    figure.suptitle(name)
    left.legend(loc="lower left", bbox_to_anchor=(0.0, 1.0), ncols=2, fontsize=6)
    left.set_ylim(top=1.02)
    for hue, (key, one) in zip(CYCLE, alike.items()):
        hue = GRAY if key == control else hue
        for what, dash in (("r2_cosine", "-"), ("r2_variance", ":")):
            values = one[what].mean("document")
            right.plot(values["layer"], values, dash, color=hue, marker="o", markersize=3, label=key)
    _beneath(right)
    kinds = [*right.plot([], [], "-", color=color("other"), label="from similarities"),
             *right.plot([], [], ":", color=color("other"), label="from the variance")]
    right.axhline(0.0, color=GRAY, linewidth=0.8, linestyle="--", zorder=0)
    right.set_ylim(-0.3, 1.02)
    right.set_xlabel(BLOCK)
    right.set_ylabel("$R^2$ of the position")
    right.set_xticks(left.get_xticks())
    right.set_xlim(left.get_xlim())
    right.grid(True, axis="y")
    right.legend(handles=kinds, loc="lower left", bbox_to_anchor=(0.0, 1.0), ncols=2, fontsize=6)
    return figure


def objects(
    boxes: Mapping[str, Result], mutual: Mapping[str, Result], untrained: Mapping[str, Result],
    pairs: Mapping[str, statistics.Estimate], name: str,
) -> Figure:
    """Centers and mutual positions by layer, and pairs that differ in a word."""
    figure, (left, right, last) = canvas(1, 3, width=PAGE, height=2.9, width_ratios=(3, 3, 1.6))
    for hue, (axis, label) in zip(CYCLE, (("x", "across"), ("y", "down"))):
        one = boxes[axis]["score"]
        left.plot(one["layer"], one, "-o", color=hue, markersize=3, label=label)
        low = boxes[axis]["null"].quantile(0.95, "permutation")
        left.plot(low["layer"], low, "--", color=hue, linewidth=0.8)
        if axis in untrained:
            bare = untrained[axis]["score"]
            left.plot(bare["layer"], bare, "-" if axis == "x" else "-.", color=GRAY,
                      label=f"untrained, {label}")
    left.plot([], [], "--", color=CYCLE[0], linewidth=0.8, label="shuffled (95 %)")
    left.set_ylabel("$R^2$ of the center")
    figure.suptitle(name)
    for hue, key, label in zip(CYCLE, ("left", "above"), ("further left", "higher up")):
        one = mutual[key]
        values = one["right"].astype(float).mean("pair")
        right.plot(values["layer"], values, "-o", color=hue, markersize=3, label=label)
        right.axhline(float(one["by_kind"].mean()), color=hue, linestyle=":", linewidth=0.9)
        if key in untrained:
            bare = untrained[key]["right"].astype(float).mean("pair")
            right.plot(bare["layer"], bare, "-" if key == "left" else "-.", color=GRAY,
                       label=f"untrained, {label}")
    right.plot([], [], ":", color=CYCLE[0], linewidth=0.9, label="kinds alone")
    right.axhline(0.5, color=GRAY, linestyle="--", linewidth=0.8)
    right.set_ylabel("accuracy on pairs")
    right.set_ylim(0.4, 1.02)
    for ax in (left, right):
        ax.set_xlabel(BLOCK)
        ax.set_xticks(boxes["x"]["layer"].values)
        ax.grid(True, axis="y")
        # Handles long enough for dashes and dots to show in them.
        ax.legend(loc="lower left", bbox_to_anchor=(-0.05, 1.0), ncols=2, fontsize=5.5,
                  handlelength=3.0, columnspacing=1.0)
    shown = list(pairs.values())
    at = np.arange(len(shown))
    gaps = [[one.value - one.interval[0], one.interval[1] - one.value] for one in shown]
    last.bar(at, [one.value for one in shown], 0.6, color=[CYCLE[4], CYCLE[2]][: len(shown)],
             yerr=np.abs(np.array(gaps)).T, capsize=3)
    last.axhline(0.5, color=GRAY, linestyle="--", linewidth=0.8)
    last.set_xticks(at, [f"{key}\n(n = {one.n})" for key, one in pairs.items()], fontsize=6)
    last.set_ylim(0, 1.05)
    last.set_ylabel("right word preferred (share)")
    return figure
