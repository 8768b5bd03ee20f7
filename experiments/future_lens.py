"""Future Lens (arXiv:2311.04897): which tokens after the next one does a single state hold?

Read from one state: a linear map, a map to the vocabulary, a hand-written and a learned prompt that
carries it. The released test feeds the true tokens in between; here decoding runs freely as well,
and the same prompt without, with another, and with the mean state is the line to beat. A model that
carries its own state goes on much as it would, whatever its weights, so what is said here of readings
can be true of random models too: it is about what a model will say, not about what is right.
"""

from typing import Any, Optional

import numpy as np
import torch
import xarray as xr

from experiments import _contexts
from experiments._contexts import STEPS, Contexts
from experiments._future_figures import grid, precision_figure, surprisal_figure
from experiments._output import Output
from experiments._paper import Paper, Settings
from experiments._subject import Subject, run_all
from interp.core import Result, statistics
from interp.models.futures import Readout, embedded
from interp.models.model import Model
from probes import lookahead
from probes.carried_states import FuturePrompt, carrier
from probes.lookahead import (
    MOST,
    FollowerCounts,
    FutureLinearLens,
    FutureVocabularyLens,
    hits,
    within_word,
)

PAPER = Paper(
    "future_lens",
    "Future Lens: Anticipating Subsequent Tokens from a Single Hidden State",
    ("2311.04897",),
    "Which tokens after the next one can be read off a single hidden state?",
    figures={
        "precision": "Precision@1 against the model's own greedy continuation by layer, one panel per "
        "N (N = 0 is the next token), decoded freely, linear maps of N = 1 fine-tuned through "
        "the frozen norm and head; gray: counts of token pairs, and the learned prompt "
        "carrying another context's state. Layer -1 is the embedding.",
        "fed": "The same with the model's own tokens fed in between, as the released test does; gray: "
        "the learned prompt with no, another's and the mean state, and counts of token pairs.",
        "surprisal": "Surprisal, given the full context, of what is read, by layer.",
        "lens": "One text: what a state says next and further ahead, by token and layer, decoded "
        "freely through the learned prompt; on top the model's own continuation.",
    },
    models=("reader",),
)
(SOURCE,) = PAPER.sources
OWN = "measured by this toolkit, after arXiv:2311.04897"
LINES = ("learned", "fixed", "linear", "vocabulary")
NULLS = ("none", "shuffled", "mean")


