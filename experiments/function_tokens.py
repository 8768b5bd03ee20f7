"""Memory retrieval by function tokens (arXiv:2510.08203): what a few frequent tokens activate, and what
follows them.

Degree grows with exposure: a token that is seen often meets many contexts. Every coverage therefore
stands beside that of as many occurrences drawn at random from the same text.
"""

from typing import Any, Optional

import numpy as np
import torch
from matplotlib.ticker import LogLocator, NullFormatter

from experiments import _passages, _texts
from experiments._output import Output
from experiments._paper import Paper, Settings
from experiments._subject import Subject, run_all
from interp.core import Prompt, PromptError, statistics
from interp.figures.style import CYCLE, GRAY, PAGE, canvas, color, note
from interp.organisms import backcopy, reader
from probes.function_tokens import TokenFeatures, features, frequent, slope, strongest
from probes.nulls import reinitialized

PAPER = Paper(
    "function_tokens",
    "Memory Retrieval and Consolidation in Large Language Models through Function Tokens",
    ("2510.08203",),
    "Do a few frequent tokens activate most features, and is what follows them the hardest to predict?",
    figures={
        "degree": "Features that a token activates at all, against how often it occurs; gray: those "
        "that as many occurrences drawn from the whole text would activate.",
        "coverage": "Share of all active features that the most frequent tokens activate together "
        "(mean over layers); gray: as many random occurrences; dashed: untrained weights.",
        "loss": "Cross-entropy by the class of the token that is read and of the one that is predicted; "
        "the number is the share of the whole loss.",
    },
    models=("reader", "all-minilm-l6-v2"),
)
(SOURCE,) = PAPER.sources
OWN = "added by this toolkit, not in arXiv:2510.08203"
FEW = 10
TWINS = 5
"""Untrained models; one alone can lie below another by chance."""
"""Tokens that count as a few, as in the paper's tables."""
ACTIVE = 0.02
"""Share of the features that are on at a position."""
SHARE = 0.4
"""Function tokens are the most frequent ones that make up this share of a text."""
CLASSES = ("function", "content")


