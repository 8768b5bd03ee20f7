"""Needle prompts for whichever model is asked: in the bundled reader's language, or in English."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from experiments import _texts as texts
from experiments._paper import Settings, SettingsError
from interp.causal.metrics import AnswerLogProb, key_of
from interp.core import Prompt, PromptError
from interp.organisms import asking, reader
from interp.prompts.needle import Needle

SHARES = (0.02, 0.1, 0.4)
"""Lengths of detection prompts for a model of its own language, as shares of what it reads; never
above 4096 tokens."""

SHORTEST = 160
"""Tokens that an English needle with its question and some text around it take at least."""

ANSWER = 16
"""Positions left free for the answer in the reader's language."""


def lengths(model: Any, settings: Settings) -> dict[str, tuple[int, ...]]:
    """Prompt lengths by use: "detect" heads, "test" them, and the whole "grid"; all fit the model.

    None at all to detect with means that the model is too short for any.
    """
    if texts.knows(model, reader):
        # Trained on up to 512 tokens; beyond, it begins to fail, which is wanted too.
        full = {"detect": (48, 128, 256, 384), "test": (64, 160), "fail": (896, 1000),
                "grid": (64, 256, 512, 640, 896)}
        tiny = {"detect": (48, 64), "test": (48,), "fail": (), "grid": (48, 96)}
        room = (model.max_positions or 1 << 30) - ANSWER
        return {use: tuple(n for n in sizes if n <= room)
                for use, sizes in settings.pick(full, tiny=tiny).items()}
    most = min(model.max_positions or 4096, 10240) - 64
    if most < SHORTEST:
        return {"detect": (), "test": (), "fail": (), "grid": ()}
    steps = sorted({max(SHORTEST, min(4096, int(share * most))) for share in SHARES})
    grid = sorted({*steps, max(SHORTEST, int(0.7 * most)), most})
    full = {"detect": tuple(steps), "test": tuple(steps[:2]), "fail": (), "grid": tuple(grid)}
    tiny = {"detect": (SHORTEST,), "test": (SHORTEST,), "fail": (), "grid": (SHORTEST,)}
    return settings.pick(full, tiny=tiny)


def too_short(model: Any, sizes: Mapping[str, Sequence[int]]) -> str:
    """Why no prompt can be made, "" where `lengths` found some to detect and to test with."""
    # Without a tokenizer the length is not the point: `needles` says so.
    return "" if model.tokenizer is None or sizes["detect"] and sizes["test"] else (
        f"{model.name} has {model.max_positions} positions: too few for a needle in a text, its "
        "question and the answer")


def needles(
    model: Any, sizes: Sequence[int], depths: Sequence[Any], rng: np.random.Generator,
    each: int = 1,
) -> list[Needle]:
    """Needles over lengths x depths, with facts nobody could know.

    Raises `SettingsError` for a model that cannot be given text.
    """
    try:
        return asking.needles(model, sizes, depths, rng, each)
    except PromptError as error:
        if model.tokenizer is None:
            raise SettingsError(str(error)) from error
        raise


class NeutralLoss(AnswerLogProb):
    """Loss of ordinary text while it is decoded token by token, in nats: damage beside the point.

    The second part of every text is fed one token at a time, so that an edit of the decoding phase
    alone acts on it as it does on an answer.
    """

    name, unit, dim = "neutral_loss", "nats per token", "sample"

    def __init__(self, given: Sequence[Prompt], steps: int = 6, batch_size: int = 8) -> None:
        self.prompts = [Prompt.from_tokens(p.ids[:-steps]) for p in given]
        super().__init__([p.ids[-steps:] for p in given], True, batch_size)

    @property
    def shared(self) -> str:
        """As in `Metric`."""
        return key_of("neutral", [p.digest() for p in self.prompts], self.answers)

    def passes(self, model: Any, prompts: Sequence[Prompt], write: Any) -> Any:
        """As in `Metric`, on the metric's own texts."""
        return super().passes(model, self.prompts, write)

    def values(self, outcome: Any) -> np.ndarray:
        """Minus the mean log probability."""
        return -super().values(outcome)


def neutral(model: Any, count: int, rng: np.random.Generator, length: int = 48) -> NeutralLoss:
    """The loss of `count` ordinary texts of `length` tokens."""
    return NeutralLoss(texts.natural(model, count, length, rng))
