"""Matched controls: random heads that share everything with the chosen ones but the finding."""

from collections.abc import Iterable
from typing import Any, Optional, SupportsIndex

import numpy as np
from jaxtyping import Bool

from interp.core.errors import OutOfRange
from interp.core.head import Head, HeadLike, check_heads
from interp.core.head import heads as as_heads


def random_heads(
    like: Iterable[HeadLike],
    n_layers: SupportsIndex,
    n_heads: SupportsIndex,
    *,
    seed: SupportsIndex,
    exclude: Iterable[HeadLike] = (),
    eligible: Optional[Bool[np.ndarray, "layer head"]] = None,
    layer_matched: bool = True,
) -> tuple[Head, ...]:
    """As many random heads as `like`, in the same layers, and none of `like` or of `exclude`.

    Example:
        >>> drawn = random_heads(["L0H1", "L1H0", "L1H2"], 2, 8, seed=0, exclude=["L1H1"])
        >>> [head.layer for head in drawn]
        [0, 1, 1]

    Args:
        exclude: heads that may carry the same finding, such as the top of a ranking (the released
            code of arXiv:2404.15574 meant to exclude the top 100, and did not).
        eligible: heads that could be drawn at all; all for None.
        layer_matched: whether every layer keeps its number of heads.

    Raises:
        OutOfRange: a head that the model does not have, or too few heads to draw from: the
            sentence names the layer.
    """
    chosen, out = as_heads(like), set(as_heads(exclude))
    n_layers, n_heads = int(n_layers), int(n_heads)
    check_heads(chosen, n_layers, n_heads)
    check_heads(out, n_layers, n_heads)
    out |= set(chosen)
    rng = np.random.default_rng([int(seed), len(chosen)])
    free = [Head(a, b) for a in range(n_layers) for b in range(n_heads)
            if Head(a, b) not in out and (eligible is None or eligible[a, b])]
    groups: dict[Any, int] = {}
    for head in chosen:
        key = head.layer if layer_matched else None
        groups[key] = groups.get(key, 0) + 1
    drawn: list[Head] = []
    for layer, count in groups.items():
        pool = free if layer is None else [head for head in free if head.layer == layer]
        if len(pool) < count:
            where = "the model" if layer is None else f"layer {layer}"
            raise OutOfRange(
                f"{count} control heads are needed in {where}, but only {len(pool)} of {n_heads} "
                "heads there are neither chosen nor excluded; choose or exclude fewer heads."
            )
        drawn += [pool[i] for i in rng.choice(len(pool), count, replace=False)]
    return as_heads(drawn)


def most_excludable(
    ranked: Iterable[HeadLike], chosen: Iterable[HeadLike], n_heads: SupportsIndex
) -> tuple[Head, ...]:
    """The longest beginning of a ranking that controls can avoid and still fill every layer.

    Example:
        >>> ranked = ["L0H0", "L0H1", "L0H2", "L1H0"]
        >>> most_excludable(ranked, ["L0H0"], 3)
        (L0H0, L0H1)

    In every layer as many heads must stay free as `chosen` has there.
    """
    need: dict[int, int] = {}
    for head in as_heads(chosen):
        need[head.layer] = need.get(head.layer, 0) + 1
    taken: dict[int, set[Head]] = {}
    for head in as_heads(chosen):
        taken.setdefault(head.layer, set()).add(head)
    kept: list[Head] = []
    for one in ranked:
        (head,) = as_heads([one])
        here = taken.setdefault(head.layer, set()) | {head}
        if int(n_heads) - len(here) < need.get(head.layer, 0):
            break
        taken[head.layer] = here
        kept.append(head)
    return as_heads(kept)
