"""Residual statistics equal the direct computation, however the positions are split."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from interp.core.errors import OutOfRange
from interp.stream.residual import NAMES, Cosine, Counts, Norm, TopDimensions, by_name

N, WIDTH = 13, 6


def states(seed=0):
    made = torch.randn(N, WIDTH, generator=torch.Generator().manual_seed(seed))
    made[0, 4] = -250.0
    return made


def fed(reducer, parts):
    for first, last in parts:
        reducer.add(states()[first:last], first)
    return reducer


@settings(deadline=None, max_examples=60)
@given(cuts=st.sets(st.integers(1, N - 1)), data=st.data(), reference=st.integers(0, N - 1))
def test_any_split_in_any_order_equals_one_pass(cuts, data, reference):
    edges = [0, *sorted(cuts), N]
    parts = data.draw(st.permutations(list(zip(edges, edges[1:]))))
    h = states()
    made = [Norm(), Cosine(reference), TopDimensions(2)]
    split = [fed(reducer, parts) for reducer in made]
    merged = []
    for make in (Norm, lambda: Cosine(reference), lambda: TopDimensions(2)):
        each = [fed(make(), [one]) for one in parts]
        whole = each[0]
        for other in each[1:]:
            whole = whole.merge(other)
        merged.append(whole)
    for norm, cosine, top in (split, merged):
        np.testing.assert_allclose(norm.finish(), h.norm(dim=-1), rtol=1e-6)
        unit = torch.nn.functional.normalize(h, dim=-1)
        np.testing.assert_allclose(cosine.finish(), unit @ unit[reference], atol=1e-6)
        found = top.finish()
        order = h.abs().argsort(dim=-1, descending=True)[:, :2]
        np.testing.assert_allclose(found.sel(quantity="value"), h.gather(-1, order))
        np.testing.assert_allclose(found.sel(quantity="dimension"), order)
        np.testing.assert_allclose(found.sel(quantity="median")[:, 0],
                                   np.median(h.abs().numpy(), -1), rtol=1e-6)
        np.testing.assert_allclose(found.sel(quantity="median_all"), np.median(h.abs().numpy()),
                                   rtol=2e-4)
        assert norm.finish().dims == ("position",)
        assert top.finish().dims == ("position", "rank", "quantity")


def test_a_massive_activation_is_found_and_its_sign_kept():
    found = fed(TopDimensions(1), [(0, N)]).finish()
    assert found.sel(position=0, quantity="value").item() == -250.0
    assert found.sel(position=0, quantity="dimension").item() == 4
    assert abs(found.sel(quantity="value").values[1:]).max() < 5


def test_the_cosine_keeps_its_sign():
    reducer = Cosine(1)
    reducer.add(torch.tensor([[0.0, -2.0], [0.0, 1.0], [3.0, 3.0]]))
    np.testing.assert_allclose(reducer.finish(), [-1, 1, 2**-0.5], rtol=1e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_cast_first(dtype):
    h = torch.full((2, 4096), 30.0, dtype=dtype)
    reducer = Norm()
    reducer.add(h)
    np.testing.assert_allclose(reducer.finish(), 30 * 64, rtol=1e-6)


@settings(deadline=None, max_examples=60)
@given(numbers=st.lists(st.floats(0, 1e6, width=32), min_size=1, max_size=40), cut=st.integers(0, 40))
def test_counts_have_the_median_of_what_they_counted(numbers, cut):
    one, two = Counts(), Counts()
    one.add(torch.tensor([numbers[:cut]], dtype=torch.float32))
    two.add(torch.tensor([numbers[cut:]], dtype=torch.float32))
    want = np.median(np.array(numbers, dtype=np.float32))
    np.testing.assert_allclose(one.merge(two).median(), want, rtol=2e-4, atol=1e-38)


def test_many_numbers_are_counted_like_few():
    x = torch.rand(600, 1000, generator=torch.Generator().manual_seed(0)) ** 3
    many, few = Counts(), Counts()
    many.add(x)
    for part in x.split(100):
        few.add(part)
    assert many.median() == few.median()
    np.testing.assert_allclose(many.median(), x.median(), rtol=2e-4)


@pytest.mark.parametrize(("error", "sentence", "call"), [
    (ValueError, "position 5 was already added", lambda: fed(Norm(), [(0, 6), (5, 7)])),
    (ValueError, "position 2 was already added",
     lambda: fed(Norm(), [(0, 6)]).merge(fed(Norm(), [(2, 4)]))),
    (ValueError, "they are not the same", lambda: Cosine(0).merge(Cosine(1))),
    (ValueError, "saw no states", lambda: Norm().finish()),
    (ValueError, "k is 0", lambda: TopDimensions(0)),
    (OutOfRange, "k is 9, but a state has 6", lambda: fed(TopDimensions(9), [(0, 2)])),
    (OutOfRange, "reference is -1", lambda: Cosine(-1)),
    (OutOfRange, "reference position 8 of the statistic 'cosine' was never added",
     lambda: fed(Cosine(8), [(0, 5)]).finish()),
    (ValueError, "there is no statistic 'size'; choose from: norm, top_dimensions, cosine",
     lambda: by_name("size")),
])
def test_misuse_is_refused_in_a_sentence(error, sentence, call):
    with pytest.raises(error, match=sentence):
        call()


def test_names_make_their_reducers():
    assert [by_name(name).name for name in NAMES] == ["norm", "top_dimensions", "cosine"]
    assert by_name("cosine", reference=3).reference == 3


def test_start_forgets():
    reducer = fed(Cosine(0), [(0, N)])
    reducer.start(n_positions=N)
    reducer.add(torch.eye(3))
    assert reducer.finish().values.tolist() == [1.0, 0.0, 0.0]
