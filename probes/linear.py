"""Linear probes: pipelines fitted on training folds only, and their directions in the states' space.

Sources   arXiv:1909.03368 (linear probes), arXiv:2305.01610 (k-sparse probes)
"""

from collections.abc import Callable
from typing import Any, Optional, SupportsFloat, SupportsIndex

import numpy as np
import torch
from jaxtyping import Float
from scipy.optimize import minimize
from sklearn.base import BaseEstimator, ClassifierMixin, clone
from sklearn.feature_selection import SelectKBest
from sklearn.linear_model import LogisticRegression, RidgeClassifier
from sklearn.pipeline import Pipeline, make_pipeline
from sklearn.preprocessing import StandardScaler
from sklearn.utils.multiclass import check_classification_targets
from sklearn.utils.validation import check_is_fitted, validate_data


def logistic(C: SupportsFloat = 1.0, **more: Any) -> Pipeline:
    """Standardize, then logistic regression: both fitted on what `fit` is given, nothing else.

    Example:
        >>> X = np.random.default_rng(0).standard_normal((60, 5))
        >>> logistic().fit(X[:40], X[:40, 0] > 0).score(X[40:], X[40:, 0] > 0) > 0.8
        True
    """
    return make_pipeline(StandardScaler(), LogisticRegression(C=float(C), max_iter=2000, **more))


def fitted_copy(estimator: Any, X: Any, y: Any) -> Any:
    """A copy of an estimator with the same settings, fitted; the estimator itself stays as it is.

    Example:
        >>> probe, X = logistic(), np.eye(4)
        >>> fitted_copy(probe, X, [0, 0, 1, 1]).classes_.tolist(), hasattr(probe, "classes_")
        ([0, 1], False)
    """
    copy: Any = clone(estimator)
    return copy.fit(X, y)


def ridge(alpha: SupportsFloat = 1.0) -> Pipeline:
    """Standardize, then least squares on +1 and -1 with an L2 penalty: the quick linear probe."""
    return make_pipeline(StandardScaler(), RidgeClassifier(alpha=float(alpha)))


def k_sparse(k: SupportsIndex, C: SupportsFloat = 1.0) -> Pipeline:
    """Keep the `k` coordinates whose class means lie furthest apart, then logistic regression.

    The choice is part of the pipeline, so it sees training folds only. For binary labels with a
    certified optimum use `transformer_lens.tools.analysis.sparse_probing`.

    Source: arXiv:2305.01610, mean-difference ranking.
    """
    return make_pipeline(StandardScaler(), SelectKBest(mean_difference, k=int(k)),
                         LogisticRegression(C=float(C), max_iter=2000))


def mean_difference(X: Any, y: Any) -> Float[np.ndarray, "d_model"]:
    """Largest distance of a class mean from the mean of the others, per coordinate."""
    X, y = np.asarray(X, dtype=float), np.asarray(y)
    classes = np.unique(y)
    apart = [np.abs(X[y == c].mean(0) - X[y != c].mean(0)) for c in classes[:1 if len(
        classes) == 2 else None]]
    return np.max(apart, axis=0)


class DifferenceOfMeans(ClassifierMixin, BaseEstimator):
    """The direction from one class mean to the other, with the threshold half way.

    With more than two classes the nearest class mean wins. No covariance is estimated, so it also
    works with fewer samples than dimensions.

    Example:
        >>> X = np.array([[0.0, 1.0], [0.2, 1.0], [2.0, 1.0], [2.2, 1.0]])
        >>> probe = DifferenceOfMeans().fit(X, [0, 0, 1, 1])
        >>> probe.coef_, probe.predict([[1.0, 5.0], [1.2, 5.0]])
        (array([[2., 0.]]), array([0, 1]))
    """

    def fit(self, X: Any, y: Any) -> "DifferenceOfMeans":
        """Class means. ValueError for fewer than two classes."""
        X, y = validate_data(self, X, y, dtype=np.float64)
        check_classification_targets(y)
        self.classes_, number = np.unique(y, return_inverse=True)
        if len(self.classes_) < 2:
            raise ValueError(
                f"a probe needs at least two classes, but all labels are {self.classes_[0]!r}, so "
                "there is one class only."
            )
        self.means_ = np.stack([X[number == i].mean(0) for i in range(len(self.classes_))])
        half = 0.5 * (self.means_**2).sum(1)
        if len(self.classes_) == 2:
            self.coef_ = self.means_[1:] - self.means_[:1]
            self.intercept_ = half[:1] - half[1:]
        else:
            self.coef_, self.intercept_ = self.means_, -half
        return self

    def decision_function(self, X: Any) -> np.ndarray:
        """How far beyond the threshold, `[sample]`, or one score per class, `[sample, class]`."""
        check_is_fitted(self)
        X = validate_data(self, X, dtype=np.float64, reset=False)
        scores = X @ self.coef_.T + self.intercept_
        return scores[:, 0] if len(self.classes_) == 2 else scores

    def predict(self, X: Any) -> np.ndarray:
        """The class on whose side each sample lies."""
        scores = self.decision_function(X)
        chosen = (scores > 0).astype(int) if scores.ndim == 1 else scores.argmax(1)
        return self.classes_[chosen]


