"""Active and dormant heads: a head rests on the first token until its input gives it work.

Paper     arXiv:2410.13835
Question  When does a head rest on the first token, and do sink, value drain and residual peak come
          together?
Measure   attention to the first token by kind of query or domain; logit gap, value norm and
          residual norm of the first token against the others
Cause     zero the attention or the MLP of one block: which ones does the residual peak need?
"""

from collections.abc import Mapping, Sequence
from typing import Optional, SupportsFloat

import numpy as np
import torch
import xarray as xr
from jaxtyping import Bool, Float
from matplotlib.axes import Axes
from torch import Tensor

from interp.core import Prompt, Result, edit
from interp.core.errors import OutOfRange, PromptError
from interp.figures import heat, layer_curve
from interp.models.model import Model
from interp.stream.reducers import SegmentMass

NEEDED_BELOW = 0.2
"""A component is needed for the peak if the peak falls below this share of its height without it."""


def logit_gap(
    scores: Float[Tensor | np.ndarray, "*batch head query key"],
) -> Float[Tensor, "*batch head query"]:
    """Logit of the first key minus the mean logit of the other earlier keys, for every query.

    Example:
        >>> scores = torch.zeros(1, 3, 3)
        >>> scores[..., 0] = 5.0
        >>> logit_gap(scores)
        tensor([[nan, nan, 5.]])

    `scores` are the logits before the softmax, masked (minus infinity) or not. Keys that a query
    cannot see (sliding windows) do not count; NaN for queries that do not see the first key, and
    for 0 and 1, which have no other earlier key.

    Source: arXiv:2410.13835, sink logit gap: score(q, 0) - mean over 1 <= j < q of score(q, j).
    """
    scores = torch.as_tensor(scores).float()
    n = scores.shape[-1]
    if scores.shape[-2] != n:
        raise ValueError(f"scores must be [.., query, key] of one prompt, not {scores.shape[-2:]}.")
    query, key = torch.arange(n)[:, None], torch.arange(n)[None]
    between = (key >= 1) & (key < query) & ~scores.isneginf()
    others = torch.where(between, scores, torch.nan).nanmean(-1)
    first = scores[..., 0]
    return torch.where(first.isneginf(), torch.nan, first) - others


def dormancy(
    first: Float[Tensor | np.ndarray, "sample layer head query"],
    queries: Optional[Bool[Tensor | np.ndarray, "sample query"]] = None,
) -> Float[Tensor, "sample layer head"]:
    """Mean attention to the first token over the chosen queries after it: 1 is fully dormant.

    Example:
        >>> first = torch.ones(1, 1, 1, 4)
        >>> first[..., 3] = 0.0
        >>> dormancy(first).round(decimals=2)
        tensor([[[0.6700]]])

    Query 0 is never counted: it has no choice. NaN where no query is left; NaN entries of `first`
    (padding) are left out.

    Source: arXiv:2410.13835; D[l, h, domain] of the method card.
    """
    first = torch.as_tensor(first).float()
    chosen = torch.ones(first.shape[0], first.shape[-1], dtype=torch.bool)
    if queries is not None:
        chosen = torch.as_tensor(queries).clone()
    chosen[:, 0] = False
    kept = torch.where(chosen[:, None, None], first, torch.full_like(first, torch.nan))
    return kept.nanmean(-1)


