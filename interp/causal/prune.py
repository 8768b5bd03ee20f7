"""Pruning memory or context heads, so that the other source of an answer wins.

Paper     PH3, arXiv:2402.18154; baseline re-implementation in the released code of arXiv:2503.10996
Measure   memory usage and context usage: the share of prompts answered from each source
Cause     heads of the unwanted kind are ablated; how many is chosen on prompts of their own
"""

from collections.abc import Sequence
from typing import Any, Literal, SupportsIndex, Union

import numpy as np
import torch
import xarray as xr
from jaxtyping import Float
from torch import Tensor

from interp.causal.metrics import check_count, key_of
from interp.causal.sweep import evaluate
from interp.core import Head, HeadScores, Prompt, PromptError, Result, ablate
from interp.core.intervention import AblateHeads, Phase
from interp.models.model import Model

Source = Literal["memory", "context"]
COUNTS = (1, 3, 5, 7, 9, 15)
"""Numbers of heads that the released code of arXiv:2503.10996 tries."""


def ranked(scores: Union[HeadScores, xr.DataArray], against: Source) -> list[Head]:
    """Heads of one kind, strongest first: S_m above zero for "memory", below for "context".

    Example:
        >>> scores = HeadScores.of(np.array([[0.5, -2.0], [0.0, -1.0]]))
        >>> ranked(scores, "memory"), ranked(scores, "context")
        ([L0H0], [L0H1, L1H1])

    Args:
        scores: S_m `[layer, head]` of `interp.heads.memory_context`.
    """
    if against not in ("memory", "context"):
        raise ValueError(f"prune against 'memory' or 'context', not {against!r}.")
    if not isinstance(scores, HeadScores):
        scores = HeadScores(scores)
    sign = 1 if against == "memory" else -1
    return HeadScores(sign * scores.scores, eligible=scores.eligible).above(0.0)


def prune(
    scores: Union[HeadScores, xr.DataArray],
    against: Source,
    count: SupportsIndex,
    by: str = "zero",
    phase: Phase = "all",
    value: Any = None,
) -> AblateHeads:
    """Ablate the `count` strongest memory (or context) heads: an intervention for any run.

    Example:
        >>> prune(HeadScores.of(np.array([[0.5, -2.0], [0.0, -1.0]])), "context", 1).heads
        (L0H1,)

    It goes into `write=` of `model.run` and `model.generate`, alone or with others. Zero and mean
    pruning differ: the paper's is zero, which also takes away what a head always writes.

    Args:
        scores: S_m `[layer, head]`.
        against: the source that is to be used less.
        count: heads; fewer where there are fewer of that kind.
        by, phase, value: see `interp.ablate`.

    Raises:
        ValueError: no head of that kind, or a count below one.
    """
    heads = ranked(scores, against)
    if int(count) < 1:
        raise ValueError(f"prune one head or more, not {count}.")
    if not heads:
        raise ValueError(
            f"no head has a score {'above' if against == 'memory' else 'below'} zero, so there is no "
            f"{against} head to prune."
        )
    return ablate(heads[: int(count)], by, phase, value)


