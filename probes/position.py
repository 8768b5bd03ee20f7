"""Position probes: where in the text a state stands, read from the state or from its neighbors.

Papers    arXiv:2203.16634 (NoPos: absolute position), arXiv:2501.00073 (similarity of nearby states)
Question  Is absolute position readable in a layer, with and without position encodings?
Measure   distance of the predicted from the true position, on documents the probe has not seen;
          share of triples in which the nearer of two earlier states is the more similar one
Cause     none here: that a position can be read does not say that the model reads it

Positions of objects in pictures: `probes.object_position`.
"""

from typing import Any, Literal, Optional, SupportsIndex

import numpy as np
import torch
import xarray as xr
from jaxtyping import Float, Int
from matplotlib.axes import Axes
from scipy import stats
from sklearn.base import BaseEstimator, ClassifierMixin, clone
from sklearn.linear_model import RidgeCV
from sklearn.model_selection import GroupKFold, cross_val_predict
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from sklearn.utils.multiclass import check_classification_targets
from sklearn.utils.validation import check_is_fitted, validate_data
from torch import Tensor

from interp.core import Result
from interp.figures.style import color, style
from interp.stream.similarity import cosines

Against = Literal["triples", "next", "neighbor"]
EXACT = 2**16
"""Training sets of so many numbers are solved in float64, larger ones in float32."""


class PositionProbe(ClassifierMixin, BaseEstimator):
    """Softmax over positions: linear, or with a hidden layer of ReLUs; no biases.

    Example:
        >>> X = np.repeat(np.eye(4), 6, 0) + 0.1 * np.random.default_rng(0).standard_normal((24, 4))
        >>> PositionProbe().fit(X, np.repeat(np.arange(4), 6)).predict(np.eye(4)).tolist()
        [0, 1, 2, 3]

    Args:
        hidden: 0 for a linear probe; else the hidden layer has `hidden` times as many units as
            there are features (2 in the paper).
        alpha: L2 penalty; with `hidden=0` the solution is that of scikit-learn's
            `LogisticRegression(C=1 / alpha, fit_intercept=False)` on standardized features.
        max_iter: steps of L-BFGS on the whole training set.
        device: where it is solved, the CPU for None.

    Source: arXiv:2203.16634, released code (there trained by steps, with Xavier initialization).
    """

    def __init__(
        self, hidden: Any = 0, alpha: Any = 1.0, max_iter: Any = 150, seed: Any = 0,
        device: Any = None,
    ) -> None:
        self.hidden, self.alpha, self.max_iter = hidden, alpha, max_iter
        self.seed, self.device = seed, device

    def fit(self, X: Any, y: Any) -> "PositionProbe":
        """Fit on states and positions. ValueError for one position only."""
        X, y = validate_data(self, X, y, dtype=np.float64)
        check_classification_targets(y)
        self.classes_, number = np.unique(y, return_inverse=True)
        if len(self.classes_) < 2:
            raise ValueError(f"all samples are at {self.classes_[0]!r}: there is one class only.")
        self.mean_, scale = X.mean(0), X.std(0)
        self.scale_ = np.where(scale < 10 * np.finfo(float).eps, 1.0, scale)
        where = torch.device(self.device or "cpu")
        kind = torch.float64 if X.size <= EXACT else torch.float32
        inputs = torch.as_tensor((X - self.mean_) / self.scale_, dtype=kind, device=where)
        target = torch.as_tensor(number, device=where)
        sizes = [X.shape[1], len(self.classes_)]
        if int(self.hidden):
            sizes.insert(1, int(self.hidden) * X.shape[1])
        generator = torch.Generator().manual_seed(int(self.seed))
        weights = []
        for a, b in zip(sizes, sizes[1:]):
            # A linear probe has one best solution, whatever the start.
            w = torch.zeros(a, b) if len(sizes) == 2 else (
                torch.rand(a, b, generator=generator) * 2 - 1) * (6 / (a + b)) ** 0.5
            weights.append(w.to(where, kind).requires_grad_())
        optimizer = torch.optim.LBFGS(weights, max_iter=int(self.max_iter), history_size=15,
                                      line_search_fn="strong_wolfe", tolerance_grad=1e-8,
                                      tolerance_change=1e-13)

        def loss() -> Tensor:
            optimizer.zero_grad()
            fit = torch.nn.functional.cross_entropy(_forward(inputs, weights), target)
            penalty = sum((w**2).sum() for w in weights)
            value = fit + 0.5 * float(self.alpha) * penalty / len(X)
            value.backward()
            return value

        with torch.enable_grad():
            optimizer.step(loss)
        self.n_iter_ = int(optimizer.state[weights[0]]["n_iter"])
        self.weights_ = [w.detach().cpu().double().numpy() for w in weights]
        return self

    def decision_function(self, X: Any) -> Float[np.ndarray, "..."]:
        """Logits `[sample, position]`; for two positions the difference, as scikit-learn has it."""
        logits = self._logits(X)
        return logits[:, 1] - logits[:, 0] if len(self.classes_) == 2 else logits

    def predict_proba(self, X: Any) -> Float[np.ndarray, "sample position"]:
        """The posterior."""
        logits = self._logits(X)
        odds = np.exp(logits - logits.max(1, keepdims=True))
        return odds / odds.sum(1, keepdims=True)

    def predict(self, X: Any) -> np.ndarray:
        """The most probable position."""
        logits = self._logits(X)
        return self.classes_[logits.argmax(1)]

    def _logits(self, X: Any) -> np.ndarray:
        check_is_fitted(self)
        X = validate_data(self, X, dtype=np.float64, reset=False)
        x = torch.as_tensor((X - self.mean_) / self.scale_)
        return _forward(x, [torch.as_tensor(w) for w in self.weights_]).numpy()


