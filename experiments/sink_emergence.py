"""When attention sinks emerge (arXiv:2410.10781), and what hiding them does (arXiv:2309.17453).

The sink rate of the first token on natural, random and repeated text, over lengths and thresholds,
in bundled decoders and in a real pretrained encoder, where every query sees every key.
"""

from typing import Any, Optional

import numpy as np
import xarray as xr

import interp
from experiments import _texts as texts
from experiments._output import Output
from experiments._paper import Paper, Settings
from interp.core import Claim, ModelNotFound, Prompt, Result, statistics
from interp.figures import heat, layer_curve
from interp.figures.style import PAGE, canvas, color
from interp.sinks import first_token

PAPER = Paper(
    "sink_emergence",
    "When Attention Sink Emerges in Language Models",
    ("2410.10781", "2309.17453"),
    "How strong is the sink on the first token, on which inputs, and is it needed?",
    figures={
        "heads": "Attention received by the first token, per head, on natural text (mean over "
        "prompts of the mean over all queries that see it).",
        "length": "Sink rate of the first token against prompt length, for four thresholds.",
        "inputs": "Sink rate of every early position on natural, random and repeated text.",
        "profile": "The first token against the others: residual, key and value norms per layer, "
        "and the cosine of later queries to the first key.",
        "hiding": "Cross-entropy of the second half of the text when the first tokens are hidden "
        "from it, against as many random early tokens.",
        "share": "Share of all attention that the first token takes, per layer.",
    },
    models=("reader", "backcopy-1l", "backcopy-3l", "all-minilm-l6-v2"),
)
SOURCE, STREAMING = PAPER.sources
EPSILON = 0.3
EPSILONS = (0.1, 0.2, 0.3, 0.4)
TRAINED = (
    ("The sink appears only after effective optimization.", "between 1,000 and 2,000 steps"),
    ("A larger learning rate makes a stronger sink.", "8e-4: 32.23 %; 4e-4: 18.18 %"),
    ("Moderate weight decay strengthens the sink, extreme decay removes it.",
     "0: 15.20 %; 0.5: 41.08 %; 5: 0.01 %"),
    ("A learned key bias takes the sink's place.", "73.34 % on the bias, 0.00 % on token 1"),
    ("Attention without normalization has no sink.", "0.44 % against 30.24 %"),
)
"""Claims of the paper that only training many models can decide; numbers are second-hand."""


def run(settings: Settings, out: Output) -> None:
    for name in settings.models(PAPER):
        try:
            model = interp.open_model(name, **settings.opening())
        except ModelNotFound as error:
            if settings.model is not None:
                raise
            for figure in PAPER.figures:
                out.no_figure(figure, str(error), of=name)
            out.claim(Claim.untestable("The first token is a sink.", SOURCE, str(error)), name)
            continue
        out.record(model)
        _share(model, settings, out)
        if model.kind == "decoder":
            _decoder(model, settings, out)
        else:
            _encoder_lengths(model, settings, out)
            reason = "queries of an encoder see every key, so no key is first among the visible"
            for figure in ("inputs", "profile", "hiding"):
                out.no_figure(figure, reason, of=model.name)
    for sentence, number in TRAINED:
        out.claim(Claim.untestable(
            sentence, SOURCE, "it compares models trained from scratch under different settings",
            paper_number=number, paper_tag="secondary"))


def _length(model: Any, settings: Settings) -> int:
    """The paper's 64 tokens; for an encoder 32, a sentence or two, which is what it is made for."""
    wanted = settings.pick(64 if model.kind == "decoder" else 32, tiny=24)
    return min(wanted, model.max_positions or wanted)


