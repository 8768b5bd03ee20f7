"""What is encoded where (arXiv:1909.03368, 2003.12298, 2006.00995, 2306.03819), and is it used?

Probes of every layer, each beside what a probe can memorize, what an untrained model of the same
architecture gives, what enters the first block, and shuffled labels; and what erasing does.
"""

from collections.abc import Mapping
from typing import Any, ClassVar

import numpy as np
import xarray as xr
from sklearn.pipeline import make_pipeline

from experiments import _encoded_figures as figures
from experiments import _encoded_tasks as tasks
from experiments import _picture_questions as questions
from experiments._output import Output
from experiments._paper import Paper, Settings, opened
from experiments._subject import Subject
from interp.core import ModelRefused, PromptError, Result, statistics
from interp.figures.style import PAGE, canvas, color, note
from probes import amnesic, controls, erasure, linear, mdl, nulls, sweep
from probes.folds import folds_of, targets
from probes.quick import held_out

PAPER = Paper(
    "encoded_features",
    "What probes read in every layer, what they memorize, and what the model uses",
    ("1909.03368", "2003.12298", "2006.00995", "2306.03819"),
    "Which features can be read linearly in which layer, and does the model use them?",
    figures={
        "scores": "Held-out score of a linear probe by layer (-1: what enters the first block), beside "
        "the same on a control task, on an untrained model and on permuted labels (band).",
        "selectivity": "Score on the labels minus score on the control task, by layer.",
        "compression": "How many times shorter the labels are when the states are known (online code), "
        "for the labels, the control task, and an untrained model; five orders of the samples.",
        "erasure": "Change of the answer's log probability when a feature is erased from the output of "
        "a layer, beside random erasures of equal rank and erasures of permuted labels (bands: all of "
        "them).",
    },
    models=("looker", "reader"),
)
SELECTIVITY, MDL, AMNESIC, LEACE = PAPER.sources
PICTURE = ("color", "shape", "digit", "place")
TEXT = ("key at the last token", "key at the stated answer", "source at the last token",
        "contradiction at the last token", "contradiction at the stated answer",
        "position at any token")
MEANING = {
    "color": "The color of {}", "shape": "The shape of {}", "digit": "The digit of {}",
    "place": "The quarter of the picture of {}",
    "key at the last token": "Which key is asked for at the last token",
    "key at the stated answer": "Which key an answer belongs to at its end",
    "source at the last token": "Whether the context states an answer, or memory alone has one, at the "
    "last token",
    "contradiction at the last token": "Whether the stated answer contradicts memory at the last token",
    "contradiction at the stated answer": "Whether a stated answer contradicts memory at its end",
    "position at any token": "The position of a token (in eight bins)",
}
ORDERS, FOLDS, FEWEST = 5, 5, 3
SHRINKAGE = 0.05
FRACTIONS = (0.125, 0.25, 0.5, 1.0)


def _meanings(keys: tuple[str, ...]) -> dict[str, str]:
    if keys == PICTURE:
        return {f"{name} {place}": MEANING[name].format(thing) for place, thing in (
            ("at its image token", "an object at its image token"),
            ("at the last token", "what is asked about at the last token")) for name in PICTURE}
    return {key: MEANING[key] for key in keys}


def _claims(meanings: Mapping[str, str], erased: tuple[str, ...]) -> dict[str, tuple[str, str]]:
    made = {}
    for key, what in meanings.items():
        made[f"{key}: readable"] = (
            f"{what} is read better than a probe memorizes, an untrained model gives, or a guess.",
            SELECTIVITY)
        made[f"{key}: computed"] = (
            f"{what} is read better in some layer than in what enters the first block, and than by "
            "every control.", SELECTIVITY)
    made["mdl"] = ("States of the middle layer shorten the labels more than they shorten those of a "
                   "control task.", MDL)
    made["mdl: trained"] = ("States of the middle layer shorten the labels more than an untrained "
                            "model's do.", MDL)
    for key in erased:
        made[f"{key}: used"] = (f"Erasing the {key} harms the answer more than random erasures of equal "
                                "rank do.", AMNESIC)
        made[f"{key}: specific"] = (f"Erasing the {key} harms the answer more than erasing permuted "
                                    "labels in the same way does.", LEACE)
    return made


