"""The bundled models by name: where their weights are and how they were made.

Example:
    >>> from interp.organisms import registry
    >>> registry.names()
    ('backcopy-1l', 'backcopy-3l', 'reader', 'looker')
"""

from importlib import import_module
from pathlib import Path

from interp.core.errors import ModelNotFound
from interp.organisms.train import Recipe

WEIGHTS = Path(__file__).parent / "weights"

# Modules are imported when a recipe is asked for: opening a model needs only its folder.
_RECIPES: dict[str, tuple[str, dict[str, int | float]]] = {
    "backcopy-1l": ("backcopy", {"layers": 1, "short": 64, "steps": 1500, "lr": 1e-3}),
    "backcopy-3l": ("backcopy", {"layers": 3, "batch": 8, "steps": 1500, "lr": 1.5e-3}),
    "reader": ("reader", {}),
    "looker": ("looker", {}),
}


def names() -> tuple[str, ...]:
    """The names of all bundled models.

    Example:
        >>> from interp.organisms import registry
        >>> "reader" in registry.names()
        True
    """
    return tuple(_RECIPES)


def _known(name: str) -> str:
    if name not in _RECIPES:
        raise ModelNotFound(
            f"unknown bundled model {name!r}. Choose one of: {', '.join(_RECIPES)}."
        )
    return name


def path(name: str) -> Path:
    """The folder of a bundled model, to be opened like any local model folder.

    Example:
        >>> from interp.organisms import registry
        >>> registry.path("reader").name
        'reader'

    ModelNotFound (a FileNotFoundError) for an unknown name, or where the weights are missing.
    """
    folder = WEIGHTS / _known(name)
    if not (folder / "model.safetensors").is_file():
        raise ModelNotFound(
            f"the weights of the bundled model {name!r} are not in this installation ({folder}). "
            f"Reinstall the package, or train it: python -m interp.organisms train {name} --install"
        )
    return folder


def card(name: str) -> str:
    """The card of a bundled model, as Markdown.

    Example:
        >>> from interp.organisms import registry
        >>> registry.card("reader").splitlines()[0]
        '# reader'
    """
    return (path(name) / "card.md").read_text(encoding="utf-8")


def recipe(name: str) -> Recipe:
    """The recipe that a bundled model was trained with.

    Example:
        >>> from interp.organisms import registry
        >>> registry.recipe("backcopy-3l").name
        'backcopy-3l'
    """
    module, options = _RECIPES[_known(name)]
    return import_module(f"interp.organisms.{module}").recipe(**options)
