"""Secondary sinks (arXiv:2512.22213), massive activations (2402.17762), alignment (2510.22603).

By default on models whose secondary sinks were planted, so that the truth is known, and on the
bundled reader as it is; with `--model` on any decoder. The detector is also tested on a family of
planted models: that table is the toolkit's own, not a paper's.
"""

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import numpy as np
import pandas as pd
import xarray as xr
from matplotlib.ticker import MaxNLocator

from experiments import _sink_subjects as subjects
from experiments._output import Output
from experiments._paper import Paper, Settings
from experiments._planted_benchmark import benchmark
from experiments._sink_subjects import Subject
from interp.core import Claim, Result, statistics
from interp.core.errors import ModelRefused, SiteRefused
from interp.figures.style import PAGE, canvas, color, note
from interp.sinks import levels as sink_levels
from interp.sinks import massive_activations as massive
from interp.sinks import mlp_directions, mlp_formation, mlp_removal, secondary

PAPER = Paper(
    "secondary_sinks",
    "Secondary Attention Sinks",
    ("2512.22213", "2402.17762", "2510.22603"),
    "Which tokens after the first become sinks part-way through the network, and what makes them?",
    figures={
        "norms": "Norms of keys, values and the residual stream for the primary sink, the "
        "secondary sinks (found by direction, not by norm) and all other tokens.",
        "levels": "Sink levels: where sinks are created and how many layers they last.",
        "strength": "Attention received from later queries, by kind of token: does the primary "
        "weaken where the secondary sinks appear?",
        "stages": "Cosine between each secondary sink and the primary at every stage of the MLP "
        "that creates it.",
        "directions": "Principal directions of the MLP inputs, each fed alone through the MLP with "
        "both signs: norm and direction of the output, scale sweep, projections.",
        "relation": "Norm of the MLP write against the sink's lifetime and its attention score.",
        "removal": "The MLP write at the sinks removed in one layer at a time; in gray the same at "
        "other positions and in other layers.",
        "massive": "The three largest magnitudes of the residual stream and the median, per layer.",
        "massive_edits": "Massive activations of one layer set to zero or to their mean; in gray "
        "as many coordinates of median size set to zero.",
        "benchmark": "The detector on planted models (this toolkit's own test): found against "
        "planted onset and lifetime, and recall against the strength of the sink.",
    },
    models=(subjects.PLANTED, subjects.PLANTED_READER, "reader"),
    long=True,
)
SINKS, MASSIVE, ALIGNED = PAPER.sources

PRIMARY_RATIO = 3.0
"""A primary sink's norm is at least this many times the median of the others, in its window."""

RESAMPLES = 20
"""Resamples of prompts for the directions of an MLP, each of which runs that MLP."""

CHANCE_LOSS = 0.9
"""A model whose loss is above this share of ln(vocabulary) predicts nothing worth losing."""

# key -> sentence, source, the paper's number, its tag
CLAIMS: dict[str, tuple[str, str, str, str]] = {
    "one_level": ("The primary sink starts in the first quarter of the network and lasts three "
                  "quarters of it.", SINKS, "300 of 300 rows (14B)", "data"),
    "frequency": ("Later tokens become secondary sinks, more than chance alignment gives.", SINKS,
                  "167 of 300 rows have one (14B)", "data"),
    "official": ("They do so under the paper's rule in absolute layers.", SINKS,
                 "270 in 300 rows (14B)", "data"),
    "mid_network": ("Secondary sinks start in the middle of the network (0.3 to 0.7 of the "
                    "depth).", SINKS, "0.46 of the depth, 270 of 270 (14B)", "data"),
    "few_levels": ("Secondary sinks fall into few levels.", SINKS,
                   "lifetimes 22 to 24 in 257 of 270 (14B)", "data"),
    "scale": ("The number of levels grows with the size of the model.", SINKS,
              "QwQ-32B 3, Qwen3-14B 6", "paper"),
    "stays": ("A sink stays on until it ends.", SINKS, "1 gap in 270 (14B)", "data"),
    "length": ("Secondary sinks become more frequent later in the text.", SINKS,
               "35, 36, 61, 91 % of rows by length quartile", "data"),
    "weak_tokens": ("Secondary sinks are tokens of little content.", SINKS,
                    "a space in 162 of 270 (14B)", "data"),
    "response": ("Secondary sinks lie in the response, not in the prompt.", SINKS,
                 "250 of 270 (14B)", "data"),
    "weakens": ("The primary weakens where secondary sinks appear.", SINKS, "", "paper"),
    "key_jump": ("The primary's key norm changes most within two layers of the creation layer.",
                 SINKS, "about 10 to 65 at layer 22 of 48 (14B)", "code"),
    "aligned_out": ("The MLP output at a secondary sink is parallel to the primary's.", SINKS,
                    "", "paper"),
    "unlike_in": ("The MLP inputs of the two are not alike.", SINKS, "", "paper"),
    "update": ("The MLP writes nearly all of the update that makes the sink.", SINKS, "", "paper"),
    "deletes": ("One MLP causes the sink: without its write there is none.", SINKS, "", "paper"),
    "leaves": ("Without that write, attention leaves the sink.", SINKS, "", "paper"),
    "returns": ("Without that write, attention returns to content.", SINKS, "", "paper"),
    "few_directions": ("Few input directions make the MLP write along the primary's output.", SINKS,
                       "8 of 502 components", "data"),
    "quadratic": ("The output grows about quadratically along the strongest direction.", SINKS,
                  "norm about 3,500 at scale 19 (component 1)", "data"),
    "one_sided": ("It grows along one sign of that direction only.", SINKS, "", "paper"),
    "median_direction": ("The median direction does nothing.", SINKS, "strongest 231 times it",
                         "data"),
    "norm_lifetime": ("The norm of the MLP write ranks the lifetime of the sink.", SINKS, "",
                      "paper"),
    "norm_score": ("The norm of the MLP write ranks the attention that the sink receives.", SINKS,
                   "", "paper"),
    "alignment": ("Sink tokens point like the first token and others do not (cosine gap).", ALIGNED,
                  "about 0.99 against -0.05 to 0.31 (layers 3 to 28)", "code"),
    "shared_dims": ("Sink tokens share their largest coordinates with the first token.", ALIGNED,
                    "the same fixed dimensions", "code"),
    "decorrelation": ("A decorrelation loss removes such sinks and helps recognition.", ALIGNED,
                      "word error rate 44.18 to 34.16", "code"),
    "few_massive": ("At most four activations are massive.", MASSIVE, "", "paper"),
    "same_dims": ("Massive activations have the same dimensions for all inputs.", MASSIVE,
                  "1415 and 2533 (Llama-2-7B)", "code"),
    "start_token": ("Massive activations sit at the first token or the first delimiter.", MASSIVE,
                    "", "paper"),
    "early_jump": ("They appear after one early block: the largest magnitude jumps tenfold.",
                   MASSIVE, "", "paper"),
    "vanish": ("They vanish at the end: the last block at least halves the largest magnitude.",
               MASSIVE, "", "paper"),
    "mean_loss": ("Setting massive activations to their mean changes no loss.", MASSIVE, "",
                  "paper"),
    "zero_loss": ("Setting massive activations to zero raises the loss; median-size ones do not.",
                  MASSIVE, "", "paper"),
    "zero_changes": ("Setting massive activations to zero changes the predictions more than "
                     "median-size ones do.", MASSIVE, "", "paper"),
    "attracts": ("Attention concentrates on the positions of massive activations.", MASSIVE, "",
                 "paper"),
    "bias": ("Explicit attention biases make massive activations unnecessary.", MASSIVE, "",
             "paper"),
}


