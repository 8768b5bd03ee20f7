"""A claim of a paper, checked: the verdict is computed from a statistic, a null and an interval."""

from dataclasses import asdict, dataclass, field
from typing import Any, Literal, Optional, Union

import numpy as np

from interp.core.errors import ClaimError

Real = Union[int, float]
Verdict = Literal["supported", "refuted", "inconclusive", "not testable"]
VERDICTS = ("supported", "refuted", "inconclusive", "not testable")
PRINTABLE = ("code", "data", "paper", "checked", "derived")
"""Provenance tags whose numbers may be printed as a source's (others: see `paper_tag`)."""


@dataclass(frozen=True)
class Claim:
    """One sentence, the paper's number, what was measured, and the verdict that follows.

    The verdict compares the interval of `statistic` with `null` in the claimed `direction`:
    "above" or "below" means the whole interval must lie on that side (refuted if it lies wholly on
    the other); "equal" means that the interval lies within `tolerance` of the null (refuted if it
    lies wholly outside).

    Example:
        >>> claim = Claim("The first token is a sink.", "arXiv:2410.10781", measured=0.8,
        ...               null=0.1, interval=(0.7, 0.9), direction="above")
        >>> claim.verdict
        'supported'
        >>> Claim.untestable("Depth over 20 is needed.", "arXiv:2512.22213",
        ...                  reason="the model has 4 blocks").verdict
        'not testable'
    """

    sentence: str
    source: str
    measured: Optional[Real] = None
    null: Optional[Real] = None
    interval: Optional[tuple[Real, Real]] = None
    direction: Literal["above", "below", "equal"] = "above"
    tolerance: Real = 0.0
    unit: str = ""
    n: Optional[int] = None
    statistic: str = ""
    paper_number: str = ""
    paper_tag: str = "paper"
    causal: bool = False
    control: str = ""
    reason: str = ""
    figure: str = ""
    details: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.paper_number and self.paper_tag not in PRINTABLE + ("secondary",):
            raise ClaimError(
                f"the number {self.paper_number!r} is tagged {self.paper_tag!r} and may not be "
                "printed as a paper's; leave paper_number empty or confirm it first."
            )
        if self.causal and not self.control and not self.reason:
            raise ClaimError(
                f"the claim {self.sentence!r} says 'causes' but names no control; "
                "run it against a matched control and name that in `control`."
            )
        if self.reason:
            return
        if self.measured is None or self.null is None or self.interval is None:
            raise ClaimError(
                f"the claim {self.sentence!r} needs measured, null and interval, "
                "or a reason why it is not testable."
            )
        if self.interval[0] > self.interval[1]:
            raise ClaimError(f"the interval {self.interval} is upside down.")

    @classmethod
    def untestable(cls, sentence: str, source: str, reason: str, **more: Any) -> "Claim":
        """A claim that this run cannot decide, with the reason; never a pass."""
        if not reason:
            raise ClaimError(f"say why {sentence!r} cannot be tested here.")
        return cls(sentence, source, reason=reason, **more)

    @property
    def verdict(self) -> Verdict:
        """Computed, never set."""
        if self.reason:
            return "not testable"
        assert self.interval is not None and self.null is not None
        low, high = self.interval
        if not np.isfinite([low, high, float(self.measured)]).all():  # type: ignore[arg-type]
            return "inconclusive"
        if self.direction == "equal":
            near, far = self.null - self.tolerance, self.null + self.tolerance
            if near <= low and high <= far:
                return "supported"
            return "refuted" if high < near or low > far else "inconclusive"
        if self.direction == "below":
            low, high, null = -high, -low, -self.null
        else:
            null = self.null
        if low > null:
            return "supported"
        return "refuted" if high < null else "inconclusive"

    def to_json(self) -> dict[str, Any]:
        """Plain data with the verdict, for `claims.json`."""
        content = asdict(self)
        content["verdict"] = self.verdict
        content["interval"] = None if self.interval is None else list(map(float, self.interval))
        return content

    @classmethod
    def from_json(cls, content: dict[str, Any]) -> "Claim":
        """The inverse of `to_json`; the stored verdict is recomputed, not trusted."""
        content = {k: v for k, v in content.items() if k != "verdict"}
        if content.get("interval") is not None:
            content["interval"] = tuple(content["interval"])
        return cls(**content)
