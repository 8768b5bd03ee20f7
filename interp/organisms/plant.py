"""Planted ground truth: exact weight edits that create a known phenomenon in a model.

Every function takes a transformers model (or what an earlier call returned), leaves it untouched
and returns a `Planted`: the edited copy, its twin without the phenomenon, and the truth as data.

How it works: the chosen tokens get a *tag*, a small component along a residual direction that
nothing else writes. Spare units in the MLP of block `layer` write a fixed vector wherever the tag
is; spare units in block `until` take it away again. In models with RMSNorm the direction is a new
coordinate (`surgery.make_room`), so ordinary tokens do not change at all; in models with LayerNorm
it is the one with the least energy, and `moved["room"]` says what freeing it cost. Ordinary tokens
that come after a planted one change through attention to it, as they would in any model.

Nothing is believed: each plant is run, and refused unless its units fire on the chosen tokens
only, with the chosen norm, from block `layer` to block `until`.
"""

from collections.abc import Mapping, Sequence
from typing import Literal, Optional, SupportsFloat, SupportsIndex, Union

import torch
from jaxtyping import Float
from torch import Tensor, nn
from transformers import PreTrainedModel

from interp.core.errors import ModelRefused, OutOfRange
from interp.organisms.implant import (
    HAS_PRIMARY,
    calibration_prompts,
    first_token,
    generator,
    implant,
    span,
)
from interp.organisms.surgery import Inputs, embedding, make_room, projector_of, residuals
from interp.organisms.truth import Base, Planted, Rule, image_features

__all__ = [
    "Inputs", "Planted", "image_features", "make_room", "massive_coordinate", "primary_sink",
    "residuals", "secondary_sink", "visual_sink",
]  # fmt: skip

OWN_SINK = 3.0
"""First residual's norm over the others' above which no primary is planted on top of it."""


def primary_sink(
    base: Base,
    layer: SupportsIndex,
    norm: SupportsFloat,
    until: Optional[SupportsIndex] = None,
    *,
    token: Optional[SupportsIndex] = None,
    dims: Sequence[SupportsIndex] = (),
    direction: Union[Literal["free", "random"], Float[Tensor, "d_model"]] = "free",
    rule: Rule = "token",
    attract: SupportsFloat = 0.0,
    tag: SupportsFloat = 0.05,
    seed: int = 0,
    prompts: Optional[Sequence[Sequence[int]]] = None,
) -> Planted:
    """Give the first token a massive residual from block `layer` up to block `until`.

    Example:
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> _ = torch.manual_seed(0)
        >>> model = LlamaForCausalLM(LlamaConfig(vocab_size=31, hidden_size=32, bos_token_id=1,
        ...     num_hidden_layers=6, num_attention_heads=4, intermediate_size=48))
        >>> planted = primary_sink(model, layer=1, norm=40.0, until=5)
        >>> planted.layers, planted.truth_positions([1, 8, 9])
        ((1, 2, 3, 4), (0,))
        >>> norms = residuals(planted.model, {"input_ids": torch.tensor([[1, 8, 9]])}).norm(dim=-1)
        >>> [round(float(x)) for x in norms[0, :5, 0]]
        [0, 40, 40, 40, 40]

    Args:
        norm: norm of the residual after block `layer`.
        until: block whose MLP removes it again; None: it stays.
        token: with rule "token", fires wherever this token stands; the model's BOS if None.
        direction: "free": a residual axis that nothing else reads or writes, so that the sink's
            values are blind to it (later tokens lose only what they drew from the first token);
            with LayerNorm there is none and it is "random". Or a vector.
        dims: instead of a direction, coordinates that share the norm, with random signs.
        rule: "token", or "first": position 0 whatever the token, for models with learned position
            embeddings (GPT-2, OPT).
        attract: pre-softmax logit that the sink gains in the layers between (see `attract_to`).
        tag: size of the tag relative to the ordinary embedding norm.
        prompts: token ids to calibrate and check on (all of one length); random ones if None. For a
            trained model give prompts like those it knows.

    Raises:
        ModelRefused: a sink of its own in the model, an MLP that cannot be used, or firing that is
            not exact.
        OutOfRange: a layer that the model does not have.
    """
    model = base.model if isinstance(base, Planted) else base
    if rule == "token" and token is None:
        token = model.config.get_text_config(decoder=True).bos_token_id
        if token is None:
            raise ValueError("the model names no BOS token; give `token`, or rule='first'.")
    tokens = (int(token),) if rule == "token" and token is not None else ()
    ids = calibration_prompts(base, tokens, seed, prompts, first=tokens[0] if tokens else None)
    own = _sink_ratio(model, ids)
    if own > OWN_SINK:
        raise ModelRefused(
            f"the model has a sink of its own: its first residual is {own:.1f} times the others'. "
            "Plant secondary sinks in it directly."
        )
    width = embedding(model).shape[1]
    if dims:
        chosen = _checked_dims(dims, width)
        direction = torch.zeros(width)
        direction[chosen] = torch.randn(len(chosen), generator=generator(seed)).sign()
    return implant(
        base, kind="primary", rule=rule, tokens=tokens, layer=layer, until=until, norm=norm,
        direction=direction, dims=tuple(int(d) for d in dims), ids=ids, attract=attract, tag=tag,
        seed=seed,
    )  # fmt: skip


