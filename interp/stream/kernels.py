"""Triton kernels of interp.stream.fused: statistics of attention without its weights in memory.

Compiled from this source when first used; imported only where Triton is. A program takes a block of
rows (or of keys) of one head through all keys (or rows) that the band lets it see.
"""

# pyright: reportMissingImports=false
import triton
import triton.language as tl


@triton.jit
def _logits(left, right, scaling, softcap, CAPPED: tl.constexpr, PRECISION: tl.constexpr):
    x = tl.dot(left, right, input_precision=PRECISION) * scaling
    if CAPPED:
        # softcap * tanh(x / softcap)
        x = softcap * (1.0 - 2.0 / (1.0 + tl.exp(2.0 * x / softcap)))
    return x


@triton.jit
def _vectors(start, index, stride, inside, D: tl.constexpr, PADDED: tl.constexpr):
    d = tl.arange(0, PADDED)
    return tl.load(start + index[:, None] * stride + d[None, :],
                   mask=inside[:, None] & (d < D)[None, :], other=0.0)


@triton.jit
def rows_kernel(
    query, key, at, low, high, top_out, total_out, spread_out, far_out, key_out,
    query_batch, query_head, query_row, key_batch, key_head, key_row,
    n_queries, n_keys, key_start, behind, ahead, scaling, softcap, heads, group,
    D: tl.constexpr, PADDED: tl.constexpr, CAPPED: tl.constexpr, PRECISION: tl.constexpr,
    ROWS: tl.constexpr, KEYS: tl.constexpr,
):
    """The highest logit of each row and its key; sums of w, w log w and w |t - s|, with w counted
    from that logit."""
    block, pair = tl.program_id(0), tl.program_id(1).to(tl.int64)
    batch, head = pair // heads, pair % heads
    rows = block * ROWS + tl.arange(0, ROWS)
    inside = rows < n_queries
    q = _vectors(query + batch * query_batch + head * query_head, rows.to(tl.int64), query_row, inside,
                 D, PADDED)
    position = tl.load(at + rows, mask=inside, other=0)
    keys_of_head = key + batch * key_batch + (head // group) * key_head
    top = tl.full([ROWS], float("-inf"), tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    spread = tl.zeros([ROWS], tl.float32)
    far = tl.zeros([ROWS], tl.float32)
    best = tl.full([ROWS], -1, tl.int32)
    for first in range(tl.load(low + block), tl.load(high + block), KEYS):
        columns = first + tl.arange(0, KEYS)
        there = columns < n_keys
        k = _vectors(keys_of_head, columns.to(tl.int64), key_row, there, D, PADDED)
        x = _logits(q, tl.trans(k), scaling, softcap, CAPPED, PRECISION)
        distance = (key_start + columns)[None, :] - position[:, None]
        seen = there[None, :] & (distance <= ahead) & (distance >= -behind)
        x = tl.where(seen, x, float("-inf"))
        highest = tl.max(x, 1)
        better = highest > top
        if tl.sum(better.to(tl.int32), 0) > 0:
            best = tl.where(better, key_start + first + tl.argmax(x, 1), best)
        after = tl.maximum(top, highest)
        # Rows that have seen nothing yet have no logit to count from.
        base = tl.where(after == float("-inf"), 0.0, after)
        down = tl.where(top == float("-inf"), 0.0, top - base)
        shrink = tl.exp(down)
        x = tl.where(seen, x - base[:, None], -100.0)
        w = tl.where(seen, tl.exp(x), 0.0)
        spread = (spread + total * down) * shrink + tl.sum(w * x, 1)
        far = far * shrink + tl.sum(w * tl.abs(distance).to(tl.float32), 1)
        total = total * shrink + tl.sum(w, 1)
        top = after
    out = pair * n_queries + rows
    tl.store(top_out + out, top, mask=inside)
    tl.store(total_out + out, total, mask=inside)
    tl.store(spread_out + out, spread, mask=inside)
    tl.store(far_out + out, far, mask=inside)
    tl.store(key_out + out, best, mask=inside)


@triton.jit
def keys_kernel(
    query, key, at, low, high, log_sum, received_out,
    query_batch, query_head, query_row, key_batch, key_head, key_row,
    n_queries, n_keys, key_start, behind, ahead, scaling, softcap, heads, group,
    D: tl.constexpr, PADDED: tl.constexpr, CAPPED: tl.constexpr, PRECISION: tl.constexpr,
    ROWS: tl.constexpr, KEYS: tl.constexpr, OTHERS: tl.constexpr,
):
    """Sums over rows of exp(logit - log_sum), for each key; OTHERS leaves out a key's own row."""
    block, pair = tl.program_id(0), tl.program_id(1).to(tl.int64)
    batch, head = pair // heads, pair % heads
    columns = block * KEYS + tl.arange(0, KEYS)
    there = columns < n_keys
    k = _vectors(key + batch * key_batch + (head // group) * key_head, columns.to(tl.int64), key_row,
                 there, D, PADDED)
    queries_of_head = query + batch * query_batch + head * query_head
    received = tl.zeros([KEYS], tl.float32)
    for first in range(tl.load(low + block), tl.load(high + block), ROWS):
        rows = first + tl.arange(0, ROWS)
        inside = rows < n_queries
        q = _vectors(queries_of_head, rows.to(tl.int64), query_row, inside, D, PADDED)
        position = tl.load(at + rows, mask=inside, other=0)
        subtract = tl.load(log_sum + pair * n_queries + rows, mask=inside, other=float("inf"))
        x = _logits(k, tl.trans(q), scaling, softcap, CAPPED, PRECISION)
        distance = (key_start + columns)[:, None] - position[None, :]
        seen = (distance <= ahead) & (distance >= -behind)
        if OTHERS:
            seen = seen & (distance != 0)
        received += tl.sum(tl.where(seen, tl.exp(x - subtract[None, :]), 0.0), 1)
    tl.store(received_out + pair * n_keys + columns, received, mask=there)
