"""Sweeps by workers: the same numbers as in one process, none lost when workers die."""

import copy
import os
import signal
import sys
import types
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch

import interp
from interp.causal import executors, sweep
from interp.causal.cell_makers import every_head
from interp.causal.cells import HEADER
from interp.causal.executors import Jobs, deal, in_process, opening_of
from interp.causal.grid import Sweep
from interp.causal.metrics import AnswerLogProb, LogitDifference
from interp.core import ModelRefused, WorkerDied
from interp.models.model import Model

HEADS = [f"L{layer}H{head}" for layer in range(3) for head in range(2)]


@pytest.fixture(scope="module")
def model(tiny, tmp_path_factory):
    """A Llama that workers can open: it lies in a folder."""
    folder = tmp_path_factory.mktemp("models") / "llama"
    tiny("llama").save_pretrained(folder)
    return interp.open_model(folder, device="cpu")


PROMPTS = [interp.Prompt.from_tokens(row) for row in np.random.default_rng(0).integers(3, 90, (2, 9))]
WRITES = [(), *(interp.ablate(head) for head in HEADS)]
METRICS = [AnswerLogProb([[5], [7]]), LogitDifference([5, 7], [6, 8])]


def run(model, folder=None, executor=None, writes=WRITES, metrics=METRICS):
    return sweep.evaluate(model, PROMPTS, metrics, writes, folder=folder, executor=executor)


@pytest.fixture(scope="module")
def alone(model):
    return run(model)


def same(found, expected):
    return all(np.array_equal(found[name], values) for name, values in expected.items())


class Killing(AnswerLogProb):
    """Its passes kill the process in which a chosen head is cut, as often as the file says."""

    def __init__(self, answers, head, times, times_file):
        super().__init__(answers)
        self.head, self.times, self.file = head, times, Path(times_file)
        self.parent = os.getpid()

    def passes(self, model, prompts, write):
        with self.file.with_suffix(".passes").open("a") as file:
            file.write(f"{os.getpid()}\n")
        deaths = int(self.file.read_text()) if self.file.exists() else 0
        if os.getpid() != self.parent and deaths < self.times and write and str(
                write.heads[0]) == self.head:
            self.file.write_text(str(deaths + 1))
            print("cells are heavy today", file=sys.stderr, flush=True)
            os.kill(os.getpid(), signal.SIGKILL)
        return super().passes(model, prompts, write)


class ForkedJob:
    """What `submitit.LocalJob` is to us, without the seconds a new Python takes to import torch."""

    def __init__(self, folder, function, given):
        folder.mkdir(parents=True, exist_ok=True)
        self.log, self.given = folder / "log", given
        self.paths = types.SimpleNamespace(result_pickle=folder / "none")
        self.error = folder / "error"
        self.pid = os.fork()
        self.job_id = str(self.pid)
        if not self.pid:
            code = 9
            try:
                with self.log.open("w") as file:
                    os.dup2(file.fileno(), 2)
                    sys.stderr = os.fdopen(2, "w")
                    torch.set_num_threads(1)
                    found = function(*given)
                    if found is not None:
                        (folder / "none").write_text("")
                        self.error.write_text(f"{type(found).__name__}|{found}")
                    code = 0
            finally:
                os._exit(code)

    def done(self):
        pid, _ = os.waitpid(self.pid, os.WNOHANG) if self.pid else (1, 0)
        self.pid = 0 if pid else self.pid
        return not self.pid

    def stderr(self):
        return self.log.read_text()

    def result(self):
        name, _, text = self.error.read_text().partition("|")
        return {"ModelRefused": ModelRefused}.get(name, RuntimeError)(text)

    def cancel(self, check=True):
        os.kill(self.pid, signal.SIGKILL)
        os.waitpid(self.pid, 0)
        self.pid = 0


class ForkedExecutor:
    jobs: list = []

    def __init__(self, folder):
        self.folder, self.parameters = Path(folder), {}

    def update_parameters(self, **parameters):
        self.parameters.update(parameters)

    def submit(self, function, *given):
        self.jobs.append(ForkedJob(self.folder / str(len(self.jobs)), function, given))
        return self.jobs[-1]


@pytest.fixture
def forked(monkeypatch):
    monkeypatch.setattr(ForkedExecutor, "jobs", [])
    monkeypatch.setattr(executors, "_submitit",
                        lambda: types.SimpleNamespace(LocalExecutor=ForkedExecutor))
    return ForkedExecutor.jobs


