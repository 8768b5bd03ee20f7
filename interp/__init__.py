"""Undertow: attention sinks, special heads and information flow, found and proven causally.

Example:
    >>> import interp
    >>> interp.ablate("L1H2").heads
    (L1H2,)
"""

from typing import Any

from interp.core import (
    Claim,
    Head,
    HeadScores,
    Prompt,
    Result,
    Segment,
    Site,
    UndertowError,
    ablate,
    block,
    each,
    edit,
    patch,
    redistribute,
    reweigh,
    scale,
)

__version__ = "0.1.0"

_LAZY = {"open_model": "interp.models.open", "Model": "interp.models.model",
         "Run": "interp.models.run"}

__all__ = [
    "Claim", "Head", "HeadScores", "Model", "Prompt", "Result", "Run", "Segment", "Site",
    "UndertowError", "ablate", "block", "each", "edit", "open_model", "patch", "redistribute",
    "reweigh",
    "scale",
]


def __getattr__(name: str) -> Any:
    # Backends take seconds to import, so they are imported with the first model.
    if name in _LAZY:
        from importlib import import_module

        return getattr(import_module(_LAZY[name]), name)
    raise AttributeError(f"module 'interp' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *_LAZY])
