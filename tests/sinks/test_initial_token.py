"""ZeroTuning: the identities of the card, in the pure function and in models."""

import numpy as np
import pytest
import torch

import interp
from interp.core import PromptError
from interp.core.errors import OutOfRange
from interp.models.model import Model
from interp.sinks import initial_token as zero


def rows(seed: int, total: float = 1.0) -> torch.Tensor:
    torch.manual_seed(seed)
    logits = torch.randn(3, 5, 7, dtype=torch.float64)
    return total * logits.softmax(-1)


@pytest.mark.parametrize("gamma", [0.01, 0.5, 3.0, 40.0])
def test_it_is_the_papers_formula_and_a_shift_of_the_logit(gamma):
    before = rows(0)
    after = zero.rescale(before, gamma)
    a = before[..., :1]
    d = (gamma - 1) * a + 1
    assert torch.allclose(after[..., :1], gamma * a / d, atol=1e-12)
    assert torch.allclose(after[..., 1:], before[..., 1:] / d, atol=1e-12)
    shifted = before.log()
    shifted[..., 0] += np.log(gamma)
    assert torch.allclose(after, shifted.softmax(-1), atol=1e-12)
    # Differences between two others shrink (or grow) by |gamma - 1| a / D of themselves.
    gap = (before[..., 2] - before[..., 3]) - (after[..., 2] - after[..., 3])
    wanted = (gamma - 1) * a[..., 0] / d[..., 0] * (before[..., 2] - before[..., 3])
    assert torch.allclose(gap, wanted, atol=1e-12)


def test_one_is_a_no_op_factors_compose_and_sums_stay():
    before = rows(1, total=0.7)
    assert torch.allclose(zero.rescale(before, 1.0), before, atol=1e-15)
    twice = zero.rescale(zero.rescale(before, 4.0), 0.5)
    assert torch.allclose(twice, zero.rescale(before, 2.0), atol=1e-12)
    assert torch.allclose(twice.sum(-1), before.sum(-1), atol=1e-12)
    alone = torch.tensor([[1.0, 0.0]])
    assert torch.equal(zero.rescale(alone, 0.1), alone)


@pytest.mark.parametrize("architecture", ["llama", "gpt_oss"])
@pytest.mark.parametrize("lane", ["hf", "bridge"])
def test_a_run_is_tuned_as_the_pure_function_does(tiny, architecture, lane):
    model = Model(tiny(architecture), f"tiny-{architecture}", lane=lane)
    prompt = interp.Prompt.from_tokens(np.random.default_rng(0).integers(3, 90, 9))
    before = model.run(prompt, read="pattern.1").reads["pattern.1"].values[0, 0]
    after = model.run(prompt, read="pattern.1", write=zero.tune(3.0, heads=["L1H2", "L1H4"]))
    after = after.reads["pattern.1"].values[0, 0]
    wanted = torch.tensor(before)
    wanted[[2, 4]] = zero.rescale(wanted[[2, 4]], 3.0)
    assert np.allclose(after, wanted, atol=2e-6) and np.abs(after - before).max() > 0.01
    composed = model.run(prompt, write=[zero.tune(3.0), zero.tune(2.0)]).logits[0]
    assert torch.allclose(composed, model.run(prompt, write=zero.tune(6.0)).logits[0], atol=2e-4)


def test_gamma_cannot_change_the_shares_among_the_other_tokens():
    model = interp.open_model("reader")
    prompt = interp.Prompt.from_tokens([0, *np.random.default_rng(2).integers(6, 180, 20)])
    shares = []
    for gamma in (0.1, 1.0, 8.0):
        write = zero.tune(gamma, layers=[0])
        p = model.run(prompt, read="pattern.0", write=write).reads["pattern.0"].values[0, 0]
        rest = p[:, 1:, 1:]
        shares.append(rest / rest.sum(-1, keepdims=True))
    assert np.allclose(shares[0], shares[1], atol=1e-5) and np.allclose(*shares[1:], atol=1e-5)


def test_a_sweep_reads_accuracy_validity_and_entropy():
    model = interp.open_model("reader")
    rng = np.random.default_rng(0)
    from interp.organisms import reader

    made = [reader.needle(60, 0.5, rng) for _ in range(6)]
    prompts = [interp.Prompt.from_tokens(one.tokens) for one in made]
    answers = [one.answers["context"] for one in made]
    answers[5] = answers[5][:1]  # answers of different lengths
    wrong = [[*answer[:-1], reader.TOKEN["river"]] for answer in answers]
    values = {reader.TOKEN[word] for word in reader.VALUES}
    given = dict(valid=lambda i, token: token in values)
    found = zero.sweep(model, prompts, answers, [(), zero.tune(1.0)], **given)
    assert found["correct"].values.all() and found["valid"].values.all()
    assert np.allclose(found["log_prob"][0], found["log_prob"][1], atol=1e-4)
    assert not zero.sweep(model, prompts, wrong, [()])["correct"].values.any()
    never = zero.sweep(model, prompts, answers, [()], valid=lambda i, token: False)
    assert not never["valid"].values.any() and never["correct"].values.all()
    # Greedy decoding says the same.
    said = model.generate(prompts[:5], 3)
    assert said == [list(answer) for answer in answers[:5]]
    logits = model.run(prompts[0], logits="last").logits[0][-1]
    p = logits.double().softmax(-1)
    assert float(found["entropy"][0, 0]) == pytest.approx(float(-(p * p.log()).sum()), abs=1e-3)


def test_layers_fall_into_the_papers_groups():
    for n in (1, 2, 4, 12, 32, 80):
        groups = zero.groups(n)
        assert sorted(x for layers in groups.values() for x in layers) == list(range(n))
    assert zero.groups(32)["deep"] == tuple(range(22, 32))


def test_bad_input_is_one_sentence():
    with pytest.raises(ValueError, match="from 0 on"):
        zero.rescale(rows(0), -1.0)
    with pytest.raises(OutOfRange, match="position 9"):
        zero.rescale(rows(0), 2.0, position=9)
    model = interp.open_model("reader")
    prompt = interp.Prompt.from_tokens([0, 9, 10])
    with pytest.raises(PromptError, match="2 answers for 1 prompts"):
        zero.sweep(model, [prompt], [[1], [2]], [()])
    with pytest.raises(PromptError, match="answer is empty"):
        zero.sweep(model, [prompt], [[]], [()])
