"""Peaks on the reader, on models that solve nothing, and the parts that need words of reflection."""

import copy
import string

import numpy as np
import pytest
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

import interp
from experiments import _math_problems, _thinking_tokens, mi_peaks
from experiments._output import execute
from experiments._paper import Settings, load
from experiments._passages import PASSAGES
from interp.core import Prompt
from interp.models.model import Model

CLAIMS = mi_peaks.Peaks.claims


def outcome(model, out, *figures):
    return execute(load("mi_peaks"), Settings.of(
        model=[str(model)], out=out, tiny=True, figure=list(figures) or None))


def test_on_the_reader_every_claim_has_a_verdict_or_its_reason(tmp_path):
    found = outcome("reader", tmp_path)
    claims = {c.sentence: c for c in found.claims}
    assert set(claims) == {sentence for sentence, _ in CLAIMS.values()}
    drawn = {f.name for f in found.figures if f.files or "peak" in f.reason}
    assert drawn == set(mi_peaks.PAPER.figures)
    for key in ("enriched", "suppressed"):
        assert claims[CLAIMS[key][0]].reason == "the vocabulary of reader has no words of reflection"
    for key in ("artifact", "sparse", "own", "same", "items", "answer"):
        assert claims[CLAIMS[key][0]].verdict != "not testable", key
    assert claims[CLAIMS["answer"][0]].control == "answers permuted over problems"


@pytest.mark.parametrize("architecture", ["gpt2", "gemma2"])
def test_models_without_words_are_told_so(tiny, letters, tmp_path, architecture):
    tiny(architecture).save_pretrained(tmp_path / architecture)
    letters.save_pretrained(tmp_path / architecture)
    found = outcome(tmp_path / architecture, tmp_path / "out", "items")
    assert {c.verdict for c in found.claims} == {"not testable"}
    assert sum("neither" in c.reason for c in found.claims) == len(CLAIMS) - 2


@pytest.fixture(scope="module")
def words(tiny, tmp_path_factory):
    """A random model whose tokenizer knows words of English."""
    return words_model(tiny, tmp_path_factory.mktemp("random") / "words")


def words_model(tiny, folder):
    hf = copy.deepcopy(tiny("llama"))
    text = " ".join(half for pair in PASSAGES for half in pair)
    text += " ".join(q + " " + s for q, s, _ in _math_problems.PROBLEMS)
    known = ["<unk>", "<s>", "</s>", "wait", "so", "then", "the", "history", "of"]
    for letter in string.punctuation:
        text = text.replace(letter, f" {letter} ")
    for word in text.split():
        if word not in known:
            known.append(word)
    hf.resize_token_embeddings(len(known), mean_resizing=False)
    made = Tokenizer(models.WordLevel({word: i for i, word in enumerate(known)}, "<unk>"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=made, bos_token="<s>", eos_token="</s>",
                                        unk_token="<unk>")
    hf.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def test_a_model_that_solves_nothing_reasons_about_nothing(words, tmp_path):
    found = outcome(words, tmp_path / "out", "items")
    reasons = [c.reason for c in found.claims if "solves 0 of 12 problems" in c.reason]
    assert len(reasons) == len(CLAIMS) - 3
    (artifact,) = [c for c in found.claims if c.sentence == CLAIMS["artifact"][0]]
    assert artifact.verdict != "not testable"


def test_suppressed_tokens_are_never_written_and_the_rest_is_greedy(tiny, letters):
    model = Model(tiny("llama"), "llama", tokenizer=letters)
    prompts = [Prompt.from_tokens([1, 5, 6, 7]), Prompt.from_tokens([1, 9, 8, 7])]
    free = _thinking_tokens.without(model, prompts, [], 8)
    assert free == model.generate(prompts, 8)
    banned = sorted({token for row in free for token in row})
    other = _thinking_tokens.without(model, prompts, banned, 8)
    assert not set(banned) & {token for row in other for token in row}


def test_enrichment_is_found_where_it_was_put_and_not_in_its_twin():
    rng = np.random.default_rng(0)
    traces = [rng.integers(0, 8, 60).tolist() for _ in range(12)]
    planted = [np.array([rng.random() < (0.5 if t == 3 else 0.1) for t in trace]) for trace in traces]
    even = [rng.random(60) < 0.15 for _ in traces]
    flat = np.concatenate(traces)
    others = _thinking_tokens.of_equal_frequency([3], flat, rng, avoid=[4])
    assert len(others) == 1 and others[0] not in (3, 4)
    count = np.bincount(flat)
    assert abs(count[others[0]] - count[3]) == min(abs(count[k] - count[3]) for k in range(8)
                                                   if k not in (3, 4))
    found, table = _thinking_tokens.enrichment(traces, planted, [3], others, 500)
    assert found.interval[0] > 0 and table["Fisher's p"] < 0.001
    a, c = table["peaks among chosen"] + 0.5, table["peaks among others"] + 0.5
    by_hand = np.log(a * (table["others"] + 1 - c) / (table["chosen"] + 1 - a) / c)
    assert found.value == pytest.approx(by_hand)
    twin, table = _thinking_tokens.enrichment(traces, even, [3], others, 500)
    assert twin.interval[0] < 0 < twin.interval[1] and table["Fisher's p"] > 0.05


def test_the_problems_are_solved_by_their_solutions():
    assert len(_math_problems.PROBLEMS) == 12
    for question, solution, answer in _math_problems.PROBLEMS:
        assert _math_problems.gives(solution, answer) and not _math_problems.gives(question, answer)
    assert not _math_problems.gives("It is 25.5", 25) and _math_problems.gives("So $1,290$", 1290)


def test_records_alone_are_the_solutions_of_the_reader():
    reader = interp.open_model("reader")
    made = mi_peaks.tasks(reader, Settings.of(tiny=True))
    for prompt, solution, answer in zip(made.prompts, made.solutions, made.answers):
        assert solution.ids[2] == prompt.ids[-1] and list(solution.ids[3:6]) == answer
    assert made.solved.mean() > 0.5


def test_words_of_reflection_are_counted_and_suppressed_where_a_model_writes_them(
    words, tmp_path, monkeypatch
):
    """A random model's commonest word stands for them; all problems but one count as solved."""
    monkeypatch.setattr(_math_problems, "PROBLEMS", _math_problems.PROBLEMS[:7])
    monkeypatch.setattr(mi_peaks, "_steps", lambda settings: 10)
    model = interp.open_model(str(words))
    made = mi_peaks.tasks(model, Settings.of(tiny=True))
    common = np.bincount(np.concatenate(made.traces)).argmax()
    monkeypatch.setattr(_thinking_tokens, "THINKING", (model.tokenizer.convert_ids_to_tokens(
        [int(common)])[0].lower(),))
    monkeypatch.setattr(_math_problems, "gives", lambda text, answer: answer != 25)
    found = {c.sentence: c for c in outcome(words, tmp_path / "out", "items").claims}
    enriched, suppressed = (found[CLAIMS[key][0]] for key in ("enriched", "suppressed"))
    assert enriched.control == "other tokens of equal frequency"
    assert enriched.details["chosen"] >= 10
    assert suppressed.causal and "draws" in suppressed.control
    # The answers did not depend on what was written.
    assert suppressed.measured == 0 and suppressed.verdict == "inconclusive"
