"""What can be changed in a forward pass, as frozen data: printed, hashed, stored, run again."""

import hashlib
import json
from collections.abc import Iterable
from dataclasses import dataclass, fields
from typing import Any, Optional, Union

import numpy as np

from interp.core.errors import did_you_mean
from interp.core.head import Head, HeadLike
from interp.core.head import heads as _heads
from interp.core.prompt import Where, is_number
from interp.core.segment import Segment
from interp.core.site import Site

Phase = str
"""When an edit acts: "all" passes, "prefill" (the prompt), "decode" (generated tokens), or "last"
(only the last query of each pass: the row that predicts the next token)."""

PHASES = ("all", "prefill", "decode", "last")


class Array:
    """A read-only array inside frozen data: compared, hashed and printed by content.

    Example:
        >>> Array([1.0, 2.0]) == Array([1.0, 2.0])
        True
    """

    __slots__ = ("values", "_key")

    def __init__(self, values: Any) -> None:
        if hasattr(values, "detach"):
            values = values.detach().to("cpu")
            values = values.float().numpy() if values.is_floating_point() else values.numpy()
        self.values = np.array(values)
        self.values.setflags(write=False)
        self._key = hashlib.sha256(
            f"{self.values.dtype}{self.values.shape}".encode() + self.values.tobytes()
        ).hexdigest()[:16]

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Array) and self._key == other._key

    def __hash__(self) -> int:
        return hash(self._key)

    def __repr__(self) -> str:
        return f"Array(shape={self.values.shape}, sha256={self._key})"


def _freeze(where: Where) -> Any:
    """Positions as hashable data."""
    if isinstance(where, slice):
        return ("slice", where.start, where.stop, where.step)
    if isinstance(where, (str, Segment)):
        return where
    numbers: Any = where
    return int(numbers) if is_number(where) else tuple(int(position) for position in numbers)


def thaw(where: Any) -> Where:
    """The inverse of the freezing done when an intervention is made."""
    if isinstance(where, tuple) and where and where[0] == "slice":
        return slice(*where[1:])
    return where


@dataclass(frozen=True)
class Intervention:
    """One change to a forward pass; the concrete kinds are below."""

    def describe(self) -> dict[str, Any]:
        """JSON-ready content, for manifests and content keys."""

        def plain(value: Any) -> Any:
            if isinstance(value, Array):
                return repr(value)
            if isinstance(value, Segment):
                return {"segment": value.name, "positions": list(value.positions)}
            if isinstance(value, (Head, Site)):
                return str(value)
            if isinstance(value, (tuple, list)):
                return [plain(item) for item in value]
            return value

        content = {f.name: plain(getattr(self, f.name)) for f in fields(self)}
        return {"kind": type(self).__name__, **content}

    def key(self) -> str:
        """A content key, equal for equal interventions on every machine."""
        return hashlib.sha256(json.dumps(self.describe(), sort_keys=True).encode()).hexdigest()[:16]

    def __post_init__(self) -> None:
        phase = getattr(self, "phase", "all")
        if phase not in PHASES:
            raise ValueError(f"phase {phase!r} is not one of: {', '.join(PHASES)}."
                             f"{did_you_mean(phase, PHASES)}")


@dataclass(frozen=True)
class AblateHeads(Intervention):
    """Replace the output of heads (before the output projection); made by `ablate`."""

    heads: tuple[Head, ...]
    by: str = "zero"
    phase: Phase = "all"
    value: Optional[Array] = None


@dataclass(frozen=True)
class ScaleHeads(Intervention):
    """Multiply the output of heads by a factor; made by `scale`."""

    heads: tuple[Head, ...]
    factor: float
    phase: Phase = "all"


@dataclass(frozen=True)
class BlockEdges(Intervention):
    """Remove attention edges before the softmax, so that rows still sum to one."""

    queries: Any
    keys: Any
    layers: Optional[tuple[int, ...]] = None
    heads: Optional[tuple[Head, ...]] = None
    phase: Phase = "all"


@dataclass(frozen=True)
class EditSite(Intervention):
    """Change an activation at chosen positions; made by `patch` and `edit`.

    `how`: "replace" by `value`; "add" `value`; "multiply" by `value`; "norm" rescales every chosen
    vector to the norm `value`; "project_out" removes the directions in the rows of `value`; "steer"
    turns a vector towards `value`, keeping its norm, the more the more it points away from it
    (arXiv:2502.03628; the norm of `value` is the strength); "amplify" (logits only) adds `value`
    times a logit's own size (arXiv:2501.12206).
    `dims` limits "replace", "add" and "multiply" to coordinates of the last axis.
    """

    site: Site
    how: str
    value: Array
    positions: Any = "all"
    dims: Optional[tuple[int, ...]] = None
    phase: Phase = "all"


