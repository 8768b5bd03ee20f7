"""The documentation's code runs, its pages hang together, and nothing that exists is left out."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
DOCS = ROOT / "docs"
PAGES = sorted(page for page in DOCS.rglob("*.md") if "decisions" not in page.parts)
CODE = re.compile(r"^```python\n(.*?)^```", re.S | re.M)
LINK = re.compile(r"\]\((?!https?:|#|mailto:)([^)#\s]+)[^)]*\)")
MADE = {"gallery.md", "decisions/index.md"}
"""Pages that the site's hook writes."""


def _name(page: Path) -> str:
    return page.relative_to(DOCS).as_posix()


@pytest.mark.parametrize("page", [p for p in PAGES if CODE.search(p.read_text())], ids=_name)
def test_the_code_of_a_page_runs_from_top_to_bottom(page, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    space: dict = {"__name__": "page"}
    for block in CODE.findall(page.read_text()):
        exec(compile(block, _name(page), "exec"), space)


@pytest.mark.parametrize("page", PAGES, ids=_name)
def test_links_lead_somewhere(page):
    for target in LINK.findall(page.read_text()):
        there = (page.parent / target).resolve()
        inside = there.is_relative_to(DOCS) and there.relative_to(DOCS).as_posix() in MADE
        assert inside or there.exists(), f"{_name(page)} links to {target}"


def _phenomena() -> list[str]:
    return [f"{package}.{file.stem}".replace("/", ".")
            for package in ("interp/sinks", "interp/heads", "interp/flow", "probes")
            for file in sorted((ROOT / package).glob("*.py")) if not file.stem.startswith("_")]


def test_every_phenomenon_stands_on_a_page():
    written = "\n".join(page.read_text() for page in PAGES)
    assert [name for name in _phenomena() if name not in written] == []


def test_every_experiment_stands_on_a_page():
    written = "\n".join(page.read_text() for page in PAGES)
    names = [file.stem for file in (ROOT / "experiments").glob("*.py") if file.stem[0] != "_"]
    assert [name for name in sorted(names) if f"`{name}`" not in written] == []


@pytest.mark.parametrize("page", [p for p in PAGES if p.parent.name == "methods"
                                  and p.stem != "index"], ids=_name)
def test_a_method_page_says_what_it_must(page):
    heads = re.findall(r"^## (.+)$", page.read_text(), re.M)
    assert heads[:4] == ["Definition", "Defaults", "Paper and released code", "Pitfalls"], heads
