"""Masses between modalities against dense patterns; planted stages; prediction without leakage."""

import numpy as np
import pytest

from interp.core import Prompt, PromptError
from interp.flow import inference_stages as dyvte
from interp.models.model import Model

N, IMAGE = 12, (2, 7)


def prompts(number):
    rng = np.random.default_rng(number)
    return [Prompt.from_tokens(rng.integers(3, 90, N), {"image": IMAGE}) for _ in range(number)]


@pytest.mark.parametrize("architecture", ["llama", "gemma2", "gpt_oss"])
def test_masses_are_means_of_the_dense_pattern(tiny, architecture):
    model, some = Model(tiny(architecture), architecture), prompts(3)
    found = dyvte.stage_masses(model, some, batch_size=2)["mass"]
    image = list(range(*IMAGE))
    text, later = [p for p in range(N) if p not in image], list(range(IMAGE[1], N))
    for number, prompt in enumerate(some):
        pattern = model.run(prompt, read="pattern").reads["pattern"].values[0].mean(1)
        for query, rows in (("t", later), ("v", image)):
            for key, columns in (("t", text), ("v", image)):
                expected = pattern[:, rows][:, :, columns].sum(-1).mean(-1)
                one = found.isel(prompt=number).sel(segment=query + key).values
                assert np.allclose(one, expected, atol=2e-5)


def test_planted_stages_are_found_whatever_the_scale():
    rng = np.random.default_rng(0)
    for _ in range(200):
        fall, flat, rise = (int(x) for x in rng.integers((2, 0, 1), (6, 4, 6)))
        down = np.sort(rng.uniform(0.3, 1.0, fall))[::-1]
        up = np.sort(rng.uniform(0.2, 0.9, rise))
        curve = np.concatenate([down, [0.1] * (flat + 1), up])
        found = dyvte.stages(curve)
        assert found == dyvte.stages(0.3 * curve) is not None
        assert found.reasoning == tuple(range(fall + flat + 1, len(curve)))
        assert set(found.fusion) == {n for n in range(fall) if curve[n] > np.median(curve)}
        together = (*found.fusion, *found.modeling, *found.reasoning)
        assert together == tuple(range(min(together), len(curve)))


@pytest.mark.parametrize("curve", [[0.5, 0.4, 0.3], [0.1, 0.2, 0.3], [0.2] * 4, [0.1, 0.3, 0.2]])
def test_without_a_fall_and_a_rise_there_are_no_stages(curve):
    assert dyvte.stages(np.array(curve)) is None


def test_text_states_are_those_behind_the_image(tiny):
    model, some = Model(tiny("llama"), "llama"), prompts(3)
    found = dyvte.text_states(model, some, 1, batch_size=2)
    for prompt, row in zip(some, found):
        states = model.run(prompt, read="resid_pre.1").reads["resid_pre.1"].values.reshape(N, -1)
        assert np.allclose(row[: model.d_model], states[7 : N - 1].mean(0), atol=1e-5)
        assert np.allclose(row[model.d_model :], states[-1], atol=1e-5)
    ends = [Prompt.from_tokens(range(3, 9), {"image": (2, 6)})]
    for call in (lambda: dyvte.text_states(model, ends, 1), lambda: dyvte.stage_masses(model, ends)):
        with pytest.raises(PromptError, match="no token follows"):
            call()


def test_a_planted_signal_is_predicted_and_a_leaking_group_is_not():
    rng = np.random.default_rng(0)
    x = rng.standard_normal((60, 20))
    y = x[:, 3] + 0.1 * rng.standard_normal(60)
    assert dyvte.explained(y, dyvte.predicted(x, y, range(60))) > 0.8
    assert dyvte.explained(rng.permutation(y), dyvte.predicted(x, rng.permutation(y), range(60))) < 0.2
    # Five samples of each of twelve groups share features and target: known only by memory.
    group = np.repeat(np.arange(12), 5)
    x, y = rng.standard_normal((12, 40))[group], rng.standard_normal(12)[group]
    assert dyvte.explained(y, dyvte.predicted(x, y, range(60))) > 0.8
    assert dyvte.explained(y, dyvte.predicted(x, y, group)) < 0.3
    assert np.isnan(dyvte.explained(np.ones(5), np.zeros(5)))
    with pytest.raises(ValueError, match="at least two groups"):
        dyvte.predicted(x, y, [0] * 60)
