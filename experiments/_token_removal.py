"""Taking function words out of a context, against as many content tokens: what it costs the target."""

from typing import Any, Optional

import numpy as np
import xarray as xr

from experiments import _passages, _texts
from experiments._paper import Settings
from experiments._word_classes import english, is_function, kinds
from interp.core import Prompt
from interp.organisms import reader
from probes.token_loss import token_losses

Item = tuple[list[int], list[int], list[int]]
"""The context's ids, the positions that may be removed, and the target's ids."""


def removal(
    model: Any, settings: Settings, seeds: int = 5
) -> tuple[Optional[xr.Dataset], str]:
    """Loss of a target after its whole context, and with tokens of either class removed from it.

    For the reader the target answers a question on a fact, which itself and the question stay whole;
    for models that read English it is the second half of a passage.

    Returns:
        [prompt]: `whole`, `function`, `content` (mean over `seeds` draws), in nats per target token, and
        `removed`, how many tokens; or None with the reason.
    """
    items, target = _items(model, settings)
    if not items:
        return None, f"{model.name} reads neither the reader's language nor words of English"
    rng = settings.rng(6)
    rows = {name: [] for name in ("whole", "function", "content", "removed")}
    for context, free, answer in items:
        function = is_function(kinds(model, context))
        ours = [p for p in free if function[p]]
        others = [p for p in free if not function[p]]
        count = min(len(ours), len(others))
        if not count:
            continue
        chosen = [set(), set(int(p) for p in rng.choice(ours, count, replace=False)), *(
            set(int(p) for p in rng.choice(others, count, replace=False)) for _ in range(seeds))]
        prompts = [Prompt.from_tokens([*(t for p, t in enumerate(context) if p not in gone), *answer])
                   for gone in chosen]
        loss = [float(row[-len(answer):].mean()) for row in token_losses(model, prompts)]
        for name, value in zip(rows, (loss[0], loss[1], float(np.mean(loss[2:])), float(count))):
            rows[name].append(value)
    if not rows["whole"]:
        return None, "no context has tokens of both classes that may be removed"
    made = xr.Dataset({name: ("prompt", values) for name, values in rows.items()})
    return made.assign_attrs(seeds=seeds, target=target), ""


def _items(model: Any, settings: Settings) -> tuple[list[Item], str]:
    rng = settings.rng(7)
    if _texts.knows(model, reader):
        made = []
        for _ in range(settings.pick(24, tiny=8)):
            found = reader.needle(settings.pick(256, tiny=64), float(rng.uniform(0.1, 0.9)), rng,
                                  distractors=settings.pick(12, tiny=2))
            kept = {0, *range(*found.segments["needle"]), *range(*found.segments["question"])}
            free = [p for p in range(len(found.tokens)) if p not in kept]
            made.append((list(found.tokens), free, list(found.answers["context"])))
        return made, "the answer to a question on a fact in the context"
    if not english(model):
        return [], ""
    made = []
    most = (model.max_positions or 1024) // 2
    for first, second in _passages.PASSAGES[: settings.pick(20, tiny=8)]:
        context = list(model.tokenizer(first)["input_ids"])[:most]
        answer = list(model.tokenizer(" " + second, add_special_tokens=False)["input_ids"])[:most]
        made.append((context, list(range(1, len(context))), answer))
    return made, "the second half of a passage"
