"""Pruning image tokens (arXiv:2512.07580): from which depth on is no criterion better than random?

On questions about scenes, for `looker` or any vision-language model: every criterion against random
tokens of the same number, by layer; the "+random" recipe at an equal budget; where criteria look.
"""

from collections.abc import Sequence
from typing import Any, Optional

import numpy as np
import xarray as xr
from PIL import ImageOps

from experiments import _picture_questions as questions
from experiments._output import Output
from experiments._paper import Paper, Settings
from experiments._picture_questions import Asked
from interp.core import Claim, ModelRefused, Prompt, PromptError, Result, statistics
from interp.figures import heat
from interp.figures.style import CYCLE, PAGE, canvas, color, note
from interp.flow import pruning
from interp.flow.horizon import information
from interp.flow.pruning_criteria import CRITERIA, selecting
from interp.flow.pruning_evidence import Evidence
from interp.models.model import Model

PAPER = Paper(
    "token_pruning",
    "When Token Pruning is Worse than Random: Understanding Visual Token Information in VLLMs",
    ("2512.07580",),
    "From which depth on is no criterion for pruning image tokens better than random tokens?",
    figures={
        "layers": "Accuracy and probability of the answer when a quarter of the image tokens is left "
        "from a layer on: families of criteria, random tokens (band: 10 draws), none.",
        "criteria": "Accuracy of each criterion minus that of random tokens of the same number, by "
        "layer; hatched where a criterion reads the block before, or what the model lacks.",
        "audit": "Where criteria keep: mean row of the kept tokens (random: 0.5), effective rank of "
        "their features, and overlap with the tokens that tell the answer most.",
        "overlap": "Jaccard overlap of what two criteria keep.",
        "budget": "Accuracy of one stage and of two (the second one random tokens) at one budget: "
        "image tokens per layer, averaged over all layers.",
    },
    models=("looker",),
)
SOURCE = PAPER.sources[0]
SURVEY = f"{SOURCE}; criteria of the methods named"

SENTENCES = {
    "deep": "From some depth on, no pruning criterion is better than random tokens.",
    "random": "Adding a late random stage at an equal budget improves diversity pruning (DivPrune).",
    "random_dart": "Adding a late random stage at an equal budget improves DART.",
    "late": "Attention criteria favor late raster positions, whatever the picture shows.",
    "rows": "FastV keeps tokens of the lower part of the picture.",
    "diverse": "In shallow layers diversity is a better criterion than attention.",
    "rank": "DivPrune keeps tokens of a higher effective rank than attention criteria.",
    "positions": "Pruned tokens that keep their position ids answer questions of place better.",
    "merging": "Merging tokens into the kept ones is better than dropping them.",
}
NUMBERS: dict[str, tuple[str, str]] = {
    "deep": ("beyond about layer 20 (abstract)", "paper"),
    "random": ("Qwen2.5-VL-7B, half the tokens: 80.7 to 80.9 on average", "secondary"),
    "random_dart": ("Qwen2.5-VL-7B, half the tokens: 77.3 to 78.3 on average", "secondary"),
    "rows": ("80.7 % of the image's height at 75 % pruning", "secondary"),
    "rank": ("effective rank 21.8 against 14 to 15", "secondary"),
    "positions": ("RefCOCO val 56.14, pruned 15.34, with original ids 51.42 (LLaVA, GAP)", "paper"),
}
TASKS = ("color", "shape", "existence", "count", "position")
SHARE = 0.25
"""Image tokens that stay."""
ATTENTION = ("FastV", "PyramidDrop", "TransPrune", "SparseVLM", "VisionDrop", "AdaptInfer")
FAMILIES = {
    "attention": ATTENTION,
    "tower": tuple(n for n in selecting() if CRITERIA[n].family == "encoder"),
    "diversity": tuple(n for n in selecting() if CRITERIA[n].family == "diversity"),
}
TINY = ("FastV", "PyramidDrop", "TransPrune", "[CLS] attention", "zeroth-order", "DivPrune", "DART",
        "ApET")
"""Criteria of a --tiny run."""


def run(settings: Settings, out: Output) -> None:
    def give_up(name: str, reason: str) -> None:
        _give_up(name, reason, out)

    for model in questions.subjects(PAPER, settings, out, give_up):
        out.record(model)
        try:
            _One(model, settings, out).run()
        except (PromptError, ModelRefused) as error:
            _give_up(model.name, str(error), out)


