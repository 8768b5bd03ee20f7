"""What does BERT look at (arXiv:1906.04341), on a real encoder and on causal models.

Offsets, delimiters and entropy of every head, whether attention to delimiters is a no-op, and which
heads attend alike. Claims on syntax and coreference need annotated text and are said to.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Optional

import numpy as np
import xarray as xr
from matplotlib.axes import Axes
from matplotlib.colors import BoundaryNorm
from matplotlib.patches import Patch

from experiments import _passages, _sink_subjects
from experiments._output import Output
from experiments._paper import Paper, Settings, opened
from interp.core import Claim, Prompt, PromptError, SiteRefused, statistics
from interp.figures.style import CYCLE, GRAY, PAGE, canvas, color, note
from interp.heads import head_clusters, linguistic, no_op
from interp.heads.linguistic import GROUPS
from interp.models.model import Model

PAPER = Paper(
    "bert_attention",
    "What Does BERT Look At? An Analysis of BERT's Attention",
    ("1906.04341",),
    "Which heads look at fixed offsets, at delimiters, or everywhere, and is that a no-op?",
    figures={
        "examples": "Attention of four heads on the beginning of one text; the stronger the line, "
        "the larger the weight; full color at the median of the rows' largest (figure 1 of the paper).",
        "behavior": "Mean attention of every head (dots) and layer (lines): at offsets -1, 0 and 1, "
        "on delimiters, and from separators against from other tokens (figure 2). Dotted: uniform.",
        "gradient": "Mean size of the derivative of the loss by attention weights, per group of "
        "attended tokens (figure 3).",
        "entropy": "Entropy of the rows, all queries and the start token's alone (figure 4). Dotted: "
        "uniform attention.",
        "knockout": "Added loss when a group of tokens is hidden from all others in the later layers "
        "(color), against as many tokens of no group (gray), with 95 % bootstrap intervals.",
        "clusters": "Jensen-Shannon divergences between heads, scaled to the plane (figure 6): by "
        "behavior, by layer.",
    },
    models=("all-minilm-l6-v2", "reader"),
)
(SOURCE,) = PAPER.sources
OWN = "measured by this toolkit, after arXiv:1906.04341"
MIDDLE = (5 / 12, 10 / 12)
"""Layers 6 to 10 of 12, as shares of the depth."""
LATER = 1 / 3
"""Layers 5 to 12 of 12."""
NAMES = {"start": "the start token", "separator": "separators", "punctuation": "punctuation"}
TREEBANK = "a treebank with labeled dependencies is needed, and none comes with this package"
ANNOTATED = (
    ("Single heads find single relations: determiners, objects, possessives.", TREEBANK,
     "det 94.3 (8-11), dobj 86.8 (8-10), pobj 76.3 (9-6)"),
    ("A single head finds antecedents of pronouns and names.",
     "text with annotated coreference is needed, and none comes with this package", "65 (5-4)"),
    ("A probe on attention alone recovers syntax.",
     f"{TREEBANK}; the probing classifiers themselves belong to the package `probes`",
     "UAS 61, with GloVe 77"),
)
LABELS = {"": GRAY, "next": CYCLE[5], "previous": CYCLE[0], "broad": CYCLE[4],
          "start": color("primary"), "separator": CYCLE[3], "punctuation": CYCLE[2]}


@dataclass
class Subject:
    """A model with the texts it is run on; `aim` is None with the reason why."""

    model: Model
    prompts: list[Prompt]
    groups: list[dict[str, tuple[int, ...]]]
    aim: Optional[no_op.Objective]
    aim_groups: list[dict[str, tuple[int, ...]]]
    reason: str = ""
    resamples: int = statistics.RESAMPLES

    def mean(self, values: Any) -> statistics.Estimate:
        return statistics.mean(values, resamples=self.resamples)

    def difference(self, treated: Any, control: Any) -> statistics.Estimate:
        return statistics.difference(treated, control, resamples=self.resamples)


def run(settings: Settings, out: Output) -> None:
    def absent(name: str, reason: str) -> None:
        for figure in PAPER.figures:
            out.no_figure(figure, reason, of=name)
        out.claim(Claim.untestable("Heads look at delimiters.", SOURCE, reason), name)

    for model in opened(PAPER, settings, absent):
        one = subject(model, settings)
        one.resamples = settings.pick(statistics.RESAMPLES, tiny=1000)
        out.record(model, one.prompts, name=f"texts-{model.name}")
        found = linguistic.measure(model, one.prompts, groups=one.groups)
        out.save(f"heads-{model.name}", found)
        _offsets(one, found, settings, out)
        _delimiters(one, found, out)
        _entropy(one, found, out)
        _no_op(one, found, settings, out)
        labels = _labels(found)
        _clusters(one, labels, settings, out)
        _examples(one, found, out)
    for sentence, reason, number in ANNOTATED:
        out.claim(Claim.untestable(sentence, SOURCE, reason, paper_number=number,
                                   paper_tag="secondary"))


def subject(model: Model, settings: Settings) -> Subject:
    """Documents for the reader, passages for models that read English, else other texts."""
    count = settings.pick(20, tiny=6)
    longest = min(settings.pick(128, tiny=48), model.max_positions or 128)
    halves: tuple[list[Prompt], list[Prompt]] = ([], [])
    if _sink_subjects.is_reader(model):
        prompts = list(_sink_subjects.documents(settings, count, longest))
    elif _passages.readable(model):
        prompts, *both = _passages.pairs(model, count, longest)
        halves = both[0], both[1]
    else:
        prompts, _ = _passages.other_texts(model, count, min(longest, 64), settings.rng(4))
    groups = [linguistic.delimiters(model, p) for p in prompts]
    headless = model.kind == "encoder" and not model.run(prompts[0], logits="last").logits
    try:
        if headless:
            aim = no_op.objective(model, *halves) if halves[0] else no_op.objective(model, prompts)
        else:
            aim = no_op.objective(model, prompts, fixed=groups, seed=settings.seed)
    except PromptError as error:
        return Subject(model, prompts, groups, None, [], str(error).rstrip("."))
    own = [linguistic.delimiters(model, p) for p in halves[0]] if headless else groups
    return Subject(model, prompts, groups, aim, own)


def _layers(n_layers: int, low: float, high: float = 1.0) -> list[int]:
    """Blocks whose middles lie in this part of the depth, at least one."""
    depth = (np.arange(n_layers) + 0.5) / n_layers
    found = np.flatnonzero((depth >= low - 1e-9) & (depth <= high + 1e-9))
    return found.tolist() or [int(np.abs(depth - (low + high) / 2).argmin())]


# -- offsets ------------------------------------------------------------------------------------


def _offsets(one: Subject, found: Any, settings: Settings, out: Output) -> None:
    model, values = one.model, found["offset_mass"]
    strong = []
    for name, offset, number in (
        ("previous", -1, "4 heads put more than half there (layers 2, 4, 7, 8)"),
        ("next", 1, "5 heads put more than half there (layers 1, 2, 2, 3, 6)"),
    ):
        sentence = f"Some heads put more than half of their attention on the {name} token."
        own = values.sel(offset=offset)
        if not bool(own.notnull().any()):
            out.claim(Claim.untestable(
                sentence, SOURCE, f"{model.name} is causal: no head sees the next token",
                paper_number=number, paper_tag="secondary"), model.name)
            continue
        over = own.mean("sample") > 0.5
        strong += [(int(a), int(b)) for a, b in zip(*np.nonzero(over.values))]
        chosen = _other_half(own)
        out.claim(Claim(
            sentence, SOURCE, **one.mean(chosen).for_claim(), null=0.5, figure="behavior",
            paper_number=number, paper_tag="secondary", details={
                "heads above 0.5": [f"L{a}H{b}" for a, b in zip(*np.nonzero(over.values))],
                "uniform": float(found["uniform_offset_mass"].sel(offset=offset).mean()),
                "head": "the best one, chosen on the other half of the texts"}), model.name)
    sentence = "Heads of fixed offsets sit in the first half of the layers."
    if not strong:
        out.claim(Claim.untestable(
            sentence, SOURCE, "no head puts more than half of its attention on a neighbor",
            figure="behavior"), model.name)
        return
    # The depth is a property of the heads, so the heads are what is drawn again: per text, those
    # above one half.
    depth = xr.DataArray((np.arange(model.n_layers) + 0.5) / model.n_layers, dims="layer")
    over = values.sel(offset=[-1, 1]) > 0.5
    mean = (over * depth).sum(("layer", "head", "offset")) / over.sum(("layer", "head", "offset"))
    mean = mean.values[np.isfinite(mean.values)]
    if not len(mean):
        mean = np.array([np.nan])
    estimate = one.mean(mean) if np.isfinite(mean).all() else None
    if estimate is not None:
        out.claim(Claim(
            sentence, SOURCE, **estimate.for_claim(), null=0.5, direction="below",
            unit="relative depth", figure="behavior",
            paper_number="layers 2, 4, 7, 8 and 1, 2, 2, 3, 6 of 12", paper_tag="secondary",
            details={"heads": sorted({f"L{a}H{b}" for a, b in strong})}), model.name)


def _other_half(values: xr.DataArray) -> np.ndarray:
    """Each text's value at the head that is best on the other half of the texts."""
    flat = values.values.reshape(values.sizes["sample"], -1)
    made = np.empty(len(flat))
    halves = np.arange(len(flat)) % 2 == 0
    for half in (halves, ~halves):
        other = flat[~half] if (~half).any() else flat
        made[half] = flat[half, int(np.nanargmax(other.mean(0)))]
    return made


