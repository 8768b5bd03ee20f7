"""The vision tower's states and attention, in line with the picture's tokens, against transformers."""

import copy

import numpy as np
import pytest
import torch
import transformers as t

import interp
from interp.core import OutOfRange, PromptError
from interp.core.errors import ModelRefused
from interp.models import tower
from interp.models.model import Model

IMAGE = 96


@pytest.mark.parametrize("architecture", ["llava", "qwen2_5_vl"])
def test_projected_features_are_what_enters_the_language_model(tiny, image_prompt, architecture):
    model, prompt = Model(tiny(architecture), architecture), image_prompt(architecture)
    found = tower.read(model, prompt)
    entering = model.run(prompt, read="resid_pre", logits="none").reads["resid_pre"].values[0, 0]
    assert np.allclose(entering[list(found.positions)], found.projected, atol=1e-6)
    # Another picture, other features.
    other = tower.read(model, image_prompt(architecture, 1))
    assert not torch.allclose(other.projected, found.projected, atol=1e-3)


def test_a_clip_tower_equals_transformers(tiny, image_prompt):
    hf, prompt = copy.deepcopy(tiny("llava")), image_prompt("llava")
    found = tower.read(Model(hf, "llava"), prompt)
    hf.model.vision_tower.set_attn_implementation("eager")
    pixels = torch.as_tensor(prompt.inputs["pixel_values"])
    out = hf.model.vision_tower(pixels, output_attentions=True, output_hidden_states=True)
    assert found.has_class_token and found.n_layers == 2 and found.select == 2
    for layer, full in enumerate(out.attentions):
        assert torch.allclose(found.attention(layer), full[0, :, 1:, 1:], atol=1e-6)
        assert torch.allclose(found.cls_attention[layer], full[0, :, 0, 1:], atol=1e-6)
        assert torch.allclose(found.received(layer), full[0].mean(1)[:, 1:], atol=1e-6)
    for one, expected in zip(found.hidden, out.hidden_states):
        assert torch.allclose(one, expected[0, 1:], atol=1e-4)
    last = hf.model.vision_tower.encoder.layers[-1].self_attn if hasattr(
        hf.model.vision_tower, "encoder") else (
        hf.model.vision_tower.vision_model.encoder.layers[-1].self_attn)
    assert found.values(-1).shape == (5, 9, 8) and found.class_value(0).shape == (5, 8)
    heads = found.values(-1).transpose(0, 1).reshape(9, 40)
    norm = [m for name, m in hf.model.vision_tower.named_modules() if name.endswith(
        "layers.1.layer_norm1")][0]
    assert torch.allclose(heads, last.v_proj(norm(out.hidden_states[1][0, 1:])), atol=1e-5)
    assert torch.allclose(found.projector(found.hidden[found.select]), found.projected, atol=1e-6)


def test_a_tower_that_reorders_and_merges_its_patches(tiny, image_prompt):
    """Qwen2.5-VL: windows of 2 x 2 patches per token; attention and states checked by hand."""
    hf, prompt = tiny("qwen2_5_vl"), image_prompt("qwen2_5_vl")
    found = tower.read(Model(hf, "qwen"), prompt)
    assert found.projected.shape == (6, 48) and not found.has_class_token
    assert found.cls_attention is None and found.class_value(0) is None
    for layer in range(2):
        assert torch.allclose(found.attention(layer).sum(-1), torch.ones(5, 6), atol=1e-5)
        assert torch.allclose(found.received(layer).sum(-1), torch.ones(5), atol=1e-5)
    # Within windows in block 0 (16 pixels: 2 x 2 tokens), everywhere in block 1.
    grid = np.arange(6).reshape(2, 3)
    first = found.attention(0).mean(0)
    assert float(first[grid[0, 0], grid[0, 2]]) == 0 < float(first[grid[0, 0], grid[1, 1]])
    assert (found.attention(1) > 0).all()
    # A change of one token's patches changes that token's first state alone.
    changed = image_prompt("qwen2_5_vl")
    pixels = np.array(changed.inputs["pixel_values"])
    pixels[8:12] += 1.0  # the processor puts the patches of one token side by side: token 2
    changed = interp.Prompt(changed.ids, changed.segments,
                            inputs={**changed.inputs, "pixel_values": pixels})
    moved = (tower.read(Model(hf, "qwen"), changed).hidden[0] - found.hidden[0]).abs().sum(-1) > 1e-5
    assert moved.tolist() == [False, False, True, False, False, False]


def test_a_tower_without_class_token_and_the_second_of_two_pictures(tiny):
    config = copy.deepcopy(tiny("llava").config)
    config.vision_config = t.SiglipVisionConfig(
        hidden_size=40, intermediate_size=44, num_hidden_layers=2, num_attention_heads=5,
        image_size=24, patch_size=8)
    config.vision_feature_select_strategy = "full"
    torch.manual_seed(0)
    hf = t.LlavaForConditionalGeneration(config).eval()
    model, rng = Model(hf, "siglip"), np.random.default_rng(0)
    pixels = rng.standard_normal((2, 3, 24, 24)).astype(np.float32)
    segments = {"first": (1, 10), "second": (11, 20)}
    ids = [5, *[IMAGE] * 9, 6, *[IMAGE] * 9, 7]
    pictures = tuple(interp.Segment(name, tuple(range(*span)), "image")
                     for name, span in segments.items())
    both = interp.Prompt(tuple(ids), pictures, inputs={"pixel_values": pixels})
    alone = interp.Prompt((5, *[IMAGE] * 9), (interp.Segment("image", tuple(range(1, 10)), "image"),),
                          inputs={"pixel_values": pixels[1:]})
    found, expected = tower.read(model, both, image=1), tower.read(model, alone)
    assert found.positions == tuple(range(11, 20)) and not found.has_class_token
    assert torch.allclose(found.projected, expected.projected, atol=1e-5)
    assert torch.allclose(found.attention(0), expected.attention(0), atol=1e-5)
    assert torch.allclose(found.attention(0).sum(-1), torch.ones(5, 9), atol=1e-5)
    assert not torch.allclose(tower.read(model, both).projected, found.projected, atol=1e-3)


def test_what_cannot_be_read_is_one_sentence_and_nothing_stays_behind(tiny, image_prompt, hooks):
    text = Model(tiny("llama"), "tiny-llama")
    with pytest.raises(ModelRefused, match="tiny-llama is a text model"):
        tower.read(text, interp.Prompt.from_tokens([3, 4, 5]))
    hf = copy.deepcopy(tiny("llava"))
    model, prompt = Model(hf, "tiny-llava"), image_prompt("llava")

    tower._features(hf, model, prompt)  # transformers itself leaves hooks behind
    before = hooks(hf)
    with pytest.raises(PromptError, match="no picture 1 in this prompt: it has 1"):
        tower.read(model, prompt, image=1)
    with pytest.raises(OutOfRange, match="no block 2: there are 0 to 1"):
        tower.read(model, prompt).attention(2)
    tiles = interp.Prompt(prompt.ids, prompt.segments, inputs={
        "pixel_values": prompt.inputs["pixel_values"][None]})
    with pytest.raises(ModelRefused, match="cuts pictures into tiles"):
        tower.read(model, tiles)
    few = interp.Prompt(prompt.ids, (interp.Segment("image", (3, 4, 5), "image"),),
                        inputs=prompt.inputs)
    with pytest.raises(ModelRefused, match="9 features, but the picture has 3 tokens"):
        tower.read(model, few)
    assert hf.model.vision_tower.config._attn_implementation == "sdpa"
    assert hooks(hf) == before
