"""Two opinions made one, decoding by it, and what all methods share."""

import numpy as np
import pytest
import torch

import interp
from interp.causal import decoding
from interp.causal.decoding import Combiner, Method, Plan, decode
from interp.core.errors import ModelRefused, PromptError
from interp.models.model import Model

IMAGE = 96


@pytest.fixture(scope="module")
def llava(tiny):
    return Model(tiny("llava"), "tiny-llava")


def prompt(seed=0, text=5):
    rng = np.random.default_rng(seed)
    ids = [*rng.integers(3, 90, 3), *[IMAGE] * 9, *rng.integers(3, 90, text)]
    made = interp.Prompt.from_tokens(ids, segments={"image": (3, 12), "question": (12, 12 + text)})
    return interp.Prompt(made.ids, made.segments, inputs={
        "pixel_values": rng.standard_normal((1, 3, 24, 24)).astype(np.float32)})


class Beside(Method):
    """A second view under an intervention."""

    name = "beside"

    def __init__(self, combine, *write):
        self.combine, self.write = combine, write

    def plans(self, model, prompts, new_tokens):
        return [Plan(second=p, second_write=self.write) for p in prompts]


def logits(seed):
    return torch.randn(4, 11, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("kind", ["contrast", "sum", "mix"])
def test_an_equal_opinion_changes_no_choice_and_a_zero_weight_nothing(kind):
    own, other = logits(0), logits(1)
    assert torch.equal(Combiner(kind, 0.0)(own, other), own)
    same = Combiner(kind, 0.7)(own, own)
    assert torch.equal(same.argsort(-1), own.argsort(-1))
    if kind != "sum":
        assert torch.allclose(same, own, atol=1e-6)


@pytest.mark.parametrize("kind", ["contrast", "sum", "mix"])
def test_constants_added_to_either_opinion_change_no_probability(kind):
    own, other = logits(0), logits(1)
    found = Combiner(kind, 0.6, 0.05)(own, other)
    moved = Combiner(kind, 0.6, 0.05)(own + 3.0, other - 5.0)
    assert torch.allclose(found.softmax(-1), moved.softmax(-1), atol=1e-6)


def test_the_three_kinds_written_out():
    own, other = logits(2).double(), logits(3).double()
    assert torch.allclose(Combiner("contrast", 1.5)(own, other), 2.5 * own - 1.5 * other)
    assert torch.allclose(Combiner("sum", 2)(own, other), own + 2 * other)
    assert torch.allclose(Combiner("mix", 0.3)(own, other), 0.3 * other + 0.7 * own)
    array = Combiner("sum", 2)(own.numpy(), other.numpy())
    assert torch.equal(array, Combiner("sum", 2)(own, other))


def test_the_cut_is_by_the_models_own_probability():
    own, other = logits(0), 50 * logits(1)
    p = own.softmax(-1)
    kept = p >= 0.2 * p.amax(-1, keepdim=True)
    found = Combiner("contrast", 2.0, 0.2)(own, other)
    assert torch.equal(torch.isfinite(found), kept) and bool((~kept).any())
    assert torch.equal(Combiner("contrast", 2.0, 1.0)(own, other).argmax(-1), own.argmax(-1))


@pytest.mark.parametrize("wrong, words", [
    (("product", 1.0), "choose one of: contrast"), (("mix", 1.5), "alpha cannot be 1.5"),
    (("sum", 1.0, 2.0), "beta is a share"), (("contrast", -1.0), "alpha cannot be -1"),
])
def test_what_is_no_combiner_is_refused(wrong, words):
    with pytest.raises(ValueError, match=words):
        Combiner(*wrong)


def test_no_method_is_greedy_decoding(llava):
    prompts = [prompt(0), prompt(1, 7), prompt(2)]
    found = decode(llava, prompts, new_tokens=6, batch_size=2)
    assert [one.tokens for one in found] == llava.generate(prompts, 6)
    run = llava.run(prompts, new_tokens=6)
    for one, rows in zip(found, run.logits):
        assert one.second is None and torch.equal(one.first, one.combined)
        assert torch.allclose(one.first, rows[-7:][: len(one.first)], atol=1e-4)


def test_a_second_view_is_the_run_with_its_interventions_fed_the_same_words(llava):
    write = interp.ablate(["L0H1", "L1H0"])
    combine = Combiner("contrast", 1.0, 0.01)
    for one in decode(llava, [prompt(0), prompt(3, 7)], Beside(combine, write), 5):
        given = one.plan.second
        forced = llava.run(given, write=write, new_tokens=[one.tokens]).logits[0]
        rows = forced[len(given) - 1:][: len(one.second)]
        assert torch.allclose(one.second, rows, rtol=1e-3, atol=1e-3)
        plain = llava.run(given, new_tokens=[one.tokens]).logits[0][len(given) - 1:]
        assert torch.allclose(one.first, plain[: len(one.first)], rtol=1e-3, atol=1e-3)
        chosen = combine(one.first, one.second).argmax(-1).tolist()
        assert chosen[: len(one.tokens)] == one.tokens


def test_a_view_without_interventions_changes_nothing(llava):
    prompts = [prompt(0), prompt(1)]
    same = decode(llava, prompts, Beside(Combiner("contrast", 3.0, 0.1)), 6)
    assert [one.tokens for one in same] == [one.tokens for one in decode(llava, prompts, None, 6)]


def test_forced_words_are_fed_to_both_views(llava):
    words = [[7, 8, 9], [20, 21]]
    found = decode(llava, [prompt(0), prompt(1)], Beside(Combiner("sum", 1), interp.ablate("L0H0")),
                   forced=words)
    assert [one.tokens for one in found] == words
    assert [len(one.second) for one in found] == [3, 2]
    with pytest.raises(PromptError, match="forced tokens for 1 prompts"):
        decode(llava, [prompt(0), prompt(1)], forced=[[4]])


def test_it_stops_before_the_end_token(llava):
    class Ending(Method):
        def choose(self, steps, scores, memory):
            memory["step"] = memory.get("step", -1) + 1
            return [2 if number == memory["step"] else 30 + number for number in range(len(scores))]

    found = decode(llava, [prompt(0), prompt(1), prompt(2)], Ending(), 9)
    assert [one.tokens for one in found] == [[], [31], [32, 32]]
    # The row that chose the end is kept too.
    assert [len(one.first) for one in found] == [1, 2, 3]


def test_only_some_image_tokens_equals_dropping_the_others(llava):
    """Hidden from everyone, also while decoding: the dropped prompt with its position ids kept."""
    given, kept = prompt(4), (4, 7, 10)
    one = decode(llava, given, Beside(Combiner("sum", 1), *decoding.only(given, kept)),
                 forced=[[8, 9]])[0]
    base = llava.resumable(given)
    rows = torch.tensor([[p for p in range(len(given)) if p not in range(3, 12) or p in kept]])
    assert torch.allclose(one.second[0], base.replay(0, rows)[0].float(), atol=1e-4)
    assert not torch.allclose(one.first[0], one.second[0], atol=1e-2)
    # Whatever the hidden tokens hold, the second view does not feel it.
    noise = interp.edit("embed", "replace", 9.0, positions=[3, 5, 6])
    noisy = decode(llava, given, Beside(Combiner("sum", 1), noise, *decoding.only(given, kept)),
                   forced=[[8, 9]])[0]
    assert torch.allclose(one.second, noisy.second, atol=1e-4)
    assert decoding.only(given, range(3, 12)) == ()


def test_attention_of_chosen_rows_is_that_of_the_pattern(llava):
    prompts = [prompt(0), prompt(1, 7)]
    found = decoding.last_row_attention(llava, prompts)
    rows = decoding.last_row_attention(llava, prompts, [[12, 14], [13]], layers=[2])
    for number, one in enumerate(prompts):
        pattern = llava.run(one, read="pattern").reads["pattern"].values[0]
        assert np.allclose(found[number][:, :, 0], pattern[:, :, -1, 3:12], atol=1e-5)
        asked = ([12, 14], [13])[number]
        assert np.allclose(rows[number][0], pattern[2][:, asked, 3:12], atol=1e-5)


def test_without_pictures_is_the_text_alone(llava):
    given = prompt(0)
    bare = decoding.without_pictures(given)
    assert bare.ids == given.ids[:3] + given.ids[12:] and "pixel_values" not in bare.inputs
    assert bare.positions("question") == tuple(range(3, 8)) and not bare.of_kind("image")
    assert torch.isfinite(llava.run(bare).logits[0]).all()
    with pytest.raises(PromptError, match="no picture"):
        decoding.without_pictures(bare)


def test_a_papers_layers_keep_their_depth():
    assert decoding.at_depth([6, 7, 8], 32) == (6, 7, 8)
    assert decoding.at_depth(range(25, 31), 64) == tuple(sorted({n * 63 // 31 for n in range(25, 31)}))
    for n in (2, 6, 28, 48, 80):
        assert decoding.at_depth([0, 31], n) == (0, n - 1)
        assert max(decoding.at_depth(range(25, 31), n)) < n - 1  # the last block stays out


def test_random_tokens_are_as_many_and_other_ones_per_seed():
    draws = {decoding.random_tokens(range(5, 40), 6, seed) for seed in range(5)}
    assert len(draws) == 5 and all(len(set(one)) == 6 and set(one) <= set(range(5, 40))
                                   for one in draws)
    assert decoding.random_tokens(range(5, 40), 6, 3, 1) == decoding.random_tokens(
        range(5, 40), 6, 3, 1) != decoding.random_tokens(range(5, 40), 6, 3, 2)


def test_class_rows_need_a_class_token(llava, tiny):
    rows = decoding.class_rows(llava, prompt(0))
    assert rows.shape == (2, 5, 9) and bool((rows.sum(-1) < 1).all())
    with pytest.raises(PromptError, match="no picture"):
        decoding.class_rows(llava, interp.Prompt.from_tokens([4, 5]))
    qwen = Model(tiny("qwen2_5_vl"), "tiny-qwen")
    ids = [4, 94, *[IMAGE] * 6, 93, 5]
    given = interp.Prompt(tuple(ids), (interp.Segment.span("image", 2, 8, "image"),), inputs={
        "pixel_values": np.random.default_rng(0).standard_normal((24, 96)).astype(np.float32),
        "image_grid_thw": np.array([[1, 4, 6]]),
        "mm_token_type_ids": np.array([[int(i == IMAGE) for i in ids]])})
    with pytest.raises(ModelRefused, match="no class token"):
        decoding.class_rows(qwen, given)
    bare = decoding.without_pictures(given)
    assert bare.inputs["mm_token_type_ids"].shape == (1, 4)
    assert torch.isfinite(qwen.run(bare).logits[0]).all()
