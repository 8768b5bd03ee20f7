"""The documentation's code runs, its pages hang together, and nothing that exists is left out."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from matplotlib.figure import Figure

from experiments._output import Output
from experiments._paper import Paper, Settings

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
    assert [n for n in _phenomena() if not re.search(rf"{re.escape(n)}\b", written)] == []


def test_every_experiment_stands_on_a_page():
    written = "\n".join(page.read_text() for page in PAGES)
    names = [file.stem for file in (ROOT / "experiments").glob("*.py") if file.stem[0] != "_"]
    assert [name for name in sorted(names) if f"`{name}`" not in written] == []


@pytest.mark.parametrize("page", [p for p in PAGES if p.parent.name == "methods"
                                  and p.stem != "index"], ids=_name)
def test_a_method_page_says_what_it_must(page):
    heads = re.findall(r"^## (.+)$", page.read_text(), re.M)
    assert heads[:4] == ["Definition", "Defaults", "Paper and released code", "Pitfalls"], heads


def test_the_site_builds_offline_without_a_warning(tmp_path):
    made = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--quiet", "--strict", "--site-dir", str(tmp_path)],
        cwd=ROOT, capture_output=True, text=True,
        env={**os.environ, "NO_MKDOCS_2_WARNING": "1", "FIGURES": str(tmp_path / "none")})
    assert made.returncode == 0, made.stdout + made.stderr
    start = (tmp_path / "index.html").read_text()
    # Nothing is fetched from elsewhere: no script, style, font or picture with an address.
    assert not re.findall(r'(?:src|href)="(?:https?:)?//[^"]+\.(?:js|css|woff2?|png|svg)', start)
    assert "find_sink_dims" in (tmp_path / "methods" / "visual-sinks.html").read_text()


def test_the_gallery_of_a_single_result_builds(tmp_path):
    """What a run leaves is shown with its own captions; what is half-written is not."""
    paper = Paper("first_light", "Sinks at first light", ("2410.10781",), "Where is the sink?",
                  figures={"heads": "Of the paper.", "levels": "Not drawn here."})
    with Output(paper, Settings(out=tmp_path / "figures", figure=["heads", "levels"])) as out:
        out.figure("heads", Figure((1, 1)), "A caption of the run.", of="all-minilm-l6-v2")
        out.no_figure("levels", "the model has no levels.")
    for name in (".first_light.partial", "cache", "broken"):
        (tmp_path / "figures" / name).mkdir()
        (tmp_path / "figures" / name / "manifest.json").write_text('{"paper": {}}')
    made = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--quiet", "--strict", "--site-dir",
         str(tmp_path / "site")], cwd=ROOT, capture_output=True, text=True,
        env={**os.environ, "NO_MKDOCS_2_WARNING": "1", "FIGURES": str(tmp_path / "figures")})
    assert made.returncode == 0, made.stdout + made.stderr
    page = (tmp_path / "site" / "gallery.html").read_text()
    assert "A caption of the run." in page and "Where is the sink?" in page
    assert "levels: not drawn; the model has no levels." in page and "broken" not in page
    shown = tmp_path / "site" / "gallery" / "first_light" / "heads.all-minilm-l6-v2.png"
    assert shown.read_bytes() == (out.folder / "heads.all-minilm-l6-v2.png").read_bytes()
