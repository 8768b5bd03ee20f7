"""Object ablation: which image tokens hold what the model says about an object.

Paper     arXiv:2410.07149
Question  Is the information on an object in the tokens on it, or elsewhere in the image?
Measure   what is lost in the answer when sets of image tokens are replaced at the language model's
          input: the object's, those and their neighbors, registers, sinks, tokens of high gradient
Cause     the measure is an intervention; random sets of equally many image tokens, also matched by
          a quantity such as the norm, are its control
"""

from collections.abc import Mapping, Sequence
from typing import Optional, SupportsFloat, SupportsIndex

import numpy as np
import torch
import xarray as xr
from jaxtyping import Bool, Float
from matplotlib.axes import Axes
from torch import Tensor

from interp.causal.metrics import AnswerAccuracy, AnswerLogProb, Metric
from interp.causal.sweep import evaluate
from interp.core import OutOfRange, Prompt, PromptError, Result, Segment, each, patch, statistics
from interp.core.intervention import Each
from interp.core.prompt import Where
from interp.figures.style import color, note, style
from interp.models.input_gradients import embedding_gradient
from interp.models.model import Model

Substitution = str
SUBSTITUTIONS = ("mean", "zero", "norm_mean", "resample")
TOP = (5, 10, 20, 40, 60, 100, 250)
"""Sizes of the paper's sets of gradient tokens, of 576 image tokens."""


# -- sets of tokens ------------------------------------------------------------------------------


def ring(image: Segment, positions: Sequence[SupportsIndex], width: SupportsIndex = 1
         ) -> tuple[int, ...]:
    """These image tokens and all within `width` cells of them, diagonals included.

    Example:
        >>> picture = Segment("image", tuple(range(4, 13)), "image", (3, 3), ((0, 0, 1, 1),) * 9)
        >>> ring(picture, [4]), ring(picture, [4], 0)
        ((4, 5, 7, 8), (4,))

    Raises:
        PromptError: the segment has no one grid of cells, or a position is none of its cells.

    Source: arXiv:2410.07149, "+1" and "+2" buffers.
    """
    cells, width = _cells(image), int(width)
    if width < 0:
        raise PromptError(f"a ring of width {width}: the width must be at least 0.")
    where = {int(p): (int(r), int(c)) for (r, c), p in np.ndenumerate(cells)}
    chosen = np.zeros(cells.shape, bool)
    for position in map(int, positions):
        if position not in where:
            raise PromptError(f"position {position} is no cell of segment {image.name!r}.")
        row, column = where[position]
        chosen[max(0, row - width) : row + width + 1, max(0, column - width) : column + width + 1] = 1
    return tuple(sorted(int(p) for p in cells[chosen]))


def registers(
    projected: Float[Tensor | np.ndarray, "patch d_model"], sigma: SupportsFloat = 2.0
) -> Bool[Tensor, "patch"]:
    """Which visual embeddings are registers: norm above the image's mean plus `sigma` deviations.

    Example:
        >>> states = torch.ones(20, 3)
        >>> states[4] *= 9
        >>> registers(states).nonzero().flatten().tolist()
        [4]

    Source: arXiv:2410.07149, of the projector's outputs.
    """
    norm = torch.as_tensor(projected).float().norm(dim=-1)
    return norm > norm.mean() + float(sigma) * norm.std(correction=0)


