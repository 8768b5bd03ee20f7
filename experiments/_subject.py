"""One model in an experiment: every claim told once, every figure drawn or explained."""

from collections.abc import Callable, Mapping
from typing import Any, ClassVar

from experiments import _picture_questions as questions
from experiments._output import Output
from experiments._paper import Paper, Settings, opened
from interp.core import Claim, ModelRefused, PromptError


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
            self.out.claim(self._untestable(key, reason), self.model.name)

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

    @classmethod
    def refuse(cls, name: str, reason: str, out: Output) -> None:
        """Nothing can be told of a model, which may not even be there."""
        for key in cls.claims:
            out.claim(cls._untestable(key, reason), name)
        for figure in cls.paper.figures:
            out.no_figure(figure, reason, of=name)

    @classmethod
    def _untestable(cls, key: str, reason: str) -> Claim:
        sentence, source = cls.claims[key]
        return Claim.untestable(sentence, source, reason, **cls._number(key))

    @classmethod
    def _number(cls, key: str) -> dict[str, str]:
        if key not in cls.numbers:
            return {}
        number, tag = cls.numbers[key]
        return {"paper_number": number, "paper_tag": tag}


def run_all(
    subject: type[Subject], settings: Settings, out: Output,
    unfit: Callable[[Any], str] = lambda model: "",
) -> None:
    """Run an experiment for every model; one that is not there or does not fit says why, claim by claim.

    `unfit` says why nothing can be asked of a model, "" if something can.
    """
    def absent(name: str, reason: str) -> None:
        subject.refuse(name, reason, out)

    for model in opened(subject.paper, settings, absent):
        out.record(model)
        one = subject(model, settings, out)
        reason = unfit(model)
        if reason:
            one.give_up(reason)
            continue
        try:
            one.run()
        except (PromptError, ModelRefused) as error:
            one.give_up(str(error).rstrip("."))


def run_each(subject: type[Subject], settings: Settings, out: Output) -> None:
    """Run an experiment on pictures for every model; one that does not fit says why, claim by claim."""
    def give_up(name: str, reason: str) -> None:
        subject.refuse(name, reason, out)

    for model in questions.subjects(subject.paper, settings, out, give_up):
        out.record(model)
        one = subject(model, settings, out)
        try:
            one.run()
        except PromptError as error:
            one.give_up(str(error))
