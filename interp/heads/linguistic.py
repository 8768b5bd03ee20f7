"""What heads attend to in text: fixed offsets, delimiters, or everything at once.

Paper     arXiv:1906.04341
Question  Which heads look at the previous or next token, which at delimiters, which broadly?
Measure   mean attention at an offset or on a group of tokens, and the entropy of the rows, beside
          what uniform attention over the visible keys would give
Cause     `interp.heads.no_op`: is attention to delimiters needed?
"""

from collections.abc import Mapping, Sequence
from typing import Any, Optional, SupportsFloat, SupportsIndex

import numpy as np
import torch
import xarray as xr
from jaxtyping import Bool, Float
from matplotlib.axes import Axes
from torch import Tensor

from interp.core import HeadScores, Prompt, PromptError, Result, ablate
from interp.core.errors import NumericalError, OutOfRange
from interp.figures import heat
from interp.models.model import Model
from interp.stream.per_layer import PerLayer
from interp.stream.reducers import Entropy, Offsets, SegmentMass

Keys = Sequence[SupportsIndex] | np.ndarray | slice | range
GROUPS = ("start", "separator", "punctuation")
BEHAVIORS = ("previous", "next", "self", "broad", *GROUPS)
OFFSETS = {"previous": -1, "self": 0, "next": 1}
PUNCTUATION = (".", ",")
"""What the paper counts as punctuation."""
SMOOTHING = 1e-4
ORDER = ("next", "previous", "broad", *GROUPS)
"""The order of the label tests: a later test that applies overwrites an earlier one."""


def offset_mass(
    attention: Float[Tensor | np.ndarray, "*batch head query key"],
    offset: SupportsIndex,
    *,
    official: bool = False,
) -> Float[Tensor, "*batch head"]:
    """Mean attention at key = query + offset: -1 is the previous token, 1 the next.

    Example:
        >>> offset_mass(torch.diag(torch.ones(3), -1)[None], -1)
        tensor([1.])
        >>> offset_mass(torch.diag(torch.ones(3), -1)[None], -1, official=True)
        tensor([0.7500])

    The mean is over the queries that have such a key; with `official` the sum is divided by all
    queries, as in the released code. Square maps only.

    Source: arXiv:1906.04341, figure 2; released notebook `General_Analysis.ipynb`.
    """
    rows = _checked(attention)
    n, shift = rows.shape[-1], int(offset)
    if rows.shape[-2] != n or abs(shift) >= n:
        raise OutOfRange(
            f"attention of shape {tuple(rows.shape)} has no keys at offset {shift} of its queries; "
            "give a square map and an offset shorter than it."
        )
    along = rows.diagonal(shift, -2, -1)
    return along.sum(-1) / n if official else along.mean(-1)


def segment_mass(
    attention: Float[Tensor | np.ndarray, "*batch head query key"],
    keys: Keys,
    queries: Optional[Keys] = None,
) -> Float[Tensor, "*batch head"]:
    """Attention on a set of keys, mean over all queries or over those given.

    Example:
        >>> rows = torch.tensor([[[0.5, 0.5], [0.0, 1.0]]])
        >>> segment_mass(rows, [1]), segment_mass(rows, [1], queries=[1])
        (tensor([0.7500]), tensor([1.]))

    Source: arXiv:1906.04341, figure 2 (from all tokens, from [SEP], from all others).
    """
    rows = _checked(attention)
    mass = rows[..., _index(keys, rows.shape[-1])].sum(-1)
    return (mass if queries is None else mass[..., _index(queries, rows.shape[-2])]).mean(-1)


def entropy(
    attention: Float[Tensor | np.ndarray, "*batch head query key"],
    *,
    smoothing: SupportsFloat = SMOOTHING,
    visible: Optional[Bool[Tensor | np.ndarray, "query key"]] = None,
) -> Float[Tensor, "*batch head query"]:
    """Entropy of each row in nats, after mixing in a little uniform attention.

    Example:
        >>> entropy(torch.full((1, 1, 4), 0.25)).exp().round(decimals=3)
        tensor([[4.]])

    Args:
        smoothing: share of uniform attention in the mixture, 0.0001 in the released code; it adds
            at most about 0.002 nats, so that the streamed statistic does without.
        visible: what each query may see, where that is not everything (causal models).

    Source: arXiv:1906.04341, figure 4; A <- .9999 A + .0001 / n.
    """
    rows, share = _checked(attention), float(smoothing)
    seen = torch.ones(rows.shape[-2:], dtype=torch.bool) if visible is None \
        else torch.as_tensor(visible)
    even = (seen / seen.sum(-1, keepdim=True).clamp_min(1)).to(rows)
    mixed = (1 - share) * rows + share * even
    return -torch.xlogy(mixed, mixed).sum(-1)


