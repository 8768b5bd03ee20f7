"""The five meanings of removing tokens, each against whole passes of the model."""

import copy
import functools

import numpy as np
import pytest
import torch
import transformers as t

import interp
from interp.causal.removal import REMOVALS, Removal, context_mean_states, mean_states
from interp.core import OutOfRange, Prompt, PromptError, SegmentNotFound
from interp.models.model import Model

N, IMAGE = 14, (3, 4, 5, 6, 7)
AFTER = list(range(8, N))
KEPT = [(), (4, 6), IMAGE, (7,)]
SOME = ("llama", "gemma2", "gpt_oss", "gpt2", "opt")


@pytest.fixture(scope="module")
def opened(tiny):
    return functools.cache(lambda architecture: Model(tiny(architecture), f"tiny-{architecture}"))


def prompt(seed=0):
    return Prompt.from_tokens(np.random.default_rng(seed).integers(3, 90, N), {"image": (3, 8)})


def whole(model, given, write):
    return model.run(given, write=write).logits[0][-1]


def close(found, expected):
    return torch.allclose(found, expected, atol=1e-5 * float(expected.abs().max()))


@pytest.mark.parametrize("architecture", SOME)
def test_masking_keys_is_blocking(opened, architecture):
    """From all queries it equals dropping; from some, the others still see everything."""
    model, given, layer = opened(architecture), prompt(), 1
    layers = list(range(layer, model.n_layers))
    for queries, asking in (("all", [*IMAGE, *AFTER]), ("last", [N - 1]), ((5, 9, 12), [5, 9, 12])):
        found = Removal(model, given, "image", "mask_keys", queries=queries).logits(layer, KEPT)
        for kept, logits in zip(KEPT, found):
            gone = [p for p in IMAGE if p not in kept]
            write = [interp.block([q], [k for k in gone if k != q], layers=layers)
                     for q in asking if set(gone) - {q}]
            assert close(logits, whole(model, given, write))
    dropped = Removal(model, given).logits(layer, KEPT)
    assert close(Removal(model, given, how="mask_keys").logits(layer, KEPT), dropped)
    assert not close(found[0], dropped[0])


@pytest.mark.parametrize("architecture", SOME)
def test_replacing_is_patching_what_enters_the_block(opened, architecture):
    model, given, layer = opened(architecture), prompt(), 2
    pool = [prompt(seed) for seed in range(1, 4)]
    mean = mean_states(model, pool)
    own = np.random.default_rng(0).standard_normal((model.n_layers, N, model.d_model))
    cases = {"replace_mean": (mean, lambda p: mean[layer]),
             "replace_cama": (own, lambda p: own[layer, p])}
    for how, (states, value) in cases.items():
        found = Removal(model, given, "image", how, states=states).logits(layer, KEPT, batch_size=3)
        for kept, logits in zip(KEPT, found):
            write = [interp.patch(f"resid_pre.{layer}", value(p), [p]) for p in IMAGE if p not in kept]
            assert close(logits, whole(model, given, write))


def test_keeping_everything_changes_nothing_and_the_order_of_variants_does_not_matter(opened):
    model, given = opened("llama"), prompt()
    plain = whole(model, given, ())
    mean = mean_states(model, [given])
    for how in REMOVALS:
        states = mean if how == "replace_mean" else (
            np.zeros((model.n_layers, N, model.d_model)) if how == "replace_cama" else None)
        removal = Removal(model, given, "image", how, states=states)
        found = removal.logits(1, KEPT)
        assert close(found[2], plain) and not close(found[0], plain)
        turned = removal.logits(1, KEPT[::-1], batch_size=1)
        assert torch.allclose(turned.flip(0), found, atol=2e-5)
        assert removal.manifest["removal"] == how and removal.prefills > 1


def test_context_mean_keeps_the_own_token(opened):
    """The mean over prompts that share the token at the position; NaN where none does."""
    model = opened("llama")
    ids = [list(p.ids) for p in (prompt(0), prompt(1), prompt(2))]
    ids[1][0] = ids[2][0] = ids[0][0]
    ids[1][4] = ids[0][4]
    ids[2][4] = ids[0][4] + 1
    given, *pool = (Prompt.from_tokens(one, {"image": (3, 8)}) for one in ids)
    states = context_mean_states(model, given, pool)
    reads = [model.run(p, read="resid_pre").reads["resid_pre"].values[0] for p in pool]
    assert np.allclose(states[:, 0], np.mean([r[:, 0] for r in reads], 0), atol=1e-5)
    assert np.allclose(states[:, 4], reads[0][:, 4], atol=1e-5)
    shared = [p for p in range(N) if any(ids[0][p] == other[p] for other in ids[1:])]
    assert np.isnan(states).all((0, 2)).nonzero()[0].tolist() == [
        p for p in range(N) if p not in shared]
    with pytest.raises(PromptError, match="no prompt of the pool of 1"):
        context_mean_states(model, given, [Prompt.from_tokens([3, 4])])


