"""Visual attention sinks (arXiv:2503.03321): found, hidden, and their attention given to content.

On `looker` as it was trained, on a copy in which visual sinks were planted (so that the truth is
known), and on any vision-language model with a processor: the pictures are scenes with known boxes.
"""

import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import xarray as xr

import interp
from experiments._output import Output
from experiments._paper import Paper, Settings
from interp.core import Claim, ModelNotFound, Prompt, Result, statistics
from interp.figures import image_overlay
from interp.figures.style import COLUMN, PAGE, canvas, color, note
from interp.heads import image_centric
from interp.prompts import scenes
from interp.sinks import visual
from interp.stream.per_layer import PerLayer
from interp.stream.reducers import SegmentMass

PAPER = Paper(
    "visual_sinks",
    "See What You Are Told: Visual Attention Sink in Large Multimodal Models",
    ("2503.03321",),
    "Which image tokens soak up attention, do they matter, and can others use it better?",
    figures={
        "spectrum": "Magnitude of every residual coordinate, in units of the vector's RMS: first "
        "token, strongest image token, median of the other image tokens.",
        "scatter": "phi of image and text tokens against the attention they receive from the "
        "text after the image (dotted: the threshold).",
        "birth": "Mean phi per layer of the first token, visual sinks and other tokens.",
        "hiding": "Accuracy and log-probability of the answer with visual sinks hidden from the "
        "text, against as many other image tokens.",
        "contribution": "Attention received, and the same weighted by the values it fetches: "
        "visual sinks against other image tokens.",
        "heads": "Non-sink share of each head's attention on the image.",
        "overlay": "Visual sinks on pictures (outlined), over the attention each patch receives.",
        "background": "Share of visual sinks that lie on background, against the share of "
        "background in the picture.",
        "redistribution": "Change of the answer's log-probability when the sinks' attention is "
        "given to other keys, by destination and choice of heads.",
    },
    models=("looker", "planted-looker"),
)
SOURCE = PAPER.sources[0]
PLANTED = "planted-looker"
ATTRACT = 9.0
"""Logit that planted sinks gain in every head, so that they also receive attention."""

TASKS = ("color", "shape", "existence", "read", "position")


@dataclass
class Case:
    """One picture with one question: the prompt, the answer's first token, and what is where."""

    prompt: Prompt
    answer: int
    scene: scenes.Scene
    question: scenes.Question
    picture: Any


def run(settings: Settings, out: Output) -> None:
    for name in settings.models(PAPER):
        try:
            model = _planted(settings) if name == PLANTED else interp.open_model(
                name, **settings.opening())
        except ModelNotFound as error:
            if settings.model is not None:
                raise
            _give_up(name, str(error), out)
            continue
        reason = _unfit(model)
        if reason:
            out.record(model)
            _give_up(model.name, reason, out)
            continue
        _one(model, settings, out)


CLAIMS = (
    "Visual sinks fire in the sink dimensions of the first token.",
    "The same image tokens are sinks whatever the question.",
    "Visual sinks appear in an early layer and stay.",
    "Hiding visual sinks from the text leaves the answer as it was.",
    "Hiding visual sinks causes less damage than hiding as many other image tokens.",
    "Visual sinks contribute less than other image tokens.",
    "Visual sinks lie on background.",
    "Heads with a high non-sink share look at the object that is asked for.",
    "Giving the sinks' attention to image content in image-centric heads improves the answer.",
    "Without a choice of heads the redistribution does harm.",
    "Image content is a better destination than text.",
    "The sink dimensions are inherited from the language model.",
)
NUMBERS = {
    0: ("LLaMA-2: dimensions 1415 and 2533", "secondary"), 2: ("from layer 2 on", "secondary"),
    6: ("over 90 % on background", "secondary"),
    8: ("LLaVA-1.5-7B: GQA 62.0 to 63.5, VizWiz 50.0 to 53.7", "secondary"),
    9: ("scores collapse to 0", "secondary"),
}


def _number(index: int) -> dict[str, str]:
    if index not in NUMBERS:
        return {}
    number, tag = NUMBERS[index]
    return {"paper_number": number, "paper_tag": tag}


def _give_up(name: str, reason: str, out: Output, figures: Sequence[str] = tuple(PAPER.figures),
             claims: Sequence[int] = range(len(CLAIMS))) -> None:
    for figure in figures:
        out.no_figure(figure, reason, of=name)
    for index in claims:
        out.claim(Claim.untestable(CLAIMS[index], SOURCE, reason, **_number(index)), name)


