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
from experiments._texts import code, knows, natural, prose
from interp.core import Claim, Prompt, Result, statistics
from interp.figures import heat, layer_curve
from interp.figures.style import PAGE, canvas, color, note
from interp.organisms import backcopy, reader
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

RESTS = "The sink head rests on the first token where it has nothing to do."
LEAVES = "The same head leaves the first token where it has to copy."
CHAIN = "The loss after ordinary symbols reaches that of the chain itself."
COPIES = "The loss after triggers nearly vanishes."
NO_COPYING = "Removing attention causes the copying to fail."
AS_BEFORE = "Removing attention leaves ordinary prediction as it was."
NO_CHAIN = "Removing the MLP causes ordinary prediction to fail."
TASK = (RESTS, LEAVES, CHAIN, COPIES, NO_COPYING, AS_BEFORE, NO_CHAIN)
"""Claims that need to know which queries have work to do, and the best possible loss."""

SOME = "Some head rests on the first token."
GAP = "Where the sink head rests, the first key's logit stands above the others'."
DRAIN = "The value of the first token is drained in the sink block."
PEAK = "The residual stream of the first token peaks where it enters the sink block."
CAUSE = "The MLPs of early blocks cause the residual peak of the first token."
DOMAINS = "A head rests in one domain and works in the other."
GENERAL = (GAP, DRAIN, PEAK, CAUSE, DOMAINS)

AT_REST = 0.5
"""Below this attention to the first token no head rests, and nothing follows from its resting."""

LEARNED = 0.5
"""A loss this far above the best possible one (nats) leaves nothing to lose."""

ONE_BLOCK = "{} has one block, and nothing before it could make a peak"


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
    count, length = settings.pick((48, 128), tiny=(12, 32))
    tokens, trigger = backcopy.sample(settings.rng(1), count, length)
    trigger[:, 0] = False
    prompts = [Prompt.from_tokens(row) for row in tokens]
    found = active_dormant.measure(
        model, prompts, [np.flatnonzero(row).tolist() for row in trigger])
    out.record(model, prompts, f"backcopy-{model.name}")
    out.save(f"measures-{model.name}", found)
    claim = _claims(model, out)
    work = found["is_active"].values
    layer, head, resting = _sink_head(found, ~work)
    claim(RESTS, resting, null=0.9, figure="attention", details={
        "head": f"L{layer}H{head}", "alpha": "mean attention to token 0 over non-trigger queries"})
    working = active_dormant.dormancy(found["first"].values, work).numpy()[1::2, layer, head]
    # A short prompt may have no trigger at all.
    working = working[np.isfinite(working)]
    if resting.value < AT_REST or not len(working):
        claim(LEAVES, _no_rest(model, resting) if len(working) else
              "no prompt of this run has a trigger")
    else:
        claim(LEAVES, statistics.mean(working), null=0.1, direction="below", figure="attention",
              details={"head": f"L{layer}H{head}"})
    _risks(model, tokens, claim, settings)
    _around(model, found, (layer, head), resting, claim, ~work, {
        GAP: "18.93 (two blocks)", PEAK: "gap 106.1 (two blocks)"})
    _draw(model, found, out, prompts[0])
    _components(model, prompts[: settings.pick(16, tiny=12)], resting, out)
    busy, idle = _two_domains(settings, *settings.pick((24, 96), tiny=(10, 32)))
    _domains(model, {"with triggers": busy, "without triggers": idle}, out)


def _claims(model: Any, out: Output) -> Any:
    """A function that states a claim about the model, from an estimate or a reason against it."""
    def claim(sentence: str, found: Any, paper_number: str = "", **more: Any) -> None:
        number = {"paper_number": paper_number, "paper_tag": "code"} if paper_number else {}
        made = Claim.untestable(sentence, SOURCE, found, **number) if isinstance(found, str) else \
            Claim(sentence, SOURCE, **{**found.for_claim(), **number, **more})
        out.claim(made, model.name)

    return claim


def _sink_head(found: Result, queries: Any = None) -> tuple[int, int, statistics.Estimate]:
    """The head that rests most on one half of the prompts, and how much it does on the other."""
    resting = active_dormant.dormancy(found["first"].values, queries).numpy()
    layer, head = np.unravel_index(np.nanmean(resting[::2], 0).argmax(), resting.shape[1:])
    return int(layer), int(head), statistics.mean(resting[1::2, layer, head])


def _no_rest(model: Any, resting: statistics.Estimate) -> str:
    return (f"no head of {model.name} rests on the first token: the strongest gives it "
            f"{resting.value:.2f} of its attention ({AT_REST} is needed)")


