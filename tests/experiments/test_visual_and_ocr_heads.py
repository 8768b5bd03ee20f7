"""Both experiments on looker, on its untrained twin, on another vision-language model and on text."""

import json

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    CLIPImageProcessorPil,
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedTokenizerFast,
)
from typer.testing import CliRunner

import interp
from experiments import _picture_questions as questions
from experiments import ocr_heads, visual_heads
from experiments.__main__ import app
from experiments._output import execute
from experiments._paper import Settings, load
from interp.organisms import looker

OCR = {sentence: key for key, sentence in ocr_heads.SENTENCES.items()}
VISUAL = {sentence: key for key, sentence in visual_heads.SENTENCES.items()}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """looker without training, and a LLaVA that spells everything letter by letter."""
    root = tmp_path_factory.mktemp("models")
    bare = looker.build(0)
    bare.save_pretrained(root / "untrained")
    looker.export(bare, root / "untrained")
    torch.manual_seed(0)
    letters = ["<s>", "</s>", "<image>", *map(chr, range(32, 127)), "\n", "<unk>"]
    raw = Tokenizer(models.WordLevel({c: i for i, c in enumerate(letters)}, "<unk>"))
    raw.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    raw.add_special_tokens(["<s>", "</s>", "<image>"])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=raw, bos_token="<s>", eos_token="</s>",
                                        unk_token="<unk>",
                                        extra_special_tokens={"image_token": "<image>"})
    tokenizer.chat_template = looker.CHAT_TEMPLATE
    pictures = CLIPImageProcessorPil(size={"shortest_edge": 120},
                                     crop_size={"height": 120, "width": 120})
    LlavaProcessor(image_processor=pictures, tokenizer=tokenizer, patch_size=12,
                   vision_feature_select_strategy="default", num_additional_image_tokens=1,
                   chat_template=looker.CHAT_TEMPLATE).save_pretrained(root / "speller")
    model = LlavaForConditionalGeneration(LlavaConfig(
        vision_config=CLIPVisionConfig(hidden_size=24, intermediate_size=28, num_hidden_layers=1,
                                       num_attention_heads=2, image_size=120, patch_size=12),
        text_config=LlamaConfig(vocab_size=len(letters), hidden_size=32, intermediate_size=40,
                                num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2,
                                max_position_embeddings=1024, bos_token_id=0, eos_token_id=1),
        image_token_index=2, image_seq_length=100, vision_feature_layer=-1,
        vision_feature_select_strategy="default"))
    model.save_pretrained(root / "speller")
    return root


def result(key, name, out, **more):
    return execute(load(key), Settings.of(model=[str(name)], out=out, tiny=True, **more))


def verdicts(outcome, names):
    return {names[claim.sentence]: claim for claim in outcome.claims}


def test_looker_reads_with_its_ocr_heads(tmp_path):
    outcome = result("ocr_heads", "looker", tmp_path)
    found = verdicts(outcome, OCR)
    assert found.keys() == ocr_heads.SENTENCES.keys()
    assert found["row"].verdict == "supported" and found["filter"].verdict == "supported"
    assert found["static"].verdict == "supported" and found["distinct"].verdict == "supported"
    for key in ("sparse", "similar", "text"):
        assert "repeats" in found[key].reason and "retrieval heads cannot" in found[key].reason
    for key in ("reading", "colors", "double", "double_nats"):
        assert found[key].causal and "random heads of the same layers" in found[key].control
    assert "nothing to move" in found["sink"].reason
    drawn = {f.name for f in outcome.figures if f.files}
    assert drawn == set(ocr_heads.PAPER.figures) - {"redistribution"}
    for figure in outcome.figures:
        for file in figure.files:
            assert (outcome.folder / file).stat().st_size > 1000


def test_an_untrained_twin_reads_nothing_and_is_told_so(folders, tmp_path):
    found = verdicts(result("ocr_heads", folders / "untrained", tmp_path), OCR)
    assert found.keys() == ocr_heads.SENTENCES.keys()
    assert not [key for key, claim in found.items() if claim.verdict == "supported"
                and key in ("reading", "colors", "double", "double_nats", "sink", "row")]
    assert found["double"].verdict == "not testable"


