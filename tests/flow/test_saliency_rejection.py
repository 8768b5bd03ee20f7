"""Saliency of the row that predicts; the released row is exactly zero; rejection by saliency."""

import numpy as np
import pytest
import torch

import interp
from interp.causal.decoding import decode
from interp.core.errors import PromptError
from interp.flow.saliency_rejection import SGRS, measure, released_row, row_saliency, score
from interp.models.head_gradients import head_gradients
from interp.models.model import Model
from interp.models.stepping import Stepping

SAID = [8, 30, 41, 12]


@pytest.fixture(scope="module")
def model(tiny):
    return Model(tiny("llama"), "tiny-llama")


def prompt(seed=0, length=9):
    return interp.Prompt.from_tokens(np.random.default_rng(seed).integers(3, 90, length))


def test_saliency_of_a_row_has_length_one_and_no_scale():
    generator = torch.Generator().manual_seed(0)
    attention, gradient = torch.rand(5, 20, generator=generator), torch.randn(
        5, 20, generator=generator)
    found = row_saliency(attention, gradient)
    assert float(found.norm()) == pytest.approx(1.0) and bool((found >= 0).all())
    assert torch.allclose(row_saliency(attention, 1e-6 * gradient), found, atol=1e-5)
    assert torch.equal(row_saliency(attention, 0 * gradient), torch.zeros(20))
    assert np.isnan(score({1: (attention, gradient)}, []))


def test_scores_are_those_of_a_whole_backward_pass(model):
    given = [prompt(0), prompt(1, 12)]
    found = measure(model, given, [SAID, SAID[:2]], layers=[0, 2])
    for one, said, values in zip(given, (SAID, SAID[:2]), found):
        assert [len(v) for v in values.values()] == [len(said)] * 3
        for step in range(1, len(said)):
            whole = interp.Prompt((*one.ids, *said[:step]))
            gradients = head_gradients(
                model, whole, lambda x: -x[-1].log_softmax(-1)[said[step]])  # noqa: B023
            pattern = model.run(whole, read="pattern").reads["pattern"].values[0]
            rows = {n: (pattern[n][:, -1], gradients.by_attention(n)[:, -1]) for n in (0, 2)}
            history = range(len(one), len(one) + step)
            assert values["saliency"][step] == pytest.approx(score(rows, history), rel=1e-3)
            assert values["loss"][step] == pytest.approx(gradients.loss, rel=1e-3)
            raw = np.mean([pattern[n][:, -1].mean(0)[list(history)].mean() for n in (0, 2)])
            assert values["attention"][step] == pytest.approx(raw, rel=1e-3)
        assert np.isnan(values["saliency"][0]) and np.isnan(values["attention"][0])
    with pytest.raises(PromptError, match="at least one"):
        measure(model, given, [SAID, []])


def test_the_released_row_has_no_gradient_and_the_predicting_one_has(model):
    rows = released_row(model, prompt(0), SAID, layers=[0, 1, 2])
    whole = interp.Prompt((*prompt(0).ids, *SAID))
    pattern = model.run(whole, read="pattern").reads["pattern"].values[0]
    for layer, (attention, gradient) in rows.items():
        assert bool((gradient == 0).all())
        assert np.allclose(attention, pattern[layer][:, -1], atol=1e-5)
    assert score(rows, range(9, 12)) == 0.0
    assert measure(model, [prompt(0)], [SAID], layers=[0, 1, 2])[0]["saliency"][-1] > 0.001


def test_candidates_are_drawn_from_the_best_by_probability(model):
    made = [decode(model, prompt(0), SGRS(seed=s, top=3), 5)[0] for s in range(6)]
    assert len({tuple(one.tokens) for one in made}) > 1
    for one in made:
        for token, row in zip(one.tokens, one.first):
            assert token in row.topk(3).indices
    assert decode(model, prompt(0), SGRS(top=1), 5)[0].tokens == model.generate(prompt(0), 5)[0]
    again = decode(model, prompt(0), SGRS(seed=2, top=3), 5)[0]
    assert again.tokens == made[2].tokens


class Planted(Stepping):
    """Three words were said; candidates of odd number feel them ten times less than even ones."""

    def __init__(self):
        self.prompts, self.fed, self.asked = [prompt(0)], [[5, 6, 7]], []

    def gradient_by_attention(self, tokens):
        self.asked.append(list(tokens))
        rows = []
        for token in tokens:
            gradient = torch.ones(2, 12)
            gradient[:, 9:] = 0.1 if token % 2 else 1.0
            rows.append({0: (torch.ones(2, 12), gradient)})
        return rows


def test_candidates_of_low_saliency_are_drawn_again_until_the_tries_are_used():
    logits = torch.full((1, 30), -50.0)
    logits[0, [3, 5, 8, 9]] = torch.tensor([2.0, 1.9, 1.8, 1.7])
    salient = score({0: (torch.ones(2, 12), torch.ones(2, 12))}, [9, 10, 11])
    odd, tries = [], []
    for seed in range(20):
        steps, memory = Planted(), {"accepted": [[salient] * 5]}
        (token,) = SGRS(seed=seed, tries=4).choose(steps, logits, memory)
        assert token == 8 and steps.asked[-1] == [8]    # the only one of even number
        tries.append(len(steps.asked))
        steps, memory = Planted(), {"accepted": [[salient] * 5]}
        odd.append(SGRS(seed=seed, tries=2).choose(steps, logits, memory)[0])
        # No limit accepts the first draw, which is what the released code does.
        first = SGRS(seed=seed, alpha=0.0).choose(Planted(), logits, {})[0]
        assert first == SGRS(seed=seed, row="released").choose(Planted(), logits, {})[0]
    assert set(tries) == {1, 2, 3, 4}
    # Two tries do not always suffice: then the best of those tried is taken.
    assert {token % 2 for token in odd} == {0, 1}
    steps, memory = Planted(), {"accepted": [[0.01] * 5]}
    SGRS(seed=0).choose(steps, logits, memory)
    assert len(steps.asked) == 1 and len(memory["accepted"][0]) == 6
