"""What `stream` skips, what it refuses, and what a planted pattern looks like."""

import jaxtyping
import numpy as np
import pytest
import torch

from interp.core.errors import NumericalError
from interp.stream import dense, sweep
from interp.stream.masks import Mask, bidirectional, causal, from_tensor, padding, sliding_window
from interp.stream.reducers import (
    Entropy,
    Offsets,
    Received,
    RowDeficit,
    SegmentMass,
    TopKeys,
    ValueWeighted,
)
from interp.stream.tiles import Tile, stream


def random(n_queries=13, n_keys=13, batch=1, heads=6, kv_heads=2, d_head=8, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(batch, heads, n_queries, d_head, generator=generator),
            torch.randn(batch, kv_heads, n_keys, d_head, generator=generator),
            torch.randn(batch, kv_heads, n_keys, 5, generator=generator))


class Spy(Received):
    """Remembers the sizes of the tiles it was handed."""

    def start(self, *args, **kwargs):
        super().start(*args, **kwargs)
        self._tiles = []

    def _add(self, tile: Tile) -> None:
        super()._add(tile)
        self._tiles.append((tile.rows, tile.columns, tile.visible is None))


def test_tiles_that_nobody_sees_are_never_made():
    query, key, _ = random(64, 64)
    spy = Spy()
    stream(query, key, reducers=[spy], mask=sliding_window(8), tile=(16, 4))
    for rows, columns, _ in spy._tiles:
        assert columns.start < rows.stop and columns.stop > rows.start - 7
    seen = sum((r.stop - r.start) * (c.stop - c.start) for r, c, _ in spy._tiles)
    assert seen < 0.45 * 64 * 64
    opaque = Spy()
    stream(query, key, reducers=[opaque], mask=sliding_window(8).visible and (
        lambda q, k: sliding_window(8)(q, k)), tile=(16, 4))
    assert len(opaque._tiles) > 2 * len(spy._tiles)
    np.testing.assert_allclose(opaque.finish(), spy.finish(), rtol=1e-6)


def test_tiles_below_the_diagonal_are_not_masked():
    query, key, _ = random(64, 64)
    spy = Spy()
    stream(query, key, reducers=[spy], mask=causal(), tile=(16, 16))
    assert sum(whole for *_, whole in spy._tiles) == 6
    assert all(whole == (c.stop <= r.start + 1) for r, c, whole in spy._tiles)


def test_the_mask_is_asked_once_for_all_heads():
    asked = []

    def visible(query, key):
        asked.append(len(query))
        return key[None] <= query[:, None]

    query, key, _ = random(40, 40, heads=12, kv_heads=12)
    received = Received()
    stream(query, key, reducers=[received], mask=visible, tile=(8, 1000))
    assert asked == [8] * 5


def test_uniform_attention_is_one_over_the_number_of_keys():
    """The analytic control: without content, alpha_k is the mean of 1/t, entropy is log t."""
    n = 21
    query, key = torch.zeros(1, 3, n, 4), torch.randn(1, 1, n, 4)
    reducers = [Received(), Entropy(), Offsets([0]), TopKeys(2)]
    stream(query, key, reducers=reducers, tile=(5, 4))
    alpha, entropy, own, top = (r.finish() for r in reducers)
    t = np.arange(1, n + 1)
    np.testing.assert_allclose(entropy, np.log(t)[None].repeat(3, 0), atol=1e-6)
    np.testing.assert_allclose(own, np.full((3, 1), (1 / t).mean()), rtol=1e-6)
    want = [(1 / t[k:]).mean() for k in range(n)]
    np.testing.assert_allclose(alpha, np.array([want] * 3), rtol=1e-6)
    # All probabilities of a row are equal: the earliest keys are the top ones.
    assert (top.sel(quantity="key").values[:, 1:] == [0, 1]).all()
    assert np.isnan(top.values[:, 0, 1]).all()


def test_a_planted_sink_is_found_in_its_head_and_nowhere_else():
    query, key, _ = random(48, 48, heads=6, kv_heads=6)
    direction = torch.nn.functional.normalize(torch.randn(8, generator=torch.Generator()), dim=0)
    query[:, 4] = query[:, 4] - (query[:, 4] @ direction)[..., None] * direction + 5 * direction
    control = Received()
    stream(query, key, reducers=[control])
    key[:, 4, 9] = 8 * direction
    planted = Received()
    stream(query, key, reducers=[planted])
    alpha, before = planted.finish(), control.finish()
    assert alpha.sel(head=4, key=9) > 0.9 and before.sel(head=4, key=9) < 0.3
    others = alpha.drop_sel(head=4)
    np.testing.assert_array_equal(others, before.drop_sel(head=4))
    # The query right behind a planted key sees it, the one before cannot.
    assert float(planted.finish().sel(head=4, key=9)) > float(alpha.sel(head=4, key=8))


