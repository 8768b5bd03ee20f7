"""Attention probes: how much syntax do attention maps hold, in single heads and together?

Paper     arXiv:1906.04341 (probing classifiers)
Question  Can the syntactic head of a word be read from attention alone, or only with the words?
Measure   probability of each candidate head from a linear mix of all attention maps, both directions;
          the mix fixed, or a linear function of the two words
Cause     none; words and distances without attention are the baseline

Single heads as classifiers are in `probes.head_relations`. All probabilities are a softmax over the
candidates of a word: the root first, then every word of its sentence but itself.
"""

from collections.abc import Callable, Sequence
from typing import Any, Optional, SupportsIndex

import numpy as np
import torch
from jaxtyping import Float, Int
from sklearn.base import BaseEstimator
from sklearn.exceptions import NotFittedError
from torch import Tensor

from interp.core import NumericalError
from probes.word_attention import ROOT, Sentence, word_attention

__all__ = ["AttentionProbe", "AttentionWordsProbe", "Sentence", "WordsDistanceProbe", "uas",
           "word_attention"]

def uas(
    predicted: Sequence[Int[np.ndarray, "_"]], heads: Sequence[Any],
    counted: Optional[Sequence[Any]] = None,
) -> float:
    """Unlabeled attachment score: the share of words whose head is right.

    Example:
        >>> found = [np.array([1, -1, 1])]
        >>> uas(found, [[1, -1, 0]]) == 2 / 3, uas(found, [[1, -1, 0]], [[True, True, False]])
        (True, 1.0)

    Args:
        heads: number of each word's head in its sentence, -1 for the root.
        counted: which words count, for example all but punctuation.
    """
    right = [np.asarray(p) == np.asarray(h) for p, h in zip(predicted, heads, strict=True)]
    if counted is not None:
        right = [r[np.asarray(c, dtype=bool)] for r, c in zip(right, counted, strict=True)]
    flat = np.concatenate([*right, np.zeros(0, bool)])
    return float(flat.mean()) if len(flat) else float("nan")


class _CandidateProbe(BaseEstimator):
    """What the three probes share: candidates, cross-entropy, prediction. Samples are sentences."""

    seed: Any

    def _build(self, X: Sequence[Sentence]) -> tuple[list[Tensor], Callable]:
        """Initial parameters, and a function from these and sentences of one length to logits
        `[sentence, candidate, word]`, root first."""
        raise NotImplementedError

    def _penalty(self, parameters: list[Tensor]) -> Tensor:
        raise NotImplementedError

    def _fit(self, X: Sequence[Sentence], y: Sequence[Any], steps: int) -> None:
        heads = _checked(X, y)
        torch.manual_seed(int(self.seed))
        parameters, logits = self._build(X)
        inputs = _by_length(X, heads)
        optimizer = torch.optim.LBFGS(parameters, max_iter=steps, history_size=20,
                                      line_search_fn="strong_wolfe", tolerance_grad=1e-6,
                                      tolerance_change=1e-10)
        total = sum(len(h) for h in heads)

        def loss() -> Tensor:
            optimizer.zero_grad()
            each = [torch.nn.functional.cross_entropy(logits(parameters, some), some["heads"] + 1,
                                                      reduction="sum") for some in inputs]
            value = (torch.stack(each).sum() + self._penalty(parameters)) / total
            value.backward()
            return value

        with torch.enable_grad():
            optimizer.step(loss)
        self.loss_ = float(loss().detach())
        self.parameters_ = [p.detach() for p in parameters]
        self._logits = logits
        self.n_channels_ = X[0].attention.shape[0]

    def decision_function(self, X: Sequence[Sentence]) -> list[Float[Tensor, "candidate word"]]:
        """Log probability of every candidate head, root first, for every word."""
        if not hasattr(self, "parameters_"):
            raise NotFittedError(f"this {type(self).__name__} is not fitted yet; call fit first.")
        return [self._logits(self.parameters_, _stacked([one]))[0].log_softmax(0) for one in X]

    def predict(self, X: Sequence[Sentence]) -> list[Int[np.ndarray, "_"]]:
        """The most probable head of every word, -1 for the root."""
        return [(scores.argmax(0) - 1).numpy() for scores in self.decision_function(X)]

    def score(self, X: Sequence[Sentence], y: Sequence[Any], counted: Any = None) -> float:
        """UAS."""
        return uas(self.predict(X), y, counted)


