"""truthfulness, hidden_knowledge and linking_failures: planted truth is found, its twin is not."""

import copy
import dataclasses
import re

import numpy as np
import pytest

from experiments import _fact_questions as facts
from experiments import hidden_knowledge, linking_failures, truthfulness
from experiments._output import execute
from experiments._paper import Settings, load
from interp.core import Prompt
from interp.models.model import Model

MODULES = {"truthfulness": truthfulness.Truthfulness,
           "hidden_knowledge": hidden_knowledge.HiddenKnowledge,
           "linking_failures": linking_failures.LinkingFailures}


def run(name, folder, model=None, figure=None):
    outcome = execute(load(name), Settings.of(
        model=[str(model)] if model else None, out=folder, tiny=True, figure=figure))
    sentences = {sentence: key for key, (sentence, _) in MODULES[name].claims.items()}
    found = {sentences[claim.sentence]: claim for claim in outcome.claims}
    assert set(found) == set(MODULES[name].claims) and len(outcome.claims) == len(found)
    assert all(claim.reason or claim.interval for claim in found.values())
    assert all(f.files or f.reason for f in outcome.figures)
    return outcome, found


@pytest.fixture(autouse=True)
def shorter(monkeypatch):
    monkeypatch.setattr(facts, "LENGTHS", (560, 440))


@pytest.fixture(scope="module")
def asked():
    """Answers of the reader, asked once for all experiments: every call gets its own copy."""
    kept = {}
    original = facts.ask

    def replay(model, questions, **more):
        key = (tuple(q.prompt.digest() for q in questions.items), tuple(more["sites"]))
        if key not in kept:
            kept[key] = list(original(model, questions, **more))
        for question, one in zip(questions.items, kept[key], strict=True):
            yield dataclasses.replace(
                one, question=question, states=copy.deepcopy(one.states),
                read={tokens: dataclasses.replace(read, states=copy.deepcopy(read.states))
                      for tokens, read in one.read.items()})

    return replay


def planted(replay, strength):
    """Half of the coordinates of every answer's states say whether it is right."""
    def ask(model, questions, **more):
        for a in replay(model, questions, **more):
            for tokens, read in a.read.items():
                exact = questions.exact(model, a.question, tokens)
                right = exact is not None and questions.right(a.question, exact)
                for site in ("resid_post", "attn_out", "mlp_out"):
                    if site in read.states:
                        read.states[site][..., ::2] += strength * right
            for site, states in a.states.items():
                if site != "embed" and strength:
                    # Not in the prompt: there the answer is not known yet.
                    states[:, 1:, ::2] += strength * a.right
            yield a
    return ask


@pytest.mark.parametrize("strength", [0.0, 40.0])
def test_planted_truth_in_the_states_of_answers(asked, tmp_path, monkeypatch, strength):
    monkeypatch.setattr(facts, "ask", planted(asked, strength))
    figure = None if strength else ["heat"]
    outcome, found = run("truthfulness", tmp_path, figure=figure)
    verdicts = {key: claim.verdict for key, claim in found.items()}
    assert found["logits"].details["wrong"] >= 12 and "without exact answer" in found["logits"].details[
        "exact answers"]
    gains = ("question", "words", "logits")
    if strength:
        assert [key for key in gains if verdicts[key] != "supported"] == []
        assert found["logits"].details["AUC"] > 0.95 and found["words"].control
        # Few answers are read by the untrained twin.
        assert found["untrained"].measured > 0.1
        # It is in every layer, so that none has more of it.
        assert verdicts["middle"] != "supported" and verdicts["stack"] != "supported"
        assert verdicts["transfer"] in ("refuted", "not testable")
        chosen = found["chance"].details["accuracy"]
        assert chosen["probe"] == pytest.approx(chosen["best possible"], abs=0.1)
        assert len([f for f in outcome.figures if f.files]) == len(truthfulness.PAPER.figures)
    else:
        assert found["logits"].details["AUC"] < 0.9 and verdicts["logits"] != "supported"
        assert len(outcome.table("answers-reader")) == found["logits"].details["questions"]
    (shuffled,) = [found["stack"].details["shuffled labels"]]
    assert abs(shuffled - 0.5) < 0.3


@pytest.mark.parametrize("strength", [0.0, 40.0])
def test_planted_hidden_knowledge(asked, tmp_path, monkeypatch, strength):
    monkeypatch.setattr(facts, "ask", planted(asked, strength))
    outcome, found = run("hidden_knowledge", tmp_path, figure=None if strength else ["never"])
    verdicts = {key: claim.verdict for key, claim in found.items()}
    if strength:
        assert {verdicts[k] for k in ("gap", "fitted", "relation", "words")} == {"supported"}
        assert found["gap"].details["K"]["probe"] > 0.97
        assert abs(found["gap"].details["K"]["probe, shuffled labels"] - 0.5) < 0.3
        table = outcome.table("candidates-reader")
        mixed = table.groupby("question")["right"].agg(["sum", "count"])
        assert ((mixed["sum"] > 0) & (mixed["sum"] < mixed["count"])).all()
        assert found["rerank"].details["accuracy"]["probe, with the right one"] > 0.9
    else:
        assert verdicts["gap"] != "supported"
        assert found["gap"].details["K"]["probe"] < 0.9


