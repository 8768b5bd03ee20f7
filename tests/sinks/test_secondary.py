"""Secondary sinks: the released detections, planted sinks with decoys, and what must not matter."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from interp.core.errors import NumericalError, OutOfRange
from interp.sinks import secondary

REFERENCE = Path(__file__).parents[3] / "shared/reference"
needs_reference = pytest.mark.skipif(
    not REFERENCE.exists(), reason="the reference data lie outside the repository"
)
LABELS = {"bos_sink": "primary", "secondary": "secondary", "noise": "noise"}


def planted(
    sinks: dict[int, tuple[int, int, float]], n_layers=30, n_positions=40, width=48, seed=0,
    window=(3, 28),
) -> torch.Tensor:
    """Random residuals with a primary at 0 in `window` and, for each position: first layer, one
    past the last layer, and cosine to the primary."""
    draw = torch.Generator().manual_seed(seed)
    residual = torch.randn(n_layers, n_positions, width, generator=draw)
    axis = torch.nn.functional.normalize(torch.randn(width, generator=draw), dim=0)
    residual[window[0] : window[1], 0] = 400 * axis + torch.randn(width, generator=draw)
    for position, (start, stop, cosine) in sinks.items():
        side = torch.randn(width, generator=draw)
        side = torch.nn.functional.normalize(side - (side @ axis) * axis, dim=0)
        mixed = cosine * axis + (1 - cosine**2) ** 0.5 * side
        residual[start:stop, position] = 60 * mixed
    return residual


@needs_reference
@pytest.mark.parametrize("kind", ["numpy", "torch"])
def test_score_equals_the_released_detection(kind):
    residual = np.load(REFERENCE / "released_code_outputs/secondary_sinks.npz")["hidden"]
    if kind == "torch":
        residual = torch.from_numpy(residual)
    expected = json.loads(
        (REFERENCE / "released_code_outputs/secondary_sinks.json").read_text())
    found = secondary.score(residual, primary=(0,), threshold=0.9, rule="official")
    assert found.levels == {
        int(p): (tuple(entry["layers"]), LABELS[entry["type"]]) for p, entry in expected.items()
    }
    # The window's end is a true fall of the norm here, so "raw" must agree.
    assert secondary.score(residual, last_layer="raw").levels == found.levels


def test_sinks_are_found_where_planted_with_onset_sign_and_run_and_decoys_are_not():
    residual = planted({7: (12, 24, 0.97), 19: (10, 25, -0.96), 23: (9, 26, 0.85)})
    residual[15, 19] = residual[0, 5]  # a gap
    found = secondary.score(residual)
    assert set(found.levels) == {0, 7, 19}
    assert found.of("secondary") == (7, 19) and found.window == (3, 28)
    assert found.onset == {0: 3, 7: 12, 19: 10}
    assert found.lifetime == {0: 25, 7: 12, 19: 14}
    assert found.longest_run == {0: 25, 7: 12, 19: 9}
    assert found.anti_aligned == {0: 0, 7: 0, 19: 14}
    assert all(c < -0.9 for c in found.cosine[19]) and all(c > 0.9 for c in found.cosine[7])


def test_without_planted_sinks_only_the_primary_is_found():
    for seed in range(5):
        assert set(secondary.score(planted({}, seed=seed)).levels) == {0}


def test_precision_and_recall_on_many_planted_sequences():
    draw = np.random.default_rng(0)
    hits = false = onset_exact = total = 0
    for seed in range(60):
        n_layers = int(draw.integers(24, 49))
        window = (int(draw.integers(1, 5)), n_layers - 1)
        start = int(draw.integers(window[0] + 6, n_layers - 8))
        sink = int(draw.integers(3, 40))
        truth = {sink: (start, n_layers - 2, float(draw.choice([-1, 1]) * draw.uniform(0.93, 1)))}
        residual = planted(truth, n_layers=n_layers, seed=seed, window=window)
        found = secondary.score(residual, rule="relative")
        total += 1
        hits += sink in found.of("secondary")
        false += len(set(found.of("secondary")) - {sink})
        onset_exact += found.onset.get(sink) == start
    assert hits / total >= 0.95 and hits / (hits + false) >= 0.95
    assert onset_exact / total >= 0.95


def test_norm_is_not_the_detector():
    residual = planted({7: (12, 24, 0.97)})
    residual[:, 11] *= 500  # large and in no particular direction
    residual[:, 7] /= 500
    assert secondary.score(residual).of("secondary") == (7,)


def test_the_primary_is_the_candidate_with_the_largest_mean_norm():
    residual = planted({9: (12, 24, 0.97)})[:, [3, 4, 0, *range(5, 40), 1, 2]]
    found = secondary.score(residual, primary=(0, 1, 2))
    assert found.primary == 2 and found.window == (3, 28) and found.of("secondary") == (7,)
    # Candidates need not be 0, 1, 2: the position counts, not its place in the list.
    assert secondary.score(residual, primary=(1, 2)).primary == 2


def test_shallow_models_need_the_relative_rule():
    residual = planted({9: (5, 11, 0.99)}, n_layers=12, window=(1, 12))
    assert secondary.score(residual, rule="relative").of("secondary") == (9,)
    # Twelve layers: by the official rule even one layer would be a primary sink.
    assert secondary.score(residual, last_layer="raw").of("primary") == (0, 9)


def test_the_window_survives_every_shape_of_the_norm():
    window = secondary.primary_window
    assert window(torch.tensor([1.0, 1.0, 9.0])) == (2, 3)  # rise into the last layer
    assert window(torch.tensor([5.0])) == (0, 1)
    assert window(torch.tensor([1.0, 9.0, 9.1, 8.9, 9.4, 9.5]), "raw") == (1, 6)
    assert window(torch.tensor([1.0, 9.0, 9.1, 8.9, 9.4, 9.5]), "hf") == (1, 3)
    assert window(torch.tensor([1.0, 9.0, 9.1, 8.9, 2.0, 1.5]), "raw") == (1, 4)
    assert secondary.score(planted({}, n_layers=5, window=(4, 5))).window == (4, 5)


@settings(deadline=None, max_examples=20)
@given(seed=st.integers(0, 999), scale=st.floats(0.02, 5e3), more=st.integers(1, 5))
def test_scale_rotation_and_later_tokens_do_not_matter(seed, scale, more):
    residual = planted({7: (12, 24, 0.97), 19: (14, 20, -0.95)}, seed=seed).double()
    found = secondary.score(residual)
    assert secondary.score(scale * residual).levels == found.levels
    draw = torch.Generator().manual_seed(seed)
    rotation = torch.linalg.qr(torch.randn(48, 48, generator=draw, dtype=torch.float64)).Q
    assert secondary.score(residual @ rotation).levels == found.levels
    later = torch.randn(30, more, 48, generator=draw, dtype=torch.float64)
    assert secondary.score(torch.cat([residual, later], 1)).levels == found.levels


@settings(deadline=None, max_examples=20)
@given(order=st.permutations(range(1, 40)))
def test_permuting_later_positions_permutes_the_sinks(order):
    residual = planted({7: (12, 24, 0.97), 19: (14, 20, -0.95)})
    found = secondary.score(residual).levels
    moved = secondary.score(residual[:, [0, *order]]).levels
    assert moved == {0: found[0], order.index(7) + 1: found[7], order.index(19) + 1: found[19]}


def test_half_precision_is_read_in_float32():
    residual = planted({7: (12, 24, 0.97)})
    assert secondary.score(residual.bfloat16()).levels == secondary.score(residual).levels


def test_cosine_to_a_position_is_the_cosine():
    residual = planted({})
    for position in (0, 3):
        expected = torch.cosine_similarity(residual, residual[:, position, None], dim=-1)
        assert torch.allclose(secondary.cosine_to(residual, position), expected, atol=1e-6)


def test_sink_score_is_the_column_mean_and_uniform_attention_scores_one():
    n = 9
    uniform = (torch.ones(n, n).tril() / torch.arange(1.0, n + 1)[:, None])[None, None]
    for position in (0, 3, 7):
        one = secondary.sink_score(uniform, position, length_free=True)
        assert float(one) == pytest.approx(1, abs=1e-6)
        expected = np.mean([1 / (t + 1) for t in range(position + 1, n)])
        assert float(secondary.sink_score(uniform, position)) == pytest.approx(expected)
    with pytest.raises(OutOfRange, match="no later queries"):
        secondary.sink_score(uniform, 8)


def test_primary_strength_falls_where_the_primary_was_weakened():
    attention = torch.zeros(6, 2, 8, 8)
    attention[:4, ..., 0], attention[4:, ..., 0] = 0.9, 0.2
    attention[..., 3] = 0.1  # another key must not count
    strength = secondary.primary_strength(attention)
    assert torch.allclose(strength, torch.tensor([0.9] * 4 + [0.2] * 2))


def test_bad_input_is_named():
    residual = planted({})
    residual[4, 17, 2] = torch.nan
    with pytest.raises(NumericalError, match="layer 4, position 17"):
        secondary.score(residual)
    with pytest.raises(OutOfRange, match="candidate 40 is outside"):
        secondary.score(planted({}), primary=(0, 40))
    with pytest.raises(ValueError, match="no candidate"):
        secondary.score(planted({}), primary=())
    with pytest.raises(ValueError, match="threshold"):
        secondary.score(planted({}), threshold=1.2)
