"""What an intervention is measured by: one number per prompt, from the model's own logits.

A metric is called as `metric(model, prompts, write)` and returns `[prompt]`. Metrics that need the
same passes share them in a sweep: `passes` runs the model, `values` reads the outcome.
"""

import hashlib
import json
from collections import Counter
from collections.abc import Sequence
from typing import Any, Optional, Protocol, runtime_checkable

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from interp.core import Prompt
from interp.core.errors import PromptError
from interp.core.intervention import Each
from interp.models.model import Model


@runtime_checkable
class Metric(Protocol):
    """One number per prompt. `passes` may be shared by metrics with an equal `shared` key.

    `dim` is the axis of the values: "prompt", or "sample" for texts of the metric's own.
    """

    name: str
    unit: str
    dim: str

    @property
    def shared(self) -> str: ...

    def passes(self, model: Model, prompts: Sequence[Prompt], write: Any) -> Any: ...

    def values(self, outcome: Any) -> np.ndarray: ...


def key_of(*content: Any) -> str:
    """A short content key of JSON-ready values."""
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:16]


class _Measured:
    """What every metric shares: calling it is running its passes and reading them."""

    dim = "prompt"

    def __call__(
        self, model: Model, prompts: Sequence[Prompt], write: Any = ()
    ) -> Float[np.ndarray, "prompt"]:
        return self.values(self.passes(model, prompts, write))  # type: ignore[attr-defined]

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.name!r})"  # type: ignore[attr-defined]


class _Answered(_Measured):
    """Metrics of a known answer: the rows that decide its tokens, decoded one by one."""

    def __init__(
        self, answers: Sequence[Sequence[int]], decode_last: bool = False, batch_size: int = 8
    ) -> None:
        self.answers = [[int(token) for token in answer] for answer in answers]
        for number, answer in enumerate(self.answers):
            if not answer:
                raise PromptError(f"the answer to prompt {number} is empty: give its token ids.")
        self.decode_last, self.batch_size = bool(decode_last), int(batch_size)

    @property
    def shared(self) -> str:
        return key_of("answered", self.answers, self.decode_last)

    def passes(
        self, model: Model, prompts: Sequence[Prompt], write: Any
    ) -> list[tuple[Tensor, list[int]]]:
        """The logits `[answer token, vocab]` that decide each answer, and the answer."""
        check_count(self.answers, prompts)
        found: list[Any] = [None] * len(prompts)
        for numbers in _by_length(self.answers):
            run = model.run(
                [prompts[i] for i in numbers], write=_part(write, numbers),
                # The last token of an answer decides nothing: it need not be fed.
                new_tokens=[self.answers[i][:-1] for i in numbers], logits="last",
                batch_size=self.batch_size, decode_last=self.decode_last,
            )
            for i, rows in zip(numbers, run.logits):
                found[i] = (rows[-len(self.answers[i]) :], self.answers[i])
        return found


    def why_not_last_row(self) -> Optional[str]:
        """None if every answer is one token that the last row of the prompt decides."""
        if self.decode_last:
            return "the last token of the prompt is a decoding step of its own"
        return "an answer has several tokens" if max(map(len, self.answers)) > 1 else None

    def of_last(
        self, rows: Float[Tensor, "variant d_vocab"], prompt: int
    ) -> Float[np.ndarray, "variant"]:
        """The values of variants of one prompt from their last rows."""
        answer = self.answers[prompt]
        return np.concatenate([self.values([(row[None], answer)]) for row in rows])  # type: ignore


class AnswerLogProb(_Answered):
    """Mean log probability per token of the given answers, in nats.

    Example:
        >>> import interp
        >>> model = interp.open_model("backcopy-1l")
        >>> metric = AnswerLogProb([[5, 6]])
        >>> bool(metric(model, [Prompt.from_tokens(range(3, 12))])[0] < 0)
        True

    Args:
        answers: token ids per prompt.
        decode_last: whether the last token of the prompt is a decoding step (see `Model.run`).
    """

    name, unit = "log_prob", "nats per answer token"

    def values(self, outcome: Any) -> np.ndarray:
        found = [torch.log_softmax(rows.float(), -1)[range(len(a)), a].mean() for rows, a in outcome]
        return np.array([float(value) for value in found])


class AnswerAccuracy(_Answered):
    """Whether greedy decoding gives the answer, every token of it: 1 or 0 per prompt."""

    name, unit = "accuracy", "share of prompts"

    def values(self, outcome: Any) -> np.ndarray:
        # As long as every token so far was right, feeding the answer is greedy decoding.
        return np.array([float(rows.argmax(-1).tolist() == a) for rows, a in outcome])


