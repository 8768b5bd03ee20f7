"""RazorAttention (arXiv:2407.15891): which heads need the whole cache, and what do the others need?

Echo and induction heads are found on repeated random tokens; then far keys are cut from them, from
all others and from random heads in the rows that decide the answer to a needle question.
"""

from collections.abc import Iterable, Sequence
from typing import Any, Optional

import numpy as np
import xarray as xr
from scipy import stats

import interp
from experiments import _needles
from experiments import _texts as texts
from experiments._output import Output
from experiments._paper import Paper, Settings, SettingsError
from interp.causal.controls import random_heads
from interp.core import Claim, Head, Prompt, Result, statistics
from interp.core.errors import ModelRefused, OutOfRange
from interp.figures import heat
from interp.figures.style import PAGE, canvas, color, note
from interp.heads import compensation, echo_induction, retrieval
from interp.organisms import reader
from interp.prompts.needle import Needle

PAPER = Paper(
    "razor_attention",
    "RazorAttention: Efficient KV Cache Compression Through Retrieval Heads",
    ("2407.15891",),
    "Which heads need the whole cache, and is one averaged token enough for the others?",
    figures={
        "scatter": "Echo and induction score of every head on repeated random tokens; in color the "
        "heads that are protected.",
        "layers": "Protected heads per layer, by the score that chose them.",
        "protected": "Needle accuracy and divergence from the whole cache against the number of "
        "heads that keep it; all others keep the first keys and the last fifth, with or without "
        "the mean of what they drop. In gray random heads are protected.",
        "niah": "Needle accuracy by length and depth: whole cache, and with only the chosen heads "
        "protected, without and with the compensation token.",
    },
    models=("reader",),
    long=True,
)
(SOURCE,) = PAPER.sources
SEEDS = 5

SENTENCES = {
    "induction": "Some heads look at what follows earlier copies because the tokens repeat.",
    "echo": "Some heads look at earlier copies of a token because the tokens repeat.",
    "minority": "Cutting far keys from the echo and induction heads costs more needles than cutting "
    "them from all other heads.",
    "causes": "Losing the far keys of echo and induction heads causes more lost needles than losing "
    "those of random heads.",
    "echo_matters": "Protecting 1 % echo heads beside the induction heads recovers needles.",
    "compensation": "Without the compensation token the compressed cache is further from the whole "
    "one.",
    "budget": "With echo and induction heads whole and the others compressed, at most 2 % of the "
    "needle accuracy is lost.",
    "overlap": "Echo and induction heads are the needle heads more often than by chance.",
}


def run(settings: Settings, out: Output) -> None:
    """Every model in turn."""
    for name in settings.models(PAPER):
        model = interp.open_model(name, **settings.opening())
        if model.kind != "decoder":
            raise SettingsError(f"{model.name} is an encoder: it has no cache; give a decoder.")
        _one(model, settings, out)


def _one(model: Any, settings: Settings, out: Output) -> None:
    sizes = _needles.lengths(model, settings)
    depths = settings.pick((0.05, 0.25, 0.5, 0.7), tiny=(0.1, 0.4, 0.6))
    made = _needles.needles(model, sizes["test"], depths, settings.rng(1), each=2)
    rng = settings.rng(2)
    # The bundled reader was trained on up to 512 tokens: longer probes would only show its limits.
    most = settings.pick(60 if texts.knows(model, reader) else echo_induction.PROBE, tiny=20)
    length = min(most, len(echo_induction.probe(model, rng).segment("first")))
    probes = [echo_induction.probe(model, rng, length) for _ in range(settings.pick(6, tiny=5))]
    found = echo_induction.measure(model, probes, seed=settings.seed)
    out.record(model, probes, f"probes-{model.name}")
    out.record(None, [one.prompt for one in made], f"needles-{model.name}")
    out.save(f"scores-{model.name}", found)
    groups = model.n_kv_heads
    chosen = echo_induction.select(found, n_kv_heads=groups)
    induction = echo_induction.select(found, echo=0.0, n_kv_heads=groups)
    _scatter(model, found, chosen, out)
    _layers(model, found, out)
    _scores(model, found, out)
    _overlap(model, made, chosen, out)
    try:
        _cut(model, made, found, chosen, induction, settings, out)
        _niah(model, chosen, settings, sizes, depths, out)
    except ModelRefused as error:
        for key in ("minority", "causes", "echo_matters", "compensation", "budget"):
            out.claim(Claim.untestable(SENTENCES[key], SOURCE, str(error)), model.name)
        for name in ("protected", "niah"):
            out.no_figure(name, str(error), of=model.name)


