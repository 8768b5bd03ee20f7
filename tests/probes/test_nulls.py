"""Nulls of probes: untrained twins, embeddings as layer -1, tokens alone, guesses."""

import numpy as np
import pytest
import torch

import interp
from interp.core import PromptError
from interp.models.model import Model
from interp.models.reinitialize import redrawn
from probes import nulls, sweep
from tests.conftest import IMAGE_ARCHITECTURES, TEXT_ARCHITECTURES


@pytest.mark.parametrize("architecture", [*TEXT_ARCHITECTURES, *IMAGE_ARCHITECTURES, "bert"])
def test_every_architecture_can_be_drawn_again(tiny, architecture):
    hf = tiny(architecture)
    before = {name: weight.clone() for name, weight in hf.state_dict().items()}
    state = torch.get_rng_state()
    null, same, other = (redrawn(hf, seed) for seed in (3, 3, 4))
    assert torch.equal(state, torch.get_rng_state())
    assert all(torch.equal(before[name], weight) for name, weight in hf.state_dict().items())
    drawn = null.state_dict()
    assert {n: w.shape for n, w in drawn.items()} == {n: w.shape for n, w in before.items()}
    assert all(torch.equal(weight, same.state_dict()[name]) for name, weight in drawn.items())
    # Every matrix is new, decided by the seed, and none is shared with the model.
    matrices = [n for n, w in drawn.items() if w.is_floating_point() and w.ndim > 1
                and not n.endswith("bias")]
    for old in (before, other.state_dict()):
        assert matrices and not [n for n in matrices if torch.equal(drawn[n], old[n])]
    assert not {w.data_ptr() for w in hf.parameters()} & {w.data_ptr() for w in null.parameters()}


@pytest.mark.parametrize("architecture", ["gpt_oss", "llava"])
def test_a_reinitialized_model_is_a_model_of_the_same_shape(tiny, architecture):
    model = Model(tiny(architecture), architecture)
    null = nulls.reinitialized(model, 3)
    assert (null.n_heads, null.n_kv_heads, null.kind) == (model.n_heads, model.n_kv_heads, model.kind)
    assert null.sites() == model.sites() and null.manifest()["reinitialized"]
    weights = redrawn(model.hf, 3).state_dict()
    assert all(torch.equal(weight, weights[n]) for n, weight in null.hf.state_dict().items())


def test_weights_are_as_drawn_before_training_and_keep_their_dtype(tiny):
    hf = tiny("llama")
    drawn = redrawn(hf).state_dict()["model.layers.1.mlp.up_proj.weight"]
    assert float(drawn.std()) == pytest.approx(hf.config.initializer_range, rel=0.1)
    half = type(hf)(hf.config).to(torch.bfloat16)
    assert {w.dtype for w in redrawn(half).parameters()} == {torch.bfloat16}


def test_a_class_with_other_parameters_is_refused(tiny):
    hf = redrawn(tiny("llama"))
    hf.model.layers[1].extra = torch.nn.Parameter(torch.zeros(3))
    with pytest.raises(interp.core.ModelRefused, match="'model.layers.1.extra' is not the same"):
        redrawn(hf)


def test_layer_minus_one_is_what_enters_block_zero(tiny):
    """Prompts of unequal length, places in any order: each row is what a plain run gives there."""
    model = Model(tiny("gpt2"), "gpt2")
    prompts = [interp.Prompt.from_tokens(range(3, 3 + n)) for n in (7, 4, 9, 4)]
    places = [[6, 0], [2], [8, 8, -1], [1, 3]]
    states = nulls.layer_states(model, prompts, places, batch_size=2)
    assert states.layer.values.tolist() == [-1, 0, 1, 2]
    assert states.prompt.values.tolist() == [0, 0, 1, 2, 2, 2, 3, 3]
    assert states.position.values.tolist() == [6, 0, 2, 8, 8, 8, 1, 3]
    wte, wpe = model.hf.transformer.wte.weight, model.hf.transformer.wpe.weight
    for i, (number, position) in enumerate(zip(states.prompt.values, states.position.values)):
        run = model.run(prompts[number], read="resid_post").reads["resid_post"].values[0]
        assert np.allclose(states.values[1:, i], run[:, position], atol=1e-5)
        expected = wte[prompts[number].ids[position]] + wpe[position]
        assert np.allclose(states.values[0, i], expected.detach(), atol=1e-5)
    segment = interp.Segment("ends", (0, 3))
    for one, meant in ((-1, [6, 3, 8, 3]), (np.int64(2), [2] * 4), (slice(1, 3), [1, 2] * 4),
                       (segment, [0, 3] * 4), ([0, 2], [0, 2] * 4), (np.array([1]), [1] * 4)):
        assert [p for row in nulls.places_of(prompts, one) for p in row] == meant
    fewer = nulls.layer_states(model, prompts, "last", embedding=False, layers=[2])
    assert fewer.layer.values.tolist() == [2] and fewer.position.values.tolist() == [6, 3, 8, 3]


def test_words_alone_and_a_guess():
    prompts = [interp.Prompt.from_tokens(ids) for ids in ([9, 5, 9], [5, 7, 7])]
    assert nulls.bag_of_tokens(prompts).tolist() == [[1, 0, 2], [1, 2, 0]]
    assert nulls.bag_of_tokens(prompts, "last").tolist() == [[0, 1], [1, 0]]
    rng = np.random.default_rng(0)
    groups = np.repeat(np.arange(30), 3)
    for labels, value in ((rng.integers(2, size=90), 0.5), (rng.integers(3, size=90), 1 / 3)):
        assert np.allclose(nulls.dummy(labels, groups=groups)["fold_score"], value)
    assert float(nulls.dummy(rng.standard_normal(90), groups=groups)["score"][0]) <= 0
    # On the very folds of the sweep it stands beside.
    real = sweep.sweep(rng.standard_normal((2, 90, 4)), labels, groups=groups, permutations=1)
    assert np.isnan(real["fold_score"].values[0]).tolist() == np.isnan(
        nulls.dummy(labels, groups=groups)["fold_score"].values[0]).tolist()


def test_bad_input(tiny):
    model = Model(tiny("llama"), "llama")
    with pytest.raises(PromptError, match="no prompts to read states of"):
        nulls.layer_states(model, [])
    prompts = [interp.Prompt.from_tokens([3, 4, 5])] * 2
    with pytest.raises(PromptError, match="positions of 1 prompts for 2 prompts"):
        nulls.layer_states(model, prompts, [[0]])
    with pytest.raises(interp.core.OutOfRange, match="position 3 does not exist"):
        nulls.layer_states(model, prompts, [[0], [3]])
