"""Information horizon: the depth after which no image token matters for the answer any more.

Paper     arXiv:2512.07580
Question  How much does each image token tell the answer at a depth, and from where on do none?
Measure   probability of the answer with one group of image tokens left, minus with none, the others
          dropped from what enters a block; the depth from which all of these are near zero
Cause     the measure is an intervention; withdrawal of all image tokens gives the horizon again
"""

from collections.abc import Iterable, Sequence
from typing import Optional, SupportsFloat, SupportsIndex

import numpy as np
import xarray as xr
from jaxtyping import Bool, Float
from matplotlib.axes import Axes

from interp.causal.removal import Removal, States, removable_tokens
from interp.core import OutOfRange, Prompt, PromptError, Result
from interp.core.prompt import Where
from interp.figures.style import color, style
from interp.models.model import Model


def windows(prompt: Prompt, image: str = "image", size: SupportsIndex = 2) -> list[tuple[int, ...]]:
    """Positions of an image's tokens in windows of `size` x `size` cells, row by row.

    Example:
        >>> from interp.core import Segment
        >>> picture = Segment("image", tuple(range(2, 10)), "image", grid=(2, 4),
        ...                   boxes=((0, 0, 1, 1),) * 8)
        >>> prompt = Prompt(tuple(range(12)), (picture,))
        >>> windows(prompt)
        [(2, 3, 6, 7), (4, 5, 8, 9)]

    Windows at the right and lower edge hold what is left. Tokens that are no cell (class and
    newline tokens) are in no window.

    Raises:
        SegmentNotFound: no such segment.
        PromptError: the segment has no one grid (tiled images), or one that does not match.
    """
    segment, size = prompt.segment(image), int(size)
    if size < 1:
        raise PromptError(f"windows of {size} x {size} cells: size must be at least 1.")
    if segment.grid is None:
        raise PromptError(
            f"segment {image!r} has no one grid of cells (a tiled image has several); name one of "
            f"its parts: {', '.join(repr(s.name) for s in prompt.of_kind('image_part')) or 'none'}."
        )
    boxes = segment.boxes or (True,) * len(segment.positions)
    cells = [p for p, box in zip(segment.positions, boxes) if box is not None]
    rows, columns = segment.grid
    if len(cells) != rows * columns:
        raise PromptError(
            f"segment {image!r} has {len(cells)} cells, but its grid is {rows} x {columns}."
        )
    where = np.array(cells).reshape(rows, columns)
    return [tuple(int(p) for p in where[i : i + size, j : j + size].flat)
            for i in range(0, rows, size) for j in range(0, columns, size)]


def information(
    model: Model,
    prompt: Prompt,
    answer: SupportsIndex,
    *,
    image: Where = "image",
    groups: Optional[Sequence[Sequence[SupportsIndex]]] = None,
    layers: Optional[Iterable[SupportsIndex]] = None,
    removal: str = "drop_keep_ids",
    queries: Where = "all",
    states: Optional[States] = None,
    batch_size: SupportsIndex = 64,
) -> Result:
    """Isolation information I_l(k) = p_l({k}) - p_l(nothing), for every layer and group.

    Example:
        >>> import interp
        >>> model = interp.open_model("backcopy-3l")
        >>> prompt = Prompt.from_tokens(range(3, 15), {"image": (2, 8)})
        >>> found = information(model, prompt, answer=5)
        >>> found["information"].sizes["group"], found["none"].dims
        (6, ('layer',))

    Args:
        answer: the token whose probability in the last row is followed.
        image: the removable positions.
        groups: sets of them that stay together, such as `windows(prompt)`; single ones for None.
        layers: blocks before which tokens are removed; all but the first for None.
        removal, queries, states: what removing means (`interp.causal.removal`); the paper measures
            with "drop_keep_ids".

    Returns:
        [layer, group]: `information`, `alone` (the probability with that group only); [layer]:
        `none`, `kl` (nats, of the whole output without any image token from the full output), also
        `log_ratio` (log p_l(nothing) - log p_full); scalars `full` and `prefills`, the cost in plain
        passes over the prompt (the loop over cells takes `naive_prefills`, in the manifest).

    Raises:
        SegmentNotFound, OutOfRange: no image, or groups outside of it.
        ModelRefused: models that cannot be resumed in the middle, and compact ids with a rotary
            embedding in several axes.

    Source: arXiv:2512.07580, isolation measure; cost by causal prefix reuse and batching.
    """
    places = removable_tokens(prompt, image)
    chosen = [(p,) for p in places] if groups is None else [
        tuple(sorted(int(p) for p in group)) for group in groups]
    outside = [p for group in chosen for p in group if p not in places]
    if outside or not all(chosen):
        raise OutOfRange(
            f"position {outside[0]} is in a group, but not among the image tokens." if outside
            else "a group is empty: give every group at least one position."
        )
    wanted = _layers(layers, model.n_layers)
    remaining = Removal(model, prompt, image, removal, queries=queries, states=states)
    variants: list[tuple[int, ...]] = [(), *chosen]
    alone = np.zeros((len(wanted), len(chosen)))
    none, kl = np.zeros(len(wanted)), np.zeros(len(wanted))
    full = remaining.base.logits[-1].float().log_softmax(-1).cpu()
    for number, layer in enumerate(wanted):
        logits = remaining.logits(layer, variants, int(batch_size)).log_softmax(-1)
        p = logits[:, int(answer)].exp().double().numpy()
        none[number], alone[number] = p[0], p[1:]
        # Of the full output, seen from the output without image tokens.
        kl[number] = float((logits[0].exp() * (logits[0] - full)).sum())
    data = xr.Dataset(
        {"information": (("layer", "group"), alone - none[:, None]),
         "alone": (("layer", "group"), alone), "none": ("layer", none),
         "kl": ("layer", np.maximum(kl, 0.0)),
         "log_ratio": ("layer", np.log(np.maximum(none, 1e-30)) - float(full[int(answer)])),
         "full": float(full[int(answer)].exp()), "prefills": remaining.prefills},
        {"layer": wanted, "group": np.arange(len(chosen))},
    )
    return Result(data, {
        **model.manifest(), "measure": "information", **remaining.manifest, "answer": int(answer),
        "groups": [list(group) for group in chosen], "prompts": [prompt.digest()],
        "naive_prefills": len(wanted) * len(variants),
    })


