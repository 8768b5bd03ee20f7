"""Do a few frequent tokens activate most features? A graph of tokens and features, at equal exposure.

Source   arXiv:2510.08203. Sparse autoencoders are replaced by the strongest neurons of an MLP, or, where
it has no gate, by the principal directions of what it writes.
"""

from collections.abc import Sequence
from typing import Any, SupportsFloat, SupportsIndex, Union

import numpy as np
import torch
from jaxtyping import Bool, Float, Int, Shaped
from scipy import sparse
from scipy.special import gammaln

from interp.core import Prompt, PromptError, SiteRefused

Indices = Union[Sequence[SupportsIndex], np.ndarray]


def frequent(tokens: Indices, share: SupportsFloat = 0.4) -> list[int]:
    """The fewest tokens that make up this share of a text, most frequent first.

    Example:
        >>> frequent([5, 1, 5, 2, 5, 3, 1, 4], 0.5)
        [5, 1]
    """
    found, counts = np.unique(np.asarray(tokens), return_counts=True)
    order = np.argsort(-counts, kind="stable")
    needed = int(np.searchsorted(np.cumsum(counts[order]), float(share) * counts.sum())) + 1
    return [int(i) for i in found[order[:needed]]]


def strongest(
    values: Float[np.ndarray, "position feature"], k: SupportsIndex
) -> Bool[np.ndarray, "position feature"]:
    """Which features are on at each position: the k of largest size there.

    Example:
        >>> strongest(np.array([[0.1, -3.0, 2.0], [1.0, 0.0, 0.5]]), 1).astype(int).tolist()
        [[0, 1, 0], [1, 0, 0]]

    Raises:
        ValueError: no features to choose from, or values that are not numbers.
    """
    values, k = np.abs(values), int(k)
    if not 1 <= k <= values.shape[1]:
        raise ValueError(f"cannot turn on {k} of {values.shape[1]} features.")
    if not np.isfinite(values).all():
        raise ValueError("features that are not numbers cannot be ranked; run the model in float32.")
    chosen = np.argpartition(-values, k - 1, axis=1)[:, :k]
    on = np.zeros(values.shape, dtype=bool)
    np.put_along_axis(on, chosen, True, axis=1)
    # A feature that is zero is not on, however few others there are.
    return on & (values > 0)


def rarefied(
    counts: Int[np.ndarray, " feature"], n: SupportsIndex, sizes: Indices
) -> Float[np.ndarray, " size"]:
    """How many features some of n occurrences, drawn at random, are expected to activate: exact.

    Example:
        >>> rarefied(np.array([2, 1]), 2, [0, 1, 2]).tolist()
        [0.0, 1.5, 2.0]

    Args:
        counts: in how many of the n occurrences each feature is on. sizes: how many are drawn.
    """
    counts = counts[counts > 0].astype(float)[:, None]
    total, m = float(int(n)), np.asarray(sizes, dtype=float)[None]
    if (m > total).any() or (counts > total).any():
        raise ValueError(f"no more than all {int(n)} occurrences can be drawn or counted.")
    left = total - counts - m
    with np.errstate(invalid="ignore"):
        missed = np.exp(gammaln(total - counts + 1) - gammaln(np.maximum(left, 0) + 1)
                        - gammaln(total + 1) + gammaln(total - m + 1))
    return np.where(left >= 0, 1 - missed, 1.0).sum(0)


