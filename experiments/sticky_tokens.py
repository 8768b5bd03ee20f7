"""Sticky tokens (arXiv:2507.18171): what the published ones do beside ordinary ones, on a random sample
of the vocabulary; or, after `python -m probes.sticky_tokens MODEL`, what the whole procedure found.

The sentences are made from lists (`probes.short_sentences`), since those of the paper cannot be
shipped: which tokens are sticky depends on them.
"""

from typing import Any

import numpy as np
import torch
from matplotlib.ticker import MaxNLocator, NullFormatter

from experiments import _passages
from experiments._output import Output
from experiments._paper import Paper, Settings
from experiments._released_sticky import BENCHMARKS, KNOWN, RELEASED
from experiments._subject import Subject, run_all
from interp.core import Prompt, statistics
from interp.figures.style import CYCLE, GRAY, PAGE, canvas, color, note
from probes import sticky_found
from probes.short_sentences import short_sentences
from probes.sticky_tokens import StickyTokenDetector
from probes.token_insertion import upper_tail

PAPER = Paper(
    "sticky_tokens",
    "Sticking to the Mean: Detecting Sticky Tokens in Text Embedding Models",
    ("2507.18171",),
    "Which tokens, inserted again and again, pull the similarity of sentences to a fixed value?",
    figures={
        "curves": "Similarity of pairs of sentences against the number of copies inserted between the "
        "words of one of them, one color per pair; dotted: the mean similarity of the vocabulary.",
        "scores": "Scores of the tokens that were looked at, a random sample unless all are done; the "
        "dotted line is the score that the best 2 % reach. The score of a token is how much it lowers "
        "the distance of pairs, over how much it raises it.",
        "rates": "Share of pairs of sentences that a token brings closer (its pull rate: before, after "
        "and between the words, weighted 4 : 4 : 3); sticky tokens and others, one dot per token.",
        "attention": "Share of the attention of the other tokens that one inserted token takes, per "
        "layer; gray: ordinary tokens in the same places; dotted: an equal share.",
        "counts": "Sticky tokens of 37 models against their size (released results).",
    },
    models=("all-minilm-l6-v2",),
)
(SOURCE,) = PAPER.sources
OWN = "added by this toolkit, after arXiv:2507.18171"
DERIVED = "added by this toolkit, not in arXiv:2507.18171"
STEPS = (0, 1, 2, 4, 8, 12, 16, 20, 25, 30)
WHOLE = "python -m probes.sticky_tokens"


