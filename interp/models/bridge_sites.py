"""Which TransformerLens hook holds which site of a block: decided by what was recorded there.

Names differ between architectures, and the same name can hold different things: in some, the hook
named after attention logits is given the weights. So every site has candidates, and the one whose
value satisfies the equation that defines the site is taken.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass, field
from itertools import product
from typing import Optional

import torch
from jaxtyping import Float
from torch import Tensor

from interp.core.site import NAMES
from interp.models.edits import Shape

CANDIDATES: dict[str, tuple[str, ...]] = {
    "resid_pre": ("hook_in",),
    "resid_post": ("hook_out",),
    "attn_out": ("hook_attn_out", "attn.hook_out", "attn.o.hook_out"),
    "mlp_out": ("hook_mlp_out", "mlp.hook_out", "mlp.out.hook_out"),
    "resid_mid": ("hook_resid_mid", "ln2.hook_in", "ln1.hook_out"),
    "mlp_in": ("mlp.hook_in", "mlp.in.hook_in"),
    "q": ("attn.hook_rot_q", "attn.hook_q_normed", "attn.q.hook_out"),
    "k": ("attn.hook_rot_k", "attn.hook_k_normed", "attn.k.hook_out"),
    "v": ("attn.v.hook_out",),
    "z": ("attn.o.hook_in",),
    "scores": ("attn.hook_attn_scores",),
    "pattern": ("attn.hook_pattern",),
}
MORE = ("ln1.hook_in", "ln2.hook_out")


def candidates() -> tuple[str, ...]:
    """Every hook of a block that is worth recording."""
    return tuple(dict.fromkeys([name for names in CANDIDATES.values() for name in names] + [*MORE]))


@dataclass
class Found:
    """Site -> hook for one block, and site -> why there is none."""

    kind: str = "unknown"
    hooks: dict[str, str] = field(default_factory=dict)
    missing: dict[str, str] = field(default_factory=dict)


def solve(
    recorded: dict[str, list[Tensor]],
    shape: Shape,
    softcap: Optional[float],
    tolerance: float,
    attention: str,
) -> Found:
    """Find the hooks of one block from what they held in a pass over one prompt.

    Args:
        recorded: hook -> its values, one for every time it fired.
        softcap: logits were made as softcap * tanh(logits / softcap).
        tolerance: relative to the largest value, what counts as equal.
        attention: class of the attention bridge, for messages.
    """
    # A hook that fires more than once, or never, cannot stand for one place.
    seen = {name: values[0] for name, values in recorded.items() if len(values) == 1}
    found = Found()
    _residual(found, seen, shape, tolerance)
    _attention(found, seen, shape, softcap, tolerance, attention)
    for name in NAMES:
        if name != "embed" and name not in found.hooks and name not in found.missing:
            found.missing[name] = "no hook of TransformerLens holds it in this architecture"
    return found


def _residual(found: Found, seen: dict[str, Tensor], shape: Shape, tolerance: float) -> None:
    streams = {n: x for n, x in seen.items() if x.ndim == 3 and x.shape[-1] == shape.d_model}

    def of(site: str) -> list[str]:
        return [name for name in CANDIDATES[site] if name in streams]

    def close(a: Tensor, b: Tensor) -> bool:
        return _close(a, b, tolerance)

    for site in ("resid_pre", "resid_post", "mlp_in"):
        found.hooks.update({site: name for name in of(site)[:1]})
    if "resid_pre" not in found.hooks or "resid_post" not in found.hooks:
        return
    before, after = streams[found.hooks["resid_pre"]], streams[found.hooks["resid_post"]]
    norms = {f"{norm}.{side}" for norm in ("ln1", "ln2") for side in ("hook_in", "hook_out")}
    for attn, mlp in product(of("attn_out"), of("mlp_out")):
        first, second = streams[attn], streams[mlp]
        adds = {"attn_out": attn, "mlp_out": mlp}
        for middle in of("resid_mid"):
            between = streams[middle]
            if close(before + first, between) and close(between + second, after):
                found.kind = "sequential"
                found.hooks.update(adds, resid_mid=middle)
                return
            if norms <= streams.keys() and (
                close(before + first, streams["ln1.hook_in"])
                and close(between, streams["ln1.hook_out"])
                and close(between + second, streams["ln2.hook_in"])
                and close(streams["ln2.hook_out"], after)
            ):
                found.kind = "post_norm"
                found.hooks.update(adds, resid_mid=middle)
                return
        if close(before + first + second, after):
            found.kind = "parallel"
            found.hooks.update(adds)
            found.missing["resid_mid"] = (
                "attention and MLP run in parallel here, so nothing lies between them"
            )
            return


def _attention(
    found: Found, seen: dict[str, Tensor], shape: Shape, softcap: Optional[float],
    tolerance: float, attention: str,
) -> None:
    def of(site: str, heads: int) -> list[Tensor]:
        return [
            made for name in CANDIDATES[site] if name in seen
            if (made := _by_position(seen[name], heads, shape.d_head)) is not None
        ]

    def name(site: str, heads: int, which: int) -> str:
        known = [n for n in CANDIDATES[site] if n in seen
                 and _by_position(seen[n], heads, shape.d_head) is not None]
        return known[which]

    heads, kv = shape.n_heads, shape.n_kv_heads
    p = seen.get("attn.hook_pattern")
    if p is None or p.ndim != 4 or p.shape[1] != heads:
        return
    found.hooks["pattern"] = "attn.hook_pattern"
    # Smaller weights have too few digits left to compare their logarithms.
    visible = p > 1e-20
    logits = p.clamp_min(1e-20).log()
    scores, exact = seen.get("attn.hook_attn_scores"), False
    if scores is not None and scores.shape == p.shape:
        gap = _centered(torch.where(visible, scores, logits) - logits, visible)
        exact = _close(gap, torch.zeros_like(gap), tolerance, scale=float(logits[visible].std()))
    if exact:
        found.hooks["scores"] = "attn.hook_attn_scores"
    else:
        found.missing["scores"] = (
            f"TransformerLens hands attention to the model here ({attention}), which shows the "
            "weights but not the logits"
        )
    for which, value in enumerate(of("v", kv)[:1]):
        found.hooks["v"] = name("v", kv, which)
        wide = value.repeat_interleave(heads // kv, 2)
        expected = torch.einsum("bhqk,bkhd->bqhd", p, wide)
        for place, z in enumerate(of("z", heads)):
            if _close(z, expected, tolerance):
                found.hooks["z"] = name("z", heads, place)
                break
    if "z" not in found.hooks:
        found.missing["z"] = (
            "no hook of TransformerLens holds the weighted values (a gate or a norm may follow them)"
        )
    target = scores if exact else logits
    assert target is not None
    if softcap is not None and exact:
        inside = (target / softcap).clamp(-1 + 1e-6, 1 - 1e-6)
        target = softcap * torch.atanh(inside)
    for (i, q), (j, k) in product(enumerate(of("q", heads)), enumerate(of("k", kv))):
        if softcap is not None and not exact:
            break
        if _explains(q, k, target, visible, exact, tolerance, heads // kv):
            found.hooks["q"], found.hooks["k"] = name("q", heads, i), name("k", kv, j)
            return
    for site, word in (("q", "queries"), ("k", "keys")):
        found.missing[site] = (
            f"no hook of TransformerLens ({attention}) holds the {word} that make the logits; they "
            "are shown only before position encoding"
        )


def _explains(
    q: Float[Tensor, "batch query head d_head"], k: Float[Tensor, "batch key kv_head d_head"],
    target: Tensor, visible: Tensor, exact: bool, tolerance: float, group: int,
) -> bool:
    """Whether the logits are a multiple of q k (up to a constant in each row, if not `exact`)."""
    products = torch.einsum("bqhd,bkhd->bhqk", q, k.repeat_interleave(group, 2))
    x, y = (torch.where(visible, t, torch.zeros_like(t)) for t in (products, target))
    if not exact:
        x, y = _centered(x, visible), _centered(y, visible)
    size = float(x.square().sum())
    if not size > 0 or not math.isfinite(size):
        return False
    return _close(x * (float((x * y).sum()) / size), y, tolerance)


def _by_position(x: Tensor, heads: int, d_head: int) -> Optional[Tensor]:
    """As `[batch, position, head, d_head]`; None if it cannot be that."""
    if x.ndim == 4 and x.shape[2:] == (heads, d_head):
        return x
    return None


def _centered(x: Tensor, visible: Tensor) -> Tensor:
    counts = visible.sum(-1, keepdim=True).clamp_min(1)
    x = torch.where(visible, x, torch.zeros_like(x))
    return torch.where(visible, x - x.sum(-1, keepdim=True) / counts, torch.zeros_like(x))


def _close(a: Tensor, b: Tensor, tolerance: float, scale: Optional[float] = None) -> bool:
    if a.shape != b.shape:
        return False
    scale = float(b.abs().max()) if scale is None else scale
    return bool((a - b).abs().max() <= tolerance * max(scale, 1e-6))


def hooks_of(found: Iterable[Found]) -> dict[str, list[str]]:
    """Site -> the distinct hooks that hold it, over blocks."""
    table: dict[str, list[str]] = {}
    for one in found:
        for site, hook in one.hooks.items():
            if hook not in table.setdefault(site, []):
                table[site].append(hook)
    return table
