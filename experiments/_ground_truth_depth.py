"""Planted depths: the block from which an image is no longer read, the layer in which a feature is
born."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from experiments._ground_truth_beds import Bed, first_token, ordinary
from experiments._ground_truth_table import Look
from interp.core import ModelRefused, Prompt, each, edit
from interp.flow import horizon
from interp.models.model import Model
from interp.organisms.dial import Dial
from interp.organisms.plant_horizon import as_inputs, image_horizon
from interp.organisms.surgery import parts
from interp.stream.per_layer import PerLayer
from interp.stream.reducers import SegmentMass
from probes.sweep import sweep

SHIFT = 1000.0
"""By how many logits image keys fall where the horizon is exact."""

ATTENTIVE, SHARP = 6.0, 3.0
"""Random models hardly use what they read and say nothing with confidence: what attention writes, and
the unembedding, are so much larger here, so that every block's reading changes the answer's probability
and the end of the model is no horizon."""

DECOY_EFFECT = 4.0
"""Standard deviations of the decoy feature, which has nothing to do with the labels."""


@dataclass(eq=False)
class HorizonPlace:
    """Image keys fall by `strength` logits from a block on; in the decoy not for every head."""

    model: Model
    layer: int
    dial: Dial
    decoy: Dial
    prompt: Prompt
    random: int
    answer: int = -1

    def look(self, strength: float, decoy: bool) -> Look:
        hf, n_layers = self.model.hf, self.model.n_layers
        self.dial.set(hf, strength / SHIFT)
        self.decoy.set(hf, float(decoy) or strength / SHIFT)
        if self.answer < 0:
            self.answer = int(self.model.run(self.prompt, logits="last").logits[0][-1].argmax())
        found = horizon.horizons(horizon.information(
            self.model, self.prompt, self.answer, groups=horizon.windows(self.prompt)))
        truth = np.zeros((1, n_layers), dtype=bool)
        truth[0, self.layer :] = True
        return Look(truth, {
            "flow.horizon, H_info": _from(found["H_info"], n_layers),
            "flow.horizon, H_out": _from(found["H_out"], n_layers),
            "attention on the image": self._unread(),
            "random layer": _from(self.random, n_layers),
        })

    def _unread(self) -> np.ndarray:
        """How little attention the image gets from the text behind it, in any block from each on."""
        image = self.prompt.segment("image").positions
        run = self.model.run(self.prompt, stats=[PerLayer("segments", lambda *_: SegmentMass(
            {"image": image}))], logits="none")
        later = slice(max(image) + 1, None)
        mass = run.stats["segments"].isel(prompt=0, query=later).mean(("head", "query"))
        values = -np.maximum.accumulate(mass.values.reshape(-1)[::-1])[::-1]
        values[0] = np.nan
        return values[None]


def _from(layer: int | None, n_layers: int) -> np.ndarray:
    """One from a layer on, nothing for None."""
    made = np.zeros((1, n_layers))
    if layer is not None:
        made[0, layer:] = 1.0
    return made


def horizon_places(
    bed: Bed, rng: np.random.Generator, count: int, n_layers: int = 5
) -> Iterator[HorizonPlace]:
    """LLaVA-like models whose answer depends on the picture, and one picture for each."""
    for _ in range(count):
        hf: Any = bed.picture(rng, n_layers, width=32, side=4)
        if bed.base is None:
            with torch.no_grad():
                for part in parts(hf):
                    part.attention.o_proj.weight.mul_(ATTENTIVE)
                hf.get_output_embeddings().weight.mul_(SHARP)
        n_layers = hf.config.get_text_config(decoder=True).num_hidden_layers
        if n_layers < 3:
            raise ModelRefused(f"{n_layers} layers are too few for a horizon within them.")
        prompt = bed.pictures(hf, rng, 1, before=3, after=5)[0]
        layer = int(rng.integers(1, n_layers - 1))
        planted = image_horizon(hf, layer, as_inputs(prompt), shift=SHIFT)
        found = parts(planted.model)[layer:]
        keys = {id(part.attention.k_proj.weight) for part in found}
        names = [n for n, p in planted.model.named_parameters() if id(p) in keys]
        dial = Dial.between(planted.twin, planted.model, *names)
        group = int(found[0].attention.head_dim) * int(found[0].attention.k_proj.weight.shape[1])
        weights = {n: tuple(x[at >= group] for x in (at, off, change))
                   for n, (at, off, change) in dial.weights.items()}
        if not any(len(at) for at, _, _ in weights.values()):
            raise ModelRefused("all heads share their keys, so none can be left reading as a decoy.")
        yield HorizonPlace(bed.open(planted.model), layer, dial, Dial(weights), prompt,
                           int(rng.integers(1, n_layers)))


# ------------------------------------------------------------------------- linear features


@dataclass(eq=False)
class FeaturePlace:
    """Half of the prompts get a fixed vector in the last state that leaves a block."""

    model: Model
    layer: int
    direction: np.ndarray
    prompts: list[Prompt]
    labels: np.ndarray
    others: np.ndarray
    spread: float = 0.0

    def look(self, strength: float, decoy: bool) -> Look:
        if not self.spread:
            states = self._states(np.zeros(len(self.labels), dtype=bool), 0.0)
            self.spread = float((states[self.layer] @ self.direction).std())
        labels = self.others if decoy else self.labels
        states = self._states(labels == 1, DECOY_EFFECT if decoy else strength)
        found = sweep(states, self.labels, groups=None, nested=False)
        truth = np.zeros((1, len(states)), dtype=bool)
        truth[0, self.layer :] = True
        one, zero = states[:, self.labels == 1], states[:, self.labels == 0]
        error = np.sqrt(one.var(1, ddof=1) / one.shape[1] + zero.var(1, ddof=1) / zero.shape[1])
        t = np.abs(one.mean(1) - zero.mean(1)) / np.where(error > 0, error, np.inf)
        norms = np.linalg.norm(states, axis=-1)
        ranks = norms.argsort(-1).argsort(-1)
        area = (ranks[:, self.labels == 1].mean(-1) - ranks[:, self.labels == 0].mean(-1)) / len(
            self.labels)
        return Look(truth, {
            "probes.sweep": 1 - found["p"].values[None],
            "probe, choice not corrected": 1 - found["p_alone"].values[None],
            "one coordinate": t.max(-1)[None],
            "state norm": np.abs(area)[None],
        })

    def _states(self, chosen: np.ndarray, strength: float) -> np.ndarray:
        """The last position's state after every block, `[layer, prompt, d_model]`."""
        last = len(self.prompts[0]) - 1
        add = edit(f"resid_post.{self.layer}", "add", strength * self.spread * self.direction,
                   positions=[last])
        write = each([[add] if on and strength else [] for on in chosen])
        run = self.model.run(self.prompts, read="resid_post", write=write, logits="none",
                             batch_size=32)
        return run.reads["resid_post"].isel(position=last).transpose(
            "layer", "prompt", "d_model").values.astype(float)


def feature_places(
    bed: Bed, rng: np.random.Generator, count: int, n_layers: int = 5, prompts: int = 64
) -> Iterator[FeaturePlace]:
    """Random texts with random labels: before the layer there is nothing to find."""
    hf = bed.text(rng, n_layers)
    for number in range(count):
        if bed.base is None and number:
            hf = bed.text(rng, n_layers)
        model = bed.base if bed.base is not None else bed.open(hf)
        ids = rng.choice(ordinary(hf), (prompts, 8))
        start = first_token(hf)
        if start is not None:
            ids[:, 0] = start
        labels = rng.permutation(np.arange(prompts) % 2)
        others = np.zeros(prompts, dtype=int)
        for label in (0, 1):
            members = np.flatnonzero(labels == label)
            others[rng.permutation(members)[: len(members) // 2]] = 1
        direction = rng.standard_normal(model.d_model)
        yield FeaturePlace(
            model, int(rng.integers(1, model.n_layers)), direction / np.linalg.norm(direction),
            [Prompt.from_tokens(row.tolist()) for row in ids], labels, others)
