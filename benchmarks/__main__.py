"""The command line: `python -m benchmarks [NAME ...] [--quick] [--out DIR]`, `list`, `report`."""

import importlib
import os
import pkgutil
import subprocess
import sys
import tempfile
from pathlib import Path
from types import ModuleType
from typing import Annotated, Any, Optional

import typer
from rich.console import Console

import benchmarks
from benchmarks import _report, _tables
from benchmarks._race import reason

RESULTS = Path(__file__).parent / "results"

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


def _console() -> Console:
    return Console(width=None if sys.stdout.isatty() or "COLUMNS" in os.environ else 140)


def names() -> list[str]:
    """All benchmarks, by the names of their modules."""
    return sorted(module.name for module in pkgutil.iter_modules(benchmarks.__path__)
                  if not module.name.startswith("_"))


def run(module: ModuleType, quick: bool, device: str, out: Path, console: Console) -> Path:
    """Run one benchmark, print its races, and write its record."""
    races = module.race(quick, device)
    for race in races:
        _tables.show(race, console)
    said = _tables.record(module.NAME, races, module.TARGETS, quick, device)
    return _tables.save(out, said)


@app.command()
def main(
    which: Annotated[Optional[list[str]], typer.Argument(
        metavar="[NAME ...]", help="Benchmarks; all by default. 'list' names them, 'report' "
        "writes the tables of the last results into docs/benchmarks.md.")] = None,
    quick: Annotated[bool, typer.Option(
        "--quick", help="Small sizes and few rounds: does it run, not how fast.")] = False,
    out: Annotated[Optional[Path], typer.Option(
        help="Where the JSON goes; benchmarks/results by default, nowhere with --quick.")] = None,
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
) -> None:
    """Measure the speed of undertow against its peers, side by side."""
    console, known = _console(), names()
    chosen = which or known
    if chosen == ["list"]:
        for name in known:
            console.print(f"{name}: {_first_line(name)}")
        return
    if chosen == ["report"]:
        console.print(f"Wrote {_report.write(RESULTS if out is None else out).name}.")
        return
    strange = [name for name in chosen if name not in known]
    if strange:
        typer.echo(f"there is no benchmark {strange[0]!r}; choose from: {', '.join(known)}.",
                   err=True)
        raise typer.Exit(2)
    with tempfile.TemporaryDirectory() as scratch:
        if out is None:
            out = Path(scratch) if quick else RESULTS
        failed = False
        for name in chosen:
            if len(chosen) == 1:
                failed |= _one(name, quick, device, out, console)
            else:  # each in a process of its own: no benchmark sees another's memory
                failed |= bool(subprocess.run(
                    [sys.executable, "-m", "benchmarks", name, "--out", str(out.resolve()),
                     "--device", device, *(["--quick"] if quick else [])],
                    cwd=Path(__file__).parents[1]).returncode)
        verdicts: list[dict[str, Any]] = []
        for name in chosen:
            path = out / f"{name}.json"
            if path.exists():
                verdicts += _tables.load(path)["targets"]
        _tables.summary(verdicts, console)
    raise typer.Exit(1 if failed else 0)


def _one(name: str, quick: bool, device: str, out: Path, console: Console) -> bool:
    """Run one benchmark; True if it failed, which is then said in one sentence."""
    try:
        run(importlib.import_module(f"benchmarks.{name}"), quick, device, out, console)
    except Exception as error:
        typer.echo(f"{name}: {reason(error)}", err=True)
        return True
    return False


def _first_line(name: str) -> str:
    return (importlib.import_module(f"benchmarks.{name}").__doc__ or "").strip().split("\n")[0]


if __name__ == "__main__":
    app()
