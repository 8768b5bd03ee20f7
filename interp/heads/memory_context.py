"""Memory heads and context heads: who writes what the model knows, and who what the text says.

Paper     PH3, arXiv:2402.18154 (its exact score could not be confirmed; the one here is the
          toolkit's own); superposition of both signals in a head: arXiv:2503.10996
Question  Under a knowledge conflict, which heads push toward which answer?
Measure   S_m: path patching from each head to the logits, the change of the stated answer's logit
          minus that of the memorized one
Cause     prune one kind (`interp.causal.prune`) and see which answer wins
"""

from collections.abc import Iterable, Sequence
from typing import Any, SupportsFloat, SupportsIndex, Union

import numpy as np
import torch
import xarray as xr
from jaxtyping import Float, Int
from matplotlib.axes import Axes
from torch import Tensor

from interp.causal.controls import most_excludable
from interp.causal.metrics import TextLoss
from interp.causal.patch import AnswerLogits, path_attribution, path_patching
from interp.causal.prune import Answers, Source, ranked
from interp.causal.sweep import ablation_sweep
from interp.core import Head, HeadScores, OutOfRange, Prompt, PromptError, Result
from interp.core.head import HeadLike
from interp.figures import head_grid
from interp.models.model import Model
from interp.prompts.conflict import Conflict

NULLS = 20
"""Pairs of other answers by which the chance level of every prompt is measured."""

LEVEL = 0.95
"""Which quantile of |S_m| for other answers is the chance level."""


def score(
    change: Float[Tensor | np.ndarray, "sample layer head answer"],
) -> Float[Tensor, "layer head"]:
    """S_m: the mean over prompts of the stated answer's change minus the memorized one's.

    Example:
        >>> score(np.array([[[[1.0, -2.0], [-1.0, 0.5]]]]))
        tensor([[ 3.0000, -1.5000]], dtype=torch.float64)

    Args:
        change: logits after the head's output was replaced minus before, of the stated answer
            (0) and of the memorized answer (1).

    Above zero: without the head memory loses and the context gains, so it is a memory head; below
    zero a context head. In logits. Source: this toolkit's, after the idea of arXiv:2402.18154.
    """
    values = torch.as_tensor(change).double()
    return (values[..., 0] - values[..., 1]).mean(0)


