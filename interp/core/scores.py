"""Scores per attention head, with what a reader needs to trust them."""

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any, Optional

import numpy as np
import pandas as pd
import xarray as xr

from interp.core.head import Head, HeadLike, heads

DIMS = (
    "batch", "prompt", "sample", "layer", "head", "kv_head", "query", "key", "position",
    "segment", "offset", "rank", "step", "d_model", "d_head", "d_vocab", "patch",
)
"""The closed list of axis names of labelled arrays."""


@dataclass(frozen=True, eq=False)
class HeadScores:
    """One number per (layer, head), with frequency, standard error and eligibility beside it.

    `eligible` is False where a head could not have shown the behavior (for example because its
    window is too short); such heads are left out of every ranking.

    Example:
        >>> scores = HeadScores.of(np.array([[0.1, 0.9], [0.4, 0.2]]))
        >>> scores.top(2), scores.above(0.3)
        ([L0H1, L1H0], [L0H1, L1H0])
        >>> scores.without(Head(0, 1)).max()
        0.4
    """

    scores: xr.DataArray
    frequency: Optional[xr.DataArray] = None
    standard_error: Optional[xr.DataArray] = None
    eligible: Optional[xr.DataArray] = None

    def __post_init__(self) -> None:
        if self.scores.dims != ("layer", "head"):
            raise ValueError(f"scores must be [layer, head], not {list(self.scores.dims)}.")

    @classmethod
    def of(cls, scores: Any, **more: Any) -> "HeadScores":
        """From plain `[layer, head]` arrays; layers and heads are numbered from 0."""

        def label(values: Any) -> xr.DataArray:
            values = np.asarray(values)
            if values.ndim != 2:
                raise ValueError(f"scores must be [layer, head], not {values.ndim}-dimensional.")
            layer, head = (np.arange(n) for n in values.shape)
            return xr.DataArray(values, {"layer": layer, "head": head}, ("layer", "head"))

        return cls(label(scores), **{k: label(v) for k, v in more.items() if v is not None})

    def _ranked(self) -> Any:
        """The eligible scores as a series by (layer, head), highest first."""
        values = self.scores
        if self.eligible is not None:
            values = values.where(self.eligible)
        series = values.to_series().dropna()
        # Ties go to the earlier layer, then the lower head number.
        return series.sort_values(ascending=False, kind="stable")

    def top(self, k: int) -> list[Head]:
        """The k highest heads, best first; ties to the earlier layer and head."""
        return [Head(int(a), int(b)) for a, b in self._ranked().index[:k]]

    def above(self, threshold: float) -> list[Head]:
        """Heads with a score strictly above the threshold, best first."""
        ranked = self._ranked()
        return [Head(int(a), int(b)) for a, b in ranked[ranked > threshold].index]

    def without(self, given: HeadLike | Iterable[HeadLike]) -> "HeadScores":
        """A copy in which these heads are not eligible."""
        eligible = self.eligible
        if eligible is None:
            eligible = xr.ones_like(self.scores, dtype=bool)
        eligible = eligible.copy(deep=True)
        for head in heads(given):
            eligible.loc[{"layer": head.layer, "head": head.head}] = False
        return replace(self, eligible=eligible)

    def max(self) -> float:
        """The highest score among eligible heads, NaN if there is none."""
        ranked = self._ranked()
        return float(ranked.iloc[0]) if len(ranked) else float("nan")

    def __getitem__(self, head: HeadLike) -> float:
        (one,) = heads([head])
        return float(self.scores.sel(layer=one.layer, head=one.head))

    def __array__(self, dtype: Any = None, copy: Any = None) -> np.ndarray:
        return np.asarray(self.scores.values, dtype=dtype)

    def to_dataframe(self) -> pd.DataFrame:
        """A row per head, with every quantity that is known, best first."""
        parts = {"score": self.scores, "frequency": self.frequency,
                 "standard_error": self.standard_error, "eligible": self.eligible}
        frame = pd.DataFrame({k: v.to_series() for k, v in parts.items() if v is not None})
        return frame.sort_values("score", ascending=False, kind="stable").reset_index()
