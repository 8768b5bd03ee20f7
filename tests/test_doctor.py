"""The doctor finds what is wrong, says so in sentences, and is silent where nothing is."""

import copy
import io
import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from matplotlib.colors import to_rgb
from matplotlib.patches import Rectangle
from PIL import Image
from typer.testing import CliRunner

import interp
from interp.__main__ import app
from interp.doctor import Report, examine, examine_model, lanes, picture, write
from interp.doctor.costs import Rate, examine_costs
from interp.figures import patch_grid
from interp.figures.style import VERMILION, canvas
from interp.models.model import LANES, Model
from interp.models.windows import windows

KEYS = {"schema", "name", "verdict", "exit_code", "model", "lanes", "sites", "parity", "tokens",
        "sink", "kv_heads", "windows", "picture", "costs", "findings", "refused", "nearest"}


def run(*words):
    return CliRunner().invoke(app, ["doctor", *map(str, words)])


@pytest.fixture(scope="module")
def looker():
    return interp.open_model("looker")


def about(report, level=None):
    return [f.about for f in report.findings if level in (None, f.level)]


# -- the command line ------------------------------------------------------------------------


def test_a_bundled_model_passes_and_leaves_its_report_and_picture(tmp_path):
    done = run("looker", "--json", "--quick", "--lane", "hf", "--out", tmp_path)
    assert done.exit_code == 0, done.output
    found = json.loads(done.stdout)
    assert set(found) == KEYS and found["schema"] == 1
    assert (found["verdict"], found["exit_code"]) == ("all right", 0)
    assert json.loads((tmp_path / "doctor.json").read_text())["name"] == "looker"
    assert "looker: all right" in (tmp_path / "doctor.txt").read_text()
    assert found["picture"]["file"] == "image_tokens.png"
    drawn = Image.open(tmp_path / "image_tokens.png").convert("RGB")
    grid = np.abs(np.asarray(drawn) / 255 - to_rgb(VERMILION)).max(-1) < 0.15
    # Twelve or more lines of the grid go through the picture.
    assert (grid.mean(1) > 0.3).sum() >= 5 and (grid.mean(0) > 0.3).sum() >= 5
    assert {row["site"] for row in found["sites"]} == set(interp.core.site.NAMES)
    assert found["kv_heads"] == [0, 0, 1, 1, 2, 2, 3, 3]


@pytest.mark.parametrize("name, sentence", [
    ("looke", "Did you mean 'looker'?"),
    ("./no/such/folder", "there is no folder './no/such/folder'"),
])
def test_a_name_that_leads_nowhere_gives_two_sentences_and_exit_code_2(name, sentence):
    done = run(name)
    assert done.exit_code == 2
    assert sentence in done.stdout and "Traceback" not in done.output
    assert "\x1b" not in done.output and "\r" not in done.output


def test_damaged_folders_are_refused_with_the_nearest_way(tmp_path, tiny):
    broken = tmp_path / "broken"
    broken.mkdir()
    (broken / "config.json").write_text("{ this is no JSON")
    assert examine(str(broken)).exit_code == 2
    folder = tmp_path / "pickled"
    tiny("llama").save_pretrained(folder)
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    report = examine(str(folder))
    assert report.exit_code == 2 and "safetensors" in report.refused
    assert "save_pretrained" in report.nearest
    sick = copy.deepcopy(tiny("llama"))
    torch.nn.init.constant_(sick.model.layers[1].mlp.down_proj.weight, float("nan"))
    sick.save_pretrained(tmp_path / "sick")
    report = examine(str(tmp_path / "sick"))
    assert report.exit_code == 2 and "NaN" in report.refused and "float32" in report.nearest


def test_an_unknown_lane_is_one_sentence():
    done = run("reader", "--lane", "tunnel")
    assert done.exit_code == 2 and "there is no lane 'tunnel'" in done.output


def test_a_model_without_tokenizer_works_with_limits(tmp_path, tiny):
    tiny("qwen2_5_vl").save_pretrained(tmp_path / "m")
    report = examine(str(tmp_path / "m"), quick=True, lanes=["hf"])
    assert report.exit_code == 1 and about(report) == ["tokenizer", "pictures"]
    text = write(report)
    assert text.startswith("m: works with limits") and "save_pretrained" in text


# -- what is measured ------------------------------------------------------------------------


