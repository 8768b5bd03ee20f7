"""Sets of image tokens, their substitution, and what is lost: exact, planted, and with a twin."""

import numpy as np
import pytest
import torch

import interp
from interp.core import OutOfRange, Prompt, PromptError, Segment
from interp.flow import object_ablation
from interp.models.input_gradients import embedding_gradient
from interp.models.model import Model

# -- sets ----------------------------------------------------------------------------------------


def picture(rows, columns, start=3, newline=False):
    """An image of rows x columns cells, each row ended by a token that is no cell, if asked for."""
    positions, boxes = [], []
    for row in range(rows):
        for column in range(columns):
            positions.append(start + len(positions))
            boxes.append((column, row, column + 1, row + 1))
        if newline:
            positions.append(start + len(positions))
            boxes.append(None)
    return Segment("image", tuple(positions), "image", (rows, columns), tuple(boxes))


@pytest.mark.parametrize("newline", [False, True])
@pytest.mark.parametrize("width", [0, 1, 2])
def test_a_ring_is_every_cell_within_a_king_s_moves(width, newline):
    image, rng = picture(5, 7, newline=newline), np.random.default_rng(width)
    cells = [p for p, box in zip(image.positions, image.boxes) if box is not None]
    for _ in range(20):
        chosen = rng.choice(cells, 3, replace=False)
        near = set()
        for p in chosen:
            r, c = divmod(cells.index(int(p)), 7)
            near |= {cells[7 * a + b] for a in range(5) for b in range(7)
                     if max(abs(a - r), abs(b - c)) <= width}
        assert set(object_ablation.ring(image, chosen.tolist(), width)) == near


def test_a_ring_needs_a_grid_and_cells():
    with pytest.raises(PromptError, match="no one grid"):
        object_ablation.ring(Segment("image", (1, 2), "image"), [1])
    with pytest.raises(PromptError, match="its grid is 2 x 2"):
        object_ablation.ring(Segment("image", (1, 2, 3), "image", (2, 2), ((0, 0, 1, 1),) * 3), [1])
    with pytest.raises(PromptError, match="no cell"):
        object_ablation.ring(picture(2, 3, newline=True), [6])


def test_registers_are_outliers_whatever_the_scale():
    rng = np.random.default_rng(0)
    states = rng.standard_normal((64, 12))
    assert object_ablation.registers(states).sum() < 6
    states[[5, 40]] *= 8
    found = object_ablation.registers(states)
    assert found.nonzero().flatten().tolist() == [5, 40]
    assert torch.equal(found, object_ablation.registers(100 * states))


def test_controls_are_as_many_other_tokens_and_matched_where_asked():
    image, like = list(range(10, 50)), [12, 13, 30]
    norm = {p: float(p % 10) for p in image}
    drawn = {object_ablation.random_tokens(image, like, seed=s, exclude=[14, 31]) for s in range(30)}
    assert len(drawn) > 20
    for one in drawn:
        assert len(one) == 3 and not {12, 13, 30, 14, 31} & set(one) and set(one) <= set(image)
    for seed in range(10):
        one = object_ablation.random_tokens(image, like, seed=seed, match=norm, nearest=2)
        assert sorted(norm[p] for p in one) == [0.0, 2.0, 3.0]
    with pytest.raises(OutOfRange, match="only 2"):
        object_ablation.random_tokens(range(5), [0, 1, 2], seed=0)


# -- substitution --------------------------------------------------------------------------------


def test_substitutes_are_what_they_say():
    rng = np.random.default_rng(1)
    states, mean = rng.standard_normal((9, 4)), rng.standard_normal(4)
    chosen = [2, 7, 8]
    made = {by: object_ablation.substitute(states, chosen, by, mean, seed=3).numpy()
            for by in object_ablation.SUBSTITUTIONS}
    assert np.allclose(made["mean"], mean) and not made["zero"].any()
    assert np.allclose(np.linalg.norm(made["norm_mean"], axis=1),
                       np.linalg.norm(states[chosen], axis=1), atol=1e-5)
    assert np.allclose(made["norm_mean"] / np.linalg.norm(made["norm_mean"], axis=1)[:, None],
                       mean / np.linalg.norm(mean), atol=1e-5)
    others = np.delete(states, chosen, 0).astype(np.float32)
    for row in made["resample"]:
        assert (np.abs(others - row).max(1) < 1e-6).any()
    with pytest.raises(ValueError, match="choose one of"):
        object_ablation.substitute(states, chosen, "noise")
    with pytest.raises(ValueError, match="mean_embedding"):
        object_ablation.substitute(states, chosen, "mean")


# -- gradients -----------------------------------------------------------------------------------

N, IMAGE = 11, (2, 8)


def prompts(count, seed=0):
    rng = np.random.default_rng(seed)
    return [Prompt.from_tokens(rng.integers(3, 90, N), {"image": IMAGE}) for _ in range(count)]


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "gemma2", "gpt_oss"])
def test_the_gradient_is_that_of_finite_differences(tiny, architecture):
    model, (prompt,) = Model(tiny(architecture), architecture), prompts(1)
    states = torch.tensor(model.run(prompt, read="embed").reads["embed"].values).reshape(N, -1)

    def loss(logits):
        return logits[-1, 5]

    both = torch.stack([states, 0.5 * states])
    value, gradient = embedding_gradient(model, prompt, loss, both)
    whole = float(model.run(prompt).logits[0][-1, 5])
    assert float(value[0]) == pytest.approx(whole, abs=1e-4)
    for number, seed in ((0, 0), (1, 1)):
        step = torch.randn(states.shape, generator=torch.Generator().manual_seed(seed))
        step *= 1e-3 * states.norm() / step.norm()
        up, down = (embedding_gradient(model, prompt, loss, (both[number] + sign * step)[None])[0][0]
                    for sign in (1, -1))
        assert float((gradient[number] * step).sum()) == pytest.approx(
            float(up - down) / 2, rel=2e-2, abs=1e-5)
    assert all(p.requires_grad for p in model.hf.parameters())


