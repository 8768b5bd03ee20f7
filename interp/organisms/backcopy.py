"""`backcopy-1l`, `backcopy-3l`: GPT-style models of the Bigram-Backcopy task (arXiv 2410.13835).

The next symbol follows a Markov chain, except after one of three trigger symbols, where the
symbol before the trigger is copied. The one head of a layer has work to do after a trigger only;
on all other queries it must write nothing, and learns to rest on the first token: attention sink,
value-state drain, residual-state peak.

The paper's chain is that of Tiny Shakespeare. Here it is drawn from a seed over the same 65
symbols and fitted to the numbers that matter: the triggers' frequencies (.152 .085 .060), the
share of triggers in a sequence (25.6 %) and the oracle's loss on non-triggers (2.23 nats).
"""

from functools import lru_cache
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Int
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors
from torch import Tensor
from transformers import (
    AttentionInterface,
    AttentionMaskInterface,
    OPTConfig,
    OPTForCausalLM,
    PreTrainedTokenizerFast,
)
from transformers.masking_utils import eager_mask

from interp.organisms.train import Recipe

TRIGGERS = " et"
SYMBOLS = [
    *TRIGGERS,
    *(
        s
        for s in "\n!$&',-.3:;?ABCDEFGHIJKLMNOPQRSTUVWXYZabcdfghijklmnopqrsuvwxyz"
        if s not in TRIGGERS
    ),
]
BOS = len(SYMBOLS)
VOCABULARY = len(SYMBOLS) + 1
ORACLE_LOSS = 2.23
TRIGGER_SHARE = 0.256
RELU_ATTENTION = "backcopy_relu"
_TRIGGER_FREQUENCIES = (0.152, 0.085, 0.060)
_CHAIN_SEED = 2410_13835
_K = len(TRIGGERS)


class Chain(NamedTuple):
    """A Markov chain: `unigram [symbol]`, `bigram [symbol, next symbol]`; triggers come first."""

    unigram: np.ndarray
    bigram: np.ndarray

    @property
    def first(self) -> np.ndarray:
        """The distribution of a sequence's first symbol: the unigram without the triggers."""
        weights = np.where(np.arange(len(self.unigram)) < _K, 0.0, self.unigram)
        return weights / weights.sum()


def _scaled(unigram: np.ndarray, affinity: np.ndarray) -> np.ndarray:
    """Bigram table with the affinity's pattern and exactly this unigram (Sinkhorn scaling)."""
    joint = unigram[:, None] * unigram * np.exp(affinity)
    for _ in range(200):
        joint *= (unigram / joint.sum(1))[:, None]
        joint *= unigram / joint.sum(0)
    return joint / joint.sum(1, keepdims=True)


def _root(function, low: float, high: float) -> float:  # of an increasing function, by bisection
    for _ in range(40):
        middle = (low + high) / 2
        low, high = (middle, high) if function(middle) < 0 else (low, middle)
    return (low + high) / 2


@lru_cache(maxsize=1)
def chain() -> Chain:
    """The task's Markov chain, the same in every call.

    Example:
        >>> from interp.organisms import backcopy
        >>> backcopy.chain().unigram[:3].round(3).tolist()
        [0.152, 0.085, 0.06]
    """
    rng = np.random.default_rng(_CHAIN_SEED)
    rest = np.exp(-np.arange(len(SYMBOLS) - _K) / 8)  # about as many symbols in use as in English
    unigram = np.concatenate(
        [_TRIGGER_FREQUENCIES, rest / rest.sum() * (1 - sum(_TRIGGER_FREQUENCIES))]
    )
    noise = rng.standard_normal((len(SYMBOLS), len(SYMBOLS)))
    np.fill_diagonal(noise, -1.0)
    block = np.zeros_like(noise)
    block[:_K, :_K] = 1.0

    def table(sharpness: float, together: float) -> Chain:
        return Chain(unigram, _scaled(unigram, sharpness * noise - together * block))

    def sharp_enough(together: float) -> float:
        return _root(lambda s: ORACLE_LOSS - oracle(256, table(s, together))["bigram"], 0.0, 4.0)

    def together_enough(sharpness: float) -> float:
        return _root(
            lambda t: oracle(256, table(sharpness, t))["trigger_share"] - TRIGGER_SHARE, -6.0, 6.0
        )

    # Two conditions, two unknowns, solved in turn: each depends mostly on its own.
    together = 0.0
    for _ in range(6):
        together = together_enough(sharp_enough(together))
    return table(sharp_enough(together), together)


def _entropy(rows: np.ndarray) -> np.ndarray | np.floating:
    return -(rows * np.log(np.where(rows > 0, rows, 1.0))).sum(-1)


