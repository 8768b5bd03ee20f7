"""The experiment on planted, plain and unsuitable models: verdicts follow from what was planted."""

import copy

import numpy as np
import pytest
import torch
import transformers as t
from typer.testing import CliRunner

from experiments import _passages, bert_attention
from experiments.__main__ import app
from experiments._output import execute
from experiments._paper import Settings, load

PREVIOUS = "Some heads put more than half of their attention on the previous token."
NEXT = PREVIOUS.replace("previous", "next")
HALF = "In the middle layers more than half of all attention goes to separators."
SELF = "Separators attend to separators, with more than nine tenths of their attention."
CLUSTER = "Heads of one layer attend alike."


def planted(tiny):
    """A GPT-2 in which L0H1 reads the previous token, and all later heads the separators."""
    hf = copy.deepcopy(tiny("gpt2"))
    n, end, axis = 64, hf.config.eos_token_id, 40
    angles = torch.arange(n)[:, None] * torch.tensor([0.3, 0.9, 1.7, 2.5])
    code = torch.cat([angles.sin(), angles.cos()], -1)
    with torch.no_grad():
        hf.transformer.wte.weight.mul_(0.02)
        hf.transformer.wte.weight[:, axis] = 0
        # Places are circles, so that a turn takes each to the one before.
        hf.transformer.wpe.weight.zero_()
        hf.transformer.wpe.weight[:n, :16] = torch.cat([code, -code], -1)
        first, *later = hf.transformer.h
        solve = torch.linalg.pinv(first.ln_1(hf.transformer.wpe.weight[:n]).double()).float()
        for part, target in ((0, 12 * code[(torch.arange(n) - 1).clamp_min(0)]), (1, code)):
            columns = slice(48 * part + 8, 48 * part + 16)
            first.attn.c_attn.weight[:, columns] = solve @ target
            first.attn.c_attn.bias[columns] = 0
        # The separator alone has a coordinate of its own; what layer 0 adds leaves it alone.
        hf.transformer.wte.weight[end, axis] = 60.0
        for block in hf.transformer.h:
            block.attn.c_proj.weight[:, axis] = 0
            block.mlp.c_proj.weight[:, axis] = 0
        for block in later:
            block.attn.c_attn.weight[:, :96] = 0
            block.attn.c_attn.bias[:48] = 1.0
            block.attn.c_attn.weight[axis, 48:96] = 3.0
    return hf


@pytest.fixture(scope="module")
def outcomes(tiny, tmp_path_factory):
    """Claims by sentence, and the outcome, on the planted model and on its plain twin."""
    root = tmp_path_factory.mktemp("bert")
    planted(tiny).save_pretrained(root / "planted")
    tiny("gpt2").save_pretrained(root / "twin")
    made = {}
    for name in ("planted", "twin"):
        figure = ["entropy"] if name == "twin" else None
        settings = Settings.of(model=[str(root / name)], out=root / f"out-{name}", tiny=True,
                               figure=figure)
        outcome = execute(load("bert_attention"), settings)
        made[name] = outcome, {claim.sentence: claim for claim in outcome.claims}
    return made


def test_planted_heads_are_confirmed_and_not_in_the_twin(outcomes):
    _, found = outcomes["planted"]
    _, twin = outcomes["twin"]
    assert found[PREVIOUS].verdict == "supported" and found[PREVIOUS].measured > 0.8
    assert "L0H1" in found[PREVIOUS].details["heads above 0.5"]
    assert found[HALF].verdict == "supported" and found[SELF].verdict == "supported"
    assert found["Heads of fixed offsets sit in the first half of the layers."].verdict == "supported"
    assert found[CLUSTER].verdict == "supported"
    for sentence in (PREVIOUS, HALF, SELF):
        assert twin[sentence].verdict == "refuted", sentence


def test_what_cannot_be_tested_has_its_reason(outcomes):
    outcome, found = outcomes["planted"]
    assert "causal" in found[NEXT].reason
    assert "treebank" in found["Single heads find single relations: determiners, objects, "
                               "possessives."].reason
    assert "sees itself alone" in found["In the last layer the start token attends broadly, unlike "
                                        "before."].reason
    untestable = [c for c in outcome.claims if c.verdict == "not testable"]
    assert all(c.reason for c in untestable)
    causal = [c for c in outcome.claims if c.causal]
    assert len(causal) == 2 and all("5 seeds" in c.control for c in causal)


