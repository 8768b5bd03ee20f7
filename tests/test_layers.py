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


def test_importing_interp_loads_no_backend():
    code = ("import sys, interp; heavy = {'transformers', 'transformer_lens', 'nnsight', 'torch'}; "
            "print(sorted(heavy & set(sys.modules)))")
    found = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert found.stdout.strip() == "[]", found.stdout + found.stderr


def test_no_tracked_python_file_switches_shape_checks_off():
    for path in [*ROOT.glob("interp/**/*.py"), *ROOT.glob("experiments/*.py")]:
        assert "from __future__ import annotations\n" not in path.read_text(), path
