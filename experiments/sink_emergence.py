"""When attention sinks emerge (arXiv:2410.10781), and what hiding them does (arXiv:2309.17453).

The sink rate of the first token on natural, random and repeated text, over lengths and thresholds,
in bundled decoders and in a real pretrained encoder, where every query sees every key.
"""

from collections.abc import Callable, Sequence
from typing import Any, Optional

import numpy as np
import xarray as xr

from experiments import _texts as texts
from experiments._output import Output
from experiments._paper import Paper, Settings, opened
from interp.core import Claim, Prompt, Result, statistics
from interp.figures import heat, layer_curve
from interp.figures.style import COLUMN, PAGE, canvas, color
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
FEW = 5.0
"""Percent of (prompt, layer, head); with fewer sinks there is none to speak of."""

TRAINED = (
    ("The sink appears only after effective optimization.", "between 1,000 and 2,000 steps"),
    ("A larger learning rate makes a stronger sink.", "8e-4: 32.23 %; 4e-4: 18.18 %"),
    ("Moderate weight decay strengthens the sink, extreme decay removes it.",
     "0: 15.20 %; 0.5: 41.08 %; 5: 0.01 %"),
    ("A learned key bias takes the sink's place.", "73.34 % on the bias, 0.00 % on token 1"),
    ("Attention without normalization has no sink.", "0.44 % against 30.24 %"),
)
"""Claims of the paper that only training many models can decide; numbers are second-hand."""


SHARE = "In its strongest layer {} takes more than twice a uniform share."
NATURAL = "Some heads make the first token their sink on natural text."
OTHERS = "No other early position is a sink as often as the first."
RANDOM = "The sink is there on random tokens too."
REPEATED = "A repeated token has no sink."
SWAP = "With learned positions the sink follows the position, not the token."
VALUE = "The first token's value is small in the strongest sink head."
RESIDUAL = "The first token's residual norm stands above the others'."
ANGLE = "Later queries point toward the first key."
HIDING = "Hiding the first four tokens causes more damage than hiding any four."
LEARNED = "A learned sink draws attention out of the sequence."
CAUSAL = (NATURAL, OTHERS, RANDOM, REPEATED, SWAP, VALUE, RESIDUAL, ANGLE, HIDING, LEARNED)
"""Claims about decoders."""

NUMBERS = {
    NATURAL: "GPT2-XL 77.00, Mistral-7B 97.49", RANDOM: "GPT2-XL 70.29, Mistral-7B 75.21",
    REPEATED: "0 (Mistral-7B, Llama2-7B, Llama3-8B)", SWAP: "GPT2-XL: Sink_1 1.44, Sink_5 57.63 "
    "after exchanging 1 and 5", VALUE: "at most .8 against 2 to 6 (Llama3-8B)",
    RESIDUAL: "about 370 against 60 or less (Llama3-8B, from block 2)", ANGLE: "about 0.5",
    HIDING: "Llama2-13B perplexity 5158 without them, 5.40 with four",
}
"""The papers' numbers, all second-hand."""

LEGEND = {"natural": "natural text", "random": "random tokens", "repeated": "one token repeated"}

CHANCE_LOSS = 0.9
"""A model whose loss is above this share of ln(vocabulary) predicts nothing worth losing."""

SHORTEST = 16
"""Positions that a model must have: hiding four tokens takes a text of sixteen."""


def run(settings: Settings, out: Output) -> None:
    def absent(name: str, reason: str) -> None:
        _give_up(name, reason, out, "the first token")

    for model in opened(PAPER, settings, absent):
        out.record(model)
        if model.max_positions and model.max_positions < SHORTEST:
            _give_up(model.name, f"{model.name} has {model.max_positions} positions "
                     f"({SHORTEST} are needed)", out, "the first token")
        elif not _share(model, settings, out):
            continue
        elif model.kind == "decoder":
            _decoder(model, settings, out)
        else:
            _encoder_lengths(model, settings, out)
            reason = (f"{model.name} is an encoder: its queries see every key, so no key is first "
                      "among the visible")
            _give_up(model.name, reason, out, "", ("inputs", "profile", "hiding"))
    for sentence, number in TRAINED:
        out.claim(Claim.untestable(
            sentence, SOURCE, "it compares models trained from scratch under different settings",
            paper_number=number, paper_tag="secondary"))


