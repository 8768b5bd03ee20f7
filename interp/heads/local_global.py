"""Local and global heads: how far heads look back, and the curves of WAAD and FAI from the two.

Paper     arXiv:2510.13554
Question  At which tokens do local heads look back farther, and which tokens do global heads reread?
Measure   span d of every head; WAAD, the windowed look-back of the local heads at each token; FAI,
          the attention that each token receives later from the global heads
Cause     change a token that is reread, and others: do greedy continuations change more?
"""

from collections.abc import Sequence
from typing import Any, SupportsFloat, SupportsIndex, cast

import numpy as np
import torch
import xarray as xr
from jaxtyping import Float
from matplotlib.axes import Axes
from scipy.stats import rankdata
from torch import Tensor

from interp.core import Prompt, PromptError, Result, ablate
from interp.core.errors import NumericalError
from interp.figures import heat
from interp.heads.preplan_anchor import HIGH, LOW, WINDOW, change, fai, waad, waad_from_band
from interp.models.model import Model
from interp.stream.band import Band
from interp.stream.per_layer import PerLayer
from interp.stream.reducers import Distance, Received, SegmentMass

__all__ = ["change", "draw", "fai", "measure", "span", "waad", "waad_from_band"]
SHARE = 0.3
FIRST = 4
"""Tokens at the start on which heads park their attention: spans are also taken without them."""
MAX_SINK_MASS = 0.5


def span(
    attention: Float[Tensor | np.ndarray, "*batch head query key"], *, first: SupportsIndex = 0
) -> Float[Tensor, "*batch head"]:
    """Mean distance that a head looks back, in tokens, over the queries given.

    Example:
        >>> rows = torch.zeros(1, 3, 3)
        >>> rows[0, 0, 0] = rows[0, 1, 0] = rows[0, 2, 0] = 1.0
        >>> span(rows)
        tensor([1.])

    Args:
        attention: with fewer queries than keys the rows are the last positions.
        first: leave out so many keys at the start and renormalize: heads that park attention on
            the first token have the longest spans otherwise. Rows without anything else are left
            out; NaN if there is no other.

    Source: arXiv:2510.13554, d = mean_t sum_s A_ts (t - s).
    """
    rows = _checked(attention)
    n_queries, n_keys = rows.shape[-2:]
    distance = torch.arange(n_keys - n_queries, n_keys)[:, None] - torch.arange(n_keys)
    left = rows.clone()
    left[..., : int(first)] = 0
    total = left.sum(-1)
    far = (left * distance.abs()).sum(-1)
    if int(first):
        far = torch.where(total > 0, far / total.where(total > 0, torch.ones_like(total)), torch.nan)
        return far.nanmean(-1)
    return far.mean(-1)


