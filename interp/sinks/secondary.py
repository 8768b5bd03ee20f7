"""Secondary sinks: later tokens that start to attract attention part-way through the network.

Paper     arXiv:2512.22213
Question  Which positions other than the first become sinks, in which layers, for how long?
Measure   |cosine| of the residual to the primary sink's, inside the primary's window
Cause     rescale or project out the MLP write at the creation layer; attention must return to
          content
"""

from collections.abc import Sequence
from typing import Any, Literal, Optional, SupportsFloat, SupportsIndex

import numpy as np
import pandas as pd
import torch
import xarray as xr
from jaxtyping import Float
from matplotlib.axes import Axes
from torch import Tensor

from interp.core import Prompt, Result
from interp.core.errors import NumericalError, OutOfRange, PromptError
from interp.figures import heat, layer_curve
from interp.models.model import Model
from interp.sinks.levels import (
    Levels,
    Rule,
    SinkLevels,
    level_table,
    n_levels,
    read_released,
    relabel,
    write_released,
)
from interp.sinks.mlp_removal import intervene
from interp.sinks.residual_profile import NAMES, groups, profile

__all__ = [
    "Levels", "Rule", "SinkLevels", "by_class", "cosine_to", "draw", "intervene", "level_table",
    "levels", "measure", "n_levels", "primary_strength", "primary_window", "read_released",
    "relabel", "score", "sink_score", "sinks", "write_released",
]

LastLayer = Literal["hf", "raw"]

MIN_FALL = 0.25
"""With raw last layers, the primary's window ends only where its norm loses this share at once."""

SHALLOW = 24
"""Up to this depth the relative rule is the default: the official one counts absolute layers."""

NEAR = 16
"""Neighbors on each side that a sink's attention is compared with, for `lift`."""


def score(
    residual: Float[Tensor | np.ndarray, "layer position d_model"],
    primary: Sequence[SupportsIndex] = (0,),
    threshold: SupportsFloat = 0.9,
    rule: Rule = "official",
    last_layer: Optional[LastLayer] = None,
) -> SinkLevels:
    """Find the sinks of one sequence: the primary, and the later tokens that join its direction.

    Example:
        >>> residual = torch.eye(6).repeat(12, 1, 1)
        >>> residual[2:11, 0] = residual[5:11, 4] = 90 * torch.eye(6)[0]  # 4 joins 0 at layer 5
        >>> score(residual, rule="relative").levels[4]
        ((5, 6, 7, 8, 9, 10), 'secondary')

    Args:
        residual: output of every block, embeddings left out, so that index i is block i.
        primary: candidate positions of the primary sink; the one with the largest mean norm is
            taken. The paper uses (0, 1), and (0, 1, 2) with a chat template.
        threshold: on the absolute cosine to the primary, strictly exceeded. Both signs count, as
            in the released code; `cosine` keeps the sign and `anti_aligned` counts.
        rule: "official" labels by lifetime in absolute layers (see `label`): meant for 30 layers
            and more. "relative" scales with the depth and the primary's own window: use it, or
            show it beside the other, for up to 24 layers.
        last_layer: what the last entry of `residual` is. "hf": transformers' last hidden state,
            after the final norm; the window then ends at the largest fall of the primary's norm,
            wherever it is. "raw": the block's output; the window ends at the largest fall only if
            the norm loses a quarter there, else it stays open. Default: "hf" with the official
            rule, as in the released code, and "raw" with the relative one.

    Returns:
        `SinkLevels`; the primary's layers are its whole window.

    Raises:
        NumericalError: NaN or infinity in the residual.
        OutOfRange: a candidate position outside the sequence.

    Source: arXiv:2512.22213, released code `hidden_state_base.py`; the relative rule, "raw" and
    the open window are this toolkit's.
    """
    values = _checked(residual)
    n_positions = values.shape[1]
    threshold = float(threshold)
    if not 0 < threshold < 1:
        raise ValueError(f"threshold must lie between 0 and 1, not {threshold}: it is a cosine.")
    candidates = [int(position) for position in primary]
    if not candidates:
        raise ValueError("no candidate for the primary sink: give at least one position.")
    for position in candidates:
        if not 0 <= position < n_positions:
            raise OutOfRange(
                f"primary candidate {position} is outside the sequence of {n_positions} positions."
            )
    norm = values.norm(dim=-1)
    anchor = max(candidates, key=lambda position: float(norm[:, position].mean()))
    if last_layer is None:
        last_layer = "hf" if rule == "official" else "raw"
    cosine = cosine_to(values, anchor)
    return _join(norm[:, anchor], cosine, anchor, rule, threshold, last_layer)


