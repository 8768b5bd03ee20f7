"""Hopping too late (arXiv:2406.12775): is the second hop of a question looked up too early?

On two written circuits, of which one looks up its table before the bridge arrives and the other
after, and on any model that knows the single hops of questions about landmarks.
"""

from typing import Any

import numpy as np
import torch
from scipy import stats

from experiments import _two_hops as two_hops
from experiments._output import Output
from experiments._paper import Paper, Settings
from experiments._two_hops import Describing, TwoHops
from interp.core import Claim, ModelRefused, PromptError, Result, statistics
from interp.figures import layer_curve
from interp.figures.style import PAGE, canvas, color, note
from interp.flow import back_patching, knockout
from interp.models.model import Model
from interp.organisms.hop_circuit import Hops

PAPER = Paper(
    "hopping_too_late",
    "Hopping Too Late: Exploring the Limitations of Large Language Models on Multi-Hop Queries",
    ("2406.12775",),
    "Do two-hop questions fail because the bridge is resolved too late for the second hop?",
    figures={
        "earliest": "First block whose state says the bridge (at the entity) or the answer (at the "
        "last position) in a describing prompt.",
        "pairs": "Share of failing questions that are answered when the output of a target block is "
        "replaced by that of a source block, at the entity and at the last position.",
        "fixed": "Share of failing questions with a working pair: back-patches, the same with states "
        "of other questions, and forward patches.",
        "projection": "Share of questions whose bridge or answer is the likeliest token of what "
        "attention or the MLP adds at the last position, by layer.",
        "knockout": "Change of the answer's probability when the last position cannot see the entity "
        "in a window of three layers.",
    },
    models=tuple(two_hops.CIRCUITS),
)
(SOURCE,) = PAPER.sources
WHERE = ("entity", "last")

SENTENCES = {
    "early": "The bridge is resolved at the entity before the answer is at the last position.",
    "repairs": "Back-patching causes answers to failing questions more often than other questions' "
    "states do.",
    "backward": "Patching back causes answers to failing questions more often than patching forward.",
    "fixed": "One pair of blocks, chosen on other questions, causes answers to failing questions.",
    "preserved": "That pair leaves most answers of the model right.",
    "targets": "Working targets are in the first third of the layers.",
    "known": "In the written circuit exactly the known pairs repair the question.",
}
NUMBERS = {"repairs": {"paper_number": "up to 57 % of the failing queries have a working pair",
                       "paper_tag": "secondary"}}


def run(settings: Settings, out: Output) -> None:
    for name in settings.models(PAPER):
        model = two_hops.open_subject(name, settings)
        try:
            asked, describing, hops = two_hops.questions(
                model, settings.pick(16, tiny=10), settings.rng(1))
            _One(model, settings, out, asked, describing, hops).run()
        except (PromptError, ModelRefused) as error:
            out.record(model)
            for key in SENTENCES:
                _skip(out, model, key, str(error))
            for figure in PAPER.figures:
                out.no_figure(figure, str(error), of=model.name)


def _skip(out: Output, model: Model, key: str, reason: str) -> None:
    out.claim(Claim.untestable(SENTENCES[key], SOURCE, reason, **NUMBERS.get(key, {})), model.name)


