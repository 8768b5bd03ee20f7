"""Far keys: exact masses, the Gaussian rule, where it is right and where it must fail."""

import numpy as np
import pytest
import torch

import interp
from interp.core import Prompt, PromptError
from interp.core.errors import ModelRefused, NumericalError
from interp.heads import long_context
from interp.models.model import Model
from interp.organisms import reader


def gaussian(seed=0, n_queries=6, n_keys=4000, d=8):
    g = torch.Generator().manual_seed(seed)
    mixing = torch.randn(d, d, generator=g) / d**0.5
    keys = torch.randn(n_keys, d, generator=g) @ mixing + torch.randn(d, generator=g)
    return torch.randn(n_queries, d, generator=g), keys


def test_masses_are_the_definition():
    query, key = gaussian(n_keys=60)
    found = long_context.masses(query, key, n_sinks=3, window=10)
    scores = query.double() @ key.double().T / 8**0.5
    for row in range(6):
        t = 54 + row
        bulk = list(range(3, 60 - 6 + 1 - 10))
        local = [s for s in range(t + 1) if s not in bulk]
        assert float(found.bulk[row]) == pytest.approx(
            float(scores[row, bulk].logsumexp(0)), abs=1e-5)
        assert float(found.local[row]) == pytest.approx(
            float(scores[row, local].logsumexp(0)), abs=1e-5)
        share = scores[row, local].exp().sum() / scores[row, : t + 1].exp().sum()
        assert float(long_context.local_share(found.local, found.bulk)[row]) == pytest.approx(
            float(share), abs=1e-5)


def test_two_moments_give_the_mass_of_gaussian_keys():
    query, key = gaussian(n_keys=30000)
    found = long_context.masses(query, key, n_sinks=16, window=64)
    assert float((found.predicted - found.bulk).abs().max()) < 0.05
    assert float(found.skewness.abs().max()) < 0.1
    # The mean alone does not: the second moment is at work.
    mean, covariance = long_context.moments(key[16:-69])
    flat = long_context.predicted_mass(query, mean, torch.zeros_like(covariance), 30000 - 85)
    assert float((flat - found.bulk).abs().max()) > 0.1


def test_a_single_spike_is_what_the_rule_misses_and_the_skewness_shows():
    query, key = gaussian(n_keys=3000)
    key[500] = 30 * query[0] / query[0].norm() ** 2 * 8**0.5  # one key that query 0 must retrieve
    found = long_context.masses(query, key, n_sinks=16, window=64)
    oracle = long_context.local_share(found.local, found.bulk)
    said = long_context.local_share(found.local, found.predicted)
    assert float(found.skewness[0]) > 10 * float(found.skewness[1:].abs().max())
    assert float(oracle[0]) < 1e-3 < float(said[0])
    assert float((oracle - said)[1:].abs().max()) < 0.01


def test_moments_of_other_keys_of_the_same_kind_do_as_well():
    query, key = gaussian(n_keys=20000)
    given = long_context.moments(key[:10000])
    found = long_context.masses(query, key[10000:], n_sinks=4, window=16, given=given)
    assert float((found.predicted - found.bulk).abs().max()) < 0.1


def test_few_keys_shrink_the_covariance_and_keep_its_trace():
    keys = gaussian(n_keys=20)[1]
    raw, shrunk = (long_context.moments(keys, shrink=s)[1] for s in (False, True))
    assert float(raw.trace()) == pytest.approx(float(shrunk.trace()), rel=1e-5)
    assert float(torch.linalg.cond(shrunk)) < float(torch.linalg.cond(raw))


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "qwen3"])
def test_the_oracle_is_the_attention_of_the_model(tiny, architecture):
    model = Model(tiny(architecture), architecture)
    prompt = Prompt.from_tokens(np.random.default_rng(0).integers(3, 90, 60))
    found = long_context.measure(model, [prompt], n_queries=5, n_sinks=2, window=9)
    rows = model.run(prompt, read="pattern").reads["pattern"].values[0][:, :, -5:]
    bulk = slice(2, 60 - 5 + 1 - 9)
    assert np.allclose(found["oracle"].values[0], 1 - rows[..., bulk].sum(-1), atol=1e-5)
    assert np.allclose(found["score"], (found["oracle"] < 0.9).mean(("sample", "query")))


def test_the_retrieving_heads_of_the_reader_need_far_keys_on_needles_only():
    model = interp.open_model("reader")
    rng = np.random.default_rng(0)
    near_and_far = {}
    for name, depth in (("far", 0.3), ("near", 1.0)):
        prompts = [Prompt.from_tokens(reader.needle(120, depth, rng).tokens) for _ in range(4)]
        found = long_context.measure(model, prompts, n_queries=1, n_sinks=2, window=30, tau=0.5)
        near_and_far[name] = found["score"].sel(layer=1).max().item()
    assert near_and_far["far"] == 1.0 and near_and_far["near"] < 0.5


def test_errors_count_both_kinds():
    model = interp.open_model("reader")
    prompts = [Prompt.from_tokens(reader.needle(90, d, np.random.default_rng(1)).tokens)
               for d in (0.2, 0.5)]
    for other in (False, True):
        found = long_context.measure(model, prompts, n_queries=3, n_sinks=2, window=20,
                                     other_moments=other)
        said = long_context.errors(found, 0.5)
        true = (found["oracle"] < 0.5).values
        wrong = true != (found["predicted"] < 0.5).values
        assert said["false_positive"] * (~true).sum() + said["false_negative"] * true.sum() \
            == pytest.approx(wrong.sum())


def test_what_has_no_such_mass_is_refused(tiny):
    model = Model(tiny("gpt_oss"), "gpt_oss")
    prompt = Prompt.from_tokens(range(3, 50))
    with pytest.raises(ModelRefused, match="is not a plain softmax"):
        long_context.measure(model, [prompt], n_queries=2, n_sinks=2, window=8)
    plain = Model(tiny("llama"), "llama")
    with pytest.raises(PromptError, match="prompt 0 has 47 tokens, but 1057 are needed"):
        long_context.measure(plain, [prompt])
    with pytest.raises(ValueError, match="there is no bulk"):
        long_context.masses(torch.rand(2, 4), torch.rand(10, 4), n_sinks=4, window=8)
    with pytest.raises(NumericalError):
        long_context.masses(torch.full((1, 4), torch.nan), torch.rand(30, 4), n_sinks=2, window=4)
