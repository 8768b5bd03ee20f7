"""OCR heads (arXiv:2505.15865): heads that look at the patches of the text which is being said.

On `looker`, which reads handwritten digits, and on any vision-language model with a processor,
which gets passkeys in rendered text. Are they other heads than those that see colors?
"""

from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np
import xarray as xr
from scipy import stats

from experiments import _picture_questions as questions
from experiments._output import Output
from experiments._paper import Paper, Settings
from experiments._picture_questions import Asked
from interp.causal.controls import random_heads
from interp.causal.metrics import AnswerAccuracy, AnswerLogProb
from interp.causal.redistribute import ocr_sink_redistribution
from interp.causal.sweep import ablation_sweep, difference
from interp.core import Claim, Head, HeadScores, PromptError, Result, statistics
from interp.figures import head_grid, heat
from interp.figures.style import CYCLE, PAGE, canvas, color, note
from interp.heads import image_centric, ocr, visual
from interp.models.model import Model
from interp.stream.per_layer import PerLayer
from interp.stream.reducers import SegmentMass

PAPER = Paper(
    "ocr_heads",
    "How Do Large Vision-Language Models See Text in Image? Unveiling the Distinctive Role of OCR "
    "Heads",
    ("2505.15865",),
    "Which heads read text in pictures, and does reading depend on them alone?",
    figures={
        "bins": "Heads by class of score: OCR heads in the row that predicts a token, the same one "
        "row late, and text retrieval heads where the model retrieves from text.",
        "map": "OCR score of every head (outlined: the ten best, if above 0.1), and the score one "
        "row late.",
        "frequency": "Heads in the order of how often they are activated (line), and their score "
        "(bars).",
        "similarity": "Spearman correlation of the scores of all heads, by kind of head.",
        "masking": "Accuracy without the best OCR heads, the best visual heads of color questions, "
        "and random heads of the same layers (of all layers where these have too few others).",
        "dissociation": "Change of accuracy when the best heads of a kind are removed, minus that "
        "of random heads of the same layers, for each kind of question.",
        "redistribution": "Change of F1 when the first key keeps a share of its attention in the "
        "two best OCR heads (and in two random heads), by where the rest goes.",
    },
    models=("looker", questions.PLANTED),
    long=True,
)
SOURCE = PAPER.sources[0]

SENTENCES = {
    "sparse": "OCR heads are less sparse than retrieval heads.",
    "similar": "OCR heads are other heads than retrieval heads.",
    "distinct": "OCR heads are other heads than those that look at an object for its color.",
    "static": "The heads with the highest scores are also activated most often.",
    "row": "One row late, in the row of the token itself, the score of the OCR heads is lower.",
    "filter": "The released filter throws out heads that score higher than those it keeps.",
    "reading": "Removing OCR heads causes more reading errors than removing random heads.",
    "colors": "Removing the visual heads of color questions causes more color errors than removing "
    "random heads.",
    "double": "Reading depends on OCR heads and color on visual heads, and not the other way round "
    "(accuracy).",
    "double_nats": "Reading depends on OCR heads and color on visual heads, and not the other way "
    "round (log-probability of the answer).",
    "text": "Removing OCR heads causes errors in pictures, removing retrieval heads errors in text.",
    "sink": "Taking attention from the first key in the best OCR heads causes better reading.",
}
NUMBERS: dict[str, tuple[str, str]] = {
    "sparse": ("released results: 16.4, 8.7 and 4.3 % OCR heads; 5.7, 5.0 and 2.9 % retrieval "
               "heads of the text models", "data"),
    "sink": ("up to +0.9 F1", "secondary"),
}
BETAS = (0.0, 0.4, 0.8)
NOTHING = 0.01
"""With less attention than this on the first key there is nothing to move."""


def run(settings: Settings, out: Output) -> None:
    def give_up(name: str, reason: str) -> None:
        _give_up(name, reason, out)

    for model in questions.subjects(PAPER, settings, out, give_up, questions.NO_HEADS):
        _One(model, settings, out).run()


def _number(key: str) -> dict[str, str]:
    if key not in NUMBERS:
        return {}
    number, tag = NUMBERS[key]
    return {"paper_number": number, "paper_tag": tag}


