"""The published rules against naive ones, a planted sticky token, and runs that were stopped."""

import copy
import json
from itertools import combinations
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

import interp
from interp.core import PromptError
from interp.models.model import Model
from probes import sticky_found
from probes import token_insertion as rules
from probes.sentence_encoder import SentenceEncoder
from probes.sticky_tokens import StickyTokenDetector

REFERENCE = Path(__file__).parents[3] / "shared" / "reference" / "sticky_tokens"
SIGNS = [chr(0x4E00 + i) for i in range(90)]
GLUE = 50


def signs():
    """Every sign is a token, with or without spaces between."""
    made = Tokenizer(models.WordLevel({"?": 0, **{s: i + 1 for i, s in enumerate(SIGNS)}}, "?"))
    made.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Whitespace(), pre_tokenizers.Split(Regex("."), "isolated")])
    made.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=made, unk_token="?")


@pytest.fixture(scope="module")
def bag(tiny):
    """Encoders without attention and MLP: a sentence is the sum of its words, all of one size."""
    def made(sticky=True):
        hf = copy.deepcopy(tiny("bert").base_model)
        generator = torch.Generator().manual_seed(0)
        common = torch.randn(48, generator=generator)
        with torch.no_grad():
            for name, parameter in hf.named_parameters():
                if "dense" in name or "position" in name or "token_type" in name:
                    parameter.zero_()
            words = hf.embeddings.word_embeddings.weight
            words.copy_(0.2 * common + torch.randn(words.shape, generator=generator))
            if sticky:
                words[GLUE] = common
        model = Model(hf, "bag", signs())
        # Without attention no position feels a later one, and it would count as a decoder.
        model.kind = "encoder"
        return model

    return made


def sentences(n=60):
    rng = np.random.default_rng(1)
    return [" ".join(rng.choice(SIGNS, int(rng.integers(3, 8)))) for _ in range(n)]


def detector(**more):
    return StickyTokenDetector(**{"n_pairs": 3, "n_validation": 12, "insertions": 4, "share": 0.1,
                                  "n_candidate_pairs": 150, **more})


# -- rules ------------------------------------------------------------------------------------------


def test_the_mean_similarity_is_that_of_all_pairs():
    vectors = np.random.default_rng(0).standard_normal((30, 7))
    unit = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
    assert rules.mean_similarity(vectors) == pytest.approx((unit @ unit.T).mean(), abs=1e-12)


def test_pairs_are_chosen_as_published():
    rng = np.random.default_rng(2)
    table = rng.random((14, 14))
    pairs = list(combinations(range(14), 2))
    values = np.array([table[p] for p in pairs])
    taken = []
    for target in np.linspace(values.min(), values.max(), 20):
        taken.append(next(int(i) for i in np.argsort(np.abs(values - target), kind="stable")
                          if i not in taken))
    chosen = rules.uniform_pairs(table, 20)
    assert sorted(map(tuple, chosen.tolist())) == sorted(pairs[i] for i in taken)
    assert (np.diff([table[tuple(p)] for p in chosen]) > 0).all()
    mean = float(np.median(values))
    targets = values.min() + np.arange(6) * (0.8 * (mean - values.min())) / 5
    below = np.where(values < mean, values, np.inf)
    assert rules.pairs_below(values, mean, 6).tolist() == [
        int(np.abs(below - target).argmin()) for target in targets]
    with pytest.raises(ValueError, match="only 0 pairs"):
        rules.pairs_below(values, 0.0, 3)


def test_the_score_counts_falls_and_rises():
    rng = np.random.default_rng(3)
    series, alone = rng.random((4, 2, 9)), rng.random((4, 2))
    for where in np.ndindex(4, 2):
        change = np.diff(series[where])
        falls, rises = -change[change < 0], change[change > 0]
        made = (falls.sum() + 0.1 * len(falls) + 0.1 * alone[where]) / (
            rises.sum() + 0.05 * len(rises) + 0.01)
        assert rules.sticky_score(series, alone)[where] == pytest.approx(made)
    # Adding a constant to all distances changes nothing.
    assert np.allclose(rules.sticky_score(series + 3, alone), rules.sticky_score(series, alone))


def test_pull_rates_weigh_the_places_and_the_rule_picks_the_upper_tail():
    after = np.ones((3, 5, 3))
    after[1, :, 0], after[2] = 0, 0
    assert np.allclose(rules.pull_rate(after, np.full(5, 0.5)), [0, 4 / 11, 1])
    uniform = np.arange(100.0)
    assert not rules.upper_tail(uniform).any() and rules.upper_tail(uniform, 0.3).sum() == 10
    # Of normal values, which hold nothing special, some are always picked.
    assert 0.02 < rules.upper_tail(np.random.default_rng(0).standard_normal(4000)).mean() < 0.08


