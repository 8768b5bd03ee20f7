"""Causal sweeps at the cost of what can change: every head, state, edge or token of some prompts.

    sweep = Sweep(model, prompts, every_head(), LogitDifference(a, b))
    print(sweep.plan())          # cells, passes, token-layers, memory, which shortcuts and why
    found = sweep.run()          # effect [layer, head, prompt]

The numbers are those of one whole pass per cell through `Model.run`; the cost is not (see
`interp.models.variants`). `activation_patching`, `ablation_sweep` and `Removal` answer further
questions; this is the exhaustive grid.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Optional, SupportsIndex, Union

import numpy as np
import xarray as xr
from tqdm.auto import tqdm

from interp.causal import memory
from interp.causal.cell_makers import Cell, Cells, _Tokens
from interp.causal.cells import CellStore, describe, subject
from interp.causal.executors import Executor, Together
from interp.causal.metrics import Metric, key_of, why_not_last_row
from interp.causal.passes import Passes
from interp.causal.plan import Plan
from interp.causal.removal import REMOVALS, Removal
from interp.core import Prompt, PromptError, Result, each
from interp.core.errors import ModelRefused, SiteRefused
from interp.models.model import Model
from interp.models.variants import Course, Variants

SHORTCUTS = (
    "resume: blocks before the edit are not executed",
    "causal prefix: positions before the edit are not run again, as no edit behind them changes them",
    "last row: in the last block the others are executed up to their keys and values",
)
HELD = 1 << 28
"""Bytes of states to be put in that are held at once."""


@dataclass
class _Share:
    """What one of several prompts that are alike adds to a plan."""

    values: int
    naive: int
    prompts: int = 0
    spent: float = 0.0
    floor: float = 0.0
    whole: int = 0
    resumed: int = 0
    batch: int = 0
    need: float = 0.0


def _run(
    prompts: Sequence[Prompt], cells: Cells, metric: Metric, folder: Path,
    batch_size: Optional[SupportsIndex], model: Model,
) -> None:
    """In a worker: the whole sweep, of which other workers do their share."""
    Sweep(model, prompts, cells, metric, folder=folder, batch_size=batch_size).run()


class Sweep:
    """Cells of one kind in some prompts, and a metric.

    Example:
        >>> import interp
        >>> from interp.causal.cell_makers import every_head
        >>> from interp.causal.metrics import LogitDifference
        >>> model = interp.open_model("backcopy-3l")
        >>> prompts = [Prompt.from_tokens(range(3, 12)), Prompt.from_tokens(range(2, 14))]
        >>> sweep = Sweep(model, prompts, every_head(), LogitDifference([5, 6], [7, 8]))
        >>> sweep.run()["effect"].dims, sweep.plan().forwards
        (('layer', 'head', 'prompt'), 2)

    Args:
        cells: from `every_head`, `every_state`, `every_edge` or `every_token`.
        metric: one that reads the last row of each prompt is computed with shortcuts; any other
            one with whole passes.
        folder: where finished cells are kept; a sweep that was killed goes on there.
        batch_size: cells that share a pass; found if None, halved where memory runs out.
        executor: who computes the cells; `interp.causal.executors.Jobs(4)` for four workers, say.

    Raises:
        PromptError: no prompts, or a metric of texts of its own.
        FolderRefused: a folder of another sweep. NotEnoughMemory: not even one cell fits.
    """

    def __init__(
        self, model: Model, prompts: Sequence[Prompt], cells: Cells, metric: Metric, *,
        folder: Union[str, Path, None] = None, batch_size: Optional[SupportsIndex] = None,
        executor: Optional[Executor] = None, progress: bool = False,
    ) -> None:
        self.model, self.prompts, self.cells, self.metric = model, list(prompts), cells, metric
        if not self.prompts:
            raise PromptError("no prompts to run: give at least one.")
        if metric.dim != "prompt":
            raise PromptError(f"metric {metric.name!r} reads texts of its own; a sweep needs one of "
                              "the prompts that are edited.")
        if isinstance(cells, _Tokens) and cells.how not in REMOVALS:
            raise PromptError(f"cannot remove by {cells.how!r}; choose one of: {', '.join(REMOVALS)}.")
        self.folder = None if folder is None else Path(folder)
        self.batch_size, self.progress, self.executor = batch_size, progress, executor
        if executor is not None and folder is None:
            raise ValueError("an executor needs folder=...: its workers put finished cells there.")
        self.reads_more = why_not_last_row(metric)
        self.spent = 0.0
        self._prepared = False

    def _cells_of(self, number: int) -> list[Cell]:
        if not self._prepared:
            self.cells.prepare(self.model, self.prompts)
            self._prepared = True
        return self.cells.of(self.model, self.prompts[number], number)

    # -- running -------------------------------------------------------------------------------

    def run(self) -> Result:
        """Compute every cell: `value` and `effect` (value - plain) `[layer, ..., prompt]`, and
        `plain` `[prompt]`; an axis `outcome` comes last for metrics with several. Cells that a
        prompt does not have are NaN."""
        found: dict[tuple[int, ...], dict[int, Any]] = {}
        self.spent = 0.0
        if self.executor is not None and self.folder is not None:
            CellStore(self.folder, subject(self.model, self.prompts))  # refused before workers start
            self.executor.run(self.model, Together(self.folder, partial(
                _run, self.prompts, self.cells, self.metric, self.folder.absolute(),
                self.batch_size)))
        for number, labels, value in self._values():
            found.setdefault(labels, {})[number] = value
        plain = np.stack([found[()][number] for number in range(len(self.prompts))])
        del found[()]
        marks = [sorted({labels[i] for labels in found}) for i in range(len(self.cells.dims))]
        shape = (*map(len, marks), len(self.prompts), *plain.shape[1:])
        values = np.full(shape, np.nan)
        places = [{mark: i for i, mark in enumerate(some)} for some in marks]
        for labels, by_prompt in found.items():
            where = tuple(place[label] for place, label in zip(places, labels))
            for number, value in by_prompt.items():
                values[(*where, number)] = value
        dims = (*self.cells.dims, "prompt", *(("outcome",) if plain.ndim == 2 else ()))
        data = xr.Dataset({"value": (dims, values), "effect": (dims, values - plain),
                           "plain": (dims[len(marks):], plain)}, dict(zip(self.cells.dims, marks)))
        for name in data.data_vars:
            data[name].attrs["units"] = self.metric.unit
        return Result(data, {
            **self.model.manifest(), "measure": "sweep", **self.cells.about(),
            "metric": self.metric.name, "unit": self.metric.unit, "n_prompts": len(self.prompts),
            "prompts": [prompt.digest() for prompt in self.prompts],
            "token_layers": self.spent, "not_resumed": self._reason or "",
        })

    _reason: Optional[str] = None
    _removal: tuple[int, Any] = (-1, None)

    def _values(self) -> Iterator[tuple[int, tuple[int, ...], Any]]:
        """(prompt, labels, value) of every cell; the labels () are the model as it is."""
        if self.reads_more is not None:
            self._reason = self.reads_more
            yield from self._by_whole_metric()
            return
        passes = Passes(self.model, self.prompts, self.metric, self.batch_size)
        kept = None if self.folder is None else CellStore(self.folder, subject(self.model, self.prompts))
        numbers = range(len(self.prompts))
        for number in tqdm(numbers, disable=not self.progress, desc=f"sweeping {self.model.name}"):
            cells: list[Cell] = [((), tuple), *self._cells_of(number)]
            if kept is None:
                values = self._compute(passes, number, cells)
            else:
                values = self._through(kept, passes, number, cells)
            for (labels, _), value in zip(cells, values):
                yield number, labels, value
        self.spent += passes.spent
        self._reason = self._reason or passes.reason

    def _compute(self, passes: Passes, number: int, cells: Sequence[Cell]) -> Sequence[Any]:
        if isinstance(self.cells, _Tokens):
            try:
                return self._removed(passes, number, cells)
            except ModelRefused as error:
                if self.cells.how != "drop_keep_ids":
                    raise
                passes.reason = str(error)
        found: list[Any] = []
        writes: list[Any] = []
        held = 0
        for place, (_, make) in enumerate(cells):
            writes.append(make())
            value = getattr(writes[-1], "value", None)
            held += 0 if value is None else value.values.nbytes
            if held > HELD or place == len(cells) - 1:
                found += list(passes.values(number, writes))
                writes, held = [], 0
        return found

    def _removed(
        self, passes: Passes, number: int, cells: Sequence[Cell]
    ) -> Sequence[Any]:
        """Removal has shortcuts of its own."""
        grid = self.cells
        assert isinstance(grid, _Tokens)
        if self._removal[0] != number:
            self._removal = (number, Removal(self.model, self.prompts[number], grid.where, grid.how,
                                             **grid.more))
            passes.spent += self._removal[1].base.prefill
        removal = self._removal[1]
        before = removal.base.spent
        found: dict[tuple[int, ...], Any] = {}
        of_last = self.metric.of_last  # type: ignore[attr-defined]
        for layer in sorted({labels[0] for labels, _ in cells if labels}):
            some = [labels for labels, _ in cells if labels and labels[0] == layer]

            def compute(part: Sequence[int], some: Any = some, layer: int = layer) -> Any:
                kept = [tuple(p for p in removal.places if p != some[i][1]) for i in part]
                more = {} if self.batch_size is None else {"batch_size": int(self.batch_size)}
                return removal.logits(layer, kept, **more)

            for part, rows in memory.halved(compute, range(len(some)), "removing one token"):
                found.update({some[i]: v for i, v in zip(part, of_last(rows, number))})
        found[()] = of_last(removal.base.logits[-1:].float().cpu(), number)[0]
        passes.spent += removal.base.spent - before
        return [found[labels] for labels, _ in cells]

    def _through(
        self, kept: CellStore, passes: Passes, number: int, cells: Sequence[Cell]
    ) -> list[Any]:
        """The cells of a prompt that the folder does not hold yet; each pass is kept at once."""
        more = key_of(self.cells.about()) if isinstance(self.cells, _Tokens) else ""
        marks = [key_of(number, self.metric.name, self.metric.shared, describe(make()), more)
                 for _, make in cells]

        def compute(chosen: list[int]) -> None:
            values = self._compute(passes, number, [cells[i] for i in chosen])
            for i, value in zip(chosen, values):
                kept.put(marks[i], np.asarray(value))

        rows = memory.ROWS.get(self.model.device.type, memory.ROWS["cuda"])
        size = int(self.batch_size or max(1, rows // len(self.prompts[number])))
        kept.fill([[mark] for mark in marks], compute, size)
        return [kept.get(mark) for mark in marks]  # type: ignore[misc]

    def _by_whole_metric(self) -> Iterator[tuple[int, tuple[int, ...], Any]]:
        """Cell by cell, all prompts in one call of the metric: it says itself what it runs."""
        by_label: dict[tuple[int, ...], dict[int, Any]] = {(): {}}
        for number in range(len(self.prompts)):
            by_label[()][number] = tuple
            for labels, make in self._cells_of(number):
                by_label.setdefault(labels, {})[number] = make
        if isinstance(self.cells, _Tokens) and self.cells.how != "drop_keep_ids":
            raise PromptError(f"metric {self.metric.name!r} needs whole passes ({self.reads_more}), "
                              "and these know removal 'drop_keep_ids' only.")
        kept = CellStore(self.folder, {} if self.folder is None else subject(self.model, self.prompts))
        for labels, makers in tqdm(by_label.items(), disable=not self.progress,
                                   desc=f"sweeping {self.model.name}"):
            write = each([makers.get(n, tuple)() for n in range(len(self.prompts))])
            mark = key_of(self.metric.name, self.metric.shared, describe(write))
            kept.fill([[mark]], lambda _: kept.put(mark, np.asarray(  # noqa: B023
                self.metric.values(self.metric.passes(self.model, self.prompts, write)))))  # noqa: B023
            self.spent += sum(map(len, self.prompts)) * self.model.n_layers
            for number in makers:
                yield number, labels, kept.get(mark)[number]  # type: ignore[index]

    # -- planning ------------------------------------------------------------------------------

    def plan(self) -> Plan:
        """What `run` will do. One prompt is run once, to see whether it can be resumed."""
        model, lengths = self.model, [len(prompt) for prompt in self.prompts]
        reason, variants = self.reads_more, None
        if reason is None:
            try:
                passes = Passes(model, self.prompts, self.metric, self.batch_size)
                variants, reason = passes.variants(0), passes.reason
            except ModelRefused as error:
                reason = str(error)
        labels: set[tuple[int, ...]] = set()
        known: dict[Any, _Share] = {}
        for number, prompt in enumerate(self.prompts):
            # Prompts that are alike cost alike.
            alike = (len(prompt), prompt.segments, number if prompt.inputs else 0)
            if alike not in known:
                cells = self._cells_of(number)
                labels |= {one for one, _ in cells}
                known[alike] = _Share(len(cells), len(cells) * len(prompt) * model.n_layers)
                if variants is not None:
                    if number:
                        variants = variants.like(prompt)
                    self._share(known[alike], passes, variants, cells)
            known[alike].prompts += 1
        shares = list(known.values())
        values, naive, spent, floor, whole, resumed = (
            sum(getattr(share, name) * share.prompts for share in shares)
            for name in ("values", "naive", "spent", "floor", "whole", "resumed"))
        batch = max(share.batch for share in shares)
        need = max(share.need for share in shares)
        sources = self.cells.sources
        if variants is None:
            spent, floor, whole, batch = naive, 0.0, values, int(self.batch_size or 8)
            need = batch * max(lengths) * memory.per_row(model)
        forwards = whole + sources + (len(lengths) if variants is not None else 0)
        used, unused = self._shortcuts(variants, reason, whole, values)
        return Plan(self.cells.name, len(labels), len(lengths), values, forwards, resumed, float(spent),
                    float(naive), float(floor), batch, need / memory.MIB,
                    memory.available(model.device) / memory.MIB, used, unused)

    def _share(
        self, share: "_Share", passes: Passes, variants: Variants, cells: Sequence[Cell]
    ) -> None:
        """What the cells of one prompt cost."""
        courses: list[Optional[Course]] = [None]
        for _, make in cells:
            try:
                course = variants.course(make())
                courses.append(None if course is None else replace(course, edits=None))
            except SiteRefused:
                share.whole += 1
        moving = [course for course in courses if course is not None]
        parts, length = passes.divided(variants, moving), variants.length
        share.resumed, share.batch = len(parts), max(map(len, parts), default=0)
        most = max((sum(variants.rows(moving[i]) for i in part) for part in parts), default=0)
        model = self.model
        share.need = (memory.per_prompt(model, length) + most * memory.per_row(model)
                      + share.batch * memory.per_cell(model, length, 1))
        base = length * model.n_layers
        share.spent = base * (1 + share.whole) + sum(map(variants.cost, moving))
        share.floor = base + sum(variants.cost(course, floor=True) for course in moving)

    def _shortcuts(
        self, variants: Optional[Variants], reason: Optional[str], whole: int, values: int
    ) -> tuple[tuple[str, ...], tuple[str, ...]]:
        names = [one.split(":")[0] for one in SHORTCUTS]
        if variants is None:
            return (), tuple(f"{name}: {reason}" for name in names)
        if whole == values:
            return (), tuple(f"{name}: these edits need whole rows of attention" for name in names)
        unused = ()
        if not variants.causal:
            unused = ("causal prefix: where a picture's tokens see each other in both directions, "
                      "the prefix ends before the picture",)
        if whole:
            unused += (f"{whole} of {values} cells: edits of whole rows of attention",)
        return SHORTCUTS, unused
