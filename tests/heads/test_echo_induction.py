"""Echo and induction: dense definition, TransformerLens, a written head, controls, selection."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import interp
from interp.core import Head, Prompt, PromptError
from interp.core.errors import NumericalError
from interp.heads import echo_induction as echo
from interp.models.model import Model
from interp.organisms import induction_circuit, reader
from interp.prompts.repeated import repeated


def by_definition(rows, length, copies, start):
    """The same scores, token by token, without any band."""
    found = {"echo": [], "induction": [], "previous": []}
    for t in range(start, start + length * copies):
        if t > start:
            found["previous"].append(rows[..., t, t - 1])
        if t < start + length:
            continue
        same = [s for s in range(start, t) if (s - start) % length == (t - start) % length]
        found["echo"].append(sum(rows[..., t, s] for s in same))
        found["induction"].append(sum(rows[..., t, s + 1] for s in same))
    return {name: torch.stack(list(values)).mean(0) for name, values in found.items()}


@settings(deadline=None, max_examples=20)
@given(length=st.integers(3, 9), copies=st.integers(2, 5), start=st.integers(0, 2),
       seed=st.integers(0, 99))
def test_bands_are_the_definition(length, copies, start, seed):
    n = start + length * copies
    rows = torch.rand(2, 3, n, n, generator=torch.Generator().manual_seed(seed)).tril()
    rows = rows / rows.sum(-1, keepdim=True)
    found, expected = (f(rows, length, copies, start) for f in (echo.score, by_definition))
    for name in echo.KINDS:
        assert torch.allclose(found[name], expected[name], atol=1e-6)


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "gpt_oss", "mistral", "gemma2"])
def test_streamed_scores_are_those_of_the_dense_maps(tiny, architecture):
    model = Model(tiny(architecture), architecture)
    rng = np.random.default_rng(0)
    prompts = [repeated(rng, 90, 7, 3, bos=1) for _ in range(2)]
    found = echo.measure(model, prompts)
    rows = model.run(prompts, read="pattern").reads["pattern"].values
    dense = echo.score(rows, 7, 3, 1)
    for name in echo.KINDS:
        assert np.allclose(found[f"{name}_samples"].values, dense[name], atol=1e-5)
        assert np.allclose(found[name].values, dense[name].mean(0), atol=1e-5)
    assert found["eligible"].values.all() == (architecture in ("llama", "gpt2"))


def test_short_windows_make_heads_ineligible(tiny):
    model = Model(tiny("gemma3"), "gemma3")  # layers 0 and 2 see five tokens
    found = echo.measure(model, [repeated(np.random.default_rng(0), 90, 8, 2, bos=1)])
    assert found["eligible"].values.all(1).tolist() == [False, True, False]
    assert {head.layer for head in echo.scores_of(found).top(18)} == {1}


@pytest.mark.parametrize("kind", ["previous", "echo", "induction"])
def test_equal_to_transformer_lens_on_short_prompts_up_to_normalisation(kind):
    from transformer_lens.head_detector import detect_head

    model = interp.open_model("reader")
    prompt = echo.probe(model, np.random.default_rng(0), 9, 3)
    text = reader.words(list(prompt.ids[1:]))
    bridge = model.bridge
    assert bridge.to_tokens(text)[0].tolist() == list(prompt.ids)
    name = {"previous": "previous_token_head", "echo": "duplicate_token_head",
            "induction": "induction_head"}[kind]
    theirs = detect_head(bridge, text, name).numpy()
    ours = echo.measure(model, [prompt])[kind].values
    # Theirs divides by all rows; ours by the rows that can show the behavior.
    shown = 2 * 9
    if kind == "previous":
        # Their diagonal starts one row earlier, where the only key is BOS.
        first = model.run(prompt, read="pattern").reads["pattern"].values[0, :, :, 1, 0]
        assert np.allclose(theirs * len(prompt), ours * (3 * 9 - 1) + first, atol=1e-4)
    else:
        assert np.allclose(theirs * len(prompt), ours * shown, atol=1e-4)
    assert theirs.max() > 0.03


def test_the_written_induction_head_is_found_and_the_control_loses_it():
    model = Model(induction_circuit.circuit(), "circuit")
    rng = np.random.default_rng(0)
    prompts = [repeated(rng, induction_circuit.VOCAB, 15, 3, bos=0, exclude=[1, 2])
               for _ in range(4)]
    found = echo.measure(model, prompts)
    truth, back = induction_circuit.RETRIEVES, induction_circuit.BACK
    induction = found["induction"].values
    assert induction[truth] > 0.9 and np.delete(induction.ravel(), 6).max() < 0.2
    assert found["previous"].values[back] > 0.99 and found["previous_null"].values[back] > 0.99
    assert found["induction_null"].values[truth] < 0.3
    assert found["induction_frequency"].values[truth] == 1
    assert echo.select(found, 0, 1 / 8) == (Head(*truth),)


def test_the_reader_has_induction_heads_that_the_control_does_not():
    model = interp.open_model("reader")
    rng = np.random.default_rng(0)
    found = echo.measure(model, [echo.probe(model, rng, 30) for _ in range(3)])
    best = echo.scores_of(found).top(1)[0]
    assert found["induction"].values[best] > 0.5 > 3 * found["induction_null"].values[best]
    # The nearest copy alone gives less than all of them.
    assert (found["induction_nearest"] <= found["induction"] + 1e-6).all()


def test_selection_counts_heads_and_completes_groups():
    model = interp.open_model("reader")
    found = echo.measure(model, [echo.probe(model, np.random.default_rng(0), 20)])
    one, more = echo.select(found, 0.01, 0.14), echo.select(found, 0.01, 0.14, model.n_kv_heads)
    total = model.n_layers * model.n_heads
    echo_only, induction_only = echo.select(found, 0.01, 0), echo.select(found, 0, 0.14)
    assert len(echo_only) == math.ceil(0.01 * total) and len(induction_only) == math.ceil(0.14 * total)
    assert set(one) == {*echo_only, *induction_only} and set(one) <= set(more)
    assert all(Head(h.layer, h.head ^ 1) in more for h in more)
    assert echo.select(found, 0, 0) == ()
    assert len(echo.select(found, 1, 0)) == total
    with pytest.raises(ValueError, match=r"a share of 1\.5 heads by echo"):
        echo.select(found, 1.5, 0)


def test_the_default_probe_fits_context_and_vocabulary(tiny):
    model = Model(tiny("llama"), "tiny-llama")
    prompt = echo.probe(model, np.random.default_rng(0))
    assert len(prompt.segments[0]) == min(97, 639 // 4)
    bundled = interp.open_model("reader")
    ids = echo.probe(bundled, np.random.default_rng(0), copies=2).ids
    assert ids[0] == reader.BOS and not set(ids[1:]) & set(bundled.tokenizer.all_special_ids)


def test_the_scope_of_an_alibi_head_bounds_its_weights():
    g = torch.Generator().manual_seed(0)
    w_q, w_k = (torch.randn(12, 5, generator=g) / 4 for _ in range(2))
    gamma, slope, epsilon = torch.ones(12) * 0.4, 0.7, 1e-3
    scope = echo.alibi_scope(w_q, w_k, slope, gamma, epsilon=epsilon)
    n = int(scope) + 40
    for seed in range(5):
        x = torch.nn.functional.normalize(
            torch.randn(n, 12, generator=torch.Generator().manual_seed(seed)), dim=-1)
        x = x * 12**0.5 * gamma / 12**0.5  # within |gamma|
        logits = (x @ w_q) @ (x @ w_k).T - slope * (
            torch.arange(n)[:, None] - torch.arange(n)).abs()
        weights = logits[-1].softmax(-1)
        assert float(weights[: n - 1 - int(scope)].max()) <= epsilon


def test_bad_input_is_named(tiny):
    model = Model(tiny("llama"), "tiny-llama")
    with pytest.raises(PromptError, match="prompt 0 has no copies of one length"):
        echo.measure(model, [Prompt.from_tokens(range(3, 20))])
    rng = np.random.default_rng(0)
    with pytest.raises(PromptError, match=r"prompts of one shape are needed, not \[\(7, 2, 0\)"):
        echo.measure(model, [repeated(rng, 90, 7), repeated(rng, 90, 8)])
    with pytest.raises(PromptError, match="give at least one"):
        echo.measure(model, [])
    with pytest.raises(ValueError, match="2 copies of 2 tokens cannot tell"):
        echo.score(torch.rand(1, 4, 4), 2, 2)
    with pytest.raises(ValueError, match="need 8 queries and keys"):
        echo.score(torch.rand(1, 7, 7), 4, 2)
    with pytest.raises(NumericalError):
        echo.score(torch.full((1, 8, 8), torch.nan), 4, 2)
    with pytest.raises(ValueError, match="there is no score 'odd'"):
        echo.scores_of(echo.measure(model, [repeated(rng, 90, 7)]), "odd")
