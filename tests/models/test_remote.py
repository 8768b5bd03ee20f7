"""Remote runs: a server is played in this process, behind nnsight's own request.

The request is built, packed and unpacked as for NDIF; the server holds the only weights.
"""

import pickle

import numpy as np
import pytest
import torch
import transformers.pipelines
from nnsight.intervention.backends.remote import RemoteBackend, RemoteError
from nnsight.intervention.serialization import CustomCloudUnpickler
from nnsight.modeling import huggingface
from nnsight.modeling.transformers import TransformersModel
from nnsight.schema.config import CONFIG
from nnsight.schema.request import RequestModel
from nnsight.tracing import tracer as tracing

import interp
from interp.core.errors import ModelRefused, RemoteRefused, SiteRefused
from interp.models import open as opening
from interp.organisms import registry

ORIGINAL = RemoteBackend.request
WHERE = str(registry.path("reader"))
WRITES = {
    "nothing": ((), 0), "head": (interp.ablate("L1H0"), 1),
    "value": (interp.ablate("L2H3", by="uniform"), 1),
    "edges": (interp.block([7], [3], layers=[1, 2]), 2),
    "stream": ((interp.edit("mlp_out.2", "multiply", 0.5, positions=[4]),
                interp.edit("resid_mid.3", "norm", 3.0, positions=[5])), 2),
}
"""Edits, and how many places of a pass they change (the middle of a block through attention)."""


class Server:
    """Runs what arrives on weights of its own; `refuse` is asked before."""

    def __init__(self):
        self.model = TransformersModel(WHERE, dispatch=True, task="text-generation")
        self.blobs, self.refuse, self.names = [], lambda blob: None, set()

    def __call__(self, backend, request, tracer):
        blob = backend._serialize(tracer)
        self.blobs.append(blob)
        self.model_key = request.model_key
        names = self.names

        class Recorded(CustomCloudUnpickler):
            def find_class(self, module, name):
                names.add(f"{module}.{name}")
                return super().find_class(module, name)

        self.refuse(blob)
        persistent = self.model._remoteable_persistent_objects()
        got = RequestModel.deserialize(blob, persistent, backend.compress, Recorded)
        got.execute(got.info.code)
        saved = {n: x for n, x in got.info.frame.f_locals.items() if id(x) in tracing._saves()}
        return pickle.loads(pickle.dumps(saved))


@pytest.fixture(scope="module")
def server():
    patch, made = pytest.MonkeyPatch(), Server()
    patch.setattr(RemoteBackend, "request", lambda *given: made(*given))
    patch.setattr(CONFIG.API, "APIKEY", "key")
    patch.setattr(CONFIG.API, "COMPRESS", False)
    patch.setattr(CONFIG.APP, "REMOTE_LOGGING", False)
    # What the hub would say: where the model lies, what it is for, what it is called.
    patch.setattr(opening, "_locate", lambda name: (WHERE, False, "main"))
    patch.setattr(transformers.pipelines, "get_task", lambda *_: "text-generation")
    patch.setitem(huggingface._ID_CACHE, WHERE, "org/reader")
    yield made
    patch.undo()


@pytest.fixture(scope="module")
def remote(server):
    return interp.open_model("org/reader", remote=True)


@pytest.fixture(scope="module")
def local(server):
    model = interp.open_model("reader")
    return model


def jobs(model):
    return model._engine("nnsight").jobs


@pytest.fixture
def prompt():
    return interp.Prompt.from_tokens(range(3, 20), segments={"needle": (2, 5)})


@pytest.mark.parametrize("name", WRITES)
def test_the_server_gives_what_the_model_gives_here(remote, local, prompt, name):
    write, places = WRITES[name]
    asked = dict(read=["pattern", "resid_mid", "z", "k.1", "mlp_in"], write=write,
                 stats=["received", "entropy", "segments", "norm"])
    for new in (0, 2):
        before = jobs(remote)
        a, b = (model.run(prompt, new_tokens=new, **asked) for model in (remote, local))
        # One job for the pass, and one more for every place whose value had to come here.
        assert jobs(remote) - before == (new + 1) * (places + 1)
        assert a.new_tokens == b.new_tokens and a.logits[0].shape == b.logits[0].shape
        torch.testing.assert_close(a.logits[0], b.logits[0], atol=1e-3, rtol=1e-4)
        for key, array in {**b.reads, **b.stats}.items():
            np.testing.assert_allclose({**a.reads, **a.stats}[key], array, atol=2e-4, err_msg=key)
    if places:
        free = local.run(prompt, new_tokens=2).logits[0]
        assert (b.logits[0] - free).abs().max() > 1e-2, "the edit does something"


def test_phases_and_cached_keys_mean_the_same(remote, local, prompt):
    prompts = [prompt, interp.Prompt.from_tokens(range(30, 47), segments={"needle": (4, 6)})]
    write = (interp.ablate("L1H0", phase="decode"), interp.ablate("L2H1", phase="prefill"),
             interp.edit("v.1", "multiply", 0.5, positions="needle"))
    a, b = (model.run(prompts, read="z", stats="received", write=write, new_tokens=2, logits="last",
                      decode_last=True) for model in (remote, local))
    assert a.new_tokens == b.new_tokens
    for x, y in zip(a.logits, b.logits):
        torch.testing.assert_close(x, y, atol=1e-3, rtol=1e-4)
    np.testing.assert_allclose(a.reads["z"], b.reads["z"], atol=2e-4)
    np.testing.assert_allclose(a.stats["received"], b.stats["received"], atol=1e-5)