class Words(Subject):
    """A model, its documents, and the graph of tokens and features in some of its layers."""

    paper = PAPER
    claims = {
        "few": ("Ten tokens activate most of the features.", SOURCE),
        "exposure": ("Function tokens activate more features than as many random occurrences do.", OWN),
        "power": ("The number of features of a token grows as a power of its frequency.", SOURCE),
        "beyond": ("It grows faster than exposure alone explains.", OWN),
        "trained": ("Function tokens cover more features in the trained model than with untrained "
                    "weights.", OWN),
        "loss": ("Content tokens after function tokens make up most of the loss.", SOURCE),
        "after": ("Content tokens are harder to predict after function tokens than after content "
                  "tokens.", SOURCE),
    }
    numbers: dict[str, tuple[str, str]] = {}

    def run(self) -> None:
        self.prompts = self._documents()
        special = self._special()
        ids = [np.asarray(prompt.ids) for prompt in self.prompts]
        self.kept = np.concatenate([~np.isin(one, special) for one in ids])
        self.tokens = np.concatenate(ids)
        self.documents = np.repeat(np.arange(len(ids)), [len(one) for one in ids])
        self.resamples = self.settings.pick(1000, tiny=100)
        if len(np.unique(self.tokens[self.kept])) < 4:
            raise PromptError(f"the texts hold fewer than four different tokens for {self.model.name}")
        self.function = frequent(self.tokens[self.kept], SHARE)
        n = self.model.n_layers
        self.layers = sorted({n // 4, n // 2, n - 1}) if n > 6 else list(range(n))
        graphs = self._graphs(self.model)
        # One after the other: untrained models differ among themselves, and the highest is the null.
        untrained = max((self._graphs(reinitialized(self.model, seed=self.settings.seed + i))
                         for i in range(TWINS)), key=lambda g: float(self._per_document(g)[0].mean()))
        self._coverage(graphs, untrained)
        self._degree(graphs)
        self._loss(special)

    def _documents(self) -> list[Prompt]:
        model, pick = self.model, self.settings.pick
        length = min(64, model.max_positions or 64)
        if _texts.knows(model, reader) or _texts.knows(model, backcopy):
            self.what = "texts of the model's own language"
            return _texts.natural(model, pick(40, tiny=10), length, self.settings.rng())
        if not _passages.readable(model):
            raise PromptError(f"{model.name} reads no text here, so it has no function tokens")
        self.what = "English passages"
        halves = [half for pair in _passages.PASSAGES for half in pair][: pick(None, tiny=10)]
        made = []
        for half in halves:
            prompt = model.prompt(half)
            limit = model.max_positions
            made.append(prompt if not limit or len(prompt) <= limit else Prompt.from_tokens(
                prompt.ids[:limit]))
        return made

    def _special(self) -> list[int]:
        tokenizer = self.model.tokenizer
        return [int(i) for i in getattr(tokenizer, "all_special_ids", None) or ()]

    def _graphs(self, model: Any) -> dict[int, TokenFeatures]:
        made = {}
        for layer in self.layers:
            values, self.kind = features(model, self.prompts, layer)
            values = values[self.kept]
            on = strongest(values, max(1, round(ACTIVE * values.shape[1])))
            made[layer] = TokenFeatures(self.tokens[self.kept], on, self.documents[self.kept])
        return made

    # -- features --------------------------------------------------------------------------------

    def _coverage(self, graphs: dict[int, TokenFeatures], untrained: dict[int, TokenFeatures]) -> None:
        one = graphs[self.layers[0]]
        top = one.vocabulary[: min(FEW, len(one.vocabulary) - 1)]
        mine, documents = np.isin(one.tokens, top), np.unique(one.documents)
        # [document, layer, feature]: what is on anywhere in a document, by these tokens and by all.
        shown = {name: [np.stack([graph.on[(graph.documents == d) & rows].any(0) for d in documents])
                        for graph in graphs.values()]
                 for name, rows in (("top", mine), ("all", np.ones(len(mine), dtype=bool)))}

        def share(without: int = -1) -> float:
            rows = np.arange(len(documents)) != without
            return float(np.mean([a[rows].any(0).sum() / max(1, b[rows].any(0).sum())
                                  for a, b in zip(shown["top"], shown["all"])]))

        estimate = _jackknife(share(), [share(d) for d in range(len(documents))],
                              "share of active features, mean over layers")
        tops = [k for k in (1, 2, 3, 5, 10, 20, 50, 100, 200, 500) if k <= len(one.vocabulary)]
        made = {name: self._shares(found, tops) for name, found in (("trained", graphs),
                                                                    ("untrained", untrained))}
        at = max(i for i, k in enumerate(tops) if k <= FEW)
        self.claim("few", estimate, null=0.5, direction="above", figure="coverage",
                   unit="share of the features that are ever on", control="half of them", details={
                       "tokens": self._words(top), "kind": self.kind, "texts": self.what,
                       "share of the text": float(mine.mean()),
                       "as many random occurrences": float(made["trained"][1][at]),
                       "untrained": float(made["untrained"][0][at])})
        own, chance = self._per_document(graphs)
        other, _ = self._per_document(untrained)
        self.claim("exposure", statistics.difference(own, chance, resamples=self.resamples), null=0.0,
                   unit="share of the features of a document", control="as many occurrences drawn at "
                   "random from the same document (exact expectation)", details={
                       "function tokens": len(self.function), "observed": float(own.mean()),
                       "expected": float(chance.mean())})
        self.claim("trained", statistics.difference(own, other, resamples=self.resamples), null=0.0,
                   unit="share of the features of a document",
                   control=f"random weights, the highest of {TWINS} draws", details={
                       "trained": float(own.mean()), "untrained": float(other.mean())})
        if self.wants("coverage"):
            figure, ax = canvas(width=PAGE / 2)
            observed, random_ = made["trained"]
            ax.plot(tops, observed, "o-", color=color("primary"), label="most frequent tokens")
            ax.plot(tops, random_, "o-", color=GRAY, label="as many random occurrences")
            ax.plot(tops, made["untrained"][0], "--", color=CYCLE[1], label="untrained weights")
            ax.axhline(0.5, color="black", linestyle=":", linewidth=0.8)
            ax.set_xscale("log")
            ax.set_ylim(0, 1.02)
            ax.set_xlabel("tokens, most frequent first")
            ax.set_ylabel("share of active features")
            ax.set_title(self.model.name)
            ax.legend(loc="lower right")
            note(ax, f"{self.kind}, layers {', '.join(map(str, self.layers))}")
            self.figure("coverage", figure)

    def _per_document(self, graphs: dict[int, TokenFeatures]) -> tuple[np.ndarray, np.ndarray]:
        found = [graph.per_document(self.function) for graph in graphs.values()]
        return np.mean([a for a, _ in found], 0), np.mean([b for _, b in found], 0)

    @staticmethod
    def _shares(graphs: dict[int, TokenFeatures], tops: list[int]) -> tuple[np.ndarray, np.ndarray]:
        active = [float(graph.on.any(0).sum()) for graph in graphs.values()]
        return (np.mean([g.coverage(tops) / n for g, n in zip(graphs.values(), active)], 0),
                np.mean([g.random_coverage(tops) / n for g, n in zip(graphs.values(), active)], 0))

    def _degree(self, graphs: dict[int, TokenFeatures]) -> None:
        frequency = next(iter(graphs.values())).frequency
        degrees = np.array([graph.degree for graph in graphs.values()], dtype=float)
        exposed = np.array([graph.exposure() for graph in graphs.values()])

        def power(rows: np.ndarray) -> float:
            drawn = rows.astype(int)
            return float(np.mean([slope(frequency[drawn], d[drawn]) for d in degrees]))

        def beyond(rows: np.ndarray) -> float:
            drawn = rows.astype(int)
            return float(np.mean([slope(frequency[drawn], d[drawn]) - slope(frequency[drawn], e[drawn])
                                  for d, e in zip(degrees, exposed)]))

        tokens = np.arange(len(frequency))
        grows = statistics.bootstrap(power, tokens, resamples=self.resamples, name="exponent, mean over "
                                     "layers")
        self.claim("power", grows, null=0.0, direction="above", figure="degree", unit="exponent",
                   control="a degree that does not depend on the frequency",
                   details={"tokens": len(tokens), "layers": str(self.layers)})
        more = statistics.bootstrap(beyond, tokens, resamples=self.resamples,
                                    name="exponent beyond exposure, mean over layers")
        self.claim("beyond", more, null=0.0, direction="above", figure="degree", unit="exponent",
                   control="as many occurrences drawn from the whole text (exact expectation)",
                   details={"exposure alone": grows.value - more.value})
        if self.wants("degree"):
            layer = self.layers[len(self.layers) // 2]
            graph = graphs[layer]
            figure, ax = canvas(width=PAGE / 2)
            rank = np.argsort(frequency)
            ax.plot(frequency[rank], graph.exposure()[rank], color=GRAY,
                    label="random occurrences")
            mine = np.isin(graph.vocabulary, self.function)
            for name, rows, hue in (("content", ~mine, CYCLE[0]), ("function", mine, color("primary"))):
                ax.plot(frequency[rows], graph.degree[rows], "o", color=hue, alpha=0.5,
                        markersize=3, label=f"{name} tokens")
            ax.set_xscale("log")
            ax.set_yscale("log")
            for axis in (ax.xaxis, ax.yaxis):
                axis.set_major_locator(LogLocator(subs=(1, 2, 5)))
                axis.set_major_formatter("{x:g}")
                axis.set_minor_formatter(NullFormatter())
            ax.set_xlabel("occurrences")
            ax.set_ylabel(f"features activated ({self.kind})")
            ax.set_title(f"{self.model.name}, layer {layer}")
            ax.legend()
            self.figure("degree", figure)

    # -- loss ------------------------------------------------------------------------------------

    def _loss(self, special: list[int]) -> None:
        reason = self._no_loss()
        if reason:
            self.give_up(reason)
            return
        logits = self.model.run(self.prompts).logits
        rows: dict[tuple[int, int], list[tuple[int, float]]] = {}
        for d, (prompt, given) in enumerate(zip(self.prompts, logits)):
            ids = torch.as_tensor(list(prompt.ids), device=given.device)
            loss = torch.nn.functional.cross_entropy(given[:-1].float(), ids[1:], reduction="none")
            for k, value in enumerate(loss.tolist()):
                before, after = int(ids[k]), int(ids[k + 1])
                if before not in special and after not in special:
                    rows.setdefault((int(before not in self.function), int(
                        after not in self.function)), []).append((d, value))
        n = len(self.prompts)
        sums, counts = np.zeros((n, 2, 2)), np.zeros((n, 2, 2))
        for cell, found in rows.items():
            for d, value in found:
                sums[(d, *cell)] += value
                counts[(d, *cell)] += 1

        def dominates(s: np.ndarray) -> float:
            whole = s.sum(0)
            return float(whole[0, 1] / whole.sum())

        def harder(s: np.ndarray, c: np.ndarray) -> float:
            s, c = s.sum(0), c.sum(0)
            return float(s[0, 1] / c[0, 1] - s[1, 1] / c[1, 1]) if (c[:, 1] > 0).all() else float("nan")

        shares = sums.sum(0) / sums.sum()
        placed = counts.sum(0) / counts.sum()
        self.claim("loss", statistics.bootstrap(dominates, sums, resamples=self.resamples,
                                                name="share of the loss"),
                   null=0.5, direction="above", figure="loss", unit="share of the loss",
                   control="half of the loss", details={
                       "share of the positions": float(placed[0, 1]),
                       "content after content": float(shares[1, 1]),
                       "function after content": float(shares[1, 0]),
                       "function after function": float(shares[0, 0])})
        gap = statistics.bootstrap(harder, sums, counts, resamples=self.resamples,
                                   name="difference of mean losses")
        if not np.isfinite(gap.value):
            self.skip("no content token follows a token of each class in these texts", "after")
        else:
            self.claim("after", gap, null=0.0, direction="above", figure="loss", unit="nats",
                       control="content tokens after content tokens")
        if self.wants("loss"):
            mean = sums.sum(0) / np.maximum(counts.sum(0), 1)
            figure, ax = canvas(width=PAGE / 2)
            for after in (0, 1):
                bars = ax.bar(np.arange(2) + 0.38 * after - 0.19, mean[:, after], 0.36,
                              color=(CYCLE[0], color("primary"))[after],
                              label=f"predicting a {CLASSES[after]} token")
                ax.bar_label(bars, [f"{100 * s:.0f} %" for s in shares[:, after]], fontsize=6.5)
            ax.set_xticks(range(2), [f"reading a {name}\ntoken" for name in CLASSES])
            ax.set_ylabel("cross-entropy (nats)")
            ax.set_ylim(0, 1.3 * float(mean.max()))
            ax.set_title(self.model.name)
            ax.legend(loc="upper left")
            note(ax, f"number: share of the whole loss · {int(counts.sum())} predictions")
            self.figure("loss", figure)

    def _no_loss(self) -> Optional[str]:
        if self.model.kind != "decoder":
            return f"{self.model.name} is an encoder: it predicts no next token"
        if not self.model.run(self.prompts[:1]).logits:
            return f"{self.model.name} has no vocabulary head, so it has no loss"
        return None

    def _words(self, tokens: np.ndarray) -> str:
        return " ".join(self.model.tokenizer.convert_ids_to_tokens([int(i) for i in tokens]))


def run(settings: Settings, out: Output) -> None:
    run_all(Words, settings, out)


def _jackknife(value: float, without: list[float], name: str) -> statistics.Estimate:
    """Of a share. Documents left out one by one: in a bootstrap, one drawn twice adds no feature."""
    n = len(without)
    if n < statistics.FEWEST:
        return statistics.Estimate(value, (float("nan"), float("nan")), n, name)
    error = 1.96 * float(np.sqrt((n - 1) * np.var(without)))
    return statistics.Estimate(value, (max(0.0, value - error), min(1.0, value + error)), n,
                               f"{name}, jackknife over {n} documents")
