"""Clouds whose geometry is known: dimensions, neighborhoods, cosines, shuffled blocks, loss."""

import sys

import numpy as np
import pytest
import torch

import interp
from interp.core import Prompt, PromptError, UndertowError
from interp.figures.style import canvas
from interp.models.model import Model
from probes import geometry, token_loss
from probes.block_shuffle import reordered
from probes.layer_correlation import rank_correlation


def cloud(seed=0, n=300, d=5):
    return np.random.default_rng(seed).standard_normal((n, d))


@pytest.mark.parametrize("d", [2, 6])
def test_the_smallest_scale_is_two_nn_and_both_are_the_closed_form(d):
    X = cloud(d, 400, d)
    far = np.linalg.norm(X[:, None] - X[None], axis=2)
    r = np.sort(far, axis=1)
    closed = (len(X) - 1) / np.log(r[:, 2] / r[:, 1]).sum()
    assert geometry.two_nn(X).value == pytest.approx(closed, rel=1e-9)
    # scikit-dimension cuts ratios above the median + 20 times its distance to the 95th percentile.
    ratio = r[:, 2] / r[:, 1]
    cut = ratio[ratio < np.median(ratio) + 20 * (np.percentile(ratio, 95) - np.median(ratio))]
    kept = (len(cut) - 1) / np.log(cut).sum()
    assert geometry.gride(X).value == pytest.approx(kept, rel=1e-9)
    assert geometry.gride(X, 1, 2).value == geometry.gride(X).value


def test_known_estimates_on_gaussian_clouds():
    """Numbers of the method card: high dimensions are underestimated, more so at larger scales."""
    for d, two, tail, eight, most in ((5, 5.2, 5.1, 5.0, 4.7), (30, 21.2, 20.9, 18.0, 15.2)):
        X = cloud(1, 1000, d)
        assert geometry.two_nn(X).value == pytest.approx(two, rel=0.09)
        assert geometry.two_nn(X, method="linear", discard=0.8).value == pytest.approx(tail, rel=0.2)
        assert geometry.gride(X, 8).value == pytest.approx(eight, rel=0.06)
        assert geometry.gride(X, 32).value == pytest.approx(most, rel=0.06)


def test_all_scales_at_once_are_those_one_by_one_and_too_large_ones_are_missing():
    X = np.concatenate([cloud(3, 40, 4), cloud(3, 40, 4)[:5]])
    found = geometry.gride_scales(X, (1, 2, 4, 32))
    assert found[:3] == pytest.approx([geometry.gride(X, n).value for n in (1, 2, 4)])
    assert np.isnan(found[3]) and np.isnan(geometry.gride(X, 32).value)
    assert geometry.gride_scales(X, (3,))[0] == geometry.gride(X, 3).value


def test_the_dimension_is_that_of_the_cloud_not_of_the_space():
    X = cloud(2, 400, 3)
    basis = np.linalg.qr(cloud(3, 40, 3))[0]
    expected = geometry.two_nn(X).value
    assert geometry.two_nn(7 + 0.01 * X @ basis.T).value == pytest.approx(expected, rel=1e-5)


def test_copies_are_kept_once_and_counted():
    X = cloud(4, 200, 4)
    copied = np.concatenate([X, X[:100], X[:50] + 1e-12])
    found = geometry.two_nn(copied[np.random.default_rng(0).permutation(350)])
    assert found.kept == pytest.approx(200 / 350) and found.n == 200
    assert found.value == pytest.approx(geometry.two_nn(X).value, rel=1e-6)


def test_what_has_no_dimension_says_why():
    assert "different points" in geometry.two_nn(np.ones((9, 3))).reason
    equidistant = geometry.two_nn(np.eye(8))
    assert np.isnan(equidistant.value) and "as far" in equidistant.reason
    assert "neighbor number 16" in geometry.gride(cloud(n=12), 8).reason
    with pytest.raises(ValueError, match="not numbers"):
        geometry.two_nn(np.array([[0.0], [np.nan], [1.0]]))
    with pytest.raises(ValueError, match="the second must be the farther"):
        geometry.gride(cloud(), 4, 4)


