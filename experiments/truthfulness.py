"""Errors in the states: LLMs Know More Than They Show (2410.02707), InternalInspector (2406.12053).

Greedy and sampled answers to questions of known truth, probes for errors at every layer and token with
whole entities held out, and what words alone, probabilities alone and an untrained model would tell.
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
from experiments._paper import Paper, Settings
from experiments._subject import Subject
from interp.core import statistics
from interp.core.statistics import Estimate
from interp.models.branches import Branches
from interp.models.reinitialize import reinitialized
from probes import knowledge
from probes.calibration import reliability
from probes.exact_answer import Log, places
from probes.held_out import HeldOut, across, auc, held_out, text_baseline
from probes.selective import tpr_at_fpr
from probes.sweep import sweep
from probes.truth_subspace import basis, overlap

PAPER = Paper(
    "truthfulness",
    "LLMs Know More Than They Show; InternalInspector",
    ("2410.02707", "2406.12053"),
    "Which states tell that an answer is wrong, and does the model know better than it says?",
    figures={
        "heat": "Area under the ROC curve of probes for errors, by layer and by token of the answer; "
        "layer -1 is what enters the first block. Whole entities are held out.",
        "methods": "Error detection by probes (layer chosen within training), by words, by the answer's "
        "probabilities, by an untrained model's states, and by shuffled labels; 95 % intervals.",
        "transfer": "Probes trained on one kind of question and tested on another; last row: the mean "
        "log probability of the answer, which needs no training.",
        "choice": "Accuracy when one of the sampled answers is chosen, by the kind of the question.",
        "stack": "All layers and three kinds of states together against parts of them and against the "
        "best single layer; right: confidence against accuracy.",
    },
    models=("reader",),
)
SOURCE, INSPECTOR = PAPER.sources
OWN = "measured by this toolkit, after arXiv:2410.02707"
SITES = ("resid_post", "attn_out", "mlp_out")
EXACT = ("first exact", "last exact")
LARGE = 5e8
"""Models of more parameters get no untrained twin: it would be held in memory beside them."""


class Truthfulness(Subject):
    """Errors of one model."""

    paper = PAPER
    claims = {
        "exact": ("Errors are told better at the tokens of the exact answer than at the last token of "
                  "the whole answer.", SOURCE),
        "question": ("Errors are told better at the exact answer than before it is given, at the last "
                     "token of the question.", SOURCE),
        "middle": ("Errors are told better in the middle third of the layers than in the others.",
                   SOURCE),
        "logits": ("A probe at the exact answer tells errors better than the probabilities of its "
                   "tokens do.", SOURCE),
        "words": ("A probe at the exact answer tells errors better than the words of question and "
                  "answer alone.", OWN),
        "untrained": ("A probe tells errors better from the model's states than from those of an "
                      "untrained model that reads the same answers.", OWN),
        "specific": ("At most 5 % of right answers being flagged, a probe finds more errors than the "
                     "probabilities do.", "arXiv:2503.10602"),
        "transfer": ("Probes for errors do not carry over to other kinds of questions: there they tell "
                     "less than the probabilities do.", SOURCE),
        "types": ("The kind of error (by repeated samples) can be predicted from the states of one "
                  "greedy answer.", SOURCE),
        "choice": ("Where a model keeps giving a wrong answer, choosing among samples by the probe "
                   "gives the right one more often than greedy decoding.", SOURCE),
        "chance": ("Choosing among distinct sampled answers by the probe is better than choosing one "
                   "of them at random.", OWN),
        "stack": ("All layers and kinds of states together tell errors better than the best single "
                  "layer.", INSPECTOR),
        "mlp": ("Of attention outputs, MLP outputs and block outputs, the MLP outputs are missed most.",
                INSPECTOR),
        "ece": ("Confidence from all layers is better calibrated than the answer's probability.",
                INSPECTOR),
    }
    numbers = {"exact": ("AUC up to 0.85 on TriviaQA", "secondary")}

    def __init__(self, model: Any, settings: Settings, out: Output) -> None:
        super().__init__(model, settings, out)
        self.resamples = settings.pick(300, tiny=100)
        self.log = Log()

    def run(self) -> None:
        """Ask, probe, claim and draw."""
        asked = facts.questions(self.model, self.settings.pick(144, tiny=45), self.settings.rng(1))
        self.closed = asked.allowed is not None
        self.out.record(prompts=[q.prompt for q in asked.items], name=f"questions-{self.model.name}")
        sites = [s for s in SITES if s in self.model.sites()]
        answered = list(facts.ask(self.model, asked, sites=(*sites, "embed"), samples=0,
                                  log=self.log, seed=self.settings.seed))
        self.rows = [a for a in answered if a.exact is not None]
        self.wrong = np.array([not a.right for a in self.rows])
        self.details = {"questions": len(asked), "asked about": asked.what, **asked.notes,
                        "wrong": int(self.wrong.sum()), "exact answers": str(self.log)}
        fewest = min(self.wrong.sum(), (~self.wrong).sum()) if len(self.rows) else 0
        if fewest < FEWEST:
            self.give_up(f"{self.model.name} answers {int((~self.wrong).sum())} of {len(asked)} "
                         f"questions right and {int(self.wrong.sum())} wrong ({self.log}): {FEWEST} of "
                         "each are needed")
            return
        self.entity = np.array([a.question.entity for a in self.rows])
        self.relation = np.array([a.question.relation for a in self.rows])
        self.states = self._places(answered)
        self._table()
        self._heat()
        exact = self._methods()
        self._transfer(exact)
        self._samples(asked)
        self._stack(sites)

    # -- states ------------------------------------------------------------------------------

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

    # -- where -------------------------------------------------------------------------------

    def _heat(self) -> None:
        if not self.wants("heat"):
            return
        found = sweep(self.states, self.wrong, groups=self.entity, seed=self.settings.seed,
                      permutations=self.settings.pick(100, tiny=20), folds=3)
        self.out.save(f"heat-{self.model.name}", found)
        self.figure("heat", figures.heat_map(found, self.model.name))

    def _methods(self) -> HeldOut:
        every = {place: self._probe(self._at(place)) for place in self.states.position.values}
        exact = self._probe(self._exact())
        fold = exact.fold
        spans = [slice(a.exact.first, a.exact.last + 1) for a in self.rows if a.exact is not None]
        said = {"": knowledge.said([a.greedy.log_probs[s] for a, s in zip(self.rows, spans)])}
        if self.closed:
            said[" among answer words"] = knowledge.said(
                [a.greedy.within[s] for a, s in zip(self.rows, spans)])
        logits = {f"log probability{among}, {name}": -values for among, by in said.items()
                  for name, values in by.items() if name != "max"}
        strongest = max(logits, key=lambda name: auc(logits[name], self.wrong, fold))
        words = text_baseline([f"{a.question.text} | {a.exact.text}" for a in self.rows if a.exact],
                              self.wrong, groups=self.entity, seed=self.settings.seed)
        rng = self.settings.rng(3)
        shuffled = self._probe(self._exact(), rng.permutation(self.wrong))
        control = {"control": "the same folds, layers chosen within training"}
        self._gap("exact", exact.scores, every["last answer"].scores, fold, "heat", **control,
                  details={"layers": list(exact.chosen)})
        self._gap("question", exact.scores, every["last question"].scores, fold, "heat", **control)
        depth = (np.arange(self.model.n_layers) + 0.5) / self.model.n_layers
        middle = np.flatnonzero((depth > 1 / 3) & (depth < 2 / 3))
        if len(middle) and len(middle) < self.model.n_layers:
            rest = np.setdiff1d(np.arange(self.model.n_layers), middle)
            cells = self._exact().reshape(self.model.n_layers, len(EXACT), *self._exact().shape[1:])
            a, b = (self._probe(cells[some].reshape(-1, *cells.shape[2:])) for some in (middle, rest))
            self._gap("middle", a.scores, b.scores, fold, "heat", **control,
                      details={"layers": middle.tolist(), "compared with": rest.tolist()})
        else:
            self.skip(f"{self.model.name} has {self.model.n_layers} layers, none of them in the middle",
                      "middle")
        self._gap("logits", exact.scores, logits[strongest], fold, "methods", details={
            "probabilities": strongest}, control="the best of sum, mean and minimum")
        self._gap("words", exact.scores, words.scores, fold, "methods",
                  control="TF-IDF and logistic regression, the same folds")
        self._specific(exact, logits[strongest])
        both = self._probe(self._exact(), groups=(self.entity, self.relation)) if len(
            set(self.relation)) > 1 else None
        bars: dict[str, tuple[Any, np.ndarray]] = {
            "probe, exact answer": (exact.scores, fold),
            **{f"probe, {place}": (one.scores, one.fold) for place, one in every.items()},
            **({} if both is None else {
                "probe, exact answer; relation held out, too": (both.scores, both.fold)}),
            "words alone": (words.scores, words.fold),
            **{name: (values, fold) for name, values in logits.items()},
            **self._untrained(exact)}
        self._draw_methods(bars, shuffled)
        return exact

    def _draw_methods(self, bars: dict[str, tuple[Any, np.ndarray]], shuffled: HeldOut) -> None:
        if not self.wants("methods"):
            return
        found = {}
        for name, (scores, fold) in bars.items():
            known = np.isfinite(scores)
            found[name] = statistics.bootstrap(
                lambda s, y, f: auc(s, y, f), scores[known], self.wrong[known], fold[known],
                groups=self.entity[known], resamples=self.resamples // 3, name="AUC")
        found["probe, shuffled labels"] = Estimate(shuffled.auc, (np.nan, np.nan), len(self.rows), "AUC")
        self.figure("methods", figures.methods(found, self.model.name))

    def _untrained(self, exact: HeldOut) -> dict[str, tuple[np.ndarray, np.ndarray]]:
        """Probes on an untrained model's states of the same answers, on some of them."""
        size = sum(p.numel() for p in self.model.hf.parameters())
        if size > LARGE:
            self.skip(f"{self.model.name} has {size / 1e9:.1f} billion parameters: no untrained twin is "
                      "held in memory beside it", "untrained")
            return {}
        twin, some = reinitialized(self.model, self.settings.seed), self._balanced(60)
        states = []
        for i in some:
            a = self.rows[i]
            (read,) = Branches(twin, a.question.prompt, read="resid_post").follow([a.tokens])
            assert a.exact is not None
            states.append(read.states["resid_post"][:, [a.exact.first, a.exact.last]].reshape(
                -1, self.model.d_model))
        null = held_out(np.stack(states, 1), self.wrong[some], groups=self.entity[some],
                        seed=self.settings.seed)
        own = held_out(self._exact(some), self.wrong[some],
                       groups=self.entity[some], seed=self.settings.seed)
        known = np.isfinite(null.scores) & np.isfinite(own.scores)

        def gap(a: np.ndarray, b: np.ndarray, y: np.ndarray, f: np.ndarray) -> float:
            return auc(a, y, f) - auc(b, y, f)

        self.claim("untrained", statistics.bootstrap(
            gap, own.scores[known], null.scores[known], self.wrong[some][known], own.fold[known],
            groups=self.entity[some][known], resamples=self.resamples, name="difference of AUC"),
                   null=0.0, unit="AUC", figure="methods", control=twin.name,
                   details={"answers": len(some), "AUC": own.auc, "AUC untrained": null.auc})
        scores, fold = np.full(len(self.rows), np.nan), np.full(len(self.rows), -1)
        scores[some], fold[some] = null.scores, null.fold
        return {"probe, untrained model": (scores, fold)}

    def _balanced(self, count: int) -> np.ndarray:
        """Some answers, wrong and right ones alike as far as there are."""
        wrong, right = np.flatnonzero(self.wrong), np.flatnonzero(~self.wrong)
        half = min(count // 2, len(wrong), len(right))
        return np.sort(np.concatenate([wrong[:half], right[:half]]))

    def _specific(self, exact: HeldOut, logits: np.ndarray) -> None:
        def gap(a: np.ndarray, b: np.ndarray, y: np.ndarray) -> float:
            if not 0 < y.sum() < len(y):
                return float("nan")
            return tpr_at_fpr(a, y, 0.05) - tpr_at_fpr(b, y, 0.05)

        known = np.isfinite(exact.scores)
        # One threshold for all answers: scores of the folds are put on one scale.
        common = exact.probability[known] if np.isfinite(exact.probability[known]).all() else \
            exact.scores[known]
        self.claim("specific", statistics.bootstrap(
            gap, common, logits[known], self.wrong[known], groups=self.entity[known],
            resamples=self.resamples, name="difference of true positive rates"), null=0.0,
                   unit="share of errors", figure="methods", control="the answer's probabilities",
                   details={"probe": tpr_at_fpr(common, self.wrong[known], 0.05),
                            "probabilities": tpr_at_fpr(logits[known], self.wrong[known], 0.05)})

    # -- transfer ------------------------------------------------------------------------------

    def _transfer(self, exact: HeldOut) -> None:
        names = [r for r in dict.fromkeys(self.relation) if min(
            self.wrong[self.relation == r].sum(), (~self.wrong)[self.relation == r].sum()) >= 5]
        if len(names) < 2:
            reason = (f"{len(names)} kind(s) of question have at least 5 right and 5 wrong answers: "
                      "two are needed")
            self.skip(reason, "transfer")
            self.no_figure("transfer", reason)
            return
        states, mean = self._exact(), np.array([-a.greedy.log_probs.mean() for a in self.rows])
        matrix = np.full((len(names) + 1, len(names)), np.nan)
        parts: list[tuple[np.ndarray, np.ndarray, np.ndarray]] = []
        for j, test in enumerate(names):
            there = self.relation == test
            matrix[-1, j] = auc(mean[there], self.wrong[there])
            for i, train in enumerate(names):
                if i == j:
                    matrix[i, j] = held_out(
                        states[:, there], self.wrong[there], groups=self.entity[there],
                        seed=self.settings.seed).auc
                    continue
                # An entity may occur in both.
                use = (self.relation == train) & ~np.isin(self.entity, self.entity[there])
                if len(set(self.wrong[use])) < 2:
                    continue
                found = across(states, self.wrong, use, there, groups=self.entity)
                matrix[i, j] = auc(found.scores[there], self.wrong[there])
                parts.append((np.flatnonzero(there), found.scores[there], mean[there]))
        if self.wants("transfer"):
            self.figure("transfer", figures.transfer(matrix, names, self.model.name))
        if not parts:
            self.skip("the kinds of question share their entities: none can be held out", "transfer")
            return
        at, one, other = (np.concatenate(x) for x in zip(*parts))
        pair = np.concatenate([np.full(len(p[0]), n) for n, p in enumerate(parts)])

        def gap(a: np.ndarray, b: np.ndarray, y: np.ndarray, p: np.ndarray) -> float:
            return auc(a, y, p) - auc(b, y, p)

        self.claim("transfer", statistics.bootstrap(
            gap, one, other, self.wrong[at], pair, groups=self.entity[at], resamples=self.resamples,
            name="difference of AUC, all pairs of kinds"), null=0.0, direction="below", unit="AUC",
                   figure="transfer", control="mean log probability on the same test answers", details={
                       "kinds": names, "AUC carried over": auc(one, self.wrong[at], pair),
                       "AUC of the probability": auc(other, self.wrong[at], pair),
                       "overlap of error subspaces": self._overlap(names)})

    def _overlap(self, names: Sequence[str]) -> dict[str, float]:
        """How far the leading directions of wrong answers' states agree between kinds (middle layer)."""
        states = self._at("last exact").sel(layer=self.model.n_layers // 2).values
        bases = [basis(states[self.wrong & (self.relation == r)], 3) for r in names]
        found = [overlap(a, b) for i, a in enumerate(bases) for b in bases[:i]]
        return {k: float(np.mean([f[k] for f in found])) for k in ("overlap", "random")}

    # -- samples -------------------------------------------------------------------------------

    def _samples(self, asked: facts.Questions) -> None:
        count, each = self.settings.pick((48, 15), tiny=(24, 8))
        # Those answered wrong first: they are what is asked about; then as many others.
        of = {a.question: a for a in self.rows}
        wrong = [q for q in asked.items if q in of and not of[q].right][: count * 2 // 3]
        right = [q for q in asked.items if q in of and of[q].right][: count - len(wrong)]
        chosen = asked.only([*wrong, *right])
        rows: list[dict[str, Any]] = []
        states, kinds = [], {}
        for number, a in enumerate(facts.ask(self.model, chosen, sites=("resid_post",), samples=each,
                                             log=Log(), seed=self.settings.seed, read_samples=True)):
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

    # -- all layers ------------------------------------------------------------------------------

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
            bars = {"all": stack, **{f"without {s}": w for s, w in without.items()},
                    "best single layer": best, "shuffled labels": shuffled}
            self.figure("stack", figures.stack({n: h.auc for n, h in bars.items()}, curves,
                                               self.model.name))


def run(settings: Settings, out: Output) -> None:
    facts.run_each(Truthfulness, settings, out)
