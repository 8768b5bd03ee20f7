"""Rotary pairs: measured layouts, the score on planted shifts, controls, refusals."""

import numpy as np
import pytest
import torch
import transformers as t

import interp
from interp.core import Prompt, PromptError
from interp.core.errors import ModelRefused
from interp.heads import positional
from interp.models.model import Model
from interp.organisms import reader

D = 16
PAIRS = positional.Pairs(torch.arange(8), torch.arange(8, 16),
                         torch.tensor([10000.0 ** (-2 * c / D) for c in range(8)]))


def test_contributions_add_up_to_the_score():
    g = torch.Generator().manual_seed(0)
    q, k = torch.randn(5, D, generator=g), torch.randn(5, D, generator=g)
    assert torch.allclose(positional.contributions(q, k, PAIRS).sum(-1), (q * k).sum(-1), atol=1e-5)


@pytest.mark.parametrize("sign", [1, -1])
def test_a_planted_shift_to_slow_pairs_is_found_with_its_sign(sign):
    rng = np.random.default_rng(0)
    distance = rng.integers(1, 500, 300)
    middle = 3.5 + sign * (np.log(distance) / np.log(500) - 0.5) * 6
    index = np.arange(8)
    parts = np.exp(-((index - middle[:, None]) ** 2)) * rng.choice([-1, 1], (300, 8))
    assert sign * positional.score(parts, distance) > 0.95
    # The control: the same parts at permuted distances.
    assert abs(positional.score(parts, rng.permutation(distance))) < 0.2
    # A scale of its own for every pair does not matter.
    assert positional.score(parts * rng.uniform(0.1, 9, (300, 1)), distance) == pytest.approx(
        positional.score(parts, distance), abs=1e-3)
    assert np.isnan(positional.score(parts[:2], distance[:2]))


def model_of(kind):
    torch.manual_seed(0)
    sizes = dict(vocab_size=97, max_position_embeddings=128)
    if kind == "glm":
        return t.GlmForCausalLM(t.GlmConfig(
            hidden_size=48, intermediate_size=50, num_hidden_layers=2, num_attention_heads=3,
            num_key_value_heads=1, head_dim=16, partial_rotary_factor=0.5, pad_token_id=0,
            eos_token_id=2, **sizes)), 8, True
    if kind == "cohere":
        return t.CohereForCausalLM(t.CohereConfig(
            hidden_size=48, intermediate_size=50, num_hidden_layers=2, num_attention_heads=3,
            num_key_value_heads=1, pad_token_id=0, eos_token_id=2, bos_token_id=1, **sizes)), 16, \
            True
    if kind == "gpt_neox":
        return t.GPTNeoXForCausalLM(t.GPTNeoXConfig(
            hidden_size=48, intermediate_size=50, num_hidden_layers=2, num_attention_heads=3,
            rotary_pct=0.5, **sizes)), 8, False
    return t.LlamaForCausalLM(t.LlamaConfig(
        hidden_size=48, intermediate_size=50, num_hidden_layers=2, num_attention_heads=3,
        num_key_value_heads=1, rope_theta=500.0, **sizes)), 16, False


@pytest.mark.parametrize("kind", ["llama", "gpt_neox", "glm", "cohere"])
def test_layouts_and_frequencies_are_measured(kind):
    hf, width, interleaved = model_of(kind)
    with torch.no_grad():
        for parameter in hf.parameters():
            if parameter.ndim > 1:
                parameter.mul_(5)
    pairs = positional.rotary_pairs(Model(hf, kind))
    assert len(pairs.first) == width // 2
    gap = (pairs.second - pairs.first).tolist()
    assert gap == [1] * (width // 2) if interleaved else gap == [width // 2] * (width // 2)
    base = {"llama": 500.0, "cohere": 500000.0}.get(kind, 10000.0)
    expected = base ** (-2 * torch.arange(width // 2) / width)
    assert torch.allclose(pairs.frequency, expected, atol=2e-3)


def test_a_model_without_rotation_is_refused(tiny):
    with pytest.raises(ModelRefused, match="not rotated by position"):
        positional.rotary_pairs(Model(tiny("gpt2"), "gpt2"))


def test_grouped_heads_read_their_own_keys(tiny):
    model = Model(tiny("llama"), "tiny-llama")
    prompt = Prompt.from_tokens(np.random.default_rng(0).integers(3, 90, 70))
    found = positional.measure(model, [prompt], n_queries=40, permutations=20)
    pairs = positional.rotary_pairs(model)
    rows = np.sort(np.random.default_rng(0).choice(np.arange(6, 70), 40, replace=False))
    run = model.run(prompt, read=["q", "k", "pattern"])
    q, k, p = (run.reads[n].values[0] for n in ("q", "k", "pattern"))
    for layer, head in ((0, 1), (2, 5)):
        parts, distance = [], []
        for row in rows:
            for key in np.argsort(-p[layer, head, row], kind="stable")[:5]:
                if positional.FIRST_KEY <= key < row:
                    parts.append(positional.contributions(
                        q[layer, row, head], k[layer, key, head // 3], pairs))
                    distance.append(row - key)
        expected = positional.score(torch.stack(parts), torch.tensor(distance))
        assert float(found["score"][layer, head]) == pytest.approx(expected, abs=1e-3)


def test_the_reader_has_scores_nulls_and_controls():
    model = interp.open_model("reader")
    rng = np.random.default_rng(0)
    prompts = [Prompt.from_tokens([reader.BOS, *row]) for row in reader.prose(rng, 3, 150)]
    found = positional.measure(model, prompts, n_queries=40, permutations=60)
    assert found["score"].shape == (4, 8) and found["samples"].shape == (3, 4, 8)
    known = found["eligible"].values
    assert known.any() and (found["null"].values[known] > 0).all()
    assert (np.abs(found["score"].values[known]) <= 1).all()
    again = positional.measure(model, prompts, n_queries=40, permutations=60)
    assert found.data.equals(again.data)


def test_short_prompts_are_refused(tiny):
    model = Model(tiny("llama"), "tiny-llama")
    with pytest.raises(PromptError, match="at least 12 tokens are needed, not 5"):
        positional.measure(model, [Prompt.from_tokens(range(3, 8))])
    with pytest.raises(PromptError, match="not 0"):
        positional.measure(model, [])
