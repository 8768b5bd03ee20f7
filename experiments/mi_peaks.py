"""Mutual-information peaks in reasoning (arXiv:2506.02867), with what the released score really is.

The score compares coordinates of two vectors. Beside it: their squared correlation, the solution of
another problem, and an estimator whose samples are problems.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy import stats

from experiments import _math_problems, _texts, _thinking_tokens
from experiments._output import Output
from experiments._paper import Paper, Settings
from experiments._subject import Subject, run_all
from experiments._word_classes import english
from interp.core import Prompt, PromptError, statistics
from interp.figures import token_strip
from interp.figures.style import CYCLE, GRAY, PAGE, canvas, color
from interp.models.prompting import printable
from interp.organisms import reader
from probes import mutual_information as mi

PAPER = Paper(
    "mi_peaks",
    "Demystifying Reasoning Dynamics with Mutual Information",
    ("2506.02867",),
    "Do states peak in what they share with the solution, at which tokens, and what is the score?",
    figures={
        "curves": "Released score over generated tokens with its peaks, the squared correlation of "
        "coordinates, and the score with another problem's solution (gray).",
        "artifact": "Released score against the squared correlation of the two states' coordinates, "
        "every generated token; crosses: made-up vectors that share nothing, or one outlier alone.",
        "items": "Dependence over problems (CKA) of the state at a token and the solution's state; "
        "gray: solutions permuted over problems (5 to 95 %).",
        "tokens": "Tokens at peaks: their share of all peaks beside their share of all tokens (gray).",
    },
    models=("reader",),
)
(SOURCE,) = PAPER.sources
OWN = "measured by this toolkit, after arXiv:2506.02867"


@dataclass
class Tasks:
    """Problems with their traces; `solved` says whose answer is right."""

    prompts: list[Prompt]
    solutions: list[Prompt]
    traces: list[list[int]]
    answers: list[list[int]]
    solved: np.ndarray
    what: str


class Peaks(Subject):
    """A language model and its traces."""

    paper = PAPER
    claims = {
        "artifact": ("The released score follows the squared correlation of two vectors' coordinates, "
                     "step by step.", OWN),
        "sparse": ("Peaks of the score are sparse.", SOURCE),
        "own": ("The score's maximum over a trace is higher with its own solution than with another "
                "problem's.", OWN),
        "items": ("Over problems, the states of some generated token depend on the solution's state.",
                  OWN),
        "answer": ("Over problems, the state before the first generated token depends on the answer.",
                   OWN),
        "same": ("The course of the score is nearly the same with another problem's solution.", OWN),
        "enriched": ("Words of reflection are more often peaks than words of equal frequency.", SOURCE),
        "suppressed": ("Without words of reflection fewer problems are solved than without others of "
                       "equal frequency.", SOURCE),
        "recycling": ("Running a thinking token's state once more improves reasoning.", SOURCE),
        "base": ("Models that were not trained to reason have weaker peaks.", SOURCE),
    }
    numbers = {"sparse": ("below 5 % of the steps", "secondary"),
               "recycling": ("+20 % relative on AIME24", "secondary")}

    def run(self) -> None:
        self.skip("AIME24 does not come with this package, nor a model that was trained to reason",
                  "recycling")
        self.skip("a pair is needed, a model and the one that was trained to reason from it", "base")
        if self.model.kind != "decoder":
            self.give_up(f"{self.model.name} is an encoder: it generates no steps")
            return
        self.tasks = tasks(self.model, self.settings)
        self.out.record(prompts=self.tasks.prompts, name=f"problems-{self.model.name}")
        kept = [i for i, trace in enumerate(self.tasks.traces) if len(trace) > 3]
        if len(kept) < statistics.FEWEST:
            self.give_up(f"{self.model.name} generates nothing after most problems")
            return
        self.kept = kept
        self.traces = [self.tasks.traces[i] for i in kept]
        self.found = mi.measure(self.model, [self.tasks.prompts[i] for i in kept], self.traces,
                                [self.tasks.solutions[i] for i in kept], seed=self.settings.seed)
        self.found.manifest["problems"] = self.tasks.what
        self.out.save(f"scores-{self.model.name}", type(self.found)(
            self.found.data.drop_vars(["states", "solution"]), self.found.manifest))
        self.tops = [mi.peaks(self._row("hsic", i)) for i in range(len(kept))]
        self._items_measured()
        self._figures()
        self._artifact()
        count = int(self.tasks.solved.sum())
        if count < statistics.FEWEST:
            self.give_up(f"{self.model.name} solves {count} of {len(self.tasks.solved)} problems: its "
                         "traces lead to no solution")
            return
        self._sparse()
        self._items()
        self._answer()
        self._thinking()

    def _row(self, name: str, number: int) -> np.ndarray:
        return self.found[name].values[number, : len(self.traces[number])]

    @property
    def resamples(self) -> int:
        return self.settings.pick(4000, tiny=500)

    # -- the score -----------------------------------------------------------------------

    def _artifact(self) -> None:
        rows = range(len(self.traces))

        def each(first: str, second: str) -> np.ndarray:
            return np.array([stats.spearmanr(self._row(first, i), self._row(second, i))[0]
                             for i in rows])

        own = each("hsic", "centered_cosine")
        if not np.isfinite(own).all():
            self.skip("the score does not change along some traces", "artifact")
            return
        self.claim("artifact", statistics.mean(own, resamples=self.resamples), null=0.9,
                   figure="artifact", unit="rank correlation over the steps of a trace", details={
                       "with the plain squared cosine": float(each("hsic", "cosine").mean()),
                       "mean score": float(np.nanmean(self.found["hsic"])),
                       "without the 3 largest coordinates": float(
                           np.nanmean(self.found["hsic_without"])),
                       "variance of coordinates": float(np.nanmean(self.found["states"].var("d_model"))),
                       "note": "coordinates small beside the kernel's width of 50 make the two the "
                               "same; larger ones add correlations of their squares"})

    def _sparse(self) -> None:
        share = np.array([top.mean() for top in self.tops])
        other = np.array([mi.peaks(self._row("hsic_other", i)).mean() for i in range(len(self.tops))])
        cosine = np.array([mi.peaks(self._row("centered_cosine", i)).mean()
                           for i in range(len(self.tops))])
        self.claim("sparse", statistics.mean(share, resamples=self.resamples), null=0.05,
                   direction="below", figure="curves", unit="share of generated tokens",
                   control="another problem's solution, and the squared correlation, in the details",
                   details={"with another problem's solution": float(other.mean()),
                            "of the squared correlation": float(cosine.mean()),
                            "rule": "above the third quartile by 1.5 interquartile ranges",
                            "note": "few points of any curve lie so far out: 0.4 % of Gaussian noise",
                            "problems": self.tasks.what})
        same = np.array([stats.spearmanr(self._row("hsic", i), self._row("hsic_other", i))[0]
                         for i in range(len(self.traces))])
        if np.isfinite(same).all():
            self.claim("same", statistics.mean(same, resamples=self.resamples), null=0.9,
                       figure="curves", unit="rank correlation over the steps of a trace", details={
                           "note": "supported: the peaks do not tell one problem from another"})
        else:
            self.skip("the score does not change along some traces", "same")
        highest = {name: np.nanmax(self.found[name].values, 1)
                   for name in ("hsic", "hsic_other", "centered_cosine", "centered_cosine_other")}
        self.claim("own", statistics.difference(
            highest["hsic"], highest["hsic_other"], resamples=self.resamples), null=0.0,
            figure="curves", unit="score", control="another problem's solution, same trace", details={
                name: float(values.mean()) for name, values in highest.items()})

    # -- over problems -------------------------------------------------------------------

    def _items_measured(self) -> None:
        steps = min(self.settings.pick(32, tiny=8), min(map(len, self.traces)))
        states = np.swapaxes(self.found["states"].values[:, :steps], 0, 1).astype(float)
        self.over = mi.dependence(states, self.found["solution"].values.astype(float),
                                  permutations=self.settings.pick(400, tiny=99), seed=self.settings.seed)

    def _items(self) -> None:
        excess, null = self.over["excess"].values, self.over["null"].values
        if not np.isfinite(excess).all():
            self.skip("some states are the same for all problems", "items")
            return
        best = int(excess.argmax())
        reach = float(np.quantile((null - null.mean(0)).max(1), 0.95))
        self.claim("items", statistics.Estimate(
            float(excess[best]), (float(excess[best]) - reach, float(excess[best]) + reach),
            len(self.traces), "highest CKA above its permuted mean over steps, against the maximum over "
            f"steps in {len(null)} permutations"), null=0.0, figure="items", unit="CKA above chance",
            control="solutions permuted over problems", details={
                "generated token": best, "CKA": float(self.over["cka"][best]),
                "p": float(self.over["p"][best]),
                "CKA of permuted solutions": float(null[:, best].mean())})

    def _answer(self) -> None:
        """The state at the end of the question, against the mean embedding of the answer's tokens."""
        site = f"resid_post.{self.found.manifest['layer']}"
        states = np.stack([self.model.run(self.tasks.prompts[i], read=site, logits="none").reads[
            site].values[0, 0, -1] for i in self.kept]).astype(float)
        answers = np.stack([self.model.run(Prompt.from_tokens(self.tasks.answers[i]), read="resid_pre.0",
                                           logits="none").reads["resid_pre.0"].values[0, 0].mean(0)
                            for i in self.kept]).astype(float)
        found = mi.dependence(states[None], answers, permutations=self.settings.pick(2000, tiny=199),
                              seed=self.settings.seed)
        excess, null = float(found["excess"][0]), found["null"].values[:, 0]
        if not np.isfinite(excess):
            self.skip("the states or the answers are the same for all problems", "answer")
            return
        reach = float(np.quantile(null - null.mean(), 0.95))
        self.claim("answer", statistics.Estimate(
            excess, (excess - reach, excess + reach), len(states),
            f"CKA above its mean over {len(null)} permutations, and their 95 % quantile"),
            null=0.0, unit="CKA above chance", control="answers permuted over problems",
            details={"CKA": float(found["cka"][0]), "p": float(found["p"][0])})

    # -- words of reflection -------------------------------------------------------------

    def _thinking(self) -> None:
        ids = _thinking_tokens.thinking_ids(self.model)
        if not english(self.model) or not ids:
            self.skip(f"the vocabulary of {self.model.name} has no words of reflection", "enriched",
                      "suppressed")
            return
        flat = np.concatenate([np.array(trace) for trace in self.traces])
        present = [i for i in ids if (flat == i).any()]
        if np.isin(flat, present).sum() < 10:
            count = int(np.isin(flat, present).sum())
            self.skip(f"{self.model.name} writes {count} words of reflection in its traces", "enriched",
                      "suppressed")
            return
        rng = self.settings.rng(3)
        others = _thinking_tokens.of_equal_frequency(present, flat, rng, avoid=ids)
        found, table = _thinking_tokens.enrichment(self.traces, self.tops, present, others,
                                                   self.resamples, self.settings.seed)
        self.claim("enriched", found, null=0.0, figure="tokens", unit="log odds ratio",
                   control="other tokens of equal frequency", details=table)
        accuracy = {"as it is": self.tasks.solved.astype(float)}
        accuracy["suppressed"] = self._solved_without(present)
        draws = [self._solved_without(_thinking_tokens.of_equal_frequency(
            present, flat, self.settings.rng(4, seed), avoid=[*ids, *self._digits()]))
            for seed in range(self.settings.pick(5, tiny=2))]
        control = np.mean(draws, 0)
        self.claim("suppressed", statistics.difference(
            accuracy["suppressed"], control, resamples=self.resamples), null=0.0, direction="below",
            causal=True, unit="share of problems solved",
            control=f"others of equal frequency, {len(draws)} draws", details={
                **{k: float(v.mean()) for k, v in accuracy.items()},
                "others suppressed": float(control.mean())})

    def _digits(self) -> list[int]:
        """Tokens with a digit: no answer can be written without them."""
        return [int(i) for token, i in self.model.tokenizer.get_vocab().items()
                if any(letter.isdigit() for letter in token)]

    def _solved_without(self, banned: list[int]) -> np.ndarray:
        made = _thinking_tokens.without(self.model, self.tasks.prompts, banned, _steps(self.settings))
        return np.array([float(_math_problems.gives(self.model.tokenizer.decode(trace), answer))
                         for trace, (_, _, answer) in zip(made, _math_problems.PROBLEMS)])

    # -- figures -------------------------------------------------------------------------

    def _figures(self) -> None:
        if self.wants("curves"):
            figure, axes = canvas(2, 1, width=PAGE, height=4.4)
            for ax, number in zip(axes, (0, 1)):
                mi.draw(self.found, ax, number)
                ax.set_title(f"{self.model.name}, problem {self.kept[number]}")
            axes[1].get_legend().remove()
            axes[0].set_xlabel("")
            self.figure("curves", figure)
        if self.wants("artifact"):
            self._scatter()
        if self.wants("items"):
            figure, ax = canvas(1, 1)
            steps = np.arange(self.over.sizes["step"])
            low, high = np.nanquantile(self.over["null"].values, (0.05, 0.95), axis=0)
            ax.fill_between(steps, low, high, color=GRAY, alpha=0.3, linewidth=0,
                            label="solutions permuted, 5 to 95 %")
            ax.plot(steps, self.over["cka"], "-o", color=color("image"), markersize=3, label="CKA")
            ax.set_xlabel("generated token")
            ax.set_ylabel("CKA with the solution")
            figure.suptitle(f"{self.model.name}, {len(self.traces)} problems")
            ax.legend(loc="lower left", bbox_to_anchor=(0.0, 1.0), ncols=2)
            self.figure("items", figure)
        if self.wants("tokens"):
            self._tokens()

    def _scatter(self) -> None:
        figure, ax = canvas(1, 1)
        known = np.isfinite(self.found["hsic"].values)
        ax.plot(self.found["centered_cosine_other"].values[known],
                self.found["hsic_other"].values[known], "o", color=GRAY, markersize=1.8, alpha=0.4,
                markeredgewidth=0, rasterized=True, label="another problem's solution")
        ax.plot(self.found["centered_cosine"].values[known], self.found["hsic"].values[known], "o",
                color=color("image"), markersize=1.8, alpha=0.5, markeredgewidth=0, rasterized=True,
                label="own solution")
        x, y = self.settings.rng(8).standard_normal((2, self.model.d_model))
        made = [("independent", x, y)]
        a, b = x.copy(), y.copy()
        a[0] = b[0] = 300.0
        made.append(("one shared outlier", a, b))
        for name, one, two in made:
            at = float(mi.squared_cosine(one, two, centered=True)), mi.coordinate_hsic(one, two)
            ax.plot(*at, "x", color=color("primary"), markersize=7)
            ax.annotate(name, at, (24, -3) if at[0] < 0.5 else (-6, -10), textcoords="offset points",
                        ha="left" if at[0] < 0.5 else "right", fontsize=6.5, color=color("primary"))
        ax.set_xlabel("squared correlation of coordinates")
        ax.set_ylabel("released score")
        ax.set_title(self.model.name)
        ax.legend(loc="upper left")
        self.figure("artifact", figure)

    def _tokens(self) -> None:
        flat = np.concatenate([np.array(trace) for trace in self.traces])
        top = np.concatenate(self.tops)
        if not top.any():
            self.no_figure("tokens", "no step of any trace is a peak")
            return
        kinds, count = np.unique(flat[top], return_counts=True)
        order = np.argsort(-count, kind="stable")[:16]
        shown = [int(kinds[i]) for i in order]
        words = printable(self.model.tokenizer, shown)
        figure, ax = canvas(1, 1, height=3.2)
        places = np.arange(len(shown))[::-1]
        ax.barh(places + 0.2, count[order] / top.sum(), 0.4, color=CYCLE[1], label="of peaks")
        ax.barh(places - 0.2, [(flat == token).mean() for token in shown], 0.4, color=GRAY,
                label="of all tokens")
        ax.set_yticks(places, [token_strip.readable(word, 12) for word in words])
        ax.set_xlabel("share")
        ax.set_title(f"{self.model.name}: {int(top.sum())} peaks")
        ax.legend(loc="lower right")
        self.figure("tokens", figure)


