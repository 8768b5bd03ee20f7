"""Massive activations: found where planted, by both conditions, and by neither alone."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from interp.core.errors import NumericalError, OutOfRange
from interp.sinks import massive_activations as massive


def quiet(seed: int = 0) -> torch.Tensor:
    return 0.1 * torch.randn(4, 7, 11, generator=torch.Generator().manual_seed(seed))


def test_exactly_the_planted_coordinates_are_found():
    residual = quiet()
    residual[1:3, 0, 5], residual[2, 4, 9] = -400.0, 250.0
    found = massive.detect(residual)
    assert [(m.layer, m.position, m.dim) for m in found] == [(1, 0, 5), (2, 0, 5), (2, 4, 9)]
    assert found[0].value == -400 and massive.detect(quiet()) == []
    assert massive.detect(residual.numpy()) == found


def test_size_and_ratio_are_both_needed():
    large_everywhere = 300 + quiet()
    assert massive.detect(large_everywhere) == []
    relative_only = quiet() / 100
    relative_only[1, 0, 5] = 50.0
    assert massive.detect(relative_only) == []
    assert len(massive.detect(relative_only, min_value=0)) == 1


@settings(deadline=None, max_examples=20)
@given(scale=st.floats(0.01, 1e4), seed=st.integers(0, 99))
def test_ratio_is_free_of_scale_and_of_the_order_of_positions(scale, seed):
    residual = quiet(seed)
    ratio = massive.ratio(residual)
    assert torch.allclose(massive.ratio(scale * residual), ratio, rtol=1e-4)
    assert torch.equal(massive.ratio(residual.flip(1)), ratio)


def test_profile_is_sorted_and_uses_the_true_median():
    residual = quiet()[:, :6]  # an even number of entries: the mean of the two middle ones
    largest, median = massive.magnitudes(residual, top=3)
    flat = residual.abs().flatten(1).numpy()
    assert np.allclose(largest, -np.sort(-flat)[:, :3])
    assert np.allclose(median, np.median(flat, axis=1))
    with pytest.raises(OutOfRange, match="top must lie"):
        massive.magnitudes(quiet(), top=78)


def test_dimensions_are_stable_only_across_inputs():
    def one(*dims):
        return [massive.MassiveActivation(1, 0, dim, 500.0) for dim in dims]

    inputs = [one(3, 8)] * 9 + [one(8, 8, 2)]
    assert massive.stable_dims(inputs) == (8, 3)
    assert massive.stable_dims(inputs, 1.0) == (8,)
    with pytest.raises(ValueError, match="no inputs"):
        massive.stable_dims([])


def test_overflow_is_refused_with_its_place():
    residual = quiet()
    residual[2, 5, 1] = torch.inf
    with pytest.raises(NumericalError, match="layer 2, position 5"):
        massive.detect(residual)
