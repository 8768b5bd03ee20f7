"""Promote, suppress, iterate (arXiv:2502.20475): how answers are listed one after another.

On lists written by hand into a model, on the three words that `reader` knows of every city, and on
lists of cities that any text model gives to plain questions.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np

from experiments import _texts as texts
from experiments._output import Output
from experiments._paper import Paper, Settings
from interp import open_model
from interp.core import Claim, ModelRefused, Prompt, PromptError, Result, SiteRefused, statistics
from interp.figures import head_grid
from interp.figures.style import GRAY, PAGE, canvas
from interp.flow import knockout, token_lens
from interp.models.early_decoding import EarlyDecoder
from interp.models.model import Model
from interp.organisms import lister_circuit, reader
from interp.prompts.one_to_many import CITIES, Listed, listed, stepwise

PLANTED = "planted-lister"
PAPER = Paper(
    "promote_suppress",
    "Promote, Suppress, Iterate: How Language Models Answer One-to-Many Factual Queries",
    ("2502.20475",),
    "How does a model say each of many answers once?",
    figures={
        "lens": "Token Lens: what attention to a span (columns) brings to the logits of the subject, "
        "the answers and random answers of other subjects (gray), by layer, before each answer "
        "(rows).",
        "mlp": "MLP knockout difference: the same for the MLPs' outputs, with minus without the last "
        "position's attention to the span.",
        "heads": "What every head brings to the logits before the third answer: of answer 3 from the "
        "subject, of answer 1 from answer 1.",
    },
    models=(PLANTED, "reader"),
)
SOURCE = PAPER.sources[0]
SENTENCES = {
    "subject": "Attention to the subject carries the subject, more than random words.",
    "promote": "MLPs promote all answers where the subject is read.",
    "suppress": "Attention to a previous answer suppresses that answer, and more than the others.",
    "amplify": "MLPs in the last third of the layers amplify the suppression.",
    "unproduced": "Answers that are not yet given are promoted over those that are.",
    "causes": "Reading a previous answer causes it to be suppressed, more than reading random tokens.",
}
NUMBERS = {
    "suppress": ("down to about -1 (figures from -1.4 to 0.1)", "code"),
    "amplify": ("down to about -1.5", "code"),
}
ANSWERS, RANDOM = ("answer 1", "answer 2", "answer 3"), ("random 1", "random 2", "random 3")
TARGETS = ("subject", *ANSWERS, *RANDOM)
FEWEST = 6


def run(settings: Settings, out: Output) -> None:
    for name in settings.models(PAPER):
        if name == PLANTED:
            model = Model(lister_circuit.build(), PLANTED, lister_circuit.words())
        else:
            model = open_model(name, **settings.opening())
        out.record(model)
        try:
            asked = lists_for(model, settings)
            decoder = EarlyDecoder(model)
        except (PromptError, ModelRefused, SiteRefused) as error:
            _give_up(model.name, str(error).split("\n")[0].rstrip("."), out)
            continue
        asked = asked[: settings.pick(32, tiny=12)]
        groups = {one.group for one in asked}
        if len(groups) < FEWEST:
            _give_up(model.name, f"{model.name} gives three different right answers to questions on "
                     f"{len(groups)} subjects, fewer than {FEWEST}", out)
            continue
        _One(model, decoder, asked, settings, out).run()


def lists_for(model: Any, settings: Settings) -> list[Listed]:
    """Lists that the model gives by itself. Raises `PromptError` for one that cannot be asked."""
    if texts.knows(model, reader):
        return reader_lists(model, settings.rng(1), settings.pick(1, tiny=1))
    subjects = list(CITIES)
    more = {}
    if model.name == PLANTED:
        # It says nothing but the list.
        subjects, more = list(lister_circuit.COUNTRIES), {"new_tokens": 6}
    return listed(model, subjects[: settings.pick(len(subjects), tiny=8)], **more)


def reader_lists(model: Any, rng: np.random.Generator, each: int, length: int = 24) -> list[Listed]:
    """Memorized cities whose three words the model says, all different.

    Nothing stands between the words: the subject is the last position at step 1, answer 1 at step 2.
    """
    made = []
    for city in reader.CITIES:
        one = reader.conflict(length, 0.5, rng, fact=False, distractors=0, city=city)
        if len(set(one.answers["memory"])) == 3:
            made += [(city, one)] * each
    prompts = [Prompt.from_tokens(one.tokens, {"subject": (length - 1, length)}) for _, one in made]
    spoken = model.run(prompts, new_tokens=3, logits="none", batch_size=32).new_tokens
    return [stepwise(city, prompt, one.answers["memory"], [(0, 1), (1, 2), (2, 3)])
            for (city, one), prompt, said in zip(made, prompts, spoken)
            if said == one.answers["memory"]]


def _give_up(name: str, reason: str, out: Output) -> None:
    for figure in PAPER.figures:
        out.no_figure(figure, reason, of=name)
    for key, sentence in SENTENCES.items():
        out.claim(Claim.untestable(sentence, SOURCE, reason, **_number(key)), name)


def _number(key: str) -> dict[str, str]:
    return dict(zip(("paper_number", "paper_tag"), NUMBERS.get(key, ())))


class _One:
    """Everything about one model."""

    def __init__(
        self, model: Model, decoder: EarlyDecoder, asked: list[Listed], settings: Settings, out: Output
    ) -> None:
        self.model, self.decoder, self.asked = model, decoder, asked
        self.settings, self.out = settings, out
        self.groups = [one.group for one in asked]
        third = max(1, model.n_layers // 3)
        self.late = slice(model.n_layers - third, None)

    def claim(self, key: str, statistic: Any, *samples: Any, name: str, **more: Any) -> None:
        estimate = statistics.bootstrap(
            statistic, *samples, groups=self.groups, resamples=2000, name=name)
        details = {"lists": len(self.asked), "subjects": len(set(self.groups))}
        self.out.claim(Claim(SENTENCES[key], SOURCE, **{
            **estimate.for_claim(), **_number(key), "null": 0.0, **more,
            "details": {**details, **more.get("details", {})}}), self.model.name)

    def run(self) -> None:
        self.out.record(self.model, [one.steps[0] for one in self.asked], f"lists-{self.model.name}")
        targets = self._targets()
        steps = [self._measure(step, targets) for step in range(3)]
        for number, found in enumerate(steps):
            self.out.save(f"step-{number + 1}-{self.model.name}", found)
        for figure, value in (("lens", "lens"), ("mlp", "mlp_difference")):
            self._curves(figure, value, steps)
        self._heads(steps[2])
        self._claims(steps)

    def _targets(self) -> list[dict[str, int]]:
        """The subject, its answers, and answers of other subjects as controls."""
        rng, found = self.settings.rng(2), []
        every = sorted({token for one in self.asked for token in one.answers})
        for one in self.asked:
            own = {*one.answers, one.subject_token}
            others = rng.choice([t for t in every if t not in own], len(RANDOM), replace=False)
            found.append(dict(zip(TARGETS, (
                one.subject_token, *one.answers, *map(int, others)))))
        return found

    def _measure(self, step: int, targets: Sequence[dict[str, int]]) -> Result:
        prompts, drawn = [], []
        like = "answer 1" if step else "subject"
        names = ["subject", *ANSWERS[:step]]
        for number, one in enumerate(self.asked):
            prompt = one.steps[step]
            # The last position may be the subject, or an answer, itself.
            out = [*names, "last", 0]
            drawn.append(knockout.random_keys(
                prompt, like, seed=self.settings.seed + number, exclude=out))
            prompts.append(prompt.with_segments(random=list(drawn[-1])))
        ends = {name for name in names for p in prompts if len(p) - 1 in p.positions(name)}
        spans = {name: name for name in (*names, *(() if ends else ("last",)), "random")}
        return token_lens.measure(self.model, prompts, list(targets), spans, decoder=self.decoder)

    # -- figures ------------------------------------------------------------------------------

    def _curves(self, name: str, value: str, steps: Sequence[Result]) -> None:
        columns = ["subject", "answer 1", "answer 2", "last", "random"]
        shown = [x for x in columns if any(x in s["segment"].values for s in steps)]
        figure, axes = canvas(3, len(shown), width=PAGE, height=5.2, sharex=True, sharey=True,
                              squeeze=False)
        for row, found in enumerate(steps):
            for ax, segment in zip(axes[row], shown):
                if segment not in found["segment"].values:
                    ax.set_axis_off()
                    if segment in ANSWERS:
                        ax.text(0.5, 0.5, "not yet given", color=GRAY, fontsize=6, ha="center",
                                transform=ax.transAxes)
                    continue
                token_lens.draw(found, ax, segment, value)
                ax.get_legend().remove()
                ax.set_title(f"step {row + 1}: {segment}", fontsize=7)
                ax.set_xlabel("layer" if row == 2 else "")
                if ax is not axes[row][0]:
                    ax.set_ylabel("")
        handles, labels = axes[0][0].get_legend_handles_labels()
        kept = [i for i, label in enumerate(labels) if label not in RANDOM[1:]]
        figure.legend([handles[i] for i in kept],
                      [labels[i].removesuffix(" 1") if labels[i] in RANDOM else labels[i] for i in kept],
                      loc="outside lower center", ncols=len(kept))
        figure.suptitle(f"{self.model.name}, {len(self.asked)} lists")
        self.out.figure(name, figure, of=self.model.name)

    def _heads(self, found: Result) -> None:
        heads = found["heads"].mean("prompt")
        figure, axes = canvas(1, 2, width=PAGE, height=2.6, sharey=True)
        shown = (("subject", "answer 3"), ("answer 1", "answer 1"))
        maps = [heads.sel(segment=segment, target=target).transpose("layer", "head").values
                for segment, target in shown]
        most = max(float(abs(values).max()) for values in maps) or 1.0
        for ax, (segment, target), values in zip(axes, shown, maps):
            head_grid.draw(ax, values, label="logit", limits=(-most, most), signed=True)
            ax.set_title(f"{segment} to {target}")
        axes[1].set_ylabel("")
        figure.suptitle(f"{self.model.name}: before answer 3")
        self.out.figure("heads", figure, of=self.model.name)

    # -- claims -------------------------------------------------------------------------------

    def _claims(self, steps: Sequence[Result]) -> None:
        lens = steps[0]["lens"].sel(segment="subject").transpose("prompt", "layer", "target")
        own, others = lens.sel(target="subject").values, lens.sel(target=list(RANDOM)).values

        def carried(a: np.ndarray, b: np.ndarray) -> float:
            # Both conditions at once: above zero, and above what a random word gets.
            most = float(a.mean(0).max())
            return min(most, most - float(b.mean(0).max(0).mean()))

        self.claim("subject", carried, own, others, figure="lens", unit="logits",
                   name="largest logit over layers of the subject from its span, and its distance "
                   "from random words: the smaller", details={
                       "subject": float(own.mean(0).max()),
                       "random words": float(others.mean(0).max(0).mean())})

        mlp = steps[0]["mlp_difference"].sel(knockout="zeroed", segment="subject").transpose(
            "prompt", "layer", "target")
        other = steps[0]["mlp_difference"].sel(knockout="renormalized", segment="subject").transpose(
            "prompt", "layer", "target")
        half = slice(self.model.n_layers // 2, None)
        answers = mlp.sel(target=list(ANSWERS)).values[:, half]
        random = mlp.sel(target=list(RANDOM)).values[:, half]

        def promoted(a: np.ndarray, b: np.ndarray) -> float:
            least = float(a.mean(0).min(-1).max())
            return min(least, least - float(b.mean(0).min(-1).max()))

        self.claim("promote", promoted, answers, random, figure="mlp", unit="logits",
                   name="the least promoted answer in the best layer of the second half, and its "
                   "distance from random words: the smaller", details={
                       "answers": float(answers.mean(0).min(-1).max()),
                       "random words": float(random.mean(0).min(-1).max()),
                       "renormalized": float(other.sel(target=list(ANSWERS)).values[:, half].mean(
                           0).min(-1).max())})
        self._suppression(steps[2])
        given = np.concatenate([self._given(steps[1], 1)[:, None], self._given(steps[2], 2)[:, None]], 1)
        self.claim("unproduced", lambda x: float(x.mean()), given, unit="logits",
                   name="mean logit of answers to come minus that of answers given")

    @staticmethod
    def _given(found: Result, done: int) -> np.ndarray:
        logit = found["logit"]
        return (logit.sel(target=list(ANSWERS[done:])).mean("target")
                - logit.sel(target=list(ANSWERS[:done])).mean("target")).values

    def _suppression(self, found: Result) -> None:
        lens = found["lens"].sel(segment="answer 1").transpose("prompt", "layer", "target")
        mine = lens.sel(target="answer 1").values[:, self.late]
        others = lens.sel(target=["answer 2", "answer 3"]).mean("target").values[:, self.late]

        def suppressed(a: np.ndarray, b: np.ndarray) -> float:
            layer = int(a.mean(0).argmin())
            least = float(a.mean(0)[layer])
            return max(least, least - float(b.mean(0)[layer]))

        self.claim("suppress", suppressed, mine, others, direction="below", figure="lens",
                   unit="logits", name="least logit of answer 1 over late layers, from its span, and "
                   "its distance from the other answers there: the larger", details={
                       "answer 1": float(mine.mean(0).min()),
                       "random words": float(lens.sel(target=list(RANDOM)).values[
                           :, self.late].mean((0, 2)).min())})
        difference = found["mlp_difference"].transpose(
            "knockout", "segment", "target", "prompt", "layer").sel(
            segment="answer 1", target="answer 1")
        late = {str(k): difference.sel(knockout=k).values[:, self.late].mean(1)
                for k in token_lens.KNOCKOUTS}
        self.claim("amplify", lambda x: float((x < 0).mean()), late["zeroed"], null=0.5, figure="mlp",
                   unit="of the lists", name="share of lists in which the MLPs' difference is negative",
                   details={k: float(v.mean()) for k, v in late.items()})
        changed = found["logit_difference"].sel(target="answer 1")
        own, random = (changed.sel(segment=s, knockout="zeroed").values for s in ("answer 1", "random"))
        self.claim("causes", lambda a, b: float((a - b).mean()), own, random, direction="below",
                   unit="logits", causal=True, control="as many random tokens of the prompt",
                   name="change of the logit of answer 1 by reading its span, minus that by reading "
                   "random tokens", details={
                       "answer 1": float(own.mean()), "random tokens": float(random.mean()),
                       "renormalized": float(changed.sel(
                           segment="answer 1", knockout="renormalized").mean())})
