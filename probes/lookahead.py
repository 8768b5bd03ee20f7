"""Looking ahead: which tokens after the next one does a single state already hold?

Paper     arXiv:2311.04897 (Future Lens)
Question  Can the model's own continuation at T + 1 + N be read off one state at T?
Measure   Precision@k and surprisal of what is read, by layer and by N (N = 0 is the next token), for
          a linear map to the state at T + N and one to its vocabulary; beside counts of token pairs
Cause     `probes.carried_states`: the state carried into another prompt
"""

from typing import Any, SupportsIndex

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from sklearn.base import BaseEstimator, MultiOutputMixin, RegressorMixin
from sklearn.linear_model import RidgeCV
from sklearn.utils.validation import check_is_fitted, validate_data
from torch import Tensor

from interp.models.futures import Readout

MOST = 10
"""Largest k of Precision@k."""

ALPHAS = tuple(10.0**k for k in range(-3, 7))


def top_tokens(
    logits: Float[Tensor, "*row vocab"], most: SupportsIndex = MOST
) -> Int[Tensor, "*row rank"]:
    """The `most` likeliest tokens, the likeliest first.

    Example:
        >>> top_tokens(torch.tensor([[0.1, 3.0, 2.0]]), 2)
        tensor([[1, 2]])
    """
    return logits.topk(min(int(most), logits.shape[-1]), -1).indices


def hits(top: Int[Tensor, "*row rank"], tokens: Int[Tensor, "*row"]) -> Bool[Tensor, "*row rank"]:
    """Whether a token is among the first k = 1, 2, ...: its mean over samples is Precision@k.

    Example:
        >>> hits(torch.tensor([[4, 7, 1]]), torch.tensor([7]))
        tensor([[False,  True,  True]])

    Source: arXiv:2311.04897, released code.
    """
    return (top == tokens[..., None]).cumsum(-1) > 0


def surprisal(
    readout: Readout, ahead: Float[Tensor, "*row d_model"], predicted: Int[Tensor, "*row"]
) -> Float[Tensor, "*row"]:
    """-ln of the probability (nats) that the model in the full context gives to a predicted token.

    Example:
        >>> import interp
        >>> read = Readout(interp.open_model("backcopy-1l"))
        >>> surprisal(read, torch.randn(2, 3, 256), torch.zeros(2, 3, dtype=torch.long)).shape
        torch.Size([2, 3])

    `ahead` are the states it is read from (see `interp.models.futures.Futures`).

    Source: arXiv:2311.04897, section 3.
    """
    states, chosen = ahead.reshape(-1, ahead.shape[-1]), predicted.reshape(-1)
    made = []
    with torch.no_grad():
        for some, tokens in zip(states.split(readout.batch_size), chosen.split(readout.batch_size)):
            made.append(-readout(some).log_softmax(-1).gather(1, tokens[:, None])[:, 0])
    return torch.cat(made).reshape(predicted.shape)


class FollowerCounts(BaseEstimator):
    """Counts of which token comes `N` after the next, given one token: the bigram line.

    Example:
        >>> table = FollowerCounts().fit([1, 1, 1, 2], [5, 6, 6, 7])
        >>> table.predict_top([1, 2, 3], most=2)
        array([[6, 5],
               [7, 6],
               [6, 5]])

    What followed most often comes first; ties, and tokens never seen, go by the overall counts.

    Source: arXiv:2311.04897 (a bigram baseline on the Pile), recounted here on the training texts.
    """

    def fit(self, tokens: Any, targets: Any) -> "FollowerCounts":
        """Count. ValueError for lengths that differ or nothing to count."""
        given, after = np.asarray(tokens).ravel(), np.asarray(targets).ravel()
        if given.shape != after.shape or not len(given):
            raise ValueError(
                f"{len(given)} tokens and {len(after)} targets: give one target for each of at least "
                "one token."
            )
        size = 1 + int(max(given.max(), after.max()))
        overall = np.bincount(after, minlength=size)
        pairs, counts = np.unique(given * size + after, return_counts=True)
        first, second = pairs // size, pairs % size
        order = np.lexsort((second, -overall[second], -counts, first))
        self.followers_ = {int(t): second[order][first[order] == t] for t in np.unique(first)}
        self.overall_ = np.lexsort((np.arange(size), -overall))
        return self

    def predict_top(self, tokens: Any, most: SupportsIndex = MOST) -> Int[np.ndarray, "sample rank"]:
        """The `most` likeliest tokens for each."""
        check_is_fitted(self)
        made = []
        for token in np.asarray(tokens).ravel():
            own = self.followers_.get(int(token), self.overall_[:0])[: int(most)]
            rest = self.overall_[: int(most) + len(own)]
            row = np.concatenate([own, rest[~np.isin(rest, own)]])[: int(most)]
            made.append(np.pad(row, (0, int(most) - len(row)), constant_values=-1))
        return np.stack(made)


