"""Heads chosen by hand against random ones: what is scaled, what it is compared with, what is said."""

import numpy as np
import pytest

import interp
from interp.causal import chosen_heads
from interp.causal.metrics import AnswerLogProb
from interp.core import Head, OutOfRange, Prompt
from interp.models.model import Model


@pytest.fixture(scope="module")
def model(tiny):
    return Model(tiny("llama"), "tiny llama")


@pytest.fixture(scope="module")
def task():
    rng = np.random.default_rng(0)
    return ([Prompt.from_tokens([1, *rng.integers(3, 96, 9)]) for _ in range(5)],
            [[int(a), int(b)] for a, b in rng.integers(3, 96, (5, 2))])


def test_removing_heads_is_ablating_them_and_factor_one_changes_nothing(model, task):
    heads = ["L1H2", "L2H0"]
    gone = chosen_heads.measure(model, *task, heads, seeds=2)
    expected = AnswerLogProb(task[1])(model, task[0], interp.ablate(heads))
    found = gone["log_prob"]
    assert np.allclose(found.sel(condition="chosen"), expected)
    assert np.abs(found.sel(condition="chosen") - found.sel(condition="untouched")).max() > 1e-3
    same = chosen_heads.measure(model, *task, heads, factor=1.0, seeds=2)["log_prob"]
    assert np.allclose(same, same.sel(condition="untouched"))
    assert chosen_heads.measure(model, *task, (), seeds=2)["log_prob"].std("condition").max() == 0


def test_the_control_is_the_mean_of_random_heads_of_the_same_layers(model, task):
    found = chosen_heads.measure(model, *task, ["L0H1", "L0H4", "L2H3"], avoid=["L2H3", "L0H0"], seeds=3)
    sets = [[Head.parse(name) for name in one] for one in found.manifest["random"]]
    assert found.manifest["layer_matched"] and len(sets) == 3
    for one in sets:
        assert sorted(head.layer for head in one) == [0, 0, 2]
        assert not set(one) & {Head(0, 1), Head(0, 4), Head(2, 3), Head(0, 0)}
    assert len({frozenset(one) for one in sets}) > 1             # not one set three times
    rows = [AnswerLogProb(task[1])(model, task[0], interp.ablate(one)) for one in sets]
    assert np.allclose(found["log_prob"].sel(condition="random"), np.mean(rows, 0))


def test_the_control_avoids_what_it_is_told_to_as_far_as_heads_are_left(model, task):
    barred = ["L0H0", "L0H2", "L0H5"]                            # leaves L0H1 and L0H3
    found = chosen_heads.measure(model, *task, ["L0H4"], avoid=barred, seeds=12)
    assert {name for one in found.manifest["random"] for name in one} == {"L0H1", "L0H3"}
    found = chosen_heads.measure(model, *task, ["L0H4"], avoid=[*barred, "L0H1", "L0H3"], seeds=4)
    assert {name for one in found.manifest["random"] for name in one} == {"L0H3"}


def test_without_heads_left_there_is_no_control_and_none_is_made_up(model, task):
    every = [Head(layer, head) for layer in range(3) for head in range(6)]
    found = chosen_heads.measure(model, *task, every)
    assert found.manifest["random"] == [] and not found.manifest["layer_matched"]
    assert np.isnan(found["accuracy"].sel(condition="random")).all()
    assert "random" not in found.manifest["texts"]
    layer = chosen_heads.measure(model, *task, every[:6], seeds=1)       # one whole layer: from others
    assert not layer.manifest["layer_matched"] and len(layer.manifest["random"][0]) == 6


def test_the_text_is_what_the_model_says_with_those_heads_scaled(model, task):
    heads = [(0, 0), (0, 1), (1, 5), (2, 2)]
    found = chosen_heads.measure(model, *task, heads, factor=0.0, example=3, new_tokens=4)
    for name, write in {"untouched": (), "chosen": interp.scale(heads, 0.0)}.items():
        said = model.generate(task[0][3], 4, write)[0]
        assert found.manifest["texts"][name] == " ".join(map(str, said))


def test_bad_choices_are_refused_in_a_sentence(model, task):
    with pytest.raises(OutOfRange, match="head L3H0 does not exist"):
        chosen_heads.measure(model, *task, ["L3H0"])
    with pytest.raises(OutOfRange, match="no prompt 5 to continue"):
        chosen_heads.measure(model, *task, ["L1H0"], example=5)
