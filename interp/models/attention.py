"""The attention function registered with transformers: exact, editable, streamed.

It is registered together with a mask function of the same name, because transformers drops the
mask of an implementation without one. Nothing of size query x key is made unless whole rows are
read or edited, and then only for a slab of rows at a time.
"""

import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Optional

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface

from interp.core.errors import SiteRefused
from interp.models.attention_mask import DenseMask, LazyMask, make_mask
from interp.models.edits import Edits, Pass
from interp.stream.masks import Mask
from interp.stream.tiles import Tile, stream

NAME = "undertow"
SLAB = 1 << 24
"""Largest number of attention weights, over heads, rows and keys, held at once."""

HANDLED = {
    "sliding_window", "softcap", "s_aux", "is_causal", "position_ids", "cache_position",
    "output_attentions", "use_cache", "past_key_values", "past_key_value", "dropout",
    "output_hidden_states", "return_dict", "position_embeddings", "num_items_in_batch",
    "output_router_logits", "logits_to_keep",
}

_SESSIONS: "weakref.WeakKeyDictionary[nn.Module, tuple[Any, int]]" = (
    weakref.WeakKeyDictionary()
)


class Session:
    """One forward pass of a batch of prompts: their edits, what to read, what to accumulate."""

    def __init__(
        self,
        now: Pass,
        edits: list[Edits],
        want: Callable[[int, str], bool],
        keep: Callable[[int, str, Tensor], None],
        reducers: Callable[[int, int], list],
    ) -> None:
        self.now, self.edits, self.want, self.keep, self.reducers = now, edits, want, keep, reducers
        self.calls: list[nn.Module] = []


def _attend(
    module: nn.Module,
    query: Float[Tensor, "batch head query d_head"],
    key: Float[Tensor, "batch kv_head key d_head"],
    value: Float[Tensor, "batch kv_head key d_value"],
    attention_mask: Any,
    scaling: Optional[float] = None,
    dropout: float = 0.0,
    **kwargs: Any,
) -> tuple[Float[Tensor, "batch query head d_value"], None]:
    """What every attention module of an opened model calls while it runs."""
    strange = [k for k, v in kwargs.items() if v is not None and k not in HANDLED]
    if strange:
        raise SiteRefused(
            f"the attention of {type(module).__name__} also uses {', '.join(sorted(strange))}, "
            "which lane 'hf' does not model; use lane 'bridge' or 'nnsight'."
        )
    scaling = query.shape[-1] ** -0.5 if scaling is None else float(scaling)
    session, layer = _SESSIONS.get(module, (None, -1))
    start = key.shape[2] - query.shape[2]
    if attention_mask is None:
        plain = "causal" if getattr(module, "is_causal", True) and query.shape[2] > 1 else "full"
        plain = "full" if kwargs.get("is_causal") is False else plain
        attention_mask = LazyMask(None, query.shape[2], key.shape[2], start, 0, None, False, plain)
    elif isinstance(attention_mask, Tensor):
        attention_mask = DenseMask(attention_mask, start)
    given = dict(scaling=scaling, softcap=kwargs.get("softcap"), sinks=kwargs.get("s_aux"))
    if session is None:
        parts = [
            attention_output(
                query[i : i + 1], key[i : i + 1], value[i : i + 1], attention_mask, i, given
            )
            for i in range(query.shape[0])
        ]
        return torch.cat(parts).transpose(1, 2).contiguous(), None
    if hasattr(session, "attend"):
        return session.attend(layer, query, key, value, attention_mask, given), None
    return session_attention(session, layer, query, key, value, attention_mask, given), None


def session_attention(
    session: Session,
    layer: int,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: LazyMask,
    given: dict[str, Any],
) -> Float[Tensor, "batch query head d_value"]:
    """Attention of one block with the session's edits, reads and statistics."""
    outputs = []
    for row, edits in enumerate(session.edits):
        q, k, v = (x[row : row + 1] for x in (query, key, value))
        now = session.now
        for name in ("q", "k", "v"):
            if edits.writes(layer, name):
                x = {"q": q, "k": k, "v": v}[name]
                x = edits.apply(layer, name, x[0].transpose(0, 1), now).transpose(0, 1)[None]
                q, k, v = (x if name == n else old for n, old in zip("qkv", (q, k, v)))
        reducers = session.reducers(row, layer)
        whole_rows = (
            edits.edits_pattern(layer) or session.want(layer, "pattern")
            or session.want(layer, "scores")
        )
        blocked = edits.blocks(layer)
        if whole_rows:
            z = _by_rows(session, layer, row, q, k, v, mask, given, reducers)
        else:
            seen = _Visible(mask, row, edits if blocked else None, layer, now)
            rows = chosen_queries(reducers, mask.q_offset, q.shape[2])
            fused = rows is not None or _apart(q, mask, given, blocked)
            if fused or not reducers:
                z = attention_output(q, k, v, mask, row, given, seen if blocked else None)
            if reducers:
                some = slice(None) if rows is None else [row - mask.q_offset for row in rows]
                streamed = stream(
                    q[:, :, some], k, v, reducers=reducers, mask=seen.mask(),
                    scaling=given["scaling"], softcap=given["softcap"], sink_logits=given["sinks"],
                    query_offset=mask.q_offset if rows is None else None, query_positions=rows,
                    key_offset=mask.kv_offset, layer=layer, want_output=not fused,
                )
                if streamed.output is not None:
                    z = streamed.output
        z = z[0].transpose(0, 1)
        outputs.append(edits.apply(layer, "z", z, now))
        for name, x in (("q", q[0]), ("k", k[0]), ("v", v[0])):
            if session.want(layer, name):
                # In decoding the cache brings earlier keys along; they were read before.
                session.keep(layer, name, x[:, -now.length :].transpose(0, 1)[None])
        if session.want(layer, "z"):
            session.keep(layer, "z", outputs[-1][None])
    return torch.stack(outputs)


