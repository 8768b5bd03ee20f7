"""Erasing a concept from states, so that no linear probe can read it, and asking what that breaks.

`Leace` removes exactly what any linear probe could use with the smallest change; `Inlp` projects out
one probe's direction after another. What is decodable is not therefore used: the causal arm edits a
model's states in this way, against `RandomProjection` of the same rank (amnesic probing).

Sources   arXiv:2306.03819 (LEACE), arXiv:2004.07667 (INLP), arXiv:2006.00995 (amnesic probing)
"""

from typing import Any, Optional, SupportsFloat, SupportsIndex

import numpy as np
from jaxtyping import Float
from sklearn.base import BaseEstimator, TransformerMixin
from sklearn.preprocessing import OneHotEncoder
from sklearn.utils.multiclass import type_of_target
from sklearn.utils.validation import check_array, check_is_fitted, validate_data

from probes.linear import direction, fitted_copy, logistic


class _Affine(TransformerMixin, BaseEstimator):
    """x -> x - P (x - mean), with a projection P = left right^T of few directions."""

    mean_: np.ndarray
    left_: np.ndarray
    right_: np.ndarray

    def transform(self, X: Any) -> Float[np.ndarray, "sample d_model"]:
        """States without the concept."""
        check_is_fitted(self)
        X = validate_data(self, X, dtype=np.float64, reset=False)
        return X - ((X - self.mean_) @ self.right_) @ self.left_.T

    @property
    def projection_(self) -> Float[np.ndarray, "d_model d_model"]:
        """P as one matrix, which is large in a large model: made anew at every call."""
        return self.left_ @ self.right_.T

    @property
    def rank_(self) -> int:
        """Number of directions that are removed."""
        return int(self.left_.shape[1])


class Leace(_Affine):
    """Least-squares concept erasure: the smallest affine change after which nothing covaries.

    Example:
        >>> rng = np.random.default_rng(0)
        >>> y = np.arange(200) % 2
        >>> X = rng.standard_normal((200, 6)) + 3 * y[:, None]
        >>> clean = Leace().fit_transform(X, y)
        >>> before, after = (abs(np.cov(x.T, y)[-1, :-1]).max() for x in (X, clean))
        >>> bool(before > 0.5), bool(after < 1e-10)
        (True, True)

    Args:
        tolerance: singular values of the whitened cross-covariance, relative to the largest, under
            which nothing is removed; and eigenvalues of the covariance, likewise, under which the
            states are taken not to vary.
        shrinkage: share of a sphere mixed into the covariance (0: none), for fewer samples than
            dimensions; the erasure is exact on the fitted samples only without it.

    The concept `y` is classes (one-hot encoded: as one number three classes would leave two of
    them readable) or real numbers, `[sample]` or `[sample, concept]`. Fit on training samples; what
    a fresh probe reads on held-out ones is the check.

    Attributes: `mean_`, `left_` and `right_` [d_model, direction], `projection_`, `rank_`.

    Source: arXiv:2306.03819, theorem 4.3: r(x) = x - W^+ P W (x - mean).
    """

    def __init__(self, tolerance: Any = 1e-6, shrinkage: Any = 0.0) -> None:
        self.tolerance = tolerance
        self.shrinkage = shrinkage

    def fit(self, X: Any, y: Any) -> "Leace":
        """Covariances of states and concept."""
        X = validate_data(self, X, dtype=np.float64, ensure_min_samples=2)
        z = _concept(y, len(X))
        self.mean_ = X.mean(0)
        centered, concept = X - self.mean_, z - z.mean(0)
        # Where no state varies nothing covaries with the concept: the states' own span is enough.
        _, s, vectors = np.linalg.svd(centered, full_matrices=False)
        values = s**2 / len(X)
        if self.shrinkage:
            values = (1 - self.shrinkage) * values + self.shrinkage * values.sum() / X.shape[1]
        kept = s**2 > self.tolerance * max((s**2).max(initial=0.0), np.finfo(float).tiny)
        vectors, root = vectors[kept].T, np.sqrt(values[kept])
        across = (vectors.T @ (centered.T @ concept / len(X))) / root[:, None]
        u, s, _ = np.linalg.svd(across, full_matrices=False)
        u = u[:, s > self.tolerance * max(1.0, s.max(initial=0.0))]
        self.left_ = vectors @ (root[:, None] * u)
        self.right_ = vectors @ (u / root[:, None])
        return self

    def __sklearn_tags__(self) -> Any:
        tags = super().__sklearn_tags__()
        tags.target_tags.required = True
        return tags


