"""Constant tokens planted in looker are found, and nothing is supported where nothing was learned."""

import numpy as np
import pytest
from typer.testing import CliRunner

import interp
from experiments import _patch_words, _picture_questions
from experiments import embed_lens as experiment
from experiments.__main__ import app
from experiments._output import execute
from experiments._paper import Settings, load
from interp.prompts import scenes
from tests.experiments.test_any_model import saved

NAMES = {sentence: key for key, (sentence, _) in experiment.CLAIMS.items()}
CONSTANT = (1, 8, 9, 20, 27, 33, 34)
RANDOM = {"stable", "constant"}
"""A tower with random weights may give some places the same token in every picture: said so there."""

CAUSAL = {"free", "matched", "redundant", "entry"}


def result(name, out, **more):
    outcome = execute(load("embed_lens"), Settings.of(model=[str(name)], out=out, tiny=True, **more))
    found = {NAMES[claim.sentence]: claim for claim in outcome.claims}
    assert found.keys() == experiment.CLAIMS.keys() and len(found) == len(outcome.claims)
    return outcome, found


def test_looker_has_tokens_that_are_constant_at_their_place(tmp_path):
    outcome, found = result("looker", tmp_path, figure=["map"])
    # It tells every token where it is: none is the same all over the picture.
    assert found["groups"].measured == 1.0 and found["groups"].verdict == "refuted"
    share = found["groups"].details["alive if dead is constant at the same place"]
    assert 0.1 < share < 0.9
    for key in CAUSAL:
        assert found[key].causal and found[key].control
    assert found["constant"].verdict == "supported" and found["matched"].verdict == "supported"
    assert found["attention"].verdict == "not testable" and "no landmark" in found["attention"].reason
    assert {f.name for f in outcome.figures if f.files} == {"map"}
    table = outcome.table("landmarks-looker")
    assert (table.query("kind == 'dead'")["cosine_same_place"] >= 0.9).all()


def test_planted_tokens_are_found_and_no_others(monkeypatch, tmp_path):
    """`looker` whose projector says one word for some cells, whatever the picture."""
    model = interp.open_model("looker")
    word = model.tokenizer.convert_tokens_to_ids("diamond")
    (projector,) = [m for n, m in model.hf.named_modules() if n.endswith("multi_modal_projector")]
    constant = 30 * model.hf.get_input_embeddings().weight[word].detach()

    def plant(module, args, output):
        output = output.clone()
        output[:, list(CONSTANT)] = constant + 0.02 * output[:, list(CONSTANT)]
        return output

    handle = projector.register_forward_hook(plant)
    monkeypatch.setattr(_picture_questions, "open_subject", lambda name, settings: model)
    monkeypatch.setattr(experiment._One, "_answers", lambda self: self.give_up("it is not asked"))
    try:
        outcome, found = result("looker", tmp_path, figure=["shares"])
    finally:
        handle.remove()
    tokens = outcome.result("tokens-looker").data
    kind = tokens["kind"].values.reshape(-1, scenes.GRID**2)
    assert (kind[:, CONSTANT] == "dead").all()
    others = np.setdiff1d(np.arange(scenes.GRID**2), CONSTANT)
    assert (kind[:, others] == "alive").mean() > 0.98
    marked = outcome.table("landmarks-looker").query("kind != ''")
    assert marked.index.tolist() == [word] and marked["word"].tolist() == ["diamond"]
    assert found["groups"].measured == pytest.approx(1 - len(CONSTANT) / 36, abs=0.02)
    assert found["constant"].verdict == "supported" and found["stable"].verdict == "supported"
    assert "constant anywhere" in found["constant"].details["classes"]


@pytest.mark.parametrize("architecture", ["llava", "qwen2_5_vl"])
def test_nothing_is_supported_on_a_random_model(tiny, letters, tmp_path, architecture):
    folder = saved(tiny, architecture, tmp_path / architecture, letters)
    _, found = result(folder, tmp_path / "out", figure=["shares"])
    shown = {key for key, claim in found.items() if claim.verdict == "supported"}
    assert shown <= RANDOM and all("with random weights" in found[key].control for key in shown)
    assert all(claim.reason or claim.measured is not None for claim in found.values())


def test_a_text_model_and_an_unknown_one_get_one_sentence(tmp_path):
    _, found = result("reader", tmp_path)
    assert {claim.reason for claim in found.values()} == {
        "reader is a text model: it has no image tokens"}
    done = CliRunner().invoke(app, ["run", "embed_lens", "--tiny", "--model",
                                    str(tmp_path / "nowhere"), "--out", str(tmp_path / "out")])
    assert done.exit_code == 1 and "Traceback" not in done.output
    assert len([line for line in done.output.splitlines() if "nowhere" in line]) == 1


def test_tokens_are_named_by_what_is_in_their_cells():
    model = interp.open_model("looker")
    for one in _patch_words.shown(model, 5, np.random.default_rng(0), ("color", "read")):
        cells = {thing.cells[i]: (thing.color, thing.shape) if thing.kind == "shape"
                 else (str(thing.digits[i]),)
                 for thing in one.scene.objects for i in range(len(thing.cells))}
        assert len(one.patches) == len(cells)
        for patch in one.patches:
            at = one.image.positions.index(patch.position)
            said = set(model.tokenizer.convert_ids_to_tokens(list(patch.words)))
            assert said == set(cells[divmod(at, scenes.GRID)])
    nothing = _patch_words.empty(model, 2, np.random.default_rng(0))
    assert all(not p.positions("image") == () for p in nothing)
