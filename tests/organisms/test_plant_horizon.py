"""Horizons that are planted in the weights are found exactly where they are, and only there."""

import copy
import json

import numpy as np
import pytest
import torch
from transformers import LlavaConfig, LlavaForConditionalGeneration

from interp.core import ModelRefused, OutOfRange, Prompt
from interp.flow import horizon
from interp.models.model import Model
from interp.organisms import plant_horizon as plant
from interp.organisms.surgery import residuals

EPSILON, ETA = 1e-6, 1e-5
"""Tolerances for random models, which say little: noise is 1e-7, what a block reads 1e-5 and more."""


def rng(seed=0):
    return np.random.default_rng(seed)


def logits(model, prompt):
    with torch.no_grad():
        return model(**plant.as_inputs(prompt)).logits[0]


def test_planted_horizons_are_recovered_exactly_and_their_twins_have_none():
    """At least 95 % of 50 models of many sizes; a twin with another horizon would also be a miss."""
    exact = clean = count = 0
    shapes, opened = set(), None
    for count, case in enumerate(plant.horizon_family(rng(3), 50, per_shape=10), 1):
        planted, layer = case.planted, case.planted.layer
        if count % 10 == 1:
            # Opening proves every site, which takes longer than all else; weights change below.
            opened = Model(copy.deepcopy(planted.model), "planted")
        groups = horizon.windows(case.prompt)
        opened.hf.load_state_dict(planted.model.state_dict())
        found = horizon.information(opened, case.prompt, 7, groups=groups)
        exact += horizon.horizons(found, EPSILON, ETA) == {"H_info": layer, "H_out": layer}
        opened.hf.load_state_dict(planted.twin.state_dict())
        twin = horizon.information(opened, case.prompt, 7, groups=groups, layers=[layer])
        # At the planted layer the image still matters to the twin: its horizons lie deeper.
        clean += horizon.horizons(twin, EPSILON, ETA) == {"H_info": None, "H_out": None}
        shapes.add((opened.n_layers, opened.n_heads, opened.n_kv_heads, opened.d_head, layer))
    assert count == 50 and len(shapes) > 12
    assert exact >= 0.95 * count and clean >= 0.95 * count


@pytest.mark.parametrize("bias", [True, False])
def test_the_edit_is_exact(bias):
    model = plant.tiny_llava(rng(1), n_layers=4, heads=6, kv_heads=2, bias=bias)
    prompt = plant.picture_prompt(model, rng(2))
    planted = plant.image_horizon(model, 2, plant.as_inputs(prompt))
    assert planted.measured["read"] == 0.0 and planted.measured["before"] < 1e-5
    assert planted.measured["twin reads"] > 0.01
    assert (planted.constant_axis is None) == bias
    assert json.loads(json.dumps(planted.describe()))["layer"] == 2
    # Text alone: planted and twin are one function.
    text = Prompt(tuple(int(t) for t in rng(4).integers(5, 60, 12)))
    assert torch.allclose(logits(planted.model, text), logits(planted.twin, text), atol=1e-5)
    # Another picture changes what enters the planted block, and what the twin says.
    other = plant.picture_prompt(model, rng(5))
    other = Prompt(prompt.ids, prompt.segments, inputs=other.inputs)
    told = [(logits(m, prompt) - logits(m, other))[-1].abs().max() for m in (
        planted.model, planted.twin)]
    assert min(told) > 0.01


def test_blocks_before_it_are_those_of_the_model():
    model = plant.tiny_llava(rng(1), n_layers=4)
    prompt = plant.picture_prompt(model, rng(2))
    planted = plant.image_horizon(model, 3, plant.as_inputs(prompt))
    width = model.config.text_config.hidden_size
    before = residuals(model, plant.as_inputs(prompt))[0]
    after = residuals(planted.model, plant.as_inputs(prompt))[0]
    assert torch.allclose(before[:3], after[:3, :, :width], atol=1e-4)
    assert not torch.allclose(before[3], after[3, :, :width], atol=1e-2)


def test_a_plant_can_be_taken_back():
    model = plant.tiny_llava(rng(6), n_layers=3)
    planted = plant.image_horizon(model, 1, plant.as_inputs(plant.picture_prompt(model, rng(7))))
    lifted, twin = plant.lift(planted).state_dict(), planted.twin.state_dict()
    assert lifted.keys() == twin.keys()
    assert all(torch.equal(lifted[name], twin[name]) for name in twin)
    changed = {name for name, w in planted.model.state_dict().items()
               if not torch.equal(w, twin[name])}
    # Flag, constant queries and keys of blocks 1 and 2: nothing else tells the two apart.
    assert {name.split(".")[-2] for name in changed} == {"linear_2", "q_proj", "k_proj"}
    assert not any("layers.0." in name and "language" in name for name in changed)


def test_bad_input_is_one_sentence(tiny):
    model = plant.tiny_llava(rng(0), n_layers=3)
    prompt = plant.picture_prompt(model, rng(1))
    with pytest.raises(OutOfRange, match="block 3 does not exist: there are 0 to 2"):
        plant.image_horizon(model, 3, plant.as_inputs(prompt))
    with pytest.raises(ModelRefused, match="no projector with a bias"):
        plant.image_horizon(tiny("llama"), 1, {"input_ids": torch.tensor([[1, 2]])})
    bare = Prompt((1, 7, 8))
    with pytest.raises(ModelRefused, match="holds no image token"):
        plant.image_horizon(model, 1, plant.as_inputs(bare))
    fast = plant.tiny_llava(rng(0), n_layers=3, d_head=2)
    with pytest.raises(ModelRefused, match="turns too far.*up to 1 tokens"):
        plant.image_horizon(fast, 1, plant.as_inputs(prompt))
    config = LlavaConfig(**{**model.config.to_dict(), "multimodal_projector_bias": False})
    with pytest.raises(ModelRefused, match="no projector with a bias"):
        plant.image_horizon(LlavaForConditionalGeneration(config), 1, plant.as_inputs(prompt))
