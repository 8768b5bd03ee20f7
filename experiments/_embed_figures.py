"""Figures of the experiment on nearest tokens (EmbedLens)."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from experiments._patch_words import Shown
from interp.core import Result, statistics
from interp.figures import layer_curve
from interp.figures.style import CYCLE, GRAY, PAGE, canvas, color, note
from interp.models.model import Model
from probes import nearest_token
from probes.nearest_token import CLASSES, ROLES, TokenClasses
from probes.visual_tokens import nearest_words

RULES = {"anywhere": "at any place", "same place": "at the same place"}
"""Where a token must be alike from picture to picture to be a sink or dead."""


def _titled(name: str, rule: str) -> str:
    return f"{name} (sinks and dead tokens: constant over pictures, {RULES[rule]})"


def maps(
    name: str, some: Sequence[Shown], labels: Sequence[Mapping[int, str]], rule: str
) -> Figure:
    """The classes on the grid of some pictures."""
    figure, axes = canvas(1, len(some), width=PAGE, height=2.9, squeeze=False)
    for number, (ax, one) in enumerate(zip(axes[0], some)):
        nearest_token.draw(ax, one.asked.picture, one.image, labels[number])
        if number != len(some) // 2:
            ax.get_legend().remove()
        ax.set_title(f"picture {number}")
    figure.suptitle(_titled(name, rule))
    return figure


def shares(name: str, kind: np.ndarray, image: np.ndarray, count: int, rule: str) -> Figure:
    """Stacked shares of the classes per picture; those from number `count` on are of nothing."""
    figure, ax = canvas(1, 1, width=PAGE, height=2.3)
    numbers = np.unique(image)
    base = np.zeros(len(numbers))
    for one in [one for one in CLASSES if (kind == one).any()]:
        height = np.array([(kind[image == i] == one).mean() for i in numbers])
        ax.bar(numbers, height, 0.9, bottom=base, color=color(ROLES[one]), label=one, linewidth=0)
        base += height
    if (numbers >= count).any():
        ax.axvline(count - 0.5, ymax=1.08, color="black", linewidth=1.2, clip_on=False)
        ax.text(count - 0.2, 1.02, "blank pictures", fontsize=7)
    ax.axhline(0.4, color="white", linewidth=1.2, linestyle="--")
    ax.set(xlabel="picture", ylabel="share of visual tokens", ylim=(0, 1),
           xlim=(-0.6, numbers.max() + 0.6))
    ax.set_title(_titled(name, rule), pad=14)
    ax.legend(loc="center left", bbox_to_anchor=(1.0, 0.5), reverse=True)
    note(ax, "dashed: sinks and dead tokens of the paper, about 40 %")
    return figure


def words(model: Model, x: np.ndarray, image: np.ndarray, made: TokenClasses) -> Figure:
    """How often words are the nearest one, by rank, and the entropy of their pictures."""
    ids = nearest_words(x, made.embeddings_)[1]
    found, count = np.unique(ids[:, 0], return_counts=True)
    order = np.argsort(-count)
    found, count = found[order], count[order]
    share, total = count / len(ids), len(np.unique(image))
    table = made.landmarks_
    kinds = [str(table["kind"].get(int(w), "")) or "alive" for w in found] if made.groups_ == "words" \
        else ["alive"] * len(found)
    entropy = []
    for word in found:
        p = np.unique(image[ids[:, 0] == word], return_counts=True)[1] / (ids[:, 0] == word).sum()
        entropy.append(float(-(p * np.log(p)).sum() / np.log(total)) if total > 1 else 0.0)
    figure, (left, right) = canvas(1, 2, width=PAGE, height=2.6, width_ratios=(1.6, 1))
    few = min(len(found), 20)
    left.bar(np.arange(few), share[:few], color=[color(ROLES[k]) for k in kinds[:few]])
    names = [model.tokenizer.convert_ids_to_tokens([int(w)])[0] for w in found[:few]]
    left.set_xticks(range(few), names, rotation=60, ha="right", rotation_mode="anchor")
    for tick in left.get_xticklabels():
        tick.set_parse_math(False)
    left.set(ylabel="share of visual tokens", xlabel="nearest word, by rank")
    left.set_title(f"{model.name}: {len(found)} of {made.embeddings_.shape[0]} words")
    for kind in CLASSES:
        mine = [i for i, k in enumerate(kinds) if k == kind]
        if mine:
            right.plot(share[mine], np.array(entropy)[mine], "o", color=color(ROLES[kind]),
                       label=f"{kind} landmarks" if kind != "alive" else "other words")
    right.set(xlabel="share of visual tokens", ylabel="entropy over pictures (1: even)", xscale="log")
    right.legend(loc="lower right")
    return figure


def pruning(name: str, found: Result, tasks: np.ndarray) -> Figure:
    """Right answers by kind of question, whole and without tokens of either class."""
    parts = {"whole": ("whole", CYCLE[6]), "dead ": ("without dead", color(ROLES["dead"])),
             "alive ": ("without as many alive", color(ROLES["alive"])),
             "only dead": ("dead alone", GRAY)}
    families = [*dict.fromkeys(tasks), "all"]
    figure, ax = canvas(1, 1, width=PAGE, height=2.5)
    for number, (start, (label, hue)) in enumerate(parts.items()):
        mine = [c for c in found["condition"].values if str(c).startswith(start)]
        values = found["correct"].sel(condition=mine).mean("condition").values
        for i, family in enumerate(families):
            some = values[(tasks == family) | (family == "all")]
            some = some[np.isfinite(some)]
            if not len(some):
                continue
            made = statistics.mean(some, resamples=500)
            x = i + (number - 1.5) * 0.2
            ax.bar(x, made.value, 0.18, color=hue, label=label if not i else None)
            if np.isfinite(made.interval[0]):
                ax.plot([x, x], made.interval, color="black", linewidth=0.7)
    ax.set_xticks(range(len(families)), families)
    ax.set(ylabel="right answers (share)", ylim=(0, 1.02), xlabel="kind of question")
    ax.set_title(name)
    ax.legend(loc="center left", bbox_to_anchor=(1.0, 0.5))
    return figure


def blocks(
    name: str, entered: Any, skipped: Mapping[str, Any], right: np.ndarray,
    windows: Mapping[str, range],
) -> Figure:
    """Accuracy against the layer of entry, and with skipped updates by window of layers."""
    figure, (left, ax) = canvas(1, 2, width=PAGE, height=2.5, sharey=True)
    labels = {"as they came": "as they came", "resized": "with the norm of resident ones",
              "other": "of another picture"}
    curves = {labels[str(n)]: entered.sel(condition=n) for n in entered["condition"].values}
    layer_curve.draw(left, curves, resamples=300, label="right answers (share)",
                     roles={labels["other"]: "control"}, x="block at which visual tokens enter")
    left.set_title(name)
    for number, (condition, hue) in enumerate((("image", color("image")), ("question", GRAY))):
        values = [skipped[w].sel(condition=condition).mean().item() for w in windows]
        drawn = ax.bar(np.arange(len(windows)) + 0.38 * number - 0.19, values, 0.36, color=hue,
                       label=f"of the {condition}")
        ax.bar_label(drawn, fmt="%.2g", fontsize=6)
    ax.axhline(float(right.mean()), color="black", linewidth=0.8, linestyle=":")
    ax.set_xticks(range(len(windows)), [f"{w}\n{x.start}-{x.stop - 1}" for w, x in windows.items()])
    ax.set(xlabel="blocks without updates (attention and MLP)", ylim=(0, 1.1))
    ax.legend(loc="lower left", bbox_to_anchor=(0.0, 1.0), ncols=2)
    note(ax, "dotted: the whole model")
    return figure


def middle(name: str, layers: np.ndarray, table: np.ndarray) -> Figure:
    """Mean cosine of alive tokens before block 0 to text states."""
    figure, ax = canvas(1, 1)
    layer_curve.draw(ax, {"alive tokens": table}, at=[int(x) for x in layers], resamples=300,
                     label="cosine to text states", legend=False,
                     x="layer of the text states (-1: embeddings)")
    ax.axvline(float(layers[table.mean(0).argmax()]), color=GRAY, linestyle="--", linewidth=0.8)
    ax.set_title(name)
    note(ax, "dashed: the largest")
    return figure
