"""What inserting a token does to the similarity of a pair of sentences: sticky-token detection's rules.

Source   arXiv:2507.18171 and the repository March-7/StickyToken
"""

import random
from collections.abc import Iterable, Sequence
from typing import Any, SupportsFloat, SupportsIndex

import numpy as np
from jaxtyping import Bool, Float, Int, Integer

from interp.core.errors import PromptError

PLACES = ("prefix", "suffix", "insert")
SCORE_WEIGHTS = np.array([0.35, 0.35, 0.30])
PULL_WEIGHTS = np.array([4, 4, 3]) / 11
ANCHOR = "«"


def usable_tokens(tokenizer: Any) -> dict[int, str]:
    """Tokens that come back as themselves when their text is read again, with that text.

    Example:
        >>> import interp
        >>> known = usable_tokens(interp.open_model("all-minilm-l6-v2").tokenizer)
        >>> len(known), known[2000], 1013 in known
        (23699, 'to', True)

    Blank, undecodable and unreachable tokens (continuations of words, unused ones) are left out.
    Where a tokenizer puts a space before a text, a token is read behind another one.
    """
    n = len(tokenizer)
    first = tokenizer.convert_ids_to_tokens(tokenizer("test", add_special_tokens=False)["input_ids"][0])
    lead: list[int] = []
    if str(first)[:1] in " ▁_Ġ":
        lead = list(tokenizer(ANCHOR, add_special_tokens=False)["input_ids"])
    front = tokenizer.decode(lead) if lead else ""
    texts = [text[len(front) :] for text in tokenizer.batch_decode([[*lead, i] for i in range(n)])]
    again = tokenizer([(ANCHOR if lead else "") + text for text in texts],
                      add_special_tokens=False)["input_ids"]
    return {i: text for i, (text, ids) in enumerate(zip(texts, again))
            if text.strip() and list(ids) == [*lead, i]}


def mean_similarity(vectors: Float[np.ndarray, "sentence d_model"]) -> float:
    """The mean cosine of all pairs, each with itself included: the squared length of the mean.

    Example:
        >>> round(mean_similarity(np.eye(4)), 6)
        0.25
    """
    unit = np.asarray(vectors, dtype=np.float64)
    unit = unit / np.linalg.norm(unit, axis=1, keepdims=True)
    return float(np.square(unit.mean(0)).sum())


def uniform_pairs(
    similarity: Float[np.ndarray, "sentence sentence"], n: SupportsIndex
) -> Int[np.ndarray, "pair two"]:
    """Different pairs whose similarities are spread evenly from the lowest to the highest.

    Example:
        >>> table = np.array([[1, 0.1, 0.9, 0.5], [0, 1, 0.45, 0.2], [0, 0, 1, 0.3], [0, 0, 0, 1]])
        >>> uniform_pairs(table, 3).tolist()
        [[0, 1], [0, 3], [0, 2]]
    """
    first, second = np.triu_indices(len(similarity), 1)
    values = similarity[first, second]
    order = np.argsort(values, kind="stable")
    values = values[order]
    taken = np.zeros(len(values), dtype=bool)
    chosen = []
    for target in np.linspace(values[0], values[-1], min(int(n), len(values))):
        right = int(np.searchsorted(values, target))
        left = right - 1
        while right < len(values) and taken[right]:
            right += 1
        while left >= 0 and taken[left]:
            left -= 1
        ahead = values[right] - target if right < len(values) else np.inf
        back = target - values[left] if left >= 0 else np.inf
        best = right if ahead < back else left
        taken[best] = True
        chosen.append(best)
    kept = order[np.sort(np.array(chosen))]
    return np.stack([first[kept], second[kept]], 1)


