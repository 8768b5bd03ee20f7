"""Active-dormant heads (arXiv:2410.13835): sink, value drain and residual peak come together.

On the Bigram-Backcopy models everything about the task is known: which queries give a head work,
and the best possible loss. On any other decoder the same measures run on short texts of two domains.
"""

import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import xarray as xr

import interp
from experiments._output import Output
from experiments._paper import Paper, Settings
from experiments._texts import code, knows, prose
from interp.core import Claim, Prompt, Result, statistics
from interp.figures import heat, layer_curve
from interp.figures.style import PAGE, canvas, color
from interp.organisms import backcopy
from interp.organisms.train import train
from interp.sinks import active_dormant

PAPER = Paper(
    "active_dormant",
    "Active-Dormant Attention Heads",
    ("2410.13835",),
    "When does a head rest on the first token, and what else happens to that token?",
    figures={
        "attention": "Attention of one prompt, heads averaged. Queries with work to do (after a "
        "trigger) look elsewhere; all others rest on the first token.",
        "norms": "Value norms and residual norms of the first token against the other tokens.",
        "components": "Height of the residual peak with the attention or the MLP of one block "
        "zeroed, as a share of the untouched peak.",
        "domains": "Heads by how much more they rest on the first token in one domain than in "
        "the other (halves of the samples not used to choose them).",
        "dynamics": "Training from scratch: risks, logit gap, value and residual norm of the "
        "first token, for softmax and ReLU attention, AdamW and SGD (--train).",
    },
    models=("backcopy-1l", "backcopy-3l"),
    trains=True,
)
SOURCE = PAPER.sources[0]

def run(settings: Settings, out: Output) -> None:
    for name in settings.models(PAPER):
        model = interp.open_model(name, **settings.opening())
        if knows(model, backcopy):
            _task(model, settings, out)
        else:
            _any(model, settings, out)
    if settings.train:
        _train(settings, out)
    else:
        _without_training(out)


# -- the task, where all is known ------------------------------------------------------------


def _task(model: Any, settings: Settings, out: Output) -> None:
    count, length = settings.pick((48, 128), tiny=(8, 32))
    tokens, trigger = backcopy.sample(settings.rng(1), count, length)
    trigger[:, 0] = False
    prompts = [Prompt.from_tokens(row) for row in tokens]
    found = active_dormant.measure(
        model, prompts, [np.flatnonzero(row).tolist() for row in trigger])
    out.record(model, prompts, f"backcopy-{model.name}")
    out.save(f"measures-{model.name}", found)

    first, work = found["first"].values, found["is_active"].values
    resting = active_dormant.dormancy(first, ~work).numpy()
    working = active_dormant.dormancy(first, work).numpy()
    # The sink head is chosen on one half of the prompts and judged on the other.
    choose, judge = slice(0, None, 2), slice(1, None, 2)
    layer, head = np.unravel_index(np.nanmean(resting[choose], 0).argmax(), resting.shape[1:])
    at = f"L{layer}H{head}"

    def claim(sentence: str, estimate: Any, **more: Any) -> None:
        out.claim(Claim(sentence, SOURCE, **{**estimate.for_claim(), **more}), model.name)

    claim("The sink head rests on the first token where it has nothing to do.",
          statistics.mean(resting[judge, layer, head]), null=0.9, figure="attention",
          details={"head": at, "alpha": "mean attention to token 0 over non-trigger queries"})
    claim("The same head leaves the first token where it has to copy.",
          statistics.mean(working[judge, layer, head]), null=0.1, direction="below",
          figure="attention", details={"head": at})
    _risks(model, tokens, claim, settings)

    gap = found["gap"].values[:, layer, head]
    gap = np.where(work, np.nan, gap)
    claim("At resting queries the first key's logit stands above the others'.",
          statistics.mean(np.nanmean(gap, -1)[judge]), null=0.0, unit="nats", figure="norms",
          paper_number="18.93 (two blocks)", paper_tag="code", details={"head": at})
    drain = active_dormant.first_over_others(found["value_norm"].mean("kv_head")).values
    claim("The value of the first token is drained in the sink block.",
          statistics.mean(drain[judge, layer]), null=0.5, direction="below", figure="norms",
          statistic="norm of v at token 0 / mean of the others", details={"layer": int(layer)})
    if model.n_layers < 2:
        out.claim(Claim.untestable(
            "The residual stream of the first token peaks where it enters the sink block.", SOURCE,
            "the model has one block, and nothing before it could make a peak",
            paper_number="106.1 (two blocks)", paper_tag="code"), model.name)
    else:
        ratio = active_dormant.first_over_others(found["peak_in"]).values[judge, layer]
        claim("The residual stream of the first token peaks where it enters the sink block.",
              statistics.mean(ratio), null=1.2, figure="norms",
              paper_number="gap 106.1 (two blocks)", paper_tag="code",
              statistic="norm at token 0 / mean of the others", details={"layer": int(layer)})
    _draw(model, found, out, prompts[0])
    _components(model, prompts[: settings.pick(16, tiny=4)], out)
    busy, idle = _two_domains(settings, *settings.pick((24, 96), tiny=(8, 32)))
    _domains(model, {"with triggers": busy, "without triggers": idle}, out)