def measure(
    model: Model,
    cases: Sequence[Conflict],
    *,
    heads: Union[Iterable[HeadLike], None] = None,
    screen: Union[SupportsFloat, None] = None,
    engine: str = "auto",
    seed: SupportsIndex = 0,
    batch_size: int = 8,
) -> Result:
    """S_m of every head, exactly by path patching, or of those that a gradient singles out.

    Example:
        >>> import interp
        >>> model = interp.open_model("backcopy-3l")
        >>> case = Conflict(Prompt.from_tokens([1, 5, 8, 2, 5]), Prompt.from_tokens([1, 6, 9, 2, 6]),
        ...                 Prompt.from_tokens([2, 5]), memory=(7,), context=(8,))
        >>> found = measure(model, [case])
        >>> found["score"].dims, found["samples"].dims
        (('layer', 'head'), ('sample', 'layer', 'head'))

    A head's output is what it is in the twin (which points to neither answer), all other heads'
    outputs stay as they were, MLPs and norms recompute up to the logits.

    Args:
        cases: conflicts that passed the closed-book check; with none of them all scores are NaN.
        heads: heads to patch; all for None.
        screen: patch only this share of the heads, those with the largest first-order effect
            (`path_attribution`: one gradient per prompt); the others are not eligible.
        engine: see `path_patching`.

    Returns:
        `[layer, head]`: `score`, `frequency` (share of prompts in which the head acts for memory),
        `standard_error`, `null` (the 95 % quantile of |score| for other answers of the same cases
        in place of the two: what a head does to answers at large), `eligible`; `placebo`
        `[..., pair]`, the scores for those other answers; `estimate` with `screen`.
        `[sample, layer, head]`: `samples` (S_m per prompt), `share` (the same for
        p_context / (p_context + p_memory)), `context`, `memory` (change of either logit).
        `before` `[sample]`: the context's lead over memory in the untouched prompt, in logits.
    """
    cases = list(cases)
    size = (model.n_layers, model.n_heads)
    about = {**model.manifest(), "measure": "memory_context", "unit": "logits",
             "formula": "mean of (change of the stated answer's logit - change of the memorized "
             "answer's logit); this toolkit's own", "n": len(cases),
             "cases": [[c.relation, c.format, c.subject] for c in cases]}
    if not cases:
        nothing = np.full(size, np.nan)
        empty: dict[str, Any] = {name: (("layer", "head"), nothing)
                                 for name in ("score", "frequency", "standard_error", "null")}
        empty["eligible"] = (("layer", "head"), np.zeros(size, dtype=bool))
        empty["placebo"] = (("layer", "head", "pair"), np.zeros((*size, 0)))
        return Result(xr.Dataset(empty, _numbers(model)), {
            **about, "note": "no conflict was given: none passed the closed-book check"})
    clean, twin = [c.clean for c in cases], [c.corrupt for c in cases]
    eligible = np.zeros(size, dtype=bool)
    estimate = None
    if screen is not None:
        if heads is not None or not 0 < float(screen) <= 1:
            raise ValueError("give screen a share from 0 to 1, and no heads beside it.")
        guess = path_attribution(model, clean, twin, *zip(*(c.tokens for c in cases)),
                                 batch_size=batch_size)["estimate"]
        estimate = guess.mean("prompt")
        count = max(1, round(float(screen) * size[0] * size[1]))
        heads = HeadScores(abs(estimate)).top(count)
    chosen = [Head(a, b) for a in range(size[0]) for b in range(size[1])] if heads is None \
        else list(heads)
    others = _other_answers(cases, int(seed))
    tokens = [[*case.tokens, *pairs.reshape(-1).tolist()] for case, pairs in zip(cases, others)]
    patched = path_patching(model, clean, twin, AnswerLogits(tokens, batch_size=batch_size),
                            chosen, engine=engine)  # type: ignore[arg-type]
    change, value = patched["effect"].values, patched["value"].values
    eligible[~np.isnan(change[0, ..., 0])] = True
    samples = change[..., 0] - change[..., 1]
    start = patched["clean"].values
    before = start[:, 0] - start[:, 1]
    share = _sigmoid(value[..., 0] - value[..., 1]) - _sigmoid(before)[:, None, None]
    placebo = change[..., 2::2] - change[..., 3::2]
    null = np.full(size, np.nan)
    if placebo.shape[-1]:
        null = np.quantile(abs(placebo.mean(0)), LEVEL, axis=-1)
    placebo = placebo.mean(0)
    error = samples.std(0, ddof=1) / np.sqrt(len(cases)) if len(cases) > 1 else np.full(size, np.nan)
    grid, each = ("layer", "head"), ("sample", "layer", "head")
    mean = np.where(eligible, score(np.where(np.isnan(change), 0.0, change)).numpy(), np.nan)
    data = xr.Dataset({
        "score": (grid, mean), "null": (grid, null), "eligible": (grid, eligible),
        "frequency": (grid, np.where(eligible, (samples > 0).mean(0), np.nan)),
        "standard_error": (grid, error), "samples": (each, samples), "share": (each, share),
        "context": (each, change[..., 0]), "memory": (each, change[..., 1]),
        "before": ("sample", before), "placebo": (("layer", "head", "pair"), placebo),
    }, _numbers(model))
    if estimate is not None:
        data["estimate"] = estimate
    return Result(data, {**about, "engine": patched.manifest["engine"],
                         "rows": patched.manifest["rows"],
                         "screen": None if screen is None else float(screen)})


