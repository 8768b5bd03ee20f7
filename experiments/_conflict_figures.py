"""The figures of `knowledge_conflict`: drawn from results, without a model run."""

from collections.abc import Mapping, Sequence
from typing import Any, Optional

import numpy as np
import xarray as xr
from matplotlib.figure import Figure

from interp.causal import prune
from interp.core import Head, Result, statistics
from interp.figures import heat
from interp.figures.style import CYCLE, PAGE, canvas, color, note
from interp.heads import memory_context


def _called(format: str) -> str:
    return "no context" if format == "none" else format


def maps(found: Mapping[str, Result], outlined: str, top: Sequence[Head], title: str) -> Figure:
    """S_m of every head, a panel per format, one color scale; `top` outlined in one of them."""
    reach = max(float(abs(one["score"]).max()) for one in found.values()) or 1.0
    figure, axes = canvas(1, len(found), width=PAGE, height=2.2, sharey=True)
    for ax, (name, one) in zip(axes, found.items()):
        memory_context.draw(one, ax, limits=(-reach, reach), bar=ax is axes[-1],
                            mark=top if name == outlined else ())
        ax.set_title(_called(name))
        if ax is not axes[0]:
            ax.set_ylabel("")
    figure.suptitle(title)
    return figure


def signals(found: Result, top: Sequence[Head], title: str) -> Figure:
    """Both parts of S_m of every head."""
    figure, ax = canvas(1, 1)
    memory, context = (found[name].mean("sample") for name in ("memory", "context"))
    ax.axhline(0, color=color("control"), linewidth=0.6)
    ax.axvline(0, color=color("control"), linewidth=0.6)
    ax.scatter(memory.values.ravel(), context.values.ravel(), s=9, color=color("control"))
    named = [*top[:6], *prune.ranked(memory_context.scores(found), "memory")[:1]]
    at = {head: [float(v.sel(layer=head.layer, head=head.head)) for v in (memory, context)]
          for head in named}
    for head, (x, y) in at.items():
        role = "primary" if y > x else "secondary"
        ax.scatter(x, y, s=18, color=color(role), zorder=3)
        # The name goes to the side that is away from the nearest neighbor.
        near = min((abs(u - x) + abs(v - y), u) for one, (u, v) in at.items()
                   if one != head or len(at) == 1)[1]
        ax.annotate(str(head), (x, y), xytext=(-4 if near > x else 4, 0), va="center",
                    ha="right" if near > x else "left", textcoords="offset points", fontsize=7)
    ax.set_xlabel("memorized answer, change (logits)")
    ax.set_ylabel("stated answer, change (logits)")
    ax.margins(0.2)
    ax.set_title(title)
    note(ax, "red: memory heads, blue: context heads, gray: the others")
    return figure


def pruning(
    done: Result, chosen: Mapping[str, Optional[int]], model: Any, title: str
) -> Figure:
    """Usage of both sources against the share of heads that are pruned, and random controls."""
    kinds = list(done["against"].values)
    figure, axes = canvas(1, len(kinds), width=PAGE * len(kinds) / 2, height=2.5, sharey=True,
                          squeeze=False)
    total = model.n_layers * model.n_heads
    for ax, kind in zip(axes[0], kinds):
        for usage, role in (("memory_usage", "primary"), ("context_usage", "secondary")):
            for condition, dashes in (("random", "--"), ("top", "-")):
                rate = done[usage].sel(against=kind, condition=condition)
                rate = rate.mean(("seed", "prompt")).dropna("count")
                word = usage.split("_")[0]
                ax.plot(100 * rate["count"] / total, 100 * rate, dashes, marker="o",
                        color=color("control" if condition == "random" else role),
                        alpha=1.0 if condition == "top" else 0.8,
                        markerfacecolor="none" if usage == "context_usage" else None,
                        label=f"{word} usage" + (", random heads" if condition == "random" else ""))
        if chosen.get(kind):
            ax.axvline(100 * chosen[kind] / total, color="black", linestyle=":", linewidth=0.8)
        ax.set_title(f"{kind} heads pruned")
        ax.set_xlabel("heads pruned (% of all)")
        ax.set_ylim(-4, 104)
        ax.label_outer()
    axes[0, 0].set_ylabel("share of conflicts (%)")
    axes[0, -1].legend(loc="center left", bbox_to_anchor=(1.02, 0.5))
    note(axes[0, -1], "dotted: number chosen on the development half")
    figure.suptitle(title)
    return figure


def transfer(
    gain: np.ndarray, agree: np.ndarray, names: Sequence[str], title: str
) -> Figure:
    """Pruning, and maps of S_m, from one set of conflicts to another."""
    figure, axes = canvas(1, 2, width=PAGE, height=max(2.3, 0.34 * len(names) + 1.5), sharey=True)
    for ax, values, shown, label in (
        (axes[0], gain, "gain when pruned", "memory usage gained"),
        (axes[1], agree, "maps compared", "Spearman of $S_m$"),
    ):
        grid = xr.DataArray(values, {"found on": names, "used on": names}, ("found on", "used on"))
        heat.draw(ax, grid, label=label, limits=(-1, 1), signed=True, annotate=".2f", upward=False,
                  x="tested on (other subjects)", y="heads found on", hatched="no context head")
        ax.set_title(shown)
    axes[1].set_ylabel("")
    figure.get_layout_engine().set(wspace=0.06)
    figure.suptitle(title)
    return figure


def superposition(
    samples: Mapping[str, np.ndarray], chance: Mapping[str, float], heads: Sequence[str], title: str
) -> Figure:
    """S_m of heads, a point with its interval per format; what is chance is shaded."""
    figure, ax = canvas(1, 1, width=PAGE * 0.7, height=max(2.0, 0.32 * len(heads) + 1.0))
    for row in range(len(heads)):
        for k, (name, values) in enumerate(samples.items()):
            level, y = chance[name], row + 0.2 * (k - 1)
            ax.fill_betweenx([y - 0.1, y + 0.1], -level, level, color="#DDDDDD", linewidth=0)
            one = statistics.mean(values[:, row], resamples=1000)
            low, high = one.interval
            ax.errorbar(one.value, y, xerr=[[one.value - low], [high - one.value]], fmt="o",
                        color=CYCLE[k], markersize=3.5, linewidth=1.2,
                        label=_called(name) if row == 0 else None)
    ax.axvline(0, color="black", linewidth=0.6)
    ax.set_yticks(range(len(heads)), list(heads))
    ax.invert_yaxis()
    ax.set_xlabel("$S_m$ (logits): context head < 0 < memory head")
    ax.legend(loc="best")
    ax.set_title(title)
    return figure
