"""Contrastive decoding: image tokens that say nothing about the question, decoded against.

Paper     arXiv:2405.17820 (AvisC), 2503.18556 (IAVA), 2410.04514 (DAMRO), 2406.12718 (AGLA)
Question  Does what is seen of the picture through blind, irrelevant or outlier tokens mislead?
Measure   the sets of tokens, their overlap with each other and with the object that is asked about
Cause     logits from a view with nothing but these tokens are subtracted (AGLA: those from a picture
          without irrelevant pixels are added); random sets of equal size are the control
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Optional, SupportsFloat, SupportsIndex, Union

import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from interp.causal import decoding
from interp.causal.decoding import Combiner, Method, Plan
from interp.core import NumericalError, Prompt
from interp.core.intervention import Intervention, edit
from interp.models.model import Model

Attention = Union[Float[Tensor, "layer head token"], Float[np.ndarray, "layer head token"]]
Map = Union[Float[Tensor, "token"], Float[np.ndarray, "token"]]
FILLS = ("zeros", "ones", "noise")


def _numbers(given: Any) -> Tensor:
    values = torch.as_tensor(given)
    values = values if values.dtype == torch.float64 else values.float()
    if not bool(torch.isfinite(values).all()):
        raise NumericalError("a map over image tokens holds NaN or infinity.")
    return values


def guiding_layers(attention: Attention, gamma: SupportsFloat = 0.5) -> tuple[int, ...]:
    """The fewest layers that hold a share `gamma` of all attention on the picture.

    Example:
        >>> rows = torch.tensor([0.1, 0.6, 0.3]).reshape(3, 1, 1).expand(3, 2, 4)
        >>> guiding_layers(rows, 0.5), guiding_layers(rows, 0.8)
        ((1,), (1, 2))

    Source: arXiv:2405.17820, released code.
    """
    mass = _numbers(attention).mean(1).sum(-1)
    share, order = (mass / mass.sum().clamp_min(1e-30)).sort(descending=True, stable=True)
    # Rounding must not ask for one more layer.
    count = int((share.cumsum(0) < float(gamma) - 1e-6).sum()) + 1
    return tuple(sorted(int(i) for i in order[:count]))


def blind_tokens(
    attention: Attention, gamma: SupportsFloat = 0.5, spread: SupportsFloat = 1.0
) -> tuple[Float[Tensor, "token"], Bool[Tensor, "token"]]:
    """Image tokens that get far more attention than others in the guiding layers: map and set.

    Example:
        >>> rows = torch.full((2, 3, 5), 0.02)
        >>> rows[..., 1] = 0.5
        >>> blind_tokens(rows)[1]
        tensor([False,  True, False, False, False])

    Args:
        attention: of the last prompt token to the image tokens.
        spread: how many standard deviations above the mean (lambda; the code's default is 0.99).

    Source: arXiv:2405.17820, released code.
    """
    values = _numbers(attention)
    received = values[list(guiding_layers(values, gamma))].mean(1).mean(0)
    return received, received >= received.mean() + float(spread) * received.std()


def irrelevant_tokens(
    task: Map, generic: Map, share: SupportsFloat = 0.5
) -> tuple[Float[Tensor, "token"], Bool[Tensor, "token"]]:
    """Change of attention from a generic to the specific instruction, and the lowest `share` of it.

    Example:
        >>> delta, low = irrelevant_tokens(torch.tensor([0.1, 0.6, 0.2]),
        ...                                torch.tensor([0.1, 0.2, 0.4]), 1 / 3)
        >>> low
        tensor([False, False,  True])

    Source: arXiv:2503.18556 (the idea; the share and the layers are this toolkit's).
    """
    delta = _numbers(task) - _numbers(generic)
    count = _count(share, len(delta))
    low = torch.zeros(len(delta), dtype=torch.bool)
    low[delta.sort(stable=True).indices[:count]] = True
    return delta, low


def _count(share: SupportsFloat, n_tokens: int) -> int:
    return max(1, min(n_tokens - 1, round(float(share) * n_tokens)))


def outlier_tokens(
    attention: Union[Float[Tensor, "head token"], Float[np.ndarray, "head token"]],
    count: SupportsIndex = 10,
) -> tuple[Float[Tensor, "token"], Bool[Tensor, "token"]]:
    """The `count` tokens that the vision tower attends to most, mean over heads: map and set.

    Example:
        >>> outlier_tokens(torch.tensor([[0.1, 0.7, 0.2], [0.3, 0.5, 0.2]]), 1)[1]
        tensor([False,  True, False])

    Source: arXiv:2410.04514. Its code for LLaVA takes queries and keys as one giant head; this is
    the attention that the tower really has.
    """
    received = _numbers(attention).mean(0)
    chosen = torch.zeros(len(received), dtype=torch.bool)
    chosen[received.sort(descending=True, stable=True).indices[: int(count)]] = True
    return received, chosen


def most_relevant(
    relevance: Union[Float[Tensor, "*pixel"], Float[np.ndarray, "*pixel"]],
    similarity: SupportsFloat,
) -> Bool[Tensor, "*pixel"]:
    """Pixels that AGLA leaves in the picture: the share 1 - similarity / 2 of the most relevant.

    Example:
        >>> int(most_relevant(torch.arange(10.0), 0.8).sum())
        6

    Args:
        relevance: of every pixel to the question, from a matching model.
        similarity: of picture and question by that model, 0 to 1.

    Source: arXiv:2406.12718, released code.
    """
    values = _numbers(relevance)
    count = max(1, round((1 - float(similarity) / 2) * values.numel()))
    kept = torch.zeros(values.numel(), dtype=torch.bool)
    kept[values.flatten().sort(descending=True, stable=True).indices[:count]] = True
    return kept.reshape(values.shape)


# -- methods --------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class AvisC(Method):
    """Contrast with a view in which only blind tokens keep their content.

    The embeddings of the other image tokens become zero (or "ones", "noise"). With a `seed`, as
    many random image tokens stand for the blind ones: the control.

    Source: arXiv:2405.17820; its defaults (alpha 1, beta 0.1, gamma 0.5, lambda 1).
    """

    alpha: SupportsFloat = 1.0
    beta: SupportsFloat = 0.1
    gamma: SupportsFloat = 0.5
    spread: SupportsFloat = 1.0
    fill: str = "zeros"
    seed: Optional[int] = None
    name = "AvisC"

    @property
    def combine(self) -> Combiner:  # type: ignore[override]
        return Combiner("contrast", self.alpha, self.beta)

    def plans(self, model: Model, prompts: Sequence[Prompt], new_tokens: int) -> list[Plan]:
        decoding.refuse_deep_stack(model)
        rows = decoding.last_row_attention(model, prompts)
        plans = []
        for number, prompt in enumerate(prompts):
            attention = rows[number][:, :, 0]
            received, blind = blind_tokens(attention, self.gamma, self.spread)
            image = np.array(decoding.image_tokens(prompt))
            chosen = tuple(int(p) for p in image[blind.numpy()])
            if self.seed is not None:
                chosen = decoding.random_tokens(image, len(chosen), self.seed, number)
            plans.append(Plan(
                second=prompt, second_write=replaced(prompt, chosen, self.fill, model.d_model),
                found={"map": received, "kept": chosen,
                       "layers": guiding_layers(attention, self.gamma)}))
        return plans


def replaced(
    prompt: Prompt, kept: Sequence[int], fill: str, d_model: int, seed: int = 0
) -> tuple[Intervention, ...]:
    """Embeddings of all image tokens but `kept` become zeros, ones or noise.

    Example:
        >>> prompt = Prompt.from_tokens(range(6), {"image": (1, 5)})
        >>> replaced(prompt, [2], "zeros", 8)[0].positions
        (1, 3, 4)
    """
    if fill not in FILLS:
        raise ValueError(f"tokens cannot be filled with {fill!r}; choose one of: {', '.join(FILLS)}.")
    gone = [p for p in decoding.image_tokens(prompt) if p not in set(kept)]
    if not gone:
        return ()
    value: Any = {"zeros": 0.0, "ones": 1.0}.get(fill)
    if value is None:
        value = np.random.default_rng(seed).standard_normal((len(gone), d_model))
    return (edit("embed", "replace", value, positions=gone),)


@dataclass(frozen=True, eq=False)
class IAVA(Method):
    """Contrast with a view of only those image tokens that a specific instruction leaves cold.

    `generic` gives, for a prompt, the same picture with one or several instructions that name
    nothing; their attention is averaged. Attention is the mean over all layers and heads.

    Source: arXiv:2503.18556 (abstract; alpha, beta and the share are this toolkit's).
    """

    generic: Callable[[Prompt], Sequence[Prompt]]
    alpha: SupportsFloat = 1.0
    beta: SupportsFloat = 0.1
    share: SupportsFloat = 0.5
    seed: Optional[int] = None
    name = "IAVA"

    @property
    def combine(self) -> Combiner:  # type: ignore[override]
        return Combiner("contrast", self.alpha, self.beta)

    def plans(self, model: Model, prompts: Sequence[Prompt], new_tokens: int) -> list[Plan]:
        if self.seed is not None:
            return [self._view(prompt, decoding.random_tokens(
                image := decoding.image_tokens(prompt), _count(self.share, len(image)), self.seed,
                number)) for number, prompt in enumerate(prompts)]
        generic = [list(self.generic(prompt)) for prompt in prompts]
        flat = [one for some in generic for one in some]
        maps = iter(decoding.last_row_attention(model, flat))
        tasks = decoding.last_row_attention(model, prompts)
        plans = []
        for prompt, task, some in zip(prompts, tasks, generic):
            image = np.array(decoding.image_tokens(prompt))
            others = torch.stack([next(maps).mean((0, 1, 2)) for _ in some])
            raw = task.mean((0, 1, 2))
            delta, low = irrelevant_tokens(raw, others.mean(0), self.share)
            kept = tuple(int(p) for p in image[low.numpy()])
            plans.append(self._view(prompt, kept, map=delta, raw=raw, each=raw - others))
        return plans

    def _view(self, prompt: Prompt, kept: tuple[int, ...], **found: Any) -> Plan:
        return Plan(second=prompt, second_write=decoding.only(prompt, kept),
                    found={"kept": kept, **found})


@dataclass(frozen=True, eq=False)
class DAMRO(Method):
    """Contrast with a view of only the tokens that the vision tower's class token attends to.

    `count` is 10 as for LLaVA in the paper, at most a quarter of the image tokens.

    Source: arXiv:2410.04514; alpha 0.5 for yes-no questions, 1.5 for descriptions (its scripts for
    InstructBLIP), beta 0.1.
    """

    alpha: SupportsFloat = 0.5
    beta: SupportsFloat = 0.1
    count: SupportsIndex = 10
    layer: SupportsIndex = -2
    seed: Optional[int] = None
    name = "DAMRO"

    @property
    def combine(self) -> Combiner:  # type: ignore[override]
        return Combiner("contrast", self.alpha, self.beta)

    def plans(self, model: Model, prompts: Sequence[Prompt], new_tokens: int) -> list[Plan]:
        plans = []
        for number, prompt in enumerate(prompts):
            image = np.array(decoding.image_tokens(prompt))
            count, found = max(1, min(int(self.count), len(image) // 4)), {}
            if self.seed is not None:
                kept = decoding.random_tokens(image, count, self.seed, number)
            else:
                rows = decoding.class_rows(model, prompt)
                attention = rows[max(int(self.layer), -len(rows))]
                found["map"], outliers = outlier_tokens(attention, count)
                kept = tuple(int(p) for p in image[outliers.numpy()])
            plans.append(Plan(second=prompt, second_write=decoding.only(prompt, kept),
                              found={"kept": kept, **found}))
        return plans


@dataclass(frozen=True, eq=False)
class AGLA(Method):
    """The logits of the same prompt with a masked picture are added.

    `masked` gives, for a prompt, the prompt with its masked picture; which pixels are irrelevant is
    for a matching model to say, which this toolkit does not bring along (`most_relevant` cuts its
    map as the released code does).

    Source: arXiv:2406.12718, alpha 2 and beta 0.5.
    """

    masked: Callable[[Prompt], Prompt]
    alpha: SupportsFloat = 2.0
    beta: SupportsFloat = 0.5
    name = "AGLA"

    @property
    def combine(self) -> Combiner:  # type: ignore[override]
        return Combiner("sum", self.alpha, self.beta)

    def plans(self, model: Model, prompts: Sequence[Prompt], new_tokens: int) -> list[Plan]:
        for prompt in prompts:
            decoding.image_tokens(prompt)
        return [Plan(second=self.masked(prompt)) for prompt in prompts]