def scores(found: Result) -> HeadScores:
    """S_m with its frequency, standard error and eligibility, for rankings and pruning."""
    return HeadScores(found["score"], found["frequency"], found["standard_error"],
                      found["eligible"])


def strongest(found: Result, count: SupportsIndex) -> list[Head]:
    """The heads with the largest |S_m|, whatever its sign.

    Example:
        >>> grid = xr.DataArray([[0.5, -2.0]], {"layer": [0], "head": [0, 1]}, ("layer", "head"))
        >>> more = xr.Dataset({"score": grid, "frequency": grid, "standard_error": grid,
        ...                    "eligible": grid < 9})
        >>> strongest(Result(more), 1)
        [L0H1]
    """
    return HeadScores(abs(found["score"]), eligible=found["eligible"]).top(int(count))


def chance(found: Result) -> float:
    """What |S_m| of the strongest head reaches for answers that mean nothing in the prompt.

    Example:
        >>> placebo = xr.DataArray(np.array([[[0.1, -0.3], [0.2, 0.0]]]), dims=("layer", "head", "pair"))
        >>> round(chance(Result(xr.Dataset({"placebo": placebo}))), 3)
        0.295

    The 95 % quantile, over pairs of other answers, of the largest |S_m| of any head: one level for
    all heads, so that looking at many of them finds none by chance. NaN without other answers.
    """
    placebo = abs(found["placebo"])
    if not placebo.sizes["pair"] or not bool(placebo.notnull().any()):
        return float("nan")
    return float(np.quantile(placebo.max(("layer", "head")), LEVEL))


def intervene(
    model: Model,
    cases: Sequence[Conflict],
    found: Result,
    *,
    counts: Sequence[SupportsIndex] = (0, 1, 3, 5),
    by: str = "zero",
    seeds: SupportsIndex = 5,
    neutral: Sequence[Prompt] = (),
    value: Any = None,
    folder: Any = None,
    batch_size: int = 8,
) -> Result:
    """Prune memory heads, or context heads, a few, then more, against matched random heads.

    Example:
        >>> import interp
        >>> model = interp.open_model("backcopy-3l")
        >>> case = Conflict(Prompt.from_tokens([1, 5, 8, 2, 5]), Prompt.from_tokens([1, 6, 9, 2, 6]),
        ...                 Prompt.from_tokens([2, 5]), memory=(7,), context=(8,))
        >>> done = intervene(model, [case], measure(model, [case]), counts=(0, 1))
        >>> done["memory_usage"].dims
        ('against', 'condition', 'seed', 'count', 'prompt')

    Args:
        cases: other ones than those that `found` was measured on.
        counts: numbers of heads; NaN beyond the number of heads of a kind, or half of all heads.
            Controls: see `prune_sweep`.
        neutral: texts whose loss shows what the pruning does beside.

    Returns:
        `memory_usage`, `context_usage`: whether the answer's first token is the memorized (stated)
        one, per prompt; `text_loss` `[..., sample]` with `neutral`. See `ablation_sweep`. The axis
        `against` is the kind that was pruned; a kind without heads is missing.
    """
    cases = list(cases)
    if not cases:
        raise PromptError("no conflicts to prune on: give at least one.")
    first = [case.tokens for case in cases]
    metrics: list[Any] = [
        Answers(name, [pair[i] for pair in first], batch_size=batch_size, key=first)
        for i, name in ((1, "memory_usage"), (0, "context_usage"))
    ]
    if neutral:
        metrics.append(TextLoss(list(neutral), batch_size=batch_size))
    parts: dict[str, xr.Dataset] = {}
    manifests: dict[str, Any] = {}
    for against in ("memory", "context"):
        if not ranked(scores(found), against):
            continue
        swept = prune_sweep(model, [case.clean for case in cases], metrics, found, against, counts,
                            by=by, seeds=seeds, value=value, folder=folder)
        parts[against] = swept.data
        manifests[against] = {k: swept.manifest[k] for k in ("top", "random")}
    if not parts:
        raise ValueError("S_m is zero or unknown for every head, so there is nothing to prune.")
    data = xr.concat([parts[a] for a in parts], xr.Variable("against", list(parts)))
    return Result(data, {**model.manifest(), "measure": "prune memory or context heads", "by": by,
                         "n_prompts": len(cases), **manifests})


