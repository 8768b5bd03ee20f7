"""The experiment on the real encoder, on a finished run, and on models that read no sentences."""

import copy

import numpy as np
import pandas as pd
import pytest
import torch
from typer.testing import CliRunner

from experiments import sticky_tokens
from experiments.__main__ import app
from experiments._output import execute
from experiments._paper import Settings, load
from experiments._released_sticky import RELEASED
from probes import sticky_found

CLAIMS = {key: sentence for key, (sentence, _) in sticky_tokens.Sticky.claims.items()}
MINILM = "all-minilm-l6-v2"


def ran(model, out, **more):
    settings = Settings.of(model=[str(model)], out=out, tiny=True, **more)
    outcome = execute(load("sticky_tokens"), settings)
    found = {claim.sentence: claim for claim in outcome.claims}
    assert len(found) == len(outcome.claims) == len(CLAIMS)
    return outcome, {key: found[sentence] for key, sentence in CLAIMS.items()}


class Finished:
    """What a whole run leaves behind, made up: two of the published tokens and two others."""

    mean_similarity_, threshold_, cutoff_ = 0.19984, 49.2, 0.82
    usable_ = {i: "x" for i in range(23699)}
    sticky_ids_ = [101, 1063, 2000, 2001]
    candidates_ = [*sticky_ids_, *range(3000, 3036)]
    pull_rate_ = pd.Series([0.87, 0.86, 0.85, 0.84, *np.linspace(0.6, 0.7, 36)], index=candidates_)
    null_pull_rate_ = pd.Series(np.linspace(0.3, 0.6, 40), index=range(4000, 4040))
    null_sticky_ids_, missed_, agreement_, sampled_ = [4039], None, None, []
    scores_ = pd.DataFrame({"score": np.linspace(5, 60, 50), "intact": 0.4}, index=range(50))
    get_params = staticmethod(dict)


def test_the_encoder_has_every_figure_and_a_reason_for_what_is_missing(tmp_path):
    outcome, found = ran(MINILM, tmp_path)
    assert {f.name for f in outcome.figures if f.files} == set(sticky_tokens.PAPER.figures)
    assert found["usable"].verdict == "supported" and found["usable"].measured == 23699
    assert found["mean"].verdict == "supported"
    for key in ("count", "list"):
        assert "5 of 23699 tokens were scored" in found[key].reason
        assert f"`python -m probes.sticky_tokens {MINILM}`" in found[key].reason
    assert "NFCorpus" in found["downstream"].reason
    for key in ("size", "vocabulary"):
        assert found[key].n == len(RELEASED) == 37 and abs(found[key].measured) < 0.5
    assert found["benign"].verdict == "inconclusive" and found["benign"].n == 3


def test_a_finished_run_is_shown(tmp_path, monkeypatch):
    folder = tmp_path / "cache" / "sticky_tokens" / MINILM
    sticky_found.save(Finished(), folder)
    _, found = ran(MINILM, tmp_path, figure=["rates"])
    assert found["count"].details["found"] == 4 and found["count"].measured == pytest.approx(
        np.log2(4 / 21))
    assert found["count"].verdict == "refuted"
    # Two of 4 + 21 - 2 are common.
    assert found["list"].measured == pytest.approx(2 / 23) and found["list"].verdict == "refuted"
    assert found["mean"].verdict == "supported" and found["mean"].interval == (0.19984, 0.19984)
    assert found["intact"].verdict == "refuted"
    assert found["null"].n == 40


@pytest.mark.parametrize("architecture", ("llama", "bert"))
def test_random_models_support_nothing_of_their_own(tiny, tmp_path, architecture):
    from transformers import AutoTokenizer

    from interp.models.open import _locate

    config = copy.deepcopy(tiny(architecture).config)
    tokenizer = AutoTokenizer.from_pretrained(_locate(MINILM)[0])
    config.vocab_size = len(tokenizer)
    torch.manual_seed(0)
    type(tiny(architecture))(config).save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    _, found = ran(tmp_path / "model", tmp_path / "out", figure=["curves"])
    # How copies are read is up to the tokenizer, whatever the weights.
    assert {key for key, claim in found.items() if claim.verdict == "supported"} <= {"intact"}
    assert found["usable"].verdict == "not testable" and found["size"].n == 37


def test_a_model_that_reads_no_english_has_its_reason(tmp_path):
    _, found = ran("reader", tmp_path, figure=["counts"])
    assert "reads no English" in found["stronger"].reason and found["size"].n == 37


def test_an_unknown_model_is_one_sentence(tmp_path):
    done = CliRunner().invoke(app, ["run", "sticky_tokens", "--tiny", "--model",
                                    str(tmp_path / "nowhere"), "--out", str(tmp_path / "out")])
    assert done.exit_code == 1 and "Traceback" not in done.output
    assert sum("there is no folder" in line for line in done.output.splitlines()) == 1