def direction(probe: Any) -> Float[np.ndarray, "class d_model"]:
    """Unit directions of a fitted linear probe in the space of the states themselves.

    Example:
        >>> X = np.random.default_rng(0).standard_normal((80, 3)) * [1.0, 10.0, 0.1]
        >>> found = direction(logistic().fit(X, X[:, 2] > 0))
        >>> int(np.abs(found[0]).argmax())
        2

    A scaler's division is undone and coordinates that were not selected are zero, so that the dot
    product with a state orders samples as the probe does. One row for two classes.

    Raises:
        TypeError: the probe's last step has no `coef_`.
    """
    steps = [step for _, step in probe.steps] if isinstance(probe, Pipeline) else [probe]
    if not hasattr(steps[-1], "coef_"):
        raise TypeError(
            f"{type(steps[-1]).__name__} has no coef_, so it has no direction; fit a linear probe."
        )
    weights: Any = np.atleast_2d(steps[-1].coef_)
    for step in reversed(steps[:-1]):
        if isinstance(step, StandardScaler):
            weights = weights if step.scale_ is None else weights / step.scale_
        elif hasattr(step, "get_support"):
            chosen = step.get_support()
            full = np.zeros((len(weights), len(chosen)))
            full[:, chosen] = weights
            weights = full
        elif hasattr(step, "components_"):
            weights = weights @ step.components_
        else:
            raise TypeError(
                f"the step {type(step).__name__} is not one whose change of space can be undone."
            )
    return weights / np.linalg.norm(weights, axis=1, keepdims=True)


def fit_layers(
    states: Float[np.ndarray, "layer sample d_model"],
    labels: Any,
    C: SupportsFloat = 1.0,
    *,
    tolerance: SupportsFloat = 1e-8,
    device: Optional[str] = None,
) -> list[Pipeline]:
    """`logistic(C)` for every layer at once, in one solver: the same solution as scikit-learn's.

    Example:
        >>> rng = np.random.default_rng(0)
        >>> probes = fit_layers(rng.standard_normal((3, 40, 4)), rng.integers(2, size=40))
        >>> len(probes), probes[0].named_steps["logisticregression"].coef_.shape
        (3, (1, 4))

    The layers are independent problems. With more than two classes, or on a GPU, they are minimized
    together in float64 (L-BFGS), so that each step is one batched product.

    Raises:
        ValueError: one class only, or values that are not numbers.
    """
    X = _checked(states)
    classes, y = _classes(labels, X.shape[1])
    if len(classes) == 2:
        return [row[0] for row in _fit_binary(X, y[None], [classes], C, tolerance, device)]
    mean, scale = _moments(X)
    where = torch.device(device or "cpu")
    inputs = torch.as_tensor((X - mean) / scale, device=where)
    target = torch.as_tensor(y, device=where)

    def fit(logits: torch.Tensor) -> torch.Tensor:
        return -logits.log_softmax(-1)[:, torch.arange(len(y)), target].sum()

    weights = _minimize(inputs, fit, len(classes), float(C), float(tolerance))
    return [_as_pipeline(mean[i, 0], scale[i, 0], weights[i], classes, float(C), len(y))
            for i in range(len(X))]


def fit_targets(
    states: Float[np.ndarray, "layer sample d_model"],
    labels: Any,
    C: SupportsFloat = 1.0,
    *,
    tolerance: SupportsFloat = 1e-8,
    device: Optional[str] = None,
) -> list[list[Pipeline]]:
    """`logistic(C)` for every target and layer at once, `[target][layer]`, two classes each.

    Example:
        >>> rng = np.random.default_rng(0)
        >>> labels = rng.integers(2, size=(5, 40))
        >>> probes = fit_targets(rng.standard_normal((3, 40, 4)), labels)
        >>> len(probes), len(probes[0])
        (5, 3)

    Args:
        labels: `[target, sample]`: another question about the same states in every row.

    All targets share each product with the states, which are read once instead of once per target.

    Raises:
        ValueError: a target without exactly two classes, or values that are not numbers.
    """
    X = _checked(states)
    found = [_classes(row, X.shape[1]) for row in np.atleast_2d(np.asarray(labels))]
    for number, (classes, _) in enumerate(found):
        if len(classes) != 2:
            raise ValueError(
                f"target {number} has {len(classes)} classes; give targets of two classes, and "
                "use fit_layers for one target of more."
            )
    by_layer = _fit_binary(X, np.stack([y for _, y in found]), [classes for classes, _ in found],
                           C, tolerance, device)
    return [list(row) for row in zip(*by_layer)]