def oracle(length: int = 256, of: Chain | None = None, *, bos: bool = True) -> dict[str, float]:
    """Exact losses in nats of who knows the chain and the rule, for sequences of `length` tokens.

    Example:
        >>> from interp.organisms import backcopy
        >>> round(backcopy.oracle()["bigram"], 4)
        2.23

    `bigram`: mean over the non-trigger queries (BOS is one of them), `copy`: over the trigger
    queries (0), `trigger_share`: expected share of triggers among the symbols, `chance`: uniform
    guess over the vocabulary. Computed by propagating the distribution of (symbol, last
    non-trigger) over the positions, not by sampling.
    """
    unigram, bigram = of = chain() if of is None else of
    entropy, to_trigger = _entropy(bigram), bigram[:, :_K].sum(1)
    at, owed = (
        of.first.copy(),
        np.zeros_like(unigram),
    )  # at a symbol; at a trigger that owes this symbol
    loss, count, triggers, symbols = (
        (_entropy(of.first), 1.0, 0.0, 0) if bos else (0.0, 0.0, 0.0, 0)
    )
    for _ in range(length - 1 if bos else length):
        loss, count, triggers, symbols = (
            loss + at @ entropy,
            count + at.sum(),
            triggers + owed.sum(),
            symbols + 1,
        )
        step = at @ bigram
        step[:_K] = 0.0
        at, owed = step + owed, at * to_trigger
    return {
        "bigram": float(loss / count),
        "copy": 0.0,
        "trigger_share": float(triggers / symbols),
        "chance": float(np.log(VOCABULARY)),
    }


def sample(
    rng: np.random.Generator, batch: int, length: int, *, bos: bool = True
) -> tuple[np.ndarray, np.ndarray]:
    """Bigram-Backcopy sequences and where their triggers are, both `[batch, length]`.

    Example:
        >>> import numpy as np
        >>> from interp.organisms import backcopy
        >>> tokens, trigger = backcopy.sample(np.random.default_rng(0), 2, 16)
        >>> bool((tokens[:, 0] == backcopy.BOS).all()), trigger.dtype
        (True, dtype('bool'))

    `bos=False` is the negative control: the same sequences without the first token.
    """
    of = chain()
    cumulative, first = np.cumsum(of.bigram, 1), np.cumsum(of.first)
    drawn = length - 1 if bos else length
    draws = rng.random((batch, drawn))
    out = np.empty((batch, drawn), dtype=np.int64)
    for step in range(drawn):
        if step == 0:
            out[:, 0] = np.minimum((first <= draws[:, :1]).sum(1), BOS - 1)
            continue
        before = out[:, step - 1]
        chosen = np.minimum((cumulative[before] <= draws[:, step, None]).sum(1), BOS - 1)
        out[:, step] = np.where(before < _K, out[:, max(0, step - 2)], chosen)
    if bos:
        out = np.concatenate([np.full((batch, 1), BOS), out], 1)
    return out, out < _K


def risks(
    logits: Float[Tensor, "batch position d_vocab"], tokens: Int[Tensor, "batch position"]
) -> dict[str, float]:
    """Cross-entropy in nats to the oracle, at trigger queries (`copy`) and the others (`bigram`).

    Example:
        >>> import numpy as np, torch
        >>> from interp.organisms import backcopy
        >>> tokens = torch.as_tensor(backcopy.sample(np.random.default_rng(0), 2, 16)[0])
        >>> found = backcopy.risks(torch.zeros(2, 16, backcopy.VOCABULARY), tokens)
        >>> round(found["copy"], 3), round(found["bigram"], 3)
        (4.19, 4.19)

    `bigram_oracle` is the least `bigram` possible on these very queries, `bigram_excess` the
    difference; `copy_accuracy` the share of trigger queries whose likeliest token is the copied
    one. Source: arXiv 2410.13835.
    """
    of = chain()
    table = np.zeros((VOCABULARY, VOCABULARY))
    table[:BOS, :BOS] = of.bigram
    table[BOS, :BOS] = of.first
    goal = torch.as_tensor(table, dtype=torch.float64, device=logits.device)
    trigger = tokens < _K
    trigger[:, 0] = False  # without a token before it there is nothing to copy
    known = logits.detach().double().log_softmax(-1)
    each = -(goal[tokens] * known).sum(-1)
    bigram, least = (
        each[tokens >= _K].mean(),
        torch.as_tensor(_entropy(table), device=logits.device)[tokens[tokens >= _K]].mean(),
    )
    before = tokens.roll(1, 1)
    copied = -known.gather(-1, before[..., None])[..., 0][trigger]
    right = (logits.argmax(-1) == before)[trigger].double()
    return {
        "copy": float(copied.mean()),
        "bigram": float(bigram),
        "bigram_oracle": float(least),
        "bigram_excess": float(bigram - least),
        "copy_accuracy": float(right.mean()),
    }


