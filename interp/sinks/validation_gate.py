"""Validation gate of discovered sink dimensions: do they mark sinks, or only large coordinates?

Paper     arXiv:2503.03321 (sink dimensions); the gate is this toolkit's
Question  Does phi in these dimensions tell the tokens that collect attention from the others?
Measure   four checks (anchor, ordinary text, AUROC for attention received, two populations) and
          the same AUROC for random dimension sets of equal size
Cause     none here: see `interp.sinks.visual`
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import SupportsFloat, SupportsIndex

import numpy as np
import torch
from jaxtyping import Float
from scipy.stats import rankdata
from torch import Tensor

from interp.core.errors import NumericalError

Values = Tensor | np.ndarray | Sequence[SupportsFloat]
Dims = Sequence[SupportsIndex] | np.ndarray | Tensor


@dataclass(frozen=True)
class Check:
    """One line of the gate: what was measured, what it must reach, and whether it does."""

    name: str
    value: float
    limit: float
    passed: bool

    def __str__(self) -> str:
        verdict = "PASS" if self.passed else "FAIL"
        return f"{verdict}  {self.name}: {self.value:.3g} (limit {self.limit:.3g})"


@dataclass(frozen=True)
class Gate:
    """The four checks; it passes only if all of them do, and prints PASS or FAIL for each.

    Where only "attention" fails, the model may have no visual sink of this kind: say so, and do
    not force labels.
    """

    checks: tuple[Check, ...]

    @property
    def passed(self) -> bool:
        return all(check.passed for check in self.checks)

    def __getitem__(self, name: str) -> Check:
        return next(check for check in self.checks if check.name == name)

    def __str__(self) -> str:
        lines = [str(check) for check in self.checks]
        return "\n".join([("PASS" if self.passed else "FAIL") + "  gate", *lines])


def gate(
    anchor_phi: Values,
    text_phi: Values,
    visual_phi: Sequence[Values],
    visual_attention: Sequence[Values],
    tau: SupportsFloat,
) -> Gate:
    """Run the four checks on phi of anchors, of ordinary text, and of the tokens of images.

    Example:
        >>> quiet, loud = np.linspace(0.5, 1.5, 200), np.full(50, 30.0)
        >>> image = np.append(np.linspace(0.5, 1.5, 99), 30.0)
        >>> attention = np.append(np.full(99, 0.001), 0.4)
        >>> found = gate(loud, quiet, [image], [attention], tau=20.0)
        >>> found.passed, found["attention"].value
        (True, 1.0)

    Args:
        anchor_phi, text_phi: phi of anchors and of text tokens that are no anchors, pooled.
        visual_phi, visual_attention: phi of each image's tokens, and the attention that they
            receive, one array per image.
        tau: threshold on phi; `interp.sinks.visual.portable_tau` of the model's width.

    The checks: "anchor", phi >= tau in at least 95 % of the anchors; "text", median phi of text
    below tau / 4; "attention", AUROC of phi for the 1 % most attended tokens of each image (at
    least one), averaged over images, at least 0.9; "two populations", Otsu's share of the variance
    of log phi between classes at least 0.6, over the anchors and as many quantiles of all other
    tokens (equal numbers, since Otsu's cut ignores a class of a few percent). As one Gaussian
    already reaches 2/pi = 0.64, the cut must also lie in a valley: the middle half of the
    distance between the class means around it may hold at most a quarter of the smaller class.

    Raises:
        ValueError: an empty set, or images whose two arrays differ in length.
        NumericalError: NaN.
    """
    limit = float(tau)
    anchors, text = _vector(anchor_phi, "anchor_phi"), _vector(text_phi, "text_phi")
    images = [_vector(phi, "visual_phi") for phi in visual_phi]
    area = attention_auroc(images, visual_attention)
    others = np.concatenate([text, *images])
    thinned = np.quantile(others, (np.arange(len(anchors)) + 0.5) / len(anchors))
    pooled = np.log(np.concatenate([anchors, thinned]).clip(min=1e-6))
    cut, share = otsu(pooled)
    hit = float((anchors >= limit).mean())
    middle = float(np.median(text))
    return Gate((
        Check("anchor", hit, 0.95, hit >= 0.95),
        Check("text", middle, 0.25 * limit, middle < 0.25 * limit),
        Check("attention", area, 0.9, area >= 0.9),
        Check("two populations", share, 0.6, share >= 0.6 and _valley(pooled, cut) <= 0.25),
    ))


def auroc(score: Values, positive: Sequence[bool] | np.ndarray | Tensor) -> float:
    """Probability that a positive scores above a negative, ties counted half.

    Example:
        >>> auroc([0.1, 0.4, 0.35, 0.8], [False, False, True, True])
        0.75

    Raises:
        ValueError: no positive or no negative.
    """
    ranks = rankdata(_vector(score, "score"))
    hit = np.asarray(positive, dtype=bool)
    n, m = int(hit.sum()), int((~hit).sum())
    if not n or not m:
        raise ValueError(f"AUROC needs positives and negatives, got {n} and {m}.")
    return float((ranks[hit].sum() - n * (n + 1) / 2) / (n * m))


def attention_auroc(
    phi: Sequence[Values], attention: Sequence[Values], top: SupportsFloat = 0.01
) -> float:
    """AUROC of phi for being among the most attended tokens of an image, mean over images.

    Example:
        >>> attention_auroc([[1.0, 9.0, 2.0]], [[0.1, 0.7, 0.2]])
        1.0

    Args:
        top: share of each image's tokens that count as attended; at least one token.
    """
    if not len(phi) or len(phi) != len(attention):
        raise ValueError(f"{len(phi)} images with phi and {len(attention)} with attention.")
    areas = []
    for one, received in zip(phi, attention):
        scores, mass = _vector(one, "phi"), _vector(received, "attention")
        if len(scores) != len(mass) or len(scores) < 2:
            raise ValueError(
                f"an image has {len(scores)} values of phi and {len(mass)} of attention; give one "
                "of each for every visual token."
            )
        areas.append(auroc(scores, _most_attended(mass, float(top))))
    return float(np.mean(areas))


def otsu(values: Values) -> tuple[float, float]:
    """Otsu's cut between two classes, and the share of the variance that lies between them.

    Example:
        >>> cut, share = otsu([0.0, 0.1, 0.2, 5.0, 5.1])
        >>> round(cut, 2), round(share, 3)
        (2.6, 0.999)

    Zero share if all values are equal. Exact: every cut between neighbors is tried.
    """
    ordered = np.sort(_vector(values, "values"))
    n, variance = len(ordered), float(ordered.var())
    if n < 2 or variance == 0:
        return float(ordered[0]), 0.0
    below = np.cumsum(ordered)[:-1]
    size = np.arange(1, n)
    means = below / size, (ordered.sum() - below) / (n - size)
    between = size * (n - size) / n**2 * (means[1] - means[0]) ** 2
    best = int(between.argmax())
    return float((ordered[best] + ordered[best + 1]) / 2), float(between[best] / variance)


@dataclass(frozen=True)
class PermutationNull:
    """AUROC of the discovered dimensions against random sets of the same size.

    `p` is the share of random sets at least as good, with the observed one added (never 0).
    """

    observed: float
    percentile_99: float
    p: float
    n: int

    @property
    def passed(self) -> bool:
        return self.observed > self.percentile_99


def permutation_null(
    residual: Float[Tensor | np.ndarray, "sample position d_model"],
    attention: Float[Tensor | np.ndarray, "sample position"],
    sink_dims: Dims,
    n: int = 1000,
    seed: int = 0,
) -> PermutationNull:
    """Would random dimensions predict the attended visual tokens as well as the discovered ones?

    Example:
        >>> draw = torch.Generator().manual_seed(0)
        >>> residual = torch.randn(6, 50, 32, generator=draw)
        >>> attention = torch.rand(6, 50, generator=draw) / 50
        >>> residual[:, 9, 3], attention[:, 9] = 80.0, 0.5
        >>> found = permutation_null(residual, attention, [3], n=200)
        >>> found.observed, found.passed
        (1.0, True)

    Args:
        residual, attention: of the visual tokens of every image, same number in each.
        n: random sets of the same size, drawn from the other dimensions.

    Raises:
        ValueError: fewer other dimensions than the set has.
    """
    values = torch.as_tensor(residual)
    values = values.to(torch.promote_types(values.dtype, torch.float32))
    chosen = [int(d) for d in np.asarray(sink_dims).reshape(-1)]
    received = np.stack([_vector(row, "attention") for row in torch.as_tensor(attention)])
    attended = np.stack([_most_attended(row, 0.01) for row in received])
    pool = np.setdiff1d(np.arange(values.shape[-1]), chosen)
    if len(pool) < len(chosen):
        raise ValueError(
            f"{len(chosen)} of {values.shape[-1]} dimensions are sink dimensions; no random set of "
            "this size is left to compare with."
        )
    # phi is a maximum over single dimensions, so each dimension's share is computed once.
    root = (values.square().mean(-1, keepdim=True) + 1e-6).sqrt()
    single = (values.abs() / root).cpu().numpy()
    observed = _mean_auroc(single[..., chosen].max(-1), attended)
    draw = np.random.default_rng(seed)
    null = np.empty(n)
    for i in range(n):
        dims = draw.choice(pool, len(chosen), replace=False)
        null[i] = _mean_auroc(single[..., dims].max(-1), attended)
    p = (1 + int((null >= observed).sum())) / (n + 1)
    return PermutationNull(observed, float(np.quantile(null, 0.99)), p, n)


def _most_attended(mass: np.ndarray, top: float) -> np.ndarray:
    count = min(max(1, math.ceil(top * len(mass))), len(mass) - 1)
    chosen = np.zeros(len(mass), dtype=bool)
    chosen[np.argsort(-mass, kind="stable")[:count]] = True
    return chosen


def _mean_auroc(score: np.ndarray, positive: np.ndarray) -> float:
    ranks = rankdata(score, axis=-1)
    n = positive.sum(-1)
    m = positive.shape[-1] - n
    return float((((ranks * positive).sum(-1) - n * (n + 1) / 2) / (n * m)).mean())


def _valley(values: np.ndarray, cut: float) -> float:
    low, high = values[values <= cut], values[values > cut]
    if not len(low) or not len(high):
        return float("inf")
    reach = 0.25 * (high.mean() - low.mean())
    inside = int((np.abs(values - cut) <= reach).sum())
    return inside / min(len(low), len(high))


def _vector(values: Values, name: str) -> np.ndarray:
    if isinstance(values, Tensor):
        values = values.detach().cpu().double().numpy()
    plain = np.asarray(values, dtype=np.float64)
    if plain.ndim != 1 or not len(plain):
        raise ValueError(f"{name} must be a list of at least one number, not {plain.shape}.")
    if not np.isfinite(plain).all():
        raise NumericalError(f"{name} contains NaN or infinity.")
    return plain
