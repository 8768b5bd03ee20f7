"""Blind, irrelevant and outlier tokens are found where they are planted; views hold only them."""

import numpy as np
import pytest
import torch

import interp
from interp.causal import decoding
from interp.causal.decoding import decode
from interp.core.errors import ModelRefused, NumericalError, PromptError
from interp.flow.contrastive_decoding import (
    AGLA,
    DAMRO,
    IAVA,
    AvisC,
    blind_tokens,
    guiding_layers,
    irrelevant_tokens,
    most_relevant,
    outlier_tokens,
    replaced,
)
from interp.models.model import Model

IMAGE = 96


@pytest.fixture(scope="module")
def llava(tiny):
    return Model(tiny("llava"), "tiny-llava")


def prompt(seed=0, question=(20, 31, 42, 53)):
    rng = np.random.default_rng(seed)
    ids = [5, 6, 7, *[IMAGE] * 9, *question]
    made = interp.Prompt.from_tokens(ids, segments={"image": (3, 12), "question": (12, len(ids))})
    return interp.Prompt(made.ids, made.segments, inputs={
        "pixel_values": rng.standard_normal((1, 3, 24, 24)).astype(np.float32)})


def rows(layers=4, heads=3, tokens=25, seed=0):
    return torch.rand(layers, heads, tokens, generator=torch.Generator().manual_seed(seed))


def test_guiding_layers_are_the_fewest_that_hold_the_share():
    attention = rows()
    attention *= torch.tensor([1.0, 8.0, 2.0, 4.0])[:, None, None]
    mass = attention.mean(1).sum(-1)
    for gamma in (0.1, 0.5, 0.7, 0.95, 1.0):
        chosen = list(guiding_layers(attention, gamma))
        assert mass[chosen].sum() >= (gamma - 1e-5) * mass.sum()
        without_least = sorted(chosen, key=lambda layer: mass[layer])[1:]
        assert mass[without_least].sum() < gamma * mass.sum()


def test_planted_blind_tokens_are_found_and_nothing_in_the_even_twin():
    attention = rows() * 0.01
    even = blind_tokens(torch.full((4, 3, 25), 0.01))[1]
    attention[:, :, [4, 17]] += 1.0
    received, blind = blind_tokens(attention)
    assert blind.nonzero()[:, 0].tolist() == [4, 17]
    # An even map has no spread: by the definition every token reaches the mean.
    assert even.all() or not even.any()
    # A larger lambda keeps fewer tokens; scale does not matter.
    assert blind_tokens(rows(), spread=2.0)[1].sum() <= blind_tokens(rows(), spread=0.5)[1].sum()
    assert torch.equal(blind_tokens(7 * rows())[1], blind_tokens(rows())[1])
    with pytest.raises(NumericalError):
        blind_tokens(attention * float("nan"))


def test_constant_sinks_cancel_in_the_change_of_attention():
    task, generic = rows(1, 1)[0, 0], rows(1, 1, seed=1)[0, 0]
    task[3] += 9.0
    delta, low = irrelevant_tokens(task, generic, 0.4)
    sink = torch.zeros(25)
    sink[[8, 20]] = 50.0
    again, same = irrelevant_tokens(task + sink, generic + sink, 0.4)
    assert torch.allclose(delta, again, atol=1e-4) and torch.equal(low, same)
    assert int(low.sum()) == 10 and not low[3] and int(delta.argmax()) == 3
    assert delta[low].max() <= delta[~low].min()


def test_the_most_attended_tokens_of_the_tower_are_the_outliers():
    attention = rows(1, 5, 30)[0]
    attention[:, [2, 29]] += 3
    assert outlier_tokens(attention, 2)[1].nonzero()[:, 0].tolist() == [2, 29]
    assert torch.equal(outlier_tokens(attention, 7)[1], outlier_tokens(attention.numpy(), 7)[1])


def test_agla_keeps_less_of_a_picture_that_fits_the_question_better():
    relevance = rows(1, 12, 10)[0]
    kept = [most_relevant(relevance, s) for s in (0.0, 0.5, 1.0)]
    assert [int(k.sum()) for k in kept] == [120, 90, 60]
    assert bool((kept[2] <= kept[1]).all())
    assert relevance[kept[2]].min() >= relevance[~kept[2]].max()