def _around(
    model: Any, found: Result, at: tuple[int, int], resting: statistics.Estimate, claim: Any,
    queries: Any, numbers: dict[str, str],
) -> None:
    """What comes with a resting head: its logits, its values, and the residual that it reads."""
    layer, head = at
    more = {key: {"paper_number": number} for key, number in numbers.items()}
    if resting.value < AT_REST:
        for sentence in (GAP, DRAIN, PEAK):
            claim(sentence, _no_rest(model, resting), **more.get(sentence, {}))
        return
    gap = found["gap"].values[1::2, layer, head]
    gap = np.where(np.ones_like(gap, bool) if queries is None else queries[1::2], gap, np.nan)
    # Of queries 0 and 1, and of those that a window keeps from the first key, there is no gap.
    gap = np.nanmean(gap[np.isfinite(gap).any(-1)], -1)
    claim(GAP, statistics.mean(gap) if len(gap) else "no query of that head sees the first key",
          null=0.0, unit="nats", figure="norms", details={"head": f"L{layer}H{head}"},
          **more.get(GAP, {}))
    drain = active_dormant.first_over_others(found["value_norm"].mean("kv_head")).values
    claim(DRAIN, statistics.mean(drain[1::2, layer]), null=0.5, direction="below", figure="norms",
          statistic="norm of v at token 0 / mean of the others", details={"layer": layer},
          **more.get(DRAIN, {}))
    ratio = active_dormant.first_over_others(found["peak_in"]).values[1::2, layer]
    claim(PEAK, statistics.mean(ratio) if model.n_layers > 1 else ONE_BLOCK.format(model.name),
          null=1.2, figure="norms", statistic="norm at token 0 / mean of the others",
          details={"layer": layer}, **more.get(PEAK, {}))


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
    excess = statistics.mean(column("untouched", "bigram_excess"))
    claim(CHAIN, excess, null=0.0, direction="equal", tolerance=0.05,
          unit="nats above the oracle", paper_number="2.2299 (oracle 2.2299)")
    if not both.any():
        for sentence in (COPIES, NO_COPYING):
            claim(sentence, "no prompt of this run has a trigger")
    else:
        copying = statistics.mean(column("untouched", "copy")[both])
        claim(COPIES, copying, null=0.05, direction="below", unit="nats",
              paper_number="5.5e-06 after 100,000 steps (one block)")
        gone = column("attention", "copy")[both] - column("untouched", "copy")[both]
        claim(NO_COPYING, statistics.mean(gone) if copying.value < LEARNED else
              f"{model.name} does not copy: its loss after triggers is {copying.value:.2f} nats",
              null=1.0, unit="nats", paper_number="copy risk 7.69", causal=True,
              control="the change of the bigram risk under the same edit, next claim")
    ignorant = "" if excess.value < LEARNED else (
        f"{model.name} does not know the chain: its loss after ordinary symbols is "
        f"{excess.value:.2f} nats above the oracle")
    lost = column("attention", "bigram") - column("untouched", "bigram")
    claim(AS_BEFORE, ignorant or statistics.mean(lost), null=0.0, direction="equal", tolerance=0.2,
          unit="nats", paper_number="unchanged", causal=True,
          control="the copy risk under the same edit")
    lost = column("MLP", "bigram") - column("untouched", "bigram")
    claim(NO_CHAIN, ignorant or statistics.mean(lost), null=0.2, unit="nats",
          paper_number="4.21 against 2.23", causal=True,
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
    claim = _claims(model, out)
    for sentence in TASK:
        claim(sentence, f"it is about the Bigram-Backcopy task, and {model.name} has another "
              "vocabulary")
    domains, reason = _texts(model, settings)
    if reason:
        for name in ("attention", "norms", "components", "domains"):
            out.no_figure(name, reason, of=model.name)
        for sentence in (SOME, *GENERAL):
            claim(sentence, reason)
        return
    prompts = domains["prose"]
    found = active_dormant.measure(model, prompts)
    out.record(model, prompts, f"prose-{model.name}")
    out.save(f"measures-{model.name}", found)
    layer, head, resting = _sink_head(found)
    chance = float(np.mean(1 / np.arange(2, found["first"].sizes["query"] + 1)))
    claim(SOME, resting, null=max(AT_REST, chance), figure="attention",
          details={"head": f"L{layer}H{head}", "uniform attention": chance})
    _around(model, found, (layer, head), resting, claim, None, {
        DRAIN: "0.05 against 0.08 to 0.46 (Llama-3.1-8B, L0H31)"})
    _draw(model, found, out, prompts[0])
    _components(model, prompts[: settings.pick(12, tiny=12)], resting, out)
    if "code" in domains:
        _domains(model, domains, out)
    else:
        reason = f"the language of {model.name} has no code to compare with"
        out.no_figure("domains", reason, of=model.name)
        claim(DOMAINS, reason)


def _texts(model: Any, settings: Settings) -> tuple[dict[str, list[Prompt]], str]:
    """Prose and code of one length, or why the model cannot be given them."""
    if model.kind != "decoder":
        return {}, f"{model.name} is an encoder: every query sees every key, so no key is first"
    if model.tokenizer is None:
        return {}, f"{model.name} has no tokenizer for texts"
    count, rng = settings.pick(24, tiny=12), settings.rng(4)
    longest = min(64, model.max_positions or 64)
    if knows(model, reader):
        return {"prose": natural(model, count, longest, rng)}, ""
    texts = {"code": [code(rng) for _ in range(count)], "prose": [prose(rng) for _ in range(count)]}
    ids = {name: [list(model.tokenizer(text)["input_ids"]) for text in many]
           for name, many in texts.items()}
    # Equal lengths: the first token's share depends on how many keys there are.
    length = min(longest, *(len(one) for many in ids.values() for one in many))
    if length < 3:
        return {}, f"the tokenizer of {model.name} makes {length} token(s) of some texts"
    cut = {name: [one[:length] for one in many] for name, many in ids.items()}
    unknown = np.mean(np.array(cut["prose"]) == model.tokenizer.unk_token_id)
    if unknown > 0.5:
        return {}, f"the tokenizer of {model.name} does not know {unknown:.0%} of plain English"
    return {name: [Prompt.from_tokens(one) for one in many] for name, many in cut.items()}, ""


def _components(
    model: Any, prompts: Sequence[Prompt], resting: statistics.Estimate, out: Output
) -> None:
    sentence = CAUSE
    if model.n_layers < 2:
        reason = ONE_BLOCK.format(model.name)
        out.no_figure("components", reason, of=model.name)
        out.claim(Claim.untestable(sentence, SOURCE, reason), model.name)
        return
    found = active_dormant.intervene(model, prompts)
    out.save(f"components-{model.name}", found)
    share = found["peak"] / found["baseline"]
    figure, ax = canvas(1, 1, height=3.2)
    curves = {name: share.sel(component=name) for name in ("MLP", "attention")}
    layer_curve.draw(ax, curves, x="block zeroed",
                     label="peak (norm of token 0 − mean of others)\n/ untouched peak",
                     roles={"MLP": "primary", "attention": "control"})
    ax.axhline(active_dormant.NEEDED_BELOW, color=color("control"), linewidth=0.8, linestyle=":")
    ax.set_title(f"{model.name}: peak leaving block {found.manifest['read_layer']}")
    note(ax, f"dotted: needed below {active_dormant.NEEDED_BELOW:g}")
    out.figure("components", figure, of=model.name)
    if resting.value < AT_REST:
        out.claim(Claim.untestable(sentence, SOURCE, _no_rest(model, resting)), model.name)
        return
    ratio = float(active_dormant.first_over_others(_peaks(model, prompts, found)).mean())
    if ratio < 1.2:
        out.claim(Claim.untestable(
            sentence, SOURCE, f"{model.name} has no peak to explain: at its highest the first "
            f"token's norm is {ratio:.2f} times the others'"), model.name)
        return
    # The block is chosen on one half of the prompts and judged on the other.
    share, choose = share.isel(prompt=slice(1, None, 2)), share.isel(prompt=slice(0, None, 2))
    mlp = int(choose.sel(component="MLP").mean("prompt").argmin("layer"))
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
    heat.draw(ax, found["difference"], label="difference of attention on token 0",
              signed=True, annotate=".2f" if found["difference"].size <= 64 else "")
    ax.set_title(f"{model.name}\n{a}\nminus {b}", fontsize="small")
    out.figure("domains", figure, of=model.name)
    sentence = DOMAINS
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
    figure, axes = canvas(1, 3, width=PAGE, height=2.3)
    figure.suptitle(model.name)
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
    # Both groups in one row above the bars, none of which it hides.
    axes[2].legend(loc="lower left", bbox_to_anchor=(-0.05, 0.98), ncols=2, borderpad=0)
    note(axes[2], f"queries of the last layer, heads averaged, prompts: {gap.shape[0]}")
    out.figure("norms", figure, of=model.name)


def _bars(ax: Any, found: Result, quantity: str) -> None:
    """A one-layer model has no curve over layers: first token against the others, as bars."""
    name, label = {"value": ("value_norm", "norm of the value"),
                   "peak": ("peak", "residual norm after the block")}[quantity]
    norms = found[name].isel(layer=0)
    norms = norms.mean("kv_head") if "kv_head" in norms.dims else norms
    parts = [norms.isel(position=0).values, norms.isel(position=slice(1, None)).mean("position")]
    ax.bar(["first token", "others"], [np.mean(p) for p in parts],
           yerr=[np.std(p) for p in parts], color=[color("primary"), color("control")])
    ax.set_ylabel(label)
    note(ax, f"mean ± standard deviation over {len(parts[0])} prompts")


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
    panels = (("copy", "copy risk (nats)"), (SINK, "attention on token 0"),
              ("layer_0_value_norm_ratio", "value norm ratio"),
              ("bigram_excess", "bigram excess (nats)"))
    for ax, (key, label) in zip(axes, panels):
        for variant in data.variant.values:
            ax.plot(data.step, data[key].sel(variant=variant), label=str(variant))
        ax.set_xscale("log")
        ax.set_xticks([s for s in (10, 30, 100, 300, 1000) if s <= int(data.step[-1])])
        ax.minorticks_off()
        ax.xaxis.set_major_formatter("{x:g}")
        ax.set_xlabel("step")
        ax.set_ylabel(label)
    for ax in (axes[0], axes[3]):
        ax.set_yscale("log")
        ax.yaxis.set_minor_formatter("")
    axes[0].legend(fontsize=5, loc="lower left", frameon=False)
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