class AttentionProbe(_CandidateProbe):
    """Attention only: p(i | j) is a softmax over i of sum_k w_k A_ij + u_k A_ji.

    Example:
        >>> rng = np.random.default_rng(0)
        >>> heads = [np.array([1, -1, 1, 2]) for _ in range(6)]
        >>> X = []
        >>> for h in heads:
        ...     A = rng.random((2, 4, 4)) * 0.1
        ...     A[1, [0, 2, 3], h[[0, 2, 3]]] = 1.0  # channel 1: words attend to their heads
        ...     X.append(Sentence(A, rng.random((2, 4, 1)), rng.random((2, 4, 1))))
        >>> probe = AttentionProbe().fit(X[:3], heads[:3])
        >>> probe.score(X[3:], heads[3:]), bool(probe.coef_[1, 1] > probe.coef_[1, 0])
        (1.0, True)

    Args:
        alpha: L2 penalty. The problem is convex; it is solved, not trained for one epoch.
        max_iter: steps of L-BFGS.

    Attributes:
        coef_: `[channel, 2]`, weights of A_ij (candidate attends to word) and A_ji (word attends to
            candidate). The root is scored by attention to and from special tokens, each with weights
            of its own, and a constant: `root_coef_` `[2, channel, special]`, `root_intercept_`.

    Source: arXiv:1906.04341, section 5 (Adam, one epoch there; the root a learned mix).
    """

    def __init__(self, alpha: Any = 1.0, max_iter: Any = 200, seed: Any = 0) -> None:
        self.alpha, self.max_iter, self.seed = alpha, max_iter, seed

    def fit(self, X: Sequence[Sentence], y: Sequence[Any]) -> "AttentionProbe":
        """Fit on sentences and the heads of their words."""
        self._fit(X, y, int(self.max_iter))
        self.coef_ = self.parameters_[0].numpy()
        self.root_coef_ = self.parameters_[1].numpy()
        self.root_intercept_ = float(self.parameters_[2])
        return self

    def _build(self, X: Sequence[Sentence]) -> tuple[list[Tensor], Callable]:
        channels, _, special = X[0].to_special.shape
        made = [torch.zeros(channels, 2), torch.zeros(2, channels, special), torch.zeros(())]
        return [p.double().requires_grad_() for p in made], _attention_logits

    def _penalty(self, parameters: list[Tensor]) -> Tensor:
        return _squares(self.alpha, parameters[:2])


def _attention_logits(parameters: list[Tensor], one: dict[str, Any]) -> Tensor:
    weights, root_weights, constant = parameters
    a = one["attention"]
    words = torch.einsum("bkij,k->bij", a, weights[:, 0]) + torch.einsum(
        "bkji,k->bij", a, weights[:, 1])
    root = torch.einsum("bdkjs,dks->bj", one["special"], root_weights) + constant
    return _candidates(root, words)


