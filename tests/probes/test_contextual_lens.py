"""Neighbors are scikit-learn's, banks hold what they should, hubs are seen and mended."""

import numpy as np
import pandas as pd
import pytest
from sklearn.neighbors import NearestNeighbors
from sklearn.utils.estimator_checks import parametrize_with_checks

import interp
from interp.core import OutOfRange, Prompt, PromptError
from probes import contextual_lens, neighbors
from probes.contextual_lens import ContextualBank, agreement, bank_layers, build, contexts
from probes.nulls import layer_states
from probes.store import extract


@parametrize_with_checks([ContextualBank(n_neighbors=2)])
def test_scikit_learn_s_contract(estimator, check):
    check(estimator)


def clouds(seed=0, queries=23, bank=211, d=7):
    rng = np.random.default_rng(seed)
    return rng.standard_normal((queries, d)) + 0.5, rng.standard_normal((bank, d)) + 0.5


@pytest.mark.parametrize("piece", [1, 64, 1 << 24])
def test_neighbors_are_those_of_scikit_learn_however_the_bank_is_cut(monkeypatch, piece):
    monkeypatch.setattr(neighbors, "PIECE", piece * 23)
    X, bank = clouds()
    distance, index = ContextualBank(n_neighbors=6).fit(bank).kneighbors(X)
    theirs, them = NearestNeighbors(n_neighbors=6, metric="cosine").fit(bank).kneighbors(X)
    assert (index == them).all() and np.allclose(distance, theirs, atol=1e-10)
    # Length means nothing; the order of pieces means nothing.
    longer = bank * np.random.default_rng(1).uniform(0.1, 9, (len(bank), 1))
    assert (ContextualBank(n_neighbors=6).fit(longer).kneighbors(3 * X)[1] == them).all()
    cut, at = neighbors.cosine_neighbors(X, [bank[:5], bank[5:200], bank[200:]], 6)
    assert (at.numpy() == them).all() and np.allclose(1 - cut.numpy(), theirs)


@pytest.mark.parametrize("piece", [9, 1 << 24])
def test_corrections_are_those_of_a_naive_loop(monkeypatch, piece):
    monkeypatch.setattr(neighbors, "PIECE", piece * 23)
    X, bank = clouds(1)
    cosine = (X / np.linalg.norm(X, axis=1, keepdims=True)) @ (
        bank / np.linalg.norm(bank, axis=1, keepdims=True)).T
    reach, k = 4, 3
    r_x = np.sort(cosine, 1)[:, -reach:].mean(1)
    r_y = np.sort(cosine, 0)[-reach:].mean(0)
    score = 2 * cosine - r_x[:, None] - r_y[None]
    similarity, index = neighbors.cosine_neighbors(X, bank, k, correction="csls", reach=reach)
    best = np.argsort(-score, 1)[:, :k]
    assert (index.numpy() == best).all()
    assert np.allclose(similarity.numpy(), np.take_along_axis(score, best, 1))
    similarity, index = neighbors.cosine_neighbors(X, bank, k, correction="mutual", reach=reach)
    for i in range(len(X)):
        own = [j for j in np.argsort(-cosine[i])
               if i in np.argsort(-cosine[:, j])[:reach]][:k]
        assert index[i, : len(own)].tolist() == own
        assert (index[i, len(own):] == -1).all() and similarity[i, len(own):].isnan().all()


def test_a_hub_is_seen_and_mended():
    rng = np.random.default_rng(2)
    X = rng.standard_normal((300, 60)) + 0.6
    bank = np.concatenate([rng.standard_normal((400, 60)) + 0.6, np.ones((1, 60)) * 5])
    plain = neighbors.cosine_neighbors(X, bank, 1)[1].numpy()
    mended = neighbors.cosine_neighbors(X, bank, 1, correction="csls")[1].numpy()
    assert np.bincount(plain.ravel()).argmax() == 400
    counts = neighbors.occurrences(plain, 401)
    assert counts.sum() == 300 and counts[400] > 10 * np.median(counts[counts > 0])
    skew = neighbors.hub_skew(plain, 401)
    assert skew > neighbors.hub_skew_by_chance(300, 1, 401).max()
    assert neighbors.hub_skew(mended, 401) < skew / 2
    assert neighbors.occurrences(mended, 401)[400] < counts[400] / 3


def texts(seed=0, count=12, length=9):
    rng = np.random.default_rng(seed)
    return [Prompt.from_tokens(rng.integers(3, 12, length)) for _ in range(count)]


