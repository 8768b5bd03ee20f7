"""Many interventions in one prompt and what a metric says of each, with as few passes as are exact."""

from collections.abc import Callable, Sequence
from typing import Any, Optional, SupportsIndex, Union

import numpy as np
import torch
from torch import Tensor

from interp.causal import memory
from interp.causal.metrics import Metric, why_not_last_row
from interp.core import Prompt, each
from interp.core.errors import ModelRefused, NumericalError, SiteRefused
from interp.core.intervention import Intervention
from interp.models.model import Model
from interp.models.variants import Course, Variants

Write = Union[Intervention, Sequence[Intervention]]


class Passes:
    """A metric of the last row under interventions, prompt by prompt.

    Example:
        >>> import interp
        >>> from interp.causal.metrics import LogitDifference
        >>> model = interp.open_model("backcopy-3l")
        >>> passes = Passes(model, [Prompt.from_tokens(range(3, 12))], LogitDifference([5], [6]))
        >>> passes.values(0, [interp.ablate("L0H0"), ()]).shape, passes.resumed
        ((2,), True)

    Interventions that resuming does not know are run as whole passes, several at a time, with the
    same numbers.

    Args:
        batch_size: variants that share a pass; found from the memory and the number of rows if
            None. Halved where memory runs out, and kept so.

    Attributes:
        resumed: whether passes are resumed in the middle. reason: why they are not, else None.
        spent: token-layers executed.

    Raises:
        ValueError: the metric reads more than the last row.
    """

    def __init__(
        self, model: Model, prompts: Sequence[Prompt], metric: Metric,
        batch_size: Optional[SupportsIndex] = None,
    ) -> None:
        reason = why_not_last_row(metric)
        if reason is not None:
            raise ValueError(f"{metric.name!r} cannot be read off the last row: {reason}.")
        self.model, self.prompts, self.metric = model, list(prompts), metric
        self.batch_size = None if batch_size is None else max(1, int(batch_size))
        self.reason: Optional[str] = None
        self.spent = 0.0
        self._opened: tuple[int, Optional[Variants]] = (-1, None)

    @property
    def resumed(self) -> bool:
        return self.reason is None

    def variants(self, number: int) -> Optional[Variants]:
        """The prompt, run once; None, and `reason` says why, where it cannot be resumed."""
        if self._opened[0] != number and self.reason is None:
            self._opened = (-1, None)
            try:
                made = memory.halved(lambda _: Variants(self.model, self.prompts[number]), [number],
                                     f"prompt {number} ({len(self.prompts[number])} tokens)")
                self._opened = (number, made[0][1])
                self.spent += made[0][1].spent
            except ModelRefused as error:
                self.reason = str(error)
        return self._opened[1] if self.reason is None else None

    def values(self, number: int, writes: Sequence[Write]) -> np.ndarray:
        """What the metric says of every variant of a prompt, `[variant]` or `[variant, outcome]`."""
        found: list[Any] = [None] * len(writes)

        def keep(part: Sequence[int], rows: Tensor) -> None:
            if torch.isnan(rows).any():
                raise NumericalError(
                    f"NaN in the last row of prompt {number} under an intervention of "
                    f"{self.model.name}; check the values you write, or use dtype='float32'."
                )
            for i, value in zip(part, self.metric.of_last(rows.cpu(), number)):  # type: ignore
                found[i] = value

        courses: dict[int, Optional[Course]] = {}
        whole: list[int] = []
        variants = self.variants(number)
        for i, write in enumerate(writes):
            try:
                if variants is None:
                    whole.append(i)
                else:
                    courses[i] = variants.course(write)
            except SiteRefused:
                whole.append(i)
        if courses and variants is not None:
            same = [i for i, course in courses.items() if course is None]
            if same:
                keep(same, variants.plain.expand(len(same), -1))
            self._resume(variants, {i: c for i, c in courses.items() if c is not None}, keep)
        self._whole(number, whole, writes, keep)
        return np.stack(found)

    def _resume(
        self, variants: Variants, courses: dict[int, Course], keep: Callable[..., None]
    ) -> None:
        numbers, before = list(courses), variants.spent
        some = [courses[i] for i in numbers]
        for places in self.divided(variants, some):
            for part, rows in self._halved(
                lambda part: variants.run([some[i] for i in part]), places, variants.length):
                keep([numbers[i] for i in part], rows)
        self.spent += variants.spent - before

    def divided(self, variants: Variants, courses: Sequence[Course]) -> list[list[int]]:
        """Which variants share a pass."""
        rows = memory.ROWS.get(self.model.device.type, memory.ROWS["cuda"])
        room = memory.SHARE * memory.available(self.model.device)
        most = max((variants.rows(course) for course in courses), default=1)
        lent = memory.per_cell(self.model, variants.length, 1) / max(1, most)
        rows = int(min(rows, max(1.0, room / (memory.per_row(self.model) + lent))))
        parts = variants.passes(courses, rows)
        if self.batch_size is not None:
            parts = [part[i : i + self.batch_size] for part in variants.passes(courses, 1 << 60)
                     for i in range(0, len(part), self.batch_size)]
        return parts

    def _halved(
        self, compute: Callable[[Sequence[int]], Tensor], part: Sequence[int], length: int
    ) -> list[tuple[Sequence[int], Tensor]]:
        """A pass, or smaller ones where it does not fit; later passes are no larger."""
        found: list[tuple[Sequence[int], Tensor]] = []
        step = len(part) if self._fits is None else max(1, min(self._fits, len(part)))
        for start in range(0, len(part), step):
            made = memory.halved(compute, part[start : start + step],
                                 f"a single cell of a prompt of {length} tokens")
            if len(made) > 1:
                self._fits = max(len(some) for some, _ in made)
            found += made
        return found

    _fits: Optional[int] = None

    def _whole(
        self, number: int, chosen: Sequence[int], writes: Sequence[Write], keep: Callable[..., None]
    ) -> None:
        """Whole passes, variants of the prompt side by side."""
        length, size = len(self.prompts[number]), self.batch_size or 8

        def compute(part: Sequence[int]) -> Tensor:
            run = self.model.run([self.prompts[number]] * len(part), logits="last",
                                 write=each([writes[i] for i in part]), batch_size=size)
            return torch.stack([rows[-1] for rows in run.logits])

        for start in range(0, len(chosen), size):
            for part, rows in self._halved(compute, chosen[start : start + size], length):
                keep(part, rows)
                self.spent += float(len(part) * length * self.model.n_layers)


