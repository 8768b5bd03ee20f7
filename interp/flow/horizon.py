"""Information horizon: the depth after which no image token matters for the answer any more.

Paper     arXiv:2512.07580
Question  How much does each image token tell the answer at a depth, and from where on do none?
Measure   probability of the answer with one group of image tokens left, minus with none, the others
          dropped from what enters a block; the depth from which all of these are near zero
Cause     the measure is an intervention; withdrawal of all image tokens gives the horizon again
"""

from collections.abc import Iterable, Sequence
from typing import Any, Optional, SupportsFloat, SupportsIndex

import numpy as np
import xarray as xr
from jaxtyping import Bool, Float
from matplotlib.axes import Axes
from scipy import stats

from interp.causal.removal import Removal, States, removable_tokens
from interp.core import NumericalError, OutOfRange, Prompt, PromptError, Result, statistics
from interp.core.prompt import Where
from interp.figures.style import color, style
from interp.models.model import Model
from interp.prompts.first_token import token_id


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
    against: Sequence[SupportsIndex] = (),
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
            with "drop_keep_ids"; "replace_mean" is the control for the shock of vanishing tokens.
        against: first tokens of the other possible answers (`interp.prompts.first_token`); the
            likeliest of them in the plain run is the `foil`. Without, any other token may be it.

    Returns:
        [layer, group]: `information`, `alone` (the probability with that group only),
        `difference_alone` (logit of the answer minus that of the foil, which does not saturate
        where the probability is near 1); [layer]: `none`, `difference_none`, `kl` (nats, of the
        whole output without any image token from the full output), `log_ratio` (log p_l(nothing) -
        log p_full), `top` (the likeliest token without any image token); scalars `full`,
        `difference_full`, `full_top` and `prefills`, the cost in plain passes over the prompt (the
        loop over cells takes `naive_prefills`, in the manifest).

    Where image tokens see each other in both directions, the manifest says so (`image_attention`)
    and what is run again reaches back to the first of them.

    Raises:
        SegmentNotFound, OutOfRange: no image, or groups outside of it.
        PromptError: the answer is among those it is held against.
        ModelRefused: models that cannot be resumed in the middle, and compact ids with a rotary
            embedding in several axes.

    Source: arXiv:2512.07580, isolation measure; cost by causal prefix reuse and batching.
    """
    places, chosen = _grouped(prompt, image, groups)
    token, others = token_id(answer), [token_id(other) for other in against]
    if token in others:
        raise PromptError(
            f"token {token} begins the answer and one of the others too, so it cannot tell them "
            "apart; ask for another token (interp.prompts.first_token)."
        )
    wanted = _layers(layers, model.n_layers)
    remaining = Removal(model, prompt, image, removal, queries=queries, states=states)
    variants: list[tuple[int, ...]] = [(), *chosen]
    p, gap = (np.zeros((len(wanted), len(variants))) for _ in range(2))
    kl, top = np.zeros(len(wanted)), np.zeros(len(wanted), dtype=int)
    plain = remaining.base.logits[-1].float().cpu()
    full, full_top = plain.log_softmax(-1), int(plain.argmax())
    if not others:
        others = [int(t) for t in plain.topk(2).indices if int(t) != token]
    foil = max(others, key=lambda t: float(plain[t]))
    for number, layer in enumerate(wanted):
        raw = remaining.logits(layer, variants, int(batch_size))
        logits = raw.log_softmax(-1)
        p[number] = logits[:, token].exp().double().numpy()
        gap[number] = (raw[:, token] - raw[:, foil]).double().numpy()
        # Of the full output, seen from the output without image tokens.
        kl[number] = float((logits[0].exp() * (logits[0] - full)).sum())
        top[number] = int(raw[0].argmax())
    none, alone = p[:, 0], p[:, 1:]
    data = xr.Dataset(
        {"information": (("layer", "group"), alone - none[:, None]),
         "alone": (("layer", "group"), alone), "none": ("layer", none),
         "difference_alone": (("layer", "group"), gap[:, 1:]),
         "difference_none": ("layer", gap[:, 0]),
         "kl": ("layer", np.maximum(kl, 0.0)), "top": ("layer", top),
         "log_ratio": ("layer", np.log(np.maximum(none, 1e-30)) - float(full[token])),
         "full": float(full[token].exp()), "difference_full": float(plain[token] - plain[foil]),
         "full_top": full_top, "prefills": remaining.prefills},
        {"layer": wanted, "group": np.arange(len(chosen))},
    )
    seen = remaining.base.visible(0)[list(places)][:, list(places)]
    return Result(data, {
        **model.manifest(), "measure": "information", **remaining.manifest, "answer": token,
        "foil": foil, "image_attention": "both ways" if bool(seen.triu(1).any()) else "causal",
        "groups": [list(group) for group in chosen], "prompts": [prompt.digest()],
        "n_layers": model.n_layers, "naive_prefills": len(wanted) * len(variants),
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
    correlation of the two (`agreement`) belongs beside either.
    """
    places, chosen = _grouped(prompt, image, groups)
    wanted, answer = _layers(layers, model.n_layers), token_id(answer)
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


