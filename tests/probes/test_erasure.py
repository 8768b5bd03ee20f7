"""After erasure no linear probe reads the concept, on held-out samples; controls keep it."""

import numpy as np
import pytest
import torch
from sklearn.metrics import roc_auc_score
from sklearn.utils.estimator_checks import parametrize_with_checks

from probes import erasure, linear


@parametrize_with_checks([erasure.Leace(), erasure.Inlp(rounds=2), erasure.RandomProjection(),
                         erasure.KnownDirections()])
def test_scikit_learn_s_contract(estimator, check):
    check(estimator)


def data(seed=0, n=1200, d=24, classes=2, strength=1.0):
    rng = np.random.default_rng(seed)
    y = rng.permutation(np.arange(n) % classes)
    mixing = rng.standard_normal((d, d)) / np.sqrt(d)
    centers = strength * rng.standard_normal((classes, d))
    return (rng.standard_normal((n, d)) + centers[y]) @ mixing, y


@pytest.mark.parametrize("classes", [2, 3])
def test_leace_leaves_nothing_to_a_linear_probe_on_held_out_samples(classes):
    X, y = data(classes=classes, n=6000)
    train, test = slice(0, 3000), slice(3000, None)
    before = linear.logistic().fit(X[train], y[train]).score(X[test], y[test])
    eraser = erasure.Leace().fit(X[train], y[train])
    clean = eraser.transform(X)
    probe = linear.logistic().fit(clean[train], y[train])
    after = probe.score(clean[test], y[test])
    assert before > 0.9 and abs(after - 1 / classes) < 0.04
    if classes == 2:
        assert 0.45 <= roc_auc_score(y[test], probe.decision_function(clean[test])) <= 0.55
    assert eraser.rank_ == classes - 1
    assert np.abs(np.cov(clean[train].T, y[train])[-1, :-1]).max() < 1e-10
    # As many random directions leave it readable.
    random = erasure.RandomProjection(rank=eraser.rank_).fit(X[train]).transform(X)
    assert linear.logistic().fit(random[train], y[train]).score(random[test], y[test]) > before - 0.05


def test_leace_is_the_smallest_change_and_changes_nothing_twice():
    X, y = data()
    eraser = erasure.Leace().fit(X, y)
    clean = eraser.transform(X)
    assert np.allclose(eraser.transform(clean), clean)
    # A projection along the probe's direction that also makes the covariance vanish changes more.
    gap = X[y == 1].mean(0) - X[y == 0].mean(0)
    other = X - (X - X.mean(0)) @ np.outer(gap, gap) / (gap @ gap)
    assert np.abs(np.cov(other.T, y)[-1, :-1]).max() < 1e-10
    assert erasure.relative_change(X, clean) < erasure.relative_change(X, other)


@pytest.mark.parametrize("classes", [2, 4])
def test_leace_equals_the_released_package(classes):
    concept_erasure = pytest.importorskip("concept_erasure")
    X, y = data(classes=classes, strength=2.0)
    hot = torch.nn.functional.one_hot(torch.as_tensor(y), classes).double()
    fitter = concept_erasure.LeaceFitter(X.shape[1], classes, dtype=torch.float64, shrinkage=False,
                                         constrain_cov_trace=False, svd_tol=1e-6)
    theirs = fitter.update(torch.as_tensor(X), hot).eraser(torch.as_tensor(X)).numpy()
    ours = erasure.Leace().fit_transform(X, y)
    # They divide covariances by n - 1, which changes neither whitening nor projection.
    assert np.allclose(ours, theirs, atol=1e-5)


def test_classes_as_one_number_would_stay_readable():
    X, y = data(classes=3, n=6000)
    wrong = erasure.Leace().fit(X, y[:, None].astype(float))
    left = wrong.transform(X)
    assert linear.logistic().fit(left[:3000], y[:3000]).score(left[3000:], y[3000:]) > 0.45


def test_inlp_projects_probes_out_until_chance():
    X, y = data(n=3000, strength=0.5)
    before = linear.logistic().fit(X[:1500], y[:1500]).score(X[1500:], y[1500:])
    eraser = erasure.Inlp(rounds=24).fit(X[:1500], y[:1500])
    clean = eraser.transform(X)
    after = linear.logistic().fit(clean[:1500], y[:1500]).score(clean[1500:], y[1500:])
    assert before > 0.8 and after < 0.58 and eraser.rank_ >= 1
    assert np.allclose(eraser.projection_ @ eraser.projection_, eraser.projection_)
    # LEACE changes less for the same.
    assert erasure.relative_change(X, erasure.Leace().fit_transform(X, y)) <= erasure.relative_change(
        X, clean) + 1e-9


def test_steering_moves_states_to_the_other_side_and_its_control_does_not():
    X, y = data(strength=0.3)
    probe = linear.logistic().fit(X, y)
    way = erasure.steering(probe, 8.0)
    moved = (probe.predict(X[y == 0] + way) == 1).mean()
    controls = [(probe.predict(X[y == 0] + erasure.steering(probe, 8.0, control_seed=s)) == 1).mean()
                for s in range(20)]
    assert moved > 0.95 > 0.8 > np.mean(controls)


def test_bad_input_is_one_sentence():
    X, y = data(n=60)
    with pytest.raises(ValueError, match="one class only"):
        erasure.Leace().fit(X, np.zeros(60, int))
    with pytest.raises(ValueError, match="59 labels for 60 samples"):
        erasure.Leace().fit(X, y[1:])
    with pytest.raises(ValueError, match="30 directions cannot be removed from 24 dimensions"):
        erasure.RandomProjection(rank=30).fit(X)
    three = linear.logistic().fit(X, np.arange(60) % 3)
    with pytest.raises(ValueError, match="3 classes has no one direction"):
        erasure.steering(three, 1.0)
