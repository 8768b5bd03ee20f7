"""The preplan-and-anchor rhythm (arXiv:2510.13554): near heads, far heads, and what is reread.

Local heads look back farther where a chunk begins (WAAD), global heads return to some tokens later
(FAI). Every coupling of two curves is compared with the same curves shifted against each other.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Optional

import numpy as np
import torch
import xarray as xr
from matplotlib.ticker import MaxNLocator
from scipy import stats

import interp
from experiments import _passages, _sink_subjects
from experiments._output import Output
from experiments._paper import Paper, Settings, opened
from interp.core import Claim, Prompt, PromptError, statistics
from interp.figures import heat
from interp.figures.style import CYCLE, GRAY, PAGE, canvas, color, note
from interp.heads import local_global, preplan_anchor
from interp.heads.preplan_anchor import PEAKS, WINDOW, change, peaks
from interp.models.model import Model

PAPER = Paper(
    "preplan_anchor",
    "Attention Illuminates LLM Reasoning: The Preplan-and-Anchor Rhythm",
    ("2510.13554",),
    "Where do local heads jump back, which tokens do global heads reread, and do those matter?",
    figures={
        "spans": "Span of every head without the first tokens, with the cuts between local, other "
        "and global heads; gray: heads that park their attention on the first tokens.",
        "maps": "Mean attention of the local and of the global heads on the beginning of one text.",
        "signals": "WAAD (how far local heads look back, within a window), FAI (attention a token "
        "receives later) of the receiver and of the global heads, over that of uniform attention, and "
        "the entropy of the prediction along one text; dots: the top 40 %.",
        "lags": "Share of anchors with a preplan token so many tokens before them; gray: curves "
        "shifted against each other.",
        "jaccard": "Overlap of greedy continuations with and without one changed token: where FAI (the "
        "attention received later) is highest, lowest, at random, and at other tokens as hard to "
        "predict as the anchors.",
    },
    models=("reader",),
)
(SOURCE,) = PAPER.sources
OWN = "measured by this toolkit, after arXiv:2510.13554"
MATTER = "Changing a token that is reread (high FAI) causes more change in what follows than " \
    "changing one that is not (low FAI)."
MATCHED = "Changing a token that is reread causes more change in what follows than changing " \
    "another token that is as hard to predict."
UNCERTAIN = "Tokens at which the local heads look back far (WAAD peaks) are hard to predict."
RECEIVER = "Receiver heads and global heads return to the same tokens."
FOLLOWS = "Anchors come right after preplan tokens."
PARKED = "The heads with the longest spans are those that park on the first tokens."
TESTED = (MATTER, MATCHED, UNCERTAIN, RECEIVER, FOLLOWS, PARKED)
NUMBERS = {
    MATTER: "Jaccard .534 against .631, lower in 87.14 %", UNCERTAIN: ".3608 against .2386 nats",
    RECEIVER: "60.84 % against 22.41 %", FOLLOWS: "52.53 % against 36.87 %",
}
"""Of the card's table, for which the text of the paper was not at hand: labeled second-hand."""


@dataclass
class Subject:
    """A model, its texts, and how they came about."""

    model: Model
    prompts: list[Prompt]
    texts: str


def run(settings: Settings, out: Output) -> None:
    def absent(name: str, reason: str) -> None:
        _nothing(out, name, reason)

    for model in opened(PAPER, settings, absent):
        if model.kind != "decoder":
            out.record(model)
            _nothing(out, model.name, f"{model.name} is an encoder: its heads look ahead as well, and "
                     "nothing is later")
            continue
        one = subject(model, settings)
        out.record(model, one.prompts, name=f"texts-{model.name}")
        try:
            found = local_global.measure(model, one.prompts)
        except PromptError as error:
            _nothing(out, model.name, str(error).rstrip("."))
            continue
        found.manifest["texts"] = one.texts
        # Attention on a token thins out as a text grows: raw FAI falls from the first token on, and
        # two curves with one trend agree whatever they mean. Beside uniform attention it does not.
        for name in ("fai", "fai_receiver"):
            found.data[f"{name}_lift"] = found[name] / found[f"{name}_uniform"]
        out.save(f"heads-{model.name}", found)
        if "note" in found.manifest:
            _nothing(out, model.name, found.manifest["note"])
            continue
        _spans(one, found, settings, out)
        _maps(one, found, out)
        _signals(one, found, out)
        _couplings(one, found, settings, out)
        _changes(one, found, settings, out)
    out.claim(Claim.untestable(
        "Rewarding preplan and anchor tokens improves reinforcement learning.", SOURCE,
        "it compares models trained by reinforcement learning under different rewards",
        paper_number="Countdown 52.6 to 63.1", paper_tag="secondary"))


