"""The Future Lens where the token after the next was planted in the states, and where it was not."""

import numpy as np
import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel
from typer.testing import CliRunner

from experiments import _contexts, future_lens
from experiments.__main__ import app
from experiments._output import execute
from experiments._paper import Settings, load

CLAIMS = {key: sentence for key, (sentence, _) in future_lens.FutureLens.claims.items()}


def copier(planted):
    """A GPT-2 that says the token three back: a head copies the one two before the state. In the
    planted one another head keeps the token just before it, which is what comes after the next; in
    the twin that head writes nothing."""
    torch.manual_seed(0)
    hf = GPT2LMHeadModel(GPT2Config(
        vocab_size=30, n_embd=160, n_layer=2, n_head=5, n_positions=64, bos_token_id=1, eos_token_id=2,
        tie_word_embeddings=False)).eval()
    t = torch.arange(64)
    rates = torch.linspace(0.03, 3.0, 16)
    code = torch.cat([(t[:, None] * rates).sin(), (t[:, None] * rates).cos()], -1)
    with torch.no_grad():
        for weight in hf.parameters():
            if weight.ndim > 1:
                weight.mul_(0.05)
        wte, wpe, block = hf.transformer.wte.weight, hf.transformer.wpe.weight, hf.transformer.h[0]
        wte.zero_(), wpe.zero_(), hf.lm_head.weight.zero_()
        wte[:, :30] = 3 * torch.eye(30)
        wpe[:, 96:] = torch.eye(64) * 6
        hf.lm_head.weight[:, 32:62] = 5 * torch.eye(30)
        places = torch.linalg.pinv(block.ln_1(wpe).double()).float()
        c, o = block.attn.c_attn, block.attn.c_proj
        for head, back, into in ((0, 2, 32), (1, 1, 64)):
            rows = slice(32 * head, 32 * head + 32)
            c.weight[:, rows] = places @ (12 * code[(t - back).clamp_min(0)])
            c.weight[:, 160 + 32 * head: 192 + 32 * head] = places @ code
            c.weight[:, 320 + 32 * head: 352 + 32 * head] = 0
            c.weight[:30, 320 + 32 * head: 350 + 32 * head] = torch.eye(30)
            o.weight[rows] = 0
            if planted or head == 0:
                o.weight[32 * head: 32 * head + 30, into: into + 30] = 2 * torch.eye(30)
    return hf


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory):
    root = tmp_path_factory.mktemp("copier")
    made = {}
    for name in ("planted", "twin"):
        copier(name == "planted").save_pretrained(root / name)
        outcome = execute(load("future_lens"), Settings.of(
            model=[str(root / name)], out=root / f"out-{name}", tiny=True,
            figure=None if name == "planted" else ["surprisal"]))
        made[name] = outcome, {claim.sentence: claim for claim in outcome.claims}
    return made


def test_what_was_planted_is_read_and_not_in_the_twin(outcomes):
    (outcome, found), (_, twin) = outcomes["planted"], outcomes["twin"]
    claim = found[CLAIMS["linear"]]
    assert claim.verdict == "supported" and claim.details["read"] > 0.5, claim
    other = twin[CLAIMS["linear"]]
    assert other.verdict != "supported" and other.details["read"] < claim.details["read"] / 2
    # Token pairs say nothing of random tokens, and the model says what it was built to say.
    data = outcome.result("readings-planted")
    assert float(data["hit"].sel(line="pairs", layer=-1, step=1).mean()) < 0.2
    assert float(data["hit"].sel(line="linear", layer=1, step=0).mean()) > 0.7


def test_the_model_is_the_copier_it_is_taken_for(outcomes):
    hf = copier(True)
    ids = torch.tensor(np.random.default_rng(0).integers(3, 30, (4, 30)))
    said = hf(ids).logits.argmax(-1)
    assert torch.equal(said[:, 3:], ids[:, 1:-2])


