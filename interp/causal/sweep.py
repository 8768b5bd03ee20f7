"""Causal sweeps: many interventions, some metrics, matched controls; resumed after a kill.

The cells of a sweep are independent. With a folder, every finished cell is kept there under a
content key of the intervention and the metric: a sweep that was killed goes on where it stopped,
and one with further cells or another metric computes only those. A folder is of one model and one
set of prompts; several processes may fill it (see `interp.causal.cells`).
"""

import copy
import warnings
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Optional, SupportsIndex, Union

import numpy as np
import torch
import xarray as xr
from jaxtyping import Float

from interp.causal.cells import CellStore, describe, fingerprint, subject
from interp.causal.controls import most_excludable, random_heads
from interp.causal.executors import Executor
from interp.causal.memory import is_shortage
from interp.causal.metrics import Metric, key_of
from interp.core import Head, HeadScores, Prompt, PromptError, Result, ablate
from interp.core.errors import NotEnoughMemory, OutOfRange, did_you_mean
from interp.core.head import HeadLike
from interp.core.head import heads as as_heads
from interp.core.intervention import Each, Intervention, Phase
from interp.core.statistics import FEWEST, Estimate
from interp.core.statistics import difference as paired_difference
from interp.models.model import Model

__all__ = ["ablation_sweep", "area", "difference", "effect", "evaluate", "fingerprint", "random_sets"]

CONDITIONS = ("top", "random")


def evaluate(
    model: Model,
    prompts: Sequence[Prompt],
    metrics: Sequence[Metric],
    writes: Sequence[Union[Intervention, Sequence[Intervention], Each]],
    *,
    folder: Union[str, Path, None] = None,
    executor: Optional[Executor] = None,
    progress: bool = False,
) -> dict[str, Float[np.ndarray, "cell prompt"]]:
    """Every metric under every intervention: the engine of all sweeps.

    Example:
        >>> import interp
        >>> from interp.causal.metrics import AnswerLogProb
        >>> model = interp.open_model("backcopy-1l")
        >>> prompts = [Prompt.from_tokens(range(3, 12))]
        >>> evaluate(model, prompts, [AnswerLogProb([[5]])], [(), interp.ablate("L0H0")])[
        ...     "log_prob"].shape
        (2, 1)

    Metrics with the same `shared` key share their passes. Equal interventions are computed once.

    Raises:
        PromptError: no prompts, or two metrics of one name.
        FolderRefused: the folder holds a sweep of another model, version or set of prompts.
        NotEnoughMemory: one prompt by itself does not fit; batches are halved before that.
    """
    if not prompts:
        raise PromptError("no prompts to run: give at least one.")
    names = [metric.name for metric in metrics]
    if len(set(names)) < len(names) or not names:
        raise PromptError(f"metrics need names of their own, and there must be one: {names}.")
    work = _Evaluation(model, prompts, metrics, writes, folder)
    if executor is not None:
        if folder is None:
            raise ValueError("an executor needs folder=...: its workers put finished cells there.")
        executor.run(model, work)
    numbers = list(range(len(writes)))
    work.compute(model, numbers, f"sweeping {model.name}" if progress else "")
    return {name: np.stack([work.values(i, name) for i in numbers]) for name in names}


