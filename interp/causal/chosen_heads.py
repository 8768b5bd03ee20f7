"""What heads chosen by hand do: answers, accuracy and text with them scaled, and with random ones.

Question  Does the model need just these heads for the task at hand?
Measure   accuracy and log probability of the answers, and what the model then says by itself
Cause     the heads' outputs are multiplied by a factor (0 removes them); as many random heads of the
          same layers, several times, are the control
"""

from collections.abc import Iterable, Sequence
from typing import Any, Optional, SupportsFloat, SupportsIndex

import numpy as np
import xarray as xr

from interp.causal.controls import most_excludable, random_heads
from interp.causal.metrics import AnswerAccuracy, AnswerLogProb
from interp.causal.sweep import evaluate
from interp.core import Head, OutOfRange, Prompt, Result, scale
from interp.core.head import HeadLike, check_heads
from interp.core.head import heads as as_heads
from interp.models.model import Model

CONDITIONS = ("untouched", "chosen", "random")


def measure(
    model: Model,
    prompts: Sequence[Prompt],
    answers: Sequence[Sequence[int]],
    heads: Iterable[HeadLike],
    *,
    factor: SupportsFloat = 0.0,
    seeds: SupportsIndex = 5,
    avoid: Iterable[HeadLike] = (),
    example: SupportsIndex = 0,
    new_tokens: Optional[int] = None,
    batch_size: int = 8,
) -> Result:
    """Scale the outputs of some heads, and of as many random ones, and see what becomes of answers.

    Example:
        >>> import interp
        >>> model = interp.open_model("backcopy-3l")
        >>> prompts = [Prompt.from_tokens(range(i, i + 9)) for i in range(3, 8)]
        >>> found = measure(model, prompts, [[5]] * 5, ["L1H0"])
        >>> found["accuracy"].dims, found["condition"].values.tolist()
        (('condition', 'prompt'), ['untouched', 'chosen', 'random'])

    Args:
        heads: any number of them; none leaves the model as it is.
        factor: what their outputs are multiplied by: 0 removes them, 1 changes nothing.
        seeds: how many random sets. They hold as many heads of each layer as `heads` does, none of
            these, and none of `avoid` as far as the layers have heads enough (best first).
        example: the prompt whose continuation is kept as text.
        new_tokens: how long it is; the answer's length and one more for None.

    Returns:
        `accuracy` (greedy decoding gives the whole answer) and `log_prob` (nats per answer token),
        [condition, prompt]: "untouched", "chosen", "random" (the mean over the random sets; NaN if
        none could be drawn). The manifest holds the `heads`, the `random` sets, whether they are
        `layer_matched`, and the example's `texts` by condition ("random": with the first set).

    Raises:
        OutOfRange: a head that the model does not have, or an example that does not exist.
        PromptError: no prompts, or answers of another number.
    """
    chosen, number = as_heads(heads), int(example)
    check_heads(chosen, model.n_layers, model.n_heads)
    if not -len(prompts) <= number < len(prompts):
        raise OutOfRange(f"there is no prompt {number} to continue: {len(prompts)} were given.")
    sets, matched = _controls(model, chosen, avoid, int(seeds))
    some: list[tuple[Head, ...]] = [(), chosen, *sets]
    writes = [scale(one, float(factor)) if one else () for one in some]
    metrics = [AnswerAccuracy(answers, batch_size=batch_size),
               AnswerLogProb(answers, batch_size=batch_size)]
    values = evaluate(model, prompts, metrics, writes)
    length = len(answers[number]) + 1 if new_tokens is None else new_tokens
    texts = {name: _text(model, model.generate(prompts[number], length, write)[0])
             for name, write in zip(CONDITIONS, writes)}
    data: dict[str, Any] = {}
    for metric in metrics:
        table = values[metric.name]
        control = table[2:].mean(0) if sets else np.full(len(prompts), np.nan)
        data[metric.name] = (("condition", "prompt"), np.stack([table[0], table[1], control]),
                             {"units": metric.unit})
    return Result(xr.Dataset(data, {"condition": list(CONDITIONS)}), {
        **model.manifest(), "measure": "chosen_heads", "factor": float(factor),
        "heads": [str(head) for head in chosen], "texts": texts,
        "random": [[str(head) for head in one] for one in sets], "layer_matched": matched,
        "example": number, "answer": _text(model, answers[number]),
        "prompts": [prompt.digest() for prompt in prompts],
    })


def _controls(
    model: Model, chosen: tuple[Head, ...], avoid: Iterable[HeadLike], seeds: int
) -> tuple[list[tuple[Head, ...]], bool]:
    """Random sets like the chosen one and whether they match it layer by layer; none if too few
    heads are left."""
    if not chosen:
        return [()] * seeds, True
    size = (model.n_layers, model.n_heads)
    barred = most_excludable(avoid, chosen, model.n_heads)
    for matched in (True, False):
        try:
            return [random_heads(chosen, *size, seed=seed, exclude=barred if matched else (),
                                 layer_matched=matched) for seed in range(seeds)], matched
        except OutOfRange:
            continue
    return [], False


def _text(model: Model, tokens: Sequence[int]) -> str:
    if model.tokenizer is None:
        return " ".join(map(str, tokens))
    return str(model.tokenizer.decode(list(tokens)))
