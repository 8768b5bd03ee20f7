"""Which TransformerLens hook holds which site of a block: decided by what was recorded there.

Names differ between architectures, and the same name can hold different things: in some, the hook
named after attention logits is given the weights. So every site has candidates, and the one whose
value satisfies the equation that defines the site is taken.
"""

import math
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
        if of(site):
            found.hooks[site] = of(site)[0]
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
    heads, kv, group = shape.n_heads, shape.n_kv_heads, shape.n_heads // shape.n_kv_heads

    def of(site: str, count: int) -> list[tuple[str, Tensor]]:
        return [
            (name, seen[name]) for name in CANDIDATES[site]
            if name in seen and seen[name].ndim == 4
            and tuple(seen[name].shape[2:]) == (count, shape.d_head)
        ]

    p = seen.get("attn.hook_pattern")
    if p is None or p.ndim != 4 or p.shape[1] != heads:
        return
    found.hooks["pattern"] = "attn.hook_pattern"
    # Smaller weights have too few digits left to compare their logarithms.
    visible = p > 1e-20
    logits = p.clamp_min(1e-20).log()
    scores, exact = seen.get("attn.hook_attn_scores"), False
    if scores is not None and scores.shape == p.shape:
        gap = _centered(scores, visible) - _centered(logits, visible)
        exact = _close(gap, torch.zeros_like(gap), tolerance, float(logits[visible].std()))
    if exact:
        found.hooks["scores"] = "attn.hook_attn_scores"
    else:
        found.missing["scores"] = (
            f"TransformerLens leaves attention to the model here ({attention}), and shows its "
            "weights but not its logits"
        )
    for name, value in of("v", kv)[:1]:
        found.hooks["v"] = name
        weighted = torch.einsum("bhqk,bkhd->bqhd", p, value.repeat_interleave(group, 2))
        for place, z in of("z", heads):
            if _close(z, weighted, tolerance):
                found.hooks["z"] = place
    if "z" not in found.hooks:
        found.missing["z"] = (
            "no hook of TransformerLens holds the weighted values (a gate or norm may follow them)"
        )
    target = scores if exact else logits
    assert target is not None
    if softcap is not None:
        # A cap can be undone on logits, not on their differences.
        target = softcap * torch.atanh((target / softcap).clamp(-1 + 1e-6, 1 - 1e-6))
    if exact or softcap is None:
        for (queries, q), (keys, k) in product(of("q", heads), of("k", kv)):
            if _explains(q, k, target, visible, exact, tolerance, group):
                found.hooks.update(q=queries, k=keys)
                return
    for site, word in (("q", "queries"), ("k", "keys")):
        found.missing[site] = (
            f"no hook of TransformerLens ({attention}) holds the {word} that make the logits; they "
            "may be shown only before position encoding"
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


def _centered(x: Tensor, visible: Tensor) -> Tensor:
    counts = visible.sum(-1, keepdim=True).clamp_min(1)
    x = torch.where(visible, x, torch.zeros_like(x))
    return torch.where(visible, x - x.sum(-1, keepdim=True) / counts, torch.zeros_like(x))


def _close(a: Tensor, b: Tensor, tolerance: float, scale: Optional[float] = None) -> bool:
    if a.shape != b.shape:
        return False
    scale = float(b.abs().max()) if scale is None else scale
    return bool((a - b).abs().max() <= tolerance * max(scale, 1e-6))
