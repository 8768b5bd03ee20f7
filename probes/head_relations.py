"""Single heads as classifiers of syntax: does one head find the determiner's noun, the verb's object?

Paper     arXiv:1906.04341, section 4.2
Question  Which relation does which head follow, beyond a fixed offset?
Measure   share of words whose syntactic head is the word of highest attention, in either direction;
          head, direction and offset are chosen on one half of the sentences and scored on the other
Cause     none
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, SupportsIndex, Union

import numpy as np
import pandas as pd
from jaxtyping import Float, Int
from matplotlib.axes import Axes

from interp.core import statistics
from interp.figures.style import CYCLE, color, style

DIRECTIONS = ("word to head", "head to word", "either")
"""Who attends: the word to its head, the head to the word, or both together."""
OFFSETS = (-3, -2, -1, 1, 2)
NONE = -2
"""What is predicted where nothing can be: no attention seen, or beyond the sentence."""
ALL = "all"


def predictions(
    attention: Float[np.ndarray, "channel word word"]
) -> Int[np.ndarray, "direction channel word"]:
    """The head that each map gives each word: the other word of highest attention.

    Example:
        >>> predictions(np.array([[[0.9, 0.1, 0.0], [0.2, 0.3, 0.5], [0.6, 0.3, 0.1]]]))[:, 0].tolist()
        [[1, 2, 0], [2, 2, 1], [2, 2, 1]]

    -2 where no other word gives or gets any attention, as for the first word of a causal model. The
    root is no candidate.
    """
    maps = np.asarray(attention, dtype=float)
    back = maps.transpose(0, 2, 1)
    own = np.eye(maps.shape[1], dtype=bool)
    found = []
    # Axis 1 is the word, axis 2 the candidate.
    for one in (maps, back, maps + back):
        others = np.where(own, -1.0, one)
        found.append(np.where(others.max(-1) > 0, others.argmax(-1), NONE))
    return np.stack(found)


def offset_predictions(
    n: SupportsIndex, offsets: Sequence[SupportsIndex] = OFFSETS
) -> Int[np.ndarray, "offset word"]:
    """The word at a fixed offset: -1 is the word before; -2 (none) beyond the sentence."""
    places = np.arange(int(n)) + np.array([int(o) for o in offsets])[:, None]
    return np.where((places >= 0) & (places < int(n)), places, NONE)


@dataclass(frozen=True)
class Relations:
    """How well single heads follow relations; `table` has a row per relation, `words` per word.

    Columns of `table`: relation, n (words), accuracy (best head, on sentences it was not chosen on),
    offset_accuracy (best offset, chosen alike), best_on_all (best head chosen and scored on all
    sentences, the optimistic number), channel and direction (chosen on all), offset.
    """

    table: pd.DataFrame
    words: pd.DataFrame

    def gain(self, relation: str = ALL, **more: Any) -> statistics.Estimate:
        """Best head minus best offset, bootstrap over sentences."""
        rows = self.words[self.words.relation == relation]
        if not len(rows):
            raise ValueError(f"no word has the relation {relation!r}; there are: "
                             f"{', '.join(sorted(set(self.words.relation)))}.")
        return statistics.difference(rows.right.to_numpy(float), rows.offset_right.to_numpy(float),
                                     groups=rows.sentence.to_numpy(), **more)


def compare(
    attention: Sequence[Float[np.ndarray, "channel _ _"]],
    heads: Sequence[Sequence[SupportsIndex]],
    relations: Sequence[Sequence[str]],
    *,
    offsets: Sequence[SupportsIndex] = OFFSETS,
    fewest: SupportsIndex = 10,
    seed: SupportsIndex = 0,
) -> Relations:
    """The best head of every relation against the best offset, both chosen on other sentences.

    Args:
        attention: between words, per sentence, the same channels in all.
        heads: -1 for the root, which no head can point at: such words are left out.
        relations: name of every word's relation to its head. All words together are called "all".
        fewest: relations of fewer words are left out.

    Raises:
        ValueError: sentences that do not fit together, or fewer than two.

    Source: arXiv:1906.04341, where heads are chosen on the sentences that they are scored on.
    """
    if not len(attention) == len(heads) == len(relations) or len(attention) < 2:
        raise ValueError(f"attention, heads and relations of {len(attention)}, {len(heads)} and "
                         f"{len(relations)} sentences: give all three of at least two sentences.")
    right, right_offset, names, member = [], [], [], []
    for number, (maps, own, kinds) in enumerate(zip(attention, heads, relations)):
        truth = np.array([int(h) for h in own])
        kept = np.flatnonzero(truth >= 0)
        if not len(truth) == len(kinds) == maps.shape[1]:
            raise ValueError(f"sentence {number} has attention between {maps.shape[1]} words, but "
                             f"{len(truth)} heads and {len(kinds)} relations.")
        guesses = predictions(np.asarray(maps, dtype=float)).reshape(-1, len(truth))
        right.append((guesses == truth)[:, kept])
        right_offset.append((offset_predictions(len(truth), offsets) == truth)[:, kept])
        names += [kinds[int(i)] for i in kept]
        member += [number] * len(kept)
    hits, offset_hits = np.concatenate(right, 1), np.concatenate(right_offset, 1)
    relation, sentence = np.array(names, dtype=object), np.array(member)
    order = np.random.default_rng(int(seed)).permutation(len(attention))
    half = np.isin(sentence, order[: len(order) // 2])
    channels = len(hits) // len(DIRECTIONS)
    rows, words = [], []
    for name in [ALL, *sorted(set(relation))]:
        mine = np.ones(len(relation), bool) if name == ALL else relation == name
        if mine.sum() < int(fewest) or not (mine & half).any() or not (mine & ~half).any():
            continue
        held = _other_half(hits, mine, half), _other_half(offset_hits, mine, half)
        share = hits[:, mine].mean(1)
        best = int(share.argmax())
        rows.append({
            "relation": name, "n": int(mine.sum()), "accuracy": float(held[0].mean()),
            "offset_accuracy": float(held[1].mean()), "best_on_all": float(share[best]),
            "channel": best % channels, "direction": DIRECTIONS[best // channels],
            "offset": int(offsets[int(offset_hits[:, mine].mean(1).argmax())])})
        words.append(pd.DataFrame({"relation": name, "sentence": sentence[mine],
                                   "right": held[0], "offset_right": held[1]}))
    if not rows:
        raise ValueError(f"no relation has {int(fewest)} words in both halves of the sentences.")
    return Relations(pd.DataFrame(rows), pd.concat(words, ignore_index=True))


def _other_half(hits: np.ndarray, mine: np.ndarray, half: np.ndarray) -> np.ndarray:
    """Whether each word is right by the predictor that is best on the half it is not in."""
    found = np.zeros(len(mine), bool)
    for side in (half, ~half):
        best = int(hits[:, mine & ~side].mean(1).argmax())
        found[mine & side] = hits[best, mine & side]
    return found[mine]


@style()
def draw(found: Union[Relations, pd.DataFrame], ax: Axes) -> Axes:
    """Best head and best offset per relation, as bars."""
    table = found.table if isinstance(found, Relations) else found
    at = np.arange(len(table))
    ax.bar(at - 0.2, table.accuracy, 0.38, color=CYCLE[0], label="best head")
    ax.bar(at + 0.2, table.offset_accuracy, 0.38, color=color("control"), label="best offset")
    ax.set_xticks(at, list(table.relation), rotation=35, ha="right")
    ax.set_ylabel("share of words with the right head")
    ax.set_ylim(0, 1)
    ax.legend()
    return ax
