"""Positional channels: coordinates of the residual stream that rise or fall with the position.

Paper     arXiv:2406.02536
Question  Which coordinates carry absolute position, and does scaling one of them move the answer?
Measure   rank correlation of a coordinate's mean over texts with the position, and its smoothness
Cause     the coordinate scaled only where the last token attends: in its query and in the keys it
          reads; values, and all other queries, stay. Other coordinates are the control
"""

from collections.abc import Iterable, Sequence
from contextlib import ExitStack
from typing import Any, Optional, SupportsFloat, SupportsIndex, Union

import numpy as np
import torch
import xarray as xr
from jaxtyping import Float
from matplotlib.axes import Axes
from scipy import stats
from torch import Tensor

from interp.core import OutOfRange, Prompt, PromptError, Result
from interp.figures import layer_curve
from interp.models import attention as attend
from interp.models.block_calls import block_arguments
from interp.models.lane_hf import no_earlier_picture
from interp.models.model import Model
from interp.models.resume import Resumable
from interp.models.sites import first_tensor

States = Union[Float[np.ndarray, "layer position d_model"], Float[Tensor, "layer position d_model"]]


def monotonicity(mean_states: States) -> Float[np.ndarray, "layer d_model"]:
    """Absolute rank correlation of every coordinate with the position; 0 for a constant one.

    Example:
        >>> states = np.stack([np.arange(6.0), np.zeros(6)], -1)[None]
        >>> monotonicity(states).tolist()
        [[1.0, 0.0]]
    """
    x = np.asarray(torch.as_tensor(mean_states).double())
    ranks = stats.rankdata(x, axis=1)
    ranks = ranks - ranks.mean(1, keepdims=True)
    place = np.arange(x.shape[1]) - (x.shape[1] - 1) / 2
    size = np.sqrt((ranks**2).sum(1) * (place**2).sum())
    together = np.abs(np.einsum("lpd,p->ld", ranks, place))
    return np.round(np.divide(together, size, out=np.zeros_like(together), where=size > 0), 12)


def smoothness(mean_states: States) -> Float[np.ndarray, "layer d_model"]:
    """One minus the sum of absolute second differences over that of first differences.

    Example:
        >>> smoothness(np.arange(6.0)[None, :, None] ** 2).round(2).tolist()
        [[0.68]]

    1 for a straight line, negative for noise; NaN for a constant.
    """
    x = np.asarray(torch.as_tensor(mean_states).double())
    first, second = np.abs(np.diff(x, axis=1)).sum(1), np.abs(np.diff(x, n=2, axis=1)).sum(1)
    return 1 - np.divide(second, first, out=np.full_like(first, np.nan), where=first > 0)


def measure(
    model: Model, prompts: Union[Prompt, Sequence[Prompt]], *, skip: SupportsIndex = 1
) -> Result:
    """Mean states over texts, and how every coordinate follows the position.

    Example:
        >>> import interp
        >>> model = interp.open_model("backcopy-3l")
        >>> measure(model, Prompt.from_tokens(range(3, 12)))["monotonicity"].dims
        ('layer', 'channel')

    Args:
        prompts: of one length, a few dozen.
        skip: positions at the start to leave out (the start token is a case of its own).

    Returns:
        [layer, channel]: `monotonicity`, `smoothness`; [layer, position, channel]: `mean`. Layer l is
        what enters block l, so that layer 0 shows the embeddings.

    Source: arXiv:2406.02536; the two scores are the toolkit's.
    """
    given = [prompts] if isinstance(prompts, Prompt) else list(prompts)
    skip = int(skip)
    if len({len(prompt) for prompt in given}) != 1 or len(given[0]) - skip < 5:
        raise PromptError("channels need prompts of one length, of at least five positions.")
    total = np.zeros((model.n_layers, len(given[0]) - skip, model.d_model))
    for prompt in given:
        run = model.run(prompt, read="resid_pre", logits="none")
        total += run.reads["resid_pre"].values[0, :, skip:]
    mean = total / len(given)
    data = xr.Dataset({
        "monotonicity": (("layer", "channel"), monotonicity(mean)),
        "smoothness": (("layer", "channel"), smoothness(mean)),
        "mean": (("layer", "position", "channel"), mean)},
        {"layer": np.arange(model.n_layers), "position": np.arange(skip, len(given[0]))})
    return Result(data, {**model.manifest(), "measure": "positional channels", "skip": skip,
                         "n_prompts": len(given),
                         "prompts": [prompt.digest() for prompt in given]})


