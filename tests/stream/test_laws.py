"""Streamed equals dense, whatever the sizes, the mask, the tiles and the order they come in."""

import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any
from unittest.mock import patch

import numpy as np
import pytest
import torch
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

from interp.stream import dense, fused, plan, sweep
from interp.stream.masks import (
    Mask,
    bidirectional,
    causal,
    from_tensor,
    padding,
    sliding_window,
)
from interp.stream.reducers import (
    Distance,
    Entropy,
    Offsets,
    Received,
    Reducer,
    RowDeficit,
    SegmentMass,
    TopKeys,
    ValueWeighted,
)
from interp.stream.tiles import Tile, stream

# Minimal examples of random tensors say little and take minutes to find.
LAW = dict(deadline=None, phases=(Phase.explicit, Phase.reuse, Phase.generate))
SEGMENTS = {"first": [0], "scattered": [1, 4, 5, 11], "late": range(7, 12), "even": slice(0, None, 2)}
OFFSETS = (-3, -1, 0, 2)


def doubled(value: torch.Tensor) -> torch.Tensor:
    """Stands for the output matrix of a head."""
    return torch.cat([value, -value[..., :1]], -1) * 2


@dataclass(repr=False)
class Case:
    """Inputs of one attention call, and everything dense about it."""

    query: Any
    key: Any
    value: Any
    mask: Mask
    given: dict = field(default_factory=dict)
    kind: str = "causal"

    def __post_init__(self) -> None:
        n_queries, n_keys = self.query.shape[2], self.key.shape[2]
        first = self.given.get("key_offset", 0)
        self.t, self.s = dense.positions(
            n_queries, n_keys, self.given.get("query_offset"), first)
        if "query_positions" in self.given:
            self.t = torch.tensor(self.given["query_positions"])
        self.visible = self.mask(self.t, self.s)
        self.p = dense.attention(
            self.query, self.key, self.visible,
            **{k: v for k, v in self.given.items() if k in ("scaling", "softcap", "sink_logits")},
            bias=None if self.mask.bias is None else self.mask.bias(self.t[:, None], self.s),
        )

    def __repr__(self) -> str:
        return f"Case({self.kind}, q {tuple(self.query.shape)}, k {tuple(self.key.shape)}, {self.given})"

    def _repr_pretty_(self, printer: Any, cycle: bool) -> None:
        printer.text(repr(self))

    def stream(self, reducers: list, **more: Any) -> Any:
        return stream(self.query, self.key, self.value, reducers=reducers, mask=self.mask,
                      **self.given, **more)


def mask_of(kind: str, draw: Any, batch: int, heads: int, n_queries: int, n_keys: int,
            first_query: int, first_key: int) -> Mask:
    seed = torch.Generator().manual_seed(draw(st.integers(0, 99)))
    if kind == "window":
        return sliding_window(draw(st.integers(1, 9)))
    if kind == "window both":
        return sliding_window(draw(st.integers(1, 9)), bidirectional=True)
    if kind == "bidirectional":
        return bidirectional()
    if kind == "padding":
        valid = torch.ones(batch, max(first_query + n_queries, first_key + n_keys), dtype=torch.bool)
        for row in range(batch):
            valid[row, : draw(st.integers(0, n_keys - 1))] = False
        return causal() & padding(valid)
    if kind == "dense":
        shape = draw(st.sampled_from([(), (1, heads), (batch, 1), (batch, heads)]))
        seen = torch.rand(*shape, n_queries, n_keys, generator=seed) < 0.7
        return from_tensor(seen, first_query, first_key)
    if kind == "additive":
        bias = torch.randn(n_queries, n_keys, generator=seed)
        bias[torch.rand(n_queries, n_keys, generator=seed) < 0.3] = torch.finfo(torch.float32).min
        return from_tensor(bias, first_query, first_key)
    if kind == "prefix":
        return causal() | (lambda query, key: (key < 5)[None] & (query < 9)[:, None])
    return causal()


