"""The experiment on written circuits of which every repair is known, and on models that know nothing."""

import pytest
import torch

from experiments import _two_hops, hopping_too_late
from experiments._output import execute
from experiments._paper import Settings, load
from interp.core import ModelNotFound
from interp.models.model import Model
from interp.organisms import hop_circuit

SENTENCES = hopping_too_late.SENTENCES


def result(names, out, **more):
    outcome = execute(load("hopping_too_late"), Settings.of(
        model=[str(name) for name in names], out=out, tiny=True, **more))
    keys = {sentence: key for key, sentence in SENTENCES.items()}
    found = {}
    for claim in outcome.claims:
        found.setdefault(claim.details.get("model"), {})[keys[claim.sentence]] = claim
    return outcome, found


@pytest.fixture(scope="module")
def circuits(tmp_path_factory):
    return result(_two_hops.CIRCUITS, tmp_path_factory.mktemp("hops"))


def test_the_circuit_with_the_early_table_is_repaired_by_the_known_pairs(circuits):
    found = circuits[1]["hop-circuit"]
    assert found.keys() == SENTENCES.keys()
    for key in ("known", "repairs", "backward", "fixed", "targets"):
        assert found[key].verdict == "supported", key
    assert found["known"].measured == 1.0
    details = found["repairs"].details
    assert details["repaired"] == 1.0 and details["forward patches"] == 0.0
    assert details["prefills per question"] < details["naive"] / 5
    assert found["repairs"].paper_tag == "secondary"
    assert "no question that could be broken" in found["preserved"].reason


def test_its_twin_answers_by_itself(circuits):
    found = circuits[1]["hop-circuit-in-time"]
    assert found["early"].verdict == "supported"
    assert found["early"].details["median blocks"] == [0.0, 5.0]
    for key in ("known", "repairs", "backward", "fixed", "preserved", "targets"):
        assert found[key].verdict == "not testable"
    assert "nothing is to be repaired" in found["repairs"].reason


def test_the_figures_are_drawn_where_there_is_something(circuits):
    drawn = {path.name for path in circuits[0].folder.glob("*.png")}
    late = {f"{name}.hop-circuit.png" for name in ("earliest", "pairs", "fixed", "projection")}
    twin = {f"{name}.hop-circuit-in-time.png" for name in ("earliest", "projection", "knockout")}
    assert drawn == late | twin
    assert all(figure.files or figure.reason for figure in circuits[0].figures)


def test_questions_in_english_are_asked_with_the_entity_marked(letters, tiny):
    """A random model knows none; the prompts are right all the same."""
    model = Model(tiny("llama"), "llama", letters)
    made = _two_hops._english(model)
    assert len(made) == sum(len(facts) for facts in _two_hops.FACTS.values())
    one = made[0]
    place = "".join(letters.convert_ids_to_tokens([one.prompt.ids[p] for p in
                                                   one.prompt.positions("entity")]))
    assert place == next(iter(_two_hops.LANDMARKS))
    told = {letters.convert_ids_to_tokens(int(x.answer)) for x in made}
    assert told <= {" ", *"PRTBMNLCAFIJGHSE"}
    for facts in _two_hops.FACTS.values():
        assert set(facts) <= set(_two_hops.LANDMARKS.values())


@pytest.mark.parametrize("architecture, why", [
    ("llama", "does not know enough"), ("gpt2", "does not know enough"), ("bert", "is an encoder")])
def test_models_that_know_nothing_are_told_so(letters, tiny, tmp_path, architecture, why):
    folder = tmp_path / architecture
    tiny(architecture).save_pretrained(folder)
    letters.save_pretrained(folder)
    _, found = result([folder], tmp_path / "out")
    (claims,) = found.values()
    assert claims.keys() == SENTENCES.keys()
    assert {claim.verdict for claim in claims.values()} == {"not testable"}
    assert why in claims["repairs"].reason


def test_a_random_model_of_the_circuits_language_knows_nothing(tmp_path):
    folder = tmp_path / "random"
    made = hop_circuit.build()
    with torch.no_grad():
        for weight in made.parameters():
            if weight.ndim > 1:
                weight.normal_(std=0.05)
    made.save_pretrained(folder)
    hop_circuit.words().save_pretrained(folder)
    _, found = result([folder], tmp_path / "out")
    assert {c.verdict for claims in found.values() for c in claims.values()} == {"not testable"}


def test_an_unknown_model_is_one_sentence(tmp_path):
    with pytest.raises(ModelNotFound, match="no-such-model"):
        result(["no-such-model"], tmp_path)
