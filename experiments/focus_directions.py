"""Contextual heads and focus directions (arXiv:2503.23306), query-focused heads (arXiv:2506.09944).

Which heads look at the document that answers, what happens when that attention is raised in them,
in random ones and in all, and whether learned offsets of the queries do it on other prompts too.
"""

from typing import Any, Optional

import numpy as np
import xarray as xr

import interp
from experiments import _document_tasks as tasks
from experiments import _texts as texts
from experiments._output import Output
from experiments._paper import Paper, Settings
from interp.causal.controls import random_heads
from interp.causal.metrics import AnswerAccuracy, TextLoss
from interp.causal.sweep import evaluate
from interp.core import Claim, Head, OutOfRange, PromptError, Result, SiteRefused, statistics
from interp.figures import head_grid
from interp.figures.style import BLACK, BLUE, CYCLE, GREEN, PAGE, SKY, canvas, color, note
from interp.heads import contextual, focus_directions, query_focused

PAPER = Paper(
    "focus_directions",
    "Focus Directions Make Your Language Models Pay More Attention to Relevant Contexts",
    ("2503.23306", "2506.09944"),
    "Which heads look at the document that answers, and does it help to make them look harder?",
    figures={
        "heads": "Attention from the answer's rows to the gold document, per head (mean over "
        "prompts); outlined: heads above 0.1 and above twice what another document gets.",
        "sweep": "Answers that are right when the attention on the gold document is raised in the "
        "top k heads, in k random heads, and when focus directions are added to the top k.",
        "masses": "Where the top heads look from the answer's rows, before and after.",
        "places": "Answers that are right against the place of the gold document.",
        "ranking": "Calibrated relevance of the gold document per head (QRHead), and how well "
        "sets of heads rank it before the others.",
    },
    models=("reader",),
)
SOURCE, QRHEAD = PAPER.sources
POWER = 0.1
"""The share s of the gold document becomes s ** 0.1: the paper's split-softmax boost."""
STRENGTHS = (0.2, 0.5, 1.0)
SEEDS = 5
NOT_HERE = "it needs multi-hop questions, which neither invented documents nor reader's language has"

FOCUS_CLAIMS = {
    "sparse": "Fewer than one head in ten puts more than a tenth of its attention on the gold "
    "document.",
    "middle": "Contextual heads lie in the middle layers (center of mass at .25 to .75 of depth).",
    "boost": "Raising the attention on the gold document in the top heads causes more right "
    "answers than in as many random heads.",
    "alone": "With that boost the model answers better than with the gold document alone.",
    "too_many": "Boosting every head is worse than boosting the top few.",
    "failures": "Wrong answers come with low attention on the gold document in the top heads "
    "(AUROC above .6).",
    "generalize": "Focus directions cause more right answers on documents of another number and "
    "length than the same directions in random heads.",
    "no_op": "A direction added to every key changes nothing.",
}
RANK_CLAIMS = {
    "ranking": "The top query-focused heads rank the gold document better than all heads together.",
    "overlap": "Query-focused and contextual heads overlap more than chance.",
    "multi_hop": "Ablating query-focused heads hurts multi-hop questions more than verbatim copying.",
}
NUMBERS = {
    "sparse": "37 of 672 heads (5.5 %) above .1, 2 above .2 (Llama-3.2-3B-Instruct)",
    "middle": "layers 8 to 20 of 28", "boost": ".59 to .916 with 20 heads, random below +.3 %",
    "alone": ".916 against .847", "too_many": "600 heads: below the baseline",
    "generalize": "HELMET: 5 of 5 models at 32K, 3 of 5 at 64K",
}


def run(settings: Settings, out: Output) -> None:
    for name in settings.models(PAPER):
        model = interp.open_model(name, **settings.opening())
        out.record(model)
        try:
            asked = _ask(model, settings)
        except PromptError as error:
            _skip(out, model, str(error), (*FOCUS_CLAIMS, *RANK_CLAIMS))
            for figure in PAPER.figures:
                out.no_figure(figure, str(error), of=model.name)
            continue
        for kind, made in asked.items():
            out.record(prompts=tasks.prompts_of(made), name=f"{kind}-{model.name}")
        found = _scores(model, asked["test"], settings, out)
        _interventions(model, asked, found, settings, out)
        _key_direction(model, asked["test"][: settings.pick(8, tiny=6)], settings, out)
        _ranking(model, asked["test"][: settings.pick(40, tiny=6)], found, settings, out)


