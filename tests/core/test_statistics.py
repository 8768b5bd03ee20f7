"""Intervals that cover, widen and refuse as they should."""

import numpy as np
import pytest
from scipy import stats

from interp.core import Claim, NumericalError
from interp.core.statistics import (
    FEWEST,
    bootstrap,
    control_p,
    correlation,
    difference,
    mean,
    median,
    permutation_p,
    rate,
)

FAST = {"resamples": 300}


def width(estimate):
    return estimate.interval[1] - estimate.interval[0]


def test_the_interval_covers_the_truth_about_as_often_as_it_says():
    rng = np.random.default_rng(0)
    found = [mean(rng.exponential(size=40), **FAST).interval for _ in range(200)]
    covered = np.mean([low <= 1.0 <= high for low, high in found])
    missed = np.mean([low <= 2.0 <= high for low, high in found])
    assert 0.87 <= covered <= 0.99
    assert missed < 0.05


def test_pairing_removes_what_the_prompts_have_in_common():
    rng = np.random.default_rng(1)
    prompts, effect = rng.normal(0, 10, 60), rng.normal(0.5, 0.2, 60)
    paired = difference(prompts + effect, prompts, **FAST)
    shuffled = difference(prompts + effect, rng.permutation(prompts), **FAST)
    assert paired.interval[0] > 0 and paired.value == pytest.approx(effect.mean())
    assert width(shuffled) > 10 * width(paired)


def test_copies_of_a_sample_bring_no_certainty_when_they_are_grouped():
    values = np.random.default_rng(2).normal(size=20)
    copies, groups = np.repeat(values, 10), np.repeat(np.arange(20), 10)
    single, naive = mean(values, **FAST), mean(copies, **FAST)
    grouped = mean(copies, groups=groups, **FAST)
    assert width(naive) < 0.5 * width(single)
    assert grouped.interval == pytest.approx(single.interval)
    assert (grouped.n, naive.n) == (20, 200) and "groups" in grouped.method


def test_groups_may_be_words_in_any_order():
    values = np.random.default_rng(3).normal(size=30)
    words = np.array([f"problem {i % 6}" for i in range(30)])
    order = np.random.default_rng(4).permutation(30)
    assert width(mean(values, groups=words, **FAST)) == pytest.approx(
        width(mean(values[order], groups=words[order], **FAST)), rel=1e-9)


def test_too_few_samples_have_no_interval_and_decide_nothing():
    few, enough = mean(np.ones(FEWEST - 1)), mean(np.ones(FEWEST))
    assert np.isnan(few.interval).all() and enough.interval == (1.0, 1.0)
    verdicts = [Claim("s", "arXiv:2410.10781", null=0.5, **e.for_claim()).verdict
                for e in (few, enough)]
    assert verdicts == ["inconclusive", "supported"]


def test_the_same_seed_gives_the_same_interval():
    values = np.random.default_rng(5).normal(size=30)
    assert mean(values, seed=1, **FAST) == mean(values, seed=1, **FAST)
    assert mean(values, seed=1, **FAST) != mean(values, seed=2, **FAST)


def test_the_median_shrugs_at_an_outlier():
    values = np.r_[np.random.default_rng(6).normal(size=30), 1e6]
    assert median(values, **FAST).interval[1] < 2 < mean(values, **FAST).value


def test_correlation_sees_order_and_nothing_else():
    x = np.random.default_rng(7).normal(size=60)
    noise = np.random.default_rng(8).normal(size=60)
    assert correlation(x, np.exp(x), **FAST).value == 1.0
    assert correlation(x, -x, **FAST).interval[1] < 0
    low, high = correlation(x, noise, **FAST).interval
    assert low < 0 < high
    constant = correlation(x, np.zeros(60), **FAST)
    assert np.isnan(constant.value) and np.isnan(constant.interval).all()


@pytest.mark.parametrize("values, error, sentence", [
    ([1.0, np.nan, np.inf], NumericalError, "2 of 3 values are NaN or infinite"),
    ([], ValueError, "at least one value"),
])
def test_values_that_cannot_be_averaged_are_refused(values, error, sentence):
    with pytest.raises(error, match=sentence):
        mean(values)


def test_samples_of_different_length_are_refused():
    with pytest.raises(ValueError, match=r"one length, not \[3, 4\]"):
        difference(np.ones(3), np.ones(4))
    with pytest.raises(ValueError, match=r"one length, not \[2, 3\]"):
        mean(np.ones(3), groups=["a", "b"])


