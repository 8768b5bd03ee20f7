"""Probes at an offset: scikit-learn's where small, aligned within documents, erasure where planted."""

import numpy as np
import pytest
from sklearn.linear_model import LogisticRegression
from sklearn.utils.estimator_checks import parametrize_with_checks

from probes import token_erasure, token_offsets
from probes.linear import logistic
from probes.token_offsets import OFFSETS, TokenOffsetProbe, measure


@parametrize_with_checks([TokenOffsetProbe(), TokenOffsetProbe(solver="adamw", epochs=20)])
def test_it_is_a_scikit_learn_classifier(estimator, check):
    check(estimator)


def texts(seed, count=6, length=40, words=5, width=7, noise=0.1):
    """Documents whose states hold their own token, the one before it, and the one before that."""
    rng = np.random.default_rng(seed)
    codes = np.random.default_rng(99).standard_normal((3, words, width))
    ids = [rng.integers(words, size=length) for _ in range(count)]
    states = []
    for row in ids:
        x = codes[0][row].copy()
        for back in (1, 2):
            x[back:] += codes[back][row[:-back]]
        states.append(x + noise * rng.standard_normal(x.shape))
    return states, ids


@pytest.mark.parametrize("words", [2, 5])
@pytest.mark.parametrize("offset", [0, -1, 1])
def test_exact_probes_are_scikit_learns_logistic_regression(offset, words):
    states, ids = texts(0, words=words)
    probe = TokenOffsetProbe(offset, C=0.7).fit(states, ids)
    X = np.concatenate([x[max(0, -offset): len(x) - max(0, offset)] for x in states])
    y = np.concatenate([t[max(0, offset): len(t) + min(0, offset)] for t in ids])
    other = logistic(0.7).set_params(logisticregression__tol=1e-10).fit(X, y)
    assert isinstance(other[-1], LogisticRegression)
    assert np.allclose(probe.predict_proba(X), other.predict_proba(X), atol=1e-4)


@pytest.mark.parametrize("offset", [0, -2, 1])
def test_every_probability_is_that_of_the_right_token(offset):
    """No document leaks into the next, and nothing is read beyond its ends."""
    states, ids = texts(1)
    probe = TokenOffsetProbe(offset).fit(states[:4], ids[:4])
    found, right = probe.predict_proba_of(states[5], ids[5]), probe.correct(states[5], ids[5])
    full = probe.predict_proba(states[5])
    for t in range(40):
        if not 0 <= t + offset < 40:
            assert np.isnan(found[t]) and np.isnan(right[t])
            continue
        column = int(np.flatnonzero(probe.classes_ == ids[5][t + offset])[0])
        assert found[t] == full[t, column] and right[t] == (full[t].argmax() == column)
    # States hold what came before, and nothing of what comes next.
    assert (np.nanmean(right) > 0.8) == (offset <= 0)


def test_a_joined_text_is_not_two_documents():
    states, ids = texts(2, count=2)
    apart = TokenOffsetProbe(-1).fit(states, ids)
    joined = TokenOffsetProbe(-1).fit(np.concatenate(states), np.concatenate(ids))
    assert not np.allclose(apart.coef_, joined.coef_)


def test_descent_comes_close_to_the_exact_solution_and_full_rank_to_no_rank():
    states, ids = texts(3, count=12, noise=0.8)
    held, gold = texts(4, noise=0.8)

    def loss(**more):
        probe = TokenOffsetProbe(-1, **more).fit(states, ids)
        return -np.mean([np.nanmean(np.log(probe.predict_proba_of(x, t))) for x, t in zip(held, gold)])

    exact, descended = loss(solver="exact"), loss(solver="adamw", epochs=30, batch_size=64)
    assert abs(descended - exact) < 0.05
    assert loss(solver="adamw", epochs=30, batch_size=64, rank=4) == pytest.approx(descended, abs=0.05)
    assert loss(solver="adamw", epochs=30, batch_size=64, rank=1) > descended + 0.2


def test_rare_tokens_are_left_out_and_not_scored():
    states, ids = texts(5)
    ids[0][3] = 77
    probe = TokenOffsetProbe(0, fewest=2).fit(states, ids)
    assert 77 not in probe.classes_
    found = probe.predict_proba_of(states[0], ids[0])
    assert np.isnan(found[3]) and np.isfinite(np.delete(found, 3)).all()
    with pytest.raises(ValueError, match="occur.* at least 500 time"):
        TokenOffsetProbe(0, fewest=500).fit(states, ids)


def test_bad_input_is_one_sentence():
    states, ids = texts(6, count=2)
    with pytest.raises(ValueError, match="40 states and 39 tokens"):
        TokenOffsetProbe(-1).fit([states[0]], [ids[0][:39]])
    with pytest.raises(ValueError, match="NaN"):
        TokenOffsetProbe(-1).fit([np.full_like(states[0], np.nan)], [ids[0]])
    with pytest.raises(ValueError, match="choose 'auto'"):
        TokenOffsetProbe(solver="sgd").fit(states, ids)
    with pytest.raises(ValueError, match="lies in training and test"):
        measure(np.zeros((1, 6, 2)), np.arange(6), np.zeros(6, int), np.arange(6) < 3, layers=[0])


# -- planted erasure ------------------------------------------------------------------------------


