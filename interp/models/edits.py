"""Interventions resolved for one prompt, applied to plain tensors; the same in every lane."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Optional

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from interp.core.errors import OutOfRange, SiteRefused
from interp.core.head import check_heads
from interp.core.intervention import (
    AblateHeads,
    BlockEdges,
    EditSite,
    Intervention,
    Redistribute,
    Reweigh,
    ScaleHeads,
    thaw,
)
from interp.core.prompt import Prompt
from interp.core.site import HEADED, PAIRS, check_layers
from interp.stream.rows import image_centric_rows, move_mass, reweigh_rows


@dataclass(frozen=True)
class Shape:
    """The sizes of a model that edits are checked against."""

    n_layers: int
    n_heads: int
    n_kv_heads: int
    d_model: int
    d_head: int


@dataclass(frozen=True)
class Pass:
    """One forward pass: the absolute position of its first row, and whether it is decoding."""

    start: int
    length: int
    decoding: bool = False

    def positions(self, device: Any = None) -> Int[Tensor, "position"]:
        return torch.arange(self.start, self.start + self.length, device=device)

    def rows(self, phase: str, device: Any = None) -> Bool[Tensor, "position"]:
        """Rows of this pass in which an edit of this phase acts."""
        rows = torch.ones(self.length, dtype=torch.bool, device=device)
        if phase == "prefill" and self.decoding or phase == "decode" and not self.decoding:
            rows[:] = False
        if phase == "last":
            rows[:-1] = False
        return rows


class Places:
    """Positions of one prompt, with or without everything generated after it."""

    def __init__(self, prompt: Prompt, frozen: Any) -> None:
        where = thaw(frozen)
        self.tail: Optional[int] = None
        if isinstance(where, str) and where == "all" and not _names(prompt, where):
            self.fixed, self.tail = tuple(range(len(prompt))), len(prompt)
        elif isinstance(where, str) and where == "generated" and not _names(prompt, where):
            self.fixed, self.tail = (), len(prompt)
        else:
            self.fixed = prompt.positions(where)
            if isinstance(where, str) and where == "generated":
                self.tail = len(prompt)
        self._last: Optional[tuple[Tensor, Tensor]] = None

    def among(self, positions: Int[Tensor, "position"]) -> Bool[Tensor, "position"]:
        """Which of these absolute positions are meant."""
        if self._last is not None and self._last[0] is positions:
            return self._last[1]
        fixed = torch.tensor(self.fixed, dtype=positions.dtype, device=positions.device)
        found = torch.isin(positions, fixed)
        if self.tail is not None:
            found |= positions >= self.tail
        # The keys of all layers are one tensor, which nobody changes.
        self._last = positions, found
        return found


def _names(prompt: Prompt, where: str) -> bool:
    return any(where in (segment.name, segment.kind) for segment in prompt.segments)


class Edits:
    """Every intervention of a run, resolved in one prompt and sorted by where it acts.

    Raises, before anything runs, `OutOfRange` for heads, layers or positions that do not exist,
    `SegmentNotFound`, and ValueError for values of a wrong shape.
    """

    def __init__(self, prompt: Prompt, write: Sequence[Intervention], shape: Shape) -> None:
        self.shape = shape
        self._sites: dict[tuple[int, str], list[tuple[EditSite, Places, Tensor]]] = {}
        self._heads: dict[int, list[Any]] = {}
        self._blocks: dict[int, list[tuple[BlockEdges, Optional[list[int]], Places, Places]]] = {}
        self._pattern: dict[int, list[Any]] = {}
        for one in write:
            if isinstance(one, (AblateHeads, ScaleHeads)):
                self._add_heads(one, prompt)
            elif isinstance(one, BlockEdges):
                queries, keys = Places(prompt, one.queries), Places(prompt, one.keys)
                for layer, heads in self._layers(one.layers, one.heads):
                    self._blocks.setdefault(layer, []).append((one, heads, queries, keys))
            elif isinstance(one, Redistribute):
                self._add_redistribution(one, prompt)
            elif isinstance(one, Reweigh):
                queries, keys = Places(prompt, one.queries), Places(prompt, one.keys)
                for layer, heads in self._layers(one.layers, one.heads):
                    self._pattern.setdefault(layer, []).append((one, heads, queries, keys))
            elif isinstance(one, EditSite):
                self._add_site(one, prompt)
            else:
                raise SiteRefused(
                    f"{type(one).__name__} is not an intervention that a model run knows; use "
                    "ablate, scale, block, edit, patch, redistribute or reweigh."
                )

    def _layers(self, layers: Any, heads: Any) -> list[tuple[int, Optional[list[int]]]]:
        if heads is None:
            return [(layer, None) for layer in check_layers(layers, self.shape.n_layers)]
        check_heads(heads, self.shape.n_layers, self.shape.n_heads)
        grouped: dict[int, list[int]] = {}
        for head in heads:
            grouped.setdefault(head.layer, []).append(head.head)
        return list(grouped.items())

    def _add_heads(self, one: Any, prompt: Prompt) -> None:
        for layer, heads in self._layers(None, one.heads):
            if isinstance(one, AblateHeads) and one.by == "uniform":
                self._pattern.setdefault(layer, []).append((one, heads))
                continue
            value = None
            if isinstance(one, AblateHeads) and one.value is not None:
                assert heads is not None  # this names its heads
                value = self._head_value(one, layer, heads, prompt)
            self._heads.setdefault(layer, []).append((one, heads, value))

    def _head_value(
        self, one: AblateHeads, layer: int, heads: list[int], prompt: Prompt
    ) -> Tensor:
        """What replaces the output of heads: `[head, d_head]`, or `[position, head, d_head]`."""
        shape, given = self.shape, one.value.values  # type: ignore[union-attr]
        if one.by == "mean":
            want: tuple[int, ...] = (shape.n_layers, shape.n_heads, shape.d_head)
            axes = "[layer, head, d_head]"
        else:
            want = (shape.n_layers, len(prompt), shape.n_heads, shape.d_head)
            axes = "[layer, position, head, d_head]"
        if given.shape != want:
            raise ValueError(
                f"ablation by {one.by} needs a value of shape {want} {axes}, not {given.shape}."
            )
        return torch.tensor(given[layer][..., heads, :])

    def _add_redistribution(self, one: Redistribute, prompt: Prompt) -> None:
        by_layer = isinstance(one.sinks, tuple) and one.sinks[:1] == ("by layer",)
        table = dict(one.sinks[1:]) if by_layer else {}
        if by_layer:
            check_layers(table, self.shape.n_layers)
        queries = Places(prompt, one.queries)
        target = Places(prompt, one.destination)
        selects = one.min_nonsink_share is not None or one.min_image_mass is not None
        image = Places(prompt, one.image) if selects else None
        everywhere = None if by_layer else Places(prompt, one.sinks)
        for layer, heads in self._layers(one.layers, one.heads):
            if by_layer and not table.get(layer):
                continue
            sinks = everywhere or Places(prompt, table[layer])
            self._pattern.setdefault(layer, []).append((one, heads, queries, sinks, target, image))

    def _add_site(self, one: EditSite, prompt: Prompt) -> None:
        name = one.site.name
        places = Places(prompt, one.positions)
        layers = one.site.of(self.shape.n_layers)
        value = torch.tensor(one.value.values)
        base = 3 if name in HEADED + PAIRS else 2
        if one.how == "project_out":
            base = 2
        if value.ndim > base + 1 or value.ndim == base + 1 and value.shape[0] != len(layers):
            raise ValueError(
                f"the value for site {one.site} has shape {tuple(value.shape)}; expected at most "
                f"{base} axes, or {base + 1} with one entry for each of its {len(layers)} layers."
            )
        per_layer = value.ndim == base + 1
        last = {"q": self.shape.d_head, "k": self.shape.d_head, "v": self.shape.d_head,
                "z": self.shape.d_head}.get(name, self.shape.d_model)
        if one.how == "amplify" and name != "scores":
            raise SiteRefused(f"'amplify' changes attention logits ('scores'), not {one.site}.")
        directed = one.how in ("replace", "add", "project_out", "steer")
        if name not in PAIRS and directed and value.ndim:
            width = len(one.dims) if one.dims is not None else last
            if value.shape[-1] not in (1, width):
                raise ValueError(
                    f"the value for site {one.site} has width {value.shape[-1]}, "
                    f"but {width} coordinates are to be changed."
                )
        if one.dims is not None and not all(0 <= d < last for d in one.dims):
            raise OutOfRange(f"dims {one.dims} of site {one.site}: there are 0 to {last - 1}.")
        name = "resid_pre" if name == "embed" else name
        for index, layer in enumerate(layers):
            entry = (one, places, value[index] if per_layer else value)
            if name in PAIRS:
                self._pattern.setdefault(layer, []).append(entry)
            else:
                self._sites.setdefault((layer, name), []).append(entry)

    def sites(self) -> set[str]:
        """Names of the sites that some edit writes, for the lane to check."""
        names = {name for _, name in self._sites}
        names |= {"z"} if self._heads else set()
        names |= {"pattern"} if self._pattern else set()
        return names | ({"scores"} if self._blocks else set())

    def writes(self, layer: int, name: str) -> bool:
        if name == "z" and layer in self._heads:
            return True
        return (layer, name) in self._sites

    def blocks(self, layer: int) -> bool:
        return layer in self._blocks

    def edits_pattern(self, layer: int) -> bool:
        return layer in self._pattern

    def apply(
        self, layer: int, name: str, x: Float[Tensor, "position *rest"], now: Pass
    ) -> Float[Tensor, "position *rest"]:
        """The activation `[position, d_model]` or `[position, head, d_head]` after its edits."""
        entries = self._sites.get((layer, name), ())
        if not entries and not (name == "z" and layer in self._heads):
            return x
        x = x.clone()
        for one, places, value in entries:
            self._edit(x, one, places, value, now)
        if name == "z":
            for one, heads, value in self._heads.get(layer, ()):
                rows = now.rows(one.phase, x.device).nonzero()[:, 0][:, None]
                columns = torch.tensor(heads, device=x.device)
                if isinstance(one, ScaleHeads):
                    x[rows, columns] *= one.factor
                elif value is None:
                    x[rows, columns] = 0.0
                elif value.ndim == 2:
                    x[rows, columns] = value.to(x)
                else:
                    places = now.positions(x.device)[rows[:, 0]]
                    if len(places) and int(places[-1]) >= len(value):
                        raise ValueError(
                            "ablation by resample has no value for generated tokens; use "
                            "phase='prefill', or 'mean'."
                        )
                    x[rows, columns] = value.to(x)[places]
        return x

    @staticmethod
    def _edit(x: Tensor, one: EditSite, places: Places, value: Tensor, now: Pass) -> None:
        positions = _key_positions(x, now)
        # Keys and values of earlier passes come along in decoding: the phase of such a row is
        # the phase of the pass it was made in.
        rows = places.among(positions)
        if len(positions) == now.length:
            rows &= now.rows(one.phase, x.device)
        elif one.phase != "all":
            raise SiteRefused(
                f"phase {one.phase!r} cannot be used on {one.site} while generating; use 'all'."
            )
        chosen = rows.nonzero()[:, 0]
        if not len(chosen):
            return
        value = value.to(device=x.device, dtype=x.dtype if value.is_floating_point() else None)
        if one.how not in ("project_out", "norm") and value.ndim == x.ndim and len(value) > 1:
            fixed = {position: i for i, position in enumerate(places.fixed)}
            if len(value) != len(fixed):
                raise ValueError(
                    f"the value for site {one.site} has {len(value)} rows, but "
                    f"{len(fixed)} positions are to be changed."
                )
            wanted = [fixed.get(int(p)) for p in positions[chosen]]
            if None in wanted:
                raise ValueError(
                    f"the value for site {one.site} has no row for generated tokens; "
                    "use phase='prefill' or a value without a position axis."
                )
            value = value[torch.tensor(wanted, device=x.device)]
        part = x[chosen] if one.dims is None else x[chosen][..., list(one.dims)]
        if one.how == "replace":
            part = value.expand_as(part)
        elif one.how == "add":
            part = part + value
        elif one.how == "multiply":
            part = part * value
        elif one.how == "norm":
            norm = part.float().norm(dim=-1, keepdim=True).clamp_min(1e-12)
            part = (part.float() / norm * value.float().reshape(-1, 1)).to(x.dtype)
        elif one.how == "steer":
            part = steered(part.float(), value.float()).to(x.dtype)
        else:
            basis, _ = torch.linalg.qr(value.float().reshape(-1, value.shape[-1]).T)
            part = (part.float() - part.float() @ basis @ basis.T).to(x.dtype)
        if one.dims is None:
            x[chosen] = part.to(x.dtype)
        else:
            x[chosen[:, None], ..., torch.tensor(one.dims, device=x.device)] = part.to(x.dtype)

    def visible(
        self,
        layer: int,
        queries: Int[Tensor, "query"],
        keys: Int[Tensor, "key"],
        now: Pass,
    ) -> Optional[Bool[Tensor, "head query key"]]:
        """False where an edge is blocked; None if no block touches this layer."""
        if layer not in self._blocks:
            return None
        open_ = torch.ones(
            (self.shape.n_heads, len(queries), len(keys)), dtype=torch.bool, device=queries.device
        )
        for one, heads, from_, to in self._blocks[layer]:
            rows = from_.among(queries) & now.rows(one.phase, queries.device)[queries - now.start]
            cut = rows[:, None] & to.among(keys)[None]
            if heads is None:
                open_ &= ~cut
            else:
                open_[torch.tensor(heads, device=queries.device)] &= ~cut
        return open_

    def pattern(
        self,
        layer: int,
        p: Float[Tensor, "head query key"],
        queries: Int[Tensor, "query"],
        keys: Int[Tensor, "key"],
        visible: Bool[Tensor, "#head query key"],
        now: Pass,
        kind: str = "pattern",
    ) -> Float[Tensor, "head query key"]:
        """Whole rows of attention (or, with `kind="scores"`, logits) after their edits."""
        for entry in self._pattern.get(layer, ()):
            one = entry[0]
            acts = now.rows(one.phase, p.device)[queries - now.start]
            if isinstance(one, EditSite):
                if one.site.name != kind:
                    continue
                _, places, value = entry
                rows = acts & places.among(queries)
                if not bool(rows.any()):
                    continue
                change = Pass(now.start, now.length, now.decoding)
                moved = p.movedim(1, 0)[rows]
                new = _pair_value(one, value.to(p), queries, keys, rows, change)
                made = {"replace": new, "add": moved + new, "multiply": moved * new}.get(one.how)
                if one.how == "amplify":
                    # What is hidden stays hidden: minus infinity has no size to add.
                    made = moved + new * moved.abs().where(moved.isfinite(), 0.0)
                if made is None:
                    raise SiteRefused(f"{one.how!r} has no meaning for site {one.site}.")
                p = p.clone()
                p[:, rows] = made.movedim(0, 1).expand_as(p[:, rows])
            elif kind == "scores":
                continue
            elif isinstance(one, AblateHeads):
                _, heads = entry
                p = p.clone()
                even = visible.expand(p.shape)[heads].to(p.dtype)
                even = even / even.sum(-1, keepdim=True).clamp_min(1)
                p[heads] = torch.where(acts[:, None], even, p[heads])
            else:
                heads, from_ = entry[1:3]
                rows = (acts & from_.among(queries)).expand(p.shape[0], -1).clone()
                if heads is not None:
                    chosen = torch.zeros(p.shape[0], dtype=torch.bool, device=p.device)
                    chosen[heads] = True
                    rows &= chosen[:, None]
                if isinstance(one, Reweigh):
                    here = slice(None) if heads is None else heads
                    p, part = p.clone(), (rows[here], entry[3].among(keys))
                    p[here] = reweigh_rows(p[here], *part, one.factor, one.power)
                    continue
                sinks, target, image = entry[3:]
                sink = sinks.among(keys)
                if image is not None:
                    rows &= image_centric_rows(
                        p, image.among(keys), sink,
                        one.min_nonsink_share or 0.0, one.min_image_mass or 0.0,
                    )
                p = move_mass(p, rows, sink, target.among(keys) & ~sink, one.fraction)
        return p

    def edits_scores(self, layer: int) -> bool:
        return any(
            isinstance(e[0], EditSite) and e[0].site.name == "scores"
            for e in self._pattern.get(layer, ())
        )


def steered(
    x: Float[Tensor, "*rest d_model"], toward: Float[Tensor, "*some d_model"]
) -> Float[Tensor, "*rest d_model"]:
    """Vectors turned towards a direction, at their own norm; doubly so where they point away.

    Example:
        >>> steered(torch.tensor([[3.0, 0.0], [0.0, -2.0]]), torch.tensor([0.0, 1.0]))[0]
        tensor([2.1213, 2.1213])

    Source: arXiv:2502.03628, released code.
    """
    size = x.norm(dim=-1, keepdim=True)
    away = torch.cosine_similarity(x, -toward, dim=-1, eps=1e-12).clamp_min(0)[..., None]
    moved = x / size.clamp_min(1e-12) + (1 + away) * toward
    return size * moved / moved.norm(dim=-1, keepdim=True).clamp_min(1e-12)


def _key_positions(x: Tensor, now: Pass) -> Int[Tensor, "position"]:
    """Absolute positions of the rows: those of the pass, or all keys up to its end."""
    if x.shape[0] == now.length:
        return now.positions(x.device)
    end = now.start + now.length
    return torch.arange(end - x.shape[0], end, device=x.device)


def _pair_value(
    one: EditSite, value: Tensor, queries: Tensor, keys: Tensor, rows: Tensor, now: Pass
) -> Tensor:
    """The part of a `[head, query, key]` value that concerns these rows, as `[row, head, key]`."""
    while value.ndim < 3:
        value = value[None]
    if value.shape[1] > 1:
        if value.shape[1] != now.length:
            raise ValueError(
                f"the value for site {one.site} has {value.shape[1]} query rows, "
                f"but the pass has {now.length}."
            )
        value = value[:, (queries - now.start)[rows]]
    else:
        value = value.expand(-1, int(rows.sum()), -1)
    if value.shape[2] > 1:
        if value.shape[2] <= int(keys[-1]):
            raise ValueError(
                f"the value for site {one.site} has {value.shape[2]} keys, "
                f"but the pass has {int(keys[-1]) + 1}."
            )
        value = value[:, :, keys]
    return value.movedim(1, 0)
