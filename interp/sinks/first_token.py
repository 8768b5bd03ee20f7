"""First-token sinks: how much attention a key position receives, and how often it is a sink.

Paper     arXiv:2410.10781
Question  Which share of the heads sends its attention to the first token instead of the content?
Measure   alpha_k, the mean attention that key k receives from the queries that can see it, and
          Sink_k, the percent of (sample, layer, head) in which alpha_k exceeds epsilon
Cause     block the first key: attention must move on and the logits must change
"""

from collections.abc import Sequence
from typing import Literal, Optional, SupportsFloat

import numpy as np
import torch
import xarray as xr
from jaxtyping import Bool, Float
from matplotlib.axes import Axes
from torch import Tensor

from interp.core import Prompt, Result, block
from interp.core.errors import NumericalError, OutOfRange, PromptError
from interp.figures import heat
from interp.models.model import Model
from interp.stream.reducers import Received

Queries = Literal["self", "later"]

MIN_VISIBLE = 0.5
"""A key gets a number only if at least this share of the queries from it on can see it."""


def importance(
    attention: Float[Tensor | np.ndarray, "*batch head query key"],
    *,
    queries: Queries = "self",
    normalise: bool = False,
    visible: Optional[Bool[Tensor | np.ndarray, "*visible"]] = None,
) -> Float[Tensor, "*batch head key"]:
    """Mean attention that each key receives from the queries that can see it: alpha.

    Example:
        >>> uniform = torch.tril(torch.ones(1, 4, 4)).cumsum(-1).reciprocal().amin(-1)
        >>> rows = torch.tril(torch.ones(1, 4, 4)) * uniform[..., None]
        >>> importance(rows)[0].round(decimals=3)
        tensor([0.5210, 0.3610, 0.2920, 0.2500])
        >>> importance(rows, queries="later")[0].round(decimals=3)
        tensor([0.3610, 0.2920, 0.2500,    nan])

    Args:
        attention: probabilities after the softmax. With fewer queries than keys the rows are the
            last positions of the sequence.
        queries: "self" averages over queries t >= k (the paper); "later" leaves out t = k.
        normalise: divide each row by its sum first, for models whose rows sum to less than one
            (learned sink logits). Report both.
        visible: True where a query may see a key, broadcast over the leading axes, for sliding
            windows, left padding and bidirectional models (all True). The causal triangle if None.

    Returns:
        alpha in float32 (float64 is kept), between 0 and 1. NaN where no query sees the key, and
        where fewer than half of the queries from the key on see it (sliding windows).

    Late keys average few queries, so that any locally attended token looks like a sink: read only
    k < T/2 (`early_keys`). Values fall with T: never compare them across lengths.

    Raises:
        NumericalError: NaN in the attention, or probability on a key that is not visible.

    Source: arXiv:2410.10781, section 3 (alpha_k^{l,h}); the query at k itself is included there.
    """
    rows = torch.as_tensor(attention)
    rows = rows.to(torch.promote_types(rows.dtype, torch.float32))
    n_queries, n_keys = rows.shape[-2:]
    if n_queries > n_keys:
        raise ValueError(
            f"attention has {n_queries} queries but only {n_keys} keys; its last two axes must be "
            "[query, key]."
        )
    if not torch.isfinite(rows).all():
        raise NumericalError("attention contains NaN or infinity; recompute it in float32.")
    # Row r of a rectangular map is position n_keys - n_queries + r.
    position = torch.arange(n_keys - n_queries, n_keys, device=rows.device)[:, None]
    key = torch.arange(n_keys, device=rows.device)
    from_key_on = position >= key
    if visible is None:
        seen = from_key_on
    else:
        seen = torch.as_tensor(visible, device=rows.device)
        if seen.ndim < 2 or seen.shape[-2:] not in ((n_queries, n_keys), (1, n_keys)):
            raise ValueError(
                f"visible has shape {tuple(seen.shape)}; its last two axes must be [query, key] "
                f"= ({n_queries}, {n_keys})."
            )
    # A query that sees nothing is padding: its row means nothing and is not counted.
    hidden = float((rows * (~seen & seen.any(-1, keepdim=True))).abs().amax())
    if hidden > 1e-5:
        raise NumericalError(
            f"attention puts up to {hidden:.3g} on keys that no query may see; give visible= "
            "for bidirectional, padded or otherwise not causal attention."
        )
    counted = seen if queries == "self" else seen & (position != key)
    if normalise:
        total = rows.sum(-1, keepdim=True)
        rows = rows / torch.where(total > 0, total, torch.ones_like(total))
    number = counted.sum(-2)
    alpha = (rows * counted).sum(-2) / number
    possible = from_key_on if queries == "self" else from_key_on & (position != key)
    enough = (number > 0) & (number >= MIN_VISIBLE * possible.sum(-2))
    return torch.where(enough, alpha, torch.full_like(alpha, float("nan")))


