"""Visual sinks: image tokens that collect attention because the language model's massive
coordinates fire on them.

Paper     arXiv:2503.03321
Question  Which image tokens are sinks, from which layer on, and in which residual coordinates?
Measure   phi, the largest |x_d| / RMS(x) over the sink dimensions, of the residual that enters a
          layer; a token is a sink where phi reaches tau
Cause     block the text queries from the visual sinks: the answer must not change, while it does
          for as many other image tokens
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, Optional, SupportsFloat, SupportsIndex

import numpy as np
import pandas as pd
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from interp.core.errors import NumericalError, OutOfRange

Dims = Sequence[SupportsIndex] | np.ndarray | Tensor
Comparison = Literal[">=", ">"]

EPSILON = 1e-6
"""Added to the mean square under the root, as in the released code."""


def sink_value(
    residual: Float[Tensor | np.ndarray, "*batch position d_model"], sink_dims: Dims
) -> Float[Tensor, "*batch position"]:
    """phi: the largest magnitude over the sink dimensions, in units of the vector's RMS.

    Example:
        >>> residual = torch.tensor([[1.0, -1.0, 1.0, 1.0], [0.0, 0.0, 0.0, -8.0]])
        >>> sink_value(residual, [2, 3]).round(decimals=3)
        tensor([1., 2.])

    Args:
        residual: what enters layer l (transformers' `hidden_states[l]`), before the norm and
            without its gain.
        sink_dims: the model's sink dimensions (`candidate_dims`).

    Returns:
        phi in float32 (float64 is kept), between 0 and sqrt(d_model).

    Raises:
        NumericalError: NaN or infinity in the residual.
        OutOfRange: a dimension that the residual does not have.

    Source: arXiv:2503.03321; RMS with 1e-6 under the root as in the released code.
    """
    values = _checked(residual)
    dims = _dims(sink_dims, values.shape[-1])
    root = (values.square().mean(-1) + EPSILON).sqrt()
    return values[..., dims.to(values.device)].abs().amax(-1) / root


def portable_tau(d_model: SupportsFloat) -> float:
    """tau(D) = 0.3125 sqrt(D): the threshold that means the same share of energy at every width.

    Example:
        >>> portable_tau(4096), round(portable_tau(3584), 1)
        (20.0, 18.7)

    tau = 20 asks one coordinate to hold 400/D of the squared norm (9.8 % at 4096) and can never be
    reached below D = 400; tau(D) asks for 9.8 % at any D. Derived from the definition of phi.
    """
    return 0.3125 * math.sqrt(float(d_model))


def sink_mask(
    residual: Float[Tensor | np.ndarray, "*batch position d_model"],
    sink_dims: Dims,
    tau: Optional[SupportsFloat] = 20.0,
    comparison: Comparison = ">=",
) -> Bool[Tensor, "*batch position"]:
    """True where a position is a sink; see `sink_positions`.

    Example:
        >>> residual = torch.ones(2, 900)
        >>> residual[1, 3] = 100.0
        >>> sink_mask(residual, [3])
        tensor([False,  True])
    """
    phi = sink_value(residual, sink_dims)
    limit = portable_tau(residual.shape[-1]) if tau is None else float(tau)
    return phi >= limit if comparison == ">=" else phi > limit


def sink_positions(
    residual: Float[Tensor | np.ndarray, "position d_model"],
    sink_dims: Dims,
    tau: Optional[SupportsFloat] = 20.0,
    comparison: Comparison = ">=",
) -> Int[Tensor, "sink"]:
    """Positions whose phi reaches tau, in order: text and image sinks alike.

    Example:
        >>> residual = torch.ones(4, 900)
        >>> residual[2, 3] = 100.0
        >>> sink_positions(residual, [3, 7])
        tensor([2])

    Args:
        tau: threshold on phi; None for `portable_tau` of the model's width. Report both, and say
            so if the two sets differ.
        comparison: ">=" in the paper, ">" in the released code.

    Visual sinks are these positions inside the image. Layers 0 and 1 have none yet.

    Source: arXiv:2503.03321 (I^l); released code `DimProspector`.
    """
    return sink_mask(residual, sink_dims, tau, comparison).nonzero().flatten()


def band(n_layers: int) -> range:
    """Layers in which massive values exist: from a tenth to four fifths of the depth.

    Example:
        >>> band(32), band(6)
        (range(4, 26), range(1, 5))
    """
    return range(math.ceil(0.1 * n_layers), math.floor(0.8 * n_layers) + 1)


@dataclass(frozen=True)
class SinkDims:
    """Discovered sink dimensions, strongest first, each with sign, energy, recurrence and birth.

    `energy` is the mean share of the anchor's squared norm, `recurrence` the share of
    (prompt, layer) pairs in which the dimension was a candidate, `birth_layer` the first layer
    in which its mean share passes 5 % (None if it never does).
    """

    dims: tuple[int, ...]
    sign: tuple[int, ...] = ()
    energy: tuple[float, ...] = ()
    recurrence: tuple[float, ...] = ()
    birth_layer: tuple[Optional[int], ...] = ()


def candidate_dims(
    anchors: Float[Tensor | np.ndarray, "prompt layer d_model"],
    min_ratio: SupportsFloat = 1000.0,
    min_recurrence: SupportsFloat = 0.8,
    min_root_share: SupportsFloat = 0.15,
    cap: int = 8,
    layers: Optional[Sequence[SupportsIndex]] = None,
) -> SinkDims:
    """Dimensions that are massive in the anchor (the first sink token) again and again.

    Example:
        >>> anchors = 0.01 * torch.randn(3, 9, 64, generator=torch.Generator().manual_seed(0))
        >>> anchors[:, 1:, 5] = -40.0
        >>> found = candidate_dims(anchors)
        >>> found.dims, found.sign, found.birth_layer
        ((5,), (-1,), (1,))

    Args:
        anchors: residual entering every layer, at the anchor position (BOS, or the first position
            that collects attention).
        min_ratio: |x_d| over the median |x| of the same vector; 100 for models under about 1e9
            parameters, and say so.
        min_recurrence: share of (prompt, layer) pairs of the band in which it must be a candidate.
        min_root_share: |x_d| / RMS must reach this times sqrt(d_model).
        layers: the band to look in; `band` of the depth if None.

    Returns:
        At most `cap` dimensions by mean energy; none if nothing recurs.

    Source: toolkit procedure (methods of massive activations, arXiv:2402.17762, on anchor
    vectors); known sets it must find: LLaMA-2-7B {1415, 2533}, LLaMA-2-13B {2100, 4743}.
    """
    values = _checked(anchors)
    _, n_layers, width = values.shape
    chosen = [int(layer) for layer in (band(n_layers) if layers is None else layers)]
    if not chosen or min(chosen) < 0 or max(chosen) >= n_layers:
        raise OutOfRange(f"layers {chosen} are not among the {n_layers} layers of the anchors.")
    size = values.abs()
    mean_square = values.square().mean(-1, keepdim=True)
    energy = values.square() / (width * mean_square).clamp(min=torch.finfo(values.dtype).tiny)
    large = size / (mean_square + EPSILON).sqrt() >= float(min_root_share) * math.sqrt(width)
    massive = size >= float(min_ratio) * size.median(-1, keepdim=True).values
    recurrence = (large & massive)[:, chosen].double().mean((0, 1))
    strength = energy[:, chosen].double().mean((0, 1))
    kept = (recurrence >= float(min_recurrence)).nonzero().flatten().tolist()
    kept = sorted(kept, key=lambda d: (-float(strength[d]), d))[:cap]
    by_layer = energy.mean(0)
    births = []
    for d in kept:
        passed = (by_layer[:, d] > 0.05).nonzero().flatten()
        births.append(int(passed[0]) if len(passed) else None)
    return SinkDims(
        tuple(kept),
        tuple(1 if float(values[:, chosen, d].mean()) > 0 else -1 for d in kept),
        tuple(float(strength[d]) for d in kept),
        tuple(float(recurrence[d]) for d in kept),
        tuple(births),
    )


@dataclass(frozen=True, eq=False)
class Origin:
    """Where each visual token's outlier comes from: the vision tower, the language model, or both.

    `v_sink`: norm outlier already in the projector's output. `l_sink`: phi reaches tau only
    inside the language model, in layer 2 or later. `birth_layer`: first layer with phi at tau, -1
    if none.
    """

    v_sink: Bool[Tensor, "patch"]
    l_sink: Bool[Tensor, "patch"]
    birth_layer: Int[Tensor, "patch"]

    def labels(self) -> list[str]:
        """One of "V-sink", "L-sink", "V+L", "none" for every visual token."""
        names = {(True, False): "V-sink", (False, True): "L-sink", (True, True): "V+L",
                 (False, False): "none"}
        return [names[pair] for pair in zip(self.v_sink.tolist(), self.l_sink.tolist())]

    def crosstab(self) -> pd.DataFrame:
        """Counts of tokens, V-sink (rows) against L-sink (columns)."""
        both = [False, True]
        counts = [[int(((self.v_sink == row) & (self.l_sink == column)).sum()) for column in both]
                  for row in both]
        return pd.DataFrame(counts, index=pd.Index(both, name="V-sink"),
                            columns=pd.Index(both, name="L-sink"))


def origin(
    projected: Float[Tensor | np.ndarray, "patch d_model"],
    phi: Float[Tensor | np.ndarray, "layer patch"],
    tau: SupportsFloat,
    min_birth: int = 2,
) -> Origin:
    """Label where visual sinks come from: V-sink the vision side, L-sink the language model.

    Example:
        >>> projected = torch.ones(9, 4)
        >>> projected[3] *= 40
        >>> phi = torch.zeros(5, 9)
        >>> phi[2:, 6] = 30.0
        >>> [name for name in origin(projected, phi, 20.0).labels() if name != "none"]
        ['V-sink', 'L-sink']

    Args:
        projected: visual embeddings as they enter the language model; outliers have a norm above
            the image's mean plus two standard deviations.
        phi: `sink_value` of the same tokens in the residual entering every layer.
        min_birth: first layer that counts as inside the language model.

    Source: V-sinks, arXiv:2603.00510; L-sinks, arXiv:2503.03321; the two sets differ
    (arXiv:2604.03316). Labels are the toolkit's.
    """
    norm = _checked(projected).norm(dim=-1)
    values = _checked(phi)
    if values.shape[-1] != len(norm):
        raise ValueError(
            f"{len(norm)} projected tokens but phi of {values.shape[-1]}; give the same visual "
            "tokens in the same order."
        )
    v_sink = norm > norm.mean() + 2 * norm.std(correction=0)
    alive = values >= float(tau)
    birth = torch.where(alive.any(0), alive.int().argmax(0), torch.full_like(alive[0].int(), -1))
    return Origin(v_sink, birth >= min_birth, birth)


def _checked(values: Tensor | np.ndarray) -> Tensor:
    tensor = torch.as_tensor(values)
    tensor = tensor.to(torch.promote_types(tensor.dtype, torch.float32))
    finite = torch.isfinite(tensor)
    if not finite.all():
        place = tuple((~finite).nonzero()[0].tolist())
        raise NumericalError(
            f"values are NaN or infinite at index {place} of shape {tuple(tensor.shape)}; run the "
            "model in bfloat16 or float32."
        )
    return tensor


def _dims(sink_dims: Dims, width: int) -> Tensor:
    dims = torch.as_tensor(np.asarray(sink_dims, dtype=np.int64).reshape(-1))
    if not len(dims):
        raise ValueError("no sink dimensions: discover them first (`find_sink_dims`).")
    if int(dims.min()) < 0 or int(dims.max()) >= width:
        raise OutOfRange(
            f"sink dimensions {dims.tolist()} do not fit a residual of width {width}; they belong "
            "to another model."
        )
    return dims
