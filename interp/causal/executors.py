"""Who computes the cells of a sweep: this process, several on this machine, or jobs of a cluster.

Work is divided by cells. Every worker opens the model by its name (weights are never sent), and
puts its share of the cells into the sweep's folder; the parent then reads them all. So merging is
resuming: a worker that dies leaves its finished cells there, and another one is given the rest.
"""

import contextlib
import os
import time
import uuid
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Optional, Protocol, SupportsIndex, Union, runtime_checkable

import torch

from interp.causal.cells import fingerprint
from interp.core import ModelRefused, UndertowError, WorkerDied
from interp.core.result import write_atomically
from interp.models.model import Model
from interp.models.open import DTYPES, open_model
from interp.organisms import registry

MISSING = "workers need submitit; install it with: pip install 'undertow[cluster]'."
DAYS = 7 * 24 * 60
"""Minutes that workers on this machine may take: submitit's own default ends them after a few."""

PAUSE = 5.0
"""Seconds between looks at the jobs of a cluster."""


@runtime_checkable
class Work(Protocol):
    """What can be divided: numbered cells in a folder. It is sent to workers, without the model."""

    folder: Path

    def missing(self) -> Sequence[int]:
        """The numbers of the cells that are not finished."""
        ...

    def compute(self, model: Model, numbers: Sequence[int]) -> None:
        """Finish these cells, in the folder."""
        ...


@runtime_checkable
class Executor(Protocol):
    """Has all cells of a work finished."""

    def run(self, model: Model, work: Work) -> None: ...


class Together:
    """Work of a sweep that divides itself: every worker runs all of it, each cell is computed once.

    It is for sweeps that claim cells in their folder (`CellStore.fill`), and so skip what others have
    claimed and end when all is there. Parts stand for workers, and are finished when one of them
    has come to the end.

    Args:
        run: is called with the model and runs the sweep in `folder`; it is sent to workers.
        parts: how many may work at a time.
    """

    def __init__(
        self, folder: Union[str, Path], run: Callable[[Model], Any], parts: SupportsIndex = 1 << 10
    ) -> None:
        self.folder, self._run, self.parts = Path(folder).absolute(), run, int(parts)
        self._mark = f".{uuid.uuid4().hex}.end"

    def missing(self) -> list[int]:
        """All parts, until one of them has come to the end."""
        return [] if (self.folder / self._mark).exists() else list(range(self.parts))

    def compute(self, model: Model, numbers: Sequence[int]) -> None:
        """Run the sweep, and leave a mark when it has come to the end."""
        self._run(model)
        write_atomically(self.folder / self._mark, "")

    def clean(self) -> None:
        """Remove the mark."""
        (self.folder / self._mark).unlink(missing_ok=True)


@dataclass(frozen=True)
class InProcess:
    """The executor that computes all cells here, as a sweep without an executor does."""

    def run(self, model: Model, work: Work) -> None:
        """Finish the cells that are missing."""
        work.compute(model, list(work.missing()))
        if isinstance(work, Together):
            work.clean()


def in_process() -> InProcess:
    """The executor that computes all cells in this process.

    Example:
        >>> in_process()
        InProcess()
    """
    return InProcess()


@dataclass
class _Share:
    """The cells of one worker, and how often workers died on them without finishing any."""

    number: int
    cells: list[int]
    deaths: int = 0
    job: Any = field(default=None, repr=False)