def _nothing(out: Output, name: str, reason: str) -> None:
    for figure in PAPER.figures:
        out.no_figure(figure, reason, of=name)
    for sentence in TESTED:
        out.claim(Claim.untestable(sentence, OWN if sentence in (MATCHED, PARKED) else SOURCE, reason,
                                   paper_number=NUMBERS.get(sentence, ""), paper_tag="secondary"),
                  name)


def subject(model: Model, settings: Settings) -> Subject:
    """Documents for the reader; else the model's own continuations of passages, or other texts.

    Greedy text of the reader would run in circles: its language is a Markov chain.
    """
    count, length = settings.pick((20, 256), tiny=(6, 96))
    length = min(length, model.max_positions or length)
    if _sink_subjects.is_reader(model):
        return Subject(model, list(_sink_subjects.documents(settings, count, length)),
                       "documents of the reader's language")
    if not _passages.readable(model):
        return Subject(model, *_passages.other_texts(model, count, length, settings.rng(5)))
    _, starts, _ = _passages.pairs(model, count, longest=length // 2)
    made = model.run(starts, new_tokens=length // 2, logits="last").new_tokens
    return Subject(model, [
        Prompt.from_tokens([*p.ids, *new], {"generated": (len(p), len(p) + len(new))})
        for p, new in zip(starts, made)], "greedy continuations of passages")


# -- heads -------------------------------------------------------------------------------------


def _spans(one: Subject, found: Any, settings: Settings, out: Output) -> None:
    data, name = found.data, one.model.name
    score, parked = data["score"].values, data["sink_mass"].mean("sample").values > float(
        found.manifest["max_sink_mass"])
    if out.wants("spans"):
        figure, ax = canvas(1, 1)
        known = score[np.isfinite(score)]
        bins = np.linspace(0, known.max() * 1.02, 24).tolist()
        parts = {"local": (data["local"].values, CYCLE[0]), "global": (data["global"].values, CYCLE[1]),
                 "parked": (parked, GRAY)}
        rest = np.isfinite(score) & ~np.any([mask for mask, _ in parts.values()], axis=0)
        parts["other"] = rest, "#C9C9C9"
        ax.hist([score[mask & np.isfinite(score)] for mask, _ in parts.values()], bins=bins,
                stacked=True, color=[hue for _, hue in parts.values()], label=list(parts))
        for label, pick in (("local", np.max), ("global", np.min)):
            if parts[label][0].any():
                ax.axvline(float(pick(score[parts[label][0]])), color=parts[label][1], linestyle="--",
                           linewidth=0.9)
        ax.set_xlabel("span without the first tokens (tokens)")
        ax.set_ylabel("heads")
        ax.yaxis.set_major_locator(MaxNLocator(integer=True))
        ax.set_title(name)
        ax.legend()
        out.figure("spans", figure, of=name)
    span, mass = (data[n].transpose("sample", "layer", "head").values.reshape(
        data.sizes["sample"], -1) for n in ("span", "sink_mass"))
    # What the paper's rule would call global: the longest spans, first tokens included.
    count = max(1, round(float(found.manifest["share"]) * score.size))
    far = np.argsort(np.argsort(-span, axis=1, kind="stable"), axis=1) < count
    if far.all() or not np.isfinite(span).all():
        out.claim(Claim.untestable(PARKED, OWN, f"{name} has too few heads to compare"), name)
        return
    each = np.array([m[f].mean() - m[~f].mean() for m, f in zip(mass, far)])
    out.claim(Claim(
        PARKED, OWN, **_mean(each, settings).for_claim(), null=0.0, figure="spans",
        unit="attention on the first tokens, the longest 30 % of the spans minus the others", details={
            "heads": score.size, "parked": int(parked.sum()),
            "longest span": str(interp.Head(*(int(i) for i in np.unravel_index(
                np.nanargmax(span.mean(0)), score.shape)))),
            "parks": float(mass.mean(0)[np.nanargmax(span.mean(0))])}), name)


def _mean(values: Any, settings: Settings) -> statistics.Estimate:
    return statistics.mean(values, resamples=settings.pick(statistics.RESAMPLES, tiny=1000))


def _maps(one: Subject, found: Any, out: Output, longest: int = 96) -> None:
    if not out.wants("maps"):
        return
    prompt = one.prompts[0]
    short = Prompt(prompt.ids[:longest])
    rows = torch.tensor(one.model.run(short, read="pattern", logits="none")
                        .reads["pattern"].values[0])
    figure, axes = canvas(1, 2, width=PAGE, height=3.0)
    for ax, kind in zip(axes, ("local", "global")):
        mean = rows[torch.tensor(found[kind].values)].mean(0).numpy()
        shown = np.where(np.tri(len(mean), dtype=bool), np.sqrt(mean), np.nan)
        hidden = ~np.isfinite(shown)
        heat.draw(ax, np.where(hidden, 0.0, shown), x="key s", y="query t", upward=False,
                  label="square root of attention", limits=(0, float(np.nanquantile(shown, 0.995))))
        ax.set_title(f"{one.model.name}: {int(found[kind].sum())} {kind} heads")
    out.figure("maps", figure, of=one.model.name)


# -- curves ------------------------------------------------------------------------------------


def _curve(found: Any, name: str, number: int) -> np.ndarray:
    return found[name].isel(sample=number).values.astype(float)


def _signals(one: Subject, found: Any, out: Output) -> None:
    if not out.wants("signals"):
        return
    figure, axes = canvas(4, 1, width=PAGE, height=4.6, sharex=True)
    panels = (("waad", "look-back,\nWAAD (tokens)"),
              ("fai_receiver_lift", "reread, FAI:\nreceiver / uniform"),
              ("fai_lift", "reread, FAI:\nglobal / uniform"), ("entropy", "entropy\n(nats)"))
    for ax, (name, label) in zip(axes, panels):
        values = _curve(found, name, 0)
        top = np.flatnonzero(peaks(values))
        ax.plot(np.arange(len(values)), values, color=CYCLE[0], linewidth=0.9)
        ax.plot(top, values[top], "o", color=CYCLE[1], markersize=2)
        ax.set_ylabel(label)
        if not np.isfinite(values).any():
            ax.text(0.5, 0.5, "no such heads", transform=ax.transAxes, ha="center", color=GRAY)
    axes[-1].set_xlabel("token")
    axes[0].set_title(f"{one.model.name}: {one.texts}")
    out.figure("signals", figure, of=one.model.name)


def _pairs(found: Any, first: str, second: str) -> list[tuple[np.ndarray, np.ndarray]]:
    """Two curves of every text, where both have values; a curve named "delta" is Delta."""
    made = []
    for number in range(found.data.sizes["sample"]):
        a, b = _curve(found, first, number), _curve(found, second, number)
        both = np.flatnonzero(np.isfinite(a) & np.isfinite(b))
        # The window of WAAD is not full before.
        both = both[both >= WINDOW]
        # One stretch: what is shifted must be neighbors.
        both = both[: int(np.argmax(np.append(np.diff(both) > 1, True))) + 1] if len(both) else both
        made.append((a[both], b[both]))
    return made


def _couplings(one: Subject, found: Any, settings: Settings, out: Output) -> None:
    shifts = settings.pick(200, tiny=50)

    def at_peaks(first: np.ndarray, second: np.ndarray) -> float:
        return float(second[peaks(first)].mean())

    def together(first: np.ndarray, second: np.ndarray) -> float:
        top = peaks(second)
        return float(peaks(first)[top].mean())

    def after(lag: int) -> Callable[[np.ndarray, np.ndarray], float]:
        def share(delta: np.ndarray, fai: np.ndarray) -> float:
            preplan, places = peaks(delta), np.flatnonzero(peaks(fai))
            places = places[(places - lag >= 0) & (places - lag < len(delta))]
            return float(preplan[places - lag].mean()) if len(places) else float("nan")
        return share

    for sentence, names, statistic, unit, figure in (
        (UNCERTAIN, ("waad", "entropy"), at_peaks, "nats above shifted curves", "signals"),
        (RECEIVER, ("fai_lift", "fai_receiver_lift"), together,
         "share of receiver peaks, above shifted curves", "signals"),
        (FOLLOWS, ("delta", "fai_lift"), after(1), "share of anchors, above shifted curves", "lags"),
    ):
        made = preplan_anchor.coupling(statistic, _pairs(found, *names), shifts=shifts,
                                       seed=settings.seed)
        if not len(made.observed):
            out.claim(Claim.untestable(sentence, SOURCE, "no text has both curves",
                                       paper_number=NUMBERS[sentence], paper_tag="secondary"),
                      one.model.name)
            continue
        details = {"observed": float(made.observed.mean()), "shifted": float(made.null.mean()),
                   "p": made.p, "lift": float(made.observed.mean() / made.null.mean())
                   if made.null.mean() else None, "texts": one.texts, "shifts": shifts,
                   "peaks": PEAKS}
        if sentence == UNCERTAIN:
            also = preplan_anchor.coupling(statistic, _pairs(found, "delta", "entropy"),
                                           shifts=shifts, seed=settings.seed)
            details["at peaks of delta instead"] = float((also.observed - also.null).mean())
        if sentence != UNCERTAIN:
            raw = preplan_anchor.coupling(
                statistic, _pairs(found, *(n.removesuffix("_lift") for n in names)), shifts=shifts,
                seed=settings.seed)
            details["with raw FAI, trend included"] = float((raw.observed - raw.null).mean())
        if sentence == RECEIVER:
            both = (found["global"] & found["receiver"]).sum()
            details["heads in both sets"] = f"{int(both)} of {int(found['global'].sum())}"
        if sentence == FOLLOWS:
            drops = [(change(a, drop_only=True)[:-1], b[:-1])
                     for a, b in _pairs(found, "waad", "fai_lift") if len(a) > 1]
            also = preplan_anchor.coupling(after(1), drops, shifts=shifts, seed=settings.seed)
            shares = {lag: preplan_anchor.coupling(after(lag), _pairs(found, *names), shifts=1)
                      for lag in range(-5, 6)}
            mean = {lag: round(float(one_lag.observed.mean()), 4) for lag, one_lag in shares.items()
                    if len(one_lag.observed)}
            details["by lag"], details["strongest lag"] = mean, max(mean, key=lambda n: mean[n])
            details["falls of WAAD only"] = float((also.observed - also.null).mean()) \
                if len(also.observed) else None
        out.claim(Claim(
            sentence, SOURCE, **_mean(made.observed - made.null, settings).for_claim(), null=0.0,
            unit=unit, figure=figure, control="curves turned around by a random number of tokens",
            paper_number=NUMBERS[sentence], paper_tag="secondary", details=details), one.model.name)
    if out.wants("lags"):
        _lags(one, found, after, shifts, settings, out)


def _lags(
    one: Subject, found: Any, after: Callable, shifts: int, settings: Settings, out: Output
) -> None:
    lags, pairs = list(range(-5, 8)), _pairs(found, "delta", "fai_lift")
    made = [preplan_anchor.coupling(after(lag), pairs, shifts=max(20, shifts // 8),
                                    seed=settings.seed) for lag in lags]
    figure, ax = canvas(1, 1)
    ax.bar(lags, [m.observed.mean() if len(m.observed) else np.nan for m in made], color=CYCLE[0],
           width=0.75)
    ax.plot(lags, [m.null.mean() if len(m.null) else np.nan for m in made], color=color("control"),
            marker="_", label="shifted")
    ax.set_xlabel("tokens from the preplan token to the anchor")
    ax.set_ylabel("share of anchors")
    ax.set_title(one.model.name)
    ax.legend()
    out.figure("lags", figure, of=one.model.name)


# -- changing tokens -----------------------------------------------------------------------------


def _places(
    found: Any, number: int, count: int, rng: np.random.Generator
) -> Optional[dict[str, list[int]]]:
    """Positions with the highest and lowest FAI (over uniform attention), random ones, and ones as
    hard to predict as the first."""
    fai, entropy = _curve(found, "fai_lift", number), _curve(found, "entropy", number)
    known = np.flatnonzero(np.isfinite(fai) & np.isfinite(entropy))
    if len(known) < 4 * count:
        return None
    order = known[np.argsort(-fai[known], kind="stable")]
    top, bottom = order[:count].tolist(), order[-count:].tolist()
    free = [int(p) for p in order[count:]]
    matched: list[int] = []
    for place in top:
        left = [p for p in free if p not in matched]
        matched.append(min(left, key=lambda p: abs(entropy[p] - entropy[place])))
    return {"high FAI": top, "low FAI": bottom,
            "random": [int(p) for p in rng.choice(free, count, replace=False)],
            "as hard to predict": matched}


def _changes(one: Subject, found: Any, settings: Settings, out: Output) -> None:
    rng, count = settings.rng(6), settings.pick(3, tiny=1)
    chosen = {i: _places(found, i, count, rng) for i in range(len(one.prompts))}
    kept = {i: places for i, places in chosen.items() if places is not None}
    if not kept:
        for sentence, source in ((MATTER, SOURCE), (MATCHED, OWN)):
            out.claim(Claim.untestable(sentence, source, "no text has enough tokens that are reread",
                                       paper_number=NUMBERS.get(sentence, ""),
                                       paper_tag="secondary"), one.model.name)
        out.no_figure("jaccard", "no text has enough tokens that are reread", of=one.model.name)
        return
    conditions = list(next(iter(kept.values())))
    done = preplan_anchor.intervene(
        one.model, [one.prompts[i] for i in kept],
        {name: [places[name] for places in kept.values()] for name in conditions},
        new_tokens=settings.pick(24, tiny=8))
    out.save(f"changes-{one.model.name}", done)
    each: xr.DataArray = done["jaccard"].mean("position")
    high = each.sel(condition="high FAI").values
    entropy = {name: float(np.mean([found["entropy"].values[i, places[name]].mean()
                                    for i, places in kept.items()])) for name in conditions}
    shared = {"mean": {name: float(each.sel(condition=name).mean()) for name in conditions},
              "entropy": entropy, "position": {
                  name: float(np.mean([p[name] for p in kept.values()])) for name in conditions},
              "tokens changed per text": count, "texts": one.texts}
    for sentence, source, other, control in (
        (MATTER, SOURCE, "low FAI", "tokens of the lowest FAI, one changed at a time"),
        (MATCHED, OWN, "as hard to predict", "tokens of the nearest entropy"),
    ):
        against = each.sel(condition=other).values
        gap = high - against
        test: Any = stats.wilcoxon(gap) if (gap != 0).any() else None
        p = 1.0 if test is None else float(test.pvalue)
        out.claim(Claim(
            sentence, source, **statistics.difference(
                high, against, resamples=settings.pick(statistics.RESAMPLES, tiny=1000)).for_claim(),
            null=0.0, direction="below", causal=True, control=control, figure="jaccard",
            unit="Jaccard index of greedy continuations", paper_number=NUMBERS.get(sentence, ""),
            paper_tag="secondary", details={
                **shared, "Wilcoxon p": p, "lower in": float((high < against).mean()),
                "against random": float((high - each.sel(condition="random").values).mean())}),
            one.model.name)
    if out.wants("jaccard"):
        figure, ax = canvas(1, 1)
        for i, name in enumerate(conditions):
            made = _mean(each.sel(condition=name).values, settings)
            ax.bar(i, made.value, 0.7, color=CYCLE[1] if name == "high FAI" else GRAY)
            if np.isfinite(made.interval[0]):
                ax.plot([i, i], made.interval, color="black", linewidth=0.9)
        ax.set_xticks(range(len(conditions)), [name.replace(" to ", "\nto ") for name in conditions])
        ax.set_ylabel("Jaccard index")
        ax.set_ylim(0, 1)
        ax.set_title(f"{one.model.name}: continuations after a changed token")
        note(ax, "FAI: attention received later; mean over texts, 95 % bootstrap interval")
        out.figure("jaccard", figure, of=one.model.name)
