"""Text dominance (arXiv:2508.10552): is attention balanced between text and image, what do more or
fewer visual tokens change, and when is the image done with (DyVTE, arXiv:2411.19628)?
"""

from collections.abc import Sequence
from typing import Any, Optional

import numpy as np
import xarray as xr

from experiments import _picture_questions as questions
from experiments import _visual_flow as flow
from experiments._output import Output
from experiments._paper import Paper, Settings
from experiments._subject import Subject, run_each
from interp.causal.metrics import AnswerAccuracy
from interp.core import (
    ModelRefused,
    Prompt,
    Result,
    Segment,
    block,
    each,
    statistics,
)
from interp.figures.style import PAGE, canvas, color
from interp.flow import dominance, horizon, inference_stages, knockout
from interp.models import tower

PAPER = Paper(
    "text_dominance",
    "When Language Overrules: Revealing Text Dominance in Multimodal Large Language Models",
    ("2508.10552", "2411.19628"),
    "How much more attention does a text token get than a visual one, and does that matter?",
    figures={
        "stages": "MDI of the tokens of a description in three thirds of the layers, by what counts "
        "as text (line: balance).",
        "tokens": "MDI, and the ratio of the attention masses themselves, when the same picture is "
        "given once or several times.",
        "compression": "MDI and accuracy when a share of the visual tokens is removed: those with "
        "the least [CLS] attention, or random ones.",
        "masses": "Attention mass between text and image by layer; dotted: change points, if any.",
        "exit": "Layer from which no image token is needed, as measured and as the state of the text "
        "predicts it for other pictures.",
    },
    models=("looker",),
)
MAIN, DYVTE = PAPER.sources

CLAIMS: dict[str, tuple[str, str]] = {
    "dominance": ("In late layers a text token gets more attention than a visual one.", MAIN),
    "robust": ("The same holds without the start token and without sinks, on both sides.", MAIN),
    "depth": ("The dominance of text grows with depth.", MAIN),
    "more": ("More redundant visual tokens raise the MDI.", MAIN),
    "beyond": ("More redundant visual tokens move attention itself from the image to the text, not "
               "the count of tokens only.", MAIN),
    "compression": ("Removing the visual tokens of least [CLS] attention causes a lower MDI.", MAIN),
    "useful": ("Keeping the visual tokens of most [CLS] attention causes more right answers than "
               "keeping as many random ones.", MAIN),
    "three": ("Text reads the image early, then hardly, then again: cutting it off in the layers "
              "between causes less loss per layer.", DYVTE),
    "saved": ("The image can be withdrawn before the last layer without changing the output.", DYVTE),
    "tells": ("The state of the text tells when the image is done with.", DYVTE),
}
NUMBERS: dict[str, tuple[str, str]] = {
    "dominance": ("LLaVA-1.5-7B: MDI 1.58, 10.23, 17.37 in early, middle and late layers",
                  "secondary"),
    "more": ("audio given once to ten times: 1.16 to 8.70 in late layers", "secondary"),
    "compression": ("10.23 to 0.86", "paper"),
    "saved": ("up to 45.7 % less computation on LLaVA-1.5", "paper"),
}
TASKS = ("color", "shape", "position", "read", "count", "existence")
SINK = 0.3
"""Mean received attention from which a key is a sink here (where no sink dimension is known)."""


def run(settings: Settings, out: Output) -> None:
    run_each(_One, settings, out)