@dataclass(frozen=True)
class Redistribute(Intervention):
    """Move a fraction of the attention on sinks to other keys of the same row, after the softmax.

    In rows of image-centric heads only, where `min_nonsink_share` or `min_image_mass` is given
    (arXiv:2503.03321). `sinks` are positions, or one tuple of positions per layer.
    """

    sinks: Any
    destination: Any = "image"
    fraction: float = 0.6
    queries: Any = "all"
    layers: Optional[tuple[int, ...]] = None
    heads: Optional[tuple[Head, ...]] = None
    image: Any = "image"
    min_nonsink_share: Union[int, float, None] = None
    min_image_mass: Union[int, float, None] = None
    phase: Phase = "all"


@dataclass(frozen=True)
class Reweigh(Intervention):
    """Give some keys more or less of every chosen row, which keeps its sum; made by `reweigh`."""

    keys: Any
    factor: Optional[float] = None
    power: Optional[float] = None
    queries: Any = "all"
    layers: Optional[tuple[int, ...]] = None
    heads: Optional[tuple[Head, ...]] = None
    phase: Phase = "all"


@dataclass(frozen=True)
class Each:
    """Other interventions for every prompt of a run; made by `each`."""

    writes: tuple[tuple[Intervention, ...], ...]


HOW = ("replace", "add", "multiply", "norm", "project_out", "steer", "amplify")
ABLATIONS = ("zero", "mean", "uniform", "resample")


def ablate(
    heads: Union[HeadLike, Iterable[HeadLike]],
    by: str = "zero",
    phase: Phase = "all",
    value: Any = None,
) -> AblateHeads:
    """Ablate heads: replace their output before the output projection.

    Example:
        >>> ablate("L1H2")
        AblateHeads(heads=(L1H2,), by='zero', phase='all', value=None)

    Args:
        by: "zero"; "mean" (give `value`, `[layer, head, d_head]` over all heads of the model, see
            `interp.causal.ablate.mean_output`); "resample" (give `value`, the heads' outputs "z"
            of another prompt of equal length, `[layer, position, head, d_head]`); "uniform" (equal
            attention to every visible key, what the released code of arXiv:2404.15574 does).
        phase: "all", "prefill", "decode" or "last".

    Raises:
        ValueError: an unknown kind or phase, no heads, or a `value` that is missing or not used.
    """
    chosen = _heads(heads)
    if not chosen:
        raise ValueError("no heads to ablate: give at least one, like 'L1H2' or (1, 2).")
    if by not in ABLATIONS:
        raise ValueError(f"cannot ablate by {by!r}; choose one of: {', '.join(ABLATIONS)}."
                         f"{did_you_mean(by, ABLATIONS)}")
    if by == "mean" and value is None:
        raise ValueError("ablation by 'mean' needs value=[layer, head, d_head].")
    if by == "resample" and value is None:
        raise ValueError(
            "ablation by 'resample' needs value=[layer, position, head, d_head], the outputs 'z' of "
            "another prompt."
        )
    if by in ("zero", "uniform") and value is not None:
        raise ValueError(f"ablation by {by!r} takes no value; 'mean' and 'resample' do.")
    return AblateHeads(chosen, by, phase, None if value is None else Array(value))


def each(
    writes: Iterable[Union[Intervention, Iterable[Intervention]]]
) -> Each:
    """Other interventions for every prompt of one run, which is how sweeps are batched.

    Example:
        >>> each([ablate("L0H1"), [], [ablate("L1H0"), block("last", [0])]]).writes[1]
        ()
    """
    return Each(tuple(
        (one,) if isinstance(one, Intervention) else tuple(one) for one in writes
    ))


def scale(
    heads: Union[HeadLike, Iterable[HeadLike]], factor: Union[int, float], phase: Phase = "all"
) -> ScaleHeads:
    """Multiply the output of heads by `factor`, before the output projection.

    Example:
        >>> scale([(0, 1)], 0.5)
        ScaleHeads(heads=(L0H1,), factor=0.5, phase='all')
    """
    if isinstance(heads, (int, float)):
        raise ValueError(f"scale takes the heads first, then the factor: scale(heads, {heads}).")
    chosen = _heads(heads)
    if not chosen:
        raise ValueError("no heads to scale: give at least one, like 'L1H2' or (1, 2).")
    return ScaleHeads(chosen, float(factor), phase)


def block(
    queries: Where,
    keys: Where,
    layers: Union[int, Iterable[int], None] = None,
    heads: Union[HeadLike, Iterable[HeadLike], None] = None,
    phase: Phase = "all",
) -> BlockEdges:
    """Stop `queries` from attending to `keys`: their logits become minus infinity.

    Example:
        >>> block("last", "image", layers=[3, 4])
        BlockEdges(queries='last', keys='image', layers=(3, 4), heads=None, phase='all')

    Args:
        queries, keys: segment names, kinds, "all", "last", positions or slices; resolved in every
            prompt at run time.
        layers: true block numbers; all for None.
        heads: query heads; all heads of `layers` for None.

    Source: attention knockout, arXiv:2304.14767.
    """
    if layers is not None:
        layers = (layers,) if isinstance(layers, int) else tuple(sorted(int(x) for x in layers))
    chosen = None if heads is None else _heads(heads)
    if chosen is not None and layers is not None:
        raise ValueError("give either layers or heads to block(): a head names its layer.")
    return BlockEdges(_freeze(queries), _freeze(keys), layers, chosen, phase)


