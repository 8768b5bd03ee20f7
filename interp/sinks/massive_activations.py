"""Massive activations: the few residual coordinates that dwarf all others.

Paper     arXiv:2402.17762
Question  Which (position, dimension) entries are orders of magnitude above the rest, and where?
Measure   |h| > 100 and at least 1000 times the median |h| of the same layer's residual
Cause     set them to zero (the loss must explode) or to their mean (it must not move)
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Optional, SupportsFloat, SupportsIndex

import numpy as np
import pandas as pd
import torch
import xarray as xr
from jaxtyping import Float
from matplotlib.axes import Axes
from torch import Tensor

from interp.core import Prompt, Result, edit
from interp.core.errors import NumericalError, OutOfRange, PromptError
from interp.core.intervention import Intervention
from interp.figures import layer_curve
from interp.figures.style import color
from interp.models.model import Model
from interp.stream.reducers import Received

LARGE = 10**9
"""Parameters from which on the paper's absolute threshold of 100 is used; below, only the ratio."""

ROOM = 2**30
"""Bytes of residuals that `measure` holds at a time."""


@dataclass(frozen=True, order=True)
class MassiveActivation:
    """One massive coordinate: its layer, position, dimension and signed value.

    Example:
        >>> MassiveActivation(2, 0, 1415, -458.6)
        MassiveActivation(layer=2, position=0, dim=1415, value=-458.6)
    """

    layer: int
    position: int
    dim: int
    value: float


def detect(
    residual: Float[Tensor | np.ndarray, "layer position d_model"],
    min_value: SupportsFloat = 100.0,
    min_ratio: SupportsFloat = 1000.0,
) -> list[MassiveActivation]:
    """Every coordinate with |h| > min_value and |h| >= min_ratio times its layer's median |h|.

    Example:
        >>> residual = torch.full((2, 3, 5), 0.1)
        >>> residual[1, 0, 4] = -150.0
        >>> detect(residual)
        [MassiveActivation(layer=1, position=0, dim=4, value=-150.0)]

    Args:
        residual: output of each block before any norm; layer i is block i. The last entry of
            transformers' `hidden_states` is after the final norm: do not pass it.
        min_value: absolute size; set 0 for models under about 1e9 parameters, and say so.
        min_ratio: multiple of the median over all positions and dimensions of the layer.

    Returns:
        Massive activations in order of layer, position, dimension.

    Raises:
        NumericalError: NaN or infinity in the residual (float16 overflows at 65504).

    Source: arXiv:2402.17762, section 2.
    """
    size = _size(residual)
    median = _median(size)[:, None, None]
    found = (size > float(min_value)) & (size >= float(min_ratio) * median)
    values = torch.as_tensor(residual)
    return [
        MassiveActivation(layer, position, dim, float(values[layer, position, dim]))
        for layer, position, dim in found.nonzero().tolist()
    ]


def ratio(residual: Float[Tensor | np.ndarray, "layer position d_model"]) -> Float[Tensor, "layer"]:
    """Largest over median magnitude in each layer: r_l, a number without thresholds.

    Example:
        >>> residual = torch.ones(1, 3, 5)
        >>> residual[0, 0, 4] = -80.0
        >>> ratio(residual)
        tensor([80.])

    Infinite where the median is zero.
    """
    size = _size(residual)
    return size.amax((-2, -1)) / _median(size)


def magnitudes(
    residual: Float[Tensor | np.ndarray, "layer position d_model"], top: int = 3
) -> tuple[Float[Tensor, "layer rank"], Float[Tensor, "layer"]]:
    """The `top` largest magnitudes and the median of every layer: the paper's layer profile.

    Example:
        >>> largest, median = magnitudes(torch.arange(6.0).reshape(1, 2, 3), top=2)
        >>> largest, median
        (tensor([[5., 4.]]), tensor([2.5000]))

    Source: arXiv:2402.17762, layer profile (mean over sequences of these numbers).
    """
    size = _size(residual)
    if not 1 <= top <= size[0].numel():
        raise OutOfRange(f"top must lie between 1 and {size[0].numel()}, not {top}.")
    return size.flatten(1).topk(top).values, _median(size)


def stable_dims(
    found: Sequence[Sequence[MassiveActivation]], min_share: SupportsFloat = 0.9
) -> tuple[int, ...]:
    """Dimensions that are massive in at least `min_share` of the inputs, most frequent first.

    Example:
        >>> one, other = MassiveActivation(2, 0, 7, 300.0), MassiveActivation(2, 4, 9, 200.0)
        >>> stable_dims([[one], [one, other]])
        (7,)

    Args:
        found: what `detect` returned for each input.

    Raises:
        ValueError: no input was given.
    """
    if not found:
        raise ValueError("no inputs: give the activations detected in at least one input.")
    seen = Counter(dim for one in found for dim in {item.dim for item in one})
    need = float(min_share) * len(found)
    stable = [(dim, n) for dim, n in seen.items() if n >= need]
    return tuple(dim for dim, _ in sorted(stable, key=lambda pair: (-pair[1], pair[0])))


