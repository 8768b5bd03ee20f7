"""What answers need of visual tokens: the causal half of the experiment on nearest tokens."""

from collections.abc import Sequence
from typing import Any

import numpy as np

import interp
from experiments import _embed_figures as figures
from experiments import _visual_flow as flow
from experiments._patch_words import Shown
from experiments._subject import Subject
from interp.core import Prompt, Result, UndertowError, statistics
from interp.prompts import scenes
from probes import token_interventions
from probes.nulls import layer_states

TOLERANCE = 0.05
"""What counts as no loss: five points of accuracy (this toolkit's choice)."""


class Answers(Subject):
    """Pruning, skipping and late entry; a subclass says which tokens are of which class.

    `all` are the questions, `x` the visual tokens with the picture `image` of each, `constant` those
    that are no alive ones, `labels` position -> class, `about` what claims say of the classes.
    """

    all: list[Shown]
    prompts: list[Prompt]
    labels: list[dict[int, str]]
    x: np.ndarray
    image: np.ndarray
    constant: np.ndarray
    about: dict[str, Any]
    few: dict[str, Any]

    def _answers(self) -> None:
        answers = [one.asked.answer[0] for one in self.all]
        labels = [dict(one) for one in self.labels]
        merged = [{p: "dead" if k == "sink" else k for p, k in one.items()} for one in labels]
        sets: dict[str, Any] = {}
        if "free" not in self.told:
            sets |= token_interventions.matched_sets(merged, "dead", seed=self.settings.seed,
                                                     seeds=self.settings.pick(5, tiny=2))
        found = token_interventions.prune(self.model, self.prompts, answers, sets)
        whole = found["correct"].sel(condition="whole").values
        reason = flow.cannot(self.model, [one.asked for one in self.all], float(whole.mean()))
        if reason:
            self.give_up(reason)
            return
        self.out.save(f"pruning-{self.model.name}", found)
        tasks = np.array([one.asked.task for one in self.all])
        if sets:
            self._pruned(found, whole)
            self._attention(labels)
        if self.wants("pruning"):
            if sets:
                self.figure("pruning", figures.pruning(self.model.name, found, tasks))
            else:
                self.no_figure("pruning", "there is no class of constant tokens to prune")
        self._blocks(answers, whole)
        self._middle()

    def _pruned(self, found: Result, whole: np.ndarray) -> None:
        right = {name: found["correct"].sel(condition=[
            c for c in found["condition"].values if str(c).startswith(name)]).mean("condition").values
            for name in ("dead ", "alive ", "all of dead", "only dead")}
        known = np.isfinite(right["all of dead"])
        shares = {name: float(np.nanmean(x)) for name, x in right.items()}
        details = {**self.about, "whole": float(whole.mean()), **shares, "tokens removed": float(
            found["removed"].sel(condition="all of dead").mean())}
        self.claim("free", statistics.difference(
            right["all of dead"][known], whole[known], **self.few), null=0.0, direction="equal",
            tolerance=TOLERANCE, causal=True, unit="share of right answers", figure="pruning",
            control="as many alive tokens, 5 draws", details=details)
        known = np.isfinite(right["alive "]) & np.isfinite(right["dead "])
        if known.sum() < statistics.FEWEST:
            self.skip(f"{int(known.sum())} pictures have tokens of both kinds", "matched")
            return
        self.claim("matched", statistics.difference(
            right["dead "][known], right["alive "][known], **self.few), null=0.0, causal=True,
            unit="share of right answers, without dead minus without alive tokens", figure="pruning",
            control="as many dead tokens, 5 draws", details={**details, "tokens removed": float(
                found["removed"].sel(condition="dead 0").mean())})

    def _attention(self, labels: Sequence[dict[int, str]]) -> None:
        sinks = [[p for p, k in one.items() if k == "sink"] for one in labels]
        some = [i for i, one in enumerate(sinks) if one][: self.settings.pick(20, tiny=6)]
        if len(some) < statistics.FEWEST:
            self.skip(f"no landmark of {self.model.name} is a sink: none of its groups of tokens gets "
                      "ten times the median attention or fires in sink dimensions" if not some else
                      f"only {len(some)} pictures have sinks", "attention")
            return
        found = token_interventions.attention_without(
            self.model, [self.prompts[i] for i in some], {"sinks": [sinks[i] for i in some]})["mass"]
        before, after = (found.sel(condition=c) for c in ("whole", "sinks"))
        text = [x.sel(target=["first", "text"]).sum("target").values for x in (before, after)]
        rest = 1 - before.sel(target="set").values
        self.claim("attention", statistics.difference(text[1], text[0] / rest, **self.few),
                   null=0.0, causal=True, unit="share of attention above a pro rata gain",
                   control="the freed attention shared out pro rata", figure="map", details={
                       "whole": {str(t): float(before.sel(target=t).mean())
                                 for t in found["target"].values},
                       "without sinks": {str(t): float(after.sel(target=t).mean())
                                         for t in found["target"].values}})

    def _blocks(self, answers: Sequence[int], whole: np.ndarray) -> None:
        model, n = self.model, self.model.n_layers
        some = self.prompts[: self.settings.pick(15, tiny=6)]
        right, wanted = whole[: len(some)], answers[: len(some)]
        sets = {"image": [list(p.positions("image")) for p in some],
                "question": [_asking(p) for p in some]}
        bands = flow.bands(n)
        kept = {name: bands[name] for name in self.settings.pick(
            ("early", "middle", "late", "all"), tiny=("middle", "all"))}
        skipped = {name: token_interventions.skip(model, some, wanted, sets, [
            half for layer in layers for half in (layer, layer + 0.5)])["correct"]
            for name, layers in kept.items()}
        try:
            cut = model.run(some, write=interp.block("image", "image"), logits="last")
            blind: Any = float(np.mean([int(r[-1].argmax()) == a for r, a in zip(cut.logits, wanted)]))
        except UndertowError as error:  # the picture comes first, and would see nothing at all
            blind = str(error)
        image = skipped["all"].sel(condition="image").values
        self.claim("redundant", statistics.difference(image, right, **self.few), null=0.0,
                   direction="equal", tolerance=TOLERANCE, causal=True, figure="blocks",
                   unit="share of right answers", control="the updates of the question's tokens",
                   details={"whole": float(right.mean()), "image, by window": {
                       name: float(x.sel(condition="image").mean()) for name, x in skipped.items()},
                       "question, by window": {name: float(x.sel(condition="question").mean())
                                               for name, x in skipped.items()},
                       "image tokens do not see each other": blind})
        few = min(n, self.settings.pick(8, tiny=2))
        layers = sorted({round(x) for x in np.linspace(0, n - 1, few)} | {n // 2})
        before = [self.x[self.image == i] for i in range(len(some))]
        # Pictures of other sizes have other numbers of tokens.
        other = None if len({len(x) for x in before}) > 1 else [*before[1:], before[0]]
        entered = token_interventions.enter_late(model, some, wanted, layers=layers,
                                                 other=other)["correct"]
        middle = entered.sel(layer=n // 2, condition="as they came").values
        self.claim("entry", statistics.difference(middle, right, **self.few), null=0.0,
                   direction="equal", tolerance=TOLERANCE, causal=True, figure="blocks",
                   unit="share of right answers", control="none: pictures have different numbers of "
                   "tokens" if other is None else "another picture's tokens enter", details={
                       "layer": n // 2, "whole": float(right.mean()), **{
                           str(name): {int(x): float(v) for x, v in zip(layers, values)}
                           for name, values in zip(entered["condition"].values,
                                                   entered.mean("prompt").values)}})
        if self.wants("blocks"):
            self.figure("blocks", figures.blocks(model.name, entered, skipped, right, kept))

    def _middle(self) -> None:
        model = self.model
        texts = [Prompt.from_tokens(model.prompt(scenes.describe(one.scene)).ids) for one in self.all]
        starts = [[p for p in range(len(t)) if p >= min(2, len(t) - 1)] for t in texts]
        states = layer_states(model, texts, starts)
        unit = states / np.sqrt((states**2).sum("d_model"))
        mean = unit.mean("sample").values
        curves = []
        for i in range(len(self.prompts)):
            mine = self.x[(self.image == i) & ~self.constant]
            if len(mine):
                u = mine / np.linalg.norm(mine, axis=1, keepdims=True)
                curves.append(mean @ u.mean(0))
        if len(curves) < statistics.FEWEST:
            self.skip("too few pictures have alive tokens", "middle")
            self.no_figure("middle", "too few pictures have alive tokens")
            return
        table, layers = np.array(curves), states.layer.values

        def peak(values: np.ndarray) -> float:
            return float((values.mean(0).argmax()) / (values.shape[1] - 1))

        self.claim("middle", statistics.bootstrap(peak, table, **self.few,
                                                  name="depth of the largest cosine, from 0 to 1"),
                   null=0.5, direction="equal", tolerance=1 / 6, figure="middle",
                   control="depth 1/2, within a sixth", details={
                       "by layer": {int(x): float(v) for x, v in zip(layers, table.mean(0))}})
        if self.wants("middle"):
            self.figure("middle", figures.middle(model.name, layers, table))


def _asking(prompt: Prompt) -> list[int]:
    """The text behind the image, without the last position, which gives the answer."""
    return list(range(max(prompt.positions("image")) + 1, len(prompt) - 1))
