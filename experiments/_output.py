"""Where a run writes: into a hidden folder beside the result, which it replaces at the end.

A run that fails or is interrupted leaves the previous result as it was, and nothing half-written.
"""

import contextlib
import hashlib
import json
import os
import re
import shutil
import socket
import time
import uuid
from collections.abc import Callable, Iterable, Mapping
from dataclasses import fields, is_dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any, Optional

import numpy as np
import pandas as pd
from matplotlib import pyplot as plt
from matplotlib.figure import Figure

import interp.core
from experiments._outcome import CACHE, CLAIMS, DATA, FORMAT, MANIFEST, TABLES, Outcome, checksum
from experiments._paper import NAME, Experiment, Paper, Settings
from interp.core import Claim, Prompt, Result, ResultCorrupted, UndertowError
from interp.core.intervention import Intervention
from interp.core.result import environment, write_atomically
from interp.figures import report
from interp.figures.style import style

LEFTOVER = re.compile(
    r"\.(?P<key>[a-z0-9_]+)\.(?P<host>.+)-(?P<pid>\d+)-[0-9a-f]{8}\.(?P<stage>partial|old)"
)


class Output:
    """What an experiment hands its findings to; a context manager.

    Inside the `with` block figures are drawn in this package's style. On success `folder` is
    replaced in one step; on any exception it stays as it was.

    Attributes:
        folder: the result's, `OUT/KEY`; it exists only after the block.
        cache: a folder that outlives failures, for pieces worth keeping; see also `cached`.
    """

    def __init__(self, paper: Paper, settings: Settings) -> None:
        self.paper, self.settings = paper, settings
        self.folder = settings.out / paper.key
        self.cache = settings.out / CACHE / paper.key
        self._models: list[dict[str, Any]] = []
        self._prompts: dict[str, dict[str, Any]] = {}
        self._figures: list[dict[str, Any]] = []
        self._claims: list[Claim] = []
        self._data: list[str] = []
        self._tables: list[str] = []
        self._stack = contextlib.ExitStack()

    def __enter__(self) -> "Output":
        out = self.settings.out
        self._made = [path for path in (out, *out.parents) if not path.exists()]
        out.mkdir(parents=True, exist_ok=True)
        tidy(out)
        own = f".{self.paper.key}.{_host()}-{os.getpid()}-{uuid.uuid4().hex[:8]}.partial"
        self._partial = out / own
        self._partial.mkdir()
        self._began = time.monotonic()
        self._stack.enter_context(style())
        return self

    def __exit__(self, kind: Any, error: Any, trace: Any) -> None:
        self._stack.close()
        try:
            if kind is None:
                self._finish()
        finally:
            shutil.rmtree(self._partial, ignore_errors=True)
            for path in self._made:  # a run that failed leaves no empty folder
                with contextlib.suppress(OSError):
                    path.rmdir()

    def record(
        self, model: Any = None, prompts: Iterable[Prompt] = (), name: str = "prompts"
    ) -> None:
        """Note in the manifest what was run on: a model (its `manifest()`), and named prompts."""
        if model is not None:
            content = dict(model.manifest())
            content.setdefault("name", getattr(model, "name", "?"))
            if content not in self._models:
                self._models.append(content)
        given = list(prompts)
        if given:
            self._new(name, self._prompts, "set of prompts")
            digest = hashlib.sha256("".join(p.digest() for p in given).encode()).hexdigest()
            self._prompts[name] = {
                "count": len(given), "tokens": sum(map(len, given)), "digest": digest[:32],
            }

    def save(self, name: str, result: Result) -> None:
        """Keep labelled arrays as `data/NAME/` (NetCDF and their own manifest)."""
        self._new(name, self._data, "result")
        result.save(self._partial / DATA / name)
        self._data.append(name)

    def table(self, name: str, table: pd.DataFrame, text: bool = False) -> None:
        """Keep a table as `tables/NAME.parquet`; with `text` as `.csv` and `.json` (rows) too."""
        self._new(name, self._tables, "table")
        (self._partial / TABLES).mkdir(exist_ok=True)
        stem = self._partial / TABLES / name
        table.to_parquet(stem.with_name(f"{name}.parquet"))
        if text:
            table.to_csv(stem.with_name(f"{name}.csv"), index=False)
            table.to_json(stem.with_name(f"{name}.json"), orient="records", indent=1)
        self._tables.append(name)

    def wants(self, name: str) -> bool:
        """Whether this figure was asked for; skip the work for those that were not."""
        self._known(name)
        return self.settings.wants(name)

    def figure(self, name: str, figure: Figure, caption: str = "", of: str = "") -> None:
        """Keep a figure of the paper as PNG and PDF, and close it.

        Args:
            name: one of the paper's figures; the file is `NAME.png`, or `NAME.OF.png`.
            caption: instead of the paper's own caption, where the run has more to say.
            of: what tells several figures of one name apart, such as a model.

        Raises:
            ValueError: a figure that the paper does not list, or one that was drawn before.
        """
        self._known(name)
        try:
            if not self.settings.wants(name):
                return
            stem = f"{name}.{of}" if of else name
            self._new(stem, [f["stem"] for f in self._figures], "figure")
            files = [f"{stem}.png", f"{stem}.pdf"]
            # Without dates and versions, equal figures are equal files.
            figure.savefig(self._partial / files[0], dpi=150, metadata={"Software": None})
            figure.savefig(self._partial / files[1], metadata={"CreationDate": None})
        finally:
            plt.close(figure)
        self._figures.append({"name": name, "of": of, "stem": stem, "files": files, "reason": "",
                              "caption": caption or self.paper.figures[name]})

    def no_figure(self, name: str, reason: str, of: str = "") -> None:
        """Say why a figure of the paper cannot be drawn in this run."""
        self._known(name)
        if not reason:
            raise ValueError(f"say why figure {name!r} cannot be drawn.")
        if self.settings.wants(name):
            stem = f"{name}.{of}" if of else name
            self._new(stem, [f["stem"] for f in self._figures], "figure")
            self._figures.append({"name": name, "of": of, "stem": stem, "files": [],
                                  "reason": reason, "caption": self.paper.figures[name]})

    def claim(self, claim: Claim, model: str = "") -> None:
        """Keep a claim; `model` says which one it is about where there are several."""
        if claim.figure:
            self._known(claim.figure)
        if model:
            claim = replace(claim, details={**claim.details, "model": model})
        self._claims.append(claim)

    def cached(self, name: str, key: Mapping[str, Any], compute: Callable[[], Result]) -> Result:
        """A result from the cache if everything in `key` and all of the code are the same.

        `key` may hold plain data, arrays, prompts, interventions and dataclasses of these; name
        everything the result depends on (the seed, the model's manifest, the prompts, ...).
        """
        if not NAME.fullmatch(name):
            raise ValueError(f"{name!r} is no plain name (small letters, digits, . - _).")
        content = {"name": name, "key": _content(dict(key)), "code": _code()}
        digest = hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
        folder = self.cache / f"{name}-{digest[:24]}"
        with contextlib.suppress(ResultCorrupted):
            return Result.load(folder)
        result = compute()
        result.save(folder)
        # Read back, so that the first run sees exactly what later runs will see.
        return Result.load(folder)

    def _known(self, name: str) -> None:
        if name not in self.paper.figures:
            raise ValueError(f"{self.paper.key} lists no figure {name!r}; it lists: "
                             f"{', '.join(self.paper.figures) or 'none'}.")

    def _new(self, name: str, have: Iterable[str], what: str) -> None:
        if not NAME.fullmatch(name.lower()):
            raise ValueError(f"{name!r} is no plain name for a {what} (letters, digits, . - _).")
        if name in have:
            raise ValueError(f"there is a {what} {name!r} already; give it another name.")

    def _finish(self) -> None:
        drawn = {f["name"] for f in self._figures}
        if not drawn and not self._claims:
            raise ValueError(f"{self.paper.key} made neither a figure nor a claim.")
        for name in self.paper.figures:
            if name not in drawn and self.settings.wants(name):
                self._figures.append({"name": name, "of": "", "stem": name, "files": [],
                                      "reason": "this run did not draw it.",
                                      "caption": self.paper.figures[name]})
        order = list(self.paper.figures)
        self._figures.sort(key=lambda f: order.index(f["name"]))
        claims = json.dumps([claim.to_json() for claim in self._claims], indent=1, default=_plain)
        (self._partial / CLAIMS).write_text(claims + "\n")
        (self._partial / "claims.md").write_text(
            report.markdown(self._claims), encoding="utf-8")
        files = sorted(path for path in self._partial.rglob("*") if path.is_file())
        manifest = {
            "format": FORMAT,
            "paper": {"key": self.paper.key, "title": self.paper.title,
                      "arxiv": list(self.paper.arxiv), "question": self.paper.question},
            "models": self._models,
            "prompts": self._prompts,
            "seed": self.settings.seed,
            # Where it was written says nothing about the result, but may name a person.
            "settings": _asked(self.settings),
            "code": _code(),
            "figures": self._figures,
            "data": self._data,
            "tables": self._tables,
            "verdicts": report.counts(self._claims),
            "environment": environment(),
            "wall_seconds": round(time.monotonic() - self._began, 2),
            "files": {path.relative_to(self._partial).as_posix(): checksum(path) for path in files},
        }
        text = json.dumps(manifest, indent=1, default=_plain)
        write_atomically(self._partial / MANIFEST, text + "\n")
        _publish(self._partial, self.folder)


