"""Reducers alone: their accumulation, settings, names, labels and refusals."""

import copy

import numpy as np
import pytest
import torch

from interp.stream import dense, reducers
from interp.stream.reducers import (
    Distance,
    Entropy,
    Offsets,
    Received,
    RowDeficit,
    SegmentMass,
    TopKeys,
    ValueWeighted,
    _first_largest,
    by_name,
)
from interp.stream.tiles import Tile, stream

N, HEADS = 12, 3


def rows(seed=0):
    generator = torch.Generator().manual_seed(seed)
    visible = torch.ones(1, 1, N, N, dtype=torch.bool).tril()
    p = torch.rand(1, HEADS, N, N, generator=generator) * visible
    return p / p.sum(-1, keepdim=True), visible


def tile(first=0, last=N, **more):
    p, visible = rows()
    return Tile(p[:, :, first:last], torch.arange(first, last), torch.arange(N),
                visible[:, :, first:last], **more)


def test_dims_and_coordinates_are_named():
    reducer = Received()
    reducer.add(tile(4, 9))
    array = reducer.finish()
    assert array.dims == ("head", "key") and array.name == "received"
    assert reducer.finish(keep_batch=True).dims == ("batch", "head", "key")
    entropy = Entropy()
    entropy.add(tile(4, 9))
    assert entropy.finish()["query"].values.tolist() == [4, 5, 6, 7, 8]
    assert entropy.finish().attrs["units"] == "nats"


def test_a_batch_axis_appears_with_a_second_sequence():
    p, visible = rows()
    reducer = Entropy()
    reducer.add(Tile(p.repeat(2, 1, 1, 1), torch.arange(N), torch.arange(N), visible))
    assert reducer.finish().dims == ("batch", "head", "query")


def test_finish_can_be_asked_again_and_again():
    reducer = Received()
    reducer.add(tile(0, 5))
    first = reducer.finish()
    assert first.equals(reducer.finish())
    reducer.add(tile(5, N))
    whole = Received()
    whole.add(tile())
    np.testing.assert_allclose(reducer.finish(), whole.finish(), rtol=1e-6)


def test_start_forgets_and_reserves():
    reducer = SegmentMass({"early": range(3)})
    reducer.add(tile())
    before = reducer.finish()
    reducer.start(n_heads=HEADS, n_queries=100, n_keys=100)
    reducer.add(tile())
    assert before.equals(reducer.finish())
    with pytest.raises(ValueError, match="started for 3 heads, but is given 4"):
        reducer.start(n_heads=3)
        reducer.add(Tile(torch.ones(1, 4, 1, 1), torch.tensor([0]), torch.tensor([0])))


def test_merge_leaves_both_parts_alone():
    one, two = Received(), Received()
    one.add(tile(0, 5))
    two.add(tile(5, N))
    before = one.finish(), two.finish()
    merged = one.merge(two)
    assert before[0].equals(one.finish()) and before[1].equals(two.finish())
    whole = Received()
    whole.add(tile())
    np.testing.assert_allclose(merged.finish(), whole.finish(), rtol=1e-6)
    np.testing.assert_array_equal(two.merge(one).finish(), merged.finish())


def test_a_copy_goes_its_own_way():
    reducer = TopKeys(2)
    reducer.add(tile(0, 5))
    other = copy.deepcopy(reducer)
    other.add(tile(5, N))
    assert reducer.finish().sizes["query"] == 5 and other.finish().sizes["query"] == N


def test_merging_an_empty_part_changes_nothing():
    empty, full = Received(), Received()
    full.add(tile())
    assert empty.merge(full).finish().equals(full.finish())
    assert full.merge(empty).finish().equals(full.finish())