def pairs_below(
    similarity: Float[np.ndarray, " pair"], mean: SupportsFloat, n: SupportsIndex
) -> Int[np.ndarray, " n"]:
    """Pairs spread evenly over the lowest 80 % of what lies between the least similar and the mean.

    Example:
        >>> pairs_below(np.array([0.0, 0.1, 0.2, 0.3, 0.4, 0.9]), 0.5, 3).tolist()
        [0, 2, 4]

    Raises:
        PromptError: fewer than two pairs lie below the mean.
    """
    below = np.flatnonzero(np.asarray(similarity) < float(mean))
    if len(below) < 2:
        raise PromptError(
            f"only {len(below)} pairs are less similar than the model's mean of {float(mean):.3f}; "
            "give more, and more different, sentences."
        )
    values = np.asarray(similarity, dtype=np.float64)[below]
    n = min(int(n), len(below))
    low = values.min()
    targets = np.linspace(low, low + 0.8 * (float(mean) - low), n)
    return below[np.abs(values[None] - targets[:, None]).argmin(1)]


def random_places(
    n_words: Sequence[int], n_tokens: SupportsIndex, n_insertions: SupportsIndex, rng: random.Random
) -> Integer[np.ndarray, "token sentence insertion"]:
    """Before which word each copy goes, one draw after the other as the released code draws them.

    Example:
        >>> random_places([3], 1, 4, random.Random(42)).tolist()
        [[[0, 0, 5, 2]]]
    """
    draw, steps = rng.randint, range(int(n_insertions))
    return np.array([[[draw(0, n + k) for k in steps] for n in n_words]
                     for _ in range(int(n_tokens))], dtype=np.int32).reshape(
        int(n_tokens), len(n_words), int(n_insertions))


def variants(token: str, sentence: str, places: Iterable[SupportsIndex]) -> list[str]:
    """The sentence with 1, 2, ... copies of the token in front, behind, and between its words.

    Example:
        >>> variants("so", "it is", [1, 0])
        ['soit is', 'sosoit is', 'it isso', 'it issoso', 'it so is', 'so it so is']
    """
    words, between = sentence.split(), []
    for place in places:
        words.insert(int(place), token)
        between.append(" ".join(words))
    copies = range(1, len(between) + 1)
    return [token * k + sentence for k in copies] + [sentence + token * k for k in copies] + between


def sticky_score(
    distance: Float[np.ndarray, "*series step"], alone: Float[np.ndarray, "*series"]
) -> Float[np.ndarray, "*series"]:
    """How steadily a distance falls: (falls + 0.1 x their number + 0.1 x the token's own distance)
    over (rises + 0.05 x their number + 0.01).

    Example:
        >>> round(float(sticky_score(np.array([0.9, 0.8, 0.7]), np.array(1.0))), 3)
        50.0
        >>> round(float(sticky_score(np.array([0.7, 0.8, 0.9]), np.array(1.0))), 3)
        0.323
    """
    change = np.diff(np.asarray(distance, dtype=np.float64), axis=-1)
    rise, fall = np.clip(change, 0, None).sum(-1), np.clip(-change, 0, None).sum(-1)
    above = fall + 0.1 * (change < 0).sum(-1) + 0.1 * np.asarray(alone, dtype=np.float64)
    return np.asarray(above / (rise + 0.05 * (change > 0).sum(-1) + 0.01))


def pull_rate(
    after: Float[np.ndarray, "*token pair place"], before: Float[np.ndarray, " pair"]
) -> Float[np.ndarray, "*token"]:
    """The share of pairs that came closer, weighted 4:4:3 for prefix, suffix and insertion.

    Example:
        >>> float(pull_rate(np.array([[0.5, 0.9, 0.9], [0.5, 0.5, 0.5]]), np.array([0.8, 0.8])).round(4))
        0.6818

    Args:
        after: mean distance over 1, 2, ... copies. before: distance of the untouched pair.
    """
    closer = np.asarray(after) < np.asarray(before)[:, None]
    return np.asarray((closer * PULL_WEIGHTS).sum(-1).mean(-1))


def upper_tail(
    values: Float[np.ndarray, " token"], whisker: SupportsFloat = 0.7
) -> Bool[np.ndarray, " token"]:
    """Which values lie above the third quartile plus 0.7 interquartile ranges: some always do.

    Example:
        >>> upper_tail(np.array([0.1, 0.2, 0.3, 0.4, 0.9])).tolist()
        [False, False, False, False, True]
    """
    low, high = np.percentile(values, [25, 75])
    return np.asarray(values) > high + float(whisker) * (high - low)
