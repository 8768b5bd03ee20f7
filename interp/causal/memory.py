"""How much memory there is, what a pass over the blocks needs, and smaller passes where it lacks."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TypeVar

import torch

from interp.core.errors import NotEnoughMemory
from interp.models.model import Model

T = TypeVar("T")
MIB = float(1 << 20)
SHARE = 0.5
"""The part of the memory that is free which a sweep plans to use."""
ROWS = {"cpu": 1024, "cuda": 16384}
"""Rows that go through a block together when memory is no limit. On a CPU more gain nothing: the
states of a block no longer fit into its caches."""


def available(device: torch.device) -> float:
    """Bytes that are free on a device; on a CPU within the limit that the process was given."""
    if device.type == "cuda":
        return float(torch.cuda.mem_get_info(device)[0])
    found = [float("inf")]
    try:
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                found.append(float(line.split()[1]) * 1024)
        limit = Path("/sys/fs/cgroup/memory.max").read_text().strip()
        used = Path("/sys/fs/cgroup/memory.current").read_text().strip()
        cached = [line.split()[1] for line in Path("/sys/fs/cgroup/memory.stat").read_text()
                  .splitlines() if line.startswith("inactive_file ")]
        found.append(float(limit) - float(used) + float(cached[0]))
    except (OSError, ValueError, IndexError):
        pass  # another system, or no limit
    least = min(found)
    return least if least < float("inf") else 4096 * MIB


def per_row(model: Model) -> float:
    """Bytes that one row takes on its way through a block, about."""
    text = model.config.get_text_config()
    inner = int(getattr(text, "intermediate_size", None) or 4 * model.d_model)
    heads = 3 * (model.n_heads + 2 * model.n_kv_heads) * model.d_head
    size = torch.finfo(model.dtype).bits // 8
    # Norms are computed in single precision.
    return float(size * (6 * model.d_model + 3 * inner + heads) + 8 * model.d_model)


def per_prompt(model: Model, length: int) -> float:
    """Bytes that are kept of a prompt that was run once, about."""
    each = 2 * model.d_model + (2 * model.n_kv_heads + model.n_heads) * model.d_head
    size = torch.finfo(model.dtype).bits // 8
    return float(model.n_layers * length * each * size + 2 * length * length)


def per_cell(model: Model, length: int, first: int) -> float:
    """Bytes that a cell takes beside its rows: lent keys and values, and its row of logits."""
    size = torch.finfo(model.dtype).bits // 8
    lent = 2 * length * model.n_kv_heads * model.d_head * size if first else 0
    return float(lent + 8 * model.d_vocab)


def is_shortage(error: BaseException) -> bool:
    """Whether an error says that memory ran out, on any device.

    Example:
        >>> is_shortage(RuntimeError("DefaultCPUAllocator: not enough memory")), is_shortage(
        ...     RuntimeError("shapes do not match"))
        (True, False)
    """
    if isinstance(error, NotEnoughMemory):
        return False
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return True
    text = str(error).lower()
    return isinstance(error, RuntimeError) and any(
        said in text for said in ("not enough memory", "out of memory", "can't allocate memory"))


def halved(
    compute: Callable[[Sequence[int]], T], part: Sequence[int], what: str
) -> list[tuple[Sequence[int], T]]:
    """Compute a part; where memory runs out, its halves, and theirs.

    Raises:
        NotEnoughMemory: a part of one does not fit.
    """
    try:
        return [(part, compute(part))]
    except Exception as error:
        if not is_shortage(error):
            raise
        if len(part) <= 1:
            raise NotEnoughMemory(
                f"there is not enough memory for {what}: shorten the prompt, open the model with a "
                f"smaller dtype, or free memory ({str(error).splitlines()[0][:120]})."
            ) from None
    # Out of the handler, so that what the failed pass held is freed first.
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    middle = len(part) // 2
    return halved(compute, part[:middle], what) + halved(compute, part[middle:], what)
