"""Secondary sinks: later tokens that start to attract attention part-way through the network.

Paper     arXiv:2512.22213
Question  Which positions other than the first become sinks, in which layers, for how long?
Measure   |cosine| of the residual to the primary sink's, inside the primary's window
Cause     rescale or project out the MLP write at the creation layer; attention must return to
          content
"""

from collections.abc import Sequence
from typing import Literal, Optional, SupportsFloat, SupportsIndex

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from interp.core.errors import NumericalError, OutOfRange
from interp.sinks.levels import (
    Levels,
    Rule,
    SinkLevels,
    level_table,
    n_levels,
    read_released,
    relabel,
    write_released,
)

__all__ = [
    "Levels", "Rule", "SinkLevels", "cosine_to", "level_table", "n_levels", "primary_strength",
    "primary_window", "read_released", "relabel", "score", "sink_score", "write_released",
]

LastLayer = Literal["hf", "raw"]

MIN_FALL = 0.25
"""With raw last layers, the primary's window ends only where its norm loses this share at once."""


def score(
    residual: Float[Tensor | np.ndarray, "layer position d_model"],
    primary: Sequence[SupportsIndex] = (0,),
    threshold: SupportsFloat = 0.9,
    rule: Rule = "official",
    last_layer: Optional[LastLayer] = None,
) -> SinkLevels:
    """Find the sinks of one sequence: the primary, and the later tokens that join its direction.

    Example:
        >>> residual = torch.eye(6).repeat(12, 1, 1)
        >>> residual[2:11, 0] = residual[5:11, 4] = 90 * torch.eye(6)[0]  # 4 joins 0 at layer 5
        >>> score(residual, rule="relative").levels[4]
        ((5, 6, 7, 8, 9, 10), 'secondary')

    Args:
        residual: output of every block, embeddings left out, so that index i is block i.
        primary: candidate positions of the primary sink; the one with the largest mean norm is
            taken. The paper uses (0, 1), and (0, 1, 2) with a chat template.
        threshold: on the absolute cosine to the primary, strictly exceeded. Both signs count, as
            in the released code; `cosine` keeps the sign and `anti_aligned` counts.
        rule: "official" labels by lifetime in absolute layers (see `label`): meant for 30 layers
            and more. "relative" scales with the depth and the primary's own window: use it, or
            show it beside the other, for up to 24 layers.
        last_layer: what the last entry of `residual` is. "hf": transformers' last hidden state,
            after the final norm; the window then ends at the largest fall of the primary's norm,
            wherever it is. "raw": the block's output; the window ends at the largest fall only if
            the norm loses a quarter there, else it stays open. Default: "hf" with the official
            rule, as in the released code, and "raw" with the relative one.

    Returns:
        `SinkLevels`; the primary's layers are its whole window.

    Raises:
        NumericalError: NaN or infinity in the residual.
        OutOfRange: a candidate position outside the sequence.

    Source: arXiv:2512.22213, released code `hidden_state_base.py`; the relative rule, "raw" and
    the open window are this toolkit's.
    """
    values = _checked(residual)
    n_layers, n_positions, _ = values.shape
    threshold = float(threshold)
    if not 0 < threshold < 1:
        raise ValueError(f"threshold must lie between 0 and 1, not {threshold}: it is a cosine.")
    candidates = [int(position) for position in primary]
    if not candidates:
        raise ValueError("no candidate for the primary sink: give at least one position.")
    for position in candidates:
        if not 0 <= position < n_positions:
            raise OutOfRange(
                f"primary candidate {position} is outside the sequence of {n_positions} positions."
            )
    norm = values.norm(dim=-1)
    anchor = max(candidates, key=lambda position: float(norm[:, position].mean()))
    if last_layer is None:
        last_layer = "hf" if rule == "official" else "raw"
    start, stop = primary_window(norm[:, anchor], last_layer)

    cosine = cosine_to(values, anchor)
    found: dict[int, tuple[int, ...]] = {anchor: tuple(range(start, stop))}
    joined = cosine[start:stop].abs() > threshold
    for position in joined[:, anchor + 1 :].any(0).nonzero().flatten().tolist():
        column = anchor + 1 + position
        found[column] = tuple(start + i for i in joined[:, column].nonzero().flatten().tolist())
    signed = {
        position: (1.0,) * len(layers) if position == anchor
        else tuple(float(cosine[layer, position]) for layer in layers)
        for position, layers in found.items()
    }
    return SinkLevels(
        levels=relabel(found, n_layers, rule, primary=anchor), n_layers=n_layers, primary=anchor,
        window=(start, stop), rule=rule, threshold=threshold, cosine=signed,
    )