def _ask(model: Any, settings: Settings) -> dict[str, list]:
    """Prompts to learn from, to test on, and of another kind."""
    count, each = settings.pick(20, tiny=4), settings.pick(16, tiny=2)
    words, n_places = settings.pick(0, tiny=12), settings.pick(5, tiny=3)
    more: dict[str, Any] = {"n_places": n_places}
    return {
        "train": tasks.questions(model, settings.rng(1), count=count, words=words,
                                 each=settings.pick(6, tiny=2), **more),
        "test": tasks.questions(model, settings.rng(2), count=count, words=words, each=each,
                                **more),
        "other": tasks.questions(model, settings.rng(3), count=2 * count, each=each // 2,
                                 words=settings.pick(16, tiny=8), **more),
    }


def _claim(out: Output, model: Any, key: str, estimate: Any, **more: Any) -> None:
    rank = key in RANK_CLAIMS
    sentence = (RANK_CLAIMS if rank else FOCUS_CLAIMS)[key]
    number = {"paper_number": NUMBERS[key], "paper_tag": "secondary"} if key in NUMBERS else {}
    out.claim(Claim(sentence, QRHEAD if rank else SOURCE,
                    **{**number, **estimate.for_claim(), **more}), model.name)


def _skip(out: Output, model: Any, reason: str, keys: tuple) -> None:
    for key in keys:
        rank = key in RANK_CLAIMS
        out.claim(Claim.untestable((RANK_CLAIMS if rank else FOCUS_CLAIMS)[key],
                                   QRHEAD if rank else SOURCE, reason), model.name)


def top_count(model: Any) -> int:
    """As many heads as the paper's 20 of 672, at least one."""
    return max(1, round(model.n_layers * model.n_heads * 20 / 672))


def _scores(model: Any, asked: list, settings: Settings, out: Output) -> Result:
    longest = max(len(one.answer) for one in asked)
    found = contextual.measure(model, asked, new_tokens=longest + settings.pick(4, tiny=1))
    out.save(f"scores-{model.name}", found)
    later = contextual.measure(model, asked[: settings.pick(20, tiny=6)], rows="answer",
                               answers=tasks.answers_of(asked)[: settings.pick(20, tiny=6)])
    scores = contextual.scores(found)
    marked = looking(found)
    figure, ax = canvas(1, 1)
    contextual.draw(found, ax, mark=marked if len(marked) <= 64 else ())
    note(ax, f"mean of {len(asked)} prompts\noutlined: above 0.1 and twice another document's")
    ax.set_title(f"{model.name}, {asked[0].count} documents, {len(asked[0].prompt)} tokens")
    out.figure("heads", figure, of=model.name)

    relevant = found["relevant"].values.reshape(len(asked), -1)
    known = np.isfinite(relevant).all(1)
    if known.sum() < statistics.FEWEST:
        _skip(out, model, f"{int(known.sum())} of {len(asked)} prompts were answered at all",
              ("sparse", "middle", "failures"))
        return found
    eligible = found["eligible"].values.reshape(-1)
    null = found["null"].values.reshape(-1)
    if not marked:
        _skip(out, model, "no head gives the gold document more than a tenth of its attention and "
              "more than twice what another document gets", ("sparse", "middle"))
        _failures(model, found, scores, known, out)
        return found

    def share(rows: np.ndarray) -> float:
        mean = relevant[rows.astype(int)].mean(0)[eligible]
        return float(((mean > 0.1) & (mean > 2 * null[eligible])).mean())

    index = np.flatnonzero(known)
    mean = np.nanmean(relevant, 0)
    same = set(contextual.scores(later).top(top_count(model))) & set(scores.top(top_count(model)))
    _claim(out, model, "sparse", statistics.bootstrap(
        share, index, resamples=2000, name="share of heads above .1"), null=0.1,
        direction="below", figure="heads", details={
            "heads": int(eligible.sum()), "above .1": int((mean > 0.1).sum()),
            "above .2": int((mean > 0.2).sum()), "best": {str(h): round(scores[h], 3)
                                                          for h in scores.top(5)},
            "an irrelevant document gets": float(np.nanmean(null)),
            "top heads also top by the rows of the answer's own tokens": len(same)})
    depth = np.repeat(np.arange(model.n_layers) / max(model.n_layers - 1, 1), model.n_heads)

    def center(rows: np.ndarray) -> float:
        weight = np.clip(np.nan_to_num(relevant[rows.astype(int)].mean(0) - null), 0, None)
        return float((weight * depth).sum() / weight.sum()) if weight.sum() > 0 else float("nan")

    if model.n_layers < 3:
        _skip(out, model, f"the model has {model.n_layers} layers, so none is in the middle",
              ("middle",))
    else:
        _claim(out, model, "middle", statistics.bootstrap(
            center, index, resamples=2000, name="center of mass of the layers"), null=0.5,
            direction="equal", tolerance=0.25, unit="relative depth", figure="heads")
    _failures(model, found, scores, known, out)
    return found


