"""A TransformerLens hook is a site only if what it holds satisfies the site's equation."""

import pytest
import torch

from interp.models.bridge_sites import candidates, solve
from interp.models.edits import Shape

SHAPE = Shape(n_layers=1, n_heads=4, n_kv_heads=2, d_model=12, d_head=3)


def recorded(seed=0):
    """What the hooks of a sequential block hold, made from the equations themselves."""
    g = torch.Generator().manual_seed(seed)
    q, k, v = (torch.randn(1, 6, n, 3, generator=g) for n in (4, 2, 2))
    before, attn, mlp, normed = (torch.randn(1, 6, 12, generator=g) for _ in range(4))
    scores = torch.einsum("bqhd,bkhd->bhqk", q, k.repeat_interleave(2, 2)) * 3**-0.5
    scores = scores.masked_fill(torch.ones(6, 6).triu(1).bool(), -3e38)
    p = scores.softmax(-1)
    z = torch.einsum("bhqk,bkhd->bqhd", p, v.repeat_interleave(2, 2))
    held = {
        "hook_in": before, "hook_attn_out": attn, "hook_resid_mid": before + attn,
        "mlp.hook_in": normed, "hook_mlp_out": mlp, "hook_out": before + attn + mlp,
        "attn.q.hook_out": q, "attn.k.hook_out": k, "attn.v.hook_out": v, "attn.o.hook_in": z,
        "attn.hook_attn_scores": scores, "attn.hook_pattern": p,
    }
    assert set(held) <= set(candidates())
    return {name: [value] for name, value in held.items()}


def found(held, softcap=None):
    return solve(held, SHAPE, softcap, 1e-3, "SomeBridge")


def test_all_sites_of_a_block_that_keeps_its_equations():
    one = found(recorded())
    assert one.kind == "sequential" and not one.missing
    assert one.hooks["resid_mid"] == "hook_resid_mid" and one.hooks["q"] == "attn.q.hook_out"


@pytest.mark.parametrize("hook, missing", [
    ("attn.hook_attn_scores", {"scores"}),
    ("attn.o.hook_in", {"z"}),
    ("attn.q.hook_out", {"q", "k"}),
    ("attn.k.hook_out", {"q", "k"}),
    ("hook_resid_mid", {"resid_mid"}),
    ("hook_attn_out", {"attn_out", "mlp_out", "resid_mid"}),
])
def test_a_hook_that_holds_something_else_is_not_the_site(hook, missing):
    held = recorded()
    held[hook] = [held[hook][0] + torch.randn(held[hook][0].shape) * 0.1]
    assert set(found(held).missing) == missing


@pytest.mark.parametrize("change, missing", [
    (lambda held: held.update({"attn.hook_attn_scores": held["attn.hook_pattern"]}), {"scores"}),
    (lambda held: held["hook_mlp_out"].append(held["hook_mlp_out"][0]),
     {"attn_out", "mlp_out", "resid_mid"}),
    (lambda held: held.pop("mlp.hook_in"), {"mlp_in"}),
    (lambda held: held.pop("attn.hook_pattern"), {"pattern", "scores", "q", "k", "v", "z"}),
])
def test_weights_in_place_of_logits_and_hooks_that_fire_twice(change, missing):
    held = recorded()
    change(held)
    assert set(found(held).missing) == missing


def test_soft_capped_logits_are_recognized():
    held = recorded()
    raw = held["attn.hook_attn_scores"][0]
    capped = torch.where(raw < -1e30, raw, 2.0 * torch.tanh(raw / 2.0))
    p = capped.softmax(-1)
    held["attn.hook_attn_scores"], held["attn.hook_pattern"] = [capped], [p]
    wide = held["attn.v.hook_out"][0].repeat_interleave(2, 2)
    held["attn.o.hook_in"] = [torch.einsum("bhqk,bkhd->bqhd", p, wide)]
    assert set(found(held, softcap=2.0).missing) == set()
    assert set(found(held).missing) == {"q", "k"}
