"""Reading ahead from one state: found where planted, counted as by hand, nothing where nothing is."""

import numpy as np
import pytest
import torch
from sklearn.linear_model import RidgeCV
from sklearn.utils.estimator_checks import parametrize_with_checks

from interp.models.futures import Readout, carried_logits
from interp.models.model import Model
from probes import lookahead
from probes.carried_states import FuturePrompt, carried
from probes.lookahead import (
    FollowerCounts,
    FutureLinearLens,
    FutureVocabularyLens,
    hits,
    surprisal,
    top_tokens,
    within_word,
)


@parametrize_with_checks([FutureLinearLens()])
def test_it_is_a_scikit_learn_estimator(estimator, check):
    check(estimator)


@pytest.fixture(scope="module")
def model(tiny):
    return Model(tiny("llama"), "tiny-llama")


def test_hits_are_counted_as_by_hand():
    rng = np.random.default_rng(0)
    logits, tokens = torch.tensor(rng.standard_normal((7, 3, 20))), torch.tensor(
        rng.integers(20, size=(7, 3)))
    found = hits(top_tokens(logits, 6), tokens)
    for i in range(7):
        for j in range(3):
            rank = sorted(range(20), key=lambda t: -logits[i, j, t]).index(int(tokens[i, j]))
            assert found[i, j].tolist() == [rank < k for k in range(1, 7)]


def test_surprisal_is_the_models_own_log_probability(model):
    states, chosen = torch.randn(5, 2, model.d_model), torch.randint(0, 97, (5, 2))
    found = surprisal(Readout(model, batch_size=3), states, chosen)
    p = Readout(model)(states).softmax(-1)
    for i in range(5):
        for j in range(2):
            assert float(found[i, j]) == pytest.approx(-float(p[i, j, chosen[i, j]].log()), rel=1e-3)


def test_the_linear_lens_is_ridge_regression_and_reads_what_was_planted(model):
    """States hold the next state linearly in one layer; in its twin they hold nothing."""
    rng, read = np.random.default_rng(0), Readout(model)
    later = rng.standard_normal((260, model.d_model))
    tokens = read(torch.tensor(later, dtype=torch.float32)).argmax(-1)
    mixed = later @ rng.standard_normal((model.d_model, model.d_model))
    empty = rng.standard_normal(mixed.shape)
    lens = FutureLinearLens(1, 0).fit(mixed[:200], later[:200])
    ridge = RidgeCV(alphas=lookahead.ALPHAS).fit(mixed[:200], later[:200])
    assert np.allclose(lens.predict(mixed), ridge.predict(mixed))
    assert lens.score_precision_at_k(read, mixed[200:], tokens[200:]) > 0.95
    twin = FutureLinearLens(1, 0).fit(empty[:200], later[:200])
    assert twin.score_precision_at_k(read, empty[200:], tokens[200:], 1) < 0.2


def test_fine_tuning_never_leaves_a_worse_fit_than_it_found(model):
    rng, read = np.random.default_rng(1), Readout(model)
    later = rng.standard_normal((120, model.d_model)).astype(np.float32)
    noisy = later + 2 * rng.standard_normal(later.shape).astype(np.float32)
    lens = FutureLinearLens(1, 0).fit(noisy, later)

    def loss(of):
        return float(lookahead.divergence(of.predict_logits(read, noisy), read(torch.tensor(later))))

    before = loss(lens)
    tuned = lens.fine_tune(read, noisy, later, epochs=4, lr=0.05, batch_size=20)
    assert loss(tuned) < 0.9 * before
    kept = tuned.coef_.copy()
    tuned.fine_tune(read, noisy, later, epochs=1, lr=1e4)  # only makes it worse: nothing is kept of it
    assert np.allclose(tuned.coef_, kept, atol=1e-6)


def test_the_vocabulary_lens_has_columns_for_likely_tokens_only():
    rng = np.random.default_rng(2)
    H = rng.standard_normal((150, 6))
    logits = torch.tensor(np.concatenate([H @ rng.standard_normal((6, 5)), np.full((150, 4), -50.0)], 1))
    lens = FutureVocabularyLens(1, 0).fit(H[:100], logits[:100])
    assert set(lens.tokens_) <= set(range(5))
    top = lens.predict_top(H[100:], most=7)
    assert top.shape == (50, 7) and (top[:, len(lens.tokens_):] == -1).all()
    assert (top[:, 0] == logits[100:].argmax(-1).numpy()).mean() > 0.8