def sink_rate_from_importance(
    alpha: Float[Tensor | np.ndarray, "*batch head key"], epsilon: SupportsFloat = 0.3
) -> Float[Tensor, "key"]:
    """Percent of (sample, layer, head) in which a key receives more than epsilon: Sink_k.

    Takes alpha from `importance` or from the streamed statistic "received". NaN entries (keys out
    of sight) are left out of the average; a key without any entry is NaN.

    Example:
        >>> sink_rate_from_importance(torch.tensor([[0.9, 0.1], [0.2, 0.1]]))
        tensor([50.,  0.])

    Source: arXiv:2410.10781 (Sink_k^epsilon): strictly greater, thresholded first, then averaged.
    """
    epsilon = float(epsilon)
    if not 0 <= epsilon < 1:
        raise ValueError(f"epsilon must lie in [0, 1), not {epsilon}: alpha is a probability.")
    alpha = torch.as_tensor(alpha)
    alpha = alpha.to(torch.promote_types(alpha.dtype, torch.float32)).flatten(0, -2)
    known = ~alpha.isnan()
    hits = ((alpha > epsilon) & known).sum(0)
    return 100 * hits.to(alpha.dtype) / known.sum(0)


def sink_rate(
    attention: Float[Tensor | np.ndarray, "sample layer head query key"],
    epsilon: SupportsFloat = 0.3,
    *,
    queries: Queries = "self",
    normalise: bool = False,
    visible: Optional[Bool[Tensor | np.ndarray, "*visible"]] = None,
) -> Float[Tensor, "key"]:
    """Percent of (sample, layer, head) whose attention to a key exceeds epsilon, for every key.

    Example:
        >>> attention = torch.zeros(1, 1, 2, 3, 3)
        >>> attention[0, 0, 0, :, 0] = 1  # head 0 reads the first token, head 1 reads itself
        >>> attention[0, 0, 1] = torch.eye(3)
        >>> sink_rate(attention, 0.4)
        tensor([50., 50., 50.])

    Head 1 makes keys 1 and 2 look like sinks because they are late: few queries see them, among
    them their own. Read `early_keys` only.

    Args:
        epsilon: threshold on alpha, strictly exceeded; the paper uses 0.3 with T = 64.
        queries, normalise, visible: as in `importance`.

    State T, epsilon and whether the sequence starts with a BOS token beside the number.

    Source: arXiv:2410.10781; equals sail-sg/Attention-Sink `eval_sink_open_source.py`.
    """
    alpha = importance(attention, queries=queries, normalise=normalise, visible=visible)
    return sink_rate_from_importance(alpha, epsilon)


