"""A finished run, read back from its folder and checked against its checksums."""

import hashlib
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Union

import pandas as pd

from interp.core import Claim, Result, ResultCorrupted, UndertowError

MANIFEST, CLAIMS = "manifest.json", "claims.json"
FORMAT = 1
"""Of the manifest; a later, incompatible layout counts up."""

CACHE = "cache"
DATA, TABLES = "data", "tables"


def checksum(path: Path) -> str:
    """SHA-256 of a file, read in pieces."""
    found = hashlib.sha256()
    with path.open("rb") as file:
        for piece in iter(lambda: file.read(1 << 20), b""):
            found.update(piece)
    return found.hexdigest()


@dataclass(frozen=True)
class Drawn:
    """A figure of a finished run; without files where `reason` says why it was not drawn."""

    name: str
    of: str
    caption: str
    files: tuple[Path, ...]
    reason: str = ""

    @property
    def png(self) -> bytes:
        """The picture, empty if it was not drawn."""
        found = [path for path in self.files if path.suffix == ".png"]
        return found[0].read_bytes() if found else b""


@dataclass(frozen=True)
class Outcome:
    """What a run left behind: `outcome.claims`, `.figures`, `.manifest`, `.result(name)`."""

    folder: Path
    manifest: dict[str, Any]
    claims: tuple[Claim, ...]
    figures: tuple[Drawn, ...]

    @property
    def key(self) -> str:
        """The name of the experiment."""
        return str(self.manifest["paper"]["key"])

    @property
    def models(self) -> tuple[str, ...]:
        """Names of the models it ran on."""
        found = [str(m.get("name", m.get("model", "?"))) for m in self.manifest["models"]]
        return tuple(dict.fromkeys(found))

    def result(self, name: str) -> Result:
        """Saved arrays by name. Raises KeyError, which lists the names there are."""
        self._check(name, self.manifest["data"], "result")
        return Result.load(self.folder / DATA / name)

    def table(self, name: str) -> pd.DataFrame:
        """A saved table by name. Raises KeyError, which lists the names there are."""
        self._check(name, self.manifest["tables"], "table")
        return pd.read_parquet(self.folder / TABLES / f"{name}.parquet")

    def _check(self, name: str, have: list[str], what: str) -> None:
        if name not in have:
            raise KeyError(f"{self.folder} has no {what} {name!r}; it has: "
                           f"{', '.join(have) or 'none'}.")

    @classmethod
    def load(cls, folder: Union[str, Path]) -> "Outcome":
        """Read a run's folder and check every file in it.

        Raises:
            ResultCorrupted: a file is missing, cut off or changed; one sentence that names it.
        """
        folder = Path(folder)
        manifest = _manifest(folder)
        for name, expected in manifest["files"].items():
            path = folder / name
            if not path.is_file():
                raise ResultCorrupted(f"{path} is missing although {MANIFEST} lists it; "
                                      f"{_again(folder, manifest)}")
            if checksum(path) != expected:
                raise ResultCorrupted(
                    f"{path} does not match its checksum in {MANIFEST}: it was changed or cut off "
                    f"after the run; {_again(folder, manifest)}"
                )
        try:
            claims = tuple(Claim.from_json(claim) for claim in _json(folder / CLAIMS))
        except (TypeError, AttributeError, UndertowError) as error:
            raise ResultCorrupted(
                f"{folder / CLAIMS} holds a claim that cannot be read ({error}); "
                f"{_again(folder, manifest)}"
            ) from None
        figures = tuple(
            Drawn(f["name"], f["of"], f["caption"], tuple(folder / p for p in f["files"]),
                  f["reason"])
            for f in manifest["figures"]
        )
        return cls(folder, manifest, claims, figures)


def _again(folder: Path, manifest: dict[str, Any]) -> str:
    key = manifest.get("paper", {}).get("key", folder.name)
    return f"run 'python -m experiments run {key}' again."


def _json(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ResultCorrupted(
            f"{path} is not readable JSON ({error}); run the experiment again."
        ) from None


def _manifest(folder: Path) -> dict[str, Any]:
    if not (folder / MANIFEST).is_file():
        raise ResultCorrupted(f"{folder} holds no {MANIFEST}: no run finished there; "
                              f"{_again(folder, {})}")
    manifest = _json(folder / MANIFEST)
    needed = ("format", "paper", "models", "figures", "data", "tables", "files")
    missing = [n for n in needed if not isinstance(manifest, dict) or n not in manifest]
    if missing:
        raise ResultCorrupted(f"{folder / MANIFEST} lacks {missing[0]!r}: it is not the manifest "
                              f"of a run; {_again(folder, {})}")
    if manifest["format"] != FORMAT:
        raise ResultCorrupted(f"{folder / MANIFEST} has the format {manifest['format']!r}, this "
                              f"version reads {FORMAT}; {_again(folder, manifest)}")
    if CLAIMS not in manifest["files"]:
        raise ResultCorrupted(f"{folder / MANIFEST} lists no {CLAIMS}; {_again(folder, manifest)}")
    return manifest


def find(out: Path, names: tuple[str, ...], depth: int = 3) -> Iterator[Path]:
    """Folders below `out` that are, or should be, those of runs, in order.

    A folder counts if it holds a manifest or claims, or bears the name of an experiment.
    """
    for folder in sorted(path for path in out.iterdir() if path.is_dir()):
        if folder.name.startswith(".") or folder.name == CACHE:
            continue
        if folder.name in names or any((folder / f).exists() for f in (MANIFEST, CLAIMS)):
            yield folder
        elif depth > 1:
            yield from find(folder, names, depth - 1)


def slug(text: str) -> str:
    """A name that is safe as a folder's.

    Example:
        >>> slug("Qwen/Qwen3-4B")
        'Qwen3-4B'
    """
    last = text.rstrip("/\\").replace("\\", "/").split("/")[-1]
    return re.sub(r"[^A-Za-z0-9_.-]+", "-", last).strip("-.") or "model"
