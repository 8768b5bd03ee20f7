"""What the sink experiment runs on: models with planted secondary sinks, texts for any model."""

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Optional

import numpy as np
import torch

import interp
from experiments._paper import Settings
from interp.core import Prompt
from interp.core.errors import ModelRefused
from interp.models.model import Model
from interp.models.prompting import printable
from interp.organisms import reader
from interp.organisms.attraction import attract_to
from interp.organisms.plant import Planted, make_room, massive_coordinate, residuals
from interp.organisms.plant import secondary_sink as plant_secondary
from interp.organisms.surgery import free_axes

LONGEST = 4096
"""Tokens of a prompt at most, unless the model takes fewer."""

WORDS = ("of", "by", "at")
"""The reader's words that become secondary sinks in the planted models."""

ATTRACT = 3.0
"""Logits that a key along the planted direction gains."""

QUIET = 1e-3
"""What the blocks put between the reader's own write, relative to a copy of its block."""

PLANTED = "planted"
PLANTED_READER = "planted-reader"


@dataclass(frozen=True)
class Subject:
    """A model, the prompts to run it on, and, where sinks were planted, what that decided."""

    model: Model
    prompts: tuple[Prompt, ...]
    planted: str = ""

    @property
    def name(self) -> str:
        return self.model.name


def subject(name: str, settings: Settings) -> Subject:
    """The model of this name with its prompts.

    Raises `ModelRefused` where nothing can be planted, and what `interp.open_model` raises.
    """
    if name == PLANTED:
        return _planted(settings)
    if name == PLANTED_READER:
        return _planted_reader(settings)
    model = interp.open_model(name, **settings.opening())
    return Subject(model, prompts_for(model, settings))


def prompts_for(model: Model, settings: Settings) -> tuple[Prompt, ...]:
    """The reader's own documents for its vocabulary; else long arithmetic; else random tokens."""
    if is_reader(model):
        return documents(settings, *settings.pick((20, 128), tiny=(8, 48)))
    longest = min(settings.pick(LONGEST, tiny=96), model.max_positions or LONGEST)
    count = settings.pick(8, tiny=6)
    if model.tokenizer is not None:
        # Not `model.prompt`, which refuses a text that is longer than the model reads.
        made = [model.tokenizer(arithmetic(settings.rng(7, i), 6 * longest))["input_ids"][:longest]
                for i in range(count)]
        return tuple(Prompt.from_tokens(ids, tokens=printable(model.tokenizer, ids))
                     for ids in made)
    # Without a tokenizer every text is as good as random tokens.
    rng, length = settings.rng(8), min(longest, settings.pick(128, tiny=48))
    first = getattr(model.config.get_text_config(), "bos_token_id", None)
    # The token of the start occurs at the start only, as in every text.
    others = [token for token in range(model.d_vocab) if token != first]
    tokens = rng.choice(others, (20 if not settings.tiny else 12, length))
    if first is not None:
        tokens[:, 0] = first
    return tuple(Prompt.from_tokens(row) for row in tokens)


def is_reader(model: Model) -> bool:
    """Whether the model speaks the reader's language."""
    if model.tokenizer is None:
        return False
    return model.tokenizer.get_vocab() == reader.tokenizer().get_vocab()


def documents(settings: Settings, count: int, length: int, stream: int = 9) -> tuple[Prompt, ...]:
    """Documents of the reader's language."""
    tokens, _ = reader.sample(settings.rng(stream), count, length, repeated=0.0)
    return tuple(Prompt.from_tokens(row, tokens=[reader.WORDS[t] for t in row]) for row in tokens)


def arithmetic(rng: np.random.Generator, characters: int) -> str:
    """A long worked exercise, in small steps, of at least so many characters."""
    goods = ("apples", "boxes", "coins", "tickets", "books", "bottles")
    thing = str(rng.choice(goods))
    total = int(rng.integers(10, 90))
    lines = [f"Problem: A shop starts with {total} {thing} and changes its stock many times. "
             "Find the final number. Let me work through it step by step.\n"]
    written, step = len(lines[0]), 0
    while written < characters:
        step += 1
        change, times = int(rng.integers(2, 60)), int(rng.integers(2, 10))
        kind = int(rng.integers(3))
        if kind == 0:
            new = total + change * times
            line = (f"Step {step}: {times} deliveries of {change} {thing} arrive. "
                    f"{times} * {change} = {times * change}, and "
                    f"{total} + {times * change} = {new}.")
        elif kind == 1 and total > change:
            new = total - change
            line = f"Step {step}: {change} {thing} are sold. {total} - {change} = {new}."
        else:
            new = total + change
            line = (f"Step {step}: {change} {thing} come back, because (as before) some buyers "
                    f"changed their minds. {total} + {change} = {new}.")
        if new > 5000:
            new = total // 2
            line = f"Step {step}: half of the {thing} are moved away. {total} / 2 = {new}."
        total = new
        if step % 7 == 0:
            line += f" Let me check: so far there are {total} {thing}. Yes, that is right."
        lines.append(line + "\n")
        written += len(line) + 1
    return "".join(lines)


