"""The figures of `attention_flow`, one model and task at a time."""

from typing import Any

import numpy as np
import xarray as xr

from experiments._output import Output
from experiments._relevance import KINDS, NAMES, TARGETS, Relevance, Task, some_layers
from interp.figures import head_grid, heat, layer_curve
from interp.figures.style import BLUE, CYCLE, GRAY, ORANGE, PAGE, PURPLE, VERMILION, canvas, note
from interp.figures.token_strip import readable
from interp.flow import max_flow, rollout, saliency
from interp.models.model import Model

HUES = {"raw": BLUE, "rollout": VERMILION, "flow": CYCLE[2], "norms": ORANGE, "values": PURPLE,
        "transformed": CYCLE[5]}


class Figures:
    """Draws for one task, and leaves out what was not asked for."""

    def __init__(self, model: Model, task: Task, out: Output) -> None:
        self.model, self.task, self.out = model, task, out
        self.of = f"{model.name}-{task.name}"
        self.title = f"{model.name}: {task.what}"

    def _words(self, number: int) -> list[str]:
        prompt = self.task.items[number].prompt
        return [readable(w, 10) for w in prompt.tokens] or [str(i) for i in prompt.ids]

    def maps(self) -> None:
        if not self.out.wants("maps"):
            return
        prompt = min((item.prompt for item in self.task.items), key=len)
        maps = rollout.attention_maps(self.model, prompt)["mean"]
        layers = some_layers(self.model.n_layers)[-4:]
        rows = {"raw attention": maps, "rollout": rollout.rollout(maps),
                "flow": max_flow.flow(maps, layers=layers)}
        figure, axes = canvas(3, len(layers), width=PAGE, height=5.4 if len(layers) > 2 else 7,
                              sharex=True, sharey=True, squeeze=False)
        for line, (name, made) in zip(axes, rows.items()):
            for ax, layer in zip(line, layers):
                shown = xr.DataArray(np.sqrt(made[layer].numpy()), dims=("query", "key"))
                heat.draw(ax, shown, limits=(0, 1), upward=False, bar=False,
                          x="input position" if name == "flow" else "",
                          y=f"{name}: position" if layer == layers[0] else "")
                ticks = range(0, len(prompt), 1 if len(prompt) < 8 else 5)
                ax.set_xticks(ticks)
                ax.set_yticks(ticks)
                if name == "raw attention":
                    ax.set_title(f"layer {layer}")
        figure.colorbar(axes[0, 0].images[0], ax=list(axes[:, -1]), label="√ relevance", shrink=0.6)
        figure.suptitle(f"{self.model.name}, one prompt of the task {self.task.name!r}")
        self.out.figure("maps", figure, of=self.of)

    def tokens(self, one: Relevance) -> None:
        if not self.out.wants("tokens"):
            return
        keep, words = one.keep[0], self._words(0)
        shown = {NAMES[k]: one.rows[k][0, -1, : len(keep)] for k in ("raw", "rollout", "flow")}
        blank = one.importance["blank"][0]
        figure, axes = canvas(4, 1, width=PAGE, height=4.4, sharex=True)
        places = np.arange(len(words))
        for ax, (name, values), hue in zip(axes, shown.items(), HUES.values()):
            ax.bar(places, values, color=[hue if k else "#D9D9D9" for k in keep])
            ax.set_title(f"{name}, after layer {self.model.n_layers - 1}")
            ax.set_ylabel("relevance")
        axes[3].bar(places, np.nan_to_num(blank), color=[GRAY if k else "#D9D9D9" for k in keep])
        axes[3].set_title("change when the token is blanked")
        axes[3].set_ylabel("|change|")
        axes[3].set_xticks(places, words, rotation=60, ha="right", rotation_mode="anchor")
        for tick in axes[3].get_xticklabels():
            tick.set_parse_math(False)
        note(axes[3], "pale: not compared (first, special, the predicting row's own)")
        figure.suptitle(self.title)
        self.out.figure("tokens", figure, of=self.of)

    def correlation(self, rho: dict[tuple[str, str], np.ndarray]) -> None:
        if not self.out.wants("correlation"):
            return
        figure, axes = canvas(2, 2, width=PAGE, height=5.0, sharex=True, sharey=True)
        constant = False
        for ax, (target, name) in zip(axes.flat, TARGETS.items()):
            curves = {}
            for kind in (*KINDS, "uniform"):
                values = xr.DataArray(rho[kind, target], dims=("prompt", "layer"), coords={
                    "layer": np.arange(self.model.n_layers)})
                if kind == "uniform":
                    # Equal for all tokens, it has no correlation; `saliency.correlations` says 0.
                    equal = (values.fillna(0) == 0).all("prompt") & values.notnull().any("prompt")
                    constant = constant or bool(equal.any())
                    values = values.where(~equal)
                values = values.dropna("layer", how="all").dropna("prompt")
                if values.size:
                    curves[NAMES[kind]] = values
            ax.axhline(0, color="#BBBBBB", linewidth=0.7)
            if curves:
                roles = {NAMES["uniform"]: "control"} if NAMES["uniform"] in curves else {}
                layer_curve.draw(ax, curves, label="Spearman correlation", roles=roles, legend=False)
            else:
                ax.text(0.5, 0.5, "the same for every token", transform=ax.transAxes, ha="center",
                        color=GRAY)
            ax.set_title(f"against: {name}")
        for ax in axes[0]:
            ax.set_xlabel("")
        for ax in axes[:, 1]:
            ax.set_ylabel("")
        lines, labels = max((ax.get_legend_handles_labels() for ax in axes.flat),
                            key=lambda both: len(both[1]))
        if lines:
            figure.legend(lines, labels, loc="outside lower center", ncols=4, title=(
                "uniform attention has no correlation, and no curve, where it is the same for all tokens"
                if constant else None))
        figure.suptitle(self.title)
        self.out.figure("correlation", figure, of=self.of)

    def first(self, one: Relevance) -> None:
        if not self.out.wants("first"):
            return
        figure, ax = canvas(1, 1, width=4.6, height=2.7)
        layers = np.arange(self.model.n_layers)
        curves = {NAMES[k]: xr.DataArray(one.rows[k][:, :, 0], dims=("prompt", "layer"), coords={
            "layer": layers}).dropna("layer", how="all") for k in (*KINDS, "uniform")
            if np.isfinite(one.rows[k][:, :, 0]).any()}
        layer_curve.draw(ax, curves, label="relevance of the first position",
                         roles={NAMES["uniform"]: "control"})
        ax.set_ylim(0, None)
        ax.legend(loc="center left", bbox_to_anchor=(1.01, 0.5))
        ax.set_title(self.of)
        self.out.figure("first", figure, of=self.of)

    def agreement(self, heads: np.ndarray, means: dict[str, np.ndarray]) -> None:
        if not self.out.wants("agreement"):
            return
        figure, (left, right) = canvas(1, 2, width=PAGE, height=2.7, width_ratios=(1.5, 1))
        known = heads[np.isfinite(heads).all((1, 2))]
        if not len(known):
            self.out.no_figure("agreement", "saliency is the same for every token", of=self.of)
            return
        head_grid.draw(left, known.mean(0), label="correlation with gradient × input",
                       signed=True)
        left.set_title(f"{self.of}: heads")
        # From below, as the layers of the grid.
        bars = {"best head,\nother half": means["best head"], "all heads": means["all"]}
        bars |= {f"layer {i}": means["layers"][:, i] for i in some_layers(self.model.n_layers)}
        at = np.arange(len(bars))
        values = [np.nanmean(v) for v in bars.values()]
        right.barh(at, values, color=[GRAY, VERMILION] + [BLUE] * (len(bars) - 2))
        for i, one in enumerate(bars.values()):
            known = one[np.isfinite(one)]
            low, high = layer_curve.band(known[:, None])
            right.plot([low[0], high[0]], [i, i], color="black", linewidth=0.9)
        right.axvline(0, color="black", linewidth=0.7)
        right.set_yticks(at, list(bars))
        right.set_xlabel("correlation with gradient × input")
        right.set_title("means over heads")
        note(right, f"95 % bootstrap interval, n = {len(self.task)}")
        self.out.figure("agreement", figure, of=self.of)

    def saliency(self, one: Relevance) -> None:
        if not self.out.wants("saliency"):
            return
        figure, ax = canvas(1, 1, width=PAGE, height=2.4)
        words = self._words(0)
        rows = one.reads["saliency"].values[0][:, : len(words)]
        heat.draw(ax, rows, x="", y="layer", label="|A dL/dA|, row of length one", limits=(0, 1))
        ax.set_xticks(np.arange(len(words)), words, rotation=60, ha="right", rotation_mode="anchor")
        for tick in ax.get_xticklabels():
            tick.set_parse_math(False)
        ax.set_title(self.title)
        self.out.figure("saliency", figure, of=self.of)

    def flags(self, points: dict[str, np.ndarray]) -> None:
        if not self.out.wants("flags"):
            return
        figure, ax = canvas(1, 1, width=5.0, height=3.2)
        least, most = 1e-5, 1.2
        effects = np.concatenate([points[name].ravel() for name in ("effect", "whole")])
        top = 1.5 * max(1.0, float(np.nanmax(effects)))
        under, over = saliency.UNDERSTATED_MASS, saliency.OVERSTATED_MASS
        ax.fill_between([least, under], saliency.UNDERSTATED_EFFECT, top, color=ORANGE, alpha=0.18,
                        linewidth=0)
        ax.fill_between([over, most], least, saliency.OVERSTATED_EFFECT, color=PURPLE, alpha=0.18,
                        linewidth=0)
        ax.text(1.3 * least, 1.2 * saliency.UNDERSTATED_EFFECT, "attention understates use", fontsize=6)
        ax.text(1.05 * over, 0.9 * saliency.OVERSTATED_EFFECT, "overstates", fontsize=6, va="top")
        marks: tuple[tuple[str, str, str, str, Any], ...] = (
            ("mass", "effect", ".", "one layer, the predicting row", BLUE),
            ("mean", "whole", "s", "all layers, all rows", VERMILION))
        for mass, effect, mark, label, hue in marks:
            x, y = points[mass].ravel(), points[effect].ravel()
            known = np.isfinite(x) & np.isfinite(y)
            ax.plot(np.clip(x[known], least, most), np.clip(y[known], least, None), mark, color=hue,
                    markersize=3 if mark == "." else 2.6, alpha=0.45, markeredgewidth=0, label=label)
        ax.set_xscale("log")
        ax.set_yscale("log")
        ax.set_xlim(0.8 * least, most)
        ax.set_ylim(0.8 * least, top)
        ax.set_xlabel("attention on the token (mean over heads)")
        ax.set_ylabel("relative change when it is knocked out")
        ax.legend(loc="upper center", bbox_to_anchor=(0.5, -0.24), ncols=2)
        note(ax, "what is smaller than 1e-5, or negative, is drawn at 1e-5")
        ax.set_title(self.of)
        self.out.figure("flags", figure, of=self.of)