def _scores(model: Any, found: Result, out: Output) -> None:
    for kind in ("induction", "echo"):
        best = echo_induction.scores_of(found, kind).top(1)[0]
        at = {"layer": best.layer, "head": best.head}
        out.claim(Claim(
            SENTENCES[kind], SOURCE,
            **statistics.mean(found[f"{kind}_samples"].sel(at).values).for_claim(),
            null=max(0.1, float(found[f"{kind}_null"].max())), unit="attention", figure="scatter",
            control=found.manifest["control"], details={
                "head": str(best), "nearest copy alone": float(found[f"{kind}_nearest"].sel(at)),
                "heads above 0.1": int((found[kind] > 0.1).sum())}), model.name)


def _overlap(model: Any, made: Sequence[Needle], chosen: Sequence[Head], out: Output) -> None:
    scored = retrieval.measure(model, [one.prompt for one in made])
    if not scored.manifest["n_kept"]:
        out.claim(Claim.untestable(
            SENTENCES["overlap"], SOURCE, f"none of {len(made)} prompts passed the success filter: "
            f"{model.name} does not retrieve"), model.name)
        return
    samples = scored["set"].values[scored["kept"].values].reshape(scored.manifest["n_kept"], -1)
    mine = np.zeros(model.n_layers * model.n_heads, dtype=bool)
    mine[[h.layer * model.n_heads + h.head for h in chosen]] = True

    def jaccard(x: np.ndarray) -> float:
        theirs = x.mean(0) >= retrieval.RETRIEVAL
        both = (mine | theirs).sum()
        return float((mine & theirs).sum() / both) if both else float("nan")

    needle = samples.mean(0) >= retrieval.RETRIEVAL
    chance = stats.hypergeom(len(mine), int(mine.sum()), int(needle.sum()))
    high = int(chance.ppf(0.95))
    common = int((mine & needle).sum())
    out.claim(Claim(
        SENTENCES["overlap"], SOURCE, **statistics.bootstrap(
            jaccard, samples, resamples=1000, name="Jaccard index of the two sets").for_claim(),
        null=high / max(1, int(mine.sum() + needle.sum()) - high), figure="scatter",
        control="sets of the same sizes drawn at random (hypergeometric, 95 %)", details={
            "common": common, "protected": int(mine.sum()), "needle heads": int(needle.sum()),
            "p": float(chance.sf(common - 1))}), model.name)


class Rows:
    """The rows that decide the answers, under compression of some heads."""

    def __init__(self, model: Any, made: Sequence[Needle]) -> None:
        self.model = model
        self.cases = []
        for one in made:
            ids = [*one.prompt.ids, *one.answer[:-1]]
            first = len(one.prompt) - 1
            prompt = Prompt(tuple(ids), one.prompt.segments, inputs=one.prompt.inputs)
            rows = list(range(first, len(ids)))
            logits = model.run(prompt).logits[0][rows].log_softmax(-1)
            self.cases.append((prompt, rows, list(one.answer), logits))
        self.right = np.array([float(x.argmax(-1).tolist() == a) for _, _, a, x in self.cases])

    def compressed(self, heads: Iterable[Head], compensate: bool) -> dict[str, np.ndarray]:
        """Accuracy, log probability and divergence from the whole cache, per prompt."""
        heads = list(heads)
        found: dict[str, list[float]] = {"accuracy": [], "log_prob": [], "divergence": []}
        for prompt, rows, answer, whole in self.cases:
            write = compensation.compress(
                self.model, prompt, heads, rows, compensate=compensate) if heads else []
            logits = self.model.run(prompt, write=write).logits[0][rows].log_softmax(-1) \
                if write else whole
            found["accuracy"].append(float(logits.argmax(-1).tolist() == answer))
            found["log_prob"].append(float(logits[range(len(rows)), answer].mean()))
            found["divergence"].append(
                float((whole.exp() * (whole - logits)).sum(-1).mean().clamp_min(0)))
        return {name: np.array(values) for name, values in found.items()}


def _others(model: Any, heads: Iterable[Head]) -> list[Head]:
    kept = set(heads)
    return [Head(a, b) for a in range(model.n_layers) for b in range(model.n_heads)
            if Head(a, b) not in kept]


def _random(model: Any, like: Sequence[Head], eligible: Optional[np.ndarray]) -> tuple[Any, str]:
    """Random sets like the chosen one: layer by layer where the layers have heads enough."""
    size = (model.n_layers, model.n_heads)
    try:
        return [random_heads(like, *size, seed=s, eligible=eligible) for s in range(SEEDS)], \
            f"random heads of the same layers, {SEEDS} sets"
    except OutOfRange:
        return [random_heads(like, *size, seed=s, eligible=eligible, layer_matched=False)
                for s in range(SEEDS)], (
            f"as many random heads from any layer, {SEEDS} sets (the chosen ones fill layers)")