def _steps(settings: Settings) -> int:
    return settings.pick(512, tiny=24)


def tasks(model: Any, settings: Settings) -> Tasks:
    """Problems, worked solutions and greedy traces: records for the reader, else arithmetic in English.

    Raises `PromptError` for a model that reads neither.
    """
    if _texts.knows(model, reader):
        rng, prompts, solutions, answers = settings.rng(1), [], [], []
        for _ in range(settings.pick(32, tiny=10)):
            found = reader.needle(settings.pick(96, tiny=48), float(rng.uniform(0.1, 0.9)), rng,
                                  distractors=settings.pick(5, tiny=2))
            key, answer = found.tokens[-1], found.answers["context"]
            prompts.append(Prompt.from_tokens(found.tokens))
            solutions.append(Prompt.from_tokens([reader.BOS, reader.NOTE, key, *answer, reader.END]))
            answers.append(list(answer))
        # Its end token is a delimiter of its language: text goes on after it.
        traces = model.run(prompts, new_tokens=settings.pick(40, tiny=12), logits="last").new_tokens
        solved = [trace[: len(answer)] == answer for trace, answer in zip(traces, answers)]
        return Tasks(prompts, solutions, [list(t) for t in traces], answers, np.array(solved),
                     "facts stated in the context, asked for; the solution is the record alone")
    if not english(model):
        raise PromptError(f"{model.name} reads neither the reader's language nor words of English.")
    chat = bool(getattr(model.tokenizer, "chat_template", None))
    prompts = [model.prompt(q, chat=True) if chat else model.prompt(f"Problem: {q}\nSolution:")
               for q, _, _ in _math_problems.PROBLEMS]
    longest = max(map(len, prompts))
    steps = min(_steps(settings), (model.max_positions or 10**6) - longest)
    if steps < 4:
        raise PromptError(f"{model.name} has no room for an answer after {longest} tokens.")
    traces = model.generate(prompts, steps)
    solved = [_math_problems.gives(model.tokenizer.decode(trace), answer)
              for trace, (_, _, answer) in zip(traces, _math_problems.PROBLEMS)]
    answers = [list(model.tokenizer(str(a), add_special_tokens=False)["input_ids"])
               for _, _, a in _math_problems.PROBLEMS]
    return Tasks(prompts, [model.prompt(s) for _, s, _ in _math_problems.PROBLEMS], traces, answers,
                 np.array(solved), "a dozen problems of school mathematics")


def run(settings: Settings, out: Output) -> None:
    run_all(Peaks, settings, out)