@st.composite
def cases(draw: Any, plain: bool = False) -> Case:
    """Every axis its own size; the kinds of attention that real models have."""
    batch, kv_heads, group = draw(st.integers(1, 3)), draw(st.integers(1, 3)), draw(st.integers(1, 3))
    heads, d_head, d_value = kv_heads * group, draw(st.sampled_from([4, 7])), 5
    n_queries = draw(st.integers(1, 21))
    n_keys = n_queries + draw(st.integers(0, 9))
    kind = "causal" if plain else draw(st.sampled_from([
        "causal", "window", "window both", "bidirectional", "padding", "dense", "additive", "prefix"]))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 999)))
    # Logits of hundreds need the maximum taken out; float32 rounds those by more than 1e-5.
    size, dtype = draw(st.sampled_from(
        [(0.3, torch.float32), (1.0, torch.float32), (2.0, torch.float32), (8.0, torch.float64)]))
    query = torch.randn(batch, heads, n_queries, d_head, generator=generator, dtype=dtype) * size
    key = torch.randn(batch, kv_heads, n_keys, d_head, generator=generator, dtype=dtype) * size
    value = torch.randn(batch, kv_heads, n_keys, d_value, generator=generator, dtype=dtype)
    chosen: dict = {"key_offset": draw(st.sampled_from([0, 0, 3]))}
    first = chosen["key_offset"] + n_keys - n_queries
    if kind in ("causal", "window", "bidirectional") and draw(st.booleans()):
        last = chosen["key_offset"] + n_keys
        chosen["query_positions"] = draw(st.permutations(range(last)))[:n_queries]
    elif draw(st.booleans()):
        chosen["query_offset"] = first
    if draw(st.booleans()):
        chosen["scaling"] = 0.37
    if not plain and draw(st.booleans()):
        chosen["softcap"] = draw(st.sampled_from([2.0, 50.0]))
    if not plain and draw(st.booleans()):
        chosen["sink_logits"] = torch.linspace(-2.0, 4.0, heads)
    mask = mask_of(kind, draw, batch, heads, n_queries, n_keys, first, chosen["key_offset"])
    return Case(query, key, value, mask, chosen, kind)


def every_reducer() -> dict[str, Reducer]:
    return {
        "received": Received(),
        "received later": Received("later"),
        "received normalized": Received(normalize=True),
        "received subset": Received(subset=[1, 2, 5, 6, 9, 13]),
        "received later subset": Received("later", subset=slice(3, 12), normalize=True),
        "value weighted": ValueWeighted(),
        "value projected": ValueWeighted(project=doubled),
        "entropy": Entropy(),
        "row deficit": RowDeficit(),
        "distance": Distance(),
        "distance normalized": Distance(normalize=True),
        "segments": SegmentMass(SEGMENTS),
        "offsets": Offsets(OFFSETS),
        "offsets per query": Offsets(OFFSETS, per_query=True),
        "offsets subset": Offsets(OFFSETS, subset=[2, 3, 8]),
        "top 1": TopKeys(1),
        "top 4": TopKeys(4),
    }


def expected(case: Case) -> dict[str, torch.Tensor]:
    p, seen, t, s = case.p, case.visible, case.t, case.s
    where = {k: [j for j in s.tolist() if j in range(*v.indices(99))] if isinstance(v, slice) else v
             for k, v in SEGMENTS.items()}
    per_query = dense.offsets(p, seen, t, s, OFFSETS)
    chosen = torch.isin(t, torch.tensor([2, 3, 8]))
    found = {
        "received": dense.received(p, seen, t, s),
        "received later": dense.received(p, seen, t, s, queries="later"),
        "received normalized": dense.received(p, seen, t, s, normalize=True),
        "received subset": dense.received(p, seen, t, s, subset=[1, 2, 5, 6, 9, 13]),
        "received later subset": dense.received(
            p, seen, t, s, queries="later", subset=range(3, 12), normalize=True),
        "value weighted": dense.value_weighted(p, case.value, seen, t, s),
        "value projected": dense.value_weighted(
            p, case.value, seen, t, s, project=doubled),
        "entropy": dense.entropy(p, seen),
        "row deficit": dense.row_deficit(p, seen),
        "distance": dense.distance(p, seen, t, s),
        "distance normalized": dense.distance(p, seen, t, s, normalize=True),
        "segments": dense.segment_mass(p, seen, s, where),
        "offsets": per_query.nanmean(2),
        "offsets per query": per_query,
        "offsets subset": per_query[:, :, chosen].nanmean(2),
    }
    for k in (1, 4):
        found[f"top {k}"] = torch.stack(
            [x.double() for x in dense.top_keys(p, seen, s, k)], -1)
    return found