def _cut(
    model: Any, made: Sequence[Needle], found: Result, chosen: Sequence[Head],
    induction: Sequence[Head], settings: Settings, out: Output,
) -> None:
    rows = Rows(model, made)
    if not rows.right.any():
        raise ModelRefused(
            f"{model.name} answers none of {len(made)} needle questions, so nothing can be lost")
    drawn, matched = _random(model, chosen, None)
    others = _others(model, chosen)
    cut = {"chosen": rows.compressed(chosen, False), "others": rows.compressed(others, False),
           "others with mean": rows.compressed(others, True),
           "induction only": rows.compressed(_others(model, induction), True)}
    random = [rows.compressed(heads, False) for heads in drawn]
    mean_random = {k: np.mean([one[k] for one in random], 0) for k in random[0]}
    share = compensation.cache_share(
        int(np.mean([len(one.prompt) for one in made])), len(chosen) / (model.n_layers
                                                                       * model.n_heads))
    more: dict[str, Any] = {"causal": True, "figure": "protected", "details": {
        "protected": [str(h) for h in chosen], "cache that stays": share,
        "accuracy, whole cache": float(rows.right.mean()),
        **{f"accuracy, cut from {k}": float(v["accuracy"].mean()) for k, v in cut.items()},
        **{f"divergence, cut from {k} (nats)": float(v["divergence"].mean())
           for k, v in cut.items()},
        "accuracy, cut from random": float(mean_random["accuracy"].mean())}}
    number = {"paper_number": "-16 points against -1.5", "paper_tag": "secondary"}

    def claim(key: str, estimate: Any, **given: Any) -> None:
        out.claim(Claim(SENTENCES[key], SOURCE, **estimate.for_claim(), **{**more, **given}),
                  model.name)

    a, b = cut["chosen"]["accuracy"], cut["others"]["accuracy"]
    claim("minority", statistics.difference(a, b), null=0.0, direction="below",
          unit="accuracy", control="all other heads cut instead", **number)
    claim("causes", statistics.difference(a, mean_random["accuracy"]), null=0.0,
          direction="below", unit="accuracy", control=matched)
    extra = sorted(set(chosen) - set(induction))
    if not extra:
        out.claim(Claim.untestable(
            SENTENCES["echo_matters"], SOURCE, "the echo heads are all induction heads (or share "
            "their keys) here, so there is nothing to add"), model.name)
    else:
        claim("echo_matters", statistics.difference(
            cut["others with mean"]["accuracy"], cut["induction only"]["accuracy"]), null=0.0,
            unit="accuracy", control="induction heads protected alone",
            paper_number="about 10 points", paper_tag="secondary",
            details={"echo heads": [str(h) for h in extra]})
    claim("compensation", statistics.difference(
        cut["others"]["divergence"], cut["others with mean"]["divergence"]), null=0.0,
        unit="nats", control="the same heads without the token",
        paper_number="over 30 % lost without it", paper_tag="secondary")
    lost = (rows.right - cut["others with mean"]["accuracy"]) / rows.right.mean()
    claim("budget", statistics.mean(100 * lost), null=2.0, direction="below",
          unit="% of the accuracy", control="the whole cache",
          paper_number="over 70 % of the cache cut, nearly no loss")
    _protected(model, rows, found, settings, out)


