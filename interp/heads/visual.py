"""Visual heads: heads that put much attention on the image, and on few of its tokens.

Paper     arXiv:2412.18108
Question  Which heads read the image for the answer, and how selectively?
Measure   weight W (attention on the image), concentration C (one minus the relative entropy over the
          image's tokens), S = W C, in the row that predicts the first answer token; with sinks and
          without, and for the region that is asked for
Cause     ablate the top heads, and as many random heads of the same layers
"""

import math
from collections.abc import Mapping, Sequence
from typing import Literal, Optional, SupportsIndex

import numpy as np
import torch
import xarray as xr
from jaxtyping import Bool, Float
from matplotlib.axes import Axes
from torch import Tensor

from interp.causal.redistribute import Keys, key_mask
from interp.core import Prompt, Result
from interp.core.errors import NumericalError, PromptError
from interp.core.scores import HeadScores
from interp.figures import head_grid
from interp.figures.style import color
from interp.models.model import Model
from interp.stream.per_layer import PerLayer
from interp.stream.reducers import Received

Normalize = Literal["logN", "none"]
Row = Literal["predicting", "own"]
Sinks = Mapping[int, Sequence[SupportsIndex]]
"""Sink positions by layer, as `interp.sinks.visual.sinks_by_layer` returns them."""

REGION = ("region_weight", "region_share", "topk_region_density", "region_topk_value",
          "region_topk_ratio")
"""What `region` returns."""

STAGES = {32: (10, 20), 40: (13, 27)}
"""Depth -> first middle and first late layer, as the released code divides 7B and 13B models."""


def weight(
    attention: Float[Tensor | np.ndarray, "*batch key"], image: Keys, sinks: Keys = ()
) -> Float[Tensor, "*batch"]:
    """W: the attention of each row on the image, without the sinks that are given.

    Example:
        >>> rows = torch.tensor([[0.5, 0.25, 0.25], [0.0, 0.75, 0.25]])
        >>> weight(rows, slice(1, 3)), weight(rows, slice(1, 3), sinks=[1])
        (tensor([0.5000, 1.0000]), tensor([0.2500, 0.2500]))

    Raises:
        OutOfRange: a position that does not exist.
        NumericalError: NaN in the attention.

    Source: arXiv:2412.18108; released code `heatmap.py` (`imatt_sum`).
    """
    rows = _checked(attention)
    return rows[..., _content(image, sinks, rows.shape[-1])].sum(-1)


def concentration(
    attention: Float[Tensor | np.ndarray, "*batch key"],
    image: Keys,
    normalize: Normalize = "logN",
    sinks: Keys = (),
) -> Float[Tensor, "*batch"]:
    """C: how unevenly each row spreads its attention over the image: 0 evenly, 1 on one token.

    Example:
        >>> rows = torch.tensor([[0.0, 0.5, 0.0], [0.2, 0.4, 0.4]])
        >>> concentration(rows, slice(1, 3))
        tensor([1., 0.])

    Args:
        normalize: "logN": 1 - H(q) / log n over the n image tokens, comparable between images of
            any size; "none": log n - H(q), in nats.
        sinks: positions left out of the image, so that q and n are those of the rest: a head that
            rests on one visual sink is concentrated, too.

    Returns:
        NaN where nothing is on the image; 1 (or 0 nats) for an image of one token.

    Source: arXiv:2412.18108; that the entropy is divided by log n is this toolkit's reading.
    """
    if normalize not in ("logN", "none"):
        raise ValueError(f"normalize must be 'logN' or 'none', not {normalize!r}.")
    rows = _checked(attention)
    on_image = rows[..., _content(image, sinks, rows.shape[-1])]
    count, total = on_image.shape[-1], on_image.sum(-1, keepdim=True)
    share = on_image / total
    entropy = -torch.xlogy(share, share).sum(-1)
    if normalize == "none":
        return (math.log(count) - entropy).clamp_min(0) if count else entropy * torch.nan
    if count <= 1:
        return share.sum(-1) if count else entropy * torch.nan
    return (1 - entropy / math.log(count)).clamp(0, 1)


def score(
    attention: Float[Tensor | np.ndarray, "layer head key"],
    image: Keys,
    sinks: Optional[Sinks] = None,
    normalize: Normalize = "logN",
) -> Float[Tensor, "layer head"]:
    """S = W C of every head in one row of attention.

    Example:
        >>> rows = torch.tensor([[[0.2, 0.8, 0.0], [0.2, 0.4, 0.4], [1.0, 0.0, 0.0]]])
        >>> score(rows, slice(1, 3))
        tensor([[0.8000, 0.0000, 0.0000]])
        >>> score(rows, slice(1, 3), sinks={0: [1]})
        tensor([[0.0000, 0.4000, 0.0000]])

    Args:
        attention: the row of each head that is looked at: the one that predicts the answer.
        image: the image's positions. sinks: positions by layer, left out of weight and
            concentration.

    A head with nothing on the image scores 0.

    Source: arXiv:2412.18108 combines the two in a way that is not published; the product is this
    toolkit's.
    """
    rows = torch.as_tensor(attention)
    by_layer = sinks or {}
    found = []
    for layer, one in enumerate(rows):
        here = by_layer.get(layer, ())
        found.append(weight(one, image, here)
                     * concentration(one, image, normalize, here).nan_to_num(0.0))
    return torch.stack(found)


