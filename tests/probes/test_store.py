"""The activation store: equal to plain reads, resumed after a kill, refused where it does not fit."""

import json
import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import numpy as np
import pytest

import interp
from interp.core import OutOfRange, Prompt, PromptError, ResultCorrupted
from interp.models.model import Model
from probes import store


def prompts(count=11):
    rng = np.random.default_rng(0)
    return [Prompt.from_tokens(rng.integers(3, 90, 6 + i % 4), {"end": (4, 6 + i % 4)})
            for i in range(count)]


@pytest.fixture(scope="module")
def model(tiny):
    return Model(tiny("llama"), "tiny-llama")


def test_states_are_those_of_plain_runs_in_the_order_of_the_rows(model, tmp_path):
    given = prompts()
    made = store.extract(model, given, tmp_path / "s", ["resid_post", "z"], positions="end", shard=4,
                         batch_size=3, progress=False, labels={"answer": list(range(100, 111))})
    assert len(list((tmp_path / "s").glob("*.safetensors"))) == 3
    again = store.Store(tmp_path / "s")
    run = model.run(given, read=("resid_post", "z"))
    for site in ("resid_post", "z"):
        states = again.states(site)
        assert states.dims[:2] == ("sample", "layer") and len(states) == len(again.rows) == len(made)
        for row, (_, about) in zip(states.values, again.rows.iterrows()):
            expected = run.reads[site].values[about["prompt"], :, about["position"]]
            assert np.allclose(row, expected, atol=1e-5)
            assert given[about["prompt"]].ids[about["position"]] == about["token"]
            assert about["answer"] == 100 + about["prompt"]
        assert np.array_equal(again.states(site, layer=2), states.sel(layer=2))
    assert again.rows.groupby("prompt").size().tolist() == [len(p) - 4 for p in given]
    few = again.states("resid_post", layer=1, samples=(again.rows["prompt"] == 3).values)
    assert len(few) == len(given[3]) - 4
    parts = [part for _, part in again.shards("resid_post", layer=0)]
    assert len(parts) == 3 and np.array_equal(np.concatenate(parts), again.states("resid_post", layer=0))


def test_finished_shards_are_not_run_again_and_damaged_ones_are(model, tmp_path):
    given, folder = prompts(), tmp_path / "s"
    first = store.extract(model, given, folder, shard=4, progress=False).states("resid_post").values
    files = sorted(folder.glob("0*.safetensors"))
    before = [f.stat().st_mtime_ns for f in files]
    files[1].write_bytes(files[1].read_bytes()[:-50])
    files[2].unlink()
    with pytest.raises(ResultCorrupted, match="not finished: 2 of 3 shards are missing"):
        store.Store(folder)
    again = store.extract(model, given, folder, shard=4, progress=False)
    assert np.array_equal(again.states("resid_post"), first)
    assert [f.stat().st_mtime_ns == t for f, t in zip(files, before)] == [True, False, False]


def test_half_precision_takes_half_the_room(model, tmp_path):
    full = store.extract(model, prompts(), tmp_path / "a", progress=False)
    half = store.extract(model, prompts(), tmp_path / "b", dtype="float16", progress=False)
    assert np.allclose(full.states("resid_post"), half.states("resid_post"), rtol=2e-3, atol=2e-3)
    size = [sum(f.stat().st_size for f in (tmp_path / n).glob("*.safetensors")) for n in "ab"]
    assert size[1] < 0.7 * size[0]


