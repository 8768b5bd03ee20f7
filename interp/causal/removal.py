"""Removing tokens from the middle of a forward pass: five meanings, one call, exact and cheap.

What papers call *removing* tokens at a layer differs, and the results differ with it:

    drop_keep_ids     gone from the sequence, the others keep their position ids: the same as keys
                      that nobody may see (flow.md, E2)
    drop_compact_ids  gone, the others numbered without gaps: distances change too
    mask_keys         they stay, but some queries cannot see them any more
    replace_mean      they stay, as a mean state, one per layer
    replace_cama      they stay, as a mean state that keeps the own token: one per layer and position
                      (context-aware mean ablation, arXiv:2509.09650)

Every result that comes from here says which one it was.
"""

from collections.abc import Sequence
from typing import Any, Literal, Optional, SupportsIndex, get_args

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from interp.core import OutOfRange, Prompt, PromptError, SegmentNotFound
from interp.core.prompt import Where
from interp.models.model import Model

How = Literal["drop_keep_ids", "drop_compact_ids", "mask_keys", "replace_mean", "replace_cama"]
REMOVALS: tuple[str, ...] = get_args(How)
States = Float[np.ndarray, "layer d_model"] | Float[np.ndarray, "layer position d_model"]


class Removal:
    """A prompt of which only some of the removable tokens are left from a block on.

    Example:
        >>> import interp
        >>> model = interp.open_model("backcopy-3l")
        >>> prompt = Prompt.from_tokens(range(3, 15), {"image": (2, 8)})
        >>> removal = Removal(model, prompt, "image")
        >>> removal.logits(1, [(), (2, 3), removal.places]).shape[0], removal.prefills > 1
        (3, True)

    Args:
        removable: the tokens that may be taken away.
        how: one of the five meanings above.
        queries: who cannot see removed keys, for "mask_keys"; a position always sees itself.
        states: what enters every block in place of a removed token: `[layer, d_model]` for
            "replace_mean" (`mean_states`), `[layer, position, d_model]` for "replace_cama"
            (`context_mean_states`).

    Attributes:
        places: the removable positions, ascending. base: the prompt as it was run once.

    Raises:
        SegmentNotFound: the prompt has no such tokens.
        PromptError: an unknown meaning, states that do not belong to it or do not fit, compact ids
            in a model with a rotary embedding in several axes.
        ModelRefused: models that cannot be resumed in the middle.
    """

    def __init__(
        self, model: Model, prompt: Prompt, removable: Where = "image", how: str = "drop_keep_ids",
        *, queries: Where = "all", states: Optional[States] = None,
    ) -> None:
        self.places = removable_tokens(prompt, removable)
        if how not in REMOVALS:
            raise PromptError(f"cannot remove by {how!r}; choose one of: {', '.join(REMOVALS)}.")
        if how.startswith("replace") != (states is not None):
            raise PromptError(f"removal {how!r} needs states=[layer, ...], and only the two "
                              "'replace' meanings do." if states is None else
                              f"removal {how!r} takes no states=; only the 'replace' meanings do.")
        if how == "drop_compact_ids" and several_position_axes(model):
            raise PromptError(
                f"{model.name} numbers positions along several axes, so they cannot be compacted; "
                "use removal 'drop_keep_ids'."
            )
        self.how, self.length, self.states = how, len(prompt), None
        if states is not None:
            self.states = _fitting(how, states, model, len(prompt), self.places)
        asking = torch.zeros(len(prompt), dtype=torch.bool)
        asking[list(prompt.positions(queries))] = True
        self.queries, self.queries_name = asking, str(queries)
        self.base = model.resumable(prompt)
        self.first = self.base.earliest(min(self.places))
        self.after = [p for p in range(self.first, len(prompt)) if p not in set(self.places)]

    @property
    def prefills(self) -> float:
        """What it cost so far, in plain passes over the prompt, the first one included."""
        return self.base.spent / self.base.prefill + 1

    @property
    def manifest(self) -> dict[str, Any]:
        """What a result must say about it."""
        masked = self.how == "mask_keys"
        return {"removal": self.how, "removed_from": self.queries_name if masked else "all",
                "decode": "not measured"}

    def logits(
        self, layer: SupportsIndex, kept: Sequence[Sequence[SupportsIndex]], batch_size: int = 64
    ) -> Float[Tensor, "variant vocab"]:
        """The last row with only `kept` of the removable tokens from block `layer` on, per variant.

        Variants that leave equally many tokens share passes.
        """
        number = int(layer)
        variants = [tuple(sorted({int(p) for p in one})) for one in kept]
        removable = set(self.places)
        outside = [p for one in variants for p in one if p not in removable]
        if outside:
            raise OutOfRange(f"position {outside[0]} is to be kept, but is not removable.")
        found: list[Any] = [None] * len(variants)
        sizes: dict[int, list[int]] = {}
        for at, one in enumerate(variants):
            sizes.setdefault(len(one) if self.how.startswith("drop") else 0, []).append(at)
        for numbers in sizes.values():
            for start in range(0, len(numbers), max(1, batch_size)):
                part = numbers[start : start + max(1, batch_size)]
                out = self._run(number, [variants[at] for at in part])
                for at, row in zip(part, out.float().cpu()):
                    found[at] = row
        return torch.stack(found)

    def _run(self, layer: int, variants: Sequence[tuple[int, ...]]) -> Tensor:
        context = torch.arange(self.first)
        if self.how.startswith("drop"):
            rows = torch.tensor([sorted((*one, *self.after)) for one in variants])
            compact = self.first + torch.arange(rows.shape[1]).expand(rows.shape)
            positions = compact if self.how == "drop_compact_ids" else None
            return self.base.replay(layer, rows, context=context, positions=positions)
        row = torch.arange(self.first, self.length)
        rows = row.expand(len(variants), -1)
        gone = torch.ones(len(variants), self.length, dtype=torch.bool)
        for at, one in enumerate(variants):
            gone[at] = torch.isin(torch.arange(self.length), torch.tensor(self.places))
            gone[at, list(one)] = False
        if self.states is None:
            cut = gone[:, None, None, :] & self.queries[row][None, None, :, None]
            cut &= (row[:, None] != torch.arange(self.length))[None, None]
            return self.base.replay(layer, rows, context=context, blocked=lambda _: cut)
        plain = self.base.hidden[layer][row]
        there = self.states[layer].to(plain)
        there = there.expand(len(row), -1) if there.ndim == 1 else there[row]
        hidden = torch.where(gone[:, row, None].to(plain.device), there, plain)
        return self.base.replay(layer, rows, context=context, hidden=hidden)