def _risks(model: Any, tokens: np.ndarray, claim: Any, settings: Settings) -> None:
    """Loss at its best possible level, and what each part of the last block is for."""
    every = [(layer, head) for layer in range(model.n_layers) for head in range(model.n_heads)]
    edits = {
        "untouched": (),
        "attention": (interp.ablate(every),),
        "MLP": tuple(interp.edit(f"mlp_out.{i}", "multiply", 0.0) for i in range(model.n_layers)),
    }
    rows: dict[str, list[dict[str, float]]] = {}
    for name, write in edits.items():
        run = model.run([Prompt.from_tokens(row) for row in tokens], write=write)
        rows[name] = [
            backcopy.risks(logits[None], torch.tensor(row)[None])
            for logits, row in zip(run.logits, tokens)
        ]

    def column(name: str, key: str) -> np.ndarray:
        return np.array([row[key] for row in rows[name]])

    # A short prompt may have no trigger at all, and then no copy risk.
    both = np.isfinite(column("untouched", "copy"))
    claim("The loss after ordinary symbols reaches that of the chain itself.",
          statistics.mean(column("untouched", "bigram_excess")), null=0.0, direction="equal",
          tolerance=0.05, unit="nats above the oracle", paper_number="2.2299 (oracle 2.2299)",
          paper_tag="code")
    claim("The loss after triggers nearly vanishes.",
          statistics.mean(column("untouched", "copy")[both]), null=0.05, direction="below",
          unit="nats", paper_number="5.5e-06 after 100,000 steps (one block)", paper_tag="code")
    gone = column("attention", "copy")[both] - column("untouched", "copy")[both]
    claim("Removing attention causes the copying to fail.", statistics.mean(gone), null=1.0,
          unit="nats", paper_number="copy risk 7.69", paper_tag="code", causal=True,
          control="the change of the bigram risk under the same edit, next claim")
    lost = column("attention", "bigram") - column("untouched", "bigram")
    claim("Removing attention leaves ordinary prediction as it was.", statistics.mean(lost),
          null=0.0, direction="equal", tolerance=0.2, unit="nats", paper_number="unchanged",
          paper_tag="code", causal=True, control="the copy risk under the same edit")
    lost = column("MLP", "bigram") - column("untouched", "bigram")
    claim("Removing the MLP causes ordinary prediction to fail.", statistics.mean(lost), null=0.2,
          unit="nats", paper_number="4.21 against 2.23", paper_tag="code", causal=True,
          control="removing attention instead, previous claim")


