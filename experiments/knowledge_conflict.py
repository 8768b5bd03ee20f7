"""Knowledge conflicts (arXiv:2402.18154, 2503.10996): which heads side with memory, which with text.

Questions whose answer the model has learned, under a context that states another one: in the
reader's own language, or in English for any model with a tokenizer.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Optional

import numpy as np
import xarray as xr

from experiments import _conflict_figures as figures
from experiments import _texts as texts
from experiments._conflicts import cases_for
from experiments._output import Output
from experiments._paper import Paper, Settings, opened
from interp.causal import prune
from interp.core import Claim, Head, PromptError, Result, statistics
from interp.heads import memory_context
from interp.prompts.conflict import FORMATS, Conflict, closed_book, split

PAPER = Paper(
    "knowledge_conflict",
    "Cutting Off the Head Ends the Conflict, and heads that carry both signals",
    ("2402.18154", "2503.10996"),
    "Which heads write what a model has learned, which write what the text says, and does removing "
    "one kind decide the conflict?",
    figures={
        "map": "S_m of every head by format of the conflict: the change of the stated answer's "
        "logit minus the memorized one's when the head's output comes from a twin prompt "
        "(this toolkit's formula; red: memory heads, blue: context heads).",
        "signals": "Both parts of S_m in the substitution format: how each head moves the logit of "
        "the memorized and of the stated answer.",
        "pruning": "Share of held-out conflicts answered from memory and from the context while "
        "heads of one kind are pruned, strongest first; gray: random heads of the same layers.",
        "transfer": "Heads found on one set of conflicts, pruned on another: change of the memory "
        "usage rate beyond random heads, and agreement of the maps of S_m.",
        "superposition": "S_m of the strongest heads in three formats of prompt, with 95 % "
        "intervals; shaded: chance level.",
    },
    models=("reader",),
)
SOURCE, JUICE = PAPER.sources
MAIN = "substitution"
TOP = 0.05
FEWEST = 4
"""At least so many heads are looked at where 5 % of all heads are fewer."""

CLAIMS = {
    "memory_heads": "Some heads push toward the memorized answer.",
    "context_heads": "Some heads push toward the answer stated in the context.",
    "late": "The heads that decide between the two sit in later layers.",
    "to_memory": "Pruning context heads causes the model to answer from memory.",
    "to_context": "Pruning memory heads causes the model to answer from the context.",
    "neutral": "Pruning context heads leaves neutral text as it was.",
    "formats": "The maps of memory and context heads agree between formats of conflict.",
    "relations": "The maps of memory and context heads agree between relations.",
    "transfer": "Context heads found in one set of conflicts, when pruned, cause answers from memory "
    "in another.",
    "superposition": "Some heads act for memory in one format of prompt and for the context in "
    "another.",
}
NUMBERS = {"to_memory": "memory usage 49.7 to 93.7, mean of 8 models",
           "to_context": "context usage 50.3 to 88.8, mean of 8 models"}


def run(settings: Settings, out: Output) -> None:
    def absent(name: str, reason: str) -> None:
        _give_up(name, reason, out)

    for model in opened(PAPER, settings, absent):
        out.record(model)
        try:
            cases = cases_for(model, settings)
        except PromptError as error:
            _give_up(model.name, str(error), out)
            continue
        known = closed_book(model, cases)
        kept = [case for case, knows in zip(cases, known) if knows]
        subjects = {(case.relation, case.subject) for case in kept}
        out.record(prompts=[case.clean for case in cases], name=f"conflicts-{model.name}")
        if len(subjects) < 2 * statistics.FEWEST:
            asked = len({(case.relation, case.subject) for case in cases})
            _give_up(model.name, f"{model.name} knows {len(subjects)} of {asked} facts without a "
                     f"context; {2 * statistics.FEWEST} are needed", out)
            continue
        _one(_Subject(model, kept, settings, out), known)


def _give_up(
    name: str, reason: str, out: Output, claims: Sequence[str] = tuple(CLAIMS),
    figures: Sequence[str] = tuple(PAPER.figures),
) -> None:
    for figure in figures:
        out.no_figure(figure, reason, of=name)
    for key in claims:
        out.claim(Claim.untestable(CLAIMS[key], _source(key), reason, **_number(key)), name)


def _source(key: str) -> str:
    return JUICE if key == "superposition" else SOURCE


def _number(key: str) -> dict[str, str]:
    return {"paper_number": NUMBERS[key], "paper_tag": "secondary"} if key in NUMBERS else {}


@dataclass
class _Subject:
    """A model, the conflicts it can be asked about, and where findings go."""

    model: Any
    cases: list[Conflict]
    settings: Settings
    out: Output

    def __post_init__(self) -> None:
        self.name: str = self.model.name
        # Heads are chosen on the first part, everything is claimed on the second.
        self.dev, self.test = split(self.cases, self.settings.rng(2))
        self.found: dict[tuple[str, str, str], Result] = {}

    def of(self, part: str, format: str = MAIN, relation: str = "") -> list[Conflict]:
        """The conflicts of one part and format, of one relation or all."""
        return [case for case in (self.dev if part == "dev" else self.test)
                if case.format == format and relation in ("", case.relation)]

    def heads(self, part: str, format: str = MAIN, relation: str = "") -> Result:
        """S_m on some of the conflicts, measured once; in wide models only where it matters."""
        # With one relation only, its conflicts are all there are.
        relation = relation if len({case.relation for case in self.cases}) > 1 else ""
        key = (part, format, relation)
        if key not in self.found:
            count = self.model.n_layers * self.model.n_heads
            self.found[key] = memory_context.measure(
                self.model, self.of(*key), screen=None if count <= 256 else 0.25,
                seed=self.settings.seed, batch_size=32)
        return self.found[key]

    def claim(self, key: str, estimate: Any, **more: Any) -> None:
        self.out.claim(Claim(CLAIMS[key], _source(key), **{
            **estimate.for_claim(), **_number(key), **more}), self.name)

    def skip(self, key: str, reason: str, **more: Any) -> None:
        self.out.claim(Claim.untestable(CLAIMS[key], _source(key), reason, **_number(key), **more),
                       self.name)


def _one(of: _Subject, known: Sequence[bool]) -> None:
    found, held_out = of.heads("dev"), of.heads("test")
    of.out.save(f"heads-{of.name}", found)
    of.out.save(f"heads-test-{of.name}", held_out)
    count = max(FEWEST, round(TOP * int(found["eligible"].sum())))
    top = memory_context.strongest(found, count)
    details = {"conflicts known": f"{sum(known)} of {len(known)}",
               "heads looked at": [str(head) for head in top],
               "context wins before": float((held_out["before"] > 0).mean())}
    _kinds(of, found, held_out, details)
    _depth(of, held_out, count, details)
    _maps(of, top)
    of.out.figure("signals", figures.signals(found, top, of.name), of=of.name)
    _pruning(of, found, details)
    _transfer(of, details)
    _superposition(of, count)


def _mean_score(found: Result, heads: Sequence[Head]) -> np.ndarray:
    """S_m per prompt, averaged over heads that were patched."""
    values = [found["samples"].sel(layer=h.layer, head=h.head).values for h in heads]
    return np.mean(values, axis=0)


def _kinds(of: _Subject, found: Result, held_out: Result, details: dict[str, Any]) -> None:
    """The strongest head of each kind on one half of the subjects, tested on the other half."""
    groups = [case.subject for case in of.of("test")]
    for key, kind, sign in (("memory_heads", "memory", 1), ("context_heads", "context", -1)):
        order = prune.ranked(memory_context.scores(found), kind)  # type: ignore[arg-type]
        order = [h for h in order if bool(held_out["eligible"].sel(layer=h.layer, head=h.head))]
        if not order:
            of.skip(key, f"no head has S_m {'above' if sign > 0 else 'below'} zero")
            continue
        head = order[0]
        null = memory_context.chance(held_out)
        of.claim(
            key, statistics.mean(_mean_score(held_out, [head]), groups=groups),
            null=sign * null if np.isfinite(null) else 0.0,
            direction="above" if sign > 0 else "below", unit="logits", figure="map",
            control="the largest effect of any head on pairs of other answers (95 % quantile)",
            details={**details, "head": str(head)})


def _depth(of: _Subject, found: Result, count: int, details: dict[str, Any]) -> None:
    if of.model.n_layers < 2:
        of.skip("late", "the model has one layer")
        return
    samples = found["samples"].values.reshape(found.data.sizes["sample"], -1)
    samples = np.where(np.isnan(samples), 0.0, samples)
    depth = np.repeat(np.arange(of.model.n_layers) / (of.model.n_layers - 1), of.model.n_heads)

    def mean_depth(rows: np.ndarray) -> float:
        order = np.argsort(-abs(rows.mean(0)), kind="stable")
        return float(depth[order[:count]].mean())

    of.claim("late", statistics.bootstrap(mean_depth, samples, resamples=2000,
                                          name="mean relative depth of the strongest heads"),
             null=0.5, figure="map", details={**details, "heads": count,
                                              "layers": of.model.n_layers})


# -- figures of the scores -----------------------------------------------------------------------


def _maps(of: _Subject, top: Sequence[Head]) -> None:
    if not of.out.wants("map"):
        return
    figure = figures.maps({name: of.heads("dev", name) for name in FORMATS}, MAIN, top,
                          f"{of.name}, {len(of.of('dev'))} conflicts (outlined: strongest on {MAIN})")
    of.out.figure("map", figure, of=of.name)


# -- pruning -------------------------------------------------------------------------------------


def _wanted(cases: Sequence[Conflict], against: str) -> list[int]:
    """First tokens of the answer that is to win when the other source's heads are pruned."""
    return [case.tokens[0 if against == "memory" else 1] for case in cases]


