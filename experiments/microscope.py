"""LLM-Microscope (arXiv:2502.15007, 2405.12250): linear blocks, and tokens that carry their context.

Linearity is scored on texts the map was not fitted on. What a token carries of the text before it is
read by a cheap proxy (linear probes that name earlier tokens), not by the paper's trained copy.
"""

from typing import Any

import numpy as np
import xarray as xr
from jaxtyping import Float

from experiments import _microscope_figures as figures
from experiments import _passages, _sink_subjects, _texts
from experiments._output import Output
from experiments._paper import Paper, Settings
from experiments._subject import Subject, run_all
from experiments._token_removal import removal
from experiments._word_classes import is_function, kinds
from interp.core import Prompt, Result, statistics
from probes import contextualization, geometry, linearity
from probes.layer_correlation import rank_correlation
from probes.nulls import layer_states, reinitialized
from probes.token_loss import content_places, frequency_loss, token_losses, why_untrained

PAPER = Paper(
    "microscope",
    "LLM-Microscope: Uncovering the Hidden Role of Punctuation in Context Memory of Transformers",
    ("2502.15007", "2405.12250"),
    "How linear is every block, and which tokens carry the text before them?",
    figures={
        "linearity": "Share of variance that one linear map predicts, on texts it was not fitted on, "
        "for the state and for what the block adds. Gray: in sample, and random weights held out.",
        "tokens": "Length of what the linear map leaves of every token of one text, by block; a "
        "cross at function words and punctuation.",
        "contextualization": "Proxy for the context a token carries: mean cost of naming the tokens "
        "before it from its state, by class of token; low is much context. Gray: from what "
        "enters block 0.",
        "scatter": "The same proxy against the token's distance from the linear maps.",
        "lens": "Most likely next token after every block by the model's own norm and head; color: "
        "its probability.",
        "clouds": "Intrinsic dimension (TwoNN on the smallest fifth of the ratios) and "
        "share of variance on the longest axis, by layer.",
        "removal": "What taking function words and punctuation out of the context costs, against as "
        "many content tokens taken out at random.",
    },
    models=("reader",),
)
LLM, LINEAR = PAPER.sources
OWN = "measured by this toolkit, after arXiv:2502.15007"
ENOUGH = 0.95
BIN = 16
"""Tokens of one text are compared with others at most this many positions away."""


