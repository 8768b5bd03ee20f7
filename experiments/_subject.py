"""One model in an experiment on pictures: every claim told once, every figure drawn or explained."""

from collections.abc import Mapping
from typing import Any, ClassVar

from experiments import _picture_questions as questions
from experiments._output import Output
from experiments._paper import Paper, Settings
from interp.core import Claim, ModelNotFound, PromptError


class Subject:
    """Everything about one model; a subclass says what, in `run`.

    `claims` are sentence and source by key, `numbers` the paper's number and its tag. What is not told
    or drawn when `give_up` is called gets the reason.
    """

    paper: ClassVar[Paper]
    claims: ClassVar[Mapping[str, tuple[str, str]]]
    numbers: ClassVar[Mapping[str, tuple[str, str]]]

    def __init__(self, model: Any, settings: Settings, out: Output) -> None:
        self.model, self.settings, self.out = model, settings, out
        self.told: set[str] = set()
        self.drawn: set[str] = set()

    def run(self) -> None:
        """Measure, claim and draw."""
        raise NotImplementedError

    def claim(self, key: str, estimate: Any, **more: Any) -> None:
        """A claim by its key, with an estimate of `interp.core.statistics`."""
        self.told.add(key)
        sentence, source = self.claims[key]
        self.out.claim(Claim(sentence, source, **{
            **estimate.for_claim(), **self._number(key), **more}), self.model.name)

    def skip(self, reason: str, *keys: str) -> None:
        """Claims that cannot be tested on this model."""
        for key in keys:
            self.told.add(key)
            sentence, source = self.claims[key]
            self.out.claim(Claim.untestable(sentence, source, reason, **self._number(key)),
                           self.model.name)

    def wants(self, name: str) -> bool:
        """Whether a figure is asked for; it counts as drawn then."""
        self.drawn.add(name)
        return self.out.wants(name)

    def figure(self, name: str, figure: Any) -> None:
        """A figure of this model."""
        self.out.figure(name, figure, of=self.model.name)

    def no_figure(self, name: str, reason: str) -> None:
        """A figure that this model does not get."""
        self.drawn.add(name)
        self.out.no_figure(name, reason, of=self.model.name)

    def give_up(self, reason: str) -> None:
        """The rest cannot be told."""
        self.skip(reason, *(key for key in self.claims if key not in self.told))
        for name in self.paper.figures:
            if name not in self.drawn:
                self.no_figure(name, reason)

    def _number(self, key: str) -> dict[str, str]:
        if key not in self.numbers:
            return {}
        number, tag = self.numbers[key]
        return {"paper_number": number, "paper_tag": tag}


def run_each(subject: type[Subject], settings: Settings, out: Output) -> None:
    """Run an experiment on pictures for every model; one that does not fit says why, claim by claim."""
    for name in settings.models(subject.paper):
        try:
            model = questions.open_subject(name, settings)
        except ModelNotFound:
            if settings.model is not None:
                raise
            continue
        out.record(model)
        one = subject(model, settings, out)
        reason = questions.unfit(model)
        if reason:
            one.give_up(reason.replace(", so it has no such heads", ""))
            continue
        try:
            one.run()
        except PromptError as error:
            one.give_up(str(error))