def test_the_blind_view_has_only_blind_embeddings(llava):
    found = decode(llava, [prompt(0), prompt(1), prompt(2)], AvisC(spread=0.5), 2)
    assert any(one.plan.found["kept"] for one in found)
    for one in found:
        prompt_, kept = one.plan.second, one.plan.found["kept"]
        attention = decoding.last_row_attention(llava, [prompt_])[0][:, :, 0]
        blind = np.arange(3, 12)[blind_tokens(attention, spread=0.5)[1].numpy()]
        assert kept == tuple(blind) and len(kept) < 9
        gone = [p for p in range(3, 12) if p not in kept]
        run = llava.run(prompt_, write=interp.edit("embed", "multiply", 0.0, positions=gone))
        assert torch.allclose(one.second[0], run.logits[0][-1], atol=1e-4)
        assert torch.allclose(one.combined[0][torch.isfinite(one.combined[0])],
                              (2 * one.first - one.second)[0][torch.isfinite(one.combined[0])])
    with pytest.raises(ValueError, match="cannot be filled with 'mud'"):
        replaced(prompt(0), [3], "mud", 48)
    noise = replaced(prompt(0), [3], "noise", 48)[0]
    assert noise.value.values.shape == (8, 48) and replaced(prompt(0), range(3, 12), "ones", 48) == ()


def test_the_irrelevant_view_hides_what_the_instruction_looks_at(llava):
    given, generic = prompt(0), prompt(0, (70, 71))
    (one,) = decode(llava, given, IAVA(lambda p: [generic], share=1 / 3), 2)
    task, other = (m.mean((0, 1, 2)) for m in decoding.last_row_attention(llava, [given, generic]))
    lowest = (task - other).sort().indices[:3]
    assert set(one.plan.found["kept"]) == {3 + int(i) for i in lowest}
    run = llava.run(given, write=decoding.only(given, one.plan.found["kept"]))
    assert torch.allclose(one.second[0], run.logits[0][-1], atol=1e-4)
    same = decode(llava, given, IAVA(lambda p: [generic, generic], share=1 / 3), 2)[0]
    assert same.plan.found["kept"] == one.plan.found["kept"] and len(same.plan.found["each"]) == 2


def test_the_outlier_view_is_chosen_by_the_tower_alone(llava):
    found = decode(llava, [prompt(0), prompt(0, (8, 9)), prompt(2)], DAMRO(count=3), 2)
    kept = [one.plan.found["kept"] for one in found]
    # Nine image tokens: at most a quarter of them.
    assert kept[0] == kept[1] and all(len(k) == 2 for k in kept)
    rows_ = decoding.class_rows(llava, prompt(2))
    assert set(kept[2]) == {3 + int(i) for i in rows_[-2].mean(0).topk(2).indices}


@pytest.mark.parametrize("method", [
    lambda seed: AvisC(seed=seed, spread=0.3), lambda seed: DAMRO(seed=seed),
    lambda seed: IAVA(lambda p: [prompt(0, (70, 71))], seed=seed)])
def test_controls_are_random_sets_of_the_same_size(llava, method):
    size = len(decode(llava, prompt(0), method(None), 1)[0].plan.found["kept"])
    drawn = {decode(llava, prompt(0), method(seed), 1)[0].plan.found["kept"] for seed in range(4)}
    assert len(drawn) > 1 and {len(one) for one in drawn} == {size}


def test_agla_adds_the_logits_of_the_masked_picture(llava):
    masked = prompt(3)
    (one,) = decode(llava, prompt(0), AGLA(lambda p: masked), 1)
    assert torch.allclose(one.second[0], llava.run(masked).logits[0][-1], atol=1e-4)
    kept = torch.isfinite(one.combined[0])
    assert torch.allclose(one.combined[0][kept], (one.first + 2 * one.second)[0][kept], atol=1e-4)


def test_models_that_cannot_are_refused_by_name(llava):
    with pytest.raises(PromptError, match="no picture"):
        decode(llava, interp.Prompt.from_tokens([5, 6, 7]), AvisC(), 1)
    config = llava.config.vision_config
    config.deepstack_visual_indexes = [0]
    try:
        with pytest.raises(ModelRefused, match="DeepStack"):
            decode(llava, prompt(0), AvisC(), 1)
    finally:
        del config.deepstack_visual_indexes