NOT_HERE = {
    "scale": "it compares trained models of several sizes of one family; every model is looked at "
    "by itself here",
    "response": "the prompts are one text each, not a question and an answer that the model wrote",
    "decorrelation": "it needs fine-tuning on audio-visual speech, and that data",
    "bias": "it needs training a model with and without such biases",
}
"""Claims that no model of this run can test."""

MANY = 4
"""Beside other models, more claims than this that fail for one reason share a row."""


class Ledger:
    """Sees to it that every claim of the cards gets exactly one verdict for every model."""

    def __init__(self, out: Output, model: str, alone: bool) -> None:
        self.out, self.model, self.alone = out, model, alone
        self.open = dict.fromkeys(key for key in CLAIMS if key not in NOT_HERE)

    def decide(self, key: str, estimate: statistics.Estimate, **more: Any) -> None:
        sentence, source, number, tag = self._take(key)
        self.out.claim(Claim(sentence, source, **{**estimate.for_claim(), **more},
                             paper_number=number, paper_tag=tag), self.model)

    def skip(self, keys: Iterable[str], reason: str) -> None:
        left = [key for key in keys if key in self.open]
        if not self.alone and len(left) > MANY:
            sentences = [self._take(key)[0] for key in left]
            about = " and ".join(word for word, source in (
                ("secondary sinks", SINKS), ("massive activations", MASSIVE))
                if any(CLAIMS[key][1] == source for key in left))
            self.out.claim(Claim.untestable(f"{len(left)} claims about {about}.", SINKS, reason,
                                            details={"claims": sentences}), self.model)
            left = []
        for key in left:
            if key in self.open:
                sentence, source, number, tag = self._take(key)
                self.out.claim(Claim.untestable(sentence, source, reason, paper_number=number,
                                                paper_tag=tag), self.model)

    def _take(self, key: str) -> tuple[str, str, str, str]:
        del self.open[key]
        return CLAIMS[key]

    def close(self) -> None:
        if self.open:
            raise ValueError(f"no verdict for: {', '.join(self.open)}.")


def run(settings: Settings, out: Output) -> None:
    alone = len(settings.models(PAPER)) == 1
    for name in settings.models(PAPER):
        try:
            one = subjects.subject(name, settings)
        except ModelRefused as error:
            if name not in (subjects.PLANTED, subjects.PLANTED_READER):
                raise
            ledger = Ledger(out, name, alone)
            ledger.skip(CLAIMS, f"nothing could be planted in {name}: {error}")
            continue
        _model(one, Ledger(out, one.name, alone), settings, out)
    for key, reason in NOT_HERE.items():
        sentence, source, number, tag = CLAIMS[key]
        out.claim(Claim.untestable(sentence, source, reason, paper_number=number, paper_tag=tag))
    if settings.model is None:
        benchmark(settings, out, PAPER)
    else:
        out.no_figure("benchmark", "it is drawn by the run without --model")


def _model(one: Subject, ledger: Ledger, settings: Settings, out: Output) -> None:
    if one.model.kind != "decoder":
        reason = f"{one.name} is an encoder: all queries see all keys, so no key is first"
        ledger.skip(CLAIMS, reason)
        for name in PAPER.figures:
            if name != "benchmark":
                out.no_figure(name, reason, of=one.name)
        return
    out.record(one.model, one.prompts, f"prompts-{one.name}")
    found = secondary.measure(one.model, one.prompts, seed=settings.seed)
    out.save(f"sinks-{one.name}", found)
    _secondary(one, found, ledger, settings, out)
    _massive(one, ledger, settings, out)
    ledger.close()


# -- card 1: secondary sinks ----------------------------------------------------------------------

AFTER_DETECTION = (
    "official", "mid_network", "few_levels", "stays", "length", "weak_tokens", "weakens",
    "key_jump", "aligned_out", "unlike_in", "update", "deletes", "leaves", "returns",
    "few_directions", "quadratic", "one_sided", "median_direction", "norm_lifetime", "norm_score",
    "alignment", "shared_dims",
)


