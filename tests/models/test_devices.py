"""One model over several devices, as far as one device can show it: accelerate's hooks are on.

Real second devices are not at hand, so what is shown is that weights which are not there (on disk,
or brought in for each call) and hooks around every block change no number, in no lane that runs.
"""

import copy

import numpy as np
import pytest
import torch

import interp
from interp.core.errors import ModelRefused
from interp.models.model import Model

accelerate = pytest.importorskip("accelerate")

WRITE = (interp.ablate("L1H0"), interp.block([7], [3]),
         interp.edit("mlp_out.2", "multiply", 0.5, positions=[4]))


def spread(hf, how, folder):
    """The model with accelerate's hooks, and whether some of its weights are elsewhere."""
    if how == "fetched":
        # Every weight lives in a dictionary and is brought in for its own call.
        return accelerate.cpu_offload(hf, execution_device=torch.device("cpu"))
    if how == "disk":
        parts = {name: "cpu" for name, _ in hf.model.named_children() if name != "layers"}
        places = {f"model.{name}": place for name, place in parts.items()}
        places |= {f"model.layers.{i}": "disk" if i == 1 else "cpu" for i in range(3)}
        places["lm_head"] = "cpu"
        return accelerate.dispatch_model(hf, places, offload_dir=folder)
    # What dispatch_model attaches where all devices are real ones.
    for module in [*hf.model.layers, hf]:
        accelerate.hooks.add_hook_to_module(module, accelerate.hooks.AlignDevicesHook(
            execution_device="cpu", io_same_device=True))
    return hf


def outcome(model, prompt):
    return model.run(prompt, read=["resid_mid", "z", "pattern"], stats=["received", "norm"],
                     write=WRITE, new_tokens=2)


@pytest.fixture(scope="module")
def plain(tiny):
    return Model(tiny("llama"), "plain")


@pytest.mark.parametrize("how, lanes", [
    ("fetched", ("hf",)), ("disk", ("hf",)), ("hooks", ("hf", "nnsight")),
])
def test_a_model_in_parts_gives_the_same_numbers(tiny, plain, text_prompt, tmp_path, how, lanes):
    hf = spread(copy.deepcopy(tiny("llama")), how, tmp_path)
    model, prompt = Model(hf, how), text_prompt(0, 11)
    away = sum(weight.is_meta for weight in hf.parameters())
    assert (away > 0) == (how != "hooks"), "the control: weights are really elsewhere"
    expected = outcome(plain, prompt)
    for lane in lanes:
        found = outcome(model if lane == "hf" else model.using(lane), prompt)
        assert torch.allclose(found.logits[0], expected.logits[0], atol=1e-5)
        assert found.new_tokens == expected.new_tokens
        for name, array in {**expected.reads, **expected.stats}.items():
            np.testing.assert_allclose({**found.reads, **found.stats}[name], array, atol=1e-5)
    assert torch.equal(model.w_o(1), plain.w_o(1)) and not model.w_o(1).is_meta
    x = torch.randn(3, 48)
    assert torch.allclose(model.mlp(1)(x), plain.mlp(1)(x), atol=1e-5)
    assert model.manifest()["device"] == "cpu"
    assert sum(weight.is_meta for weight in hf.parameters()) == away, "put back as it was"


@pytest.mark.parametrize("lane", ("bridge", "nnsight"))
def test_lanes_that_need_every_weight_here_say_so(tiny, tmp_path, lane):
    model = Model(spread(copy.deepcopy(tiny("llama")), "disk", tmp_path), "in-parts")
    with pytest.raises(ModelRefused, match=r"weights of in-parts are offloaded.*lane.?=?.?'hf'"):
        model.using(lane)


def test_a_folder_opens_by_a_device_map(tiny, plain, text_prompt, tmp_path):
    tiny("llama").save_pretrained(tmp_path / "saved")
    for place in ("auto", {"": "cpu"}, {"model": "cpu", "lm_head": "disk"}):
        model, prompt = interp.open_model(tmp_path / "saved", device=place), text_prompt(1, 7)
        assert torch.allclose(model.run(prompt).logits[0], plain.run(prompt).logits[0], atol=1e-5)


def test_spreading_without_accelerate_is_refused(tiny, tmp_path, monkeypatch):
    tiny("llama").save_pretrained(tmp_path / "saved")
    found = interp.models.open.importlib.util.find_spec
    monkeypatch.setattr(interp.models.open.importlib.util, "find_spec",
                        lambda name: None if name == "accelerate" else found(name))
    with pytest.raises(ModelRefused, match="accelerate, which is not installed"):
        interp.open_model(tmp_path / "saved", device={"": "cpu"})
