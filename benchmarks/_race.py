"""Races: contenders timed side by side in one process, in random order, and their results compared.

Shared machines make absolute times meaningless. Here every round runs every contender once, in an
order drawn anew, so that whatever else the machine does falls on all of them alike; what is
reported are medians and ratios of processor time (on a GPU: time between two synchronizations).
"""

import gc
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Optional, Union

import numpy as np
import torch

from interp.core.statistics import Estimate, bootstrap

RESAMPLES = 1000
MATRIX = 1024
"""Side of the square matrices whose product, in every round, gives the machine's matrix rate."""


class OutOfMemory(Exception):
    """A contender needs more memory than it was given."""


@dataclass(frozen=True)
class Contender:
    """One way to compute the same thing.

    Args:
        name: what the table calls it.
        run: returns the result: a number, array, tensor, labelled array, or dicts and lists of
            them; None if there is nothing to compare (a plain forward).
        make: instead of `run`: makes it, outside of the clock. What it raises is the reason that
            stands in the table, so a peer that is not installed costs its line and no more.
        memory: bytes at the peak, measured in a process of its own; see `_fresh.peak_memory`.
        flops: operations that this contender needs, where it is not what the others need.
        timed: False for a contender of which only the memory is measured.
    """

    name: str
    run: Optional[Callable[[], Any]] = None
    make: Optional[Callable[[], Callable[[], Any]]] = None
    memory: Optional[Callable[[], float]] = None
    flops: Optional[float] = None
    timed: bool = True


@dataclass
class Line:
    """What was measured of one contender; `failed` or `wrong` is a sentence, None if all is well."""

    seconds: list[float] = field(default_factory=list)
    failed: Optional[str] = None
    difference: Optional[float] = None
    wrong: Optional[str] = None
    memory: Optional[float] = None
    floor_share: Optional[float] = None

    @property
    def median(self) -> Optional[float]:
        return float(np.median(self.seconds)) if self.seconds and not self.failed else None


@dataclass
class Race:
    """The outcome of one race.

    Attributes:
        name: which race of its benchmark this is. reference: the contender that ratios refer to.
        truth: the contender whose results are compared with. sizes: what was computed.
        flops: operations of the floor. matrix_rate: operations per second of a matrix product.
    """

    name: str
    reference: str
    truth: str
    lines: dict[str, Line]
    sizes: dict[str, Any]
    clock: str
    flops: Optional[float] = None
    matrix_rate: Optional[float] = None

    def ratio(self, of: Union[str, Sequence[str]], to: Union[str, Sequence[str]]) -> Estimate:
        """Median time of one contender over that of another; of several names the fastest.

        Raises `LookupError` with the reason if one of the two was not measured.
        """
        one, other = self.lines[self.fastest(of)], self.lines[self.fastest(to)]
        n = min(len(one.seconds), len(other.seconds))
        return bootstrap(_ratio_of_medians, one.seconds[:n], other.seconds[:n],
                         resamples=RESAMPLES, name="ratio of medians")

    def fastest(self, names: Union[str, Sequence[str]]) -> str:
        """The fastest of these contenders that finished with the right result."""
        names = [names] if isinstance(names, str) else list(names)
        timed = {name: self.lines[name].median for name in names
                 if name in self.lines and self.lines[name].wrong is None}
        measured = {name: seconds for name, seconds in timed.items() if seconds is not None}
        if not measured:
            reasons = [f"{name}: {why}" for name in names if name in self.lines
                       and (why := self.lines[name].failed or self.lines[name].wrong)]
            raise LookupError("; ".join(reasons) or f"{', '.join(names)}: not measured")
        return min(measured, key=measured.__getitem__)

    def memory(self, name: str) -> float:
        """Peak memory of a contender; `LookupError` if it was not measured."""
        line = self.lines.get(name)
        if line is None or line.memory is None:
            raise LookupError(f"{name}: {line.failed if line and line.failed else 'not measured'}")
        return line.memory


def _ratio_of_medians(one: np.ndarray, other: np.ndarray) -> float:
    return float(np.median(one) / np.median(other))


@dataclass(frozen=True)
class Target:
    """A number that a benchmark should reach, and how it is read off the races.

    Args:
        what: said in the summary.
        at_most, at_least: one of them.
        race, of, to: the ratio of times of `of` to `to` (several names: the fastest of them).
        value: instead: reads the number off all races of the benchmark, by name; may raise
            LookupError with the reason why it is not there.
    """

    what: str
    at_most: Optional[float] = None
    at_least: Optional[float] = None
    race: str = ""
    of: Union[str, tuple[str, ...]] = ""
    to: Union[str, tuple[str, ...]] = ""
    value: Optional[Callable[[Mapping[str, Race]], Union[float, Estimate]]] = None

    def judge(self, races: Mapping[str, Race]) -> dict[str, Any]:
        """The target, what was measured, and "met", "missed" or "not measured" with the reason."""
        bound = f"<= {self.at_most:g}" if self.at_most is not None else f">= {self.at_least:g}"
        said: dict[str, Any] = {"what": self.what, "target": bound}
        try:
            if self.value is not None:
                found = self.value(races)
            elif self.race in races:
                found = races[self.race].ratio(self.of, self.to)
            else:
                raise LookupError(f"the race {self.race!r} was not run")
        except LookupError as reason:
            return {**said, "verdict": "not measured", "reason": str(reason.args[0])}
        measured = found.value if isinstance(found, Estimate) else float(found)
        if isinstance(found, Estimate) and np.isfinite(found.interval).all():
            said["interval"] = list(found.interval)
        met = measured <= self.at_most if self.at_most is not None else measured >= self.at_least
        return {**said, "measured": measured, "verdict": "met" if met else "missed"}