def _join(
    norm: Float[Tensor, "layer"], cosine: Float[Tensor, "layer position"], anchor: int, rule: Rule,
    threshold: float, last_layer: LastLayer, only: Optional[tuple[int, int]] = None,
) -> SinkLevels:
    """The positions that join `anchor` in its window, or in the window `only`, with labels."""
    start, stop = primary_window(norm, last_layer) if only is None else only
    found: dict[int, tuple[int, ...]] = {anchor: tuple(range(start, stop))}
    joined = cosine[start:stop].abs() > threshold
    for position in joined[:, anchor + 1 :].any(0).nonzero().flatten().tolist():
        column = anchor + 1 + position
        found[column] = tuple(start + i for i in joined[:, column].nonzero().flatten().tolist())
    signed = {
        position: (1.0,) * len(layers) if position == anchor
        else tuple(float(cosine[layer, position]) for layer in layers)
        for position, layers in found.items()
    }
    n_layers = len(cosine)
    return SinkLevels(
        levels=relabel(found, n_layers, rule, primary=anchor), n_layers=n_layers, primary=anchor,
        window=(start, stop), rule=rule, threshold=threshold, cosine=signed,
    )


def primary_window(
    norm: Float[Tensor | np.ndarray, "layer"], last_layer: LastLayer = "hf"
) -> tuple[int, int]:
    """First, and one past the last, layer in which the primary sink is alive.

    Example:
        >>> primary_window(torch.tensor([1.0, 1.0, 50.0, 50.0, 50.0, 2.0]))
        (2, 5)
        >>> primary_window(torch.tensor([1.0, 1.0, 50.0, 49.0, 50.0, 52.0]), "raw")
        (2, 6)

    It opens after the largest rise of the norm and closes after the largest later fall (see
    `score` for `last_layer`). If the largest rise leads into the last layer there is no later
    fall, and the window is that layer alone; the released code stops with an error there.
    """
    values = torch.as_tensor(norm).double()
    n_layers = len(values)
    if n_layers < 2:
        return 0, n_layers
    change = values.diff()
    start = int(change.argmax()) + 1
    if start == n_layers - 1:
        return start, n_layers
    stop = start + int(change[start:].argmin()) + 1
    if last_layer == "raw" and -change[stop - 1] < MIN_FALL * values[stop - 1]:
        stop = n_layers
    return start, stop


def cosine_to(
    residual: Float[Tensor | np.ndarray, "layer position d_model"], position: SupportsIndex = 0
) -> Float[Tensor, "layer position"]:
    """Signed cosine of every position's residual to that of one position, layer by layer.

    Example:
        >>> cosine_to(torch.tensor([[[1.0, 0.0], [-2.0, 0.0], [0.0, 3.0]]]))
        tensor([[ 1., -1.,  0.]])

    Zero where a residual is zero.
    """
    values = _checked(residual)
    unit = torch.nn.functional.normalize(values, dim=-1, eps=torch.finfo(values.dtype).tiny)
    return (unit * unit[:, int(position), None]).sum(-1)


def sink_score(
    attention: Float[Tensor | np.ndarray, "*batch head query key"],
    position: SupportsIndex,
    length_free: bool = False,
) -> Float[Tensor, "*batch"]:
    """Mean attention that a position receives from later queries, over heads.

    Example:
        >>> uniform = torch.tril(torch.ones(1, 4, 4)) / torch.arange(1.0, 5.0)[:, None]
        >>> sink_score(uniform, 1).round(decimals=4), sink_score(uniform, 1, length_free=True)
        (tensor(0.2917), tensor(1.))

    Args:
        length_free: weigh the row of query t by t + 1, so that uniform attention scores 1.

    Square prompts only. This is the toolkit's score: the paper's exact formula is not confirmed.
    """
    rows = torch.as_tensor(attention)
    rows = rows.to(torch.promote_types(rows.dtype, torch.float32))
    n_queries, n_keys = rows.shape[-2:]
    key = int(position)
    if n_queries != n_keys:
        raise ValueError(f"attention must be square, not {n_queries} queries by {n_keys} keys.")
    if not 0 <= key < n_keys - 1:
        raise OutOfRange(
            f"position {key} has no later queries among {n_keys} positions; choose 0 to "
            f"{n_keys - 2}."
        )
    received = rows[..., key + 1 :, key]
    if length_free:
        received = received * torch.arange(key + 2, n_queries + 1).to(received)
    return received.mean((-2, -1))