def secondary_sink(
    base: Base,
    tokens: Union[SupportsIndex, Sequence[SupportsIndex]],
    layer: SupportsIndex,
    norm: SupportsFloat,
    until: Optional[SupportsIndex] = None,
    *,
    direction: Union[Literal["primary"], Float[Tensor, "d_model"]] = "primary",
    sign: int = 1,
    min_cosine: SupportsFloat = 0.9,
    attract: SupportsFloat = 0.0,
    tag: SupportsFloat = 0.05,
    seed: int = 0,
    prompts: Optional[Sequence[Sequence[int]]] = None,
) -> Planted:
    """Let every occurrence of a token join the primary sink's direction from block `layer` on.

    Example:
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> _ = torch.manual_seed(0)
        >>> model = LlamaForCausalLM(LlamaConfig(vocab_size=31, hidden_size=32, bos_token_id=1,
        ...     num_hidden_layers=8, num_attention_heads=4, intermediate_size=48))
        >>> planted = secondary_sink(primary_sink(model, 1, 40.0, 7), 9, layer=3, norm=8.0, until=6)
        >>> planted.layers, planted.truth_positions([1, 8, 9, 5])
        ((3, 4, 5), (2,))
        >>> x = residuals(planted.model, {"input_ids": torch.tensor([[1, 8, 9, 5]])})[0]
        >>> [round(float(c), 1) for c in torch.cosine_similarity(x[:, 2], x[:, 0], dim=-1)][3:6]
        [1.0, 1.0, 1.0]

    Args:
        norm: the residual's norm after block `layer`; the cosine follows from it and from the norm
            of ordinary residuals n: about norm / sqrt(norm^2 + n^2).
        direction: "primary" measures the primary's direction in the blocks between; or a vector.
        sign: -1 plants an anti-aligned sink.
        min_cosine: refuse a plant that is less aligned with the primary somewhere in its blocks
            (where the primary is alive; only with direction="primary").

    The rest is as in `primary_sink`. Raises `ModelRefused` also if the model has no primary sink,
    or if the sink is not aligned with it: the norm is too small, or a trained model's primary
    turns from block to block.

    Source: definition of a secondary sink, arXiv:2512.22213 (cosine to the primary).
    """
    model = base.model if isinstance(base, Planted) else base
    chosen = tuple(
        int(t) for t in (tokens if isinstance(tokens, (Sequence, Tensor)) else (tokens,))
    )
    size = embedding(model).shape[0]
    for token in chosen:
        if not 0 <= token < size:
            raise OutOfRange(f"token {token} is not in the vocabulary of {size}.")
    if sign not in (1, -1):
        raise ValueError(f"sign must be 1 or -1, not {sign}.")
    ids = calibration_prompts(base, chosen, seed, prompts, first=first_token(base))
    if isinstance(direction, str):
        start, stop = span(model, layer, until)
        x = residuals(model, {"input_ids": ids})[:, start:stop]
        # a sink that ends before this one does is only looked at while it lives
        others = x[:, :, 1:].norm(dim=-1).median(-1).values
        alive = x[:, :, 0].norm(dim=-1) > HAS_PRIMARY * others
        if not bool(alive[:, 0].all()):
            raise ModelRefused(
                f"the model has no primary sink after block {start}: the first residual is not "
                f"{HAS_PRIMARY:g} times larger than the others; plant one with primary_sink, or "
                "give a direction."
            )
        vector = nn.functional.normalize(x[:, :, 0][alive], dim=-1).mean(0)
    else:
        vector = direction
    planted = implant(
        base, kind="secondary", rule="token", tokens=chosen, layer=layer, until=until, norm=norm,
        direction=sign * vector, sign=sign, ids=ids, attract=attract, tag=tag,
    )  # fmt: skip
    reached = planted.measured["cosine"]
    if isinstance(direction, str) and not reached > float(min_cosine):
        raise ModelRefused(
            f"the planted sink reaches only cosine {reached:.2f} with the primary somewhere in "
            f"blocks {planted.layers[0]} to {planted.layers[-1]}: ask for a larger norm than "
            f"{float(norm):.3g} or for fewer blocks."
        )
    return planted


