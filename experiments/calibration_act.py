"""Hidden attention sinks and their calibration, ACT (arXiv:2406.15765).

Where sinks beyond the first token are, what the rule for finding them flags in a model that has
none, and whether moving attention off them helps the answers.
"""

from typing import Any

import numpy as np
import xarray as xr

import interp
from experiments import _answer_tasks as tasks
from experiments import _texts as texts
from experiments._output import Output
from experiments._paper import Paper, Settings
from interp.causal.controls import random_heads
from interp.causal.metrics import AnswerAccuracy, AnswerLogProb
from interp.causal.sweep import evaluate
from interp.core import Claim, Head, OutOfRange, PromptError, Result, statistics
from interp.figures import head_grid, heat
from interp.figures.style import BLUE, GRAY, PAGE, SKY, VERMILION, canvas, note
from interp.sinks import calibration

PAPER = Paper(
    "calibration_act",
    "Unveiling and Harnessing Hidden Attention Sinks",
    ("2406.15765",),
    "Are there attention sinks beyond the first token, and do the answers need them?",
    figures={
        "maps": "Attention averaged over heads and prompts, per layer; triangles: keys that are "
        "hidden sinks, larger where they are so in more heads and prompts.",
        "counts": "Hidden sinks per head and prompt, per layer, by two rules; with late keys, whose "
        "few queries make false sinks, and without.",
        "heads": "Change of the answer's log probability when one head is calibrated; outlined: the "
        "heads chosen for the test.",
    },
    models=("reader", "backcopy-1l"),
    long=True,
)
(SOURCE,) = PAPER.sources
SEEDS = 5
CLAIMS = {
    "beyond": "Some heads have a sink beyond the first token.",
    "scope": "The first two layers and the last have fewer hidden sinks than those between.",
    "late": "Most keys that the rule flags are late keys, which average few queries.",
    "accuracy": "Calibrating chosen heads causes more right answers than calibrating random ones.",
    "conserved": "Calibration keeps the sum of every row of attention.",
}
NUMBERS = {"accuracy": ("up to +7.30 % on average over sets (Llama-30B)", "paper")}


def run(settings: Settings, out: Output) -> None:
    for name in settings.models(PAPER):
        model = interp.open_model(name, **settings.opening())
        out.record(model)
        if model.kind == "encoder":
            _skip(out, model, f"{model.name} is an encoder: all queries see all keys, so no key is "
                  "first", *CLAIMS)
            for figure in PAPER.figures:
                out.no_figure(figure, "the model is an encoder", of=model.name)
            continue
        _detection(model, settings, out)
        _accuracy(model, settings, out)


def _claim(out: Output, model: Any, key: str, estimate: Any, **more: Any) -> None:
    number = dict(zip(("paper_number", "paper_tag"), NUMBERS.get(key, ())))
    out.claim(Claim(CLAIMS[key], SOURCE, **{**number, **estimate.for_claim(), **more}), model.name)


def _skip(out: Output, model: Any, reason: str, *keys: str) -> None:
    for key in keys:
        out.claim(Claim.untestable(CLAIMS[key], SOURCE, reason), model.name)


