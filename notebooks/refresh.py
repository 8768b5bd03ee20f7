"""Run the notebooks and keep what they show, small and clean: `python notebooks/refresh.py [NAME ...]`.

Outputs are kept in these notebooks on purpose, so that they can be read without running them. Kept are
text and figures; thrown away are execution times, widget views and every trace of the machine. A cell
that fails, writes to the error stream or shows a path of this machine is refused, and nothing is written.
"""

import json
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import nbformat
from jupyter_client.manager import AsyncKernelManager
from jupyter_core.utils import run_sync
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError

FOLDER = Path(__file__).resolve().parent
LARGEST = 400_000
"""Bytes that a notebook may have, with its outputs."""

METADATA = {"language_info": {"name": "python"}}
WIDGET = "application/vnd.jupyter.widget-view+json"


def clean(notebook: Any) -> Any:
    """The notebook without widget views, execution times and the machine it ran on."""
    notebook.metadata, count = nbformat.from_dict(METADATA), 0
    for number, cell in enumerate(notebook.cells):
        cell["id"], cell["metadata"] = str(number), nbformat.from_dict({})
        if cell.cell_type != "code":
            continue
        count += 1
        cell["execution_count"] = None if cell.execution_count is None else count
        cell["outputs"] = [out for out in cell.outputs if WIDGET not in out.get("data", {})]
        for out in cell.outputs:
            if "metadata" in out:
                out["metadata"] = nbformat.from_dict({})
            if "execution_count" in out:
                out["execution_count"] = count
    return notebook


def problems(notebook: Any) -> list[str]:
    """Why these outputs may not be committed; empty if they may."""
    found = []
    machine = {str(Path.home()), str(FOLDER.parent), sys.prefix, str(Path(sys.executable).parent)}
    for number, cell in enumerate(notebook.cells, 1):
        if cell.cell_type != "code":
            continue
        if cell.execution_count is None:
            found.append(f"cell {number} was not run")
        for out in cell.outputs:
            text = json.dumps({k: v for k, v in out.items() if k != "data"}) + "".join(
                str(v) for k, v in out.get("data", {}).items() if not k.startswith("image/"))
            if out.output_type == "error":
                found.append(f"cell {number} fails: {out.get('ename')}: {out.get('evalue')}")
            if out.get("name") == "stderr":
                found.append(f"cell {number} writes to the error stream: {text[:200]}")
            if any(place in text for place in machine if len(place) > 1):
                found.append(f"cell {number} shows a path of this machine: {text[:200]}")
    size = len(nbformat.writes(notebook))
    if size > LARGEST:
        found.append(f"it has {size:,} bytes; at most {LARGEST:,} are kept in the repository")
    return found


@contextmanager
def kernel() -> Iterator[AsyncKernelManager]:
    """One kernel for all notebooks, because importing takes longer than most of them run."""
    manager = AsyncKernelManager(kernel_name="python3")
    try:
        yield manager
    finally:
        if manager.has_kernel:
            run_sync(manager.shutdown_kernel)(now=True)


def run(notebook: Any, manager: AsyncKernelManager, timeout: float = 600) -> Any:
    """Run a notebook from an empty namespace. Raises `CellExecutionError` where a cell fails."""
    notebook.cells.insert(0, nbformat.v4.new_code_cell("%reset -f"))
    try:
        NotebookClient(notebook, km=manager, timeout=timeout, store_widget_state=False,
                       coalesce_streams=True,
                       resources={"metadata": {"path": str(FOLDER)}}).execute()
    finally:
        del notebook.cells[0]
    return notebook


def refresh(path: Path, manager: AsyncKernelManager) -> list[str]:
    """Run one notebook and write it back if nothing speaks against it."""
    notebook, start = nbformat.read(path, 4), time.monotonic()
    try:
        found = problems(clean(run(notebook, manager)))
    except CellExecutionError as error:
        found = [str(error)]
    if not found:
        nbformat.write(notebook, path)
    size = len(nbformat.writes(notebook)) // 1000
    print(f"{path.name}: {time.monotonic() - start:.0f} s, {size} kB", *found, sep="\n  ", flush=True)
    return found


if __name__ == "__main__":
    chosen = [FOLDER / f"{name.removesuffix('.ipynb')}.ipynb" for name in sys.argv[1:]]
    with kernel() as one:
        failed = [p.name for p in chosen or sorted(FOLDER.glob("*.ipynb")) if refresh(p, one)]
    sys.exit(f"not written: {', '.join(failed)}" if failed else 0)
