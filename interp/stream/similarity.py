"""How alike the states of one prompt are: what probes and flow both measure positions by."""

from typing import Union

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from interp.core.errors import NumericalError

States = Union[Float[Tensor, "*layer position d_model"], Float[np.ndarray, "*layer position d_model"]]


def cosines(states: States) -> Float[np.ndarray, "*layer position position"]:
    """Cosine similarity of every two positions; center the states over positions before, if wanted.

    Example:
        >>> cosines(np.eye(3, 4)).tolist()
        [[1.0, 0.0, 0.0], [0.0, 1.0, 0.0], [0.0, 0.0, 1.0]]
    """
    x = torch.as_tensor(states).double()
    if not torch.isfinite(x).all():
        raise NumericalError("states contain NaN or infinity; recompute them in float32.")
    x = torch.nn.functional.normalize(x, dim=-1)
    return (x @ x.transpose(-1, -2)).cpu().numpy()
