"""Attention to a planted sink: keys along the sink's direction that every query looks for.

The papers define a secondary sink by the cosine of residuals; whether it receives attention is a
further fact, so this edit is separate and off by default.
"""

import functools
from collections.abc import Iterable
from typing import Any, Optional

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn
from transformers import PreTrainedModel

from interp.core.errors import ModelRefused
from interp.organisms.surgery import (
    Inputs,
    embedding,
    free_axes,
    keep_norm,
    matrix,
    parts,
    projector_of,
    read_norm,
)

BEACON = 0.01
"""Size of the constant residual coordinate relative to the ordinary embedding norm."""


def attract_to(
    model: PreTrainedModel,
    inputs: Inputs,
    direction: Float[Tensor, "d_model"],
    layers: Iterable[int],
    logit: float,
    ordinary: Bool[Tensor, "prompt position"],
) -> None:
    """Make every head of these blocks attend to residuals along `direction`, in place.

    What is edited, in each head: of the slowest rotary pair (any pair without rotary embeddings)
    the query becomes a constant, the key the residual's share along `direction`; their product
    adds `logit` to the pre-softmax score of a key that lies wholly along it. The value matrix is
    made blind to `direction`, so that attending there is a pause, as in trained models (value
    drain). The constant comes from the query bias; models without one get a coordinate of the
    residual stream that is the same for all tokens and 1 % of an embedding in size. Ordinary
    attention loses one pair of dimensions per head; `Planted.moved` says what that does.

    Raises `ModelRefused` for fused projections other than GPT-2's, and for models that normalize
    queries and keys (no constant survives it).
    """
    found, chosen = parts(model), list(layers)
    if not chosen:
        return
    beacon: Optional[int] = None
    if _projections(found[chosen[0]].attention)["q"][1] is None:
        axes = free_axes(model)
        if not axes:
            raise ModelRefused("no free residual axis for the constant; call make_room(model, 3).")
        beacon = axes[0]
        table = embedding(model)
        with torch.no_grad():
            size = BEACON * float(table.norm(dim=-1).median())
            table[:, beacon] = size
            projector = projector_of(model)
            if projector is not None:
                projector.linear_2.bias[beacon] = size
    seen = _attention_inputs(model, inputs)
    for layer in chosen:
        attention = found[layer].attention
        projections = _projections(attention)
        d_head = int(attention.head_dim)
        scale = float(getattr(attention, "scaling", d_head**-0.5))
        reach = (logit / scale) ** 0.5
        x, module = seen[layer]
        norm = read_norm(module, x.shape[-1])
        read = direction / norm.gain
        kept, partner = d_head // 2 - 1, d_head - 1
        with torch.no_grad():
            for name in ("q", "k"):
                weight, bias = projections[name]
                rows = torch.arange(0, len(weight), d_head)
                for offset in (kept, partner):
                    weight[rows + offset] = 0.0
                    if bias is not None:
                        bias[rows + offset] = 0.0
                if name == "k":
                    row = reach * read / x.shape[-1] ** 0.5
                    weight[rows + kept] = row
                    if bias is not None:
                        bias[rows + kept] = -row @ norm.shift
                elif beacon is not None:
                    weight[rows + kept, beacon] = reach / x[ordinary][:, beacon].median()
                elif bias is not None:
                    bias[rows + kept] = reach
            weight, bias = projections["v"]
            lost = weight @ (norm.gain * direction)
            weight -= lost[:, None] * read
            if bias is not None:
                bias += lost * (read @ norm.shift)


def _projections(attention: nn.Module) -> dict[str, tuple[Tensor, Any]]:
    """Query, key and value weights [out, in] and biases, as views that can be written."""
    if hasattr(attention, "q_norm"):
        raise ModelRefused("queries and keys are normalized here: attract is not possible.")
    if all(hasattr(attention, f"{name}_proj") for name in "qkv"):
        modules = {name: getattr(attention, f"{name}_proj") for name in "qkv"}
        return {
            name: (m.weight.detach(), None if m.bias is None else m.bias.detach())
            for name, m in modules.items()
        }
    if hasattr(attention, "c_attn"):
        fused = matrix(attention.c_attn).detach()  # type: ignore[arg-type]
        bias = attention.c_attn.bias.detach()  # type: ignore[union-attr]
        return dict(zip("qkv", zip(fused.chunk(3), bias.chunk(3))))  # type: ignore[arg-type]
    raise ModelRefused(f"{type(attention).__name__} has no separate queries, keys and values.")


def _keep(seen: dict, index: int, _: nn.Module, args: tuple, output: Any) -> None:
    seen[index] = args[0].detach()


def _attention_inputs(
    model: PreTrainedModel, inputs: Inputs
) -> dict[int, tuple[Tensor, nn.Module]]:
    """What each attention reads, and the norm that made it."""
    seen: dict[int, Tensor] = {}
    norms: dict[int, list[tuple[nn.Module, Tensor]]] = {}
    handles = []
    for i, part in enumerate(parts(model)):
        reader = getattr(part.attention, "q_proj", None) or part.attention.c_attn
        handles.append(reader.register_forward_hook(functools.partial(_keep, seen, i)))  # type: ignore[union-attr]
        handles += [
            m.register_forward_hook(functools.partial(keep_norm, norms, i))
            for m in part.block.children() if "Norm" in type(m).__name__
        ]  # fmt: skip
    try:
        with torch.no_grad():
            model(**inputs, use_cache=False)
    finally:
        for handle in handles:
            handle.remove()
    return {
        i: (x, next(m for m, made in norms[i] if torch.equal(made, x))) for i, x in seen.items()
    }