def test_cells_are_dealt_once_each():
    for count, workers in ((1, 4), (7, 2), (64, 3), (0, 2)):
        shares = deal(range(count), workers)
        assert sorted(cell for share in shares for cell in share.cells) == list(range(count))
        assert len(shares) <= workers and all(share.cells for share in shares)


def test_workers_give_the_numbers_of_one_process_and_leave_nothing_to_compute(
        model, alone, forked, tmp_path, monkeypatch):
    found = run(model, tmp_path / "a", Jobs(3))
    assert same(found, alone) and len(forked) == 3
    assert same(run(model, tmp_path / "b", in_process()), alone)
    assert {path.name for path in (tmp_path / "a").iterdir()} - {"jobs"} == {
        path.name for path in (tmp_path / "b").iterdir()}
    # Further cells: only these are given to workers; none for what is finished.
    more = [*WRITES, interp.ablate("L2H3")]
    shares = run(model, tmp_path / "a", Jobs(3), more)
    assert len(forked) == 4 and np.array_equal(shares["log_prob"][:-1], alone["log_prob"])
    monkeypatch.setattr(AnswerLogProb, "passes", lambda *_: pytest.fail("computed again"))
    assert len(run(model, tmp_path / "a", Jobs(3), more)["log_prob"]) == len(more)
    assert len(forked) == 4


def test_a_worker_that_dies_is_replaced_and_its_cells_are_redone(model, alone, forked, tmp_path):
    killing = Killing([[5], [7]], "L1H1", 1, tmp_path / "deaths")
    with pytest.warns(RuntimeWarning, match="died with . cells left.*cells are heavy today"):
        found = run(model, tmp_path / "a", Jobs(2), metrics=[killing])
    assert np.array_equal(found["log_prob"], alone["log_prob"])
    assert len(forked) == 3 and (tmp_path / "deaths").read_text() == "1"
    # One cell was begun twice, none was finished twice, and the parent computed none.
    begun = (tmp_path / "deaths.passes").read_text().split()
    assert len(begun) == len(WRITES) + 1 and str(os.getpid()) not in begun


def test_a_cell_that_kills_every_worker_is_given_up_and_all_others_are_finished(
        model, alone, forked, tmp_path):
    killing = Killing([[5], [7]], "L0H1", 100, tmp_path / "deaths")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)
        with pytest.raises(WorkerDied) as caught:
            run(model, tmp_path / "a", Jobs(2, restarts=1), metrics=[killing])
    said = str(caught.value)
    assert said.startswith("1 cells are not finished: their worker died 2 times in a row (its last "
                           "line: cells are heavy today)") and "\n" not in said
    assert len(list((tmp_path / "a").glob("*.json"))) == len(WRITES)  # all but one, and the header
    # In a process that bears it, the rest is computed, and only that.
    before = len((tmp_path / "deaths.passes").read_text().split())
    found = run(model, tmp_path / "a", metrics=[killing])
    assert np.array_equal(found["log_prob"], alone["log_prob"])
    assert len((tmp_path / "deaths.passes").read_text().split()) == before + 1


class Whole:
    """A sweep that divides itself by claims."""

    def __init__(self, metric, folder):
        self.metric, self.folder = metric, folder

    def __call__(self, model):
        run(model, self.folder, metrics=[self.metric])


@pytest.mark.parametrize("deaths", [0, 1])
def test_a_sweep_that_divides_itself_is_run_by_all_workers_and_each_cell_once(
        model, alone, forked, tmp_path, deaths):
    killing = Killing([[5], [7]], "L1H1", deaths, tmp_path / "deaths")
    work = executors.Together(tmp_path / "a", Whole(killing, tmp_path / "a"))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)
        Jobs(3).run(model, work)
    begun = (tmp_path / "deaths.passes").read_text().split()
    assert len(begun) == len(WRITES) + deaths and str(os.getpid()) not in begun
    found = run(model, tmp_path / "a", metrics=[killing])
    assert np.array_equal(found["log_prob"], alone["log_prob"])
    assert len((tmp_path / "deaths.passes").read_text().split()) == len(begun)
    assert not list((tmp_path / "a").glob(".*"))


def test_a_grid_gives_the_same_by_workers(model, forked, tmp_path):
    def grid(**how):
        return Sweep(model, PROMPTS, every_head(), METRICS[1], **how).run()["effect"].values

    found = grid(folder=tmp_path / "a", executor=Jobs(2))
    assert len(forked) == 2 and np.allclose(found, grid(), atol=1e-6, rtol=0)
    assert np.array_equal(found, grid(folder=tmp_path / "a", executor=in_process()))
    with pytest.raises(ValueError, match="needs folder="):
        grid(executor=Jobs(2))