def early_keys(n_keys: int) -> slice:
    """The keys whose alpha can be trusted: k <= T/2 counted from one.

    Example:
        >>> early_keys(7), early_keys(8)
        (slice(0, 3, None), slice(0, 4, None))
    """
    return slice(0, n_keys // 2)


def norm_ratio(
    vectors: Float[Tensor | np.ndarray, "*batch position d_model"], position: int = 0
) -> Float[Tensor, "*batch"]:
    """Norm of one position's vector over the mean norm of all later positions.

    Works for residuals (the sink's is far above 1), keys and values (below 1: value drain).

    Example:
        >>> vectors = torch.ones(3, 4)
        >>> vectors[0] = 5
        >>> norm_ratio(vectors)
        tensor(5.)

    Source: arXiv:2410.10781, activation profile (for the first position, every block).
    """
    vectors = torch.as_tensor(vectors)
    norm = vectors.to(torch.promote_types(vectors.dtype, torch.float32)).norm(dim=-1)
    n_positions = norm.shape[-1]
    if not 0 <= position < n_positions - 1:
        raise OutOfRange(
            f"position {position} has no later positions among {n_positions}; choose 0 to "
            f"{n_positions - 2}."
        )
    return norm[..., position] / norm[..., position + 1 :].mean(-1)


def measure(model: Model, prompts: Sequence[Prompt], *, queries: Queries = "self") -> Result:
    """Attention received by every key, and norms of residual, keys and values, in every layer.

    Example:
        >>> import interp
        >>> model = interp.open_model("backcopy-1l")
        >>> found = measure(model, [Prompt.from_tokens(range(8)), Prompt.from_tokens(range(8, 16))])
        >>> found["alpha"].dims
        ('prompt', 'layer', 'head', 'key')

    Args:
        prompts: of one length: alpha falls with the length and may not be averaged over it.

    Returns:
        `alpha`; `alpha_normalized` and `external` [prompt, layer, head] where rows sum to less
        than one (learned sink logits); `residual_norm` (block input), `key_norm`, `value_norm`
        [prompt, layer, (kv_head,) position]; `angle` and `query_norm` [prompt, layer, head]:
        mean cosine of later queries to the first key.

    Raises:
        PromptError: prompts of different lengths.

    Source: arXiv:2410.10781; keys after position encoding, residual before the block.
    """
    lengths = {len(prompt) for prompt in prompts}
    if len(lengths) != 1:
        raise PromptError(
            f"prompts of one length are needed, not {sorted(lengths) or 'none'}: the attention a "
            "key receives falls with the length."
        )
    read = ("resid_pre", "q", "k", "v")
    run = model.run(prompts, read=read, stats=[Received(queries=queries)], logits="none")
    q, k, v = (run.reads[name] for name in "qkv")
    group = model.n_heads // model.n_kv_heads
    shared = k.isel(position=0, kv_head=np.repeat(np.arange(model.n_kv_heads), group))
    first = shared.rename(kv_head="head")
    later = q.isel(position=slice(1, None))
    cosine = (later * first).sum("d_head") / (_norm(later) * _norm(first))
    data = xr.Dataset({
        "alpha": run.stats["received"],
        "residual_norm": _norm(run.reads["resid_pre"], "d_model"),
        "key_norm": _norm(k), "value_norm": _norm(v),
        "angle": cosine.mean("position"), "query_norm": _norm(later).mean("position"),
    })
    if model.sink_kind == "learned":
        more = model.run(prompts, stats=[Received(queries=queries, normalize=True)], logits="none")
        data["alpha_normalized"] = more.stats["received"]
        deficit = model.run(prompts, stats="row_deficit", logits="none").stats["row_deficit"]
        data["external"] = deficit.mean("query")
    return Result(data, {
        **model.manifest(), "measure": "first_token", "queries": queries,
        "length": lengths.pop(), "n_prompts": len(prompts),
    })


def _norm(array: xr.DataArray, axis: str = "d_head") -> xr.DataArray:
    return (array**2).sum(axis, skipna=False) ** 0.5


def intervene(
    model: Model,
    prompts: Sequence[Prompt],
    n_first: Sequence[int] = (1, 2, 4),
    *,
    control_seeds: int = 5,
    seed: int = 0,
) -> Result:
    """Hide the first tokens from later queries: how much worse is the text predicted?

    Example:
        >>> import interp
        >>> model = interp.open_model("backcopy-1l")
        >>> intervene(model, [Prompt.from_tokens(range(20))], (1,))["loss"].dims
        ('prompt', 'n_first')

    Losses are means over the second half of the prompt, whose queries lose the keys 0 to n - 1
    (position ids stay as they are). The matched control hides n random keys from among those of
    the first half that are not hidden, for the same queries, `control_seeds` times.

    Returns:
        `baseline` [prompt], `loss` [prompt, n_first], `control` [sample, prompt, n_first]: mean
        cross-entropy in nats.

    Source: arXiv:2309.17453 (masking in place of dropping from the cache).
    """
    rng = np.random.default_rng(seed)
    sizes = sorted({int(n) for n in n_first})
    shortest = min(map(len, prompts)) if prompts else 0
    if not sizes or sizes[0] < 1 or shortest < 4 * max(sizes):
        raise PromptError(
            f"hiding {sizes} first tokens needs prompts of at least {4 * max(sizes, default=1)} "
            f"tokens, not {shortest}."
        )

    def late_loss(keys: Sequence[Sequence[int]]) -> np.ndarray:
        found = []
        for prompt, hidden in zip(prompts, keys):
            start = len(prompt) // 2
            write = [block(slice(start, None), list(hidden))] if len(hidden) else []
            logits = model.run(prompt, write=write).logits[0]
            target = torch.tensor(prompt.ids[start + 1 :])
            known = logits[start : len(prompt) - 1].log_softmax(-1)
            found.append(-float(known.gather(-1, target[:, None]).mean()))
        return np.array(found)

    baseline = late_loss([()] * len(prompts))
    loss = np.stack([late_loss([range(n)] * len(prompts)) for n in sizes], -1)
    control = np.stack([
        np.stack([
            late_loss([
                rng.choice(np.arange(n, len(p) // 2), n, replace=False).tolist() for p in prompts
            ])
            for n in sizes
        ], -1)
        for _ in range(control_seeds)
    ])
    data = xr.Dataset({
        "baseline": ("prompt", baseline), "loss": (("prompt", "n_first"), loss),
        "control": (("sample", "prompt", "n_first"), control),
    }, {"n_first": sizes})
    return Result(data, {**model.manifest(), "operation": "block", "control": "random early keys",
                         "control_seeds": control_seeds, "seed": seed})


def draw(found: Result, ax: Axes, key: int = 0) -> Axes:
    """Head map of the attention that one key receives, averaged over prompts."""
    values = found["alpha"].isel(key=key).mean("prompt")
    return heat.draw(ax, values, label=f"attention received by token {key}", limits=(0, 1))
