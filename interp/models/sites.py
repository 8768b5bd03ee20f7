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


def first_tensor(value: Any) -> Optional[Tensor]:
    """The hidden state in what a module takes or returns: the first tensor of a tuple."""
    if isinstance(value, Tensor):
        return value
    if isinstance(value, (tuple, list)) and value and isinstance(value[0], Tensor):
        return value[0]
    return None


def hidden_input(args: tuple, kwargs: dict) -> Optional[Tensor]:
    """The hidden state among a module's arguments."""
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
        _solve(block, seen.get(block.index, []))


def _solve(block: Block, seen: list) -> None:
    """Find which recorded values satisfy the equations of a block."""
    whole = next((entry for entry in seen if entry[0] is block.module), None)
    if whole is None or whole[1] is None or whole[2] is None:
        return
    before, after = _flat(whole[1]), _flat(whole[2])
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
        if _close(middle, before):
            continue
        source = next((m for m, out in outputs if _close(before + out, middle)), None)
        if source is None:
            continue
        if "norm" in type(middle_module).__name__.lower():
            # Post-norm blocks (BERT): the norm's output is the stream between the halves.
            for second, given, result in inputs:
                if not _fits(result, before) or not _close(result, after):
                    continue
                if second is middle_module or not _fits(made, before):
                    continue
                added = next((m for m, out in outputs if _close(made + out, given)), None)
                if added is not None and "norm" in type(second).__name__.lower():
                    block.kind = "post_norm"
                    block.attn_out, block.mlp_out = (source, "output"), (added, "output")
                    block.resid_mid = (middle_module, "output")
                    reader = next(
                        (m for m, x, _ in inputs if _close(x, made) and m is not middle_module),
                        None,
                    )
                    block.mlp_in = (reader, "input") if reader is not None else None
                    return
        added = next(
            (m for m, out in reversed(outputs) if _close(middle + out, after)), None
        )
        if added is None:
            continue
        candidates = [m for m, out in outputs if _close(middle + out, after)]
        block.kind = "sequential"
        block.attn_out = (source, "output")
        block.resid_mid = (middle_module, "input")
        block.mlp_out = (_outermost(candidates), "output")
        if "norm" in type(middle_module).__name__.lower() and _fits(made, before):
            block.mlp_in = (middle_module, "output")
        else:
            block.mlp_in = (middle_module, "input")
        return

    for first, out in outputs:
        rest = [m for m, other in outputs if m is not first and _close(before + out + other, after)]
        if rest and not _close(before + out, after):
            second = _outermost(rest)
            attends = first if _holds(first, block.attention) else second
            other = second if attends is first else first
            if not _holds(attends, block.attention):
                continue
            block.kind = "parallel"
            block.attn_out, block.mlp_out = (attends, "output"), (other, "output")
            block.mlp_in = (other, "input")
            return


def _outermost(modules: list[nn.Module]) -> nn.Module:
    """The module that has parameters and contains the others (a dropout after it does not)."""
    owning = [m for m in modules if next(m.parameters(), None) is not None] or modules
    return max(owning, key=lambda m: sum(1 for _ in m.modules()))


def _holds(outer: nn.Module, inner: nn.Module) -> bool:
    return any(module is inner for module in outer.modules())


def _flat(x: Optional[Tensor]) -> Optional[Tensor]:
    """As `[positions, width]` in float32, whatever batch axes a block uses inside."""
    return None if x is None or x.ndim < 2 else x.reshape(-1, x.shape[-1]).float()


def _fits(x: Optional[Tensor], like: Tensor) -> bool:
    return x is not None and x.shape == like.shape


def _close(a: Tensor, b: Tensor) -> bool:
    # Loose enough for bfloat16 sums, far tighter than any accidental agreement.
    scale = float(b.abs().max())
    return a.shape == b.shape and bool((a - b).abs().max() <= 1e-2 * max(scale, 1e-6) * 0.2)
