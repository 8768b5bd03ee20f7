"""The geometry of tokens (arXiv:2501.10573): the tokens of a text as a cloud, layer by layer.

Intrinsic dimension, neighborhood overlap and cosine of texts as they are and with shuffled blocks, and
whether texts that are hard to predict are clouds of more dimensions.
"""

from typing import Any

import numpy as np
from matplotlib.ticker import MaxNLocator
from scipy import stats

from experiments import _passages, _sink_subjects, _texts
from experiments._output import Output
from experiments._paper import Paper, Settings
from experiments._subject import Subject, run_all
from interp.core import Prompt, Result, statistics
from interp.figures.style import CYCLE, GRAY, PAGE, canvas, color
from probes import geometry
from probes.layer_correlation import rank_correlation
from probes.nulls import reinitialized
from probes.token_loss import content_places, frequency_loss, why_untrained

PAPER = Paper(
    "token_geometry",
    "The Geometry of Tokens in Internal Representations of Large Language Models",
    ("2501.10573",),
    "How many dimensions do the tokens of a text fill in each layer, and does that go with its loss?",
    figures={
        "dimension": "Intrinsic dimension (TwoNN) of the tokens of a text by layer; S: cut into 4^S "
        "blocks that are permuted; from the first layer on where equal tokens have different states. "
        "Gray: the same architecture with random weights.",
        "overlap": "Share of nearest neighbors that a layer and the next one agree on. Dotted: chance.",
        "cosine": "Mean cosine of pairs of tokens, as they are and after their mean is taken away.",
        "peaks": "The layer where each text's dimension is highest.",
        "loss": "Intrinsic dimension and loss of every text, in the first, the peak and the last layer.",
        "correlation": "Rank correlation of dimension and loss by layer; partial: number and frequency "
        "of the text's different tokens held constant. Gray: what the highest of all layers reaches by "
        "chance (95 %).",
        "scales": "Dimension at larger scales (Gride, neighbors n1 and 2 n1): a plateau would be a "
        "dimension free of scale. Dotted: random weights.",
    },
    models=("reader",),
)
(SOURCE,) = PAPER.sources
OWN = "measured by this toolkit, after arXiv:2501.10573"
BAND = (0.15, 0.6)
"""Relative depth that counts as early to middle."""
SCALES = (1, 2, 4, 8, 16, 32)
WHOLE = 0.99
"""Layers where fewer of the points are different have a dimension of their own."""


