"""Retrieval heads: heads whose top-attended key is the needle token that is being emitted.

Paper     arXiv:2404.15574
Question  Which heads copy facts from anywhere in a long context into the answer?
Measure   share of the needle's tokens that a head points at in the very step that emits them
Cause     ablate the top heads, and as many random heads of the same layers: only the first must
          lose the needle
"""

import json
import os
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Optional, SupportsFloat, SupportsIndex

import numpy as np
import torch
import xarray as xr
from jaxtyping import Float, Int
from matplotlib.axes import Axes
from torch import Tensor

from interp.core import Prompt, Result
from interp.core.errors import NumericalError, OutOfRange, PromptError, ResultCorrupted
from interp.core.result import write_atomically
from interp.core.scores import HeadScores
from interp.figures import heat
from interp.figures.style import style
from interp.heads.decoding_rows import Spoken, answer_ends, spoken_rows
from interp.models.model import Model

RETRIEVAL, STRONG = 0.1, 0.5
"""A head with a score of at least 0.1 is a retrieval head (arXiv:2404.15574); 0.5 is an edge of the
paper's bins, and "strong" a word of this package."""

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


def chance(
    emitted: Ids, needle_ids: Ids, visible: Ids, mode: Mode = "set"
) -> float:
    """The score expected of a head whose top key is any visible key, all equally likely.

    Example:
        >>> chance([50, 51], [50, 51], visible=[4, 4])
        0.25

    Args:
        visible: number of keys that the row of each step can see.
    """
    said, there, seen = _ids(emitted), _ids(needle_ids), _ids(visible).double()
    hit = (said[:, None] == there) / seen[:, None]
    each = 1 - (1 - hit).prod(0) if mode == "set" else hit.sum(0)
    return float(each.mean())


def recall(answer: Ids, emitted: Ids, tokenizer: Any = None) -> float:
    """Unigram recall of the answer: which share of its words is emitted, each as often as it says.

    Example:
        >>> recall([5, 6, 6, 7], [6, 5, 9])
        0.5

    With a tokenizer the words of the decoded texts are compared (lower case, letters and digits,
    as ROUGE-1 does, without stemming), otherwise token ids.
    """
    wanted, said = _ids(answer).tolist(), _ids(emitted).tolist()
    if tokenizer is not None:
        words = [re.findall(r"[^\W_]+", tokenizer.decode(ids, skip_special_tokens=True).lower())
                 for ids in (wanted, said)]
        if words[0]:
            wanted, said = words
    common = Counter(wanted) & Counter(said)
    return sum(common.values()) / len(wanted)


