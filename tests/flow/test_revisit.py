"""The image token that reads like the step is found, added, and replaced by a random one."""

import numpy as np
import pytest
import torch

import interp
from interp.causal.decoding import decode
from interp.flow.revisit import ReVisiT, divergence
from interp.models.model import Model
from interp.models.stepping import unembed

IMAGE = 96


@pytest.fixture(scope="module")
def llava(tiny):
    return Model(tiny("llava"), "tiny-llava")


def prompt(seed=0):
    ids = [5, 6, 7, *[IMAGE] * 9, 20, 31, 42]
    made = interp.Prompt.from_tokens(ids, segments={"image": (3, 12)})
    return interp.Prompt(made.ids, made.segments, inputs={"pixel_values": np.random.default_rng(
        seed).standard_normal((1, 3, 24, 24)).astype(np.float32)})


def test_divergence_is_that_of_jensen_and_shannon():
    generator = torch.Generator().manual_seed(0)
    step, readings = torch.randn(17, generator=generator), torch.randn(6, 17, generator=generator)
    p, q = step.double().softmax(-1), readings.double().softmax(-1)
    m = (p + q) / 2
    expected = 0.5 * ((p * (p / m).log()).sum(-1) + (q * (q / m).log()).sum(-1))
    assert torch.allclose(divergence(step, readings).double(), expected, atol=1e-6)
    reverse = 0.5 * ((m * (m / p).log()).mean(-1) + (m * (m / q).log()).mean(-1))
    assert torch.allclose(divergence(step, readings, released=True).double(), reverse, atol=1e-6)
    # Symmetric, zero for itself, at most ln 2, and blind to constants.
    assert torch.allclose(divergence(readings[0], step[None]), divergence(step, readings[:1]))
    assert abs(float(divergence(step, step[None] + 4.0))) < 1e-6
    far = divergence(torch.tensor([50.0, 0.0]), torch.tensor([[0.0, 50.0]]))
    assert float(far) == pytest.approx(np.log(2), abs=1e-6)


@pytest.mark.parametrize("layers", ["last", "even"])
def test_the_closest_reading_is_chosen_and_its_log_probabilities_added(llava, layers):
    (one,) = decode(llava, prompt(0), ReVisiT(layers=layers, beta=1e-3), 3)
    run = llava.run(prompt(0), read="resid_post")
    if layers == "last":
        readings = run.logits[0][3:12]
    else:
        states = run.reads["resid_post"].values[0][[0, 2]][:, 3:12].reshape(18, -1)
        readings = unembed(llava, torch.tensor(states))
    step = one.first[0]
    kept = step.softmax(-1) >= 1e-3 * step.softmax(-1).max()
    best = int(divergence(step[kept], readings[:, kept]).argmin())
    assert one.plan.found["chosen"][0] == 3 + best % 9
    expected = step.log_softmax(-1)[kept] + readings[best, kept].log_softmax(-1)
    assert torch.allclose(one.combined[0][kept].softmax(-1), expected.softmax(-1), atol=1e-4)
    assert bool(torch.isinf(one.combined[0][~kept]).all())
    assert len(one.plan.found["chosen"]) == 3


def test_a_planted_reading_is_found_among_others():
    generator = torch.Generator().manual_seed(1)
    step = 3 * torch.randn(50, generator=generator)
    readings = 3 * torch.randn(12, 50, generator=generator)
    readings[7] = step + 0.1 * torch.randn(50, generator=generator)
    assert int(divergence(step, readings).argmin()) == 7
    assert int(divergence(step, readings, released=True).argmin()) == 7


def test_the_control_takes_random_tokens(llava):
    drawn = {tuple(decode(llava, prompt(0), ReVisiT(seed=s), 3)[0].plan.found["chosen"])
             for s in range(4)}
    assert len(drawn) > 1 and all(3 <= p < 12 for one in drawn for p in one)
    with pytest.raises(ValueError, match="'last' or 'even'"):
        decode(llava, prompt(0), ReVisiT(layers="first"), 1)