def random_tokens(
    image: Sequence[SupportsIndex],
    like: Sequence[SupportsIndex],
    *,
    seed: SupportsIndex,
    exclude: Sequence[SupportsIndex] = (),
    match: Optional[Mapping[int, float]] = None,
    nearest: SupportsIndex = 4,
) -> tuple[int, ...]:
    """As many image tokens as `like` has, none of them in it or in `exclude`: the control.

    Example:
        >>> random_tokens(range(6), [2], seed=0, exclude=[1, 3], match={0: 1., 2: 5., 4: 2., 5: 5.},
        ...               nearest=1)
        (5,)

    Args:
        match: a number per position, such as its norm or the attention that it receives: every
            token of `like` is replaced by one of the `nearest` free ones in this number.

    Raises:
        OutOfRange: fewer tokens are left than needed.
    """
    chosen = sorted({int(p) for p in like})
    out = {*chosen, *map(int, exclude)}
    free = [int(p) for p in image if int(p) not in out]
    if len(free) < len(chosen):
        raise OutOfRange(
            f"{len(chosen)} random image tokens are needed, but only {len(free)} are neither chosen "
            "nor excluded; exclude fewer."
        )
    rng = np.random.default_rng([int(seed), len(chosen)])
    if match is None:
        return tuple(sorted(free[i] for i in rng.choice(len(free), len(chosen), replace=False)))
    drawn: list[int] = []
    for position in rng.permutation(chosen):
        near = sorted(free, key=lambda p: abs(match[p] - match[int(position)]))[: int(nearest)]
        drawn.append(near[rng.integers(len(near))])
        free.remove(drawn[-1])
    return tuple(sorted(drawn))


def integrated_gradients(
    model: Model,
    prompt: Prompt,
    target: SupportsIndex,
    baseline: Float[Tensor | np.ndarray, "d_model"],
    *,
    image: Where = "image",
    steps: SupportsIndex = 50,
    batch_size: SupportsIndex = 10,
) -> Float[Tensor, "position d_model"]:
    """What every image token adds to the logit of `target` in the last row, along a straight path.

    Example:
        >>> import interp
        >>> model = interp.open_model("backcopy-1l")
        >>> prompt = Prompt.from_tokens(range(3, 9), {"image": (1, 4)})
        >>> found = integrated_gradients(model, prompt, 5, np.zeros(model.d_model), steps=2)
        >>> tuple(found.shape) == (3, model.d_model)
        True

    The image tokens go from `baseline`, all of them, to what they are; the text stays. Summed over
    everything this is the change of the logit (midpoint rule, so nearly). Tokens are ranked by the
    sum of absolute values over d_model (`top_tokens`).

    Args:
        target: the first token of the right answer. The released code takes the first id of an
            encoded word, which is the start token; and it replaces one text token more.

    Source: arXiv:2410.07149 (gradient baseline).
    """
    places, steps = list(prompt.positions(image)), int(steps)
    states = torch.as_tensor(
        model.run(prompt, read="embed", logits="none").reads["embed"].values[0])
    states = states.reshape(len(prompt), model.d_model).float()
    start = torch.as_tensor(baseline).float()
    change = states[places] - start
    total = torch.zeros_like(change)
    at = (torch.arange(steps) + 0.5) / steps
    for some in at.split(int(batch_size)):
        inputs = states.repeat(len(some), 1, 1)
        inputs[:, places] = start + some[:, None, None] * change
        _, gradient = embedding_gradient(
            model, prompt, lambda logits: logits[-1, int(target)], inputs)
        total += gradient[:, places].sum(0)
    return total / steps * change


def top_tokens(
    attribution: Float[Tensor | np.ndarray, "position d_model"],
    positions: Sequence[SupportsIndex], count: SupportsIndex,
) -> tuple[int, ...]:
    """The `count` positions with the largest sum of |attribution|: gradient tokens.

    Example:
        >>> top_tokens(torch.tensor([[1.0, -1.0], [0.5, 0.0], [-3.0, 0.0]]), [7, 8, 9], 2)
        (7, 9)
    """
    size = torch.as_tensor(attribution).abs().sum(-1)
    if not 0 < int(count) <= len(size):
        raise OutOfRange(f"{int(count)} gradient tokens of {len(size)} image tokens.")
    best = size.argsort(descending=True, stable=True)[: int(count)]
    return tuple(sorted(int(positions[int(i)]) for i in best))


# -- substitution --------------------------------------------------------------------------------


