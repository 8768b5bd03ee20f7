"""Opening models: bundled, from a folder, and everything that can be wrong with a name."""

import json
import shutil
import socket
import subprocess

import pytest
import torch

import interp
from interp.core.errors import ModelNotFound, ModelRefused
from interp.models.model import Model


@pytest.fixture
def saved(tiny, tmp_path):
    """A tiny Llama saved like any model: config and safetensors, no tokenizer."""
    folder = tmp_path / "my-llama"
    tiny("llama").save_pretrained(folder)
    return folder


def test_a_folder_opens_to_the_same_weights(saved, tiny):
    model = interp.open_model(saved)
    prompt = interp.Prompt.from_tokens([5, 9, 3, 17, 40])
    with torch.no_grad():
        expected = tiny("llama")(input_ids=torch.tensor([prompt.ids])).logits[0]
    assert torch.allclose(model.run(prompt).logits[0], expected, atol=1e-5)
    assert (model.n_layers, model.n_heads, model.n_kv_heads) == (3, 6, 2)
    assert model.name == "my-llama" and model.kind == "decoder"


def test_opening_a_local_model_neither_installs_nor_connects(saved, monkeypatch):
    def forbidden(*args, **kwargs):
        raise AssertionError("opening a local model must not do this")

    monkeypatch.setattr(subprocess, "Popen", forbidden)
    monkeypatch.setattr(subprocess, "check_call", forbidden)
    monkeypatch.setattr(socket.socket, "connect", forbidden)
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    interp.open_model(saved)


def test_an_unknown_bundled_name_lists_the_bundled_ones():
    with pytest.raises(ModelNotFound, match=r"cannot find 'reeder'.*reader"):
        interp.open_model("reeder")


def test_a_missing_folder_is_named():
    with pytest.raises(ModelNotFound, match=r"there is no folder './nowhere/at-all'"):
        interp.open_model("./nowhere/at-all")


def test_a_folder_without_a_config_is_named(tmp_path):
    with pytest.raises(ModelNotFound, match="has no config.json"):
        interp.open_model(tmp_path)


def test_missing_weights_are_refused_and_pickles_are_not_loaded(saved):
    (saved / "model.safetensors").unlink()
    (saved / "pytorch_model.bin").write_bytes(b"pickle")
    with pytest.raises(ModelRefused, match="no readable safetensors"):
        interp.open_model(saved)


def test_an_architecture_that_transformers_lacks_is_named(saved):
    config = json.loads((saved / "config.json").read_text())
    config["architectures"] = ["NoSuchForCausalLM"]
    (saved / "config.json").write_text(json.dumps(config))
    with pytest.raises(ModelRefused, match="NoSuchForCausalLM"):
        interp.open_model(saved)


def test_attention_that_cannot_be_reached_is_refused_by_name(tmp_path):
    import transformers

    folder = tmp_path / "bloom"
    config = transformers.BloomConfig(vocab_size=50, hidden_size=16, n_layer=2, n_head=2)
    transformers.BloomForCausalLM(config).save_pretrained(folder)
    with pytest.raises(ModelRefused, match="BloomForCausalLM never calls"):
        interp.open_model(folder)


@pytest.mark.parametrize("bad", [{"dtype": "float7"}, {"lane": "slow"}, {"revision": "v2"}])
def test_a_wrong_option_is_named(saved, bad):
    with pytest.raises(ModelRefused, match=str(next(iter(bad.values())))):
        interp.open_model(saved, **bad)


def test_low_precision_opens_and_agrees_roughly(saved):
    exact, rough = interp.open_model(saved), interp.open_model(saved, dtype="bfloat16")
    prompt = interp.Prompt.from_tokens([5, 9, 3, 17, 40])
    a, b = exact.run(prompt).logits[0], rough.run(prompt).logits[0]
    assert rough.dtype == torch.bfloat16
    assert (a - b).abs().max() < 0.1 * a.std()
    assert set(rough.sites("write")) == set(exact.sites("write"))


