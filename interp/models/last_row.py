"""Run the last position of a prompt again, alone, in many variants at once.

Nobody reads the last position: where every edit concerns it as a query, no other position changes in
any block (flow.md, E6). So one token goes through the blocks, on the keys and values of the plain
run, and the variants are its batch: a whole sweep over windows of blocks costs a few percent of one
pass. A variant joins at the first block that it changes; blocks before it are not executed for it.
"""

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from typing import Any, Optional, SupportsIndex

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from interp.core.errors import OutOfRange, PromptError
from interp.models import attention as attend
from interp.models.block_calls import block_arguments
from interp.models.lane_hf import no_earlier_picture
from interp.models.resume import Resumable
from interp.models.sites import first_tensor

Cut = Callable[[int, list[int]], Optional[Bool[Tensor, "variant #head key"]]]
"""Layer, the variants that are in it -> True where an edge is cut; None where none is."""

Change = Callable[
    [int, list[int], Float[Tensor, "variant head key"], Bool[Tensor, "variant #head key"]],
    Float[Tensor, "variant head key"]]
"""Layer, variants, their attention weights and which keys they see -> the weights to use."""

Outputs = Callable[[int, list[int], Float[Tensor, "variant head d_head"]],
                   Float[Tensor, "variant head d_head"]]
"""Layer, variants, the outputs of their heads -> the outputs to use."""

ROOM = 1 << 25
"""Largest number of attention weights, over variants, heads and keys, held at once."""


