"""Position probes: exact solutions, exact nulls, planted positions found and their twins clean."""

import numpy as np
import pytest
import torch
from scipy import stats
from sklearn.linear_model import LogisticRegression
from sklearn.preprocessing import StandardScaler
from sklearn.utils.estimator_checks import parametrize_with_checks

from interp.core import NumericalError
from interp.flow import nope_adjacency
from probes import position as pos


@parametrize_with_checks([pos.PositionProbe(max_iter=60)])
def test_scikit_learn_s_contract(estimator, check):
    check(estimator)


def test_the_linear_probe_is_scikit_learn_s_logistic_regression():
    rng = np.random.default_rng(0)
    y = rng.integers(7, size=150)
    X = rng.standard_normal((150, 5)) * [1, 10, 0.1, 3, 1] + 0.7 * y[:, None]
    mine = pos.PositionProbe(alpha=2.0, max_iter=500).fit(X, y)
    Z = StandardScaler().fit(X)
    other = LogisticRegression(C=0.5, fit_intercept=False, max_iter=5000, tol=1e-9).fit(
        Z.transform(X), y)
    assert np.allclose(mine.predict_proba(X), other.predict_proba(Z.transform(X)), atol=1e-5)


def test_the_non_linear_probe_reads_what_the_linear_one_cannot():
    # Positions on a line, told by the distance from two ends only in absolute value: a XOR.
    rng = np.random.default_rng(1)
    signs = rng.choice([-1.0, 1.0], (400, 2))
    y = (signs.prod(1) > 0).astype(int)
    X = signs + 0.1 * rng.standard_normal((400, 2))
    scores = [pos.PositionProbe(hidden=h, alpha=0.01).fit(X[:200], y[:200]).score(X[200:], y[200:])
              for h in (0, 8)]
    assert scores[0] < 0.7 and scores[1] > 0.98


def test_the_nulls_are_the_card_s():
    found = {k: v.mean() for k, v in pos.nulls(np.arange(1024)).items()}
    assert found["constant"] == 256 and found["uniform"] == pytest.approx(341.33, abs=0.01)
    # The constant is chosen on training positions.
    assert pos.nulls([0, 10], train=[8, 9, 10])["constant"].tolist() == [9, 1]
    drawn = np.random.default_rng(0)
    n = 200
    simulated = np.abs(drawn.integers(n, size=40000) - drawn.integers(n, size=40000)).mean()
    assert pos.nulls(np.arange(n))["uniform"].mean() == pytest.approx(simulated, rel=0.02)


def test_the_posterior_s_median_has_the_least_expected_distance():
    rng = np.random.default_rng(0)
    p = rng.dirichlet(np.full(9, 0.3), 50)
    where = np.arange(0, 27, 3)
    expected = np.abs(where[:, None] - where[None]) @ p.T  # [guess, sample]
    found = pos.posterior_median(p, where)
    at = (found / 3).astype(int)
    assert np.allclose(expected[at, range(50)], expected.min(0))
    # Two far peaks: the most probable place may be far off.
    assert pos.posterior_median(np.array([[0.45, 0.1, 0.1, 0.35]]), range(4)).tolist() == [1.0]


N, DOCUMENTS, D = 12, 20, 16


def planted(seed=0):
    """Layer 0 holds no position, layer 1 where in the text, layer 2 the document instead."""
    rng = np.random.default_rng(seed)
    place, document = np.tile(np.arange(N), DOCUMENTS), np.repeat(np.arange(DOCUMENTS), N)
    states = rng.standard_normal((3, N * DOCUMENTS, D))
    states[1] += 3 * rng.standard_normal((N, D))[place]
    states[2] += 9 * rng.standard_normal((DOCUMENTS, D))[document]
    return states, place, document


def test_positions_are_found_where_they_were_planted_and_are_at_the_null_elsewhere():
    states, place, document = planted()
    found = pos.absolute(states, place, documents=document)
    null = float(found["constant"].mean())
    assert null == pytest.approx(N / 4)
    share = found["mad_median"].mean("document").values / null
    assert share[1] < 0.1 and share[0] > 0.9 and share[2] > 0.9
    assert found["accuracy"].mean("document").values[1] > 0.8
    # No guess that looks at noise is better than the constant one.
    assert (found["mad"].mean("document").values[[0, 2]] > 0.95 * null).all()
    named = np.abs(found["predicted"] - found["position"]).values
    assert named[1, document == 3].mean() == pytest.approx(float(found["mad"][1, 3]))


