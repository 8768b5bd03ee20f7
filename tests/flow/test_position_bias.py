"""Orders of documents, the attention basin, and channels that carry position."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from interp.core import ModelRefused, Prompt, PromptError
from interp.flow import attention_basin, position_bias, positional_channel
from interp.models.model import Model
from interp.organisms import reader
from interp.organisms.twins import positions_off
from interp.prompts.documents import Documents, synthetic


@pytest.fixture(scope="module")
def model():
    return Model(reader.build(0, layers=3), "untrained", reader.tokenizer())


@pytest.fixture(scope="module")
def asked():
    return synthetic(reader, np.random.default_rng(0), range(4), count=4, words=9)


# -- orders ---------------------------------------------------------------------------------------


def test_a_prompt_in_another_order_has_the_same_documents(asked):
    for one in asked:
        for order in ((3, 1, 0, 2), (1, 2, 3, 0), (0, 1, 2, 3)):
            turned = position_bias.reorder(one, order)
            assert sorted(turned.ids) == sorted(one.prompt.ids)
            for slot, number in enumerate(order):
                new = [turned.ids[p] for p in turned.positions(f"document_{slot}")]
                assert new == [one.prompt.ids[p] for p in one.document(number)]
            for name in ("gold", "gold_value", "question"):
                new = [turned.ids[p] for p in turned.positions(name)]
                assert new == [one.prompt.ids[p] for p in one.prompt.positions(name)]
            assert turned.positions("gold") == turned.positions(f"document_{order.index(one.place)}")
        back = position_bias.reorder(one, (0, 1, 2, 3))
        assert back.ids == one.prompt.ids


def test_orders_are_all_or_cyclic():
    assert len(set(position_bias.orders(4))) == 24
    assert position_bias.orders(6)[2] == (2, 3, 4, 5, 0, 1)
    few = position_bias.orders(30, most=5, seed=1)
    assert len(set(few)) == 5 and few[0] == tuple(range(30))


def uneven(rng):
    """Documents of different lengths with a token between them that belongs to none."""
    lengths, ids, segments = (3, 6, 4), [0], {}
    for number, length in enumerate(lengths):
        segments[f"document_{number}"] = (len(ids), len(ids) + length)
        ids += [*rng.integers(20, 90, length).tolist(), 9]
    segments["question"] = (len(ids), len(ids) + 2)
    ids += rng.integers(20, 90, 2).tolist()
    segments["gold"] = segments["document_1"]
    prompt = Prompt.from_tokens(ids, segments)
    return Documents(prompt, prompt, prompt, (ids[5],), 1, 3)


@pytest.mark.parametrize("architecture", ["llama", "gemma3", "gpt_oss"])
def test_order_free_reading_is_exactly_that(tiny, architecture):
    """PINE's exactness property; plain reading of the same prompts depends on the order."""
    one = uneven(np.random.default_rng(0))
    model = Model(tiny(architecture), architecture)
    # Sliding windows would hide far documents from the question, whatever the ids say.
    reach = getattr(model.config, "sliding_window", None)
    orders = position_bias.orders(3)
    plain = [model.run(position_bias.reorder(one, o)).logits[0][-1] for o in orders]
    assert max(float((row - plain[0]).abs().max()) for row in plain) > 1e-2
    free = [position_bias.order_free_logits(model, position_bias.reorder(one, o), 3)
            for o in orders]
    gap = max(float((row - free[0]).abs().max()) for row in free)
    assert gap < 1e-4 if reach is None else gap > 1e-3


def test_one_document_alone_is_read_as_it_is(tiny):
    model = Model(tiny("llama"), "llama")
    prompt = Prompt.from_tokens(range(3, 20), {"document_0": (2, 11)})
    found = position_bias.order_free_logits(model, prompt, 1)
    assert torch.allclose(found, model.run(prompt).logits[0][-1], atol=1e-4)


def test_positions_in_the_embeddings_are_refused(tiny):
    with pytest.raises(ModelRefused, match="adds positions to its embeddings"):
        position_bias.order_free_logits(
            Model(tiny("gpt2"), "gpt2"), uneven(np.random.default_rng(0)).prompt, 3)