@pytest.mark.parametrize("strength", [0.0, 40.0])
def test_planted_unreliability_in_pictures(tmp_path, monkeypatch, strength):
    original = linking_failures.LinkingFailures._seen

    def seen(self, one):
        given = original(self, one)
        if strength:
            given.states[3, 0, ::2] += strength * given.right
        return given

    monkeypatch.setattr(linking_failures.LinkingFailures, "_seen", seen)
    monkeypatch.setattr(linking_failures, "NOISE", (6.0,))
    _, found = run("linking_failures", tmp_path, figure=None if strength else ["layers"])
    verdicts = {key: claim.verdict for key, claim in found.items()}
    assert found["ratio"].reason.startswith("looker has no facts of its own")
    some = ("layer", "flag", "accuracy", "unseen", "selective", "words")
    if strength:
        assert [key for key in some if verdicts[key] != "supported"] == []
        assert set(found["flag"].details["cells"]) == {"layer 2, position last token"}
    else:
        assert verdicts["accuracy"] != "supported" and verdicts["selective"] != "supported"


def saved(tiny, architecture, folder, letters):
    from tests.experiments.test_any_model import saved as save

    return save(tiny, architecture, folder, letters)


@pytest.mark.parametrize("architecture, name", [
    ("qwen3", "truthfulness"), ("gemma2", "hidden_knowledge"), ("llava", "linking_failures"),
    ("qwen2_5_vl", "linking_failures"),
])
def test_a_random_model_supports_nothing(
    tiny, letters, tmp_path, monkeypatch, architecture, name
):
    few = {relation: (text, dict(list(table.items())[:4]))
           for relation, (text, table) in facts.TABLES.items()}
    monkeypatch.setattr(facts, "TABLES", few)
    monkeypatch.setattr(linking_failures, "TABLES", few)
    folder = saved(tiny, architecture, tmp_path / architecture, letters)
    _, found = run(name, tmp_path / "out", folder)
    assert "supported" not in {claim.verdict for claim in found.values()}
    strange = {claim.reason for claim in found.values()
               if not re.match(rf"[01] of |{architecture} ", claim.reason)}
    assert strange == set()


def test_a_model_of_the_wrong_kind_is_told_in_one_sentence(tiny, letters, tmp_path):
    bert = saved(tiny, "bert", tmp_path / "bert", letters)
    for name, reason in (("hidden_knowledge", "bert is an encoder: it answers no questions"),
                         ("linking_failures", "bert is a text model: it has no image tokens")):
        _, found = run(name, tmp_path / name, bert)
        assert {claim.reason for claim in found.values()} == {reason}
    _, found = run("truthfulness", tmp_path / "backcopy", "backcopy-1l")
    assert {claim.reason for claim in found.values()} == {
        "the language of backcopy-1l has no facts to ask for"}


def test_english_questions_are_of_many_kinds(tiny, letters):
    model = Model(tiny("llama"), "llama", letters)
    made = facts.questions(model, 80, np.random.default_rng(0))
    assert len(made) >= 60 and len({q.relation for q in made.items}) >= 5
    assert all(q.gold.lower() not in q.text.lower().split() for q in made.items)
    assert len({q.text for q in made.items}) == len(made)


def test_judging_answers_in_english():
    """With a tokenizer of bytes, so that text comes back as it was."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    bytes_of = sorted(pre_tokenizers.ByteLevel.alphabet())
    raw = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(bytes_of)}, merges=[]))
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=raw)

    model = object.__new__(Model)
    model.tokenizer = tokenizer
    table = {r: tuple(f.values()) for r, (_, f) in facts.TABLES.items()}
    patterns = {r: facts.DIGITS if r in facts.NUMERIC else r"[^\W\d_][\w'.-]*" for r in table}
    asked = facts.Questions([], "", 9, {r: () if r in facts.NUMERIC else v for r, v in table.items()},
                            patterns)
    for relation, gold, said, text, right in (
        ("capital", "Oslo", " It is Oslo, of course", "Oslo", True),
        ("capital", "Oslo", " Bergen", "Bergen", False),
        ("capital", "Oslo", " nairobi", "nairobi", False), ("symbol", "Co", " CO", "CO", False),
        ("product", "1276", " = 1,276.", "1,276", True),
        ("product", "1276", " 276", "276", False), ("opposite", "cold", " ...", None, None),
    ):
        question = facts.Question(Prompt.from_tokens([1]), "", relation, "", gold, ())
        ids = tokenizer(said, add_special_tokens=False)["input_ids"]
        exact = asked.exact(model, question, ids)
        assert (exact and exact.text) == text
        if exact:
            assert tokenizer.decode(ids[exact.first : exact.last + 1]).strip() == text
            assert asked.right(question, exact) == right
    lines = tokenizer("\n Oslo\nQuestion", add_special_tokens=False)["input_ids"]
    assert tokenizer.decode(facts._line(model, lines)) == "\n Oslo\n"