def _secondary(
    one: Subject, found: Result, ledger: Ledger, settings: Settings, out: Output
) -> None:
    table = secondary.sinks(found)
    out.table(f"sinks-{one.name}", table)
    _norms(one, found, out)
    figures = ("levels", "strength", "stages", "directions", "relation", "removal")
    ratio = float(np.median(found["primary_ratio"]))
    if ratio < PRIMARY_RATIO:
        reason = (f"{one.name} has no primary sink to align with: at its largest the first token's "
                  f"residual is {ratio:.2f} times the others' ({PRIMARY_RATIO:g} is needed)")
        ledger.skip(("one_level", "frequency", *AFTER_DETECTION), reason)
        for name in figures:
            out.no_figure(name, reason, of=one.name)
        return
    n_layers = one.model.n_layers
    start, stop = found["window_start"].values, found["window_stop"].values
    good = (start <= 0.25 * n_layers) & (stop - start >= 0.75 * n_layers)
    pairs, counts = np.unique(np.stack([start, stop - start], 1), axis=0, return_counts=True)
    ledger.decide("one_level", statistics.rate(int(good.sum()), len(good)), null=0.8,
                  figure="levels", details={
                      "levels (onset, lifetime)": pairs.tolist(), "counts": counts.tolist(),
                      "norm over the others'": ratio})
    per_thousand = 1000 / found["length"].values
    counted = _per_prompt(table[table["label"] == "secondary"], len(good))
    _levels(one, found, out)
    impossible = _impossible(one, found)
    if impossible and not counted.any():
        ledger.skip(("frequency", *AFTER_DETECTION), impossible)
        for name in figures[1:]:
            out.no_figure(name, impossible, of=one.name)
        return
    ledger.decide("frequency", _over_chance(counted, found), null=0.0, unit="per 1,000 tokens",
                  figure="levels", control="the same rule with a random ordinary position in the "
                  "primary's place", details={
            "rule": found.manifest["rule"],
            "per 1,000 tokens": float((counted * per_thousand).mean()),
            "prompts with one": f"{int((counted > 0).sum())} of {len(counted)}",
            "most in one prompt": int(counted.max()),
            "anti-aligned": int((table["cosine"] < 0).sum())})
    if not counted.any():
        reason = (f"no secondary sink was found in {len(one.prompts)} prompts of up to "
                  f"{max(map(len, one.prompts)):,} tokens")
        ledger.skip(AFTER_DETECTION, reason)
        for name in figures[1:]:
            out.no_figure(name, reason, of=one.name)
        return
    _official(one, found, table, ledger)
    _where(one, found, table, ledger, out)
    _strength(one, found, table, ledger, out)
    _formation(one, found, ledger, settings, out)


def _impossible(one: Subject, found: Result) -> str:
    """Why no sink can be secondary under the rule in force, whatever the prompts; "" if one can."""
    n_layers = one.model.n_layers
    if found.manifest["rule"] == "official":
        return _no_official(one)
    gap = max(2, int(np.ceil(0.1 * n_layers)))
    start, stop = int(found["window_start"].min()), int(found["window_stop"].max())
    if start + 2 * gap <= stop:
        return ""
    return (f"{one.name} has {n_layers} blocks: a sink that starts {gap} after the primary (block "
            f"{start} at the earliest) and lasts {gap} does not fit in before block {stop}")


def _no_official(one: Subject) -> str:
    """Why no lifetime can be secondary in absolute layers; "" if one can."""
    n_layers = one.model.n_layers
    if n_layers > 20:
        return ""
    return (f"{one.name} has {n_layers} blocks; a lifetime above 4 and below blocks - 15 = "
            f"{n_layers - 15} does not exist (it takes more than 20 blocks)")


def _per_prompt(table: pd.DataFrame, n_prompts: int) -> np.ndarray:
    return np.bincount(table["prompt"], minlength=n_prompts).astype(float)


def _over_chance(counted: np.ndarray, found: Result) -> statistics.Estimate:
    """Sinks per 1,000 tokens, minus those that a random position in the primary's place has."""
    chance, rate = found["chance"].values, 1000 / found["length"].values
    known = np.isfinite(chance)
    if not known.any():
        return statistics.mean(counted * rate)
    return statistics.difference((counted * rate)[known], (chance * rate)[known])


def _official(one: Subject, found: Result, table: pd.DataFrame, ledger: Ledger) -> None:
    if _no_official(one):
        ledger.skip(["official"], _no_official(one))
        return
    column = "label" if found.manifest["rule"] == "official" else "other_label"
    chosen = table[(table[column] == "secondary") & (table["position"] > 0)]
    counted = _per_prompt(chosen, found.data.sizes["prompt"])
    ledger.decide("official", _over_chance(counted, found), null=0.0,
        unit="per 1,000 tokens", figure="levels", details={
            "sinks": len(chosen), "also under the relative rule": int(
                (chosen[["label", "other_label"]] == "secondary").all(1).sum())})


