"""K, error types, choices, exact answers and selective prediction against naive definitions."""

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import ortho_group
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import roc_auc_score, roc_curve

from interp.organisms import reader
from probes.exact_answer import Exact, Log, find, mention, places
from probes.held_out import held_out
from probes.knowledge import (
    TYPES,
    choose,
    error_type,
    features,
    knowledge,
    majority,
    relative_gap,
    said,
)
from probes.selective import excess_aurc, risk_coverage, tpr_at_fpr
from probes.truth_subspace import SubspaceAlignment, basis, overlap


def test_k_is_the_area_under_the_curve_of_every_question():
    rng = np.random.default_rng(0)
    of = rng.integers(12, size=150)
    y, s = rng.integers(2, size=150), rng.integers(5, size=150) / 4
    found = knowledge(s, y, of)
    for name, k, star in zip(found.questions, found.k, found.perfect):
        mine = of == name
        assert k == pytest.approx(roc_auc_score(y[mine], s[mine]), abs=1e-12)
        pairs = [(a, b) for a in s[mine & (y == 1)] for b in s[mine & (y == 0)]]
        assert star == all(a > b for a, b in pairs)
    # Questions count alike, however many candidates they have.
    assert found.mean == pytest.approx(np.mean(found.k))
    monotone = knowledge(np.exp(3 * s) - 7, y, of)
    np.testing.assert_array_equal(monotone.k, found.k)
    assert knowledge([1.0, 1.0], [1, 0], ["q", "q"]).perfect.tolist() == [0.0]
    with pytest.raises(ValueError, match="not numbers"):
        knowledge([np.nan, 1.0], [1, 0], ["q", "q"])


def test_a_question_without_both_kinds_is_dropped_and_named():
    found = knowledge([1.0, 2.0, 3.0], [1, 1, 0], ["a", "a", "b"])
    assert found.questions == () and found.dropped == ("a", "b") and np.isnan(found.mean)


def test_planted_hidden_knowledge_is_found_and_a_twin_has_none():
    """States hold the truth, probabilities are noise; in the twin both are the same."""
    rng = np.random.default_rng(1)
    of = np.repeat(np.arange(60), 6)
    y = np.tile([1, 0, 0, 0, 1, 0], 60)
    noise = rng.standard_normal(360)
    outside = said([[x] for x in noise])
    for hidden in (True, False):
        states = rng.standard_normal((3, 360, 8))
        states[1, :, 0] = 3 * y if hidden else noise
        inside = held_out(states, y, groups=of).scores
        fitted = held_out(features(outside, np.ones(360)), y, groups=of).scores
        a, b = knowledge(inside, y, of), knowledge(fitted, y, of)
        gap = relative_gap(a.k, b.k, resamples=500)
        assert (gap.interval[0] > 0.3) == hidden
        assert abs(b.mean - 0.5) < 0.12


def test_outer_scores_are_sums_over_tokens():
    found = said([[-1.0, -2.0, -6.0], [-0.5]], true=[0.2, 0.9])
    assert found["sum"].tolist() == [-9.0, -0.5] and found["mean"].tolist() == [-3.0, -0.5]
    assert found["min"].tolist() == [-6.0, -0.5] and found["max"].tolist() == [-1.0, -0.5]
    assert features(found, [3, 1]).shape == (1, 2, 6)
    with pytest.raises(ValueError, match="without tokens"):
        said([[-1.0], []])


def test_choices_against_a_loop():
    rng = np.random.default_rng(2)
    of, y = np.repeat(np.arange(20), 5), rng.integers(2, size=100)
    s, may = rng.standard_normal(100), rng.random(100) < 0.6
    found = choose(s, y, of, may)
    for name in range(20):
        own = [i for i in range(100) if of[i] == name and may[i]]
        if own:
            assert found[name] == y[max(own, key=lambda i: s[i])]
        else:
            assert name not in found
    assert choose([-np.inf, np.nan], [1, 0], ["a", "a"]) == {"a": 1.0}


def test_every_bag_of_samples_is_of_one_type():
    seen = set()
    for bag in itertools.product(["a", "b", "c", "d", None], repeat=6):
        kind = error_type(bag, {"a"})
        seen.add(kind)
        good, refused = bag.count("a"), bag.count(None)
        assert kind in TYPES
        assert (kind == "always right") == (good == 6)
        assert (kind == "no answer") == (refused > 3)
        assert (kind == "always wrong") == (max(bag.count(x) for x in "bcd") == 6)
    assert seen == set(TYPES)
    assert majority(["x", None, None]) == "x"
    with pytest.raises(ValueError, match="at least one"):
        error_type([], {"a"})


