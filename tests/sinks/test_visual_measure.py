"""Visual sinks in models: discovered where planted, the same as dense, and hidden key by key."""

import functools

import numpy as np
import pytest
import xarray as xr

import interp
from interp.core import Result
from interp.core.errors import OutOfRange, PromptError
from interp.models.model import Model
from interp.organisms.families import visual_family
from interp.sinks import visual

IMAGE, START, END = 96, 94, 93
"""Token ids of the tiny models' image placeholder and of Qwen's marks around it."""


@functools.cache
def family():
    """Three planted models, each on a base of its own, and their prompts."""
    cases = list(visual_family(np.random.default_rng(0), n=3, per_base=1))
    return [(case, prompts(case.text), prompts(case.images, case.image)) for case in cases]


def prompts(inputs, image: slice = slice(0)) -> list[interp.Prompt]:
    made = []
    for i, row in enumerate(inputs["input_ids"]):
        if "pixel_values" not in inputs:
            made.append(interp.Prompt.from_tokens(row))
            continue
        segments = interp.Prompt.from_tokens(row, {"image": image}).segments
        pixels = {"pixel_values": inputs["pixel_values"][i : i + 1].numpy()}
        made.append(interp.Prompt(tuple(row.tolist()), segments, inputs=pixels))
    return made


@functools.cache
def opened(case: int, which: str) -> Model:
    planted = family()[case][0].planted
    hf = planted.before.twin if which == "bare" else getattr(planted, which)
    return Model(hf, f"{which} {case}")


# -- discovery -------------------------------------------------------------------------------


@pytest.mark.parametrize("number", range(3))
def test_planted_dimensions_and_sinks_are_found_and_none_in_the_twin(number):
    case, texts, images = family()[number]
    model = opened(number, "model")
    found = visual.find_sink_dims(model, texts[:3], images, n_null=20)
    assert set(found.found.dims) == set(case.planted.dims) and found.anchor == 0
    assert set(found.found.birth_layer) == {1}  # written by block 0, so it enters block 1
    planted = case.planted.direction
    assert all(s * float(planted[d]) > 0 for d, s in zip(found.found.dims, found.found.sign))
    measured = visual.measure(model, images, found.found.dims)
    for i, truth in enumerate(case.truth):
        by_layer = visual.sinks_by_layer(measured, i, image_only=True)
        assert {p for places in by_layer.values() for p in places} == set(truth)
        # Block `layer` writes them, so they enter the next one first.
        assert not truth or set(by_layer) == {x + 1 for x in case.planted.layers if x >= 1}
    twin = visual.measure(opened(number, "twin"), images, found.found.dims)
    assert not any(visual.sinks_by_layer(twin, i, image_only=True) for i in range(len(images)))
    # The control of the discovery itself: the same model before anything was planted.
    bare = visual.find_sink_dims(opened(number, "bare"), texts[:3], images, n_null=20)
    assert bare.found.dims == () and not bare.passed and bare.gate is None and bare.null is None


def test_the_gate_passes_only_where_the_sinks_also_receive_attention():
    case, texts, images = family()[0]
    found = visual.find_sink_dims(opened(0, "model"), texts[:3], images, n_null=20)
    # Planted without attraction: massive tokens that nobody looks at are no attention sinks.
    assert found.gate["anchor"].passed and found.gate["two populations"].passed
    assert not found.gate["attention"].passed and not found.passed
    assert str(found).startswith("FAIL  sink dimensions") and "FAIL  attention" in str(found)
    text_only = visual.find_sink_dims(opened(0, "model"), texts[:3])
    assert set(text_only.found.dims) == set(case.planted.dims)
    assert text_only.gate is None and not text_only.passed  # nothing was validated
    with pytest.raises(PromptError, match="no prompts"):
        visual.find_sink_dims(opened(0, "model"), [])


# -- measure ---------------------------------------------------------------------------------