def test_the_variance_is_that_over_orders(model, asked):
    found = position_bias.measure(model, asked[:2], most=4)
    free = position_bias.measure(model, asked[:2], most=4, order_free=True)
    assert np.allclose(found["variance"], found["p"].values.var(1))
    assert (found["variance"] > 1e-14).all()
    assert (free["variance"] < 1e-6 * found["variance"]).all()
    one = model.run(asked[1].prompt).logits[0][-1].softmax(-1)[asked[1].answer[0]]
    assert float(found["p"][1, 0]) == pytest.approx(float(one), rel=1e-4)
    assert found["slot"].values[1].tolist() == [1, 0, 3, 2]


def test_bad_orders_are_refused(asked):
    with pytest.raises(PromptError, match="no order of 4"):
        position_bias.reorder(asked[0], (0, 1, 2, 2))
    with pytest.raises(PromptError, match="equally many"):
        position_bias.measure(object.__new__(Model), [])


# -- the basin ------------------------------------------------------------------------------------


@settings(max_examples=20, deadline=None)
@given(st.integers(3, 9), st.integers(0, 99))
def test_the_basin_index_by_its_definition(slots, seed):
    p = np.random.default_rng(seed).random((2, slots))
    for row, found in zip(p, attention_basin.basin_index(p)):
        assert found == pytest.approx((row[0] + row[-1]) / 2 - min(row[1:-1]), abs=1e-9)


def test_a_planted_basin_is_found_and_noise_is_not():
    rng = np.random.default_rng(0)
    noise = rng.random((40, 6))
    null = attention_basin.permuted(noise)
    index = float(attention_basin.basin_index(noise.mean(0)))
    assert index < np.quantile(null, 0.99)
    deep = noise + 0.4 * np.array([1, 0, 0, 0, 0, 1])
    assert float(attention_basin.basin_index(deep.mean(0))) > attention_basin.permuted(deep).max()


def test_the_best_item_goes_where_attention_is_highest():
    relevance, profile = np.array([0.2, 0.9, 0.5, 0.1]), np.array([0.3, 0.1, 0.2, 0.4])
    order = attention_basin.arrange(relevance, profile)
    assert order == (2, 3, 0, 1)
    assert np.argsort(-relevance[list(order)]).tolist() == np.argsort(-profile).tolist()


def test_the_profile_is_the_attention_of_the_question(model, asked):
    found = attention_basin.measure(model, asked)
    for number, one in enumerate(asked):
        pattern = model.run(one.prompt, read="pattern").reads["pattern"].values[0]
        for slot in range(4):
            part = pattern[:, :, list(one.after())][..., list(one.document(slot))].sum(-1)
            assert np.allclose(found["mass"][number, :, slot], part.mean((1, 2)), atol=1e-5)
    assert np.allclose(found["per_token"] * 9, found["mass"])
    left = attention_basin.without_gold(found)
    assert int(left.isnull().sum()) == 4 * 3 and bool(left[2, 0].isnull()[2])
    assert [int(attention_basin.overlap(one).argmax()) for one in asked] == [0, 1, 2, 3]


# -- channels -------------------------------------------------------------------------------------


def test_a_planted_channel_is_found_and_chosen():
    rng = np.random.default_rng(0)
    mean = rng.normal(size=(4, 30, 11))
    assert (positional_channel.monotonicity(mean) < 0.75).all()
    mean[:, :, 7] = -np.sqrt(np.arange(30)) + 0.001 * rng.normal(size=(4, 30))
    rho, smooth = positional_channel.monotonicity(mean), positional_channel.smoothness(mean)
    assert (rho[:, 7] > 0.99).all() and (smooth[:, 7] > 0.5).all()
    assert (np.delete(smooth, 7, 1) < 0).all()
    flipped = positional_channel.monotonicity(mean[:, ::-1].copy())
    assert np.allclose(rho, flipped)


