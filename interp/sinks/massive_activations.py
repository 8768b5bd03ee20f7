"""Massive activations: the few residual coordinates that dwarf all others.

Paper     arXiv:2402.17762
Question  Which (position, dimension) entries are orders of magnitude above the rest, and where?
Measure   |h| > 100 and at least 1000 times the median |h| of the same layer's residual
Cause     set them to zero (the loss must explode) or to their mean (it must not move)
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import SupportsFloat

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from interp.core.errors import NumericalError, OutOfRange


@dataclass(frozen=True, order=True)
class MassiveActivation:
    """One massive coordinate: its layer, position, dimension and signed value.

    Example:
        >>> MassiveActivation(2, 0, 1415, -458.6)
        MassiveActivation(layer=2, position=0, dim=1415, value=-458.6)
    """

    layer: int
    position: int
    dim: int
    value: float


def detect(
    residual: Float[Tensor | np.ndarray, "layer position d_model"],
    min_value: SupportsFloat = 100.0,
    min_ratio: SupportsFloat = 1000.0,
) -> list[MassiveActivation]:
    """Every coordinate with |h| > min_value and |h| >= min_ratio times its layer's median |h|.

    Example:
        >>> residual = torch.full((2, 3, 5), 0.1)
        >>> residual[1, 0, 4] = -150.0
        >>> detect(residual)
        [MassiveActivation(layer=1, position=0, dim=4, value=-150.0)]

    Args:
        residual: output of each block before any norm; layer i is block i. The last entry of
            transformers' `hidden_states` is after the final norm: do not pass it.
        min_value: absolute size; set 0 for models under about 1e9 parameters, and say so.
        min_ratio: multiple of the median over all positions and dimensions of the layer.

    Returns:
        Massive activations in order of layer, position, dimension.

    Raises:
        NumericalError: NaN or infinity in the residual (float16 overflows at 65504).

    Source: arXiv:2402.17762, section 2.
    """
    size = _size(residual)
    median = _median(size)[:, None, None]
    found = (size > float(min_value)) & (size >= float(min_ratio) * median)
    values = torch.as_tensor(residual)
    return [
        MassiveActivation(layer, position, dim, float(values[layer, position, dim]))
        for layer, position, dim in found.nonzero().tolist()
    ]


def ratio(residual: Float[Tensor | np.ndarray, "layer position d_model"]) -> Float[Tensor, "layer"]:
    """Largest over median magnitude in each layer: r_l, a number without thresholds.

    Example:
        >>> residual = torch.ones(1, 3, 5)
        >>> residual[0, 0, 4] = -80.0
        >>> ratio(residual)
        tensor([80.])

    Infinite where the median is zero.
    """
    size = _size(residual)
    return size.amax((-2, -1)) / _median(size)


def magnitudes(
    residual: Float[Tensor | np.ndarray, "layer position d_model"], top: int = 3
) -> tuple[Float[Tensor, "layer rank"], Float[Tensor, "layer"]]:
    """The `top` largest magnitudes and the median of every layer: the paper's layer profile.

    Example:
        >>> largest, median = magnitudes(torch.arange(6.0).reshape(1, 2, 3), top=2)
        >>> largest, median
        (tensor([[5., 4.]]), tensor([2.5000]))

    Source: arXiv:2402.17762, layer profile (mean over sequences of these numbers).
    """
    size = _size(residual)
    if not 1 <= top <= size[0].numel():
        raise OutOfRange(f"top must lie between 1 and {size[0].numel()}, not {top}.")
    return size.flatten(1).topk(top).values, _median(size)


def stable_dims(
    found: Sequence[Sequence[MassiveActivation]], min_share: SupportsFloat = 0.9
) -> tuple[int, ...]:
    """Dimensions that are massive in at least `min_share` of the inputs, most frequent first.

    Example:
        >>> one, other = MassiveActivation(2, 0, 7, 300.0), MassiveActivation(2, 4, 9, 200.0)
        >>> stable_dims([[one], [one, other]])
        (7,)

    Args:
        found: what `detect` returned for each input.

    Raises:
        ValueError: no input was given.
    """
    if not found:
        raise ValueError("no inputs: give the activations detected in at least one input.")
    seen = Counter(dim for one in found for dim in {item.dim for item in one})
    need = float(min_share) * len(found)
    stable = [(dim, n) for dim, n in seen.items() if n >= need]
    return tuple(dim for dim, _ in sorted(stable, key=lambda pair: (-pair[1], pair[0])))


def _size(residual: Tensor | np.ndarray) -> Tensor:
    values = torch.as_tensor(residual)
    values = values.to(torch.promote_types(values.dtype, torch.float32))
    finite = torch.isfinite(values)
    if not finite.all():
        layer, position, _ = (~finite).nonzero()[0].tolist()
        raise NumericalError(
            f"residual is NaN or infinite at layer {layer}, position {position}; run the model in "
            "bfloat16 or float32."
        )
    return values.abs()


def _median(size: Tensor) -> Tensor:
    # torch.median returns the lower of two middle values; quantile is limited to 2**24 entries.
    ordered = size.flatten(1).sort(-1).values
    n = ordered.shape[-1]
    return (ordered[:, (n - 1) // 2] + ordered[:, n // 2]) / 2