def test_lines_that_feed_nothing_agree_with_those_that_do_at_the_next_token(outcomes):
    data = outcomes["planted"][0].result("readings-planted")["hit"].sel(step=0)
    for line in ("learned", "fixed", "none", "shuffled", "mean"):
        free, fed = data.sel(line=line), data.sel(line=f"{line}, fed")
        assert np.array_equal(free.values, fed.values, equal_nan=True)
    top = outcomes["planted"][0].result("readings-planted")["precision_at"].values
    assert (np.diff(top[np.isfinite(top[..., 0])], axis=-1) >= 0).all()


def test_every_claim_has_a_verdict_its_control_or_its_reason(outcomes):
    outcome, found = outcomes["planted"]
    assert set(found) == set(CLAIMS.values()) and len(outcome.claims) == len(CLAIMS)
    assert {s for s, c in found.items() if c.causal} == {CLAIMS["carried"], CLAIMS["fed"]}
    assert all(c.control for c in found.values() if c.causal)
    assert "the Pile" in found[CLAIMS["count"]].reason
    assert found[CLAIMS["count"]].paper_number == "20.1 %"
    assert "go on with a word" in found[CLAIMS["words"]].reason


def test_every_figure_is_there(outcomes):
    outcome, _ = outcomes["planted"]
    assert {f.name for f in outcome.figures if f.files} == set(future_lens.PAPER.figures)
    assert all(len(f.png) > 1000 for f in outcome.figures)


def test_the_bundled_reader_by_default(tmp_path):
    outcome = execute(load("future_lens"), Settings.of(out=tmp_path, tiny=True, figure=["lens"]))
    assert outcome.models == ("reader",)
    reasons = {c.sentence for c in outcome.claims if c.reason}
    assert reasons <= {CLAIMS["count"], CLAIMS["words"], CLAIMS["middle"]}
    assert [f.name for f in outcome.figures if f.files] == ["lens"]


@pytest.mark.parametrize("architecture", ["gemma2"])
def test_a_random_model_with_a_tokenizer(tiny, letters, tmp_path, architecture):
    """A state that is carried makes any model go on much as it would: what is read may be more than
    counts, but the hidden layers are neither early nor late for a model that has learned nothing."""
    tiny(architecture).save_pretrained(tmp_path / "random")
    letters.save_pretrained(tmp_path / "random")
    outcome = execute(load("future_lens"), Settings.of(
        model=[str(tmp_path / "random")], out=tmp_path / "out", tiny=True, figure=["lens"]))
    found = {c.sentence: c for c in outcome.claims}
    assert set(found) == set(CLAIMS.values())
    assert found[CLAIMS["middle"]].verdict != "supported"
    data = outcome.result("readings-random")["hit"]
    # What the last block puts out is what the next token is read from.
    assert float(data.sel(line="linear", layer=2, step=0).mean()) > float(
        data.sel(line="shuffled", step=0).mean()) + 0.2


def test_an_encoder_and_an_unknown_model_are_told_why(tiny, tmp_path):
    tiny("bert").save_pretrained(tmp_path / "encoder")
    outcome = execute(load("future_lens"), Settings.of(
        model=[str(tmp_path / "encoder")], out=tmp_path / "out", tiny=True))
    assert {c.reason for c in outcome.claims} == {
        "encoder is an encoder: it does not go on with a text"}
    assert len(outcome.claims) == len(CLAIMS)
    done = CliRunner().invoke(app, ["run", "future_lens", "--tiny", "--model",
                                    str(tmp_path / "nowhere"), "--out", str(tmp_path / "out")])
    assert done.exit_code == 1 and "Traceback" not in done.output
    lines = [line for line in done.output.splitlines() if "nowhere" in line]
    assert len(lines) == 1 and "there is no folder" in lines[0]


def test_layers_are_spread_and_never_the_last():
    for n in range(2, 40):
        layers = _contexts.spread(n, 6)
        assert layers == sorted(set(layers)) and len(layers) <= 6
        assert layers[0] == 0 and layers[-1] == max(0, n - 2)