def _give_up(
    name: str, reason: str, out: Output, figures: Sequence[str] = tuple(PAPER.figures),
    claims: Sequence[str] = tuple(SENTENCES),
) -> None:
    for figure in figures:
        out.no_figure(figure, reason, of=name)
    for key in claims:
        out.claim(Claim.untestable(SENTENCES[key], SOURCE, reason, **_number(key)), name)


class _One:
    """Everything about one model."""

    def __init__(self, model: Model, settings: Settings, out: Output) -> None:
        self.model, self.settings, self.out = model, settings, out
        self.count = settings.pick(64, tiny=8)
        total = model.n_layers * model.n_heads
        self.counts = (0, 1, 2, 3, 4, 8) if total < 200 else (0, 2, 5, 10, 20)
        self.counts = settings.pick(self.counts, tiny=self.counts[:3])

    def claim(self, key: str, estimate: Any, **more: Any) -> None:
        self.out.claim(Claim(SENTENCES[key], SOURCE, **{
            **estimate.for_claim(), **_number(key), **more}), self.model.name)

    def skip(self, reason: str, *keys: str) -> None:
        for key in keys:
            self.out.claim(
                Claim.untestable(SENTENCES[key], SOURCE, reason, **_number(key)), self.model.name)

    def run(self) -> None:
        model, out, settings = self.model, self.out, self.settings
        try:
            read = questions.reading(model, self.count, settings.rng(1))
        except PromptError as error:
            _give_up(model.name, str(error), out)
            return
        if not all(one.region for one in read):
            _give_up(model.name, "the processor gives no pixel boxes for its tokens", out)
            return
        out.record(model, questions.prompts(read), f"reading-{model.name}")
        slack = 1 if questions.is_looker(model) else settings.pick(16, tiny=2)
        steps = max(len(one.answer) for one in read) + slack
        some: dict[ocr.Row, list[Asked]] = {"predicting": read, "own": read[: settings.pick(32, tiny=8)]}
        found = {row: ocr.measure(
            model, questions.prompts(asked), questions.answers(asked),
            [one.where for one in asked], row=row, new_tokens=steps, batch_size=32)
            for row, asked in some.items()}
        main = found["predicting"]
        out.save(f"heads-{model.name}", main)
        if "note" in main.manifest:
            _give_up(model.name, main.manifest["note"], out)
            return
        said = questions.in_text(model, settings.pick(32, tiny=8), settings.rng(2))
        retrieval = ocr.measure_text_retrieval(
            model, questions.prompts(said), questions.answers(said), batch_size=32,
            new_tokens=max(len(one.answer) for one in said) + slack)
        color_asked = questions.about_scenes(model, ("color",), self.count, settings.rng(3))
        seen = visual.measure(model, questions.prompts(color_asked), permutations=0)
        centered = image_centric.measure(
            model, questions.prompts(color_asked), [{} for _ in color_asked])
        rankings = {"OCR heads": ocr.head_scores(main), "visual heads": visual.head_scores(seen)}
        last = [len(one.prompt) - 1 for one in color_asked]
        mass = np.mean([centered["image_mass"].isel(prompt=i, query=q).values
                        for i, q in enumerate(last)], 0)
        others = {"one row late": ocr.head_scores(found["own"]),
                  "image-centric heads": HeadScores.of(mass)}
        usable = self._retrieves(retrieval, said)
        if not usable:
            others["retrieval heads"] = ocr.head_scores(retrieval)
        self._bins(found, None if usable else retrieval)
        self._map(found)
        self._frequency(main)
        self._similarity({**rankings, **others})
        self._rows(found)
        self._filter(main)
        self._overlap("distinct", main, seen)
        # The planted copy of looker is there for its sinks; the rest is asked of looker itself.
        if model.name != questions.PLANTED:
            self._against_retrieval(main, retrieval, usable, said, read)
            self._masking(rankings, read, color_asked)
        self._sinks(rankings["OCR heads"], read, steps)

    def _retrieves(self, retrieval: Result, said: list[Asked]) -> str:
        """Why retrieval heads cannot be told here, "" if they can."""
        full = retrieval.manifest["answered in full"]
        if full >= 0.2 * len(said):
            return ""
        return (f"{self.model.name} repeats {full} of {len(said)} numbers that are in its text "
                f"({retrieval.manifest['answered']} in part), so retrieval heads cannot be scored")

    # -- description --------------------------------------------------------------------------

    def _bins(self, found: dict[str, Result], retrieval: Result | None) -> None:
        kinds = {"OCR heads": found["predicting"], "one row late": found["own"]}
        if retrieval is not None:
            kinds["retrieval heads"] = retrieval
        figure, axes = canvas(1, len(kinds), width=PAGE * len(kinds) / 3, height=2.6, squeeze=False)
        names = ("0", "0 to 0.1", "0.1 to 0.3", "0.3 to 0.5", "above 0.5")
        shades = ("#EFEFEF", "#C9C3DE", "#9C90C4", "#6A57A5", "#3B2A7A")
        for ax, (name, one) in zip(axes[0], kinds.items()):
            sizes = ocr.in_bins(one["score"].where(one["eligible"].astype(bool)))
            wedges, _ = ax.pie(sizes, colors=shades, startangle=90, counterclock=False,
                               wedgeprops={"width": 0.4, "edgecolor": "white"})
            ax.text(0, 0, f"{sum(sizes[2:])} of\n{sum(sizes)}", ha="center", va="center",
                    fontsize=8)
            ax.set_title(name, loc="center")
        figure.legend(wedges, names, loc="outside lower center", ncols=5, title="score")
        figure.suptitle(f"{self.model.name} (inside: heads above 0.1)")
        self.out.figure("bins", figure, of=self.model.name)

    def _map(self, found: dict[str, Result]) -> None:
        figure, axes = canvas(1, 2, width=PAGE, height=2.5, sharey=True)
        for ax, (row, name) in zip(axes, (("predicting", "row that predicts the token"),
                                          ("own", "row of the token"))):
            scores = ocr.head_scores(found[row])
            best = [h for h in scores.top(10) if float(scores.scores[h.layer, h.head]) > 0.1]
            head_grid.draw(ax, scores, label="OCR score" if row == "own" else "", limits=(0, 1),
                           mark=best if row == "predicting" else (), bar=row == "own")
            ax.set_title(name)
        axes[1].set_ylabel("")
        figure.suptitle(self.model.name)
        self.out.figure("map", figure, of=self.model.name)

    def _frequency(self, main: Result) -> None:
        score, frequency = (main[k].values.ravel() for k in ("score", "frequency"))
        order = np.argsort(-frequency, kind="stable")
        order = order[: max(10, int((frequency > 0).sum()))]
        figure, ax = canvas(1, 1, width=PAGE * 0.7, height=2.2)
        ranks = np.arange(1, len(order) + 1)
        ax.bar(ranks, score[order], color=color("visual"), label="score")
        ax.plot(ranks, frequency[order], color="black", linewidth=1.0, label="frequency")
        ax.set_xlabel("head rank")
        ax.set_ylabel("share")
        ax.set_ylim(0, 1)
        ax.legend()
        ax.set_title(self.model.name)
        self.out.figure("frequency", figure, of=self.model.name)
        samples = main["samples"].values.reshape(main.data.sizes["sample"], -1)
        threshold = main.manifest["threshold"]

        def track(values: np.ndarray) -> float:
            mean, often = values.mean(0), (values > threshold).mean(0)
            active = often > 0
            if active.sum() < 3:
                return float("nan")
            return _spearman(mean[active], often[active])

        graded = len(np.unique(samples)) > 2
        if not graded:
            self.skip("the score of a sample is 0 or 1 here, so that frequency and mean are the "
                      "same number", "static")
            return
        self.claim("static", statistics.bootstrap(
            track, samples, resamples=2000,
            name="Spearman of frequency and mean score over active heads"), null=0.0,
            figure="frequency")

    def _similarity(self, rankings: dict[str, HeadScores]) -> None:
        names = list(rankings)
        flat = [np.nan_to_num(np.asarray(r).ravel()) for r in rankings.values()]
        table = xr.DataArray(
            [[_spearman(a, b) for b in flat] for a in flat],
            {"kind": names, "other": names}, ("kind", "other"))
        figure, ax = canvas(1, 1, width=4.4, height=3.2)
        heat.draw(ax, table, x="", y="", label="Spearman correlation", limits=(-1, 1), signed=True,
                  annotate=".2f", upward=False)
        ax.set_title(self.model.name)
        self.out.figure("similarity", figure, of=self.model.name)

    # -- claims about scores ------------------------------------------------------------------

    def _rows(self, found: dict[str, Result]) -> None:
        top = self._best(found["predicting"])
        n = found["own"].data.sizes["sample"]
        late, right = (np.mean([found[row]["samples"].sel(layer=h.layer, head=h.head).values[:n]
                                for h in top], 0) for row in ("own", "predicting"))
        self.claim("row", statistics.difference(late, right), null=0.0, direction="below",
                   figure="map", details={
                       "heads": [str(h) for h in top], "predicting row": float(right.mean()),
                       "row of the token": float(late.mean()),
                       "heads above 0.1": {row: int((found[row]["score"] > 0.1).sum())
                                           for row in found}})

    def _best(self, found: Result) -> list[Head]:
        scores = ocr.head_scores(found)
        return scores.top(max(1, round(0.05 * scores.scores.size)))

    def _filter(self, main: Result) -> None:
        samples = main["samples"].values
        chosen, kept = (ocr.select(samples, filter=f).numpy() for f in ("none", "released"))
        dropped = chosen & ~kept
        details = {"heads above 0.1": int(chosen.sum()), "kept by the filter": int(kept.sum()),
                   "kept by the filter as the paper words it": int(
                       ocr.select(samples, filter="activated").sum())}
        if not dropped.any() or not kept.any():
            self.skip(f"the released filter drops {int(dropped.sum())} of {int(chosen.sum())} heads "
                      "here, so there are not two groups to compare", "filter")
            return
        self.claim("filter", statistics.difference(samples[:, dropped].mean(1),
                                                   samples[:, kept].mean(1)),
                   null=0.0, figure="frequency", details=details)

    def _against_retrieval(
        self, main: Result, retrieval: Result, reason: str, said: list[Asked], read: list[Asked]
    ) -> None:
        if reason:
            self.skip(reason, "sparse", "similar", "text")
            return
        a, b = (one["samples"].values.reshape(one.data.sizes["sample"], -1)
                for one in (main, retrieval))
        n = min(len(a), len(b))
        edges = (0.05, 0.1, 0.2, 0.3)

        def share(x: np.ndarray, y: np.ndarray, t: float = 0.1) -> float:
            return float((x.mean(0) > t).mean() - (y.mean(0) > t).mean())

        self.claim("sparse", statistics.bootstrap(
            share, a[:n], b[:n], resamples=2000,
            name="share of heads above 0.1, OCR minus retrieval, no filter"), null=0.0,
            figure="bins", details={f"above {t}": {
                "OCR": float((a.mean(0) > t).mean()), "retrieval": float((b.mean(0) > t).mean())}
                for t in edges})
        self._overlap("similar", main, retrieval)
        scores = {"OCR": ocr.head_scores(main), "retrieval": ocr.head_scores(retrieval)}
        count = self.counts[-1]
        loss = {kind: [difference(ablation_sweep(
            self.model, questions.prompts(some),
            AnswerAccuracy(questions.answers(some), batch_size=32), ranking, counts=(0, count)),
            "accuracy", count) for some in (read, said)] for kind, ranking in scores.items()}
        least = min(loss["OCR"], loss["retrieval"][::-1], key=lambda pair: pair[1].value
                    - pair[0].value)
        worst = statistics.Estimate(
            least[1].value - least[0].value,
            (least[1].interval[0] - least[0].interval[1], least[1].interval[1] - least[0].interval[0]),
            least[0].n, "loss on the own task minus loss on the other, the smaller of both kinds")
        self.claim("text", worst, null=0.0, causal=True, unit="accuracy", figure="masking",
                   control="as many random heads of the same layers, subtracted", details={
                       kind: [str(x) for x in pair] for kind, pair in loss.items()})

    def _overlap(self, key: str, main: Result, other: Result) -> None:
        """Overlap of the best heads against that of random sets (hypergeometric)."""
        flat = [one["samples"].values.reshape(one.data.sizes["sample"], -1)
                for one in (main, other)]
        n, size = min(map(len, flat)), flat[0].shape[1]
        k = max(1, round(0.1 * size))

        def shared(a: np.ndarray, b: np.ndarray) -> float:
            best = [set(np.argsort(-x.mean(0), kind="stable")[:k].tolist()) for x in (a, b)]
            return len(best[0] & best[1]) / k

        found = statistics.bootstrap(shared, flat[0][:n], flat[1][:n], resamples=2000,
                                     name=f"shared among the {k} best heads of either kind")
        by_chance = stats.hypergeom(size, k, k)
        # Other heads: no more are shared than chance gives in 95 % of draws.
        most = float(by_chance.ppf(0.95)) / k
        self.claim(key, found, null=most + 0.5 / k, direction="below", figure="similarity", details={
            "expected by chance": float(by_chance.mean()) / k,
            "p of so many by chance": float(by_chance.sf(round(found.value * k) - 1)),
            "Spearman over all heads": _spearman(*(x.mean(0) for x in flat))})

    # -- what breaks without them -------------------------------------------------------------

    def _masking(
        self, rankings: dict[str, HeadScores], read: list[Asked], seen: list[Asked]
    ) -> None:
        model, settings = self.model, self.settings
        neutral = {task: questions.about_scenes(
            model, (task,), settings.pick(48, tiny=4), settings.rng(4, i))
            for i, task in enumerate(("shape", "position"))}
        tasks = {"reading": read, "color": seen, **neutral}
        base = {task: float(self._metrics(some)[0](model, questions.prompts(some)).mean())
                for task, some in tasks.items()}
        chance = {task: questions.chance(some) for task, some in tasks.items()}
        poor = [t for t in ("reading", "color") if base[t] < chance[t] + 0.05]
        if poor:
            reason = "; ".join(f"{model.name} answers {base[t]:.0%} of the {t} questions, and "
                               f"always the same answer would be right in {chance[t]:.0%}"
                               for t in poor)
            self.skip(reason, "reading", "colors", "double", "double_nats")
            for name in ("masking", "dissociation"):
                self.out.no_figure(name, reason, of=model.name)
            return
        swept: dict[str, dict[str, Result]] = {
            kind: {task: ablation_sweep(model, questions.prompts(tasks[task]),
                                        self._metrics(tasks[task]), ranking, counts=self.counts)
                   for task in ("reading", "color")} for kind, ranking in rankings.items()}
        # As many heads as both kinds have layer-matched controls for.
        matched = [int(c) for c in self.counts[1:] if all(
            bool(one["reading"]["layer_matched"].sel(count=c)) for one in swept.values())]
        count = max(matched, default=self.counts[1])
        for kind, ranking in rankings.items():
            for task, some in neutral.items():
                swept[kind][task] = ablation_sweep(
                    model, questions.prompts(some), self._metrics(some), ranking,
                    counts=(0, count))
            for task, one in swept[kind].items():
                self.out.save(f"{kind.split()[0]}-{task}-{model.name}".lower(), one)
        self._curves(swept)
        self._table(swept, count)
        control = (f"5 sets of as many random heads of the same layers; {count} heads, the most for "
                   "which both kinds have such controls")
        for key, kind, task in (("reading", "OCR heads", "reading"),
                                ("colors", "visual heads", "color")):
            one = swept[kind][task]
            self.claim(key, difference(one, "accuracy", count), null=0.0, direction="below",
                       causal=True, unit="accuracy", control=control, figure="masking", details={
                           "heads": one.manifest["top"][:count], "accuracy untouched": base[task],
                           "change minus random, by number of heads": {
                               str(c): str(difference(one, "accuracy", c)) for c in matched},
                           "nats per answer token, minus random": str(
                               difference(one, "log_prob", count)),
                           "other tasks, minus random": {
                               t: _gap(s, count)
                               for t, s in swept[kind].items() if t != task}})
        self._double(swept, count, matched, control, "double", "accuracy")
        self._double(swept, count, matched, control, "double_nats", "log_prob")

    def _metrics(self, some: list[Asked]) -> list[Any]:
        wanted = questions.answers(some)
        return [AnswerAccuracy(wanted, batch_size=32), AnswerLogProb(wanted, batch_size=32)]

    def _double(
        self, swept: dict[str, dict[str, Result]], count: int, matched: Sequence[int],
        control: str, key: str, metric: str,
    ) -> None:
        """Is each task hurt more by its own heads than the other task is, both ways?"""
        def loss(kind: str, task: str, heads: int) -> np.ndarray:
            one = swept[kind][task][metric].sel(count=heads).mean("seed")
            return (one.sel(condition="random") - one.sel(condition="top")).values

        def weaker(a: np.ndarray, b: np.ndarray, c: np.ndarray, d: np.ndarray) -> float:
            return float(min((a - b).mean(), (d - c).mean()))

        def both(heads: int) -> tuple[statistics.Estimate, list[np.ndarray]]:
            cells = [loss(k, t, heads) for k in ("OCR heads", "visual heads")
                     for t in ("reading", "color")]
            n = min(map(len, cells))
            cells = [c[:n] for c in cells]
            return statistics.bootstrap(
                weaker, *cells, resamples=2000, name="loss on the own task minus loss on the "
                "other, the smaller of both kinds"), cells

        found, cells = both(count)
        self.claim(key, found, null=0.0, causal=True, control=control, figure="dissociation",
                   unit="accuracy" if metric == "accuracy" else "nats per answer token", details={
                       "by number of heads": {str(c): str(both(c)[0]) for c in matched},
                       "OCR heads, reading minus color": str(
                           statistics.difference(cells[0], cells[1])),
                       "visual heads, color minus reading": str(
                           statistics.difference(cells[3], cells[2])),
                       "sum of both (interaction)": str(statistics.difference(
                           cells[0] + cells[3], cells[1] + cells[2]))})

    def _curves(self, swept: dict[str, dict[str, Result]]) -> None:
        if not self.out.wants("masking"):
            return
        figure, axes = canvas(1, 2, width=PAGE, height=2.3, sharey=True)
        for ax, task in zip(axes, ("reading", "color")):
            for number, (kind, of_task) in enumerate(swept.items()):
                one, hue = of_task[task], CYCLE[number]
                at = one["count"].values
                for condition, line in (("top", "-"), ("random", "--")):
                    values = one["accuracy"].sel(condition=condition).mean("seed")
                    found = [questions.share(row) for row in values.transpose("count", "prompt").values]
                    mean = np.array([share.value for share in found])
                    error = np.abs(np.transpose([share.interval for share in found]) - mean)
                    shown = kind if condition == "top" else f"random, like {kind}"
                    ax.errorbar(at, mean, error, fmt=line, marker="o", capsize=2,
                                color=hue if condition == "top" else color("control"),
                                alpha=1.0 if condition == "top" else 0.5 + 0.4 * number,
                                label=shown, zorder=3 if condition == "top" else 2)
            ax.set_xticks(at)
            ax.set_xlabel("heads removed")
            ax.set_title(f"{task} questions")
            note(ax, f"95 % intervals: Wilson (random heads: bootstrap), n = {values.sizes['prompt']}")
        axes[0].set_ylabel("accuracy")
        axes[0].set_ylim(0, 1.03)
        axes[1].legend(loc="lower left")
        figure.suptitle(self.model.name)
        self.out.figure("masking", figure, of=self.model.name)

    def _table(self, swept: dict[str, dict[str, Result]], count: int) -> None:
        kinds, tasks = list(swept), list(next(iter(swept.values())))
        values = [[_gap(swept[k][t], count) for t in tasks] for k in kinds]
        table = xr.DataArray(values, {"removed": kinds, "task": tasks}, ("removed", "task"))
        figure, ax = canvas(1, 1, width=4.6, height=2.0)
        heat.draw(ax, table, x="questions", y="", label="change of accuracy\nminus random heads",
                  signed=True, limits=(-1, 1), annotate="+.2f", upward=False)
        ax.set_title(f"{self.model.name}, {count} heads removed")
        self.out.figure("dissociation", figure, of=self.model.name)

    def _sinks(self, scores: HeadScores, read: list[Asked], steps: int) -> None:
        """The first key keeps beta of its attention in the two best heads, or in two random ones."""
        model = self.model
        asked = read[: self.settings.pick(32, tiny=6)]
        wanted = questions.answers(asked)
        prompts = [one.prompt.with_segments(evidence=list(one.region)) for one in asked]
        top = scores.top(2)
        on_key = self._first_key(prompts, top)
        if on_key < NOTHING:
            reason = (f"the two best OCR heads of {model.name} ({', '.join(map(str, top))}) put "
                      f"{on_key:.2%} of their attention on the first key, so there is nothing to "
                      "move")
            self.skip(reason, "sink")
            self.out.no_figure("redistribution", reason, of=model.name)
            return
        size = (model.n_layers, model.n_heads)
        controls = [random_heads(top, *size, seed=s) for s in range(5)]
        end = getattr(model.tokenizer, "eos_token_id", None)

        def f1(write: Any = ()) -> np.ndarray:
            made = model.generate(prompts, new_tokens=steps, write=write, batch_size=16)
            return np.array([_f1([t for t in row if t != end], w) for row, w in zip(made, wanted)])

        base = f1()
        names = {"all": "all keys", "image": "image", "evidence": "evidence"}
        change = {(name, beta): f1([ocr_sink_redistribution(top, beta, destination=where)]) - base
                  for where, name in names.items() for beta in BETAS}
        for beta in BETAS:
            change["two random heads, all keys", beta] = np.mean(
                [f1([ocr_sink_redistribution(c, beta)]) - base for c in controls], 0)
        figure, ax = canvas(1, 1, width=PAGE * 0.6)
        lines = list(dict.fromkeys(name for name, _ in change))
        for number, name in enumerate(lines):
            values = [change[name, beta] for beta in BETAS]
            error = [1.96 * v.std() / np.sqrt(len(v)) for v in values]
            shift = 0.012 * (number - 1.5)
            ax.errorbar(np.array(BETAS) + shift, [v.mean() for v in values], error, marker="o",
                        capsize=2, label=name,
                        color=color("control") if "random" in name else CYCLE[number])
        ax.axhline(0, color="black", linewidth=0.6)
        ax.set_xlabel("share that the first key keeps, beta")
        ax.set_ylabel("change of F1")
        ax.legend()
        ax.set_title(model.name)
        note(ax, f"mean ± 1.96 standard errors, n = {len(base)}")
        self.out.figure("redistribution", figure, of=model.name)
        control = "two random heads, all keys"
        self.claim("sink", statistics.difference(change["all keys", 0.4], change[control, 0.4]),
                   null=0.0, causal=True, unit="F1", figure="redistribution",
                   control="the same edit in two random heads of the same layers, 5 draws",
                   details={"heads": [str(h) for h in top], "beta": 0.4,
                            "F1 untouched": float(base.mean()),
                            "attention of the heads on the first key": on_key,
                            **{f"change, {w}, beta {b}": float(v.mean())
                               for (w, b), v in change.items()}})

    def _first_key(self, prompts: Sequence[Any], top: Sequence[Head]) -> float:
        """Mean attention of heads on the first key, in the last row of each prompt."""
        received = self.model.run(prompts, logits="none", stats=[PerLayer(
            "segments", lambda _n, _layer: SegmentMass({"first": [0]}))]).stats["segments"]
        return float(np.mean([received.sel(layer=h.layer, segment="first").isel(
            prompt=i, head=h.head, query=len(p) - 1) for i, p in enumerate(prompts) for h in top]))


def _spearman(a: np.ndarray, b: np.ndarray) -> float:
    """Rank correlation, NaN where one side is constant."""
    if np.ptp(a) == 0 or np.ptp(b) == 0:
        return float("nan")
    return float(np.corrcoef(stats.rankdata(a), stats.rankdata(b))[0, 1])


def _gap(swept: Result, count: int) -> float:
    """Mean accuracy without the top heads minus that without random ones."""
    mean = swept["accuracy"].sel(count=count).mean(("seed", "prompt"))
    return float(mean.sel(condition="top") - mean.sel(condition="random"))


def _f1(said: Sequence[int], wanted: Sequence[int]) -> float:
    """F1 of the tokens of an answer, with multiplicity."""
    hits = sum((Counter(said) & Counter(wanted)).values())
    return 2 * hits / (len(said) + len(wanted)) if hits else 0.0
