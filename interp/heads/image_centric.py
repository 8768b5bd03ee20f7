"""Image-centric heads: heads whose attention to the image lands on content, not on visual sinks.

Paper     arXiv:2503.03321
Question  Which heads, for which query, look at the image's content?
Measure   r, the non-sink share of the attention on the image, among heads with enough of it
Cause     redistribute the sinks' attention in these heads only (`interp.causal.redistribute`)
"""

from collections.abc import Mapping, Sequence
from typing import Optional, SupportsFloat

import numpy as np
import torch
import xarray as xr
from jaxtyping import Bool, Float
from matplotlib.axes import Axes
from torch import Tensor

from interp.causal.redistribute import Convention, Keys, key_mask
from interp.core import Head, HeadScores, Intervention, Prompt, Result, ablate
from interp.core.errors import NumericalError, PromptError
from interp.figures import heat
from interp.models.model import Model
from interp.stream.per_layer import PerLayer
from interp.stream.reducers import SegmentMass
from interp.stream.rows import image_centric_rows

CODE_EPSILON = 1e-6
"""Added to every visual token's attention in the denominator of the released code."""


def image_mass(
    attention: Float[Tensor | np.ndarray, "*batch head query key"], image: Keys
) -> Float[Tensor, "*batch head query"]:
    """Attention that every query of every head puts on the image.

    Example:
        >>> image_mass(torch.tensor([[[0.5, 0.25, 0.25]]]), slice(1, 3))
        tensor([[0.5000]])
    """
    weights = _checked(attention)
    return (weights * key_mask(image, weights.shape[-1]).to(weights.device)).sum(-1)


def nonsink_share(
    attention: Float[Tensor | np.ndarray, "*batch head query key"], image: Keys, sinks: Keys
) -> Float[Tensor, "*batch head query"]:
    """r: the share of the attention on the image that is not on visual sinks.

    Example:
        >>> nonsink_share(torch.tensor([[[0.5, 0.375, 0.125]]]), slice(1, 3), [0, 1])
        tensor([[0.2500]])

    Zero where nothing is on the image. One minus the sinks' share elsewhere.

    Source: arXiv:2503.03321, visual non-sink ratio r_i^{l,h}.
    """
    weights = _checked(attention)
    n_keys = weights.shape[-1]
    visual = key_mask(image, n_keys)
    content = (visual & ~key_mask(sinks, n_keys)).to(weights.device)
    total = (weights * visual.to(weights.device)).sum(-1)
    return (weights * content).sum(-1) / torch.where(total > 0, total, torch.ones_like(total))


def select(
    attention: Float[Tensor | np.ndarray, "*batch head query key"],
    image: Keys,
    sinks: Keys,
    min_nonsink_share: SupportsFloat = 0.5,
    min_image_mass: SupportsFloat = 0.2,
    *,
    convention: Convention = "paper",
    queries: Optional[Keys] = None,
) -> Bool[Tensor, "*batch head query"]:
    """Choose the image-centric (head, query) pairs.

    Example:
        >>> attention = torch.tensor([[[0.2, 0.1, 0.7]], [[0.2, 0.7, 0.1]], [[0.9, 0.0, 0.1]]])
        >>> select(attention, image=slice(1, 3), sinks=[0, 1])[:, 0]
        tensor([ True, False, False])

    Here head 0 looks at content, head 1 at the visual sink, head 2 hardly at the image.

    Args:
        attention: probabilities of one layer; rows may be any subset of the queries.
        image: the image's positions, a slice or an index array.
        sinks: positions of all sinks; those outside the image do not matter here.
        min_nonsink_share: rho of the paper: 0.8 for general, 0.5 for hallucination, 0.9 for
            vision-centric tasks. With convention="code" it is the released code's rho, a ceiling
            on the sinks' share: 0.2, 0.5 and 0.1.
        min_image_mass: leave out rows with less attention on the image than this.
        queries: rows to consider, all if None; the others are False. Positions count rows.

    The decision is made per query: it is not a fixed list of heads.

    Raises:
        ValueError: a threshold outside [0, 1].
        OutOfRange: a position that does not exist.
        NumericalError: NaN in the attention.

    Source: arXiv:2503.03321; released code `logic.py` for convention="code".
    """
    share, mass = float(min_nonsink_share), float(min_image_mass)
    for name, value in (("min_nonsink_share", share), ("min_image_mass", mass)):
        if not 0 <= value <= 1:
            raise ValueError(f"{name} must lie between 0 and 1, not {value}.")
    weights = _checked(attention)
    n_queries, n_keys = weights.shape[-2:]
    visual = key_mask(image, n_keys)
    if convention == "paper":
        sink = key_mask(sinks, n_keys).to(weights.device)
        chosen = image_centric_rows(weights, visual.to(weights.device), sink, share, mass)
    else:
        on_image = image_mass(weights, image)
        on_sinks = (weights * (visual & key_mask(sinks, n_keys)).to(weights.device)).sum(-1)
        chosen = on_sinks / (on_image + CODE_EPSILON * int(visual.sum())) <= share
        chosen = chosen & (on_image >= mass)
    if queries is not None:
        chosen = chosen & key_mask(queries, n_queries).to(chosen.device)
    return chosen


