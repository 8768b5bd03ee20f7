"""Image-centric selection: equal to the released code, in both meanings of rho."""

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from interp.core.errors import NumericalError, OutOfRange
from interp.heads import image_centric

REFERENCE = Path(__file__).parents[3] / "shared/reference/released_code_outputs"
needs_reference = pytest.mark.skipif(
    not REFERENCE.exists(), reason="the reference data lie outside the repository"
)
IMAGE, SINKS = slice(2, 9), [0, 3, 5]


def attention(seed: int = 0) -> torch.Tensor:
    draw = torch.Generator().manual_seed(seed)
    return torch.randn(4, 6, 12, generator=draw, dtype=torch.float64).mul(2).softmax(-1)


@needs_reference
@pytest.mark.parametrize("sample", [0, 1, 2])
@pytest.mark.parametrize("convention", ["code", "paper"])
@pytest.mark.parametrize("kind", ["numpy", "torch"])
def test_selection_equals_the_released_code(sample, convention, kind):
    data = np.load(REFERENCE / f"var_{sample}.npz")
    start = int(data["image_start"])
    rho = float(data["rho"])
    rows = data["attention"] if kind == "numpy" else torch.from_numpy(data["attention"])
    chosen = image_centric.select(
        rows, slice(start, start + int(data["image_len"])), data["sink_positions"],
        rho if convention == "code" else 1 - rho, data["summ"], convention=convention,
    )
    assert chosen.nonzero().tolist() == sorted(data["selected_head_query"].tolist())


@needs_reference
def test_the_two_meanings_of_rho_coincide_only_at_one_half():
    same = []
    for sample in (0, 1, 2):
        data = np.load(REFERENCE / f"var_{sample}.npz")
        start = int(data["image_start"])
        image = slice(start, start + int(data["image_len"]))
        paper, code = (
            image_centric.select(data["attention"], image, data["sink_positions"], data["rho"],
                                 data["summ"], convention=convention)
            for convention in ("paper", "code"))
        same.append(torch.equal(paper, code))
    assert same == [True, False, False]


def test_heads_are_chosen_for_content_and_not_for_sinks_or_for_little():
    rows = torch.full((3, 5, 12), 0.01, dtype=torch.float64)
    rows[0, :, 6] = 0.5  # content
    rows[1, :, 3] = 0.5  # a visual sink
    rows[2, :, 10] = 0.5  # text
    chosen = image_centric.select(rows, IMAGE, SINKS)
    assert chosen.tolist() == [[True] * 5, [False] * 5, [False] * 5]
    assert not image_centric.select(rows, IMAGE, SINKS, min_image_mass=0.6).any()
    assert image_centric.select(rows, IMAGE, SINKS, 0, 0).all()


def test_share_and_sink_share_add_to_one_and_all_mass_on_sinks_gives_zero():
    rows = attention()
    on_sinks = rows[..., [3, 5]].sum(-1) / rows[..., 2:9].sum(-1)
    share = image_centric.nonsink_share(rows, IMAGE, SINKS)
    assert torch.allclose(share + on_sinks, torch.ones(4, 6, dtype=torch.float64))
    only = torch.zeros(1, 1, 12)
    only[..., 5] = 1
    assert float(image_centric.nonsink_share(only, IMAGE, SINKS)) == 0
    nothing = torch.zeros(1, 1, 12)
    nothing[..., 0] = 1
    assert float(image_centric.nonsink_share(nothing, IMAGE, SINKS)) == 0


@settings(deadline=None, max_examples=25)
@given(seed=st.integers(0, 999), order=st.permutations(range(4)), more=st.integers(1, 5))
def test_head_order_text_sinks_and_appended_keys_do_not_matter(seed, order, more):
    rows = attention(seed)
    chosen = image_centric.select(rows, IMAGE, SINKS)
    assert torch.equal(image_centric.select(rows[order], IMAGE, SINKS), chosen[order])
    assert torch.equal(image_centric.select(rows, IMAGE, [3, 5, 10, 11]), chosen)
    longer = torch.nn.functional.pad(rows, (0, more))
    assert torch.equal(image_centric.select(longer, IMAGE, SINKS), chosen)


def test_positions_may_be_slices_lists_arrays_or_masks_and_queries_restrict_rows():
    rows = attention()
    mask = np.zeros(12, dtype=bool)
    mask[2:9] = True
    chosen = image_centric.select(rows, IMAGE, SINKS)
    assert chosen.any() and not chosen.all()
    for image in (list(range(2, 9)), np.arange(2, 9), torch.arange(2, 9), mask):
        assert torch.equal(image_centric.select(rows, image, np.array(SINKS)), chosen)
    late = image_centric.select(rows, IMAGE, SINKS, queries=slice(4, 6))
    assert torch.equal(late[:, 4:], chosen[:, 4:]) and not late[:, :4].any()


def test_several_images_are_one_set_of_positions():
    rows = attention()
    both = [*range(2, 5), *range(8, 11)]
    mass = image_centric.image_mass(rows, both)
    parts = [image_centric.image_mass(rows, part) for part in (slice(2, 5), slice(8, 11))]
    assert torch.allclose(mass, parts[0] + parts[1])


def test_bad_input_is_named():
    with pytest.raises(OutOfRange, match="key 12 does not exist"):
        image_centric.select(attention(), IMAGE, [12])
    with pytest.raises(OutOfRange, match="keys up to 20"):
        image_centric.select(attention(), slice(2, 20), SINKS)
    with pytest.raises(ValueError, match="min_nonsink_share must lie between 0 and 1, not 1.4"):
        image_centric.select(attention(), IMAGE, SINKS, 1.4)
    with pytest.raises(NumericalError, match="NaN"):
        image_centric.select(attention() * torch.nan, IMAGE, SINKS)
