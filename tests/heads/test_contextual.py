"""Contextual heads: the pure score, equality with dense attention, and a planted head that is found."""

import numpy as np
import pytest
import torch

import interp
from interp.core import PromptError
from interp.core.errors import OutOfRange
from interp.heads import contextual
from interp.models.model import Model
from interp.organisms import reader
from interp.prompts import documents
from interp.prompts.documents import Documents

COUNT = 4


def asked(seed: int, d_vocab: int = 90, length: int = 5) -> Documents:
    """Four documents of random tokens between two others and a question of two."""
    rng = np.random.default_rng(seed)
    place = seed % COUNT
    segments = {f"document_{i}": interp.Segment(
        f"document_{i}", tuple(range(2 + length * i, 2 + length * (i + 1))), "document")
        for i in range(COUNT)}
    segments["gold"] = interp.Segment("gold", segments[f"document_{place}"].positions, "gold")
    ids = rng.integers(3, d_vocab, 4 + length * COUNT)
    prompt = interp.Prompt.from_tokens(ids, segments)
    answer = tuple(int(i) for i in rng.integers(3, d_vocab, 3))
    return Documents(prompt, prompt, prompt, answer, place, COUNT)


def test_masses_are_found_where_they_were_put():
    attention = torch.zeros(2, 3, 4, 12)  # layer, head, query, key
    attention[..., 0] = 0.1
    attention[1, 2, :, 4:7] = 0.25  # this head looks at document 1
    attention[0, 1, :, 7:10] = 0.3  # and this one at document 2
    found = contextual.masses(attention, [[2, 3], [4, 5, 6], [7, 8, 9]], 1)
    assert float(found["relevant"][1, 2]) == pytest.approx(0.75)
    assert float(found["per_token"][1, 2]) == pytest.approx(0.25)
    assert float(found["ratio"][1, 2]) == pytest.approx(1.0)
    assert float(found["relevant"][0, 1]) == 0 and float(found["strongest"][0, 1]) == pytest.approx(0.9)
    assert torch.allclose(found["sink"], torch.full((2, 3), 0.1))
    assert float(found["relevant"].sum()) == pytest.approx(0.75)
    # Document numbers do not matter, only which is gold.
    again = contextual.masses(attention, [[7, 8, 9], [2, 3], [4, 5, 6]], 2)
    assert all(torch.equal(found[name], again[name]) for name in found)


def test_rows_are_averaged_and_positions_checked():
    rows = torch.tensor([[[[0.0, 1.0], [0.0, 0.5]]]])
    assert float(contextual.score(rows, [1])[0, 0]) == 0.75
    with pytest.raises(OutOfRange, match="no document 3 among 1"):
        contextual.masses(rows, [[1]], 3)
    with pytest.raises(OutOfRange, match="position 5"):
        contextual.masses(rows, [[5]], 0)
    with pytest.raises(PromptError, match="answer is empty"):
        contextual.with_answer(interp.Prompt.from_tokens([1, 2]), [])


@pytest.mark.parametrize("architecture", ["llama", "gemma2", "gpt_oss", "gpt2"])
@pytest.mark.parametrize("rows", ["predicting", "answer"])
def test_a_measurement_is_the_score_of_the_dense_rows(tiny, architecture, rows):
    model = Model(tiny(architecture), f"tiny-{architecture}")
    made = [asked(seed) for seed in range(3)]
    found = contextual.measure(model, made, answers=[one.answer for one in made], rows=rows)
    assert found["score"].dims == ("layer", "head")
    for number, one in enumerate(made):
        n = len(one.prompt)
        longer = interp.Prompt.from_tokens([*one.prompt.ids, *one.answer])
        pattern = model.run(longer, read="pattern").reads["pattern"].values[0]
        first = n - 1 if rows == "predicting" else n
        places = [one.document(i) for i in range(COUNT)]
        wanted = contextual.masses(pattern[:, :, first : first + 3], places, one.place)
        here = found.data.isel(sample=number)
        known = here["relevant"].notnull().values
        assert known[1].all()
        for name in contextual.MASSES:
            assert np.allclose(here[name].values[known], wanted[name].numpy()[known], atol=2e-6)
    windowed = architecture in ("gemma2", "gpt_oss")
    # A window of five keys never reaches the first document: not eligible, rather than zero.
    far = contextual.measure(model, [asked(0), asked(4)], answers=[[5], [6]])
    eligible = far["eligible"].values
    assert bool(eligible[0].any()) != windowed and eligible[1].all()
    assert not windowed or contextual.scores(far).top(18)[0].layer == 1


def test_reader_looks_where_the_answer_is_and_moves_with_it():
    model = interp.open_model("reader")
    made = documents.synthetic(reader, np.random.default_rng(0), (0, 3, 5), count=6, each=3)
    found = contextual.measure(model, made, new_tokens=4)
    best = contextual.scores(found).top(1)[0]
    assert found["correct"].values.all() and found["rows"].values.min() == 3
    assert float(found["frequency"][best.layer, best.head]) == 1.0
    assert float(found["score"].max()) > 5 * float(found["null"][best.layer, best.head])
    # Control: a document named gold that is not gets no more than its share.
    wrong = [Documents(one.prompt, one.gold_only, one.blank, one.answer, (one.place + 1) % 6, 6)
             for one in made]
    other = contextual.measure(model, wrong, answers=[one.answer for one in made])
    assert float(other["score"][best.layer, best.head]) < 0.3 * float(found["score"].max())


def test_boosting_the_gold_document_moves_the_measured_mass():
    model = interp.open_model("reader")
    made = documents.synthetic(reader, np.random.default_rng(1), (0, 2), count=3, each=2)
    answers = [one.answer for one in made]
    plain, same, boosted = (
        contextual.measure(model, made, answers=answers, write=write)["relevant"].values
        for write in ((), (interp.reweigh("gold", 1.0),),
                      (interp.reweigh("gold", power=0.1, heads="L2H1"),)))
    assert np.allclose(plain, same, atol=1e-6)
    assert (boosted[:, 2, 1] > plain[:, 2, 1] + 0.3).all()
    assert np.allclose(boosted[:, :2], plain[:, :2], atol=1e-6)


def test_copied_rows_only_and_unanswered_prompts():
    model = interp.open_model("reader")
    made = documents.synthetic(reader, np.random.default_rng(2), (0, 1), count=2, each=2)
    river = reader.TOKEN["dozen"]
    answers = [[*one.answer[:2], river] for one in made]
    found = contextual.measure(model, made, answers=answers, copied_only=True)
    assert found["rows"].values.tolist() == [
        2 + (river in [one.prompt.ids[p] for p in one.document(one.place)]) for one in made]
    none = contextual.measure(model, made, answers=[[], [], [], made[3].answer])
    assert none.manifest["unanswered"] == 3
    assert np.isnan(none["relevant"].values[:3]).all()
    assert np.isfinite(none["score"].values).all()
    empty = contextual.measure(model, made[:2], answers=[[], []])
    assert np.isnan(empty["score"].values).all() and not contextual.scores(empty).top(3)


def test_bad_input_is_one_sentence():
    model = interp.open_model("reader")
    made = documents.synthetic(reader, np.random.default_rng(3), (0,), count=2)
    with pytest.raises(PromptError, match="at least one"):
        contextual.measure(model, [])
    with pytest.raises(PromptError, match="2 answers for 1 prompts"):
        contextual.measure(model, made, answers=[[1], [2]])
