"""Removing the MLP write that makes a secondary sink, one layer at a time.

Paper     arXiv:2512.22213
Question  Does one MLP make the sink, and does attention return to content without it?
Measure   share of its layers in which the sink still points like the primary; attention on sinks,
          primary and content afterwards
Cause     the write of one layer is zeroed, averaged, rescaled or projected out at the sinks,
          against the same at ordinary positions and in other layers
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, Literal, SupportsIndex

import numpy as np
import xarray as xr
from matplotlib.axes import Axes

from interp.core import Prompt, Result, edit
from interp.core.intervention import Intervention
from interp.figures.style import color, note, style
from interp.models.model import Model
from interp.sinks.mlp_formation import ordinary_positions, sink_table
from interp.sinks.residual_profile import batch_size, groups
from interp.stream.per_layer import PerLayer
from interp.stream.reducers import SegmentMass
from interp.stream.residual import Cosine

How = Literal["zero", "mean", "rescale", "project_out"]
ON = ("sinks", "primary", "content")
QUANTITIES = ("survival", "deleted", *(f"on_{name}" for name in ON))

DELETED_BELOW = 0.5
"""A sink is deleted if it stays one in less than this share of its layers."""

AVERAGED = 8
"""Prompts that the "mean", "rescale" and "project_out" values are taken from, at most."""


def intervene(
    model: Model, prompts: Sequence[Prompt], found: Result, *, how: How = "zero",
    offsets: Sequence[SupportsIndex] = (-2, -1, 0, 1), n_seeds: SupportsIndex = 5,
    seed: SupportsIndex = 0, most: SupportsIndex = 32,
) -> Result:
    """Remove the MLP's write at the sinks, one layer at a time, and see what becomes of them.

    Example: `tests/sinks/test_secondary_measure.py`, on a model with planted sinks.

    Args:
        prompts, found: the prompts, and what `secondary.measure` returned for them. Secondary sinks
            of one prompt that are created in one layer are edited together: one case.
        how: "zero"; "mean" (the ordinary positions' mean write); "rescale" (to the ordinary
            positions' median norm); "project_out" (the primary's direction after the block).
        offsets: layers relative to the creation layer.
        n_seeds: controls of each kind: as many random ordinary positions in the creation layer
            ("positions"), and the sinks in random other layers ("layers").
        most: of the prompts that have secondary sinks, the first ones.

    Returns:
        [edit, case] with edits named "none", "layer -2", ..., "positions 0", ..., "layers 0", ...:
        `survival`, the share of its layers in which a sink still is one (mean over the case's
        sinks); `deleted`, the share of sinks that survive in less than half of their layers;
        `on_sinks`, `on_primary`, `on_content`: attention of the queries after the first sink in
        the blocks that read it as one, heads averaged (for "none", "layer 0" and "positions").
        [case]: `prompt`, `onset`, `count`.
        Prompts without ordinary positions are left out.

    Raises:
        SiteRefused: the MLP's write cannot be changed in this model.
        ValueError: there is no secondary sink, or none beside ordinary positions.

    Source: the method card of arXiv:2512.22213 asks for this test; it is not in the paper.
    """
    table: Any = sink_table(found)
    table = table[table["label"] == "secondary"]
    if table.empty:
        raise ValueError("there is no secondary sink to intervene on.")
    table = table[table["prompt"].isin(np.unique(table["prompt"])[: int(most)])]
    rng = np.random.default_rng(int(seed))
    shifts, seeds = [int(offset) for offset in offsets], range(int(n_seeds))
    cases: list[dict[str, Any]] = []
    anchors = found["primary"].values[table["prompt"]]
    for (onset, anchor), group in table.groupby(["onset", anchors]):
        onset, anchor = int(onset), int(anchor)
        own = _cases(prompts, found, group, onset)
        if not own:
            continue
        values: dict[int, Any] = {}
        far = [x for x in range(model.n_layers) if x - onset not in shifts]
        elsewhere = rng.choice(far, len(seeds), replace=len(far) < len(seeds)) if far else ()
        plan = [("none", -1, "sinks"),
                *((f"layer {shift:+d}" if shift else "layer 0", onset + shift, "sinks")
                  for shift in shifts),
                *((f"positions {i}", onset, "others") for i in seeds),
                *((f"layers {i}", int(layer), "sinks") for i, layer in enumerate(elsewhere))]
        for name, layer, where in plan:
            if name != "none" and not 0 <= layer < model.n_layers:
                continue
            marked = [case["marked"] for case in own]
            if where == "others":
                # With many sinks in a prompt there may be fewer other positions.
                marked = [
                    prompt.with_segments(others=np.sort(rng.choice(
                        free, min(case["count"], len(free)), replace=False)).tolist())
                    for case in own
                    for prompt, free in [(case["marked"], case["content"])]
                ]
            write: list[Intervention] = []
            if name != "none":
                if how != "zero" and layer not in values:
                    values[layer] = _value(model, own, layer, anchor, how)
                write = [_removal(layer, where, how, values)]
            # Where attention goes is asked only where it is compared.
            looks = name in ("none", "layer 0") or where == "others"
            for case, seen in zip(own, _after(model, own, marked, anchor, write, found, looks)):
                case[name] = seen
        cases += own
    if not cases:
        raise ValueError("every position beside the sinks is a sink; there is no control.")
    names = ["none", *(f"layer {s:+d}" if s else "layer 0" for s in shifts),
             *(f"{kind} {i}" for kind in ("positions", "layers") for i in seeds)]
    arrays = {quantity: np.full((len(names), len(cases)), np.nan) for quantity in QUANTITIES}
    for column, case in enumerate(cases):
        for row, name in enumerate(names):
            for quantity, value in case.get(name, {}).items():
                arrays[quantity][row, column] = value
    data = xr.Dataset({k: (("edit", "case"), v) for k, v in arrays.items()}, {"edit": names})
    for key in ("prompt", "onset", "count"):
        data[key] = ("case", [case[key] for case in cases])
    return Result(data, {**model.manifest(), "intervention": f"mlp_out, {how}", "seed": int(seed),
                         "offsets": shifts, "n_seeds": int(n_seeds)})


def control(found: Result, quantity: str, kind: str) -> np.ndarray:
    """A quantity under the controls of one kind, "positions" or "layers": mean over seeds [case].

    Example: `tests/sinks/test_secondary_measure.py`.
    """
    rows = [i for i, name in enumerate(found["edit"].values) if str(name).startswith(f"{kind} ")]
    values = found[quantity].values[rows]
    known = np.isfinite(values)
    total = np.where(known, values, 0.0).sum(0)
    return np.where(known.any(0), total / np.maximum(known.sum(0), 1), np.nan)


@style()
def draw(found: Result, ax: Axes, quantity: str = "survival") -> Axes:
    """Draw a quantity per edit as bars with a dot per case; controls are gray."""
    bars: dict[str, list[int]] = {}
    for row, name in enumerate(map(str, found["edit"].values)):
        kind, _, which = name.partition(" ")
        word = {"none": "untouched", "positions": "other positions", "layers": "other layers",
                "layer": "creation layer" if which == "0" else f"layer {which}"}[kind]
        if np.isfinite(found[quantity].values[row]).any():
            bars.setdefault(word, []).append(row)
    for at, (word, rows) in enumerate(bars.items()):
        values = found[quantity].values[rows]
        known = np.isfinite(values)
        per_case = (np.where(known, values, 0).sum(0) / np.maximum(known.sum(0), 1))[known.any(0)]
        role = "control" if word.startswith(("other", "untouched")) else "secondary"
        ax.bar(at, per_case.mean(), color=color(role), width=0.7)
        ax.plot(np.full(len(per_case), at), per_case, ".", color="black", markersize=2, alpha=0.4)
    ax.set_xticks(range(len(bars)), list(bars), rotation=35, ha="right", rotation_mode="anchor")
    ax.set_ylabel({"survival": "layers survived (share)", "deleted": "sinks deleted",
                   "on_sinks": "attention on the sinks", "on_primary": "attention on the primary",
                   "on_content": "attention on content"}[quantity])
    note(ax, f"n = {found.data.sizes['case']} cases (prompt, creation layer)")
    return ax


def _cases(prompts: Sequence[Prompt], found: Result, group: Any, onset: int) -> list[dict]:
    """One case per prompt, with its sinks, primary and content as segments."""
    table = sink_table(found)
    made = []
    for number, here in group.groupby("prompt"):
        number = int(number)
        free = ordinary_positions(prompts[number], table, number)
        if not len(free):
            continue
        positions = list(map(int, here["position"]))
        marked = replace(prompts[number], segments=()).with_segments(
            sinks=sorted(positions), primary=[int(found["primary"][number])],
            content=free.tolist())
        made.append({"prompt": number, "onset": onset, "count": len(positions), "marked": marked,
                     "index": here.index.tolist(), "positions": positions, "content": free})
    return made


def _value(
    model: Model, cases: Sequence[Mapping[str, Any]], layer: int, anchor: int, how: How
) -> Any:
    """What "mean", "rescale" and "project_out" put in, from all prompts together."""
    site = f"resid_post.{layer}" if how == "project_out" else f"mlp_out.{layer}"
    seen = []
    for case in cases[:AVERAGED]:
        rows = model.run(case["marked"], read=site, logits="none").reads[site].values[0, 0]
        seen.append(rows[[anchor]] if how == "project_out" else rows[case["content"]])
    rows = np.concatenate(seen)
    return float(np.median(np.linalg.norm(rows, axis=1))) if how == "rescale" else rows.mean(0)


def _removal(layer: int, where: str, how: How, values: Mapping[int, Any]) -> Intervention:
    site = f"mlp_out.{layer}"
    if how == "zero":
        return edit(site, "multiply", 0.0, where)
    kind = {"mean": "replace", "rescale": "norm", "project_out": "project_out"}[how]
    return edit(site, kind, values[layer], where)


def _after(
    model: Model, cases: Sequence[Mapping[str, Any]], marked: Sequence[Prompt], anchor: int,
    write: Sequence[Intervention], found: Result, looks: bool,
) -> list[dict[str, float]]:
    """Survival of the sinks and, if asked, where attention goes, in every case."""
    threshold = float(found.manifest["threshold"])
    results = []
    for numbers in groups(model, marked, columns=3):
        some = [marked[i] for i in numbers]

        def segments(row: int, _: int, some: list[Prompt] = some) -> SegmentMass:
            return SegmentMass({name: some[row].positions(name) for name in ON})

        stats = [Cosine(anchor), *([PerLayer("segments", segments)] if looks else [])]
        run = model.run(some, write=write, stats=stats, logits="none",
                        batch_size=batch_size(some))
        cosine = run.stats["cosine"].values
        mass = run.stats["segments"].mean("head") if looks else None
        for row, number in enumerate(numbers):
            case = cases[number]
            member = found["member"].values[case["index"]]
            still = np.abs(cosine[row][:, case["positions"]]).T > threshold
            survival = (still & member).sum(1) / member.sum(1)
            seen = {"survival": float(survival.mean()),
                    "deleted": float((survival < DELETED_BELOW).mean())}
            results.append(seen)
            first, n = min(case["positions"]), len(case["marked"])
            if mass is None or first + 1 >= n:
                continue
            # What leaves a block as a sink is read by the next.
            reading = [int(layer) + 1 for layer in np.flatnonzero(member.any(0))]
            layers = [layer for layer in reading if layer in mass.layer.values]
            if layers:
                rows = mass.isel(prompt=row, query=slice(first + 1, n)).sel(layer=layers)
                for name in ON:
                    seen[f"on_{name}"] = float(rows.sel(segment=name).mean())
    return results
