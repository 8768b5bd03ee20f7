"""Statistics of a few rows: equal to the dense pattern on every architecture, in both lanes."""

import numpy as np
import pytest
import torch

import interp
from interp.models.model import Model
from interp.stream.chosen_rows import RowMass, RowWeights
from interp.stream.per_layer import PerLayer
from interp.stream.tile import Tile

ROWS = (9, 4, 12)
SEGMENTS = {"gold": [1, 2, 3], "rest": [0, 5, 6, 7], "sink": [0, 1]}


def prompt() -> interp.Prompt:
    return interp.Prompt.from_tokens(np.random.default_rng(1).integers(3, 90, 14))


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "gemma2", "gpt_oss"])
@pytest.mark.parametrize("lane", ["hf", "bridge"])
def test_rows_and_their_masses_are_those_of_the_dense_pattern(tiny, architecture, lane):
    model = Model(tiny(architecture), f"tiny-{architecture}", lane=lane)
    dense = model.run(prompt(), read="pattern").reads["pattern"].values[0][:, :, list(ROWS)]
    rows = model.run(prompt(), stats=[PerLayer("segments", lambda i, layer: RowWeights(ROWS))])
    rows = rows.stats["segments"].isel(prompt=0)
    assert rows.dims == ("layer", "head", "query", "key") and list(rows["query"]) == list(ROWS)
    assert np.allclose(rows.values, dense, atol=2e-6)
    mass = model.run(prompt(), stats=[
        PerLayer("segments", lambda i, layer: RowMass(SEGMENTS, ROWS))]).stats["segments"]
    window = 5 if architecture in ("gemma2", "gpt_oss") else None
    for name, keys in SEGMENTS.items():
        found = mass.sel(segment=name).isel(prompt=0).values
        wanted = dense[..., keys].sum(-1)
        for number, row in enumerate(ROWS):
            sees = sum(row - window < key <= row for key in keys) if window else \
                sum(key <= row for key in keys)
            if sees * 2 < len(keys) and not window:
                assert np.isnan(found[:, :, number]).all()
            known = np.isfinite(found[:, :, number])
            assert np.allclose(found[:, :, number][known], wanted[:, :, number][known], atol=2e-6)
    hidden = mass.sel(segment="gold", query=12).isel(prompt=0).isnull().all("head").values
    # Layer 0 of the windowed models sees only the last five keys, and says so instead of 0.
    assert hidden[0] == bool(window) and not hidden[1]


def test_tiles_in_any_order_give_the_same():
    torch.manual_seed(0)
    p = torch.rand(1, 2, 6, 6).tril()
    p = p / p.sum(-1, keepdim=True)
    seen = torch.ones(1, 1, 6, 6, dtype=torch.bool).tril()
    whole, pieces = (RowMass({"a": [0, 3], "b": [5]}, [5, 2]) for _ in range(2))
    whole.add(Tile(p, torch.arange(6), torch.arange(6), seen))
    for columns in (slice(3, 6), slice(0, 3)):
        for rows in ([1, 5, 3], [2, 0, 4]):
            pieces.register(1, 2, [q for q in rows if not pieces._seen[q:q + 1].any()], 6) \
                if columns.start else None
            pieces.add(Tile(p[:, :, rows][..., columns], torch.tensor(rows),
                            torch.arange(6)[columns], seen[:, :, rows][..., columns]))
    assert np.allclose(whole.finish(), pieces.finish(), atol=1e-6, equal_nan=True)
    assert np.isnan(whole.finish().sel(segment="b", query=2)).all()
    assert np.isfinite(whole.finish().sel(segment="a", query=2)).all()


@pytest.mark.parametrize("rows", [[], [3, 3], [-1]])
def test_rows_that_cannot_be_are_refused(rows):
    with pytest.raises(ValueError, match="different query positions"):
        RowWeights(rows)