def measure(
    model: Model, prompts: Sequence[Prompt], *, share: SupportsFloat = SHARE,
    window: int = WINDOW, low: int = LOW, high: int = HIGH, first: int = FIRST,
    max_sink_mass: SupportsFloat = MAX_SINK_MASS,
) -> Result:
    """Spans of all heads, the local, global and receiver heads, and WAAD and FAI at every token.

    Example:
        >>> import interp
        >>> model = interp.open_model("reader")
        >>> found = measure(model, [Prompt.from_tokens([0, *range(20, 60)])], low=2, high=8)
        >>> found["span"].dims, found["waad"].dims, int(found["local"].sum())
        (('sample', 'layer', 'head'), ('sample', 'position'), 8)

    Args:
        prompts: a segment of kind "generated" says which rows count; else all but the first few.
        share: of the eligible heads that are local, and as many global.
        window, low, high: W, H_lo and H_hi of the paper.
        first: tokens at the start that are left out of `span_rest`, by which heads are ranked.
        max_sink_mass: heads with more attention than this on those tokens are not eligible: they
            park their attention, and would all be global.

    Returns:
        Per sample, layer and head: `span`, `span_rest` (tokens), `uniform_span` (of uniform
        attention in the same masks), `sink_mass`, `kurtosis` (of what the keys receive). Per layer and
        head: `score` (mean of `span_rest`), `frequency` (share of samples among the global),
        `standard_error`, `null`, `eligible`, `rank` (mean quantile of the span within each
        prompt, since spans grow with its length), `local`, `global`, `receiver`. A head with a
        window shorter than `high` is no candidate for a global one. Per sample and position:
        `waad`, `delta`, `fai`, `fai_receiver`, the same with `_uniform` behind (of uniform attention
        in the masks of those heads: attention on a token thins out as the text grows, so that raw
        FAI falls from the first token on), `entropy` (of the model's prediction of this token,
        nats), NaN outside of the rows that count.

    Raises:
        PromptError: no prompts, too short ones, or an encoder, which looks both ways.

    Streamed: diagonals and distances only, no attention matrix.
    """
    if model.kind != "decoder":
        raise PromptError(
            f"{model.name} is an encoder: its heads look ahead as well, and nothing is later."
        )
    rows = [_rows(p, first, low) for p in prompts]
    if not len(prompts):
        raise PromptError("no prompts to measure spans on: give at least one.")
    data = _spans(model, prompts, rows, first, low)
    even = _even(model, prompts, rows, first, high)
    data["uniform_span"] = even["span"]
    sees, ranked = even["reach"].any("sample"), data["span_rest"]
    parked = data["sink_mass"].mean("sample") > float(max_sink_mass)
    able = ranked.notnull().any("sample") & ~parked
    rank = _quantiles(ranked.where(able)).mean("sample")
    count = max(1, round(float(share) * int(able.sum())))
    data["eligible"] = able & sees
    data["rank"], data["score"] = rank, ranked.mean("sample")
    data["null"] = even["span_rest"].mean("sample")
    n = ranked.notnull().sum("sample")
    data["standard_error"] = (ranked.std("sample", ddof=1) / n**0.5).where(n > 1)
    data["local"] = _extreme(rank.where(able), count, lowest=True)
    data["global"] = _extreme(rank.where(able & sees & ~data["local"]), count)
    data["receiver"] = _extreme(data["kurtosis"].mean("sample").where(able & sees), count)
    quantile = _quantiles(ranked.where(able & sees))
    data["frequency"] = (quantile > 1 - float(share)).where(quantile.notnull()).mean("sample")
    for name, values in _curves(model, prompts, rows, data, window, low, high).items():
        data[name] = values
    manifest = {
        **model.manifest(), "measure": "local_global", "share": float(share), "window": window,
        "low": low, "high": high, "first": first, "max_sink_mass": float(max_sink_mass),
        "n_samples": len(rows), "heads per set": count, "parked heads": int(parked.sum()),
        "heads with too short a window": int((~sees).sum()),
    }
    if not bool(data["local"].any() and data["global"].any()):
        manifest["note"] = "no head is eligible as local or as global: WAAD or FAI are NaN"
    return Result(data, manifest)


def draw(found: Result, ax: Axes) -> Axes:
    """Head map of the span without the first tokens."""
    return heat.draw(ax, found["score"], label="span (tokens)", limits=(0, float(
        np.nanmax(found["score"].values))), eligible=found["eligible"],
        hatched="parks its attention, or sees too little")


def _rows(prompt: Prompt, first: int, low: int) -> np.ndarray:
    """Positions whose rows count."""
    named = [s for s in prompt.segments if "generated" in (s.name, s.kind)]
    where = np.array(sorted({p for s in named for p in s.positions}), dtype=int) if named \
        else np.arange(first, len(prompt))
    where = where[where >= first]
    if len(where) <= low:
        raise PromptError(
            f"a prompt of {len(prompt)} tokens has {len(where)} rows that count; more than {low} are "
            "needed, so that some tokens are reread."
        )
    return where