def _share(model: Any, settings: Settings, out: Output) -> None:
    """How much of all attention goes to token 0; the paper's alpha, whatever the queries see."""
    length, count = _length(model, settings), settings.pick(64, tiny=8)
    prompts = texts.natural(model, count, length, settings.rng(1))
    out.record(prompts=prompts, name=f"natural-{model.name}")
    found = first_token.measure(model, prompts)
    out.save(f"natural-{model.name}", found)
    figure, ax = canvas(1, 1)
    first_token.draw(found, ax)
    ax.set_title(f"{model.name}, {length} tokens")
    out.figure("heads", figure, of=model.name)

    first = found["alpha"].isel(key=0).mean("head")
    uniform = 1 / length if model.kind == "encoder" else float(np.mean(1 / np.arange(1, length + 1)))
    early = found["alpha"].isel(key=slice(1, length // 2)).mean(("head", "key"))
    figure, ax = canvas(1, 1)
    layer_curve.draw(ax, {"first token": first, "mean of other early tokens": early},
                     label="share of attention received",
                     roles={"first token": "primary", "mean of other early tokens": "control"})
    ax.axhline(uniform, color=color("control"), linewidth=0.8, linestyle=":")
    ax.set_ylim(0, None)
    ax.set_title(f"{model.name} (dotted: uniform attention)")
    out.figure("share", figure, of=model.name)

    best = first.mean("prompt")
    layers = [int(x) for x in best.layer.values[best.values > 0.3]]
    strongest = int(best.argmax())
    special = "[CLS]" if model.kind == "encoder" else "the first token"
    if model.kind == "encoder" and model.n_layers > 5:
        middle = first.isel(layer=slice(1, 5)).mean("layer").values
        out.claim(Claim(
            f"Over layers 1 to 4, {special} takes 40 to 50 % of all attention.",
            "measured by this toolkit; no paper",
            **statistics.mean(middle).for_claim(), null=0.45, direction="equal", tolerance=0.05,
            figure="share", details={"T": length}), model.name)
    estimate = statistics.mean(first.isel(layer=strongest).values)
    out.claim(Claim(
        f"In its strongest layer {special} takes more than twice a uniform share.", SOURCE,
        **estimate.for_claim(), null=2 * uniform, figure="share", details={
            "layer": strongest, "layers above 0.3": layers, "uniform": uniform,
            "per layer": [round(float(x), 4) for x in best.values]}), model.name)


def _decoder(model: Any, settings: Settings, out: Output) -> None:
    length, count = _length(model, settings), settings.pick(100, tiny=8)
    inputs = _inputs(model, count, length, settings)
    alphas = {
        kind: model.run(prompts, stats="received", logits="none").stats["received"]
        for kind, prompts in inputs.items()
    }
    for kind, prompts in inputs.items():
        out.record(prompts=prompts, name=f"inputs-{kind}-{model.name}")
    rates = {kind: _rate(alpha) for kind, alpha in alphas.items()}
    figure, ax = canvas(1, 1)
    keys = np.arange(length)[first_token.early_keys(length)]
    for (kind, rate), role in zip(rates.items(), ("primary", "secondary", "control")):
        ax.plot(keys, rate.mean("prompt").values[keys], color=color(role), label=kind)
    ax.set_xlabel("key position")
    ax.set_ylabel(f"sink rate at {EPSILON} (%)")
    ax.legend()
    ax.set_title(f"{model.name}, {length} tokens")
    out.figure("inputs", figure, of=model.name)

    def claim(sentence: str, estimate: Any, **more: Any) -> None:
        out.claim(Claim(sentence, more.pop("source", SOURCE),
                        **{**estimate.for_claim(), **more}), model.name)

    natural = rates["natural"].isel(key=0).values
    strongest = float(alphas["natural"].isel(key=0).mean("prompt").max())
    more = {"unit": "%", "figure": "inputs", "details": {
        "T": length, "epsilon": EPSILON, "BOS": model.first_token_is_bos,
        "strongest head": strongest,
        "random text": float(rates["random"].isel(key=0).mean()),
        "repeated token": float(rates["repeated"].isel(key=0).mean())}}
    claim("Some heads make the first token their sink on natural text.",
          statistics.mean(natural), null=0.0, paper_number="GPT2-XL 77.00, Mistral-7B 97.49",
          paper_tag="secondary", **more)
    others = rates["natural"].isel(key=slice(1, length // 2)).max("key").values
    claim("No other early position is a sink as often as the first.",
          statistics.difference(natural, others), null=0.0, **more)
    claim("The sink is there on random tokens too.", statistics.mean(
        rates["random"].isel(key=0).values), null=0.0,
        paper_number="GPT2-XL 70.29, Mistral-7B 75.21", paper_tag="secondary", **more)
    learned = _position_ids(model, inputs["natural"][0]) is not None
    if learned:
        out.claim(Claim.untestable(
            "A repeated token has no sink.", SOURCE,
            f"the claim is about models whose copies of a token are all alike at first; "
            f"{model.name} adds a learned vector to each position"), model.name)
    else:
        claim("A repeated token has no sink.", statistics.mean(
            rates["repeated"].isel(key=0).values), null=5.0, direction="below",
            paper_number="0 (Mistral-7B, Llama2-7B, Llama3-8B)", paper_tag="secondary", **more)
    _swap(model, inputs["natural"], out, claim)
    _lengths(model, settings, out)
    _profile(model, inputs["natural"][: settings.pick(32, tiny=8)], out, claim)
    _hiding(model, inputs["natural"][: settings.pick(24, tiny=6)], settings, out, claim)
    if model.sink_kind == "learned":
        found = first_token.measure(model, inputs["natural"][:8])
        claim("A learned sink draws attention out of the sequence.",
              statistics.mean(found["external"].mean(("layer", "head")).values), null=0.05,
              source=STREAMING)


def _inputs(model: Any, count: int, length: int, settings: Settings) -> dict[str, list[Prompt]]:
    """Natural text, random tokens, one token repeated; each as the tokenizer starts a text."""
    rng, front = settings.rng(2), texts.first_ids(model)
    special = set(getattr(model.tokenizer, "all_special_ids", []) or [])
    allowed = np.array([i for i in range(min(model.d_vocab, 50_000)) if i not in special])
    rest = length - len(front)
    return {
        "natural": texts.natural(model, count, length, rng),
        "random": [Prompt.from_tokens([*front, *rng.choice(allowed, rest)]) for _ in range(count)],
        # The paper repeats one token from the start, without BOS.
        "repeated": [Prompt.from_tokens([int(rng.choice(allowed))] * length)
                     for _ in range(count)],
    }


def _rate(alpha: xr.DataArray, epsilon: float = EPSILON) -> xr.DataArray:
    """Sink_k per prompt, percent: threshold first, then average over layers and heads."""
    return 100 * (alpha > epsilon).where(alpha.notnull()).mean(("layer", "head"))


def _position_ids(model: Any, prompt: Prompt) -> Optional[np.ndarray]:
    """The position ids of a model with learned absolute positions, None for any other."""
    table = [n for n, p in model.hf.named_parameters()
             if p.ndim == 2 and any(x in n for x in ("wpe", "embed_positions", "position_embed"))]
    text = [n for n in table if "vision" not in n]
    return np.arange(len(prompt))[None] if text else None


def _swap(model: Any, prompts: list[Prompt], out: Output, claim: Any) -> None:
    sentence = "With learned positions the sink follows the position, not the token."
    ids = _position_ids(model, prompts[0])
    if ids is None:
        out.claim(Claim.untestable(
            sentence, SOURCE, f"{model.name} has no learned absolute positions to exchange",
            paper_number="GPT2-XL: Sink_1 1.44, Sink_5 57.63 after exchanging 1 and 5",
            paper_tag="secondary"), model.name)
        return
    ids = ids.copy()
    ids[0, [0, 4]] = ids[0, [4, 0]]
    # With an explicit mask transformers does not take the jump in positions for packed sequences.
    ones = np.ones_like(ids)
    swapped = [Prompt(p.ids, inputs={"position_ids": ids, "attention_mask": ones}) for p in prompts]
    alpha = model.run(swapped, stats="received", logits="none").stats["received"]
    rate = _rate(alpha)
    claim(sentence, statistics.difference(rate.isel(key=4).values, rate.isel(key=0).values),
          null=0.0, unit="percentage points, Sink_5 minus Sink_1 after the exchange",
          paper_number="GPT2-XL: Sink_1 1.44, Sink_5 57.63", paper_tag="secondary", details={
              "Sink_1": float(rate.isel(key=0).mean()), "Sink_5": float(rate.isel(key=4).mean())})


def _lengths(model: Any, settings: Settings, out: Output) -> None:
    if not out.wants("length"):
        return
    longest = settings.pick(256, tiny=32)
    lengths = [n for n in (16, 32, 64, 128, 256, 512) if n <= min(longest, model.max_positions
                                                                   or longest)]
    rows = []
    for n in lengths:
        prompts = texts.natural(model, settings.pick(24, tiny=4), n, settings.rng(3, n))
        alpha = model.run(prompts, stats="received", logits="none").stats["received"]
        rows.append([float(_rate(alpha, e).isel(key=0).mean()) for e in EPSILONS])
    data = xr.Dataset({"rate": (("length", "epsilon"), np.array(rows))},
                      {"length": lengths, "epsilon": list(EPSILONS)})
    out.save(f"lengths-{model.name}", Result(data, model.manifest()))
    figure, ax = canvas(1, 1)
    for e in EPSILONS:
        ax.plot(lengths, data["rate"].sel(epsilon=e), marker="o", markersize=3, label=f"{e}")
    ax.set_xscale("log", base=2)
    ax.set_xticks(lengths, [str(n) for n in lengths])
    ax.set_xlabel("prompt length T (tokens)")
    ax.set_ylabel("sink rate of token 0 (%)")
    ax.legend(title="threshold")
    ax.set_title(model.name)
    out.figure("length", figure, of=model.name)


def _encoder_lengths(model: Any, settings: Settings, out: Output) -> None:
    """Share of all attention on token 0 against length: with more keys to share, it falls."""
    if not out.wants("length"):
        return
    lengths = [n for n in settings.pick((8, 16, 32, 64, 128), tiny=(8, 16))
               if n <= (model.max_positions or n)]
    figure, ax = canvas(1, 1)
    rows = []
    for n in lengths:
        prompts = texts.natural(model, settings.pick(24, tiny=4), n, settings.rng(3, n))
        alpha = model.run(prompts, stats="received", logits="none").stats["received"]
        rows.append(alpha.isel(key=0).mean(("prompt", "head")).values)
    shares = np.stack(rows, 1)
    for layer, share in enumerate(shares):
        ax.plot(lengths, share, marker="o", markersize=3, label=f"layer {layer}")
    ax.plot(lengths, [1 / n for n in lengths], color=color("control"), linestyle=":",
            label="uniform")
    ax.set_xscale("log", base=2)
    ax.set_xticks(lengths, [str(n) for n in lengths])
    ax.set_xlabel("text length (tokens)")
    ax.set_ylabel("share of all attention on token 0")
    ax.set_ylim(0, None)
    ax.legend(ncols=2)
    ax.set_title(model.name)
    out.figure("length", figure, "Share of all attention that token 0 takes, against text length "
               "(an encoder: every query sees every key).", of=model.name)


def _profile(model: Any, prompts: list[Prompt], out: Output, claim: Any) -> None:
    found = first_token.measure(model, prompts)
    figure, axes = canvas(1, 4, width=PAGE, height=1.9)
    panels = (("residual_norm", "residual norm"), ("key_norm", "key norm"),
              ("value_norm", "value norm"))
    for ax, (name, label) in zip(axes, panels):
        norms = found[name].mean("kv_head") if "kv_head" in found[name].dims else found[name]
        layer_curve.draw(ax, {"first token": norms.isel(position=0),
                              "others": norms.isel(position=slice(1, None)).mean("position")},
                         label=label, legend=ax is axes[0],
                         roles={"first token": "primary", "others": "control"})
    heat.draw(axes[3], found["angle"].mean("prompt"), label="cosine to the first key", signed=True)
    figure.suptitle(model.name)
    out.figure("profile", figure, of=model.name)
    sink = found["alpha"].isel(key=0).mean("prompt").values
    layer, head = np.unravel_index(np.nanargmax(sink), sink.shape)
    group = model.n_heads // model.n_kv_heads
    value = found["value_norm"].isel(layer=layer, kv_head=head // group)
    ratio = (value.isel(position=0) / value.isel(position=slice(1, None)).mean("position")).values
    where = {"head": f"L{layer}H{head}", "alpha": float(sink[layer, head])}
    claim("The first token's value is small in the strongest sink head.",
          statistics.mean(ratio), null=1.0, direction="below", figure="profile",
          paper_number="at most .8 against 2 to 6 (Llama3-8B)", paper_tag="secondary",
          details=where)
    norms = found["residual_norm"]
    peak = norms.isel(position=0) / norms.isel(position=slice(1, None)).mean("position")
    highest = int(peak.mean("prompt").argmax())
    claim("The first token's residual norm stands above the others'.",
          statistics.mean(peak.isel(layer=highest).values), null=2.0, figure="profile",
          unit="times", paper_number="about 370 against 60 or less (Llama3-8B, from block 2)",
          paper_tag="secondary", details={"entering layer": highest})
    cosine = found["angle"].isel(layer=layer, head=head).values
    claim("Later queries point toward the first key.", statistics.mean(cosine), null=0.0,
          figure="profile", unit="cosine", paper_number="about 0.5", paper_tag="secondary",
          details=where)


def _hiding(model: Any, prompts: list[Prompt], settings: Settings, out: Output, claim: Any) -> None:
    sizes = (1, 2, 4)
    found = first_token.intervene(model, prompts, sizes, seed=settings.seed)
    out.save(f"hiding-{model.name}", found)
    added = found["loss"] - found["baseline"]
    control = (found["control"] - found["baseline"]).mean("sample")
    figure, ax = canvas(1, 1)
    layer_curve.draw(ax, {"first n tokens": added, "n random early tokens": control},
                     along="n_first", x="tokens hidden from the second half",
                     label="added cross-entropy (nats)",
                     roles={"first n tokens": "primary", "n random early tokens": "control"})
    ax.set_title(model.name)
    out.figure("hiding", figure, of=model.name)
    effect = statistics.difference(added.sel(n_first=4).values, control.sel(n_first=4).values)
    claim("Hiding the first four tokens causes more damage than hiding any four.", effect,
          null=0.0, source=STREAMING, unit="nats", causal=True, figure="hiding",
          control="four random early tokens, 5 seeds",
          paper_number="Llama2-13B perplexity 5158 without them, 5.40 with four",
          paper_tag="secondary", details={
              "added by the first four": float(added.sel(n_first=4).mean()),
              "added by four random": float(control.sel(n_first=4).mean()),
              "added by the first one": float(added.sel(n_first=1).mean())})
