"""Run rows of a prompt again as `Resumable.replay` does, for the last row of logits alone.

What only the last row needs is computed for the last row: in the last block every row gives its keys
and values, but only the last one attends and passes through the MLP (the largest part of a block),
and only it is unembedded. The first block's rows that are equal in all variants are not shared; the
work that remains is one pass over the rows per block in between.
"""

from contextlib import ExitStack
from typing import Any, Optional

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from interp.core.errors import OutOfRange
from interp.models import attention as attend
from interp.models.block_calls import block_arguments
from interp.models.lane_hf import no_earlier_picture
from interp.models.resume import Resumable
from interp.models.row_attention import attended
from interp.models.sites import first_tensor


def replay_suffix(
    base: Resumable,
    layer: int,
    rows: Int[Tensor, "batch row"],
    *,
    context: Optional[Int[Tensor, "context"]] = None,
    hidden: Optional[Float[Tensor, "batch row d_model"]] = None,
    cut: Optional[Bool[Tensor, "batch #head row key"]] = None,
    positions: Optional[Int[Tensor, "batch row"]] = None,
) -> Float[Tensor, "batch d_vocab"]:
    """The last row of logits when `rows` are run again from block `layer` on.

    Example:
        >>> import interp
        >>> base = interp.open_model("backcopy-3l").resumable(interp.Prompt.from_tokens(range(3, 12)))
        >>> rows = torch.tensor([[5, 7, 8], [6, 7, 8]])
        >>> replay_suffix(base, 1, rows, context=torch.arange(5)).shape[0]
        2

    The arguments are those of `Resumable.replay`; `cut` is its `blocked`, the same in all blocks.
    `base.spent` counts the last block as a whole, so it is an upper bound.

    Raises:
        OutOfRange: a layer that does not exist, a row left without any key.
    """
    if not 0 <= layer < base.n_layers:
        raise OutOfRange(f"layer {layer} does not exist: there are 0 to {base.n_layers - 1}.")
    rows = rows.to(base.lane.device)
    context = rows.new_zeros(0) if context is None else context.to(rows)
    x = base.hidden[layer][rows] if hidden is None else hidden.to(base.hidden[layer])
    of = rows if positions is None else positions.to(rows)
    running = _Rows(base, rows, context, cut)
    with ExitStack() as stack, torch.no_grad():
        stack.enter_context(attend.implementation(base.lane.configs))
        stack.enter_context(attend.session(base.lane.attentions, running))
        stack.enter_context(no_earlier_picture(base.hf))
        end = base.n_layers - 1
        for number in range(layer, end):
            x = _block(base, number, x, of)
        # The keys and values of all rows, and no more than these; then the last row with them.
        running.stage = "keys"
        try:
            _block(base, end, x, of)
        except _Enough:
            pass
        running.stage = "last"
        x = _block(base, end, x[:, -1:], of[:, -1:])
        base.spent += rows.numel() * (base.n_layers - layer)
        return base._tail(x)[:, -1]


def _block(base: Resumable, number: int, x: Tensor, of: Tensor) -> Tensor:
    args, kwargs = base._given[number]
    args, kwargs = block_arguments(args, kwargs, x, of, base.length)
    found = first_tensor(base.blocks[number].module(*args, **kwargs))
    assert found is not None
    return found.reshape(x.shape)


class _Enough(Exception):
    """The keys and values of a block are known: nothing after them is needed."""


class _Rows:
    """Attention of some rows of many variants, to lent keys and their own."""

    def __init__(
        self, base: Resumable, rows: Tensor, context: Tensor, cut: Optional[Tensor]
    ) -> None:
        self.base, self.rows, self.context, self.cut = base, rows, context, cut
        self.stage = "all"
        self.where = torch.cat([context.expand(len(rows), -1), rows], 1)
        self.held: tuple[Tensor, Tensor] = (rows, rows)
        self.seen: dict[Any, Tensor] = {}

    def attend(
        self, layer: int, q: Tensor, k: Tensor, v: Tensor, mask: Any, given: dict[str, Any]
    ) -> Float[Tensor, "batch row head d_head"]:
        if self.stage == "keys":
            self.held = (k, v)
            raise _Enough
        if self.stage == "last":
            k, v = self.held
        lent, batch = self.context, len(q)
        if len(lent):
            k, v = (torch.cat([x[layer][:, lent].expand(batch, -1, -1, -1), own], 2)
                    for x, own in ((self.base.keys, k), (self.base.values, v)))
        return attended(q, k, v, self._seen(layer), given).contiguous()

    def _seen(self, layer: int) -> Bool[Tensor, "batch #head row key"]:
        """What every row sees, made once for all blocks with the same mask."""
        visible = self.base.visible(layer)
        found = self.seen.get((id(visible), self.stage))
        if found is None:
            here = slice(-1, None) if self.stage == "last" else slice(None)
            found = visible[self.rows[:, here, None], self.where[:, None, :]][:, None]
            if self.cut is not None:
                found = found & ~self.cut[:, :, here].to(found.device)
            if not bool(found.any(-1).all()):
                raise OutOfRange(
                    f"a position is left without any key to attend to in layer {layer}; keep its "
                    "attention to itself."
                )
            self.seen[id(visible), self.stage] = found
        return found
