"""Errors in the states: LLMs Know More Than They Show (2410.02707), InternalInspector (2406.12053).

Greedy and sampled answers to questions of known truth, probes for errors at every layer and token with
whole entities held out, and what words alone, probabilities alone and an untrained model would tell.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np

from experiments import _fact_questions as facts
from experiments import _truthfulness_figures as figures
from experiments._error_probes import EXACT, SITES, SampleChecks, StackChecks
from experiments._fact_questions import FEWEST
from experiments._output import Output
from experiments._paper import Paper, Settings
from experiments._subject import run_all
from interp.core import statistics
from interp.models.branches import Branches
from interp.models.reinitialize import reinitialized
from probes import knowledge
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
        "best single layer, which is chosen within training; 95 % intervals. Right: confidence against "
        "accuracy.",
    },
    models=("reader",),
)
SOURCE, INSPECTOR = PAPER.sources
OWN = "measured by this toolkit, after arXiv:2410.02707"
LARGE = 5e8
"""Models of more parameters get no untrained twin: it would be held in memory beside them."""


class Truthfulness(SampleChecks, StackChecks):
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

    def run(self) -> None:
        """Ask, probe, claim and draw."""
        asked = facts.questions(self.model, self.settings.pick(120, tiny=42), self.settings.rng(1))
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
        found = {name: self._auc(scores, fold) for name, (scores, fold) in bars.items()}
        found["probe, shuffled labels"] = self._auc(shuffled.scores, shuffled.fold, shuffled.labels)
        self.figure("methods", figures.methods(found, self.model.name))

    def _untrained(self, exact: HeldOut) -> dict[str, tuple[np.ndarray, np.ndarray]]:
        """Probes on an untrained model's states of the same answers, on some of them."""
        size = sum(p.numel() for p in self.model.hf.parameters())
        if size > LARGE:
            self.skip(f"{self.model.name} has {size / 1e9:.1f} billion parameters: no untrained twin is "
                      "held in memory beside it", "untrained")
            return {}
        twin = reinitialized(self.model, self.settings.seed)
        some = self._balanced(self.settings.pick(48, tiny=20))
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


def run(settings: Settings, out: Output) -> None:
    run_all(Truthfulness, settings, out, facts.unfit)