def _two_domains(settings: Settings, count: int, length: int) -> tuple[list[Prompt], list[Prompt]]:
    """Ordinary sequences, and sequences of the same chain in which no trigger occurs."""
    busy, _ = backcopy.sample(settings.rng(2), count, length)
    chain, rng = backcopy.chain(), settings.rng(3)
    quiet = chain.bigram.copy()
    quiet[:, : len(backcopy.TRIGGERS)] = 0.0
    quiet /= quiet.sum(1, keepdims=True)
    idle = np.full((count, length), backcopy.BOS)
    for row in idle:
        row[1] = rng.choice(len(chain.first), p=chain.first)
        for i in range(2, length):
            row[i] = rng.choice(len(quiet), p=quiet[row[i - 1]])
    return [Prompt.from_tokens(r) for r in busy], [Prompt.from_tokens(r) for r in idle]


# -- any decoder ------------------------------------------------------------------------------


def _any(model: Any, settings: Settings, out: Output) -> None:
    if model.kind != "decoder" or model.tokenizer is None:
        reason = (f"{model.name} is an encoder: every query sees every key, so no key is first"
                  if model.kind != "decoder" else f"{model.name} has no tokenizer for texts")
        for name in ("attention", "norms", "components", "domains"):
            out.no_figure(name, reason, of=model.name)
        out.claim(Claim.untestable("Heads rest on the first token.", SOURCE, reason), model.name)
        return
    count = settings.pick(24, tiny=8)
    rng = settings.rng(4)
    texts = {"code": [code(rng) for _ in range(count)], "prose": [prose(rng) for _ in range(count)]}
    domains = {name: [model.prompt(text) for text in many] for name, many in texts.items()}
    # Equal lengths: the first token's share depends on how many keys there are.
    shortest = min(len(p) for many in domains.values() for p in many)
    domains = {name: [_cut(p, min(shortest, 64)) for p in many] for name, many in domains.items()}
    prompts = domains["prose"]
    found = active_dormant.measure(model, prompts)
    out.record(model, prompts, f"prose-{model.name}")
    out.save(f"measures-{model.name}", found)

    def claim(sentence: str, estimate: Any, **more: Any) -> None:
        out.claim(Claim(sentence, SOURCE, **{**estimate.for_claim(), **more}), model.name)

    resting = active_dormant.dormancy(found["first"].values).numpy()
    choose, judge = slice(0, None, 2), slice(1, None, 2)
    layer, head = np.unravel_index(np.nanmean(resting[choose], 0).argmax(), resting.shape[1:])
    chance = float(np.mean(1 / np.arange(2, found["first"].sizes["query"] + 1)))
    claim("Some head rests on the first token.",
          statistics.mean(resting[judge, layer, head]), null=max(0.5, chance), figure="attention",
          details={"head": f"L{layer}H{head}", "uniform attention": chance})
    drain = active_dormant.first_over_others(found["value_norm"].mean("kv_head")).values
    claim("The value of the first token is drained in the sink block.",
          statistics.mean(drain[judge, layer]), null=0.5, direction="below", figure="norms",
          paper_number="0.05 against 0.08 to 0.46 (Llama-3.1-8B, L0H31)", paper_tag="code")
    _draw(model, found, out, prompts[0])
    _components(model, prompts[: settings.pick(8, tiny=4)], out)
    _domains(model, domains, out)


def _cut(prompt: Prompt, length: int) -> Prompt:
    return Prompt(prompt.ids[:length], tokens=prompt.tokens[:length])