def test_documents_never_lie_in_training_and_test():
    # Each document has its own code for positions: nothing carries over to another document.
    rng = np.random.default_rng(0)
    place, document = np.tile(np.arange(N), 8), np.repeat(np.arange(8), N)
    codes = rng.standard_normal((8, N, 200))
    states = codes[document, place][None]
    found = pos.absolute(states, place, documents=document)
    assert float(found["mad"].mean()) > 0.8 * float(found["constant"].mean())
    # The same samples with the documents' names drawn at random leak.
    twice = np.concatenate([states, states], 1)
    leak = pos.absolute(twice, np.tile(place, 2), documents=rng.integers(0, 8, 16 * N))
    assert float(leak["mad"].mean()) < 0.7 * float(found["mad"].mean())


def test_bad_input_is_one_sentence():
    states, place, document = planted()
    with pytest.raises(ValueError, match=r"1 document\(s\) cannot be split"):
        pos.absolute(states, place, documents=0 * document)
    with pytest.raises(ValueError, match="one position"):
        pos.absolute(states, 0 * place, documents=document)
    with pytest.raises(ValueError, match="not numbers"):
        pos.absolute(states * np.nan, place, documents=document)
    with pytest.raises(ValueError, match="one position and document per sample"):
        pos.absolute(states, place[:-1], documents=document)
    with pytest.raises(ValueError, match="one class only"):
        pos.PositionProbe().fit(states[0], 0 * place)
    with pytest.raises(ValueError, match="at least two documents"):
        pos.similarity(states)
    with pytest.raises(ValueError, match="at least three"):
        pos.adjacency(np.eye(2))
    with pytest.raises(NumericalError, match="NaN"):
        pos.cosines(np.full((3, 2), np.nan))


# -- similarity of nearby states ------------------------------------------------------------------


def naive(cosine, kind):
    won = []
    for i in range(len(cosine)):
        for j in range(i):
            for k in range(j):
                if kind == "next" and k != j - 1 or kind == "neighbor" and j != i - 1:
                    continue
                won.append((np.sign(cosine[i, j] - cosine[i, k]) + 1) / 2)
    return np.mean(won)


def test_adjacency_is_the_share_of_triples_and_agrees_with_the_flow_module():
    rng = np.random.default_rng(0)
    cosine = rng.integers(0, 4, (2, 9, 9)).astype(float)  # with ties
    for kind in ("triples", "next", "neighbor"):
        found = pos.adjacency(cosine, kind)
        assert found == pytest.approx([naive(one, kind) for one in cosine])
    assert pos.adjacency(cosine) == pytest.approx(nope_adjacency.adjacency(cosine))
    x = rng.standard_normal((2, 7, 5))
    assert np.allclose(pos.cosines(torch.tensor(x)), nope_adjacency.cosines(x))
    gap = [(i - j) for i in range(9) for j in range(i)]
    flat = [cosine[0, i, j] for i in range(9) for j in range(i)]
    assert pos.nearness(cosine)[0] == pytest.approx(stats.spearmanr(flat, -np.array(gap)).statistic)


def test_walks_are_adjacent_and_independent_states_are_not():
    rng = np.random.default_rng(0)
    steps = rng.standard_normal((DOCUMENTS, N, D))
    found = pos.similarity(np.stack([steps, steps.cumsum(1)]))
    low, high = found["aps"].mean("document").values
    assert abs(low - 0.5) < 0.05 < 0.3 < high - 0.5
    assert abs(float(found["aps_neighbor"][0].mean()) - 0.5) < 0.08
    # An order of the positions at random undoes it.
    mixed = pos.similarity(steps.cumsum(1)[None][:, :, rng.permutation(N)])
    assert abs(float(mixed["aps"].mean()) - 0.5) < 0.15


def test_the_diagonal_alone_would_tell_every_position():
    rng = np.random.default_rng(0)
    cosine = pos.cosines(rng.standard_normal((30, N, D)))
    assert pos.position_r2(cosine).mean() > 0.5  # of states that know nothing
    assert pos.position_r2(pos.cosine_rows(cosine)).mean() < 0.02
    rows = pos.cosine_rows(cosine)
    assert np.allclose(rows.diagonal(0, 1, 2), [(c.sum(1) - 1) / (N - 1) for c in cosine])


def test_averages_over_the_past_tell_position_by_similarity_and_by_variance():
    # What uniform causal attention makes of independent values.
    rng = np.random.default_rng(0)
    values = rng.standard_normal((40, N, 64))
    mean = values.cumsum(1) / np.arange(1, N + 1)[:, None]
    found = pos.similarity(np.stack([values, mean]))
    assert float(found["aps"][1].mean()) > 0.8 and float(found["r2_variance"][1].mean()) > 0.4
    assert float(found["r2_cosine"][1].mean()) > 0.8
    assert float(found["r2_variance"][0].mean()) < 0.05
