"""Hidden sinks and their calibration (ACT): sinks beyond the first token, spread over the others.

Paper     arXiv:2406.15765
Question  Which tokens other than the first collect attention, and does the answer need them to?
Measure   the mean attention a key receives from the queries that see it, against a multiple of 1/N
Cause     keep a fraction of the attention on those sinks, give the rest to all other keys of the row
"""

from collections.abc import Iterable, Sequence
from typing import Literal, Optional, SupportsFloat, SupportsIndex, Union

import numpy as np
import torch
import xarray as xr
from jaxtyping import Bool, Float
from matplotlib.axes import Axes
from torch import Tensor

from interp.core import Prompt, Result, redistribute
from interp.core.errors import NumericalError, PromptError
from interp.core.head import Head, HeadLike, check_heads
from interp.core.head import heads as as_heads
from interp.core.intervention import Each, Redistribute
from interp.figures import heat
from interp.models.model import Model
from interp.stream.reducers import Received

Rule = Literal["relative", "fixed"]
FIXED = 0.1
"""Threshold of the released code, whatever the length."""

TIMES = 5.0
"""A sink receives more than this many times a uniform share; not confirmed in the paper."""

KEPT = 0.4
"""What calibration leaves of the attention on hidden sinks (beta)."""


def threshold(n_keys: SupportsIndex, rule: Rule = "relative", times: SupportsFloat = TIMES) -> float:
    """The mean received attention above which a key is a sink.

    Example:
        >>> threshold(100), threshold(100, "fixed")
        (0.05, 0.1)

    Source: arXiv:2406.15765: alpha / N; the released code: 0.1 (the same at N = 50).
    """
    if rule not in ("relative", "fixed"):
        raise ValueError(f"the rule must be 'relative' or 'fixed', not {rule!r}.")
    return float(times) / int(n_keys) if rule == "relative" else FIXED


