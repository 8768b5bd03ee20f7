"""The experiment on the bundled reader, on its untrained twin, and on unsuitable models."""

import pytest

from experiments import position_bias
from experiments._output import execute
from experiments._paper import Settings, load
from interp.core import ModelNotFound
from interp.organisms import reader

SENTENCES = position_bias.SENTENCES
CAUSAL = ("ranking", "retriever", "scaling")


def result(name, out, **more):
    outcome = execute(load("position_bias"), Settings.of(
        model=[str(name)], out=out, tiny=True, **more))
    keys = {sentence: key for key, sentence in SENTENCES.items()}
    return outcome, {keys[claim.sentence]: claim for claim in outcome.claims}


def test_the_bundled_reader(tmp_path):
    outcome, found = result("reader", tmp_path)
    assert found.keys() == SENTENCES.keys()
    assert found["order_free"].verdict == "supported"
    assert found["order_free"].measured < 1e-3
    assert "not built" in found["pine"].reason
    for key in CAUSAL:
        assert found[key].causal and found[key].control
    assert len(found["basin"].details["profile"]) == 4
    assert found["scaling"].paper_tag == "secondary"
    drawn = {path.name for path in outcome.folder.glob("*.png")}
    assert drawn == {f"{name}.reader.png" for name in position_bias.PAPER.figures}


def test_a_model_that_answers_nothing_is_told_so(tmp_path):
    folder = tmp_path / "untrained"
    reader.build(0, layers=2).save_pretrained(folder)
    reader.tokenizer().save_pretrained(folder)
    _, found = result(folder, tmp_path / "out", figure=["basin"])
    assert found.keys() == SENTENCES.keys()
    for key in (*CAUSAL, "follows", "orders"):
        assert found[key].verdict == "not testable" and "answers none" in found[key].reason
    assert found["order_free"].verdict == "supported"
    assert found["channel"].measured is not None


@pytest.mark.parametrize("architecture, why", [
    ("bert", "is an encoder"), ("gpt2", "has no tokenizer")])
def test_unsuitable_models_get_one_sentence(tiny, tmp_path, architecture, why):
    tiny(architecture).save_pretrained(tmp_path / architecture)
    _, found = result(tmp_path / architecture, tmp_path / "out")
    assert {claim.verdict for claim in found.values()} == {"not testable"}
    assert len({claim.reason for claim in found.values()}) == 1
    assert why in found["basin"].reason


def test_an_unknown_model_is_one_sentence(tmp_path):
    with pytest.raises(ModelNotFound, match="no-such-model"):
        result("no-such-model", tmp_path)