def primary_strength(
    attention: Float[Tensor | np.ndarray, "layer head query key"], primary: SupportsIndex = 0
) -> Float[Tensor, "layer"]:
    """Attention that the primary sink receives from later queries in each layer: PS_l.

    Example:
        >>> attention = torch.zeros(2, 1, 3, 3)
        >>> attention[0, 0, :, 0] = 1
        >>> primary_strength(attention)
        tensor([1., 0.])

    The primary is said to weaken where secondary sinks appear: compare PS_l before and from the
    modal onset.
    """
    return sink_score(attention, primary)


def measure(
    model: Model,
    prompts: Sequence[Prompt],
    primary: Optional[Sequence[int]] = None,
    *,
    rule: Optional[Rule] = None,
    threshold: SupportsFloat = 0.9,
    last_layer: LastLayer = "raw",
    seed: int = 0,
) -> Result:
    """Find the sinks of every prompt, and what norms, keys, values and attention do there.

    Example:
        >>> import interp
        >>> model = interp.open_model("backcopy-1l")
        >>> found = measure(model, [Prompt.from_tokens([5, 9, 8, 7, 12])])
        >>> found["cosine"].dims, sinks(found)["label"].tolist()[0]
        (('prompt', 'layer', 'position'), 'primary')

    Args:
        prompts: any lengths; long ones are measured a few layers at a time.
        primary: candidates for the primary sink; None takes (0, 1), and (0, 1, 2) for prompts made
            with a chat template, as in the paper.
        rule: see `score`; None takes "relative" up to 24 layers and "official" beyond. The label
            under the other rule is kept beside it.
        last_layer: how the primary's window ends (see `score`). The values are those that leave
            each block, also the last one, before the final norm.
        seed: draws the ordinary position that stands in for the primary in `chance`.

    Returns:
        [prompt, layer, position], NaN beyond a prompt's end: `norm` and `cosine` (signed, to the
        primary) of the residual leaving the block, `received` (mean attention from later queries,
        heads averaged), `key_norm` and `value_norm` (key-value heads averaged).
        [prompt]: `primary`, `window_start`, `window_stop`, `length`, `primary_ratio` (its norm over
        the median of the others, in its window), `chance` (how many positions would be called
        secondary if a random position were the primary; NaN where that is a sink itself).
        [sink], see `sinks`: every position of every prompt that is a sink, in the layers of
        `member` [sink, layer].

    Raises:
        PromptError: no prompts, or fewer than 4 tokens.
        OutOfRange: a candidate outside a prompt.

    Source: arXiv:2512.22213; `received`, `lift`, `chance` and `primary_ratio` are this toolkit's.
    """
    if not prompts or min(map(len, prompts)) < 4:
        raise PromptError("give at least one prompt, and prompts of at least 4 tokens.")
    if rule is None:
        rule = "relative" if model.n_layers <= SHALLOW else "official"
    shape = (len(prompts), model.n_layers, max(map(len, prompts)))
    arrays = {name: np.full(shape, np.nan, dtype=np.float32) for name in NAMES}
    each: dict[str, list[Any]] = {name: [] for name in PER_PROMPT}
    rows: list[dict[str, Any]] = []
    rng = np.random.default_rng(seed)
    for numbers in groups(model, prompts):
        some = [prompts[i] for i in numbers]
        stranger = int(rng.integers(3, min(map(len, some))))
        for number, anchor, seen in zip(numbers, *profile(model, some, primary, stranger)):
            n = len(prompts[number])
            for name in NAMES:
                arrays[name][number, :, :n] = seen[name]
            norm, cosine, strange = (
                torch.from_numpy(seen[k]) for k in ("norm", "cosine", "to_stranger"))
            given = (rule, float(threshold), last_layer)
            found = _join(norm[:, anchor], cosine, anchor, *given)
            inside = slice(*found.window)
            others = torch.cat([norm[inside, :anchor], norm[inside, anchor + 1 :]], 1)
            instead = _join(norm[:, anchor], strange, stranger, *given, only=found.window)
            ratio = (norm[inside, anchor] / others.median(-1).values).median()
            # A stranger that is a sink itself says nothing about chance.
            chance = float("nan") if stranger in found.levels else float(
                len(instead.of("secondary")))
            for name, value in zip(PER_PROMPT, (n, anchor, *found.window, float(ratio), chance)):
                each[name].append(value)
            rows += _rows(found, prompts[number], number, seen)
    data = xr.Dataset({name: (("prompt", "layer", "position"), a) for name, a in arrays.items()})
    for name, values in each.items():
        data[name] = ("prompt", values)
    for name in rows[0]:
        dims = ("sink", "layer") if name == "member" else "sink"
        data[f"sink_{name}" if name != "member" else name] = (dims, [row[name] for row in rows])
    manifest = {**model.manifest(), "measure": "secondary", "rule": rule,
                "threshold": float(threshold), "last_layer": last_layer, "seed": seed,
                "n_prompts": len(prompts), "keys": "after position encoding and norms"}
    return Result(data.assign_coords(layer=np.arange(model.n_layers)), manifest)


