"""Decoding step by step: equal to whole runs, each stream by itself, and gradients of one row."""

import functools

import numpy as np
import pytest
import torch

import interp
from interp.core.errors import ModelRefused, OutOfRange, PromptError, SiteRefused
from interp.models.head_gradients import head_gradients
from interp.models.model import Model

IMAGES = ("llava", "qwen2_5_vl")
DECODERS = ("gpt2", "llama", "mistral", "gemma2", "gemma3", "gpt_oss", *IMAGES)
STEPS = 6


@pytest.fixture(scope="module")
def opened(tiny):
    return functools.cache(lambda architecture: Model(tiny(architecture), f"tiny-{architecture}"))


@pytest.fixture
def prompt_of(image_prompt, text_prompt):
    return lambda architecture, seed=0: (
        image_prompt(architecture, seed) if architecture in IMAGES else text_prompt(seed, 13))


def greedy(steps, count=STEPS):
    """Follow every stream's own best token; returns tokens and all logits."""
    rows, made = [steps.logits.clone()], [[] for _ in range(len(steps))]
    for _ in range(count):
        best = steps.logits.argmax(-1).tolist()
        for one, token in zip(made, best):
            one.append(token)
        rows.append(steps.feed(best).clone())
    return made, torch.stack(rows, 1)


def close(a, b):
    """Equal up to the rounding of float32."""
    return torch.allclose(a, b, rtol=1e-4, atol=1e-4 * float(b.abs().max()))


@pytest.mark.parametrize("architecture", DECODERS)
def test_greedy_steps_are_the_run_with_new_tokens(opened, prompt_of, architecture):
    model = opened(architecture)
    prompts = [prompt_of(architecture, seed) for seed in (0, 3)]
    prompts.append(interp.Prompt.from_tokens(range(5, 12)))
    made, rows = greedy(model.stepping(prompts))
    run = model.run(prompts, new_tokens=STEPS)
    assert made == run.new_tokens
    for one, expected in zip(rows, run.logits):
        assert close(one, expected[-STEPS - 1:])


@pytest.mark.parametrize("architecture", DECODERS)
def test_streams_with_interventions_are_the_runs_with_them(opened, prompt_of, architecture):
    """In the prompt, in later steps, in both; and other streams do not feel it."""
    model, prompt = opened(architecture), prompt_of(architecture)
    direction = torch.linspace(-3, 3, model.d_model)
    writes = [
        [], interp.block("generated", [-3, -2]), interp.ablate(["L1H2", "L2H0"], phase="decode"),
        interp.edit("resid_post.1", "steer", direction),
        [interp.edit("embed", "multiply", 0.0, positions=[4, 5]), interp.scale("L0H1", 3.0)],
        interp.edit("scores.2", "amplify", torch.linspace(-1, 2, 40), phase="last"),
    ]
    steps = model.stepping([prompt] * len(writes), write=interp.each(
        [w if isinstance(w, list) else [w] for w in writes]))
    made, rows = greedy(steps)
    for number, write in enumerate(writes):
        run = model.run(prompt, write=write, new_tokens=STEPS)
        assert made[number] == run.new_tokens[0]
        assert close(rows[number], run.logits[0][-STEPS - 1:])
    # None of them is without effect.
    apart = (rows[1:] - rows[:1]).abs().amax((1, 2))
    assert (apart > 1e-3).all(), apart


def test_fed_tokens_need_not_be_its_own(opened, prompt_of):
    model = opened("llava")
    with_picture, without = prompt_of("llava"), interp.Prompt.from_tokens(range(5, 12))
    tokens = [7, 11, 60, 4]
    steps = model.stepping([with_picture, without], read=["resid_post.1", "pattern.2"])
    assert steps.read(0, "resid_post.1").shape == (len(with_picture), model.d_model)
    for token in tokens:
        steps.feed([token, token])
    forced = model.run([with_picture, without], new_tokens=[tokens, tokens],
                       read=["resid_post.1", "pattern.2"])
    for number, prompt in enumerate((with_picture, without)):
        assert close(steps.logits[number], forced.logits[number][-1])
        last, end = len(prompt) + len(tokens) - 1, len(prompt) + len(tokens)
        expected = forced.reads["resid_post.1"].values[number, 0, last]
        assert close(steps.read(number, "resid_post.1")[0], torch.tensor(expected))
        expected = forced.reads["pattern.2"].values[number, 0, :, last, :end]
        assert close(steps.read(number, "pattern.2")[:, 0], torch.tensor(expected))


@pytest.mark.parametrize("architecture", ["mistral", "gpt_oss", *IMAGES])
def test_a_tail_is_the_same_prompt_with_only_its_rows_read(opened, prompt_of, architecture):
    model, prompt = opened(architecture), prompt_of(architecture)
    steps = model.stepping([prompt, prompt], tail=3, read=["pattern.1", "resid_post.2"])
    run = model.run(prompt, read=["pattern.1", "resid_post.2"])
    assert close(steps.logits[1], run.logits[0][-1])
    for site, rows in (("pattern.1", run.reads["pattern.1"].values[0, 0][:, -3:]),
                       ("resid_post.2", run.reads["resid_post.2"].values[0, 0][-3:])):
        assert close(steps.read(1, site), torch.tensor(rows))
    plain = greedy(model.stepping(prompt))[0]
    assert greedy(model.stepping(prompt, tail=3))[0] == plain
    if architecture in IMAGES:
        with pytest.raises(PromptError, match="must come after its picture"):
            model.stepping(prompt, tail=8)


