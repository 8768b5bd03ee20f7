"""Decoding with a second opinion: contrast, sum or mixture of two logit vectors, step by step.

Most methods against hallucination have one shape: something is chosen in the picture (a set of
image tokens, a direction), from it come second logits (another view of the same prompt, or states
of the model's own pass), and the two are combined. Here is that shape; the methods are in
`interp.flow`, each in the file of what it rests on, and this `Method` itself is greedy decoding.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal, Optional, SupportsFloat, SupportsIndex, Union, get_args

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from interp.core import Intervention, Prompt
from interp.core.errors import ModelRefused, PromptError
from interp.core.intervention import block, each
from interp.models import tower
from interp.models.model import Model
from interp.models.stepping import Stepping

Kind = Literal["contrast", "sum", "mix"]
Logits = Union[Float[Tensor, "*row vocab"], Float[np.ndarray, "*row vocab"]]


@dataclass(frozen=True)
class Combiner:
    """Two logit vectors made one.

    With l the model's own logits and m the second ones:

        contrast   (1 + alpha) l - alpha m
        sum        l + alpha m
        mix        (1 - alpha) l + alpha m

    Tokens less probable under l than `beta` times the most probable one are cut (minus infinity).

    Example:
        >>> own, other = torch.tensor([2.0, 1.0, -9.0]), torch.tensor([2.0, 0.0, -9.0])
        >>> Combiner("contrast", 1.0, beta=0.1)(own, other)
        tensor([2., 2., -inf])
    """

    kind: str
    alpha: SupportsFloat
    beta: SupportsFloat = 0.0

    def __post_init__(self) -> None:
        if self.kind not in get_args(Kind):
            raise ValueError(f"cannot combine by {self.kind!r}; choose one of: "
                             f"{', '.join(get_args(Kind))}.")
        if not 0 <= float(self.beta) <= 1:
            raise ValueError(f"beta is a share of the largest probability, 0 to 1, not {self.beta}.")
        if not 0 <= float(self.alpha) < float("inf") or self.kind == "mix" and float(self.alpha) > 1:
            raise ValueError(f"alpha cannot be {self.alpha} for {self.kind!r}.")

    def __call__(self, first: Logits, second: Logits) -> Float[Tensor, "*row vocab"]:
        own, other = torch.as_tensor(first), torch.as_tensor(second)
        if own.shape != other.shape:
            raise ValueError(f"logits of shapes {tuple(own.shape)} and {tuple(other.shape)} cannot "
                             "be combined.")
        alpha = float(self.alpha)
        made = {"contrast": lambda: (1 + alpha) * own - alpha * other,
                "sum": lambda: own + alpha * other,
                "mix": lambda: (1 - alpha) * own + alpha * other}[self.kind]()
        return made.masked_fill(~plausible(own, self.beta), float("-inf"))


def plausible(logits: Logits, beta: SupportsFloat) -> Tensor:
    """Tokens with at least `beta` times the probability of the most probable one.

    Example:
        >>> plausible(torch.tensor([0.0, -1.0, -3.0]), 0.1)
        tensor([ True,  True, False])
    """
    values = torch.as_tensor(logits)
    if float(beta) <= 0:
        return torch.ones_like(values, dtype=torch.bool)
    return values >= values.amax(-1, keepdim=True) + float(np.log(float(beta)))


@dataclass(frozen=True, eq=False)
class Plan:
    """What a method does to one prompt.

    Attributes:
        write: interventions on the model's own pass.
        second: the prompt of the second view, run beside, with `second_write`; None for none.
        found: what was chosen and from what, for analysis: sets of tokens, maps, directions.
    """

    write: tuple[Intervention, ...] = ()
    second: Optional[Prompt] = None
    second_write: tuple[Intervention, ...] = ()
    found: Mapping[str, Any] = field(default_factory=dict)


class Method:
    """Greedy decoding; the methods of papers override what they change."""

    name = "greedy"
    combine: Optional[Combiner] = None

    def plans(self, model: Model, prompts: Sequence[Prompt], new_tokens: int) -> list[Plan]:
        """What to do to every prompt."""
        return [Plan() for _ in prompts]

    def reads(self, model: Model) -> tuple[str, ...]:
        """Sites that `provide` wants to see in every step."""
        return ()

    def gradients(self, model: Model) -> tuple[int, ...]:
        """Layers whose attention `choose` differentiates by."""
        return ()

    def provide(
        self, model: Model, steps: Stepping, stream: int, plan: Plan
    ) -> Optional[Float[Tensor, "vocab"]]:
        """Second logits from the model's own pass; None where they come from a second view."""
        return None

    def choose(
        self, steps: Stepping, scores: Float[Tensor, "prompt vocab"], memory: dict
    ) -> list[int]:
        """The next token of every prompt, the first streams of `steps`."""
        return [int(token) for token in scores.argmax(-1)]