def _where(
    one: Subject, found: Result, table: pd.DataFrame, ledger: Ledger, out: Output
) -> None:
    """Onsets, lifetimes, gaps, position in the text, tokens."""
    chosen = table[table["label"] == "secondary"]
    prompts, n_layers = chosen["prompt"].to_numpy(), one.model.n_layers
    share = chosen["onset"] / n_layers
    modal, times = np.unique(chosen["onset"], return_counts=True)
    ledger.decide("mid_network", statistics.mean(
        ((share >= 0.3) & (share <= 0.7)).to_numpy(float), groups=prompts), null=0.5,
        figure="levels", details={
            "most frequent creation layer": int(modal[times.argmax()]), "blocks": n_layers,
            "share there": float(times.max() / times.sum())})

    found_levels = secondary.levels(found)
    count = sink_levels.n_levels(sink_levels.level_table(found_levels, merge=2))
    null = _random_levels(found, chosen)
    per_prompt = [[found_levels[i]] for i in np.unique(prompts)]

    def drawn(numbers: np.ndarray) -> float:
        some = [per_prompt[int(i)][0] for i in numbers]
        return float(sink_levels.n_levels(sink_levels.level_table(some, merge=2)))

    estimate = statistics.bootstrap(drawn, np.arange(len(per_prompt)), resamples=500,
                                    name="levels with 95 % of the sinks, lifetimes merged by 2")
    ledger.decide("few_levels", estimate, null=null, direction="below", figure="levels",
                  control="as many sinks with random onset and lifetime in the same window",
                  details={"levels": count, "sinks": len(chosen)})
    whole = (chosen["longest_run"] == chosen["lifetime"]).to_numpy()
    unbroken = [bool(whole[prompts == i].all()) for i in np.unique(prompts)]
    ledger.decide("stays", statistics.rate(sum(unbroken), len(unbroken)), null=0.8,
                  unit="of prompts without a gap", figure="levels",
                  details={"sinks with a gap": int((~whole).sum()), "sinks": len(whole)})
    if one.planted:
        ledger.skip(["length", "weak_tokens"], one.planted)
        return
    half = found["length"].values[prompts] / 2
    late = _per_prompt(chosen[chosen["position"] >= half], found.data.sizes["prompt"])
    early = _per_prompt(chosen[chosen["position"] < half], found.data.sizes["prompt"])
    rate = 2000 / found["length"].values
    ledger.decide("length", statistics.difference(late * rate, early * rate), null=0.0,
                  unit="per 1,000 tokens, second half minus first", figure="levels", control="the "
                  "first half of the same text")
    _tokens(one, chosen, ledger, out)


def _random_levels(found: Result, chosen: pd.DataFrame, draws: int = 200) -> float:
    """Levels to expect from as many sinks with any onset and lifetime within the window."""
    rng = np.random.default_rng(0)
    start, stop = (int(np.median(found[name])) for name in ("window_start", "window_stop"))
    counts = []
    for _ in range(draws):
        onset = rng.integers(start, stop, len(chosen))
        lifetime = 1 + (rng.random(len(chosen)) * (stop - onset)).astype(int)
        one = sink_levels.SinkLevels(
            {i: (tuple(range(a, a + b)), "secondary") for i, (a, b) in
             enumerate(zip(onset.tolist(), lifetime.tolist()))}, stop)
        counts.append(sink_levels.n_levels(sink_levels.level_table([one], merge=2)))
    return float(np.mean(counts))


def _tokens(one: Subject, chosen: pd.DataFrame, ledger: Ledger, out: Output) -> None:
    if one.model.tokenizer is None:
        ledger.skip(["weak_tokens"], f"{one.name} has no tokenizer, so its tokens are no words")
        return
    text = {t: one.model.tokenizer.decode([t]) for p in one.prompts for t in set(p.ids)}
    weak = {t: len(word.strip()) <= 1 for t, word in text.items()}
    rows, gaps = [], []
    for number, here in chosen.groupby("prompt"):
        ids = one.prompts[int(number)].ids[1:]
        gaps.append((np.mean([weak[int(t)] for t in here["token"]]),
                     np.mean([weak[t] for t in ids])))
    base = np.concatenate([p.ids[1:] for p in one.prompts])
    for token, count in chosen["token"].value_counts().items():
        share, usual = count / len(chosen), float((base == token).mean())
        odds = (share / (1 - share)) / (usual / (1 - usual)) if share < 1 else float("inf")
        rows.append({"token": text[int(token)], "id": int(token), "sinks": int(count),
                     "share": share, "base rate": usual, "odds ratio": odds})
    out.table(f"tokens-{one.name}", pd.DataFrame(rows))
    sinks, usual = np.array(gaps).T
    ledger.decide("weak_tokens", statistics.difference(sinks, usual), null=0.0,
                  unit="share of one-character tokens, sinks minus all",
                  control="all tokens of the same texts",
                  details={"most frequent": [f"{r['token']!r} {r['sinks']}" for r in rows[:6]]})


def _strength(
    one: Subject, found: Result, table: pd.DataFrame, ledger: Ledger, out: Output
) -> None:
    """Does the primary weaken where the secondary sinks appear? Keys, and alignment by class."""
    chosen = table[table["label"] == "secondary"]
    mode = int(chosen["onset"].mode()[0])
    numbers = np.unique(chosen["prompt"])
    received, keys = found["received"].values, found["key_norm"].values
    before, after, jumps = [], [], []
    for number in numbers:
        anchor, stop = int(found["primary"][number]), int(found["window_stop"][number])
        strength = received[number, :, anchor]
        # What block `mode` writes is read from the next block on.
        first = int(found["window_start"][number]) + 1
        before.append(np.nanmean(strength[first : mode + 1]) if mode >= first else np.nan)
        after.append(np.nanmean(strength[mode + 1 : stop + 1]))
        step = np.abs(np.diff(keys[number, :, anchor]))
        jumps.append(int(np.nanargmax(step)) + 1 if np.isfinite(step).any() else -99)
    known = np.isfinite(before) & np.isfinite(after)
    if known.any():
        ledger.decide("weakens", statistics.difference(
            np.array(after)[known], np.array(before)[known]), null=0.0, direction="below",
            unit="attention received, after minus before", figure="strength",
            control="the blocks of the primary's window before the creation layer",
            details={"creation layer": mode, "before": float(np.nanmean(before)),
                     "after": float(np.nanmean(after))})
    else:
        ledger.skip(["weakens"], "the secondary sinks start as early as the primary does")
    if one.planted:
        ledger.skip(["key_jump"], f"the keys of {one.name} were planted with the sinks")
    elif min(jumps) < 0:
        ledger.skip(["key_jump"], f"the keys of {one.name} cannot be read")
    else:
        near = [abs(jump - mode) <= 2 for jump in jumps]
        values, counts = np.unique(jumps, return_counts=True)
        ledger.decide("key_jump", statistics.rate(sum(near), len(near)), null=0.5, figure="norms",
                      unit="of prompts", details={
                          "creation layer": mode, "largest change of the key norm, most often "
                          "entering block": int(values[counts.argmax()])})
    figure, axes = canvas(1, 2, width=PAGE)
    for ax, quantity in zip(axes, ("received", "cosine")):
        secondary.draw(found, ax, quantity)
        ax.axvline(mode, color=color("control"), linewidth=0.8, linestyle=":")
    axes[0].get_legend().remove()
    axes[1].set_ylim(top=1.6)  # room for the legend
    axes[1].set_yticks(np.linspace(0, 1, 6))
    axes[1].legend(loc="upper center", ncols=2)
    axes[0].set_title(f"{one.name}: creation layer {mode} dotted")
    out.figure("strength", figure, of=one.name)

    absolute = Result(found.data.assign(cosine=np.abs(found["cosine"])), found.manifest)
    curves = secondary.by_class(absolute, "cosine")
    inside = slice(mode, int(chosen["onset"].add(chosen["lifetime"]).median()))
    gap = (curves["secondary sinks"] - curves["other tokens"]).isel(layer=inside).mean("layer")
    kept = gap.values[np.isfinite(gap.values)]
    ledger.decide("alignment", statistics.mean(kept), null=0.5, figure="strength",
                  unit="cosine, sinks minus others", details={
                      "layers": [inside.start, inside.stop - 1], "note": "partly by definition: a "
                      "sink is found by its cosine; that the others stay low is not"})


