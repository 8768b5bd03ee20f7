"""Attention rollout and flow (arXiv:2005.00928), and what attention is evidence of.

Raw attention, its rollouts and flow against what a prediction depends on (tokens blanked or knocked
out, gradients), each beside uniform attention; agreement of attention with saliency
(arXiv:2509.18010), attention times gradient (arXiv:2601.20279), transformed tokens
(arXiv:2403.14552), and where attention hides its use (arXiv:1909.07913).
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import xarray as xr

import interp
from experiments import _relevance as relevant
from experiments._output import Output
from experiments._paper import Paper, Settings, opened
from experiments._relevance import NAMES, TARGETS, Relevance, Task, top_third
from experiments._relevance_figures import Figures
from interp.core import Claim, ModelRefused, PromptError, Result, statistics
from interp.flow import knockout, saliency
from interp.models.head_gradients import head_gradients
from interp.models.model import Model
from interp.organisms import hidden_use

PAPER = Paper(
    "attention_flow",
    "Quantifying Attention Flow in Transformers",
    ("2005.00928", "2601.20279", "2509.18010", "2403.14552", "1909.07913"),
    "Do rollout and flow of attention say which tokens a prediction depends on, and does attention?",
    figures={
        "maps": "Raw attention, rollout and flow of one prompt, query by key, at several depths.",
        "tokens": "Relevance of every token of one prompt for the prediction, at the last layer, and "
        "what blanking it changes (gray).",
        "correlation": "Spearman correlation of relevance with importance by layer, mean over "
        "prompts with its bootstrap band; the first position and the predicting row left out.",
        "first": "Relevance of the first position by layer; gray: uniform attention rolled out "
        "through the same mask.",
        "agreement": "Spearman correlation of every head's attention with gradient × input, and of "
        "its means over heads and layers.",
        "saliency": "Attention times gradient in the row that predicts, layer by token, for one "
        "prompt.",
        "flags": "Attention on a token against the effect of knocking it out, one dot per token and "
        "layer (the predicting row's edges) and one square per token (all rows and layers). Shaded: "
        "attention understates (orange) or overstates (purple) use.",
    },
    models=("reader", "all-minilm-l6-v2"),
)
FLOW, SALIENCY, HALF, TRANSFORMED, DECEIVE = PAPER.sources
OWN = "measured by this toolkit, after "
LOG = {"paper_number": "released log, BERT's last layer against gradients: raw 0.157, rollout 0.285, "
       "flow 0.279", "paper_tag": "code"}

SENTENCES: dict[str, tuple[str, str]] = {
    "rollout": ("In the upper layers rollout says more than raw attention about which tokens matter: "
                "{task}, {target}.", FLOW),
    "flow": ("In the upper layers flow says more than raw attention about which tokens matter: "
             "{task}, {target}.", FLOW),
    "fades": ("Raw attention says less about which tokens matter in the upper third of the layers "
              "than in the lower: {task}, {target}.", FLOW),
    "null": ("Rollout says more about which tokens matter than uniform attention rolled out through "
             "the same mask: {task}, {target}.", OWN + FLOW),
    "diffuse": ("Rollout spreads over more tokens than flow does: {task}.", FLOW),
    "norms": ("Rollout with the measured share of the residual says more than with one half: {task}, "
              "{target}.", OWN + FLOW),
    "values": ("Rollout of value-weighted attention says more than that of attention: {task}, "
               "{target}.", OWN + FLOW),
    "transformed": ("Rollout of attention weighted by how tokens are transformed says more than "
                    "rollout: {task}, {target}.", TRANSFORMED),
    "gradient": ("Attention times gradient says more than attention about which tokens matter: "
                 "{task}, {target}.", OWN + SALIENCY),
    "aligned": ("Attention of the predicting row agrees with the saliency of its own prompt more "
                "than with that of another: {task}.", HALF),
    "aggregate": ("The mean over all heads and layers agrees with saliency more than the best single "
                  "head, chosen on other prompts: {task}.", HALF),
    "half": ("Attention explains a part of what blanking a token changes, and not all: {task}.", HALF),
    "mixing": ("Attention agrees more with the saliency of what enters its own layer than with that "
               "of the input: {task}.", HALF),
    "direct": ("Some tokens get less than 1 % of a layer's attention, and knocking them out there "
               "causes a change of more than 5 %: {task}.", OWN + DECEIVE),
    "indirect": ("Some tokens get less than 1 % of the attention of the predicting row in all "
                 "layers, and knocking them out causes a change of more than 5 %: {task}.",
                 OWN + DECEIVE),
    "sink": ("Some tokens get more than 30 % of a layer's attention, move next to nothing, and are "
             "not missed: {task}.", OWN + DECEIVE),
}
MASK = "Even uniform attention rolls out to the first position under a causal mask."
RELEASED = "Attention times gradient is zero in the row that the released code reads."
LABELED = "Hallucinated tokens show low saliency of the output before them."
SENTIMENT = "On sentiment neither rollout nor flow says more than raw attention."
TRAINED = "Accuracy stays as it was when attention is trained away from the tokens that are used."
DECEIVES = "An answer can depend on a token that gets less than 1 % of the attention (written model)."
TWIN = "The same attention without use, and use with open attention, raise no flag (twins)."
CAUSAL = ("direct", "indirect", "sink")
BOTH = ("blank", "knockout")


def run(settings: Settings, out: Output) -> None:
    def absent(name: str, reason: str) -> None:
        for figure in PAPER.figures:
            out.no_figure(figure, reason, of=name)
        out.claim(Claim.untestable(SENTIMENT, FLOW, reason), name)

    for model in opened(PAPER, settings, absent):
        _general(model, settings, out)
        for number, task in enumerate(relevant.tasks(model, settings)):
            out.record(model, [item.prompt for item in task.items], f"{task.name}-{model.name}")
            _One(model, task, settings, out).run(examples=number == 0)
    _planted(settings, out)


def _general(model: Model, settings: Settings, out: Output) -> None:
    """What does not depend on a task."""
    out.claim(Claim.untestable(
        SENTIMENT, FLOW, f"{model.name} has no head that tells sentiment, and no labeled reviews come "
        "with this package", paper_number="released log, SST: 0.03 to 0.17 for all three",
        paper_tag="code"), model.name)
    out.claim(Claim.untestable(
        LABELED, SALIENCY, f"the prompts of {model.name} carry no labels of hallucinated objects; "
        "the experiment 'hallucination' asks this of descriptions of pictures"), model.name)
    out.claim(Claim.untestable(
        TRAINED, DECEIVE, f"{model.name} was not trained with a penalty on attention",
        paper_number="BERT, occupations: attention 7e-5, accuracy 97 %", paper_tag="code"), model.name)
    if model.kind == "encoder":
        out.claim(Claim.untestable(RELEASED, SALIENCY, f"in {model.name} earlier tokens see later "
                                   "ones, so the row matters"), model.name)
        return
    texts = [interp.Prompt(tuple(int(t) for t in settings.rng(5, i).integers(
        3, model.d_vocab - 1, 9))) for i in range(5)]
    ratio = []
    for prompt in texts:
        token = prompt.ids[-1]
        slope = head_gradients(model, prompt, lambda x, t=token: -x[-2].log_softmax(-1)[t])
        sizes = slope.z.abs().amax((0, 2, 3))
        ratio.append(float(sizes[-1] / sizes[-2].clamp_min(1e-30)))
    out.claim(Claim(
        RELEASED, SALIENCY, **statistics.mean(ratio).for_claim(), null=0.0, direction="equal",
        tolerance=1e-6, unit="largest gradient in the candidate's own row over that in the row that "
        "predicts it"), model.name)


class _One:
    """One model, one task."""

    def __init__(self, model: Model, task: Task, settings: Settings, out: Output) -> None:
        self.model, self.task, self.settings, self.out = model, task, settings, out
        self.of = f"{model.name}-{task.name}"
        self.resamples = settings.pick(2000, tiny=500)

    def sentence(self, key: str, target: str = "") -> tuple[str, str]:
        text, source = SENTENCES[key]
        return text.format(task=self.task.name, target=TARGETS.get(target, target)), source

    def skip(self, reason: str, key: str, target: str = "", **more: Any) -> None:
        self.out.claim(Claim.untestable(*self.sentence(key, target), reason, **more), self.model.name)

    def claim(self, key: str, values: Any, target: str = "", **more: Any) -> None:
        """A claim on the mean over prompts, NaN left out."""
        known = np.asarray(values, dtype=float)
        known = known[np.isfinite(known)]
        number = {k: more.pop(k) for k in ("paper_number", "paper_tag") if k in more}
        if not len(known):
            self.skip("importance is the same for every token, or unknown", key, target, **number)
            return
        estimate = statistics.mean(known, resamples=self.resamples)
        details = {"task": self.task.what, **more.pop("details", {})}
        self.out.claim(Claim(*self.sentence(key, target), **{
            **estimate.for_claim(), "null": 0.0, **number, **more, "details": details,
            "causal": key in CAUSAL}), self.model.name)

    def run(self, examples: bool = True) -> None:
        """All of it; with `examples` also the figures of single prompts."""
        one = relevant.relevance(self.model, self.task)
        figures = Figures(self.model, self.task, self.out)
        if examples:
            figures.maps()
            figures.first(one)
        self._mask(one)
        if self.task.unfit:
            self._give_up(examples)
            return
        # Kept for all targets: the curves, and every claim.
        rho = {(kind, target): one.rho(kind, target) for kind in one.rows for target in TARGETS}
        self._save(one, rho)
        figures.correlation(rho)
        if examples:
            figures.tokens(one)
            figures.saliency(one)
        self._compare(one, rho)
        heads, means = self._agreement(one)
        figures.agreement(heads, means)
        self._flags(one, figures)

    def _give_up(self, examples: bool) -> None:
        """No claim on what an answer depends on that the model does not give."""
        for figure in ("correlation", "agreement", "flags", *(("tokens", "saliency") * examples)):
            self.out.no_figure(figure, self.task.unfit, of=self.of)
        for key, (text, _) in SENTENCES.items():
            several = TARGETS if key in ("rollout", "flow") else BOTH
            for target in several if "{target}" in text else ("",):
                self.skip(self.task.unfit, key, target)

    def _save(self, one: Relevance, rho: dict[tuple[str, str], np.ndarray]) -> None:
        data = xr.Dataset(
            {"correlation": (("relevance", "target", "prompt", "layer"), np.stack(
                [np.stack([rho[kind, target] for target in TARGETS]) for kind in one.rows]))},
            {"relevance": list(one.rows), "target": list(TARGETS),
             "layer": np.arange(self.model.n_layers)})
        self.out.save(self.of, Result(data, {
            **self.model.manifest(), "task": self.task.what, "refused": one.refused,
            "reliability": [saliency.reliability(a, b, k)
                            for (a, b), k in zip(one.halves, one.keep)]}))

    # -- rollout and flow ----------------------------------------------------------------------

    def _compare(self, one: Relevance, rho: dict[tuple[str, str], np.ndarray]) -> None:
        third = max(1, round(self.model.n_layers / 3))
        for target in TARGETS:
            top = {kind: top_third(rho[kind, target]) for kind in one.rows}
            details = {NAMES[k]: _mean(v) for k, v in top.items()}
            more = {"figure": "correlation", "unit": "Spearman correlation", "details": details}
            number = LOG if target == "gradient" else {}
            for key in ("rollout", "flow"):
                self.claim(key, top[key] - top["raw"], target, control="raw attention, same prompts",
                           **number, **more)
            if target not in BOTH:
                continue
            self.claim("null", top["rollout"] - top["uniform"], target,
                       control="uniform attention over the same visible keys", **more)
            if self.model.n_layers < 3:
                self.skip(f"{self.model.name} has {self.model.n_layers} layers; thirds need three",
                          "fades", target)
            else:
                raw = rho["raw", target]
                self.claim("fades", raw[:, -third:].mean(1) - raw[:, :third].mean(1), target,
                           direction="below", **more)
            for key, base in (("norms", "rollout"), ("values", "norms"),
                              ("transformed", "rollout")):
                if key in one.refused:
                    self.skip(one.refused[key].rstrip("."), key, target)
                else:
                    self.claim(key, top[key] - top[base], target, control=NAMES[base], **more)
        spread = [relevant.entropy(one.rows[kind], one.keep) for kind in ("rollout", "flow")]
        self.claim("diffuse", spread[0] - spread[1], unit="nats, last layer", figure="tokens",
                   details={"rollout": _mean(spread[0]), "flow": _mean(spread[1])})

    def _mask(self, one: Relevance) -> None:
        if self.model.kind == "encoder":
            reason = f"{self.model.name} is an encoder: every token sees every other"
            self.out.claim(Claim.untestable(MASK, FLOW, reason), self.model.name)
        elif self.task.name in ("needle", "guess", "agreement"):
            last = one.rows["uniform"][:, -1, 0]
            sizes = np.array([len(keep) for keep in one.keep])
            self.out.claim(Claim(
                MASK, FLOW, **statistics.mean(last * sizes, resamples=self.resamples).for_claim(),
                null=1.0, unit="relevance over an equal share", figure="first", details={
                    "share of the first position": float(last.mean()), "rollout of attention": float(
                        np.nanmean(one.rows["rollout"][:, -1, 0]))}), self.model.name)

    # -- agreement with saliency ------------------------------------------------------------------

    def _agreement(self, one: Relevance) -> tuple[np.ndarray, dict[str, np.ndarray]]:
        """Correlation of heads `[prompt, layer, head]` and of means with gradient x input."""
        attention, product = one.reads["attention"].values, one.reads["product"].values
        target, blank = one.importance["gradient_input"], one.importance["blank"]
        each = range(len(self.task))

        def rho(rows: np.ndarray, of: Sequence[np.ndarray], method: Any = "spearman") -> np.ndarray:
            return np.stack([saliency.correlations(
                rows[i][..., : len(one.keep[i])], of[i], one.keep[i], method) for i in each])

        heads, layers = rho(attention, target), rho(attention.mean(2), target)
        every = attention.mean((1, 2))
        whole = rho(every, target)
        for name in BOTH:
            weighted = rho(product.mean((1, 2)), one.importance[name])
            plain = rho(every, one.importance[name])
            self.claim("gradient", weighted - plain, name, figure="saliency",
                       unit="Spearman correlation", control="attention, mean over heads and layers",
                       details={"attention times gradient": _mean(weighted), "attention": _mean(plain)})
        # Another prompt's saliency, moved along so that the ends of both lie over each other.
        other = [_shifted(target[(i + 1) % len(each)], len(target[i])) for i in each]
        self.claim("aligned", whole - rho(every, other), figure="agreement",
                   unit="Spearman correlation", control="saliency of the next prompt, aligned at the "
                   "end", details={"own": _mean(whole), "Pearson": _mean(rho(every, target, "pearson")),
                                   "other": _mean(rho(every, other))})
        best = self._best(heads)
        self.claim("aggregate", whole - best, figure="agreement", unit="Spearman correlation",
                   control="best head on the other half of the prompts",
                   details={"all heads": _mean(whole), "best head": _mean(best)})
        self._half(one, rho(every, blank))
        self._mixing(one, attention.mean(2))
        return heads, {"layers": layers, "all": whole, "best head": best}

    def _best(self, heads: np.ndarray) -> np.ndarray:
        """The best head of the other half of the prompts, `[prompt]`."""
        flat = np.nan_to_num(heads.reshape(len(heads), -1))
        found = np.full(len(flat), np.nan)
        for half in (0, 1):
            if len(flat) > 1:
                found[half::2] = flat[half::2, int(flat[1 - half :: 2].mean(0).argmax())]
        return np.where(np.isfinite(heads).all((1, 2)), found, np.nan)

    def _half(self, one: Relevance, blank: np.ndarray) -> None:
        reliable = np.array([saliency.reliability(a, b, k) for (a, b), k in zip(one.halves, one.keep)])
        share = [saliency.explained(r, q) for r, q in zip(blank, reliable)]
        self.claim("half", share, null=1.0, direction="below", unit="correlation over the largest "
                   "that the map's reliability allows", control="split halves of the replacing "
                   "tokens", paper_number="about 50 % of the relevance of the input",
                   paper_tag="secondary", details={
                       "correlation": _mean(blank), "reliability": _mean(reliable),
                       "prompts without a reliable map": int((~np.isfinite(share)).sum())})

    def _mixing(self, one: Relevance, attention: np.ndarray) -> None:
        chosen = [x for x in relevant.some_layers(self.model.n_layers) if x > 0]
        if not chosen:
            self.skip(f"{self.model.name} has one layer: its input is the input", "mixing")
            return
        gaps, own = [], []
        for i, item in enumerate(self.task.items[: self.settings.pick(10, tiny=5)]):
            keep, rows = one.keep[i], attention[i][:, : len(one.keep[i])]
            pairs = [[saliency.correlations(rows[layer], target, keep) for target in (
                saliency.gradients(self.model, item, layer=layer), one.importance["gradient_input"][i])]
                for layer in chosen]
            gaps.append(float(np.mean([a - b for a, b in pairs])))
            own.append(float(np.mean([a for a, _ in pairs])))
        self.claim("mixing", gaps, unit="Spearman correlation", control="saliency of the input",
                   paper_number="52 to 75 % against about 50 %", paper_tag="secondary",
                   details={"own layer": _mean(own), "layers": chosen})

    # -- red flags ------------------------------------------------------------------------------

    def _flags(self, one: Relevance, figures: Figures) -> None:
        reason = self._unfit_for_flags()
        points = None
        if not reason:
            try:
                points = relevant.flag_points(self.model, self.task, one)
            except (ModelRefused, PromptError) as error:
                reason = str(error).rstrip(".")
        if points is not None and not np.isfinite(points["effect"]).any():
            reason = "no answer has a probability of 5 % or more, so that no change can be measured"
        if points is None or reason:
            for key in CAUSAL:
                self.skip(reason, key)
            self.out.no_figure("flags", reason, of=self.of)
            return
        direct = saliency.red_flags(points["mass"], points["effect"], points["share"])
        through = saliency.red_flags(points["mean"], points["whole"])
        control = "the same row uncut; attention of the same edges"
        under = (direct == "understates").sum((1, 2))
        self.claim("direct", (under > 0).astype(float), figure="flags", unit="share of prompts",
                   control=control, details={
                       "flagged": int(under.sum()), "points": int(np.isfinite(points["effect"]).sum()),
                       "still, by the head that looks most": int((saliency.red_flags(
                           points["most"], points["effect"]) == "understates").sum())})
        hidden = (through == "understates").sum(1)
        self.claim("indirect", (hidden > 0).astype(float), figure="flags", unit="share of prompts",
                   control=control, details={"flagged": int(hidden.sum()),
                                             "tokens": int(np.isfinite(points["whole"]).sum())})
        if "values" in one.refused:
            self.skip(one.refused["values"].rstrip("."), "sink")
            figures.flags(points)
            return
        over = (direct == "overstates").sum((1, 2))
        self.claim("sink", (over > 0).astype(float), figure="flags", unit="share of prompts",
                   control=control, details={"flagged": int(over.sum())})
        figures.flags(points)

    def _unfit_for_flags(self) -> str:
        if self.model.kind == "encoder" or self.task.name == "similarity":
            return f"{self.model.name} is an encoder: no single row predicts"
        return ""


def _planted(settings: Settings, out: Output) -> None:
    """A written model whose attention hides its use, and two twins in which it does not."""
    flags: dict[str, list[str]] = {}
    effects: list[float] = []
    cases = hidden_use.cases(settings.pick(10, tiny=5), settings.seed)
    for kind in hidden_use.KINDS:
        model = Model(hidden_use.build(kind), f"hidden-use ({kind})")
        out.record(model)
        prompts = [prompt for prompt, *_ in cases]
        cut = knockout.measure(model, prompts, "secret", answers=[a for _, a, _ in cases], width=1,
                               min_probability=0.0)
        effect = -cut["relative"].values[:, 0, -1] / 100
        items = [saliency.Contrast(prompt, (a, b)) for prompt, a, b in cases]
        seen = saliency.measure(model, items)["attention"].values[:, -1].mean(1)
        mass = np.array([row[p.positions("secret")[0]] for row, p in zip(seen, prompts)])
        flags[kind] = saliency.red_flags(mass, effect).tolist()
        if kind == "hidden":
            effects, hidden = effect.tolist(), float(mass.mean())
    out.claim(Claim(
        DECEIVES, DECEIVE, **statistics.mean(effects).for_claim(), null=saliency.UNDERSTATED_EFFECT,
        causal=True, control="the same edges uncut, and the twins below", unit="fall of the answer's "
        "probability", paper_number="BERT, occupations: attention 7e-5, accuracy 97 %",
        paper_tag="code", details={"attention on the secret": hidden, "flags": flags["hidden"]}),
        "hidden-use")
    wrong = [float(bool(a) or bool(b)) for a, b in zip(flags["open"], flags["unused"])]
    out.claim(Claim(
        TWIN, OWN + DECEIVE, **statistics.mean(wrong).for_claim(), null=0.0, direction="equal",
        unit="share of prompts flagged", details={
            "flagged in the model that hides": float(np.mean([bool(f) for f in flags["hidden"]]))}),
        "hidden-use")


def _shifted(values: np.ndarray, length: int) -> np.ndarray:
    """The last `length` values, after NaN where there are fewer."""
    found = np.full(length, np.nan)
    size = min(length, len(values))
    found[length - size :] = values[len(values) - size :]
    return found


def _mean(values: Any) -> float:
    known = np.asarray(values, dtype=float)
    known = known[np.isfinite(known)]
    return float(known.mean()) if len(known) else float("nan")
