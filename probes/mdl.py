"""Minimum description length: how few bits tell the labels to someone who has the states.

Accuracy says whether labels can be read, the description length also how hard that is: labels are
sent in growing portions, each coded with a probe fitted on the portions before it.

Source    arXiv:2003.12298, online code
"""

from collections.abc import Sequence
from typing import Any, Literal, Optional, SupportsIndex

import numpy as np
import xarray as xr
from jaxtyping import Float

from interp.core import Result
from probes.linear import fitted_copy, logistic

FRACTIONS = (0.001, 0.002, 0.004, 0.008, 0.016, 0.032, 0.0625, 0.125, 0.25, 0.5, 1.0)
"""Ends of the portions, as shares of the samples, as in the paper's released code."""


def online_code(
    states: Float[np.ndarray, "sample d_model"],
    labels: Any,
    *,
    groups: Optional[Any],
    estimator: Optional[Any] = None,
    fractions: Sequence[float] = FRACTIONS,
    orders: SupportsIndex = 5,
    reference: Literal["uniform", "prior"] = "prior",
    seed: SupportsIndex = 0,
) -> Result:
    """Code length of the labels given the states, in bits, and the compression it means.

    Example:
        >>> rng = np.random.default_rng(0)
        >>> y = np.arange(400) % 2
        >>> X = rng.standard_normal((400, 3)) + 4 * y[:, None]
        >>> found = online_code(X, y, groups=None)
        >>> bool(found["compression"].mean() > 3)
        True

    Args:
        groups: samples that belong together (they stay in one portion); None says they do not.
        estimator: anything with `predict_proba`, fitted anew for every portion; logistic regression
            for None.
        fractions: ends of the portions. Portions too small to hold two classes are coded with the
            reference code, like the first one.
        orders: random orders of the samples (or groups) that the length is measured in.
        reference: what is compressed: "prior" codes with the frequency of each class, "uniform" with
            log2 of the number of classes as in the paper (unbalanced labels then seem compressible
            without any state).

    Returns:
        [order]: `bits`, `reference_bits`, `compression` (reference over code length: 1 or less where
        nothing is encoded); [order, portion]: `portion_bits`.

    Raises:
        ValueError: one class only, wrong lengths, fractions that do not rise to 1.

    Source: arXiv:2003.12298; everything is in bits here (the released code adds nats to bits).
    """
    X, given = np.asarray(states, dtype=float), np.asarray(labels)
    if X.ndim != 2 or given.shape != (len(X),):
        raise ValueError(f"states {X.shape} and labels {given.shape}: give one label per sample.")
    classes, y = np.unique(given, return_inverse=True)
    if len(classes) < 2:
        raise ValueError("all samples have the same label: there is nothing to code.")
    ends = [float(f) for f in fractions]
    if ends != sorted(set(ends)) or not ends or ends[0] <= 0 or ends[-1] != 1:
        raise ValueError(f"fractions must rise and end at 1, not {tuple(fractions)}.")
    blocks = np.arange(len(y)) if groups is None else np.unique(
        np.asarray(groups), return_inverse=True)[1]
    share = np.bincount(y) / len(y)
    each = -np.log2(share)[y] if reference == "prior" else np.full(len(y), np.log2(len(classes)))
    probe = logistic() if estimator is None else estimator
    rng = np.random.default_rng(int(seed))
    portions = np.stack([_one_order(X, y, blocks, each, probe, ends, rng, len(classes))
                         for _ in range(int(orders))])
    bits = portions.sum(1)
    data = xr.Dataset(
        {"bits": ("order", bits), "reference_bits": ("order", np.full(len(bits), each.sum())),
         "compression": ("order", each.sum() / bits), "portion_bits": (("order", "portion"), portions)},
        {"portion": ends})
    return Result(data, {"measure": "online code", "reference": reference, "unit": "bits",
                         "estimator": str(probe), "n_samples": len(y), "seed": int(seed),
                         "grouped": groups is not None, "classes": [str(c) for c in classes]})


def _one_order(
    X: np.ndarray, y: np.ndarray, blocks: np.ndarray, reference: np.ndarray, probe: Any,
    ends: list[float], rng: np.random.Generator, n_classes: int,
) -> np.ndarray:
    units = rng.permutation(int(blocks.max()) + 1)
    order = np.concatenate([np.flatnonzero(blocks == unit) for unit in units])
    # A portion ends where the group that crosses its end does.
    edges = np.cumsum([int((blocks == unit).sum()) for unit in units])
    stops = [int(edges[np.searchsorted(edges, round(f * len(y)))]) if f < 1 else len(y) for f in ends]
    lengths, start = [], 0
    for stop in stops:
        part, before = order[start:stop], order[:start]
        if not len(part):
            lengths.append(0.0)
        elif len(np.unique(y[before])) < 2:
            lengths.append(float(reference[part].sum()))
        else:
            fitted = fitted_copy(probe, X[before], y[before])
            p = np.zeros((len(part), n_classes))
            p[:, fitted.classes_] = fitted.predict_proba(X[part])
            # A class that the probe has not met is not impossible: one sample's worth of doubt.
            p = (p * len(before) + 1 / n_classes) / (len(before) + 1)
            lengths.append(float(-np.log2(p[np.arange(len(part)), y[part]]).sum()))
        start = stop
    return np.array(lengths)