def labels(
    values: Mapping[str, Any],
    *,
    offset: SupportsFloat = 0.5,
    broad: SupportsFloat = 3.8,
    mass: SupportsFloat = 0.6,
) -> np.ndarray:
    """One label per head: the last of the tests that it passes, "" for none.

    Example:
        >>> found = labels({"next": np.array([[0.6, 0.1]]), "start": np.array([[0.7, 0.2]])})
        >>> found.tolist()
        [['start', '']]

    Args:
        values: [layer, head] arrays by name: "next" and "previous" (attention there), "broad"
            (entropy in nats), "start", "separator" and "punctuation" (attention on them). Those
            left out are not tested; NaN passes no test.
        offset, broad, mass: what must be exceeded. The entropy is for segments of 128 tokens:
            scale it with the logarithm of the length.

    Source: arXiv:1906.04341, figure 6; thresholds and order of the released notebook.
    """
    strange = sorted(set(values) - set(ORDER))
    if strange or not values:
        raise ValueError(f"labels need some of: {', '.join(ORDER)}; not {strange or 'none'}.")
    limit = {"next": float(offset), "previous": float(offset), "broad": float(broad)}
    shape = np.shape(next(iter(values.values())))
    found = np.full(shape, "", dtype="<U12")
    for name in ORDER:
        if name in values:
            found[np.asarray(values[name], dtype=float) > limit.get(name, float(mass))] = name
    return found


def delimiters(
    model: Model, prompt: Prompt, punctuation: Sequence[str] = PUNCTUATION
) -> dict[str, tuple[int, ...]]:
    """Positions of the start token, of separators and of punctuation in a prompt.

    Example:
        >>> import interp
        >>> model = interp.open_model("reader")
        >>> delimiters(model, model.prompt("note amber one two ten ; river"))
        {'start': (0,), 'separator': (6,), 'punctuation': ()}

    The start is [CLS] or BOS, at position 0 only; separators are [SEP], the end-of-text token and
    line ends; `punctuation` holds the words that count. A model without a tokenizer has the token
    ids of its configuration.
    """
    whole: Any = model.config
    config, tokenizer = whole.get_text_config(), model.tokenizer
    places = (config, tokenizer) if tokenizer is not None else (config,)
    first = _special(places, ("bos_token_id", "cls_token_id"))
    ends = _special(places, ("eos_token_id", "sep_token_id"))
    found: dict[str, list[int]] = {name: [] for name in GROUPS}
    for position, token in enumerate(prompt.ids):
        # What one token may be to a model that has a single special one.
        if position == 0 and token in first:
            found["start"].append(position)
        elif token in ends:
            found["separator"].append(position)
        elif tokenizer is not None:
            text = tokenizer.decode([token])
            if text and not text.strip(" \t").strip("\r\n") and "\n" in text:
                found["separator"].append(position)
            elif text.strip() in punctuation:
                found["punctuation"].append(position)
    return {name: tuple(where) for name, where in found.items()}


def measure(
    model: Model, prompts: Sequence[Prompt], behavior: str = "separator",
    *, groups: Optional[Sequence[Mapping[str, Sequence[int]]]] = None,
) -> Result:
    """Offsets, delimiters and entropy of every head, streamed, with their uniform counterparts.

    Example:
        >>> import interp
        >>> model = interp.open_model("reader")
        >>> found = measure(model, [model.prompt("note amber one two ten ; river")], "previous")
        >>> found["score"].dims, found["offset_mass"].dims
        (('layer', 'head'), ('sample', 'layer', 'head', 'offset'))

    Args:
        behavior: of `BEHAVIORS`, which `score` is about; `scores` gives the others.
        groups: for every prompt its positions by the names in `GROUPS`; `delimiters` if None.

    Returns:
        Per sample, layer and head: `offset_mass` (attention at -1, 0, 1; NaN where no query sees such a
        key), `mass` [.., segment], `separator_to_separator`, `other_to_separator`, `entropy` and
        `start_entropy` (nats, of the first row); the same names with `uniform_` in front hold what
        uniform attention over the visible keys gives, measured with every head made uniform in
        the same masks. NaN where a prompt has no token of a group.
        For `behavior`: `score`, `frequency` (share of samples over the label's threshold),
        `standard_error`, `null` (uniform), `eligible` (what the head can see), `samples`.
    """
    if behavior not in BEHAVIORS:
        raise ValueError(f"behavior must be one of {', '.join(BEHAVIORS)}, not {behavior!r}.")
    if not len(prompts):
        raise PromptError("no prompts to measure heads on: give at least one.")
    where = [delimiters(model, p) for p in prompts] if groups is None else list(groups)
    if len(where) != len(prompts):
        raise PromptError(f"groups for {len(where)} prompts, but {len(prompts)} prompts.")
    every = [(layer, head) for layer in range(model.n_layers) for head in range(model.n_heads)]
    data = _streamed(model, prompts, where, ())
    # The uniform run sees the same masks: windows, images, learned sinks outside of the rows.
    even = _streamed(model, prompts, where, [ablate(every, by="uniform")])
    data = data.merge(even.rename({name: f"uniform_{name}" for name in even}))
    data = data.rename(prompt="sample")
    found = Result(data, {
        **model.manifest(), "measure": "linguistic", "behavior": behavior, "smoothing": 0,
        "n_samples": len(prompts),
        **{f"samples with {name}": sum(bool(w.get(name)) for w in where) for name in GROUPS},
    })
    samples, null, limit = _samples(found, behavior)
    count = samples.notnull().sum("sample")
    found.data["score"], found.data["samples"] = samples.mean("sample"), samples
    found.data["frequency"] = (samples > limit).where(samples.notnull()).mean("sample")
    found.data["standard_error"] = (samples.std("sample", ddof=1) / count**0.5).where(count > 1)
    found.data["null"] = null.mean("sample")
    found.data["eligible"] = (null > 0).any("sample")
    if not bool(found["eligible"].any()):
        found.manifest["note"] = f"no sample shows {behavior!r}: its scores are NaN"
    return found