class AttentionWordsProbe(_CandidateProbe):
    """Attention and words: the weight of each map is a linear function of the two words' vectors.

    logit(i, j) = sum_k (W_k [v_i; v_j; 1]) A_ij + (U_k [v_i; v_j; 1]) A_ji. The constant makes the
    attention-only probe a special case. The root has a zero vector and its own attention, to and
    from special tokens, always in the first row of candidates: in the released code its attention is
    first and its word last, so that every candidate is given its neighbor's word.

    Args:
        alpha: L2 penalty on all weights.

    Attributes:
        coef_: `[2, channel, 2 size + 1]`, for A_ij and A_ji.

    Source: arXiv:1906.04341, section 5 (GloVe vectors there; here the caller's, for example the
    model's own input embeddings).
    """

    def __init__(self, alpha: Any = 10.0, max_iter: Any = 100, seed: Any = 0) -> None:
        self.alpha, self.max_iter, self.seed = alpha, max_iter, seed

    def fit(self, X: Sequence[Sentence], y: Sequence[Any]) -> "AttentionWordsProbe":
        """Fit on sentences with `vectors`, and the heads of their words."""
        _check_vectors(X)
        self._fit(X, y, int(self.max_iter))
        self.coef_ = self.parameters_[0].numpy()
        return self

    def _build(self, X: Sequence[Sentence]) -> tuple[list[Tensor], Callable]:
        channels, _, special = X[0].to_special.shape
        size = np.asarray(X[0].vectors).shape[1]
        made = [torch.zeros(2, channels, 2 * size + 1), torch.zeros(2, channels, special, size + 1),
                torch.zeros(())]
        return [p.double().requires_grad_() for p in made], _attention_words_logits

    def _penalty(self, parameters: list[Tensor]) -> Tensor:
        return _squares(self.alpha, parameters[:2])


def _attention_words_logits(parameters: list[Tensor], one: dict[str, Any]) -> Tensor:
    weights, root_weights, constant = parameters
    a, v = one["attention"], one["vectors"]
    size = v.shape[-1]
    total = torch.zeros_like(a[:, 0])
    for maps, w in ((a, weights[0]), (a.transpose(2, 3), weights[1])):
        candidate, word = v @ w[:, :size].T, v @ w[:, size : 2 * size].T
        scale = candidate.mT[..., None] + word.mT[:, :, None] + w[:, -1, None, None]
        total = total + (maps * scale).sum(1)
    known = torch.cat([v, torch.ones_like(v[..., :1])], -1)
    # Weights by word first: [sentence, way, channel, word, special].
    wanted = torch.einsum("dksv,bjv->bdkjs", root_weights, known)
    root = (one["special"] * wanted).sum((1, 2, 4)) + constant
    return _candidates(root, total)


class WordsDistanceProbe(_CandidateProbe):
    """The baseline without attention: both words and how far apart they are, in a small network.

    Args:
        hidden: tanh units. alpha: L2 penalty.

    The distance has eight features: which side, neighbors and next neighbors on either side, the
    logarithm of the distance, and whether the candidate is the root.

    Source: arXiv:1906.04341 (tanh, 256 units, eight distance features; which ones is ours).
    """

    def __init__(
        self, hidden: Any = 64, alpha: Any = 1.0, max_iter: Any = 100, seed: Any = 0
    ) -> None:
        self.hidden, self.alpha, self.max_iter, self.seed = hidden, alpha, max_iter, seed

    def fit(self, X: Sequence[Sentence], y: Sequence[Any]) -> "WordsDistanceProbe":
        """Fit on sentences with `vectors`, and the heads of their words."""
        _check_vectors(X)
        self._fit(X, y, int(self.max_iter))
        return self

    def _build(self, X: Sequence[Sentence]) -> tuple[list[Tensor], Callable]:
        size, units = np.asarray(X[0].vectors).shape[1], int(self.hidden)
        generator = torch.Generator().manual_seed(int(self.seed))
        shapes = [(size, units), (size, units), (8, units), (units,), (units,)]
        made = [torch.randn(shape, generator=generator) / max(1, shape[0]) ** 0.5 for shape in shapes]
        return [p.double().requires_grad_() for p in made], _words_logits

    def _penalty(self, parameters: list[Tensor]) -> Tensor:
        return _squares(self.alpha, parameters)


