"""Every experiment on tiny random models of many architectures: a verdict for every claim."""

import copy

import pytest
from transformers import CLIPImageProcessorPil, LlavaProcessor
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from experiments import active_dormant, secondary_sinks, sink_emergence, visual_sinks
from experiments._outcome import Outcome
from experiments._output import execute
from experiments._paper import Settings, load

TEXT = ("llama", "gpt2", "gpt_oss", "gemma2", "qwen3", "opt", "bert")
CLAIMS = {
    "active_dormant": {*active_dormant.TASK, *active_dormant.GENERAL, active_dormant.SOME,
                       *active_dormant.DYNAMIC},
    "sink_emergence": {*sink_emergence.CAUSAL, *(s for s, _ in sink_emergence.TRAINED)},
    "secondary_sinks": {sentence for sentence, *_ in secondary_sinks.CLAIMS.values()},
    "visual_sinks": set(visual_sinks.CLAIMS),
}
BY_CHANCE = {
    # The sink logits are parameters; in the tiny model they are not zero.
    "gpt_oss": {sink_emergence.LEARNED},
}
"""What a random model can show: nothing else may be supported, whatever its weights."""


def saved(tiny, architecture, folder, tokenizer=None):
    tiny(architecture).save_pretrained(folder)
    # A processor leaves its name in the tokenizer that it is given.
    tokenizer = copy.deepcopy(tokenizer)
    if architecture == "llava" and tokenizer is not None:
        LlavaProcessor(
            CLIPImageProcessorPil(size={"shortest_edge": 24}, crop_size={"height": 24, "width": 24}),
            tokenizer, patch_size=8, vision_feature_select_strategy="default",
            num_additional_image_tokens=1).save_pretrained(folder)
    elif tokenizer is not None:
        tokenizer.save_pretrained(folder)
        if architecture == "qwen2_5_vl":
            Qwen2VLImageProcessorPil(patch_size=4, merge_size=2, min_pixels=64,
                                     max_pixels=400).save_pretrained(folder)
            for file in folder.glob("tokenizer*.json"):
                file.write_text(file.read_text().replace("<image>", "<|image_pad|>"))
    return folder


def checked(experiment, folder, out):
    """Run it, and return its claims by sentence; complete, reasoned, and never by chance."""
    outcome = execute(load(experiment), Settings.of(
        model=[str(folder)], out=out / "out", tiny=True, figure=[next(iter(load(
            experiment).paper.figures))]))
    found = {claim.sentence: claim for claim in outcome.claims}
    assert len(found) == len(outcome.claims) and CLAIMS[experiment] <= found.keys()
    shown = {sentence for sentence, claim in found.items() if claim.verdict == "supported"}
    assert shown <= BY_CHANCE.get(folder.name, set())
    assert all(f.files or f.reason for f in outcome.figures)
    return found


@pytest.mark.parametrize("architecture", TEXT)
@pytest.mark.parametrize("experiment", ["active_dormant", "sink_emergence", "secondary_sinks"])
def test_a_random_model_with_a_tokenizer(tiny, letters, tmp_path, architecture, experiment):
    folder = saved(tiny, architecture, tmp_path / architecture, letters)
    found = checked(experiment, folder, tmp_path)
    if architecture == "bert":
        about = CLAIMS[experiment] - {*active_dormant.TASK, *active_dormant.DYNAMIC}
        reasons = {found[sentence].reason for sentence in about}
        assert any(reason.startswith("bert is an encoder") for reason in reasons)
        assert {found[sentence].verdict for sentence in about} == {"not testable"}


@pytest.mark.parametrize("architecture", ["gpt2", "gemma2", "llava"])
def test_without_a_tokenizer(tiny, tmp_path, architecture):
    folder = saved(tiny, architecture, tmp_path / architecture)
    found = checked("active_dormant", folder, tmp_path)
    assert found[active_dormant.SOME].reason == f"{architecture} has no tokenizer for texts"
    found = checked("sink_emergence", folder, tmp_path)
    assert found[sink_emergence.NATURAL].reason.startswith(f"{architecture} has no tokenizer")
    assert found[sink_emergence.RANDOM].measured is not None
    # What is not natural text is nowhere called so.
    assert found[sink_emergence.OTHERS].reason or "random tokens" in str(
        found[sink_emergence.OTHERS].details["tokens"])
    (drawn,) = [f for f in Outcome.load(tmp_path / "out" / "sink_emergence").figures if f.files]
    assert f"random tokens ({architecture} has no tokenizer)" in drawn.caption
    if architecture == "gpt2":
        checked("secondary_sinks", folder, tmp_path)


@pytest.mark.parametrize("architecture", ["llava", "qwen2_5_vl"])
def test_a_random_model_with_a_processor_has_no_sink_dimensions(
    tiny, letters, tmp_path, architecture
):
    found = checked("visual_sinks", saved(tiny, architecture, tmp_path / architecture, letters),
                    tmp_path)
    reasons = {found[sentence].reason for sentence in visual_sinks.CLAIMS[:-1]}
    assert len(reasons) == 1
    assert reasons.pop().startswith(f"no residual coordinate of {architecture} is massive")


@pytest.mark.parametrize("architecture", TEXT)
def test_a_text_model_has_no_image_tokens(tiny, tmp_path, architecture):
    found = checked("visual_sinks", saved(tiny, architecture, tmp_path / architecture), tmp_path)
    assert {claim.reason for claim in found.values()} == {
        f"{architecture} is a text model: it has no image tokens"}
