"""Neighbors that name what is shown are found where they were planted, and alignment is measured."""

import numpy as np
import pytest
from typer.testing import CliRunner

from experiments import latent_lens as experiment
from experiments.__main__ import app
from experiments._output import execute
from experiments._paper import Settings, load
from interp.organisms import looker
from probes import contextual_lens
from tests.experiments.test_any_model import saved

NAMES = {sentence: key for key, (sentence, _) in experiment.CLAIMS.items()}


def result(name, out, **more):
    outcome = execute(load("latent_lens"), Settings.of(model=[str(name)], out=out, tiny=True, **more))
    found = {NAMES[claim.sentence]: claim for claim in outcome.claims}
    assert found.keys() == experiment.CLAIMS.keys() and len(found) == len(outcome.claims)
    return outcome, found


def test_looker_is_read_and_every_claim_is_told(tmp_path):
    outcome, found = result("looker", tmp_path, figure=["leap", "overlap"])
    assert found["cones"].verdict == "supported" and "random weights" in found["cones"].control
    assert found["weights"].verdict == "supported" and found["weights"].null == pytest.approx(1 / 3)
    assert found["score"].verdict == "not testable"
    for key in ("logit", "embedding", "leap"):
        assert found[key].paper_tag == "secondary"
    # looker was never taught that visual tokens have the states of words.
    assert found["reads"].verdict != "supported" and "says nothing" in found["leap"].reason
    assert {f.name for f in outcome.figures if f.files} == {"leap", "overlap"}
    saved_as = outcome.result("alignment-looker")
    assert saved_as["matched"].dims == ("prompt", "layer") and saved_as["layer"].values[0] == -1


def test_planted_words_are_read_and_a_leap_is_seen(monkeypatch, tmp_path):
    deep = 3

    def planted(self, model):
        """Every visual token is a contextual state of its own word, after block 3."""
        texts = experiment._texts(model, 60, np.random.default_rng(11))
        bank = contextual_lens.build(model, texts, layers=[deep])
        rng, rows = np.random.default_rng(0), bank.rows_["token"].to_numpy()
        x = np.stack([bank.bank_[rng.choice(np.flatnonzero(np.isin(rows, p.words)))]
                      for p in self.patches])
        x = np.stack([x] * (1 + model.n_layers))
        return x + 0.1 * x.std() * rng.standard_normal(x.shape)

    monkeypatch.setattr(experiment._One, "_states", planted)
    monkeypatch.setattr(experiment._One, "_alignment", lambda self: self.give_up("not asked"))
    _, found = result("looker", tmp_path, figure=["hubs"])
    assert found["reads"].verdict == "supported" and found["reads"].measured > 0.3
    assert found["logit"].verdict == "supported"
    assert found["leap"].verdict == "supported"
    assert found["leap"].measured == pytest.approx(deep, abs=0.6)


def test_an_untrained_twin_has_learned_nothing_to_read(tmp_path):
    bare = looker.build(0)
    bare.save_pretrained(tmp_path / "untrained")
    looker.export(bare, tmp_path / "untrained")
    outcome, found = result(tmp_path / "untrained", tmp_path / "out")
    assert {claim.verdict for claim in found.values()} == {"not testable"}
    assert "there is nothing to lose" in found["reads"].reason
    assert all(f.reason for f in outcome.figures)


@pytest.mark.parametrize("architecture", ["llava", "qwen2_5_vl"])
def test_nothing_is_supported_on_a_random_model(tiny, letters, tmp_path, architecture):
    folder = saved(tiny, architecture, tmp_path / architecture, letters)
    _, found = result(folder, tmp_path / "out", figure=["cones"])
    assert not [key for key, claim in found.items() if claim.verdict == "supported"]


def test_a_text_model_and_an_unknown_one_get_one_sentence(tmp_path):
    _, found = result("reader", tmp_path)
    assert {claim.reason for claim in found.values()} == {
        "reader is a text model: it has no image tokens"}
    done = CliRunner().invoke(app, ["run", "latent_lens", "--tiny", "--model",
                                    str(tmp_path / "nowhere"), "--out", str(tmp_path / "out")])
    assert done.exit_code == 1 and "Traceback" not in done.output
    assert len([line for line in done.output.splitlines() if "nowhere" in line]) == 1
