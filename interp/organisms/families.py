"""Families of planted models, to score a detector of sinks against the truth.

Each case is a small random transformer with planted sinks, its twin without them (decoys and
primary sink stay), prompts, and where the sinks are. A detector that is right must find them in
the one and nothing in the other.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, SupportsIndex

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformers import (
    CLIPVisionConfig,
    LlamaConfig,
    LlamaForCausalLM,
    LlavaConfig,
    LlavaForConditionalGeneration,
    PreTrainedModel,
)

from interp.core.errors import ModelRefused
from interp.organisms.plant import (
    Inputs,
    Planted,
    image_features,
    make_room,
    primary_sink,
    residuals,
    secondary_sink,
    visual_sink,
)

VOCABULARY, BOS, IMAGE = 97, 1, 4
SIDE, PATCH = 24, 4  # 36 image tokens


@dataclass(frozen=True, eq=False)
class SecondaryCase:
    """A model with secondary sinks. `truth[i]` maps the sinks of prompt i to their layers."""

    planted: Planted
    prompts: Int[Tensor, "prompt position"]
    truth: tuple[dict[int, tuple[int, ...]], ...]
    strength: float
    decoys: tuple[str, ...]


@dataclass(frozen=True, eq=False)
class VisualCase:
    """A model with visual sinks; `truth[i]` holds the sink positions of image prompt i."""

    planted: Planted
    text: Inputs
    images: Inputs
    image: slice
    truth: tuple[tuple[int, ...], ...]
    strength: float


SecondaryDetector = Callable[[Float[Tensor, "layer position d_model"]], Any]
"""Post-block residual of one prompt -> {position: (layers, label)}, or an object with `.levels`."""

VisualDetector = Callable[[PreTrainedModel, VisualCase], tuple[Sequence[int], Sequence[Any]]]
"""A model and the case's prompts -> sink dimensions, and sink positions per image prompt."""


def _llama(rng: np.random.Generator, n_layers: int, d_model: int) -> LlamaConfig:
    return LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=d_model, intermediate_size=3 * d_model // 2,
        num_hidden_layers=n_layers, num_attention_heads=4, num_key_value_heads=2,
        bos_token_id=BOS, pad_token_id=0, eos_token_id=2, max_position_embeddings=256,
        initializer_range=float(rng.uniform(0.4, 0.6)) / d_model**0.5, tie_word_embeddings=False,
    )  # fmt: skip


def _typical_norm(model: PreTrainedModel, ids: Tensor, layer: int) -> float:
    """Median norm of later tokens' residuals after a block."""
    x = residuals(model, {"input_ids": ids})[:, layer, 2:]
    return float(x.norm(dim=-1).median())


def secondary_family(
    rng: np.random.Generator,
    n: SupportsIndex = 50,
    rule: Literal["official", "relative"] = "official",
    d_model: SupportsIndex = 64,
    strengths: tuple[float, float] = (3.0, 60.0),
    per_base: SupportsIndex = 4,
) -> Iterator[SecondaryCase]:
    """Yield models with secondary sinks that differ in layer, norm, lifetime, token and sign.

    Example:
        >>> case = next(secondary_family(np.random.default_rng(0), rule="relative"))
        >>> layers = {layers for truth in case.truth for layers in truth.values()}
        >>> layers == {case.planted.layers}
        True

    Args:
        rule: depth and lifetimes that this rule of the paper calls secondary. "official": 24 to
            30 blocks, lifetimes above 4 and below the depth less 15. "relative": 9 to 14 blocks.
        strengths: range (log-uniform) of the sink's norm over ordinary tokens' norm.
        per_base: models planted in one random model with one primary sink.

    Half of the models also hold a decoy that must not be called secondary: a massive token at
    cosine 0.5 to 0.8 with the primary, or an aligned one that does not last.
    """
    base: Planted
    for i in range(int(n)):
        if i % int(per_base) == 0:
            n_layers = int(rng.integers(24, 31) if rule == "official" else rng.integers(9, 15))
            torch.manual_seed(int(rng.integers(2**31)))
            model = LlamaForCausalLM(_llama(rng, n_layers, int(d_model))).eval()
            model = make_room(model, directions=4, units=16)
            ids = torch.from_numpy(rng.integers(5, VOCABULARY, (4, 32)))
            start = int(rng.integers(1, 4 if rule == "official" else 3))
            stop = n_layers - int(rng.integers(1, 3))
            base = primary_sink(
                model, start, _typical_norm(model, ids, stop) * float(rng.uniform(30, 200)), stop,
                direction=("free", "random")[int(rng.integers(2))], seed=int(rng.integers(2**31)),
            )  # fmt: skip
        yield _secondary_case(rng, base, rule, strengths)


