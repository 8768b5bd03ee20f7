"""The experiment on planted visual sinks, on the same model without them, and on unfit models."""

import copy

import pytest
from transformers import CLIPImageProcessorPil, LlavaProcessor

import interp
from experiments import visual_sinks as experiment
from experiments._output import execute
from experiments._paper import Settings, load
from interp.models.model import Model
from interp.prompts import scenes

DIMENSIONS, STAYS, HIDING, LESS, BACKGROUND, INHERITED = 0, 2, 3, 4, 6, 11
LLAVA_TEMPLATE = (
    "{% for m in messages %}{% for c in m['content'] %}{{ '<image>' if c['type'] == 'image' "
    "else c['text'] }}{% endfor %}{% endfor %}")


def result(name, out, **more):
    return execute(load("visual_sinks"), Settings.of(model=[str(name)], out=out, tiny=True, **more))


def verdicts(outcome):
    """The claims in the order of the paper; every one of them exactly once."""
    found = {claim.sentence: claim for claim in outcome.claims}
    assert found.keys() == set(experiment.CLAIMS) and len(found) == len(outcome.claims)
    return [found[sentence] for sentence in experiment.CLAIMS]


@pytest.fixture(scope="module")
def on_planted(tmp_path_factory):
    return result(experiment.PLANTED, tmp_path_factory.mktemp("out"))


def test_planted_visual_sinks_are_found_where_they_were_planted(on_planted):
    found = verdicts(on_planted)
    for index in (DIMENSIONS, STAYS, BACKGROUND):
        assert found[index].verdict == "supported", found[index]
    (truth,) = [m["planted"] for m in on_planted.manifest["models"]]
    assert truth["kind"] == "visual" and truth["layer"] == 1
    assert set(found[DIMENSIONS].details["dimensions"]) == set(truth["dims"])
    # What block 1 writes enters block 2.
    assert found[STAYS].measured == 1.0 and found[STAYS].details["birth layers"] == [2]
    assert found[INHERITED].verdict == "not testable"
    assert {i for i, c in enumerate(found) if c.causal} >= {HIDING, LESS}
    assert all(c.control for c in found if c.causal)
    assert found[HIDING].n >= 5 and 0 < found[HIDING].details["tokens hidden, mean"] < 36


def test_the_sinks_of_the_result_are_the_image_tokens_that_were_planted():
    settings = Settings.of(tiny=True)
    model = experiment._planted(settings)
    (dims,) = [model.source["planted"]["dims"]]
    cases = experiment.cases(model, 4, settings.rng(1))
    bare = interp.open_model("looker")
    for case in cases:
        x, y = (one.run(case.prompt, read="resid_pre.3", logits="none").reads["resid_pre.3"]
                .values[0, 0] for one in (model, bare))
        found = experiment.visual.measure(model, [case.prompt], dims)
        sinks = experiment.visual.sinks_by_layer(found, 0, image_only=True).get(3, ())
        grown = abs(x[:, dims]).max(-1) > 10 * abs(y[:, dims]).max(-1)
        assert set(sinks) == {p for p in case.prompt.positions("image") if grown[p]}


def test_every_figure_and_result_is_there(on_planted):
    assert {f.name for f in on_planted.figures if f.files} == set(experiment.PAPER.figures)
    for figure in on_planted.figures:
        for file in figure.files:
            assert (on_planted.folder / file).stat().st_size > 1000
    sinks = on_planted.result("sinks-planted-looker")
    assert sinks["is_sink"].dims == ("prompt", "layer", "position")
    assert on_planted.result("hiding-planted-looker")["hidden"].sizes["prompt"] >= 5


def test_without_the_plant_nothing_is_supported(tmp_path):
    outcome = result("looker", tmp_path, figure=["spectrum", "hiding"])
    found = verdicts(outcome)
    assert {c.verdict for c in found} == {"not testable"}
    for claim in found[:INHERITED]:
        assert claim.reason.startswith("no residual coordinate of looker is massive")
    drawn = {f.name: bool(f.files) for f in outcome.figures}
    assert drawn == {"spectrum": True, "hiding": False}


