"""The cells of causal sweeps: every head, state, edge or token, one at a time, with their labels."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Optional, SupportsIndex, Union

import numpy as np
from jaxtyping import Float

from interp.causal.ablate import mean_output
from interp.causal.removal import removable_tokens
from interp.core import Head, Prompt, PromptError, SiteRefused, block, patch
from interp.core.head import HeadLike, check_heads
from interp.core.head import heads as as_heads
from interp.core.intervention import AblateHeads, Array, Intervention, Phase
from interp.core.prompt import Where
from interp.core.site import HEADED, Site, check_layers
from interp.models.model import Model
from interp.prompts.counterfactual import check_aligned

Cell = tuple[tuple[int, ...], Callable[[], Union[Intervention, tuple[()]]]]
"""The labels of a cell, one per axis, and what makes its intervention (states are large)."""

STATES = ("embed", "resid_pre", "resid_mid", "resid_post", "attn_out", "mlp_in", "mlp_out", *HEADED)


@dataclass
class Cells:
    """Labelled interventions of a sweep, prompt by prompt; made by the `every_...` functions."""

    dims: tuple[str, ...] = field(init=False)
    name: str = field(init=False)
    sources: int = field(init=False, default=0)

    def prepare(self, model: Model, prompts: Sequence[Prompt]) -> None:
        """Check what was asked for, and compute what all cells share."""

    def of(self, model: Model, prompt: Prompt, number: int) -> list[Cell]:
        """The cells of one prompt."""
        raise NotImplementedError

    def about(self) -> dict[str, Any]:
        """What a manifest says of them."""
        return {"cells": self.name}


def _layers(layers: Optional[Iterable[SupportsIndex]], model: Model) -> tuple[int, ...]:
    chosen = None if layers is None else tuple(sorted({int(layer) for layer in layers}))
    return tuple(check_layers(chosen, model.n_layers))


def _heads(
    heads: Optional[Iterable[HeadLike]], layers: Optional[Iterable[SupportsIndex]], model: Model,
    count: int,
) -> tuple[Head, ...]:
    if heads is None:
        return tuple(Head(a, b) for a in _layers(layers, model) for b in range(count))
    chosen = as_heads(heads)
    check_heads(chosen, model.n_layers, count)
    return tuple(h for h in chosen if layers is None or h.layer in set(_layers(layers, model)))


@dataclass
class _Heads(Cells):
    by: Union[str, np.ndarray]
    layers: Optional[tuple[int, ...]]
    heads: Optional[tuple[Head, ...]]
    phase: Phase
    dims = ("layer", "head")

    def __post_init__(self) -> None:
        self.kind = self.by if isinstance(self.by, str) else "mean"
        by = self.by if isinstance(self.by, str) else "a given value"
        self.name = f"every head, ablated by {by}"

    def prepare(self, model: Model, prompts: Sequence[Prompt]) -> None:
        self.chosen = _heads(self.heads, self.layers, model, model.n_heads)
        if isinstance(self.by, str) and self.by == "mean":
            self.value: Optional[Array] = Array(mean_output(model, prompts))
        else:
            self.value = None if isinstance(self.by, str) else Array(self.by)

    def of(self, model: Model, prompt: Prompt, number: int) -> list[Cell]:
        return [((h.layer, h.head), partial(AblateHeads, (h,), self.kind, self.phase, self.value))
                for h in self.chosen]

    def about(self) -> dict[str, Any]:
        return {"cells": "every_head", "by": self.kind, "phase": self.phase}


def every_head(
    by: Union[str, Float[np.ndarray, "layer head d_head"]] = "zero",
    layers: Optional[Iterable[SupportsIndex]] = None,
    heads: Optional[Iterable[HeadLike]] = None,
    phase: Phase = "all",
) -> Cells:
    """Every head ablated, one at a time: cells `[layer, head]`.

    Example:
        >>> every_head("mean").dims
        ('layer', 'head')

    Args:
        by: "zero", "uniform", "mean" (over the prompts of the sweep), or what heads are replaced by.
        layers, heads: all for None.
        phase: "all" or "last" (the last row of the prompt alone).

    Raises `PromptError` for another kind of ablation.
    """
    if isinstance(by, str) and by not in ("zero", "mean", "uniform"):
        raise PromptError(f"cannot ablate every head by {by!r}; choose 'zero', 'mean', 'uniform', or "
                          "give the values [layer, head, d_head].")
    return _Heads(by if isinstance(by, str) else np.asarray(by),
                  None if layers is None else tuple(int(x) for x in layers),
                  None if heads is None else as_heads(heads), phase)


@dataclass
class _States(Cells):
    site: Site
    source: tuple[Prompt, ...]
    layers: Optional[tuple[int, ...]]
    positions: Any
    heads: Optional[tuple[Head, ...]]

    def __post_init__(self) -> None:
        self.headed = self.site.name in HEADED
        self.each = isinstance(self.positions, str) and self.positions == "each"
        self.dims = ("layer", *(("head",) if self.headed else ()),
                     *(("position",) if self.each else ()))
        self.name = f"every state of {self.site.name} from other prompts"
        self.sources = len(self.source)

    def prepare(self, model: Model, prompts: Sequence[Prompt]) -> None:
        check_aligned(prompts, self.source)
        layers = self.site.of(model.n_layers) if self.layers is None else self.layers
        count = model.n_kv_heads if self.site.name in ("k", "v") else model.n_heads
        self.chosen = _heads(self.heads, layers, model, count) if self.headed else ()
        self.at = sorted({h.layer for h in self.chosen}) if self.headed else list(
            _layers(layers, model))
        if self.site.name == "embed":
            self.at = [0]

    def of(self, model: Model, prompt: Prompt, number: int) -> list[Cell]:
        site = self.site.name
        asked = "embed" if site == "embed" else f"{site}.{','.join(map(str, self.at))}"

        def read(one: Prompt) -> np.ndarray:
            found = model.run(one, read=asked, logits="none").reads[asked].values[0]
            return found[None] if site == "embed" else found

        other = read(self.source[number])
        own = read(prompt) if self.headed else other
        if self.each:
            places = [((p,), (p,)) for p in range(len(prompt))]
        else:
            where = prompt.positions(self.positions)
            places = [((), where)] if where else []

        def put(i: int, spelled: Site, head: Optional[int], where: Sequence[int]) -> Intervention:
            value = other[i][list(where)]
            if head is not None:
                value, given = own[i][list(where)], value[:, head]
                value[:, head] = given
            return patch(spelled, value, where)

        made: list[Cell] = []
        for i, layer in enumerate(self.at):
            spelled = Site(site) if site == "embed" else Site(site, (layer,))
            heads = [h.head for h in self.chosen if h.layer == layer] if self.headed else [None]
            for head in heads:
                for label, where in places:
                    labels = (layer, *(() if head is None else (head,)), *label)
                    made.append((labels, partial(put, i, spelled, head, where)))
        return made

    def about(self) -> dict[str, Any]:
        return {"cells": "every_state", "site": str(self.site),
                "source": [prompt.digest() for prompt in self.source]}


def every_state(
    site: Union[str, Site],
    source_prompts: Iterable[Prompt],
    layers: Optional[Iterable[SupportsIndex]] = None,
    positions: Where = "each",
    heads: Optional[Iterable[HeadLike]] = None,
) -> Cells:
    """Activation patching: every state as it is in another prompt, one at a time.

    Example:
        >>> every_state("resid_pre", [Prompt.from_tokens([1, 5, 7, 3])]).dims
        ('layer', 'position')

    Cells `[layer, position]`; at "q", "k", "v" and "z" `[layer, head, position]`, head by head
    (key-value heads for "k" and "v").

    Args:
        source_prompts: one per prompt of the sweep, of the same length.
        positions: "each" one at a time, or a place that is patched as a whole (no position axis).

    Raises:
        SiteRefused: no such states. PromptError: prompts that are not aligned (when planned or run).

    Source: activation patching, arXiv:2309.16042.
    """
    site = Site.parse(site)
    if site.name not in STATES:
        raise SiteRefused(f"cannot patch every state of {site.name!r}; choose from: "
                          f"{', '.join(STATES)}.")
    if heads is not None and site.name not in HEADED:
        raise SiteRefused(f"site {site.name!r} has no heads; leave heads out.")
    if not isinstance(positions, (str, slice)) and not hasattr(positions, "positions"):
        positions = tuple(int(p) for p in np.atleast_1d(np.asarray(positions)))
    return _States(site, tuple(source_prompts),
                   None if layers is None else tuple(int(x) for x in layers), positions,
                   None if heads is None else as_heads(heads))


@dataclass
class _Edges(Cells):
    queries: Any
    keys: Any
    layers: Optional[tuple[int, ...]]
    heads: Any
    window: int

    def __post_init__(self) -> None:
        self.each = isinstance(self.keys, str) and self.keys == "each"
        self.dims = ("layer", *(("head",) if self.heads is not None else ()),
                     *(("key",) if self.each else ()))
        self.name = f"every edge from {self.queries} to {self.keys}, blocked"

    def prepare(self, model: Model, prompts: Sequence[Prompt]) -> None:
        self.at = _layers(self.layers, model)
        self.chosen = () if self.heads is None else _heads(
            None if self.heads == "each" else self.heads, self.at, model, model.n_heads)

    def of(self, model: Model, prompt: Prompt, number: int) -> list[Cell]:
        queries = prompt.positions(self.queries)
        if self.each:
            # The edge of a position to itself is left: a row needs a key.
            keys = [((k,), [q for q in queries if q > k], (k,)) for k in range(len(prompt))]
        else:
            keys = [((), list(queries), prompt.positions(self.keys))]
        made: list[Cell] = []
        for label, rows, columns in keys:
            if not rows or not columns:
                continue
            if self.heads is None:
                made += [((layer, *label), partial(block, rows, columns, layers=range(
                    layer, min(layer + self.window, model.n_layers)))) for layer in self.at]
            else:
                made += [((h.layer, h.head, *label), partial(block, rows, columns, heads=h))
                         for h in self.chosen]
        return made

    def about(self) -> dict[str, Any]:
        return {"cells": "every_edge", "queries": str(self.queries), "keys": str(self.keys),
                "window": self.window}


def every_edge(
    queries: Where = "last",
    keys: Where = "each",
    layers: Optional[Iterable[SupportsIndex]] = None,
    heads: Union[str, Iterable[HeadLike], None] = None,
    window: SupportsIndex = 1,
) -> Cells:
    """Attention blocked from some queries to some keys, layer by layer: cells `[layer, key]`.

    Example:
        >>> every_edge("last", "each", heads="each").dims
        ('layer', 'head', 'key')

    Args:
        keys: "each" position one at a time, or a place, blocked as a whole (no axis `key`).
        heads: None blocks all heads of a layer; "each", or some heads, one at a time.
        window: how many layers from each on are blocked together (all heads).

    Source: attention knockout, arXiv:2304.14767.
    """
    if heads is not None and int(window) != 1:
        raise ValueError("a window of layers is blocked in all heads: leave heads out, or window=1.")
    if isinstance(heads, str) and heads != "each":
        heads = [heads]
    return _Edges(queries, keys, None if layers is None else tuple(int(x) for x in layers),
                  heads if heads is None or isinstance(heads, str) else as_heads(heads),
                  max(1, int(window)))


@dataclass
class _Tokens(Cells):
    where: Any
    layers: Optional[tuple[int, ...]]
    how: str
    more: dict[str, Any]
    dims = ("layer", "position")

    def __post_init__(self) -> None:
        self.name = f"every token of {self.where}, removed by {self.how}"

    def prepare(self, model: Model, prompts: Sequence[Prompt]) -> None:
        self.at = _layers(self.layers, model)

    def of(self, model: Model, prompt: Prompt, number: int) -> list[Cell]:
        """As blocked edges, which is the same as removal with position ids kept."""
        made: list[Cell] = []
        for layer in self.at:
            for place in removable_tokens(prompt, self.where):
                others = range(place + 1, len(prompt))
                made.append(((layer, place), partial(block, others, [place], layers=range(
                    layer, model.n_layers))))
        return made

    def about(self) -> dict[str, Any]:
        return {"cells": "every_token", "removal": self.how, "where": str(self.where)}


def every_token(
    where: Where = "image",
    layers: Optional[Iterable[SupportsIndex]] = None,
    how: str = "drop_keep_ids",
    **more: Any,
) -> Cells:
    """Every token of a place removed from every block on, one at a time: cells `[layer, position]`.

    Example:
        >>> every_token("image").dims
        ('layer', 'position')

    Args:
        how: what removing means, with `more` for it: see `interp.causal.removal.Removal`. Models that
            cannot be resumed know "drop_keep_ids" only.

    Raises `PromptError` for an unknown kind when it is planned or run.
    """
    return _Tokens(where, None if layers is None else tuple(int(x) for x in layers), how, more)