class _One:
    """Everything about one model."""

    def __init__(
        self, model: Model, settings: Settings, out: Output, asked: list[TwoHops],
        describing: Describing, hops: Any,
    ) -> None:
        self.model, self.settings, self.out, self.asked = model, settings, out, asked
        self.describing, self.hops = describing, hops
        self.prompts = [one.prompt for one in asked]

    def claim(self, key: str, estimate: Any, **more: Any) -> None:
        self.out.claim(Claim(SENTENCES[key], SOURCE, **{
            **estimate.for_claim(), **NUMBERS.get(key, {}), **more}), self.model.name)

    def skip(self, key: str, reason: str) -> None:
        _skip(self.out, self.model, key, reason)

    def run(self) -> None:
        found = back_patching.measure(
            self.model, self.prompts, [one.answer for one in self.asked], positions=WHERE,
            donors=self.settings.pick(3, tiny=1), seed=self.settings.seed)
        self.out.record(self.model, self.prompts, f"questions-{self.model.name}")
        self.out.save(f"pairs-{self.model.name}", found)
        self._pairs(found)
        self._fixed_pair(found)
        self._known_pairs(found)
        self._earliest()
        self._projection()
        self._knockout()

    def _pairs(self, found: Result) -> None:
        out, name = self.out, self.model.name
        wrong = ~found["right"].values.astype(bool)
        if not wrong.any():
            reason = f"{name} answers all {len(wrong)} questions: nothing is to be repaired"
            for key in ("repairs", "backward", "targets"):
                self.skip(key, reason)
            for figure in ("pairs", "fixed"):
                out.no_figure(figure, reason, of=name)
            return
        hit, donor = found["hit"].values[wrong], found["donor_hit"].values[wrong]
        own = back_patching.repaired(hit).any(1).astype(float)
        forward = back_patching.repaired(hit, "forward").any(1).astype(float)
        other = back_patching.repaired(donor).any(1).mean(1)
        by_place = {where: float(back_patching.repaired(hit[:, i]).mean())
                    for i, where in enumerate(WHERE)}
        details = {"failing questions": int(wrong.sum()), "of": len(wrong),
                   "repaired": float(own.mean()), "by position": by_place,
                   "other questions' states": float(other.mean()),
                   "forward patches": float(forward.mean()),
                   "prefills per question": float(found["prefills"]),
                   "naive": found.manifest["naive_prefills"]}
        self.claim("repairs", statistics.difference(own, other), null=0.0, causal=True,
                   unit="share of failing questions", figure="fixed", details=details,
                   control="block outputs of other questions, as many pairs")
        self.claim("backward", statistics.difference(own, forward), null=0.0, causal=True,
                   unit="share of failing questions", figure="fixed", details=details,
                   control="the same states put into later blocks")
        working = [np.argwhere(one & back_patching.backward(one.shape[-1])) for one in hit]
        targets = np.array([w[:, -1].mean() for w in working if len(w)])
        if len(targets):
            self.claim("targets", statistics.mean(targets), null=self.model.n_layers / 3,
                       direction="below", unit="block", figure="pairs", details={
                           "mean source": float(np.mean([w[:, -2].mean() for w in working
                                                         if len(w)]))},
                       control="every target with a later block is tried")
        else:
            self.skip("targets", f"no back-patch repairs a question of {name}")
        figure, axes = canvas(1, 2, width=PAGE, height=2.9)
        for ax, where in zip(axes, WHERE):
            back_patching.draw(found, ax, where, wrong)
            ax.set_title(f"at the {where} position" if where == "last" else "at the entity")
        figure.suptitle(f"{name}: failing questions repaired, by pair of blocks")
        out.figure("pairs", figure, of=name)
        figure, ax = canvas(1, 1, width=PAGE * 0.6, height=2.3)
        bars = {"back-patches,\nany place": own.mean(), "only at\nthe entity": by_place["entity"],
                "only at the\nlast position": by_place["last"], "other\nquestions": other.mean(),
                "forward\npatches": forward.mean()}
        hues = [color("primary"), *[f"{color('primary')}80"] * 2, *[color("control")] * 2]
        ax.bar_label(ax.bar(range(len(bars)), list(bars.values()), color=hues), fmt="%.2f")
        ax.set_xticks(range(len(bars)), list(bars))
        ax.set_ylim(0, 1.12)
        ax.set_yticks(np.linspace(0, 1, 6))
        ax.set_ylabel("share with a working pair")
        ax.set_title(f"{name}: failing questions repaired")
        note(ax, f"n = {len(own)} failing questions")
        out.figure("fixed", figure, of=name)

    def _fixed_pair(self, found: Result) -> None:
        right = found["right"].values.astype(bool)
        wrong = np.flatnonzero(~right)
        pairs = back_patching.backward(self.model.n_layers)
        if len(wrong) < 2:
            reason = (f"{self.model.name} fails at {len(wrong)} of {len(right)} questions: too few "
                      "to choose a pair of blocks on")
            self.skip("fixed", reason)
            self.skip("preserved", reason)
            return
        choose, test = wrong[::2], wrong[1::2]
        hit = found["hit"].values
        share = np.where(pairs, hit[choose].mean(0), -1.0)
        where, source, target = (int(i) for i in np.unravel_index(int(share.argmax()), share.shape))
        details = {"position": WHERE[where], "source": source, "target": target,
                   "chosen on": len(choose)}
        own = hit[test, where, source, target].astype(float)
        other = found["donor_hit"].values[test, where, :, source, target].mean(1)
        self.claim("fixed", statistics.difference(own, other), null=0.0, causal=True,
                   unit="share of failing questions", figure="pairs", details=details,
                   control="other questions' states at the same pair")
        if right.any():
            self.claim("preserved", statistics.mean(hit[right, where, source, target].astype(float)),
                       null=0.5, unit="share of right answers", details=details, causal=True,
                       control="the questions as they are, all right")
        else:
            self.skip("preserved", f"{self.model.name} answers no question that could be broken")

    def _known_pairs(self, found: Result) -> None:
        if not isinstance(self.hops, Hops):
            self.skip("known", f"which pairs repair a question is not known of {self.model.name}")
            return
        if self.hops.answers:
            self.skip("known", f"{self.model.name} answers by itself: nothing is to be repaired")
            return
        pairs = back_patching.backward(self.model.n_layers)
        same = []
        for hit in found["hit"].values:
            same.append(float(all(
                {(int(s), int(g)) for s, g in np.argwhere(hit[i] & pairs)} == self.hops.repairs(where)
                for i, where in enumerate(WHERE))))
        self.claim("known", statistics.mean(same), null=1.0, direction="equal",
                   unit="share of questions", figure="pairs", details={
                       where: sorted(map(list, self.hops.repairs(where))) for where in WHERE},
                   control="all other pairs must fail")

    def _earliest(self) -> None:
        model, found = self.model, []
        bases = {where: (model.resumable(prompt), place) for where, (prompt, place) in
                 (("entity", self.describing.entity), ("last", self.describing.last))}
        for one in self.asked:
            base = model.resumable(one.prompt)
            row = []
            for where, token in (("entity", one.bridge), ("last", one.answer)):
                target, place = bases[where]
                states = back_patching.block_outputs(base, one.prompt.positions(where)[-1])
                row.append(float(back_patching.earliest(
                    back_patching.describe(target, place, states, [token]))[0]))
            found.append(row)
        blocks = np.array(found)
        both = np.isfinite(blocks).all(1)
        if both.sum() < 5:
            self.skip("early", f"a describing prompt says bridge and answer of {int(both.sum())} of "
                      f"{len(both)} questions: too few to compare when each is resolved")
        else:
            gap = blocks[both, 0] - blocks[both, 1]
            p = float(stats.wilcoxon(gap).pvalue) if gap.any() else 1.0
            self.claim("early", statistics.median(gap), null=0.0, direction="below",
                       unit="blocks between bridge and answer", figure="earliest", details={
                           "Wilcoxon p": p, "median blocks": np.median(blocks[both], 0).tolist()},
                       control="the same states, described for the other token's place")
        figure, ax = canvas(1, 1, width=PAGE * 0.6, height=2.2)
        bins = np.arange(model.n_layers + 1) - 0.5
        ax.hist([column[np.isfinite(column)] for column in blocks.T], bins,
                label=["bridge at the entity", "answer at the last position"])
        ax.set_xlabel("first block whose state says it")
        ax.set_ylabel("questions")
        ax.set_ylim(0, 1.4 * len(blocks))  # room for the legend
        ax.legend(loc="upper right")
        ax.set_title(f"{model.name}: where bridge and answer are resolved")
        note(ax, f"n = {len(blocks)} questions")
        self.out.figure("earliest", figure, of=model.name)

    def _projection(self) -> None:
        model = self.model
        share = np.zeros((len(self.asked), 2, 2, model.n_layers))
        for i, one in enumerate(self.asked):
            reads = model.run(one.prompt, read=("attn_out", "mlp_out"), logits="none").reads
            for j, site in enumerate(("attn_out", "mlp_out")):
                rows = torch.tensor(reads[site].values[0, :, len(one.prompt) - 1])
                best = back_patching.project(model, rows, one.prompt).argmax(-1).numpy()
                for k, token in enumerate((one.bridge, one.answer)):
                    share[i, j, k] = best == token
        figure, ax = canvas(1, 1, width=PAGE * 0.6, height=2.3)
        layer_curve.draw(ax, {
            f"{what} in what {site} adds": share[:, j, k]
            for j, site in enumerate(("attention", "the MLP"))
            for k, what in enumerate(("bridge", "answer"))}, label="share of questions", legend=False)
        for line, width in zip(ax.lines, (5.5, 4.0, 2.5, 1.0)):  # equal curves lie inside each other
            line.set(linewidth=width, marker="")
        ax.legend(loc="upper left")
        ax.set_ylim(-0.04, 1.6)  # room for the legend
        ax.set_yticks(np.linspace(0, 1, 6))
        ax.set_title(f"{model.name}: likeliest token at the last position")
        self.out.figure("projection", figure, of=model.name)

    def _knockout(self) -> None:
        model = self.model
        found = knockout.measure(model, self.prompts, {"entity": "entity"}, queries="last", width=3,
                                 answers=[one.answer for one in self.asked], min_probability=0.05)
        self.out.save(f"knockout-{model.name}", found)
        if found.manifest["too_improbable"] == len(self.prompts):
            self.out.no_figure("knockout", f"the answer of no question has a probability of 5 % in "
                               f"{model.name}, so relative changes mean nothing", of=model.name)
            return
        figure, ax = canvas(1, 1, width=PAGE * 0.6, height=2.3)
        knockout.draw(found, ax)
        ax.set_title(f"{model.name}: the last position cannot see the entity")
        self.out.figure("knockout", figure, of=model.name)