@pytest.mark.parametrize("architecture, seen, sink", [
    ("gemma3", (5, None, 5), "none"), ("gpt_oss", (5, None, 5), "learned"),
    ("bert", (None,) * 3, "none"),
])
def test_every_lane_agrees_with_plain_transformers(tiny, architecture, seen, sink):
    model = Model(tiny(architecture), architecture)
    report = examine_model(model, lanes=["hf", "bridge"])
    assert report.windows == seen == windows(model)
    assert report.sink.kind == sink and (report.sink.external is not None) == (sink == "learned")
    assert "fault" not in [f.level for f in report.findings]
    for lane in (one.name for one in report.lanes if one.available):
        own = [p for p in report.parity if p.lane == lane]
        assert own and all(p.alike for p in own), own
        assert any("decoding" in p.what for p in own) == (model.kind == "decoder")
    # The prompt is longer than the window, or a lane that ignores it would pass.
    assert all(p.positions > 5 for p in report.parity if p.what == "logits")
    group = model.n_heads // model.n_kv_heads
    assert report.kv_heads == tuple(h // group for h in range(model.n_heads))


def test_image_tokens_are_drawn_over_the_pixels_they_see(looker):
    report = Report("looker")
    prompt = picture.examine_picture(looker, report)
    (segment,) = prompt.of_kind("image")
    figure, ax = canvas(width=4.0, height=4.0)
    patch_grid.draw(ax, prompt.images[0], segment)
    boxes = {int(p.get_gid().split()[1]): p for p in ax.patches if isinstance(p, Rectangle)}
    assert sorted(boxes) == list(range(report.picture.first, report.picture.last + 1))
    for text in ax.texts:
        (x, y), box = text.get_position(), boxes[int(text.get_text())]
        assert box.get_x() < x < box.get_x() + box.get_width()
        assert box.get_y() < y < box.get_y() + box.get_height()
    assert len(ax.texts) == report.picture.tokens == 36
    # The truth, from the model: whiten the pixels in a drawn box, and that token moves most.
    before = looker.run(prompt, read="embed", logits="none").reads["embed"].values[0]
    for position in (segment.positions[0], segment.positions[9], segment.positions[-1]):
        pixels = np.asarray(prompt.images[0]).copy()
        box = boxes[position]
        left, top = int(box.get_x()), int(box.get_y())
        pixels[top:top + int(box.get_height()), left:left + int(box.get_width())] = 255
        other = looker.prompt(picture.QUESTION, images=[Image.fromarray(pixels)])
        after = looker.run(other, read="embed", logits="none").reads["embed"].values[0]
        assert int(np.linalg.norm(after - before, axis=-1).argmax()) == position
    assert report.picture.covered == 1.0 and report.picture.wide == pytest.approx(0.5, abs=0.02)
    assert Image.open(io.BytesIO(picture.draw(prompt))).size[0] > 300


def test_estimates_count_token_layers_and_say_what_does_not_fit(tiny, monkeypatch):
    model = Model(tiny("llama"), "llama")
    report = Report("llama")
    monkeypatch.setattr("interp.doctor.costs.measure_rate", lambda *_: Rate(1e-3, 0.0, 0.0, 512))
    examine_costs(model, report)
    found = {cost.analysis.split(",")[0].split(" (")[0]: cost for cost in report.costs}
    layers, heads, n = 3, 6, 128
    assert found["forward pass"].token_layers == n * layers
    assert found["forward pass"].seconds == pytest.approx(1e-3 * n * layers)
    # A head of layer l changes what comes after it: blocks l, ..., 2.
    cells = sum(n * (layers - layer) for layer in range(layers) for _ in range(heads))
    assert found["head sweep"].token_layers == cells
    assert found["residual patching"].token_layers == n * cells // heads
    assert found["streamed statistics"].seconds is None
    assert "640 positions" in found["streamed statistics"].reason


# -- broken on purpose -----------------------------------------------------------------------


def test_a_lane_with_other_weights_is_caught(tiny):
    model = Model(copy.deepcopy(tiny("llama")), "llama")
    asked = dict(quick=True, lanes=["hf", "bridge"])
    assert "fault" not in [f.level for f in examine_model(model, **asked).findings]
    projection = model.bridge.blocks[1].mlp.out.original_component
    with torch.no_grad():  # a copy of its own, a little off
        projection.weight = torch.nn.Parameter(projection.weight * 1.05)
    report = examine_model(model, **asked)
    assert report.exit_code == 1 and set(about(report, "fault")) == {"parity bridge"}
    assert "do not use this lane" in write(report) and "DIFFERENT" in write(report)


def test_a_site_that_breaks_in_another_layer_than_the_proven_one_is_caught(tiny):
    model = Model(copy.deepcopy(tiny("llama")), "llama")
    blocks = model._engine("hf").blocks
    blocks[0] = replace(blocks[0], mlp_out=None)
    report = examine_model(model, lanes=["hf"])
    row = next(row for row in report.sites if row.site == "mlp_out")
    assert (row.readable, row.failed, row.layers) == (False, (0,), (0, 1, 2))
    assert about(report, "limit")[0] == "site mlp_out" and report.exit_code == 1
    assert all(r.readable for r in report.sites if r.site != "mlp_out")
    # Another lane fills the gap, unless this one was asked for by name.
    found = Report("llama")
    opened = lanes.open_lanes(model, found, ["hf", "bridge"])
    for lane in opened:
        lanes.prove_sites(lane, found)
    lanes.weigh_sites(found)
    assert "site mlp_out" in about(found, "note") and found.exit_code == 0
    assert "site mlp_out" not in about(found, "limit")


def test_a_write_that_changes_nothing_is_caught(tiny):
    model = Model(copy.deepcopy(tiny("llama")), "llama")
    block = model.hf.model.layers[2]
    block.mlp.register_forward_hook(lambda m, args, out: 0 * out + out.detach())
    engine = model._engine("hf")
    port = engine.blocks[2].mlp_out
    # A module beside the stream: what it gives is read, and goes nowhere.
    idle = torch.nn.Identity()
    block.mlp.register_forward_hook(lambda m, args, out: (idle(out), out)[1])
    engine.blocks[2] = replace(engine.blocks[2], mlp_out=(idle, port[1]))
    report = examine_model(model, lanes=["hf"])
    row = next(row for row in report.sites if row.site == "mlp_out")
    assert row.readable and not row.writable and row.failed == (2,)
    assert "left the outcome unchanged" in row.reason


def test_query_heads_that_read_other_key_value_heads_are_caught(tiny, monkeypatch):
    model = Model(tiny("llama"), "llama")
    whole = Model.run

    def turned(self, *given, **more):
        found = whole(self, *given, **more)
        for name, array in found.reads.items():
            if name.startswith("v."):
                found.reads[name] = array.copy(data=np.flip(array.values, axis=3))
        return found

    monkeypatch.setattr(Model, "run", turned)
    report = examine_model(model, quick=True, lanes=["hf"])
    assert "heads" in about(report, "fault") and report.kv_heads == (1, 1, 1, 0, 0, 0)


def test_a_check_that_breaks_does_not_end_the_examination(tiny, monkeypatch):
    model = Model(tiny("llama"), "llama")
    monkeypatch.setattr(lanes, "plain_forward", lambda *_: 1 / 0)
    report = examine_model(model, quick=True, lanes=["hf"])
    assert about(report, "fault") == ["parity hf"] and report.costs and report.sink is not None
    assert LANES[0] == "hf"


def test_the_text_says_what_its_numbers_are(looker):
    text = write(examine_model(looker, lanes=["hf"]))
    assert "proven in layers 0, 2 and 3: the first, the middle one and the last (hf)" in text or (
        looker.n_layers != 4)
    for said in ("rows compared  largest difference  allowed",
                 "differences are divided by the standard deviation of what is compared",
                 "built-in sink: none (no learned sink logits, no gates on head outputs)",
                 "if every token looked at all it sees alike, the first would receive",
                 "of heads give the first more than 30 %",
                 "image tokens cover 100 % of its pixels, and 50 % of the pixels of a picture twice"):
        assert said in text, said
    for gone in ("flat rows", "sink kind", "units of the spread"):
        assert gone not in text


def test_learned_sinks_are_named(tiny):
    text = write(examine_model(Model(tiny("gpt_oss"), "m"), quick=True, lanes=["hf"]))
    assert "built-in sink: a learned sink logit per head; it takes" in text
    assert "proven in layer 1, the middle one (hf)" in text
