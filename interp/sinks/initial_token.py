"""The initial token as a dial (ZeroTuning): scale the attention on it, nothing else.

Paper     arXiv:2505.11739
Question  How much of the answer depends on how much attention the first token takes?
Measure   accuracy, share of valid answers and output entropy against the factor gamma
Cause     multiply the attention on the first token by gamma (`interp.reweigh`); other positions,
          scaled in the same way, are the control
"""

from collections.abc import Callable, Iterable, Sequence
from typing import Optional, SupportsFloat, SupportsIndex, Union

import numpy as np
import torch
import xarray as xr
from jaxtyping import Float
from matplotlib.axes import Axes
from torch import Tensor

from interp.core import Prompt, Result, reweigh
from interp.core.errors import OutOfRange, PromptError
from interp.core.head import HeadLike
from interp.core.intervention import Phase, Reweigh
from interp.figures.style import color
from interp.models.model import Model
from interp.stream.reducers import Received

GAMMAS = (0.1, 0.3, 0.6, 1.0, 1.5, 2.0, 3.0, 5.0)
"""Factors to try; 1 changes nothing."""


def rescale(
    attention: Float[Tensor | np.ndarray, "*batch query key"],
    gamma: SupportsFloat,
    position: SupportsIndex = 0,
) -> Float[Tensor, "*batch query key"]:
    """Rows with the attention on one key multiplied by gamma, and renormalized.

    Example:
        >>> rescale(torch.tensor([[0.5, 0.3, 0.2]]), 3.0)
        tensor([[0.7500, 0.1500, 0.1000]])

    Equal to adding ln(gamma) to the key's logit. Ratios among the other keys stay; their
    differences shrink by |gamma - 1| a_0 / D. Row sums stay, also below one (learned sinks).

    Source: arXiv:2505.11739: D = (gamma - 1) a_0 + 1; a_0' = gamma a_0 / D; a_i' = a_i / D.
    """
    rows, factor, place = torch.as_tensor(attention), float(gamma), int(position)
    if factor < 0 or not np.isfinite(factor):
        raise ValueError(f"gamma must be a number from 0 on, not {factor}.")
    if not -rows.shape[-1] <= place < rows.shape[-1]:
        raise OutOfRange(f"position {place} does not exist among {rows.shape[-1]} keys.")
    total = rows.sum(-1, keepdim=True)
    share = rows[..., place, None] / total.clamp_min(1e-37)
    scale = ((factor - 1) * share + 1).clamp_min(1e-37).reciprocal().expand(rows.shape).clone()
    scale[..., place] *= factor
    # A row with nothing elsewhere has nowhere to put what it loses.
    return torch.where(share < 1, rows * scale, rows)


def tune(
    gamma: SupportsFloat,
    *,
    layers: Optional[Iterable[int]] = None,
    heads: Union[HeadLike, Iterable[HeadLike], None] = None,
    position: SupportsIndex = 0,
    phase: Phase = "all",
) -> Reweigh:
    """The intervention: scale attention to the first token by gamma, in chosen layers or heads.

    Example:
        >>> tune(2.0, layers=[1, 2]).factor
        2.0

    Composes: gamma 2, then gamma 3, is gamma 6. `position` is for controls. Prompts are never
    padded here, so position 0 is the first token.
    """
    return reweigh([int(position)], float(gamma), layers=layers, heads=heads, phase=phase)


def entropy(logits: Float[Tensor, "*batch d_vocab"]) -> Float[Tensor, "*batch"]:
    """Entropy of the next token, in nats.

    Example:
        >>> round(float(entropy(torch.zeros(4))), 4)
        1.3863
    """
    log_p = logits.float().log_softmax(-1)
    return -(log_p.exp() * log_p).sum(-1)


