"""What every head points at in the rows that predict the tokens a model says by itself.

Streamed: of each row only its top key, and its attention on the first token and on one stretch of
the prompt, are kept.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import SupportsIndex

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from interp.core import Prompt
from interp.models.model import Model
from interp.stream.per_layer import PerLayer
from interp.stream.reducers import Offsets, SegmentMass, TopKeys


@dataclass(frozen=True)
class Spoken:
    """What a model said after a prompt, and where its heads looked meanwhile.

    Attributes:
        emitted: the greedy tokens, up to one that ends the answer.
        top_keys: the key with the most attention in the row that predicts each of them, -1 where
            a row attends to nothing.
        on_first, on_span: mean attention of these rows on token 0 and on the stretch (of the first
            row alone if nothing was said).
        visible: whether the last row can see the beginning of the stretch.
    """

    emitted: list[int]
    top_keys: Int[Tensor, "step layer head"]
    on_first: Float[np.ndarray, "layer head"]
    on_span: Float[np.ndarray, "layer head"]
    visible: Bool[np.ndarray, "layer head"]


def spoken_rows(
    model: Model,
    prompts: Sequence[Prompt],
    spans: Sequence[tuple[int, int]],
    new_tokens: SupportsIndex,
    ends: set[int],
    batch_size: SupportsIndex = 8,
) -> list[Spoken]:
    """Let the model speak after every prompt and keep what its heads point at.

    Example:
        >>> import interp
        >>> model = interp.open_model("backcopy-3l")
        >>> (one,) = spoken_rows(model, [Prompt.from_tokens(range(3, 12))], [(2, 4)], 3, set())
        >>> len(one.emitted), tuple(one.top_keys.shape) == (3, model.n_layers, model.n_heads)
        (3, True)

    Args:
        spans: (start, stop) in each prompt.
        ends: tokens that end an answer, see `answer_ends`.
        batch_size: prompts of equal length whose statistics are held at one time.
    """
    steps, found = int(new_tokens), {}
    for numbers in _alike(prompts, int(batch_size)):
        chosen = [prompts[i] for i in numbers]
        last = len(chosen[0]) - 1

        def segments(i: int, layer: int, numbers: list[int] = numbers) -> SegmentMass:
            return SegmentMass({"first": [0], "span": range(*spans[numbers[i]])})

        def far(
            i: int, layer: int, numbers: list[int] = numbers, last: int = last + steps - 1
        ) -> Offsets:
            # NaN where that row cannot see the key.
            return Offsets([spans[numbers[i]][0] - last], subset=[last])

        run = model.run(
            chosen, stats=[TopKeys(1), PerLayer("segments", segments), PerLayer("offsets", far)],
            new_tokens=steps, logits="none", batch_size=len(chosen))
        axes = ("layer", "head")
        for row, number in enumerate(numbers):
            emitted = run.new_tokens[row]
            n = next((i for i, token in enumerate(emitted) if token in ends), len(emitted))
            rows = slice(last, last + max(n, 1))
            top = run.stats["top_keys"].isel(prompt=row, rank=0, query=rows)
            top = top.sel(quantity="key").transpose("query", *axes).fillna(-1)
            mass = run.stats["segments"].isel(prompt=row, query=rows).mean("query")
            seen = run.stats["offsets"].isel(prompt=row, offset=0).transpose(*axes)
            found[number] = Spoken(
                emitted[:n], torch.from_numpy(top.values.astype(np.int64))[:n],
                mass.sel(segment="first").transpose(*axes).values,
                mass.sel(segment="span").transpose(*axes).values, np.isfinite(seen.values))
    return [found[number] for number in range(len(prompts))]


def answer_ends(model: Model) -> set[int]:
    """Tokens that end an answer: end of text, and a line end where that is one token.

    Example:
        >>> import interp
        >>> sorted(answer_ends(interp.open_model("reader")))
        [5]
    """
    found = set(model.end_tokens)
    if model.tokenizer is not None:
        for text in ("\n", "a\n"):
            last = model.tokenizer(text, add_special_tokens=False)["input_ids"][-1:]
            found |= {i for i in last if model.tokenizer.decode([i]).strip(" ") == "\n"}
    return found


def _alike(prompts: Sequence[Prompt], size: int) -> list[list[int]]:
    """Numbers of prompts of equal length, in groups of at most `size`."""
    groups: dict[int, list[int]] = {}
    for number, prompt in enumerate(prompts):
        groups.setdefault(len(prompt), []).append(number)
    return [numbers[i : i + size] for numbers in groups.values()
            for i in range(0, len(numbers), size)]