def test_where_pictures_are_read_both_ways_the_run_starts_at_the_picture():
    """Gemma 3: image tokens see later image tokens, so removing one changes earlier ones."""
    text = dict(vocab_size=97, hidden_size=48, intermediate_size=56, num_hidden_layers=3,
                num_attention_heads=6, num_key_value_heads=2, head_dim=8, pad_token_id=0,
                max_position_embeddings=64, sliding_window=8, query_pre_attn_scalar=8,
                layer_types=["full_attention", "sliding_attention", "full_attention"])
    torch.manual_seed(0)
    hf = t.Gemma3ForConditionalGeneration(t.Gemma3Config(
        text_config=text, image_token_index=96, boi_token_index=94, eoi_token_index=95,
        mm_tokens_per_image=4, vision_config=dict(
            hidden_size=40, intermediate_size=44, num_hidden_layers=2, num_attention_heads=5,
            image_size=16, patch_size=8))).eval()
    with torch.no_grad():
        for name, weight in hf.named_parameters():
            if weight.ndim > 1 and "language" in name:
                weight.mul_(6.0)
    model = Model(hf, "tiny-gemma3-vl")
    ids = [2, 5, 94, *[96] * 4, 95, 7, 8, 9]
    pixels = np.random.default_rng(0).standard_normal((1, 3, 16, 16)).astype(np.float32)
    kinds = np.array([[int(i == 96) for i in ids]])
    given = Prompt(tuple(ids), (interp.Segment("image", (3, 4, 5, 6), "image"),),
                   inputs={"pixel_values": pixels, "token_type_ids": kinds})
    base = model.resumable(given)
    assert bool(base.visible(0)[3, 6]) and not bool(base.visible(0)[2, 6])
    assert [base.earliest(p) for p in (2, 3, 5, 6, 7)] == [2, 3, 3, 3, 7]
    removal = Removal(model, given, [5])
    assert removal.first == 3
    for layer in range(model.n_layers):
        cut = interp.block([p for p in range(len(ids)) if p != 5], [5],
                           layers=list(range(layer, model.n_layers)))
        expected = whole(model, given, cut)
        assert close(removal.logits(layer, [()])[0], expected)
        # Not so if only what follows the removed token were run again.
        if layer < model.n_layers - 1:
            short = base.replay(layer, torch.tensor([[6, *range(7, len(ids))]]),
                                context=torch.arange(5))
            assert not close(short[0], expected)


def test_replay_stops_goes_on_and_shows_its_attention(opened):
    for architecture in ("llama", "gemma2", "gpt_oss"):
        model, given = opened(architecture), prompt()
        base = model.resumable(given)
        rows = torch.tensor([[*range(3), *AFTER]])
        seen = {}
        middle = base.replay(0, rows, until=2)
        assert base.spent == 2 * rows.numel()
        found = base.replay(2, rows, hidden=middle, watch=seen.__setitem__)
        assert close(found, base.replay(0, rows)) and set(seen) == {2}
        assert torch.equal(base.replay(1, rows, until=1), base.hidden[1][rows])
        whole_rows = torch.arange(N)[None]
        base.replay(0, whole_rows, watch=seen.__setitem__)
        pattern = model.run(given, read="pattern").reads["pattern"].values[0]
        for layer in range(model.n_layers):
            assert np.allclose(seen[layer][0], pattern[layer], atol=1e-5)
        with pytest.raises(OutOfRange, match="stop before block 4 after starting at block 1"):
            base.replay(1, rows, until=4)


def test_bad_input_is_one_sentence(opened):
    model, given = opened("llama"), prompt()
    states = np.zeros((model.n_layers, model.d_model))
    with pytest.raises(SegmentNotFound, match=r"no segment 'image'.*images="):
        Removal(model, Prompt.from_tokens(given.ids))
    with pytest.raises(PromptError, match="cannot remove by 'delete'; choose one of: drop_keep_ids"):
        Removal(model, given, how="delete")
    with pytest.raises(PromptError, match="needs states="):
        Removal(model, given, how="replace_cama")
    with pytest.raises(PromptError, match="takes no states="):
        Removal(model, given, how="mask_keys", states=states)
    with pytest.raises(PromptError, match=r"states of shape \(3, 14, 48\), not \(3, 48\)"):
        Removal(model, given, how="replace_cama", states=states)
    with pytest.raises(PromptError, match="several axes"):
        Removal(opened("qwen2_5_vl"), given, how="drop_compact_ids")
    with pytest.raises(OutOfRange, match="position 9 is to be kept, but is not removable"):
        Removal(model, given).logits(1, [(4, 9)])
    with pytest.raises(OutOfRange, match="layer 3 does not exist"):
        Removal(model, given).logits(3, [()])
    with pytest.raises(PromptError, match="no prompts to average over"):
        mean_states(model, [])
    broken = copy.copy(states[:, None].repeat(N, 1))
    broken[1, 4] = np.nan
    with pytest.raises(PromptError, match="no state for position 4"):
        Removal(model, given, how="replace_cama", states=broken)
