"""Sink levels: where sinks start, how long they last, what they are called, and their files.

Paper     arXiv:2512.22213
Question  Do the sinks of many sequences fall into a few levels (creation layer, lifetime)?
Measure   onset and lifetime of each sink, labels from them, counts of the pairs
Cause     none here: see `interp.sinks.secondary`, which finds the sinks
"""

import json
import math
import os
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, Optional, SupportsFloat, SupportsIndex, cast

import numpy as np
import pandas as pd

from interp.core.errors import OutOfRange, ResultCorrupted

Rule = Literal["official", "relative"]
Levels = dict[int, tuple[tuple[int, ...], str]]
"""{position: (layers in which it is a sink, label)}"""

_RELEASED_LABELS = {"bos_sink": "primary", "secondary": "secondary", "cliff": "secondary",
                    "noise": "noise"}


@dataclass(frozen=True)
class SinkLevels:
    """The sinks of one sequence: for every position the layers in which it is one, and a label.

    Example:
        >>> found = SinkLevels({0: ((1, 2, 3, 4), "primary"), 9: ((3, 4), "secondary")}, 8)
        >>> found.onset[9], found.lifetime[9], found.of("secondary")
        (3, 2, (9,))

    `levels` maps a position to (layers, label) with the labels "primary", "secondary" and
    "noise". `window` holds the first and one past the last layer in which the primary is alive.
    `cosine` holds the signed cosine to the primary in each of the position's layers; it is empty
    where only layer lists are known (released files). `token_ids` and `sample` carry the other
    fields of a released row.
    """

    levels: Levels
    n_layers: int
    primary: int = 0
    window: tuple[int, int] = (0, 0)
    rule: Rule = "official"
    threshold: float = 0.9
    cosine: dict[int, tuple[float, ...]] = field(default_factory=dict)
    token_ids: dict[int, int] = field(default_factory=dict)
    sample: dict[str, int] = field(default_factory=dict)

    @property
    def onset(self) -> dict[int, int]:
        """First layer of every position's sink: where it is created."""
        return {position: layers[0] for position, (layers, _) in self.levels.items()}

    @property
    def lifetime(self) -> dict[int, int]:
        """Number of layers in which every position is a sink, gaps not counted."""
        return {position: len(layers) for position, (layers, _) in self.levels.items()}

    @property
    def longest_run(self) -> dict[int, int]:
        """Length of every position's longest stretch of consecutive layers."""
        return {position: _longest_run(layers) for position, (layers, _) in self.levels.items()}

    @property
    def anti_aligned(self) -> dict[int, int]:
        """In how many of its layers a position points away from the primary (cosine below 0)."""
        return {position: sum(c < 0 for c in values) for position, values in self.cosine.items()}

    def of(self, label: str) -> tuple[int, ...]:
        """Positions with this label, in order."""
        return tuple(sorted(p for p, (_, given) in self.levels.items() if given == label))

    def to_dataframe(self) -> pd.DataFrame:
        """A row per position: label, onset, lifetime, longest run, mean signed cosine."""
        rows = []
        for position, (layers, label) in sorted(self.levels.items()):
            signed = self.cosine.get(position)
            rows.append({
                "position": position, "label": label, "onset": layers[0],
                "lifetime": len(layers), "longest_run": _longest_run(layers),
                "anti_aligned": None if signed is None else sum(c < 0 for c in signed),
                "cosine": float("nan") if not signed else float(np.mean(signed)),
            })
        return pd.DataFrame(rows, columns=["position", "label", "onset", "lifetime",
                                           "longest_run", "anti_aligned", "cosine"])