# -- delimiters -----------------------------------------------------------------------------------


def _delimiters(one: Subject, found: Any, out: Output) -> None:
    model, mass, even = one.model, found["mass"].mean("head"), found["uniform_mass"].mean("head")
    middle = _layers(model.n_layers, *MIDDLE)
    where = {"layers": middle}
    if out.wants("behavior"):
        out.figure("behavior", _behavior_figure(model, found), of=model.name)
    sentences = {
        "half": "In the middle layers more than half of all attention goes to separators.",
        "lift": "In the middle layers separators get more attention than their share of the tokens.",
        "self": "Separators attend to separators, with more than nine tenths of their attention.",
    }
    numbers = {"half": "over half, layers 6 to 10", "lift": "over half; a share of 1 in 64 tokens",
               "self": "over 90 %"}
    there = found["mass"].sel(segment="separator").notnull().any(("layer", "head"))
    if not bool(there.any()):
        for key, sentence in sentences.items():
            out.claim(Claim.untestable(sentence, SOURCE, "no text has a separator",
                                       paper_number=numbers[key], paper_tag="secondary"), model.name)
    else:
        kept = {"sample": np.flatnonzero(there.values)}
        own = mass.sel(segment="separator").isel(layer=middle, **kept).mean("layer").values
        share = even.sel(segment="separator").isel(layer=middle, **kept).mean("layer").values
        details = {**where, "share of visible tokens": float(share.mean()),
                   "by layer": _listed(mass.sel(segment="separator").mean("sample"))}
        self_mass = found["separator_to_separator"].mean("head").isel(layer=middle, **kept)
        for key, estimate, null in (
            ("half", one.mean(own), 0.5),
            ("lift", one.difference(own, share), 0.0),
            ("self", one.mean(self_mass.mean("layer").values), 0.9),
        ):
            out.claim(Claim(
                sentences[key], SOURCE, **estimate.for_claim(), null=null, figure="behavior",
                paper_number=numbers[key], paper_tag="secondary", details=details,
                control="uniform attention in the same masks" if key == "lift" else ""), model.name)
    start = mass.sel(segment="start")
    if bool(start.notnull().any()):
        share = even.sel(segment="start").isel(layer=middle).mean("layer")
        own = start.isel(layer=middle).mean("layer")
        out.claim(Claim(
            "In the middle layers the start token, not a separator, is the sink: it gets more "
            "attention than separators.", OWN,
            **one.difference(own.values, mass.sel(segment="separator").isel(
                layer=middle).mean("layer").fillna(0.0).values).for_claim(),
            null=0.0, figure="behavior", details={
                **where, "on the start token": float(own.mean()), "uniform": float(share.mean()),
                "by layer": _listed(start.mean("sample"))}), model.name)


