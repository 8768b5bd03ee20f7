"""Planted weights between nothing and all: the strength of a plant as a dial.

A plant is refused where it is too weak to be what it says. To see where a detector loses sight of a
phenomenon it has to be weaker than that: so it is planted once, obviously, and then only the weights
that write it are moved between those of the twin (0) and those of the plant (1), on a straight line.
Everything else, tags and room included, is the same at every strength, also at zero.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import SupportsFloat

from jaxtyping import Float, Int
from torch import Tensor, nn

from interp.core.errors import ModelRefused
from interp.organisms.surgery import parts
from interp.organisms.truth import Planted


@dataclass(frozen=True, eq=False)
class Dial:
    """Entries of parameters by name: where they are, their values at 0, and what 1 adds to them.

    Example:
        >>> linear = nn.Linear(2, 1, bias=False)
        >>> twin = nn.Linear(2, 1, bias=False)
        >>> _ = nn.init.constant_(linear.weight, 5.0), nn.init.ones_(twin.weight)
        >>> Dial.between(twin, linear).set(linear, 0.5)
        >>> linear.weight.tolist()
        [[3.0, 3.0]]
    """

    weights: Mapping[str, tuple[Int[Tensor, "entry"], Float[Tensor, "entry"],
                                Float[Tensor, "entry"]]]

    @classmethod
    def between(cls, off: nn.Module, on: nn.Module, *names: str) -> "Dial":
        """What differs between two models of one shape, in all parameters or in the named ones.

        Raises `ValueError` where they do not have one shape, or do not differ.
        """
        zero, one = dict(off.named_parameters()), dict(on.named_parameters())
        found = {}
        for name in names or tuple(zero):
            if name not in one or zero[name].shape != one[name].shape:
                raise ValueError(f"{name} is not of one shape in both models; widen both first.")
            before, after = (w[name].detach().flatten() for w in (zero, one))
            at = (before != after).nonzero().flatten()
            if len(at):
                found[name] = at, before[at], (after - before)[at]
        if not found:
            raise ValueError("the two models are the same, so there is nothing between them.")
        return cls(found)

    def set(self, model: nn.Module, strength: SupportsFloat) -> None:
        """Put the entries in a model of that shape at a strength, in place; the others stay."""
        parameters = dict(model.named_parameters())
        for name, (at, off, change) in self.weights.items():
            parameters[name].detach().view(-1)[at] = off + float(strength) * change


def write_dial(planted: Planted) -> Dial:
    """The dial of a planted sink or massive coordinate: how much of it its blocks write.

    Example:
        >>> import numpy as np
        >>> from interp.organisms.families import secondary_family
        >>> planted = next(secondary_family(np.random.default_rng(0), rule="relative")).planted
        >>> sorted(write_dial(planted).weights) == sorted(
        ...     f"model.layers.{layer}.mlp.down_proj.weight"
        ...     for layer in (planted.layer, planted.until))
        True

    Raises `ModelRefused` where the plant made the model wider than its twin.
    """
    layers = [planted.layer] + ([] if planted.until is None else [planted.until])
    writers = {id(p) for layer in layers for p in parts(planted.model)[layer].writer.parameters()}
    names = [name for name, p in planted.model.named_parameters() if id(p) in writers]
    try:
        return Dial.between(planted.twin, planted.model, *names)
    except ValueError as error:
        raise ModelRefused(f"this plant has no dial: {error}") from None
