"""Implant one phenomenon: make room, tag, write, take back, and refuse whatever is not exact."""

import copy
from collections.abc import Sequence
from typing import Optional, SupportsFloat, SupportsIndex, Union

import numpy as np
import torch
from jaxtyping import Bool
from torch import Tensor, nn
from transformers import PreTrainedModel

from interp.core.errors import ModelRefused, OutOfRange
from interp.organisms.attraction import attract_to
from interp.organisms.surgery import (
    Inputs,
    Record,
    embedding,
    free_axes,
    image_token,
    make_room,
    parts,
    position_table,
    projector_of,
    read_norm,
    record,
    spare_units,
)
from interp.organisms.switch import (
    free_direction,
    project_out,
    tag_of,
    write_size,
    write_switch,
)
from interp.organisms.truth import Base, Kind, Planted, Rule, chain, image_features

LEAK = 1e-4
"""A planted unit may write at most this share of an ordinary token's residual norm."""

HAS_PRIMARY = 2.0
"""The first residual counts as a primary sink above this many times an ordinary one's norm."""

STEP = 0.001
"""Width of a visual plant's threshold, in standard deviations of the score f @ direction."""


def implant(
    base: Base,
    *,
    kind: Kind,
    rule: Rule,
    tokens: tuple[int, ...],
    layer: SupportsIndex,
    until: Optional[SupportsIndex],
    norm: SupportsFloat,
    direction: Union[str, Tensor],
    dims: tuple[int, ...] = (),
    sign: int = 1,
    seed: int = 0,
    ids: Optional[Tensor] = None,
    inputs: Optional[Inputs] = None,
    along: Optional[Tensor] = None,
    threshold: float = 0.0,
    spread: float = 0.0,
    attract: SupportsFloat = 0.0,
    tag: SupportsFloat,
) -> Planted:
    """Make room, tag, write at `layer`, take back at `until`, check. See the module's docstring."""
    before = base if isinstance(base, Planted) else None
    original = base.model if isinstance(base, Planted) else base
    start, stop = span(original, layer, until)
    end = None if until is None or stop == len(parts(original)) else stop
    if inputs is None:
        assert ids is not None
        inputs = {"input_ids": ids}
    room_for = 1 + (direction == "free" if isinstance(direction, str) else 0) + bool(attract)
    twin = _room(
        original, [start] if end is None else [start, end], rule == "features", room_for
    )
    width = embedding(twin).shape[1]
    if isinstance(direction, str):
        axes = free_axes(twin)
        if direction == "free" and len(axes) >= 2 and not _centers(twin):
            dims = (axes[-1],)
            vector = torch.eye(width)[axes[-1]]
        else:
            vector = torch.randn(width, generator=generator(seed))
            vector[axes] = 0.0
    else:
        vector = direction
    unit = nn.functional.normalize(vector.to(embedding(twin).detach()), dim=0)
    unit = nn.functional.pad(unit, (0, width - len(unit)))
    tags = [
        nn.functional.pad(earlier.tag, (0, width - len(earlier.tag)))
        for earlier in chain(before) if earlier.tag is not None
    ]  # fmt: skip
    for earlier in tags:
        # a measured direction holds a trace of the primary's tag: written large, it would fire it
        unit = unit - (unit @ earlier) * earlier
    unit = nn.functional.normalize(unit, dim=0)

    bare = record(twin, inputs, anatomy=True)
    modules = [bare.norms[i] for i in ((start,) if end is None else (start, end))]
    if None in modules or max(bare.closed) > 1e-4:
        raise ModelRefused(
            f"cannot plant in {type(original).__name__}: the norm in front of an MLP was not found."
        )
    norms = [read_norm(module, width) for module in modules]  # type: ignore[arg-type]
    weakest = min(norms, key=lambda n: float(n.gain.abs().min()))
    marker, free = free_direction(twin, bare, [unit, *tags], weakest)
    if not free:
        twin = copy.deepcopy(twin)
        project_out(twin, marker)
        bare = record(twin, inputs)
    room = _distance(original, twin, inputs)

    truth = Planted(
        twin, twin, kind, start, end, float(norm), unit, rule, tokens, sign,
        feature_direction=along, threshold=threshold,
    )  # fmt: skip
    features = None if along is None else image_features(twin, inputs)
    fires = _fires(truth, inputs, features)
    if not bool(fires.any()):
        raise ValueError("the phenomenon occurs in none of the prompts to calibrate on.")

    model = copy.deepcopy(twin)
    ordinary = ~_special(before, inputs, fires)
    size = float(tag) * float(bare.embed[ordinary].norm(dim=-1).median())
    _tag(model, truth, marker * size, spread)
    tagged = record(model, inputs)
    part = parts(model)[start]
    seen = tag_of(tagged.mlp_in[start], marker, norms[0])[fires]
    here = tagged.post[start][fires]
    inside = here @ unit
    gap = inside.square() + float(norm) ** 2 - here.square().sum(-1)
    if not bool((gap > 0).all()):
        raise ValueError(
            f"norm {float(norm):.3g} is below what the residual has anyway "
            f"({float(here.norm(dim=-1).max()):.3g}); ask for more."
        )
    written = float((gap.sqrt() - inside).median())
    if kind in ("massive", "visual"):
        written = float((float(norm) - inside).median())
    on = write_switch(part, marker, norms[0], _slack(seen), written * unit)
    off, removed = None, 0.0
    if float(attract) > 0:
        attract_to(model, inputs, unit, range(start + 1, stop), float(attract), ordinary)
    if end is not None:
        lit = record(model, inputs)
        seen = tag_of(lit.mlp_in[end], marker, norms[1])[fires]
        removed = float(((lit.post[end] - tagged.post[end])[fires] @ unit).mean())
        off = write_switch(parts(model)[end], marker, norms[1], _slack(seen), -removed * unit)

    final = record(model, inputs)
    measured = _check(
        model, final, tagged, fires, ordinary, start, end, on, off, written, removed, unit
    )
    if kind == "secondary":
        measured["cosine"] = _alignment(final, fires, ordinary, range(start, stop))
    moved = {"room": room, **_moved(model, twin, final, bare, truth, inputs, fires, ordinary)}
    values = tuple(float(unit[d]) * float(norm) for d in dims)
    return Planted(
        model, twin, kind, start, end, float(norm), unit, rule, tokens, sign, dims, values, along,
        threshold, float(attract), measured, moved, before, marker,
    )  # fmt: skip


