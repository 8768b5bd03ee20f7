"""Overlaps against their exact null, corrected p values, depths: planted agreement and its control."""

import itertools

import numpy as np
import pytest
import xarray as xr
from scipy import stats

from interp.core import Head, HeadScores, OutOfRange, Result
from interp.heads import taxonomy
from interp.heads.taxonomy import Detector, detector, overlap

LAYERS, HEADS = 5, 7


def scores(values, **more):
    return HeadScores.of(np.asarray(values, dtype=float), **more)


def random_scores(seed):
    return scores(np.random.default_rng(seed).random((LAYERS, HEADS)))


def test_the_null_is_the_hypergeometric_law():
    one, two = [(0, 0), (1, 2), (3, 3), (4, 6)], [(0, 0), (1, 2), (2, 2)]
    found = overlap(one, two, [HEADS] * LAYERS, layer_matched=False)
    law = stats.hypergeom(LAYERS * HEADS, 4, 3)
    assert found["shared"] == 2 and found["jaccard"] == 2 / 5
    assert found["expected"] == pytest.approx(law.mean())
    assert found["p"] == pytest.approx(law.sf(1))


def test_the_layer_matched_null_is_that_of_all_arrangements():
    eligible, one, two = [4, 3], [(0, 0), (0, 1), (1, 0)], [(0, 1), (0, 2), (1, 2)]
    shared = []
    for a in itertools.combinations(range(4), 2):
        for b in range(3):
            shared.append(len({(0, x) for x in a} & set(two)) + ((1, b) in two))
    found = overlap(one, two, eligible)
    assert found["expected"] == pytest.approx(np.mean(shared))
    assert found["p"] == pytest.approx(np.mean(np.array(shared) >= found["shared"]))
    assert found["expected_jaccard"] == pytest.approx(np.mean([k / (6 - k) for k in shared]))


def test_sets_that_only_share_layers_are_no_surprise_once_layers_are_matched():
    one, two = [(2, h) for h in range(5)], [(2, h) for h in range(2, 7)]
    plain = overlap(one, two, [HEADS] * LAYERS, layer_matched=False)
    matched = overlap(one, two, [HEADS] * LAYERS)
    assert plain["p"] < 0.02 and matched["p"] == 1.0 and matched["expected"] > 3
    with pytest.raises(OutOfRange, match="layer 2 has 4 eligible heads"):
        overlap(one, two, [4] * LAYERS)


def test_p_values_of_random_sets_are_fair():
    rng = np.random.default_rng(0)
    every = [(i, j) for i in range(LAYERS) for j in range(HEADS)]
    p = []
    for _ in range(300):
        a, b = (rng.permutation(len(every))[:8] for _ in range(2))
        p.append(overlap([every[i] for i in a], [every[i] for i in b], [HEADS] * LAYERS)["p"])
    p = np.array(p)
    for level in (0.05, 0.2, 0.5):
        assert (p <= level).mean() <= level + 2.5 * np.sqrt(level * (1 - level) / 300)
    assert p.mean() < 0.9


def test_planted_agreement_is_found_among_random_detectors():
    base = random_scores(1)
    near = scores(base.scores.values + 0.01 * np.random.default_rng(2).random((LAYERS, HEADS)))
    table = taxonomy.overlaps({
        "a": detector(base, top=6), "b": detector(near, top=6),
        "c": detector(random_scores(3), top=6), "d": detector(random_scores(4), top=6)})
    assert len(table) == 6
    close = table.set_index(["first", "second"])
    assert close.loc[("a", "b"), "jaccard"] > 0.7 and close.loc[("a", "b"), "p_adjusted"] < 0.01
    others = close.drop(("a", "b"))
    assert (others["p_adjusted"] > 0.05).all()
    assert (table["p_adjusted"] >= table["p"] - 1e-12).all()


def test_heads_that_a_detector_could_not_find_do_not_count():
    eligible = np.ones((LAYERS, HEADS), dtype=bool)
    eligible[3:] = False
    base = np.random.default_rng(5).random((LAYERS, HEADS))
    limited = scores(base, eligible=eligible)
    table = taxonomy.overlaps({"a": detector(limited, top=4), "b": detector(scores(base), top=12)})
    assert detector(limited, top=4).found == tuple(sorted(
        h for h in limited.top(4) if h.layer < 3))
    in_sight = [h for h in scores(base).top(12) if h.layer < 3]
    want = overlap(limited.top(4), in_sight, [HEADS] * 3 + [0, 0])
    assert table["p"].item() == pytest.approx(want["p"])


def test_the_matrix_says_p_against_the_null_and_corrects_it():
    values = np.full((LAYERS, HEADS), 0.2)
    values[1, 4] = 0.9
    eligible = np.ones((LAYERS, HEADS), dtype=bool)
    eligible[4] = False
    result = Result(xr.Dataset({
        "score": (("layer", "head"), values),
        "null": (("layer", "head"), np.full((LAYERS, HEADS), 0.2)),
        "standard_error": (("layer", "head"), np.full((LAYERS, HEADS), 0.1)),
        "eligible": (("layer", "head"), eligible),
    }, {"layer": range(LAYERS), "head": range(HEADS)}))
    table = taxonomy.matrix({"retrieval head": detector(result, "retrieval head", above=0.5)})
    row = table[table["head"] == "L1H4"].iloc[0]
    assert row["found"] and row["p"] == pytest.approx(stats.norm.sf(7))
    assert row["p_adjusted"] == pytest.approx(28 * row["p"])
    assert row["stage"] == "in-context identification"
    rest = table[table["head"] != "L1H4"]
    assert not rest["found"].any() and (rest.loc[rest["eligible"], "p_adjusted"] > 0.4).all()
    assert table.loc[table["layer"] == 4, "p"].isna().all() and table["effect"].isna().all()


def test_depths_are_relative_and_the_picture_has_a_row_per_detector():
    from interp.figures.style import canvas

    deep = Detector(random_scores(1), (Head(4, 0), Head(3, 1)), stage="expression preparation")
    shallow = Detector(random_scores(1), (Head(0, 0),), stage="knowledge recalling")
    table = taxonomy.depths({"deep": deep, "shallow": shallow})
    assert table.groupby("detector")["depth"].mean().to_dict() == {"deep": 0.875, "shallow": 0.0}
    figure, ax = canvas()
    taxonomy.draw({"deep": deep, "shallow": shallow}, ax)
    assert [label.get_text() for label in ax.get_yticklabels()] == ["shallow", "deep"]


def test_bad_detectors_are_refused():
    with pytest.raises(ValueError, match="either top=10 or above"):
        detector(random_scores(0))
    with pytest.raises(ValueError, match="not about one model"):
        taxonomy.matrix({"a": detector(random_scores(0), top=1),
                         "b": detector(scores(np.ones((2, 3))), top=1)})
    with pytest.raises(OutOfRange):
        taxonomy.depths({"a": Detector(scores(np.ones((2, 3))), (Head(7, 0),))})


def test_every_kind_has_one_stage():
    kinds = [kind for kinds in taxonomy.STAGES.values() for kind in kinds]
    assert len(kinds) == len(set(kinds)) and len(taxonomy.STAGES) == 4
    assert all(taxonomy.stage_of(kind) for kind in kinds) and taxonomy.stage_of("visual") == ""
