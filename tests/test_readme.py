"""The README's code runs as it stands."""

import re
from pathlib import Path

README = Path(__file__).resolve().parents[1] / "README.md"


def test_the_example_of_the_readme_runs(capsys):
    blocks = re.findall(r"```python\n(.*?)```", README.read_text(), re.S)
    scope: dict = {}
    exec(compile("\n".join(blocks), "README.md", "exec"), scope)
    assert len(blocks) == 4 and scope["sweep"].plan().forwards
    assert scope["found"]["accuracy"].sel(count=0).min() == 1
    assert len(scope["heads"]) == 3
    assert float(scope["change"].abs().max()) > 0
    assert "resid_post" in capsys.readouterr().out


def test_every_path_in_the_readme_exists():
    text = README.read_text()
    root = README.parent
    paths = re.findall(r"`((?:interp|probes|experiments|docs|notebooks)/[\w/.-]*)`", text)
    assert paths and all((root / p).exists() for p in paths), paths
    assert (root / re.search(r"\]\((docs/[\w/.]+png)\)", text)[1]).is_file()