def assert_equal(found: dict[str, Reducer], case: Case, tolerance: float = 1e-5) -> None:
    order = case.t.argsort()
    for name, want in expected(case).items():
        array = found[name].finish(keep_batch=True)
        if "query" in array.dims:
            want = want[:, :, order]
            np.testing.assert_array_equal(array["query"], case.t[order])
        if "key" in array.dims:
            # Keys before the first one are known to exist, but nobody sees them.
            assert np.isnan(array.sel(key=slice(0, int(case.s[0]) - 1))).all()
            array = array.sel(key=case.s.numpy())
        if name.startswith("top"):
            assert_same_top(array.values, want.numpy(), case.p[:, :, order], case.s, name,
                            tolerance)
            continue
        np.testing.assert_allclose(array.values, want.numpy(), rtol=tolerance, atol=tolerance,
                                   err_msg=name)


def assert_same_top(
    found: np.ndarray, want: np.ndarray, p: torch.Tensor, s: torch.Tensor, name: str,
    tolerance: float = 1e-5,
) -> None:
    """Equal values; keys may differ only where rounding decides between equal probabilities."""
    close = dict(rtol=tolerance, atol=tolerance / 10, err_msg=name)
    np.testing.assert_allclose(found[..., 0], want[..., 0], **close)
    real = ~np.isnan(found[..., 1])
    where = np.argwhere(real)
    column = found[..., 1][real].astype(int) - int(s[0])
    at = p.numpy()[where[:, 0], where[:, 1], where[:, 2], column]
    np.testing.assert_allclose(at, found[..., 0][real], **close)
    for row in found[..., 1].reshape(-1, found.shape[-2]):
        row = row[~np.isnan(row)]
        assert len(set(row)) == len(row), name


@settings(**LAW, max_examples=100)
@given(case=cases(), rows=st.integers(1, 24), width=st.integers(1, 33), keep=st.booleans(),
       together=st.sampled_from([1, 300, 1 << 20]), piece=st.sampled_from([1, 100, 1 << 17]))
def test_any_tile_size_gives_the_dense_statistics(case, rows, width, keep, together, piece):
    """Tiles of rows x width, of as many heads and sequences as fit into `together` numbers."""
    reducers = every_reducer()
    with patch.dict(plan.TILE_SIZE, cpu=together), patch.object(sweep, "PIECE", piece):
        done = case.stream(list(reducers.values()), tile=(rows, width), want_output=True,
                           keep_bytes=1 << 20 if keep else 0)
    assert_equal(reducers, case)
    want = dense.output(case.p, case.value)
    torch.testing.assert_close(done.output, want, rtol=1e-5, atol=1e-5)


