"""What the causal mask alone tells about position (arXiv:2509.21042, arXiv:2501.00073).

Without parameters the mask makes nearer keys score higher: a recursion, a closed form and a
simulation. In any model: the mean scores less what depends on distance, and how alike neighbors are,
trained, untrained, without position encodings, and without the mask.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
import xarray as xr

import interp
from experiments import _texts as texts
from experiments._output import Output
from experiments._paper import Paper, Settings
from interp.core import Claim, ModelRefused, Prompt, PromptError, Result, statistics
from interp.figures import layer_curve
from interp.figures.style import PAGE, canvas, color, note
from interp.flow import causal_mask, nope_adjacency
from interp.models.model import Model
from interp.organisms import reader
from interp.organisms.twins import random_twin

PAPER = Paper(
    "causal_mask_position",
    "Behind RoPE: How Does Causal Mask Encode Positional Information? and Position Information "
    "Emerges in Causal Transformers Without Positional Encodings via Similarity of Nearby Embeddings",
    ("2509.21042", "2501.00073"),
    "What does the causal mask alone tell about position?",
    figures={
        "recursion": "Scores of parameter-free causal attention by layer (down) and by the mean "
        "cosine of the inputs (across), on 50 positions.",
        "rows": "Share of rows whose scores never fall towards the query, by layer and mean cosine.",
        "residual": "Mean scores of the first layers less the mean of every diagonal: what does not "
        "depend on distance alone.",
        "repeated": "The part of the residual scores that goes with the key's position (left; "
        "dotted: 95 % of permutations) and the part that repeats in other prompts (right).",
        "cosine": "Mean cosine of the states of two positions on random tokens, entering a block.",
        "adjacency": "How often a state is more similar to the nearer of two earlier ones, by layer, "
        "on random tokens; 0.5 is chance.",
    },
    models=("reader",),
)
MASK, NEAR = PAPER.sources
N, ALPHAS = 50, (0.0, 0.2, 0.4, 0.6, 0.8)

SENTENCES = {
    "closed": "The recursion of parameter-free attention is the closed form in its second layer.",
    "three": "With three tokens the second layer's scores are those of the paper.",
    "nearer": "Without parameters, nearer keys score higher in every row of the second layer.",
    "law": "Favoring near keys is a tendency, not a law: with uncorrelated inputs half of the rows of "
    "the third layer do.",
    "simulation": "The recursion is what random states of 64 dimensions do, up to their noise.",
    "needs_mask": "Without the mask, parameter-free attention favors no key.",
    "key": "Scores of the model go with the key's position beyond its distance.",
    "repeats": "Other prompts repeat a part of the scores that does not depend on distance alone.",
    "untrained": "The mask gives such scores to the untrained model.",
    "unmasked": "Without the mask the untrained model has no such scores.",
    "embeddings": "On random tokens, embeddings do not tell which positions are near.",
    "first": "The first layer already makes states of nearby positions more alike.",
    "random": "It does so in the untrained model without position encodings.",
    "bidirectional": "Without the mask, the untrained model without position encodings makes none "
    "alike.",
    "variance": "Similarities tell the order of positions better than the variance of the states.",
}
OF = {key: NEAR if key in ("embeddings", "first", "random", "bidirectional", "variance") else MASK
      for key in SENTENCES}
MATHEMATICS = ("closed", "three", "nearer", "law", "simulation", "needs_mask")
THREE = {(1, 0): 0.154, (2, 0): 0.132, (2, 1): 0.150}


def run(settings: Settings, out: Output) -> None:
    _parameter_free(settings, out)
    for name in settings.models(PAPER):
        model = interp.open_model(name, **settings.opening())
        if model.kind != "decoder":
            out.record(model)
            _skip(model, out, f"{model.name} is an encoder: it has no causal mask")
            continue
        _One(model, settings, out).run()


def _skip(model: Model, out: Output, reason: str) -> None:
    for key, sentence in SENTENCES.items():
        if key not in MATHEMATICS:
            out.claim(Claim.untestable(sentence, OF[key], reason), model.name)
    for figure in ("residual", "repeated", "cosine", "adjacency"):
        out.no_figure(figure, reason, of=model.name)


# -- without parameters ---------------------------------------------------------------------------


def _parameter_free(settings: Settings, out: Output) -> None:
    scores = {alpha: causal_mask.recursion(N, alpha, 4) for alpha in ALPHAS}

    def exact(key: str, value: float, null: float, direction: Any, **more: Any) -> None:
        out.claim(Claim(SENTENCES[key], MASK, measured=value, null=null, interval=(value, value),
                        direction=direction, **{"statistic": "exact", **more}))

    gap = float((scores[0.0][1].tril() - causal_mask.second_layer(N)).abs().max())
    exact("closed", gap, 1e-6, "below", n=N, unit="largest difference", figure="recursion")
    three = causal_mask.recursion(3, 0.0, 2)[1]
    exact("three", max(abs(float(three[at]) - number) for at, number in THREE.items()), 1e-3,
          "below", unit="largest difference", paper_number="0.154, 0.132, 0.150",
          paper_tag="checked", details={str(at): float(three[at]) for at in THREE})
    rows = np.array([[causal_mask.monotone_rows(layer) for layer in scores[alpha]]
                     for alpha in ALPHAS])
    exact("nearer", float(rows[:, 1].min()), 1.0, "equal", unit="share of rows", figure="rows",
          control="no mask: see below", paper_number="all rows, every mean cosine",
          paper_tag="checked")
    exact("law", float(rows[0, 2]), 0.5, "equal", unit="share of rows", figure="rows",
          tolerance=1e-9, paper_number="50 % (62 % in the fourth layer)", paper_tag="checked",
          details={"fourth layer": float(rows[0, 3])})
    off = ~torch.eye(N, dtype=torch.bool)
    flat = max(float(layer[off].max() - layer[off].min()) for alpha in ALPHAS
               for layer in causal_mask.recursion(N, alpha, 4, causal=False))
    exact("needs_mask", flat, 1e-6, "below", unit="largest difference of two keys")
    samples = settings.pick(150, tiny=40)
    gaps = []
    for seed in range(5):
        alpha = ALPHAS[seed]
        mean, _ = causal_mask.simulate(N, alpha, 4, samples=samples, seed=settings.seed + seed)
        gaps.append(float((mean - scores[alpha]).square().mean().sqrt()))
    out.claim(Claim(SENTENCES["simulation"], MASK, **statistics.mean(gaps).for_claim(), null=0.03,
                    direction="below", unit="root mean square difference", figure="recursion",
                    paper_number="within 0.03", paper_tag="checked",
                    details={"samples": samples, "dimensions": 64}))
    out.save("parameter-free", Result(xr.Dataset(
        {"scores": (("alpha", "layer", "query", "key"), np.stack([scores[a] for a in ALPHAS])),
         "monotone": (("alpha", "layer"), rows)}, {"alpha": list(ALPHAS), "layer": range(4)})))
    _draw_parameter_free(scores, rows, out)


def _draw_parameter_free(scores: Mapping[float, Any], rows: np.ndarray, out: Output) -> None:
    shown = (0.0, 0.4, 0.8)
    figure, axes = canvas(3, 3, width=PAGE * 0.9, height=5.4, sharex=True, sharey=True)
    hidden = ~np.tri(N, k=-1, dtype=bool)
    for column, alpha in enumerate(shown):
        for row in range(3):
            ax, matrix = axes[row, column], scores[alpha][row + 1].numpy().copy()
            matrix[hidden] = np.nan
            causal_mask.draw_matrix(matrix, ax, label="score" if column == 2 else "")
            ax.set_xlabel("key" if row == 2 else "")
            ax.set_ylabel("query" if not column else "")
            ax.set_title(f"layer {row + 1}, mean cosine {alpha:g}")
    out.figure("recursion", figure)
    figure, ax = canvas(1, 1, width=PAGE * 0.55, height=2.4)
    # Curves that coincide are one curve with all of its names.
    alike: dict[tuple[float, ...], list[str]] = {}
    for alpha, row in zip(ALPHAS, rows):
        alike.setdefault(tuple(row), []).append(f"{alpha:g}")
    layer_curve.draw(ax, {f"mean cosine {', '.join(names)}": np.array(row)
                          for row, names in alike.items()}, label="share of rows that never fall")
    ax.set_ylim(0, 1.05)
    ax.legend(loc="lower left")
    ax.set_title(f"attention without parameters, {N} positions")
    out.figure("rows", figure)


def _few_ticks(ax: Any, n: int) -> None:
    marks = sorted({0, n // 2, n - 1})
    ax.set_xticks(marks, [str(mark) for mark in marks])
    ax.set_yticks(marks, [str(mark) for mark in marks])


# -- in a model -----------------------------------------------------------------------------------


class _One:
    """Everything about one model."""

    def __init__(self, model: Model, settings: Settings, out: Output) -> None:
        self.model, self.settings, self.out = model, settings, out
        bundled = texts.knows(model, reader)
        length = settings.pick(96 if bundled else 256, tiny=24)
        self.length = min(length, model.max_positions or length, causal_mask.LONGEST)
        self.count = settings.pick(20 if bundled else 48, tiny=8)
        self.start = len(texts.first_ids(model))

    def run(self) -> None:
        model, out, rng = self.model, self.out, self.settings.rng
        tokens = texts.random_tokens(model, self.count, self.length, rng(1))
        try:
            read, kind = self._texts(rng(2)), "texts"
        except PromptError:
            read, kind = tokens, "random tokens"
        out.record(model, read, f"read-{model.name}")
        out.record(None, tokens, f"random-{model.name}")
        # Untrained models have nothing to say about a start token; theirs are random throughout.
        plain = [Prompt.from_tokens(prompt.ids[self.start:]) for prompt in tokens]
        few = plain[: self.settings.pick(10, tiny=5)]
        states = {"trained": nope_adjacency.measure(
            model, tokens[: len(few)], skip=self.start)}
        scores = {"trained": causal_mask.measure(model, read)}
        reason = ""
        try:
            for name, about in {"untrained": {}, "untrained, no mask": {"causal": False}}.items():
                scores[name] = causal_mask.measure(self._twin(**about), plain)
                states[f"{name}, no positions"] = nope_adjacency.measure(
                    self._twin(positions=False, **about), few)
        except ModelRefused as error:
            reason = str(error)
        for name, one in {**scores, **{f"states {k}": v for k, v in states.items()}}.items():
            out.save(f"{name.replace(', ', '-').replace(' ', '-')}-{model.name}", one)
        self._score_claims(scores, kind, reason)
        self._state_claims(states, reason)
        self._figures(scores, states)

    def _texts(self, rng: np.random.Generator) -> list[Prompt]:
        """Pieces from anywhere in texts: what begins a sentence would be a position, too."""
        longer = 2 * self.length
        if self.model.max_positions and longer > self.model.max_positions:
            return texts.natural(self.model, self.count, self.length, rng)
        made = []
        for prompt in texts.natural(self.model, self.count, longer, rng):
            at = int(rng.integers(self.start, longer - self.length + self.start))
            ids = (*prompt.ids[: self.start], *prompt.ids[at : at + self.length - self.start])
            made.append(Prompt.from_tokens(ids))
        return made

    def _twin(self, **about: Any) -> Model:
        hf = random_twin(self.model.hf, self.settings.seed, n_layers=4, **about)  # type: ignore[arg-type]
        twin = Model(hf, f"untrained {self.model.name}")
        wanted = "encoder" if about.get("causal") is False else "decoder"
        if twin.kind != wanted:
            raise ModelRefused(f"the untrained {self.model.architecture} keeps its mask, whatever "
                               "its configuration says")
        return twin

    def claim(self, key: str, estimate: Any, **more: Any) -> None:
        self.out.claim(Claim(SENTENCES[key], OF[key], **{**estimate.for_claim(), **more}),
                       self.model.name)

    def skip(self, key: str, reason: str) -> None:
        self.out.claim(Claim.untestable(SENTENCES[key], OF[key], reason), self.model.name)

    def _score_claims(self, scores: Mapping[str, Result], kind: str, reason: str) -> None:
        found = scores["trained"]
        deepest = int(found["layer"].values[-1])
        if deepest == 0:
            for key in ("key", "repeats", "untrained", "unmasked"):
                self.skip(key, f"{self.model.name} has one layer, whose keys have seen nothing yet")
            return
        at = found.data.sel(layer=deepest)
        details = {"layer": deepest, "read": kind, "prompts": self.count, "length": self.length,
                   "NR by layer": found["non_relative"].values.tolist(),
                   "NR with the first key": found["with_first"].values.tolist(),
                   "not relative (share of variance)": found["share"].values.tolist(),
                   "score per position": float(at["slope"])}
        self.claim("key", causal_mask.interval(found, deepest), figure="residual",
                   null=float(np.quantile(at["null"], 0.95)), unit="R2", details=details,
                   control="key positions permuted, all diagonals alike (95 %)")
        self.claim("repeats", causal_mask.interval(found, deepest, "repeated"), null=0.0,
                   unit="share of the residual", figure="repeated",
                   control="the residual of other prompts", details={
                       "by layer": found["repeated"].values.tolist()})
        for key, name, more in (
            ("untrained", "untrained", {"direction": "above"}),
            ("unmasked", "untrained, no mask", {"direction": "equal", "tolerance": 0.1}),
        ):
            if name not in scores:
                self.skip(key, reason)
                continue
            last = int(scores[name]["layer"].values[-1])
            self.claim(key, causal_mask.interval(scores[name], last, "repeated"), null=0.0,
                       unit="share of the residual", figure="repeated", **more,
                       control="the same weights with and without the mask", details={
                           "layer": last, "NR by layer":
                           scores[name]["non_relative"].values.tolist()})

    def _state_claims(self, states: Mapping[str, Result], reason: str) -> None:
        trained = states["trained"]
        self.claim("first", statistics.mean(trained["adjacency"].sel(layer=1)), null=0.6,
                   unit="AP", figure="adjacency", control="random tokens", details={
                       "by layer": trained["adjacency"].mean("prompt").values.tolist()})
        bare = states.get("untrained, no positions")
        if bare is None:
            for key in ("embeddings", "random", "bidirectional", "variance"):
                self.skip(key, reason)
            return
        last = int(bare["layer"].values[-1])
        by_layer = {"by layer": bare["adjacency"].mean("prompt").values.tolist()}
        self.claim("embeddings", statistics.mean(bare["adjacency"].sel(layer=0)), null=0.5,
                   direction="equal", tolerance=0.05, unit="AP", figure="adjacency",
                   control="random tokens")
        self.claim("random", statistics.mean(bare["adjacency"].sel(layer=1)), null=0.5, unit="AP",
                   figure="adjacency", control="the same weights without the mask",
                   details=by_layer)
        self.claim("variance", statistics.difference(
            bare["by_cosine"].sel(layer=last), bare["by_variance"].sel(layer=last)), null=0.0,
            unit="absolute rank correlation with the true order", figure="cosine",
            control="the variance over a state's coordinates", details={
                k: bare[k].mean("prompt").values.tolist() for k in ("by_cosine", "by_variance")})
        other = states.get("untrained, no mask, no positions")
        if other is None:
            self.skip("bidirectional", reason)
            return
        self.claim("bidirectional", statistics.mean(other["adjacency"].sel(layer=last)), null=0.5,
                   direction="equal", tolerance=0.05, unit="AP", figure="adjacency",
                   control="the same weights with the mask", details={
                       "by layer": other["adjacency"].mean("prompt").values.tolist()})

    def _figures(self, scores: Mapping[str, Result], states: Mapping[str, Result]) -> None:
        name, found = self.model.name, scores["trained"]
        layers = found["layer"].values
        figure, axes = canvas(1, len(layers), width=PAGE * len(layers) / 4 + 0.6, height=2.3,
                              squeeze=False)
        for ax, layer in zip(axes[0], layers):
            causal_mask.draw(found, ax, layer)
            ax.set_title(f"layer {layer}")
            ax.set_ylabel("query" if layer == layers[0] else "")
            if layer != layers[-1]:
                ax.figure.axes[-1].set_ylabel("")
        figure.suptitle(f"{name} (colors end at the 99.5 % quantile of a layer's cells)")
        self.out.figure("residual", figure, of=name)

        figure, axes = canvas(1, 2, width=PAGE, height=2.8)
        roles = {k: "control" for k in scores if "mask" in k}
        for ax, what, label in (
            (axes[0], "non_relative", "R² on the key's position (NR)"),
            (axes[1], "repeated", "share repeated\nin other prompts"),
        ):
            layer_curve.draw(ax, {k: v[what] for k, v in scores.items()}, label=label, roles=roles,
                             legend=False)
            ax.axhline(0, color=color("control"), linewidth=0.6)
        null = found["null"].quantile(0.95, "sample")
        axes[0].plot(null["layer"], null, ":", color=color("control"))
        note(axes[0], "dotted: key positions permuted, 95 % quantile")
        note(axes[1], "estimated between different prompts: may be below 0")
        figure.legend(*axes[1].get_legend_handles_labels(), loc="outside lower center",
                      ncols=len(scores))
        figure.suptitle(name)
        self.out.figure("repeated", figure, of=name)

        shown = {k: v for k, v in states.items()}
        figure, axes = canvas(1, len(shown), width=PAGE * len(shown) / 3, height=2.4, squeeze=False)
        depth = {key: int(min(2, one["layer"].values[-1])) for key, one in shown.items()}
        least = min(float(one["cosine"].sel(layer=depth[key]).min()) for key, one in shown.items())
        for ax, (key, one) in zip(axes[0], shown.items()):
            layer = depth[key]
            nope_adjacency.draw(one, ax, layer, limits=(least, 1.0), bar=ax is axes[0, -1])
            _few_ticks(ax, one.data.sizes["key"])
            ax.set_title(f"{key.replace(', no positions', '')} (layer {layer})")
        figure.suptitle(name)
        self.out.figure("cosine", figure, of=name)

        figure, ax = canvas(1, 1, width=PAGE * 0.6, height=2.5)
        layer_curve.draw(ax, {k: v["adjacency"] for k, v in states.items()}, 
                         label="adjacency probability (0.5: chance)",
                         x="layer (entering)", roles={k: "control" for k in states if "mask" in k})
        ax.axhline(0.5, color=color("control"), linewidth=0.6)
        ax.set_title(name)
        self.out.figure("adjacency", figure, of=name)
