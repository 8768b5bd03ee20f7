"""Planted sinks: tokens that join the primary sink's direction, image tokens with its coordinates."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Optional

import numpy as np
import torch

from experiments._ground_truth_beds import Bed, batched, first_token, ordinary
from experiments._ground_truth_table import Look
from interp.core import ModelRefused, Prompt
from interp.models.model import Model
from interp.organisms.dial import Dial, write_dial
from interp.organisms.plant import (
    Planted,
    image_features,
    make_room,
    primary_sink,
    residuals,
    secondary_sink,
    visual_sink,
)
from interp.organisms.surgery import image_token
from interp.sinks import secondary, visual

ATTRACT = 3.0
"""Logits that a planted sink gains where it is fully there, so that attention can see it too."""

PRIMARY, DECOY, LARGEST = 60.0, 12.0, 16.0
"""Norms over the ordinary norm: of the primary sink, of decoys, and of what is planted before it is
turned down."""

SLANT = 0.6
"""Cosine of the decoy's direction to the primary's."""


@dataclass(eq=False)
class SecondaryPlace:
    """Tokens that join the primary's direction; `unit` is how many ordinary norms the dial's 1 is."""

    model: Model
    planted: Planted
    dial: Dial
    unit: float
    prompts: list[Prompt]
    decoys: list[Prompt]

    def look(self, strength: float, decoy: bool) -> Look:
        self.dial.set(self.model.hf, strength / self.unit)
        prompts = self.decoys if decoy else self.prompts
        found = secondary.measure(self.model, prompts)
        table = secondary.sinks(found)
        n_layers, length = self.model.n_layers, len(prompts[0])
        reported = np.zeros((len(prompts), length, n_layers))
        chosen = (table["label"] == "secondary").to_numpy()
        for row, member in zip(table[chosen].itertuples(), found["member"].values[chosen]):
            reported[row.prompt, row.position] = member
        norm = found["norm"].transpose("prompt", "position", "layer").values
        received = _before(found["received"].transpose("prompt", "position", "layer").values)
        truth = np.zeros(reported.shape, dtype=bool)
        for number, prompt in enumerate(prompts):
            for position in self.planted.truth_positions(prompt.ids):
                truth[number, position, list(self.planted.layers)] = True
        # The first position is the primary sink, the last one receives nothing.
        return Look(_rows(truth), {
            "secondary.measure": _rows(reported),
            "attention received": _rows(beside(received)),
            "state norm": _rows(norm / np.median(norm[:, 1:], axis=1, keepdims=True)),
        })


def _rows(values: np.ndarray) -> np.ndarray:
    """Positions of all prompts, without the first and the last, one below the other."""
    return values[:, 1:-1].reshape(-1, values.shape[-1])


def _before(received: np.ndarray) -> np.ndarray:
    """What a block's attention reads is what the block before wrote."""
    return np.concatenate([received[..., 1:], np.full_like(received[..., :1], np.nan)], -1)


def beside(received: np.ndarray, reach: int = 8) -> np.ndarray:
    """Attention received, in units of the neighbors' median: early keys receive more of it anyway."""
    made = np.full(received.shape, np.nan)
    for position in range(received.shape[1] - 1):
        around = [p for p in range(max(1, position - reach), min(received.shape[1] - 1,
                                                                 position + reach + 1))
                  if p != position]
        made[:, position] = received[:, position] / np.median(received[:, around], axis=1)
    return made


