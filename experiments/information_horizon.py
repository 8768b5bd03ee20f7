"""Information horizon (arXiv:2512.07580): the depth past which no image token matters any more.

Every window of image tokens is left alone, all others dropped, at every depth. On `looker` for six
tasks, from colors to reading digits; on any vision-language model with a processor. Which pruning
criterion beats random where is asked in `token_pruning`.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd
import xarray as xr

from experiments import _horizon_figures as figures
from experiments import _picture_questions as questions
from experiments._decisive_questions import TASKS, Decisive, ask, guessing
from experiments._isolation_cost import cost_of_map
from experiments._output import Output
from experiments._paper import Paper, Settings
from interp.causal.removal import Removal, mean_states
from interp.core import Claim, ModelRefused, Prompt, PromptError, Result, statistics
from interp.flow import horizon
from interp.models.model import Model
from interp.organisms import plant_horizon

PAPER = Paper(
    "information_horizon",
    "When Token Pruning is Worse than Random: Understanding Visual Token Information in VLLMs",
    ("2512.07580",),
    "From which depth on does no image token matter for the answer, and does that depend on the "
    "task?",
    figures={
        "map": "What each 2 x 2 window of image tokens tells alone, I = p(window only) - p(no image "
        "token), by layer, for one color question and one reading question; at right on the picture.",
        "spread": "Mean, standard deviation and largest |I| over windows against the layer "
        "(gray: dropped tokens replaced by their mean state instead), with the horizons.",
        "withdrawal": "Score and divergence from the full output when all image tokens are withdrawn "
        "before a layer, one line per task.",
        "pruning": "Score against the pruning layer with a quarter of the image tokens kept: by what "
        "their window tells alone about the label, about the model's own answer, about a shuffled "
        "label, and random ones (mean and s.d. of 10 draws).",
        "horizons": "The three horizons of every task with bootstrap intervals over prompts; at the "
        "right edge: none before the last block.",
        "cost": "Cost of one full isolation map against a loop of whole passes over its cells.",
    },
    models=("looker",),
)
SOURCE = PAPER.sources[0]
EPSILON, ETA = 0.01, 0.003
KEEP, DRAWS = 0.25, 10
MOST_LAYERS = 16
"""Deeper models are measured at so many layers, evenly spaced."""

SENTENCES = {
    "falls": "The spread of information over image tokens falls with depth (Spearman below -0.5).",
    "vanishes": "In the last quarter of the layers the spread of information is below a tenth of its "
    "largest.",
    "info_ends": "Most prompts have a depth before the last block past which no group of image tokens "
    "tells the answer (H_info, 0.01 in probability).",
    "out_ends": "Most prompts have a depth before the last block past which withdrawing all image "
    "tokens leaves the output as it is (H_out, 0.003 nats).",
    "task": "Reading numbers has a deeper horizon than naming colors (H_info).",
    "task_out": "Reading numbers has a deeper horizon than naming colors (H_out).",
    "stronger": "Models that answer better have a deeper horizon, relative to their depth.",
    "harm": "Dropping the three quarters of the image tokens that tell least causes more right "
    "answers (the label chooses the tokens).",
    "harm_free": "Dropping the three quarters of the image tokens that tell least about the model's "
    "own answer causes more right answers (no label is used).",
    "exact": "The isolation map equals the loop of whole passes over its cells to 1e-5.",
    "cost_here": "A full isolation map of this model's own prompt costs less than a twentieth of the "
    "loop over its cells.",
    "cost": "A full isolation map of a prompt of LLaVA-1.5's shape costs less than a twentieth of the "
    "loop over its cells (random weights).",
}
NUMBERS = {
    "info_ends": ("about layer 16 on MME and 24 on TextVQA of 32 in LLaVA-1.5", "secondary"),
    "task": ("Qwen2.5-VL: about layer 20 on knowledge and hallucination, 27 on OCR", "secondary"),
    "harm": ("lowest 75 % dropped at layer 10: MME +27.8 %, TextVQA +6.1 %", "secondary"),
}
ANSWERING = ("falls", "vanishes", "info_ends", "out_ends", "task", "task_out", "harm", "harm_free")
PER_MODEL = tuple(key for key in SENTENCES if key not in ("stronger", "cost"))


def run(settings: Settings, out: Output) -> None:
    depths: list[tuple[float, float]] = []

    def give_up(name: str, reason: str) -> None:
        _give_up(name, reason, out)

    for model in questions.subjects(PAPER, settings, out, give_up, questions.NO_HEADS):
        try:
            depths += _One(model, settings, out).run()
        except (PromptError, ModelRefused) as error:
            out.record(model)
            _give_up(model.name, str(error), out)
    _cost_of_llava(settings, out)
    if len(depths) < 3:
        out.claim(Claim.untestable(
            SENTENCES["stronger"], SOURCE, f"this run has {len(depths)} model(s) that answer from the "
            "picture; a comparison takes at least 3 (give --model several times)"))
        return
    out.claim(Claim(SENTENCES["stronger"], SOURCE, null=0.0, figure="horizons",
                    **statistics.correlation(*np.array(depths).T).for_claim()))


def _number(key: str) -> dict[str, str]:
    number, tag = NUMBERS.get(key, ("", ""))
    return {"paper_number": number, "paper_tag": tag} if number else {}


def _give_up(name: str, reason: str, out: Output) -> None:
    for figure in PAPER.figures:
        if figure != "cost":
            out.no_figure(figure, reason, of=name)
    for key in PER_MODEL:
        out.claim(Claim.untestable(SENTENCES[key], SOURCE, reason, **_number(key)), name)


class _One:
    """Everything about one model."""

    def __init__(self, model: Model, settings: Settings, out: Output) -> None:
        self.model, self.settings, self.out = model, settings, out
        self.count = settings.pick(16, tiny=5)
        step = -(-(model.n_layers - 1) // MOST_LAYERS)
        self.layers = list(range(1, model.n_layers, max(1, step)))
        self.skipped: dict[str, str] = {}

    def claim(self, key: str, estimate: Any, **more: Any) -> None:
        self.out.claim(Claim(SENTENCES[key], SOURCE, **{
            **estimate.for_claim(), **_number(key), **more}), self.model.name)

    def skip(self, reason: str, *keys: str) -> None:
        for key in keys:
            self.out.claim(
                Claim.untestable(SENTENCES[key], SOURCE, reason, **_number(key)), self.model.name)

    def run(self) -> list[tuple[float, float]]:
        if len(self.layers) < 2:
            raise PromptError(f"{self.model.name} has {self.model.n_layers} blocks; a horizon takes "
                              "at least 3")
        cases: list[Decisive] = []
        for number, task in enumerate(TASKS):
            try:
                cases += ask(self.model, task, self.count, self.settings.rng(number))
            except PromptError as error:
                self.skipped[task] = str(error)
        if not cases:
            raise PromptError(next(iter(self.skipped.values())))
        self.out.record(self.model, [case.prompt for case in cases], f"questions-{self.model.name}")
        found = [horizon.information(
            self.model, case.prompt, case.token, groups=self._windows(case.prompt),
            layers=self.layers, against=case.against) for case in cases]
        data = self._gather(cases, found)
        self._controls(cases, found, data)
        self.out.save(f"information-{self.model.name}", data)
        pruned = self._pruned(cases)
        self._draw(cases, found, data, pruned)
        self._cost(cases[0])
        reason = _guessing(self.model.name, data.data)
        if reason:
            self.skip(reason, *ANSWERING)
            return []
        self._depth(data)
        self._ends(data)
        self._tasks(data)
        self._harm(pruned)
        mean = float(self._each(data, "largest", EPSILON).mean())
        return [(float(data["right"].mean()), mean / self.model.n_layers)]

    # -- measuring ----------------------------------------------------------------------------

    def _windows(self, prompt: Prompt) -> list[tuple[int, ...]]:
        return [group for image in prompt.of_kind("image")
                for group in horizon.windows(prompt, image.name)]

    def _gather(self, cases: Sequence[Decisive], found: Sequence[Result]) -> Result:
        """What all prompts have in common, `[prompt, layer]`: grids may differ."""
        def over_groups(of: Any) -> tuple[tuple[str, str], np.ndarray]:
            return ("prompt", "layer"), np.stack([of(one["information"].values) for one in found])

        def of_layers(of: Any) -> tuple[tuple[str, str], np.ndarray]:
            return ("prompt", "layer"), np.stack([of(one) for one in found])

        tokens = np.array([case.token for case in cases])
        right = np.array([int(one["full_top"]) for one in found]) == tokens
        moved = of_layers(lambda one: np.abs(
            (one["difference_alone"] - one["difference_none"]).values).max(1))
        data = xr.Dataset({
            "mean": over_groups(lambda x: x.mean(1)), "sd": over_groups(lambda x: x.std(1)),
            "largest": over_groups(lambda x: np.abs(x).max(1)), "largest_logit": moved,
            "kl": of_layers(lambda one: one["kl"].values),
            "score": of_layers(lambda one: one["top"].values == int(one.manifest["answer"])),
            "right": ("prompt", right), "token": ("prompt", tokens),
            "full": ("prompt", [float(one["full"]) for one in found]),
        }, {"layer": self.layers, "task": ("prompt", [case.task for case in cases])})
        data["score"] = data["score"].astype(float)
        data["right"] = data["right"].astype(float)
        return Result(data, {
            **self.model.manifest(), "removal": "drop_keep_ids", "epsilon": EPSILON, "eta": ETA,
            "n_layers": self.model.n_layers, "left out": self.skipped,
            "image_attention": found[0].manifest["image_attention"]})

    def _controls(self, cases: Sequence[Decisive], found: Sequence[Result], data: Result) -> None:
        """On two prompts per task: leave-one-out, and replaced in place of dropped tokens."""
        some = [i for task in TASKS for i in [
            n for n, case in enumerate(cases) if case.task == task][: self.settings.pick(2, tiny=1)]]
        early = [layer for layer in self.layers if layer <= 2]
        states = mean_states(self.model, [cases[i].prompt for i in some])
        rows, self.replaced = [], np.full((len(some), len(self.layers)), np.nan)
        for n, i in enumerate(some):
            case, groups = cases[i], self._windows(cases[i].prompt)
            lost = horizon.leave_one_out(self.model, case.prompt, case.token, groups=groups,
                                         layers=self.layers)
            swapped = horizon.information(
                self.model, case.prompt, case.token, groups=groups, layers=early,
                removal="replace_mean", states=states, against=case.against)
            own = found[i]["information"]
            left = horizon.agreement(own, lost["lost"])
            shock = horizon.agreement(own.sel(layer=early), swapped["information"])
            self.replaced[n, : len(early)] = np.abs(swapped["information"].values).max(1)
            rows += [{"prompt": i, "task": case.task, "layer": layer, "leave_one_out": left[k],
                      "replaced": shock[k] if k < len(early) else np.nan}
                     for k, layer in enumerate(self.layers)]
        table = pd.DataFrame(rows)
        self.out.table(f"agreement-{self.model.name}", table)
        self.agreement = {
            f"rank correlation with {name}": {
                int(layer): float(value) for layer, value in
                table.groupby("layer")[column].mean().dropna().items()}
            for name, column in (("leave-one-out", "leave_one_out"),
                                 ("replaced tokens", "replaced"))}

    def _pruned(self, cases: Sequence[Decisive]) -> xr.DataArray:
        """Right answers with a quarter of the image tokens, chosen four ways, `[prompt, ...]`."""
        chosen = [case for task in TASKS for case in [
            c for c in cases if c.task == task][: self.settings.pick(6, tiny=2)]]
        names = ["label", "own answer", "shuffled label", *[f"random {i}" for i in range(DRAWS)]]
        self.pruning_layer = min(self.layers, key=lambda x: abs(x - 10 * self.model.n_layers / 32))
        layers = self.settings.pick(self.layers, tiny=[self.pruning_layer])
        right = np.zeros((len(chosen), len(layers), len(names)))
        full = np.zeros(len(chosen))
        rng = self.settings.rng(99)
        for number, case in enumerate(chosen):
            groups, removal = self._windows(case.prompt), Removal(self.model, case.prompt)
            own = int(removal.base.logits[-1].argmax())
            wrong = int(rng.choice(case.against))
            keep = max(1, round(KEEP * len(removal.places)))
            drawn = [rng.choice(removal.places, keep, replace=False).tolist() for _ in range(DRAWS)]
            full[number] = own == case.token
            for at, layer in enumerate(layers):
                p = removal.logits(layer, groups).softmax(-1)
                kept = [[t for g in p[:, y].argsort(descending=True).tolist() for t in groups[g]][:keep]
                        for y in (case.token, own, wrong)]
                tops = removal.logits(layer, [*kept, *drawn]).argmax(-1)
                right[number, at] = (tops == case.token).numpy()
        return xr.DataArray(right, {"layer": layers, "chosen": names, "full": ("prompt", full)},
                            ("prompt", "layer", "chosen"))

    def _draw(
        self, cases: Sequence[Decisive], found: Sequence[Result], data: Result,
        pruned: xr.DataArray,
    ) -> None:
        name, end = self.model.name, self.model.n_layers
        first = {case.task: i for i, case in reversed(list(enumerate(cases)))}
        shown = [first[task] for task in ("color", "read") if task in first] or [0]
        replaced = xr.DataArray(self.replaced, {"layer": self.layers}, ("prompt", "layer"))
        ends = {"H_info": horizon.horizon(data["largest"].values.mean(0), EPSILON, self.layers),
                "H_out": horizon.horizon(data["kl"].values.mean(0), ETA, self.layers)}
        rows = []
        for task in figures.tasks_of(data):
            one = figures.of_task(data, task)
            for which, estimate in (
                ("H_info", horizon.horizon_of_task(one["largest"].values, EPSILON, self.layers, end)),
                ("H_out", horizon.horizon_of_task(one["kl"].values, ETA, self.layers, end)),
                ("H_task", horizon.horizon_of_score(one["score"].values, one["right"].values,
                                                    self.layers, end)),
            ):
                low, high = estimate.interval
                rows.append({"task": task, "horizon": which, "layer": estimate.value, "low": low,
                             "high": high, "n": estimate.n, "accuracy": float(one["right"].mean())})
        table = pd.DataFrame(rows)
        self.out.table(f"horizons-{name}", table)
        kept = f"{100 * KEEP:.0f} % kept, n = {pruned.sizes['prompt']}"
        for which, make in {
            "map": lambda: figures.maps(
                [cases[i] for i in shown], [found[i] for i in shown],
                [self.model.tokenizer.decode([cases[i].token]) for i in shown]),
            "spread": lambda: figures.spread(data, replaced, ends),
            "withdrawal": lambda: figures.withdrawal(data, ETA),
            "pruning": lambda: figures.pruning(pruned, data, kept),
            "horizons": lambda: figures.horizons(table, end),
        }.items():
            if self.out.wants(which):
                figure = make()
                figure.suptitle(name)
                self.out.figure(which, figure, of=name)

    # -- claims -------------------------------------------------------------------------------

    def _each(self, data: Any, key: str, tolerance: float) -> np.ndarray:
        return horizon.each_horizon(data[key].values, tolerance, self.layers, self.model.n_layers)

    def _depth(self, data: Result) -> None:
        if len(self.layers) < 4:
            self.skip(f"{self.model.name} has {self.model.n_layers} blocks; a trend over depth takes "
                      "at least 4 measured layers", "falls", "vanishes")
            return
        depth = np.arange(len(self.layers), dtype=float)
        late = np.array(self.layers) >= 0.75 * self.model.n_layers

        def falling(sd: np.ndarray) -> float:
            return float(horizon.agreement(depth[None], sd.mean(0)[None])[0])

        def left(sd: np.ndarray) -> float:
            curve = sd.mean(0)
            return float(curve[late].mean() / curve.max()) if curve.max() > 0 else float("nan")

        sd = data["sd"].values
        self.claim("falls", statistics.bootstrap(
            falling, sd, resamples=1000, name="Spearman of the layer and the s.d. over windows"),
            null=-0.5, direction="below", figure="spread", details=self.agreement)
        self.claim("vanishes", statistics.bootstrap(
            left, sd, resamples=1000, name="s.d. in the last quarter over the largest"), null=0.1,
            direction="below", figure="spread")

    def _ends(self, data: Result) -> None:
        each = {key: self._each(data, *given) for key, given in (
            ("info_ends", ("largest", EPSILON)), ("out_ends", ("kl", ETA)))}
        gap = statistics.difference(each["out_ends"], each["info_ends"], resamples=1000)
        end = self.model.n_layers
        for key, values in each.items():
            self.claim(key, statistics.rate(int((values < end - 1).sum()), len(values)), null=0.5,
                       figure="spread", unit="share of prompts", details={
                           "mean horizon": float(values.mean()), "H_out - H_info": str(gap),
                           "prompts without one": int((values == end).sum())})

    def _tasks(self, data: Result) -> None:
        pair = {task: figures.of_task(data, task) for task in ("read", "color")}
        for task, one in pair.items():
            missing = self.skipped.get(task) or _guessing(f"{self.model.name} ({task})", one)
            if missing:
                self.skip(missing, "task", "task_out")
                return
        reads = np.repeat([1.0, 0.0], [one.sizes["prompt"] for one in pair.values()])

        def gap(values: np.ndarray, reads: np.ndarray) -> float:
            if not 0 < reads.sum() < len(reads):
                return float("nan")
            return float(values[reads == 1].mean() - values[reads == 0].mean())

        for key, name, tolerance in (("task", "largest", EPSILON), ("task_out", "kl", ETA)):
            each = {task: self._each(one, name, tolerance) for task, one in pair.items()}
            self.claim(key, statistics.bootstrap(
                gap, np.concatenate(list(each.values())), reads, resamples=2000,
                name="mean horizon of reading minus that of color"), null=0.0, unit="layers",
                figure="horizons",
                details={task: float(values.mean()) for task, values in each.items()})

    def _harm(self, pruned: xr.DataArray) -> None:
        at, full = pruned.sel(layer=self.pruning_layer), pruned["full"].values
        if full.all():
            self.skip(f"{self.model.name} answers all {len(full)} questions right with the whole "
                      "image: fewer tokens cannot help", "harm", "harm_free")
            return
        mean = {"whole image": float(full.mean()),
                "random": float(at[:, 3:].mean()),
                **{name: float(at.sel(chosen=name).mean()) for name in (
                    "label", "own answer", "shuffled label")}}
        for key, name in (("harm", "label"), ("harm_free", "own answer")):
            gain = statistics.difference(at.sel(chosen=name).values, full, resamples=2000)
            self.claim(key, gain, null=0.0, unit="share of right answers", figure="pruning", causal=True,
                       control="the model's own answer and a shuffled label in place of the label, "
                       "and random tokens (10 draws) of the same number",
                       details={"layer": self.pruning_layer, **mean,
                                "uses the label": key == "harm"})

    def _cost(self, case: Decisive) -> None:
        row = cost_of_map(self.model, case.prompt, case.token, self._windows(case.prompt),
                           self.layers, self.settings)
        self.out.table(f"cost-{self.model.name}", pd.DataFrame([row]))
        self.claim("exact", _sure(row["difference"], "largest difference of probabilities"),
                   null=1e-5, direction="below", n=row["cells run"], details=row)
        self.claim("cost_here", _sure(row["ratio"], "passes of the loop over passes of the map"),
                   null=20.0, details=row)


def _cost_of_llava(settings: Settings, out: Output) -> None:
    """LLaVA-1.5's shape of a prompt: 35 tokens, 24 x 24 of the picture, 60 tokens."""
    rng = settings.rng(7)
    hf = plant_horizon.tiny_llava(rng, n_layers=6, side=24, vocabulary=97)
    prompt = plant_horizon.picture_prompt(hf, rng, 35, 60)
    row = cost_of_map(Model(hf, "random LLaVA"), prompt, 7, horizon.windows(prompt),
                      list(range(1, 6)), settings)
    out.table("cost", pd.DataFrame([row]))
    out.claim(Claim(SENTENCES["cost"], SOURCE, null=20.0, details=row, figure="cost",
                    **_sure(row["ratio"], "passes of the loop over passes of the map").for_claim()))
    if out.wants("cost"):
        out.figure("cost", figures.cost(row))


def _sure(value: float, name: str) -> statistics.Estimate:
    """A count, which has no error."""
    return statistics.Estimate(float(value), (float(value), float(value)), 1, name)


def _guessing(name: str, data: xr.Dataset) -> str:
    """Why the answers say nothing about the picture, "" if they do."""
    tasks = data["task"].values if "task" in data.coords else [""] * data.sizes["prompt"]
    return guessing(name, list(tasks), data["token"].values.tolist(), data["right"].values.tolist())
