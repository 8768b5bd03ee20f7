"""Pruning: the right heads, composable, usable while generating, its number chosen elsewhere."""

import numpy as np
import pytest

import interp
import interp.causal.ablate
from interp.causal.prune import Answers, choose_count, prune, ranked
from interp.core import Head, HeadScores
from interp.models.model import Model
from interp.organisms import conflict_circuit as planted

SCORES = HeadScores.of(np.array([
    [0.0, 0.1, 0.0, 0.0], [0.0, 0.0, 0.0, 0.0], [0.0, 0.0, -0.2, 0.0], [0.0, 0.0, 0.0, 0.0],
    [0.0, 9.0, 0.0, -7.0], [5.0, 0.0, -6.0, 0.0]]))


@pytest.fixture(scope="module")
def model():
    return Model(planted.build(), "planted")


@pytest.fixture(scope="module")
def cases():
    return [c for c in planted.cases() if c.format == "substitution"]


def test_heads_of_one_sign_strongest_first():
    assert ranked(SCORES, "memory") == [Head(4, 1), Head(5, 0), Head(0, 1)]
    assert ranked(SCORES, "context") == [Head(4, 3), Head(5, 2), Head(2, 2)]
    assert ranked(SCORES.scores, "memory") == ranked(SCORES, "memory")
    assert ranked(SCORES.without("L4H1"), "memory")[0] == Head(5, 0)
    assert prune(SCORES, "memory", 2).heads == (Head(4, 1), Head(5, 0))
    # Never a head of the other kind, however many are asked for.
    assert prune(SCORES, "context", 20).heads == (Head(2, 2), Head(4, 3), Head(5, 2))


def test_refusals():
    with pytest.raises(ValueError, match="no memory head"):
        prune(HeadScores.of(-np.ones((2, 3))), "memory", 1)
    with pytest.raises(ValueError, match="one head or more"):
        prune(SCORES, "memory", 0)


def test_pruning_works_while_generating_and_with_other_edits(model, cases):
    for case in cases[:4]:
        memory, context = case.memory[0], case.context[0]
        made = [model.generate([case.clean], 1, write=write)[0][0] for write in (
            prune(SCORES, "context", 2), prune(SCORES, "memory", 2, phase="prefill"),
            [prune(SCORES, "context", 2), interp.ablate("L0H0")],
            [prune(SCORES, "memory", 2), interp.scale("L4H3", 0.5)])]
        assert made == [memory, context, memory, context]


def test_zero_and_mean_pruning_differ(model, cases):
    value = interp.causal.ablate.mean_output(model, [c.clean for c in cases])
    rows = [model.run(cases[0].clean, write=prune(SCORES, "memory", 1, by=by, value=v)).logits[0][-1]
            for by, v in (("zero", None), ("mean", value))]
    assert float((rows[0] - rows[1]).abs().max()) > 0.1


def test_the_number_is_what_does_best_on_the_development_prompts(model, cases):
    prompts, wanted = [c.clean for c in cases], [c.context[0] for c in cases]
    found = choose_count(model, prompts, wanted, SCORES, "memory", counts=(1, 2, 3, 9))
    assert found["usage"].dims == ("count", "prompt") and list(found["count"]) == [1, 2, 3]
    means = found["usage"].mean("prompt")
    assert float(means.sel(count=2)) == 1.0
    assert float(found["chosen"]) in (1, 2, 3)
    assert float(means.sel(count=int(found["chosen"]))) == float(means.max())
    with pytest.raises(ValueError, match="there are 3 memory heads"):
        choose_count(model, prompts, wanted, SCORES, "memory", counts=(9,))
    with pytest.raises(ValueError, match="no prompts"):
        choose_count(model, [], [], SCORES, "memory")


def test_usage_counts_first_tokens(model, cases):
    prompts = [c.clean for c in cases]
    memory = Answers("m", [c.memory[0] for c in cases], key="both")
    context = Answers("c", [c.context[0] for c in cases], key="both")
    assert memory.shared == context.shared
    a, b = memory(model, prompts), context(model, prompts)
    # Even numbers are remembered strongly.
    assert np.array_equal(a, (np.arange(len(cases)) + 1) % 2) and np.array_equal(a + b, np.ones(len(a)))
    logs = Answers("l", [c.memory[0] for c in cases], log_prob=True)(model, prompts)
    assert (logs[a == 1] > np.log(0.5)).all() and (logs[a == 0] < np.log(0.5)).all()