def measure(
    model: Model, prompts: Sequence[Prompt], *, min_value: Optional[SupportsFloat] = None,
    min_ratio: SupportsFloat = 1000.0, top: SupportsIndex = 3,
) -> Result:
    """Find the massive activations of every prompt, with the layer profile of magnitudes.

    Example:
        >>> import interp
        >>> found = measure(interp.open_model("backcopy-1l"), [Prompt.from_tokens([5, 9, 8, 7])])
        >>> found["top"].dims, len(activations(found))
        (('prompt', 'layer', 'rank'), 0)

    Args:
        prompts: any lengths; residuals are read a few layers at a time.
        min_value, min_ratio: as in `detect`; `min_value` None is 100 for models of 1e9 parameters
            and more and 0 below, since small models have small residuals.
        top: how many magnitudes of each layer are kept.

    Returns:
        `top` [prompt, layer, rank] and `median` [prompt, layer] of |h| leaving each block (the
        last one before the final norm); `peak` [prompt, layer, position], the largest |h| of each
        position; `received` [prompt, layer, position], the mean attention that it receives from
        the queries from it on, heads averaged; [activation], see `activations`.

    Raises:
        PromptError: no prompts. NumericalError: NaN or infinity in a residual.

    Source: arXiv:2402.17762.
    """
    if not prompts:
        raise PromptError("no prompts to measure: give at least one.")
    if min_value is None:
        size = sum(weight.numel() for weight in model.hf.parameters())
        min_value = 100.0 if size >= LARGE else 0.0
    ranks, longest = int(top), max(map(len, prompts))
    shape = (len(prompts), model.n_layers)
    tops, medians = np.full((*shape, ranks), np.nan), np.full(shape, np.nan)
    peak, received = (np.full((*shape, longest), np.nan, dtype=np.float32) for _ in range(2))
    rows: list[dict[str, Any]] = []
    for number, prompt in enumerate(prompts):
        n = len(prompt)
        step = max(1, ROOM // (8 * n * model.d_model))
        for first in range(0, model.n_layers, step):
            layers = list(range(first, min(first + step, model.n_layers)))
            site = f"resid_post.{','.join(map(str, layers))}"
            stats = [] if first else [Received()]
            run = model.run(prompt, read=site, stats=stats, logits="none")
            residual = run.reads[site].values[0]
            largest, median = magnitudes(residual, ranks)
            tops[number, layers], medians[number, layers] = largest.numpy(), median.numpy()
            peak[number, layers, :n] = np.abs(residual).max(-1)
            for one in detect(residual, min_value, min_ratio):
                rows.append({"prompt": number, "layer": layers[one.layer],
                             "position": one.position, "dim": one.dim, "value": one.value})
            if stats:
                mean = run.stats["received"].isel(prompt=0).mean("head")
                received[number, mean.layer.values, :n] = mean.values
    data = xr.Dataset(
        {"top": (("prompt", "layer", "rank"), tops), "median": (("prompt", "layer"), medians),
         "peak": (("prompt", "layer", "position"), peak),
         "received": (("prompt", "layer", "position"), received),
         "length": ("prompt", [len(prompt) for prompt in prompts])},
        {"layer": np.arange(model.n_layers)},
    )
    for name, kind in COLUMNS.items():
        data[f"activation_{name}"] = ("activation", np.array([r[name] for r in rows], dtype=kind))
    return Result(data, {**model.manifest(), "measure": "massive_activations",
                         "min_value": float(min_value), "min_ratio": float(min_ratio),
                         "n_prompts": len(prompts)})


COLUMNS = {"prompt": int, "layer": int, "position": int, "dim": int, "value": float}


def activations(found: Result) -> pd.DataFrame:
    """What `measure` found as a table, a row per massive activation: prompt, layer, position,
    dim, value."""
    return pd.DataFrame({name: found[f"activation_{name}"].values for name in COLUMNS})


def intervene(
    model: Model, prompts: Sequence[Prompt], found: Result, *,
    layer: Optional[SupportsIndex] = None, n_seeds: SupportsIndex = 5, seed: SupportsIndex = 0,
) -> Result:
    """Set the massive activations of one layer to zero, or to their mean, and see what it costs.

    Example: `tests/sinks/test_massive_measure.py`, on a model with planted coordinates.

    Args:
        prompts, found: the prompts, and what `measure` returned for them. Prompts without a massive
            activation in this layer are left out.
        layer: whose output is edited; None takes the first in which most prompts have any.
        n_seeds: controls: as many coordinates of median size, at random places, set to zero.

    Returns:
        [edit, prompt] with edits "none", "zero", "mean", "median 0", ...: `loss` (mean next-token
        cross-entropy in nats) and `kl` (mean over positions of KL(untouched, edited) of the next
        token, in nats). "mean" sets each to the mean of its dimension over prompts, first token
        and later tokens apart.

    Raises:
        ValueError: no massive activations to set, or a model that predicts no tokens.

    Source: arXiv:2402.17762, interventions at the output of one block.
    """
    table: Any = activations(found)
    if table.empty:
        raise ValueError("no massive activations were found; there is nothing to set.")
    if layer is None:
        per_layer = table.groupby("layer")["prompt"].nunique()
        layer = int(per_layer.index[per_layer.to_numpy() > per_layer.max() / 2][0])
    layer = int(layer)
    table = table[table["layer"] == layer]
    if table.empty:
        raise ValueError(f"there is no massive activation in layer {layer}.")
    site, rng = f"resid_post.{layer}", np.random.default_rng(int(seed))
    means = table.groupby(["dim", table["position"] == 0])["value"].mean()
    names = ["none", "zero", "mean", *(f"median {i}" for i in range(int(n_seeds)))]
    numbers = sorted(map(int, table["prompt"].unique()))
    arrays = {name: np.full((len(names), len(numbers)), np.nan) for name in ("loss", "kl")}
    for column, number in enumerate(numbers):
        prompt, here = prompts[number], table[table["prompt"] == number]
        run = model.run(prompt, read=site)
        if not run.logits:
            raise ValueError(f"{model.name} predicts no tokens, so an edit has no loss.")
        untouched = run.logits[0].log_softmax(-1)
        size = np.abs(run.reads[site].values[0, 0])
        massive = [(int(p), int(d)) for p, d in zip(here["position"], here["dim"])]
        for row, name in enumerate(names):
            values = [0.0] * len(massive)
            places = massive
            if name == "mean":
                values = [float(means[d, p == 0]) for p, d in massive]
            elif name.startswith("median"):
                places = _of_median_size(size, massive, rng)
            write = [] if name == "none" else _set(site, places, values)
            logits = untouched if not write else (
                model.run(prompt, write=write).logits[0].log_softmax(-1))
            targets = torch.tensor(prompt.ids[1:])
            arrays["loss"][row, column] = float(-logits[:-1].gather(-1, targets[:, None]).mean())
            kl = (untouched.exp() * (untouched - logits)).nan_to_num(0.0).sum(-1)
            arrays["kl"][row, column] = float(kl.mean().clamp_min(0.0))
    data = xr.Dataset({name: (("edit", "prompt"), a) for name, a in arrays.items()},
                      {"edit": names, "prompt": numbers})
    return Result(data, {**model.manifest(), "intervention": "massive activations", "layer": layer,
                         "seed": int(seed), "n_seeds": int(n_seeds)})


def draw(found: Result, ax: Axes) -> Axes:
    """Draw the layer profile: the largest magnitudes and the median, on a logarithmic axis."""
    ranks = {f"top {rank + 1}": found["top"].isel(rank=rank) for rank in range(
        found.data.sizes["rank"])}
    layer_curve.draw(
        ax, {**ranks, "median": found["median"]}, label="|activation| leaving the block", log=True,
        roles={**dict.fromkeys(ranks, "primary"), "median": "control"},
    )
    for line, mark in zip(ax.lines[: len(ranks)], ("v", "x", "+")):
        line.set_marker(mark if line.get_marker() == "o" else "")  # as dashes vanish behind dots
    low, high = ax.get_ylim()
    ax.set_ylim(low, high * (high / low) ** 0.25)  # room for the legend
    ax.legend(ncols=2, loc="upper right")
    if found.manifest["min_value"] > 0:
        ax.axhline(found.manifest["min_value"], color=color("control"), linewidth=0.8,
                   linestyle=":")
    return ax


def _set(
    site: str, places: Sequence[tuple[int, int]], values: Sequence[float]
) -> list[Intervention]:
    """One edit per coordinate: positions with other dimensions must not change."""
    return [edit(site, "replace", value, positions=[position], dims=[dim])
            for (position, dim), value in zip(places, values)]


def _of_median_size(
    size: np.ndarray, massive: Sequence[tuple[int, int]], rng: np.random.Generator
) -> list[tuple[int, int]]:
    """As many coordinates, drawn among those closest to the median size."""
    flat = size.ravel()
    count = min(len(flat), max(1000, 10 * len(massive)))
    near = np.argpartition(np.abs(flat - np.median(flat)), count - 1)[:count]
    taken = {position * size.shape[1] + dim for position, dim in massive}
    near = np.array([place for place in near if int(place) not in taken])
    chosen = rng.choice(near, min(len(massive), len(near)), replace=False)
    return [(int(place) // size.shape[1], int(place) % size.shape[1]) for place in chosen]


def _size(residual: Tensor | np.ndarray) -> Tensor:
    values = torch.as_tensor(residual)
    values = values.to(torch.promote_types(values.dtype, torch.float32))
    finite = torch.isfinite(values)
    if not finite.all():
        layer, position, _ = (~finite).nonzero()[0].tolist()
        raise NumericalError(
            f"residual is NaN or infinite at layer {layer}, position {position}; run the model in "
            "bfloat16 or float32."
        )
    return values.abs()


def _median(size: Tensor) -> Tensor:
    # torch.median returns the lower of two middle values; quantile is limited to 2**24 entries.
    ordered = size.flatten(1).sort(-1).values
    n = ordered.shape[-1]
    return (ordered[:, (n - 1) // 2] + ordered[:, n // 2]) / 2
