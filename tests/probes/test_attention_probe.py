"""Probes of syntax in attention: planted maps are found, words alone are not, the root has its place."""

import numpy as np
import pytest
import torch
from sklearn.base import clone
from sklearn.exceptions import NotFittedError

import interp
from interp.core import NumericalError, OutOfRange, PromptError
from probes import attention_probe as probes
from probes import head_relations as single
from probes.word_attention import Parsed, Sentence, read, sentence, word_attention

K = 5


def trees(count, rng, longest=9):
    """Random heads: a tree in which each word but the root hangs on an earlier one of a random order."""
    found = []
    for _ in range(count):
        n = int(rng.integers(4, longest))
        order = rng.permutation(n)
        heads = np.full(n, -1)
        for at in range(1, n):
            heads[order[at]] = order[rng.integers(at)]
        found.append(heads)
    return found


def maps(heads, rng, *, up=(), down=(), root=(), size=3, noise=0.3):
    """Random maps in which channels `up` look at the head, `down` at the dependents, and `root` from
    the root word at the last special token."""
    n = len(heads)
    a, to, back = (noise * rng.random(s) for s in ((K, n, n), (K, n, 2), (K, n, 2)))
    for word, head in enumerate(heads):
        if head < 0:
            to[list(root), word, 1] += 1
            continue
        a[list(up), word, head] += 1
        a[list(down), head, word] += 1
    return Sentence(a, to, back, rng.standard_normal((n, size)))


def data(seed, count=40, **planted):
    rng = np.random.default_rng(seed)
    y = trees(count, rng)
    return [maps(h, rng, **planted) for h in y], y


def test_words_attend_with_the_mean_of_their_tokens_and_are_attended_with_the_sum():
    a = torch.rand(2, 5, 5, generator=torch.Generator().manual_seed(0)).softmax(-1)
    units = [[0], [1, 2], [4, 3]]
    made = word_attention(a, units)
    for i, rows in enumerate(units):
        for j, columns in enumerate(units):
            expected = np.mean([sum(float(a[1, r, c]) for c in columns) for r in rows])
            assert made[1, i, j] == pytest.approx(expected)
    assert np.allclose(made.sum(-1), 1)
    one = sentence(np.asarray(a.double()), [[1, 2], [3]], special=[0, 4])
    assert one.to_special[0, 0, 1] == pytest.approx(float(a[0, 1:3, 4].mean()))
    assert one.from_special[0, 0, 1] == pytest.approx(float(a[0, 4, 1:3].sum()))
    with pytest.raises(OutOfRange, match="word 1"):
        word_attention(a, [[0], []])
    with pytest.raises(NumericalError, match="NaN"):
        word_attention(a * np.nan, units)


@pytest.mark.parametrize("planted, direction", [({"up": [2]}, 1), ({"down": [2]}, 0)])
def test_the_planted_channel_and_its_direction_are_found(planted, direction):
    X, y = data(0, root=[4], **planted)
    probe = probes.AttentionProbe(alpha=0.1).fit(X[:25], y[:25])
    assert probe.score(X[25:], y[25:]) > 0.95
    assert np.unravel_index(np.abs(probe.coef_).argmax(), probe.coef_.shape) == (2, direction)
    # The root is known from the attention of channel 4 to the last special token, and nothing else.
    assert np.unravel_index(probe.root_coef_.argmax(), probe.root_coef_.shape) == (1, 4, 1)
    nothing = data(1)
    assert probes.AttentionProbe().fit(nothing[0][:25], nothing[1][:25]).score(
        nothing[0][25:], nothing[1][25:]) < 0.4