def looking(found: Result) -> list[Head]:
    """Contextual heads: above a tenth, and above twice what an irrelevant document gets."""
    null = found["null"].values
    return [head for head in contextual.scores(found).above(0.1)
            if found["score"].values[head] > 2 * null[head]]


def _failures(model: Any, found: Result, scores: Any, known: np.ndarray, out: Output) -> None:
    correct = found["correct"].values[known]
    if not 0 < correct.sum() < len(correct):
        _skip(out, model, f"{int(correct.sum())} of {len(correct)} answers are right: there is "
              "nothing to tell apart", ("failures",))
        return
    top = scores.top(top_count(model))
    mass = sum(found["relevant"].isel(layer=h.layer, head=h.head).values for h in top)[known]
    _claim(out, model, "failures", statistics.bootstrap(
        auroc, mass, correct, resamples=2000, name="AUROC"), null=0.6, details={
            "accuracy": float(correct.mean()), "heads": [str(h) for h in top],
            "mean when right": float(mass[correct].mean()),
            "mean when wrong": float(mass[~correct].mean())})


def auroc(values: np.ndarray, positive: np.ndarray) -> float:
    """Probability that a positive sample has the larger value; ties count half."""
    yes, no = values[positive > 0.5], values[positive < 0.5]
    if not len(yes) or not len(no):
        return float("nan")
    larger = (yes[:, None] > no).mean()
    return float(larger + 0.5 * (yes[:, None] == no).mean())


def _controls(
    model: Any, chosen: tuple, ranking: list[Head], scores: Any, seed: int
) -> tuple[list[tuple[Head, ...]], str]:
    """Random heads for `chosen`, layer-matched if its layers have enough heads that do not look."""
    contextual_heads = [h for h in ranking if scores[h] > 0.1]
    eligible = None if scores.eligible is None else np.asarray(scores.eligible)
    given = dict(eligible=eligible)
    attempts = (
        (dict(layer_matched=True), contextual_heads, "of the same layers, below .1 themselves"),
        (dict(layer_matched=False), contextual_heads, "of any layer (those of the same layers are "
         "contextual too), below .1 themselves"),
        (dict(layer_matched=False), [], "of any layer"),
    )
    for more, exclude, words in attempts:
        try:
            drawn = [random_heads(chosen, model.n_layers, model.n_heads, seed=seed + s,
                                  exclude=exclude, **given, **more) for s in range(SEEDS)]
            return drawn, f"{len(chosen)} random heads {words}, {SEEDS} seeds"
        except OutOfRange:
            continue
    return [], "there are not enough other heads"


