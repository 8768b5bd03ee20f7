"""Every variant in one batch equals a whole pass with its interventions, on every architecture."""

import functools

import numpy as np
import pytest
import torch

import interp
from interp.core.errors import ModelRefused, OutOfRange, SiteRefused
from interp.models.model import Model
from interp.models.variants import Variants

# Learned positions, grouped heads with norms, soft caps and windows, sinks and experts, parallel
# blocks, positions along several axes.
DECODERS = ("gpt2", "qwen3", "gemma2", "gpt_oss", "gpt_neox", "qwen2_5_vl")
N = 13
LAST = N - 1


@pytest.fixture(scope="module")
def opened(tiny):
    """architecture -> the tiny model, a prompt that was run once, and another prompt's states."""
    @functools.cache
    def made(architecture):
        model = Model(tiny(architecture), f"tiny-{architecture}")
        draw = np.random.default_rng(0)
        prompt, other = (interp.Prompt.from_tokens(draw.integers(3, 90, N)) for _ in range(2))
        sites = ["resid_pre", "resid_post", "attn_out", "mlp_out", "q", "k", "v", "z"]
        reads = model.run(other, read=sites).reads
        return model, prompt, Variants(model, prompt), {s: reads[s].values[0] for s in sites}

    return made


def equal_to_whole_passes(model, prompt, variants, writes, atol=3e-5, **more):
    found = variants.outcomes(writes, **more)
    assert found.shape == (len(writes), model.d_vocab)
    for write, row in zip(writes, found):
        expected = model.run(prompt, write=write, logits="last").logits[0][-1]
        size = max(1.0, float(expected.abs().max()))
        assert torch.allclose(row.float(), expected, atol=atol * size, rtol=0), write
    return found


@pytest.mark.parametrize("architecture", DECODERS)
def test_edits_of_heads_in_every_block(opened, architecture):
    model, prompt, variants, states = opened(architecture)
    draw = np.random.default_rng(1)
    mean = draw.normal(size=(model.n_layers, model.n_heads, model.d_head)).astype(np.float32)
    writes = [interp.ablate((layer, head)) for layer in range(model.n_layers) for head in (0, 4)]
    writes += [interp.ablate("L1H2", "mean", value=mean), interp.scale("L0H5", 0.3),
               interp.ablate("L2H1", "resample", value=states["z"]),
               interp.ablate("L1H3", phase="last"), interp.ablate("L1H3", phase="decode"),
               interp.ablate(["L0H1", "L2H3"]), (), [interp.ablate("L2H0", phase="last")],
               interp.edit("z.1", "replace", states["z"][1, 10, 2][None], [10])]
    found = equal_to_whole_passes(model, prompt, variants, writes)
    # The edits do something, and not the same everywhere.
    gaps = (found - variants.plain).float().abs().max(1).values
    none = [i for i, write in enumerate(writes) if write == () or "decode" in str(write)]
    assert (gaps[none] == 0).all() and (np.delete(gaps.numpy(), none) > 1e-3).all()


@pytest.mark.parametrize("architecture", DECODERS)
def test_states_put_in_at_every_site(opened, architecture):
    model, prompt, variants, states = opened(architecture)
    writes = []
    for site in ("resid_pre", "attn_out", "mlp_out", "resid_post", "v", "k", "q"):
        for layer, at in ((0, [3]), (1, [2, 7]), (2, [LAST]), (2, [4])):
            writes.append(interp.patch(f"{site}.{layer}", states[site][layer][at], at))
    if "resid_mid" in model.sites("write"):
        writes.append(interp.patch("resid_mid.1", states["mlp_out"][1][[5]], [5]))
    writes += [interp.edit("mlp_in.1", "multiply", 0.5, [4]), interp.edit("embed", "multiply", 0.5, [1])]
    equal_to_whole_passes(model, prompt, variants, writes, 1e-4 if architecture == "opt" else 3e-5)


@pytest.mark.parametrize("architecture", DECODERS)
def test_edges_cut_in_a_block_a_head_or_a_window(opened, architecture):
    model, prompt, variants, _ = opened(architecture)
    writes = [interp.block("last", [2, 5], layers=[layer]) for layer in range(model.n_layers)]
    writes += [interp.block([6, 8, 9], [3], layers=[1]), interp.block("all", [1], layers=[2]),
               interp.block(range(7, N), [3, 4], layers=[0, 1]), interp.block([LAST], [0], heads="L1H3"),
               interp.block([9], range(2, 9), heads=["L0H1", "L2H1"]), interp.block([4], [9])]
    writes[-5] = interp.block(range(3, N), [1], layers=[2])
    equal_to_whole_passes(model, prompt, variants, writes)