def _unfit(model: Any) -> str:
    if not model.has_images:
        return f"{model.name} is a text model: it has no image tokens"
    if model.processor is None:
        return f"{model.name} has no image processor here, so pictures cannot be given to it"
    if model.kind != "decoder":
        return f"{model.name} is no decoder: the text after an image does not read it causally"
    if model.n_layers < 3:
        return (f"{model.name} has {model.n_layers} block(s), and visual sinks exist from layer 2 "
                "on")
    return ""


def _planted(settings: Settings) -> Any:
    """`looker` with a massive first token and massive image tokens of known position."""
    from interp.models.model import Model
    from interp.organisms import plant

    base = interp.open_model("looker", **settings.opening())
    pictures = scenes.scenes(settings.rng(9), settings.pick(32, tiny=8))
    prompts = [base.prompt("what is the number ?", images=[scenes.draw(s)], chat=True)
               for s in pictures]
    inputs = {"input_ids": torch.tensor([p.ids for p in prompts]),
              "pixel_values": torch.cat([torch.as_tensor(p.inputs["pixel_values"])
                                         for p in prompts])}
    states = plant.residuals(base.hf, inputs)
    norm, last = float(states[:, 1].norm(dim=-1).median()), base.n_layers - 1
    # Coordinates that the model itself uses little, so that nothing natural fires in them.
    quiet = states.abs().mean((0, 1, 2)).argsort()[:2].tolist()
    values = {quiet[0]: 60 * norm, quiet[1]: -25 * norm}
    rooted = plant.massive_coordinate(base.hf, values, 0, last, tokens=prompts[0].ids[0])
    planted = plant.visual_sink(
        rooted, inputs, 1, 60 * norm, last, attract=ATTRACT, share=0.12,
        feature_direction=_background(plant.image_features(base.hf, inputs), pictures))
    truth = {k: v for k, v in planted.describe().items()
             if k in ("kind", "rule", "layer", "until", "norm", "dims", "attract", "moved")}
    return Model(planted.model, PLANTED, base.tokenizer, base.processor,
                 source={"planted": truth})


def _background(features: torch.Tensor, pictures: list[scenes.Scene]) -> torch.Tensor:
    """From objects to background in the vision tower's features, by the known places of objects."""
    flat = features.reshape(len(pictures), -1, features.shape[-1])
    empty = torch.ones(flat.shape[:2], dtype=torch.bool)
    for row, scene in zip(empty, pictures):
        for thing in scene.objects:
            row[[scenes.GRID * r + c for r, c in thing.cells]] = False
    return flat[empty].mean(0) - flat[~empty].mean(0)


# -- one model ----------------------------------------------------------------------------------


def cases(model: Any, count: int, rng: np.random.Generator) -> list[Case]:
    """Scenes with one question each, as the model takes pictures; only one-token-safe answers.

    The answer is judged by its first token.
    """
    chat = bool(getattr(model.tokenizer, "chat_template", None)
                or getattr(model.processor, "chat_template", None))
    scale = 1 if model.name in ("looker", PLANTED) else 4
    found: list[Case] = []
    while len(found) < count:
        for scene in scenes.scenes(rng, count - len(found)):
            asked = scenes.questions(scene, rng, tasks=TASKS)
            if not asked:
                continue
            question = asked[int(rng.integers(len(asked)))]
            picture = scenes.draw(scene, scale)
            prompt = model.prompt(question.text, images=[picture], chat=chat)
            word = question.answer.split()[0]
            ids = model.tokenizer(word, add_special_tokens=False)["input_ids"]
            if ids:
                found.append(Case(prompt, int(ids[0]), scene, question, picture))
    return found