def _interventions(
    model: Any, asked: dict[str, list], found: Result, settings: Settings, out: Output
) -> None:
    scores = contextual.scores(found)
    ranking = scores.top(model.n_layers * model.n_heads)
    test = asked["test"][: settings.pick(25, tiny=6)]
    prompts, metric = tasks.prompts_of(test), AnswerAccuracy(tasks.answers_of(test))
    total, best = len(ranking), top_count(model)
    counts = sorted({min(k, total) for k in settings.pick(
        (1, 4, best, total) if total < 200 else (1, 5, 10, 20, best, 50, 100, total),
        tiny=(1, total))} | {best})
    writes: list[Any] = [()]
    marks: list[tuple[str, int, int]] = [("baseline", 0, 0)]
    words = ""
    for k in counts:
        writes.append(interp.reweigh("gold", power=POWER, heads=ranking[:k]))
        marks.append(("boost", k, 0))
        if k not in (best, 4 if total < 200 else 50):
            continue
        drawn, said = _controls(model, tuple(ranking[:k]), ranking, scores, settings.seed)
        words = said if k == best else words
        for seed, heads in enumerate(drawn):
            writes.append(interp.reweigh("gold", power=POWER, heads=heads))
            marks.append(("random", k, seed))
    learned: Optional[Result] = None
    refused = ""
    try:
        # Few prompts take few steps; a larger rate reaches offsets as long as the released ones.
        learned = focus_directions.learn(model, asked["train"], learning_rate=0.02, epochs=10,
                                         seed=settings.seed)
        out.save(f"directions-{model.name}", learned)
        for strength in STRENGTHS:
            for k in counts:
                writes.append(focus_directions.focus(learned, ranking[:k], strength))
                marks.append((f"focus {strength}", k, 0))
    except SiteRefused as error:
        refused = str(error)
    accuracy = evaluate(model, prompts, [metric], writes)["accuracy"]
    table: dict[tuple[str, int], np.ndarray] = {}
    for mark in dict.fromkeys(m[:2] for m in marks):
        table[mark] = np.mean([row for row, m in zip(accuracy, marks) if m[:2] == mark], 0)
    alone = AnswerAccuracy(tasks.answers_of(test))(model, [one.gold_only for one in test])
    out.save(f"sweep-{model.name}", Result(xr.Dataset(
        {"accuracy": (("cell", "prompt"), accuracy), "gold_only": ("prompt", alone)},
        {"condition": ("cell", [m[0] for m in marks]), "count": ("cell", [m[1] for m in marks]),
         "seed": ("cell", [m[2] for m in marks])}), model.manifest()))
    _draw_sweep(model, table, counts, alone, out)
    _boost_claims(model, table, best, total, alone, words, out)
    chosen = _directions(model, asked, table, learned, ranking, scores, refused, settings, out)
    _masses(model, test, ranking[:best], chosen, settings, out)
    _places(model, test, table, best, alone, chosen, out)


def _draw_sweep(
    model: Any, table: dict, counts: list[int], alone: np.ndarray, out: Output
) -> None:
    figure, ax = canvas(1, 1, width=1.15 * 3.5)
    hues = {"boost": color("primary"), "random": color("control")}
    hues |= {f"focus {x}": hue for x, hue in zip(STRENGTHS, (SKY, BLUE, GREEN))}
    labels = {"boost": f"share on gold to the power {POWER}", "random": "the same, random heads"}
    for name in dict.fromkeys(m[0] for m in table if m[0] != "baseline"):
        points = [(k, table[name, k].mean()) for k in counts if (name, k) in table]
        label = labels.get(name, name.replace("focus", "focus directions, strength"))
        ax.plot(*zip(*points), marker="o", color=hues[name], label=label,
                linestyle="-" if name in labels else "--")
    base = statistics.rate(int(table["baseline", 0].sum()), len(alone))
    ax.axhline(base.value, color=BLACK, linestyle=":", label="unchanged")
    ax.axhspan(*base.interval, color=BLACK, alpha=0.08, linewidth=0, zorder=0,
               label="its 95 % Wilson interval")
    ax.axhline(alone.mean(), color=color("needle"), linestyle=":", label="gold document alone")
    ax.set_xscale("log", base=2)
    ax.set_xticks(counts, [str(k) for k in counts])
    ax.minorticks_off()
    ax.set_xlabel("number of heads")
    ax.set_ylabel("right answers (share)")
    ax.set_ylim(-0.03, 1.03)
    ax.legend(loc="upper left", bbox_to_anchor=(1.0, 1.0))
    ax.set_title(f"{model.name}, {len(alone)} prompts")
    note(ax, f"random heads: mean of {SEEDS} draws")
    out.figure("sweep", figure, of=model.name)