def choose(
    found: Result, top: SupportsIndex = 3, level: SupportsFloat = 0.9
) -> tuple[tuple[int, ...], Float[np.ndarray, "channel"]]:
    """The best channels, and the score of all: their mean monotonicity where layers have mixed.

    Only layers behind the first block count (in layer 0 nothing has been mixed yet). Candidates
    reach `level` in most of them; among these the smoothest come first. Where none does, the most
    monotone ones are given.
    """
    rows = slice(1, None) if found.data.sizes["layer"] > 1 else slice(None)
    rho, smooth = (found[k].values[rows] for k in ("monotonicity", "smoothness"))
    score = rho.mean(0)
    often = (rho >= float(level)).mean(0) > 0.5
    flat = np.nan_to_num(smooth, nan=-np.inf).mean(0)
    order = np.lexsort((-score, -flat, ~often)) if often.any() else np.argsort(-score)
    return tuple(int(c) for c in order[: int(top)]), score


def scaled_logits(
    base: Resumable, channel: SupportsIndex, factor: SupportsFloat,
    layers: Optional[Iterable[SupportsIndex]] = None,
) -> Float[Tensor, "vocab"]:
    """The last row when a channel is scaled where it attends, and nowhere else.

    Example:
        >>> import interp
        >>> model = interp.open_model("backcopy-3l")
        >>> base = model.resumable(Prompt.from_tokens(range(3, 12)))
        >>> bool(torch.allclose(scaled_logits(base, 0, 1.0), base.logits[-1], atol=1e-4))
        True

    In every chosen block the query of the last token and all keys it reads are made from the block's
    input with that coordinate scaled. Values, and the rest of the block, are made from the input as
    it is. Nobody reads the last position, so that no other row changes.

    Args:
        base: `model.resumable(prompt)`. layers: all for None.
    """
    last, number = base.length - 1, int(channel)
    chosen = set(range(base.n_layers)) if layers is None else {int(x) for x in layers}
    width = base.hidden[0].shape[-1]
    if not 0 <= number < width or not chosen <= set(range(base.n_layers)):
        raise OutOfRange(f"channels run from 0 to {width - 1}, layers from 0 to {base.n_layers - 1}.")
    every = torch.arange(base.length, device=base.lane.device)[None]
    row, reading = every[:, -1:], _Reading(base)
    x = base.hidden[0][row]
    with ExitStack() as stack, torch.no_grad():
        stack.enter_context(attend.implementation(base.lane.configs))
        stack.enter_context(attend.session(base.lane.attentions, reading))
        stack.enter_context(no_earlier_picture(base.hf))
        for layer, block in enumerate(base.blocks):
            given = base._given[layer]
            reading.made = None
            if layer in chosen:
                scaled = base.hidden[layer].clone()
                scaled[last] = x[0, 0]
                scaled[:, number] *= float(factor)
                args, kwargs = block_arguments(*given, scaled[None], every, base.length)
                reading.capturing = True
                try:
                    block.module(*args, **kwargs)
                except _Captured:
                    pass
                finally:
                    reading.capturing = False
            args, kwargs = block_arguments(*given, x, row, base.length)
            x = first_tensor(block.module(*args, **kwargs)).reshape(x.shape)
        return base._tail(x)[0, -1].float()