def region(
    attention: Float[Tensor | np.ndarray, "*batch key"],
    image: Keys,
    inside: Keys,
    top: int = 10,
) -> dict[str, Float[Tensor, "*batch"]]:
    """How much of a row's attention on the image falls on the region that is asked for.

    Example:
        >>> row = torch.tensor([0.2, 0.5, 0.2, 0.1])
        >>> {k: round(float(v), 3) for k, v in region(row, slice(1, 4), [1], top=2).items()}
        {'region_weight': 0.5, 'region_share': 0.625, 'topk_region_density': 0.5, \
'region_topk_value': 0.5, 'region_topk_ratio': 0.714}

    Args:
        inside: positions of the region, all of them in the image.
        top: number of the image tokens with most attention that the "topk" versions look at.

    Returns:
        `region_weight`: W of the region; `region_share`: that over W (NaN if nothing is on the
        image); `topk_region_density`: share of the top tokens that lie inside;
        `region_topk_value`: attention on these; `region_topk_ratio`: that over the attention on
        all top tokens.

    Source: arXiv:2412.18108; names as in the released code, formulas as read from the names.
    """
    rows = _checked(attention)
    on_image, here = key_mask(image, rows.shape[-1]), key_mask(inside, rows.shape[-1])
    if bool((here & ~on_image).any()) or not bool(here.any()):
        raise PromptError("the region must be one or more positions of the image.")
    among, own = rows[..., on_image], here[on_image]
    total, mine = among.sum(-1), among[..., own].sum(-1)
    value, index = among.topk(min(top, among.shape[-1]), -1)
    hit = own.to(index.device)[index]
    landed = (value * hit).sum(-1)
    return dict(zip(REGION, (
        mine, mine / total, hit.to(rows.dtype).mean(-1), landed, landed / value.sum(-1))))


def measure(
    model: Model,
    prompts: Sequence[Prompt],
    *,
    row: Row = "predicting",
    regions: Optional[Sequence[Sequence[SupportsIndex]]] = None,
    sinks: Optional[Sequence[Sinks]] = None,
    normalize: Normalize = "logN",
    top: int = 10,
    permutations: int = 10,
    seed: int = 0,
    batch_size: int = 8,
) -> Result:
    """Weight, concentration and score of every head at the first answer token, per prompt.

    Example:
        >>> import interp
        >>> model = interp.open_model("backcopy-1l")
        >>> prompt = Prompt.from_tokens(range(9), {"image": (2, 6)})
        >>> found = measure(model, [prompt])
        >>> found["samples"].dims, bool((found["weight"] <= 1).all())
        (('sample', 'layer', 'head'), True)

    Args:
        prompts: each with a segment of kind "image" and text behind it.
        row: "predicting": the query that predicts the first answer token, the last of the prompt.
            "own": the query that is the first answer token (it is generated), the row that the
            released code reads.
        regions: for every prompt the positions of what is asked for (see `Segment.inside`).
        sinks: for every prompt its sinks by layer; adds the versions without them.
        top: for the "topk" versions of `region`.
        permutations: random choices of as many visible keys, for the chance level.

    Returns:
        Per sample: `weight`, `concentration`, `samples` (the score); with sinks `sink_share` (of
        the image's attention), `weight_nonsink`, `concentration_nonsink`, `samples_nonsink`; with
        regions those of `REGION`. Per head: `score` (mean), `standard_error`, `null` (the score
        that random keys in the image's place would get), `frequency` (share of samples above
        their chance level), `eligible` (False where a sliding window hides a part of an image).

    Raises:
        PromptError: a prompt without an image, or lists of another length.

    Streamed: one row of attention per layer is kept.
    """
    if row not in ("predicting", "own"):
        raise ValueError(f"row must be 'predicting' or 'own', not {row!r}.")
    images = [_image(prompt, number) for number, prompt in enumerate(prompts)]
    for name, given in (("regions", regions), ("sinks", sinks)):
        if given is not None and len(given) != len(prompts):
            raise PromptError(f"{len(prompts)} prompts but {len(given)} {name}; give one each.")
    rng = np.random.default_rng(seed)
    samples: dict[str, list[np.ndarray]] = {}
    nulls, seen, layers = [], [], np.arange(model.n_layers)
    for first in range(0, len(prompts), batch_size):
        some = prompts[first : first + batch_size]
        rows = [len(prompt) - (row == "predicting") for prompt in some]
        received = model.run(
            some, new_tokens=int(row == "own"), batch_size=batch_size, logits="none",
            stats=[PerLayer("received", lambda n, _, rows=rows: Received(subset=[rows[n]]))],
        ).stats["received"]
        layers = received["layer"].values
        for number, prompt in enumerate(some, first):
            values = received.values[number - first][..., : len(prompt)]
            image = images[number]
            seen.append(np.isfinite(values[..., image]).all(-1))
            attention = torch.from_numpy(np.nan_to_num(values).astype(np.float64))
            here = {int(i): sinks[number].get(int(layer), ()) for i, layer in enumerate(layers)} \
                if sinks is not None else None
            inside = None if regions is None else list(regions[number])
            for key, value in _one(attention, image, here, inside, normalize, top).items():
                samples.setdefault(key, []).append(value.numpy())
            visible = np.flatnonzero(np.isfinite(values).any((0, 1)))
            nulls.append(np.mean([
                score(attention, rng.choice(visible, min(len(image), len(visible)), replace=False),
                      normalize=normalize).numpy() for _ in range(permutations)
            ] or [np.full(attention.shape[:2], np.nan)], 0))
    return _result(model, samples, np.stack(nulls), np.asarray(np.stack(seen).all(0)), layers, {
        "row": row, "normalize": normalize, "top": top, "permutations": permutations, "seed": seed})