def replay_last(
    base: Resumable,
    starts: Sequence[SupportsIndex],
    *,
    blocked: Optional[Cut] = None,
    zeroed: Optional[Cut] = None,
    weights: Optional[Change] = None,
    scores: Optional[Change] = None,
    outputs: Optional[Outputs] = None,
) -> Float[Tensor, "variant d_vocab"]:
    """The last row of logits in variants of what the last position reads.

    Example:
        >>> import interp
        >>> base = interp.open_model("backcopy-3l").resumable(interp.Prompt.from_tokens(range(3, 12)))
        >>> cut = torch.zeros(2, 1, 9, dtype=torch.bool)
        >>> cut[0, 0, 1] = cut[1, 0, 2] = True
        >>> replay_last(base, [1, 2], blocked=lambda layer, variants: cut[variants]).shape[0]
        2

    Args:
        base: the prompt, run once. starts: for every variant the first block that it changes.
        blocked: edges cut before the softmax, by key of the whole prompt.
        zeroed: edges whose weight becomes zero after it, the rest of the row as it is.
        weights, scores: change whole rows after or before the softmax.
        outputs: change the outputs of heads.

    Raises:
        PromptError: a model in which other positions read the last one.
        OutOfRange: a block that does not exist, a row left without any key.
    """
    begins = [int(start) for start in starts]
    for start in begins:
        if not 0 <= start < base.n_layers:
            raise OutOfRange(f"layer {start} does not exist: there are 0 to {base.n_layers - 1}.")
    last = base.length - 1
    if base.earliest(last) != last:
        raise PromptError(
            "other positions read the last one in this prompt, so it cannot be run alone; run whole "
            "passes (Model.run) instead."
        )
    found: list[Any] = [None] * len(begins)
    order = sorted(range(len(begins)), key=begins.__getitem__)
    size = max(1, ROOM // (base.lane.shape.n_heads * base.length))
    for at in range(0, len(order), size):
        part = order[at : at + size]
        running = _Alone(base, blocked, zeroed, weights, scores, outputs)
        for number, row in zip(part, _replay(base, running, part, begins)):
            found[number] = row
    return torch.stack(found) if found else base.logits.new_zeros((0, base.logits.shape[-1]))


def _replay(
    base: Resumable, running: "_Alone", order: Sequence[int], begins: Sequence[int]
) -> Tensor:
    """One batch of variants, sorted by where they begin."""
    last = base.length - 1
    with ExitStack() as stack, torch.no_grad():
        stack.enter_context(attend.implementation(base.lane.configs))
        stack.enter_context(attend.session(base.lane.attentions, running))
        stack.enter_context(no_earlier_picture(base.hf))
        x = base.hidden[0].new_zeros((0, 1, base.hidden[0].shape[-1]))
        for layer in range(begins[order[0]], base.n_layers):
            joined = [n for n in order[len(x) :] if begins[n] == layer]
            new = base.hidden[layer][last:].expand(len(joined), 1, -1)
            x = torch.cat([x, new]) if joined else x
            running.variants = list(order[: len(x)])
            rows = torch.full((len(x), 1), last, device=x.device)
            args, kwargs = base._given[layer]
            args, kwargs = block_arguments(args, kwargs, x, rows, base.length)
            x = first_tensor(base.blocks[layer].module(*args, **kwargs)).reshape(x.shape)
            base.spent += len(x)
        return base._tail(x)[:, -1]


class _Alone:
    """Attention of the last position of many variants: lent keys are shared, its own is its own."""

    def __init__(
        self, base: Resumable, blocked: Optional[Cut], zeroed: Optional[Cut],
        weights: Optional[Change], scores: Optional[Change], outputs: Optional[Outputs],
    ) -> None:
        self.base, self.variants = base, []
        self.blocked, self.zeroed, self.weights = blocked, zeroed, weights
        self.scores, self.outputs = scores, outputs

    def attend(
        self, layer: int, q: Tensor, k: Tensor, v: Tensor, mask: Any, given: dict[str, Any]
    ) -> Float[Tensor, "variant 1 head d_head"]:
        base, last = self.base, self.base.length - 1
        batch, heads, kv_heads = len(q), q.shape[1], k.shape[1]
        seen = base.visible(layer)[last].expand(batch, 1, -1)
        cut = None if self.blocked is None else self.blocked(layer, self.variants)
        if cut is not None:
            seen = seen & ~cut.to(seen.device)
            if not bool(seen.any(-1).all()):
                raise OutOfRange(
                    f"blocking leaves the last position without any key in layer {layer}; exclude "
                    "its attention to itself."
                )
        # [kv_head, variant and head of its group, d_head]: one product with the keys of the prompt.
        one = q.reshape(batch, kv_heads, -1, q.shape[-1])
        grouped = one.transpose(0, 1).reshape(kv_heads, -1, q.shape[-1]).float()
        past = grouped @ base.keys[layer][:, :last].float().transpose(1, 2)
        own = (one.float() * k.float()).sum(-1)
        logits = torch.cat([
            past.reshape(kv_heads, batch, -1, last).transpose(0, 1).reshape(batch, heads, last),
            own.reshape(batch, heads, 1)], -1) * given["scaling"]
        if given["softcap"] is not None:
            logits = torch.tanh(logits / given["softcap"]) * given["softcap"]
        logits = logits.masked_fill(~seen, float("-inf"))
        if self.scores is not None:
            logits = self.scores(layer, self.variants, logits, seen)
        if given["sinks"] is not None:
            extra = given["sinks"].float().reshape(1, -1, 1).expand(batch, -1, 1)
            p = torch.cat([logits, extra], -1).softmax(-1)[..., :-1]
        else:
            p = logits.softmax(-1)
        gone = None if self.zeroed is None else self.zeroed(layer, self.variants)
        if gone is not None:
            p = p.masked_fill(gone.to(p.device), 0.0)
        if self.weights is not None:
            p = self.weights(layer, self.variants, p, seen)
        p = p.to(v.dtype)
        spread = p.reshape(batch, kv_heads, -1, last + 1)
        z = spread[..., :last].transpose(0, 1).reshape(kv_heads, -1, last) @ base.values[layer][:, :last]
        z = z.reshape(kv_heads, batch, -1, v.shape[-1]).transpose(0, 1) + spread[..., last:] * v
        z = z.reshape(batch, heads, v.shape[-1])
        if self.outputs is not None:
            z = self.outputs(layer, self.variants, z)
        return z[:, None].contiguous()
