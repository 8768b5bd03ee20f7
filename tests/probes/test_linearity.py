"""Linearity on clouds whose linearity is known."""

import numpy as np
import pytest
from matplotlib import pyplot as plt

from probes import linearity


def cloud(seed=0, n=900, d=12):
    return np.random.default_rng(seed).standard_normal((n, d))


def test_a_linear_map_scores_one_also_shifted_and_scaled():
    X, A = cloud(), cloud(1, 12, 12)
    test = np.arange(900) % 3 == 0
    for Y in (X @ A, 5 - 3 * (X @ A)):
        assert linearity.score(X, Y) == pytest.approx(1) == linearity.score(X, Y, test=test)
    assert linearity.score(X + 7, X @ A, test=test) == pytest.approx(1)


@pytest.mark.parametrize("n", [24, 48, 192])
def test_independent_clouds_look_linear_in_sample_only(n):
    """In sample d/n, whatever the clouds; held out, not above zero."""
    d = 12
    inside, outside = [], []
    for seed in range(30):
        X, Y = cloud(seed, n, d), cloud(seed + 100, n, d)
        inside.append(linearity.score(X, Y))
        outside.append(linearity.score(X, Y, test=np.arange(n) % 4 == 0, ridge=1e-6))
    assert np.mean(inside) == pytest.approx(d / (n - 1), rel=0.06)
    assert np.mean(outside) < 0


def test_noise_leaves_the_share_it_should():
    X = cloud(n=6000)
    Y = X + 0.5 * cloud(2, 6000)
    test = np.arange(6000) % 2 == 0
    assert linearity.score(X, Y, test=test) == pytest.approx(1 / 1.25, abs=0.01)


def test_the_increment_is_less_linear_than_the_state_and_blocks_keep_their_numbers():
    X, W = cloud(), cloud(3, 12, 12)
    bend = X + 0.2 * np.maximum(X @ W, 0)
    straight = bend + 0.2 * (bend @ W)
    found = linearity.measure(np.stack([X, bend, straight]), groups=np.arange(900) // 10)
    assert float(found["whole"][0]) > 0.9 and 0.3 < float(found["increment"][0]) < 0.85
    assert float(found["increment"][1]) == pytest.approx(1)
    assert found["layer"].values.tolist() == [0, 1]
    assert (found["in_sample"] >= found["whole"] - 1e-9).all()
    ax = linearity.draw(found, plt.subplots()[1])
    assert ax.get_xlabel() == "block"
    plt.close("all")


def test_one_massive_coordinate_can_be_left_out():
    X = cloud()
    Y = np.tanh(3 * X)[:, ::-1] + 0.5 * cloud(4)
    X[:, 0] *= 1000
    Y[:, 0] = X[:, 0]
    states = np.stack([X, Y])
    with_it = float(linearity.measure(states, groups=None)["whole"][0])
    without = float(linearity.measure(states, groups=None, drop=1)["whole"][0])
    assert with_it > 0.99 > 0.8 > without


def test_bad_input_is_one_sentence():
    X = cloud(n=20)
    with pytest.raises(ValueError, match="give the same samples of both"):
        linearity.score(X, X[:-1])
    with pytest.raises(ValueError, match="not numbers"):
        linearity.score(X, np.where(X > 2, np.nan, X))
    with pytest.raises(ValueError, match="at least two each"):
        linearity.score(X, X, test=np.arange(20) < 19)
    with pytest.raises(ValueError, match="with two layers"):
        linearity.measure(X[None], groups=None)