def _one(
    attention: Tensor, image: list[int], sinks: Optional[Sinks],
    inside: Optional[Sequence[SupportsIndex]], normalize: Normalize, top: int,
) -> dict[str, Tensor]:
    """Every quantity of one prompt, [layer, head]."""
    found = {
        "weight": weight(attention, image),
        "concentration": concentration(attention, image, normalize),
        "samples": score(attention, image, normalize=normalize),
    }
    if sinks is not None:
        spread = [(weight(one, image, sinks[i]), concentration(one, image, normalize, sinks[i]))
                  for i, one in enumerate(attention)]
        found["weight_nonsink"] = torch.stack([w for w, _ in spread])
        found["concentration_nonsink"] = torch.stack([c for _, c in spread])
        found["samples_nonsink"] = score(attention, image, sinks, normalize)
        found["sink_share"] = 1 - found["weight_nonsink"] / found["weight"]
    if inside is not None:
        found.update(region(attention, image, inside, top))
    return found


def _result(
    model: Model, samples: Mapping[str, list[np.ndarray]], null: np.ndarray, eligible: np.ndarray,
    layers: np.ndarray, settings: dict[str, object],
) -> Result:
    dims = ("sample", "layer", "head")
    data = xr.Dataset(
        {name: (dims, np.stack(values)) for name, values in samples.items()},
        {"layer": layers, "head": np.arange(eligible.shape[1])})
    data["null_samples"] = (dims, null)
    n = data.sizes["sample"]
    data["score"] = data["samples"].mean("sample")
    data["standard_error"] = data["samples"].std("sample", ddof=1) / np.sqrt(n) if n > 1 \
        else data["score"] * np.nan
    data["frequency"] = (data["samples"] > data["null_samples"]).mean("sample")
    data["null"] = data["null_samples"].mean("sample")
    data["eligible"] = (("layer", "head"), eligible)
    return Result(data, {**model.manifest(), "measure": "visual_heads", "samples": n, **settings})


def head_scores(found: Result, by: str = "samples") -> HeadScores:
    """Any per-sample quantity of `measure`, averaged, as scores to rank heads by.

    Example:
        >>> values = np.array([[[0.0, 0.5]], [[0.0, 1.0]]])
        >>> data = xr.Dataset({"samples": (("sample", "layer", "head"), values)})
        >>> head_scores(Result(data)).top(1)
        [L0H1]
    """
    eligible = found.data.get("eligible")
    mean = found[by].mean("sample")
    count = found[by].notnull().sum("sample")
    frequency = (found[by] > 0).mean("sample")
    error = found[by].std("sample", ddof=1) / np.sqrt(count) if found.data.sizes["sample"] > 1 \
        else mean * np.nan
    scores = HeadScores.of(mean.values, frequency=frequency.values, standard_error=error.values,
                           eligible=None if eligible is None else eligible.values.astype(bool))
    if "layer" not in found.data.coords:
        return scores
    named = {"layer": found.data["layer"].values}
    return HeadScores(scores.scores.assign_coords(named), *(
        None if one is None else one.assign_coords(named)
        for one in (scores.frequency, scores.standard_error, scores.eligible)))


