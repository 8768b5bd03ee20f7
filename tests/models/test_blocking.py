"""Blocking an edge moves only what it may move; and a cache changes nothing, blocked or not."""

import numpy as np
import pytest
import torch
from transformers import GenerationConfig

import interp
from interp.core.errors import SiteRefused

DECODERS = ("gpt2", "llama", "mistral", "qwen3", "gemma2", "gemma3", "gpt_oss", "gpt_neox", "opt",
            "llava", "qwen2_5_vl")
REFUSED = {("opt", "bridge"), ("qwen2_5_vl", "bridge"), ("bert", "bridge")}
"""Where TransformerLens hands attention to the model and cannot change it."""
CASES = [(a, lane) for a in (*DECODERS, "bert") for lane in ("hf", "bridge", "nnsight")
         if (a, lane) not in REFUSED]
QUERY, KEY, LAYER, HEADS = 7, 5, 1, (1, 4)
"""The blocked edge: within the sliding windows of 5, in two heads of different groups."""
SITES = ["resid_pre", "resid_post", "pattern", "z"]


def block(**more):
    return interp.block([QUERY], [KEY], heads=[(LAYER, head) for head in HEADS], **more)


def gap(a, b, axis):
    """Largest difference along all axes but one."""
    return np.abs(a - b).max(tuple(i for i in range(a.ndim) if i != axis))


@pytest.mark.parametrize("architecture, lane", CASES)
def test_a_blocked_edge_moves_only_what_it_may(lanes, text_prompt, architecture, lane):
    model, prompt = lanes(architecture)[lane], text_prompt(0, 11)
    a, b = (model.run(prompt, read=SITES, write=w) for w in ((), block()))
    free, cut = ({s: run.reads[s].values[0] for s in SITES} for run in (a, b))
    scale = np.abs(free["resid_post"]).max()

    # Nothing before the block, and in the block only the query's own position.
    assert gap(free["resid_post"], cut["resid_post"], 0)[:LAYER].max(initial=0) == 0
    moved = gap(free["resid_post"][LAYER], cut["resid_post"][LAYER], 0)
    assert moved[QUERY] > 1e-3 * scale
    assert np.delete(moved, QUERY).max() <= 1e-6 * scale
    if model.kind == "decoder":
        later = gap(free["resid_post"], cut["resid_post"], 1)
        assert later[:QUERY].max() <= 1e-6 * scale
        assert (a.logits[0] - b.logits[0]).abs().max(-1).values[:QUERY].max() <= 1e-5

    # In the block only the blocked heads, in the blocked row.
    p, q = free["pattern"][LAYER], cut["pattern"][LAYER]
    others = [head for head in range(6) if head not in HEADS]
    assert p[HEADS, QUERY, KEY].min() > 1e-4, "the edge carries nothing: choose another"
    assert (q[HEADS, QUERY, KEY] == 0).all()
    assert gap(p[others], q[others], 0).max() <= 1e-6
    assert np.delete(gap(p, q, 1), QUERY).max() <= 1e-6
    z = np.abs(free["z"][LAYER] - cut["z"][LAYER]).max(-1)
    assert z[QUERY, HEADS].min() > 1e-4 and np.delete(z, QUERY, 0).max() <= 1e-5
    assert z[:, others].max() <= 1e-5

    # The rest of the row is what a softmax without that logit makes of it.
    sums = q.sum(-1)
    if model.sink_kind == "learned":
        assert (sums < 1 - 1e-3).any() and sums.max() <= 1 + 1e-6
    else:
        np.testing.assert_allclose(sums, 1, atol=1e-5)
        share = p[HEADS, QUERY].copy()
        share[:, KEY] = 0
        np.testing.assert_allclose(q[HEADS, QUERY], share / share.sum(-1, keepdims=True),
                                   atol=1e-5)


