"""Token erasure where it was planted in the states of a model, in its twin, and where there is none."""

import copy

import numpy as np
import pytest
import xarray as xr
from tokenizers import decoders
from typer.testing import CliRunner

from experiments import _lexical_items, token_erasure
from experiments.__main__ import app
from experiments._output import execute
from experiments._paper import Settings, load
from interp.organisms import reader

CLAIMS = {key: sentence for key, (sentence, _) in token_erasure.TokenErasure.claims.items()}


@pytest.fixture(scope="module")
def spelled(letters):
    """The tokenizer of characters, whose characters join to words again when they are decoded."""
    made = copy.deepcopy(letters)
    made.backend_tokenizer.decoder = decoders.Fuse()
    return made


def planted_states(erases):
    """In place of a model's: every state holds its token and the two before it; from block 1 on, the
    last token of a word of several tokens holds nothing of them, if `erases`."""
    codes = np.random.default_rng(0).standard_normal((3, 97, 200))

    def states(model, prompts, positions, *, layers, embedding=True):
        rng = np.random.default_rng(1)
        made, where, which = [], [], []
        for number, (prompt, places) in enumerate(zip(prompts, positions)):
            ids = np.array(prompt.ids)
            x = codes[0][ids].copy()
            for back in (1, 2):
                x[back:] += codes[back][ids[:-back]]
            forgot = x.copy()
            if erases and "reinitialized" not in model.name:
                for _, q in _lexical_items.words(model.tokenizer, prompt.ids, 1):
                    forgot[q] = 0
            all_layers = ([-1] if embedding else []) + list(layers)
            made.append(np.stack([(forgot if layer >= 1 else x) + 0.5 * rng.standard_normal(x.shape)
                                  for layer in all_layers])[:, places])
            where += list(places)
            which += [number] * len(places)
        return xr.DataArray(np.concatenate(made, 1), dims=("layer", "sample", "d_model"), coords={
            "layer": all_layers, "prompt": ("sample", which), "position": ("sample", where)})

    return states


def outcome_of(tiny, spelled, folder, architecture="llama", figure=None):
    tiny(architecture).save_pretrained(folder / architecture)
    spelled.save_pretrained(folder / architecture)
    outcome = execute(load("token_erasure"), Settings.of(
        model=[str(folder / architecture)], out=folder / "out", tiny=True, figure=figure))
    return outcome, {claim.sentence: claim for claim in outcome.claims}


@pytest.mark.parametrize("erases", [True, False])
def test_planted_erasure_is_found_and_its_twin_is_clean(tiny, spelled, tmp_path, monkeypatch, erases):
    monkeypatch.setattr(token_erasure, "layer_states", planted_states(erases))
    outcome, found = outcome_of(tiny, spelled, tmp_path, figure=None if erases else ["scores"])
    assert set(found) == set(CLAIMS.values())
    verdicts = {key: found[sentence].verdict for key, sentence in CLAIMS.items()}
    if not erases:
        assert "supported" not in verdicts.values(), verdicts
        return
    assert set(verdicts.values()) == {"supported"}, verdicts
    assert all(c.control for c in found.values())
    assert found[CLAIMS["forgets 0"]].details["start"] == 0
    assert found[CLAIMS["forgets 0"]].details["end"] == 1
    recall = found[CLAIMS["recall"]].details
    assert recall["recall"] > 3 * recall["shuffled"]
    assert {f.name for f in outcome.figures if f.files} == set(token_erasure.PAPER.figures)


@pytest.mark.parametrize("architecture", ["gpt2", "qwen3"])
def test_a_random_model_forgets_nothing_in_particular(tiny, spelled, tmp_path, architecture):
    _, found = outcome_of(tiny, spelled, tmp_path, architecture, ["scores"])
    assert set(found) == set(CLAIMS.values())
    assert "supported" not in {c.verdict for c in found.values()}, {
        s: (c.measured, c.interval) for s, c in found.items() if c.verdict == "supported"}


def test_the_bundled_reader_by_default(tmp_path):
    outcome = execute(load("token_erasure"), Settings.of(out=tmp_path, tiny=True, figure=["accuracy"]))
    assert outcome.models == ("reader",) and len(outcome.claims) == len(CLAIMS)
    assert not any(c.reason for c in outcome.claims if c.sentence != CLAIMS["precision"])
    data = outcome.result("probes-reader")
    # The embedding holds its own token and no other.
    own = data["correct"].sel(layer=-1).mean("sample")
    assert float(own.sel(offset=0)) > 0.9 > 0.5 > float(own.sel(offset=-1))


def test_documents_of_the_reader_hold_the_items_that_they_name():
    for seed in range(3):
        ids, items, others = _lexical_items._records(np.random.default_rng(seed), 128)
        assert len(ids) <= 128 and ids[0] == reader.BOS and len(items) >= 2 and len(others) >= 2
        for p, q in items:
            assert ids[p - 1] == reader.RECALL and ids[p + 1: q + 1] == reader.MEMORY[ids[p]]
        for p, q in others:
            assert reader.WORDS[ids[p]] in reader.KEYS and ids[q + 1] == reader.END


def test_words_are_runs_of_tokens_without_a_blank(spelled):
    ids = spelled("one, to a box")["input_ids"]
    spans = _lexical_items.words(spelled, ids, 1)
    assert ["".join(spelled.convert_ids_to_tokens(ids[p: q + 1])) for p, q in spans] == [
        "one", "to", "box"]


def test_models_that_cannot_be_read_are_told_why(tiny, tmp_path):
    for name, reason in (("bert", "is an encoder"), ("opt", "reads none")):
        tiny(name).save_pretrained(tmp_path / name)
        outcome = execute(load("token_erasure"), Settings.of(
            model=[str(tmp_path / name)], out=tmp_path / f"out-{name}", tiny=True))
        assert len(outcome.claims) == len(CLAIMS)
        assert all(reason in c.reason for c in outcome.claims)
        assert all(reason in f.reason for f in outcome.figures)
    done = CliRunner().invoke(app, ["run", "token_erasure", "--tiny", "--model",
                                    str(tmp_path / "nowhere"), "--out", str(tmp_path / "out")])
    assert done.exit_code == 1 and "there is no folder" in done.output
