"""The experiment on models with and without a sink, and on what cannot have one."""

import dataclasses

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

import interp
from experiments import sink_emergence as experiment
from experiments._output import execute
from experiments._paper import Settings, load
from interp.core import ModelNotFound
from interp.organisms.plant import primary_sink

SHARE = experiment.SHARE.format("the first token")
TRAINED = {sentence for sentence, _ in experiment.TRAINED}
EVERY = {SHARE, *experiment.CAUSAL, *TRAINED}


@pytest.fixture(scope="module")
def folders(tmp_path_factory, letters):
    """A planted sink on the start token, one on the first position, and the twins of both."""
    root = tmp_path_factory.mktemp("models")
    torch.manual_seed(3)
    rotary = LlamaForCausalLM(LlamaConfig(
        vocab_size=97, hidden_size=48, intermediate_size=60, num_hidden_layers=5, bos_token_id=1,
        num_attention_heads=4, num_key_value_heads=2, initializer_range=0.06,
        max_position_embeddings=96, tie_word_embeddings=False)).eval()
    learned = GPT2LMHeadModel(GPT2Config(
        vocab_size=97, n_embd=48, n_layer=5, n_head=6, n_positions=96, bos_token_id=1)).eval()
    for name, planted in (
        ("planted", primary_sink(rotary, 1, 200.0, 4, attract=12.0)),
        ("position", primary_sink(learned, 1, 200.0, 4, rule="first", attract=12.0)),
    ):
        for suffix, model in (("", planted.model), ("-twin", planted.twin)):
            model.save_pretrained(root / f"{name}{suffix}")
            letters.save_pretrained(root / f"{name}{suffix}")
    return root


def result(name, out, **more):
    return execute(load("sink_emergence"),
                   Settings.of(model=[str(name)], out=out, tiny=True, **more))


def verdicts(outcome):
    found = {claim.sentence: claim for claim in outcome.claims}
    assert len(found) == len(outcome.claims)
    return found


def supported(found):
    return {sentence for sentence, claim in found.items() if claim.verdict == "supported"}


@pytest.fixture(scope="module")
def on_planted(folders, tmp_path_factory):
    return result(folders / "planted", tmp_path_factory.mktemp("out"))


def test_a_planted_sink_is_found_on_every_text_that_starts_with_its_token(on_planted):
    found = verdicts(on_planted)
    assert found.keys() == EVERY
    assert {SHARE, experiment.NATURAL, experiment.OTHERS, experiment.RANDOM, experiment.REPEATED,
            experiment.VALUE, experiment.RESIDUAL} <= supported(found)
    # Planted from block 1 to block 4: every head of the two blocks between is drawn to it.
    assert found[experiment.NATURAL].measured == pytest.approx(40.0, abs=1.0)
    assert found[SHARE].details["layers above 0.3"] == [2, 3]
    # Repeated tokens start without the token that carries the sink.
    assert found[experiment.REPEATED].measured == 0.0
    assert "planted has no learned absolute positions" in found[experiment.SWAP].reason
    assert "planted has no learned sink logits" in found[experiment.LEARNED].reason
    # Its weights are random, so it has nothing to lose but its sink.
    assert "planted predicts no better than chance" in found[experiment.HIDING].reason
    assert all("trained from scratch" in found[sentence].reason for sentence in TRAINED)


def test_its_twin_supports_nothing(folders, tmp_path):
    found = verdicts(result(folders / "planted-twin", tmp_path, figure=["heads"]))
    assert found.keys() == EVERY and supported(found) == set()
    assert found[SHARE].verdict == found[experiment.NATURAL].verdict == "refuted"
    for sentence in (experiment.OTHERS, experiment.REPEATED):
        assert "planted-twin has no sink to begin with" in found[sentence].reason
    for sentence in (experiment.VALUE, experiment.RESIDUAL, experiment.ANGLE):
        assert "no head of planted-twin has a sink" in found[sentence].reason


def test_a_sink_on_the_first_position_stays_where_that_position_goes(folders, tmp_path):
    found = verdicts(result(folders / "position", tmp_path / "a", figure=["heads"]))
    assert {SHARE, experiment.NATURAL, experiment.RANDOM, experiment.SWAP} <= supported(found)
    swap = found[experiment.SWAP]
    assert swap.details["Sink_5"] > 30 > 5 > swap.details["Sink_1"]
    assert "position adds a learned vector" in found[experiment.REPEATED].reason
    found = verdicts(result(folders / "position-twin", tmp_path / "b", figure=["heads"]))
    assert supported(found) == set()
    assert "position-twin has no sink to begin with" in found[experiment.SWAP].reason


