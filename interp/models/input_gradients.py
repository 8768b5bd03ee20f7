"""Gradients of a scalar with respect to what enters a block, position by position.

At block 0 these are the embeddings, with pictures and whatever else is added before the first block;
at a later block they leave out how the blocks below mixed the tokens. `embedding_gradient` takes
other inputs of block 0 instead, many at once, as integrated gradients need.
"""

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any, SupportsIndex

import torch
from jaxtyping import Float
from torch import Tensor

from interp.core import Prompt
from interp.core.errors import NumericalError, OutOfRange, SiteRefused
from interp.models import attention as attend
from interp.models.edits import Edits, Pass
from interp.models.head_gradients import _frozen
from interp.models.lane_hf import no_earlier_picture
from interp.models.model import Model
from interp.models.run import Reads
from interp.models.sites import hidden_input


@dataclass(frozen=True)
class InputGradients:
    """A scalar, what entered the block, and the derivative by it, float32."""

    value: float
    hidden: Float[Tensor, "position d_model"]
    gradient: Float[Tensor, "position d_model"]

    def by_position(self, kind: str = "gradient") -> Float[Tensor, "position"]:
        """One number per position: summed over the coordinates first, then the absolute value.

        `kind` is "gradient" |sum_d g_d|, "gradient_input" |sum_d x_d g_d| or "norm" of g.
        """
        if kind == "norm":
            return self.gradient.norm(dim=-1)
        if kind == "gradient":
            return self.gradient.sum(-1).abs()
        if kind == "gradient_input":
            return (self.hidden * self.gradient).sum(-1).abs()
        raise ValueError(
            f"gradients are summed as 'gradient', 'gradient_input' or 'norm', not {kind!r}."
        )