def _words_logits(parameters: list[Tensor], one: dict[str, Any]) -> Tensor:
    of_candidate, of_word, of_distance, bias, out = parameters
    v = one["vectors"]
    candidates = torch.cat([torch.zeros_like(v[:, :1]), v], 1)
    features = distance_features(v.shape[1]).to(v)
    hidden = torch.tanh((candidates @ of_candidate)[:, :, None] + (v @ of_word)[:, None]
                        + features @ of_distance + bias)
    scores = hidden @ out
    return _candidates(scores[:, 0], scores[:, 1:])


def distance_features(n: SupportsIndex) -> Float[Tensor, "candidate word 8"]:
    """The eight features of every candidate (root first) and word of a sentence of n words."""
    n = int(n)
    gap = (torch.arange(n)[:, None] - torch.arange(n)[None]).double()
    kinds = [gap > 0, gap < 0, gap == 1, gap == -1, gap == 2, gap == -2]
    words = torch.stack([*(k.double() for k in kinds), torch.log1p(gap.abs()),
                         torch.zeros_like(gap)], -1)
    root = torch.zeros(1, n, 8, dtype=torch.double)
    root[..., -1] = 1.0
    return torch.cat([root, words])


# -- parts ----------------------------------------------------------------------------------------


def _squares(alpha: Any, parameters: Sequence[Tensor]) -> Tensor:
    return 0.5 * float(alpha) * torch.stack([(p**2).sum() for p in parameters]).sum()


def _candidates(root: Tensor, words: Tensor) -> Tensor:
    """Logits `[sentence, candidate, word]` with the root first; no word is its own head."""
    own = torch.eye(words.shape[-1], dtype=torch.bool, device=words.device)
    return torch.cat([root[:, None], words.masked_fill(own, float("-inf"))], 1)


def _stacked(some: Sequence[Sentence]) -> dict[str, Any]:
    """Sentences of one length as tensors."""
    def stack(arrays: Sequence[Any]) -> Tensor:
        return torch.stack([torch.as_tensor(a) for a in arrays]).double()

    return {
        "attention": stack([one.attention for one in some]),
        "special": torch.stack([stack([one.from_special for one in some]),
                                stack([one.to_special for one in some])], 1),
        "vectors": None if some[0].vectors is None else stack([one.vectors for one in some]),
    }


def _by_length(X: Sequence[Sentence], heads: Sequence[Tensor]) -> list[dict[str, Any]]:
    """Sentences and their heads, those of one length together."""
    found = []
    for n in sorted({len(one) for one in X}):
        at = [i for i, one in enumerate(X) if len(one) == n]
        found.append({**_stacked([X[i] for i in at]), "heads": torch.stack([heads[i] for i in at])})
    return found


def _checked(X: Sequence[Sentence], y: Sequence[Any]) -> list[Tensor]:
    """Heads as tensors. ValueError for what does not fit."""
    if not len(X) or len(X) != len(y):
        raise ValueError(f"heads of {len(y)} sentences for {len(X)} sentences: give one list each.")
    shape = {(one.attention.shape[0], one.to_special.shape[2]) for one in X}
    if len(shape) > 1:
        raise ValueError(f"sentences differ in their (channels, special tokens): {sorted(shape)}.")
    found = []
    for number, (one, heads) in enumerate(zip(X, y)):
        given = np.asarray(heads)
        if given.shape != (len(one),) or given.min() < ROOT or given.max() >= len(one) \
                or (given == np.arange(len(one))).any():
            raise ValueError(f"sentence {number} has {len(one)} words; its heads must be as many "
                             f"numbers from {ROOT} (root) to {len(one) - 1}, none its own head.")
        if not (np.isfinite(one.attention).all() and np.isfinite(one.to_special).all()
                and np.isfinite(one.from_special).all()):
            raise NumericalError(f"the attention of sentence {number} contains NaN or infinity.")
        found.append(torch.as_tensor(given).long())
    return found


def _check_vectors(X: Sequence[Sentence]) -> None:
    for number, one in enumerate(X):
        if one.vectors is None or np.shape(one.vectors)[0] != len(one):
            raise ValueError(f"sentence {number} has no vector for each of its {len(one)} words; "
                             "this probe looks at words.")
