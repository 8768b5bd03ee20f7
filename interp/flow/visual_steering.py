"""Visual steering: states or attention pushed towards the picture while decoding.

Paper     arXiv:2502.03628 (VISTA), 2510.22067 (GIFT), 2501.12206 (PAINT)
Question  Is the picture lost on the way, and does more of it stop hallucination?
Measure   the steering direction per layer, the gaze-shift map, local and summary tokens; rank of
          genuine, hallucinated and never-said words through layers
Cause     states are turned towards what the picture added (VISTA), attention is raised on tokens
          that the question made the model look at (GIFT) or that the vision tower looks at (PAINT);
          norm-matched random directions, random sets and shuffled maps are the controls
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Optional, SupportsFloat, SupportsIndex, Union

import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from interp.causal import decoding
from interp.causal.decoding import Combiner, Method, Plan
from interp.core import NumericalError, Prompt, PromptError
from interp.core.intervention import Intervention, edit
from interp.core.prompt import Where
from interp.models.model import Model
from interp.models.stepping import Stepping, unembed

# -- VISTA ----------------------------------------------------------------------------------------


def steering_vectors(
    model: Model, prompts: Sequence[Prompt], blank: Optional[Sequence[Prompt]] = None
) -> Float[Tensor, "prompt layer d_model"]:
    """What the picture adds to the last prompt token after every block.

    The residual stream of the prompt minus that of the same prompt without its picture (`blank`,
    or the prompt with its image tokens taken out).

    Source: arXiv:2502.03628, the visual steering vector. Its code runs a principal component
    analysis on this one vector, which adds an arbitrary direction; that is left out.
    """
    others = [decoding.without_pictures(p) for p in prompts] if blank is None else list(blank)
    if len(others) != len(prompts):
        raise PromptError(f"{len(others)} prompts without pictures for {len(prompts)} with them.")
    ends = []
    for some in (prompts, others):
        steps = model.stepping(some, read="resid_post", batch_size=32)
        ends.append(torch.stack([torch.stack([
            steps.read(i, f"resid_post.{layer}")[-1] for layer in range(model.n_layers)])
            for i in range(len(some))]))
    return ends[0] - ends[1]


@dataclass(frozen=True, eq=False)
class VISTA(Method):
    """Steer every MLP output towards what the picture added, and hear earlier layers too.

    `strength` (lambda) 0.17 for descriptions and 0.01 for yes-no questions of LLaVA; `alpha` 0.3 is
    the weight of layers 25 to 30 (of 32) in the logits; 0 of either leaves that half out. These
    layers' states go to the vocabulary head without the final norm, as in the released code. With
    a `seed`, random directions of the same norm stand for the vectors: the control.

    Source: arXiv:2502.03628.
    """

    strength: SupportsFloat = 0.17
    alpha: SupportsFloat = 0.3
    layers: Sequence[SupportsIndex] = tuple(range(25, 31))
    seed: Optional[int] = None
    name = "VISTA"

    @property
    def combine(self) -> Combiner:  # type: ignore[override]
        return Combiner("mix", self.alpha)

    def plans(self, model: Model, prompts: Sequence[Prompt], new_tokens: int) -> list[Plan]:
        if not float(self.strength):
            return [Plan() for _ in prompts]
        vectors = steering_vectors(model, prompts)
        plans = []
        for number, v in enumerate(vectors):
            if self.seed is not None:
                rng = np.random.default_rng([self.seed, number])
                v = torch.tensor(rng.standard_normal(v.shape), dtype=v.dtype)
            unit = v / v.norm(dim=-1, keepdim=True).clamp_min(1e-12)
            write = edit("mlp_out", "steer", float(self.strength) * unit[:, None])
            plans.append(Plan(write=(write,), found={"vector": v}))
        return plans

    def _early(self, model: Model) -> tuple[int, ...]:
        return decoding.at_depth(self.layers, model.n_layers)

    def reads(self, model: Model) -> tuple[str, ...]:
        if not float(self.alpha):
            return ()
        return tuple(f"resid_post.{layer}" for layer in self._early(model))

    def provide(
        self, model: Model, steps: Stepping, stream: int, plan: Plan
    ) -> Optional[Float[Tensor, "vocab"]]:
        if not float(self.alpha):
            return None
        return self_logits([steps.read(stream, site)[-1] for site in self.reads(model)], model)


def self_logits(states: Sequence[Float[Tensor, "d_model"]], model: Model) -> Float[Tensor, "vocab"]:
    """The mean of the vocabulary head over states of several layers, without the final norm."""
    return unembed(model, torch.stack(list(states))).mean(0)


# -- GIFT -----------------------------------------------------------------------------------------

CONTENT_WORDS = frozenset("""
    a an the is are was were be been being am do does did has have had will would can could should may
    might must there here it its this that these those of in on at to for from by with as and or not
    no yes if then than so what which who whom whose where when why how any some please answer word one
    """.split())
"""English words without content of their own, for models without a part-of-speech tagger: all
others count as nouns, verbs, adjectives, adverbs or numbers."""


def is_content_word(token: str) -> bool:
    """Whether a printed token is a word that says something by itself.

    Example:
        >>> [word for word in "is there a red circle ?".split() if is_content_word(word)]
        ['red', 'circle']
    """
    word = token.strip(" ▁Ġ\n").lower()
    return any(c.isalnum() for c in word) and word not in CONTENT_WORDS


def gaze_shift(
    rows: Union[Float[Tensor, "head query token"], Float[np.ndarray, "head query token"]],
    content: Optional[Sequence[Any]] = None,
    head_share: SupportsFloat = 0.5,
) -> Float[Tensor, "token"]:
    """Where attention on the picture grows from one question token to the next, 0 to 1.

    Example:
        >>> rows = torch.zeros(1, 3, 4)
        >>> rows[:, :, 0] = 0.5                     # a constant sink: no shift
        >>> rows[:, 2, 2] = 0.3
        >>> gaze_shift(rows)
        tensor([0., 0., 1., 0.])

    Args:
        rows: attention of consecutive question tokens, the first one only to subtract.
        content: which of the later tokens count; all for None.
        head_share: the share of heads, by summed shift, that are averaged.

    Source: arXiv:2510.22067, released code: growth only, clipped at three standard deviations,
    scaled from 0 to 1. All zero where nothing grows.
    """
    values = torch.as_tensor(rows).double()
    if values.ndim != 3 or values.shape[1] < 2:
        raise PromptError("a gaze shift needs rows of at least two consecutive question tokens.")
    if not bool(torch.isfinite(values).all()):
        raise NumericalError("attention rows hold NaN or infinity.")
    grown = (values[:, 1:] - values[:, :-1]).clamp_min(0)
    if content is not None:
        chosen = torch.as_tensor(np.asarray(content, dtype=bool))
        if len(chosen) != grown.shape[1]:
            raise PromptError(f"{len(chosen)} marks for {grown.shape[1]} question tokens.")
        grown = grown[:, chosen] if bool(chosen.any()) else grown
    heads = max(1, round(float(head_share) * len(grown)))
    best = grown.sum((1, 2)).sort(descending=True, stable=True).indices[:heads]
    pooled = grown[best].mean((0, 1))
    middle, spread = pooled.mean(), pooled.std(correction=0)
    pooled = pooled.clamp(middle - 3 * spread, middle + 3 * spread)
    low, high = pooled.min(), pooled.max()
    made = (pooled - low) / (high - low) if high > low else torch.zeros_like(pooled)
    return made.float()


@dataclass(frozen=True, eq=False)
class GIFT(Method):
    """Attention on image tokens is multiplied by exp(alpha times the gaze shift), row by row.

    The shift is read at layer 11 and acts at layers 12 to 22 (of 32), in the row that predicts;
    the question's attention is multiplied by `query_scale`, or, for None, by the mean factor of
    the image tokens (the paper's formula is not known). Multiplying and renormalizing is adding the
    logarithm before the softmax, which is done here; a learned sink logit is then part of the row.
    With a `seed`, the map is shuffled over the image tokens: the control.

    Source: arXiv:2510.22067, alpha 5.
    """

    alpha: SupportsFloat = 5.0
    layer: SupportsIndex = 11
    layers: Sequence[SupportsIndex] = tuple(range(12, 23))
    query_scale: Optional[SupportsFloat] = None
    question: Where = "question"
    seed: Optional[int] = None
    name = "GIFT"

    def plans(self, model: Model, prompts: Sequence[Prompt], new_tokens: int) -> list[Plan]:
        (read,) = decoding.at_depth([self.layer], model.n_layers)
        acts = decoding.at_depth(self.layers, model.n_layers)
        asked, rows = [], []
        for prompt in prompts:
            decoding.image_tokens(prompt)
            places = prompt.positions(self.question)
            asked.append(places)
            rows.append(sorted(places))
        maps = decoding.last_row_attention(model, prompts, rows, layers=[read])
        plans = []
        for number, (prompt, places, row, attention) in enumerate(zip(prompts, asked, rows, maps)):
            words = prompt.tokens or [""] * len(prompt)
            content = [is_content_word(words[p]) for p in row[1:]]
            shift = gaze_shift(attention[0], content if any(content) else None)
            if self.seed is not None:
                rng = np.random.default_rng([self.seed, number])
                shift = shift[torch.tensor(rng.permutation(len(shift)))]
            factor = (float(self.alpha) * shift).exp()
            scale = float(factor.mean()) if self.query_scale is None else float(self.query_scale)
            added = np.zeros(len(prompt) + new_tokens)
            added[list(places)] = np.log(max(scale, 1e-30))
            added[list(decoding.image_tokens(prompt))] = factor.log().numpy()
            plans.append(Plan(
                write=tuple(edit(f"scores.{layer}", "add", added, phase="last") for layer in acts),
                found={"map": shift, "layer": read, "layers": acts}))
        return plans


# -- PAINT ----------------------------------------------------------------------------------------


def local_and_summary(
    first: Union[Float[Tensor, "head token"], Float[np.ndarray, "head token"]],
    late: Union[Float[Tensor, "head token"], Float[np.ndarray, "head token"]],
    share: SupportsFloat = 0.25,
) -> tuple[Bool[Tensor, "token"], Bool[Tensor, "token"]]:
    """Tokens that the tower's class token attends to in its first and in its last block but one.

    Local: the top `share` in the first block, without the summary tokens. Summary: as many of the
    top in the late block as lie above the third quartile by 1.5 times the interquartile range.

    Example:
        >>> first, late = torch.linspace(0, 1, 8)[None], torch.tensor([[9.0] + [1.0] * 7])
        >>> [mask.nonzero()[:, 0].tolist() for mask in local_and_summary(first, late)]
        [[6, 7], [0]]

    Source: arXiv:2501.12206, released code.
    """
    early, deep = torch.as_tensor(first).float().sum(0), torch.as_tensor(late).float().sum(0)
    low, high = torch.quantile(deep, torch.tensor([0.25, 0.75]))
    count = int((deep > high + 1.5 * (high - low)).sum())
    summary = torch.zeros(len(deep), dtype=torch.bool)
    summary[deep.sort(descending=True, stable=True).indices[:count]] = True
    local = torch.zeros(len(early), dtype=torch.bool)
    local[early.sort(descending=True, stable=True).indices[: round(float(share) * len(early))]] = True
    return local & ~summary, summary


@dataclass(frozen=True, eq=False)
class PAINT(Method):
    """Attention logits of local and summary image tokens grow by a share of their size.

    In the row that predicts, before the softmax: s + alpha |s| for local tokens (0.7), s + beta |s|
    for summary tokens (0.3), in `layers` of 32 (all for None: the released code's choice is free);
    very negative logits grow most. With a `seed`, random image tokens stand for both: the control.

    Raises `ModelRefused` for vision towers without a class token.

    Source: arXiv:2501.12206, released code, without its optional guidance.
    """

    alpha: SupportsFloat = 0.7
    beta: SupportsFloat = 0.3
    layers: Optional[Sequence[SupportsIndex]] = None
    seed: Optional[int] = None
    name = "PAINT"

    def plans(self, model: Model, prompts: Sequence[Prompt], new_tokens: int) -> list[Plan]:
        acts = (tuple(range(model.n_layers)) if self.layers is None
                else decoding.at_depth(self.layers, model.n_layers))
        plans = []
        for number, prompt in enumerate(prompts):
            image = np.array(decoding.image_tokens(prompt))
            rows = decoding.class_rows(model, prompt)
            local, summary = local_and_summary(rows[0], rows[max(0, len(rows) - 2)])
            if self.seed is not None:
                rng = np.random.default_rng([self.seed, number])
                order = torch.tensor(rng.permutation(len(image)))
                local, summary = local[order], summary[order]
            added = np.zeros(len(prompt) + new_tokens)
            added[image[local.numpy()]] = float(self.alpha)
            added[image[summary.numpy()]] = float(self.beta)
            write: tuple[Intervention, ...] = tuple(
                edit(f"scores.{layer}", "amplify", added, phase="last") for layer in acts)
            plans.append(Plan(write=write, found={
                "local": image[local.numpy()], "summary": image[summary.numpy()], "layers": acts}))
        return plans