def _give_up(name: str, reason: str, out: Output, special: str,
             figures: Sequence[str] = tuple(PAPER.figures)) -> None:
    """No figure and no verdict; with `special` (the token) not on its share either."""
    for figure in figures:
        out.no_figure(figure, reason, of=name)
    if special:
        _claim(name, out)(SHARE.format(special), reason)
    if len(out.settings.models(PAPER)) > 1:
        out.claim(Claim.untestable(f"{len(CAUSAL)} claims about decoders.", SOURCE, reason,
                                   details={"claims": list(CAUSAL)}), name)
        return
    for sentence in CAUSAL:
        _claim(name, out)(sentence, reason)


def _claim(name: str, out: Output) -> Callable[..., None]:
    """A function that states a claim about a model, from an estimate or a reason against it."""
    def claim(sentence: str, found: Any, **more: Any) -> None:
        source = STREAMING if sentence in (HIDING, LEARNED) else SOURCE
        number = {"paper_number": NUMBERS[sentence], "paper_tag": "secondary"} \
            if sentence in NUMBERS else {}
        made = Claim.untestable(sentence, source, found, **number) if isinstance(found, str) else \
            Claim(sentence, source, **{**found.for_claim(), **number, **more})
        out.claim(made, name)

    return claim


def _text(model: Any, count: int, length: int, rng: np.random.Generator) -> list[Prompt]:
    """Natural text; random tokens for a model that cannot be given text."""
    if _no_text(model):
        return texts.random_tokens(model, count, length, rng)
    return texts.natural(model, count, length, rng)


def _kind(model: Any) -> str:
    """What `_text` gives, in one word."""
    return "random" if _no_text(model) else "natural"


def _no_text(model: Any) -> str:
    return "" if model.tokenizer is not None else \
        f"{model.name} has no tokenizer, so it was given random tokens"


def _shown(model: Any) -> str:
    """What `_text` gives, for captions and details."""
    return "natural text" if not _no_text(model) else \
        f"random tokens ({model.name} has no tokenizer)"


def _length(model: Any, settings: Settings) -> int:
    """The paper's 64 tokens; for an encoder 32, a sentence or two, which is what it is made for."""
    wanted = settings.pick(64 if model.kind == "decoder" else 32, tiny=24)
    return min(wanted, model.max_positions or wanted)


def _share(model: Any, settings: Settings, out: Output) -> bool:
    """How much of all attention goes to token 0; the paper's alpha, whatever the queries see.

    False if no layer can say.
    """
    length, count = _length(model, settings), settings.pick(64, tiny=12)
    prompts = _text(model, count, length, settings.rng(1))
    kind = _kind(model)
    out.record(prompts=prompts, name=f"{kind}-{model.name}")
    found = first_token.measure(model, prompts)
    out.save(f"{kind}-{model.name}", found)
    special = "[CLS]" if model.kind == "encoder" else "the first token"
    first = found["alpha"].isel(key=0).mean("head")
    if not bool(first.notnull().any()):
        _give_up(model.name, f"in no layer of {model.name} do half of {length} queries see the "
                 "first token: its windows are too short", out, special)
        return False
    figure, ax = canvas(1, 1)
    first_token.draw(found, ax)
    ax.set_title(f"{model.name}, {length} tokens")
    out.figure("heads", figure, PAPER.figures["heads"].replace("natural text", _shown(model)),
               of=model.name)

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

    # The layer is chosen on one half of the prompts and judged on the other.
    best = first.isel(prompt=slice(0, None, 2)).mean("prompt")
    layers = [int(x) for x in best.layer.values[best.values > 0.3]]
    strongest = int(np.nanargmax(best.values))
    if model.kind == "encoder" and model.n_layers > 5:
        middle = first.isel(layer=slice(1, 5)).mean("layer").values
        out.claim(Claim(
            f"Over layers 1 to 4, {special} takes 40 to 50 % of all attention.",
            "measured by this toolkit; no paper",
            **statistics.mean(middle).for_claim(), null=0.45, direction="equal", tolerance=0.05,
            figure="share", details={"T": length}), model.name)
    _claim(model.name, out)(
        SHARE.format(special), statistics.mean(first.isel(layer=strongest).values[1::2]),
        null=2 * uniform, figure="share", details={
            "layer": strongest, "layers above 0.3": layers, "uniform": uniform,
            "tokens": _no_text(model) or "natural text",
            "per layer": [round(float(x), 4) for x in best.values]})
    return True