class _Evaluation:
    """The cells of `evaluate` by number, as executors divide them; sent without model and values."""

    def __init__(
        self, model: Model, prompts: Sequence[Prompt], metrics: Sequence[Metric],
        writes: Sequence[Any], folder: Union[str, Path, None],
    ) -> None:
        self.prompts, self.writes = list(prompts), list(writes)
        # Copies: their batches become smaller where memory runs out.
        self.metrics: list[Any] = [copy.copy(metric) for metric in metrics]
        # Never None in a worker: `evaluate` gives an executor no work without a folder.
        self.folder: Any = None if folder is None else Path(folder).absolute()
        contents = [describe(write) for write in writes]
        self.marks = [{m.name: key_of(m.name, m.shared, content) for m in metrics}
                      for content in contents]
        self._open(model)

    def _open(self, model: Model) -> None:
        self.cells = CellStore(
            self.folder, {} if self.folder is None else subject(model, self.prompts))

    def __getstate__(self) -> dict[str, Any]:
        return {name: held for name, held in self.__dict__.items() if name != "cells"}

    def missing(self) -> list[int]:
        """Numbers of the cells that are not finished."""
        return [i for i, marks in enumerate(self.marks)
                if any(self.cells.get(mark) is None for mark in marks.values())]

    def compute(self, model: Model, numbers: Sequence[int], progress: str = "") -> None:
        """Have these cells finished; in a worker the folder is checked against its model first."""
        if not hasattr(self, "cells"):
            self._open(model)
        cells = self.cells

        def passes(chosen: list[int]) -> None:
            for number in (numbers[i] for i in chosen):
                outcomes: dict[str, Any] = {}
                for metric in self.metrics:
                    mark = self.marks[number][metric.name]
                    if cells.get(mark) is None:
                        if metric.shared not in outcomes:
                            outcomes[metric.shared] = self._passes(model, metric, number)
                        cells.put(mark, np.asarray(metric.values(outcomes[metric.shared])))

        cells.fill([tuple(self.marks[i].values()) for i in numbers], passes, progress=progress)

    def _passes(self, model: Model, metric: Metric, number: int) -> Any:
        """A metric's passes; where memory runs out, in batches of half the size, and again."""
        while True:
            try:
                return metric.passes(model, self.prompts, self.writes[number])
            except Exception as error:
                if not is_shortage(error):
                    raise
                said = str(error).splitlines()[0][:120] if str(error) else type(error).__name__
            # Out of the handler, so that what the failed pass held is freed first.
            if torch.cuda.is_available():
                torch.cuda.empty_cache()
            own = len(getattr(metric, "prompts", ()) or self.prompts)
            size = min(getattr(metric, "batch_size", 1), own)
            if size <= 1:
                raise NotEnoughMemory(
                    f"there is not enough memory for even one cell, a prompt of up to "
                    f"{max(map(len, self.prompts))} tokens run by itself: shorten the prompts, open "
                    f"the model with a smaller dtype or device='auto', or free memory ({said})."
                )
            for one in self.metrics:
                if hasattr(one, "batch_size"):
                    one.batch_size = min(one.batch_size, size // 2)

    def values(self, number: int, name: str) -> np.ndarray:
        """What a metric said in a cell."""
        found = self.cells.get(self.marks[number][name])
        assert found is not None, "`compute` has finished every cell"
        return found


def ablation_sweep(
    model: Model,
    prompts: Sequence[Prompt],
    metrics: Union[Metric, Sequence[Metric]],
    ranking: Union[HeadScores, Sequence[HeadLike]],
    *,
    counts: Sequence[SupportsIndex] = (0, 1, 2, 5, 10),
    by: str = "zero",
    phase: Phase = "all",
    seeds: SupportsIndex = 5,
    exclude: Optional[Iterable[HeadLike]] = None,
    value: Any = None,
    folder: Union[str, Path, None] = None,
    executor: Optional[Executor] = None,
    progress: bool = False,
) -> Result:
    """Ablate the top heads of a ranking, a few, then more, against matched random heads.

    Example:
        >>> import interp
        >>> from interp.causal.metrics import AnswerLogProb
        >>> model = interp.open_model("backcopy-3l")
        >>> prompts = [Prompt.from_tokens(range(3, 12))]
        >>> found = ablation_sweep(model, prompts, AnswerLogProb([[5]]), ["L0H0", "L2H0"],
        ...                        counts=(0, 1), seeds=5)
        >>> found["log_prob"].dims
        ('condition', 'seed', 'count', 'prompt')

    Args:
        ranking: scores, whose ineligible heads are left out, or heads, best first.
        counts: how many heads to ablate; 0 is the model as it is.
        by, phase, value: see `interp.ablate`; "mean" takes its value from `prompts` if none is
            given.
        seeds: random sets per count. Each has as many heads per layer as the top ones, stays the
            same for all prompts, and avoids the top ones and `exclude`.
        exclude: heads that no control may hold. By default the ranking's top, twice the largest
            count, as far as the layers have heads enough.
        folder: where finished cells are kept; None keeps nothing.
        executor: who computes them; `interp.causal.executors.Jobs(4)` for four workers, say.

    Returns:
        Per metric `[condition, seed, count, prompt]` (`sample` for a metric with texts of its own),
        the condition "top" repeated over seeds;
        `layer_matched` [count]: False where a layer has too few other heads, so that controls
        come from all layers. The manifest holds the sets.

    Raises:
        OutOfRange: more heads than the ranking or the model has, or too few controls.

    Source: arXiv:2404.15574 (masking), with the controls of this toolkit.
    """
    metrics = [metrics] if isinstance(metrics, Metric) else list(metrics)
    top = ranking.top(model.n_layers * model.n_heads) if isinstance(ranking, HeadScores) else [
        as_heads([head])[0] for head in ranking]
    counts = sorted({int(count) for count in counts})
    if counts[0] < 0 or counts[-1] > len(top):
        raise OutOfRange(
            f"cannot ablate {counts[0] if counts[0] < 0 else counts[-1]} heads: the ranking has "
            f"{len(top)} eligible ones."
        )
    if by == "mean" and value is None:
        from interp.causal.ablate import mean_output

        value = mean_output(model, prompts)
    sets: dict[tuple[str, int, int], tuple[Head, ...]] = {}
    matched = {}
    for count in counts:
        chosen = as_heads(top[:count])
        barred = top[: 2 * counts[-1]] if exclude is None else as_heads(exclude)
        drawn, matched[count] = _controls(model, chosen, barred, int(seeds), exclude is None)
        for seed in range(int(seeds)):
            sets["top", seed, count] = chosen
            sets["random", seed, count] = drawn[seed]
    writes = [ablate(heads, by, phase, value) if heads else () for heads in sets.values()]
    values = evaluate(model, prompts, metrics, writes, folder=folder, executor=executor,
                      progress=progress)
    order = list(sets)
    data: dict[str, Any] = {}
    for metric in metrics:
        table = dict(zip(order, values[metric.name]))
        array = np.stack([np.stack([np.stack([table[c, s, n] for n in counts])
                                    for s in range(int(seeds))]) for c in CONDITIONS])
        data[metric.name] = (("condition", "seed", "count", metric.dim), array,
                             {"units": metric.unit})
    data["layer_matched"] = ("count", [matched[count] for count in counts])
    coords = {"condition": list(CONDITIONS), "seed": np.arange(int(seeds)), "count": counts}
    return Result(xr.Dataset(data, coords), {
        **model.manifest(), "measure": "ablation_sweep", "by": by, "phase": phase,
        "n_prompts": len(prompts), "prompts": [prompt.digest() for prompt in prompts],
        "top": [str(head) for head in top[: counts[-1]]],
        "random": {f"{seed}/{count}": [str(h) for h in sets["random", seed, count]]
                   for seed in range(int(seeds)) for count in counts},
    })


def _controls(
    model: Model, chosen: tuple[Head, ...], barred: Sequence[HeadLike], seeds: int, shrink: bool
) -> tuple[list[tuple[Head, ...]], bool]:
    """Random sets like the chosen one, and whether they could be matched layer by layer."""
    if not chosen:
        return [()] * seeds, True
    if shrink:
        barred = most_excludable(barred, chosen, model.n_heads)
    size = (model.n_layers, model.n_heads)
    try:
        return [random_heads(chosen, *size, seed=s, exclude=barred) for s in range(seeds)], True
    except OutOfRange:
        if not shrink:
            raise
        return [random_heads(chosen, *size, seed=s, layer_matched=False)
                for s in range(seeds)], False


def random_sets(found: Result, count: SupportsIndex) -> int:
    """How many different random sets stand behind a count: a small layer has few to draw from."""
    drawn = found.manifest["random"]
    return len({frozenset(drawn[f"{int(seed)}/{int(count)}"]) for seed in found["seed"].values})


def difference(
    found: Result, metric: str, count: SupportsIndex, *, seed: SupportsIndex = 0
) -> Estimate:
    """Top minus random, prompt by prompt, with its 95 % bootstrap interval over prompts.

    The random sets of all seeds are averaged first: what is compared is the finding with its
    control, and prompts are the samples. The estimate prints with how many different sets there
    were and whether they are of the same layers; fewer than 5 are warned of.

    Raises `OutOfRange` for a metric or a count that the sweep does not hold.
    """
    _check(found, metric, count)
    top, random = (found[metric].sel(condition=c, count=int(count)).mean("seed").values
                   for c in CONDITIONS)
    said, few = _control(found, count)
    if few:
        warnings.warn(few, stacklevel=2)
    return replace(paired_difference(top, random, seed=int(seed)), control=said)


def _check(found: Result, metric: str, *counts: SupportsIndex) -> None:
    metrics = [str(name) for name in found.data if name != "layer_matched"]
    if metric not in metrics:
        raise OutOfRange(f"the sweep has no metric {metric!r}; it has: {', '.join(metrics)}."
                         f"{did_you_mean(metric, metrics)}")
    there = [int(count) for count in found["count"].values]
    for count in counts:
        if int(count) not in there:
            raise OutOfRange(f"the sweep has no count {int(count)}; its counts are: "
                             f"{', '.join(map(str, there))}.")


def _control(found: Result, count: SupportsIndex) -> tuple[str, str]:
    """What a count was held against, in words, and a warning where that is little."""
    if not int(count) or "random" not in found.manifest:
        return "", ""
    sets, matched = random_sets(found, count), bool(found["layer_matched"].sel(count=int(count)))
    where = "layer-matched" if matched else "from all layers, as the layers have too few other heads"
    said = f"control: {sets} different random set{'' if sets == 1 else 's'} of heads, {where}"
    if sets >= FEWEST:
        return said, ""
    return said, (
        f"only {sets} different random set{' stands' if sets == 1 else 's stand'} behind the control "
        f"at count {int(count)} ({where}); ablate fewer heads of a layer, exclude fewer, or raise "
        f"seeds, for at least {FEWEST}."
    )


def effect(
    found: Result, metric: str, count: SupportsIndex, condition: str = "top", *,
    seed: SupportsIndex = 0,
) -> Estimate:
    """A condition minus the model as it is (count 0), prompt by prompt, with its interval.

    Raises `OutOfRange` for a metric or a count that the sweep does not hold.
    """
    if 0 not in found["count"].values:
        raise OutOfRange("the sweep has no count 0, so there is nothing to compare with.")
    _check(found, metric, count)
    cut, whole = (found[metric].sel(condition=condition, count=c).mean("seed").values
                  for c in (int(count), 0))
    return paired_difference(cut, whole, seed=int(seed))


def area(found: Result, metric: str, condition: str) -> Float[np.ndarray, "prompt"]:
    """The mean of a metric along the curve over counts, per prompt.

    By trapezoids: where counts lie densely they do not weigh more.
    """
    one = found[metric].sel(condition=condition).mean("seed").transpose("prompt", "count")
    counts = one["count"].values.astype(float)
    if len(counts) < 2:
        return one.values[:, 0]
    return np.trapezoid(one.values, counts, axis=1) / (counts[-1] - counts[0])
