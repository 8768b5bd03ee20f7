"""Position probes: where in a text or in a picture is it, as far as a state tells?

Absolute position in causal text models, with and without position encodings, with and without the
mask (arXiv:2203.16634); similarity of nearby states (arXiv:2501.00073); positions of objects in
pictures, and whether they are used (arXiv:2305.10046).
"""

from typing import Any, Optional

import numpy as np

from experiments import _object_positions as seen
from experiments import _picture_questions as questions
from experiments import _position_figures as figures
from experiments import _position_windows as windows
from experiments import _texts as texts
from experiments._output import Output
from experiments._paper import Paper, Settings
from experiments._position_claims import CLAIMS, NUMBERS, PICTURE, TEXT
from experiments._subject import Subject, run_all
from interp.core import ModelRefused, PromptError, Result, statistics
from probes import nulls, object_position, position
from probes.sweep import best, best_claim, sweep

PAPER = Paper(
    "position_probes",
    "Transformer Language Models without Positional Encodings Still Learn Positional Information; "
    "Position Information Emerges in Causal Transformers Without Positional Encodings via Similarity "
    "of Nearby Embeddings; Probing the Role of Positional Information in Vision-Language Models",
    ("2203.16634", "2501.00073", "2305.10046"),
    "Where do states say where they are?",
    figures={
        "distance": "Distance of the position that a linear probe reads from the true one, on documents "
        "it has not seen, as a share of the best constant guess (dashed: 1; dotted: a random guess), by "
        "block (-1: what enters block 0). Right: released results of the paper, 1024 positions.",
        "predicted": "Predicted against true position on random tokens, in the layer of least error.",
        "cosine": "Mean cosine of the centered states of two positions on random tokens.",
        "adjacency": "How often a state is more similar to the nearer of two earlier ones (left: the "
        "adjacency score APS; 0.5 is chance), and how well a state's similarities and its variance tell "
        "its position (right).",
        "objects": "Centers of objects read from their image tokens (left), and which of two objects is "
        "further left or higher up, from both states (middle); gray: untrained, dotted: kinds alone. "
        "Right: pairs that differ in the position word only, share in which the right one is more "
        "likely, with exact 95 % intervals. Dashed: chance.",
    },
    models=("reader", "looker"),
)
TEXT_FIGURES = ("distance", "predicted", "cosine", "adjacency")
PICTURE_FIGURES = ("objects",)
UNTRAINED, BARE, FREE = "untrained", "untrained, no encodings", "untrained, no encodings, no mask"


def run(settings: Settings, out: Output) -> None:
    run_all(One, settings, out, unfit)


def unfit(model: Any) -> str:
    """Why positions cannot be asked for in a model, "" if they can."""
    return "" if model.kind == "decoder" else f"{model.name} is an encoder: it has no causal mask"