def test_the_attention_probe_is_the_written_softmax_and_its_optimum():
    X, y = data(3, count=12, up=[1])
    probe = probes.AttentionProbe(alpha=2.0).fit(X, y)
    (scores,) = probe.decision_function(X[:1])
    one, n = X[0], len(X[0])
    expected = np.full((n + 1, n), -np.inf)
    for j in range(n):
        expected[0, j] = probe.root_intercept_ + sum(
            probe.root_coef_[0, k, s] * one.from_special[k, j, s]
            + probe.root_coef_[1, k, s] * one.to_special[k, j, s] for k in range(K) for s in (0, 1))
        for i in range(n):
            if i != j:
                expected[i + 1, j] = sum(probe.coef_[k, 0] * one.attention[k, i, j]
                                         + probe.coef_[k, 1] * one.attention[k, j, i]
                                         for k in range(K))
    expected -= np.log(np.exp(expected).sum(0))
    assert np.allclose(scores.numpy(), expected, atol=1e-9)
    # Convex: from another start no better place is found.
    again = probes.AttentionProbe(alpha=2.0, max_iter=400).fit(X, y)
    assert again.loss_ == pytest.approx(probe.loss_, abs=1e-6)
    assert np.allclose(again.coef_, probe.coef_, atol=1e-3)


def test_attention_and_words_is_the_written_sum_with_every_candidate_s_own_word():
    X, y = data(4, count=8)
    probe = probes.AttentionWordsProbe().fit(X, y)
    rng = np.random.default_rng(0)
    probe.parameters_ = [torch.as_tensor(rng.standard_normal(tuple(p.shape))) for p in
                         probe.parameters_]
    w, r, c = (p.numpy() for p in probe.parameters_)
    (scores,) = probe.decision_function(X[:1])
    one, n = X[0], len(X[0])
    v = one.vectors
    expected = np.full((n + 1, n), -np.inf)
    for j in range(n):
        known = np.append(v[j], 1)
        expected[0, j] = c + sum(r[0, k, s] @ known * one.from_special[k, j, s]
                                 + r[1, k, s] @ known * one.to_special[k, j, s]
                                 for k in range(K) for s in (0, 1))
        for i in range(n):
            if i != j:
                pair = np.concatenate([v[i], v[j], [1]])
                expected[i + 1, j] = sum(w[0, k] @ pair * one.attention[k, i, j]
                                         + w[1, k] @ pair * one.attention[k, j, i]
                                         for k in range(K))
    expected -= np.log(np.exp(expected).sum(0))
    assert np.allclose(scores.numpy(), expected, atol=1e-9)


def test_words_tell_which_map_to_trust_only_to_the_probe_that_sees_them():
    # Channel 0 points at the head of words of kind +1, channel 1 at that of the others; each points
    # at a wrong word otherwise.
    rng = np.random.default_rng(5)
    X, y = [], trees(100, rng)
    for heads in y:
        n = len(heads)
        kind = rng.choice([-1.0, 1.0], n)
        a = 0.05 * rng.random((2, n, n))
        for word, head in enumerate(heads):
            wrong = rng.choice([i for i in range(n) if i not in (word, head)])
            good = int(kind[word] < 0)
            if head >= 0:
                a[good, word, head] += 1
            a[1 - good, word, wrong] += 1
        to = np.zeros((2, n, 1))
        to[0, heads < 0] = 1.0
        X.append(Sentence(a, to, np.zeros((2, n, 1)), kind[:, None]))
    scores = {kind.__name__: kind().set_params(alpha=0.1).fit(X[:70], y[:70]).score(X[70:], y[70:])
              for kind in (probes.AttentionProbe, probes.AttentionWordsProbe,
                           probes.WordsDistanceProbe)}
    assert scores["AttentionWordsProbe"] > 0.95
    assert scores["AttentionProbe"] < 0.75
    assert scores["WordsDistanceProbe"] < 0.6


