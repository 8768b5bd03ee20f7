"""The experiment on planted, unplanted and unsuitable models: verdicts follow from the truth."""

from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
from typer.testing import CliRunner

import interp
from experiments import _conflicts, knowledge_conflict
from experiments.__main__ import app
from experiments._output import execute
from experiments._paper import Settings, load
from interp.core import Result
from interp.models.model import Model
from interp.organisms import conflict_circuit as planted
from interp.organisms import reader
from interp.prompts.counterfactual import Pair

KEYS = {sentence: key for key, sentence in knowledge_conflict.CLAIMS.items()}


def verdicts(outcome):
    return {KEYS[claim.sentence]: claim for claim in outcome.claims}


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """Runs the experiment on a circuit; its conflicts are asked in the circuit's own language."""
    made = {}

    def once(name, relations=1, **kinds):
        cases = [replace(case, relation=f"relation {int(case.subject) // 2 % relations}")
                 for case in planted.cases()]
        if name not in made:
            out = tmp_path_factory.mktemp(name)
            with pytest.MonkeyPatch.context() as patch:
                model = Model(planted.build(**kinds), name)
                patch.setattr(interp, "open_model", lambda *_, **__: model,
                              raising=False)
                patch.setattr(knowledge_conflict, "cases_for", lambda *_: cases)
                # Drawing is slow: one run draws everything.
                some = None if name == "planted" else ["transfer"]
                settings = Settings.of(model=[name], out=out, tiny=True, figure=some)
                made[name] = execute(load("knowledge_conflict"), settings)
        return made[name]

    return once


def test_every_claim_has_a_verdict_and_the_planted_truth_is_confirmed(run):
    found = verdicts(run("planted"))
    assert found.keys() == knowledge_conflict.CLAIMS.keys()
    expected = {"memory_heads", "context_heads", "late", "to_memory", "to_context", "formats",
                "transfer"}
    assert {k: c.verdict for k, c in found.items() if k in expected} == dict.fromkeys(
        expected, "supported")
    heads = [{f"L{layer}H{head}" for layer, head in some}
             for some in (planted.MEMORY_HEADS, planted.CONTEXT_HEADS)]
    assert found["memory_heads"].details["head"] in heads[0]
    assert found["context_heads"].details["head"] in heads[1]
    pruned = found["to_memory"].details["heads pruned"]
    assert set(pruned[:2]) <= heads[1] and set(pruned).isdisjoint(heads[0])
    # None of the planted heads changes sides, and what random heads do is nothing.
    assert found["superposition"].measured == 0.0
    assert found["superposition"].verdict != "supported"
    assert found["to_memory"].details["usage, random heads"] == pytest.approx(
        found["to_memory"].details["usage before"])
    for key in ("to_memory", "to_context", "transfer"):
        assert found[key].causal and "random heads" in found[key].control


def test_what_cannot_be_tested_says_why(run):
    found = verdicts(run("planted"))
    assert "1 relation" in found["relations"].reason
    assert "no tokenizer" in found["neutral"].reason
    assert {k for k, c in found.items() if c.verdict == "not testable"} == {"relations", "neutral"}


def test_several_relations_are_compared_and_pruned_across(run):
    outcome = run("two-relations", relations=2)
    found = verdicts(outcome)
    assert found["relations"].verdict == "supported" and found["transfer"].verdict == "supported"
    matrix = Result.load(outcome.folder / "data" / "transfer-two-relations")
    assert matrix["gain"].shape == matrix["agreement"].shape == (4, 4)
    assert (matrix["agreement"] > 0.2).all() and (matrix["gain"] >= 0).all()
    assert float(matrix["gain"].mean()) > 0.2
    assert "relation 1, coherent" in matrix["found_on"].values


def test_without_context_heads_nothing_about_them_is_supported(run):
    found = verdicts(run("no-context", context=False))
    assert found["memory_heads"].verdict == "supported"
    for key in ("context_heads", "to_memory", "transfer"):
        assert found[key].verdict != "supported", found[key]


def test_a_model_that_knows_nothing_is_told_so(run):
    found = verdicts(run("forgot", memory=False))
    assert {claim.verdict for claim in found.values()} == {"not testable"}
    assert found["late"].reason == "forgot knows 0 of 24 facts without a context; 10 are needed"


def test_files_are_there_for_every_figure_and_result(run):
    outcome = run("planted")
    assert {f.name for f in outcome.figures if f.files} == set(knowledge_conflict.PAPER.figures)
    for figure in outcome.figures:
        for file in figure.files:
            assert (outcome.folder / file).stat().st_size > 1000
    heads = Result.load(outcome.folder / "data" / "heads-planted")
    assert "toolkit" in heads.manifest["formula"]
    pruned = Result.load(outcome.folder / "data" / "pruning-planted")
    assert set(pruned["against"].values) == {"memory", "context"}
    assert isinstance(pruned.to_dataframe(), pd.DataFrame)


def test_models_that_cannot_be_asked_are_refused_claim_by_claim(tiny, tmp_path):
    for name, reason in (("llama", "no tokenizer"), ("bert", "is an encoder")):
        tiny(name).save_pretrained(tmp_path / name)
        settings = Settings.of(model=[str(tmp_path / name)], out=tmp_path / "out" / name, tiny=True)
        outcome = execute(load("knowledge_conflict"), settings)
        found = verdicts(outcome)
        assert found.keys() == knowledge_conflict.CLAIMS.keys()
        assert all(reason in claim.reason for claim in found.values())
        assert all(reason in figure.reason for figure in outcome.figures)


def test_an_unknown_model_is_one_sentence(tmp_path):
    done = CliRunner().invoke(app, ["run", "knowledge_conflict", "--tiny", "--model",
                                    str(tmp_path / "nowhere"), "--out", str(tmp_path / "out")])
    assert done.exit_code == 1
    lines = [line for line in done.output.splitlines() if "nowhere" in line]
    assert len(lines) == 1 and "there is no folder" in lines[0]


# -- conflicts in the reader's language -------------------------------------------------------


def test_the_readers_conflicts_are_sound():
    made = _conflicts.reader_conflicts(np.random.default_rng(5), per_city=2)
    assert len(made) == 2 * 3 * len(reader.CITIES)
    for case in made:
        key = reader.TOKEN[case.subject]
        assert list(case.memory) == reader.MEMORY[key] and len(case.clean) == _conflicts.LENGTH
        assert case.clean.ids[-2:] == (reader.RECALL, key) == case.closed_book.ids[-2:]
        assert key not in case.closed_book.ids[:-2] and key not in case.corrupt.ids
        stated = [s for s in case.clean.segments if s.name.startswith("object")]
        assert len(stated) == {"none": 0, "substitution": 1, "coherent": 2}[case.format]
        for segment in stated:
            assert tuple(case.clean.ids[p] for p in segment.positions) == case.context
            assert case.clean.ids[segment.start - 1] == key
            twin = [case.corrupt.ids[p] for p in segment.positions]
            # Neither answer's first word is anywhere in what the twin states.
            assert not {case.memory[0], case.context[0]} & set(twin)
        places = {p for s in stated for p in (*s.positions, s.start - 1)} | {len(case.clean) - 1}
        assert set(Pair(case.clean, case.corrupt).differing) <= places
