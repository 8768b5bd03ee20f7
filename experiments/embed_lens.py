"""What visual tokens encode before the language model (arXiv:2603.00510): sink, dead and alive tokens.

On `looker`, or any vision-language model: landmarks are found in pictures of scenes and of nothing.
"""

from typing import Any, Optional

import numpy as np
from sklearn.model_selection import GroupKFold, KFold, cross_val_predict

from experiments import _embed_figures as figures
from experiments import _patch_words
from experiments._embed_answers import Answers
from experiments._output import Output
from experiments._paper import Paper, Settings
from experiments._subject import run_each
from interp.core import ModelRefused, SiteRefused, statistics
from interp.models import tower
from interp.prompts import scenes
from interp.sinks import visual
from probes import linear, nearest_token
from probes.contextual_lens import agreement
from probes.nearest_token import CLASSES, NO_GROUPS, TokenClasses
from probes.nulls import reinitialized
from probes.visual_tokens import nearest_words, visual_tokens, word_embeddings

PAPER = Paper(
    "embed_lens",
    "What Do Visual Tokens Really Encode? Uncovering Sparsity and Redundancy in Multimodal Large "
    "Language Models",
    ("2603.00510",),
    "Which visual tokens mean something before the language model, and what does it do with them?",
    figures={
        "map": "Classes of the visual tokens of three pictures.",
        "shares": "Classes per picture, and in pictures of nothing (gray background).",
        "words": "How often every word is the nearest one, and how evenly its tokens come from "
        "all pictures (1: constant landmarks are even).",
        "pruning": "Right answers by kind of question without dead tokens and without as many alive "
        "ones (bars: 95 % intervals).",
        "blocks": "Right answers when the visual tokens enter late (gray: those of another picture), "
        "and when their updates are skipped.",
        "middle": "Cosine between alive visual tokens before block 0 and states of text, by layer.",
    },
    models=("looker",),
)
(SOURCE,) = PAPER.sources
OWN = f"measured by this toolkit, after {SOURCE}"
TASKS = ("color", "shape", "existence", "position", "read")
SMALL_VOCABULARY = 1000
"""With fewer words a token's three nearest are no longer near it: the nearest one alone is read."""

LARGE = 1_000_000_000
"""Of a model with more parameters no second one with random weights is put beside it."""

CLAIMS: dict[str, tuple[str, str]] = {
    "groups": ("Visual tokens fall into sinks, dead and alive ones, and about 60 % are alive.", SOURCE),
    "stable": ("Landmarks found in other pictures give tokens the classes of their own.", OWN),
    "constant": ("Sink and dead tokens are more alike from picture to picture than alive ones.", SOURCE),
    "meaning": ("Dead tokens tell less of what a picture shows than as many alive ones.", SOURCE),
    "free": ("Pruning the sink and dead tokens costs no right answers.", SOURCE),
    "matched": ("Pruning alive tokens causes more wrong answers than pruning as many dead ones.",
                SOURCE),
    "attention": ("When sinks are pruned, attention moves to the first token and text, more than "
                  "pro rata.", SOURCE),
    "before": ("Alive tokens hold the color of what they show before the language model.", SOURCE),
    "words": ("The words nearest to alive tokens name what they show.", SOURCE),
    "redundant": ("Leaving out all updates of visual tokens inside the language model costs no right "
                  "answers.", SOURCE),
    "middle": ("Alive tokens are most like text states of the middle layers.", SOURCE),
    "entry": ("Visual tokens that enter at the middle layer give as many right answers.", SOURCE),
}
NUMBERS: dict[str, tuple[str, str]] = {"groups": ("about 60 % alive", "paper")}


def run(settings: Settings, out: Output) -> None:
    run_each(_One, settings, out)


