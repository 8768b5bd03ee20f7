"""Undertow: attention sinks, special heads and information flow, found and proven causally.

Example:
    >>> import interp
    >>> interp.ablate("L1H2").heads
    (L1H2,)
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # for editors and type checkers; `__getattr__` does it when a name is used
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
    from interp.models.model import Model
    from interp.models.open import open_model
    from interp.models.run import Run

__version__ = "0.1.0"

_LAZY = {
    "open_model": "interp.models.open", "Model": "interp.models.model", "Run": "interp.models.run",
    **dict.fromkeys((
        "Claim", "Head", "HeadScores", "Prompt", "Result", "Segment", "Site", "UndertowError",
        "ablate", "block", "each", "edit", "patch", "redistribute", "reweigh", "scale",
    ), "interp.core"),
}

__all__ = [
    "Claim", "Head", "HeadScores", "Model", "Prompt", "Result", "Run", "Segment", "Site",
    "UndertowError", "ablate", "block", "each", "edit", "open_model", "patch", "redistribute",
    "reweigh", "scale",
]


def __getattr__(name: str) -> Any:
    # Tables take a second to import and backends several, so each comes with the first use.
    from importlib import import_module

    if name == "core":
        return import_module("interp.core")
    if name in _LAZY:
        found = getattr(import_module(_LAZY[name]), name)
        globals()[name] = found
        return found
    raise AttributeError(f"module 'interp' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *_LAZY})