def test_the_baseline_reads_words_and_distances_and_no_attention():
    rng = np.random.default_rng(6)
    # Every word hangs on the next one, the last is the root: distances say it all.
    y = [np.append(np.arange(1, n), -1) for n in rng.integers(3, 8, 20)]
    X = [maps(h, rng) for h in y]
    ended = [Sentence(x.attention, x.to_special, x.from_special,
                      np.eye(len(x))[:, -1:]) for x in X]
    probe = probes.WordsDistanceProbe(hidden=8, alpha=0.01).fit(ended[:12], y[:12])
    assert probe.score(ended[12:], y[12:]) == 1.0
    other = [Sentence(9 * rng.random(x.attention.shape), x.to_special, x.from_special, x.vectors)
             for x in ended]
    same = [np.array_equal(a, b) for a, b in zip(probe.predict(ended), probe.predict(other))]
    assert all(same)
    features = probes.distance_features(4)
    assert features.shape == (5, 4, 8) and (features[0, :, -1] == 1).all()
    assert features[1 + 2, 1].tolist()[:6] == [1, 0, 1, 0, 0, 0]  # candidate 2, word 1: the next


def test_estimators_follow_scikit_learn_s_manners():
    X, y = data(7, count=6, up=[0])
    for kind in (probes.AttentionProbe, probes.AttentionWordsProbe, probes.WordsDistanceProbe):
        probe = kind(alpha=0.5, max_iter=5)
        with pytest.raises(NotFittedError, match=kind.__name__):
            probe.predict(X)
        assert clone(probe).get_params() == probe.get_params()
        first, second = (clone(probe).fit(X, y).decision_function(X)[0] for _ in range(2))
        assert torch.equal(first, second) and torch.allclose(first.exp().sum(0), torch.ones(
            len(X[0]), dtype=torch.double))
        # No word is its own head.
        assert torch.isinf(torch.stack([first[i + 1, i] for i in range(len(X[0]))])).all()
    with pytest.raises(ValueError, match="no vector for each"):
        bare = Sentence(X[0].attention, X[0].to_special, X[0].from_special)
        probes.AttentionWordsProbe().fit([bare], y[:1])


@pytest.mark.parametrize("heads", [[0, 0, 0, 0], [9, -1, 0, 0], [-2, 0, 0, 0], [-1, 0]])
def test_impossible_heads_are_one_sentence(heads):
    rng = np.random.default_rng(0)
    X = [maps(np.array([1, -1, 1, 1]), rng)]
    with pytest.raises(ValueError, match="sentence 0 has 4 words"):
        probes.AttentionProbe().fit(X, [heads])
    with pytest.raises(ValueError, match="heads of 0 sentences"):
        probes.AttentionProbe().fit(X, [])


# -- single heads ---------------------------------------------------------------------------------


def test_single_heads_point_in_either_direction_and_never_at_themselves():
    rng = np.random.default_rng(0)
    (heads,) = trees(1, rng)
    one = maps(heads, rng, up=[1], down=[3])
    found = single.predictions(one.attention)
    kept = heads >= 0
    assert (found[0, 1] == heads)[kept].all() and (found[1, 3] == heads)[kept].all()
    assert (found[2, 1] == heads)[kept].mean() >= 0.5 and not (found[1, 1] == heads)[kept].all()
    assert (found != np.arange(len(heads))).all()
    causal = np.tril(np.ones((2, 3, 3)))
    assert single.predictions(causal)[0, :, 0].tolist() == [-2, -2]
    assert single.offset_predictions(3, [-1, 2]).tolist() == [[-2, 0, 1], [2, -2, -2]]


