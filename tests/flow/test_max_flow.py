"""Attention flow: equal to the released code and to networkx, within the rounding bound."""

from pathlib import Path

import networkx as nx
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from interp.core import Prompt, PromptError
from interp.core.errors import OutOfRange
from interp.flow import max_flow
from interp.flow.max_flow import (
    SCALE,
    flow,
    flow_into,
    flow_into_groups,
    pooled_flow,
    rounding_bound,
)
from interp.flow.rollout import with_residual
from interp.models.model import Model

REFERENCE = Path(__file__).parents[3] / "shared/reference/released_code_outputs"
needs_reference = pytest.mark.skipif(
    not REFERENCE.exists(), reason="the reference data lie outside the repository"
)


def causal(seed: int, n_layers: int = 4, n: int = 6) -> torch.Tensor:
    draw = torch.Generator().manual_seed(seed)
    scores = 2 * torch.randn(n_layers, n, n, generator=draw, dtype=torch.float64)
    return scores.masked_fill(torch.ones(n, n, dtype=torch.bool).triu(1), -torch.inf).softmax(-1)


def networkx_flow(attention, query, targets: list[int]) -> float:
    """Maximum flow from one or several (top, query) into a set of inputs, in floating point."""
    maps = with_residual(attention).numpy()
    graph = nx.DiGraph()
    for layer, one in enumerate(maps):
        for i, j in zip(*one.nonzero()):
            graph.add_edge((layer + 1, i), (layer, j), capacity=float(one[i, j]))
    for target in targets:
        graph.add_edge((0, target), "inputs")
    for one in query if isinstance(query, list) else [query]:
        graph.add_edge("queries", (len(maps), one))
    return nx.maximum_flow_value(graph, "queries", "inputs")


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


def test_several_queries_share_one_super_source():
    attention = causal(11)
    for queries, targets in (([3, 5], [0, 1]), ([1, 2, 4], [2]), (list(range(6)), [0, 4])):
        found = flow_into(attention, targets, queries)
        expected = networkx_flow(attention, queries, targets)
        assert abs(found - expected) <= rounding_bound(attention, sources=len(queries))
        assert max(flow_into(attention, targets, q) for q in queries) <= found + 1e-6
    # Together they may need the same edge: less than the sum, never more.
    assert flow_into(attention, [0, 4], range(6)) < sum(
        flow_into(attention, [0, 4], q) for q in range(6)) - 1e-3
    # Six units are sent, but the first positions can pass on no more than one unit each.
    together = flow_into(attention, range(6), range(6))
    assert together == pytest.approx(networkx_flow(attention, list(range(6)), range(6)), abs=1e-6)
    assert together < 5.5


def test_two_layers_of_sets_are_a_closed_form():
    attention = causal(12, n_layers=2)
    for queries, targets in ((5, [0]), (5, [1, 3, 4]), ([2, 5], [0, 2]), (range(6), [0, 1])):
        asked = list(queries) if not isinstance(queries, int) else queries
        expected = networkx_flow(attention, asked, list(targets))
        assert flow_into(attention, targets, queries) == pytest.approx(expected, abs=1e-12)
    one = causal(12, n_layers=1)
    assert flow_into(one, [1, 2], [3, 4]) == pytest.approx(
        float(with_residual(one)[0, 3:5, 1:3].sum()))


def test_the_rounding_bound_is_half_a_unit_per_edge_and_grows_with_the_sources():
    attention = causal(13)
    edges = 4 * 6 * 7 / 2  # causal maps with the diagonal
    assert rounding_bound(attention) == edges / 2**31
    assert rounding_bound(attention, sources=3) == pytest.approx(3 * edges / 2**31)
    # Rounded coarsely the error is seen, and stays within the bound of that scale.
    coarse, errors = 2**7, []
    for seed in range(8):
        maps = with_residual(causal(seed))
        graph = max_flow._graph(maps, scale=coarse)
        for target in range(6):
            found = max_flow._maximum(graph, 4 * 6 + 5, target, coarse)
            errors.append(abs(found - networkx_flow(causal(seed), 5, [target])))
    assert 1e-3 < max(errors) <= edges / (2 * coarse)