def _formation(
    one: Subject, found: Result, ledger: Ledger, settings: Settings, out: Output
) -> None:
    keys = ("aligned_out", "unlike_in", "update", "shared_dims", "few_directions", "quadratic",
            "one_sided", "median_direction", "norm_lifetime", "norm_score", "deletes", "leaves",
            "returns")
    try:
        formed = mlp_formation.measure(one.model, one.prompts, found, seed=settings.seed)
    except SiteRefused as error:
        ledger.skip(keys, str(error).rstrip("."))
        for name in ("stages", "directions", "relation", "removal"):
            out.no_figure(name, str(error), of=one.name)
        return
    out.save(f"formation-{one.name}", formed)
    is_sink = formed["is_sink"].values
    prompts = formed["prompt"].values[is_sink]
    cosine = np.abs(formed["stage_cosine"].sel(stage="output").values)
    into = np.abs(formed["stage_cosine"].sel(stage="input").values)
    share = formed["update_share"].values
    layer = formed.manifest["creation_layer"]

    def of(values: np.ndarray) -> dict[str, Any]:
        return {"creation layer": layer, "sinks": int(is_sink.sum()),
                "ordinary positions": float(np.median(values[~is_sink])) if (~is_sink).any()
                else None}

    ledger.decide("aligned_out", statistics.median(cosine[is_sink], groups=prompts), null=0.9,
                  unit="cosine (absolute)", figure="stages", control="ordinary positions, the same "
                  "tokens where there are any", details={
                      **of(cosine), "to the primary's residual": float(
                          np.median(np.abs(formed["cosine_write"].values[is_sink])))})
    ledger.decide("unlike_in", statistics.median(into[is_sink], groups=prompts), null=0.5,
                  direction="below", unit="cosine (absolute)", figure="stages", details=of(into))
    ledger.decide("update", statistics.median(share[is_sink], groups=prompts), null=0.9,
                  unit="share of the block's update", figure="stages", details=of(share))
    shared = formed["shared_dims"].values
    pairs = [(shared[is_sink & here].mean(), shared[~is_sink & here].mean())
             for here in (formed["prompt"].values == i for i in np.unique(prompts))
             if (~is_sink & here).any()]
    if pairs:
        ledger.decide("shared_dims", statistics.difference(*np.array(pairs).T), null=0.0,
                      unit="Jaccard index of the two largest coordinates, sinks minus others",
                      control="ordinary positions, the same tokens where there are any",
                      details={"sinks": float(shared[is_sink].mean())})
    else:
        ledger.skip(["shared_dims"], "there is no ordinary position to compare with")
    figure, ax = canvas(1, 1, width=4.6, height=3.0)
    mlp_formation.draw(formed, ax, threshold=0.9)
    ax.set_title(f"{one.name}: MLP of block {layer}")
    out.figure("stages", figure, of=one.name)
    _directions(one, formed, ledger, settings, out)
    _relation(one, found, formed, ledger, out)
    _removal(one, found, ledger, settings, out)


def _directions(
    one: Subject, formed: Result, ledger: Ledger, settings: Settings, out: Output
) -> None:
    keys = ("few_directions", "quadratic", "one_sided", "median_direction")
    try:
        found = mlp_formation.directions_of(one.model, formed)
    except (SiteRefused, ValueError) as error:
        ledger.skip(keys, str(error).rstrip("."))
        out.no_figure("directions", str(error), of=one.name)
        return
    _draw_directions(one, formed, found, out)
    if one.planted:
        ledger.skip(keys, f"the units that write were planted in {one.name} by hand: how many "
                    "directions they answer to, and how, is not something a model learned")
        return
    rng, whose = settings.rng(11), formed["row_prompt"].values
    drawn = []
    for _ in range(RESAMPLES):
        some = rng.choice(np.unique(whose), len(np.unique(whose)))
        rows = np.concatenate([np.flatnonzero(whose == i) for i in some])
        try:
            drawn.append(_responses(mlp_formation.directions_of(one.model, formed, rows)))
        except ValueError:
            # A resample of sinks alone, or of equal rows, has no directions.
            continue
    values = _responses(found)
    n = len(np.unique(whose))

    def estimate(key: str) -> statistics.Estimate:
        known = np.array([row[key] for row in drawn if np.isfinite(row[key])])
        edges = (tuple(map(float, np.quantile(known, [0.025, 0.975])))
                 if len(known) >= RESAMPLES / 2 and n >= statistics.FEWEST else (np.nan, np.nan))
        return statistics.Estimate(values[key], edges, n,
                                   f"{len(known)} resamples of {n} prompts")

    details = {"components": len(found.components), "selected": list(found.selected())[:20],
               "toward the primary": list(found.toward())[:20]}
    ledger.decide("few_directions", estimate("share"), null=0.05, direction="below",
                  unit="of the components", figure="directions", details=details)
    ledger.decide("quadratic", estimate("slope"), null=2.0, direction="equal", tolerance=0.5,
                  unit="log-log slope", figure="directions")
    ledger.decide("one_sided", estimate("asymmetry"), null=10.0, unit="active over other side",
                  figure="directions")
    ledger.decide("median_direction", estimate("over_median"), null=20.0,
                  unit="strongest over median response", figure="directions")