def chosen_queries(reducers: list, first: int, n: int) -> Optional[list[int]]:
    """The queries of this pass that any of the statistics looks at; None if that is all of them."""
    wanted = [reducer.only_rows() if hasattr(reducer, "only_rows") else None
              for reducer in reducers]
    if not wanted or any(where is None for where in wanted):
        return None
    queries = torch.arange(first, first + n)
    some = torch.stack([where.among(queries) for where in wanted if where is not None]).any(0)
    # One row at least, so that a statistic knows that there was a pass, and how long it was.
    some[-1] = True
    return None if bool(some.all()) else queries[some].tolist()


def _apart(q: Tensor, mask: LazyMask, given: dict[str, Any], blocked: bool) -> bool:
    """Whether the output is computed by a fused kernel, apart from the statistics.

    On a CPU the logits are computed once for both, where no row can be left without a key.
    """
    if given["softcap"] is not None or given["sinks"] is not None:
        return False
    return q.device.type != "cpu" or blocked or mask.named() is None


class _Visible:
    """The mask of one row of the batch with its blocked edges, as `stream` asks for it."""

    def __init__(
        self, mask: LazyMask, row: int, edits: Optional[Edits], layer: int, now: Pass
    ) -> None:
        self.lazy, self.row, self.edits, self.layer, self.now = mask, row, edits, layer, now

    def mask(self) -> Mask:
        """As a rule for `stream`, with the structure that lets it skip tiles."""
        named = self.lazy.named()
        if named is None:
            return Mask(lambda query, key: self(query.flatten(), key))
        if self.edits is None:
            return named
        return named & Mask(lambda query, key: self._open(query.flatten(), key)[None])

    def _open(self, queries: Tensor, keys: Tensor) -> Tensor:
        assert self.edits is not None
        found = self.edits.visible(self.layer, queries, keys, self.now)
        return queries.new_ones((1, len(queries), len(keys)), dtype=torch.bool) \
            if found is None else found

    def __call__(
        self, queries: Int[Tensor, "query"], keys: Int[Tensor, "key"]
    ) -> Bool[Tensor, "1 head query key"]:
        seen = self.lazy(self.row, queries, keys)
        if self.edits is not None:
            seen = seen & self._open(queries, keys)
        return seen[None]


def attention_output(
    q: Tensor, k: Tensor, v: Tensor, mask: LazyMask, row: int, given: dict[str, Any],
    seen: Optional[_Visible] = None,
) -> Float[Tensor, "1 head query d_value"]:
    """Attention output alone, by the fastest exact way."""
    simple = given["softcap"] is None and given["sinks"] is None
    if simple and seen is None and mask.plain in ("causal", "full"):
        causal = mask.plain == "causal" and q.shape[2] > 1
        if not causal or q.shape[2] == k.shape[2]:
            return nn.functional.scaled_dot_product_attention(
                q, k, v, is_causal=causal, scale=given["scaling"],
                enable_gqa=k.shape[1] != q.shape[1],
            )
    seen = seen or _Visible(mask, row, None, -1, Pass(0, 0))
    keys = torch.arange(mask.kv_offset, mask.kv_offset + k.shape[2], device=q.device)
    parts = []
    for queries in _slabs(q, k, mask):
        allowed = seen(queries, keys)
        check_rows(allowed[0], queries)
        part = q[:, :, queries - mask.q_offset]
        if simple:
            made = nn.functional.scaled_dot_product_attention(
                part, k, v, attn_mask=allowed, scale=given["scaling"],
                enable_gqa=k.shape[1] != q.shape[1],
            )
        else:
            p = _weights(_scores(part, k, given, allowed), given)
            made = _weighted(p[None].to(v.dtype), v)
        parts.append(made)
    return torch.cat(parts, dim=2)