class _One(Subject):
    paper, claims, numbers = PAPER, CLAIMS, NUMBERS

    def run(self) -> None:
        model, settings = self.model, self.settings
        self.asked = questions.about_scenes(model, TASKS, settings.pick(40, tiny=8), settings.rng(1))
        self.prompts, self.answers = questions.prompts(self.asked), questions.answers(self.asked)
        self.accuracy = AnswerAccuracy(self.answers, batch_size=32)
        right = self.accuracy(model, self.prompts)
        self.out.record(model, self.prompts, f"questions-{model.name}")
        reason = flow.cannot(model, self.asked, float(right.mean()))
        if reason:
            self.give_up(reason)
            return
        self.right = right
        own = questions.is_looker(model)
        text = "describe the picture ." if own else "Describe this image."
        self.steps = settings.pick(4 if own else 16, tiny=3)

        def described(times: int) -> list[Prompt]:
            return [model.prompt(text, images=[one.picture] * times, chat=questions.has_chat(model))
                    for one in self.asked[: settings.pick(10, tiny=6)]]

        self.described = described(1)
        full = self._mdi(self.described, sinks=self._sinks(self.described))
        self.out.save(f"masses-{model.name}", full)
        self._dominance(full)
        self._repeated(described, full)
        self._compressed(full)
        self._stages()
        self._exit()

    # -- MDI --------------------------------------------------------------------------------------

    def _mdi(self, prompts: Sequence[Prompt], **more: Any) -> Result:
        return dominance.measure(self.model, prompts, new_tokens=self.steps, **more)

    def _late(self) -> list[int]:
        n = self.model.n_layers
        return list(range(n - max(1, round(n / 3)), n))

    def _sinks(self, prompts: Sequence[Prompt]) -> list[dict[int, list[int]]]:
        """The first token and keys with much attention in a layer, text and image alike; the last keys
        are unsure."""
        found = []
        for prompt in prompts:
            got = self.model.run(prompt, stats="received", logits="none").stats["received"]
            mean = np.nan_to_num(got.isel(prompt=0).mean("head").values)[:, : int(0.9 * len(prompt))]
            found.append({int(layer): sorted({0, *(int(p) for p in np.flatnonzero(row >= SINK))})
                          for layer, row in zip(got["layer"].values, mean)})
        return found

    def _ratio(self, key: str, found: Result, keys: str, **more: Any) -> None:
        text, other = dominance.per_token(found, keys, self._late())
        known = np.isfinite(text) & np.isfinite(other)
        if not known.any():
            self.skip(f"no tokens are left to count as {keys.replace('_', ' ')}, or none is in sight",
                      key)
            return
        n_text, n_other = (float(found[f"n_{side}"].sel(segment=keys).mean())
                           for side in ("text", "other"))
        value = float(text[known].mean() / other[known].mean())
        self.claim(key, statistics.bootstrap(
            lambda a, b: float(np.log(a.mean() / b.mean())), text[known], other[known],
            resamples=2000, name="log MDI of the last third of the layers, ratio of means"),
            null=0.0, figure="stages", details={
                "MDI": value, "AEI of text": float(dominance.aei_of_mdi(value, n_text / n_other)),
                "mean of ratios": float((text[known] / other[known]).mean()),
                "text tokens": n_text, "visual tokens": n_other, **more})

    def _dominance(self, full: Result) -> None:
        n = self.model.n_layers
        all_keys = {}
        for keys in dominance.KEYS:
            text, other = dominance.per_token(full, keys, self._late())
            known = np.isfinite(text) & np.isfinite(other)
            all_keys[keys] = float(text[known].mean() / other[known].mean()) if known.any() else None
        self._ratio("dominance", full, "all", **{"MDI by what counts as text": all_keys})
        self._ratio("robust", full, "no_sinks")
        layers = [np.log(np.divide(*dominance.per_token(full, "all", [layer]))) for layer in range(n)]
        curves = np.stack(layers, 1)
        known = np.isfinite(curves).all(1)
        if known.sum() and n > 2:
            self.claim("depth", statistics.bootstrap(
                lambda x: float(statistics.stats.spearmanr(np.arange(n), x.mean(0)).statistic),
                curves[known], resamples=1000, name="Spearman correlation of mean log MDI and layer"),
                null=0.0, figure="stages",
                details={"MDI by layer": np.exp(curves[known].mean(0)).round(3).tolist()})
        else:
            self.skip("some layers do not see the image, or there are fewer than three", "depth")
        if not self.wants("stages"):
            return
        figure, ax = canvas(1, 1, width=PAGE * 0.8, height=2.5)
        parts = np.array_split(np.arange(n), 3) if n > 2 else [np.arange(n)]
        for number, keys in enumerate(dominance.KEYS):
            values = []
            for part in parts:
                text, other = dominance.per_token(full, keys, part.tolist())
                known = np.isfinite(text) & np.isfinite(other)
                values.append(text[known].mean() / other[known].mean() if known.any() else np.nan)
            ax.bar(np.arange(len(parts)) + (number - 2) * 0.16, np.array(values) - 1, 0.16, bottom=1,
                   label=keys.replace("_", " ").replace("bos", "start token"))
        ax.axhline(1, color=color("control"), linewidth=0.8)
        ax.set_yscale("log")
        ax.set_xticks(range(len(parts)), [f"{p[0]}-{p[-1]}" for p in parts])
        ax.set_xlabel("layers")
        ax.set_ylabel("MDI")
        _plain(ax)
        ax.legend(title="text keys", loc="center left", bbox_to_anchor=(1.0, 0.5))
        ax.set_title(self.model.name)
        self.out.figure("stages", figure, of=self.model.name)

    def _repeated(self, described: Any, full: Result) -> None:
        most = self.model.max_positions or 1 << 30
        times = [t for t in self.settings.pick((1, 2, 4, 8), tiny=(1, 2))
                 if len(self.described[0]) + (t - 1) * len(self.described[0].positions("image")) + 20
                 <= most]
        if len(times) < 2:
            reason = f"{self.model.name} has {most} positions: too few for the picture given twice"
            self.skip(reason, "more", "beyond")
            self.no_figure("tokens", reason)
            return
        counts, ratio, mass = [], [], []
        for t in times:
            found = full if t == 1 else self._mdi(described(t))
            text, other = dominance.per_token(found, "all", self._late())
            one = found.data.sel(segment="all", layer=self._late()).mean(("layer", "step"))
            counts.append(float(one["n_other"].mean()))
            ratio.append(np.log(text / other))
            mass.append(np.log(one["text"] / one["other"]).values)
        size = np.log(counts)

        def slope(*each: np.ndarray) -> float:
            return float(np.polyfit(size, [x.mean() for x in each], 1)[0])

        known = np.isfinite(np.stack([*ratio, *mass])).all(0)
        details = {"times": times, "MDI": np.exp([x[known].mean() for x in ratio]).tolist()}
        for key, values, name in (("more", ratio, "log MDI"),
                                  ("beyond", mass, "log of the ratio of attention masses")):
            if not known.any():
                self.skip("the image is out of sight of the late layers", key)
                continue
            self.claim(key, statistics.bootstrap(
                slope, *(x[known] for x in values), resamples=1000,
                name=f"slope of {name} over the log of the number of visual tokens"), null=0.0,
                figure="tokens", details=details)
        if not self.wants("tokens"):
            return
        figure, ax = canvas(1, 1, width=PAGE * 0.5, height=2.3)
        for values, label, role in ((ratio, "MDI", "image"), (mass, "mass on text / on image", "text")):
            ax.plot(counts, [np.exp(x[known].mean()) for x in values], "-o", color=color(role),
                    label=label)
        ax.axhline(1, color=color("control"), linewidth=0.8)
        ax.set(xscale="log", yscale="log", xlabel="visual tokens (the same picture repeated)",
               ylabel="ratio in the late layers")
        ax.set_xticks(counts)
        ax.minorticks_off()
        _plain(ax)
        ax.legend()
        ax.set_title(self.model.name)
        self.out.figure("tokens", figure, of=self.model.name)

    # -- compression ------------------------------------------------------------------------------

    def _scores(self, prompt: Prompt) -> np.ndarray:
        """Attention of the vision tower's class token, block before the projector, mean over heads;
        received attention where there is no class token."""
        read = tower.read(self.model, prompt)
        layer = (read.select or read.n_layers) - 1
        cls = read.cls_attention
        return (read.received(layer) if cls is None else cls[layer]).mean(0).float().cpu().numpy()

    def _compressed(self, full: Result) -> None:
        settings, model = self.settings, self.model
        try:
            scores = {id(p): self._scores(p) for p in [*self.prompts, *self.described]}
        except ModelRefused as error:
            self.skip(str(error), "compression", "useful")
            self.no_figure("compression", str(error))
            return
        cuts, seeds = settings.pick((0.75, 0.9, 0.95), tiny=(0.75, 0.9)), settings.pick(3, tiny=2)

        def keep(prompts: Sequence[Prompt], cut: float, seed: Optional[int]) -> list[tuple[int, ...]]:
            rng = np.random.default_rng([settings.seed, 7, seed or 0])
            return [dominance.keep_best(
                scores[id(p)] if seed is None else rng.permutation(len(scores[id(p)])).astype(float),
                p.positions("image"), cut) for p in prompts]

        def right(cut: float, seed: Optional[int]) -> np.ndarray:
            kept = keep(self.prompts, cut, seed)
            gone = [sorted(set(p.positions("image")) - set(k)) for p, k in zip(self.prompts, kept)]
            return self.accuracy(model, self.prompts, each(
                block("all", g) if g else () for g in gone))

        table: dict[str, dict[float, Any]] = {"[CLS]": {}, "random": {}}
        use: dict[str, dict[float, Any]] = {"[CLS]": {}, "random": {}}
        for cut in cuts:
            for name, seed in (("[CLS]", None), ("random", 0)):
                table[name][cut] = dominance.per_token(self._mdi(
                    self.described, keep=keep(self.described, cut, seed)), "all", self._late())
            use["[CLS]"][cut] = right(cut, None)
            use["random"][cut] = np.mean([right(cut, s) for s in range(seeds)], 0)
        before = dominance.per_token(full, "all", self._late())

        def change(cut: float, name: str) -> np.ndarray:
            return np.log(table[name][cut][0] / table[name][cut][1]) - np.log(before[0] / before[1])

        logs = change(0.9, "[CLS]")
        known = np.isfinite(logs)
        details = {"MDI": {str(c): {k: float(v[c][0].mean() / v[c][1].mean())
                                    for k, v in table.items()} for c in cuts},
                   "MDI of all tokens": float(before[0].mean() / before[1].mean()),
                   "accuracy": {str(c): {k: float(v[c].mean()) for k, v in use.items()} for c in cuts},
                   "accuracy of all tokens": float(self.right.mean())}
        if known.any():
            drawn = change(0.9, "random")[known]
            self.claim("compression", statistics.mean(logs[known], resamples=2000), null=0.0,
                       direction="below", causal=True, unit="log MDI, 90 % removed", details={
                           **details, "change with random tokens": float(np.nanmean(drawn))},
                       figure="compression", control="all tokens; as many random ones in the details")
        else:
            self.skip("the image is out of sight of the late layers", "compression")
        gap = 0.75
        self.claim("useful", statistics.difference(use["[CLS]"][gap], use["random"][gap],
                                                   resamples=2000), null=0.0, causal=True,
                   unit="accuracy, 75 % removed", control=f"{seeds} random sets of as many tokens",
                   figure="compression", details=details)
        if not self.wants("compression"):
            return
        figure, axes = canvas(1, 2, width=PAGE, height=2.3)
        for name, role in (("[CLS]", "image"), ("random", "control")):
            x = [0.0, *(100 * c for c in cuts)]
            axes[0].plot(x, [before[0].mean() / before[1].mean(), *(
                table[name][c][0].mean() / table[name][c][1].mean() for c in cuts)], "-o",
                color=color(role), label=name)
            axes[1].plot(x, [self.right.mean(), *(use[name][c].mean() for c in cuts)], "-o",
                         color=color(role), label=name)
        axes[0].axhline(1, color=color("control"), linewidth=0.8, linestyle=":")
        axes[0].set(yscale="log", ylabel="MDI in the late layers")
        _plain(axes[0])
        axes[1].set(ylabel="accuracy", ylim=(0, 1.02))
        for ax in axes:
            ax.set_xlabel("visual tokens removed (%)")
            ax.legend(title="kept by")
        figure.suptitle(model.name)
        self.out.figure("compression", figure, of=model.name)

    # -- DyVTE ------------------------------------------------------------------------------------

    def _stages(self) -> None:
        some = [p for p, ok in zip(self.prompts, self.right) if ok][: self.settings.pick(12, tiny=5)]
        answers = [a[0] for a, ok in zip(self.answers, self.right) if ok][: len(some)]
        found = inference_stages.stage_masses(self.model, some)
        self.out.save(f"stages-{self.model.name}", found)
        split = inference_stages.stages(found["mass"].sel(segment="tv").mean("prompt").values)
        if split is None or not split.modeling:
            self.skip("the attention of the text on the image does not fall and rise again with "
                      "depth here, so there are no three stages", "three")
        else:
            marked = [_with_later(p) for p in some]
            loss = {}
            for name in ("fusion", "modeling", "reasoning"):
                layers = getattr(split, name)
                if layers:
                    cut = knockout.measure(
                        self.model, marked, {"image": "image"}, queries="behind the image",
                        answers=answers, width=len(layers),
                        layers=[layers[0] + len(layers) // 2], min_probability=0)
                    loss[name] = (cut["base"] - cut["p"].isel(segment=0, layer=0)).values / len(layers)
            others = np.mean([loss[k] for k in loss if k != "modeling"], 0)
            self.claim("three", statistics.difference(loss["modeling"], others, resamples=2000),
                       null=0.0, direction="below", causal=True, unit="probability per layer",
                       control="the layers before and after", figure="masses", details={
                           "layers": {k: list(getattr(split, k)) for k in loss},
                           "loss per layer": {k: float(v.mean()) for k, v in loss.items()}})
        if self.wants("masses"):
            figure, ax = canvas(1, 1, width=PAGE * 0.6, height=2.3)
            inference_stages.draw(found, ax)
            ax.set_title(self.model.name)
            self.out.figure("masses", figure, of=self.model.name)

    def _exit(self) -> None:
        model, n = self.model, self.model.n_layers
        measured = []
        try:
            for prompt, answer in zip(self.prompts, self.answers):
                places = prompt.positions("image")
                kl = horizon.information(model, prompt, answer[0], groups=[places])["kl"]
                first = horizon.horizon(kl.values, 0.003, kl["layer"].values.tolist())
                measured.append(n if first is None else first)
        except ModelRefused as error:
            self.skip(str(error), "saved", "tells")
            self.no_figure("exit", str(error))
            return
        target = np.array(measured, dtype=float)
        share = np.array([len(p.positions("image")) / len(p) for p in self.prompts])
        self.claim("saved", statistics.mean((n - target) / n * share, resamples=2000), null=0.0,
                   unit="share of the tokens times layers of the prompt", figure="exit", causal=True,
                   control="the output with all tokens (KL up to 0.003 nats)",
                   details={"layer from which the image is not needed": target.tolist()})
        if np.ptp(target) == 0:
            reason = f"the image is done with before layer {target[0]:.0f} in every prompt"
            self.skip(reason, "tells")
            self.no_figure("exit", reason)
            return
        layer = max(1, round(0.5 * n))
        features = inference_stages.text_states(model, self.prompts, layer)
        groups = list(range(len(target)))
        guess = inference_stages.predicted(features, target, groups)
        rng = self.settings.rng(9)
        null = []
        for _ in range(self.settings.pick(10, tiny=3)):
            mixed = rng.permutation(target)
            null.append(inference_stages.explained(
                mixed, inference_stages.predicted(features, mixed, groups)))
        task = np.array([one.task for one in self.asked])
        mean = np.array([target[(task == t) & (np.arange(len(task)) != i)].mean()
                         if (task == t).sum() > 1 else target.mean() for i, t in enumerate(task)])
        self.claim("tells", statistics.bootstrap(
            inference_stages.explained, target, guess, resamples=2000,
            name="R squared of a ridge regression, other pictures"),
            null=max(0.0, float(np.quantile(null, 0.95))), figure="exit",
            control="the same with shuffled targets, 95th percentile", details={
                "entering layer": layer, "R squared of the kind of question alone": float(
                    inference_stages.explained(target, mean)),
                "shuffled": [round(float(x), 3) for x in null]})
        self.out.save(f"exit-{model.name}", Result(xr.Dataset({
            "measured": ("prompt", target), "predicted": ("prompt", guess)})))
        if not self.wants("exit"):
            return
        figure, ax = canvas(1, 1, width=PAGE * 0.5, height=2.6)
        for number, name in enumerate(sorted(set(task))):
            at = task == name
            shift = (number - (len(set(task)) - 1) / 2) * 0.08
            ax.plot(target[at] + shift, guess[at], "osd^vx*"[number % 7], markersize=4, label=name)
        ends = [0.0, float(n)]
        ax.plot(ends, ends, color=color("control"), linewidth=0.8)
        ax.set(xlabel="layer from which the image is not needed", ylabel="as the text predicts it",
               xlim=(min(target) - 0.5, max(target) + 0.5))
        ax.legend(loc="center left", bbox_to_anchor=(1.0, 0.5))
        ax.set_title(model.name)
        self.out.figure("exit", figure, of=model.name)


def _plain(ax: Any) -> None:
    """Numbers on logarithmic axes as they are."""
    for axis in (ax.xaxis, ax.yaxis):
        if axis.get_scale() == "log":
            axis.set_major_formatter("{x:g}")
            axis.set_minor_formatter("{x:g}")


def _with_later(prompt: Prompt) -> Prompt:
    """The prompt with everything behind its image as a segment."""
    first = max(prompt.positions("image")) + 1
    return prompt.with_segments(**{"behind the image": Segment(
        "behind the image", tuple(range(first, len(prompt))), "set")})
