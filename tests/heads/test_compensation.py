"""A compressed cache: the formula, what it leaves alone, and whom it hurts."""

import numpy as np
import pytest
import torch

import interp
from interp.core import Head, Prompt
from interp.core.errors import ModelRefused, OutOfRange
from interp.heads import compensation
from interp.models.model import Model
from interp.organisms import induction_circuit


def parts(seed, n=12, heads=3, d=4):
    g = torch.Generator().manual_seed(seed)
    return [torch.randn(n, heads, d, generator=g) for _ in range(3)]


def test_with_everything_kept_it_is_plain_attention():
    q, k, v = parts(0)
    kept, dropped = compensation.views(range(12), 12, 0, 100)
    assert not dropped.any() and torch.equal(kept, torch.ones(12, 12, dtype=torch.bool).tril())
    expected = torch.nn.functional.scaled_dot_product_attention(
        *(x.transpose(0, 1) for x in (q, k, v)), is_causal=True).transpose(0, 1)
    assert torch.allclose(compensation.attend(q, k, v, kept), expected, atol=1e-5)


def test_equal_dropped_keys_are_replaced_exactly_and_others_underestimated():
    q, k, v = parts(1, n=30)
    kept, dropped = compensation.views([29], 30, 2, 5)
    equal = k.clone()
    equal[2:25] = k[7]
    whole = compensation.attend(q[29:], equal, v, kept | dropped)
    assert torch.allclose(compensation.attend(q[29:], equal, v, kept, dropped), whole, atol=1e-5)
    # Without the mean token the dropped keys are missed.
    assert not torch.allclose(compensation.attend(q[29:], equal, v, kept), whole, atol=1e-2)
    # Jensen: the weight of unequal keys comes out too small; v marks the dropped ones.
    mark = dropped[0].float()[:, None, None].expand(-1, 3, 1)
    true = compensation.attend(q[29:], 2 * k, mark, kept | dropped)
    assert (compensation.attend(q[29:], 2 * k, mark, kept, dropped) < true).all()


def test_a_mask_of_far_keys_is_the_same_as_blocking_them():
    model = interp.open_model("reader")
    prompt = Prompt.from_tokens(np.random.default_rng(0).integers(20, 200, 40))
    rows, heads = [38, 39], [Head(1, 2), Head(3, 0)]
    write = compensation.compress(model, prompt, heads, rows, compensate=False, n_sinks=3, window=6)
    cut = [interp.block([t], range(3, t - 5), heads=heads) for t in rows]
    by_patch, by_block = (model.run(prompt, write=w).logits[0] for w in (write, cut))
    assert torch.allclose(by_patch, by_block, atol=2e-4)
    plain = model.run(prompt).logits[0]
    assert torch.allclose(by_patch[:38], plain[:38], atol=1e-5)  # earlier rows are as they were
    assert not torch.allclose(by_patch[38:], plain[38:], atol=1e-2)


def test_nothing_dropped_is_nothing_changed():
    model = interp.open_model("reader")
    prompt = Prompt.from_tokens(range(3, 20))
    assert compensation.compress(model, prompt, ["L0H0"], [16], window=50) == []


def test_the_retrieving_head_needs_far_keys_and_the_others_do_not():
    model = Model(induction_circuit.circuit(), "circuit")
    ids, span = induction_circuit.needle(np.random.default_rng(0), 30, 5)
    answer = ids[span[0] : span[1]]
    prompt = Prompt.from_tokens([*ids, *answer[:-1]])
    rows = range(29, 33)
    every = [Head(a, b) for a in range(2) for b in range(4)]

    def right(heads):
        write = compensation.compress(model, prompt, heads, rows, n_sinks=1, window=4)
        return model.run(prompt, write=write).logits[0][29:].argmax(-1).tolist() == answer

    assert right([]) and right([h for h in every if h != Head(1, 2)])
    assert not right([Head(1, 2)])


@pytest.mark.parametrize("architecture", ["gemma2", "gpt_oss"])
def test_attention_of_another_kind_is_refused(tiny, architecture):
    model = Model(tiny(architecture), architecture)
    prompt = Prompt.from_tokens(range(3, 40))
    with pytest.raises(ModelRefused, match="is not a plain softmax over all earlier keys"):
        compensation.compress(model, prompt, ["L1H0", "L0H0"], [36], window=3)


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "qwen3"])
def test_plain_architectures_are_recomputed_exactly(tiny, architecture):
    model = Model(tiny(architecture), architecture)
    prompt = Prompt.from_tokens(np.random.default_rng(0).integers(3, 90, 30))
    (one,) = compensation.compress(model, prompt, ["L1H4"], [29], window=3)
    z = model.run(prompt, read="z.1").reads["z.1"].values[0, 0, 29]
    others = [h for h in range(6) if h != 4]
    assert np.allclose(one.value.values[0, others], z[others], atol=1e-5)


def test_bad_heads_and_rows_are_named(tiny):
    model = Model(tiny("llama"), "tiny-llama")
    prompt = Prompt.from_tokens(range(3, 20))
    with pytest.raises(OutOfRange, match="head L5H0 does not exist"):
        compensation.compress(model, prompt, ["L5H0"], [3])
    with pytest.raises(OutOfRange, match=r"rows \[40\] are not positions of a prompt of 17"):
        compensation.compress(model, prompt, ["L1H0"], [40])


def test_the_cache_share_of_the_paper():
    assert abs(compensation.cache_share(10**6, 0.15) - 0.32) < 1e-3
    assert compensation.cache_share(50, 1.0) == 1.0
