"""The experiment on written and random models: mathematics holds on all, and nothing else by chance."""

import numpy as np
import pytest

from experiments import causal_mask_position
from experiments._output import execute
from experiments._paper import Settings, load
from interp.core import ModelNotFound
from interp.organisms import reader

SENTENCES = causal_mask_position.SENTENCES
MATHEMATICS = causal_mask_position.MATHEMATICS
OF_UNTRAINED = ("embeddings", "random", "bidirectional", "variance", "unmasked", "untrained")


def result(name, out, **more):
    outcome = execute(load("causal_mask_position"), Settings.of(
        model=[str(name)], out=out, tiny=True, **more))
    keys = {sentence: key for key, sentence in SENTENCES.items()}
    return outcome, {keys[claim.sentence]: claim for claim in outcome.claims}


def test_the_bundled_reader(tmp_path):
    outcome, found = result("reader", tmp_path)
    assert found.keys() == SENTENCES.keys()
    for key in MATHEMATICS:
        assert found[key].verdict == "supported", key
    assert found["closed"].measured < 1e-12
    assert found["law"].details["fourth layer"] == 0.625
    assert found["embeddings"].verdict == "supported"
    saved = outcome.result("trained-reader")
    assert saved["scores"].dims == ("layer", "query", "key") or "adjacency" in saved.data
    drawn = {path.name for path in outcome.folder.glob("*.png")}
    alone = {"recursion.png", "rows.png"}
    assert drawn == alone | {f"{name}.reader.png" for name in causal_mask_position.PAPER.figures
                             if f"{name}.png" not in alone}


@pytest.mark.parametrize("architecture", ["gpt2", "gemma2"])
def test_an_untrained_model_without_a_tokenizer(tiny, tmp_path, architecture):
    tiny(architecture).save_pretrained(tmp_path / architecture)
    _, found = result(tmp_path / architecture, tmp_path / "out", figure=["rows"])
    assert found.keys() == SENTENCES.keys()
    for key in ("key", "repeats", "untrained", "first"):
        assert found[key].verdict != "not testable"
        assert np.isfinite(found[key].measured)
    assert found["key"].details["read"] == "random tokens"


def test_an_encoder_has_no_mask(tiny, tmp_path):
    tiny("bert").save_pretrained(tmp_path / "bert")
    _, found = result(tmp_path / "bert", tmp_path / "out", figure=["rows"])
    assert {found[key].verdict for key in SENTENCES if key not in MATHEMATICS} == {"not testable"}
    assert "has no causal mask" in found["key"].reason


def test_one_layer_has_keys_that_have_seen_nothing(tmp_path):
    folder = tmp_path / "one"
    reader.build(0, layers=1).save_pretrained(folder)
    reader.tokenizer().save_pretrained(folder)
    _, found = result(folder, tmp_path / "out", figure=["rows"])
    assert "has one layer" in found["key"].reason
    assert found["random"].measured is not None


def test_an_unknown_model_is_one_sentence(tmp_path):
    with pytest.raises(ModelNotFound, match="no-such-model"):
        result("no-such-model", tmp_path)
