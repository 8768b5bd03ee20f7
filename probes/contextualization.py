"""How much of the text before a token can be read from its state: a cheap proxy.

Paper     arXiv:2502.15007
Question  Which tokens carry most of the text before them?
Measure   log probability that linear probes of the state give to the tokens at small distances before
Cause     none: a reading by probes

The paper trains a copy of the language model that rebuilds the whole text before a token from its
states. This is not that: linear probes name the token 1, 2, 4, ... places before. It is called a proxy
wherever it is shown.
"""

from collections.abc import Sequence
from typing import Any, SupportsFloat, SupportsIndex

import numpy as np
import xarray as xr
from jaxtyping import Float, Int
from scipy.special import logsumexp
from sklearn.model_selection import GroupKFold

OFFSETS = (1, 2, 4)
FEWEST = 4
"""Training samples that a token needs to be a class of the probe."""
SOFTER = (1.0, 1.5, 2.0, 3.0, 4.0, 6.0, 10.0, 20.0, 50.0, 1000.0)
"""What discriminants may be divided by; the last leaves nothing but frequencies."""


def proxy(
    states: Float[np.ndarray, "sample d_model"],
    before: Int[np.ndarray, "sample offset"],
    *,
    groups: Any,
    folds: SupportsIndex = 2,
    classes: SupportsIndex = 512,
    shrinkage: SupportsFloat = 0.1,
    seed: SupportsIndex = 0,
) -> xr.Dataset:
    """Mean cost, in nats, of naming tokens before a sample's from its state: low is much context.

    Example:
        >>> rng = np.random.default_rng(0)
        >>> before = rng.integers(0, 3, (300, 1))
        >>> states = np.eye(3)[before[:, 0]] + 0.1 * rng.standard_normal((300, 3))
        >>> found = proxy(states, before, groups=np.arange(300) // 10)
        >>> bool(found["cost"].mean() < 0.1), round(float(found["prior"].mean()), 1)
        (True, 1.1)

    Args:
        before: ids of the tokens at some distances before every sample's; -1 where there is none.
        groups: the document of every sample: probes are fitted on other documents.
        classes: how many of the most common tokens are told apart; others are not scored.
        shrinkage: of the probes' covariance (linear discriminant analysis, whose confidence is set on
            documents of the training folds).

    Returns:
        [sample]: `cost`, `prior` (the same by the tokens' frequencies alone), means over the
        distances; NaN where no token could be scored. `scored` is the share that was.

    Raises:
        ValueError: other samples, values that are not numbers, fewer documents than folds.
    """
    if len(states) != len(before) or not np.isfinite(states).all():
        raise ValueError(f"{len(states)} states and the tokens before {len(before)}: give the same "
                         "samples, and finite numbers.")
    groups = np.asarray(groups)
    if len(np.unique(groups)) < int(folds):
        raise ValueError(f"{len(np.unique(groups))} documents cannot be split into {int(folds)} folds.")
    cost, prior = np.full(before.shape, np.nan), np.full(before.shape, np.nan)
    made = GroupKFold(int(folds), shuffle=True, random_state=int(seed))
    for train, test in made.split(states, groups=groups):
        for offset in range(before.shape[1]):
            _score(states, before[:, offset], groups, train, test, int(classes), float(shrinkage),
                   cost[:, offset], prior[:, offset])
    known = np.isfinite(cost)
    count = np.where(known.any(1), known.sum(1), np.nan)
    return xr.Dataset({
        "cost": ("sample", np.where(known, cost, 0).sum(1) / count),
        "prior": ("sample", np.where(known, prior, 0).sum(1) / count),
        "scored": float(known[before >= 0].mean()) if (before >= 0).any() else float("nan")})


def tokens_before(
    ids: Sequence[SupportsIndex], places: Sequence[SupportsIndex],
    offsets: Sequence[SupportsIndex] = OFFSETS,
) -> Int[np.ndarray, "sample offset"]:
    """The ids at some distances before each place; -1 before the text's start and for its first token.

    Example:
        >>> tokens_before([0, 7, 8, 9], [1, 3], [1, 2]).tolist()
        [[-1, -1], [8, 7]]
    """
    return np.array([[int(ids[int(p) - int(k)]) if int(p) - int(k) > 0 else -1 for k in offsets]
                     for p in places]).reshape(len(places), len(offsets))