def input_gradients(
    model: Model, prompt: Prompt, scalar: Callable[[Tensor], Tensor], *, layer: SupportsIndex = 0
) -> InputGradients:
    """The derivative of a scalar by what enters block `layer` at every position.

    Example:
        >>> import interp
        >>> model = interp.open_model("backcopy-1l")
        >>> found = input_gradients(model, Prompt.from_tokens(range(3, 9)), lambda x: x[-1, 5])
        >>> found.gradient.shape, found.by_position("gradient_input").shape
        (torch.Size([6, 256]), torch.Size([6]))

    Args:
        scalar: takes the logits `[position, vocab]`, or, of a model without a vocabulary head, its
            last hidden states `[position, d_model]`; returns one number.

    Weights are left as they are and get no gradients. What is added between later blocks (pictures
    in models with DeepStack) is not part of what enters block 0.

    Raises:
        OutOfRange: a block that does not exist.
        SiteRefused: the model is opened in another lane than "hf".
        NumericalError: the scalar is NaN or infinite.
    """
    number = int(layer)
    if not 0 <= number < model.n_layers:
        raise OutOfRange(f"layer {number} does not exist: there are 0 to {model.n_layers - 1}.")
    engine = model._engine("hf")
    if model.lane != "hf":
        raise SiteRefused(f"gradients need lane 'hf', not {model.lane!r}: use model.using('hf').")
    leaves: list[Tensor] = []

    def replace(_: Any, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
        given = hidden_input(args, kwargs)
        assert given is not None
        leaf = given.detach().clone().requires_grad_()
        leaves.append(leaf)
        return (tuple(leaf if x is given else x for x in args),
                {k: leaf if x is given else x for k, x in kwargs.items()})

    running = attend.Session(
        Pass(0, len(prompt)), [Edits(prompt, (), model.shape)], lambda *_: False,
        lambda *_: None, lambda *_: [])
    ids = torch.tensor([prompt.ids], device=engine.device)
    handle = engine.blocks[number].module.register_forward_pre_hook(replace, with_kwargs=True)
    try:
        with ExitStack() as stack, torch.enable_grad():
            stack.enter_context(_frozen(list(model.hf.parameters())))
            stack.enter_context(attend.implementation(engine.configs))
            stack.enter_context(attend.session(engine.attentions, running))
            out = engine._call(ids, engine._inputs([prompt]), {"use_cache": False})
            states = getattr(out, "logits", None)
            states = out.last_hidden_state if states is None else states
            value = scalar(states[0].float())
            if not bool(torch.isfinite(value)):
                raise NumericalError(
                    f"the scalar on a prompt of {len(prompt)} tokens is {float(value.detach())}; "
                    "there is no gradient."
                )
            (leaf,) = leaves
            (slope,) = torch.autograd.grad(value, leaf, allow_unused=True)
    finally:
        handle.remove()
    slope = torch.zeros_like(leaf) if slope is None else slope
    return InputGradients(float(value.detach()), leaf.detach()[0].float().cpu(),
                          slope[0].float().cpu())


class _Input(Edits):
    """Puts given states in front of the first block."""

    def __init__(self, prompt: Prompt, model: Model, states: Tensor) -> None:
        super().__init__(prompt, (), model.shape)
        self.states = states

    def writes(self, layer: int, name: str) -> bool:
        return (layer, name) == (0, "resid_pre")

    def apply(self, layer: int, name: str, x: Tensor, now: Pass) -> Tensor:
        return self.states.to(x) if self.writes(layer, name) else x


def embedding_gradient(
    model: Model,
    prompt: Prompt,
    loss: Callable[[Tensor], Tensor],
    embeddings: Float[Tensor, "batch position d_model"],
) -> tuple[Float[Tensor, "batch"], Float[Tensor, "batch position d_model"]]:
    """A loss and its derivative by what enters block 0, for several such inputs of one prompt.

    Example:
        >>> import interp
        >>> model = interp.open_model("backcopy-1l")
        >>> prompt = Prompt.from_tokens(range(3, 9))
        >>> states = torch.tensor(model.run(prompt, read="embed").reads["embed"].values[0])
        >>> value, gradient = embedding_gradient(
        ...     model, prompt, lambda logits: logits[-1, 5], states.reshape(1, 6, -1))
        >>> value.shape, gradient.shape == (1, 6, model.d_model)
        (torch.Size([1]), True)

    Args:
        loss: takes the logits `[position, vocab]` of one of them, returns one number.
        embeddings: as the site "embed" is read, one input per variant.

    The weights get no gradients. Both are float32, on the CPU.

    Raises:
        SiteRefused: the model is opened in another lane than "hf".
        NumericalError: the loss is NaN or infinite.
    """
    engine = model._engine("hf")
    if model.lane != "hf":
        raise SiteRefused(f"gradients need lane 'hf', not {model.lane!r}: use model.using('hf').")
    prompts = [prompt] * len(embeddings)
    leaf = embeddings.detach().float().to(engine.device).requires_grad_()
    edits: Sequence[Edits] = [_Input(prompt, model, one) for one in leaf]
    now, reads = Pass(0, len(prompt)), Reads([], model.n_layers, len(prompts))
    running = attend.Session(now, list(edits), reads.want, lambda *_: None, lambda *_: [])
    ids = torch.tensor([one.ids for one in prompts], device=engine.device)
    with (_frozen(list(model.hf.parameters())), attend.implementation(engine.configs),
          no_earlier_picture(engine.hf), attend.session(engine.attentions, running),
          engine._hooks(now, edits, reads, lambda *_: [], list(range(len(prompts)))),
          torch.enable_grad()):
        logits = engine._call(ids, engine._inputs(prompts), {"use_cache": False}).logits
        values = torch.stack([loss(one.float()) for one in logits])
        if not bool(torch.isfinite(values).all()):
            raise NumericalError(
                f"the loss on a prompt of {len(prompt)} tokens is not finite: no gradient."
            )
        (found,) = torch.autograd.grad(values.sum(), leaf)
    return values.detach().float().cpu(), found.float().cpu()
