"""What decoding methods pick out of a picture, and what it carries.

Part of the experiment `hallucination`: do their maps point at the object (IAVA, GIFT), do vision
tower and language model agree (DAMRO), do blind tokens carry nothing (AvisC), and where does
attention go (PAINT)?
"""

from collections.abc import Callable, Sequence
from typing import Any, Optional

import numpy as np
import torch
from scipy import stats

from experiments import _hallucination_figures as figures
from experiments import _named_objects as cases
from experiments import _picture_questions as questions
from experiments._picture_questions import Asked
from experiments._subject import Subject
from interp.causal import decoding
from interp.causal.decoding import Method
from interp.core import Prompt, UndertowError, statistics
from interp.core.intervention import edit
from interp.flow.contrastive_decoding import blind_tokens, outlier_tokens
from interp.flow.visual_steering import PAINT
from interp.sinks.validation_gate import auroc

ERRORS = (UndertowError, ValueError)
"""How a method says that it cannot work on a model."""


class MapChecks(Subject):
    """Claims about image tokens; `_methods` are the experiment's."""

    asked: list[Asked]
    plain: list[Asked]
    yes: int
    no: int

    def _methods(self, describing: bool, seed: Optional[int]) -> dict[str, Callable[[], Method]]:
        raise NotImplementedError

    def _maps(self) -> None:
        """Do their maps point at the object, and do tower and language model agree?"""
        model = self.model
        shown = [one for one in self.plain if one.region]
        if not shown:
            self.skip("the processor gives no pixel boxes for its tokens", "delta", "gaze")
            self.out.no_figure("maps", "the processor gives no pixel boxes", of=model.name)
            return
        prompts = questions.prompts(shown)
        truth = [np.isin(decoding.image_tokens(one.prompt), one.region) for one in shown]
        asked, columns = self._methods(False, None), {}
        plans = {}
        for name in ("AvisC", "IAVA", "GIFT", "PAINT"):
            try:
                plans[name] = asked[name]().plans(model, prompts, 1)
            except ERRORS as error:
                columns[name] = str(error).rstrip(".")
        raw = [m.mean((0, 1, 2)) for m in decoding.last_row_attention(model, prompts)]
        for key, name, other in (("delta", "IAVA", "raw"), ("gaze", "GIFT", "row")):
            if name not in plans:
                self.skip(columns[name], key)
                continue
            maps = [plan.found["map"] for plan in plans[name]]
            if other == "row":
                (layer,) = {plan.found["layer"] for plan in plans[name]}
                against = [m.mean((0, 1, 2)) for m in decoding.last_row_attention(
                    model, prompts, layers=[layer])]
            else:
                against = raw
            areas = [[auroc(m, t) for m, t in zip(some, truth)] for some in (maps, against)]
            details: dict[str, Any] = {
                "AUROC of the map": str(statistics.mean(areas[0], resamples=1000)),
                "AUROC of attention of the last row": str(statistics.mean(areas[1], resamples=1000))}
            if name == "IAVA":
                details["AUROC by generic instruction"] = self._spread(shown, raw, truth)
            self.claim(key, statistics.difference(*areas, resamples=1000), null=0.0,
                       unit="AUROC", figure="maps", details=details)
        towers = self._towers(prompts, raw)
        figures.maps(self.out, shown[0], raw[0], plans, towers, model.name)

    def _spread(
        self, shown: Sequence[Asked], raw: Sequence[torch.Tensor], truth: Sequence[np.ndarray]
    ) -> dict[str, float]:
        """The generic instruction is a free choice: what others give."""
        found = {}
        for text in (questions.GENERAL, "what is it ?", cases.DESCRIBE):
            others = decoding.last_row_attention(self.model, [self.model.prompt(
                text, images=list(one.prompt.images), chat=questions.has_chat(self.model))
                for one in shown])
            found[text] = float(np.mean([auroc(a - m.mean((0, 1, 2)), t)
                                         for a, m, t in zip(raw, others, truth)]))
        return found

    def _towers(
        self, prompts: Sequence[Prompt], raw: Sequence[torch.Tensor]
    ) -> Optional[list[torch.Tensor]]:
        """Attention in the tower against attention in the language model."""
        try:
            rows = [decoding.class_rows(self.model, prompt) for prompt in prompts]
        except ERRORS as error:
            self.skip(str(error).rstrip("."), "overlap", "rank")
            self.out.no_figure("outliers", str(error), of=self.model.name)
            return None
        tower = [r[max(-2, -len(r))].mean(0) for r in rows]
        count = max(1, min(10, len(tower[0]) // 4))
        both = [outlier_tokens(a[None], count)[1] & outlier_tokens(b[None], count)[1]
                for a, b in zip(tower, raw)]
        shared = [float(x.sum()) / count - count / len(x) for x in both]
        self.claim("overlap", statistics.mean(shared, resamples=1000), null=0.0, figure="outliers",
                   unit="share, above chance", control=f"chance: {count} of {len(both[0])} tokens",
                   details={"outliers": count, "shared": float(np.mean(
                       [float(x.sum()) / count for x in both]))})
        self.claim("rank", statistics.mean(
            [_spearman(a, b) for a, b in zip(tower, raw)], resamples=1000),
                   null=0.0, unit="Spearman correlation per picture", figure="outliers")
        figures.outliers(self.out, tower, raw, count, self.model.name)
        return tower

    def _blind(self) -> None:
        """What yes and no become when tokens lose their content."""
        model, prompts = self.model, questions.prompts(self.plain)
        variants: dict[str, list[tuple]] = {name: [] for name in (
            "none", "blind", "as many others", "all but blind", "as many at random")}
        sizes = []
        try:
            decoding.refuse_deep_stack(model)
        except ERRORS as error:
            self.skip(str(error).rstrip("."), "blind", "even")
            self.out.no_figure("shift", str(error), of=model.name)
            return
        for number, (prompt, rows) in enumerate(zip(
                prompts, decoding.last_row_attention(model, prompts))):
            image = np.array(decoding.image_tokens(prompt))
            blind = blind_tokens(rows[:, :, 0])[1].numpy()
            own, others = image[blind], image[~blind]
            size = min(len(own), len(others))
            gone = {"none": (), "blind": own[:size],
                    "as many others": decoding.random_tokens(others, size, 0, number),
                    "all but blind": others,
                    "as many at random": decoding.random_tokens(image, len(others), 1, number)}
            sizes.append(size)
            for name, places in gone.items():
                variants[name].append((edit("embed", "replace", 0.0, positions=[
                    int(p) for p in places]),) if len(places) else ())
        odds = {}
        for name, writes in variants.items():
            rows = torch.cat([
                model.stepping(prompts[i : i + 32], write=decoding.each(writes[i : i + 32])).logits
                for i in range(0, len(prompts), 32)]).double()
            odds[name] = (rows[:, self.yes] - rows[:, self.no]).numpy()
        moved = {name: np.abs(o - odds["none"]) for name, o in odds.items()}
        groups = np.arange(len(prompts)) // 2
        if min(sizes) == 0:
            self.skip(f"in {sizes.count(0)} of {len(sizes)} prompts no image token is blind",
                      "blind", "even")
        else:
            self.claim("blind", statistics.difference(
                moved["blind"], moved["as many others"], groups=groups, resamples=1000), null=0.0,
                direction="below", causal=True, unit="log-odds", figure="shift",
                control="as many random tokens that are not blind", details={
                    "blind tokens": float(np.mean(sizes)),
                    **{f"change, {k}": float(v.mean()) for k, v in moved.items()}})
            sure = {k: np.abs(1 / (1 + np.exp(-o)) - 0.5) for k, o in odds.items()}
            self.claim("even", statistics.difference(
                sure["all but blind"], sure["as many at random"], groups=groups, resamples=1000),
                null=0.0, direction="below", causal=True, unit="distance from 50:50", figure="shift",
                control="as many random image tokens", details={
                    k: float(v.mean()) for k, v in sure.items()})
        figures.shift(self.out, {k: odds[k] - odds["none"] for k in odds if k != "none"}, model.name)

    def _mass(self) -> None:
        """Attention on the picture per layer, with PAINT and without."""
        prompts = questions.prompts(self.asked)[:8]
        try:
            plans = PAINT().plans(self.model, prompts, 1)
        except ERRORS as error:
            self.out.no_figure("mass", str(error), of=self.model.name)
            return
        found = {}
        for name, writes in (("greedy", [()] * len(prompts)), ("PAINT", [p.write for p in plans])):
            steps = self.model.stepping(prompts, write=decoding.each(writes), read="pattern", tail=1)
            found[name] = np.array([[float(steps.read(i, f"pattern.{layer}")[:, -1][
                :, list(decoding.image_tokens(prompt))].sum(-1).mean())
                for layer in range(self.model.n_layers)] for i, prompt in enumerate(prompts)])
        figures.mass(self.out, found, self.model.name)


def _spearman(a: torch.Tensor, b: torch.Tensor) -> float:
    """Rank correlation of two maps; 0 where one is constant."""
    ranks = [stats.rankdata(x.numpy()) for x in (a, b)]
    return 0.0 if np.ptp(ranks[0]) == 0 or np.ptp(ranks[1]) == 0 else float(
        np.corrcoef(*ranks)[0, 1])