def test_every_figure_is_there(outcomes):
    outcome, _ = outcomes["planted"]
    assert {f.name for f in outcome.figures if f.files} == set(bert_attention.PAPER.figures)
    assert all(len(f.png) > 1000 for f in outcome.figures)
    assert set(outcome.manifest["data"]) == {
        "heads-planted", "gradient-planted", "hiding-separator-planted", "hiding-start-planted",
        "clusters-planted"}


def test_the_real_encoder_looks_at_neighbors_and_at_its_start_token(tmp_path):
    settings = Settings.of(model=["all-minilm-l6-v2"], out=tmp_path, tiny=True, figure=["entropy"])
    found = {c.sentence: c for c in execute(load("bert_attention"), settings).claims}
    assert found[PREVIOUS].verdict == found[NEXT].verdict == "supported"
    assert "L0H2" in found[PREVIOUS].details["heads above 0.5"]
    assert found[HALF].verdict == "refuted"
    (sink,) = [c for s, c in found.items() if "start token, not a separator" in s]
    assert sink.verdict == "supported" and sink.details["on the start token"] > 0.2
    assert sink.details["uniform"] < 0.05


def test_an_encoder_without_words_or_loss_is_told_why(tiny, tmp_path):
    torch.manual_seed(0)
    t.BertModel(tiny("bert").config).save_pretrained(tmp_path / "encoder")
    settings = Settings.of(model=[str(tmp_path / "encoder")], out=tmp_path / "out", tiny=True,
                           figure=["entropy"])
    found = {c.sentence: c for c in execute(load("bert_attention"), settings).claims}
    assert found[HALF].reason == "no text has a separator"
    (hidden,) = [c for s, c in found.items() if "hiding separators" in s]
    assert "no vocabulary head" in hidden.reason
    assert found[NEXT].verdict == "refuted" and found[CLUSTER].verdict != "not testable"


def test_an_unknown_model_is_one_sentence(tmp_path):
    done = CliRunner().invoke(app, ["run", "bert_attention", "--tiny", "--model",
                                    str(tmp_path / "nowhere"), "--out", str(tmp_path / "out")])
    assert done.exit_code == 1 and "Traceback" not in done.output
    lines = [line for line in done.output.splitlines() if "nowhere" in line]
    assert len(lines) == 1 and "there is no folder" in lines[0]


def test_the_middle_layers_are_those_of_the_paper():
    assert bert_attention._layers(12, *bert_attention.MIDDLE) == [5, 6, 7, 8, 9]
    assert bert_attention._layers(12, bert_attention.LATER) == list(range(4, 12))
    assert bert_attention._layers(1, *bert_attention.MIDDLE) == [0]


def test_a_head_is_chosen_on_other_texts():
    import xarray as xr

    noise = np.random.default_rng(0).random((40, 3, 50))
    chosen = bert_attention._other_half(xr.DataArray(noise, dims=("sample", "layer", "head")))
    # The best of 150 by luck is no better than any on texts that it was not chosen on.
    assert noise.mean(0).max() > 0.6 and abs(chosen.mean() - 0.5) < 0.12


def test_passages_are_all_different_and_joined_as_pairs():
    import interp

    texts = [half for pair in _passages.PASSAGES for half in pair]
    assert len(set(texts)) == len(texts) >= 40
    model = interp.open_model("all-minilm-l6-v2")
    whole, first, _ = _passages.pairs(model, 3, longest=60)
    sep = model.tokenizer.sep_token_id
    assert [len(p) for p in whole] == [60] * 3 and all(p.ids[-1] == sep for p in whole)
    kinds = whole[0].inputs["token_type_ids"][0]
    assert kinds.shape == (60,) and kinds[0] == 0 and kinds[-1] == 1
    assert first[0].ids.count(sep) == 1


def test_a_model_that_reads_no_english_gets_texts_without_picture_placeholders():
    import interp

    model = interp.open_model("looker")
    assert not _passages.readable(model)
    assert _passages.readable(interp.open_model("all-minilm-l6-v2"))
    texts, what = _passages.other_texts(model, 40, 60, np.random.default_rng(0))
    used = {token for prompt in texts for token in prompt.ids}
    assert what == "random tokens" and model.hf.config.image_token_id not in used
    assert len(used) > 0.6 * model.d_vocab and {len(p) for p in texts} == {60}
    bos = model.config.get_text_config().bos_token_id
    assert all(p.ids[0] == bos and bos not in p.ids[1:] for p in texts)
    toy, what = _passages.other_texts(interp.open_model("backcopy-1l"), 2, 20,
                                      np.random.default_rng(0))
    assert what == "sequences of the toy task" and [len(p) for p in toy] == [20, 20]
