"""The experiment on planted positions, on the bundled models, and where it cannot be done."""

import copy

import numpy as np
import pytest
import torch
from transformers import CLIPImageProcessorPil, LlavaProcessor
from typer.testing import CliRunner

import interp
from experiments import _position_windows as windows
from experiments import position_probes as pp
from experiments.__main__ import app
from experiments._output import execute
from experiments._paper import Settings, load
from experiments._position_claims import CLAIMS, PICTURE, TEXT, TRIVIAL
from interp.core import ModelRefused
from interp.models.model import Model
from interp.models.reinitialize import redrawn


def told(out, figure, model=None):
    settings = Settings.of(model=model, out=out, tiny=True, figure=figure)
    outcome = execute(load("position_probes"), settings)
    made = {}
    for claim in outcome.claims:
        (key,) = [k for k, (sentence, _) in CLAIMS.items() if sentence == claim.sentence]
        made[claim.details.get("model", "-"), key] = claim
    assert len(made) == len(outcome.claims)
    return outcome, made


def saved(tiny, architecture, folder, letters):
    """A tiny model at initialization with a tokenizer, and a processor if it takes pictures."""
    redrawn(tiny(architecture), seed=5).save_pretrained(folder)
    # A processor leaves its name in the tokenizer that it is given.
    tokenizer = copy.deepcopy(letters)
    if architecture == "llava":
        LlavaProcessor(
            CLIPImageProcessorPil(size={"shortest_edge": 24}, crop_size={"height": 24, "width": 24}),
            tokenizer, patch_size=8, vision_feature_select_strategy="default",
            num_additional_image_tokens=1).save_pretrained(folder)
        return folder
    tokenizer.save_pretrained(folder)
    return folder


def counted(tiny, scale):
    """A GPT-2 whose position embeddings are `scale` times large; 0 is a model without encodings."""
    hf = copy.deepcopy(tiny("gpt2"))
    with torch.no_grad():
        hf.transformer.wpe.weight.normal_(generator=torch.Generator().manual_seed(0)).mul_(scale)
        hf.transformer.wte.weight.mul_(0.1)
    return hf


@pytest.fixture(scope="module")
def outcomes(tiny, tmp_path_factory):
    root = tmp_path_factory.mktemp("position")
    made = {}
    for name, scale in (("planted", 3.0), ("bare", 0.0)):
        counted(tiny, scale).save_pretrained(root / name)
        figure = list(pp.TEXT_FIGURES) if name == "planted" else ["predicted"]
        made[name] = told(root / f"out-{name}", figure, [str(root / name)])
    return made


def test_planted_positions_are_confirmed_and_not_in_the_twin(outcomes):
    _, found = outcomes["planted"]
    _, twin = outcomes["bare"]
    assert found["planted", "readable"].verdict == "supported"
    assert found["planted", "readable"].measured < 0.2
    assert twin["bare", "readable"].measured > 0.6
    # Whether a model has encodings is measured, and decides what can be tested on it.
    assert "has position encodings" in found["planted", "early"].reason
    assert twin["bare", "early"].verdict == "refuted"
    # Of the untrained twins, which know nothing of what was planted.
    for claims, name in ((found, "planted"), (twin, "bare")):
        assert claims[name, "input"].verdict == claims[name, "alike_input"].verdict == "supported"
        assert claims[name, "bidirectional"].verdict == "supported"
        assert claims[name, "alike_free"].verdict == "supported"
    assert outcomes["planted"][0].result("absolute-random-tokens-planted")["mad"].dims == (
        "layer", "document")


def test_every_claim_has_its_control_or_its_reason(outcomes):
    for outcome, found in outcomes.values():
        assert {key for _, key in found} == set(CLAIMS)
        for (_, key), claim in found.items():
            assert claim.reason or claim.control, key
            if key in PICTURE:
                assert "is a text model" in claim.reason
        assert all(f.files or f.reason for f in outcome.figures)
    drawn = {f.name for f in outcomes["planted"][0].figures if f.files}
    assert drawn == set(pp.TEXT_FIGURES)


