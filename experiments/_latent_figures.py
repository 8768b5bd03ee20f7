"""Figures of the experiment on contextual neighbors and alignment."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import xarray as xr
from matplotlib.figure import Figure

from experiments._patch_words import Patch, Shown
from interp.core import Result
from interp.figures import heat, layer_curve
from interp.figures.style import CYCLE, GRAY, PAGE, canvas, color, note
from interp.models.model import Model
from probes import alignment

SHOWN = {"latent": "contextual neighbors", "logit": "logit lens", "embedding": "nearest embeddings"}


def readers(
    name: str, layers: Sequence[int], hits: Mapping[str, tuple[np.ndarray, np.ndarray]],
    picture: np.ndarray,
) -> Figure:
    """Own and other words among the top of three readers, by layer, with bands over pictures."""
    figure, axes = canvas(1, len(hits), width=PAGE, height=2.4, sharey=True)
    for number, (ax, (reader, both)) in enumerate(zip(axes, hits.items())):
        curves = {}
        for label, values in zip(("what it shows", "other pictures"), both):
            per = np.stack([values[:, picture == i].mean(1) for i in np.unique(picture)])
            curves[label] = per
        layer_curve.draw(ax, curves, at=list(layers), resamples=300, legend=number == 0,
                         label="share with such a word" if number == 0 else "",
                         roles={"other pictures": "control"}, x="layer (-1: input)")
        ax.set_ylim(0, 1.02)
        ax.set_title(f"{name}: {SHOWN[reader]}" if number == 0 else SHOWN[reader])
    return figure


def table(model: Model, some: Sequence[Shown], patches: Sequence[Patch], read: Any) -> Figure:
    """A picture and, for some of its tokens, the nearest contextual states by layer."""
    mine = [n for n, p in enumerate(patches) if p.picture == patches[0].picture]
    kept: dict[str, int] = {}
    for n in mine:
        kept.setdefault(patches[n].name, n)
    chosen = list(kept.values())[:4]
    one = some[patches[0].picture]
    picks = sorted({0, len(read.layers) // 2, len(read.layers) - 1})
    figure, (left, right) = canvas(1, 2, width=PAGE, height=2.9, width_ratios=(1, 2.4))
    pixels = np.asarray(one.asked.picture)
    left.imshow(pixels, extent=(0, pixels.shape[1], pixels.shape[0], 0), interpolation="nearest")
    for n in chosen:
        box: Any = one.image.boxes[one.image.positions.index(patches[n].position)]
        left.text((box[0] + box[2]) / 2, (box[1] + box[3]) / 2, str(chosen.index(n) + 1), color="white",
                  ha="center", va="center", fontsize=8, weight="bold",
                  bbox={"boxstyle": "circle,pad=0.15", "facecolor": "black", "alpha": 0.6, "lw": 0})
    left.set(xticks=[], yticks=[])
    left.set_title(model.name)
    rows = read.bank.rows_
    for column, at in enumerate(picks):
        title = "input" if read.layers[at] < 0 else f"after block {read.layers[at]}"
        right.text(0.22 + 0.27 * column, 1.0, title, fontsize=7, weight="bold", va="top")
        for line, n in enumerate(chosen):
            y = 0.9 - 0.225 * line
            if not column:
                right.text(0.0, y, f"{line + 1}: {patches[n].name}", fontsize=7, va="top")
            for place in range(3):
                index = int(read.index[at, n, place])
                word = model.tokenizer.convert_ids_to_tokens([int(rows["token"][index])])[0]
                own = int(rows["token"][index]) in patches[n].words
                right.text(0.22 + 0.27 * column, y - 0.066 * place,
                           f"{word[:11]} ({int(rows['layer'][index])}) "
                           f"{1 - read.distance[at, n, place]:.2f}", fontsize=6.5, va="top",
                           color=CYCLE[2] if own else "black", parse_math=False)
    right.text(0.0, -0.02, "word (layer of the bank) cosine; green: a word for what is shown",
               fontsize=6, color="#666666", va="top")
    right.set(xlim=(0, 1.03), ylim=(0, 1))
    right.axis("off")
    return figure


def leap(name: str, layers: Sequence[int], nearest: np.ndarray, bank: np.ndarray) -> Figure:
    """Share of visual tokens of a layer whose nearest state is of each layer of the bank."""
    share = np.stack([[(row == b).mean() for b in bank] for row in nearest], 1)
    array = xr.DataArray(share, {"bank": bank, "layer": list(layers)}, ("bank", "layer"))
    figure, ax = canvas(1, 1, width=4.4, height=2.8)
    heat.draw(ax, array, label="share of visual tokens", limits=(0.0, 1.0), annotate=".2f" if len(
        layers) <= 10 else "", x="layer of the visual token (-1: input)",
        y="layer of its nearest text state")
    ax.set_title(name)
    return figure


def hubs(name: str, counts: Mapping[str, np.ndarray], total: int, seed: int) -> Figure:
    """Sorted neighbor counts."""
    figure, ax = canvas(1, 1)
    size = len(next(iter(counts.values())))
    drawn = np.random.default_rng(seed).binomial(total, 1 / size, size)
    for label, values, hue in (*((n, v, CYCLE[i]) for i, (n, v) in enumerate(counts.items())),
                               ("at random", drawn, GRAY)):
        order = np.sort(values)[::-1]
        order = order[order > 0]
        ax.plot(np.arange(1, len(order) + 1), order, color=hue, label=label)
    ax.set(xscale="log", yscale="log", xlabel="contextual state, by rank",
           ylabel="times a neighbor (of the five)")
    ax.set_title(name)
    ax.legend()
    note(ax, f"{size} states")
    return figure


def cones(name: str, found: Result) -> Figure:
    """Plain and centered cosines, and how slowly tokens change."""
    figure, axes = canvas(1, 3, width=PAGE, height=2.5)
    for ax, centered in zip(axes, (False, True)):
        alignment.draw(found, ax, centered)
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", ncols=4)
    axes[0].set_title(name)
    for modality in alignment.MODALITIES:
        axes[2].plot(found["block"], found["step"].sel(modality=modality).mean("prompt"), "-o",
                     color=color(modality), label=modality)
    axes[2].set(xlabel="block", ylabel="cosine before and after the block")
    axes[2].legend()
    return figure


def overlap(name: str, found: Sequence[Result]) -> Figure:
    """Overlap of masks by layer and weight, and the two nulls."""
    mean = xr.concat([one["iou"] for one in found], "part").mean("part")
    short = [str(w).split(".")[-1].removesuffix("_proj") for w in mean["weight"].values]
    figure, (left, right) = canvas(1, 2, width=PAGE, height=2.5, width_ratios=(1.5, 1))
    heat.draw(left, mean.assign_coords(weight=short), label="overlap (IoU)", annotate=".2f" if
              mean.size <= 80 else "")
    left.set_title(name)
    shuffled = xr.concat([one["shuffled"] for one in found], "part").mean("part")
    right.plot(mean["layer"], mean.mean("weight"), "-o", color=CYCLE[0], label="image and text")
    right.plot(mean["layer"], shuffled.mean("weight"), "--o", color=GRAY, label="inputs in random order")
    right.axhline(float(found[0]["random"]), color=GRAY, linestyle=":", label="random masks")
    right.set(xlabel="layer", ylabel="overlap (IoU), mean over weights", ylim=(0, 1.02))
    right.legend()
    return figure
