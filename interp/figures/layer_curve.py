"""Curves against depth: a mean per layer, with a bootstrap band over the prompts."""

from collections.abc import Mapping, Sequence
from typing import Any, Optional

import numpy as np
import xarray as xr
from jaxtyping import Float
from matplotlib.axes import Axes

from interp.figures.style import CYCLE, color, note, some_ticks, style, write_number

DASHES = ("-", "--", "-.", ":")


def band(
    values: Float[np.ndarray, "sample layer"],
    confidence: float = 0.95,
    resamples: int = 1000,
    seed: int = 0,
) -> tuple[Float[np.ndarray, "layer"], Float[np.ndarray, "layer"]]:
    """The percentile bootstrap interval of the mean over samples, for every layer.

    Whole samples are drawn, so that layers stay paired; NaN is left out of the mean.

    Example:
        >>> low, high = band(np.full((5, 2), 3.0))
        >>> low, high
        (array([3., 3.]), array([3., 3.]))
    """
    n = len(values)
    known = np.isfinite(values)
    draws = np.random.default_rng(seed).multinomial(n, np.full(n, 1 / n), size=resamples)
    total, count = draws @ np.where(known, values, 0.0), draws @ known.astype(float)
    means = np.where(count > 0, total / np.maximum(count, 1), np.nan)
    edge = (1 - confidence) / 2
    low, high = np.full(values.shape[1], np.nan), np.full(values.shape[1], np.nan)
    for layer in np.nonzero(known.any(0))[0]:
        low[layer], high[layer] = np.nanquantile(means[:, layer], [edge, 1 - edge])
    return low, high


@style()
def draw(
    ax: Axes,
    curves: Mapping[str, Any],
    *,
    label: str,
    along: str = "layer",
    x: Optional[str] = None,
    at: Optional[Sequence[Any]] = None,
    roles: Optional[Mapping[str, str]] = None,
    log: bool = False,
    confidence: float = 0.95,
    resamples: int = 1000,
    seed: int = 0,
    legend: bool = True,
) -> Axes:
    """Draw named curves against the layer, on true block numbers.

    Example:
        >>> from interp.figures.style import canvas
        >>> figure, ax = canvas()
        >>> norms = xr.DataArray(np.random.rand(20, 6), dims=("prompt", "layer"))
        >>> ax = draw(ax, {"first token": norms + 5, "control": norms}, label="norm",
        ...           roles={"first token": "primary", "control": "control"})
        >>> ax.get_xlabel(), len(ax.lines), len(ax.collections)
        ('layer', 2, 2)

    Args:
        curves: name -> `[layer]`, or `[sample, layer]` whose mean and bootstrap band are drawn.
            A labelled array may have its axes in any order and keeps its layer numbers.
        label: what the y axis shows, with its unit.
        along: the axis to draw along, "layer" or any other ("step", "epsilon").
        x: label of the x axis, instead of `along`.
        at: numbers of that axis, for plain arrays.
        roles: curve name -> meaning of its color, see `style.COLORS`; controls are gray and
            lie behind. Curves of one role differ by their dashes.
        log: logarithmic y axis.
        confidence, resamples, seed: of the band.

    Raises:
        ValueError: no curves, an axis other than `along` and one for samples, or a role that
            names no curve.
    """
    if not curves:
        raise ValueError("no curves to draw.")
    roles = dict(roles or {})
    for name in roles:
        if name not in curves:
            raise ValueError(
                f"there is no curve {name!r} to color; the curves are: {', '.join(curves)}."
            )
    uncolored = [name for name in curves if name not in roles]
    used: dict[str, int] = {}
    marks: list[Any] = []
    sizes = set()
    for name, given in curves.items():
        where, values = _read(name, given, along, at)
        marks += [mark for mark in where if mark not in marks]
        role = roles.get(name)
        hue = color(role) if role else CYCLE[uncolored.index(name) % len(CYCLE)]
        dashes = DASHES[used.get(hue, 0) % len(DASHES)]
        used[hue] = used.get(hue, 0) + 1
        behind = 1 if role in ("control", "other") else 2
        known = np.isfinite(values)
        mean = np.where(known.any(0), np.nansum(values, 0) / np.maximum(known.sum(0), 1), np.nan)
        ax.plot(where, mean, dashes, color=hue, label=name, zorder=behind + 1,
                marker="o" if len(where) <= 12 else None)
        if len(values) > 1:
            low, high = band(values, confidence, resamples, seed)
            ax.fill_between(where, low, high, color=hue, alpha=0.18, linewidth=0, zorder=behind)
            sizes.add(len(values))
    if log:
        ax.set_yscale("log")
    ax.grid(True, axis="y")
    ax.set_xlabel(along.replace("_", " ") if x is None else x)
    ax.set_ylabel(label)
    if along == "layer":
        marks.sort()
        chosen = [marks[i] for i in some_ticks(marks)]
        ax.set_xticks(chosen, [write_number(mark) for mark in chosen])
    if legend and len(curves) > 1:
        ax.legend()
    if sizes:
        count = str(sizes.pop()) if len(sizes) == 1 else f"{min(sizes)} to {max(sizes)}"
        note(ax, f"mean, {confidence:.0%} bootstrap band, n = {count}".replace("%", " %"))
    return ax


def _read(name: str, given: Any, along: str, at: Any) -> tuple[list, np.ndarray]:
    """The marks on the axis and `[sample, layer]` values; one row where there is one curve."""
    if isinstance(given, xr.DataArray):
        if along not in given.dims or given.ndim > 2:
            raise ValueError(
                f"curve {name!r} has the axes {list(given.dims)}; it needs {along!r} and at most "
                "one axis of samples: average the others first."
            )
        given = given.transpose(..., along)
        where = given[along].values if along in given.coords else np.arange(given.sizes[along])
        values = given.values
    else:
        values = np.asarray(given)
        where = at if at is not None else np.arange(values.shape[-1] if values.ndim else 0)
    values = np.asarray(values, dtype=float)
    if values.ndim not in (1, 2) or 0 in values.shape:
        raise ValueError(
            f"curve {name!r} has the shape {values.shape}; give [{along}] or [sample, {along}]."
        )
    values = np.atleast_2d(values)
    marks = [mark.item() if hasattr(mark, "item") else mark for mark in where]
    if len(marks) != values.shape[1]:
        raise ValueError(
            f"curve {name!r} has {values.shape[1]} values along {along!r}, but {len(marks)} "
            "numbers are given for that axis."
        )
    return marks, values