def _components(model: Any, prompts: Sequence[Prompt], out: Output) -> None:
    sentence = "The MLPs of early blocks cause the residual peak of the first token."
    if model.n_layers < 2:
        reason = "the model has one block, and nothing before it could make a peak"
        out.no_figure("components", reason, of=model.name)
        out.claim(Claim.untestable(sentence, SOURCE, reason), model.name)
        return
    found = active_dormant.intervene(model, prompts)
    out.save(f"components-{model.name}", found)
    share = found["peak"] / found["baseline"]
    figure, ax = canvas(1, 1)
    curves = {name: share.sel(component=name) for name in ("MLP", "attention")}
    layer_curve.draw(ax, curves, label="residual peak / untouched peak", x="block zeroed",
                     roles={"MLP": "primary", "attention": "control"})
    ax.axhline(active_dormant.NEEDED_BELOW, color=color("control"), linewidth=0.8, linestyle=":")
    ax.set_title(f"{model.name}: peak leaving block {found.manifest['read_layer']}")
    out.figure("components", figure, of=model.name)
    ratio = float(active_dormant.first_over_others(_peaks(model, prompts, found)).mean())
    if ratio < 1.2:
        out.claim(Claim.untestable(
            sentence, SOURCE, f"there is no peak to explain: at its highest the first token's "
            f"norm is {ratio:.2f} times the others'"), model.name)
        return
    mlp = share.sel(component="MLP").mean("prompt").argmin().item()
    control = share.sel(component="attention").isel(layer=mlp)
    removed = share.sel(component="MLP").isel(layer=mlp)
    estimate = statistics.difference(removed.values, control.values)
    out.claim(Claim(
        sentence, SOURCE, **estimate.for_claim(), null=0.0, direction="below", causal=True,
        control=f"zeroing the attention of the same block {mlp}", figure="components",
        unit="share of the peak", paper_number="496 to 27-34 (MLP 0 or 1), 500 (attention)",
        paper_tag="code", details={
            "block": mlp, "peak without this MLP": float(removed.mean()),
            "peak without this attention": float(control.mean()),
            "needed (below 20 %)": [
                f"{c} {layer}" for c in ("attention", "MLP") for layer in range(model.n_layers)
                if bool(found["needed"].sel(component=c, layer=layer))]}), model.name)


def _peaks(model: Any, prompts: Sequence[Prompt], found: Result) -> xr.DataArray:
    site = f"resid_post.{found.manifest['read_layer']}"
    read = model.run(prompts, read=site, logits="none").reads[site].isel(layer=0)
    return (read**2).sum("d_model", skipna=False) ** 0.5


def _domains(model: Any, domains: dict[str, list[Prompt]], out: Output) -> None:
    scores = {}
    for name, prompts in domains.items():
        first = active_dormant.measure(model, prompts)["first"].values
        scores[name] = active_dormant.dormancy(first).numpy()
    found = active_dormant.domain_heads(scores)
    out.save(f"domains-{model.name}", found)
    a, b = found.manifest["domains"]
    figure, ax = canvas(1, 1)
    heat.draw(ax, found["difference"], label=f"rest on token 0: {a} minus {b}", signed=True)
    ax.set_title(f"{model.name}: {a} against {b}")
    out.figure("domains", figure, of=model.name)
    sentence = "A head rests in one domain and works in the other."
    chosen = found["chosen"].values
    if not chosen.any():
        out.claim(Claim.untestable(
            sentence, SOURCE, f"no head of {model.name} differs by more than "
            f"{found.manifest['gap']} between {a} and {b} in the half used to choose"), model.name)
        return
    gaps = np.abs(np.nanmean(scores[a][::2], 0) - np.nanmean(scores[b][::2], 0))
    layer, head = np.unravel_index(np.where(chosen, gaps, -1).argmax(), gaps.shape)
    sign = np.sign(np.nanmean(scores[a][::2, layer, head]) - np.nanmean(scores[b][::2, layer, head]))
    one, two = scores[a][1::2, layer, head], scores[b][1::2, layer, head]
    estimate = statistics.difference(sign * one, sign * two)
    out.claim(Claim(
        sentence, SOURCE, **estimate.for_claim(), null=0.0, figure="domains",
        paper_number="L16H25 of Llama-2-7B: code against prose", paper_tag="code",
        details={"head": f"L{layer}H{head}", "domains": [a, b],
                 "auc": float(found["auc"].values[layer, head]),
                 "permutation p": float(found["p"].values[layer, head]),
                 "heads chosen": int(chosen.sum())}), model.name)


# -- figures ----------------------------------------------------------------------------------


