"""Continuations from one run of a prompt: what whole runs say, on every kind of model."""

import numpy as np
import pytest
import torch

import interp
from interp.core import ModelRefused, OutOfRange, Prompt, PromptError
from interp.models.branches import Branches
from interp.models.model import Model

PROMPT = Prompt.from_tokens([1, 5, 9, 3, 40, 41, 7, 22])
MORE = ([11, 12, 13], [14], [15, 16, 17])


@pytest.fixture(scope="module", params=["llama", "gpt2", "gemma2", "gpt_oss", "qwen2_5_vl"])
def model(tiny, request):
    return Model(tiny(request.param), request.param)


def test_following_is_running_the_whole_text(model):
    made = Branches(model, PROMPT, read=("resid_post", "mlp_out"), keep=(2, -1), batch_size=2)
    followed = made.follow(MORE)
    for one, tokens in zip(followed, MORE):
        whole = Prompt.from_tokens([*PROMPT.ids, *tokens])
        run = model.run(whole, read=("resid_post", "mlp_out"))
        logs = run.logits[0].log_softmax(-1)
        expected = [float(logs[len(PROMPT) - 1 + i, t]) for i, t in enumerate(tokens)]
        np.testing.assert_allclose(one.log_probs, expected, atol=2e-4)
        for site in ("resid_post", "mlp_out"):
            values = run.reads[site].values[0]
            scale = np.abs(values).max()
            np.testing.assert_allclose(one.states[site], values[:, len(PROMPT):], atol=1e-4 * scale)
            np.testing.assert_allclose(
                made.states[site], values[:, [2, len(PROMPT) - 1]], atol=1e-4 * scale)
        p = logs[len(PROMPT) - 1 : len(PROMPT) - 1 + len(tokens)].exp()
        np.testing.assert_allclose(one.top, p.max(-1).values, atol=1e-4)
        np.testing.assert_allclose(one.entropy, -(p * p.log()).sum(-1), atol=1e-3)


def test_greedy_samples_are_the_greedy_text_and_leave_the_prompt_alone(model):
    made = Branches(model, PROMPT)
    before = made.follow([[11, 12]])[0].log_probs
    (greedy,) = made.sample(1, new_tokens=5, temperature=0)
    assert greedy == model.generate(PROMPT, 5)[0]
    assert made.sample(3, new_tokens=5, seed=2, greedy_first=True)[0] == greedy
    made.sample(3, new_tokens=4, seed=1)
    np.testing.assert_allclose(made.follow([[11, 12]])[0].log_probs, before, atol=1e-6)


def test_samples_follow_the_distribution_at_any_batch_size():
    model = interp.open_model("backcopy-1l")
    made = Branches(model, Prompt.from_tokens(range(3, 12)), batch_size=64)
    drawn = [row[0] for row in made.sample(2000, new_tokens=1, seed=0) if row]
    p = made.logits.softmax(-1)
    top = torch.topk(p, 3).indices.tolist()
    for token in top:
        share, wanted = drawn.count(token) / 2000, float(p[token])
        assert abs(share - wanted) < 5 * np.sqrt(wanted * (1 - wanted) / 2000)
    cold = made.sample(50, new_tokens=1, temperature=1e-3, seed=0)
    assert {row[0] for row in cold} == {int(p.argmax())}
    assert made.sample(5, new_tokens=3, seed=3) == made.sample(5, new_tokens=3, seed=3)


def test_a_closed_set_of_answers(tiny):
    made = Branches(Model(tiny("llama"), "llama"), PROMPT)
    words = [7, 30, 31]
    drawn = made.sample(60, new_tokens=2, seed=0, allowed=words)
    assert {token for row in drawn for token in row} <= set(words)
    p = made.logits[words].softmax(-1)
    (first, _) = made.follow([[30, 31], [40]], allowed=words)
    assert first.within[0] == pytest.approx(float(p[1].log()), abs=1e-4)
    assert first.log_probs[0] < first.within[0]
    other = made.follow([[40]], allowed=words)[0]
    assert other.within[0] == pytest.approx(
        float(made.logits[[*words, 40]].log_softmax(-1)[-1]), abs=1e-4)
    (greedy,) = made.sample(1, new_tokens=1, temperature=0, allowed=words)
    assert greedy == [words[int(p.argmax())]]


def test_the_end_token_ends_a_sample(tiny):
    model = Model(tiny("llama"), "llama")
    made = Branches(model, PROMPT)
    (greedy,) = made.sample(1, new_tokens=6, temperature=0)
    end = greedy[2]
    object.__setattr__(made, "model", _ending(model, end))
    first = greedy.index(end)
    assert made.sample(1, new_tokens=6, temperature=0) == [greedy[:first]]
    assert made.sample(1, new_tokens=6, temperature=0, with_end=True) == [greedy[: first + 1]]


def _ending(model, token):
    class Ending(Model):
        end_tokens = frozenset([token])
    made = object.__new__(Ending)
    vars(made).update(vars(model))
    return made


def test_a_picture_is_seen_by_its_continuations():
    from interp.prompts.scenes import draw, scene

    model = interp.open_model("looker")
    rng = np.random.default_rng(0)
    prompt = model.prompt("what is the number ?", images=[draw(scene(rng, numbers=1))], chat=True)
    made = Branches(model, prompt)
    (greedy,) = made.sample(1, new_tokens=4, temperature=0)
    assert greedy == model.generate(prompt, 4)[0]


def test_what_cannot_be_continued_is_said(tiny):
    model = Model(tiny("llama"), "llama")
    with pytest.raises(ModelRefused, match="encoder"):
        Branches(Model(tiny("bert"), "bert"), PROMPT)
    with pytest.raises(ValueError, match="residual sites"):
        Branches(model, PROMPT, read="z")
    with pytest.raises(OutOfRange, match="position"):
        Branches(model, PROMPT, keep=(8,))
    made = Branches(model, PROMPT)
    with pytest.raises(PromptError, match="continuation 1 is empty"):
        made.follow([[3], []])
    with pytest.raises(OutOfRange, match="vocabulary"):
        made.follow([[97]])
    with pytest.raises(PromptError, match="640 positions"):
        made.sample(1, new_tokens=640)
