"""RoPE-positional heads: do slower rotary dimensions take over as the distance grows?

Paper     arXiv:2410.08703 (its exact metric is not confirmed: the measure is this package's own)
Question  Which heads shift their use of rotary pairs toward slow ones for far keys?
Measure   rope_positional: rank correlation of log distance and the mean index of the rotary pairs
          that make up the score, over the head's own top keys; in uniform pairs as a control
Cause     ablate the top heads, and as many random ones of the same layers, on short and long input

Not the "positional heads" that look at fixed offsets (`interp.heads.linguistic`).
"""

from collections.abc import Sequence
from typing import NamedTuple, Optional, SupportsIndex

import numpy as np
import torch
import xarray as xr
from jaxtyping import Float, Int
from matplotlib.axes import Axes
from scipy import stats
from torch import Tensor

from interp.core import Prompt, Result
from interp.core.errors import ModelRefused, PromptError
from interp.figures import heat
from interp.models.model import Model
from interp.stream.reducers import TopKeys

FIRST_KEY = 4
"""Keys before this one are left out: sinks have a distance, but no content."""


class Pairs(NamedTuple):
    """The coordinates of every rotary pair, fastest first, and its rotation per token."""

    first: Int[Tensor, "pair"]
    second: Int[Tensor, "pair"]
    frequency: Float[Tensor, "pair"]


def contributions(
    query: Float[Tensor | np.ndarray, "*#batch d_head"],
    key: Float[Tensor | np.ndarray, "*#batch d_head"],
    pairs: Pairs,
) -> Float[Tensor, "*#batch pair"]:
    """What each rotary pair adds to the product of a query and a key, after rotation.

    Example:
        >>> pairs = Pairs(torch.tensor([0, 1]), torch.tensor([2, 3]), torch.tensor([1.0, 0.1]))
        >>> contributions(torch.tensor([1.0, 2.0, 3.0, 4.0]), torch.ones(4), pairs)
        tensor([4., 6.])
    """
    q, k = torch.as_tensor(query).float(), torch.as_tensor(key).float()
    both = q * k
    return both[..., pairs.first] + both[..., pairs.second]


def center(parts: Float[Tensor | np.ndarray, "*batch pair"]) -> Float[Tensor, "*batch"]:
    """The mean index of the pairs, weighted by the size of what they add.

    Example:
        >>> center(torch.tensor([[1.0, 0.0, -1.0], [0.0, 0.0, 2.0]]))
        tensor([1., 2.])

    High where slow dimensions carry the score. NaN where nothing is added.
    """
    size = torch.as_tensor(parts).float().abs()
    index = torch.arange(size.shape[-1], dtype=size.dtype, device=size.device)
    return (size * index).sum(-1) / size.sum(-1)


def score(
    parts: Float[Tensor | np.ndarray, "sample pair"],
    distance: Int[Tensor | np.ndarray, "sample"],
) -> float:
    """rope_positional: Spearman correlation of log distance and center, over sampled pairs.

    Example:
        >>> parts = torch.tensor([[3.0, 1.0], [2.0, 1.0], [1.0, 1.0], [1.0, 4.0]])
        >>> round(score(parts, torch.tensor([1, 5, 9, 80])), 6)
        1.0

    NaN for fewer than three pairs or where either is constant.
    """
    where = center(parts).numpy()
    far = np.log(torch.as_tensor(distance).double().numpy())
    known = np.isfinite(where) & np.isfinite(far)
    if known.sum() < 3 or np.ptp(where[known]) == 0 or np.ptp(far[known]) == 0:
        return float("nan")
    ranks = (stats.rankdata(values[known]) for values in (far, where))
    return float(np.corrcoef(*ranks)[0, 1])


