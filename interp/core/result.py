"""A labelled result with its manifest, saved atomically and checked when it is read."""

import hashlib
import json
import os
import platform
import subprocess
import tempfile
from dataclasses import dataclass, field
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any, Union

import xarray as xr

from interp.core.errors import ResultCorrupted

DATA, MANIFEST = "data.nc", "manifest.json"
PACKAGES = ("undertow", "torch", "transformers", "transformer-lens", "nnsight", "numpy", "xarray")


def write_atomically(path: Union[str, Path], content: Union[str, bytes]) -> None:
    """Write a file so that a reader sees the old content or the new, never a part.

    Example:
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     write_atomically(Path(folder) / "a.txt", "done")
        ...     (Path(folder) / "a.txt").read_text()
        'done'
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    if isinstance(content, str):
        content = content.encode()
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".tmp")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(name, 0o644)
        os.replace(name, path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise


def environment() -> dict[str, Any]:
    """Versions, platform and git commit: what a manifest says about the machine, no paths."""
    versions = {}
    for package in PACKAGES:
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    try:
        commit = subprocess.run(
            ["git", "rev-parse", "HEAD"], cwd=Path(__file__).parent, timeout=5,
            capture_output=True, text=True, check=True,
        ).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        commit = None
    return {
        "versions": versions,
        "python": platform.python_version(),
        "platform": f"{platform.system()} {platform.machine()}",
        "git_commit": commit,
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
    }


@dataclass
class Result:
    """Labelled arrays and the manifest that says how they came about.

    Example:
        >>> result = Result(xr.Dataset({"norm": ("layer", [1.0, 2.0])}), {"seed": 0})
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     _ = result.save(folder)
        ...     float(Result.load(folder)["norm"][1])
        2.0
    """

    data: xr.Dataset
    manifest: dict[str, Any] = field(default_factory=dict)

    def __getitem__(self, name: str) -> xr.DataArray:
        return self.data[name]

    def to_dataframe(self) -> Any:
        """The data as a pandas table."""
        return self.data.to_dataframe().reset_index()

    def save(self, folder: Union[str, Path]) -> Path:
        """Write `data.nc` (NetCDF) and `manifest.json` with the data's checksum, atomically.

        The manifest is written last: a folder without it is an unfinished one.
        """
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        content = bytes(self.data.to_netcdf(engine="h5netcdf"))
        manifest = {**self.manifest, "sha256": {DATA: hashlib.sha256(content).hexdigest()}}
        text = json.dumps(manifest, indent=1, sort_keys=True, default=str)
        write_atomically(folder / DATA, content)
        write_atomically(folder / MANIFEST, text + "\n")
        return folder

    @classmethod
    def load(cls, folder: Union[str, Path]) -> "Result":
        """Read a saved result. Raises `ResultCorrupted` naming the file and what is wrong."""
        folder = Path(folder)
        for name in (MANIFEST, DATA):
            if not (folder / name).is_file():
                raise ResultCorrupted(
                    f"{folder} holds no {name}: the run did not finish there; run it again."
                )
        try:
            manifest = json.loads((folder / MANIFEST).read_text())
        except (json.JSONDecodeError, UnicodeDecodeError) as error:
            raise ResultCorrupted(
                f"{folder / MANIFEST} is not readable JSON ({error}); run the experiment again."
            ) from None
        content = (folder / DATA).read_bytes()
        expected = manifest.pop("sha256", {}).get(DATA)
        if hashlib.sha256(content).hexdigest() != expected:
            raise ResultCorrupted(
                f"{folder / DATA} does not match the checksum in {MANIFEST}: it was changed or "
                "cut off after it was written; run the experiment again."
            )
        with xr.open_dataset(folder / DATA, engine="h5netcdf") as opened:
            return cls(opened.load(), manifest)
