"""Bigram-Backcopy: the data obey the rule, the oracle is exact, the bundled models learned it."""

import json

import numpy as np
import pytest
import torch

from interp.organisms import backcopy, registry, train

K = len(backcopy.TRIGGERS)


def drawn(seed: int, batch: int = 5, length: int = 40, **options) -> np.ndarray:
    return backcopy.sample(np.random.default_rng(seed), batch, length, **options)[0]


def test_the_chain_has_the_numbers_it_was_fitted_to():
    chain, found = backcopy.chain(), backcopy.oracle(256)
    np.testing.assert_allclose(chain.bigram.sum(1), 1)
    np.testing.assert_allclose(chain.unigram @ chain.bigram, chain.unigram, atol=1e-12)
    assert chain.unigram[:K].round(3).tolist() == [0.152, 0.085, 0.060]
    assert found["bigram"] == pytest.approx(2.23, abs=1e-6)
    assert found["trigger_share"] == pytest.approx(0.256, abs=1e-6)
    assert len(set(backcopy.SYMBOLS)) == 65


@pytest.mark.parametrize("bos", [True, False])
def test_what_follows_a_trigger_is_what_came_before_it(bos):
    tokens, trigger = backcopy.sample(np.random.default_rng(0), 7, 60, bos=bos)
    assert (tokens[:, 0] == backcopy.BOS).all() == bos
    assert (trigger == (tokens < K)).all() and not trigger[:, : 1 + bos].any()
    assert not (trigger[:, 1:] & trigger[:, :-1]).any()
    row, place = np.nonzero(trigger[:, :-1])
    assert len(row) > 50
    assert (tokens[row, place + 1] == tokens[row, place - 1]).all()
    # Control: elsewhere the symbol before comes again only by chance.
    row, place = np.nonzero(~trigger[:, 2:-1])
    assert (tokens[row, place + 3] == tokens[row, place + 1]).mean() < 0.5


def test_other_symbols_follow_the_chain():
    tokens = drawn(1, batch=400, length=200)[:, 1:]
    counts = np.zeros((65, 65))
    np.add.at(counts, (tokens[:, :-1].ravel(), tokens[:, 1:].ravel()), 1)
    seen = counts.sum(1)
    for symbol in np.argsort(-seen[K:])[:12] + K:
        expected = backcopy.chain().bigram[symbol]
        error = np.abs(counts[symbol] / seen[symbol] - expected)
        assert (error < 5 * np.sqrt(expected / seen[symbol]) + 1e-3).all()
        other = backcopy.chain().bigram[(symbol - K + 7) % 62 + K]  # control: another symbol's row
        error = np.abs(counts[symbol] / seen[symbol] - other)
        assert not (error < 5 * np.sqrt(other / seen[symbol]) + 1e-3).all()


@pytest.mark.parametrize(("length", "bos"), [(30, True), (30, False), (90, True)])
def test_the_exact_oracle_agrees_with_sampling(length, bos):
    tokens = torch.as_tensor(drawn(2, batch=1500, length=length, bos=bos))
    found = backcopy.risks(torch.zeros(1500, length, backcopy.VOCABULARY), tokens)
    exact = backcopy.oracle(length, bos=bos)
    assert found["bigram_oracle"] == pytest.approx(exact["bigram"], abs=0.02)
    symbols = tokens[:, int(bos) :]
    assert float((symbols < K).double().mean()) == pytest.approx(exact["trigger_share"], abs=5e-3)


def perfect(tokens: torch.Tensor, copies: bool = True) -> torch.Tensor:
    """Log-probabilities of who knows the chain, and with `copies` the rule too."""
    chain = backcopy.chain()
    table = np.zeros((backcopy.VOCABULARY, backcopy.VOCABULARY))
    table[: backcopy.BOS, : backcopy.BOS], table[backcopy.BOS, : backcopy.BOS] = (
        chain.bigram,
        chain.first,
    )
    goal = torch.as_tensor(table)[tokens]
    if copies:
        onehot = torch.nn.functional.one_hot(tokens.roll(1, 1), backcopy.VOCABULARY).double()
        goal = torch.where((tokens < K)[..., None], onehot, goal)
    return goal.clamp_min(1e-12).log()


def test_risks_are_least_for_the_oracle_and_tell_the_two_skills_apart():
    tokens = torch.as_tensor(drawn(3))
    best = backcopy.risks(perfect(tokens), tokens)
    assert best["copy"] < 1e-6 and abs(best["bigram_excess"]) < 1e-6 and best["copy_accuracy"] == 1
    no_copy = backcopy.risks(perfect(tokens, copies=False), tokens)
    assert no_copy["copy"] > 1 and abs(no_copy["bigram_excess"]) < 1e-6
    chance = backcopy.risks(torch.zeros(5, 40, backcopy.VOCABULARY), tokens)
    expected = backcopy.oracle()["chance"]
    assert chance["copy"] == pytest.approx(expected) == chance["bigram"]