def test_a_missing_extra_is_one_sentence(monkeypatch):
    monkeypatch.setitem(sys.modules, "skdim.id", None)
    with pytest.raises(UndertowError, match=r'pip install "undertow\[probes\]"'):
        geometry.two_nn(cloud())


def test_overlap_is_one_for_the_same_neighbors_and_chance_for_others():
    n, k = 300, 20
    A = cloud(5, n)
    assert geometry.overlap(A, 3 - 2 * A @ np.linalg.qr(cloud(6, 5, 5))[0], k) == 1
    other = [geometry.overlap(A, cloud(10 + s, n, 7), k) for s in range(8)]
    assert np.mean(other) == pytest.approx(k / (n - 1), rel=0.05)
    # By hand: sets of nearest others.
    B = A + 0.5 * cloud(7, n)
    near = [np.argsort(np.linalg.norm(X[:, None] - X[None], axis=2), 1)[:, 1 : k + 1] for X in (A, B)]
    by_hand = np.mean([len(set(a) & set(b)) / k for a, b in zip(*near)])
    assert geometry.overlap(A, B, k) == pytest.approx(by_hand)
    with pytest.raises(ValueError, match="at most 299"):
        geometry.neighbors(A, 300)


def test_cosine_is_the_mean_over_pairs():
    X = cloud(8, 40, 6) + 1
    unit = X / np.linalg.norm(X, axis=1, keepdims=True)
    pairs = (unit @ unit.T)[np.triu_indices(40, 1)]
    assert geometry.mean_cosine(X) == pytest.approx(pairs.mean())
    shifted = geometry.mean_cosine(X + 100, centered=True)
    assert shifted == pytest.approx(geometry.mean_cosine(X, centered=True), abs=1e-9)
    assert geometry.mean_cosine(X) > 0.3 > abs(shifted)


@pytest.mark.parametrize("n", [30, 200])
def test_anisotropy_is_the_first_share_of_variance(n):
    X = cloud(9, n, 80) * np.array([5.0] + [1.0] * 79)
    values = np.linalg.svd(X - X.mean(0), compute_uv=False) ** 2
    assert geometry.anisotropy(X) == pytest.approx(values[0] / values.sum())


def test_blocks_are_permuted_and_left_whole():
    rng = np.random.default_rng(0)
    assert geometry.shuffled_blocks(17, 0, rng).tolist() == list(range(17))
    order = geometry.shuffled_blocks(64, 2, rng)
    starts = order.reshape(16, 4)
    assert (np.diff(starts, axis=1) == 1).all() and sorted(order) == list(range(64))
    assert (starts[:, 0] % 4 == 0).all() and (order != np.arange(64)).any()
    with pytest.raises(ValueError, match="4\\^3 = 64 blocks"):
        geometry.shuffled_blocks(63, 3, rng)


@pytest.fixture(scope="module")
def model(tiny):
    return Model(tiny("llama"), "llama")


def test_measured_quantities_are_those_of_the_states(model):
    rng = np.random.default_rng(3)
    prompts = [Prompt.from_tokens([1, *rng.integers(3, 90, n)]) for n in (20, 23, 20)]
    found = geometry.measure(model, prompts, levels=(0, 2), k=5, scales=(1, 4), batch_size=2)
    states = model.run(prompts[1], read=("resid_post", "resid_pre.0")).reads
    after = states["resid_post"].values[0, :, 1:24].astype(float)
    here = found.data.isel(prompt=1, level=0)
    assert here["layer"].values.tolist() == [-1, 0, 1, 2] and found["dimension"].shape == (3, 2, 4)
    assert float(here["dimension"].sel(layer=1)) == pytest.approx(geometry.two_nn(after[1]).value)
    assert float(here["scale_dimension"].sel(layer=1, scale=4)) == pytest.approx(
        geometry.gride(after[1], 4).value)
    assert float(here["overlap"].sel(layer=1)) == geometry.overlap(after[1], after[2], 5)
    assert np.isnan(here["overlap"].sel(layer=2))
    before = states["resid_pre.0"].values[0, 0, 1:24].astype(float)
    assert float(here["cosine"].sel(layer=-1)) == pytest.approx(geometry.mean_cosine(before))
    distinct = len(set(prompts[1].ids[1:])) / 23
    assert float(here["kept"].sel(layer=-1)) == pytest.approx(distinct)
    assert float(here["type_token_ratio"]) == pytest.approx(distinct)
    logits = model.run(prompts[1]).logits[0]
    loss = torch.nn.functional.cross_entropy(logits[:-1], torch.tensor(prompts[1].ids[1:]))
    assert float(here["loss"]) == pytest.approx(float(loss), rel=1e-5)
    ax = geometry.draw(found, canvas()[1], of="overlap")
    assert len(ax.lines) == 2 and len(ax.lines[0].get_xdata()) == 3