@dataclass(frozen=True, eq=False)
class Decoded:
    """What one prompt was continued by, and the two opinions behind every token.

    Attributes:
        tokens: up to the end-of-text token, which is left out.
        first, second: `[step, vocab]`, the model's own logits and the second ones (None if the
            method has none); `combined`: what was chosen from. One more step than tokens where an
            end was chosen.
        plan: what the method did.
    """

    tokens: list[int]
    first: Float[Tensor, "step vocab"]
    second: Optional[Float[Tensor, "step vocab"]]
    combined: Float[Tensor, "step vocab"]
    plan: Plan


def decode(
    model: Model,
    prompts: Union[Prompt, Sequence[Prompt]],
    method: Optional[Method] = None,
    new_tokens: SupportsIndex = 20,
    *,
    forced: Optional[Sequence[Sequence[SupportsIndex]]] = None,
    batch_size: SupportsIndex = 32,
    keep: bool = True,
) -> list[Decoded]:
    """Continue prompts by a method, greedily on its combined logits.

    Example:
        >>> import interp
        >>> model = interp.open_model("backcopy-1l")
        >>> prompt = Prompt.from_tokens(range(3, 12))
        >>> (found,) = decode(model, prompt, new_tokens=3)
        >>> found.tokens == model.generate(prompt, 3)[0]
        True

    Args:
        method: greedy decoding for None.
        forced: tokens to feed instead of the chosen ones, to compare logits along one continuation.
        batch_size: prompts per pass; a second view counts beside.
        keep: whether to keep the logits of every step; of the first one only, if not.

    Raises:
        PromptError: a prompt that the method cannot work on, such as one without a picture.
        ModelRefused: a model that it cannot work on.
    """
    given = [prompts] if isinstance(prompts, Prompt) else list(prompts)
    method, found, size = method or Method(), [], int(batch_size)
    if forced is not None and len(forced) != len(given):
        raise PromptError(f"forced tokens for {len(forced)} prompts, but {len(given)} are decoded.")
    for start in range(0, len(given), size):
        part = given[start : start + size]
        fixed = None if forced is None else [list(map(int, f)) for f in forced[start : start + size]]
        found += _batch(model, part, method, int(new_tokens), fixed, keep)
    return found


def _batch(
    model: Model, prompts: list[Prompt], method: Method, new_tokens: int,
    forced: Optional[list[list[int]]], keep: bool,
) -> list[Decoded]:
    plans = method.plans(model, prompts, new_tokens)
    views = [number for number, plan in enumerate(plans) if plan.second is not None]
    streams = prompts + [plan.second for plan in plans if plan.second is not None]
    writes = [plan.write for plan in plans] + [plans[number].second_write for number in views]
    place = {number: len(prompts) + i for i, number in enumerate(views)}
    steps = model.stepping(streams, write=each(writes), read=method.reads(model),
                           gradients=method.gradients(model), batch_size=len(streams))
    if forced is not None:
        new_tokens = max(map(len, forced))
    ends, count = model.end_tokens, len(prompts)
    rows: list[list[list[Tensor]]] = [[[], [], []] for _ in prompts]
    made: list[list[int]] = [[] for _ in prompts]
    over, memory = [False] * count, {}
    for step in range(new_tokens):
        combined = []
        for number, plan in enumerate(plans):
            own = steps.logits[number].clone()
            other = (steps.logits[place[number]].clone() if number in place
                     else method.provide(model, steps, number, plan))
            both = own if other is None or method.combine is None else method.combine(own, other)
            combined.append(both)
            if not over[number] and (keep or not step):
                for kept, row in zip(rows[number], (own, other, both)):
                    if row is not None:
                        kept.append(row)
        chosen = method.choose(steps, torch.stack(combined), memory)
        if forced is not None:
            chosen = [f[step] if step < len(f) else token for f, token in zip(forced, chosen)]
        for number, token in enumerate(chosen):
            over[number] |= token in ends and forced is None
            if not over[number]:
                made[number].append(token)
                over[number] = forced is not None and step + 1 >= len(forced[number])
        if all(over) or step == new_tokens - 1:
            break
        steps.feed(chosen + [chosen[number] for number in views])
    return [
        Decoded(tokens, torch.stack(own), torch.stack(other) if other else None,
                torch.stack(both), plan)
        for tokens, (own, other, both), plan in zip(made, rows, plans)
    ]


# -- what methods share -----------------------------------------------------------------------


def image_tokens(prompt: Prompt) -> tuple[int, ...]:
    """Positions of the image tokens. Raises `PromptError` where there is no picture."""
    if not prompt.of_kind("image"):
        raise PromptError("this prompt has no picture, and the method needs one: make it with "
                          "model.prompt(..., images=[...]).")
    return prompt.positions("image")


