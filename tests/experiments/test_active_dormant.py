"""The experiment where the truth is known: trained on the task, planted, and the twins of both."""

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

import interp
from experiments import active_dormant
from experiments._output import execute
from experiments._paper import Settings, load
from interp.organisms.plant import primary_sink

GENERAL = {*active_dormant.GENERAL, active_dormant.SOME}
PLANTED_AT = 1


@pytest.fixture(scope="module")
def folders(tmp_path_factory, letters):
    """A model with a planted first-token sink and its twin; a trained model's untrained twin."""
    root = tmp_path_factory.mktemp("models")
    torch.manual_seed(3)
    bare = LlamaForCausalLM(LlamaConfig(
        vocab_size=97, hidden_size=48, intermediate_size=60, num_hidden_layers=5, bos_token_id=1,
        num_attention_heads=4, num_key_value_heads=2, initializer_range=0.06,
        max_position_embeddings=96, tie_word_embeddings=False)).eval()
    planted = primary_sink(bare, PLANTED_AT, 200.0, 4, attract=12.0)
    for name, model in (("planted", planted.model), ("twin", planted.twin)):
        model.save_pretrained(root / name)
        letters.save_pretrained(root / name)
    trained = interp.open_model("backcopy-3l")
    torch.manual_seed(0)
    type(trained.hf)(trained.hf.config).save_pretrained(root / "untrained")
    trained.tokenizer.save_pretrained(root / "untrained")
    return root


def result(name, out, **more):
    return execute(load("active_dormant"),
                   Settings.of(model=[str(name)], out=out, tiny=True, **more))


def verdicts(outcome):
    found = {claim.sentence: claim for claim in outcome.claims}
    assert len(found) == len(outcome.claims)
    return found


def supported(found):
    return {sentence for sentence, claim in found.items() if claim.verdict == "supported"}


@pytest.fixture(scope="module")
def on_trained(tmp_path_factory):
    return result("backcopy-3l", tmp_path_factory.mktemp("out"))


@pytest.fixture(scope="module")
def on_planted(folders, tmp_path_factory):
    return result(folders / "planted", tmp_path_factory.mktemp("out"))


def test_on_the_task_the_trained_model_does_what_it_was_trained_for(on_trained):
    found = verdicts(on_trained)
    assert found.keys() == {
        *active_dormant.TASK, *active_dormant.GENERAL, *active_dormant.DYNAMIC}
    assert {*active_dormant.TASK, active_dormant.GAP} <= supported(found)
    assert found[active_dormant.CHAIN].n == 12 and found[active_dormant.RESTS].n == 6
    causal = {s for s, claim in found.items() if claim.causal}
    assert causal == {active_dormant.NO_COPYING, active_dormant.AS_BEFORE, active_dormant.NO_CHAIN}
    for sentence in active_dormant.DYNAMIC:
        assert "run with --train" in found[sentence].reason
    assert "backcopy-3l" in found[active_dormant.DOMAINS].reason
    assert "backcopy-3l has no peak to explain" in found[active_dormant.CAUSE].reason


def test_an_untrained_twin_supports_nothing(folders, tmp_path):
    found = verdicts(result(folders / "untrained", tmp_path, figure=["norms"]))
    assert supported(found) == set()
    assert found[active_dormant.RESTS].verdict == "refuted"
    assert found[active_dormant.CHAIN].verdict == "refuted"
    assert found[active_dormant.COPIES].verdict == "refuted"
    # What cannot be lost was not kept either.
    assert "untrained does not copy: its loss" in found[active_dormant.NO_COPYING].reason
    for sentence in (active_dormant.AS_BEFORE, active_dormant.NO_CHAIN):
        assert "untrained does not know the chain" in found[sentence].reason
    for sentence in (active_dormant.LEAVES, active_dormant.GAP, active_dormant.PEAK,
                     active_dormant.CAUSE):
        assert "no head of untrained rests on the first token" in found[sentence].reason