def _by_rows(
    session: Session, layer: int, row: int, q: Tensor, k: Tensor, v: Tensor, mask: LazyMask,
    given: dict[str, Any], reducers: list,
) -> Float[Tensor, "1 head query d_value"]:
    """Attention with whole rows in hand: for edits and reads of logits or weights."""
    edits, now = session.edits[row], session.now
    seen = _Visible(mask, row, edits, layer, now)
    keys = torch.arange(mask.kv_offset, mask.kv_offset + k.shape[2], device=q.device)
    parts, kept = [], {"scores": [], "pattern": []}
    for queries in _slabs(q, k, mask):
        allowed = seen(queries, keys)
        check_rows(allowed[0], queries)
        scores = _scores(q[:, :, queries - mask.q_offset], k, given, allowed)
        if edits.edits_scores(layer):
            scores = edits.pattern(layer, scores, queries, keys, allowed[0], now, "scores")
        if session.want(layer, "scores"):
            kept["scores"].append(scores)
        p = _weights(scores, given)
        if edits.edits_pattern(layer):
            p = edits.pattern(layer, p, queries, keys, allowed[0], now)
        if session.want(layer, "pattern"):
            kept["pattern"].append(p)
        if reducers:
            tile = Tile(p[None], queries, keys, allowed, v, layer)
            for reducer in reducers:
                reducer.add(tile)
        parts.append(_weighted(p[None].to(v.dtype), v))
    for name, slabs in kept.items():
        if slabs:
            # A cache with a sliding window has dropped the earliest keys: columns are positions.
            fill = float("-inf") if name == "scores" else 0.0
            rows = torch.cat(slabs, dim=1)
            session.keep(layer, name, nn.functional.pad(rows, (mask.kv_offset, 0), value=fill)[None])
    return torch.cat(parts, dim=2)


def _slabs(q: Tensor, k: Tensor, mask: LazyMask) -> Iterator[Int[Tensor, "query"]]:
    step = max(1, SLAB // max(1, q.shape[1] * k.shape[2]))
    for first in range(0, q.shape[2], step):
        last = min(first + step, q.shape[2])
        yield torch.arange(first, last, device=q.device) + mask.q_offset


def check_rows(allowed: Bool[Tensor, "head query key"], queries: Int[Tensor, "query"]) -> None:
    """Refuse a row that has no key left: its softmax is undefined."""
    empty = ~allowed.any(-1)
    if bool(empty.any()):
        head, query = (int(i) for i in empty.nonzero()[0])
        raise SiteRefused(
            f"blocking leaves position {int(queries[query])} (head {head}) without any key to "
            "attend to; exclude that position, for example its attention to itself."
        )


def _scores(
    q: Tensor, k: Tensor, given: dict[str, Any], allowed: Tensor
) -> Float[Tensor, "head query key"]:
    groups = q.shape[1] // k.shape[1]
    grouped = q[0].reshape(k.shape[1], groups * q.shape[2], q.shape[3])
    scores = grouped.float() @ k[0].float().transpose(1, 2) * given["scaling"]
    scores = scores.reshape(q.shape[1], q.shape[2], k.shape[2])
    if given["softcap"] is not None:
        scores = torch.tanh(scores / given["softcap"]) * given["softcap"]
    return scores.masked_fill(~allowed[0], float("-inf"))


def _weights(scores: Tensor, given: dict[str, Any]) -> Float[Tensor, "head query key"]:
    if given["sinks"] is None:
        return scores.softmax(-1)
    extra = given["sinks"].float().reshape(-1, 1, 1).expand(-1, scores.shape[1], 1)
    return torch.cat([scores, extra], -1).softmax(-1)[..., :-1]


def _weighted(p: Tensor, v: Tensor) -> Float[Tensor, "1 head query d_value"]:
    groups = p.shape[1] // v.shape[1]
    grouped = p[0].reshape(v.shape[1], groups * p.shape[2], p.shape[3])
    return (grouped @ v[0]).reshape(1, p.shape[1], p.shape[2], v.shape[3])


def register() -> None:
    """Register both functions, once for the process; they act only inside a session."""
    AttentionInterface.register(NAME, _attend)
    AttentionMaskInterface.register(NAME, make_mask)


@contextmanager
def implementation(configs: list[Any]) -> Iterator[None]:
    """Let models with these configs call the registered function, and put them back after."""
    register()
    # The public setter also changes sub-configs (a vision tower's, say); this field does not.
    before = [config._attn_implementation_internal for config in configs]
    try:
        for config in configs:
            config._attn_implementation_internal = NAME
        yield
    finally:
        for config, old in zip(configs, before):
            config._attn_implementation_internal = old


@contextmanager
def session(attentions: dict[nn.Module, int], running: Any) -> Iterator[Any]:
    """Route the calls of these attention modules to `running`.

    That is a `Session`, or anything with a method `attend(layer, q, k, v, mask, given)`.
    """
    before = {module: _SESSIONS.get(module) for module in attentions}
    try:
        for module, layer in attentions.items():
            _SESSIONS[module] = (running, layer)
        yield running
    finally:
        for module, old in before.items():
            if old is None:
                _SESSIONS.pop(module, None)
            else:
                _SESSIONS[module] = old


@contextmanager
def callers(found: list[nn.Module]) -> Iterator[None]:
    """Collect, in order, the modules that call the registered function."""

    def spy(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        if module not in found:
            found.append(module)
        return _attend(module, *args, **kwargs)

    AttentionInterface.register(NAME, spy)
    try:
        yield
    finally:
        AttentionInterface.register(NAME, _attend)
