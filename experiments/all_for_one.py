"""All for one (arXiv:2509.09650): tokens wait, then the last one reads them all in a few layers.

On an adder written by hand, in which the truth is known, on `reader`, whose recall is the control
task, and on any text model that adds small numbers.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np

from experiments import _slot_tasks as tasks
from experiments._output import Output
from experiments._paper import Paper, Settings
from interp import open_model
from interp.core import Claim, ModelRefused, PromptError, Result, statistics
from interp.figures import heat
from interp.figures.style import CYCLE, PAGE, canvas, color, note
from interp.flow import all_for_one
from interp.flow.all_for_one import SlotTask, Subgraph, faithfulness
from interp.models.model import Model
from interp.organisms import adder_circuit

PLANTED, LAYERS, TRANSFER = "planted-adder", 14, (6, 7)
"""The adder's depth, and where its last token reads the numbers."""

PAPER = Paper(
    "all_for_one",
    "All for One: LLMs Solve Mental Math at the Last Token With Information Transferred From Other "
    "Tokens",
    ("2509.09650",),
    "How late, and in how few layers, must the tokens of a sum meet?",
    figures={
        "waiting": "Faithfulness when states that know only their own token enter a layer (context-"
        "aware mean ablation), and with other states in their place.",
        "windows": "Faithfulness when only the last token reads others, and only in a window of "
        "layers, after the longest harmless wait.",
        "layers": "Faithfulness without reading in one layer of the window; and of the whole model "
        "without reading in the window alone, or in as many other layers (gray).",
        "heads": "Faithfulness on held-out prompts with fewer and fewer heads of the window that "
        "read, least important first.",
    },
    models=(PLANTED, "reader"),
)
SOURCE = PAPER.sources[0]
SENTENCES = {
    "wait": "In sums, the first third of the layers needs nothing from other tokens.",
    "few": "In sums, a few layers are enough for the last token to read the others (15 % at most).",
    "necessary": "Without reading in these layers alone, at least half of the sums are lost.",
    "special": "Not reading in these layers causes more errors than not reading in as many others.",
    "context": "Where the meaning of tokens depends on their context, tokens cannot wait so long.",
    "means": "Context-aware means keep a task that plain means, other states or zeros lose.",
}
NUMBERS = {"wait": "15 of 32 layers (Llama-3-8B)", "few": "2 of 32 layers (Llama-3-8B)",
           "necessary": "layers 15 and 16 (Llama-3-8B)"}
FEWEST = 10
"""Prompts that a model must get right for its task to be looked into."""


def run(settings: Settings, out: Output) -> None:
    for name in settings.models(PAPER):
        if name == PLANTED:
            model = Model(adder_circuit.build(LAYERS, TRANSFER), PLANTED, adder_circuit.words())
        else:
            model = open_model(name, **settings.opening())
        _One(model, settings, out).run()