def relabel(
    levels: Mapping[int, Any],
    n_layers: SupportsIndex,
    rule: Rule = "official",
    primary: Optional[int] = None,
) -> Levels:
    """Label sinks from their layer lists alone.

    Example:
        >>> layers = {0: range(4, 47), 700: range(22, 44), 900: range(22, 25)}
        >>> {position: label for position, (_, label) in relabel(layers, 48).items()}
        {0: 'primary', 700: 'secondary', 900: 'noise'}
        >>> relabel(layers, 48, "relative")[700][1]
        'secondary'

    Args:
        levels: {position: layers} or {position: (layers, old label)}, as in `SinkLevels.levels`.
        n_layers: blocks of the model.
        rule: "official": lifetime >= n_layers - 15 is primary, above 4 secondary, else noise; up
            to 20 layers no sink can be secondary. "relative": with the primary's start s and
            lifetime T, primary if onset <= s + 1 and lifetime >= 0.7 T; secondary if onset >= s +
            g and lifetime >= g with g = max(2, ceil(n_layers / 10)); else noise.
        primary: the primary sink's position; the longest-lived, then earliest, if None.

    Raises:
        ValueError: a position without layers.
        OutOfRange: a layer that the model does not have.

    Source: official, arXiv:2512.22213 released code; relative, this toolkit's, equal to the
    official labels on all entries of the released files.
    """
    depth = int(n_layers)
    plain: dict[int, tuple[int, ...]] = {}
    for position, entry in levels.items():
        # (layers, label) or layers alone.
        labelled = isinstance(entry, tuple) and len(entry) == 2 and isinstance(entry[1], str)
        layers = tuple(sorted(int(layer) for layer in (entry[0] if labelled else entry)))
        if not layers:
            raise ValueError(f"the sink at position {position} has no layers; leave it out.")
        if layers[0] < 0 or layers[-1] >= depth:
            raise OutOfRange(
                f"the sink at position {position} has layer {layers[-1]}, but the model has "
                f"layers 0 to {depth - 1}; check n_layers."
            )
        plain[int(position)] = layers
    if not plain:
        return {}
    if rule == "official":
        return {p: (layers, _official(len(layers), depth)) for p, layers in plain.items()}
    if primary is None:
        primary = max(plain, key=lambda position: (len(plain[position]), -position))
    start, alive = plain[primary][0], len(plain[primary])
    gap = max(2, math.ceil(0.1 * depth))

    def relative(layers: tuple[int, ...]) -> str:
        if layers[0] <= start + 1 and len(layers) >= 0.7 * alive:
            return "primary"
        return "secondary" if layers[0] >= start + gap and len(layers) >= gap else "noise"

    return {position: (layers, relative(layers)) for position, layers in plain.items()}


def read_released(path: str | os.PathLike, n_layers: Optional[int] = None) -> list[SinkLevels]:
    """Read a JSONL file of sink detections in the paper's format: one `SinkLevels` per row.

    Example:
        >>> folder = tempfile.TemporaryDirectory()
        >>> file = Path(folder.name) / "sinks.jsonl"
        >>> write_released([SinkLevels({0: ((1, 2), "primary")}, 4)], file)
        >>> read_released(file)[0].levels
        {0: ((1, 2), 'primary')}
        >>> folder.cleanup()

    Labels are the file's own, with `bos_sink` read as primary and `cliff` (older files) as
    secondary; `relabel` computes them anew.

    Args:
        n_layers: blocks of the model, which the format does not hold. If None: the last sink
            layer of the file plus two, since the released code sees the final norm in the last
            entry and so always closes the window one layer before it (48 and 36 for the released
            files, correctly).

    Raises:
        FileNotFoundError: no such file.
        ResultCorrupted: a row that is not in this format, with its line number.
    """
    rows: list[SinkLevels] = []
    with open(path, encoding="utf-8") as lines:
        for number, line in enumerate(lines, 1):
            if line.strip():
                try:
                    rows.append(_from_row(json.loads(line)))
                except (KeyError, TypeError, ValueError, AttributeError, IndexError) as problem:
                    raise ResultCorrupted(
                        f"line {number} of {Path(path).name} is not a released sink detection: "
                        f"{type(problem).__name__} {problem}; each row needs 'candidate_sinks' "
                        "with 'layer' and 'sink_type' for every position."
                    ) from problem
    if n_layers is None:
        last = [layers[-1] for row in rows for layers, _ in row.levels.values()]
        n_layers = max(last, default=-2) + 2
    return [replace(row, n_layers=n_layers) for row in rows]


def write_released(found: Sequence[SinkLevels], path: str | os.PathLike) -> None:
    """Write sink detections in the paper's JSONL format, one row per sequence; atomic.

    Example:
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     file = Path(folder) / "sinks.jsonl"
        ...     write_released([SinkLevels({0: ((1, 2), "primary")}, 4)], file)
        ...     file.read_text().strip()
        '{"candidate_sinks": {"0": {"layer": [1, 2], "sink_type": "bos_sink"}}}'

    Cosines, window and threshold have no place in the format and are not written.
    """
    target = Path(path)
    text = "".join(json.dumps(_to_row(one)) + "\n" for one in found)
    handle, name = tempfile.mkstemp(dir=target.parent, prefix=target.name, suffix=".part")
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as out:
            out.write(text)
        os.replace(name, target)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise


def level_table(
    found: Sequence[SinkLevels], label: Optional[str] = "secondary", merge: SupportsIndex = 0
) -> pd.DataFrame:
    """Count the sink levels, pairs of onset and lifetime, over sequences.

    Example:
        >>> one = SinkLevels({5: ((3, 4, 5), "secondary"), 8: ((3, 4), "secondary")}, 9)
        >>> two = SinkLevels({6: ((3, 4, 5), "secondary")}, 9)
        >>> level_table([one, two]).values.tolist()
        [[3.0, 3.0, 2.0, 0.6666666666666666], [3.0, 2.0, 1.0, 0.3333333333333333]]
        >>> level_table([one, two], merge=2).values.tolist()
        [[3.0, 3.0, 3.0, 1.0]]

    Args:
        label: count only this label; all for None.
        merge: join lifetimes that differ by at most this much from a more frequent level of the
            same onset. State it with every count of levels.

    Returns:
        Columns onset, lifetime, count, share; most frequent first.
    """
    counts: dict[tuple[int, int], int] = {}
    for one in found:
        for layers, given in one.levels.values():
            if label is None or given == label:
                level = (layers[0], len(layers))
                counts[level] = counts.get(level, 0) + 1
    merged: dict[tuple[int, int], int] = {}
    for (onset, lifetime), n in sorted(counts.items(), key=lambda item: (-item[1], item[0])):
        near = [m for m in merged if m[0] == onset and abs(m[1] - lifetime) <= int(merge)]
        level = min(near, key=lambda m: (abs(m[1] - lifetime), m)) if near else (onset, lifetime)
        merged[level] = merged.get(level, 0) + n
    total = sum(merged.values())
    rows = [(a, b, n, n / total) for (a, b), n in merged.items()]
    rows.sort(key=lambda row: (-row[2], row[0], row[1]))
    return pd.DataFrame(rows, columns=["onset", "lifetime", "count", "share"])


def n_levels(table: pd.DataFrame, mass: SupportsFloat = 0.95) -> int:
    """How many of the most frequent levels hold at least `mass` of all instances.

    Example:
        >>> n_levels(pd.DataFrame({"share": [0.9, 0.06, 0.04]}))
        2
    """
    shares = np.cumsum(table["share"].to_numpy(dtype=float))
    return int(np.searchsorted(shares, float(mass) - 1e-12) + 1) if len(shares) else 0


def _official(lifetime: int, n_layers: int) -> str:
    if lifetime >= n_layers - 15:
        return "primary"
    return "secondary" if lifetime > 4 else "noise"


def _longest_run(layers: Sequence[int]) -> int:
    longest = run = 1
    for previous, layer in zip(layers, layers[1:]):
        run = run + 1 if layer == previous + 1 else 1
        longest = max(longest, run)
    return longest


def _from_row(row: dict[str, Any]) -> SinkLevels:
    levels: Levels = {}
    token_ids: dict[int, int] = {}
    for name, entry in row["candidate_sinks"].items():
        position = int(name)
        layers = tuple(sorted(int(layer) for layer in entry["layer"]))
        if not layers:
            raise ValueError(f"position {position} has no layers")
        levels[position] = (layers, _RELEASED_LABELS[entry["sink_type"]])
        if "token_id" in entry:
            token_ids[position] = int(entry["token_id"])
    primary, window = 0, (0, 0)
    if levels:
        primary = max(levels, key=lambda position: (len(levels[position][0]), -position))
        window = (levels[primary][0][0], levels[primary][0][-1] + 1)
    sample = {name: int(value) for name, value in row.items() if name != "candidate_sinks"}
    return SinkLevels(levels, 0, primary, window, token_ids=token_ids, sample=sample)


def _to_row(found: SinkLevels) -> dict[str, Any]:
    names = {"primary": "bos_sink", "secondary": "secondary", "noise": "noise"}
    sinks = {}
    for position, (layers, label) in found.levels.items():
        entry: dict[str, Any] = {"layer": list(layers)}
        if position in found.token_ids:
            entry["token_id"] = found.token_ids[position]
        entry["sink_type"] = names[label]
        sinks[str(position)] = entry
    return {"candidate_sinks": sinks, **cast(dict[str, Any], found.sample)}
