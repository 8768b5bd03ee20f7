"""Redistribution: equal to the released code, conserves rows, moves exactly what it says."""

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from interp.causal.redistribute import budget, fraction_moved, key_mask, redistribute
from interp.core.errors import NumericalError, OutOfRange

REFERENCE = Path(__file__).parents[3] / "shared/reference/released_code_outputs"
needs_reference = pytest.mark.skipif(
    not REFERENCE.exists(), reason="the reference data lie outside the repository"
)
IMAGE, SINKS = slice(2, 9), [0, 3, 5]
EVERY = torch.ones(4, 6, dtype=torch.bool)


def attention(seed: int = 0) -> torch.Tensor:
    draw = torch.Generator().manual_seed(seed)
    return torch.randn(4, 6, 12, generator=draw, dtype=torch.float64).mul(2).softmax(-1)


@needs_reference
@pytest.mark.parametrize("sample", [0, 1, 2])
@pytest.mark.parametrize("kind", ["numpy", "torch"])
@pytest.mark.parametrize("convention", ["paper", "code"])
def test_redistribution_equals_the_released_code(sample, kind, convention):
    data = np.load(REFERENCE / f"var_{sample}.npz")
    given = data["attention"] if kind == "numpy" else torch.from_numpy(data["attention"])
    start, stop = int(data["image_start"]), int(data["image_start"] + data["image_len"])
    rows = np.zeros(given.shape[:2], dtype=bool)
    rows[tuple(data["selected_head_query"].T)] = True
    rows[:, :stop] = False  # the code edits only queries after the image
    p = float(data["p"])
    found = redistribute(
        given, rows, data["sink_positions"], slice(start, stop),
        p if convention == "code" else 1 - p, convention=convention,
    )
    assert np.abs(found.numpy() - data["redistributed"]).max() < 1e-5
    # The other meaning of p is a visibly different edit.
    wrong = redistribute(given, rows, data["sink_positions"], slice(start, stop),
                         1 - p if convention == "code" else p, convention=convention)
    assert np.abs(wrong.numpy() - data["redistributed"]).max() > 1e-2


@settings(deadline=None, max_examples=40)
@given(seed=st.integers(0, 999), fraction=st.floats(0, 1), total=st.floats(0.1, 1))
def test_rows_keep_their_sum_also_below_one(seed, fraction, total):
    given = attention(seed) * total
    found = redistribute(given, EVERY, SINKS, IMAGE, fraction)
    assert torch.allclose(found.sum(-1), given.sum(-1), atol=1e-12)
    assert float(found.min()) >= 0


@settings(deadline=None, max_examples=25)
@given(seed=st.integers(0, 999), fraction=st.floats(0.01, 1))
def test_exactly_the_fraction_leaves_the_sinks_and_arrives_pro_rata(seed, fraction):
    given = attention(seed)
    found = redistribute(given, EVERY, SINKS, IMAGE, fraction)
    content = [2, 4, 6, 7, 8]
    assert torch.allclose(found[..., SINKS], (1 - fraction) * given[..., SINKS])
    gain = found[..., content] - given[..., content]
    assert torch.allclose(gain.sum(-1), fraction * given[..., SINKS].sum(-1))
    ratio = found[..., content] / given[..., content]
    assert torch.allclose(ratio, ratio[..., :1].expand_as(ratio))
    others = [1, 9, 10, 11]
    assert torch.equal(found[..., others], given[..., others])


def test_nothing_changes_without_sinks_without_fraction_or_without_destination():
    given = attention()
    assert torch.equal(redistribute(given, EVERY, [], IMAGE, 0.6), given)
    assert torch.equal(redistribute(given, EVERY, SINKS, IMAGE, 0.0), given)
    assert torch.equal(redistribute(given, EVERY, SINKS, SINKS, 0.6), given)
    blind = given.clone()
    blind[..., 2:9] = 0
    blind[..., 3] = 0.3  # of the image only a sink is attended
    assert torch.equal(redistribute(blind, EVERY, SINKS, IMAGE, 0.6), blind)


