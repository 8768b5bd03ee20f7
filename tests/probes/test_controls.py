"""Control tasks tell memory from context; code lengths tell signal from noise, in bits."""

import numpy as np
import pytest
from sklearn.linear_model import LogisticRegression

from probes import controls, mdl, sweep


def test_every_sample_of_a_type_gets_one_label_at_real_frequencies():
    rng = np.random.default_rng(0)
    types = rng.integers(3000, size=20000)
    labels = rng.choice(3, size=20000, p=[0.6, 0.3, 0.1])
    made = controls.control_labels(labels, types)
    assert all(len(set(made[types == t])) == 1 for t in range(50))
    share = np.bincount(made) / len(made)
    assert np.allclose(share, [0.6, 0.3, 0.1], atol=0.03)
    assert (controls.control_labels(labels, types, seed=1) != made).any()


def test_memory_has_no_selectivity_and_context_has():
    """States name the type: any labels of types can be learned. States tell the label: not those."""
    rng = np.random.default_rng(0)
    types = np.repeat(np.arange(10), 20)
    by_type = (np.arange(10) % 2)[types]
    by_context = rng.permutation(np.arange(200) % 2)
    own = rng.standard_normal((10, 12))[types] + 0.1 * rng.standard_normal((200, 12))
    states = np.stack([own, 0.1 * rng.standard_normal((200, 12))])
    states[1, :, 0] += by_context
    folds = sweep.sweep(states, by_type, groups=None, alpha=1.0)
    fake = controls.control_labels(by_type, types, seed=3)
    found = controls.selectivity(folds, sweep.sweep(states, fake, groups=None, alpha=1.0))
    assert float(folds["score"][0]) > 0.95 and abs(float(found["selectivity"][0])) < 0.05
    real = sweep.sweep(states, by_context, groups=None, alpha=1.0)
    fake = controls.control_labels(by_context, types, seed=3)
    found = controls.selectivity(real, sweep.sweep(states, fake, groups=None, alpha=1.0))
    assert float(found["selectivity"][1]) > 0.35
    with pytest.raises(ValueError, match="differ in 'alpha'"):
        controls.selectivity(real, sweep.sweep(states, fake, groups=None, alpha=2.0))


def test_coverage_and_bad_types():
    assert controls.coverage([1, 1, 2, 3], [0], [1, 2, 3]) == pytest.approx(1 / 3)
    with pytest.raises(ValueError, match="every sample is of its own type"):
        controls.control_labels([0, 1, 0], [5, 6, 7])
    with pytest.raises(ValueError, match=r"\(2,\) labels and \(3,\) types"):
        controls.control_labels([0, 1], [5, 6, 7])


def planted(strength, n=600, classes=2, seed=0):
    rng = np.random.default_rng(seed)
    y = rng.permutation(np.arange(n) % classes)
    X = rng.standard_normal((n, 5))
    X[:, 0] += strength * y
    return X, y


def test_noise_is_not_compressed_and_a_strong_signal_is():
    for reference in ("uniform", "prior"):
        X, y = planted(0.0)
        assert float(mdl.online_code(X, y, groups=None, reference=reference)["compression"].max()) < 1.01
    lengths = [float(mdl.online_code(*planted(s), groups=None)["compression"].mean()) for s in (1, 3, 9)]
    assert 1 < lengths[0] < lengths[1] < lengths[2] and lengths[2] > 8


def test_unbalanced_noise_is_compressed_only_against_the_uniform_code():
    rng = np.random.default_rng(0)
    X, y = rng.standard_normal((800, 4)), (rng.random(800) < 0.1).astype(int)
    prior = mdl.online_code(X, y, groups=None)["compression"]
    uniform = mdl.online_code(X, y, groups=None, reference="uniform")["compression"]
    assert float(prior.max()) < 1.01 < 1.7 < float(uniform.min())


def test_code_length_written_out_in_bits():
    """Two portions: the first with the reference code, the second with a probe fitted on the first."""
    X, y = planted(2.0, n=100)
    found = mdl.online_code(X, y, groups=None, fractions=(0.4, 1.0), orders=1, reference="uniform",
                            estimator=LogisticRegression())
    order = np.random.default_rng(0).permutation(100)
    first, second = order[:40], order[40:]
    p = LogisticRegression().fit(X[first], y[first]).predict_proba(X[second])
    p = (p * 40 + 0.5) / 41
    expected = -np.log2(p[np.arange(60), y[second]]).sum()
    assert found["portion_bits"].values[0] == pytest.approx([40.0, expected])


def test_groups_stay_in_one_portion_and_their_topic_is_no_signal():
    rng = np.random.default_rng(0)
    topic = np.repeat(np.arange(40), 10)
    y = rng.permutation(np.arange(40) % 2)[topic]
    X = rng.standard_normal((40, 20))[topic] + 0.1 * rng.standard_normal((400, 20))
    apart = float(mdl.online_code(X, y, groups=None)["compression"].mean())
    together = float(mdl.online_code(X, y, groups=topic)["compression"].mean())
    assert apart > 1.5 and together < 1.1


def test_bad_input_is_one_sentence():
    X, y = planted(1.0, n=30)
    with pytest.raises(ValueError, match="nothing to code"):
        mdl.online_code(X, np.zeros(30), groups=None)
    with pytest.raises(ValueError, match="fractions must rise and end at 1"):
        mdl.online_code(X, y, groups=None, fractions=(0.5, 0.4, 1.0))
    with pytest.raises(ValueError, match=r"labels \(29,\): give one label per sample"):
        mdl.online_code(X, y[1:], groups=None)
