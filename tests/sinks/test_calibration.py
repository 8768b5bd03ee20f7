"""ACT: hidden sinks planted and found, late keys kept out, row sums kept, no-op without sinks."""

import numpy as np
import pytest
import torch

import interp
from interp.core import PromptError
from interp.core.errors import NumericalError, OutOfRange
from interp.models.model import Model
from interp.organisms import backcopy
from interp.sinks import calibration as act


def causal(seed: int, n: int = 24) -> torch.Tensor:
    """Causal attention [head, query, key] without a sink: weights that are nearly even."""
    torch.manual_seed(seed)
    made = (1 + 0.1 * torch.rand(3, n, n, dtype=torch.float64)).tril()
    return made / made.sum(-1, keepdim=True)


def received(attention: torch.Tensor) -> torch.Tensor:
    n = attention.shape[-1]
    return attention.sum(-2) / (n - torch.arange(n))


def planted(seed: int, key: int, mass: float) -> torch.Tensor:
    rows = causal(seed)
    rows[1, key + 1 :] *= 1 - mass
    rows[1, key + 1 :, key] += mass
    return rows


@pytest.mark.parametrize("key", [1, 4, 9])
@pytest.mark.parametrize("rule", ["relative", "fixed"])
def test_a_planted_sink_is_found_in_its_head_only(key, rule):
    mean = received(planted(0, key, 0.4))
    found = act.sinks(mean, rule, times=5)
    assert found[1].nonzero()[:, 0].tolist() == [key] or rule == "fixed"
    assert found[1, key] and not act.sinks(received(causal(0)), "relative")[1, key]


def test_the_first_token_and_late_keys_are_left_out():
    rows = causal(1)
    rows[:, 1:] *= 0.4
    rows[:, :, 0] += 0.6
    mean = received(rows)
    assert mean[0, 0] > 0.5 and not act.sinks(mean, "fixed")[:, 0].any()
    # A local head: every key goes to the next query, so late keys pass where they have few queries.
    local = torch.eye(24).roll(-1, 0)[None]
    late = act.sinks(received(local), "fixed", early=False)
    assert late[0, 12:].any() and not act.sinks(received(local), "fixed")[0, 12:].any()


def test_calibration_is_the_formula_and_keeps_sums():
    rows = planted(2, 4, 0.5) * 0.8  # rows below one, as with learned sinks
    hidden = torch.zeros(3, 24, dtype=torch.bool)
    hidden[1, 4] = True
    after = act.calibrate(rows, hidden, 0.4)
    assert torch.allclose(after.sum(-1), rows.sum(-1), atol=1e-12)
    assert torch.equal(after[[0, 2]], rows[[0, 2]])
    assert torch.allclose(after[1, 5:, 4], 0.4 * rows[1, 5:, 4])
    i = 17
    freed = 0.6 * rows[1, i, 4]
    others = rows[1, i].clone()
    others[4] = 0
    wanted = others + freed * others / others.sum()
    wanted[4] = 0.4 * rows[1, i, 4]
    assert torch.allclose(after[1, i], wanted)
    assert torch.equal(after[1, :4], rows[1, :4])
    # Everything on the sink: nowhere to go, left alone instead of 0 / 0.
    alone = torch.zeros(1, 1, 3)
    alone[..., 1] = 1.0
    assert torch.equal(act.calibrate(alone, torch.tensor([[False, True, False]])), alone)


def test_without_hidden_sinks_calibration_is_exactly_a_no_op():
    rows = causal(3)
    assert torch.equal(act.calibrate(rows, act.sinks(received(rows))), rows)
    model = interp.open_model("backcopy-1l")
    tokens = backcopy.sample(np.random.default_rng(0), 6, 64)[0]
    prompts = [interp.Prompt.from_tokens(row) for row in tokens]
    found = act.measure(model, prompts)
    assert not found["hidden"].values.any()
    changed = act.interventions(found, "L0H0")
    assert changed.writes == ((),) * 6
    plain, same = model.run(prompts), model.run(prompts, write=changed)
    assert all(torch.equal(a, b) for a, b in zip(plain.logits, same.logits))
    # Without the restriction to early keys the rule flags keys there, all of them late.
    count = found["count"].sum(("layer", "head")).mean("prompt")
    for rule in ("relative", "fixed"):
        assert float(count.sel(rule=rule, range="early")) == 0
        assert float(count.sel(rule=rule, range="all")) > 1


@pytest.mark.parametrize("architecture", ["llama", "gemma2", "gpt_oss"])
@pytest.mark.parametrize("lane", ["hf", "bridge"])
def test_a_run_calibrates_as_the_pure_function_does(tiny, architecture, lane):
    model = Model(tiny(architecture), f"tiny-{architecture}", lane=lane)
    rng = np.random.default_rng(0)
    prompts = [interp.Prompt.from_tokens(rng.integers(3, 90, n)) for n in (20, 20, 16)]
    found = act.measure(model, prompts, times=1.5)
    hidden = found["hidden"].values
    layer, head = (int(x) for x in np.argwhere(hidden[0].any(-1))[0])
    site = f"pattern.{layer}"
    write = act.interventions(found, [(layer, head)], kept=0.4)
    for i, prompt in enumerate(prompts):
        before = model.run(prompt, read=site).reads[site].values[0, 0]
        after = model.run(prompt, read=site, write=write.writes[i]).reads[site].values[0, 0]
        mask = torch.zeros(before.shape[0], len(prompt), dtype=torch.bool)
        mask[head] = torch.tensor(hidden[i, layer, head, : len(prompt)])
        wanted = act.calibrate(torch.tensor(before), mask, 0.4)
        assert np.allclose(after, wanted, atol=2e-6)
        assert np.allclose(after.sum(-1), before.sum(-1), atol=2e-6)
    together = model.run(prompts, write=write)
    assert len(together.logits) == 3
    plain = model.run(prompts[0]).logits[0]
    assert not torch.allclose(together.logits[0], plain, atol=1e-4)


def test_it_works_in_generation_and_a_kept_share_of_one_is_the_model():
    model = interp.open_model("reader")
    prompts = [interp.Prompt.from_tokens(np.random.default_rng(1).integers(3, 180, 30))]
    found = act.measure(model, prompts, times=1.0)
    heads = act.candidates(found)
    assert heads and all(found["hidden"].values[0, h.layer, h.head].any() for h in heads)
    same = act.interventions(found, heads, kept=1.0)
    assert model.generate(prompts, 4, same) == model.generate(prompts, 4)
    assert len(model.generate(prompts, 4, act.interventions(found, heads, kept=0.0))) == 1


def test_scope_and_bad_input():
    assert act.scope(32) == range(2, 31) and list(act.scope(2)) == []
    assert act.threshold(50) == act.threshold(50, "fixed") == 0.1
    with pytest.raises(NumericalError, match="finite"):
        act.sinks(torch.tensor([0.1, float("inf")]))
    with pytest.raises(ValueError, match="kept must lie"):
        act.calibrate(torch.ones(1, 1, 2), torch.zeros(1, 2, dtype=torch.bool), 1.5)
    with pytest.raises(PromptError, match="no prompts"):
        act.measure(interp.open_model("reader"), [])
    found = act.measure(interp.open_model("reader"), [interp.Prompt.from_tokens(range(3, 20))])
    with pytest.raises(OutOfRange, match="L9H0"):
        act.interventions(found, "L9H0")