def run(settings: Settings, out: Output) -> None:
    def absent(name: str, reason: str) -> None:
        (_Pictures if name == "looker" else _Texts).refuse(name, reason, out)

    for model in opened(PAPER, settings, absent):
        out.record(model)
        kind = _Pictures if model.has_images else _Texts
        reason = questions.unfit(model) if model.has_images else ""
        if reason:
            kind.refuse(model.name, reason, out)
            continue
        one = kind(model, settings, out)
        try:
            one.run()
        except (PromptError, ModelRefused) as error:
            one.give_up(str(error).rstrip("."))


class _Probed(Subject):
    """One model: its features, and their nulls."""

    paper: ClassVar[Paper] = PAPER
    numbers: ClassVar[Mapping[str, tuple[str, str]]] = {}
    meanings: ClassVar[Mapping[str, str]]
    erased: ClassVar[tuple[str, ...]]

    def prepare(self) -> tasks.Tasks:
        """What is looked for."""
        raise NotImplementedError

    def run(self) -> None:
        self.resamples = self.settings.pick(2000, tiny=400)
        self.tasks = self.prepare()
        for name, batch in self.tasks.batches.items():
            self.out.record(self.model, batch.prompts, f"{name}-{self.model.name}".replace(" ", "-"))
        self.states = self._states(self.model)
        self.null_states = self._states(nulls.reinitialized(self.model, self.settings.seed))
        self.found = {feature.key: self._probe(feature) for feature in self.tasks.features}
        for key, found in self.found.items():
            self.out.save(f"{key} {self.model.name}".replace(" ", "-"), found)
        for key in self.meanings:
            if key not in self.found:
                self.skip(self.tasks.reason, f"{key}: readable", f"{key}: computed")
        probed = {key: found for key, found in self.found.items() if "score" in found.data}
        if not probed:
            self.no_figure("scores", "no feature has samples enough to be probed")
        elif self.wants("scores"):
            self.figure("scores", figures.scores(probed))
        known = {key: found for key, found in self.found.items() if "control" in found.data}
        if not known:
            self.no_figure("selectivity", "no feature has types that recur across groups")
        elif self.wants("selectivity"):
            self.figure("selectivity", figures.selectivity(known, self.tasks.features))
        self._compression()
        self._erase()

    def _states(self, model: Any) -> dict[str, xr.DataArray]:
        return {name: nulls.layer_states(model, batch.prompts, batch.places, batch_size=32)
                for name, batch in self.tasks.batches.items()}

    # -- probes ----------------------------------------------------------------------------------

    def _probe(self, feature: tasks.Feature) -> Result:
        """Sweeps of the labels, of the control task and of the untrained model, and the claims."""
        feature = feature.of_frequent_labels(FEWEST)
        states, untrained = (some[feature.batch].isel(sample=feature.rows)
                             for some in (self.states, self.null_states))
        y, kind, classes = targets(feature.labels, len(feature.labels), "classification")
        units = len(set(feature.groups.tolist()))
        if len(classes) < 2 or units < FOLDS or np.bincount(y).max() < FOLDS:
            reason = (f"{self.model.name} has {len(classes)} label(s) with {FEWEST} or more samples "
                      f"here, {len(y)} in {units} groups: too few to probe")
            self.skip(reason, f"{feature.key}: readable", f"{feature.key}: computed")
            return Result(xr.Dataset(), {"reason": reason})
        common: dict[str, Any] = dict(folds=FOLDS, groups=feature.groups, task="classification",
                                      seed=self.settings.seed)
        real = sweep.sweep(states, feature.labels, permutations=self.settings.pick(100, tiny=20),
                           inner_folds=3, **common)
        other = sweep.sweep(untrained, feature.labels, permutations=1, nested=False, **common)
        splits = folds_of(y, kind, feature.groups, FOLDS, self.settings.seed)
        cells = real["nested_index"].values.tolist()
        right = {"layer": held_out(states, y, splits, cells),
                 "embedding": held_out(states, y, splits, [0] * len(splits)),
                 # Its best layer of all, chosen where it is scored: a null may have that.
                 "untrained": held_out(untrained, y, splits, [int(np.nanargmax(
                     other["score"].values))] * len(splits)),
                 "guess": _guess(y, splits)}
        real.data["untrained"] = other["score"]
        share = float("nan")
        if feature.types is not None:
            labels = controls.control_labels(feature.labels, feature.types, seed=self.settings.seed)
            share = float(np.mean([controls.coverage(feature.types, *split) for split in splits]))
            if len(set(labels.tolist())) > 1:
                right["control"] = held_out(states, labels, splits, cells)
                real.data["control"] = xr.DataArray([
                    held_out(states, labels, splits, [i] * len(splits)).mean()
                    for i in range(len(states))], dims="layer")
                real.data["share_right"] = xr.DataArray([
                    held_out(states, y, splits, [i] * len(splits)).mean()
                    for i in range(len(states))], dims="layer")
        self._claim(feature, real, right, share)
        return real

    def _claim(
        self, feature: tasks.Feature, real: Result, right: Mapping[str, np.ndarray], share: float
    ) -> None:
        top = sweep.best(real)
        details = {**{f"share right, {name}": float(hits.mean()) for name, hits in right.items()},
                   "best layer": top["cell"]["layer"], "its score": top["score"],
                   "metric": real.manifest["metric"],
                   "p over layers": top["p"], "nested score": top["nested_score"],
                   "layers chosen in training folds": [str(c) for c in real["nested_cell"].values],
                   "control types met in training": share if feature.types is not None
                   else feature.why, "samples": len(feature.labels)}
        against = [name for name in ("control", "untrained", "guess") if name in right]

        def gap(hits: np.ndarray, *given: np.ndarray) -> float:
            return float(hits.mean() - max(one.mean() for one in given))

        def above(names: list[str]) -> statistics.Estimate:
            return statistics.bootstrap(
                gap, right["layer"], *(right[name] for name in names), groups=feature.groups,
                resamples=self.resamples, name=f"share right minus the best of: {', '.join(names)}")

        named = ", ".join(against) if "control" in right else \
            f"{', '.join(against)}; no control task: {feature.why or 'no types recur'}"
        self.claim(f"{feature.key}: readable", above(against), null=0.0, unit="share of samples",
                   figure="scores", details=details,
                   control=f"{named}; layer chosen within training folds")
        self.claim(f"{feature.key}: computed", above(["embedding", *against]), null=0.0,
                   unit="share of samples", figure="scores", details=details,
                   control=f"what enters block 0, {named}; layer chosen within training folds")

    # -- description length ----------------------------------------------------------------------

    def figure(self, name: str, figure: Any) -> None:
        """A figure that names the model."""
        figure.suptitle(self.model.name)
        super().figure(name, figure)

    def _compression(self) -> None:
        # The last of the features with a control task: what is asked about, or where a token is.
        chosen = [f for f in self.tasks.features if f.types is not None and "share_right" in
                  self.found[f.key].data and f.place == "at the last token"][:1]
        if not chosen:
            reason = "no feature at the last token has a control task here"
            self.skip(reason, "mdl", "mdl: trained")
            self.no_figure("compression", reason)
            return
        (feature,) = chosen
        middle = self.model.n_layers // 2
        layers = sorted({middle, *self.settings.pick(
            (nulls.EMBEDDING, self.model.n_layers - 1), tiny=())})
        labels = controls.control_labels(feature.labels, feature.types, seed=self.settings.seed)
        made = {}
        for name, some, y in (("labels", self.states, feature.labels),
                              ("control task", self.states, labels),
                              ("untrained model", self.null_states, feature.labels)):
            part = some[feature.batch].isel(sample=feature.rows)
            made[name] = xr.concat([mdl.online_code(
                part.sel(layer=layer).values, y, groups=feature.groups, orders=ORDERS,
                estimator=linear.logistic(C=0.1, tol=1e-2), fractions=FRACTIONS,
                seed=self.settings.seed)["compression"] for layer in layers], "layer").assign_coords(
                    layer=layers)
        more = {"details": {"feature": feature.key, "layer": middle, **{
            name: float(one.sel(layer=middle).mean()) for name, one in made.items()}},
            "unit": "times shorter", "null": 0.0, "figure": "compression"}
        real = made["labels"].sel(layer=middle).values
        for key, name in (("mdl", "control task"), ("mdl: trained", "untrained model")):
            self.claim(key, statistics.difference(
                real, made[name].sel(layer=middle).values, name="paired difference over orders of "
                "the samples"), control=f"{name}, in the same orders", **more)
        if self.wants("compression"):
            figure, ax = canvas(width=PAGE / 2, height=2.6)
            for i, (name, one) in enumerate(made.items()):
                look = {"labels": ("primary", "o-"), "control task": ("control", "s--"),
                        "untrained model": ("control", "^:")}[name]
                shift = 0.02 * (layers[-1] - layers[0]) * (i - 1)  # beside each other where they agree
                ax.errorbar(np.array(layers) + shift, one.mean("order"), yerr=one.std("order"),
                            fmt=look[1], color=color(look[0]), label=name, capsize=2)
            ax.axhline(1, color=color("control"), linewidth=0.8)
            ax.set_xticks(layers, [_layer(x) for x in layers])
            ax.set_xlabel("layer")
            ax.set_ylabel(f"compression of the labels\n({feature.key})")
            ax.legend()
            note(ax, f"mean ± standard deviation of {ORDERS} orders of the samples")
            self.figure("compression", figure)

    # -- the causal arm --------------------------------------------------------------------------

    def _erase(self) -> None:
        curves: dict[str, Result] = {}
        for key in self.erased:
            found = self.found.get(key)
            if found is None or "reason" in found.manifest:
                reason = self.tasks.reason if found is None else found.manifest["reason"]
                self.skip(reason, f"{key}: used", f"{key}: specific")
                continue
            curves[key] = self._erased(key)
        if not curves:
            self.no_figure("erasure", "nothing could be erased: see the claims")
        elif self.wants("erasure"):
            figure, axes = canvas(1, len(curves), width=PAGE if len(curves) > 1 else PAGE / 2,
                                  height=2.6, squeeze=False)
            for ax, (key, found) in zip(axes[0], curves.items()):
                figures.erased(ax, key, found)
            self.figure("erasure", figure)

    def _erased(self, key: str) -> Result:
        """Fitted on some prompts, its layer chosen on others, and its harm measured on a third part."""
        prompts, answers, places, groups = self.tasks.erased[key]
        feature = next(f for f in self.tasks.features if f.key == key).of_frequent_labels(FEWEST)
        pick = np.random.default_rng(self.settings.seed).permutation(len(prompts))
        asked = self.settings.pick(16, tiny=6)
        choose, test = pick[: asked // 2], pick[asked // 2 : asked // 2 + asked]
        used = [*choose, *test]
        last = places[0] == [-1]
        # Other pictures, facts or keys' prompts than those the answer is looked at in.
        fitted = ~np.isin(self._prompt_of(feature), used)
        top = max(1, self.model.n_layers - 1)
        layers = sorted({int(x) for x in np.linspace(
            0, top - 1, self.settings.pick(4 if last else 2, tiny=2 if last else 1))})
        bases = amnesic.resumables(self.model, [prompts[i] for i in used])
        made = []
        for layer in layers:
            states = self.states[feature.batch].isel(sample=feature.rows).sel(layer=layer).values
            given = states[fitted], feature.labels[fitted]
            eraser = erasure.Leace(shrinkage=SHRINKAGE).fit(*given)
            decoys = amnesic.decoys(eraser, *given, groups=feature.groups[fitted],
                                    seed=self.settings.seed)
            made.append([amnesic.amnesic(
                self.model, [prompts[i] for i in some], [answers[i] for i in some], eraser,
                layer=layer, positions=[places[i] for i in some], controls=len(lures), kinds=kinds,
                decoys=lures, seed=self.settings.seed, bases=own) for some, lures, kinds, own in (
                    (choose, decoys[:4], ("permuted",), bases[: len(choose)]),
                    (test, decoys, ("projection", "permuted"), bases[len(choose):]))])
        harm = [float(a["erased"].mean() - a["random"].mean()) for a, _ in made]
        at = int(np.argmin(harm))
        found = made[at][1]
        states = self.states[feature.batch].isel(sample=feature.rows).sel(layer=layers[at]).values
        after = sweep.sweep(states[None], feature.labels, groups=feature.groups, permutations=1,
                            nested=False, task="classification", seed=self.settings.seed,
                            estimator=make_pipeline(erasure.Leace(shrinkage=SHRINKAGE),
                                                    linear.ridge(states.shape[1])))
        for name, kind in (("used", "projection"), ("specific", "permuted")):
            self.told.add(f"{key}: {name}")
            sentence, source = self.claims[f"{key}: {name}"]
            claim = amnesic.used_claim(found, sentence, source, kind=kind, groups=groups[test],
                                       resamples=self.resamples, figure="erasure", unit="nats")
            claim.details.update({
                "score of a fresh probe after erasing, on held-out samples": float(
                    after["score"][0]),
                "before": float(self.found[key]["score"].sel(layer=layers[at])),
                "chance": float(self.found[key]["chance"]),
                "prompts": f"{int(fitted.sum())} states to fit, {len(choose)} prompts to choose the "
                           f"layer, {len(test)} to measure"})
            self.out.claim(claim, self.model.name)
        whole = Result(xr.concat([one.data for _, one in made], "layer").assign_coords(
            layer=layers), found.manifest)
        self.out.save(f"erased {key} {self.model.name}".replace(" ", "-"), whole)
        return whole

    def _prompt_of(self, feature: tasks.Feature) -> np.ndarray:
        """The number of the erased prompt that a sample belongs to; -1 where it is none of them."""
        batch = self.tasks.batches[feature.batch]
        known = {id(prompt): i for i, prompt in enumerate(self.tasks.erased[feature.key][0])}
        owner = self.states[feature.batch]["prompt"].values[feature.rows]
        return np.array([known.get(id(batch.prompts[int(i)]), -1) for i in owner])


class _Pictures(_Probed):
    """A vision-language model and scenes."""

    meanings = _meanings(PICTURE)
    erased = ("color at its image token", "color at the last token")
    claims = _claims(meanings, erased)

    def prepare(self) -> tasks.Tasks:
        return tasks.pictures(self.model, self.settings)


class _Texts(_Probed):
    """A language model and facts."""

    meanings = _meanings(TEXT)
    erased = ("key at the last token",)
    claims = _claims(meanings, erased)

    def prepare(self) -> tasks.Tasks:
        return tasks.texts(self.model, self.settings)


def _guess(y: np.ndarray, splits: Any) -> np.ndarray:
    """Whether the most frequent class of the training part is right."""
    found = np.zeros(len(y))
    for train, test in splits:
        found[test] = y[test] == np.bincount(y[train]).argmax()
    return found


def _layer(number: int) -> str:
    return "embedding" if number == nulls.EMBEDDING else str(number)