def test_integrated_gradients_sum_to_the_change_of_the_right_logit(tiny):
    model, (prompt,) = Model(tiny("gpt2"), "gpt2"), prompts(1)
    base = object_ablation.mean_embedding(model, prompts(3, 7))
    found = object_ablation.integrated_gradients(model, prompt, 5, base, steps=20)
    places = prompt.positions("image")
    cut = interp.patch("embed", base.expand(len(places), -1), positions=places)
    rows = [model.run(prompt, write=w).logits[0][-1] for w in ((), cut)]
    change = rows[0] - rows[1]
    assert float(found.sum()) == pytest.approx(float(change[5]), rel=0.02, abs=2e-3)
    assert abs(float(found.sum()) - float(change[6])) > 0.05
    order = found.abs().sum(-1).argsort(descending=True)
    assert set(object_ablation.top_tokens(found, places, 2)) == {places[int(i)] for i in order[:2]}


# -- measure -------------------------------------------------------------------------------------


def test_the_set_that_is_read_is_lost_and_the_rest_is_not(tiny):
    """Whoever blocks all image tokens but one leaves an answer that hangs on that one alone."""
    model, given, chosen = Model(tiny("llama"), "llama"), prompts(8), 4
    others = [p for p in range(*IMAGE) if p != chosen]

    class OneLeft:
        """Log probability of the model's own answer while `last` sees no other image token."""

        name, unit, dim, shared = "log_prob", "nats", "prompt", "one left"

        def passes(self, model, prompts, write):
            cut = interp.block("all", others)
            writes = interp.each((*one, cut) for one in (
                write.writes if hasattr(write, "writes") else [()] * len(prompts)))
            return torch.stack([x[-1] for x in model.run(prompts, write=writes).logits])

        def values(self, outcome):
            return outcome.log_softmax(-1).numpy().max(1)

    found = object_ablation.measure(
        model, given, [[5]] * 8, {"read": [[chosen]] * 8, "rest": [others[:2]] * 8, "none": [[]] * 8},
        by="zero", seeds=3, metrics=[OneLeft()])
    change = (found["log_prob"] - found["whole_log_prob"]).transpose("condition", "segment", ...)
    assert np.abs(change.sel(condition="set", segment="rest")).max() < 1e-5
    assert np.abs(change.sel(condition="random", segment="read")).max() < 1e-5
    assert np.abs(change.sel(condition="set", segment="read")).max() > 0.01
    assert np.isnan(change.sel(segment="none")).all()
    assert found["count"].sel(segment="read").values.tolist() == [1] * 8


@pytest.mark.parametrize("architecture", ["llava", "qwen2_5_vl"])
def test_a_cell_is_a_run_with_other_embeddings(tiny, architecture):
    """Against transformers' own `inputs_embeds`, whose picture was merged by hand."""
    from tests.models.conftest import IMAGE as MARK

    model, rng = Model(tiny(architecture), architecture), np.random.default_rng(0)
    ids = [5, 6, 7, *[MARK] * 6, 8, 9] if architecture == "llava" else [
        5, 6, 94, *[MARK] * 6, 93, 9, 10]
    prompt = Prompt.from_tokens(ids, {"image": (3, 9)})
    states = rng.standard_normal((len(ids), model.d_model)).astype(np.float32)
    base = interp.patch("embed", states)
    if architecture == "llava":
        text = model.hf.model.language_model
        given = torch.tensor(states)[None]
        given[0, [4, 6]] = 0
        with torch.no_grad():
            expected = model.hf.lm_head(text(inputs_embeds=given).last_hidden_state)[0, -1]
    else:
        edited = states.copy()
        edited[[4, 6]] = 0
        expected = model.run(prompt, write=interp.patch("embed", edited)).logits[0][-1]
    zero = object_ablation.substitute(states[3:9], [1, 3], "zero")
    found = model.run(prompt, write=[base, interp.patch("embed", zero, positions=[4, 6])])
    assert torch.allclose(found.logits[0][-1], expected, atol=1e-4)


def test_losses_count_right_answers_only_and_bad_sets_are_refused(tiny):
    model, given = Model(tiny("llama"), "llama"), prompts(6)
    own = [[int(x[-1].argmax())] for x in model.run(given).logits]
    answers = [[a[0]] if i % 2 else [(a[0] + 1) % 90] for i, a in enumerate(own)]
    sets = {"one": [[3]] * 6}
    found = object_ablation.measure(model, given, answers, sets, seeds=4, exclude=[[4]] * 6)
    assert found["whole_accuracy"].values.tolist() == [0, 1] * 3
    for metric in ("accuracy", "log_prob"):
        assert np.isnan(object_ablation.lost(found, "one", metric=metric)).tolist() == [1, 0] * 3
    with pytest.raises(OutOfRange, match="no image token"):
        object_ablation.measure(model, given, answers, {"one": [[0]] * 6})
    with pytest.raises(PromptError, match="2 of 6"):
        object_ablation.measure(model, given, answers, {"one": [[3]] * 2})
    few = object_ablation.measure(model, given, answers, {"most": [[2, 3, 4, 5]] * 6}, seeds=2)
    assert np.isnan(few["accuracy"].sel(condition="random")).all()
