"""Needles: where they stand, what marks them, and what is refused, for several tokenizers."""

from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from interp.core import PromptError
from interp.models import prompting
from interp.organisms import reader
from interp.prompts import needle
from interp.prompts.needle import Fact

FACT = Fact("The pass phrase for the clock of Ida is amber otter mill.", "amber otter mill",
            "What is the pass phrase for the clock of Ida?")
ALL_WORDS = " ".join([needle.haystack(np.random.default_rng(9), 3000), needle.TEMPLATE,
                      *(f.sentence + f.question
                        for f in needle.facts(np.random.default_rng(9), 80))])


def trained(kind: str) -> PreTrainedTokenizerFast:
    """A tokenizer of each family, trained on the words of this module."""
    if kind == "bpe":  # bytes, a leading space belongs to the word, as in GPT-2
        raw = Tokenizer(models.BPE())
        raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        raw.decoder = decoders.ByteLevel()
        trainer = trainers.BpeTrainer(vocab_size=600,
                                      initial_alphabet=pre_tokenizers.ByteLevel.alphabet())
    elif kind in ("unigram", "glued"):  # sentencepiece, as in Llama-2 and T5
        raw = Tokenizer(models.Unigram())
        raw.pre_tokenizer = pre_tokenizers.Metaspace() if kind == "glued" else \
            pre_tokenizers.Sequence([pre_tokenizers.Metaspace(), pre_tokenizers.Punctuation()])
        raw.decoder = decoders.Metaspace()
        trainer = trainers.UnigramTrainer(vocab_size=400, unk_token="<unk>",
                                          special_tokens=["<unk>"])
    else:  # lower case pieces, as in BERT
        raw = Tokenizer(models.WordPiece(unk_token="[UNK]"))
        raw.normalizer = normalizers.BertNormalizer()
        raw.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
        raw.decoder = decoders.WordPiece()
        trainer = trainers.WordPieceTrainer(vocab_size=500, special_tokens=["[UNK]"])
    raw.train_from_iterator([ALL_WORDS], trainer)
    unknown = {"unigram": "<unk>", "glued": "<unk>", "wordpiece": "[UNK]"}.get(kind)
    return PreTrainedTokenizerFast(tokenizer_object=raw, unk_token=unknown)


class Parts(SimpleNamespace):
    """As much of a model as prompts need."""

    def prompt(self, text, chat=False, segments=None):
        return prompting.build(self, text, chat=chat, segments=segments)


@pytest.fixture(scope="module")
def families():
    return {kind: Parts(tokenizer=trained(kind), processor=None, config=None, name=f"a {kind}",
                        max_positions=2000, has_images=False)
            for kind in ("bpe", "unigram", "wordpiece", "glued")}


@pytest.fixture(scope="module")
def words():
    return Parts(tokenizer=reader.tokenizer(), processor=None, config=None, name="words",
                 max_positions=1024, has_images=False)


def text_of(model, prompt, name):
    return model.tokenizer.decode([prompt.ids[p] for p in prompt.segment(name)]).strip()


@pytest.mark.parametrize("kind", ["bpe", "unigram", "wordpiece"])
@pytest.mark.parametrize("depth", [0.0, 0.4, 1.0])
def test_the_marked_tokens_are_the_needle_for_every_kind_of_tokenizer(families, kind, depth):
    model = families[kind]
    made = needle.build(model, FACT, 300, depth, rng=np.random.default_rng(3))
    said = text_of(model, made.prompt, "needle_value").casefold()
    assert said == FACT.value
    assert made.answer == tuple(made.prompt.ids[p] for p in made.prompt.positions("needle_value"))
    assert text_of(model, made.prompt, "needle").casefold().replace(" .", ".") \
        == FACT.sentence.casefold()
    assert text_of(model, made.prompt, "question").casefold().replace(" ?", "?") \
        == FACT.question.casefold()
    inside = set(made.prompt.positions("needle_value")) - set(made.prompt.positions("needle"))
    assert not inside
    assert made.prompt.segment("needle").stop <= made.prompt.segment("question").start
    assert abs(needle.depth_of(made.prompt) - depth) < 0.1
    # As long as asked, up to one word.
    assert 300 - 16 < len(made.prompt) <= 300


def test_the_value_is_the_one_of_the_fact_not_an_equal_text_before_it(families):
    model = families["bpe"]
    text = f"They said {FACT.value} twice. " + needle.haystack(np.random.default_rng(0), 300)
    made = needle.build(model, FACT, 250, 0.9, text=text)
    needle_, value = made.prompt.segment("needle"), made.prompt.segment("needle_value")
    assert set(value) <= set(needle_) and value.start > 50
    # The control: the equal text at the beginning is really there.
    assert FACT.value in made.prompt.text[: made.prompt.text.index(FACT.sentence)]