def test_everything_together_whatever_shares_a_pass(opened):
    model, prompt, variants, states = opened("qwen3")
    writes = [[interp.ablate("L0H1"), interp.patch("mlp_out.1", states["mlp_out"][1][[4]], [4]),
               interp.block("last", [3], layers=[2])],
              [interp.patch("resid_pre.1", states["resid_pre"][1][[9]], [9]),
               interp.block([LAST, 5], [2], layers=[2])],
              interp.ablate("L1H5"), interp.patch("resid_pre.2", states["resid_pre"][2][[0]], [0])]
    one = equal_to_whole_passes(model, prompt, variants, writes)
    for rows in (1, 20):
        assert torch.allclose(variants.outcomes(writes, rows=rows), one, atol=1e-5)
    assert torch.allclose(variants.outcomes(writes[::-1]), one.flip(0), atol=1e-5)


def test_a_picture_whose_tokens_see_each_other_in_both_directions(tiny, opened):
    """Where a position feels later ones, rows before the edit are executed too."""
    hf = tiny("llava")
    model = Model(hf, "tiny-llava")
    vision = hf.config.vision_config
    count = (vision.image_size // vision.patch_size) ** 2
    prompt = interp.Prompt.from_tokens(
        [5, 6, *[hf.config.image_token_id] * count, 7, 8, 9], {"image": (2, 2 + count)})
    object.__setattr__(prompt, "inputs", {"pixel_values": np.random.default_rng(0).random(
        (1, 3, vision.image_size, vision.image_size), dtype=np.float32)})
    variants = Variants(model, prompt)
    writes = [interp.ablate("L0H1"), interp.block("last", "image", layers=[1]),
              interp.edit("resid_pre.1", "multiply", 0.0, "image")]
    equal_to_whole_passes(model, prompt, variants, writes)

    model, prompt, variants, states = opened("llama")
    both = Variants(model, prompt)
    seen = torch.ones(N, N, dtype=torch.bool).tril()
    seen[3:7, 3:7] = True
    for mask in both.base._masks:
        mask.plain = None
    both.base._dense = {id(mask): seen for mask in both.base._masks}
    course = both.course(interp.patch("resid_pre.1", states["resid_pre"][1][[5]], [5]))
    assert (course.entry, course.first) == (1, 3)
    assert both.course(interp.patch("resid_pre.1", states["resid_pre"][1][[8]], [8])).first == 8


def test_only_what_differs_is_executed(opened):
    model, prompt, variants, states = opened("llama")
    share = variants.lane_share
    assert 0 < share < 1

    def cost(write):
        before, said = variants.spent, variants.cost(variants.course(write))
        variants.outcomes([write])
        assert variants.spent - before == pytest.approx(said)
        return said

    # Heads of block 0: from the projection on; block 1; keys and one row of block 2.
    assert cost(interp.ablate("L0H1")) == pytest.approx(N * (1 - share) + N + N * share + 1)
    assert cost(interp.ablate("L2H1")) == pytest.approx(1 - share)
    here = interp.patch("resid_pre.1", states["resid_pre"][1][[9]], [9])
    assert cost(here) == pytest.approx(4 + 4 * share + 1)
    assert cost(interp.patch("mlp_out.2", states["mlp_out"][2][[4]], [4])) == 0
    assert cost(interp.block("last", [2], layers=[0])) == pytest.approx(3)

    variants.outcomes([interp.ablate("L1H1")])  # both projections have been found
    calls = []
    handles = [block.module.register_forward_pre_hook(lambda m, args, kw: calls.append(
        (args[0] if args else kw["hidden_states"]).shape[:2]), with_kwargs=True)
        for block in variants.lane.blocks]
    try:
        variants.outcomes([here, interp.ablate("L1H0"), interp.ablate("L1H2"), interp.ablate("L0H2")])
    finally:
        for handle in handles:
            handle.remove()
    # Heads of block 0; heads of block 1; block 1 (patch from 9 on, head of block 0); block 2: keys
    # of these and of the two heads; last rows of all four. (Unembedding passes by with a batch of 4.)
    rows = [row for batch, row in calls if batch == 1]
    assert sorted(rows) == sorted([N, 2 * N, 4 + N, 4 + 3 * N, 4])


def test_nothing_is_left_behind_and_errors_are_sentences(opened, tiny, hooks):
    model, prompt, variants, states = opened("llama")
    hooked = hooks(model.hf)
    before = model.run(prompt).logits[0]
    with pytest.raises(OutOfRange, match="without any key to attend to in layer 1"):
        variants.outcomes([interp.block([4], "all", layers=[1])])
    with pytest.raises(SiteRefused, match="whole passes; use Model.run"):
        variants.outcomes([interp.ablate("L0H1", "uniform")])
    with pytest.raises(OutOfRange, match="head"):
        variants.outcomes([interp.ablate("L0H9")])
    with pytest.raises(ModelRefused, match="is an encoder"):
        Variants(Model(tiny("bert"), "tiny-bert"), prompt)
    assert hooks(model.hf) == hooked
    assert not any("forward" in vars(m) for m in model.hf.modules())
    assert torch.equal(model.run(prompt).logits[0], before)
    # What comes out can be used in a graph: it is no inference tensor.
    found = variants.outcomes([interp.ablate("L0H1")])
    (found * torch.ones(1, requires_grad=True)).sum().backward()