def _score(
    states: np.ndarray, labels: np.ndarray, documents: np.ndarray, train: np.ndarray,
    test: np.ndarray, classes: int, shrinkage: float, cost: np.ndarray, prior: np.ndarray,
) -> None:
    """Fill the cost of one distance for the samples of one fold."""
    kinds, count = np.unique(labels[train], return_counts=True)
    usable = (count >= FEWEST) & (kinds >= 0)
    kinds = kinds[usable][np.argsort(-count[usable], kind="stable")[:classes]]
    fit, asked = train[np.isin(labels[train], kinds)], test[np.isin(labels[test], kinds)]
    if len(kinds) < 2 or not len(asked) or len(fit) <= len(kinds):
        return
    mean, scale = states[fit].mean(0), states[fit].std(0)
    x = (states - mean) / np.where(scale > 1e-12, scale, 1.0)
    kinds = np.sort(kinds)
    # Discriminants are too sure of themselves: by how much is told by half of the fitted documents.
    half = np.isin(documents[fit], np.unique(documents[fit])[::2])
    parts = (fit[half], fit[~half])
    costs = np.zeros(len(SOFTER))
    for own, other in (parts, parts[::-1]):
        common = np.intersect1d(np.unique(labels[own]), kinds)
        tried = other[np.isin(labels[other], common)]
        if len(common) < 2 or len(own) <= len(common) or not len(tried):
            continue
        given = discriminants(x[own], labels[own], x[tried], shrinkage)
        at = np.searchsorted(common, labels[tried])
        costs += [-_log_shares(*given, soft)[np.arange(len(tried)), at].mean() for soft in SOFTER]
    soft = SOFTER[int(costs.argmin())]
    evidence, shares = discriminants(x[fit], labels[fit], x[asked], shrinkage)
    at = np.searchsorted(kinds, labels[asked])
    cost[asked] = -_log_shares(evidence, shares, soft)[np.arange(len(asked)), at]
    prior[asked] = -np.log(shares[at])


def discriminants(
    x: Float[np.ndarray, "sample feature"], labels: Int[np.ndarray, "sample"],
    asked: Float[np.ndarray, "target feature"], shrinkage: SupportsFloat,
) -> tuple[Float[np.ndarray, "target class"], Float[np.ndarray, "class"]]:
    """Linear discriminants of asked samples without the classes' frequencies, and these.

    Example:
        >>> x, labels = np.array([[0.0], [1.0], [4.0], [5.0]]), np.array([3, 3, 8, 8])
        >>> evidence, shares = discriminants(x, labels, np.array([[4.2]]), 0.0)
        >>> int(evidence[0].argmax()), shares.tolist()
        (1, [0.5, 0.5])

    With log frequencies added and normalized they are the log probabilities of scikit-learn's
    `LinearDiscriminantAnalysis(solver="lsqr", shrinkage=...)`, which visits its classes one by one.
    """
    kinds, member = np.unique(labels, return_inverse=True)
    count = np.bincount(member)
    means = np.zeros((len(kinds), x.shape[1]))
    np.add.at(means, member, x)
    means /= count[:, None]
    within = (x.T @ x - means.T @ (means * count[:, None])) / len(x)
    within *= 1 - float(shrinkage)
    within.flat[:: len(within) + 1] += float(shrinkage) / (1 - float(shrinkage)) * np.trace(
        within) / len(within) if float(shrinkage) < 1 else 1.0
    weights = np.linalg.lstsq(within, means.T, rcond=None)[0]
    return asked @ weights - 0.5 * (means.T * weights).sum(0), count / len(x)


def _log_shares(evidence: np.ndarray, shares: np.ndarray, soft: float) -> np.ndarray:
    rows = evidence / soft + np.log(shares)
    return rows - logsumexp(rows, axis=1, keepdims=True)
