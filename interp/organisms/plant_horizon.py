"""A planted information horizon: from a block on, no later token can read the image any more.

The edit is exact. The projector writes a *flag* into a residual coordinate that nothing else reads
or writes, so it stays on the image tokens through all blocks. In every head of the blocks from
`layer` on the slowest rotary pair is given up: its query becomes a constant and its key the flag,
so that the score of an image key falls by `shift` and its weight is zero in float32. The twin gave
up the same pair and knows no flag: it differs in nothing but that it can read the image.
"""

import copy
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Optional, SupportsFloat, SupportsIndex

import numpy as np
import torch
from torch import Tensor
from transformers import (
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    PreTrainedModel,
)

from interp.core import OutOfRange, Prompt, Segment
from interp.core.errors import ModelRefused
from interp.organisms.attraction import _attention_inputs, _projections
from interp.organisms.surgery import (
    Inputs,
    embedding,
    free_axes,
    image_token,
    make_room,
    parts,
    projector_of,
)

SMALL = 1e-3
"""Size of flag and constant relative to an ordinary embedding: too small for any norm to notice."""

SLOWEST = 0.25
"""Least share of the score's fall that may be left after rotation over a prompt's length."""

UNREAD, SAME = 1e-6, 1e-5
"""Attention to image keys from the planted block on, and change of attention before it: limits."""

BOS, IMAGE, VOCABULARY = 1, 4, 61


@dataclass(frozen=True, eq=False)
class PlantedHorizon:
    """A model that cannot read its image from block `layer` on, and its twin, which can.

    `flag_axis` and `constant_axis` (None: the query biases are used) are residual coordinates,
    `pair` the two dimensions of each head that were given up, `reach` the longest prompt for which
    it holds. `measured` is what the check found: the largest attention of later tokens to image
    keys from the block on, and the largest change of attention before it.
    """

    model: PreTrainedModel
    twin: PreTrainedModel
    layer: int
    shift: float
    flag: float
    flag_axis: int
    constant_axis: Optional[int]
    pair: tuple[int, int]
    reach: int
    measured: Mapping[str, float] = field(default_factory=dict)

    def describe(self) -> dict[str, Any]:
        """The edit as plain data; `lift` needs no more than this to take it back."""
        return {
            "kind": "horizon", "layer": self.layer, "shift": self.shift, "flag": self.flag,
            "flag_axis": self.flag_axis, "constant_axis": self.constant_axis,
            "pair": list(self.pair), "reach": self.reach, "measured": dict(self.measured),
        }  # fmt: skip


def image_horizon(
    model: PreTrainedModel,
    layer: SupportsIndex,
    inputs: Inputs,
    *,
    shift: SupportsFloat = 1000.0,
) -> PlantedHorizon:
    """Make image keys unreadable from block `layer` on, and leave the blocks before as they were.

    Example:
        >>> model = tiny_llava(np.random.default_rng(0), n_layers=4)
        >>> prompt = picture_prompt(model, np.random.default_rng(1))
        >>> planted = image_horizon(model, 2, as_inputs(prompt))
        >>> planted.measured["read"], planted.measured["before"] < 1e-5
        (0.0, True)

    Args:
        inputs: a prompt with an image to check on, as the processor makes it.
        shift: how far the score of an image key falls before the softmax.

    Raises:
        OutOfRange: a block that the model does not have.
        ModelRefused: no LLaVA-like projector with a bias, normed queries and keys, LayerNorm, no
            slow rotary pair for prompts of this length, or a check that does not hold.
    """
    start = int(layer)
    if not 0 <= start < len(parts(model)):
        raise OutOfRange(f"block {start} does not exist: there are 0 to {len(parts(model)) - 1}.")
    projector = projector_of(model)
    if projector is None or getattr(projector.linear_2, "bias", None) is None:
        raise ModelRefused(
            f"{type(model).__name__} has no projector with a bias to write an image flag; plant in "
            "a LLaVA-like model."
        )
    places = inputs["input_ids"] == image_token(model)
    if not bool(places.any()):
        raise ModelRefused("the prompt to check on holds no image token; give one with an image.")
    pair, reach = _slow_pair(model)
    if inputs["input_ids"].shape[1] > reach:
        raise ModelRefused(
            f"the slowest rotary pair of heads of {parts(model)[0].attention.head_dim} dimensions "
            f"turns too far: a horizon holds for prompts of up to {reach} tokens, and this one has "
            f"{inputs['input_ids'].shape[1]}."
        )
    twin = make_room(model, directions=2, units=0)
    axes = free_axes(twin)
    if len(axes) < 2:
        raise ModelRefused(f"{type(model).__name__} has no free residual coordinates (LayerNorm).")
    size = SMALL * float(embedding(model).detach().norm(dim=-1).median())
    flagged = copy.deepcopy(twin)
    flag_axis, spare = axes[-1], axes[-2]
    biased = _projections(parts(twin)[start].attention)["q"][1] is not None
    constant_axis = None if biased else spare
    with torch.no_grad():
        projector_of(flagged).linear_2.bias[flag_axis] = size
        for one in (twin, flagged):
            if constant_axis is not None:
                embedding(one)[:, constant_axis] = size
                projector_of(one).linear_2.bias[constant_axis] = size
            for part in parts(one)[start:]:
                _give_up(part.attention, pair)
        seen = _attention_inputs(flagged, inputs)
        for number, part in list(enumerate(parts(flagged)))[start:]:
            x = seen[number][0]
            query, key = (_projections(part.attention)[name] for name in "qk")
            rows = torch.arange(pair[0], len(query[0]), part.attention.head_dim)
            if constant_axis is None:
                query[1][rows] = 1.0
            else:
                query[0][rows, constant_axis] = 1.0 / x[..., constant_axis].min()
            fall = float(shift) / float(getattr(part.attention, "scaling",
                                                part.attention.head_dim**-0.5))
            rows = torch.arange(pair[0], len(key[0]), part.attention.head_dim)
            key[0][rows, flag_axis] = -fall / x[..., flag_axis][places].min()
    planted = PlantedHorizon(flagged, twin, start, float(shift), size, flag_axis, constant_axis,
                             pair, reach)
    return replace(planted, measured=_check(model, planted, inputs, places))