def primary_window(
    norm: Float[Tensor | np.ndarray, "layer"], last_layer: LastLayer = "hf"
) -> tuple[int, int]:
    """First, and one past the last, layer in which the primary sink is alive.

    Example:
        >>> primary_window(torch.tensor([1.0, 1.0, 50.0, 50.0, 50.0, 2.0]))
        (2, 5)
        >>> primary_window(torch.tensor([1.0, 1.0, 50.0, 49.0, 50.0, 52.0]), "raw")
        (2, 6)

    It opens after the largest rise of the norm and closes after the largest later fall (see
    `score` for `last_layer`). If the largest rise leads into the last layer there is no later
    fall, and the window is that layer alone; the released code stops with an error there.
    """
    values = torch.as_tensor(norm).double()
    n_layers = len(values)
    if n_layers < 2:
        return 0, n_layers
    change = values.diff()
    start = int(change.argmax()) + 1
    if start == n_layers - 1:
        return start, n_layers
    stop = start + int(change[start:].argmin()) + 1
    if last_layer == "raw" and -change[stop - 1] < MIN_FALL * values[stop - 1]:
        stop = n_layers
    return start, stop


def cosine_to(
    residual: Float[Tensor | np.ndarray, "layer position d_model"], position: SupportsIndex = 0
) -> Float[Tensor, "layer position"]:
    """Signed cosine of every position's residual to that of one position, layer by layer.

    Example:
        >>> cosine_to(torch.tensor([[[1.0, 0.0], [-2.0, 0.0], [0.0, 3.0]]]))
        tensor([[ 1., -1.,  0.]])

    Zero where a residual is zero.
    """
    values = _checked(residual)
    unit = torch.nn.functional.normalize(values, dim=-1, eps=torch.finfo(values.dtype).tiny)
    return (unit * unit[:, int(position), None]).sum(-1)


def sink_score(
    attention: Float[Tensor | np.ndarray, "*batch head query key"],
    position: SupportsIndex,
    length_free: bool = False,
) -> Float[Tensor, "*batch"]:
    """Mean attention that a position receives from later queries, over heads.

    Example:
        >>> uniform = torch.tril(torch.ones(1, 4, 4)) / torch.arange(1.0, 5.0)[:, None]
        >>> sink_score(uniform, 1).round(decimals=4), sink_score(uniform, 1, length_free=True)
        (tensor(0.2917), tensor(1.))

    Args:
        length_free: weigh the row of query t by t + 1, so that uniform attention scores 1.

    Square prompts only. This is the toolkit's score: the paper's exact formula is not confirmed.
    """
    rows = torch.as_tensor(attention)
    rows = rows.to(torch.promote_types(rows.dtype, torch.float32))
    n_queries, n_keys = rows.shape[-2:]
    key = int(position)
    if n_queries != n_keys:
        raise ValueError(f"attention must be square, not {n_queries} queries by {n_keys} keys.")
    if not 0 <= key < n_keys - 1:
        raise OutOfRange(
            f"position {key} has no later queries among {n_keys} positions; choose 0 to "
            f"{n_keys - 2}."
        )
    received = rows[..., key + 1 :, key]
    if length_free:
        received = received * torch.arange(key + 2, n_queries + 1).to(received)
    return received.mean((-2, -1))


def primary_strength(
    attention: Float[Tensor | np.ndarray, "layer head query key"], primary: SupportsIndex = 0
) -> Float[Tensor, "layer"]:
    """Attention that the primary sink receives from later queries in each layer: PS_l.

    Example:
        >>> attention = torch.zeros(2, 1, 3, 3)
        >>> attention[0, 0, :, 0] = 1
        >>> primary_strength(attention)
        tensor([1., 0.])

    The primary is said to weaken where secondary sinks appear: compare PS_l before and from the
    modal onset.
    """
    return sink_score(attention, primary)


def _checked(residual: Tensor | np.ndarray) -> Tensor:
    values = torch.as_tensor(residual)
    values = values.to(torch.promote_types(values.dtype, torch.float32))
    finite = torch.isfinite(values)
    if not finite.all():
        layer, position, _ = (~finite).nonzero()[0].tolist()
        raise NumericalError(
            f"residual is NaN or infinite at layer {layer}, position {position}; run the model in "
            "bfloat16 or float32."
        )
    return values