class AnswerRecall(_Measured):
    """Share of the answer's tokens (with multiplicity) in what the model generates.

    `extra` tokens more than the answer has are generated. The unigram recall of ROUGE-1, on tokens.
    """

    name, unit = "recall", "share of answer tokens"

    def __init__(
        self, answers: Sequence[Sequence[int]], decode_last: bool = False, extra: int = 0,
        batch_size: int = 8,
    ) -> None:
        self.answers = [[int(token) for token in answer] for answer in answers]
        self.decode_last, self.extra, self.batch_size = bool(decode_last), int(extra), int(batch_size)

    @property
    def shared(self) -> str:
        return key_of("generated", self.answers, self.decode_last, self.extra)

    def passes(self, model: Model, prompts: Sequence[Prompt], write: Any) -> list[list[int]]:
        """What is generated after every prompt."""
        check_count(self.answers, prompts)
        longest = max(map(len, self.answers)) + self.extra
        made = model.generate(prompts, longest, write, batch_size=self.batch_size,
                              decode_last=self.decode_last)
        return [row[: len(a) + self.extra] for row, a in zip(made, self.answers)]

    def values(self, outcome: Any) -> np.ndarray:
        hits = [sum((Counter(row) & Counter(a)).values()) for row, a in zip(outcome, self.answers)]
        return np.array([hit / len(a) for hit, a in zip(hits, self.answers)])


class TextLoss(_Measured):
    """Mean loss of the prompts' own tokens, in nats: what an edit does to neutral text.

    Tokens of images are no targets. With `prompts` given, these are read instead of the prompts of
    the sweep, so that one sweep shows the effect on its task and on neutral text side by side.

    Example:
        >>> import interp
        >>> model = interp.open_model("backcopy-1l")
        >>> bool(TextLoss()(model, [Prompt.from_tokens(range(3, 12))])[0] > 0)
        True
    """

    name, unit = "text_loss", "nats per token"

    def __init__(self, prompts: Sequence[Prompt] = (), batch_size: int = 8) -> None:
        self.prompts, self.batch_size = tuple(prompts), int(batch_size)
        self.dim = "sample" if self.prompts else "prompt"

    @property
    def shared(self) -> str:
        return key_of("text", [prompt.digest() for prompt in self.prompts])

    def passes(
        self, model: Model, prompts: Sequence[Prompt], write: Any
    ) -> list[tuple[Tensor, Prompt]]:
        """The logits of every prompt."""
        given = list(self.prompts or prompts)
        run = model.run(given, write=write, batch_size=self.batch_size)
        return list(zip(run.logits, given))

    def values(self, outcome: Any) -> np.ndarray:
        found = []
        for rows, prompt in outcome:
            ids = torch.tensor(prompt.ids[1:])
            kept = torch.ones(len(ids), dtype=torch.bool)
            for segment in prompt.of_kind("image"):
                kept[[p - 1 for p in segment.positions if p > 0]] = False
            loss = torch.nn.functional.cross_entropy(rows[:-1].float(), ids, reduction="none")
            found.append(float(loss[kept].mean()))
        return np.array(found)


class LogitDifference(_Measured):
    """Logit of one token minus that of another, in the last row of each prompt.

    Args:
        a, b: token ids, one per prompt each.
    """

    name, unit = "logit_difference", "logits"

    def __init__(self, a: Sequence[int], b: Sequence[int], batch_size: int = 8) -> None:
        self.a, self.b = [int(x) for x in a], [int(x) for x in b]
        self.batch_size = int(batch_size)

    @property
    def shared(self) -> str:
        return key_of("logit difference", self.a, self.b)

    def passes(self, model: Model, prompts: Sequence[Prompt], write: Any) -> Tensor:
        """The last row of every prompt, `[prompt, vocab]`."""
        check_count(self.a, prompts)
        run = model.run(prompts, write=write, logits="last", batch_size=self.batch_size)
        return torch.stack([rows[-1] for rows in run.logits])

    def values(self, outcome: Any) -> np.ndarray:
        rows = torch.arange(len(outcome))
        return (outcome[rows, self.a] - outcome[rows, self.b]).double().numpy()

    def of_last(
        self, rows: Float[Tensor, "variant d_vocab"], prompt: int
    ) -> Float[np.ndarray, "variant"]:
        """The values of variants of one prompt from their last rows."""
        return (rows[:, self.a[prompt]] - rows[:, self.b[prompt]]).double().numpy()


def why_not_last_row(metric: Metric) -> Optional[str]:
    """Why a metric cannot be read off the last row of each prompt; None if it can.

    Such metrics have `of_last(rows, prompt)`: last rows of variants of one prompt to their values.
    Sweeps then run nothing but what decides that row.

    Example:
        >>> why_not_last_row(LogitDifference([5], [6])), why_not_last_row(TextLoss())
        (None, 'the metric reads more than the last row of logits')
    """
    if not hasattr(metric, "of_last"):
        return "the metric reads more than the last row of logits"
    own = getattr(metric, "why_not_last_row", None)
    return None if own is None else own()


def check_count(given: Sequence[Any], prompts: Sequence[Prompt]) -> None:
    """Raise `PromptError` unless there is one answer per prompt."""
    if len(given) != len(prompts):
        raise PromptError(f"{len(given)} answers for {len(prompts)} prompts: give one for each.")


def _by_length(answers: Sequence[Sequence[int]]) -> list[list[int]]:
    groups: dict[int, list[int]] = {}
    for number, answer in enumerate(answers):
        groups.setdefault(len(answer), []).append(number)
    return list(groups.values())


def _part(write: Any, numbers: Sequence[int]) -> Any:
    """The interventions of some of the prompts."""
    return Each(tuple(write.writes[i] for i in numbers)) if isinstance(write, Each) else write
