"""What the vision tower computed for a picture, in line with the picture's tokens in the prompt.

Only the tower and its projector run, not the language model. Rows of the tower are brought to
tokens by what is seen to happen, not by what is expected of an architecture: where the projector
merges patches, several rows belong to one token; where the tower reorders its patches for windowed
attention, the order is found again from the projected features themselves.
"""

import inspect
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, Optional, SupportsIndex

import torch
from jaxtyping import Float
from torch import Tensor, nn

from interp.core.errors import ModelRefused, OutOfRange, PromptError
from interp.core.prompt import Prompt
from interp.models import attention as attend
from interp.models.model import Model
from interp.models.sites import first_tensor, hidden_input
from interp.models.vision import CLASS_TOKENS


@dataclass(frozen=True, eq=False)
class TowerReads:
    """States and attention of a vision tower for one picture of a prompt.

    Attributes:
        projected: `[token, d_model]`, what stands in the prompt for the picture.
        hidden: `[layer, token, d_vision]`, what enters each block, and last what leaves the last
            one; the mean of a token's patches where it has several.
        select: the entry of `hidden` that the projector reads, None where that is not one entry.
        positions: the picture's tokens in the prompt, in the same order.
        projector: the module from `hidden[select]` to `projected`.
    """

    projected: Float[Tensor, "token d_model"]
    hidden: Float[Tensor, "layer token d_vision"]
    select: Optional[int]
    positions: tuple[int, ...]
    projector: nn.Module
    _calls: tuple[tuple[tuple[Tensor, Tensor, Tensor, float], ...], ...]
    _rows: Tensor
    _class_token: bool

    @property
    def n_layers(self) -> int:
        """Number of the tower's blocks."""
        return len(self._calls)

    @property
    def has_class_token(self) -> bool:
        """Whether the tower puts a class token before its patches."""
        return self._class_token

    def attention(self, layer: SupportsIndex) -> Float[Tensor, "head query key"]:
        """Attention between the picture's tokens in a block of the tower.

        Over all rows of the tower it sums to one; what goes to a class token that is no token of
        the prompt is missing here. A token of several patches gives the mean of their rows and
        receives the sum of their columns. Counting from the end works as in a list.
        """
        full = self._full(layer)
        # A token has several patches: rows are averaged, columns summed.
        return full[:, self._rows].mean(2)[:, :, self._rows].sum(3)

    def values(self, layer: SupportsIndex) -> Float[Tensor, "head token d_head"]:
        """Value vectors of the picture's tokens in a block, the mean of a token's patches."""
        v = torch.cat([call[2] for call in self._calls[self._at(layer)]], 1)
        return v[:, self._rows].mean(2)

    def class_value(self, layer: SupportsIndex) -> Optional[Float[Tensor, "head d_head"]]:
        """The class token's value vector, None without one."""
        calls = self._calls[self._at(layer)]
        return calls[0][2][:, 0] if self._class_token else None

    @property
    def cls_attention(self) -> Optional[Float[Tensor, "layer head token"]]:
        """The class token's attention to the picture's tokens, None without one."""
        if not self._class_token:
            return None
        rows = []
        for (q, k, v, scaling), *_ in self._calls:
            rows.append(_weights(q[:, :1], k, v, scaling)[:, 0])
        return torch.stack(rows)[:, :, self._rows].sum(3)

    def received(self, layer: SupportsIndex) -> Float[Tensor, "head token"]:
        """Mean attention from every row of the tower, a class token's too, to each token."""
        return self._full(layer).mean(1)[:, self._rows].sum(2)

    def _at(self, layer: SupportsIndex) -> int:
        number = int(layer)
        if not -self.n_layers <= number < self.n_layers:
            raise OutOfRange(
                f"the vision tower has no block {number}: there are 0 to {self.n_layers - 1}."
            )
        return number % self.n_layers

    def _full(self, layer: SupportsIndex) -> Float[Tensor, "head row row"]:
        """Attention over all rows of the tower; blocks of it where it attends within windows."""
        parts = [_weights(*call) for call in self._calls[self._at(layer)]]
        size = sum(part.shape[1] for part in parts)
        full = parts[0].new_zeros(parts[0].shape[0], size, size)
        start = 0
        for part in parts:
            stop = start + part.shape[1]
            full[:, start:stop, start:stop] = part
            start = stop
        return full