def _forward(x: Tensor, weights: list[Tensor]) -> Tensor:
    for w in weights[:-1]:
        x = torch.relu(x @ w)
    return x @ weights[-1]


def posterior_median(
    probabilities: Float[np.ndarray, "sample position"], classes: Any
) -> Float[np.ndarray, "sample"]:
    """The position at which half of the posterior is reached: the guess of least expected distance.

    Example:
        >>> posterior_median(np.array([[0.4, 0.0, 0.3, 0.3]]), [0, 1, 2, 3])
        array([2.])
    """
    at = (np.cumsum(probabilities, 1) >= 0.5 - 1e-12).argmax(1)
    return np.asarray(classes, dtype=float)[at]


def nulls(positions: Any, train: Optional[Any] = None) -> dict[str, np.ndarray]:
    """Distance of guesses that look at no state, per sample.

    Example:
        >>> found = nulls(np.arange(1024))
        >>> float(found["constant"].mean()), round(float(found["uniform"].mean()), 2)
        (256.0, 341.33)

    "constant" always says the median of the training positions (a quarter of the length); "uniform"
    any position that occurs, with equal chance (a third of it: what the paper's figure calls random).
    """
    place = np.asarray(positions, dtype=float)
    known = place if train is None else np.asarray(train, dtype=float)
    classes = np.unique(known)
    return {"constant": np.abs(place - np.median(known)),
            "uniform": np.abs(place[:, None] - classes[None]).mean(1)}


