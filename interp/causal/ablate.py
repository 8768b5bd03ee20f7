"""Ablation of heads: mean outputs to replace by, and everything but the chosen heads."""

from collections.abc import Iterable, Sequence
from typing import Any, Optional, Union

import numpy as np
import xarray as xr
from jaxtyping import Float

from interp.core import Head, Prompt, ablate
from interp.core.head import HeadLike, check_heads
from interp.core.head import heads as as_heads
from interp.core.intervention import AblateHeads, Phase
from interp.models.model import Model

KINDS = ("zero", "mean", "uniform", "resample")


def mean_output(
    model: Model, prompts: Union[Prompt, Sequence[Prompt]], *, batch_size: int = 8
) -> Float[np.ndarray, "layer head d_head"]:
    """The mean output of every head (before the output projection), for `ablate(..., "mean")`.

    Example:
        >>> import interp
        >>> model = interp.open_model("backcopy-1l")
        >>> value = mean_output(model, [Prompt.from_tokens(range(3, 12))])
        >>> value.shape == (model.n_layers, model.n_heads, model.d_head)
        True

    Pooled over prompts and positions, each position weighing the same: right for prompts of any
    length. One prompt at a time is held in memory.
    """
    given = [prompts] if isinstance(prompts, Prompt) else list(prompts)
    total, count = np.zeros((model.n_layers, model.n_heads, model.d_head)), 0
    for start in range(0, len(given), batch_size):
        part = given[start : start + batch_size]
        z = model.run(part, read="z", logits="none", batch_size=batch_size).reads["z"]
        total += np.nansum(z.values.astype(np.float64), axis=(0, 2))
        count += sum(map(len, part))
    return (total / count).astype(np.float32)


def resampled_output(model: Model, prompt: Prompt) -> Float[np.ndarray, "layer position head d_head"]:
    """The outputs of every head in a prompt, to put into another one of equal length.

    Example:
        >>> import interp
        >>> model = interp.open_model("backcopy-1l")
        >>> value = resampled_output(model, Prompt.from_tokens(range(3, 12)))
        >>> interp.ablate("L0H0", "resample", value=value).by
        'resample'
    """
    found: xr.DataArray = model.run(prompt, read="z", logits="none").reads["z"]
    return found.values[0]


def keep_only(
    heads: Iterable[HeadLike],
    n_layers: int,
    n_heads: int,
    by: str = "mean",
    phase: Phase = "all",
    value: Any = None,
    layers: Optional[Iterable[int]] = None,
) -> AblateHeads:
    """Ablate every head but these: are they sufficient?

    Example:
        >>> keep_only(["L0H0"], 2, 2, by="zero").heads
        (L0H1, L1H0, L1H1)

    Args:
        layers: ablate in these blocks only; all for None.
    """
    kept = set(as_heads(heads))
    check_heads(kept, n_layers, n_heads)
    where = range(n_layers) if layers is None else layers
    others = [Head(a, b) for a in where for b in range(n_heads) if Head(a, b) not in kept]
    return ablate(others, by, phase, value)