def test_the_bundled_models_by_default(tmp_path):
    outcome, found = told(tmp_path, list(pp.PICTURE_FIGURES))
    assert outcome.models == ("reader", "looker")
    assert {key for name, key in found if name == "looker"} == set(CLAIMS)
    for key in ("across", "down", "left", "above"):
        assert found["looker", key].verdict == "supported", key
    # The model was trained on places, and heeds the words.
    for key in ("captions", "asks", "unused"):
        assert found["looker", key].verdict == "refuted", key
    assert found["looker", "unused"].details["present but unused"] is False
    assert "flat" in found["looker", "depth"].reason
    assert all("name looker to ask it" in found["looker", key].reason for key in TEXT)
    # What the mask does is told by twins with random weights.
    for key in ("mask", "variance", "alike_bare", "alike_input", "alike_free", "input",
                "bidirectional"):
        assert found["reader", key].verdict == "supported", key
    assert found["reader", "early"].reason == "reader has position encodings"
    assert {f.name for f in outcome.figures if f.files} == set(pp.PICTURE_FIGURES)


@pytest.mark.parametrize("architecture", ["gpt_oss", "llava"])
def test_random_models_show_what_random_models_have(tiny, letters, tmp_path, architecture):
    folder = saved(tiny, architecture, tmp_path / architecture, letters)
    outcome, found = told(tmp_path / "out", ["objects"], [str(folder)])
    shown = {key for (_, key), claim in found.items() if claim.verdict == "supported"}
    assert shown <= set(TRIVIAL)
    assert {key for _, key in found} == set(CLAIMS)
    pictures = {found[architecture, key].reason for key in ("across", "captions")}
    assert any(pictures) == (architecture != "llava")


def test_an_encoder_is_told_why(tiny, tmp_path):
    tiny("bert").save_pretrained(tmp_path / "encoder")
    outcome, found = told(tmp_path / "out", None, [str(tmp_path / "encoder")])
    assert len(found) == len(CLAIMS)
    assert all("is an encoder: it has no causal mask" in claim.reason for claim in found.values())
    assert all("encoder" in f.reason for f in outcome.figures)


def test_an_unknown_model_is_one_sentence(tmp_path):
    done = CliRunner().invoke(app, ["run", "position_probes", "--tiny", "--model",
                                    str(tmp_path / "nowhere"), "--out", str(tmp_path / "out")])
    assert done.exit_code == 1 and "Traceback" not in done.output
    lines = [line for line in done.output.splitlines() if "nowhere" in line]
    assert len(lines) == 1 and "there is no folder" in lines[0]


def test_a_layer_is_chosen_on_other_documents():
    noise = np.random.default_rng(0).random((60, 40))
    assert noise.mean(1).min() < 0.42 and abs(windows.other_half(noise).mean() - 0.5) < 0.06
    assert windows.layers(32) == [0, 4, 8, 12, 16, 19, 23, 27, 31] and windows.layers(3) == [0, 1, 2]


def test_windows_begin_anywhere_and_hold_no_start_token():
    model = interp.open_model("reader")
    rng = np.random.default_rng(0)
    prompts = [interp.Prompt.from_tokens([model.tokenizer.bos_token_id, *range(10, 40)])
               for _ in range(60)]
    made = [prompt.ids for prompt in windows.cut(model, prompts, 6, rng)]
    begins = {ids[0] for ids in made}
    assert {len(ids) for ids in made} == {6} and len(begins) > 12 and begins <= set(range(10, 35))
    assert {prompt.ids for prompt in windows.cut(model, prompts, 6)} == {tuple(range(10, 16))}


def test_encodings_are_found_by_what_they_do_and_not_by_name(tiny, monkeypatch):
    def encoded(hf):
        return windows.encodings(Model(hf, "it"), np.random.default_rng(0))

    def unknown(hf):
        raise ModelRefused("no such names")

    for by_name in (windows.positions_off, unknown):
        monkeypatch.setattr(windows, "positions_off", by_name)
        assert encoded(counted(tiny, 0.0)) == ""
        for hf in (counted(tiny, 1.0), tiny("llama"), tiny("mistral")):
            assert encoded(hf) == "it has position encodings"
