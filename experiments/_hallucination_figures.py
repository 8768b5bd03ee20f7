"""Figures of the experiment `hallucination`."""

from collections.abc import Mapping, Sequence
from typing import Any, Optional

import numpy as np
import pandas as pd
import torch
from matplotlib.patches import Rectangle
from matplotlib.ticker import LogFormatter

from experiments._output import Output
from experiments._picture_questions import Asked
from interp.figures import image_overlay, layer_curve
from interp.figures.style import CYCLE, PAGE, canvas, color, note


def table(out: Output, rows: pd.DataFrame, model: str) -> None:
    """Change against greedy decoding of every method, and of its control in gray."""
    greedy = rows[rows["name"] == "greedy"].iloc[0]
    names = [n for n in dict.fromkeys(rows["name"]) if n != "greedy"]
    if not names:
        out.no_figure("table", "no method can be run on this model", of=model)
        return
    figure, axes = canvas(1, 2, width=PAGE, height=0.9 + 0.27 * len(names), sharey=True)
    panels = (("accuracy", "change of accuracy,\nexistence questions"),
              ("hallucinated", "change of the share of named objects\nthat are not there"))
    for ax, (what, label) in zip(axes, panels):
        for kind, shift, hue in (("control", 0.17, color("control")), ("method", -0.17, CYCLE[0])):
            some = rows[(rows["kind"] == kind) & rows["name"].isin(names)]
            if f"{what} change" not in some:
                continue
            some = some[some[f"{what} change"].notna()]
            same = (some[[f"{what} low", f"{what} high"]] == 0).all(axis=1)
            for name in some["name"][same]:
                ax.text(0, names.index(name) + shift, "   nothing changed", va="center", fontsize=6,
                        color=hue)
            at = np.array([names.index(n) for n in some["name"]]) + shift
            middle = some[f"{what} change"].to_numpy()
            ends = np.nan_to_num(np.abs(np.stack([
                middle - some[f"{what} low"], some[f"{what} high"] - middle])))
            ax.errorbar(middle, at, xerr=ends, fmt="o", color=hue, label=kind, markersize=3.5,
                        elinewidth=1.0, capsize=1.5)
        known = set(rows["name"][rows[f"{what} change"].notna()]) if f"{what} change" in rows else set()
        for at, name in enumerate(names):
            if name not in known:
                ax.text(0, at, "   not measured", va="center", fontsize=6, color=color("control"))
        ax.axvline(0, color="black", linewidth=0.6)
        ax.set_xlabel(label)
        value = greedy.get(what, float("nan"))
        ax.set_title(f"greedy: {100 * value:.1f} %" if np.isfinite(value) else "greedy: nothing named")
        note(ax, "bars: 95 % bootstrap intervals")
    axes[0].set_yticks(range(len(names)), names)
    axes[0].set_ylim(len(names) - 0.5, -0.5)
    handles, labels = axes[1].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=2)
    figure.suptitle(f"{model}, noisy pictures")
    out.figure("table", figure, of=model)


