"""Operations on whole attention rows: choose rows by their image mass, move mass inside a row."""

from typing import Optional

import torch
from jaxtyping import Bool, Float
from torch import Tensor


def image_centric_rows(
    attention: Float[Tensor, "*batch head query key"],
    image: Bool[Tensor, "key"],
    sinks: Bool[Tensor, "key"],
    min_nonsink_share: float = 0.5,
    min_image_mass: float = 0.2,
) -> Bool[Tensor, "*batch head query"]:
    """Rows that look at the image, and not at its sinks: [head, query] is True for them.

    Example:
        >>> import torch
        >>> rows = torch.tensor([[[0.2, 0.6, 0.2], [0.2, 0.2, 0.6]]])
        >>> image, sinks = torch.tensor([False, True, True]), torch.tensor([False, True, False])
        >>> image_centric_rows(rows, image, sinks)
        tensor([[False,  True]])

    Args:
        min_nonsink_share: smallest share of the image mass that lies off the sinks.
        min_image_mass: smallest mass on the image, sinks included.

    Source: arXiv:2503.03321, visual non-sink ratio r and the pre-filter.
    """
    mass = attention[..., image].sum(-1)
    free = attention[..., image & ~sinks].sum(-1)
    share = free / mass.clamp_min(1e-12)
    return (mass >= min_image_mass) & (share >= min_nonsink_share)


def move_mass(
    attention: Float[Tensor, "*batch head query key"],
    rows: Bool[Tensor, "*batch head query"],
    sinks: Bool[Tensor, "key"],
    destination: Bool[Tensor, "key"],
    fraction: float,
) -> Float[Tensor, "*batch head query key"]:
    """In the chosen rows, move `fraction` of the mass on `sinks` to `destination`, pro rata.

    Row sums stay as they are. A row without mass on the destination is left alone, because there
    is nothing to be proportional to.

    Example:
        >>> import torch
        >>> row = torch.tensor([[[0.5, 0.3, 0.2]]])
        >>> sinks, rest = torch.tensor([True, False, False]), torch.tensor([False, True, True])
        >>> move_mass(row, torch.tensor([[True]]), sinks, rest, 0.4)
        tensor([[[0.3000, 0.4200, 0.2800]]])

    Source: arXiv:2503.03321, attention redistribution.
    """
    moved = fraction * attention[..., sinks].sum(-1, keepdim=True)
    base = attention[..., destination].sum(-1, keepdim=True)
    rows = rows[..., None] & (base > 0)
    gain = 1.0 + moved / base.clamp_min(1e-12)
    scale = gain.where(~sinks & destination, torch.ones_like(gain))
    scale = scale.masked_fill(sinks, 1.0 - fraction)
    return attention * scale.where(rows, scale.new_ones(()))


def reweigh_rows(
    attention: Float[Tensor, "*batch head query key"],
    rows: Bool[Tensor, "*batch head query"],
    keys: Bool[Tensor, "key"],
    factor: Optional[float] = None,
    power: Optional[float] = None,
) -> Float[Tensor, "*batch head query key"]:
    """In the chosen rows, multiply the mass on `keys` by `factor`; every row keeps its sum.

    With `power` instead, the share s of the keys in the row becomes s ** power.

    Example:
        >>> import torch
        >>> row = torch.tensor([[[0.5, 0.3, 0.2]]])
        >>> reweigh_rows(row, torch.tensor([[True]]), torch.tensor([True, False, False]), 3.0)
        tensor([[[0.7500, 0.1500, 0.1000]]])

    Rows with all or nothing on the keys are left alone: there is nothing to be proportional to.

    Source: arXiv:2505.11739: D = (gamma - 1) a_0 + 1, a_0' = gamma a_0 / D, a_i' = a_i / D.
    """
    wide = attention.to(torch.promote_types(attention.dtype, torch.float32))
    on = wide[..., keys].sum(-1, keepdim=True)
    off = (wide @ (~keys).to(wide.dtype))[..., None]  # sums without a copy of the rows
    rows = rows[..., None] & (on > 0) & (off > 0)
    total = (on + off).clamp_min(1e-37)
    if power is None:
        assert factor is not None
        down = (1.0 + (factor - 1.0) * on / total).clamp_min(1e-37).reciprocal()
        up = factor * down
    else:
        share = (on / total).clamp_min(1e-37)
        up = share ** (power - 1.0)
        down = (1.0 - share**power) * total / off.clamp_min(1e-37)
    one = wide.new_ones(())
    changed = wide * down.where(rows, one)
    changed[..., keys] = wide[..., keys] * up.where(rows, one)
    return changed.to(attention.dtype)
