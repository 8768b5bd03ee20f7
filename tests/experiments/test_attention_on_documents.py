"""Focus directions, ACT and ZeroTuning end to end: a model that reads, one that was never trained,
one with another tokenizer, and models that cannot be asked."""

import json

import numpy as np
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM
from typer.testing import CliRunner

import interp
from experiments import calibration_act, focus_directions, zero_tuning
from experiments.__main__ import app
from experiments._output import execute
from experiments._paper import Settings, load
from interp.core import Prompt
from interp.organisms import reader

NAMES = ("focus_directions", "calibration_act", "zero_tuning")
SENTENCES = {
    "focus_directions": {**focus_directions.FOCUS_CLAIMS, **focus_directions.RANK_CLAIMS},
    "calibration_act": calibration_act.CLAIMS, "zero_tuning": zero_tuning.CLAIMS,
}


def run(name, model, out, **more):
    settings = Settings.of(model=[str(model)], out=out, tiny=True, **more)
    outcome = execute(load(name), settings)
    keys = {sentence: key for key, sentence in SENTENCES[name].items()}
    return outcome, {keys[claim.sentence]: claim for claim in outcome.claims}


@pytest.fixture(scope="module")
def untrained(tmp_path_factory):
    """The reader's twin: its language and architecture, without its training."""
    folder = tmp_path_factory.mktemp("models") / "untrained"
    reader.build(3, d_model=32, layers=2, heads=4).save_pretrained(folder)
    reader.tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def out(tmp_path_factory):
    return tmp_path_factory.mktemp("out")


@pytest.mark.parametrize("name", NAMES)
def test_every_claim_has_a_verdict_and_every_figure_is_there(name, out):
    outcome, found = run(name, "reader", out / "reader")
    assert found.keys() == SENTENCES[name].keys()
    assert {f.name for f in outcome.figures if f.files} == set(load(name).paper.figures)
    for figure in outcome.figures:
        for file in figure.files:
            assert (outcome.folder / file).stat().st_size > 1000
    for claim in found.values():
        if claim.causal and not claim.reason:
            assert "seed" in claim.control or "position" in claim.control
        assert claim.paper_tag != "unverified"
    content = json.loads((outcome.folder / "claims.json").read_text())
    assert len(content) == len(SENTENCES[name])


def test_the_reader_looks_at_the_gold_document_and_its_untrained_twin_does_not(untrained, out):
    _, found = run("focus_directions", "reader", out / "one", figure=["heads"])
    _, twin = run("focus_directions", untrained, out / "two", figure=["heads"])
    assert found["sparse"].verdict != "not testable"
    assert found["sparse"].details["above .1"] >= 1
    assert found["no_op"].verdict == twin["no_op"].verdict == "supported"
    assert found["no_op"].details["the same direction on queries"] > 100 * found["no_op"].measured
    for key in ("sparse", "middle"):
        assert "no head gives the gold document" in twin[key].reason
    for key in ("boost", "generalize", "failures", "ranking"):
        assert twin[key].verdict != "supported"


def test_an_untrained_model_supports_nothing_about_answers(untrained, out):
    _, act = run("calibration_act", untrained, out / "three", figure=["counts"])
    assert act["accuracy"].verdict != "supported"
    _, zero = run("zero_tuning", untrained, out / "four", figure=["gamma"])
    assert all(zero[key].verdict != "supported" for key in
               ("gain qa", "gain classification", "mass", "layers", "position", "sign"))
    assert "answered right" in zero["layers"].reason


