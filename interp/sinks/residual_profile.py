"""What every position holds and receives in every layer: the numbers that sinks are found by.

Question  How large is each state, how much does it point like the primary sink's, how much
          attention does it receive, how large are its key and value?
Measure   streamed statistics; keys and values a few layers at a time, so that a prompt of many
          thousand tokens fits
Cause     none here
"""

from collections.abc import Iterator, Sequence
from typing import Optional, SupportsIndex

import numpy as np

from interp.core import Prompt
from interp.core.errors import NumericalError, OutOfRange
from interp.models.model import Model
from interp.stream.reducers import Received
from interp.stream.residual import Cosine, Norm

NAMES = ("norm", "cosine", "received", "key_norm", "value_norm")
"""What `profile` returns for every layer and position, beside "to_stranger"."""

ROOM = 2**30
"""Bytes of reads and statistics that are held at a time."""

TOKENS = 4096
"""About how many tokens share a pass."""


def groups(
    model: Model, prompts: Sequence[Prompt], columns: SupportsIndex = 1
) -> Iterator[list[int]]:
    """Numbers of the prompts that are run together: as many as `ROOM` allows, at least one.

    `columns`: streamed numbers per layer, head and position.

    Example:
        >>> import interp
        >>> model = interp.open_model("backcopy-1l")
        >>> list(groups(model, [Prompt.from_tokens([5, 9])] * 3))
        [[0, 1, 2]]
    """
    # Each is held as two numbers of 8 bytes until the end.
    most = max(1, ROOM // (16 * int(columns) * model.n_layers * (model.n_heads + 4)))
    group: list[int] = []
    for number, prompt in enumerate(prompts):
        if group and sum(len(prompts[i]) for i in group) + len(prompt) > most:
            yield group
            group = []
        group.append(number)
    if group:
        yield group


def batch_size(prompts: Sequence[Prompt]) -> int:
    """How many prompts of this length share a pass.

    Example:
        >>> batch_size([Prompt.from_tokens(range(1024))])
        4
    """
    return max(1, TOKENS // max(map(len, prompts)))


def candidates(prompt: Prompt, primary: Optional[Sequence[int]] = None) -> tuple[int, ...]:
    """Positions that may be the primary sink: (0, 1), and (0, 1, 2) with a chat template.

    Example:
        >>> candidates(Prompt.from_tokens([5, 6, 7]))
        (0, 1)

    Raises `OutOfRange` for a position that the prompt does not have.

    Source: arXiv:2512.22213, released code.
    """
    # The assistant's header is in a prompt only where a chat template put it.
    default = (0, 1, 2) if prompt.of_kind("role") else (0, 1)
    chosen = default if primary is None else tuple(int(p) for p in primary)
    for position in chosen:
        if not 0 <= position < len(prompt):
            raise OutOfRange(f"primary candidate {position} is outside a prompt of {len(prompt)} "
                             "tokens.")
    if not chosen:
        raise ValueError("no candidate for the primary sink: give at least one position.")
    return chosen


def profile(
    model: Model, prompts: Sequence[Prompt], primary: Optional[Sequence[int]] = None,
    stranger: int = 0,
) -> tuple[list[int], list[dict[str, np.ndarray]]]:
    """The primary position of each prompt, and `[layer, position]` arrays by name for each.

    Example:
        >>> import interp
        >>> model = interp.open_model("backcopy-1l")
        >>> anchors, found = profile(model, [Prompt.from_tokens([5, 9, 8, 7])])
        >>> found[0]["received"].shape
        (1, 4)

    "norm" of the residual leaving a block; "cosine" of it to the primary's and "to_stranger" to
    that at position `stranger`; "received": mean attention from later queries, heads averaged (NaN
    in blocks without attention and for the last position); "key_norm" and "value_norm", key-value
    heads averaged (NaN where they cannot be read).

    Raises:
        NumericalError: a residual that is NaN or infinite.
    """
    size, every = batch_size(prompts), np.arange(model.n_layers)
    readable = set(model.sites("read"))
    sites = [name for name in ("k", "v") if name in readable]
    tokens = sum(map(len, prompts))
    step = max(1, ROOM // (tokens * 8 * model.n_kv_heads * model.d_head))
    made: list[dict[str, np.ndarray]] = [
        {name: np.full((model.n_layers, len(prompt)), np.nan, dtype=np.float32)
         for name in (*NAMES, "to_stranger")}
        for prompt in prompts
    ]
    for first in range(0, model.n_layers, step):
        chosen = ",".join(map(str, range(first, min(first + step, model.n_layers))))
        asked = [f"{site}.{chosen}" for site in sites]
        stats = [] if first else [Norm(), Received("later"), Cosine(stranger)]
        if first and not asked:
            break
        run = model.run(prompts, read=asked, stats=stats, logits="none", batch_size=size)
        for name, array in run.stats.items():
            name = {"cosine": "to_stranger"}.get(name, name)
            array = array.mean("head") if "head" in array.dims else array
            values = array.reindex(layer=every).values
            for row, one in enumerate(made):
                one[name][:] = values[row, :, : one[name].shape[1]]
        for site, asked_site in zip(sites, asked):
            read = run.reads[asked_site]
            norm = np.sqrt((read.values**2).sum(-1)).mean(-1)
            name = {"k": "key_norm", "v": "value_norm"}[site]
            for row, one in enumerate(made):
                one[name][read.layer.values] = norm[row, :, : one[name].shape[1]]
    anchors = []
    for number, (prompt, one) in enumerate(zip(prompts, made)):
        bad = ~np.isfinite(one["norm"])
        if bad.any():
            raise NumericalError(
                f"the residual of prompt {number} is NaN or infinite in layer "
                f"{int(bad.any(1).argmax())}; open the model in bfloat16 or float32."
            )
        mean = one["norm"].mean(0)
        anchors.append(max(candidates(prompt, primary), key=lambda p: float(mean[p])))
    for anchor in sorted(set(anchors)):
        rows = [row for row, own in enumerate(anchors) if own == anchor]
        run = model.run([prompts[row] for row in rows], stats=Cosine(anchor), logits="none",
                        batch_size=size)
        for row, cosine in zip(rows, run.stats["cosine"].values):
            made[row]["cosine"][:] = cosine[:, : len(prompts[row])]
    return anchors, made