def test_shuffling_moves_tokens_but_neither_the_first_nor_the_words(model):
    prompt = Prompt.from_tokens([1, *range(10, 42)])
    moved = reordered(prompt, tuple(range(1, 33)),
                                geometry.shuffled_blocks(32, 2, np.random.default_rng(1)))
    assert moved.ids[0] == 1 and sorted(moved.ids) == sorted(prompt.ids) and moved.ids != prompt.ids
    with pytest.raises(PromptError, match="at least four"):
        geometry.measure(model, [Prompt.from_tokens([1, 2, 3])])


def test_words_alone_pay_for_what_they_do_not_know():
    texts = [Prompt.from_tokens([0, *row]) for row in ([5, 5, 6], [5, 6, 6], [7, 7, 7])]
    cost = token_loss.frequency_loss(texts, [(1, 2, 3)] * 3)
    # Others of the last text: 5 5 6 5 6 6, and one more of each of three kinds.
    assert cost[2] == pytest.approx(-np.log(1 / 9))
    assert cost[0] == pytest.approx(-np.log([2 / 9, 2 / 9, 3 / 9]).mean())


def test_an_untrained_model_is_told_apart():
    reader = interp.open_model("reader")
    from interp.organisms import reader as language

    rows = language.sample(np.random.default_rng(0), 8, 48, repeated=0.0)[0]
    texts = [Prompt.from_tokens(row) for row in rows]
    places = [token_loss.content_places(reader, p) for p in texts]
    words = token_loss.frequency_loss(texts, places)
    for one, knows in ((reader, True), (geometry_null(reader), False)):
        loss = np.array([np.nanmean(row) for row in token_loss.token_losses(one, texts)])
        assert bool(token_loss.why_untrained(one, loss, words)) != knows


def geometry_null(model):
    from probes.nulls import reinitialized

    return reinitialized(model, seed=0)


def test_rank_correlation_is_spearmans_and_holds_constant_what_it_is_told():
    from scipy import stats

    rng = np.random.default_rng(0)
    cause = rng.standard_normal(80)
    x = np.stack([cause + 0.3 * rng.standard_normal(80), rng.standard_normal(80), np.ones(80)], 1)
    y = cause + 0.3 * rng.standard_normal(80)
    found = rank_correlation(x, y)
    assert float(found["correlation"][0]) == pytest.approx(stats.spearmanr(x[:, 0], y)[0])
    assert float(found["p"][0]) < 0.01 and np.isnan(found["correlation"][2])
    partial = rank_correlation(x, y, np.stack([cause, 3 * cause + 1], 1))
    a, b, c = (stats.rankdata(v) for v in (x[:, 0], y, cause))
    r = np.corrcoef([a, b, c])
    by_hand = (r[0, 1] - r[0, 2] * r[1, 2]) / np.sqrt((1 - r[0, 2] ** 2) * (1 - r[1, 2] ** 2))
    assert float(partial["correlation"][0]) == pytest.approx(by_hand)
    assert abs(by_hand) < 0.3 < float(found["correlation"][0])


def test_the_best_of_many_layers_by_chance_is_no_finding():
    low = 0
    for seed in range(60):
        rng = np.random.default_rng(seed)
        found = rank_correlation(rng.standard_normal((30, 24)), rng.standard_normal(30),
                                 permutations=99, seed=seed)
        low += bool(found["p"].min() <= 0.05)
    # Nominal 3; uncorrected, most of the sixty.
    assert low <= 9
