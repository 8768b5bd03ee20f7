"""Context-aware mean ablation (CAMA): states that know their own token and position, nothing else.

One pool of prompts of one template serves every prompt: each prompt of the pool is added to the mean
of every (position, token) that it holds, for all layers at once. The pool decides what "nothing
else" means: draw its slots independently of each other, or a token tells about its neighbors.
"""

from typing import Literal, Optional, SupportsIndex, get_args

import numpy as np
import torch
import xarray as xr
from jaxtyping import Float, Int
from torch import Tensor

from interp.core import OutOfRange, Prompt, PromptError
from interp.models.model import Model

Replacement = Literal["cama", "cama_resample", "mean", "resample", "zero"]
REPLACEMENTS: tuple[str, ...] = get_args(Replacement)


class ContextMeans:
    """Mean states entering every block, by position and own token, over a pool of prompts.

    Example:
        >>> import interp
        >>> model = interp.open_model("backcopy-3l")
        >>> pool = np.random.default_rng(0).integers(3, 6, (20, 7))
        >>> means = ContextMeans(model, pool)
        >>> means.entering(2, pool[:4]).shape == (4, 7, model.d_model)
        True

    Args:
        pool: token ids, all of one length.
        examples: how many single states are kept of every position and token, for resampling.

    Attributes:
        mean: `[layer, cell, d_model]`. count: prompts behind each cell. cells: (position, token).

    Source: arXiv:2509.09650, x[t] <- the mean of h[t] over contexts that keep the own token.
    """

    def __init__(
        self, model: Model, pool: Int[np.ndarray, "prompt position"], *,
        examples: SupportsIndex = 4, batch_size: SupportsIndex = 64, seed: SupportsIndex = 0,
    ) -> None:
        if not len(pool):
            raise PromptError("the pool of contexts is empty: give at least one prompt.")
        pairs = sorted({(t, int(token)) for row in pool for t, token in enumerate(row)})
        self.cells = {pair: number for number, pair in enumerate(pairs)}
        self.length, self.n_layers, self.name = pool.shape[1], model.n_layers, model.name
        where = torch.tensor([[self.cells[t, int(token)] for t, token in enumerate(row)]
                              for row in pool])
        self.count = torch.bincount(where.flatten(), minlength=len(pairs))
        shape = (model.n_layers, len(pairs), model.d_model)
        self.mean, self.norm = torch.zeros(shape), torch.zeros(shape[:2])
        # Numbers of the pool's prompts that stand for each cell, drawn once.
        rng = np.random.default_rng(int(seed))
        self._who = torch.stack([torch.from_numpy(rng.choice(
            (where == cell).any(1).nonzero().flatten().numpy(), int(examples)))
            for cell in range(len(pairs))])
        self._examples = torch.zeros(int(examples), *shape)
        for start in range(0, len(pool), int(batch_size)):
            part = [Prompt.from_tokens(row) for row in pool[start : start + int(batch_size)]]
            reads = model.run(part, read="resid_pre", logits="none", batch_size=len(part)).reads
            states = torch.tensor(reads["resid_pre"].values).transpose(0, 1).flatten(1, 2)
            here = where[start : start + len(part)].flatten()
            self.mean.index_add_(1, here, states)
            self.norm.index_add_(1, here, states.norm(dim=-1))
            numbers = torch.arange(start, start + len(part)).repeat_interleave(self.length)
            for one in range(int(examples)):
                chosen = self._who[here, one] == numbers
                self._examples[one][:, here[chosen]] = states[:, chosen]
        self.mean /= self.count[:, None]
        self.norm /= self.count

    def at(self, prompts: Int[np.ndarray, "prompt position"]) -> Int[Tensor, "prompt position"]:
        """The cell of every token. Raises `PromptError` for one that the pool never had there."""
        if prompts.ndim != 2 or prompts.shape[1] != self.length:
            raise PromptError(
                f"prompts of shape {prompts.shape} do not fit a pool of {self.length} tokens each."
            )
        found = [[self.cells.get((t, int(token)), -1) for t, token in enumerate(row)]
                 for row in prompts]
        for row, cells in zip(prompts, found):
            if -1 in cells:
                t = cells.index(-1)
                raise PromptError(
                    f"no prompt of the pool has token {int(row[t])} at position {t}, so its mean "
                    "state is not known; draw a larger pool."
                )
        return torch.tensor(found)

    def entering(
        self, layer: SupportsIndex, prompts: Int[np.ndarray, "prompt position"],
        by: str = "cama", rng: Optional[np.random.Generator] = None,
    ) -> Float[Tensor, "prompt position d_model"]:
        """What enters a block in place of the true states of `prompts`.

        Args:
            by: "cama", the mean over contexts with the same token there; "cama_resample", the state
                in one such context (of its own for every position); "mean" over all contexts, by
                position only; "resample", the state in any one context; "zero".
            rng: for the two that draw.
        """
        number = int(layer)
        if not 0 <= number < self.n_layers:
            raise OutOfRange(f"layer {number} does not exist: there are 0 to {self.n_layers - 1}.")
        cells = self.at(prompts)
        if by == "cama":
            return self.mean[number][cells]
        if by == "zero":
            return torch.zeros(*cells.shape, self.mean.shape[-1])
        starts = torch.tensor([min(c for (t, _), c in self.cells.items() if t == position)
                               for position in range(self.length)] + [len(self.cells)])
        if by == "mean":
            return torch.stack([
                (self.count[a:b, None] * self.mean[number, a:b]).sum(0) / self.count[a:b].sum()
                for a, b in zip(starts[:-1], starts[1:])]).expand(len(prompts), -1, -1)
        rng = rng or np.random.default_rng(0)
        if by == "resample":
            # As often as the pool has the token there.
            drawn = [torch.from_numpy(rng.choice(
                np.arange(int(a), int(b)), len(prompts),
                p=(self.count[a:b].double() / self.count[a:b].sum()).numpy()))
                for a, b in zip(starts[:-1], starts[1:])]
            cells = torch.stack(drawn, 1)
        elif by != "cama_resample":
            raise PromptError(f"cannot replace by {by!r}; choose one of: {', '.join(REPLACEMENTS)}.")
        which = torch.from_numpy(rng.integers(0, len(self._examples), tuple(cells.shape)))
        return self._examples[which, number, cells]

    def norm_ratio(self) -> xr.DataArray:
        """Norm of the mean over the mean norm, by layer, over all tokens of the pool: a mean lies
        off the states it stands for, the more so the smaller this is."""
        ratio = self.mean.norm(dim=-1) / self.norm.clamp_min(1e-30)
        weight = self.count / self.count.sum()
        return xr.DataArray((ratio * weight).sum(1).numpy(), {"layer": range(self.n_layers)},
                            ("layer",))