class Jobs:
    """Workers on this machine or on a cluster, through submitit.

    Example:
        >>> Jobs(4)
        Jobs(4, cluster='local')
        >>> Jobs(16, cluster="slurm", gpus_per_node=1, timeout_min=240, slurm_partition="gpu")
        Jobs(16, cluster='slurm', gpus_per_node=1, slurm_partition='gpu', timeout_min=240)

    Args:
        workers: how many; each opens the model for itself.
        cluster: "local" for processes on this machine, "slurm", or None for what submitit finds.
        restarts: how often a worker is started anew that died without having finished a cell since
            it was last started. One that finished some is always replaced.
        device: what workers open the model on, as in `open_model`. By default as here, and the
            GPU of the worker's machine where this one has none.
        parameters: of submitit's `AutoExecutor`, such as `gpus_per_node`, `cpus_per_task`,
            `mem_gb`, `timeout_min`, `slurm_partition`, `slurm_additional_parameters`. On this
            machine workers are dealt to its GPUs in turn, `gpus_per_node` each.

    A sweep with workers needs a folder that all of them can see. Logs lie in `jobs` there while
    they run, and stay if one died.

    Raises:
        ImportError: submitit is not installed.
        ModelRefused: the model cannot be opened by name, or not with the weights it has here.
        WorkerDied: cells on which workers died again and again; what is finished stays.
    """

    def __init__(
        self, workers: SupportsIndex, *, cluster: Optional[str] = "local",
        restarts: SupportsIndex = 2, device: Optional[str] = None, **parameters: Any,
    ) -> None:
        self.workers, self.cluster, self.device = int(workers), cluster, device
        self.restarts, self.parameters = int(restarts), parameters
        if self.workers < 1 or self.restarts < 0:
            raise ValueError("give at least one worker, and no negative number of restarts.")

    def __repr__(self) -> str:
        said = "".join(f", {k}={v!r}" for k, v in sorted(self.parameters.items()))
        return f"Jobs({self.workers}, cluster={self.cluster!r}{said})"

    def run(self, model: Model, work: Work) -> None:
        """Have the missing cells finished by workers."""
        missing = list(work.missing())
        if isinstance(work, Together):
            missing = missing[: self.workers]
        if not missing:
            return
        opening = opening_of(model, self.device)
        weights = fingerprint(model)
        submitting = _Submitting(self, work, opening, weights)
        try:
            self._watch(work, submitting, deal(missing, self.workers))
        except BaseException:
            submitting.cancel()
            raise
        submitting.clean()
        if isinstance(work, Together):
            work.clean()

    def _watch(self, work: Work, submitting: "_Submitting", shares: list[_Share]) -> None:
        submitting.submit(shares)
        running, lost = list(shares), []
        while running:
            time.sleep(submitting.pause)
            for share in [share for share in running if submitting.done(share)]:
                running.remove(share)
                before = len(share.cells)
                share.cells = submitting.rest(share)
                if not share.cells:
                    continue
                # Computed last: what may have killed the worker shall not keep the others waiting.
                share.cells = share.cells[1:] + share.cells[:1]
                share.deaths = share.deaths + 1 if len(share.cells) == before else 1
                said = submitting.last_words(share)
                what = f"worker {share.number} died with {len(share.cells)} cells left ({said})"
                if share.deaths > self.restarts:
                    lost.append((share, said))
                    continue
                warnings.warn(f"{what}; another one computes them.", RuntimeWarning, stacklevel=4)
                submitting.submit([share])
                running.append(share)
        if lost:
            share, said = lost[0]
            count = sum(len(one.cells) for one, _ in lost)
            what = "the last cells" if isinstance(work, Together) else f"{count} cells"
            raise WorkerDied(
                f"{what} are not finished: their worker died {share.deaths} times in a row "
                f"({said}). What is finished stays in {str(work.folder)!r}, with the logs in 'jobs'; "
                "give workers more memory or time, and start the sweep again to go on."
            )


