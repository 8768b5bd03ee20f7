"""Words of descriptions, followed through layers and steps: what the methods rest on.

Part of the experiment `hallucination`: ranks of words that are true, untrue or unsaid (VISTA),
saliency of what was said before (SGRS), and the cells that words are grounded in (ReVisiT).
"""

from collections.abc import Sequence

import numpy as np
import torch

from experiments import _hallucination_figures as figures
from experiments import _named_objects as cases
from experiments import _picture_questions as questions
from experiments._named_objects import Described
from experiments._output import Output
from experiments._paper import Settings
from experiments._subject import Subject
from interp.causal import decoding
from interp.causal.decoding import Decoded, decode
from interp.core import statistics
from interp.flow import saliency_rejection
from interp.flow.revisit import ReVisiT
from interp.models.model import Model
from interp.models.stepping import unembed
from interp.sinks.validation_gate import auroc


class WordChecks(Subject):
    """Claims about the words of greedy descriptions."""

    def __init__(self, model: Model, settings: Settings, out: Output) -> None:
        super().__init__(model, settings, out)
        # Every stream holds its own cache, so few at a time for a large model.
        self.batch = 32 if model.d_model * model.n_layers < 20_000 else 8

    def _words(self, told: Sequence[tuple[Described, Decoded]]) -> None:
        """Ranks, saliency and chosen cells of the words of greedy descriptions."""
        told = [(d, one) for d, one in told if len(one.tokens) > 1]
        kinds = [self._kinds(d, one.tokens) for d, one in told]
        if told:
            walked = self._walk(told)
            self._ranks([w[0] for w in walked], told)
            self._cells(told, [w[1] for w in walked])
            self._saliency(told, kinds)
            self._released(told)
            return
        reason = f"{self.model.name} says nothing when it is asked to describe pictures"
        self.skip(reason, "loss", "early", "hidden", "saliency", "above_attention", "above_loss",
                  "released", "cell", "cell_attention")
        for name in ("ranks", "saliency"):
            self.out.no_figure(name, reason, of=self.model.name)

    def _kinds(self, described: Described, tokens: Sequence[int]) -> dict[int, bool]:
        """Step -> whether the object named there is there."""
        found = {}
        for name, steps in cases.steps_of(self.model, tokens):
            found |= {step: name in described.names for step in steps}
        return found

    def _walk(
        self, told: Sequence[tuple[Described, Decoded]]
    ) -> list[tuple[np.ndarray, list[int]]]:
        """Along every description: ranks of color and shape words in every layer
        `[layer, step, word]` (log10), and the image token most attended at every step."""
        model, ids = self.model, list(cases.word_ids(self.model).values())
        if len(told) > self.batch:
            return [one for i in range(0, len(told), self.batch)
                    for one in self._walk(told[i : i + self.batch])]
        steps = model.stepping([d.prompt for d, _ in told], read=["resid_post", "pattern"], tail=1,
                               batch_size=self.batch)
        ranks: list[list[np.ndarray]] = [[] for _ in told]
        most: list[list[int]] = [[] for _ in told]
        for step in range(max(len(one.tokens) for _, one in told)):
            for number, (described, one) in enumerate(told):
                if step >= len(one.tokens):
                    continue
                states = torch.stack([steps.read(number, f"resid_post.{layer}")[-1]
                                      for layer in range(model.n_layers - 1)])
                logits = torch.cat([unembed(model, states), steps.logits[number][None]])
                above = (logits[:, None] > logits[:, ids, None]).sum(-1)
                ranks[number].append(above.double().add(1).log10().numpy())
                attention = torch.stack([steps.read(number, f"pattern.{layer}")[:, -1]
                                         for layer in range(model.n_layers)]).mean((0, 1))
                image = list(decoding.image_tokens(described.prompt))
                most[number].append(image[int(attention[image].argmax())])
            steps.feed([one.tokens[min(step, len(one.tokens) - 1)] for _, one in told])
        return [(np.stack(rows, 1), places) for rows, places in zip(ranks, most)]

    def _ranks(self, walked: Sequence[np.ndarray], told: Sequence[tuple[Described, Decoded]]) -> None:
        words = list(cases.word_ids(self.model))
        names = ("there and said", "there, not said", "said, not there", "neither")
        by_layer = np.full((len(told), 4, self.model.n_layers), np.nan)
        along = np.full((len(told), 4, 3), np.nan)
        for number, (ranks, (described, one)) in enumerate(zip(walked, told)):
            there = {word for thing in described.scene.shapes for word in (thing.color, thing.shape)}
            text = self.model.tokenizer.decode(one.tokens).lower()
            said = {word for word in words if word in text}
            sets = (there & said, there - said, said - there, set(words) - there - said)
            for kind, some in enumerate(sets):
                chosen = [i for i, word in enumerate(words) if word in some]
                if not chosen:
                    continue
                part = ranks[:, :, chosen].mean(2)
                by_layer[number, kind] = part.mean(1)
                if part.shape[1] >= 3:
                    along[number, kind] = [x[-1].mean() for x in np.array_split(part, 3, axis=1)]
        figures.ranks(self.out, by_layer, along, names, self.model.name)
        early = list(decoding.at_depth(range(25, 31), self.model.n_layers))
        values = {
            "loss": (along[:, 0, 2] - along[:, 0, 0], along[:, 3, 2] - along[:, 3, 0]),
            "early": tuple(by_layer[:, k][:, early].mean(1) - by_layer[:, k, -1] for k in (0, 3)),
            "hidden": (by_layer[:, 1, -1], by_layer[:, 3, -1]),
        }
        for key, (treated, control) in values.items():
            known = np.isfinite(treated) & np.isfinite(control)
            if known.sum() < statistics.FEWEST:
                self.skip(f"only {int(known.sum())} of {len(told)} descriptions have words of every "
                          "kind that is compared", key)
                continue
            self.claim(key, statistics.difference(
                treated[known], control[known], resamples=1000), null=0.0,
                       direction="above" if key == "loss" else "below", unit="log10 of the rank",
                       control="color and shape words that are neither there nor said",
                       figure="ranks", details={
                           "words there": float(treated[known].mean()),
                           "other words": float(control[known].mean()), "layers": early})

    def _cells(
        self, told: Sequence[tuple[Described, Decoded]], most: Sequence[list[int]]
    ) -> None:
        """Does ReVisiT choose cells of the object whose words are being said?"""
        prompts = [d.prompt for d, _ in told]
        if not all(p.of_kind("image")[0].boxes for p in prompts):
            self.skip("the processor gives no pixel boxes for its tokens", "cell", "cell_attention")
            return
        forced = decode(self.model, prompts, ReVisiT(), forced=[one.tokens for _, one in told],
                        batch_size=self.batch)
        scale = 1 if questions.is_looker(self.model) else questions.SCALE
        rows, owner = [], []
        for number, ((described, one), looked) in enumerate(zip(told, most)):
            image = described.prompt.of_kind("image")[0]
            objects = {t.name: t for t in described.scene.objects}
            unique = {n for n in objects if [t.name for t in described.scene.objects].count(n) == 1}
            for name, steps in cases.steps_of(self.model, one.tokens):
                if name not in unique:
                    continue
                boxes = [tuple(float(scale * x) for x in box) for box in objects[name].boxes]
                cells = {p for box in boxes for p in image.inside(box, 0.1)}
                for step in steps if cells else ():
                    chosen = forced[number].plan.found["chosen"][step]
                    rows.append((chosen in cells, len(cells) / len(image), looked[step] in cells))
                    owner.append(number)
        if len(set(owner)) < statistics.FEWEST:
            self.skip(f"{self.model.name} names things that are there in {len(set(owner))} of "
                      f"{len(told)} descriptions", "cell", "cell_attention")
            return
        hit, chance, attended = np.array(rows, float).T
        details = {"words": len(rows), "ReVisiT": float(hit.mean()), "random": float(chance.mean()),
                   "most attended token": float(attended.mean())}
        self.claim("cell", statistics.difference(hit, chance, groups=owner, resamples=1000), null=0.0,
                   unit="share of words", figure="maps", control="a random image token",
                   details=details)
        self.claim("cell_attention", statistics.difference(
            hit, attended, groups=owner, resamples=1000), null=0.0,
                   unit="share of words", figure="maps", details=details)

    def _saliency(
        self, told: Sequence[tuple[Described, Decoded]], kinds: Sequence[dict[int, bool]]
    ) -> None:
        """Saliency of what was said, for words of things that are and are not there."""
        measured = saliency_rejection.measure(
            self.model, [d.prompt for d, _ in told], [one.tokens for _, one in told],
            batch_size=self.batch)
        rows = [(number, there, step, *(values[k][step] for k in ("saliency", "attention", "loss")))
                for number, (values, kind) in enumerate(zip(measured, kinds))
                for step, there in kind.items() if step]
        wrong = sum(not row[1] for row in rows)
        keys = ("saliency", "above_attention", "above_loss")
        if min(wrong, len(rows) - wrong) < statistics.FEWEST:
            reason = (f"greedy descriptions hold {wrong} words of things that are not there and "
                      f"{len(rows) - wrong} of things that are: too few to tell them apart")
            self.skip(reason, *keys)
            self.out.no_figure("saliency", reason, of=self.model.name)
            return
        owner, there, step, saliency, attention, loss = np.array(rows, float).T
        figures.saliency(self.out, there.astype(bool), step, saliency, attention, self.model.name)
        away = 1 - there

        def area(score: np.ndarray, label: np.ndarray) -> float:
            return auroc(score, label > 0.5) if 0 < label.sum() < len(label) else float("nan")

        details = {"words of things not there": wrong, "of things there": len(rows) - wrong,
                   "AUROC of low saliency": area(-saliency, away),
                   "AUROC of low attention": area(-attention, away),
                   "AUROC of -log p": area(loss, away), "AUROC of the step": area(step, away)}
        more = dict(figure="saliency", unit="AUROC", details=details)
        self.claim("saliency", statistics.bootstrap(
            area, -saliency, away, groups=owner, resamples=1000, name="AUROC"), null=0.5, **more)
        for key, other in (("above_attention", -attention), ("above_loss", loss)):
            self.claim(key, statistics.bootstrap(
                lambda s, o, label: area(s, label) - area(o, label), -saliency, other, away,
                groups=owner, resamples=1000, name="difference of AUROC"), null=0.0, **more)

    def _released(self, told: Sequence[tuple[Described, Decoded]]) -> None:
        """The gradient in the row that the released code reads."""
        sizes, rows = [], told[: statistics.FEWEST + 1]
        for described, one in rows:
            found = saliency_rejection.released_row(self.model, described.prompt, one.tokens[:4])
            sizes.append(max(float(g.abs().max()) for _, g in found.values()))
        self.claim("released", statistics.mean(sizes, resamples=1000), null=0.0, direction="equal",
                   figure="saliency", unit="largest gradient", paper_tag="derived",
                   details={"words": len(sizes)})