def test_counts_of_followers_equal_a_loop():
    rng = np.random.default_rng(3)
    tokens, after = rng.integers(6, size=200), rng.integers(9, size=200)
    tokens = np.where(tokens == 5, 4, tokens)
    top = FollowerCounts().fit(tokens, after).predict_top(np.arange(6), most=9)
    overall = np.bincount(after, minlength=9)
    for token in range(6):
        own = [int(((tokens == token) & (after == a)).sum()) for a in range(9)]
        expected = sorted(range(9), key=lambda a: (-own[a], -overall[a], a))
        assert top[token].tolist() == expected
    with pytest.raises(ValueError, match="one target for each"):
        FollowerCounts().fit([1, 2], [1])


def test_a_learned_prompt_makes_the_model_say_what_the_state_holds(model):
    """Teacher: the distribution after an unknown prompt. Learned from another start, it comes back;
    with another sample's state, the mean or none, it does not."""
    generator = torch.Generator().manual_seed(0)
    secret = torch.randn(4, model.d_model, generator=generator)
    states = 3 * torch.randn(80, model.d_model, generator=generator)
    tokens = torch.randint(5, 90, (80, 3), generator=generator)
    later = 3 * torch.randn(80, 4, model.d_model, generator=generator)
    teacher = carried_logits(model, secret, states, 0, tokens[:, :0])[:, 0]
    # The state whose readout is closest to the teacher's: the least squares one.
    unembed = model.hf.lm_head.weight.detach()
    later[:, 0] = torch.linalg.lstsq(unembed, teacher.T).solution.T
    start = torch.randn(4, model.d_model, generator=generator)
    plain = FuturePrompt(0, ahead=(0,), steps=0).fit(model, start, states, tokens, later)
    lens = FuturePrompt(0, ahead=(0,), steps=60, lr=0.1, batch_size=20)
    lens.fit(model, start, states[:60], tokens[:60], later[:60])
    assert torch.equal(plain.prefix_, start) and not torch.equal(lens.prefix_, start)
    assert np.mean(lens.losses_[-5:]) < 0.7 * np.mean(lens.losses_[:5])
    wanted = Readout(model)(later[:, 0]).argmax(-1)

    def precision(of, arm):
        top = of.predict_top(model, states[60:], 1, arm=arm)
        return float(hits(top, wanted[60:, None])[..., 0].float().mean())

    assert precision(lens, "state") > 2 * max(precision(lens, a) for a in ("none", "shuffled", "mean"))
    assert precision(lens, "state") > precision(plain, "state")


def test_free_running_feeds_what_it_reads_and_teacher_forcing_what_it_is_given(model):
    generator = torch.Generator().manual_seed(1)
    states = torch.randn(9, model.d_model, generator=generator)
    tokens, later = torch.randint(5, 90, (9, 3)), torch.randn(9, 4, model.d_model)
    lens = FuturePrompt(1, steps=0, batch_size=1).fit(
        model, torch.randn(3, model.d_model, generator=generator), states, tokens, later)
    free = lens.predict_top(model, states, 4)
    assert free.shape == (9, 4, 10)
    # Fed its own tokens, teacher forcing gives the free-running reading; fed others, only N = 0.
    again = lens.predict_top(model, states, 4, tokens=free[:, :3, 0])
    assert torch.equal(again[..., 0], free[..., 0])
    other = lens.predict_top(model, states, 4, tokens=tokens)
    assert torch.equal(other[:, 0], free[:, 0]) and not torch.equal(other[:, 1:], free[:, 1:])
    # Nothing of the state is left in the arm without it.
    none = lens.predict_top(model, states, 4, arm="none")
    assert torch.equal(none, none[:1].expand_as(none))


def test_a_shuffled_state_is_never_ones_own():
    H = torch.randn(17, 3)
    other = carried(H, "shuffled", H.mean(0), seed=4)
    assert not bool((other == H).all(1).any())
    assert torch.equal(other.sort(0).values, H.sort(0).values)
    assert torch.equal(carried(H, "mean", H.mean(0)), H.mean(0).expand(17, 3))
    with pytest.raises(ValueError, match="no other"):
        carried(H[:1], "shuffled", H[0])


def test_parts_of_words_are_told_from_beginnings():
    class Pieces:
        pieces = ("sun", "set", " red", ".", "7")

        def decode(self, ids):
            return "".join(self.pieces[i] for i in ids)

    before, tokens = [0, 0, 1, 2, 3, 4], [1, 2, 3, 4, 4, 0]
    assert within_word(Pieces(), before, tokens).tolist() == [True, False, False, True, False, True]


def test_a_prompt_needs_enough_tokens_to_be_trained(model):
    with pytest.raises(ValueError, match="cannot train a prompt for N = 3"):
        FuturePrompt(0).fit(model, torch.zeros(2, model.d_model), torch.zeros(4, model.d_model),
                            torch.zeros(4, 2, dtype=torch.long), torch.zeros(4, 4, model.d_model))