class Inlp(_Affine):
    """Iterative null-space projection: fit a probe, project its directions out, and again.

    Example:
        >>> rng = np.random.default_rng(0)
        >>> y = np.arange(200) % 2
        >>> X = rng.standard_normal((200, 6)) + 3 * y[:, None]
        >>> Inlp(rounds=2).fit(X, y).rank_
        2

    Args:
        rounds: probes at most. stop: stop when a probe's training accuracy is at most the share of
            the most frequent class plus this.
        estimator: a linear probe with `coef_`; logistic regression for None.

    Source: arXiv:2004.07667; projections are onto the complement of all directions together.
    """

    def __init__(
        self, rounds: Any = 10, stop: Any = 0.01, estimator: Optional[Any] = None
    ) -> None:
        self.rounds = rounds
        self.stop = stop
        self.estimator = estimator

    def fit(self, X: Any, y: Any) -> "Inlp":
        """Directions of probe after probe. ValueError for one class only."""
        X, y = validate_data(self, X, y, dtype=np.float64)
        classes, counts = np.unique(y, return_counts=True)
        if len(classes) < 2:
            raise ValueError("all samples have the same label, so there is one class only.")
        self.mean_ = X.mean(0)
        rows = basis = np.zeros((0, X.shape[1]))
        probe = logistic() if self.estimator is None else self.estimator
        for _ in range(int(self.rounds)):
            left = X - (X - self.mean_) @ basis.T @ basis
            fitted = fitted_copy(probe, left, y)
            if fitted.score(left, y) <= counts.max() / len(y) + self.stop:
                break
            # What is found again in what was removed already is noise of the fit.
            found = direction(fitted)
            rows = np.concatenate([rows, found - found @ basis.T @ basis])
            _, s, basis = np.linalg.svd(rows, full_matrices=False)
            basis = basis[s > 1e-8 * s.max()]
        self.left_ = self.right_ = basis.T
        return self

    def __sklearn_tags__(self) -> Any:
        tags = super().__sklearn_tags__()
        tags.target_tags.required = True
        return tags


class TurnedAtRandom(_Affine):
    """Changes every state exactly as much as another erasure does, in directions turned at random.

    Example:
        >>> X = np.random.default_rng(0).standard_normal((50, 6))
        >>> eraser = Leace().fit(X, X[:, 0] > 0)
        >>> turned = TurnedAtRandom(eraser, seed=1).fit(X)
        >>> sizes = [np.linalg.norm(one.transform(X) - X, axis=1) for one in (eraser, turned)]
        >>> bool(np.allclose(*sizes))
        True
    """

    def __init__(self, eraser: Any = None, seed: Any = 0) -> None:
        self.eraser = eraser
        self.seed = seed

    def fit(self, X: Any = None, y: Any = None) -> "TurnedAtRandom":
        """Nothing is learned of the states: what is turned is the eraser."""
        check_is_fitted(self.eraser)
        drawn = np.random.default_rng(int(self.seed)).standard_normal(self.eraser.left_.shape)
        self.n_features_in_ = len(drawn)
        self.mean_, self.right_ = self.eraser.mean_, self.eraser.right_
        # An orthonormal basis has the lengths and angles of its coordinates.
        _, inner = np.linalg.qr(self.eraser.left_)
        self.left_ = np.linalg.qr(drawn)[0] @ inner
        return self


