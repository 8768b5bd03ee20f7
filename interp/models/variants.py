"""Many edited variants of one prompt: each is computed again only where it can differ.

A variant is a set of interventions, and its outcome the last row of logits, as `Model.run` gives
it. Nothing is executed that the plain run has already said:

    resume         blocks before the first edit are not executed
    known heads    in the block of an edit to head outputs (or what follows them), attention is not
                   executed, and only the edited positions are
    known keys     in the block of a cut, only the cut queries are executed
    causal prefix  positions before the first edited one lend their keys and values
    last row       in the last block, the other positions are executed up to their keys and values

The variants of a pass lie row behind row in one batch: one joins at the block where it begins to
differ, whatever its number of rows. So a pass over the blocks serves cells of many layers.
"""

import copy
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, Optional, Union

import torch
from jaxtyping import Float
from torch import Tensor, nn

from interp.core.errors import ModelRefused, SiteRefused
from interp.core.intervention import Intervention
from interp.core.prompt import Prompt
from interp.models import attention as attend
from interp.models.block_calls import block_arguments, replaced_forward
from interp.models.edits import Edits, Pass
from interp.models.lane_hf import _hook, _write_middle, no_earlier_picture
from interp.models.model import Model
from interp.models.resume import Resumable
from interp.models.row_groups import RowGroups
from interp.models.sites import first_tensor

AFTER_HEADS = {"z", "attn_out", "resid_mid", "mlp_in", "mlp_out", "resid_post"}
"""Sites of a block that do not change what its attention reads."""

PORTS = ("resid_pre", "attn_out", "resid_mid", "mlp_in", "mlp_out", "resid_post")


@dataclass(frozen=True)
class Course:
    """Where a variant differs from the plain run.

    From block `entry` on, the positions from `first` are executed. Before that, block `entry - 1`
    is executed for the positions `start` to `stop` alone, where `ahead` says how: "heads", from the
    heads' outputs on, or "cut", with the keys and values of the plain run.
    """

    edits: Any
    entry: int
    first: int
    ahead: str = ""
    start: int = 0
    stop: int = 0

    @property
    def begins(self) -> int:
        return self.entry - bool(self.ahead)