def _protected(model: Any, rows: Rows, found: Result, settings: Settings, out: Output) -> None:
    """Protect more and more heads, best by induction first, or at random."""
    if not out.wants("protected"):
        return
    total = model.n_layers * model.n_heads
    ranked = echo_induction.scores_of(found).top(total)
    shares = settings.pick((0.0, 0.125, 0.25, 0.5, 0.75, 1.0), tiny=(0.0, 0.25, 1.0))
    counts = sorted({min(round(s * total), len(ranked)) for s in shares})
    rng, lines = settings.rng(3), {}
    for name, compensate in (("top, with mean token", True), ("top, without", False),
                             ("random, with mean token", True)):
        cells = []
        for count in counts:
            if name.startswith("top"):
                sets = [ranked[:count]]
            else:
                sets = [[ranked[i] for i in rng.choice(len(ranked), count, replace=False)]
                        for _ in range(3 if 0 < count < total else 1)]
            each = [rows.compressed(_others(model, kept), compensate) for kept in sets]
            cells.append([np.mean([one[k] for one in each], 0) for k in ("accuracy",
                                                                         "divergence")])
        lines[name] = np.array(cells)
    values = np.stack(list(lines.values())).transpose(2, 0, 1, 3)
    data = xr.Dataset({name: (("condition", "count", "prompt"), part)
                       for name, part in zip(("accuracy", "divergence"), values)},
                      {"condition": list(lines), "count": counts})
    out.save(f"protected-{model.name}", Result(data, model.manifest()))
    figure, axes = canvas(1, 2, width=PAGE, height=2.3)
    looks = {"top, with mean token": ("needle", "-"), "top, without": ("needle", "--"),
             "random, with mean token": ("control", "-")}
    for ax, name, label in zip(axes, ("accuracy", "divergence"),
                               ("needle accuracy", "divergence from\nthe whole cache (nats)")):
        for condition, (role, dash) in looks.items():
            y = data[name].sel(condition=condition).mean("prompt")
            # Open rings: where two lines coincide, the lower one shows inside.
            ax.plot([100 * c / total for c in counts], y, dash, marker="o", color=color(role),
                    label=condition, **({"markersize": 6.5, "markerfacecolor": "none"}
                                        if dash == "--" else {}))
        ax.set_xlabel("heads with the whole cache (%)")
        ax.set_ylabel(label)
        ax.set_ylim(min(0, -0.03 * float(data[name].max() or 1)), None)
        ax.grid(True, axis="y")
    axes[0].legend(title="protected", handlelength=3.4)
    note(axes[1], f"n = {data.sizes['prompt']} prompts")
    figure.suptitle(model.name)
    out.figure("protected", figure, of=model.name)


def _niah(
    model: Any, chosen: Sequence[Head], settings: Settings, sizes: Any, depths: Any, out: Output
) -> None:
    if not out.wants("niah"):
        return
    lengths = sizes["grid"][: settings.pick(4, tiny=1)]
    each = settings.pick(2, tiny=1)
    made = _needles.needles(model, lengths, depths, settings.rng(4), each=each)
    rows, others = Rows(model, made), _others(model, chosen)
    shown = {"whole cache": rows.right,
             "protected heads only": rows.compressed(others, False)["accuracy"],
             "with compensation": rows.compressed(others, True)["accuracy"]}
    figure, axes = canvas(1, len(shown), width=PAGE, height=2.1, sharey=True)
    for number, (ax, (name, values)) in enumerate(zip(axes, shown.items())):
        array = xr.DataArray(values.reshape(len(lengths), len(depths), each).mean(-1).T,
                             {"depth": [100 * d for d in depths], "length": list(lengths)},
                             ("depth", "length"))
        heat.draw(ax, array, limits=(0, 1), signed=False, x="prompt length (tokens)",
                  y="depth of the needle (%)" if number == 0 else "", label="accuracy",
                  bar=number == 2, upward=False)
        ax.set_title(f"{name}: {values.mean():.2f}")
    note(axes[-1], f"titles: mean; n = {each} prompts per cell")
    figure.suptitle(model.name)
    out.figure("niah", figure, of=model.name)


def _scatter(model: Any, found: Result, chosen: Sequence[Head], out: Output) -> None:
    figure, ax = canvas()
    echo_induction.draw(found, ax, chosen)
    ax.set_title(model.name)
    note(ax, f"{found.manifest['copies']} copies of {found.manifest['length']} random tokens, "
             f"n = {found.manifest['n_prompts']}")
    out.figure("scatter", figure, of=model.name)


def _layers(model: Any, found: Result, out: Output) -> None:
    figure, ax = canvas()
    bottom = np.zeros(model.n_layers)
    own = echo_induction.select(found, echo=0.0)
    echo = [h for h in echo_induction.select(found, induction=0.0) if h not in own]
    whole = echo_induction.select(found, n_kv_heads=model.n_kv_heads)
    group = [h for h in whole if h not in own and h not in echo]
    for heads, label, role in ((own, "induction", "needle"), (echo, "echo", "question"),
                               (group, "share their keys", "other")):
        height = np.bincount([h.layer for h in heads], minlength=model.n_layers)
        ax.bar(range(model.n_layers), height, bottom=bottom, color=color(role), label=label)
        bottom += height
    ax.set_xlabel("layer")
    ax.set_ylabel("protected heads")
    ax.set_xticks(range(0, model.n_layers, max(1, model.n_layers // 8)))
    ax.set_yticks(range(0, model.n_heads + 1, max(1, model.n_heads // 8)))
    ax.set_ylim(0, model.n_heads)
    ax.legend()
    ax.set_title(model.name)
    out.figure("layers", figure, of=model.name)


