"""The microscope on the reader, on random models and on models of the wrong kind."""

import numpy as np
import pytest

import interp
from experiments import _token_removal, _word_classes, microscope
from experiments._output import execute
from experiments._paper import Settings, load

ABOUT_TRAINED = set(microscope.Microscope.claims) - {"judged"}


def outcome(model, out, *figures):
    return execute(load("microscope"), Settings.of(
        model=[str(model)], out=out, tiny=True, figure=list(figures) or None))


def test_every_claim_on_the_reader_has_a_verdict_and_every_figure_is_there(tmp_path):
    found = outcome("reader", tmp_path)
    claims = {c.sentence: c for c in found.claims}
    assert len(claims) == len(found.claims) == len(microscope.Microscope.claims)
    assert {f.name for f in found.figures if f.files} == set(microscope.PAPER.figures)
    assert sum(c.verdict != "not testable" for c in found.claims) == len(ABOUT_TRAINED)
    for key in ("function", "gain"):
        assert "within 16 positions" in claims[microscope.Microscope.claims[key][0]].control
    removed = claims[microscope.Microscope.claims["removal"][0]]
    assert removed.causal and "drawn 5 times" in removed.control
    linear = claims[microscope.Microscope.claims["linear"][0]]
    # In sample the map always looks better than on other texts.
    assert np.greater(linear.details["in sample"], linear.details["by block"]).all() or np.isnan(
        linear.details["in sample"]).all()


@pytest.mark.parametrize("architecture", ["gpt2", "qwen3"])
def test_nothing_is_claimed_of_random_weights(tiny, letters, tmp_path, architecture):
    tiny(architecture).save_pretrained(tmp_path / architecture)
    letters.save_pretrained(tmp_path / architecture)
    found = outcome(tmp_path / architecture, tmp_path / "out", "clouds")
    assert {c.verdict for c in found.claims} == {"not testable"}
    assert sum("no better than word frequencies" in c.reason for c in found.claims) == len(ABOUT_TRAINED)


def test_an_encoder_is_told_why(tmp_path):
    found = outcome("all-minilm-l6-v2", tmp_path, "clouds")
    reasons = {c.reason for c in found.claims}
    assert len(reasons) == 2 and any("is an encoder" in reason for reason in reasons)


def test_matched_places_remove_what_position_alone_does():
    """Function words that come late look costly only because everything late is."""
    rng = np.random.default_rng(0)
    document, position = np.repeat(np.arange(20), 64), np.tile(np.arange(64), 20)
    function = rng.random(1280) < position / 64
    values = position / 8.0 + rng.standard_normal(1280)
    assert values[function].mean() - values[~function].mean() > 1
    gap, p = microscope.matched(values, function, document, position // 4, 199, 0)
    assert abs(gap.mean()) < 0.3 and p > 0.05
    gap, p = microscope.matched(values - 1.0 * function, function, document, position // 4, 199, 0)
    assert -1.3 < gap.mean() < -0.7 and p < 0.02


def test_classes_of_words():
    reader = interp.open_model("reader")
    ids = reader.tokenizer("the river ; note amber one").input_ids
    assert _word_classes.kinds(reader, ids).tolist() == [
        "", "function", "content", "punctuation", "punctuation", "content", "content"]
    english = interp.open_model("all-minilm-l6-v2")
    ids = english.tokenizer("The theory, of all watchmakers!").input_ids
    pieces = english.tokenizer.convert_ids_to_tokens(ids)
    found = dict(zip(pieces, _word_classes.kinds(english, ids)))
    assert found["the"] == found["of"] == "function" and found["theory"] == "content"
    assert found[","] == found["!"] == "punctuation" and found["[CLS]"] == ""
    assert not _word_classes.kinds(interp.open_model("backcopy-1l"), [3, 4]).any()


def test_as_many_tokens_of_either_class_are_removed_and_the_fact_stays():
    reader = interp.open_model("reader")
    items, _ = _token_removal._items(reader, Settings.of(tiny=True))
    for context, free, answer in items:
        kept = [t for p, t in enumerate(context) if p not in free]
        assert context[-2:] == kept[-2:] and all(token in kept for token in answer)
    found, reason = _token_removal.removal(reader, Settings.of(tiny=True), seeds=2)
    assert not reason and (found["removed"] > 0).all() and found.attrs["seeds"] == 2
    none, reason = _token_removal.removal(interp.open_model("backcopy-1l"), Settings.of(tiny=True))
    assert none is None and reason.startswith("backcopy-1l reads neither")