PER_PROMPT = ("length", "primary", "window_start", "window_stop", "primary_ratio", "chance")


def sinks(found: Result) -> pd.DataFrame:
    """What `measure` found as a table, a row per sink.

    `prompt`, `position`, `label`, `other_label` (under the other rule), `onset`, `lifetime`,
    `longest_run`, `cosine` (mean signed), `anti_aligned` (layers), `token`, `norm` (at the onset),
    `score` (mean attention received from later queries in the blocks that read it as a sink) and
    `lift` (that over the median of ordinary neighbors: 1 is no sink, whatever the length).
    """
    names = [str(n) for n in found.data.data_vars if str(n).startswith("sink_")]
    return pd.DataFrame({n.removeprefix("sink_"): found[n].values for n in names})


def levels(found: Result) -> list[SinkLevels]:
    """What `measure` found as one `SinkLevels` per prompt, for `level_table` and released files."""
    table: Any = sinks(found)
    member = found["member"].values
    rule: Rule = found.manifest["rule"]
    made = []
    for number in range(found.data.sizes["prompt"]):
        here = table.index[table["prompt"] == number]
        made.append(SinkLevels(
            {int(table["position"][i]): (tuple(np.flatnonzero(member[i]).tolist()),
                                         str(table["label"][i])) for i in here},
            found.data.sizes["layer"], int(found["primary"][number]),
            (int(found["window_start"][number]), int(found["window_stop"][number])), rule,
            float(found.manifest["threshold"]),
            token_ids={int(table["position"][i]): int(table["token"][i]) for i in here},
        ))
    return made


def by_class(found: Result, quantity: str) -> dict[str, xr.DataArray]:
    """A quantity of `measure` per layer for the primary, the secondary sinks and all other tokens.

    Each is [prompt, layer], the mean over the positions of that class; prompts without secondary
    sinks are NaN there. The last position is left out: no later query can attend to it.
    """
    values = found[quantity].values
    n_prompts, _, n_positions = values.shape
    kinds = np.full((n_prompts, n_positions), "other tokens", dtype=object)
    kinds[np.arange(n_positions)[None] >= found["length"].values[:, None] - 1] = ""
    table = sinks(found)
    for label, name in (("noise", ""), ("secondary", "secondary sinks"), ("primary", "primary")):
        rows = table[table["label"] == label]
        kinds[rows["prompt"], rows["position"]] = name
    made = {}
    for name in ("primary", "secondary sinks", "other tokens"):
        chosen = (kinds == name)[:, None]
        kept = np.where(chosen & np.isfinite(values), values, 0.0).sum(-1)
        count = (chosen & np.isfinite(values)).sum(-1)
        mean = np.where(count > 0, kept / np.maximum(count, 1), np.nan)
        if np.isfinite(mean).any():
            made[name] = xr.DataArray(mean, {"layer": found.data.layer}, ("prompt", "layer"))
    return made


