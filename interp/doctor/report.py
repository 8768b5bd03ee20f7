"""What the doctor found about a model, typed, as JSON and as plain text."""

import math
from dataclasses import asdict, dataclass, field
from typing import Any, Literal, Optional, Union

Real = Union[int, float]
Level = Literal["note", "limit", "fault"]

SCHEMA = 1
"""Version of the JSON; it grows when an entry changes its meaning or goes away."""
ALL_RIGHT, LIMITS, CLOSED = 0, 1, 2
VERDICTS = {ALL_RIGHT: "all right", LIMITS: "works with limits", CLOSED: "cannot be opened"}
"""Exit code -> verdict."""


@dataclass(frozen=True)
class Lane:
    """A way to run the model, and why it is closed if it is."""

    name: str
    available: bool
    reason: str = ""


@dataclass(frozen=True)
class SiteRow:
    """What was proven of one site in one lane, over the layers that were tried.

    Attributes:
        exists: whether the architecture has such a place at all.
        layers: the layers in which it was tried.
        failed: those where a read or a write could not be proven.
        moved: how far the outcome moved when it was written, relative to its spread: the least of
            these layers.
    """

    lane: str
    site: str
    readable: bool
    writable: bool
    reason: str
    layers: tuple[int, ...]
    failed: tuple[int, ...] = ()
    exists: bool = True
    moved: Real = 0.0


@dataclass(frozen=True)
class Parity:
    """One comparison of a lane with the plain transformers forward pass, or with lane "hf".

    Attributes:
        difference: largest difference, relative to the spread (standard deviation) of what is
            compared; `rms` its root mean square. tolerance: what `difference` may be.
        same_top: share of rows whose highest logit is the same token; None for other quantities.
    """

    lane: str
    against: str
    what: str
    positions: int
    difference: Real
    rms: Real
    tolerance: Real
    alike: bool
    same_top: Optional[Real] = None
    worst: str = ""


@dataclass(frozen=True)
class Tokens:
    """How text becomes tokens: the token that opens it, chat template, and whether the two add up
    to a double BOS. `bos` is the BOS token, or whatever special token opens a text in its place."""

    tokenizer: Optional[str]
    vocabulary: int
    first_token_is_bos: bool
    bos: Optional[str]
    chat_template: bool
    double_bos: bool
    remarks: tuple[str, ...] = ()


@dataclass(frozen=True)
class Sink:
    """Where surplus attention goes, on one short text.

    Attributes:
        kind: "none", "learned" (a sink logit per head) or "gated".
        first, middle: mean attention over layers and heads that the first token, and as its
            control the token in the middle of the first half, receive from the queries that see
            them. uniform: what the first token would get if every row were flat.
        heads: percent of heads that give the first token more than 0.3 (Sink_1, arXiv:2410.10781).
        external: share of a row that goes to learned sinks; None where rows sum to one.
    """

    kind: str
    tokens: int
    text: str
    first: Real
    middle: Real
    uniform: Real
    heads: Real
    external: Optional[Real] = None


@dataclass(frozen=True)
class Picture:
    """Where image tokens look: drawn over a picture in `file`.

    Attributes:
        covered: share of the picture's pixels that lie in a token's box; `wide` the same for a
            picture twice as wide as high (center crops lose some).
    """

    tokens: int
    first: int
    last: int
    grid: Optional[tuple[int, int]]
    parts: tuple[str, ...]
    size: tuple[int, int]
    covered: Optional[Real]
    wide: Optional[Real]
    assumed: bool = False
    file: Optional[str] = None


@dataclass(frozen=True)
class Cost:
    """An estimate for one analysis: never a measurement of it.

    Attributes:
        token_layers: tokens times blocks that are computed. bytes: of memory, beside the weights.
        reason: why it cannot be done with this model (fewer positions, say).
    """

    analysis: str
    tokens: int
    token_layers: int
    seconds: Optional[Real]
    bytes: Optional[int]
    reason: str = ""


@dataclass(frozen=True)
class Finding:
    """Something that a user must know.

    A "fault" is what gives wrong answers or breaks, a "limit" what cannot be done; a "note" is a gap
    of one lane that another lane fills, and does not count in the verdict.
    """

    level: Level
    about: str
    sentence: str


@dataclass
class Report:
    """Everything the doctor found; `exit_code` is 0 (all right), 1 (limits), 2 (not opened).

    Example:
        >>> report = Report("toy", {"architecture": "ToyForCausalLM"})
        >>> report.exit_code, report.verdict
        (0, 'all right')
        >>> report.findings.append(Finding("limit", "images", "no processor was found."))
        >>> report.exit_code, report.verdict
        (1, 'works with limits')
    """

    name: str
    model: dict[str, Any] = field(default_factory=dict)
    lanes: list[Lane] = field(default_factory=list)
    sites: list[SiteRow] = field(default_factory=list)
    parity: list[Parity] = field(default_factory=list)
    tokens: Optional[Tokens] = None
    sink: Optional[Sink] = None
    kv_heads: tuple[int, ...] = ()
    windows: tuple[Optional[int], ...] = ()
    picture: Optional[Picture] = None
    costs: list[Cost] = field(default_factory=list)
    findings: list[Finding] = field(default_factory=list)
    refused: str = ""
    nearest: str = ""

    @property
    def exit_code(self) -> int:
        """0: all right, 1: works with limits, 2: cannot be opened."""
        counted = any(finding.level != "note" for finding in self.findings)
        return CLOSED if self.refused else LIMITS if counted else ALL_RIGHT

    @property
    def verdict(self) -> str:
        """The exit code in words."""
        return VERDICTS[self.exit_code]

    def limit(self, about: str, sentence: str) -> None:
        """Note something that does not work."""
        self._note(Finding("limit", about, sentence))

    def fault(self, about: str, sentence: str) -> None:
        """Note something that works and gives wrong answers, or breaks."""
        self._note(Finding("fault", about, sentence))

    def note(self, about: str, sentence: str) -> None:
        """Note a gap of one lane that another lane fills."""
        self._note(Finding("note", about, sentence))

    def _note(self, finding: Finding) -> None:
        if finding not in self.findings:
            self.findings.append(finding)

    def to_dict(self) -> dict[str, Any]:
        """The report as JSON can hold it: NaN and infinity become None.

        Example:
            >>> Report("toy").to_dict()["verdict"]
            'all right'
        """
        found = asdict(self)
        found.update(schema=SCHEMA, verdict=self.verdict, exit_code=self.exit_code)
        return _plain(found)


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(key): _plain(one) for key, one in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(one) for one in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if value is None or isinstance(value, (str, bool, int, float)):
        return value
    return str(value)