class Sticky(Subject):
    """One embedding model, its published tokens or the best of a sample, and benign ones beside."""

    paper = PAPER
    claims = {
        "usable": ("23,699 tokens of the vocabulary are usable.", SOURCE),
        "mean": ("The mean similarity of the vocabulary is 0.1998.", SOURCE),
        "count": ("21 tokens are sticky, within a factor of two.", SOURCE),
        "list": ("Other sentences give the same list of sticky tokens.", DERIVED),
        "stronger": ("Sticky tokens bring more pairs closer than benign tokens do.", SOURCE),
        "attention": ("An inserted sticky token takes more attention than a benign one.", SOURCE),
        "twosided": ("Sticky tokens narrow the spread of similarities on both sides of the mean, more "
                     "than benign tokens do.", OWN),
        "null": ("The rule for stickiness picks tokens from a list of benign ones, too.", DERIVED),
        "intact": ("Inserted copies of a token are mostly read as that token.", DERIVED),
        "size": ("The number of sticky tokens does not follow the size of the model.", SOURCE),
        "vocabulary": ("The number of sticky tokens does not follow the size of the vocabulary.",
                       SOURCE),
        "benign": ("Sticky tokens cost more benchmark score than benign ones.", SOURCE),
        "downstream": ("Sticky tokens cause up to half of a retrieval score to be lost.", SOURCE),
    }
    numbers = {
        "usable": ("23,699", "code"), "mean": ("0.1998", "code"), "count": ("21", "code"),
        "benign": ("56.24 / 56.36, 61.68 / 61.62, 62.13 / 59.38 (sticky / benign)", "code"),
        "downstream": ("NFCorpus 28.64 to 13.65, SciFact 45.76 to 26.76 (sentence-t5-base)", "code"),
    }

    def run(self) -> None:
        self._released()
        if not _passages.readable(self.model):
            self.give_up(f"{self.model.name} reads no English sentences")
            return
        torch.manual_seed(self.settings.seed)
        pick, seed = self.settings.pick, self.settings.seed
        self.known = KNOWN.get(self.model.name.lower())
        folder = self.out.cache / self.model.name
        self.whole = sticky_found.load(folder)
        done = None if self.whole is None else self.whole["scores_"]
        if done is None:
            done = sticky_found.scored_so_far(folder)
        self.detector = StickyTokenDetector(
            n_pairs=pick(5, tiny=2), n_validation=2, insertions=pick(8, tiny=2), seed=42 + seed,
            n_candidate_pairs=pick(250, tiny=60), mean_tokens=pick(300, tiny=100), screen="bfloat16",
            refine=0.01, audit=0.0, tokens=pick(16, tiny=5) if done is None else 1)
        self.detector.fit(self.model, short_sentences(pick(150, tiny=40), seed), validate=False)
        self.scores = self.detector.scores_ if done is None else done
        self.sticky, self.benign = self._chosen()
        self._vocabulary()
        self._list()
        self._rates()
        self._attention()
        self._scores_figure()
        self._curves()
        self.give_up("the model was not asked for it")

    def _chosen(self) -> tuple[list[int], list[int]]:
        """Sticky tokens, and for each the next usable token of its kind: ids follow frequency."""
        most = self.settings.pick(21, tiny=3)
        if self.whole is not None:
            sticky = list(self.whole["sticky_ids_"])
        elif self.known is not None:
            sticky = list(self.known["rates"])
        else:
            ranked = self.scores["score"].sort_values(ascending=False)
            sticky = [int(i) for i in ranked.index[: max(2, len(ranked) // 4)]]
        sticky, special = sticky[:most], set(self.model.tokenizer.all_special_ids or ())
        avoid = {*sticky, *((self.known or {}).get("rates", ()))}
        kinds = {i: "special" if i in special else _kind(text)
                 for i, text in self.detector.usable_.items()}
        benign = []
        for i in sticky:
            alike = [j for j, kind in kinds.items() if kind == kinds[i] and j not in avoid]
            alike = alike or [j for j in kinds if j not in avoid]
            benign.append(min(alike, key=lambda j: (abs(j - i), j)))
            avoid.add(benign[-1])
        return sticky, benign

    # -- claims ----------------------------------------------------------------------------------

    def _vocabulary(self) -> None:
        mean = self.detector.mean_similarity_ if self.whole is None else self.whole["mean_similarity_"]
        if self.known is None:
            self.skip(f"no published number is known for {self.model.name}", "usable", "mean")
        else:
            n = len(self.detector.usable_)
            self.claim("usable", _exact(n, "count"), null=float(self.known["usable"]), direction="equal")
            if self.whole is not None:
                estimate = _exact(mean, "mean cosine of all pairs of tokens")
            else:
                some = self.settings.rng(1).permutation(len(self.model.tokenizer))
                vectors = self.detector.encoder_.encode(self.model.tokenizer.convert_ids_to_tokens(
                    [int(i) for i in some[: self.settings.pick(300, tiny=100)]]))
                vectors = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
                estimate = _between(vectors @ vectors.T)
            self.claim("mean", estimate, null=self.known["mean"], direction="equal",
                       tolerance=5e-5 if self.whole is not None else 0.03)
        whole = self.scores["intact"].to_numpy() if "intact" in self.scores else None
        if whole is None or len(whole) < statistics.FEWEST:
            self.skip("too few tokens were looked at", "intact")
        else:
            self.claim("intact", statistics.mean(whole, resamples=2000), null=0.5, direction="above",
                       unit="share of the inserted copies", control="half of them",
                       details={"tokens": len(whole), "depends on": "the tokenizer alone"})

    def _list(self) -> None:
        known, whole = self.known, self.whole
        if whole is None:
            n = len(self.scores)
            reason = f"{n} of {len(self.detector.usable_)} tokens were scored here; run `{WHOLE} " \
                f"{self.model.name}` for all of them"
            self.skip(reason, "count", "list")
            return
        if known is None:
            self.skip(f"no published list is known for {self.model.name}", "count", "list")
            return
        rates, paper = whole["pull_rate_"].to_numpy(), set(known["rates"])

        def ratio(values: np.ndarray) -> float:
            return float(np.log2(max(1, upper_tail(values).sum()) / len(paper)))

        found = set(whole["sticky_ids_"])
        estimate = statistics.bootstrap(ratio, rates, resamples=2000, name="log2 of found / published")
        common = sorted(found & paper)
        self.claim("count", estimate, null=0.0, direction="equal", tolerance=1.0, details={
            "found": len(found), "shortlist": len(rates), "threshold": whole["threshold_"],
            "cutoff": whole["cutoff_"], "missed": str(whole["missed_"]),
            "random shortlist": len(whole["null_sticky_ids_"] or ())})
        union = sorted(found | paper)
        shared = np.array([i in found and i in paper for i in union], dtype=float)
        self.claim("list", statistics.mean(shared, resamples=2000), null=0.5, direction="above",
                   unit="Jaccard", control="half of the union", details={
                       "common": " ".join(self.detector.usable_[i] for i in common),
                       "published in the shortlist": len(paper & set(whole["candidates_"]))})

    def _rates(self) -> None:
        pairs, copies = self.settings.pick((6, (2, 5, 8)), tiny=(3, (1, 2)))
        both = self.detector.effects([*self.sticky, *self.benign], pairs, copies=copies, exact=False)
        self.out.table(f"effects-{self.model.name}", both.assign(
            partner=[*self.benign, *self.sticky], sticky=both.index.isin(self.sticky)))
        near, far = both.loc[self.sticky], both.loc[self.benign]
        one, other = near["rate"].to_numpy(), far["rate"].to_numpy()
        self.rates = near["rate"]
        control = "the next usable token of the same kind (of like frequency)"
        self.claim("stronger", statistics.difference(one, other, resamples=2000), null=0.0,
                   figure="rates", unit="share of pairs", control=control, details={
                       "sticky": float(one.mean()), "benign": float(other.mean()), "pairs": pairs,
                       "sticky no stronger than its partner": float((one <= other).mean())})
        self.claim("twosided", statistics.difference(
            near["variance"].to_numpy(), far["variance"].to_numpy(), resamples=2000), null=0.0,
            direction="below", unit="(variance after over before, sticky minus benign)", control=control,
            details={"sticky": float(near["variance"].mean()),
                     "benign": float(far["variance"].mean()), "pairs on either side": pairs,
                     "pairs above the mean that move apart":
                         f"{near['down'].mean():.3f} / {far['down'].mean():.3f}"})
        null = other if self.whole is None or self.whole["null_pull_rate_"] is None else \
            self.whole["null_pull_rate_"].to_numpy()
        picked = int(upper_tail(null).sum())
        self.claim("null", statistics.rate(picked, len(null)), null=0.0, control="benign tokens",
                   details={"picked": picked, "of": len(null)})
        if self.wants("rates"):
            listed = "published" if self.known and self.whole is None else "found"
            groups = {f"sticky\n({listed})": one, "benign": other}
            if self.whole is not None:
                groups = {"shortlist": self.whole["pull_rate_"].to_numpy(), "random": null, **groups}
            self.figure("rates", _rates_figure(groups, self.model.name, pairs, self.settings.seed))

    def _attention(self) -> None:
        """One copy in the middle of a sentence: what share do the others' queries give it?"""
        model, encoder = self.model, self.detector.encoder_
        texts = [self.detector.sampled_[i][1] for i in self.detector.pairs_[: self.settings.pick(
            3, tiny=2)]]
        shares: dict[str, np.ndarray] = {}
        equal = []
        for name, tokens in (("sticky", self.sticky), ("benign", self.benign)):
            rows = []
            for i in tokens:
                prompts, places = [], []
                for ids in encoder.ids(texts):
                    at = len(ids) // 2
                    # The id itself: as text it could be read as other tokens.
                    prompts.append(Prompt.from_tokens([*ids[:at], i, *ids[at:]]))
                    places.append(at)
                read = model.run(prompts, read="pattern", logits="none").reads["pattern"]
                mean = []
                for k, at in enumerate(places):
                    n = len(prompts[k])
                    others = [q for q in range(n) if q != at and (model.kind == "encoder" or q > at)]
                    pattern = read.isel(prompt=k).values[:, :, others, at]
                    mean.append(pattern.mean((1, 2)))
                    equal.append(np.mean([1 / n if model.kind == "encoder" else 1 / (q + 1)
                                          for q in others]))
                rows.append(np.mean(mean, 0))
            shares[name] = np.array(rows)
        one, other = shares["sticky"].mean(1), shares["benign"].mean(1)
        per_layer = shares["sticky"].mean(0) - shares["benign"].mean(0)
        self.claim("attention", statistics.difference(one, other, resamples=2000), null=0.0,
                   figure="attention", unit="share of attention", control="the next usable token of "
                   "the same kind in the same place", details={
                       "sticky": float(one.mean()), "benign": float(other.mean()),
                       "largest in layer": int(per_layer.argmax()),
                       "most by": f"{self.detector.usable_[self.sticky[int(one.argmax())]]} "
                                  f"({one.max():.3f})", "median": float(np.median(one)),
                       "an equal share": float(np.mean(equal))})
        if self.wants("attention"):
            figure, ax = canvas(width=PAGE / 2)
            for name, hue in (("benign", GRAY), ("sticky", color("primary"))):
                values = shares[name]
                ax.plot(values.T, color=hue, alpha=0.25, linewidth=0.6)
                ax.plot(values.mean(0), color=hue, marker="o", label=f"{name} (mean)")
            ax.axhline(float(np.mean(equal)), color="black", linestyle=":", linewidth=0.8)
            ax.set_xlabel("layer")
            ax.set_ylabel("attention on the inserted token")
            ax.set_ylim(0)
            ax.legend()
            ax.set_title(model.name)
            note(ax, f"{len(one)} tokens each, {len(texts)} sentences")
            self.figure("attention", figure)

    # -- figures ---------------------------------------------------------------------------------

    def _scores_figure(self) -> None:
        if not self.wants("scores"):
            return
        values = self.scores["score"].to_numpy()
        figure, ax = canvas(width=PAGE / 2)
        ax.hist(values, bins=min(40, max(5, len(values) // 2)), color=CYCLE[1], alpha=0.8)
        bar = float(np.percentile(values, 98))
        ax.axvline(bar, color="black", linestyle=":", linewidth=0.9, label="best 2 % from here")
        ax.set_xlabel("score: distance lowered over raised")
        ax.legend(loc="lower right", bbox_to_anchor=(1.0, 1.0), borderaxespad=0.0)
        ax.set_ylabel("tokens")
        ax.yaxis.set_major_locator(MaxNLocator(integer=True))
        ax.set_title(self.model.name)
        note(ax, f"{len(values)} of {len(self.detector.usable_)} usable tokens")
        self.figure("scores", figure)

    def _curves(self) -> None:
        if not self.wants("curves") or not self.sticky:
            return
        best = int(np.argmax(self.rates.to_numpy()))
        pairs, rng = self.detector.pairs_, self.settings.rng(2)
        steps = STEPS if not self.settings.tiny else STEPS[:5]
        figure, axes = canvas(1, 2, width=PAGE, height=2.6, sharey=True)
        for ax, i, name in ((axes[0], self.sticky[best], "sticky"), (axes[1], self.benign[best],
                                                                     "benign")):
            for k, p in enumerate(pairs):
                first, second = self.detector.sampled_[p]
                texts = []
                for n in steps:
                    words = second.split()
                    for _ in range(n):
                        words.insert(int(rng.integers(len(words) + 1)), self.detector.usable_[i])
                    texts.append(" ".join(words))
                vectors = self.detector.encoder_.encode([first, *texts])
                vectors = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
                ax.plot(steps, vectors[1:] @ vectors[0], marker="o", color=CYCLE[k % len(CYCLE)],
                        label=f"pair {k + 1}")
            ax.axhline(self.detector.mean_similarity_, color="black", linestyle=":", linewidth=0.9,
                       label="mean of the vocabulary")
            ax.set_xlabel("copies inserted")
            ax.set_title(f"{name}: {_shown(self.detector.usable_[i])}")
        axes[0].set_ylabel("cosine similarity")
        axes[1].legend(loc="upper left", bbox_to_anchor=(1.02, 1.0), borderaxespad=0.0)
        note(axes[1], f"{self.model.name}, {len(pairs)} pairs")
        self.figure("curves", figure)

    # -- released results --------------------------------------------------------------------------

    def _released(self) -> None:
        table, resamples = RELEASED, self.settings.pick(1000, tiny=200)
        for key, column in (("size", "parameters"), ("vocabulary", "vocabulary")):
            self.claim(key, statistics.correlation(table[column], table["sticky"], resamples=resamples),
                       null=0.0, direction="equal", tolerance=0.3, figure="counts",
                       details={"data": "released results, 37 models"})
        gap = statistics.difference(BENCHMARKS["sticky"], BENCHMARKS["benign"], resamples=resamples)
        self.claim("benign", gap, null=0.0, direction="below", unit="points",
                   details={"data": "released results, 3 models"})
        self.skip("it needs the retrieval collections NFCorpus and SciFact, and none comes with this "
                  "package", "downstream")
        if not self.wants("counts"):
            return
        figure, axes = canvas(1, 2, width=PAGE, height=2.5, sharey=True)
        for ax, column, label in zip(axes, ("parameters", "vocabulary"), (
                "parameters (millions)", "tokens in the vocabulary")):
            ax.plot(table[column], table["sticky"], "o", color=CYCLE[0], alpha=0.7)
            mine = table[table["model"].str.lower() == self.model.name.lower()]
            ax.plot(mine[column], mine["sticky"], "o", color=color("primary"), markersize=6)
            ax.set_xscale("log")
            ax.set_xlabel(label)
        axes[1].set_xticks([30_000, 50_000, 100_000, 150_000], ["30k", "50k", "100k", "150k"])
        axes[1].xaxis.set_minor_formatter(NullFormatter())
        axes[0].set_ylabel("sticky tokens")
        note(axes[1], "released results" + (f"; red: {self.model.name}" if len(mine) else ""))
        self.figure("counts", figure)


def run(settings: Settings, out: Output) -> None:
    run_all(Sticky, settings, out)


def _exact(value: Any, name: str) -> statistics.Estimate:
    return statistics.Estimate(float(value), (float(value), float(value)), 1, f"{name}, exact")


def _between(cosine: np.ndarray) -> statistics.Estimate:
    """Mean cosine of different sentences; one drawn twice in a resample is not a pair."""
    def mean(rows: np.ndarray) -> float:
        times = np.bincount(rows.astype(int), minlength=len(cosine))
        return float((times @ cosine @ times - times**2 @ np.diag(cosine))
                     / (times.sum() ** 2 - (times**2).sum()))

    return statistics.bootstrap(mean, np.arange(len(cosine)), resamples=300, name="mean cosine")


def _kind(text: str) -> str:
    if text.strip().isascii():
        return "word" if text.strip().isalpha() else "sign"
    return "foreign"


def _shown(text: str) -> str:
    return text.replace("$", r"\$") if text.isascii() else "U+" + " ".join(
        f"{ord(c):04X}" for c in text.strip())


def _rates_figure(groups: dict[str, np.ndarray], name: str, pairs: int, seed: int) -> Any:
    figure, ax = canvas(width=PAGE / 2)
    rng = np.random.default_rng(seed)
    for k, (group, values) in enumerate(groups.items()):
        hue = GRAY if group in ("benign", "random") else color("primary")
        ax.boxplot([values], positions=[k], widths=0.12, showfliers=False,
                   medianprops={"color": "black"})
        ax.plot(k - 0.12 - 0.2 * rng.random(len(values)), values, ".", color=hue, alpha=0.5)
    ax.set_xticks(range(len(groups)), list(groups))
    ax.set_ylabel("pull rate: share of pairs brought closer")
    ax.set_title(name)
    note(ax, f"per token {pairs} pairs x 3 ways to insert (weights 4 : 4 : 3); box: quartiles")
    return figure
