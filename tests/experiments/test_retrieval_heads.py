"""The experiment on the bundled reader, on the same model untrained, and on unsuitable models."""

import json

import numpy as np
import pytest
import torch
import xarray as xr
from transformers import GPT2Config, GPT2LMHeadModel

from experiments import _needles, retrieval_heads
from experiments._outcome import Outcome
from experiments._output import Output, execute
from experiments._paper import Settings, SettingsError, load
from interp.core import ModelNotFound
from interp.models.model import Model
from interp.organisms import reader

SENTENCES = retrieval_heads.SENTENCES


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """The reader without training, and a model without a tokenizer."""
    root = tmp_path_factory.mktemp("models")
    reader.build(0).save_pretrained(root / "untrained")
    reader.tokenizer().save_pretrained(root / "untrained")
    torch.manual_seed(0)
    GPT2LMHeadModel(GPT2Config(vocab_size=61, n_embd=24, n_layer=2, n_head=3, n_positions=64)
                    ).save_pretrained(root / "mute")
    return root


def result(name, out):
    return execute(load("retrieval_heads"), Settings.of(model=[str(name)], out=out, tiny=True))


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    return result("reader", tmp_path_factory.mktemp("trained"))


def verdicts(outcome):
    return {claim.sentence: claim for claim in outcome.claims}


def test_every_sentence_has_a_verdict_and_causes_have_controls(trained):
    found = verdicts(trained)
    plain = {s for k, s in SENTENCES.items() if k != "specific"}
    assert plain <= set(found)
    for by in retrieval_heads.KINDS:
        for phase in retrieval_heads.PHASES:
            claim = found[retrieval_heads.causes(by, phase)]
            assert claim.reason == "a --tiny run leaves this kind out" if by == "mean" else \
                claim.causal and "random heads" in claim.control
    specific = [s for s in found if s.startswith(SENTENCES["specific"][:-1])]
    assert len(specific) == 4


def test_the_reader_loses_needles_without_its_top_heads_and_not_without_random_ones(trained):
    found = verdicts(trained)
    for by in ("zero", "uniform"):
        claim = found[retrieval_heads.causes(by, "decode")]
        assert claim.verdict == "supported" and claim.details["top"] < 0.2
        # The near heads of the same layer can be spared: the needle is answered without them.
        assert claim.details["random"] > claim.details["top"] + 0.8
        assert "heads of the same layers" in claim.control
    assert found[SENTENCES["area"]].verdict == "supported"
    assert found[SENTENCES["chance"]].verdict == "supported"
    # An eighth of the heads of this small model: the paper's sparsity is not claimed for it.
    assert found[SENTENCES["sparse"]].verdict == "refuted"
    assert "needs an extractive" in found[SENTENCES["extract"]].reason
    assert "two models of one shape" in found[SENTENCES["intrinsic"]].reason


def test_the_run_leaves_figures_scores_and_sweeps(trained):
    files = {path.name for path in trained.folder.rglob("*") if path.is_file()}
    assert {"niah.reader.png", "bins.reader.png", "ranks.reader.png", "map.reader.png",
            "sweep.reader.png", "heads-reader.parquet", "claims.json"} <= files
    data = {path.name for path in (trained.folder / "data").iterdir()}
    assert {"scores-reader", "niah-reader", "sweep-zero-decode-reader",
            "sweep-uniform-all-reader"} <= data
    manifest = json.loads((trained.folder / "manifest.json").read_text())
    assert manifest["prompts"]["detect-reader"]["count"] == 6


def test_an_untrained_model_retrieves_nothing_and_nothing_is_claimed(folders, tmp_path):
    outcome = result(folders / "untrained", tmp_path)
    assert {claim.verdict for claim in outcome.claims} == {"not testable"}
    reasons = {claim.reason for claim in outcome.claims}
    assert any("none of 6 prompts passed the success filter" in reason for reason in reasons)


def test_unsuitable_models_are_refused_in_one_sentence(folders, tmp_path):
    with pytest.raises(SettingsError, match="has no tokenizer, so no needle can be hidden"):
        result(folders / "mute", tmp_path)
    with pytest.raises(ModelNotFound):
        result("no-such-model", tmp_path)
    with pytest.raises(SettingsError, match="is an encoder: it says nothing"):
        result("all-minilm-l6-v2", tmp_path)


@pytest.mark.parametrize(("noise", "verdict"), [(0.02, "supported"), (5.0, "refuted")])
def test_two_models_of_one_shape_are_compared(noise, verdict, tmp_path):
    rng = np.random.default_rng(0)
    base = rng.random((12, 16)) ** 8
    maps = {name: xr.DataArray(values, dims=("layer", "head")) for name, values in {
        "base": base, "derivative": base + noise * rng.random(base.shape),
        "other": rng.random((3, 4))}.items()}
    settings = Settings.of(out=tmp_path)
    with Output(retrieval_heads.PAPER, settings) as out:
        retrieval_heads._intrinsic(maps, settings, out)
    outcome = Outcome.load(out.folder)
    (claim,) = outcome.claims
    assert claim.details["models"] == ["base", "derivative"] and claim.verdict == verdict
    assert (out.folder / "similarity.png").exists()


def test_neutral_loss_feels_an_edit_of_the_decoding_phase_alone():
    import interp

    model = interp.open_model("reader")
    metric = _needles.neutral(model, 6, Settings.of().rng())
    whole = metric(model, [], ())
    decode = metric(model, [], interp.ablate([(1, h) for h in range(4)], phase="decode"))
    prefill = metric(model, [], interp.ablate([(1, h) for h in range(4)], phase="prefill"))
    assert len(whole) == 6 and (abs(decode - whole) > 1e-3).all()
    assert (abs(prefill - decode) > 1e-3).all()


def test_lengths_fit_the_model(tiny):
    model = Model(tiny("llama"), "tiny-llama")  # reads 640 tokens
    for settings in (Settings.of(), Settings.of(tiny=True)):
        sizes = _needles.lengths(model, settings)
        assert all(max(v, default=0) <= 640 - 50 for v in sizes.values()) and sizes["detect"]


@pytest.mark.parametrize("positions", [64, 128, 512, 1024])
def test_a_model_with_few_positions_gets_prompts_that_fit_or_a_reason(positions):
    """The bundled reader's language, whose prompts are as long as one likes, in shorter models."""
    import interp

    model = interp.open_model("reader")
    whole = _needles.lengths(model, Settings.of())
    model.max_positions = positions
    sizes = _needles.lengths(model, Settings.of())
    assert all(n + _needles.ANSWER <= positions for use in sizes.values() for n in use)
    assert (_needles.too_short(model, sizes) != "") == (positions == 64)
    if positions == 1024:
        assert sizes == whole


def test_a_model_that_is_too_short_leaves_reasons_and_no_failure(tmp_path, monkeypatch):
    import interp

    model = interp.open_model("reader")
    model.max_positions = 40
    monkeypatch.setattr(interp, "open_model", lambda *a, **k: model)
    outcome = execute(load("retrieval_heads"), Settings.of(model=["reader"], out=tmp_path / "out"))
    assert {claim.verdict for claim in outcome.claims} == {"not testable"}
    assert sum("40 positions" in claim.reason for claim in outcome.claims) == len(outcome.claims) - 1
