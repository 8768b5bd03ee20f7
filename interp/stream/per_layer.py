"""A statistic with settings of its own in every prompt and layer."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class PerLayer:
    """Makes a reducer for each (prompt number, layer), where one setting cannot serve all.

    Example:
        >>> from interp.stream.reducers import SegmentMass
        >>> sinks = {0: [0], 1: [0, 7]}
        >>> per_layer = PerLayer("segments", lambda prompt, layer: SegmentMass({"s": sinks[layer]}))
        >>> per_layer.make(0, 1).name
        'segments'

    Attributes:
        name: of the statistic that is made, in every case the same.
        make: (number of the prompt in the run, block number) -> reducer, used once; None where
            it is not wanted, for every prompt in the same blocks: those cost nothing then.
    """

    name: str
    make: Callable[[int, int], Any]
