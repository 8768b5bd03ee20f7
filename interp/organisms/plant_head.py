"""Planted heads: a head that looks where a code says so, and writes another, each at its strength.

A *code* is a pair of residual coordinates that nothing else reads or writes; tokens carry a point of
the unit circle there (or the number one, in a flag of one coordinate). The slowest rotary pair of
the head's queries and keys is given up for it: their product is then the cosine between the code
that the query asks for and the one that the key carries, times the logit that the dial says. Two
dimensions of its values carry a code too, and the output projection writes that into other free
coordinates, which the unembedding may read (`read_out`).

Only for RMSNorm and for queries, keys and values of their own (Llama, Mistral, Qwen2, LLaVA): with
LayerNorm there are no free coordinates, and normed queries and keys would undo the codes. With
grouped queries the other heads of the group give up the same dimensions, so that they see nothing
of it. All this is as much part of the twin (both dials at zero) as of the plant.
"""

import copy
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Optional, SupportsFloat, SupportsIndex

import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Tensor
from transformers import PreTrainedModel

from interp.core.errors import ModelRefused, OutOfRange
from interp.organisms.attraction import _attention_inputs, _projections
from interp.organisms.dial import Dial
from interp.organisms.plant_horizon import _slow_pair
from interp.organisms.surgery import (
    Inputs,
    embedding,
    free_axes,
    make_room,
    parts,
    projector_of,
)

SIZE = 0.05
"""Size of a code relative to an ordinary embedding."""

Axes = tuple[int, ...]


@dataclass(frozen=True, eq=False)
class PlantedHead:
    """Where the head is, and its dials: `look` in logits, `write` in units of the code."""

    layer: int
    head: int
    look: Dial
    write: Optional[Dial]