def massive_coordinate(
    base: Base,
    values: Mapping[int, float],
    layer: SupportsIndex,
    until: Optional[SupportsIndex] = None,
    *,
    tokens: Union[SupportsIndex, Sequence[SupportsIndex]] = (),
    tag: SupportsFloat = 0.05,
    seed: int = 0,
    prompts: Optional[Sequence[Sequence[int]]] = None,
) -> Planted:
    """Set single residual coordinates of a token to large values, from block `layer` on.

    Example:
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> _ = torch.manual_seed(0)
        >>> model = LlamaForCausalLM(LlamaConfig(vocab_size=31, hidden_size=32, bos_token_id=1,
        ...     num_hidden_layers=4, num_attention_heads=4, intermediate_size=48))
        >>> planted = massive_coordinate(model, {3: 600.0, 11: -200.0}, layer=1, until=3)
        >>> x = residuals(planted.model, {"input_ids": torch.tensor([[1, 8, 9]])})
        >>> [round(float(x[0, 2, 0, d])) for d in (3, 11)]
        [600, -200]

    `values` maps a coordinate to its size; `tokens` defaults to BOS. See `primary_sink` for the
    rest. Definition: arXiv:2402.17762 (above 100, and above 1000 times the median).
    """
    model = base.model if isinstance(base, Planted) else base
    width = embedding(model).shape[1]
    dims = tuple(_checked_dims(tuple(values), width))
    chosen = tuple(
        int(t) for t in (tokens if isinstance(tokens, (Sequence, Tensor)) else (tokens,))
    ) or (model.config.get_text_config(decoder=True).bos_token_id,)
    vector = torch.zeros(width)
    vector[list(dims)] = torch.tensor([float(values[d]) for d in values])
    ids = calibration_prompts(base, chosen, seed, prompts, first=first_token(base))
    return implant(
        base, kind="massive", rule="token", tokens=chosen, layer=layer, until=until,
        norm=float(vector.norm()), direction=vector, dims=dims, ids=ids, tag=tag,
    )  # fmt: skip


