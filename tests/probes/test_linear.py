"""Linear probes: scikit-learn's contract, exact solutions, directions in the states' own space."""

import numpy as np
import pytest
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import cross_val_score
from sklearn.neighbors import NearestCentroid
from sklearn.utils.estimator_checks import parametrize_with_checks

from probes import linear


@parametrize_with_checks([linear.DifferenceOfMeans()])
def test_scikit_learn_s_contract(estimator, check):
    check(estimator)


def data(seed=0, n=120, d=9, classes=2, strength=1.0):
    rng = np.random.default_rng(seed)
    y = rng.integers(classes, size=n)
    centers = rng.standard_normal((classes, d))
    X = rng.standard_normal((n, d)) * rng.uniform(0.1, 5, d)
    return X + strength * centers[y], y


@pytest.mark.parametrize("classes", [2, 4])
def test_all_layers_at_once_equal_scikit_learn(classes):
    y = data(classes=classes)[1]
    rng = np.random.default_rng(1)
    X = np.stack([data(seed, classes=classes)[0] + 0.5 * y[:, None] * rng.standard_normal(9)
                  for seed in range(5)])
    X[2, :, 3] = 7.0  # a constant coordinate
    for C in (0.03, 1.0):
        for states, found in zip(X, linear.fit_layers(X, y, C)):
            expected = linear.logistic(C, tol=1e-10).fit(states, y)
            assert np.allclose(found[-1].coef_, expected[-1].coef_, atol=1e-5)
            assert np.allclose(found[-1].intercept_, expected[-1].intercept_, atol=1e-5)
            assert np.allclose(found.predict_proba(states), expected.predict_proba(states), atol=1e-5)


def test_many_targets_at_once_are_many_fits():
    rng = np.random.default_rng(7)
    X = rng.standard_normal((3, 60, 5)) * np.array([1.0, 4.0, 0.2])[:, None, None]
    y = rng.integers(2, size=(4, 60))
    y[2] = np.where(X[1, :, 3] > 0, 7, -1)  # other names for the classes, and one that is easy
    found = linear.fit_targets(X, y, 0.3)
    assert [len(row) for row in found] == [3, 3, 3, 3]
    for labels, row in zip(y, found):
        for states, probe in zip(X, row):
            expected = linear.logistic(0.3, tol=1e-10).fit(states, labels)
            assert np.allclose(probe.predict_proba(states), expected.predict_proba(states), atol=1e-5)
            assert (probe.predict(states) == expected.predict(states)).all()
    # A rule is found where it was planted, in one layer of one target, and noise is not.
    assert found[2][1].score(X[1], y[2]) > 0.9 > found[0][1].score(X[1], y[0])
    with pytest.raises(ValueError, match="target 1 has 3 classes"):
        linear.fit_targets(X, [y[0], np.arange(60) % 3])


def test_difference_of_means_is_the_nearest_mean():
    for classes in (2, 3, 5):
        X, y = data(classes=classes)
        found = linear.DifferenceOfMeans().fit(X, y)
        assert (found.predict(X) == NearestCentroid().fit(X, y).predict(X)).all()


def test_directions_order_samples_as_the_probe_does():
    X, y = data(strength=2.0)
    for probe in (linear.logistic(), linear.ridge(), linear.k_sparse(3), linear.DifferenceOfMeans()):
        probe.fit(X, y)
        way = linear.direction(probe)
        assert way.shape == (1, 9) and np.linalg.norm(way) == pytest.approx(1)
        projected, decided = X @ way[0], probe.decision_function(X)
        assert np.corrcoef(projected, decided)[0, 1] == pytest.approx(1)
    kept = linear.direction(linear.k_sparse(3).fit(X, y))[0] != 0
    assert kept.sum() == 3
    with pytest.raises(TypeError, match="KNeighborsClassifier has no coef_"):
        from sklearn.neighbors import KNeighborsClassifier
        linear.direction(KNeighborsClassifier().fit(X, y))


def test_choosing_coordinates_is_inside_the_pipeline():
    """Noise with many coordinates: choosing them before splitting would find a signal."""
    rng = np.random.default_rng(0)
    X, y = rng.standard_normal((60, 2000)), np.arange(60) % 2
    inside = cross_val_score(linear.k_sparse(20), X, y, cv=5).mean()
    best = np.argsort(linear.mean_difference(X, y))[-20:]
    outside = cross_val_score(LogisticRegression(), X[:, best], y, cv=5).mean()
    assert inside < 0.65 < 0.85 < outside


def test_bad_input_is_one_sentence():
    X, y = data()
    with pytest.raises(ValueError, match="one class only"):
        linear.DifferenceOfMeans().fit(X, np.zeros(len(y)))
    with pytest.raises(ValueError, match=r"120 labels of 1 class\(es\) for 120 samples"):
        linear.fit_layers(X[None], np.zeros(len(y)))
    broken = X.copy()
    broken[3, 2] = np.nan
    with pytest.raises(ValueError, match="with values that are not numbers"):
        linear.fit_layers(broken[None], y)