def lift(planted: PlantedHorizon) -> PreTrainedModel:
    """The model with the plant taken back by its description alone; its weights are the twin's.

    Example:
        >>> model = tiny_llava(np.random.default_rng(0), n_layers=3)
        >>> planted = image_horizon(model, 1, as_inputs(picture_prompt(model,
        ...     np.random.default_rng(1))))
        >>> lifted = lift(planted).state_dict()
        >>> all(torch.equal(w, lifted[n]) for n, w in planted.twin.state_dict().items())
        True
    """
    model = copy.deepcopy(planted.model)
    with torch.no_grad():
        projector_of(model).linear_2.bias[planted.flag_axis] = 0.0
        for part in parts(model)[planted.layer :]:
            _give_up(part.attention, planted.pair)
    return model


def _give_up(attention: Any, pair: tuple[int, int]) -> None:
    """Queries and keys of one pair of dimensions become zero in every head."""
    for name, (weight, bias) in _projections(attention).items():
        if name == "v":
            continue
        rows = torch.arange(0, len(weight), attention.head_dim)
        for dim in pair:
            weight[rows + dim] = 0.0
            if bias is not None:
                bias[rows + dim] = 0.0


def _slow_pair(model: PreTrainedModel) -> tuple[tuple[int, int], int]:
    """The two dimensions of a head that rotate least, and how many positions that is good for."""
    decoder: Any = model.get_decoder()
    speeds = next((m.inv_freq for m in decoder.modules() if hasattr(m, "inv_freq")), None)
    d_head = int(parts(model)[0].attention.head_dim)
    if speeds is None:
        return (d_head // 2 - 1, d_head - 1), 10**9
    slow = int(speeds.argmin())
    reach = math.acos(SLOWEST) / float(speeds[slow])
    # Half against half; a pair of neighbors would show in the check.
    return (slow, slow + len(speeds)), int(reach)


def _attention(model: PreTrainedModel, inputs: Inputs) -> list[Tensor]:
    """Weights of every block, `[prompt, head, query, key]`."""
    before: Any = model.config.get_text_config(decoder=True)._attn_implementation
    model.set_attn_implementation("eager")
    try:
        with torch.no_grad():
            out: Any = model(**inputs, use_cache=False, output_attentions=True)
    finally:
        model.set_attn_implementation(before)
    return list(out.attentions)


def _check(
    model: PreTrainedModel, planted: PlantedHorizon, inputs: Inputs, places: Tensor
) -> dict[str, float]:
    """Refuse the plant unless it does what it says."""
    old, new, twin = (_attention(m, inputs) for m in (model, planted.model, planted.twin))
    later = (places.cumsum(1) == places.sum(1, keepdim=True)) & ~places
    edges = (later[:, :, None] & places[:, None, :])[:, None]

    def most(weights: Tensor) -> float:
        return float((weights * edges).max())

    layer = planted.layer
    measured = {
        "read": max(most(w) for w in new[layer:]),
        "before": max([float((a - b).abs().max()) for a, b in zip(old[:layer], new[:layer])] or [0]),
        "twin reads": min(most(w) for w in twin),
    }  # fmt: skip
    if not (measured["read"] < UNREAD and measured["before"] < SAME):
        raise ModelRefused(
            f"the planted horizon is not exact: later tokens still give {measured['read']:.1e} of "
            f"their attention to image keys from block {layer} on (limit {UNREAD:.0e}), and "
            f"attention before it changes by {measured['before']:.1e} (limit {SAME:.0e})."
        )
    return measured


# ----------------------------------------------------------------------------------- families


def tiny_llava(
    rng: np.random.Generator,
    *,
    n_layers: SupportsIndex = 4,
    heads: SupportsIndex = 4,
    kv_heads: SupportsIndex = 2,
    d_head: SupportsIndex = 8,
    side: SupportsIndex = 4,
    vocabulary: SupportsIndex = VOCABULARY,
    positions: SupportsIndex = 1024,
    bias: bool = True,
) -> LlavaForConditionalGeneration:
    """A small random LLaVA whose attention is far from even; `side` x `side` image tokens.

    Example:
        >>> model = tiny_llava(np.random.default_rng(0), n_layers=3, side=2)
        >>> len(picture_prompt(model, np.random.default_rng(0)).segment("image"))
        4
    """
    torch.manual_seed(int(rng.integers(2**31)))
    width = int(heads) * int(d_head)
    return LlavaForConditionalGeneration(LlavaConfig(
        vision_config=CLIPVisionConfig(
            hidden_size=12, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
            image_size=4 * int(side), patch_size=4, projection_dim=12, initializer_factor=2.0,
        ),
        text_config=LlamaConfig(
            vocab_size=int(vocabulary), hidden_size=width, intermediate_size=3 * width // 2,
            num_hidden_layers=int(n_layers), num_attention_heads=int(heads),
            num_key_value_heads=int(kv_heads), head_dim=int(d_head),
            max_position_embeddings=int(positions), attention_bias=bias, bos_token_id=BOS,
            eos_token_id=2, pad_token_id=0, tie_word_embeddings=False,
            initializer_range=1.5 / width**0.5,
        ),
        image_token_index=IMAGE, image_seq_length=int(side) ** 2, vision_feature_layer=-1,
        vision_feature_select_strategy="default",
    )).eval()  # fmt: skip


def picture_prompt(
    model: PreTrainedModel,
    rng: np.random.Generator,
    before: SupportsIndex = 2,
    after: SupportsIndex = 5,
) -> Prompt:
    """Random text, a random picture and random text, with the grid of the picture's tokens."""
    config = model.config.vision_config
    side = config.image_size // config.patch_size
    size = config.patch_size
    words = rng.integers(5, embedding(model).shape[0], int(before) + int(after))
    first, last = words[: int(before)].tolist(), words[int(before) :].tolist()
    first[:1] = [BOS]
    image = int(model.config.image_token_index)
    boxes = tuple((float(c * size), float(r * size), float((c + 1) * size), float((r + 1) * size))
                  for r in range(side) for c in range(side))
    where = tuple(range(int(before), int(before) + side**2))
    pixels = rng.standard_normal((1, 3, config.image_size, config.image_size))
    return Prompt((*first, *[image] * side**2, *last),
                  (Segment("image", where, "image", (side, side), boxes),),
                  inputs={"pixel_values": pixels.astype(np.float32)})


def as_inputs(prompt: Prompt) -> dict[str, Tensor]:
    """What the model's forward takes."""
    return {"input_ids": torch.tensor([prompt.ids]),
            **{name: torch.as_tensor(value) for name, value in prompt.inputs.items()}}


@dataclass(frozen=True, eq=False)
class HorizonCase:
    """A model with a planted horizon and a prompt with a picture; `planted.layer` is the truth."""

    planted: PlantedHorizon
    prompt: Prompt


def horizon_family(
    rng: np.random.Generator, n: SupportsIndex = 50, per_shape: SupportsIndex = 10
) -> Iterator[HorizonCase]:
    """Yield models that differ in depth, width, grouping of heads, picture, seed and planted block.

    Example:
        >>> case = next(horizon_family(np.random.default_rng(0)))
        >>> 1 <= case.planted.layer < len(parts(case.planted.model))
        True

    So many models in a row are of one shape: their weights, texts, pictures and blocks differ.
    """
    shape: dict[str, Any] = {}
    for number in range(int(n)):
        if number % int(per_shape) == 0:
            heads = int(rng.choice((2, 4, 6)))
            shape = {
                "n_layers": int(rng.integers(4, 8)), "heads": heads,
                "kv_heads": int(rng.choice([k for k in (1, 2, heads) if heads % k == 0])),
                "d_head": int(rng.choice((6, 8, 12))), "side": int(rng.integers(2, 5)),
                "bias": bool(rng.integers(2)),
            }  # fmt: skip
        model = tiny_llava(rng, **shape)
        prompt = picture_prompt(model, rng, int(rng.integers(1, 4)), int(rng.integers(3, 8)))
        layer = int(rng.integers(1, shape["n_layers"]))
        yield HorizonCase(image_horizon(model, layer, as_inputs(prompt)), prompt)