class FutureLinearLens(MultiOutputMixin, RegressorMixin, BaseEstimator):
    """A linear map from a state at T in one layer to the last block's output at T + N.

    Example:
        >>> rng = np.random.default_rng(0)
        >>> H = rng.standard_normal((60, 5)); later = H @ rng.standard_normal((5, 5)) + 1
        >>> lens = FutureLinearLens(n_ahead=1, layer=2).fit(H, later)
        >>> bool(np.allclose(lens.predict(H), later, atol=1e-2))
        True

    Ridge on all samples, its penalty chosen by generalized cross-validation (the released fit uses
    its first hundred samples and no penalty). `fine_tune` goes on from there through the model's
    frozen norm and head.

    Args:
        n_ahead, layer: what the map is for; kept, not used.
        alphas: penalties to choose from.

    Source: arXiv:2311.04897, linear model approximation.
    """

    def __init__(self, n_ahead: Any = 1, layer: Any = 0, alphas: Any = ALPHAS) -> None:
        self.n_ahead, self.layer, self.alphas = n_ahead, layer, alphas

    def fit(self, X: Any, y: Any) -> "FutureLinearLens":
        """The map, `coef_` and `intercept_`, with the penalty `alpha_`."""
        X, y = validate_data(self, X, y, multi_output=True, y_numeric=True, dtype=np.float64)
        found: Any = RidgeCV(alphas=self.alphas).fit(X, y)
        self.coef_, self.intercept_, self.alpha_ = found.coef_, found.intercept_, found.alpha_
        return self

    def predict(self, X: Any) -> np.ndarray:
        """States at T + N, `[sample, d_model]`."""
        check_is_fitted(self)
        X = validate_data(self, X, dtype=np.float64, reset=False)
        return X @ self.coef_.T + self.intercept_

    def predict_logits(self, readout: Readout, X: Any) -> Float[Tensor, "sample vocab"]:
        """The predicted states, read with the model's own norm and head."""
        with torch.no_grad():
            return readout(torch.as_tensor(self.predict(X), dtype=torch.float32))

    def fine_tune(
        self, readout: Readout, X: Any, ahead: Any, *, epochs: SupportsIndex = 3,
        batch_size: SupportsIndex = 100, lr: Any = 1e-3, seed: SupportsIndex = 0,
    ) -> "FutureLinearLens":
        """Minimize KL(model || lens) through the frozen norm and head, from the fitted map on.

        AdamW with gradients clipped at 1. Keeps the map of the epoch with the lowest mean loss, the
        fitted one included. `ahead` are the states at T + N that the model reads.

        Source: arXiv:2311.04897, released code (stochastic gradients with momentum there).
        """
        check_is_fitted(self)
        H = torch.as_tensor(np.asarray(X), dtype=torch.float32)
        later = torch.as_tensor(np.asarray(ahead), dtype=torch.float32)
        weight = torch.tensor(self.coef_, dtype=torch.float32, requires_grad=True)
        bias = torch.tensor(self.intercept_, dtype=torch.float32, requires_grad=True)
        size = float(weight.detach().abs().mean()) or 1.0
        optimizer = torch.optim.AdamW([{"params": [weight], "lr": float(lr) * size},
                                       {"params": [bias], "lr": float(lr)}], weight_decay=1e-3)
        generator = torch.Generator().manual_seed(int(seed))
        best, kept = np.inf, (self.coef_, self.intercept_)
        for _ in range(int(epochs) + 1):
            before, total = (weight.detach().clone(), bias.detach().clone()), 0.0
            for rows in torch.randperm(len(H), generator=generator).split(int(batch_size)):
                loss = divergence(readout(H[rows] @ weight.T + bias), readout(later[rows]).detach())
                total += float(loss.detach()) * len(rows)
                optimizer.zero_grad()
                loss.backward()
                torch.nn.utils.clip_grad_norm_([weight, bias], 1.0)
                optimizer.step()
            if total < best:
                best, kept = total, (before[0].numpy(), before[1].numpy())
        self.coef_, self.intercept_ = kept
        return self

    def score_precision_at_k(
        self, readout: Readout, X: Any, tokens: Any, k: SupportsIndex = 1
    ) -> float:
        """Share of samples whose token is among the `k` likeliest."""
        top = top_tokens(self.predict_logits(readout, X), k)
        return float(hits(top, torch.as_tensor(np.asarray(tokens)))[:, -1].float().mean())