def test_no_weight_is_here_and_the_manifest_says_so(remote, local, prompt):
    remote.run(prompt)
    assert all(weight.is_meta for weight in remote.hf.parameters())
    assert not any(weight.is_meta for weight in local.hf.parameters())
    told = remote.manifest()
    assert (told["lane"], told["remote"], told["device"]) == ("nnsight", True, "remote")
    assert local.manifest()["remote"] is False
    assert set(remote.sites("write")) == set(local.sites("write"))
    assert remote.kind == local.kind and remote.tokenizer is not None


def test_what_is_sent_is_data_and_functions_of_torch(remote, server, prompt):
    server.names.clear(), server.blobs.clear()
    remote.run(prompt, read="pattern", write=WRITES["head"][0], stats="received")
    roots = {name.split(".")[0] for name in server.names}
    assert "torch" in roots and "_load_function" in " ".join(server.names)
    assert roots <= {"torch", "nnsight", "builtins", "collections", "types", "cloudpickle"}, roots
    assert len(server.blobs) == 2 and max(map(len, server.blobs)) < 100_000
    weights = sum(x.nbytes for x in server.model._module.parameters())
    assert weights > 20 * sum(map(len, server.blobs))
    for blob in server.blobs:
        assert b"undertow" not in blob and b"jaxtyping" not in blob
    assert "org/reader" in server.model_key and "TransformersModel" in server.model_key


def test_what_needs_the_weights_is_refused(remote, prompt):
    for use in (lambda: remote.using("hf"), lambda: remote.using("bridge"), lambda: remote.mlp(1),
                lambda: remote.w_o(0), lambda: remote.resumable(prompt)):
        with pytest.raises(ModelRefused, match="org/reader was opened with remote=True"):
            use()


@pytest.mark.parametrize("given, says", [
    (dict(lane="bridge"), "runs in lane 'nnsight', not 'bridge'"),
    (dict(dtype="float32"), "the server decides"), (dict(device="cpu"), "the server decides"),
])
def test_options_that_a_remote_run_cannot_have(server, given, says):
    with pytest.raises(ModelRefused, match=says):
        interp.open_model("org/reader", remote=True, **given)


def test_a_model_of_this_machine_is_not_sent(tmp_path, tiny):
    tiny("llama").save_pretrained(tmp_path)
    with pytest.raises(ModelRefused, match="is on this machine"):
        opening._check_remote(str(tmp_path), True, "auto", None, None)


# -- a server that says no -----------------------------------------------------------------------


@pytest.fixture
def refusing(server):
    yield lambda error: setattr(server, "refuse", error)
    server.refuse = lambda blob: None


def raising(error, part=b""):
    def refuse(blob):
        if part in blob:
            raise error

    return refuse


@pytest.mark.parametrize("error, says", [
    (RemoteError("Model org/reader is not deployed on this server. Ask for it."),
     r"did not open org/reader: Model org/reader is not deployed on this server; .*status\(\)"),
    (RemoteError("Failed to send request: Invalid API key"), "did not open .*check NDIF_API_KEY"),
    (RemoteError("CUDA out of memory"), "did not open .*fewer or shorter prompts"),
    (ConnectionRefusedError("Connection refused"), "cannot reach .*Connection refused.*without"),
])
def test_every_no_is_one_sentence(refusing, error, says):
    refusing(raising(error))
    with pytest.raises(RemoteRefused, match=says) as caught:
        interp.open_model("org/reader", remote=True)
    assert "\n" not in str(caught.value) and str(caught.value).endswith(".")


def test_a_no_in_the_middle_loses_nothing(remote, refusing, prompt):
    refusing(raising(RemoteError("Job was preempted")))
    with pytest.raises(RemoteRefused, match="did not run org/reader: Job was preempted"):
        remote.run(prompt)
    refusing(lambda blob: None)
    assert len(remote.run(prompt).logits) == 1


def test_attention_that_may_not_be_touched_leaves_the_residual_stream(refusing, local, prompt):
    refusing(raising(RemoteError("custom attention functions are not allowed"), b"attention_inter"))
    model = interp.open_model("org/reader", remote=True)
    assert {"resid_pre", "resid_mid", "mlp_out"} <= set(model.sites("write"))
    assert not {"q", "z", "pattern"} & set(model.sites())
    for bad in (dict(read="pattern"), dict(write=interp.ablate("L1H0")), dict(stats="received")):
        with pytest.raises(SiteRefused, match="custom attention functions are not allowed"):
            model.run(prompt, **bad)
    a, b = (m.run(prompt, read="resid_post").reads["resid_post"] for m in (model, local))
    np.testing.assert_allclose(a, b, atol=2e-3)


def test_without_a_key_nothing_is_sent(server, monkeypatch):
    monkeypatch.setattr(CONFIG.API, "APIKEY", None)
    server.blobs.clear()
    with pytest.raises(RemoteRefused, match="only with an API key: set .* NDIF_API_KEY"):
        interp.open_model("org/reader", remote=True)
    assert not server.blobs


def test_a_server_that_is_not_there(server, monkeypatch):
    """nnsight's own backend, and a port where nobody listens."""
    monkeypatch.setattr(RemoteBackend, "request", ORIGINAL)
    with pytest.raises(RemoteRefused, match=r"cannot reach http://127.0.0.1:9 to open org/reader"):
        interp.open_model("org/reader", remote="http://127.0.0.1:9")