@pytest.mark.parametrize("architecture, lane", CASES)
def test_blocking_equals_a_mask_given_to_transformers(lanes, plain, text_prompt, architecture,
                                                      lane):
    """The independent reference: the plain model, with the edge hidden by an additive mask."""
    model, prompt, reference = lanes(architecture)[lane], text_prompt(1, 11), plain(architecture)
    reference.cut = {LAYER: [(list(HEADS), [QUERY], [KEY])],
                     2: [(list(range(6)), [6, 9, 10], [4, 5])]}
    try:
        expected = reference.run(prompt)
    finally:
        reference.cut = {}
    write = [block(), interp.block([6, 9, 10], slice(4, 6), layers=2)]
    run = model.run(prompt, read=["resid_pre", "resid_post", "pattern"], write=write)
    for site in ("resid_pre", "resid_post", "pattern"):
        size = np.abs(expected[site]).max()
        np.testing.assert_allclose(run.reads[site].values[0], expected[site], atol=1e-4 * size)
    size = np.abs(expected["logits"]).max()
    np.testing.assert_allclose(run.logits[0], expected["logits"], atol=1e-4 * size)
    assert np.abs(reference.run(prompt)["logits"] - expected["logits"]).max() > 1e-3 * size


@pytest.mark.parametrize("architecture, lane", sorted(REFUSED))
def test_a_lane_that_cannot_block_says_so(lanes, text_prompt, architecture, lane):
    with pytest.raises(SiteRefused) as refused:
        lanes(architecture)[lane].run(text_prompt(0, 11), write=block())
    for word in ("'scores'", f"tiny-{architecture}", f"lane '{lane}'", "lane 'hf'"):
        assert word in str(refused.value)


@pytest.mark.parametrize("lane", ("hf", "bridge", "nnsight"))
@pytest.mark.parametrize("architecture", ("llama", "mistral", "gpt_oss"))
def test_blocking_every_key_of_a_query_is_refused(lanes, text_prompt, architecture, lane):
    with pytest.raises(SiteRefused, match=r"position 3 \(head 0\) without any key"):
        lanes(architecture)[lane].run(text_prompt(0, 11), write=interp.block([3], "all"))


@pytest.mark.parametrize("lane", ("hf", "bridge", "nnsight"))
def test_prompts_of_one_batch_are_blocked_each_in_its_own_places(lanes, text_prompt, lane):
    model = lanes("gemma2")[lane]
    prompts = [text_prompt(2, 11).with_segments(needle=(2, 4)),
               text_prompt(3, 11).with_segments(needle=(5, 7))]
    write = interp.block("last", "needle", layers=[1, 2])
    together = model.run(prompts, read="pattern", write=write)
    for i, prompt in enumerate(prompts):
        alone = model.run(prompt, read="pattern", write=write)
        np.testing.assert_allclose(together.reads["pattern"].values[i],
                                   alone.reads["pattern"].values[0], atol=1e-6)
        row = together.reads["pattern"].values[i, 1:, :, -1]
        assert row[..., list(prompt.positions("needle"))].max() == 0
    assert together.reads["pattern"].values[0, 1, :, -1, 6].max() > 0


# -- decoding --------------------------------------------------------------------------------

NEW = 6
"""Steps: prompt and steps together go far beyond the sliding windows of 5."""


def generated(hf, prompt):
    """What transformers itself generates greedily."""
    inputs = {k: torch.as_tensor(v) for k, v in prompt.inputs.items()}
    # No token ends it.
    config = GenerationConfig(do_sample=False, max_new_tokens=NEW, eos_token_id=-1, pad_token_id=0)
    out = hf.generate(input_ids=torch.tensor([prompt.ids]), generation_config=config, **inputs)
    return out[0, len(prompt) :].tolist()


@pytest.mark.parametrize("lane", ("hf", "bridge", "nnsight"))
@pytest.mark.parametrize("architecture", DECODERS)
def test_greedy_tokens_are_those_of_transformers(lanes, text_prompt, architecture, lane):
    model = lanes(architecture)[lane]
    prompts = [text_prompt(4, 11), text_prompt(5, 8), text_prompt(6, 11)]
    run = model.run(prompts, new_tokens=NEW)
    hf = lanes(architecture)["hf"].hf
    assert run.new_tokens == [generated(hf, prompt) for prompt in prompts]


@pytest.mark.parametrize("lane", ("hf", "bridge", "nnsight"))
@pytest.mark.parametrize("architecture", ("llava", "qwen2_5_vl"))
def test_greedy_tokens_after_a_picture(lanes, image_prompt, text_prompt, architecture, lane):
    """Also that a picture leaves nothing behind for the text that is run after it."""
    model, hf = lanes(architecture)[lane], lanes(architecture)["hf"].hf
    before, picture = text_prompt(7, 9), image_prompt(architecture, 3)
    expected = [generated(hf, before), generated(hf, picture)]
    for prompt, tokens in zip((before, picture, before), (*expected, expected[0])):
        assert model.run(prompt, new_tokens=NEW).new_tokens == [tokens]