def measure(
    model: Model,
    prompts: Sequence[Prompt],
    sinks: Sequence[Mapping[int, Sequence[int]]],
    *,
    min_nonsink_share: SupportsFloat = 0.5,
    min_image_mass: SupportsFloat = 0.2,
    chance: bool = True,
) -> Result:
    """Image mass and non-sink share of every head at every query after the image.

    Example:
        >>> import interp
        >>> model = interp.open_model("backcopy-1l")
        >>> prompt = Prompt.from_tokens(range(9), {"image": (2, 6)})
        >>> found = measure(model, [prompt], [{0: [3]}])
        >>> found["nonsink_share"].dims, found["selected"].dims
        (('prompt', 'layer', 'head', 'query'), ('prompt', 'layer', 'head', 'query'))

    Args:
        prompts: each with a segment of kind "image" and text behind it.
        sinks: for every prompt its sink positions by layer (`visual.sinks_by_layer`).
        chance: run once more with even attention, for `null` and `eligible`.

    Returns:
        `image_mass`, `nonsink_share` (NaN where nothing is on the image), `selected`, per query of
        the whole prompt (NaN and False up to the end of the image). [layer, head]: `rate`, the share
        of (prompt, query) in which the head is selected, a score for ranking heads;
        `standard_error` over prompts; `frequency`, the share of prompts with a selected query;
        `null`, the rate of a head that attends evenly to all it sees; `eligible`, False where the
        last query of some prompt sees nothing of the image (a short window).

    Streamed: no attention matrix is kept.
    """
    images = [sorted({p for s in prompt.of_kind("image") for p in s.positions})
              for prompt in prompts]
    for number, places in enumerate(images):
        if not places or max(places) + 1 >= len(prompts[number]):
            raise PromptError(
                f"prompt {number} has no image with text behind it: make it with "
                "model.prompt(..., images=[...])."
            )

    def segments(number: int, layer: int) -> SegmentMass:
        here = set(sinks[number].get(layer, ()))
        content = [p for p in images[number] if p not in here]
        return SegmentMass({"image": images[number], "content": content})

    later = np.zeros((len(prompts), max(map(len, prompts))), dtype=bool)
    for row, places, prompt in zip(later, images, prompts):
        row[max(places) + 1 : len(prompt)] = True
    reads = xr.DataArray(later, dims=("prompt", "query"))

    def look(write: Sequence[Intervention] = ()) -> xr.Dataset:
        run = model.run(prompts, write=write, stats=[PerLayer("segments", segments)], logits="none")
        mass = run.stats["segments"]
        on_image = mass.sel(segment="image", drop=True).where(reads)
        share = mass.sel(segment="content", drop=True).where(reads) / on_image.where(on_image > 0)
        # As in `select`, a row with nothing on the image has a share of zero.
        enough = share.fillna(0.0) >= float(min_nonsink_share)
        selected = (on_image >= float(min_image_mass)) & enough & reads
        return xr.Dataset({"image_mass": on_image, "nonsink_share": share, "selected": selected})

    data = look()
    chosen = data["selected"].where(reads)
    data["rate"] = chosen.mean(("prompt", "query"))
    each = chosen.mean("query")
    data["standard_error"] = each.std("prompt", ddof=1) / np.sqrt(len(prompts)) \
        if len(prompts) > 1 else xr.full_like(data["rate"], np.nan)
    data["frequency"] = data["selected"].any("query").mean("prompt")
    if chance:
        every = [Head(a, b) for a in range(model.n_layers) for b in range(model.n_heads)]
        even = look([ablate(every, "uniform")])
        data["null"] = even["selected"].where(reads).mean(("prompt", "query"))
        last = xr.DataArray([len(prompt) - 1 for prompt in prompts], dims="prompt")
        data["eligible"] = (even["image_mass"].isel(query=last) > 0).all("prompt")
    return Result(data, {
        **model.manifest(), "measure": "image_centric",
        "min_nonsink_share": float(min_nonsink_share), "min_image_mass": float(min_image_mass),
    })


def scores_of(found: Result) -> HeadScores:
    """The rates that `measure` found, for rankings, with what it knows beside them."""
    order = {name: found[name].transpose("layer", "head").values
             for name in ("rate", "frequency", "standard_error", "eligible") if name in found.data}
    return HeadScores.of(order.pop("rate"), **order)


def draw(found: Result, ax: Axes) -> Axes:
    """Head map of the non-sink share; heads with too little image mass are hatched."""
    mass = found["image_mass"].mean(("prompt", "query"))
    share = found["nonsink_share"].mean(("prompt", "query"))
    enough = mass >= found.manifest["min_image_mass"]
    return heat.draw(ax, share, label="non-sink share of image attention", limits=(0, 1),
                     eligible=enough, hatched="too little attention on the image")


def _checked(attention: Tensor | np.ndarray) -> Tensor:
    weights = torch.as_tensor(attention)
    weights = weights.to(torch.promote_types(weights.dtype, torch.float32))
    if not torch.isfinite(weights).all():
        raise NumericalError("attention contains NaN or infinity; recompute it in float32.")
    return weights