def test_an_error_on_purpose_ends_the_sweep_and_its_workers(model, forked, tmp_path):
    # Weights that were changed in memory: a worker finds others in the folder.
    changed = Model(model.hf, model.name, source=model.source)
    with torch.no_grad():
        model.hf.model.norm.weight[0] += 1.0
    try:
        with pytest.raises(ModelRefused, match="other weights than this process has.*save_pretrained"):
            run(changed, tmp_path / "a", Jobs(2))
    finally:
        with torch.no_grad():
            model.hf.model.norm.weight[0] -= 1.0
    assert all(job.done() for job in forked)
    assert [path.name for path in (tmp_path / "a").iterdir() if path.is_file()] == [HEADER]


def test_what_cannot_be_divided_is_one_sentence(model, tiny, tmp_path, monkeypatch):
    with pytest.raises(ValueError, match="needs folder="):
        run(model, executor=Jobs(2))
    with pytest.raises(ModelRefused, match="made in memory; save it with save_pretrained"):
        opening_of(Model(tiny("llama"), "mine"))
    with pytest.raises(ValueError, match="at least one worker"):
        Jobs(0)
    monkeypatch.setitem(sys.modules, "submitit", None)
    with pytest.raises(ImportError, match=r"pip install 'undertow\[cluster\]'"):
        run(model, tmp_path / "a", Jobs(2))


def test_workers_open_what_was_opened(model):
    again = interp.open_model(**opening_of(model))
    assert sweep.fingerprint(again) == sweep.fingerprint(model) and again.dtype == model.dtype
    half = interp.open_model(model.hf.name_or_path, dtype="bfloat16", device="cpu")
    assert opening_of(half)["dtype"] == "bfloat16"
    assert opening_of(interp.open_model("backcopy-1l"))["name_or_path"] == "backcopy-1l"


def test_parameters_reach_slurm_and_a_job_that_fails_there_is_told(
        model, tmp_path, monkeypatch):
    """Slurm's commands are scripts here: one keeps what was submitted, one says that it failed."""
    pytest.importorskip("submitit")
    there = tmp_path / "bin"
    there.mkdir()
    for name, does in (("srun", "exit 1"), ("sbatch", f"cp $1 {tmp_path}/sent; echo job 12"),
                       ("sacct", "echo 'JobID|State|NodeList'; echo '12|OUT_OF_MEMORY|n1'")):
        (there / name).write_text(f"#!/bin/sh\n{does}\n")
        (there / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{there}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setattr(executors, "PAUSE", 0.01)
    jobs = Jobs(1, cluster="slurm", restarts=0, gpus_per_node=2, timeout_min=77, mem_gb=48,
                slurm_partition="big")
    with pytest.raises(WorkerDied, match="7 cells are not finished.*state OUT_OF_MEMORY"):
        run(model, tmp_path / "a", jobs)
    sent = (tmp_path / "sent").read_text()
    for line in ("--gpus-per-node=2", "--time=77", "--mem=48GB", "--partition=big"):
        assert f"#SBATCH {line}\n" in sent
    with pytest.raises(NameError, match="slurm_partitoin|partitoin"):
        run(model, tmp_path / "b", Jobs(1, cluster="slurm", slurm_partitoin="big"))


def test_weights_that_accelerate_moved_away_have_the_same_fingerprint(model):
    accelerate = pytest.importorskip("accelerate")
    moved = copy.deepcopy(model.hf)
    accelerate.cpu_offload(moved, execution_device="cpu")
    assert next(moved.parameters()).is_meta
    other = copy.copy(model)
    other.hf = moved
    assert sweep.fingerprint(other) == sweep.fingerprint(model)


@pytest.mark.slow
def test_real_workers_of_submitit_one_of_which_is_killed(model, alone, tmp_path):
    """Processes of their own, started and watched by submitit's local executor."""
    killing = Killing([[5], [7]], "L1H1", 1, tmp_path / "deaths")
    with pytest.warns(RuntimeWarning, match="cells are heavy today"):
        found = run(model, tmp_path / "a", Jobs(2), metrics=[killing])
    assert np.allclose(found["log_prob"], alone["log_prob"], atol=1e-6, rtol=0)
    begun = (tmp_path / "deaths.passes").read_text().split()
    assert len(begun) == len(WRITES) + 1 and len(set(begun)) == 3 and str(os.getpid()) not in begun
    assert not (tmp_path / "a" / "jobs").exists()
