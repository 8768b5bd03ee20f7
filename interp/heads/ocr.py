"""OCR heads: heads whose strongest attention falls on the patches where the emitted text is drawn.

Paper     arXiv:2505.15865
Question  Which heads read text in pictures, and are they the heads that retrieve from text?
Measure   share of the answer's tokens whose top prompt key, in the row that predicts the token, is a
          patch that holds it; the same for text, where the top key must hold the same token
Cause     ablate the top heads, and as many random heads of the same layers: reading must fail
"""

from collections.abc import Sequence
from typing import Any, Literal, Optional, SupportsFloat, SupportsIndex

import numpy as np
import torch
import xarray as xr
from jaxtyping import Bool, Float, Int
from matplotlib.axes import Axes
from torch import Tensor

from interp.core import Prompt, Result
from interp.core.errors import NumericalError, PromptError
from interp.core.scores import HeadScores
from interp.core.segment import Box, Segment
from interp.figures import head_grid
from interp.models.model import Model
from interp.stream.per_layer import PerLayer
from interp.stream.reducers import Received, TopKeys

Ids = Sequence[SupportsIndex] | np.ndarray | Tensor
Row = Literal["predicting", "own"]
Share = Literal["patch", "box", "smaller", "union", "released"]
Filter = Literal["none", "activated", "released"]

BINS = (0.0, 0.1, 0.3, 0.5, 1.0)
"""Upper edges of the paper's five classes of heads: 0, (0, .1], (.1, .3], (.3, .5], (.5, 1]."""


def overlap(patch: Box, box: Box, of: Share = "smaller") -> float:
    """The area that a patch and a box share, as a share of one of them.

    Example:
        >>> patch, word = (0, 0, 10, 10), (5, 0, 25, 10)
        >>> overlap(patch, word, "patch"), overlap(patch, word, "box"), overlap(patch, word)
        (0.5, 0.25, 0.5)

    Args:
        of: "patch", "box", "smaller" (the smaller of the two, so that neither a word that spans
            many patches nor one that fills a corner of a patch is lost), "union" (intersection
            over union), or "released": the released code's percent of the box, in which 0.1 means
            a thousandth.

    Source: arXiv:2505.15865 words it as a ratio above 0.1; its code as in "released".
    """
    width = max(0.0, min(patch[2], box[2]) - max(patch[0], box[0]))
    height = max(0.0, min(patch[3], box[3]) - max(patch[1], box[1]))
    shared = float(width * height)
    areas = [float((b[2] - b[0]) * (b[3] - b[1])) for b in (patch, box)]
    total = {"patch": areas[0], "box": areas[1], "smaller": min(areas),
             "union": sum(areas) - shared, "released": areas[1] / 100}
    if of not in total:
        raise ValueError(f"of must be one of {', '.join(map(repr, total))}, not {of!r}.")
    return shared / total[of] if total[of] > 0 else 0.0


def evidence(
    image: Segment, box: Box, min_share: SupportsFloat = 0.1, of: Share = "smaller"
) -> tuple[int, ...]:
    """Image tokens that hold a box: those that overlap it by more than `min_share`.

    Example:
        >>> image = Segment("image", (5, 6), "image", (1, 2), ((0, 0, 8, 8), (8, 0, 16, 8)))
        >>> evidence(image, (7, 0, 15, 8)), evidence(image, (7, 0, 15, 8), 0.0)
        ((5, 6), (5, 6))
        >>> evidence(image, (7, 0, 15, 8), 0.2)
        (6,)

    Args:
        box: (left, top, right, bottom) in the picture as it was given to `model.prompt`.
        of: what the overlap is a share of; see `overlap`.

    Raises:
        PromptError: an image without pixel boxes, or a box that no token holds.

    Source: arXiv:2505.15865, evidence tokens E_b.
    """
    if not image.boxes:
        raise PromptError(
            f"segment {image.name!r} has no pixel boxes: the geometry of this processor is not "
            "known; give the evidence tokens yourself."
        )
    found = tuple(p for p, own in zip(image.positions, image.boxes)
                  if own is not None and overlap(own, box, of) > float(min_share))
    if not found:
        raise PromptError(
            f"no image token overlaps the box {box} by more than {float(min_share):g} (share of "
            f"{of!r}); is the box in the pixels of the picture that the model was given?"
        )
    return found