@pytest.mark.parametrize(("sentence", "call"), [
    ("they are not the same", lambda: Received().merge(Received("later"))),
    ("they are not the same", lambda: Received().merge(Entropy())),
    ("axis must be 'query' or 'batch', not 'head'", lambda: Received().merge(Received(), "head")),
    ("query 4 is in both parts", lambda: part(0, 5).merge(part(4, 9))),
    ("only if both have the same queries", lambda: part(0, 5).merge(part(5, 9), axis="batch")),
    ("saw no attention", lambda: Received().finish()),
    ("queries must be 'self' or 'later', not 'all'", lambda: Received("all")),
    ("k is 0", lambda: TopKeys(0)),
    ("offsets must be different numbers", lambda: Offsets([1, 1])),
    ("offsets must be different numbers", lambda: Offsets([])),
    ("needs named segments", lambda: SegmentMass({})),
    ("needs named segments", lambda: by_name("segments")),
    ("segment 'x' has a position below zero", lambda: SegmentMass({"x": [-1, 3]})),
    ("subset has a position below zero", lambda: Received(subset=slice(-4, None))),
    ("there is no statistic 'recieved'; choose from: received, entropy, distance, segments, "
     "top_keys, offsets, row_deficit, value_weighted", lambda: by_name("recieved")),
    ("no statistic has the setting 'width'; 'top_keys' takes: k", lambda: by_name("top_keys", width=3)),
    ("keys of a tile must be consecutive",
     lambda: Tile(torch.ones(1, 1, 1, 2), torch.tensor([3]), torch.tensor([0, 2]))),
    ("holds 1 sequences, but is given 2", lambda: part(0, 5).add(
        Tile(torch.ones(2, HEADS, 1, 1), torch.tensor([7]), torch.tensor([0])))),
])
def test_misuse_is_refused_in_a_sentence(sentence, call):
    with pytest.raises(ValueError, match=sentence):
        call()


def part(first, last):
    reducer = Received()
    reducer.add(tile(first, last))
    return reducer


def test_every_registered_name_makes_its_reducer():
    context = dict(segments={"a": [0]}, k=2, offsets=(0, -2), normalize=True, queries="later")
    made = {name: by_name(name, **context) for name in reducers.NAMES}
    assert {name: type(r) for name, r in made.items()} == {
        "received": Received, "entropy": Entropy, "distance": Distance, "segments": SegmentMass,
        "top_keys": TopKeys, "offsets": Offsets, "row_deficit": RowDeficit,
        "value_weighted": ValueWeighted,
    }
    assert made["top_keys"].k == 2 and made["offsets"].offsets == (0, -2)
    assert made["received"].queries == "later" and made["value_weighted"].normalize
    assert all(r.name == name for name, r in made.items())


@pytest.mark.parametrize("where", [
    [2, 3, 7], range(2, 8, 2), slice(2, 8), slice(2, None), slice(1, None, 3), np.array([3, 2]),
    torch.tensor([9]), [], [40],
])
def test_segments_in_any_notation(where):
    p, visible = rows()
    inside = torch.zeros(50, dtype=torch.bool)
    inside[where if isinstance(where, slice) else torch.tensor([int(i) for i in where]).long()] = True
    reducer = SegmentMass({"this": where})
    for columns in (slice(0, 5), slice(5, 9), slice(9, N)):
        reducer.add(Tile(p[..., columns], torch.arange(N), torch.arange(N)[columns],
                         visible[..., columns], row_sum=torch.ones(1, HEADS, N),
                         first=columns.start == 0))
    want = (p * inside[:N]).sum(-1)
    np.testing.assert_allclose(reducer.finish()[..., 0], want[0], atol=1e-6)


def test_later_leaves_out_exactly_the_own_position():
    p, visible = rows()
    reducer = Received("later")
    reducer.add(tile())
    alpha = reducer.finish()
    for k in range(N - 1):
        np.testing.assert_allclose(alpha[:, k], p[0, :, k + 1 :, k].mean(-1), rtol=1e-5)
    assert np.isnan(alpha[:, N - 1]).all()


def test_a_normalized_statistic_does_not_see_a_lost_share():
    p, visible = rows()
    share = torch.rand(1, HEADS, N, 1, generator=torch.Generator().manual_seed(3)) * 0.9 + 0.1
    for make in (lambda: Received(normalize=True), Entropy, lambda: Distance(normalize=True)):
        full, less = make(), make()
        full.add(tile())
        less.add(Tile(p * share, torch.arange(N), torch.arange(N), visible))
        np.testing.assert_allclose(less.finish(), full.finish(), rtol=1e-4, atol=1e-6)
    raw = [Received(), Received()]
    raw[0].add(tile())
    raw[1].add(Tile(p * share, torch.arange(N), torch.arange(N), visible))
    assert (raw[1].finish() < raw[0].finish()).all()