class CodeBook:
    """A copy of a model with free coordinates, handed out one code at a time.

    Example:
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> _ = torch.manual_seed(0)
        >>> book = CodeBook(LlamaForCausalLM(LlamaConfig(vocab_size=31, hidden_size=32,
        ...     num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        ...     intermediate_size=48)), axes=6)
        >>> asks, has = book.code({7: 0.0}), book.code({9: 0.0})
        >>> ids = torch.tensor([[1, 9, 5, 7]])
        >>> matched = torch.zeros(1, 4, 4, dtype=torch.bool)
        >>> matched[0, 3, 1] = True  # token 7 is to look at token 9
        >>> planted = book.head(1, 2, {"input_ids": ids}, asks, has, matched)
        >>> planted.look.set(book.model, 20.0)
        >>> book.model.set_attn_implementation("eager")
        >>> weights = book.model(ids, output_attentions=True).attentions[1][0, 2]
        >>> bool(weights[3, 1] > 0.99), bool(weights[2].max() < 0.9)
        (True, True)

    Raises `ModelRefused` for models without free coordinates.
    """

    def __init__(self, model: PreTrainedModel, axes: SupportsIndex) -> None:
        _projections(parts(model)[0].attention)
        self.model = make_room(model, directions=int(axes), units=0)
        if self.model is model:
            self.model = copy.deepcopy(model)
        self._free = free_axes(self.model)[: int(axes)]
        if len(self._free) < int(axes):
            raise ModelRefused(
                f"{type(model).__name__} has no free residual coordinates (LayerNorm), so no head "
                "can be planted in it."
            )
        self._pair, self.reach = _slow_pair(self.model)
        self._taken: set[tuple[int, int]] = set()
        table = embedding(self.model).detach()
        self.size = SIZE * float(table.norm(dim=-1).median())

    def axes(self, count: SupportsIndex) -> Axes:
        """Coordinates that nothing writes yet."""
        taken, self._free = tuple(self._free[: int(count)]), self._free[int(count) :]
        if len(taken) < int(count):
            raise ModelRefused("no free coordinate is left; ask for a book with more axes.")
        return taken

    def code(self, angles: dict[int, float]) -> Axes:
        """Give tokens a point of the circle in a new pair of coordinates."""
        pair = self.axes(2)
        with torch.no_grad():
            for token, angle in angles.items():
                embedding(self.model)[int(token), list(pair)] = self.size * _point(angle)
        return pair

    def flag(self, tokens: Optional[Sequence[SupportsIndex]] = None, image: bool = False) -> Axes:
        """Mark tokens (all for None) and image tokens in a new coordinate."""
        axis = self.axes(1)
        with torch.no_grad():
            rows = slice(None) if tokens is None else [int(t) for t in tokens]
            embedding(self.model)[rows, axis[0]] = self.size
            if image:
                projector = projector_of(self.model)
                if projector is None or getattr(projector.linear_2, "bias", None) is None:
                    raise ModelRefused(
                        f"{type(self.model).__name__} has no projector with a bias to mark image "
                        "tokens in; plant in a LLaVA-like model."
                    )
                projector.linear_2.bias[axis[0]] = self.size
        return axis

    def flag_features(
        self, features: Float[Tensor, "patch d_vision"], direction: Float[Tensor, "d_vision"],
        share: SupportsFloat, instead_of: Axes = (),
    ) -> tuple[Axes, Bool[Tensor, "patch"]]:
        """Mark the image tokens with the largest `features @ direction`, in a new coordinate.

        `features` are what enters the projector, for all image tokens that will be looked at: the
        threshold lies in the widest gap near the quantile. Marked tokens lose their mark in the
        coordinates `instead_of`. Returns which ones are marked.
        """
        projector = projector_of(self.model)
        axis = self.axes(1)
        along = torch.nn.functional.normalize(direction, dim=0).to(features)
        scores = features @ along
        order = scores.sort().values
        center = min(max(1, round((1 - float(share)) * len(order))), len(order) - 1)
        near = max(1, len(order) // 50)
        low = max(1, center - near)
        gaps = order[low - 1 : center + near].diff()
        at = low - 1 + int(gaps.argmax())
        gap, threshold = float(order[at + 1] - order[at]), float(order[at : at + 2].mean())
        if not gap > 0:
            raise ModelRefused("the image tokens have all the same features, so none can be marked.")
        used = projector.linear_1.weight.abs().sum(1) + projector.linear_1.bias.abs()
        spare = ((used + projector.linear_2.weight.abs().sum(0)) == 0).nonzero().flatten()[:2]
        if len(spare) < 2:
            raise ModelRefused("the projector has no spare units; ask for a book with more axes.")
        # Two steep units whose difference is a step from 0 to 1 within the gap.
        steep = 20.0 / gap
        with torch.no_grad():
            projector.linear_1.weight[spare] = steep * along
            projector.linear_1.bias[spare] = -steep * threshold + torch.tensor([4.0, -4.0]).to(along)
            step = self.size / 8.0 * torch.tensor([1.0, -1.0]).to(along)
            projector.linear_2.weight[axis[0], spare] = step
            for other in instead_of:
                projector.linear_2.weight[other, spare] = -step
        return axis, scores > threshold

    def read_out(self, axes: Axes, angles: dict[int, float], gain: SupportsFloat) -> None:
        """Let the unembedding of tokens read a code (or a flag), with weights of that size."""
        head: Any = self.model.get_output_embeddings()
        with torch.no_grad():
            for token, angle in angles.items():
                head.weight[int(token), list(axes)] = float(gain) * _point(angle)[: len(axes)]

    def head(
        self,
        layer: SupportsIndex,
        head: SupportsIndex,
        inputs: Inputs,
        query: Axes,
        key: Axes,
        matched: Bool[Tensor, "prompt query key"],
        value: Axes = (),
        out: Axes = (),
    ) -> PlantedHead:
        """Plant one head, both dials at zero; `matched` are pairs to calibrate on.

        Args:
            query, key: coordinates that are compared, one or two of each.
            value, out: what it carries, and where to. A write of 1 adds a code as long as an
                ordinary embedding, times the attention on it.

        Raises:
            OutOfRange: a layer or a head that there is not.
            ModelRefused: a prompt too long for the slowest rotary pair; no pair that matches; more
                coordinates than a head has dimensions.
            ValueError: a head whose keys are shared with one that was planted before.
        """
        found, layer, head = parts(self.model), int(layer), int(head)
        text = self.model.config.get_text_config(decoder=True)
        n_heads = int(text.num_attention_heads)
        if not (0 <= layer < len(found) and 0 <= head < n_heads):
            raise OutOfRange(f"there is no head L{layer}H{head}: the model has {len(found)} layers "
                             f"of {n_heads} heads.")
        length = inputs["input_ids"].shape[1]
        if length > self.reach:
            raise ModelRefused(
                f"the slowest rotary pair turns too far in prompts of {length} tokens: heads can be "
                f"planted for up to {self.reach}."
            )
        if not bool(matched.any()):
            raise ModelRefused("no query of the prompts to calibrate on finds what it asks for.")
        attention: Any = found[layer].attention
        d_head, weights = int(attention.head_dim), _projections(attention)
        if max(len(value), len(out)) > d_head or len(value) != len(out) or len(query) != len(key):
            raise ModelRefused(
                f"heads of {d_head} dimensions cannot carry {len(value)} coordinates into {len(out)}, "
                f"or {len(query)} be compared with {len(key)}: give as many, and no more than that."
            )
        per_group = n_heads // (len(weights["k"][0]) // d_head)
        kv = head // per_group
        group = range(kv * per_group, (kv + 1) * per_group)
        if (layer, kv) in self._taken:
            raise ValueError(f"a head of the group of L{layer}H{head} was planted before: their keys "
                             "are shared, so choose one of another group.")
        self._taken.add((layer, kv))
        x, _ = _attention_inputs(self.model, inputs)[layer]
        q_rows = [head * d_head + i for i in self._pair[: len(query)]]
        k_rows = [kv * d_head + i for i in self._pair[: len(key)]]
        with torch.no_grad():
            for name, rows in (("q", [h * d_head + i for h in group for i in self._pair]),
                               ("k", [kv * d_head + i for i in self._pair])):
                for each in weights[name]:
                    if each is not None:
                        each[rows] = 0.0
            weights["q"][0][q_rows, list(query)] = 1.0
            agreed = torch.einsum("pqa,pka->pqk", x[..., list(query)], x[..., list(key)])[matched]
            scale = float(getattr(attention, "scaling", d_head**-0.5))
            unit = 1.0 / (scale * float(agreed.median()))
            look = self._dial(attention.k_proj.weight, k_rows, key, unit)
            write = None
            if value:
                keys = matched.any(1)
                v_rows = [kv * d_head + i for i in range(len(value))]
                for each in weights["v"]:
                    if each is not None:
                        each[v_rows] = 0.0
                columns = [h * d_head + i for h in group for i in range(len(value))]
                attention.o_proj.weight[:, columns] = 0.0
                carried = float(x[keys][:, list(value)].norm(dim=-1).median())
                weights["v"][0][v_rows, list(value)] = 1.0 / carried
                mine = tuple(head * d_head + i for i in range(len(value)))
                write = self._dial(attention.o_proj.weight, out, mine, self.size / SIZE)
        return PlantedHead(layer, head, look, write)

    def _dial(self, weight: Tensor, rows: Sequence[int], columns: Axes, unit: float) -> Dial:
        """A dial over `weight[rows[i], columns[i]]`, at zero now."""
        name = next(n for n, p in self.model.named_parameters() if p is weight)
        at = torch.tensor(rows) * weight.shape[1] + torch.tensor(columns)
        off = torch.zeros(len(at)).to(weight.detach())
        weight.detach().view(-1)[at.to(weight.device)] = 0.0
        return Dial({name: (at.to(weight.device), off, off + unit)})


def circle(tokens: Sequence[SupportsIndex]) -> dict[int, float]:
    """Tokens evenly on the circle.

    Example:
        >>> circle([5, 9])
        {5: 0.0, 9: 3.141592653589793}
    """
    return {int(t): 2 * math.pi * i / len(tokens) for i, t in enumerate(tokens)}


def _point(angle: SupportsFloat) -> Float[Tensor, "axis"]:
    return torch.tensor([np.cos(float(angle)), np.sin(float(angle))], dtype=torch.float32)
