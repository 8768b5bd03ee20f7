"""Subspaces in which right and wrong differ: how far two of them agree, and probes carried across.

A subspace is spanned by the leading principal components of a data set's states (the states of
hallucinated words, say). Two data sets, or two models, are compared by the overlap of their
subspaces; a probe fitted in one is used in the other after the first basis is turned into the second.

Paper     arXiv:2503.10602 (ComnHallu); the operations are this toolkit's, after subspace alignment
          (Fernando et al. 2013)
"""

from typing import Any, SupportsIndex

import numpy as np
from jaxtyping import Float
from scipy.linalg import orthogonal_procrustes, subspace_angles
from sklearn.base import BaseEstimator
from sklearn.decomposition import PCA
from sklearn.utils.validation import check_is_fitted


def basis(states: Any, components: SupportsIndex) -> Float[np.ndarray, "component d_model"]:
    """Orthonormal leading directions of centered states.

    Example:
        >>> X = np.random.default_rng(0).standard_normal((50, 4)) * [9.0, 5.0, 0.1, 0.1]
        >>> np.abs(basis(X, 2)).round(1).argmax(1).tolist()
        [0, 1]
    """
    X = np.asarray(states, dtype=float)
    if X.ndim != 2 or not 0 < int(components) <= min(X.shape[0] - 1, X.shape[1]):
        raise ValueError(f"states of shape {X.shape} do not span {int(components)} directions: give "
                         "more samples, or ask for fewer.")
    return np.asarray(PCA(int(components), svd_solver="full").fit(X).components_)


def overlap(
    first: Float[np.ndarray, "component d_model"], second: Float[np.ndarray, "other d_model_2"]
) -> dict[str, float]:
    """Mean squared cosine of the angles between two subspaces, and what random ones would give.

    Example:
        >>> found = overlap(np.eye(6)[:2], np.eye(6)[1:3])
        >>> round(found["overlap"], 6), round(found["random"], 6)
        (0.5, 0.333333)

    1 where the smaller lies in the larger; `random` is the expectation for a uniformly random
    subspace of the second's size, the larger dimension over d_model.
    """
    if first.shape[1] != second.shape[1]:
        raise ValueError(f"bases in spaces of {first.shape[1]} and {second.shape[1]} dimensions "
                         "cannot be compared; align them first.")
    angles = subspace_angles(first.T, second.T)
    return {"overlap": float((np.cos(angles) ** 2).mean()),
            "random": max(len(first), len(second)) / first.shape[1],
            "largest angle": float(np.degrees(angles.max()))}


class SubspaceAlignment(BaseEstimator):
    """Coordinates in which states of two data sets (or models) can be told apart by one probe.

    Example:
        >>> rng = np.random.default_rng(0)
        >>> X = rng.standard_normal((60, 3)) @ rng.standard_normal((3, 8))
        >>> turn = np.linalg.qr(rng.standard_normal((8, 8)))[0]
        >>> made = SubspaceAlignment(3).fit(X, X @ turn, paired=True)
        >>> np.allclose(made.source(X), made.target(X @ turn))
        True

    Args:
        components: size of both subspaces.

    `fit(source, target)` aligns the source's basis with the target's in the same space (the spaces
    must be of one size); with `paired=True`, where row i of both is the same item in two data sets
    or models, the coordinates are turned by orthogonal Procrustes and sizes may differ.
    """

    def __init__(self, components: Any = 8) -> None:
        self.components = components

    def fit(self, source: Any, target: Any, *, paired: Any = False) -> "SubspaceAlignment":
        """Bases of both, and the turn between them; without labels.

        Raises `ValueError` for spaces or numbers of rows that do not fit.
        """
        a, b = np.asarray(source, dtype=float), np.asarray(target, dtype=float)
        self.mean_source_, self.mean_target_ = a.mean(0), b.mean(0)
        first, second = basis(a, self.components), basis(b, self.components)
        if paired:
            if len(a) != len(b):
                raise ValueError(f"{len(a)} and {len(b)} rows are not pairs.")
            turn, _ = orthogonal_procrustes((a - self.mean_source_) @ first.T,
                                            (b - self.mean_target_) @ second.T)
        elif first.shape[1] != second.shape[1]:
            raise ValueError(
                f"spaces of {first.shape[1]} and {second.shape[1]} dimensions are aligned on paired "
                "items only: fit with paired=True.")
        else:
            turn = first @ second.T
        self.source_components_, self.target_components_, self.turn_ = first, second, turn
        return self

    def source(self, states: Any) -> Float[np.ndarray, "sample component"]:
        """Coordinates of the source's states, turned."""
        check_is_fitted(self)
        return (np.asarray(states, dtype=float) - self.mean_source_) @ self.source_components_.T \
            @ self.turn_

    def target(self, states: Any) -> Float[np.ndarray, "sample component"]:
        """Coordinates of the target's states."""
        check_is_fitted(self)
        return (np.asarray(states, dtype=float) - self.mean_target_) @ self.target_components_.T