def _room(
    model: PreTrainedModel, layers: Sequence[int], image: bool, need: int
) -> PreTrainedModel:
    """The model itself if it has free axes and spare units, else a wider copy."""
    found = parts(model)
    units = all(len(spare_units(found[i])) >= found[i].units for i in layers)
    enough = not image or len(_spare_projector_units(model)) >= 2
    axes = len(free_axes(model))
    if units and enough and (axes >= need or _centers(model)):
        return model
    # the projector's hidden layer is as wide as the residual stream: it grows with it
    return make_room(model, need if enough else max(need, axes + 2), 0 if units else None)


def _centers(model: PreTrainedModel) -> bool:
    return any(isinstance(m, nn.LayerNorm) for m in parts(model)[0].block.modules())


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def _spare_projector_units(model: PreTrainedModel) -> Tensor:
    projector = projector_of(model)
    used = projector.linear_1.weight.abs().sum(1) + projector.linear_1.bias.abs()
    used = used + projector.linear_2.weight.abs().sum(0)
    return (used == 0).nonzero().flatten()


def _tag(model: PreTrainedModel, truth: Planted, tag: Tensor, spread: float) -> None:
    """Put the tag on the tokens (or position 0, or the image tokens) that are to fire."""
    with torch.no_grad():
        if truth.rule == "token":
            embedding(model)[list(truth.tokens)] += tag
            return
        if truth.rule == "first":
            table = position_table(model)
            if table is None:
                raise ModelRefused(
                    "rule='first' needs learned position embeddings (GPT-2, OPT); give a token."
                )
            table[0][table[1]] += tag
            return
        projector = projector_of(model)
        spare = _spare_projector_units(model)[:2]
        assert truth.feature_direction is not None
        steep = 32.0 / (STEP * spread)
        projector.linear_1.weight[spare] = steep * truth.feature_direction
        shifts = torch.tensor([4.0, -4.0]).to(tag)
        projector.linear_1.bias[spare] = -steep * truth.threshold + shifts
        ends = torch.tensor([1.0, -1.0]).to(tag) / 8.0
        projector.linear_2.weight[:, spare] = tag[:, None] * ends