def mean_embedding(
    model: Model, prompts: Sequence[Prompt], image: Where = "image"
) -> Float[Tensor, "d_model"]:
    """The mean of the visual embeddings at the language model's input, over images and positions.

    Example:
        >>> import interp
        >>> model = interp.open_model("backcopy-1l")
        >>> mean = mean_embedding(model, [Prompt.from_tokens(range(3, 9), {"image": (1, 4)})])
        >>> mean.shape == (model.d_model,)
        True

    Every image weighs the same. What enters block 0 is averaged: the projector's output, with
    positions added where the model adds them.
    """
    if not prompts:
        raise PromptError("no prompts to average over: give at least one.")
    return torch.stack([_embeddings(model, prompt, image).mean(0) for prompt in prompts]).mean(0)


def substitute(
    embeddings: Float[Tensor | np.ndarray, "patch d_model"],
    chosen: Sequence[SupportsIndex],
    by: Substitution = "mean",
    mean: Optional[Float[Tensor | np.ndarray, "d_model"]] = None,
    seed: SupportsIndex = 0,
) -> Float[Tensor, "chosen d_model"]:
    """What the chosen rows of an image's embeddings are replaced by.

    Example:
        >>> states = torch.tensor([[3.0, 4.0], [1.0, 0.0], [0.0, 2.0]])
        >>> substitute(states, [0], "norm_mean", mean=torch.tensor([2.0, 0.0]))
        tensor([[5., 0.]])
        >>> substitute(states, [0, 1], "resample")
        tensor([[0., 2.],
                [0., 2.]])

    Args:
        by: "mean" (over images; the paper's), "zero", "norm_mean" (the mean at the norm of what it
            replaces: a mean is shorter than its terms) or "resample" (other tokens of the same
            image, drawn without those that are replaced).

    Source: arXiv:2410.07149; the last two are this toolkit's, as replaced tokens otherwise leave
    the range that the model knows.
    """
    if by not in SUBSTITUTIONS:
        raise ValueError(f"cannot replace by {by!r}; choose one of: {', '.join(SUBSTITUTIONS)}.")
    states, rows = torch.as_tensor(embeddings).float(), [int(i) for i in chosen]
    if by in ("mean", "norm_mean") and mean is None:
        raise ValueError(f"replacing by {by!r} needs mean=[d_model]; see mean_embedding.")
    if by == "zero":
        return torch.zeros(len(rows), states.shape[1])
    if by == "resample":
        others = [i for i in range(len(states)) if i not in set(rows)]
        if not others:
            raise OutOfRange("every token of the image is replaced: none is left to draw from.")
        drawn = np.random.default_rng([int(seed), len(rows)]).choice(others, len(rows))
        return states[torch.as_tensor(drawn)]
    value = torch.as_tensor(mean).float()
    if by == "mean":
        return value.expand(len(rows), -1).clone()
    return value / value.norm().clamp_min(1e-12) * states[rows].norm(dim=-1, keepdim=True)


# -- measure -------------------------------------------------------------------------------------


