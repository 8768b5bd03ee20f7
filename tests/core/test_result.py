"""Results are saved whole or not at all, and damage is named."""

import json
import os

import numpy as np
import pytest
import xarray as xr

from interp.core import Result, ResultCorrupted
from interp.core.result import write_atomically


@pytest.fixture
def result():
    data = xr.Dataset({"alpha": (("layer", "head"), np.arange(6.0).reshape(2, 3))})
    return Result(data, {"model": "tiny", "seed": 3})


def test_what_is_saved_is_loaded(result, tmp_path):
    loaded = Result.load(result.save(tmp_path / "a"))
    assert loaded.data.equals(result.data) and loaded.manifest == result.manifest


def test_an_interrupted_write_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "file.txt"
    write_atomically(path, "old")

    def interrupted(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "replace", interrupted)
    with pytest.raises(KeyboardInterrupt):
        write_atomically(path, "new")
    assert path.read_text() == "old" and os.listdir(tmp_path) == ["file.txt"]


@pytest.mark.parametrize("damage, words", [
    (lambda f: (f / "data.nc").write_bytes(b"cut"), "does not match the checksum"),
    (lambda f: (f / "manifest.json").write_text("{"), "not readable JSON"),
    (lambda f: (f / "manifest.json").unlink(), "did not finish"),
    (lambda f: (f / "data.nc").unlink(), "did not finish"),
    (lambda f: (f / "manifest.json").write_text(json.dumps({"sha256": {}})), "checksum"),
])
def test_damage_is_named_in_one_sentence(result, tmp_path, damage, words):
    folder = result.save(tmp_path / "a")
    damage(folder)
    with pytest.raises(ResultCorrupted, match=words) as caught:
        Result.load(folder)
    assert str(folder) in str(caught.value) and "\n" not in str(caught.value)
