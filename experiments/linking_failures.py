"""Facts lost when an entity is shown (arXiv:2508.18297): which answers about a picture not to trust.

Models with knowledge get the same question about an entity that is named and about one that is shown
(its name as a picture). `looker` knows nothing but its pictures: it is asked about noisy scenes.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pandas as pd
import xarray as xr
from sklearn.metrics import balanced_accuracy_score

from experiments import _fact_questions as facts
from experiments import _linking_failure_figures as figures
from experiments import _picture_questions as pictures
from experiments._fact_questions import FEWEST, TABLES
from experiments._output import Output
from experiments._paper import Paper, Settings
from experiments._subject import Subject, run_each
from interp.core import Prompt, PromptError, statistics
from interp.models.branches import Branches
from interp.models.model import Model
from interp.prompts import image, scenes
from probes import exact_answer
from probes.held_out import HeldOut, auc, held_out, text_baseline
from probes.selective import risk_coverage, tpr_at_fpr
from probes.sweep import best, best_claim, sweep

PAPER = Paper(
    "linking_failures",
    "Can VLMs Recall Factual Associations From Visual References?",
    ("2508.18297",),
    "Is a fact lost when its entity is shown, and do the states of the question tell?",
    figures={
        "layers": "Area under the ROC curve of probes for unreliable answers, by layer, at the last "
        "token of the question and averaged over the image; gray: the best of permuted labels. Layer -1 "
        "is what enters block 0.",
        "coverage": "Errors that remain among the answers accepted first, by what they are ordered by.",
    },
    models=("looker",),
)
(SOURCE,) = PAPER.sources
OWN = "measured by this toolkit, after arXiv:2508.18297"
NOISE = (4.0, 5.0, 6.0, 8.0)
"""Noise of the pictures that `looker` is tried on; its training had 1."""

AIM = 0.35
TASKS = ("color", "shape", "position", "read")
RELATIONS = ("capital", "symbol", "number", "opposite", "plural")
SHOWN = {
    "capital": "What is the capital of the country whose name is in the picture?",
    "symbol": "What is the chemical symbol of the element whose name is in the picture?",
    "number": "What is the atomic number of the element whose name is in the picture?",
    "opposite": "What is the opposite of the word in the picture?",
    "plural": "What is the plural of the word in the picture?",
}
NAME_IT = "Which word is in the picture?" + facts.BRIEF


@dataclass(frozen=True, eq=False)
class Shown:
    """A question about a picture, the words it is asked in, and what it is about."""

    prompt: Prompt
    text: str
    relation: str
    entity: str
    gold: tuple[int, ...]


@dataclass(eq=False)
class Given:
    """What was answered to it, how sure, and the states: `[layer, place, d_model]`."""

    right: bool
    sure: float
    entropy: float
    states: np.ndarray


class LinkingFailures(Subject):
    """One model that sees."""

    paper = PAPER
    claims = {
        "ratio": ("Facts that are recalled of a named entity are recalled less often when the entity is "
                  "shown, although it is recognized.", SOURCE),
        "layer": ("Some layer's states at the last token, or averaged over the image, tell unreliable "
                  "answers to new pictures.", SOURCE),
        "flag": ("Among answers to one kind of question, a probe of the question's states tells the "
                 "unreliable ones, for entities that it has not seen.", SOURCE),
        "accuracy": ("It flags unreliable answers with a balanced accuracy above 0.92.", SOURCE),
        "unseen": ("It also tells them for kinds of questions that it has not seen.", SOURCE),
        "selective": ("Ordered by the probe, accepted answers hold fewer errors at equal coverage than "
                      "ordered by the largest probability.", SOURCE),
        "coverage": ("At half of the errors, more answers are accepted by the probe than by the largest "
                     "probability.", SOURCE),
        "words": ("A probe tells unreliable answers better than the words of the question do.", OWN),
        "specific": ("At most 5 % of reliable answers being flagged, the probe finds more unreliable "
                     "ones than the largest probability does.", "arXiv:2503.10602"),
    }
    numbers = {"accuracy": ("more than 92 % accuracy", "secondary")}

    def __init__(self, model: Model, settings: Settings, out: Output) -> None:
        super().__init__(model, settings, out)
        self.resamples = settings.pick(500, tiny=100)
        self.details: dict[str, Any] = {}

    def run(self) -> None:
        """Ask, label, probe, claim and draw."""
        shown, given = self._looker() if pictures.is_looker(self.model) else self._paired()
        self.wrong = np.array([not g.right for g in given])
        wrong = int(self.wrong.sum())
        self.details |= {"questions": len(given), "unreliable": wrong}
        if min(wrong, len(given) - wrong) < FEWEST:
            self.give_up(f"{wrong} of {len(given)} answers of {self.model.name} that can be judged are "
                         f"unreliable: {FEWEST} reliable and {FEWEST} unreliable ones are needed")
            return
        self.out.record(prompts=[s.prompt for s in shown], name=f"questions-{self.model.name}")
        self.shown = shown
        self.entity = np.array([s.entity for s in shown])
        self.relation = np.array([s.relation for s in shown])
        self.sure, self.entropy = (np.array([getattr(g, n) for g in given]) for n in ("sure", "entropy"))
        self.states = xr.DataArray(
            np.stack([g.states for g in given], 2), dims=("layer", "position", "sample", "d_model"),
            coords={"layer": range(-1, self.model.n_layers), "position": ["last token", "image mean"]})
        self.out.table(f"answers-{self.model.name}", pd.DataFrame({
            "question": [s.text for s in shown], "entity": self.entity, "relation": self.relation,
            "unreliable": self.wrong, "largest_probability": self.sure, "entropy": self.entropy}))
        self._sweep()
        self._probe()

    # -- asking ----------------------------------------------------------------------------------

    def _answer(self, one: Shown, longest: int) -> tuple[tuple[int, ...], Given]:
        """The greedy answer, and the states of the question."""
        seen = [p for segment in one.prompt.of_kind("image") for p in segment.positions]
        if not seen:
            raise PromptError(f"the prompts of {self.model.name} do not tell its image tokens")
        made = Branches(self.model, one.prompt, read=("embed", "resid_post"), keep=[-1, *seen])
        (tokens,) = made.sample(1, new_tokens=longest, temperature=0, with_end=True)
        both = np.concatenate([made.states["embed"], made.states["resid_post"]])
        states = np.stack([both[:, 0], both[:, 1:].mean(1)], 1)
        read = made.follow([tokens])[0] if tokens else None
        sure = float(np.exp(read.log_probs.sum())) if read else float(made.logits.softmax(-1).max())
        entropy = float(read.entropy[0]) if read else 0.0
        return tuple(tokens), Given(False, sure, entropy, states)

    def _looker(self) -> tuple[list[Shown], list[Given]]:
        """Scenes so noisy that some answers are wrong; one question per picture."""
        rng = self.settings.rng(1)
        tried: dict[float, float] = {}
        for noise in NOISE:
            some = [self._seen(s) for s in _scenes(self.model, 16, np.random.default_rng(
                rng.integers(2**32)), noise)]
            tried[noise] = float(np.mean([not g.right for g in some]))
            if tried[noise] >= AIM:
                break
        noise = min(tried, key=lambda n: abs(tried[n] - AIM))
        self.details |= {"noise of the pictures": noise, "errors on other pictures": tried[noise]}
        shown = _scenes(self.model, self.settings.pick(160, tiny=56), rng, noise)
        given = [self._seen(one) for one in shown]
        self._told(shown)
        return shown, given

    def _seen(self, one: Shown) -> Given:
        tokens, given = self._answer(one, len(one.gold) + 2)
        ends = self.model.end_tokens
        given.right = tuple(t for t in tokens if t not in ends) == one.gold
        return given

    def _told(self, shown: Sequence[Shown]) -> None:
        """Can `looker` answer when the fact is told in words instead?"""
        some = [s for s in shown if s.relation in ("color", "shape")][:24]
        right, guesses = [], [s.gold for s in some]
        for one in some:
            fact = f"there is {scenes.with_article(one.entity)} . {one.text}"
            prompt = self.model.prompt(fact, chat=pictures.has_chat(self.model))
            (tokens,) = self.model.generate(prompt, len(one.gold))
            right.append(tuple(tokens) == one.gold)
        guess = max(guesses.count(g) for g in set(guesses)) / len(guesses)
        self.skip(f"{self.model.name} has no facts of its own, and of facts that are told in words it "
                  f"recalls {np.mean(right):.0%} (always the same answer: {guess:.0%}): there is no "
                  "recall by name to compare with", "ratio")

    def _paired(self) -> tuple[list[Shown], list[Given]]:
        """The entity named, shown, and asked for: failures are right by name and wrong by picture."""
        rng, rows = self.settings.rng(1), []
        each = self.settings.pick(40, tiny=4)
        chat = pictures.has_chat(self.model)
        for relation in RELATIONS:
            template, table = TABLES[relation]
            pattern = facts.DIGITS if relation in facts.NUMERIC else r"[^\W\d_][\w'.-]*"
            values = () if relation in facts.NUMERIC else tuple(table.values())
            for i in rng.permutation(len(table))[:each]:
                entity, gold = list(table.items())[int(i)]
                picture = image.rendered_text(entity, (336, 336), font_size=40).image
                named = self.model.prompt(template.format(entity) + facts.BRIEF, chat=chat)
                what = self.model.prompt(NAME_IT, images=[picture], chat=chat)
                asked = self.model.prompt(SHOWN[relation] + facts.BRIEF, images=[picture], chat=chat)
                ids = facts.written(self.model, gold)
                one = Shown(asked, SHOWN[relation], relation, entity, ids)
                longest = len(ids) + 8
                tokens, given = self._answer(one, longest)
                by_name = self.model.generate(named, longest)[0]
                name = self.model.generate(what, len(facts.written(self.model, entity)) + 6)[0]
                given.right = self._is(tokens, gold, values, pattern)
                rows.append((one, given, self._is(by_name, gold, values, pattern),
                             self._is(name, entity, [entity], "")))
        known = [row for row in rows if row[3]]
        self.details |= {"recognized": len(known), "asked about": len(rows)}
        if len(known) < FEWEST:
            self.skip(f"{self.model.name} reads {len(known)} of {len(rows)} names in pictures: {FEWEST} "
                      "are needed", "ratio")
            return [], []
        visual, named_right = (np.array(x, float) for x in zip(*((r[1].right, r[2]) for r in known)))
        groups = [r[0].entity for r in known]
        if named_right.mean() < 0.1:
            self.skip(f"{self.model.name} answers {named_right.mean():.0%} of the questions by name",
                      "ratio")
        else:
            self.claim("ratio", statistics.difference(
                visual, named_right, groups=groups, resamples=self.resamples), null=0.0,
                       direction="below", unit="accuracy", control="the same question by name", details={
                           **self.details, "by name": float(named_right.mean()),
                           "by picture": float(visual.mean()),
                           "ratio": float(visual.mean() / named_right.mean())})
        told = [row for row in known if row[2]]
        return [row[0] for row in told], [row[1] for row in told]

    def _is(self, tokens: Sequence[int], gold: str, values: Sequence[str], pattern: str) -> bool:
        found = exact_answer.find(self.model.tokenizer, tokens, values, pattern)
        return found is not None and found.text.replace(",", "").lower() == gold.lower()

    # -- probing ----------------------------------------------------------------------------------

    def _sweep(self) -> None:
        # One question per picture: pictures are apart as it is. Entities are held out below; labels of
        # entities that occur once could not be permuted within them.
        found = sweep(self.states, self.wrong, groups=None, seed=self.settings.seed, folds=3,
                      permutations=self.settings.pick(100, tiny=20))
        self.out.save(f"layers-{self.model.name}", found)
        sentence, source = self.claims["layer"]
        self.told.add("layer")
        claim = best_claim(found, sentence, source, figure="layers")
        self.out.claim(replace(claim, control=f"{claim.control}; kinds of question and entities are not "
                               "held out here"), self.model.name)
        if self.wants("layers"):
            self.figure("layers", figures.layers(found, best(found), self.model.name))

    def _held(self, **more: Any) -> HeldOut:
        states = self.states.isel(layer=slice(1, None))
        given = {"groups": self.entity, "seed": self.settings.seed, **more}
        return held_out(states, self.wrong, **given)

    def _probe(self) -> None:
        probe = self._held()
        fine = np.isfinite(probe.scores) & np.isfinite(probe.probability)
        y, f, groups = self.wrong[fine], probe.fold[fine], self.entity[fine]
        words = text_baseline([s.text for s in self.shown], self.wrong, groups=self.entity,
                              seed=self.settings.seed)
        common: dict[str, Any] = {"groups": groups, "resamples": self.resamples}
        details = {**self.details, "share unreliable": float(y.mean()), "cells": list(probe.chosen),
                   "AUC": probe.auc, "AUC of the largest probability": auc(-self.sure, self.wrong),
                   "AUC of the entropy": auc(self.entropy, self.wrong),
                   "AUC of the words of the question": words.auc}
        # Kinds of question differ in their errors, and every state tells the kind.
        stratum = f + 100 * np.unique(self.relation[fine], return_inverse=True)[1]
        self.claim("flag", statistics.bootstrap(
            auc, probe.scores[fine], y, stratum, name="AUC", **common), null=0.5, unit="AUC",
                   figure="layers", control="entities held out; layer and place chosen within training; "
                   "answers compared within one kind of question", details=details)

        def balanced(p: np.ndarray, truth: np.ndarray) -> float:
            return float(balanced_accuracy_score(truth, p > 0.5)) if 0 < truth.sum() < len(
                truth) else float("nan")

        # Flagged where more likely unreliable than training answers were.
        usual = np.array([self.wrong[probe.fold != fold].mean() for fold in f])
        self.claim("accuracy", statistics.bootstrap(
            balanced, probe.probability[fine] + 0.5 - usual, y, name="balanced accuracy", **common),
                   null=0.92, unit="balanced accuracy", control="class balance is in the details",
                   figure="layers", details=details)
        self._unseen()

        def surer(a: np.ndarray, b: np.ndarray, truth: np.ndarray) -> float:
            return risk_coverage(b, 1 - truth).aurc - risk_coverage(a, 1 - truth).aurc

        sure = 1 - probe.probability[fine]
        curves = {name: risk_coverage(values, ~y) for name, values in (
            ("probe", sure), ("largest probability", self.sure[fine]),
            ("entropy", -self.entropy[fine]), ("words of the question", -words.scores[fine]),
            ("perfect order", ~y))}
        areas = {f"AURC, {name}": curve.aurc for name, curve in curves.items()}
        self.claim("selective", statistics.bootstrap(
            surer, sure, self.sure[fine], y, name="difference of AURC", **common), null=0.0, unit="risk",
                   figure="coverage", control="the answer's own probability",
                   details={**details, **areas})

        def more_covered(a: np.ndarray, b: np.ndarray, truth: np.ndarray) -> float:
            level = truth.mean() / 2
            return risk_coverage(a, 1 - truth).at(level) - risk_coverage(b, 1 - truth).at(level)

        self.claim("coverage", statistics.bootstrap(
            more_covered, sure, self.sure[fine], y, name="difference of coverage", **common), null=0.0,
                   unit="share of answers", figure="coverage", control="the answer's own probability",
                   details={**details, "risk": float(y.mean() / 2)})

        def gap(a: np.ndarray, b: np.ndarray, truth: np.ndarray, fold: np.ndarray) -> float:
            return auc(a, truth, fold) - auc(b, truth, fold)

        self.claim("words", statistics.bootstrap(
            gap, probe.scores[fine], words.scores[fine], y, f, name="difference of AUC", **common),
                   null=0.0, unit="AUC", control="TF-IDF and logistic regression, same folds",
                   figure="coverage", details=details)

        def sharper(a: np.ndarray, b: np.ndarray, truth: np.ndarray) -> float:
            if not 0 < truth.sum() < len(truth):
                return float("nan")
            return tpr_at_fpr(-a, truth, 0.05) - tpr_at_fpr(-b, truth, 0.05)

        self.claim("specific", statistics.bootstrap(
            sharper, sure, self.sure[fine], y, name="difference of true positive rates", **common),
                   null=0.0, unit="share of unreliable answers", figure="coverage",
                   control="the answer's own probability", details={
                       **details, "probe": tpr_at_fpr(-sure, y), "probability": tpr_at_fpr(
                           -self.sure[fine], y)})
        if self.wants("coverage"):
            self.figure("coverage", figures.coverage(curves, self.model.name))

    def _unseen(self) -> None:
        if len(set(self.relation)) < 2:
            self.skip("there is one kind of question only", "unseen")
            return
        probe = self._held(groups=(self.entity, self.relation))
        fine = np.isfinite(probe.scores)
        if len(set(self.wrong[fine])) < 2:
            self.skip("no fold has both reliable and unreliable answers to train on", "unseen")
            return
        self.claim("unseen", statistics.bootstrap(
            auc, probe.scores[fine], self.wrong[fine], probe.fold[fine] + 100 * np.unique(
                self.relation[fine], return_inverse=True)[1], groups=self.entity[fine],
            resamples=self.resamples, name="AUC"), null=0.5, unit="AUC", figure="layers",
                   control="entities and kinds of question held out together", details={
                       "kinds": sorted(set(self.relation)), "cells": list(probe.chosen)})


def _scenes(model: Model, count: int, rng: np.random.Generator, noise: float) -> list[Shown]:
    """One question about each noisy scene, its object being the entity."""
    say, found = pictures._spelling(model), []
    while len(found) < count:
        for scene in scenes.scenes(rng, count - len(found), noise=noise):
            task = TASKS[len(found) % len(TASKS)]
            options = scenes.questions(scene, rng, tasks=(task,))
            if options:
                one = pictures._ask(model, scene, options[0], options[0].text, say)
                entity = scene.objects[options[0].objects[0]].name
                found.append(Shown(one.prompt, one.text, task, entity, one.answer))
    return found[:count]


def run(settings: Settings, out: Output) -> None:
    run_each(LinkingFailures, settings, out)