def agreement(
    one: Float[np.ndarray, "layer group"] | xr.DataArray,
    other: Float[np.ndarray, "layer group"] | xr.DataArray,
) -> Float[np.ndarray, "layer"]:
    """Rank correlation over groups of two maps, layer by layer; NaN where one of them is constant.

    Isolation against leave-one-out, or against the same with replaced instead of dropped tokens.

    Example:
        >>> agreement(np.array([[1.0, 2.0, 3.0]]), np.array([[5.0, 6.0, 9.0]]))
        array([1.])
    """
    a, b = np.asarray(one, dtype=float), np.asarray(other, dtype=float)
    if a.shape != b.shape:
        raise ValueError(f"the maps have the shapes {a.shape} and {b.shape}; they must be equal.")
    found = [np.corrcoef(stats.rankdata(x), stats.rankdata(y))[0, 1]
             if np.ptp(x) > 0 and np.ptp(y) > 0 else np.nan for x, y in zip(a, b)]
    return np.round(np.array(found), 12)


def relative(found: Result, least: SupportsFloat = 0.05) -> xr.DataArray:
    """Information as a share of the answer's full probability, `[layer, group]`.

    Raises `NumericalError` where that probability is below `least`: the ratio would explode.
    """
    full = float(found["full"])
    if full < float(least):
        raise NumericalError(
            f"the answer has a probability of {full:.2g} with the whole image: below "
            f"{float(least):g} no relative change can be told; use information or the difference "
            "of logits."
        )
    return found["information"] / full


def coarse_to_fine(
    model: Model,
    prompt: Prompt,
    answer: SupportsIndex,
    *,
    image: str = "image",
    coarse: SupportsIndex = 4,
    fine: SupportsIndex = 2,
    share: SupportsFloat = 0.25,
    layers: Optional[Iterable[SupportsIndex]] = None,
    batch_size: SupportsIndex = 64,
) -> Result:
    """The map of fine windows inside those coarse windows only that tell most.

    Returns what `information` does for the fine windows (their positions are in the manifest), and
    `coarse` `[layer, window]`. A window is refined where its largest |information| over layers is
    among the first `share` of all. Raises `PromptError` unless `fine` divides `coarse`.
    """
    if int(fine) < 1 or int(coarse) % int(fine):
        raise PromptError(f"windows of {int(coarse)} cannot be refined to windows of {int(fine)}.")
    large, wanted = windows(prompt, image, coarse), _layers(layers, model.n_layers)
    first = information(model, prompt, answer, image=image, groups=large, layers=wanted,
                        batch_size=batch_size)
    size = np.abs(first["information"].values).max(0)
    count = max(1, int(np.ceil(float(share) * len(large))))
    refined = sorted(np.argsort(-size, kind="stable")[:count].tolist())
    inside = {p for number in refined for p in large[number]}
    small = [group for group in windows(prompt, image, fine) if set(group) <= inside]
    found = information(model, prompt, answer, image=image, groups=small, layers=wanted,
                        batch_size=batch_size)
    data = found.data.assign(coarse=(("layer", "window"), first["information"].values),
                             prefills=found["prefills"] + first["prefills"])
    return Result(data, {**found.manifest, "measure": "coarse_to_fine", "refined": refined,
                         "windows": [list(group) for group in large]})


