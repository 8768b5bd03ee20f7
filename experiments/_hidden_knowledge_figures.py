"""Figures of the experiment `hidden_knowledge`: see the captions in its `PAPER`."""

from collections.abc import Mapping

import numpy as np
from matplotlib.figure import Figure

from interp.core.statistics import Estimate
from interp.figures.style import COLUMN, CYCLE, GRAY, PAGE, canvas, note

K = "K: share of pairs whose right answer\nscores above the wrong one (chance 0.5)"
CONTROLS = ("words alone", "embedding", "probe, shuffled labels")


def _bars(ax: object, at: np.ndarray, found: Mapping[str, Estimate], hue: str, width: float,
          label: str = "") -> None:
    """Bars with intervals; a missing interval leaves the bar alone."""
    values = np.array([one.value for one in found.values()])
    edges = np.array([one.interval for one in found.values()], float)
    ax.bar(at, values, width=width, color=hue, label=label or None)  # type: ignore[attr-defined]
    error = np.nan_to_num(np.abs(edges.T - values))
    ax.errorbar(at, values, yerr=error, fmt="none", ecolor="black",  # type: ignore[attr-defined]
                elinewidth=0.8)


def scores(found: Mapping[str, Estimate], name: str) -> Figure:
    """K of every score."""
    figure, ax = canvas(1, 1, width=PAGE * 0.65, height=0.7 + 0.22 * len(found))
    at = np.arange(len(found))[::-1]
    for place, (label, one) in zip(at, found.items()):
        hue = GRAY if label in CONTROLS else CYCLE[0] if label.startswith("probe") else CYCLE[1]
        ax.barh(place, one.value, color=hue, height=0.7)
        if np.isfinite(one.interval).all():
            ax.plot(one.interval, [place, place], color="black", linewidth=0.9)
    ax.axvline(0.5, color="black", linestyle=":", linewidth=0.8)
    ax.set_yticks(at, list(found))
    ax.set_xlim(0, 1.0)
    ax.set_xlabel(K)
    ax.set_title(f"{name}: right above wrong answers")
    note(ax, f"95 % bootstrap interval, n = {max(one.n for one in found.values())} questions")
    return figure


def relations(parts: Mapping[str, Mapping[str, Estimate]], best: str, name: str) -> Figure:
    """K by kind of question."""
    kinds = list(next(iter(parts.values())))
    figure, ax = canvas(1, 1, width=max(COLUMN * 1.6, 1.5 + 0.9 * len(kinds)), height=2.4)
    hues = {"probe": CYCLE[0], best: CYCLE[1], "outer scores, fitted": CYCLE[3], "words alone": GRAY}
    width = 0.8 / len(parts)
    for number, (label, found) in enumerate(parts.items()):
        _bars(ax, np.arange(len(kinds)) + (number - (len(parts) - 1) / 2) * width, found, hues[label],
              width, label)
    ax.axhline(0.5, color="black", linestyle=":", linewidth=0.8)
    ax.set_xticks(range(len(kinds)), [
        f"{kind}\n(n = {next(iter(parts.values()))[kind].n})" for kind in kinds])
    ax.set_ylim(0, 1.02)
    ax.set_ylabel("K (chance 0.5)")
    ax.set_title(name)
    ax.legend(loc="upper left", bbox_to_anchor=(1.0, 1.0))
    note(ax, f"{K}\n95 % bootstrap interval over questions")
    return figure


def never(
    absent: np.ndarray, perfect: np.ndarray, chance: np.ndarray, samples: int, name: str
) -> Figure:
    """How often the right answer stands above all wrong ones, sampled or never sampled."""
    figure, ax = canvas(1, 1, width=COLUMN * 1.1, height=2.3)
    labels = []
    for place, (label, some) in enumerate((("sampled", absent == 0), ("never sampled", absent > 0))):
        labels.append(f"{label}\n(n = {int(some.sum())})")
        if some.any():
            ax.bar(place - 0.2, perfect[some].mean(), width=0.38, color=CYCLE[0],
                   label="probe" if not place else None)
            ax.bar(place + 0.2, chance[some].mean(), width=0.38, color=GRAY,
                   label="random order" if not place else None)
    ax.set_xticks((0, 1), labels)
    ax.set_ylim(0, 1.02)
    ax.set_ylabel("share of questions whose right\nanswer tops every wrong one")
    ax.set_title(name)
    ax.legend()
    note(ax, f"sampled: right answer among {samples} samples")
    return figure


def rerank(accuracy: Mapping[str, np.ndarray], name: str) -> Figure:
    """Accuracy of the answer taken."""
    figure, ax = canvas(1, 1, width=COLUMN * 1.4, height=0.7 + 0.26 * len(accuracy))
    at = np.arange(len(accuracy))[::-1]
    hues = [GRAY if label.startswith("random") else CYCLE[0] if label.startswith("probe") else CYCLE[1]
            for label in accuracy]
    ax.barh(at, [v.mean() for v in accuracy.values()], color=hues, height=0.7)
    ax.set_yticks(at, list(accuracy))
    ax.set_xlim(0, 1.0)
    ax.set_xlabel(f"accuracy of the answer taken (n = {len(next(iter(accuracy.values())))} questions)")
    ax.set_title(name)
    return figure