def measure(
    model: Model,
    prompts: Sequence[Prompt],
    *,
    mode: Mode = "set",
    new_tokens: Optional[SupportsIndex] = None,
    stop: Sequence[SupportsIndex] = (),
    min_recall: SupportsFloat = 0.5,
    needle: str = "needle_value",
    batch_size: int = 8,
) -> Result:
    """Retrieval scores of every head, from the rows that predict what the model says by itself.

    Example:
        >>> import interp
        >>> from interp.organisms import reader
        >>> from interp.prompts.needle import synthetic
        >>> model = interp.open_model("reader")
        >>> made = synthetic(reader.needle, (64,), (0.2, 0.8), np.random.default_rng(0))
        >>> found = measure(model, [one.prompt for one in made])
        >>> found["score"].dims, found.manifest["n_kept"]
        (('layer', 'head'), 2)

    Args:
        prompts: each with a segment `needle`: the answer's tokens, in one stretch.
        mode: of `score`; the other form is there as `official` or `set`.
        new_tokens: steps to decode; twice the longest answer and 8 more, at most 50, if None.
        stop: ids that end an answer, beside the model's end-of-text token and a line end.
        min_recall: only prompts whose `recall` is above this count, as in the paper (ROUGE-1 above
            50): the others did not retrieve.
        batch_size: how many prompts of equal length share a pass.

    Returns:
        `score`, `frequency`, `standard_error`, `null` (chance level if every visible key were as
        likely), `shuffled` (steps in another order: needle tokens, but not the emitted one),
        `eligible` [layer, head], over the kept samples; `set` and `official`, `on_first`,
        `on_needle` (mean attention of the rows on token 0 and on the needle), `visible` [sample,
        layer, head]; `recall`, `kept` [sample]. No sample kept: NaN scores and a note in the
        manifest. A head is eligible if it saw the whole needle in every kept sample.

    Raises:
        SegmentNotFound: a prompt without that segment.
        PromptError: an empty or scattered needle; no room to decode.

    Only the top key of each row leaves the stream; selection on success biases scores upwards.

    Source: arXiv:2404.15574, equation 1 and released code `retrieval_head_detection.py`.
    """
    spans = [_stretch(prompt, needle, i) for i, prompt in enumerate(prompts)]
    if not spans:
        raise PromptError("no prompts to measure retrieval on: give at least one.")
    longest = max(stop_ - start for start, stop_ in spans)
    steps = min(50, 2 * longest + 8) if new_tokens is None else int(new_tokens)
    if steps < 1:
        raise PromptError("retrieval is seen while the model speaks: ask for new_tokens >= 1.")
    if model.max_positions and new_tokens is None:
        steps = max(1, min(steps, model.max_positions - max(map(len, prompts))))
    ends = {int(token) for token in stop} | answer_ends(model)
    spoken = spoken_rows(model, prompts, spans, steps, ends, batch_size)
    rows = [_sample(model, *given) for given in zip(prompts, spans, spoken)]
    samples = {name: np.stack([row[name] for row in rows]) for name in rows[0]}
    kept = samples["recall"] > float(min_recall)
    return Result(_summarized(samples, kept, mode), {
        **model.manifest(), "measure": "retrieval", "mode": mode, "new_tokens": steps,
        "needle": needle, "min_recall": float(min_recall), "n_prompts": len(prompts),
        "n_kept": int(kept.sum()), **({} if kept.any() else {
            "note": "no prompt passed the success filter: the scores are NaN, not zero"}),
    })


def scores_of(found: Result) -> RetrievalScores:
    """What `measure` found as head scores, with the kept samples.

    Raises:
        ValueError: no sample was kept, so there is nothing to rank.
    """
    if not found.manifest["n_kept"]:
        raise ValueError(
            f"none of {found.manifest['n_prompts']} prompts passed the success filter, so no head "
            "has a retrieval score; give prompts that the model can answer."
        )
    data = found.data
    samples = data[found.manifest["mode"]].isel(sample=np.flatnonzero(data["kept"].values))
    return RetrievalScores(data["score"], data["frequency"], data["standard_error"],
                           data["eligible"], samples)


@style()
def draw(found: Result | HeadScores, ax: Axes) -> Axes:
    """Head map of the scores in the paper's four bins: 0, below 0.1, below 0.5, from 0.5 on."""
    values = found["score"] if isinstance(found, Result) else found.scores
    eligible = found.data.get("eligible") if isinstance(found, Result) else found.eligible
    binned = xr.where(values > 0, 1.0 + (values >= RETRIEVAL) + (values >= STRONG), 0.0)
    binned = binned.where(values.notnull())
    heat.draw(ax, binned, limits=(-0.5, 3.5), signed=False, eligible=eligible, bar=False,
              hatched="cannot see the needle")
    bar = ax.figure.colorbar(ax.images[0], ax=ax, label="retrieval score", pad=0.02,
                             boundaries=np.arange(5) - 0.5, ticks=range(4))
    bar.ax.set_yticklabels(["0", "< 0.1", "0.1 to 0.5", "≥ 0.5"])
    return ax


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