class Answers:
    """Whether the next token is this one (1 or 0): the use of one source, by its first token.

    Example:
        >>> import interp
        >>> model = interp.open_model("backcopy-1l")
        >>> metric = Answers("memory_usage", [5])
        >>> bool(metric(model, [Prompt.from_tokens(range(3, 12))])[0] in (0.0, 1.0))
        True

    With `log_prob`, the log probability of the token instead, in nats. Metrics with the same `key`
    share their passes; by default it is the tokens.
    """

    dim = "prompt"

    def __init__(
        self, name: str, tokens: Sequence[SupportsIndex], log_prob: bool = False,
        batch_size: int = 8, key: Any = None,
    ) -> None:
        self.key = [int(token) for token in tokens] if key is None else key
        self.name, self.tokens = name, [int(token) for token in tokens]
        self.log_prob, self.batch_size = bool(log_prob), int(batch_size)
        self.unit = "nats" if log_prob else "share of prompts"

    def __call__(
        self, model: Model, prompts: Sequence[Prompt], write: Any = ()
    ) -> Float[np.ndarray, "prompt"]:
        return self.values(self.passes(model, prompts, write))

    def __repr__(self) -> str:
        return f"Answers({self.name!r})"

    @property
    def shared(self) -> str:
        # Tokens are part of it only because finished cells are kept under name and key.
        return key_of("last row", self.key)

    def passes(self, model: Model, prompts: Sequence[Prompt], write: Any) -> Tensor:
        """The last row of every prompt, `[prompt, vocab]`."""
        check_count(self.tokens, prompts)
        run = model.run(prompts, write=write, logits="last", batch_size=self.batch_size)
        return torch.stack([rows[-1] for rows in run.logits])

    def values(self, outcome: Any) -> np.ndarray:
        rows, tokens = outcome.double(), torch.tensor(self.tokens)
        if self.log_prob:
            return rows.log_softmax(-1).gather(1, tokens[:, None])[:, 0].numpy()
        return (rows.argmax(-1) == tokens).double().numpy()

    def of_last(
        self, rows: Float[Tensor, "variant d_vocab"], prompt: int
    ) -> Float[np.ndarray, "variant"]:
        """The values of variants of one prompt from their last rows."""
        token = self.tokens[prompt]
        if self.log_prob:
            return rows.double().log_softmax(-1)[:, token].numpy()
        return (rows.argmax(-1) == token).double().numpy()


def choose_count(
    model: Model,
    prompts: Sequence[Prompt],
    wanted: Sequence[SupportsIndex],
    scores: Union[HeadScores, xr.DataArray],
    against: Source,
    *,
    counts: Sequence[SupportsIndex] = COUNTS,
    by: str = "zero",
    phase: Phase = "all",
    value: Any = None,
    batch_size: int = 8,
) -> Result:
    """How many heads to prune: what makes most development prompts give the wanted answer.

    Example:
        >>> import interp
        >>> model = interp.open_model("backcopy-3l")
        >>> scores = HeadScores.of(np.ones((model.n_layers, model.n_heads)))
        >>> found = choose_count(model, [Prompt.from_tokens(range(3, 12))], [5], scores, "memory",
        ...                      counts=(1, 2))
        >>> int(found["chosen"]) in (1, 2)
        True

    Args:
        prompts: for this choice only: evaluate on others.
        wanted: the first token of the answer from the source that is to win, per prompt.
        counts: numbers of heads to try; those above the number of heads of that kind are left out.

    Returns:
        `usage` and `log_prob` `[count, prompt]`, `chosen`: the best count by usage, then by the
        probability, then the smaller one (as in the released code of arXiv:2503.10996, up to ties).

    Raises:
        PromptError: no prompts. ValueError: no head of that kind, or no count to try.
    """
    if not prompts:
        raise PromptError("no prompts to choose on: give at least one.")
    available = len(ranked(scores, against))
    tried = sorted({int(c) for c in counts if 1 <= int(c) <= available})
    if not tried:
        raise ValueError(
            f"there are {available} {against} heads, and none of the counts {list(counts)} is "
            "between 1 and that."
        )
    metrics = [Answers("usage", wanted, batch_size=batch_size),
               Answers("log_prob", wanted, log_prob=True, batch_size=batch_size)]
    found = evaluate(model, prompts, metrics,
                     [prune(scores, against, c, by, phase, value) for c in tried])
    best = max(tried, key=lambda c: (*(float(found[m.name][tried.index(c)].mean())
                                       for m in metrics), -c))
    data = xr.Dataset(
        {name: (("count", "prompt"), values) for name, values in found.items()}, {"count": tried})
    data["chosen"] = best
    return Result(data, {
        **model.manifest(), "measure": "choose_count", "against": against, "by": by, "phase": phase,
        "n_prompts": len(prompts),
    })
