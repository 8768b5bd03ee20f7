"""What is encoded where: found in the bundled model, not in untrained ones, and told where it is not."""

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

import interp
from experiments import _encoded_tasks, _texts, encoded_features
from experiments._output import execute
from experiments._paper import Settings, load
from interp.organisms import looker, reader
from interp.prompts import conflict
from probes import nulls
from tests.experiments.test_any_model import saved

BY_CHANCE = ("used", "specific", "mdl")
"""Of an untrained model: an answer that some state decides is used whatever the weights are."""


def run(name, out, figure=("selectivity",)):
    outcome = execute(load("encoded_features"), Settings.of(
        model=[str(name)], out=out, tiny=True, figure=figure))
    assert all(figure.files or figure.reason for figure in outcome.figures)
    return outcome, {claim.sentence: claim for claim in outcome.claims}


def verdicts(found, kind):
    """Verdict by claim key."""
    return {key: found[sentence].verdict for key, (sentence, _) in kind.claims.items()}


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    return run("looker", tmp_path_factory.mktemp("looker"),
               ("scores", "erasure"))


def test_looker_encodes_what_it_sees_and_what_it_is_asked(trained):
    outcome, found = trained
    assert {f.name for f in outcome.figures if f.files} == {"scores", "erasure"}
    said = verdicts(found, encoded_features._Pictures)
    assert set(found) == {sentence for sentence, _ in encoded_features._Pictures.claims.values()}
    for name in ("color", "shape"):
        assert said[f"{name} at its image token: readable"] == "supported"
    assert said["color at the last token: computed"] == "supported"
    # Before any block the last token is a word: it knows nothing of the picture.
    scores = outcome.result("color-at-the-last-token-looker")
    assert float(scores["score"].sel(layer=-1)) < 0.35 < 0.6 < float(scores["score"].max())
    assert found[encoded_features._Pictures.claims["color at its image token: used"][0]].causal
    for claim in outcome.claims:
        assert claim.control or claim.reason
        if claim.unit == "share of samples":
            assert {"share right, untrained", "share right, guess", "share right, embedding",
                    "p over layers", "nested score"} <= claim.details.keys()


def english():
    """Words of the facts and of plain prose, and a Llama that has never seen them."""
    relations = conflict.RELATIONS.values()
    text = " ".join([_texts.prose(np.random.default_rng(0), 60), *(
        form.format(subject=s, object=o) for r in relations for s, o in r.facts.items()
        for form in (r.question, r.statement, r.coherent))])
    split = pre_tokenizers.Whitespace()
    known = sorted({word for word, _ in split.pre_tokenize_str(text)})
    made = Tokenizer(models.WordLevel({w: i for i, w in enumerate(["<unk>", "<s>", *known])}, "<unk>"))
    made.pre_tokenizer = split
    made.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    torch.manual_seed(0)
    hf = LlamaForCausalLM(LlamaConfig(
        vocab_size=len(known) + 2, hidden_size=48, intermediate_size=56, num_hidden_layers=3,
        num_attention_heads=6, num_key_value_heads=2, head_dim=8, max_position_embeddings=640,
        initializer_range=0.1))
    return hf, PreTrainedTokenizerFast(tokenizer_object=made, bos_token="<s>", unk_token="<unk>")


@pytest.mark.parametrize("kind", ["english", "llava"])
def test_an_untrained_model_encodes_nothing_that_another_one_does_not(tiny, letters, tmp_path, kind):
    folder, told = tmp_path / kind, encoded_features._Texts
    if kind == "llava":
        saved(tiny, "llava", folder, letters)
        told = encoded_features._Pictures
    else:
        hf, words = english()
        hf.save_pretrained(folder)
        words.save_pretrained(folder)
    _, found = run(folder, tmp_path / "out")
    said = verdicts(found, told)
    # A tiny run has too few facts in English to tell keys apart where they are stated.
    untold = {key for key, verdict in said.items() if verdict == "not testable"}
    assert not untold or kind == "english" and all("key at the stated" in key for key in untold)
    shown = [key for key, verdict in said.items() if verdict == "supported"]
    assert all(any(word in key for word in BY_CHANCE) for key in shown), shown


def test_without_facts_in_its_words_only_positions_are_looked_for(tiny, letters, tmp_path):
    folder = saved(tiny, "gpt2", tmp_path / "gpt2", letters)
    _, found = run(folder, tmp_path / "out")
    untold = {key for key, verdict in verdicts(found, encoded_features._Texts).items()
              if verdict == "not testable"}
    assert {key for key in encoded_features._Texts.claims if "position" in key}.isdisjoint(untold)
    assert {"key at the last token: readable", "source at the last token: computed"} <= untold
    assert all("tokenizer" in c.reason or "control task" in c.reason for c in found.values() if c.reason)


def test_models_of_another_kind_say_why(tiny, letters, tmp_path):
    folder = saved(tiny, "bert", tmp_path / "bert", letters)
    _, found = run(folder, tmp_path / "out")
    assert {claim.verdict for claim in found.values()} == {"not testable"}
    assert all("is an encoder" in claim.reason for claim in found.values())
    with pytest.raises(interp.core.ModelNotFound):
        run("no-such-folder/at/all", tmp_path / "out")


def test_labels_are_of_the_tokens_that_they_are_read_at():
    """Cells of looker: visual token i is cell divmod(i, 6); labels as training had them."""
    model = interp.open_model("looker")
    made = _encoded_tasks.pictures(model, Settings.of(tiny=True))
    batch, cells = made.batches["cells"], {f.name: f for f in made.features if "image" in f.place}
    states = nulls.layer_states(model, batch.prompts[:1], batch.places[:1], layers=[])
    assert states.sizes["sample"] == len(batch.places[0])
    places = np.concatenate(batch.places)
    start = batch.prompts[0].of_kind("image")[0].start
    for row, label in zip(cells["place"].rows, cells["place"].labels):
        down, right = divmod(places[row] - start, 6)
        assert label == f"{down // 3},{right // 3}"
    assert set(cells["color"].labels) <= set(looker.COLORS)
    assert set(cells["digit"].rows).isdisjoint(cells["color"].rows)
    assert (cells["shape"].rows == cells["color"].rows).all()
    # What is asked about: the label is the model's own answer.
    for task in ("color", "shape", "digit"):
        (feature,) = [f for f in made.features if f.key == f"{task} at the last token"]
        prompts = made.batches[task].prompts
        run = model.run(prompts, logits="last")
        said = [model.tokenizer.decode(rows[-1].argmax()) for rows in run.logits]
        assert np.mean([a == b for a, b in zip(said, feature.labels)]) > 0.8


def test_texts_state_contradict_and_agree():
    model = interp.open_model("reader")
    assert _texts.knows(model, reader)
    made = _encoded_tasks.texts(model, Settings.of(tiny=True))
    (asked,) = [f for f in made.features if f.key == "contradiction at the last token"]
    (stated,) = [f for f in made.features if f.key == "contradiction at the stated answer"]
    batch = made.batches["contradiction"]
    flat = [(prompt, place) for prompt, places in zip(batch.prompts, batch.places) for place in places]
    for feature, last in ((asked, True), (stated, False)):
        for row, label, city in zip(feature.rows, feature.labels, feature.groups):
            prompt, place = flat[row]
            assert (place == -1) == last
            segment = prompt.segment("object")
            memory = tuple(reader.MEMORY[reader.TOKEN[city]])
            assert (prompt.ids[segment.start : segment.stop] == memory) == (label == "agrees")
            assert last or place == segment.stop - 1
    assert all(len(feature.labels) == len(feature.rows) for feature in made.features)