def read(model: Model, prompt: Prompt, image: SupportsIndex = 0) -> TowerReads:
    """Run the vision tower on one picture of a prompt.

    Example:
        >>> import interp
        >>> import numpy as np
        >>> from interp.prompts import scenes
        >>> model = interp.open_model("looker")
        >>> picture = scenes.draw(scenes.scene(np.random.default_rng(0)))
        >>> reads = read(model, model.prompt("what color ?", images=[picture]))
        >>> reads.projected.shape[0] == len(reads.positions), reads.attention(-1).shape[0]
        (True, 4)

    Args:
        image: which picture of the prompt, from 0.

    Raises:
        PromptError: the prompt has no such picture.
        ModelRefused: a model without pictures, one that cuts pictures into tiles, or one whose
            tower's rows cannot be brought to tokens; the sentence says which.
    """
    segments, number = prompt.of_kind("image"), int(image)
    if not model.has_images:
        raise ModelRefused(f"{model.name} is a text model: it has no vision tower.")
    if not 0 <= number < len(segments):
        raise PromptError(
            f"there is no picture {number} in this prompt: it has {len(segments)}. Make it with "
            "model.prompt(..., images=[...])."
        )
    hf, config = model.hf, model.hf.config.vision_config
    tower = _tower(hf, config, model.name)
    configs = _configs(tower, config)
    found: list[nn.Module] = []
    with attend.implementation(configs), attend.callers(found):
        _features(hf, model, prompt)
    blocks = _blocks(tower, found, model.name)
    keeping = _Keeping(len(blocks))
    with ExitStack() as stack:
        stack.enter_context(attend.implementation(configs))
        stack.enter_context(attend.session({m: i for i, m in enumerate(found)}, keeping))
        states = stack.enter_context(_states(blocks))
        passed = stack.enter_context(_projections(hf))
        pooled = _features(hf, model, prompt)
    return _aligned(model, tower, config, segments[number].positions, number, pooled, keeping.calls,
                    states, passed)


class _Keeping:
    """Keeps queries, keys and values of every call of the tower's attention."""

    def __init__(self, n_layers: int) -> None:
        self.calls: list[list[tuple[Tensor, Tensor, Tensor, float]]] = [[] for _ in range(n_layers)]

    def attend(
        self, layer: int, q: Tensor, k: Tensor, v: Tensor, mask: Any, given: dict[str, Any]
    ) -> Tensor:
        if given["softcap"] is not None or given["sinks"] is not None or mask.plain != "full":
            raise ModelRefused("this vision tower masks or caps its attention, which is not modeled.")
        self.calls[layer].append((q.detach(), k.detach(), v.detach(), given["scaling"]))
        made = nn.functional.scaled_dot_product_attention(
            q, k, v, scale=given["scaling"], enable_gqa=k.shape[1] != q.shape[1])
        return made.transpose(1, 2).contiguous()


