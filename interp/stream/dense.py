"""The dense reference: the same statistics from a whole matrix, for tests and short prompts.

Everything here is written the straightforward way and shares no code with the streamed statistics.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Optional

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

Attention = Float[Tensor, "batch head query key"]
Visible = Bool[Tensor, "*visible query key"]


def positions(
    n_queries: int, n_keys: int, query_offset: Optional[int] = None, key_offset: int = 0
) -> tuple[Int[Tensor, "query"], Int[Tensor, "key"]]:
    """Absolute positions of queries and keys; the queries are the last ones if not said.

    Example:
        >>> positions(2, 3)
        (tensor([1, 2]), tensor([0, 1, 2]))
    """
    key = torch.arange(key_offset, key_offset + n_keys)
    first = key_offset + n_keys - n_queries if query_offset is None else query_offset
    return torch.arange(first, first + n_queries), key


def attention(
    query: Float[Tensor, "batch head query d_head"],
    key: Float[Tensor, "batch kv_head key d_head"],
    visible: Visible,
    *,
    scaling: Optional[float] = None,
    softcap: Optional[float] = None,
    sink_logits: Optional[Float[Tensor, "head"]] = None,
    bias: Optional[Float[Tensor, "*bias query key"]] = None,
) -> Attention:
    """Attention probabilities, at least in float32; zero in rows that see nothing.

    Example:
        >>> query = key = torch.zeros(1, 1, 3, 2)
        >>> attention(query, key, torch.ones(3, 3, dtype=torch.bool).tril())[0, 0, 1]
        tensor([0.5000, 0.5000, 0.0000])

    Args:
        sink_logits: an extra column of the softmax that is dropped afterwards.
        bias: added to the logits after soft-capping.
    """
    dtype = torch.promote_types(query.dtype, torch.float32)
    key = key.to(dtype).repeat_interleave(query.shape[1] // key.shape[1], dim=1)
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    logits = query.to(dtype) @ key.transpose(-1, -2) * scale
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    if bias is not None:
        logits = logits + bias
    logits = torch.where(visible, logits, -torch.inf)
    if sink_logits is not None:
        column = sink_logits.to(dtype)[None, :, None, None].expand(*logits.shape[:3], 1)
        return torch.cat([logits, column], -1).softmax(-1)[..., :-1]
    return logits.softmax(-1).nan_to_num(0.0)


def output(
    probabilities: Attention, value: Float[Tensor, "batch kv_head key d_value"]
) -> Float[Tensor, "batch head query d_value"]:
    """What each query gathers from the values.

    Example:
        >>> output(torch.tensor([[[[0.5, 0.5]]]]), torch.tensor([[[[2.0], [4.0]]]]))
        tensor([[[[3.]]]])
    """
    value = value.to(probabilities.dtype)
    return probabilities @ value.repeat_interleave(probabilities.shape[1] // value.shape[1], dim=1)


def received(
    probabilities: Attention,
    visible: Visible,
    query_positions: Int[Tensor, "query"],
    key_positions: Int[Tensor, "key"],
    *,
    queries: str = "self",
    subset: Optional[Iterable[int]] = None,
    normalize: bool = False,
) -> Float[Tensor, "batch head key"]:
    """Mean attention that each key receives, as `reducers.Received`.

    Example:
        >>> rows = torch.tensor([[[[1.0, 0.0], [0.5, 0.5]]]])
        >>> t = torch.arange(2)
        >>> received(rows, torch.ones(2, 2, dtype=torch.bool).tril(), t, t)
        tensor([[[0.7500, 0.5000]]])
    """
    t, k = query_positions[:, None], key_positions[None]
    counted = visible.expand(probabilities.shape).clone()
    possible = (t >= k).expand_as(counted).clone()
    if queries == "later":
        counted &= t != k
        possible &= t > k
    if subset is not None:
        chosen = torch.tensor([int(p) in set(subset) for p in query_positions])[:, None]
        counted, possible = counted & chosen, possible & chosen
    if normalize:
        total = probabilities.sum(-1, keepdim=True)
        probabilities = torch.where(total > 0, probabilities / total, 0.0)
    number = counted.sum(-2)
    mean = (probabilities * counted).sum(-2) / number
    return mean.masked_fill((number == 0) | (number < 0.5 * possible.sum(-2)), torch.nan)


def value_weighted(
    probabilities: Attention, value: Float[Tensor, "batch kv_head key d_value"],
    visible: Visible, query_positions: Int[Tensor, "query"], key_positions: Int[Tensor, "key"],
    project: Optional[Callable[[Tensor], Tensor]] = None, **settings: Any,
) -> Float[Tensor, "batch head key"]:
    """Mean norm of A_ij v_j per key, as `reducers.ValueWeighted`.

    Example:
        >>> rows, value = torch.tensor([[[[0.5, 0.5]]]]), torch.tensor([[[[0.0, 0.0], [3.0, 4.0]]]])
        >>> value_weighted(rows, value, torch.ones(1, 2, dtype=torch.bool), *positions(1, 2))
        tensor([[[0.0000, 2.5000]]])
    """
    vectors = value.repeat_interleave(probabilities.shape[1] // value.shape[1], dim=1)
    if project is not None:
        vectors = project(vectors)
    alpha = received(probabilities, visible, query_positions, key_positions, **settings)
    return (alpha[..., None] * vectors).norm(dim=-1)


def _sighted(values: Tensor, visible: Tensor, probabilities: Tensor) -> Tensor:
    """NaN in rows that see nothing."""
    blind = ~visible.expand(probabilities.shape).any(-1)
    return values.masked_fill(blind.reshape(*blind.shape, *[1] * (values.ndim - 3)), torch.nan)


def entropy(probabilities: Attention, visible: Visible) -> Float[Tensor, "batch head query"]:
    """Entropy of the rows in nats, after dividing them by their sum.

    Example:
        >>> entropy(torch.full((1, 1, 1, 4), 0.2), torch.ones(1, 4, dtype=torch.bool))
        tensor([[[1.3863]]])
    """
    p = probabilities / probabilities.sum(-1, keepdim=True)
    return _sighted(torch.special.entr(p).sum(-1), visible, probabilities)


def row_deficit(probabilities: Attention, visible: Visible) -> Float[Tensor, "batch head query"]:
    """One minus the sum of each row.

    Example:
        >>> row_deficit(torch.full((1, 1, 1, 4), 0.125), torch.ones(1, 4, dtype=torch.bool))
        tensor([[[0.5000]]])
    """
    return _sighted(1 - probabilities.sum(-1), visible, probabilities)


def distance(
    probabilities: Attention, visible: Visible, query_positions: Int[Tensor, "query"],
    key_positions: Int[Tensor, "key"], *, normalize: bool = False,
) -> Float[Tensor, "batch head query"]:
    """Mean distance between query and key, in tokens.

    Example:
        >>> rows = torch.tensor([[[[0.5, 0.5]]]])
        >>> distance(rows, torch.ones(1, 2, dtype=torch.bool), *positions(1, 2))
        tensor([[[0.5000]]])
    """
    far = (query_positions[:, None] - key_positions).abs()
    found = (probabilities * far).sum(-1)
    if normalize:
        found = found / probabilities.sum(-1)
    return _sighted(found, visible, probabilities)


def segment_mass(
    probabilities: Attention, visible: Visible, key_positions: Int[Tensor, "key"],
    segments: Mapping[str, Sequence[int]],
) -> Float[Tensor, "batch head query segment"]:
    """Attention on each segment, in the order of the mapping.

    Example:
        >>> rows, t = torch.tensor([[[[0.5, 0.25, 0.25]]]]), torch.arange(3)
        >>> segment_mass(rows, torch.ones(1, 3, dtype=torch.bool), t, {"sink": [0], "rest": [1, 2]})
        tensor([[[[0.5000, 0.5000]]]])
    """
    parts = [
        probabilities[..., torch.isin(key_positions, torch.tensor(list(where)))].sum(-1)
        for where in segments.values()
    ]
    return _sighted(torch.stack(parts, -1), visible, probabilities)


def offsets(
    probabilities: Attention, visible: Visible, query_positions: Int[Tensor, "query"],
    key_positions: Int[Tensor, "key"], wanted: Sequence[int],
) -> Float[Tensor, "batch head query offset"]:
    """Attention at fixed key minus query, NaN where there is no visible key.

    Example:
        >>> rows = torch.tensor([[[[0.25, 0.75]]]])
        >>> offsets(rows, torch.ones(1, 2, dtype=torch.bool), *positions(1, 2), [-1, 1])
        tensor([[[[0.2500,    nan]]]])
    """
    shape = probabilities.shape
    found = probabilities.new_full((*shape[:3], len(wanted)), torch.nan)
    seen = visible.expand(shape)
    for row, t in enumerate(query_positions.tolist()):
        for number, offset in enumerate(wanted):
            for column in (key_positions == t + offset).nonzero()[:, 0].tolist():
                there = seen[:, :, row, column]
                found[:, :, row, number] = probabilities[:, :, row, column].where(there, torch.nan)
    return found


def top_keys(
    probabilities: Attention, visible: Visible, key_positions: Int[Tensor, "key"], k: int
) -> tuple[Float[Tensor, "batch head query rank"], Int[Tensor, "batch head query rank"]]:
    """The k highest probabilities of each row and their keys; ties to the earlier key.

    Example:
        >>> rows, t = torch.tensor([[[[0.25, 0.5, 0.25]]]]), torch.arange(3)
        >>> top_keys(rows, torch.ones(1, 3, dtype=torch.bool), t, 2)
        (tensor([[[[0.5000, 0.2500]]]]), tensor([[[[1, 0]]]]))
    """
    shown = probabilities.masked_fill(~visible.expand(probabilities.shape), -1.0)
    order = shown.sort(dim=-1, descending=True, stable=True).indices[..., :k]
    values, keys = shown.gather(-1, order), key_positions[order]
    missing = k - values.shape[-1]
    values = torch.nn.functional.pad(values, (0, max(missing, 0)), value=-1.0)
    keys = torch.nn.functional.pad(keys, (0, max(missing, 0)), value=-1)
    none = values < 0
    return values.masked_fill(none, torch.nan), keys.masked_fill(none, -1)
