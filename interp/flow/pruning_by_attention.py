"""Scores of image tokens from attention and states inside the language model.

Paper     FastV, PyramidDrop, TransPrune, SparseVLM, VisionDrop, AdaptInfer, PLPHP, attention
          debiasing, DyVTE (arXiv:2411.19628), visual token withdrawal
Question  Which image tokens does the rest of the prompt look at?
Measure   plain functions of attention rows and states; the higher, the sooner kept
Cause     `interp.flow.pruning` removes the others and looks at the answer
"""

from collections.abc import Sequence
from typing import Any, Optional, SupportsFloat, SupportsIndex

import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from interp.core import NumericalError, OutOfRange

Heads = Float[Tensor, "head token"] | Float[np.ndarray, "head token"]
Rows = Float[Tensor, "head query token"] | Float[np.ndarray, "head query token"]
States = Float[Tensor, "token d_model"] | Float[np.ndarray, "token d_model"]
Scores = Float[Tensor, "token"] | Float[np.ndarray, "token"]


def top(score: Scores, keep: SupportsIndex) -> tuple[int, ...]:
    """The `keep` highest entries, in ascending order; the earlier one where two are equal.

    Example:
        >>> top(torch.tensor([0.1, 0.7, 0.2, 0.7]), 2)
        (1, 3)

    Raises:
        OutOfRange: more than there are, or fewer than none. NumericalError: a score of NaN.
    """
    values, number = numbers(score), int(keep)
    if not 0 <= number <= len(values):
        raise OutOfRange(f"cannot keep {number} of {len(values)} image tokens.")
    if bool(values.isnan().any()):
        raise NumericalError(f"{int(values.isnan().sum())} of {len(values)} scores are NaN.")
    order = values.sort(descending=True, stable=True).indices[:number]
    return tuple(int(i) for i in order.sort().values)


def numbers(given: Any) -> Tensor:
    """A floating point tensor of a tensor or array; float64 stays what it is."""
    values = torch.as_tensor(given)
    return values if values.dtype in (torch.float32, torch.float64) else values.float()


def row_attention(attention: Heads) -> Float[Tensor, "token"]:
    """Mean over heads of one row's attention: FastV, PyramidDrop, and FasterVLM in the tower.

    Example:
        >>> row_attention(torch.tensor([[0.2, 0.4], [0.4, 0.0]]))
        tensor([0.3000, 0.2000])
    """
    return numbers(attention).mean(0)


def guided_attention(attention: Rows) -> Float[Tensor, "token"]:
    """Mean over heads and rows: IGA of TransPrune with the rows after the image, VisionDrop with
    those of the image itself (a causal model's later tokens are then seen by fewer)."""
    return numbers(attention).mean((0, 1))


def transition(
    before: Float[Tensor, "position d_model"], after: Float[Tensor, "position d_model"]
) -> Float[Tensor, "position"]:
    """How a module changes each state: ratio of norms times softmax(1 - cosine) over positions.

    Example:
        >>> x = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
        >>> transition(x, torch.tensor([[2.0, 0.0], [2.0, 0.0]])).tolist()
        [0.537..., 1.462...]

    `after` is what the module gives, before it is added to the residual stream. The released code
    takes the softmax over all positions, text included.

    Source: TransPrune, released code.
    """
    inside, out = numbers(before), numbers(after)
    ratio = out.norm(dim=-1) / inside.norm(dim=-1).clamp_min(1e-12)
    return ratio * (1 - torch.cosine_similarity(inside, out, dim=-1)).softmax(0)


def transprune(
    transitions: Sequence[Scores], attention: Rows
) -> Float[Tensor, "token"]:
    """TTV + IGA, each brought to a sum of one.

    `transitions` holds one `transition` per module, cut to the image tokens; they are added.
    """
    ttv = torch.stack([numbers(one) for one in transitions]).sum(0)
    iga = guided_attention(attention).to(ttv)
    return ttv / ttv.sum().clamp_min(1e-30) + iga / iga.sum().clamp_min(1e-30)


def text_raters(
    text: Float[Tensor, "query d_model"], image: States
) -> Bool[Tensor, "query"]:
    """Text tokens that the image calls for: mean over image tokens of softmax over text tokens of
    h_v . h_t, above its average.

    Example:
        >>> text_raters(torch.tensor([[4.0, 0.0], [0.0, 0.1]]), torch.tensor([[1.0, 0.0]]))
        tensor([ True, False])

    All of them where none is above (equal ones). Source: SparseVLM, released code.
    """
    likeness = (numbers(image) @ numbers(text).to(numbers(image)).T).softmax(1).mean(0)
    above = likeness > likeness.mean()
    return above if bool(above.any()) else torch.ones_like(above)


def sparsevlm(
    attention: Rows, raters: Bool[Tensor, "query"],
    by_position: Optional[Float[Tensor, "query token"]] = None,
    n_heads: Optional[SupportsIndex] = None,
) -> Float[Tensor, "token"]:
    """Mean over heads of the raters' attention to each token.

    Args:
        attention: rows of the text after the image.
        by_position: version 2 divides by what position alone would give (`attention_by_position`).
        n_heads: version 2 averages only over this many heads, those with most text-to-image mass
            (14 in the released code).

    Source: SparseVLM, released code of both versions.
    """
    rows = numbers(attention)
    if n_heads is not None:
        chosen = top(rows.sum(2).mean(1), min(int(n_heads), len(rows)))
        rows = rows[list(chosen)]
    if by_position is not None:
        rows = rows / numbers(by_position).to(rows).clamp_min(1e-12)
    return rows[:, raters].mean((0, 1))