class Plainly(fused._Work):
    """Stands for the kernels of interp.stream.fused: the same numbers, by whole matrices."""

    def logits(self) -> torch.Tensor:
        query, key = self.query.double(), self.key.double()
        x = query @ key.repeat_interleave(query.shape[1] // key.shape[1], 1).mT * self.scaling
        x = x if self.softcap is None else self.softcap * torch.tanh(x / self.softcap)
        keys = torch.tensor(self.plan.keys)
        self.apart = keys - self.at[:, None]
        return x.masked_fill((self.apart < -self.behind) | (self.apart > self.ahead), -torch.inf)

    def rows(self) -> tuple[torch.Tensor, ...]:
        x = self.logits()
        top, index = x.max(-1)
        seen = top > -torch.inf
        x = (x - top.masked_fill(~seen, 0.0)[..., None])
        w = x.exp()
        sums = (w, w * x.masked_fill(w == 0, 0.0), w * self.apart.abs())
        key = (index + self.plan.keys.start).masked_fill(~seen, -1)
        return (top.float(), *(each.sum(-1).float() for each in sums), key.int())

    def received(self, log_sum: torch.Tensor, others: bool) -> torch.Tensor:
        p = (self.logits() - log_sum[..., None]).exp()
        return (p.masked_fill(self.apart == 0, 0.0) if others else p).sum(-2).float()


@contextmanager
def kernels(kind: str) -> Iterator[None]:
    """Let `stream` use Triton's interpreter, or matrices in the kernels' place."""
    with patch.dict(os.environ, TRITON_INTERPRET="1"), ExitStack() as stack:
        if kind == "matrices":
            stack.enter_context(patch.object(fused, "_Work", Plainly))
            stack.enter_context(patch.object(fused, "_installed", lambda: True))
        yield


@pytest.mark.parametrize("kind", ["matrices", pytest.param("triton", marks=pytest.mark.skipif(
    not fused._interpreted(), reason="test_fused.py runs this with Triton's interpreter"))])
def test_statistics_of_whole_rows_from_kernels_are_the_dense_ones(kind):
    used = []

    @settings(**LAW, max_examples=60 if kind == "matrices" else 25)
    @given(case=cases())
    def law(case: Case) -> None:
        reducers = every_reducer()
        find = fused.find
        with kernels(kind), patch.object(
                fused, "find", lambda *given: used.append(find(*given)) or used[-1]):
            done = case.stream(list(reducers.values()), want_output=True)
            alone = Entropy()
            lse = case.stream([alone]).lse
        assert_equal(reducers, case)
        torch.testing.assert_close(done.output, dense.output(case.p, case.value), rtol=1e-5,
                                   atol=1e-5)
        torch.testing.assert_close(lse, done.lse, rtol=1e-5, atol=1e-5)
        np.testing.assert_array_equal(alone.finish(), reducers["entropy"].finish())

    law()
    # Kernels are for bands and ascending positions in float32; tiles do the others.
    assert 0.1 < np.mean([one is not None for one in used]) < 0.9


@settings(**LAW, max_examples=40)
@given(case=cases(), tile=st.sampled_from([None, (5, 3)]))
def test_a_log_sum_exp_from_elsewhere_replaces_the_first_sweep(case, tile):
    first = case.stream([])
    kept = dict(case.given)
    kept.pop("sink_logits", None)
    logits = Case(case.query, case.key, case.value, case.mask, kept).p.log()
    # log p = logit - lse, so that lse differences are those of the dense rows.
    assert torch.isfinite(first.lse).equal(torch.isfinite(logits).any(-1))
    reducers = every_reducer()
    done = case.stream(list(reducers.values()), lse=first.lse, tile=tile, want_output=True)
    assert_equal(reducers, case)
    torch.testing.assert_close(done.output, dense.output(case.p, case.value), rtol=1e-5, atol=1e-5)


@settings(**LAW, max_examples=40)
@given(case=cases(), data=st.data())
def test_the_order_of_tiles_does_not_matter(case, data):
    reducers = every_reducer()
    for reducer in reducers.values():
        reducer.register(case.p.shape[0], case.p.shape[1], case.t.tolist(), int(case.s[-1]) + 1)
    step = data.draw(st.integers(1, 7))
    total = case.p.sum(-1)
    made = []
    for rows in torch.arange(len(case.t)).split(data.draw(st.integers(1, 9))):
        for number, columns in enumerate(torch.arange(len(case.s)).split(step)):
            made.append(Tile(
                case.p[:, :, rows][..., columns], case.t[rows], case.s[columns],
                case.visible[(None,) * (4 - case.visible.ndim)][:, :, rows][..., columns],
                case.value[:, :, columns], row_sum=total[:, :, rows], first=number == 0,
            ))
    for tile in data.draw(st.permutations(made)):
        for reducer in reducers.values():
            reducer.add(tile)
    assert_equal(reducers, case)


@settings(**LAW, max_examples=40)
@given(case=cases(), data=st.data())
def test_queries_split_over_reducers_and_merged_equal_one_pass(case, data):
    owner = torch.tensor(data.draw(st.lists(
        st.integers(0, 2), min_size=len(case.t), max_size=len(case.t))))
    parts = []
    for number in data.draw(st.permutations(owner.unique().tolist())):
        mine = owner == number
        parts.append(every_reducer())
        kept = {k: v for k, v in case.given.items() if not k.startswith("query_")}
        stream(case.query[:, :, mine], case.key, case.value, reducers=list(parts[-1].values()),
               mask=case.mask, query_positions=case.t[mine], **kept)
    merged = parts[0]
    for part in parts[1:]:
        merged = {name: reducer.merge(part[name]) for name, reducer in merged.items()}
    assert_equal(merged, case)


@settings(**LAW, max_examples=40)
@given(case=cases(), cut=st.integers(1, 2))
def test_sequences_split_over_reducers_and_merged_equal_one_batch(case, cut):
    batch = case.query.shape[0]
    if batch <= cut:
        return
    parts = []
    for rows in (slice(0, cut), slice(cut, batch)):
        def visible(query, key, rows=rows):
            return case.mask.visible(query, key)[rows]

        mask = case.mask
        if case.visible.ndim == 4 and case.visible.shape[0] > 1:
            mask = Mask(visible)
        parts.append(every_reducer())
        stream(case.query[rows], case.key[rows], case.value[rows], mask=mask,
               reducers=list(parts[-1].values()), **case.given)
    assert_equal({k: r.merge(parts[1][k], axis="batch") for k, r in parts[0].items()}, case)


@settings(**LAW, max_examples=30)
@given(case=cases(plain=True), prompt=st.integers(1, 20))
def test_decoding_token_by_token_equals_prefill(case, prompt):
    n_keys = case.key.shape[2]
    query = torch.randn(*case.query.shape[:2], n_keys, case.query.shape[3]).to(case.query)
    case = Case(query, case.key, case.value, causal())
    prompt = min(prompt, n_keys)
    reducers = every_reducer()
    for first, last in [(0, prompt), *((i, i + 1) for i in range(prompt, n_keys))]:
        stream(case.query[:, :, first:last], case.key[:, :, :last], case.value[:, :, :last],
               reducers=list(reducers.values()), query_offset=first)
    assert_equal(reducers, case)


@pytest.mark.parametrize("given_lse", [False, True])
@pytest.mark.parametrize("offset", [0.0, 200.0, -200.0])
def test_logits_whose_exponentials_leave_float32(offset, given_lse):
    """All keys share a direction: every logit is near `offset`, probabilities are ordinary."""
    generator = torch.Generator().manual_seed(0)
    query, key = (torch.randn(1, 2, 33, 8, generator=generator) for _ in range(2))
    case = Case(query, key, key, causal(), {"scaling": 1.0})
    shifted_query = torch.cat([query, torch.full_like(query[..., :1], 20.0)], -1)
    shifted_key = torch.cat([key, torch.full_like(key[..., :1], offset / 20.0)], -1)
    lse = None
    if given_lse:
        lse = (stream(query, key, scaling=1.0).lse + offset)
    reducers = every_reducer()
    done = stream(shifted_query, shifted_key, key, reducers=list(reducers.values()), scaling=1.0,
                  tile=(8, 5), want_output=True, lse=lse)
    assert_equal(reducers, case, tolerance=1e-4)
    torch.testing.assert_close(done.output, dense.output(case.p, key), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_other_types_are_cast_before_any_statistic(dtype):
    generator = torch.Generator().manual_seed(0)
    query = torch.randn(2, 6, 19, 8, generator=generator).to(dtype)
    key, value = (torch.randn(2, 3, 23, 8, generator=generator).to(dtype) for _ in range(2))
    case = Case(query, key, value, causal())
    reducers = every_reducer()
    done = case.stream(list(reducers.values()), want_output=True, tile=(7, 6))
    assert done.output.dtype == dtype and done.lse.dtype in (torch.float32, torch.float64)
    case.value = value.to(torch.promote_types(dtype, torch.float32))
    assert_equal(reducers, case)
    torch.testing.assert_close(
        done.output, dense.output(case.p, case.value).to(dtype), rtol=1e-2, atol=1e-2)


def test_two_thousand_tokens_equal_dense_with_automatic_tiles():
    generator = torch.Generator().manual_seed(1)
    query = torch.randn(1, 8, 2048, 16, generator=generator) * 2
    key, value = (torch.randn(1, 4, 2048, 16, generator=generator) for _ in range(2))
    key[:, :, 0] += query.mean((1, 2)) * 20
    case = Case(query, key, value, causal())
    reducers = {"received": Received(), "entropy": Entropy(), "distance": Distance(),
                "top 1": TopKeys(1), "top 4": TopKeys(4)}
    done = case.stream(list(reducers.values()), want_output=True)
    want = expected(case)
    for name, reducer in reducers.items():
        found = reducer.finish(keep_batch=True).values
        if name.startswith("top"):
            assert_same_top(found, want[name].numpy(), case.p, case.s, name)
        else:
            np.testing.assert_allclose(found, want[name], rtol=1e-5, atol=1e-5, err_msg=name)
    torch.testing.assert_close(done.output, dense.output(case.p, value), rtol=1e-5, atol=1e-5)
