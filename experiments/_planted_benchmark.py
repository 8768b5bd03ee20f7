"""The detector of secondary sinks on a family of planted models, where the truth is known.

These numbers are this toolkit's own test of itself, not a reproduction of a paper.
"""

from typing import Any

import numpy as np
import pandas as pd
from tqdm.auto import tqdm

from experiments._output import Output
from experiments._paper import Paper, Settings
from interp.core import Claim, statistics
from interp.figures.style import PAGE, canvas, color, note
from interp.organisms.families import evaluate_secondary, secondary_family
from interp.sinks import secondary

MODELS = 52
GOAL = 0.95
"""What the detector is to reach; set before it was measured."""

CLAIMS = {
    "precision": "Benchmark: what the detector calls a secondary sink was planted as one.",
    "recall": "Benchmark: the detector finds the planted secondary sinks.",
    "onset": "Benchmark: the creation layer it gives is exactly the planted one.",
    "lifetime": "Benchmark: the lifetime it gives is exactly the planted one.",
    "controls": "Benchmark: it finds nothing in the same models without the planted sinks.",
}


def benchmark(settings: Settings, out: Output, paper: Paper) -> None:
    """Plant, detect, compare, and report with intervals."""
    count = settings.pick(MODELS, tiny=6)
    table = evaluate(settings, count)
    out.table("benchmark", table)
    pairs = pd.DataFrame([row for rows in table.attrs["sinks"] for row in rows],
                         columns=["planted onset", "found onset", "planted lifetime",
                                  "found lifetime"])
    out.table("benchmark-sinks", pairs)
    details = {"models": count, "sinks": int(table["sinks"].sum()),
               "varied": "depth, creation layer, norm, lifetime, token, sign, decoys",
               "what it is": "this toolkit's test of itself; no paper's number"}
    for key, (hits, trials) in {"precision": ("hits", "found"), "recall": ("hits", "sinks"),
                                "onset": ("onsets", "hits"),
                                "lifetime": ("lifetimes", "hits")}.items():
        estimate = pooled(table[hits].to_numpy(), table[trials].to_numpy())
        out.claim(Claim(CLAIMS[key], "this toolkit", **estimate.for_claim(), null=GOAL,
                        figure="benchmark", details=details))
    clean = statistics.rate(int(table["clean"].sum()), count)
    out.claim(Claim(CLAIMS["controls"], "this toolkit", **clean.for_claim(), null=0.9,
                    unit="of models", figure="benchmark", details=details))
    _draw(table, pairs, out)


def evaluate(settings: Settings, count: int) -> pd.DataFrame:
    """A row per planted model; `attrs["sinks"]` holds planted and found onsets and lifetimes."""
    rows: list[dict[str, Any]] = []
    every: list[list[tuple[int, int, int, int]]] = []
    family = secondary_family(settings.rng(12), n=count, rule="official")
    for case in tqdm(family, total=count, desc="planted models", leave=False):
        seen: list[secondary.SinkLevels] = []

        def detect(residual: Any, seen: list = seen) -> secondary.SinkLevels:
            seen.append(secondary.score(residual, last_layer="raw"))
            return seen[-1]

        got = evaluate_secondary(detect, [case])
        sinks = []
        # The prompts of the planted model are looked at first, then those of its twin.
        for found, truth in zip(seen, case.truth):
            for position in sorted(set(found.of("secondary")) & truth.keys()):
                sinks.append((truth[position][0], found.onset[position], len(truth[position]),
                              found.lifetime[position]))
        hits = round(got["recall"] * got["sinks"])
        found_count = sum(len(one.of("secondary")) for one in seen[: len(case.truth)])
        rows.append({
            "strength": case.strength, "sinks": int(got["sinks"]), "hits": hits,
            "found": found_count, "onsets": sum(a == b for a, b, _, _ in sinks),
            "lifetimes": sum(a == b for _, _, a, b in sinks),
            "clean": got["controls_clean"] == 1.0, "decoys": ", ".join(case.decoys),
        })
        every.append(sinks)
    table = pd.DataFrame(rows)
    table.attrs["sinks"] = every
    return table


def pooled(hits: np.ndarray, trials: np.ndarray) -> statistics.Estimate:
    """A share pooled over models: the wider of a bootstrap over models and a Wilson interval.

    A bootstrap of nothing but successes has no width, and sinks of one model are not independent.
    """
    def share(a: np.ndarray, b: np.ndarray) -> float:
        return float(a.sum() / b.sum()) if b.sum() else float("nan")

    boot = statistics.bootstrap(share, hits, trials)
    if not trials.sum():
        return boot
    wilson = statistics.rate(int(hits.sum()), int(trials.sum()))
    interval = (float(np.fmin(boot.interval[0], wilson.interval[0])),
                float(np.fmax(boot.interval[1], wilson.interval[1])))
    return statistics.Estimate(
        boot.value, interval, boot.n, f"share of {int(trials.sum())} sinks in {len(trials)} models,"
        " wider of bootstrap over models and Wilson")


def _draw(table: pd.DataFrame, pairs: pd.DataFrame, out: Output) -> None:
    figure, axes = canvas(1, 3, width=PAGE, height=2.5)
    for ax, what in zip(axes, ("onset", "lifetime")):
        planted, found = pairs[f"planted {what}"], pairs[f"found {what}"]
        counts = pd.DataFrame({"x": planted, "y": found}).value_counts().reset_index()
        top = max(planted.max(), found.max()) + 1 if len(pairs) else 1
        ax.plot([0, top], [0, top], color=color("control"), linewidth=0.8, zorder=1)
        ax.scatter(counts["x"], counts["y"], s=4 + 3 * counts["count"], color=color("secondary"),
                   alpha=0.7, linewidths=0)
        word = {"onset": "creation layer", "lifetime": "lifetime (layers)"}[what]
        ax.set(xlabel=f"planted {word}", ylabel=f"found {word}")
        note(ax, f"n = {len(pairs)} sinks")
    recall = table["hits"] / table["sinks"].where(table["sinks"] > 0)
    precision = table["hits"] / table["found"].where(table["found"] > 0)
    axes[2].plot(table["strength"], recall, "o", color=color("secondary"), label="recall",
                 markersize=4)
    axes[2].plot(table["strength"], precision, "x", color=color("primary"), label="precision",
                 markersize=4)
    axes[2].set(xscale="log", xlabel="norm over ordinary tokens'", ylim=(-0.05, 1.08),
                ylabel="share, per model")
    axes[2].set_xticks([3, 10, 30, 60], ["3", "10", "30", "60"])
    axes[2].minorticks_off()
    axes[2].legend(loc="lower right")
    note(axes[2], f"n = {len(table)} models")
    out.figure("benchmark", figure)
