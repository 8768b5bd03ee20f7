"""Directions of an MLP: which inputs it turns into the primary sink's direction, and how strongly.

Paper     arXiv:2512.22213
Question  How many directions of its input does the MLP that creates a sink respond to?
Measure   each principal direction of the MLP inputs, fed alone through the MLP with both signs
Cause     none here: see `interp.sinks.mlp_formation`
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Optional, SupportsFloat, SupportsIndex, cast

import numpy as np
import torch
from jaxtyping import Float
from scipy.stats import spearmanr
from torch import Tensor

from interp.core.errors import NumericalError

SWEEP = tuple(scale for scale in range(-20, 20) if scale != 0)
"""Scales at which the paper feeds the leading components through the MLP."""


@dataclass(frozen=True, eq=False)
class MlpDirections:
    """How an MLP responds to each principal direction of its inputs; rows are components.

    `components` [component, d_model] are unit vectors, in order of variance, each pointing to the
    side of the sinks. `norm` and `cosine` [component, 2] hold the norm of MLP(+c), MLP(-c) and
    their cosine to the reference output. `sweep` [component, scale] holds the norm of MLP(a c)
    for the leading components at `scales`. `sink_projection` and `other_projection`
    [sample, component] are the centered inputs in these coordinates.
    """

    components: Tensor
    norm: Tensor
    cosine: Tensor
    scales: tuple[float, ...]
    sweep: Tensor
    sink_projection: Tensor
    other_projection: Tensor

    def selected(self, threshold: SupportsFloat = 0.98) -> tuple[int, ...]:
        """Components whose output, for either sign, is parallel to the reference or opposite."""
        hit = (self.cosine.abs() > float(threshold)).any(-1)
        return tuple(hit.nonzero().flatten().tolist())

    def toward(self, threshold: SupportsFloat = 0.98) -> tuple[int, ...]:
        """Components whose stronger sign pushes towards the reference, not away from it."""
        stronger = self.norm.argmax(-1, keepdim=True)
        hit = self.cosine.gather(-1, stronger)[:, 0] > float(threshold)
        return tuple(hit.nonzero().flatten().tolist())

    def active_sign(self, component: SupportsIndex) -> int:
        """+1 or -1: the side on which the sweep reaches the larger norm."""
        sweep, scales = self.sweep[int(component)], torch.tensor(self.scales)
        return 1 if float(sweep[scales > 0].max()) >= float(sweep[scales < 0].max()) else -1

    def slope(self, component: SupportsIndex) -> float:
        """Slope of log norm on log scale on the active side: about 2 for a quadratic response."""
        sign = self.active_sign(component)
        scales = sign * np.asarray(self.scales, dtype=float)
        norms = self.sweep[int(component)].double().numpy()
        use = (scales > 0) & (norms > 0)
        if use.sum() < 2:
            return float("nan")
        return float(np.polyfit(np.log(scales[use]), np.log(norms[use]), 1)[0])

    def asymmetry(self, component: SupportsIndex) -> float:
        """Largest norm on the active side over the largest on the other."""
        sweep, scales = self.sweep[int(component)], torch.tensor(self.scales)
        sign = self.active_sign(component)
        return float(sweep[sign * scales > 0].max() / sweep[sign * scales < 0].max())

    def top_over_median(self) -> float:
        """Largest response over the median response of all components."""
        response = self.norm.amax(-1)
        return float(response.max() / response.median())


def directions(
    sink_inputs: Float[Tensor, "sink d_model"],
    other_inputs: Float[Tensor, "other d_model"],
    mlp: Callable[[Tensor], Tensor],
    reference: Float[Tensor, "d_model"],
    scales: Sequence[SupportsFloat] = SWEEP,
    n_sweep: SupportsIndex = 6,
) -> MlpDirections:
    """Feed each principal direction of the MLP inputs, alone, through the MLP, with both signs.

    Example:
        >>> write = torch.tensor([0.0, 2.0])
        >>> square = lambda x: x[..., :1].relu().square() * write
        >>> inputs = torch.tensor([[5.0, 0.1], [7.0, -0.1]])
        >>> found = directions(inputs, torch.tensor([[0.0, 1.0], [0.1, -1.0]]), square, write)
        >>> found.selected(), round(found.slope(0), 4)
        ((0, 1), 2.0)

    Args:
        sink_inputs: normed MLP inputs of the sinks at one layer; `other_inputs`: as many controls,
            best with the same token ids.
        mlp: [row, d_model] to [row, d_model], the MLP after its norm; called in the inputs' dtype,
            on their device.
        reference: the primary sink's MLP *output* at that layer.
        scales: of the sweep, with both signs, without 0.
        n_sweep: how many leading components are swept.

    The mean is subtracted for the decomposition and not added back, as in the paper. Directions
    without variance are dropped. A gated MLP is close to even for small inputs, so that equal
    cosines of +c and -c at unit scale are a property of the architecture, not evidence.

    Raises:
        ValueError: fewer than two inputs, or scales without both signs.
        NumericalError: NaN in the inputs.

    Source: arXiv:2512.22213, released notebook `04.pca.ipynb`.
    """
    steps = tuple(float(scale) for scale in scales)
    if 0.0 in steps or not any(s > 0 for s in steps) or not any(s < 0 for s in steps):
        raise ValueError(f"scales need both signs and no zero, not {steps}.")
    if len(sink_inputs) < 1 or len(other_inputs) < 1:
        raise ValueError(
            f"{len(sink_inputs)} sinks and {len(other_inputs)} controls: give at least one of each."
        )
    inputs = torch.cat([sink_inputs, other_inputs]).cpu().double()
    if not torch.isfinite(inputs).all():
        raise NumericalError("MLP inputs contain NaN or infinity; read them in float32.")
    centered = inputs - inputs.mean(0)
    _, size, components = torch.linalg.svd(centered, full_matrices=False)
    components = components[size > size[0] * 1e-7] if float(size[0]) > 0 else components[:0]
    if not len(components):
        raise ValueError("all MLP inputs are equal; there is no direction to decompose.")
    projection = centered @ components.T
    # The sign of a principal direction is arbitrary: let it point to the sinks.
    flip = torch.where(projection[: len(sink_inputs)].mean(0) < 0, -1.0, 1.0)
    components, projection = components * flip[:, None], projection * flip

    def respond(rows: Tensor) -> Tensor:
        return mlp(rows.to(sink_inputs)).detach().cpu().double()

    both = torch.stack([respond(components), respond(-components)], 1)
    anchor = reference.detach().cpu().double()
    swept = components[: int(n_sweep)]
    scaled = torch.tensor(steps, dtype=swept.dtype)[None, :, None] * swept[:, None]
    sweep = respond(scaled.flatten(0, 1)).norm(dim=-1).unflatten(0, (len(swept), len(steps)))
    return MlpDirections(
        components=components, norm=both.norm(dim=-1),
        cosine=torch.cosine_similarity(both, anchor.expand_as(both), dim=-1),
        scales=steps, sweep=sweep,
        sink_projection=projection[: len(sink_inputs)],
        other_projection=projection[len(sink_inputs) :],
    )


@dataclass(frozen=True)
class RankCorrelation:
    """Spearman's rho with its two-sided p and n; `reason` says why it cannot be tested, if so."""

    rho: float
    p: float
    n: int
    reason: Optional[str] = None