READ = ["resid_post", "pattern", "scores", "q", "k", "v", "z", "mlp_out"]
STATS = ["received", "entropy", "distance", "row_deficit"]
EDITS = {
    "nothing": ((), ()),
    "block": (interp.block("all", [2, 3]),) * 2,
    "heads": ((interp.ablate("L1H2"), interp.scale("L2H3", 0.5)),) * 2,
    "uniform": (interp.ablate(["L1H2", "L0H1"], by="uniform"),) * 2,
    "stream": (interp.edit("resid_post.1", "multiply", 0.7),) * 2,
    "cached": ((interp.edit("v.1", "multiply", 0.0, positions=[4]),
                interp.edit("k.2", "multiply", 2.0, positions=[8])),) * 2,
}
"""Edits while generating, and the same edits of the whole sequence in one pass."""
STEPS = list(range(11, 11 + NEW))


def times(factor, positions):
    """Head 1 of layer 1 scaled at these positions."""
    by_head = np.where(np.arange(6) == 1, factor, 1.0)[:, None].astype(np.float32)
    return interp.edit("z.1", "multiply", by_head, positions=positions)


PHASES = {
    "decode": (interp.block("all", [2, 9], phase="decode"), interp.block(STEPS, [2, 9])),
    "prefill": (interp.block("all", [2, 9], phase="prefill"),
                interp.block(list(range(11)), [2, 9])),
    "last": (interp.ablate("L1H1", phase="last"), times(0.0, [10, *STEPS])),
    "scaled": (interp.scale("L1H1", 3.0, phase="decode"), times(3.0, STEPS)),
}


def compare(model, prompt, while_generating, at_once):
    """A run with a cache against one pass over prompt and generated tokens."""
    sites = [site for site in READ if site in model.sites()]
    steps = model.run(prompt, read=sites, write=while_generating, stats=STATS, new_tokens=NEW)
    whole = interp.Prompt.from_tokens([*prompt.ids, *steps.new_tokens[0]])
    once = model.run(whole, read=sites, write=at_once, stats=STATS)
    greedy = once.logits[0][len(prompt) - 1 : -1].argmax(-1).tolist()
    assert steps.new_tokens[0] == greedy
    size = float(once.logits[0].abs().max())
    np.testing.assert_allclose(steps.logits[0], once.logits[0], atol=1e-4 * size)
    for site in sites:
        expected, found = once.reads[site].values, steps.reads[site].values
        assert (np.isneginf(found) == np.isneginf(expected)).all(), site
        expected, found = (np.nan_to_num(x, neginf=0) for x in (expected, found))
        np.testing.assert_allclose(found, expected, atol=1e-4 * np.abs(expected).max(),
                                   err_msg=site)
    for name in STATS:
        np.testing.assert_allclose(steps.stats[name], once.stats[name], rtol=1e-4, atol=1e-4,
                                   err_msg=name)
    return once.logits[0]


@pytest.mark.parametrize("lane", ("hf", "bridge", "nnsight"))
@pytest.mark.parametrize("architecture", DECODERS)
def test_a_cache_changes_nothing(lanes, text_prompt, architecture, lane):
    model, prompt = lanes(architecture)[lane], text_prompt(8, 11)
    for name, (steps, once) in EDITS.items():
        asked = {"block": "scores", "uniform": "pattern"}.get(name)
        if name == "cached" and not {"v", "k"} <= set(model.sites("write")):
            continue
        if asked is None or asked in model.sites("write"):
            compare(model, prompt, steps, once)


@pytest.mark.parametrize("lane", ("hf", "bridge", "nnsight"))
@pytest.mark.parametrize("architecture", ("llama", "gemma2", "gpt_oss"))
def test_phases_act_in_their_own_passes(lanes, text_prompt, architecture, lane):
    model, prompt = lanes(architecture)[lane], text_prompt(9, 11)
    untouched = model.run(prompt, new_tokens=NEW).logits[0]
    for steps, once in PHASES.values():
        assert not torch.allclose(compare(model, prompt, steps, once), untouched, atol=1e-3)