def last_row_attention(
    model: Model, prompts: Sequence[Prompt], rows: Optional[Sequence[Sequence[int]]] = None,
    layers: Optional[Sequence[int]] = None, batch_size: int = 32,
) -> list[Float[Tensor, "layer head query token"]]:
    """Attention from the last prompt token (or `rows`) to the image tokens, per prompt."""
    places = [image_tokens(prompt) for prompt in prompts]
    chosen = [[len(p) - 1] for p in prompts] if rows is None else [list(map(int, r)) for r in rows]
    blocks = range(model.n_layers) if layers is None else layers
    found: list[Any] = [None] * len(prompts)
    tails: dict[int, list[int]] = {}
    for number, (prompt, row) in enumerate(zip(prompts, chosen)):
        if min(row) <= max(places[number]):
            raise PromptError("attention on a picture is read from tokens after it.")
        tails.setdefault(len(prompt) - min(row), []).append(number)
    # The rows from the first one asked for on are a pass of their own: no others are made.
    for tail, numbers in tails.items():
        for start in range(0, len(numbers), batch_size):
            part = numbers[start : start + batch_size]
            steps = model.stepping([prompts[n] for n in part], tail=tail, batch_size=batch_size,
                                   read=[f"pattern.{layer}" for layer in blocks])
            for stream, n in enumerate(part):
                local = [r - (len(prompts[n]) - tail) for r in chosen[n]]
                found[n] = torch.stack([
                    steps.read(stream, f"pattern.{layer}")[:, local][..., list(places[n])]
                    for layer in blocks])
    return found


def class_rows(model: Model, prompt: Prompt) -> Float[Tensor, "layer head token"]:
    """The class token's attention to the picture's tokens in every block of the vision tower.

    Raises `ModelRefused` for towers without a class token, `PromptError` for several pictures.
    """
    image_tokens(prompt)
    if len(prompt.of_kind("image")) != 1:
        raise PromptError(f"this prompt has {len(prompt.of_kind('image'))} pictures; give it one.")
    rows = tower.read(model, prompt).cls_attention
    if rows is None:
        raise ModelRefused(
            f"the vision tower of {model.name} has no class token, so it has no attention of one; "
            "methods that need it cannot be run here.")
    return rows.float().cpu()


def only(prompt: Prompt, kept: Sequence[int]) -> tuple[Intervention, ...]:
    """Interventions after which nothing but `kept` is seen of the picture.

    The removed tokens are hidden from every other position in all blocks, which equals dropping
    them with the position ids kept (flow.md, E2; removal "drop_keep_ids").
    """
    image = image_tokens(prompt)
    gone = sorted(set(image) - {int(p) for p in kept})
    if not gone:
        return ()
    rest = sorted(set(range(len(prompt))) - set(gone))
    return block(rest, gone), block("generated", gone)


def without_pictures(prompt: Prompt) -> Prompt:
    """The same prompt with its image tokens, and what belongs to them, taken out."""
    image = set(image_tokens(prompt))
    kept = [p for p in range(len(prompt)) if p not in image]
    if not kept:
        raise PromptError("nothing is left of this prompt without its picture.")
    moved = {old: new for new, old in enumerate(kept)}
    segments = []
    for one in prompt.segments:
        places = tuple(moved[p] for p in one.positions if p in moved)
        if places and one.kind not in ("image", "image_part", "assumed"):
            segments.append(replace(one, positions=places))
    inputs = {name: np.asarray(value)[:, kept] for name, value in prompt.inputs.items()
              if np.shape(value) == (1, len(prompt))}
    tokens = tuple(prompt.tokens[p] for p in kept) if prompt.tokens else ()
    return Prompt(tuple(prompt.ids[p] for p in kept), tuple(segments), tokens=tokens, inputs=inputs)


def at_depth(
    layers: Sequence[SupportsIndex], n_layers: SupportsIndex, of: SupportsIndex = 32
) -> tuple[int, ...]:
    """A paper's layers at the same depth of another model; unchanged where it has as many.

    Example:
        >>> at_depth([25, 30], 32), at_depth([25, 30, 31], 6), at_depth([6, 7, 8], 6)
        ((25, 30), (4, 5), (0, 1))
    """
    n, total = int(n_layers), int(of)
    return tuple(sorted({int(layer) * (n - 1) // max(1, total - 1) for layer in layers}))


def random_tokens(
    among: Iterable[SupportsIndex], count: SupportsIndex, seed: SupportsIndex, number: SupportsIndex = 0
) -> tuple[int, ...]:
    """As many random positions, another draw for every seed and prompt: the control of a set."""
    rng = np.random.default_rng([int(seed), int(number), int(count)])
    return tuple(sorted(int(p) for p in rng.choice([int(p) for p in among], int(count), replace=False)))


def refuse_deep_stack(model: Model) -> None:
    """Raise `ModelRefused` where pictures enter later blocks too, past an edit of embeddings."""
    vision = getattr(model.config, "vision_config", None)
    if getattr(vision, "deepstack_visual_indexes", None):
        raise ModelRefused(
            f"{model.name} adds features of the picture to several blocks (DeepStack), so replacing "
            "embeddings does not take a token's content away; use a method that hides tokens.")
