"""Saliency: which input tokens a prediction depends on, and whether attention says the same.

Paper     arXiv:2601.20279 (attention times gradient), arXiv:2005.00928 (blanking a token, gradients),
          arXiv:2509.18010 (agreement of attention with saliency), arXiv:1909.07913 (caution)
Question  Is what a position attends to what its prediction depends on?
Measure   |A dL/dA| in the row that predicts; gradient, gradient times input; rank correlations
Cause     blank a token, or knock it out: `blank_out` and `knockout` are interventions, the rest is not
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, Optional, SupportsFloat, SupportsIndex, Union

import numpy as np
import torch
import xarray as xr
from jaxtyping import Bool, Float
from matplotlib.axes import Axes
from scipy import stats
from torch import Tensor

from interp.causal.removal import Removal
from interp.core import Prompt, PromptError, Result, block
from interp.core.errors import OutOfRange
from interp.core.intervention import each
from interp.figures import heat
from interp.models.head_gradients import head_gradients
from interp.models.input_gradients import input_gradients
from interp.models.model import Model
from interp.stream.chosen_rows import RowWeights
from interp.stream.per_layer import PerLayer

UNDERSTATED_MASS, UNDERSTATED_EFFECT = 0.01, 0.05
OVERSTATED_MASS, OVERSTATED_VALUE, OVERSTATED_EFFECT = 0.30, 0.05, 0.01
ROUNDING = 1e-4
"""A sum this small beside the norm of what is summed is rounding error."""
Scale = Literal["probability", "logit"]


# -- pure -------------------------------------------------------------------------------------------


def score(
    attention: Float[Tensor | np.ndarray, "*row head query key"],
    gradient: Float[Tensor | np.ndarray, "*row head query key"],
) -> Float[Tensor, "*row query key"]:
    """Attention times gradient: |A dL/dA|, mean over heads, every row scaled to length one.

    Example:
        >>> score(torch.tensor([[[0.5, 0.5]]]), torch.tensor([[[3.0, -4.0]]]))
        tensor([[0.6000, 0.8000]], dtype=torch.float64)

    A row without any gradient stays zero. What the mask hides has no attention, hence no saliency.

    Source: arXiv:2601.20279, released code.
    """
    a, g = torch.as_tensor(attention).double(), torch.as_tensor(gradient).double()
    rows = (a * g).abs().mean(-3)
    length = rows.norm(dim=-1, keepdim=True)
    return rows / torch.where(length > 0, length, torch.ones_like(length))


def history_score(
    rows: Float[Tensor | np.ndarray, "layer key"],
    history: Sequence[SupportsIndex],
    layers: Optional[Sequence[SupportsIndex]] = None,
) -> float:
    """The score of a candidate token: mean saliency of the output so far, over some layers.

    Example:
        >>> history_score(torch.tensor([[0.5, 0.75, 0.0], [0.0, 1.0, 0.0]]), [1, 2])
        0.4375

    Args:
        rows: saliency of the row that PREDICTS the candidate. The released code appends the
            candidate and reads its own row, on which the prediction does not depend: its gradient,
            and so every released score, is zero.
        history: positions of earlier output tokens. Without any the score is 1, as released.
        layers: 6, 7 and 8 in the paper; all for None.
    """
    given = torch.as_tensor(rows).double()
    if not len(history):
        return 1.0
    chosen = list(range(len(given))) if layers is None else [int(x) for x in layers]
    return float(given[chosen][:, [int(p) for p in history]].mean())


def correlations(
    relevance: Float[np.ndarray, "*row key"],
    importance: Float[np.ndarray, "key"],
    keep: Optional[Bool[np.ndarray, "key"]] = None,
    method: Literal["spearman", "pearson"] = "spearman",
) -> Float[np.ndarray, "*row"]:
    """Correlation of every row with the importance of the keys, over the keys that are kept.

    Example:
        >>> correlations(np.array([[0.1, 0.2, 0.7], [0.7, 0.2, 0.1]]), np.array([1.0, 2.0, 9.0]))
        array([ 1., -1.])

    Keys of unknown importance are left out. A constant row has the correlation 0, as in the released
    code of arXiv:2005.00928; with fewer than three keys, or constant importance, it is NaN.
    """
    rows, target = np.asarray(relevance, dtype=float), np.asarray(importance, dtype=float)
    known = np.isfinite(target) if keep is None else np.isfinite(target) & np.asarray(keep)
    rows, target = rows[..., known], target[known]
    if known.sum() < 3 or np.ptp(target) == 0:
        return np.full(rows.shape[:-1], np.nan)
    if method == "spearman":
        rows, target = stats.rankdata(_rounded(rows), axis=-1), stats.rankdata(_rounded(target))
    rows, target = rows - rows.mean(-1, keepdims=True), target - target.mean()
    size = np.sqrt((rows**2).sum(-1) * (target**2).sum())
    return np.where(size > 0, (rows * target).sum(-1) / np.where(size > 0, size, 1.0),
                    np.where(np.isnan(size), np.nan, 0.0))


def _rounded(values: np.ndarray) -> np.ndarray:
    """Nine significant digits, so that equal numbers with other rounding errors are ties."""
    size = np.abs(values)
    digits = 10.0 ** np.floor(np.log10(np.where(size > 0, size, 1.0)))
    return np.round(values / digits, 8) * digits


def reliability(
    first: Float[np.ndarray, "key"], second: Float[np.ndarray, "key"],
    keep: Optional[Bool[np.ndarray, "key"]] = None,
) -> float:
    """How much of an importance map is no noise, from two halves of what it was averaged over.

    Example:
        >>> reliability(np.array([1.0, 2.0, 3.0]), np.array([1.0, 2.0, 4.0]))
        1.0

    The rank correlation r of the halves, stepped up to the whole map: 2r / (1 + r) (Spearman and
    Brown); below 0 it is 0. No map can correlate with the whole by more than its square root.
    """
    r = float(correlations(first, second, keep))
    return max(0.0, 2 * r / (1 + r)) if r > -1 else 0.0


def explained(correlation: SupportsFloat, reliable: SupportsFloat) -> float:
    """A correlation over the largest that a map of this reliability allows; NaN where it is noise.

    Example:
        >>> explained(0.4, 0.64)
        0.5
    """
    ceiling = float(reliable) ** 0.5
    return float(correlation) / ceiling if ceiling > 0.1 else float("nan")


def red_flags(
    mass: Float[np.ndarray, "*point"],
    effect: Float[np.ndarray, "*point"],
    value_share: Optional[Float[np.ndarray, "*point"]] = None,
) -> np.ndarray:
    """Where attention on a span must not be taken for its use: "understates", "overstates" or "".

    Example:
        >>> red_flags(np.array([0.004, 0.6, 0.6]), np.array([0.5, 0.0, 0.9]), np.zeros(3)).tolist()
        ['understates', 'overstates', '']

    Args:
        mass: attention on the span. effect: by how much of itself the answer's probability falls
            when the span is knocked out (0.2 for a fifth). value_share: the span's share of the
            norms of what is moved; without it nothing is called overstated.

    "understates": mass below 1 % and an effect above 5 %. "overstates", as of sinks: mass above
    30 %, value share below 5 %, effect within 1 %. These thresholds are this package's own.
    """
    m, e = np.asarray(mass, dtype=float), np.asarray(effect, dtype=float)
    made = np.where((m < UNDERSTATED_MASS) & (e > UNDERSTATED_EFFECT), "understates", "")
    if value_share is not None:
        over = (m > OVERSTATED_MASS) & (np.asarray(value_share, dtype=float) < OVERSTATED_VALUE)
        made = np.where(over & (np.abs(e) < OVERSTATED_EFFECT), "overstates", made)
    return made


# -- what is predicted, and what it depends on --------------------------------------------------------


@dataclass(frozen=True)
class Contrast:
    """A prompt, and the one number by which its outcome is judged.

    With `answers` (a, b) it is p(a) - p(b), or the difference of logits, in the row `query`; with a
    `partner` vector, for encoders without a vocabulary, the cosine of it and the mean last state
    (then all rows count, and `query` is None).
    """

    prompt: Prompt
    answers: Optional[tuple[int, int]] = None
    query: Optional[int] = -1
    partner: Optional[Tensor] = None

    def __post_init__(self) -> None:
        if (self.answers is None) == (self.partner is None):
            raise PromptError("a contrast needs two answers or a partner, one of them.")
        if self.query is not None:
            if not -len(self.prompt) <= self.query < len(self.prompt):
                raise OutOfRange(f"query {self.query} is outside the {len(self.prompt)} positions.")
            object.__setattr__(self, "query", self.query % len(self.prompt))
        elif self.answers is not None:
            raise PromptError("answers are read in one row: give its query.")

    @property
    def rows(self) -> tuple[int, ...]:
        """The positions whose states decide."""
        return tuple(range(len(self.prompt))) if self.query is None else (self.query,)

    def value(
        self, states: Float[Tensor, "position width"], scale: Scale = "probability"
    ) -> Float[Tensor, ""]:
        """The number, from all rows of logits, or of last states."""
        if self.partner is not None:
            own = states.mean(0)
            return torch.cosine_similarity(own, self.partner.to(own), dim=0)
        assert self.answers is not None
        row = states[self.query]
        row = row.softmax(-1) if scale == "probability" else row
        return row[self.answers[0]] - row[self.answers[1]]

    def loss(self, states: Float[Tensor, "position width"]) -> Float[Tensor, ""]:
        """-log p of the first answer, or minus the cosine."""
        if self.answers is None:
            return -self.value(states)
        return -states[self.query].log_softmax(-1)[self.answers[0]]


def outcomes(
    model: Model, given: Sequence[Contrast], writes: Sequence[Any] = (),
    scale: Scale = "probability", batch_size: SupportsIndex = 32,
) -> Float[np.ndarray, "sample"]:
    """The number of each contrast, with interventions on each."""
    prompts = [one.prompt for one in given]
    more: dict[str, Any] = {"write": each(list(writes))} if len(writes) else {}
    if given[0].partner is not None:
        last = f"resid_post.{model.n_layers - 1}"
        read = model.run(prompts, read=last, logits="none", batch_size=int(batch_size), **more)
        states = [torch.tensor(read.reads[last].values[i, 0, : len(p)])
                  for i, p in enumerate(prompts)]
        return np.array([float(one.value(x, scale)) for one, x in zip(given, states)])
    only_last = all(one.query == len(one.prompt) - 1 for one in given)
    run = model.run(prompts, logits="last" if only_last else "all", batch_size=int(batch_size), **more)
    found = []
    for one, rows in zip(given, run.logits):
        of = replace(one, prompt=Prompt((0,)), query=0) if only_last else one
        found.append(float(of.value(rows[-1:] if only_last else rows, scale)))
    return np.array(found)


def blank_out(
    model: Model,
    given: Contrast,
    neutral: Sequence[SupportsIndex],
    *,
    scale: Scale = "probability",
    batch_size: SupportsIndex = 32,
) -> Float[np.ndarray, "draw position"]:
    """|change of the number| when one token is replaced by a neutral one, for each neutral token.

    Example:
        >>> import interp
        >>> model = interp.open_model("backcopy-1l")
        >>> blank_out(model, Contrast(Prompt.from_tokens(range(3, 9)), (5, 6)), [20, 21]).shape
        (2, 6)

    A mask or padding token, or several ordinary ones to average over, whose halves then say how
    reliable the map is. NaN for tokens of images, which are no words.

    Source: arXiv:2005.00928, |d(x) - d(x with token j := mask)|.
    """
    tokens = [int(t) for t in neutral]
    if not tokens:
        raise PromptError("no neutral token: give at least one to put in the place of a token.")
    pictures = {p for segment in given.prompt.of_kind("image") for p in segment.positions}
    places = [p for p in range(len(given.prompt)) if p not in pictures]
    changed = []
    for token in tokens:
        for place in places:
            ids = (*given.prompt.ids[:place], token, *given.prompt.ids[place + 1 :])
            changed.append(replace(given, prompt=replace(given.prompt, ids=ids)))
    found = outcomes(model, [given, *changed], scale=scale, batch_size=batch_size)
    made = np.full((len(tokens), len(given.prompt)), np.nan)
    made[:, places] = np.abs(found[1:] - found[0]).reshape(len(tokens), len(places))
    return made


def knockout(
    model: Model,
    given: Contrast,
    *,
    scale: Scale = "probability",
    batch_size: SupportsIndex = 32,
) -> Float[np.ndarray, "position"]:
    """|change of the number| when no other position can see a token, in any layer.

    Example:
        >>> import interp
        >>> model = interp.open_model("backcopy-1l")
        >>> knockout(model, Contrast(Prompt.from_tokens(range(3, 9)), (5, 6))).shape
        (6,)

    The same as leaving the token out while the others keep their position ids. NaN for the row that
    predicts: without it there is no prediction.

    Source: arXiv:2304.14767 with one key and all layers.
    """
    n = len(given.prompt)
    places = [p for p in range(n) if p != given.query]
    made = np.full(n, np.nan)
    if model.kind == "decoder" and given.query == n - 1:
        removal = Removal(model, given.prompt, places, "drop_keep_ids")
        rows = removal.logits(0, [places, *([q for q in places if q != p] for p in places)],
                              batch_size=int(batch_size))
        one = replace(given, prompt=Prompt((0,)), query=0)
        found = np.array([float(one.value(row[None], scale)) for row in rows])
    else:
        writes: list[object] = [[], *([block([q for q in range(n) if q != p], [p])] for p in places)]
        found = outcomes(model, [given] * len(writes), writes, scale, batch_size)
    made[places] = np.abs(found[1:] - found[0])
    return made


def gradients(
    model: Model, given: Contrast, kind: str = "gradient_input", *, layer: SupportsIndex = 0,
    scale: Scale = "probability",
) -> Float[np.ndarray, "position"]:
    """Gradient of the number by what enters a block: "gradient", "gradient_input" or "norm".

    Example:
        >>> import interp
        >>> model = interp.open_model("backcopy-1l")
        >>> gradients(model, Contrast(Prompt.from_tokens(range(3, 9)), (5, 6))).shape
        (6,)

    "gradient" is NaN where it is zero for every input: a model that reads the block's input through
    LayerNorm alone (GPT-2) does not feel a shift of all coordinates, and their gradients sum to zero.

    Source: arXiv:2005.00928, |sum_d dd/de_j| and |sum_d e_j dd/de_j|.
    """
    found = input_gradients(model, given.prompt, lambda x: given.value(x, scale), layer=layer)
    sizes = found.by_position(kind).double().numpy()
    if kind == "gradient" and sizes.max() < ROUNDING * float(found.by_position("norm").max()):
        return np.full(len(sizes), np.nan)
    return sizes


def measure(model: Model, given: Union[Contrast, Sequence[Contrast]]) -> Result:
    """Attention of the rows that predict, and its product with the gradient of the loss by it.

    Example:
        >>> import interp
        >>> model = interp.open_model("backcopy-3l")
        >>> found = measure(model, Contrast(Prompt.from_tokens(range(3, 9)), (5, 6)))
        >>> found["product"].dims, found["saliency"].dims
        (('prompt', 'layer', 'head', 'key'), ('prompt', 'layer', 'key'))

    Returns:
        `attention` and `product` |A dL/dA|, averaged over the rows where all of them decide;
        `saliency`, the product's mean over heads, scaled to length one. NaN behind shorter prompts.

    Only the rows that predict are kept: one row per layer and head, no matrix, for decoders.
    """
    items = [given] if isinstance(given, Contrast) else list(given)
    if not items:
        raise PromptError("nothing to measure: give at least one contrast.")
    longest = max(len(one.prompt) for one in items)
    shape = (len(items), model.n_layers, model.n_heads, longest)
    attention, product = np.full(shape, np.nan), np.full(shape, np.nan)
    saliency = np.full((shape[0], shape[1], longest), np.nan)
    for number, one in enumerate(items):
        n, rows = len(one.prompt), list(one.rows)
        read = model.run(one.prompt, logits="none", stats=PerLayer(
            "segments", lambda _, __, rows=rows: RowWeights(rows))).stats["segments"]
        weights = torch.as_tensor(read.values[0][..., :n]).double()
        grown = head_gradients(model, one.prompt, one.loss)
        group = model.n_heads // grown.v.shape[2]
        for layer in range(model.n_layers):
            v = grown.v[layer].repeat_interleave(group, 1).double()
            slope = torch.einsum("qhd,khd->hqk", grown.z[layer][rows].double(), v)
            attention[number, layer, :, :n] = weights[layer].mean(1)
            product[number, layer, :, :n] = (weights[layer] * slope).abs().mean(1)
            mean = score(weights[layer], slope).mean(0) if len(rows) == 1 else torch.as_tensor(
                product[number, layer, :, :n]).mean(0)
            saliency[number, layer, :n] = mean / mean.norm().clamp_min(1e-300)
    data = xr.Dataset(
        {"attention": (("prompt", "layer", "head", "key"), attention),
         "product": (("prompt", "layer", "head", "key"), product),
         "saliency": (("prompt", "layer", "key"), saliency)},
        {"layer": np.arange(model.n_layers), "head": np.arange(model.n_heads),
         "key": np.arange(longest)})
    return Result(data, {**model.manifest(), "measure": "saliency", "row": "the one that predicts",
                         "queries": [list(one.rows) for one in items],
                         "prompts": [one.prompt.digest() for one in items]})


def draw(found: Result, ax: Axes, *, prompt: SupportsIndex = 0) -> Axes:
    """Saliency of the predicting row of one prompt, layer by key."""
    rows = found["saliency"].isel(prompt=int(prompt)).dropna("key")
    return heat.draw(ax, rows, x="key", y="layer", label="|A dL/dA|, row of length one")
