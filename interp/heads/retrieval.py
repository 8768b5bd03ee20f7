"""Retrieval heads: heads whose top-attended key is the needle token that is being emitted.

Paper     arXiv:2404.15574
Question  Which heads copy facts from anywhere in a long context into the answer?
Measure   share of the needle's tokens that a head points at in the very step that emits them
Cause     ablate the top heads, and as many random heads of the same layers: only the first must
          lose the needle
"""

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Optional, SupportsIndex

import numpy as np
import torch
import xarray as xr
from jaxtyping import Float, Int
from torch import Tensor

from interp.core.errors import NumericalError, OutOfRange, ResultCorrupted
from interp.core.scores import HeadScores

Mode = Literal["set", "official"]
Ids = Sequence[SupportsIndex] | np.ndarray | Tensor
Span = Sequence[SupportsIndex] | np.ndarray | Tensor | slice


def score(
    decode_attention: Float[Tensor | np.ndarray, "step layer head key"],
    prompt_ids: Ids,
    emitted: Ids,
    needle: Span,
    mode: Mode = "set",
) -> Float[Tensor, "layer head"]:
    """Share of the needle that each head points at while it is emitted.

    Example:
        >>> attention = torch.zeros(2, 1, 2, 6)  # two steps, heads L0H0 and L0H1
        >>> attention[0, 0, 0, 3] = attention[1, 0, 0, 4] = 1.0  # L0H0 follows the needle
        >>> attention[:, 0, 1, 0] = 1.0
        >>> score(attention, [7, 7, 7, 50, 51, 7], emitted=[50, 51], needle=(3, 5))
        tensor([[1., 0.]], dtype=torch.float64)

    Args:
        decode_attention: for each emitted token the row that predicts it, one row per head. Keys
            beyond the current length are 0.
        prompt_ids: tokens of the prompt.
        emitted: the token that each step emits, by argmax of the same step.
        needle: (start, stop) of the answer's tokens in the prompt: not the whole inserted
            sentence.
        mode: "set" counts each needle position once, as in the paper's |g_h and k| / |k|, so that
            the score is at most 1. "official" pays a needle token every time it is emitted, as in
            the released code, and can exceed 1.

    Returns:
        `[layer, head]`, float64. A head scores in a step if its top key lies in the needle and
        holds the emitted token. Ties go to the earliest key; a row without attention has no top
        key.

    Raises:
        ValueError: step counts that differ, an empty needle, more prompt tokens than keys.
        OutOfRange: a needle outside the prompt.
        NumericalError: NaN in the attention.

    Source: arXiv:2404.15574, equation 1; released code `retrieval_head_detection.py`.
    """
    rows = torch.as_tensor(decode_attention)
    if not torch.isfinite(rows).all():
        raise NumericalError("decode_attention contains NaN or infinity; recompute it in float32.")
    if rows.shape[-1] < len(prompt_ids):
        raise ValueError(
            f"decode_attention has {rows.shape[-1]} keys but the prompt has {len(prompt_ids)} "
            "tokens; give the rows over the whole context."
        )
    # argmax gives the first of equal weights.
    first = rows.argmax(-1)
    top = torch.where(rows.amax(-1) > 0, first, torch.full_like(first, -1))
    return score_from_top_keys(top, prompt_ids, emitted, needle, mode)


def score_from_top_keys(
    top_keys: Int[Tensor | np.ndarray, "step layer head"],
    prompt_ids: Ids,
    emitted: Ids,
    needle: Span,
    mode: Mode = "set",
) -> Float[Tensor, "layer head"]:
    """The same score from the top key of every step and head, as streamed statistics give it.

    Example:
        >>> score_from_top_keys(torch.tensor([[[3, 0]], [[4, 0]]]), [7, 7, 7, 50, 51], [50, 51],
        ...                     (3, 5))
        tensor([[1., 0.]], dtype=torch.float64)

    A key of -1 means that the head attends to nothing. Other arguments as in `score`.
    """
    top = torch.as_tensor(top_keys).cpu()
    prompt, spoken = _ids(prompt_ids), _ids(emitted)
    start, stop = _span(needle, len(prompt))
    if len(spoken) != len(top):
        raise ValueError(
            f"{len(spoken)} emitted tokens but attention of {len(top)} steps; give one row per "
            "emitted token."
        )
    places = torch.arange(start, stop)
    # hit[step, layer, head, i]: the head points at needle token i while the model emits it.
    hit = top[..., None] == places
    hit &= (prompt[start:stop] == spoken[:, None])[:, None, None]
    found = hit.any(0).sum(-1) if mode == "set" else hit.sum((0, -1))
    return found.double() / len(places)


