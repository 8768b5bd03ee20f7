"""Attention flow: equal to the released code and to networkx, within the rounding bound."""

from pathlib import Path

import networkx as nx
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from interp.core.errors import OutOfRange
from interp.flow.max_flow import SCALE, flow, flow_into
from interp.flow.rollout import with_residual

REFERENCE = Path(__file__).parents[3] / "shared/reference/released_code_outputs"
needs_reference = pytest.mark.skipif(
    not REFERENCE.exists(), reason="the reference data lie outside the repository"
)


def causal(seed: int, n_layers: int = 4, n: int = 6) -> torch.Tensor:
    draw = torch.Generator().manual_seed(seed)
    scores = 2 * torch.randn(n_layers, n, n, generator=draw, dtype=torch.float64)
    return scores.masked_fill(torch.ones(n, n, dtype=torch.bool).triu(1), -torch.inf).softmax(-1)


def networkx_flow(attention, query: int, targets: list[int]) -> float:
    """Maximum flow from (top, query) into a set of inputs, in floating point."""
    maps = with_residual(attention).numpy()
    graph = nx.DiGraph()
    for layer, one in enumerate(maps):
        for i, j in zip(*one.nonzero()):
            graph.add_edge((layer + 1, i), (layer, j), capacity=float(one[i, j]))
    for target in targets:
        graph.add_edge((0, target), "inputs")
    return nx.maximum_flow_value(graph, (len(maps), query), "inputs")


@needs_reference
@pytest.mark.parametrize("kind", ["numpy", "torch"])
def test_flow_equals_the_released_code(kind):
    data = np.load(REFERENCE / "rollout_flow.npz")
    given = data["attention"] if kind == "numpy" else torch.from_numpy(data["attention"])
    assert np.abs(flow(given).numpy() - data["flow"]).max() < 1e-5


def test_flow_equals_networkx_within_the_rounding_bound():
    for seed in range(3):
        attention = causal(seed)
        raw = torch.tensor([networkx_flow(attention, 5, [j]) for j in range(6)])
        bound = 4 * 6 * 6 / (2 * SCALE)
        for j in range(6):
            assert abs(flow_into(attention, [j], 5) - float(raw[j])) <= bound
        found = flow(attention, queries=[5])[-1, 5]
        assert torch.allclose(found, (raw / raw.sum()).double(), atol=2 * bound)


def test_flow_into_a_set_is_one_flow_and_at_most_the_sum():
    attention = causal(7)
    single = [flow_into(attention, [j], 5) for j in (0, 1, 2)]
    together = flow_into(attention, [0, 1, 2], 5)
    assert together == pytest.approx(networkx_flow(attention, 5, [0, 1, 2]), abs=1e-6)
    assert max(single) <= together <= min(1.0, sum(single)) + 1e-6
    assert flow_into(attention, range(6), 5) == pytest.approx(1, abs=1e-6)


def test_one_layer_is_the_attention_and_two_layers_the_closed_form():
    attention = causal(8, n_layers=2)
    found = flow(attention)
    assert torch.allclose(found[0], with_residual(attention)[0])
    lower, upper = with_residual(attention)
    closed = torch.minimum(upper[:, :, None], lower[None]).sum(1)
    assert torch.allclose(found[1], closed / closed.sum(-1, keepdim=True))
    assert closed[5, 2] == pytest.approx(networkx_flow(attention, 5, [2]), abs=1e-9)


def test_a_bottleneck_limits_flow_where_rollout_multiplies():
    attention = torch.eye(4, dtype=torch.float64).repeat(3, 1, 1)
    attention[1, 2] = torch.tensor([0.3, 0, 0.7, 0]).double()  # 2 reads 0 through a thin pipe
    attention[2, 3] = torch.tensor([0.0, 0.0, 1.0, 0.0])
    assert flow_into(attention, [0], 3, residual=False) == pytest.approx(0.3, abs=1e-7)
    assert flow_into(attention, [1], 3, residual=False) == 0
    assert flow(attention, residual=False)[2, 3].tolist() == pytest.approx([0.3, 0, 0.7, 0])


@settings(deadline=None, max_examples=10)
@given(seed=st.integers(0, 999), more=st.integers(1, 3))
def test_appended_tokens_do_not_change_earlier_rows(seed, more):
    long = causal(seed, n=5 + more)
    assert torch.allclose(flow(long)[:, :5, :5], flow(long[:, :5, :5]), atol=1e-6)


@settings(deadline=None, max_examples=10)
@given(order=st.permutations(range(5)))
def test_renaming_positions_renames_the_flow(order):
    attention = torch.randn(3, 5, 5, generator=torch.Generator().manual_seed(1)).softmax(-1)
    renamed = attention[:, order][:, :, order]
    assert torch.allclose(flow(renamed), flow(attention)[:, order][:, :, order], atol=1e-6)


def test_only_asked_rows_are_computed_and_rows_sum_to_one():
    attention = causal(9)
    some = flow(attention, queries=[1, 4])
    assert torch.equal(some[:, [1, 4]], flow(attention)[:, [1, 4]])
    assert some[:, [0, 2, 3, 5]].isnan().all()
    assert torch.allclose(flow(attention).sum(-1), torch.ones(4, 6, dtype=torch.float64))


def test_bad_input_is_named():
    with pytest.raises(ValueError, match="must be probabilities"):
        flow(10 * causal(0), residual=False)
    with pytest.raises(OutOfRange, match="position 6 is outside the 6 positions"):
        flow_into(causal(0), [6], 5)
    with pytest.raises(ValueError, match="no inputs"):
        flow_into(causal(0), [], 5)
