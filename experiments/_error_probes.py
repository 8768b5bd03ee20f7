"""What the parts of `truthfulness` share, and two of them: choosing among samples, and all layers.

Probes for errors of one model's answers, with whole entities held out.
"""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pandas as pd
import xarray as xr

from experiments import _fact_questions as facts
from experiments import _truthfulness_figures as figures
from experiments._fact_questions import FEWEST, Answered
from experiments._output import Output
from experiments._paper import Settings
from experiments._subject import Subject
from interp.core import statistics
from probes import knowledge
from probes.calibration import reliability
from probes.exact_answer import Log, places
from probes.held_out import HeldOut, auc, held_out

SITES = ("resid_post", "attn_out", "mlp_out")
EXACT = ("first exact", "last exact")


class ErrorSubject(Subject):
    """A model's answers, which of them are wrong, and the states at named tokens."""

    rows: list[Answered]
    wrong: np.ndarray
    entity: np.ndarray
    relation: np.ndarray
    states: xr.DataArray
    details: dict[str, Any]

    def __init__(self, model: Any, settings: Settings, out: Output) -> None:
        super().__init__(model, settings, out)
        self.resamples = settings.pick(300, tiny=100)
        self.log = Log()

    def _places(self, answered: Sequence[Answered]) -> xr.DataArray:
        """Block outputs, the embedding as layer -1, at the named tokens of every answer."""
        named = [places(a.exact, len(a.tokens)) for a in self.rows if a.exact is not None]
        values = []
        for a, where in zip(self.rows, named):
            both = np.concatenate([a.states["embed"], a.states["resid_post"]])
            last = len(a.tokens) - 1
            # An exact answer that ends the text has no token after it: its last one stands in.
            values.append(np.stack([both[:, 1 + (last if p is None else p)] for p in where.values()], 1))
        return xr.DataArray(
            np.stack(values, 2), dims=("layer", "position", "sample", "d_model"),
            coords={"layer": range(-1, self.model.n_layers), "position": list(named[0])})

    def _at(self, place: str) -> xr.DataArray:
        return self.states.sel(position=place).isel(layer=slice(1, None))

    def _exact(self, rows: Any = slice(None)) -> np.ndarray:
        """The first and the last token of the exact answer, all layers: `[cell, sample, d_model]`."""
        found = self.states.sel(position=list(EXACT)).isel(layer=slice(1, None))
        return found.transpose("layer", "position", "sample", "d_model").values.reshape(
            -1, *found.shape[2:])[:, rows]

    def _probe(self, states: Any, labels: Any = None, **more: Any) -> HeldOut:
        given = {"groups": self.entity, "seed": self.settings.seed, **more}
        return held_out(states, self.wrong if labels is None else labels, **given)

    def _auc(self, scores: np.ndarray, fold: np.ndarray, labels: Any = None) -> statistics.Estimate:
        """An area under the ROC curve with its interval, entities resampled."""
        known, y = np.isfinite(scores), self.wrong if labels is None else labels
        return statistics.bootstrap(auc, scores[known], y[known], fold[known],
                                    groups=self.entity[known], resamples=self.resamples // 3, name="AUC")

    def _table(self) -> None:
        self.out.table(f"answers-{self.model.name}", pd.DataFrame([{
            "question": a.question.text, "relation": a.question.relation, "gold": a.question.gold,
            "answer": a.exact.text if a.exact else "", "right": a.right,
            "log_prob": float(a.greedy.log_probs.sum())} for a in self.rows]))

    def _gap(self, key: str, one: Any, other: Any, fold: Any, figure: str, **more: Any) -> None:
        """The claim that one score orders errors better than another, same answers, same folds."""
        known = np.isfinite(one) & np.isfinite(other)

        def gap(a: np.ndarray, b: np.ndarray, y: np.ndarray, f: np.ndarray) -> float:
            return auc(a, y, f) - auc(b, y, f)

        estimate = statistics.bootstrap(
            gap, one[known], other[known], self.wrong[known], fold[known], groups=self.entity[known],
            resamples=self.resamples, name="difference of AUC")
        details = {**self.details, "AUC": auc(one[known], self.wrong[known], fold[known]),
                   "AUC compared with": auc(other[known], self.wrong[known], fold[known]),
                   **more.pop("details", {})}
        self.claim(key, estimate, null=0.0, unit="AUC", figure=figure, details=details, **more)


class SampleChecks(ErrorSubject):
    """Kinds of error by repeated samples, and the answer that a probe would choose among them."""

    def _samples(self, asked: facts.Questions) -> None:
        count, each = self.settings.pick((36, 12), tiny=(24, 8))
        # Those answered wrong first: they are what is asked about; then as many others.
        of = {a.question: a for a in self.rows}
        wrong = [q for q in asked.items if q in of and not of[q].right][: count * 2 // 3]
        right = [q for q in asked.items if q in of and of[q].right][: count - len(wrong)]
        chosen = asked.only([*wrong, *right])
        rows: list[dict[str, Any]] = []
        states, kinds = [], {}
        for number, a in enumerate(facts.ask(self.model, chosen, sites=("resid_post",), samples=each,
                                             log=Log(), seed=self.settings.seed, read_samples=True,
                                             again={a.question: a.branches for a in self.rows})):
            texts: dict[tuple[int, ...], Any] = {t: asked.exact(self.model, a.question, t)
                                                for t in a.read}
            bag = [texts[t].text if texts[t] else None for t in a.samples]
            good = {t.text for t in texts.values() if t and asked.right(a.question, t)}
            if not bag:
                continue
            kinds[number] = knowledge.error_type(bag, good)
            often = knowledge.majority(bag)
            for tokens, exact in texts.items():
                if exact is None:
                    continue
                states.append(a.read[tokens].states["resid_post"][:, [exact.first, exact.last]].reshape(
                    -1, self.model.d_model))
                rows.append({
                    "question": number, "entity": a.question.entity, "greedy": tokens == a.tokens,
                    "right": exact.text in good, "sampled": tokens in a.samples,
                    "majority": float(exact.text == often), "kind": kinds[number],
                    "log_prob": float(a.read[tokens].log_probs.mean())})
        table = pd.DataFrame(rows)
        self.out.table(f"samples-{self.model.name}", table)
        self._types(chosen.items, kinds)
        self._choice(table, np.stack(states, 1), each)

    def _types(self, items: Sequence[facts.Question], kinds: dict[int, str]) -> None:
        at = {a.question: i for i, a in enumerate(self.rows)}
        known = [(at[items[n]], kind) for n, kind in kinds.items()]
        index = np.array([i for i, _ in known])
        named = np.array([kind for _, kind in known])
        parts = []
        for kind in dict.fromkeys(named):
            is_one = named == kind
            if min(is_one.sum(), (~is_one).sum()) < 6:
                continue
            found = held_out(self._exact(index), is_one, groups=self.entity[index],
                             folds=4, seed=self.settings.seed)
            fine = np.isfinite(found.scores)
            # Kinds of question differ in their errors: only answers to one kind are compared.
            stratum = found.fold + 10 * np.unique(self.relation[index], return_inverse=True)[1]
            parts.append((index[fine], found.scores[fine], is_one[fine],
                          stratum[fine] + 1000 * len(parts)))
        counts = {kind: int((named == kind).sum()) for kind in dict.fromkeys(named)}
        if not parts:
            self.skip(f"no kind of error has 6 questions, or is not that of nearly all: {counts}",
                      "types")
            return
        i, s, y, f = (np.concatenate(x) for x in zip(*parts))
        self.claim("types", statistics.bootstrap(
            auc, s, y, f, groups=self.entity[i], resamples=self.resamples,
            name="AUC of one kind against the rest"), null=0.5, unit="AUC", figure="choice",
                   control="entities held out, and compared within one kind of question", details={
                       "kinds": counts})

    def _choice(self, table: pd.DataFrame, states: np.ndarray, each: int) -> None:
        right = table["right"].to_numpy(bool)
        if min(right.sum(), (~right).sum()) < FEWEST:
            self.skip(f"sampled answers are {int(right.sum())} times right and {int((~right).sum())} "
                      "times wrong: too few to choose among", "choice", "chance")
            self.no_figure("choice", "too few right or wrong sampled answers")
            return
        probe = held_out(states, right, groups=table["entity"].to_numpy(), seed=self.settings.seed)
        of, sampled = table["question"].to_numpy(), table["sampled"].to_numpy(bool)
        rules: dict[str, Callable[[], dict[Any, float]]] = {
            "greedy": lambda: knowledge.choose(table["greedy"], right, of),
            "random sample": lambda: knowledge.choose(np.zeros(len(of)), right, of, sampled),
            "majority": lambda: knowledge.choose(table["majority"], right, of, sampled),
            "log probability": lambda: knowledge.choose(table["log_prob"], right, of, sampled),
            "probe": lambda: knowledge.choose(probe.scores, right, of, sampled),
            "best possible": lambda: knowledge.choose(right.astype(float), right, of, sampled),
        }
        found = {name: rule() for name, rule in rules.items()}
        kind = dict(zip(table["question"], table["kind"]))
        common = [q for q in found["probe"] if all(q in f for f in found.values())]
        accuracy = pd.DataFrame({name: [f[q] for q in common] for name, f in found.items()},
                                index=[kind[q] for q in common])
        if self.wants("choice"):
            self.figure("choice", figures.choice(accuracy, self.model.name, each))
        stubborn = accuracy[accuracy.index.isin(["always wrong", "mostly wrong"])]
        details = {"samples per question": each, "accuracy": accuracy.mean().round(3).to_dict()}
        if len(stubborn) < statistics.FEWEST:
            self.skip(f"{len(stubborn)} questions get one wrong answer in most samples: too few",
                      "choice")
        else:
            self.claim("choice", statistics.difference(
                stubborn["probe"], stubborn["greedy"], resamples=self.resamples), null=0.0,
                       unit="accuracy", figure="choice", control="greedy decoding", details={
                           **details, "among these": stubborn.mean().round(3).to_dict()})
        self.claim("chance", statistics.difference(
            accuracy["probe"], accuracy["random sample"], resamples=self.resamples), null=0.0,
                   unit="accuracy", figure="choice", control="a distinct answer at random",
                   details=details)


class StackChecks(ErrorSubject):
    """All layers and kinds of states together."""

    def _stack(self, sites: Sequence[str]) -> None:
        if len(sites) < 3:
            reason = f"{self.model.name} has no {' and no '.join(s for s in SITES if s not in sites)}"
            self.skip(reason, "stack", "mlp", "ece")
            self.no_figure("stack", reason)
            return
        values = {site: np.stack([a.states[site][:, -1] for a in self.rows], 1) for site in sites}
        every = np.concatenate(list(values.values()))
        stack, best = self._probe(every, use="all"), self._probe(every)
        without = {s: self._probe(np.concatenate([v for n, v in values.items() if n != s]), use="all")
                   for s in sites}
        shuffled = self._probe(every, self.settings.rng(4).permutation(self.wrong), use="all")
        self._gap("stack", stack.scores, best.scores, stack.fold, "stack",
                  control="the best single layer, chosen within training",
                  details={"shuffled labels": shuffled.auc})
        other = max((s for s in sites if s != "mlp_out"), key=lambda s: stack.auc - without[s].auc)
        self._gap("mlp", without[other].scores, without["mlp_out"].scores, stack.fold, "stack",
                  details={"drop without": {s: stack.auc - w.auc for s, w in without.items()},
                           "next": other})
        probability = np.exp([a.greedy.log_probs.sum() for a in self.rows])
        fine = np.isfinite(stack.probability)
        curves = {name: reliability(p[fine], ~self.wrong[fine], bins=10, draws=20) for name, p in (
            ("all layers", 1 - stack.probability), ("answer's probability", probability))}

        def gap(a: np.ndarray, b: np.ndarray, y: np.ndarray) -> float:
            return float(reliability(a, y, bins=10, draws=0)["ece"]) - float(
                reliability(b, y, bins=10, draws=0)["ece"])

        self.claim("ece", statistics.bootstrap(
            gap, probability[fine], 1 - stack.probability[fine], ~self.wrong[fine],
            groups=self.entity[fine], resamples=self.resamples // 3,
            name="difference of calibration errors"), null=0.0, unit="ECE", figure="stack",
                   control="the product of the answer's token probabilities", details={
                       name: {"ECE": float(c["ece"]), "Brier": float(c["brier"]),
                              "ECE of a calibrated one": float(c["expected_error"].mean())}
                       for name, c in curves.items()})
        if self.wants("stack"):
            parts = {"all": stack, **{f"without {figures.SITES[s]}": w for s, w in without.items()},
                     "best single layer": best, "shuffled labels": shuffled}
            self.figure("stack", figures.stack(
                {n: self._auc(h.scores, h.fold, h.labels) for n, h in parts.items()}, curves,
                self.model.name))
