"""What an experiment is: a `PAPER` that says what it reproduces, and a `run(settings, out)`.

The four parts of the framework, in the order in which an experiment meets them: `Paper` and
`Settings` here, `Output` in `_output.py`, `Estimate` in `interp.core.statistics`.
"""

import importlib
import pkgutil
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any, Optional, TypeVar

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

import experiments
import interp
from interp.core import ModelNotFound, UndertowError

DTYPES = ("float32", "bfloat16", "float16")
NAME = re.compile(r"[a-z0-9][a-z0-9_.-]*")
T = TypeVar("T")


class SettingsError(UndertowError, ValueError):
    """What was asked for on the command line cannot be done as it stands."""


@dataclass(frozen=True)
class Paper:
    """What an experiment reproduces.

    Example:
        >>> Paper("first_light", "Sinks at first light", ("2410.10781",), "Where is the sink?",
        ...       figures={"heads": "Attention on the first token, per head."}).sources
        ('arXiv:2410.10781',)

    Args:
        key: the name of the module, on the command line and of the result folder.
        title: of the paper, or of the topic where there are several papers.
        arxiv: their ids.
        question: what is asked, in one sentence.
        figures: name -> caption, in the order in which they are shown.
        models: what it runs on when no `--model` is given.
        trains: whether `--train` means anything to it.
        long: whether it takes most of a minute: it then begins first where several run side by side.
    """

    key: str
    title: str
    arxiv: tuple[str, ...]
    question: str
    figures: Mapping[str, str]
    models: tuple[str, ...] = ()
    trains: bool = False
    long: bool = False

    def __post_init__(self) -> None:
        if not re.fullmatch(r"[a-z][a-z0-9_]*", self.key):
            raise ValueError(f"a paper's key is a module name, not {self.key!r}.")
        for arxiv in self.arxiv:
            if not re.fullmatch(r"\d{4}\.\d{4,5}", arxiv):
                raise ValueError(f"{arxiv!r} is not an arXiv id; write it like '2410.10781'.")
        if not self.question.endswith("?"):
            raise ValueError(f"the question of {self.key!r} should end in a question mark.")
        for name, caption in self.figures.items():
            if not NAME.fullmatch(name) or not caption:
                raise ValueError(
                    f"figure {name!r} of {self.key!r} needs a plain name and a caption."
                )

    @property
    def sources(self) -> tuple[str, ...]:
        """The ids as claims name them."""
        return tuple(f"arXiv:{arxiv}" for arxiv in self.arxiv)


class Settings(BaseModel):
    """What a run was asked to do, checked.

    Example:
        >>> settings = Settings.of(seed=3, tiny=True)
        >>> settings.pick(200, tiny=8), settings.wants("levels")
        (8, True)
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    model: Optional[list[str]] = None
    out: Path = Path("figures")
    seed: int = Field(default=0, ge=0, le=2**32 - 1)
    tiny: bool = False
    train: bool = False
    figure: Optional[list[str]] = None
    device: Optional[str] = Field(default=None, pattern=r"^(cpu|mps|cuda(:\d+)?)$")
    dtype: Optional[str] = None

    @field_validator("dtype")
    @classmethod
    def _dtype(cls, given: Optional[str]) -> Optional[str]:
        if given is not None and given not in DTYPES:
            raise ValueError(f"choose one of: {', '.join(DTYPES)}")
        return given

    @field_validator("model", "figure")
    @classmethod
    def _names(cls, given: Optional[list[str]]) -> Optional[list[str]]:
        if given is not None and not all(name.strip() for name in given):
            raise ValueError("a name is empty")
        return list(dict.fromkeys(given)) if given else None

    @field_validator("out")
    @classmethod
    def _out(cls, given: Path) -> Path:
        if given.exists() and not given.is_dir():
            raise ValueError("there is a file of that name; give a folder")
        return given

    @classmethod
    def of(cls, **values: Any) -> "Settings":
        """Settings from plain values. Raises `SettingsError`, one sentence for the first fault."""
        try:
            return cls(**values)
        except ValidationError as error:
            first = error.errors()[0]
            name = ".".join(str(part) for part in first["loc"])
            if first["type"] == "extra_forbidden":
                raise SettingsError(
                    f"there is no setting {name!r}; the settings are: "
                    f"{', '.join(cls.model_fields)}."
                ) from None
            why = first["msg"].removeprefix("Value error, ")
            if name == "device":
                why = "write cpu, mps, cuda or cuda:NUMBER"
            raise SettingsError(
                f"{name} cannot be {str(first['input'])!r}: {why[0].lower()}{why[1:]}."
            ) from None

    def models(self, paper: Paper) -> tuple[str, ...]:
        """The models to run on: those asked for, else the paper's own."""
        return tuple(self.model) if self.model else paper.models

    def opening(self) -> dict[str, Any]:
        """Keywords for `interp.open_model`."""
        return {"device": self.device, "dtype": self.dtype}

    def wants(self, figure: str) -> bool:
        """Whether this figure was asked for (all are, where none is named)."""
        return self.figure is None or figure in self.figure

    def pick(self, full: T, *, tiny: T) -> T:
        """The first value, or in a `--tiny` run the second."""
        return tiny if self.tiny else full

    def rng(self, *stream: int) -> np.random.Generator:
        """A generator that depends on the seed, and on `stream` where several are needed."""
        return np.random.default_rng([self.seed, *stream])


def opened(
    paper: Paper, settings: Settings, absent: Callable[[str, str], None],
    opening: Optional[Callable[[str, Settings], Any]] = None,
) -> Iterator[Any]:
    """The models of a run, opened one by one; of one of the paper's that is not here `absent` is told.

    A model that was asked for by name and is not there stops the run (`ModelNotFound`). `opening`
    opens one by its name, where that takes more than `interp.open_model`.
    """
    for name in settings.models(paper):
        try:
            model = opening(name, settings) if opening else interp.open_model(
                name, **settings.opening())
        except ModelNotFound as error:
            if settings.model is not None:
                raise
            absent(name, str(error))
            continue
        yield model


def names() -> tuple[str, ...]:
    """Every experiment there is, by module name; nothing is imported."""
    found = (module.name for module in pkgutil.iter_modules(experiments.__path__))
    return tuple(sorted(name for name in found if not name.startswith("_")))


def check_names(asked: Iterable[str]) -> tuple[str, ...]:
    """The experiments asked for, "all" being every one. Raises `SettingsError` for unknown ones."""
    known, chosen = names(), []
    for name in asked:
        if name != "all" and name not in known:
            raise SettingsError(
                f"there is no experiment {name!r}; there are: {', '.join(known) or 'none'}, or all."
            )
        chosen += known if name == "all" else [name]
    return tuple(dict.fromkeys(chosen))


@dataclass(frozen=True)
class Experiment:
    """A loaded module: its paper and its run."""

    paper: Paper
    module: ModuleType = field(repr=False)

    def run(self, settings: Settings, out: Any) -> None:
        self.module.run(settings, out)


def load(name: str) -> Experiment:
    """Import one experiment.

    Raises:
        SettingsError: no experiment of that name, or its module lacks `PAPER` or `run`.
    """
    check_names([name])
    module = importlib.import_module(f"experiments.{name}")
    paper = getattr(module, "PAPER", None)
    if not isinstance(paper, Paper) or not callable(getattr(module, "run", None)):
        raise SettingsError(
            f"experiments/{name}.py is no experiment: it must define PAPER and run(settings, out)."
        )
    if paper.key != name:
        raise SettingsError(
            f"experiments/{name}.py calls itself {paper.key!r}; the two must agree."
        )
    return Experiment(paper, module)
