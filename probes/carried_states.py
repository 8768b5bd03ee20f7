"""States of one text carried into the prompt of another: what does the model say after them?

Paper     arXiv:2311.04897 (Future Lens)
Question  Does a model go on from a foreign state as it does from its own context?
Measure   the likeliest tokens after a hand-written or learned prompt whose last position holds the
          state of another text in one layer, decoded freely or with given tokens fed in between
Cause     the state replaced by none, by another context's, or by the mean one
"""

from collections.abc import Sequence
from typing import Any, Literal, Optional, SupportsIndex

import numpy as np
import torch
from jaxtyping import Float, Int
from sklearn.base import BaseEstimator
from sklearn.utils.validation import check_is_fitted
from torch import Tensor

from interp.models.futures import Readout, carried_logits
from interp.models.model import Model
from probes.lookahead import MOST, divergence, top_tokens

ARMS = ("state", "none", "shuffled", "mean")
Arm = Literal["state", "none", "shuffled", "mean"]


class FuturePrompt(BaseEstimator):
    """A prompt whose last position carries a state of another text, and what the model says after it.

    Args:
        layer: where the state comes from, and where it is put (-1 is the embedding).
        ahead: the N whose Kullback-Leibler divergence is minimized.
        steps: of AdamW; 0 keeps the prompt as it is given (the hand-written prompts of the paper).
        batch_size, lr, weight_decay, seed: of the training. `lr` is relative to the root mean square
            of what enters block 0; the released one is 5e-4, absolute, for a whole epoch.

    Training feeds the model's own tokens in between, as the released code does: a gradient cannot
    pass a choice of token. Reading can do without (`tokens=None`): then the prompt decodes freely.

    Source: arXiv:2311.04897, fixed and learned prompt interventions.
    """

    def __init__(
        self, layer: Any = 0, ahead: Any = (0, 1, 2, 3), steps: Any = 300, batch_size: Any = 32,
        lr: Any = 0.05, weight_decay: Any = 1e-5, seed: Any = 0,
    ) -> None:
        self.layer, self.ahead, self.steps, self.batch_size = layer, ahead, steps, batch_size
        self.lr, self.weight_decay, self.seed = lr, weight_decay, seed

    def fit(
        self,
        model: Model,
        start: Float[Tensor, "prefix d_model"],
        states: Float[Tensor, "sample d_model"],
        tokens: Int[Tensor, "sample fed"],
        later: Float[Tensor, "sample step d_model"],
    ) -> "FuturePrompt":
        """Learn `prefix_` from `start` (what enters block 0), and `losses_` by step.

        Raises:
            ValueError: fewer tokens per sample than the largest N needs.
        """
        last = max(self.ahead, default=0)
        if tokens.shape[1] < last or later.shape[1] <= last or len(states) != len(tokens):
            raise ValueError(
                f"{tokens.shape[1]} tokens and {later.shape[1]} states after each of {len(states)} "
                f"places cannot train a prompt for N = {last}: give {last} and {last + 1}."
            )
        self.prefix_, self.mean_, self.losses_ = start.clone(), states.mean(0), []
        prefix = start.clone().requires_grad_()
        optimizer = torch.optim.AdamW([prefix], weight_decay=float(self.weight_decay),
                                      lr=float(self.lr) * float(start.square().mean().sqrt()))
        readout, generator = Readout(model), torch.Generator().manual_seed(int(self.seed))
        order: list[int] = []
        steps = int(self.steps)
        for step in range(steps):
            if len(order) < min(int(self.batch_size), len(states)):
                order = torch.randperm(len(states), generator=generator).tolist()
            rows, order = order[: int(self.batch_size)], order[int(self.batch_size):]
            for group in optimizer.param_groups:
                # Down to nothing along a half cosine: the last steps settle.
                group["lr"] = 0.5 * (1 + np.cos(np.pi * step / steps)) * float(self.lr) * float(
                    start.square().mean().sqrt())
            logits = carried_logits(model, prefix, states[rows], self.layer, tokens[rows, :last])
            with torch.no_grad():
                teacher = readout(later[rows][:, list(self.ahead)].to(logits.device))
            loss = divergence(logits[:, list(self.ahead)], teacher)
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_([prefix], 1.0)
            optimizer.step()
            self.losses_.append(float(loss.detach()))
        self.prefix_ = prefix.detach()
        return self

    def predict_top(
        self,
        model: Model,
        states: Float[Tensor, "sample d_model"],
        steps: SupportsIndex = 4,
        *,
        tokens: Optional[Int[Tensor, "sample fed"]] = None,
        arm: Arm = "state",
        most: SupportsIndex = MOST,
    ) -> Int[Tensor, "sample step rank"]:
        """The likeliest tokens for N = 0 to `steps` - 1 after carrying each state.

        Args:
            tokens: fed in between (teacher-forced); None feeds what is read itself (free-running).
            arm: the state itself; "none": the prompt's own; "shuffled": that of another sample (a
                cyclic shift in a random order, so never its own); "mean": the training mean.
        """
        return self._read(model, states, int(steps), tokens, arm, int(most))[0]

    def predict(
        self, model: Model, states: Float[Tensor, "sample d_model"], steps: SupportsIndex = 4
    ) -> tuple[Int[Tensor, "sample step"], Float[Tensor, "sample step"]]:
        """The free-running continuation of each state, and the probability of each of its tokens."""
        top, probability = self._read(model, states, int(steps), None, "state", 1)
        return top[..., 0], probability

    def _read(
        self, model: Model, states: Tensor, steps: int, tokens: Optional[Tensor], arm: Arm, most: int
    ) -> tuple[Tensor, Tensor]:
        check_is_fitted(self, "prefix_")
        given = carried(states, arm, self.mean_, int(self.seed))
        count = len(states)
        if tokens is None and arm in ("none", "mean"):
            # All samples are the same one.
            given, count = None if given is None else given[:1], 1
        made = []
        for rows in torch.arange(count).split(4 * int(self.batch_size)):
            forced = None if tokens is None else tokens[rows, : steps - 1]
            made.append(self._decode(model, None if given is None else given[rows], len(rows),
                                     steps, forced, most))
        top, p = (torch.cat(parts) for parts in zip(*made))
        return top.expand(len(states), -1, -1), p.expand(len(states), -1)

    def _decode(
        self, model: Model, states: Optional[Tensor], count: int, steps: int,
        forced: Optional[Tensor], most: int,
    ) -> tuple[Tensor, Tensor]:
        """Top tokens `[sample, step, rank]` and the probability of the first `[sample, step]`."""
        fed = torch.zeros(count, 0, dtype=torch.long) if forced is None else forced
        tops: list[Tensor] = []
        likely: list[Tensor] = []
        with torch.no_grad():
            for _ in range(steps if forced is None else 1):
                logits = carried_logits(model, self.prefix_, states, self.layer, fed)
                logits = logits[:, -1:] if forced is None else logits
                tops.append(top_tokens(logits, most).cpu())
                likely.append(logits.softmax(-1).amax(-1).cpu())
                fed = torch.cat([fed, tops[-1][:, -1:, 0]], 1)
        return torch.cat(tops, 1), torch.cat(likely, 1)


