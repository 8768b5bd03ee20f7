"""Spans, WAAD and FAI: by hand, from diagonals, streamed as dense; planted near and far heads."""

import copy
import functools

import numpy as np
import pytest
import torch
from scipy.stats import kurtosis

import interp
from interp.core.errors import PromptError
from interp.heads import local_global, preplan_anchor
from interp.models.model import Model
from interp.stream.reducers import Received


@pytest.fixture(scope="module")
def opened(tiny):
    """architecture -> the tiny model, opened once."""
    return functools.cache(lambda architecture: Model(tiny(architecture), f"tiny-{architecture}"))


def prompts(*lengths, seed=3):
    rng = np.random.default_rng(seed)
    return [interp.Prompt.from_tokens([1, *rng.integers(3, 90, n - 1)]) for n in lengths]


def causal_rows(n, seed=0):
    generator = torch.Generator().manual_seed(seed)
    scores = torch.randn(n, n, generator=generator).mul(2)
    return scores.masked_fill(~torch.ones(n, n, dtype=torch.bool).tril(), float("-inf")).softmax(-1)


# -- pure ---------------------------------------------------------------------------------------


def test_span_of_known_heads():
    n = 9
    rows = torch.zeros(4, n, n)
    rows[0] = torch.eye(n)  # itself
    rows[1, 0, 0] = 1
    rows[1, 1:] = torch.eye(n)[:-1]  # the previous token
    rows[2, :, 0] = 1  # parked on the first
    rows[3, :, 0] = 0.9  # mostly parked, the rest on itself
    rows[3] += 0.1 * torch.eye(n)
    plain = local_global.span(rows)
    assert torch.allclose(plain, torch.tensor([0.0, 8 / 9, 4.0, 3.6]), atol=1e-6)
    rest = local_global.span(rows, first=1)
    assert float(rest[0]) == 0 and torch.isnan(rest[2])
    # Without its parking place the head that seemed to look far looks at itself.
    assert float(rest[3]) == pytest.approx(0.0, abs=1e-6)
    # Rows of a suffix are the same rows.
    assert torch.allclose(local_global.span(rows[:, 5:]), (rows[:, 5:] * (
        torch.arange(5, n)[:, None] - torch.arange(n)).abs()).sum(-1).mean(-1))


@pytest.mark.parametrize("window", [1, 4, 10])
def test_waad_from_its_diagonals_is_waad(window):
    rows = 0.7 * causal_rows(17)  # a learned sink takes the rest
    band = torch.full((17, window), float("nan"))
    for j in range(window):
        band[j:, j] = rows.diagonal(-j)
    found = local_global.waad_from_band(band, rows.sum(-1))
    assert torch.allclose(found, local_global.waad(rows, window), atol=1e-5)
    assert (found <= 0.7 * window + 1e-5).all()


def test_fai_averages_the_late_queries_only():
    rows = causal_rows(30)
    found = local_global.fai(rows, 3, 8)
    for key in (0, 7, 24):
        late = [t for t in range(30) if 3 <= t - key <= 8]
        assert float(found[key]) == pytest.approx(float(rows[late, key].mean()), abs=1e-6)
    assert torch.isnan(found[27:]).all() and not torch.isnan(found[:27]).any()
    moved = rows.clone()
    moved[9:, 0] += 5.0  # later than the window: another token's business
    assert float(local_global.fai(moved, 3, 8)[0]) == float(found[0])


def test_peaks_are_a_share_of_what_has_a_value():
    curve = np.array([np.nan, 3.0, 1.0, 2.0, 5.0, np.nan])
    assert preplan_anchor.peaks(curve, 0.5).tolist() == [False, True, False, False, True, False]
    assert preplan_anchor.peaks(curve, 0.0).sum() == 0
    assert preplan_anchor.peaks(np.full(4, np.nan)).sum() == 0
    step = preplan_anchor.change(np.array([2.0, 5.0, 1.0]))
    assert step[:2].tolist() == [3.0, 4.0] and np.isnan(step[2])


