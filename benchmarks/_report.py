"""The tables of the last results, as Markdown, between two marks in docs/benchmarks.md."""

from pathlib import Path
from typing import Any

from benchmarks._tables import HEADER, load, measured, rows, title
from interp.core.result import write_atomically

PAGE = Path(__file__).parents[1] / "docs" / "benchmarks.md"
BEGIN, END = "<!-- tables: made by `python -m benchmarks report` -->", "<!-- end of tables -->"


def markdown(folder: Path) -> str:
    """Targets of all benchmarks first, then every race."""
    records = [load(path) for path in sorted(folder.glob("*.json"))]
    if not records:
        return "No results yet.\n"
    verdicts = [(said["name"], one) for said in records for one in said["targets"]]
    lines = ["## Targets", "",
             *_table(("benchmark", "what", "target", "measured", "verdict"),
                     [(name, one["what"], one["target"], measured(one), one["verdict"])
                      for name, one in verdicts])]
    for said in records:
        lines += ["", f"## {said['name']}", "", _about(said), ""]
        for race in said["races"]:
            cells = rows(race)
            keep = [i for i in range(len(HEADER)) if i == 0 or any(row[i] for row in cells)]
            lines += [f"**{title(race)}**", "",
                      *_table([HEADER[i] for i in keep], [[row[i] for i in keep] for row in cells]),
                      ""]
    return "\n".join(lines).rstrip() + "\n"


def _about(said: dict[str, Any]) -> str:
    about = said["environment"]
    versions = ", ".join(f"{name} {version}" for name, version in about["versions"].items())
    size = " Small sizes (`--quick`): not a measurement." if said["quick"] else ""
    return f"Measured {about['time'][:10]} on {about['device']} ({said['machine']}), one thread; " \
           f"{versions}.{size}"


def _table(header: Any, cells: Any) -> list[str]:
    def row(values: Any) -> str:
        return "| " + " | ".join(str(value).replace("|", "\\|") for value in values) + " |"

    return [row(header), row(["---"] * len(header)), *map(row, cells)]


def write(folder: Path, page: Path = PAGE) -> Path:
    """Put the tables between the marks of the page; the rest of it stays.

    Raises `ValueError` if the page has no such marks.
    """
    text = page.read_text()
    if BEGIN not in text or END not in text:
        raise ValueError(f"{page.name} has no marks for the tables; put {BEGIN!r} and {END!r} in.")
    before, after = text.split(BEGIN)[0], text.split(END)[1]
    write_atomically(page, f"{before}{BEGIN}\n\n{markdown(folder)}\n{END}{after}")
    return page