class _Captured(Exception):
    """Queries and keys are known: the rest of the block is not needed."""


class _Reading:
    """Attention of the last row to keys that were made from other states than its values."""

    def __init__(self, base: Resumable) -> None:
        self.base = base
        self.made: Optional[tuple[Tensor, Tensor]] = None
        self.capturing = False

    def attend(
        self, layer: int, q: Tensor, k: Tensor, v: Tensor, mask: Any, given: dict[str, Any]
    ) -> Tensor:
        if self.capturing:
            self.made = q[:, :, -1:], k
            raise _Captured
        v = torch.cat([self.base.values[layer][None, :, :-1], v], 2)
        k = torch.cat([self.base.keys[layer][None, :, :-1], k], 2)
        if self.made is not None:
            q, k = self.made
        k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (k, v))
        scores = q.float() @ k.float().transpose(2, 3) * given["scaling"]
        if given["softcap"] is not None:
            scores = torch.tanh(scores / given["softcap"]) * given["softcap"]
        scores = scores.masked_fill(~self.base.visible(layer)[-1], float("-inf"))
        if given["sinks"] is not None:
            scores = torch.cat([scores, given["sinks"].float().reshape(1, -1, 1, 1)], -1)
        p = scores.softmax(-1)[..., : k.shape[2]]
        return (p.to(v.dtype) @ v).transpose(1, 2).contiguous()


def scaling(
    model: Model, prompts: Sequence[Prompt], answers: Sequence[SupportsIndex],
    channels: Sequence[SupportsIndex], factors: Sequence[SupportsFloat],
    layers: Optional[Iterable[SupportsIndex]] = None,
) -> Result:
    """Log probability of each answer's first token with a channel scaled, for every factor.

    Choose a channel and a factor on some prompts, and report the others.

    Returns:
        [prompt, channel, factor]: `log_p` (nats), `right`; [prompt]: `base`, `base_right`.
    """
    if not prompts or len(prompts) != len(answers):
        raise PromptError(f"{len(answers)} answers for {len(prompts)} prompts: give one for each.")
    sizes = [float(factor) for factor in factors]
    shape = (len(prompts), len(channels), len(sizes))
    log_p, right = np.zeros(shape), np.zeros(shape)
    start, start_right = np.zeros(len(prompts)), np.zeros(len(prompts))
    kept = None if layers is None else [int(x) for x in layers]
    for i, (prompt, answer) in enumerate(zip(prompts, answers)):
        base, token = model.resumable(prompt), int(answer)
        row = base.logits[-1].float()
        start[i], start_right[i] = float(row.log_softmax(-1)[token]), float(row.argmax() == token)
        for j, channel in enumerate(channels):
            for k, factor in enumerate(sizes):
                row = scaled_logits(base, channel, factor, kept)
                log_p[i, j, k] = float(row.log_softmax(-1)[token])
                right[i, j, k] = float(int(row.argmax()) == token)
    dims = ("prompt", "channel", "factor")
    data = xr.Dataset({"log_p": (dims, log_p), "right": (dims, right), "base": ("prompt", start),
                       "base_right": ("prompt", start_right)},
                      {"channel": [int(c) for c in channels], "factor": sizes})
    return Result(data, {**model.manifest(), "measure": "scaled channel", "where": "query of the last "
                         "token and the keys it reads", "decode": "not measured",
                         "prompts": [prompt.digest() for prompt in prompts]})


def draw(found: Result, ax: Axes, channels: Sequence[int], layer: SupportsIndex) -> Axes:
    """Mean of chosen channels by position, each in units of its own spread."""
    mean = found["mean"].sel(layer=int(layer), drop=True)
    curves = {}
    for channel in channels:
        one = mean.isel(channel=int(channel))
        curves[f"channel {channel}"] = (one - one.mean()) / max(float(one.std()), 1e-30)
    return layer_curve.draw(ax, curves, along="position", label=f"mean at layer {int(layer)} (sd)")
