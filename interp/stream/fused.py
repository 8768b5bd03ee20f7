"""Row and key statistics by fused kernels, on a GPU with Triton: nothing of query x key is stored.

The torch tiles of `interp.stream.sweep` are what a kernel is held against: before it is used for a
kind of input (width of heads, type, soft cap) on a device it must agree with them on a small case;
if it does not, or does not compile, a warning says so once and the tiles do the work.
"""

import functools
import importlib.util
import math
import os
import warnings
from dataclasses import dataclass, field
from typing import Any, Optional

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from interp.stream.masks import Mask, causal
from interp.stream.plan import Plan, indices

WIDEST = 256
"""Widest head whose vectors fit on the chip together with a tile."""

ENOUGH = 1 << 16
"""Queries times keys from which on starting kernels pays; decoding steps stay below."""

AGREES = 1e-4
"""Largest difference to the tiles, in units of each statistic's own size, in the trial."""


@dataclass
class Found:
    """Statistics of whole rows, as reducers take them instead of tiles.

    Attributes:
        query_positions, rows: absolute positions, as a tensor and as a slice or list.
        columns: the positions of the keys.
        mass: sum of each row (below one with learned sinks); zero where nothing is visible.
        entropy: of the row divided by its sum, in nats. distance: sum of p |t - s|, in tokens.
        top_probability, top_key: the largest entry of each row; key -1 where nothing is visible.
        lse: log-sum-exp of the visible logits, sinks left out.
    """

    query_positions: Int[Tensor, "query"]
    columns: slice
    mass: Float[Tensor, "batch head query"]
    entropy: Float[Tensor, "batch head query"]
    distance: Float[Tensor, "batch head query"]
    top_probability: Float[Tensor, "batch head query"]
    top_key: Int[Tensor, "batch head query"]
    lse: Float[Tensor, "batch head query"]
    work: "_Work"
    sequences: Any = field(default_factory=lambda: slice(None))
    heads: Any = field(default_factory=lambda: slice(None))

    def __post_init__(self) -> None:
        self.rows: Any = indices(self.query_positions.tolist())

    @property
    def seen(self) -> Bool[Tensor, "batch head query"]:
        """Rows that see any key."""
        return self.top_key >= 0

    def received(
        self, normalize: bool, others: bool, chosen: Optional[Bool[Tensor, "query"]] = None
    ) -> tuple[Float[Tensor, "batch head key"], Int[Tensor, "key"]]:
        """What the chosen rows give to each key, and how many of them see it.

        Args:
            normalize: divide each row by its sum first. others: leave out a key's own row.
        """
        log_sum = self.lse if normalize else self.lse - self.mass.log()
        out = ~self.seen if chosen is None else ~self.seen | ~chosen
        return self.work.received(log_sum.masked_fill(out, torch.inf), others), \
            self.work.visible(others, chosen)