@settings(deadline=None, max_examples=20)
@given(length=st.integers(180, 400), depth=st.floats(0, 1), seed=st.integers(0, 99))
def test_length_holds_and_facts_stand_between_sentences(families, length, depth, seed):
    model = families["unigram"]
    made = needle.build(model, FACT, length, depth, rng=np.random.default_rng(seed))
    assert length - 16 < len(made.prompt) <= length
    before, after = made.prompt.text.split(FACT.sentence)
    # The context is cut after any word: only a fact behind all of it may follow half a sentence.
    assert not before.strip() or before.rstrip()[-1] == "." or after.startswith("\n\nQuestion")


def test_a_text_without_sentences_still_has_depths(families):
    model = families["bpe"]
    text = needle.haystack(np.random.default_rng(0), 400).replace(".", "")
    found = [needle.depth_of(needle.build(model, FACT, 300, d, text=text).prompt)
             for d in (0.0, 0.5, 1.0)]
    assert found[0] < 0.05 and abs(found[1] - 0.5) < 0.05 and found[2] > 0.95


def test_other_facts_are_there_but_not_asked_for(families):
    model = families["bpe"]
    made = needle.grid(model, (400,), (0.2, 0.8), np.random.default_rng(1), n_others=3)
    for one in made:
        names = [s.name for s in one.prompt.segments]
        assert {"fact_1", "fact_2", "fact_3"} <= set(names)
        places = [set(one.prompt.positions(n)) for n in ("needle", "fact_1", "fact_2", "fact_3")]
        assert len(set.union(*places)) == sum(map(len, places))
        value = text_of(model, one.prompt, "needle_value")
        assert value in text_of(model, one.prompt, "needle")
        assert all(value not in text_of(model, one.prompt, f"fact_{i}") for i in (1, 2, 3))
    assert made[0].answer != made[1].answer


def test_prompts_in_the_language_of_the_reader():
    made = needle.synthetic(reader.needle, (48, 80), (0.0, 1.0), np.random.default_rng(0), each=3)
    assert [len(one.prompt) for one in made] == [48] * 6 + [80] * 6
    for one in made:
        held = tuple(one.prompt.ids[p] for p in one.prompt.positions("needle_value"))
        assert held == one.answer and one.prompt.ids[-2] == reader.RECALL
        assert abs(needle.depth_of(one.prompt) - one.depth) < 0.15


def test_the_same_facts_through_text_and_through_tokens(words):
    """A needle written as text for the reader has the tokens its own builder would give."""
    fact = Fact("note amber seven ten two ;", "seven ten two", "recall amber")
    text = reader.words([int(t) for t in reader.prose(np.random.default_rng(0), 1, 200)[0]])
    made = needle.build(words, fact, 120, 0.5, text=text, template="{context} {question}")
    assert made.prompt.ids[0] == reader.BOS and len(made.prompt) == 120
    assert made.answer == tuple(reader.TOKEN[w] for w in ("seven", "ten", "two"))
    assert made.prompt.positions("needle_value") == made.prompt.positions("needle")[2:5]


def test_bad_input_is_one_sentence(families, words):
    model = families["bpe"]
    with pytest.raises(PromptError, match="fact, question and template alone take"):
        needle.build(model, FACT, 20, 0.5)
    with pytest.raises(PromptError, match="give a longer text or a smaller length"):
        needle.build(model, FACT, 900, 0.5, text="It rained. The road was empty.")
    with pytest.raises(PromptError, match="a depth of 1.5 is outside the context"):
        needle.build(model, FACT, 300, 1.5)
    with pytest.raises(PromptError, match="does not know every word of the value 'amber otter"):
        needle.build(words, FACT, 300, 0.5)
    # This tokenizer makes one piece of a word's end and the full stop.
    with pytest.raises(PromptError, match="does not keep the value 'amber otter mill' apart"):
        needle.build(families["glued"], FACT, 300, 0.5)
    with pytest.raises(PromptError, match=r"needs \{context\} and \{question\}, once each"):
        needle.build(model, FACT, 300, 0.5, template="{context} {context} {question}")
    with pytest.raises(PromptError, match="no tokenizer"):
        needle.build(SimpleNamespace(tokenizer=None, name="mute"), FACT, 300, 0.5)
    with pytest.raises(PromptError, match="holds the value 'mill' 0 times"):
        Fact("It rained.", "mill", "Where?")
    with pytest.raises(PromptError, match="the value of a fact is empty"):
        Fact("It rained.", " ", "Where?")
    with pytest.raises(PromptError, match="ask for 1 to 80"):
        needle.facts(np.random.default_rng(0), 81)


def test_a_model_too_short_for_the_length_gets_the_longest_it_reads(families):
    short = Parts(**{**vars(families["bpe"]), "max_positions": 150})
    made = needle.build(short, FACT, 400, 0.5)
    assert 130 < len(made.prompt) <= 150