class FutureVocabularyLens(BaseEstimator):
    """A linear map from a state at T to the model's log-probabilities at T + N, with no norm or head.

    Example:
        >>> rng = np.random.default_rng(0)
        >>> H, W = rng.standard_normal((200, 4)), rng.standard_normal((4, 9))
        >>> lens = FutureVocabularyLens().fit(H, torch.tensor(H @ W))
        >>> float((lens.predict_top(H, 1)[:, 0] == (H @ W).argmax(1)).mean()) > 0.9
        True

    Only tokens that are the likeliest of some training sample have a column: no other can win.

    Source: arXiv:2311.04897, the baseline that predicts the vocabulary directly.
    """

    def __init__(self, n_ahead: Any = 1, layer: Any = 0, alphas: Any = ALPHAS) -> None:
        self.n_ahead, self.layer, self.alphas = n_ahead, layer, alphas

    def fit(self, X: Any, logits: Float[Tensor, "sample vocab"]) -> "FutureVocabularyLens":
        """Ridge on the model's log-probabilities, its penalty as in `FutureLinearLens`."""
        self.tokens_ = logits.argmax(-1).unique().numpy()
        target = logits.log_softmax(-1)[:, self.tokens_].numpy()
        self._found = RidgeCV(alphas=self.alphas).fit(X, target)
        self.alpha_ = self._found.alpha_
        return self

    def predict_top(self, X: Any, most: SupportsIndex = MOST) -> Int[np.ndarray, "sample rank"]:
        """The `most` likeliest tokens; -1 where there are fewer columns."""
        check_is_fitted(self)
        scores = np.asarray(self._found.predict(X)).reshape(len(X), -1)
        order = self.tokens_[np.argsort(-scores, 1, kind="stable")[:, : int(most)]]
        return np.pad(order, ((0, 0), (0, int(most) - order.shape[1])), constant_values=-1)


def divergence(
    student: Float[Tensor, "*row vocab"], teacher: Float[Tensor, "*row vocab"]
) -> Float[Tensor, ""]:
    """Mean Kullback-Leibler divergence of the student's distribution from the teacher's, nats."""
    p, q = teacher.log_softmax(-1), student.log_softmax(-1)
    return (p.exp() * (p - q)).sum(-1).mean()


def within_word(tokenizer: Any, before: Any, tokens: Any) -> Bool[np.ndarray, "sample"]:
    """Whether a token goes on with the word that the token before it began.

    Example:
        >>> from interp.organisms import reader
        >>> within_word(reader.tokenizer(), [9, 9], [10, 11])
        array([False, False])

    By the text that the two make: a letter or digit right after a letter or digit. Continuations of
    words are easy, so precision is to be looked at without them.
    """
    made, known = [], {}
    for pair in zip(np.asarray(before).tolist(), np.asarray(tokens).tolist()):
        if pair not in known:
            first = tokenizer.decode([pair[0]])
            both = tokenizer.decode(list(pair))
            rest = both[len(first):] if both.startswith(first) else both.strip()
            known[pair] = first[-1:].isalnum() and rest[:1].isalnum()
        made.append(known[pair])
    return np.array(made, dtype=bool)
