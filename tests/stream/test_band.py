"""Diagonals averaged over heads while streaming equal those of the dense pattern."""

import numpy as np
import pytest
import torch

from interp.stream.band import Band
from interp.stream.tiles import causal, sliding_window, stream

BATCH, HEADS, KV, N, D = 2, 6, 2, 23, 8


def made(seed=0):
    generator = torch.Generator().manual_seed(seed)
    return tuple(torch.randn(BATCH, h, N, D, generator=generator) for h in (HEADS, KV))


@pytest.mark.parametrize("tile", [None, (4, 5), (23, 3), (1, 23)])
@pytest.mark.parametrize("mask", [causal(), sliding_window(7)])
def test_any_tiling_gives_the_dense_mean(tile, mask):
    query, key = made()
    heads, offsets = [1, 2, 5], [0, -3, -9, -1]
    reducer = Band(offsets, heads)
    stream(query, key, reducers=[reducer], mask=mask, tile=tile)
    t = torch.arange(N)
    rows = dense.probabilities(query, key, mask(t, t)) if False else _dense(query, key, mask)
    mean = rows[:, heads].mean(1)
    found = reducer.finish(keep_batch=True)
    assert found.dims == ("batch", "head", "query", "offset") and found.sizes["head"] == 1
    for number, offset in enumerate(offsets):
        want = torch.full((BATCH, N), float("nan"))
        want[:, -offset:] = mean.diagonal(offset, -2, -1)
        assert np.allclose(found.values[:, 0, :, number], want, atol=1e-6, equal_nan=True)


def _dense(query, key, mask):
    t = torch.arange(N)
    logits = query @ key.repeat_interleave(HEADS // KV, 1).transpose(-1, -2) / D**0.5
    return logits.masked_fill(~mask(t, t), float("-inf")).softmax(-1)


def test_no_heads_no_numbers_and_bad_offsets():
    query, key = made()
    nothing = Band([-1], [])
    stream(query, key, reducers=[nothing])
    assert np.isnan(nothing.finish(keep_batch=True).values).all()
    with pytest.raises(ValueError, match="offsets must be different"):
        Band([1, 1], [0])


def test_the_state_does_not_grow_with_the_heads():
    query, key = made()
    reducer = Band(range(-9, 1), list(range(HEADS)))
    stream(query, key, reducers=[reducer])
    assert reducer._state["mass"].shape == (BATCH, 1, N, 10)