# -- planted models ------------------------------------------------------------------------------


def _planted(settings: Settings) -> Subject:
    """A deep random Llama in which one MLP writes the first token's direction for three words.

    Only the norms of the writes are chosen: that a larger one lasts longer follows from the growth
    of the rest of the stream, and that attention divides between the sinks from the softmax.
    """
    depth, width = settings.pick((32, 64), tiny=(26, 32))
    hf = reader.build(settings.seed, d_model=width, layers=depth, heads=4, kv_heads=2)
    with torch.no_grad():
        for weight in hf.parameters():
            if weight.ndim > 1:
                weight.mul_(3.0)
    onset = round(0.47 * depth)
    # Beyond this many layers the paper's rule would call it a primary sink.
    until = min(depth - 1, onset + depth - 16)
    made = plant(hf, 3, onset, until, depth - 1, settings)
    model = Model(made.model, PLANTED, tokenizer=reader.tokenizer(),
                  source={"planted": _summary(made)})
    return Subject(model, documents(settings, *settings.pick((20, 96), tiny=(12, 64))),
                   f"what was planted in {PLANTED} decides this, not what a model learned")


def _planted_reader(settings: Settings) -> Subject:
    """The trained reader, deepened by blocks that write next to nothing, with planted sinks."""
    trained = interp.open_model("reader", **settings.opening())
    hf = deepened(trained.hf, 3 if settings.tiny else 4)
    depth = len(hf.model.layers)
    onset = round(0.47 * depth)
    made = plant(hf.cpu(), 1, onset, depth - 1, depth - 1, settings)
    model = Model(made.model.to(trained.device), PLANTED_READER, tokenizer=trained.tokenizer,
                  source={"planted": _summary(made), "quiet blocks": depth - trained.n_layers})
    return Subject(model, documents(settings, *settings.pick((20, 96), tiny=(12, 64))),
                   f"what was planted in {PLANTED_READER} decides this, not what a model learned")


def deepened(hf: Any, factor: int) -> Any:
    """A copy of a Llama with `factor - 1` blocks that write next to nothing after each of its own.

    It does the same and has the depth that secondary sinks need.
    """
    made = copy.deepcopy(hf)
    blocks = []
    for block in made.model.layers:
        blocks.append(block)
        for _ in range(factor - 1):
            quiet = copy.deepcopy(block)
            with torch.no_grad():
                quiet.self_attn.o_proj.weight.mul_(QUIET)
                quiet.mlp.down_proj.weight.mul_(QUIET)
            blocks.append(quiet)
    for number, block in enumerate(blocks):
        block.self_attn.layer_idx = number
    made.model.layers = torch.nn.ModuleList(blocks)
    made.config.num_hidden_layers = len(blocks)
    if getattr(made.config, "layer_types", None):
        made.config.layer_types = [made.config.layer_types[0]] * len(blocks)
    return made


def plant(
    hf: Any, start: int, onset: int, until: int, end: int, settings: Settings
) -> Planted:
    """A primary sink in blocks `start` to `end`, written again at `onset`, and secondary sinks from
    there on, taken back at `until` where they last so long; all heads look for their direction."""
    tokens, _ = reader.sample(settings.rng(10), 8, 48, repeated=0.0)
    ids = torch.tensor(tokens)

    def ordinary(model: Any) -> list[float]:
        norms = residuals(model, {"input_ids": ids})[:, :, 2:].norm(dim=-1)
        return norms.median(-1).values.mean(0).tolist()

    # Not `primary_sink`: the reader has a small sink of its own beside which this one is written.
    size = 40 * ordinary(hf)[until - 1]
    hf = make_room(hf, 6, 64)
    axis = free_axes(hf)[-1]
    made = massive_coordinate(hf, {axis: size}, start, end)
    attract_to(made.model, {"input_ids": ids}, made.direction, range(start + 1, end), ATTRACT,
               ids != reader.BOS)
    made = massive_coordinate(made, {axis: 1.25 * size}, onset, end)
    norms = ordinary(made.model)
    for word, share in zip(WORDS, (0.2, 0.5, None)):
        # A sink ends where the rest of the stream has grown to 0.484 of the write (cosine 0.9).
        end = onset + round((share or 1.0) * (until - 1 - onset))
        write = norms[end] / 0.484 * (1.0 if share else 2.0)
        total = (write**2 + norms[onset] ** 2) ** 0.5
        made = plant_secondary(made, reader.TOKEN[word], onset, total, until, min_cosine=0.0)
    return made


def _summary(made: Planted) -> list[dict[str, Any]]:
    """What was planted, without the long vectors."""
    content = made.describe()
    return [{k: one[k] for k in ("kind", "tokens", "layer", "until", "norm", "attract")}
            for one in [*content["before"], content]]


def reason_against(name: str, error: Optional[Exception]) -> str:
    """Why a planted model could not be made."""
    return f"nothing could be planted in {name}: {error}"


__all__: Sequence[str] = (
    "PLANTED", "PLANTED_READER", "ModelRefused", "Subject", "arithmetic", "deepened", "documents",
    "is_reader", "plant", "prompts_for", "reason_against", "subject",
)