def test_a_model_with_another_tokenizer_is_asked_in_english(tmp_path):
    """A random Llama that reads with a pretrained tokenizer."""
    try:
        tokenizer = interp.open_model("all-minilm-l6-v2").tokenizer
    except interp.UndertowError as error:
        pytest.skip(f"needs the optional pretrained encoder: {error}")
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=32, intermediate_size=48, num_hidden_layers=3,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=700,
        bos_token_id=tokenizer.cls_token_id, eos_token_id=tokenizer.sep_token_id))
    model.save_pretrained(tmp_path / "english")
    tokenizer.save_pretrained(tmp_path / "english")
    _, found = run("focus_directions", tmp_path / "english", tmp_path / "out", figure=["heads"])
    assert found.keys() == SENTENCES["focus_directions"].keys()
    assert "0 of 6 answers are right" in found["failures"].reason
    assert found["no_op"].verdict == "supported" and found["boost"].verdict == "inconclusive"
    from experiments import _answer_tasks as tasks

    opened = interp.open_model(str(tmp_path / "english"))
    made = tasks.classification(opened, np.random.default_rng(0), 8)
    said = {tokenizer.decode(answer) for answer in made.answers}
    assert said == set(tasks.LABELS) and all(answer[0] in made.starts for answer in made.answers)


@pytest.mark.parametrize("name", NAMES)
def test_models_that_cannot_be_asked_say_why(name, tiny, tmp_path):
    tiny("bert").save_pretrained(tmp_path / "encoder")
    _, found = run(name, tmp_path / "encoder", tmp_path / "out")
    assert {claim.verdict for claim in found.values()} == {"not testable"}
    assert all("encoder is an encoder" in claim.reason for claim in found.values())


def test_the_toy_task_shows_the_late_keys_of_the_card(tmp_path):
    _, found = run("calibration_act", "backcopy-1l", tmp_path)
    assert found["late"].verdict == "supported" and found["beyond"].verdict != "supported"
    assert found["accuracy"].reason == "the language of backcopy-1l has no facts to ask for"
    settings = Settings.of(out=tmp_path, tiny=True)
    silent = type("Silent", (), {"kind": "decoder", "tokenizer": None, "name": "silent"})()
    from experiments import _answer_tasks as tasks

    with pytest.raises(interp.UndertowError, match="silent has no tokenizer"):
        tasks.qa(silent, settings.rng(0), 4, documents=4)


def test_an_unknown_model_is_one_sentence(tmp_path):
    done = CliRunner().invoke(app, ["run", *NAMES, "--tiny", "--model", str(tmp_path / "nowhere"),
                                    "--out", str(tmp_path / "out")])
    assert done.exit_code == 1 and "Traceback" not in done.output
    assert "there is no folder" in done.output


# -- parts ------------------------------------------------------------------------------------


def test_auroc_is_the_probability_of_the_right_order():
    values = np.array([0.9, 0.8, 0.3, 0.3])
    assert focus_directions.auroc(values, np.array([1, 1, 0, 0])) == 1.0
    assert focus_directions.auroc(values, np.array([0, 0, 1, 1])) == 0.0
    assert focus_directions.auroc(values, np.array([0, 0, 1, 0])) == pytest.approx(1 / 6)
    assert np.isnan(focus_directions.auroc(values, np.ones(4)))


def test_the_best_gamma_is_the_most_accurate_then_the_likeliest_then_the_mildest():
    n = len(zero_tuning.GAMMAS)
    one = zero_tuning.GAMMAS.index(1.0)
    assert zero_tuning.best_gamma(np.zeros(n)) == one
    assert zero_tuning.best_gamma(np.eye(n)[2]) == 2
    assert zero_tuning.best_gamma(np.zeros(n), np.eye(n)[4]) == 4


def test_tasks_have_the_right_answers():
    from experiments import _answer_tasks as tasks

    model = interp.open_model("reader")
    rng = np.random.default_rng(0)
    qa = tasks.qa(model, rng, 10, documents=5, words=9)
    cities = tasks.classification(model, rng, 10, length=64)
    for task, least in ((qa, 10), (cities, 9)):
        said = model.generate(task.prompts, 3)
        assert sum(a == b for a, b in zip(said, task.answers)) >= least
        assert all(task.valid(i, row[0]) for i, row in enumerate(said))
        assert not task.valid(0, reader.TOKEN["river"])
    assert len(qa.half(0)) == len(qa.half(1)) == 5
    assert isinstance(qa.prompts[0], Prompt) and qa.half(1).prompts[0] is qa.prompts[1]