class _One:
    """Everything about one model."""

    def __init__(self, model: Model, settings: Settings, out: Output) -> None:
        self.model, self.settings, self.out = model, settings, out
        self.reasons: dict[str, str] = {}
        self.graphs: dict[str, Subgraph] = {}
        self.found: dict[str, Result] = {}

    def claim(self, key: str, estimate: Any, **more: Any) -> None:
        self.out.claim(Claim(SENTENCES[key], SOURCE, **{
            **estimate.for_claim(), **_number(key), **more}), self.model.name)

    def skip(self, reason: str, *keys: str) -> None:
        for key in keys:
            self.out.claim(Claim.untestable(SENTENCES[key], SOURCE, reason, **_number(key)),
                           self.model.name)

    def run(self) -> None:
        self.out.record(self.model)
        for number, (name, make) in enumerate((("sum", tasks.arithmetic),
                                               ("retrieval", tasks.retrieval))):
            self._search(name, make, number)
        name, out = self.model.name, self.out
        if not self.found:
            for figure in PAPER.figures:
                out.no_figure(figure, "; ".join(self.reasons.values()), of=name)
            for key in SENTENCES:
                self.skip("; ".join(self.reasons.values()), key)
            return
        self._waiting()
        self._windows()
        main = "sum" if "sum" in self.found else "retrieval"
        window = self._window(main)
        if window is None:
            reason = (f"after waiting until layer {int(self.found[main]['wait'])} no window of layers "
                      f"is faithful in the task {main!r}: tokens other than the last must meet, too")
            for figure in ("layers", "heads"):
                out.no_figure(figure, reason, of=name)
        else:
            self._inside(main, window)
        self._claims(window if main == "sum" else None)

    def _search(self, name: str, make: Any, number: int) -> None:
        settings, model = self.settings, self.model
        try:
            task: SlotTask = make(model, settings.rng(1, number), settings.pick(40, tiny=16),
                                  settings.pick(300, tiny=200))
            always_first = len(set(task.prompts[:, 0].tolist())) == 1
            graph = Subgraph(model, task, bos="keep" if always_first else "cut")
        except (PromptError, ModelRefused) as error:
            self.reasons[name] = str(error).rstrip(".")
            return
        most = np.bincount(task.answers).max() / len(task.answers)
        right = int(graph.right.sum())
        if right < FEWEST or right <= most * len(task.answers):
            self.reasons[name] = (
                f"{model.name} gets {right} of {len(task.answers)} prompts right ({task.what}), and "
                f"always the same answer would get {most:.0%}")
            return
        self.graphs[name] = graph
        self.found[name] = all_for_one.measure(model, task, graph=graph)
        self.out.save(f"{name}-{model.name}", self.found[name])

    # -- figures ------------------------------------------------------------------------------

    def _waiting(self) -> None:
        figure, axes = canvas(1, len(self.found), width=PAGE * len(self.found) / 2, height=3.2,
                              squeeze=False)
        for ax, (name, found) in zip(axes[0], self.found.items()):
            all_for_one.draw(found, ax)
            ax.get_legend().remove()
            ax.axvline(int(found["wait"]), color=color("control"), linewidth=0.8, label="longest wait")
            ax.set_title(name)
        figure.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside lower center", ncols=2)
        figure.suptitle(self.model.name)
        self.out.figure("waiting", figure, of=self.model.name)

    def _windows(self) -> None:
        figure, axes = canvas(1, len(self.found), width=PAGE * len(self.found) / 2, height=2.7,
                              squeeze=False)
        for ax, (name, found) in zip(axes[0], self.found.items()):
            table = found["transfer"].isel(prompt=_right(found)).mean("prompt")
            table = table.isel(start=slice(int(found["wait"]), None))
            table = table.isel(length=slice(0, table.sizes["start"] + 1))
            heat.draw(ax, table, x="layers in the window", y="first layer of the window",
                      label="faithfulness", limits=(0, 1), hatched="no such window")
            ax.set_title(name)
        figure.suptitle(self.model.name)
        self.out.figure("windows", figure, of=self.model.name)

    def _inside(self, name: str, window: tuple[int, int]) -> None:
        graph, out = self.graphs[name], self.out
        wait, full = int(self.found[name]["wait"]), graph.right
        inside = all_for_one.ablate_peeking(graph, wait, window)
        out.save(f"window-{self.model.name}", inside)
        figure, ax = canvas(1, 1, height=2.6)
        alone = faithfulness(inside["without"].values, full)
        layers = inside["layer"].values.astype(int).tolist()
        bars = [ax.bar(range(len(layers)), alone, color=CYCLE[0], width=0.6)]
        whole = [faithfulness(graph.without_reading(layers)[0], full),
                 np.mean([faithfulness(graph.without_reading(one)[0], full)
                          for one in self._others(layers)] or [np.nan])]
        bars += [ax.bar(len(layers) + 0.5, whole[0], color=CYCLE[1], width=0.6),
                 ax.bar(len(layers) + 1.5, whole[1], color=color("control"), width=0.6)]
        for one in bars:
            ax.bar_label(one, fmt="%.2f", fontsize=6.5)
        ax.set_xticks([*range(len(layers)), len(layers) + 0.5, len(layers) + 1.5],
                      [*map(str, layers), "whole\nmodel,\nthese", "whole\nmodel,\nothers"])
        ax.set_ylim(0, 1.1)
        ax.set_xlabel("layer without reading")
        ax.set_ylabel("faithfulness (share)")
        ax.set_title(f"{self.model.name}: {name}")
        out.figure("layers", figure, of=self.model.name)
        figure, ax = canvas(1, 1, height=2.4)
        judged = inside["judged"].values & full
        curve = inside["pruned"].values[:, judged].mean(1)
        ax.plot(inside["removed"], curve, "-o", color=CYCLE[0])
        threshold = self.found[name].manifest["threshold"]
        ax.axhline(threshold, color=color("control"), linestyle=":", linewidth=0.8,
                   label=f"threshold {threshold:g}")
        ax.legend(loc="lower left")
        ax.set_ylim(-0.03, 1.05)
        ax.set_xlabel(f"heads removed of {len(curve) - 1} in layers "
                      f"{layers[0]} to {layers[-1]}" if len(layers) else "heads removed")
        ax.set_ylabel("faithfulness (share)")
        ax.set_title(f"{self.model.name}: {name}")
        note(ax, f"n = {int(judged.sum())} prompts")
        out.figure("heads", figure, of=self.model.name)

    def _others(self, layers: Sequence[int]) -> list[list[int]]:
        """As many layers that are not in the window, five times."""
        free = [x for x in range(self.model.n_layers) if x not in layers]
        if len(free) < len(layers):
            return []
        return [sorted(self.settings.rng(3, i).choice(free, len(layers), replace=False).tolist())
                for i in range(5)]

    # -- claims -------------------------------------------------------------------------------

    def _window(self, name: str) -> tuple[int, int] | None:
        """Chosen on even prompts; its effect is judged on odd ones."""
        found, even = self.found[name], np.arange(len(self.graphs[name].right)) % 2 == 0
        return all_for_one.shortest_window(faithfulness(
            found["transfer"].values, self.graphs[name].right & even))

    def _claims(self, window: tuple[int, int] | None) -> None:
        n = self.model.n_layers
        if "sum" not in self.found:
            self.skip(self.reasons["sum"], "wait", "few", "necessary", "special")
        else:
            found = self.found["sum"]
            more = {"task": self.graphs["sum"].task.what, "prompts": int(_right(found).sum())}
            self.claim("wait", self._waited("sum"), null=0.3, unit="of the layers", figure="waiting",
                       details={**more, "wait": int(found["wait"])})
            self._few(found, more)
            if window is None:
                self.skip(f"no window is faithful after waiting until layer {int(found['wait'])}",
                          "necessary", "special")
            else:
                self._necessary(window, n)
        self._context()
        name = "sum" if "sum" in self.found else "retrieval"
        found = self.found[name]
        kept = found["waiting"].isel(prompt=_right(found), layer=int(found["wait"]))
        best = max((x for x in found["by"].values if not str(x).startswith("cama")),
                   key=lambda x: float(kept.sel(by=x).mean()))
        if int(found["wait"]) == 0:
            self.skip(f"{self.model.name} cannot wait for any layer in the task {name!r}, so there is "
                      "nothing to compare", "means")
            return
        self.claim("means", statistics.difference(kept.sel(by="cama"), kept.sel(by=best)), null=0.0,
                   figure="waiting", details={
                       "task": name,
                       **{str(x): float(kept.sel(by=x).mean()) for x in found["by"].values},
                       "norm of the means": float(found["norm_ratio"][int(found["wait"])])})

    def _waited(self, name: str) -> Any:
        found = self.found[name]
        curves = found["waiting"].sel(by="cama").isel(prompt=_right(found)).transpose("prompt", "layer")
        n = self.model.n_layers

        def share(right: np.ndarray) -> float:
            return all_for_one.longest_wait(right.mean(0)) / n

        return statistics.bootstrap(share, curves.values, resamples=2000,
                                    name="longest harmless wait over depth")

    def _few(self, found: Result, more: dict[str, Any]) -> None:
        n = self.model.n_layers
        if n < 7:
            self.skip(f"{self.model.name} has {n} layers, so one alone is {1 / n:.0%} of them", "few")
            return
        tables = np.nan_to_num(found["transfer"].isel(prompt=_right(found)).transpose(
            "prompt", "start", "length").values)

        def share(right: np.ndarray) -> float:
            best = all_for_one.shortest_window(right.mean(0))
            return 2.0 if best is None else best[1] / n

        if all_for_one.shortest_window(tables.mean(0)) is None:
            self.skip(f"no window is faithful after waiting until layer {int(found['wait'])}", "few")
            return
        self.claim("few", statistics.bootstrap(share, tables, resamples=1000,
                   name="shortest faithful window over depth"), null=0.15 + 1e-9,
                   direction="below", unit="of the layers", figure="windows", details={
                       **more, "first layer": int(found["first"]), "layers": int(found["layers"]),
                       "prefills for all windows": float(found["prefills"]),
                       "by whole passes": found.manifest["naive_prefills"]})

    def _necessary(self, window: tuple[int, int], n: int) -> None:
        graph = self.graphs["sum"]
        judged = graph.right & (np.arange(len(graph.right)) % 2 == 1)
        layers = list(range(window[0], sum(window)))
        lost = 1.0 - graph.without_reading(layers)[0][judged]
        others = self._others(layers)
        details = {"layers": layers, "prompts": int(judged.sum())}
        if not others or not layers:
            self.skip(f"the window takes {len(layers)} of {n} layers, so there are not as many others "
                      "to compare with", "necessary", "special")
            return
        control = 1.0 - np.mean([graph.without_reading(one)[0][judged] for one in others], 0)
        details["loss without reading in other layers"] = float(control.mean())
        more: dict[str, Any] = {
            "causal": True, "control": "as many other layers, five draws", "figure": "layers",
            "details": details, "unit": "of the right answers"}
        self.claim("necessary", statistics.mean(lost), null=0.5, **more)
        self.claim("special", statistics.difference(lost, control), null=0.0, **more)

    def _context(self) -> None:
        if "retrieval" not in self.found:
            self.skip(self.reasons["retrieval"], "context")
            return
        here = self._waited("retrieval")
        details = {"retrieval waits for layers": int(self.found["retrieval"]["wait"])}
        if "sum" not in self.found:
            # Against the bound that sums are to pass.
            self.claim("context", here, null=0.3, direction="below", unit="of the layers",
                       figure="waiting", details={**details, "sums": self.reasons["sum"]})
            return
        there = self._waited("sum")
        rng, sizes = self.settings.rng(4), []
        curves = [found["waiting"].sel(by="cama").isel(prompt=_right(found)).transpose(
            "prompt", "layer").values for found in (self.found["sum"], self.found["retrieval"])]
        for _ in range(2000):
            sizes.append([all_for_one.longest_wait(c[rng.integers(0, len(c), len(c))].mean(0))
                          for c in curves])
        gap = (np.subtract(*np.array(sizes).T)) / self.model.n_layers
        few = min(map(len, curves)) < statistics.FEWEST
        low, high = (np.nan, np.nan) if few else np.quantile(gap, [0.025, 0.975])
        self.claim("context", statistics.Estimate(
            there.value - here.value, (float(low), float(high)), min(map(len, curves)),
            "longest wait of sums minus that of retrieval over depth, bootstrap over prompts of each"),
            null=0.0, unit="of the layers", figure="waiting", details=details)


def _right(found: Result) -> np.ndarray:
    return found["full"].values.astype(bool)


def _number(key: str) -> dict[str, str]:
    return {"paper_number": NUMBERS[key], "paper_tag": "secondary"} if key in NUMBERS else {}
