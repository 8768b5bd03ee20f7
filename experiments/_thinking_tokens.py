"""Words of reflection in generated text: where they fall, and what becomes of a model without them."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from scipy import stats

from interp.core import Prompt, statistics

THINKING = ("wait", "hmm", "so", "let", "therefore", "thus", "hence", "but", "however",
            "alternatively", "maybe", "okay", "ok", "actually", "then", "now", "first", "since",
            "because", "check", "again")
"""Words that reflect or conclude; the published list is of this kind."""


def thinking_ids(model: Any) -> list[int]:
    """Tokens that are one of the words, however they are capitalized and whether a blank comes first."""
    found = []
    for token, number in model.tokenizer.get_vocab().items():
        if token.lstrip("Ġ▁ ").lower() in THINKING and number < model.d_vocab:
            found.append(int(number))
    return sorted(found)


def of_equal_frequency(
    chosen: Sequence[int], tokens: np.ndarray, rng: np.random.Generator, avoid: Sequence[int] = ()
) -> list[int]:
    """For each chosen token that occurs, another one that occurs about as often.

    Example:
        >>> tokens = np.array([1] * 5 + [2] * 5 + [3])
        >>> of_equal_frequency([1], tokens, np.random.default_rng(0))
        [2]
    """
    kinds, count = np.unique(tokens, return_counts=True)
    free = {int(k): int(c) for k, c in zip(kinds, count) if k not in set(chosen) | set(avoid)}
    made = []
    for token in chosen:
        own = int((tokens == token).sum())
        if not own or not free:
            continue
        gap = min(abs(c - own) for c in free.values())
        nearest = [k for k, c in free.items() if abs(c - own) == gap]
        made.append(int(rng.choice(nearest)))
        del free[made[-1]]
    return made


def enrichment(
    traces: Sequence[Sequence[int]], peaks: Sequence[np.ndarray], chosen: Sequence[int],
    others: Sequence[int], resamples: int = 2000, seed: int = 0,
) -> tuple[statistics.Estimate, dict[str, Any]]:
    """Log odds ratio of being a peak, chosen tokens against others; texts are resampled.

    Example:
        >>> traces = [[1, 2, 1, 2]] * 6
        >>> found, table = enrichment(traces, [np.array([True, False, True, False])] * 6, [1], [2], 99)
        >>> found.value > 4, table["peaks among chosen"], table["Fisher's p"] < 0.001
        (True, 12, True)

    One half is added to every count.
    """
    counts = np.zeros((len(traces), 4))
    for row, trace, top in zip(counts, traces, peaks):
        mine, theirs = np.isin(trace, list(chosen)), np.isin(trace, list(others))
        row[:] = (mine & top).sum(), (mine & ~top).sum(), (theirs & top).sum(), (theirs & ~top).sum()

    def log_odds(rows: np.ndarray) -> float:
        a, b, c, d = rows.sum(0) + 0.5
        return float(np.log(a * d / (b * c)))

    total = counts.sum(0).astype(int)
    exact = stats.fisher_exact(total.reshape(2, 2))
    return statistics.bootstrap(log_odds, counts, resamples=resamples, seed=seed,
                                name="log odds ratio"), {
        "peaks among chosen": int(total[0]), "chosen": int(total[:2].sum()),
        "peaks among others": int(total[2]), "others": int(total[2:].sum()),
        "Fisher's p": float(exact.pvalue)}


def without(
    model: Any, prompts: Sequence[Prompt], banned: Sequence[int], steps: int, batch_size: int = 8
) -> list[list[int]]:
    """Greedy continuations in which some tokens are never chosen.

    Example:
        >>> import interp
        >>> model = interp.open_model("backcopy-1l")
        >>> prompt = Prompt.from_tokens(range(3, 9))
        >>> first = model.generate(prompt, 1)[0]
        >>> without(model, [prompt], first, 1)[0] != first
        True
    """
    made: list[list[int]] = []
    for start in range(0, len(prompts), batch_size):
        stream = model.stepping(list(prompts[start : start + batch_size]))
        rows: list[list[int]] = [[] for _ in range(len(stream))]
        for _ in range(steps):
            scores = stream.logits.clone()
            scores[:, torch.tensor(list(banned), dtype=torch.long)] = -float("inf")
            chosen = scores.argmax(1).tolist()
            for row, token in zip(rows, chosen):
                row.append(int(token))
            if all(set(row) & model.end_tokens for row in rows):
                break
            if len(rows[0]) < steps:
                stream.feed(chosen)
        ends = model.end_tokens
        made += [row[: next((i for i, t in enumerate(row) if t in ends), len(row))] for row in rows]
    return made