def _spans(
    model: Model, prompts: Sequence[Prompt], rows: Sequence[np.ndarray], first: int, low: int,
) -> xr.Dataset:
    """Spans with and without the first tokens, the mass on those, kurtosis over the other keys."""
    parts: list[xr.Dataset] = []
    for prompt, where in zip(prompts, rows):
        run = model.run(prompt, stats=[
            Distance(), "row_deficit", _firsts(first), Received("later", subset=where)],
            logits="none")
        made = _span(run.stats, where, first)
        # The last keys are received by few rows.
        keys = slice(first, int(where[-1]) - low + 1)
        received = run.stats["received"].isel(prompt=0, key=keys)
        made["kurtosis"] = ("layer", "head"), _kurtosis(received.values.astype(float))
        parts.append(made)
    return cast(xr.Dataset, xr.concat(parts, "sample"))


def _even(
    model: Model, prompts: Sequence[Prompt], rows: Sequence[np.ndarray], first: int, high: int
) -> xr.Dataset:
    """Spans of uniform attention in the same masks, and who can look back `high` tokens."""
    heads = list(range(model.n_heads))
    write = [ablate([(layer, head) for layer in range(model.n_layers) for head in heads], "uniform")]
    parts: list[xr.Dataset] = []
    for prompt, where in zip(prompts, rows):
        back = min(high, int(where[-1]))
        run = model.run(prompt, write=write, logits="none", stats=[
            Distance(), "row_deficit", _firsts(first), Band([-back], heads)])
        made = _span(run.stats, where, first)
        # All heads of a layer have one window.
        seen = run.stats["offsets"].isel(prompt=0, head=0, offset=0, query=-1) > 0
        made["reach"] = ("layer", "head"), np.repeat(seen.values[:, None], len(heads), 1)
        parts.append(made)
    return cast(xr.Dataset, xr.concat(parts, "sample"))


def _firsts(first: int) -> SegmentMass:
    """Attention on every one of the first tokens."""
    return SegmentMass({str(key): [key] for key in range(max(first, 1))})


def _span(stats: Any, where: np.ndarray, first: int) -> xr.Dataset:
    at = {"prompt": 0, "query": where}
    far, total = stats["distance"].isel(at), 1 - stats["row_deficit"].isel(at)
    near = stats["segments"].isel(at).isel(segment=slice(first))
    away = xr.DataArray(where[:, None] - np.arange(first), dims=("query", "segment"))
    near = near.drop_vars("segment")
    rest = total - near.sum("segment")
    # A hundredth of a percent is what rounding leaves of nothing.
    span_rest = (far - (near * away).sum("segment")) / rest.where(rest > 1e-4)
    return xr.Dataset({
        "span": (far / total).mean("query"), "span_rest": span_rest.mean("query"),
        "sink_mass": (near.sum("segment") / total).mean("query"),
    })


def _curves(
    model: Model, prompts: Sequence[Prompt], rows: Sequence[np.ndarray], data: xr.Dataset,
    window: int, low: int, high: int,
) -> dict[str, xr.DataArray]:
    """WAAD, FAI and the entropy at every position that counts."""
    near, later = [-j for j in range(window)], [-j for j in range(low, high + 1)]
    longest = max(map(len, prompts))
    names = ("waad", "delta", "fai", "fai_uniform", "fai_receiver", "fai_receiver_uniform", "entropy")
    every = [(layer, head) for layer in range(model.n_layers) for head in range(model.n_heads)]
    made = {name: np.full((len(prompts), longest), np.nan) for name in names}
    for number, (prompt, where) in enumerate(zip(prompts, rows)):
        run = model.run(prompt, stats=[_band(data["local"], near), "row_deficit"])
        local = np.flatnonzero(data["local"].values.any(1))
        total = 1 - run.stats["row_deficit"].isel(prompt=0).where(data["local"]).mean(
            ("layer", "head")).values
        band = _mean_band(run.stats["offsets"], data["local"]) if len(local) else None
        if band is not None:
            curve = waad_from_band(torch.tensor(band), torch.tensor(total)).numpy()
            made["waad"][number, where] = curve[where]
            made["delta"][number, where] = change(curve[where])
        for name, chosen in (("fai", "global"), ("fai_receiver", "receiver")):
            if not bool(data[chosen].any()):
                continue
            for ending, write in (("", []), ("_uniform", [ablate(every, by="uniform")])):
                bands = model.run(prompt, write=write, stats=[_band(data[chosen], later)],
                                  logits="none").stats["offsets"]
                found = _received(_mean_band(bands, data[chosen]), where, low, high)
                made[name + ending][number, where] = found[where]
        logits = run.logits[0].log_softmax(-1)
        spread = -(logits.exp() * logits).nansum(-1).numpy()
        # The row before a token predicts it.
        made["entropy"][number, where[where > 0]] = spread[where[where > 0] - 1]
    return {name: xr.DataArray(values, {"position": np.arange(longest)}, ("sample", "position"))
            for name, values in made.items()}


