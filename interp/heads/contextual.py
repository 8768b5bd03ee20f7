"""Contextual heads: heads that look from the answer at the document that holds it.

Paper     arXiv:2503.23306
Question  Which heads attend to the relevant document while the answer is written?
Measure   attention from the answer's rows to the gold document, summed over it, averaged over rows
Cause     raise that attention in the top heads, and in as many random ones (`interp.reweigh`)
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import Literal, Optional, SupportsIndex

import numpy as np
import torch
import xarray as xr
from jaxtyping import Float
from matplotlib.axes import Axes
from torch import Tensor

from interp.core import HeadScores, Intervention, Prompt, Result
from interp.core.errors import OutOfRange, PromptError
from interp.figures import head_grid
from interp.models.model import Model
from interp.prompts.documents import Documents
from interp.stream.chosen_rows import RowMass
from interp.stream.per_layer import PerLayer

Rows = Literal["predicting", "answer"]
SINK = (0, 1)
"""The positions that the released code calls the sink."""

MASSES = ("relevant", "irrelevant", "strongest", "sink", "per_token", "ratio")


def masses(
    attention: Float[Tensor | np.ndarray, "layer head query key"],
    documents: Sequence[Sequence[SupportsIndex]],
    place: SupportsIndex,
    sink: Sequence[SupportsIndex] = SINK,
) -> dict[str, Float[Tensor, "layer head"]]:
    """Where the answer's rows look: at the gold document, the others, the sink.

    Example:
        >>> rows = torch.tensor([[[[0.25, 0.5, 0.125, 0.125]]]])
        >>> found = masses(rows, [[1], [2, 3]], place=1, sink=[0])
        >>> {name: float(value) for name, value in found.items()}
        {'relevant': 0.25, 'irrelevant': 0.5, 'strongest': 0.5, 'sink': 0.25, 'per_token': 0.125, \
'ratio': 0.3333333432674408}

    Args:
        attention: the rows of the answer, over all keys.
        documents: positions of every document. place: the number of the gold one.

    Returns:
        Means over rows: `relevant` (the score), `irrelevant` (the sum over the other documents),
        `strongest` (the largest of them), `sink`; `per_token`: relevant over the length of the
        gold document; `ratio`: relevant over all documents together. The last two, because a sum
        favors long documents.

    Raises:
        OutOfRange: no such document, or a position beyond the keys.

    Source: arXiv:2503.23306, released code `get_contextual_heads.py`; the last two are not in it.
    """
    rows = torch.as_tensor(attention)
    rows = rows.to(torch.promote_types(rows.dtype, torch.float32))
    gold, places = int(place), [[int(p) for p in one] for one in documents]
    if not 0 <= gold < len(places):
        raise OutOfRange(f"there is no document {gold} among {len(places)}.")
    farthest = max(p for one in [*places, [int(p) for p in sink] or [0]] for p in one)
    if farthest >= rows.shape[-1]:
        raise OutOfRange(
            f"a document reaches position {farthest}, but the attention has {rows.shape[-1]} keys."
        )
    per_document = torch.stack([rows[..., one].sum(-1).mean(-1) for one in places])
    on_sink = rows[..., [int(p) for p in sink]].sum(-1).mean(-1)
    return _quantities(per_document, on_sink, gold, len(places[gold]))


def _quantities(
    per_document: Float[Tensor, "document *rest"], sink: Float[Tensor, "*rest"], gold: int,
    length: int,
) -> dict[str, Tensor]:
    relevant = per_document[gold]
    others = torch.cat([per_document[:gold], per_document[gold + 1 :]])
    # A head with a window may see only some documents; one that it cannot see gets nothing.
    others = others.nan_to_num(0.0)
    irrelevant = others.sum(0)
    strongest = others.amax(0) if len(others) else torch.zeros_like(relevant)
    return {
        "relevant": relevant, "irrelevant": irrelevant, "strongest": strongest, "sink": sink,
        "per_token": relevant / length,
        "ratio": relevant / (relevant + irrelevant).clamp_min(1e-12),
    }


def score(
    attention: Float[Tensor | np.ndarray, "layer head query key"],
    gold: Sequence[SupportsIndex],
) -> Float[Tensor, "layer head"]:
    """Attention from the answer's rows to the gold document, averaged over the rows.

    Example:
        >>> score(torch.tensor([[[[0.25, 0.5, 0.25]]]]), gold=[1, 2])
        tensor([[0.7500]])

    Source: arXiv:2503.23306.
    """
    return masses(attention, [gold], 0)["relevant"]


def with_answer(
    prompt: Prompt, answer: Sequence[SupportsIndex], rows: Rows = "predicting"
) -> tuple[Prompt, tuple[int, ...]]:
    """The prompt with its answer behind it, and the rows of the answer.

    Example:
        >>> longer, rows = with_answer(Prompt.from_tokens([5, 6, 7]), [8, 9])
        >>> longer.ids, rows, with_answer(Prompt.from_tokens([5, 6, 7]), [8, 9], "answer")[1]
        ((5, 6, 7, 8, 9), (2, 3), (3, 4))

    Args:
        rows: "predicting": the rows whose logits decide the answer's tokens; "answer": the rows of
            the tokens themselves, one later, as in the released code.
    """
    ids = tuple(int(token) for token in answer)
    if not ids:
        raise PromptError("the answer is empty: give its token ids.")
    if rows not in ("predicting", "answer"):
        raise ValueError(f"rows must be 'predicting' or 'answer', not {rows!r}.")
    first = len(prompt) - (rows == "predicting")
    return (
        replace(prompt, ids=prompt.ids + ids, tokens=()),
        tuple(range(first, first + len(ids))),
    )


def measure(
    model: Model,
    asked: Sequence[Documents],
    *,
    answers: Optional[Sequence[Sequence[SupportsIndex]]] = None,
    rows: Rows = "predicting",
    sink: Sequence[SupportsIndex] = SINK,
    copied_only: bool = False,
    new_tokens: SupportsIndex = 100,
    write: Sequence[Intervention] = (),
    batch_size: int = 8,
) -> Result:
    """Where every head looks while the model answers questions over documents.

    Example:
        >>> import interp
        >>> from interp.organisms import reader
        >>> from interp.prompts import documents
        >>> model = interp.open_model("reader")
        >>> asked = documents.synthetic(reader, np.random.default_rng(0), (0, 1, 2), count=3)
        >>> found = measure(model, asked, new_tokens=4)
        >>> found["relevant"].dims, bool(found["score"].max() > 0.3)
        (('sample', 'layer', 'head'), True)

    Args:
        answers: token ids to read instead of what the model says by itself.
        rows: see `with_answer`.
        copied_only: leave out rows of answer tokens that the gold document does not hold: those
            the model answers from its weights.
        new_tokens: longest answer. The paper's 100; a shorter one is faster.
        write: interventions under which the model answers and is read.

    Returns:
        `score`, `frequency` (share of samples in which the gold document gets more than any other),
        `standard_error`, `null` (what an irrelevant document gets), `eligible` [layer, head], and
        per sample `relevant`, `irrelevant`, `strongest`, `sink`, `per_token`, `ratio` [sample,
        layer, head]; `correct` (the answer begins with the gold one), `place`, `rows` [sample].
        Samples without an answer are NaN; the manifest counts them (`unanswered`). Heads whose
        window does not reach the document are not eligible. There is no success filter.

    Raises:
        PromptError: no prompts, or answers for another number of them.

    Source: arXiv:2503.23306. Streamed: only the answer's rows are kept.
    """
    if not asked:
        raise PromptError("no documents to ask about: give at least one prompt.")
    if answers is None:
        said = model.generate([one.prompt for one in asked], int(new_tokens), tuple(write),
                              batch_size=batch_size)
    else:
        said = [[int(token) for token in answer] for answer in answers]
    if len(said) != len(asked):
        raise PromptError(f"{len(said)} answers for {len(asked)} prompts: give one for each.")
    shape = (len(asked), model.n_layers, model.n_heads)
    values = {name: np.full(shape, np.nan) for name in MASSES}
    n_rows = np.zeros(len(asked), dtype=int)
    # Prompts of equal length share a pass.
    todo = []
    for number, (one, answer) in enumerate(zip(asked, said)):
        longer, places = with_answer(one.prompt, answer, rows) if answer else (one.prompt, ())
        if copied_only:
            inside = {one.prompt.ids[p] for p in one.document(one.place)}
            places = tuple(row for row, token in zip(places, answer) if token in inside)
        if places:
            todo.append((number, longer, places))
            n_rows[number] = len(places)
    if todo:
        _fill(model, asked, todo, sink, values, write, batch_size)
    relevant = values["relevant"]
    known = np.isfinite(relevant)
    count = known.sum(0)
    with np.errstate(all="ignore"):
        mean = np.where(count > 0, np.nansum(relevant, 0) / np.maximum(count, 1), np.nan)
        spread = np.sqrt(np.nansum((relevant - mean) ** 2, 0) / np.maximum(count - 1, 1))
        error = np.where(count > 1, spread / np.sqrt(np.maximum(count, 1)), np.nan)
        others = np.array([max(one.count - 1, 1) for one in asked])[:, None, None]
        null = np.where(known, values["irrelevant"] / others, np.nan)
        null = np.where(count > 0, np.nansum(null, 0) / np.maximum(count, 1), np.nan)
        first = np.where(known, relevant > values["strongest"], np.nan)
        often = np.where(count > 0, np.nansum(first, 0) / np.maximum(count, 1), np.nan)
    right = [list(answer[: len(one.answer)]) == list(one.answer)
             for one, answer in zip(asked, said)]
    grid = ("layer", "head")
    data = xr.Dataset(
        {
            "score": (grid, mean), "frequency": (grid, often), "standard_error": (grid, error),
            "null": (grid, null), "eligible": (grid, known.any(0)),
            **{name: (("sample", *grid), value) for name, value in values.items()},
            "correct": ("sample", np.array(right)),
            "place": ("sample", [one.place for one in asked]), "rows": ("sample", n_rows),
        },
        {"sample": np.arange(len(asked)), "layer": np.arange(model.n_layers),
         "head": np.arange(model.n_heads)},
    )
    return Result(data, {
        **model.manifest(), "measure": "contextual", "query_rows": rows,
        "sink": [int(p) for p in sink], "copied_only": copied_only,
        "write": [one.describe() for one in write], "unanswered": int((n_rows == 0).sum()),
        "n_prompts": len(asked),
    })


def _fill(
    model: Model, asked: Sequence[Documents], todo: list, sink: Sequence[SupportsIndex],
    values: dict[str, np.ndarray], write: Sequence[Intervention], batch_size: int,
) -> None:
    """Masses of the prompts that have an answer, a few prompts at a time."""
    for first in range(0, len(todo), 4 * batch_size):
        part = todo[first : first + 4 * batch_size]

        def segments(index: int, layer: int, part: list = part) -> RowMass:
            number, _, places = part[index]
            one = asked[number]
            named = {f"document_{i}": one.document(i) for i in range(one.count)}
            return RowMass({**named, "sink": [int(p) for p in sink]}, places)

        run = model.run([longer for _, longer, _ in part], write=tuple(write), logits="none",
                        stats=[PerLayer("segments", segments)], batch_size=batch_size)
        for index, (number, _, places) in enumerate(part):
            one = asked[number]
            # [layer, head, query, segment] of this prompt, without the padding of longer ones.
            mass = run.stats["segments"].isel(prompt=index).values[:, :, : len(places)]
            mean = torch.tensor(mass).mean(2).movedim(-1, 0)
            found = _quantities(mean[: one.count], mean[one.count], one.place,
                                len(one.document(one.place)))
            for name, value in found.items():
                values[name][number] = value.numpy()


def scores(found: Result, by: str = "score") -> HeadScores:
    """Head scores of a measurement: `by` is "score", or "per_token" or "ratio" averaged over samples.

    Example:
        >>> grid = ("layer", "head")
        >>> data = xr.Dataset({"score": (grid, [[0.1, 0.4]]), "eligible": (grid, [[True, True]]),
        ...     "frequency": (grid, [[0, 1.0]]), "standard_error": (grid, [[0.1, 0.1]])})
        >>> scores(Result(data)).top(1)
        [L0H1]
    """
    if by == "score":
        values = found["score"].values
    else:
        values = found[by].mean("sample").values
    same = by == "score"
    return HeadScores.of(
        values, frequency=found["frequency"].values, eligible=found["eligible"].values,
        standard_error=found["standard_error"].values if same else None,
    )


def draw(found: Result, ax: Axes, mark: Sequence = ()) -> Axes:
    """Head map of the attention on the gold document."""
    return head_grid.draw(ax, scores(found), label="attention on the gold document", mark=mark)