def _responses(found: mlp_directions.MlpDirections) -> dict[str, float]:
    strongest = int(found.norm.amax(-1)[: len(found.sweep)].argmax())
    return {"share": len(found.selected()) / len(found.components),
            "slope": found.slope(strongest), "asymmetry": found.asymmetry(strongest),
            "over_median": found.top_over_median()}


def _relation(
    one: Subject, found: Result, formed: Result, ledger: Ledger, out: Output
) -> None:
    """Norm of the write against lifetime and score, sink by sink."""
    table = secondary.sinks(found).set_index(["prompt", "position"])
    rows = formed["is_sink"].values
    where = list(zip(formed["prompt"].values[rows], formed["position"].values[rows]))
    norm = formed["write_norm"].values[rows]
    pairs = {"norm_lifetime": ("lifetime", "lifetime (layers)"),
             "norm_score": ("score", "attention from later queries")}
    figure, axes = canvas(1, 2, width=PAGE)
    for ax, (key, (column, label)) in zip(axes, pairs.items()):
        outcome = table.loc[where, column].to_numpy(float)
        known = np.isfinite(outcome)
        x, y = norm[known], outcome[known]
        # Lifetimes are whole numbers and writes of one height: beside each other, not on one dot.
        aside = np.random.default_rng(0).uniform(-0.3, 0.3, len(y)) if column == "lifetime" else 0
        ax.plot(x, y + aside, "o", color=color("secondary"), markersize=3, alpha=0.6)
        if column == "lifetime":
            ax.yaxis.set_major_locator(MaxNLocator(integer=True))
            note(ax, "spread by up to 0.3 layers")
        ax.set(xlabel="norm of the MLP write", ylabel=label)
        relation = mlp_directions.norm_relation(x, y)
        if relation.reason:
            ledger.skip([key], relation.reason)
            continue
        prompts = np.array([where[i][0] for i in np.flatnonzero(known)])
        estimate = statistics.correlation(x, y, groups=prompts, resamples=2000)
        ledger.decide(key, estimate, null=0.0, figure="relation",
                      details={"sinks": relation.n, "p": relation.p})
        note(ax, f"Spearman {relation.rho:.2f}, n = {relation.n}")
    axes[0].set_title(one.name)
    out.figure("relation", figure, of=one.name)


def _removal(
    one: Subject, found: Result, ledger: Ledger, settings: Settings, out: Output
) -> None:
    keys = ("deletes", "leaves", "returns")
    try:
        edited = mlp_removal.intervene(one.model, one.prompts, found, seed=settings.seed,
                                       most=settings.pick(8, tiny=6))
    except (SiteRefused, ValueError) as error:
        ledger.skip(keys, str(error).rstrip("."))
        out.no_figure("removal", str(error), of=one.name)
        return
    out.save(f"removal-{one.name}", edited)
    own = edited.data.sel(edit="layer 0")
    others = {kind: {q: mlp_removal.control(edited, q, kind) for q in mlp_removal.QUANTITIES}
              for kind in ("positions", "layers")}
    prompts = edited["prompt"].values
    control = ("the same removal at as many ordinary positions, and at the sinks in random other "
               "layers, 5 draws each")
    worst = np.nanmax([others[kind]["deleted"] for kind in others], axis=0)
    ledger.decide("deletes", statistics.difference(own["deleted"], worst, groups=prompts), null=0.5,
                  unit="sinks deleted, minus the larger control", causal=True, control=control,
                  figure="removal", details={
                      str(name): float(np.nanmean(row)) for name, row in
                      zip(edited["edit"].values, edited["deleted"].values)
                      if str(name).startswith("layer ")})
    for key, quantity, direction in (("leaves", "on_sinks", "below"),
                                     ("returns", "on_content", "above")):
        known = np.isfinite(own[quantity].values) & np.isfinite(others["positions"][quantity])
        if not known.any():
            ledger.skip([key], "no query comes after the sinks")
            continue
        before = edited[quantity].sel(edit="none").values
        ledger.decide(key, statistics.difference(
            own[quantity].values[known], others["positions"][quantity][known],
            groups=prompts[known]), null=0.0, direction=direction, causal=True, control=control,
            unit="attention, minus the control at other positions", figure="removal", details={
                "untouched": float(np.nanmean(before)),
                "without the write": float(np.nanmean(own[quantity])),
                "on the primary without it": float(np.nanmean(own["on_primary"]))})
    figure, axes = canvas(1, 3, width=PAGE, height=2.6)
    for ax, quantity in zip(axes, ("survival", "on_sinks", "on_content")):
        mlp_removal.draw(edited, ax, quantity)
    axes[0].set_title(one.name)
    out.figure("removal", figure, of=one.name)


# -- card 4: massive activations ------------------------------------------------------------------