class Microscope(Subject):
    """A language model under the microscope."""

    paper = PAPER
    claims = {
        "linear": ("Adjacent layers are almost linearly related.", LINEAR),
        "residual": ("Without the residual the relation is less linear.", LINEAR),
        "correlation": ("Tokens that carry much context (proxy) pass the blocks more linearly.", LLM),
        "function": ("Function words and punctuation carry the most context (proxy), at matched "
                     "positions.", LLM),
        "gain": ("The blocks add more context (proxy) to function words and punctuation "
                 "than to content words, beyond what the tokens themselves tell.", OWN),
        "removal": ("Taking function words and punctuation out of the context hurts more than taking "
                    "out as many content tokens.", LLM),
        "judged": ("MMLU and BABILong get worse even where a language model judged the removed tokens "
                   "irrelevant.", LLM),
    }
    numbers = {"function": ("direction only", "paper")}

    def run(self) -> None:
        self.skip("neither the benchmarks nor the other model's judgment come with this package",
                  "judged")
        if self.model.kind != "decoder":
            self.give_up(f"{self.model.name} is an encoder: its tokens carry what follows them as well")
            return
        self.prompts, self.what = texts(self.model, self.settings)
        self.out.record(prompts=self.prompts, name=f"texts-{self.model.name}")
        first = max(contextualization.OFFSETS)
        self.places = [tuple(p for p in content_places(self.model, prompt) if p > first)
                       for prompt in self.prompts]
        if min(map(len, self.places)) < 8:
            self.give_up(f"the texts of {self.model.name} are too short for tokens before tokens")
            return
        self.document = np.repeat(np.arange(len(self.prompts)), [len(p) for p in self.places])
        self.position = np.concatenate([np.array(p) for p in self.places])
        names = [kinds(self.model, p.ids) for p in self.prompts]
        self.names = np.concatenate([n[list(at)] for n, at in zip(names, self.places)])
        self._states()
        figures.draw(self)
        losses = np.array([np.nanmean(row) for row in token_losses(self.model, self.prompts)])
        every = [content_places(self.model, p) for p in self.prompts]
        reason = why_untrained(self.model, losses, frequency_loss(self.prompts, every))
        if reason:
            self.give_up(f"{reason}: nothing is claimed of untrained models")
            return
        self._linear()
        self._contextual()
        self._removal()

    @property
    def resamples(self) -> int:
        return self.settings.pick(2000, tiny=500)

    # -- states ------------------------------------------------------------------------------

    def _states(self) -> None:
        """Everything that is read from states, block by block: few layers are held at a time."""
        self.folds = min(5, len(self.prompts))
        self.lines, self.without, self.dimension, self.spread = [], [], [], []
        self.inside: list[float] = []
        shown = {int(x) for x in np.linspace(0, self.model.n_layers - 1, min(3, self.model.n_layers))}
        costs, priors = [], []
        before = np.concatenate([contextualization.tokens_before(p.ids, at)
                                 for p, at in zip(self.prompts, self.places)])
        proxy: Any = {"before": before, "groups": self.document, "seed": self.settings.seed}
        some = self.settings.rng(2).permutation(len(self.document))[: self.settings.pick(1024, tiny=256)]
        for layer, here, after in self._pairs(self.model):
            if layer == 0:
                entering = contextualization.proxy(here, **proxy)
                self._cloud(here[some])
            self.lines.append(self._errors(here, after))
            self.without.append(self._errors(here, after, drop=min(3, self.model.d_model - 2)))
            self.inside.append(linearity.score(here[some], after[some])
                               if len(some) > 2 * self.model.d_model else float("nan"))
            self._cloud(after[some])
            if layer in shown:
                found = contextualization.proxy(after, **proxy)
                costs.append(found["cost"].values)
                priors.append(found["prior"].values)
        self.cost, self.prior = np.mean(costs, 0), np.mean(priors, 0)
        self.entering, self.read = entering["cost"].values, sorted(shown)
        self.error = np.mean([one["error"].values for one in self.lines], 0)
        self.relative = np.mean([one["relative"].values for one in self.lines], 0)
        null = reinitialized(self.model, seed=self.settings.seed)
        self.random = [_score(self._errors(here, after)) for _, here, after in self._pairs(null)]
        del null
        self._save()

    def _pairs(self, model: Any, most: float = 1e9) -> Any:
        """(block, what enters it, what it leaves) at the chosen positions, as many blocks at a time as
        fit in `most` bytes."""
        each = 4 * len(self.document) * model.d_model
        step = max(1, min(model.n_layers, int(most / each) - 1))
        for start in range(0, model.n_layers, step):
            layers = range(start, min(start + step, model.n_layers))
            asked = list(layers) if start == 0 else [start - 1, *layers]
            states = layer_states(model, self.prompts, self.places, embedding=start == 0, layers=asked)
            for number, layer in enumerate(layers):
                yield layer, states.values[number], states.values[number + 1]

    def _errors(self, here: np.ndarray, after: np.ndarray, drop: int = 0) -> Any:
        device = str(self.model.device) if self.model.device.type == "cuda" else None
        return linearity.token_errors(here, after, groups=self.document, folds=self.folds, drop=drop,
                                      seed=self.settings.seed, device=device)

    def _cloud(self, states: np.ndarray) -> None:
        self.dimension.append(geometry.two_nn(states, method="linear", discard=0.8).value)
        self.spread.append(geometry.anisotropy(states))

    def _save(self) -> None:
        made = xr.concat([one.drop_vars("fold") for one in self.lines], "layer")
        made = made.assign(cost=("sample", self.cost), prior=("sample", self.prior),
                           cost_entering=("sample", self.entering), kind=("sample", self.names))
        made = made.assign_coords(document=("sample", self.document),
                                  position=("sample", self.position))
        self.out.save(f"tokens-{self.model.name}", Result(made, {
            "measure": "microscope", "texts": self.what, "proxy layers": self.read,
            "proxy offsets": contextualization.OFFSETS, **self.model.manifest()}))

    # -- linearity ---------------------------------------------------------------------------

    def _sums(self, name: str) -> Float[np.ndarray, "document layer"]:
        """A squared length summed over the tokens of every text."""
        return np.stack([np.bincount(self.document, one[name].values) for one in self.lines], 1)

    def _linear(self) -> None:
        left, spread, step = (self._sums(n) for n in ("left", "spread", "step_spread"))

        def whole(a: np.ndarray, b: np.ndarray) -> float:
            return float(np.median(1 - a.sum(0) / b.sum(0)))

        def loss(a: np.ndarray, b: np.ndarray, c: np.ndarray) -> float:
            return float(np.median(a.sum(0) / c.sum(0) - a.sum(0) / b.sum(0)))

        each = 1 - left.sum(0) / spread.sum(0)
        increment = 1 - left.sum(0) / step.sum(0)
        few = len(self.document) < 2 * self.model.d_model
        if few:
            self.skip(f"{len(self.document)} tokens are too few to fit a map of {self.model.d_model} "
                      "coordinates", "linear", "residual", "correlation")
            return
        self.claim("linear", statistics.bootstrap(whole, left, spread, resamples=self.resamples,
                                                  name="median over blocks of the held-out score"),
                   null=ENOUGH, figure="linearity", unit="share of variance, held out",
                   control="maps are scored on texts they were not fitted on", details={
                       "by block": each.round(4).tolist(), "random weights": np.round(
                           self.random, 4).tolist(),
                       "in sample": np.round(self.inside, 4).tolist(),
                       "without the 3 largest coordinates": [round(_score(o), 4) for o in self.without],
                       "tokens": len(self.document), "coordinates": self.model.d_model,
                       "texts": self.what})
        self.claim("residual", statistics.bootstrap(loss, left, spread, step, resamples=self.resamples,
                                                    name="median over blocks of the difference"),
                   null=0.0, figure="linearity", unit="score of the state minus that of what is added",
                   control="the same tokens and the same map", details={
                       "by block": (each - increment).round(4).tolist(),
                       "increment by block": increment.round(4).tolist(),
                       "note": "both scores leave the same remainder: the claim holds wherever a block "
                               "adds less variance than its output has, in random models too",
                       "step / state": np.sqrt(step.sum(0) / spread.sum(0)).round(3).tolist()})

    # -- what tokens carry -------------------------------------------------------------------

    def _contextual(self) -> None:
        known = np.isfinite(self.cost) & np.isfinite(self.entering)
        if known.sum() < 50:
            self.skip("too few tokens have known ones before them", "correlation", "function", "gain")
            return
        if "correlation" not in self.told:
            error, cost = self.error[known], self.cost[known]
            given = self.position[known][:, None].astype(float)
            partial = rank_correlation(error[:, None], cost, given, permutations=1)
            relative = rank_correlation(self.relative[known][:, None], cost, permutations=1)
            self.claim("correlation", statistics.correlation(
                error, cost, groups=self.document[known], resamples=self.settings.pick(400, tiny=200)),
                null=0.0, figure="scatter", unit="distance from the linear maps with the cost of naming "
                "tokens before", details={
                    "given position": float(partial["correlation"][0]),
                    "with the relative distance": float(relative["correlation"][0]),
                    "proxy": "linear probes for the tokens "
                    f"{', '.join(map(str, contextualization.OFFSETS))} places before, not the paper's "
                    "trained copy", "tokens": int(known.sum())})
        function = is_function(self.names)
        usable = known & (self.names != "")
        if min((usable & function).sum(), (usable & ~function).sum()) < 20:
            self.skip(f"no function words can be told in the texts of {self.model.name}", "function",
                      "gain")
            return
        for key, values in (("function", self.cost), ("gain", self.cost - self.entering)):
            gap, p = matched(values[usable], function[usable], self.document[usable],
                             self.position[usable] // BIN, self.settings.pick(500, tiny=100),
                             self.settings.seed)
            if len(gap) < statistics.FEWEST:
                self.skip("hardly any text has tokens of both classes near each other", key)
                continue
            self.claim(key, statistics.mean(gap, resamples=self.resamples), null=0.0, direction="below",
                       figure="contextualization", unit="nats per token before, function minus content",
                       control=f"content tokens within {BIN} positions of the same text", details={
                           "p of labels permuted within them": p,
                           **{name: float(values[usable & (self.names == name)].mean())
                              for name in np.unique(self.names[usable])},
                           "beyond frequencies": float(np.mean(matched(
                               (self.cost - self.prior)[usable], function[usable],
                               self.document[usable], self.position[usable] // BIN, 0, 0)[0])),
                           "cost by frequencies alone": float(self.prior[known].mean()),
                           "layers": self.read, "proxy": "linear probes"})

    def _removal(self) -> None:
        found, reason = removal(self.model, self.settings)
        if found is None:
            self.skip(reason, "removal")
            return
        self.removed = found
        figures.removal(self)
        self.claim("removal", statistics.difference(
            found["function"].values, found["content"].values, resamples=self.resamples),
            null=0.0, causal=True, figure="removal", unit="nats per target token",
            control=f"as many content tokens, drawn {found.attrs['seeds']} times", details={
                "loss of the target": {name: float(found[name].mean())
                                       for name in ("whole", "function", "content")},
                "removed tokens": float(found["removed"].mean()), "target": found.attrs["target"]})


def matched(
    values: np.ndarray, function: np.ndarray, document: np.ndarray, place: np.ndarray,
    permutations: int, seed: int,
) -> tuple[np.ndarray, float]:
    """Per text, mean of function minus content tokens at matched places; and the p of permuted labels.

    A place of a text counts by the number of pairs in it; p is two-sided, labels are permuted within.

    Example:
        >>> flags = np.tile([True, False], 40)
        >>> gap, p = matched(flags * 2.0, flags, np.arange(80) // 8, np.zeros(80, int), 99, 0)
        >>> gap.tolist() == [2.0] * 10, p
        (True, 0.01)
    """
    _, cell = np.unique(np.stack([document, place]), axis=1, return_inverse=True)
    cell = cell.ravel()
    size = np.bincount(cell)
    own = document[np.unique(cell, return_index=True)[1]]
    many = np.bincount(cell, function)
    weight = np.minimum(many, size - many)
    total = np.bincount(cell, values)

    def gaps(flags: np.ndarray) -> np.ndarray:
        with np.errstate(invalid="ignore", divide="ignore"):
            inside = np.bincount(cell, values * flags)
            return np.where(weight > 0, inside / many - (total - inside) / (size - many), 0.0)

    found = gaps(function)
    pairs = np.bincount(own, weight)
    per = np.bincount(own, weight * found)[pairs > 0] / pairs[pairs > 0]
    if not weight.sum():
        return per, float("nan")
    rng = np.random.default_rng(seed)
    order = np.argsort(cell, kind="stable")
    starts = np.concatenate([[0], np.cumsum(size)])
    null = []
    for _ in range(permutations):
        # Within every cell: as many function tokens as there are, anywhere.
        shuffled = order[np.lexsort((rng.random(len(cell)), cell[order]))]
        rank = np.empty(len(cell))
        rank[shuffled] = np.arange(len(cell)) - starts[cell[shuffled]]
        null.append(abs((weight * gaps(rank < many[cell])).sum()))
    observed = abs((weight * found).sum())
    return per, float((1 + sum(x >= observed - 1e-12 for x in null)) / (1 + permutations))


def _score(found: Any) -> float:
    return float(1 - found["left"].sum() / found["spread"].sum())


def texts(model: Any, settings: Settings) -> tuple[list[Prompt], str]:
    """Texts with several times as many tokens as the model has coordinates. Raises `PromptError`."""
    length = min(settings.pick(256, tiny=64), model.max_positions or 256)
    count = max(settings.pick(24, tiny=12), -(-settings.pick(4, tiny=2) * model.d_model // length))
    if _sink_subjects.is_reader(model):
        return (list(_sink_subjects.documents(settings, count, length)),
                "documents of the reader's language")
    if not _passages.readable(model):
        return _passages.other_texts(model, count, length, settings.rng(5))
    return _texts.natural(model, count, length, settings.rng(5)), "plain English"


def run(settings: Settings, out: Output) -> None:
    run_all(Microscope, settings, out)