def measure(
    model: Model,
    prompts: Sequence[Prompt],
    answers: Sequence[Sequence[int]],
    sets: Mapping[str, Sequence[Sequence[int]]],
    *,
    by: Substitution = "mean",
    mean: Optional[Float[Tensor | np.ndarray, "d_model"]] = None,
    image: Where = "image",
    seeds: SupportsIndex = 5,
    exclude: Optional[Sequence[Sequence[int]]] = None,
    match: Optional[Mapping[str, Sequence[Mapping[int, float]]]] = None,
    metrics: Optional[Sequence[Metric]] = None,
    batch_size: int = 32,
) -> Result:
    """Replace sets of image tokens at the language model's input, and as many random ones.

    Example:
        >>> import interp
        >>> model = interp.open_model("backcopy-1l")
        >>> prompt = Prompt.from_tokens(range(3, 12), {"image": (1, 7)})
        >>> found = measure(model, [prompt], [[5]], {"object": [[2]]}, by="zero", seeds=2)
        >>> found["log_prob"].dims, found["count"].values.tolist()
        (('condition', 'segment', 'seed', 'prompt'), [[1]])

    Args:
        answers: token ids of the right answer of every prompt.
        sets: name -> the positions to replace in every prompt; an empty set leaves a prompt as it
            is, and it is NaN in that set's values.
        by, mean: see `substitute`; the mean is that of `prompts` for None.
        seeds: random sets per set, each as large, of image tokens outside of it and of `exclude`
            (positions per prompt, such as the object with its neighbors).
        match: name of a condition -> number per position of every prompt, to draw random tokens by
            (`random_tokens`), beside those drawn evenly.
        metrics: what is measured: by default log probability and accuracy of the answer.

    Returns:
        Per metric [condition, segment, seed, prompt], the conditions "set", "random" and those of
        `match`; `whole_METRIC` [prompt], nothing replaced; `count` [segment, prompt]. Where too few
        tokens are left to draw from, a control is NaN.

    Source: arXiv:2410.07149.
    """
    given = list(prompts)
    for name, places in sets.items():
        if len(places) != len(given):
            raise PromptError(f"set {name!r} has positions for {len(places)} of {len(given)} prompts.")
    if mean is None and by in ("mean", "norm_mean"):
        mean = mean_embedding(model, given, image)
    images = [prompt.positions(image) for prompt in given]
    states = [_embeddings(model, prompt, image) for prompt in given]
    chosen_metrics = list(metrics) if metrics is not None else [
        AnswerLogProb(answers, batch_size=batch_size), AnswerAccuracy(answers, batch_size=batch_size)]
    out = exclude if exclude is not None else [()] * len(given)
    conditions: dict[str, Optional[Sequence[Mapping[int, float]]]] = {
        "random": None, **(match or {})}
    plans: dict[tuple[str, str, int], list[Optional[tuple[int, ...]]]] = {}
    for name, places in sets.items():
        for number, own in enumerate(places):
            outside = sorted({int(p) for p in own} - set(images[number]))
            if outside:
                raise OutOfRange(f"position {outside[0]} of set {name!r} is no image token.")
        plans["set", name, 0] = [tuple(sorted(int(p) for p in own)) or None for own in places]
        for condition, values in conditions.items():
            for seed in range(int(seeds)):
                plans[condition, name, seed] = [
                    _drawn(images[n], own, seed, out[n], None if values is None else values[n])
                    for n, own in enumerate(places)]

    def write(plan: Sequence[Optional[tuple[int, ...]]], seed: int) -> Each:
        return each([] if own is None else [patch("embed", substitute(
            states[n], [images[n].index(p) for p in own], by, mean, seed), own)]
            for n, own in enumerate(plan))

    keys = list(plans)
    found = evaluate(model, given, chosen_metrics,
                     [(), *(write(plans[key], key[2]) for key in keys)])
    names, seen = ["set", *conditions], list(sets)
    data = xr.Dataset(coords={"condition": names, "segment": seen, "seed": np.arange(int(seeds))})
    for metric in chosen_metrics:
        table = np.full((len(names), len(seen), int(seeds), len(given)), np.nan)
        for key, values in zip(keys, found[metric.name][1:]):
            known = np.array([own is not None for own in plans[key]])
            row = np.where(known, values, np.nan)
            places_ = (names.index(key[0]), seen.index(key[1]))
            table[places_ if key[0] == "set" else (*places_, key[2])] = row
        data[metric.name] = (("condition", "segment", "seed", "prompt"), table,
                             {"units": metric.unit})
        data[f"whole_{metric.name}"] = ("prompt", found[metric.name][0])
    data["count"] = (("segment", "prompt"), [[len(own) for own in sets[name]] for name in seen])
    return Result(data, {
        **model.manifest(), "measure": "object_ablation", "by": by, "seeds": int(seeds),
        "removal": f"replaced at the language model's input by {by}", "positions": "kept",
        "prompts": [prompt.digest() for prompt in given]})


