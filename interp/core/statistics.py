"""Numbers with an interval, ready for a claim: bootstrap, rates, and permutation tests."""

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, Union

import numpy as np
from scipy import stats

from interp.core.errors import NumericalError

FEWEST = 5
"""With fewer independent samples a bootstrap interval means nothing: it is (nan, nan) then, and a
claim on it is inconclusive."""

RESAMPLES = 10_000
Alternative = Literal["two-sided", "greater", "less"]


@dataclass(frozen=True)
class Estimate:
    """A value, its interval, and the number of independent samples behind it.

    Example:
        >>> from interp.core import Claim
        >>> estimate = rate(45, 50)
        >>> Claim("Most do.", "arXiv:2410.10781", null=0.5, **estimate.for_claim()).verdict
        'supported'
        >>> print(difference([0.0, 0.0, 0.0], [1.0, 1.0, 1.0]))
        -1 (n = 3, mean paired difference, bootstrap over 3 samples; all 3 differences are equal: no \
interval)

    Attributes:
        no_interval: why none is printed; "" where there is one. Values that are all equal keep the
            `interval` of width zero that resampling gives, for claims, but it says nothing about
            what else might have been drawn.
        control: what the value was held against, in words, if it was.
    """

    value: float
    interval: tuple[float, float]
    n: int
    method: str
    no_interval: str = ""
    control: str = ""

    def for_claim(self) -> dict[str, Any]:
        """`measured`, `interval`, `n` and `statistic`, as keywords of `Claim`."""
        return {"measured": self.value, "interval": self.interval, "n": self.n,
                "statistic": self.method}

    def __str__(self) -> str:
        low, high = self.interval
        edges = "" if self.no_interval else f" [{low:.4g}, {high:.4g}]"
        why = f"{self.no_interval}: no interval" if self.no_interval else ""
        about = "; ".join(part for part in (f"n = {self.n}, {self.method}", why, self.control) if part)
        return f"{self.value:.4g}{edges} ({about})"


def bootstrap(
    statistic: Callable[..., float],
    *samples: Any,
    groups: Any = None,
    confidence: float = 0.95,
    resamples: int = RESAMPLES,
    seed: int = 0,
    name: str = "",
    values: str = "values",
) -> Estimate:
    """A statistic of paired samples with its percentile bootstrap interval.

    Example:
        >>> x = np.arange(20.0)
        >>> slope = bootstrap(lambda x, y: np.polyfit(x, y, 1)[0], x, 2 * x, resamples=200)
        >>> [round(edge, 6) for edge in slope.interval]
        [2.0, 2.0]

    Args:
        statistic: takes as many arrays as there are samples; may return NaN for a resample that
            does not define it (these are left out of the interval).
        samples: arrays of one length, resampled together along their first axis.
        groups: one label per entry, where entries are not independent (ten answers to one
            problem): whole groups are drawn.
        values: what one sample is, in the printed line where there is no interval.

    Raises:
        NumericalError: NaN or infinity in the samples.
        ValueError: no samples, or lengths that differ.
    """
    arrays = [np.asarray(sample, dtype=float) for sample in samples]
    if not arrays or not len(arrays[0]):
        raise ValueError("nothing to average: give at least one value.")
    sizes = {len(array) for array in arrays} | ({len(groups)} if groups is not None else set())
    if len(sizes) > 1:
        raise ValueError(f"paired samples and groups need one length, not {sorted(sizes)}.")
    for array in arrays:
        if not np.isfinite(array).all():
            raise NumericalError(
                f"{int((~np.isfinite(array)).sum())} of {array.size} values are NaN or infinite; "
                "leave those samples out, and say how many."
            )
    labels = np.arange(len(arrays[0])) if groups is None else np.asarray(groups)
    _, member = np.unique(labels, return_inverse=True)
    order = np.argsort(member, kind="stable")
    parts = np.split(order, np.cumsum(np.bincount(member))[:-1])
    unit = "samples" if groups is None else "groups"
    method = f"{name or _name(statistic)}, bootstrap over {len(parts)} {unit}"
    value = float(statistic(*arrays))
    why = _no_interval(arrays, len(parts), unit, values)
    if len(parts) < FEWEST:
        return Estimate(value, (float("nan"), float("nan")), len(parts), method, why)

    def resampled(drawn: np.ndarray) -> float:
        rows = drawn if groups is None else np.concatenate([parts[int(i)] for i in drawn])
        return float(statistic(*(array[rows] for array in arrays)))

    def means(drawn: np.ndarray, axis: int = -1) -> np.ndarray:
        return sums[drawn].sum(axis) / sizes_of[drawn].sum(axis)

    # Means, by far the most frequent: all resamples at once, from the sums of the groups.
    quick = statistic is np.mean and arrays[0].ndim == 1
    sums = np.array([arrays[0][part].sum() for part in parts]) if quick else np.empty(0)
    sizes_of = np.array([len(part) for part in parts])
    with np.errstate(all="ignore"), warnings.catch_warnings():
        # Resamples without a value are left out below.
        warnings.simplefilter("ignore")
        # Percentile, not BCa: it stays defined where all values are equal.
        found = stats.bootstrap(
            (np.arange(len(parts)),), means if quick else resampled, n_resamples=resamples,
            method="percentile", confidence_level=confidence, vectorized=quick,
            rng=np.random.default_rng(seed),
        )
    drawn = found.bootstrap_distribution[np.isfinite(found.bootstrap_distribution)]
    if not len(drawn):
        return Estimate(value, (float("nan"), float("nan")), len(parts), method,
                        why or "no resample defines it")
    edge = (1 - confidence) / 2
    low, high = np.quantile(drawn, [edge, 1 - edge])
    return Estimate(value, (float(low), float(high)), len(parts), method, why)