def test_a_shift_keeps_the_curve_and_moves_it_far_enough():
    rng = np.random.default_rng(0)
    curve = np.arange(30)
    for _ in range(50):
        start = int(np.flatnonzero(preplan_anchor.shifted(curve, rng, least=4) == 0)[0])
        assert 4 <= start <= 26
    with pytest.raises(ValueError, match="cannot be shifted"):
        preplan_anchor.shifted(np.arange(8), rng)


def test_dominated_anchors_need_a_jump_before_and_a_low_waad():
    curve = np.array([1.0, 9.0, 1.0, 1.0, 1.0, 1.0, 8.0])
    every = np.ones(7, dtype=bool)
    near = preplan_anchor.dominated(curve, every, back=1, low=1.0, jump=5.0)
    assert near.tolist() == [False, False, True, False, False, False, False]
    far = preplan_anchor.dominated(curve, every, back=3, low=1.0, jump=5.0)
    assert np.flatnonzero(far).tolist() == [2, 3, 4]


# -- in models ----------------------------------------------------------------------------------


@pytest.mark.parametrize("architecture", ["llama", "gemma3", "gpt_oss"])
def test_streamed_equals_dense(opened, architecture):
    model, given = opened(architecture), prompts(40, 33)
    found = local_global.measure(model, given, low=3, high=12, first=2, max_sink_mass=0.9)
    chosen = {name: found[name].values for name in ("local", "global", "receiver")}
    for i, prompt in enumerate(given):
        n = len(prompt)
        run = model.run(prompt, read="pattern")
        p = torch.tensor(run.reads["pattern"].values[0])
        total = p.sum(-1, keepdim=True)
        one = found.data.isel(sample=i)
        assert np.allclose(one["span"], local_global.span((p / total)[:, :, 2:]), atol=1e-4)
        rest = local_global.span(p[:, :, 2:], first=2)
        # Row 2 of a head that parks completely has nothing left: compare where all rows have.
        left = (p[:, :, 2:, 2:].sum(-1) > 1e-3).all(-1).numpy()
        assert left.any() and np.allclose(one["span_rest"].values[left], rest[left], atol=1e-2)
        assert np.allclose(one["sink_mass"], (p[..., :2].sum(-1) / total[..., 0])[:, :, 2:].mean(-1),
                           atol=1e-5)
        if chosen["local"].any():
            mean = p[torch.tensor(chosen["local"])].mean(0)
            assert np.allclose(one["waad"][2:n], local_global.waad(mean)[2:], atol=1e-4)
        for name, heads in (("fai", "global"), ("fai_receiver", "receiver")):
            if chosen[heads].any():
                mean = p[torch.tensor(chosen[heads])].mean(0)[2:]  # rows that count
                want = local_global.fai(mean, 3, 12).numpy()[2:]
                assert np.allclose(one[name][2:n], want, atol=1e-5, equal_nan=True)
                seen = p[torch.tensor(chosen[heads])] > 0
                even = (seen / seen.sum(-1, keepdim=True)).mean(0)[2:]
                want = local_global.fai(even, 3, 12).numpy()[2:]
                assert np.allclose(one[f"{name}_uniform"][2:n], want, atol=1e-5, equal_nan=True)
            else:
                assert one[name].isnull().all()
        logits = run.logits[0].double().log_softmax(-1)
        spread = -(logits.exp() * logits).sum(-1).numpy()
        assert np.allclose(one["entropy"][2:n], spread[1:-1], atol=1e-4)
        assert one["entropy"][n:].isnull().all()