class _One(Answers):
    paper, claims, numbers = PAPER, CLAIMS, NUMBERS

    def run(self) -> None:
        model, settings = self.model, self.settings
        self.k = 1 if model.d_vocab < SMALL_VOCABULARY else 3
        self.few = {"resamples": settings.pick(2000, tiny=300)}
        self.all = _patch_words.shown(model, settings.pick(36, tiny=12), settings.rng(1), TASKS)
        self.prompts = [one.prompt for one in self.all]
        blank = _patch_words.empty(model, settings.pick(8, tiny=2), settings.rng(2))
        self.out.record(model, self.prompts, f"questions-{model.name}")
        self.tokens = visual_tokens(model, [*self.prompts, *blank])
        self.x, self.image = self.tokens["state"].values, self.tokens["prompt"].values
        self.real = self.image < len(self.prompts)
        self.sinks = self._sinks()
        self._classes()
        self._constant()
        self._held_before()
        try:
            self._answers()
        except (ModelRefused, SiteRefused) as error:  # cannot be resumed or edited in the middle
            self.give_up(str(error))

    # -- classes ----------------------------------------------------------------------------------

    def _sinks(self) -> np.ndarray:
        """Tokens that fire in the sink dimensions; of the pictures with questions."""
        some = self.prompts[: self.settings.pick(8, tiny=3)]
        found = np.zeros(len(self.x), bool)
        dims = visual.find_sink_dims(self.model, [], some, n_null=0).found.dims
        if not dims:
            return found
        for number, prompt in enumerate(self.prompts):
            states = self.model.run(prompt, read="resid_pre", logits="none").reads["resid_pre"]
            phi = visual.sink_value(states.values[0, 2:], dims).numpy().max(0)
            mine = self.image == number
            found[mine] = phi[self.tokens["position"].values[mine]] >= visual.portable_tau(
                self.model.d_model)
        return found

    def _fit(self, constant: str, mine: np.ndarray, k: Optional[int] = None) -> TokenClasses:
        return TokenClasses(self.k if k is None else k, constant=constant).fit(
            self.x[mine], embeddings=word_embeddings(self.model), images=self.image[mine],
            places=self.tokens["place"].values[mine], received=self.tokens["received"].values[mine],
            sinks=self.sinks[mine], uniform=~self.real[mine])

    def _classes(self) -> None:
        every = np.ones(len(self.x), bool)
        rules = {rule: self._fit(rule, every) for rule in ("anywhere", "same place")}
        kinds = {rule: made.predict(self.x) for rule, made in rules.items()}
        alive = {rule: np.array([(kind[self.image == i] == "alive").mean()
                                 for i in range(len(self.prompts))]) for rule, kind in kinds.items()}
        # The paper's landmarks are constant anywhere in the image. Where there are none, those that
        # are constant at their place are taken for what follows, and every claim says so.
        self.rule = "anywhere" if (alive["anywhere"] < 1).any() else "same place"
        self.made, self.kind = rules[self.rule], kinds[self.rule]
        strange = _patch_words.without_content(self.model, 3, self.settings.rng(4))
        far = self.made.predict(visual_tokens(self.model, strange, received=False)["state"].values)
        found = nearest_token.measure(self.model, self.prompts, self.made,
                                      tokens=self.tokens.isel(sample=self.real))
        self.out.save(f"tokens-{self.model.name}", found)
        words = self.made.landmarks_.assign(word=[
            self.model.tokenizer.convert_ids_to_tokens([int(i)])[0] if self.made.groups_ == "words"
            else f"cluster {i}" for i in self.made.landmarks_.index])
        self.out.table(f"landmarks-{self.model.name}", words)
        shares = {c: float((self.kind[self.real] == c).mean()) for c in CLASSES}
        none = "nothing is constant over pictures" if rules["anywhere"].groups_ == NO_GROUPS else \
            "words that are nearest in all pictures have tokens that are not constant"
        self.claim("groups", statistics.mean(alive["anywhere"], **self.few), null=0.6,
                   direction="equal", tolerance=0.1, unit="share of tokens that are alive",
                   figure="shares", control="pictures of nothing", details={
                       "alive if dead is constant at the same place": float(
                           alive["same place"].mean()),
                       "classes": shares if self.rule == "anywhere" else none,
                       "in pictures of nothing": {rule: float((kind[~self.real] == "alive").mean())
                                                  for rule, kind in kinds.items()},
                       "in black, one color and noise": float((far == "alive").mean()),
                       "phi-sinks": int(self.sinks.sum()), "words read": self.k,
                       "alive by three words, same place": float((self._fit(
                           "same place", every, 3).predict(self.x[self.real]) == "alive").mean())})
        self.random, bare = None, "not measured: a second model of this size is too large"
        if sum(p.numel() for p in self.model.hf.parameters()) <= LARGE:
            random = visual_tokens(reinitialized(self.model, self.settings.seed), self.prompts)
            self.random = random["state"].values
            made = TokenClasses(self.k, constant=self.rule).fit(
                self.random, embeddings=word_embeddings(self.model), images=random["prompt"].values,
                places=random["place"].values, received=random["received"].values)
            bare = f"{(made.predict(self.random) != 'alive').mean():.0%} of the tokens are constant"
        # Constant tokens need no training: a tower with random weights may have them too.
        self.control = f"with random weights: {bare}"
        self.labels = nearest_token.labels(found)
        self.constant = self.kind != "alive"
        self.about = {"classes": f"constant {self.rule}", "shares": shares, "landmarks": {
            str(word): str(kind) for word, kind in zip(words["word"], words["kind"]) if kind}}
        if not (self.constant & self.real).any():
            self.skip(f"no visual tokens of {self.model.name} are constant over pictures, anywhere or "
                      "at their place: all are alive", "stable", "constant", "meaning", "free",
                      "matched", "attention")
        elif not (~self.constant & self.real).any():
            self.skip(f"all visual tokens of {self.model.name} are constant over pictures: none is "
                      "alive", "stable", "constant", "meaning", "free", "matched", "attention")
        if self.wants("map"):
            self.figure("map", figures.maps(self.model.name, self.all[:3], self.labels, self.rule))
        if self.wants("shares"):
            self.figure("shares", figures.shares(
                self.model.name, self.kind, self.image, len(self.prompts), self.rule))
        if self.wants("words"):
            self.figure("words", figures.words(self.model, self.x[self.real], self.image[self.real],
                                               self.made))

    def _constant(self) -> None:
        """Classes of one half of the pictures by landmarks of the other."""
        half = self.image % 2 == 0
        if "constant" in self.told:
            return
        kind = np.full(len(self.x), "alive", dtype="<U5")
        own = kind.copy()
        for part in (half, ~half):
            kind[~part] = self._fit(self.rule, part).predict(self.x[~part])
            own[part] = self._fit(self.rule, part).predict(self.x[part])
        per = [(kind[m] == own[m], kind[m] != "alive", own[m] != "alive")
               for m in (self.image == i for i in range(len(self.prompts)))]
        same, a, b = (np.array([x.mean() for x in column]) for column in zip(*per))

        def kappa(agreed: np.ndarray, first: np.ndarray, second: np.ndarray) -> float:
            p, q = first.mean(), second.mean()
            chance = p * q + (1 - p) * (1 - q)
            return float((agreed.mean() - chance) / (1 - chance)) if chance < 1 else float("nan")

        self.claim("stable", statistics.bootstrap(kappa, same, a, b, **self.few,
                                                  name="agreement beyond chance (kappa)"),
                   null=0.0, figure="shares", control=f"classes at random, as often ({self.control})",
                   details={**self.about, "agreement": float(same.mean())})
        held = np.zeros((len(self.prompts), 2))
        for column, mine in enumerate((kind != "alive", kind == "alive")):
            for i in range(len(self.prompts)):
                held[i, column] = self._to_others(i, mine & self.real)
        known = np.isfinite(held).all(1)
        if known.sum() < statistics.FEWEST:
            self.skip(f"only {int(known.sum())} pictures have tokens of both kinds", "constant")
        else:
            self.claim("constant", statistics.difference(*held[known].T, **self.few), null=0.0,
                       figure="map", unit=f"cosine to tokens of other pictures, {self.rule}",
                       control="alive tokens, by landmarks of the other half of the pictures "
                       f"({self.control})",
                       details={**self.about, "sink and dead": float(held[known, 0].mean()),
                                "alive": float(held[known, 1].mean())})
        self._presence()

    def _to_others(self, number: int, mine: np.ndarray) -> float:
        own, other = mine & (self.image == number), mine & (self.image != number)
        u = self.x / np.linalg.norm(self.x, axis=1, keepdims=True)
        cosine = u[own] @ u[other].T
        if self.rule == "same place":
            place = self.tokens["place"].values
            cosine = cosine[place[own][:, None] == place[other][None]]
        return float(cosine.mean()) if cosine.size else float("nan")

    def _presence(self) -> None:
        """Which colors a picture has, from the mean of as many tokens of either class."""
        rng, some, states = self.settings.rng(3), [], []
        for i, one in enumerate(self.all):
            pools = [np.flatnonzero((self.image == i) & c) for c in (self.constant, ~self.constant)]
            size = min(map(len, pools))
            if size:
                some.append(one)
                states.append([self.x[rng.choice(pool, size, replace=False)].mean(0) for pool in pools])
        shown = np.array([[c in {t.color for t in one.scene.shapes} for c in scenes.COLORS]
                          for one in some])
        told = [c for c in range(shown.shape[1] if len(some) else 0)
                if 5 <= shown[:, c].sum() <= len(some) - 5]
        if not told:
            self.skip(f"{len(some)} pictures have tokens of both kinds, too few for a probe",
                      "meaning")
            return
        X = np.array(states)
        scores: list[Any] = [np.stack([np.asarray(cross_val_predict(
            linear.ridge(X.shape[2]), X[:, kind], shown[:, c], cv=KFold(5, shuffle=True,
            random_state=0), method="decision_function")) for c in told], 1) for kind in (0, 1)]

        def area(values: np.ndarray, present: np.ndarray) -> float:
            return float(np.nanmean([_auc(v, p > 0) for v, p in zip(values.T, present.T)]))

        def gap(dead: np.ndarray, alive: np.ndarray, present: np.ndarray) -> float:
            # A probe that is worse than chance tells nothing either.
            return area(alive, present) - max(area(dead, present), 0.5)

        present = shown[:, told].astype(float)
        self.claim("meaning", statistics.bootstrap(
            gap, *scores, present, resamples=self.settings.pick(1000, tiny=200),
            name="AUC of the colors in the picture, alive minus dead (chance, if more)"),
            null=0.0, figure="map",
            control="as many alive tokens of the same picture", details={
                **self.about, "from dead tokens": area(scores[0], present),
                "from alive tokens": area(scores[1], present), "chance": 0.5, "colors": len(told)})

    # -- what is held before the language model -----------------------------------------------------

    def _held_before(self) -> None:
        where = {(int(i), int(p)): n for n, (i, p) in enumerate(zip(
            self.image, self.tokens["position"].values))}
        patches = [p for one in self.all for p in one.patches if p.words]
        at = np.array([where[p.picture, p.position] for p in patches])
        alive = self.kind[at] == "alive"
        patches, at = [p for p, ok in zip(patches, alive) if ok], at[alive]
        if len({p.picture for p in patches}) < 10:
            reason = "fewer than ten pictures have alive tokens on an object that has a word"
            self.skip(reason, "before", "words")
            return
        picture = np.array([p.picture for p in patches])
        ids = nearest_words(self.x[at], word_embeddings(self.model))[1]
        own, other = agreement(ids, [p.words for p in patches], picture.tolist())
        self.claim("words", statistics.difference(own, other, groups=picture, **self.few), null=0.0,
                   unit="share of tokens with the word among the nearest three", figure="words",
                   control="words of things in other pictures", details={
                       "own": float(own.mean()), "other pictures": float(other.mean()),
                       "tokens": len(own), "classes": self.about["classes"]})
        mine = [n for n, p in enumerate(patches) if p.color]
        color = np.array([patches[n].color for n in mine])
        groups, rows = picture[mine], at[mine]
        right = _probe(self.x[rows], color, groups)
        details: dict[str, Any] = {"chance": float(max(np.mean(color == c) for c in set(color))),
                                   "tokens": len(mine)}
        if self.random is None:
            null = np.full(len(mine), details["chance"])
            control = "the most frequent color (a second model with random weights is too large)"
        else:
            null = _probe(self.random[rows], color, groups)
            control = "the same tokens of a model with random weights"
        try:
            details["from the vision tower"] = float(_probe(self._tower()[rows], color, groups).mean())
        except ModelRefused as error:
            details["from the vision tower"] = str(error)
        self.claim("before", statistics.difference(right, null, groups=groups, **self.few), null=0.0,
                   unit="share of held-out tokens", control=control, figure="words", details={
                       **details, "alive": float(right.mean()), "control": float(null.mean())})

    def _tower(self) -> np.ndarray:
        """What the projector reads, token by token."""
        found = []
        for prompt in self.prompts:
            reads = tower.read(self.model, prompt)
            found.append(reads.hidden[-1 if reads.select is None else reads.select])
        return np.concatenate([x.float().cpu().numpy() for x in found])


def _probe(X: np.ndarray, y: np.ndarray, groups: np.ndarray) -> np.ndarray:
    """Whether a probe that has not seen the picture is right, token by token."""
    said = cross_val_predict(linear.ridge(X.shape[1]), X, y, groups=groups, cv=GroupKFold(5))
    return np.equal(np.asarray(said), y).astype(float)


def _auc(values: np.ndarray, present: np.ndarray) -> float:
    above = values[present][:, None] - values[~present][None]
    return float((above > 0).mean() + (above == 0).mean() / 2) if above.size else float("nan")
