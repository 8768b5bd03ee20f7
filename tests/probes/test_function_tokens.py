"""Features activated by tokens: exact expectations, planted tokens, and what must not matter."""

import numpy as np
import pytest

from interp.core import Prompt
from probes.function_tokens import (
    TokenFeatures,
    features,
    frequent,
    rarefied,
    slope,
    strongest,
)


@pytest.fixture
def rng():
    return np.random.default_rng(0)


def test_rarefaction_is_the_mean_over_all_draws(rng):
    from itertools import combinations

    on = rng.random((7, 5)) < 0.3
    for m in range(8):
        naive = np.mean([on[list(drawn)].any(0).sum() for drawn in combinations(range(7), m)])
        assert rarefied(on.sum(0), 7, [m])[0] == pytest.approx(naive, abs=1e-9)
    with pytest.raises(ValueError, match="all 7"):
        rarefied(on.sum(0), 7, [8])


def test_the_graph_is_that_of_a_naive_loop(rng):
    tokens, on = rng.integers(0, 6, 40), rng.random((40, 9)) < 0.2
    graph = TokenFeatures(tokens, on, np.repeat(np.arange(4), 10))
    for row, token in enumerate(graph.vocabulary):
        here = on[tokens == token]
        assert (graph.graph.toarray()[row] == here.sum(0)).all()
        assert graph.degree[row] == here.any(0).sum() and graph.frequency[row] == len(here)
    assert (np.diff(graph.frequency) <= 0).all()
    top = np.isin(tokens, graph.vocabulary[:2])
    assert graph.coverage([2, 6]).tolist() == [on[top].any(0).sum(), on.any(0).sum()]
    # All tokens are all occurrences: nothing is left to chance.
    assert graph.random_coverage([6])[0] == pytest.approx(on.any(0).sum())


def test_neither_the_order_nor_the_names_of_tokens_matter(rng):
    tokens, on = rng.integers(0, 5, 60), rng.random((60, 8)) < 0.2
    documents = np.repeat(np.arange(6), 10)
    first = TokenFeatures(tokens, on, documents)
    shuffled = rng.permutation(60)
    second = TokenFeatures(1000 - 7 * tokens[shuffled], on[shuffled], documents[shuffled])
    assert np.allclose(np.sort(first.degree), np.sort(second.degree))
    for a, b in zip(first.per_document([0, 1]), second.per_document([1000, 993])):
        assert np.allclose(a, b)


def test_tokens_that_switch_on_everything_beat_chance_and_others_do_not(rng):
    tokens = rng.integers(0, 20, 400)
    tokens[rng.random(400) < 0.3] = 0
    documents = np.repeat(np.arange(20), 20)
    narrow = np.zeros((400, 120), dtype=bool)
    narrow[np.arange(400), tokens] = True
    rich = narrow.copy()
    rich[tokens == 0] = rng.random((int((tokens == 0).sum()), 120)) < 0.3
    any_token = rng.random((400, 120)) < 0.05

    def gap(on):
        own, chance = TokenFeatures(tokens, on, documents).per_document([0])
        return (own - chance).mean()

    assert gap(rich) > 0.3 and gap(narrow) < -0.2 and abs(gap(any_token)) < 0.03
    free = TokenFeatures(tokens, any_token, documents)
    # What depends on no token has the degree that exposure gives it.
    assert abs(slope(free.frequency, free.degree) - slope(free.frequency, free.exposure())) < 0.05


def test_the_strongest_features_are_on(rng):
    values = rng.standard_normal((30, 50))
    on = strongest(values, 4)
    assert (on.sum(1) == 4).all()
    assert (np.abs(values)[on].reshape(30, 4).min(1) > np.where(on, 0, np.abs(values)).max(1)).all()
    assert strongest(np.zeros((2, 3)), 2).sum() == 0
    with pytest.raises(ValueError, match="not numbers"):
        strongest(np.array([[1.0, np.nan]]), 1)
    with pytest.raises(ValueError, match="3 of 2"):
        strongest(np.ones((4, 2)), 3)


def test_frequent_tokens_make_up_the_share():
    text = [1] * 6 + [2] * 3 + [3]
    assert [frequent(text, share) for share in (0.5, 0.7, 0.95)] == [[1], [1, 2], [1, 2, 3]]
    assert np.isnan(slope(np.array([2, 2]), np.array([3, 4])))


@pytest.mark.parametrize("architecture", ("llama", "gpt2", "bert"))
def test_features_of_a_gated_mlp_are_what_it_multiplies(tiny, architecture):
    from interp.models.model import Model

    model = Model(tiny(architecture), architecture)
    prompts = [Prompt.from_tokens(range(5, 5 + n)) for n in (6, 9)]
    values, kind = features(model, prompts, 1)
    assert len(values) == 15 and np.isfinite(values).all()
    assert kind == ("neurons" if architecture == "llama" else "directions")
    if kind == "neurons":
        made = model.run(prompts, read="mlp_out.1").reads["mlp_out.1"].values
        down = model.hf.model.layers[1].mlp.down_proj.weight.detach().numpy()
        assert np.allclose(values[:6] @ down.T, made[0, 0, :6], atol=1e-5)
        assert np.allclose(values[6:] @ down.T, made[1, 0, :9], atol=1e-5)
    else:
        # A direction and its opposite are never on together.
        half = values.shape[1] // 2
        assert (values >= 0).all() and (np.minimum(values[:, :half], values[:, half:]) == 0).all()
