"""Tables computed part by part into a folder, so that a run that was stopped goes on."""

import io
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pandas as pd
import xxhash
from tqdm.auto import tqdm

from interp.core.result import write_atomically

ABOUT = "about.json"


def content_key(content: Any) -> str:
    """Equal for equal plain data.

    Example:
        >>> content_key({"a": 1, "b": [2]}) == content_key({"b": [2], "a": 1}) != content_key([])
        True
    """
    return xxhash.xxh3_128_hexdigest(json.dumps(content, default=str, sort_keys=True).encode())


class KeptTables:
    """Tables in a folder, written whole or not at all; without a folder, nothing is kept.

    Every stage has a folder of its own, named by all that its tables depend on, so that another
    setting never meets them.

    Example:
        >>> import tempfile
        >>> kept = KeptTables(tempfile.mkdtemp(), {"weights": "w"})
        >>> stage = kept.stage("square", of="x")
        >>> kept.shards(stage, [[1, 2], [3]], lambda part: pd.DataFrame({"x": [i * i for i in part]}))
           x
        0  1
        1  4
        2  9
        >>> kept.done(stage, [[1, 2], [3], [4]])
        [[1, 2], [3]]
    """

    def __init__(self, folder: Any, about: dict[str, Any], progress: bool = False) -> None:
        self.folder = None if folder is None else Path(folder)
        self.about, self.progress = about, progress

    def stage(self, name: str, **depends: Any) -> str:
        """The folder of a stage, and a note in it of what its tables depend on."""
        found = f"{name}-{content_key([self.about, depends])[:12]}"
        if self.folder is not None and not (self.folder / found / ABOUT).exists():
            write_atomically(self.folder / found / ABOUT, json.dumps(
                {**self.about, **depends}, indent=1, default=str))
        return found

    def done(self, stage: str, parts: Sequence[list[int]]) -> list[list[int]]:
        """The parts that are there."""
        return [part for number, part in enumerate(parts)
                if self.folder is not None and self._path(stage, number).exists()]

    def _path(self, stage: str, number: int) -> Path:
        assert self.folder is not None
        return self.folder / stage / f"{number:05d}.parquet"

    def shards(
        self, stage: str, parts: Sequence[Any], compute: Callable[[Any], pd.DataFrame]
    ) -> pd.DataFrame:
        """One table of all parts; those that are there are read, the others computed in order."""
        bar = tqdm(parts, desc=stage, disable=not self.progress or len(parts) < 2, mininterval=20)
        return pd.concat([self._table(stage, number, part, compute)
                          for number, part in enumerate(bar)], ignore_index=True)

    def _table(
        self, stage: str, number: int, part: Any, compute: Callable[[Any], pd.DataFrame]
    ) -> pd.DataFrame:
        if self.folder is None:
            return compute(part)
        path = self._path(stage, number)
        if not path.exists():
            content = io.BytesIO()
            compute(part).to_parquet(content, index=False)
            write_atomically(path, content.getvalue())
        return pd.read_parquet(path)
