"""Tables of races: to the terminal, to JSON and back, to the documentation."""

import json
import platform
from collections.abc import Sequence
from dataclasses import asdict
from importlib import metadata
from pathlib import Path
from typing import Any, Optional

import torch
from rich.console import Console
from rich.table import Table
from rich.text import Text

from benchmarks._race import Line, Race, Target
from interp.core.result import environment, write_atomically

PEERS = ("pyvene", "scikit-learn", "accelerate", "submitit")
LOOKS = {"met": "bold green", "missed": "bold red", "not measured": "dim"}
HEADER = ("contender", "time", "ratio", "95 % interval", "difference", "peak memory", "of floor")


def rows(race: Race) -> list[tuple[str, ...]]:
    """The cells of a race's table, one row per contender."""
    found = []
    for name, line in race.lines.items():
        if line.failed and line.memory is None:
            found.append((name, line.failed, *[""] * 5))
            continue
        ratio = interval = ""
        if line.median is not None and race.lines[race.reference].median is not None:
            estimate = race.ratio(name, race.reference) if line.wrong is None else None
            if estimate is not None:
                ratio = f"{estimate.value:.2f}"
                low, high = estimate.interval
                interval = f"{low:.2f} to {high:.2f}" if low == low else ""
        difference = "" if line.difference is None else f"{line.difference:.1e}"
        found.append((
            name, line.failed or _time(line.median), ratio, interval,
            line.wrong or difference,
            "" if line.memory is None else f"{line.memory / 1e9:.2f} GB",
            "" if line.floor_share is None else f"{line.floor_share:.0%}",
        ))
    return found


def _time(seconds: Optional[float]) -> str:
    if seconds is None:
        return ""
    return f"{seconds:.2f} s" if seconds >= 1 else f"{1000 * seconds:.1f} ms"


def show(race: Race, console: Console) -> None:
    """Print one race; columns that nothing was measured for are left out."""
    cells = rows(race)
    table = Table(title=title(race), title_justify="left")
    keep = [i for i in range(len(HEADER)) if i == 0 or any(row[i] for row in cells)]
    for i in keep:
        table.add_column(HEADER[i], overflow="fold")
    for row in cells:
        table.add_row(*(Text(row[i]) for i in keep))
    console.print(table)


def title(race: Race) -> str:
    """The race's name and what its numbers refer to."""
    n = max((len(line.seconds) for line in race.lines.values()), default=0)
    said = f"{race.name}: ratio to {race.reference}, {race.clock}, {n} rounds"
    if race.matrix_rate:
        said += f", matrix rate {race.matrix_rate / 1e9:.0f} GFLOP/s"
    return said


def summary(verdicts: Sequence[dict[str, Any]], console: Console) -> None:
    """Print targets, what was measured, and whether they were met."""
    table = Table(title="Targets", title_justify="left")
    for column in ("what", "target", "measured", "verdict"):
        table.add_column(column, overflow="fold")
    for said in verdicts:
        verdict = said["verdict"]
        table.add_row(Text(said["what"]), said["target"], measured(said),
                      Text(verdict, style=LOOKS[verdict]))
    console.print(table)


def measured(said: dict[str, Any]) -> str:
    """A target's measured value with its interval, or the reason why there is none."""
    if "measured" not in said:
        return said.get("reason", "")
    text = f"{said['measured']:.3g}"
    if "interval" in said:
        text += f" [{said['interval'][0]:.3g}, {said['interval'][1]:.3g}]"
    return text


def record(name: str, races: Sequence[Race], targets: Sequence[Target], quick: bool,
           device: str) -> dict[str, Any]:
    """Everything that one benchmark measured, ready for JSON."""
    about = environment()
    for package in PEERS:
        try:
            about["versions"][package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            about["versions"][package] = "not installed"
    about["device"] = torch.cuda.get_device_name(device) if device.startswith("cuda") else "cpu"
    by_name = {race.name: race for race in races}
    return {
        "name": name, "quick": quick, "threads": 1, "machine": platform.machine(),
        "environment": about, "races": [asdict(race) for race in races],
        "targets": [target.judge(by_name) for target in targets],
    }


def save(folder: Path, said: dict[str, Any]) -> Path:
    """Write a benchmark's record to `NAME.json`, times rounded to four digits."""
    path = folder / f"{said['name']}.json"
    write_atomically(path, json.dumps(_rounded(said), indent=1) + "\n")
    return path


def _rounded(value: Any) -> Any:
    if isinstance(value, float):
        return float(f"{value:.4g}") if value == value else None
    if isinstance(value, dict):
        return {key: _rounded(one) for key, one in value.items()}
    return [_rounded(one) for one in value] if isinstance(value, (list, tuple)) else value


def load(path: Path) -> dict[str, Any]:
    """A saved record, its races as `Race` again."""
    said = json.loads(path.read_text())
    said["races"] = [
        Race(**{**race, "lines": {name: Line(**line) for name, line in race["lines"].items()}})
        for race in said["races"]
    ]
    return said