def absolute(
    states: Any,
    positions: Any,
    *,
    documents: Any,
    estimator: Optional[BaseEstimator] = None,
    folds: SupportsIndex = 2,
    seed: SupportsIndex = 0,
) -> Result:
    """A probe of absolute position per layer, scored on documents it was not fitted on.

    Example:
        >>> rng = np.random.default_rng(0)
        >>> place = np.tile(np.arange(6), 10)
        >>> states = rng.standard_normal((2, 60, 8))
        >>> states[1, :, :6] += 9 * np.eye(6)[place]
        >>> found = absolute(states, place, documents=np.repeat(np.arange(10), 6))
        >>> float(found["mad"][1].mean()), float(found["constant"].mean())
        (0.0, 1.5)

    Args:
        states: `[layer, sample, d_model]`, without those of a start token.
        positions: of every sample, whole numbers, the same ones in every document.
        documents: of every sample; no document is in training and test.
        estimator: `PositionProbe()` for None; any with `predict_proba`.

    Returns:
        `[layer, document]`: `mad` (mean absolute distance of the most probable position), `mad_median`
        (of the posterior median, which does not punish a posterior of several peaks), `accuracy`;
        `[document]`: the nulls `constant` and `uniform`; `predicted` `[layer, sample]` with `position`
        and `of_document`. Distances are in tokens.

    Raises:
        ValueError: fewer documents than folds, one position only, or values that are not numbers.

    Source: arXiv:2203.16634; held-out documents, the median and the constant null are the toolkit's.
    """
    layers = states["layer"].values if isinstance(states, xr.DataArray) else None
    X, place = np.asarray(states), np.asarray(positions)
    names, member = np.unique(np.asarray(documents), return_inverse=True)
    if X.ndim != 3 or not X.shape[1] == len(place) == len(member):
        raise ValueError(f"states {X.shape}, {len(place)} positions and {len(member)} documents: give "
                         "[layer, sample, d_model] and one position and document per sample.")
    if not np.isfinite(X).all():
        raise ValueError("states hold values that are not numbers; recompute them in float32.")
    if len(names) < int(folds) or len(np.unique(place)) < 2:
        raise ValueError(f"{len(names)} document(s) cannot be split into {int(folds)} folds."
                         if len(names) < int(folds) else "all samples stand at one position.")
    base: Any = PositionProbe(seed=int(seed)) if estimator is None else estimator
    predicted, medians = np.zeros(X.shape[:2]), np.zeros(X.shape[:2])
    baseline = {name: np.zeros(len(place)) for name in ("constant", "uniform")}
    splits = GroupKFold(int(folds), shuffle=True, random_state=int(seed))
    for train, test in splits.split(place, groups=member):
        for name, values in nulls(place[test], place[train]).items():
            baseline[name][test] = values
        for layer, x in enumerate(X):
            probe: Any = clone(base)
            probe.fit(x[train], place[train])
            posterior = probe.predict_proba(x[test])
            predicted[layer, test] = probe.classes_[posterior.argmax(1)]
            medians[layer, test] = posterior_median(posterior, probe.classes_)

    def by_document(values: np.ndarray) -> np.ndarray:
        return np.stack([values[..., member == i].mean(-1) for i in range(len(names))], -1)

    both = ("layer", "document")
    data = xr.Dataset({
        "mad": (both, by_document(np.abs(predicted - place))),
        "mad_median": (both, by_document(np.abs(medians - place))),
        "accuracy": (both, by_document((predicted == place).astype(float))),
        **{name: ("document", by_document(values)) for name, values in baseline.items()},
        "predicted": (("layer", "sample"), predicted), "position": ("sample", place),
        "of_document": ("sample", member),
    }, {"layer": np.arange(len(X)) if layers is None else layers, "document": np.arange(len(names))})
    return Result(data, {"measure": "absolute position", "probe": str(base), "folds": int(folds),
                         "seed": int(seed), "n_samples": len(place), "n_documents": len(names),
                         "n_positions": len(np.unique(place)), "unit": "tokens",
                         "layer_convention": "blocks from 0; -1 is what enters block 0"})


# -- similarity of nearby states ------------------------------------------------------------------


def adjacency(
    cosine: Float[np.ndarray, "*layer position position"], against: Against = "triples"
) -> Float[np.ndarray, "*layer"]:
    """APS: how often a state is more similar to the nearer of two earlier ones; 0.5 is chance.

    Example:
        >>> near = -np.abs(np.subtract.outer(np.arange(6.0), np.arange(6.0)))
        >>> [float(adjacency(near, kind)) for kind in ("triples", "next", "neighbor")]
        [1.0, 1.0, 1.0]

    Args:
        against: "triples" compares all j and k with k < j < i; "next" only those that follow each
            other, k = j - 1, with one weight each; "neighbor" the neighbor j = i - 1 with every
            earlier k. A tie counts one half.

    Source: arXiv:2501.00073 names an adjacency probability score; these definitions are the toolkit's.
    """
    matrix = torch.as_tensor(np.asarray(cosine, dtype=float))
    n = matrix.shape[-1]
    if n < 3:
        raise ValueError("a triple of positions needs at least three of them.")
    net, count = torch.zeros(matrix.shape[:-2], dtype=torch.double), 0
    for i in range(2, n):
        row = matrix[..., i, :i]
        if against == "triples":
            signs = (row[..., :, None] - row[..., None, :]).sign().tril(-1)
            net, count = net + signs.sum((-1, -2)), count + i * (i - 1) // 2
        else:
            signs = (row[..., 1:] - row[..., :-1] if against == "next"
                     else row[..., -1:] - row[..., :-1]).sign()
            net, count = net + signs.sum(-1), count + i - 1
    return (0.5 + 0.5 * net / count).numpy()


def nearness(
    cosine: Float[np.ndarray, "*layer position position"]
) -> Float[np.ndarray, "*layer"]:
    """Spearman correlation of similarity with minus the distance, over all pairs of positions."""
    matrix = np.asarray(cosine, dtype=float)
    rows, columns = np.tril_indices(matrix.shape[-1], -1)
    flat = matrix[..., rows, columns].reshape(-1, len(rows))
    gap = (columns - rows).astype(float)
    rho: Any = stats.spearmanr
    found = [rho(one, gap).statistic if np.ptp(one) > 0 else np.nan for one in flat]
    return np.array(found).reshape(matrix.shape[:-2])