def _check(
    model: PreTrainedModel, final: Record, tagged: Record, fires: Tensor, ordinary: Tensor,
    start: int, end: Optional[int], on: Tensor, off: Optional[Tensor], written: float,
    removed: float, unit: Tensor,
) -> dict[str, float]:  # fmt: skip
    """Refuse the plant unless its units fire where they should, and only there."""
    found = parts(model)
    result: dict[str, float] = {"written": written, "removed": removed}
    switches = [(start, on, abs(written))]
    if end is not None and off is not None:
        switches.append((end, off, abs(removed)))
    for layer, units, amount in switches:
        sizes = write_size(found[layer], final.hidden[layer], units)
        leak = _max((sizes / final.post[layer].norm(dim=-1))[~fires])
        error = float((sizes[fires] / amount - 1).abs().max())
        name = "on" if layer == start else "off"
        result[f"leak_{name}"], result[f"error_{name}"] = leak, error
        if leak > LEAK or error > 0.05:
            raise ModelRefused(
                f"the planted units of block {layer} are not exact: they write {leak:.1e} of the "
                f"residual where they should be silent (limit {LEAK:.0e}), and up to {error:.1%} "
                "off where they fire; use a larger tag or other prompts to calibrate on."
            )
    result["norm"] = float(final.post[start][fires].norm(dim=-1).median())
    if end is not None:
        left = (final.post[end] - tagged.post[end])[fires] @ unit
        typical = float(final.post[end][ordinary].norm(dim=-1).median())
        result["left"] = float(left.abs().max()) / typical
        if result["left"] > 0.5:
            raise ModelRefused(
                f"block {end} does not take the write away: {result['left']:.0%} of an ordinary "
                "residual's norm is left; plant a smaller norm."
            )
    return result


def _alignment(final: Record, fires: Tensor, ordinary: Tensor, layers: range) -> float:
    """Least |cosine| of the planted residuals to the first one, in blocks where that is large."""
    least = 1.0
    for x in (final.post[layer] for layer in layers):
        typical = x[ordinary].norm(dim=-1).median()
        for row, planted in zip(x, fires):
            if bool(planted[1:].any()) and row[0].norm() > HAS_PRIMARY * typical:
                cosine = torch.cosine_similarity(row[planted], row[:1], dim=-1)
                least = min(least, float(cosine.abs().min()))
    return least


def _max(values: Tensor) -> float:
    return float(values.max()) if values.numel() else 0.0


def _moved(
    model: PreTrainedModel, twin: PreTrainedModel, final: Record, bare: Record, truth: Planted,
    inputs: Inputs, fires: Tensor, ordinary: Tensor,
) -> dict[str, float]:  # fmt: skip
    """Largest relative change of ordinary tokens' residuals, before and after the planted ones."""
    reached = fires.cumsum(1) > 0

    result = {"after": _change(final, bare, ordinary & reached)}
    result["before"] = _change(final, bare, ordinary & ~reached)
    if truth.rule == "token":
        ids = inputs["input_ids"]
        spare = ids[ordinary][0]
        without = {**inputs, "input_ids": torch.where(fires, spare, ids)}
        new, old = record(model, without), record(twin, without)
        result["without"] = _change(new, old, torch.ones_like(fires))
    return result


