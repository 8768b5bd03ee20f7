"""Ranked sweeps: verified values are exact, planted cells are found, and low recall is not hidden."""

import copy
import functools

import numpy as np
import pytest
import torch

import interp
from interp.causal.metrics import AnswerLogProb, LogitDifference, TextLoss
from interp.causal.ranked import Recall, ranked_sweep, recall
from interp.core import Prompt, PromptError
from interp.models.model import Model

N = 12
SOME = ("llama", "gemma2", "gpt_oss")


@pytest.fixture(scope="module")
def opened(tiny):
    return functools.cache(lambda architecture: Model(tiny(architecture), f"tiny-{architecture}"))


def prompts(count=2):
    rng = np.random.default_rng(0)
    return [Prompt.from_tokens(rng.integers(3, 90, N), {"some": (6, 11)}) for _ in range(count)]


def difference(model, given, write, a=5, b=9):
    rows = model.run(given, write=write, logits="last").logits[0][-1].double()
    return float(rows[a] - rows[b])


@pytest.mark.parametrize("architecture", SOME)
def test_measured_cells_are_whole_passes_and_the_last_block_is_scored_exactly(opened, architecture):
    model, given = opened(architecture), prompts()
    metric, layers = LogitDifference([5, 5], [9, 9]), range(model.n_layers)
    size = max(abs(difference(model, one, ())) for one in given)
    heads = ranked_sweep(model, given, metric, audit=None)
    places = ranked_sweep(model, given, metric, "positions", where="some", audit=None)

    def cut(layer, place):
        return interp.block([q for q in range(N) if q != place], [place],
                            layers=list(layers)[layer:])

    for found, write in ((heads, lambda a, b: interp.ablate(f"L{a}H{b}")),
                         (places, lambda a, b: cut(a, 6 + b))):
        cells = found["exact"].values
        assert np.isfinite(cells).all()
        for a, b in np.ndindex(*cells.shape):
            expected = np.mean([difference(model, one, write(a, b)) - difference(model, one, ())
                                for one in given])
            assert cells[a, b] == pytest.approx(expected, abs=2e-5 * size)
        # In the last block a cell acts through the last row alone, which the score has exactly.
        assert np.allclose(found["score"][-1], cells[-1], atol=2e-5 * size)
        assert np.ptp(cells[-1]) > 1e-3 * size
        assert not np.allclose(found["score"][0], cells[0], atol=1e-3 * size)
        wanted = found.manifest["wanted"]
        exact_top = np.argsort(-np.abs(cells).ravel(), kind="stable")[:wanted]
        inside = (found["measured"].values.ravel()[exact_top] == "verified").mean()
        assert float(found["recall"]) == pytest.approx(inside)
        assert float(found["recall_low"]) <= inside <= float(found["recall_high"])


def test_a_planted_head_is_found_and_costs_little(tiny):
    """One head of three blocks reaches the stream; where none does, nothing has an effect."""
    hf = copy.deepcopy(tiny("llama"))
    with torch.no_grad():
        for number, block in enumerate(hf.model.layers):
            kept = block.self_attn.o_proj.weight[:, 16:24].clone()
            block.self_attn.o_proj.weight.zero_()
            if number == 1:
                block.self_attn.o_proj.weight[:, 16:24] = 3 * kept
    model, given = Model(hf, "planted"), prompts()
    found = ranked_sweep(model, given, AnswerLogProb([[5], [6]]), share=1 / 18, factor=1, audit=8)
    assert found["top"].values.nonzero() == (np.array([1]), np.array([2]))
    assert float(found["recall"]) == 1 and found.manifest["recall_is"] == "unsure"
    audited = found["exact"].values[found["measured"].values == "audit"]
    assert len(audited) == 8 and np.abs(audited).max() < 1e-5 < abs(float(found["exact"][1, 2]))
    assert np.isnan(found["exact"].values[found["measured"].values == ""]).all()
    assert float(found["prefills"] - found["prefills_audit"]) < float(found["naive_prefills"]) / 2


def test_saturated_attention_hides_cells_from_the_scores_and_the_result_says_so(tiny):
    """With logits that large, attention is a choice of one key: it has no gradient, but it flips."""
    hf = copy.deepcopy(tiny("llama"))
    with torch.no_grad():
        for block in hf.model.layers[1:]:
            block.self_attn.q_proj.weight *= 60.0
    model, given = Model(hf, "saturated"), prompts(1)
    found = ranked_sweep(model, given, LogitDifference([5], [9]), "positions", factor=1, audit=None)
    plain = ranked_sweep(Model(tiny("llama"), "plain"), given, LogitDifference([5], [9]),
                         "positions", factor=1, audit=None)
    assert float(found["recall"]) < float(plain["recall"])
    assert found.manifest["recall_is"] == "low" and "LOW" in found.manifest["audit"]
    some = ranked_sweep(model, given, LogitDifference([5], [9]), "positions", factor=1, audit=20)
    assert some.manifest["recall_is"] == "low" and float(some["recall"]) < 0.95


def test_the_interval_holds_what_it_should():
    """Over random samples of a known population the true recall lies inside in 95 % of cases."""
    rng, inside, trials = np.random.default_rng(0), 0, 300
    for _ in range(trials):
        verified, rest = rng.random(20) + 0.6, rng.random(80)
        every = np.concatenate([verified, rest])
        true = (np.argsort(-every)[:12] < 20).mean()
        found = recall(verified, rng.choice(rest, 25, replace=False), 80, 12)
        inside += found.low <= true <= found.high
    assert inside / trials >= 0.95
    assert recall(np.ones(3), np.zeros(0), 5, 2).verdict == "unsure"
    assert recall(np.ones(3), np.zeros(5), 5, 2) == Recall(1.0, 1.0, 1.0)
    assert recall(np.array([3.0, 2.0, 1.0]), np.array([9.0, 8.0]), 2, 2).value == 0.0


def test_bad_input_is_one_sentence(opened):
    model, given = opened("llama"), prompts()
    metric = LogitDifference([5, 5], [9, 9])
    with pytest.raises(PromptError, match="cannot rank 'edges'; choose one of: heads, positions"):
        ranked_sweep(model, given, metric, "edges")
    with pytest.raises(PromptError, match="needs a metric of the last row that has a gradient"):
        ranked_sweep(model, given, AnswerLogProb([[5, 6], [7]]))
    with pytest.raises(PromptError, match="not TextLoss"):
        ranked_sweep(model, given, TextLoss())
    with pytest.raises(PromptError, match="1 answers for 2 prompts"):
        ranked_sweep(model, given, LogitDifference([5], [9]))
    with pytest.raises(PromptError, match=r"these have \[2, 5\] of them"):
        ranked_sweep(model, [given[0], Prompt.from_tokens(range(9), {"some": (1, 3)})], metric,
                     "positions", where="some")
    with pytest.raises(ValueError, match="share must lie"):
        ranked_sweep(model, given, metric, share=0)