def output_horizon(
    model: Model, prompt: Prompt, eta: SupportsFloat = 0.003, *, image: Where = "image",
) -> Result:
    """H_out by bisection: about log2 of the depth evaluations in place of one per layer.

    That takes a divergence which falls with depth. Where those evaluated do not fall, all layers
    are evaluated instead, and `monotone` in the manifest is False.

    Returns `kl` [layer] of the layers evaluated, scalars `prefills` and `H_out` (the number of
    blocks where there is none).
    """
    remaining, n_layers = Removal(model, prompt, image), model.n_layers
    full = remaining.base.logits[-1].float().log_softmax(-1).cpu()
    kl: dict[int, float] = {}

    def measured(layer: int) -> float:
        if layer not in kl:
            p = remaining.logits(layer, [()])[0].log_softmax(-1)
            kl[layer] = max(0.0, float((p.exp() * (p - full)).sum()))
        return kl[layer]

    low, high = 1, n_layers
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if measured(middle) <= float(eta) else (middle + 1, high)
    values = [kl[layer] for layer in sorted(kl)]
    monotone = all(a >= b or max(a, b) <= float(eta) for a, b in zip(values, values[1:]))
    if not monotone:
        values = [measured(layer) for layer in range(1, n_layers)]
        found = horizon(np.array(values), eta, range(1, n_layers))
        low = n_layers if found is None else found
    order = sorted(kl)
    return Result(
        xr.Dataset({"kl": ("layer", [kl[layer] for layer in order]), "H_out": low,
                    "prefills": remaining.prefills}, {"layer": order}),
        {**model.manifest(), "measure": "output_horizon", **remaining.manifest,
         "eta": float(eta), "monotone": monotone, "prompts": [prompt.digest()]})


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
    found: Result, epsilon: SupportsFloat = 0.01, eta: SupportsFloat = 0.003,
    delta: Optional[SupportsFloat] = None,
) -> dict[str, Optional[int]]:
    """H_info and H_out of one measured prompt, as true layer numbers; None where there is none.

    With `delta`, in logits, also H_logit: the depth past which no group moves the difference of
    logits by more. It goes on where H_info ends because the answer is certain anyway.
    """
    layers = found["layer"].values.tolist()
    strongest = abs(found["information"]).max("group").values
    made = {"H_info": horizon(strongest, epsilon, layers),
            "H_out": horizon(found["kl"].values, eta, layers)}
    if delta is not None:
        moved = abs(found["difference_alone"] - found["difference_none"]).max("group").values
        made["H_logit"] = horizon(moved, delta, layers)
    return made


def task_horizon(
    correct: Bool[np.ndarray, "sample layer"] | Float[np.ndarray, "sample layer"],
    full: Bool[np.ndarray, "sample"] | Float[np.ndarray, "sample"],
    layers: Sequence[SupportsIndex],
) -> Optional[int]:
    """H_task: from where on the score without image tokens is within one standard error of full.

    `correct` is the score of every sample when all image tokens are withdrawn before a layer, `full`
    that of the whole model; the standard error is that of the full score by bootstrap over samples,
    which for a mean has a closed form.
    """
    full = np.asarray(full, dtype=float)
    error = float(full.std()) / len(full) ** 0.5
    loss = full.mean() - np.asarray(correct, dtype=float).mean(0)
    return horizon(loss, error + 1e-12, layers)


