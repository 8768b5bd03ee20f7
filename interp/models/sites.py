"""Where the sites of an unknown transformer are: found by watching one short forward pass.

No table of module names: the attention modules are those that call the attention function, their
blocks the entries of the module list they sit in, and each further site the module whose value
satisfies the equation that defines it (residual in + what attention adds = residual between).
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Optional

import torch
from torch import Tensor, nn

from interp.core.errors import ModelRefused

Port = tuple[nn.Module, str]
"""A module and which side of it: "input" or "output"."""


@dataclass
class Block:
    """One transformer block and where its sites are; None where the architecture has no such."""

    index: int
    module: nn.Module
    attention: nn.Module
    kind: str = "unknown"
    attn_out: Optional[Port] = None
    resid_mid: Optional[Port] = None
    mlp_in: Optional[Port] = None
    mlp_out: Optional[Port] = None
    ports: dict[str, Port] = field(default_factory=dict)

    def port(self, name: str) -> Optional[Port]:
        """The port of a residual site in this block."""
        if name in ("resid_pre", "embed"):
            return (self.module, "input")
        if name == "resid_post":
            return (self.module, "output")
        return getattr(self, name)


def first_tensor(value: Any) -> Any:
    """The hidden state in what a module takes or returns: the first tensor of a tuple, else None."""
    if isinstance(value, Tensor):
        return value
    if isinstance(value, (tuple, list)) and value and isinstance(value[0], Tensor):
        return value[0]
    return None


def hidden_input(args: tuple, kwargs: dict) -> Any:
    """The hidden state among a module's arguments, None where there is none."""
    found = first_tensor(args)
    if found is None:
        for name in ("hidden_states", "x", "hidden_state", "input"):
            if isinstance(kwargs.get(name), Tensor):
                return kwargs[name]
    return found


def find_blocks(root: nn.Module, attentions: list[nn.Module]) -> list[Block]:
    """The blocks of `root` that hold these attention modules, in the order they are called."""
    parents: dict[int, nn.Module] = {}
    for module in root.modules():
        if isinstance(module, nn.ModuleList):
            for entry in module:
                for inner in entry.modules():
                    # Inner lists come later in the walk, and the innermost list wins.
                    parents[id(inner)] = entry
    blocks: list[Block] = []
    for attention in attentions:
        entry = parents.get(id(attention))
        if entry is None or any(block.module is entry for block in blocks):
            raise ModelRefused(
                f"cannot tell the blocks of {type(root).__name__} apart: "
                f"{type(attention).__name__} is not in a list of blocks of its own."
            )
        blocks.append(Block(len(blocks), entry, attention))
    return blocks


def locate(blocks: list[Block], forward: Callable[[], Any]) -> None:
    """Fill in the ports of every block from one forward pass (a short one: all is recorded)."""
    seen: dict[int, list[tuple[nn.Module, Optional[Tensor], Optional[Tensor]]]] = {}
    handles = []

    def watch(block: Block, module: nn.Module) -> Any:
        def hook(_: nn.Module, args: tuple, kwargs: dict, output: Any) -> None:
            entry = (module, hidden_input(args, kwargs), first_tensor(output))
            copied = tuple(x.detach().clone() if isinstance(x, Tensor) else x for x in entry)
            seen.setdefault(block.index, []).append(copied)  # type: ignore[arg-type]

        return module.register_forward_hook(hook, with_kwargs=True)

    try:
        for block in blocks:
            for module in block.module.modules():
                handles.append(watch(block, module))
        with torch.no_grad():
            forward()
    finally:
        for handle in handles:
            handle.remove()
    for block in blocks:
        solve(block, seen.get(block.index, []))


