"""Calibration: exact bins, a calibrated probe at its expected error, an overconfident one above."""

import numpy as np
import pytest
from matplotlib import pyplot as plt
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import brier_score_loss

from probes import calibration, linear


def test_the_numbers_are_those_of_a_naive_loop():
    rng = np.random.default_rng(0)
    p, y = rng.random(203), rng.integers(2, size=203)
    found = calibration.reliability(p, y)
    order, total, sizes = np.argsort(p), 0.0, []
    for part in np.array_split(order, 15):
        sizes.append(len(part))
        total += abs(sum(p[i] for i in part) - sum(y[i] for i in part))
    assert float(found["ece"]) == pytest.approx(total / 203)
    assert found["count"].values.tolist() == sizes and max(sizes) - min(sizes) <= 1
    assert float(found["brier"]) == pytest.approx(brier_score_loss(y, p))
    # Several classes: confidence of the likeliest class, and whether it is right.
    q = rng.dirichlet(np.ones(3), 90)
    z = rng.integers(3, size=90)
    several = calibration.reliability(q, z, bins=4)
    assert float(several["accuracy"] @ several["count"]) / 90 == pytest.approx((q.argmax(1) == z).mean())
    assert float(several["brier"]) == pytest.approx(((q - np.eye(3)[z]) ** 2).sum(1).mean())


def test_a_calibrated_probe_has_its_expected_error_and_an_overconfident_one_more():
    rng = np.random.default_rng(1)
    excess = []
    for _ in range(20):
        p = rng.random(300)
        y = (rng.random(300) < p).astype(int)
        excess.append(float(calibration.reliability(p, y, draws=50)["ece"])
                      - float(calibration.reliability(p, y, draws=50)["expected_error"].mean()))
    assert abs(np.mean(excess)) < 0.01
    p = rng.random(2000)
    y = (rng.random(2000) < p).astype(int)
    sure = np.where(p > 0.5, 0.99, 0.01) + rng.uniform(-0.005, 0.005, 2000)
    found = calibration.reliability(sure, y, draws=50)
    assert float(found["debiased"]) > 0.15 and float(found["ece"]) > float(found["expected_error"].max())


def test_calibrating_on_grouped_folds_mends_an_overconfident_probe():
    """More dimensions than samples can bear, noise labels in part: the plain probe is too sure."""
    rng = np.random.default_rng(2)
    groups = np.repeat(np.arange(80), 4)
    y = rng.integers(2, size=320)
    X = rng.standard_normal((320, 60))
    X[:, 0] += 0.8 * y
    probe = linear.logistic(C=1e3)
    plain = calibration.predicted(probe, X, y, groups=groups)
    mended = calibration.predicted(probe, X, y, groups=groups, calibrate="sigmoid")
    before, after = (calibration.reliability(p[:, 1], y, draws=20) for p in (plain, mended))
    assert float(after["debiased"]) < 0.5 * float(before["debiased"])
    assert float(after["brier"]) < float(before["brier"])
    # Every split of a calibrated probe keeps groups whole.
    made = calibration.calibrated(y, groups=groups, estimator=LogisticRegression())
    assert all(not set(groups[a]) & set(groups[b]) for a, b in made.cv)
    assert sorted(np.concatenate([b for _, b in made.cv])) == list(range(320))


def test_the_figure_and_bad_input():
    rng = np.random.default_rng(0)
    p, y = rng.random(40), rng.integers(2, size=40)
    ax = calibration.draw(calibration.reliability(p, y, bins=5, draws=5), plt.subplots()[1])
    assert ax.get_xlabel() == "confidence" and len(ax.lines[1].get_xdata()) == 5
    plt.close("all")
    with pytest.raises(ValueError, match="numbers from 0 to 1"):
        calibration.reliability(p + 1, y)
    with pytest.raises(ValueError, match="class numbers from 0 to 1"):
        calibration.reliability(p, y + 1)
    with pytest.raises(ValueError, match="give one label per sample"):
        calibration.reliability(p, y[1:])
    with pytest.raises(ValueError, match="same label"):
        calibration.calibrated(np.zeros(20, int), groups=None)
    lonely = np.r_[np.ones(5, int), np.zeros(20, int)]
    with pytest.raises(ValueError, match="is missing in the training part"):
        calibration.calibrated(lonely, groups=np.repeat(np.arange(5), 5))
