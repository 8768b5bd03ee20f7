"""The horizon that is planted in looker is seen, its absence too, and guessing decides nothing."""

import copy

import numpy as np
import pytest
import torch
from transformers import CLIPImageProcessorPil, LlavaProcessor
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil
from typer.testing import CliRunner

import interp
from experiments import _decisive_questions as decisive
from experiments import information_horizon as horizons
from experiments.__main__ import app
from experiments._output import execute
from experiments._paper import Settings, load
from interp.organisms import looker, plant_horizon

KEYS = {sentence: key for key, sentence in horizons.SENTENCES.items()}
PLANTED = 4


def result(name, out, **more):
    outcome = execute(load("information_horizon"), Settings.of(
        model=[str(name)], out=out, tiny=True, **{"figure": ["pruning"], **more}))
    return outcome, {KEYS[claim.sentence]: claim for claim in outcome.claims}


@pytest.fixture
def brief(monkeypatch):
    """Two of the tasks; the cost on LLaVA's shape is asked once, below."""
    monkeypatch.setattr(horizons, "_cost_of_llava", lambda settings, out: None)
    monkeypatch.setattr(horizons, "TASKS", ("color", "read"))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """looker that cannot read its image from block 4 on."""
    root = tmp_path_factory.mktemp("models")
    model = interp.open_model("looker")
    (one,) = decisive.ask(model, "color", 1, np.random.default_rng(0))
    made = plant_horizon.image_horizon(model.hf, PLANTED, plant_horizon.as_inputs(one.prompt))
    made.model.save_pretrained(root / "planted")
    looker.export(made.model, root / "planted")
    bare = looker.build(0)
    bare.save_pretrained(root / "untrained")
    looker.export(bare, root / "untrained")
    return root


def test_looker_in_full(tmp_path):
    outcome, found = result("looker", tmp_path, figure=None)
    assert found.keys() == horizons.SENTENCES.keys()
    assert found["exact"].verdict == found["cost"].verdict == "supported"
    assert found["cost"].measured > 20 and found["cost"].details["difference"] < 1e-5
    # 36 image tokens of 45 are too few to gain that much, and the claim says so.
    details = found["cost_here"].details
    assert found["cost_here"].measured == pytest.approx(
        details["loop (prefills)"] / details["map (prefills)"])
    assert details["loop (prefills)"] == details["cells"]
    assert "this run has 1 model(s)" in found["stronger"].reason
    assert found["harm"].details["uses the label"] and not found["harm_free"].details[
        "uses the label"]
    assert found["harm"].paper_tag == "secondary" and "shuffled label" in found["harm"].control
    assert {f.name for f in outcome.figures if f.files} == set(horizons.PAPER.figures)
    assert all(file.stat().st_size > 1000 for f in outcome.figures for file in f.files)
    table = outcome.table("horizons-looker")
    assert set(table["task"]) == set(decisive.TASKS) and table["layer"].between(1, 6).all()


def test_a_planted_horizon_is_seen_and_only_there(folder, tmp_path, brief):
    outcome, found = result(folder / "planted", tmp_path)
    data = outcome.result("information-planted")
    late = data.data.sel(layer=slice(PLANTED, None))
    assert float(late["largest"].max()) < 1e-5 and float(late["kl"].max()) < 1e-5
    before = data.data.sel(layer=PLANTED - 1)
    assert float(before["largest"].max()) > 0.1 and float(before["kl"].max()) > 0.1
    for key in ("info_ends", "out_ends"):
        claim = found[key]
        assert claim.verdict == "supported" and claim.measured == 1
        assert claim.details["mean horizon"] <= PLANTED
        assert claim.details["prompts without one"] == 0


def test_who_guesses_decides_nothing(folder, tmp_path, brief):
    _, found = result(folder / "untrained", tmp_path)
    for key in horizons.ANSWERING:
        assert found[key].verdict == "not testable"
        assert "giving the most frequent answer" in found[key].reason
    assert found["exact"].verdict == "supported"


def test_a_text_model_is_one_sentence(tmp_path, brief):
    outcome, found = result("reader", tmp_path)
    assert {found[key].reason for key in horizons.PER_MODEL} == {
        "reader is a text model: it has no image tokens, so it has no such heads"}
    assert not any(f.files for f in outcome.figures)


def test_an_unknown_model_is_one_sentence(tmp_path):
    done = CliRunner().invoke(app, ["run", "information_horizon", "--tiny", "--model",
                                    str(tmp_path / "nowhere"), "--out", str(tmp_path / "out")])
    assert done.exit_code == 1 and "Traceback" not in done.output
    assert len([line for line in done.output.splitlines() if "nowhere" in line]) == 1


@pytest.mark.parametrize("architecture", ["llava", "qwen2_5_vl"])
def test_other_architectures(tiny, letters, tmp_path, brief, architecture):
    """Random weights and a tokenizer of letters: nothing about answers may be supported."""
    name, tokenizer = tmp_path / architecture, copy.deepcopy(letters)
    tiny(architecture).save_pretrained(name)
    if architecture == "llava":
        LlavaProcessor(
            CLIPImageProcessorPil(size={"shortest_edge": 24}, crop_size={"height": 24, "width": 24}),
            tokenizer, patch_size=8, vision_feature_select_strategy="default",
            num_additional_image_tokens=1).save_pretrained(name)
    else:
        tokenizer.save_pretrained(name)
        Qwen2VLImageProcessorPil(patch_size=4, merge_size=2, min_pixels=64,
                                 max_pixels=400).save_pretrained(name)
        for file in name.glob("tokenizer*.json"):
            file.write_text(file.read_text().replace("<image>", "<|image_pad|>"))
    _, found = result(name, tmp_path / "out")
    assert found.keys() == set(horizons.PER_MODEL) | {"stronger"}
    assert {key for key, claim in found.items() if claim.verdict == "supported"} <= {
        "exact", "cost_here"}


def test_the_beginning_of_an_answer_is_said_where_answers_begin_alike():
    model = interp.open_model("looker")
    word = model.tokenizer.decode
    for one in decisive.ask(model, "position", 4, np.random.default_rng(0)):
        plain = one.asked.prompt
        assert word(one.prompt.ids[len(plain):]) in ("top", "bottom")
        assert {word([one.token]), *(word([t]) for t in one.against)} == {"left", "right"}
        # The same row as in forced decoding.
        forced = model.run(plain, new_tokens=[list(one.asked.answer[:1])], logits="last")
        row = model.run(one.prompt, logits="last").logits[0][-1]
        assert torch.allclose(forced.logits[0][-1], row, atol=1e-4)
    for one in decisive.ask(model, "color", 2, np.random.default_rng(0)):
        assert one.prompt is one.asked.prompt and len(one.against) == 7


def test_guessing_is_told_from_answering():
    tokens = [1, 2] * 10
    assert decisive.guessing("m", ["a"] * 20, tokens, [1.0] * 20) == ""
    always = [float(token == 1) for token in tokens]
    assert "m answers 50 % of 20 questions right" in decisive.guessing("m", ["a"] * 20, tokens, always)
    # Two tasks with one answer each: right everywhere, and yet nothing was read.
    assert decisive.guessing("m", ["a"] * 10 + ["b"] * 10, [1] * 10 + [2] * 10, [1.0] * 20)