def _choose(of: _Subject, cases: Sequence[Conflict], found: Result, against: str) -> Optional[int]:
    # At most a quarter of all heads, so that enough others remain for controls.
    most = max(2, of.model.n_layers * of.model.n_heads // 4)
    counts = [c for c in of.settings.pick((*prune.COUNTS, 2), tiny=(1, 2)) if c <= most]
    try:
        chosen = prune.choose_count(
            of.model, [case.clean for case in cases], _wanted(cases, against),
            memory_context.scores(found), against, counts=counts, batch_size=32)  # type: ignore[arg-type]
    except ValueError:
        return None
    return int(chosen["chosen"])


def _pruning(of: _Subject, found: Result, details: dict[str, Any]) -> None:
    dev, test = of.of("dev"), of.of("test")
    test = test[: of.settings.pick(36, tiny=8)]
    chosen = {kind: _choose(of, dev[: of.settings.pick(36, tiny=8)], found, kind)
              for kind in ("memory", "context")}
    counts = sorted({0, 1, 2, *of.settings.pick((3, 5, 7), tiny=()),
                     *(c for c in chosen.values() if c)})
    neutral, silent = _neutral(of)
    done = memory_context.intervene(of.model, test, found, counts=counts, neutral=neutral,
                                    batch_size=32)
    of.out.save(f"pruning-{of.name}", done)
    groups = [case.subject for case in test]
    for key, against, usage in (("to_memory", "context", "memory_usage"),
                                ("to_context", "memory", "context_usage")):
        count = chosen[against]
        if count is None or against not in done["against"].values:
            of.skip(key, f"no head of {of.name} is a {against} head by S_m")
            continue
        rates = done[usage].sel(against=against)
        before = float(rates.sel(condition="top", count=0).mean())
        after, random = (rates.sel(condition=c, count=count).mean("seed").values
                         for c in ("top", "random"))
        more = {**details, "heads pruned": done.manifest[against]["top"][:count],
                "usage before": before, "usage after": float(after.mean()),
                "usage, random heads": float(random.mean()),
                **({"loss of neutral text": _losses(done, against, count)} if neutral else {})}
        if before > 0.95:
            of.skip(key, f"{100 * before:.0f} % of the conflicts are answered from the "
                    f"{'context' if against == 'memory' else 'memory'} before anything is pruned, so "
                    "there is nothing to gain", details=more)
        else:
            of.claim(key, statistics.difference(after, random, groups=groups), null=0.0,
                     causal=True, control=_control(done["layer_matched"].sel(
                         against=against, count=count)),
                     unit="share of prompts", figure="pruning", details=more)
    if not neutral:
        of.skip("neutral", silent)
    elif chosen["context"] is None or "context" not in done["against"].values:
        of.skip("neutral", f"no head of {of.name} is a context head by S_m")
    else:
        loss = done["text_loss"].sel(against="context").mean("seed")
        cut, whole = (loss.sel(condition="top", count=c).values for c in (chosen["context"], 0))
        of.claim("neutral", statistics.difference(cut, whole), null=0.0, direction="equal",
                 tolerance=0.1, unit="nats per token", causal=True, figure="pruning",
                 control=_control(done["layer_matched"].sel(against="context",
                                                            count=chosen["context"])),
                 details={"heads pruned": chosen["context"],
                          "loss": _losses(done, "context", chosen["context"])})
    of.out.figure("pruning", figures.pruning(done, chosen, of.model, of.name), of=of.name)


def _neutral(of: _Subject) -> tuple[list[Any], str]:
    """Ordinary text, or why there is none."""
    length = min(48, of.model.max_positions or 48)
    try:
        return texts.natural(of.model, of.settings.pick(8, tiny=5), length, of.settings.rng(4)), ""
    except PromptError as error:
        return [], str(error)


def _losses(done: Result, against: str, count: int) -> dict[str, float]:
    """Loss of neutral text before, and with heads of a kind or random ones pruned."""
    loss = done["text_loss"].sel(against=against).mean(("seed", "sample"))
    return {"before": float(loss.sel(condition="top", count=0)),
            **{str(c): float(loss.sel(condition=c, count=count)) for c in ("top", "random")}}


def _control(layer_matched: Any) -> str:
    if bool(layer_matched):
        return "as many random heads of the same layers, of neither kind where possible, 5 sets, paired"
    return "as many random heads, 5 sets, paired (a layer has too few others to match layers)"


# -- other formats and relations -----------------------------------------------------------------


def _spearman(a: np.ndarray, b: np.ndarray) -> float:
    from scipy.stats import rankdata

    known = np.isfinite(a) & np.isfinite(b)
    if known.sum() < 3:
        return float("nan")
    return float(np.corrcoef(rankdata(a[known]), rankdata(b[known]))[0, 1])


def _agreement(first: Result, second: Result) -> Any:
    """Spearman correlation of two maps of S_m, with an interval over prompts."""
    a, b = (found["samples"].values.reshape(found.data.sizes["sample"], -1)
            for found in (first, second))
    known = np.isfinite(a[0]) & np.isfinite(b[0])
    size = min(len(a), len(b))

    def rank(x: np.ndarray, y: np.ndarray) -> float:
        return _spearman(x.mean(0), y.mean(0))

    return statistics.bootstrap(rank, a[:size, known], b[:size, known], resamples=1000,
                                name="Spearman correlation over heads")


def _between_relations(of: _Subject, relations: Sequence[str]) -> Any:
    """Mean agreement of the maps of all ordered pairs of relations, with an interval over prompts."""
    rows = [[of.heads(part, MAIN, r)["samples"].values for r in relations] for part in ("dev", "test")]
    size = min(len(one) for some in rows for one in some)
    flat = [one[:size].reshape(size, -1) for some in rows for one in some]
    known = np.isfinite(np.stack([one[0] for one in flat])).all(0)
    count = len(relations)

    def agreement(*samples: np.ndarray) -> float:
        means = [one.mean(0) for one in samples]
        return float(np.mean([_spearman(means[a], means[count + b])
                              for a in range(count) for b in range(count) if a != b]))

    return statistics.bootstrap(agreement, *(one[:, known] for one in flat), resamples=500,
                                name="mean Spearman correlation over pairs of relations")


def _transfer(of: _Subject, details: dict[str, Any]) -> None:
    relations = sorted({case.relation for case in of.cases})
    formats = [name for name in FORMATS if name != "none"]
    estimate = _agreement(of.heads("dev", formats[0]), of.heads("test", formats[1]))
    of.claim("formats", estimate, null=0.0, figure="transfer",
             details={**details, "formats": formats, "subjects": "no common ones"})
    enough = [r for r in relations if min(len(of.of(part, MAIN, r)) for part in ("dev", "test"))
              >= statistics.FEWEST]
    if len(enough) < 2:
        of.skip("relations", f"{of.name} is asked about {len(enough)} relation with enough known "
                f"facts ({', '.join(enough) or 'none'}); two are needed")
    else:
        of.claim("relations", _between_relations(of, enough), null=0.0, figure="transfer",
                 details={"relations": enough})
    groups = [(r, f) for r in enough for f in formats]
    if not groups:
        _give_up(of.name, "no relation has enough known facts", of.out, ["transfer"], ["transfer"])
        return
    _matrix(of, groups)


def _matrix(of: _Subject, groups: Sequence[tuple[str, str]]) -> None:
    """Context heads of one group of conflicts (rows), pruned in another (columns)."""
    size = len(groups)
    gain, agree = np.full((size, size), np.nan), np.full((size, size), np.nan)
    elsewhere: list[np.ndarray] = []
    matched: list[float] = []
    subjects: list[str] = []
    for i, (relation, kind) in enumerate(groups):
        found = of.heads("dev", kind, relation)
        own = of.of("dev", kind, relation)[: of.settings.pick(24, tiny=8)]
        count = _choose(of, own, found, "context")
        for j, (other, format) in enumerate(groups):
            cases = of.of("test", format, other)[: of.settings.pick(24, tiny=8)]
            agree[i, j] = _spearman(found["score"].values.ravel(),
                                    of.heads("test", format, other)["score"].values.ravel())
            if count is None:
                continue
            done = memory_context.prune_sweep(
                of.model, [case.clean for case in cases],
                prune.Answers("usage", _wanted(cases, "context"), batch_size=32),
                found, "context", (count,))
            top, random = (done["usage"].sel(condition=c, count=count).mean("seed").values
                           for c in ("top", "random"))
            gain[i, j] = float((top - random).mean())
            matched.append(float(done["layer_matched"].sel(count=count)))
            if i != j:
                elsewhere.append(top - random)
                subjects += [case.subject for case in cases]
    names = [kind if len({r for r, _ in groups}) == 1 else f"{r}, {kind}" for r, kind in groups]
    of.out.save(f"transfer-{of.name}", Result(xr.Dataset(
        {"gain": (("found_on", "pruned_on"), gain), "agreement": (("found_on", "pruned_on"), agree)},
        {"found_on": names, "pruned_on": names}), of.model.manifest()))
    if not elsewhere:
        of.skip("transfer", f"there is one set of conflicts for {of.name}, or no context head in it")
    else:
        of.claim("transfer", statistics.mean(np.concatenate(elsewhere), groups=subjects), null=0.0,
                 causal=True, control=_control(min(matched)), unit="share of prompts",
                 figure="transfer",
                 details={"sets of conflicts": names, "gain": gain.round(3).tolist()})
    of.out.figure("transfer", figures.transfer(gain, agree, names, of.name), of=of.name)


# -- superposition -------------------------------------------------------------------------------


def _superposition(of: _Subject, count: int) -> None:
    """Signs of S_m of the same heads in prompts of other formats."""
    found = {name: of.heads("test", name) for name in FORMATS}
    chosen: list[Head] = []
    for name in FORMATS:
        chosen += memory_context.strongest(of.heads("dev", name), count)
    heads = sorted(set(chosen))
    samples = {}
    nulls = {name: float(np.nan_to_num(memory_context.chance(one))) for name, one in found.items()}
    for name, one in found.items():
        samples[name] = np.stack([one["samples"].sel(layer=h.layer, head=h.head).values
                                  for h in heads], 1)
    kept = [i for i in range(len(heads)) if all(np.isfinite(s[:, i]).all() for s in samples.values())]
    size = min(len(s) for s in samples.values())
    if not kept or size < statistics.FEWEST:
        _give_up(of.name, f"no head was patched in all formats ({', '.join(FORMATS)})", of.out,
                 ["superposition"], ["superposition"])
        return

    def share(means: Sequence[np.ndarray]) -> float:
        signs = [np.where(abs(mean) > nulls[name], np.sign(mean), 0.0)
                 for name, mean in zip(FORMATS, means)]
        return float(((np.max(signs, 0) > 0) & (np.min(signs, 0) < 0)).mean())

    def flips(*rows: np.ndarray) -> float:
        return share([row.mean(0) for row in rows])

    estimate = statistics.bootstrap(flips, *(samples[n][:size, kept] for n in FORMATS),
                                    resamples=2000, name="share of heads that change sides")
    # How often a head changes sides between pairs of answers that mean nothing in the prompt.
    placebo = [np.stack([found[n]["placebo"].sel(layer=heads[i].layer, head=heads[i].head).values
                         for i in kept]) for n in FORMATS]
    pairs = min(one.shape[1] for one in placebo)
    by_chance = [share([one[:, pair] for one in placebo]) for pair in range(pairs)]
    null = float(np.quantile(by_chance, memory_context.LEVEL)) if pairs else 0.0
    turned = {str(heads[i]): {n: round(float(samples[n][:, i].mean()), 3) for n in FORMATS}
              for i in kept}
    of.claim("superposition", estimate, null=null, figure="superposition",
             control="the same for pairs of other answers (95 % quantile)",
             details={"S_m": turned, "chance level of |S_m|": nulls})
    if not of.out.wants("superposition"):
        return
    shown = sorted(kept, key=lambda i: -max(abs(samples[n][:, i].mean()) for n in FORMATS))[:12]
    figure = figures.superposition(
        {name: samples[name][:, shown] for name in FORMATS}, nulls, [str(heads[i]) for i in shown],
        of.name)
    of.out.figure("superposition", figure, of=of.name)
