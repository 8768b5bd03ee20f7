"""The pins of constraints.txt and the ranges of pyproject.toml belong together."""

import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
LINES = (ROOT / "constraints.txt").read_text().split()
PINS = {canonicalize_name(line.split("==")[0]): line.split("==")[1] for line in LINES}
DECLARED = PROJECT["dependencies"] + sum(PROJECT["optional-dependencies"].values(), [])


@pytest.mark.parametrize("declared", DECLARED)
def test_the_pin_lies_in_the_declared_range(declared):
    requirement = Requirement(declared)
    pin = PINS[canonicalize_name(requirement.name)]
    assert requirement.specifier.contains(pin), f"{declared} does not admit the pinned {pin}"


@pytest.mark.parametrize("declared", DECLARED)
def test_every_range_has_an_upper_bound(declared):
    operators = {clause.operator for clause in Requirement(declared).specifier}
    assert operators & {"<", "<=", "==", "~="}, f"{declared} has no upper bound"