def test_nan_weights_are_reported_at_opening(tiny):
    import copy

    broken = copy.deepcopy(tiny("gpt2"))
    with torch.no_grad():
        broken.transformer.h[1].mlp.c_fc.weight[0, 0] = float("nan")
    with pytest.raises(interp.core.NumericalError, match="NaN or infinity"):
        Model(broken, "broken")


def test_a_moved_folder_still_opens(saved, tmp_path):
    moved = tmp_path / "elsewhere"
    shutil.copytree(saved, moved)
    shutil.rmtree(saved)
    assert interp.open_model(moved).n_layers == 3


def test_no_progress_bar_without_a_terminal_and_the_setting_is_restored(capfd):
    import transformers

    before = transformers.utils.logging.is_progress_bar_enabled()
    interp.open_model("backcopy-1l")
    assert "Loading weights" not in capfd.readouterr().err
    assert transformers.utils.logging.is_progress_bar_enabled() == before


@pytest.fixture
def hub(monkeypatch):
    """A hub that is down: the calls that were made to it."""
    from huggingface_hub import constants
    from huggingface_hub.utils import _http

    calls = []
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(socket, "getaddrinfo", lambda *a, **_: calls.append(a) or _raise())
    monkeypatch.setattr(_http.time, "sleep", lambda *_: pytest.fail("the hub was asked again"))
    return calls


def _raise():
    raise socket.gaierror(-2, "Name or service not known")


@pytest.mark.parametrize("name, meant", [("raeder", "reader"), ("Loker", "looker"),
                                         ("backcopy", "backcopy-")])
def test_a_misspelt_bundled_name_is_told_before_the_hub_is_asked(hub, name, meant):
    with pytest.raises(ModelNotFound, match=rf"cannot find '{name}'.*Did you mean '{meant}.*'\?$"):
        interp.open_model(name)
    assert not hub
    with pytest.raises(ModelNotFound, match="no folder 'a/b/readr'.*all-minilm-l6-v2"):
        interp.open_model("a/b/readr")


def test_a_hub_that_is_down_is_asked_once_and_without_noise(hub, capfd, caplog):
    with pytest.raises(ModelNotFound, match="cannot find 'some-org/some-model'.*hub did not give it"):
        interp.open_model("some-org/some-model")
    # Once about the model, and once what the library itself wants to know.
    assert 1 <= len(hub) <= 2
    assert not caplog.records and capfd.readouterr().err == ""


def test_a_hub_that_answers_no_is_asked_by_the_libraries(hub, monkeypatch):
    from interp.models import hub as module

    class Answer:
        status_code, headers, request = 404, {}, None

    def refuse(*_, **__):
        raise module.HfHubHTTPError("no such model", response=Answer())

    monkeypatch.setattr(module, "get_hf_file_metadata", refuse)
    assert module.hub_answers("some-org/some-model")
    Answer.status_code = 503
    assert not module.hub_answers("some-org/some-model")
    monkeypatch.setattr(module, "get_hf_file_metadata", lambda *_, **__: None)
    assert module.hub_answers("some-org/some-model") and not hub


@pytest.mark.parametrize("device, sentence", [
    ("gpu", "write cpu, mps, cuda, cuda:NUMBER or auto"), ("cuda:x", "write cpu"),
    ("cuda", "torch sees no GPU here"), ("mps", "no Apple GPU here"),
])
def test_a_device_that_is_not_there_is_one_sentence(monkeypatch, device, sentence):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    with pytest.raises(ModelRefused, match=f"device cannot be '{device}': .*{sentence}") as caught:
        interp.open_model("backcopy-1l", device=device)
    assert "\n" not in str(caught.value)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with pytest.raises(ModelRefused, match="there are 2 GPUs here"):
        interp.open_model("backcopy-1l", device="cuda:2")
