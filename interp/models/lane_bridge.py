"""TransformerLens' TransformerBridge over the same weights, read and written at its hook points.

Which hook is which site is found by watching a short pass (`interp.models.bridge_sites`) and
compared with lane "hf"; what no hook holds, or no edit of it moves, is refused with the reason.
"""

import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, Optional

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from interp.core.errors import ModelRefused, SiteRefused
from interp.core.prompt import Prompt
from interp.core.site import NAMES, Site
from interp.models.attention import check_rows
from interp.models.bridge_sites import Found, candidates, solve
from interp.models.bridging import build
from interp.models.edits import Edits, Pass
from interp.models.lane_hf import LaneHF, call_options, probe_ids, shape_of, sink_kind
from interp.models.run import Reads
from interp.models.sites import Block
from interp.stream.tiles import Tile

ORDER = ("resid_pre", "attn_out", "resid_mid", "mlp_in", "mlp_out", "resid_post",
         "q", "k", "v", "z")


class LaneBridge(LaneHF):
    """Runs prompts through the bridge; the same reads, writes and statistics as lane "hf".

    Whole rows of attention are always made here, so this lane is for short prompts. `bridge` is
    the `TransformerBridge` itself: a copy of the modules around the same parameters and buffers.

    Raises `ModelRefused` if TransformerLens does not know the architecture, cannot use the weights
    in place, or does not give the logits that the model itself gives.
    """

    name = "bridge"

    def __init__(self, hf: nn.Module, tokenizer: Any, name: str) -> None:
        self.plain: Any = hf
        self.bridge = build(hf, tokenizer, name)
        self.hf = self.bridge.original_model
        self.configs: list[Any] = []
        self.device = next(hf.parameters()).device
        modules: list[Any] = list(self.bridge.blocks)
        self.blocks = [Block(number, each, each.attn) for number, each in enumerate(modules)]
        self.shape = shape_of(self.blocks, hf)
        self.sink_kind = sink_kind([Block(0, modules[0], modules[0].attn.original_component)])
        # Values of earlier passes of one run, for statistics while generating.
        self._values: dict[int, Tensor] = {}
        self._check_logits(name)
        # How to read the masks that attention gets: which boolean hides, and which layers have a
        # window inside the attention module that no mask shows.
        self.causal, self.hides = True, False
        self.windowed = {
            block.index for block in self.blocks
            if any(getattr(each, "attention_type", "") == "local" for each in block.module.modules())
        }
        self.sites = self._find()
        self._missing = {
            site: next(iter(reasons)) for site in NAMES
            if (reasons := [f.missing[site] for f in self.sites if site in f.missing])
        }
        self._compare()

    def hook(self, layer: int, site: str) -> Optional[str]:
        """The full name of the TransformerLens hook that holds a site, None if there is none."""
        found = self.sites[layer].hooks.get("resid_pre" if site == "embed" else site)
        return None if found is None else f"blocks.{layer}.{found}"

    def unavailable(self, name: str) -> Optional[str]:
        """Why no hook of TransformerLens holds a site, None if one does."""
        return self._missing.get("resid_pre" if name == "embed" else name)

    def run(self, *args: Any, **kwargs: Any) -> tuple[list[Optional[Tensor]], list[list[int]]]:
        """As `LaneHF.run`."""
        if self.bridge.compatibility_mode:
            raise ModelRefused(
                "the bridge of this model was put into compatibility mode, which changes its "
                "weights; open the model again, and use a TransformerBridge of your own for that."
            )
        try:
            return super().run(*args, **kwargs)
        finally:
            self._values = {}

    # -- opening -----------------------------------------------------------------------------

    def _check_logits(self, name: str) -> None:
        ids = probe_ids(self.plain, 6)
        with torch.no_grad():
            ours, theirs = (
                getattr(one(input_ids=ids), "logits", None) for one in (self.hf, self.plain)
            )
        if ours is None or theirs is None:
            return
        gap = float((ours - theirs).float().square().mean().sqrt() / theirs.float().std())
        if not gap <= (1e-3 if theirs.dtype in (torch.float32, torch.float64) else 5e-2):
            raise ModelRefused(
                f"TransformerLens does not reproduce {name} ({type(self.plain).__name__}): its "
                f"logits are off by {gap:.2g} of their spread. Use lane='hf'."
            )

    def _find(self) -> list[Found]:
        """Which hook holds which site, block by block, from one recorded pass."""
        ids = probe_ids(self.plain, 6)
        seen: list[dict[str, list[Tensor]]] = [{} for _ in self.blocks]
        known, wanted = self.bridge.hook_dict, []
        for layer in range(len(self.blocks)):
            for name in candidates():
                if f"blocks.{layer}.{name}" in known:
                    def record(x: Any, hook: Any, layer: int = layer, name: str = name) -> None:
                        if isinstance(x, Tensor):
                            seen[layer].setdefault(name, []).append(x.detach().float().clone())
                    wanted.append((f"blocks.{layer}.{name}", record))
        masks: dict[int, Optional[Tensor]] = {}
        with ExitStack() as stack, torch.no_grad():
            stack.enter_context(self.bridge.hooks(fwd_hooks=wanted))
            for block in self.blocks:
                stack.callback(_remember_mask(block, masks).remove)
            self.hf(input_ids=ids)
        softcap = getattr(self.plain.config.get_text_config(), "attn_logit_softcapping", None)
        exact = next(self.plain.parameters()).dtype in (torch.float32, torch.float64)
        tolerance = 1e-3 if exact else 3e-2
        found = [
            solve(values, self.shape, softcap, tolerance, type(block.attention).__name__)
            for values, block in zip(seen, self.blocks)
        ]
        patterns = {i: v["attn.hook_pattern"][0][0] for i, v in enumerate(seen)
                    if "pattern" in found[i].hooks}
        self.causal = not any(bool(p.triu(1).gt(0).any()) for p in patterns.values())
        for self.hides in (False, True):
            wrong = [i for i, p in patterns.items()
                     if bool((p[(~self.allowed(masks.get(i), 0, 0, p)).expand_as(p)] > 0).any())]
            if not wrong:
                return found
        for one in found:
            for site in ("scores", "pattern"):
                one.hooks.pop(site, None)
                one.missing[site] = (
                    "attention looks where its mask says it may not, so edges cannot be told from "
                    "gaps"
                )
        return found

    def allowed(
        self, mask: Optional[Tensor], row: int, start: int, p: Float[Tensor, "head query key"]
    ) -> Bool[Tensor, "#head query key"]:
        """Which keys the rows of `p`, the first of them at `start`, may see."""
        n_queries, n_keys = p.shape[-2:]
        if mask is None:
            queries = torch.arange(start, start + n_queries, device=p.device)
            keys = torch.arange(start + n_queries - n_keys, start + n_queries, device=p.device)
            seen = keys[None] <= queries[:, None]
            return (seen if self.causal else torch.ones_like(seen))[None]
        seen = mask[row % mask.shape[0], :, -n_queries:, :n_keys].to(p.device)
        if seen.dtype != torch.bool:
            return seen > torch.finfo(seen.dtype).min / 2
        return ~seen if self.hides else seen

    def _compare(self) -> None:
        """Drop sites whose values differ from those of lane "hf", where that lane exists."""
        try:
            others = LaneHF(self.plain)
            if others.shape != self.shape:
                return
            mine, theirs = self._read(self), self._read(others)
        except (ModelRefused, SiteRefused):
            return
        exact = next(self.plain.parameters()).dtype in (torch.float32, torch.float64)
        tolerance = 1e-3 if exact else 1e-1
        for name in mine.keys() & theirs.keys():
            a, b = (x[name].nan_to_num(0.0, 0.0, 0.0) for x in (mine, theirs))
            size = tolerance * float(b.abs().max())
            if float((a - b).abs().max()) <= size:
                continue
            factor = float((a * b).sum() / a.square().sum())
            self._missing[name] = f"{self.hook(0, name)} of TransformerLens holds " + (
                f"it before the model multiplies it by {factor:.3g}"
                if float((a * factor - b).abs().max()) <= size
                else "something else than the model's own attention or residual stream"
            )

    def _read(self, lane: LaneHF) -> dict[str, Tensor]:
        names = [n for n in NAMES if self.unavailable(n) is None and lane.unavailable(n) is None]
        prompt = Prompt.from_tokens(probe_ids(self.plain, 6)[0].tolist())
        reads = Reads([Site.parse(n) for n in names], self.shape.n_layers, 1)
        nothing = Edits(prompt, (), self.shape)
        lane.run([prompt], [nothing], reads, lambda *_: [], lambda *_: [], [0])
        return {name: torch.tensor(a.values) for name, a in reads.finish().items()}

    # -- running -----------------------------------------------------------------------------

    def _forward(
        self, ids: Tensor, inputs: dict, now: Pass, edits: Sequence[Edits], reads: Reads,
        reducers: Callable, residual_reducers: Callable, numbers: Sequence[int], cache: Any,
        use_cache: bool, logits: str,
    ) -> Any:
        more = call_options(cache, use_cache, logits)
        if not now.decoding:
            self._values = {}
        hooks = _Hooks(self, now, edits, reads, reducers, residual_reducers, numbers)
        with hooks.attached(), torch.no_grad():
            return self._call(ids, inputs, more)