def attention_by_position(
    queries: Sequence[SupportsIndex], keys: Sequence[SupportsIndex],
    inverse_frequencies: Float[Tensor, "pair"],
) -> Float[Tensor, "query key"]:
    """Softmax attention that queries and keys of ones would give under a rotary embedding.

    Example:
        >>> attention_by_position([5], [4, 1], torch.tensor([0.1]))
        tensor([[0.5...]])

    A pair of ones rotated by a distance d has the product 2 cos(w d). Softmax over all given keys
    that are not after the query; scaled by the root of the head's width. Source: after SparseVLM v2
    (code); the normalization is this toolkit's choice.
    """
    at, to = (torch.as_tensor([int(i) for i in one]) for one in (queries, keys))
    distance = (at[:, None] - to[None]).to(inverse_frequencies)
    width = 2 * len(inverse_frequencies)
    scores = 2 * torch.cos(distance[..., None] * inverse_frequencies).sum(-1) / width**0.5
    return scores.masked_fill(distance < 0, float("-inf")).softmax(1)


def adaptinfer(
    to_image: Rows, among_text: Float[Tensor, "head query query"]
) -> Float[Tensor, "token"]:
    """Attention of text tokens to each image token, weighted by how much text attends to them.

    Source: AdaptInfer: text-to-text attention of the same layer as a soft prior over the prompt.
    """
    text = numbers(among_text).mean((0, 1))
    weight = text / text.sum().clamp_min(1e-30)
    return torch.einsum("q,hqt->t", weight, numbers(to_image).to(weight)) / len(to_image)


def position_trend(attention: Scores) -> Float[Tensor, "token"]:
    """An exponential in the token's number, fitted to a data set's mean attention.

    Example:
        >>> position_trend(torch.tensor([1.0, 2.0, 4.0]))
        tensor([1., 2., 4.])

    Least squares of the logarithm. The released code multiplies a fixed vector for 576 tokens; that
    it comes from an exponential is second-hand.
    """
    values = numbers(attention).double().clamp_min(1e-12).log()
    at = torch.arange(len(values), dtype=torch.float64)
    if len(values) < 2:
        return values.exp().float()
    slope = ((at - at.mean()) * (values - values.mean())).sum() / ((at - at.mean()) ** 2).sum()
    return (values.mean() + slope * (at - at.mean())).exp().float()


def debiased(
    score: Scores, trend: Scores, padding: Optional[Bool[Tensor, "token"]] = None
) -> Float[Tensor, "token"]:
    """A score divided by its trend over positions; tokens of padding get zero."""
    values = numbers(score)
    values = values / numbers(trend).to(values).clamp_min(1e-30)
    return values if padding is None else values.masked_fill(padding.to(values.device), 0.0)


def plphp_retention(
    mass: Float[Tensor, "layer"], *, attentive: SupportsFloat, indifferent: SupportsFloat,
    rate: SupportsFloat, step: SupportsFloat,
) -> Float[Tensor, "layer"]:
    """Share of image tokens that a layer keeps, by the last row's attention to the image.

    Layers with at least `attentive` keep rate + step, those below `indifferent` rate - step, the
    others rate. The paper's four numbers are not confirmed, so there are no defaults.
    """
    gamma = numbers(mass)
    kept = torch.full_like(gamma, float(rate))
    kept = torch.where(gamma >= float(attentive), kept + float(step), kept)
    return torch.where(gamma < float(indifferent), kept - float(step), kept).clamp(0, 1)


def plphp_kept(
    attention: Float[Tensor, "layer head token"], retention: Float[Tensor, "layer"]
) -> Bool[Tensor, "layer head token"]:
    """Which image tokens stay in the cache of every head: those its last row attends to most."""
    rows = numbers(attention)
    kept = torch.zeros(rows.shape, dtype=torch.bool)
    for layer, share in enumerate(retention.tolist()):
        number = round(share * rows.shape[2])
        for head in range(rows.shape[1]):
            kept[layer, head, list(top(rows[layer, head], number))] = True
    return kept


def exit_layer(
    text: Sequence[Float[Tensor, "query d_model"]],
    gates: Sequence[Any],
) -> Optional[int]:
    """DyVTE: the first layer whose gate says that all image tokens can go; None for none.

    A gate is called with the mean of the text states except the last, and the last, side by side
    (`[2 d_model]`), and gives two logits: stay, exit. Trained gates come with the method, not with
    this toolkit. Source: arXiv:2411.19628, code.
    """
    for layer, (states, gate) in enumerate(zip(text, gates, strict=True)):
        x = numbers(states)
        logits = gate(torch.cat([x[:-1].mean(0) if len(x) > 1 else x[-1], x[-1]]))
        if float(logits[1]) > float(logits[0]):
            return layer
    return None


def withdrawal_layer(
    kl: Float[np.ndarray, "sample layer"], layers: Sequence[SupportsIndex], *,
    eta: SupportsFloat = 0.003, first: SupportsIndex = 5,
) -> Optional[int]:
    """Visual token withdrawal: the first layer, `first` at the earliest, with mean KL <= eta.

    Example:
        >>> withdrawal_layer(np.array([[1.0, 0.002, 0.001]]), [4, 5, 6])
        5

    `kl` is KL(p_withdrawn || p_full) with all image tokens gone from a layer on, over about 20
    samples. eta is 0.003 for LLaVA-1.5-7B, 5e-4 for 13B, 1e-4 for v1.6-7B. Source: VTW, released
    code.
    """
    mean = np.asarray(kl, dtype=float).mean(0)
    for layer, value in zip(layers, mean, strict=True):
        if int(layer) >= int(first) and value <= float(eta):
            return int(layer)
    return None
