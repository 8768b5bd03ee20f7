"""Cells of a sweep, kept in a folder: finished once, shared by processes, never mixed with others.

A folder is of one model, one set of prompts and one version: `sweep.json` says which, and another
is refused. Every finished cell is a file of its own with a checksum; one that is torn, or not of
this sweep, counts as unfinished. Several processes may work in one folder: each claims the cells
it computes by a lock file whose time it renews, and takes over those of a process that died.
"""

import contextlib
import json
import os
import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any, Optional, SupportsIndex, Union

import numpy as np
import torch
import xxhash
from torch import Tensor
from tqdm.auto import tqdm

from interp.causal.locks import Claims
from interp.causal.metrics import key_of
from interp.core import FolderRefused, ModelRefused, Prompt
from interp.core.intervention import Each, Intervention
from interp.core.result import write_atomically
from interp.models.model import Model

HEADER = "sweep.json"
KIND, FORMAT = "undertow sweep", 1
WHOLE = 1 << 16
"""Parameters of up to so many values are fingerprinted whole, larger ones by as many of theirs."""


def fingerprint(model: Model) -> str:
    """A content key of a model's weights: equal for equal weights, whatever the name.

    Example:
        >>> import interp
        >>> model = interp.open_model("backcopy-1l")
        >>> fingerprint(model) == fingerprint(interp.open_model("backcopy-1l"))
        True

    Large matrices enter with `WHOLE` evenly spaced values each.
    """
    key = xxhash.xxh3_128()
    with torch.no_grad():
        for name, parameter in sorted(model.hf.named_parameters()):
            flat = _values(model.hf, name, parameter).detach().reshape(-1)
            step = max(1, flat.numel() // WHOLE)
            key.update(f"{name}{tuple(parameter.shape)}{parameter.dtype}".encode())
            key.update(flat[::step].float().cpu().numpy().tobytes())
    return key.hexdigest()


def _values(hf: torch.nn.Module, name: str, parameter: Tensor) -> Tensor:
    """A parameter, from where accelerate keeps it if it was moved off the devices."""
    if not parameter.is_meta:
        return parameter
    owner, _, last = name.rpartition(".")
    hook = getattr(hf.get_submodule(owner), "_hf_hook", None)
    for one in getattr(hook, "hooks", (hook,)):
        kept = getattr(one, "weights_map", None)
        if kept is not None:
            return kept[last]
    raise ModelRefused(f"the weights {name!r} are on no device: open the model with weights.")


def describe(write: Any) -> str:
    """The content of interventions (one, several, or `interp.each`), the same on every machine.

    Example:
        >>> import interp
        >>> describe(interp.ablate("L0H1")) == describe([interp.ablate("L0H1")])
        True
    """
    if isinstance(write, Intervention):
        write = (write,)
    if isinstance(write, Each):
        content: Any = [[one.describe() for one in some] for some in write.writes]
    else:
        content = [one.describe() for one in write]
    return json.dumps(content, sort_keys=True)


def subject(model: Model, prompts: Sequence[Prompt]) -> dict[str, Any]:
    """What a sweep's folder is of: weights, number format, lane and prompts."""
    return {"model": model.name, "weights": fingerprint(model), "dtype": str(model.dtype),
            "lane": model.lane, "n_prompts": len(prompts),
            "prompts": key_of([prompt.digest() for prompt in prompts])}


def subfolder(folder: Union[str, Path], model: Model, prompts: Sequence[Prompt]) -> Path:
    """A folder inside one that several sweeps share, for those of this model and these prompts.

    Example:
        >>> import interp
        >>> model, prompts = interp.open_model("backcopy-1l"), [Prompt.from_tokens([3, 4])]
        >>> subfolder("cells", model, prompts) == subfolder("cells", model, prompts * 2)
        False
    """
    about = {k: v for k, v in subject(model, prompts).items() if k != "model"}
    return Path(folder) / key_of(about, FORMAT, _version())


class CellStore:
    """Finished cells by content: in a folder, or in memory without one.

    Example:
        >>> cells = CellStore(None, {})
        >>> names = ["a", "b", "a"]
        >>> def compute(numbers):
        ...     for i in numbers:
        ...         cells.put(names[i], np.array([1.0, i]))
        >>> cells.fill([[name] for name in names], compute)
        >>> cells.get("b").tolist(), cells.get("c")
        ([1.0, 1.0], None)

    Args:
        folder: made if it does not exist.
        about: what the cells are of, as `subject` gives it: JSON-ready values.

    Raises:
        FolderRefused: the folder holds the sweep of another model, of other prompts or of another
            version, or cannot be used.
    """

    def __init__(self, folder: Union[str, Path, None], about: Mapping[str, Any]) -> None:
        self.folder = None if folder is None else Path(folder)
        self._kept: dict[str, np.ndarray] = {}
        if self.folder is not None:
            self.of = key_of({k: v for k, v in about.items() if k != "model"}, FORMAT, _version())
            _head(self.folder, {"kind": KIND, "format": FORMAT, "undertow": _version(), **about})

    def _path(self, content: str) -> Path:
        return self.folder / f"{key_of(self.of, content)}.json"  # type: ignore[operator]

    def get(self, content: str) -> Optional[np.ndarray]:
        """The values of a finished cell; None for one that is missing, torn or not of this sweep."""
        if content in self._kept or self.folder is None:
            return self._kept.get(content)
        try:
            found = json.loads(self._path(content).read_bytes())
            if found["checksum"] != self._checksum(content, found["shape"], found["values"]):
                return None
            values = np.array(found["values"], dtype=float).reshape(found["shape"])
        except (OSError, ValueError, KeyError, TypeError):
            return None
        self._kept[content] = values
        return values

    def put(self, content: str, values: np.ndarray) -> None:
        """Keep a finished cell, atomically."""
        kept = np.array(values, dtype=float)
        if self.folder is not None:
            flat, shape = kept.reshape(-1).tolist(), list(kept.shape)
            write_atomically(self._path(content), json.dumps({
                "values": flat, "shape": shape, "checksum": self._checksum(content, shape, flat)}))
        self._kept[content] = kept

    def _checksum(self, content: str, shape: Any, values: Any) -> str:
        return key_of(self.of, content, shape, values)

    def fill(
        self, groups: Sequence[Sequence[str]], compute: Callable[[list[int]], Any],
        size: SupportsIndex = 1, *, progress: str = "",
    ) -> None:
        """Have every cell finished: here, or by another process that works in this folder.

        Args:
            groups: contents that are computed together, like several metrics of one pass; equal
                groups are computed once.
            compute: is given the numbers of up to `size` unfinished groups that no other process
                has claimed, and must `put` all their cells. What another process computes is
                waited for, and computed here if that one dies.
            progress: what a progress bar says; none for "".

        Claims are given back in every case, so that what was finished stays and the rest is free.
        """
        first: dict[tuple[str, ...], int] = {}
        for number, group in enumerate(groups):
            first.setdefault(tuple(group), number)
        left = [(group, number) for group, number in first.items() if self._lacks(group)]
        with contextlib.ExitStack() as stack:
            claims = None if self.folder is None else stack.enter_context(Claims(self.folder))
            bar = stack.enter_context(tqdm(total=len(first), initial=len(first) - len(left),
                                           disable=not progress, desc=progress, unit="cell"))
            pause = 0.05
            while left:
                others: list[tuple[tuple[str, ...], int]] = []
                mine: list[tuple[tuple[str, ...], int]] = []
                before = len(left)
                for group, number in left:
                    if claims is not None and not claims.take(key_of(*group)):
                        others.append((group, number))
                    elif self._lacks(group):
                        mine.append((group, number))
                        if len(mine) == int(size):
                            self._compute(mine, compute, claims)
                            mine = []
                    elif claims is not None:  # finished by another process meanwhile
                        claims.give_back([key_of(*group)])
                if mine:
                    self._compute(mine, compute, claims)
                left = [one for one in others if self._lacks(one[0])]
                bar.update(before - len(left))
                pause = 0.05 if len(left) < before else min(2.0, 1.5 * pause)
                if left:
                    time.sleep(pause)

    def _lacks(self, group: Sequence[str]) -> bool:
        return any(self.get(content) is None for content in group)

    def _compute(
        self, mine: Sequence[tuple[tuple[str, ...], int]], compute: Callable[[list[int]], Any],
        claims: Optional["Claims"],
    ) -> None:
        compute([number for _, number in mine])
        if any(self._lacks(group) for group, _ in mine):
            raise RuntimeError("the cells that were to be computed have not been put.")
        if claims is not None:
            claims.give_back([key_of(*group) for group, _ in mine])


def _version() -> str:
    try:
        return metadata.version("undertow")
    except metadata.PackageNotFoundError:
        return "unknown"


def _head(folder: Path, about: Mapping[str, Any]) -> None:
    """Write the folder's header, or check it against the one that is there."""
    path = folder / HEADER
    text = json.dumps(dict(about), indent=1, sort_keys=True) + "\n"
    try:
        if not path.exists():
            _write_first(path, text)
        found = json.loads(path.read_bytes())
    except ValueError:  # torn: the cells carry what they are of, so it can be written again
        write_atomically(path, text)
        return
    except OSError as error:
        raise FolderRefused(
            f"the folder {str(folder)!r} cannot hold a sweep ({error.strerror}); choose another one."
        ) from None
    away = "choose another folder, or delete this one."
    if not isinstance(found, dict) or found.get("kind") != KIND:
        raise FolderRefused(f"{HEADER} in {str(folder)!r} is not that of a sweep; {away}")
    different = {k for k, v in json.loads(text).items() if found.get(k) != v}
    if different & {"undertow", "format"}:
        what = (f"undertow {found.get('undertow')} (format {found.get('format')}), this is "
                f"{about['undertow']} (format {FORMAT}), whose numbers may differ")
    elif "weights" in different:
        what = f"the model {found.get('model')!r}, this is {about.get('model')!r}"
        if "model" not in different:
            what = f"the model {found.get('model')!r} with other weights"
    elif different & {"prompts", "n_prompts"}:
        what = f"{found.get('n_prompts')} other prompts, here are {about.get('n_prompts')}"
    elif different - {"model"}:  # one set of weights may lie under several names
        name = min(different - {"model"})
        what = f"{name} {found.get(name)!r}, this is {about[name]!r}"
    else:
        return
    raise FolderRefused(f"the folder {str(folder)!r} holds a sweep of {what}: {away}")


def _write_first(path: Path, text: str) -> None:
    """Write a file unless another process did at the same moment: the first one stands."""
    path.parent.mkdir(parents=True, exist_ok=True)
    new = path.with_name(f".{path.name}.{uuid.uuid4().hex}.tmp")
    write_atomically(new, text)
    try:
        os.link(new, path)
    except FileExistsError:
        pass
    except OSError:  # a file system without links
        write_atomically(path, text)
    finally:
        new.unlink(missing_ok=True)
