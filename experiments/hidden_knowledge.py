"""Hidden knowledge (arXiv:2503.15299): does a model rank right answers above wrong ones better inside?

Candidates are the right answer and what the model says when it is sampled. Inside: a probe on states
read while the model reads question and answer; outside: the probability of the answer, also with as
much supervision as the probe has. K compares them question by question.
"""

from typing import Any

import numpy as np
import pandas as pd

from experiments import _fact_questions as facts
from experiments import _hidden_knowledge_figures as figures
from experiments._fact_questions import FEWEST, Answered
from experiments._output import Output
from experiments._paper import Paper, Settings
from experiments._subject import Subject, run_all
from interp.core import statistics
from interp.core.statistics import Estimate
from probes.exact_answer import Log
from probes.held_out import held_out, text_baseline
from probes.knowledge import Knowledge, choose, features, knowledge, relative_gap, said

PAPER = Paper(
    "hidden_knowledge",
    "Inside-Out: Hidden Factual Knowledge in LLMs",
    ("2503.15299",),
    "Does a model score right answers above wrong ones better in its states than in its outputs?",
    figures={
        "scores": "K of every score, over questions; gray: what words, embeddings and shuffled labels "
        "give. A tie counts one half, so chance is one half.",
        "relations": "K inside and outside by kind of question.",
        "never": "Questions by whether the right answer was ever sampled: how often the probe ranks it "
        "above every wrong one, and how often a random order would.",
        "rerank": "Accuracy when the best-scored answer is taken, from the samples alone and with the "
        "right answer among them.",
    },
    models=("reader",),
)
(SOURCE,) = PAPER.sources
OWN = "measured by this toolkit, after arXiv:2503.15299"


