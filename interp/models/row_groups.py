"""Attention of variants of one prompt that lie row behind row, each with the rows from its first
changed position on; earlier positions lend their keys and values."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Optional

import torch
from jaxtyping import Float
from torch import Tensor, nn

from interp.core.errors import OutOfRange
from interp.models.edits import Pass
from interp.models.resume import Resumable
from interp.models.row_attention import attended

Cuts = Optional[Callable[[int], Optional[Tensor]]]
"""Number of a variant -> which edges are left, `[head, row, key]`; None where none is cut."""



@dataclass
class _Group:
    """Variants whose attention is one call: equal rows, or rows that begin close to each other.

    Rows are padded to begin at `low`. `rows`: where they lie, a slice where they are side by side
    and need no padding, else numbers with the `variant` and `position` of each.
    """

    members: list[int]
    low: int
    rows: Any
    variant: Optional[Tensor] = None
    position: Optional[Tensor] = None


class RowGroups:
    """Groups the rows of variants and computes their attention."""

    def __init__(self, base: Resumable) -> None:
        self.base, self.length = base, base.length
        self.device = base.lane.device
        self.groups: list[_Group] = []
        self._before: Any = None

    def arrange(self, firsts: Sequence[int]) -> None:
        """The variants that are there now, by the first position of each."""
        if self._before == tuple(firsts):
            return
        self._before = tuple(firsts)
        offsets = [0]
        for first in firsts:
            offsets.append(offsets[-1] + self.length - first)
        width = max(8, self.length // 8)
        found: dict[int, list[int]] = {}
        for number, first in enumerate(firsts):
            found.setdefault(first // width, []).append(number)
        self.groups = []
        for members in found.values():
            low = min(firsts[n] for n in members)
            together = members == list(range(members[0], members[-1] + 1))
            if together and all(firsts[n] == low for n in members):
                self.groups.append(_Group(members, low, slice(offsets[members[0]],
                                                              offsets[members[-1] + 1])))
                continue
            pieces = [torch.arange(firsts[n], self.length) for n in members]
            rows = torch.cat([p - firsts[n] + offsets[n] for n, p in zip(members, pieces)])
            variant = torch.cat([torch.full_like(p, i) for i, p in enumerate(pieces)])
            self.groups.append(_Group(members, low, rows.to(self.device), variant.to(self.device),
                                      torch.cat(pieces).to(self.device)))

    def all_rows(
        self, layer: int, q: Float[Tensor, "row head d_head"],
        k: Float[Tensor, "row kv_head d_head"], v: Float[Tensor, "row kv_head d_value"],
        cuts: Cuts, given: dict[str, Any],
    ) -> Float[Tensor, "row head d_value"]:
        """Every row attends to the keys of its variant."""
        if len(self.groups) == 1 and isinstance(self.groups[0].rows, slice):
            return self._attend(layer, self.groups[0], q, k, v, cuts, given)
        z = q.new_empty(*q.shape[:2], v.shape[-1])
        for group in self.groups:
            z[group.rows] = self._attend(layer, group, q, k, v, cuts, given)
        return z

    def _attend(
        self, layer: int, group: _Group, q: Tensor, k: Tensor, v: Tensor, cuts: Cuts,
        given: dict[str, Any],
    ) -> Tensor:
        count, rows = len(group.members), self.length - group.low
        if group.variant is None or group.position is None:
            padded = q[group.rows].unflatten(0, (count, rows))
        else:
            padded = q.new_zeros(count, rows, *q.shape[1:])
            padded[group.variant, group.position - group.low] = q[group.rows]
        seen = self._seen(layer, group, cuts)
        z = weighted_values(padded, self._whole(layer, group, k, "keys"),
                            self._whole(layer, group, v, "values"), seen, given)
        if group.variant is None or group.position is None:
            return z.flatten(0, 1)
        return z[group.variant, group.position - group.low]

    def last_rows(
        self, layer: int, q: Float[Tensor, "variant head d_head"],
        k: Float[Tensor, "row kv_head d_head"], v: Float[Tensor, "row kv_head d_value"],
        cuts: Cuts, given: dict[str, Any],
    ) -> Float[Tensor, "variant head d_value"]:
        """The last row of every variant attends to the keys of its variant."""
        z = q.new_empty(*q.shape[:2], v.shape[-1])
        plain = self.base.visible(layer)[-1:]
        for group in self.groups:
            seen = plain if cuts is None else _joined(
                plain, [cuts(number) for number in group.members], layer, q.shape[1])
            z[group.members] = weighted_values(
                q[group.members][:, None], self._whole(layer, group, k, "keys"),
                self._whole(layer, group, v, "values"), seen, given)[:, 0]
        return z

    def cut_rows(
        self, layer: int, q: Float[Tensor, "row head d_head"], passes: Sequence[Pass], cuts: Cuts,
        given: dict[str, Any],
    ) -> Float[Tensor, "row head d_value"]:
        """Rows of variants whose keys are those of the plain run."""
        k, v = (x[layer].transpose(0, 1)[None] for x in (self.base.keys, self.base.values))
        assert cuts is not None
        plain, parts, at = self.base.visible(layer), [], 0
        for number, now in enumerate(passes):
            rows = plain[now.start : now.start + now.length]
            seen = _joined(rows, [cuts(number)], layer, q.shape[1])
            parts.append(seen)
        if len({now.length for now in passes}) == 1:
            # Queries of all variants are rows of one call, on the same keys.
            many = torch.cat(parts, 2)
            return weighted_values(q[None], k, v, many, given)[0]
        found = []
        for now, seen in zip(passes, parts):
            found.append(weighted_values(q[None, at : at + now.length], k, v, seen, given)[0])
            at += now.length
        return torch.cat(found)

    def _seen(self, layer: int, group: _Group, cuts: Cuts) -> Optional[Tensor]:
        """Which keys the rows see; None where every position sees the earlier ones, all of them."""
        if cuts is None:
            if group.low == 0 and self.base._masks[layer].plain == "causal":
                return None
            return self.base.visible(layer)[group.low :]
        plain = self.base.visible(layer)[group.low :]
        left = []
        for number in group.members:
            one = cuts(number)
            if one is not None and one.shape[1] < len(plain):
                one = nn.functional.pad(one, (0, 0, len(plain) - one.shape[1], 0), value=True)
            left.append(one)
        heads = next((one.shape[0] for one in left if one is not None), 1)
        return _joined(plain, left, layer, heads)

    def _whole(self, layer: int, group: _Group, own: Tensor, name: str) -> Tensor:
        """Keys or values of every position, per variant: `[variant, position, kv_head, d_head]`."""
        count, low = len(group.members), group.low
        lent = getattr(self.base, name)[layer].transpose(0, 1)
        if group.variant is None:
            made = own[group.rows].unflatten(0, (count, self.length - low))
            return made if low == 0 else torch.cat([lent[:low].expand(count, -1, -1, -1), made], 1)
        made = lent.expand(count, -1, -1, -1).clone()
        made[group.variant, group.position] = own[group.rows]
        return made


def _joined(plain: Tensor, left: Sequence[Optional[Tensor]], layer: int, heads: int) -> Tensor:
    """Visibility per variant, `[variant, head, row, key]`."""
    seen = torch.stack([plain.expand(heads, -1, -1) if one is None else plain & one for one in left])
    if not bool(seen.any(-1).all()):
        raise OutOfRange(
            f"blocking leaves a position without any key to attend to in layer {layer}; "
            "exclude its attention to itself."
        )
    return seen


def weighted_values(
    q: Float[Tensor, "variant row head d_head"],
    k: Float[Tensor, "variant key kv_head d_head"],
    v: Float[Tensor, "variant key kv_head d_value"],
    seen: Optional[Tensor],
    given: dict[str, Any],
) -> Float[Tensor, "variant row head d_value"]:
    """What the rows read; `seen` `[.., row, key]`, None for causal attention."""
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    return attended(q, k, v, seen, given)