def execute(experiment: Experiment, settings: Settings) -> Outcome:
    """Run one experiment and read back what it left."""
    with Output(experiment.paper, settings) as out:
        experiment.run(settings, out)
    return Outcome.load(out.folder)


def finished(key: str, settings: Settings) -> Optional[Outcome]:
    """What a run with the same settings and the same code has left, whole; None otherwise."""
    try:
        found = Outcome.load(settings.out / key)
    except (UndertowError, OSError, KeyError, TypeError):
        return None
    said = found.manifest.get("settings"), found.manifest.get("code")
    return found if said == (_asked(settings), _code()) else None


def _asked(settings: Settings) -> dict[str, Any]:
    return settings.model_dump(mode="json", exclude={"out"})


def tidy(out: Path) -> None:
    """Remove what killed runs left in `out`; a result caught between two renames is put back."""
    for path in out.glob(".*"):
        found = LEFTOVER.fullmatch(path.name)
        if found is None or not path.is_dir():
            continue
        if found["stage"] == "old" and not (out / found["key"]).exists():
            with contextlib.suppress(OSError):
                os.rename(path, out / found["key"])
        elif found["host"] == _host() and not _alive(int(found["pid"])):
            shutil.rmtree(path, ignore_errors=True)


def _publish(partial: Path, final: Path) -> None:
    """Put the finished folder in the place of the old one; one of them is always there after."""
    old = partial.with_suffix(".old")
    for attempt in range(5):
        try:
            if final.exists():
                os.rename(final, old)
            os.rename(partial, final)
            break
        except OSError:
            # Another run of the same experiment finished in between: replace that one.
            if attempt == 4 or not final.exists():
                raise
            shutil.rmtree(old, ignore_errors=True)
        finally:
            if old.exists() and not final.exists():
                os.rename(old, final)
    shutil.rmtree(old, ignore_errors=True)