def test_the_trained_model_has_one_too(tmp_path):
    found = verdicts(result("backcopy-3l", tmp_path, figure=["heads"]))
    assert {SHARE, experiment.NATURAL, experiment.OTHERS, experiment.RANDOM} <= supported(found)
    hiding = found[experiment.HIDING]
    assert hiding.causal and "four random early tokens" in hiding.control and hiding.n == 8
    assert found[experiment.SWAP].verdict == "refuted"  # its sink is the start token's


def test_files_are_there_for_every_figure_and_result(on_planted):
    assert {f.name for f in on_planted.figures if f.files} == set(experiment.PAPER.figures)
    for figure in on_planted.figures:
        for file in figure.files:
            assert (on_planted.folder / file).stat().st_size > 1000
    lengths = on_planted.result("lengths-planted")
    assert lengths.data["length"].values.tolist() == [16, 32]
    rate = lengths["rate"]
    assert (rate.diff("epsilon") <= 0).all() and float(rate.sel(epsilon=0.3).min()) > 30


def test_an_encoder_is_measured_as_what_it_is(tmp_path):
    outcome = result("all-minilm-l6-v2", tmp_path)
    found = verdicts(outcome)
    share = found[experiment.SHARE.format("[CLS]")]
    assert share.verdict == "supported" and share.null == pytest.approx(2 / 24)
    for sentence in experiment.CAUSAL:
        assert found[sentence].reason.startswith("all-minilm-l6-v2 is an encoder")
    drawn = {f.name for f in outcome.figures if f.files}
    assert drawn == {"heads", "length", "share"}
    assert all("encoder" in f.reason for f in outcome.figures if not f.files)


def test_without_a_tokenizer_random_tokens_are_said_to_be_random(folders, tmp_path):
    LlamaForCausalLM.from_pretrained(folders / "planted").save_pretrained(tmp_path / "wordless")
    found = verdicts(result(tmp_path / "wordless", tmp_path / "out", figure=["heads"]))
    reason = "wordless has no tokenizer, so it was given random tokens"
    assert found[experiment.NATURAL].reason == reason
    assert found[SHARE].details["tokens"] == reason
    # The configuration names the start token.
    assert {SHARE, experiment.RANDOM, experiment.OTHERS} <= supported(found)


def test_short_models_and_short_windows_have_a_reason(tiny, tmp_path, letters):
    for name, positions in (("short", 15), ("enough", 16)):
        LlamaForCausalLM(LlamaConfig(
            vocab_size=97, hidden_size=16, intermediate_size=20, num_hidden_layers=2,
            num_attention_heads=2, bos_token_id=1, max_position_embeddings=positions,
        )).save_pretrained(tmp_path / name)
        letters.save_pretrained(tmp_path / name)
    tiny("mistral").save_pretrained(tmp_path / "narrow")
    reasons = {}
    for name in ("short", "enough", "narrow"):
        found = verdicts(result(tmp_path / name, tmp_path / f"out-{name}", figure=["length"]))
        assert found.keys() == EVERY
        reasons[name] = found[SHARE].reason
    assert reasons == {
        "short": "short has 15 positions (16 are needed)", "enough": "",
        "narrow": "in no layer of narrow do half of 24 queries see the first token: its windows "
        "are too short"}


def test_of_several_models_a_missing_one_is_a_reason_and_shares_a_row(tmp_path, monkeypatch):
    opened = interp.open_model

    def one_missing(name, **more):
        if name == "reader":
            raise ModelNotFound("the reader is not here.")
        return opened(name, **more)

    monkeypatch.setattr(interp, "open_model", one_missing)
    paper = dataclasses.replace(experiment.PAPER, models=("reader", "backcopy-1l"))
    monkeypatch.setattr(experiment, "PAPER", paper)
    outcome = execute(load("sink_emergence"),
                      Settings.of(out=tmp_path, tiny=True, figure=["heads"]))
    missing = [c for c in outcome.claims if c.details.get("model") == "reader"]
    assert [c.reason for c in missing] == ["the reader is not here."] * 2
    assert missing[1].details["claims"] == list(experiment.CAUSAL)
    assert {f.of: bool(f.files) for f in outcome.figures} == {"reader": False, "backcopy-1l": True}
    # Asked for by name it is an error.
    with pytest.raises(ModelNotFound, match="not here"):
        result("reader", tmp_path / "asked")