def stages(n_layers: int) -> tuple[range, range, range]:
    """Early, middle and late layers: the released code's for 32 and 40 layers, else thirds.

    Example:
        >>> stages(32)
        (range(0, 10), range(10, 20), range(20, 32))
        >>> stages(6)
        (range(0, 2), range(2, 4), range(4, 6))

    Source: arXiv:2412.18108, released code `att_utils.get_range`.
    """
    first, second = STAGES.get(n_layers, (round(n_layers / 3), round(2 * n_layers / 3)))
    return range(first), range(first, second), range(second, n_layers)


def center_of_mass(
    scores: Float[Tensor | np.ndarray, "layer head"],
    eligible: Optional[Bool[Tensor | np.ndarray, "layer head"]] = None,
) -> float:
    """Relative depth, 0 first to 1 last layer, around which the scores lie; 0.5 if evenly.

    Example:
        >>> center_of_mass(np.array([[0.0, 3.0], [0.0, 0.0], [0.0, 1.0]]))
        0.25

    NaN where all scores are 0, or for a single layer.
    """
    values = torch.as_tensor(scores).double().nan_to_num(0.0)
    open_to = torch.ones_like(values) if eligible is None else torch.as_tensor(eligible).double()
    # The mean score of a layer: layers with fewer eligible heads weigh no less.
    by_layer = (values * open_to).sum(1) / open_to.sum(1)
    depth = torch.linspace(0, 1, len(values), dtype=torch.float64)
    there = torch.isfinite(by_layer)
    if len(values) < 2 or not float(by_layer[there].sum()) > 0:
        return float("nan")
    return float((by_layer * depth)[there].sum() / by_layer[there].sum())


def draw(found: Result, ax: Axes, by: str = "samples") -> Axes:
    """Head map of the mean score, min-max normalized over the model, as in the paper's figure."""
    scores = head_scores(found, by)
    values = scores.scores if scores.eligible is None else scores.scores.where(scores.eligible)
    low, high = float(values.min()), float(values.max())
    span = high - low if high > low else 1.0
    return head_grid.draw(ax, (values - low) / span, label="W × C, 0 lowest to 1 highest",
                          eligible=scores.eligible, hatched="cannot see the whole image")


def draw_plane(found: Result, ax: Axes, suffix: str = "", mark: int = 5) -> Axes:
    """Weight against concentration, one point per head, the top heads by name.

    `suffix` is "" or "_nonsink".
    """
    x, y = found[f"weight{suffix}"].mean("sample"), found[f"concentration{suffix}"].mean("sample")
    depth = np.broadcast_to(found["layer"].values[:, None], x.shape)
    dots = ax.scatter(x.values.ravel(), y.values.ravel(), c=depth.ravel(), s=14, linewidths=0)
    ax.figure.colorbar(dots, ax=ax, label="layer", pad=0.02)
    places = {str(head): (float(x.sel(layer=head.layer, head=head.head)),
                          float(y.sel(layer=head.layer, head=head.head)))
              for head in head_scores(found, f"samples{suffix}").top(mark)}
    # In a column beside the dots, from the highest down: labels of near heads stay apart.
    step = min(0.1, 0.92 / max(1, len(places)))
    for i, (name, place) in enumerate(sorted(places.items(), key=lambda item: -item[1][1])):
        ax.annotate(name, place, fontsize=6, xytext=(1.14, 0.96 - step * i), va="center",
                    textcoords=("data", "axes fraction"), color=color("visual"),
                    arrowprops={"arrowstyle": "-", "color": color("visual"), "linewidth": 0.4})
    ax.set_xlim(-0.06, 1.4)
    ax.set_xticks(np.linspace(0, 1, 6))
    ax.set_xlabel("attention on the image, W")
    ax.set_ylabel("concentration, C")
    return ax


def _content(image: Keys, sinks: Keys, n_keys: int) -> Bool[Tensor, "key"]:
    mask = key_mask(image, n_keys)
    bare = not isinstance(sinks, slice) and len(sinks) == 0
    return mask if bare else mask & ~key_mask(sinks, n_keys)


def _image(prompt: Prompt, number: int) -> list[int]:
    places = sorted({p for s in prompt.of_kind("image") for p in s.positions})
    if not places or places[-1] + 1 >= len(prompt):
        raise PromptError(
            f"prompt {number} has no image with text behind it: make it with "
            "model.prompt(..., images=[...]).")
    return places


def _checked(attention: Tensor | np.ndarray) -> Tensor:
    rows = torch.as_tensor(attention)
    rows = rows.to(torch.promote_types(rows.dtype, torch.float32))
    if not torch.isfinite(rows).all():
        raise NumericalError("attention contains NaN or infinity; recompute it in float32.")
    return rows
