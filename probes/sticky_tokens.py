"""Sticky-token detection: tokens that, inserted again and again, pull sentences together.

Source   arXiv:2507.18171 and the repository March-7/StickyToken. `python -m probes.sticky_tokens`
runs the whole procedure into a folder and goes on there when it was stopped.
"""

import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Optional, Union

import numpy as np
import pandas as pd
from sklearn.base import BaseEstimator
from sklearn.utils.validation import check_is_fitted

from interp.causal.sweep import fingerprint
from interp.core import PromptError
from interp.core.statistics import rate
from probes import sticky_found
from probes import token_insertion as rules
from probes.kept_tables import KeptTables, content_key
from probes.sentence_encoder import SentenceEncoder

Pairs = Sequence[tuple[str, str]]


class StickyTokenDetector(BaseEstimator):
    """The published procedure, with the controls that it lacks.

    Example:
        >>> import interp
        >>> from probes.short_sentences import short_sentences
        >>> found = StickyTokenDetector(n_pairs=2, n_validation=4, insertions=2, tokens=[2000, 1063],
        ...     n_candidate_pairs=60, mean_tokens=200, share=0.5, null=False)
        >>> found = found.fit(interp.open_model("all-minilm-l6-v2"), short_sentences(40))
        >>> len(found.usable_), 0.15 < found.mean_similarity_ < 0.25, len(found.candidates_)
        (23699, True, 1)

    Args:
        n_pairs, n_validation: pairs of sentences for the score and for the validation, chosen from
            `n_candidate_pairs` that lie evenly over the similarities.
        insertions: copies of a token, 1 up to this many, in front, behind and between the words.
        share: of the tokens with the highest score are validated.
        whisker: a validated token is sticky above Q3 + whisker x IQR of the validated pull rates.
        screen: "bfloat16" scores all tokens with weights of that type, then the best `refine` of
            them, and `audit` of the rest (which tells how many were missed), as the model is.
        tokens: token ids to look at instead of all; or how many, drawn at random; or "done", those
            that a run over all tokens has finished in the folder so far.
        mean_tokens: estimate the mean similarity from as many random tokens instead of from all.
        null: whether as many random tokens are validated, and judged by the same rule.
        check: with `screen`, as many validated tokens are validated as the model is, too.
        seed: of the insertions; 42 with all tokens draws them as the released code does.
        folder: keeps what is done, so that a run that was stopped goes on. Tokens are taken in a
            random order: what is done at any time is a random sample.

    Attributes:
        encoder_: of sentences. mean_similarity_: of the whole vocabulary. usable_: token -> text.
        scores_: per token `score`, `screened` (in bfloat16), `refined`, and `intact`, the share of
            inserted copies that are this token once the sentence is read.
        threshold_, candidates_: of the scores, and who reaches it, best first.
        pull_rate_: of the candidates. sticky_ids_, cutoff_: those above, and what they are above.
        null_pull_rate_, null_sticky_ids_: of the random tokens.
        missed_: what the audit says about the screening. agreement_: of the two validations.
        pairs_, validation_pairs_: numbers into `sampled_`, the candidate pairs with `similarity_`.
    """

    def __init__(
        self, n_pairs: Any = 5, n_validation: Any = 250, insertions: Any = 8, share: Any = 0.02,
        whisker: Any = 0.7, n_candidate_pairs: Any = 1000, mean_tokens: Any = None,
        screen: Any = None, refine: Any = 0.08, audit: Any = 0.02, tokens: Any = None,
        null: Any = True, check: Any = 10, seed: Any = 42, folder: Any = None,
        progress: Any = False,
    ) -> None:
        self.n_pairs = n_pairs
        self.n_validation = n_validation
        self.insertions = insertions
        self.share = share
        self.whisker = whisker
        self.n_candidate_pairs = n_candidate_pairs
        self.mean_tokens = mean_tokens
        self.screen = screen
        self.refine = refine
        self.audit = audit
        self.tokens = tokens
        self.null = null
        self.check = check
        self.seed = seed
        self.folder = folder
        self.progress = progress

    def fit(
        self, model: Any, sentences: Union[Sequence[str], Pairs], *, validate: bool = True
    ) -> "StickyTokenDetector":
        """Run all steps, or without `validate` those up to the scores.

        Args:
            sentences: texts, of which all pairs are compared; or pairs that were already sampled.

        Raises:
            PromptError: a model without tokenizer, too few sentences or pairs below the model's mean,
                a token that is not usable.
        """
        self._begin(model, sentences)
        self._score()
        return self._validate() if validate else self

    # -- steps 0 to 2 ------------------------------------------------------------------------------

    def _begin(self, model: Any, sentences: Union[Sequence[str], Pairs]) -> None:
        self.encoder_ = SentenceEncoder(model)
        self._fast = SentenceEncoder(model, precision="bfloat16") if self.screen else self.encoder_
        self.usable_ = rules.usable_tokens(model.tokenizer)
        self.order_ = self._order()
        self._kept = KeptTables(self.folder, {"weights": fingerprint(model),
                                         "usable": content_key(self.usable_)},
                                bool(self.progress))
        self.mean_similarity_ = self._mean(model)
        self._sample(list(sentences))

    def _mean(self, model: Any) -> float:
        """Of the whole vocabulary, or estimated from a random sample of it."""
        tokenizer, n = model.tokenizer, len(model.tokenizer)
        some = np.arange(n)
        if self.mean_tokens is not None and int(self.mean_tokens) < n:
            some = np.random.default_rng([int(self.seed), 3]).permutation(n)[: int(self.mean_tokens)]
        stage = self._kept.stage("mean", encoder=self.encoder_.settings(),
                                 tokens=content_key(some.tolist()))
        found = self._kept.shards(stage, [some.tolist()], lambda part: pd.DataFrame({"mean": [
            rules.mean_similarity(self.encoder_.encode(tokenizer.convert_ids_to_tokens(part)))]}))
        mean = float(found["mean"].iloc[0])
        # In a sample a token meets itself more often than in the whole.
        others = (len(some) * mean - 1) / (len(some) - 1)
        return others + (1 - others) / n

    def _order(self) -> list[int]:
        """Which tokens are looked at, in which order."""
        rng = np.random.default_rng([int(self.seed), 0])
        if self._which() == "all" or np.ndim(self.tokens) == 0:
            shuffled = [int(i) for i in rng.permutation(list(self.usable_))]
            return shuffled[: len(shuffled) if self._which() == "all" else int(self.tokens)]
        chosen = [int(i) for i in self.tokens]
        for i in chosen:
            if i not in self.usable_:
                raise PromptError(f"token {i} is not usable: its text is not read as that token.")
        return chosen

    def _sample(self, sentences: list[Any]) -> None:
        if not sentences or len(set(map(content_key, sentences))) < 3:
            raise PromptError("give at least three different sentences, or pairs of sentences.")
        stage = self._kept.stage("pairs", texts=content_key(sentences), n=int(self.n_candidate_pairs),
                                 encoder=self.encoder_.settings())
        found = self._kept.shards(stage, [sentences], self._sampled)
        self.sampled_ = list(zip(found["first"], found["second"]))
        self.similarity_ = found["similarity"].to_numpy()
        self.pairs_, self.validation_pairs_ = (
            rules.pairs_below(self.similarity_, self.mean_similarity_, n)
            for n in (self.n_pairs, self.n_validation))
        self._rng = random.Random(self.seed)
        # Drawn for every usable token: a sample of them gets the same places as all.
        at = rules.random_places(self._words(self.pairs_), len(self.usable_), self.insertions,
                                 self._rng)
        self._places = dict(zip(self.usable_, at))

    def _sampled(self, sentences: list[Any]) -> pd.DataFrame:
        pairs = [(str(one[0]), str(one[1])) for one in sentences if not isinstance(one, str)]
        texts = list(dict.fromkeys([t for pair in pairs for t in pair] if pairs else sentences))
        vectors = _unit(self.encoder_.encode(texts))
        at = {text: i for i, text in enumerate(texts)}
        rows = np.array([(at[a], at[b]) for a, b in pairs]) if pairs else rules.uniform_pairs(
            vectors @ vectors.T, self.n_candidate_pairs)
        return pd.DataFrame({
            "first": [texts[a] for a, _ in rows], "second": [texts[b] for _, b in rows],
            "similarity": (vectors[rows[:, 0]] * vectors[rows[:, 1]]).sum(1)})

    def _sources(self, pairs: np.ndarray) -> np.ndarray:
        return _unit(self.encoder_.encode([self.sampled_[i][0] for i in pairs]))

    def _words(self, pairs: np.ndarray) -> list[int]:
        return [len(self.sampled_[i][1].split()) for i in pairs]

    # -- step 3 ------------------------------------------------------------------------------------

    def _score(self) -> None:
        table = self._scores("screen" if self.screen else "scores", self.order_, 32, self._fast)
        table["screened"], table["refined"] = table["score"], not self.screen
        self.missed_ = None
        if self.screen:
            table = self._refined(table)
        self.scores_ = table
        self.threshold_ = float(np.percentile(table["score"], 100 * (1 - float(self.share))))
        best: Any = table["score"][table["score"] >= self.threshold_]
        self.candidates_ = [int(i) for i in best.sort_values(ascending=False, kind="stable").index]

    def _scores(
        self, name: str, tokens: Sequence[int], size: int, encoder: SentenceEncoder
    ) -> pd.DataFrame:
        parts = _parts(tokens, size)
        stage = self._kept.stage(
            name, pairs=[self.sampled_[i] for i in self.pairs_], insertions=int(self.insertions),
            seed=int(self.seed), encoder=encoder.settings(),
            tokens=content_key(list(tokens)) if name in ("refine", "audit") else self._which())
        if self.tokens == "done" and name in ("screen", "scores"):
            parts = self._kept.done(stage, parts)
            self.order_ = [i for part in parts for i in part]
            if not parts:
                raise PromptError("no token is done yet in that folder; run the detector first.")
        return self._kept.shards(stage, parts, lambda part: self._scored(
            encoder, part)).set_index("token")

    def _refined(self, table: pd.DataFrame) -> pd.DataFrame:
        ranked = np.array(table.sort_values("screened", ascending=False, kind="stable").index)
        n = max(1, int(np.ceil(float(self.refine) * len(ranked))))
        rng = np.random.default_rng([int(self.seed), 1])
        rest = rng.permutation(ranked[n:])[: int(np.ceil(float(self.audit) * len(ranked)))]
        exact: Any = pd.concat([self._scores(name, [int(i) for i in ids], 16, self.encoder_)
                           for name, ids in (("refine", ranked[:n]), ("audit", rest))
                           if len(ids)])["score"]
        table = table.copy()
        table.loc[exact.index, "score"] = exact
        table.loc[exact.index, "refined"] = True
        if len(rest):
            bar = float(np.percentile(table["score"], 100 * (1 - float(self.share))))
            missed = rate(int((exact[rest] >= bar).sum()), len(rest))
            error = (exact - table.loc[exact.index, "screened"]).abs()
            self.missed_ = {"audited": len(rest), "rejected": len(ranked) - n, "share": missed.value,
                            "interval": missed.interval, "error": float(error.mean())}
        return table

    def _which(self) -> Any:
        return "all" if self.tokens is None or self.tokens == "done" else _plain(self.tokens)

    def _scored(self, encoder: SentenceEncoder, tokens: Sequence[int]) -> pd.DataFrame:
        """The score of each token, and how often it stays itself."""
        n, count = int(self.insertions), len(self.pairs_)
        base = [self.sampled_[i][1] for i in self.pairs_]
        texts = [text for i in tokens for text in (
            self.usable_[i], *(v for sentence, places in zip(base, self._places[i])
                               for v in rules.variants(self.usable_[i], sentence, places)))]
        ids = encoder.ids(texts)
        vectors = _unit(encoder.embed(ids)).reshape(len(tokens), 1 + count * 3 * n, -1)
        source = self._sources(self.pairs_)
        alone = 1 - vectors[:, 0] @ source.T
        after = 1 - np.einsum("tpsd,pd->tps", vectors[:, 1:].reshape(
            len(tokens), count, 3 * n, -1), source, optimize=True)
        start = np.broadcast_to((1 - self.similarity_[self.pairs_])[None, :, None, None],
                                (len(tokens), count, 3, 1))
        series = np.concatenate([start, after.reshape(len(tokens), count, 3, n)], -1)
        score = rules.sticky_score(series, np.broadcast_to(alone[:, :, None], series.shape[:3]))
        before = [[one.count(i) for one in encoder.ids(base)] for i in tokens]
        width = 1 + count * 3 * n
        intact = [np.mean([ids[k * width + 1 + j].count(i) - before[k][j // (3 * n)] == j % n + 1
                           for j in range(width - 1)]) for k, i in enumerate(tokens)]
        return pd.DataFrame({
            "token": list(tokens), "text": [self.usable_[i] for i in tokens],
            "score": (score * rules.SCORE_WEIGHTS).sum(-1).mean(-1), "intact": intact,
            **{place: score[:, :, k].mean(1) for k, place in enumerate(rules.PLACES)}})

    # -- steps 4 and 5 -----------------------------------------------------------------------------

    def _validate(self) -> "StickyTokenDetector":
        words = self._words(self.validation_pairs_)
        at = dict(zip(self.candidates_, rules.random_places(
            words, len(self.candidates_), self.insertions, self._rng)))
        self.pull_rate_ = self._rates("validation", self.candidates_, at, self._fast)
        rates = self.pull_rate_.to_numpy()
        low, high = np.percentile(rates, [25, 75])
        self.cutoff_ = float(high + float(self.whisker) * (high - low))
        self.sticky_ids_ = [int(i) for i in self.pull_rate_.index[rules.upper_tail(
            rates, self.whisker)]]
        self.null_pull_rate_, self.null_sticky_ids_, self.agreement_ = None, None, None
        rng = np.random.default_rng([int(self.seed), 2])
        if self.null:
            rest = [i for i in self.order_ if i not in at]
            drawn = [int(i) for i in rng.permutation(rest)[: len(self.candidates_)]]
            places = dict(zip(drawn, rules.random_places(
                words, len(drawn), self.insertions, random.Random(int(self.seed) + 1))))
            if drawn:
                found = self._rates("null", drawn, places, self._fast)
                self.null_pull_rate_ = found
                self.null_sticky_ids_ = [int(i) for i in found.index[rules.upper_tail(
                    found.to_numpy(), self.whisker)]]
        if self.screen and self.check:
            few = [int(i) for i in rng.permutation(self.candidates_)[: int(self.check)]]
            exact = self._rates("check", few, at, self.encoder_)
            gap = (exact - self.pull_rate_[few]).abs()
            self.agreement_ = {"tokens": len(few), "largest": float(gap.max()),
                               "mean": float(gap.mean())}
        return self

    def _rates(self, name: str, tokens: list[int], places: Any, encoder: SentenceEncoder) -> pd.Series:
        stage = self._kept.stage(
            name, pairs=[self.sampled_[i] for i in self.validation_pairs_], tokens=content_key(tokens),
            places=content_key([places[i].tolist() for i in tokens]), encoder=encoder.settings())
        done = self._kept.shards(stage, _parts(tokens, 2), lambda part: self._pulled(
            encoder, part, places, self.validation_pairs_))
        before = 1 - self.similarity_[self.validation_pairs_]
        wide = done[list(rules.PLACES)].to_numpy().reshape(-1, len(before), 3)
        return pd.Series(rules.pull_rate(wide, before), index=done["token"].iloc[:: len(before)])

    def _pulled(
        self, encoder: SentenceEncoder, tokens: Sequence[int], places: Any, pairs: np.ndarray,
        copies: Optional[Sequence[int]] = None,
    ) -> pd.DataFrame:
        """The mean distance over the numbers of copies, per token, pair and place."""
        source, n = self._sources(pairs), int(self.insertions)
        steps = [k - 1 + place * n for place in range(3) for k in copies or range(1, n + 1)]
        texts = [made[k] for i in tokens for p, where in zip(pairs, places[i])
                 for made in [rules.variants(self.usable_[i], self.sampled_[p][1], where)]
                 for k in steps]
        vectors = _unit(encoder.encode(texts)).reshape(
            len(tokens), len(pairs), 3, len(steps) // 3, source.shape[1])
        distance = 1 - np.einsum("tpskd,pd->tpsk", vectors, source, optimize=True).mean(-1)
        return pd.DataFrame({"token": np.repeat(np.asarray(tokens), len(pairs)),
                             "pair": np.tile(pairs, len(tokens)), **{
            place: distance[..., k].reshape(-1) for k, place in enumerate(rules.PLACES)}})

    # -- what the procedure leaves out -------------------------------------------------------------

    def effects(
        self, tokens: Sequence[int], n_pairs: int = 25, *, copies: Optional[Sequence[int]] = None,
        exact: bool = True,
    ) -> pd.DataFrame:
        """What tokens do to pairs on both sides of the mean: do they pull together, or to the mean?

        Places are drawn per token, so that a row does not depend on which others are asked for.

        Args:
            n_pairs: on either side. copies: numbers of insertions; 1 to `insertions` for None.
            exact: as the model is, or as it is screened.

        Returns a row per token: `rate`, the pull rate on the pairs below the mean; `down`, the share
        of pairs above it that move apart; `variance`, that of the similarity over all these pairs
        after the insertions relative to before; and `gap`, the same for the mean distance to the
        model's mean similarity.
        """
        check_is_fitted(self, "similarity_")
        mean, high = self.mean_similarity_, float(self.similarity_.max())
        lower = rules.pairs_below(self.similarity_, mean, n_pairs)
        above = np.flatnonzero(self.similarity_ > mean)
        if not len(above):
            raise PromptError(f"no pair is more similar than the model's mean of {mean:.3f}; give "
                              "sentences some of which are alike.")
        # Two copies of one sentence cannot come closer: the upper end mirrors the lower one.
        targets = np.linspace(mean + 0.2 * (high - mean), high, n_pairs)
        upper = above[np.abs(self.similarity_[above][None] - targets[:, None]).argmin(1)]
        pairs = np.concatenate([lower, upper])
        before = self.similarity_[pairs]
        places = {i: rules.random_places(self._words(pairs), 1, self.insertions,
                                         random.Random(f"{self.seed}-{i}"))[0] for i in tokens}
        encoder, split, rows = self.encoder_ if exact else self._fast, len(lower), []
        for part in _parts(tokens, 16):
            made = self._pulled(encoder, part, places, pairs, copies)
            wide = made[list(rules.PLACES)].to_numpy().reshape(len(part), len(pairs), 3)
            for i, distance in zip(part, wide):
                after = 1 - (distance * rules.PULL_WEIGHTS).sum(1)
                rows.append({
                    "token": i, "text": self.usable_[i],
                    "rate": float(rules.pull_rate(distance[:split], 1 - before[:split])),
                    "down": float((after[split:] < before[split:]).mean()),
                    "variance": float(after.var() / before.var()),
                    "gap": float(np.abs(after - mean).mean() / np.abs(before - mean).mean())})
        return pd.DataFrame(rows).set_index("token")


def _unit(vectors: np.ndarray) -> np.ndarray:
    wide = np.asarray(vectors, dtype=np.float64)
    return wide / np.linalg.norm(wide, axis=-1, keepdims=True)


def _plain(value: Any) -> Any:
    return np.asarray(value).tolist() if value is not None and not isinstance(value, str) else value


def _parts(tokens: Sequence[int], size: int) -> list[list[int]]:
    return [[int(i) for i in tokens[k : k + size]] for k in range(0, len(tokens), size)]


def main(arguments: Optional[Sequence[str]] = None) -> None:
    """`python -m probes.sticky_tokens MODEL [--folder FOLDER] [--pairs FILE.csv] ...`."""
    import argparse

    import interp
    from probes.short_sentences import short_sentences

    parser = argparse.ArgumentParser(
        prog="python -m probes.sticky_tokens",
        description="Detect the sticky tokens of a sentence-embedding model. A run that was stopped "
        "goes on in its folder; the experiment sticky_tokens shows what is in the default one.")
    parser.add_argument("model", help="bundled name, folder, or hub id")
    parser.add_argument("--folder", type=Path, help="default: figures/cache/sticky_tokens/MODEL")
    parser.add_argument("--sentences", type=Path, help="a text file, one sentence per line")
    parser.add_argument("--pairs", type=Path, help="a CSV file with columns sentence1, sentence2")
    parser.add_argument("--exact", action="store_true", help="no screening in bfloat16")
    parser.add_argument("--tokens", type=int, help="as many random tokens instead of all")
    parser.add_argument("--seed", type=int, default=42)
    given = parser.parse_args(arguments)
    model = interp.open_model(given.model)
    texts: Any = short_sentences(1000)
    if given.pairs is not None:
        table = pd.read_csv(given.pairs)
        texts = list(zip(table["sentence1"], table["sentence2"]))
    elif given.sentences is not None:
        texts = [line for line in given.sentences.read_text().splitlines() if line.strip()]
    folder = given.folder or Path("figures") / "cache" / "sticky_tokens" / model.name
    found = StickyTokenDetector(
        screen=None if given.exact else "bfloat16", tokens=given.tokens, seed=given.seed,
        folder=folder, progress=True).fit(model, texts)
    sticky_found.save(found, folder)
    print(f"{len(found.usable_)} usable tokens, mean similarity {found.mean_similarity_:.4f}; "
          f"{len(found.candidates_)} reach {found.threshold_:.3f}, {len(found.sticky_ids_)} are sticky: "
          + " ".join(found.usable_[i] for i in found.sticky_ids_))


if __name__ == "__main__":
    main()