def measure(
    name: str,
    contenders: Sequence[Contender],
    reference: str,
    *,
    truth: Optional[str] = None,
    rounds: int = 7,
    seconds: float = 300.0,
    tolerance: float = 1e-5,
    sizes: Optional[Mapping[str, Any]] = None,
    flops: Optional[float] = None,
    device: str = "cpu",
    seed: int = 0,
    clock: Optional[Callable[[], float]] = None,
) -> Race:
    """Run the contenders interleaved and compare their times and results.

    Args:
        reference: the contender that ratios refer to; its results are the truth, unless `truth`
            names another one.
        rounds: at most so many; fewer (at least 3) once `seconds` of the clock are spent.
        tolerance: a result further from the truth than this is marked as wrong and its time does
            not count for a target.
        flops: operations that are needed at least; their share of each time, at the matrix rate
            of the same rounds, is reported.
        clock: processor time on a CPU (one thread), synchronized time on a GPU.

    A contender that raises gets a line with the reason; the others go on.
    """
    names = [contender.name for contender in contenders]
    truth = reference if truth is None else truth
    if len(set(names)) < len(names) or not {reference, truth} <= set(names):
        raise ValueError(f"contenders need names of their own, and {reference!r} and {truth!r} "
                         f"must be among them: {names}.")
    tick, called = (clock, "given clock") if clock else _clock(device)
    lines = {contender.name: Line() for contender in contenders}
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        runs, results = {}, {}
        for contender in contenders:
            line = lines[contender.name]
            try:
                if contender.memory is not None:
                    line.memory = float(contender.memory())
                if contender.timed:
                    run = contender.run if contender.make is None else contender.make()
                    results[contender.name] = _numbers(run())  # type: ignore[misc]
                    runs[contender.name] = run
            except Exception as error:
                line.failed = reason(error)
        _compare(lines, results, truth, tolerance)
        del results
        if flops is not None and runs:
            runs[""] = _matrix_product(device)
        gc.collect()
        gc.freeze()  # what is there already is not looked at again in every round
        spent = _rounds(runs, lines, tick, rounds, seconds, np.random.default_rng(seed))
    finally:
        gc.unfreeze()
        torch.set_num_threads(threads)
    race = Race(name, reference, truth, lines, dict(sizes or {}), called, flops)
    if spent:
        race.matrix_rate = 2 * MATRIX**3 / float(np.median(spent))
        for contender in contenders:
            line = lines[contender.name]
            if line.median:
                line.floor_share = (contender.flops or flops) / race.matrix_rate / line.median
    return race


def _rounds(
    runs: dict[str, Any], lines: dict[str, Line], tick: Callable[[], float], rounds: int,
    seconds: float, rng: np.random.Generator,
) -> list[float]:
    """Time every run once per round, in random order; returns the times of the matrix product."""
    spent: list[float] = []
    begun = tick()
    for done in range(rounds):
        if done >= 3 and tick() - begun > seconds:
            break
        for name in rng.permutation(sorted(runs)):
            gc.collect()
            before = tick()
            try:
                runs[name]()
            except Exception as error:
                lines[name].failed = reason(error)
                del runs[name]
                continue
            (lines[name].seconds if name else spent).append(tick() - before)
    return spent


def _clock(device: str) -> tuple[Callable[[], float], str]:
    if not device.startswith("cuda"):
        return time.process_time, "processor time, one thread"

    def synchronized() -> float:
        torch.cuda.synchronize(device)
        return time.perf_counter()

    return synchronized, "time between synchronizations"


def _matrix_product(device: str) -> Callable[[], Any]:
    a, b = torch.rand(2, MATRIX, MATRIX, device=device)
    return lambda: a @ b


def reason(error: BaseException) -> str:
    """Why a contender is out of the race, in one sentence."""
    text = " ".join(str(error).split())
    if isinstance(error, OutOfMemory):
        return text
    if isinstance(error, ImportError):
        return f"not installed: {text}"
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)) or "allocate memory" in text:
        return f"out of memory: {text[:160]}"
    return f"{type(error).__name__}: {text[:240]}"


def _numbers(result: Any, name: str = "") -> dict[str, np.ndarray]:
    """All arrays in a result, by where they are in it."""
    if result is None:
        return {}
    if isinstance(result, Mapping):
        parts = [(str(key), value) for key, value in result.items()]
    elif isinstance(result, (list, tuple)):
        parts = [(str(i), value) for i, value in enumerate(result)]
    else:
        if isinstance(result, torch.Tensor):
            result = result.detach().to("cpu", torch.float64)
        return {name: np.asarray(result, dtype=float)}
    return {k: v for key, value in parts for k, v in _numbers(value, f"{name}/{key}").items()}


def _compare(
    lines: dict[str, Line], results: dict[str, dict[str, np.ndarray]], truth: str, tolerance: float
) -> None:
    expected = results.get(truth)
    for name, found in results.items():
        if not expected or not found:
            continue
        line = lines[name]
        if {k: v.shape for k, v in found.items()} != {k: v.shape for k, v in expected.items()}:
            line.wrong = f"its results have other names or shapes than those of {truth}"
            continue
        line.difference = max(_difference(found[key], expected[key]) for key in expected)
        if not line.difference <= tolerance:
            line.wrong = f"its results differ from those of {truth} by {line.difference:.1e}"


def _difference(one: np.ndarray, other: np.ndarray) -> float:
    same = (one == other) | (np.isnan(one) & np.isnan(other))
    with np.errstate(invalid="ignore"):
        gaps = np.where(same, 0.0, np.abs(one - other))
    return float(np.nan_to_num(gaps, nan=np.inf).max(initial=0.0))