def _give_up(name: str, reason: str, out: Output) -> None:
    for figure in PAPER.figures:
        out.no_figure(figure, reason, of=name)
    for key in SENTENCES:
        out.claim(_untestable(key, reason), name)


def _untestable(key: str, reason: str) -> Claim:
    return Claim.untestable(SENTENCES[key], _source(key), reason, **_number(key))


def _source(key: str) -> str:
    return SOURCE if key in ("deep", "random", "random_dart") else SURVEY


def _number(key: str) -> dict[str, str]:
    number, tag = NUMBERS.get(key, ("", "paper"))
    return {"paper_number": number, "paper_tag": tag}


class _One:
    """Everything about one model."""

    def __init__(self, model: Model, settings: Settings, out: Output) -> None:
        self.model, self.settings, self.out = model, settings, out
        asked = questions.about_scenes(model, TASKS, settings.pick(24, tiny=5), settings.rng(1))
        self.asked = asked + questions.reading(model, settings.pick(8, tiny=3), settings.rng(2))
        if any(not one.prompt.of_kind("image") for one in self.asked):
            raise PromptError(f"{model.name} does not mark its image tokens.")
        depth = model.n_layers
        self.layers = sorted({round(x) for x in np.linspace(0, depth - 1, min(depth, 8))})
        if settings.tiny and depth > 3:
            self.layers = sorted({0, 1, depth - 1})
        self.shallow = [x for x in self.layers if 0 < x <= max(1, depth // 4)]
        self.draws = 10
        # Resampling in Python is slow; for intervals two thousand draws are enough.
        self.few = {"resamples": settings.pick(2000, tiny=200)}

    def claim(self, key: str, estimate: statistics.Estimate, **more: Any) -> None:
        self.out.claim(Claim(SENTENCES[key], _source(key), **{
            **estimate.for_claim(), **_number(key), **more}), self.model.name)

    def measure(self, asked: Sequence[Asked], **more: Any) -> Result:
        return pruning.measure(
            self.model, questions.prompts(asked), [one.answer[0] for one in asked],
            **{"share": SHARE, "draws": self.draws, "seed": self.settings.seed, **more})

    def run(self) -> None:
        model, out = self.model, self.out
        out.record(model, questions.prompts(self.asked), f"questions-{model.name}")
        self.found = self.measure(self.asked, layers=self.layers,
                                  criteria=self.settings.pick(selecting(), tiny=TINY))
        out.save(f"pruning-{model.name}", self.found)
        self.tasks = np.array([one.task for one in self.asked])
        self.refused = self.found.manifest["untestable"]
        self._layers()
        self._criteria()
        self._audit()
        self._overlap()
        reason = self._cannot_answer()
        if reason:
            for key in SENTENCES:
                out.claim(_untestable(key, reason), model.name)
            out.no_figure("budget", reason, of=model.name)
            return
        self._deep()
        self._diverse()
        self._rank()
        self._late()
        self._positions()
        self._merging()
        self._budgets()

    def _cannot_answer(self) -> str:
        """Why nothing can be lost here: the model must answer, and need the picture for it."""
        right = self.found["full_correct"].values
        blind = self.found["none_correct"].isel(layer=0).values
        chance = _by_majority(self.asked)
        if right.mean() < chance + 0.05:
            return (f"{self.model.name} gives the first word of {right.mean():.0%} of the answers, "
                    f"and the commonest one of the same task's other questions is right in {chance:.0%}")
        if right.mean() < blind.mean() + 0.05:
            return (f"{self.model.name} answers as well without image tokens ({blind.mean():.0%} "
                    f"instead of {right.mean():.0%})")
        return ""

    # -- figures ---------------------------------------------------------------------------------

    def _layers(self) -> None:
        if not self.out.wants("layers"):
            return
        figure, axes = canvas(1, 2, width=PAGE, height=2.7)
        for ax, key in zip(axes, ("correct", "p")):
            pruning.draw(self.found, ax, key, FAMILIES)
            drawn = self.found[f"random_{key}"].mean("prompt")
            ax.fill_between(self.layers, drawn.min("draw"), drawn.max("draw"), alpha=0.25,
                            color=color("control"), linewidth=0, zorder=1)
            ax.axhline(float(self.found[f"full_{key}"].mean()), color="black", linewidth=0.6,
                       linestyle=":")
            ax.set_xlabel("layer from which a quarter is left")
            ax.set_ylim(0, 1.03)
            ax.get_legend().remove()
        # Handles long enough for dashes to show on either side of the marker.
        axes[1].legend(handlelength=3.4, loc="center left", bbox_to_anchor=(1.0, 0.5))
        note(axes[1], "dotted: all image tokens")
        figure.suptitle(self.model.name)
        self.out.figure("layers", figure, of=self.model.name)

    def _criteria(self) -> None:
        if not self.out.wants("criteria"):
            return
        gain = pruning.advantage(self.found).mean(0)
        arms = [str(a) for a in self.found["arm"].values]
        table = xr.DataArray(gain, {"criterion": arms, "layer": self.layers},
                             ("criterion", "layer"))
        figure, ax = canvas(1, 1, width=4.6, height=0.6 + 0.19 * len(arms))
        reach = max(0.05, float(np.nanmax(np.abs(gain))))
        heat.draw(ax, table, y="", label="accuracy minus that of random tokens", signed=True,
                  limits=(-reach, reach), annotate="+z.2f", upward=False, hatched="does not apply")
        ax.set_title(self.model.name)
        self.out.figure("criteria", figure, of=self.model.name)

    def _audit(self) -> None:
        if not self.out.wants("audit"):
            return
        chosen = [x for x in self.layers if x >= 1][:1] or self.layers[:1]
        one = self.found.data.sel(layer=chosen[0])
        arms = [str(a) for a in one["arm"].values if np.isfinite(one["p"].sel(arm=a)).all()]
        best = self._informative(chosen[0])
        kept = one["kept"].sel(arm=arms).transpose("prompt", "arm", "token").values
        hits = np.array([[(k & b).sum() / max(1, b.sum()) for k in ks]
                         for ks, b in zip(kept, best)]) if len(best) else None
        panels: list[tuple[str, Optional[np.ndarray], Optional[float]]] = [
            ("mean row (0 top, 1 bottom)", one["row"].sel(arm=arms).transpose(
                "prompt", "arm").values, 0.5),
            ("effective rank", one["rank"].sel(arm=arms).transpose("prompt", "arm").values, None),
            ("share of most telling tokens", hits, SHARE)]
        figure, axes = canvas(1, 3, width=PAGE, height=0.8 + 0.17 * len(arms), sharey=True)
        for ax, (label, values, expected) in zip(axes, panels):
            if values is not None and np.isfinite(values).all():
                n = len(values)
                ax.errorbar(values.mean(0), range(len(arms)), fmt="o", capsize=2, color=CYCLE[0],
                            xerr=1.96 * values.std(0) / np.sqrt(n))
                note(ax, f"95 %, n = {n}")
            else:
                ax.text(0.5, 0.5, "no grid", ha="center", transform=ax.transAxes)
            if expected is not None:
                ax.axvline(expected, color=color("control"), linewidth=0.8, linestyle="--")
            ax.set_xlabel(label)
            ax.grid(True, axis="y")
        axes[0].set_yticks(range(len(arms)), arms)
        axes[0].invert_yaxis()
        figure.suptitle(f"{self.model.name}, kept from layer {chosen[0]} on (dashed: expected of random "
                        "tokens; unknown for the rank)")
        self.out.figure("audit", figure, of=self.model.name)

    def _informative(self, layer: int) -> list[np.ndarray]:
        """Per prompt, the tokens of the highest isolation information, as many as are kept."""
        asked = self.asked[: self.settings.pick(12, tiny=3)]
        found = []
        size = self.found.data.sizes["token"]
        for number, one in enumerate(asked):
            told = information(self.model, one.prompt, one.answer[0], layers=[layer])
            best = np.zeros(size, dtype=bool)
            keep = int(self.found["number"][number])
            best[np.argsort(-told["information"].values[0], kind="stable")[:keep]] = True
            found.append(best)
        return found

    def _overlap(self) -> None:
        if not self.out.wants("overlap"):
            return
        at = [x for x in self.layers if x >= 1][:1] or self.layers[:1]
        which = self.layers.index(at[0])
        arms = [str(a) for a in self.found["arm"].values]
        table = pruning.overlap(self.found)[:, :, which]
        known = [i for i in range(len(arms)) if np.isfinite(table[i, i])]
        shown = xr.DataArray(table[np.ix_(known, known)], dims=("criterion", "other"), coords={
            "criterion": [arms[i] for i in known], "other": [arms[i] for i in known]})
        size = 1.8 + 0.19 * len(known)
        figure, ax = canvas(1, 1, width=size + 0.8, height=size)
        heat.draw(ax, shown, x="", y="", label="Jaccard overlap", limits=(0, 1), upward=False)
        ax.set_title(f"{self.model.name}, layer {at[0]}")
        note(ax, f"two random sets: {SHARE / (2 - SHARE):.2f}")
        self.out.figure("overlap", figure, of=self.model.name)

    # -- claims ----------------------------------------------------------------------------------

    def _deep(self) -> None:
        gain = pruning.advantage(self.found)
        usable = np.isfinite(gain).any((0, 2))
        gain = gain[:, usable]
        names = [str(a) for a, ok in zip(self.found["arm"].values, usable) if ok]
        depth = self.model.n_layers
        better = pruning.better_than_random(gain)
        if not better.any():
            self.out.claim(_untestable("deep", f"no criterion is better than random tokens in any "
                                       f"layer of {self.model.name}, so none can stop being so"),
                           self.model.name)
            return

        def first(drawn: np.ndarray) -> float:
            found = pruning.no_better_from(gain[drawn.astype(int)], self.layers)
            return float(depth if found is None else found)

        every = np.arange(len(gain))  # prompts are drawn by number: gain has NaN where none applies
        each = {name: pruning.no_better_from(gain[:, [i]], self.layers)
                for i, name in enumerate(names)}
        by_task = {task: pruning.no_better_from(gain[self.tasks == task], self.layers)
                   for task in sorted(set(self.tasks)) if (self.tasks == task).sum() >= 5}
        self.claim("deep", statistics.bootstrap(
            first, every, resamples=self.settings.pick(1000, tiny=100),
            name="first layer from which on no criterion is better"),
            null=float(depth), direction="below", causal=True, unit="layer", figure="layers",
            control=f"{self.draws} random sets of as many tokens in the same layer", details={
                "layers measured": self.layers, "share of the depth": f"{first(every) / depth:.2f}",
                "criteria": len(names), "each": each, "by task": by_task,
                "not applicable": self.refused,
                "by probability of the answer": pruning.no_better_from(
                    pruning.advantage(self.found, "p")[:, usable], self.layers)})

    def _family(self, names: Sequence[str], layers: Sequence[int], key: str = "correct") -> Any:
        there = [n for n in names if n in self.found["arm"].values and n not in self.refused]
        return self.found[key].sel(arm=there, layer=list(layers)).mean(("arm", "layer")).values

    def _diverse(self) -> None:
        if not self.shallow:
            self.out.claim(_untestable("diverse", f"{self.model.name} has too few layers"),
                           self.model.name)
            return
        pair = [self._family(FAMILIES["diversity"], self.shallow),
                self._family(ATTENTION, self.shallow)]
        self.claim("diverse", statistics.difference(*pair, **self.few), null=0.0, causal=True,
                   unit="accuracy", figure="criteria",
                   control="random tokens of the same number, on the same prompts",
                   details={
                       "layers": self.shallow, "diversity": float(pair[0].mean()),
                       "attention": float(pair[1].mean()),
                       "random": float(self.found["random_correct"].sel(layer=self.shallow).mean()),
                       "probability of the answer": str(statistics.difference(
                           self._family(FAMILIES["diversity"], self.shallow, "p"),
                           self._family(ATTENTION, self.shallow, "p"), **self.few))})

    def _rank(self) -> None:
        layers = self.shallow or self.layers[1:2]
        if not layers:
            self.out.claim(_untestable("rank", f"{self.model.name} has one layer"), self.model.name)
            return
        self.claim("rank", statistics.difference(
            self._family(["DivPrune"], layers, "rank"), self._family(ATTENTION, layers, "rank"),
            **self.few),
            null=0.0, figure="audit", unit="effective rank",
            details={"layers": layers, "features": "what the projector gives"})

    def _late(self) -> None:
        """Scores against the number of the token, for pictures and for the same upside down."""
        model = self.model
        asked = self.asked[: self.settings.pick(20, tiny=5)]
        criteria = ["FastV", "PyramidDrop"]
        layers = [x for x in self.layers if x >= 1]
        try:
            turned = [_flipped(model, one) for one in asked]
            upright = self.found["late"].sel(arm=criteria, layer=layers).isel(
                prompt=slice(0, len(asked)))
            rows = self.found["row"].sel(arm="FastV", layer=layers[0]).values
            other = pruning.measure(model, turned, [one.answer[0] for one in asked],
                                    criteria=criteria, layers=layers, share=SHARE, draws=1)["late"]
        except PromptError as error:
            for key in ("late", "rows"):
                self.out.claim(_untestable(key, str(error)), model.name)
            return
        a, b = (x.mean(("arm", "layer"), skipna=True).values for x in (upright, other))
        ok = np.isfinite(a) & np.isfinite(b)
        if ok.any():
            self.claim("late", statistics.mean((a[ok] + b[ok]) / 2, **self.few), null=0.0,
                       figure="audit", unit="rank correlation of score and raster position",
                       control="the mean over a picture and the same picture upside down", details={
                           "upright": str(statistics.mean(a[ok], **self.few)),
                           "upside down": str(statistics.mean(b[ok], **self.few)),
                           "of the content (half the difference)": str(
                               statistics.mean((a[ok] - b[ok]) / 2, **self.few)),
                           "by layer": {str(x): float(upright.sel(layer=x).mean()) for x in layers}})
        else:
            self.out.claim(_untestable("late", "the scores are constant"), model.name)
        if np.isfinite(rows).all():
            self.claim("rows", statistics.mean(rows, **self.few), null=0.5, figure="audit",
                       unit="height of the picture, 0 top to 1 bottom",
                       control="random tokens: 0.5", details={"layer": layers[0]})
        else:
            self.out.claim(_untestable("rows", "the image's tokens are not one grid of cells"),
                           model.name)

    def _positions(self) -> None:
        model = self.model
        asked = questions.about_scenes(
            model, ("position",), self.settings.pick(32, tiny=5), self.settings.rng(3))
        layers = (self.shallow or self.layers)[:1]
        some = [n for n in ("FastV", "DivPrune", "[CLS] attention") if n not in self.refused]
        try:
            pair = [self.measure(asked, layers=layers, criteria=some, how=how)
                    for how in ("drop_keep_ids", "drop_compact_ids")]
        except PromptError as error:
            self.out.claim(_untestable("positions", str(error)), model.name)
            return

        def both(key: str) -> list[np.ndarray]:
            """Mean over criteria and the random draws, each counted as one arm."""
            return [np.concatenate([one[key].isel(layer=0).transpose("prompt", "arm").values,
                                    one[f"random_{key}"].isel(layer=0).mean("draw").values[:, None]],
                                   1) for one in pair]

        kept, compact = both("correct")
        self.claim("positions", statistics.difference(kept.mean(1), compact.mean(1), **self.few),
                   null=0.0, causal=True, unit="accuracy",
                   control="the same tokens, numbered without gaps",
                   details={"layer": layers[0], "all tokens": float(pair[0]["full_correct"].mean()),
                            **{f"{name}, keep and compact": [float(k), float(c)] for name, k, c in
                               zip([*some, "random"], kept.mean(0), compact.mean(0))},
                            "probability of the answer": str(statistics.difference(
                                *(x.mean(1) for x in both("p")), **self.few))})

    def _merging(self) -> None:
        some = [n for n in ("random", "DivPrune", "ApET", "PyramidDrop", "[CLS] attention")
                if n not in self.refused]
        asked = self.asked[::2]
        layers = [0, *self.shallow][:2]
        pair = [self.measure(asked, layers=layers, criteria=some, merge=merge, draws=1)
                for merge in (True, False)]
        merged, dropped = (one["correct"].transpose("prompt", "arm", "layer") for one in pair)
        self.claim("merging", statistics.difference(
            merged.mean(("arm", "layer")).values, dropped.mean(("arm", "layer")).values, **self.few),
            null=0.0, causal=True, unit="accuracy", control="the same tokens, with the others dropped",
            details={"layers": layers, "merged and dropped": {
                name: [float(merged.sel(arm=name).mean()), float(dropped.sel(arm=name).mean())]
                for name in some}, "probability of the answer": str(statistics.difference(
                    *(one["p"].mean(("arm", "layer")).values for one in pair), **self.few))})

    # -- budgets ---------------------------------------------------------------------------------

    def _budgets(self) -> None:
        """One stage, and two with random tokens in the second, at one budget."""
        depth = self.model.n_layers
        late = min(depth - 1, round(20 / 32 * depth))
        bars: list[tuple[str, float, np.ndarray]] = []
        for key, name, first in (("random", "DivPrune", 0), ("random_dart", "DART", 1)):
            if late <= first:
                self.out.claim(_untestable(key, f"{self.model.name} has {depth} layers: too few for "
                                           "a second stage"), self.model.name)
                continue
            asked = self.asked[: self.settings.pick(32, tiny=6)]
            one, two, budgets = [], [], []
            for number, question in enumerate(asked):
                result = self._recipes(question, number, name, first, late)
                one.append(result[0])
                two.append(result[1])
                budgets.append(result[2])
            single, double = np.array(one), np.array(two)  # [prompt, (correct, p)]
            spent = np.mean(budgets, 0)
            bars += [(name, spent[0], single[:, 0]), (f"{name} + random", spent[1], double[:, 0])]
            self.claim(key, statistics.difference(double[:, 0], single[:, 0], **self.few),
                       null=0.0, causal=True, unit="accuracy", figure="budget",
                       control=f"{name} alone at the same number of image tokens per layer",
                       details={"image tokens per layer, alone and with random": spent.tolist(),
                                "stages": f"blocks {first} and {late} of {depth}, "
                                f"{self.draws} draws", "alone": float(single[:, 0].mean()),
                                "with random": float(double[:, 0].mean()),
                                "probability of the answer": str(statistics.difference(
                                    double[:, 1], single[:, 1], **self.few))})
        if not bars or not self.out.wants("budget"):
            self.out.no_figure("budget", "too few layers for a second stage", of=self.model.name)
            return
        figure, ax = canvas(1, 1, width=4.4, height=2.4)
        for number, (_, _, right) in enumerate(bars):
            ax.bar(number, right.mean(), 0.6, color=CYCLE[number % 2], capsize=3,
                   yerr=1.96 * right.std() / np.sqrt(len(right)))
        ax.axhline(float(self.found["full_correct"].mean()), color="black", linewidth=0.6,
                   linestyle=":")
        ax.set_xticks(range(len(bars)), [f"{name}\n{spent:.1f} tokens" for name, spent, _ in bars])
        ax.set_ylabel("accuracy")
        ax.set_title(f"{self.model.name} (dotted: all image tokens)")
        self.out.figure("budget", figure, of=self.model.name)

    def _recipes(
        self, question: Asked, number: int, name: str, first: int, late: int
    ) -> tuple[list[float], list[float], list[float]]:
        model, answer = self.model, question.answer[0]
        evidence = Evidence(model, question.prompt)
        total, depth = len(evidence.tokens), model.n_layers
        keep = max(2, round(SHARE * total))
        more, few = pruning.with_random(keep, first, late, depth, total)
        rng = self.settings.rng(5, number)
        alone = evidence.logits(first, [CRITERIA[name].keep(evidence, first, keep, rng)])
        left = pruning.apply(evidence, [(first, name, more)], rng)
        drawn = left.logits(late, [CRITERIA["random"].keep(left, late, few, rng)
                                   for _ in range(self.draws)])
        whole = evidence.base.logits[-1].float().cpu().log_softmax(-1)
        scores = [pruning.outcome(x.log_softmax(-1), whole, answer) for x in (alone, drawn)]
        spent = [pruning.average_tokens(stages, depth, total)
                 for stages in ([(first, keep)], [(first, more), (late, few)])]
        one, two = ([float(s["correct"].mean()), float(s["p"].mean())] for s in scores)
        return one, two, spent


def _by_majority(asked: Sequence[Asked]) -> float:
    """Accuracy of answering with the commonest answer to the other questions of the task."""
    right = []
    for number, one in enumerate(asked):
        others = [o.answer[0] for i, o in enumerate(asked) if i != number and o.task == one.task]
        right.append(bool(others) and max(set(others), key=others.count) == one.answer[0])
    return float(np.mean(right))


def _flipped(model: Model, one: Asked) -> Prompt:
    """The same question about the picture upside down."""
    own = questions.is_looker(model) or one.task == "read"
    text = one.text if own else one.text.replace(" ?", "?").capitalize() + questions.SHORT
    return model.prompt(text, images=[ImageOps.flip(one.picture)], chat=questions.has_chat(model))