def edit(
    site: Union[Site, str],
    how: str,
    value: Any,
    positions: Where = "all",
    dims: Optional[Iterable[int]] = None,
    phase: Phase = "all",
) -> EditSite:
    """Change an activation: replace, add, multiply, rescale to a norm, project directions out, or
    steer; see `EditSite`.

    `value` broadcasts against the chosen activation, `[position, d_model]` for residual sites and
    `[position, head, d_head]` for q, k, v and z; with several layers a leading layer axis is
    allowed. For "project_out" it is a direction `[d_model]` or rows of directions.

    Example:
        >>> str(edit("mlp_out.2", "multiply", 0.0, positions=[5]).site)
        'mlp_out.2'
    """
    if how not in HOW:
        raise ValueError(f"cannot edit by {how!r}; choose one of: {', '.join(HOW)}."
                         f"{did_you_mean(how, HOW)}")
    chosen = None if dims is None else tuple(int(d) for d in dims)
    return EditSite(Site.parse(site), how, Array(value), _freeze(positions), chosen, phase)


def patch(
    site: Union[Site, str], value: Any, positions: Where = "all", phase: Phase = "all"
) -> EditSite:
    """Replace an activation by `value`, for example one read in another run.

    Example:
        >>> patch("resid_post.1", np.zeros(4), positions="last").how
        'replace'
    """
    return edit(site, "replace", value, positions, None, phase)


def redistribute(
    sinks: Any,
    destination: Where = "image",
    fraction: Union[int, float] = 0.6,
    *,
    queries: Where = "all",
    layers: Optional[Iterable[int]] = None,
    heads: Union[HeadLike, Iterable[HeadLike], None] = None,
    image: Where = "image",
    min_nonsink_share: Union[int, float, None] = 0.5,
    min_image_mass: Union[int, float, None] = 0.2,
    phase: Phase = "all",
) -> Redistribute:
    """Move `fraction` of each chosen row's attention on `sinks` to `destination`, pro rata.

    Rows are chosen as image-centric (arXiv:2503.03321) by `min_nonsink_share` and
    `min_image_mass`; with both None every row of the given queries, layers and heads is edited.
    `sinks` is a place in the prompt, or a mapping {layer: positions}.

    Example:
        >>> redistribute([0], "image", 0.5).fraction
        0.5
    """
    if not 0.0 <= fraction <= 1.0:
        raise ValueError(f"fraction must lie between 0 and 1, not {fraction}.")
    if isinstance(sinks, dict):
        frozen: Any = tuple(
            (int(layer), tuple(int(p) for p in places)) for layer, places in sorted(sinks.items())
        )
        frozen = ("by layer",) + frozen
    else:
        frozen = _freeze(sinks)
    return Redistribute(
        frozen, _freeze(destination), float(fraction), _freeze(queries),
        None if layers is None else tuple(sorted(int(x) for x in layers)),
        None if heads is None else _heads(heads),
        _freeze(image), min_nonsink_share, min_image_mass, phase,
    )


def reweigh(
    keys: Where,
    factor: Union[int, float, None] = None,
    *,
    power: Union[int, float, None] = None,
    queries: Where = "all",
    layers: Optional[Iterable[int]] = None,
    heads: Union[HeadLike, Iterable[HeadLike], None] = None,
    phase: Phase = "all",
) -> Reweigh:
    """Multiply the attention on `keys` by `factor` after the softmax and renormalize each row.

    Rows keep their sum, also where it is below one (learned sink logits). Elsewhere this equals
    adding ln(factor) to the logits of `keys`. With `power` instead of a factor, the keys' share s
    of a row becomes s ** power: 0 < power < 1 raises it.

    Example:
        >>> reweigh([0], 2.0, heads="L1H2")  # doctest: +ELLIPSIS
        Reweigh(keys=(0,), factor=2.0, power=None, queries='all', layers=None, heads=(L1H2,), ...)

    Rows with nothing on the keys stay as they are, and so do rows with nothing elsewhere.

    Raises:
        ValueError: neither or both of `factor` and `power`, a negative one, layers and heads.

    Source: arXiv:2505.11739 (factor, on the initial token); split-softmax (power), which
    arXiv:2503.23306 uses on the gold document.
    """
    if (factor is None) == (power is None):
        raise ValueError("give reweigh() either a factor or a power.")
    number = float(factor if factor is not None else power)  # type: ignore[arg-type]
    if not 0 <= number < float("inf") or power is not None and not number > 0:
        raise ValueError(
            f"the factor (or power) of reweigh() must be a number from 0 on, not {number}."
        )
    if layers is not None and heads is not None:
        raise ValueError("give either layers or heads to reweigh(): a head names its layer.")
    return Reweigh(
        _freeze(keys), None if factor is None else number, None if power is None else number,
        _freeze(queries), None if layers is None else tuple(sorted(int(x) for x in layers)),
        None if heads is None else _heads(heads), phase,
    )