def lost(
    found: Result, segment: str, condition: str = "set", metric: str = "accuracy"
) -> Float[np.ndarray, "prompt"]:
    """What each prompt loses in a metric, the mean over seeds; NaN where its set is empty.

    Only prompts answered rightly as they are count (the paper's effect: the share of these that
    becomes wrong), where accuracy was measured.
    """
    one = found[metric].sel(condition=condition, segment=segment).mean("seed", skipna=True)
    change = (found[f"whole_{metric}"] - one).values
    if "whole_accuracy" in found.data:
        change = np.where(found["whole_accuracy"].values > 0, change, np.nan)
    return change


@style()
def draw(found: Result, ax: Axes, metric: str = "accuracy") -> Axes:
    """Bars of what each set loses, with the number of its tokens, beside random sets in gray."""
    names = [str(name) for name in found["segment"].values]
    conditions = [str(name) for name in found["condition"].values]
    width = 0.8 / len(conditions)
    counts = set()
    for number, condition in enumerate(conditions):
        heights, reach = [], np.full((2, len(names)), np.nan)
        for at, name in enumerate(names):
            values = lost(found, name, condition, metric)
            values = values[np.isfinite(values)]
            heights.append(values.mean() if len(values) else np.nan)
            if len(values):
                low, high = statistics.mean(values, resamples=1000).interval
                reach[:, at] = max(0.0, heights[-1] - low), max(0.0, high - heights[-1])
                counts.add(len(values))
        bars = ax.bar(
            np.arange(len(names)) + (number - (len(conditions) - 1) / 2) * width, heights, width,
            color=color("image" if condition == "set" else "control"), yerr=reach,
            error_kw={"elinewidth": 0.7}, alpha=1.0 if number < 2 else 0.75 / (number - 1),
            label="chosen tokens" if condition == "set" else condition)
        ax.bar_label(bars, fmt="%.2g", fontsize=6)
    sizes = [float(found["count"].sel(segment=name).where(lambda x: x > 0).mean()) for name in names]
    ax.set_xticks(range(len(names)), [
        f"{name}\n({size:.3g})" for name, size in zip(names, sizes)])
    ax.axhline(0, color=color("control"), linewidth=0.8)
    ax.set_xlabel("replaced image tokens (mean number)")
    ax.set_ylabel("share that becomes wrong" if metric == "accuracy" else
                  f"loss of {metric.replace('_', ' ')}")
    ax.legend(loc="center left", bbox_to_anchor=(1.0, 0.5))
    note(ax, f"n = {' or '.join(map(str, sorted(counts)))} prompts, 95 % bootstrap intervals")
    return ax


def _drawn(
    image: Sequence[int], like: Sequence[int], seed: int, exclude: Sequence[int],
    match: Optional[Mapping[int, float]],
) -> Optional[tuple[int, ...]]:
    if not len(like):
        return None
    try:
        return random_tokens(image, like, seed=seed, exclude=exclude, match=match)
    except OutOfRange:
        return None


def _embeddings(model: Model, prompt: Prompt, image: Where) -> Float[Tensor, "patch d_model"]:
    """The visual embeddings of one prompt, as they enter block 0."""
    places = list(prompt.positions(image))
    read = model.run(prompt, read="embed", logits="none").reads["embed"].values
    return torch.as_tensor(read).reshape(len(prompt), model.d_model)[places].float()


def _cells(image: Segment) -> np.ndarray:
    """Positions of an image's cells as a grid."""
    if image.grid is None:
        raise PromptError(
            f"segment {image.name!r} has no one grid of cells; of a tiled image name one part."
        )
    boxes = image.boxes or (True,) * len(image.positions)
    cells = [p for p, box in zip(image.positions, boxes) if box is not None]
    if len(cells) != image.grid[0] * image.grid[1]:
        raise PromptError(f"segment {image.name!r} has {len(cells)} cells, but its grid is "
                          f"{image.grid[0]} x {image.grid[1]}.")
    return np.array(cells).reshape(image.grid)