def _boost_claims(
    model: Any, table: dict, best: int, total: int, alone: np.ndarray, words: str, out: Output
) -> None:
    top, base = table["boost", best], table["baseline", 0]
    details = {"heads": best, "accuracy unchanged": float(base.mean()),
               "accuracy with the boost": float(top.mean()),
               "accuracy with the gold document alone": float(alone.mean())}
    if ("random", best) in table:
        control = table["random", best]
        _claim(out, model, "boost", statistics.difference(top, control), null=0.0, causal=True,
               control=words, figure="sweep", unit="share of prompts",
               details={**details, "accuracy with random heads": float(control.mean())})
    else:
        _skip(out, model, "there are not enough other heads for a control", ("boost",))
    _claim(out, model, "alone", statistics.difference(top, alone), null=0.0, figure="sweep",
           unit="share of prompts", details=details)
    _claim(out, model, "too_many", statistics.difference(top, table["boost", total]), null=0.0,
           figure="sweep", unit="share of prompts",
           details={**details, "accuracy with every head": float(table["boost", total].mean())})


def _directions(
    model: Any, asked: dict[str, list], table: dict, learned: Optional[Result],
    ranking: list[Head], scores: Any, refused: str, settings: Settings, out: Output
) -> tuple:
    """The focus directions that were best in the sweep, tried on other prompts."""
    if learned is None:
        _skip(out, model, refused, ("generalize",))
        return ()
    cells = {m: v.mean() for m, v in table.items() if m[0].startswith("focus")}
    name, k = max(cells, key=lambda m: (cells[m], -m[1]))
    strength = float(name.split()[1])
    heads = ranking[:k]
    chosen = focus_directions.focus(learned, heads, strength)
    other = asked["other"][: settings.pick(40, tiny=6)]
    drawn, words = _controls(model, tuple(heads), ranking, scores, settings.seed + 100)
    if not drawn:
        _skip(out, model, f"the best number of heads was {k}; {words} for a control",
              ("generalize",))
        return chosen
    writes = [(), chosen, *(focus_directions.focus(learned, h, strength) for h in drawn)]
    metrics: list[Any] = [AnswerAccuracy(tasks.answers_of(other))]
    plain = texts.natural(model, settings.pick(16, tiny=5), settings.pick(64, tiny=24),
                          settings.rng(4))
    metrics.append(TextLoss(plain))
    found = evaluate(model, tasks.prompts_of(other), metrics, writes)
    accuracy, loss = found["accuracy"], found["text_loss"].mean(1)
    _claim(out, model, "generalize", statistics.difference(accuracy[1], accuracy[2:].mean(0)),
           null=0.0, causal=True, control=words, figure="sweep", unit="share of prompts", details={
               "heads": k, "strength": strength, "chosen on": "the prompts of the sweep",
               "documents": other[0].count, "accuracy unchanged": float(accuracy[0].mean()),
               "accuracy": float(accuracy[1].mean()),
               "accuracy, random heads": float(accuracy[2:].mean()),
               "change of loss on neutral text (nats)": float(loss[1] - loss[0]),
               "the same, random heads": float(loss[2:].mean() - loss[0])})
    return chosen