def _decoder(model: Any, settings: Settings, out: Output) -> None:
    length, count = _length(model, settings), settings.pick(100, tiny=12)
    inputs, text = _inputs(model, count, length, settings), _kind(model)
    alphas = {
        kind: model.run(prompts, stats="received", logits="none").stats["received"]
        for kind, prompts in inputs.items()
    }
    for kind, prompts in inputs.items():
        out.record(prompts=prompts, name=f"inputs-{kind}-{model.name}")
    rates = {kind: _rate(alpha) for kind, alpha in alphas.items()}
    figure, ax = canvas(1, 1)
    keys = np.arange(length)[first_token.early_keys(length)]
    # Curves that coincide stay visible: each later one is thinner, darker and leaves gaps.
    looks = {"natural": ("primary", "-", 4.5, 0.5), "random": ("secondary", "--", 1.8, 1.0),
             "repeated": ("control", ":", 1.8, 1.0)}
    for kind, rate in rates.items():
        role, dashes, width, alpha = looks[kind]
        ax.plot(keys, rate.mean("prompt").values[keys], dashes, color=color(role), linewidth=width,
                alpha=alpha, label=LEGEND[kind])
    ax.set_xlabel("key position")
    ax.set_ylabel(f"sink rate at {EPSILON} (%)")
    ax.legend()
    ax.set_title(f"{model.name}, {length} tokens")
    out.figure("inputs", figure, f"{PAPER.figures['inputs']} Without a tokenizer there is no natural "
               "text." if _no_text(model) else "", of=model.name)

    claim = _claim(model.name, out)
    natural = rates[text].isel(key=0).values
    strongest = float(alphas[text].isel(key=0).mean("prompt").max())
    rate = float(natural.mean())
    more = {"unit": "%", "figure": "inputs", "details": {
        "T": length, "epsilon": EPSILON, "BOS": bool(texts.first_ids(model)),
        "strongest head": strongest, "tokens": _shown(model),
        "random text": float(rates["random"].isel(key=0).mean()),
        "repeated token": float(rates["repeated"].isel(key=0).mean())}}
    # A sink that is not there cannot be moved or lost.
    none = "" if rate >= FEW else (
        f"{model.name} has no sink to begin with: the first token is one in {rate:.1f} % of "
        f"(prompt, layer, head), and {FEW} % are needed")
    claim(NATURAL, _no_text(model) or statistics.mean(natural), null=FEW, **more)
    others = rates[text].isel(key=slice(1, length // 2)).max("key").values
    claim(OTHERS, none or statistics.difference(natural, others), null=0.0, **more)
    claim(RANDOM, statistics.mean(rates["random"].isel(key=0).values), null=FEW, **more)
    learned = _position_ids(model, inputs[text][0])
    alike = "" if learned is None else (
        f"the claim is about models whose copies of a token are all alike at first; "
        f"{model.name} adds a learned vector to each position")
    claim(REPEATED, alike or none or statistics.mean(rates["repeated"].isel(key=0).values),
          null=5.0, direction="below", **more)
    _swap(model, inputs[text], none, claim)
    _lengths(model, settings, out)
    _profile(model, inputs[text][: settings.pick(32, tiny=12)], out, claim)
    _hiding(model, inputs[text][: settings.pick(24, tiny=8)], settings, out, claim)
    if model.sink_kind == "learned":
        found = first_token.measure(model, inputs[text][:8])
        claim(LEARNED, statistics.mean(found["external"].mean(("layer", "head")).values), null=0.05)
    else:
        claim(LEARNED, f"{model.name} has no learned sink logits")


def _inputs(model: Any, count: int, length: int, settings: Settings) -> dict[str, list[Prompt]]:
    """Natural text (if it can be given), random tokens, one token repeated."""
    rng = settings.rng(2)
    drawn = texts.random_tokens(model, count, length, rng)
    return {
        **({} if _no_text(model) else {"natural": _text(model, count, length, rng)}),
        "random": drawn,
        # The paper repeats one token from the start, without BOS.
        "repeated": [Prompt.from_tokens([prompt.ids[-1]] * length) for prompt in drawn],
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


def _swap(model: Any, prompts: list[Prompt], none: str, claim: Any) -> None:
    ids = _position_ids(model, prompts[0])
    if ids is None or none:
        claim(SWAP, f"{model.name} has no learned absolute positions to exchange" if ids is None
              else none)
        return
    ids = ids.copy()
    ids[0, [0, 4]] = ids[0, [4, 0]]
    # With an explicit mask transformers does not take the jump in positions for packed sequences.
    ones = np.ones_like(ids)
    swapped = [Prompt(p.ids, inputs={"position_ids": ids, "attention_mask": ones}) for p in prompts]
    alpha = model.run(swapped, stats="received", logits="none").stats["received"]
    rate = _rate(alpha)
    claim(SWAP, statistics.difference(rate.isel(key=4).values, rate.isel(key=0).values),
          null=0.0, unit="percentage points, Sink_5 minus Sink_1 after the exchange", details={
              "Sink_1": float(rate.isel(key=0).mean()), "Sink_5": float(rate.isel(key=4).mean())})


def _lengths(model: Any, settings: Settings, out: Output) -> None:
    if not out.wants("length"):
        return
    longest = settings.pick(256, tiny=32)
    lengths = [n for n in (16, 32, 64, 128, 256, 512) if n <= min(longest, model.max_positions
                                                                   or longest)]
    rows = []
    for n in lengths:
        prompts = _text(model, settings.pick(24, tiny=4), n, settings.rng(3, n))
        alpha = model.run(prompts, stats="received", logits="none").stats["received"]
        rows.append([float(_rate(alpha, e).isel(key=0).mean()) for e in EPSILONS])
    data = xr.Dataset({"rate": (("length", "epsilon"), np.array(rows))},
                      {"length": lengths, "epsilon": list(EPSILONS)})
    out.save(f"lengths-{model.name}", Result(data, model.manifest()))
    figure, ax = canvas(1, 1, width=COLUMN * 1.2, height=2.5)
    for e in EPSILONS:
        ax.plot(lengths, data["rate"].sel(epsilon=e), marker="o", markersize=3, label=f"{e}")
    ax.set_xscale("log", base=2)
    ax.set_xticks(lengths, [str(n) for n in lengths])
    ax.set_xlabel("prompt length T (tokens)")
    ax.set_ylabel("sink rate of token 0 (%)")
    ax.set_ylim(0, min(ax.get_ylim()[1], 101))
    ax.legend(title="threshold", loc="center left", bbox_to_anchor=(1.0, 0.5))
    ax.set_title(model.name)
    out.figure("length", figure, of=model.name)


def _encoder_lengths(model: Any, settings: Settings, out: Output) -> None:
    """Share of all attention on token 0 against length: with more keys to share, it falls."""
    if not out.wants("length"):
        return
    lengths = [n for n in settings.pick((8, 16, 32, 64, 128), tiny=(8, 16))
               if n <= (model.max_positions or n)]
    figure, ax = canvas(1, 1, width=COLUMN * 1.2, height=2.5)
    rows = []
    for n in lengths:
        prompts = _text(model, settings.pick(24, tiny=4), n, settings.rng(3, n))
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
    ax.legend(loc="center left", bbox_to_anchor=(1.0, 0.5))
    ax.set_title(model.name)
    out.figure("length", figure, "Share of all attention that token 0 takes, against text length "
               "(an encoder: every query sees every key).", of=model.name)


def _profile(model: Any, prompts: list[Prompt], out: Output, claim: Any) -> None:
    found = first_token.measure(model, prompts)
    figure, axes = canvas(1, 4, width=PAGE, height=2.1)
    panels = (("residual_norm", "residual norm"), ("key_norm", "key norm"),
              ("value_norm", "value norm"))
    for ax, (name, label) in zip(axes, panels):
        norms = found[name].mean("kv_head") if "kv_head" in found[name].dims else found[name]
        layer_curve.draw(ax, {"first token": norms.isel(position=0),
                              "others": norms.isel(position=slice(1, None)).mean("position")},
                         label=label, legend=False,
                         roles={"first token": "primary", "others": "control"})
        if ax is not axes[2]:  # the same note once
            for text in [t for t in ax.texts if t.get_gid() == "note"]:
                text.remove()
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=2)
    heat.draw(axes[3], found["angle"].mean("prompt"), label="cosine to the first key", signed=True)
    figure.suptitle(model.name)
    out.figure("profile", figure, of=model.name)
    sink = found["alpha"].isel(key=0).mean("prompt").values
    layer, head = np.unravel_index(np.nanargmax(sink), sink.shape)
    group = model.n_heads // model.n_kv_heads
    value = found["value_norm"].isel(layer=layer, kv_head=head // group)
    ratio = (value.isel(position=0) / value.isel(position=slice(1, None)).mean("position")).values
    where = {"head": f"L{layer}H{head}", "alpha": float(sink[layer, head])}
    none = "" if sink[layer, head] > EPSILON else (
        f"no head of {model.name} has a sink: the strongest gives the first token "
        f"{sink[layer, head]:.2f} of its attention ({EPSILON} is needed)")
    claim(VALUE, none or statistics.mean(ratio), null=1.0, direction="below", figure="profile",
          details=where)
    norms = found["residual_norm"]
    peak = norms.isel(position=0) / norms.isel(position=slice(1, None)).mean("position")
    # The layer is chosen on one half of the prompts and judged on the other.
    highest = int(peak.isel(prompt=slice(0, None, 2)).mean("prompt").argmax("layer"))
    claim(RESIDUAL, none or statistics.mean(peak.isel(layer=highest).values[1::2]), null=2.0,
          figure="profile", unit="times", details={"entering layer": highest})
    cosine = found["angle"].isel(layer=layer, head=head).values
    claim(ANGLE, none or statistics.mean(cosine), null=0.0, figure="profile", unit="cosine",
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
    ax.set_xticks(sizes, [str(n) for n in sizes])
    ax.legend(loc="lower left", bbox_to_anchor=(0.0, 1.02), ncols=2, borderaxespad=0.0)
    ax.set_title(model.name, pad=20)
    out.figure("hiding", figure, of=model.name)
    loss, chance = float(found["baseline"].mean()), float(np.log(model.d_vocab))
    effect = f"{model.name} predicts no better than chance: its loss is {loss:.2f} nats, that of " \
        f"guessing {chance:.2f}" if loss > CHANCE_LOSS * chance else \
        statistics.difference(added.sel(n_first=4).values, control.sel(n_first=4).values)
    claim(HIDING, effect, null=0.0, unit="nats", causal=True, figure="hiding",
          control="four random early tokens, 5 seeds", details={
              "added by the first four": float(added.sel(n_first=4).mean()),
              "added by four random": float(control.sel(n_first=4).mean()),
              "added by the first one": float(added.sel(n_first=1).mean())})
