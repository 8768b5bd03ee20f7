"""Where results go when no folder is named: two models of one name never replace each other."""

import hashlib
import json
from collections.abc import Iterator, Sequence
from pathlib import Path

from experiments._outcome import CACHE, MANIFEST, slug
from interp.organisms import registry

DEFAULT = Path("figures")


def place(models: Sequence[str], tiny: bool, figures: Sequence[str]) -> tuple[Path, str]:
    """The folder for a run, and a sentence if it is not the one that its models are called after.

    `figures` itself for a whole run; a subfolder for a partial run or other models. Where a folder
    holds results of another model of that name, a short hash of the path or hub id is added.
    """
    notice, parts = "", []
    if models:
        asked = _identities(models)
        name = "-".join(map(slug, models))
        tag = hashlib.sha256("\n".join(asked).encode()).hexdigest()[:8]
        plain, own = DEFAULT / name, DEFAULT / f"{name}-{tag}"
        reserved = name in registry.names() and asked != (name,)
        if own.is_dir() or reserved or any(held != asked for held in _held(plain)):
            notice = (f"{plain} is for another model of that name; these results go to {own}.")
            name = own.name
        parts.append(name)
    parts += ["tiny"] if tiny else []
    parts += ["only-" + "-".join(map(slug, figures))] if figures else []
    return DEFAULT.joinpath(*parts), notice


def alike(models: Sequence[str]) -> str:
    """Why models cannot share a run, whose results are told apart by name; "" if they can."""
    seen: dict[str, tuple[str, str]] = {}
    for name, identity in zip(models, map(_identity, models)):
        other, before = seen.setdefault(slug(name), (name, identity))
        if before != identity:
            return (f"{other!r} and {name!r} are both called {slug(name)!r}, and results of one run "
                    "are told apart by name; give them to two runs.")
    return ""


def _identity(name: str) -> str:
    """A bundled name or a hub id as it is; of a folder here its whole path."""
    path = Path(name).expanduser()
    return str(path.resolve()) if name not in registry.names() and path.is_dir() else name


def _identities(models: Sequence[str]) -> tuple[str, ...]:
    return tuple(dict.fromkeys(map(_identity, models)))


def _held(folder: Path) -> Iterator[tuple[str, ...]]:
    """Of which models the finished runs in a folder are."""
    for path in folder.glob(f"**/{MANIFEST}"):
        if CACHE in path.relative_to(folder).parts:
            continue
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
            models = content["settings"]["model"]
        except (OSError, ValueError, KeyError, TypeError):
            continue  # not of a run, or broken: a run of any model may replace it
        if models:
            yield _identities(models)
