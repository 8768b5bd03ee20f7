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

from collections.abc import Iterator, Sequence
from typing import Any, Literal, Optional, SupportsIndex, get_args

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from interp.core import OutOfRange, Prompt, PromptError, SegmentNotFound
from interp.core.prompt import Where
from interp.models.last_row import replay_last
from interp.models.model import Model
from interp.models.resume import Resumable
from interp.models.suffix import replay_suffix

How = Literal["drop_keep_ids", "drop_compact_ids", "mask_keys", "replace_mean", "replace_cama"]
REMOVALS: tuple[str, ...] = get_args(How)
SPARE = 32
"""Rows that a pass may run again for nothing, to share it between variants."""

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
        self.earliest = _reach(self.base, self.places)
        self.first = self.earliest[min(self.places)]
        gone = set(self.places)
        self.after = [p for p in range(len(prompt)) if p not in gone]

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

        Variants that leave equally many tokens share passes. What precedes the first token that is
        gone is not run again, and of the last block only the last row is.
        """
        number = int(layer)
        variants = [tuple(sorted({int(p) for p in one})) for one in kept]
        removable = set(self.places)
        outside = [p for one in variants for p in one if p not in removable]
        if outside:
            raise OutOfRange(f"position {outside[0]} is to be kept, but is not removable.")
        found: list[Any] = [None] * len(variants)
        for start, part in self._shared([self._start(one) for one in variants],
                                        [len(one) for one in variants], max(1, int(batch_size))):
            out = self._run(number, start, [variants[at] for at in part])
            for at, row in zip(part, out.float().cpu()):
                found[at] = row
        return torch.stack(found)

    def _start(self, kept: tuple[int, ...]) -> int:
        """The first position that differs from the plain run."""
        gone = set(self.places).difference(kept)
        first = self.earliest[min(gone)] if gone else self.length - 1
        if self.how == "mask_keys" and gone:
            # Nothing changes before somebody cannot see what is gone.
            asking = self.queries.nonzero()[:, 0].tolist()
            first = max(first, min([self.base.earliest(q) for q in asking[:1]], default=first))
        return min(first, self.length - 1)

    def _shared(
        self, starts: Sequence[int], sizes: Sequence[int], most: int
    ) -> Iterator[tuple[int, list[int]]]:
        """Variants that share a pass, and where it starts: equally long, and of similar starts."""
        alike: dict[int, list[int]] = {}
        for at, size in enumerate(sizes):
            alike.setdefault(size if self.how.startswith("drop") else 0, []).append(at)
        for numbers in alike.values():
            numbers.sort(key=lambda at: -starts[at])
            part: list[int] = []
            for at in numbers:
                rows = self.length - starts[at]
                spare = sum(starts[one] - starts[at] for one in part)
                if part and (len(part) == most or spare > max(SPARE, rows * (len(part) + 1) // 10)):
                    yield starts[part[-1]], part
                    part = []
                part.append(at)
            yield starts[part[-1]], part

    def _run(self, layer: int, start: int, variants: Sequence[tuple[int, ...]]) -> Tensor:
        """The last row of variants that are the plain run before position `start`."""
        context = torch.arange(start)
        if self.how.startswith("drop"):
            rows = torch.tensor([[p for p in sorted((*one, *self.after)) if p >= start]
                                 for one in variants])
            compact = start + torch.arange(rows.shape[1]).expand(rows.shape)
            positions = compact if self.how == "drop_compact_ids" else None
            return replay_suffix(self.base, layer, rows, context=context, positions=positions)
        row = torch.arange(start, self.length)
        rows = row.expand(len(variants), -1)
        gone = torch.zeros(len(variants), self.length, dtype=torch.bool)
        gone[:, list(self.places)] = True
        for at, one in enumerate(variants):
            gone[at, list(one)] = False
        if self.states is None:
            cut = gone[:, None, :] & self.queries[row][None, :, None]
            cut &= row[:, None] != torch.arange(self.length)
            if len(row) == 1 and self.base.earliest(start) == start:
                return replay_last(self.base, [layer] * len(cut), blocked=lambda _, some: cut[some])
            return replay_suffix(self.base, layer, rows, context=context, cut=cut[:, None])
        plain = self.base.hidden[layer][row]
        there = self.states[layer].to(plain)
        there = there.expand(len(row), -1) if there.ndim == 1 else there[row]
        hidden = torch.where(gone[:, row, None].to(plain.device), there, plain)
        return replay_suffix(self.base, layer, rows, context=context, hidden=hidden)


def _reach(base: Resumable, places: Sequence[int]) -> dict[int, int]:
    """The first position that a change at each of these can reach."""
    masks = {id(seen): seen for seen in map(base.visible, range(base.n_layers))}
    causal = not any(bool(seen.triu(1).any()) for seen in masks.values())
    return {p: p if causal else base.earliest(p) for p in places}


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