def test_killed_and_started_again_is_the_same_store(tmp_path):
    """A real process, really killed; then the same call goes on and gives the same numbers."""
    script = textwrap.dedent("""
        import sys, time
        import numpy as np
        import interp
        from probes import store
        model = interp.open_model("backcopy-1l")
        rng = np.random.default_rng(0)
        prompts = [interp.Prompt.from_tokens(rng.integers(3, 60, 12)) for _ in range(40)]
        slow = store._write
        def write(*args):
            slow(*args)
            time.sleep(float(sys.argv[2]))
        store._write = write
        store.extract(model, prompts, sys.argv[1], positions="all", shard=2, progress=False)
    """)
    root = Path(__file__).resolve().parents[2]
    # Threads change the order of sums, and with it the last bits.
    more = {**os.environ, "PYTHONPATH": str(root), "OMP_NUM_THREADS": "1"}
    folder = tmp_path / "s"

    def call(wait):
        return [sys.executable, "-c", script, str(folder), str(wait)]

    running = subprocess.Popen(call(0.3), env=more, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline = time.time() + 120
    while len(list(folder.glob("*.safetensors"))) < 3 and time.time() < deadline:
        time.sleep(0.05)
    running.send_signal(signal.SIGKILL)
    running.wait()
    done = {f.name: f.stat().st_mtime_ns for f in folder.glob("*.safetensors")}
    assert 3 <= len(done) < 20
    subprocess.run(call(0), env=more, check=True, capture_output=True)
    found = store.Store(folder)
    assert all((folder / name).stat().st_mtime_ns == t for name, t in done.items())
    rng, model = np.random.default_rng(0), interp.open_model("backcopy-1l")
    given = [interp.Prompt.from_tokens(rng.integers(3, 60, 12)) for _ in range(40)]
    whole = store.extract(model, given, tmp_path / "w", positions="all", shard=2, progress=False)
    assert np.array_equal(found.states("resid_post"), whole.states("resid_post"))
    assert found.rows.equals(whole.rows)


def test_a_store_of_something_else_is_refused(model, tiny, tmp_path):
    given, folder = prompts(), tmp_path / "s"
    store.extract(model, given, folder, progress=False)
    with pytest.raises(ResultCorrupted, match="another model"):
        store.extract(Model(tiny("gpt2"), "tiny-gpt2"), given, folder, progress=False)
    with pytest.raises(ResultCorrupted, match="other prompts, positions or labels"):
        store.extract(model, given, folder, positions=[0], progress=False)
    with pytest.raises(ResultCorrupted, match=r"layers \[0, 1, 2\], not \[1\]"):
        store.extract(model, given, folder, layers=[1], progress=False)
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "notes.txt").write_text("mine")
    with pytest.raises(ResultCorrupted, match="not empty and holds no store"):
        store.extract(model, given, tmp_path / "other", progress=False)
    with pytest.raises(ResultCorrupted, match="no manifest.json"):
        store.Store(tmp_path / "nowhere")
    (folder / "manifest.json").write_text(json.dumps({"kind": "something"}))
    with pytest.raises(ResultCorrupted, match="cannot be read as that of a store"):
        store.Store(folder)


def test_bad_input_is_one_sentence(model, tmp_path):
    given = prompts()
    with pytest.raises(PromptError, match="no prompts"):
        store.extract(model, [], tmp_path / "s")
    with pytest.raises(PromptError, match="none of size query x key"):
        store.extract(model, given, tmp_path / "s", "pattern")
    with pytest.raises(PromptError, match="3 labels 'y' for 11 prompts"):
        store.extract(model, given, tmp_path / "s", labels={"y": [1, 2, 3]})
    with pytest.raises(PromptError, match="cannot be named 'token'"):
        store.extract(model, given, tmp_path / "s", labels={"token": given})
    with pytest.raises(OutOfRange, match="layer 3 does not exist"):
        store.extract(model, given, tmp_path / "s", layers=[3])
    made = store.extract(model, given, tmp_path / "s", layers=[0, 2], progress=False)
    with pytest.raises(OutOfRange, match=r"no layer 1; it has: \[0, 2\]"):
        made.states("resid_post", layer=1)
    with pytest.raises(OutOfRange, match="no site 'z'; it has: resid_post"):
        made.states("z")


def test_a_store_of_another_model_says_so_before_it_speaks_of_layers(model, tmp_path):
    given = prompts()
    made = store.extract(model, given, tmp_path / "s", progress=False)
    other = interp.open_model("backcopy-1l")  # of one layer
    with pytest.raises(ResultCorrupted, match="made of another model .*'tiny-llama'"):
        store.extract(other, given, tmp_path / "s", progress=False)
    with pytest.raises(ResultCorrupted, match="made of other prompts"):
        store.extract(model, given[:5], tmp_path / "s", progress=False)
    assert repr(made) == ("Store('s': 11 samples of 'tiny-llama'; sites resid_post; layers 0, 1, 2)")
    with pytest.raises(OutOfRange, match="Did you mean 'resid_post'"):
        made.states("resid_pots")