def test_the_architecture_is_the_papers():
    model = backcopy.build(0, layers=3)
    config = model.config
    assert (config.hidden_size, config.num_attention_heads, config.ffn_dim) == (256, 1, 1024)
    assert config.max_position_embeddings == 256 and config.activation_function == "relu"
    linear = [m for m in model.modules() if isinstance(m, torch.nn.Linear)]
    assert all(m.bias is None for m in linear) and len(linear) == 3 * 6 + 1
    embedding = model.get_input_embeddings()
    assert model.lm_head.weight.data_ptr() != embedding.weight.data_ptr()
    # OPT's padding id would silently freeze one symbol's embedding.
    model(input_ids=torch.arange(66)[None]).logits.square().sum().backward()
    assert (embedding.weight.grad.norm(dim=1) > 0).all()


def test_relu_attention_divides_by_the_row_and_sees_no_future():
    model = backcopy.build(0, layers=2, d_model=16, attention="relu").eval()
    tokens = torch.as_tensor(drawn(4, batch=2, length=9))
    with torch.no_grad():
        out = model(input_ids=tokens, output_attentions=True)
        changed = tokens.clone()
        changed[:, 6] = 40
        after = model(input_ids=changed).logits
    weights = out.attentions[0][:, 0]
    assert (weights >= 0).all() and (weights.triu(1) == 0).all()
    assert not torch.allclose(weights.sum(-1), torch.ones(2, 9))
    layer = model.model.decoder.layers[0]
    position = model.model.decoder.embed_positions.weight[2:11]
    x = layer.self_attn_layer_norm(model.get_input_embeddings()(tokens) + position)
    scores = layer.self_attn.q_proj(x) @ layer.self_attn.k_proj(x).mT / 4
    expected = (scores.relu() / torch.arange(1, 10)[:, None]).tril()
    torch.testing.assert_close(weights, expected)
    torch.testing.assert_close(out.logits[:, :6], after[:, :6])
    assert not torch.allclose(out.logits[:, 6:], after[:, 6:])


def test_relu_attention_ignores_padding():
    model = backcopy.build(0, d_model=16, attention="relu").eval()
    tokens = torch.as_tensor(drawn(5, batch=1, length=7))
    padded = torch.cat([torch.full((1, 3), 50), tokens], 1)
    mask = torch.tensor([[0] * 3 + [1] * 7])
    with torch.no_grad():
        plain = model(input_ids=tokens).logits
        masked = model(input_ids=padded, attention_mask=mask).logits[:, 3:]
        unmasked = model(input_ids=padded).logits[:, 3:]
    torch.testing.assert_close(masked, plain)
    assert not torch.allclose(unmasked, plain)


@pytest.mark.parametrize("bos", [True, False])
def test_text_can_be_typed(bos, tmp_path):
    from transformers import AutoTokenizer

    backcopy.tokenizer(bos=bos).save_pretrained(tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    text = "".join(backcopy.SYMBOLS)
    ids = tokenizer(text).input_ids
    assert ids == [backcopy.BOS] * bos + list(range(65))
    assert tokenizer.decode(ids[bos:]) == text


@pytest.fixture(scope="module", params=["backcopy-1l", "backcopy-3l"])
def bundled(request):
    from transformers import AutoModelForCausalLM

    folder = registry.path(request.param)
    card = json.loads((folder / "card.json").read_text(encoding="utf-8"))
    return folder, card, AutoModelForCausalLM.from_pretrained(folder).eval()


def test_the_bundled_model_reaches_the_oracle(bundled):
    folder, card, model = bundled
    assert all(file.stat().st_size <= 16 * 2**20 for file in folder.iterdir())
    tokens = torch.as_tensor(drawn(99, batch=16, length=256))
    with torch.no_grad():
        found = backcopy.risks(model(input_ids=tokens).logits, tokens)
        untrained = backcopy.build(0, layers=model.config.num_hidden_layers)
        control = backcopy.risks(untrained(input_ids=tokens).logits, tokens)
    assert found["copy"] < 1e-2 and found["bigram_excess"] < 1e-2 and found["copy_accuracy"] > 0.999
    assert control["copy"] > 3 and control["bigram_excess"] > 1


def test_the_bundled_model_rests_on_the_first_token_except_after_triggers(bundled):
    folder, card, model = bundled
    found = backcopy.observe(model, 7, count=8)
    sinks = [
        layer
        for layer in range(model.config.num_hidden_layers)
        if found[f"layer_{layer}_first_token_attention_non_trigger"] > 0.9
        and found[f"layer_{layer}_first_token_attention_trigger"] < 0.1
        and found[f"layer_{layer}_value_norm_ratio"] < 0.5
    ]
    assert sinks
    untrained = backcopy.observe(backcopy.build(0), 7, count=8)
    assert untrained["layer_0_first_token_attention_non_trigger"] < 0.1


def test_the_card_says_what_is_measured_again(bundled):
    folder, card, model = bundled
    again = train.evaluate(registry.recipe(folder.name), model, card["held_out_seed"])
    assert again == pytest.approx(card["accuracy"], abs=1e-4)
    # The numbers, not the words: the recipe in the code is the one the weights were made with.
    code = json.loads(json.dumps(registry.recipe(folder.name).settings()))
    words = {"notes", "data"}
    assert {k: v for k, v in card["recipe"].items() if k not in words} == {
        k: v for k, v in code.items() if k not in words
    }
