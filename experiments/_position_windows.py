"""Windows of text, their states, and what they are compared with, for `position_probes`."""

from collections.abc import Sequence
from typing import Any, Optional

import numpy as np
import torch
import xarray as xr

from experiments import _texts as texts
from interp.core import ModelRefused, Prompt, Result
from interp.models.model import Model
from interp.organisms.twins import positions_off, random_twin
from probes import nulls

DEEPEST = 8
"""Blocks that untrained twins have at most."""

MOST = 9
"""Layers that are probed at most."""


def cut(
    model: Model, prompts: Sequence[Prompt], length: int, rng: Optional[np.random.Generator] = None
) -> list[Prompt]:
    """Windows without the start token, from anywhere if `rng` is given: what begins a text is a
    position, too."""
    start = len(texts.first_ids(model))
    made = []
    for prompt in prompts:
        at = start if rng is None else int(rng.integers(start, len(prompt) - length + 1))
        made.append(Prompt.from_tokens(prompt.ids[at : at + length]))
    return made


def layers(n_layers: int, most: int = MOST) -> list[int]:
    """All blocks, or so many evenly spaced ones, the first and the last among them."""
    return sorted({int(i) for i in np.linspace(0, n_layers - 1, min(n_layers, most)).round()})


def states(model: Model, prompts: Sequence[Prompt], most: int = MOST) -> xr.DataArray:
    """States behind the first token, which is a case of its own in many models."""
    return nulls.layer_states(model, prompts, range(1, len(prompts[0])),
                              layers=layers(model.n_layers, most))


def by_document(states: xr.DataArray, count: int) -> xr.DataArray:
    """`[layer, document, position, d_model]`."""
    values = states.values
    return xr.DataArray(values.reshape(len(values), count, -1, values.shape[-1]),
                        dims=("layer", "document", "position", "d_model"),
                        coords={"layer": states["layer"].values})


def untrained(model: Model, seed: int, **about: Any) -> Model:
    """A twin with random weights, see `random_twin`. Raises `ModelRefused` if it cannot be made."""
    hf: Any = model.hf
    twin = Model(random_twin(hf, seed, n_layers=min(model.n_layers, DEEPEST), **about),
                 f"untrained {model.name}")
    if twin.kind != ("encoder" if about.get("causal") is False else "decoder"):
        raise ModelRefused(f"the untrained {model.architecture} keeps its mask, whatever its "
                           "configuration says")
    return twin


def encodings(model: Model, rng: np.random.Generator) -> str:
    """Why a model is none without position encodings; "" if it is one.

    Without any, what attention of block 0 adds to the last token is the same in whatever order the
    others come; and taking away those that can be found changes nothing in later blocks.
    """
    prompt = texts.random_tokens(model, 1, 12, rng)[0]
    turned = Prompt.from_tokens((*prompt.ids[:-1][::-1], prompt.ids[-1]))

    def last(given: Prompt, site: str) -> np.ndarray:
        return model.run(given, read=site, logits="none").reads[site].values[0, 0, -1]

    def alike(x: np.ndarray, y: np.ndarray) -> bool:
        return bool(np.abs(x - y).max() <= exact * np.abs(x).max())

    exact = 1e-3 if model.dtype in (torch.float32, torch.float64) else 3e-2
    end = f"resid_post.{model.n_layers - 1}"
    same = alike(last(prompt, "attn_out.0"), last(turned, "attn_out.0"))
    before = last(prompt, end)
    try:
        with positions_off(model.hf):  # type: ignore[arg-type]
            same = same and alike(before, last(prompt, end))
    except ModelRefused:
        pass
    return "" if same else f"{model.name} has position encodings"


def other_half(values: np.ndarray) -> np.ndarray:
    """Per document the value in the layer that is least on the other half: `[layer, document]`."""
    half = np.arange(values.shape[1]) % 2 == 0
    made = np.empty(values.shape[1])
    for side in (half, ~half):
        made[side] = values[int(values[:, ~side].mean(1).argmin()), side]
    return made


def shares(found: Result, what: str = "mad_median") -> list[float]:
    """Distances by layer, as shares of the constant guess's."""
    share = found[what].mean("document") / found["constant"].mean()
    return share.values.round(3).tolist()