class _Submitting:
    """The jobs of one sweep."""

    def __init__(self, how: Jobs, work: Work, opening: dict[str, Any], weights: str) -> None:
        self.how, self.work = how, work
        self.arguments = (opening, weights)
        self.folder = Path(work.folder).absolute() / "jobs"
        self.jobs: list[Any] = []
        submitit = _submitit()
        self.local = how.cluster == "local"
        self.pause = 0.1 if self.local else PAUSE
        if self.local:
            self.executor = submitit.LocalExecutor(self.folder)
            self.executor.update_parameters(**{
                "timeout_min": DAYS, "signal_delay_s": 1, **_for_local(how.parameters)})
        else:
            self.executor = submitit.AutoExecutor(self.folder, cluster=how.cluster)
            self.executor.update_parameters(**{"name": "undertow", **how.parameters})
        self.threads = max(1, (os.cpu_count() or 1) // how.workers) if self.local else 0

    def submit(self, shares: Sequence[_Share]) -> None:
        """Start a worker for every share."""
        if self.local:
            for share in shares:
                self.executor.update_parameters(visible_gpus=self._gpus(share.number))
                share.job = self._submit(share)
        else:
            with self.executor.batch():
                for share in shares:
                    share.job = self._submit(share)
        self.jobs += [share.job for share in shares]

    def _submit(self, share: _Share) -> Any:
        return self.executor.submit(
            _compute, self.work, *self.arguments, list(share.cells), self.threads)

    def _gpus(self, worker: int) -> tuple[int, ...]:
        """The GPUs of a worker on this machine: dealt in turn."""
        count = self.executor.parameters.get("gpus_per_node", 0)
        named = os.environ.get("CUDA_VISIBLE_DEVICES")
        there = list(range(torch.cuda.device_count()))
        if named is not None and all(one.strip().isdigit() for one in named.split(",")):
            there = [int(one) for one in named.split(",")]
        return tuple(there[(worker * count + i) % len(there)] for i in range(count)) if there else ()

    def done(self, share: _Share) -> bool:
        """Whether the worker has ended, in one way or another."""
        return bool(share.job.done())

    def rest(self, share: _Share) -> list[int]:
        """The cells of a share that are not finished; a slow file system is given time."""
        patience = 0 if self.local or not share.job.paths.result_pickle.exists() else 4
        for wait in range(patience + 1):
            missing = set(self.work.missing())
            rest = [cell for cell in share.cells if cell in missing]
            if not rest or wait == patience:
                break
            time.sleep(self.pause)
        return rest

    def last_words(self, share: _Share) -> str:
        """Why a worker ended: its error, or the last line it wrote. Errors said on purpose rise."""
        error = None
        if share.job.paths.result_pickle.exists():
            with contextlib.suppress(Exception):  # the file may be cut off, too
                error = share.job.result()
        if isinstance(error, (UndertowError, ImportError)):
            raise error
        if error is not None:
            return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
        lines = [line.strip() for line in (share.job.stderr() or "").splitlines()]
        lines = [line for line in lines if line and not line.startswith("submitit ")]
        if lines:
            return f"its last line: {lines[-1][-300:]}"
        state = "" if self.local else f", state {share.job.state}"
        return f"it said nothing, as a process does that is killed, for lack of memory say{state}"

    def cancel(self) -> None:
        """End the workers that still run."""
        for job in self.jobs:
            with contextlib.suppress(Exception):
                if not job.done():
                    job.cancel(check=False)

    def clean(self) -> None:
        """Remove the files of jobs that all went well in the end."""
        for job in self.jobs:
            for path in self.folder.glob(f"{job.job_id}_*"):
                path.unlink(missing_ok=True)
        with contextlib.suppress(OSError):
            for path in self.folder.glob("*.sh"):
                path.unlink(missing_ok=True)
            self.folder.rmdir()


def _for_local(parameters: dict[str, Any]) -> dict[str, Any]:
    known = {"timeout_min", "gpus_per_node", "signal_delay_s", "local_setup"}
    found = {k.removeprefix("local_"): v for k, v in parameters.items() if k in known}
    if "gpus_per_node" not in found and torch.cuda.is_available():
        found["gpus_per_node"] = 1
    return found


def _submitit() -> Any:
    try:
        import submitit
    except ImportError:
        raise ImportError(MISSING) from None
    return submitit


def _compute(
    work: Work, opening: dict[str, Any], weights: str, cells: list[int], threads: int
) -> Optional[BaseException]:
    """In a worker: open the model, compute the cells; an error is handed to the parent."""
    try:
        if threads and "OMP_NUM_THREADS" not in os.environ:
            torch.set_num_threads(threads)
        model = open_model(**opening)
        if fingerprint(model) != weights:
            raise ModelRefused(
                f"a worker that opens {opening['name_or_path']!r} finds other weights than this "
                "process has: they were changed after opening; save the model with "
                "save_pretrained(folder) and open that folder."
            )
        work.compute(model, cells)
    except Exception as error:
        return error
    return None


def deal(cells: Sequence[int], workers: int) -> list[_Share]:
    """Cells dealt to workers in runs, so that each has neighbors, from all parts of the sweep.

    Example:
        >>> [share.cells for share in deal(range(20), 2)]
        [[0, 1, 4, 5, 8, 9, 12, 13, 16, 17], [2, 3, 6, 7, 10, 11, 14, 15, 18, 19]]
    """
    run = max(1, -(-len(cells) // (8 * workers)))
    parts: list[list[int]] = [[] for _ in range(workers)]
    for start in range(0, len(cells), run):
        parts[start // run % workers] += list(cells[start : start + run])
    return [_Share(number, part) for number, part in enumerate(parts) if part]


def opening_of(model: Model, device: Optional[str] = None) -> dict[str, Any]:
    """How another process opens the same model: arguments for `open_model`.

    Example:
        >>> import interp
        >>> opening_of(interp.open_model("backcopy-1l"))["name_or_path"]
        'backcopy-1l'

    Raises:
        ModelRefused: the model was made in memory, so that nobody else can open it.
    """
    name, revision = model.name, model.source.get("revision")
    if model.source.get("local", True):
        revision = None
        where = Path(getattr(model.hf, "name_or_path", "") or "")
        if name not in registry.names() or where != Path(registry.path(name)):
            if not (where / "config.json").is_file() or where == Path(""):
                raise ModelRefused(
                    f"workers open the model by themselves, but {name!r} was made in memory; save it "
                    "with save_pretrained(folder) and open that folder."
                )
            name = str(where.absolute())
    dtype = str(model.dtype).removeprefix("torch.")
    spread = len(set(getattr(model.hf, "hf_device_map", {}).values())) > 1
    if device is None and torch.cuda.is_available() and model.device.type == "cpu":
        device = "cpu"
    return {
        "name_or_path": name, "lane": model.lane, "revision": revision,
        "dtype": dtype if dtype in DTYPES else None,
        "device": "auto" if device is None and spread else device,
        "trust_remote_code": type(model.hf).__module__.startswith("transformers_modules"),
    }