def _masses(
    model: Any, asked: list, top: list[Head], chosen: tuple, settings: Settings, out: Output
) -> None:
    if not out.wants("masses"):
        return
    writes = {"unchanged": (),
              "boost": (interp.reweigh("gold", power=POWER, heads=top),)}
    if chosen:
        writes["focus directions"] = chosen
    kinds = ("relevant", "irrelevant", "sink")
    figure, ax = canvas(1, 1)
    for i, (name, write) in enumerate(writes.items()):
        found = contextual.measure(model, asked, answers=tasks.answers_of(asked), write=write)
        means = [statistics.mean(np.mean([found[kind].isel(layer=h.layer, head=h.head).values
                                          for h in top], 0)) for kind in kinds]
        at, values = np.arange(3) + 0.27 * (i - 1), np.array([one.value for one in means])
        ax.bar(at, values, 0.25, label=name, color=(color("control"), color("primary"), CYCLE[0])[i])
        ax.vlines(at, *np.transpose([one.interval for one in means]), color=BLACK, linewidth=0.9)
        for x, one in zip(at, means):
            ax.annotate(f"{one.value:.2f}", (x, np.nanmax([one.value, *one.interval])), (0, 2),
                        textcoords="offset points", ha="center", fontsize=6)
    ax.set_xticks(range(3), ["gold document", "other documents", "sink"])
    ax.set_ylabel("attention (share)")
    ax.legend()
    total = model.n_layers * model.n_heads
    ax.set_ylim(0, 1.2 * ax.get_ylim()[1])  # room for the legend
    ax.set_title(f"{model.name}, top {len(top)} of {total} heads, {len(asked)} prompts")
    note(ax, "mean, 95 % bootstrap interval over prompts")
    out.figure("masses", figure, of=model.name)


def _places(
    model: Any, asked: list, table: dict, best: int, alone: np.ndarray, chosen: tuple, out: Output
) -> None:
    place = np.array([one.place for one in asked])
    curves = {"unchanged": (table["baseline", 0], color("control")),
              f"boost in the top {best}": (table["boost", best], color("primary"))}
    cells = [m for m in table if m[0].startswith("focus")]
    if chosen and cells:
        name, k = max(cells, key=lambda m: (table[m].mean(), -m[1]))
        curves[f"focus directions in the top {k}"] = (table[name, k], CYCLE[0])
    figure, ax = canvas(1, 1)
    marks = sorted(set(place))
    for i, (label, (values, hue)) in enumerate(curves.items()):
        at = np.array(marks) + 0.02 * asked[0].count * (i - 1)  # beside each other where they agree
        found = [statistics.rate(int(values[place == p].sum()), int((place == p).sum())) for p in marks]
        ax.plot(at, [one.value for one in found], marker="o", color=hue, label=label)
        ax.vlines(at, *np.transpose([one.interval for one in found]), color=hue, linewidth=0.7)
    ax.axhline(alone.mean(), color=color("needle"), linestyle=":", label="gold document alone")
    ax.set_xticks(marks, [str(p) for p in marks])
    ax.set_xlabel(f"place of the gold document among {asked[0].count}")
    ax.set_ylabel("right answers (share)")
    ax.set_ylim(-0.03, 1.75)  # room for the legend
    ax.set_yticks(np.linspace(0, 1, 6))
    ax.legend(loc="upper left")
    ax.set_title(f"{model.name}, {int((place == marks[0]).sum())} prompts per place")
    note(ax, "share and 95 % Wilson interval")
    out.figure("places", figure, of=model.name)


def _key_direction(model: Any, asked: list, settings: Settings, out: Output) -> None:
    """The same random direction added to all keys, and to all queries."""
    rng = settings.rng(5)
    prompts = tasks.prompts_of(asked)
    layer = model.n_layers // 2
    size = {}
    try:
        base = model.run(prompts, logits="last").logits
        for site, heads in (("k", model.n_kv_heads), ("q", model.n_heads)):
            value = rng.normal(size=(1, heads, model.d_head)).astype(np.float32)
            moved = model.run(prompts, logits="last",
                              write=interp.edit(f"{site}.{layer}", "add", value)).logits
            size[site] = np.array([
                float((a[-1].softmax(-1) - b[-1].softmax(-1)).abs().max())
                for a, b in zip(base, moved)])
    except SiteRefused as error:
        _skip(out, model, str(error), ("no_op",))
        return
    exact = str(model.dtype) in ("torch.float32", "torch.float64")
    out.claim(Claim(
        FOCUS_CLAIMS["no_op"], SOURCE, **statistics.mean(size["k"]).for_claim(), null=0.0,
        direction="equal", tolerance=1e-4 if exact else 2e-2,
        unit="largest change of a next-token probability",
        paper_number="attention moves by 1e-16 (by .42 for queries)", paper_tag="checked", details={
            "layer": layer, "the same direction on queries": float(size["q"].mean()),
            "softcap or learned sink": model.sink_kind == "learned" or getattr(
                model.config.get_text_config(), "attn_logit_softcapping", None) is not None,
        }), model.name)


