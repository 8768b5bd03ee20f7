"""The figures of `information_horizon`."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
import xarray as xr
from matplotlib.figure import Figure
from matplotlib.patheffects import withStroke

from experiments._decisive_questions import TASKS, Decisive
from interp.core import Result
from interp.figures import heat, image_overlay, layer_curve
from interp.figures.style import CYCLE, PAGE, canvas, color, note, some_ticks


def tasks_of(data: Result) -> list[str]:
    """The tasks that were measured, in order."""
    return [task for task in TASKS if bool((data["task"] == task).any())]


def of_task(data: Result, task: str) -> xr.Dataset:
    """The prompts of one task."""
    return data.data.isel(prompt=(data["task"] == task).values).drop_vars("task")


def _symbol(name: str) -> str:
    """H_info with its index written as one."""
    kind, index = name.split("_")
    return f"${kind}_{{\\mathrm{{{index}}}}}$"


def maps(cases: Sequence[Decisive], found: Sequence[Result], words: Sequence[str]) -> Figure:
    """One map per question, windows by layers, and on the picture at three layers."""
    layers = found[0]["layer"].values.tolist()
    shown = list(dict.fromkeys([layers[0], layers[len(layers) // 2], layers[-1]]))
    figure, axes = canvas(len(cases), 1 + len(shown), width=PAGE * 1.25, height=2.3 * len(cases),
                          squeeze=False, width_ratios=[1.9, *[1] * len(shown)])
    for row, case, one, word in zip(axes, cases, found, words):
        values = one["information"]
        reach = float(abs(values).max()) or 1.0
        heat.draw(row[0], values.T, x="layer", y="window", signed=True, upward=False,
                  limits=(-reach, reach), label="answer's probability:\nwindow alone − none (I)")
        text = case.asked.text if len(case.asked.text) < 46 else f"{case.asked.text[:44]} ..."
        row[0].set_title(f"{text} → {word}")
        image = case.prompt.of_kind("image")[0]
        for ax, layer in zip(row[1:], shown):
            ax.set(xticks=[], yticks=[])
            if not image.boxes:
                note(ax, "no pixel boxes for these tokens")
                continue
            scores = {p: float(v) for group, v in zip(
                one.manifest["groups"], values.sel(layer=layer).values)
                for p in group if p in image.positions}
            # The same colors at every layer, so that it is seen to fade.
            image_overlay.draw(ax, case.asked.picture, image, scores, label="", bar=False,
                               limits=(-reach, reach))
            for number, group in enumerate(one.manifest["groups"] if layer == shown[0] else ()):
                boxes = [image.boxes[image.positions.index(p)] for p in group if p in image.positions]
                boxes = [box for box in boxes if box is not None]
                if boxes:
                    left, top, right, bottom = np.mean(boxes, axis=0)
                    ax.text((left + right) / 2, (top + bottom) / 2, str(number), ha="center",
                            va="center", fontsize=6,
                            path_effects=[withStroke(linewidth=1.2, foreground="white")])
            ax.set(xlabel="", ylabel="", xticks=[], yticks=[])
            ax.set_title(f"layer {layer}" + (" (windows)" if layer == shown[0] else ""))
    return figure


def spread(data: Result, replaced: xr.DataArray, horizons: Mapping[str, Any]) -> Figure:
    """Mean and s.d. over windows, and the largest |I| with the horizons of the mean curves."""
    figure, (left, right) = canvas(1, 2, width=PAGE, height=2.5)
    bare = data.data.drop_vars("task")
    layer_curve.draw(left, {"standard deviation": bare["sd"], "mean": bare["mean"]},
                     label="I over windows (probability)")
    layer_curve.draw(right, {"largest |I|": bare["largest"], "replaced by their mean": replaced},
                     label="largest |I| (probability)",
                     roles={"largest |I|": "image", "replaced by their mean": "control"})
    for (name, layer), line in zip(horizons.items(), (":", "-.")):
        if layer is not None:
            right.axvline(layer, color=color("control"), linestyle=line, label=_symbol(name), zorder=0)
    right.legend()
    return figure


def withdrawal(data: Result, eta: float) -> Figure:
    """Score and divergence by the layer before which all image tokens are withdrawn."""
    figure, (left, right) = canvas(1, 2, width=PAGE, height=2.8)
    each = {task: of_task(data, task) for task in tasks_of(data)}
    layer_curve.draw(left, {task: one["score"] for task, one in each.items()},
                     label="right answers (share)", legend=False)
    for one, hue in zip(each.values(), CYCLE):
        left.axhline(float(one["right"].mean()), color=hue, linewidth=0.6, linestyle=":")
    note(left, "dotted: whole image")
    layer_curve.draw(right, {task: one["kl"] + 1e-6 for task, one in each.items()},
                     label="KL from the full output (nats)", log=True, legend=False)
    right.axhline(eta, color=color("control"), linewidth=0.8, linestyle="--")
    note(right, f"dashed: {eta:g}, the output's horizon")
    for ax in (left, right):
        ax.set_xlabel("layer before which the image is withdrawn")
    figure.legend(*left.get_legend_handles_labels(), loc="outside lower center", ncols=len(each))
    return figure


def pruning(pruned: xr.DataArray, data: Result, kept: str) -> Figure:
    """Score by pruning layer, by what the tokens were chosen for."""
    figure, ax = canvas(1, 1, width=5.2, height=2.8)
    at, layers = pruned["layer"].values, data["layer"].values
    random = pruned[..., 3:].mean("prompt")
    mean, sd = random.mean("chosen"), random.std("chosen")
    ax.fill_between(at, mean - sd, mean + sd, color=color("control"), alpha=0.3, linewidth=0)
    ax.plot(at, mean, "-o", color=color("control"), label="random (s.d.)")
    for name, line in zip(("label", "own answer", "shuffled label"), ("-o", "--s", ":^")):
        ax.plot(at, pruned.sel(chosen=name).mean("prompt"), line, label=name, alpha=0.8)
    ax.plot(layers, data["score"].mean("prompt"), "-", color="black", linewidth=0.8,
            label=f"none kept\n(all {data.data.sizes['prompt']} questions)")
    ax.axhline(float(pruned["full"].mean()), color="black", linewidth=0.6, linestyle=":",
               label="whole image")
    ax.set(xlabel="pruning layer", ylabel="right answers (share)", ylim=(-0.03, 1.03))
    ax.set_xticks(layers[:: -(-len(layers) // 12)])
    ax.legend(title="kept by", loc="center left", bbox_to_anchor=(1.0, 0.5))
    note(ax, f"{kept} of the {data.data.sizes['prompt']} questions (whole image too)")
    return figure


def horizons(table: pd.DataFrame, end: int) -> Figure:
    """The horizons of every task, with their intervals."""
    figure, ax = canvas(1, 1, width=4.6, height=2.6)
    tasks, names = list(dict.fromkeys(table["task"])), list(dict.fromkeys(table["horizon"]))
    for row in table.itertuples():
        at = names.index(row.horizon)
        y = tasks.index(row.task) + 0.2 * (at - 1)
        ax.plot([row.low, row.high], [y, y], color=CYCLE[at], linewidth=1.4)
        ax.plot(row.layer, y, "o", color=CYCLE[at],
                label=_symbol(row.horizon) if row.task == tasks[0] else None)
    ax.set_yticks(range(len(tasks)), tasks)
    ax.axvline(end, color=color("control"), linewidth=0.8, linestyle=":")
    layers = range(1, end)
    marks = [layers[i] for i in some_ticks(layers, 8)]
    marks = [mark for mark in marks if end - mark > end / 16]
    ax.set_xticks([*marks, end], [*map(str, marks), "none"])
    ax.set(xlabel="layer", xlim=(0.5, end + 0.3))
    ax.invert_yaxis()
    note(ax, "lines: 95 % bootstrap intervals" + (
        "" if table["n"].nunique() > 1 else f", n = {table['n'].iloc[0]}"))
    ax.legend(loc="center left", bbox_to_anchor=(1.0, 0.5))
    return figure


def cost(row: Mapping[str, Any]) -> Figure:
    """One map against the loop over its cells."""
    figure, ax = canvas(1, 1, width=4.4, height=1.7)
    for y, name, role in ((1, "loop", "control"), (0, "map", "image")):
        passes = row[f"{name} (prefills)"]
        ax.barh(y, passes, color=color(role))
        ax.text(passes, y, f"  {passes:.0f} passes, {row[f'{name} (seconds)']:.3g} s", va="center",
                fontsize=7)
    ax.set_yticks([1, 0], ["loop over cells", "isolation map"])
    ax.set(xlabel="cost (plain passes over the prompt)", xlim=(0, 1.5 * row["loop (prefills)"]))
    note(ax, f"{row['tokens']} tokens, {row['image tokens']} of the image, {row['windows']} windows, "
         f"{row['layers']} layers; seconds of the loop from {row['cells run']} cells")
    return figure