def test_learned_sink_logits_take_mass_out_of_the_row():
    query, key, value = random()
    low, high = torch.full((6,), -50.0), torch.tensor([-50.0, -1, 0, 1, 2, 60.0])
    rows = {}
    for name, logits in (("none", None), ("low", low), ("high", high)):
        deficit, alpha = RowDeficit(), Received(normalize=True)
        done = stream(query, key, value, reducers=[deficit, alpha], sink_logits=logits,
                      want_output=True)
        rows[name] = (deficit.finish(), alpha.finish(), done)
    np.testing.assert_allclose(rows["none"][0], 0, atol=1e-6)
    np.testing.assert_allclose(rows["low"][0], 0, atol=1e-6)
    want = torch.sigmoid(high[:, None] - rows["none"][2].lse[0])
    np.testing.assert_allclose(rows["high"][0], want, atol=1e-6)
    # The log-sum-exp is that of the sequence alone, and normalized rows forget the sink.
    torch.testing.assert_close(rows["high"][2].lse, rows["none"][2].lse)
    np.testing.assert_allclose(rows["high"][1][:5], rows["none"][1][:5], rtol=1e-4)
    share = (1 - want)[None, :, :, None]
    torch.testing.assert_close(rows["high"][2].output, rows["none"][2].output * share,
                               rtol=1e-4, atol=1e-6)


def test_sink_logits_may_depend_on_the_query():
    query, key, _ = random()
    logits = torch.randn(1, 6, 13)
    one, lse = RowDeficit(), stream(query, key).lse
    stream(query, key, reducers=[one], sink_logits=logits, tile=(4, 3))
    np.testing.assert_allclose(one.finish(), torch.sigmoid(logits - lse)[0], atol=1e-6)


def test_rows_that_see_nothing_are_nan_and_count_for_nobody():
    query, key, value = random(9, 9, batch=2)
    valid = torch.ones(2, 9, dtype=torch.bool)
    valid[1, :4] = False
    reducers = [Received(), Entropy(), RowDeficit(), SegmentMass({"all": slice(0, None)}),
                TopKeys(1), Offsets([0], per_query=True)]
    done = stream(query, key, value, reducers=reducers, mask=causal() & padding(valid),
                  want_output=True, tile=(3, 2))
    short = [Received(), Entropy(), RowDeficit(), SegmentMass({"all": slice(0, None)}),
             TopKeys(1), Offsets([0], per_query=True)]
    stream(query[1:, :, 4:], key[1:, :, 4:], value[1:, :, 4:], reducers=short)
    for padded, alone in zip(reducers, short):
        array, want = padded.finish()[1], alone.finish()
        axis = "key" if "key" in array.dims else "query"
        assert np.isnan(array.isel({axis: slice(0, 4)})).all(), padded.name
        shown = array.isel({axis: slice(4, None)}).values.copy()
        if padded.name == "top_keys":
            shown[..., 1] -= 4
        np.testing.assert_allclose(shown, want.values, rtol=1e-5, atol=1e-6, err_msg=padded.name)
    assert (done.output[1, :, :4] == 0).all() and torch.isneginf(done.lse[1, :, :4]).all()


def test_everything_hidden_gives_nan_not_an_error():
    query, key, value = random()
    entropy = Entropy()
    done = stream(query, key, value, reducers=[entropy], want_output=True,
                  mask=from_tensor(torch.zeros(13, 13, dtype=torch.bool)))
    assert np.isnan(entropy.finish()).all() and (done.output == 0).all()


def test_keys_out_of_sight_for_most_queries_are_nan_not_zero():
    query, key, _ = random(30, 30)
    received = Received()
    stream(query, key, reducers=[received], mask=sliding_window(10))
    alpha = received.finish()
    # Key k is seen by 10 of its 30 - k later queries: half or more from k = 10 on.
    assert np.isnan(alpha.sel(key=slice(0, 9))).all()
    assert alpha.sel(key=slice(10, None)).notnull().all()
    wide = Received()
    stream(query, key, reducers=[wide], mask=sliding_window(30))
    assert wide.finish().notnull().all()


def test_bidirectional_rows_count_all_queries():
    query, key, _ = random()
    received = Received()
    stream(query, key, reducers=[received], mask=bidirectional(), tile=(4, 5))
    p = dense.attention(query, key, torch.ones(13, 13, dtype=torch.bool))
    np.testing.assert_allclose(received.finish(), p[0].mean(1), rtol=1e-5)
    assert float(received.finish().sum()) == pytest.approx(6.0, rel=1e-5)


def test_grouped_heads_read_their_own_keys():
    """Permuting key-value heads together with their query heads permutes the result."""
    query, key, _ = random(heads=6, kv_heads=3)
    one, two = Received(), Received()
    stream(query, key, reducers=[one])
    order = torch.tensor([4, 5, 0, 1, 2, 3])
    stream(query[:, order], key[:, [2, 0, 1]], reducers=[two])
    np.testing.assert_allclose(two.finish(), one.finish()[order.numpy()], rtol=1e-5)
    three = Received()
    stream(query, key.repeat_interleave(2, 1), reducers=[three])
    np.testing.assert_allclose(three.finish(), one.finish(), rtol=1e-5)


