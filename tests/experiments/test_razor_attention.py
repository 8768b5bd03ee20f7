"""The experiment on the bundled reader, the same model untrained, and unsuitable ones."""

import pytest

from experiments import razor_attention
from experiments._output import execute
from experiments._paper import Settings, SettingsError, load
from interp.core import ModelNotFound
from interp.organisms import reader

SENTENCES = razor_attention.SENTENCES


def result(name, out):
    return execute(load("razor_attention"), Settings.of(model=[str(name)], out=out, tiny=True))


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    outcome = result("reader", tmp_path_factory.mktemp("trained"))
    return outcome, {claim.sentence: claim for claim in outcome.claims}


def test_every_sentence_has_a_verdict_and_causes_have_controls(trained):
    found = trained[1]
    assert set(found) == set(SENTENCES.values())
    for key in ("minority", "causes", "compensation", "budget"):
        assert found[SENTENCES[key]].causal and found[SENTENCES[key]].control


def test_the_reader_needs_the_far_keys_of_its_induction_heads_only(trained):
    found = trained[1]
    for key in ("induction", "minority", "causes"):
        assert found[SENTENCES[key]].verdict == "supported", key
    # It has no echo heads, and the run says so.
    assert found[SENTENCES["echo"]].verdict == "refuted"
    cut = found[SENTENCES["causes"]].details
    assert cut["accuracy, cut from chosen"] < 0.5 < cut["accuracy, cut from others"]
    assert 0.2 < cut["cache that stays"] < 1


def test_the_run_leaves_its_figures(trained):
    files = {path.name for path in trained[0].folder.rglob("*.png")}
    assert files == {f"{name}.reader.png" for name in razor_attention.PAPER.figures}


def test_an_untrained_model_has_no_such_heads_and_loses_nothing(tmp_path):
    folder = tmp_path / "untrained"
    reader.build(0).save_pretrained(folder)
    reader.tokenizer().save_pretrained(folder)
    found = {c.sentence: c for c in result(folder, tmp_path / "out").claims}
    assert found[SENTENCES["induction"]].verdict == "refuted"
    for key in ("minority", "causes", "compensation", "budget", "overlap"):
        claim = found[SENTENCES[key]]
        assert claim.verdict == "not testable" and ("answers none" in claim.reason
                                                    or "does not retrieve" in claim.reason)


def test_unsuitable_models_are_refused_in_one_sentence(tmp_path):
    with pytest.raises(ModelNotFound):
        result("no-such-model", tmp_path)
    with pytest.raises(SettingsError, match="is an encoder: it has no cache"):
        result("all-minilm-l6-v2", tmp_path)