def cosine_rows(
    cosine: Float[np.ndarray, "*layer position position"]
) -> Float[np.ndarray, "*layer position position"]:
    """Rows of similarities as features of a position, the diagonal replaced by the rest's mean.

    The similarity of a state to itself is 1, in the column of its own position: with it any states
    tell their positions perfectly.
    """
    matrix = np.array(cosine, dtype=float)
    n = matrix.shape[-1]
    at = np.arange(n)
    rest = (matrix.sum(-1) - matrix[..., at, at]) / (n - 1)
    matrix[..., at, at] = rest
    return matrix


def position_r2(
    features: Float[np.ndarray, "document position feature"], *, folds: SupportsIndex = 5,
    seed: SupportsIndex = 0,
) -> Float[np.ndarray, "document"]:
    """R^2 of the position by ridge regression, per unseen document; negative if worse than the mean."""
    count, n, width = features.shape
    place, group = np.tile(np.arange(float(n)), count), np.repeat(np.arange(count), n)
    probe = make_pipeline(StandardScaler(), RidgeCV(np.logspace(-2, 4, 7)))
    splits = GroupKFold(min(int(folds), count), shuffle=True, random_state=int(seed))
    guess = cross_val_predict(probe, features.reshape(-1, width), place, groups=group, cv=splits)
    left = ((guess - place) ** 2).reshape(count, n).sum(1)
    return 1 - left / ((np.arange(n) - (n - 1) / 2) ** 2).sum()


def similarity(states: Any, *, center: bool = True, folds: SupportsIndex = 5) -> Result:
    """Adjacency of states by layer, and position read from similarities and from the variance.

    Example:
        >>> found = similarity(np.random.default_rng(0).standard_normal((2, 5, 12, 8)))
        >>> found["aps"].dims, bool(abs(found["aps"].mean() - 0.5) < 0.1)
        (('layer', 'document'), True)

    Args:
        states: `[layer, document, position, d_model]`, of random tokens (ordinary text is about one
            topic for a while, which is enough for neighbors to be alike), without a start token.
        center: whether to subtract the layer's mean over documents and positions.

    Returns:
        `[layer, document]`: `aps`, `aps_next`, `aps_neighbor` (see `adjacency`), `nearness`,
        `r2_cosine` and `r2_variance` (position read from a state's similarities, and from its variance
        over coordinates); `cosine` `[layer, query, key]`, the mean map.

    Source: arXiv:2501.00073.
    """
    layers = states["layer"].values if isinstance(states, xr.DataArray) else None
    X = np.asarray(states, dtype=np.float64)
    if X.ndim != 4 or X.shape[1] < 2 or X.shape[2] < 4:
        raise ValueError("states must be [layer, document, position, d_model], of at least two "
                         f"documents and four positions, not {X.shape}.")
    rows: dict[str, list[np.ndarray]] = {}
    maps = []
    for one in X:
        variance = one.var(-1)
        cosine = cosines(one - one.mean((0, 1)) if center else one)
        found = {"aps": adjacency(cosine), "aps_next": adjacency(cosine, "next"),
                 "aps_neighbor": adjacency(cosine, "neighbor"), "nearness": nearness(cosine),
                 "r2_cosine": position_r2(cosine_rows(cosine), folds=folds),
                 "r2_variance": position_r2(variance[..., None], folds=folds)}
        for name, values in found.items():
            rows.setdefault(name, []).append(values)
        maps.append(cosine.mean(0))
    data = xr.Dataset({name: (("layer", "document"), np.stack(v)) for name, v in rows.items()},
                      {"layer": np.arange(len(X)) if layers is None else layers})
    data["cosine"] = (("layer", "query", "key"), np.stack(maps))
    return Result(data, {"measure": "similarity of nearby states", "centered": center, "chance": 0.5,
                         "n_documents": X.shape[1], "n_positions": X.shape[2]})


@style()
def draw(
    found: Result, ax: Axes, layer: SupportsIndex, places: Optional[Int[np.ndarray, "_"]] = None
) -> Axes:
    """Predicted against true position at one layer: mean and the band of 95 % of the documents."""
    one = found.data.sel(layer=int(layer))
    position, guess = one["position"].values, one["predicted"].values
    at = np.unique(position) if places is None else places
    rows = [guess[position == p] for p in at]
    low, high = np.array([np.quantile(row, (0.025, 0.975)) for row in rows]).T
    ax.plot(at, at, color=color("control"), linewidth=0.8, linestyle=":", label="true position")
    ax.fill_between(at, low, high, color=color("image"), alpha=0.25, linewidth=0,
                    label="95 % of documents")
    ax.plot(at, [row.mean() for row in rows], color=color("image"), label="mean prediction")
    ax.set_xlabel("position (tokens)")
    ax.set_ylabel("predicted position (tokens)")
    ax.legend()
    return ax
