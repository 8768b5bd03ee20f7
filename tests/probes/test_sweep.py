"""Sweeps of probes: exact against scikit-learn, honest on noise, right on what is planted."""

import numpy as np
import pytest
import xarray as xr
from matplotlib import pyplot as plt
from sklearn.linear_model import Ridge
from sklearn.metrics import balanced_accuracy_score, roc_auc_score
from sklearn.model_selection import StratifiedGroupKFold
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from probes import folds, linear, quick, sweep


def noise(seed, layers=8, n=60, d=12):
    return np.random.default_rng(seed).standard_normal((layers, n, d)), np.arange(n) % 2


@pytest.mark.parametrize("d", [7, 90])
@pytest.mark.parametrize("classes", [2, 3, 0])
def test_the_quick_probe_is_scikit_learn_s_ridge(d, classes):
    """More or fewer samples than dimensions, two classes, three, and real numbers."""
    rng = np.random.default_rng(0)
    X = rng.standard_normal((2, 60, d))
    y = rng.standard_normal(60) if classes == 0 else rng.integers(classes, size=60)
    X[1, :, 2] += y
    quick = sweep.sweep(X, y, groups=None, permutations=3, alpha=4.0)
    slow = sweep.sweep(X, y, groups=None, permutations=3, estimator=make_pipeline(
        StandardScaler(), Ridge(alpha=4.0)) if classes == 0 else linear.ridge(4.0))
    assert np.allclose(quick["fold_score"], slow["fold_score"])
    assert np.allclose(quick["null"], slow["null"])
    assert np.allclose(quick["nested_score"], slow["nested_score"])


def test_the_nested_choice_is_scored_by_a_probe_that_has_not_seen_the_fold():
    """Sample by sample, against scikit-learn, where each fold has a cell of its own."""
    rng = np.random.default_rng(2)
    groups, y = np.repeat(np.arange(20), 4), rng.integers(3, size=80)
    X = rng.standard_normal((3, 80, 6))
    X[1] += y[:, None]
    found = sweep.sweep(X, y, groups=groups, permutations=1, alpha=2.0)
    splits = folds.folds_of(y, "balanced_accuracy", groups)
    cells = found["nested_index"].values.tolist()
    assert [f"layer {c}" for c in cells] == found["nested_cell"].values.tolist()
    right = quick.held_out(X, y, splits, cells, alpha=2.0)
    for (train, test), cell, score in zip(splits, cells, found["nested_score"].values):
        probe = linear.ridge(2.0).fit(X[cell, train], y[train])
        assert (right[test] == (probe.predict(X[cell, test]) == y[test])).all()
        assert score == pytest.approx(np.mean([right[test][y[test] == c].mean() for c in range(3)]))
    without = sweep.sweep(X, y, groups=groups, permutations=1, alpha=2.0, nested=False)
    assert np.isnan(without["nested_score"].values).all()
    assert np.allclose(without["score"], found["score"])
    assert np.isnan(sweep.best(without)["nested_score"])


def test_scores_are_those_of_the_splits_written_out():
    rng = np.random.default_rng(1)
    groups, y = np.repeat(np.arange(20), 4), rng.integers(3, size=80)
    X = rng.standard_normal((80, 6)) + y[:, None]
    found = sweep.sweep(X[None], y, groups=groups, permutations=1, alpha=2.0)
    splits = StratifiedGroupKFold(5, shuffle=True, random_state=0).split(X, y, groups)
    for fold, (train, test) in enumerate(splits):
        assert not set(groups[train]) & set(groups[test])
        probe = linear.ridge(2.0).fit(X[train], y[train])
        expected = balanced_accuracy_score(y[test], probe.predict(X[test]))
        assert float(found["fold_score"][0, fold]) == pytest.approx(expected)


def test_the_best_of_many_layers_of_noise_is_not_a_finding():
    """200 runs of pure noise: the corrected claim holds its level, the uncorrected does not."""
    supported = alone = high = 0
    runs = 200
    for seed in range(runs):
        X, y = noise(seed)
        found = sweep.sweep(X, y, groups=None, nested=False, seed=seed)
        claim = sweep.best_claim(found, "A layer encodes it.", "arXiv:1909.03368")
        supported += claim.verdict == "supported"
        assert (claim.verdict == "supported") == (sweep.best(found)["p"] <= 0.05)
        alone += float(found["p_alone"].min()) <= 0.05
        high += float(found["score"].max()) > 0.55
    assert supported / runs <= 0.07
    assert alone / runs > 0.2 and high / runs > 0.5  # what the correction is for


def test_a_planted_feature_is_found_in_its_layer():
    right = 0
    for seed in range(20):
        X, y = noise(seed, n=120)
        X[5, :, 3] += 1.5 * y
        found = sweep.sweep(X, y, groups=None, nested=False, seed=seed)
        top = sweep.best(found)
        right += top["cell"] == {"layer": 5} and top["p"] <= 0.05
        claim = sweep.best_claim(found, "A layer encodes it.", "arXiv:1909.03368")
        assert (claim.verdict == "supported") == (top["p"] <= 0.05)
    assert right >= 19
    # Its strength: the AUC of a shift of 1.5 standard deviations is .856, in the limit.
    X, y = noise(0, layers=1, n=4000, d=2)
    X[0, :, 0] += 1.5 * y
    assert float(sweep.sweep(X, y, groups=None)["score"][0]) == pytest.approx(0.856, abs=0.015)