def secondary_places(
    bed: Bed, rng: np.random.Generator, count: int, n_layers: int = 8, prompts: int = 2
) -> Iterator[SecondaryPlace]:
    """Random models with a primary sink, one aligned later sink and one massive token that is none."""
    for _ in range(count):
        hf = make_room(bed.text(rng, n_layers), directions=4, units=16)
        words = ordinary(hf)
        token, other = (int(t) for t in rng.choice(words, 2, replace=False))
        rest = np.setdiff1d(words, [token, other])
        ids = rng.choice(rest, (2, 24))
        n_layers = hf.config.get_text_config(decoder=True).num_hidden_layers
        stop = n_layers - 1
        first = max(1, n_layers // 8)
        base = with_primary(hf, first, stop, _typical(hf, ids, stop), rng)
        gap = max(2, -(-n_layers // 10))
        if stop - first < 2 * gap:
            raise ModelRefused(f"{n_layers} layers are too few for a sink that starts later and lasts.")
        length = int(rng.integers(gap, stop - first - gap + 1))
        layer = int(rng.integers(first + gap, stop - length + 1))
        seed = int(rng.integers(2**31))
        size = _typical(_hf(base), ids, layer)
        decoy = secondary_sink(base, other, layer, DECOY * size, layer + length,
                               direction=_slanted(base, layer, rng), seed=seed)
        planted = secondary_sink(decoy, token, layer, LARGEST * size, layer + length, min_cosine=-1,
                                 attract=ATTRACT, seed=seed)
        made = []
        for special in (token, other):
            texts = rng.choice(rest, (prompts, 28))
            start = first_token(hf)
            if start is not None:
                texts[:, 0] = start
            for row in texts:
                row[rng.choice(np.arange(4, 26), 2, replace=False)] = special
            made.append([Prompt.from_tokens(row.tolist()) for row in texts])
        yield SecondaryPlace(bed.open(planted.model), planted, write_dial(planted),
                             planted.measured["written"] / size, *made)


def with_primary(hf: Any, layer: int, until: int, norm: float, rng: np.random.Generator,
                 **more: Any) -> Any:
    """The model with a primary sink: its own, where it has one."""
    try:
        return primary_sink(hf, layer, PRIMARY * norm, until, seed=int(rng.integers(2**31)), **more)
    except ModelRefused as error:
        if "sink of its own" in str(error):
            return hf
        raise


def _hf(base: Any) -> Any:
    return base.model if isinstance(base, Planted) else base


def _slanted(base: Any, layer: int, rng: np.random.Generator) -> torch.Tensor:
    """A direction at cosine `SLANT` with the primary's, without what only plants use."""
    first = first_token(_hf(base))
    ids = torch.from_numpy(rng.choice(ordinary(_hf(base)), (1, 12)))
    if first is not None:
        ids[:, 0] = first
    states = residuals(_hf(base), {"input_ids": ids})[0, layer]
    sink = torch.nn.functional.normalize(states[0], dim=0)
    aside = torch.from_numpy(rng.standard_normal(len(sink))).to(sink)
    aside[states[-1] == 0] = 0.0
    if isinstance(base, Planted) and base.tag is not None:
        tag = torch.nn.functional.pad(base.tag, (0, len(sink) - len(base.tag)))
        aside -= (aside @ tag) * tag
    aside -= (aside @ sink) * sink
    return SLANT * sink + (1 - SLANT**2) ** 0.5 * torch.nn.functional.normalize(aside, dim=0)


def _typical(hf: Any, ids: np.ndarray, layer: int) -> float:
    """Median norm of ordinary tokens' residuals after a block."""
    x = residuals(hf, {"input_ids": torch.from_numpy(ids)})[:, layer, 2:]
    return float(x.norm(dim=-1).median())


@dataclass(eq=False)
class VisualPlace:
    """Image tokens that are massive where the first token is; dims are found, not given."""

    model: Model
    planted: Planted
    dial: Dial
    unit: float
    decoy: Dial
    prompts: list[Prompt]
    text: list[Prompt]
    truth: list[tuple[int, ...]]
    dims: Optional[tuple[int, ...]] = None

    def look(self, strength: float, decoy: bool) -> Look:
        self.dial.set(self.model.hf, strength / self.unit)
        self.decoy.set(self.model.hf, float(decoy))
        if self.dims is None:
            # Text alone, so that what is planted in pictures has no part in it.
            self.dims = visual.find_sink_dims(self.model, self.text).found.dims
        places = self.prompts[0].segment("image").positions
        n_layers = self.model.n_layers
        truth = np.zeros((len(self.prompts), len(places), n_layers), dtype=bool)
        for number, fires in enumerate(self.truth):
            # phi is of what enters a layer.
            rows = [places.index(p) for p in fires]
            layers = [layer + 1 for layer in self.planted.layers if layer + 1 < n_layers]
            truth[np.ix_([number], rows, layers)] = True
        states = self.model.run(self.prompts, read="resid_pre", logits="none").reads["resid_pre"]
        norm = np.linalg.norm(states.values[:, :, list(places)], axis=-1).transpose(0, 2, 1)
        reported, received = np.zeros(truth.shape), np.ones(truth.shape)
        if self.dims:
            found = visual.measure(self.model, self.prompts, list(self.dims)).data.isel(
                position=list(places)).transpose("prompt", "position", "layer", ...)
            reported, received = found["is_sink"].values.astype(float), found["received"].values
        return Look(truth.reshape(-1, n_layers), {
            "visual.measure": reported.reshape(-1, n_layers),
            "attention received": _over_median(received).reshape(-1, n_layers),
            "state norm": _over_median(norm).reshape(-1, n_layers),
        })


def _over_median(values: np.ndarray) -> np.ndarray:
    return values / np.median(values, axis=1, keepdims=True)


def visual_places(
    bed: Bed, rng: np.random.Generator, count: int, n_layers: int = 5, prompts: int = 2
) -> Iterator[VisualPlace]:
    """LLaVA-like models with a massive first token, image tokens that share its coordinates, and as
    massive ones in other coordinates."""
    for _ in range(count):
        hf = make_room(bed.picture(rng, n_layers, width=256, spread=1 / 3), directions=4, units=32)
        text = hf.config.get_text_config(decoder=True)
        words, stop = ordinary(hf), text.num_hidden_layers - 1
        if stop < 3:
            raise ModelRefused(f"{stop + 1} layers are too few for a sink that lasts.")
        ids = rng.choice(words, (4, 24))
        width = text.hidden_size
        size = _typical(hf, ids, stop - 1)
        dims = rng.choice(first_width(bed, width), 5, replace=False).tolist()
        base = with_primary(hf, 0, stop, 3 * size, rng, dims=dims[:2])
        layer = int(rng.integers(1, max(2, stop // 2)))
        calibration = batched(bed.pictures(hf, rng, 4))
        directions = [torch.from_numpy(rng.standard_normal(
            hf.config.vision_config.hidden_size)).float() for _ in range(2)]
        places = image_places_of(calibration, hf)
        states = residuals(_hf(base), calibration)[:, layer, places]
        size = float(states.norm(dim=-1).median())
        decoy = visual_sink(base, calibration, layer, DECOY * size, stop, dims=dims[2:], share=0.15,
                            feature_direction=directions[1])
        planted = visual_sink(decoy, calibration, layer, LARGEST * size, stop, share=0.15,
                              dims=base.dims if isinstance(base, Planted) else (),
                              feature_direction=directions[0], attract=ATTRACT)
        pictures, truth = _shown(bed, planted, decoy, rng, prompts)
        texts = rng.choice(words, (3, 24))
        start = first_token(hf)
        if start is not None:
            texts[:, 0] = start
        yield VisualPlace(
            bed.open(planted.model), planted, write_dial(planted),
            planted.measured["written"] / size, write_dial(decoy), pictures,
            [Prompt.from_tokens(row.tolist()) for row in texts], truth)


def _shown(
    bed: Bed, planted: Planted, decoy: Planted, rng: np.random.Generator, count: int
) -> tuple[list[Prompt], list[tuple[int, ...]]]:
    """Pictures, each with a planted sink, and some with a decoy too."""
    for _ in range(40):
        pictures = bed.pictures(planted.model, rng, count)
        features = image_features(planted.model, batched(pictures))
        truth, aside = ([made.truth_positions(p.ids, f) for p, f in zip(pictures, features)]
                        for made in (planted, decoy))
        if all(truth) and any(aside):
            return pictures, truth
    raise ModelRefused("no pictures were found in which both the planted sinks and the decoy occur.")


def image_places_of(inputs: dict[str, torch.Tensor], hf: Any) -> list[int]:
    """Where the image is, in prompts that have it at one place."""
    return (inputs["input_ids"][0] == image_token(hf)).nonzero().flatten().tolist()


def first_width(bed: Bed, width: int) -> int:
    """Coordinates that massive values may use: those that were there before room was made."""
    return width if bed.base is None else int(bed.base.d_model)
