"""Questions over documents: the gold one where it was put, segments that hold what they say."""

import numpy as np
import pytest
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

import interp
from interp.core import PromptError
from interp.models import prompting
from interp.organisms import reader
from interp.prompts import documents


class Words:
    """A model as the builders see it: a word tokenizer over whatever text it is given."""

    name, processor, config, has_images, max_positions = "words", None, None, False, 4000

    def __init__(self, texts):
        split = pre_tokenizers.Whitespace()
        vocabulary = {"[U]": 0, "[B]": 1}
        for text in texts:
            for word, _ in split.pre_tokenize_str(text):
                vocabulary.setdefault(word, len(vocabulary))
        raw = Tokenizer(models.WordLevel(vocabulary, "[U]"))
        raw.pre_tokenizer = split
        self.tokenizer = PreTrainedTokenizerFast(tokenizer_object=raw, unk_token="[U]")

    def prompt(self, text, chat=False, segments=None):
        return prompting.build(self, text, segments=segments)

    def text(self, prompt, name):
        return self.tokenizer.decode([prompt.ids[p] for p in prompt.positions(name)])


@pytest.fixture(scope="module")
def asked():
    return documents.invented(np.random.default_rng(3), 4, words=24)


@pytest.fixture(scope="module")
def words(asked):
    return Words([documents.TEMPLATE, documents.NOTHING, asked.question, asked.gold, *asked.others,
                  "Document 1 2 3 4 :"])


@pytest.mark.parametrize("place", range(4))
def test_every_segment_holds_its_text_at_every_place(asked, words, place):
    made = documents.build(words, asked, place)
    prompt = made.prompt
    plain = str.maketrans("", "", " ")
    assert made.place == place and made.count == 4
    assert words.text(prompt, "gold_value").translate(plain) == asked.answer.translate(plain)
    assert words.text(prompt, "question").translate(plain) == asked.question.translate(plain)
    assert asked.gold.translate(plain) in words.text(prompt, "gold").translate(plain)
    assert prompt.positions("gold") == made.document(place)
    assert set(prompt.positions("gold_value")) < set(made.document(place))
    texts = [*asked.others[:place], asked.gold, *asked.others[place:]]
    for number, text in enumerate(texts):
        own = words.text(prompt, f"document_{number}").translate(plain)
        assert own == f"Document{number + 1}:{text}".translate(plain)
    apart = [set(made.document(i)) for i in range(4)]
    assert sum(map(len, apart)) == len(set.union(*apart))
    assert set(prompt.positions("irrelevant")) == set.union(*apart) - apart[place]
    assert made.irrelevant() == [made.document(i) for i in range(4) if i != place]
    assert set(made.after()) >= set(prompt.positions("question"))
    assert made.after()[0] == max(set.union(*apart)) + 1


def test_the_blank_prompt_has_the_documents_in_place_and_nothing_asked(asked, words):
    made = documents.build(words, asked, 2)
    for number in range(4):
        assert made.blank.positions(f"document_{number}") == made.document(number)
    assert words.text(made.blank, "question") == "N / A"
    assert asked.question.split()[-1] not in words.text(made.blank, "question")
    alone = made.gold_only
    assert words.text(alone, "gold_value") == words.text(made.prompt, "gold_value")
    assert len(alone) < len(made.prompt) and not any(s.name == "irrelevant" for s in alone.segments)


def test_only_the_gold_document_holds_the_answer_and_documents_differ():
    for seed in range(5):
        one = documents.invented(np.random.default_rng(seed), 20)
        assert one.gold.count(one.answer) == 1
        assert not any(one.answer in other for other in one.others)
        assert len({one.gold, *one.others}) == 20


@pytest.mark.parametrize("count, words_each", [(5, 9), (20, 30)])
def test_reader_documents_are_of_its_language(count, words_each):
    made = documents.synthetic(reader, np.random.default_rng(1), (0, count - 1), count=count,
                               each=2, words=words_each)
    assert [one.place for one in made] == [0, count - 1] * 2
    for one in made:
        ids = one.prompt.ids
        assert len(ids) == 1 + count * words_each + 2 and ids[0] == reader.BOS
        assert ids.count(reader.NOTE) == count and ids[-2] == reader.RECALL
        gold = [ids[p] for p in one.document(one.place)]
        start = gold.index(reader.NOTE)
        assert gold[start + 1] == ids[-1]  # the gold document names the key that is asked for
        assert tuple(gold[start + 2 : start + 5]) == one.answer
        others = [ids[p] for p in one.prompt.positions("irrelevant")]
        assert ids[-1] not in others
        assert one.blank.ids[:-1] == ids[:-1] and one.blank.ids[-1] not in ids[:-1]
    assert made[0].prompt.digest() != made[2].prompt.digest()


def test_the_bundled_reader_answers_them():
    model = interp.open_model("reader")
    made = documents.synthetic(reader, np.random.default_rng(2), (0, 4, 7), count=8, each=4)
    said = model.generate([one.prompt for one in made], 3)
    right = [tuple(answer) == one.answer for answer, one in zip(said, made)]
    assert sum(right) >= 11
    blank = model.generate([one.blank for one in made], 3)
    assert not any(tuple(answer) == one.answer for answer, one in zip(blank, made))


@pytest.mark.parametrize("change, sentence", [
    (dict(gold="nothing here"), "0 times"),
    (dict(gold="Ida and Ida"), "2 times"),
    (dict(others=("Ida too",)), "document 0 of the others"),
    (dict(answer=" "), "need words"),
])
def test_bad_questions_are_one_sentence(change, sentence):
    given = dict(question="Who?", answer="Ida", gold="It is Ida.", others=("Hugo sells ink.",))
    with pytest.raises(PromptError, match=sentence):
        documents.Question(**{**given, **change})


def test_bad_prompts_are_one_sentence(asked, words):
    with pytest.raises(PromptError, match="no place 4 among 4"):
        documents.build(words, asked, 4)
    with pytest.raises(PromptError, match="once each"):
        documents.build(words, asked, 0, template="{documents}")
    silent = Words(["a"])
    silent.tokenizer = None
    with pytest.raises(PromptError, match="words has no tokenizer"):
        documents.build(silent, asked, 0)
    with pytest.raises(PromptError, match="a note takes 6 words"):
        documents.synthetic(reader, np.random.default_rng(0), count=3, words=5)
    with pytest.raises(PromptError, match="does not keep the answer"):
        documents.grid(interp.open_model("reader"), np.random.default_rng(0), (0,), count=2)
