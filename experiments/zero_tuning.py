"""Scaling the attention on the initial token, ZeroTuning (arXiv:2505.11739).

Accuracy, valid answers and output entropy against the factor gamma, for all heads, groups of layers
and single heads, on a task of retrieval and on one of classification; and whether the first token
is a better place for this than others.
"""

from typing import Any, Optional

import numpy as np
import xarray as xr
from scipy.stats import rankdata

import interp
from experiments import _answer_tasks as tasks
from experiments._output import Output
from experiments._paper import Paper, Settings
from interp.core import Claim, Head, PromptError, Result, statistics
from interp.figures import head_grid, layer_curve
from interp.figures.style import BLUE, GRAY, GREEN, PAGE, VERMILION, canvas, note
from interp.sinks import initial_token

PAPER = Paper(
    "zero_tuning",
    "ZeroTuning: Unlocking the Initial Token's Power to Enhance Large Language Models",
    ("2505.11739",),
    "Do answers get better when more, or less, attention goes to the first token?",
    figures={
        "gamma": "Right answers, valid answers and output entropy against gamma, the factor on the "
        "attention to the first token in every head.",
        "layers": "Change of the answer's log probability against gamma, by group of layers.",
        "heads": "Attention on the first token per head, and the change of the answer's log "
        "probability when it is scaled up in that head alone.",
        "positions": "Largest change of the answer's log probability over gamma, by the position "
        "that is scaled.",
    },
    models=("reader",),
    long=True,
)
(SOURCE,) = PAPER.sources
GAMMAS = (0.1, 0.3, 0.6, 1.0, 2.0, 3.0, 5.0)
FEW = (0.1, 0.3, 3.0, 10.0)
HEAD_GAMMA = 5.0
POSITIONS = (0, 1, 2, 4, 8, 16)
TASKS = ("qa", "classification")
CLAIMS = {
    "gain qa": "Scaling the first token by a gamma chosen on other items causes more right answers "
    "to questions over documents than scaling a random early position.",
    "gain classification": "Scaling the first token by a gamma chosen on other items causes more "
    "right answers in classification than scaling a random early position.",
    "others": "Other models gain as well.",
    "valid": "Where accuracy rises, so does the share of valid answers.",
    "entropy qa": "Output entropy falls where accuracy rises, over gamma (questions).",
    "entropy classification": "Output entropy falls where accuracy rises, over gamma "
    "(classification).",
    "position": "Scaling the first token changes answers more than scaling other early tokens.",
    "sign": "The gamma of most right answers is above one in classification, and below one for "
    "questions.",
    "layers": "Shallow and middle layers respond more than deep ones.",
    "mass": "The first token takes much attention, so that there is something to scale (some head "
    "above .3).",
}
NUMBERS = {
    "gain qa": ("58.84 to 61.48 (Llama-3.1-8B)", "secondary"),
    "gain classification": ("59.59 to 71.44 (Llama-3.1-8B)", "secondary"),
    "others": ("Qwen2-7B 55.10 to 68.19; R1-14B 67.67 to 71.87", "secondary"),
    "valid": ("347 to 498 of 500 answers valid; accuracy among the valid 91.6 % to 89.0 % (gamma 4, "
              "released demonstration)", "code"),
}


def run(settings: Settings, out: Output) -> None:
    for name in settings.models(PAPER):
        model = interp.open_model(name, **settings.opening())
        out.record(model)
        try:
            given = {kind: _task(model, kind, settings) for kind in TASKS}
        except PromptError as error:
            _skip(out, model, str(error), *CLAIMS)
            for figure in PAPER.figures:
                out.no_figure(figure, str(error), of=model.name)
            continue
        for kind, task in given.items():
            out.record(prompts=task.prompts, name=f"{kind}-{model.name}")
        found = _gammas(model, given, out)
        _gains(model, given, found, settings, out)
        _heads(model, given["qa"], settings, out)
        if not found["qa"]["correct"].values[GAMMAS.index(1.0)].any():
            reason = f"none of {len(given['qa'])} questions is answered right by the model as it is"
            _skip(out, model, reason, "layers", "position")
            for figure in ("layers", "positions"):
                out.no_figure(figure, reason, of=model.name)
        else:
            _layers(model, given["qa"], found["qa"], settings, out)
            _positions(model, given["qa"], settings, out)
        _skip(out, model, f"it is about other models than {model.name}; run it with --model",
              "others")


def _task(model: Any, kind: str, settings: Settings) -> tasks.Task:
    count, rng = settings.pick(32, tiny=12), settings.rng(1 + TASKS.index(kind))
    if kind == "qa":
        # 40 short documents instead of 20: as hard for `reader`, and fewer tokens.
        return tasks.qa(model, rng, count, documents=settings.pick(32, tiny=4),
                        words=settings.pick(12, tiny=10))
    return tasks.classification(model, rng, count, length=settings.pick(400, tiny=64))