def carried(
    states: Float[Tensor, "sample d_model"], arm: Arm, mean: Float[Tensor, "d_model"],
    seed: SupportsIndex = 0,
) -> Optional[Float[Tensor, "sample d_model"]]:
    """What a prompt carries in each arm; None leaves its own state.

    Example:
        >>> H = torch.arange(6.0).reshape(3, 2)
        >>> carried(H, "none", H[0]) is None, bool((carried(H, "shuffled", H[0]) != H).all())
        (True, True)
    """
    if arm == "state":
        return states
    if arm == "none":
        return None
    if arm == "mean":
        return mean.expand_as(states)
    if arm != "shuffled":
        raise ValueError(f"a prompt carries one of {', '.join(ARMS)}, not {arm!r}.")
    if len(states) < 2:
        raise ValueError("one sample has no other to take a state from; give at least two.")
    order = torch.randperm(len(states), generator=torch.Generator().manual_seed(int(seed)))
    other = torch.empty_like(order)
    other[order] = order.roll(1)
    return states[other]


def carrier(ids: Sequence[int], length: SupportsIndex) -> list[int]:
    """Ids of a prompt cut, or filled up after its first token with its others, to a length.

    Example:
        >>> carrier([1, 5, 6], 6), carrier([1, 5, 6], 2)
        ([1, 5, 6, 5, 6, 5], [1, 5])
    """
    made = list(ids)
    while len(made) < int(length):
        made.extend(made[1:] if len(made) > 1 else made)
    return made[: int(length)]