def each_horizon(
    effects: Float[np.ndarray, "prompt layer"], tolerance: SupportsFloat,
    layers: Sequence[SupportsIndex], end: SupportsIndex,
) -> Float[np.ndarray, "prompt"]:
    """The horizon of every prompt; `end`, the number of blocks, where the last still reads.

    Example:
        >>> each_horizon(np.array([[0.5, 0.0], [0.5, 0.5]]), 0.01, [1, 2], 3)
        array([2., 3.])
    """
    found = [horizon(row, tolerance, layers) for row in np.asarray(effects, dtype=float)]
    return np.array([int(end) if h is None else h for h in found], dtype=float)


def horizon_of_task(
    effects: Float[np.ndarray, "prompt layer"], tolerance: SupportsFloat,
    layers: Sequence[SupportsIndex], end: SupportsIndex, **more: Any,
) -> statistics.Estimate:
    """The horizon of the mean effect over prompts, with its bootstrap interval over prompts.

    `effects` are, per prompt, the largest |information| for H_info or `kl` for H_out.
    """
    def of(rows: np.ndarray) -> float:
        return float(each_horizon(rows.mean(0)[None], tolerance, layers, end)[0])

    return statistics.bootstrap(of, effects, **{"name": "horizon", "resamples": 1000, **more})


def horizon_of_score(
    correct: Bool[np.ndarray, "sample layer"] | Float[np.ndarray, "sample layer"],
    full: Bool[np.ndarray, "sample"] | Float[np.ndarray, "sample"],
    layers: Sequence[SupportsIndex], end: SupportsIndex, **more: Any,
) -> statistics.Estimate:
    """H_task (see `task_horizon`; `end` where there is none) with its bootstrap interval."""
    def of(rows: np.ndarray, whole: np.ndarray) -> float:
        found = task_horizon(rows, whole, layers)
        return float(int(end) if found is None else found)

    return statistics.bootstrap(of, correct, full, **{"name": "H_task", "resamples": 1000, **more})


@style()
def draw(found: Result, ax: Axes) -> Axes:
    """Mean and largest |information| over groups, by layer, with both horizons dotted."""
    layers, size = found["layer"].values, abs(found["information"])
    ax.plot(layers, size.max("group"), "-o", color=color("image"), label="largest")
    ax.plot(layers, size.mean("group"), "--", color=color("image"), label="mean")
    for (name, layer), line in zip(horizons(found).items(), (":", "-.")):
        if layer is not None:
            ax.axvline(layer, color=color("control"), linestyle=line, linewidth=0.8, label=name)
    ax.set_xlabel("layer")
    ax.set_ylabel("|information| (probability)")
    ax.legend()
    return ax


def _grouped(
    prompt: Prompt, image: Where, groups: Optional[Sequence[Sequence[SupportsIndex]]]
) -> tuple[tuple[int, ...], list[tuple[int, ...]]]:
    """The removable positions, and the sets of them that stay together."""
    places = removable_tokens(prompt, image)
    chosen = [(p,) for p in places] if groups is None else [
        tuple(sorted(int(p) for p in group)) for group in groups]
    outside = [p for group in chosen for p in group if p not in places]
    if outside or not all(chosen):
        raise OutOfRange(
            f"position {outside[0]} is in a group, but not among the image tokens." if outside
            else "a group is empty: give every group at least one position."
        )
    return places, chosen


def _layers(layers: Optional[Iterable[SupportsIndex]], n_layers: int) -> list[int]:
    wanted = list(range(1, n_layers)) if layers is None else sorted(int(x) for x in layers)
    for layer in wanted:
        if not 0 <= layer < n_layers:
            raise OutOfRange(f"layer {layer} does not exist: there are 0 to {n_layers - 1}.")
    return wanted
