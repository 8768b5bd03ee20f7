"""Calling a block by itself: its arguments for chosen rows, and the model around it without it."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from jaxtyping import Float, Int
from torch import Tensor, nn

from interp.core.errors import ModelRefused
from interp.models.sites import Block, hidden_input

AXES = {"position_embeddings": -2, "position_ids": -1, "cache_position": -1}
"""The axis of positions in what blocks are given, where it is known."""


def block_arguments(
    args: tuple,
    kwargs: dict[str, Any],
    x: Float[Tensor, "batch row d_model"],
    rows: Int[Tensor, "batch row"],
    length: int,
) -> tuple[tuple, dict[str, Any]]:
    """What a block was given in the plain run, for these rows, with `x` as its input."""
    named = dict(kwargs)
    first = list(args)
    if "hidden_states" not in named:
        first[0] = x
    made = {name: _rows_of(name, value, rows, length) for name, value in named.items()
            if name != "hidden_states"}
    if "hidden_states" in named:
        made["hidden_states"] = x
    made.update({name: False for name in ("use_cache",) if name in made})
    made.update({name: None for name in ("past_key_values", "past_key_value", "layer_past")
                 if name in made})
    rest = [_rows_of(f"argument {i}", value, rows, length) for i, value in enumerate(first) if i]
    head = [] if not first else [first[0]]
    return tuple(head + rest), made


def _rows_of(name: str, value: Any, rows: Tensor, length: int) -> Any:
    """The part of an argument that belongs to these rows."""
    if isinstance(value, tuple) and value and all(isinstance(v, Tensor) for v in value):
        return tuple(_rows_of(name, v, rows, length) for v in value)
    if not isinstance(value, Tensor) or "mask" in name:
        return value
    axis = AXES.get(name)
    if axis is None:
        found = [i for i, size in enumerate(value.shape) if size == length]
        if not found:
            return value
        if len(found) > 1:
            raise ModelRefused(
                f"it is not clear which axis of {name!r} {tuple(value.shape)} counts positions, so "
                "the model cannot be resumed in the middle; change the prompt's length by one."
            )
        axis = found[0] - value.ndim
    if value.ndim == 1:
        return value[rows[0].to(value.device)]
    # A negative axis counts from the end, where the positions' own features are.
    position = value.ndim + axis
    if value.shape[position] != length:
        return value
    if value.shape[position - 1] != 1:
        raise ModelRefused(f"{name!r} has no batch axis before its positions: {tuple(value.shape)}.")
    # Variants and their rows take the place of the batch axis and the positions.
    flat = value.select(position - 1, 0).index_select(position - 1, rows.flatten().to(value.device))
    return flat.unflatten(position - 1, rows.shape)


@contextmanager
def replaced_forward(modules: dict[nn.Module, Callable]) -> Iterator[None]:
    """Other functions in place of the forward passes of modules, put back whatever happens."""
    before = {module: vars(module).get("forward") for module in modules}
    try:
        for module, function in modules.items():
            module.forward = function  # type: ignore[method-assign]
        yield
    finally:
        for module, old in before.items():
            # Models spread over devices have a forward of their own on the instance.
            if old is not None:
                module.forward = old
            elif "forward" in vars(module):
                del module.forward


@contextmanager
def passing(blocks: list[Block], tuples: list[bool], x: Tensor) -> Iterator[None]:
    """Every block hands its input on, and the last one gives `x`."""
    def through(last: bool, as_tuple: bool) -> Callable:
        def forward(*args: Any, **kwargs: Any) -> Any:
            out = x if last else hidden_input(args, kwargs)
            return (out,) if as_tuple else out
        return forward

    with replaced_forward({block.module: through(block is blocks[-1], as_tuple)
                           for block, as_tuple in zip(blocks, tuples)}):
        yield
