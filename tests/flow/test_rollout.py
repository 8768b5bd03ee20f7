"""Rollout: equal to the released code, and to what matrix algebra says it must be."""

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from interp.core.errors import NumericalError, OutOfRange
from interp.flow.rollout import rollout, rollout_row, uniform_rollout, with_residual

REFERENCE = Path(__file__).parents[3] / "shared/reference/released_code_outputs"
needs_reference = pytest.mark.skipif(
    not REFERENCE.exists(), reason="the reference data lie outside the repository"
)


def causal(seed: int, n_layers: int = 4, n: int = 7) -> torch.Tensor:
    draw = torch.Generator().manual_seed(seed)
    scores = torch.randn(n_layers, n, n, generator=draw, dtype=torch.float64)
    return scores.masked_fill(torch.ones(n, n, dtype=torch.bool).triu(1), -torch.inf).softmax(-1)


@needs_reference
@pytest.mark.parametrize("residual", [True, False])
@pytest.mark.parametrize("kind", ["numpy", "torch"])
def test_rollout_equals_the_released_code(residual, kind):
    data = np.load(REFERENCE / "rollout_flow.npz")
    given = data["attention"] if kind == "numpy" else torch.from_numpy(data["attention"])
    expected = data["rollout" if residual else "rollout_no_residual"]
    assert np.abs(rollout(given, residual).numpy() - expected).max() < 1e-5


@settings(deadline=None, max_examples=25)
@given(seed=st.integers(0, 999))
def test_rows_sum_to_one_and_stay_causal(seed):
    for residual in (True, False, 0.3):
        rolled = rollout(causal(seed), residual)
        assert torch.allclose(rolled.sum(-1), torch.ones(4, 7, dtype=torch.float64))
        assert float(rolled.triu(1).abs().max()) == 0


@settings(deadline=None, max_examples=25)
@given(seed=st.integers(0, 999), more=st.integers(1, 5))
def test_appended_tokens_do_not_change_earlier_rows(seed, more):
    long = causal(seed, n=7 + more)
    assert torch.allclose(rollout(long)[:, :7, :7], rollout(long[:, :7, :7]))


@settings(deadline=None, max_examples=25)
@given(order=st.permutations(range(6)))
def test_renaming_positions_renames_the_rollout(order):
    attention = torch.randn(3, 6, 6, generator=torch.Generator().manual_seed(1)).softmax(-1)
    renamed = attention[:, order][:, :, order]
    assert torch.allclose(rollout(renamed), rollout(attention)[:, order][:, :, order])


def test_a_planted_route_carries_all_relevance():
    attention = torch.eye(6, dtype=torch.float64).repeat(3, 1, 1)
    attention[0, 3], attention[2, 5] = torch.eye(6)[1], torch.eye(6)[3]  # 1 -> 3, then 3 -> 5
    assert rollout(attention, False)[2, 5].tolist() == [0, 1, 0, 0, 0, 0]
    # In the reversed order of layers there is no such route.
    assert rollout(attention.flip(0), False)[2, 5, 1] == 0


def test_one_row_equals_the_matrix_product():
    attention = causal(3)
    for residual in (True, False):
        for query in (0, 4, 6):
            assert torch.allclose(rollout_row(attention, query, residual),
                                  rollout(attention, residual)[-1, query])


def test_a_measured_residual_share_replaces_the_guess():
    attention = causal(4)
    assert torch.allclose(with_residual(attention, 0.5), with_residual(attention, True))
    assert torch.allclose(rollout(attention, 0.0), rollout(attention, False))
    shares = torch.rand(4, 7, generator=torch.Generator().manual_seed(5)).double()
    rows = with_residual(attention, shares)
    assert torch.allclose(rows[2, 3, 3], shares[2, 3] + (1 - shares[2, 3]) * attention[2, 3, 3])
    assert torch.allclose(rollout(attention, 1.0)[-1], torch.eye(7, dtype=torch.float64))


def test_rows_below_one_are_normalized_as_in_the_definition():
    half = 0.5 * causal(6)
    assert torch.allclose(with_residual(half).sum(-1), torch.ones(4, 7, dtype=torch.float64))
    eye = torch.eye(7, dtype=torch.float64)
    assert torch.allclose(with_residual(half), (half + eye) / 1.5)


def test_the_mask_alone_rolls_out_to_the_first_positions():
    baseline = uniform_rollout(6, 7)
    assert bool((baseline[1:, -1, 0] > baseline[:-1, -1, 0]).all())
    assert torch.allclose(baseline.sum(-1), torch.ones(6, 7, dtype=torch.float64))


def test_bad_input_is_named():
    with pytest.raises(ValueError, match="must be square"):
        rollout(torch.rand(2, 3, 4))
    with pytest.raises(NumericalError, match="NaN"):
        rollout(causal(0) * torch.nan)
    with pytest.raises(ValueError, match="share must lie between 0 and 1"):
        rollout(causal(0), 1.5)
    with pytest.raises(OutOfRange, match="query 7 is outside the 7 positions"):
        rollout_row(causal(0), 7)
