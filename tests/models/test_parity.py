"""One model, four ways to run it: transformers itself and all three lanes must agree."""

import copy

import numpy as np
import pytest
import torch

import interp
from interp.core.errors import SiteRefused
from interp.core.site import NAMES
from interp.models.model import Model

TEXT = ("gpt2", "llama", "mistral", "qwen3", "gemma2", "gemma3", "gpt_oss", "gpt_neox", "opt",
        "bert")
IMAGE = ("llava", "qwen2_5_vl")
LANES = ("hf", "bridge", "nnsight")
OTHERS = LANES[1:]
READ = ("resid_pre", "resid_post", "pattern")
TOLERANCE = 1e-4


def same(found, expected, what="", tolerance=TOLERANCE):
    """Equal, relative to the largest value; minus infinity only where it is expected."""
    found, expected = np.asarray(found), np.asarray(expected)
    assert found.shape == expected.shape
    hidden = np.isneginf(expected)
    assert (np.isneginf(found) == hidden).all()
    found, expected = np.where(hidden, 0, found), np.where(hidden, 0, expected)
    gap, size = float(np.abs(found - expected).max()), float(np.abs(expected).max())
    assert gap <= tolerance * size, f"{what} differs by {gap} of {size}"


def check(model, reference, prompts):
    run = model.run(prompts, read=READ)
    for i, prompt in enumerate(prompts):
        expected, n = reference.run(prompt), len(prompt)
        same(run.logits[i], expected["logits"], "logits")
        for site in READ:
            axes = {"query": slice(n), "key": slice(n)} if site == "pattern" else \
                {"position": slice(n)}
            same(run.reads[site].isel(prompt=i, **axes), expected[site], site)


@pytest.mark.parametrize("lane", LANES)
@pytest.mark.parametrize("architecture", TEXT + IMAGE)
def test_text_gives_what_transformers_gives(lanes, plain, text_prompt, architecture, lane):
    # Two of one length share a pass; 17 is far beyond the sliding windows of 5.
    prompts = [text_prompt(0, 11), text_prompt(1, 17), text_prompt(2, 11)]
    check(lanes(architecture)[lane], plain(architecture), prompts)


@pytest.mark.parametrize("lane", LANES)
@pytest.mark.parametrize("architecture", IMAGE)
def test_images_give_what_transformers_gives(lanes, plain, image_prompt, architecture, lane):
    prompts = [image_prompt(architecture, 0), image_prompt(architecture, 5)]
    check(lanes(architecture)[lane], plain(architecture), prompts)


@pytest.mark.parametrize("architecture", IMAGE)
def test_the_picture_matters(plain, image_prompt, architecture):
    """The control of the test above: other pixels, other logits."""
    one, other = image_prompt(architecture, 0), image_prompt(architecture, 0)
    other.inputs["pixel_values"][:] *= -1
    a, b = (plain(architecture).run(p)["logits"] for p in (one, other))
    assert np.abs(a - b).max() > 0.05 * a.std()


@pytest.mark.parametrize("lane", OTHERS)
@pytest.mark.parametrize("architecture", TEXT + IMAGE)
def test_all_lanes_hold_the_same_at_every_site(lanes, text_prompt, architecture, lane):
    hf, other = lanes(architecture)["hf"], lanes(architecture)[lane]
    shared = [name for name in NAMES if name in hf.sites() and name in other.sites()]
    # Whatever TransformerLens cannot show, these are always there; nnsight shows everything.
    assert {"resid_pre", "resid_post", "attn_out", "mlp_in", "mlp_out", "v", "z",
            "pattern"} <= set(shared)
    assert lane != "nnsight" or set(shared) == set(hf.sites())
    prompt = text_prompt(3, 13)
    a, b = (model.run(prompt, read=shared).reads for model in (hf, other))
    for name in shared:
        assert a[name].dims == b[name].dims
        same(b[name], a[name], name)


@pytest.mark.parametrize("architecture", TEXT + IMAGE)
def test_all_lanes_count_the_same_statistics(lanes, text_prompt, architecture):
    prompt = text_prompt(4, 13).with_segments(needle=(2, 6))
    names = ["received", "entropy", "distance", "segments", "row_deficit"]
    a, *others = (lanes(architecture)[lane].run(prompt, stats=names).stats for lane in LANES)
    for b in others:
        for name in names:
            assert a[name].dims == b[name].dims
            # Rows without learned sinks lack nothing: there is no largest value to compare with.
            np.testing.assert_allclose(b[name], a[name], rtol=TOLERANCE, atol=1e-5)