def test_looker_looks_and_its_untrained_twin_does_not(folders, tmp_path):
    trained = verdicts(result("visual_heads", "looker", tmp_path / "a"), VISUAL)
    bare = verdicts(result("visual_heads", folders / "untrained", tmp_path / "b",
                           figure=["plane"]), VISUAL)
    assert trained.keys() == bare.keys() == visual_heads.SENTENCES.keys()
    assert trained["region"].measured > 0.2 > bare["region"].measured
    assert bare["region"].verdict != "supported"
    assert bare["late"].verdict == bare["causes"].verdict == "not testable"
    assert "always the same answer would be right" in bare["causes"].reason
    assert "control" in json.dumps(trained["causes"].to_json())
    for key in ("models", "families"):
        assert "this run has 1" in trained[key].reason
    drawn = sorted(p.name for p in (tmp_path / "a" / "visual_heads").glob("*.png"))
    assert drawn == sorted(f"{name}.looker.png" for name in visual_heads.PAPER.figures)


@pytest.mark.parametrize("key, names", [("ocr_heads", OCR), ("visual_heads", VISUAL)])
def test_another_vision_language_model_gets_pictures_of_its_own(folders, tmp_path, key, names):
    outcome = result(key, folders / "speller", tmp_path, figure=["map"])
    found = verdicts(outcome, names)
    assert found.keys() == set(names.values())
    causal = {"reading", "colors", "double", "text", "late", "causes"} & found.keys()
    assert {found[k].verdict for k in causal} == {"not testable"}


def test_its_passkeys_are_found_in_its_patches(folders):
    model = interp.open_model(str(folders / "speller"))
    assert not questions.is_looker(model) and not questions.unfit(model)
    for one in questions.reading(model, 3, np.random.default_rng(0)):
        digits = model.tokenizer.decode(list(one.answer))
        image = one.prompt.of_kind("image")[0]
        assert len(one.where) == len(one.answer) and set(one.region) <= set(image.positions)
        assert "".join(digits.split()).isdigit()
        # Occlusion: what the model is given changes in the evidence only where the key is erased.
        boxes = [image.boxes[image.positions.index(p)] for p in one.where[0]]
        pixels = np.asarray(one.picture)
        left, top = (int(min(b[i] for b in boxes)) for i in (0, 1))
        right, bottom = (int(max(b[i] for b in boxes)) for i in (2, 3))
        assert pixels[top:bottom, left:right].min() < 128


def test_the_three_variants_are_the_same_scenes(folders):
    model = interp.open_model("looker")
    found = questions.variants(model, 3, np.random.default_rng(0))
    for plain, outlined, general in zip(*(found[name] for name in questions.VARIANTS)):
        assert plain.text == outlined.text != general.text == questions.GENERAL
        assert plain.answer == outlined.answer == general.answer
        assert plain.region == outlined.region
        before, after = (np.asarray(x.picture).astype(int) for x in (plain, outlined))
        assert np.array_equal(before, np.asarray(general.picture))
        moved = np.abs(before - after).max(-1) > 0
        image = plain.prompt.of_kind("image")[0]
        own = np.zeros_like(moved)
        for p in plain.region:
            x0, y0, x1, y1 = (int(v) for v in image.boxes[image.positions.index(p)])
            own[max(0, y0 - 1) : y1 + 1, max(0, x0 - 1) : x1 + 1] = True
        assert moved.any() and not (moved & ~own).any()


@pytest.mark.parametrize("key", ["ocr_heads", "visual_heads"])
def test_a_text_model_is_one_clear_sentence(key, tmp_path):
    outcome = result(key, "reader", tmp_path)
    reasons = {claim.reason for claim in outcome.claims if "--model" not in claim.reason
               and "needs at least 6" not in claim.reason}
    assert reasons == {"reader is a text model: it has no image tokens, so it has no such heads"}
    assert not any(f.files for f in outcome.figures)


@pytest.mark.parametrize("key", ["ocr_heads", "visual_heads"])
def test_an_unknown_model_is_one_sentence(key, tmp_path):
    done = CliRunner().invoke(app, ["run", key, "--tiny", "--model", str(tmp_path / "nowhere"),
                                    "--out", str(tmp_path / "out")])
    assert done.exit_code == 1 and "Traceback" not in done.output
    lines = [line for line in done.output.splitlines() if "nowhere" in line]
    assert len(lines) == 1 and "there is no folder" in lines[0]