def _checked(states: Any) -> np.ndarray:
    X = np.asarray(states, dtype=np.float64)
    if X.ndim != 3 or not np.isfinite(X).all():
        raise ValueError(
            f"states must be [layer, sample, d_model] and finite, not {X.shape}"
            + ("." if np.isfinite(X).all() else " with values that are not numbers.")
        )
    return X


def _classes(labels: Any, n: int) -> tuple[np.ndarray, np.ndarray]:
    classes, y = np.unique(np.asarray(labels), return_inverse=True)
    if len(classes) < 2 or len(y) != n:
        raise ValueError(
            f"{len(y)} labels of {len(classes)} class(es) for {n} samples: give one label "
            "per sample and at least two classes."
        )
    return classes, y


def _moments(X: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Mean and spread per layer [layer, 1, d_model], as scikit-learn's scaler has them."""
    scale = X.std(1, keepdims=True)
    scale[scale < 10 * np.finfo(float).eps] = 1.0
    return X.mean(1, keepdims=True), scale


def _fit_binary(
    X: np.ndarray, y: np.ndarray, classes: list[np.ndarray], C: SupportsFloat,
    tolerance: SupportsFloat, device: Optional[str],
) -> list[list[Pipeline]]:
    """Probes [layer][target] for labels 0 and 1, `[target, sample]`."""
    if len(y) == 1 and device in (None, "cpu"):
        # One target has no products to share, and alone each layer stops when it is done.
        probe = logistic(C, tol=float(tolerance)).set_params(logisticregression__max_iter=15000)
        return [[fitted_copy(probe, x, classes[0][y[0]])] for x in X]
    mean, scale = _moments(X)
    where = torch.device(device or "cpu")
    inputs = torch.as_tensor((X - mean) / scale, device=where)
    sign = torch.as_tensor(2.0 * y.T - 1.0, device=where)

    def fit(logits: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.softplus(-sign * logits).sum()

    weights = _minimize(inputs, fit, len(y), float(C), float(tolerance))
    return [[_as_pipeline(mean[i, 0], scale[i, 0], weights[i, :, j : j + 1], classes[j], float(C),
                          X.shape[1]) for j in range(len(y))] for i in range(len(X))]


def _minimize(
    inputs: torch.Tensor, fit: Callable[[torch.Tensor], torch.Tensor], width: int, C: float,
    tolerance: float,
) -> np.ndarray:
    """Weights [layer, d_model + 1, column], the intercepts last, that minimize fit and penalty."""
    n_layers, n, d = inputs.shape
    shape = (n_layers, d + 1, width)

    def loss(flat: np.ndarray) -> tuple[float, np.ndarray]:
        weights = torch.tensor(flat.reshape(shape), device=inputs.device, requires_grad=True)
        logits = inputs @ weights[:, :-1] + weights[:, -1:]
        # As in scikit-learn: the intercept is not penalized.
        total = (fit(logits) * C + 0.5 * (weights[:, :-1] ** 2).sum()) / (C * n)
        (slope,) = torch.autograd.grad(total, weights)
        return float(total.detach()), slope.cpu().numpy().ravel()

    found = minimize(loss, np.zeros(int(np.prod(shape))), jac=True, method="L-BFGS-B",
                     options={"maxiter": 15000, "gtol": tolerance, "ftol": 0.0, "maxfun": 30000})
    return found.x.reshape(shape)


def _as_pipeline(
    mean: np.ndarray, scale: np.ndarray, weights: np.ndarray, classes: np.ndarray, C: float, n: int
) -> Pipeline:
    """A fitted `logistic(C)` with these numbers in it."""
    made = logistic(C)
    scaler, regression = made.named_steps.values()
    scaler.mean_, scaler.scale_, scaler.var_ = mean, scale, scale**2
    scaler.n_features_in_, scaler.n_samples_seen_ = len(mean), n
    regression.classes_, regression.n_features_in_ = classes, len(mean)
    regression.coef_, regression.intercept_ = weights[:-1].T.copy(), weights[-1].copy()
    regression.n_iter_ = np.array([0])
    return made