def _listed(values: xr.DataArray) -> list[float]:
    return [round(float(x), 4) for x in values.values]


def _behavior_figure(model: Model, found: Any) -> Any:
    figure, axes = canvas(3, 1, height=5.6, sharex=True)
    mean = found.data.mean("sample")
    offsets = {"previous": -1, "self": 0, "next": 1}
    _scatter(axes[0], {name: mean["offset_mass"].sel(offset=o) for name, o in offsets.items()},
             {name: CYCLE[i] for i, name in enumerate(offsets)}, mean["uniform_offset_mass"].sel(
                 offset=-1).mean("head"))
    _scatter(axes[1], {NAMES[g]: mean["mass"].sel(segment=g) for g in GROUPS},
             {NAMES[g]: LABELS[g] for g in GROUPS}, None)
    for group in GROUPS:
        even = mean["uniform_mass"].sel(segment=group).mean("head")
        axes[1].plot(even["layer"], even, ":", color=LABELS[group], linewidth=0.8)
    _scatter(axes[2], {"separator to separator": mean["separator_to_separator"],
                       "other to separator": mean["other_to_separator"]},
             {"separator to separator": LABELS["separator"], "other to separator": GRAY}, None)
    for ax in axes:
        ax.set_ylabel("mean attention")
        ax.set_ylim(0, None)
    axes[2].set_xlabel("layer")
    axes[0].set_title(model.name)
    return figure