def planted(erases, seed=0, count=30):
    """Two layers of documents of words and of three-token items; in the second layer the last token
    of an item forgets all three (or, in the twin, nothing)."""
    rng, width = np.random.default_rng(seed), 24
    codes = rng.standard_normal((3, 12, width))
    ids, items, states, documents = [], [], [], []
    for d in range(count):
        row: list[int] = []
        while len(row) < 40:
            if rng.random() < 0.35:
                items.append((d, len(row), len(row) + 2))
                row += rng.integers(12, size=3).tolist()
            else:
                row.append(int(rng.integers(12)))
        row = row[:44]
        items = [(i, p, q) for i, p, q in items if i < d or q < len(row)]
        x = codes[0][row].copy()
        for back in (1, 2):
            x[back:] += codes[back][row[:-back]]
        y = x + 0.3 * rng.standard_normal(x.shape)
        for i, _, q in items:
            if i == d and erases:
                y[q] = 0.3 * rng.standard_normal(width)
        states.append(np.stack([x + 0.3 * rng.standard_normal(x.shape), y]))
        ids += row
        documents += [d] * len(row)
    return np.concatenate(states, 1), np.array(ids), np.array(documents), items


@pytest.mark.parametrize("erases", [True, False])
def test_planted_erasure_is_found_and_its_twin_is_clean(erases):
    states, ids, documents, items = planted(erases)
    found = measure(states, ids, documents, documents < 15, layers=[0, 1], offsets=OFFSETS,
                    solver="exact")
    first = {d: int(np.flatnonzero(documents == d)[0]) for d in range(30)}
    spans = {d: [(p, q) for i, p, q in items if i == d] for d in range(15, 30)}
    ends = np.array([first[d] + q for d, own in spans.items() for _, q in own])
    inside = np.zeros(len(ids), bool)
    for d, p, q in items:
        inside[first[d] + p: first[d] + q + 1] = True
    drop = found["probability"].sel(layer=0) - found["probability"].sel(layer=1)
    for k in OFFSETS:
        pairs = token_erasure.matched_pairs(ids, documents, ends, ~inside & (documents >= 15), k)
        gap = drop.sel(offset=k).values
        apart = np.nanmean(gap[pairs[:, 0]] - gap[pairs[:, 1]])
        assert len(pairs) > 20 and (apart > 0.4 if erases else abs(apart) < 0.1)
    recalled, random = [], []
    rng = np.random.default_rng(0)
    for d, own in spans.items():
        rows = documents == d
        delta = token_offsets.erasure(*(
            {k: found["probability"].sel(layer=layer, offset=k).values[rows] for k in OFFSETS}
            for layer in (0, 1)))
        for drops, into in ((delta, recalled), (token_erasure.shuffled(delta, rng), random)):
            taken = {(p, q) for p, q, _ in token_offsets.segment(token_offsets.span_scores(drops))}
            into += [span in taken for span in own]
    if erases:
        assert np.mean(recalled) > 0.7 > 3 * np.mean(random)
    else:
        assert np.mean(recalled) < 0.25


# -- what it is compared with ---------------------------------------------------------------------


def test_matched_positions_are_ordinary_distinct_and_read_the_same_token():
    rng = np.random.default_rng(1)
    ids, documents = rng.integers(6, size=200), np.repeat(np.arange(8), 25)
    ordinary = rng.random(200) < 0.6
    ends = np.flatnonzero(~ordinary)[:40]
    for k in (0, -1, -2):
        pairs = token_erasure.matched_pairs(ids, documents, ends, ordinary, k)
        assert len(pairs) > 20 and len(set(pairs[:, 1])) == len(pairs)
        assert ordinary[pairs[:, 1]].all() and set(pairs[:, 0]) <= set(ends)
        assert (ids[pairs[:, 0] + k] == ids[pairs[:, 1] + k]).all()
        assert (documents[pairs + k] == documents[pairs]).all()
        near = token_erasure.matched_pairs(ids, documents, ends, ordinary, k, same_token=False)
        assert (documents[near[:, 0]] == documents[near[:, 1]]).all()


def test_what_is_hardly_read_at_the_start_is_no_match():
    """All forget half of what they had: by probability the well-read items seem to forget more, and
    beside positions that are read as well they do not."""
    n = 120
    ends = np.arange(0, n, 6)
    start = np.full(n, 0.3)
    start[ends] = start[3::6] = 0.9
    drop, ordinary = start / 2, np.arange(n) % 6 != 0
    ids, documents = np.zeros(n, int), np.repeat(np.arange(4), 30)
    for level, apart in ((None, 0.3), (start, 0.0)):
        pairs = token_erasure.matched_pairs(ids, documents, ends, ordinary, 0, level=level)
        assert len(pairs) == len(ends)
        assert np.mean(drop[pairs[:, 0]] - drop[pairs[:, 1]]) == pytest.approx(apart, abs=1e-9)
    # With no such position left, and with what was not read at all, there is no pair.
    rare = token_erasure.matched_pairs(ids, documents, ends, ordinary & (start < 0.5), 0, level=start)
    assert rare.shape == (0, 2)
    unread = np.where(np.arange(n) < 60, np.nan, start)
    assert (token_erasure.matched_pairs(ids, documents, ends, ordinary, 0, level=unread) >= 60).all()


def test_random_spans_have_the_length_and_are_no_items():
    spans = [(0, 2), (5, 6), (7, 7)]
    drawn = token_erasure.random_spans(spans, 9, np.random.default_rng(0), draws=50)
    for (p, q), others in zip(spans, drawn):
        assert {b - a for a, b in others} == {q - p} and not set(others) & set(spans)
        assert all(0 <= a <= b < 9 for a, b in others) and len(others) == len(set(others))


def test_shuffled_drops_move_together():
    delta = {k: np.arange(20.0) + 100 * k for k in OFFSETS}
    delta[-1][0] = delta[-2][:2] = np.nan
    moved = token_erasure.shuffled(delta, np.random.default_rng(0))
    assert np.array_equal(moved[0][2:] - moved[-1][2:], np.full(18, 100.0))
    assert np.array_equal(np.isnan(moved[-2]), np.isnan(delta[-2]))
    assert not np.array_equal(moved[0], delta[0])
