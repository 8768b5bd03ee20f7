"""Memory and context heads: planted ones are found, and nothing else is."""

import numpy as np
import pytest
import torch

from interp.causal.prune import ranked
from interp.core import Head
from interp.heads import memory_context
from interp.models.model import Model
from interp.organisms import conflict_circuit as planted
from interp.prompts.conflict import closed_book


@pytest.fixture(scope="module")
def cases():
    return planted.cases()


@pytest.fixture(scope="module")
def model():
    return Model(planted.build(), "planted")


@pytest.fixture(scope="module")
def found(model, cases):
    return {kind: memory_context.measure(model, [c for c in cases if c.format == kind])
            for kind in ("none", "substitution", "coherent")}


def test_the_score_is_the_mean_of_the_difference_of_changes():
    change = np.zeros((3, 2, 4, 2))
    change[:, 1, 2] = [[1.0, -2.0], [2.0, -1.0], [0.0, 0.0]]
    made = memory_context.score(change)
    assert made.shape == (2, 4) and float(made[1, 2]) == 2.0
    assert float(made.abs().sum()) == 2.0
    # Both answers raised alike say nothing about either.
    assert torch.equal(memory_context.score(change + 7.0), made)
    assert torch.equal(memory_context.score(-change), -made)


@pytest.mark.parametrize("kind", ["substitution", "coherent"])
def test_planted_heads_are_found_with_their_sign_and_no_others(found, kind):
    scores = memory_context.scores(found[kind])
    assert set(scores.top(2)) == {Head(*h) for h in planted.MEMORY_HEADS}
    assert set(ranked(scores, "context")[:2]) == {Head(*h) for h in planted.CONTEXT_HEADS}
    rest = [h for h in memory_context.strongest(found[kind], 24)[4:]]
    assert len(rest) == 20 and max(abs(scores[h]) for h in rest) < 0.05
    for head in (*planted.MEMORY_HEADS, *planted.CONTEXT_HEADS):
        null = float(found[kind]["null"].sel(layer=head[0], head=head[1]))
        assert abs(scores[Head(*head)]) > 3 * null > 0
        assert abs(scores[Head(*head)]) > 3 * memory_context.chance(found[kind])
    assert memory_context.chance(found[kind]) >= float(found[kind]["null"].max())


def test_without_a_context_only_memory_heads_act(found):
    scores = memory_context.scores(found["none"])
    assert set(scores.top(2)) == {Head(*h) for h in planted.MEMORY_HEADS}
    assert max(abs(scores[Head(*h)]) for h in planted.CONTEXT_HEADS) < 0.05


def test_samples_say_which_answer_moved(found):
    one = found["substitution"]
    assert one["samples"].dims == ("sample", "layer", "head")
    np.testing.assert_allclose(one["samples"], one["context"] - one["memory"], atol=1e-9)
    np.testing.assert_allclose(one["samples"].mean("sample"), one["score"], atol=1e-9)
    memory, context = planted.MEMORY_HEADS[0], planted.CONTEXT_HEADS[0]
    assert (one["memory"].sel(layer=memory[0], head=memory[1]) < 0).all()
    assert (one["context"].sel(layer=context[0], head=context[1]) < 0).all()
    assert float(one["frequency"].sel(layer=memory[0], head=memory[1])) == 1.0
    assert float(one["frequency"].sel(layer=context[0], head=context[1])) == 0.0
    # Half of the subjects are remembered more strongly than the context.
    assert float((one["before"] < 0).mean()) == 0.5


@pytest.mark.parametrize("missing", ["memory", "context"])
def test_heads_that_were_not_planted_are_not_found(cases, missing):
    twin = Model(planted.build(**{missing: False}), "twin")
    some = [c for c in cases if c.format == "substitution"]
    scores = memory_context.scores(memory_context.measure(twin, some))
    gone, left = planted.MEMORY_HEADS, planted.CONTEXT_HEADS
    if missing == "context":
        gone, left = left, gone
    assert max(abs(scores[Head(*h)]) for h in gone) < 0.05
    assert min(abs(scores[Head(*h)]) for h in left) > 1.0


def test_screening_by_gradient_keeps_the_heads_that_matter(model, cases, found):
    some = [c for c in cases if c.format == "substitution"]
    screened = memory_context.measure(model, some, screen=0.25)
    assert int(screened["eligible"].sum()) == 6
    full = found["substitution"]
    for layer, head in (*planted.MEMORY_HEADS, *planted.CONTEXT_HEADS):
        a, b = (float(x["score"].sel(layer=layer, head=head)) for x in (screened, full))
        assert a == pytest.approx(b, abs=1e-3)
    assert np.isnan(screened["score"].where(~screened["eligible"])).all()
    assert len(memory_context.scores(screened).top(24)) == 6


def test_no_case_means_no_scores_and_says_so(model):
    nothing = memory_context.measure(model, [])
    assert np.isnan(nothing["score"]).all() and not nothing["eligible"].any()
    assert nothing.manifest["n"] == 0 and "closed-book" in nothing.manifest["note"]
    assert memory_context.scores(nothing).top(3) == [] and np.isnan(memory_context.chance(nothing))


def test_what_is_known_is_measured_not_assumed(cases):
    model = Model(planted.build(memory=False), "forgot")
    assert not any(closed_book(model, cases))


def test_pruning_one_kind_lets_the_other_win(model, cases, found):
    some = [c for c in cases if c.format == "coherent"]
    done = memory_context.intervene(model, some, found["substitution"], counts=(0, 1, 2), seeds=5,
                                    neutral=[c.closed_book for c in some[:3]])
    memory, context = (done[f"{kind}_usage"].mean(("seed", "prompt"))
                       for kind in ("memory", "context"))
    at = dict(condition="top", count=2)
    assert float(memory.sel(against="context", **at)) == 1.0
    assert float(context.sel(against="memory", **at)) == 1.0
    for kind in ("memory", "context"):
        start = {"against": kind, "condition": "top", "count": 0}
        assert float(memory.sel(start)) == float(context.sel(start)) == 0.5
        same = {"against": kind, "condition": "random", "count": 2}
        assert float(memory.sel(same)) == float(context.sel(same)) == 0.5
    assert done["text_loss"].dims[-1] == "sample" and done["text_loss"].sizes["sample"] == 3


def test_bad_input_is_a_sentence(model, cases):
    with pytest.raises(ValueError, match="no conflicts to prune"):
        memory_context.intervene(model, [], memory_context.measure(model, cases[:2]))
    with pytest.raises(ValueError, match="share from 0 to 1"):
        memory_context.measure(model, cases[:2], screen=1.5)
    with pytest.raises(ValueError, match="zero or unknown"):
        memory_context.intervene(model, cases[:2], memory_context.measure(model, []))
