"""Attention that does nothing: is it to delimiters that heads turn when they have nothing to do?

Paper     arXiv:1906.04341, section 3.2
Question  Does it matter how much attention goes to delimiters?
Measure   |dL/dA|, the size of the loss's derivative by each attention weight, on delimiters and on
          other tokens; no attention matrix is differentiated: dL/dA_ts = <dL/dz_t, v_s>
Cause     hide the delimiters, and as many other tokens: a derivative is not yet an effect
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, Optional

import numpy as np
import torch
import xarray as xr
from jaxtyping import Float
from matplotlib.axes import Axes
from torch import Tensor

from interp.core import Prompt, PromptError, Result, block
from interp.core.intervention import each
from interp.figures import layer_curve
from interp.models.head_gradients import head_gradients
from interp.models.model import Model

Groups = Mapping[str, Sequence[int]]
OTHER = "other"
MASKED = 0.15
"""Share of tokens that a masked language model has to guess, as in its training."""
SCALE = 20.0
"""Inverse temperature of the contrastive loss, as sentence embeddings are trained with."""


@dataclass(frozen=True)
class Objective:
    """What a model was trained for, on given texts; made by `objective`.

    `kind` is "next token" (decoders), "masked token" (encoders with a vocabulary head) or
    "contrastive" (encoders without one: which of the partners belongs to the text).
    """

    kind: Literal["next token", "masked token", "contrastive"]
    prompts: tuple[Prompt, ...]
    targets: tuple[Tensor, ...] = ()
    partners: Optional[Tensor] = None

    def loss(self, number: int, states: Float[Tensor, "position width"]) -> Float[Tensor, ""]:
        """The loss on one prompt, in nats, from its logits or (contrastive) its last states."""
        if self.kind == "contrastive":
            assert self.partners is not None
            own = torch.nn.functional.normalize(states.mean(0), dim=0)
            return -(SCALE * self.partners.to(own) @ own).log_softmax(0)[number]
        if self.kind == "next token":
            target, rows = torch.tensor(self.prompts[number].ids[1:]), states[:-1]
        else:
            places, target = self.targets[number]
            rows = states[places.to(states.device)]
        return torch.nn.functional.cross_entropy(rows, target.to(states.device))


def objective(
    model: Model, prompts: Sequence[Prompt], partners: Sequence[Prompt] = (), *,
    fixed: Sequence[Groups] = (), seed: int = 0,
) -> Objective:
    """The objective that fits the model, on these prompts.

    Example:
        >>> import interp
        >>> model = interp.open_model("backcopy-1l")
        >>> objective(model, [Prompt.from_tokens(range(3, 9))]).kind
        'next token'

    Args:
        partners: for a model without a vocabulary head: for every prompt a text that belongs to
            it; the loss is to find it among all.
        fixed: for every prompt positions, by group, that are not masked.

    Raises:
        PromptError: partners (two or more) or a mask token are needed and missing.
    """
    if not len(prompts):
        raise PromptError("no prompts: give at least one.")
    given = tuple(prompts)
    if model.kind == "decoder":
        return Objective("next token", given)
    if model.run(given[0], logits="last").logits:
        return _masked(model, given, fixed, seed)
    if len(partners) != len(given) or len(given) < 2:
        raise PromptError(
            f"{model.name} has no vocabulary head, so its loss is to tell which text belongs to "
            f"which: give two prompts or more and a partner for each, not {len(given)} and "
            f"{len(partners)}."
        )
    states = _states(model, partners, [()] * len(partners), "contrastive")
    pooled = torch.stack([s.mean(0) for s in states])
    return Objective("contrastive", given,
                     partners=torch.nn.functional.normalize(pooled, dim=-1))


def measure(
    model: Model, aim: Objective, groups: Sequence[Groups], *, progress: bool = False
) -> Result:
    """Mean size of the loss's derivative by attention weights, per head and group of keys.

    Example:
        >>> import interp
        >>> model = interp.open_model("backcopy-1l")
        >>> aim = objective(model, [Prompt.from_tokens(range(3, 9))])
        >>> found = measure(model, aim, [{"start": [0]}])
        >>> found["gradient"].dims, found["gradient"].segment.values.tolist()
        (('sample', 'layer', 'head', 'segment'), ['start', 'other'])

    Args:
        groups: for every prompt of the objective, positions by name; all others are "other".

    Returns:
        `gradient` [sample, layer, head, segment], nats: mean of |dL/dA_ts| over the queries t and
        the keys s of the group that t can see. NaN where a prompt has no such key.

    For prompts of a few hundred tokens: the masks of one prompt at a time are held.

    Source: arXiv:1906.04341, figure 3 (described in the paper, not in its released code).
    """
    names = [*dict.fromkeys(name for one in groups for name in one), OTHER]
    if len(groups) != len(aim.prompts):
        raise PromptError(f"groups for {len(groups)} prompts, but {len(aim.prompts)} prompts.")
    rows = []
    for number, (prompt, own) in enumerate(zip(aim.prompts, groups)):
        grown = head_gradients(model, prompt, lambda states, n=number: aim.loss(n, states))
        weights = model.run(prompt, read="pattern", logits="none").reads["pattern"].values[0]
        chosen = _columns(names, own, len(prompt))
        found = np.full((model.n_layers, model.n_heads, len(names)), np.nan)
        for layer in range(model.n_layers):
            size = grown.by_attention(layer).abs().double().numpy()
            # What the mask hides has no weight whose derivative could be asked for.
            seen = weights[layer] > 0
            for column, keys in enumerate(chosen):
                count = seen[:, :, keys].sum((-1, -2))
                total = (size * seen)[:, :, keys].sum((-1, -2))
                found[layer, :, column] = np.where(count > 0, total / np.maximum(count, 1), np.nan)
        rows.append(found)
    data = xr.Dataset(
        {"gradient": (("sample", "layer", "head", "segment"), np.stack(rows))},
        {"layer": np.arange(model.n_layers), "head": np.arange(model.n_heads), "segment": names})
    return Result(data, {**model.manifest(), "measure": "no_op", "loss": aim.kind,
                         "n_samples": len(rows)})


def intervene(
    model: Model, aim: Objective, groups: Sequence[Groups], *, group: str,
    layers: Optional[Sequence[int]] = None, control_seeds: int = 5, seed: int = 0,
) -> Result:
    """Hide one group of tokens from all others: how much worse does the model do its task?

    Example:
        >>> import interp
        >>> model = interp.open_model("backcopy-1l")
        >>> aim = objective(model, [Prompt.from_tokens(range(3, 12))])
        >>> intervene(model, aim, [{"start": [0]}], group="start")["control"].dims
        ('seed', 'sample')

    The matched control hides as many tokens that belong to no group, in the same layers, drawn
    `control_seeds` times (under a causal mask from those no later than the latest hidden token, or
    from the first quarter, where there are enough). Hidden tokens still see everything.

    Returns:
        `baseline` and `loss` [sample], `control` [seed, sample], in nats; prompts without the
        group, or without enough other tokens, are left out, and counted in the manifest.

    Source: knock-out of attention, arXiv:2304.14767, for the question of arXiv:1906.04341.
    """
    rng = np.random.default_rng(seed)
    hidden, others = [], []
    for prompt, own in zip(aim.prompts, groups):
        named = {int(p) for where in own.values() for p in where}
        hidden.append([int(p) for p in own.get(group, ())])
        free = [p for p in range(len(prompt)) if p not in named]
        if model.kind == "decoder" and hidden[-1]:
            # Early tokens are seen by more queries than late ones.
            early = [p for p in free if p <= max(max(hidden[-1]), len(prompt) // 4)]
            free = early if len(early) >= 2 * len(hidden[-1]) else free
        others.append(free)
    kept = [i for i, (keys, free) in enumerate(zip(hidden, others))
            if keys and len(free) >= len(keys) and len(keys) < len(aim.prompts[i])]
    if not kept:
        raise PromptError(f"no prompt has tokens of the group {group!r} and as many others.")

    def losses(keys: Sequence[Sequence[int]]) -> np.ndarray:
        writes: list[Any] = []
        for i, k in zip(kept, keys):
            rest = [p for p in range(len(aim.prompts[i])) if p not in set(k)]
            writes.append([block(rest, list(k), layers=layers)] if len(k) else [])
        states = _states(model, [aim.prompts[i] for i in kept], writes, aim.kind)
        return np.array([float(aim.loss(i, s)) for i, s in zip(kept, states)])

    control = [
        losses([rng.choice(others[i], len(hidden[i]), replace=False).tolist() for i in kept])
        for _ in range(control_seeds)
    ]
    data = xr.Dataset({
        "baseline": ("sample", losses([()] * len(kept))),
        "loss": ("sample", losses([hidden[i] for i in kept])),
        "control": (("seed", "sample"), np.stack(control)),
    }, {"sample": kept})
    return Result(data, {
        **model.manifest(), "operation": "block", "group": group, "loss": aim.kind, "seed": seed,
        "layers": None if layers is None else [int(x) for x in layers],
        "control": "as many tokens of no group", "control_seeds": control_seeds,
        "n_samples": len(kept), "left out": len(aim.prompts) - len(kept)})


def draw(found: Result, ax: Axes) -> Axes:
    """Mean derivative per layer, for every group of keys."""
    values = found["gradient"].mean("head")
    curves = {str(name): values.sel(segment=name) for name in values.segment.values
              if bool(values.sel(segment=name).notnull().any())}
    return layer_curve.draw(ax, curves, label="mean |dL/dA| (nats)",
                            roles={OTHER: "control"} if OTHER in curves else None)


def _columns(names: Sequence[str], own: Groups, length: int) -> list[list[int]]:
    named = {int(p) for where in own.values() for p in where}
    free = [p for p in range(length) if p not in named]
    return [free if name == OTHER else [int(p) for p in own.get(name, ())] for name in names]


def _masked(
    model: Model, prompts: tuple[Prompt, ...], fixed: Sequence[Groups], seed: int
) -> Objective:
    mask = getattr(model.tokenizer, "mask_token_id", None)
    if mask is None:
        raise PromptError(
            f"{model.name} predicts masked tokens, but comes with no tokenizer that has a mask."
        )
    rng = np.random.default_rng(seed)
    made, targets = [], []
    for number, prompt in enumerate(prompts):
        kept = {int(p) for where in (fixed[number] if fixed else {}).values() for p in where}
        free = [p for p in range(len(prompt)) if p not in kept]
        if not free:
            raise PromptError(f"prompt {number} has no token that could be masked.")
        places = np.sort(rng.choice(free, max(1, round(MASKED * len(free))), replace=False))
        ids = np.array(prompt.ids)
        targets.append(torch.stack([torch.tensor(places), torch.tensor(ids[places])]))
        ids[places] = mask
        made.append(replace(prompt, ids=tuple(int(i) for i in ids)))
    return Objective("masked token", tuple(made), tuple(targets))


def _states(
    model: Model, prompts: Sequence[Prompt], writes: Sequence[Any], kind: str
) -> list[Tensor]:
    """Logits of every prompt, or its last residual states where there is no vocabulary."""
    if kind != "contrastive":
        return model.run(prompts, write=each(writes)).logits
    last = f"resid_post.{model.n_layers - 1}"
    read = model.run(prompts, read=last, write=each(writes)).reads[last]
    return [torch.tensor(read.isel(prompt=i, layer=0).values[: len(p)])
            for i, p in enumerate(prompts)]