def test_each_relation_finds_its_head_and_noise_stays_at_the_offset_s_level():
    rng = np.random.default_rng(8)
    heads, relations, attention = [], [], []
    for own in trees(60, rng):
        kinds = ["root" if h < 0 else rng.choice(["a", "b"]) for h in own]
        made = 0.2 * rng.random((40, len(own), len(own)))
        for word, (head, kind) in enumerate(zip(own, kinds)):
            if kind == "a":
                made[7, word, head] += 1
        heads.append(own.tolist())
        relations.append([str(k) for k in kinds])
        attention.append(made)
    found = single.compare(attention, heads, relations)
    table = found.table.set_index("relation")
    assert table.loc["a", "accuracy"] == 1 and table.loc["a", "channel"] == 7
    assert table.loc["a", "direction"] == "word to head"
    assert found.gain("a", resamples=300).interval[0] > 0.3
    # The best of 120 predictors on the words that they were chosen on is better than any is.
    assert table.loc["b", "best_on_all"] > table.loc["b", "accuracy"] + 0.05
    low, high = found.gain("b", resamples=300).interval
    assert low < 0.05 and table.loc["b", "accuracy"] < 0.4
    assert table.loc["all", "n"] == sum(h >= 0 for own in heads for h in own)
    with pytest.raises(ValueError, match="no word has the relation 'c'"):
        found.gain("c")
    with pytest.raises(ValueError, match="at least two sentences"):
        single.compare(attention[:1], heads[:1], relations[:1])


# -- a real encoder -------------------------------------------------------------------------------

NOUNS = "dog cat teacher farmer doctor child sailor baker singer horse letter window".split()
VERBS = "saw followed helped found liked painted visited".split()
ADJECTIVES = "old small clever green quiet heavy famous".split()


def one_sentence(rng):
    """A sentence of a small grammar with its dependencies."""
    words, heads, kinds = [], [], []

    def say(word, head, relation):
        words.append(str(word))
        heads.append(head)
        kinds.append(relation)
        return len(words) - 1

    def noun_phrase(relation):
        adjectives = rng.choice(ADJECTIVES, int(rng.integers(3)), replace=False)
        noun = len(words) + 1 + len(adjectives)
        say("the", noun, "det")
        for adjective in adjectives:
            say(adjective, noun, "amod")
        return say(rng.choice(NOUNS), None, relation)

    subject = noun_phrase("nsubj")
    if rng.random() < 0.5:
        preposition = say(rng.choice(["near", "behind"]), subject, "prep")
        heads[noun_phrase("pobj")] = preposition
    verb = say(rng.choice(VERBS), -1, "root")
    heads[subject] = verb
    heads[noun_phrase("dobj")] = verb
    return Parsed(tuple(words), tuple(heads), tuple(kinds))


def grammar(count, seed=0):
    rng = np.random.default_rng(seed)
    return [one_sentence(rng) for _ in range(count)]


def test_a_real_encoder_holds_syntax_beyond_offsets_and_distances():
    model = interp.open_model("all-minilm-l6-v2")
    parsed = grammar(60)
    X, y = read(model, parsed, vectors=False), [p.heads for p in parsed]
    assert X[0].attention.shape[0] == model.n_layers * model.n_heads and X[0].to_special.shape[2] == 2
    found = single.compare([x.attention for x in X], y, [p.relations for p in parsed])
    table = found.table.set_index("relation")
    assert found.gain("dobj", resamples=300).interval[0] > 0
    assert table.loc["det", "accuracy"] > 0.8
    probe = probes.AttentionProbe(max_iter=30).fit(X[:40], y[:40])
    distances = probes.WordsDistanceProbe(hidden=8, max_iter=40).fit(
        [Sentence(x.attention[:1], x.to_special[:1], x.from_special[:1], np.ones((len(x), 1)))
         for x in X[:40]], y[:40])
    plain = distances.score([Sentence(x.attention[:1], x.to_special[:1], x.from_special[:1],
                                      np.ones((len(x), 1))) for x in X[40:]], y[40:])
    assert probe.score(X[40:], y[40:]) > plain + 0.1


def test_reading_needs_a_tokenizer(tiny):
    from interp.models.model import Model

    with pytest.raises(PromptError, match="no tokenizer"):
        read(Model(tiny("llama"), "llama"), grammar(1))
    with pytest.raises(ValueError, match="one of each per word"):
        Parsed(("a", "b"), (1, -1), ("x",))
