"""The statistics of a run: which reducers every prompt and layer has, and their labelled results."""

import copy
from collections.abc import Iterable, Sequence
from typing import Any

import xarray as xr

from interp.core.errors import SiteRefused, did_you_mean
from interp.core.prompt import Prompt
from interp.models.run import stack_labelled
from interp.stream import reducers as attention_statistics
from interp.stream import residual as residual_statistics
from interp.stream.per_layer import PerLayer


class Statistics:
    """The reducers of a run: one set per prompt and layer, made when first needed."""

    def __init__(
        self, asked: Iterable[Any], prompts: Sequence[Prompt], n_layers: int, n_heads: int,
        new_tokens: int,
    ) -> None:
        self.prompts, self.n_layers, self.new_tokens = prompts, n_layers, new_tokens
        self.n_heads = n_heads
        self.asked: dict[str, tuple[str, Any]] = {}
        for one in asked:
            name = one if isinstance(one, str) else one.name
            if name in residual_statistics.NAMES:
                kind = "residual"
            elif name in attention_statistics.NAMES:
                kind = "attention"
            else:
                known = sorted((*attention_statistics.NAMES, *residual_statistics.NAMES))
                raise ValueError(
                    f"there is no statistic {name!r}; choose from: {', '.join(known)}."
                    f"{did_you_mean(name, known)}"
                )
            self.asked[name] = (kind, one)
        self._made: dict[tuple[int, int, str], dict[str, Any]] = {}

    def _reducers(self, prompt: int, layer: int, kind: str) -> list[Any]:
        key = (prompt, layer, kind)
        if key not in self._made:
            made = {}
            for name, (of, one) in self.asked.items():
                if of != kind:
                    continue
                if isinstance(one, str):
                    reducer = self._by_name(name, prompt)
                elif isinstance(one, PerLayer):
                    reducer = one.make(prompt, layer)
                    if reducer is None:
                        continue
                else:
                    reducer = copy.deepcopy(one)
                length = len(self.prompts[prompt]) + max(self.new_tokens, 0)
                if kind == "attention":
                    reducer.start(n_heads=self.n_heads, n_queries=length, n_keys=length)
                else:
                    reducer.start(n_positions=length)
                made[name] = reducer
            self._made[key] = made
        return list(self._made[key].values())

    def _by_name(self, name: str, prompt: int) -> Any:
        one = self.prompts[prompt]
        segments = {segment.name: segment.positions for segment in one.segments}
        if name == "segments" and not segments:
            raise SiteRefused(
                "the statistic 'segments' needs prompts with named segments; "
                "name some, for example prompt.with_segments(needle=(3, 8))."
            )
        if name in residual_statistics.NAMES:
            return residual_statistics.by_name(name)
        return attention_statistics.by_name(name, segments=segments)

    def attention(self, prompt: int, layer: int) -> list[Any]:
        """The reducers of tiles of attention."""
        return self._reducers(prompt, layer, "attention")

    def residual(self, prompt: int, layer: int) -> list[Any]:
        """The reducers of states of the residual stream."""
        return self._reducers(prompt, layer, "residual")

    def finish(self) -> dict[str, xr.DataArray]:
        """One labelled array per statistic, with dims (prompt, layer, ...)."""
        found = {}
        for name, (kind, _) in self.asked.items():
            layers = sorted({layer for (_, layer, of), made in self._made.items()
                             if of == kind and name in made})
            every = [(prompt, layer, kind) for prompt in range(len(self.prompts))
                     for layer in layers]
            if not layers or any(name not in self._made.get(key, ()) for key in every):
                raise ValueError(
                    f"the statistic {name!r} was asked for in no layer, or in other layers of some "
                    "prompts; let PerLayer make it in the same layers of every prompt."
                )
            rows = [
                [self._made[prompt, layer, kind][name].finish() for layer in layers]
                for prompt in range(len(self.prompts))
            ]
            found[name] = stack_labelled(rows, layers)
        return found