def _detection(model: Any, settings: Settings, out: Output) -> None:
    length = min(settings.pick(64, tiny=24), model.max_positions or 64)
    try:
        prompts = texts.natural(model, settings.pick(40, tiny=8), length, settings.rng(1))
    except PromptError:
        # No text without a tokenizer; random tokens show what the rule does, not what text does.
        rng = settings.rng(1)
        prompts = [interp.Prompt.from_tokens(rng.integers(0, model.d_vocab, length))
                   for _ in range(settings.pick(40, tiny=8))]
    out.record(prompts=prompts, name=f"text-{model.name}")
    found = calibration.measure(model, prompts)
    out.save(f"sinks-{model.name}", found)
    _maps(model, prompts[: settings.pick(16, tiny=4)], found, out)
    _counts(model, found, length, out)
    count = found["count"]
    early = count.sel(rule="relative", range="early")
    every = count.sel(rule="relative", range="all")
    share = (early > 0).mean(("layer", "head")).values
    _claim(out, model, "beyond", statistics.mean(share), null=0.0, figure="counts",
           unit="share of (layer, head) with one or more", details={
               "T": length, "threshold": calibration.threshold(length),
               "hidden sinks per sequence": float(early.sum(("layer", "head")).mean()),
               "by the code's rule (0.1)": float(count.sel(
                   rule="fixed", range="early").sum(("layer", "head")).mean())})
    flagged = every.sum(("layer", "head")).values
    if (flagged > 0).sum() < statistics.FEWEST:
        _skip(out, model, f"the rule flags a key in {int((flagged > 0).sum())} of {len(flagged)} "
              "prompts only", "late")
    else:
        late = (flagged - early.sum(("layer", "head")).values)[flagged > 0] / flagged[flagged > 0]
        fixed = count.sel(rule="fixed")
        _claim(out, model, "late", statistics.mean(late), null=0.5, figure="counts",
               unit="share of the flagged keys in the second half",
               paper_number="2.1 (rule .1) or 3.0 (5/N) keys per sequence of a one-block model "
               "without hidden sinks, all late", paper_tag="checked", details={
                   "flagged per sequence, 5/N": float(flagged.mean()),
                   "flagged per sequence, 0.1": float(fixed.sel(range="all").sum(
                       ("layer", "head")).mean()),
                   "of them early, 0.1": float(fixed.sel(range="early").sum(
                       ("layer", "head")).mean())})
    inside = list(calibration.scope(model.n_layers))
    outside = [layer for layer in range(model.n_layers) if layer not in inside]
    if model.n_layers < 8:
        _skip(out, model, f"{model.name} is {model.n_layers} deep; without the first two layers and "
              "the last too few are left to compare with (8 layers are asked for)", "scope")
    else:
        per = early.mean("head")
        _claim(out, model, "scope", statistics.difference(
            per.isel(layer=inside).mean("layer").values,
            per.isel(layer=outside).mean("layer").values), null=0.0, figure="counts",
            unit="hidden sinks per head")
    _conserved(model, prompts[: settings.pick(8, tiny=5)], out)


def _conserved(model: Any, prompts: list, out: Output) -> None:
    """Row sums under calibration of every head, against those of the unchanged rows of each layer."""
    found = calibration.measure(model, prompts)
    heads = [Head(a, b) for a in range(model.n_layers) for b in range(model.n_heads)]
    changed = calibration.interventions(found, heads)
    if not any(changed.writes):
        _skip(out, model, "no prompt has a hidden sink to calibrate", "conserved")
        return
    # Whole rows: short prompts only. In the first layer with an edit its input is the same.
    layer = min(one.heads[0].layer for row in changed.writes for one in row)
    site = f"pattern.{layer}"
    before, after = (model.run(prompts, read=site, write=w, logits="none").reads[site]
                     for w in ((), changed))
    gap = np.abs(after.sum("key") - before.sum("key")).max(("layer", "head", "query")).values
    moved = np.abs(after - before).max().item()
    exact = str(model.dtype) in ("torch.float32", "torch.float64")
    _claim(out, model, "conserved", statistics.mean(gap), null=0.0, direction="equal",
           tolerance=1e-5 if exact else 1e-2, unit="largest change of a row's sum",
           details={"layer": layer, "largest change of a weight": moved})


