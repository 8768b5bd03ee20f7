"""Token erasure (arXiv:2406.20086): do states forget which tokens a word was made of?

Probes read the tokens at and before a position in every layer; the layers between which the last
tokens of items forget most are chosen on documents that are not used again. What is to be read is
matched token by token with ordinary positions, and a model with fresh weights is the null.
"""

from typing import Any

import numpy as np
import xarray as xr
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Patch, Rectangle

from experiments import _lexical_items
from experiments._output import Output
from experiments._paper import Paper, Settings
from experiments._subject import Subject, run_all
from interp.core import ModelRefused, Result, statistics
from interp.figures import token_strip
from interp.figures.style import CYCLE, PAGE, canvas, color, note
from interp.models.model import Model
from probes import token_erasure, token_offsets
from probes.nulls import layer_states, reinitialized
from probes.token_offsets import OFFSETS, measure

PAPER = Paper(
    "token_erasure",
    "Token Erasure as a Footprint of Implicit Vocabulary Items in LLMs",
    ("2406.20086",),
    "Where do states forget the tokens that they come from, and which words does that imply?",
    figures={
        "accuracy": "Accuracy of linear probes for the token at an offset, by layer, on held-out "
        "documents: at all tokens, at the last tokens of items, and at ordinary positions matched to "
        "them token by token. Dotted: always the most frequent token; crosses: a model with fresh "
        "weights, in the two layers compared. Layer -1 is the embedding.",
        "spans": "One document: the spans of several tokens that the segmentation accepts (outlined), "
        "colored by their erasure score, clipped to 0 and 1; other tokens white.",
        "scores": "Erasure scores of items and of random spans of equal length.",
    },
    models=("reader",),
)
(SOURCE,) = PAPER.sources
OWN = "measured by this toolkit, after arXiv:2406.20086"
READ = (-3, -2, -1, 0, 1)
NAMES = {0: "the current token", -1: "the token before", -2: "the token before that"}
DRAWS = 20
"""Random spans per item."""
FRESH = 2
"""Models with fresh weights: a random model's layers mix tokens in its own way."""