@pytest.mark.parametrize("piece", [1, 1 << 17])
def test_tensors_in_any_memory_layout(monkeypatch, piece):
    monkeypatch.setattr(sweep, "PIECE", piece)
    query, key, value = random(batch=2)
    swapped = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in (query, key, value)]
    one, two = Received(), Received()
    want = stream(query, key, value, reducers=[one], want_output=True).output
    got = stream(*swapped, reducers=[two], want_output=True).output
    torch.testing.assert_close(got, want)
    np.testing.assert_allclose(two.finish(), one.finish(), rtol=1e-6)


def test_inputs_are_left_alone_and_nothing_asks_for_gradients():
    query, key, value = random()
    query.requires_grad_()
    copies = [x.clone() for x in (query, key, value)]
    done = stream(query, key, value, reducers=[Received(), Entropy()], want_output=True)
    assert all(x.equal(y) for x, y in zip((query, key, value), copies))
    assert not done.output.requires_grad


def test_a_layer_number_reaches_the_reducer():
    class Layers(Received):
        def _add(self, tile: Tile) -> None:
            self.layer = tile.layer

    reducer = Layers()
    stream(*random()[:2], reducers=[reducer], layer=7)
    assert reducer.layer == 7


@pytest.fixture
def unchecked_shapes():
    """Users run without the shape checks of the test run: they must meet the sentences instead."""
    before = jaxtyping.config.jaxtyping_disable
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", before)


QUERY, KEY, VALUE = random(5, 5, batch=2)
HALF = Received()
stream(QUERY[:, :, :3], KEY, reducers=[HALF], query_offset=0)


@pytest.mark.parametrize(("error", "sentence", "call"), [
    (ValueError, r"query \(2, 6, 5, 8\).*head a multiple of kv_head",
     lambda: stream(QUERY, torch.randn(2, 4, 5, 8))),
    (ValueError, "do not fit", lambda: stream(QUERY, torch.randn(2, 2, 5, 7))),
    (ValueError, "must agree in batch", lambda: stream(QUERY, KEY, VALUE[:, :, :4])),
    (ValueError, "nothing to attend: 0 queries, 5 keys", lambda: stream(QUERY[:, :, :0], KEY)),
    (ValueError, "want_output=True needs the value", lambda: stream(QUERY, KEY, want_output=True)),
    (ValueError, "5 queries but only 3 keys", lambda: stream(QUERY, KEY[:, :, :3])),
    (ValueError, "give query_offset or query_positions, not both",
     lambda: stream(QUERY, KEY, query_offset=0, query_positions=range(5))),
    (ValueError, "5 different positions", lambda: stream(QUERY, KEY, query_positions=[0, 1, 2, 2, 3])),
    (ValueError, r"tile is \(0, 4\)", lambda: stream(QUERY, KEY, tile=(0, 4))),
    (ValueError, r"sink_logits has shape \(5,\)",
     lambda: stream(QUERY, KEY, sink_logits=torch.zeros(5))),
    (ValueError, r"lse has shape \(2, 6, 4\)", lambda: stream(QUERY, KEY, lse=torch.zeros(2, 6, 4))),
    (ValueError, "query 2 was already added to the statistic 'received'",
     lambda: stream(QUERY, KEY, reducers=[HALF], query_positions=[3, 2, 4, 5, 6])),
    (ValueError, "'value_weighted' needs the value vectors",
     lambda: stream(QUERY, KEY, reducers=[ValueWeighted()])),
    (NumericalError, "key contains NaN or infinity",
     lambda: stream(QUERY, KEY.clone().index_fill_(2, torch.tensor([1]), torch.nan))),
    (NumericalError, "query contains NaN or infinity",
     lambda: stream(QUERY.half() / 0, KEY.half())),
    (NumericalError, "value contains NaN or infinity",
     lambda: stream(QUERY, KEY, torch.full_like(VALUE, torch.inf))),
])
def test_bad_input_is_refused_in_a_sentence(error, sentence, call, unchecked_shapes):
    with pytest.raises(error, match=sentence):
        call()


def test_huge_but_finite_inputs_are_not_mistaken_for_infinity():
    query, key, _ = random()
    query[0, 0, 0], query[0, 0, 1] = 3e38, 3e38
    stream(query, torch.zeros_like(key))


def test_a_mask_may_differ_by_head():
    query, key, _ = random(heads=4, kv_heads=2)
    seen = torch.ones(1, 4, 13, 13, dtype=torch.bool).tril()
    seen[:, 1, :, 3] = False
    seen[:, 1, 3, 3] = True
    received, top = Received(), TopKeys(1)
    stream(query, key, reducers=[received, top], mask=Mask(lambda q, k: seen[:, :, q[:, 0]][..., k]),
           tile=(5, 4))
    p = dense.attention(query, key, seen)
    t = torch.arange(13)
    np.testing.assert_allclose(received.finish(), dense.received(p, seen, t, t)[0], rtol=1e-5)
    assert np.isnan(received.finish()[1, 3]) and received.finish()[0, 3] > 0
