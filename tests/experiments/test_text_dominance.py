"""Balance of attention on looker, on its untrained twin, on random models and without pictures."""

import math

import pytest
from typer.testing import CliRunner

from experiments import text_dominance as experiment
from experiments.__main__ import app
from experiments._output import execute
from experiments._paper import Settings, load
from interp.flow import dominance
from interp.organisms import looker
from tests.experiments.test_any_model import saved

NAMES = {sentence: key for key, (sentence, _) in experiment.CLAIMS.items()}


def result(name, out, **more):
    outcome = execute(load("text_dominance"), Settings.of(
        model=[str(name)], out=out, tiny=True, **more))
    found = {NAMES[claim.sentence]: claim for claim in outcome.claims}
    assert found.keys() == experiment.CLAIMS.keys() and len(found) == len(outcome.claims)
    return outcome, found


def test_looker_gets_a_verdict_for_every_claim_and_indices_that_agree(tmp_path):
    outcome, found = result("looker", tmp_path, figure=["stages", "exit"])
    assert {key for key, claim in found.items() if claim.verdict == "not testable"} <= {
        "three", "tells"}
    for key in ("dominance", "robust"):
        d = found[key].details
        assert d["AEI of text"] == pytest.approx(float(dominance.aei_of_mdi(
            d["MDI"], d["text tokens"] / d["visual tokens"])))
        assert found[key].measured == pytest.approx(math.log(d["MDI"]))
    more, beyond = found["more"], found["beyond"]
    # Where the text keeps its tokens, the counts alone add a slope of exactly one.
    assert more.measured - beyond.measured == pytest.approx(1, abs=0.15)
    assert found["compression"].causal and "random" in found["compression"].control
    assert {f.name for f in outcome.figures if f.files} <= {"stages", "exit"}
    kept = outcome.result("masses-looker")
    assert set(kept["segment"].values) == set(dominance.KEYS)
    assert found["dominance"].paper_tag == "secondary" and found["saved"].paper_tag == "paper"


def test_an_untrained_twin_is_not_asked(tmp_path):
    bare = looker.build(0)
    bare.save_pretrained(tmp_path / "untrained")
    looker.export(bare, tmp_path / "untrained")
    outcome, found = result(tmp_path / "untrained", tmp_path / "out")
    assert {claim.verdict for claim in found.values()} == {"not testable"}
    assert "there is nothing to lose" in found["dominance"].reason
    assert all(f.reason for f in outcome.figures)


@pytest.mark.parametrize("architecture", ["llava", "qwen2_5_vl"])
def test_nothing_is_supported_on_a_random_model(tiny, letters, tmp_path, architecture):
    folder = saved(tiny, architecture, tmp_path / architecture, letters)
    _, found = result(folder, tmp_path / "out", figure=["stages"])
    assert not [key for key, claim in found.items() if claim.verdict == "supported"]


def test_a_text_model_and_an_unknown_one_get_one_sentence(tmp_path):
    _, found = result("reader", tmp_path)
    assert {claim.reason for claim in found.values()} == {
        "reader is a text model: it has no image tokens"}
    done = CliRunner().invoke(app, ["run", "text_dominance", "--tiny", "--model",
                                    str(tmp_path / "nowhere"), "--out", str(tmp_path / "out")])
    assert done.exit_code == 1 and "Traceback" not in done.output
    assert len([line for line in done.output.splitlines() if "nowhere" in line]) == 1