def _weights(
    q: Float[Tensor, "head query d_head"], k: Float[Tensor, "kv_head key d_head"], v: Tensor,
    scaling: float,
) -> Float[Tensor, "head query key"]:
    k = k.repeat_interleave(q.shape[0] // k.shape[0], 0)
    return (q.float() @ k.float().transpose(1, 2) * scaling).softmax(-1)


def _tower(hf: nn.Module, config: Any, name: str) -> nn.Module:
    """The outermost module whose configuration is the vision tower's."""
    for module in hf.modules():
        if type(getattr(module, "config", None)) is type(config):
            return module
    raise ModelRefused(f"no module of {name} has the configuration of its vision tower.")


def _configs(tower: nn.Module, config: Any) -> list[Any]:
    found = {id(config): config}
    for module in tower.modules():
        own = getattr(module, "config", None)
        if type(own) is type(config):
            found[id(own)] = own
    return list(found.values())


def _features(hf: Any, model: Model, prompt: Prompt) -> list[Tensor]:
    """The projected features of every picture, by the model's own method."""
    if not hasattr(hf, "get_image_features"):
        raise ModelRefused(f"{model.name} has no method for the features of pictures alone.")
    known = inspect.signature(hf.get_image_features).parameters
    inputs = model._engine("hf")._inputs([prompt])
    given = {name: value for name, value in inputs.items() if name in known}
    if "image_sizes" in inputs or "pixel_values" in given and given["pixel_values"].ndim == 5:
        raise ModelRefused(
            f"{model.name} cuts pictures into tiles, so its tower's rows are not one picture's tokens."
        )
    with torch.no_grad():
        out = hf.get_image_features(**given)
    pooled = getattr(out, "pooler_output", out)
    pooled = getattr(pooled, "last_hidden_state", pooled)
    return [one.detach() for one in pooled]


def _blocks(tower: nn.Module, attentions: list[nn.Module], name: str) -> list[nn.Module]:
    """The tower's blocks: entries of one list, each around one attention module."""
    for module in tower.modules():
        if isinstance(module, nn.ModuleList) and len(module) >= len(attentions) > 0:
            inside = [[a for a in attentions if any(part is a for part in block.modules())]
                      for block in module]
            around = [block for block, own in zip(module, inside) if len(own) == 1]
            if len(around) == len(attentions):
                return around
    raise ModelRefused(
        f"the vision tower of {name} never calls a registered attention function, or not once per "
        "block, so its attention cannot be read."
    )


@contextmanager
def _states(blocks: list[nn.Module]) -> Iterator[list[Tensor]]:
    """What enters every block, and what leaves the last."""
    states: list[Tensor] = []
    handles = [block.register_forward_pre_hook(
        lambda m, args, kwargs: states.append(hidden_input(args, kwargs).detach()),
        with_kwargs=True) for block in blocks]
    handles.append(blocks[-1].register_forward_hook(
        lambda m, args, output: states.append(first_tensor(output).detach())))
    try:
        yield states
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def _projections(hf: nn.Module) -> Iterator[list[tuple[nn.Module, Tensor, Tensor]]]:
    """Input and output of the modules that bring the tower's states to the language model."""
    wanted = [module for name, module in hf.named_modules()
              if name.rsplit(".", 1)[-1] in ("multi_modal_projector", "merger", "connector",
                                              "mm_projector", "aligner")]
    passed: list[tuple[nn.Module, Tensor, Tensor]] = []
    handles = [module.register_forward_hook(
        lambda m, args, kwargs, out: passed.append(
            (m, hidden_input(args, kwargs).detach(), first_tensor(out).detach())),
        with_kwargs=True) for module in wanted]
    try:
        yield passed
    finally:
        for handle in handles:
            handle.remove()


def _aligned(
    model: Model, tower: nn.Module, config: Any, positions: tuple[int, ...], image: int,
    pooled: list[Tensor], calls: list, states: list[Tensor],
    passed: list[tuple[nn.Module, Tensor, Tensor]],
) -> TowerReads:
    name = model.name
    projected = pooled[image] if len(pooled) > image else pooled[0]
    if not passed:
        raise ModelRefused(f"{name} has no projector that is known, so its tower cannot be read.")
    projector, entered, left = passed[-1]
    if projected.shape[0] != len(positions):
        raise ModelRefused(
            f"the tower of {name} gives {projected.shape[0]} features, but the picture has "
            f"{len(positions)} tokens (newline tokens, or tiles), so they cannot be brought together."
        )
    batched = states[0].ndim == 3 and states[0].shape[0] == len(pooled)
    if batched:  # one row of the batch per picture
        states = [one[image] for one in states]
        kept = tuple(tuple((q[image], k[image], v[image], s) for q, k, v, s in layer)
                     for layer in calls)
        entered, left = entered[image], left[image]
    else:
        states = [one.reshape(-1, one.shape[-1]) for one in states]
        kept = tuple(tuple((q[0], k[0], v[0], s) for q, k, v, s in layer) for layer in calls)
        left = left.reshape(-1, left.shape[-1])
    rows = _rows(name, config, projected, left, len(states[0]))
    class_token = bool(CLASS_TOKENS.get(getattr(config, "model_type", ""), 0)) and batched
    hidden = torch.stack([one[rows].mean(1) for one in states])
    select = None
    whole = entered.reshape(-1, entered.shape[-1])
    for number, one in enumerate(states):
        if one.shape[-1] == whole.shape[-1]:
            fed = one if len(one) == len(whole) else one[len(one) - len(whole):]
            if torch.equal(fed, whole):
                select = number
    return TowerReads(projected, hidden, select, positions, projector, kept, rows, class_token)


def _rows(
    name: str, config: Any, projected: Tensor, left: Tensor, n_rows: int
) -> Tensor:
    """`[token, patch]`: the rows of the tower that each token is made of."""
    features = left.reshape(-1, left.shape[-1])
    total = len(features)
    if torch.equal(features[: len(projected)], projected) and len(projected) == total:
        order = torch.arange(total)
    else:
        same = torch.cdist(projected.double(), features.double()) == 0
        if bool((same.sum(1) != 1).any()):
            raise ModelRefused(
                f"the features of {name} are changed after its projector, so its tower's rows "
                "cannot be brought to tokens."
            )
        order = same.float().argmax(1)
    merged = getattr(config, "spatial_merge_size", 1) ** 2
    before = CLASS_TOKENS.get(getattr(config, "model_type", ""), 0)
    if n_rows == total * merged and merged > 1:
        return order[:, None].cpu() * merged + torch.arange(merged)
    if n_rows in (total, total + before):
        return order[:, None].cpu() + (n_rows - total)
    raise ModelRefused(
        f"the tower of {name} has {n_rows} rows for {total} features: how they are pooled is not "
        "known."
    )