def _massive(one: Subject, ledger: Ledger, settings: Settings, out: Output) -> None:
    prompts = [p if len(p) <= 1024 else type(p)(p.ids[:1024]) for p in one.prompts]
    found = massive.measure(one.model, prompts)
    out.save(f"massive-{one.name}", found)
    figure, ax = canvas(1, 1)
    massive.draw(found, ax)
    ax.set_title(one.name)
    out.figure("massive", figure, of=one.name)
    table = massive.activations(found)
    top, median = found["top"].values[..., 0], found["median"].values
    if table.empty:
        ratio = float((top / median).max())
        reason = (f"no activation of {one.name} is massive: the largest is {ratio:,.0f} times the "
                  f"median of its layer ({found.manifest['min_ratio']:,.0f} is needed"
                  + (f", and a size of {found.manifest['min_value']:g})"
                     if found.manifest["min_value"] else ")"))
        ledger.skip(("few_massive", "same_dims", "start_token", "early_jump", "vanish",
                     "mean_loss", "zero_loss", "zero_changes", "attracts"), reason)
        out.no_figure("massive_edits", reason, of=one.name)
        return
    n_prompts = len(prompts)
    rule = {"threshold": f"|h| > {found.manifest['min_value']:g} and "
            f"{found.manifest['min_ratio']:g} times the median"}
    most = table.groupby(["prompt", "layer"]).size().groupby("prompt").max()
    ledger.decide("few_massive", statistics.mean(
        most.reindex(range(n_prompts), fill_value=0).to_numpy(float)), null=4.5, direction="below",
        unit="in the layer with most", figure="massive", details=rule)
    dims = [frozenset(table["dim"][table["prompt"] == i]) for i in table["prompt"].unique()]
    usual = max(dims, key=dims.count)
    ledger.decide("same_dims", statistics.rate(dims.count(usual), len(dims)), null=0.8,
                  unit="of prompts that have any",
                  details={"dimensions": sorted(map(int, usual)), **rule})
    at_start = np.array([_is_start(one, prompts[p], int(x))
                         for p, x in zip(table["prompt"], table["position"])])
    ledger.decide("start_token", statistics.mean(at_start.astype(float),
                                                 groups=table["prompt"].to_numpy()),
                  null=0.9, unit="of massive activations", details={
                      "positions": sorted(set(map(int, table["position"])))[:10]})
    before = np.concatenate([np.full((n_prompts, 1), np.nan), top[:, :-1]], 1)
    early = max(1, int(np.ceil(0.25 * one.model.n_layers)))
    # The first block has nothing before it: it is compared with the median it leaves.
    before[:, 0] = median[:, 0]
    ledger.decide("early_jump", statistics.mean((top / before)[:, :early].max(1)), null=10.0,
                  unit="times, within the first quarter", figure="massive", details={
                      "block": int((top / before)[:, :early].mean(0).argmax())})
    highest = top[:, :-1].max(1) if top.shape[1] > 1 else top[:, 0]
    ledger.decide("vanish", statistics.mean(top[:, -1] / highest), null=0.5, direction="below",
                  unit="last block over the largest", figure="massive")
    _attracts(found, ledger)
    _massive_edits(one, prompts, found, ledger, settings, out)


def _is_start(one: Subject, prompt: Any, position: int) -> bool:
    """Whether this is the first token, or the first delimiter (full stop, line end, semicolon)."""
    if position == 0 or one.model.tokenizer is None:
        return position == 0
    decode: Callable[[list[int]], str] = one.model.tokenizer.decode
    for at, token in enumerate(prompt.ids):
        text = decode([token])
        if at and ("\n" in text or text.strip() in (".", ";", "\n")):
            return at == position
    return False