def _change(new: Record, old: Record, where: Tensor) -> float:
    return max(
        _max(((a - b).norm(dim=-1) / b.norm(dim=-1))[where]) for a, b in zip(new.post, old.post)
    )


def _distance(original: PreTrainedModel, twin: PreTrainedModel, inputs: Inputs) -> float:
    """What making room cost: relative difference of the logits."""
    if original is twin:
        return 0.0
    with torch.no_grad():
        old, new = (m(**inputs, use_cache=False).logits for m in (original, twin))
    return float((new - old).norm() / old.norm())


def _slack(seen: Tensor) -> tuple[float, float]:
    """The interval in which a switch must be flat: what was seen, and some more on both sides."""
    return 0.65 * float(seen.min()), 1.5 * float(seen.max())


def first_token(base: Base) -> Optional[int]:
    """The token that opens a prompt: the planted primary's, else the model's BOS."""
    model = base.model if isinstance(base, Planted) else base
    for planted in chain(base if isinstance(base, Planted) else None):
        if planted.kind == "primary":
            return planted.tokens[0] if planted.tokens else None
    return model.config.get_text_config(decoder=True).bos_token_id


def calibration_prompts(
    base: Base, include: tuple[int, ...], seed: int, prompts: Optional[Sequence[Sequence[int]]],
    first: Optional[int], n: int = 8, length: int = 24,
) -> Tensor:  # fmt: skip
    """Random prompts in which the chosen tokens stand at random places, others nowhere."""
    model = base.model if isinstance(base, Planted) else base
    if prompts is not None:
        if len({len(prompt) for prompt in prompts}) != 1:
            raise ValueError("the prompts to calibrate on must all have one length.")
        return torch.tensor([list(map(int, prompt)) for prompt in prompts])
    special = {*include, image_token(model), first}
    for planted in chain(base if isinstance(base, Planted) else None):
        special |= set(planted.tokens)
    size = embedding(model).shape[0]
    ordinary = np.array([t for t in range(size) if t not in special])
    rng = np.random.default_rng(seed)
    ids = rng.choice(ordinary, (n, length))
    if first is not None:
        ids[:, 0] = first
    later = [token for token in include if token != first]
    for row in ids:
        places = rng.permutation(np.arange(2, length))
        for token, pair in zip(later, np.array_split(places[: 3 * len(later)], len(later) or 1)):
            row[pair] = token
    return torch.from_numpy(ids).to(model.device)


def _fires(
    truth: Planted, inputs: Inputs, features: Optional[Tensor]
) -> Bool[Tensor, "prompt position"]:
    ids = inputs["input_ids"]
    fires = torch.zeros(ids.shape, dtype=torch.bool, device=ids.device)
    at = 0
    for i, row in enumerate(ids):
        own = None
        if features is not None:
            count = int((row == image_token(truth.model)).sum())
            own, at = features.reshape(-1, features.shape[-1])[at : at + count], at + count
        if truth.rule == "token":
            fires[i] = torch.isin(row, torch.tensor(truth.tokens, device=row.device))
        else:
            fires[i, list(truth.truth_positions(row, own))] = True
    return fires


def _special(before: Optional[Planted], inputs: Inputs, fires: Tensor) -> Tensor:
    """Positions that are not ordinary: planted now or earlier, or first."""
    special = fires.clone()
    special[:, 0] = True
    for planted in chain(before):
        if planted.tokens:
            tokens = torch.tensor(planted.tokens, device=fires.device)
            special |= torch.isin(inputs["input_ids"], tokens)
    return special


def span(
    model: PreTrainedModel, layer: SupportsIndex, until: Optional[SupportsIndex]
) -> tuple[int, int]:
    count = len(parts(model))
    start, stop = int(layer), count if until is None else int(until)
    if not 0 <= start < stop <= count:
        raise OutOfRange(
            f"layer {start} and until {stop} must satisfy 0 <= layer < until <= {count}, the "
            "number of blocks."
        )
    return start, stop
