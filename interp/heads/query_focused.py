"""Query-focused heads: heads whose attention from the question ranks the documents.

Paper     arXiv:2506.09944 (QRHead)
Question  Which heads find the relevant document, whether or not anything is copied from it?
Measure   attention from the question to a document, less what the same document gets when nothing
          is asked
Cause     ablate the top heads, and as many random ones (`interp.causal.sweep.ablation_sweep`)
"""

from collections.abc import Iterable, Sequence
from typing import SupportsIndex, Union

import numpy as np
import torch
import xarray as xr
from jaxtyping import Float
from matplotlib.axes import Axes
from torch import Tensor

from interp.core import HeadScores, Prompt, Result
from interp.core.errors import PromptError
from interp.core.head import HeadLike, check_heads
from interp.core.head import heads as as_heads
from interp.figures import head_grid
from interp.models.model import Model
from interp.prompts.documents import Documents
from interp.stream.per_layer import PerLayer
from interp.stream.received import Received

CUT = 2.0
"""Tokens this many standard deviations below their document's mean are dropped."""

DEPTH = 10
"""Documents that count in nDCG@10."""


def relevance(
    asked: Float[Tensor | np.ndarray, "*batch key"],
    blank: Float[Tensor | np.ndarray, "*batch key"],
    documents: Sequence[Sequence[SupportsIndex]],
) -> Float[Tensor, "*batch document"]:
    """How much more attention each document gets because of the question.

    Example:
        >>> asked = torch.tensor([0.25, 0.5, 0.125, 0.125])
        >>> blank = torch.tensor([0.5, 0.25, 0.125, 0.125])
        >>> relevance(asked, blank, [[1], [2, 3]])
        tensor([0.2500, 0.0000])

    Args:
        asked, blank: mean attention that each key receives from the question's rows, with the
            question and with nothing asked (NaN where a window hides the key).
        documents: positions of every document, the same in both.

    Source: arXiv:2506.09944: per token the difference; tokens below mean - 2 sd of their document
    are dropped; the rest is summed.
    """
    more = torch.as_tensor(asked) - torch.as_tensor(blank)
    more = more.to(torch.promote_types(more.dtype, torch.float32))
    found = []
    for places in documents:
        own = more[..., [int(p) for p in places]]
        mean, spread = own.mean(-1, keepdim=True), own.std(-1, keepdim=True, unbiased=False)
        found.append(torch.where(own >= mean - CUT * spread, own, 0.0 * own).sum(-1))
    return torch.stack(found, -1)


def score(
    asked: Float[Tensor | np.ndarray, "layer head key"],
    blank: Float[Tensor | np.ndarray, "layer head key"],
    gold: Sequence[SupportsIndex],
) -> Float[Tensor, "layer head"]:
    """Calibrated relevance of the gold document: the QRScore of one example.

    Example:
        >>> score(torch.tensor([[[0.2, 0.8]]]), torch.tensor([[[0.7, 0.3]]]), gold=[1])
        tensor([[0.5000]])

    Source: arXiv:2506.09944.
    """
    return relevance(asked, blank, [gold])[..., 0]


def ndcg(
    relevances: Float[Tensor | np.ndarray, "*batch document"], place: SupportsIndex
) -> Float[Tensor, "*batch"]:
    """nDCG@10 of a ranking of documents of which one is relevant.

    Example:
        >>> ndcg(torch.tensor([[0.1, 0.5, 0.4]]), place=2).round(decimals=3)
        tensor([0.6310])

    Documents with equal scores share the worst of their ranks.
    """
    values = torch.as_tensor(relevances)
    own = values[..., int(place), None]
    rank = (values >= own).sum(-1).to(torch.float32)  # 1 for the first
    gain = 1.0 / torch.log2(rank + 1.0)
    return torch.where((rank > DEPTH) | own[..., 0].isnan(), 0.0 * gain, gain)