class _Hooks:
    """The hook functions of one forward pass of a batch of prompts."""

    def __init__(
        self, lane: LaneBridge, now: Pass, edits: Sequence[Edits], reads: Reads,
        reducers: Callable, residual_reducers: Callable, numbers: Sequence[int],
    ) -> None:
        self.lane, self.now, self.edits, self.reads = lane, now, edits, reads
        self.reducers, self.residual_reducers, self.numbers = reducers, residual_reducers, numbers
        self.masks: dict[int, Optional[Tensor]] = {}
        self.before: dict[int, Tensor] = {}

    @contextmanager
    def attached(self) -> Iterator[None]:
        """Attach what this pass needs, and detach it whatever happens."""
        functions: list[tuple[str, Callable]] = []
        handles: list[Any] = []
        try:
            for layer in range(self.lane.shape.n_layers):
                plan = self._plan(layer)
                for site, function in plan:
                    name = self.lane.hook(layer, site)
                    if name is None or self.lane.unavailable(site) is not None:
                        raise SiteRefused(
                            f"cannot reach {site!r} in layer {layer} through TransformerLens: "
                            f"{self.lane.unavailable(site)}; use lane 'hf'."
                        )
                    functions.append((name, function))
                if any(site in ("scores", "pattern") for site, _ in plan):
                    handles.append(_remember_mask(self.lane.blocks[layer], self.masks))
            with warnings.catch_warnings(), self.lane.bridge.hooks(fwd_hooks=functions):
                # TransformerLens warns that such an edit does nothing; the proof refuses it.
                warnings.filterwarnings("ignore", message="A hook on .* returned a modified")
                yield
        finally:
            for handle in handles:
                handle.remove()

    def _plan(self, layer: int) -> list[tuple[str, Callable]]:
        plan: list[tuple[str, Callable]] = []
        counted = bool(self.reducers(self.numbers[0], layer))
        # The stream between the halves of a block is read twice, by the norm and by the second
        # sum: it is written through what attention adds, which enters both.
        middle = self._writes(layer, "resid_mid") and self.lane.sites[layer].kind == "sequential"
        for site in ORDER:
            if site == "resid_mid" and middle:
                continue
            extra = middle and site in ("resid_pre", "attn_out") or counted and site == "v"
            extra |= site == "resid_post" and bool(self.residual_reducers(self.numbers[0], layer))
            if extra or self._writes(layer, site) or self.reads.want(layer, site):
                if site == "v" and counted and self.lane.unavailable("v"):
                    continue
                plan.append((site, self._stream(layer, site, middle)))
        if self.reads.want(layer, "scores") or any(
            e.blocks(layer) or e.edits_scores(layer) for e in self.edits
        ):
            plan.append(("scores", self._scores(layer)))
        if counted or self.reads.want(layer, "pattern") or any(
            e.edits_pattern(layer) for e in self.edits
        ):
            plan.append(("pattern", self._pattern(layer)))
        return plan

    def _writes(self, layer: int, site: str) -> bool:
        return any(one.writes(layer, site) for one in self.edits)

    def _act(self, layer: int, site: str, x: Tensor) -> Tensor:
        """Write, then read `[prompt, position, ...]`."""
        if x.shape[:2] != (len(self.edits), self.now.length):
            raise SiteRefused(
                f"{self.lane.hook(layer, site)} gave {tuple(x.shape)} where "
                f"{(len(self.edits), self.now.length)} [prompt, position] was expected; "
                "use lane 'hf'."
            )
        if self._writes(layer, site):
            x = torch.stack([e.apply(layer, site, r, self.now) for e, r in zip(self.edits, x)])
        for number, row in zip(self.numbers, x):
            if self.reads.want(layer, site):
                self.reads.add(number, layer, site, row)
            if site == "resid_post":
                for reducer in self.residual_reducers(number, layer):
                    reducer.add(row, self.now.start)
        return x

    def _stream(self, layer: int, site: str, middle: bool) -> Callable:
        def function(x: Tensor, hook: Any) -> Tensor:
            new = self._act(layer, site, x)
            if middle and site == "resid_pre":
                self.before[layer] = new
            if middle and site == "attn_out":
                before = self.before.pop(layer)
                new = self._act(layer, "resid_mid", before + new) - before
            if site == "v":
                earlier = self.lane._values.get(layer)
                together = new if earlier is None else torch.cat([earlier, new], 1)
                self.lane._values[layer] = together
            return new

        return function

    def _scores(self, layer: int) -> Callable:
        def function(x: Tensor, hook: Any) -> Optional[Tensor]:
            made, changed = [], False
            for row, (number, edits) in enumerate(zip(self.numbers, self.edits)):
                queries, keys, seen = self._seen(layer, row, x)
                scores = x[row].masked_fill(~seen, float("-inf"))
                if edits.edits_scores(layer):
                    scores = edits.pattern(layer, scores, queries, keys, seen, self.now, "scores")
                changed |= edits.blocks(layer) or edits.edits_scores(layer)
                if self.reads.want(layer, "scores"):
                    whole = nn.functional.pad(scores, (int(keys[0]), 0), value=float("-inf"))
                    self.reads.add(number, layer, "scores", whole)
                made.append(scores)
            return torch.stack(made) if changed else None

        return function

    def _pattern(self, layer: int) -> Callable:
        def function(x: Tensor, hook: Any) -> Optional[Tensor]:
            made, changed = [], False
            for row, (number, edits) in enumerate(zip(self.numbers, self.edits)):
                queries, keys, seen = self._seen(layer, row, x)
                p = x[row]
                if edits.edits_pattern(layer):
                    p = edits.pattern(layer, p, queries, keys, seen, self.now)
                    changed = True
                if self.reads.want(layer, "pattern"):
                    whole = nn.functional.pad(p, (int(keys[0]), 0))
                    self.reads.add(number, layer, "pattern", whole)
                made.append(p)
                reducers = self.reducers(number, layer)
                if reducers:
                    value = self.lane._values.get(layer)
                    if value is not None:
                        value = value[row, -len(keys) :].transpose(0, 1)[None].float()
                    if layer in self.lane.windowed:
                        seen = seen & (p > 0)
                    tile = Tile(p[None].float(), queries, keys, seen[None], value, layer)
                    for reducer in reducers:
                        reducer.add(tile)
            return torch.stack(made) if changed else None

        return function

    def _seen(
        self, layer: int, row: int, x: Float[Tensor, "batch head query key"]
    ) -> tuple[Tensor, Tensor, Bool[Tensor, "#head query key"]]:
        """Absolute positions of queries and keys, and which edges are open."""
        queries = self.now.positions(x.device)
        # A cache with a sliding window has dropped the earliest keys.
        end = self.now.start + self.now.length
        keys = torch.arange(end - x.shape[-1], end, device=x.device)
        seen = self.lane.allowed(self.masks.get(layer), row, self.now.start, x[row])
        open_ = self.edits[row].visible(layer, queries, keys, self.now)
        if open_ is not None:
            seen = seen & open_
            check_rows(seen, queries)
        return queries, keys, seen


def _remember_mask(block: Block, masks: dict[int, Optional[Tensor]]) -> Any:
    """Keep the mask that the attention of a block is given."""

    def before(_: nn.Module, args: tuple, kwargs: dict) -> None:
        given = [kwargs.get("attention_mask"), *args[1:]]
        found = [x for x in given if isinstance(x, Tensor) and x.ndim == 4]
        masks[block.index] = found[0] if found else None

    return block.attention.register_forward_pre_hook(before, with_kwargs=True)
