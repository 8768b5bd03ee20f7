"""Who computes which cells of a folder: claims by lock files, those of dead processes taken over."""

import contextlib
import json
import os
import socket
import threading
import time
import uuid
from collections.abc import Sequence
from pathlib import Path
from typing import Any

STALE = 60.0
"""Seconds without a sign of life after which a claim is taken over; a dead process's is at once."""
BEAT = 5.0
"""Seconds between the signs of life of a process that holds claims."""


class Claims:
    """Which cells of a folder this process computes, so that no other does.

    A claim is a file with the host and process that hold it. Its time is renewed while the process
    lives; whoever finds one of a dead process, or one not renewed for `STALE` seconds, takes it.

    Example:
        >>> import tempfile
        >>> folder = Path(tempfile.mkdtemp())
        >>> with Claims(folder) as first, Claims(folder) as second:
        ...     first.take("a"), second.take("a"), second.take("b")
        (True, False, True)
        >>> list(folder.iterdir())
        []
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._me = {"host": socket.gethostname(), "pid": os.getpid(), "claims": uuid.uuid4().hex}
        self._held: set[str] = set()
        self._seen: dict[str, tuple[Any, float]] = {}
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._beat, daemon=True)

    def __enter__(self) -> "Claims":
        self._thread.start()
        return self

    def __exit__(self, *_: Any) -> None:
        self._stop.set()
        self._thread.join()
        self.give_back(list(self._held))

    def _path(self, key: str) -> Path:
        return self.folder / f"{key}.lock"

    def take(self, key: str) -> bool:
        """Claim a key; False where another living process holds it."""
        if key in self._held:
            return True
        for _ in range(2):
            try:
                handle = os.open(self._path(key), os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o644)
            except FileExistsError:
                if not self._dead(key) or not self._remove(key):
                    return False
                continue
            with os.fdopen(handle, "w") as file:
                file.write(json.dumps(self._me))
            self._held.add(key)
            return True
        return False

    def give_back(self, keys: Sequence[str]) -> None:
        """Let go of keys; one that was taken over meanwhile is left to its new holder."""
        for key in keys:
            if key in self._held:
                self._held.discard(key)
                if self._holder(key) == self._me:
                    self._path(key).unlink(missing_ok=True)

    def _holder(self, key: str) -> Any:
        try:
            return json.loads(self._path(key).read_bytes())
        except (OSError, ValueError):  # gone, or in the moment before its content is written
            return None

    def _dead(self, key: str) -> bool:
        """Whether the holder died, on this machine, or has not given a sign of life for long.

        The age of a claim is measured by this process's own clock: those of machines differ.
        """
        try:
            beat = self._path(key).stat().st_mtime_ns
        except FileNotFoundError:
            return True
        holder = self._holder(key)
        if isinstance(holder, dict) and holder.get("host") == self._me["host"]:
            if not _alive(holder.get("pid")):
                return True
        last, since = self._seen.get(key, (None, 0.0))
        if last != (holder, beat):
            self._seen[key] = ((holder, beat), time.monotonic())
            return False
        return time.monotonic() - since > STALE

    def _remove(self, key: str) -> bool:
        """Remove a dead holder's claim; False if it was another process that did, and holds it."""
        aside = self.folder / f".{key}.{uuid.uuid4().hex}.tmp"
        holder = self._holder(key)
        try:
            os.rename(self._path(key), aside)
        except FileNotFoundError:
            return True
        try:
            now = json.loads(aside.read_bytes())
        except (OSError, ValueError):
            now = None
        if now != holder:  # between looking and taking, another process had taken it over
            with contextlib.suppress(OSError):
                os.link(aside, self._path(key))
        aside.unlink(missing_ok=True)
        return now == holder

    def _beat(self) -> None:
        while not self._stop.wait(BEAT):
            for key in list(self._held):
                with contextlib.suppress(OSError):
                    os.utime(self._path(key))


def _alive(pid: Any) -> bool:
    try:
        os.kill(int(pid), 0)
        # A process that was killed and not yet waited for computes nothing any more.
        return Path(f"/proc/{int(pid)}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except ProcessLookupError:
        return False
    except (OSError, ValueError, TypeError, OverflowError, IndexError):
        return True  # not ours, or on a system that cannot be asked so