def measure(
    model: Model, asked: Sequence[Documents], *, batch_size: int = 8
) -> Result:
    """Calibrated relevance of every document in every head, and how well each head ranks.

    Example:
        >>> import interp
        >>> from interp.organisms import reader
        >>> from interp.prompts import documents
        >>> model = interp.open_model("reader")
        >>> made = documents.synthetic(reader, np.random.default_rng(0), (0, 1, 2), count=3)
        >>> found = measure(model, made)
        >>> found["documents"].dims, float(found["ndcg"].max()) > 0.9
        (('sample', 'layer', 'head', 'document'), True)

    The question's rows are all behind the last document.

    Returns:
        `score` (mean relevance of the gold document), `frequency` (share of samples in which it
        comes first), `standard_error`, `null` (mean relevance of the others), `ndcg`, `eligible`
        [layer, head]; `documents` [sample, layer, head, document], `place` [sample]. A head whose
        window hides a document is not eligible.

    Raises:
        PromptError: no prompts, or prompts whose documents do not stay in place.

    Source: arXiv:2506.09944.
    """
    if not asked:
        raise PromptError("no documents to ask about: give at least one prompt.")
    most = max(one.count for one in asked)
    shape = (len(asked), model.n_layers, model.n_heads, most)
    values = np.full(shape, np.nan, np.float32)
    for first in range(0, len(asked), batch_size):
        part = asked[first : first + batch_size]
        received = [
            _received(model, [getattr(one, name) for one in part], part, batch_size)
            for name in ("prompt", "blank")
        ]
        for i, one in enumerate(part):
            places = [one.document(k) for k in range(one.count)]
            if any(one.blank.positions(f"document_{k}") != places[k] for k in range(one.count)):
                raise PromptError(
                    f"the documents of prompt {first + i} do not stand where they do in its blank "
                    "prompt; put the question behind them."
                )
            end = places[-1][-1] + 1
            made = relevance(*(torch.tensor(x[i][..., :end]) for x in received), documents=places)
            values[first + i, ..., : one.count] = made.numpy()
    place = np.array([one.place for one in asked])
    own = np.take_along_axis(values, place[:, None, None, None], -1)[..., 0]
    eligible = np.isfinite(own).all(0) & np.stack([
        np.isfinite(v[..., : one.count]).all(-1) for v, one in zip(values, asked)]).all(0)
    others = np.stack([
        (v[..., : one.count].sum(-1) - g) / max(one.count - 1, 1)
        for v, g, one in zip(values, own, asked)])
    gains = np.stack([
        ndcg(torch.tensor(v[..., : one.count]), one.place).numpy()
        for v, one in zip(values, asked)])
    error = own.std(0, ddof=1) / np.sqrt(len(own)) if len(own) > 1 else np.full(own.shape[1:], np.nan)
    grid = ("layer", "head")
    data = xr.Dataset(
        {
            "score": (grid, own.mean(0)), "frequency": (grid, (gains == 1.0).mean(0)),
            "standard_error": (grid, error), "null": (grid, others.mean(0)),
            "ndcg": (grid, np.where(eligible, gains.mean(0), np.nan)), "eligible": (grid, eligible),
            "documents": (("sample", *grid, "document"), values), "place": ("sample", place),
        },
        {"sample": np.arange(len(asked)), "layer": np.arange(model.n_layers),
         "head": np.arange(model.n_heads)},
    )
    return Result(data, {**model.manifest(), "measure": "query_focused", "cut": CUT,
                         "n_prompts": len(asked)})


def _received(
    model: Model, prompts: Sequence[Prompt], asked: Sequence[Documents], batch_size: int
) -> list[np.ndarray]:
    """Mean attention from the rows behind the documents, `[layer, head, key]` per prompt."""
    ends = [max(one.prompt.positions("document")) + 1 for one in asked]
    run = model.run(
        list(prompts), logits="none", batch_size=batch_size,
        stats=[PerLayer("received", lambda i, layer: Received(subset=slice(ends[i], None)))],
    )
    return [run.stats["received"].isel(prompt=i).values for i in range(len(prompts))]


def rank(
    found: Result, heads: Union[HeadLike, Iterable[HeadLike]]
) -> Float[np.ndarray, "sample document"]:
    """Relevance of every document, summed over some heads: the paper's reranker.

    Raises `OutOfRange` for a head that was not measured.
    """
    chosen = as_heads(heads)
    values = found["documents"]
    check_heads(chosen, values.sizes["layer"], values.sizes["head"])
    return np.sum([values.isel(layer=h.layer, head=h.head).values for h in chosen], axis=0)


def auroc(
    found: Result, heads: Union[HeadLike, Iterable[HeadLike]]
) -> Float[np.ndarray, "sample"]:
    """For every sample, the share of other documents that these heads rank below the gold one.

    Ties count half; the mean over samples is the AUROC within prompts.
    """
    values, place = rank(found, heads), found["place"].values
    own = np.take_along_axis(values, place[:, None], 1)
    others = np.isfinite(values)
    others[np.arange(len(values)), place] = False
    below = np.where(values < own, 1.0, np.where(values == own, 0.5, 0.0))
    return (below * others).sum(1) / np.maximum(others.sum(1), 1)


def scores(found: Result, by: str = "score") -> HeadScores:
    """Head scores of a measurement, by "score" or by "ndcg"."""
    return HeadScores.of(
        found[by].values, frequency=found["frequency"].values, eligible=found["eligible"].values,
        standard_error=found["standard_error"].values if by == "score" else None,
    )


def draw(found: Result, ax: Axes, mark: Sequence = ()) -> Axes:
    """Head map of the calibrated relevance of the gold document."""
    return head_grid.draw(ax, scores(found), label="calibrated relevance of the gold document",
                          mark=mark)