def norm_relation(
    norm: Sequence[SupportsFloat] | np.ndarray,
    outcome: Sequence[SupportsFloat] | np.ndarray,
    min_instances: SupportsIndex = 10,
) -> RankCorrelation:
    """Does the norm of the MLP write rank a sink's lifetime, or its attention score?

    Example:
        >>> found = norm_relation(range(12), [x * x for x in range(12)])
        >>> round(found.rho, 3), found.n
        (1.0, 12)
        >>> norm_relation([1.0, 2.0], [3, 4]).reason
        '2 sinks, at least 10 are needed'

    Args:
        norm: |MLP output| of every sink at its creation layer.
        outcome: its lifetime, or its sink score.

    Source: arXiv:2512.22213 (abstract: the norm determines score and lifetime).
    """
    x, y = np.asarray(list(norm), dtype=float), np.asarray(list(outcome), dtype=float)
    if x.shape != y.shape:
        raise ValueError(f"{len(x)} norms but {len(y)} outcomes; give one of each for every sink.")
    if not (np.isfinite(x).all() and np.isfinite(y).all()):
        raise NumericalError("norms or outcomes contain NaN or infinity.")
    need = int(min_instances)
    if len(x) < need:
        return RankCorrelation(float("nan"), float("nan"), len(x),
                               f"{len(x)} sinks, at least {need} are needed")
    for name, values in (("norms", x), ("outcomes", y)):
        if len(np.unique(values)) < 2:
            return RankCorrelation(float("nan"), float("nan"), len(x), f"all {name} are equal")
    rho, p = cast(tuple[float, float], spearmanr(x, y))
    return RankCorrelation(float(rho), float(p), len(x))
