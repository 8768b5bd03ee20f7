"""What a model knows about a question, inside and in what it says: right answers against wrong ones.

Papers    arXiv:2503.15299 (hidden knowledge), arXiv:2410.02707 (errors, error types, answer choice)
Question  Does a score rank right answers above wrong ones, question by question? Better than the
          probability that the model gives them?
Measure   K: share of (right, wrong) pairs in order; K*: all of them; types of error among samples;
          accuracy of the answer that a score would choose
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Optional, SupportsFloat, Union

import numpy as np
from jaxtyping import Float

from interp.core import statistics
from interp.core.statistics import Estimate
from probes.held_out import auc

TYPES = ("always right", "mostly right", "always wrong", "mostly wrong", "two answers",
         "many answers", "no answer")
"""Kinds of questions by their sampled answers, as `error_type` tells them."""


@dataclass(frozen=True, eq=False)
class Knowledge:
    """K of every question that has a right and a wrong candidate.

    Attributes:
        questions: their names, in order of appearance. k: share of pairs in order, ties half.
        perfect: K*, 1 where every right answer stands above every wrong one. pairs: how many.
        dropped: questions with candidates of one kind only.
    """

    questions: tuple[Any, ...]
    k: Float[np.ndarray, "question"]
    perfect: Float[np.ndarray, "question"]
    pairs: Float[np.ndarray, "question"]
    dropped: tuple[Any, ...]

    @property
    def mean(self) -> float:
        """K, every question counting once; NaN without one."""
        return float(self.k.mean()) if len(self.k) else float("nan")


def knowledge(scores: Any, correct: Any, questions: Any) -> Knowledge:
    """K of a score for every question.

    Example:
        >>> found = knowledge([0.9, 0.5, 0.5, 0.2, 0.7], [1, 1, 0, 0, 1], list("aaaab"))
        >>> found.k.tolist(), found.perfect.tolist(), found.dropped
        ([0.875], [0.0], ('b',))

    A tie counts one half in K (so that K is the area under the ROC curve of a question) and keeps
    K* at 0.

    Args:
        scores: of every candidate answer; correct: whether it is right; questions: to which it
            belongs.

    Raises:
        ValueError: lengths that differ, or scores that are not numbers.

    Source: arXiv:2503.15299, section 2, with ties counted half.
    """
    s, y = np.asarray(scores, dtype=float), np.asarray(correct).astype(bool)
    of = np.asarray(questions)
    if not s.shape == y.shape == of.shape or s.ndim != 1:
        raise ValueError(f"{s.shape} scores, {y.shape} labels and {of.shape} questions: give one of "
                         "each per candidate.")
    if not np.isfinite(s).all():
        raise ValueError("scores hold values that are not numbers; leave those candidates out.")
    kept, ks, perfect, pairs, dropped = [], [], [], [], []
    for name in dict.fromkeys(of.tolist()):
        mine = of == name
        right, wrong = s[mine & y], s[mine & ~y]
        if not len(right) or not len(wrong):
            dropped.append(name)
            continue
        kept.append(name)
        ks.append(auc(s[mine], y[mine]))
        perfect.append(float(right.min() > wrong.max()))
        pairs.append(float(len(right) * len(wrong)))
    return Knowledge(tuple(kept), np.array(ks), np.array(perfect), np.array(pairs), tuple(dropped))


def relative_gap(
    internal: Any, external: Any, *, groups: Any = None, resamples: int = statistics.RESAMPLES,
    seed: int = 0,
) -> Estimate:
    """(K_int - K_ext) / K_ext of paired questions, bootstrapped over questions (or groups of them).

    Example:
        >>> relative_gap([0.8] * 6, [0.5] * 6, resamples=50).value
        0.6

    Source: arXiv:2503.15299.
    """
    def gap(a: np.ndarray, b: np.ndarray) -> float:
        return float((a.mean() - b.mean()) / b.mean()) if b.mean() else float("nan")

    found = statistics.bootstrap(gap, internal, external, groups=groups, resamples=resamples,
                                 seed=seed, name="relative gap of the means")
    return Estimate(round(found.value, 12), found.interval, found.n, found.method)


def said(log_probs: Sequence[Any], **more: Any) -> dict[str, Float[np.ndarray, "candidate"]]:
    """Scores of answers by what the model says: sum, mean, lowest and highest log probability.

    Example:
        >>> found = said([[-1.0, -3.0], [-2.0]])
        >>> found["sum"].tolist(), found["mean"].tolist(), found["min"].tolist()
        ([-4.0, -2.0], [-2.0, -2.0], [-3.0, -2.0])

    `log_probs` are the log probabilities of every answer's tokens; other scores of the same
    candidates (P(True), say) can be given by name and are returned with these.

    Raises:
        ValueError: an answer without tokens, or a further score of another length.
    """
    rows = [np.asarray(one, dtype=float) for one in log_probs]
    if any(one.ndim != 1 or not len(one) for one in rows):
        raise ValueError("an answer without tokens has no probability; leave it out.")
    made = {"sum": np.array([r.sum() for r in rows]), "mean": np.array([r.mean() for r in rows]),
            "min": np.array([r.min() for r in rows]), "max": np.array([r.max() for r in rows])}
    for name, values in more.items():
        made[name] = np.asarray(values, dtype=float)
        if made[name].shape != (len(rows),):
            raise ValueError(f"{name!r} has {made[name].shape} values for {len(rows)} answers.")
    return made


def features(
    said: Mapping[str, Any], lengths: Any
) -> Float[np.ndarray, "1 candidate feature"]:
    """The scores of `said` and the answers' lengths, as the one layer of a supervised outer score.

    Example:
        >>> features({"sum": [-1.0, -2.0]}, [1, 2]).shape
        (1, 2, 2)

    A probe is fitted to labels and a probability is not: without this the gap between them would be
    partly the gain of fitting. Give it to `probes.held_out.held_out` with the probe's own groups.
    """
    columns = [*(np.asarray(v, dtype=float) for v in said.values()), np.asarray(lengths, float)]
    return np.stack(columns, -1)[None]


def choose(
    scores: Any, correct: Any, questions: Any, eligible: Any = None
) -> dict[Any, float]:
    """Question -> whether the eligible answer with the highest score is right (share among ties).

    Example:
        >>> choose([0.9, 0.1, 0.4, 0.4], [1, 0, 1, 0], list("aabb"))
        {'a': 1.0, 'b': 0.5}

    `eligible` marks the candidates that may be chosen (sampled ones, say); questions without any
    are left out. A score of minus infinity is a valid last place, NaN is not eligible.
    """
    s, y, of = np.asarray(scores, dtype=float), np.asarray(correct).astype(float), np.asarray(questions)
    allowed = np.isfinite(s) | np.isneginf(s)
    allowed &= True if eligible is None else np.asarray(eligible).astype(bool)
    found = {}
    for name in dict.fromkeys(of[allowed].tolist()):
        mine = (of == name) & allowed
        found[name] = float(y[mine & (s == s[mine].max())].mean())
    return found


def majority(answers: Sequence[Optional[str]]) -> Optional[str]:
    """The most frequent answer, the first said of several; None only where nothing was answered.

    Example:
        >>> majority(["b", "a", "a", "b", None]), majority([None])
        ('b', None)
    """
    counts = Counter(answer for answer in answers if answer is not None)
    return counts.most_common(1)[0][0] if counts else None


def error_type(
    answers: Sequence[Optional[str]], right: Union[set[str], frozenset[str]], *,
    most: SupportsFloat = 0.5, close: SupportsFloat = 0.2,
) -> str:
    """The kind of a question by answers sampled to it, one of `TYPES`.

    Example:
        >>> error_type(["a"] * 9 + ["b"], {"a"}), error_type(["b"] * 10, {"a"})
        ('mostly right', 'always wrong')
        >>> error_type(["a"] * 4 + ["b"] * 4 + ["c"], {"a"}), error_type(list("bcdefg"), {"a"})
        ('two answers', 'many answers')

    "no answer": None in more than a share `most` of the samples. "always", "mostly": one answer (or
    right answers) in all, or in more than a share `most`, of them. "two answers": the right answer
    and one wrong answer both in at least a share `close`, differing by less than it. "many answers":
    the rest.

    Source: after arXiv:2410.02707, section 5; the shares are this toolkit's.
    """
    n = len(answers)
    if not n:
        raise ValueError("a kind of question needs at least one sampled answer.")
    counts = Counter(answer for answer in answers if answer is not None)
    good = sum(count for answer, count in counts.items() if answer in right)
    bad = max((count for answer, count in counts.items() if answer not in right), default=0)
    if n - sum(counts.values()) > float(most) * n:
        return "no answer"
    if good == n or good > float(most) * n:
        return "always right" if good == n else "mostly right"
    if bad == n or bad > float(most) * n:
        return "always wrong" if bad == n else "mostly wrong"
    if min(good, bad) >= float(close) * n and abs(good - bad) < float(close) * n:
        return "two answers"
    return "many answers"