def _claim(out: Output, model: Any, key: str, estimate: Any, **more: Any) -> None:
    number = dict(zip(("paper_number", "paper_tag"), NUMBERS.get(key, ())))
    out.claim(Claim(CLAIMS[key], SOURCE, **{**number, **estimate.for_claim(), **more}), model.name)


def _skip(out: Output, model: Any, reason: str, *keys: str) -> None:
    for key in keys:
        number = dict(zip(("paper_number", "paper_tag"), NUMBERS.get(key, ())))
        out.claim(Claim.untestable(CLAIMS[key], SOURCE, reason, **number), model.name)


def _write(gamma: float, **more: Any) -> tuple:
    """No intervention at all for a factor of one: it changes nothing."""
    return () if gamma == 1.0 else (initial_token.tune(gamma, **more),)


def _sweep(model: Any, task: tasks.Task, writes: list) -> Result:
    return initial_token.sweep(model, task.prompts, task.answers, writes, valid=task.valid)


def _gammas(model: Any, given: dict[str, tasks.Task], out: Output) -> dict[str, Result]:
    found = {kind: _sweep(model, task, [_write(g) for g in GAMMAS])
             for kind, task in given.items()}
    figure, axes = canvas(1, 2, width=PAGE)
    for ax, (kind, result) in zip(axes, found.items()):
        initial_token.draw(result, GAMMAS, ax)
        task = "questions" if kind == "qa" else kind
        ax.set_title(f"{model.name}, {task}\n{given[kind].what}")
        out.save(f"gamma-{kind}-{model.name}", result)
    out.figure("gamma", figure, of=model.name)
    for kind, result in found.items():
        _entropy(model, kind, result, out)
    _valid(model, found, out)
    _sign(model, found, out)
    return found


def _entropy(model: Any, kind: str, found: Result, out: Output) -> None:
    correct, entropy = found["correct"].values, found["entropy"].values
    if np.ptp(correct.mean(1)) == 0:
        _skip(out, model, f"accuracy is {correct.mean():.3g} for every gamma: there is nothing for "
              "entropy to follow", f"entropy {kind}")
        return

    def over_gamma(rows: np.ndarray) -> float:
        rows = rows.astype(int)
        a, b = correct[:, rows].mean(1), entropy[:, rows].mean(1)
        if np.ptp(a) == 0 or np.ptp(b) == 0:
            return float("nan")
        return float(np.corrcoef(rankdata(a), rankdata(b))[0, 1])

    _claim(out, model, f"entropy {kind}", statistics.bootstrap(
        over_gamma, np.arange(correct.shape[1]), resamples=2000,
        name=f"Spearman correlation over {len(GAMMAS)} gammas"), null=0.0, direction="below",
        figure="gamma", details={"gammas": list(GAMMAS),
                                 "accuracy": correct.mean(1).round(4).tolist(),
                                 "entropy": entropy.mean(1).round(4).tolist()})


def best_gamma(accuracy: np.ndarray, log_prob: Optional[np.ndarray] = None) -> int:
    """The step of highest accuracy; of equals that of highest log probability, then nearest to 1."""
    second = np.zeros_like(accuracy) if log_prob is None else log_prob
    distance = np.abs(np.log(np.array(GAMMAS)))
    return int(np.lexsort((distance, -second, -accuracy))[0])


def _valid(model: Any, found: dict[str, Result], out: Output) -> None:
    one = GAMMAS.index(1.0)
    kind = max(found, key=lambda k: float(
        found[k]["correct"].mean("prompt").max() - found[k]["correct"].mean("prompt")[one]))
    correct, valid = found[kind]["correct"].values, found[kind]["valid"].values
    best = int(correct.mean(1).argmax())
    if correct[best].mean() <= correct[one].mean():
        _skip(out, model, "no gamma raises accuracy on either task", "valid")
        return
    if valid[[one, best]].all():
        _skip(out, model, "every answer is valid as it is and under the best gamma: no share can rise",
              "valid")
        return
    among = [float(correct[i][valid[i] > 0].mean()) if valid[i].any() else float("nan")
             for i in (one, best)]
    _claim(out, model, "valid", statistics.difference(valid[best], valid[one]), null=0.0,
           figure="gamma", unit="share of answers", details={
               "task": kind, "gamma": GAMMAS[best],
               "accuracy": [float(correct[i].mean()) for i in (one, best)],
               "valid": [float(valid[i].mean()) for i in (one, best)],
               "accuracy among the valid": among})