def write_released(scores: RetrievalScores, path: str | os.PathLike) -> Path:
    """Write scores as the released files are: "layer-head" to one score per sample.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     made = aggregate(torch.tensor([[[0.5, 0.0]], [[1.0, 0.25]]]))
        ...     file = write_released(made, Path(folder) / "model.json")
        ...     file.read_text(), read_released(file).top(1)
        ('{"0-0": [0.5, 1.0], "0-1": [0.0, 0.25]}', [L0H0])

    The file is replaced, never appended to. It has no room for eligibility.

    Raises:
        ValueError: scores without samples.
        NumericalError: NaN in a score, for which the format has no word.
    """
    if scores.samples is None or not scores.samples.sizes["sample"]:
        raise ValueError("these scores hold no samples, so there is nothing to write; "
                         "use the scores of `scores_of` or `aggregate`.")
    values = scores.samples.transpose("layer", "head", "sample")
    if not np.isfinite(values.values).all():
        raise NumericalError("a retrieval score is NaN or infinite; leave that sample out.")
    content = {f"{int(layer)}-{int(head)}": values.sel(layer=layer, head=head).values.tolist()
               for layer in values["layer"] for head in values["head"]}
    write_atomically(Path(path), json.dumps(content))
    return Path(path)


def _stretch(prompt: Prompt, name: str, number: int) -> tuple[int, int]:
    segment = prompt.segment(name)
    if segment.stop - segment.start != len(segment):
        raise PromptError(
            f"segment {name!r} of prompt {number} has gaps; a needle is one stretch of tokens."
        )
    return segment.start, segment.stop


def _sample(
    model: Model, prompt: Prompt, span: tuple[int, int], one: Spoken
) -> dict[str, Any]:
    """Scores, chance levels and attention of one prompt."""
    said, n = one.emitted, len(one.emitted)
    inside = prompt.ids[slice(*span)]
    found: dict[str, Any] = {
        "recall": recall(inside, said, model.tokenizer) if n else 0.0,
        "on_first": one.on_first, "on_needle": one.on_span, "visible": one.visible,
    }
    empty = np.zeros((model.n_layers, model.n_heads))
    for mode in ("set", "official"):
        found[mode], found[f"null_{mode}"] = empty, np.nan
        found[f"shuffled_{mode}"] = np.full_like(empty, np.nan)
        if not n:
            continue
        rest = (prompt.ids, said, span, mode)
        found[mode] = score_from_top_keys(one.top_keys, *rest).numpy()
        turned = [score_from_top_keys(one.top_keys.roll(by, 0), *rest) for by in range(1, n)]
        if turned:
            found[f"shuffled_{mode}"] = torch.stack(turned).mean(0).numpy()
        found[f"null_{mode}"] = chance(said, inside, range(len(prompt), len(prompt) + n), mode)
    return found


def _summarized(samples: dict[str, np.ndarray], kept: np.ndarray, mode: Mode) -> xr.Dataset:
    n_layers, n_heads = samples["set"].shape[1:]
    n = int(kept.sum())
    per_head = ("sample", "layer", "head")
    data = xr.Dataset(
        {name: (per_head, samples[name])
         for name in ("set", "official", "on_first", "on_needle", "visible")},
        {"sample": np.arange(len(kept)), "layer": np.arange(n_layers), "head": np.arange(n_heads)},
    )
    data["recall"], data["kept"] = ("sample", samples["recall"]), ("sample", kept)
    empty = np.full((n_layers, n_heads), np.nan)
    chosen, both = samples[mode][kept], ("layer", "head")
    shuffled = samples[f"shuffled_{mode}"][kept]
    known = np.isfinite(shuffled[:, :1, :1]).any()
    data["score"] = both, chosen.mean(0) if n else empty
    data["frequency"] = both, (chosen > 0).mean(0) if n else empty
    data["standard_error"] = both, chosen.std(0, ddof=1) / np.sqrt(n) if n > 1 else empty
    null = samples[f"null_{mode}"][kept].mean() if n else np.nan
    data["null"] = both, np.full_like(empty, null)
    data["shuffled"] = both, np.nanmean(shuffled, 0) if known else empty
    data["eligible"] = both, samples["visible"][kept if n else slice(None)].all(0)
    return data


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