def tiny_prompt(architecture: str, seed: int = 0, after: int = 5) -> interp.Prompt:
    """A picture made by hand: 9 tokens for LLaVA, 6 for Qwen."""
    rng = np.random.default_rng(seed)
    front, back = rng.integers(3, 90, 3), rng.integers(3, 90, after)
    if architecture == "llava":
        ids, span = [*front, *[IMAGE] * 9, *back], (3, 12)
        inputs = {"pixel_values": rng.standard_normal((1, 3, 24, 24)).astype(np.float32)}
    else:
        ids, span = [*front, START, *[IMAGE] * 6, END, *back], (4, 10)
        inputs = {"pixel_values": rng.standard_normal((24, 96)).astype(np.float32),
                  "image_grid_thw": np.array([[1, 4, 6]]),
                  "mm_token_type_ids": np.array([[int(i == IMAGE) for i in ids]])}
    prompt = interp.Prompt.from_tokens(ids, {"image": span})
    return interp.Prompt(prompt.ids, prompt.segments, inputs=inputs)


@pytest.mark.parametrize("architecture", ["llava", "qwen2_5_vl"])
def test_every_number_is_that_of_the_dense_reads(tiny, architecture):
    model = Model(tiny(architecture), f"tiny-{architecture}")
    given = [tiny_prompt(architecture, 0, 5), tiny_prompt(architecture, 1, 8)]
    dims, tau = [7, 30], 2.0
    found = visual.measure(model, given, np.array(dims), tau)
    assert found["phi"].dims == ("prompt", "layer", "position")
    assert 0 < int(found["is_sink"].sum()) < found["is_sink"].size / 2
    for i, prompt in enumerate(given):
        n, image = len(prompt), list(prompt.positions("image"))
        later = np.arange(max(image) + 1, n)
        reads = model.run(prompt, read=("resid_pre", "pattern", "v")).reads
        x, p, v = (reads[name].values[0].astype(float) for name in ("resid_pre", "pattern", "v"))
        one = found.data.isel(prompt=i, position=slice(n))
        phi = np.abs(x[..., dims]).max(-1) / np.sqrt((x**2).mean(-1) + 1e-6)
        assert np.allclose(one["phi"], phi, rtol=1e-5)
        assert np.array_equal(one["is_sink"], phi >= tau)
        norm = np.repeat(np.linalg.norm(v, axis=-1).transpose(0, 2, 1), 3, 1)  # [layer, head, key]
        for key in range(n):
            # Later queries that see the key, its own excepted.
            rows = later[later > key]
            if not len(rows):
                assert one["received"].values[:, key].tolist() == pytest.approx([np.nan] * 3,
                                                                               nan_ok=True)
                continue
            mass = p[:, :, rows, key].mean(-1)
            assert np.allclose(one["received"].values[:, key], mass.mean(1), atol=1e-6)
            assert np.allclose(one["contribution"].values[:, key],
                               (mass * norm[:, :, key]).mean(1), rtol=1e-4, atol=1e-6)
        assert one["kind"].values.tolist() == ["image" if k in image else "text" for k in range(n)]
        labels = visual.origin(x[0][image], phi[:, image], tau).labels()
        assert one["origin"].values[image].tolist() == labels
        assert set(np.delete(one["origin"].values, image)) == {""}
        rest = found.data.isel(prompt=i, position=slice(n, None))
        assert set(rest["kind"].values) <= {""} and not rest["is_sink"].any()
        assert rest["phi"].isnull().all()
    assert found.manifest["sink_dims"] == dims and found.manifest["tau"] == tau


def test_words_are_kept_whole_also_when_saved(tiny, tmp_path):
    model = Model(tiny("llava"), "tiny-llava")
    given = [tiny_prompt("llava", 0, 8), tiny_prompt("llava", 1, 2)]
    found = visual.measure(model, given, [7], 2.0)
    found.save(tmp_path)
    for one in (found, Result.load(tmp_path)):
        assert {str(k) for k in np.unique(one["kind"])} == {"", "text", "image"}
        assert {str(k) for k in np.unique(one["origin"])} <= {"", "V-sink", "L-sink", "V+L", "none"}
        assert one["is_sink"].dtype == bool or set(np.unique(one["is_sink"])) <= {0, 1}
        assert visual.sinks_by_layer(one, 1, 0) == visual.sinks_by_layer(found, 1, 0)


