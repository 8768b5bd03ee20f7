"""Figures of the Future Lens: precision and surprisal by layer, and the lens on one text."""

from collections.abc import Mapping
from typing import Any

import numpy as np
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize
from matplotlib.figure import Figure

from experiments._contexts import STEPS
from interp.core import Prompt, Result
from interp.figures.style import CYCLE, PAGE, UNDER_TEXT, canvas, color, note
from interp.figures.token_strip import readable
from interp.models.futures import greedy_futures
from interp.models.model import Model
from interp.models.prompting import printable
from probes.carried_states import FuturePrompt

HUES = {"learned": CYCLE[0], "fixed": CYCLE[4], "linear": CYCLE[1], "vocabulary": CYCLE[3]}
NAMES = {"learned": "learned prompt", "fixed": "fixed prompt", "linear": "linear map",
         "vocabulary": "map to the vocabulary", "pairs": "counts of token pairs",
         "shuffled": "another's state", "none": "no state", "mean": "mean state"}
DASH = {"shuffled": "--", "none": "-.", "mean": (0, (1, 1))}
TONES = {"shuffled": color("control"), "none": "#B0B0B0", "mean": "black"}
FURTHER = ("next token", "one after it", "two after it", "three after it")


def precision_figure(found: Result, title: str, fed: bool = False) -> Figure:
    """Precision@1 by layer, one panel per N."""
    figure, axes = canvas(1, STEPS, width=PAGE, height=2.8, sharey=True)
    suffix = ", fed" if fed else ""
    lines = [line for line in HUES if line + suffix in found["line"].values]
    gray = ["none", "shuffled", "mean"] if fed else ["shuffled"]
    means = found["hit"].mean("sample")
    for n, ax in enumerate(axes):
        for line in lines:
            curve = means.sel(line=line + suffix, step=n).dropna("layer")
            ax.plot(curve["layer"], curve, "-o", markersize=3, color=HUES[line], label=NAMES[line])
        for line in gray:
            curve = means.sel(line=line + suffix, step=n).dropna("layer")
            ax.plot(curve["layer"], curve, linestyle=DASH[line], color=TONES[line],
                    label=NAMES[line])
        level = float(means.sel(line="pairs" + suffix, step=n).dropna("layer")[0])
        ax.axhline(level, color=color("control"), linewidth=0.7, label=NAMES["pairs"])
        ax.set_title(f"N = {n}: {FURTHER[n]}")
        ax.set_ylim(-0.02, 1.02)
        _layers(ax, found)
    axes[0].set_ylabel("Precision@1")
    figure.suptitle(f"{title}: " + ("own tokens fed in between" if fed else "decoded freely"))
    figure.legend(*axes[-1].get_legend_handles_labels(), loc="outside lower center", ncols=4)
    note(axes[-1], f"n = {found.data.sizes['sample']}")
    return figure


def surprisal_figure(found: Result, title: str) -> Figure:
    """Mean surprisal of what is read, by layer, one panel per N."""
    figure, axes = canvas(1, STEPS, width=PAGE, height=2.7, sharey=True)
    means = found["surprisal"].mean("sample")
    for n, ax in enumerate(axes):
        for line, hue in HUES.items():
            curve = means.sel(line=line, step=n).dropna("layer")
            ax.plot(curve["layer"], curve, "-o", markersize=3, color=hue, label=NAMES[line])
        curve = means.sel(line="shuffled", step=n).dropna("layer")
        ax.plot(curve["layer"], curve, "--", color=color("control"), label=NAMES["shuffled"])
        level = float(means.sel(line="pairs", step=n).dropna("layer")[0])
        ax.axhline(level, color=color("control"), linewidth=0.7, label=NAMES["pairs"])
        ax.set_title(f"N = {n}: {FURTHER[n]}")
        _layers(ax, found)
    axes[0].set_ylim(0, 1.05 * max(ax.dataLim.y1 for ax in axes))
    axes[0].set_ylabel("surprisal (nats)")
    figure.suptitle(f"{title}: surprisal given the full context")
    figure.legend(*axes[-1].get_legend_handles_labels(), loc="outside lower center", ncols=3)
    note(axes[-1], f"n = {found.data.sizes['sample']}")
    return figure


def _layers(ax: Any, found: Result) -> None:
    layers = found["layer"].values
    step = max(1, len(layers) // 6)
    ax.set_xticks(layers[::step])
    ax.set_xlabel("layer")
    ax.grid(True, axis="y")


def grid(model: Model, prompt: Prompt, learned: Mapping[int, FuturePrompt], width: int = 9) -> Figure:
    """Rows are layers, columns tokens of a text; each cell the next token and what comes after it."""
    stop = len(prompt) - STEPS
    places = list(range(max(0, stop - width), stop))
    own = greedy_futures(model, prompt, places, STEPS)
    rows = [(f"layer {layer}", *lens.predict(model, own.states[layer + 1], STEPS))
            for layer, lens in sorted(learned.items())]
    high = 0.92
    figure, ax = canvas(1, 1, width=PAGE, height=0.8 + high * 0.56 * (len(rows) + 1))
    colors = ScalarMappable(Normalize(0, 1), UNDER_TEXT)

    def words(ids: Any) -> list[str]:
        if model.tokenizer is None:
            return [str(int(i)) for i in ids]
        return [readable(text, 9) for text in printable(model.tokenizer, [int(i) for i in ids])]

    for column in range(len(places)):
        _cell(ax, column, len(rows), words(own.tokens[column]), "white", [True] * STEPS)
        for y, (_, tokens, p) in enumerate(rows):
            same = (tokens[column] == own.tokens[column]).tolist()
            _cell(ax, column, y, words(tokens[column]), colors.to_rgba(float(p[column].mean())), same)
    ax.set_xlim(0, len(places))
    ax.set_ylim(0, len(rows) + 1)
    ax.set_xticks(np.arange(len(places)) + 0.5, words([prompt.ids[p] for p in places]))
    ax.xaxis.tick_top()
    ax.set_yticks(np.arange(len(rows) + 1) + 0.5, [name for name, *_ in rows] + ["the model"])
    ax.tick_params(length=0)
    for side in ax.spines.values():
        side.set_visible(False)
    figure.colorbar(colors, ax=ax, label="mean probability", pad=0.01, fraction=0.03)
    ax.set_xlabel(f"{model.name}: next token and three more from one state; bold: as the model goes on",
                  labelpad=4)
    return figure


def _cell(ax: Any, x: int, y: int, texts: list[str], face: Any, bold: list[bool]) -> None:
    ax.fill_between([x + 0.02, x + 0.98], y + 0.03, y + 0.97, facecolor=face, edgecolor="#DDDDDD",
                    linewidth=0.4)
    bright = 1.0 if isinstance(face, str) else 0.299 * face[0] + 0.587 * face[1] + 0.114 * face[2]
    for i, (text, strong) in enumerate(zip(texts, bold)):
        ax.text(x + 0.5, y + 0.83 - 0.22 * i, text, ha="center", va="center", fontsize=5.8,
                weight="bold" if strong else "normal", color="black" if bright > 0.5 else "white",
                parse_math=False)
