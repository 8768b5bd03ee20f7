"""Verdicts follow from interval, null and direction; a claim cannot say more than it shows."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from interp.core import Claim, ClaimError

numbers = st.floats(-100, 100, allow_nan=False)


def claim(low, high, null=0.0, **more):
    return Claim("It moves.", "arXiv:0000.00000", measured=(low + high) / 2, null=null,
                 interval=(low, high), **more)


@given(numbers, numbers, numbers)
def test_a_verdict_is_supported_only_if_the_whole_interval_lies_on_the_claimed_side(a, b, null):
    low, high = sorted((a, b))
    above = claim(low, high, null).verdict
    below = claim(low, high, null, direction="below").verdict
    assert (above == "supported") == (low > null) == (below == "refuted")
    assert (below == "supported") == (high < null) == (above == "refuted")
    if low <= null <= high:
        assert above == below == "inconclusive"


@given(numbers, numbers, st.floats(0.01, 10))
def test_equality_needs_the_interval_inside_the_tolerance(a, b, tolerance):
    low, high = sorted((a, b))
    verdict = claim(low, high, direction="equal", tolerance=tolerance).verdict
    assert (verdict == "supported") == (-tolerance <= low and high <= tolerance)
    assert (verdict == "refuted") == (low > tolerance or high < -tolerance)


def test_an_interval_of_nan_decides_nothing():
    assert claim(float("nan"), float("nan")).verdict == "inconclusive"


def test_an_unverified_number_cannot_be_printed_as_the_papers():
    with pytest.raises(ClaimError, match="unverified.*may not be"):
        claim(1, 2, paper_number="55.0", paper_tag="unverified")


def test_causes_needs_a_control():
    with pytest.raises(ClaimError, match="names no control"):
        claim(1, 2, causal=True)
    assert claim(1, 2, causal=True, control="random heads").verdict == "supported"


def test_a_claim_without_evidence_needs_a_reason():
    with pytest.raises(ClaimError, match="needs measured, null and interval"):
        Claim("It moves.", "arXiv:0000.00000")
    with pytest.raises(ClaimError, match="say why"):
        Claim.untestable("It moves.", "arXiv:0000.00000", reason="")


def test_a_stored_verdict_is_not_trusted():
    stored = claim(1, 2).to_json()
    stored["verdict"] = "refuted"
    assert Claim.from_json(stored).verdict == "supported"