def test_the_threshold_is_that_of_the_width_if_none_is_given(tiny):
    model = Model(tiny("llava"), "tiny-llava")
    found = visual.measure(model, [tiny_prompt("llava")], [7])
    assert found.manifest["tau"] == pytest.approx(0.3125 * 48**0.5)
    with pytest.raises(OutOfRange, match=r"\[48\] do not fit a residual of width 48"):
        visual.measure(model, [tiny_prompt("llava")], [48])


def test_sinks_are_listed_by_layer():
    flags = np.zeros((2, 4, 6), dtype=bool)
    flags[1, [0, 2, 2, 3], [2, 0, 3, 5]] = True
    kind = np.array([["text"] * 6, ["text", "text", "image", "image", "text", ""]])
    found = Result(xr.Dataset({"is_sink": (("prompt", "layer", "position"), flags),
                               "kind": (("prompt", "position"), kind)}))
    assert visual.sinks_by_layer(found, 0, 0) == {}
    assert visual.sinks_by_layer(found, 1) == {2: (0, 3), 3: (5,)}
    assert visual.sinks_by_layer(found, 1, first_layer=0) == {0: (2,), 2: (0, 3), 3: (5,)}
    assert visual.sinks_by_layer(found, 1, image_only=True) == {2: (3,)}


def test_a_prompt_without_a_picture_or_a_question_is_refused(tiny):
    model = Model(tiny("llava"), "tiny-llava")
    plain = interp.Prompt.from_tokens(range(3, 12))
    last = interp.Prompt.from_tokens(range(3, 12), {"image": (4, 9)})
    found = visual.measure(model, [tiny_prompt("llava")], [7])
    for call in (lambda p: visual.after_image(p), lambda p: visual.measure(model, [p], [7]),
                 lambda p: visual.intervene(model, [p], found, [5])):
        with pytest.raises(PromptError, match=r"no image: make it with model\.prompt\(.*images="):
            call(plain)
        with pytest.raises(PromptError, match="no token follows the image"):
            call(last)
    assert visual.after_image(tiny_prompt("llava")) == (12, 13, 14, 15, 16)


# -- hiding ----------------------------------------------------------------------------------


def spied(monkeypatch, model: Model) -> list:
    """Every call of `model.run` from here on, as (prompt, write)."""
    calls, run = [], model.run
    monkeypatch.setattr(model, "run", lambda p, write=(), **more: (
        calls.append((p, tuple(write))), run(p, write=write, **more))[1])
    return calls


def test_sinks_are_hidden_exactly_and_controls_hold_none_of_them(monkeypatch):
    case, _, images = family()[1]
    model = Model(case.planted.model, "hiding")
    at = [i for i, truth in enumerate(case.truth) if truth][0]
    found = visual.measure(model, images, case.planted.dims)
    one = Result(found.data.isel(prompt=[at]), found.manifest)
    prompt, sinks = images[at], sorted(case.truth[at])
    calls = spied(monkeypatch, model)
    result = visual.intervene(model, [prompt], one, [17], control_seeds=4, seed=1)
    later = tuple(range(39, 46))
    assert len(calls) == 1 + 1 + 4 + 1 and calls[0][1] == ()
    blocks = [write[0] for _, write in calls[1:]]
    layers = tuple(range(2, model.n_layers))
    assert all(b.queries == later and b.layers == layers and b.heads is None for b in blocks)
    assert sorted(blocks[0].keys) == sinks and int(result["hidden"][0]) == len(sinks)
    image = set(range(3, 39))
    for control in blocks[1:]:
        assert len(set(control.keys)) == len(sinks) and set(control.keys) <= image - set(sinks)
    assert len({frozenset(b.keys) for b in blocks[1:5]}) > 1
    received = one["received"].values[0, 2:].mean(0)
    rest = sorted(image - set(sinks), key=lambda p: -received[p])
    assert sorted(blocks[5].keys) == sorted(rest[: len(sinks)])

    # What the first block does inside the model, seen in the attention itself.
    before = model.run(prompt, read="pattern").reads["pattern"].values[0]
    run = model.run(prompt, write=blocks[:1], read="pattern")
    after = run.reads["pattern"].values[0]
    cut = np.zeros(after.shape, dtype=bool)
    cut[np.ix_(layers, range(model.n_heads), later, sinks)] = True
    seen = np.tril(np.ones(after.shape[-2:], dtype=bool))
    assert (after[cut] == 0).all() and (after[np.broadcast_to(seen, cut.shape) & ~cut] > 0).all()
    assert np.allclose(after.sum(-1), 1, atol=1e-5)
    assert np.allclose(after[:2], before[:2], atol=1e-6)
    assert np.allclose(after[2][:, :39], before[2][:, :39], atol=1e-6)
    score = run.logits[0][-1].log_softmax(-1)[17]
    assert float(result["log_probability"].sel(condition="sinks")[0]) == pytest.approx(
        float(score), abs=1e-5)