def test_tokens_behind_a_space_are_usable_too():
    vocabulary = {"<unk>": 0, "«": 1, "▁«": 2, "▁test": 3, "test": 4, "▁": 5, "▁so": 6, "so": 7, "s": 8,
                  "o": 9}
    made = Tokenizer(models.BPE(vocabulary, [], unk_token="<unk>", ignore_merges=True))
    made.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Metaspace(), pre_tokenizers.Split(Regex("▁?«"), "isolated")])
    made.decoder = decoders.Metaspace()
    usable = rules.usable_tokens(PreTrainedTokenizerFast(tokenizer_object=made, unk_token="<unk>"))
    assert usable[6] == " so" and usable[7] == "so" and usable[4] == "test"
    assert 5 not in usable and len(usable) == 9


# -- sentences --------------------------------------------------------------------------------------


@pytest.mark.parametrize("pooling", ("mean", "cls", "last", "max"))
def test_sentences_of_all_lengths_are_embedded_as_alone(tiny, pooling):
    model = Model(tiny("bert"), "tiny", signs())
    encoder = SentenceEncoder(model, pooling=pooling, normalize=False, budget=12)
    ids = [[5, 6, 7], [8, 9], [5, 6, 7], [1, 2, 3, 4], [7, 6, 5]]
    made = encoder.embed(ids)
    for row, one in zip(made, ids):
        with torch.inference_mode():
            states = model.hf.base_model(input_ids=torch.tensor([one])).last_hidden_state[0]
        pooled = {"mean": states.mean(0), "cls": states[0], "last": states[-1],
                  "max": states.amax(0)}[pooling]
        assert np.allclose(row, pooled.numpy(), atol=1e-5)
    unit = SentenceEncoder(model, pooling=pooling).embed(ids)
    assert np.allclose(np.linalg.norm(unit, axis=1), 1, atol=1e-5)
    with pytest.raises(PromptError, match="no tokens"):
        encoder.embed([[], [1]])


def test_the_models_own_files_decide(tiny, tmp_path):
    tiny("bert").base_model.save_pretrained(tmp_path)
    signs().save_pretrained(tmp_path)
    encoder = SentenceEncoder(interp.open_model(tmp_path))
    assert (encoder.pooling, encoder.normalize, encoder.configured) == ("mean", True, False)
    (tmp_path / "1_Pooling").mkdir()
    (tmp_path / "1_Pooling" / "config.json").write_text(json.dumps(
        {"pooling_mode_cls_token": True, "pooling_mode_mean_tokens": False}))
    (tmp_path / "modules.json").write_text(json.dumps([{"type": "a.Pooling"}]))
    (tmp_path / "sentence_bert_config.json").write_text(json.dumps({"max_seq_length": 4}))
    encoder = SentenceEncoder(interp.open_model(tmp_path))
    assert (encoder.pooling, encoder.normalize, encoder.configured) == ("cls", False, True)
    assert encoder.ids([" ".join(SIGNS[:9])]) == [[1, 2, 3, 4]]
    assert SentenceEncoder(Model(tiny("llama"), "tiny", signs())).pooling == "last"
    with pytest.raises(PromptError, match="no tokenizer"):
        SentenceEncoder(Model(tiny("llama"), "mute"))


# -- the procedure ----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def whole(bag):
    return detector(check=0).fit(bag(), sentences())


def test_a_planted_sticky_token_is_found_and_not_in_its_twin(bag, whole):
    assert whole.candidates_[0] == GLUE and whole.pull_rate_[GLUE] == 1.0
    assert len(whole.candidates_) == 10 and whole.pull_rate_.mean() < 0.9
    rates = whole.pull_rate_
    low, high = np.percentile(rates, [25, 75])
    assert whole.sticky_ids_ == list(rates.index[rates > high + 0.7 * (high - low)])
    assert GLUE not in whole.null_pull_rate_.index and len(whole.null_pull_rate_) == 10
    assert whole.scores_["intact"].min() == 1.0 and len(whole.usable_) == len(SIGNS) + 1
    twin = detector(null=False).fit(bag(sticky=False), sentences())
    assert twin.scores_["score"][GLUE] < whole.scores_["score"][GLUE] - 10
    assert GLUE not in twin.candidates_
    both = whole.effects([GLUE, 7], n_pairs=8)
    assert both.loc[GLUE, "rate"] == 1 > both.loc[7, "rate"]
    # It stands for what all have in common: pairs come closer, and closer to each other.
    assert both.loc[GLUE, "variance"] < both.loc[7, "variance"] < 1
    alone = whole.effects([7], n_pairs=8).loc[7].drop("text").astype(float)
    assert np.allclose(alone, both.loc[7].drop("text").astype(float), atol=1e-6)