def test_top_keys_prefer_the_earlier_of_equals_in_any_order_of_tiles():
    p = torch.zeros(1, 1, 1, 300)
    p[..., [7, 90, 150, 299]] = 0.2
    p[..., 200] = 0.1
    for k in (1, 2, 3, 4):
        for order in ([0, 1, 2], [2, 1, 0], [1, 2, 0], None):
            reducer = TopKeys(k)
            if order is None:
                reducer.add(Tile(p, torch.tensor([299]), torch.arange(300)))
            for number in order or ():
                columns = slice(100 * number, 100 * number + 100)
                reducer.add(Tile(p[..., columns], torch.tensor([299]), torch.arange(300)[columns]))
            found = reducer.finish().sel(quantity="key").values.ravel().tolist()
            assert found == [7.0, 90.0, 150.0, 299.0][:k]


@pytest.mark.parametrize("best", [3, 64, 130, 199])
def test_a_better_key_is_found_anywhere_in_a_later_tile(best):
    p = torch.zeros(1, 1, 1, 200)
    p[..., best] = 0.5
    reducer = TopKeys(1)
    reducer.add(Tile(torch.full((1, 1, 1, 4), 0.1), torch.tensor([299]), torch.arange(4)))
    reducer.add(Tile(p, torch.tensor([299]), torch.arange(4, 204)))
    assert reducer.finish().values.ravel().tolist() == [0.5, best + 4]


@pytest.mark.parametrize("k", [1, 3, 40])
@pytest.mark.parametrize("width", [63, 64, 200, 517])
def test_top_keys_of_wide_tiles(k, width):
    """Values repeat often, zeros and hidden keys abound."""
    generator = torch.Generator().manual_seed(width + k)
    p = torch.randint(0, 6, (2, 3, 11, width), generator=generator).float() / 8
    visible = torch.rand(2, 1, 11, width, generator=generator) < 0.6
    p = p * visible
    reducer = TopKeys(k)
    reducer.add(Tile(p, torch.arange(600, 611), torch.arange(width), visible))
    value, key = dense.top_keys(p, visible, torch.arange(width), k)
    found = reducer.finish()
    np.testing.assert_array_equal(found.sel(quantity="value"), value)
    np.testing.assert_array_equal(found.sel(quantity="key"),
                                  np.where(value.isnan(), np.nan, key.numpy()))


def test_value_weighting_sees_a_drained_value():
    p, visible = rows()
    value = torch.ones(1, 1, N, 4)
    value[:, :, 0] = 0.0
    weighted, plain = ValueWeighted(), Received()
    for reducer in (weighted, plain):
        reducer.add(tile(value=value))
    assert (weighted.finish()[:, 0] == 0).all() and (plain.finish()[:, 0] > 0.1).all()
    np.testing.assert_allclose(weighted.finish()[:, 1:], 2 * plain.finish()[:, 1:], rtol=1e-6)


def test_state_grows_slowly_while_decoding():
    reducer = Entropy()
    sizes = set()
    for position in range(1, 200):
        p = torch.full((1, 2, 1, position), 1 / position)
        reducer.add(Tile(p, torch.tensor([position - 1]), torch.arange(position)))
        sizes.add(reducer._state["entropy"].shape[-1])
    assert len(sizes) < 12
    np.testing.assert_allclose(reducer.finish()[1], np.log(np.arange(1, 200)), atol=1e-5)


def test_only_sums_are_kept_never_a_matrix():
    query, key = torch.randn(1, 4, 300, 8), torch.randn(1, 2, 300, 8)
    made = [by_name(n, segments={"a": [0]}) for n in reducers.NAMES if n != "value_weighted"]
    stream(query, key, reducers=made)
    for reducer in made:
        held = sum(x.numel() for x in reducer._state.values())
        assert held <= 4 * 300 * 5, reducer.name


def test_the_first_of_equal_largest_weights_is_found_in_rows_of_any_width():
    generator = torch.Generator().manual_seed(11)
    for width in (1, 63, 64, 65, 128, 150, 640, 641):
        weights = torch.randint(0, 4, (37, width), generator=generator).float()
        weights[3] = 0.0
        weights[4, -1] = 9.0
        value, index = _first_largest(weights)
        largest = weights.max(-1, keepdim=True).values
        places = torch.arange(width).expand_as(weights).masked_fill(weights != largest, width)
        assert torch.equal(value, largest) and torch.equal(index, places.amin(-1, keepdim=True))
