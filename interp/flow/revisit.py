"""ReVisiT: every word grounded in the image token whose vocabulary reading is closest to it.

Paper     arXiv:2506.09522
Question  Do image tokens, read by the vocabulary head, say what the next word is about?
Measure   the image token whose reading has the least divergence from the next word's distribution
Cause     its log probabilities are added; a random image token is the control
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Optional, SupportsFloat, Union

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from interp.causal import decoding
from interp.causal.decoding import Combiner, Method, Plan
from interp.core import Prompt
from interp.models.model import Model
from interp.models.stepping import Stepping, unembed

Readings = Union[Float[Tensor, "token vocab"], Float[np.ndarray, "token vocab"]]
Step = Union[Float[Tensor, "vocab"], Float[np.ndarray, "vocab"]]


def divergence(step: Step, readings: Readings, released: bool = False) -> Float[Tensor, "token"]:
    """Jensen-Shannon divergence of every reading from the step's distribution, from logits.

    Example:
        >>> step = torch.tensor([2.0, 0.0])
        >>> same, opposite = divergence(step, torch.stack([step, -step]))
        >>> abs(float(same)) < 1e-6, round(float(opposite), 4)
        (True, 0.3278)

    With `released`, the number by which the paper's code (and transformers' DoLa) ranks: each
    Kullback-Leibler term taken from the mixture, and averaged over the vocabulary.
    """
    p = torch.as_tensor(step).float().log_softmax(-1)
    q = torch.as_tensor(readings).float().log_softmax(-1)
    m = (torch.logaddexp(p, q) - np.log(2.0))
    if released:
        return 0.5 * ((m.exp() * (m - p)).mean(-1) + (m.exp() * (m - q)).mean(-1))
    return 0.5 * ((p.exp() * (p - m)).sum(-1) + (q.exp() * (q - m)).sum(-1))


@dataclass(frozen=True, eq=False)
class ReVisiT(Method):
    """Add the log probabilities of the image token whose reading is closest to the step's.

    Read from the logits of the image tokens themselves ("last", as for LLaVA-1.5) or, without the
    final norm, from their states in all even layers ("even", as for Qwen2.5-VL), on tokens with at
    least `beta` of the most probable one's probability. With a `seed`, a random image token is
    taken in every step: the control.

    Source: arXiv:2506.09522; `released` ranks as its code does.
    """

    layers: str = "last"
    beta: SupportsFloat = 1e-5
    released: bool = False
    seed: Optional[int] = None
    name = "ReVisiT"

    @property
    def combine(self) -> Combiner:  # type: ignore[override]
        return Combiner("sum", 1.0, self.beta)

    def plans(self, model: Model, prompts: Sequence[Prompt], new_tokens: int) -> list[Plan]:
        if self.layers not in ("last", "even"):
            raise ValueError(f"layers are 'last' or 'even', not {self.layers!r}.")
        image = [list(decoding.image_tokens(prompt)) for prompt in prompts]
        if self.layers == "last":
            run = model.run(prompts, batch_size=32)
            states = [rows[places] for rows, places in zip(run.logits, image)]
        else:
            even = range(0, model.n_layers, 2)
            steps = model.stepping(prompts, read=[f"resid_post.{n}" for n in even], batch_size=32)
            states = [torch.cat([steps.read(i, f"resid_post.{n}")[places] for n in even])
                      for i, places in enumerate(image)]
        return [Plan(found={"states": rows, "image": places, "chosen": [],
                            "rng": np.random.default_rng([self.seed or 0, number])})
                for number, (rows, places) in enumerate(zip(states, image))]

    def provide(
        self, model: Model, steps: Stepping, stream: int, plan: Plan
    ) -> Optional[Float[Tensor, "vocab"]]:
        own = steps.logits[stream]
        tokens = decoding.plausible(own, self.beta).nonzero()[:, 0]
        states: Any = plan.found["states"]
        read = (states[:, tokens] if self.layers == "last"
                else unembed(model, states, tokens.tolist()))
        if self.seed is None:
            best = int(divergence(own[tokens], read, self.released).argmin())
        else:
            best = int(plan.found["rng"].integers(len(read)))
        plan.found["chosen"].append(plan.found["image"][best % len(plan.found["image"])])
        # The model's own logits outside the plausible tokens are cut by the combiner.
        second = torch.full_like(own, float("-inf"))
        second[tokens] = read[best].log_softmax(-1)
        return second
