"""alpha and the sink rate: equal to the released metric, right where maps are planted."""

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from interp.core.errors import NumericalError, OutOfRange
from interp.sinks import first_token

REFERENCE = Path(__file__).parents[3] / "shared/reference/released_code_outputs"
needs_reference = pytest.mark.skipif(
    not REFERENCE.exists(), reason="the reference data lie outside the repository"
)


def causal(seed: int, *shape: int) -> torch.Tensor:
    """Random causal attention [..., query, key] with rows that sum to one."""
    scores = torch.randn(*shape, generator=torch.Generator().manual_seed(seed))
    rows = torch.arange(shape[-2])[:, None] + shape[-1] - shape[-2]
    return scores.masked_fill(torch.arange(shape[-1]) > rows, -torch.inf).softmax(-1)


@needs_reference
@pytest.mark.parametrize("epsilon", [0.1, 0.2, 0.3, 0.4])
@pytest.mark.parametrize("kind", ["numpy", "torch"])
def test_sink_rate_equals_the_released_metric(epsilon, kind):
    data = np.load(REFERENCE / "gu_sink_metric.npz")
    attention = data["attention"] if kind == "numpy" else torch.from_numpy(data["attention"])
    rate = first_token.sink_rate(attention, epsilon)
    assert np.abs(rate.numpy() - data[f"sink_rate_eps_{epsilon}"]).max() < 1e-5


@needs_reference
def test_averaging_before_the_threshold_is_another_number():
    attention = torch.from_numpy(np.load(REFERENCE / "gu_sink_metric.npz")["attention"])
    averaged = first_token.importance(attention).mean((0, 1, 2), keepdim=True)[0]
    wrong = first_token.sink_rate_from_importance(averaged, 0.3)
    assert float((wrong - first_token.sink_rate(attention, 0.3)).abs().max()) > 1


def test_a_sink_is_found_only_in_the_head_and_at_the_key_where_it_was_planted():
    attention = causal(0, 5, 3, 4, 16, 16)
    attention[:, 1, 2] *= 0.2  # L1H2 sends 80 % of every row to key 0
    attention[:, 1, 2, :, 0] += 0.8
    rate = first_token.sink_rate(attention, 0.6)[first_token.early_keys(16)]
    assert rate[0] == pytest.approx(100 / 12) and float(rate[1:].max()) == 0
    assert float(first_token.sink_rate(causal(0, 5, 3, 4, 16, 16), 0.6)[:8].max()) == 0


def test_alpha_of_uniform_attention_is_the_mean_of_the_reciprocals():
    n = 12
    rows = torch.ones(n, n).tril() / torch.arange(1.0, n + 1)[:, None]
    alpha = first_token.importance(rows[None])[0]
    expected = [np.mean([1 / t for t in range(k + 1, n + 1)]) for k in range(n)]
    assert np.allclose(alpha, expected, atol=1e-6)


def test_later_leaves_out_exactly_the_query_at_the_key():
    attention = causal(1, 2, 9, 9).double()
    later = first_token.importance(attention, queries="later")
    below = torch.ones(9, 9, dtype=torch.bool).tril(-1)
    for k in range(8):
        assert torch.allclose(later[:, k], attention[:, below[:, k], k].mean(-1))
    assert later[:, 8].isnan().all()


def test_late_keys_are_false_positives_that_the_guard_leaves_out():
    n = 12
    spread = torch.ones(n, n).tril() / torch.arange(1.0, n + 1)[:, None]
    local = 0.5 * torch.eye(n) + 0.5 * spread  # no sink anywhere: every query reads itself
    rate = first_token.sink_rate(local[None, None, None], 0.3)
    assert rate[-1] == 100
    assert float(rate[first_token.early_keys(n)].max()) == 0


def test_a_sliding_window_counts_only_queries_that_see_the_key():
    n, window = 15, 9
    distance = torch.arange(n)[:, None] - torch.arange(n)
    seen = (distance >= 0) & (distance < window)
    attention = (seen.double() / seen.sum(-1, keepdim=True))[None]
    alpha = first_token.importance(attention, visible=seen)[0]
    assert float(alpha[0]) == pytest.approx(float(attention[0, :window, 0].mean()))
    tiny = (distance >= 0) & (distance < 3)
    few = first_token.importance((tiny.double() / tiny.sum(-1, keepdim=True))[None], visible=tiny)
    # Keys that most later queries cannot see are unknown, not zero.
    assert few[0, 0].isnan() and not few[0, -3:].isnan().any()
    assert first_token.sink_rate_from_importance(few, 0.1)[0].isnan()