def _one(model: Any, settings: Settings, out: Output) -> None:
    count = settings.pick(48, tiny=6)
    data = cases(model, count, settings.rng(1))
    prompts = [case.prompt for case in data]
    out.record(model, prompts, f"scenes-{model.name}")
    texts = [Prompt.from_tokens(p.ids[max(_image(p)) + 1 :]) for p in prompts]
    front = prompts[0].ids[: min(_image(prompts[0]))]
    texts = [Prompt.from_tokens([*front, *t.ids]) for t in texts]
    discovery = visual.find_sink_dims(
        model, texts[: settings.pick(32, tiny=4)], prompts[: settings.pick(32, tiny=4)],
        seed=settings.seed, n_null=settings.pick(1000, tiny=50))
    print(f"{model.name}: {discovery}")
    details = {"discovery": str(discovery).splitlines(), "passed": discovery.passed}
    out.claim(Claim.untestable(
        CLAIMS[11], SOURCE, "the text-only model it was built from is not given",
        **_number(11)), model.name)
    if not discovery.found.dims:
        reason = (f"no residual coordinate of {model.name} is massive at its first token, so it "
                  f"has no sink dimensions (ratio asked for: {discovery.min_ratio:g})")
        _spectrum(model, data, (), out)
        _give_up(model.name, reason, out, [f for f in PAPER.figures if f != "spectrum"],
                 range(len(CLAIMS) - 1))
        return
    dims = discovery.found.dims
    _spectrum(model, data, dims, out)
    found = visual.measure(model, prompts, dims)
    out.save(f"sinks-{model.name}", found)
    _scatter(model, found, out)
    figure, ax = canvas(1, 1, width=COLUMN * 1.4, height=2.5)
    visual.draw(found, ax)
    ax.set_title(model.name)
    ax.get_legend().set_loc("center left")
    ax.get_legend().set_bbox_to_anchor((1.0, 0.5))
    out.figure("birth", figure, of=model.name)
    sinks = [visual.sinks_by_layer(found, i, image_only=True) for i in range(len(prompts))]
    counts = np.array([len({p for places in s.values() for p in places}) for s in sinks])

    def claim(index: int, found: Any, **more: Any) -> None:
        made = Claim.untestable(CLAIMS[index], SOURCE, found, **_number(index)) \
            if isinstance(found, str) else \
            Claim(CLAIMS[index], SOURCE, **{**found.for_claim(), **_number(index), **more})
        out.claim(made, model.name)

    _in_dimensions(found, discovery, claim, details)
    with_sinks = np.flatnonzero(counts > 0)
    details["pictures with visual sinks"] = f"{len(with_sinks)} of {len(counts)}"
    if len(with_sinks) < 5:
        reason = (f"only {len(with_sinks)} of {len(counts)} pictures have an image token with phi "
                  f"above {discovery.tau:.3g} in {model.name}")
        _give_up(model.name, reason, out,
                 [f for f in PAPER.figures if f not in ("spectrum", "scatter", "birth")],
                 range(1, len(CLAIMS) - 1))
        return
    kept = [data[i] for i in with_sinks]
    chosen = Result(found.data.isel(prompt=with_sinks), found.manifest)
    _same_cells(model, kept, dims, claim, settings)
    _birth(chosen, claim, model)
    _hidden(model, kept, chosen, claim, settings, out)
    _contribution(model, chosen, claim, out)
    _places(model, kept, chosen, claim, out)
    centered = _heads(model, kept, chosen, claim, out)
    _redistribution(model, kept, chosen, centered, claim, settings, out)


def _image(prompt: Prompt) -> list[int]:
    return sorted({p for segment in prompt.of_kind("image") for p in segment.positions})


def _late(found: Result, first_layer: int = 2) -> xr.Dataset:
    return found.data.isel(layer=slice(first_layer, None))


def _in_dimensions(found: Result, discovery: Any, claim: Any, details: dict) -> None:
    """Of the 1 % most attended image tokens of a picture, how many have phi at tau?"""
    late = _late(found)
    shares = []
    for number in range(found.data.sizes["prompt"]):
        one = late.isel(prompt=number)
        image = np.flatnonzero(one["kind"].values == "image")
        received = one["received"].values[:, image].mean(0)
        top = image[np.argsort(-received)[: max(1, round(0.01 * len(image)))]]
        shares.append(float(one["is_sink"].values[:, top].any(0).mean()))
    share = float(late["is_sink"].where(late["kind"] == "image").any("layer").sum()
                  / (late["kind"] == "image").sum())
    null = discovery.null
    claim(0, statistics.mean(shares), null=share, details={
        **details, "share of all image tokens that are sinks": share,
        "dimensions": list(discovery.found.dims),
        "permutation p": None if null is None else null.p}, figure="scatter",
        statistic="share of the most attended image tokens with phi at tau")


