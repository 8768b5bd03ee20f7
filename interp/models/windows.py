"""Which blocks see only a window of the keys, as the model itself says when it runs."""

from typing import Any, Optional

import torch
from jaxtyping import Float
from torch import Tensor

from interp.models import attention as attend
from interp.models.lane_hf import probe_ids
from interp.models.model import Model


class _Watch:
    """Attention as ever, remembering the window that each block was given."""

    def __init__(self) -> None:
        self.windows: dict[int, Optional[int]] = {}

    def attend(
        self, layer: int, q: Tensor, k: Tensor, v: Tensor, mask: Any, given: dict[str, Any]
    ) -> Float[Tensor, "batch query head d_value"]:
        self.windows[layer] = mask.window
        rows = [attend.attention_output(q[i : i + 1], k[i : i + 1], v[i : i + 1], mask, i, given)
                for i in range(q.shape[0])]
        return torch.cat(rows).transpose(1, 2).contiguous()


def windows(model: Model) -> tuple[Optional[int], ...]:
    """How many keys a query of each block sees at most; None where it sees all before it.

    Example:
        >>> import interp
        >>> windows(interp.open_model("backcopy-3l"))
        (None, None, None)

    The number is what transformers hands to the attention of the block (sliding windows, chunks),
    seen in one short pass and not read from the configuration. Raises `ModelRefused` where lane
    "hf" cannot open the model.
    """
    engine, watch = model._engine("hf"), _Watch()
    with attend.implementation(engine.configs), attend.session(engine.attentions, watch):
        with torch.no_grad():
            engine.hf(input_ids=probe_ids(engine.hf, 6))
    return tuple(watch.windows.get(layer) for layer in range(model.n_layers))