class Geometry(Subject):
    """A language model and its texts."""

    paper = PAPER
    claims = {
        "place": ("Intrinsic dimension peaks in early to middle layers.", SOURCE),
        "peak": ("Intrinsic dimension is higher in some layer between than at both ends.", SOURCE),
        "raise": ("Shuffling a text raises the peak of its intrinsic dimension.", SOURCE),
        "trend": ("The finer a text is shuffled, the higher is the peak.", SOURCE),
        "overlap": ("Shuffling lowers the overlap of neighbors around the peak.", SOURCE),
        "cosine": ("Shuffling raises the cosine between tokens around the peak.", SOURCE),
        "centered": ("Shuffling raises the cosine between tokens around the peak, their mean taken "
                     "away.", OWN),
        "loss": ("Texts of higher loss have a higher intrinsic dimension.", SOURCE),
        "partial": ("Texts of higher loss have a higher intrinsic dimension, given the number and "
                    "frequency of their different tokens.", OWN),
        "training": ("Texts from the training set have a lower intrinsic dimension.", SOURCE),
    }
    numbers = {"place": ("around layers 10 to 15 of 32", "secondary"),
               "loss": ("positive in three models", "paper")}

    def run(self) -> None:
        if self.model.kind != "decoder":
            self.give_up(f"{self.model.name} is an encoder: it predicts no next token")
            return
        prompts, what = texts(self.model, self.settings)
        self.out.record(prompts=prompts, name=f"texts-{self.model.name}")
        longest = int(np.log(len(content_places(self.model, prompts[0]))) / np.log(4) + 1e-9)
        seed = self.settings.seed
        device = str(self.model.device) if self.model.device.type == "cuda" else None
        found = geometry.measure(self.model, prompts, levels=range(longest + 1), seed=seed,
                                 device=device)
        self.some = prompts[: self.settings.pick(5, tiny=3)]
        scaled = geometry.measure(self.model, self.some, scales=SCALES, seed=seed)
        null = reinitialized(self.model, seed=seed)
        random = geometry.measure(null, self.some, scales=SCALES, seed=seed)
        del null
        found.manifest["texts"] = what
        for name, one in (("texts", found), ("scales", scaled), ("random", random)):
            self.out.save(f"{name}-{self.model.name}", one)
        self.found, self.scaled, self.random, self.what = found, scaled, random, what
        # Equal tokens are one point in the embeddings: that cloud is smaller, and its dimension cannot
        # be compared with the others'.
        whole = found["kept"].mean(("prompt", "level")).values > WHOLE
        self.first = int(np.flatnonzero(~whole)[-1]) + 1 if not whole.all() else 0
        self._figures()
        places = [content_places(self.model, p) for p in prompts]
        reason = why_untrained(self.model, found["loss"].sel(level=0).values,
                               frequency_loss(prompts, places))
        self.skip(self._training(), "training")
        if reason:
            self.give_up(f"{reason}: nothing is claimed of untrained models")
            return
        self._peaks()
        self._shuffled()
        self._loss()

    def _training(self) -> str:
        if _sink_subjects.is_reader(self.model):
            return "every step of its training drew fresh text: none was trained on more than another"
        return f"it is not known which texts {self.model.name} was trained on"

    # -- the peak ----------------------------------------------------------------------------------

    @property
    def resamples(self) -> int:
        return self.settings.pick(4000, tiny=500)

    def _id(self, level: int = 0) -> np.ndarray:
        """[prompt, layer] intrinsic dimension, from the first layer on whose points all differ."""
        return self.found["dimension"].sel(level=level).values[:, self.first :]

    def _layers(self) -> np.ndarray:
        return self.found["layer"].values[self.first :]

    def _peak_elsewhere(self) -> np.ndarray:
        """The peak layer's index for every text, from the other half of the texts; never an end."""
        values = self._id()
        half = np.arange(len(values)) % 2 == 0
        at = np.zeros(len(values), int)
        for own in (half, ~half):
            at[own] = 1 + int(np.nanmean(values[~own][:, 1:-1], 0).argmax())
        return at

    def _peaks(self) -> None:
        values = self._id()
        few, depth = values.shape[1] < 3, np.linspace(0, 1, values.shape[1])
        if few or not np.isfinite(values).all():
            self.skip("there is no layer between the first and the last whose points all differ" if few
                      else "some clouds have no dimension: " + "; ".join(self.found.manifest["reasons"]),
                      "place", "peak", "raise", "trend", "overlap", "cosine", "centered", "loss",
                      "partial")
            return

        def place(rows: np.ndarray) -> float:
            return float(depth[rows.mean(0).argmax()])

        estimate = statistics.bootstrap(place, values, resamples=self.resamples,
                                        name="relative depth of the highest mean")
        self.claim("place", estimate, null=sum(BAND) / 2, tolerance=(BAND[1] - BAND[0]) / 2,
                   direction="equal", figure="dimension", unit="0: first layer, 1: last", details={
                       "layer": int(self._layers()[values.mean(0).argmax()]),
                       "layers": self._layers().tolist(),
                       "mean by layer": values.mean(0).round(2).tolist(),
                       "random weights": self.random["dimension"].values[:, 0, self.first :].mean(
                           0).round(2).tolist(),
                       "different points in what enters block 0": float(
                           self.found["kept"][:, 0, 0].mean()),
                       "texts": self.what})
        at = self._peak_elsewhere()
        top = values[np.arange(len(values)), at]
        self.claim("peak", statistics.difference(
            np.log(top), np.log(np.maximum(values[:, 0], values[:, -1])), resamples=self.resamples),
            null=0.0, figure="dimension", unit="log ratio to the higher end",
            control="the layer is chosen on the other half of the texts",
            details={"peak / first": float(np.exp(np.log(top / values[:, 0]).mean())),
                     "peak / last": float(np.exp(np.log(top / values[:, -1]).mean()))})

    # -- shuffled blocks -----------------------------------------------------------------------------

    def _shuffled(self) -> None:
        levels = self.found["level"].values
        if "raise" in self.told:
            return
        if len(levels) < 2:
            self.skip("the texts are too short to be cut into blocks", "raise", "trend", "overlap",
                      "cosine", "centered")
            return
        at, rows = self._peak_elsewhere(), np.arange(len(self._id()))
        finest = int(levels[-1])

        def at_peak(name: str, level: int) -> np.ndarray:
            return self.found[name].sel(level=level).values[rows, self.first + at]

        worse = self.found["loss"].values[:, -1] - self.found["loss"].values[:, 0]
        for key, name, direction in (("raise", "dimension", "above"), ("overlap", "overlap", "below"),
                                     ("cosine", "cosine", "above"),
                                     ("centered", "cosine_centered", "above")):
            after, before = at_peak(name, finest), at_peak(name, 0)
            if not np.isfinite(after - before).all():
                self.skip("some shuffled clouds have no such value", key)
                continue
            p = float(stats.wilcoxon(after, before).pvalue) if (after != before).any() else 1.0
            self.claim(key, statistics.difference(after, before, resamples=self.resamples), null=0.0,
                       direction=direction, figure="dimension" if key == "raise" else name.split("_")[0],
                       unit=f"S = {finest} minus S = 0",
                       control="the texts unshuffled; the layer is chosen on the other half of them",
                       details={"layers": sorted({int(x) for x in self._layers()[at]}),
                                "before": float(before.mean()), "after": float(after.mean()),
                                "Wilcoxon p": p, "shuffling also adds loss (nats)": float(worse.mean())})
        by_level = np.stack([at_peak("dimension", int(level)) for level in levels], 1)
        if not np.isfinite(by_level).all():
            self.skip("some shuffled clouds have no dimension", "trend")
            return
        order = np.array([stats.spearmanr(levels, row)[0] if np.ptp(row) else 0.0 for row in by_level])
        page = stats.page_trend_test(by_level).pvalue if len(levels) > 2 else float("nan")
        self.claim("trend", statistics.mean(order, resamples=self.resamples), null=0.0,
                   figure="dimension", unit="rank correlation of level and dimension", details={
                       "Page's p": float(page), "mean by level": by_level.mean(0).round(2).tolist()})

    # -- loss ------------------------------------------------------------------------------------------

    def _loss(self) -> None:
        if "loss" in self.told:
            return
        for key, found in self._correlations().items():
            rho = found["correlation"].values
            if not np.isfinite(rho).any():
                self.skip("losses or dimensions do not differ between texts", key)
                continue
            best = int(np.nanargmax(rho))
            reach = float(np.quantile(found["null"].values, 0.95))
            self.claim(key, statistics.Estimate(
                float(rho[best]), (float(rho[best]) - reach, float(rho[best]) + reach),
                len(self._id()), "highest rank correlation of any layer, against its maximum over "
                f"layers in {found.sizes['permutation']} permutations"),
                null=0.0, figure="correlation", control="losses permuted over texts", details={
                    "layer": int(self._layers()[best]), "p": float(found["p"][best]),
                    "by layer": rho.round(3).tolist(), "texts": self.what})

    def _correlations(self) -> dict[str, Any]:
        # With texts of one length the type-token ratio is the number of different tokens.
        given = np.stack([self.found["distinct"].values.astype(float),
                          self.found["log_frequency"].values], 1)
        loss = self.found["loss"].sel(level=0).values
        more: Any = {"permutations": self.settings.pick(2000, tiny=200), "seed": self.settings.seed}
        return {"loss": rank_correlation(self._id(), loss, **more),
                "partial": rank_correlation(self._id(), loss, given, **more)}

    # -- figures ---------------------------------------------------------------------------------------

    def _figures(self) -> None:
        self._curves("dimension", ["dimension"])
        self._curves("overlap", ["overlap"])
        self._curves("cosine", ["cosine", "cosine_centered"])
        layers, values = self._layers(), self._id()
        if self.wants("peaks"):
            figure, ax = canvas(1, 1)
            top = layers[np.argmax(np.nan_to_num(values, nan=-np.inf), 1)]
            ax.bar(layers, [(top == layer).sum() for layer in layers], color=CYCLE[0], width=0.7)
            low, high = (layers[0] + b * (len(layers) - 1) for b in BAND)
            ax.axvspan(low, high, color=GRAY, alpha=0.2, linewidth=0, label="early to middle")
            ax.set_xlabel("layer of the peak")
            ax.set_ylabel("texts")
            ax.xaxis.set_major_locator(MaxNLocator(integer=True))
            ax.yaxis.set_major_locator(MaxNLocator(integer=True))
            ax.set_title(self.model.name)
            ax.legend()
            self.figure("peaks", figure)
        loss = self.found["loss"].sel(level=0).values
        if self.wants("loss"):
            peak = int(np.nanmean(values, 0).argmax())
            shown = sorted({0, peak, len(layers) - 1})
            figure, axes = canvas(1, len(shown), width=PAGE, height=2.4, squeeze=False)
            for ax, at in zip(axes[0], shown):
                ax.plot(loss, values[:, at], "o", color=CYCLE[0], markersize=3, alpha=0.7)
                ax.set_title(f"{self.model.name}, layer {layers[at]}" + " (peak)" * (at == peak))
                ax.set_xlabel("loss of the text (nats per token)")
            axes[0, 0].set_ylabel("intrinsic dimension")
            self.figure("loss", figure)
        if self.wants("correlation"):
            figure, ax = canvas(1, 1)
            for (key, found), hue in zip(self._correlations().items(), CYCLE):
                ax.plot(layers, found["correlation"], "-o" if key == "loss" else "--s", color=hue,
                        markersize=3, label="correlation" if key == "loss" else "partial")
                if key == "loss":
                    ax.axhline(float(np.nanquantile(found["null"], 0.95)), color=GRAY, linestyle=":",
                               label="highest by chance, 95 %")
            ax.axhline(0, color=GRAY, linewidth=0.7)
            ax.set_xlabel("layer")
            ax.set_ylabel("rank correlation with the loss")
            ax.xaxis.set_major_locator(MaxNLocator(integer=True))
            ax.set_title(self.model.name)
            ax.legend()
            self.figure("correlation", figure)
        if self.wants("scales"):
            self._scales()

    def _curves(self, name: str, quantities: list[str]) -> None:
        if not self.wants(name):
            return
        figure, axes = canvas(1, len(quantities), width=PAGE if len(quantities) > 1 else 3.5,
                              height=2.6, squeeze=False)
        layers = self.found["layer"].values
        for ax, quantity in zip(axes[0], quantities):
            # A dimension of fewer points is not shown beside the others.
            first = self.first if quantity == "dimension" else 0
            geometry.draw(Result(self.found.data.isel(layer=slice(first, None))), ax, of=quantity)
            ax.plot(layers[first:], self.random[quantity].values[:, 0, first:].mean(0), "--",
                    color=color("control"), linewidth=1, label="random weights")
            if quantity == "overlap":
                n = len(content_places(self.model, self.some[0]))
                ax.axhline(self.found.manifest["neighbors"] / (n - 1), color=GRAY, linestyle=":",
                           linewidth=0.8)
            ax.legend(ncols=3, loc="lower left", bbox_to_anchor=(0.0, 1.0), fontsize=6)
        figure.suptitle(self.model.name)
        self.figure(name, figure)

    def _scales(self) -> None:
        figure, ax = canvas(1, 1)
        layers = self.found["layer"].values
        shown = sorted({0, len(layers) // 2, len(layers) - 1})
        for at, hue in zip(shown, CYCLE):
            for one, line, label in ((self.scaled, "-o", f"layer {layers[at]}"),
                                     (self.random, ":", None)):
                curve = np.ma.masked_invalid(one["scale_dimension"].values[:, at]).mean(0)
                ax.plot(one["scale"], curve, line, color=hue, markersize=3, label=label)
        ax.set_xscale("log", base=2)
        ax.set_xticks(list(SCALES), [str(n) for n in SCALES])
        ax.set_xlabel("nearer neighbor n1 (the farther one: 2 n1)")
        ax.set_ylabel("intrinsic dimension (Gride)")
        ax.set_title(self.model.name)
        ax.legend()
        self.figure("scales", figure)


def texts(model: Any, settings: Settings) -> tuple[list[Prompt], str]:
    """Texts of 4^m tokens after the first: documents of the reader's language, plain English, or what
    else the model can be given. Raises `PromptError`."""
    count, length = settings.pick((32, 257), tiny=(12, 65))
    most = model.max_positions or length
    while length > most:
        length = (length - 1) // 4 + 1
    if _sink_subjects.is_reader(model):
        return (list(_sink_subjects.documents(settings, count, length)),
                "documents of the reader's language")
    if not _passages.readable(model):
        return _passages.other_texts(model, count, length, settings.rng(5))
    count, longest = settings.pick((200, 1025), tiny=(12, 65))
    return _texts.natural(model, count, longest if longest <= most else length,
                          settings.rng(5)), "plain English"


def run(settings: Settings, out: Output) -> None:
    run_all(Geometry, settings, out)