class One(Subject):
    """One model: its text, then its pictures."""

    paper, claims, numbers = PAPER, CLAIMS, NUMBERS

    def run(self) -> None:
        for do, keys, names in ((self._text, TEXT, TEXT_FIGURES),
                                (self._pictures, PICTURE, PICTURE_FIGURES)):
            try:
                do()
            except PromptError as error:
                reason = str(error).rstrip(".")
                self.skip(reason, *(k for k in keys if k not in self.told))
                for name in names:
                    if name not in self.drawn:
                        self.no_figure(name, reason)

    def estimate(self, kind: Any, *given: Any, **more: Any) -> statistics.Estimate:
        return kind(*given, resamples=self.settings.pick(2000, tiny=500), **more)

    # -- text -------------------------------------------------------------------------------------

    def _text(self) -> None:
        model, pick = self.model, self.settings.pick
        length = min(pick(32, tiny=16), model.max_positions or 32)
        # Wide states need more documents.
        count = pick(int(np.clip(model.d_model // 8, 100, 256)), tiny=24)
        if self.settings.model is None and not questions.unfit(model):
            raise PromptError("without --model only text models are asked about text; name "
                              f"{model.name} to ask it, too")
        if length < 8:
            raise PromptError(f"{model.name} has {length} positions, too few to tell apart.")
        tokens = windows.cut(
            model, texts.random_tokens(model, count, length + 4, self.settings.rng(1)), length)
        self.out.record(None, tokens, f"random-{model.name}")
        found: dict[str, Result] = {}
        states = {"random tokens": windows.states(model, tokens)}
        try:
            prose = texts.natural(model, count, 2 * length, self.settings.rng(2))
            states["text"] = windows.states(model, windows.cut(model, prose, length,
                                                               self.settings.rng(3)))
        except PromptError:
            pass
        reason = ""
        try:
            for name, about in ((UNTRAINED, {}), (BARE, {"positions": False}),
                                (FREE, {"positions": False, "causal": False})):
                twin = windows.untrained(model, self.settings.seed, **about)
                states[name] = windows.states(twin, tokens, most=2)
        except ModelRefused as error:
            reason = str(error).rstrip(".")
        place = np.tile(np.arange(1, length), count)
        document = np.repeat(np.arange(count), length - 1)
        probe = position.PositionProbe(
            alpha=10.0, max_iter=pick(30, tiny=15),
            device=None if model.device.type == "cpu" else str(model.device))
        alike, few = {}, min(count, pick(40, tiny=12))
        for name, some in states.items():
            found[name] = position.absolute(some, place, documents=document, estimator=probe,
                                            seed=self.settings.seed)
            if name != "text":
                alike[name] = position.similarity(windows.by_document(some, count)[:, :few], folds=3)
        for name, one in found.items():
            label = name.replace(", ", "-").replace(" ", "-")
            self.out.save(f"absolute-{label}-{model.name}", one)
            if name in alike:
                self.out.save(f"similarity-{label}-{model.name}", alike[name])
        self._absolute_claims(found, reason)
        self._alike_claims(alike, windows.shares(found[BARE]) if BARE in found else None, reason)
        self._text_figures(found, alike)

    def _absolute_claims(self, found: dict[str, Result], reason: str) -> None:
        def share(name: str) -> np.ndarray:
            """Per document, in the layer that is best on the other half of the documents.

            The median of the posterior, as the constant guess is that of the positions.
            """
            one = found[name]
            return windows.other_half(one["mad_median"].values) / one["constant"].values

        trained = found["random tokens"]
        layers = trained["layer"].values.tolist()
        details = {"layers": layers, "by layer": windows.shares(trained),
                   "most probable position instead": windows.shares(trained, "mad"),
                   "accuracy": trained["accuracy"].mean("document").values.round(3).tolist(),
                   "a random guess": float(trained["uniform"].mean() / trained["constant"].mean()),
                   "in ordinary text": windows.shares(found["text"]) if "text" in found else None}
        unit = "distance of the posterior median, as a share of the constant guess's"
        self.claim("readable", self.estimate(statistics.mean, share("random tokens")), null=1.0,
                   direction="below", unit=unit, figure="distance", details=details,
                   control="the best constant guess; the layer is chosen on other documents")
        last, least = trained["mad"].values[-1], windows.other_half(trained["mad"].values)
        self.claim("fades", self.estimate(statistics.difference, last, 2 * least), null=0.0,
                   unit="tokens, last block minus twice the least", figure="distance", details={
                       **details, "last": float(last.mean()), "least": float(least.mean())},
                   control="the layer of least error is chosen on other documents")
        encoded = windows.encodings(self.model, self.settings.rng(6))
        four = [i for i, layer in enumerate(layers) if layer <= 3]
        if encoded:
            self.skip(encoded, "early")
        else:
            early = windows.other_half(trained["mad"].values[four]) / trained["constant"].values
            self.claim("early", self.estimate(statistics.mean, early), null=0.1, direction="below",
                       unit=unit, figure="distance", details=details, control="the constant guess")
        if UNTRAINED in found:
            self.claim("training", self.estimate(statistics.difference, share(UNTRAINED),
                                                 share("random tokens")), null=0.0, unit=unit,
                       figure="distance", control="random weights of the same architecture",
                       details={"untrained": windows.shares(found[UNTRAINED]), **details})
        if BARE in found:
            first = found[BARE]["mad_median"].values[0] / found[BARE]["constant"].values
            self.claim("input", self.estimate(statistics.mean, first), null=0.9, unit=unit,
                       figure="distance", control="the constant guess",
                       details={"of": "the untrained model without encodings, posterior median"})
        if FREE in found:
            free = found[FREE]["mad_median"].values[-1] / found[FREE]["constant"].values
            self.claim("bidirectional", self.estimate(statistics.mean, free), null=0.9, unit=unit,
                       figure="distance", control="the same weights with the mask",
                       details={"by layer": windows.shares(found[FREE])})
        self.skip(reason, *(k for k in ("training", "input", "bidirectional")
                            if k not in self.told))
        self.skip("it compares models that were trained alike with different position encodings, and "
                  "none come with this package", "curves", "perplexity")

    def _alike_claims(
        self, alike: dict[str, Result], linear: Optional[list[float]], reason: str
    ) -> None:
        def of(name: str, what: str = "aps", at: int = 1) -> np.ndarray:
            return alike[name][what].values[at]

        def detail(name: str) -> dict[str, Any]:
            one = alike[name].data
            return {k: one[k].mean("document").values.round(3).tolist()
                    for k in ("aps", "aps_next", "aps_neighbor", "nearness")}

        more: dict[str, Any] = {"unit": "APS", "figure": "adjacency", "control": "random tokens"}
        self.claim("alike_first", self.estimate(statistics.mean, of("random tokens")), null=0.6,
                   details=detail("random tokens"), **more)
        if BARE in alike:
            self.claim("alike_input", self.estimate(statistics.mean, of(BARE, at=0)), null=0.5,
                       direction="equal", tolerance=0.05, **more)
            self.claim("alike_bare", self.estimate(statistics.mean, of(BARE)), null=0.6,
                       details=detail(BARE), **{**more, "control": "the same weights without the mask"})
            r2 = {k: alike[BARE][k].values[1:].mean(0) for k in ("r2_cosine", "r2_variance")}
            self.claim("variance", self.estimate(statistics.difference, r2["r2_cosine"],
                                                 r2["r2_variance"]), null=0.0, figure="adjacency",
                       unit="R2 of the position on unseen documents, mean of the blocks",
                       control="the variance over a state's coordinates; a state's similarity to itself "
                       "is left out", details={k: float(v.mean()) for k, v in r2.items()})
        if FREE in alike:
            last = [of(name, "r2_cosine", -1) for name in (BARE, FREE)]
            self.claim("mask", self.estimate(statistics.difference, *last), null=0.0,
                       unit="R2 of the position on unseen documents", figure="adjacency",
                       control="the same weights without the mask", details={
                           "with the mask": float(last[0].mean()), "without": float(last[1].mean()),
                           "by a linear probe of the state (distance / constant guess's)": linear})
            self.claim("alike_free", self.estimate(statistics.mean, of(FREE, at=-1)), null=0.5,
                       direction="equal", tolerance=0.05, details=detail(FREE),
                       **{**more, "control": "the same weights with the mask"})
        self.skip(reason, *(k for k in ("alike_input", "alike_bare", "variance", "mask", "alike_free")
                            if k not in self.told))

    def _text_figures(self, found: dict[str, Result], alike: dict[str, Result]) -> None:
        name = self.model.name
        if self.wants("distance"):
            self.figure("distance", figures.distance(found, name, FREE))
        if self.wants("predicted"):
            self.figure("predicted", figures.predicted(found["random tokens"], name))
        if self.wants("cosine"):
            self.figure("cosine", figures.cosine(alike, name))
        if self.wants("adjacency"):
            self.figure("adjacency", figures.adjacency(alike, name, FREE))

    # -- pictures ---------------------------------------------------------------------------------

    def _pictures(self) -> None:
        model, pick, out = self.model, self.settings.pick, self.out
        reason = questions.unfit(model)
        if reason:
            raise PromptError(reason)
        looked = seen.look(model, pick(100, tiny=18), self.settings.rng(4))
        out.record(None, looked.prompts, f"pictures-{model.name}")
        layers = windows.layers(model.n_layers)
        objects, last = seen.states(model, looked, layers)
        more: dict[str, Any] = dict(folds=pick(4, tiny=3), seed=self.settings.seed)
        many = pick(50, tiny=20)
        boxes = object_position.regress_boxes(objects, looked.places, looked.picture,
                                              permutations=many, **more)
        mutual = self._mutual(objects, looked, more)
        untrained: dict[str, Any] = {}
        try:
            bare, _ = seen.states(nulls.reinitialized(model, self.settings.seed), looked, layers)
            untrained = {**self._mutual(bare, looked, more), **object_position.regress_boxes(
                bare, looked.places, looked.picture, permutations=many, **more)}
        except ModelRefused as error:
            reason = str(error).rstrip(".")
        for names, results in (("objects", {**boxes, **mutual}), ("untrained-objects", untrained)):
            for name, one in results.items():
                out.save(f"{names}-{name}-{model.name}", one)
        present = self._present(boxes, mutual, untrained, reason)
        place = sweep(last, list(looked.corner), groups=np.arange(len(looked.prompts)),
                      permutations=pick(100, tiny=20), **more)
        self._best("asked", place, {"kinds alone": _by_question(looked, more),
                                    "by layer": place["score"].values.round(3).tolist()},
                   figure="objects")
        shown = self._contrasts(looked, present)
        self.skip("the scenes are flat: nothing is nearer", "depth")
        self.skip("it compares models trained in different ways", "remedies")
        if self.wants("objects"):
            self.figure("objects", figures.objects(boxes, mutual, untrained, shown, model.name))

    def _mutual(self, objects: Any, looked: seen.Looked, more: Any) -> dict[str, Result]:
        found = {}
        for relation in object_position.RELATIONS:
            couples, holds = object_position.pairs(looked.places, looked.picture, relation,
                                                   margin=0.05, seed=self.settings.seed)
            found[relation] = object_position.mutual(objects, couples, holds, images=looked.picture,
                                                     kinds=looked.kind, **more)
        return found

    def _best(self, key: str, found: Result, details: dict[str, Any], figure: str) -> str:
        """A claim on the best layer, paid for by the maximum over layers; its verdict."""
        sentence, source = CLAIMS[key]
        claim = best_claim(found, sentence, source, level=self.settings.pick(0.05, tiny=0.1),
                           figure=figure)
        claim.details.update(details)
        self.told.add(key)
        self.out.claim(claim, self.model.name)
        return claim.verdict

    def _present(self, boxes: Any, mutual: Any, untrained: Any, reason: str) -> dict[str, str]:
        """Claims on what is in the objects' states, and their verdicts."""
        verdicts = {}
        for key, axis in (("across", "x"), ("down", "y")):
            bare = best(untrained[axis])["score"] if axis in untrained else None
            verdicts[key] = self._best(key, boxes[axis], {
                "by layer": boxes[axis]["score"].values.round(3).tolist(),
                "untrained, best": bare, "null": "boxes shuffled within pictures"}, "objects")
        for key in ("left", "above"):
            one = mutual[key]
            estimate = self.estimate(object_position.gain, one)
            self.claim(key, estimate, null=0.0, unit="accuracy, states minus kinds", figure="objects",
                       control="a probe of the two kinds alone; the layer is chosen on other pictures",
                       details={"accuracy": float(one["nested"].mean()),
                                "kinds alone": float(one["by_kind"].mean()),
                                "chosen layers": one["chosen"].values.tolist()})
            low = estimate.interval[0]
            verdicts[key] = "supported" if low > 0 else "not shown"
        if "left" not in untrained:
            self.skip(reason, "taught")
            return verdicts
        pairs = [np.concatenate([one[key]["nested"].values.astype(float) for key in ("left", "above")])
                 for one in (mutual, untrained)]
        group = np.concatenate([mutual[key]["of_image"].values for key in ("left", "above")])
        self.claim("taught", self.estimate(statistics.difference, *pairs, groups=group), null=0.0,
                   unit="accuracy", figure="objects", control="random weights of the same architecture",
                   details={"trained": float(pairs[0].mean()), "untrained": float(pairs[1].mean())})
        return verdicts

    def _contrasts(
        self, looked: seen.Looked, present: dict[str, str]
    ) -> dict[str, statistics.Estimate]:
        answers = object_position.contrast(*seen.captions(self.model, looked))
        asks = object_position.contrast(*seen.questions_that_differ(
            self.model, self.settings.pick(40, tiny=8), self.settings.rng(5)))
        more: dict[str, Any] = dict(null=0.5, direction="equal", tolerance=0.1, figure="objects",
                                    unit="share of pairs", control="chance, exact binomial interval")
        self.claim("captions", answers, **more)
        self.claim("asks", asks, **more)
        missing = [CLAIMS[key][0] for key, verdict in present.items() if verdict != "supported"]
        used = answers.interval[0] > 0.5
        if missing:
            self.skip("position was not shown to be present: " + missing[0].rstrip("."), "unused")
        else:
            self.claim("unused", answers, details={"present but unused": not used}, **more)
        return {"answers": answers, "questions": asks}


def _by_question(looked: seen.Looked, more: dict[str, Any]) -> float:
    """The corner told by the words of the question alone."""
    words = nulls.bag_of_tokens(looked.prompts)[None]
    found = sweep(words, list(looked.corner), groups=np.arange(len(looked.prompts)), permutations=1,
                  **more)
    return float(found["score"][0])