def sinks(
    received: Float[Tensor | np.ndarray, "*batch key"],
    rule: Rule = "relative",
    *,
    times: SupportsFloat = TIMES,
    early: bool = True,
    first: SupportsIndex = 1,
) -> Bool[Tensor, "*batch key"]:
    """True for the hidden sinks: keys beyond the first token that receive too much attention.

    Example:
        >>> received = torch.tensor([0.6, 0.02, 0.55, 0.03, 0.5, 0.1, 0.2, 0.9, 1.0, 1.0])
        >>> sinks(received, "fixed").nonzero()[:, 0].tolist()
        [2, 4]
        >>> sinks(received, "fixed", early=False).nonzero()[:, 0].tolist()
        [2, 4, 6, 7, 8, 9]

    Args:
        received: mean attention from the queries that see the key ("received").
        early: only keys of the first half. A late key has few queries, its own among them, so that
            any locally attended token passes: without this the rule flags late keys of models that
            have no such sink.
        first: keys before it are never hidden sinks; 1 leaves out the first token.

    NaN (keys that a window hides from most queries) is no sink.

    Raises:
        NumericalError: infinity, or a negative mass.

    Source: arXiv:2406.15765; `early` is this toolkit's.
    """
    values = torch.as_tensor(received)
    if bool(torch.isinf(values).any()) or bool((values < 0).any()):
        raise NumericalError("received attention must be finite and not negative.")
    n_keys = values.shape[-1]
    key = torch.arange(n_keys, device=values.device)
    inside = (key >= int(first)) & (key < (n_keys // 2 if early else n_keys))
    return (values > threshold(n_keys, rule, times)) & inside


def calibrate(
    attention: Float[Tensor | np.ndarray, "*batch head query key"],
    hidden: Bool[Tensor | np.ndarray, "*batch head key"],
    kept: SupportsFloat = KEPT,
) -> Float[Tensor, "*batch head query key"]:
    """Rows with `kept` of the attention on hidden sinks, the rest given to the other keys pro rata.

    Example:
        >>> row = torch.tensor([[[0.25, 0.5, 0.25]]])
        >>> calibrate(row, torch.tensor([[False, True, False]]), 0.5)
        tensor([[[0.3750, 0.2500, 0.3750]]])

    Row sums stay. A row with everything on its sinks is left alone.

    Source: arXiv:2406.15765: A'[s] = beta A[s] for sinks; the others share what is freed.
    """
    beta = float(kept)
    if not 0 <= beta <= 1:
        raise ValueError(f"kept must lie between 0 and 1, not {beta}.")
    rows = torch.as_tensor(attention)
    sink = torch.as_tensor(hidden, device=rows.device)[..., None, :].expand(rows.shape)
    on = rows.masked_fill(~sink, 0.0).sum(-1, keepdim=True)
    off = rows.masked_fill(sink, 0.0).sum(-1, keepdim=True)
    gain = 1.0 + (1.0 - beta) * on / off.clamp_min(1e-37)
    changed = torch.where(sink, rows * beta, rows * gain)
    return torch.where(off > 0, changed, rows)


def measure(
    model: Model,
    prompts: Sequence[Prompt],
    *,
    times: SupportsFloat = TIMES,
    batch_size: int = 8,
) -> Result:
    """Hidden sinks of every head in every prompt, by both rules, early and at any place.

    Example:
        >>> import interp
        >>> model = interp.open_model("backcopy-1l")
        >>> found = measure(model, [Prompt.from_tokens(range(3, 24))])
        >>> found["count"].dims, found["hidden"].dims
        (('rule', 'range', 'prompt', 'layer', 'head'), ('prompt', 'layer', 'head', 'key'))

    Returns:
        `count` [rule, range, prompt, layer, head]: hidden sinks (rule "relative" or "fixed", range
        "early" or "all"); `hidden` [prompt, layer, head, key]: the early ones by the relative
        rule, which `interventions` takes; `received` of the same shape; `length` [prompt].

    Source: arXiv:2406.15765. Streamed: no attention matrix is kept.
    """
    if not prompts:
        raise PromptError("no prompts to run: give at least one.")
    run = model.run(prompts, stats=[Received()], logits="none", batch_size=batch_size)
    received = run.stats["received"].transpose("prompt", "layer", "head", "key")
    shape = received.shape
    hidden = np.zeros(shape, dtype=bool)
    count = np.zeros((2, 2, *shape[:3]), dtype=int)
    for i, prompt in enumerate(prompts):
        n = len(prompt)
        own = torch.tensor(received.values[i][..., :n])
        for r, rule in enumerate(("relative", "fixed")):
            for e, early in enumerate((True, False)):
                found = sinks(own, rule, times=times, early=early)
                count[r, e, i] = found.sum(-1).numpy()
                if r == e == 0:
                    hidden[i, ..., :n] = found.numpy()
    grid = ("prompt", "layer", "head")
    data = xr.Dataset(
        {"count": (("rule", "range", *grid), count), "hidden": ((*grid, "key"), hidden),
         "received": ((*grid, "key"), received.values),
         "length": ("prompt", [len(prompt) for prompt in prompts])},
        {"rule": ["relative", "fixed"], "range": ["early", "all"],
         "layer": np.arange(shape[1]), "head": np.arange(shape[2])},
    )
    return Result(data, {**model.manifest(), "measure": "calibration", "times": float(times),
                         "n_prompts": len(prompts)})


def scope(n_layers: SupportsIndex) -> range:
    """Layers that the paper calibrates: not the first two, not the last (2 to 30 of 32).

    Example:
        >>> scope(32), scope(4)
        (range(2, 31), range(2, 3))
    """
    return range(min(2, int(n_layers)), max(int(n_layers) - 1, 0))


def interventions(
    found: Result,
    heads: Union[HeadLike, Iterable[HeadLike]],
    kept: SupportsFloat = KEPT,
) -> Each:
    """Calibrate these heads in the measured prompts: for `write=` of `model.run`, in that order.

    Example:
        >>> import interp
        >>> model = interp.open_model("reader")
        >>> prompts = [Prompt.from_tokens(range(3, 43)), Prompt.from_tokens(range(9, 49))]
        >>> found = measure(model, prompts)
        >>> len(interventions(found, "L1H0").writes)
        2

    Sinks are those of the unchanged run, so that prefill and decoding calibrate the same keys (the
    released code recomputes them in each pass, and differs between the two). Row sums stay. A head
    without a hidden sink in a prompt is left alone there.

    Raises:
        OutOfRange: a head that was not measured.
    """
    chosen = as_heads(heads)
    hidden = found["hidden"]
    check_heads(chosen, hidden.sizes["layer"], hidden.sizes["head"])
    writes = []
    for prompt in range(hidden.sizes["prompt"]):
        one: list[Redistribute] = []
        for head in chosen:
            keys = np.flatnonzero(hidden.values[prompt, head.layer, head.head]).tolist()
            if keys:
                one.append(redistribute(
                    keys, "all", 1.0 - float(kept), heads=[head], min_nonsink_share=None,
                    min_image_mass=None,
                ))
        writes.append(tuple(one))
    return Each(tuple(writes))


def candidates(found: Result, layers: Optional[Iterable[SupportsIndex]] = None) -> list[Head]:
    """Heads with a hidden sink in some prompt, those with most of them first.

    `layers`: where to look; all for None.
    """
    here = found["hidden"].any("key").mean("prompt").values
    allowed = set(range(here.shape[0])) if layers is None else {int(x) for x in layers}
    ranked = sorted(np.argwhere(here > 0).tolist(), key=lambda x: (-here[x[0], x[1]], x))
    return [Head(layer, head) for layer, head in ranked if layer in allowed]


def draw(found: Result, ax: Axes, rule: Rule = "relative", where: str = "early") -> Axes:
    """Head map of the mean number of hidden sinks per prompt."""
    values = found["count"].sel(rule=rule, range=where).mean("prompt")
    return heat.draw(ax, values, label="hidden sinks per prompt")
