"""Tokenizers that close texts, and words they do not know, are spoken of where they mislead."""

import copy
import warnings

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

import interp
from interp.doctor import examine_model, write
from interp.models.model import Model
from interp.models.plain_text import around

VOCABULARY = {"[UNK]": 0, "[CLS]": 1, "[SEP]": 2, "amber": 3, "code": 4, "is": 5, "a": 6}


def tokenizer(template="[CLS] $A [SEP]", unknown="[UNK]", **more):
    words = Tokenizer(models.WordLevel(VOCABULARY, "[UNK]"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    words.post_processor = processors.TemplateProcessing(
        single=template, special_tokens=[("[CLS]", 1), ("[SEP]", 2)])
    return PreTrainedTokenizerFast(tokenizer_object=words, unk_token=unknown, cls_token="[CLS]",
                                   sep_token="[SEP]", **more)


def opened(tiny, *given, architecture="llama", **more):
    return Model(tiny(architecture), "toy", tokenizer(*given, **more))


def said(call):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        call()
    return [str(one.message) for one in caught]


@pytest.mark.parametrize("template, ends", [
    ("[CLS] $A [SEP]", (1, 2)), ("[CLS] $A", (1, None)), ("$A [SEP]", (None, 2)), ("$A", (None, None))])
def test_what_stands_around_a_text_is_found_with_the_tokenizer_itself(template, ends):
    assert around(tokenizer(template)) == ends


def test_a_decoder_whose_texts_are_closed_warns_once_and_the_way_out_works(tiny):
    model = opened(tiny)
    (first,) = said(lambda: model.prompt("amber is a code"))
    assert "closes every text with '[SEP]'" in first and "Prompt.from_tokens(prompt.ids[:-1])" in first
    assert "\n" not in first and "add_eos_token" not in first
    assert said(lambda: model.prompt("a code")) == said(lambda: model.using("hf").prompt("a")) == []
    prompt = model.prompt("a code")
    assert interp.Prompt.from_tokens(prompt.ids[:-1]).ids == (1, 6, 4)
    # A model of its own is told again; one that does not close, or an encoder, is not.
    assert len(said(lambda: opened(tiny).prompt("a"))) == 1
    assert said(lambda: opened(tiny, "[CLS] $A").prompt("a code")) == []
    assert said(lambda: opened(tiny, architecture="bert").prompt("a code")) == []


def test_a_tokenizer_with_a_switch_for_it_is_answered_by_the_switch(tiny):
    switched = tokenizer()
    switched._add_eos_token = True
    model = Model(tiny("llama"), "toy", switched)
    (first,) = said(lambda: model.prompt("a code"))
    assert "set model.tokenizer.add_eos_token = False, or run" in first


def test_the_doctor_calls_it_a_limit_and_names_the_first_token(tiny):
    report = examine_model(opened(tiny), quick=True, lanes=["hf"])
    (limit,) = [f for f in report.findings if f.about == "tokenizer"]
    assert limit.level == "limit" and "closes every text with '[SEP]'" in limit.sentence
    assert report.exit_code == 1 and "the first token of a text is '[CLS]'" in write(report)
    for model in (opened(tiny, "[CLS] $A"), opened(tiny, architecture="bert")):
        report = examine_model(model, quick=True, lanes=["hf"])
        assert not [f for f in report.findings if f.about == "tokenizer"]
    report = examine_model(opened(tiny, "$A"), quick=True, lanes=["hf"])
    assert ("a text does not begin with a special token (the tokenizer has no BOS token)"
            in write(report))


@pytest.mark.parametrize("text, count", [
    ("the quick brown fox", "4 of 4"), ("the quick brown code", "3 of 4"),
    ("the quick amber code", None), ("amber is a code", None)])
def test_a_prompt_of_unknown_words_warns(tiny, text, count):
    model = opened(tiny, "[CLS] $A")
    found = said(lambda: model.prompt(text))
    if count is None:
        assert found == []
        return
    (sentence,) = found
    assert sentence.startswith(f"{count} tokens of the prompt {text!r} are unknown")
    assert "toy" in sentence and "[UNK]" in sentence and "get_vocab()" in sentence
    assert said(lambda: model.prompt(text)) == []  # once per prompt
    assert len(said(lambda: model.prompt("other strange words"))) == 1


def test_a_token_with_other_tasks_is_not_taken_for_unknown_words(tiny):
    both = tokenizer("[CLS] $A")
    both.eos_token = "[UNK]"
    model = Model(copy.deepcopy(tiny("llama")), "toy", both)
    assert said(lambda: model.prompt("the quick brown fox")) == []
