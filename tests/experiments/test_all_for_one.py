"""The planted adder's truth is found, its twin's absence too, and a random model shows nothing."""

import numpy as np
import pytest
from typer.testing import CliRunner

from experiments import _slot_tasks as tasks
from experiments import all_for_one as experiment
from experiments.__main__ import app
from experiments._output import execute
from experiments._paper import Settings, load
from interp.core import PromptError
from interp.models.model import Model
from interp.organisms import adder_circuit


def result(model, out, figure="windows"):
    return execute(load("all_for_one"), Settings.of(
        model=[str(model)], out=out, tiny=True, figure=[figure]))


def verdicts(outcome):
    keys = {sentence: key for key, sentence in experiment.SENTENCES.items()}
    found = {keys[claim.sentence]: claim for claim in outcome.claims}
    assert found.keys() == experiment.SENTENCES.keys() and len(outcome.claims) == len(found)
    return found


def saved(model, tokenizer, folder):
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def test_the_planted_adder_is_found_as_it_was_built(tmp_path):
    outcome = result(experiment.PLANTED, tmp_path)
    found = verdicts(outcome)
    layers, (first, last) = experiment.LAYERS, experiment.TRANSFER
    assert found["wait"].measured == first / layers
    assert found["few"].details["first layer"] == first
    assert found["few"].measured == (last - first + 1) / layers
    for key in ("wait", "few", "necessary", "special", "means"):
        assert found[key].verdict == "supported", key
    assert found["necessary"].measured == 1 and found["necessary"].causal
    assert found["special"].details["loss without reading in other layers"] == 0
    assert found["context"].verdict == "not testable"
    for key in ("wait", "few", "necessary"):
        assert found[key].paper_tag == "secondary"
    assert [f.name for f in outcome.figures if f.files] == ["windows"]


def test_where_tokens_meet_before_the_last_one_reads_no_window_is_claimed(tmp_path):
    twin = saved(adder_circuit.build(8, (1, 3), relay=True), adder_circuit.words(), tmp_path / "twin")
    outcome = result(twin, tmp_path / "out", "layers")
    found = verdicts(outcome)
    assert found["wait"].measured == 1 / 8 and found["wait"].verdict == "refuted"
    for key in ("few", "necessary", "special"):
        assert "no window is faithful after waiting until layer 1" in found[key].reason
    reasons = {f.name: f.reason for f in outcome.figures}
    assert "tokens other than the last must meet" in reasons["layers"]


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_a_random_model_adds_nothing(tiny, letters, tmp_path, architecture):
    folder = saved(tiny(architecture), letters, tmp_path / architecture)
    found = verdicts(result(folder, tmp_path / "out"))
    assert {claim.verdict for claim in found.values()} == {"not testable"}
    assert "prompts right" in found["wait"].reason


def test_models_that_cannot_be_asked_are_told_so_in_a_sentence(tiny, tmp_path):
    tiny("bert").save_pretrained(tmp_path / "bert")
    found = verdicts(result(tmp_path / "bert", tmp_path / "out"))
    assert all("is an encoder" in claim.reason for claim in found.values())
    done = CliRunner().invoke(app, ["run", "all_for_one", "--tiny", "--model",
                                    str(tmp_path / "nowhere"), "--out", str(tmp_path / "out")])
    assert done.exit_code == 1 and "there is no folder" in done.output
    assert "Traceback" not in done.output


def test_slots_are_single_tokens_drawn_independently():
    model = Model(adder_circuit.build(3, (1,)), "adder", adder_circuit.words())
    task = tasks.arithmetic(model, np.random.default_rng(0), 12, 300)
    assert task.prompts.shape == (12, 7)
    numbers = task.prompts[:, adder_circuit.SLOTS]
    assert (task.answers == numbers.sum(1)).all()
    drawn = task.pool[:, adder_circuit.SLOTS]
    assert abs(np.corrcoef(drawn.T)[0, 1]) < 0.2 and set(drawn.ravel()) == set(range(10))
    with pytest.raises(PromptError, match="slots|token"):
        tasks.retrieval(model, np.random.default_rng(0), 12, 100)


def test_the_reader_is_asked_for_facts_that_its_contexts_do_not_give_away():
    rng = np.random.default_rng(0)
    task = tasks._recall(rng, 20, 400)
    assert task.prompts.shape[1] == task.pool.shape[1] == 1 + 3 * 6 + 2
    for row, answer in zip(task.prompts, task.answers):
        places = [t for t in (2, 8, 14) if row[t] == row[-1]]
        assert len(places) == 1 and row[places[0] + 1] == answer
    # In the pool the question is independent of the notes.
    matches = (task.pool[:, [2, 8, 14]] == task.pool[:, -1:]).mean()
    assert 0.1 < matches < 0.25
