"""The layers of the architecture, checked on the imports themselves."""

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def test_imports_point_down_only():
    found = subprocess.run(
        [sys.executable, "-c", "from importlinter.cli import lint_imports_command as c; c()"],
        cwd=ROOT, capture_output=True, text=True,
    )
    assert found.returncode == 0, found.stdout[-3000:]


def test_importing_interp_loads_nothing_heavy_and_still_has_every_name():
    code = """import sys, interp
heavy = {'transformers', 'transformer_lens', 'nnsight', 'torch', 'matplotlib', 'pandas', 'xarray',
         'sklearn', 'scipy', 'numpy'}
print(sorted(heavy & set(sys.modules)))
head = interp.ablate('L1H2').heads[0]
print(type(head) is interp.Head, interp.core.Prompt is interp.Prompt, 'torch' in sys.modules)
try:
    interp.nothing
except AttributeError as error:
    print(error)
print(sorted({'transformer_lens', 'nnsight', 'torch'} & set(sys.modules)))
from interp import *
print(open_model.__name__, Model.__name__, 'matplotlib' in sys.modules)
"""
    found = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert found.stdout.splitlines() == [
        "[]", "True True False", "module 'interp' has no attribute 'nothing'", "[]",
        "open_model Model False",
    ], found.stdout + found.stderr


def test_no_tracked_python_file_switches_shape_checks_off():
    for path in [*ROOT.glob("interp/**/*.py"), *ROOT.glob("experiments/*.py")]:
        assert "from __future__ import annotations\n" not in path.read_text(), path