ROLES = {"primary": "primary", "secondary sinks": "secondary", "other tokens": "other"}
LABELS = {"norm": "norm of the residual out", "residual_in": "norm of the residual in",
          "key_norm": "norm of the keys", "value_norm": "norm of the values",
          "received": "attention from later queries", "cosine": "cosine to the primary"}


def draw(found: Result, ax: Axes, quantity: str = "levels") -> Axes:
    """Draw "levels" (map of onset and lifetime), or a quantity per layer for each class of tokens.

    Quantities: "residual_in" (entering the block), "norm" (leaving it), "key_norm", "value_norm",
    "received", "cosine".
    """
    if quantity == "levels":
        table = level_table(levels(found), label=None)
        table = table[[not _only_noise(found, *row) for row in
                       table[["onset", "lifetime"]].itertuples(index=False)]]
        onset, lifetime = (np.arange(found.data.sizes["layer"] + k) for k in (0, 1))
        counts = np.zeros((len(lifetime), len(onset)))
        counts[table["lifetime"].astype(int), table["onset"].astype(int)] = table["count"]
        grid = xr.DataArray(np.log1p(counts), {"lifetime": lifetime, "onset": onset},
                            ("lifetime", "onset"))
        return heat.draw(ax, grid, x="creation layer", y="lifetime (layers)",
                         label="log(1 + sinks)")
    curves = by_class(found, "norm" if quantity == "residual_in" else quantity)
    if quantity == "residual_in":
        # What leaves a block enters the next.
        curves = {name: curve.isel(layer=slice(None, -1)).assign_coords(
            layer=curve.layer.values[1:]) for name, curve in curves.items()}
    return layer_curve.draw(
        ax, curves, label=LABELS[quantity], log="norm" in quantity or quantity == "residual_in",
        roles={name: ROLES[name] for name in curves},
    )


def _only_noise(found: Result, onset: Any, lifetime: Any) -> bool:
    table = sinks(found)
    here = (table["onset"] == int(onset)) & (table["lifetime"] == int(lifetime))
    return bool((table["label"][here] == "noise").all())


def _rows(
    found: SinkLevels, prompt: Prompt, number: int, arrays: dict[str, np.ndarray]
) -> list[dict[str, Any]]:
    """The sinks of one prompt with all that is known of each."""
    other: Rule = "relative" if found.rule == "official" else "official"
    second = relabel(found.levels, found.n_layers, other, primary=found.primary)
    ordinary = np.ones(len(prompt), dtype=bool)
    ordinary[list(found.levels)] = False
    made = []
    for position, (layers, label) in sorted(found.levels.items()):
        member = np.zeros(found.n_layers, dtype=bool)
        member[list(layers)] = True
        # A state that leaves block l is attended to in block l + 1.
        reading = [layer + 1 for layer in layers if layer + 1 < found.n_layers]
        near = slice(max(0, position - NEAR), position + NEAR + 1)
        beside = arrays["received"][reading, near][:, ordinary[near]]
        received = arrays["received"][reading, position]
        known = np.isfinite(received)
        score = float(received[known].mean()) if known.any() else float("nan")
        usual = float(np.nanmedian(beside)) if np.isfinite(beside).any() else float("nan")
        made.append({
            "prompt": number, "position": position, "label": label,
            "other_label": second[position][1], "onset": layers[0], "lifetime": len(layers),
            "longest_run": found.longest_run[position],
            "cosine": float(np.mean(found.cosine[position])),
            "anti_aligned": found.anti_aligned[position], "token": prompt.ids[position],
            "norm": float(arrays["norm"][layers[0], position]), "score": score,
            "lift": score / usual if usual else float("nan"), "member": member,
        })
    return made


def _checked(residual: Tensor | np.ndarray) -> Tensor:
    values = torch.as_tensor(residual)
    values = values.to(torch.promote_types(values.dtype, torch.float32))
    finite = torch.isfinite(values)
    if not finite.all():
        layer, position, _ = (~finite).nonzero()[0].tolist()
        raise NumericalError(
            f"residual is NaN or infinite at layer {layer}, position {position}; run the model in "
            "bfloat16 or float32."
        )
    return values
