"""Retrieval heads (arXiv:2404.15574): which heads copy a needle out of a haystack, and without them?

By default on the bundled reader, whose language states facts and asks for them; with `--model` on
any decoder with a tokenizer. Heads are found on some prompts and tested on others.
"""

from typing import Any

import numpy as np
import pandas as pd
import xarray as xr
from scipy import stats

import interp
from experiments import _needles
from experiments._output import Output
from experiments._paper import Paper, Settings, SettingsError
from experiments._retrieval_figures import draw_all, draw_similarity
from interp.causal import sweep as causal
from interp.causal.ablate import mean_output
from interp.causal.cells import subfolder
from interp.causal.metrics import AnswerAccuracy, AnswerLogProb, AnswerRecall
from interp.core import Claim, Result, statistics
from interp.heads import retrieval
from interp.prompts.needle import Needle

PAPER = Paper(
    "retrieval_heads",
    "Retrieval Head Mechanistically Explains Long-Context Factuality",
    ("2404.15574",),
    "Which heads copy a fact from anywhere in a long context, and what is lost without them?",
    figures={
        "niah": "Needle in a haystack: share of the answer's tokens recalled, by prompt length and "
        "depth of the needle, for the model as it is and with heads ablated while it answers.",
        "bins": "Share of heads in the paper's bins of the retrieval score.",
        "ranks": "Heads by rank: retrieval score and activation frequency; dashed, the score "
        "expected by chance.",
        "map": "Retrieval score of every head, in the paper's bins.",
        "similarity": "Pearson correlation of the score maps of models of one shape.",
        "sweep": "Needle accuracy (upper rows) and added loss of neutral text (lower row) against "
        "the number of ablated heads, for three kinds of ablation; in gray random heads of the "
        "same layers (open circles: from any layer, where the layers have too few others).",
        "sink": "Attention of the top heads on the first token and on the needle, in prompts that "
        "succeed and in prompts that fail.",
    },
    models=("reader",),
    long=True,
)
(SOURCE,) = PAPER.sources

KINDS = ("zero", "mean", "uniform")
PHASES = ("decode", "all")
SPARSE, STRONG = 8.0, 5.0
"""Percent of heads: the upper edges of the paper's shares, with its spread over models."""

SENTENCES = {
    "sparse": "Retrieval heads are few: at most 8 % of heads reach a score of 0.1.",
    "strong": "Fewer than 5 % of heads reach a score of 0.5.",
    "zero": "At least 45 % of heads never retrieve.",
    "always": "Some heads retrieve in every context (three or more).",
    "dynamic": "How often a head is active is not just its score: the two rank heads "
    "differently.",
    "chance": "The top head points at the emitted token more often than by chance.",
    "intrinsic": "A model and its derivative share their retrieval heads.",
    "area": "Over all numbers of heads, ablating the top heads causes lower needle accuracy than "
    "ablating random ones.",
    "specific": "Ablating retrieval heads costs more on the needle than on neutral text, beyond "
    "what random heads cost.",
    "graded": "Retrieval is first incomplete, and lost only when more heads are ablated.",
    "signature": "When the model fails, its retrieval heads look at the first token instead.",
    "extract": "Without retrieval heads, extractive question answering loses F1.",
    "cot": "Chain-of-thought reasoning needs retrieval heads, answering without it does not.",
}


def causes(by: str, phase: str) -> str:
    """The sentence on one kind of ablation."""
    where = "while it answers" if phase == "decode" else "in prompt and answer"
    return f"Ablating the top heads by {by} {where} causes more lost needles than random heads."


def run(settings: Settings, out: Output) -> None:
    """Every model in turn, then the models of one shape against each other."""
    maps: dict[str, xr.DataArray] = {}
    for name in settings.models(PAPER):
        model = interp.open_model(name, **settings.opening())
        if model.kind != "decoder":
            raise SettingsError(
                f"{model.name} is an encoder: it says nothing, and retrieval heads are found while "
                "a model speaks; give a decoder."
            )
        found = _one(model, settings, out)
        if found is not None:
            maps[model.name] = found
    _intrinsic(maps, settings, out)


