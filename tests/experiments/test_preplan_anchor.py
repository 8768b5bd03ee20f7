"""The experiment on a planted rhythm, on the bundled model, and where it cannot be done."""

import numpy as np
import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel
from typer.testing import CliRunner

from experiments import preplan_anchor
from experiments.__main__ import app
from experiments._output import execute
from experiments._paper import Settings, load

N, PERIOD = 96, 8


def rhythm(planted):
    """A GPT-2 that parks head L0H0, lets L0H1 jump back every eight tokens, and L0H2 reread the
    token after each jump; all others look six tokens back. Its twin has L0H1 and L0H2 like those."""
    torch.manual_seed(0)
    hf = GPT2LMHeadModel(GPT2Config(
        vocab_size=97, n_embd=192, n_layer=2, n_head=6, n_positions=128, bos_token_id=1,
        eos_token_id=2)).eval()
    t = torch.arange(N)
    jump = torch.where(t % PERIOD == PERIOD - 1, t - 9, t - 1).clamp_min(0)
    reread = ((t - 12).clamp_min(PERIOD) // PERIOD) * PERIOD
    reread = torch.where(t < 20, t, reread)
    near = (t - 6).clamp_min(0)
    plans = {(0, 0): torch.zeros_like(t), **{(i, h): near for i in (0, 1) for h in range(6)
                                            if (i, h) > (0, 2)}}
    plans |= {(0, 1): jump, (0, 2): reread} if planted else {(0, 1): near, (0, 2): near}
    rates = torch.linspace(0.03, 3.0, 16)
    code = torch.cat([(t[:, None] * rates).sin(), (t[:, None] * rates).cos()], -1)
    with torch.no_grad():
        hf.transformer.wte.weight.mul_(0.01)
        hf.transformer.wpe.weight.normal_()
        # What layer 0 adds is small beside the places.
        places = hf.transformer.h[0].ln_1(hf.transformer.wpe.weight[:N]).double()
        solve = torch.linalg.pinv(places).float()
        for (layer, head), plan in plans.items():
            block = hf.transformer.h[layer]
            for part, target in ((0, 8 * code[plan]), (1, code)):
                columns = slice(192 * part + 32 * head, 192 * part + 32 * head + 32)
                block.attn.c_attn.weight[:, columns] = solve @ target
                block.attn.c_attn.bias[columns] = 0
    return hf


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory):
    root = tmp_path_factory.mktemp("rhythm")
    made = {}
    for name in ("planted", "twin"):
        rhythm(name == "planted").save_pretrained(root / name)
        settings = Settings.of(model=[str(root / name)], out=root / f"out-{name}", tiny=True,
                               figure=None if name == "planted" else ["spans"])
        outcome = execute(load("preplan_anchor"), settings)
        made[name] = outcome, {claim.sentence: claim for claim in outcome.claims}
    return made


def test_the_planted_rhythm_is_confirmed_and_not_in_the_twin(outcomes):
    outcome, found = outcomes["planted"]
    _, twin = outcomes["twin"]
    heads = outcome.result("heads-planted")
    assert bool(heads["local"][0, 1]) and bool(heads["global"][0, 2]) and bool(heads["receiver"][0, 2])
    assert not bool(heads["eligible"][0, 0]) and heads.manifest["parked heads"] == 1
    for sentence in (preplan_anchor.PARKED, preplan_anchor.RECEIVER, preplan_anchor.FOLLOWS):
        assert found[sentence].verdict == "supported", (sentence, found[sentence])
    assert found[preplan_anchor.FOLLOWS].details["p"] < 0.05
    assert twin[preplan_anchor.FOLLOWS].measured < found[preplan_anchor.FOLLOWS].measured / 2
    # The tokens that were planted to be reread are the anchors.
    lift = heads["fai_lift"].isel(sample=0).values
    top = np.argsort(-np.nan_to_num(lift))[:6]
    assert (top % PERIOD == 0).all()


def test_every_claim_has_its_control_or_its_reason(outcomes):
    outcome, found = outcomes["planted"]
    assert set(preplan_anchor.TESTED) < set(found)
    causal = [c for c in outcome.claims if c.causal]
    assert {c.sentence for c in causal} == {preplan_anchor.MATTER, preplan_anchor.MATCHED}
    assert all(c.control for c in causal)
    assert all(c.control for s, c in found.items()
               if s in (preplan_anchor.UNCERTAIN, preplan_anchor.RECEIVER, preplan_anchor.FOLLOWS))
    (learning,) = [c for c in outcome.claims if "reinforcement" in c.sentence]
    assert learning.verdict == "not testable" and "different rewards" in learning.reason


def test_every_figure_is_there(outcomes):
    outcome, _ = outcomes["planted"]
    assert {f.name for f in outcome.figures if f.files} == set(preplan_anchor.PAPER.figures)
    assert all(len(f.png) > 1000 for f in outcome.figures)


def test_the_bundled_reader_by_default(tmp_path):
    settings = Settings.of(out=tmp_path, tiny=True, figure=["spans"])
    outcome = execute(load("preplan_anchor"), settings)
    assert outcome.models == ("reader",)
    found = {claim.sentence: claim for claim in outcome.claims}
    assert set(preplan_anchor.TESTED) < set(found)
    assert not any(found[s].reason for s in preplan_anchor.TESTED)
    done = outcome.result("changes-reader")["jaccard"]
    assert done.dims == ("condition", "sample", "position") and done.sizes["condition"] == 4


def test_an_encoder_is_told_why(tiny, tmp_path):
    tiny("bert").save_pretrained(tmp_path / "encoder")
    settings = Settings.of(model=[str(tmp_path / "encoder")], out=tmp_path / "out", tiny=True)
    outcome = execute(load("preplan_anchor"), settings)
    tested = [c for c in outcome.claims if c.sentence in preplan_anchor.TESTED]
    assert len(tested) == len(preplan_anchor.TESTED)
    assert all("heads look ahead" in c.reason for c in tested)
    assert all("heads look ahead" in f.reason for f in outcome.figures)


def test_short_windows_leave_nothing_to_test(tiny, tmp_path):
    tiny("mistral").save_pretrained(tmp_path / "windowed")  # every head sees five tokens
    settings = Settings.of(model=[str(tmp_path / "windowed")], out=tmp_path / "out", tiny=True)
    outcome = execute(load("preplan_anchor"), settings)
    assert all("no head is eligible" in c.reason for c in outcome.claims
               if c.sentence in preplan_anchor.TESTED)


def test_an_unknown_model_is_one_sentence(tmp_path):
    done = CliRunner().invoke(app, ["run", "preplan_anchor", "--tiny", "--model",
                                    str(tmp_path / "nowhere"), "--out", str(tmp_path / "out")])
    assert done.exit_code == 1 and "Traceback" not in done.output
    lines = [line for line in done.output.splitlines() if "nowhere" in line]
    assert len(lines) == 1 and "there is no folder" in lines[0]
