"""Resume a forward pass in the middle: some positions, from some block on, many variants at once.

One plain run of a prompt keeps what enters every block and the keys and values of every position.
From these, positions whose past changed are run again through the remaining blocks, and nothing
else is: blocks before the change are not executed, positions before it lend their keys and values,
and variants of equal size share a pass. TransformerLens' `start_at_layer` executes every block.

The identities behind it (each is a test):
    resume      all positions from block l on give the model's logits
    drop=mask   positions left out, the others keeping their position ids, equal masked keys
    prefix      positions before the first change keep their keys and values
    last row    where only the last position's attention is edited, only that row is run again
"""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, Optional

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from interp.core.errors import ModelRefused, OutOfRange, SiteRefused
from interp.core.prompt import Prompt
from interp.core.site import RESIDUAL
from interp.models import attention as attend
from interp.models.block_calls import block_arguments, passing
from interp.models.lane_hf import no_earlier_picture
from interp.models.row_attention import attended, whole_rows
from interp.models.sites import first_tensor, hidden_input

Blocked = Callable[[int], Optional[Bool[Tensor, "batch #head query key"]]]
"""Layer -> edges to cut, True where cut; None where none are."""

Watch = Callable[[int, Float[Tensor, "batch head query key"]], None]
"""Called with a layer and the weights of its attention."""