def rotary_pairs(model: Model, length: SupportsIndex = 48) -> Pairs:
    """Which coordinates rotate together, and how fast: measured on one token said many times.

    Example:
        >>> import interp
        >>> pairs = rotary_pairs(interp.open_model("reader"))
        >>> pairs.first.tolist()[:3], pairs.second.tolist()[:3], float(pairs.frequency[0].round())
        ([0, 1, 2], [16, 17, 18], 1.0)

    In the first block equal tokens have equal queries before rotation, so the true pairs are those
    whose length stays the same at all positions; angles between neighbors are the frequencies.
    Half-split (Llama) and interleaved (GPT-J, GLM) layouts over any number of leading coordinates
    are tried. Frequency scaling (YaRN, Llama-3) is measured with the rest.

    Raises:
        ModelRefused: no such layout fits: learned or no positions, or other ones.
    """
    from_tokenizer = [i for i in range(min(200, model.d_vocab))
                      if model.tokenizer is None or i not in model.tokenizer.all_special_ids]
    n = int(length)
    prompt = Prompt.from_tokens([from_tokenizer[len(from_tokenizer) // 2]] * n)
    q = torch.tensor(model.run(prompt, read="q.0", logits="none").reads["q.0"].values[0, 0])
    d = q.shape[-1]
    best: Optional[tuple[float, Tensor, Tensor]] = None
    for width in sorted({d, d // 2, d // 4, 3 * d // 4}, reverse=True):
        if width < 2 or width % 2:
            continue
        index = torch.arange(width // 2)
        for first, second in ((index, index + width // 2), (2 * index, 2 * index + 1)):
            size = (q[..., first] ** 2 + q[..., second] ** 2).sqrt()
            drift = float((size - size[:1]).abs().amax() / size.mean())
            rest = q[..., width:]
            still = float((rest - rest[:1]).abs().amax() / q.abs().mean()) if width < d else 0.0
            if best is None or max(drift, still) < best[0]:
                best = max(drift, still), first, second
    moved = float((q - q[:1]).abs().amax() / q.abs().mean())
    if best is None or best[0] > 0.02 or moved < 0.02:
        raise ModelRefused(
            f"the queries of {model.name} are not rotated by position (RoPE) in a layout known "
            "here, so its heads have no rotary pairs."
        )
    _, first, second = best
    z = torch.complex(q[..., first].double(), q[..., second].double())
    # Weighted by size, over heads and neighboring positions.
    turn = (z[1:] * z[:-1].conj()).sum((0, 1)).angle().abs()
    order = turn.argsort(descending=True, stable=True)
    # Coordinates that do not turn (measurably) fit any layout: they are no rotary pairs.
    both = torch.stack([q[..., first], q[..., second]], -1)
    moves = ((both - both[:1]).abs().amax((0, 1, 3)) > 1e-6 * q.abs().mean())[order]
    return Pairs(first[order][moves], second[order][moves], turn[order][moves].float())


def measure(
    model: Model,
    prompts: Sequence[Prompt],
    *,
    n_queries: SupportsIndex = 64,
    top_keys: SupportsIndex = 5,
    permutations: SupportsIndex = 200,
    seed: SupportsIndex = 0,
) -> Result:
    """rope_positional of every head over its own top keys, with controls.

    Example:
        >>> import interp
        >>> model = interp.open_model("reader")
        >>> found = measure(model, [Prompt.from_tokens(np.arange(60) + 20)], n_queries=8)
        >>> found["score"].dims, "uniform" in found.data
        (('layer', 'head'), True)

    Args:
        prompts: long natural text; every head's pairs of all prompts are pooled for its score.
        n_queries: random rows per prompt, the same for all heads.
        top_keys: of each row, how many of the keys with the most attention make pairs.

    Returns:
        `score` (pooled), `uniform` (the same over random earlier keys: what rotation alone does),
        `null` (99 % of the correlations with the distances permuted), `frequency` (share of
        prompts above it), `standard_error` (over prompts), `eligible` (at least 20 pairs at
        several distances) [layer, head]; `samples` [sample, layer, head].

    Keys before the fifth are left out, and so is the query's own.
    """
    shortest = min(map(len, prompts)) if prompts else 0
    if shortest < FIRST_KEY + 8:
        raise PromptError(
            f"prompts of at least {FIRST_KEY + 8} tokens are needed, not {shortest}: distances "
            "must differ."
        )
    pairs = rotary_pairs(model)
    rng = np.random.default_rng(int(seed))
    chosen = [np.sort(rng.choice(np.arange(FIRST_KEY + 2, len(p)), min(
        int(n_queries), len(p) - FIRST_KEY - 2), replace=False)) for p in prompts]
    centers, uniform, far, far_uniform = ([] for _ in range(4))
    for prompt, rows in zip(prompts, chosen):
        run = model.run(prompt, read=["q", "k"], stats=[TopKeys(int(top_keys))], logits="none")
        top = run.stats["top_keys"].isel(prompt=0, query=rows).sel(quantity="key")
        keys = top.transpose("layer", "head", "query", "rank").values
        drawn = rng.integers(FIRST_KEY, rows[:, None], (len(rows), int(top_keys)))
        drawn = np.broadcast_to(drawn, keys.shape)
        q, k = (torch.tensor(run.reads[name].values[0]) for name in "qk")
        for wanted, into, into_far in ((keys, centers, far), (drawn, uniform, far_uniform)):
            c, distance = _centers(q, k, rows, wanted, pairs)
            into.append(c)
            into_far.append(distance)
    axes = ("layer", "head")
    shape = (model.n_layers, model.n_heads)
    samples = np.stack([_correlations(c, d) for c, d in zip(centers, far)])
    pooled, distances = (np.concatenate(x, -1) for x in (centers, far))
    data = xr.Dataset(coords={"sample": np.arange(len(prompts)), "layer": np.arange(shape[0]),
                              "head": np.arange(shape[1])})
    data["score"] = axes, _correlations(pooled, distances)
    data["uniform"] = axes, _correlations(np.concatenate(uniform, -1),
                                          np.concatenate(far_uniform, -1))
    shuffled = []
    for _ in range(int(permutations)):
        order = rng.permutation(pooled.shape[-1])
        shuffled.append(_correlations(pooled, distances[..., order]))
    null = np.full(shape, np.nan)
    known = np.isfinite(np.stack(shuffled)).any(0)
    null[known] = np.nanquantile(np.stack(shuffled)[:, known], 0.99, axis=0)
    data["null"] = axes, null
    data["samples"] = ("sample", *axes), samples
    data["frequency"] = axes, (samples > null).mean(0)
    data["standard_error"] = axes, samples.std(0, ddof=1) / np.sqrt(len(samples)) \
        if len(samples) > 1 else np.full(shape, np.nan)
    count = np.isfinite(pooled).sum(-1)
    data["eligible"] = axes, (count >= 20) & np.isfinite(data["score"].values)
    return Result(data, {**model.manifest(), "measure": "rope_positional", "seed": int(seed),
                         "n_queries": int(n_queries), "top_keys": int(top_keys),
                         "n_prompts": len(prompts), "n_pairs": len(pairs.first)})


def draw(found: Result, ax: Axes) -> Axes:
    """Head map of rope_positional; heads with too few pairs are hatched."""
    return heat.draw(ax, found["score"], label="rope_positional (rank correlation)",
                     limits=(-1, 1), signed=True, eligible=found["eligible"],
                     hatched="too few distances")


def _centers(
    q: Tensor, k: Tensor, rows: np.ndarray, keys: np.ndarray, pairs: Pairs
) -> tuple[np.ndarray, np.ndarray]:
    """Centers and distances [layer, head, sample]; NaN where the key does not count.

    q [layer, position, head, d_head], k [layer, position, kv_head, d_head], keys [layer, head,
    query, rank].
    """
    n_layers, n_heads = keys.shape[:2]
    group = n_heads // k.shape[2]
    own = rows[None, None, :, None]
    good = np.isfinite(keys) & (keys >= FIRST_KEY) & (keys < own)
    place = torch.from_numpy(np.where(good, keys, 0).astype(np.int64))
    found = np.full(keys.shape, np.nan, dtype=np.float32)
    for layer in range(n_layers):
        for head in range(n_heads):
            queries = q[layer, torch.from_numpy(rows), head][:, None]
            found[layer, head] = center(contributions(
                queries, k[layer, :, head // group][place[layer, head]], pairs)).numpy()
    found[~good] = np.nan
    distance = np.where(good, own - np.where(good, keys, 0), np.nan)
    return found.reshape(n_layers, n_heads, -1), distance.reshape(n_layers, n_heads, -1)


def _correlations(where: np.ndarray, far: np.ndarray) -> np.ndarray:
    """Spearman correlation over the last axis of pairs that are known in both."""
    found = np.full(where.shape[:2], np.nan)
    for place in np.ndindex(*found.shape):
        x, y = where[place], far[place]
        known = np.isfinite(x) & np.isfinite(y)
        x, y = x[known], y[known]
        if len(x) > 2 and np.ptp(x) > 0 and np.ptp(y) > 0:
            x, y = stats.rankdata(x), stats.rankdata(y)
            found[place] = np.corrcoef(x, y)[0, 1]
    return found
