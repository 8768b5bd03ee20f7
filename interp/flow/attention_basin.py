"""The attention basin: interchangeable documents get more attention at the ends than in the middle.

Paper     arXiv:2508.05128
Question  How does attention to one of several documents depend on the slot it stands in?
Measure   mean attention of the question's rows to every slot, over prompts whose documents change
          places; the basin index, with slots permuted within prompts as the null
Cause     the same documents in another order: the best one where attention is highest (AttnRank)
"""

from collections.abc import Sequence
from typing import Any, SupportsFloat, SupportsIndex, Union

import numpy as np
import torch
import xarray as xr
from jaxtyping import Float, Int
from matplotlib.axes import Axes
from torch import Tensor

from interp.core import PromptError, Result
from interp.figures import layer_curve
from interp.models.model import Model
from interp.prompts.documents import Documents
from interp.stream.chosen_rows import RowMass
from interp.stream.per_layer import PerLayer

Profile = Union[Float[np.ndarray, "*batch slot"], Float[Tensor, "*batch slot"]]


def basin_index(profile: Profile) -> Float[np.ndarray, "*batch"]:
    """How much higher the ends are than the lowest slot between them.

    Example:
        >>> float(basin_index(np.array([0.4, 0.1, 0.2, 0.2])))
        0.2

    `B = (P_first + P_last) / 2 - min P` over the slots between; at least three slots. The least of
    several noisy numbers is low by itself: compare with `permuted`.
    """
    p = np.asarray(torch.as_tensor(profile).double())
    if p.shape[-1] < 3:
        raise ValueError(f"a basin needs at least three slots, not {p.shape[-1]}.")
    return np.asarray(np.round((p[..., 0] + p[..., -1]) / 2 - p[..., 1:-1].min(-1), 12))


def permuted(
    mass: Float[np.ndarray, "prompt slot"], permutations: SupportsIndex = 500,
    seed: SupportsIndex = 0,
) -> Float[np.ndarray, "sample"]:
    """The basin index with the slots of every prompt in random order: what no position gives.

    Example:
        >>> permuted(np.ones((4, 5)), 3).tolist()
        [0.0, 0.0, 0.0]
    """
    rng = np.random.default_rng(int(seed))
    drawn = [basin_index(rng.permuted(mass, axis=1).mean(0)) for _ in range(int(permutations))]
    return np.array([float(one) for one in drawn])


def rank_slots(profile: Float[np.ndarray, "slot"]) -> Int[np.ndarray, "slot"]:
    """Slots from the most to the least attended one.

    Example:
        >>> rank_slots(np.array([0.4, 0.1, 0.5])).tolist()
        [2, 0, 1]
    """
    return np.argsort(-np.asarray(profile), kind="stable")


def arrange(
    relevance: Float[np.ndarray, "item"], profile: Float[np.ndarray, "slot"]
) -> tuple[int, ...]:
    """AttnRank: which item goes to each slot, the most relevant one to the most attended slot.

    Example:
        >>> arrange(np.array([0.1, 0.9, 0.5]), np.array([0.5, 0.1, 0.4]))
        (1, 0, 2)

    Source: arXiv:2508.05128. For the order of a retriever give a profile that falls.
    """
    items = np.argsort(-np.asarray(relevance), kind="stable")
    if len(items) != len(profile):
        raise ValueError(f"{len(items)} items cannot be arranged in {len(profile)} slots.")
    order = [0] * len(items)
    for slot, item in zip(rank_slots(profile), items):
        order[int(slot)] = int(item)
    return tuple(order)


def overlap(asked: Documents) -> Float[np.ndarray, "item"]:
    """A plain retriever: the share of the question's tokens that every document holds.

    Example:
        >>> from interp.organisms import reader
        >>> from interp.prompts.documents import synthetic
        >>> made = synthetic(reader, np.random.default_rng(0), (1,), count=3, words=10)[0]
        >>> int(overlap(made).argmax())
        1
    """
    wanted = {asked.prompt.ids[p] for p in asked.prompt.positions("question")}
    texts = [{asked.prompt.ids[p] for p in asked.document(i)} for i in range(asked.count)]
    # Tokens of all documents tell none of them from another.
    wanted -= set.intersection(*texts) if len(texts) > 1 else set()
    return np.array([len(wanted & text) / max(1, len(wanted)) for text in texts])