class FutureLens(Subject):
    """One model: its contexts, every reading of them, and the claims."""

    paper = PAPER
    claims = {
        "beyond": ("One state holds the token after the next: a learned prompt that carries it reads "
                   "it more often than counts of token pairs do.", SOURCE),
        "linear": ("A linear map of one state reads the token after the next more often than counts "
                   "of token pairs do.", SOURCE),
        "carried": ("What the learned prompt reads comes from the state: with none, the mean one or "
                    "another context's it reads less.", OWN),
        "fed": ("With the model's own token fed in between, as in the released test, the state still "
                "adds to what the learned prompt reads without it.", OWN),
        "feeding": ("Feeding the token in between raises what is read by itself.", OWN),
        "middle": ("Middle layers hold most of the token after the next.", SOURCE),
        "fixed": ("A learned prompt reads more than a hand-written one.", SOURCE),
        "maps": ("A learned prompt reads more than a linear map.", SOURCE),
        "falls": ("The further ahead a token is, the less is read of it.", SOURCE),
        "words": ("Continuations inside of words are read more often than beginnings of words.", OWN),
        "count": ("Counts of token pairs alone read a fifth of the tokens after the next.", SOURCE),
    }
    numbers = {"beyond": ("over 48 % at N = 1 (GPT-J-6B, the Pile)", "paper"),
               "count": ("20.1 %", "code")}

    def run(self) -> None:
        model, settings = self.model, self.settings
        parts, self.what = _contexts.documents(model, settings)
        self.out.record(prompts=[p for part in parts for p in part], name=f"texts-{model.name}")
        self.inside = _contexts.spread(model.n_layers, settings.pick(6, tiny=2))
        linear = [-1, *_contexts.spread(model.n_layers, settings.pick(12, tiny=2)), model.n_layers - 1]
        self.layers = sorted({*linear, *self.inside})
        # Neighboring places have much in common: fewer of them where nothing is fitted.
        train, valid, self.test = (
            _contexts.collect(model, part, self.layers, settings.pick(stride, tiny=4))
            for part, stride in zip(parts, (5, 10, 10)))
        self.readout = Readout(model)
        self._fit(train, valid)
        self._measure(valid)
        self._tell()
        self._draw(parts[2][0])

    # -- fitting -------------------------------------------------------------------------------

    def _fit(self, train: Contexts, valid: Contexts) -> None:
        """Every reader of every layer; hand-written prompts are chosen on validation documents."""
        model, settings = self.model, self.settings
        self.maps, self.direct, self.learned, self.fixed = {}, {}, {}, {}
        for n in range(STEPS):
            teacher = torch.cat([self.readout(part) for part in train.ahead[:, n].split(256)]).detach()
            for i, layer in enumerate(self.layers):
                H = train.states[i].numpy()
                self.maps[layer, n] = FutureLinearLens(n, layer).fit(H, train.ahead[:, n].numpy())
                if n == 1:
                    # Where it is compared with other readings, as in the released code.
                    self.maps[layer, n].fine_tune(
                        self.readout, H, train.ahead[:, n], lr=3e-2, seed=settings.seed,
                        epochs=settings.pick(4, tiny=2))
                self.direct[layer, n] = FutureVocabularyLens(n, layer).fit(H, teacher)
        lane, carriers = model._engine("hf"), _contexts.carriers(model, settings)
        prefixes = [embedded(lane, torch.tensor([ids]), {})[0].float().cpu() for ids in carriers]
        ids = carrier(carriers[0], settings.pick(6, tiny=4))
        start = embedded(lane, torch.tensor([ids]), {})[0].float().cpu()
        for layer in self.inside:
            i = self.layers.index(layer)
            made = [FuturePrompt(layer, steps=0).fit(
                model, prefix, train.states[i], train.tokens[:, :-1], train.ahead)
                for prefix in prefixes]
            read = [hits(one.predict_top(model, valid.states[i], 2, most=1), valid.tokens[:, :2])
                    for one in made]
            self.fixed[layer] = made[int(np.argmax([float(r.float().mean()) for r in read]))]
            self.learned[layer] = FuturePrompt(
                layer, range(STEPS), steps=settings.pick(40, tiny=8), lr=0.1, seed=settings.seed,
                batch_size=settings.pick(32, tiny=16)).fit(
                model, start, train.states[i], train.tokens[:, :-1], train.ahead)
        self.pairs = [FollowerCounts().fit(train.last, train.tokens[:, n]) for n in range(STEPS)]
        self.follow = [FollowerCounts().fit(train.tokens[:, n - 1], train.tokens[:, n])
                       for n in range(1, STEPS)]

    # -- reading -------------------------------------------------------------------------------

    def _readings(self, some: Contexts, brief: bool = False) -> dict[tuple[str, int], torch.Tensor]:
        """Top tokens `[context, step, rank]` by line and layer."""
        made: dict[tuple[str, int], torch.Tensor] = {}
        for i, layer in enumerate(self.layers):
            H, ns = some.states[i].numpy(), range(2 if brief else STEPS)
            made["linear", layer] = torch.stack([lookahead.top_tokens(
                self.maps[layer, n].predict_logits(self.readout, H)) for n in ns], 1)
            made["vocabulary", layer] = torch.tensor(np.stack(
                [self.direct[layer, n].predict_top(H) for n in ns], 1))
        for layer in self.inside:
            states, fed = some.states[self.layers.index(layer)], some.tokens[:, :-1]
            lens = self.learned[layer]
            steps = 2 if brief else STEPS
            made["learned", layer] = lens.predict_top(self.model, states, steps)
            made["fixed", layer] = self.fixed[layer].predict_top(self.model, states, steps)
            if brief:
                continue
            made["learned, fed", layer] = lens.predict_top(self.model, states, STEPS, tokens=fed)
            made["fixed, fed", layer] = self.fixed[layer].predict_top(
                self.model, states, STEPS, tokens=fed)
            for arm in NULLS:
                made[arm, layer] = lens.predict_top(self.model, states, STEPS, arm=arm)
                made[f"{arm}, fed", layer] = lens.predict_top(
                    self.model, states, STEPS, tokens=fed, arm=arm)
        return made

    def _measure(self, valid: Contexts) -> None:
        test, most = self.test, MOST
        readings = self._readings(test)
        chosen = {line: {} for line in LINES}
        for (line, layer), top in self._readings(valid, brief=True).items():
            chosen[line][layer] = float(hits(top[:, 1], valid.tokens[:, 1])[:, 0].float().mean())
        # Where a line is best at N = 1, on documents that are not used again.
        self.best = {line: max(by, key=lambda layer: by[layer]) for line, by in chosen.items()}
        for line, layer in (("pairs", -1), ("pairs, fed", -1)):
            rows = [self.pairs[n].predict_top(test.last) if line == "pairs" or n == 0 else
                    self.follow[n - 1].predict_top(test.tokens[:, n - 1]) for n in range(STEPS)]
            readings[line, layer] = torch.tensor(np.stack(rows, 1))
        lines = list(dict.fromkeys(line for line, _ in readings))
        shape = (len(lines), len(self.layers), len(test), STEPS)
        hit, true = np.full(shape, np.nan), np.full(shape, np.nan)
        wrong, at_k = np.full(shape, np.nan), np.full((*shape[:2], STEPS, most), np.nan)
        own = [torch.cat([self.readout(part).log_softmax(-1) for part in test.ahead[:, n].split(256)])
               .detach() for n in range(STEPS)]
        for (line, layer), top in readings.items():
            at = lines.index(line), self.layers.index(layer)
            found = hits(top, test.tokens).numpy()
            hit[at], at_k[at][:, : found.shape[2]] = found[..., 0], found.mean(0)
            true[at] = top[..., 0].numpy() == test.truth
            wrong[at] = torch.stack([-own[n].gather(1, top[:, n, :1])[:, 0]
                                     for n in range(STEPS)], 1).numpy()
        dims = ("line", "layer", "sample", "step")
        inside = self._inside_words()
        self.found = Result(xr.Dataset(
            {"hit": (dims, hit), "hit_text": (dims, true), "surprisal": (dims, wrong),
             "precision_at": (("line", "layer", "step", "k"), at_k),
             "within_word": (("sample", "step"), inside), "document": ("sample", test.document)},
            {"line": lines, "layer": self.layers, "step": np.arange(STEPS),
             "k": 1 + np.arange(most)}),
            {"measure": "future lens", "texts": self.what, "contexts": len(test),
             "best layer by line": self.best, "training loss": {
                 str(layer): [float(np.mean(lens.losses_[:5])), float(np.mean(lens.losses_[-5:]))]
                 for layer, lens in self.learned.items()}})
        self.out.save(f"readings-{self.model.name}", self.found)

    def _inside_words(self) -> np.ndarray:
        before = np.concatenate([self.test.last[:, None], self.test.tokens.numpy()[:, :-1]], 1)
        if self.model.tokenizer is None:
            return np.zeros(before.shape, bool)
        return np.stack([within_word(self.model.tokenizer, before[:, n], self.test.tokens[:, n])
                         for n in range(STEPS)], 1)

    # -- claims --------------------------------------------------------------------------------

    def _hits(self, line: str, n: Optional[int] = 1, layer: Optional[int] = None) -> np.ndarray:
        """[sample], or [sample, step] for n None, at the line's own layer."""
        at = self.best.get(line.removesuffix(", fed"), self.best["learned"]) if layer is None else layer
        at = -1 if line.startswith("pairs") else at
        values = self.found["hit"].sel(line=line, layer=at).values
        return values if n is None else values[:, n]

    def _compare(self, key: str, treated: np.ndarray, other: np.ndarray, **more: Any) -> None:
        made = statistics.difference(
            treated, other, groups=self.test.document,
            resamples=self.settings.pick(statistics.RESAMPLES, tiny=1000))
        details = {"read": round(float(treated.mean()), 4), "against": round(float(other.mean()), 4),
                   "layers": {k: int(v) for k, v in self.best.items()}, "texts": self.what,
                   **more.pop("details", {})}
        self.claim(key, made, null=0.0, unit="Precision@1 at N = 1, difference", details=details,
                   **{"figure": "precision", **more})

    def _tell(self) -> None:
        hit, data = self._hits, self.found
        pairs = {f"N = {n}": round(float(hit("pairs", n).mean()), 4) for n in range(STEPS)}
        text = {line: round(float(data["hit_text"].sel(line=line, layer=self.best[line], step=1).mean()),
                            4) for line in LINES}
        counts = "counts of what follows the last token, on the training documents"
        self._compare("beyond", hit("learned"), hit("pairs"), control=counts, details={
            "by N": {f"N = {n}": round(float(hit("learned", n).mean()), 4) for n in range(STEPS)},
            "counts": pairs, "against the text instead of the model": text,
            "Precision@5": round(float(data["precision_at"].sel(
                line="learned", layer=self.best["learned"], step=1, k=5)), 4)})
        self._compare("linear", hit("linear"), hit("pairs"), control=counts)
        for key, suffix, figure in (("carried", "", "precision"), ("fed", ", fed", "fed")):
            means = {arm: float(hit(arm + suffix).mean()) for arm in NULLS}
            top = max(means, key=lambda arm: means[arm])
            self._compare(key, hit("learned" + suffix), hit(top + suffix), figure=figure, causal=True,
                          control=f"the same prompt with no, another context's, or the mean state; the "
                                  f"best of them ({top})",
                          details={"arms": {k: round(v, 4) for k, v in means.items()}, "counts": round(
                              float(hit("pairs" + suffix).mean()), 4)})
        self._compare("feeding", hit("learned, fed"), hit("learned"), figure="fed", details={
            "counts of pairs, fed": round(float(hit("pairs, fed").mean()), 4)})
        self._compare("fixed", hit("learned"), hit("fixed"))
        self._compare("maps", hit("learned"), hit("linear"))
        self._middle()
        slope = hit("learned", None) @ (np.arange(STEPS) - 1.5) / 5.0
        self.claim("falls", statistics.mean(
            slope, groups=self.test.document,
            resamples=self.settings.pick(statistics.RESAMPLES, tiny=1000)),
            null=0.0, direction="below", unit="Precision@1 per token further ahead",
            figure="precision", details={line: [round(float(hit(line, n).mean()), 4)
                                                for n in range(STEPS)] for line in LINES})
        self._words()
        self.skip(f"the Pile and its counts are not here; on {self.what} counts of token pairs read "
                  f"{pairs['N = 1']:.1%} of them".replace("%", " %"), "count")

    def _middle(self) -> None:
        depth = (np.array(self.inside) + 0.5) / self.model.n_layers
        middle = (depth >= 1 / 3) & (depth <= 2 / 3)
        if not middle.any() or middle.all():
            self.skip(f"prompts were learned in layers {self.inside} of {self.model.n_layers}, not "
                      "in both middle and other ones", "middle")
            return
        each = np.stack([self._hits("learned", layer=layer) for layer in self.inside])
        self._compare("middle", each[middle].mean(0), each[~middle].mean(0), details={
            "by layer": dict(zip(self.inside, each.mean(1).round(4).tolist()))})

    def _words(self) -> None:
        inside = self.found["within_word"].values[:, 1]
        if len(set(self.test.document[inside])) < statistics.FEWEST or inside.all():
            self.skip(f"{int(inside.sum())} of {len(inside)} tokens go on with a word: there is nothing "
                      "to compare", "words")
            return
        hit = self._hits("learned")

        def apart(h: np.ndarray, w: np.ndarray) -> float:
            return float(h[w > 0].mean() - h[w == 0].mean()) if 0 < w.sum() < len(w) else float("nan")

        self.claim("words", statistics.bootstrap(
            apart, hit, inside, groups=self.test.document, name="difference of Precision@1",
            resamples=self.settings.pick(2000, tiny=500)), null=0.0, figure="precision",
            details={"inside": float(hit[inside].mean()), "beginnings": float(hit[~inside].mean())})

    # -- figures -------------------------------------------------------------------------------

    def _draw(self, prompt: Any) -> None:
        for name, drawn in (("precision", lambda: precision_figure(self.found, self.model.name)),
                            ("fed", lambda: precision_figure(self.found, self.model.name, fed=True)),
                            ("surprisal", lambda: surprisal_figure(self.found, self.model.name)),
                            ("lens", lambda: grid(self.model, prompt, self.learned))):
            if self.wants(name):
                self.figure(name, drawn())


def run(settings: Settings, out: Output) -> None:
    run_all(FutureLens, settings, out, unfit)


def unfit(model: Model) -> str:
    """Why nothing can be read ahead in a model, "" if it can."""
    if model.kind != "decoder":
        return f"{model.name} is an encoder: it does not go on with a text"
    if model.n_layers < 2:
        return f"{model.name} has one block: after it nothing reads what a state carries"
    return ""
