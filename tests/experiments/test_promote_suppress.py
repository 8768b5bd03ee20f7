"""The planted lister promotes and suppresses, its twin only promotes, a random model lists nothing."""

import pytest
from typer.testing import CliRunner

from experiments import promote_suppress as experiment
from experiments.__main__ import app
from experiments._output import execute
from experiments._paper import Settings, load
from interp.core import Prompt
from interp.organisms import lister_circuit
from interp.prompts import one_to_many


def result(model, out, figure="heads"):
    return execute(load("promote_suppress"), Settings.of(
        model=[str(model)], out=out, tiny=True, figure=[figure]))


def verdicts(outcome):
    keys = {sentence: key for key, sentence in experiment.SENTENCES.items()}
    found = {keys[claim.sentence]: claim for claim in outcome.claims}
    assert found.keys() == experiment.SENTENCES.keys() and len(outcome.claims) == len(found)
    return found


def saved(model, tokenizer, folder):
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def test_the_planted_lister_promotes_suppresses_and_amplifies(tmp_path):
    outcome = result(experiment.PLANTED, tmp_path)
    found = verdicts(outcome)
    for key in experiment.SENTENCES:
        assert found[key].verdict == "supported", key
    assert found["causes"].causal and "random" in found["causes"].control
    assert found["suppress"].paper_tag == found["amplify"].paper_tag == "code"
    heads = outcome.result(f"step-3-{experiment.PLANTED}")["heads"].mean("prompt")
    own = heads.sel(segment="answer 1", target="answer 1")
    least = own.argmin(...)
    assert (int(least["layer"]), int(least["head"])) == lister_circuit.SUPPRESSES
    promoting = heads.sel(segment="subject", target="answer 3").argmax(...)
    assert (int(promoting["layer"]), int(promoting["head"])) == lister_circuit.PROMOTES
    assert [f.name for f in outcome.figures if f.files] == ["heads"]


def test_its_twin_lists_as_well_without_suppressing_anything(tmp_path):
    twin = saved(lister_circuit.build(suppress=False), lister_circuit.words(), tmp_path / "twin")
    found = verdicts(result(twin, tmp_path / "out"))
    assert found["unproduced"].verdict == "supported" and found["promote"].measured is not None
    for key in ("suppress", "amplify", "causes"):
        assert found[key].verdict != "supported", key


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_a_random_model_lists_nothing(tiny, letters, tmp_path, architecture):
    folder = saved(tiny(architecture), letters, tmp_path / architecture)
    found = verdicts(result(folder, tmp_path / "out"))
    assert {claim.verdict for claim in found.values()} == {"not testable"}
    assert "fewer than 6" in found["suppress"].reason


def test_models_that_cannot_be_asked_are_told_so_in_a_sentence(tiny, tmp_path):
    tiny("bert").save_pretrained(tmp_path / "bert")
    found = verdicts(result(tmp_path / "bert", tmp_path / "out"))
    assert all("is an encoder" in claim.reason for claim in found.values())
    done = CliRunner().invoke(app, ["run", "promote_suppress", "--tiny", "--model",
                                    str(tmp_path / "nowhere"), "--out", str(tmp_path / "out")])
    assert done.exit_code == 1 and "there is no folder" in done.output
    assert "Traceback" not in done.output


def test_answers_are_found_in_the_order_in_which_they_are_given():
    words = lister_circuit.words()
    ids = words("Lyon, Paris, Lyon, Nice", add_special_tokens=False).input_ids
    known = ("Paris", "Lyon", "Marseille")
    assert one_to_many.find(words, ids, known) == [(0, 1), (2, 3)]
    assert one_to_many.find(words, ids, ("Paris",)) == [(2, 3)]
    # Part of a word is no answer.
    assert one_to_many.find(words, ids, ("Par", "yon")) == []


class Letters:
    """A tokenizer of single letters."""

    def decode(self, ids, **_):
        return "".join(map(chr, ids))


def test_answers_of_several_tokens_have_their_whole_span():
    ids = [ord(x) for x in " Saint Petersburg, sochi"]
    found = one_to_many.find(Letters(), ids, ("Saint Petersburg", "Sochi", "Saint"))
    assert found == [(1, 17), (19, 24)]
    prompt = Prompt.from_tokens([5, 6, 7, 8], {"subject": [1, 2]})
    made = one_to_many.stepwise("Russia", prompt, ids, found)
    assert made.subject_token == 6 and made.answers == (ord("S"), ord("s"))
    assert [len(step) for step in made.steps] == [5, 4 + 19]
    assert made.steps[1].positions("answer 1") == tuple(range(5, 21))
    assert made.steps[0].positions("subject") == (1, 2)