def longest_run(answer: Ids, output: Ids) -> tuple[int, int, int]:
    """The longest stretch of tokens that answer and output share: (in answer, in output, length).

    Example:
        >>> longest_run([4, 7, 9], [1, 4, 7, 2])
        (0, 1, 2)

    Of equally long stretches the first in the output, then in the answer.
    """
    wanted, said = _ids(answer), _ids(output)
    best = (0, 0, 0)
    for j in range(len(said)):
        for i in range(len(wanted)):
            length = 0
            while (i + length < len(wanted) and j + length < len(said)
                   and wanted[i + length] == said[j + length]):
                length += 1
            if length > best[2]:
                best = (i, j, length)
    return best


def correctness(answer: Ids, output: Ids) -> float:
    """How much of the answer was said in one stretch: longest common run over its length.

    Example:
        >>> correctness([4, 7, 9], [1, 4, 7, 2])
        0.6666666666666666

    The output alone counts, without the prompt.

    Source: arXiv:2505.15865, the factor that grades a hit.
    """
    if not len(answer):
        raise ValueError("the answer is empty: give at least one token.")
    return longest_run(answer, output)[2] / len(answer)


def score(
    top_keys: Int[Tensor | np.ndarray, "step layer head"],
    output: Ids,
    answer: Ids,
    where: Sequence[Sequence[SupportsIndex]],
) -> Float[Tensor, "layer head"]:
    """Share of the answer that each head looks at, patch by patch, while it is emitted.

    Example:
        >>> top = torch.tensor([[[5, 0]], [[9, 6]]])  # two output tokens, heads L0H0 and L0H1
        >>> score(top, output=[4, 7], answer=[4, 7], where=[[5], [6, 7]])
        tensor([[0.5000, 0.5000]], dtype=torch.float64)

    Args:
        top_keys: for every output token the prompt position that each head attends to most, in
            the row that is looked at; -1 for none.
        output, answer: token ids.
        where: for every answer token the positions of its evidence.

    Returns:
        Hits over the length of the answer. A token hits if it belongs to the longest run that
        output and answer share and the head's top key lies in its evidence: the mean of the hits
        of what was said, times the `correctness`.

    Source: arXiv:2505.15865, OCR score of one sample.
    """
    top, (start, at, length) = _keys(top_keys, output), longest_run(answer, output)
    if len(where) != len(answer):
        raise ValueError(f"{len(answer)} answer tokens but evidence for {len(where)}.")
    hits = torch.zeros(top.shape[1:], dtype=torch.float64)
    for step in range(length):
        places = torch.tensor([int(p) for p in where[start + step]], dtype=torch.long)
        hits += torch.isin(top[at + step], places)
    return hits / len(answer)


def text_retrieval_score(
    top_keys: Int[Tensor | np.ndarray, "step layer head"],
    output: Ids,
    answer: Ids,
    prompt_ids: Ids,
) -> Float[Tensor, "layer head"]:
    """Share of the answer whose token each head looks at, in text, while it is emitted.

    Example:
        >>> top = torch.tensor([[[1, 0]], [[2, 2]]])
        >>> text_retrieval_score(top, [4, 7], [4, 7], prompt_ids=[9, 4, 7])
        tensor([[1.0000, 0.5000]], dtype=torch.float64)

    Any prompt key with the same token counts; `interp.heads.retrieval` counts the needle only.
    Graded exactly as `score`.

    Source: arXiv:2505.15865, the text retrieval score it compares with.
    """
    ids = _ids(prompt_ids)
    same = [[p for p, token in enumerate(ids) if token == wanted] for wanted in _ids(answer)]
    return score(top_keys, output, answer, same)


