"""Learned sinks: attention that leaves the sequence through a trained logit or an extra key.

Paper     arXiv:2309.17453 (softmax-1 and sink tokens; learned logits as in gpt-oss models)
Question  How much attention goes to no token at all, and does it replace the first-token sink?
Measure   s = 1 - sum of a row of attention; Sink_*, the percent of (sample, layer, head) in which
          its mean over queries exceeds epsilon
Cause     raise or lower the sink logit: the first token's share must move the other way
"""

from typing import Optional, SupportsFloat

import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from interp.core.errors import NumericalError

TOLERANCE = {torch.bfloat16: 1e-2, torch.float16: 1e-2, torch.float32: 1e-4, torch.float64: 1e-4}
"""Largest deviation of a row sum from one that rounding alone explains (a plain softmax cast to
bfloat16 is off by up to 3e-3, to float16 by 3e-4, in float32 by less than 1e-6)."""


def external_mass(
    attention: Float[Tensor | np.ndarray, "*batch head query key"],
    valid: Optional[Bool[Tensor | np.ndarray, "*valid"]] = None,
) -> Float[Tensor, "*batch head query"]:
    """Attention that each query sends outside the sequence: s = 1 - row sum.

    Example:
        >>> attention = torch.tensor([[[0.25, 0.0], [0.5, 0.5]]])
        >>> external_mass(attention)
        tensor([[0.7500, 0.0000]])

    Args:
        valid: False for queries that are padding, broadcast over the leading axes; they become
            NaN.

    Raises:
        NumericalError: NaN, or a row that sums to more than one: not a probability.

    Models that attenuate the output instead of the weights (granite_swa) have rows that sum to
    one: use `external_mass_from_logits`. Models with an explicit bias key (column 0) do too: read
    that column.
    """
    rows = torch.as_tensor(attention)
    tolerance = TOLERANCE.get(rows.dtype, 1e-2)
    rows = rows.to(torch.promote_types(rows.dtype, torch.float32))
    mass = 1 - rows.sum(-1)
    if valid is not None:
        keep = torch.as_tensor(valid, device=rows.device)
        mass = torch.where(keep, mass, torch.full_like(mass, float("nan")))
        checked = mass[~mass.isnan()]
        if torch.isnan(rows).any(-1).logical_and(keep).any():
            raise NumericalError("attention contains NaN; recompute it in float32.")
    else:
        checked = mass.flatten()
        if torch.isnan(checked).any():
            raise NumericalError(
                "attention contains NaN; recompute it in float32, or give valid= if these rows "
                "are padding."
            )
    if checked.numel() and float(checked.amin()) < -tolerance:
        raise NumericalError(
            f"an attention row sums to {1 - float(checked.amin()):.4g}: it is not a probability; "
            "give the weights after the softmax, without an edit that adds mass."
        )
    # Rounding can push a full row slightly above one; a negative mass has no meaning.
    return mass.clamp(min=0)


def external_mass_from_logits(
    log_sum_exp: Float[Tensor | np.ndarray, "*batch head query"],
    sink_logit: Float[Tensor | np.ndarray, "head"],
) -> Float[Tensor, "*batch head query"]:
    """The same mass from the log-sum-exp of the scores and the head's sink logit.

    Example:
        >>> external_mass_from_logits(torch.zeros(1, 2), torch.zeros(1))
        tensor([[0.5000, 0.5000]])

    For streamed attention, and for models that multiply the head output by
    sigmoid(log_sum_exp - sink) while their weights still sum to one.

    Source: e^b / (e^b + sum_j e^{x_j}) = sigmoid(b - log_sum_exp).
    """
    log_sum_exp = torch.as_tensor(log_sum_exp)
    log_sum_exp = log_sum_exp.to(torch.promote_types(log_sum_exp.dtype, torch.float32))
    logit = torch.as_tensor(sink_logit).to(log_sum_exp)
    return torch.sigmoid(logit[:, None] - log_sum_exp)


def has_external_sink(
    attention: Float[Tensor | np.ndarray, "*batch head query key"],
    dtype: Optional[torch.dtype] = None,
    valid: Optional[Bool[Tensor | np.ndarray, "*valid"]] = None,
) -> bool:
    """True if some row is so far below one that rounding cannot explain it.

    Example:
        >>> rows = torch.full((1, 1, 4), 0.2499)
        >>> has_external_sink(rows), has_external_sink(rows, dtype=torch.bfloat16)
        (True, False)

    Args:
        dtype: precision in which the attention was computed, if it was cast since: the tolerance
            is 1e-2 for bfloat16 and float16, 1e-4 for float32.
        valid: as in `external_mass`.
    """
    given = torch.as_tensor(attention)
    computed = given.dtype if dtype is None else dtype
    if computed not in TOLERANCE:
        raise ValueError(f"no tolerance is known for {computed}; give dtype= as a float type.")
    # The data are judged by the coarser of the two precisions.
    mass = external_mass(given.to(computed) if computed.itemsize < given.dtype.itemsize else given,
                         valid)
    known = mass[~mass.isnan()]
    return bool(known.numel() and float(known.amax()) > TOLERANCE[computed])


def external_sink_rate(
    mass: Float[Tensor | np.ndarray, "*batch head query"], epsilon: SupportsFloat = 0.3
) -> float:
    """Percent of (sample, layer, head) whose mean external mass exceeds epsilon: Sink_*.

    Example:
        >>> external_sink_rate(torch.tensor([[0.9, 0.7], [0.1, 0.0]]))
        50.0

    NaN queries (padding) are left out of the means. Print it beside the token's Sink_1.
    """
    epsilon = float(epsilon)
    if not 0 <= epsilon < 1:
        raise ValueError(f"epsilon must lie in [0, 1), not {epsilon}: s is a probability.")
    values = torch.as_tensor(mass)
    values = values.to(torch.promote_types(values.dtype, torch.float32))
    mean = values.nanmean(-1)
    known = mean[~mean.isnan()]
    if not known.numel():
        raise NumericalError("no query has a known external mass; all of them are padding.")
    return 100 * float((known > epsilon).double().mean())
