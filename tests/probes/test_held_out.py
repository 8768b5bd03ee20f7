"""Scores of held-out samples: nothing shared between training and test, no gain from choosing."""

import numpy as np
import pytest
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import roc_auc_score
from sklearn.model_selection import StratifiedGroupKFold
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from probes.held_out import across, auc, held_out, splits, text_baseline


def test_auc_is_that_of_scikit_learn_and_strata_are_apart():
    rng = np.random.default_rng(0)
    y = rng.integers(2, size=200)
    s = rng.integers(6, size=200) + y
    assert auc(s, y) == pytest.approx(roc_auc_score(y, s), abs=1e-12)
    strata = rng.integers(4, size=200)
    pairs = sorted_ = 0.0
    for a in range(200):
        for b in range(200):
            if y[a] and not y[b] and strata[a] == strata[b]:
                pairs += 1
                sorted_ += (s[a] > s[b]) + 0.5 * (s[a] == s[b])
    assert auc(s, y, strata) == pytest.approx(sorted_ / pairs, abs=1e-12)
    assert np.isnan(auc([1.0, 2.0], [1, 1]))


def test_pooled_scores_of_a_useless_probe_are_below_one_half_and_folds_are_not():
    rng = np.random.default_rng(1)
    pooled, apart = [], []
    for _ in range(40):
        y, groups = rng.integers(2, size=30), np.arange(30) // 3
        found = held_out(np.zeros((1, 30, 2)), y, groups=groups, seed=int(rng.integers(1000)))
        pooled.append(roc_auc_score(y, found.scores))
        apart.append(found.auc)
    assert np.mean(pooled) < 0.42
    np.testing.assert_allclose(apart, 0.5)


def test_no_training_sample_shares_a_group_with_a_test_sample():
    rng = np.random.default_rng(2)
    entity, relation = rng.integers(9, size=120), rng.integers(4, size=120)
    y = rng.integers(2, size=120)
    tested = []
    for train, test in splits(y, (entity, relation), folds=3):
        assert not set(entity[train]) & set(entity[test])
        assert not set(relation[train]) & set(relation[test])
        tested += test.tolist()
    assert sorted(tested) == list(range(120))
    with pytest.raises(ValueError, match="one group"):
        list(splits(y, np.zeros(120)))


def test_what_is_constant_in_groups_is_not_learned():
    rng = np.random.default_rng(3)
    groups = np.repeat(np.arange(40), 10)
    y = rng.integers(2, size=40)[groups]
    topic = rng.standard_normal((40, 20))[groups]
    states = topic[None] + 0.1 * rng.standard_normal((2, 400, 20))
    alone = held_out(states, y, groups=None).auc
    apart = held_out(states, y, groups=groups).auc
    assert alone > 0.95 and apart < 0.7
    # Entities crossed with relations: a label that is the relation's is out of reach.
    relation = np.tile(np.arange(10), 40)
    known = (relation % 2)[None, :, None] * 3 + 0.1 * rng.standard_normal((1, 400, 4))
    assert held_out(known, relation % 2, groups=groups).auc > 0.95
    memory = rng.standard_normal((10, 12))[relation][None]
    random_label = rng.permutation(np.arange(10) % 2)[relation]
    assert held_out(memory, random_label, groups=groups).auc > 0.95
    assert held_out(memory, random_label, groups=(groups, relation), folds=5).auc < 0.8


def test_noise_gives_one_half_although_the_best_of_many_layers_is_taken():
    rng = np.random.default_rng(4)
    found = [held_out(rng.standard_normal((24, 60, 5)), np.arange(60) % 2, groups=None, folds=3,
                      seed=i).auc for i in range(12)]
    assert abs(np.mean(found) - 0.5) < 0.06
    stacked = [held_out(rng.standard_normal((24, 60, 5)), np.arange(60) % 2, groups=None, folds=3,
                        use="all", seed=i).auc for i in range(12)]
    assert abs(np.mean(stacked) - 0.5) < 0.06


def test_one_layer_with_an_estimator_is_plain_cross_validation():
    rng = np.random.default_rng(5)
    X, groups = rng.standard_normal((90, 6)), np.arange(90) // 2
    y = (X[:, 0] + rng.standard_normal(90) > 0).astype(int)
    probe = make_pipeline(StandardScaler(), LogisticRegression())
    found = held_out(X[None], y, groups=groups, estimator=probe, folds=4, seed=7)
    expected = np.zeros(90)
    for train, test in StratifiedGroupKFold(4, shuffle=True, random_state=7).split(X, y, groups):
        expected[test] = probe.fit(X[train], y[train]).decision_function(X[test])
    np.testing.assert_allclose(found.scores, expected, atol=1e-9)


def test_layers_that_hold_different_halves_are_worth_more_together():
    rng = np.random.default_rng(6)
    parts = rng.standard_normal((3, 300))
    y = (parts.sum(0) > 0).astype(int)
    states = parts[:, :, None] + 0.0 * rng.standard_normal((3, 300, 1))
    best, both = (held_out(states, y, groups=None, use=use) for use in ("best", "all"))
    assert both.auc > best.auc + 0.1
    assert set(both.chosen) == {"all"}
    # Calibrated on what was not fitted: probabilities near the frequencies.
    sure = both.probability > 0.8
    assert y[sure].mean() > 0.8 and 0 <= both.probability.min() and both.probability.max() <= 1


def test_a_feature_of_one_task_does_not_transfer_and_a_common_one_does():
    rng = np.random.default_rng(7)
    y, first = np.arange(200) % 2, np.arange(200) < 100
    states = rng.standard_normal((2, 200, 8))
    states[0, first, 0] += 1.5 * y[first]
    states[0, ~first, 1] += 1.5 * y[~first]
    assert 0.3 < across(states, y, first, ~first, groups=None).auc < 0.7
    states[1, :, 2] += 4 * y
    found = across(states, y, first, ~first, groups=None)
    assert found.auc > 0.9 and np.isnan(found.scores[first]).all()
    with pytest.raises(ValueError, match="others"):
        across(states, y, first, first, groups=None)


def test_words_alone():
    texts = [f"what {'fine' if i % 3 else 'odd'} number {i}" for i in range(60)]
    y = np.array([i % 3 > 0 for i in range(60)])
    assert text_baseline(texts, y, groups=np.arange(60)).auc == 1.0
    rng = np.random.default_rng(0)
    assert abs(text_baseline([f"w{i}" for i in range(60)], rng.permutation(y), groups=None).auc
               - 0.5) < 1e-9


def test_bad_input_is_one_sentence():
    X = np.zeros((1, 10, 2))
    with pytest.raises(ValueError, match="two classes"):
        held_out(X, np.zeros(10), groups=None)
    with pytest.raises(ValueError, match="not 3"):
        held_out(X, np.arange(10) % 3, groups=None)
    X[0, 3, 1] = np.nan
    with pytest.raises(ValueError, match="not numbers"):
        held_out(X, np.arange(10) % 2, groups=None)
    # Relations each of one class: what is left to train on is of one class, and that is said.
    found = held_out(np.zeros((1, 10, 2)), np.arange(10) // 5, groups=np.arange(10) // 5)
    assert np.isnan(found.scores).all() and "one class" in found.notes[0] and np.isnan(found.auc)
