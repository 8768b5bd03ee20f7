"""The gate passes planted sinks, fails every kind of control, and its statistics are right."""

import numpy as np
import pytest
import torch
from sklearn.metrics import roc_auc_score

from interp.core.errors import NumericalError
from interp.sinks import validation_gate as gate


def populations(seed: int, sinks: bool):
    """phi of 30 anchors, 400 text tokens, and 12 images of 150 tokens with their attention."""
    draw = np.random.default_rng(seed)

    def ordinary(*shape):
        return np.exp(draw.normal(0, 0.4, shape))

    anchors = draw.uniform(25, 40, 30) if sinks else ordinary(30)
    phi, attention = ordinary(12, 150), draw.dirichlet(np.ones(150), 12)
    if sinks:
        for image in range(12):
            chosen = draw.choice(150, 2, replace=False)
            phi[image, chosen], attention[image, chosen] = draw.uniform(22, 35, 2), 0.3
    return anchors, ordinary(400), list(phi), list(attention)


def test_planted_sinks_pass_and_unplanted_controls_fail():
    for seed in range(20):
        assert gate.gate(*populations(seed, True), tau=20.0).passed
        control = gate.gate(*populations(seed, False), tau=20.0)
        assert not control.passed and not control["anchor"].passed
        assert not control["two populations"].passed


def test_each_check_fails_alone_for_its_own_reason():
    anchors, text, phi, attention = populations(0, True)

    def failed(*sets):
        return [check.name for check in gate.gate(*sets, tau=20.0).checks if not check.passed]

    assert failed(anchors, text, phi, attention) == []
    few = np.where(np.arange(30) < 4, 15.0, anchors)
    assert failed(few, text, phi, attention) == ["anchor"]
    assert failed(anchors, np.full(60, 6.0), phi, attention) == ["text"]
    elsewhere = list(np.random.default_rng(9).permuted(np.stack(attention), axis=1))
    assert failed(anchors, text, phi, elsewhere) == ["attention"]
    spread = np.exp(np.random.default_rng(1).uniform(np.log(0.5), np.log(8), 400))
    middle = np.linspace(20, 21, 30)
    filled = [np.where(image < 20, spread[:150] * 2.4, image) for image in phi]
    assert "two populations" in failed(middle, spread, filled, attention)


def test_the_gate_prints_a_verdict_per_check():
    text = str(gate.gate(*populations(0, False), tau=20.0))
    assert text.startswith("FAIL  gate") and text.count("\n") == 4


def test_auroc_equals_scikit_learn_with_ties():
    draw = np.random.default_rng(2)
    for _ in range(10):
        score, hit = draw.integers(0, 6, 50).astype(float), draw.random(50) < 0.3
        assert gate.auroc(score, hit) == pytest.approx(roc_auc_score(hit, score))
    assert gate.auroc(np.ones(5), [True, False, False, True, False]) == 0.5


def test_attention_auroc_is_an_average_over_images_of_any_size():
    phi = [np.arange(200.0), torch.arange(50.0)]
    attention = [np.arange(200.0), -torch.arange(50.0)]
    assert gate.attention_auroc(phi, attention) == pytest.approx(0.5)
    assert gate.attention_auroc(phi[:1], attention[:1]) == 1


def test_otsu_knows_two_points_and_the_gaussian_limit():
    cut, share = gate.otsu(np.repeat([1.0, 4.0], 50))
    assert (cut, share) == (2.5, pytest.approx(1))
    gaussian = np.random.default_rng(3).normal(size=20_000)
    # One population reaches 2/pi: above the limit of 0.6, hence the second condition of the gate.
    assert gate.otsu(gaussian)[1] == pytest.approx(2 / np.pi, abs=0.01)
    assert gate.otsu(np.ones(9))[1] == 0


def test_the_null_separates_planted_from_random_dimensions():
    draw = torch.Generator().manual_seed(4)
    residual = torch.randn(9, 60, 40, generator=draw)
    attention = torch.rand(9, 60, generator=draw) / 60
    for image in range(9):
        residual[image, 3 * image, [5, 17]] = 40.0
        attention[image, 3 * image] = 0.5
    found = gate.permutation_null(residual, attention, [5, 17], n=300)
    assert found.passed and found.observed == 1 and found.p == pytest.approx(1 / 301)
    wrong = gate.permutation_null(residual, attention, [6, 18], n=300)
    assert not wrong.passed and wrong.p > 0.05
    assert gate.permutation_null(residual, attention, [5, 17], n=300) == found


def test_bad_input_is_named():
    anchors, text, phi, attention = populations(0, True)
    with pytest.raises(ValueError, match="anchor_phi must be a list"):
        gate.gate([], text, phi, attention, 20.0)
    with pytest.raises(ValueError, match="12 images with phi and 11 with attention"):
        gate.gate(anchors, text, phi, attention[1:], 20.0)
    with pytest.raises(NumericalError, match="text_phi contains NaN"):
        gate.gate(anchors, text * np.nan, phi, attention, 20.0)
    with pytest.raises(ValueError, match="positives and negatives"):
        gate.auroc([1.0, 2.0], [True, True])
    with pytest.raises(ValueError, match="no random set"):
        gate.permutation_null(torch.randn(2, 5, 3), torch.rand(2, 5), [0, 1], n=2)
