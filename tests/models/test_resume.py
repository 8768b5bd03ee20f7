"""The identities behind resuming, on every architecture, against whole passes of the model."""

import functools

import numpy as np
import pytest
import torch

import interp
from interp.core.errors import ModelRefused, OutOfRange, SiteRefused
from interp.models.model import Model

DECODERS = ("gpt2", "llama", "mistral", "qwen3", "gemma2", "gemma3", "gpt_oss", "gpt_neox", "opt",
            "llava", "qwen2_5_vl")
N = 13
LAST = N - 1


@pytest.fixture(scope="module")
def opened(tiny):
    """architecture -> the tiny model and a prompt that was run once."""
    @functools.cache
    def made(architecture):
        model = Model(tiny(architecture), f"tiny-{architecture}")
        prompt = interp.Prompt.from_tokens(np.random.default_rng(0).integers(3, 90, N))
        return model, prompt, model.resumable(prompt)

    return made


def every():
    return torch.arange(N)[None]


@pytest.mark.parametrize("architecture", DECODERS)
def test_resuming_all_positions_gives_the_logits_of_the_model(opened, architecture):
    model, prompt, base = opened(architecture)
    whole = model.run(prompt).logits[0]
    assert torch.allclose(base.logits.float(), whole, atol=1e-5)
    for layer in range(model.n_layers):
        found = base.replay(layer, every(), logits="all")[0].float()
        assert torch.allclose(found, whole, atol=2e-5)


@pytest.mark.parametrize("architecture", DECODERS)
def test_dropped_positions_equal_masked_keys(opened, architecture):
    """In one batch, several sets at a time; surviving positions keep their position ids."""
    model, prompt, base = opened(architecture)
    sets, layer = [[3, 4, 7], [1, 8, 9], [5, 6, 10]], 1
    rows = torch.tensor([[p for p in range(N) if p not in out] for out in sets])
    found = base.replay(layer, rows)
    for out, logits in zip(sets, found):
        # The kept positions do not see the dropped ones from this block on.
        kept = [p for p in range(N) if p not in out]
        cut = [interp.block(kept, out, layers=list(range(layer, model.n_layers)))]
        expected = model.run(prompt, write=cut).logits[0][-1]
        assert torch.allclose(logits.float(), expected, atol=5e-5)
        assert not torch.allclose(logits.float(), base.logits[-1].float(), atol=1e-4)


@pytest.mark.parametrize("architecture", DECODERS)
def test_positions_before_the_change_lend_their_keys_and_values(opened, architecture):
    model, prompt, base = opened(architecture)
    rows = torch.tensor([[p for p in range(N) if p not in out] for out in ([5, 6], [7, 9])])
    whole = base.replay(1, rows)
    part = base.replay(1, rows[:, 5:], context=torch.arange(5))
    assert torch.allclose(whole, part, atol=2e-5)
    base.spent = 0
    base.replay(1, rows[:, 5:], context=torch.arange(5))
    assert base.spent == 2 * (N - 2 - 5) * (model.n_layers - 1)


@pytest.mark.parametrize("architecture", DECODERS)
def test_the_last_row_alone_is_run_again_where_only_its_attention_is_cut(opened, architecture):
    model, prompt, base = opened(architecture)
    window = (1, 2)
    sets = [[0, 3], [4, 5], [2, 11]]
    cut = torch.zeros(len(sets), 1, 1, N, dtype=torch.bool)
    for number, keys in enumerate(sets):
        cut[number, 0, 0, keys] = True
    last = torch.full((len(sets), 1), LAST)
    found = base.replay(1, last, context=torch.arange(LAST),
                        blocked=lambda layer: cut if layer in window else None)
    for keys, logits in zip(sets, found):
        expected = model.run(prompt, write=interp.block("last", keys, layers=window)).logits[0][-1]
        assert torch.allclose(logits.float(), expected, atol=2e-5)


def test_heads_are_cut_one_by_one_and_compact_positions_are_another_intervention(opened):
    model, prompt, base = opened("llama")
    cut = torch.zeros(1, model.n_heads, 1, N, dtype=torch.bool)
    cut[0, 2, 0, [1, 4]] = True
    found = base.replay(2, torch.tensor([[LAST]]), context=torch.arange(LAST), blocked=lambda _: cut)
    expected = model.run(prompt, write=interp.block("last", [1, 4], heads=["L2H2"])).logits[0][-1]
    assert torch.allclose(found[0], expected, atol=2e-5)
    rows = torch.tensor([[0, 1, 6, 7, 11, 12]])
    kept = base.replay(0, rows)
    compact = base.replay(0, rows, positions=torch.arange(6)[None])
    short = interp.Prompt.from_tokens([prompt.ids[p] for p in rows[0].tolist()])
    assert torch.allclose(compact[0], model.run(short).logits[0][-1], atol=2e-5)
    assert not torch.allclose(kept, compact, atol=1e-3)