def test_exact_answers_by_offsets():
    tokenizer = reader.tokenizer()
    ids = [reader.TOKEN[w] for w in "the river note amber seven ten two ; recall".split()]
    log = Log()
    found = find(tokenizer, ids, ["one two three", "seven ten two"], log=log)
    assert found == Exact("seven ten two", 4, 6)
    assert [reader.WORDS[i] for i in ids[found.first : found.last + 1]] == ["seven", "ten", "two"]
    at = places(found, len(ids))
    assert at == {"last question": -1, "first answer": 0, "before exact": 3, "first exact": 4,
                  "last exact": 6, "after exact": 7, "last answer": 8}
    assert find(tokenizer, ids, ["ten ten"], log=log) is None
    assert find(tokenizer, [], [], log=log) is None
    assert (log.n, log.rate) == (3, 2 / 3) and "1 nothing said" in str(log)


@pytest.mark.parametrize("text, answers, expected", [
    ("Paris, or Lyon", ["Lyon", "Paris"], "Paris"),
    ("the U.S. of course", ["U.S.", "U"], "U.S."),
    ("Nigeria", ["Niger"], None),
    ("it is NEW DELHI.", ["New Delhi", "New"], "NEW DELHI"),
])
def test_mentions_are_whole_words(text, answers, expected):
    span = mention(text, answers)
    assert (span and text[slice(*span)]) == expected


def naive_aurc(sure, right):
    """Mean over all orders among ties."""
    found = []
    for order in itertools.permutations(range(len(sure))):
        if all(sure[a] >= sure[b] for a, b in itertools.pairwise(order)):
            wrong = np.cumsum([1 - right[i] for i in order])
            found.append((wrong / np.arange(1, len(sure) + 1)).mean())
    return np.mean(found)


@given(st.lists(st.tuples(st.integers(0, 2), st.integers(0, 1)), min_size=1, max_size=6))
def test_aurc_is_the_mean_over_orders_of_ties(rows):
    sure, right = zip(*rows)
    assert risk_coverage(sure, right).aurc == pytest.approx(naive_aurc(sure, right), abs=1e-12)


def test_selective_prediction():
    rng = np.random.default_rng(3)
    right = rng.random(400) < 0.7
    perfect, useless = risk_coverage(right, right), risk_coverage(np.zeros(400), right)
    assert perfect.at(0.0) == pytest.approx(right.mean()) and excess_aurc(right, right) == 0
    np.testing.assert_allclose(useless.risk, (~right).mean())
    assert useless.at(0.1) == 0.0 and useless.risk[-1] == pytest.approx(perfect.risk[-1])
    with pytest.raises(ValueError, match="not numbers"):
        risk_coverage([np.nan], [1])


def test_true_positives_at_few_false_ones():
    rng = np.random.default_rng(4)
    y = rng.integers(2, size=300)
    s = np.round(y + rng.standard_normal(300), 1)
    for limit in (0.01, 0.05, 0.3):
        best = max(((s[y == 1] >= t).mean() for t in np.append(s, np.inf)
                    if (s[y == 0] >= t).mean() <= limit), default=0.0)
        assert tpr_at_fpr(s, y, limit) == pytest.approx(best)
    assert tpr_at_fpr(s, y, 1.0) == 1.0 and len(roc_curve(y, s)) == 3
    with pytest.raises(ValueError, match="both classes"):
        tpr_at_fpr(s, np.ones(300))


def test_a_turned_space_is_aligned_and_another_is_not():
    rng = np.random.default_rng(5)
    y = np.arange(200) % 2
    Z = rng.standard_normal((200, 4))
    Z[:, 0] += 5 * y
    X = Z @ rng.standard_normal((4, 10))
    other = X @ ortho_group.rvs(10, random_state=0)[:, :7] + 0.01 * rng.standard_normal((200, 7))
    half = np.arange(200) < 100
    made = SubspaceAlignment(4).fit(X[half], other[half], paired=True)
    probe = LogisticRegression().fit(made.source(X[half]), y[half])
    assert probe.score(made.target(other[~half]), y[~half]) > 0.9
    loose = SubspaceAlignment(4).fit(X[half], rng.permutation(other[half]), paired=True)
    probe = LogisticRegression().fit(loose.source(X[half]), y[half])
    assert probe.score(loose.target(other[~half]), y[~half]) < 0.9
    with pytest.raises(ValueError, match="paired=True"):
        SubspaceAlignment(4).fit(X, other)
    # In one space, without pairs: as the projections on both bases agree.
    same = SubspaceAlignment(4).fit(X[half], X[~half])
    np.testing.assert_allclose(same.turn_, same.source_components_ @ same.target_components_.T)


def test_overlap_of_random_subspaces_is_as_expected():
    rng = np.random.default_rng(6)
    one = basis(rng.standard_normal((90, 12)), 3)
    np.testing.assert_allclose(one @ one.T, np.eye(3), atol=1e-9)
    found = [overlap(one, ortho_group.rvs(12, random_state=rng)[:4]) for _ in range(150)]
    assert np.mean([f["overlap"] for f in found]) == pytest.approx(found[0]["random"], abs=0.03)
    assert overlap(one, one)["overlap"] == pytest.approx(1.0)
    with pytest.raises(ValueError, match="more samples"):
        basis(np.zeros((3, 12)), 5)