def _ranking(
    model: Any, asked: list, contextual_found: Result, settings: Settings, out: Output
) -> None:
    found = query_focused.measure(model, asked)
    out.save(f"ranking-{model.name}", found)
    scores, other = query_focused.scores(found), contextual.scores(contextual_found)
    total, best = model.n_layers * model.n_heads, top_count(model)
    # The paper keeps 16 of 1024; with the same share of a small model that is one head.
    count = max(1, round(total * 16 / 1024))
    every = scores.top(total)
    sets = {f"top {count} by relevance": scores.top(count), "all heads": every,
            f"top {count} contextual": other.top(count)}
    rng = np.random.default_rng(settings.seed)
    random = [[every[i] for i in rng.choice(len(every), count, replace=False)]
              for _ in range(SEEDS)]
    values = {name: query_focused.auroc(found, heads) for name, heads in sets.items()}
    values[f"{count} random"] = np.mean([query_focused.auroc(found, h) for h in random], 0)
    figure, axes = canvas(1, 2, width=PAGE, gridspec_kw={"width_ratios": (1.25, 1)})
    head_grid.draw(axes[0], scores, label="calibrated relevance",
                   mark=scores.top(count) if count <= 64 else ())
    names = list(values)
    means = [statistics.mean(values[n]) for n in names]
    axes[1].barh(range(len(names)), [one.value for one in means], 0.6, color=[
        color("primary"), CYCLE[0], color("secondary"), color("control")])
    axes[1].hlines(range(len(names)), *np.transpose([one.interval for one in means]), color=BLACK,
                   linewidth=0.9)
    axes[1].axvline(0.5, color=BLACK, linestyle=":", linewidth=0.8)
    axes[1].set_yticks(range(len(names)), names)
    axes[1].invert_yaxis()
    axes[1].set_xlim(0, 1.02)
    axes[1].set_xlabel("AUROC, gold against others")
    axes[0].set_title(f"{model.name}, {len(asked)} prompts")
    axes[1].set_title("gold ranked first by sets of heads")
    if count <= 64:
        note(axes[0], f"outlined: top {count} by relevance")
    note(axes[1], "mean, 95 % bootstrap interval over prompts; dotted: chance")
    out.figure("ranking", figure, of=model.name)
    _claim(out, model, "ranking", statistics.difference(values[names[0]], values["all heads"]),
           null=0.0, unit="AUROC", figure="ranking", details={
               n: round(float(v.mean()), 4) for n, v in values.items()} | {
               "heads": [str(h) for h in scores.top(count)]})
    _overlap(model, found, contextual_found, max(best, count), out)
    _skip(out, model, NOT_HERE, ("multi_hop",))


def _overlap(model: Any, ranked: Result, looked: Result, count: int, out: Output) -> None:
    """How many of the top heads by relevance are among the top by attention in the answer."""
    place = ranked["place"].values
    values = ranked["documents"].values
    own = np.take_along_axis(values, place[:, None, None, None], -1)[..., 0]
    own = own.reshape(len(own), -1)
    other = np.flatnonzero(contextual_top(looked, count).reshape(-1))
    total = own.shape[1]

    def shared(rows: np.ndarray) -> float:
        top = np.argsort(-own[rows.astype(int)].mean(0), kind="stable")[:count]
        return len(set(top) & set(other)) / count

    _claim(out, model, "overlap", statistics.bootstrap(
        shared, np.arange(len(own)), resamples=2000, name=f"share of the top {count}"),
        null=count / total, figure="ranking", details={"heads": total})


def contextual_top(found: Result, count: int) -> np.ndarray:
    """True for the `count` heads that look most at the gold document, `[layer, head]`."""
    chosen = np.zeros(found["score"].shape, dtype=bool)
    for head in contextual.scores(found).top(count):
        chosen[head.layer, head.head] = True
    return chosen
