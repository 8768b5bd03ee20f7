"""Gradients of a scalar with respect to the heads' outputs, and through them to attention.

The derivative by an attention weight needs no attention matrix: with z_t the sum over keys of
A_ts v_s, the derivative of a loss by A_ts is the product of its derivative by z_t with v_s.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from interp.core import Prompt
from interp.core.errors import NumericalError, SiteRefused
from interp.models import attention as attend
from interp.models.edits import Edits, Pass
from interp.models.model import Model


@dataclass(frozen=True)
class Gradients:
    """One prompt's loss, its derivative by every head's output, and the values of all layers.

    `z` [layer, position, head, d_head] and `v` [layer, position, kv_head, d_head], both float32.
    """

    loss: float
    z: Float[Tensor, "layer position head d_head"]
    v: Float[Tensor, "layer position kv_head d_head"]

    def by_attention(self, layer: int) -> Float[Tensor, "head query key"]:
        """The derivative of the loss by every attention weight of a layer, hidden ones included.

        For short prompts; to sum over a few keys use `z` and `v` themselves.
        """
        group = self.z.shape[2] // self.v.shape[2]
        value = self.v[layer].repeat_interleave(group, 1)
        return torch.einsum("qhd,khd->hqk", self.z[layer], value)


class _Leaves(Edits):
    """Marks each layer's head outputs, so that the loss can be differentiated by them."""

    def __init__(self, prompt: Prompt, model: Model, direct: bool) -> None:
        super().__init__(prompt, (), model.shape)
        self.direct = direct
        self.leaves: dict[int, Tensor] = {}

    def writes(self, layer: int, name: str) -> bool:
        return name == "z"

    def apply(self, layer: int, name: str, x: Tensor, now: Pass) -> Tensor:
        if name != "z":
            return x
        if self.direct:
            # Cut off from what made it: an earlier head does not act through a later one.
            self.leaves[layer] = x.detach().requires_grad_()
            return self.leaves[layer]
        self.leaves[layer] = torch.zeros_like(x, requires_grad=True)
        return x + self.leaves[layer]


def head_gradients(
    model: Model, prompt: Prompt, loss: Callable[[Tensor], Tensor], *, direct: bool = False
) -> Gradients:
    """The derivative of a loss by the output of every head at every position.

    Example:
        >>> import interp
        >>> model = interp.open_model("backcopy-1l")
        >>> found = head_gradients(model, Prompt.from_tokens(range(3, 9)),
        ...                        lambda logits: -logits.log_softmax(-1)[-1, 5])
        >>> found.z.shape[:3], found.by_attention(0).shape
        (torch.Size([1, 6, 1]), torch.Size([1, 6, 6]))

    Args:
        loss: takes the logits `[position, vocab]`, or, of a model without a vocabulary head, its
            last hidden states `[position, d_model]`; returns one number.
        direct: along the direct path only (residual stream, MLPs, norms), the outputs of all other
            heads held where they are: to first order what path patching measures.

    Weights are left as they are and get no gradients.

    Raises:
        SiteRefused: the model is opened in another lane than "hf".
        NumericalError: the loss is NaN or infinite.

    Source: the derivative by attention follows from z = A v; used by arXiv:1906.04341.
    """
    engine = model._engine("hf")
    if model.lane != "hf":
        raise SiteRefused(f"gradients need lane 'hf', not {model.lane!r}: use model.using('hf').")
    edits, values = _Leaves(prompt, model, direct), {}

    def keep(layer: int, name: str, value: Tensor) -> None:
        values[layer] = value[0].detach().float().cpu()

    running = attend.Session(
        Pass(0, len(prompt)), [edits], lambda layer, name: name == "v", keep, lambda *_: [])
    ids = torch.tensor([prompt.ids], device=engine.device)
    with (_frozen(list(model.hf.parameters())), attend.implementation(engine.configs),
          attend.session(engine.attentions, running), torch.enable_grad()):
        out = engine._call(ids, engine._inputs([prompt]), {"use_cache": False})
        states = getattr(out, "logits", None)
        states = out.last_hidden_state if states is None else states
        value = loss(states[0].float())
        if not bool(torch.isfinite(value)):
            raise NumericalError(
                f"the loss on a prompt of {len(prompt)} tokens is {float(value.detach())}; there is "
                "no gradient."
            )
        layers = sorted(edits.leaves)
        leaves = [edits.leaves[layer] for layer in layers]
        found = torch.autograd.grad(value, leaves, allow_unused=True)
        # A head that the loss does not reach has the gradient zero.
        found = [torch.zeros_like(leaf) if g is None else g for g, leaf in zip(found, leaves)]
    return Gradients(
        float(value.detach()), torch.stack([g.float().cpu() for g in found]),
        torch.stack([values[layer] for layer in layers]))


@contextmanager
def _frozen(parameters: Sequence[Tensor]) -> Iterator[None]:
    """Weights that ask for no gradients, so that none are computed or kept."""
    before = [p.requires_grad for p in parameters]
    try:
        for p in parameters:
            p.requires_grad_(False)
        yield
    finally:
        for p, old in zip(parameters, before):
            p.requires_grad_(old)