def test_a_sample_has_the_scores_of_the_whole(bag, whole):
    some = detector(tokens=12, null=False).fit(bag(), sentences(), validate=False)
    assert some.order_ == whole.order_[:12]
    assert np.allclose(some.scores_["score"], whole.scores_["score"][some.order_], atol=1e-6)
    few = detector(tokens=[GLUE, 3], null=False).fit(bag(), sentences(), validate=False)
    assert np.allclose(few.scores_["score"], whole.scores_["score"][[GLUE, 3]], atol=1e-6)
    with pytest.raises(PromptError, match="token 95 is not usable"):
        detector(tokens=[95]).fit(bag(), sentences())


def test_a_run_that_was_stopped_goes_on_to_the_same_result(bag, whole, tmp_path, monkeypatch):
    seen, scored = [], StickyTokenDetector._scored

    def dying(self, encoder, tokens):
        if len(seen) == 2:
            raise KeyboardInterrupt
        seen.append(list(tokens))
        return scored(self, encoder, tokens)

    monkeypatch.setattr(StickyTokenDetector, "_scored", dying)
    with pytest.raises(KeyboardInterrupt):
        detector(folder=tmp_path).fit(bag(), sentences())
    so_far = sticky_found.scored_so_far(tmp_path)
    assert list(so_far.index) == whole.order_[:64]
    part = detector(folder=tmp_path, tokens="done").fit(bag(), sentences(), validate=False)
    assert part.order_ == whole.order_[:64]
    monkeypatch.setattr(StickyTokenDetector, "_scored", lambda self, encoder, tokens: seen.append(
        list(tokens)) or scored(self, encoder, tokens))
    again = detector(folder=tmp_path).fit(bag(), sentences())
    assert sorted(sum(seen, [])) == sorted(whole.order_) and not list(tmp_path.rglob("*.tmp"))
    pd.testing.assert_frame_equal(again.scores_, whole.scores_)
    pd.testing.assert_series_equal(again.pull_rate_, whole.pull_rate_)
    assert again.sticky_ids_ == whole.sticky_ids_
    sticky_found.save(again, tmp_path)
    found = sticky_found.load(tmp_path)
    assert found["sticky_ids_"] == whole.sticky_ids_ and found["usable_"] == len(SIGNS) + 1
    pd.testing.assert_series_equal(found["null_pull_rate_"], whole.null_pull_rate_, check_names=False)
    assert sticky_found.load(tmp_path / "nowhere") is None


def test_other_settings_never_meet_the_same_tables(bag, whole, tmp_path):
    detector(folder=tmp_path, tokens=5).fit(bag(), sentences(), validate=False)
    other = detector(folder=tmp_path, tokens=5, insertions=3).fit(bag(), sentences(), validate=False)
    assert not np.allclose(other.scores_["score"], whole.scores_["score"][other.order_])
    assert len(list(tmp_path.glob("scores-*"))) == 2


def test_screening_finds_what_the_exact_run_finds(bag, whole):
    found = detector(screen="bfloat16", refine=0.3, audit=0.2, check=4).fit(bag(), sentences())
    assert found.candidates_ == whole.candidates_ and found.scores_["refined"].sum() == 28 + 19
    kept = found.scores_[found.scores_["refined"]]
    assert np.allclose(kept["score"], whole.scores_["score"][kept.index], atol=1e-6)
    assert (kept["screened"] != kept["score"]).any()
    assert found.missed_["audited"] == 19 and found.missed_["rejected"] == 63
    assert found.missed_["share"] <= found.missed_["interval"][1] < 0.5
    assert found.agreement_["tokens"] == 4 and found.agreement_["largest"] < 0.2


def test_overlap_of_lists():
    assert sticky_found.jaccard([[1, 2], [2, 1]]) == 1 and sticky_found.jaccard([[1], [2]]) == 0
    assert np.isnan(sticky_found.jaccard([[1, 2]]))


def test_too_little_text_is_said(bag):
    with pytest.raises(PromptError, match="three different"):
        detector().fit(bag(), ["a", "b", "a"])


@pytest.mark.skipif(not (REFERENCE / "pairs.csv").exists(),
                    reason="the pairs of the paper's repository are not at hand")
def test_released_scores_are_reproduced():
    pairs = pd.read_csv(REFERENCE / "pairs.csv")
    released = {0: 57.162431, 11044: 69.082264, 28626: 49.50586}
    found = StickyTokenDetector(tokens=list(released), mean_tokens=2000).fit(
        interp.open_model("all-minilm-l6-v2"), list(zip(pairs["sentence1"], pairs["sentence2"])),
        validate=False)
    assert len(found.usable_) == 23699 and abs(found.mean_similarity_ - 0.1998) < 0.005
    assert np.allclose(found.scores_["score"], list(released.values()), atol=1e-4)
