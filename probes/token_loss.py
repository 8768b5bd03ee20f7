"""Which tokens of a text count, what a model pays for each, and what counting words alone would pay.

A claim on a language model's states says nothing about a model that has not learned its language:
the loss of every text is compared with that of word frequencies, from the other texts.
"""

from collections.abc import Sequence
from typing import Any, SupportsIndex

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from interp.core import Prompt, statistics


def content_places(model: Any, prompt: Prompt) -> tuple[int, ...]:
    """Positions after the first that hold no special token of the model's tokenizer.

    Example:
        >>> import interp
        >>> content_places(interp.open_model("backcopy-1l"), Prompt.from_tokens([4, 5, 6]))
        (1, 2)
    """
    special = set(getattr(model.tokenizer, "all_special_ids", None) or ())
    # A delimiter that ends a text may be an ordinary word of it too.
    special -= set(prompt.ids[1:-1])
    return tuple(i for i, token in enumerate(prompt.ids) if i and token not in special)


def token_losses(
    model: Any, prompts: Sequence[Prompt], *, batch_size: SupportsIndex = 8
) -> list[Float[np.ndarray, "position"]]:
    """Minus the log probability of every token given those before it, in nats; NaN for the first.

    Example:
        >>> import interp
        >>> losses = token_losses(interp.open_model("backcopy-1l"), [Prompt.from_tokens([4, 5, 6])])
        >>> losses[0].shape, bool(np.isnan(losses[0][0]))
        ((3,), True)

    All NaN for an encoder, and for a model without a vocabulary head.
    """
    found = []
    for start in range(0, len(prompts), int(batch_size)):
        part = list(prompts[start : start + int(batch_size)])
        logits = model.run(part, batch_size=int(batch_size)).logits if model.kind == "decoder" else []
        for number, prompt in enumerate(part):
            found.append(losses_of(logits[number], prompt) if logits else
                         np.full(len(prompt), np.nan))
    return found


def losses_of(
    logits: Float[Tensor, "position vocab"], prompt: Prompt
) -> Float[np.ndarray, "position"]:
    """The same from logits that are there already."""
    row = np.full(len(prompt), np.nan)
    scores = logits[: len(prompt) - 1].float()
    own = torch.tensor(prompt.ids[1:], device=scores.device)[:, None]
    row[1:] = (scores.logsumexp(1) - scores.gather(1, own)[:, 0]).cpu().numpy()
    return row


def frequency_loss(
    prompts: Sequence[Prompt], places: Sequence[Sequence[SupportsIndex]]
) -> Float[np.ndarray, "prompt"]:
    """Mean loss of every text under the word frequencies of the other ones, in nats per token.

    Example:
        >>> texts = [Prompt.from_tokens([0, 1, 1]), Prompt.from_tokens([0, 1, 1])]
        >>> frequency_loss(texts, [(1, 2), (1, 2)]).tolist()
        [0.0, 0.0]

    One is added to the count of every token that occurs in any of the texts.
    """
    rows = [[prompt.ids[int(i)] for i in at] for prompt, at in zip(prompts, places)]
    kinds, flat = np.unique(np.concatenate(rows), return_inverse=True)
    bounds = np.cumsum([0, *map(len, rows)])
    counts = np.stack([np.bincount(flat[a:b], minlength=len(kinds))
                       for a, b in zip(bounds, bounds[1:])])
    others = counts.sum(0) - counts + 1
    cost = -np.log(others / others.sum(1, keepdims=True))
    return (counts * cost).sum(1) / counts.sum(1)


def why_untrained(
    model: Any, loss: Float[np.ndarray, "prompt"], frequency: Float[np.ndarray, "prompt"]
) -> str:
    """Why claims on language models do not apply: the model knows no more than word frequencies.

    Example:
        >>> from types import SimpleNamespace
        >>> why_untrained(SimpleNamespace(name="m"), np.full(9, 4.5), np.full(9, 4.0))
        'm predicts these texts no better than word frequencies do (4.5 against 4 nats per token)'

    Empty where the mean loss is lower, its bootstrap interval over texts included.
    """
    if not np.isfinite(loss).all():
        return f"{model.name} predicts no next token: it is no causal language model"
    gain = statistics.difference(frequency, loss, resamples=2000)
    if gain.interval[0] > 0:
        return ""
    return (f"{model.name} predicts these texts no better than word frequencies do "
            f"({loss.mean():.3g} against {frequency.mean():.3g} nats per token)")