class RandomProjection(_Affine):
    """Removes as many random directions: the control of an erasure.

    Example:
        >>> RandomProjection(rank=2, seed=1).fit(np.eye(5)).rank_
        2
    """

    def __init__(self, rank: Any = 1, seed: Any = 0) -> None:
        self.rank = rank
        self.seed = seed

    def fit(self, X: Any, y: Any = None) -> "RandomProjection":
        """Mean of the states; directions are drawn evenly over the sphere."""
        X = validate_data(self, X, dtype=np.float64)
        if not 0 <= int(self.rank) <= X.shape[1]:
            raise ValueError(
                f"{self.rank} directions cannot be removed from {X.shape[1]} dimensions."
            )
        self.mean_ = X.mean(0)
        drawn = np.random.default_rng(int(self.seed)).standard_normal((X.shape[1], int(self.rank)))
        self.left_ = self.right_ = np.linalg.qr(drawn)[0] if self.rank else drawn
        return self


class KnownDirections(_Affine):
    """Removes given directions: a probe's, a difference of means, or what one has planted.

    Example:
        >>> clean = KnownDirections([[0.0, 3.0]]).fit_transform(np.eye(2))
        >>> clean.round(6).tolist()
        [[1.0, 0.5], [0.0, 0.5]]

    Args:
        directions: `[d_model]` or rows of them, of any length, dependent or not.
    """

    def __init__(self, directions: Any = None) -> None:
        self.directions = directions

    def fit(self, X: Any, y: Any = None) -> "KnownDirections":
        """Mean of the states, onto which the directions collapse."""
        X = validate_data(self, X, dtype=np.float64)
        rows = np.atleast_2d(np.zeros((0, X.shape[1])) if self.directions is None
                             else np.asarray(self.directions, dtype=np.float64))
        if rows.shape[1] != X.shape[1] or not np.isfinite(rows).all():
            raise ValueError(
                f"directions {rows.shape} cannot be removed from states of {X.shape[1]} dimensions."
            )
        self.mean_ = X.mean(0)
        _, s, basis = np.linalg.svd(rows, full_matrices=False)
        self.left_ = self.right_ = basis[s > 1e-10 * s.max(initial=0.0)].T
        return self


def relative_change(
    before: Float[np.ndarray, "sample d_model"], after: Float[np.ndarray, "sample d_model"]
) -> float:
    """Norm of what an erasure changed, relative to the spread of the states around their mean."""
    spread = np.linalg.norm(before - before.mean(0))
    return float(np.linalg.norm(after - before) / spread) if spread else float("nan")


def steering(
    probe: Any, strength: SupportsFloat, *, control_seed: Optional[SupportsIndex] = None
) -> Float[np.ndarray, "d_model"]:
    """A vector to add to states: `strength` along a probe's direction, or a random one as long.

    Example:
        >>> X = np.random.default_rng(0).standard_normal((80, 3))
        >>> probe = logistic().fit(X, X[:, 2] > 0)
        >>> v, control = steering(probe, 2), steering(probe, 2, control_seed=0)
        >>> [round(float(np.linalg.norm(x)), 6) for x in (v, control)]
        [2.0, 2.0]
    """
    way = direction(probe)
    if len(way) != 1:
        raise ValueError(f"a probe of {len(way)} classes has no one direction; fit one class against "
                         "the others.")
    if control_seed is not None:
        drawn = np.random.default_rng(int(control_seed)).standard_normal(way.shape[1])
        return float(strength) * drawn / np.linalg.norm(drawn)
    return float(strength) * way[0]


def _concept(y: Any, n: int) -> Float[np.ndarray, "sample concept"]:
    if y is None:
        raise ValueError("erasing requires y to be passed, but the target y is None.")
    given = np.asarray(y)
    if given.ndim == 0 or len(given) != n:
        raise ValueError(f"{given.size} labels for {n} samples: give one per sample.")
    if given.ndim == 1 and type_of_target(given) in ("binary", "multiclass"):
        if len(np.unique(given)) < 2:
            raise ValueError("all samples have the same label, so there is one class only.")
        return OneHotEncoder(sparse_output=False).fit_transform(given[:, None])
    return check_array(given.reshape(n, -1), dtype=np.float64)  # pyright: ignore[reportArgumentType]
