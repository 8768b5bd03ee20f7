"""Edits of the row that answers: what the last position attends to, changed in many ways at once.

Nobody reads the last position, so its token alone goes through the blocks again
(`interp.models.last_row`); redistribution (arXiv:2503.03321), reweighing and knockout of that row
cost a few percent of a pass for a whole sweep.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, Optional, Union

import torch
from jaxtyping import Float
from torch import Tensor

from interp.core.errors import PromptError
from interp.core.intervention import BlockEdges, Intervention, Redistribute, Reweigh
from interp.core.prompt import Prompt
from interp.models.edits import Edits, Pass, Places
from interp.models.last_row import replay_last
from interp.models.model import Model


def answer_row(
    model: Model,
    prompt: Prompt,
    writes: Sequence[Union[Intervention, Sequence[Intervention]]],
) -> Float[Tensor, "variant d_vocab"]:
    """The last row of logits under edits of what the last position attends to, many at a time.

    Example:
        >>> import interp
        >>> model = interp.open_model("backcopy-3l")
        >>> prompt = Prompt.from_tokens(range(3, 12), {"image": (2, 6)})
        >>> moved = [interp.redistribute([0], "image", share, queries="last") for share in (0.3, 0.6)]
        >>> answer_row(model, prompt, moved).shape[0]
        2

    Nobody reads the last position, so its token alone goes through the blocks again, all variants in
    one batch. Equal to `model.run(prompt, write=..., logits="last")` variant by variant.

    Args:
        writes: `redistribute`, `reweigh` and `block`, all with queries="last" (or phase "last").

    Raises:
        PromptError: an edit of another kind or of other rows: run it with `model.run`.
        ModelRefused: models that cannot be resumed in the middle.
    """
    last, now = len(prompt) - 1, Pass(0, len(prompt))
    keys, query = torch.arange(last + 1), torch.tensor([last])
    edits, starts = [], []
    for write in writes:
        given = [write] if isinstance(write, Intervention) else list(write)
        one = Edits(prompt, given, model.shape)
        for each in given:
            if not isinstance(each, (Redistribute, Reweigh, BlockEdges)):
                raise PromptError(f"{type(each).__name__} does not only change what the last position "
                                  "attends to; use model.run.")
            rows = (Places(prompt, each.queries).among(keys) & now.rows(each.phase)).nonzero()
            if len(rows) and int(rows[0]) != last:
                raise PromptError(f"{type(each).__name__} also edits position {int(rows[0])}; say "
                                  "queries='last', or use model.run.")
        edits.append(one)
        touched = [n for n in range(model.n_layers) if one.blocks(n) or one.edits_pattern(n)]
        starts.append(touched[0] if touched else model.n_layers - 1)

    def cut(layer: int, variants: list[int]) -> Optional[Tensor]:
        if not any(edits[v].blocks(layer) for v in variants):
            return None
        every = [edits[v].visible(layer, query, keys, now) for v in variants]
        shut = torch.zeros((model.n_heads, 1, last + 1), dtype=torch.bool)
        return torch.stack([shut if open_ is None else ~open_ for open_ in every])[:, :, 0]

    def change(layer: int, variants: list[int], weights: Tensor, seen: Tensor) -> Tensor:
        alike: dict[Any, list[int]] = {}
        for at, v in enumerate(variants):
            if edits[v].edits_pattern(layer):
                alike.setdefault(_content(edits[v], layer), []).append(at)
        changed, device = weights.clone(), weights.device
        for some in alike.values():
            rows = weights[some].transpose(0, 1)
            made = edits[variants[some[0]]].pattern(
                layer, rows, torch.full((len(some),), last, device=device), keys.to(device),
                torch.ones((1, len(some), last + 1), dtype=torch.bool, device=device), now)
            changed[some] = made.transpose(0, 1)
        return changed

    return replay_last(model.resumable(prompt), starts, blocked=cut, weights=change).float().cpu()


def _content(edits: Edits, layer: int) -> tuple[Any, ...]:
    """What is done to the rows of a layer, apart from which other layers it is done in."""
    return tuple((replace(one, layers=None, heads=None), tuple(heads or ()), heads is None)
                 for one, heads, *_ in edits._pattern[layer])
