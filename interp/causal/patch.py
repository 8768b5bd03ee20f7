"""Activation patching and path patching: what an activation carries, and along which way.

Paper     activation patching: arXiv:2202.05262, 2309.16042; path patching: arXiv:2211.00593
Question  What changes in `clean` if one activation is what it was in `corrupt`?
Engines   TransformerLens' own tool where it can (`interp.models.tl_patching`), else `Model.run`,
          which also takes pictures and architectures whose TransformerLens hooks move nothing
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Optional, SupportsIndex, Union

import numpy as np
import torch
import xarray as xr
from jaxtyping import Float
from torch import Tensor

from interp.causal.metrics import LogitDifference, Metric, check_count, key_of, why_not_last_row
from interp.causal.passes import Passes
from interp.core import Head, Prompt, PromptError, Result, Site, SiteRefused, ablate, each, patch
from interp.core.head import HeadLike, check_heads
from interp.core.head import heads as as_heads
from interp.core.prompt import Where
from interp.core.site import check_layers
from interp.models import tl_patching
from interp.models.head_gradients import head_gradients
from interp.models.model import Model
from interp.models.run import READ_DIMS
from interp.prompts.counterfactual import check_aligned

Engine = Literal["auto", "own", "transformer_lens"]
PATCHABLE = ("embed", "resid_pre", "resid_mid", "resid_post", "attn_out", "mlp_in", "mlp_out", "q",
             "k", "v", "z")
ALIKE = {torch.float32: 1e-3, torch.float64: 1e-5}
"""How far two ways to the same logits may differ, in units of the logits' spread."""


class AnswerLogits:
    """Logits of chosen tokens in the last row, `[prompt, outcome]`; with `log_prob`, in nats.

    Example:
        >>> import interp
        >>> model = interp.open_model("backcopy-1l")
        >>> AnswerLogits([[5, 6, 7]])(model, [Prompt.from_tokens(range(3, 12))]).shape
        (1, 3)

    Args:
        tokens: for every prompt equally many token ids.
    """

    dim = "prompt"

    def __init__(
        self, tokens: Sequence[Sequence[int]], log_prob: bool = False, batch_size: int = 8
    ) -> None:
        self.tokens = [[int(token) for token in row] for row in tokens]
        if len({len(row) for row in self.tokens}) != 1 or not self.tokens[0]:
            raise PromptError("give equally many answer tokens for every prompt, at least one.")
        self.log_prob, self.batch_size = bool(log_prob), int(batch_size)
        self.name = "log_prob" if log_prob else "logit"
        self.unit = "nats" if log_prob else "logits"

    def __call__(
        self, model: Model, prompts: Sequence[Prompt], write: Any = ()
    ) -> Float[np.ndarray, "prompt outcome"]:
        return self.values(self.passes(model, prompts, write))

    def __repr__(self) -> str:
        return f"AnswerLogits({self.name!r})"

    @property
    def shared(self) -> str:
        return key_of("answer logits", self.tokens)

    def passes(self, model: Model, prompts: Sequence[Prompt], write: Any) -> Tensor:
        """The last row of every prompt, `[prompt, vocab]`."""
        check_count(self.tokens, prompts)
        run = model.run(prompts, write=write, logits="last", batch_size=self.batch_size)
        return torch.stack([rows[-1] for rows in run.logits])

    def values(self, outcome: Any) -> np.ndarray:
        rows = outcome.double().log_softmax(-1) if self.log_prob else outcome.double()
        return rows.gather(1, torch.tensor(self.tokens)).numpy()

    def of_last(
        self, rows: Float[Tensor, "variant d_vocab"], prompt: int
    ) -> Float[np.ndarray, "variant outcome"]:
        """The values of variants of one prompt from their last rows."""
        rows = rows.double().log_softmax(-1) if self.log_prob else rows.double()
        return rows[:, self.tokens[prompt]].numpy()


HELD = 1 << 28
"""Bytes of states to be put in that are held at once."""
LAST_ROW = (LogitDifference, AnswerLogits)
"""Metrics that read nothing but the last row of logits."""


