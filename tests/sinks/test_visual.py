"""phi, sink positions, discovery of sink dimensions, and where visual sinks come from."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from interp.core.errors import NumericalError, OutOfRange
from interp.sinks import visual

REFERENCE = Path(__file__).parents[3] / "shared/reference/released_code_outputs"
needs_reference = pytest.mark.skipif(
    not REFERENCE.exists(), reason="the reference data lie outside the repository"
)


def residual(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@needs_reference
@pytest.mark.parametrize("sample", [0, 1, 2])
@pytest.mark.parametrize("comparison", [">", ">="])
def test_sink_positions_equal_the_released_code(sample, comparison):
    data = np.load(REFERENCE / f"var_{sample}.npz")
    found = visual.sink_positions(data["hidden"], data["sink_dims"], data["tau"], comparison)
    assert found.tolist() == data["sink_positions"].tolist()


@settings(deadline=None, max_examples=40)
@given(seed=st.integers(0, 999), width=st.integers(2, 40), scale=st.floats(0.1, 1e4))
def test_phi_is_bounded_by_the_root_of_the_width_and_free_of_scale(seed, width, scale):
    values = residual(seed, 3, 5, width).double()
    values[0, 0] = 0
    values[0, 0, 1] = 7.0
    phi = visual.sink_value(values, [1])
    assert float(phi.max()) <= math.sqrt(width) + 1e-9
    assert float(phi[0, 0]) == pytest.approx(math.sqrt(width), rel=1e-4)
    assert torch.allclose(visual.sink_value(scale * 100 * values, [1]),
                          visual.sink_value(100 * values, [1]), rtol=1e-4)


def test_phi_takes_the_largest_of_its_dimensions_and_ignores_all_others():
    values = residual(0, 4, 30)
    single = torch.stack([visual.sink_value(values, [d]) for d in (3, 8)])
    assert torch.equal(visual.sink_value(values, [8, 3]), single.amax(0))
    assert torch.equal(visual.sink_value(values[:, torch.randperm(30)].sort(-1).values, [0]),
                       visual.sink_value(values.sort(-1).values, [0]))


def test_paper_and_code_differ_exactly_at_tau():
    values = torch.zeros(3, 400, dtype=torch.float64)
    values[0, 5] = 1e6
    values[1:] = 1
    tau = float(visual.sink_value(values, [5])[0])
    assert visual.sink_positions(values, [5], tau).tolist() == [0]
    assert visual.sink_positions(values, [5], tau, ">").tolist() == []


def test_portable_tau_means_the_same_energy_at_every_width():
    for width, tau in ((2048, 14.1), (3584, 18.7), (4096, 20.0), (5120, 22.4), (8192, 28.3)):
        assert visual.portable_tau(width) == pytest.approx(tau, abs=0.05)
        energy = visual.portable_tau(width) ** 2 / width
        assert energy == pytest.approx(0.0977, abs=1e-4)
    values = residual(1, 6, 64)
    values[2, 9] = 90.0
    assert visual.sink_positions(values, [9]).tolist() == []  # 20 cannot be reached at width 64
    assert visual.sink_positions(values, [9], tau=None).tolist() == [2]


def anchors(dims: dict[int, float], birth: int = 2, n_layers: int = 20, seed: int = 0):
    values = 0.05 * residual(seed, 7, n_layers, 128)
    for dim, value in dims.items():
        values[:, birth:, dim] = value
    return values


def test_planted_dimensions_are_discovered_with_sign_and_birth_and_controls_are_empty():
    hits = clean = 0
    draw = np.random.default_rng(0)
    for seed in range(40):
        first, second = (int(d) for d in draw.choice(128, 2, replace=False))
        found = visual.candidate_dims(anchors({first: -90.0, second: 60.0}, 1, seed=seed))
        hits += found.dims == (first, second) and found.sign == (-1, 1)
        assert found.birth_layer == (1, 1)
        clean += visual.candidate_dims(anchors({}, seed=seed)).dims == ()
    assert hits >= 38 and clean >= 38


def test_a_dimension_must_recur_and_must_stand_out_against_the_median():
    values = anchors({5: -90.0})
    values[:3, :, 5] = 0.01  # absent in three of seven prompts
    assert visual.candidate_dims(values).dims == ()
    assert visual.candidate_dims(values, min_recurrence=0.5).dims == (5,)
    weak = anchors({5: 9.0}, birth=1)  # about 270 medians
    assert visual.candidate_dims(weak).dims == ()
    assert visual.candidate_dims(weak, min_ratio=100).dims == (5,)


def test_a_dimension_without_energy_of_its_own_is_no_candidate():
    values = anchors({5: -1e4, 9: 90.0}, birth=1)  # 9 is massive, but 5 holds the norm
    assert visual.candidate_dims(values).dims == (5,)
    assert visual.candidate_dims(values, min_root_share=0).dims == (5, 9)


def test_only_the_band_counts_and_the_cap_keeps_the_strongest():
    values = anchors({}, n_layers=20)
    values[:, 17:, 3] = 90.0  # after the band
    assert max(visual.band(20)) == 16 and visual.candidate_dims(values).dims == ()
    many = anchors({d: 60.0 + d for d in range(10)}, birth=1)
    found = visual.candidate_dims(many, min_root_share=0.01, cap=8)
    assert found.dims == tuple(range(9, 1, -1))
    assert sum(found.energy) < 1 and all(r == 1 for r in found.recurrence)


def test_origin_separates_vision_outliers_from_sinks_born_in_the_language_model():
    projected = residual(2, 30, 16)
    projected[[4, 7]] *= 12
    phi = residual(3, 9, 30).abs()
    phi[0:, 7] = 40.0  # above tau from the start: not born inside
    phi[3:, 11] = 40.0
    phi[5:, 4] = 40.0
    found = visual.origin(projected, phi, tau=20.0)
    labels = found.labels()
    assert [labels[i] for i in (4, 7, 11)] == ["V+L", "V-sink", "L-sink"]
    assert labels.count("none") == 27
    assert found.birth_layer[[4, 7, 11, 0]].tolist() == [5, 0, 3, -1]
    assert found.crosstab().values.tolist() == [[27, 1], [1, 1]]


def test_bad_input_is_named():
    with pytest.raises(OutOfRange, match=r"\[1415, 2533\] do not fit a residual of width 64"):
        visual.sink_value(residual(0, 3, 64), [1415, 2533])
    with pytest.raises(ValueError, match="no sink dimensions"):
        visual.sink_value(residual(0, 3, 64), [])
    broken = residual(0, 3, 64)
    broken[1, 2] = torch.nan
    with pytest.raises(NumericalError, match=r"index \(1, 2\)"):
        visual.sink_value(broken, [3])
    with pytest.raises(OutOfRange, match="are not among the 20 layers"):
        visual.candidate_dims(anchors({}), layers=[25])
    # The shape check of the test run (a TypeError) speaks before the function's own sentence.
    with pytest.raises((ValueError, TypeError), match="3 projected tokens but phi of 4|'phi'"):
        visual.origin(residual(0, 3, 5), residual(1, 6, 4), 20.0)
