"""What the documentation's build adds: the gallery, and the lists of methods and decisions.

The gallery shows what is in the folder of figures (`make figures`), or says how to get there.
"""

import json
import os
from pathlib import Path
from typing import Any

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files

ROOT = Path(__file__).resolve().parent.parent
FIGURES = Path(os.environ.get("FIGURES", ROOT / "figures"))
EMPTY = """# Gallery

There are no figures in this build. `make figures docs` draws them and builds these
pages again; `python -m experiments report` makes one self-contained page of them.
"""


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """Fill the parts of the navigation that follow the files."""
    docs = Path(config.docs_dir)
    for entry in config.nav or []:
        for title, target in entry.items():
            if isinstance(target, str) and target.endswith("/"):
                pages = sorted(p.name for p in (docs / target).glob("*.md") if p.name != "index.md")
                entry[title] = [f"{target}index.md", *(f"{target}{name}" for name in pages)]
    return config


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the pages that are made here."""
    made = {"gallery.md": _gallery(files, config), "decisions/index.md": _decisions(config)}
    for name, text in made.items():
        files.append(File.generated(config, name, content=text))
    return files


def _decisions(config: MkDocsConfig) -> str:
    lines = ["# Decisions", "", "Where the code departs from the obvious, and why.", ""]
    for page in sorted((Path(config.docs_dir) / "decisions").glob("[0-9]*.md")):
        title = page.read_text().splitlines()[0].lstrip("# ")
        lines.append(f"- [{title}]({page.name})")
    return "\n".join(lines) + "\n"


def _results() -> list[tuple[Path, dict[str, Any]]]:
    """Folders of finished runs and their manifests; what is hidden or kept for later is none."""
    found = []
    for manifest in sorted(FIGURES.glob("**/manifest.json")):
        inside = manifest.parent.relative_to(FIGURES).parts
        if any(part == "cache" or part.startswith(".") for part in inside):
            continue
        try:
            content = json.loads(manifest.read_text(encoding="utf-8"))
        except ValueError:
            continue
        if isinstance(content, dict) and {"paper", "figures", "models"} <= set(content):
            found.append((manifest.parent, content))
    return found


def _gallery(files: Files, config: MkDocsConfig) -> str:
    results = _results()
    if not results:
        return EMPTY
    lines = ["# Gallery", "", "Every figure of `make figures`, with the models it was drawn from.", ""]
    for folder, content in results:
        paper, models = content["paper"], [m.get("name", "?") for m in content["models"]]
        papers = ", ".join(f"arXiv:{number}" for number in paper["arxiv"])
        tiny = content.get("settings", {}).get("tiny")
        lines += [f"## {folder.relative_to(FIGURES).as_posix()}", "",
                  f"{paper['question']} *{paper['title']}* ({papers})", "",
                  f"Models: {', '.join(dict.fromkeys(models)) or 'none'}."
                  + " A tiny run: do not quote its numbers." * bool(tiny), ""]
        for drawn in content["figures"]:
            picture = next((folder / name for name in drawn["files"] if name.endswith(".png")), None)
            if picture is None or not picture.is_file():
                lines += [f"*{drawn['name']}: not drawn; {drawn['reason'] or 'no reason was kept'}*", ""]
                continue
            target = f"gallery/{picture.relative_to(FIGURES).as_posix()}"
            files.append(File.generated(config, target, content=picture.read_bytes()))
            lines += [f"![{picture.stem}]({target})", "", f"*{drawn['caption']}*", ""]
    return "\n".join(lines) + "\n"