def _spectrum(model: Any, data: list[Case], dims: Sequence[int], out: Output) -> None:
    layer = max(visual.band(model.n_layers), default=model.n_layers - 1)
    site, best = f"resid_pre.{layer}", -1.0
    for case in data[:8]:
        x = model.run(case.prompt, read=site, logits="none").reads[site].values[0, 0]
        one = np.abs(x) / np.sqrt((x**2).mean(-1, keepdims=True) + visual.EPSILON)
        here = _image(case.prompt)
        peaks = (one[here][:, list(dims)] if dims else one[here]).max(-1)
        if peaks.max() > best:
            best, size, image = peaks.max(), one, here
            strongest = here[int(peaks.argmax())]
    figure, axes = canvas(1, 3, width=PAGE, height=2.0, sharey=True)
    rows = {"first token": (size[0], "primary"),
            "strongest image token": (size[strongest], "visual"),
            "median image token": (np.median(size[image], 0), "image")}
    for ax, (name, (row, role)) in zip(axes, rows.items()):
        ax.vlines(np.arange(len(row)), 0, row, color=color(role), linewidth=0.8)
        for d in dims:
            ax.annotate(str(d), (d, row[d]), fontsize=6, ha="center", va="bottom")
        ax.axhline(visual.portable_tau(model.d_model), color="black", linestyle=":", linewidth=0.8)
        ax.set_title(name)
        ax.set_xlabel("residual coordinate")
    axes[0].set_ylabel("|x| / RMS")
    figure.suptitle(f"{model.name}, entering layer {layer}")
    out.figure("spectrum", figure, of=model.name)


def _scatter(model: Any, found: Result, out: Output) -> None:
    late = _late(found).mean("layer")
    figure, ax = canvas(1, 1)
    for kind, role in (("text", "text"), ("image", "image")):
        here = (late["kind"] == kind) if "kind" in late else None
        here = found.data["kind"] == kind if here is None else here
        ax.scatter(late["phi"].where(here).values.ravel(), late["received"].where(here).values.ravel(),
                   s=5, alpha=0.5, color=color(role), label=kind, linewidths=0)
    ax.axvline(found.manifest["tau"], color="black", linestyle=":", linewidth=0.8)
    ax.set_xlabel("phi, mean over layers from 2 on")
    ax.set_ylabel("attention received")
    ax.set_yscale("log")
    ax.legend()
    ax.set_title(model.name)
    out.figure("scatter", figure, of=model.name)


def _same_cells(
    model: Any, data: list[Case], dims: Sequence[int], claim: Any, settings: Settings
) -> None:
    """Overlap of the sink cells of one picture under two questions, against two pictures."""
    rng = settings.rng(4)
    sets, others = [], []
    for case in data[: settings.pick(32, tiny=6)]:
        asked = [q for q in scenes.questions(case.scene, rng, tasks=TASKS)
                 if q.text != case.question.text]
        if not asked:
            continue
        chat = bool(getattr(model.tokenizer, "chat_template", None)
                    or getattr(model.processor, "chat_template", None))
        prompt = model.prompt(asked[0].text, images=[case.picture], chat=chat)
        pair = []
        for one in (case.prompt, prompt):
            found = visual.measure(model, [one], dims)
            by_layer = visual.sinks_by_layer(found, image_only=True)
            start = min(_image(one))
            pair.append({p - start for places in by_layer.values() for p in places})
        sets.append(pair)
    if len(sets) < 5:
        claim(1, f"only {len(sets)} pictures with visual sinks have a second question (5 are "
              "needed)")
        return
    same = [_jaccard(a, b) for a, b in sets]
    others = [_jaccard(sets[i][0], sets[(i + 1) % len(sets)][0]) for i in range(len(sets))]
    claim(1, statistics.difference(same, others), null=0.0, details={
        "Jaccard, same picture": float(np.mean(same)),
        "Jaccard, other picture": float(np.mean(others))},
        statistic="Jaccard of sink cells: same picture and other question, minus other picture")


def _jaccard(a: set, b: set) -> float:
    return len(a & b) / len(a | b) if a | b else 1.0