class TokenFeatures:
    """Which token activated which feature how often, document by document.

    Example:
        >>> on = np.array([[1, 1, 0], [0, 1, 0], [1, 1, 0], [0, 0, 1]], dtype=bool)
        >>> graph = TokenFeatures([7, 8, 7, 9], on, [0, 0, 1, 1])
        >>> graph.degree.tolist(), graph.frequency.tolist()
        ([2, 1, 1], [2, 1, 1])
        >>> graph.coverage([1, 3]).tolist()
        [2, 3]

    Attributes:
        vocabulary: the tokens of the rows, most frequent first. graph: `[token, feature]`, counts.
        frequency, degree: occurrences of each token, and the features that it activated at all.
    """

    def __init__(
        self, tokens: Indices, on: Bool[np.ndarray, "position feature"], documents: Indices
    ) -> None:
        self.tokens, self.documents = np.asarray(tokens), np.asarray(documents)
        if not len(self.tokens) == len(on) == len(self.documents) or not len(on):
            raise ValueError("give one token and one document for every position, and at least one.")
        self.on = on
        found, counts = np.unique(self.tokens, return_counts=True)
        order = np.argsort(-counts, kind="stable")
        self.vocabulary, self.frequency = found[order], counts[order]
        row = np.empty(len(found), dtype=int)
        row[order] = np.arange(len(found))
        self.rank = row[np.searchsorted(found, self.tokens)]
        where = sparse.csr_matrix((np.ones(len(on), dtype=int), (self.rank, np.arange(len(on)))),
                                  shape=(len(found), len(on)))
        self.graph = sparse.csr_matrix(where @ sparse.csr_matrix(on.astype(int)))
        self.degree = np.diff(self.graph.indptr)

    def coverage(self, tops: Indices) -> Int[np.ndarray, " top"]:
        """How many features the most frequent tokens activate together."""
        return np.array([len(np.unique(self.graph[: int(k)].indices)) for k in tops])

    def random_coverage(self, tops: Indices) -> Float[np.ndarray, " top"]:
        """The same for as many occurrences drawn from the whole text."""
        sizes = np.cumsum(self.frequency)[np.asarray(tops, dtype=int) - 1]
        return rarefied(self.on.sum(0), len(self.on), sizes)

    def exposure(self) -> Float[np.ndarray, " token"]:
        """The degree that each token would have if its occurrences were drawn from the whole text."""
        sizes, where = np.unique(self.frequency, return_inverse=True)
        return rarefied(self.on.sum(0), len(self.on), sizes)[where]

    def per_document(
        self, chosen: Indices
    ) -> tuple[Float[np.ndarray, " document"], Float[np.ndarray, " document"]]:
        """The share of a document's features that the chosen tokens activate in it, and the share
        that as many of its occurrences, drawn at random, are expected to.

        Documents without any of these tokens, or with no others, are left out.
        """
        mine = np.isin(self.tokens, np.asarray(chosen))
        shares, expected = [], []
        for document in np.unique(self.documents):
            here = self.documents == document
            n, m = int(here.sum()), int((here & mine).sum())
            counts = self.on[here].sum(0)
            if not 0 < m < n or not counts.any():
                continue
            active = float((counts > 0).sum())
            shares.append(float(self.on[here & mine].any(0).sum()) / active)
            expected.append(float(rarefied(counts, n, [m])[0]) / active)
        return np.array(shares), np.array(expected)


def slope(
    frequency: Shaped[np.ndarray, " token"], degree: Shaped[np.ndarray, " token"]
) -> float:
    """The exponent of degree against frequency; nan where all frequencies are equal.

    Example:
        >>> round(slope(np.array([1, 10, 100]), np.array([2.0, 20.0, 200.0])), 6)
        1.0
    """
    kept = (np.asarray(degree) > 0) & (np.asarray(frequency) > 0)
    x, y = (np.log(np.asarray(values, dtype=float)[kept]) for values in (frequency, degree))
    if len(x) < 2 or np.ptp(x) == 0:
        return float("nan")
    x = x - x.mean()
    return float(x @ y / (x @ x))


def features(
    model: Any, prompts: Sequence[Prompt], layer: SupportsIndex, *, batch_size: int = 8
) -> tuple[Float[np.ndarray, "position feature"], str]:
    """Features of all positions of all prompts in one layer, one after the other, and their kind:
    "neurons" of a gated MLP, or "directions", both signs of the principal components of what
    another MLP (or, where that cannot be read, the block) writes.

    Example:
        >>> import interp
        >>> model = interp.open_model("reader")
        >>> values, kind = features(model, [Prompt.from_tokens(range(6, 20))], 1)
        >>> values.shape, kind
        ((14, 512), 'neurons')

    Raises:
        PromptError: no prompts. OutOfRange: no such layer.
    """
    if not len(prompts):
        raise PromptError("no prompts to read features from: give at least one.")
    layer = int(layer)

    def states(site: str) -> np.ndarray:
        read = model.run(prompts, read=f"{site}.{layer}", logits="none",
                         batch_size=batch_size).reads[f"{site}.{layer}"]
        return np.concatenate([read.values[i, 0, : len(one)] for i, one in enumerate(prompts)])

    try:
        stages = model.mlp_stages(layer)
        parameter = next(model.hf.parameters())
        with torch.inference_mode():
            given = torch.as_tensor(states("mlp_in"), dtype=parameter.dtype, device=parameter.device)
            return stages(given)["product"].float().cpu().numpy(), "neurons"
    except SiteRefused:
        pass
    try:
        written = states("mlp_out")
    except SiteRefused:
        written = states("resid_post")
    centered = written.astype(float) - written.mean(0)
    # A quarter as many directions as positions at most: each must be seen often.
    n = max(1, min(centered.shape[1], len(centered) // 4))
    left, size, _ = np.linalg.svd(centered, full_matrices=False)
    kept = size[:n] > 1e-6 * max(size[0], 1e-30)
    projected = left[:, :n][:, kept] * np.sqrt(len(centered))
    return np.concatenate([projected.clip(0), (-projected).clip(0)], 1), "directions"
