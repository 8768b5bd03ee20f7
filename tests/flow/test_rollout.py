"""Rollout: equal to the released code, and to what matrix algebra says it must be."""

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from interp.core import Prompt, PromptError
from interp.core.errors import NumericalError, OutOfRange
from interp.flow import rollout as rolled_out
from interp.flow.mixing import residual_share, token_weights, transformed, value_weighted
from interp.flow.rollout import (
    attention_maps,
    beyond_mask,
    rollout,
    rollout_row,
    rollout_rows,
    uniform,
    uniform_rollout,
    with_residual,
    without,
)
from interp.models.model import Model

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


def test_rows_of_every_layer_equal_the_matrix_products():
    attention = causal(3)
    for residual in (True, False, 0.3):
        whole = rollout(attention, residual)
        assert torch.allclose(rollout_rows(attention, 5, residual), whole[:, 5])
        assert torch.allclose(rollout_rows(attention, [2, 5], residual), whole[:, [2, 5]].mean(1))
        assert torch.allclose(rollout_row(attention, 5, residual), whole[-1, 5])


def test_even_attention_is_even_over_what_a_mask_lets_through():
    attention = causal(9)
    assert torch.allclose(rollout(uniform(attention)), uniform_rollout(4, 7))
    attention[:, 5, :3] = 0  # a sliding window
    assert uniform(attention)[0, 5].tolist() == pytest.approx([0, 0, 0, 1 / 3, 1 / 3, 1 / 3, 0])


def test_beyond_the_mask_even_attention_is_one_and_a_planted_reader_more():
    null = uniform_rollout(4, 7)
    ratio = beyond_mask(null, null)
    seen = torch.ones(7, 7).tril().bool()
    assert torch.allclose(ratio[:, seen], torch.ones(4, 28, dtype=torch.float64))
    assert ratio[:, ~seen].isnan().all()
    attention = uniform(causal(0))
    attention[:, 6] = 0.1 * attention[:, 6] + 0.9 * torch.eye(7)[4]
    found = beyond_mask(rollout(attention), null)[-1, 6]
    # The first position has the larger share, the planted one the larger share beyond the mask.
    assert rollout(attention)[-1, 6].argmax() != 0 and int(found.argmax()) == 4


def test_without_the_first_position_rows_sum_to_one_again():
    rows = without(rollout(causal(2))[-1], [0, 3])
    assert float(rows[:, [0, 3]].abs().max()) == 0
    assert rows[0].sum() == 0 and torch.allclose(rows[1:].sum(-1), torch.ones(6).double())
    kept = rollout(causal(2))[-1, 6]
    assert rows[6, 5] / rows[6, 2] == pytest.approx(float(kept[5] / kept[2]))


