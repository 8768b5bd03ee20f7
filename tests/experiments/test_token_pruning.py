"""Token pruning on looker, on its untrained twin, on tiny random models, and where it cannot be."""


import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner

import interp
from experiments import _picture_questions as questions
from experiments import token_pruning
from experiments.__main__ import app
from experiments._output import execute
from experiments._paper import Settings, load
from interp.organisms import looker
from tests.experiments.test_any_model import saved

NAMES = {sentence: key for key, sentence in token_pruning.SENTENCES.items()}


def result(name, out, **more):
    return execute(load("token_pruning"), Settings.of(model=[str(name)], out=out, tiny=True, **more))


def verdicts(outcome):
    assert len(outcome.claims) == len(NAMES)
    return {NAMES[claim.sentence]: claim for claim in outcome.claims}


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    return result("looker", tmp_path_factory.mktemp("looker"))


def test_looker_loses_by_pruning_and_every_claim_has_its_control(trained):
    found = verdicts(trained)
    assert found.keys() == token_pruning.SENTENCES.keys()
    for key in ("random", "random_dart", "diverse", "positions", "merging"):
        assert found[key].causal and found[key].control and found[key].measured is not None
    alone, two = found["random"].details["image tokens per layer, alone and with random"]
    assert alone == two == 9.0
    # The share of tokens that a criterion keeps is what was asked for, for all 36 tokens.
    data = trained.result("pruning-looker")
    assert data["number"].values.tolist() == [9] * 8
    kept = data["kept"].sum("token")
    applied = np.isfinite(data["p"])
    assert (kept.where(applied) == 9).where(applied, True).all() and data["random_p"].sizes["draw"] == 10
    assert data.manifest["untestable"] == {}
    # At the last layer the choice hardly matters; in the first, random tokens lose the answer.
    assert float(data["none_p"].isel(layer=0).mean()) < 0.6 < float(data["full_p"].mean())
    assert "second-hand" in trained.folder.joinpath("claims.md").read_text()


def test_every_figure_is_drawn(trained):
    assert {f.name for f in trained.figures if f.files} == set(token_pruning.PAPER.figures)
    for figure in trained.figures:
        for file in figure.files:
            assert (trained.folder / file).stat().st_size > 1000


def test_an_untrained_twin_has_nothing_to_lose(tmp_path):
    bare = looker.build(0)
    bare.save_pretrained(tmp_path / "untrained")
    looker.export(bare, tmp_path / "untrained")
    found = verdicts(result(tmp_path / "untrained", tmp_path / "out", figure=["layers"]))
    assert {claim.verdict for claim in found.values()} == {"not testable"}
    assert "of the answers" in found["deep"].reason or "without image tokens" in found["deep"].reason


@pytest.mark.parametrize("architecture", ["llava", "qwen2_5_vl"])
def test_a_random_model_shows_nothing(tiny, letters, tmp_path, architecture):
    folder = saved(tiny, architecture, tmp_path / architecture, letters)
    outcome = result(folder, tmp_path / "out", figure=["criteria"])
    found = verdicts(outcome)
    assert not [key for key, claim in found.items() if claim.verdict == "supported"]
    data = outcome.result(f"pruning-{architecture}")
    refused = data.manifest["untestable"]
    if architecture == "qwen2_5_vl":
        # No class token in its tower: what needs one is named, the rest runs.
        assert "no class token" in refused["[CLS] attention"] and "DivPrune" not in refused
        assert np.isfinite(data["p"].sel(arm="DivPrune")).all()
        assert np.isnan(data["p"].sel(arm="[CLS] attention")).all()
        assert "not two linear maps" in refused["zeroth-order"]
    else:
        assert refused == {}


def test_pictures_upside_down_are_the_same_question():
    model = interp.open_model("looker")
    one = questions.about_scenes(model, ("color",), 1, np.random.default_rng(0))[0]
    turned = token_pruning._flipped(model, one)
    assert turned.ids == one.prompt.ids and turned.positions("image") == one.prompt.positions("image")
    before, after = (np.asarray(p.inputs["pixel_values"]) for p in (one.prompt, turned))
    assert np.allclose(before[..., ::-1, :], after, atol=1e-5) and not np.allclose(before, after)


def test_majority_leaves_the_question_out():
    def one(task, answer):
        return questions.Asked(interp.Prompt.from_tokens([1]), (answer,), task, (), (),
                               Image.new("RGB", (1, 1)), "")

    assert token_pruning._by_majority([one("a", 1), one("b", 2)]) == 0
    assert token_pruning._by_majority([one("a", 1)] * 3 + [one("b", 2)]) == 0.75


def test_a_text_model_is_one_clear_sentence(tmp_path):
    outcome = result("reader", tmp_path)
    assert {claim.reason for claim in outcome.claims} == {
        "reader is a text model: it has no image tokens"}
    assert not any(f.files for f in outcome.figures)


def test_an_unknown_model_is_one_sentence(tmp_path):
    done = CliRunner().invoke(app, ["run", "token_pruning", "--tiny", "--model",
                                    str(tmp_path / "nowhere"), "--out", str(tmp_path / "out")])
    assert done.exit_code == 1 and "Traceback" not in done.output
    lines = [line for line in done.output.splitlines() if "nowhere" in line]
    assert len(lines) == 1 and "there is no folder" in lines[0]
