"""Selective prediction: answer only when sure; how much risk remains at how much coverage.

Sources   arXiv:2508.18297 (which answers about a picture to withhold), Geifman and El-Yaniv (2017)
"""

from typing import Any, NamedTuple, SupportsFloat

import numpy as np
from jaxtyping import Float
from sklearn.metrics import roc_curve


class RiskCoverage(NamedTuple):
    """Risk at every coverage: `risk[k]` is the share of errors among the `k + 1` surest answers."""

    coverage: Float[np.ndarray, "sample"]
    risk: Float[np.ndarray, "sample"]

    @property
    def aurc(self) -> float:
        """Mean risk over all coverages: the area under the curve, lower is better."""
        return float(self.risk.mean())

    def at(self, risk: SupportsFloat) -> float:
        """The largest coverage whose risk does not exceed `risk`, 0 where none is that safe."""
        fine = np.flatnonzero(self.risk <= float(risk) + 1e-12)
        return float(self.coverage[fine[-1]]) if len(fine) else 0.0


def risk_coverage(confidence: Any, correct: Any) -> RiskCoverage:
    """The curve of answers accepted from the surest on.

    Example:
        >>> curve = risk_coverage([0.9, 0.8, 0.3, 0.2], [1, 1, 0, 1])
        >>> [round(float(r), 3) for r in curve.risk], round(curve.aurc, 4), curve.at(0.0)
        ([0.0, 0.0, 0.333, 0.25], 0.1458, 0.5)

    Among equally sure answers the order is unknown: every one counts as the mean of its tie, which
    is the expectation over all orders.

    Raises:
        ValueError: no answers, lengths that differ, or confidences that are not numbers.
    """
    sure, right = np.asarray(confidence, dtype=float), np.asarray(correct).astype(bool)
    if sure.shape != right.shape or sure.ndim != 1 or not len(sure):
        raise ValueError(f"{sure.shape} confidences and {right.shape} answers: give one of each.")
    if not np.isfinite(sure).all():
        raise ValueError("confidences hold values that are not numbers; leave those answers out.")
    level, tie = np.unique(-sure, return_inverse=True)
    wrong = np.bincount(tie, ~right, len(level)) / np.bincount(tie, minlength=len(level))
    errors = np.cumsum(wrong[np.sort(tie)])
    n = np.arange(1, len(sure) + 1)
    return RiskCoverage(n / len(sure), errors / n)


def excess_aurc(confidence: Any, correct: Any) -> float:
    """AURC above that of an ordering that puts all right answers first: 0 for a perfect one.

    Example:
        >>> excess_aurc([0.9, 0.8, 0.1], [1, 1, 0])
        0.0
    """
    right = np.asarray(correct).astype(float)
    return risk_coverage(confidence, correct).aurc - risk_coverage(right, correct).aurc


def tpr_at_fpr(scores: Any, labels: Any, most: SupportsFloat = 0.05) -> float:
    """The largest true positive rate at a false positive rate of at most `most`.

    Example:
        >>> tpr_at_fpr([0.9, 0.8, 0.7, 0.1], [1, 1, 0, 0], most=0.01)
        1.0

    What "high specificity" means for a detector of errors. No interpolation between thresholds; a
    tie across the threshold counts as it falls.

    Raises:
        ValueError: not both classes, or scores that are not numbers.
    """
    s, y = np.asarray(scores, dtype=float), np.asarray(labels).astype(bool)
    if s.shape != y.shape or not np.isfinite(s).all() or y.all() or not y.any():
        raise ValueError("a true positive rate needs finite scores and samples of both classes.")
    false, true, _ = roc_curve(y, s, drop_intermediate=False)
    return float(true[false <= float(most) + 1e-12].max())
