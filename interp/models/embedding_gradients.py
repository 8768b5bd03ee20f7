"""Gradients at given inputs of the first block: embeddings with the picture merged in, or others."""

from collections.abc import Callable, Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from interp.core import Prompt
from interp.core.errors import NumericalError, SiteRefused
from interp.models import attention as attend
from interp.models.edits import Edits, Pass
from interp.models.head_gradients import _frozen
from interp.models.lane_hf import no_earlier_picture
from interp.models.model import Model
from interp.models.run import Reads


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
