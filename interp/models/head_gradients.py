"""How the last row's logits change with each head's output, all other heads held where they are.

The gradient along the direct path (residual stream, MLPs, norms) of one pass: to first order what
path patching measures with one pass per head.
"""

from collections.abc import Sequence

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from interp.core import Prompt
from interp.models import attention as attend
from interp.models.edits import Edits, Pass, Shape
from interp.models.lane_hf import LaneHF
from interp.models.model import Model


class _Leaves(Edits):
    """An edit that changes nothing, but cuts every block's "z" off from what made it."""

    def __init__(self, prompt: Prompt, shape: Shape) -> None:
        super().__init__(prompt, (), shape)
        self.leaves: dict[int, Tensor] = {}

    def writes(self, layer: int, name: str) -> bool:
        return name == "z"

    def apply(
        self, layer: int, name: str, x: Float[Tensor, "position *rest"], now: Pass
    ) -> Float[Tensor, "position *rest"]:
        self.leaves[layer] = x.detach().requires_grad_()
        return self.leaves[layer]


def head_gradients(
    model: Model, prompt: Prompt, toward: Sequence[int], against: Sequence[int] = ()
) -> Float[np.ndarray, "layer head d_head"]:
    """The gradient of logits of tokens in the last row, by each head's output "z" in that row.

    Example:
        >>> import interp
        >>> model = interp.open_model("backcopy-1l")
        >>> found = head_gradients(model, Prompt.from_tokens(range(3, 12)), toward=[5])
        >>> found.shape == (model.n_layers, model.n_heads, model.d_head)
        True

    The quantity is the sum of the logits of `toward` minus that of `against`. In units of logits
    per unit of "z"; times the change of a head's output it is the first-order effect of that change
    on the direct path.
    """
    engine: LaneHF = model._engine("hf")
    held = _Leaves(prompt, model.shape)
    session = attend.Session(
        Pass(0, len(prompt)), [held], lambda *_: False, lambda *_: None, lambda *_: []
    )
    ids = torch.tensor([prompt.ids], device=engine.device)
    with (attend.implementation(engine.configs), attend.session(engine.attentions, session),
          torch.enable_grad()):
        out = engine._call(ids, engine._inputs([prompt]), {"use_cache": False, "logits_to_keep": 1})
        row = out.logits[0, -1].float()
        objective = row[list(toward)].sum() - row[list(against)].sum()
        layers = sorted(held.leaves)
        found = torch.autograd.grad(objective, [held.leaves[layer] for layer in layers],
                                    allow_unused=True)
    gradients = np.zeros((model.n_layers, model.n_heads, model.d_head), dtype=np.float32)
    for layer, gradient in zip(layers, found):
        if gradient is not None:
            gradients[layer] = gradient[-1].float().cpu().numpy()
    return gradients