def activation_patching(
    model: Model,
    clean: Sequence[Prompt],
    corrupt: Sequence[Prompt],
    metric: Metric,
    site: Union[str, Site] = "z",
    *,
    heads: Optional[Iterable[HeadLike]] = None,
    positions: Where = "all",
    engine: Engine = "auto",
) -> Result:
    """Run `clean` with one activation after the other taken from `corrupt`.

    Example:
        >>> import interp
        >>> from interp.causal.metrics import LogitDifference
        >>> model = interp.open_model("backcopy-1l")
        >>> clean, corrupt = ([Prompt.from_tokens([1, 5, x, 3])] for x in (7, 8))
        >>> found = activation_patching(model, clean, corrupt, LogitDifference([5], [6]),
        ...                             "resid_pre", positions="each")
        >>> found["effect"].dims, found.manifest["engine"]
        (('prompt', 'layer', 'position'), 'transformer_lens')

    This is noising: what does `clean` lose? Exchange the two for denoising: what brings it back?

    Args:
        clean, corrupt: aligned pairs of equal length (`interp.prompts.counterfactual`).
        metric: see `interp.causal.metrics`.
        site: a residual site, or "q", "k", "v", "z" head by head; "z.3" for one block.
        heads: heads (for "k" and "v" key-value heads) to patch; all for None.
        positions: a place in the clean prompts, patched as a whole, or "each": one at a time.
        engine: "transformer_lens", "own", or "auto": TransformerLens where it can.

    Returns:
        `value`, and `effect` = patched - clean: `[prompt, layer, (head,) (position)]`; `clean`,
        `corrupt` `[prompt]`. With `AnswerLogits` an axis `outcome` comes last.

    Raises:
        PromptError: pairs that are not aligned, or, for "each", prompts of several lengths.
        SiteRefused: a site that cannot be patched, or not by the engine asked for.
    """
    clean, corrupt, site = list(clean), list(corrupt), Site.parse(site)
    check_aligned(clean, corrupt)
    cells = _cells(model, site, heads, positions, clean)
    reason = "the metric reads more than the last row of logits"
    if isinstance(metric, LAST_ROW):
        reason = "it patches one position or all of them" if not _tl_cells(cells, clean) else None
    if engine != "own" and reason is None:
        reason = tl_patching.reason_against(model, site.name, [*clean, *corrupt])
    if engine == "transformer_lens" and reason:
        raise SiteRefused(f"cannot patch through TransformerLens: {reason}; use engine='own'.")
    if engine == "own" or reason:
        made, used = _own(model, clean, corrupt, metric, cells, site.name), "own"
    else:
        made, used = _lens(model, clean, corrupt, metric, cells, site.name, False), "transformer_lens"
    about = {"measure": "activation_patching", "site": str(site), "engine": used,
             "not_transformer_lens": reason if used == "own" and engine != "own" else ""}
    return _result(model, clean, corrupt, metric, cells, made, about)


def path_patching(
    model: Model,
    clean: Sequence[Prompt],
    corrupt: Sequence[Prompt],
    metric: Metric,
    heads: Optional[Iterable[HeadLike]] = None,
    *,
    positions: Where = "all",
    engine: Engine = "auto",
) -> Result:
    """The direct path from a head to the logits: its output from `corrupt`, other heads held.

    Example:
        >>> import interp
        >>> from interp.causal.metrics import LogitDifference
        >>> model = interp.open_model("backcopy-3l")
        >>> clean, corrupt = ([Prompt.from_tokens([1, 5, x, 3])] for x in (7, 8))
        >>> path_patching(model, clean, corrupt, LogitDifference([5], [6]))["effect"].dims
        ('prompt', 'layer', 'head')

    One head's output (before the output projection) is what it was in `corrupt`; the outputs of all
    others stay what they were in `clean`; MLPs and norms recompute, up to the logits.

    Args:
        clean, corrupt, metric: as in `activation_patching`.
        heads: all for None.
        positions: patched as a whole, or "each": one at a time. For a metric of the last row only
            its last position matters, as no head carries anything on from the others.
        engine: "auto" is "own": TransformerLens has no tool for head to logits. With
            "transformer_lens" its activation patching runs under hooks that hold all heads.

    Returns: as `activation_patching`; other heads than `heads` are NaN.

    With a metric of the last row, "own" runs that row alone (each head's output in it is known, so
    no other position matters), after having checked that this gives the same logits.

    Raises: as `activation_patching`.

    Source: arXiv:2211.00593, section 3.1; the frozen heads as in card 5 of this toolkit's methods.
    """
    clean, corrupt = list(clean), list(corrupt)
    check_aligned(clean, corrupt)
    cells = _cells(model, Site("z"), heads, positions, clean)
    about = {"measure": "path_patching", "engine": "own", "rows": "all"}
    last = isinstance(metric, LAST_ROW)
    if engine == "transformer_lens":
        if not last or not _tl_cells(cells, clean):
            raise SiteRefused(
                "TransformerLens patches one position or all, and shows the last row here; use "
                "engine='own'."
            )
        made = _lens(model, clean, corrupt, metric, cells, "z", True)
        return _result(model, clean, corrupt, metric, cells, made,
                       {**about, "engine": "transformer_lens"})
    short = None
    if last and model.kind == "decoder" and all(cell.every for cell in cells):
        short = _last_rows(model, clean, corrupt)
    if short is not None:
        about["rows"] = "last"
        made = _short(model, metric, cells, short)
    else:
        made = _own(model, clean, corrupt, metric, cells, "z", frozen=True)
    ends = None if short is None else [metric.values(rows) for rows in short.rows]
    return _result(model, clean, corrupt, metric, cells, made, about, ends)