def sweep(
    model: Model,
    prompts: Sequence[Prompt],
    answers: Sequence[Sequence[SupportsIndex]],
    writes: Sequence[Union[Reweigh, Sequence[Reweigh]]],
    *,
    valid: Optional[Callable[[int, int], bool]] = None,
    batch_size: int = 8,
) -> Result:
    """Accuracy, share of valid answers and entropy under each of several interventions.

    Example:
        >>> import interp
        >>> model = interp.open_model("backcopy-1l")
        >>> prompts = [Prompt.from_tokens(range(3, 12))]
        >>> found = sweep(model, prompts, [[5]], [tune(gamma) for gamma in (0.5, 1.0)])
        >>> found["correct"].dims, found["entropy"].dims
        (('step', 'prompt'), ('step', 'prompt'))

    Args:
        answers: token ids; an answer is correct if greedy decoding gives it, token by token.
        writes: one entry per step of the sweep.
        valid: (number of the prompt, first token said) -> whether that begins an answer at all;
            every token does for None. A gain in accuracy may only be a gain in valid answers, so
            report both, and the accuracy among the valid.

    Returns:
        `correct`, `valid` (0 or 1), `log_prob` (mean per answer token, nats), `entropy` (of the
        first answer token, nats) [step, prompt].
    """
    if not prompts or len(prompts) != len(answers):
        raise PromptError(f"{len(answers)} answers for {len(prompts)} prompts: give one for each.")
    wanted = [[int(token) for token in answer] for answer in answers]
    if not all(wanted):
        raise PromptError("an answer is empty: give its token ids.")
    names = ("correct", "valid", "log_prob", "entropy")
    values = {name: np.zeros((len(writes), len(prompts))) for name in names}
    groups: dict[int, list[int]] = {}
    for number, answer in enumerate(wanted):
        groups.setdefault(len(answer), []).append(number)
    for step, write in enumerate(writes):
        for length, numbers in groups.items():
            run = model.run(
                [prompts[i] for i in numbers], write=write, logits="last", batch_size=batch_size,
                # The last token of an answer decides nothing: it need not be fed.
                new_tokens=[wanted[i][:-1] for i in numbers],
            )
            for i, logits in zip(numbers, run.logits):
                rows = logits[-length:].float()
                said, log_p = rows.argmax(-1).tolist(), rows.log_softmax(-1)
                found = (
                    said == wanted[i], valid is None or valid(i, said[0]),
                    log_p[range(length), wanted[i]].mean(), entropy(rows[0]),
                )
                for name, value in zip(names, found):
                    values[name][step, i] = float(value)
    data = xr.Dataset({name: (("step", "prompt"), value) for name, value in values.items()})
    for name in ("log_prob", "entropy"):
        data[name].attrs["units"] = "nats"
    return Result(data, {**model.manifest(), "measure": "initial_token", "n_prompts": len(prompts)})


def mass(
    model: Model, prompts: Sequence[Prompt], batch_size: int = 8
) -> Float[np.ndarray, "layer head"]:
    """Mean attention on the first token, per head: without any, gamma does nothing."""
    run = model.run(list(prompts), stats=[Received()], logits="none", batch_size=batch_size)
    return run.stats["received"].isel(key=0).mean("prompt").values


def groups(n_layers: SupportsIndex) -> dict[str, tuple[int, ...]]:
    """Shallow, middle and deep layers, in the paper's proportions (1-10, 11-21, 22-31 of 32).

    Example:
        >>> {name: (one[0], one[-1]) for name, one in groups(32).items()}
        {'shallow': (0, 10), 'middle': (11, 21), 'deep': (22, 31)}
        >>> groups(2)
        {'shallow': (0,), 'deep': (1,)}
    """
    n = int(n_layers)
    edges = [0, round(n * 11 / 32), round(n * 22 / 32), n]
    names = ("shallow", "middle", "deep")
    found = {name: tuple(range(a, b)) for name, a, b in zip(names, edges, edges[1:])}
    return {name: layers for name, layers in found.items() if layers}


def draw(found: Result, gammas: Sequence[SupportsFloat], ax: Axes) -> Axes:
    """Accuracy and entropy against gamma, on two axes."""
    at = [float(g) for g in gammas]
    ax.plot(at, found["correct"].mean("prompt"), marker="o", color=color("primary"),
            label="accuracy")
    ax.plot(at, found["valid"].mean("prompt"), marker=".", linestyle=":", color=color("control"),
            label="valid answers")
    ax.axvline(1.0, color=color("control"), linewidth=0.6)
    ax.set_xscale("log")
    shown = [g for g in at if g in (0.1, 0.3, 1.0, 3.0, 10.0, at[-1])]
    ax.set_xticks(shown, [f"{g:g}" for g in shown])
    ax.minorticks_off()
    ax.set_xlabel("gamma (factor on the first token)")
    ax.set_ylabel("share of prompts")
    ax.set_ylim(-0.03, 1.05)
    twin = ax.twinx()
    twin.plot(at, found["entropy"].mean("prompt"), marker="s", color=color("secondary"),
              label="output entropy")
    twin.set_ylabel("entropy (nats)", color=color("secondary"))
    twin.set_ylim(0, 1.15 * float(found["entropy"].mean("prompt").max()) or 1.0)
    twin.spines["right"].set_visible(True)
    lines = [*ax.get_lines()[:2], *twin.get_lines()]
    ax.legend(lines, [str(line.get_label()) for line in lines], loc="best")
    return ax