def test_only_chosen_rows_change():
    rows = torch.zeros(4, 6, dtype=torch.bool)
    rows[1, 4] = rows[3, 0] = True
    given = attention()
    changed = (redistribute(given, rows, SINKS, IMAGE, 0.6) != given).any(-1)
    assert torch.equal(changed, rows)


def test_future_keys_stay_invisible():
    causal = attention()
    causal[:, torch.arange(12) > torch.arange(6)[:, None] + 6] = 0
    found = redistribute(causal, EVERY, SINKS, slice(2, 12), 0.9)
    assert bool((found[causal == 0] == 0).all())


@settings(deadline=None, max_examples=20)
@given(order=st.permutations(range(4)), more=st.integers(1, 4))
def test_head_order_and_appended_keys_do_not_matter(order, more):
    given = attention()
    rows = EVERY.clone()
    rows[2, 3:] = False
    found = redistribute(given, rows, SINKS, IMAGE, 0.6)
    assert torch.equal(redistribute(given[order], rows[order], SINKS, IMAGE, 0.6), found[order])
    longer = torch.nn.functional.pad(given, (0, more))
    assert torch.equal(redistribute(longer, rows, SINKS, IMAGE, 0.6)[..., :12], found)


def test_sources_limit_who_gives_but_no_sink_ever_receives():
    given = attention()
    visual = redistribute(given, EVERY, SINKS, IMAGE, 0.5, sources=IMAGE)
    assert torch.equal(visual[..., 0], given[..., 0])
    assert torch.allclose(visual[..., [3, 5]], 0.5 * given[..., [3, 5]])
    text = redistribute(given, EVERY, SINKS, IMAGE, 0.5, sources=[0])
    assert torch.equal(text[..., [3, 5]], given[..., [3, 5]])
    assert torch.allclose(text[..., 0], 0.5 * given[..., 0])


def test_the_budget_splits_into_text_and_visual_sinks():
    given = attention()
    text, visual = budget(given, SINKS, IMAGE, 0.6)
    assert torch.allclose(text, 0.6 * given[..., 0])
    assert torch.allclose(visual, 0.6 * given[..., [3, 5]].sum(-1))
    found = redistribute(given, EVERY, SINKS, IMAGE, 0.6)
    freed = (given - found)[..., SINKS].sum(-1)
    assert torch.allclose(freed, text + visual)


def test_paper_and_code_mean_opposite_things_by_p():
    given = attention()
    paper = redistribute(given, EVERY, SINKS, IMAGE, 0.3)
    assert torch.allclose(redistribute(given, EVERY, SINKS, IMAGE, 0.7, convention="code"), paper)
    assert fraction_moved(0.5) == fraction_moved(0.5, "code")


def test_precision_of_the_map_is_kept():
    for dtype in (torch.float64, torch.float32, torch.bfloat16):
        assert redistribute(attention().to(dtype), EVERY, SINKS, IMAGE, 0.5).dtype == dtype


def test_key_masks_accept_every_way_to_name_positions():
    expected = torch.tensor([False, True, True, False, False])
    for keys in (slice(1, 3), [1, 2], (2, 1), range(1, 3), np.array([1, 2]), torch.tensor([1, 2]),
                 expected, expected.numpy()):
        assert torch.equal(key_mask(keys, 5), expected)
    assert not key_mask([], 5).any()


def test_bad_input_is_named():
    with pytest.raises(ValueError, match="fraction must lie between 0 and 1, not 1.2"):
        redistribute(attention(), EVERY, SINKS, IMAGE, 1.2)
    with pytest.raises(OutOfRange, match="key 12 does not exist: there are keys 0 to 11"):
        redistribute(attention(), EVERY, [12], IMAGE, 0.5)
    with pytest.raises(OutOfRange, match="key -1 does not exist"):
        redistribute(attention(), EVERY, [-1], IMAGE, 0.5)
    with pytest.raises(ValueError, match="does not fit 12 keys"):
        redistribute(attention(), EVERY, torch.ones(5, dtype=torch.bool), IMAGE, 0.5)
    with pytest.raises(NumericalError, match="NaN"):
        redistribute(attention() * torch.nan, EVERY, SINKS, IMAGE, 0.5)