def scores(found: Result, behavior: str) -> HeadScores:
    """The ranking of the heads by one behavior, from what `measure` returned.

    Example:
        >>> import interp
        >>> model = interp.open_model("reader")
        >>> found = measure(model, [model.prompt("note amber one two ten ; river")])
        >>> scores(found, "next").top(1)  # no head of a causal model sees the next token
        []
    """
    samples, null, limit = _samples(found, behavior)
    count = samples.notnull().sum("sample")
    return HeadScores(
        samples.mean("sample"), (samples > limit).where(samples.notnull()).mean("sample"),
        (samples.std("sample", ddof=1) / count**0.5).where(count > 1), (null > 0).any("sample"))


def draw(found: Result, ax: Axes, behavior: Optional[str] = None) -> Axes:
    """Head map of one behavior, the measured one by default."""
    name = behavior or found.manifest["behavior"]
    ranked = scores(found, name)
    label = "entropy / uniform entropy" if name == "broad" else f"mean attention: {name}"
    return heat.draw(ax, ranked.scores, label=label, limits=(0, 1), eligible=ranked.eligible,
                     hatched="nothing of the kind in sight")


def _samples(found: Result, behavior: str) -> tuple[xr.DataArray, xr.DataArray, float]:
    """Values per sample, their uniform counterparts, and the label's threshold."""
    if behavior in OFFSETS:
        at = {"offset": OFFSETS[behavior]}
        null = found["uniform_offset_mass"].sel(at, drop=True).fillna(0.0)
        return found["offset_mass"].sel(at, drop=True), null, 0.5
    if behavior == "broad":
        even = found["uniform_entropy"]
        share = found["entropy"] / even.where(even > 0)
        return share, xr.where(even > 0, 1.0, 0.0), 3.8 / float(np.log(128))
    if behavior not in GROUPS:
        raise ValueError(f"behavior must be one of {', '.join(BEHAVIORS)}, not {behavior!r}.")
    at = {"segment": behavior}
    return (found["mass"].sel(at, drop=True),
            found["uniform_mass"].sel(at, drop=True).fillna(0.0), 0.6)


def _streamed(
    model: Model, prompts: Sequence[Prompt], where: Sequence[Mapping[str, Sequence[int]]],
    write: Sequence[Any],
) -> xr.Dataset:
    def segments(prompt: int, _: int) -> SegmentMass:
        return SegmentMass({name: list(where[prompt].get(name, ())) for name in GROUPS})

    run = model.run(
        prompts, write=write, logits="none",
        stats=[Offsets(tuple(sorted(OFFSETS.values()))), Entropy(), PerLayer("segments", segments)])
    rows, spread = run.stats["segments"], run.stats["entropy"]
    there = np.array([[bool(w.get(name)) for name in GROUPS] for w in where])
    present = xr.DataArray(there, {"segment": list(GROUPS)}, ("prompt", "segment"))
    ends = np.zeros((len(prompts), rows.sizes["query"]), dtype=bool)
    for line, w in zip(ends, where):
        line[list(w.get("separator", ()))] = True
    on_separator = rows.sel(segment="separator", drop=True).where(
        present.sel(segment="separator", drop=True))
    from_separator = xr.DataArray(ends, dims=("prompt", "query"))
    return xr.Dataset({
        "offset_mass": run.stats["offsets"],
        "mass": rows.mean("query").where(present),
        "separator_to_separator": on_separator.where(from_separator).mean("query"),
        "other_to_separator": on_separator.where(~from_separator).mean("query"),
        "entropy": spread.mean("query"),
        # Under a causal mask the first row sees itself alone.
        "start_entropy": spread.isel(query=0, drop=True),
    })


def _special(places: Sequence[Any], names: Sequence[str]) -> set[int]:
    found: set[int] = set()
    for place in places:
        for name in names:
            value = getattr(place, name, None)
            several = value if isinstance(value, (list, tuple)) else [value]
            found |= {int(token) for token in several if token is not None}
    return found


def _index(where: Keys, size: int) -> list[int]:
    places = range(*where.indices(size)) if isinstance(where, slice) else [int(p) for p in where]
    for place in places:
        if not 0 <= place < size:
            raise OutOfRange(f"position {place} does not exist: there are 0 to {size - 1}.")
    return list(places)


def _checked(attention: Tensor | np.ndarray) -> Tensor:
    rows = torch.as_tensor(attention)
    rows = rows.to(torch.promote_types(rows.dtype, torch.float32))
    if not torch.isfinite(rows).all():
        raise NumericalError("attention contains NaN or infinity; recompute it in float32.")
    return rows