def test_pictures_do_not_leak_from_stream_to_stream(opened, image_prompt, text_prompt):
    """Qwen-VL models remember the last picture's offset; here every stream keeps its own."""
    model = opened("qwen2_5_vl")
    both = [image_prompt("qwen2_5_vl"), text_prompt(1, 9)]
    remembering = [m for m in model.hf.modules() if "rope_deltas" in vars(m)]
    before = [m.rope_deltas for m in remembering]
    together, _ = greedy(model.stepping(both))
    assert together == [greedy(model.stepping(one))[0][0] for one in both]
    assert remembering and all(m.rope_deltas is old for m, old in zip(remembering, before))


@pytest.mark.parametrize("architecture", ["llama", "mistral", "gemma2", "gpt_oss", *IMAGES])
def test_the_gradient_of_the_predicting_row_is_that_of_a_whole_backward_pass(
    opened, prompt_of, architecture
):
    model, prompt = opened(architecture), prompt_of(architecture)
    steps = model.stepping([prompt, prompt], gradients=[0, 2])
    fed, wanted = [8, 30], 17
    for number in range(2):
        found = steps.gradient_by_attention([wanted, wanted + 1])
        inputs = {k: np.pad(v, ((0, 0), (0, number))) if k == "mm_token_type_ids" else v
                  for k, v in prompt.inputs.items()}
        whole = interp.Prompt((*prompt.ids, *fed[:number]), prompt.segments, inputs=inputs)
        pattern = model.run(whole, read="pattern").reads["pattern"].values[0]
        for stream, token in enumerate((wanted, wanted + 1)):
            full = head_gradients(model, whole, lambda x: -x[-1].log_softmax(-1)[token])  # noqa: B023
            for layer in (0, 2):
                attention, gradient = found[stream][layer]
                assert close(gradient, full.by_attention(layer)[:, -1])
                assert close(attention, torch.tensor(pattern[layer][:, -1]))
                assert gradient.abs().max() > 1e-6
        steps.feed([fed[number]] * 2)
    assert all(p.grad is None for p in model.hf.parameters())


def test_gradients_change_nothing_that_is_decoded(opened, prompt_of):
    model, prompt = opened("gpt_oss"), prompt_of("gpt_oss")
    write = interp.block("all", [3], phase="decode")
    plain = greedy(model.stepping(prompt, write=interp.ablate("L1H1")))
    assert greedy(model.stepping(prompt, write=interp.ablate("L1H1"), gradients=[1]))[0] == plain[0]
    before = [p.requires_grad for p in model.hf.parameters()]
    steps = model.stepping(prompt, write=write, gradients=[1])
    assert steps.logits.requires_grad is False
    assert [p.requires_grad for p in model.hf.parameters()] == before


def test_nothing_stays_behind_when_a_step_fails(opened, prompt_of, hooks):
    model, prompt = opened("llama"), prompt_of("llama")
    expected = model.run(prompt).logits[0]
    steps = model.stepping(prompt, write=interp.edit("mlp_out", "add", 1.0))
    hooked = hooks(model.hf)
    with pytest.raises(OutOfRange, match="token 97 is not in the vocabulary"):
        steps.feed([97])
    with pytest.raises(ValueError, match="2 tokens for 1 streams"):
        steps.feed([5, 6])
    with pytest.raises(SiteRefused, match="is not read"):
        steps.read(0, "resid_post.1")
    with pytest.raises(SiteRefused, match="without any key"):
        model.stepping(prompt, write=interp.block("all", "all"))
    assert hooks(model.hf) == hooked
    assert torch.equal(model.run(prompt).logits[0], expected)


def test_what_cannot_be_stepped_is_refused(opened, tiny):
    bert = Model(tiny("bert"), "tiny-bert")
    with pytest.raises(ModelRefused, match="encoder"):
        bert.stepping(interp.Prompt.from_tokens([5, 6, 7]))
    model = opened("llama")
    long = interp.Prompt.from_tokens([5] * 640)
    with pytest.raises(PromptError, match="last position, 639"):
        model.stepping(long).feed([4])
    with pytest.raises(OutOfRange, match="layer 3"):
        model.stepping(interp.Prompt.from_tokens([5, 6]), gradients=[3])
    with pytest.raises(SiteRefused, match="amplify"):
        model.stepping(long, write=interp.edit("mlp_out.1", "amplify", 1.0))


def test_steering_turns_at_constant_norm_and_never_away(opened):
    from interp.models.edits import steered
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(7, 5, generator=generator)
    v = torch.randn(5, generator=generator)
    moved = steered(x, 0.3 * v / v.norm())
    assert torch.allclose(moved.norm(dim=-1), x.norm(dim=-1), atol=1e-5)
    cos = torch.nn.functional.cosine_similarity
    assert (cos(moved, v[None]) > cos(x, v[None])).all()
    assert torch.allclose(steered(x, torch.zeros(5)), x, atol=1e-6)
    # By the formula of the paper's code, written out for one vector that points away.
    one = -v + 0.1 * x[0]
    lam, unit = 0.3, v / v.norm()
    away = 1 + max(0.0, float(torch.dot(one, -v) / one.norm() / v.norm()))
    y = one / one.norm() + lam * away * unit
    assert torch.allclose(steered(one, lam * unit), one.norm() * y / y.norm(), atol=1e-5)