def test_a_window_too_short_is_not_eligible_and_uniform_spans_are_exact(opened):
    model = opened("gemma3")  # windows of five tokens in the layers 0 and 2
    found = local_global.measure(model, prompts(40), low=3, high=12, max_sink_mass=1)
    assert found["eligible"].values.any(1).tolist() == [False, True, False]
    assert not found["global"].values[[0, 2]].any() and found["global"].values[1].any()
    wide = np.mean([t / 2 for t in range(4, 40)])
    narrow = 2.0  # of a row over five keys
    assert np.allclose(found["uniform_span"].isel(sample=0).values[:, 0], [narrow, wide, narrow],
                       atol=1e-4)


def with_positions(hf, plans, n):
    """A GPT-2 whose first heads in layer 0 have planned rows: which place each query looks at."""
    hf = copy.deepcopy(hf)
    block = hf.transformer.h[0]
    angles = torch.arange(n)[:, None] * torch.tensor([0.11, 0.5, 1.3, 2.3])
    code = torch.cat([angles.sin(), angles.cos()], -1)
    with torch.no_grad():
        hf.transformer.wte.weight.mul_(1e-4)
        solve = torch.linalg.pinv(block.ln_1(hf.transformer.wpe.weight[:n]).double()).float()
        for head, plan in plans.items():
            for part, target in ((0, 30 * code[plan]), (1, code)):
                columns = slice(48 * part + 8 * head, 48 * part + 8 * head + 8)
                block.attn.c_attn.weight[:, columns] = solve @ target
                block.attn.c_attn.bias[columns] = 0
    return Model(hf, "planted")


def test_planted_near_far_and_parked_heads(tiny):
    n = 40
    t = torch.arange(n)
    plans = {1: (t - 1).clamp_min(0), 3: torch.where(t > 14, 10, t), 4: torch.zeros(n, dtype=int)}
    model = with_positions(tiny("gpt2"), plans, n)
    found = local_global.measure(model, prompts(n, n), low=5, high=20, share=0.3)
    assert float(found["score"][0, 1]) == pytest.approx(1.0, abs=0.1)
    assert bool(found["local"][0, 1]) and bool(found["global"][0, 3])
    # The parked head has the longest span and is no global head; the far one reads token 10.
    assert float(found["span"][:, 0, 4].min()) > float(found["span"][:, 0, 3].max())
    assert not bool(found["eligible"][0, 4]) and not bool(found["global"][0, 4])
    assert found.manifest["parked heads"] >= 1
    assert int(np.nanargmax(found["fai"][0].values)) == 10


def test_rows_that_count_can_be_the_generated_ones(opened):
    model = opened("llama")
    (prompt,) = prompts(40)
    answer = prompt.with_segments(generated=(20, 40))
    found = local_global.measure(model, [answer], low=3, high=8)
    assert found["waad"].isnull().values[0, :20].all() and found["waad"].notnull()[0, 20:].all()
    p = torch.tensor(model.run(prompt, read="pattern").reads["pattern"].values[0])
    assert np.allclose(found["span"][0], local_global.span(p[:, :, 20:]), atol=1e-4)


def test_receivers_are_heads_whose_keys_are_received_unequally(opened):
    model, (prompt,) = opened("llama"), prompts(40)
    found = local_global.measure(model, [prompt], low=3, high=8, first=2)
    received = model.run(prompt, stats=[Received("later", subset=range(2, 40))]).stats["received"]
    want = kurtosis(received.values[0][..., 2:37].astype(float), axis=-1)
    assert np.allclose(found["kurtosis"][0], want, atol=1e-4)
    chosen, able = found["receiver"].values, found["eligible"].values
    assert want[chosen].min() >= want[able & ~chosen].max() and not (chosen & ~able).any()


def test_what_cannot_be_measured_is_refused(opened):
    with pytest.raises(PromptError, match="is an encoder"):
        local_global.measure(opened("bert"), prompts(20))
    with pytest.raises(PromptError, match="rows that count"):
        local_global.measure(opened("llama"), prompts(12))
    with pytest.raises(PromptError, match="no prompts"):
        local_global.measure(opened("llama"), [])
