"""Peak memory of one computation, in a process of its own, under a limit."""

import importlib
import json
import resource
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks._race import OutOfMemory, reason

ROOT = Path(__file__).resolve().parents[1]


def peak_memory(module: str, function: str, arguments: dict[str, Any], limit: float) -> float:
    """Bytes at the peak of a computation in a fresh process; see `fresh`."""
    return fresh(module, function, arguments, limit)["peak"]


def fresh(module: str, function: str, arguments: dict[str, Any], limit: float) -> dict[str, float]:
    """Run `module.function(**arguments)()` in a new process, and report what it took.

    The function prepares and returns what is measured. Returns bytes resident `before` it and at
    the `peak` (of the whole process, or of the GPU), and processor `seconds`.

    Args:
        limit: bytes of data that the process may allocate.

    Raises:
        OutOfMemory: it needs more than the limit.
        RuntimeError: it failed otherwise, with the reason.
    """
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks._fresh", module, function, json.dumps(arguments),
         str(int(limit))], cwd=ROOT, capture_output=True, text=True,
    )
    last = done.stdout.strip().splitlines()[-1:] or ["{}"]
    try:
        found = json.loads(last[0])
    except json.JSONDecodeError:
        found = {}
    if "peak" in found:
        return found
    said = found.get("failed", "")
    if "memory" in said or done.returncode in (-9, 137):
        raise OutOfMemory(f"out of memory at {limit / 1e9:.0f} GB")
    raise RuntimeError(said or (done.stderr.strip().splitlines() or ["no reason given"])[-1])


def _forget_peak() -> int:
    """Bytes resident now; what imports took at their peak counts no more, where Linux allows it."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
        return _status("VmRSS")
    except OSError:
        return _peak()


def _peak() -> int:
    try:
        return _status("VmHWM")
    except OSError:
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def _status(name: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{name}:"))


def _main(module: str, function: str, arguments: str, limit: str) -> None:
    resource.setrlimit(resource.RLIMIT_DATA, (int(limit), int(limit)))
    try:
        import torch

        torch.set_num_threads(1)
        given = json.loads(arguments)
        run: Callable[[], Any] = getattr(importlib.import_module(module), function)(**given)
        on_gpu = str(given.get("device", "cpu")).startswith("cuda")
        if on_gpu:
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
        else:
            before = _forget_peak()
        start = time.process_time()
        run()
        seconds = time.process_time() - start
        peak = torch.cuda.max_memory_allocated() if on_gpu else _peak()
        said = {"before": before, "peak": peak, "seconds": seconds}
    except Exception as error:
        said = {"failed": reason(error)}
    print(json.dumps(said))


if __name__ == "__main__":
    _main(*sys.argv[1:])
