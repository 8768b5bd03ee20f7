"""How a layer mixes tokens, by the norms of what is moved: replacements for guesses in rollout.

Paper     arXiv:2005.00928 for the guesses (half and half, attention as the amount that is moved);
          arXiv:2403.14552 for how tokens are transformed
Question  How much of a state comes from another position, and how much stays?
Measure   norms of the residual, of the attention's output, and of a_ij v_j W_O
Cause     none: a norm says how much is written, not whether it is read
"""

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor


def residual_share(
    residual: Float[Tensor | np.ndarray, "layer position d_model"],
    attn_out: Float[Tensor | np.ndarray, "layer position d_model"],
) -> Float[Tensor, "layer position"]:
    """The residual's share by norms, |x| / (|x| + |attention output|), in place of one half.

    Example:
        >>> residual_share(torch.ones(1, 1, 4), torch.zeros(1, 1, 4))
        tensor([[1.]], dtype=torch.float64)
    """
    kept, added = (torch.as_tensor(x).double().norm(dim=-1) for x in (residual, attn_out))
    total = kept + added
    return torch.where(total > 0, kept / torch.where(total > 0, total, 1.0), 0.5)


def value_weighted(
    attention: Float[Tensor | np.ndarray, "head query key"],
    v: Float[Tensor | np.ndarray, "key kv_head d_head"],
    w_o: Float[Tensor | np.ndarray, "head d_head d_model"],
) -> Float[Tensor, "query key"]:
    """Norm of what position i receives from j through all heads of a layer, |sum_h a_ij v_j W_O|.

    Example:
        >>> attention, v = torch.tensor([[[0.5, 0.5]]]), torch.tensor([[[3.0]], [[0.0]]])
        >>> value_weighted(attention, v, torch.ones(1, 1, 2))
        tensor([[2.1213, 0.0000]], dtype=torch.float64)

    A sink with next to no value has next to no weight here, however much attention it gets.
    Computed from the products of what heads would write: [key, head, head] numbers, never a vector
    per edge. Biases are left out, since they do not depend on what is read.

    Raises:
        ValueError: heads that are no multiple of the key-value heads.
    """
    p, out = torch.as_tensor(attention).double(), torch.as_tensor(w_o).double()
    values = torch.as_tensor(v).double()
    if len(p) % values.shape[1]:
        raise ValueError(f"{len(p)} heads do not share {values.shape[1]} key-value heads evenly.")
    values = values.repeat_interleave(len(p) // values.shape[1], 1)
    written = torch.einsum("khd,hdm->khm", values, out)
    gram = written @ written.transpose(1, 2)
    return torch.einsum("hqk,khg,gqk->qk", p, gram, p).clamp_min(0).sqrt()


def token_weights(
    before: Float[Tensor | np.ndarray, "layer position d_model"],
    after: Float[Tensor | np.ndarray, "layer position d_model"],
) -> Float[Tensor, "layer position"]:
    """How much a block transforms each token: ratio of norms times normalized exp(cosine).

    Example:
        >>> token_weights(torch.ones(1, 2, 3), 2 * torch.ones(1, 2, 3))
        tensor([[1., 1.]], dtype=torch.float64)

    Source: TokenTM, arXiv:2403.14552, w_j = |x'_j| / |x_j| exp(cos_j) / sum_k exp(cos_k). The
    formula is NOT verified against the paper; its gradient weighting of attention is left out.
    """
    x, y = torch.as_tensor(before).double(), torch.as_tensor(after).double()
    ratio = y.norm(dim=-1) / x.norm(dim=-1).clamp_min(1e-300)
    return ratio * torch.cosine_similarity(x, y, -1).softmax(-1)


def transformed(
    attention: Float[Tensor | np.ndarray, "layer query key"],
    weights: Float[Tensor | np.ndarray, "layer key"],
) -> Float[Tensor, "layer query key"]:
    """Attention on tokens times their `token_weights`: give it to `rollout` instead of attention.

    Example:
        >>> transformed(torch.full((1, 2, 2), 0.5), torch.tensor([[1.0, 0.2]]))[0, 1]
        tensor([0.5000, 0.1000], dtype=torch.float64)

    Rollout then uses rownorm(I + A diag(w)). Since the weights of n tokens sum to about one, more of
    every row stays on the token itself than in plain rollout.
    """
    return torch.as_tensor(attention).double() * torch.as_tensor(weights).double()[:, None, :]