@lru_cache(maxsize=1)
def _host() -> str:
    return re.sub(r"[^A-Za-z0-9.]+", "_", socket.gethostname()) or "host"


def _alive(pid: int) -> bool:
    if os.name != "posix":
        return True
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


@lru_cache(maxsize=1)
def _code() -> str:
    """A digest of the source of this package and of `interp`: changed code, new results."""
    found = hashlib.sha256()
    for package in (Path(interp.core.__file__).parents[1], Path(__file__).parent):
        for path in sorted(package.rglob("*.py")):
            found.update(path.relative_to(package.parent).as_posix().encode() + path.read_bytes())
    return found.hexdigest()


def _plain(value: Any) -> Any:
    """What JSON does not know: arrays and their scalars as numbers, everything else as text."""
    if isinstance(value, np.ndarray) or hasattr(value, "item") and hasattr(value, "tolist"):
        return value.tolist()
    return str(value)


def _content(value: Any) -> Any:
    """JSON that is equal exactly for equal content. Raises TypeError for what it cannot read."""
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if isinstance(value, Mapping):
        return {str(k): _content(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_content(item) for item in value]
    if isinstance(value, Prompt):
        return {"prompt": value.digest()}
    if isinstance(value, Intervention):
        return {"intervention": value.key()}
    if is_dataclass(value) and not isinstance(value, type):
        named = {f.name: _content(getattr(value, f.name)) for f in fields(value)}
        return {type(value).__name__: named}
    array: Optional[np.ndarray] = None
    dtype = str(getattr(value, "dtype", ""))
    if isinstance(value, (np.ndarray, np.generic)):
        array = np.ascontiguousarray(value)
    else:
        detach: Any = getattr(value, "detach", None)
        if detach is not None:
            tensor = detach().to("cpu")
            # NumPy has no bfloat16; float32 holds its values exactly, and the dtype is in the key.
            tensor = tensor.float() if dtype == "torch.bfloat16" else tensor
            array = np.ascontiguousarray(tensor.numpy())
    if array is None or array.dtype == object:
        raise TypeError(
            f"a {type(value).__name__} cannot be part of a cache key; give plain data, arrays, "
            "prompts or interventions."
        )
    return {"array": hashlib.sha256(array.tobytes()).hexdigest(), "dtype": dtype,
            "shape": list(array.shape)}