class Resumable:
    """A prompt that was run once and can be resumed at any block; made by `Model.resumable`.

    Attributes:
        logits: `[position, vocab]` of the plain run. length: its number of positions.
        spent: token-layers executed since (one token through one block), to report costs in units
            of `prefill`, the token-layers of the plain run.
        hidden: what enters every block `[position, d_model]`; keys, values `[kv_head, position,
            d_head]`. With `keep_z` also z `[position, head, d_head]` of every block, and the last
            row of logits alone.
    """

    def __init__(
        self, hf: nn.Module, lane: Any, prompt: Prompt, tolerance: float, keep_z: bool = False
    ) -> None:
        self.hf, self.lane, self.blocks = hf, lane, lane.blocks
        self.length, self.n_layers = len(prompt), len(lane.blocks)
        self.prefill, self.spent = self.length * self.n_layers, 0
        self.hidden: list[Tensor] = []
        self.keys: list[Tensor] = []
        self.values: list[Tensor] = []
        self.z: list[Tensor] = []
        self.keep_z = keep_z
        self._given: list[tuple[tuple, dict[str, Any]]] = []
        self._masks: list[Any] = []
        self._dense: dict[Any, Tensor] = {}
        self._tuples: list[bool] = []
        self.logits = self._plain_run(prompt)
        self._prove(tolerance)

    # -- the plain run ---------------------------------------------------------------------------

    def _plain_run(self, prompt: Prompt) -> Tensor:
        ids = torch.tensor([prompt.ids], device=self.lane.device)
        outputs: list[Tensor] = []

        def before(module: nn.Module, args: tuple, kwargs: dict) -> None:
            self.hidden.append(hidden_input(args, kwargs)[0].detach())
            self._given.append((args, kwargs))

        def after(module: nn.Module, args: tuple, output: Any) -> None:
            self._tuples.append(isinstance(output, tuple))
            outputs.append(first_tensor(output)[0].detach())

        handles = []
        for block in self.blocks:
            handles.append(block.module.register_forward_pre_hook(before, with_kwargs=True))
            handles.append(block.module.register_forward_hook(after))
        try:
            with ExitStack() as stack, torch.no_grad():
                stack.enter_context(attend.implementation(self.lane.configs))
                stack.enter_context(attend.session(self.lane.attentions, _Keeping(self)))
                stack.enter_context(no_earlier_picture(self.hf))
                inputs = self.lane._inputs([prompt])
                # Variants read the last row: the others are not unembedded.
                more = {"logits_to_keep": 1} if self.keep_z else {}
                out = self.lane._call(ids, inputs, {"use_cache": False, **more})
        finally:
            for handle in handles:
                handle.remove()
        if len(self.hidden) != self.n_layers or len(self.keys) != self.n_layers:
            raise ModelRefused(
                f"{type(self.hf).__name__} does not run its {self.n_layers} blocks once each, so it "
                "cannot be resumed in the middle; run whole passes instead."
            )
        for layer in range(1, self.n_layers):
            if not torch.equal(outputs[layer - 1], self.hidden[layer]):
                raise ModelRefused(
                    f"{type(self.hf).__name__} adds something between blocks {layer - 1} and {layer} "
                    "(as DeepStack does), so it cannot be resumed in the middle; run whole passes."
                )
        if getattr(out, "logits", None) is None:
            raise ModelRefused(
                f"{type(self.hf).__name__} has no vocabulary head: nothing to resume towards."
            )
        return out.logits[0].detach()

    def _prove(self, tolerance: float) -> None:
        """Resumed in the middle, the model must say what it said."""
        rows = torch.arange(self.length)
        # For variants the last row alone, on the keys of the others: one row is cheap to prove.
        first = self.length - 1 if self.keep_z else 0
        found = self.replay(self.n_layers // 2, rows[None, first:], context=rows[:first])
        size = float(self.logits[-1].float().abs().max()) + 1e-6
        if float((found[0] - self.logits[-1]).float().abs().max()) > tolerance * size:
            raise ModelRefused(
                f"{type(self.hf).__name__} gives other logits when it is resumed at block "
                f"{self.n_layers // 2}; run whole passes instead."
            )
        self.spent = 0

    def visible(self, layer: int) -> Bool[Tensor, "query key"]:
        """Which keys every position sees in a block, `[position, position]`."""
        mask = self._masks[layer]
        named = mask.named()
        key = (mask.plain, mask.window) if named is not None else id(mask)
        if key not in self._dense:
            every = torch.arange(self.length, device=self.lane.device)
            self._dense[key] = mask(0, every, every)[0]
        return self._dense[key]

    def earliest(self, first: int) -> int:
        """The first position that a change at `first` or later can reach.

        It is `first` itself where no position sees later ones; with pictures whose tokens see each
        other in both directions, it is the beginning of the picture.
        """
        if not 0 <= first < self.length:
            raise OutOfRange(f"positions run from 0 to {self.length - 1} in this prompt.")
        while True:
            reached = first
            for layer in range(self.n_layers):
                seeing = self.visible(layer)[:first, first:].any(1).nonzero()
                reached = min(reached, int(seeing[0])) if len(seeing) else reached
            if reached == first:
                return first
            first = reached

    # -- again, from the middle --------------------------------------------------------------------

    def replay(
        self,
        layer: int,
        rows: Int[Tensor, "batch row"],
        *,
        context: Optional[Int[Tensor, "context"]] = None,
        hidden: Optional[Float[Tensor, "batch row d_model"]] = None,
        blocked: Optional[Blocked] = None,
        zeroed: Optional[Blocked] = None,
        positions: Optional[Int[Tensor, "batch row"]] = None,
        logits: str = "last",
        until: Optional[int] = None,
        watch: Optional[Watch] = None,
        into: Optional[dict[str, list[Tensor]]] = None,
    ) -> Tensor:
        """Run `rows` again from block `layer` on; give the logits of the last of them.

        Args:
            layer: the first block that is executed, on what entered it (or `hidden`).
            rows: ascending positions of the prompt, one set per variant, equally many each. What is
                neither here nor in `context` does not exist for them.
            context: positions that lend the keys and values of the plain run.
            hidden: what enters the block instead.
            blocked: edges cut before the softmax, by layer: True where row r of a variant may not
                see a key; keys are `context`, then `rows`.
            zeroed: edges whose weight becomes zero after the softmax, in the same form: the rest of
                the row is not renormalized.
            positions: position ids to take instead of each row's own (compacted ones, say).
            logits: "last" row or "all" rows.
            until: stop before this block and give what enters it, `[batch, row, d_model]`, to go on
                from there with `hidden`.
            watch: called with a block's number and its attention weights `[batch, head, row, key]`
                (keys as in `blocked`).
            into: site -> a list, to which every executed block appends what these rows have there:
                residual sites `[batch, row, d_model]`, "k" and "v" `[batch, row, kv_head, d_head]`,
                "z" `[batch, row, head, d_head]`.

        Returns:
            `[batch, vocab]`, with all rows `[batch, row, vocab]`.

        Raises:
            OutOfRange: a layer or position that does not exist, or a row left without any key.
            SiteRefused: a site of `into` that this architecture does not have.
        """
        if not 0 <= layer < self.n_layers:
            raise OutOfRange(f"layer {layer} does not exist: there are 0 to {self.n_layers - 1}.")
        stop = self.n_layers if until is None else int(until)
        if not layer <= stop <= self.n_layers:
            raise OutOfRange(
                f"cannot stop before block {stop} after starting at block {layer}: the end is one of "
                f"{layer} to {self.n_layers}."
            )
        rows = rows.to(self.lane.device)
        context = rows.new_zeros(0) if context is None else context.to(rows)
        for some in (rows, context):
            if some.numel() and not 0 <= int(some.min()) <= int(some.max()) < self.length:
                raise OutOfRange(f"positions run from 0 to {self.length - 1} in this prompt.")
        x = self.hidden[layer][rows] if hidden is None else hidden.to(self.hidden[layer])
        of = rows if positions is None else positions.to(rows)
        running = _Replaying(self, rows, context, blocked, zeroed, watch, into or {})
        with ExitStack() as stack, torch.no_grad():
            stack.enter_context(attend.implementation(self.lane.configs))
            stack.enter_context(attend.session(self.lane.attentions, running))
            stack.enter_context(no_earlier_picture(self.hf))
            with _reading(self.lane, range(layer, stop), x.shape, into or {}):
                for number in range(layer, stop):
                    args, kwargs = self._given[number]
                    args, kwargs = block_arguments(args, kwargs, x, of, self.length)
                    x = first_tensor(self.blocks[number].module(*args, **kwargs)).reshape(x.shape)
            self.spent += rows.numel() * (stop - layer)
            if until is not None:
                return x
            found = self._tail(x if logits == "all" else x[:, -1:])
        return found if logits == "all" else found[:, -1]

    def _tail(self, x: Float[Tensor, "batch row d_model"]) -> Float[Tensor, "batch row vocab"]:
        """What follows the last block: final norm and vocabulary head, as the model has them."""
        ids = torch.zeros(x.shape[:2], dtype=torch.long, device=x.device)
        with passing(self.blocks, self._tuples, x):
            return self.lane._call(ids, {}, {"use_cache": False}).logits


class _Keeping:
    """Keeps keys, values and masks while the plain run goes by."""

    def __init__(self, base: Resumable) -> None:
        self.base = base

    def attend(
        self, layer: int, q: Tensor, k: Tensor, v: Tensor, mask: Any, given: dict[str, Any]
    ) -> Tensor:
        self.base.keys.append(k[0])
        self.base.values.append(v[0])
        self.base._masks.append(mask)
        z = attend.attention_output(q, k, v, mask, 0, given).transpose(1, 2).contiguous()
        if self.base.keep_z:
            self.base.z.append(z[0])
        return z


class _Replaying:
    """Attention of some rows of many variants, to lent keys and their own."""

    def __init__(
        self, base: Resumable, rows: Tensor, context: Tensor, blocked: Optional[Blocked],
        zeroed: Optional[Blocked], watch: Optional[Watch], into: dict[str, list[Tensor]],
    ) -> None:
        self.base, self.rows, self.context = base, rows, context
        self.blocked, self.zeroed, self.watch, self.into = blocked, zeroed, watch, into

    def attend(
        self, layer: int, q: Tensor, k: Tensor, v: Tensor, mask: Any, given: dict[str, Any]
    ) -> Tensor:
        for name, x in (("k", k), ("v", v)):
            self._keep(name, x.transpose(1, 2))
        z = self._attend(layer, q, k, v, given)
        self._keep("z", z)
        return z

    def _keep(self, name: str, x: Tensor) -> None:
        if name in self.into:
            self.into[name].append(x.detach())

    def _attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, given: dict[str, Any]) -> Tensor:
        base, rows, batch = self.base, self.rows, len(self.rows)
        where = torch.cat([self.context.expand(batch, -1), rows], 1)
        seen = base.visible(layer)[rows[:, :, None], where[:, None, :]][:, None]
        cut = None if self.blocked is None else self.blocked(layer)
        if cut is not None:
            seen = seen & ~cut.to(seen.device)
            if not bool(seen.any(-1).all()):
                raise OutOfRange(
                    f"blocking leaves a position without any key to attend to in layer {layer}; "
                    "exclude its attention to itself."
                )
        if len(self.context):
            lent = [x[layer][:, self.context].expand(batch, -1, -1, -1)
                    for x in (base.keys, base.values)]
            k, v = torch.cat([lent[0], k], 2), torch.cat([lent[1], v], 2)
        gone = None if self.zeroed is None else self.zeroed(layer)
        if gone is None and self.watch is None:
            return attended(q, k, v, seen, given).contiguous()
        k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], 1) for x in (k, v))
        p = whole_rows(q, k, seen, given)
        if gone is not None:
            p = p.masked_fill(gone.to(p.device), 0.0)
        if self.watch is not None:
            self.watch(layer, p)
        return (p.to(v.dtype) @ v).transpose(1, 2).contiguous()


@contextmanager
def _reading(
    lane: Any, layers: range, shape: torch.Size, into: dict[str, list[Tensor]]
) -> Iterator[None]:
    """Append what passes the residual sites of these blocks."""
    handles: list[Any] = []

    def keep(name: str, x: Any) -> None:
        into[name].append(x.detach().reshape(*shape[:2], -1))

    try:
        for name in into.keys() - {"k", "v", "z"}:
            for block in lane.blocks[layers.start : layers.stop]:
                port = None if name == "embed" or name not in RESIDUAL else block.port(name)
                if port is None:
                    raise SiteRefused(
                        f"cannot read {name!r} in layer {block.index} while resuming: "
                        f"{lane.unavailable(name) if name in RESIDUAL else 'no such site'}."
                    )
                module, side = port
                if side == "output":
                    handles.append(module.register_forward_hook(
                        lambda m, args, out, name=name: keep(name, first_tensor(out))))
                else:
                    handles.append(module.register_forward_pre_hook(
                        lambda m, args, kwargs, name=name: keep(name, hidden_input(args, kwargs)),
                        with_kwargs=True))
        yield
    finally:
        for handle in handles:
            handle.remove()