def path_attribution(
    model: Model,
    clean: Sequence[Prompt],
    corrupt: Sequence[Prompt],
    toward: Sequence[SupportsIndex],
    against: Sequence[SupportsIndex],
    *,
    batch_size: int = 8,
) -> Result:
    """A first guess at `path_patching` for all heads at once: gradient times change.

    Example:
        >>> import interp
        >>> model = interp.open_model("backcopy-3l")
        >>> clean, corrupt = ([Prompt.from_tokens([1, 5, x, 3])] for x in (7, 8))
        >>> path_attribution(model, clean, corrupt, [5], [6])["estimate"].dims
        ('prompt', 'layer', 'head')

    For every prompt the logit of `toward` minus that of `against`, in the last row: to first order
    how it changes if a head's output there becomes what it is in `corrupt`. One pass with a
    gradient per prompt, whatever the number of heads.

    Source: attribution patching, arXiv:2310.10348, on the direct path only.
    """
    clean, corrupt = list(clean), list(corrupt)
    check_aligned(clean, corrupt)
    check_count(toward, clean)
    check_count(against, clean)
    change = (_last_states(model, corrupt, ("z",), batch_size)[0]["z"]
              - _last_states(model, clean, ("z",), batch_size)[0]["z"])
    rows = []
    for prompt, a, b, one in zip(clean, toward, against, change):
        def gap(logits: Tensor, a: int = int(a), b: int = int(b)) -> Tensor:
            return logits[-1, a] - logits[-1, b]

        slope = head_gradients(model, prompt, gap, direct=True).z[:, -1].numpy()
        rows.append((slope * one).sum(-1))
    data = xr.Dataset({"estimate": (("prompt", "layer", "head"), np.stack(rows))},
                      {"layer": range(model.n_layers), "head": range(model.n_heads)})
    return Result(data, {**model.manifest(), "measure": "path_attribution", "unit": "logits"})


# -- cells ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Cell:
    """One patch: a block, a head (None for sites without), and positions per prompt."""

    layer: int
    head: Optional[int]
    positions: tuple[tuple[int, ...], ...]
    at: Optional[int] = None
    every: bool = False


def _cells(
    model: Model, site: Site, heads: Any, positions: Where, clean: Sequence[Prompt]
) -> list[_Cell]:
    if site.name not in PATCHABLE:
        raise SiteRefused(
            f"cannot patch site {site.name!r} one at a time; choose from: {', '.join(PATCHABLE)}, "
            "or write it with interp.patch."
        )
    layers = site.of(model.n_layers)
    headed = READ_DIMS.get(site.name, ("", ""))[1:2]
    if headed == ("d_model",) or site.name not in READ_DIMS:
        if heads is not None:
            raise SiteRefused(f"site {site.name!r} has no heads; leave heads out.")
        where: list[tuple[int, Optional[int]]] = [(layer, None) for layer in layers]
    else:
        count = model.n_kv_heads if headed == ("kv_head",) else model.n_heads
        chosen = [Head(a, b) for a in layers for b in range(count)] if heads is None \
            else as_heads(heads)
        check_heads(chosen, model.n_layers, count)
        check_layers({head.layer for head in chosen}, model.n_layers)
        where = [(head.layer, head.head) for head in chosen]
    if isinstance(positions, str) and positions == "each" and not _named(clean, "each"):
        lengths = {len(prompt) for prompt in clean}
        if len(lengths) > 1:
            raise PromptError(
                f"positions='each' needs prompts of one length, not {sorted(lengths)}; name a "
                "segment instead."
            )
        (length,) = lengths
        return [_Cell(a, b, ((at,),) * len(clean), at) for a, b in where for at in range(length)]
    places = tuple(prompt.positions(positions) for prompt in clean)
    every = all(len(prompt) - 1 in place for prompt, place in zip(clean, places))
    return [_Cell(a, b, places, None, every) for a, b in where]