def _band(chosen: xr.DataArray, offsets: Sequence[int]) -> PerLayer:
    return PerLayer("offsets", lambda _, layer: Band(
        offsets, np.flatnonzero(chosen.sel(layer=layer).values).tolist()))


def _mean_band(bands: xr.DataArray, chosen: xr.DataArray) -> np.ndarray:
    """The plain mean over all chosen heads from the means per layer: [query, offset]."""
    weight = chosen.sum("head").values.astype(float)
    values = np.nan_to_num(bands.isel(prompt=0, head=0).values)
    return np.tensordot(weight / weight.sum(), values, 1)


def _received(band: np.ndarray, where: np.ndarray, low: int, high: int) -> np.ndarray:
    """FAI from diagonals: [key]; only the rows that count are averaged."""
    n = len(band)
    counts = np.zeros(n, dtype=bool)
    counts[where] = True
    total, number = np.zeros(n), np.zeros(n)
    for column, back in enumerate(range(low, high + 1)):
        if back < n:
            use = counts[back:]
            total[: n - back] += np.where(use, band[back:, column], 0.0)
            number[: n - back] += use
    return np.where(number > 0, total / np.maximum(number, 1), np.nan)


def _kurtosis(received: np.ndarray) -> np.ndarray:
    """Excess kurtosis over keys; NaN where a head shows fewer than four of them or all alike."""
    known = np.isfinite(received)
    count = np.maximum(known.sum(-1), 1)
    away = np.where(known, received, 0.0)
    away = np.where(known, away - (away.sum(-1) / count)[..., None], 0.0)
    second, fourth = ((away**power).sum(-1) / count for power in (2, 4))
    enough = (known.sum(-1) >= 4) & (second > 0)
    return np.where(enough, fourth / np.where(enough, second, 1.0) ** 2 - 3, np.nan)


def _quantiles(values: xr.DataArray) -> xr.DataArray:
    """Rank of every head within its sample, from 0 to 1; NaN where there is no value."""
    flat = values.values.reshape(values.sizes["sample"], -1)
    made = np.full(flat.shape, np.nan)
    for row, one in zip(made, flat):
        known = np.isfinite(one)
        if known.sum() > 1:
            row[known] = (rankdata(one[known]) - 1) / (known.sum() - 1)
    return values.copy(data=made.reshape(values.shape))


def _extreme(values: xr.DataArray, count: int, lowest: bool = False) -> xr.DataArray:
    """The `count` lowest or highest heads that have a value."""
    flat = values.values.ravel()
    order = np.argsort(flat if lowest else -flat, kind="stable")
    order = order[np.isfinite(flat[order])][:count]
    found = np.zeros(flat.shape, dtype=bool)
    found[order] = True
    return xr.DataArray(found.reshape(values.shape), values.coords, values.dims)


def _checked(attention: Tensor | np.ndarray) -> Tensor:
    rows = torch.as_tensor(attention)
    rows = rows.to(torch.promote_types(rows.dtype, torch.float32))
    if not torch.isfinite(rows).all():
        raise NumericalError("attention contains NaN or infinity; recompute it in float32.")
    return rows