@pytest.mark.parametrize("successes, n", [(0, 50), (1, 7), (45, 50), (50, 50)])
def test_rates_have_the_textbook_intervals(successes, n):
    p, z = successes / n, stats.norm.ppf(0.975)
    center = (p + z**2 / (2 * n)) / (1 + z**2 / n)
    reach = z / (1 + z**2 / n) * np.sqrt(p * (1 - p) / n + z**2 / (4 * n**2))
    wilson = rate(successes, n)
    assert wilson.interval == pytest.approx((center - reach, center + reach), abs=1e-9)
    exact = rate(successes, n, method="exact")
    low = stats.beta.ppf(0.025, successes, n - successes + 1) if successes else 0.0
    high = stats.beta.ppf(0.975, successes + 1, n - successes) if successes < n else 1.0
    assert exact.interval == pytest.approx((low, high), abs=1e-6)
    assert wilson.value == exact.value == p and wilson.n == n


@pytest.mark.parametrize("successes, n", [(3, 2), (-1, 5), (0, 0)])
def test_what_is_no_rate_is_refused(successes, n):
    with pytest.raises(ValueError, match="is not a rate"):
        rate(successes, n)


def test_a_permutation_test_rejects_rarely_without_and_always_with_an_effect():
    rng = np.random.default_rng(9)
    null = [permutation_p(rng.normal(size=15), rng.normal(size=15), resamples=199)
            for _ in range(100)]
    effect = [permutation_p(rng.normal(2, 1, 15), rng.normal(size=15), resamples=199)
              for _ in range(20)]
    assert np.mean(np.array(null) < 0.05) < 0.15 and 0.3 < np.mean(null) < 0.7
    assert max(effect) < 0.05


def test_a_paired_permutation_test_uses_the_pairs():
    rng = np.random.default_rng(10)
    prompts = rng.normal(0, 10, 20)
    treated = prompts + rng.normal(0.5, 0.2, 20)
    assert permutation_p(treated, prompts, paired=True, resamples=999) < 0.01
    assert permutation_p(treated, prompts, resamples=999) > 0.2


def test_the_p_value_against_controls_is_never_zero():
    controls = np.linspace(0, 1, 19)
    assert control_p(5.0, controls) == 1 / 20
    assert control_p(5.0, controls, alternative="less") == 1.0
    assert control_p(-5.0, controls, alternative="two-sided") == 0.1
    with pytest.raises(NumericalError):
        control_p(1.0, [])


def test_an_estimate_names_its_statistic():
    found = bootstrap(np.ptp, np.arange(8.0), resamples=50)
    assert found.method == "ptp, bootstrap over 8 samples"
    assert "n = 8" in str(found) and "7 [" in str(found)


@pytest.mark.parametrize("shift", [0.0, -1.0, 0.1])
@pytest.mark.parametrize("count", [2, 4, 8])
def test_differences_that_are_all_equal_print_no_interval_whatever_they_are(shift, count):
    base = np.random.default_rng(2).random(count)
    said = str(difference(base + shift, base, **FAST))
    assert "[" not in said and "nan" not in said
    assert f"n = {count}, mean paired difference" in said
    assert said.endswith(f"; all {count} differences are equal: no interval)")
    # One that differs brings the interval back, if there are enough of them.
    other = str(difference(base + shift + np.eye(count)[0], base, **FAST))
    assert "are equal" not in other
    assert ("fewer than 5 samples: no interval" in other) == (count < FEWEST) != ("[" in other)


def test_one_sample_prints_that_it_is_one_and_what_claims_read_is_as_before():
    assert str(mean([3.0])) == ("3 (n = 1, mean, bootstrap over 1 samples; there is one sample: "
                                "no interval)")
    alone = mean([1.0, 2.0], groups=["a", "a"])
    assert "there is one group: no interval" in str(alone)
    equal = mean(np.full(9, 2.0), **FAST)
    assert equal.for_claim()["interval"] == (2.0, 2.0) and "all 9 values are equal" in str(equal)
    assert set(equal.for_claim()) == {"measured", "interval", "n", "statistic"}
    undefined = correlation(np.arange(9.0), np.arange(9.0) * 0, **FAST)
    assert "no resample defines it: no interval" in str(undefined)