class Variants:
    """A prompt of a model that is run once, and then in edited variants.

    Example:
        >>> import interp
        >>> model = interp.open_model("backcopy-3l")
        >>> variants = Variants(model, interp.Prompt.from_tokens(range(3, 12)))
        >>> variants.outcomes([interp.ablate("L1H0"), [interp.block("last", [2], layers=[0])]]).shape[0]
        2

    Attributes:
        plain: the last row of logits without edits.
        spent: token-layers executed so far, the plain run included, parts of a block by their
            share of its parameters.

    Raises:
        ModelRefused: encoders, models that cannot be resumed in the middle, other lanes than "hf".
    """

    def __init__(self, model: Model, prompt: Prompt) -> None:
        (given,) = model._prompts(prompt, 0)
        if model.kind != "decoder":
            raise ModelRefused(f"{model.name} is an encoder: it has no last row to resume towards.")
        if model.lane != "hf":
            raise ModelRefused(f"lane {model.lane!r} runs whole passes; resuming needs lane 'hf'.")
        self.model, self.prompt, self.lane = model, given, model._engine("hf")
        self.base = Resumable(model.hf, self.lane, given, model._tolerance(), keep_z=True)
        self.length, self.n_layers = self.base.length, self.base.n_layers
        self.plain = self.base.logits[-1]
        self.groups = RowGroups(self.base)
        self.spent = float(self.base.prefill)
        self._earliest: dict[int, int] = {}

    # -- what a variant costs ------------------------------------------------------------------

    def course(self, write: Union[Intervention, Iterable[Intervention]]) -> Optional[Course]:
        """Where a variant begins to differ; None if its last row is that of the plain run.

        Raises:
            SiteRefused: interventions that need whole rows of attention, or a site that cannot be
                written. OutOfRange, ValueError: as `Model.run`.
        """
        given = (write,) if isinstance(write, Intervention) else tuple(write)
        edits = Edits(self.prompt, given, self.model.shape)
        for name in edits.sites():
            self.model._check_site(name, "write")
        if edits._pattern:
            raise SiteRefused(
                "interventions on whole rows of attention (uniform ablation, redistribute, reweigh, "
                "'pattern' and 'scores') need whole passes; use Model.run."
            )
        spans = _spans(edits, self.length)
        if not spans:
            return None
        layer, last = min(spans), self.length - 1
        names = set(spans[layer])
        start = min(a for a, _ in spans[layer].values())
        stop = max(b for _, b in spans[layer].values())
        ahead = "heads" if names <= AFTER_HEADS else "cut" if names == {"scores"} else ""
        if ahead and layer == self.n_layers - 1:
            # Nothing follows: only the last row counts.
            return Course(edits, layer + 1, last, ahead, last, last + 1) if stop > last else None
        first = min([self._reach(start), *(self._reach(a) for later, some in spans.items()
                                           if later > layer for a, _ in some.values())])
        if ahead:
            return Course(edits, layer + 1, first, ahead, start, stop)
        return Course(edits, layer, first)

    @property
    def causal(self) -> bool:
        """Whether no position sees later ones, also in pictures."""
        return all(mask.plain in ("causal", "window") for mask in self.base._masks)

    def _reach(self, first: int) -> int:
        if first not in self._earliest:
            self._earliest[first] = first if self.causal else self.base.earliest(first)
        return self._earliest[first]

    def like(self, prompt: Prompt) -> "Variants":
        """Another prompt, for its courses and costs alone: it is run only if this one has pictures
        whose tokens see each other."""
        if not self.causal:
            return Variants(self.model, prompt)
        made = copy.copy(self)
        made.prompt, made.length, made._earliest = prompt, len(prompt), {}
        return made

    def rows(self, course: Optional[Course]) -> int:
        """The largest number of rows that a variant has in a block."""
        return 0 if course is None else max(self.length - course.first, course.stop - course.start)

    def cost(self, course: Optional[Course], floor: bool = False) -> float:
        """The token-layers of a variant; with `floor` without queries that nothing reads."""
        if course is None:
            return 0.0
        total, last = 0.0, self.n_layers - 1
        before = self.lane_share
        model = self.model
        keys = before * (2 * model.n_kv_heads / (2 * model.n_kv_heads + model.n_heads) if floor else 1)
        if course.ahead:
            full = course.stop - course.start
            total += full * (1 - before) if course.ahead == "heads" else full
        rows = self.length - course.first
        if course.entry <= last:
            total += rows * (last - course.entry)
            total += 1 if rows == 1 else rows * keys + 1
        return total

    @property
    def lane_share(self) -> float:
        """What queries, keys and values take of a block, by parameters."""
        found = getattr(self, "_share", None)
        if found is None:
            block = self.lane.blocks[0]
            out = self.projection(0)
            size = {module: sum(p.numel() for p in module.parameters())
                    for module in (block.module, block.attention)}
            inner = 0 if out is None else sum(p.numel() for p in out[0].parameters())
            found = (size[block.attention] - inner) / max(1, size[block.module])
            self._share = found
        return found

    # -- running -------------------------------------------------------------------------------

    def outcomes(
        self, writes: Sequence[Union[Intervention, Iterable[Intervention]]], rows: int = 2048
    ) -> Float[Tensor, "variant d_vocab"]:
        """The last row of logits of every variant.

        Args:
            writes: interventions per variant, as `Model.run` takes them.
            rows: how many rows may go through a block together; a variant is never divided.

        Raises: as `course`; OutOfRange where a cut leaves a row without any key.
        """
        courses = [self.course(write) for write in writes]
        found = self.plain.expand(len(courses), -1).clone()
        for part in self.passes(courses, rows):
            found[part] = self.run([courses[i] for i in part])
        return found

    def passes(self, courses: Sequence[Optional[Course]], rows: int) -> list[list[int]]:
        """Variants that go through the blocks together, those that differ from early blocks first."""
        order = sorted((i for i, course in enumerate(courses) if course is not None),
                       key=lambda i: (courses[i].begins, courses[i].first, i))  # type: ignore
        parts: list[list[int]] = []
        held = 0
        for i in order:
            size = self.rows(courses[i])
            if not parts or held + size > rows:
                parts.append([])
                held = 0
            parts[-1].append(i)
            held += size
        return parts

    def run(self, courses: Sequence[Optional[Course]]) -> Float[Tensor, "variant d_vocab"]:
        """The last rows of variants in one pass, whatever its size."""
        courses = list(courses)
        with torch.inference_mode():
            found = self.plain.expand(len(courses), -1).clone()
            moving = [i for i, course in enumerate(courses) if course is not None]
            if moving:
                one = _Running(self, [courses[i] for i in moving])  # type: ignore[misc]
                found[moving] = one.run().to(found)
                self.spent += sum(self.cost(courses[i]) for i in moving)
        return found.clone()

    def projection(self, layer: int) -> Optional[tuple[nn.Module, Optional[int]]]:
        """The module that takes the heads' outputs to what the attention module returns, and how
        many values that returns beside it (None: no tuple).

        None where there is no such (a gate or norm lies between). Found by watching two rows.
        """
        known = self.lane.__dict__.setdefault("_projections", {})
        if layer not in known:
            known[layer] = self._find_projection(layer)
        return known[layer]

    def _find_projection(self, layer: int) -> Optional[tuple[nn.Module, Optional[int]]]:
        attention = self.lane.blocks[layer].attention
        seen: list[tuple[nn.Module, Tensor, Tensor]] = []

        def keep(module: nn.Module, args: tuple, output: Any) -> None:
            if args and isinstance(args[0], Tensor) and isinstance(output, Tensor):
                seen.append((module, args[0].detach(), output.detach()))

        made: list[Any] = []
        handles = [m.register_forward_hook(keep) for m in attention.modules() if m is not attention]
        handles.append(attention.register_forward_hook(lambda m, args, out: made.append(out)))
        rows = torch.arange(min(2, self.length))
        kept: dict[str, list[Tensor]] = {"z": []}
        spent = self.base.spent
        try:
            self.base.replay(layer, rows[None], until=layer + 1, into=kept)
        finally:
            for handle in handles:
                handle.remove()
        self.base.spent = spent
        out = first_tensor(made[0]) if len(made) == 1 else None
        z = kept["z"][0].reshape(len(rows), -1)
        for module, given, result in reversed(seen):
            if (out is not None and given.numel() == z.numel() and result.shape == out.shape
                    and torch.equal(given.reshape(z.shape), z) and torch.equal(result, out)
                    and not isinstance(module, (nn.Dropout, nn.Identity))):
                return module, len(made[0]) - 1 if isinstance(made[0], tuple) else None
        return None