def _named(prompts: Sequence[Prompt], name: str) -> bool:
    return any(segment.name == name for prompt in prompts for segment in prompt.segments)


def _tl_cells(
    cells: Sequence[_Cell], clean: Sequence[Prompt]
) -> Optional[list[tuple[int, int, int]]]:
    """The cells as TransformerLens takes them, None where one is a set of positions."""
    made = []
    whole = tuple(tuple(range(len(prompt))) for prompt in clean)
    for cell in cells:
        if cell.positions == whole:
            at = tl_patching.EVERY
        elif cell.at is not None:
            at = cell.at
        else:
            return None
        made.append((cell.layer, at, tl_patching.EVERY if cell.head is None else cell.head))
    return made


# -- engines -------------------------------------------------------------------------------------


def _lens(
    model: Model, clean: list[Prompt], corrupt: list[Prompt], metric: Any,
    cells: Sequence[_Cell], site: str, frozen: bool,
) -> Iterator[np.ndarray]:
    given = _tl_cells(cells, clean)
    assert given is not None
    for rows in tl_patching.last_rows(model, site, clean, corrupt, given, frozen=frozen):
        yield metric.values(rows)


def _own(
    model: Model, clean: list[Prompt], corrupt: list[Prompt], metric: Any,
    cells: Sequence[_Cell], site: str, frozen: bool = False,
) -> Iterator[np.ndarray]:
    """Prompt by prompt, running only what a patch can change, where the metric reads the last row;
    else cell by cell through `Model.run`."""
    spelled = "embed" if site == "embed" else f"{site}.{','.join(map(str, _layers(cells)))}"
    own, other = (_states(model, prompts, spelled) for prompts in (clean, corrupt))
    where = {layer: i for i, layer in enumerate(_layers(cells))}

    def put(cell: _Cell, number: int) -> Any:
        places = list(cell.positions[number])
        at = where[cell.layer] if site != "embed" else 0
        value = other[number][at, places]
        if cell.head is not None:
            value, given = own[number][at, places], value[:, cell.head]
            value[:, cell.head] = given
        return patch("embed" if site == "embed" else f"{site}.{cell.layer}", value, places)

    if not frozen and why_not_last_row(metric) is None:
        passes = Passes(model, clean, metric)
        columns = []
        for number, states in enumerate(own):
            size = max(1, HELD // max(1, states[0].nbytes))
            columns.append([value for start in range(0, len(cells), size) for value in passes.values(
                number, [put(cell, number) for cell in cells[start : start + size]])])
        yield from map(np.stack, zip(*columns))
        return
    held: list[tuple] = [() for _ in clean]
    if frozen:
        full = own if len(_layers(cells)) == model.n_layers else _states(model, clean, "z")
        held = [(patch("z", value, slice(0, len(prompt))),) for prompt, value in zip(clean, full)]
    for cell in cells:
        yield metric(model, clean, each(
            (*before, put(cell, number)) for number, before in enumerate(held)))


def _layers(cells: Sequence[_Cell]) -> list[int]:
    return sorted({cell.layer for cell in cells})


def _states(model: Model, prompts: Sequence[Prompt], site: str) -> list[np.ndarray]:
    """A site per prompt, `[layer, position, ...]` without padding."""
    read = model.run(prompts, read=site, logits="none").reads[site]
    if "layer" not in read.dims:
        read = read.expand_dims("layer", 1)
    return [one[:, : len(prompt)] for one, prompt in zip(read.values, prompts)]


def _last_states(
    model: Model, prompts: Sequence[Prompt], sites: Sequence[str], batch_size: int = 8
) -> tuple[dict[str, np.ndarray], Float[Tensor, "prompt d_vocab"]]:
    """Sites and logits at the last position of every prompt; a few prompts at a time are whole."""
    found: dict[str, list[np.ndarray]] = {site: [] for site in sites}
    rows = []
    for start in range(0, len(prompts), batch_size):
        part = prompts[start : start + batch_size]
        run = model.run(part, read=list(sites), logits="last", batch_size=batch_size)
        rows += [one[-1] for one in run.logits]
        for site in sites:
            for one, prompt in zip(run.reads[site].values, part):
                found[site].append(one[:, len(prompt) - 1])
    return {site: np.stack(values) for site, values in found.items()}, torch.stack(rows)


@dataclass(frozen=True)
class _Short:
    """The last token of every prompt alone, with all that reaches it from elsewhere written in."""

    prompts: tuple[Prompt, ...]
    held: tuple[tuple, ...]
    corrupt: Float[np.ndarray, "prompt layer head d_head"]
    rows: tuple[Float[Tensor, "prompt d_vocab"], Float[Tensor, "prompt d_vocab"]]


def _last_rows(model: Model, clean: list[Prompt], corrupt: list[Prompt]) -> Optional[_Short]:
    """Prompts of one token with the same last row, None where that cannot be had.

    Where every head's output is held, attention brings nothing, and the last row depends on its own
    embedding only. That is not so where other things mix positions, hence the check.
    """
    if {"resid_pre", "z"} - set(model.sites("write")):
        return None
    states, full = _last_states(model, clean, ("resid_pre.0", "z"))
    prompts = tuple(Prompt.from_tokens(prompt.ids[-1:]) for prompt in clean)
    held = tuple(
        (patch("resid_pre.0", start[:1], [0]), patch("z", z[:, None], [0]))
        for start, z in zip(states["resid_pre.0"], states["z"])
    )
    short = model.run(prompts, write=each(held), logits="last", batch_size=32).logits
    tolerance = ALIKE.get(model.dtype, 5e-2)
    for a, b in zip(full.double(), short):
        if not float((a - b[-1].double()).abs().max()) <= tolerance * float(a.std()):
            return None
    other, end = _last_states(model, corrupt, ("z",))
    return _Short(prompts, held, other["z"], (full, end))


def _short(
    model: Model, metric: Any, cells: Sequence[_Cell], short: _Short
) -> Iterator[np.ndarray]:
    other = [z[:, None] for z in short.corrupt]
    for cell in cells:
        assert cell.head is not None
        head = Head(cell.layer, cell.head)
        yield metric(model, short.prompts, each(
            (*held, ablate(head, "resample", value=z)) for held, z in zip(short.held, other)))


# -- results -------------------------------------------------------------------------------------


def _result(
    model: Model, clean: list[Prompt], corrupt: list[Prompt], metric: Any,
    cells: Sequence[_Cell], made: Iterable[np.ndarray], about: dict[str, Any],
    ends: Optional[list[np.ndarray]] = None,
) -> Result:
    if metric.dim != "prompt":
        raise PromptError(
            f"metric {metric.name!r} reads texts of its own, but patching is measured in the "
            "prompts that are patched; use a metric of these."
        )
    start, end = ends or (metric(model, clean, ()), metric(model, corrupt, ()))
    outcome = ("outcome",) if start.ndim == 2 else ()
    headed = cells[0].head is not None
    by_place = cells[0].at is not None
    layers = range(model.n_layers) if headed else _layers(cells)
    sizes: dict[str, Any] = {"layer": list(layers)}
    if headed:
        sizes["head"] = list(range(1 + max(c.head or 0 for c in cells)))
        if about["measure"] == "path_patching" or about.get("site", "z")[0] in "zq":
            sizes["head"] = list(range(model.n_heads))
    if by_place:
        sizes["position"] = list(range(len(clean[0])))
    shape = (len(clean), *(len(marks) for marks in sizes.values()), *start.shape[1:])
    values = np.full(shape, np.nan)
    index = {layer: i for i, layer in enumerate(sizes["layer"])}
    for cell, value in zip(cells, made, strict=True):
        where = (index[cell.layer], *((cell.head,) if headed else ()),
                 *((cell.at,) if by_place else ()))
        values[(slice(None), *where)] = value
    dims = ("prompt", *sizes, *outcome)
    more = tuple(range(1, 1 + len(sizes)))
    data = xr.Dataset({
        "value": (dims, values), "effect": (dims, values - np.expand_dims(start, more)),
        "clean": (("prompt", *outcome), start), "corrupt": (("prompt", *outcome), end),
    }, sizes)
    for name in data.data_vars:
        data[name].attrs["units"] = metric.unit
    return Result(data, {
        **model.manifest(), **about, "metric": metric.name, "unit": metric.unit,
        "n_prompts": len(clean), "clean": [prompt.digest() for prompt in clean],
        "corrupt": [prompt.digest() for prompt in corrupt],
    })