class TokenErasure(Subject):
    """One model: its documents, the probes on them, and the claims."""

    paper = PAPER
    claims = {
        **{f"forgets {k}": (f"States at the last token of an item forget {NAMES[k]} in early layers, "
                            "more than ordinary states do.", SOURCE) for k in OFFSETS},
        "ranks": ("The erasure score ranks items above other spans of their length.", SOURCE),
        "recall": ("The spans that a segmentation by erasure accepts recover items.", SOURCE),
        "precision": ("Spans of several tokens that the segmentation accepts are items.", SOURCE),
    }
    numbers: dict[str, tuple[str, str]] = {}

    def run(self) -> None:
        model, settings = self.model, self.settings
        self.texts = _lexical_items.documents(model, settings)
        self.out.record(prompts=self.texts.prompts, name=f"texts-{model.name}")
        layers = [-1, *_evenly(model.n_layers, settings.pick(17, tiny=4))]
        states = self._states(model, [layer for layer in layers if layer >= 0])
        self._index(states)
        self.probe = {"solver": "adamw", "batch_size": settings.pick(512, tiny=256), "epochs": 2,
                      "seed": settings.seed, "rank": 256 if model.d_model > 1024 else None}
        self.found = measure(states.values, self.ids, self.documents, self.train, layers=layers,
                             offsets=READ, **self.probe)
        self.start, self.end = self._choose()
        self.fresh = self._fresh()
        self.out.save(f"probes-{model.name}", self.found)
        self._forgetting()
        self._segments()
        self._draw()

    # -- states and probes ---------------------------------------------------------------------

    def _states(self, model: Model, blocks: list[int], embedding: bool = True) -> xr.DataArray:
        """States of all tokens but the start of the text and, there being extremes, no others."""
        begin = self.texts.begin
        return layer_states(model, self.texts.prompts, [list(range(begin, len(p)))
                                                        for p in self.texts.prompts],
                            layers=blocks, embedding=embedding)

    def _index(self, states: xr.DataArray) -> None:
        texts = self.texts
        self.documents, self.position = states["prompt"].values, states["position"].values
        self.ids = np.array([texts.prompts[d].ids[p] for d, p in zip(self.documents, self.position)])
        self.train = self.documents < texts.train
        self.test = self.documents >= texts.train + texts.select
        self.at = {(int(d), int(p)): i for i, (d, p) in enumerate(zip(self.documents, self.position))}
        self.inside = np.zeros(len(self.ids), bool)
        for d, spans in enumerate(texts.items):
            for p, q in spans:
                self.inside[[self.at[d, t] for t in range(p, q + 1)]] = True

    def _ends(self, of: str, test: bool) -> np.ndarray:
        part = self.test if test else ~self.train & ~self.test
        spans = getattr(self.texts, of)
        made = [self.at[d, q] for d in range(len(spans)) for _, q in spans[d]]
        return np.array([i for i in made if part[i]], dtype=np.int64)

    def _pairs(self, found: Result, k: int, start: int, test: bool) -> np.ndarray:
        """Ends of items with ordinary positions that the start layer reads as well, of the same token
        to be read where that can be."""
        part = self.test if test else ~self.train & ~self.test
        ends, level = self._ends("items", test), found["probability"].sel(offset=k, layer=start).values
        for same in (True, False):
            self.matching = ("the same token to be read, " if same else "") + \
                "at an ordinary position, read within 0.1 as well in the start layer"
            pairs = token_erasure.matched_pairs(
                self.ids, self.documents, ends, part & ~self.inside, k, same_token=same, level=level)
            if len(pairs) >= max(2 * statistics.FEWEST, len(ends) / 4):
                break
        return pairs

    def _gaps(self, found: Result, k: int, start: int, end: int, test: bool) -> tuple:
        """Per pair, how much more the item forgets between two layers; and its document."""
        p = found["probability"].sel(offset=k)
        drop = p.sel(layer=start).values - p.sel(layer=end).values
        pairs = self._pairs(found, k, start, test)
        # What the last digits of a fitted probe say is nothing.
        gaps = np.round(drop[pairs[:, 0]] - drop[pairs[:, 1]], 4)
        kept = np.isfinite(gaps)
        return gaps[kept], self.documents[pairs[kept, 0]]

    def _choose(self) -> tuple[int, int]:
        """Two blocks of the first half, between which items forget most, over all offsets, in the
        middle part of the documents (in the paper: 1 and 9 of 32)."""
        half = max(1, (self.model.n_layers - 1) // 2)
        blocks = [int(x) for x in self.found["layer"].values if 0 <= x <= half]
        by = {}
        for i, start in enumerate(blocks[:-1]):
            for end in blocks[i + 1:]:
                gaps = [self._gaps(self.found, k, start, end, False)[0] for k in OFFSETS]
                by[start, end] = float(np.mean([g.mean() if len(g) else 0.0 for g in gaps]))
        return max(by, key=lambda pair: by[pair])

    def _fresh(self) -> list[Result]:
        """The same probes in the two chosen layers of models that have learned nothing."""
        made = []
        for seed in range(FRESH):
            try:
                null = reinitialized(self.model, seed=self.settings.seed + seed)
            except ModelRefused:
                return []
            states = self._states(null, [self.start, self.end], embedding=False)
            made.append(measure(states.values, self.ids, self.documents, self.train,
                                layers=[self.start, self.end], offsets=OFFSETS, **self.probe))
        return made

    # -- claims --------------------------------------------------------------------------------

    @property
    def _few(self) -> int:
        return self.settings.pick(statistics.RESAMPLES, tiny=1000)

    def _details(self) -> dict[str, Any]:
        return {"start": self.start, "end": self.end, "items are": self.texts.items_are,
                "texts": self.texts.what, "layers chosen on": f"{self.texts.select} other documents"}

    def _forgetting(self) -> None:
        for k in OFFSETS:
            gaps, where = self._gaps(self.found, k, self.start, self.end, True)
            if len(np.unique(where)) < statistics.FEWEST:
                self.skip(f"{len(gaps)} item(s) in {len(np.unique(where))} document(s) have an ordinary "
                          "position to be matched with", f"forgets {k}")
                continue
            drops = [self._gaps(one, k, self.start, self.end, True)[0] for one in self.fresh]
            fresh = [float(drop.mean()) for drop in drops if len(drop)]
            p = self.found["probability"].sel(offset=k)
            pairs = self._pairs(self.found, k, self.start, True)
            levels = {name: [round(float(np.nanmean(p.sel(layer=layer).values[pairs[:, i]])), 3)
                             for layer in (self.start, self.end)]
                      for i, name in enumerate(("item", "ordinary"))}
            self.claim(f"forgets {k}", statistics.mean(gaps, groups=where, resamples=self._few),
                       null=max(0.0, *fresh, 0.0), figure="accuracy", unit="probability of the token, "
                       "start minus end, items minus ordinary",
                       control=f"{self.matching}; the larger of {len(fresh)} models with fresh weights",
                       details={**self._details(), "pairs": len(gaps), "probability": levels,
                                "fresh weights": fresh})

    def _segments(self) -> None:
        """psi of items against random spans, and what the segmentation accepts."""
        texts = self.texts
        counts: dict[str, list[list[int]]] = {"own": [], "shuffled": []}
        self.shown: tuple[int, Any] = (-1, None)
        ranks, rank_of, spans_psi, random_psi = self._ranks(self.found)
        rng = self.settings.rng(32)
        for d in sorted({int(d) for d in self.documents[self.test]}):
            gold, delta = _from(texts.items[d], texts.begin), self._drops(self.found, d)
            taken = token_offsets.segment(token_offsets.span_scores(delta))
            counts["own"].append(_counts(taken, gold))
            counts["shuffled"].append(np.mean([_counts(token_offsets.segment(
                token_offsets.span_scores(token_erasure.shuffled(delta, rng))), gold)
                for _ in range(3)], 0).tolist())
            if self.shown[0] < 0 and gold:
                self.shown = d, taken
        self.psi = np.array(spans_psi), np.array(random_psi)
        if len(set(rank_of)) < statistics.FEWEST:
            self.skip(f"only {len(set(rank_of))} document(s) have items", "ranks", "recall", "precision")
            return
        fresh = [float(np.mean(self._ranks(one)[0])) for one in self.fresh]
        self.claim("ranks", statistics.mean(ranks, groups=rank_of, resamples=self._few),
                   null=max(0.5, *fresh, 0.5), unit="AUROC within documents", figure="scores",
                   control=f"{DRAWS} random spans of equal length per item, from its document; the "
                           f"larger of {len(fresh)} models with fresh weights",
                   details={**self._details(), "items": len(ranks), "fresh weights": fresh})
        own, null = (np.array(counts[name], dtype=float) for name in ("own", "shuffled"))
        for key, over in (("recall", 1), ("precision", 2)):
            def gap(hit: np.ndarray, of: np.ndarray, drawn: np.ndarray, per: np.ndarray) -> float:
                if not of.sum() or not per.sum():
                    return float("nan")
                return float(hit.sum() / of.sum() - drawn.sum() / per.sum())

            made = statistics.bootstrap(
                gap, own[:, 0], own[:, over], null[:, 0], null[:, over], name=f"{key} above shuffled",
                resamples=self.settings.pick(2000, tiny=500))
            if not np.isfinite(made.value):
                self.skip("the segmentation accepts no span of several tokens", key)
                continue
            self.claim(key, made, null=0.0, figure="spans",
                       control="the same drops at shuffled positions of their documents", details={
                           **self._details(), key: float(own[:, 0].sum() / own[:, over].sum()),
                           "shuffled": float(null[:, 0].sum() / null[:, over].sum()),
                           "accepted": int(own[:, 2].sum()), "items": int(own[:, 1].sum())})

    def _drops(self, found: Result, d: int) -> dict[int, np.ndarray]:
        rows = self.documents == d
        start, end = ({k: found["probability"].sel(layer=layer, offset=k).values[rows]
                       for k in OFFSETS} for layer in (self.start, self.end))
        return token_offsets.erasure(start, end)

    def _ranks(self, found: Result) -> tuple[list[float], list[int], list[float], list[float]]:
        """Per item, the share of random spans it is above, its document, its score; the others'."""
        rng = self.settings.rng(31)
        ranks, documents, own, random = [], [], [], []
        for d in sorted({int(d) for d in self.documents[self.test]}):
            psi = token_offsets.span_scores(self._drops(found, d))
            gold = _from(self.texts.items[d], self.texts.begin)
            for (p, q), drawn in zip(gold, token_erasure.random_spans(gold, len(psi), rng, DRAWS)):
                values = np.array([psi[s] for s in drawn])
                if len(values):
                    ranks.append(float((psi[p, q] > values).mean() + 0.5 * (psi[p, q] == values).mean()))
                    documents.append(d)
                    own.append(float(psi[p, q]))
                    random += values.tolist()
        return ranks, documents, own, random

    # -- figures -------------------------------------------------------------------------------

    def _draw(self) -> None:
        if self.wants("accuracy"):
            self.figure("accuracy", self._accuracy())
        if self.wants("spans"):
            if self.shown[0] < 0:
                self.no_figure("spans", "no held-out document has items")
            else:
                self.figure("spans", self._strip())
        if self.wants("scores"):
            if not len(self.psi[0]):
                self.no_figure("scores", "no held-out document has items")
            else:
                self.figure("scores", self._scores())

    def _accuracy(self) -> Figure:
        ordinary = np.unique(np.concatenate(
            [self._pairs(self.found, k, self.start, True)[:, 1] for k in OFFSETS]))
        panels = {"all tokens": np.flatnonzero(self.test), "last token of an item": self._ends(
            "items", True), "matched ordinary positions": ordinary}
        if len(self._ends("others", True)):
            panels["last token of other records"] = self._ends("others", True)
        figure, axes = canvas(1, len(panels), width=PAGE, height=2.7, sharey=True)
        layers, right = self.found["layer"].values, self.found["correct"]
        for ax, (name, rows) in zip(axes, panels.items()):
            for i, k in enumerate(READ):
                hue = CYCLE[i]
                values = right.sel(offset=k).values[:, rows]
                if np.isfinite(values).any():
                    ax.plot(layers, np.nanmean(values, 1), "-o", markersize=3, color=hue,
                            label=f"k = {k}")
                ax.axhline(float(self.found["majority"].sel(offset=k)), color=hue, linestyle=":",
                           linewidth=0.6)
                for one in self.fresh[:1] if k in OFFSETS else ():
                    fresh = one["correct"].sel(offset=k).values[:, rows]
                    if np.isfinite(fresh).any():
                        ax.plot([self.start, self.end], np.nanmean(fresh, 1), "x", color=hue,
                                markersize=5, alpha=0.6)
            ax.set_title(name, fontsize=7.5)
            ax.set_xlabel("layer")
            ax.set_xticks(layers[:: max(1, len(layers) // 6)])
            ax.set_ylim(-0.02, 1.04)
            ax.grid(True, axis="y")
        axes[0].set_ylabel("probe accuracy")
        figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=5)
        note(axes[-1], f"{self.model.name}, n = {', '.join(str(len(r)) for r in panels.values())}")
        return figure

    def _strip(self, longest: int = 96) -> Figure:
        d, taken = self.shown
        begin = self.texts.begin
        prompt = self.texts.prompts[d]
        tokens = list(prompt.tokens)[begin: begin + longest]
        scores = np.full(len(tokens), np.nan)
        shown = [(p, q, value) for p, q, value in taken if p < q < len(tokens)]
        for p, q, value in shown:
            scores[p: q + 1] = np.clip(value, 0, 1)
        gold = {t - begin for p, q in self.texts.items[d] for t in range(p, q + 1)}
        figure, ax = canvas(width=PAGE, height=0.35 + token_strip.height(tokens, PAGE))
        token_strip.draw(ax, tokens, scores, label="erasure score", limits=(0.0, 1.0), first=begin,
                         collapse=len(tokens) + 1)
        hues = {True: color("needle"), False: color("other")}
        for p, q, _ in shown:
            _outline(ax, range(p + begin, q + 1 + begin), hues[bool(gold & set(range(p, q + 1)))])
        ax.legend(handles=[Patch(fill=False, edgecolor=hues[on], linewidth=1.6, label=label)
                           for on, label in ((True, "accepted span, on an item"),
                                             (False, "accepted span, on none"))],
                  loc="lower left", bbox_to_anchor=(0.0, 1.0), ncols=2, borderaxespad=0.1)
        ax.set_title(self.model.name, loc="right")
        return figure

    def _scores(self) -> Figure:
        figure, ax = canvas(1, 1)
        own, drawn = self.psi
        bins = np.linspace(min(own.min(), drawn.min()), max(own.max(), drawn.max()) + 1e-9, 30).tolist()
        for values, name, hue in ((drawn, "random spans", color("control")), (own, "items", CYCLE[0])):
            ax.hist(values, bins, weights=np.full(len(values), 1 / len(values)), color=hue, alpha=0.6,
                    label=f"{name} (n = {len(values)})")
        ax.set_xlabel("erasure score $\\psi$")
        ax.set_ylabel("share of spans")
        ax.set_title(self.model.name)
        ax.legend(loc="lower right", bbox_to_anchor=(1.0, 1.0), borderaxespad=0.0, fontsize=6)
        return figure


def _outline(ax: Axes, tokens: range, hue: str) -> None:
    """One frame around the boxes of a span on a token strip, one per line where it is broken."""
    boxes = [patch for patch in ax.patches if patch.get_gid() in {f"token {t}" for t in tokens}]
    lines: dict[float, list[Any]] = {}
    for box in boxes:
        lines.setdefault(box.get_y(), []).append(box)
    for y, parts in lines.items():
        x = parts[0].get_x()
        ax.add_patch(Rectangle((x, y), parts[-1].get_x() + parts[-1].get_width() - x,
                               parts[0].get_height(), fill=False, edgecolor=hue, linewidth=1.6))


def _from(spans: list[tuple[int, int]], begin: int) -> list[tuple[int, int]]:
    return [(p - begin, q - begin) for p, q in spans]


def _counts(taken: Any, gold: list[tuple[int, int]]) -> list[int]:
    """Items found, items, and accepted spans of several tokens."""
    accepted = [(p, q) for p, q, _ in taken if q > p]
    return [len(set(accepted) & set(gold)), len(gold), len(accepted)]


def _evenly(n_layers: int, most: int) -> list[int]:
    return sorted({int(round(x)) for x in np.linspace(0, n_layers - 1, min(most, n_layers))})


def run(settings: Settings, out: Output) -> None:
    run_all(TokenErasure, settings, out, unfit)


def unfit(model: Any) -> str:
    """Why nothing can be forgotten in a model, "" if something can."""
    if model.kind != "decoder":
        return f"{model.name} is an encoder: its states see the tokens after them, and nothing is last"
    return f"{model.name} has one block: there are no two to compare" if model.n_layers < 2 else ""
