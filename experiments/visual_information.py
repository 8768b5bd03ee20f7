"""Where a vision-language model keeps what it says about an object (arXiv:2410.07149), and how that
reaches the answer (arXiv:2304.14767 on images). On `looker`, or any model with a processor.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import xarray as xr
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize

from experiments import _picture_questions as questions
from experiments import _visual_flow as flow
from experiments._output import Output
from experiments._paper import Paper, Settings
from experiments._subject import Subject, run_each
from experiments._visual_flow import Shown
from interp.causal.metrics import AnswerAccuracy
from interp.core import Prompt, Result, Segment, statistics
from interp.figures import image_overlay, layer_curve
from interp.figures.style import OVER_PIXELS, PAGE, canvas, color, note
from interp.flow import knockout, object_ablation, visual_lens
from interp.prompts import scenes
from interp.sinks import visual

PAPER = Paper(
    "visual_information",
    "Towards Interpreting Visual Information Processing in Vision-Language Models",
    ("2410.07149", "2304.14767", "2412.14133"),
    "Which image tokens hold what a model says about an object, and on which way does it get there?",
    figures={
        "ablation": "Right answers that become wrong when image tokens are replaced by the mean "
        "embedding (with the mean number of tokens); gray: as many random image tokens.",
        "substitutions": "The same for the object with its neighbors, by what replaces it, and for "
        "other ways to ask (is it there, describe the picture).",
        "lens": "Early logits of image tokens: probability of the object's words in its cells and "
        "elsewhere, and how well they tell its cells from others.",
        "cells": "Probability of the object's words in every image token, by layer (outlined: the "
        "object).",
        "windows": "Loss of the answer's probability when edges are cut in a window of layers.",
        "hops": "Change of the answer's probability when edges are cut around each layer: image to "
        "question, question to last, image to last.",
    },
    models=("looker",),
)
MAIN, KNOCKOUT, NAMED = PAPER.sources

CLAIMS: dict[str, tuple[str, str]] = {
    "object": ("Replacing the tokens on an object and around it causes more errors than replacing "
               "as many random image tokens.", MAIN),
    "gradient": ("Replacing the tokens on an object and around it causes more errors than replacing "
                 "as many tokens of the largest integrated gradients.", MAIN),
    "registers": ("Replacing register tokens costs no more than replacing as many random ones.",
                  MAIN),
    "sinks": ("Replacing phi-sinks costs no more than replacing as many random tokens.", MAIN),
    "polling": ("Replacing the tokens on an object and around it causes the model to deny the object "
                "more often than replacing random ones.", MAIN),
    "describing": ("Replacing the tokens on an object and around it causes the model to leave it out "
                   "of a description more often than replacing random ones.", MAIN),
    "substitution": ("That object tokens matter does not hang on what they are replaced by.", MAIN),
    "drift": ("With depth, image tokens on an object come closer to its words.", MAIN),
    "localized": ("In late layers the words of an object are read in its cells.", MAIN),
    "windows": ("Cutting the answer position from an object in middle to late layers causes a larger "
                "loss than in early layers.", MAIN),
    "row": ("Cutting the last row of image tokens from an object causes no loss: nothing is "
            "summarized there.", MAIN),
    "gate": ("A single token at the end of the image is not the gate: cutting it causes less than "
             "half of the loss of cutting all image tokens.", KNOCKOUT),
    "concentrated": ("The effect of cutting text from the image is concentrated in few layers.",
                     KNOCKOUT),
    "middle": ("The effect of cutting text from the image lies in the middle layers.", KNOCKOUT),
    "hops": ("What the question takes from the image is taken in earlier layers than what the "
             "answer position takes from the question.", KNOCKOUT),
    "relation": ("Information on a relation reaches the prediction before that on the subject.",
                 KNOCKOUT),
    "subject": ("The subject's edge to the prediction is critical in middle to late layers.",
                KNOCKOUT),
    "shown": ("Facts about an entity are answered worse when it is shown than when it is named.",
              NAMED),
    "crossing": ("An entity that is shown reaches the question in deeper layers than one that is "
                 "named.", NAMED),
    "patching": ("Back-patching the entity from later layers raises the accuracy on images.", NAMED),
}
NUMBERS: dict[str, tuple[str, str]] = {
    "object": ("an accuracy drop of over 70 %", "paper"),
    "gate": ("LLaVA-7B on VQAv2: 0.72 to 0.72 without the edges to the end of the image, 0.00 "
             "without those to all of it; Chameleon-7B: 0.51 to 0.25 and 0.31", "secondary"),
    "concentrated": ("about 25 % of the layers", "paper"),
    "shown": ("19 % on average (v1), up to 18 % (v2)", "paper"),
}
TOLERANCE = 0.05
"""What counts as no loss: five points of accuracy or probability (this toolkit's choice)."""


def run(settings: Settings, out: Output) -> None:
    run_each(_One, settings, out)


class _One(Subject):
    paper, claims, numbers = PAPER, CLAIMS, NUMBERS

    def run(self) -> None:
        model, settings = self.model, self.settings
        self.skip("the questions here are about pictures: no subject and no relation is named in "
                  "their text", "relation", "subject")
        self.skip("looker's language holds no facts beyond the picture" if questions.is_looker(model)
                  else "pictures of known entities, with facts about them, are not bundled",
                  "shown", "crossing", "patching")
        self.all = flow.shown(model, settings.pick(20, tiny=6), settings.rng(1))
        self.prompts = [one.prompt for one in self.all]
        self.answers = [list(one.asked.answer) for one in self.all]
        self.out.record(model, self.prompts, f"objects-{model.name}")
        self.mean = object_ablation.mean_embedding(model, self.prompts)
        found = self._ablated({
            "object": [one.object for one in self.all], "object +1": [one.near for one in self.all],
            "object +2": [one.wide for one in self.all]})
        right = found["whole_accuracy"].values
        reason = flow.cannot(model, [one.asked for one in self.all], float(right.mean()))
        if reason:
            self.give_up(reason)
            return
        self.right = [one for one, ok in zip(self.all, right) if ok]
        self._objects(found)
        self._substitutions(found)
        self._lens()
        self._windows()
        self._hops()

    # -- ablation ---------------------------------------------------------------------------------

    def _ablated(self, sets: Mapping[str, Any], **more: Any) -> Result:
        given = {"by": "mean", "mean": self.mean, "exclude": [one.near for one in self.all],
                 "seeds": self.settings.pick(5, tiny=2), **more}
        return object_ablation.measure(self.model, self.prompts, self.answers, sets, **given)

    def _objects(self, found: Result) -> None:
        match = self._quantities()
        near = [one.near for one in self.all]
        matched = self._ablated({"object +1": near}, match=match, seeds=self.settings.pick(3, tiny=2))
        other: dict[str, Any] = {"registers": self._registers(), "phi-sinks": self._sinks(),
                                 "gradient": self._gradient()}
        used = {name: sets for name, sets in other.items() if any(sets)}
        rest = self._ablated(used, exclude=None) if used else None
        self.out.save(f"objects-{self.model.name}", found)
        self.out.save(f"matched-{self.model.name}", matched)
        losses = {c: object_ablation.lost(matched, "object +1", c)
                  for c in map(str, matched["condition"].values)}
        controls = {c: x for c, x in losses.items() if c != "set"}
        worst = max(controls, key=lambda c: float(np.nanmean(controls[c])))
        self._paired("object", losses["set"], controls[worst], figure="ablation",
                     control=f"random image tokens, the strongest of three kinds ({worst})",
                     details={"share of right answers lost": {
                         c: float(np.nanmean(x)) for c, x in losses.items()},
                         "object alone": float(np.nanmean(object_ablation.lost(found, "object"))),
                         "object and two rings": float(np.nanmean(
                             object_ablation.lost(found, "object +2"))),
                         "tokens": {str(n): float(found["count"].sel(segment=n).mean())
                                    for n in found["segment"].values}})
        if rest is not None:
            self.out.save(f"families-{self.model.name}", rest)
        for key, name, reason in (
            ("registers", "registers", f"no norm among the visual embeddings of {self.model.name} "
             "lies two deviations above its image's mean"),
            ("sinks", "phi-sinks", self.sink_reason),
        ):
            count = sum(map(bool, other[name]))
            if rest is None or name not in used or count < statistics.FEWEST:
                self.skip(reason if not count else f"only {count} of {len(self.all)} pictures have "
                          "such tokens", key)
                continue
            self._paired(key, object_ablation.lost(rest, name),
                         object_ablation.lost(rest, name, "random"), direction="equal",
                         tolerance=TOLERANCE, figure="ablation", control="as many random tokens")
        if rest is not None and "gradient" in used:
            self._paired("gradient", losses["set"], object_ablation.lost(rest, "gradient"),
                         figure="ablation", control="as many tokens of the largest integrated "
                         "gradients of the right answer's logit",
                         details={"they are on or around the object in": float(np.mean([
                             len(set(g) & set(o.near)) / len(g)
                             for g, o in zip(other["gradient"], self.all) if g]))})
        if not self.wants("ablation"):
            return
        figure, ax = canvas(1, 1, width=PAGE * 0.8, height=2.6)
        both = found.data if rest is None else xr.concat(
            [found.data, rest.data.drop_vars([k for k in rest.data if str(k).startswith("whole")])],
            "segment", data_vars="minimal", join="outer", coords="minimal", compat="override")
        object_ablation.draw(Result(both, found.manifest), ax)
        ax.set_title(self.model.name)
        self.figure("ablation", figure)

    def _paired(self, key: str, treated: np.ndarray, against: np.ndarray, **more: Any) -> None:
        known = np.isfinite(treated) & np.isfinite(against)
        if not known.any():
            self.skip("too few image tokens are left to draw as many random ones from", key)
            return
        more.setdefault("unit", "share of right answers")
        self.claim(key, statistics.difference(treated[known], against[known], resamples=2000),
                   null=0.0, causal=True, **more)

    def _quantities(self) -> dict[str, list[dict[int, float]]]:
        """Norm and received attention of every image token, to match random tokens by."""
        norm, mass = [], []
        for one in self.all:
            run = self.model.run(one.prompt, read="embed", stats="received", logits="none")
            size = np.linalg.norm(run.reads["embed"].values.reshape(len(one.prompt), -1), axis=1)
            deep = run.stats["received"].isel(prompt=0, layer=slice(2, None)).values
            got = np.nan_to_num(np.nanmean(deep.reshape(-1, deep.shape[-1]), 0))
            norm.append({p: float(size[p]) for p in one.cells})
            mass.append({p: float(got[p]) for p in one.cells})
        return {"same norm": norm, "same attention": mass}

    def _registers(self) -> list[tuple[int, ...]]:
        found = []
        for one in self.all:
            states = self.model.run(one.prompt, read="embed", logits="none").reads["embed"].values
            flags = object_ablation.registers(
                states.reshape(len(one.prompt), -1)[list(one.image.positions)])
            found.append(tuple(p for p, flag in zip(one.image.positions, flags) if flag))
        return found

    def _sinks(self) -> list[tuple[int, ...]]:
        """Image tokens whose phi crosses tau inside the language model."""
        model = self.model
        dims = visual.find_sink_dims(model, [], self.prompts[:8], n_null=0).found.dims
        self.sink_reason = (f"no residual coordinate of {model.name} is massive" if not dims else
                            f"no image token of {model.name} is a phi-sink")
        if not dims:
            return [()] * len(self.all)
        found, tau = [], visual.portable_tau(model.d_model)
        for one in self.all:
            states = model.run(one.prompt, read="resid_pre", logits="none").reads["resid_pre"]
            phi = visual.sink_value(states.values[0, 2:], dims).numpy().max(0)
            found.append(tuple(p for p in one.image.positions if phi[p] >= tau))
        return found

    def _gradient(self) -> list[tuple[int, ...]]:
        found: list[tuple[int, ...]] = [()] * len(self.all)
        for number in range(self.settings.pick(10, tiny=2)):
            one = self.all[number]
            part = object_ablation.integrated_gradients(
                self.model, one.prompt, one.asked.answer[0], self.mean, image=one.image,
                steps=self.settings.pick(12, tiny=2), batch_size=12)
            found[number] = object_ablation.top_tokens(part, one.image.positions, len(one.near))
        return found

    def _substitutions(self, found: Result) -> None:
        near, gaps, bars = [one.near for one in self.all], {}, {}
        for by in object_ablation.SUBSTITUTIONS:
            one = found if by == "mean" else self._ablated(
                {"object +1": near}, by=by, seeds=2)
            bars[by] = [object_ablation.lost(one, "object +1", c) for c in ("set", "random")]
            gaps[by] = bars[by][0] - bars[by][1]
        known = np.isfinite(np.stack(list(gaps.values()))).all(0)
        if known.any():
            def least(*each: np.ndarray) -> float:
                return float(min(x.mean() for x in each))

            self.claim("substitution", statistics.bootstrap(
                least, *(gap[known] for gap in gaps.values()), resamples=2000,
                name="loss minus that of random tokens, the smallest of four substitutions"),
                null=0.0, causal=True, control="as many random image tokens",
                figure="substitutions", unit="share of right answers",
                details={by: float(np.nanmean(gap)) for by, gap in gaps.items()})
        else:
            self.skip("too few image tokens are left to draw random ones from", "substitution")
        for key, label, prompts, metric in self._other_questions():
            some = self._again(prompts, metric)
            bars[label] = [object_ablation.lost(some, "object +1", c) for c in ("set", "random")]
            rate = float(some["whole_accuracy"].mean())
            if (some["whole_accuracy"].values > 0).sum() < statistics.FEWEST:
                self.skip(f"{self.model.name} finds the object in {rate:.0%} of {len(prompts)} pictures "
                          f"as they are, and at least {statistics.FEWEST} are needed to lose", key)
            else:
                self._paired(key, *bars[label], figure="substitutions",
                             control="as many random image tokens",
                             details={"right as it is": rate})
        if not self.wants("substitutions"):
            return
        figure, ax = canvas(1, 1, width=PAGE * 0.8, height=2.4)
        for number, role in enumerate(("image", "control")):
            heights = [np.nanmean(pair[number]) if np.isfinite(pair[number]).any() else np.nan
                       for pair in bars.values()]
            drawn = ax.bar(np.arange(len(bars)) + 0.4 * number - 0.2, heights, 0.4, color=color(role),
                           yerr=_reach([pair[number] for pair in bars.values()]),
                           error_kw={"elinewidth": 0.7},
                           label="object +1" if not number else "random tokens")
            ax.bar_label(drawn, fmt="%.2g", fontsize=6)
        ax.set_xticks(range(len(bars)), [name.replace("_", " ") for name in bars])
        ax.set_ylabel("share that becomes wrong")
        ax.set_xlabel("what replaces the tokens, or how it is asked")
        ax.legend(loc="center left", bbox_to_anchor=(1.0, 0.5))
        ax.set_ylim(0, 1.08)
        sizes = sorted({int(np.isfinite(x).sum()) for x, _ in bars.values()})
        note(ax, f"n = {' or '.join(map(str, sizes))} right answers; 95 % bootstrap intervals")
        ax.set_title(self.model.name)
        self.figure("substitutions", figure)

    def _other_questions(self) -> list[tuple[str, str, list[Prompt], Any]]:
        model, own = self.model, questions.is_looker(self.model)
        some, chat = self.all[: self.settings.pick(16, tiny=5)], questions.has_chat(model)
        yes = "yes" if own else "Yes"
        end = " ?" if own else "? Answer yes or no."
        polled = [f"is there {scenes.with_article(one.name)}{end}" for one in some]
        told = "describe the picture ." if own else "Describe this image."
        ids = [int(i) for i in model.tokenizer(yes, add_special_tokens=False)["input_ids"]]
        longest = self.settings.pick(48 if own else 200, tiny=12)
        return [
            ("polling", "is it there?",
             [model.prompt(text if own else text.capitalize(), images=[one.asked.picture], chat=chat)
              for text, one in zip(polled, some)],
             AnswerAccuracy([ids] * len(some), batch_size=32)),
            ("describing", "describe",
             [model.prompt(told, images=[one.asked.picture], chat=chat) for one in some],
             flow.Mentions([one.name for one in some], longest)),
        ]

    def _again(self, prompts: list[Prompt], metric: Any) -> Result:
        """Other questions on the same pictures: the object's tokens may have moved."""
        near = []
        for one, prompt in zip(self.all, prompts):
            image = prompt.of_kind("image")[0]
            at = dict(zip(one.image.positions, image.positions))
            near.append(tuple(at[p] for p in one.near))
        return object_ablation.measure(
            self.model, prompts, [[0]] * len(prompts), {"object +1": near}, by="mean",
            mean=self.mean, seeds=2, exclude=near, metrics=[metric])

    # -- lens -------------------------------------------------------------------------------------

    def _lens(self) -> None:
        some = [one for one in self.right if one.words and one.absent]
        if not some:
            self.skip("the words of objects are no tokens of this model", "drift", "localized")
            for name in ("lens", "cells"):
                self.out.no_figure(name, "the words of objects are no tokens", of=self.model.name)
                self.drawn.add(name)
            return
        found = visual_lens.measure(
            self.model, [one.prompt for one in some], [one.words for one in some],
            [one.object for one in some], [one.absent for one in some])
        self.out.save(f"lens-{self.model.name}", found)
        n = self.model.n_layers
        gain = np.log((found["inside"].sel(condition="word") + 1e-12)
                      / (found["inside"].sel(condition="absent") + 1e-12)).values

        def rises(each: np.ndarray) -> float:
            return float(statistics.stats.spearmanr(np.arange(n + 1), each.mean(0)).statistic)

        self.claim("drift", statistics.bootstrap(
            rises, gain, resamples=1000, name="Spearman correlation of the layer with the log ratio "
            "of the words' probability to that of absent words"), null=0.0, figure="lens",
            control="colors and shapes that are not in the picture",
            details={"nats by layer": gain.mean(0).round(3).tolist()})
        late = found["auroc"].isel(layer=slice(round(2 * n / 3), None)).mean("layer")
        word, absent = (late.sel(condition=c).values for c in ("word", "absent"))
        known = np.isfinite(word) & np.isfinite(absent)
        self.claim("localized", statistics.bootstrap(
            lambda a, b: float(min(a.mean() - 0.5, (a - b).mean())), word[known], absent[known],
            resamples=2000, name="mean AUROC of the last third of the layers minus 0.5, or minus "
            "that of absent words if this is less"), null=0.0, figure="lens",
            control="absent words", details={"AUROC": float(word[known].mean()),
                                             "AUROC of absent words": float(absent[known].mean())})
        if self.wants("lens"):
            figure, axes = canvas(1, 2, width=PAGE, height=2.5)
            visual_lens.draw(found, axes[0], "probability")
            visual_lens.draw(found, axes[1])
            figure.suptitle(self.model.name)
            self.figure("lens", figure)
        if not self.wants("cells"):
            return
        one = some[0]
        p = visual_lens.probabilities(self.model, one.prompt, one.words, one.image)
        layers = sorted({round(x) for x in np.linspace(0, n, 4)})
        figure, axes = canvas(1, 1 + len(layers), width=PAGE, height=2.2, sharey=True)
        plain = {q: np.nan for q in one.image.positions}
        image_overlay.draw(axes[0], one.asked.picture, one.image, plain, label="", bar=False, gray=False)
        axes[0].set_title("picture")
        for ax, layer in zip(axes[1:], layers):
            image_overlay.draw(ax, one.asked.picture, one.image, p[layer], label="", bar=False,
                               mark={q: "visual" for q in one.object})
            if ax.get_legend():
                ax.get_legend().remove()
            ax.set_ylabel("")
            ax.set_title(f"layer {layer}\n{p[layer].min():.2g} to {p[layer].max():.2g}", fontsize=7)
        bar = figure.colorbar(ScalarMappable(Normalize(0, 1), OVER_PIXELS), ax=list(axes), shrink=0.6,
                              ticks=[0, 1], label="probability")
        bar.ax.set_yticklabels(["map's least", "map's most"])
        figure.suptitle(f"{self.model.name}: probability of {one.name!r} in every image token")
        self.figure("cells", figure)

    # -- knockout ---------------------------------------------------------------------------------

    def _windows(self) -> None:
        some = self.right[: self.settings.pick(12, tiny=5)]
        seeds = self.settings.pick(3, tiny=2)
        marked = [_marked(one, seeds) for one in some]
        answers = [one.asked.answer[0] for one in some]
        sets = ["object", "near", "wide", "rest", "whole", *(f"random {s}" for s in range(seeds))]
        loss: dict[str, dict[str, np.ndarray]] = {name: {} for name in sets}
        for name, layers in flow.bands(self.model.n_layers).items():
            found = self._cut(marked, {s: s for s in sets}, answers, layers)
            for s in sets:
                loss[s][name] = found[s]
        control = {name: np.mean([loss[f"random {s}"][name] for s in range(seeds)], 0)
                   for name in flow.BANDS}
        late, early = (np.mean([loss["near"][b] - control[b] for b in some_bands], 0)
                       for some_bands in (("middle to late", "late"), ("early", "early to middle")))
        self.claim("windows", statistics.difference(late, early, resamples=2000), null=0.0,
                   causal=True, unit="probability", figure="windows",
                   control="as many random image tokens, cut in the same windows",
                   details={"loss, object and neighbors minus random": {
                       b: float((loss["near"][b] - control[b]).mean()) for b in flow.BANDS},
                       "windows": {b: [int(x.start), int(x.stop) - 1] for b, x in
                                   flow.bands(self.model.n_layers).items()}})
        at = [i for i, one in enumerate(some) if set(one.near) - set(one.last_row())]
        row = self._cut([marked[i] for i in at], {"near above": "near above", **{
            f"above {s}": f"above {s}" for s in range(seeds)}}, [answers[i] for i in at],
            range(self.model.n_layers), queries="last row") if at else {}
        if row:
            self.claim("row", statistics.mean(row["near above"], resamples=2000), null=0.0,
                       direction="equal", tolerance=TOLERANCE, causal=True, unit="probability",
                       figure="windows", control="as many random image tokens cut from the last row",
                       details={"random tokens": float(np.mean([row[f"above {s}"]
                                                                for s in range(seeds)])),
                                "object to last instead": float(loss["near"]["all"].mean())})
        else:
            self.skip("every object lies in the last row of image tokens", "row")
        if not self.wants("windows"):
            return
        shown = {"object": "object", "near": "object +1", "wide": "object +2",
                 "rest": "all but object +1", "whole": "all image tokens"}
        figure, axes = canvas(1, 2, width=PAGE, height=2.9, width_ratios=(3.4, 1))
        names = list(flow.BANDS)
        for number, (key, label) in enumerate([*shown.items(), ("", "random")]):
            values = control if not key else loss[key]
            axes[0].bar(np.arange(len(names)) + (number - 2.5) * 0.14,
                        [values[b].mean() for b in names], 0.14, label=label,
                        yerr=_reach([values[b] for b in names]), error_kw={"elinewidth": 0.7},
                        color=color("control") if not key else None)
        axes[0].set_xticks(range(len(names)), [
            f"{b}\n{x.start}" + f"-{x.stop - 1}" * (len(x) > 1)
            for b, x in flow.bands(self.model.n_layers).items()])
        axes[0].set_xlabel("window of layers")
        axes[0].set_ylabel("loss of the answer's probability")
        axes[0].set_title("cut from the last position")
        figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=6)
        if row:
            drawn = axes[1].bar([0, 1], [row["near above"].mean(), np.mean(
                [row[f"above {s}"] for s in range(seeds)])], color=[color("image"),
                                                                     color("control")])
            axes[1].bar_label(drawn, fmt="%.5f", fontsize=6)
            note(axes[1], f"n = {len(at)}")
        axes[1].set_xticks([0, 1], ["object +1", "random"])
        axes[1].sharey(axes[0])
        axes[1].set_title("from the last row")
        note(axes[0], f"mean, 95 % bootstrap intervals, n = {len(some)} pictures")
        figure.suptitle(self.model.name)
        self.figure("windows", figure)

    def _cut(self, prompts: Sequence[Prompt], keys: Mapping[str, str], answers: Sequence[int],
             layers: range, queries: str = "last") -> dict[str, np.ndarray]:
        """Loss of probability in every prompt when a window of layers is cut."""
        found = knockout.measure(self.model, prompts, keys, queries=queries, answers=answers,
                                 width=len(layers), layers=[layers.start + len(layers) // 2],
                                 min_probability=0)
        return {str(s): (found["base"] - found["p"].sel(segment=s).isel(layer=0)).values
                for s in found["segment"].values}

    def _hops(self) -> None:
        some = self.right[: self.settings.pick(12, tiny=5)]
        marked, answers = [_marked(one, 1) for one in some], [one.asked.answer[0] for one in some]
        n = self.model.n_layers
        width = max(1, round(n * 9 / 48))
        hops = {"image to question": ("asked", "whole"), "question to last": ("last", "asked"),
                "image to last": ("last", "whole"), "image to all text": ("later", "whole")}
        found = {}
        for name, (queries, keys) in hops.items():
            found[name] = knockout.measure(self.model, marked, {name: keys}, queries=queries,
                                           answers=answers, width=width, min_probability=0.05)
        self.out.save(f"hops-{self.model.name}", found["image to all text"])
        lost = {name: (one["base"] - one["p"].isel(segment=0)).transpose("prompt", "layer").values
                for name, one in found.items()}
        where = list(range(n))
        self.claim("hops", statistics.bootstrap(
            lambda a, b: flow.depth(b, where, n) - flow.depth(a, where, n),
            lost["image to question"], lost["question to last"], resamples=1000,
            name="mean depth of the loss, question to last minus image to question"), null=0.0,
            causal=True, control="the other hop of the same prompts", figure="hops",
            details={name: flow.depth(x, where, n) for name, x in lost.items()})
        text = lost["image to all text"]
        self.claim("concentrated", statistics.bootstrap(
            flow.needed, text, resamples=1000, name="share of layers that hold 90 % of the change"),
            null=0.5, direction="below", causal=True, figure="hops",
            control="half of the layers; an even effect needs 90 % of them")
        self.claim("middle", statistics.bootstrap(
            lambda a: flow.depth(a, where, n), text, resamples=1000,
            name="mean depth of the loss, from 0 to 1"), null=0.5, direction="equal",
            tolerance=1 / 6, causal=True, figure="hops", control="depth 1/2, within a sixth")
        whole = range(n)
        end = self._cut(marked, {s: s for s in ("end", "end and image", "one")}, answers, whole,
                        queries="behind the end")
        own = all("own end" in {s.name for s in one.segments} for one in marked)
        self.claim("gate", statistics.bootstrap(
            lambda a, b: float(a.mean() / b.mean()) if b.mean() > 0.01 else float("nan"),
            end["end"], end["end and image"], resamples=2000,
            name="loss of cutting the end of the image over that of cutting all of it"), null=0.5,
            direction="below", causal=True, control="one random image token", figure="windows",
            details={"end of the image": "a token behind it" if own else "its last token: there is "
                     "no token for the end in this template",
                     "losses": {k: float(v.mean()) for k, v in end.items()}})
        if not self.wants("hops"):
            return
        figure, axes = canvas(1, 3, width=PAGE, height=2.4, sharey=True)
        for ax, name in zip(axes, list(hops)[:3]):
            layer_curve.draw(ax, {name: found[name]["relative"].isel(segment=0)},
                             label="change of probability (%)", resamples=300, legend=False)
            ax.axhline(0, color=color("control"), linewidth=0.8)
            ax.set_title(name)
            ax.set_xlabel(f"center layer (window of {width})")
            if ax is not axes[0]:
                ax.set_ylabel("")
        figure.suptitle(self.model.name)
        self.figure("hops", figure)


def _reach(samples: Sequence[np.ndarray]) -> np.ndarray:
    """How far the bootstrap interval of every mean reaches to either side, as error bars want it."""
    reach = np.full((2, len(samples)), np.nan)
    for number, values in enumerate(samples):
        if np.isfinite(values).any():
            found = statistics.mean(values[np.isfinite(values)], resamples=1000)
            reach[:, number] = found.value - found.interval[0], found.interval[1] - found.value
    return np.clip(reach, 0, None)


def _marked(one: Shown, seeds: int) -> Prompt:
    """The prompt with every set of keys and queries as a segment."""
    row, after = set(one.last_row()), range(max(one.image.positions) + 1, len(one.prompt))
    asked = [p for s in one.prompt.of_kind("question") for p in s.positions
             if p in after and p != len(one.prompt) - 1] or list(after)[:-1]
    sets: dict[str, Sequence[int]] = {
        "object": one.object, "near": one.near, "wide": one.wide,
        "rest": sorted(set(one.image.positions) - set(one.near)), "whole": one.image.positions,
        "last row": sorted(row), "near above": sorted(set(one.near) - row), "asked": asked,
        "later": list(after)}
    # A template may have a token of its own between image and question.
    own = bool(len(after) > 1 and after[0] not in asked)
    end = after[0] if own else max(one.image.positions)
    sets |= {"end": [end], "own end": [end] if own else [],
             "end and image": sorted({end, *one.image.positions}),
             "behind the end": [p for p in after if p > end]}
    for seed in range(seeds):
        free = list(set(one.cells) - set(one.near))
        sets[f"random {seed}"] = object_ablation.random_tokens(
            sorted(free), one.near[: len(free)], seed=seed)
        high = sorted(set(free) - row)
        sets[f"above {seed}"] = object_ablation.random_tokens(
            high, sorted(set(one.near) - row)[: len(high)], seed=seed)
    sets["one"] = object_ablation.random_tokens(sorted(one.cells), [end], seed=0)
    kept = tuple(s for s in one.prompt.segments if s.name not in sets)
    made = tuple(Segment(name, tuple(int(p) for p in places), "set")
                 for name, places in sets.items() if len(places))
    return replace(one.prompt, segments=kept + made)