def _draw(model: Any, found: Result, out: Output, prompt: Prompt) -> None:
    n = min(len(prompt), 40)
    short = Prompt(prompt.ids[:n])
    pattern = model.run(short, read="pattern", logits="none").reads["pattern"]
    shown = sorted({0, model.n_layers // 2, model.n_layers - 1})
    figure, axes = canvas(1, len(shown), width=PAGE if len(shown) > 1 else 3.4)
    for ax, layer in zip(np.atleast_1d(axes), shown):
        heat.draw(ax, pattern.isel(prompt=0).sel(layer=layer).mean("head"), upward=False,
                  label="attention", limits=(0, 1), bar=layer == shown[-1])
        ax.set_title(f"{model.name}, layer {layer}")
    out.figure("attention", figure, of=model.name)
    figure, axes = canvas(1, 3, width=PAGE)
    many = found.data.sizes["layer"] > 1
    for ax, quantity in zip(axes, ("value", "peak")):
        if many:
            active_dormant.draw(found, ax, quantity)
        else:
            _bars(ax, found, quantity)
    gap = found["gap"].mean("head").isel(layer=-1)
    work = found.data.get("is_active")
    groups = {"all queries": np.ones(gap.shape, bool)} if work is None else {
        "resting": ~work.values, "copying": work.values}
    for (name, chosen), role in zip(groups.items(), ("primary", "control")):
        values = np.where(chosen, gap.values, np.nan)
        axes[2].hist(values[np.isfinite(values)], bins=40, density=True, alpha=0.7,
                     color=color(role), label=name)
    axes[2].set_xlabel("logit gap of token 0 (nats)")
    axes[2].set_ylabel("density")
    axes[2].margins(y=0.25)
    axes[2].legend(loc="upper left")
    out.figure("norms", figure, of=model.name)


def _bars(ax: Any, found: Result, quantity: str) -> None:
    """A one-layer model has no curve over layers: first token against the others, as bars."""
    name, label = {"value": ("value_norm", "norm of the value"),
                   "peak": ("peak", "residual norm")}[quantity]
    norms = found[name].isel(layer=0)
    norms = norms.mean("kv_head") if "kv_head" in norms.dims else norms
    parts = [norms.isel(position=0).values, norms.isel(position=slice(1, None)).mean("position")]
    ax.bar(["first token", "others"], [np.mean(p) for p in parts],
           yerr=[np.std(p) for p in parts], color=[color("primary"), color("control")])
    ax.set_ylabel(label)


# -- training from scratch ----------------------------------------------------------------------

DYNAMIC = (
    "The sink appears in a phase change early in training.",
    "After that the logit gap grows with the logarithm of time.",
    "ReLU attention learns the task without a sink.",
    "SGD keeps the sink.",
    "Without a first token that is always the same, no sink appears.",
)


def _without_training(out: Output) -> None:
    reason = "it is about training; run with --train (some minutes)"
    out.no_figure("dynamics", reason)
    for sentence in DYNAMIC:
        out.claim(Claim.untestable(sentence, SOURCE, reason))


def _train(settings: Settings, out: Output) -> None:
    """One block from scratch, as in the method card: d 64, 64 tokens, batch 64, 600 steps."""
    small = settings.pick(dict(d_model=64, length=64, batch=64, steps=600),
                          tiny=dict(d_model=32, length=24, batch=16, steps=60))
    variants = {
        "softmax, AdamW": dict(lr=3e-3), "ReLU, AdamW": dict(lr=3e-3, attention="relu"),
        "softmax, SGD": dict(lr=3e-1, optimizer="sgd"),
        "softmax, no first token": dict(lr=3e-3, bos=False),
    }
    every = settings.pick(20, tiny=10)
    curves: dict[str, list[dict[str, float]]] = {}
    for name, given in variants.items():
        recipe = backcopy.recipe(layers=1, schedule="constant", **small, **given)  # type: ignore[arg-type]
        rows = curves[name] = []

        def watch(step: int, model: Any, loss: float, rows: list = rows, given: dict = given) -> None:
            if step % every:
                return
            bos = given.get("bos", True)
            with torch.no_grad():
                seen = backcopy.observe(model, settings.seed, length=small["length"], bos=bos,
                                        count=8)
                tokens, _ = backcopy.sample(settings.rng(6), 16, small["length"], bos=bos)
                ids = torch.tensor(tokens, device=model.device)
                risks = backcopy.risks(model(input_ids=ids, use_cache=False).logits, ids)
            rows.append({"step": step, **seen, **risks})

        with tempfile.TemporaryDirectory() as folder:
            train(recipe, Path(folder), seed=settings.seed, resume=False, on_step=watch,
                  device=settings.device)
    data = xr.concat(
        [xr.Dataset({k: ("step", [r[k] for r in rows]) for k in rows[0] if k != "step"},
                    {"step": [r["step"] for r in rows]}) for rows in curves.values()],
        dim=xr.DataArray(list(curves), dims="variant", name="variant"))
    out.save("dynamics", Result(data, {"steps": small["steps"], "seed": settings.seed}))
    _draw_dynamics(data, out)
    _dynamic_claims(data, out, small["steps"])


SINK = "layer_0_first_token_attention_non_trigger"


def _draw_dynamics(data: xr.Dataset, out: Output) -> None:
    figure, axes = canvas(1, 4, width=PAGE, height=2.0)
    panels = (("copy", "copy risk (nats)"), (SINK, "attention to token 0, resting"),
              ("layer_0_value_norm_ratio", "value norm, token 0 / others"),
              ("bigram_excess", "bigram risk above the oracle (nats)"))
    for ax, (key, label) in zip(axes, panels):
        for variant in data.variant.values:
            ax.plot(data.step, data[key].sel(variant=variant), label=str(variant))
        ax.set_xscale("log")
        ax.set_xlabel("step")
        ax.set_ylabel(label)
    for ax in (axes[0], axes[3]):
        ax.set_yscale("log")
    axes[0].legend(fontsize=5)
    out.figure("dynamics", figure)


def _dynamic_claims(data: xr.Dataset, out: Output, steps: int) -> None:
    """Late averages of one run each: the samples are checkpoints, so intervals are narrow ones."""
    late = data.isel(step=slice(-max(5, data.sizes["step"] // 4), None))

    def series(key: str, variant: str) -> np.ndarray:
        return late[key].sel(variant=variant).values

    more = {"figure": "dynamics", "details": {
        "n": "checkpoints of one run with one seed: the interval is over training, not seeds"}}
    sink = data[SINK].sel(variant="softmax, AdamW").values
    over = np.flatnonzero(sink > 0.5)
    if len(over):
        step = float(data.step.values[over[0]])
        out.claim(Claim(DYNAMIC[0], SOURCE, measured=step, null=steps / 2, interval=(step, step),
                        direction="below", statistic="first step with attention above 0.5",
                        paper_number="about step 200", paper_tag="code", **more))
    else:
        out.claim(Claim.untestable(DYNAMIC[0], SOURCE, f"no sink within {steps} steps"))
    out.claim(Claim.untestable(DYNAMIC[1], SOURCE,
                               f"{steps} steps are too few to tell a logarithm from a plateau"))
    estimate = statistics.mean(series(SINK, "ReLU, AdamW"))
    out.claim(Claim(DYNAMIC[2], SOURCE, **estimate.for_claim(), null=0.05, direction="below",
                    paper_number="about 0, copy risk 3.9e-06", paper_tag="code",
                    **{**more, "details": {**more["details"], "copy risk at the end": float(
                        series("copy", "ReLU, AdamW")[-1])}}))
    estimate = statistics.mean(series(SINK, "softmax, SGD"))
    out.claim(Claim(DYNAMIC[3], SOURCE, **estimate.for_claim(), null=0.5,
                    paper_number="copy risk 0.0557 with the sink", paper_tag="code", **more))
    estimate = statistics.mean(series(SINK, "softmax, no first token"))
    out.claim(Claim(DYNAMIC[4], SOURCE, **estimate.for_claim(), null=0.1, direction="below",
                    **more))
