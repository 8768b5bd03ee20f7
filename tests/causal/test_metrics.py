"""Metrics are what their names say, computed by hand from the transformers model."""

import numpy as np
import pytest
import torch

import interp
from interp.causal.metrics import (
    AnswerAccuracy,
    AnswerLogProb,
    AnswerRecall,
    LogitDifference,
    TextLoss,
)
from interp.core.errors import PromptError
from interp.models.model import Model


@pytest.fixture(scope="module")
def model(tiny):
    return Model(tiny("llama"), "tiny-llama")


def prompts(lengths=(9, 9, 12)):
    rng = np.random.default_rng(0)
    return [interp.Prompt.from_tokens(rng.integers(3, 90, n)) for n in lengths]


def rows(model, ids):
    with torch.no_grad():
        return model.hf(input_ids=torch.tensor([ids])).logits[0].float()


@pytest.mark.parametrize("decode_last", [False, True])
def test_the_log_probability_is_that_of_the_answer_after_the_prompt(model, decode_last):
    given, answers = prompts(), [[4, 8], [5], [6, 7]]
    found = AnswerLogProb(answers, decode_last)(model, given)
    for prompt, answer, value in zip(given, answers, found):
        ids = [*prompt.ids, *answer]
        log_p = rows(model, ids).log_softmax(-1)
        expected = np.mean([float(log_p[len(prompt) - 1 + i, t]) for i, t in enumerate(answer)])
        assert value == pytest.approx(expected, abs=1e-4)


def test_accuracy_is_greedy_decoding_and_recall_counts_tokens(model):
    given = prompts()
    greedy = model.generate(given, 3)
    wrong = [[row[0], (row[1] + 1) % 90, row[2]] for row in greedy]
    assert AnswerAccuracy(greedy)(model, given).tolist() == [1, 1, 1]
    assert AnswerAccuracy([greedy[0], wrong[1], greedy[2]])(model, given).tolist() == [1, 0, 1]
    assert AnswerRecall(greedy)(model, given).tolist() == [1, 1, 1]
    backwards = [row[::-1] for row in greedy]
    assert AnswerRecall(backwards)(model, given).tolist() == [1, 1, 1]
    twice = [[row[0], row[0], row[0], row[0]] for row in greedy]
    made = model.generate(given, 4)
    shares = [min(row.count(row[0]), 4) / 4 for row in made]
    assert AnswerRecall(twice)(model, given).tolist() == shares


def test_interventions_reach_the_rows_that_decide(model):
    given, answers = prompts((9, 9)), [[4, 8], [5, 6]]
    heads = [f"L{a}H{b}" for a in range(3) for b in range(6)]
    base = AnswerLogProb(answers)(model, given)
    everywhere = AnswerLogProb(answers)(model, given, interp.ablate(heads))
    assert np.abs(everywhere - base).min() > 1e-3
    # Decode-only leaves the first answer token alone, unless the last prompt token is decoded.
    decode = interp.ablate(heads, phase="decode")
    first = [[a[0]] for a in answers]
    assert np.allclose(AnswerLogProb(first)(model, given, decode), AnswerLogProb(first)(model, given),
                       atol=1e-5)
    late = AnswerLogProb(first, decode_last=True)
    assert np.abs(late(model, given, decode) - late(model, given)).min() > 1e-3
    own = interp.each([decode, ()])
    moved = late(model, given, own) - late(model, given)
    assert abs(moved[0]) > 1e-3 and abs(moved[1]) < 1e-5


def test_neutral_text_is_the_loss_of_its_own_tokens(model):
    given = prompts()
    found = TextLoss()(model, given)
    for prompt, value in zip(given, found):
        logits = rows(model, list(prompt.ids))[:-1]
        loss = torch.nn.functional.cross_entropy(logits, torch.tensor(prompt.ids[1:]))
        assert value == pytest.approx(float(loss), abs=1e-4)
    other = prompts((7, 8, 9, 10))
    assert np.allclose(TextLoss(other)(model, given), TextLoss()(model, other))
    # Image tokens are no targets.
    framed = interp.Prompt.from_tokens(given[0].ids, {"image": (2, 5)})
    logits = rows(model, list(framed.ids))[:-1]
    each = torch.nn.functional.cross_entropy(logits, torch.tensor(framed.ids[1:]), reduction="none")
    expected = float(each[[0, 4, 5, 6, 7]].mean())
    assert TextLoss()(model, [framed])[0] == pytest.approx(expected, abs=1e-4)


def test_the_logit_difference_is_antisymmetric_and_of_the_last_row(model):
    given, a, b = prompts(), [4, 5, 6], [7, 8, 9]
    found = LogitDifference(a, b)(model, given)
    assert np.allclose(found, -LogitDifference(b, a)(model, given))
    last = rows(model, list(given[2].ids))[-1]
    assert found[2] == pytest.approx(float(last[6] - last[9]), abs=1e-4)


def test_answers_that_do_not_fit_are_named(model):
    with pytest.raises(PromptError, match="2 answers for 3 prompts"):
        AnswerLogProb([[4], [5]])(model, prompts())
    with pytest.raises(PromptError, match="answer to prompt 1 is empty"):
        AnswerAccuracy([[4], []])