def leave_one_out(
    model: Model,
    prompt: Prompt,
    answer: SupportsIndex,
    *,
    image: Where = "image",
    groups: Optional[Sequence[Sequence[SupportsIndex]]] = None,
    layers: Optional[Iterable[SupportsIndex]] = None,
    batch_size: SupportsIndex = 16,
) -> Result:
    """What is lost when one group alone is dropped: p_full - p_l(all but k), `[layer, group]`.

    With redundant tokens it is near zero for all of them while `information` is not; the rank
    correlation of the two belongs beside either.
    """
    places = removable_tokens(prompt, image)
    chosen = [(p,) for p in places] if groups is None else [
        tuple(sorted(int(p) for p in group)) for group in groups]
    wanted = _layers(layers, model.n_layers)
    remaining = Removal(model, prompt, image)
    kept = [tuple(p for p in places if p not in group) for group in chosen]
    full = float(remaining.base.logits[-1].float().softmax(-1)[int(answer)])
    lost = np.stack([
        full - remaining.logits(layer, kept, int(batch_size)).softmax(-1)[:, int(answer)]
        .double().numpy() for layer in wanted])
    data = xr.Dataset({"lost": (("layer", "group"), lost), "full": full,
                       "prefills": remaining.prefills},
                      {"layer": wanted, "group": np.arange(len(chosen))})
    return Result(data, {**model.manifest(), "measure": "leave_one_out", "answer": int(answer),
                         "groups": [list(group) for group in chosen],
                         **remaining.manifest, "prompts": [prompt.digest()]})


def horizon(
    effect: Float[np.ndarray, "layer"], tolerance: SupportsFloat,
    layers: Optional[Sequence[SupportsIndex]] = None,
) -> Optional[int]:
    """The first layer from which on every effect is at most `tolerance`; None if there is none.

    Example:
        >>> horizon(np.array([0.5, 0.2, 0.005, 0.001]), 0.01)
        2
        >>> horizon(np.array([0.5, 0.001, 0.2]), 0.01) is None
        True

    `layers` are the true numbers of the entries. H_info takes the largest |information| over groups
    with 0.01 in probability; H_out takes `kl` with 0.003 nats, the setting of visual token withdrawal
    for LLaVA-1.5-7B. Both are this toolkit's choice: the paper reads the horizon off its curves.
    """
    values = np.asarray(effect, dtype=float)
    numbers = range(len(values)) if layers is None else [int(layer) for layer in layers]
    above = np.flatnonzero(~(values <= float(tolerance)))
    first = 0 if not len(above) else int(above[-1]) + 1
    return list(numbers)[first] if first < len(values) else None


def horizons(
    found: Result, epsilon: SupportsFloat = 0.01, eta: SupportsFloat = 0.003
) -> dict[str, Optional[int]]:
    """H_info and H_out of one measured prompt, as true layer numbers; None where there is none."""
    layers = found["layer"].values.tolist()
    strongest = np.abs(found["information"]).max("group").values
    return {"H_info": horizon(strongest, epsilon, layers),
            "H_out": horizon(found["kl"].values, eta, layers)}


def task_horizon(
    correct: Bool[np.ndarray, "sample layer"] | Float[np.ndarray, "sample layer"],
    full: Bool[np.ndarray, "sample"] | Float[np.ndarray, "sample"],
    layers: Sequence[SupportsIndex],
    *,
    resamples: SupportsIndex = 2000,
    seed: SupportsIndex = 0,
) -> Optional[int]:
    """H_task: from where on the score without image tokens is within one standard error of full.

    `correct` is the score of every sample when all image tokens are withdrawn before a layer, `full`
    that of the whole model; the standard error is that of the full score, by bootstrap over samples.
    """
    full = np.asarray(full, dtype=float)
    rng = np.random.default_rng(int(seed))
    drawn = rng.integers(0, len(full), (int(resamples), len(full)))
    error = float(full[drawn].mean(1).std())
    loss = full.mean() - np.asarray(correct, dtype=float).mean(0)
    return horizon(loss, error, layers)


@style()
def draw(found: Result, ax: Axes) -> Axes:
    """Mean and largest |information| over groups, by layer, with both horizons dotted."""
    layers, size = found["layer"].values, np.abs(found["information"])
    ax.plot(layers, size.max("group"), "-o", color=color("image"), label="largest")
    ax.plot(layers, size.mean("group"), "--", color=color("image"), label="mean")
    for (name, layer), line in zip(horizons(found).items(), (":", "-.")):
        if layer is not None:
            ax.axvline(layer, color=color("control"), linestyle=line, linewidth=0.8, label=name)
    ax.set_xlabel("layer")
    ax.set_ylabel("|information| (probability)")
    ax.legend()
    return ax


def _layers(layers: Optional[Iterable[SupportsIndex]], n_layers: int) -> list[int]:
    wanted = list(range(1, n_layers)) if layers is None else sorted(int(x) for x in layers)
    for layer in wanted:
        if not 0 <= layer < n_layers:
            raise OutOfRange(f"layer {layer} does not exist: there are 0 to {n_layers - 1}.")
    return wanted