def naive_value_weighted(attention, v, w_o):
    heads, n, _ = attention.shape
    found = torch.zeros(n, n, dtype=torch.float64)
    for i in range(n):
        for j in range(n):
            moved = sum(attention[h, i, j] * (v[j, h * v.shape[1] // heads] @ w_o[h])
                        for h in range(heads))
            found[i, j] = moved.norm()
    return found


def test_value_weights_equal_the_loop_over_edges_and_heads():
    draw = torch.Generator().manual_seed(3)
    attention = torch.randn(6, 5, 5, generator=draw).double().softmax(-1)
    v, w_o = (torch.randn(*shape, generator=draw).double() for shape in ((5, 2, 3), (6, 3, 7)))
    found = value_weighted(attention, v, w_o)
    assert torch.allclose(found, naive_value_weighted(attention, v, w_o))
    # A sink that gets nearly everything, and has nothing to give.
    attention[:, :, 0] += 50
    v[0] = 0
    assert value_weighted(attention / attention.sum(-1, keepdim=True), v, w_o)[:, 0].max() == 0
    with pytest.raises(ValueError, match="6 heads do not share 4 key-value heads"):
        value_weighted(attention, torch.randn(5, 4, 3), w_o)


def test_heads_that_cancel_move_nothing():
    w_o = torch.stack([torch.eye(3), -torch.eye(3)])
    v = torch.randn(4, 1, 3, generator=torch.Generator().manual_seed(1))
    assert float(value_weighted(torch.full((2, 4, 4), 0.25), v, w_o).max()) < 1e-6


def test_token_weights_are_norms_times_shares_of_the_cosine():
    x = torch.randn(3, 5, 8, generator=torch.Generator().manual_seed(2)).double()
    y = torch.randn(3, 5, 8, generator=torch.Generator().manual_seed(4)).double()
    cos = torch.cosine_similarity(x, y, -1).exp()
    expected = y.norm(dim=-1) / x.norm(dim=-1) * cos / cos.sum(-1, keepdim=True)
    assert torch.allclose(token_weights(x, y), expected)
    # Tokens that only grow: shares of one nth, times the growth.
    assert torch.allclose(token_weights(x, 3 * x), torch.full((3, 5), 3 / 5).double())
    attention = causal(5, n_layers=3, n=5)
    assert torch.allclose(transformed(attention, torch.ones(3, 5)), attention)
    step = with_residual(transformed(attention, expected))[1, 4]
    row = attention[1, 4] * expected[1] + torch.eye(5)[4]
    assert torch.allclose(step, row / row.sum())


def test_the_residual_share_is_that_of_norms():
    x, added = torch.tensor([[[3.0, 4.0]]]), torch.tensor([[[0.0, 15.0]]])
    assert residual_share(x, added).item() == pytest.approx(0.25)
    assert residual_share(0 * x, 0 * added).item() == 0.5


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "gemma2", "gpt_oss", "bert"])
def test_rollout_of_a_model_equals_rollout_of_its_attention(tiny, architecture):
    model = Model(tiny(architecture), architecture)
    prompts = [Prompt.from_tokens(range(3, 14)), Prompt.from_tokens(range(20, 27))]
    found = rolled_out.measure(model, prompts, queries=[5, [1, 6]])
    for number, (prompt, rows) in enumerate(zip(prompts, ([5], [1, 6]))):
        pattern = model.run(prompt, read="pattern").reads["pattern"].values[0]
        mean = torch.tensor(pattern).double().mean(1)
        mine = found["relevance"].isel(prompt=number)
        for name, made in (("raw", mean), ("rollout", rollout(mean))):
            assert np.allclose(mine.sel(variant=name).values[:, : len(prompt)],
                               made[:, rows].mean(1), atol=1e-6)
        assert np.isnan(mine.values[..., len(prompt):]).all()
        even = rollout(uniform(torch.tensor(pattern).amax(1)))[:, rows].mean(1)
        assert np.allclose(found["uniform"].values[number, :, : len(prompt)], even, atol=1e-6)
    assert found["relevance"].isel(key=slice(0, 7)).notnull().all() or architecture == "gpt_oss"
    # Learned sinks take their part, so that raw rows sum to less than one.
    raw = found["relevance"].sel(variant="raw").sum("key").values
    assert (raw < 0.999).all() if architecture == "gpt_oss" else np.allclose(raw, 1, atol=1e-5)


def test_a_gate_on_the_heads_leaves_value_weights_out_and_says_so(tiny, monkeypatch):
    from interp.core import SiteRefused

    model = Model(tiny("llama"), "gated")

    def refuse(layer):
        raise SiteRefused("something lies between heads and the stream.")

    monkeypatch.setattr(model, "w_o", refuse)
    found = rolled_out.measure(model, Prompt.from_tokens(range(3, 9)))
    assert found["relevance"].sel(variant="values").isnull().all()
    assert found["relevance"].sel(variant="norms").notnull().all()
    assert found.manifest["refused"] == {"values": "something lies between heads and the stream."}


def test_layers_are_read_in_as_many_passes_as_memory_asks_for(tiny, monkeypatch):
    model, prompt = Model(tiny("llama"), "tiny"), Prompt.from_tokens(range(3, 14))
    outputs = [model.w_o(layer) for layer in range(3)]
    n, passes, plain = 11, [], model.run
    whole = attention_maps(model, prompt, outputs=outputs)
    monkeypatch.setattr(model, "run", lambda *a, **k: passes.append(1) or plain(*a, **k))
    tight = 16 * 3 * n * n + 2 * 4 * 6 * n * n  # two of three layers at once
    parts = attention_maps(model, prompt, outputs=outputs, memory=tight)
    assert len(passes) == 2
    assert all(torch.allclose(whole[name], parts[name]) for name in ("mean", "values"))
    with pytest.raises(PromptError, match=r"11 positions in 3 layers .* cut the prompt to \d+ tok"):
        attention_maps(model, prompt, memory=2000)
    with pytest.raises(ValueError, match="no variant 'flow'"):
        rolled_out.measure(model, prompt, variants=("flow",))
    with pytest.raises(PromptError, match="queries for 2 prompts, but 1"):
        rolled_out.measure(model, prompt, queries=["last", "last"])


def test_the_curve_of_the_first_position_is_drawn_beside_the_mask(tiny):
    from interp.figures.style import canvas

    found = rolled_out.measure(Model(tiny("llama"), "tiny"), Prompt.from_tokens(range(3, 12)))
    _, ax = canvas()
    rolled_out.draw(found, ax)
    by_name = {line.get_label(): line.get_ydata() for line in ax.lines}
    assert np.allclose(by_name["uniform attention"], uniform_rollout(3, 9)[:, -1, 0])