def measure(
    model: Model, prompts: Sequence[Prompt], active: Optional[Sequence[Sequence[int]]] = None
) -> Result:
    """Attention to the first token, logit gap, value and residual norms, in every layer.

    Example:
        >>> import interp
        >>> found = measure(interp.open_model("backcopy-1l"), [Prompt.from_tokens([65, 9, 8, 7])])
        >>> found["first"].dims
        ('prompt', 'layer', 'head', 'query')

    Args:
        prompts: of equal or different length; short ones (logits are read whole).
        active: for every prompt the queries at which the heads have work to do, where that is
            known (after a trigger, in the toy task); the Result then keeps `is_active`.

    Returns:
        `first` [prompt, layer, head, query], `gap` the same, `value_norm` [prompt, layer, kv_head,
        position], `peak` and `peak_in` [prompt, layer, position]: norms of the residual stream
        leaving and entering each block.
    """
    if not prompts:
        raise PromptError("no prompts to measure: give at least one.")
    if min(map(len, prompts)) < 3:
        raise PromptError("prompts need at least 3 tokens: one first, one other, one query.")
    run = model.run(
        prompts, read=("scores", "v", "resid_pre", "resid_post"),
        stats=[SegmentMass({"first": [0]})], logits="none",
    )
    arrays = {
        "first": run.stats["segments"].sel(segment="first", drop=True),
        "value_norm": _norm(run.reads["v"], "d_head"),
        "peak_in": _norm(run.reads["resid_pre"], "d_model"),
        "peak": _norm(run.reads["resid_post"], "d_model"),
    }
    gaps = np.full(arrays["first"].shape, np.nan, dtype=np.float32)
    for number, prompt in enumerate(prompts):
        n = len(prompt)
        gaps[number, :, :, :n] = logit_gap(run.reads["scores"].values[number, :, :, :n, :n]).numpy()
    arrays["gap"] = arrays["first"].copy(data=gaps)
    data = xr.Dataset(arrays)
    if active is not None:
        flags = np.zeros((len(prompts), data.sizes["query"]), dtype=bool)
        for row, queries in zip(flags, active):
            row[list(queries)] = True
        data["is_active"] = (("prompt", "query"), flags)
    manifest = {**model.manifest(), "measure": "active_dormant", "n_prompts": len(prompts)}
    return Result(data, manifest)


def _norm(array: xr.DataArray, axis: str) -> xr.DataArray:
    return (array**2).sum(axis, skipna=False) ** 0.5


def first_over_others(norms: xr.DataArray) -> xr.DataArray:
    """Norm at position 0 over the mean norm of the later positions.

    Example:
        >>> first_over_others(xr.DataArray([6.0, 2.0, 4.0], dims="position")).item()
        2.0
    """
    return norms.isel(position=0) / _later(norms)


def peak_gap(norms: xr.DataArray) -> xr.DataArray:
    """Norm at position 0 minus the mean norm of the later positions: the residual-state peak.

    Example:
        >>> peak_gap(xr.DataArray([6.0, 2.0, 4.0], dims="position")).item()
        3.0
    """
    return norms.isel(position=0) - _later(norms)


def _later(norms: xr.DataArray) -> xr.DataArray:
    if norms.sizes["position"] < 2:
        raise OutOfRange("there is no later position to compare with position 0.")
    return norms.isel(position=slice(1, None)).mean("position")


def domain_heads(
    by_domain: Mapping[str, Float[np.ndarray, "sample layer head"]],
    *,
    gap: SupportsFloat = 0.4,
    n_permutations: int = 500,
    seed: int = 0,
) -> Result:
    """Heads that are dormant in one domain and active in another, chosen and tested on two halves.

    Example:
        >>> rng = np.random.default_rng(0)
        >>> code = rng.uniform(0, 0.1, (20, 2, 3)); prose = rng.uniform(0.8, 0.9, (20, 2, 3))
        >>> code[:, 1], prose[:, 1] = 0.5, 0.5
        >>> domain_heads({"code": code, "prose": prose})["chosen"].sum().item()
        3

    Args:
        by_domain: two domains, each with `dormancy` per sample.
        gap: heads with a larger difference of mean dormancy in the first half are chosen.

    Returns:
        `difference` (of the test half) [layer, head], `chosen`, `auc` of the domain by the head's
        dormancy on the test half, `p` of a permutation of the domain labels on the test half.

    Source: arXiv:2410.13835; score, halves and test as in the method card.
    """
    if len(by_domain) != 2:
        raise ValueError(f"two domains are compared, not {len(by_domain)}: {sorted(by_domain)}.")
    (_, a), (_, b) = sorted(by_domain.items())
    a, b = np.asarray(a, dtype=float), np.asarray(b, dtype=float)
    if min(len(a), len(b)) < 4:
        raise PromptError("each domain needs at least 4 samples: half to choose, half to test.")
    choose = np.nanmean(a[::2], 0) - np.nanmean(b[::2], 0)
    one, two = a[1::2], b[1::2]
    difference = np.nanmean(one, 0) - np.nanmean(two, 0)
    pairs = one[:, None] - two[None]
    auc = ((pairs > 0) + 0.5 * (pairs == 0)).mean((0, 1))
    rng, both = np.random.default_rng(seed), np.concatenate([one, two])
    extreme = np.ones_like(difference)
    for _ in range(n_permutations):
        order = rng.permutation(len(both))
        shuffled = both[order]
        drawn = np.nanmean(shuffled[: len(one)], 0) - np.nanmean(shuffled[len(one) :], 0)
        extreme += np.abs(drawn) >= np.abs(difference)
    dims = ("layer", "head")
    return Result(xr.Dataset({
        "difference": (dims, difference), "chosen": (dims, np.abs(choose) > float(gap)),
        "auc": (dims, auc), "p": (dims, extreme / (1 + n_permutations)),
    }), {"domains": sorted(by_domain), "gap": float(gap), "n_permutations": n_permutations})


