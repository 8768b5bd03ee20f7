"""Divergences of heads: bounded, symmetric, zero for twins; planted clusters are found, noise is not."""

import functools

import numpy as np
import pytest
import torch
from scipy.spatial.distance import jensenshannon

import interp
from interp.core.errors import PromptError
from interp.heads import head_clusters
from interp.models.model import Model


@pytest.fixture(scope="module")
def opened(tiny):
    """architecture -> the tiny model, opened once."""
    return functools.cache(lambda architecture: Model(tiny(architecture), f"tiny-{architecture}"))


def test_divergence_is_that_of_scipy_and_at_most_ln_2():
    rows = torch.rand(5, 4, 7).mul(6).softmax(-1)
    found = head_clusters.divergence(rows, smoothing=0).numpy()
    for a in range(5):
        for b in range(5):
            want = np.mean(jensenshannon(rows[a].numpy(), rows[b].numpy(), axis=1) ** 2)
            assert found[a, b] == pytest.approx(want, abs=1e-6)
    assert (found <= np.log(2)).all()
    apart = torch.eye(2)[:, None]
    assert float(head_clusters.divergence(apart, smoothing=0)[0, 1]) == pytest.approx(np.log(2))
    assert float(head_clusters.divergence(apart)[0, 1]) < np.log(2)


def test_the_papers_sum_grows_with_the_text_and_the_mean_does_not():
    rows = torch.rand(3, 4, 7).softmax(-1)
    twice = torch.cat([rows, rows], 1)
    one, two = (head_clusters.divergence(r, mode="official") for r in (rows, twice))
    assert torch.allclose(2 * one, two)
    assert torch.allclose(head_clusters.divergence(rows), head_clusters.divergence(twice))


def test_rows_with_less_than_one_are_compared_by_shape():
    rows = torch.rand(2, 4, 7).softmax(-1)
    scaled = rows * torch.tensor([0.3, 1.0])[:, None, None]
    assert torch.allclose(head_clusters.divergence(rows), head_clusters.divergence(scaled))


def test_planted_clusters_are_found_and_shuffled_ones_are_not():
    rng = np.random.default_rng(0)
    points = np.repeat(rng.normal(size=(5, 2)), 4, 0) + 0.05 * rng.normal(size=(20, 2))
    far = np.linalg.norm(points[:, None] - points, axis=-1)
    gap, p, chance = head_clusters.layer_gap(far, 4, resamples=499)
    assert gap > chance > 0 and p == pytest.approx(1 / 500)
    order = np.arange(20).reshape(5, 4).T.ravel()  # one head of every cluster in each layer
    gap, p, chance = head_clusters.layer_gap(far[order][:, order], 4, resamples=499)
    assert gap < 0 < chance and p > 0.5
    placed = head_clusters.mds(far)
    again = np.linalg.norm(placed[:, None] - placed, axis=-1)
    assert np.abs(again - far).max() < 0.05
    assert np.array_equal(placed, head_clusters.mds(far))


def test_measure_pools_texts_as_each_mode_says(opened):
    model = opened("llama")
    rng = np.random.default_rng(2)
    given = [interp.Prompt.from_tokens([1, *rng.integers(3, 90, n - 1)]) for n in (9, 14)]
    maps = [torch.tensor(model.run(p, read="pattern").reads["pattern"].values[0]) for p in given]
    single = [head_clusters.divergence(
        m.flatten(0, 1), visible=torch.ones(m.shape[-2:], dtype=torch.bool).tril()).numpy()
        for m in maps]
    found = head_clusters.measure(model, given)
    assert np.allclose(found["divergence"], np.mean(single, 0), atol=1e-5)
    total = head_clusters.measure(model, given, mode="official")
    assert np.allclose(total["divergence"], single[0] * 9 + single[1] * 14, atol=1e-4)
    layer = np.repeat(np.arange(3), 6)
    alike = (layer[:, None] == layer) & ~np.eye(18, dtype=bool)
    assert np.allclose(found["within"][0], single[0][alike].mean(), atol=1e-6)
    assert found["divergence"].sel(head="L0H1", other="L2H5") == pytest.approx(
        float(np.mean(single, 0)[1, 17]), abs=1e-5)
    with pytest.raises(PromptError, match="2 to 128 tokens, not 200"):
        head_clusters.measure(model, [interp.Prompt.from_tokens(range(200))])