def _maps(model: Any, prompts: list, found: Result, out: Output) -> None:
    if not out.wants("maps"):
        return
    layers = list(range(model.n_layers))
    if len(layers) > 4:
        layers = [int(x) for x in np.linspace(0, model.n_layers - 1, 4)]
    figure, axes = canvas(1, len(layers), width=PAGE if len(layers) > 1 else 3.5,
                          height=2.6 if len(layers) > 1 else None)
    run = model.run(prompts, read=[f"pattern.{layer}" for layer in layers], logits="none")
    for ax, layer in zip(np.atleast_1d(axes), layers):
        mean = run.reads[f"pattern.{layer}"].mean(("prompt", "head")).isel(layer=0)
        heat.draw(ax, mean.drop_vars("layer", errors="ignore"), upward=False, bar=False,
                  limits=(0, 0.3))
        often = found["hidden"].isel(layer=layer).mean(("prompt", "head")).values
        keys, size = np.flatnonzero(often), mean.sizes["key"]
        # Above the diagonal, where a causal map has nothing to show.
        ax.scatter(keys, np.full(len(keys), 1.0), 4 + 60 * often[keys], marker="v", linewidth=0,
                   color=VERMILION, zorder=3)
        ax.set_xlim(-0.5, size - 0.5)
        ax.set_xticks([0, size // 2, size - 1], ["0", str(size // 2), str(size - 1)])
        ax.set_ylim(size - 0.5, -0.5)
        ax.set_title(f"layer {layer}")
    figure.suptitle(f"{model.name}: mean of heads and prompts")
    figure.colorbar(np.atleast_1d(axes)[-1].images[0], ax=axes, label="attention (share)", extend="max")
    figure.supxlabel(f"▼ hidden sink, larger where in more heads and prompts; n = {len(prompts)}",
                     fontsize=6, color=GRAY)
    out.figure("maps", figure, of=model.name)


def _counts(model: Any, found: Result, length: int, out: Output) -> None:
    figure, ax = canvas(1, 1)
    looks = {("relative", "early"): (BLUE, "above 5/N, first half"),
             ("relative", "all"): (GRAY, "above 5/N, all keys"),
             ("fixed", "early"): (VERMILION, "above 0.1, first half"),
             ("fixed", "all"): (SKY, "above 0.1, all keys")}
    layers = np.arange(model.n_layers)
    for i, ((rule, where), (hue, label)) in enumerate(looks.items()):
        values = found["count"].sel(rule=rule, range=where).mean(("prompt", "head"))
        if model.n_layers <= 8:
            bars = ax.bar(layers + 0.2 * (i - 1.5), values, 0.18, color=hue, label=label)
            ax.bar_label(bars, fmt="%.2g", fontsize=5, rotation=90, padding=2)
        else:
            ax.plot(layers, values, color=hue, label=label, marker=".")
    ax.set_xticks(layers if model.n_layers <= 12 else layers[:: max(1, model.n_layers // 8)])
    ax.set_xlabel("layer")
    ax.set_ylabel("hidden sinks per head and prompt")
    ax.set_ylim(0, 1.7 * ax.get_ylim()[1])
    ax.legend()
    ax.set_title(f"{model.name}, {length} tokens")
    out.figure("counts", figure, of=model.name)


def _accuracy(model: Any, settings: Settings, out: Output) -> None:
    try:
        # 40 short documents instead of 20: as hard for `reader`, and fewer tokens.
        search, test = (tasks.qa(
            model, settings.rng(2, which), count, documents=settings.pick(32, tiny=4),
            words=settings.pick(12, tiny=10))
            for which, count in enumerate(settings.pick((20, 50), tiny=(6, 6))))
    except PromptError as error:
        _skip(out, model, str(error), "accuracy")
        out.no_figure("heads", str(error), of=model.name)
        return
    out.record(prompts=search.prompts, name=f"search-{model.name}")
    out.record(prompts=test.prompts, name=f"items-{model.name}")
    found = calibration.measure(model, search.prompts)
    layers = calibration.scope(model.n_layers) if model.n_layers >= 8 else range(model.n_layers)
    most = settings.pick(16, tiny=6)
    tried = calibration.candidates(found, layers)[:most]
    if not tried:
        reason = "no head has a hidden sink in these prompts"
        _skip(out, model, reason, "accuracy")
        out.no_figure("heads", reason, of=model.name)
        return
    metrics = [AnswerAccuracy(search.answers), AnswerLogProb(search.answers)]
    writes = [(), *(calibration.interventions(found, [head]) for head in tried)]
    rows = evaluate(model, search.prompts, metrics, writes)
    gain = {name: rows[name][1:].mean(1) - rows[name][0].mean() for name in rows}
    change = np.full((model.n_layers, model.n_heads), np.nan)
    for head, value in zip(tried, gain["log_prob"]):
        change[head.layer, head.head] = value
    right = change.copy()
    for head, value in zip(tried, gain["accuracy"]):
        right[head.layer, head.head] = value
    grid = ("layer", "head")
    out.save(f"search-{model.name}", Result(xr.Dataset(
        {"log_prob": (grid, change), "accuracy": (grid, right)}), model.manifest()))
    chosen = _chosen(tried, gain)
    figure, ax = canvas(1, 1)
    head_grid.draw(ax, change, label="change of log probability (nats)", mark=chosen,
                   hatched="not tried", signed=True)
    ax.set_title(f"{model.name}, {len(search)} items")
    if chosen:
        note(ax, "outlined: chosen for the test")
    out.figure("heads", figure, of=model.name)
    _held_out(model, test, chosen, tried, gain, settings, out)


def _chosen(tried: list[Head], gain: dict[str, np.ndarray]) -> list[Head]:
    """Heads whose calibration raises accuracy on the search items; if none does, the half of the
    heads with the best change of log probability, at most five, of those that raise it."""
    better = [head for head, value in zip(tried, gain["accuracy"]) if value > 0]
    if better:
        return better
    order = np.argsort(-gain["log_prob"], kind="stable")[: min(5, -(-len(tried) // 2))]
    return [tried[i] for i in order if gain["log_prob"][i] > 0]


def _held_out(
    model: Any, test: tasks.Task, chosen: list[Head], tried: list[Head],
    gain: dict[str, np.ndarray], settings: Settings, out: Output
) -> None:
    if not chosen:
        _skip(out, model, f"calibrating any of the {len(tried)} heads with hidden sinks lowers the "
              "answers' probability on the search items", "accuracy")
        return
    for matched in (True, False):
        try:
            drawn = [random_heads(chosen, model.n_layers, model.n_heads, seed=settings.seed + s,
                                  layer_matched=matched) for s in range(SEEDS)]
            break
        except OutOfRange:
            drawn = []
    if not drawn:
        _skip(out, model, f"{len(chosen)} of {model.n_layers * model.n_heads} heads were chosen: "
              "too few are left for a control", "accuracy")
        return
    found = calibration.measure(model, test.prompts)
    metrics = [AnswerAccuracy(test.answers), AnswerLogProb(test.answers)]
    rows = evaluate(model, test.prompts, metrics, [
        (), calibration.interventions(found, chosen),
        *(calibration.interventions(found, heads) for heads in drawn)])
    accuracy, log_prob = rows["accuracy"], rows["log_prob"]
    where = "of the same layers" if matched else "of any layer"
    _claim(out, model, "accuracy", statistics.difference(accuracy[1], accuracy[2:].mean(0)),
           null=0.0, causal=True, control=f"{len(chosen)} random heads {where}, {SEEDS} seeds",
           figure="heads", unit="share of answers", details={
               "heads": [str(h) for h in chosen], "task": test.what,
               "raised accuracy on the search items": int((gain["accuracy"] > 0).sum()),
               "accuracy unchanged": float(accuracy[0].mean()),
               "accuracy calibrated": float(accuracy[1].mean()),
               "accuracy, random heads": float(accuracy[2:].mean()),
               "log probability against random (nats)": float(
                   log_prob[1].mean() - log_prob[2:].mean()),
               "paper's number of items": "100 or more per set"})