def intervene(model: Model, prompts: Sequence[Prompt], layer: Optional[int] = None) -> Result:
    """Zero the attention or the MLP of one block at a time: height of the residual peak without it.

    Example:
        >>> import interp
        >>> model = interp.open_model("backcopy-1l")
        >>> intervene(model, [Prompt.from_tokens([65, 9, 8, 7])])["peak"].dims
        ('component', 'layer', 'prompt')

    Args:
        layer: the block whose output holds the peak; None takes the one where it is highest, the
            last (which removes it) aside.

    Returns:
        `peak` [component, layer, prompt]: peak gap leaving block `read_layer` with this component
        zeroed (at every position); `baseline` [prompt]; `needed` [component, layer]: whether the
        mean peak falls below `NEEDED_BELOW` of the baseline. Components of later blocks are their
        own control: they cannot reach the place where the peak is read.

    Source: arXiv:2410.13835, block-by-block zeroing.
    """
    norms = _norm(model.run(prompts, read="resid_post", logits="none").reads["resid_post"],
                  "d_model")
    # The peak is read where it leaves a block, the last block (which removes it) aside.
    places = norms.sizes["layer"] - 1
    if layer is None:
        gaps = peak_gap(norms).mean("prompt").values[: max(1, places)]
        layer = int(np.argmax(gaps))
    site = f"resid_post.{layer}"
    baseline = peak_gap(norms.isel(layer=layer))
    found = np.zeros((2, model.n_layers, len(prompts)), dtype=np.float32)
    for row, component in enumerate(("attn_out", "mlp_out")):
        for block in range(model.n_layers):
            run = model.run(prompts, read=site, logits="none",
                            write=edit(f"{component}.{block}", "multiply", 0.0))
            found[row, block] = peak_gap(_norm(run.reads[site], "d_model")).isel(layer=0)
    data = xr.Dataset({
        "peak": (("component", "layer", "prompt"), found),
        "baseline": ("prompt", baseline.values),
    }, {"component": ["attention", "MLP"], "layer": np.arange(model.n_layers)})
    share = data["peak"].mean("prompt") / data["baseline"].mean("prompt")
    data["needed"] = share < NEEDED_BELOW
    return Result(data, {**model.manifest(), "read_layer": layer, "operation": "zero"})


def draw(found: Result, ax: Axes, quantity: str = "first", prompt: int = 0) -> Axes:
    """Draw one quantity: "first" (layer x query, heads averaged), "peak", "value" or "gap".

    Curves over layers are the first token against the mean of the others, one sample per prompt.
    """
    if quantity == "first":
        values = found["first"].isel(prompt=prompt).mean("head")
        return heat.draw(ax, values, label="attention to the first token", limits=(0, 1))
    if quantity == "gap":
        curve = found["gap"].mean(("head", "query"))
        return layer_curve.draw(ax, {"first token": curve}, label="logit gap to the others")
    name, label = {"peak": ("peak", "residual norm after the block"),
                   "value": ("value_norm", "norm of the value")}[quantity]
    norms = found[name]
    norms = norms.mean("kv_head") if "kv_head" in norms.dims else norms
    return layer_curve.draw(
        ax,
        {"first token": norms.isel(position=0),
         "other tokens": norms.isel(position=slice(1, None)).mean("position")},
        label=label, roles={"first token": "primary", "other tokens": "control"},
    )
