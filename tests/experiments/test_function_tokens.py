"""The experiment on the bundled reader, on an encoder, and on models that read nothing."""

import copy

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from experiments import function_tokens
from experiments.__main__ import app
from experiments._output import execute
from experiments._paper import Settings, load

CLAIMS = {key: sentence for key, (sentence, _) in function_tokens.Words.claims.items()}


def ran(model, out, **more):
    settings = Settings.of(model=[str(model)], out=out, tiny=True, **more)
    outcome = execute(load("function_tokens"), settings)
    found = {claim.sentence: claim for claim in outcome.claims}
    assert len(found) == len(outcome.claims) == len(CLAIMS)
    return outcome, {key: found[sentence] for key, sentence in CLAIMS.items()}


def test_the_reader_has_every_claim_and_figure(tmp_path):
    outcome, found = ran("reader", tmp_path)
    assert all(claim.verdict != "not testable" for claim in found.values())
    assert {f.name for f in outcome.figures if f.files} == set(function_tokens.PAPER.figures)
    assert found["few"].details["kind"] == "neurons"
    assert found["few"].interval[0] <= found["few"].measured <= found["few"].interval[1]
    # In this language a trigger word decides what follows: after it nothing is hard.
    assert found["after"].verdict == "refuted"
    loss = found["loss"].details
    assert found["loss"].measured + sum(
        loss[f"{a} after {b}"] for a, b in (("content", "content"), ("function", "content"),
                                            ("function", "function"))) == pytest.approx(1)


@pytest.mark.parametrize("architecture", ("llama", "gpt2"))
def test_random_weights_show_nothing_but_exposure(tiny, tmp_path, architecture):
    from interp.organisms import reader

    config = copy.deepcopy(tiny(architecture).config)
    config.vocab_size = len(reader.WORDS)
    torch.manual_seed(sum(architecture.encode()))
    model = type(tiny(architecture))(config)
    model.save_pretrained(tmp_path / "model")
    reader.tokenizer().save_pretrained(tmp_path / "model")
    _, found = ran(tmp_path / "model", tmp_path / "out", figure=["degree"])
    for key in ("trained", "exposure", "beyond", "loss", "after"):
        assert found[key].verdict != "supported", key
    # Seen more often, a token meets more: true without any training.
    assert found["power"].verdict == "supported"


def test_an_encoder_has_a_graph_but_no_loss(tmp_path):
    outcome, found = ran("all-minilm-l6-v2", tmp_path, figure=["loss"])
    assert "predicts no next token" in found["loss"].reason == found["after"].reason
    assert found["few"].details["kind"] == "directions" and np.isfinite(found["few"].measured)
    assert "the" in found["few"].details["tokens"].split()
    (figure,) = outcome.figures
    assert figure.reason == found["loss"].reason


def test_a_model_without_a_tokenizer_has_its_reason(tiny, tmp_path):
    tiny("llama").save_pretrained(tmp_path / "mute")
    _, found = ran(tmp_path / "mute", tmp_path / "out")
    assert {claim.verdict for claim in found.values()} == {"not testable"}
    assert "reads no text here" in found["few"].reason


def test_an_unknown_model_is_one_sentence(tmp_path):
    done = CliRunner().invoke(app, ["run", "function_tokens", "--tiny", "--model",
                                    str(tmp_path / "nowhere"), "--out", str(tmp_path / "out")])
    assert done.exit_code == 1 and "Traceback" not in done.output
    assert sum("there is no folder" in line for line in done.output.splitlines()) == 1
