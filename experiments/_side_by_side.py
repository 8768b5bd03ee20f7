"""Experiments in processes of their own, forked from one that has imported everything already.

Importing torch, transformers and the experiments takes seconds, which a fork does not. A process
that dies takes nothing with it.
"""

import multiprocessing
import os
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

PRELOAD = ("experiments.__main__", "interp.models.open", "interp.models.lane_hf", "scipy.stats",
           "sklearn.pipeline", "sklearn.linear_model", "pandas", "xarray")
"""What every experiment needs; a fork has it from the beginning."""


class Child:
    """`python -m experiments WORDS` in a process of its own; what it says is kept.

    Args:
        words: of the command line. threads: of each process, unless OMP_NUM_THREADS says so.
        also: modules to import once for all; only those given first count.
    """

    def __init__(self, words: Sequence[str], threads: str, also: Sequence[str] = ()) -> None:
        handle, said = tempfile.mkstemp(prefix="experiments-", suffix=".log")
        os.close(handle)
        self._said = Path(said)
        method = "forkserver" if "forkserver" in multiprocessing.get_all_start_methods() else "spawn"
        context: Any = multiprocessing.get_context(method)
        if method == "forkserver":
            context.set_forkserver_preload([*PRELOAD, *also])
        before = os.environ.get("OMP_NUM_THREADS")
        os.environ["OMP_NUM_THREADS"] = before or threads  # read where torch is imported
        try:
            self._process = context.Process(target=_run, args=(list(words), said))
            self._process.start()
        finally:
            if before is None:
                del os.environ["OMP_NUM_THREADS"]

    @property
    def returncode(self) -> int:
        return int(self._process.exitcode or 0)

    def communicate(self) -> tuple[str, None]:
        """Wait for the end; what was said."""
        self._process.join()
        said = self._said.read_text(errors="replace")
        self._said.unlink(missing_ok=True)
        if self._process.exitcode and self._process.exitcode < 0:
            said += f"\nThe process was ended by signal {-self._process.exitcode}."
        return said, None

    def terminate(self) -> None:
        if self._process.is_alive():
            self._process.terminate()


def _run(words: list[str], said: str) -> None:
    with open(said, "ab") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    sys.argv = ["python -m experiments", *words]
    from experiments.__main__ import app

    app(words)