def _sign(model: Any, found: dict[str, Result], out: Output) -> None:
    logs = np.log(np.array(GAMMAS))
    values = {kind: (r["correct"].values, r["log_prob"].values) for kind, r in found.items()}
    never = [kind for kind, (a, _) in values.items() if not a.any()]
    if never:
        _skip(out, model, f"no item of {never[0]} is answered right under any gamma", "sign")
        return
    flat = [kind for kind, (a, _) in values.items() if np.ptp(a.mean(1)) == 0]
    if flat:
        likeliest = {kind: GAMMAS[int(b.mean(1).argmax())] for kind, (_, b) in values.items()}
        _skip(out, model, f"accuracy on {flat[0]} is the same for every gamma (the answers are "
              "most probable at gamma " + ", ".join(
                  f"{g:g} in {kind}" for kind, g in likeliest.items()) + ")", "sign")
        return
    n = min(v[0].shape[1] for v in values.values())

    def apart(rows: np.ndarray) -> float:
        rows = rows.astype(int)
        best = {kind: logs[best_gamma(a[:, rows].mean(1), b[:, rows].mean(1))]
                for kind, (a, b) in values.items()}
        return float(best["classification"] - best["qa"])

    _claim(out, model, "sign", statistics.bootstrap(
        apart, np.arange(n), resamples=2000, name="best ln gamma, classification minus questions"),
        null=0.0, figure="gamma", details={
            "of equal accuracies": "the one of higher log probability of the answers is best",
            **{f"best gamma, {kind}": GAMMAS[best_gamma(a.mean(1), b.mean(1))]
               for kind, (a, b) in values.items()},
            **{f"accuracy range over gamma, {kind}": float(np.ptp(a.mean(1)))
               for kind, (a, _) in values.items()}})


