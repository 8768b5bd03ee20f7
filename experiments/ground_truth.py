"""Ground truth: how good is every detector, where the truth is known because it was planted?

Question  What does each detector find, what does it find where nothing is, and how weak may a
          phenomenon become before it is missed?
Measure   precision, recall, layer and head error in planted models; false reports in their unplanted
          twins and in decoys; the strength below which recall falls under 0.8
Control   simple alternatives on the same models, with thresholds that fit these models

This toolkit's own test of itself; no paper's numbers. See docs/ground_truth.md.
"""

from typing import Any

import numpy as np
import pandas as pd

import interp
from experiments._ground_truth_beds import RANDOM, Bed
from experiments._ground_truth_families import FAMILIES
from experiments._ground_truth_figures import draw_recall, draw_table
from experiments._ground_truth_table import FAILS, Family, obvious, sooner, summary, trials
from experiments._outcome import slug
from experiments._output import Output
from experiments._paper import Paper, Settings, opened
from experiments._planted_benchmark import pooled
from experiments._subject import Subject
from interp.core import ModelRefused, PromptError
from interp.core.errors import OutOfRange, SiteRefused
from interp.core.statistics import Estimate

PAPER = Paper(
    "ground_truth", "Detectors against planted truth", (),
    "How good is every detector where the truth is known, and how weak may it become?",
    figures={
        "recall": "Recall against the strength of what is planted: the detector in color, simple "
                  "alternatives in gray; the dashed line and its band are where the detector starts to "
                  "fail (recall below 0.8) and the 95 % interval over places.",
        "table": "Every detector and two or more simple alternatives: counts at the two largest "
                 "strengths, share of twins and decoys with a false report, failing strength.",
    },
    models=(RANDOM,),
    long=True,
)

SOURCE = "this toolkit"
RECALL = RIGHT = FAILS
QUIET, CALM = 0.1, 1 / 3
"""What is asked for: shares of what is planted that must be found and rightly placed, of items
(tokens, heads, layers) of twins that may be reported, and of decoys in which anything may be. Eight
places without a fault cannot show more than this; the table has the numbers themselves."""

PLACES = 8


def claims_of(family: Family) -> dict[str, str]:
    """The sentences about one family, by their keys."""
    name, what = family.detector.name, family.title
    made = {
        "recall": f"Planted {what}: {name} finds nearly all that are obvious.",
        "precision": f"Planted {what}: nearly all that {name} reports is planted, where it is obvious.",
        "place": f"Planted {what}: {name} names the right "
                 + ("head." if family.items == "heads" else "layer."),
        "twin": f"Planted {what}: {name} hardly reports anything in the unplanted twins.",
        "decoy": f"Planted {what}: {name} mostly leaves the decoys alone ({family.decoy}).",
    }
    for other in family.alternatives:
        made[f"beats {other.name}"] = (
            f"Planted {what}: {name} still works at lower strengths than the simple alternative "
            f"'{other.name}'.")
    return {f"{family.key}: {key}": sentence for key, sentence in made.items()}