class HiddenKnowledge(Subject):
    """One model, its questions and their candidates."""

    paper = PAPER
    claims = {
        "gap": ("A model knows more inside than it shows: K of a probe on its states exceeds K of the "
                "best of its own scores.", SOURCE),
        "fitted": ("It still does when the outer scores are fitted to labels as the probe is.", OWN),
        "relation": ("It still does when the probe has seen no question of the same kind.", OWN),
        "words": ("K of the probe exceeds what words of question and answer alone give.", OWN),
        "never": ("Some answers that are never sampled are known perfectly inside: above every wrong "
                  "one more often than in a random order.", SOURCE),
        "rerank": ("Taking the sampled answer that the probe scores highest is right more often than "
                   "greedy decoding.", SOURCE),
        "oracle": ("With the right answer put among the samples the probe's choice is right more often "
                   "still.", SOURCE),
    }
    numbers = {"gap": ("average relative gap 40 %", "paper"),
               "never": ("not once in 1,000 samples", "paper")}

    def __init__(self, model: Any, settings: Settings, out: Output) -> None:
        super().__init__(model, settings, out)
        self.resamples = settings.pick(1000, tiny=200)
        self.samples = settings.pick(20, tiny=6)
        self.log = Log()

    def run(self) -> None:
        """Sample, read, compare and draw."""
        asked = facts.questions(self.model, self.settings.pick(72, tiny=30), self.settings.rng(2))
        self.out.record(prompts=[q.prompt for q in asked.items], name=f"questions-{self.model.name}")
        rows: list[dict[str, Any]] = []
        states, embedded = [], []
        for number, a in enumerate(facts.ask(
                self.model, asked, sites=("resid_post", "embed"), samples=self.samples, log=self.log,
                seed=self.settings.seed, read_samples=True, with_gold=True)):
            for row, state, entering in self._candidates(number, a, asked):
                rows.append(row)
                states.append(state)
                embedded.append(entering)
        table = pd.DataFrame(rows)
        self._check(table, len(asked))
        if not len(self.kept):
            return
        usable = table["question"].isin(self.kept).to_numpy()
        self.table = table[usable].reset_index(drop=True)
        self.right = self.table["right"].to_numpy(bool)
        self.of = self.table["question"].to_numpy()
        self.entity = self.table["entity"].to_numpy()
        self.out.table(f"candidates-{self.model.name}", self.table.drop(columns=["log_probs", "within"]))
        X, E = (np.stack([x for x, ok in zip(given, usable) if ok], 1) for given in (states, embedded))
        self._compare(X, E)

    def _candidates(self, number: int, a: Answered, asked: facts.Questions) -> Any:
        """Distinct answers to one question, by their exact answer, with states that read them."""
        seen: set[str] = set()
        gold = a.question.gold_ids
        for tokens in [*dict.fromkeys([a.tokens, *a.samples]), gold]:
            exact = asked.exact(self.model, a.question, tokens)
            if exact is None or exact.text.lower() in seen or tokens not in a.read:
                continue
            seen.add(exact.text.lower())
            read, span = a.read[tokens], slice(exact.first, exact.last + 1)
            right = asked.right(a.question, exact)
            said_at = [t for t in a.samples if (e := asked.exact(self.model, a.question, t))
                       and e.text.lower() == exact.text.lower()]
            yield ({
                "question": number, "text": a.question.text, "entity": a.question.entity,
                "relation": a.question.relation, "answer": exact.text, "right": right,
                "greedy": tokens == a.tokens, "sampled": len(said_at),
                "log_probs": read.log_probs[span].tolist(), "within": read.within[span].tolist(),
                "p_true": self._p_true(a, exact.text)},
                read.states["resid_post"][:, [exact.last, -1]].reshape(-1, self.model.d_model),
                read.states["embed"][:, exact.last])

    def _p_true(self, a: Answered, answer: str) -> float:
        """What the model says when it is asked whether the answer is right; NaN where it cannot be."""
        if a.question.relation in facts.READER:
            return float("nan")
        text = (f"Question: {a.question.text}\nProposed answer: {answer}\nIs the proposed answer right? "
                "Say yes or no.")
        chat = bool(getattr(self.model.tokenizer, "chat_template", None))
        prompt = self.model.prompt(text, chat=True) if chat else self.model.prompt(f"{text}\nAnswer:")
        logits = self.model.run(prompt, logits="last").logits[0][-1].float()
        p = logits.softmax(-1)
        found = [sum(float(p[i]) for i in {facts.written(self.model, w)[0] for w in words})
                 for words in (("yes", "Yes"), ("no", "No"))]
        return found[0] / sum(found) if sum(found) else 0.5

    def _check(self, table: pd.DataFrame, n: int) -> None:
        """Questions with right and wrong candidates; without enough of them the rest is given up."""
        both = [] if table.empty else [q for q, part in table.groupby("question")
                                       if 0 < part["right"].sum() < len(part)]
        self.kept = both
        self.details = {"questions": n, "with right and wrong candidates": len(both),
                        "samples per question": self.samples, "exact answers": str(self.log)}
        if len(both) < FEWEST:
            self.kept = []
            self.give_up(f"{len(both)} of {n} questions have right and wrong candidates after "
                         f"{self.samples} samples each by {self.model.name} ({self.log}): {FEWEST} are "
                         "needed")

    # -- comparison --------------------------------------------------------------------------

    def _compare(self, X: np.ndarray, E: np.ndarray) -> None:
        settings, y, of = self.settings, self.right, self.of
        outside = said(list(self.table["log_probs"]))
        within, free = (np.concatenate(self.table[name]) for name in ("within", "log_probs"))
        if not np.allclose(within, free):
            among = said(list(self.table["within"]))
            outside |= {f"{name}, among answer words": values for name, values in among.items()}
        if np.isfinite(self.table["p_true"]).all():
            outside["P(true)"] = self.table["p_true"].to_numpy(float)
        outside = {k: v for k, v in outside.items() if not k.startswith("max")}
        more = {"seed": settings.seed}
        relations = self.table["relation"].to_numpy()
        rng = settings.rng(5)
        shuffled = y.copy()
        for q in np.unique(of):
            shuffled[of == q] = rng.permutation(y[of == q])
        inside = held_out(X, y, groups=self.entity, **more)
        apart = held_out(X, y, groups=(self.entity, relations), **more).scores if len(
            set(relations)) > 1 else None
        fitted = held_out(features(outside, [len(x) for x in self.table["log_probs"]]), y,
                          groups=self.entity, **more)
        words = text_baseline([f"{t} | {a}" for t, a in zip(self.table["text"], self.table["answer"])],
                              y, groups=self.entity, **more)
        scores: dict[str, Any] = {
            "probe": inside.scores, "probe, kind held out, too": apart, **outside,
            "outer scores, fitted": fitted.scores, "words alone": words.scores,
            "embedding": held_out(E, y, groups=self.entity, **more).scores,
            "probe, shuffled labels": held_out(X, shuffled, groups=self.entity, **more).scores}
        scores = {name: s for name, s in scores.items() if s is not None}
        fine = np.logical_and.reduce([np.isfinite(s) for s in scores.values()])
        found = {name: knowledge(s[fine], y[fine], of[fine]) for name, s in scores.items()}
        best = max(outside, key=lambda name: found[name].mean)
        self._claims(found, best, inside)
        self._draw(found, best)
        self._never(found["probe"], fine)
        self._rerank(inside.scores, scores[best], best)

    def _claims(self, found: dict[str, Knowledge], best: str, inside: Any) -> None:
        inner = found["probe"]
        of_entity = dict(zip(self.of, self.entity))
        groups = np.array([of_entity[q] for q in inner.questions])
        means = {name: round(k.mean, 4) for name, k in found.items()}
        for key, one, other, control in (
            ("gap", "probe", best, f"the best of the model's own scores ({best})"),
            ("fitted", "probe", "outer scores, fitted", "logistic on all own scores and the length"),
            ("relation", "probe, kind held out, too", best, f"the best of its own scores ({best})"),
            ("words", "probe", "words alone", "TF-IDF and logistic regression, same folds"),
        ):
            if one not in found:
                self.skip("there is one kind of question only", key)
                continue
            a, b = found[one].k, found[other].k
            gap = relative_gap(a, b, groups=groups, resamples=self.resamples)
            self.claim(key, statistics.difference(a, b, groups=groups, resamples=self.resamples),
                       null=0.0, unit="K", control=control, figure="scores", details={
                           **self.details, "K": means, "relative gap": gap.value,
                           "its interval": list(gap.interval), "cells": list(inside.chosen)})

    def _draw(self, found: dict[str, Knowledge], best: str) -> None:
        resamples = self.resamples // 4
        if self.wants("scores"):
            bars = {name: statistics.mean(k.k, resamples=resamples) for name, k in found.items()}
            self.figure("scores", figures.scores(bars, self.model.name))
        if self.wants("relations"):
            relation = dict(zip(self.of, self.table["relation"]))
            kinds = np.array([relation[q] for q in found["probe"].questions])
            parts: dict[str, dict[str, Estimate]] = {}
            for name in ("probe", best, "outer scores, fitted", "words alone"):
                parts[name] = {kind: statistics.mean(found[name].k[kinds == kind], resamples=resamples)
                               for kind in dict.fromkeys(kinds)}
            self.figure("relations", figures.relations(parts, best, self.model.name))

    def _never(self, inner: Knowledge, fine: np.ndarray) -> None:
        table = self.table[fine]
        rows = []
        for q, perfect in zip(inner.questions, inner.perfect):
            part = table[table["question"] == q]
            good = part["right"].to_numpy(bool)
            n_right, n_wrong = int(good.sum()), int((~good).sum())
            # Of all orders, those with every right answer above every wrong one.
            chance = 1.0
            for i in range(n_right):
                chance *= (n_right - i) / (n_right + n_wrong - i)
            rows.append((int(part["sampled"][good].sum()) == 0, perfect, chance))
        never, perfect, chance = np.array(rows, float).T
        absent = never > 0
        if self.wants("never"):
            self.figure("never", figures.never(never, perfect, chance, self.samples, self.model.name))
        if absent.sum() < statistics.FEWEST:
            self.skip(f"the right answer was sampled to all but {int(absent.sum())} of {len(absent)} "
                      f"questions in {self.samples} samples each", "never")
            return
        self.claim("never", statistics.difference(
            perfect[absent], chance[absent], resamples=self.resamples), null=0.0, figure="never",
                   unit="share of questions above a random order", control="a random order", details={
                       **self.details, "never sampled": int(absent.sum()),
                       "of these known perfectly": int(perfect[absent].sum()),
                       "expected in a random order": float(chance[absent].sum())})

    def _rerank(self, inner: np.ndarray, outer: np.ndarray, best: str) -> None:
        y, of = self.right, self.of
        sampled = self.table["sampled"].to_numpy() > 0
        said_or_gold = sampled | y
        rules = {
            "greedy": choose(self.table["greedy"], y, of),
            "random sample": choose(np.zeros(len(of)), y, of, sampled),
            best: choose(outer, y, of, sampled), "probe": choose(inner, y, of, sampled),
            "probe, with the right one": choose(inner, y, of, said_or_gold),
            "random, with the right one": choose(np.zeros(len(of)), y, of, said_or_gold)}
        common = [q for q in rules["probe"] if all(q in rule for rule in rules.values())]
        accuracy = {name: np.array([rule[q] for q in common]) for name, rule in rules.items()}
        if len(common) < statistics.FEWEST:
            self.skip(f"{len(common)} questions have sampled answers to choose among", "rerank",
                      "oracle")
            self.no_figure("rerank", "too few questions with sampled answers")
            return
        means = {name: round(float(v.mean()), 4) for name, v in accuracy.items()}
        for key, one, other in (("rerank", "probe", "greedy"),
                                ("oracle", "probe, with the right one", "probe")):
            self.claim(key, statistics.difference(
                accuracy[one], accuracy[other], resamples=self.resamples), null=0.0, unit="accuracy",
                       figure="rerank", control={"rerank": "greedy decoding", "oracle":
                       "the same choice among samples alone"}[key], details={
                           **self.details, "accuracy": means})
        if self.wants("rerank"):
            self.figure("rerank", figures.rerank(accuracy, self.model.name))


def run(settings: Settings, out: Output) -> None:
    run_all(HiddenKnowledge, settings, out, facts.unfit)