@pytest.mark.parametrize("architecture", ("llama", "gemma2", "gpt_oss"))
def test_key_value_heads_are_counted_once(lanes, text_prompt, architecture):
    """Two key-value heads are read as two, not as the six query heads they serve."""
    for model in lanes(architecture).values():
        reads = model.run(text_prompt(5, 7), read=["q", "k", "v", "z"]).reads
        assert reads["q"].dims == reads["z"].dims == ("prompt", "layer", "position", "head",
                                                      "d_head")
        assert reads["k"].dims == reads["v"].dims == ("prompt", "layer", "position", "kv_head",
                                                      "d_head")
        assert reads["q"].shape == (1, 3, 7, 6, 8) and reads["k"].shape == (1, 3, 7, 2, 8)


@pytest.mark.parametrize("lane", OTHERS)
@pytest.mark.parametrize("architecture", TEXT + IMAGE)
def test_writes_do_the_same_in_all_lanes(lanes, text_prompt, architecture, lane):
    """Every site that both lanes write: the same value, the same logits."""
    hf, other = lanes(architecture)["hf"], lanes(architecture)[lane]
    prompt = text_prompt(6, 9)
    untouched = hf.run(prompt).logits[0]
    rng = np.random.default_rng(7)
    written = [name for name in NAMES if name in hf.sites("write") and name in
               other.sites("write") and name not in ("scores", "pattern")]
    assert {"resid_pre", "resid_post", "attn_out", "mlp_out", "v", "z"} <= set(written)
    reads = hf.run(prompt, read=written).reads
    for name in written:
        site = name if name == "embed" else f"{name}.1"
        held = reads[name].values[0, ...] if name == "embed" else reads[name].values[0, 1]
        value = (np.abs(held).mean() * rng.standard_normal(held.shape[1:])).astype(np.float32)
        edit = interp.edit(site, "add", value, positions=[4, 6])
        a, b = hf.run(prompt, write=edit).logits[0], other.run(prompt, write=edit).logits[0]
        same(b, a, name)
        assert (a - untouched).abs().max() > 1e-3 * untouched.std()


@pytest.mark.parametrize("architecture", ("gpt2", "llama", "gemma2", "gpt_oss", "llava"))
def test_edits_of_attention_do_the_same_in_all_lanes(lanes, text_prompt, architecture):
    prompt = text_prompt(8, 9).with_segments(image=(1, 4))
    rng = np.random.default_rng(9)
    edits = {
        "uniform": interp.ablate(["L1H2", "L2H0"], by="uniform"),
        "zero": interp.ablate([(0, 1), (1, 4)]),
        "scale": interp.scale("L1H3", 2.5),
        "redistribute": interp.redistribute([0], "image", 0.7, layers=[1],
                                            min_nonsink_share=None, min_image_mass=None),
        "scores": interp.edit("scores.1", "add", rng.standard_normal((6, 9, 9)).astype("f4"),
                              positions=[5, 7]),
        "pattern": interp.edit("pattern.1", "multiply", 0.5, positions=[5, 7]),
        "middle": (interp.edit("attn_out.1", "multiply", 0.5, positions=[5]),
                   interp.edit("resid_mid.1", "norm", 3.0, positions=[5, 6])),
    }
    for name, edit in edits.items():
        reads = ["resid_post", "resid_mid", "attn_out", "pattern", "z", "scores"]
        a, *others = (lanes(architecture)[lane].run(prompt, read=reads, write=edit)
                      for lane in LANES)
        for b in others:
            same(b.logits[0], a.logits[0], name)
            for site in reads:
                same(b.reads[site], a.reads[site], f"{site} after {name}")


def test_a_place_that_an_architecture_lacks_is_refused_in_all_lanes(lanes, text_prompt):
    for lane, model in lanes("gpt_neox").items():
        with pytest.raises(SiteRefused, match=f"'resid_mid' on tiny-gpt_neox in lane '{lane}'.*"
                                              "nothing lies between"):
            model.run(text_prompt(0, 5), read="resid_mid")


@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16))
def test_narrow_types_agree_within_their_precision(tiny, text_prompt, dtype):
    model = Model(copy.deepcopy(tiny("llama")).to(dtype), "narrow")
    prompt = text_prompt(10, 9)
    a = model.run(prompt).logits[0]
    for other in map(model.using, OTHERS):
        b = other.run(prompt).logits[0]
        assert (a - b).square().mean().sqrt() < 3e-2 * a.std()
        assert set(other.sites()) == set(model.sites())
