"""Object tokens on looker, on its untrained twin, on random models and where there is no picture."""

import numpy as np
import pytest
from typer.testing import CliRunner

import interp
from experiments import _visual_flow as flow
from experiments import visual_information as experiment
from experiments.__main__ import app
from experiments._output import execute
from experiments._paper import Settings, load
from interp.organisms import looker
from interp.prompts import scenes
from tests.experiments.test_any_model import saved

NAMES = {sentence: key for key, (sentence, _) in experiment.CLAIMS.items()}


def result(name, out, **more):
    outcome = execute(load("visual_information"), Settings.of(
        model=[str(name)], out=out, tiny=True, **more))
    found = {NAMES[claim.sentence]: claim for claim in outcome.claims}
    assert found.keys() == experiment.CLAIMS.keys() and len(found) == len(outcome.claims)
    return outcome, found


def test_looker_keeps_objects_in_their_tokens(tmp_path):
    outcome, found = result("looker", tmp_path, figure=["windows"])
    assert found["object"].verdict == "supported" and found["substitution"].verdict == "supported"
    assert found["object"].causal and "the strongest of three" in found["object"].control
    assert found["polling"].verdict == "supported" and found["row"].verdict == "supported"
    for key in ("relation", "subject", "shown", "crossing", "patching"):
        assert found[key].verdict == "not testable"
    assert found["shown"].reason == "looker's language holds no facts beyond the picture"
    assert {f.name for f in outcome.figures if f.files} == {"windows"}
    for figure in outcome.figures:
        for file in figure.files:
            assert (outcome.folder / file).stat().st_size > 1000
    for claim in outcome.claims:
        assert "unverified" != claim.paper_tag and (claim.reason or claim.measured is not None)


def test_an_untrained_twin_has_nothing_to_lose(tmp_path):
    bare = looker.build(0)
    bare.save_pretrained(tmp_path / "untrained")
    looker.export(bare, tmp_path / "untrained")
    outcome, found = result(tmp_path / "untrained", tmp_path / "out")
    assert {claim.verdict for claim in found.values()} == {"not testable"}
    assert "there is nothing to lose" in found["object"].reason
    assert all(f.reason for f in outcome.figures)


@pytest.mark.parametrize("architecture", ["llava", "qwen2_5_vl"])
def test_nothing_is_supported_on_a_random_model(tiny, letters, tmp_path, architecture):
    folder = saved(tiny, architecture, tmp_path / architecture, letters)
    _, found = result(folder, tmp_path / "out", figure=["ablation"])
    assert not [key for key, claim in found.items() if claim.verdict == "supported"]


def test_a_text_model_and_an_unknown_one_get_one_sentence(tmp_path):
    _, found = result("reader", tmp_path)
    assert {claim.reason for claim in found.values()} == {
        "reader is a text model: it has no image tokens"}
    done = CliRunner().invoke(app, ["run", "visual_information", "--tiny", "--model",
                                    str(tmp_path / "nowhere"), "--out", str(tmp_path / "out")])
    assert done.exit_code == 1 and "Traceback" not in done.output
    assert len([line for line in done.output.splitlines() if "nowhere" in line]) == 1


def test_windows_are_those_of_the_paper_to_within_a_layer():
    paper = {"early": (0, 9), "early to middle": (5, 14), "middle": (11, 20),
             "middle to late": (15, 24), "late": (21, 31), "all": (0, 31)}
    for name, span in flow.bands(32).items():
        assert abs(span.start - paper[name][0]) <= 1 and abs(span.stop - 1 - paper[name][1]) <= 1
    for n in range(1, 40):
        assert all(len(span) and span.stop <= n for span in flow.bands(n).values())


def test_depth_and_share_of_layers_are_those_of_the_loss():
    rng = np.random.default_rng(0)
    for n in (2, 7, 32):
        where = int(rng.integers(n))
        loss = np.zeros((5, n))
        loss[:, where] = rng.uniform(0.1, 1, 5)
        assert flow.depth(loss, range(n), n) == pytest.approx(where / (n - 1))
        assert flow.needed(loss) == pytest.approx(1 / n)
    assert flow.needed(np.ones((3, 20))) == pytest.approx(0.9)
    nothing = np.zeros((2, 4))
    assert np.isnan(flow.depth(nothing, range(4), 4)) and np.isnan(flow.needed(nothing))


def test_what_is_shown_is_what_is_asked_for():
    model = interp.open_model("looker")
    for one in flow.shown(model, 6, np.random.default_rng(0)):
        assert set(one.object) <= set(one.near) <= set(one.wide) <= set(one.image.positions)
        color, shape = one.name.split()
        assert color in scenes.COLORS and shape in scenes.SHAPES
        assert model.tokenizer.decode(list(one.asked.answer)).strip() in (color, shape)
        said = set(model.tokenizer.convert_ids_to_tokens(list(one.words)))
        assert said == {color, shape} and not said & set(
            model.tokenizer.convert_ids_to_tokens(list(one.absent)))
        # The picture is bright where the object is, and its cell is the one that is named.
        box = one.image.boxes[one.image.positions.index(one.object[0])]
        left, top, right, bottom = (int(v) for v in box)
        assert np.asarray(one.asked.picture)[top:bottom, left:right].max() > 150
