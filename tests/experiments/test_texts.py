"""Texts for any model: exact lengths, nothing left to chance, and one sentence where it fails."""

from types import SimpleNamespace

import numpy as np
import pytest

import interp
from experiments import _texts as texts
from interp.core import PromptError
from interp.models.model import Model
from interp.organisms import backcopy, reader


@pytest.fixture(scope="module")
def model(tiny, letters):
    return Model(tiny("llama"), "spelling", tokenizer=letters)


@pytest.mark.parametrize("name", ["backcopy-1l", "reader", "spelling"])
@pytest.mark.parametrize("length", [5, 33])
def test_prompts_have_the_asked_number_and_length_and_depend_on_the_seed_only(model, name, length):
    one = model if name == "spelling" else interp.open_model(name)
    made = [texts.natural(one, 7, length, np.random.default_rng(seed)) for seed in (3, 3, 4)]
    assert {len(p) for p in made[0]} == {length} and len(made[0]) == 7
    same, again, other = ([p.ids for p in prompts] for prompts in made)
    assert same == again != other and len(set(same)) > 1
    assert all(p.ids[0] == texts.first_ids(one)[0] for p in made[0])


def test_a_bundled_model_gets_its_own_language():
    one = interp.open_model("reader")
    assert texts.knows(one, reader) and not texts.knows(one, backcopy)
    for prompt in texts.natural(one, 4, 40, np.random.default_rng(0)):
        assert prompt.ids[0] == reader.BOS and reader.BOS not in prompt.ids[1:]
        assert one.tokenizer.unk_token_id not in prompt.ids
    other = interp.open_model("backcopy-1l")
    made = texts.natural(other, 300, 40, np.random.default_rng(0))
    after = np.bincount([p.ids[1] for p in made], minlength=other.d_vocab) / len(made)
    # The second token is drawn as the chain says, not from English.
    assert np.abs(after[: len(backcopy.chain().first)] - backcopy.chain().first).max() < 0.06


def test_any_other_model_gets_english(model, letters):
    prompt = texts.natural(model, 1, 60, np.random.default_rng(0))[0]
    text = letters.decode(prompt.ids, skip_special_tokens=True).replace(" ", "")
    spoken = texts.prose(np.random.default_rng(0), 2).replace(" ", "")
    assert text == spoken[: len(text)] and len(text) > 40


class Closing:
    """Two tokens for every word, in between the marks of an encoder."""

    bos_token_id, cls_token_id, sep_token_id, eos_token_id = None, 90, 91, None
    all_special_ids = [90, 91]

    def get_vocab(self):
        return {"word": 0}

    def __call__(self, text, **_):
        ids = [len(word) for word in text.split() for _ in range(2)]
        return {"input_ids": [90, *ids, 91]}


def test_a_text_that_is_cut_still_ends_as_the_tokenizer_ends_it(tiny):
    model = Model(tiny("bert"), "closing", tokenizer=Closing())
    for prompt in texts.natural(model, 3, 21, np.random.default_rng(0)):
        assert len(prompt) == 21 and prompt.ids[0] == 90 and prompt.ids[-1] == 91
        assert 91 not in prompt.ids[1:-1]


def test_a_model_too_short_and_one_without_tokenizer_are_one_sentence(model, tiny):
    with pytest.raises(PromptError, match=r"spelling has 640 positions, not 641\."):
        texts.natural(model, 1, 641, np.random.default_rng(0))
    with pytest.raises(PromptError, match="wordless has no tokenizer, so it cannot be given text"):
        texts.natural(Model(tiny("llama"), "wordless"), 1, 9, np.random.default_rng(0))


def test_a_tokenizer_that_knows_no_text_ends_in_one_sentence_and_not_never(tiny):
    class Mute(Closing):
        def __call__(self, text, **_):
            return {"input_ids": [3]}

    model = Model(tiny("llama"), "mute", tokenizer=Mute())
    with pytest.raises(PromptError, match=r"the tokenizer of mute makes 1 token\(s\) of"):
        texts.natural(model, 1, 9, np.random.default_rng(0))


def test_random_tokens_start_as_a_text_and_hold_nothing_special(model, tiny):
    for one in (model, Model(tiny("llama"), "wordless")):
        made = texts.random_tokens(one, 40, 12, np.random.default_rng(1))
        assert {len(p) for p in made} == {12} and {p.ids[0] for p in made} == {1}
        later = {i for p in made for i in p.ids[1:]}
        assert 1 not in later and len(later) > 60
    assert not {0, 1, 2, 93, 94, 95, 96} & {
        i for p in texts.random_tokens(model, 40, 12, np.random.default_rng(1)) for i in p.ids[1:]}
    # An encoder without a tokenizer has no start token to guess.
    assert texts.first_ids(Model(tiny("bert"), "bare")) == []


def test_prose_and_code_differ_at_every_call_and_code_is_python():
    rng = np.random.default_rng(0)
    made = [texts.prose(rng, 3) for _ in range(20)]
    assert len(set(made)) == 20 and all(text.count(".") >= 3 for text in made)
    functions = [texts.code(rng) for _ in range(20)]
    assert len(set(functions)) == 20
    for source in functions:
        space: dict = {}
        exec(compile(source, "made", "exec"), space)
        (run,) = (value for name, value in space.items() if callable(value))
        assert run([])["count"] == 0


def test_a_tokenizer_made_up_from_nothing_is_none(tiny, tmp_path):
    # transformers builds one of special tokens for these architectures if the folder has no files.
    for architecture in ("gpt2", "gemma2", "bert"):
        tiny(architecture).save_pretrained(tmp_path / architecture)
        opened = interp.open_model(tmp_path / architecture)
        assert opened.tokenizer is None and not opened.first_token_is_bos


def test_knowing_a_language_takes_all_of_its_vocabulary():
    words = reader.tokenizer()
    fewer = {k: v for k, v in words.get_vocab().items() if v}
    assert texts.knows(SimpleNamespace(tokenizer=words), reader)
    assert not texts.knows(SimpleNamespace(tokenizer=None), reader)
    assert not texts.knows(
        SimpleNamespace(tokenizer=SimpleNamespace(get_vocab=lambda: fewer)), reader)
