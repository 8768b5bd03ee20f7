"""Statistics that look at a few queries, or a few layers, cost no more than those."""

import numpy as np
import pytest
import torch

from interp.core import Prompt
from interp.models import attention
from interp.models.model import Model
from interp.stream.chosen_rows import RowMass
from interp.stream.per_layer import PerLayer
from interp.stream.reducers import Entropy, Offsets, Received


@pytest.fixture
def streamed(monkeypatch):
    """(layer, number of queries) of every call of `stream`."""
    calls, real = [], attention.stream

    def counting(q, *args, **more):
        calls.append((more["layer"], q.shape[2]))
        return real(q, *args, **more)

    monkeypatch.setattr(attention, "stream", counting)
    return calls


@pytest.mark.parametrize("architecture", ["llama", "mistral", "gemma2", "gpt_oss"])
def test_only_chosen_queries_are_streamed_and_nothing_else_changes(tiny, streamed, architecture):
    model = Model(tiny(architecture), architecture)
    generator = torch.Generator().manual_seed(5)
    prompts = [Prompt.from_tokens(torch.randint(3, 90, (n,), generator=generator).tolist())
               for n in (17, 12)]
    rows, segments = [4, 9], {"early": [0, 1, 2]}
    stats = [Received(subset=rows), Offsets((-1, 0), subset=rows),
             PerLayer("segments", lambda prompt, layer: RowMass(segments, rows))]
    run = model.run(prompts, stats=stats, new_tokens=2)
    few = list(streamed)
    # The last query of each pass stands for the pass.
    assert {n for _, n in few} == {3, 1} and {layer for layer, _ in few} == {0, 1, 2}
    streamed.clear()
    whole = model.run(prompts, stats=[*stats, Entropy()], new_tokens=2)
    assert {n for _, n in streamed} == {17, 12, 1}
    for name in ("received", "offsets", "segments"):
        assert run.stats[name].dims == whole.stats[name].dims
        assert np.allclose(run.stats[name].values, whole.stats[name].values, atol=1e-6,
                           equal_nan=True), name
    assert run.new_tokens == whole.new_tokens
    for one, other in zip(run.logits, whole.logits):
        assert torch.allclose(one, other, atol=1e-5)


def test_chosen_rows_agree_with_the_dense_pattern(tiny, streamed):
    model = Model(tiny("llama"), "llama")
    prompt = Prompt.from_tokens(range(3, 22))
    run = model.run(prompt, read="pattern", stats="entropy")
    assert streamed == []  # whole rows were in hand
    rows = [6, 11, 18]
    found = model.run(prompt, stats=Received(subset=rows)).stats["received"].values[0]
    pattern = run.reads["pattern"].values[0]
    for layer in range(3):
        for key in (0, 3, 6):
            assert np.allclose(found[layer, :, key], pattern[layer, :, rows, key].mean(0), atol=1e-6)
    assert streamed == [(0, 3), (1, 3), (2, 3)]


def test_only_requested_layers_are_streamed(tiny, streamed):
    model = Model(tiny("llama"), "llama")
    prompts = [Prompt.from_tokens(range(3, 15)), Prompt.from_tokens(range(4, 12))]
    everywhere = model.run(prompts, stats="received").stats["received"]
    streamed.clear()
    some = model.run(prompts, stats=PerLayer(
        "received", lambda prompt, layer: Received() if layer in (0, 2) else None)).stats["received"]
    assert {layer for layer, _ in streamed} == {0, 2} and len(streamed) == 4
    assert some.layer.values.tolist() == [0, 2]
    assert np.allclose(some.values, everywhere.sel(layer=[0, 2]).values, equal_nan=True, atol=1e-6)
    with pytest.raises(ValueError, match="in no layer"):
        model.run(prompts, stats=PerLayer("received", lambda prompt, layer: None))


def test_a_decoding_step_streams_its_own_query_only(tiny, streamed):
    model = Model(tiny("llama"), "llama")
    model.run(Prompt.from_tokens(range(3, 30)), stats="received", new_tokens=3)
    sizes = [n for _, n in streamed]
    assert sizes[:3] == [27] * 3 and set(sizes[3:]) == {1} and len(sizes) in (9, 12)