def _relu_attention(module, query, key, value, attention_mask, scaling=1.0, dropout=0.0, **_):
    """relu(score) / number of visible keys in place of the softmax (arXiv 2410.13835)."""
    scores = torch.relu(query @ key.transpose(-1, -2) * scaling)
    rows, columns = scores.shape[-2:]
    visible = torch.ones(rows, columns, dtype=torch.bool, device=scores.device).tril(columns - rows)
    if attention_mask is not None:
        visible = visible & (attention_mask[..., :columns] >= 0)
    weights = torch.where(visible, scores, 0.0) / visible.sum(-1, keepdim=True).clamp(min=1)
    return (weights @ value).transpose(1, 2).contiguous(), weights


# Under one name, function and mask: without the second, transformers drops the mask in silence.
AttentionInterface.register(RELU_ATTENTION, _relu_attention)
AttentionMaskInterface.register(RELU_ATTENTION, eager_mask)


def build(
    seed: int,
    *,
    layers: int = 1,
    d_model: int = 256,
    positions: int = 256,
    attention: Literal["softmax", "relu"] = "softmax",
) -> OPTForCausalLM:
    """The untrained model: one head per layer, ReLU MLP of 4 * d_model, pre-LN, no linear biases.

    Example:
        >>> from interp.organisms import backcopy
        >>> type(backcopy.build(0, d_model=16)).__name__
        'OPTForCausalLM'

    Initialized as PyTorch does (the paper's choice), not as OPT does. `attention="relu"` needs this
    module to be imported wherever the model is loaded again: `attn_implementation=RELU_ATTENTION`.
    """
    config = OPTConfig(
        vocab_size=VOCABULARY,
        hidden_size=d_model,
        num_hidden_layers=layers,
        ffn_dim=4 * d_model,
        num_attention_heads=1,
        max_position_embeddings=positions,
        do_layer_norm_before=True,
        word_embed_proj_dim=d_model,
        dropout=0.0,
        activation_function="relu",
        enable_bias=False,
        tie_word_embeddings=False,
        pad_token_id=None,
        bos_token_id=BOS,
        eos_token_id=None,  # a padding id would freeze that symbol's embedding
    )
    config._attn_implementation = RELU_ATTENTION if attention == "relu" else "sdpa"
    torch.manual_seed(seed)
    model = OPTForCausalLM(config)
    for module in model.modules():
        if isinstance(module, (torch.nn.Linear, torch.nn.Embedding, torch.nn.LayerNorm)):
            module.reset_parameters()
    return model


def tokenizer(*, bos: bool = True) -> PreTrainedTokenizerFast:
    """Every character is a token; BOS `<s>` is put in front unless `bos=False`.

    Example:
        >>> from interp.organisms import backcopy
        >>> encode = backcopy.tokenizer()
        >>> ids = encode("Ab a").input_ids
        >>> ids[0] == backcopy.BOS, encode.decode(ids[1:])
        (True, 'Ab a')
    """
    raw = Tokenizer(
        models.WordLevel(
            {**{symbol: i for i, symbol in enumerate(SYMBOLS)}, "<s>": BOS}, unk_token="$"
        )
    )
    raw.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    raw.decoder = decoders.Fuse()
    if bos:
        raw.post_processor = processors.TemplateProcessing(
            single="<s> $A", pair="<s> $A $B", special_tokens=[("<s>", BOS)]
        )
    return PreTrainedTokenizerFast(
        tokenizer_object=raw,
        bos_token="<s>",
        unk_token="$",
        model_max_length=256,
        clean_up_tokenization_spaces=False,
    )


@torch.no_grad()
def observe(
    model: Any, seed: int, *, length: int = 256, bos: bool = True, count: int = 32
) -> dict[str, float]:
    """Per layer: attention to the first token by kind of query, value and residual norm ratios.

    Example:
        >>> from interp.organisms import backcopy
        >>> found = backcopy.observe(backcopy.build(0, d_model=16), 0, length=8, count=2)
        >>> 0 < found["layer_0_first_token_attention_non_trigger"] < 1
        True
    """
    drawn, _ = sample(np.random.default_rng([seed, 2]), count, length, bos=bos)
    tokens = torch.as_tensor(drawn, device=model.device)
    before, values, handles = model.config._attn_implementation, [], []
    for layer in model.model.decoder.layers:
        out = layer.self_attn.out_proj
        handles.append(
            layer.self_attn.v_proj.register_forward_hook(
                lambda m, i, v, out=out: values.append(out(v).norm(dim=-1))
            )
        )
    if before != RELU_ATTENTION:
        model.set_attn_implementation("eager")
    try:
        result = model(
            input_ids=tokens, output_attentions=True, output_hidden_states=True, use_cache=False
        )
    finally:
        for handle in handles:
            handle.remove()
        model.set_attn_implementation(before)
    trigger = tokens < _K
    found = {}
    for layer, (attention, value) in enumerate(zip(result.attentions, values)):
        first = attention[:, 0, :, 0]
        found[f"layer_{layer}_first_token_attention_non_trigger"] = float(first[~trigger].mean())
        found[f"layer_{layer}_first_token_attention_trigger"] = float(first[trigger].mean())
        found[f"layer_{layer}_value_norm_ratio"] = float(value[:, 0].mean() / value[:, 1:].mean())
        norm = result.hidden_states[layer].norm(dim=-1)
        found[f"layer_{layer}_input_residual_norm_ratio"] = float(
            norm[:, 0].mean() / norm[:, 1:].mean()
        )
    return found


