"""Transfer: shared directions transfer and others do not; three directions agree where they must."""

import numpy as np
import pytest
from matplotlib import pyplot as plt
from sklearn.discriminant_analysis import LinearDiscriminantAnalysis
from sklearn.metrics import roc_auc_score

from probes import linear, transfer
from probes.transfer import Labelled

QUICK = dict(permutations=60, resamples=100)


def made(seed, way, n=160, d=10, groups=True):
    rng = np.random.default_rng(seed)
    y = rng.permutation(np.arange(n) % 2)
    X = rng.standard_normal((n, d))
    X[:, way] += 2 * y
    return Labelled(X, y, [f"{seed}-{i // 2}" for i in range(n)] if groups else None)


def test_a_shared_direction_transfers_and_another_one_does_not():
    data = {"first": made(0, 3), "second": made(1, 3), "other": made(2, 7)}
    found = transfer.transfer(data, **QUICK)
    for way in found["estimator"].values:
        score, p = found["score"].sel(estimator=way), found["p"].sel(estimator=way)
        for a in data:
            for b in data:
                alike = a == b or "other" not in (a, b)
                one = score.sel(train=a, test=b)
                assert float(one) > 0.85 if alike else abs(float(one) - 0.5) < 0.15
                assert (float(p.sel(train=a, test=b)) <= 0.05) == alike
    assert bool(((found["low"] <= found["score"]) & (found["score"] <= found["high"])).all())


def test_the_diagonal_is_grouped_cross_validation():
    one = made(0, 3, n=60)
    found = transfer.transfer({"a": one}, {"lda": LinearDiscriminantAnalysis()}, **QUICK)
    fold = transfer._folds([(one.states, one.labels, np.asarray(one.groups))], 5, 0)[0]
    each = []
    for f in range(5):
        train, test = fold != f, fold == f
        assert not set(np.array(one.groups)[train]) & set(np.array(one.groups)[test])
        probe = LinearDiscriminantAnalysis().fit(one.states[train], one.labels[train])
        each.append(roc_auc_score(one.labels[test], probe.decision_function(one.states[test])))
    assert float(found["score"][0, 0, 0]) == pytest.approx(np.mean(each))


def test_groups_that_two_data_sets_share_do_not_leak():
    """States that only say which entity it is: in two data sets alike, labels by entity."""
    gaps = []
    for seed in range(4):
        rng = np.random.default_rng(seed)
        entity = np.repeat(np.arange(40), 4)
        who = rng.standard_normal((40, 50)) * 3
        y = rng.permutation(np.arange(40) % 2)[entity]
        sets = [who[entity] + 0.1 * rng.standard_normal((160, 50)) for _ in range(2)]
        kept, loose = (transfer.transfer(
            {name: Labelled(X, y, groups) for name, X in zip("ab", sets)},
            {"means": linear.DifferenceOfMeans()}, permutations=19, resamples=2)
            for groups in (entity, None))
        assert float(loose["score"].min()) > 0.8
        gaps.append(float(kept["score"].sel(train="a", test="b")[0]) - 0.5)
    assert abs(np.mean(gaps)) < 0.12


def test_noise_is_seldom_significant_in_any_cell():
    hits = 0
    for seed in range(40):
        rng = np.random.default_rng(seed)
        data = {name: Labelled(rng.standard_normal((40, 5)), np.arange(40) % 2, None) for name in "ab"}
        found = transfer.transfer(data, {"means": linear.DifferenceOfMeans()}, folds=4,
                                  permutations=39, resamples=2)
        hits += float(found["p"].min()) <= 0.05
    assert hits <= 6  # 2 of 40 are expected; more than 6 happens in 1 of 300 such tests.


def test_three_directions_agree_on_spheres_and_cosines_undo_the_scaler():
    rng = np.random.default_rng(0)
    y = np.arange(4000) % 2
    X = rng.standard_normal((4000, 6)) * np.array([1, 1, 30, 1, 0.1, 1])
    X[:, 1] += 1.5 * y
    found = transfer.directions(X, y)
    assert np.allclose(np.linalg.norm(found["direction"], axis=1), 1)
    # The way of the shift, for all that take the spread into account.
    learned = found["direction"].sel(estimator=["logistic", "discriminant"])
    assert float(abs(learned[:, 1]).min()) > 0.9
    # A huge coordinate takes over a difference of means, and with it the cosine.
    assert float(found["cosine"].sel(estimator="difference of means", other="logistic")) < 0.95
    assert float(found["agreement"].sel(estimator="discriminant", other="logistic")) > 0.98
    plain = transfer.directions(X / np.array([1, 1, 30, 1, 0.1, 1]), y)
    assert float(plain["cosine"].min()) > 0.97 and float(plain["agreement"].min()) > 0.97


def test_three_classes_and_bad_input():
    rng = np.random.default_rng(0)
    y = np.arange(90) % 3
    X = rng.standard_normal((90, 5)) + 3 * np.eye(5)[y]
    data = {"a": Labelled(X, y, None), "b": Labelled(X[::-1], y[::-1], None)}
    found = transfer.transfer(data, **QUICK)
    assert found.manifest["metric"] == "balanced_accuracy"
    assert float(found["chance"]) == pytest.approx(1 / 3)
    assert float(found["score"].min()) > 0.8
    ax = transfer.draw(found, plt.subplots()[1], "logistic")
    assert "train" in ax.get_ylabel() and "test" in ax.get_xlabel()
    plt.close("all")
    with pytest.raises(ValueError, match="no data sets"):
        transfer.transfer({})
    with pytest.raises(ValueError, match="'b' has 1 of 3 classes"):
        transfer.transfer({"a": Labelled(X, y, None), "b": Labelled(X, 0 * y, None)})
    with pytest.raises(ValueError, match="different width"):
        transfer.transfer({"a": Labelled(X, y, None), "b": Labelled(X[:, 1:], y, None)})
    with pytest.raises(ValueError, match="NaN or infinity"):
        transfer.transfer({"a": Labelled(X * np.nan, y, None)})
    with pytest.raises(ValueError, match="two classes, not 3"):
        transfer.directions(X, y)
    with pytest.raises(ValueError, match="4 groups cannot be split into 5 folds"):
        transfer.transfer({"a": Labelled(X, y, np.arange(90) % 4)})