@dataclass(frozen=True, eq=False)
class RetrievalScores(HeadScores):
    """Mean retrieval score per head, its activation frequency, and the score in every sample.

    `frequency` is the share of samples in which the head points at one needle token or more;
    `samples` [sample, layer, head] holds the single scores.

    Example:
        >>> found = aggregate(torch.tensor([[[0.5, 0.0]], [[1.0, 0.0]]]))
        >>> found.top(1), found["L0H0"], float(found.frequency[0, 0]), found.samples.sizes["sample"]
        ([L0H0], 0.75, 1.0, 2)
    """

    samples: Optional[xr.DataArray] = None


def aggregate(samples: Float[Tensor | np.ndarray, "sample layer head"]) -> RetrievalScores:
    """Mean score, activation frequency and standard error of every head over samples.

    Example:
        >>> aggregate(torch.tensor([[[0.5, 0.0]], [[1.0, 0.0]]])).max()
        0.75

    Give only samples whose answer contained the needle, as the paper does (ROUGE-1 recall above
    50), and report the failures as a map of their own: selection on success biases upwards.

    Raises:
        NumericalError: NaN in a score.
    """
    values = torch.as_tensor(samples).detach().cpu().double().numpy()
    if not np.isfinite(values).all():
        raise NumericalError("a retrieval score is NaN or infinite.")
    n = len(values)
    error = values.std(0, ddof=1) / np.sqrt(n) if n > 1 else np.full(values.shape[1:], np.nan)
    plain = HeadScores.of(values.mean(0), frequency=(values > 0).mean(0), standard_error=error)
    coordinates = {"sample": np.arange(n), "layer": plain.scores["layer"],
                   "head": plain.scores["head"]}
    labelled = xr.DataArray(values, coordinates, ("sample", "layer", "head"))
    return RetrievalScores(plain.scores, plain.frequency, plain.standard_error, None, labelled)


def read_released(
    path: str | os.PathLike, drop_empty_samples: bool = False
) -> RetrievalScores:
    """Read a head-score file released with the paper ("layer-head" to one score per sample).

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     file = Path(folder) / "model.json"
        ...     _ = file.write_text('{"0-0": [0.5, 1.0], "0-1": [0, 0.25]}')
        ...     read_released(file).top(1)
        [L0H0]

    Args:
        drop_empty_samples: leave out samples in which every head scores zero: in the released
            files most likely samples whose needle was not located.

    Raises:
        FileNotFoundError: no such file.
        ResultCorrupted: not such a file, heads missing, or sample counts that differ.
    """
    name = Path(path).name
    try:
        with open(path, encoding="utf-8") as file:
            content = json.load(file)
        table = {tuple(int(part) for part in key.split("-")): values
                 for key, values in content.items()}
        n_layers, n_heads = (max(key[axis] for key in table) + 1 for axis in (0, 1))
        wanted = [(layer, head) for layer in range(n_layers) for head in range(n_heads)]
        if sorted(table) != wanted:
            raise ValueError(f"it has {len(table)} heads, not {n_layers} x {n_heads}")
        values = np.array([table[key] for key in wanted], dtype=np.float64)
        if values.ndim != 2 or not values.shape[1]:
            raise ValueError("heads have no samples, or not the same number of them")
    except (ValueError, TypeError, AttributeError, IndexError) as problem:
        raise ResultCorrupted(
            f"{name} is not a released head-score file: {problem}; it must be one JSON object, "
            "'layer-head' to a list of scores."
        ) from problem
    samples = values.reshape(n_layers, n_heads, -1).transpose(2, 0, 1)
    if drop_empty_samples:
        samples = samples[(samples > 0).any((1, 2))]
        if not len(samples):
            raise ResultCorrupted(f"{name} has no sample in which a head scores above zero.")
    return aggregate(samples)


def _ids(given: Ids) -> Tensor:
    if isinstance(given, Tensor):
        return given.detach().cpu().long().reshape(-1)
    return torch.from_numpy(np.array(given, dtype=np.int64).reshape(-1))


def _span(needle: Span, n_tokens: int) -> tuple[int, int]:
    if isinstance(needle, slice):
        if needle.step not in (None, 1) or needle.start is None or needle.stop is None:
            raise ValueError(f"needle must be one stretch, start to stop, not {needle}.")
        ends = [needle.start, needle.stop]
    else:
        ends = [int(end) for end in needle]
    if len(ends) != 2:
        raise ValueError(f"needle must be (start, stop), not {len(ends)} numbers.")
    start, stop = ends
    if start >= stop:
        raise ValueError(f"the needle is empty: start {start}, stop {stop}.")
    if start < 0 or stop > n_tokens:
        raise OutOfRange(f"needle ({start}, {stop}) is outside the prompt of {n_tokens} tokens.")
    return start, stop
