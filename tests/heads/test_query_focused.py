"""Query-focused heads: calibration cancels what is there without a question, planted ranks are found."""

import numpy as np
import pytest
import torch

import interp
from interp.core import PromptError
from interp.heads import query_focused as qr
from interp.models.model import Model
from interp.organisms import reader
from interp.prompts import documents
from interp.prompts.documents import Documents


def test_relevance_is_what_the_question_adds():
    rng = np.random.default_rng(0)
    blank = torch.tensor(rng.random((2, 3, 12)))  # layer, head, key
    asked = blank.clone()
    asked[1, 2, 4:8] += 0.2  # the second document gains in one head
    found = qr.relevance(asked, blank, [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9, 10, 11]])
    assert float(found[1, 2, 1]) == pytest.approx(0.8)
    found[1, 2, 1] = 0.0
    assert float(found.abs().max()) == 0.0
    # A prior of any size cancels, and so does the length of the other documents.
    bias = torch.tensor(rng.random(12))
    again = qr.relevance(asked + bias, blank + bias, [[4, 5, 6, 7]])
    assert float(again[1, 2, 0]) == pytest.approx(0.8)
    assert torch.allclose(qr.score(asked, blank, [4, 5, 6, 7]), again[..., 0])


def test_outlying_tokens_are_dropped_below_but_not_above():
    gain = torch.full((10,), 0.1)
    gain[3] = -5.0
    kept = qr.relevance(gain, torch.zeros(10), [list(range(10))])
    assert float(kept) == pytest.approx(0.9)
    gain[3] = 5.0
    assert float(qr.relevance(gain, torch.zeros(10), [list(range(10))])) == pytest.approx(5.9)


@pytest.mark.parametrize("place, wanted", [(2, 1.0), (0, 1 / np.log2(3)), (1, 1 / np.log2(4))])
def test_ndcg_of_one_gold_document(place, wanted):
    assert float(qr.ndcg(torch.tensor([0.3, 0.1, 0.5]), place)) == pytest.approx(wanted)


def test_ndcg_counts_ten_documents_and_ties_against_the_gold_one():
    values = torch.arange(12.0)
    assert float(qr.ndcg(values, 1)) == 0.0 and float(qr.ndcg(values, 2)) > 0
    assert float(qr.ndcg(torch.zeros(4), 0)) == pytest.approx(1 / np.log2(5))


def asked(seed: int, blank_seed: int, n: int = 4, length: int = 3) -> Documents:
    rng = np.random.default_rng(seed)
    segments = {f"document_{i}": interp.Segment(
        f"document_{i}", tuple(range(1 + length * i, 1 + length * (i + 1))), "document")
        for i in range(n)}
    ids = rng.integers(3, 90, 1 + n * length).tolist()
    made = [interp.Prompt.from_tokens(
        [*ids, *np.random.default_rng(s).integers(3, 90, 2).tolist()], segments)
        for s in (seed + 50, blank_seed)]
    return Documents(made[0], made[0], made[1], (1,), seed % n, n)


@pytest.mark.parametrize("architecture", ["llama", "gpt_oss"])
def test_a_measurement_is_the_score_of_the_dense_pattern(tiny, architecture):
    model = Model(tiny(architecture), f"tiny-{architecture}")
    made = [asked(seed, 99) for seed in range(3)]
    found = qr.measure(model, made, batch_size=2)
    for number, one in enumerate(made):
        dense = [model.run(p, read="pattern").reads["pattern"].values[0][:, :, -2:].mean(2)
                 for p in (one.prompt, one.blank)]
        places = [one.document(i) for i in range(4)]
        wanted = qr.relevance(*dense, places).numpy()
        got = found["documents"].values[number]
        known = np.isfinite(got)
        assert known[1].all() and np.allclose(got[known], wanted[known], atol=2e-6)
    # The windowed layers of gpt-oss (5 keys) cannot see the first documents.
    assert found["eligible"].values[0].any() == (architecture == "llama")
    assert found["eligible"].values[1].all()


def test_with_the_same_question_in_both_prompts_nothing_is_relevant(tiny):
    model = Model(tiny("llama"), "tiny-llama")
    made = [asked(seed, seed + 50) for seed in range(3)]
    assert np.abs(qr.measure(model, made)["documents"].values).max() == 0


def test_the_readers_heads_rank_the_gold_document():
    model = interp.open_model("reader")
    made = documents.synthetic(reader, np.random.default_rng(0), (0, 3, 5), count=6, each=4)
    found = qr.measure(model, made)
    top = qr.scores(found).top(2)
    assert qr.auroc(found, top).mean() > 0.95
    assert qr.rank(found, top).argmax(1).tolist() == [one.place for one in made]
    worst = qr.scores(found).top(16)[-2:]
    assert abs(qr.auroc(found, worst).mean() - 0.5) < 0.35
    best = top[0]
    assert found["score"].values[best] > 5 * abs(found["null"].values[best])
    assert qr.scores(found, "ndcg").max() > 0.95
    # Control: with the gold label on another document, the same heads rank it low.
    shifted = [Documents(o.prompt, o.gold_only, o.blank, o.answer, (o.place + 1) % 6, 6)
               for o in made]
    assert qr.auroc(qr.measure(model, shifted), top).mean() < 0.6


def test_bad_input_is_one_sentence():
    model = interp.open_model("reader")
    (one,) = documents.synthetic(reader, np.random.default_rng(0), (0,), count=3)
    with pytest.raises(PromptError, match="at least one prompt"):
        qr.measure(model, [])
    (other,) = documents.synthetic(reader, np.random.default_rng(0), (0,), count=3, words=9)
    moved = Documents(one.prompt, one.gold_only, other.blank, one.answer, 0, 3)
    with pytest.raises(PromptError, match="do not stand where they do"):
        qr.measure(model, [moved])