def _one(model: Any, settings: Settings, out: Output) -> Any:
    sizes = _needles.lengths(model, settings)
    reason = _needles.too_short(model, sizes)
    if reason:
        out.record(model)
        _give_up(model, reason, out)
        return None
    depths = settings.pick((0.0, 0.25, 0.5, 0.75, 1.0), tiny=(0.0, 0.5, 1.0))
    detect = _needles.needles(model, sizes["detect"], depths, settings.rng(1),
                              each=settings.pick(2, tiny=1))
    failing = _needles.needles(model, sizes["fail"], depths, settings.rng(2))
    prompts = [one.prompt for one in detect + failing]
    out.record(model, prompts, f"detect-{model.name}")
    # Heads are scored on the detection prompts; those beyond what the model masters show failures.
    found = retrieval.measure(model, prompts[: len(detect)])
    longer = retrieval.measure(model, prompts[len(detect) :]) if failing else None
    out.save(f"scores-{model.name}", found)
    if longer is not None:
        out.save(f"longer-{model.name}", longer)
    if not found.manifest["n_kept"]:
        reason = (f"none of {len(detect)} prompts passed the success filter: {model.name} does not "
                  "retrieve")
        _give_up(model, reason, out)
        return None
    scores = retrieval.scores_of(found)
    out.table(f"heads-{model.name}", scores.to_dataframe())
    _scores(model, found, scores, out)
    test = _needles.needles(model, sizes["test"], depths, settings.rng(3), each=2)
    sweeps, top = _sweeps(model, test, scores, settings, out)
    _causal(model, sweeps, top, out)
    sink = _signature(model, [found] + ([longer] if longer is not None else []), scores, out)
    grid = _grid(model, sizes["grid"], depths, sweeps, top, settings, out)
    draw_all(model, found, scores, sweeps, top, grid, sink, out)
    return found["score"]


def _give_up(model: Any, reason: str, out: Output) -> None:
    for key, sentence in SENTENCES.items():
        if key != "intrinsic":
            out.claim(Claim.untestable(sentence, SOURCE, reason), model.name)
    for name in ("niah", "bins", "ranks", "map", "sweep", "sink"):
        out.no_figure(name, f"{reason}.", of=model.name)


def _scores(model: Any, found: Result, scores: Any, out: Output) -> None:
    """Claims on the scores alone; intervals over prompts."""
    samples = scores.samples.values
    n = len(samples)
    flat = samples.reshape(n, -1)
    always = np.isclose(found["frequency"].values, 1.0)
    more = {"figure": "bins", "details": {
        "share >= 0.1 (%)": 100 * float((found["score"] >= retrieval.RETRIEVAL).mean()),
        "share >= 0.5 (%)": 100 * float((found["score"] >= retrieval.STRONG).mean()),
        "share = 0 (%)": 100 * float((found["score"] == 0).mean()),
        "heads": model.n_layers * model.n_heads, "prompts kept": n,
        "prompts": found.manifest["n_prompts"],
        "top": {str(h): round(scores[h], 3) for h in scores.top(10)}}}

    def share(edge: float) -> Any:
        def percent(*columns: np.ndarray) -> float:
            return 100 * float((columns[0].mean(0) >= edge).mean())
        return percent

    def claim(key: str, estimate: Any, **given: Any) -> None:
        out.claim(Claim(SENTENCES[key], SOURCE, **estimate.for_claim(), **{**more, **given}),
                  model.name)

    claim("sparse", statistics.bootstrap(share(retrieval.RETRIEVAL), flat, name="share of heads",
                                         resamples=2000),
          null=SPARSE, direction="below", unit="%", paper_number="3 to 6 % of heads")
    claim("strong", statistics.bootstrap(share(retrieval.STRONG), flat, name="share of heads",
                                         resamples=2000),
          null=STRONG, direction="below", unit="%", paper_number="below 5 %")
    claim("zero", statistics.bootstrap(
        lambda x: 100 * float((x.max(0) == 0).mean()), flat, name="share of heads",
        resamples=2000), null=45.0, unit="%", paper_number="45 to 73 % of heads at exactly 0")
    claim("always", statistics.bootstrap(
        lambda x: float((x > 0).all(0).sum()), flat, name="number of heads", resamples=2000),
        null=2.5, unit="heads", figure="ranks",
        paper_number="12 (Llama-2-7B-80K), 36 (Yi) heads",
        details={"always": [str(interp.Head(*map(int, h))) for h in np.argwhere(always)]})

    def spearman(x: np.ndarray) -> float:
        score, active = x.mean(0), (x > 0).mean(0)
        if np.ptp(score) == 0 or np.ptp(active) == 0:
            return float("nan")
        return float(np.corrcoef(stats.rankdata(score), stats.rankdata(active))[0, 1])

    active = found["frequency"].values > 0
    claim("dynamic", statistics.bootstrap(
        spearman, flat, name="Spearman correlation of score and frequency over heads",
        resamples=2000), null=1.0, direction="below", figure="ranks", details={
            "mean gap, frequency minus score, of active heads": float(
                (found["frequency"] - found["score"]).values[active].mean()),
            "frequency above 0.5, score below 0.1": [
                str(interp.Head(*map(int, h))) for h in np.argwhere(
                    (found["frequency"].values > 0.5) & (found["score"].values < 0.1))]})
    (best,) = scores.top(1)
    at = {"layer": best.layer, "head": best.head}
    own = scores.samples.sel(at).values
    level = max(float(found["null"].sel(at)), float(np.nan_to_num(found["shuffled"].sel(at))))
    claim("chance", statistics.mean(own), null=level, figure="ranks", details={
        "head": str(best), "chance of a random key": float(found["null"].sel(at)),
        "same keys in other steps": float(found["shuffled"].sel(at))})