def select(
    samples: Float[Tensor | np.ndarray | xr.DataArray, "sample layer head"],
    threshold: SupportsFloat = 0.1,
    min_frequency: SupportsFloat = 0.1,
    filter: Filter = "none",
) -> Bool[Tensor, "layer head"]:
    """Heads whose mean score is above a threshold, with or without a filter on how often they act.

    Example:
        >>> samples = torch.tensor([[[1.0, 0.9]], [[1.0, 0.0]]])
        >>> select(samples), select(samples, filter="released")
        (tensor([[True, True]]), tensor([[False,  True]]))

    Args:
        filter: "none"; "activated": above the threshold in at least `min_frequency` of the
            samples, as the paper says; "released": what its code does, the inverse: it keeps the
            heads that are zero in more than `min_frequency` of the samples, so that a head which
            always reads is thrown out. Use that only to reproduce the released lists.

    Source: arXiv:2505.15865; released code `step3_extracted_heads.py`.
    """
    values = torch.as_tensor(np.asarray(samples))
    if not torch.isfinite(values).all():
        raise NumericalError("a score is NaN or infinite; leave those samples out.")
    chosen = values.mean(0) > float(threshold)
    if filter == "activated":
        chosen &= (values > float(threshold)).double().mean(0) >= float(min_frequency)
    elif filter == "released":
        chosen &= (values == 0).double().mean(0) > float(min_frequency)
    elif filter != "none":
        raise ValueError(f"filter must be 'none', 'activated' or 'released', not {filter!r}.")
    return chosen


def in_bins(scores: Float[Tensor | np.ndarray | xr.DataArray, "layer head"]) -> list[int]:
    """Number of heads in each of the paper's five classes of score.

    Example:
        >>> in_bins(np.array([[0.0, 0.1, 0.2, 0.4, 0.9, 0.05]]))
        [1, 2, 1, 1, 1]
    """
    values = np.asarray(scores, dtype=float).ravel()
    values = values[np.isfinite(values)]
    edges = np.array(BINS)
    return np.bincount(np.searchsorted(edges, values, "left"), minlength=len(BINS)).tolist()


def measure(
    model: Model,
    prompts: Sequence[Prompt],
    answers: Sequence[Ids],
    where: Sequence[Sequence[Sequence[SupportsIndex]]],
    *,
    row: Row = "predicting",
    new_tokens: Optional[int] = None,
    threshold: SupportsFloat = 0.1,
    batch_size: int = 8,
) -> Result:
    """OCR score of every head over prompts with pictures of text.

    Example:
        >>> import interp
        >>> model = interp.open_model("backcopy-1l")
        >>> prompt = Prompt.from_tokens(range(9), {"image": (2, 6)})
        >>> said = model.run(prompt, new_tokens=1).new_tokens[0]
        >>> found = measure(model, [prompt], [said], [[[3]]])
        >>> found["samples"].dims, float(found["correctness"][0])
        (('sample', 'layer', 'head'), 1.0)

    Args:
        prompts: each with a segment of kind "image".
        answers: token ids of each answer, as the model would say it.
        where: for every prompt and answer token the positions of its evidence (`evidence`).
        row: "predicting": the row that predicts the token. "own": the row whose query is the
            token, which the released code reads.
        new_tokens: length of the output; None: one more than the longest answer.
        threshold: above it a head is activated, for `frequency`.

    Returns:
        Per sample: `samples` (the graded score), `null_samples` (what it would be on average had
        the evidence lain anywhere in the image), `correctness`. Per head: `score`,
        `standard_error`, `frequency`, `null`, `eligible` (False where a sliding window hides some
        evidence). If nothing at all was answered, scores are NaN and the manifest's `note` says so.

    Source: arXiv:2505.15865.
    """
    for number, (answer, places) in enumerate(zip(answers, where, strict=True)):
        if len(places) != len(answer):
            raise ValueError(f"prompt {number}: {len(answer)} answer tokens but evidence for "
                             f"{len(places)}; give the positions of every token.")
    images = [sorted({p for s in prompt.of_kind("image") for p in s.positions})
              for prompt in prompts]
    for number, own in enumerate(images):
        if not own:
            raise PromptError(f"prompt {number} has no image: make it with "
                              "model.prompt(..., images=[...]).")

    def one(number: int, top: Tensor, output: list[int]) -> tuple[Tensor, Tensor]:
        answer, places = answers[number], where[number]
        start, at, length = longest_run(answer, output)
        chance = torch.zeros(top.shape[1:], dtype=torch.float64)
        inside = torch.tensor(images[number])
        for step in range(length):
            share = len(set(map(int, places[start + step]))) / len(inside)
            chance += torch.isin(top[at + step], inside) * share
        return score(top, output, answer, places), chance / len(answer)

    watched = [sorted({int(p) for some in places for p in some}) for places in where]
    return _measure(model, prompts, answers, one, watched, row, new_tokens, threshold, batch_size,
                    "ocr_heads")


