"""Token erasure: where states forget which tokens they come from, and the words that this implies.

Paper     arXiv:2406.20086
Question  Which spans of tokens does the model treat as one word?
Measure   drop, between two early layers, of the probability that linear probes give to the tokens at
          and just before a position; a score for every span; a segmentation by the best spans
Cause     none: a reading by probes
"""

from collections.abc import Mapping, Sequence
from typing import Any, SupportsIndex

import numpy as np
import torch
import xarray as xr
from jaxtyping import Bool, Float, Int
from sklearn.base import BaseEstimator, ClassifierMixin
from sklearn.utils.multiclass import check_classification_targets
from sklearn.utils.validation import check_is_fitted, validate_data

from interp.core import Result
from probes.linear import fit_layers

OFFSETS = (0, -1, -2)
SMALL = 3e7
"""Samples x dimensions x tokens up to which a probe is solved exactly, as scikit-learn does."""

Spans = list[tuple[int, int, float]]


class TokenOffsetProbe(ClassifierMixin, BaseEstimator):
    """A linear softmax probe for the token that stands `offset` places from the state it reads.

    Example:
        >>> rng = np.random.default_rng(0)
        >>> ids = rng.integers(3, size=50)
        >>> states = np.eye(3)[np.roll(ids, 1)] + 0.1 * rng.standard_normal((50, 3))
        >>> probe = TokenOffsetProbe(offset=-1).fit(states[:40], ids[:40])
        >>> float(np.nanmean(probe.predict_proba_of(states[40:], ids[40:]))) > 0.8
        True

    Args:
        offset: 0 is the token at the state's own position, -1 the one before it, 1 the next.
        layer: where the states come from; kept, not used.
        rank: the weights are a product of two matrices of this inner size; None for full weights.
        C: inverse strength of the L2 penalty on standardized states, as in `LogisticRegression`.
        solver: "exact" is the solution of scikit-learn's logistic regression; "adamw" goes from the
            closed-form Gaussian classifier on through `epochs` over mini-batches, for vocabularies;
            "auto" is exact for small problems without a rank.
        fewest: tokens seen less often in training are not learned, and not scored (NaN).
        epochs, batch_size, lr, seed: of AdamW.

    What is given to it is one document `[position, d_model]` with its ids, or a list of documents
    with a list of ids: states and tokens are aligned within documents.

    Source: arXiv:2406.20086, section 3 (AdamW, no standardization and no penalty but weight decay
    there); the factored weights are this toolkit's.
    """

    def __init__(
        self, offset: Any = 0, layer: Any = None, rank: Any = None, C: Any = 1.0,
        solver: Any = "auto", fewest: Any = 1, epochs: Any = 4, batch_size: Any = 256, lr: Any = 1e-2,
        seed: Any = 0,
    ) -> None:
        self.offset, self.layer, self.rank, self.C = offset, layer, rank, C
        self.solver, self.fewest, self.epochs = solver, fewest, epochs
        self.batch_size, self.lr, self.seed = batch_size, lr, seed

    def fit(self, X: Any, y: Any) -> "TokenOffsetProbe":
        """Learn `coef_` [token, d_model] and `intercept_` for the tokens `classes_`.

        Raises:
            ValueError: one token only, or no position that has a token at this offset.
        """
        X, y = self._aligned(X, y)
        X, y = validate_data(self, X, y, dtype=np.float64)
        check_classification_targets(y)
        classes, number, count = np.unique(y, return_inverse=True, return_counts=True)
        often = count >= int(self.fewest)
        if often.sum() < 2:
            raise ValueError(
                f"{int(often.sum())} class(es) occur(s) at least {int(self.fewest)} time(s) at offset "
                f"{int(self.offset)}: a probe needs at least two classes."
            )
        kept = often[number]
        X, y = X[kept], y[kept]
        self.classes_, number = np.unique(y, return_inverse=True)
        solver = self.solver
        if solver == "auto":
            small = X.shape[0] * X.shape[1] * len(self.classes_) <= SMALL
            solver = "exact" if small and self.rank is None else "adamw"
        if solver == "exact" and self.rank is None:
            (found,) = fit_layers(X[None], y, float(self.C), tolerance=1e-6)
            scaler, regression = found.named_steps.values()
            weight, bias = regression.coef_, regression.intercept_
            if len(self.classes_) == 2:
                weight, bias = np.vstack([-weight, weight]) / 2, np.array([-bias[0], bias[0]]) / 2
            mean, scale = scaler.mean_, scaler.scale_
        elif solver == "adamw":
            mean, scale = X.mean(0), X.std(0)
            scale[scale < 10 * np.finfo(float).eps] = 1.0
            weight, bias = self._descend((X - mean) / scale, number)
        else:
            raise ValueError(
                f"solver {solver!r} with rank {self.rank!r}: choose 'auto', 'adamw', or 'exact' "
                "without a rank."
            )
        self.coef_ = weight / scale
        self.intercept_ = bias - self.coef_ @ mean
        return self

    def _descend(self, X: np.ndarray, number: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Weights `[token, d_model]` and biases on standardized states, by AdamW."""
        n, d = X.shape
        weight, bias = _gaussian(X, number, len(self.classes_))
        inputs, target = torch.tensor(X, dtype=torch.float32), torch.tensor(number)
        b = torch.tensor(bias, dtype=torch.float32, requires_grad=True)
        if self.rank is None:
            parts = [torch.tensor(weight, dtype=torch.float32, requires_grad=True)]
        else:
            r = min(int(self.rank), *weight.shape)
            u, s, v = np.linalg.svd(weight, full_matrices=False)
            root = np.sqrt(s[:r])
            parts = [torch.tensor(x, dtype=torch.float32, requires_grad=True)
                     for x in (u[:, :r] * root, root[:, None] * v[:r])]
        optimizer = torch.optim.AdamW([*parts, b], lr=float(self.lr),
                                      weight_decay=1.0 / (float(self.C) * n))
        generator = torch.Generator().manual_seed(int(self.seed))
        batches = -(-n // int(self.batch_size)) * int(self.epochs)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda i: 1 - i / max(1, batches))
        for _ in range(int(self.epochs)):
            for rows in torch.randperm(n, generator=generator).split(int(self.batch_size)):
                x = inputs[rows]
                for part in reversed(parts):
                    x = x @ part.T
                loss = torch.nn.functional.cross_entropy(x + b, target[rows])
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                schedule.step()
        found = parts[0].detach() if self.rank is None else parts[0].detach() @ parts[1].detach()
        return found.double().numpy(), b.detach().double().numpy()

    def decision_function(self, X: Any) -> np.ndarray:
        """Logits `[position, token]` over `classes_` (for two, those of the second over the first)."""
        check_is_fitted(self)
        logits = validate_data(self, X, dtype=np.float64, reset=False) @ self.coef_.T + self.intercept_
        return logits[:, 1] - logits[:, 0] if len(self.classes_) == 2 else logits

    def predict_proba(self, X: Any) -> Float[np.ndarray, "position token"]:
        """Probability of every token of `classes_`."""
        check_is_fitted(self)
        logits = validate_data(self, X, dtype=np.float64, reset=False) @ self.coef_.T + self.intercept_
        logits -= logits.max(1, keepdims=True)
        p = np.exp(logits)
        return p / p.sum(1, keepdims=True)

    def predict(self, X: Any) -> np.ndarray:
        """The likeliest token at the offset, for every position."""
        p = self.predict_proba(X)
        return self.classes_[p.argmax(1)]

    def predict_proba_of(self, X: Any, ids: Any) -> Float[np.ndarray, "position"]:
        """Probability of the document's own token at t + offset, for every position t.

        NaN where that lies outside of the document, and for tokens that were not learned.
        """
        return self._of(X, ids)[0]

    def correct(self, X: Any, ids: Any) -> Float[np.ndarray, "position"]:
        """1 where the likeliest token is the document's own at t + offset, else 0; NaN as above."""
        return self._of(X, ids)[1]

    def _of(self, X: Any, ids: Any) -> tuple[np.ndarray, np.ndarray]:
        states, ids = np.asarray(X), np.asarray(ids)
        if len(states) != len(ids):
            raise ValueError(f"{len(states)} states and {len(ids)} tokens: give one document of both.")
        at, target = _places(len(ids), int(self.offset))
        p, right = np.full(len(ids), np.nan), np.full(len(ids), np.nan)
        if not len(at):
            return p, right
        found = self.predict_proba(states[at])
        column = np.searchsorted(self.classes_, ids[target]).clip(max=len(self.classes_) - 1)
        known = self.classes_[column] == ids[target]
        rows = np.flatnonzero(known)
        p[at[rows]] = found[rows, column[rows]]
        right[at[rows]] = found[rows].argmax(1) == column[rows]
        return p, right

    def _aligned(self, X: Any, y: Any) -> tuple[Any, Any]:
        offset = int(self.offset)
        documents = isinstance(X, (list, tuple)) and len(X) and getattr(X[0], "ndim", 0) == 2
        if not documents and not offset:
            return X, y
        texts = [(np.asarray(x), np.asarray(ids)) for x, ids in (
            zip(X, y, strict=True) if documents else [(X, y)])]
        states, tokens = [], []
        for x, ids in texts:
            if len(x) != len(ids):
                raise ValueError(f"{len(x)} states and {len(ids)} tokens in a document.")
            at, target = _places(len(ids), offset)
            states.append(x[at])
            tokens.append(ids[target])
        return np.concatenate(states), np.concatenate(tokens)


def _places(length: int, offset: int) -> tuple[np.ndarray, np.ndarray]:
    """Positions that have a token at this offset, and the positions of these tokens."""
    at = np.arange(max(0, -offset), min(length, length - offset))
    return at, at + offset


def _gaussian(
    X: np.ndarray, number: np.ndarray, count: int, share: float = 0.1
) -> tuple[np.ndarray, np.ndarray]:
    """The softmax classifier of classes with one shared (shrunk) covariance: where descent begins."""
    size = np.bincount(number, minlength=count)
    means = np.zeros((count, X.shape[1]))
    np.add.at(means, number, X)
    means /= size[:, None]
    left = X - means[number]
    covariance = left.T @ left / len(X)
    covariance = (1 - share) * covariance + share * np.eye(X.shape[1]) * max(
        np.trace(covariance) / X.shape[1], 1e-6)
    weight = np.linalg.solve(covariance, means.T).T
    return weight, np.log(size / len(X)) - 0.5 * (weight * means).sum(1)


def erasure(
    start: Mapping[int, Float[np.ndarray, "position"]],
    end: Mapping[int, Float[np.ndarray, "position"]],
) -> dict[int, Float[np.ndarray, "position"]]:
    """delta(t, k): probability of the token at t + k read at t in the start layer, minus the end layer.

    Example:
        >>> p = {k: np.full(3, 0.9) for k in OFFSETS}
        >>> q = {k: np.full(3, 0.4) for k in OFFSETS}
        >>> erasure(p, q)[-1]
        array([nan, 0.5, 0.5])

    Undefined where t + k lies before the document (NaN). The paper's layers are 1 and 9 of 32.

    Source: arXiv:2406.20086, section 4.
    """
    made = {}
    for k in OFFSETS:
        if k not in start or k not in end or start[k].shape != end[k].shape:
            raise ValueError(f"probabilities for the offset {k} are needed from both layers, alike.")
        delta = np.asarray(start[k], dtype=float) - np.asarray(end[k], dtype=float)
        delta[: -k or 0] = np.nan
        made[k] = delta
    return made


def span_scores(
    delta: Mapping[int, Float[np.ndarray, "position"]]
) -> Float[np.ndarray, "position position"]:
    """psi(p, q) for every span of tokens p..q (inclusive), NaN below the diagonal.

    Example:
        >>> delta = {0: np.array([0.0, 0.6]), -1: np.array([np.nan, 0.3]), -2: np.full(2, np.nan)}
        >>> [round(float(x), 3) for x in span_scores(delta)[np.triu_indices(2)]]
        [0.0, 0.45, 0.15]

    Forgetting the last token, and in the whole span the tokens of the span before each one, counts
    for it; forgetting tokens outside of it (leaking context) counts against. By cumulative sums,
    O(n^2) for all spans.

    Source: arXiv:2406.20086, equation 2, with the released code's handling of the document's start.
    """
    n = len(delta[0])
    c1, c2 = (np.concatenate([[0.0], np.nancumsum(delta[k])]) for k in (-1, -2))
    known1, known2 = (np.concatenate([[0], np.cumsum(np.isfinite(delta[k]))]) for k in (-1, -2))
    d1, d2 = np.nan_to_num(delta[-1]), np.nan_to_num(delta[-2])
    p, q = np.arange(n)[:, None], np.arange(n)[None, :]
    inside = (c1[1:][None, :] - c1[:-1][:, None]) + (c2[1:][None, :] - c2[:-1][:, None])
    # The first token's offsets, and the second one's offset -2, point outside of the span.
    outside = d1[:, None] + d2[:, None] + np.where(q > p, np.append(d2[1:], 0.0)[:, None], 0.0)
    terms = 1 + (known1[1:][None, :] - known1[:-1][:, None]) + (
        known2[1:][None, :] - known2[:-1][:, None])
    scores = (np.nan_to_num(delta[0])[None, :] + inside - 2 * outside) / np.where(q >= p, terms, 1)
    return np.where(q >= p, scores, np.nan)


def segment(
    scores: Float[np.ndarray, "position position"], longest: SupportsIndex = 64
) -> Spans:
    """Spans that cover the document: the best first, none overlapping, single tokens in between.

    Example:
        >>> scores = np.array([[0.1, 0.9, 0.2], [np.nan, 0.0, 0.8], [np.nan, np.nan, 0.1]])
        >>> segment(scores)
        [(0, 1, 0.9), (2, 2, 0.1)]

    Source: arXiv:2406.20086, algorithm 1.
    """
    n = len(scores)
    p, q = np.triu_indices(n)
    short = q - p < int(longest)
    p, q = p[short], q[short]
    order = np.argsort(-scores[p, q], kind="stable")
    taken = np.zeros(n, bool)
    chosen: Spans = []
    for i in order:
        if not taken[p[i] : q[i] + 1].any():
            taken[p[i] : q[i] + 1] = True
            chosen.append((int(p[i]), int(q[i]), float(scores[p[i], q[i]])))
        if taken.all():
            break
    return sorted(chosen)


def vocabulary(
    documents: Sequence[Spans], texts: Sequence[Sequence[str]], fewest: SupportsIndex = 1
) -> list[tuple[str, float, int]]:
    """Words of several tokens that the segmentations imply: text, mean score, how often; best first.

    Example:
        >>> vocabulary([[(0, 1, 0.5), (2, 2, 0.1)]], [["New", " York", " is"]])
        [('New York', 0.5, 1)]
    """
    found: dict[str, list[float]] = {}
    for spans, tokens in zip(documents, texts, strict=True):
        for p, q, value in spans:
            if q > p:
                found.setdefault("".join(tokens[p : q + 1]), []).append(value)
    words = [(text, float(np.mean(v)), len(v)) for text, v in found.items() if len(v) >= int(fewest)]
    return sorted(words, key=lambda word: -word[1])


def measure(
    states: Float[np.ndarray, "layer sample d_model"],
    ids: Int[np.ndarray, "sample"],
    documents: Int[np.ndarray, "sample"],
    train: Bool[np.ndarray, "sample"],
    *,
    layers: Sequence[SupportsIndex],
    offsets: Sequence[SupportsIndex] = (-3, -2, -1, 0, 1),
    **probe: Any,
) -> Result:
    """What probes fitted on some documents read in the others, in every layer and at every offset.

    Example:
        >>> rng = np.random.default_rng(0)
        >>> ids, documents = rng.integers(3, size=80), np.repeat([0, 1, 2, 3], 20)
        >>> found = measure(np.eye(3)[ids][None], ids, documents, documents < 3, layers=[5],
        ...                 offsets=[0, -1])
        >>> float(found["correct"].sel(layer=5, offset=0).mean()) > 0.9
        True

    Args:
        states: consecutive positions of documents, one after the other; a start-of-text token left
            out. documents: whose each one is. train: the samples of the documents to fit on.
        layers: the numbers of the layers of `states`. probe: settings of `TokenOffsetProbe`.

    Returns:
        [layer, offset, sample]: `probability` of the document's own token at the offset, `correct`;
        NaN in training documents, outside of the document, and for tokens not learned. [offset]:
        `majority`, the share that the most frequent training token has.

    Raises:
        ValueError: a document that is split between training and test.
    """
    numbers = np.unique(documents)
    split = [d for d in numbers if 0 < train[documents == d].mean() < 1]
    if split or train.all() or not train.any():
        raise ValueError(
            f"document {split[0]} lies in training and test" if split else
            "there are no documents to fit on, or none to read") from None
    fitted = [documents == d for d in numbers if train[documents == d][0]]
    held = [documents == d for d in numbers if not train[documents == d][0]]
    names = [int(k) for k in offsets]
    shape = (len(states), len(names), len(ids))
    p, right, majority = np.full(shape, np.nan), np.full(shape, np.nan), np.full(len(names), np.nan)
    for j, k in enumerate(names):
        for i, layer in enumerate(layers):
            one = TokenOffsetProbe(k, int(layer), **probe).fit(
                [states[i][d] for d in fitted], [ids[d] for d in fitted])
            for d in held:
                p[i, j, d], right[i, j, d] = one._of(states[i][d], ids[d])
        targets = np.concatenate([ids[d][_places(int(d.sum()), k)[1]] for d in fitted])
        common = np.bincount(targets).argmax()
        majority[j] = np.mean(np.concatenate(
            [ids[d][_places(int(d.sum()), k)[1]] for d in held]) == common)
    dims = ("layer", "offset", "sample")
    data = xr.Dataset(
        {"probability": (dims, p), "correct": (dims, right), "majority": ("offset", majority)},
        {"layer": [int(x) for x in layers], "offset": names, "document": ("sample", documents),
         "token": ("sample", ids)})
    return Result(data, {"measure": "token offset probes", "fitted on": len(fitted),
                         "read in": len(held), "probe": {k: str(v) for k, v in probe.items()}})