def _attracts(found: Result, ledger: Ledger) -> None:
    """Rank correlation of a position's largest coordinate with what it receives one block on."""
    top = found["top"].values[..., 0] / found["median"].values
    layer = int(top[:, :-1].mean(0).argmax()) if top.shape[1] > 1 else 0
    rhos = []
    for number in range(top.shape[0]):
        # Late keys average few queries: the first half only.
        half = slice(0, int(found["length"][number]) // 2)
        peak = found["peak"].values[number, layer, half]
        received = found["received"].values[number, min(layer + 1, top.shape[1] - 1), half]
        if np.isfinite(received).all() and np.ptp(received) and np.ptp(peak):
            rhos.append(mlp_directions.norm_relation(peak, received, 3).rho)
    if rhos:
        ledger.decide("attracts", statistics.mean(rhos), null=0.0, unit="Spearman over positions",
                      figure="massive", details={"block": layer, "attention of block": layer + 1})
    else:
        ledger.skip(["attracts"], "the attention of that block cannot be read")


def _massive_edits(
    one: Subject, prompts: list, found: Result, ledger: Ledger, settings: Settings, out: Output
) -> None:
    some = [p if len(p) <= 512 else type(p)(p.ids[:512]) for p in prompts]
    chosen = massive.activations(found)
    keep = chosen[[x < len(some[p]) for p, x in zip(chosen["prompt"], chosen["position"])]]
    try:
        if keep.empty:
            raise ValueError("all massive activations lie beyond position 512.")
        edited = massive.intervene(one.model, some[: settings.pick(12, tiny=6)],
                                   _only(found, keep, settings.pick(12, tiny=6)),
                                   seed=settings.seed)
    except (SiteRefused, ValueError) as error:
        ledger.skip(("mean_loss", "zero_loss", "zero_changes"), str(error).rstrip("."))
        out.no_figure("massive_edits", str(error), of=one.name)
        return
    out.save(f"massive-edits-{one.name}", edited)
    loss, kl = edited["loss"], edited["kl"]
    medians = [str(e) for e in edited["edit"].values if str(e).startswith("median")]
    control = "as many coordinates of median size set to zero, 5 draws"
    details = {"layer": edited.manifest["layer"], "loss": {
        name: float(loss.sel(edit=name).mean()) for name in ("none", "zero", "mean")}}
    base = float(loss.sel(edit="none").mean())
    if base > CHANCE_LOSS * np.log(one.model.d_vocab):
        ledger.skip(("mean_loss", "zero_loss"), f"{one.name} predicts these prompts no better than "
                    f"chance: loss {base:.2f} nats, the logarithm of its vocabulary is "
                    f"{np.log(one.model.d_vocab):.2f}")
    else:
        if one.planted:
            ledger.skip(["zero_loss"], f"the massive activations of {one.name} were planted; "
                        "training has built nothing on them")

        def gap(name: str) -> np.ndarray:
            return (loss.sel(edit=name) - loss.sel(edit="none")).values

        ledger.decide("mean_loss", statistics.mean(gap("mean")), null=0.0, direction="equal",
                      tolerance=0.02, unit="nats", causal=True, control=control,
                      figure="massive_edits", details=details)
        if not one.planted:
            usual = np.mean([gap(name) for name in medians], axis=0)
            ledger.decide("zero_loss", statistics.difference(gap("zero"), usual), null=0.02,
                          unit="nats above the control", causal=True, control=control,
                          figure="massive_edits", details=details)
    usual = kl.sel(edit=medians).mean("edit").values
    ledger.decide("zero_changes", statistics.difference(kl.sel(edit="zero").values, usual),
                  null=0.0, unit="nats of KL above the control", causal=True, control=control,
                  figure="massive_edits", details={"layer": edited.manifest["layer"]})
    figure, axes = canvas(1, 2, width=PAGE, height=2.2)
    bars: Mapping[str, Any] = {"to zero": ["zero"], "to the mean": ["mean"],
                               "median size to zero": medians}
    for ax, array, label in zip(axes, (loss - loss.sel(edit="none"), kl),
                                ("change of the loss (nats)", "KL to untouched (nats)")):
        for at, (word, edits) in enumerate(bars.items()):
            per_prompt = array.sel(edit=edits).mean("edit").values
            ax.bar(at, per_prompt.mean(), width=0.7,
                   color=color("control" if "median" in word else "primary"))
            ax.plot(np.full(len(per_prompt), at), per_prompt, ".", color="black", markersize=2,
                    alpha=0.4)
        ax.set_xticks(range(len(bars)), list(bars))
        ax.set_ylabel(label)
        note(ax, f"n = {array.sizes['prompt']} prompts")
    axes[0].set_title(f"{one.name}: massive activations leaving block {edited.manifest['layer']}")
    out.figure("massive_edits", figure, of=one.name)


def _only(found: Result, keep: pd.DataFrame, count: int) -> Result:
    """The result with these activations alone, of the first prompts."""
    keep = keep[keep["prompt"] < count]
    data = found.data.drop_vars([f"activation_{name}" for name in massive.COLUMNS])
    for name, kind in massive.COLUMNS.items():
        data[f"activation_{name}"] = ("activation", keep[name].to_numpy(kind))
    return Result(data, found.manifest)


# -- figures --------------------------------------------------------------------------------------


def _norms(one: Subject, found: Result, out: Output) -> None:
    figure, axes = canvas(1, 3, width=PAGE, height=2.4)
    for ax, quantity in zip(axes, ("key_norm", "value_norm", "residual_in")):
        if np.isfinite(found["norm" if quantity == "residual_in" else quantity].values).any():
            secondary.draw(found, ax, quantity)
        else:
            ax.text(0.5, 0.5, "cannot be read", ha="center", transform=ax.transAxes)
        if ax is not axes[0] and ax.get_legend():
            ax.get_legend().remove()
    axes[0].set_title(one.name)
    out.figure("norms", figure, of=one.name)


def _levels(one: Subject, found: Result, out: Output) -> None:
    figure, ax = canvas(1, 1, width=4.2, height=3.2)
    secondary.draw(found, ax, "levels")
    ax.set_title(f"{one.name}: {found.manifest['rule']} rule")
    out.figure("levels", figure, of=one.name)


def _draw_directions(
    one: Subject, formed: Result, found: mlp_directions.MlpDirections, out: Output
) -> None:
    figure, axes = canvas(2, 2, width=PAGE, height=4.6)
    numbers = np.arange(1, len(found.components) + 1)
    for column, sign in enumerate("+-"):
        axes[0, 0].plot(numbers, found.norm[:, column], ".", label=f"{sign} component")
        axes[0, 1].plot(numbers, found.cosine[:, column], ".", label=f"{sign} component")
    axes[0, 0].set(yscale="log", xlabel="principal component", ylabel="norm of the MLP output")
    axes[0, 1].set(xlabel="principal component", ylabel="cosine to the primary's output",
                   ylim=(-1.08, 1.08))
    for ax in axes[0]:
        ax.legend()
    for row, swept in enumerate(found.sweep):
        axes[1, 0].plot(found.scales, swept, label=f"{row + 1}")
    axes[1, 0].set(xlabel="scale of the component", ylabel="norm of the MLP output")
    axes[1, 0].legend(title="component", ncols=2)
    both = [("secondary sinks", found.sink_projection, "secondary"),
            ("ordinary positions", found.other_projection, "control")]
    values = np.concatenate([p[:, 0].numpy() for _, p, _ in both])
    bins = np.linspace(values.min(), values.max(), 31)
    for name, projection, role in both:
        axes[1, 1].hist(projection[:, 0].numpy(), bins=bins, alpha=0.7, color=color(role),
                        label=name)
    axes[1, 1].set(xlabel="projection on component 1", ylabel="positions")
    axes[1, 1].set_ylim(top=1.4 * axes[1, 1].get_ylim()[1])
    axes[1, 1].legend(ncols=2, loc="upper center")
    axes[0, 0].set_title(f"{one.name}: MLP of block {formed.manifest['creation_layer']}")
    out.figure("directions", figure, of=one.name)
    out.save(f"directions-{one.name}", Result(xr.Dataset({
        "norm": (("component", "sign"), found.norm.numpy()),
        "cosine": (("component", "sign"), found.cosine.numpy()),
        "sweep": (("swept", "scale"), found.sweep.numpy()),
    }, {"sign": ["+", "-"], "scale": list(found.scales)}), formed.manifest))
