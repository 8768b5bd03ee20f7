"""The experiment on planted, unplanted and unsuitable models: verdicts follow from the truth."""

import json
import re

import numpy as np
import pandas as pd
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM
from typer.testing import CliRunner

from experiments import _planted_benchmark, _sink_subjects, secondary_sinks
from experiments.__main__ import app
from experiments._output import Output, execute
from experiments._paper import Settings, load
from interp.models.model import Model
from interp.organisms import reader
from interp.organisms.plant import massive_coordinate, primary_sink, secondary_sink
from interp.sinks import secondary

BOS, WORDS, DEPTH, ONSET, UNTIL = 1, (9, 23, 40), 14, 6, 10
KEYS = {sentence: key for key, (sentence, *_) in secondary_sinks.CLAIMS.items()}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A model with planted sinks, its twin without the secondary ones, and the bare model."""
    torch.manual_seed(5)
    bare = LlamaForCausalLM(LlamaConfig(
        vocab_size=67, hidden_size=48, intermediate_size=60, num_hidden_layers=DEPTH,
        num_attention_heads=4, num_key_value_heads=2, bos_token_id=BOS, initializer_range=0.06,
        max_position_embeddings=64, tie_word_embeddings=False)).eval()
    primary = primary_sink(bare, 2, 200.0, DEPTH - 1, attract=2.0)
    again = massive_coordinate(
        primary, {primary.dims[0]: 250.0 * float(primary.direction[primary.dims[0]].sign())},
        ONSET, DEPTH - 1)
    planted = secondary_sink(again, WORDS, ONSET, 30.0, UNTIL)
    root = tmp_path_factory.mktemp("models")
    for name, model in (("planted", planted.model), ("twin", planted.twin), ("bare", bare)):
        model.save_pretrained(root / name)
    return root


def result(folders, name, out, **more):
    settings = Settings.of(model=[str(folders / name)], out=out / name, tiny=True, **more)
    return execute(load("secondary_sinks"), settings)


def verdicts(outcome):
    return {KEYS[claim.sentence]: claim for claim in outcome.claims if claim.sentence in KEYS}


@pytest.fixture(scope="module")
def on_planted(folders, tmp_path_factory):
    return result(folders, "planted", tmp_path_factory.mktemp("out"))


def test_every_claim_has_a_verdict_and_the_planted_truth_is_confirmed(on_planted):
    found = verdicts(on_planted)
    assert found.keys() == secondary_sinks.CLAIMS.keys()
    supported = {key for key, claim in found.items() if claim.verdict == "supported"}
    expected = {
        "frequency", "mid_network", "few_levels", "aligned_out", "unlike_in", "update", "deletes",
        "leaves", "returns", "alignment", "shared_dims", "few_massive", "start_token",
        "early_jump", "vanish", "zero_changes",
    }
    assert {key: found[key] for key in expected - supported} == {}
    # A dozen prompts without a fault are not enough for a share above 0.8, and are not called so.
    assert found["one_level"].measured == 1.0 and found["one_level"].verdict == "inconclusive"
    assert found["mid_network"].details["most frequent creation layer"] == ONSET
    assert found["frequency"].details["rule"] == "relative"
    assert found["deletes"].causal and "ordinary positions" in found["deletes"].control


def test_what_cannot_be_tested_has_its_own_reason(on_planted):
    found = verdicts(on_planted)
    reasons = {key: claim.reason for key, claim in found.items() if claim.reason}
    assert "14 blocks" in reasons["official"] and "-1 does not exist" in reasons["official"]
    assert "no tokenizer" in reasons["weak_tokens"]
    assert "several sizes" in reasons["scale"] and "fine-tuning" in reasons["decorrelation"]
    assert "no better than chance" in reasons["zero_loss"]


def test_files_are_there_for_every_figure_and_result(on_planted):
    drawn = {f.name for f in on_planted.figures if f.files}
    assert drawn == set(secondary_sinks.PAPER.figures) - {"benchmark"}
    for figure in on_planted.figures:
        for file in figure.files:
            assert (on_planted.folder / file).stat().st_size > 1000
    table = pd.read_parquet(on_planted.folder / "tables" / "sinks-planted.parquet")
    chosen = table[table["label"] == "secondary"]
    assert set(chosen["token"]) <= set(WORDS) and (chosen["onset"] == ONSET).all()
    content = json.loads((on_planted.folder / "claims.json").read_text())
    assert len(content) == len(secondary_sinks.CLAIMS)


def test_without_planted_sinks_nothing_is_supported_about_them(folders, tmp_path):
    found = verdicts(result(folders, "twin", tmp_path, figure=["levels"]))
    assert found["frequency"].verdict != "supported" and found["frequency"].measured <= 0
    for key in secondary_sinks.AFTER_DETECTION:
        assert found[key].verdict == "not testable"
        assert "no secondary sink was found in 12 prompts" in found[key].reason
    assert found["few_massive"].verdict == "supported"  # the primary is planted there, too


def test_without_a_primary_sink_nothing_is_testable(folders, tmp_path):
    found = verdicts(result(folders, "bare", tmp_path, figure=["levels"]))
    assert {claim.verdict for claim in found.values()} == {"not testable"}
    assert re.search(r"no primary sink .* [01]\.\d\d times", found["one_level"].reason)
    assert "1,000 is needed" in found["few_massive"].reason


def test_an_encoder_is_refused_claim_by_claim(folders, tmp_path, tiny):
    tiny("bert").save_pretrained(tmp_path / "encoder")
    settings = Settings.of(model=[str(tmp_path / "encoder")], out=tmp_path / "out", tiny=True)
    found = verdicts(execute(load("secondary_sinks"), settings))
    reasons = {claim.reason for key, claim in found.items()
               if key not in secondary_sinks.NOT_HERE}
    assert reasons == {"encoder is an encoder: all queries see all keys, so no key is first"}


def test_an_unknown_model_is_one_sentence(tmp_path):
    done = CliRunner().invoke(app, ["run", "secondary_sinks", "--tiny", "--model",
                                    str(tmp_path / "nowhere"), "--out", str(tmp_path / "out")])
    assert done.exit_code == 1
    lines = [line for line in done.output.splitlines() if "nowhere" in line]
    assert len(lines) == 1 and "there is no folder" in lines[0]
    assert "Traceback" not in done.output


class Kept(Output):
    """An output that only remembers its claims."""

    def __init__(self):
        self.claims = []

    def claim(self, claim, model=""):
        self.claims.append(claim)


def test_a_claim_without_a_verdict_is_an_error():
    ledger = secondary_sinks.Ledger(Kept(), "a model", True)
    with pytest.raises(ValueError, match="no verdict for: one_level, frequency"):
        ledger.close()


def test_several_models_share_a_row_per_reason():
    out = Kept()
    secondary_sinks.Ledger(out, "a", True).skip(secondary_sinks.AFTER_DETECTION, "why")
    assert len(out.claims) == len(secondary_sinks.AFTER_DETECTION)
    out = Kept()
    secondary_sinks.Ledger(out, "a", False).skip(secondary_sinks.AFTER_DETECTION, "why")
    (one,) = out.claims
    assert one.verdict == "not testable" and one.reason == "why"
    assert len(one.details["claims"]) == len(secondary_sinks.AFTER_DETECTION)


# -- what it runs on by default ---------------------------------------------------------------


def test_the_default_subject_has_the_sinks_that_were_planted():
    one = _sink_subjects.subject("planted", Settings.of(tiny=True))
    found = secondary.sinks(secondary.measure(one.model, one.prompts))
    onset = round(0.47 * one.model.n_layers)
    words = {reader.TOKEN[word] for word in _sink_subjects.WORDS}
    late = found[(found["label"] == "secondary") & (found["lift"] > 2)]
    assert len(late) >= 5 and set(late["token"]) <= words and (late["onset"] == onset).all()
    # The strongest write outlives the weakest: that was not planted, it follows.
    life = late.groupby("token")["lifetime"].mean()
    strongest = reader.TOKEN[_sink_subjects.WORDS[-1]]
    assert life[strongest] == life.max() and found["norm"][found["label"] == "primary"].min() > 50


def test_a_deeper_reader_does_the_same():
    hf = reader.build(3, d_model=48, layers=2, heads=4)
    ids = torch.tensor(reader.sample(np.random.default_rng(0), 3, 40)[0])
    deep = _sink_subjects.deepened(hf, 3)
    assert len(deep.model.layers) == 6 == deep.config.num_hidden_layers
    with torch.no_grad():
        old, new = (m(input_ids=ids, use_cache=False).logits for m in (hf, deep))
    assert float((old - new).norm() / old.norm()) < 0.01
    model = Model(deep, "deep")
    assert {"mlp_in", "mlp_out", "resid_mid"} <= set(model.sites())


def test_arithmetic_is_right_and_long_enough():
    text = _sink_subjects.arithmetic(np.random.default_rng(1), 4000)
    assert len(text) >= 4000
    steps = re.findall(r"(\d+) ([-+*/]) (\d+) = (\d+)", text)
    assert len(steps) > 30
    exact = {"+": lambda a, b: a + b, "-": lambda a, b: a - b, "*": lambda a, b: a * b,
             "/": lambda a, b: a // b}
    assert all(exact[op](int(a), int(b)) == int(c) for a, op, b, c in steps)
    # Each step goes on from the number before it.
    totals = [line for line in text.splitlines() if line.startswith("Step")]
    ends = [int(re.findall(r"= (\d+)\.", line)[-1]) for line in totals]
    starts = [int(re.findall(r"(\d+) [-+/] ", line)[-1]) for line in totals]
    assert starts[1:] == ends[:-1]


def test_a_text_is_cut_to_the_context_of_the_model(tiny, letters):
    # Six characters per token are allowed for, and this tokenizer has one.
    model = Model(tiny("llama"), "short", tokenizer=letters)
    prompts = _sink_subjects.prompts_for(model, Settings.of())
    assert {len(p) for p in prompts} == {model.max_positions} == {640}
    assert prompts[0].tokens[:8] == ("<s>", *"Problem")


# -- the benchmark ----------------------------------------------------------------------------


def test_the_benchmark_finds_what_was_planted():
    table = _planted_benchmark.evaluate(Settings.of(tiny=True), 3)
    assert len(table) == 3 and table["sinks"].sum() > 0
    assert (table["hits"] == table["sinks"]).all() and (table["found"] == table["hits"]).all()
    assert (table["onsets"] == table["hits"]).all() and table["clean"].all()
    assert len(table.attrs["sinks"]) == 3


def test_the_benchmark_sees_a_bad_detector(monkeypatch):
    def late(residual, **_):
        found = score(residual, last_layer="raw")
        levels = {p: (layers[1:] if label == "secondary" else layers, label)
                  for p, (layers, label) in found.levels.items()}
        # And one false sink in every prompt.
        levels[1] = ((5, 6, 7, 8, 9, 10), "secondary")
        return secondary.SinkLevels(levels, found.n_layers)

    score = secondary.score
    monkeypatch.setattr(_planted_benchmark.secondary, "score", late)
    table = _planted_benchmark.evaluate(Settings.of(tiny=True), 2)
    assert (table["onsets"] < table["hits"]).any() and not table["clean"].any()
    assert (table["found"] > table["hits"]).all()


def test_pooled_shares_have_the_wider_of_two_intervals():
    perfect = _planted_benchmark.pooled(np.full(20, 5), np.full(20, 5))
    assert perfect.value == 1.0 and perfect.interval[0] == pytest.approx(0.963, abs=0.002)
    # Sinks of one model rise and fall together: the interval over models is wider.
    clustered = _planted_benchmark.pooled(np.array([50] * 10 + [0] * 10), np.full(20, 50))
    assert clustered.value == 0.5 and clustered.interval[1] - clustered.interval[0] > 0.3
