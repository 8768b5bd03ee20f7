"""Control tasks: labels that a probe can only get right by memorizing, and what is left above them.

Source    arXiv:1909.03368
"""

from typing import Any, SupportsIndex

import numpy as np
import xarray as xr

from interp.core import Result


def control_labels(labels: Any, types: Any, *, seed: SupportsIndex = 0) -> np.ndarray:
    """A label for every type (word, entity, group), drawn once from how often real labels occur.

    Example:
        >>> control_labels(["n", "v", "n", "n"], ["dog", "runs", "dog", "cat"], seed=1)
        array(['n', 'n', 'n', 'v'], dtype='<U1')

    Every sample of a type gets the same label, whatever its context, in training and test alike: a
    probe that does well on it remembers types, and what is not above it says nothing on context.

    Raises:
        ValueError: types and labels of different number, or every sample of its own type (nothing
            can be remembered then, and any selectivity looks good).
    """
    given, kinds = np.asarray(labels), np.asarray(types)
    if given.shape != kinds.shape or given.ndim != 1:
        raise ValueError(f"{given.shape} labels and {kinds.shape} types: give one of each per sample.")
    names, number = np.unique(kinds, return_inverse=True)
    if len(names) == len(given):
        raise ValueError(
            "every sample is of its own type, so no type recurs in training and test and a control "
            "task would be at chance whatever the probe; use the template, entity or group as type."
        )
    drawn = np.random.default_rng(int(seed)).choice(given, size=len(names))
    return drawn[number]


def coverage(types: Any, train: Any, test: Any) -> float:
    """Share of test samples whose type occurs in training: without it the control is no control.

    Example:
        >>> coverage(["a", "b", "a", "c"], [0, 1], [2, 3])
        0.5
    """
    kinds = np.asarray(types)
    return float(np.isin(kinds[np.asarray(test)], kinds[np.asarray(train)]).mean())


def selectivity(real: Result, control: Result) -> xr.Dataset:
    """Score on the real labels minus score on the control labels, per cell and fold.

    Both are results of `probes.sweep.sweep` with the same estimator and folds; `selectivity` is the
    mean over folds, `fold_selectivity` has every fold.

    Raises:
        ValueError: the two were not measured alike.

    Source: arXiv:1909.03368.
    """
    for name in ("metric", "estimator", "alpha", "folds", "n_samples"):
        if real.manifest[name] != control.manifest[name]:
            raise ValueError(
                f"the two sweeps differ in {name!r} ({real.manifest[name]} and "
                f"{control.manifest[name]}); measure both with the same settings."
            )
    each = real["fold_score"] - control["fold_score"]
    return xr.Dataset({"selectivity": each.mean("fold"), "fold_selectivity": each,
                       "real": real["score"], "control": control["score"]})