def test_without_sinks_nothing_is_hidden():
    case, _, images = family()[1]
    twin = opened(1, "twin")
    found = visual.measure(twin, images[:1], case.planted.dims)
    result = visual.intervene(twin, images[:1], found, [17])
    assert result["hidden"].values.tolist() == [0]
    assert np.ptp(result["log_probability"].values) == 0


def test_each_condition_is_the_log_probability_of_that_run(tiny):
    model = Model(tiny("llava"), "tiny-llava")
    prompt = tiny_prompt("llava")
    found = visual.measure(model, [prompt], [7], 2.0)
    flags = np.zeros_like(found["is_sink"].values)
    flags[:, 2, [0, 4, 8]] = True  # position 0 is a sink, but no visual one
    found.data["is_sink"] = (("prompt", "layer", "position"), flags)
    untouched = model.run(prompt).logits[0][-1].log_softmax(-1)
    blocked = model.run(prompt, write=interp.block(range(12, 17), [4, 8], layers=[2]))
    answer = int(untouched.argmax())
    result = visual.intervene(model, [prompt], found, [answer], control_seeds=3)
    values = result["log_probability"].isel(prompt=0)
    assert float(values.sel(condition="untouched")) == pytest.approx(float(untouched[answer]),
                                                                    abs=1e-5)
    expected = float(blocked.logits[0][-1].log_softmax(-1)[answer])
    assert float(values.sel(condition="sinks")) == pytest.approx(expected, abs=1e-5)
    assert bool(result["correct"].sel(condition="untouched")[0]) and int(result["hidden"][0]) == 2
    wrong = visual.intervene(model, [prompt], found, [(answer + 1) % 97], control_seeds=1)
    assert not bool(wrong["correct"].sel(condition="untouched")[0])


def test_keys_that_a_window_hides_are_no_strongest_comparator_and_do_not_stop_discovery(tiny):
    model = Model(tiny("mistral"), "tiny-mistral")  # every layer sees five tokens back
    prompt = interp.Prompt.from_tokens(np.random.default_rng(0).integers(3, 90, 14), {"image": (2, 8)})
    assert not visual.find_sink_dims(model, [prompt]).anchor_is_top
    found = visual.measure(model, [prompt], [7], 2.0)
    received = found["received"].values[0, 2]
    assert np.isnan(received[2:6]).all() and np.isfinite(received[6:8]).all()
    flags = np.zeros_like(found["is_sink"].values)
    flags[:, 2, 7] = True
    found.data["is_sink"] = (("prompt", "layer", "position"), flags)
    result = visual.intervene(model, [prompt], found, [5], control_seeds=1)
    blocked = model.run(prompt, write=interp.block(range(8, 14), [6], layers=[2]))
    expected = float(blocked.logits[0][-1].log_softmax(-1)[5])
    values = result["log_probability"].sel(condition="attention-matched")
    assert float(values[0]) == pytest.approx(expected, abs=1e-5)
