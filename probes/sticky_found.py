"""What a sticky-token detection found, on disk: finished or so far.

Source   arXiv:2507.18171
"""

import io
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Optional, Union

import numpy as np
import pandas as pd

from interp.core.result import write_atomically

FOUND = "found.json"


def jaccard(sets: Sequence[Sequence[int]]) -> float:
    """The mean overlap of all pairs of sets, intersection over union; nan for less than two.

    Example:
        >>> jaccard([[1, 2, 3], [2, 3, 4], [1, 2, 3]])
        0.6666666666666666
    """
    chosen = [set(one) for one in sets]
    shares = [len(a & b) / len(a | b) for k, a in enumerate(chosen) for b in chosen[:k] if a | b]
    return float(np.mean(shares)) if shares else float("nan")


def save(detector: Any, folder: Union[str, Path]) -> None:
    """Write what a fitted detector found: `found.json` and `scores.parquet`."""
    content = io.BytesIO()
    detector.scores_.to_parquet(content)
    write_atomically(Path(folder) / "scores.parquet", content.getvalue())

    def rates(series: Optional[pd.Series]) -> Any:
        return None if series is None else {str(i): float(v) for i, v in series.items()}

    found = {name: getattr(detector, name) for name in (
        "mean_similarity_", "threshold_", "candidates_", "sticky_ids_", "cutoff_",
        "null_sticky_ids_", "missed_", "agreement_", "sampled_")}
    found |= {"usable_": len(detector.usable_), "pull_rate_": rates(detector.pull_rate_),
              "null_pull_rate_": rates(detector.null_pull_rate_),
              "texts": {str(i): detector.usable_[i] for i in [
                  *detector.candidates_, *(detector.null_pull_rate_.index
                                           if detector.null_pull_rate_ is not None else ())]},
              "settings": {k: v for k, v in detector.get_params().items() if k != "folder"}}
    write_atomically(Path(folder) / FOUND, json.dumps(
        found, indent=1, ensure_ascii=False, default=str))


def load(folder: Union[str, Path]) -> Optional[dict[str, Any]]:
    """What `save` wrote; None where nothing is finished."""
    path = Path(folder) / FOUND
    if not path.exists():
        return None
    found = json.loads(path.read_text())
    for name in ("pull_rate_", "null_pull_rate_"):
        if found[name] is not None:
            found[name] = pd.Series({int(i): v for i, v in found[name].items()})
    found["scores_"] = pd.read_parquet(Path(folder) / "scores.parquet")
    return found


def scored_so_far(folder: Union[str, Path]) -> Optional[pd.DataFrame]:
    """Scores of the tokens that an unfinished run has done, a random sample of all; None if none."""
    stages: dict[Path, list[Path]] = {}
    for path in Path(folder).glob("*/[0-9]*.parquet"):
        if path.parent.name.split("-")[0] in ("screen", "scores"):
            stages.setdefault(path.parent, []).append(path)
    if not stages:
        return None
    longest = max(stages.values(), key=len)
    return pd.concat(map(pd.read_parquet, sorted(longest)), ignore_index=True).set_index("token")