def scaled_by_hand(hf, ids, channel, factor, layers):
    """A Llama block by block: queries and keys of the last row from other states than its values."""
    from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

    with torch.no_grad():
        states = list(hf(torch.tensor([ids]), output_hidden_states=True).hidden_states)
        n, x = len(ids), states[0][0, -1]
        cos, sin = hf.model.rotary_emb(states[0], torch.arange(n)[None])
        for layer, block in enumerate(hf.model.layers):
            full = states[layer][0].clone()
            full[-1] = x
            plain, other = block.input_layernorm(full), full.clone()
            if layer in layers:
                other[:, channel] *= factor
            other = block.input_layernorm(other)
            a = block.self_attn

            def split(y, a=a):
                return y.reshape(n, -1, a.head_dim).transpose(0, 1)[None]

            q, k = apply_rotary_pos_emb(split(a.q_proj(other)), split(a.k_proj(other)), cos, sin)
            v = split(a.v_proj(plain))
            groups = q.shape[1] // k.shape[1]
            k, v = k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1)
            p = (q[:, :, -1:] @ k.transpose(2, 3) * a.scaling).softmax(-1)
            x = x + a.o_proj((p @ v)[0, :, 0].reshape(-1))
            x = x + block.mlp(block.post_attention_layernorm(x))
        return hf.lm_head(hf.model.norm(x))


def test_a_channel_is_scaled_where_the_last_token_attends_and_nowhere_else(tiny):
    hf = tiny("llama")
    model, ids = Model(hf, "llama"), [1, 5, 9, 33, 8, 70, 4]
    base = model.resumable(Prompt.from_tokens(ids))
    for channel, factor, layers in ((3, -2.0, (0, 1, 2)), (40, 6.0, (1,)), (3, 0.0, (2,))):
        found = positional_channel.scaled_logits(base, channel, factor, layers)
        expected = scaled_by_hand(hf, ids, channel, factor, layers)
        assert torch.allclose(found, expected, atol=2e-4)
        assert float((found - base.logits[-1]).abs().max()) > 1e-3
    again = model.run(Prompt.from_tokens(ids)).logits[0]
    assert torch.allclose(again, base.logits, atol=1e-5)


@pytest.mark.parametrize("architecture", ["gpt2", "gemma2", "gpt_oss", "qwen3"])
def test_scaling_by_one_changes_nothing(tiny, architecture):
    model = Model(tiny(architecture), architecture)
    base = model.resumable(Prompt.from_tokens(range(3, 15)))
    assert torch.allclose(positional_channel.scaled_logits(base, 5, 1.0), base.logits[-1],
                          atol=1e-3)
    assert not torch.allclose(positional_channel.scaled_logits(base, 5, -9.0), base.logits[-1],
                              atol=1e-3)


def test_every_cell_of_the_scaling_is_one_replay(tiny):
    model = Model(tiny("llama"), "llama")
    prompts = [Prompt.from_tokens([1, 4, 9, i]) for i in (20, 30)]
    found = positional_channel.scaling(model, prompts, [7, 8], [2, 5], [0.5, 1.0, 3.0])
    base = model.resumable(prompts[1])
    row = positional_channel.scaled_logits(base, 5, 3.0).log_softmax(-1)
    assert float(found["log_p"].sel(channel=5, factor=3.0)[1]) == pytest.approx(float(row[8]))
    assert np.allclose(found["log_p"].sel(factor=1.0), found["base"].values[:, None], atol=1e-4)
    with pytest.raises(IndexError, match="channels run from 0 to 47"):
        positional_channel.scaled_logits(base, 48, 1.0)


def test_positions_come_back_when_they_were_off(tiny):
    hf = tiny("gemma3")
    model, prompt = Model(hf, "gemma3"), Prompt.from_tokens([1, 5, 9, 33])
    before = model.run(prompt).logits[0]
    with positions_off(hf):
        assert not torch.allclose(model.run(prompt).logits[0], before, atol=1e-3)
    assert torch.equal(model.run(prompt).logits[0], before)