def test_bidirectional_attention_needs_its_own_denominator():
    attention = torch.randn(3, 7, 7, generator=torch.Generator().manual_seed(3)).softmax(-1)
    with pytest.raises(NumericalError, match="visible="):
        first_token.importance(attention)
    everything = torch.ones(7, 7, dtype=torch.bool)
    alpha = first_token.importance(attention, visible=everything)
    assert torch.allclose(alpha, attention.mean(-2)) and not alpha.isnan().any()


def test_left_padding_is_left_out_of_rows_and_columns():
    short = causal(4, 2, 6, 6)
    padded = torch.zeros(2, 9, 9)
    padded[:, 3:, 3:] = short
    padded[:, :3] = 1 / 9  # what a masked row looks like in practice
    seen = torch.zeros(9, 9, dtype=torch.bool)
    seen[3:, 3:] = torch.ones(6, 6, dtype=torch.bool).tril()
    alpha = first_token.importance(padded, visible=seen)
    assert alpha[:, :3].isnan().all()
    assert torch.allclose(alpha[:, 3:], first_token.importance(short))


def test_normalise_undoes_a_learned_sink():
    attention = causal(5, 2, 8, 8)
    share = torch.rand(2, 8, 1, generator=torch.Generator().manual_seed(6)) * 0.9 + 0.05
    normal = first_token.importance(attention * share, normalise=True)
    assert torch.allclose(normal, first_token.importance(attention), atol=1e-6)
    assert bool((first_token.importance(attention * share) < normal).all())


@settings(deadline=None, max_examples=25)
@given(seed=st.integers(0, 999), split=st.integers(1, 10))
def test_rows_in_two_parts_make_the_same_alpha(seed, split):
    attention = causal(seed, 3, 11, 11).double()
    whole = first_token.importance(attention)
    last = first_token.importance(attention[:, split:])
    n_last = 11 - split
    for k in range(split):  # keys that the last rows all see
        first = attention[:, k:split, k].sum(-1)
        assert torch.allclose((first + n_last * last[:, k]) / (11 - k), whole[:, k])


@settings(deadline=None, max_examples=25)
@given(seed=st.integers(0, 999), order=st.permutations(range(4)))
def test_permuting_heads_permutes_alpha_and_keeps_the_rate(seed, order):
    attention = causal(seed, 2, 3, 4, 8, 8)
    alpha = first_token.importance(attention)
    assert torch.equal(first_token.importance(attention[:, :, order]), alpha[:, :, order])
    assert torch.equal(first_token.sink_rate(attention[:, :, order]),
                       first_token.sink_rate(attention))


@settings(deadline=None, max_examples=25)
@given(seed=st.integers(0, 999), more=st.integers(1, 4))
def test_appended_tokens_do_not_change_what_earlier_queries_give(seed, more):
    n = 10
    long = causal(seed, 2, n + more, n + more)
    seen = torch.ones(n + more, n + more, dtype=torch.bool).tril()
    seen[n:] = False
    alpha = first_token.importance(long[:, :n, :n])
    assert torch.allclose(first_token.importance(long, visible=seen)[:, :5], alpha[:, :5])


def test_norm_ratio_is_free_of_scale():
    vectors = torch.randn(2, 6, 5, generator=torch.Generator().manual_seed(7))
    found = first_token.norm_ratio(vectors, 1)
    assert torch.allclose(found, first_token.norm_ratio(7 * vectors, 1))
    assert float(found[0]) == pytest.approx(
        float(vectors[0, 1].norm() / vectors[0, 2:].norm(dim=-1).mean()))
    with pytest.raises(OutOfRange, match="position 5 has no later positions among 6"):
        first_token.norm_ratio(vectors, 5)


def test_bad_input_is_named():
    good = causal(8, 2, 5, 5)
    with pytest.raises(NumericalError, match="NaN"):
        first_token.importance(torch.full((2, 5, 5), float("nan")))
    with pytest.raises(ValueError, match=r"5 queries but only 4 keys"):
        first_token.importance(good[..., :4])
    with pytest.raises(ValueError, match="epsilon must lie in"):
        first_token.sink_rate(good[None, None], 1.5)
    with pytest.raises(ValueError, match="visible has shape"):
        first_token.importance(good, visible=torch.ones(4, 4, dtype=torch.bool))