def _birth(found: Result, claim: Any, model: Any) -> None:
    """Share of visual sinks that are still sinks at 80 % of the depth."""
    last = max(visual.band(model.n_layers), default=model.n_layers - 1)
    shares, births = [], []
    for number in range(found.data.sizes["prompt"]):
        one = found.data.isel(prompt=number)
        flags = one["is_sink"].values.astype(bool) & (one["kind"].values == "image")
        ever = flags[2 : last + 1].any(0)
        if not ever.any():
            continue
        births += flags[:, ever].argmax(0).tolist()
        alive = [flags[first : last + 1, p].mean() for p, first in
                 zip(np.flatnonzero(ever), flags[:, ever].argmax(0)) if first <= last]
        shares.append(float(np.mean(alive)))
    claim(2, statistics.mean(shares) if shares else
          f"no visual sink of {model.name} is born before layer {last}", null=0.9, figure="birth",
          details={"birth layer, median": float(np.median(births)) if births else None,
                   "birth layers": sorted(set(births))},
          statistic="share of the layers from birth to 80 % depth in which a visual sink stays one")


def _hidden(model: Any, data: list[Case], found: Result, claim: Any, settings: Settings,
            out: Output) -> None:
    answers = [case.answer for case in data]
    result = visual.intervene(model, [c.prompt for c in data], found, answers, seed=settings.seed)
    out.save(f"hiding-{model.name}", result)
    score = {c: result["log_probability"].sel(condition=c).values
             for c in result.data["condition"].values}
    right = result["correct"]
    baseline = float(right.sel(condition="untouched").mean())
    figure, axes = canvas(1, 2, width=PAGE, height=2.3)
    names = [str(c) for c in result.data["condition"].values]
    roles = [color("text"), color("visual"), color("control"), color("control")]
    for ax, key, label in ((axes[0], "correct", "accuracy (first answer token)"),
                           (axes[1], "log_probability", "log-probability\nof the answer (nats)")):
        values = [result[key].sel(condition=n).values for n in names]
        ax.bar(range(4), [v.mean() for v in values], color=roles,
               yerr=[1.96 * v.std() / np.sqrt(len(v)) for v in values])
        ax.set_xticks(range(4), ["untouched", "sinks", "random", "matched on\nattention"])
        ax.set_ylabel(label)
    note(axes[1], f"mean, 95 % intervals (normal), n = {result.data.sizes['prompt']} pictures")
    figure.suptitle(f"{model.name}: image tokens hidden from the text")
    out.figure("hiding", figure, of=model.name)
    more = {"unit": "nats", "causal": True, "figure": "hiding", "details": {
        "baseline accuracy": baseline,
        "accuracy without sinks": float(right.sel(condition="sinks").mean()),
        "accuracy without random": float(right.sel(condition="random").mean()),
        "tokens hidden, mean": float(result["hidden"].mean())}}
    if baseline < 0.3:
        for index in (3, 4):
            out.claim(Claim.untestable(
                CLAIMS[index], SOURCE, f"{model.name} answers only {baseline:.0%} of the "
                "questions, so nothing can be lost"), model.name)
        return
    claim(3, statistics.difference(score["sinks"], score["untouched"]), null=0.0,
          direction="equal", tolerance=0.05, control="as many random image tokens", **more)
    strongest = np.maximum(score["random"], score["attention-matched"])
    claim(4, statistics.difference(score["sinks"], strongest), null=0.0,
          control="the milder of random and attention-matched image tokens", **more)


def _contribution(model: Any, found: Result, claim: Any, out: Output) -> None:
    late = _late(found)
    image = late["kind"] == "image"
    groups = {"visual sinks": image & late["is_sink"].astype(bool),
              "other image tokens": image & ~late["is_sink"].astype(bool)}
    means = {
        key: {name: late[key].where(here).mean(("layer", "position")).values
              for name, here in groups.items()} for key in ("received", "contribution")}
    figure, axes = canvas(1, 2, width=PAGE, height=2.2)
    for ax, (key, label) in zip(axes, (("received", "attention received"),
                                       ("contribution", "attention x value norm"))):
        ax.boxplot([v[np.isfinite(v)] for v in means[key].values()], widths=0.5,
                   medianprops={"color": "black"})
        ax.set_xticks([1, 2], list(groups))
        ax.set_ylabel(label)
    figure.suptitle(model.name)
    out.figure("contribution", figure, of=model.name)
    sink, other = means["contribution"]["visual sinks"], means["contribution"]["other image tokens"]
    ratio = sink / other
    known = np.isfinite(ratio)
    attended = means["received"]["visual sinks"] / means["received"]["other image tokens"]
    claim(5, statistics.mean(ratio[known]) if known.any() else
          f"every image token of {model.name} is a visual sink somewhere, or attention says "
          "nothing about them", null=1.0, direction="below", figure="contribution", unit="times",
          details={"attention received, ratio": float(np.mean(attended[known]))},
          statistic="attention x value norm, visual sinks over other image tokens")


