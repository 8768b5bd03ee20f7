"""A cache without far keys: what do heads lose, and does one averaged token make up for it?

Paper     arXiv:2407.15891 (RazorAttention)
Question  Which heads can do with the first keys, the last keys and one mean of all others?
Measure   answers when the rows that decide them see a compressed cache in the chosen heads
Method    layer by layer: rows are recomputed from the queries, keys and values of the run in which
          all earlier layers are compressed already; exact, no change to the model
"""

from collections.abc import Iterable, Sequence
from typing import Optional, SupportsFloat, SupportsIndex

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from interp.core import Prompt
from interp.core.errors import OutOfRange
from interp.core.head import HeadLike, check_heads
from interp.core.head import heads as as_heads
from interp.core.intervention import Intervention, patch
from interp.heads.plain_attention import read_layer
from interp.models.model import Model

N_SINKS = 4
"""First keys that always stay. Settings of this package; the paper's are not confirmed."""

KEPT_SHARE = 0.2
"""Share of the prompt that stays as the window of the last keys: N / 5."""


def attend(
    query: Float[Tensor, "query head d_head"],
    key: Float[Tensor, "key head d_head"],
    value: Float[Tensor, "key head d_value"],
    kept: Bool[Tensor, "query key"],
    dropped: Optional[Bool[Tensor, "query key"]] = None,
    scaling: Optional[SupportsFloat] = None,
) -> Float[Tensor, "query head d_value"]:
    """Attention to the kept keys, and to the mean of the dropped ones as one token, if given.

    Example:
        >>> query, key = torch.ones(1, 1, 2), torch.ones(3, 1, 2)
        >>> value = torch.tensor([[[0.0]], [[1.0]], [[5.0]]])
        >>> kept = torch.tensor([[False, False, True]])
        >>> attend(query, key, value, kept)[0, 0]
        tensor([5.])
        >>> attend(query, key, value, kept, ~kept)[0, 0].round(decimals=4)  # equal keys: exact
        tensor([2.])

    The mean key counts as often as keys were dropped: log N is added to its score. Exact where the
    dropped keys are equal; otherwise it underestimates their weight (Jensen).

    Source: arXiv:2407.15891 (second-hand formula).
    """
    scale = query.shape[-1] ** -0.5 if scaling is None else float(scaling)
    q, k, v = query.float(), key.float(), value.float()
    scores = torch.einsum("qhd,khd->hqk", q, k) * scale
    scores = scores.masked_fill(~kept, float("-inf"))
    if dropped is None:
        return torch.einsum("hqk,khd->qhd", scores.softmax(-1), v)
    number = dropped.sum(-1)
    share = dropped.float() / number.clamp_min(1)[:, None]
    mean_k, mean_v = (torch.einsum("qk,khd->qhd", share, x) for x in (k, v))
    extra = (q * mean_k).sum(-1).T * scale + number.float().log()
    both = torch.cat([scores, extra[..., None]], -1).softmax(-1)
    return torch.einsum("hqk,khd->qhd", both[..., :-1], v) + both[..., -1].T[..., None] * mean_v


def views(
    rows: Sequence[int], n_keys: SupportsIndex, n_sinks: SupportsIndex, window: SupportsIndex
) -> tuple[Bool[Tensor, "query key"], Bool[Tensor, "query key"]]:
    """Which keys each row keeps (the first and the last ones), and which it drops.

    Example:
        >>> kept, dropped = views([5], 6, n_sinks=1, window=2)
        >>> kept.int(), dropped.int()
        (tensor([[1, 0, 0, 0, 1, 1]], dtype=torch.int32), \
tensor([[0, 1, 1, 1, 0, 0]], dtype=torch.int32))

    The window holds the query's own key.
    """
    t, s = torch.tensor(list(rows))[:, None], torch.arange(int(n_keys))
    kept = (s <= t) & ((s < int(n_sinks)) | (s > t - int(window)))
    return kept, (s <= t) & ~kept


def compress(
    model: Model,
    prompt: Prompt,
    heads: Iterable[HeadLike],
    rows: Iterable[SupportsIndex],
    *,
    compensate: bool = True,
    n_sinks: SupportsIndex = N_SINKS,
    window: Optional[SupportsIndex] = None,
) -> list[Intervention]:
    """Interventions that give some heads a compressed cache in the chosen rows of one prompt.

    Example:
        >>> import interp
        >>> model = interp.open_model("reader")
        >>> prompt = Prompt.from_tokens(range(3, 60))
        >>> write = compress(model, prompt, ["L1H0"], [55, 56])
        >>> [str(one.site) for one in write]
        ['z.1']

    Args:
        heads: those that lose their far keys; all others keep the whole cache.
        rows: queries that see the compressed cache: those that decide the answer. Earlier ones
            have read the whole prompt, as in prefill.
        compensate: put the mean of the dropped keys and values in their place.
        window: last keys that stay; a fifth of the prompt if None.

    Raises:
        ModelRefused: attention that these formulas do not describe (soft-capping, learned sinks):
            found by recomputing what the model itself does.
        OutOfRange: a head or row that does not exist.

    Costs one pass per layer that has compressed heads.
    """
    chosen = as_heads(heads)
    check_heads(chosen, model.n_layers, model.n_heads)
    places = sorted({int(row) for row in rows})
    if not places or places[0] < 0 or places[-1] >= len(prompt):
        raise OutOfRange(f"rows {places} are not positions of a prompt of {len(prompt)} tokens.")
    last = max(1, round(KEPT_SHARE * len(prompt))) if window is None else int(window)
    kept, dropped = views(places, len(prompt), n_sinks, last)
    if not bool(dropped.any()):
        return []
    write: list[Intervention] = []
    for layer in sorted({head.layer for head in chosen}):
        one = read_layer(model, prompt, layer, places, write)
        changed = attend(one.query, one.key, one.value, kept, dropped if compensate else None,
                         one.scaling)
        z = one.z.clone()
        mine = [head.head for head in chosen if head.layer == layer]
        z[:, mine] = changed[:, mine]
        write.append(patch(f"z.{layer}", z, places))
    return write


def cache_share(
    n_tokens: SupportsIndex, share_whole: SupportsFloat, n_sinks: SupportsIndex = N_SINKS,
    window: Optional[SupportsIndex] = None,
) -> float:
    """Share of the keys and values that stay, with this share of heads kept whole.

    Example:
        >>> round(cache_share(10_000, 0.15), 3)
        0.32
    """
    n, whole = int(n_tokens), float(share_whole)
    last = max(1, round(KEPT_SHARE * n)) if window is None else int(window)
    return whole + (1 - whole) * min(1.0, (int(n_sinks) + last + 1) / n)