def recipe(
    *,
    layers: int = 1,
    d_model: int = 256,
    length: int = 256,
    batch: int = 16,
    short: int | None = None,
    steps: int = 2000,
    lr: float = 1e-3,
    attention: Literal["softmax", "relu"] = "softmax",
    optimizer: Literal["adamw", "sgd"] = "adamw",
    bos: bool = True,
    schedule: Literal["cosine", "constant"] = "cosine",
    name: str | None = None,
) -> Recipe:
    """A Bigram-Backcopy training run; the defaults are the bundled models', steps apart.

    Example:
        >>> from interp.organisms import backcopy
        >>> backcopy.recipe(layers=3).name
        'backcopy-3l'
        >>> backcopy.recipe(d_model=64, attention="relu", bos=False).name
        'backcopy-1l-d64-relu-no-bos'

    With `short`, three of four batches have sequences of that length instead, as many tokens: the
    fewer keys there are, the more it costs to attend to them for nothing, and the sooner the sink
    is there. `length` stays the length of evaluation.
    The paper's setting is batch 512, length 256, AdamW 3e-4 constant (SGD: .03, momentum .9),
    10,000 steps.
    """

    def make(seed: int) -> torch.nn.Module:
        return build(
            seed, layers=layers, d_model=d_model, positions=max(256, length), attention=attention
        )

    def loss(model: Any, rng: np.random.Generator, step: int) -> Tensor:
        now = length if short is None or rng.random() < 0.25 else short
        drawn, _ = sample(rng, batch * length // now, now + 1, bos=bos)
        tokens = torch.as_tensor(drawn).to(model.device)
        logits = model(input_ids=tokens[:, :-1], use_cache=False).logits
        return torch.nn.functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].reshape(-1))

    def measure(model: Any, seed: int) -> dict[str, float]:
        tokens = torch.as_tensor(
            sample(np.random.default_rng([seed, 1]), 32, length, bos=bos)[0]
        ).to(model.device)
        found = risks(model(input_ids=tokens, use_cache=False).logits, tokens)
        return {
            "copy_accuracy": found.pop("copy_accuracy"),
            **{f"{key}_risk": value for key, value in found.items()},
        }

    parts = [
        f"backcopy-{layers}l",
        *([f"d{d_model}"] if d_model != 256 else []),
        *([attention] if attention != "softmax" else []),
        *([optimizer] if optimizer != "adamw" else []),
        *(["no-bos"] if not bos else []),
    ]
    return Recipe(
        name=name or "-".join(parts),
        build=make,
        loss=loss,
        evaluate=measure,
        observe=lambda model, seed: observe(model, seed, length=length, bos=bos),
        export=lambda model, folder: tokenizer(bos=bos).save_pretrained(folder),
        steps=steps,
        lr=lr,
        weight_decay=1e-4,
        decay="all",
        betas=(0.9, 0.99),
        warmup=0,
        clip=None,
        schedule=schedule,
        optimizer=optimizer,
        evaluate_every=200,
        checkpoint_every=100,
        notes=f"Bigram-Backcopy (arXiv 2410.13835), {layers} layer(s) of one head, width "
        f"{d_model}, {attention} attention. Unlike the paper: a synthetic Markov chain instead "
        f"of Tiny Shakespeare, batches of {batch} instead of 512 sequences, fewer steps than "
        f"10,000, a {schedule} learning rate from {lr} instead of a constant 3e-4. Linear layers "
        "have no biases; layer norms keep their affine parameters.",
        data=f"Fresh sequences of {length} tokens in every step"
        f"{f', of {short} in 3 of 4' if short else ''}. The oracle's loss on non-triggers is "
        f"{ORACLE_LOSS} nats at 256 tokens; the triggers {', '.join(map(repr, TRIGGERS))} have "
        f"the frequencies {_TRIGGER_FREQUENCIES} and fill {TRIGGER_SHARE:.1%} of the positions.",
    )
