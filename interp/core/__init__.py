"""Types that every other part speaks: prompts, sites, heads, interventions, results, claims."""

from interp.core.claim import Claim
from interp.core.errors import (
    ClaimError,
    FolderRefused,
    ModelNotFound,
    ModelRefused,
    NumericalError,
    OutOfRange,
    ProcessorMissing,
    PromptError,
    ResultCorrupted,
    SegmentNotFound,
    SiteRefused,
    UndertowError,
    WorkerDied,
)
from interp.core.head import Head
from interp.core.intervention import (
    Each,
    Intervention,
    ablate,
    block,
    each,
    edit,
    patch,
    redistribute,
    reweigh,
    scale,
)
from interp.core.prompt import Prompt
from interp.core.result import Result
from interp.core.scores import HeadScores
from interp.core.segment import Segment
from interp.core.site import Site

__all__ = [
    "Claim", "ClaimError", "Each", "FolderRefused", "Head", "HeadScores", "Intervention",
    "ModelNotFound", "ModelRefused",
    "NumericalError", "OutOfRange", "ProcessorMissing", "Prompt", "PromptError", "Result",
    "ResultCorrupted", "Segment", "SegmentNotFound", "Site", "SiteRefused", "UndertowError",
    "WorkerDied", "ablate", "block", "each", "edit", "patch", "redistribute", "reweigh", "scale",
]