def maps(
    out: Output, one: Asked, raw: torch.Tensor, plans: Mapping[str, Any],
    towers: Optional[Sequence[torch.Tensor]], model: str,
) -> None:
    """What the methods pick out of one picture."""
    image = one.prompt.of_kind("image")[0]
    panels: list[tuple[str, str, str, Any, dict[int, str]]] = [
        ("attention of the last token", "attention", "outlined: the object asked for", raw,
         dict.fromkeys(one.region, "needle"))]
    found = {name: plan[0].found for name, plan in plans.items()}
    if "AvisC" in found:
        panels.append(("AvisC: blind tokens", "attention", "outlined: called blind",
                       found["AvisC"]["map"], dict.fromkeys(found["AvisC"]["kept"], "primary")))
    if "IAVA" in found:
        panels.append(("IAVA: change of attention", "change of attention", "", found["IAVA"]["map"], {}))
    if towers is not None:
        panels.append(("DAMRO: vision tower", "attention in the tower", "", towers[0], {}))
    if "GIFT" in found:
        panels.append(("GIFT: gaze shift", "gaze shift", "", found["GIFT"]["map"], {}))
    if "PAINT" in found:
        places = found["PAINT"]
        sets = {**dict.fromkeys(map(int, places["local"]), "secondary"),
                **dict.fromkeys(map(int, places["summary"]), "primary")}
        panels.append(("PAINT: chosen tokens", "", "blue: local, orange: summary",
                       torch.full((len(image),), float("nan")), sets))
    columns = 3
    rows = -(-len(panels) // columns)
    figure, axes = canvas(rows, columns, width=PAGE, height=2.35 * rows, squeeze=False)
    for ax, (title, label, about, values, marks) in zip(axes.ravel(), panels):
        image_overlay.draw(ax, np.asarray(one.picture), image, values.numpy(), label=label,
                           bar=bool(label))
        for position, role in marks.items():
            box = image.boxes[image.positions.index(position)]
            if box is not None:
                ax.add_patch(Rectangle(box[:2], box[2] - box[0], box[3] - box[1], fill=False,
                                       edgecolor=color(role), linewidth=1.4))
        ax.set_title(title)
        ax.set(xticks=(), yticks=(), ylabel="")
        ax.set_xlabel(about, fontsize=7)
    for ax in axes.ravel()[len(panels):]:
        ax.set_axis_off()
    figure.suptitle(f"{model}: {one.text}")
    out.figure("maps", figure, of=model)


def shift(out: Output, moved: Mapping[str, np.ndarray], model: str) -> None:
    """Change of the log-odds of yes, one dot per question."""
    figure, ax = canvas(1, 1, width=PAGE * 0.62, height=2.4)
    rng = np.random.default_rng(0)
    for number, (name, values) in enumerate(moved.items()):
        hue = color("control") if name.startswith("as many") else CYCLE[number % len(CYCLE)]
        ax.scatter(number + rng.uniform(-0.18, 0.18, len(values)), values, s=7, color=hue,
                   alpha=0.6, linewidth=0)
        ax.hlines(np.median(values), number - 0.3, number + 0.3, color=hue)
    ax.axhline(0, color="black", linewidth=0.6)
    ax.set_xticks(range(len(moved)), [name.replace(" ", "\n", 1) if len(name) > 8 else name
                                      for name in moved])
    ax.set_ylabel("change of log-odds of yes")
    ax.set_title(f"{model}: tokens that lose their content")
    out.figure("shift", figure, of=model)


def outliers(
    out: Output, tower: Sequence[torch.Tensor], raw: Sequence[torch.Tensor], count: int, model: str
) -> None:
    """Ranks in the tower against ranks in the language model, over all pictures."""
    ranks = [np.concatenate([(-x).argsort().argsort().numpy() + 1 for x in some])
             for some in (tower, raw)]
    figure, ax = canvas(1, 1, width=3.6, height=3.2)
    n = len(tower[0])
    counts, edges, _ = np.histogram2d(*ranks, bins=[np.linspace(0.5, n + 0.5, min(n, 12) + 1)] * 2)
    shown = ax.pcolormesh(edges, edges, counts.T, cmap="Purples")
    figure.colorbar(shown, ax=ax, label="tokens", pad=0.02)
    for line in (ax.axvline, ax.axhline):
        line(count + 0.5, color=color("primary"), linewidth=1.0)
    ax.set_xlabel("rank of attention in the vision tower")
    ax.set_ylabel("rank in the language model")
    ax.set_title(f"{model} (lines: the {count} outliers)")
    out.figure("outliers", figure, of=model)


def ranks(
    out: Output, by_layer: np.ndarray, along: np.ndarray, names: Sequence[str], model: str
) -> None:
    """Mean log rank of four kinds of words, by layer and along the description."""
    hues = (CYCLE[2], CYCLE[0], CYCLE[1], color("control"))
    figure, axes = canvas(1, 2, width=PAGE, height=2.5)
    for values, ax, at in ((by_layer, axes[0], range(by_layer.shape[2])),
                           (along, axes[1], range(3))):
        for kind, (name, hue) in enumerate(zip(names, hues)):
            part = values[:, kind]
            part = part[np.isfinite(part).any(1)]
            if not len(part):
                continue
            ax.plot(at, 10 ** np.nanmean(part, 0), "-o", color=hue, label=f"{name} ({len(part)})")
            if len(part) >= 5:
                low, high = layer_curve.band(part)
                ax.fill_between(at, 10**low, 10**high, color=hue, alpha=0.15, linewidth=0)
        ax.set_yscale("log")
        for which in (ax.yaxis.set_major_formatter, ax.yaxis.set_minor_formatter):
            which(LogFormatter(minor_thresholds=(2, 0.5)))
        note(ax, "geometric mean, 95 % bootstrap band over descriptions")
    axes[0].set_xlabel("layer")
    axes[0].set_ylabel("rank in the vocabulary")
    axes[1].set_xticks(range(3), ["first", "middle", "last"])
    axes[1].set_xlabel("third of the description, last layer")
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=4)
    figure.suptitle(f"{model} (in brackets: descriptions with such words)")
    out.figure("ranks", figure, of=model)


def saliency(
    out: Output, there: np.ndarray, step: np.ndarray, values: np.ndarray, attention: np.ndarray,
    model: str,
) -> None:
    """Saliency along the description, and its distribution."""
    figure, axes = canvas(1, 2, width=PAGE, height=2.4, width_ratios=(1.6, 1))
    for kind, name, hue in ((True, "there", CYCLE[2]), (False, "not there", CYCLE[1])):
        some = there == kind
        axes[0].scatter(step[some] + (0.15 if kind else -0.15), values[some], s=8, color=hue,
                        alpha=0.6, linewidth=0, label=name)
        order = np.sort(values[some])
        axes[1].step(order, np.arange(1, len(order) + 1) / len(order), color=hue, where="post")
    axes[0].set_xlabel("word of the description")
    axes[0].set_ylabel("saliency of what was said")
    axes[0].legend(title="object is")
    axes[1].set_xlabel("saliency of what was said")
    axes[1].set_ylabel("share of words below")
    figure.suptitle(model)
    out.figure("saliency", figure, of=model)


def mass(out: Output, found: Mapping[str, np.ndarray], model: str) -> None:
    """Attention on image tokens per layer."""
    figure, ax = canvas(1, 1, width=PAGE * 0.55, height=2.3)
    for (name, values), hue in zip(found.items(), (color("control"), CYCLE[0])):
        ax.plot(values.mean(0), "-o", color=hue, label=name)
        if len(values) >= 5:
            ax.fill_between(range(values.shape[1]), *layer_curve.band(values), color=hue, alpha=0.2,
                            linewidth=0)
    ax.set_xlabel("layer")
    ax.set_ylabel("attention on image tokens")
    ax.set_ylim(0, None)
    ax.legend()
    note(ax, f"mean, 95 % bootstrap band, n = {len(values)} questions")
    ax.set_title(model)
    out.figure("mass", figure, of=model)
