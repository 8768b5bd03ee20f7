"""Errors that users meet, each one sentence: what was wrong, where, what to do.

Every class also derives from the built-in error a Python user would catch, so that
`except ValueError` keeps working in code that has never heard of this package.
"""

import difflib
from collections.abc import Iterable

ALIKE = 0.7
"""How much a misspelt name must have in common with a known one (`difflib`'s ratio)."""


def near(name: str, known: Iterable[str]) -> str:
    """The known name that a misspelt one is closest to; "" if none is close.

    Example:
        >>> near("recieved", ["entropy", "received"]), near("recieved", ["q", "k"])
        ('received', '')
    """
    spelled = {one.lower(): one for one in known}
    found = difflib.get_close_matches(name.lower(), spelled, 1, ALIKE)
    return spelled[found[0]] if found else ""


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """What a message about an unknown name ends with; "" if no known name is near.

    Example:
        >>> did_you_mean("nedle", ["bos", "needle"])
        " Did you mean 'needle'?"
    """
    close = near(name, known)
    return f" Did you mean {close!r}?" if close else ""


class UndertowError(Exception):
    """Any error raised on purpose by `interp` or `probes`.

    Example:
        >>> issubclass(SiteRefused, UndertowError)
        True
    """

    def __str__(self) -> str:
        # KeyError shows the repr of its argument; a sentence should stay a sentence.
        return str(self.args[0]) if self.args else ""


class ModelNotFound(UndertowError, FileNotFoundError):
    """The name is neither a bundled model, nor a folder, nor reachable on the hub."""


class ModelRefused(UndertowError, ValueError):
    """The model was found but cannot be used, with the reason and the way out."""


class ProcessorMissing(UndertowError, ValueError):
    """Images were given, but no processor that turns them into tokens is at hand."""


class PromptError(UndertowError, ValueError):
    """A prompt that cannot be run: empty, too long, images for a text model."""


class SegmentNotFound(UndertowError, KeyError):
    """A named segment that the prompt does not have; the message lists those it has."""


class NotAskedFor(UndertowError, KeyError):
    """A site or statistic that a run does not hold; the message says how to ask for it."""


class SiteRefused(UndertowError, ValueError):
    """A site that this lane cannot read or write for this model, with the lane that can."""


class OutOfRange(UndertowError, IndexError):
    """A layer, head or position outside the model or prompt."""


class NotEnoughMemory(UndertowError, MemoryError):
    """Not even the smallest part of a computation fits into memory."""


class NumericalError(UndertowError, ArithmeticError):
    """NaN or infinity where a number is needed."""


class ResultCorrupted(UndertowError, ValueError):
    """A result folder that is incomplete, or was altered after it was written."""


class FolderRefused(UndertowError, ValueError):
    """A folder with the work of another model, of other prompts or of another version."""


class WorkerDied(UndertowError, RuntimeError):
    """Worker processes died, more often than they are started anew; what they finished is kept."""


class RemoteRefused(UndertowError, RuntimeError):
    """A job that the server did not run: no key, not reachable, not deployed, not allowed."""


class ClaimError(UndertowError, ValueError):
    """A claim that states more than its evidence allows, or lacks what a verdict needs."""