def test_groups_are_exact_and_merged_positions_an_upper_bound():
    attention = causal(14)
    groups = {"first": [0], "middle": [1, 2, 3], "end": [4, 5]}
    exact = flow_into_groups(attention, groups, 5)
    for name, inputs in groups.items():
        assert exact[name] == pytest.approx(networkx_flow(attention, 5, inputs), abs=1e-6)
    bounds = pooled_flow(attention, list(groups.values()), 5)
    assert bool((bounds >= torch.tensor(list(exact.values())) - 1e-6).all())
    assert float(bounds.max()) <= 1 + 1e-6
    alone = pooled_flow(attention, [[j] for j in range(6)], 5)
    for j in range(6):
        assert float(alone[j]) == pytest.approx(flow_into(attention, [j], 5), abs=1e-6)


def test_merging_averages_instead_of_sums_would_not_be_a_bound():
    # Two parallel pipes of one half: together they carry one unit, their average one half.
    attention = torch.eye(4, dtype=torch.float64).repeat(3, 1, 1)
    attention[2, 3] = torch.tensor([0.0, 0.5, 0.5, 0.0])
    assert flow_into(attention, [1, 2], 3, residual=False) == pytest.approx(1)
    assert float(pooled_flow(attention, [[1, 2]], 3, residual=False)[0]) == pytest.approx(1)


def test_a_measured_residual_share_gives_other_pipes():
    attention = causal(15)
    shares = torch.full((4, 6), 0.9, dtype=torch.float64)
    assert flow_into(attention, [5], 5, shares) > flow_into(attention, [5], 5)
    assert torch.allclose(flow(attention, 0.5), flow(attention), atol=1e-6)


def test_long_prompts_are_refused_with_the_way_out(monkeypatch):
    with pytest.raises(PromptError, match="of 6 positions .* at most 5 .* pooled_flow"):
        flow(causal(0), limit=5)
    monkeypatch.setattr(max_flow, "MOST_EDGES", 50)
    with pytest.raises(PromptError, match="over 84 edges"):
        flow_into(causal(0), [0, 1], 5)
    assert pooled_flow(causal(0), [[0, 1, 2], [3, 4, 5]], 5).shape == (2,)


def test_only_asked_layers_are_computed():
    some = flow(causal(16), queries=[5], layers=[1, 3])
    assert torch.allclose(some[[1, 3], 5], flow(causal(16))[[1, 3], 5])
    assert some[[0, 2]].isnan().all()
    with pytest.raises(OutOfRange, match="layer 4 is outside the 4 layers"):
        flow(causal(16), layers=[4])


@pytest.mark.parametrize("architecture", ["llama", "bert"])
def test_the_flow_of_a_model_is_that_of_its_attention(tiny, architecture):
    model = Model(tiny(architecture), architecture)
    prompts = [Prompt.from_tokens(range(3, 12)), Prompt.from_tokens(range(20, 27))]
    found = max_flow.measure(model, prompts, queries=["last", [2, 3]], layers=[0, 2])
    for number, rows in enumerate(([8], [2, 3])):
        pattern = model.run(prompts[number], read="pattern").reads["pattern"].values[0]
        expected = flow(pattern.mean(1), queries=rows)[[0, 2]][:, rows].mean(1)
        mine = found["flow"].values[number, :, : len(prompts[number])]
        assert np.allclose(mine, expected, atol=1e-6)
    assert found.manifest["rounding"] < 1e-6


def test_groups_must_be_apart():
    with pytest.raises(ValueError, match="must not be empty or share"):
        pooled_flow(causal(0), [[0, 1], [1, 2]], 5)
    with pytest.raises(ValueError, match="no query"):
        flow_into(causal(0), [0], [])