def prune_sweep(
    model: Model,
    prompts: Sequence[Prompt],
    metrics: Any,
    found: Result,
    against: Source,
    counts: Sequence[SupportsIndex],
    *,
    by: str = "zero",
    seeds: SupportsIndex = 5,
    value: Any = None,
    folder: Any = None,
) -> Result:
    """`ablation_sweep` of the heads of one kind, with controls that hold none of either kind.

    Example:
        >>> import interp
        >>> model = interp.open_model("backcopy-3l")
        >>> grid = np.full((model.n_layers, model.n_heads), 1.0)
        >>> labels = {"layer": range(model.n_layers), "head": range(model.n_heads)}
        >>> scored = xr.Dataset({n: (("layer", "head"), grid if n != "eligible" else grid > 0) for n in
        ...                      ("score", "frequency", "standard_error", "eligible")}, labels)
        >>> done = prune_sweep(model, [Prompt.from_tokens([1, 5, 3])], Answers("usage", [5]),
        ...                    Result(scored), "memory", (0, 1))
        >>> done["usage"].sizes["count"]
        2

    A random head that decides for the other side would make pruning look better than it is, so
    controls avoid the heads with the largest |S_m| of both kinds, as far as the layers have others.
    Counts beyond the number of heads of the kind, or half of all heads, are NaN.
    """
    order = ranked(scores(found), against)
    asked = sorted({int(count) for count in counts})
    # Controls hold as many other heads, so at most half of all can be pruned.
    most = min(len(order), model.n_layers * model.n_heads // 2)
    both = strongest(found, model.n_layers * model.n_heads)
    made, manifest = [], {"top": [str(head) for head in order[:most]], "random": {}}
    for count in [count for count in asked if count <= most]:
        given: dict[str, Any] = dict(counts=(count,), by=by, seeds=seeds, value=value, folder=folder)
        barred = both[: 2 * count]
        try:
            swept = ablation_sweep(
                model, prompts, metrics, order,
                exclude=most_excludable(barred, order[:count], model.n_heads), **given)
        except OutOfRange:
            swept = ablation_sweep(model, prompts, metrics, order, **given)
        made.append(swept.data.astype(float))
        manifest["random"].update(swept.manifest["random"])
    if not made:
        raise ValueError(f"none of the counts {asked} is between 0 and the {most} heads there are.")
    return Result(xr.concat(made, "count").reindex(count=asked), {**model.manifest(), **manifest})


def draw(found: Result, ax: Axes, **more: Any) -> Axes:
    """Head map of S_m, colors around zero; heads that were not patched are hatched."""
    return head_grid.draw(ax, found["score"], label="$S_m$ (logits)", signed=True,
                          eligible=found["eligible"], hatched="not patched", **more)


def _numbers(model: Model) -> dict[str, range]:
    return {"layer": range(model.n_layers), "head": range(model.n_heads)}


def _sigmoid(x: np.ndarray) -> np.ndarray:
    # NaN, where a head was not patched, stays NaN.
    return 0.5 * (1.0 + np.tanh(0.5 * x))


def _other_answers(
    cases: Sequence[Conflict], seed: int
) -> Int[np.ndarray, "sample pair 2"]:
    """For each case, pairs of answers of other cases; none where there are too few others."""
    pool = sorted({token for case in cases for token in case.tokens})
    rng = np.random.default_rng([seed, 20])
    rows = []
    for case in cases:
        free = [token for token in pool if token not in case.tokens]
        if len(free) < 2:
            return np.zeros((len(cases), 0, 2), dtype=int)
        rows.append(np.stack([rng.choice(free, 2, replace=False) for _ in range(NULLS)]))
    return np.stack(rows)