def test_a_planted_sink_is_found_with_its_drain_its_peak_and_its_cause(on_planted):
    found = verdicts(on_planted)
    assert GENERAL - {active_dormant.DOMAINS} <= supported(found)
    cause = found[active_dormant.CAUSE]
    assert cause.details["block"] == PLANTED_AT
    assert cause.details["needed (below 20 %)"] == [f"MLP {PLANTED_AT}"]
    for sentence in active_dormant.TASK:
        assert found[sentence].verdict == "not testable" and "planted" in found[sentence].reason
    assert "no head of planted differs by more" in found[active_dormant.DOMAINS].reason


def test_its_twin_supports_none_of_it(folders, tmp_path):
    found = verdicts(result(folders / "twin", tmp_path, figure=["norms"]))
    assert found.keys() == {*active_dormant.TASK, *GENERAL, *active_dormant.DYNAMIC}
    assert supported(found) == set()
    assert found[active_dormant.SOME].verdict == "refuted"
    for sentence in (active_dormant.DRAIN, active_dormant.CAUSE):
        assert "no head of twin rests" in found[sentence].reason


def test_files_are_there_for_every_figure(on_trained, on_planted):
    for outcome, without in ((on_trained, {"dynamics"}), (on_planted, {"dynamics"})):
        assert {f.name for f in outcome.figures} == set(active_dormant.PAPER.figures)
        assert {f.name for f in outcome.figures if not f.files} == without
        for figure in outcome.figures:
            assert bool(figure.reason) == (not figure.files)
            for file in figure.files:
                assert (outcome.folder / file).stat().st_size > 1000
    first = on_trained.result("measures-backcopy-3l")
    assert first["first"].dims == ("prompt", "layer", "head", "query")


def test_a_model_of_one_block_can_have_no_peak(tmp_path):
    found = verdicts(result("backcopy-1l", tmp_path, figure=["attention"]))
    for sentence in (active_dormant.PEAK, active_dormant.CAUSE):
        assert found[sentence].reason.startswith("backcopy-1l has one block")
    assert active_dormant.DRAIN in supported(found)


def test_the_reader_gets_its_own_language(tmp_path):
    found = verdicts(result("reader", tmp_path, figure=["attention"]))
    assert active_dormant.SOME in supported(found)
    assert "the language of reader has no code" in found[active_dormant.DOMAINS].reason


def test_a_tokenizer_that_does_not_know_the_words_is_seen(folders, tmp_path):
    model = LlamaForCausalLM.from_pretrained(folders / "twin")
    model.save_pretrained(tmp_path / "foreign")
    words = interp.open_model("reader").tokenizer
    words.add_tokens(["another"])
    words.save_pretrained(tmp_path / "foreign")
    found = verdicts(result(tmp_path / "foreign", tmp_path / "out"))
    for sentence in GENERAL:
        assert found[sentence].reason.startswith("the tokenizer of foreign does not know")


def test_a_prompt_without_a_trigger_is_left_out_not_an_error(tmp_path, monkeypatch):
    sample = active_dormant.backcopy.sample
    quiet = active_dormant._two_domains(Settings.of(seed=5), 12, 32)[1]

    def few(rng, count, length, **more):
        tokens, trigger = sample(rng, count, length, **more)
        if count == 12:
            tokens[1::4], trigger[1::4] = [p.ids for p in quiet[1::4]], False
        return tokens, trigger

    monkeypatch.setattr(active_dormant.backcopy, "sample", few)
    found = verdicts(result("backcopy-3l", tmp_path, figure=["attention"]))
    assert found[active_dormant.LEAVES].n == 3 and found[active_dormant.COPIES].n == 9


def test_training_gives_every_dynamic_claim_a_verdict(tmp_path):
    outcome = result("backcopy-1l", tmp_path, train=True, figure=["dynamics"])
    found = verdicts(outcome)
    (drawn,) = outcome.figures
    assert drawn.name == "dynamics" and len(drawn.files) == 2
    assert set(active_dormant.DYNAMIC) <= found.keys()
    assert "too few to tell a logarithm" in found[active_dormant.DYNAMIC[1]].reason
    dynamics = outcome.result("dynamics")
    assert dynamics.data.sizes == {"variant": 4, "step": 6}
    risk = dynamics["bigram_excess"]
    assert (risk.isel(step=-1) < risk.isel(step=0)).all()