@pytest.mark.parametrize("architecture, reason", [
    ("llama", "llama is a text model: it has no image tokens"),
    ("bert", "bert is a text model: it has no image tokens"),
    ("llava", "llava has no image processor here, so pictures cannot be given to it"),
    ("qwen2_5_vl", "qwen2_5_vl has no image processor here, so pictures cannot be given to it"),
])
def test_an_unfit_model_is_refused_claim_by_claim(tiny, tmp_path, architecture, reason):
    tiny(architecture).save_pretrained(tmp_path / architecture)
    outcome = result(tmp_path / architecture, tmp_path / "out")
    assert {c.reason for c in verdicts(outcome)} == {reason}
    assert {(f.reason, f.files) for f in outcome.figures} == {(reason, ())}


def test_scenes_become_cases_whose_answer_and_pictures_are_known():
    model = interp.open_model("looker")
    for case in experiment.cases(model, 5, Settings.of().rng(1)):
        assert model.tokenizer.decode([case.answer]).strip() == case.question.answer.split()[0]
        assert case.question in scenes.questions(
            case.scene, Settings.of().rng(0), tasks=experiment.TASKS) or case.question.text
        places = experiment._object(case)
        assert set(places) <= set(case.prompt.positions("image"))
        assert bool(places) == bool(case.question.boxes)


@pytest.fixture(scope="module")
def spelling(tiny, letters):
    """A tiny random LLaVA with a processor."""
    processor = LlavaProcessor(
        CLIPImageProcessorPil(size={"shortest_edge": 24}, crop_size={"height": 24, "width": 24}),
        copy.deepcopy(letters), patch_size=8, vision_feature_select_strategy="default",
        num_additional_image_tokens=1, chat_template=LLAVA_TEMPLATE)
    return Model(tiny("llava"), "spelling", processor.tokenizer, processor)


def forced(monkeypatch, model, dims, tau):
    """Let a model pass as one with sink dimensions, so that a claim has something to look at."""
    monkeypatch.setattr(experiment.interp, "open_model", lambda name, **_: model)
    find, measure = experiment.visual.find_sink_dims, experiment.visual.measure

    def found(*args, **more):
        made = find(*args, **{**more, "min_ratio": 0.0})
        kept = experiment.visual.SinkDims(dims, (1,) * len(dims), (0.1,) * len(dims),
                                          (1.0,) * len(dims), (1,) * len(dims))
        return type(made)(kept, made.anchor, made.anchor_is_top, made.gate, made.null, tau,
                          made.min_ratio)

    monkeypatch.setattr(experiment.visual, "find_sink_dims", found)
    monkeypatch.setattr(experiment.visual, "measure",
                        lambda m, p, d, *_: measure(m, p, d, tau))


@pytest.mark.parametrize("tau, reasons", [
    # Of three blocks layer 2 is the last, from which nothing is redistributed.
    (1e-3, {8: "spelling has no sinks between layer 2 and its last, 2", 3: "spelling answers only",
           5: "every image token of spelling is a visual sink"}),
    (2.2, {i: "of 6 pictures have an image token with phi above 2.2" for i in range(1, INHERITED)}),
    (99.0, {i: "only 0 of 6 pictures have an image token" for i in range(1, INHERITED)}),
])
def test_every_claim_has_a_verdict_also_where_sinks_are_everywhere_or_nowhere(
    spelling, monkeypatch, tmp_path, tau, reasons
):
    forced(monkeypatch, spelling, (7, 30), tau)
    found = verdicts(result("spelling", tmp_path, figure=["birth"]))
    assert found[DIMENSIONS].verdict != "supported"
    for index, reason in reasons.items():
        assert reason in found[index].reason, found[index]