def _no_interval(arrays: list[np.ndarray], count: int, unit: str, values: str) -> str:
    """Why samples say nothing about what else might have been drawn; "" where they do."""
    if count == 1:
        return f"there is one {unit.removesuffix('s')}"
    # Equal but for rounding.
    if all(float(np.ptp(a)) <= 1e-12 * float(np.abs(a).max()) for a in arrays):
        return f"all {len(arrays[0])} {values} are equal"
    return f"fewer than {FEWEST} {unit}" if count < FEWEST else ""


def _name(statistic: Callable[..., float]) -> str:
    name = getattr(statistic, "__name__", "statistic").strip("_")
    return "statistic" if "lambda" in name else name.replace("_", " ")


def mean(values: Any, *, groups: Any = None, **more: Any) -> Estimate:
    """The mean over prompts with its bootstrap interval.

    Example:
        >>> mean([1, 2, 3, 4, 5], resamples=500).value
        3.0
    """
    return bootstrap(np.mean, values, groups=groups, **{"name": "mean", **more})


def median(values: Any, *, groups: Any = None, **more: Any) -> Estimate:
    """The median over prompts with its bootstrap interval."""
    return bootstrap(np.median, values, groups=groups, **{"name": "median", **more})


def difference(
    treated: Any, control: Any, *, groups: Any = None, **more: Any
) -> Estimate:
    """The mean of `treated` minus `control`, paired: the same prompts in the same order.

    Example:
        >>> difference(np.arange(9.0) + 2, np.arange(9.0), resamples=200).interval
        (2.0, 2.0)
    """
    a, b = np.asarray(treated, dtype=float), np.asarray(control, dtype=float)
    if a.shape != b.shape:
        raise ValueError(f"paired samples need one length, not {sorted({len(a), len(b)})}.")
    return bootstrap(np.mean, a - b, groups=groups,
                     **{"name": "mean paired difference", "values": "differences", **more})


def correlation(
    x: Any, y: Any, *, groups: Any = None, **more: Any
) -> Estimate:
    """Spearman's rank correlation of paired samples; NaN where one of them is constant.

    Example:
        >>> correlation(range(9), np.arange(9.0) ** 3, resamples=200).value
        1.0
    """
    def spearman(a: np.ndarray, b: np.ndarray) -> float:
        if np.ptp(a) == 0 or np.ptp(b) == 0:
            return float("nan")
        a, b = stats.rankdata(a), stats.rankdata(b)
        return float(np.round(np.corrcoef(a, b)[0, 1], 12))

    return bootstrap(spearman, x, y, groups=groups, **{"name": "Spearman correlation", **more})


def rate(
    successes: Union[int, np.integer],
    n: Union[int, np.integer],
    *,
    confidence: float = 0.95,
    method: Literal["wilson", "exact"] = "wilson",
) -> Estimate:
    """A share of independent trials with its Wilson (or "exact", Clopper-Pearson) interval.

    Example:
        >>> rate(0, 50).interval[0], round(rate(0, 50, method="exact").interval[1], 4)
        (0.0, 0.0711)

    Raises:
        ValueError: not 0 <= successes <= n, or no trials.
    """
    if not 0 <= successes <= n or n == 0:
        raise ValueError(f"{successes} successes in {n} trials is not a rate.")
    found = stats.binomtest(int(successes), int(n)).proportion_ci(confidence, method=method)
    kind = "Wilson" if method == "wilson" else "Clopper-Pearson"
    return Estimate(successes / n, (float(found.low), float(found.high)), int(n),
                    f"share of {n}, {kind} interval")


def permutation_p(
    a: Any,
    b: Any,
    *,
    paired: bool = False,
    alternative: Alternative = "two-sided",
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> float:
    """The p value of the difference of two means, by permuting labels (or signs, if paired).

    Example:
        >>> permutation_p(np.arange(20) + 30, np.arange(20), resamples=999) < 0.01
        True
    """
    a, b = np.asarray(a, dtype=float), np.asarray(b, dtype=float)
    if not (np.isfinite(a).all() and np.isfinite(b).all()):
        raise NumericalError("a permutation test needs finite numbers; leave NaN samples out.")

    def gap(x: np.ndarray, y: np.ndarray, axis: int = -1) -> Any:
        return np.mean(x, axis=axis) - np.mean(y, axis=axis)

    found = stats.permutation_test(
        (a, b), gap, permutation_type="samples" if paired else "independent", vectorized=True,
        n_resamples=resamples, alternative=alternative, rng=np.random.default_rng(seed),
    )
    return float(found.pvalue)


def control_p(
    observed: Union[int, float], controls: Any, *, alternative: Alternative = "greater"
) -> float:
    """The p value of one number against matched controls: (1 + as extreme) / (1 + controls).

    Example:
        >>> control_p(9.0, [1.0, 2.0, 3.0, 4.0])
        0.2
    """
    drawn = np.asarray(controls, dtype=float)
    if not drawn.size or not np.isfinite(drawn).all() or not np.isfinite(observed):
        raise NumericalError("a comparison with controls needs finite numbers and a control.")
    above = (1 + int((drawn >= observed).sum())) / (1 + drawn.size)
    below = (1 + int((drawn <= observed).sum())) / (1 + drawn.size)
    if alternative == "greater":
        return above
    return below if alternative == "less" else min(1.0, 2 * min(above, below))