def _sweeps(
    model: Any, test: list[Needle], scores: Any, settings: Settings, out: Output
) -> tuple[dict[tuple[str, str], Result], int]:
    """Top against random heads, for every kind of ablation and phase; and the size of the top."""
    prompts, answers = [one.prompt for one in test], [one.answer for one in test]
    out.record(None, prompts, f"test-{model.name}")
    total = model.n_layers * model.n_heads
    strong = int((scores.scores >= retrieval.RETRIEVAL).sum())
    if total <= 64:
        counts = {0, 1, 2, 3, 4, 6, strong}
    else:
        counts = {0, *(round(total * share) for share in (.005, .01, .02, .05, .1)), strong}
    most = len(scores.top(total))
    counts = sorted(c for c in counts if c <= most // 2) if not settings.tiny else sorted(
        {0, 1, max(1, min(strong, most // 2))})
    top = max(c for c in counts if c <= max(1, strong))
    value = mean_output(model, prompts)
    metrics = [AnswerAccuracy(answers, decode_last=True), AnswerLogProb(answers, decode_last=True),
               _needles.neutral(model, len(prompts), settings.rng(4))]
    found = {}
    kinds = settings.pick(KINDS, tiny=("zero", "uniform"))
    for by in kinds:
        for phase in PHASES:
            extra = [AnswerRecall(answers, decode_last=True)] * ((by, phase) == ("uniform",
                                                                                 "decode"))
            found[by, phase] = causal.ablation_sweep(
                model, prompts, [*metrics, *extra], scores, counts=counts, by=by, phase=phase,
                seeds=5, value=value if by == "mean" else None,
                folder=subfolder(out.cache / "cells", model, prompts) if out.cache else None)
            out.save(f"sweep-{by}-{phase}-{model.name}", found[by, phase])
    return found, top


def control(found: Result, count: int) -> str:
    """What the random heads of a sweep share with the top ones."""
    sets = causal.random_sets(found, count)
    many = f"{sets} different sets" if sets > 1 else "the only set there is"
    return f"random heads of the same layers, {many}" if found["layer_matched"].sel(
        count=count) else f"as many random heads from any layer, {many} (the top fills its layers)"


def _causal(
    model: Any, sweeps: dict[tuple[str, str], Result], top: int, out: Output
) -> None:
    number = "all models below 50 at K = 50 (about 5 % of heads)"
    for by in KINDS:
        for phase in PHASES:
            if (by, phase) not in sweeps:
                out.claim(Claim.untestable(causes(by, phase), SOURCE,
                                           "a --tiny run leaves this kind out"), model.name)
                continue
            found = sweeps[by, phase]
            accuracy = found["accuracy"].sel(count=top).mean(("seed", "prompt"))
            out.claim(Claim(
                causes(by, phase), SOURCE,
                **causal.difference(found, "accuracy", top).for_claim(), null=0.0,
                direction="below", unit="accuracy, top minus random", causal=True,
                control=control(found, top), figure="sweep",
                paper_number=number if (by, phase) == ("uniform", "decode") else "", details={
                    "heads": top, "ablated": found.manifest["top"][:top],
                    "top": float(accuracy.sel(condition="top")),
                    "random": float(accuracy.sel(condition="random")),
                    "log probability, top minus random": float(
                        causal.difference(found, "log_prob", top).value),
                    "neutral loss, top minus random": float(
                        causal.difference(found, "neutral_loss", top).value)}), model.name)
    found = sweeps["uniform", "decode"]
    more: dict[str, Any] = {"causal": True, "figure": "sweep"}
    out.claim(Claim(
        SENTENCES["area"], SOURCE, **statistics.difference(
            causal.area(found, "accuracy", "top"), causal.area(found, "accuracy", "random"),
        ).for_claim(), null=0.0, direction="below", unit="mean accuracy over counts",
        control=control(found, int(found["count"].max())), paper_number=number, **more),
        model.name)
    for by, phase in sweeps:
        one = sweeps[by, phase]
        lost = {c: one.data.sel(condition=c, count=top).mean("seed")
                for c in ("top", "random")}
        needle = (lost["random"]["log_prob"] - lost["top"]["log_prob"]).values
        text = (lost["top"]["neutral_loss"] - lost["random"]["neutral_loss"]).values
        out.claim(Claim(
            f"{SENTENCES['specific'][:-1]} ({by}, {phase}).", SOURCE,
            **statistics.difference(needle, text).for_claim(), null=0.0,
            unit="nats per token", control=control(one, top), details={
                "needle": float(needle.mean()), "neutral text": float(text.mean())}, **more),
            model.name)
    recall = found["recall"].sel(condition="top").isel(seed=0).transpose("prompt", "count")
    counts = recall["count"].values
    below = [np.where((recall.values < edge).any(1), (recall.values < edge).argmax(1), -1)
             for edge in (0.9, 0.1)]
    both = (below[0] >= 0) & (below[1] >= 0)
    if both.sum() < statistics.FEWEST:
        out.claim(Claim.untestable(
            SENTENCES["graded"], SOURCE, f"only {int(both.sum())} prompts lose the needle wholly "
            "within the numbers of heads ablated here"), model.name)
        return
    out.claim(Claim(
        SENTENCES["graded"], SOURCE, **statistics.difference(
            counts[below[1][both]], counts[below[0][both]]).for_claim(), null=0.0,
        unit="heads ablated between recall below 0.9 and below 0.1", figure="sweep",
        control="the same prompts with fewer heads ablated", details={
            "share partial by count": {int(c): float(((r >= 0.1) & (r < 0.9)).mean())
                                       for c, r in zip(counts, recall.values.T)},
            "share lost by count": {int(c): float((r < 0.1).mean())
                                    for c, r in zip(counts, recall.values.T)}}), model.name)


def _signature(model: Any, parts: list[Result], scores: Any, out: Output) -> xr.Dataset:
    """Attention of the top heads on token 0 and on the needle, in every prompt."""
    count = min(10, int((scores.scores >= retrieval.RETRIEVAL).sum()) or 1)
    chosen = scores.top(count)
    rows = {name: np.concatenate([
        np.mean([part[name].sel(layer=h.layer, head=h.head).values for h in chosen], 0)
        for part in parts]) for name in ("on_first", "on_needle")}
    failed = ~np.concatenate([part["kept"].values for part in parts])
    data = xr.Dataset({k: ("sample", v) for k, v in rows.items()})
    data["failed"] = "sample", failed
    if min(failed.sum(), (~failed).sum()) < statistics.FEWEST:
        out.claim(Claim.untestable(
            SENTENCES["signature"], SOURCE, f"{int(failed.sum())} of {len(failed)} prompts fail; "
            f"{statistics.FEWEST} of either kind are needed"), model.name)
    else:
        def gap(x: np.ndarray, lost: np.ndarray) -> float:
            lost = lost > 0.5
            return float(x[lost].mean() - x[~lost].mean()) if 0 < lost.sum() < len(lost) \
                else float("nan")

        p = stats.mannwhitneyu(rows["on_first"][failed], rows["on_first"][~failed],
                               alternative="greater").pvalue
        out.claim(Claim(
            SENTENCES["signature"], SOURCE, **statistics.bootstrap(
                gap, rows["on_first"], failed.astype(float), resamples=2000,
                name="mean attention on token 0, failed minus successful").for_claim(),
            null=0.0, figure="sink", control="prompts that succeed", details={
                "failed": int(failed.sum()), "heads": [str(h) for h in chosen],
                "Mann-Whitney p": float(p),
                "on token 0, failed": float(rows["on_first"][failed].mean()),
                "on token 0, successful": float(rows["on_first"][~failed].mean()),
                "on the needle, failed": float(rows["on_needle"][failed].mean()),
                "on the needle, successful": float(rows["on_needle"][~failed].mean()),
                "not matched": "failing prompts are longer"}), model.name)
    reason = f"it needs {{}}; {model.name} was asked for needles only"
    out.claim(Claim.untestable(
        SENTENCES["extract"], SOURCE, reason.format("an extractive question-answering set"),
        paper_number="F1 -9.2 and -23.1"), model.name)
    out.claim(Claim.untestable(
        SENTENCES["cot"], SOURCE, reason.format("reasoning tasks with and without chain of "
                                                "thought (MMLU, MuSiQue, GSM8K)")), model.name)
    return data


def _grid(
    model: Any, sizes: Any, depths: Any, sweeps: dict, top: int, settings: Settings, out: Output
) -> Any:
    """Recall over lengths x depths: as it is, without the top heads, without random ones."""
    if not out.wants("niah"):
        return None
    each = settings.pick(2, tiny=1)
    made = _needles.needles(model, sizes, depths, settings.rng(5), each=each)
    metric = AnswerRecall([one.answer for one in made], decode_last=True)
    held = sweeps["uniform", "decode"].manifest
    sets = {"no heads ablated": (), f"top {top} ablated": held["top"][:top],
            f"{top} random ablated": held["random"][f"0/{top}"]}
    values = causal.evaluate(
        model, [one.prompt for one in made], [metric],
        [interp.ablate(heads, "uniform", "decode") if heads else () for heads in sets.values()])
    shape = (len(sets), len(sizes), len(depths), each)
    data = xr.Dataset(
        {"recall": (("condition", "length", "depth", "sample"),
                    values[metric.name].reshape(shape))},
        {"condition": list(sets), "length": list(sizes), "depth": [100 * d for d in depths]})
    result = Result(data, {**model.manifest(), "by": "uniform", "phase": "decode"})
    out.save(f"niah-{model.name}", result)
    return result


def _intrinsic(maps: dict[str, xr.DataArray], settings: Settings, out: Output) -> None:
    pairs = [(a, b) for i, a in enumerate(maps) for b in list(maps)[i + 1 :]
             if maps[a].shape == maps[b].shape]
    number = "Pearson above 0.8 within a family, below 0.1 across"
    if not pairs:
        reason = ("it needs two models of one shape, a base and its derivative "
                  "(--model A --model B); this run scored "
                  f"{', '.join(maps) or 'none'}")
        out.claim(Claim.untestable(SENTENCES["intrinsic"], SOURCE, reason, paper_number=number))
        out.no_figure("similarity", f"{reason}.")
        return
    for a, b in pairs:
        x, y = (maps[name].values.ravel() for name in (a, b))
        known = np.isfinite(x) & np.isfinite(y)
        x, y = x[known], y[known]
        r = float(np.corrcoef(x, y)[0, 1])
        rng = settings.rng(6)
        null = [float(np.corrcoef(x, rng.permutation(y))[0, 1]) for _ in range(2000)]
        z, width = np.arctanh(np.clip(r, -0.999999, 0.999999)), 1.96 / np.sqrt(max(len(x) - 3, 1))
        k = min(30, len(x))
        common = set(np.argsort(-x, kind="stable")[:k]) & set(np.argsort(-y, kind="stable")[:k])
        out.claim(Claim(
            SENTENCES["intrinsic"], SOURCE, measured=r, n=len(x),
            null=max(0.8, float(np.quantile(null, 0.99))), paper_number=number,
            interval=(float(np.tanh(z - width)), float(np.tanh(z + width))),
            statistic="Pearson correlation over heads, Fisher interval", figure="similarity",
            control="heads of one model permuted", details={
                "models": [a, b], "99 % of permutations below": float(np.quantile(null, 0.99)),
                "Jaccard of the top 30": len(common) / (2 * k - len(common))}))
    draw_similarity(maps, out)


def table(found: Result) -> pd.DataFrame:
    """The heads of a saved result, best first."""
    return retrieval.scores_of(found).to_dataframe()