def solve(block: Block, seen: list) -> None:
    """Find which recorded values satisfy the equations of a block."""
    whole = next((entry for entry in seen if entry[0] is block.module), None)
    if whole is None or whole[1] is None or whole[2] is None:
        return
    before, after = _flat(whole[1]), _flat(whole[2])
    if before is None or after is None:
        return
    inner = [
        (module, _flat(given), _flat(made))
        for module, given, made in seen
        if module is not block.module
    ]
    outputs = [(m, made) for m, _, made in inner if _fits(made, before)]
    # The attention module itself first, then whatever follows it in the same block.
    outputs.sort(key=lambda pair: pair[0] is not block.attention)
    inputs = [(m, given, made) for m, given, made in inner if _fits(given, before)]

    for middle_module, middle, made in inputs:
        if torch.equal(middle, before):
            continue
        source = _best(outputs, lambda out, middle=middle: _error(middle, before, out))
        if source is None:
            continue
        norm = "norm" in type(middle_module).__name__.lower() and _fits(made, before)
        if norm and _solve_post_norm(block, inputs, outputs, middle_module, made, after, source):
            return
        added = [
            (m, out) for m, out in outputs
            if m is not source and _error(after, middle, out) <= 1.0
        ]
        if not added:
            continue
        block.kind = "sequential"
        block.attn_out = (source, "output")
        block.resid_mid = (middle_module, "input")
        block.mlp_out = (_outermost([m for m, _ in added]), "output")
        block.mlp_in = (middle_module, "output" if norm else "input")
        return

    for first, out in outputs:
        rest = [
            m for m, other in outputs
            if m is not first and _error(after, before, out, other) <= 1.0
        ]
        if rest and _error(after, before, out) > 1.0:
            second = _outermost(rest)
            attends = first if _holds(first, block.attention) else second
            other = second if attends is first else first
            if not _holds(attends, block.attention):
                continue
            block.kind = "parallel"
            block.attn_out, block.mlp_out = (attends, "output"), (other, "output")
            block.mlp_in = (other, "input")
            return


def _solve_post_norm(
    block: Block, inputs: list, outputs: list, first: nn.Module, middle: Tensor, after: Tensor,
    source: nn.Module,
) -> bool:
    """Blocks that normalize the sum (BERT): the first norm's output is the stream in between."""
    for second, given, result in inputs:
        if second is first or "norm" not in type(second).__name__.lower():
            continue
        if not _fits(result, after) or not torch.equal(result, after):
            continue
        added = _best(outputs, lambda out, given=given: _error(given, middle, out))
        if added is None:
            continue
        reader = next((m for m, x, _ in inputs if torch.equal(x, middle) and m is not first), None)
        block.kind = "post_norm"
        block.attn_out, block.mlp_out = (source, "output"), (added, "output")
        block.resid_mid = (first, "output")
        block.mlp_in = (reader, "input") if reader is not None else None
        return True
    return False


def _best(outputs: list, error: Callable[[Tensor], float]) -> Optional[nn.Module]:
    """The module whose output fits an equation best; the earlier one among equals."""
    fits = [(error(out), order, m) for order, (m, out) in enumerate(outputs)]
    fits = [fit for fit in fits if fit[0] <= 1.0]
    return min(fits, key=lambda fit: fit[:2])[2] if fits else None


def _outermost(modules: list[nn.Module]) -> nn.Module:
    """The module that has parameters and contains the others (a dropout after it does not)."""
    owning = [m for m in modules if next(m.parameters(), None) is not None] or modules
    return max(owning, key=lambda m: sum(1 for _ in m.modules()))


def _holds(outer: nn.Module, inner: nn.Module) -> bool:
    return any(module is inner for module in outer.modules())


def _flat(x: Optional[Tensor]) -> Any:
    """As `[positions, width]`, whatever batch axes a block uses inside."""
    return None if x is None or x.ndim < 2 else x.reshape(-1, x.shape[-1])


def _fits(x: Optional[Tensor], like: Tensor) -> bool:
    return x is not None and x.shape == like.shape


def _error(total: Tensor, *parts: Tensor) -> float:
    """How far `total` is from the sum of `parts`, in units of what rounding can explain.

    Element by element: with massive coordinates in the stream, a tolerance relative to the largest
    value would let any small output pass for the right one.
    """
    if any(part.shape != total.shape for part in parts):
        return float("inf")
    rounding: Any = torch.finfo(total.dtype).eps * sum(part.double().abs() for part in parts)
    gap = (sum(part.double() for part in parts) - total.double()).abs()
    return float((gap / rounding.clamp_min(1e-30)).max())
