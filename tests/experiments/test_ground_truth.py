"""What is counted, where a method fails, and the benchmark end to end on two cheap families."""

import json

import numpy as np
import pandas as pd
import pytest

from experiments import _ground_truth_table as table
from experiments import ground_truth
from experiments._ground_truth_beds import Bed
from experiments._ground_truth_families import FAMILIES
from experiments._output import execute
from experiments._paper import Settings, load
from interp.core import ModelRefused
from interp.models.model import Model

BY_KEY = {family.key: family for family in FAMILIES}


def test_counts_by_hand():
    truth = np.array([[False, False, True, True], [False] * 4, [False, True, True, False]])
    scores = np.array([[0.0, 0.0, 0.0, 9.0], [9.0, 0.0, 0.0, 0.0], [np.nan, 0.0, 0.0, 9.0]])
    got = table.judge("tokens", truth, scores, 1.0)
    # Row 0 is found one layer late, row 1 is false, row 2 is reported only where it is not.
    assert (got["planted"], got["hits"], got["false"], got["reports"]) == (2, 1, 2, 3)
    assert got["layer_error"] == 1.5  # one layer late in row 0, two in row 2
    heads = table.judge("heads", truth, scores + truth * 20, 1.0)
    assert (heads["planted"], heads["hits"], heads["false"]) == (4, 4, 2)
    assert heads["head_error"] == 0.0 and heads["layer_error"] == 0.0
    wrong = table.judge("heads", truth[:1], np.array([[0.0, 5.0, 2.0, 0.0]]), 1.0)
    assert wrong["head_error"] == 1.0 and wrong["layer_error"] == 1.0 and wrong["hits"] == 1
    early = table.judge("depth", truth[:1], np.array([[0.0, 1.0, 1.0, 1.0]]), 0.5)
    assert (early["hits"], early["false"], early["layer_error"]) == (0, 1, 1.0)
    exact = table.judge("depth", truth[:1], np.array([[0.0, 0.0, 1.0, 1.0]]), 0.5)
    assert (exact["hits"], exact["false"]) == (1, 0)
    layers = table.judge("layers", truth[:1], np.array([[0.0, 1.0, 1.0, 0.0]]), 0.5)
    assert (layers["planted"], layers["hits"], layers["false"], layers["layer_error"]) == (2, 1, 1, 1)
    nothing = table.judge("tokens", truth, np.full(truth.shape, np.nan), -1.0)
    assert nothing["reports"] == 0


def test_the_failing_strength_is_read_off_the_curve():
    at = (1.0, 2.0, 4.0, 8.0)
    assert table.failing(np.array([[0.0, 0.6, 1.0, 1.0]]), at) == pytest.approx(2 * 2**0.5)
    # Coming from obvious: a lucky recall at low strength does not count.
    assert table.failing(np.array([[1.0, 1.0, 0.0, 1.0]]), at) > 4
    assert table.failing(np.ones((2, 4)), at) == pytest.approx(0.5)
    assert table.failing(np.zeros((2, 4)), at) == pytest.approx(16.0)
    assert table.failing(np.array([[0, 0, 0, 1.0], [0, 1, 1, 1.0]]), at) == pytest.approx(
        4 * 2 ** 0.6)


class Fake:
    """The detector sees strengths above 1, the alternative is the strength plus a place's noise."""

    def __init__(self, noise):
        self.noise = noise

    def look(self, strength, decoy):
        truth = np.zeros((3, 2), dtype=bool)
        truth[1, 1] = True
        seen = np.where(truth, float(strength > 1), 0.0)
        loud = np.full(truth.shape, self.noise + 10.0 * decoy) + truth * strength
        return table.Look(truth, {"detector": seen, "loud": loud, "always": np.ones(truth.shape)})


def family():
    return table.Family(
        "fake", "fakes", "units", (1.0, 2.0, 4.0, 8.0),
        (table.Method("detector", 0.5, detector=True), table.Method("loud"),
         table.Method("always", 0.5)),
        "heads", "a fake", "a loud fake", lambda *_: iter(()))


