"""MLP formation of secondary sinks: which MLP writes them, and from which input directions.

Paper     arXiv:2512.22213
Question  Do sinks with unlike MLP inputs leave the MLP in one direction, the primary's?
Measure   cosine to the primary at every stage of the MLP; share of the block's update that the
          MLP explains; response of the MLP to each principal direction of its inputs
Cause     remove the write, one layer at a time (`interp.sinks.mlp_removal`)
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Optional, SupportsFloat, SupportsIndex

import numpy as np
import pandas as pd
import torch
import xarray as xr
from jaxtyping import Float
from matplotlib.axes import Axes
from torch import Tensor

from interp.core import Prompt, Result
from interp.core.errors import OutOfRange, SiteRefused
from interp.figures.style import color, note, style
from interp.models.model import Model
from interp.sinks.mlp_directions import (
    SWEEP,
    MlpDirections,
    RankCorrelation,
    directions,
    norm_relation,
)

__all__ = [
    "SWEEP", "MlpDirections", "RankCorrelation", "directions", "directions_of", "draw",
    "gated_chain", "measure", "norm_relation", "stage_cosines", "update_share",
]

MARKERS = {"input": ("o", 3.0, True), "up": ("s", 5.0, False), "gate": ("^", 6.0, False),
           "activated": ("x", 4.0, True), "product": ("D", 6.5, False), "output": ("o", 3.5, True)}
STAGES = tuple(MARKERS)


def gated_chain(
    mlp_input: Float[Tensor, "position d_model"],
    gate: Float[Tensor, "d_mlp d_model"],
    up: Float[Tensor, "d_mlp d_model"],
    down: Float[Tensor, "d_model d_mlp"],
    activation: Callable[[Tensor], Tensor] = torch.nn.functional.silu,
) -> dict[str, Tensor]:
    """The stages of a gated MLP for every position, from its normed input to its output.

    Example:
        >>> one = torch.eye(2)
        >>> list(gated_chain(torch.ones(3, 2), one, one, one))
        ['input', 'up', 'gate', 'activated', 'product', 'output']

    Args:
        gate, up, down: weights as in `torch.nn.Linear` ([out, in]).
    """
    lifted, gated = mlp_input @ up.T, mlp_input @ gate.T
    activated = activation(gated)
    product = activated * lifted
    return {"input": mlp_input, "up": lifted, "gate": gated, "activated": activated,
            "product": product, "output": product @ down.T}


def stage_cosines(
    chain: Mapping[str, Float[Tensor, "position width"]],
    positions: Sequence[SupportsIndex],
    reference: SupportsIndex = 0,
) -> pd.DataFrame:
    """Cosine between each sink and the reference position at every stage of the MLP.

    Example:
        >>> chain = {"input": torch.eye(2), "output": torch.tensor([[2.0, 0.0], [3.0, 0.0]])}
        >>> stage_cosines(chain, [1]).to_dict("records")
        [{'position': 1, 'input': 0.0, 'output': 1.0}]

    Args:
        chain: stages of one layer, the creation layer of these sinks, from `gated_chain` or read
            from a model.
        positions: the sinks created in this layer.
        reference: the primary sink's position; the released code always takes 0.

    Source: arXiv:2512.22213, released code `mlp_base.py`.
    """
    found: dict[str, Sequence[float]] = {"position": [int(p) for p in positions]}
    for stage, values in chain.items():
        rows = values.to(torch.promote_types(values.dtype, torch.float32))
        for position in [int(reference), *map(int, positions)]:
            if not 0 <= position < len(rows):
                raise OutOfRange(
                    f"position {position} is outside the {len(rows)} positions of stage {stage!r}."
                )
        anchor = rows[int(reference)]
        found[stage] = [float(torch.cosine_similarity(rows[int(p)], anchor, dim=0))
                        for p in positions]
    return pd.DataFrame(found)


def update_share(
    written: Float[Tensor, "*batch d_model"],
    before: Float[Tensor, "*batch d_model"],
    after: Float[Tensor, "*batch d_model"],
) -> Float[Tensor, "*batch"]:
    """Share of a block's update that one component wrote: <y, post - pre> / |post - pre|^2.

    Example:
        >>> update_share(torch.tensor([3.0, 0.0]), torch.zeros(2), torch.tensor([3.0, 0.0]))
        tensor(1.)

    Args:
        written: what the component (the MLP) added to the residual.
        before, after: the residual before and after the whole block; computed in float32, since a
            difference of large bfloat16 residuals is lossy.
    """
    kind = torch.promote_types(after.dtype, torch.float32)
    update = after.to(kind) - before.to(kind)
    return (written.to(kind) * update).sum(-1) / update.square().sum(-1)




def measure(
    model: Model, prompts: Sequence[Prompt], found: Result, *, label: str = "secondary",
    most: SupportsIndex = 251, seed: SupportsIndex = 0,
) -> Result:
    """Compare every sink with the primary at each stage of the MLP that creates it.

    Example: `tests/sinks/test_secondary_measure.py`, on a model with planted sinks.

    Args:
        prompts, found: the prompts, and what `secondary.measure` returned for them.
        label: which sinks.
        most: of them (drawn at random), and as many ordinary positions, where possible with the
            same tokens: the paper's 251.

    Returns:
        [instance], sinks first in each layer: `prompt`, `position`, `layer` (where the sink is
        created), `is_sink`, `same_token` (of a control: with its sink), `write_norm` (|MLP
        output|), `cosine_write` (MLP output to the primary's residual after the block),
        `update_share`, `shared_dims` (Jaccard index of the two largest coordinates with the primary's).
        `stage_cosine` [instance, stage] to the primary's value at the same stage. For the most
        frequent creation layer, `creation_layer`: `mlp_input` [row, d_model], `row_is_sink`, and
        `reference` [d_model], the mean MLP output of the primary there.

    Raises:
        SiteRefused: the model's MLP input or output cannot be read.
        ValueError: there is no such sink.

    Source: arXiv:2512.22213, `mlp_base.py` and `04.pca.ipynb`; controls and shares: this toolkit.
    """
    rng = np.random.default_rng(int(seed))
    chosen: Any = _pairs(prompts, found, label, int(most), rng)
    layers, counts = np.unique(chosen["onset"], return_counts=True)
    modal = int(layers[counts.argmax()])
    rows: list[dict[str, Any]] = []
    inputs: list[Tensor] = []
    references: list[Tensor] = []
    for layer in map(int, layers):
        sites = [f"{name}.{layer}" for name in ("resid_pre", "mlp_in", "mlp_out", "resid_post")]
        chain = _stages(model, layer)
        for number, here in chosen[chosen["onset"] == layer].groupby("prompt"):
            run = model.run(prompts[int(number)], read=sites, logits="none")
            before, given, written, after = (
                torch.from_numpy(run.reads[site].values[0, 0]) for site in sites)
            anchor = int(found["primary"][int(number)])
            places = [anchor, *map(int, here["position"])]
            stages = chain(given[places])
            stages["output"] = written[places]
            cosines = stage_cosines(stages, range(1, len(places)))
            share = update_share(written, before, after)
            for at, (_, one) in enumerate(here.iterrows()):
                position = int(one["position"])
                rows.append({
                    "prompt": int(number), "position": position, "layer": layer,
                    "is_sink": bool(one["is_sink"]), "same_token": bool(one["same_token"]),
                    "write_norm": float(written[position].norm()),
                    "cosine_write": float(torch.cosine_similarity(
                        written[position], after[anchor], dim=0)),
                    "update_share": float(share[position]),
                    "shared_dims": _jaccard(after[position], after[anchor]),
                    "stages": cosines.iloc[at].drop("position").to_dict(),
                })
                if layer == modal:
                    inputs.append(given[position])
            if layer == modal:
                references.append(written[anchor])
    names = [n for n in STAGES if all(n in row["stages"] for row in rows)]
    data = xr.Dataset({name: ("instance", [row[name] for row in rows])
                       for name in rows[0] if name != "stages"})
    data["stage_cosine"] = (("instance", "stage"),
                            [[row["stages"][name] for name in names] for row in rows])
    data["mlp_input"] = (("row", "d_model"), torch.stack(inputs).numpy())
    data["row_is_sink"] = ("row", [row["is_sink"] for row in rows if row["layer"] == modal])
    data["row_prompt"] = ("row", [row["prompt"] for row in rows if row["layer"] == modal])
    data["reference"] = ("d_model", torch.stack(references).mean(0).numpy())
    manifest = {**model.manifest(), "measure": "mlp_formation", "creation_layer": modal,
                "label": label, "seed": int(seed)}
    return Result(data.assign_coords(stage=names), manifest)


def directions_of(
    model: Model, formed: Result, rows: Optional[Sequence[SupportsIndex] | np.ndarray] = None,
    n_sweep: SupportsIndex = 6,
) -> MlpDirections:
    """The principal directions of what `measure` read, fed through the MLP that creates the sinks.

    `rows` chooses among the rows of `mlp_input`, with repetitions, for a bootstrap. Raises
    `SiteRefused` where the MLP is not one function of its input.
    """
    layer = int(formed.manifest["creation_layer"])
    mlp = model.mlp(layer)
    kept = np.arange(formed.data.sizes["row"]) if rows is None else np.asarray(rows, dtype=int)
    inputs = torch.from_numpy(formed["mlp_input"].values[kept])
    is_sink = torch.from_numpy(formed["row_is_sink"].values[kept])

    def respond(x: Tensor) -> Tensor:
        with torch.no_grad():
            return mlp(x.to(model.device, model.dtype)).float().cpu()

    reference = torch.from_numpy(formed["reference"].values)
    return directions(inputs[is_sink], inputs[~is_sink], respond, reference, n_sweep=n_sweep)


@style()
def draw(formed: Result, ax: Axes, threshold: Optional[SupportsFloat] = None) -> Axes:
    """Draw the cosine to the primary for every sink, one series per stage of the MLP."""
    cosine = formed["stage_cosine"].values[formed["is_sink"].values]
    # Sorted: with a hundred dots per stage the order of the prompts tells nothing.
    for column, name in enumerate(map(str, formed["stage_cosine"].stage.values)):
        marker, size, filled = MARKERS[name]
        ax.plot(np.sort(cosine[:, column]), marker, label=name, markersize=size,
                markerfacecolor=None if filled else "none", markeredgewidth=0.8, alpha=0.8)
    if threshold is not None:
        ax.axhline(float(threshold), color=color("control"), linewidth=0.8, linestyle=":")
    ax.set_xlabel("sink (each stage sorted)")
    ax.set_ylabel("cosine to the primary")
    ax.set_ylim(-1.05, 1.05)
    ax.legend(ncols=3, loc="lower center")
    note(ax, f"n = {len(cosine)}")
    return ax


def sink_table(found: Result) -> pd.DataFrame:
    """Prompt, position, label, onset and token of every sink that `secondary.measure` found."""
    names = ("prompt", "position", "label", "onset", "token")
    return pd.DataFrame({name: found[f"sink_{name}"].values for name in names})


def ordinary_positions(prompt: Prompt, table: pd.DataFrame, number: int) -> np.ndarray:
    """Positions of a prompt after the first three that are no sink of any kind."""
    free = np.ones(len(prompt), dtype=bool)
    free[:3] = False
    free[np.asarray(table["position"][table["prompt"] == number], dtype=int)] = False
    return np.flatnonzero(free)


def _pairs(
    prompts: Sequence[Prompt], found: Result, label: str, most: int, rng: np.random.Generator
) -> pd.DataFrame:
    """Sinks, each followed by its control: an ordinary position, best with the same token."""
    table: Any = sink_table(found)
    chosen = table[table["label"] == label]
    if chosen.empty:
        raise ValueError(f"there is no {label} sink to look at.")
    if len(chosen) > most:
        chosen = chosen.iloc[np.sort(rng.permutation(len(chosen))[:most])]
    rows = []
    for _, one in chosen.iterrows():
        number = int(one["prompt"])
        row = {"prompt": number, "position": int(one["position"]), "onset": int(one["onset"]),
               "is_sink": True, "same_token": True}
        rows.append(row)
        free = ordinary_positions(prompts[number], table, number)
        same = free[np.asarray(prompts[number].ids)[free] == int(one["token"])]
        if len(free):
            place = int(rng.choice(same if len(same) else free))
            rows.append({**row, "position": place, "is_sink": False, "same_token": len(same) > 0})
    return pd.DataFrame(rows)


def _stages(model: Model, layer: int) -> Callable[[Tensor], dict[str, Tensor]]:
    """The stages of the MLP, or its input alone where they cannot be told apart."""
    try:
        stages = model.mlp_stages(layer)
    except SiteRefused:
        return lambda x: {"input": x}

    def through(x: Tensor) -> dict[str, Tensor]:
        with torch.no_grad():
            found = stages(x.to(model.device, model.dtype))
        return {name: value.float().cpu() for name, value in found.items()}

    return through


def _jaccard(one: Tensor, other: Tensor, k: int = 2) -> float:
    a, b = (set(x.abs().topk(k).indices.tolist()) for x in (one, other))
    return len(a & b) / len(a | b)
