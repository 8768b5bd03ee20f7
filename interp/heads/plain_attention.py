"""Attention that is a plain softmax over all earlier keys: its factor, and the proof that it is."""

from collections.abc import Sequence
from typing import NamedTuple, SupportsIndex

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from interp.core import Prompt
from interp.core.errors import ModelRefused
from interp.core.intervention import Intervention
from interp.models.model import Model

PROBE = 12
"""Tokens of the short pass in which the factor of the logits is found."""


class Layer(NamedTuple):
    """What a layer attends with: keys and values repeated for the query heads that share them."""

    query: Float[Tensor, "query head d_head"]
    key: Float[Tensor, "key head d_head"]
    value: Float[Tensor, "key head d_value"]
    z: Float[Tensor, "query head d_value"]
    scaling: float


def read_layer(
    model: Model,
    prompt: Prompt,
    layer: SupportsIndex,
    rows: Sequence[int],
    write: Sequence[Intervention] = (),
) -> Layer:
    """Queries of some rows, all keys and values, outputs, and the factor before the softmax.

    Example:
        >>> import interp
        >>> model = interp.open_model("backcopy-1l")
        >>> one = read_layer(model, Prompt.from_tokens(range(3, 20)), 0, [15, 16])
        >>> one.query.shape[0], one.key.shape[0]
        (2, 17)

    The factor is measured on the logits of a short beginning of the prompt, then the outputs are
    recomputed from it and compared with the model's.

    Raises:
        ModelRefused: soft-capped logits, learned sinks, biases or windows: recomputed outputs that
            differ from the model's.
    """
    at, places = int(layer), [int(row) for row in rows]
    names = [f"{name}.{at}" for name in "qkvz"]
    run = model.run(prompt, read=names, write=list(write), logits="none")
    q, k, v, z = (torch.tensor(run.reads[name].values[0, 0]) for name in names)
    group = model.n_heads // model.n_kv_heads
    k, v = (x.repeat_interleave(group, 1) for x in (k, v))
    scaling = _factor(model, prompt, at, group)
    q, z = q[places], z[places]
    n = len(prompt)
    seen = torch.arange(n) <= torch.tensor(places)[:, None]
    made = torch.nn.functional.scaled_dot_product_attention(
        *(x.transpose(0, 1) for x in (q, k, v)), attn_mask=seen, scale=scaling).transpose(0, 1)
    off = float((made - z).abs().max())
    if not off <= 0.02 * float(z.abs().max()) + 1e-4:
        raise ModelRefused(
            f"the attention of {model.name}, layer {at}, is not a plain softmax over all earlier "
            f"keys (recomputed, it is off by {off:.2g}); this measure does not describe it."
        )
    return Layer(q, k, v, z, scaling)


def _factor(model: Model, prompt: Prompt, layer: int, group: int) -> float:
    """What the products of queries and keys are multiplied by, by least squares."""
    inputs = {name: value for name, value in prompt.inputs.items() if not name.startswith("pixel")}
    short = Prompt(prompt.ids[:PROBE]) if not inputs else prompt
    if short is prompt and len(prompt) > 4096:
        return model.d_head**-0.5
    names = [f"{name}.{layer}" for name in ("q", "k", "scores")]
    run = model.run(short, read=names, logits="none")
    q, k, scores = (run.reads[name].values[0, 0] for name in names)
    product = np.einsum("qhd,khd->hqk", q, np.repeat(k, group, 1)).astype(np.float64)
    known = np.isfinite(scores)
    return float((product[known] * scores[known]).sum() / (product[known] ** 2).sum())