def test_alternatives_get_the_threshold_of_the_other_places_twins():
    places = [Fake(noise) for noise in (0.0, 1.0, 3.0, 1.5, 0.5, 1.2)]
    rows = table.trials(family(), iter(places), (1.0, 2.0, 4.0, 8.0))
    limits = rows[rows["method"] == "loud"].groupby("place")["limit"].first().tolist()
    assert limits == [3.0, 3.0, 1.5, 3.0, 3.0, 3.0]  # place 2 never sees its own
    lines = pd.DataFrame(table.summary(family(), rows, (1.0, 2.0, 4.0, 8.0))).set_index("method")
    assert lines.loc["detector", ["recall", "precision", "false_in_twins", "false_in_decoys"]].tolist() \
        == [1.0, 1.0, 0.0, 0.0]
    assert 1.0 < lines.loc["detector", "fails_at"] < 2.0
    assert lines.loc["loud", "false_in_twins"] == pytest.approx(1 / 6)
    assert lines.loc["loud", "false_in_decoys"] == 1.0
    assert lines.loc["always", "false_in_twins"] == 1.0 and lines.loc["always", "precision"] < 0.2
    gain = table.sooner(rows, "detector", "loud", (1.0, 2.0, 4.0, 8.0))
    back = table.sooner(rows, "loud", "detector", (1.0, 2.0, 4.0, 8.0))
    assert gain.value > 0 and gain.value == pytest.approx(-back.value)


def one(key, seed=1):
    return next(BY_KEY[key].places(Bed(), np.random.default_rng(seed), 1))


@pytest.mark.parametrize("key", ["secondary", "retrieval", "image_centric"])
def test_an_obvious_plant_is_found_and_its_twin_and_decoy_are_not(key):
    place, method = one(key), BY_KEY[key].detector
    # The decoy is the twin, and something more.
    for strength, decoy in ((BY_KEY[key].strengths[-1], False), (0.0, True)):
        look = place.look(strength, decoy)
        got = table.judge(BY_KEY[key].items, look.truth, look.scores[method.name], method.limit)
        if strength:
            assert got["hits"] == got["planted"] > 0 and got["false"] == 0
            assert got["layer_error"] == 0
        else:
            assert got["reports"] == 0


@pytest.fixture(scope="module")
def outcome(tmp_path_factory):
    patch = pytest.MonkeyPatch()
    few = tuple(BY_KEY[key] for key in ("horizon", "feature"))
    patch.setattr(ground_truth, "FAMILIES", few)
    sentences = {key: text for f in few for key, text in ground_truth.claims_of(f).items()}
    patch.setattr(ground_truth.GroundTruth, "claims", {
        key: (text, ground_truth.SOURCE) for key, text in sentences.items()})
    try:
        yield execute(load("ground_truth"), Settings.of(
            tiny=True, out=tmp_path_factory.mktemp("truth"), figure=["table"]))
    finally:
        patch.undo()


def test_every_method_has_its_line_and_every_claim_its_verdict(outcome):
    lines = outcome.table("detectors")
    text = pd.read_csv(outcome.folder / "tables" / "detectors.csv")
    rows = json.loads((outcome.folder / "tables" / "detectors.json").read_text())
    assert len(lines) == len(text) == len(rows) == 8
    for key in ("horizon", "feature"):
        mine = lines[lines["family"] == key]
        assert (mine["kind"] == "alternative").sum() >= 2 and (mine["kind"] == "detector").any()
        claims = [c for c in outcome.claims if BY_KEY[key].title in c.sentence]
        assert len(claims) == 5 + len(BY_KEY[key].alternatives)
    # Of one place nothing can be concluded about failing strengths; nothing is made up.
    beats = [c for c in outcome.claims if "lower strengths" in c.sentence]
    assert beats and all(c.verdict == "inconclusive" for c in beats)
    assert [f.name for f in outcome.figures] == ["table"] and outcome.figures[0].png
    obvious = lines[lines["kind"] == "detector"].set_index("method")["recall"]
    assert obvious["flow.horizon, H_info"] == 1.0 and obvious["probes.sweep"] > 0.9


def test_models_that_cannot_be_planted_in_say_why(tiny):
    rng = np.random.default_rng(0)
    text = Bed(Model(tiny("llama"), "some-llama"))
    for key in ("visual", "image_centric", "horizon"):
        with pytest.raises(ModelRefused, match="is no LLaVA with a projector"):
            next(BY_KEY[key].places(text, rng, 1))
    with pytest.raises(ModelRefused, match="normalized here"):
        next(BY_KEY["retrieval"].places(Bed(Model(tiny("qwen3"), "q")), rng, 1))
    with pytest.raises(ModelRefused, match="is an encoder"):
        next(BY_KEY["secondary"].places(Bed(Model(tiny("bert"), "b")), rng, 1))