class _Enough(Exception):
    """Thrown out of a block once it has made its keys and values."""


class _Running:
    """One pass of some variants over the blocks; also what the attention modules call."""

    def __init__(self, variants: Variants, courses: list[Course]) -> None:
        self.variants, self.base, self.lane = variants, variants.base, variants.lane
        self.courses, self.length = courses, variants.length
        self.mode = "all"
        self.kept: Any = None
        self.here: list[tuple[int, Pass]] = []
        self.offsets: list[int] = []

    def run(self) -> Tensor:
        base, last = self.base, self.variants.n_layers - 1
        x = base.hidden[0].new_zeros(0, base.hidden[0].shape[-1])
        self.active: list[int] = []
        ends: dict[int, Tensor] = {}
        arrived: dict[int, Tensor] = {}
        with ExitStack() as stack:
            stack.enter_context(attend.implementation(self.lane.configs))
            stack.enter_context(attend.session(self.lane.attentions, self))
            stack.enter_context(no_earlier_picture(base.hf))
            for layer in range(min(c.begins for c in self.courses), last + 1):
                x = self._join(layer, x, arrived)
                arrived = self._ahead(layer)
                if not self.active:
                    continue
                self._lay_out()
                if layer < last or len(x) == len(self.active):
                    x = self._block(layer, x, "all")
                    continue
                self._block(layer, x, "keys")
                tails = torch.tensor(self.offsets[1:], device=x.device) - 1
                self.here = [(i, Pass(self.length - 1, 1)) for i in self.active]
                self.offsets = list(range(len(self.active) + 1))
                x = self._block(layer, x[tails], "last")
            ends.update({i: row[None] for i, row in zip(self.active, x)})
            ends.update(arrived)
            final = torch.cat([ends[i] for i in range(len(self.courses))])
            return base._tail(final[:, None])[:, -1]

    def _join(self, layer: int, x: Tensor, arrived: dict[int, Tensor]) -> Tensor:
        """The rows of variants that begin to differ at this block, behind those already there."""
        parts = [x]
        plain = self.base.hidden[layer]
        for i, course in enumerate(self.courses):
            if course.entry != layer:
                continue
            self.active.append(i)
            if i in arrived:
                parts += [plain[course.first : course.start], arrived[i], plain[course.stop :]]
            else:
                parts.append(plain[course.first :])
        return x if len(parts) == 1 else torch.cat(parts)

    def _lay_out(self) -> None:
        firsts = [self.courses[i].first for i in self.active]
        self.here = [(i, Pass(first, self.length - first)) for i, first in zip(self.active, firsts)]
        self._number()
        self.variants.groups.arrange(firsts)

    def _number(self) -> None:
        self.offsets = [0]
        for _, now in self.here:
            self.offsets.append(self.offsets[-1] + now.length)

    def _ahead(self, layer: int) -> dict[int, Tensor]:
        """Variants of which this block is executed for the edited positions alone."""
        found: dict[int, Tensor] = {}
        for how in ("heads", "cut"):
            some = [i for i, c in enumerate(self.courses) if c.begins == layer and c.ahead == how]
            if not some:
                continue
            spans = [slice(self.courses[i].start, self.courses[i].stop) for i in some]
            self.here = [(i, Pass(s.start, s.stop - s.start)) for i, s in zip(some, spans)]
            self._number()
            rows = torch.cat([self.base.hidden[layer][s] for s in spans])
            if how == "heads":
                z = torch.cat([self.base.z[layer][s] for s in spans])
                self.kept = self._edited(layer, "z", z)
            rows = self._block(layer, rows, how)
            found.update(zip(some, rows.split([now.length for _, now in self.here])))
        return found

    def _block(self, layer: int, x: Tensor, mode: str) -> Tensor:
        """The rows behind this block; with mode "keys" nothing but what `attend` keeps."""
        self.mode = mode
        block = self.base.blocks[layer]
        at = torch.cat([now.positions(x.device) for _, now in self.here])
        args, kwargs = block_arguments(*self.base._given[layer], x[None], at[None], self.length)
        short: Any = nullcontext()
        out = self.variants.projection(layer) if mode == "heads" else None
        if out is not None:
            made, rest = out[0](self.kept.reshape(1, len(x), -1)), out[1]
            result = made if rest is None else (made, *(None,) * rest)
            short = replaced_forward({block.attention: lambda *_, **__: result})
        with short, self._writing(layer, mode):
            try:
                return first_tensor(block.module(*args, **kwargs)).reshape(x.shape)  # type: ignore
            except _Enough:
                return x

    # -- edits ---------------------------------------------------------------------------------

    def _edited(self, layer: int, name: str, x: Tensor) -> Tensor:
        """`x` [row, ...] after the edits of every variant."""
        own: Optional[Tensor] = None
        for number, (i, now) in enumerate(self.here):
            edits = self.courses[i].edits
            if edits.writes(layer, name):
                own = x.clone() if own is None else own
                rows = slice(self.offsets[number], self.offsets[number + 1])
                own[rows] = edits.apply(layer, name, x[rows], now)
        return x if own is None else own

    @contextmanager
    def _writing(self, layer: int, mode: str) -> Iterator[None]:
        """Hooks for the residual sites that some variant edits in this block."""
        block, stored, handles = self.base.blocks[layer], {}, []

        def act(block: Any, name: str, x: Tensor) -> Tensor:
            return self._edited(layer, name, x.reshape(-1, x.shape[-1])).reshape(x.shape)

        try:
            for name in PORTS:
                if not any(self.courses[i].edits.writes(layer, name) for i, _ in self.here):
                    continue
                port = block.port(name)
                assert port is not None  # proven writable, or refused before
                if name == "resid_mid" and block.kind == "sequential":
                    handles += _write_middle(block, act, stored)
                else:
                    handles.append(_hook(block, name, port, act))
            yield
        finally:
            for handle in handles:
                handle.remove()

    def attend(
        self, layer: int, q: Tensor, k: Tensor, v: Tensor, mask: Any, given: dict[str, Any]
    ) -> Tensor:
        """What an attention module calls: `[1, head, row, d_head]` in, `[1, row, head, d_head]` out."""
        if self.mode == "heads":
            return self.kept[None]
        q, k, v = (self._edited(layer, name, x[0].transpose(0, 1))
                   for name, x in (("q", q), ("k", k), ("v", v)))
        cuts = self._cuts(layer)
        groups = self.variants.groups
        if self.mode == "keys":
            self.kept = (k, v)
            raise _Enough
        if self.mode == "cut":
            z = groups.cut_rows(layer, q, [now for _, now in self.here], cuts, given)
        elif self.mode == "last":
            keys, values = self.kept
            z = groups.last_rows(layer, q, keys, values, cuts, given)
        else:
            z = groups.all_rows(layer, q, k, v, cuts, given)
        return self._edited(layer, "z", z)[None]

    def _cuts(self, layer: int) -> Optional[Callable[[int], Optional[Tensor]]]:
        """Number of a variant -> which edges are left, `[head, row, key]`; None where none is cut."""
        if not any(self.courses[i].edits.blocks(layer) for i, _ in self.here):
            return None
        keys = torch.arange(self.length, device=self.lane.device)

        def left(number: int) -> Optional[Tensor]:
            i, now = self.here[number]
            return self.courses[i].edits.visible(layer, now.positions(keys.device), keys, now)

        return left


def _spans(edits: Edits, length: int) -> dict[int, dict[str, tuple[int, int]]]:
    """Layer -> site -> the first edited position and the one behind the last."""
    found: dict[int, dict[str, tuple[int, int]]] = {}

    def add(layer: int, name: str, positions: Sequence[int], phase: str) -> None:
        if phase == "last":
            positions = [p for p in positions if p == length - 1]
        if phase == "decode" or not positions:
            return
        here = found.setdefault(layer, {})
        a, b = here.get(name, (length, 0))
        here[name] = (min(a, *positions, length), max(b, max(positions) + 1))

    for (layer, name), entries in edits._sites.items():
        for one, places, _ in entries:
            add(layer, name, places.fixed, one.phase)
    for layer, heads in edits._heads.items():
        for one, *_ in heads:
            add(layer, "z", range(length), one.phase)
    for layer, blocks in edits._blocks.items():
        for one, _, queries, keys in blocks:
            add(layer, "scores", queries.fixed if keys.fixed else (), one.phase)
    return found
