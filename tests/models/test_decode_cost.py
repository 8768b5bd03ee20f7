"""Knockout and statistics while generating: one token per block and step, one row of attention."""

import functools

import numpy as np
import pytest
import torch

import interp
from interp.models import attention as attend
from interp.models.model import Model

STEPS = 4
WAYS = {
    "knockout": dict(write=interp.block("generated", "image")),
    "statistics": dict(stats=("received", "entropy")),
    "knockout and statistics": dict(write=interp.block("generated", "image", layers=[1]),
                                    stats=("received",)),
    "redistribution": dict(write=interp.redistribute([0], "image", 0.5, min_nonsink_share=None,
                                                     min_image_mass=None)),
}


@pytest.fixture(scope="module")
def opened(tiny):
    return functools.cache(lambda architecture: Model(tiny(architecture), f"tiny-{architecture}"))


class Counts:
    """Token-layers and query-key pairs, call by call."""

    def __init__(self, model, monkeypatch):
        self.rows, self.pairs, self.model = [], [], model
        whole, streamed = attend.session_attention, attend.stream

        def attention(session, layer, query, key, *rest):
            self.pairs.append(query.shape[2] * key.shape[2])
            return whole(session, layer, query, key, *rest)

        def stream(q, k, v, **more):
            self.pairs.append(q.shape[2] * k.shape[2])
            return streamed(q, k, v, **more)

        monkeypatch.setattr(attend, "session_attention", attention)
        monkeypatch.setattr(attend, "stream", stream)

    def __enter__(self):
        self.handles = [block.module.register_forward_hook(
            lambda module, args, out: self.rows.append(
                (out[0] if isinstance(out, tuple) else out).reshape(-1, self.model.d_model).shape[0]))
            for block in self.model._engine("hf").blocks]
        return self

    def __exit__(self, *_):
        for handle in self.handles:
            handle.remove()


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("architecture", ["llama", "gemma2", "gpt_oss"])
def test_a_step_costs_one_token_per_block_and_grows_with_the_length(
    opened, monkeypatch, architecture, way
):
    model, rng, later = opened(architecture), np.random.default_rng(0), {}
    for length in (12, 24):
        prompt = interp.Prompt.from_tokens(rng.integers(3, 90, length), {"image": (2, 7)})
        with monkeypatch.context() as patching, Counts(model, patching) as counts:
            model.run(prompt, new_tokens=STEPS, logits="last", **WAYS[way])
        # The prompt once, then one token per step, through every block.
        assert sum(counts.rows) == model.n_layers * (length + STEPS)
        assert sorted(set(counts.rows)) == [1, length]
        calls = [n for n in counts.pairs if n < length * length]
        assert calls and max(calls) <= length + STEPS
        later[length] = sum(calls)
    # Twice the length is at most twice the work of a step: windowed blocks need less.
    assert later[24] <= 2 * later[12]


def test_whole_passes_would_cost_the_square(opened, monkeypatch):
    """The control: without a cache every step is a pass over the prompt, which the count shows."""
    model, length = opened("llama"), 12
    ids = list(np.random.default_rng(0).integers(3, 90, length))
    with Counts(model, monkeypatch) as counts:
        for _ in range(STEPS + 1):
            row = model.run(interp.Prompt.from_tokens(ids), logits="last",
                            stats=("received",)).logits[0][-1]
            ids.append(int(torch.argmax(row)))
    assert sum(counts.rows) == model.n_layers * sum(range(length, length + STEPS + 1))
    assert min(counts.rows) == length and max(counts.pairs) == (length + STEPS) ** 2