def _secondary_case(
    rng: np.random.Generator, base: Planted, rule: str, strengths: tuple[float, float]
) -> SecondaryCase:
    first, last = base.layer, base.layers[-1] + 1
    n_layers = base.model.config.num_hidden_layers
    gap = max(2, -(-n_layers // 10))
    if rule == "official":
        longest, shortest, too_short = n_layers - 16, 5, 4
    else:
        longest, shortest, too_short = last - first - gap, gap, gap - 1
    lifetime = int(rng.integers(shortest, min(longest, last - first - gap) + 1))
    layer = int(rng.integers(first + gap, last - lifetime + 1))
    tokens = rng.choice(np.arange(5, VOCABULARY), 4, replace=False).tolist()
    tokens, decoy = tokens[: int(rng.integers(1, 4))], tokens[3]

    probe = torch.from_numpy(rng.integers(5, VOCABULARY, (4, 32)))
    probe[:, 0] = BOS
    factor = float(np.exp(rng.uniform(*np.log(strengths))))
    before, decoys = base, ()
    if rng.random() < 0.5:
        before, decoys = _decoy(rng, base, decoy, layer, lifetime, too_short, probe)
    typical = _typical_norm(before.model, probe, layer + lifetime - 1)
    sign, seed = int(rng.choice([1, -1])), int(rng.integers(2**31))
    while True:
        try:
            planted = secondary_sink(
                before, tokens, layer, factor * typical, layer + lifetime, sign=sign, seed=seed
            )
            break
        except ModelRefused:
            # too weak to be one by definition in this model: nothing a detector should find
            factor *= 1.5
            if factor > 4 * strengths[1]:
                raise
    ordinary = np.setdiff1d(np.arange(5, VOCABULARY), [*tokens, decoy])
    prompts = rng.choice(ordinary, (3, 37))
    prompts[:, 0] = BOS
    for row in prompts[:2]:  # the third prompt holds none
        places = rng.permutation(np.arange(1, 37))
        count = int(rng.integers(1, 5))
        row[places[:count]] = rng.choice(tokens, count)
        row[places[count : count + 2]] = decoy
    return SecondaryCase(
        planted, torch.from_numpy(prompts),
        tuple({p: planted.layers for p in planted.truth_positions(row)} for row in prompts),
        factor, decoys,
    )  # fmt: skip


def _decoy(
    rng: np.random.Generator, base: Planted, token: int, layer: int, lifetime: int,
    too_short: int, probe: Tensor,
) -> tuple[Planted, tuple[str, ...]]:  # fmt: skip
    """Something massive that is no secondary sink."""
    seed = int(rng.integers(2**31))
    factor = float(rng.uniform(10, 60))
    if rng.random() < 0.5:
        lifetime = int(rng.integers(1, too_short + 1))
        norm = factor * _typical_norm(base.model, probe, layer + lifetime - 1)
        return secondary_sink(base, token, layer, norm, layer + lifetime, seed=seed), ("brief",)
    other = torch.from_numpy(rng.standard_normal(len(base.direction))).float()
    other -= (other @ base.direction) * base.direction
    for earlier in (base.tag,):
        if earlier is not None:
            other[earlier != 0] = 0.0
    used = residuals(base.model, {"input_ids": probe})[0, -1, 5] != 0
    other = torch.where(used, other, torch.zeros_like(other))  # free axes stay free
    other = other / other.norm()
    cosine = float(rng.uniform(0.5, 0.8))
    direction = cosine * base.direction + (1 - cosine**2) ** 0.5 * other
    norm = factor * _typical_norm(base.model, probe, layer + lifetime - 1)
    return (
        secondary_sink(base, token, layer, norm, layer + lifetime, direction=direction, seed=seed),
        (f"cosine {cosine:.2f}",),
    )


def evaluate_secondary(
    detector: SecondaryDetector, family: Iterable[SecondaryCase]
) -> dict[str, float]:
    """Score a detector of secondary sinks against the truth, position by position.

    Returns precision and recall over positions labeled "secondary", the share of found sinks whose
    first layer (`onset_exact`) and number of layers (`lifetime_exact`) are exactly the planted
    ones, and `controls_clean`: the share of twins in which no prompt shows a secondary sink.

    Example:
        >>> family = [next(secondary_family(np.random.default_rng(0), rule="relative"))]
        >>> evaluate_secondary(lambda residual: {}, family)["recall"]
        0.0
    """
    hits = false = missed = onset = lifetime = models = clean = 0
    for case in family:
        models += 1
        quiet = True
        for model, truths in (
            (case.planted.model, case.truth), (case.planted.twin, [{}] * len(case.truth)),
        ):  # fmt: skip
            for x, truth in zip(residuals(model, {"input_ids": case.prompts}), truths):
                found = _secondary(detector(x))
                if model is case.planted.twin:
                    quiet &= not found
                    continue
                hits += len(found.keys() & truth.keys())
                false += len(found.keys() - truth.keys())
                missed += len(truth.keys() - found.keys())
                for position in found.keys() & truth.keys():
                    onset += found[position][0] == truth[position][0]
                    lifetime += len(found[position]) == len(truth[position])
        clean += quiet
    return {
        "models": float(models), "sinks": float(hits + missed),
        "precision": _share(hits, hits + false), "recall": _share(hits, hits + missed),
        "onset_exact": _share(onset, hits), "lifetime_exact": _share(lifetime, hits),
        "controls_clean": _share(clean, models),
    }  # fmt: skip


def _secondary(found: Any) -> dict[int, tuple[int, ...]]:
    levels: Mapping[int, Any] = getattr(found, "levels", found)
    return {int(p): tuple(layers) for p, (layers, label) in levels.items() if label == "secondary"}


def _share(part: int, whole: int) -> float:
    return part / whole if whole else float("nan")


def visual_family(
    rng: np.random.Generator,
    n: SupportsIndex = 50,
    d_model: SupportsIndex = 256,
    strengths: tuple[float, float] = (2.0, 30.0),
    per_base: SupportsIndex = 4,
) -> Iterator[VisualCase]:
    """Yield LLaVA models whose first token and some image tokens share massive coordinates.

    They differ in dimensions, layer, size, share of image tokens and direction in feature space.
    The twin keeps the first token's massive coordinates and has no visual sink.

    Example:
        >>> case = next(visual_family(np.random.default_rng(0)))
        >>> len(case.truth), case.image, all(p in range(36 + 3) for p in case.truth[0])
        (4, slice(3, 39, None), True)

    Args:
        d_model: residual width. phi of a Gaussian vector reaches 0.3125 sqrt(d_model) by chance in
            1 of 170 coordinates at 75 and 1 of two million at 256: narrow models have sinks by
            that definition that nobody planted.
        strengths: range (log-uniform) of the largest planted coordinate over the ordinary norm.
    """
    base: Planted
    for i in range(int(n)):
        if i % int(per_base) == 0:
            base = _visual_base(rng, int(d_model))
        n_layers = len(base.layers) + base.layer + 1
        ids, at = torch.from_numpy(rng.integers(5, VOCABULARY, (4, 46))), slice(3, 39)
        ids[:, 0], ids[:, at] = BOS, IMAGE
        images = {"input_ids": ids, "pixel_values": _pictures(rng, len(ids))}
        layer = int(rng.integers(1, n_layers // 2))
        factor = float(np.exp(rng.uniform(*np.log(strengths))))
        norm = _typical_norm(base.model, ids[:, :3].repeat(1, 8), n_layers - 2)
        direction = torch.from_numpy(rng.standard_normal(_vision_width(base.model))).float()
        planted = visual_sink(
            base, {**images, "pixel_values": _pictures(rng, len(ids))}, layer, factor * norm,
            base.until, share=float(rng.uniform(0.05, 0.3)),
            feature_direction=None if rng.random() < 0.5 else direction,
        )  # fmt: skip
        text = torch.from_numpy(rng.integers(5, VOCABULARY, (8, 29)))
        text[:, 0] = BOS
        features = image_features(planted.model, images)
        truth = tuple(planted.truth_positions(row, f) for row, f in zip(ids, features))
        yield VisualCase(planted, {"input_ids": text}, images, at, truth, factor)


def _vision_width(model: PreTrainedModel) -> int:
    return int(model.config.vision_config.hidden_size)


def _pictures(rng: np.random.Generator, count: int) -> Tensor:
    """Smooth random pictures: neighboring patches look alike, as in a real background."""
    coarse = torch.from_numpy(rng.standard_normal((count, 3, 4, 4))).float()
    smooth = torch.nn.functional.interpolate(coarse, (SIDE, SIDE), mode="bilinear")
    return smooth + 0.1 * torch.from_numpy(rng.standard_normal(smooth.shape)).float()


def _visual_base(rng: np.random.Generator, d_model: int) -> Planted:
    """A random LLaVA whose BOS is massive in one to three coordinates."""
    torch.manual_seed(int(rng.integers(2**31)))
    n_layers = int(rng.integers(6, 10))
    model = LlavaForConditionalGeneration(LlavaConfig(
        vision_config=CLIPVisionConfig(
            hidden_size=24, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2,
            image_size=SIDE, patch_size=PATCH, projection_dim=24,
        ),
        text_config=_llama(rng, n_layers, d_model), image_token_index=IMAGE,
        image_seq_length=(SIDE // PATCH) ** 2, vision_feature_layer=-1,
    )).eval()  # fmt: skip
    model = make_room(model, directions=4, units=32)
    ids = torch.from_numpy(rng.integers(5, VOCABULARY, (4, 24)))
    norm = _typical_norm(model, ids, n_layers - 2)
    dims = rng.choice(d_model, int(rng.integers(1, 4)), replace=False).tolist()
    return primary_sink(
        model, 0, norm * float(rng.uniform(50, 300)), n_layers - 1, dims=dims,
        seed=int(rng.integers(2**31)),
    )


def evaluate_visual(detector: VisualDetector, family: Iterable[VisualCase]) -> dict[str, float]:
    """Score a detector of visual sinks: dimensions, positions inside the image, and controls.

    `dims_found` is the share of models in which exactly the planted dimensions are found;
    `controls_clean` the share of twins in which no image token is reported.

    Example:
        >>> family = [next(visual_family(np.random.default_rng(0), d_model=64))]
        >>> def blind(model, case):
        ...     return [], [[] for _ in case.truth]
        >>> evaluate_visual(blind, family)["controls_clean"]
        1.0
    """
    hits = false = missed = models = clean = dims_found = 0
    for case in family:
        models += 1
        inside = set(range(case.image.start, case.image.stop))
        dims, positions = detector(case.planted.model, case)
        dims_found += {int(d) for d in dims} == set(case.planted.dims)
        for given, truth in zip(positions, case.truth):
            found = {int(p) for p in given} & inside
            hits += len(found & set(truth))
            false += len(found - set(truth))
            missed += len(set(truth) - found)
        _, positions = detector(case.planted.twin, case)
        clean += not any({int(p) for p in given} & inside for given in positions)
    return {
        "models": float(models), "sinks": float(hits + missed),
        "dims_found": _share(dims_found, models), "precision": _share(hits, hits + false),
        "recall": _share(hits, hits + missed), "controls_clean": _share(clean, models),
    }  # fmt: skip