def test_a_label_that_is_only_the_topic_is_at_chance_when_groups_are_kept():
    """40 topics, the label constant in each, states of one topic alike, and no signal."""
    by_group, by_chance, p = [], [], []
    for seed in range(8):
        rng = np.random.default_rng(seed)
        topic = np.repeat(np.arange(40), 10)
        y = rng.permutation(np.arange(40) % 2)[topic]
        X = (rng.standard_normal((40, 30))[topic] + 0.1 * rng.standard_normal((400, 30)))[None]
        by_chance.append(float(sweep.sweep(X, y, groups=None, permutations=1)["score"][0]))
        kept = sweep.sweep(X, y, groups=topic, seed=seed)
        by_group.append(float(kept["score"][0]))
        p.append(float(kept["p"][0]))
    assert np.mean(by_chance) > 0.9 and abs(np.mean(by_group) - 0.5) < 0.08
    assert np.mean(np.array(p) <= 0.05) <= 0.25


def test_permuted_labels_keep_what_groups_explain():
    rng = np.random.default_rng(0)
    blocks = np.repeat(np.arange(6), [2, 3, 4, 5, 6, 7])
    constant = np.array([0, 1, 0, 1, 1, 0])[blocks]
    varying = rng.integers(2, size=len(blocks))
    for _ in range(20):
        moved = constant[folds.shuffled(constant, blocks, rng)]
        assert all(len(np.unique(moved[blocks == b])) == 1 for b in range(6))
        assert sum(moved[blocks == b][0] for b in range(6)) == 3
        within = varying[folds.shuffled(varying, blocks, rng)]
        assert all(within[blocks == b].sum() == varying[blocks == b].sum() for b in range(6))


def test_labelled_cells_keep_their_names_and_order_does_not_matter():
    rng = np.random.default_rng(0)
    y = np.arange(50) % 2
    X = rng.standard_normal((3, 2, 50, 5))
    X[1, 1, :, 0] += 3 * y
    array = xr.DataArray(X, dims=("layer", "position", "sample", "d_model"),
                         coords={"layer": [4, 8, 12], "position": ["last", "first"]})
    found = sweep.sweep(array, y, groups=None)
    assert sweep.best(found)["cell"] == {"layer": 8, "position": "first"}
    turned = sweep.sweep(array.transpose("sample", "position", "layer", "d_model"), y, groups=None)
    assert np.allclose(turned["score"].transpose("layer", "position"), found["score"])
    assert set(found["nested_cell"].values) == {"layer 8, position first"}
    assert float(found["nested_score"].mean()) > 0.9


def test_auc_counts_ties_as_half():
    decided = np.array([[0.0, 0.0, 1.0, 1.0, 2.0]])
    positive = np.array([[True, False, True, False, True]])
    assert quick.auc(decided, positive)[0] == roc_auc_score(positive[0], decided[0])
    assert np.isnan(quick.auc(decided, np.zeros((1, 5), bool))).all()


def test_whole_numbers_are_classes_unless_said_otherwise():
    X, _ = noise(0, layers=2)
    y = np.arange(60) // 6
    X[1, :, 0] = y + 0.01 * X[1, :, 0]
    assert sweep.sweep(X, y.astype(float), groups=None).manifest["metric"] == "balanced_accuracy"
    found = sweep.sweep(X, y, groups=None, task="regression", alpha=1.0)
    assert found.manifest["metric"] == "r2" and float(found["score"][1]) > 0.98
    assert sweep.sweep(X, y + 0.5, groups=None).manifest["metric"] == "r2"
    # Permuted numbers are predicted worse than by their mean: what is above zero is above them all.
    assert float(found["null"].max()) < 0
    claim = sweep.best_claim(found, "Numbers are read.", "arXiv:1909.03368")
    assert claim.verdict == "supported" and claim.interval[0] <= claim.measured <= claim.interval[1]


def test_the_figure_and_bad_input():
    X, y = noise(0, n=30)
    found = sweep.sweep(X, y, groups=None, permutations=20)
    ax = sweep.draw(found, plt.subplots()[1])
    assert ax.get_xlabel() == "layer" and ax.get_ylabel() == "ROC-AUC"
    plt.close("all")
    with pytest.raises(ValueError, match="all samples have the same label"):
        sweep.sweep(X, np.zeros(30, int), groups=None)
    with pytest.raises(ValueError, match="4 groups cannot be split into 5 folds"):
        sweep.sweep(X, y, groups=np.arange(30) % 4)
    with pytest.raises(ValueError, match=r"the rarest class has 2 sample\(s\)"):
        sweep.sweep(X, np.r_[np.zeros(28, int), 1, 1], groups=None)
    with pytest.raises(ValueError, match=r"no class has as many samples as there are folds \(5\)"):
        sweep.sweep(X, np.arange(30) // 3, groups=np.arange(30))
    broken = X.copy()
    broken[3, 7, 1] = np.inf
    with pytest.raises(ValueError, match=r"not numbers \(cell 3, sample 7\)"):
        sweep.sweep(broken, y, groups=None)
    with pytest.raises(ValueError, match=r"\(29,\) labels for 30 samples"):
        sweep.sweep(X, y[:-1], groups=None)
    with pytest.raises(ValueError, match=r"\[layer, sample, d_model\], not \(30, 12\)"):
        sweep.sweep(X[0], y, groups=None)
    with pytest.raises(ValueError, match="10 permutations cannot reach level 0.05: use at least 19"):
        sweep.best_claim(sweep.sweep(X, y, groups=None, permutations=10), "So.", "arXiv:1909.03368")
    # One class in a fold: that fold is left out, and the result says so.
    lonely = sweep.sweep(X, np.r_[np.zeros(24, int), np.ones(6, int)], groups=np.repeat(np.arange(5), 6),
                         permutations=1)
    assert lonely.manifest["notes"] and np.isnan(lonely["fold_score"].values).any()