def _gains(
    model: Any, given: dict[str, tasks.Task], found: dict[str, Result], settings: Settings,
    out: Output
) -> None:
    """The gamma that is best on one half, on the other; against other positions scaled by it."""
    one, rng = GAMMAS.index(1.0), settings.rng(5)
    for kind, task in given.items():
        halves = [found[kind].data.isel(prompt=slice(i, None, 2)) for i in (0, 1)]
        best = best_gamma(*(halves[0][n].mean("prompt").values for n in ("correct", "log_prob")))
        entropy = int(halves[0]["entropy"].mean("prompt").values.argmin())
        if best == one:
            _skip(out, model, "of all gammas 1 is best on the half to choose on", f"gain {kind}")
            continue
        test, gamma = task.half(1), GAMMAS[best]
        shortest = min(map(len, test.prompts))
        places = rng.choice(np.arange(1, max(2, shortest // 2)), min(5, max(1, shortest // 2 - 1)),
                            replace=False)
        control = _sweep(model, test, [_write(gamma, position=int(p)) for p in places])
        tuned, plain = halves[1].isel(step=best), halves[1].isel(step=one)
        _claim(out, model, f"gain {kind}", statistics.difference(
            tuned["correct"].values, control["correct"].mean("step").values), null=0.0,
            causal=True, control=f"{len(places)} random positions of the first half, scaled by the "
            "same factor", figure="gamma", unit="share of answers", details={
                "gamma": gamma, "gamma of least entropy": GAMMAS[entropy], "task": task.what,
                **{f"{name}: unchanged, scaled, control": [
                    round(float(x), 4) for x in (plain[name].mean(), tuned[name].mean(),
                                                 control[name].mean())]
                   for name in ("correct", "valid", "log_prob")}})


def _small(task: tasks.Task, count: int) -> tasks.Task:
    return tasks.Task(task.name, task.prompts[:count], task.answers[:count], task.starts, task.what)


def _layers(
    model: Any, task: tasks.Task, found: Result, settings: Settings, out: Output
) -> None:
    groups = initial_token.groups(model.n_layers)
    small = _small(task, settings.pick(16, tiny=6))
    base = found["log_prob"].values[GAMMAS.index(1.0)][: len(small)]
    change = {}
    for name, layers in groups.items():
        rows = _sweep(model, small, [_write(g, layers=layers) for g in FEW])["log_prob"].values
        change[name] = rows - base
    figure, ax = canvas(1, 1)
    for (name, values), hue in zip(change.items(), (VERMILION, GREEN, BLUE)):
        layers = groups[name]
        label = f"{name} ({layers[0]} to {layers[-1]})" if len(layers) > 1 else \
            f"{name} ({layers[0]})"
        at = sorted([*zip(FEW, values.mean(1)), (1.0, 0.0)])
        ax.plot(*zip(*at), marker="o", color=hue, label=label)
    _gamma_axis(ax)
    ax.set_ylabel("change of log probability (nats)")
    ax.legend(title="layers")
    ax.set_title(f"{model.name}, {len(small)} questions")
    out.figure("layers", figure, of=model.name)
    if set(groups) != {"shallow", "middle", "deep"}:
        _skip(out, model, f"{model.n_layers} layers do not make three groups", "layers")
        return
    response = {name: np.abs(values).max(0) for name, values in change.items()}
    _claim(out, model, "layers", statistics.difference(
        (response["shallow"] + response["middle"]) / 2, response["deep"]), null=0.0,
        unit="nats, largest change over gamma", figure="layers",
        details={name: float(value.mean()) for name, value in response.items()})


def _gamma_axis(ax: Any) -> None:
    ax.set_xscale("log")
    ax.set_xticks((0.1, 0.3, 1, 3, 10), ("0.1", "0.3", "1", "3", "10"))
    ax.minorticks_off()
    ax.set_xlabel("gamma (factor on the first token)")
    ax.grid(True, axis="y")


def _heads(model: Any, task: tasks.Task, settings: Settings, out: Output) -> None:
    mass = initial_token.mass(model, task.prompts[: settings.pick(16, tiny=4)])
    from_prompts = model.run(task.prompts[: settings.pick(16, tiny=6)], stats="received",
                             logits="none").stats["received"].isel(key=0)
    best = np.unravel_index(np.nanargmax(mass), mass.shape)
    _claim(out, model, "mass", statistics.mean(
        from_prompts.isel(layer=int(best[0]), head=int(best[1])).values), null=0.3,
        figure="heads", unit="share of attention", details={
            "head": str(Head(int(best[0]), int(best[1]))), "mean of all heads": float(
                np.nanmean(mass))})
    if not out.wants("heads"):
        return
    small = _small(task, settings.pick(8, tiny=5))
    order = np.argsort(-np.nan_to_num(mass).reshape(-1), kind="stable")
    tried = [Head(*divmod(int(i), model.n_heads)) for i in order[: settings.pick(24, tiny=4)]]
    rows = _sweep(model, small, [(), *(_write(HEAD_GAMMA, heads=[h]) for h in tried)])
    change, right = (np.full(mass.shape, np.nan) for _ in range(2))
    for head, p, a in zip(tried, rows["log_prob"].values[1:], rows["correct"].values[1:]):
        change[head.layer, head.head] = (p - rows["log_prob"].values[0]).mean()
        right[head.layer, head.head] = (a - rows["correct"].values[0]).mean()
    grid = ("layer", "head")
    out.save(f"heads-{model.name}", Result(xr.Dataset(
        {"mass": (grid, mass), "log_prob": (grid, change), "accuracy": (grid, right)}),
        model.manifest()))
    figure, axes = canvas(1, 2, width=PAGE)
    head_grid.draw(axes[0], mass, label="attention on the first token", limits=(0, 1))
    head_grid.draw(axes[1], change, label="change of log probability (nats)", signed=True,
                   hatched="not tried")
    changed = np.nanmax(np.abs(right))
    axes[0].set_title(model.name)
    axes[1].set_title(f"gamma {HEAD_GAMMA:g}, {len(small)} questions\n" + (
        f"(accuracy changes by up to {changed:.2g})" if changed > 0 else
        "(no head changes accuracy)"))
    out.figure("heads", figure, of=model.name)


def _positions(model: Any, task: tasks.Task, settings: Settings, out: Output) -> None:
    small = _small(task, settings.pick(16, tiny=6))
    places = [p for p in POSITIONS if p < min(map(len, small.prompts)) // 2]
    base = _sweep(model, small, [()])["log_prob"].values[0]
    gammas = (0.1, 5.0)
    response = np.stack([
        np.abs(_sweep(model, small, [_write(g, position=p) for g in gammas])["log_prob"].values
               - base).max(0)
        for p in places
    ])
    figure, ax = canvas(1, 1)
    low, high = layer_curve.band(response.T)
    mean = response.mean(1)
    ax.bar(range(len(places)), mean, 0.7, color=[VERMILION, *[GRAY] * len(places)][: len(places)],
           yerr=np.maximum(0, [mean - low, high - mean]))
    ax.set_xticks(range(len(places)), [str(p) for p in places])
    ax.set_xlabel("position that is scaled")
    ax.set_ylabel("largest absolute change of\nlog probability (nats)")
    ax.set_title(model.name)
    note(ax, f"the larger of gamma {gammas[0]:g} and {gammas[1]:g}; mean and 95 % interval, "
             f"n = {len(small)} questions")
    out.figure("positions", figure, of=model.name)
    _claim(out, model, "position", statistics.difference(response[0], response[1:].mean(0)),
           null=0.0, causal=True, control=f"positions {', '.join(map(str, places[1:]))}, scaled in "
           "the same way", figure="positions", unit="nats, largest change over gamma",
           details={str(p): float(r.mean()) for p, r in zip(places, response)})