class _Work:
    """The inputs of one call as the kernels want them, and the launches."""

    def __init__(
        self, plan: Plan, band: tuple[int, int], scaling: float, softcap: Optional[float]
    ) -> None:
        self.plan, (self.behind, self.ahead) = plan, band
        # One type for the product: what torch tiles make of a bfloat16 query and a float32 key.
        kind = torch.promote_types(plan.query.dtype, plan.key.dtype)
        self.query, self.key = (x.to(kind) for x in (plan.query, plan.key))
        self.query, self.key = (x if x.stride(-1) == 1 else x.contiguous()
                                for x in (self.query, self.key))
        self.at = torch.tensor(plan.positions, dtype=torch.int32, device=plan.device)
        self.keys = torch.arange(plan.keys.start, plan.keys.stop, device=plan.device)
        self.scaling, self.softcap = scaling, softcap
        d, short = self.query.shape[-1], kind.itemsize == 2
        # The largest blocks that compile for compute capability 8.0 and 9.0 without spilling.
        self.block = ((128, 64) if d <= 128 else (64, 32)) if short else \
            ((64, 32) if d <= 128 else (32, 32))
        # Three products in tf32 have the precision of one in float32.
        self.fixed = dict(
            D=d, PADDED=max(16, 1 << (d - 1).bit_length()), CAPPED=softcap is not None,
            PRECISION="ieee" if short else "tf32x3", ROWS=self.block[0], KEYS=self.block[1],
            num_warps=8 if self.block[0] == 128 else 4)

    def _launch(self, kernel: Any, bounds: tuple[Tensor, Tensor], *given: Any, **more: Any) -> None:
        """One program for each block of every head; `bounds` say what a block goes through."""
        plan = self.plan
        numbers = (*self.query.stride()[:3], *self.key.stride()[:3], plan.n_queries, len(plan.keys),
                   plan.keys.start, self.behind, self.ahead, self.scaling, self.softcap or 1.0,
                   plan.heads, plan.heads // plan.kv_heads)
        with torch.cuda.device_of(self.query):
            kernel[len(bounds[0]), plan.batch * plan.heads](
                self.query, self.key, self.at, *bounds, *given, *numbers, **self.fixed, **more)

    def rows(self) -> tuple[Tensor, ...]:
        from interp.stream.kernels import rows_kernel

        made = [torch.empty(self.plan.query.shape[:3], device=self.plan.device) for _ in range(4)]
        top_key = torch.empty_like(made[0], dtype=torch.int32)
        ends = _ends(self.at, self.block[0])
        self._launch(rows_kernel, _within(ends, self.keys, self.behind, self.ahead), *made, top_key)
        return (*made, top_key)

    def received(self, log_sum: Tensor, others: bool) -> Tensor:
        from interp.stream.kernels import keys_kernel

        made = torch.empty((*self.plan.query.shape[:2], len(self.keys)), device=self.plan.device)
        ends = _ends(self.keys, self.block[1])
        self._launch(keys_kernel, _within(ends, self.at.long(), self.ahead, self.behind),
                     log_sum.contiguous(), made, OTHERS=others)
        return made

    def visible(self, others: bool, chosen: Optional[Tensor]) -> Tensor:
        """How many of the chosen rows see each key."""
        at = self.at.long() if chosen is None else self.at.long()[chosen]
        found = torch.searchsorted(at, self.keys + self.behind, right=True) \
            - torch.searchsorted(at, self.keys - self.ahead)
        return found - torch.isin(self.keys, at).long() if others else found


def _within(
    ends: tuple[Tensor, Tensor], of: Tensor, below: int, above: int
) -> tuple[Tensor, Tensor]:
    """For blocks with these first and last positions: where in `of` their band begins and ends."""
    first = torch.searchsorted(of, ends[0] - below)
    last = torch.searchsorted(of, ends[1] + above, right=True)
    return first.int(), last.int()


def _ends(positions: Tensor, step: int) -> tuple[Tensor, Tensor]:
    """First and last of ascending positions, by blocks."""
    last = torch.arange(step - 1, len(positions) + step - 1, step, device=positions.device)
    return positions[::step].long(), positions[last.clamp_max(len(positions) - 1)].long()


def find(
    plan: Plan, mask: Mask, scaling: float, softcap: Optional[float], sinks: Optional[Tensor],
) -> Optional[Found]:
    """Row statistics by a kernel; None where none can be used, and tiles must do.

    Args:
        sinks: logits of an extra key without value, for each row [batch, head, query].
    """
    if not _fits(plan, mask):
        return None
    width, kind = plan.query.shape[-1], torch.promote_types(plan.query.dtype, plan.key.dtype)
    if not _interpreted() and not _proven(plan.device, width, kind, softcap is not None):
        return None
    assert mask.band is not None
    return _found(_Work(plan, mask.band, scaling, softcap), sinks)


def _found(work: _Work, sinks: Optional[Tensor]) -> Found:
    top, total, spread, far, top_key = work.rows()
    seen = total > 0
    total = total.where(seen, torch.ones_like(total))
    # Counted from the highest logit: with a sink far above it nothing overflows but to zero.
    whole = total if sinks is None else total + (sinks - top).exp()
    share = torch.where(seen, 1 / whole, 0.0)
    log = total.log()
    return Found(
        work.at.long(), slice(work.plan.keys.start, work.plan.keys.stop), total * share,
        (log - spread / total).clamp_min(0) * seen, far * share, share, top_key,
        (top + log).where(seen, -torch.inf), work)


def _fits(plan: Plan, mask: Mask) -> bool:
    if plan.device.type != "cuda" and not _interpreted():
        return False
    positions = plan.positions
    return (
        mask.band is not None and mask.bias is None and plan.dtype == torch.float32
        and plan.query.shape[-1] <= WIDEST
        and (plan.n_queries * len(plan.keys) >= ENOUGH or _interpreted())
        and all(one < two for one, two in zip(positions, positions[1:]))
        and _installed()
    )


def _installed() -> bool:
    return importlib.util.find_spec("triton") is not None


def _interpreted() -> bool:
    """Whether Triton's interpreter stands in for a GPU, as in tests."""
    return os.environ.get("TRITON_INTERPRET") == "1"


@functools.cache
def _proven(device: torch.device, width: int, kind: torch.dtype, capped: bool) -> bool:
    """Whether the kernels agree with the tiles here; asked once for each kind of input."""
    try:
        worst = _trial(device, width, kind, capped)
        reason = "" if worst <= AGREES else f"is {worst:.1e} off in a trial"
    except Exception as error:  # whatever a compiler may raise
        said = (str(error).splitlines() or [""])[0][:200]
        reason = f"cannot be used here ({type(error).__name__}: {said})"
    if reason:
        warnings.warn(
            f"the fused attention statistics for heads of width {width} in {kind} {reason}; slower "
            "torch tiles are used instead, with the same results.", RuntimeWarning, stacklevel=2)
    return not reason


def _trial(device: torch.device, width: int, kind: torch.dtype, capped: bool) -> float:
    """The largest difference between kernels and tiles on a small random case."""
    from interp.stream.sweep import Block, Part, Sweep

    generator = torch.Generator().manual_seed(0)
    query, key = (torch.randn(1, heads, 150, width, generator=generator).to(device, kind)
                  for heads in (4, 2))
    softcap, scaling = (20.0 if capped else None), 2 / math.sqrt(width)
    plan = Plan(query, key, None, None, None, 0, (150, 150), 1 << 28)
    found = _found(_Work(plan, (1 << 30, 0), scaling, softcap), None)
    sweep = Sweep(plan, causal(), scaling, softcap, None)
    p = torch.cat([tile.probabilities.clone() for tile in Part(
        Block(sweep, 0, slice(0, 150)), slice(None), slice(None), slice(None), None, False,
    ).tiles(None)], -1)
    t = torch.arange(150, device=device)
    far = (t[:, None] - t).abs()
    pairs = ((found.mass, p.sum(-1)), (found.entropy, torch.special.entr(p).sum(-1)),
             (found.distance, (p * far).sum(-1)), (found.top_probability, p.amax(-1)),
             (found.received(True, False)[0], p.sum(-2)))
    worst = max(float((one - two).abs().max() / two.abs().max()) for one, two in pairs)
    best = p.gather(-1, found.top_key.long()[..., None])[..., 0]
    return max(worst, float((p.amax(-1) - best).abs().max()))