def test_contexts_skip_the_start_and_equal_beginnings_and_cap_every_token():
    given = [*texts(), Prompt.from_tokens([*texts()[0].ids[:6], 20, 3, 3]), texts()[1]]
    found = contexts(given, per_token=10_000)
    assert found[-1] == () and min(found[-2]) == 6
    assert all(min(places) == 2 for places in found[:12])
    beginnings = [p.ids[: i + 1] for p, places in zip(given, found) for i in places]
    assert len(set(beginnings)) == len(beginnings)
    few = contexts(given, per_token=3)
    said = np.bincount([p.ids[i] for p, places in zip(given, few) for i in places])
    all_said = np.bincount([p.ids[i] for p, places in zip(given, found) for i in places])
    assert (said == np.minimum(all_said, 3)).all()
    # Where later words are seen too, only equal texts have equal states.
    assert len(contexts(given, per_token=10_000, causal=False)[-2]) == 7
    marked = [given[0].with_segments(image=(2, 6))]
    assert contexts(marked)[0] == (6, 7, 8)


def test_a_bank_holds_the_model_s_own_states_in_memory_and_on_disk(tmp_path):
    model = interp.open_model("backcopy-3l")
    given, asked = texts(count=7), texts(5, count=2)
    bank = build(model, given, layers=[0, 2], n_neighbors=4, per_token=5)
    kept = build(model, given, layers=[0, 2], n_neighbors=4, per_token=5, folder=tmp_path / "bank")
    pd.testing.assert_frame_equal(
        bank.rows_[["prompt", "position", "token", "layer"]],
        kept.rows_[["prompt", "position", "token", "layer"]], check_dtype=False)
    states = model.run(given, read="resid_post", logits="none").reads["resid_post"].values
    for number in (0, len(bank.rows_) - 1):
        row = bank.rows_.iloc[number]
        assert np.allclose(bank.bank_[number], states[row.prompt, row.layer, row.position], atol=1e-5)
        assert given[row.prompt].ids[row.position] == row.token
    X = layer_states(model, asked, "all", layers=[2], embedding=False).values[0]
    for layers in (None, [2]):
        near, index = bank.kneighbors(X, layers=layers)
        same, there = kept.kneighbors(X, layers=layers)
        assert (index == there).all() and np.allclose(near, same, atol=1e-5)
    assert set(bank.rows_["layer"].iloc[index.ravel()]) == {2}
    # A state of the bank is nearest to itself.
    assert (bank.kneighbors(bank.bank_, 1)[1][:, 0] == np.arange(len(bank.rows_))).all()
    with pytest.raises(ValueError, match="needs 'resid_post'"):
        ContextualBank().fit(extract(model, given, tmp_path / "other", "mlp_out", progress=False))


def test_layers_are_those_of_the_released_bank():
    assert bank_layers(32) == (0, 1, 3, 7, 15, 23, 29, 30)
    for n in range(1, 60):
        layers = bank_layers(n)
        assert layers and max(layers) <= max(n - 2, 0) and len(set(layers)) == len(layers)


def test_agreement_counts_own_words_and_those_of_other_pictures():
    rng = np.random.default_rng(3)
    found, groups = rng.integers(0, 9, (40, 3)), rng.integers(0, 6, 40)
    words = [rng.choice(9, 2, replace=False).tolist() for _ in range(40)]
    own, other = agreement(found, words, groups.tolist())
    for i in range(40):
        said = set(found[i])
        assert own[i] == bool(said & set(words[i]))
        assert other[i] == pytest.approx(np.mean(
            [bool(said & set(words[j])) for j in range(40) if groups[j] != groups[i]]))
    # A reader that always says the same has no lift, whatever it says.
    same = np.tile([1, 2, 3], (4000, 1))
    many = rng.integers(0, 9, (4000, 1)).tolist()
    own, other = agreement(same, many, list(range(4000)))
    assert abs(own.mean() - other.mean()) < 1e-3
    assert np.isnan(agreement(found, words, [0] * 40)[1]).all()


def test_what_cannot_be_done_is_said_in_one_sentence():
    X, bank = clouds()
    with pytest.raises(ValueError, match="the bank has 211 vectors"):
        neighbors.cosine_neighbors(X, bank, 300)
    with pytest.raises(ValueError, match="vector of zeros"):
        neighbors.cosine_neighbors(X, bank * 0, 1)
    with pytest.raises(ValueError, match="not numbers"):
        neighbors.cosine_neighbors(X * np.nan, bank, 1)
    with pytest.raises(ValueError, match="7 coordinates"):
        neighbors.cosine_neighbors(X, bank[:, :3], 1)
    with pytest.raises(ValueError, match="rows for 211 vectors"):
        ContextualBank().fit(bank, rows=["a"])
    with pytest.raises(ValueError, match="needs a word"):
        agreement(np.array([[1]]), [[]], [0])
    model = interp.open_model("backcopy-1l")
    with pytest.raises(PromptError, match="more than 2 tokens"):
        build(model, [Prompt.from_tokens([3, 4])])
    with pytest.raises(OutOfRange):
        build(model, texts(), layers=[contextual_lens.EMBEDDING, 7])