def measure_text_retrieval(
    model: Model,
    prompts: Sequence[Prompt],
    answers: Sequence[Ids],
    *,
    row: Row = "predicting",
    new_tokens: Optional[int] = None,
    threshold: SupportsFloat = 0.1,
    batch_size: int = 8,
) -> Result:
    """Text retrieval score of every head, graded as the OCR score, over prompts that hold the answer.

    Example:
        >>> import interp
        >>> model = interp.open_model("backcopy-1l")
        >>> prompt = Prompt.from_tokens(range(9))
        >>> said = model.run(prompt, new_tokens=1).new_tokens[0]
        >>> measure_text_retrieval(model, [prompt], [said]).manifest["measure"]
        'text_retrieval'

    Arguments and result as of `measure`; the chance level is that of a top key drawn evenly from
    the prompt.
    """
    same = [[[p for p, token in enumerate(prompt.ids) if token == wanted]
             for wanted in _ids(answer)] for prompt, answer in zip(prompts, answers, strict=True)]

    def one(number: int, top: Tensor, output: list[int]) -> tuple[Tensor, Tensor]:
        answer, prompt = answers[number], prompts[number]
        start, _, length = longest_run(answer, output)
        chance = sum(len(p) for p in same[number][start : start + length]) / len(prompt)
        return (text_retrieval_score(top, output, answer, prompt.ids),
                torch.full(top.shape[1:], chance / len(answer), dtype=torch.float64))

    watched = [sorted({p for some in places for p in some}) for places in same]
    return _measure(model, prompts, answers, one, watched, row, new_tokens, threshold, batch_size,
                    "text_retrieval")