class GroundTruth(Subject):
    """All families in one bed."""

    paper = PAPER
    claims = {key: (sentence, SOURCE) for family in FAMILIES
              for key, sentence in claims_of(family).items()}
    numbers: dict[str, tuple[str, str]] = {}

    def __init__(self, bed: Bed, settings: Settings, out: Output) -> None:
        super().__init__(bed, settings, out)
        self.bed = bed
        self.lines: list[dict[str, Any]] = []
        self.rows: dict[str, pd.DataFrame] = {}

    def run(self) -> None:
        for number, family in enumerate(FAMILIES):
            rng = self.settings.rng(7, number)
            try:
                places = family.places(self.bed, rng, self.settings.pick(PLACES, tiny=1))
                rows = trials(family, places, self.strengths(family))
            except (ModelRefused, PromptError, SiteRefused, OutOfRange) as error:
                self.skip(f"{family.title} cannot be planted here: {str(error).rstrip('.')}",
                          *claims_of(family))
                continue
            self.rows[family.key] = rows
            self.lines += summary(family, rows, self.strengths(family))
            self._tell(family, rows)
        name = "" if self.bed.base is None else f"-{slug(self.bed.name).lower()}"
        if not self.rows:
            self.give_up("nothing could be planted in this model")
            return
        table = pd.DataFrame(self.lines)
        self.out.table(f"detectors{name}", table, text=True)
        self.out.table(f"trials{name}", pd.concat(self.rows.values(), ignore_index=True))
        families = [f for f in FAMILIES if f.key in self.rows]
        if self.wants("recall"):
            self.figure("recall", draw_recall(
                families, self.rows, table, {f.key: self.strengths(f) for f in families}))
        if self.wants("table"):
            self.figure("table", draw_table(families, table))

    def strengths(self, family: Family) -> tuple[float, ...]:
        """Those of the family; the obvious ones in a tiny run."""
        every = family.strengths
        return self.settings.pick(every, tiny=every[-2:])

    def _tell(self, family: Family, rows: pd.DataFrame) -> None:
        name, strengths = family.detector.name, self.strengths(family)
        clear = obvious(rows, name, strengths)
        about = {"figure": "table", "details": {
            "planted": family.planted, "unit": family.strength, "strengths": list(strengths),
            "places": int(rows["place"].nunique()), "what it is": "this toolkit's test of itself"}}
        by_place = clear.groupby("place")[["hits", "planted", "reports"]].sum()

        def share(part: str, whole: str) -> Estimate:
            return pooled(by_place[part].to_numpy(), by_place[whole].to_numpy())

        def tell(key: str, estimate: Estimate, **more: Any) -> None:
            self.claim(f"{family.key}: {key}", estimate, **{**about, **more})

        tell("recall", share("hits", "planted"), null=RECALL)
        for other in family.alternatives:
            tell(f"beats {other.name}", sooner(rows, name, other.name, strengths), null=0.0,
                 unit="factors of two", figure="recall", control=other.name,
                 details={**about["details"], "fails": f"recall below {FAILS}"})
        if self.bed.base is not None and family.natural:
            self.skip(
                f"{self.bed.name} may have {family.title} of its own, so what is reported beside the "
                "planted ones is not known to be false", *(
                    f"{family.key}: {key}" for key in ("precision", "place", "twin", "decoy")))
            return
        tell("precision", share("hits", "reports"), null=RECALL)
        errors = clear.dropna(subset=["layer_error"])
        wrong = (errors["layer_error"] > 0) | (errors["head_error"].fillna(0) > 0)
        exact = (~wrong).groupby(errors["place"]).agg(["sum", "count"])
        if len(exact):
            tell("place", pooled(exact["sum"].to_numpy(), exact["count"].to_numpy()), null=RIGHT)
        else:
            self.skip("it reported nothing, so there is no place to compare", f"{family.key}: place")
        quiet, decoys = (rows[(rows["method"] == name) & (rows["condition"] == kind)]
                         for kind in ("twin", "decoy"))
        tell("twin", pooled(quiet["items_reported"].to_numpy(), quiet["items"].to_numpy()),
             null=QUIET, direction="below", unit="of items")
        said = (decoys["reports"] > 0).to_numpy().astype(int)
        tell("decoy", pooled(said, np.ones(len(said), dtype=int)), null=CALM, direction="below",
             unit="of decoys")


def opening(name: str, settings: Settings) -> Bed:
    """Random models by their name, others as always."""
    return Bed() if name == RANDOM else Bed(interp.open_model(name, **settings.opening()))


def run(settings: Settings, out: Output) -> None:
    """Plant, turn down, detect, count."""
    def absent(name: str, reason: str) -> None:
        GroundTruth.refuse(name, reason, out)

    for bed in opened(PAPER, settings, absent, opening):
        out.record(bed)
        GroundTruth(bed, settings, out).run()