def _places(model: Any, data: list[Case], found: Result, claim: Any, out: Output) -> None:
    """Where the sinks lie: on the pictures, and on background more often than chance."""
    rows = []
    for number, case in enumerate(data):
        segment = case.prompt.of_kind("image")[0]
        if not segment.boxes:
            continue
        scale = case.picture.size[0] / case.scene.pixels.shape[1]
        covered: set[int] = set()
        for thing in case.scene.objects:
            for box in thing.boxes:
                covered |= set(segment.inside(tuple(scale * x for x in box), 0.1))
        background = [p for p in segment.positions if p not in covered]
        sinks = {p for places in visual.sinks_by_layer(found, number, image_only=True).values()
                 for p in places}
        rows.append((len(sinks & set(background)) / len(sinks),
                     len(background) / len(segment.positions)))
    if len(rows) < 5:
        _give_up(model.name, "the processor gives no pixel boxes for its tokens", out,
                 ("background", "overlay"), (6,))
        return
    sink_share, share = np.array(rows).T
    figure, ax = canvas(1, 1)
    ax.bar(["visual sinks", "all image tokens"], [sink_share.mean(), share.mean()],
           yerr=[1.96 * x.std() / np.sqrt(len(x)) for x in (sink_share, share)],
           color=[color("visual"), color("control")])
    ax.set_ylabel("share on background")
    ax.set_ylim(0, 1)
    ax.set_title(model.name)
    note(ax, f"mean, 95 % intervals (normal), n = {len(rows)} pictures")
    out.figure("background", figure, of=model.name)
    claim(6, statistics.difference(sink_share, share), null=0.0, figure="background", details={
        "sinks on background": float(sink_share.mean()), "background": float(share.mean())},
        statistic="share of sinks on background minus the picture's background share (lift)")
    shown = data[:3]
    figure, axes = canvas(1, len(shown), width=PAGE, height=2.4)
    for number, (ax, case) in enumerate(zip(np.atleast_1d(axes), shown)):
        segment = case.prompt.of_kind("image")[0]
        received = _late(found).isel(prompt=number)["received"].mean("layer").values
        sinks = {p for places in visual.sinks_by_layer(found, number, image_only=True).values()
                 for p in places}
        image_overlay.draw(ax, case.picture, segment, received[list(segment.positions)],
                           label="attention received", mark={p: "visual" for p in sinks})
        if ax.get_legend() is not None:
            # The caption says what the outline means; there is no room above a question.
            ax.get_legend().remove()
        ax.set_title(textwrap.fill(case.question.text.replace(" ?", "?"), 28), fontsize=7)
    figure.suptitle(model.name)
    out.figure("overlay", figure, of=model.name)


def _heads(model: Any, data: list[Case], found: Result, claim: Any, out: Output) -> Result:
    sinks = [visual.sinks_by_layer(found, i) for i in range(len(data))]
    prompts = [case.prompt for case in data]
    centered = image_centric.measure(model, prompts, sinks)
    out.save(f"heads-{model.name}", centered)
    figure, ax = canvas(1, 1)
    image_centric.draw(centered, ax)
    ax.set_title(model.name)
    out.figure("heads", figure, of=model.name)
    values = []
    boxes = [_object(case) for case in data]
    usable = [i for i, places in enumerate(boxes) if places]
    if len(usable) >= 5:
        picked = [prompts[i] for i in usable]
        mass = model.run(
            picked, stats=[PerLayer("segments", lambda n, _: SegmentMass({"object": boxes[usable[n]]}))],
            logits="none").stats["segments"].sel(segment="object", drop=True)
        for row, i in enumerate(usable):
            last = len(prompts[i]) - 1
            share = centered["nonsink_share"].isel(prompt=i, query=last).values[2:].ravel()
            total = centered["image_mass"].isel(prompt=i, query=last).values[2:].ravel()
            here = mass.isel(prompt=row, query=last).values[2:].ravel()
            fit = np.isfinite(share) & (total >= 0.05)
            if fit.sum() >= 5 and np.ptp(share[fit]) > 0:
                a, b = (np.argsort(np.argsort(x[fit])) for x in (share, here / np.maximum(total, 1e-9)))
                values.append(float(np.corrcoef(a, b)[0, 1]))
    values = [v for v in values if np.isfinite(v)]
    if len(values) < 5:
        _give_up(model.name, "fewer than 5 pictures have heads with enough attention on the image "
                 "and a boxed object that is asked for", out, (), (7,))
    else:
        claim(7, statistics.mean(values), null=0.0, figure="heads", unit="Spearman over heads",
              statistic="non-sink share against the object's share of the image attention, "
              "mean over pictures")
    return centered


