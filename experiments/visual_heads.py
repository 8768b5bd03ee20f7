"""Visual heads (arXiv:2412.18108): which heads look at the image, how selectively, and who cares.

On `looker` as it was trained, on a copy with planted visual sinks (where weight and concentration
mislead), and on any vision-language model with a processor.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
from scipy import stats

from experiments import _picture_questions as questions
from experiments._output import Output
from experiments._paper import Paper, Settings
from experiments._picture_questions import Asked
from interp.causal.metrics import AnswerAccuracy, AnswerLogProb
from interp.causal.sweep import ablation_sweep, difference, effect
from interp.core import Claim, Head, HeadScores, OutOfRange, Result, statistics
from interp.figures import head_grid, image_overlay, layer_curve
from interp.figures.style import PAGE, canvas, color
from interp.heads import visual
from interp.models.model import Model
from interp.sinks import visual as visual_sinks
from interp.stream.reducers import Received

PAPER = Paper(
    "visual_heads",
    "Unveiling Visual Perception in Language Models: An Attention Head Analysis Approach",
    ("2412.18108",),
    "Which heads look at the image, in which layers, and what is lost without them?",
    figures={
        "map": "Score W × C of every head in the row that predicts the first answer token, per kind "
        "of question (outlined: the ten best).",
        "plane": "Attention on the image against its concentration, one point per head; where "
        "there are sinks, with and without them.",
        "profile": "Mean weight and concentration of the heads of each layer.",
        "region": "Attention of the best head on pictures; the object that is asked for is "
        "outlined.",
        "stages": "Accuracy without the best heads of each stage, and without as many random heads "
        "of the same layers.",
        "variants": "Cosine of the head maps of two prompts that differ as said.",
    },
    models=("looker", questions.PLANTED),
    long=True,
)
SOURCE = PAPER.sources[0]
MIXED = ("color", "shape", "existence", "position", "read")

SENTENCES = {
    "depth": "Visual heads cluster in early and middle layers.",
    "late": "Many late heads can be removed without loss.",
    "correct": "Weight and concentration of the top heads predict whether an answer is right.",
    "models": "Across models, the scores of heads correlate with performance.",
    "overlay": "A box drawn around the object leaves the pattern of heads as it was.",
    "naming": "Naming the object changes the pattern of heads more than a drawn box does.",
    "families": "The pattern over depth holds across model families.",
    "region": "The top heads look at the object that is asked for.",
    "sinks": "Without removing sinks, concentration rewards heads that rest on sinks.",
    "causes": "Removing the top visual heads causes a larger loss than removing random heads.",
}
NUMBERS: dict[str, tuple[str, str]] = {"late": ("100 late heads", "secondary")}
PAPER_LATE = 100 / (12 * 32)
"""100 heads of the 12 late layers of a model with 32 layers of 32 heads."""


def run(settings: Settings, out: Output) -> None:
    profiles: dict[str, np.ndarray] = {}

    def give_up(name: str, reason: str) -> None:
        _give_up(name, reason, out)

    for model in questions.subjects(PAPER, settings, out, give_up, questions.NO_HEADS):
        profiles[model.name] = _One(model, settings, out).run()
    _families(profiles, out)


def _number(key: str) -> dict[str, str]:
    if key not in NUMBERS:
        return {}
    number, tag = NUMBERS[key]
    return {"paper_number": number, "paper_tag": tag}


def _give_up(
    name: str, reason: str, out: Output, figures: Sequence[str] = tuple(PAPER.figures),
    claims: Sequence[str] = tuple(k for k in SENTENCES if k not in ("models", "families")),
) -> None:
    for figure in figures:
        out.no_figure(figure, reason, of=name)
    for key in claims:
        out.claim(Claim.untestable(SENTENCES[key], SOURCE, reason, **_number(key)), name)


def _families(profiles: dict[str, np.ndarray], out: Output) -> None:
    """Claims about several models."""
    own = {name: p for name, p in profiles.items() if name != questions.PLANTED}
    out.claim(Claim.untestable(
        SENTENCES["models"], SOURCE,
        f"it needs at least 6 vision-language models to correlate, and this run has {len(own)}"))
    if len(own) < 2:
        out.claim(Claim.untestable(
            SENTENCES["families"], SOURCE,
            f"it needs two vision-language models of their own, and this run has {len(own)}; give "
            "several with --model"))
        return
    names, at = list(own), np.linspace(0, 1, 33)
    grids = {n: np.stack([np.interp(at, np.linspace(0, 1, len(row)), row) for row in own[n]])
             for n in names}
    rows = min(len(g) for g in grids.values())

    def agreement(*samples: np.ndarray) -> float:
        means = [s.mean(0) for s in samples]
        return float(np.mean([_spearman(a, b)
                              for i, a in enumerate(means) for b in means[:i]]))

    found = statistics.bootstrap(agreement, *(grids[n][:rows] for n in names), resamples=2000,
                                 name="mean Spearman correlation of layer profiles")
    out.claim(Claim(SENTENCES["families"], SOURCE, null=0.0, **found.for_claim(),
                    details={"models": names}))


class _One:
    """Everything about one model."""

    def __init__(self, model: Model, settings: Settings, out: Output) -> None:
        self.model, self.settings, self.out = model, settings, out
        self.count = settings.pick(64, tiny=8)

    def claim(self, key: str, estimate: Any, **more: Any) -> None:
        self.out.claim(Claim(SENTENCES[key], SOURCE, **{
            **estimate.for_claim(), **_number(key), **more}), self.model.name)

    def skip(self, key: str, reason: str) -> None:
        self.out.claim(
            Claim.untestable(SENTENCES[key], SOURCE, reason, **_number(key)), self.model.name)

    def run(self) -> np.ndarray:
        model, out = self.model, self.out
        mixed = questions.about_scenes(model, MIXED, self.count, self.settings.rng(1))
        kinds = {"mixed": mixed}
        for i, task in enumerate(("color", "shape", "read")):
            kinds[task] = questions.about_scenes(
                model, (task,), self.settings.pick(32, tiny=4), self.settings.rng(2, i))
        sinks = self._sinks(mixed)
        found = {}
        for kind, asked in kinds.items():
            out.record(model, questions.prompts(asked), f"{kind}-{model.name}")
            regions = [one.region for one in asked]
            found[kind] = visual.measure(
                model, questions.prompts(asked), seed=self.settings.seed,
                regions=regions if all(regions) else None,
                sinks=sinks if kind == "mixed" and sinks is not None else None)
        out.save(f"heads-{model.name}", found["mixed"])
        if out.wants("map"):
            self._map(found)
        self._plane(found["mixed"])
        self._profile(found["mixed"])
        self._depth(found["mixed"])
        self._sink_detector(found["mixed"])
        self._region(kinds["color"], found["color"])
        # The planted copy of looker is there for its sinks; the rest is asked of looker itself.
        if model.name != questions.PLANTED:
            self._variants()
            self._correct()
            self._ablate(mixed, found["mixed"])
        return found["mixed"]["samples"].mean("head").values

    # -- description --------------------------------------------------------------------------

    def _sinks(self, asked: list[Asked]) -> list[dict[int, tuple[int, ...]]] | None:
        """Visual and text sinks by layer of every prompt, None if the model has none."""
        some = questions.prompts(asked)
        texts = [questions.Prompt.from_tokens([
            i for p, i in enumerate(one.ids) if p not in set(one.positions("image"))])
            for one in some[: self.settings.pick(16, tiny=3)]]
        discovery = visual_sinks.find_sink_dims(
            self.model, texts, some[: self.settings.pick(16, tiny=3)], seed=self.settings.seed,
            n_null=self.settings.pick(200, tiny=20))
        self.no_sinks = ""
        if not discovery.found.dims:
            self.no_sinks = (f"no residual coordinate of {self.model.name} is massive at its first "
                             "token, so no image token can be told to be a sink")
            return None
        measured = visual_sinks.measure(self.model, some, discovery.found.dims)
        by_layer = [visual_sinks.sinks_by_layer(measured, i) for i in range(len(some))]
        if not any(set(places) & set(p.positions("image"))
                   for found, p in zip(by_layer, some) for places in found.values()):
            self.no_sinks = f"no image token of {self.model.name} is a sink in these pictures"
            return None
        return by_layer

    def _map(self, found: dict[str, Result]) -> None:
        kinds = [kind for kind in found if kind != "mixed"]
        figure, axes = canvas(1, len(kinds), width=PAGE, height=2.4, sharey=True)
        for ax, kind in zip(axes, kinds):
            scores = visual.head_scores(found[kind])
            values = scores.scores
            low, high = float(values.min()), float(values.max())
            head_grid.draw(ax, (values - low) / ((high - low) or 1.0), label="",
                           limits=(0, 1), eligible=scores.eligible, mark=scores.top(10),
                           bar=kind == kinds[-1])
            ax.set_title(f"{kind} questions")
            if kind != kinds[0]:
                ax.set_ylabel("")
        axes[-1].images[0].colorbar.set_label("W × C, scaled 0–1 per panel")
        figure.suptitle(self.model.name)
        self.out.figure("map", figure, of=self.model.name)

    def _plane(self, found: Result) -> None:
        suffixes = ["", "_nonsink"] if "weight_nonsink" in found.data else [""]
        figure, axes = canvas(1, len(suffixes), width=PAGE if len(suffixes) > 1 else 3.9,
                              height=2.6, squeeze=False, sharex=True, sharey=True)
        for ax, suffix in zip(axes[0], suffixes):
            visual.draw_plane(found, ax, suffix)
            ax.set_title("all image tokens" if not suffix else "without sinks")
        figure.suptitle(self.model.name)
        self.out.figure("plane", figure, of=self.model.name)

    def _profile(self, found: Result) -> None:
        figure, axes = canvas(1, 2, width=PAGE, height=2.1)
        for ax, name, label in ((axes[0], "weight", "attention on the image, W"),
                                (axes[1], "concentration", "concentration, C")):
            curves = {"all image tokens": found[name].mean("head")}
            roles = {"all image tokens": "image"}
            if f"{name}_nonsink" in found.data:
                curves["without sinks"] = found[f"{name}_nonsink"].mean("head")
                roles["without sinks"] = "visual"
            layer_curve.draw(ax, curves, label=label, roles=roles)
            if len(curves) > 1:
                low, high = ax.get_ylim()
                ax.set_ylim(low, high + 0.3 * (high - low))  # room for the legend
                ax.legend(loc="upper left", ncols=2)
        for edge in visual.stages(self.model.n_layers)[1:]:
            for ax in axes:
                ax.axvline(edge.start - 0.5, color="black", linewidth=0.6, linestyle=":")
        figure.suptitle(f"{self.model.name} (dotted: stages)")
        self.out.figure("profile", figure, of=self.model.name)

    def _depth(self, found: Result) -> None:
        """Center of mass over depth, heads that mostly rest on sinks left out."""
        eligible = found["eligible"].values.astype(bool)
        left_out = np.zeros_like(eligible)
        if "sink_share" in found.data:
            left_out = found["sink_share"].fillna(0).mean("sample").values > 0.5
        kept = eligible & ~left_out
        by = "samples_nonsink" if "samples_nonsink" in found.data else "samples"

        def center(samples: np.ndarray) -> float:
            return visual.center_of_mass(samples.mean(0), kept)

        scores = HeadScores.of(found[by].mean("sample").values, eligible=kept)
        top = scores.top(max(1, round(0.05 * kept.size)))
        thirds = visual.stages(self.model.n_layers)
        shares = [float(np.mean([head.layer in stage for head in top])) for stage in thirds]
        if not kept.any() or self.model.n_layers < 3:
            self.skip("depth", f"{self.model.name} has {self.model.n_layers} layers and "
                      f"{int(kept.sum())} heads to rank; depth means nothing there")
            return
        self.claim("depth", statistics.bootstrap(
            center, found[by].values, resamples=2000, name="center of mass of the score"),
            null=0.5, direction="below", figure="map", unit="relative depth", details={
                "best 5 % of heads": [str(h) for h in top],
                "their share in early, middle, late layers": shares,
                "heads left out because over half of their image attention is on sinks":
                    int(left_out.sum())})

    def _sink_detector(self, found: Result) -> None:
        if "sink_share" not in found.data:
            self.skip("sinks", self.no_sinks)
            return
        share = found["sink_share"].fillna(0).values
        gain = (found["concentration"] - found["concentration_nonsink"]).fillna(0).values
        flat = [x.reshape(len(x), -1) for x in (share, gain)]

        def across(a: np.ndarray, b: np.ndarray) -> float:
            return _spearman(a.mean(0), b.mean(0))

        self.claim("sinks", statistics.bootstrap(
            across, *flat, resamples=1000,
            name="Spearman over heads of sink share and C with sinks minus C without"),
            null=0.0, figure="plane", details={
                "mean C": float(found["concentration"].mean()),
                "mean C without sinks": float(found["concentration_nonsink"].mean()),
                "overlap of the ten best heads with and without sinks": len(
                    set(visual.head_scores(found).top(10))
                    & set(visual.head_scores(found, "samples_nonsink").top(10)))})

    def _region(self, asked: list[Asked], found: Result) -> None:
        if "region_share" not in found.data:
            reason = "the processor gives no pixel boxes for its tokens"
            self.out.no_figure("region", reason, of=self.model.name)
            self.skip("region", reason)
            return
        # Chosen on one half of the pictures, judged on the other.
        half = found.data.sizes["sample"] // 2
        first = Result(found.data.isel(sample=slice(half)), found.manifest)
        rest = found.data.isel(sample=slice(half, None))
        top = visual.head_scores(first).top(max(1, round(0.05 * self.model.n_layers
                                                         * self.model.n_heads)))
        share = np.mean([rest["region_share"].sel(layer=h.layer, head=h.head).fillna(0).values
                         for h in top], 0)
        size = np.array([len(one.region) / len(one.prompt.positions("image"))
                         for one in asked[half:]])
        every = rest["region_share"].fillna(0).mean(("layer", "head")).values
        self.claim("region", statistics.difference(share, size), null=0.0, figure="region", details={
            "heads": [str(h) for h in top], "all heads": float(every.mean()),
            "share of the image that the object covers": float(size.mean())},
            statistic="share of the image attention on the object minus its share of the image, "
            "heads chosen on other pictures")
        if not self.out.wants("region"):
            return
        figure, axes = canvas(1, 3, width=PAGE, height=2.4)
        self._overlay(axes, asked[half : half + 3], top[0])
        self.out.figure("region", figure, of=self.model.name)

    def _overlay(self, axes: Any, asked: list[Asked], head: Head) -> None:
        rows = []
        for one in asked:
            received = self.model.run(one.prompt, stats=[Received(subset=[len(one.prompt) - 1])],
                                      logits="none").stats["received"]
            row = received.sel(layer=head.layer).isel(prompt=0, head=head.head).values
            rows.append(row[list(one.prompt.of_kind("image")[0].positions)])
        most = float(np.nanmax(rows))
        for ax, one, row in zip(axes, asked, rows):
            image_overlay.draw(ax, one.picture, one.prompt.of_kind("image")[0], row,
                               label=f"attention of {head}", bar=ax is axes[len(asked) - 1],
                               limits=(0.0, most or 1.0),
                               mark={p: "question" for p in one.region})
            if ax.get_legend() is not None:
                ax.get_legend().remove()
            ax.set_title(one.text, fontsize=7)
        axes[0].figure.suptitle(self.model.name)

    # -- claims -------------------------------------------------------------------------------

    def _variants(self) -> None:
        count = self.settings.pick(32, tiny=6)
        asked = questions.variants(self.model, count, self.settings.rng(3))
        maps = {name: visual.measure(self.model, questions.prompts(some), permutations=0)["samples"]
                .values.reshape(count, -1) for name, some in asked.items()}

        def cosine(a: np.ndarray, b: np.ndarray) -> np.ndarray:
            return (a * b).sum(1) / np.maximum(
                np.linalg.norm(a, axis=1) * np.linalg.norm(b, axis=1), 1e-12)

        plain = maps["plain"]
        found = {"box drawn": cosine(plain, maps["outlined"]),
                 "object not named": cosine(plain, maps["general"]),
                 "other picture": cosine(plain, np.roll(plain, 1, 0))}
        figure, ax = canvas(1, 1)
        ax.boxplot(list(found.values()), widths=0.5, medianprops={"color": "black"})
        ax.set_xticks(range(1, 4), list(found))
        ax.set_ylabel("cosine of the head maps")
        ax.set_title(self.model.name)
        self.out.figure("variants", figure, of=self.model.name)
        more: dict[str, Any] = {"figure": "variants", "details": {
            name: float(values.mean()) for name, values in found.items()}}
        self.claim("overlay", statistics.mean(found["box drawn"]), null=1.0, direction="equal",
                   tolerance=0.05, **more)
        self.claim("naming", statistics.difference(found["box drawn"], found["object not named"]),
                   null=0.0, **more)

    def _correct(self) -> None:
        """Does what the top heads look like predict a right answer? Counting, where it can fail."""
        count = self.settings.pick(192, tiny=16)
        asked = questions.about_scenes(self.model, ("count",), count, self.settings.rng(4))
        right = AnswerAccuracy(questions.answers(asked), batch_size=32)(
            self.model, questions.prompts(asked))
        if min(right.sum(), (1 - right).sum()) < 10:
            self.skip("correct", f"{self.model.name} answers {right.mean():.0%} of {count} counting "
                      "questions, so there are fewer than 10 right or fewer than 10 wrong answers")
            return
        found = visual.measure(self.model, questions.prompts(asked), permutations=0)
        top = visual.head_scores(found).top(max(1, round(0.05 * found["score"].size)))
        features = np.stack([found[name].sel(layer=h.layer, head=h.head).fillna(0).values
                             for h in top for name in ("weight", "concentration")], 1)
        guess = _out_of_fold(features, right, self.settings.seed)

        def auc(y: np.ndarray, score: np.ndarray) -> float:
            positive = y > 0.5
            if positive.all() or not positive.any():
                return float("nan")
            return float(stats.mannwhitneyu(score[positive], score[~positive]).statistic
                         / (positive.sum() * (~positive).sum()))

        self.claim("correct", statistics.bootstrap(
            auc, right, guess, resamples=2000,
            name="AUROC of a logistic regression, out of fold"), null=0.5, details={
                "heads": [str(h) for h in top], "accuracy": float(right.mean())})

    def _ablate(self, asked: list[Asked], found: Result) -> None:
        model = self.model
        by = "samples_nonsink" if "samples_nonsink" in found.data else "samples"
        scores = visual.head_scores(found, by)
        prompts, wanted = questions.prompts(asked), questions.answers(asked)
        metrics = [AnswerAccuracy(wanted, batch_size=32), AnswerLogProb(wanted, batch_size=32)]
        base = float(metrics[0](model, prompts).mean())
        guess = questions.chance(asked)
        if base < guess + 0.05:
            reason = (f"{model.name} answers {base:.0%} of the questions, and always the same "
                      f"answer would be right in {guess:.0%}, so nothing can be lost")
            self.out.no_figure("stages", reason, of=model.name)
            self.skip("late", reason)
            self.skip("causes", reason)
            return
        self._stages(scores, prompts, metrics)
        total = model.n_layers * model.n_heads
        # As many as 5 % of the heads, so that the layers of the best ones have others left.
        count = max(1, round(0.05 * total))
        swept = ablation_sweep(model, prompts, metrics, scores, counts=(0, count))
        self.out.save(f"top-{model.name}", swept)
        self.claim("causes", difference(swept, "log_prob", count), null=0.0, direction="below",
                   causal=True, unit="nats per answer token", figure="stages",
                   control=_control(swept, count), details={
                       "heads": swept.manifest["top"], "operation": "zero, prefill and decoding",
                       "accuracy": _accuracies(swept)})
        self._late(scores)

    def _stages(self, scores: HeadScores, prompts: Any, metrics: list[Any]) -> None:
        if not self.out.wants("stages"):
            return
        model = self.model
        figure, axes = canvas(1, 3, width=PAGE, height=2.3, sharey=True)
        names = ("early", "middle", "late")
        for number, (ax, name, layers) in enumerate(zip(axes, names, visual.stages(model.n_layers))):
            ranked = [h for h in scores.top(model.n_layers * model.n_heads) if h.layer in layers]
            most = len(ranked) // 4
            counts = sorted({0, *(max(1, round(most * x)) for x in (0.25, 0.5, 1.0))}) if most else [0]
            try:
                swept = ablation_sweep(model, prompts, metrics, ranked, counts=counts, exclude=())
            except OutOfRange:
                ax.set_title(f"{name}: too few heads")
                continue
            at = swept["count"].values.astype(float)
            for condition, role, shown in (("top", "visual", "best heads"),
                                           ("random", "control", "random heads")):
                values = swept["accuracy"].sel(condition=condition).mean("seed")
                found = [questions.share(row) for row in values.transpose("count", "prompt").values]
                mean = np.array([share.value for share in found])
                error = np.abs(np.transpose([share.interval for share in found]) - mean)
                ax.errorbar(at, mean, error, color=color(role), label=shown, marker="o", capsize=2)
            ax.set_xlabel("heads removed")
            ax.set_xticks(at)
            ax.set_title(f"{name} layers, {layers.start} to {layers.stop - 1}")
            if number == 0:
                ax.set_ylabel("accuracy")
                ax.legend()
        figure.supxlabel(f"95 % intervals: Wilson (random heads: bootstrap), n = {len(prompts)}",
                         fontsize=6, color=color("control"))
        figure.suptitle(model.name)
        self.out.figure("stages", figure, of=model.name)

    def _late(self, scores: HeadScores) -> None:
        """The same share of late heads as in the paper, the lowest ones."""
        model = self.model
        late = visual.stages(model.n_layers)[2]
        ranked = [h for h in reversed(scores.top(model.n_layers * model.n_heads))
                  if h.layer in late]
        count = min(100, round(PAPER_LATE * len(ranked)))
        if count < 1:
            self.skip("late", f"the late layers of {model.name} have {len(ranked)} heads, too few "
                      "to remove the paper's share of them")
            return
        asked = questions.about_scenes(
            model, MIXED, self.settings.pick(256, tiny=8), self.settings.rng(5))
        wanted = questions.answers(asked)
        swept = ablation_sweep(
            model, questions.prompts(asked), [AnswerAccuracy(wanted, batch_size=32)], ranked,
            counts=(0, count), exclude=())
        middle = visual.stages(model.n_layers)[1]
        rest = [h for h in scores.top(model.n_layers * model.n_heads) if h.layer in middle]
        other = ablation_sweep(
            model, questions.prompts(asked), [AnswerAccuracy(wanted, batch_size=32)], rest[-count:],
            counts=(0, min(count, len(rest))), exclude=())
        self.claim("late", effect(swept, "accuracy", count), null=0.0, direction="equal",
                   tolerance=0.01, unit="accuracy", causal=True, figure="stages",
                   control=f"as many random heads of the same layers, and as many of the lowest "
                   f"heads of layers {middle.start} to {middle.stop - 1}", details={
                       "late heads removed": f"{count} of {len(ranked)}, the lowest scores",
                       "heads": swept.manifest["top"],
                       "change with random late heads": float(
                           effect(swept, "accuracy", count, "random").value),
                       "change with middle heads": float(
                           effect(other, "accuracy", min(count, len(rest))).value),
                       "accuracy untouched": float(swept["accuracy"].sel(count=0).mean())})


def _control(swept: Result, count: int) -> str:
    matched = bool(swept["layer_matched"].sel(count=count))
    where = "of the same layers" if matched else "of any layer (the layers have too few others)"
    return f"{swept.data.sizes['seed']} sets of as many random heads {where}"


def _accuracies(swept: Result) -> dict[str, float]:
    mean = swept["accuracy"].mean(("seed", "prompt"))
    count = int(swept["count"].values[-1])
    return {"untouched": float(mean.sel(count=0, condition="top")),
            "without the top heads": float(mean.sel(count=count, condition="top")),
            "without random heads": float(mean.sel(count=count, condition="random"))}


def _out_of_fold(features: np.ndarray, right: np.ndarray, seed: int) -> np.ndarray:
    from sklearn.linear_model import LogisticRegression
    from sklearn.model_selection import StratifiedKFold, cross_val_predict
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    folds = StratifiedKFold(5, shuffle=True, random_state=seed)
    fit = make_pipeline(StandardScaler(), LogisticRegression())
    return np.asarray(
        cross_val_predict(fit, features, right > 0.5, cv=folds, method="decision_function"))


def _spearman(a: np.ndarray, b: np.ndarray) -> float:
    """Rank correlation, NaN where one side is constant."""
    if np.ptp(a) == 0 or np.ptp(b) == 0:
        return float("nan")
    return float(np.corrcoef(stats.rankdata(a), stats.rankdata(b))[0, 1])


