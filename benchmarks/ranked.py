"""Ranked sweeps: recall of the exact top 10 % and its cost, against the sweep over every cell.

On a random Llama, the bundled `reader` (a fact asked for at the end of a text) and `looker` (a
question about a picture): every head ablated, and every (layer, position) dropped. These have 32 to 64
heads, of which the passes for the scores alone are a tenth, so a random Llama with as many heads as a
model of seven billion parameters, 32 x 32, is there, too. What is timed is
the ranked sweep without its audit against the exact one, both with the same engine; recall is over
all cells. `forwards` counts passes over the prompt, a backward as two of them, a whole sweep as one
pass per cell.
"""

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch

from benchmarks import _models
from benchmarks._race import Contender, Race, Target, measure
from interp.causal.metrics import AnswerLogProb
from interp.causal.ranked import ranked_sweep
from interp.core import Prompt

NAME = "ranked"
RANKED, EXACT = "ranked", "exact sweep, same engine"
WHAT = ("heads", "positions")
MODELS = ("random Llama", "reader", "looker")
MANY = "random Llama of 32 x 32"
CASES = (*((model, what) for model in MODELS for what in WHAT), (MANY, "heads"))


def _size(race: str, name: str) -> Callable[[Mapping[str, Race]], float]:
    def value(races: Mapping[str, Race]) -> float:
        if race not in races:
            raise LookupError(f"the race {race!r} was not run")
        return float(races[race].sizes[name])

    return value


TARGETS = tuple(
    Target(f"{model}, {what}: {said}", at_least=least, value=_size(f"{model}, {what}", name))
    for model, what in CASES
    for said, name, least in (("recall of the exact top 10 %", "recall", 0.95),
                              ("forwards of a whole sweep against ours", "fewer forwards", 10.0)))


def race(quick: bool, device: str = "cpu") -> list[Race]:
    """Both kinds of cells in every model; with `quick` the small random Llama alone."""
    return [_one(name, what, quick) for name, what in (CASES[:2] if quick else CASES)]


def _one(name: str, what: str, quick: bool) -> Race:
    model, given, answers = _task(name, quick)
    metric = AnswerLogProb(answers)

    def sweep(audit: Any, factor: float) -> Any:
        return lambda: ranked_sweep(model, given, metric, what, factor=factor, audit=audit)

    full = sweep(None, 1.5)()
    cost = float(full["prefills"] - full["prefills_audit"])
    race = measure(f"{name}, {what}", [
        Contender(RANKED, lambda: sweep(0, 1.5)() and None),
        Contender(EXACT, lambda: sweep(0, 10.0)() and None)], EXACT, rounds=3, seconds=20)
    race.sizes.update({
        "cells": full["exact"].size, "tokens": len(given[0]), "prompts": len(given),
        "recall": round(float(full["recall"]), 3), "forwards": round(cost, 2),
        "fewer forwards": round(full["exact"].size / cost, 1),
        "verified": full.manifest["verified"], "rank correlation of the others":
            round(float(full["rank_correlation"]), 3)})
    for audit in (16, 64):
        some = sweep(audit, 1.5)()
        race.sizes[f"audit of {audit}"] = some.manifest["audit"]
    return race


def _task(name: str, quick: bool) -> tuple[Any, list[Prompt], list[list[int]]]:
    """A model, one prompt of its task, and the token that answers it."""
    if name in (MODELS[0], MANY):
        shape = {"num_hidden_layers": 3} if quick else {}
        if name == MANY:
            shape = {"num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8,
                     "head_dim": 16}
        model = _models.opened(_models.llama(**shape))
        given = _models.prompts(_models.tokens(1, 24 if quick else 96))
        return model, given, [[int(_last(model, one).argmax())] for one in given]
    import interp

    model = interp.open_model(name)
    if name == "reader":
        from interp.organisms import reader

        asked = reader.needle(96, 0.5, np.random.default_rng(0))
        return model, [Prompt.from_tokens(asked.tokens)], [[int(asked.answers["context"][0])]]
    from experiments import _picture_questions as questions

    asked = questions.about_scenes(model, ("color",), 1, np.random.default_rng(0))
    return model, questions.prompts(asked), [row[:1] for row in questions.answers(asked)]


def _last(model: Any, prompt: Prompt) -> torch.Tensor:
    return model.run(prompt, logits="last").logits[0][-1]