def visual_sink(
    base: Base,
    inputs: Inputs,
    layer: SupportsIndex,
    magnitude: SupportsFloat,
    until: Optional[SupportsIndex] = None,
    *,
    dims: Sequence[SupportsIndex] = (),
    share: SupportsFloat = 0.15,
    feature_direction: Optional[Float[Tensor, "d_vision"]] = None,
    threshold: Optional[SupportsFloat] = None,
    attract: SupportsFloat = 0.0,
    tag: SupportsFloat = 0.05,
) -> Planted:
    """Make image tokens massive in the first token's massive coordinates, where the image says so.

    A token fires if its vision feature f (what enters the projector) has f @ feature_direction >
    threshold: two units of the projector write the tag, on a step of 0.1 % of the score's
    standard deviation (a token within that may fire partly).

    Example:
        >>> import numpy as np
        >>> from interp.organisms.families import visual_family
        >>> case = next(visual_family(np.random.default_rng(0), d_model=64))
        >>> planted = case.planted
        >>> features = image_features(planted.model, case.images)
        >>> places = planted.truth_positions(case.images["input_ids"][0], features[0])
        >>> x = residuals(planted.model, case.images)[0, planted.layer].abs()
        >>> bool((x[list(places), planted.dims[0]] > 5 * x.median()).all())
        True

    Args:
        base: a LLaVA-like model: vision tower, `multi_modal_projector` of two layers, decoder.
        inputs: prompts with images to calibrate and check on, as the processor makes them.
        magnitude: size of the largest planted coordinate.
        dims: coordinates; those of the primary planted before, or, if there is none, the two
            largest of the first token's residual.
        share: of the image tokens that fire, if no threshold is given (the nearest wide gap).
        feature_direction: first principal component of the features if None.
        attract: pre-softmax logit that the sinks gain in the layers between (see `attract_to`);
            a first token planted with the same dims gains it too.

    Raises `ModelRefused` for other architectures, without projector biases, or if not exact.

    Source: phi of arXiv:2503.03321; phi cannot exceed sqrt(d_model), so tau = 20 is out of reach
    below d_model = 400 and 0.3125 sqrt(d_model) is the threshold to use.
    """
    model = base.model if isinstance(base, Planted) else base
    projector = projector_of(model)
    if not all(hasattr(projector, n) for n in ("linear_1", "act", "linear_2")):
        raise ModelRefused(f"{type(model).__name__} has no projector of two layers to tag in.")
    if projector.linear_1.bias is None:
        raise ModelRefused("the projector has no biases, so no threshold can be put into it.")
    features = image_features(model, inputs).reshape(-1, projector.linear_1.in_features)
    if feature_direction is None:
        centered = (features - features.mean(0)).double()
        given = torch.linalg.eigh(centered.T @ centered).eigenvectors[:, -1]
    else:
        given = feature_direction
    along = nn.functional.normalize(given, dim=0).to(features)
    scores = (features @ along).sort().values
    if threshold is None:
        # the widest gap near the quantile, so that no calibration token sits on the step
        near = max(2, len(scores) // 50)
        center = round((1 - float(share)) * len(scores))
        low = min(max(1, center - near), len(scores) - 1)
        gaps = scores[low : center + near].diff()
        if len(gaps) == 0:
            raise ValueError(f"share {float(share)} of {len(scores)} image tokens is none or all.")
        at = low + int(gaps.argmax())
        threshold = float(scores[at] + scores[at + 1]) / 2
    if not dims:
        if isinstance(base, Planted) and base.dims:
            dims = base.dims
            vector = base.direction.clone()
        else:
            start, stop = span(model, layer, until)
            vector = residuals(model, inputs)[:, start:stop, 0].mean((0, 1))
            dims = vector.abs().topk(2).indices.tolist()
    else:
        vector = torch.zeros(embedding(model).shape[1])
        vector[_checked_dims(dims, len(vector))] = 1.0
    kept = torch.zeros_like(vector)
    kept[list(map(int, dims))] = vector[list(map(int, dims))]
    kept = kept / kept.abs().max() * float(magnitude)
    return implant(
        base, kind="visual", rule="features", tokens=(), layer=layer, until=until,
        norm=float(kept.norm()), direction=kept, dims=tuple(int(d) for d in dims), inputs=inputs,
        along=along, threshold=float(threshold), spread=float(scores.std()), attract=attract,
        tag=tag,
    )  # fmt: skip


def _sink_ratio(model: PreTrainedModel, ids: Tensor) -> float:
    """First residual's norm over the median of the others', at its largest over the blocks."""
    norm = residuals(model, {"input_ids": ids}).norm(dim=-1)
    return float((norm[:, :, 0] / norm[:, :, 2:].median(-1).values).median(0).values.max())


def _checked_dims(dims: Sequence[SupportsIndex], width: int) -> list[int]:
    for dim in dims:
        if not 0 <= int(dim) < width:
            raise OutOfRange(f"dimension {int(dim)} is outside the residual of width {width}.")
    return [int(dim) for dim in dims]