def test_other_states_can_enter(opened):
    model, prompt, base = opened("llama")
    other = model.resumable(interp.Prompt.from_tokens(range(20, 20 + N)))
    found = base.replay(1, every(), hidden=other.hidden[1][None])
    assert torch.allclose(found[0], other.logits[-1], atol=2e-5)


def test_a_picture_s_prompt_can_be_resumed(tiny):
    hf = tiny("llava")
    model = Model(hf, "tiny-llava")
    config = hf.config
    count = (config.vision_config.image_size // config.vision_config.patch_size) ** 2
    side = config.vision_config.image_size
    ids = [5, 6, *[config.image_token_id] * count, 7, 8, 9]
    prompt = interp.Prompt.from_tokens(ids, {"image": (2, 2 + count)})
    object.__setattr__(prompt, "inputs", {
        "pixel_values": np.random.default_rng(0).random((1, 3, side, side), dtype=np.float32)})
    base = model.resumable(prompt)
    whole = model.run(prompt).logits[0]
    assert torch.allclose(base.logits, whole, atol=1e-5)
    text = torch.tensor([[*range(2), *range(2 + count, len(ids))]])
    found = base.replay(1, text)
    cut = interp.block(text[0].tolist(), "image", layers=list(range(1, model.n_layers)))
    assert torch.allclose(found[0], model.run(prompt, write=cut).logits[0][-1], atol=5e-5)


@pytest.mark.parametrize("architecture", DECODERS)
def test_what_resumed_rows_have_at_a_site_is_what_a_whole_pass_reads(opened, architecture):
    """Of every block that is executed, also with edges cut, and once each."""
    model, prompt, base = opened(architecture)
    sites = ["attn_out", "mlp_out", "resid_post", "k", "v", "z"]
    cut = torch.zeros(1, 1, 2, N, dtype=torch.bool)
    cut[..., [2, 5]] = True
    rows, into = torch.tensor([[LAST - 1, LAST]]), {site: [] for site in sites}
    base.replay(1, rows, context=torch.arange(LAST - 1), into=into,
                blocked=lambda layer: cut if layer == 1 else None)
    write = interp.block([LAST - 1, LAST], [2, 5], layers=[1])
    whole = model.run(prompt, read=sites, write=write).reads
    for site in sites:
        assert len(into[site]) == model.n_layers - 1
        for layer, found in zip((1, 2), into[site]):
            expected = whole[site].values[0, layer, -2:]
            assert np.allclose(found[0].float(), expected, atol=3e-5), (site, layer)


def test_the_model_is_as_it_was_also_after_an_error(opened, hooks):
    model, prompt, base = opened("qwen3")
    hooked = hooks(model.hf)
    before = model.run(prompt).logits[0]
    with pytest.raises(OutOfRange, match="layer 9 does not exist"):
        base.replay(9, every())
    with pytest.raises(OutOfRange, match="positions run from 0 to 12"):
        base.replay(1, torch.tensor([[3, 40]]))
    everything = torch.ones(1, 1, 1, N, dtype=torch.bool)
    with pytest.raises(OutOfRange, match="without any key to attend to in layer 1"):
        base.replay(1, torch.tensor([[LAST]]), context=torch.arange(LAST), blocked=lambda _: everything)
    with pytest.raises(SiteRefused, match="cannot read 'spine' in layer 1"):
        base.replay(1, every(), into={"mlp_out": [], "spine": []})
    assert hooks(model.hf) == hooked
    assert torch.equal(model.run(prompt).logits[0], before)
    assert not any("forward" in vars(m) for m in model.hf.modules())


def test_what_cannot_be_resumed_is_refused_by_name(tiny):
    encoder = Model(tiny("bert"), "tiny-bert")
    with pytest.raises(ModelRefused, match="tiny-bert is an encoder"):
        encoder.resumable(interp.Prompt.from_tokens(range(3, 12)))

    # Something is added between two blocks, as DeepStack does.
    hf = tiny("llama")
    model = Model(hf, "stacked")
    block = hf.model.layers[2]
    handle = block.register_forward_pre_hook(
        lambda m, args, kwargs: ((args[0] + 0.1, *args[1:]), kwargs), with_kwargs=True)
    try:
        with pytest.raises(ModelRefused, match="adds something between blocks 1 and 2"):
            model.resumable(interp.Prompt.from_tokens(range(3, 12)))
    finally:
        handle.remove()