def removable_tokens(prompt: Prompt, where: Where) -> tuple[int, ...]:
    """Positions of the tokens to remove; says how to get image tokens where there are none."""
    try:
        return prompt.positions(where)
    except SegmentNotFound as error:
        raise SegmentNotFound(
            f"{error} Make the prompt with model.prompt(..., images=[...]), or name the removable "
            "tokens yourself."
        ) from None


def mean_states(
    model: Model, prompts: Sequence[Prompt], where: Where = "image"
) -> Float[np.ndarray, "layer d_model"]:
    """The mean state of some tokens entering every block, over prompts: for "replace_mean"."""
    states = []
    for prompt in prompts:
        resid = model.run(prompt, read="resid_pre", logits="none").reads["resid_pre"].values[0]
        states.append(resid[:, list(removable_tokens(prompt, where))].mean(1))
    if not states:
        raise PromptError("no prompts to average over: give at least one.")
    return np.mean(states, axis=0)


def context_mean_states(
    model: Model, prompt: Prompt, pool: Sequence[Prompt]
) -> Float[np.ndarray, "layer position d_model"]:
    """What enters every block at each position, averaged over contexts that keep the own token.

    Over the prompts of `pool` of the same length that have the same token at the position (pieces
    of a picture count as the same token, so for them it is the mean over pictures at the position);
    NaN where no prompt of the pool has it, which "replace_cama" refuses if it is asked for there.

    Source: arXiv:2509.09650, context-aware mean ablation.
    """
    total = np.zeros((model.n_layers, len(prompt), model.d_model))
    count = np.zeros(len(prompt))
    for other in pool:
        if len(other) != len(prompt):
            continue
        resid = model.run(other, read="resid_pre", logits="none").reads["resid_pre"].values[0]
        same = np.array(other.ids) == np.array(prompt.ids)
        total[:, same] += resid[:, same]
        count += same
    if not count.any():
        raise PromptError(
            f"no prompt of the pool of {len(pool)} has {len(prompt)} tokens and shares one of them."
        )
    return np.where(count[None, :, None] > 0, total / np.maximum(count, 1)[None, :, None], np.nan)


def several_position_axes(model: Model) -> bool:
    """Whether positions are numbered along several axes (height and width of pictures, say)."""
    text = model.config.get_text_config()
    rope = getattr(text, "rope_parameters", None) or getattr(text, "rope_scaling", None) or {}
    return isinstance(rope, dict) and "mrope_section" in rope


def _fitting(
    how: str, states: States, model: Model, length: int, places: tuple[int, ...]
) -> Tensor:
    values = torch.as_tensor(np.asarray(states))
    expected = (model.n_layers, model.d_model) if how == "replace_mean" else (
        model.n_layers, length, model.d_model)
    if tuple(values.shape) != expected:
        raise PromptError(
            f"removal {how!r} needs states of shape {expected}, not {tuple(values.shape)}."
        )
    rows = values[:, None] if how == "replace_mean" else values[:, list(places)]
    unknown = (~torch.isfinite(rows)).any(2).any(0).nonzero()
    if len(unknown):
        where = "" if how == "replace_mean" else f" for position {places[int(unknown[0])]}"
        raise PromptError(
            f"there is no state{where} to replace it by (not a number); give a larger pool."
        )
    return values
