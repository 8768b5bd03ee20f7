"""The experiment on a model that knows its texts, on random ones, and on models of the wrong kind."""

import copy

import pytest
from typer.testing import CliRunner

import interp
from experiments import token_geometry
from experiments.__main__ import app
from experiments._output import execute
from experiments._paper import Settings, load

ABOUT_TRAINED = set(token_geometry.Geometry.claims) - {"training"}


def outcome(model, out, *figures):
    return execute(load("token_geometry"), Settings.of(
        model=[str(model)], out=out, tiny=True, figure=list(figures) or None))


def test_every_claim_on_the_reader_has_a_verdict_and_every_figure_is_there(tmp_path):
    found = outcome("reader", tmp_path)
    verdicts = {c.sentence: c for c in found.claims}
    assert len(verdicts) == len(found.claims) == len(token_geometry.Geometry.claims)
    assert {f.name for f in found.figures if f.files} == set(token_geometry.PAPER.figures)
    tested = [c for c in found.claims if c.verdict != "not testable"]
    assert len(tested) == len(ABOUT_TRAINED)
    # The embeddings hold fewer points than tokens, and are not compared with the layers.
    place = verdicts[token_geometry.Geometry.claims["place"][0]]
    assert -1 not in place.details["layers"]
    assert place.details["different points in what enters block 0"] < 0.9
    assert all(c.control for c in tested if c.figure in ("overlap", "cosine", "correlation"))
    assert set(found.manifest["data"]) == {"texts-reader", "scales-reader", "random-reader"}


@pytest.mark.parametrize("architecture", ["gpt2", "gemma2"])
def test_nothing_is_claimed_of_random_weights(tiny, letters, tmp_path, architecture):
    tiny(architecture).save_pretrained(tmp_path / architecture)
    letters.save_pretrained(tmp_path / architecture)
    found = outcome(tmp_path / architecture, tmp_path / "out", "overlap")
    assert {c.verdict for c in found.claims} == {"not testable"}
    reasons = [c.reason for c in found.claims if "no better than word frequencies" in c.reason]
    assert len(reasons) == len(ABOUT_TRAINED)


def test_an_encoder_and_an_unknown_model_are_one_sentence(tiny, tmp_path):
    tiny("bert").save_pretrained(tmp_path / "bert")
    found = outcome(tmp_path / "bert", tmp_path / "out", "overlap")
    assert {c.reason for c in found.claims} == {"bert is an encoder: it predicts no next token"}
    done = CliRunner().invoke(app, ["run", "token_geometry", "--tiny", "--model",
                                    str(tmp_path / "nowhere"), "--out", str(tmp_path / "out")])
    assert done.exit_code == 1 and "Traceback" not in done.output
    assert sum("nowhere" in line for line in done.output.splitlines()) == 1


def test_texts_are_as_long_as_the_model_allows():
    short = copy.copy(interp.open_model("reader"))
    for most, length in ((None, 257), (1024, 257), (256, 65)):
        short.max_positions = most
        made, what = token_geometry.texts(short, Settings.of())
        assert {len(p) for p in made} == {length} and "reader" in what
