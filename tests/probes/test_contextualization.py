"""Probes of earlier tokens on states that hold them or do not; token errors of the linear map."""

import numpy as np
import pytest
from sklearn.discriminant_analysis import LinearDiscriminantAnalysis

from probes import contextualization as c
from probes import linearity


def planted(seed=0, n=1200, d=24, kinds=5, strength=3.0):
    """Half of the samples hold the token before them in their state, the others nothing."""
    rng = np.random.default_rng(seed)
    before = rng.integers(0, kinds, (n, 2))
    holds = rng.random(n) < 0.5
    states = rng.standard_normal((n, d))
    states += strength * holds[:, None] * rng.standard_normal((kinds, d))[before[:, 0]]
    return states, before, holds, np.arange(n) // 30


def test_samples_that_hold_what_was_before_them_are_cheap():
    states, before, holds, groups = planted()
    found = c.proxy(states, before[:, :1], groups=groups)
    cost = found["cost"].values
    assert cost[holds].mean() < 0.6 * cost[~holds].mean()
    # The token two places before is nowhere: its cost is that of its frequency.
    blind = c.proxy(states, before[:, 1:], groups=groups)
    assert blind["cost"].mean() == pytest.approx(float(blind["prior"].mean()), rel=0.03)
    assert float(found["scored"]) == 1.0


def test_confidence_is_set_so_that_noise_costs_no_more_than_frequencies():
    """Plain discriminants of noise are far too sure: few samples, many coordinates."""
    rng = np.random.default_rng(1)
    states, before = rng.standard_normal((300, 60)), rng.integers(0, 12, (300, 1))
    found = c.proxy(states, before, groups=np.arange(300) // 15)
    assert float(found["cost"].mean()) < float(found["prior"].mean()) + 0.1


@pytest.mark.parametrize("shrinkage", [0.0, 0.2])
def test_discriminants_are_those_of_scikit_learn(shrinkage):
    states, before, _, _ = planted(2, 400, 8)
    labels = before[:, 0]
    theirs = LinearDiscriminantAnalysis(solver="lsqr", shrinkage=shrinkage).fit(states, labels)
    ours = c._log_shares(*c.discriminants(states, labels, states[:50], shrinkage), 1.0)
    assert np.allclose(ours, theirs.predict_log_proba(states[:50]), atol=1e-6)


def test_what_is_not_there_is_not_scored():
    assert c.tokens_before([0, 7, 8, 9], [2, 3], [1, 2, 3]).tolist() == [[7, -1, -1], [8, 7, -1]]
    states, before, _, groups = planted(3, 300)
    before[:40] = -1
    before[40:60] = 99  # too rare in some folds or not, but known
    found = c.proxy(states, before, groups=groups)
    assert np.isnan(found["cost"][:40]).all() and np.isfinite(found["cost"][60:]).all()
    with pytest.raises(ValueError, match="finite numbers"):
        c.proxy(np.full_like(states, np.nan), before, groups=groups)
    with pytest.raises(ValueError, match="1 documents cannot be split"):
        c.proxy(states, before, groups=np.zeros(300))


def test_token_errors_add_up_to_the_held_out_score():
    rng = np.random.default_rng(4)
    X = rng.standard_normal((400, 9)) + 5
    Y = X @ rng.standard_normal((9, 9)) + np.tanh(X) + 0.3 * rng.standard_normal((400, 9))
    groups = np.arange(400) // 20
    found = linearity.token_errors(X, Y, groups=groups, ridge=1e-6)
    for fold in range(5):
        test = found["fold"].values == fold
        spread = ((Y[test] - Y[test].mean(0)) ** 2).sum()
        assert 1 - found["left"].values[test].sum() / spread == pytest.approx(
            linearity.score(X, Y, test=test, ridge=1e-6), abs=1e-9)
        # No document is on both sides.
        assert not set(groups[test]) & set(groups[~test])
        # What the block adds is left over by the same amount.
        step = Y - X
        rest = ((step[test] - step[test].mean(0)) ** 2).sum()
        assert 1 - found["left"].values[test].sum() / rest == pytest.approx(
            linearity.score(X, step, test=test), abs=1e-4)
    rms = np.sqrt(found["spread"].mean())
    assert np.allclose(found["error"] * rms, np.sqrt(found["left"]))
    assert np.allclose(found["relative"] ** 2, found["left"] / found["spread"])


def test_a_bent_token_stands_out_and_a_massive_coordinate_can_go():
    rng = np.random.default_rng(5)
    X = rng.standard_normal((300, 6))
    Y = X @ rng.standard_normal((6, 6))
    Y[33] += 20
    groups = np.arange(300) // 10
    assert int(linearity.token_errors(X, Y, groups=groups)["error"].values.argmax()) == 33
    X, Y = np.c_[X, 1e4 * rng.standard_normal(300)], np.c_[rng.standard_normal((300, 6)), np.zeros(300)]
    Y[:, 6] = X[:, 6]
    with_it, without = (linearity.token_errors(X, Y, groups=groups, drop=d) for d in (0, 1))
    assert with_it["left"].sum() / with_it["spread"].sum() < 0.01
    assert without["left"].sum() / without["spread"].sum() > 0.9