def _object(case: Case) -> list[int]:
    """Image tokens on the object that is asked for."""
    segment = case.prompt.of_kind("image")[0]
    if not segment.boxes:
        return []
    scale = case.picture.size[0] / case.scene.pixels.shape[1]
    return sorted({p for box in case.question.boxes
                   for p in segment.inside(tuple(scale * x for x in box), 0.1)})


def _redistribution(
    model: Any, data: list[Case], found: Result, centered: Result, claim: Any,
    settings: Settings, out: Output,
) -> None:
    """VAR with the paper's p and rho, without a choice of heads, and to other destinations."""
    plans: dict[str, dict[str, Any]] = {
        "image, chosen heads": {},
        "image, all heads": {"min_nonsink_share": None, "min_image_mass": None},
        "image and text": {"destination": "all"},
        "text": {"destination": "after image"},
    }
    gains: dict[str, list[float]] = {name: [] for name in plans}
    right: dict[str, list[float]] = {name: [] for name in ("untouched", *plans)}
    chosen = data[: settings.pick(48, tiny=6)]
    # The paper leaves out the last layer and those before sinks exist.
    early = range(2, model.n_layers - 1)
    if not any(k in early for i in range(len(chosen)) for k in visual.sinks_by_layer(found, i)):
        _give_up(model.name, f"{model.name} has no sinks between layer 2 and its last, "
                 f"{model.n_layers - 1}, which is left out", out, ("redistribution",), (8, 9, 10))
        return
    for number, case in enumerate(chosen):
        later = visual.after_image(case.prompt)
        prompt = case.prompt.with_segments(**{"after image": list(later)})
        sinks = {k: v for k, v in visual.sinks_by_layer(found, number).items() if k in early}
        base = model.run(prompt, logits="last").logits[0][-1].log_softmax(-1)
        right["untouched"].append(float(int(base.argmax()) == case.answer))
        for name, more in plans.items():
            given = {"destination": "image", "min_nonsink_share": 0.5, "min_image_mass": 0.2, **more}
            edit = interp.redistribute(sinks, given.pop("destination"), 0.6, queries=later, **given)
            row = model.run(prompt, write=edit, logits="last").logits[0][-1].log_softmax(-1)
            gains[name].append(float(row[case.answer] - base[case.answer]))
            right[name].append(float(int(row.argmax()) == case.answer))
    figure, ax = canvas(1, 1, width=PAGE * 0.6)
    ax.boxplot(list(gains.values()), widths=0.5, medianprops={"color": "black"}, showfliers=False)
    beside = settings.rng(7)
    for x, values in enumerate(gains.values(), 1):
        # Where most questions do not change, the box is a line; the dots show the others.
        ax.plot(x + beside.uniform(-0.2, 0.2, len(values)), values, "o", markersize=3, alpha=0.5,
                markeredgewidth=0, color=color("visual"))
    ax.set_xticks(range(1, len(plans) + 1), [n.replace(", ", "\n") for n in plans])
    ax.axhline(0, color=color("control"), linewidth=0.8)
    ax.set_ylabel("change of log-probability (nats)")
    ax.set_title(model.name)
    note(ax, "60 % of the attention on sinks is moved (p = 0.6); chosen heads: at least half of their "
             "image\nattention is off the sinks (rho = 0.5); one dot per question")
    out.figure("redistribution", figure, of=model.name)
    more = {"unit": "nats", "figure": "redistribution", "causal": True, "details": {
        "accuracy": {name: float(np.mean(v)) for name, v in right.items()},
        "heads chosen, share of (head, query)": float(centered["rate"].mean())}}
    claim(8, statistics.mean(gains["image, chosen heads"]), null=0.0,
          control="the same model without the edit, paired", **more)
    claim(9, statistics.mean(gains["image, all heads"]), null=0.0, direction="below",
          control="the same edit in chosen heads only, previous claim", **more)
    claim(10, statistics.difference(gains["image, chosen heads"], gains["text"]), null=0.0,
          control="the same edit with the text after the image as destination", **more)