def _scatter(
    ax: Axes, curves: Mapping[str, xr.DataArray], colors: Mapping[str, str],
    even: Optional[xr.DataArray],
) -> None:
    drawn = {name: v for name, v in curves.items() if bool(v.notnull().any())}
    for i, (name, values) in enumerate(drawn.items()):
        layers = values["layer"].values
        x = np.repeat(layers + 0.12 * (i - (len(drawn) - 1) / 2), values.sizes["head"])
        ax.plot(x, values.transpose("layer", "head").values.ravel(), "o", color=colors[name],
                markersize=2.2, alpha=0.5, markeredgewidth=0)
        ax.plot(layers, values.mean("head"), color=colors[name], label=name)
    if even is not None:
        ax.plot(even["layer"], even, ":", color=GRAY, linewidth=0.8)
    ax.set_xticks(np.unique(next(iter(curves.values()))["layer"].values)[:: max(
        1, next(iter(curves.values())).sizes["layer"] // 12)])
    ax.grid(True, axis="y")
    if drawn:
        ax.legend(ncols=1)
    else:
        ax.text(0.5, 0.5, "no such token in the texts", transform=ax.transAxes, ha="center",
                color=GRAY)


# -- entropy ----------------------------------------------------------------------------------------


def _entropy(one: Subject, found: Any, out: Output) -> None:
    model, encoder = one.model, one.model.kind == "encoder"
    panels = ("entropy", "start_entropy") if encoder else ("entropy",)
    if out.wants("entropy"):
        figure, axes = canvas(1, len(panels), width=PAGE if encoder else 4.2, height=2.5,
                              sharey=True, squeeze=False)
        titles = {"entropy": "all queries", "start_entropy": "the start token's query"}
        for ax, name in zip(axes[0], panels):
            mean = found[name].mean("sample")
            even = found[f"uniform_{name}"].mean(("sample", "head"))
            _scatter(ax, {titles[name]: mean}, {titles[name]: CYCLE[0]}, even)
            ax.get_legend().remove()
            ax.set_title(f"{model.name}: {titles[name]}")
            ax.set_xlabel("layer")
            ax.set_ylim(0, None)
        axes[0, 0].set_ylabel("entropy (nats)")
        out.figure("entropy", figure, of=model.name)
    share = (found["entropy"] / found["uniform_entropy"]).mean("head")
    layers = np.arange(model.n_layers)
    sentence = "Heads are broad in the first layers and grow narrower with depth."
    if model.n_layers < 3:
        out.claim(Claim.untestable(sentence, SOURCE, f"{model.name} has {model.n_layers} layers, "
                                   "and a slope needs three"), model.name)
    else:
        slope = [np.polyfit(layers / (model.n_layers - 1), row, 1)[0] for row in
                 share.transpose("sample", "layer").values]
        out.claim(Claim(
            sentence, SOURCE, **one.mean(slope).for_claim(), null=0.0, direction="below",
            figure="entropy", unit="entropy / uniform entropy, from the first to the last layer",
            details={"by layer": _listed(share.mean("sample"))}), model.name)
    sentence = "In the last layer the start token attends broadly, unlike before."
    if not encoder or model.n_layers < 2:
        reason = "under a causal mask the start token sees itself alone" if not encoder \
            else f"{model.name} has one layer"
        out.claim(Claim.untestable(sentence, SOURCE, reason, paper_number="3.89 nats",
                                   paper_tag="secondary"), model.name)
        return
    rows = found["start_entropy"].mean("head").transpose("sample", "layer").values
    out.claim(Claim(
        sentence, SOURCE, **one.difference(rows[:, -1], rows[:, :-1].mean(1)).for_claim(),
        null=0.0, unit="nats, last layer minus the mean of the others", figure="entropy",
        paper_number="3.89 nats in the last layer", paper_tag="secondary", details={
            "last layer": float(rows[:, -1].mean()),
            "uniform": float(found["uniform_start_entropy"].mean()),
            "by layer": np.round(rows.mean(0), 3).tolist()}), model.name)


# -- is it a no-op? -----------------------------------------------------------------------------------


def _no_op(one: Subject, found: Any, settings: Settings, out: Output) -> None:
    model, later = one.model, _layers(one.model.n_layers, LATER)
    gradient = "From layer {} on the loss depends less on attention to {} than to other tokens."
    hiding = "From layer {} on hiding {} causes less damage than hiding as many other tokens."
    mass = found["mass"].mean(("sample", "head")).isel(layer=later).mean("layer")
    groups = [g for g in ("separator", "start") if bool(mass.sel(segment=g).notnull())]
    reason = one.reason or ("" if groups else "no text has a delimiter")
    grown = None
    if not reason and one.aim is not None:
        try:
            grown = no_op.measure(model, one.aim, one.aim_groups)
        except SiteRefused as error:
            reason = str(error).rstrip(".")
    if grown is None or one.aim is None:
        for sentence in (gradient, hiding):
            out.claim(Claim.untestable(sentence.format(later[0], "separators"), SOURCE, reason),
                      model.name)
        for figure in ("gradient", "knockout"):
            out.no_figure(figure, reason, of=model.name)
        return
    out.save(f"gradient-{model.name}", grown)
    if out.wants("gradient"):
        figure, ax = canvas(1, 1)
        no_op.draw(grown, ax)
        for line in ax.lines:
            name = line.get_label()
            if name in LABELS:
                line.set_color(LABELS[name])
        for name, band in zip([line.get_label() for line in ax.lines], ax.collections):
            if name in LABELS:
                band.set_color(LABELS[name])
        ax.set_ylim(0, 1.4 * ax.get_ylim()[1])  # room for the legend
        ax.legend(loc="upper right", ncols=2)
        ax.set_title(f"{model.name}, {one.aim.kind} loss")
        out.figure("gradient", figure, of=model.name)
    drops = {}
    for group in groups:
        size = grown["gradient"].mean("head").isel(layer=later).mean("layer")
        own, other = size.sel(segment=group).values, size.sel(segment=no_op.OTHER).values
        known = np.isfinite(own) & np.isfinite(other) & (own > 0) & (other > 0)
        source = SOURCE if group == "separator" else OWN
        name = NAMES[group]
        sentence = gradient.format(later[0], name)
        if known.any():
            out.claim(Claim(
                sentence, source, **one.mean(np.log(own / other)[known]).for_claim(),
                null=0.0, direction="below", figure="gradient",
                unit="log of mean |dL/dA| on them over that on other tokens", control="other tokens",
                paper_number="close to 0 from layer 5 on" if group == "separator" else "",
                paper_tag="secondary", details={
                    "layers": later, "loss": one.aim.kind, "attention": float(mass.sel(segment=group)),
                    "ratio by layer": _listed(grown["gradient"].sel(segment=group).mean(
                        ("sample", "head")) / grown["gradient"].sel(segment=no_op.OTHER).mean(
                            ("sample", "head")))}), model.name)
        else:
            out.claim(Claim.untestable(sentence, source, "no derivative is above zero"), model.name)
        try:
            done = no_op.intervene(model, one.aim, one.aim_groups, group=group, layers=later,
                                   seed=settings.seed)
        except PromptError as error:
            out.claim(Claim.untestable(hiding.format(later[0], name), source,
                                       str(error).rstrip(".")), model.name)
            continue
        out.save(f"hiding-{group}-{model.name}", done)
        added = (done["loss"] - done["baseline"]).values
        control = (done["control"] - done["baseline"]).mean("seed").values
        drops[group] = added, control
        out.claim(Claim(
            hiding.format(later[0], name), source, causal=True, figure="knockout",
            **one.difference(added, control).for_claim(), null=0.0, direction="below",
            unit="nats", control="as many random tokens of no group, 5 seeds", details={
                "layers": later, "loss": one.aim.kind, "baseline": float(done["baseline"].mean()),
                "added": float(added.mean()), "added by the control": float(control.mean())}),
            model.name)
    if not drops:
        out.no_figure("knockout", "no text has delimiters and as many other tokens", of=model.name)
    elif out.wants("knockout"):
        out.figure("knockout", _knockout_figure(one, one.aim.kind, later, drops), of=model.name)


def _knockout_figure(
    one: Subject, kind: str, later: Sequence[int], drops: Mapping[str, tuple[Any, Any]]
) -> Any:
    figure, ax = canvas(1, 1)
    for i, (group, both) in enumerate(drops.items()):
        for shift, values, hue in ((-0.17, both[0], LABELS[group]), (0.17, both[1], GRAY)):
            made = one.mean(values)
            ax.bar(i + shift, made.value, 0.3, color=hue)
            low, high = made.interval
            if np.isfinite(low):
                ax.plot([i + shift] * 2, [low, high], color="black", linewidth=0.9)
            said, top = round(made.value, 3) + 0.0, np.nanmax([high, made.value, 0])  # no "-0.000"
            ax.annotate(f"{said:.3f}", (i + shift, top), (0, 2), textcoords="offset points",
                        ha="center", fontsize=6)
    ax.axhline(0, color="black", linewidth=0.7)
    ax.set_xticks(range(len(drops)), [NAMES[g] for g in drops])
    ax.set_ylabel(f"added {kind} loss (nats)")
    ax.set_title(f"{one.model.name}, layers {later[0]} to {later[-1]}")
    ax.set_ylim(None, 1.55 * ax.get_ylim()[1])  # room for the legend
    looks = {**{f"{NAMES[g]} hidden": LABELS[g] for g in drops}, "as many others hidden": GRAY}
    ax.legend(handles=[Patch(color=hue, label=name) for name, hue in looks.items()])
    note(ax, f"mean, 95 % bootstrap interval, n = {len(next(iter(drops.values()))[0])}")
    return figure


# -- clusters -------------------------------------------------------------------------------------------


def _labels(found: Any) -> np.ndarray:
    mean = found.data.mean("sample")
    # 3.8 nats are for segments of 128 tokens, whose uniform entropy is ln 128.
    broad = 3.8 * float(found["uniform_entropy"].mean()) / np.log(128)
    values = {"next": mean["offset_mass"].sel(offset=1).values,
              "previous": mean["offset_mass"].sel(offset=-1).values,
              "broad": mean["entropy"].values,
              **{g: mean["mass"].sel(segment=g).values for g in GROUPS}}
    return linguistic.labels(values, broad=broad)


def _clusters(one: Subject, labels: np.ndarray, settings: Settings, out: Output) -> None:
    model, sentence = one.model, "Heads of one layer attend alike."
    if model.n_layers < 2 or model.n_heads < 2:
        reason = f"{model.name} has {model.n_layers} layers of {model.n_heads} heads; two of two " \
            "are needed"
        out.claim(Claim.untestable(sentence, SOURCE, reason), model.name)
        out.no_figure("clusters", reason, of=model.name)
        return
    # The number of pairs grows with the square of the heads.
    few = model.n_layers * model.n_heads > 256
    found = head_clusters.measure(model, one.prompts[:8] if few else one.prompts,
                                  max_rows=8 if few else settings.pick(32, tiny=12),
                                  seed=settings.seed)
    out.save(f"clusters-{model.name}", found)
    gap, p, chance = head_clusters.layer_gap(found["divergence"].values, model.n_heads,
                                             seed=settings.seed)
    estimate = one.difference(found["between"].values, found["within"].values)
    out.claim(Claim(
        sentence, SOURCE, **estimate.for_claim(), null=max(0.0, chance), figure="clusters",
        unit="nats of divergence, between minus within layers",
        control="heads that change places, 95th percentile of 1000", details={
            "permutation p": p, "within": float(found["within"].mean()),
            "between": float(found["between"].mean()), "of ln 2": gap / float(np.log(2)),
            "labels": {str(name or "none"): int((labels == name).sum())
                       for name in np.unique(labels)}}), model.name)
    if not out.wants("clusters"):
        return
    points = head_clusters.mds(found["divergence"].values, seed=settings.seed)
    figure, (left, right) = canvas(1, 2, width=PAGE, height=3.1)
    flat = labels.ravel()
    for name, hue in LABELS.items():
        mine = points[flat == name]
        if len(mine):
            left.plot(*mine.T, "o" if name else ".", color=hue, label=name or "none",
                      markersize=4.5 if name else 4, alpha=0.85)
    left.legend(title="behavior")
    left.set_title(f"{model.name}: by behavior")
    layer = np.repeat(np.arange(model.n_layers), model.n_heads)
    steps = BoundaryNorm(np.arange(model.n_layers + 1) - 0.5, 256)
    shown = right.scatter(*points.T, c=layer, cmap="viridis", norm=steps, s=14)
    figure.colorbar(shown, ax=right, label="layer", ticks=np.unique(layer)[:: max(
        1, model.n_layers // 8)]).minorticks_off()
    right.set_title("by layer")
    note(right, "multidimensional scaling of mean divergences (nats)")
    for ax in (left, right):
        ax.set_xlabel("first coordinate")
        ax.set_ylabel("second coordinate")
        ax.set_xticks([])
        ax.set_yticks([])
        ax.set_aspect("equal", "datalim")
        for spine in ax.spines.values():
            spine.set_visible(True)
    out.figure("clusters", figure, of=model.name)


# -- examples -------------------------------------------------------------------------------------------


def _examples(one: Subject, found: Any, out: Output, words: int = 18) -> None:
    """Attention as lines from the attending (left) to the attended (right) tokens."""
    if not out.wants("examples"):
        return
    model, prompt = one.model, one.prompts[0]
    best: dict[str, Any] = {}
    words = min(words, len(prompt))
    there = {group for group in GROUPS if min(one.groups[0][group], default=words) < words}
    for behavior in ("previous", "next", "start", "separator", "punctuation", "broad"):
        if behavior in GROUPS and behavior not in there:
            continue
        (head,) = linguistic.scores(found, behavior).top(1) or (None,)
        if head is not None and head not in best.values():
            best[behavior] = head
    best = dict(list(best.items())[:4])
    maps = model.run(prompt, read="pattern", logits="none").reads["pattern"].isel(prompt=0)
    names = prompt.tokens or [
        model.tokenizer.convert_ids_to_tokens([i])[0] if model.tokenizer is not None else str(i)
        for i in prompt.ids]
    figure, axes = canvas(1, len(best), width=PAGE, height=0.17 * words + 0.9, squeeze=False)
    for ax, (behavior, head) in zip(axes[0], best.items()):
        rows = maps.sel(layer=head.layer).isel(head=head.head).values[:words, :words]
        full = float(np.median(rows.max(1)))
        for query, key in zip(*np.nonzero(rows > 0.01)):
            ax.plot([0, 1], [query, key], color=LABELS[behavior], linewidth=1.1,
                    alpha=float(np.clip(rows[query, key] / full, 0, 1)))
        for i in range(words):
            for x, side in ((-0.04, "right"), (1.04, "left")):
                ax.text(x, i, str(names[i])[:11], ha=side, va="center", fontsize=5.5,
                        parse_math=False)
        ax.set_xlim(-0.75, 1.75)
        ax.set_ylim(words - 0.4, -0.8)
        ax.axis("off")
        ax.set_title(f"{head}: {behavior}\nfull color: {full:.2f}", loc="center")
    figure.suptitle(f"{model.name}: attention from each token (left) to tokens (right)")
    out.figure("examples", figure, of=model.name)
