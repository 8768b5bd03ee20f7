"""Switches: spare MLP units that write a fixed vector wherever a token carries a tag.

A tag is a small component along a residual direction that nothing else writes.
"""

import math
from collections.abc import Callable, Sequence
from typing import Optional, Union

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformers import PreTrainedModel

from interp.core.errors import ModelRefused
from interp.organisms.surgery import (
    GATED_UNITS,
    Norm,
    Part,
    Record,
    free_axes,
    matrix,
    spare_units,
    writers,
)


def free_direction(
    model: PreTrainedModel,
    seen: Record,
    avoid: Sequence[Float[Tensor, "d_model"]],
    norm: Norm,
) -> tuple[Float[Tensor, "d_model"], bool]:
    """A direction that nothing writes: a free axis, else the one with the least energy.

    Returns it and whether it was free already. If not, `project_out` must free it: that moves the
    model by the little energy it had. Directions in `avoid`, coordinates with almost no gain and,
    where the norm removes the mean, the constant vector are excluded.
    """
    width = seen.embed.shape[-1]
    blocked = norm.gain.abs() < 1e-3 * norm.gain.abs().median()
    axes = [
        axis for axis in free_axes(model)
        if not blocked[axis] and all(float(other[axis].abs()) < 1e-9 for other in avoid)
    ]  # fmt: skip
    if axes and not norm.centers:
        tag = torch.zeros_like(seen.embed[0, 0])
        tag[axes[0]] = 1.0
        return tag, True
    rows = torch.cat([layer.reshape(-1, width) for layer in (seen.embed, *seen.post)]).double()
    if norm.centers:
        rows = rows - rows.mean(-1, keepdim=True)
    rows = nn.functional.normalize(rows, dim=-1)
    forbidden = [other.double() for other in avoid]
    forbidden += [torch.eye(width, dtype=torch.float64)[i] for i in blocked.nonzero().flatten()]
    if norm.centers:
        forbidden.append(torch.ones(width, dtype=torch.float64))
    energy = rows.T @ rows / len(rows)
    if forbidden:
        basis = torch.linalg.qr(torch.stack(forbidden, 1)).Q
        keep = torch.eye(width, dtype=torch.float64) - basis @ basis.T
        # lifted out of reach rather than removed: the smallest eigenvector then avoids them
        energy = keep @ energy @ keep + 2.0 * basis @ basis.T
    tag = torch.linalg.eigh(energy).eigenvectors[:, 0]
    return nn.functional.normalize(tag, dim=0).to(seen.embed), False


def project_out(model: PreTrainedModel, direction: Float[Tensor, "d_model"]) -> None:
    """Remove a direction from everything that writes to the residual stream, in place."""
    with torch.no_grad():
        for view in writers(model):
            view -= (view @ direction)[..., None] * direction


def tag_of(
    seen: Float[Tensor, "*batch d_model"], tag: Float[Tensor, "d_model"], norm: Norm
) -> Float[Tensor, "*batch"]:
    """The tag's size in MLP inputs, that is after the norm, its gain and shift taken out."""
    return (seen - norm.shift) @ (tag / norm.gain)


def write_switch(
    part: Part,
    tag: Float[Tensor, "d_model"],
    norm: Norm,
    between: tuple[float, float],
    vector: Float[Tensor, "d_model"],
) -> Int[Tensor, "unit"]:
    """Make spare units of one MLP add `vector` where the tag's size lies in `between`, in place.

    Two layers with biases: act(y - b) - act(y - b - w), a step that is flat on both sides. A gated
    MLP without biases: a sum of units c_i act(k_i y) y whose coefficients make it flat over the
    interval; it vanishes quadratically where the tag does. Returns the units' indices.
    """
    units = spare_units(part)[: part.units]
    if len(units) < part.units:
        raise ModelRefused(f"no {part.units} spare units left in the MLP; call make_room first.")
    low, high = between
    if not 0 < low < high:
        raise ModelRefused(f"the tag is not seen by the MLP: its size lies in {between}.")
    read = tag / norm.gain
    offset = float(read @ norm.shift)
    with torch.no_grad():
        if part.gated:
            middle = math.sqrt(low * high)
            scales, weights = _plateau(part.act, low / middle, high / middle)
            for reader, factor in zip(part.readers, (scales, torch.ones_like(scales))):
                rows = factor[:, None].to(read) * read / middle
                matrix(reader)[units] = rows
                if reader.bias is not None:
                    reader.bias[units] = -factor.to(read) * offset / middle
            matrix(part.writer)[:, units] = vector[:, None] * weights.to(vector)
        else:
            rest, ramp = 8.0, 8.0
            steep = (rest + ramp + rest) / low
            matrix(part.readers[0])[units] = steep * read
            shift = torch.tensor([rest, rest + ramp]).to(read)
            part.readers[0].bias[units] = -shift - steep * offset
            signs = torch.tensor([1.0, -1.0]).to(vector)
            matrix(part.writer)[:, units] = vector[:, None] * signs / ramp
    return units


_PLATEAUS: dict[tuple[str, float, float], tuple[Tensor, Tensor]] = {}


def _plateau(
    act: Callable[[Tensor], Tensor], low: float, high: float
) -> tuple[Tensor, Tensor]:
    """Scales k and weights c so that the sum of c act(k y) y is 1 between `low` and `high`."""
    name = f"{type(act).__module__}.{type(act).__name__}"
    key = (f"{name}.{getattr(act, '__name__', '')}", low, high)
    if key not in _PLATEAUS:
        y = torch.linspace(low, high, 400, dtype=torch.float64)
        best: Optional[tuple[float, Tensor, Tensor]] = None
        for first in (0.4, 0.7):
            scales = -first * torch.logspace(0, 1.1, GATED_UNITS, dtype=torch.float64)
            columns = act(scales * y[:, None]) * y[:, None]
            system = columns.T @ columns + 1e-9 * len(y) * torch.eye(GATED_UNITS).double()
            weights = torch.linalg.solve(system, columns.T @ torch.ones_like(y))
            error = float((columns @ weights - 1).abs().max())
            if best is None or error < best[0]:
                best = (error, scales, weights)
        assert best is not None
        if best[0] > 0.05:
            raise ModelRefused(
                f"the activation {name} cannot form a switch without biases: it would be off by "
                f"{best[0]:.0%}."
            )
        _PLATEAUS[key] = best[1:]
    return _PLATEAUS[key]


def write_size(
    part: Part, hidden: Float[Tensor, "*batch unit"], units: Union[Tensor, Sequence[int]]
) -> Float[Tensor, "*batch"]:
    """Norm of what the given units of one MLP add to the residual stream."""
    return (hidden[..., units] @ matrix(part.writer).detach()[:, units].T).norm(dim=-1)
