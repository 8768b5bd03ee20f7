"""Operations on rows: which rows look at the image, and mass that moves without being lost."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from interp.stream.rows import image_centric_rows, move_mass

N = 12
IMAGE = torch.zeros(N, dtype=torch.bool)
IMAGE[2:9] = True
SINKS = torch.zeros(N, dtype=torch.bool)
SINKS[[0, 3, 5]] = True


def attention(seed: int = 0, total: float = 1.0) -> torch.Tensor:
    """Rows [head, query, key]; a learned sink leaves them with less than one."""
    draw = torch.Generator().manual_seed(seed)
    return torch.randn(4, 6, N, generator=draw, dtype=torch.float64).mul(2).softmax(-1) * total


def loop_move(p, rows, sinks, destination, fraction):
    """The definition, one row after the other."""
    out = p.clone()
    for h, q in rows.nonzero().tolist():
        row = p[h, q]
        receivers = [k for k in range(N) if destination[k] and not sinks[k]]
        base = sum(float(row[k]) for k in range(N) if destination[k])
        if base == 0 or not receivers:
            continue
        budget = fraction * sum(float(row[k]) for k in range(N) if sinks[k])
        for k in range(N):
            if sinks[k]:
                out[h, q, k] = (1 - fraction) * row[k]
            elif destination[k]:
                out[h, q, k] = row[k] + budget * row[k] / base
    return out


# -- which rows ------------------------------------------------------------------------------


def test_rows_are_chosen_by_what_they_put_on_content():
    rows = torch.full((3, 5, N), 0.01)
    rows[0, :, 6] = 0.5  # content
    rows[1, :, 3] = 0.5  # a sink of the image
    rows[2, :, 10] = 0.5  # text
    assert image_centric_rows(rows, IMAGE, SINKS).tolist() == [[True] * 5, [False] * 5, [False] * 5]
    assert not image_centric_rows(rows, IMAGE, SINKS, 0.5, 0.6).any()
    assert image_centric_rows(rows, IMAGE, SINKS, 0.0, 0.0).all()


@settings(deadline=None, max_examples=30)
@given(seed=st.integers(0, 999), share=st.floats(0, 1), mass=st.floats(0, 1))
def test_both_conditions_are_those_of_the_definition(seed, share, mass):
    p = attention(seed)
    chosen = image_centric_rows(p, IMAGE, SINKS, share, mass)
    on_image = p[..., 2:9].sum(-1)
    content = on_image - p[..., [3, 5]].sum(-1)
    clear = ((content / on_image - share).abs() > 1e-9) & ((on_image - mass).abs() > 1e-9)
    expected = (content / on_image >= share) & (on_image >= mass)
    assert torch.equal(chosen[clear], expected[clear])


@settings(deadline=None, max_examples=20)
@given(seed=st.integers(0, 999), order=st.permutations(range(4)), more=st.integers(1, 5))
def test_sinks_outside_the_image_head_order_and_later_keys_do_not_matter(seed, order, more):
    p = attention(seed)
    chosen = image_centric_rows(p, IMAGE, SINKS)
    text = SINKS.clone()
    text[[0, 10, 11]] = torch.tensor([False, True, True])
    assert torch.equal(image_centric_rows(p, IMAGE, text), chosen)
    assert torch.equal(image_centric_rows(p[order], IMAGE, SINKS), chosen[order])
    pad = torch.nn.functional.pad
    longer = image_centric_rows(pad(p, (0, more)), pad(IMAGE, (0, more)), pad(SINKS, (0, more)))
    assert torch.equal(longer, chosen)


def test_an_empty_image_chooses_nothing():
    assert not image_centric_rows(attention(), torch.zeros(N, dtype=torch.bool), SINKS).any()


# -- moving mass ------------------------------------------------------------------------------


@settings(deadline=None, max_examples=40)
@given(seed=st.integers(0, 999), fraction=st.floats(0, 1), total=st.sampled_from([1.0, 0.3]))
def test_moving_is_the_definition_and_loses_nothing(seed, fraction, total):
    p = attention(seed, total)
    rows = torch.from_numpy(np.random.default_rng(seed).random((4, 6)) < 0.5)
    content = IMAGE & ~SINKS
    moved = move_mass(p, rows, SINKS, content, fraction)
    assert torch.allclose(moved, loop_move(p, rows, SINKS, content, fraction), atol=1e-12)
    assert torch.allclose(moved.sum(-1), p.sum(-1), atol=1e-12) and bool((moved >= 0).all())
    assert torch.equal(moved[~rows], p[~rows])
    # Pro rata: receivers keep their proportions, and keys that are neither stay as they are.
    assert torch.allclose(moved[..., 7] * p[..., 6], moved[..., 6] * p[..., 7], atol=1e-12)
    rest = ~(IMAGE | SINKS)
    assert torch.equal(moved[..., rest], p[..., rest])


def test_everything_or_nothing_can_move():
    p, every = attention(), torch.ones(4, 6, dtype=torch.bool)
    content = IMAGE & ~SINKS
    assert torch.equal(move_mass(p, every, SINKS, content, 0.0), p)
    gone = move_mass(p, every, SINKS, content, 1.0)
    assert float(gone[..., SINKS].abs().max()) < 1e-15
    assert torch.allclose(gone[..., content].sum(-1), p[..., content | SINKS].sum(-1))


def test_rows_with_nothing_to_be_proportional_to_or_nothing_to_give_stay():
    p, every = attention(), torch.ones(4, 6, dtype=torch.bool)
    content = IMAGE & ~SINKS
    p[0][:, content] = 0.0
    p[1][:, SINKS] = 0.0
    moved = move_mass(p, every, SINKS, content, 0.7)
    assert torch.equal(moved[:2], p[:2]) and not torch.allclose(moved[2:], p[2:])
    nowhere = torch.zeros(N, dtype=torch.bool)
    assert torch.equal(move_mass(p, every, SINKS, nowhere, 0.7), p)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_the_precision_of_the_rows_is_kept(dtype):
    every = torch.ones(4, 6, dtype=torch.bool)
    found = move_mass(attention().to(dtype), every, SINKS, IMAGE & ~SINKS, 0.5)
    assert found.dtype == dtype
    assert torch.allclose(found.double().sum(-1), torch.ones(4, 6, dtype=torch.float64), atol=3e-2)