def _measure(
    model: Model, prompts: Sequence[Prompt], answers: Sequence[Ids], one: Any,
    watched: Sequence[Sequence[int]], row: Row, new_tokens: Optional[int],
    threshold: SupportsFloat, batch_size: int, name: str,
) -> Result:
    if row not in ("predicting", "own"):
        raise ValueError(f"row must be 'predicting' or 'own', not {row!r}.")
    if not len(prompts):
        raise PromptError("no prompts to measure: give at least one.")
    steps = new_tokens or max(map(len, answers)) + 1
    scores, nulls, right, seen, layers = [], [], [], [], np.arange(model.n_layers)
    for first in range(0, len(prompts), batch_size):
        some = prompts[first : first + batch_size]
        # As many generated keys may stand before the best key of the prompt.
        stats = [TopKeys(steps + 1), PerLayer(
            "received", lambda n, _, some=some: Received(subset=[len(some[n]) - 1]))]
        run = model.run(some, new_tokens=steps, stats=stats, logits="none", batch_size=batch_size)
        layers = run.stats["top_keys"]["layer"].values
        for number, prompt in enumerate(some, first):
            output = run.new_tokens[number - first]
            keys = run.stats["top_keys"].isel(prompt=number - first)
            top = _top_prompt_keys(keys, len(prompt), row, len(output))
            value, chance = one(number, top, output)
            scores.append(value.numpy())
            nulls.append(chance.numpy())
            right.append(correctness(answers[number], output))
            last = run.stats["received"].values[number - first]
            seen.append(np.isfinite(last[..., list(watched[number])]).all(-1))
    dims = ("sample", "layer", "head")
    samples, null = np.stack(scores), np.stack(nulls)
    manifest = {**model.manifest(), "measure": name, "row": row, "threshold": float(threshold),
                "samples": len(prompts), "answered": int(np.sum(np.array(right) > 0)),
                "answered in full": int(np.sum(np.array(right) == 1))}
    if not manifest["answered"]:
        samples = np.full_like(samples, np.nan)
        manifest["note"] = (f"none of {len(prompts)} answers was given, not even in part, so no "
                            "head can be scored")
    n = len(samples)
    data = xr.Dataset({
        "samples": (dims, samples), "null_samples": (dims, null),
        "correctness": ("sample", np.array(right)),
        "eligible": (dims[1:], np.stack(seen).all(0)),
    }, {"layer": layers, "head": np.arange(samples.shape[2])})
    data["score"] = data["samples"].mean("sample", skipna=False)
    data["standard_error"] = data["samples"].std("sample", ddof=1, skipna=False) / np.sqrt(n) \
        if n > 1 else data["score"] * np.nan
    above = (data["samples"] > float(threshold)).where(data["samples"].notnull())
    data["frequency"] = above.mean("sample", skipna=False)
    data["null"] = data["null_samples"].mean("sample")
    return Result(data, manifest)


def _top_prompt_keys(top: xr.DataArray, n_prompt: int, row: Row, steps: int) -> Tensor:
    """[step, layer, head]: the strongest key of the prompt for each output token, -1 for none."""
    first = n_prompt - (row == "predicting")
    some = top.isel(query=slice(first, first + steps)).transpose(
        "query", "layer", "head", "rank", "quantity")
    key, value = (some.sel(quantity=name).values for name in ("key", "value"))
    with np.errstate(invalid="ignore"):
        fits = (key < n_prompt) & (value > 0)
    best = np.take_along_axis(key, fits.argmax(-1)[..., None], -1)[..., 0]
    return torch.from_numpy(np.where(fits.any(-1), best, -1).astype(np.int64))


def head_scores(found: Result) -> HeadScores:
    """The scores of `measure` to rank heads by.

    Example:
        >>> one = xr.DataArray([[0.0, 0.5]], {"layer": [3], "head": [0, 1]}, ("layer", "head"))
        >>> data = xr.Dataset({"score": one, "frequency": one, "standard_error": one,
        ...                    "eligible": one >= 0})
        >>> head_scores(Result(data)).top(1)
        [L3H1]
    """
    return HeadScores(found["score"], found["frequency"], found["standard_error"],
                      found["eligible"].astype(bool))


def draw(found: Result, ax: Axes) -> Axes:
    """Head map of the score; heads that cannot see the evidence are hatched."""
    return head_grid.draw(ax, head_scores(found), label="share of answer tokens", limits=(0, 1),
                          hatched="cannot see the evidence")


def _keys(top_keys: Tensor | np.ndarray, output: Ids) -> Tensor:
    top = torch.as_tensor(top_keys).cpu()
    if len(top) != len(output):
        raise ValueError(f"{len(output)} output tokens but top keys of {len(top)} rows; give one "
                         "row per output token.")
    return top


def _ids(given: Ids) -> list[int]:
    return [int(i) for i in given]
