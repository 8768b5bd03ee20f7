"""What one forward pass does at every site it comes by: edits first, then reads and statistics."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from interp.core.site import HEADED, PAIRS
from interp.models.attention import Session
from interp.models.edits import Edits, Pass
from interp.models.run import Reads


class Visit:
    """A pass of a batch of prompts of equal length; the same in every lane that runs modules.

    `numbers` says which prompts of the whole run its rows are.
    """

    def __init__(
        self, now: Pass, edits: Sequence[Edits], reads: Reads,
        reducers: Callable[[int, int], list], residual_reducers: Callable[[int, int], list],
        numbers: Sequence[int],
    ) -> None:
        self.now, self.edits, self.reads, self.numbers = now, list(edits), reads, numbers
        self.reducers, self.residual_reducers = reducers, residual_reducers

    def writes(self, layer: int, name: str) -> bool:
        """Whether some edit writes this site."""
        return any(one.writes(layer, name) for one in self.edits)

    def needed(self, layer: int, name: str) -> bool:
        """Whether anything is to be done at this site of the residual stream."""
        if self.reads.want(layer, name) or self.writes(layer, name):
            return True
        return name == "resid_post" and bool(self.residual_reducers(self.numbers[0], layer))

    def attends(self, layer: int) -> bool:
        """Whether anything is to be done inside the attention of this layer."""
        if any(self.reads.want(layer, name) for name in HEADED + PAIRS):
            return True
        return self.edits_attention(layer) or bool(self.reducers(self.numbers[0], layer))

    def edits_attention(self, layer: int) -> bool:
        """Whether some edit acts inside the attention of this layer."""
        return any(
            one.blocks(layer) or one.edits_pattern(layer)
            or any(one.writes(layer, name) for name in HEADED)
            for one in self.edits
        )

    def at(self, layer: int, name: str, x: Tensor) -> Tensor:
        """The residual stream (whatever batch axes it has here) after the edits of this site."""
        shape = x.shape
        x = x.reshape(len(self.edits), self.now.length, shape[-1])
        if self.writes(layer, name):
            x = torch.stack([
                one.apply(layer, name, row, self.now) for one, row in zip(self.edits, x)
            ])
        if self.reads.want(layer, name):
            for row, one in enumerate(x):
                self.reads.add(self.numbers[row], layer, name, one)
        if name == "resid_post":
            for row, one in enumerate(x):
                for reducer in self.residual_reducers(self.numbers[row], layer):
                    reducer.add(one, self.now.start)
        return x.reshape(shape)

    def session(self) -> Session:
        """The same for the insides of attention, as the registered function takes it."""
        # One attention call serves one row of the batch at a time, in order.
        turn: dict[tuple[int, str], int] = {}

        def keep(layer: int, name: str, value: Tensor) -> None:
            row = turn.get((layer, name), 0)
            turn[layer, name] = row + 1
            self.reads.add(self.numbers[row], layer, name, value[0])

        return Session(
            self.now, self.edits, self.reads.want, keep,
            lambda row, layer: self.reducers(self.numbers[row], layer),
        )