def measure(model: Model, asked: Sequence[Documents], batch_size: SupportsIndex = 4) -> Result:
    """Attention of the rows after the documents to every slot.

    Example:
        >>> import interp
        >>> from interp.organisms import reader
        >>> from interp.prompts.documents import synthetic
        >>> made = synthetic(reader, np.random.default_rng(0), range(3), count=3, words=9)
        >>> measure(interp.open_model("reader"), made)["mass"].dims
        ('prompt', 'layer', 'slot')

    Args:
        asked: equally many documents each; let the gold document stand in every slot equally often.

    Returns:
        [prompt, layer, slot]: `mass`, the attention to a slot, and `per_token`, divided by its
        length; means over heads and rows, NaN where a window hides the slot. [prompt]: `gold`.

    Source: arXiv:2508.05128; only the rows of the question are looked at, never the whole map.
    """
    given = list(asked)
    if not given or len({one.count for one in given}) > 1:
        raise PromptError("a profile needs prompts with equally many documents, at least one.")
    count, kept = given[0].count, []
    for first in range(0, len(given), int(batch_size)):
        part = given[first : first + int(batch_size)]

        def rows(number: int, layer: int, part: Sequence[Documents] = part) -> RowMass:
            one = part[number]
            return RowMass({f"document_{i}": one.document(i) for i in range(count)}, one.after())

        run = model.run([one.prompt for one in part], logits="none", batch_size=int(batch_size),
                        stats=[PerLayer("segments", rows)])
        for number, one in enumerate(part):
            found = run.stats["segments"].isel(prompt=number).values[:, :, : len(one.after())]
            known = np.isfinite(found)
            kept.append(np.where(known.any((1, 2)), np.where(known, found, 0.0).sum((1, 2))
                                 / np.maximum(known.sum((1, 2)), 1), np.nan))
    mass = np.stack(kept).astype(float)
    sizes = np.array([[len(one.document(i)) for i in range(count)] for one in given])
    dims = ("prompt", "layer", "slot")
    data = xr.Dataset({"mass": (dims, mass), "per_token": (dims, mass / sizes[:, None]),
                       "gold": ("prompt", [one.place for one in given])},
                      {"layer": np.arange(model.n_layers), "slot": np.arange(count)})
    return Result(data, {**model.manifest(), "measure": "attention basin", "count": count,
                         "prompts": [one.prompt.digest() for one in given]})


def without_gold(found: Result) -> xr.DataArray:
    """Attention per token with the gold document's slot left out (NaN): position, not content."""
    return found["per_token"].where(found["per_token"]["slot"] != found["gold"])


def shallowest(
    found: Result, level: SupportsFloat = 0.05, permutations: SupportsIndex = 300
) -> tuple[Any, Float[np.ndarray, "layer"]]:
    """The first layer with a basin that permuted slots do not have (None), and all p values.

    The level is divided by the number of layers.
    """
    values = found["per_token"].values
    p = np.ones(values.shape[1])
    for layer in range(values.shape[1]):
        one = values[:, layer]
        if np.isfinite(one).all():
            null = permuted(one, permutations)
            p[layer] = (1 + (null >= float(basin_index(one.mean(0)))).sum()) / (1 + len(null))
    hits = np.flatnonzero(p * len(p) <= float(level))
    return (int(hits[0]) if len(hits) else None), p


def draw(found: Result, ax: Axes, layers: Sequence[int] = ()) -> Axes:
    """Attention per token by slot, one curve per layer, with a band over prompts."""
    chosen = list(layers) or [int(x) for x in found["layer"].values]
    curves = {f"layer {layer}": 100 * found["per_token"].sel(layer=layer, drop=True)
              for layer in chosen}
    return layer_curve.draw(ax, curves, along="slot", label="attention per token (%)")
