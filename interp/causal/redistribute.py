"""Redistribution of attention: move the mass on sinks to other keys of the same row.

Paper     arXiv:2503.03321
Question  Is the attention on visual sinks spare, so that content tokens can have it?
Measure   mass moved per row (the budget), split into text sinks and visual sinks
Cause     this is the intervention: rows keep their sums, only the keys change
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import Literal, Optional, SupportsFloat, SupportsIndex, Union

import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from interp.core.errors import NumericalError, OutOfRange
from interp.core.head import HeadLike
from interp.core.intervention import Phase, Redistribute
from interp.core.intervention import redistribute as intervention
from interp.core.prompt import Where
from interp.stream.rows import move_mass

Keys = slice | Sequence[SupportsIndex] | np.ndarray | Tensor
"""Key positions: a slice, positions, or a boolean mask."""

Convention = Literal["paper", "code"]


def key_mask(keys: Keys, n_keys: int) -> Bool[Tensor, "key"]:
    """True at the given key positions.

    Example:
        >>> key_mask(slice(1, 3), 4)
        tensor([False,  True,  True, False])
        >>> key_mask([3], 4)
        tensor([False, False, False,  True])

    Raises:
        OutOfRange: a position that does not exist; count from 0.
    """
    mask = torch.zeros(n_keys, dtype=torch.bool)
    if isinstance(keys, slice):
        if (keys.stop or 0) > n_keys:
            raise OutOfRange(f"keys up to {keys.stop} were asked for, but there are {n_keys}.")
        mask[torch.arange(n_keys)[keys]] = True
        return mask
    plain = keys.detach().cpu().numpy() if isinstance(keys, Tensor) else np.asarray(keys)
    if plain.dtype == bool:
        if plain.shape != (n_keys,):
            raise ValueError(f"a mask of shape {plain.shape} does not fit {n_keys} keys.")
        return torch.from_numpy(plain.copy())
    positions = plain.astype(np.int64).reshape(-1)
    wrong = positions[(positions < 0) | (positions >= n_keys)]
    if len(wrong):
        raise OutOfRange(f"key {wrong[0]} does not exist: there are keys 0 to {n_keys - 1}.")
    mask[torch.from_numpy(positions)] = True
    return mask


def redistribute(
    attention: Float[Tensor | np.ndarray, "*batch head query key"],
    rows: Bool[Tensor | np.ndarray, "*batch head query"],
    sinks: Keys,
    destination: Keys,
    fraction: SupportsFloat,
    *,
    convention: Convention = "paper",
    sources: Optional[Keys] = None,
) -> Float[Tensor, "*batch head query key"]:
    """Move a fraction of the attention on sinks to the destination, pro rata, in chosen rows.

    Example:
        >>> attention = torch.tensor([[[0.6, 0.3, 0.1]]])
        >>> redistribute(attention, torch.tensor([[True]]), [0], slice(1, 3), 0.5)
        tensor([[[0.3000, 0.5250, 0.1750]]])

    Args:
        attention: probabilities after the softmax.
        rows: the rows to edit, for example from `interp.heads.image_centric.select`.
        sinks: sink positions, text and image alike; none of them receives anything.
        destination: keys that receive, without the sinks; usually the image.
        fraction: share of the sinks' mass that moves, in the paper's meaning. With
            convention="code" it is the factor that stays, the released code's `p`, so that
            1 - fraction moves: 0.6 moves 60 % in the paper and 40 % in the code.
        sources: the sinks that give, if not all: only the visual ones, say.

    Returns:
        A new map. Row sums are conserved (also below one, for learned sinks); rows without sink
        mass or without any mass on the destination are unchanged, as are all other rows.

    Raises:
        ValueError: fraction outside [0, 1].
        NumericalError: NaN in the attention.
        OutOfRange: a position that does not exist.

    Source: arXiv:2503.03321; released code `attn_redist` (which edits only queries after the
    image: leave the others out of `rows`).
    """
    moved = fraction_moved(fraction, convention)
    given = torch.as_tensor(attention)
    weights = given.to(torch.promote_types(given.dtype, torch.float32))
    if not torch.isfinite(weights).all():
        raise NumericalError("attention contains NaN or infinity; recompute it in float32.")
    n_keys = weights.shape[-1]
    is_sink = key_mask(sinks, n_keys)
    gives = is_sink if sources is None else is_sink & key_mask(sources, n_keys)
    receives = (key_mask(destination, n_keys) & ~is_sink).to(weights.device)
    chosen = torch.as_tensor(rows, device=weights.device)
    return move_mass(weights, chosen, gives.to(weights.device), receives, moved).to(given.dtype)


def fraction_moved(fraction: SupportsFloat, convention: Convention = "paper") -> float:
    """The share of sink mass that moves, from `p` in the paper's or the released code's meaning.

    Example:
        >>> fraction_moved(0.6), fraction_moved(0.6, "code")
        (0.6, 0.4)
    """
    share = float(fraction)
    if not 0 <= share <= 1:
        raise ValueError(f"fraction must lie between 0 and 1, not {share}.")
    return share if convention == "paper" else 1 - share


def budget(
    attention: Float[Tensor | np.ndarray, "*batch head query key"],
    sinks: Keys,
    image: Keys,
    fraction: SupportsFloat,
    *,
    convention: Convention = "paper",
) -> tuple[Float[Tensor, "*batch head query"], Float[Tensor, "*batch head query"]]:
    """Mass that redistribution frees in every row: from text sinks, and from visual sinks.

    Example:
        >>> text, visual = budget(torch.tensor([[[0.6, 0.3, 0.1]]]), [0, 1], slice(1, 3), 0.5)
        >>> text, visual
        (tensor([[0.3000]]), tensor([[0.1500]]))

    The first token often holds most of a row, so that most of the budget comes from text: report
    both.
    """
    moved = fraction_moved(fraction, convention)
    weights = torch.as_tensor(attention)
    weights = weights.to(torch.promote_types(weights.dtype, torch.float32))
    n_keys = weights.shape[-1]
    is_sink, in_image = key_mask(sinks, n_keys), key_mask(image, n_keys)
    text, visual = is_sink & ~in_image, is_sink & in_image
    return (
        moved * (weights * text.to(weights.device)).sum(-1),
        moved * (weights * visual.to(weights.device)).sum(-1),
    )


def ocr_sink_redistribution(
    heads: Union[HeadLike, Iterable[HeadLike]],
    beta: SupportsFloat = 0.4,
    *,
    sinks: Union[Where, Mapping[int, Sequence[SupportsIndex]]] = 0,
    destination: Where = "all",
    phase: Phase = "all",
) -> Redistribute:
    """Let the sink keep `beta` of its attention in chosen heads, and give the rest to other keys.

    Example:
        >>> ocr_sink_redistribution("L1H2").fraction, ocr_sink_redistribution("L1H2", 0.1).fraction
        (0.6, 0.9)

    Args:
        heads: the heads to edit, in the paper the two best OCR heads.
        beta: share that stays; 1 changes nothing.
        sinks: the first key, as in the paper; or any positions, or phi-sinks by layer
            (`interp.sinks.visual.sinks_by_layer`).
        destination: "all" other keys pro rata, as in the paper; "image" (also "visual"): image
            tokens only; "evidence" or any other segment, or positions.

    Returns:
        An intervention for `model.run(write=...)`, for every query, with other ones beside it.

    Source: arXiv:2505.15865, released code `exp_sink.py` (which ignores beta for Qwen2-VL).
    """
    share = float(beta)
    if not 0 <= share <= 1:
        raise ValueError(f"beta must lie between 0 and 1, not {share}.")
    where = "image" if isinstance(destination, str) and destination == "visual" else destination
    given = dict(sinks) if isinstance(sinks, Mapping) else sinks
    return intervention(given, where, round(1 - share, 12), heads=heads,
                        min_nonsink_share=None, min_image_mass=None, phase=phase)
