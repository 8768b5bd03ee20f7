"""What a model run returns: logits, labelled reads and statistics, generated tokens."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Optional

import numpy as np
import torch
import xarray as xr
from torch import Tensor

from interp.core.errors import NotAskedFor, SiteRefused
from interp.core.prompt import Prompt
from interp.core.site import PAIRS, Site

READ_DIMS = {
    "q": ("position", "head", "d_head"), "z": ("position", "head", "d_head"),
    "k": ("position", "kv_head", "d_head"), "v": ("position", "kv_head", "d_head"),
    "scores": ("head", "query", "key"), "pattern": ("head", "query", "key"),
}


class Asked(dict[str, xr.DataArray]):
    """What a run holds, by name; a name that was not asked for is answered by how to ask for it.

    Example:
        >>> Asked({}, "stats")["received"]
        Traceback (most recent call last):
        ...
        interp.core.errors.NotAskedFor: 'received' was not asked for: pass stats=['received'] to \
model.run (this run holds none).
    """

    def __init__(self, values: Mapping[str, xr.DataArray], option: str) -> None:
        super().__init__(values)
        self.option = option

    def __missing__(self, name: Any) -> Any:
        held = ", ".join(map(repr, self)) or "none"
        raise NotAskedFor(
            f"{name!r} was not asked for: pass {self.option}=[{name!r}] to model.run (this run "
            f"holds {held})."
        )


@dataclass
class Run:
    """The outcome of one `Model.run`.

    Attributes:
        logits: one `[position, vocab]` tensor per prompt (rows of generated tokens after those of
            the prompt); empty for a model without a vocabulary head.
        reads: site -> array with dims (prompt, layer, position, ...), as it was asked for.
        stats: statistic -> array with dims (prompt, layer, ...).
        new_tokens: generated ids per prompt.

    Prompts of different length are padded with NaN at the end.
    """

    prompts: tuple[Prompt, ...]
    logits: list[Tensor] = field(default_factory=list)
    reads: Mapping[str, xr.DataArray] = field(default_factory=dict)
    stats: Mapping[str, xr.DataArray] = field(default_factory=dict)
    new_tokens: list[list[int]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.reads, self.stats = Asked(self.reads, "read"), Asked(self.stats, "stats")

    def __repr__(self) -> str:
        parts = [f"{len(self.prompts)} prompt{'' if len(self.prompts) == 1 else 's'}"]
        for option, held in (("reads", self.reads), ("stats", self.stats)):
            parts += [f"{option}[{name!r}] {' x '.join(f'{n} {d}' for d, n in array.sizes.items())}"
                      for name, array in held.items()]
        made = sum(map(len, self.new_tokens))
        parts += [f"{made} new token{'' if made == 1 else 's'}"] * bool(made)
        return f"Run({'; '.join(parts)})"


class Reads:
    """Collects what sites held, pass after pass, and labels it at the end."""

    def __init__(self, sites: Sequence[Site], n_layers: int, n_prompts: int) -> None:
        self.sites = {str(site): site for site in sites}
        self.n_layers = n_layers
        self.values: list[dict[tuple[int, str], list[Tensor]]] = [{} for _ in range(n_prompts)]
        self._wanted = {
            (layer, "resid_pre" if site.name == "embed" else site.name)
            for site in sites
            for layer in site.of(n_layers)
        }

    def want(self, layer: int, name: str) -> bool:
        return (layer, name) in self._wanted

    def add(self, prompt: int, layer: int, name: str, value: Tensor) -> None:
        kept = value.detach().to("cpu", torch.float32)
        self.values[prompt].setdefault((layer, name), []).append(kept)

    def finish(self) -> dict[str, xr.DataArray]:
        """One labelled array for every site that was asked for, under the user's own spelling."""
        found = {}
        for spelled, site in self.sites.items():
            name = "resid_pre" if site.name == "embed" else site.name
            layers = site.of(self.n_layers)
            rows = []
            for values in self.values:
                missing = [layer for layer in layers if (layer, name) not in values]
                if missing:
                    raise SiteRefused(
                        f"site {spelled!r} was never reached in layer {missing[0]}; the layer may "
                        "have no attention of this kind. Ask for the other layers by number."
                    )
                rows.append([_join(values[layer, name], site.name) for layer in layers])
            dims = READ_DIMS.get(site.name, ("position", "d_model"))
            array = stack([[x.numpy() for x in row] for row in rows], dims)
            if site.name == "embed":
                array = array.isel(layer=0, drop=True)
            else:
                array = array.assign_coords(layer=list(layers))
            found[spelled] = array
        return found


def _join(parts: list[Tensor], name: str) -> Tensor:
    if name not in PAIRS:
        return torch.cat(parts, 0)
    # Rows of later passes have more keys; earlier rows could not see those.
    width = max(part.shape[-1] for part in parts)
    fill = float("-inf") if name == "scores" else 0.0
    padded = [
        torch.nn.functional.pad(part, (0, width - part.shape[-1]), value=fill) for part in parts
    ]
    return torch.cat(padded, 1)


def stack(rows: list[list[np.ndarray]], dims: tuple[str, ...]) -> xr.DataArray:
    """Arrays per prompt and layer as one, padded with NaN at the end of every axis."""
    shape = tuple(
        max(x.shape[axis] for row in rows for x in row) for axis in range(rows[0][0].ndim)
    )
    first = rows[0][0]
    if all(x.shape == shape for row in rows for x in row):
        values = np.stack([np.stack(row) for row in rows])
    else:
        kind = np.result_type(first.dtype, np.float32)
        values = np.full((len(rows), len(rows[0]), *shape), np.nan, dtype=kind)
        for i, row in enumerate(rows):
            for j, x in enumerate(row):
                values[(i, j, *(slice(n) for n in x.shape))] = x
    return xr.DataArray(values, dims=("prompt", "layer", *dims))


def stack_labelled(rows: list[list[xr.DataArray]], layers: Sequence[int]) -> xr.DataArray:
    """Labelled statistics per prompt and layer as one array with dims (prompt, layer, ...)."""
    first = rows[0][0]
    array = stack([[x.values for x in row] for row in rows], tuple(str(d) for d in first.dims))
    array = array.assign_coords(layer=list(layers))
    longest: dict[Any, Any] = {}
    for row in rows:
        for x in row:
            for name, coordinate in x.coords.items():
                if coordinate.dims == (name,) and len(coordinate) > len(longest.get(name, ())):
                    longest[name] = coordinate.values
    array = array.assign_coords(longest)
    array.attrs.update(first.attrs)
    return array


def first_bad_layer(resid: Optional[xr.DataArray]) -> Optional[int]:
    """The first layer whose residual stream holds NaN or infinity, None if all are finite."""
    if resid is None:
        return None
    bad = ~np.isfinite(resid.values).all(axis=tuple(i for i, d in enumerate(resid.dims)
                                                    if d != "layer"))
    return int(resid.layer.values[bad.argmax()]) if bad.any() else None
