"""The experiment on a written circuit, its silent twin and random models: verdicts follow from them."""

import numpy as np
import pytest
import torch
import transformers as t
from typer.testing import CliRunner

from experiments import _relevance, attention_flow
from experiments.__main__ import app
from experiments._output import execute
from experiments._paper import Settings, load
from interp.core import Prompt
from interp.flow.saliency import Contrast
from interp.models.model import Model
from interp.organisms import induction_circuit

MATHEMATICS = {attention_flow.MASK, attention_flow.RELEASED, attention_flow.DECEIVES,
               attention_flow.TWIN}
"""What holds whatever the weights are, and what is asked of written models only."""


def outcome(folder, out, figure=("first",)):
    settings = Settings.of(model=[str(folder)], out=out, tiny=True, figure=list(figure))
    made = execute(load("attention_flow"), settings)
    found = {claim.sentence: claim for claim in made.claims}
    assert len(found) == len(made.claims)
    return made, found


@pytest.mark.parametrize("architecture", ["llama", "gemma2", "bert"])
def test_a_random_model_shows_what_is_mathematics_and_nothing_else(tiny, tmp_path, architecture):
    tiny(architecture).save_pretrained(tmp_path / architecture)
    made, found = outcome(tmp_path / architecture, tmp_path / "out")
    supported = {s for s, claim in found.items() if claim.verdict == "supported"}
    assert supported <= MATHEMATICS
    assert {attention_flow.DECEIVES, attention_flow.TWIN} <= supported
    if architecture == "bert":
        assert "earlier tokens see later ones" in found[attention_flow.RELEASED].reason
    else:
        assert found[attention_flow.RELEASED].verdict == "supported"
        assert found[attention_flow.RELEASED].measured == 0
    tasks = [claim for s, claim in found.items() if s not in MATHEMATICS]
    assert len(tasks) > 25 and all(claim.reason for claim in tasks)
    # A random Gemma repeats the last token, whatever stands before it.
    why = "before its last token changes" if architecture == "gemma2" else "a probability of 0.0"
    assert any(why in claim.reason for claim in tasks)


def test_an_encoder_without_words_finds_no_partner(tiny, tmp_path):
    torch.manual_seed(0)
    t.BertModel(tiny("bert").config).save_pretrained(tmp_path / "encoder")
    _, found = outcome(tmp_path / "encoder", tmp_path / "out")
    assert {s for s, c in found.items() if c.verdict == "supported"} <= MATHEMATICS
    assert all(c.verdict in ("not testable", "inconclusive", "refuted")
               for s, c in found.items() if s not in MATHEMATICS)


def circuit_task(speaks, count=6):
    """Random words with one of them twice: the word after it is the answer."""
    items = []
    for seed in range(count):
        ids = [int(x) for x in np.random.default_rng(seed).permutation(np.arange(3, 39))[:14]]
        at = 3 + seed
        items.append(Contrast(Prompt((*ids, ids[at])), (ids[at + 1], ids[at - 2])))
    model = Model(induction_circuit.circuit(speaks), "circuit" if speaks else "silent")
    task = _relevance.Task("pair", "written", items, [39, 2])
    task.unfit = _relevance._unfit(model, task)
    return model, task


@pytest.fixture(scope="module")
def written():
    model, task = circuit_task(True)
    return model, task, _relevance.relevance(model, task)


def test_two_hops_are_seen_by_rollout_and_not_by_raw_attention(written):
    """The answer hangs on the pair a b: the last layer reads b alone, and b was told of a."""
    model, task, one = written
    for i in range(len(task)):
        a, b = 3 + i, 4 + i
        assert set(np.argsort(-np.nan_to_num(one.importance["blank"][i])[:-1])[:2]) == {a, b}
        rolled = one.rows["values"][i, -1]
        assert rolled[b] > 0 and rolled[a] > np.median(rolled[1:-1])
    assert not task.unfit
    gap = one.rho("values", "blank")[:, -1] - one.rho("uniform", "blank")[:, -1]
    assert gap.mean() > 0.3


def test_a_circuit_that_says_nothing_is_told_so():
    model, task = circuit_task(False)
    assert "prefers the right answer in" in task.unfit


def test_flags_show_the_first_of_the_pair_is_used_through_the_second(written):
    """The last row does not look at a, yet without a there is no answer: only the cut shows it."""
    model, task, one = written
    points = _relevance.flag_points(model, task, one)
    for i in range(len(task)):
        a, b = 3 + i, 4 + i
        assert points["whole"][i, a] > 0.5 and points["whole"][i, b] > 0.5
        assert points["effect"][i, 1, b] > 0.5  # L1 reads b itself
        assert np.nanmax(points["effect"][i, :, a]) < 0.05  # and a in no layer
    assert points["share"][:, 1].sum(-1) == pytest.approx(np.ones(len(task)), abs=1e-4)


def test_a_head_is_chosen_on_the_other_half_of_the_prompts():
    one = attention_flow._One.__new__(attention_flow._One)
    noise = np.random.default_rng(0).uniform(-1, 1, (40, 3, 50))
    best = one._best(noise)
    # The best of 150 by luck is no better than any where it was not chosen.
    assert noise.mean(0).max() > 0.2 and abs(best.mean()) < 0.2
    noise[:, 1, 7] = 0.9
    assert best.shape == (40,) and (one._best(noise) == 0.9).all()


def test_the_upper_third_and_entropy_are_what_they_say():
    values = np.arange(12.0).reshape(2, 6)
    assert _relevance.top_third(values).tolist() == [4.5, 10.5]
    values[0, 5] = np.nan
    assert _relevance.top_third(values).tolist() == [4.0, 10.5]
    rows = np.tile(np.array([0.9, 0.05, 0.05, np.nan]), (1, 2, 1))
    keep = [np.array([False, True, True])]
    assert _relevance.entropy(rows, keep)[0] == pytest.approx(np.log(2))
    assert _relevance.some_layers(32) == [0, 6, 12, 18, 24, 31] and _relevance.some_layers(1) == [0]


def test_a_shorter_map_is_laid_over_the_end():
    found = attention_flow._shifted(np.array([1.0, 2.0]), 4)
    assert np.isnan(found[:2]).all() and found[2:].tolist() == [1, 2]
    assert attention_flow._shifted(np.arange(5.0), 2).tolist() == [3, 4]


def test_every_figure_of_the_reader_is_drawn(tmp_path):
    made, found = outcome("reader", tmp_path / "out", figure=tuple(attention_flow.PAPER.figures))
    assert {f.name for f in made.figures if f.files} == set(attention_flow.PAPER.figures)
    assert all(len(f.png) > 1000 for f in made.figures if f.files)
    assert found[attention_flow.MASK].verdict == "supported"
    assert all(c.reason for c in made.claims if c.verdict == "not testable")
    causal = [c for c in made.claims if c.causal]
    assert causal and all(c.control or c.reason for c in causal)


def test_an_unknown_model_is_one_sentence(tmp_path):
    done = CliRunner().invoke(app, ["run", "attention_flow", "--tiny", "--model",
                                    str(tmp_path / "nowhere"), "--out", str(tmp_path / "out")])
    assert done.exit_code == 1 and "Traceback" not in done.output
    lines = [line for line in done.output.splitlines() if "nowhere" in line]
    assert len(lines) == 1 and "there is no folder" in lines[0]
