"""What is named and what is there; every claim on looker, on its untrained twin and on others."""

import json

import numpy as np
import pytest
from typer.testing import CliRunner

import interp
from experiments import _named_objects as cases
from experiments import hallucination
from experiments.__main__ import app
from experiments._output import execute
from experiments._paper import Settings, load
from interp.organisms import looker
from interp.prompts import scenes
from tests.experiments.test_any_model import saved

KEYS = {sentence: key for key, (sentence, _) in hallucination.SENTENCES.items()}
MATHEMATICS = {"released"}
"""What holds in every causal model, whatever its weights."""


def result(name, out, **more):
    outcome = execute(load("hallucination"), Settings.of(model=[str(name)], out=out, tiny=True,
                                                         **more))
    found = {KEYS[claim.sentence]: claim for claim in outcome.claims}
    assert len(found) == len(outcome.claims) and found.keys() == hallucination.SENTENCES.keys()
    assert all(claim.reason or claim.control for claim in found.values() if claim.causal)
    return found, outcome


def test_names_are_read_from_texts_of_any_style():
    def names(text):
        return [one.name for one in cases.named(text)]

    assert names("a red circle , the number 0 4 7 , an orange ring .") == [
        "red circle", "0 4 7", "orange ring"]
    assert names("1. A Red circle\n2. Two blue crosses; the number 47. 3 things") == [
        "red circle", "blue cross", "4 7"]
    assert names("red , circle") == names("infrared circle of reds") == []
    for scene in scenes.scenes(np.random.default_rng(0), 20):
        assert names(scenes.describe(scene)) == [thing.name for thing in scene.objects]


def test_what_is_not_there_and_what_is_missed_are_counted():
    scene = scenes.scene(np.random.default_rng(1), shapes=4, numbers=1)
    described = cases.Described(interp.Prompt.from_tokens([1]), scene, scenes.draw(scene))
    there = len(described.names)
    assert cases.counted(described, scenes.describe(scene)) == (5, 0, there, 0)
    assert cases.counted(described, "nothing .") == (0, 0, there, there)
    absent = next(f"{c} {s}" for c in scenes.COLORS for s in scenes.SHAPES
                  if f"{c} {s}" not in described.names)
    named = cases.counted(described, f"a {absent} , {scene.objects[0].name} , a {absent} .")
    assert named[1:] == (2, there, there - 1)


def test_words_of_an_object_are_the_steps_that_said_them():
    model = interp.open_model("looker")
    text = "a red circle , the number 4 7 , a blue ring ."
    tokens = model.tokenizer(text, add_special_tokens=False)["input_ids"]
    words = text.split()
    said = cases.steps_of(model, tokens)
    assert [(name, " ".join(words[i] for i in steps)) for name, steps in said] == [
        ("red circle", "red circle"), ("4 7", "4 7"), ("blue ring", "blue ring")]
    ids = cases.word_ids(model)
    assert all(model.tokenizer.decode([i]) == word for word, i in ids.items()) and len(ids) == 14


def test_looker_gets_a_verdict_or_a_count_for_every_claim(tmp_path):
    found, outcome = result("looker", tmp_path, figure=["table", "maps"])
    assert found["released"].verdict == "supported"
    assert "matches pictures with texts" in found["masked"].reason
    assert "no words before it" in found["exist_SGRS"].reason
    # What attention-defined blind tokens carry is measured, not assumed.
    assert found["blind"].measured > 0 and found["blind"].verdict != "supported"
    for name in hallucination.METHODS:
        claim = found[f"name_{name}"]
        assert claim.control == hallucination.CONTROLS[name] or "too few" in claim.reason
    table = outcome.table("methods-looker")
    assert set(table["name"]) == {"greedy", *hallucination.METHODS}
    assert len(table) == 1 + 2 * len(hallucination.METHODS)
    rates = table[["hallucinated", "missed", "accuracy", "yes"]].to_numpy(float)
    assert np.nanmin(rates) >= 0 and np.nanmax(rates) <= 1
    drawn = {figure.name for figure in outcome.figures if figure.files}
    assert drawn == {"table", "maps"}


def test_untrained_looker_supports_nothing_but_mathematics(tmp_path):
    bare = looker.build(0)
    bare.save_pretrained(tmp_path / "untrained")
    looker.export(bare, tmp_path / "untrained")
    found, outcome = result(tmp_path / "untrained", tmp_path, figure=["ranks"])
    assert {k for k, c in found.items() if c.verdict == "supported"} <= MATHEMATICS
    assert all(f.files or f.reason for f in outcome.figures)


@pytest.mark.parametrize("architecture", ["llava", "qwen2_5_vl"])
def test_random_models_support_nothing_but_mathematics(tiny, letters, tmp_path, architecture):
    folder = saved(tiny, architecture, tmp_path / architecture, letters)
    found, outcome = result(folder, tmp_path, figure=["table"])
    assert {k for k, c in found.items() if c.verdict == "supported"} <= MATHEMATICS
    assert "objects in 3 descriptions" in found["name_VISTA"].reason
    if architecture == "qwen2_5_vl":
        for key in ("exist_DAMRO", "name_PAINT", "overlap", "rank"):
            assert "no class token" in found[key].reason
    assert all(f.files or f.reason for f in outcome.figures)


def test_a_text_model_gets_one_sentence(tmp_path):
    done = CliRunner().invoke(app, ["run", "hallucination", "--model", "reader", "--out",
                                    str(tmp_path), "--tiny"])
    assert done.exit_code == 0, done.output
    claims = json.loads((tmp_path / "hallucination" / "claims.json").read_text())
    assert {claim["verdict"] for claim in claims} == {"not testable"}
    assert {claim["reason"] for claim in claims} == {
        "reader is a text model: it has no image tokens"}
