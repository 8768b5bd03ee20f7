"""The README's code runs as it stands, and shows what its sentences say."""

import re
from pathlib import Path

from interp.causal.sweep import random_sets

README = Path(__file__).resolve().parents[1] / "README.md"


def test_the_example_of_the_readme_runs(capsys):
    blocks = re.findall(r"```python\n(.*?)```", README.read_text(), re.S)
    scope: dict = {}
    exec(compile("\n".join(blocks), "README.md", "exec"), scope)
    assert len(blocks) == 4 and scope["sweep"].plan().forwards
    shown = capsys.readouterr().out.splitlines()
    assert shown[0] == "('prompt', 'layer', 'position', 'd_model')"      # as the comment beside it says
    said = shown[3:5]
    assert said[0] == "seven ten two" != said[1]                         # without and with the cut
    assert {"resid_post", "pattern"} <= set(re.findall(r"'(\w+)'", shown[2]))
    # Prompts that differ, all answered, and heads that matter more than their controls.
    assert len({prompt.ids for prompt in scope["prompts"]}) == len(scope["prompts"]) > 4
    found = scope["found"]
    assert found["accuracy"].sel(count=0).min() == 1 and found["layer_matched"].all()
    assert scope["difference"](found, "log_prob", 3).interval[1] < 0
    assert random_sets(found, 3) >= 5


def test_every_path_in_the_readme_exists():
    text = README.read_text()
    root = README.parent
    paths = re.findall(r"`((?:interp|probes|experiments|docs|notebooks)/[\w/.-]*)`", text)
    links = re.findall(r"\]\((docs/[\w/.-]+)(?:#[\w-]+)?\)", text)
    assert paths and links and all((root / p).exists() for p in paths + links), (paths, links)


def test_the_sections_that_the_readme_links_to_exist():
    for page, section in re.findall(r"\]\((docs/[\w/.-]+\.md)#([\w-]+)\)", README.read_text()):
        heads = re.findall(r"^#+ (.+)$", (README.parent / page).read_text(), re.M)
        assert section in {head.lower().replace(" ", "-") for head in heads}, (page, section)
