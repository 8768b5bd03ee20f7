"""Cells of a sweep: kept once, never torn or foreign, shared by processes that may be killed."""

import json
import multiprocessing
import os
import signal
import time

import numpy as np
import pytest

from interp.causal import cells as of_cells
from interp.causal import locks
from interp.causal.cells import HEADER, CellStore
from interp.causal.locks import Claims
from interp.core import FolderRefused

ABOUT = {"model": "one", "weights": "w", "dtype": "torch.float32", "lane": "hf", "n_prompts": 2,
         "prompts": "p"}
FORK = multiprocessing.get_context("fork")


def value(name):
    return np.array([len(name) / 3, float(np.sin(int(name)))])


def fill(folder, names, log, pause=0.0, size=1):
    """Compute cells, writing down each that was computed."""
    cells = CellStore(folder, ABOUT)

    def compute(numbers):
        for i in numbers:
            time.sleep(pause)
            with open(log, "a") as file:
                file.write(f"{names[i]}\n")
            cells.put(names[i], value(names[i]))

    cells.fill([[name] for name in names], compute, size)
    return np.stack([cells.get(name) for name in names])


def logged(log):
    return log.read_text().split() if log.exists() else []


def wait_until(true, seconds=60):
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end, "waited too long"
        time.sleep(0.01)


def test_two_processes_share_the_work_and_each_cell_is_computed_once(tmp_path):
    names, log = [str(i) for i in range(24)], tmp_path / "log"
    others = [FORK.Process(target=fill, args=(tmp_path / "a", order, log, 0.01, size))
              for order, size in ((names, 1), (names[::-1], 3))]
    for process in others:
        process.start()
    for process in others:
        process.join()
        assert process.exitcode == 0
    assert sorted(logged(log)) == sorted(names)
    found = fill(tmp_path / "a", names, log)
    assert np.array_equal(found, np.stack([value(name) for name in names]))
    assert len(logged(log)) == len(names)
    assert not list((tmp_path / "a").glob("*.lock"))


def test_a_killed_process_loses_no_cell_and_its_claims_are_taken_over_at_once(tmp_path):
    names, log = [str(i) for i in range(8)], tmp_path / "log"
    killed = FORK.Process(target=fill, args=(tmp_path / "a", names, log, 0.3, 4))
    killed.start()
    wait_until(lambda: len(logged(log)) >= 2)
    os.kill(killed.pid, signal.SIGKILL)
    # Not yet waited for: the system still knows the process, but it computes nothing.
    assert list((tmp_path / "a").glob("*.lock"))
    kept = {path.name: path.read_bytes() for path in (tmp_path / "a").glob("*.json")}
    begun, before = time.monotonic(), logged(log)
    found = fill(tmp_path / "a", names, log)
    assert time.monotonic() - begun < locks.STALE / 2
    assert np.array_equal(found, np.stack([value(name) for name in names]))
    again = logged(log)[len(before):]
    # Only what was in the making when it died can be repeated: written down, not yet put.
    assert len(set(again) & set(before)) <= 1 and len(again) >= len(names) - len(before)
    assert all((tmp_path / "a" / name).read_bytes() == text for name, text in kept.items())
    killed.join()


def test_a_living_process_is_waited_for_and_one_without_sign_of_life_is_not(tmp_path, monkeypatch):
    names, log = ["1", "2"], tmp_path / "log"
    cells = CellStore(tmp_path / "a", ABOUT)
    with Claims(tmp_path / "a") as held:
        assert held.take(of_cells.key_of("1"))
        waiting = FORK.Process(target=fill, args=(tmp_path / "a", names, log))
        waiting.start()
        wait_until(lambda: logged(log) == ["2"])
        time.sleep(0.3)
        assert logged(log) == ["2"] and waiting.is_alive()
        cells.put("1", value("1"))
        waiting.join()
        assert waiting.exitcode == 0 and logged(log) == ["2"]
        # On another machine nobody can ask whether it lives: its claim ages.
        lock = held._path(of_cells.key_of("3"))
        lock.write_text(json.dumps({"host": "elsewhere", "pid": 1, "claims": "x"}))
        monkeypatch.setattr(locks, "STALE", 0.2)
        with Claims(tmp_path / "a") as other:
            assert not other.take(lock.stem)
            wait_until(lambda: other.take(lock.stem), 5)
            # Whoever was taken for dead does not remove what is no longer his.
            held._held.add(lock.stem)
            held.give_back([lock.stem])
            assert lock.exists()
        assert not lock.exists()


def test_claims_are_given_back_when_computing_fails(tmp_path):
    cells = CellStore(tmp_path, ABOUT)

    def compute(numbers):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        cells.fill([["1"], ["2"]], compute, 2)
    assert [path.name for path in tmp_path.iterdir()] == [HEADER]
    with pytest.raises(RuntimeError, match="have not been put"):
        cells.fill([["1"]], lambda numbers: None)


@pytest.mark.parametrize("damage", [
    lambda text: text[: len(text) // 2], lambda text: b"", lambda text: b"\xff\x00" + text,
    lambda text: b'{"values": [1.0, 2.0]}', lambda text: b"[]", lambda text: b"7",
    lambda text: text.replace(b"0.3333333333333333", b"0.4333333333333333"),
])
def test_a_torn_or_altered_cell_is_computed_again(tmp_path, damage):
    names, log = ["1", "2"], tmp_path / "log"
    whole = fill(tmp_path / "a", names, log)
    one = sorted(set((tmp_path / "a").glob("*.json")) - {tmp_path / "a" / HEADER})[0]
    text = one.read_bytes()
    one.write_bytes(damage(text))
    assert np.array_equal(fill(tmp_path / "a", names, log), whole)
    assert len(logged(log)) == 3 and one.read_bytes() == text


def test_a_cell_of_another_place_does_not_pass_for_this_one(tmp_path):
    names, log = ["1", "2"], tmp_path / "log"
    whole = fill(tmp_path / "a", names, log)
    first, second = sorted(set((tmp_path / "a").glob("*.json")) - {tmp_path / "a" / HEADER})
    first.write_bytes(second.read_bytes())
    assert np.array_equal(fill(tmp_path / "a", names, log), whole) and len(logged(log)) == 3


def test_any_shape_and_number_comes_back_as_it_was(tmp_path):
    given = {"a": np.array(-0.1), "b": np.array([np.nan, np.inf, -np.inf, 1e-300]),
             "c": np.random.default_rng(0).random((2, 3, 4)), "d": np.zeros((0, 5))}
    for name, values in given.items():
        CellStore(tmp_path, ABOUT).put(name, values)
    for name, values in given.items():
        found = CellStore(tmp_path, ABOUT).get(name)
        assert found.shape == values.shape and np.array_equal(found, values, equal_nan=True)


@pytest.mark.parametrize(("changes", "words"), [
    ({"model": "two", "weights": "v", "prompts": "q"}, "of the model 'one', this is 'two'"),
    ({"weights": "v"}, "of the model 'one' with other weights"),
    ({"prompts": "q", "n_prompts": 5}, "of 2 other prompts, here are 5"),
    ({"dtype": "torch.bfloat16"}, "of dtype 'torch.float32', this is 'torch.bfloat16'"),
    ({"lane": "bridge"}, "of lane 'hf', this is 'bridge'"),
])
def test_a_folder_of_something_else_is_refused_and_stays_as_it_is(tmp_path, changes, words):
    CellStore(tmp_path, ABOUT).put("1", value("1"))
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    with pytest.raises(FolderRefused) as caught:
        CellStore(tmp_path, {**ABOUT, **changes})
    assert words in str(caught.value) and str(caught.value).endswith(
        ": choose another folder, or delete this one.") and "\n" not in str(caught.value)
    assert before == {path: path.read_bytes() for path in tmp_path.iterdir()}
    # The same weights under another name are the same model.
    assert CellStore(tmp_path, {**ABOUT, "model": "alias"}).get("1") is not None


def test_a_folder_of_another_version_is_refused(tmp_path, monkeypatch):
    CellStore(tmp_path, ABOUT)
    monkeypatch.setattr(of_cells, "_version", lambda: "9.9.9")
    with pytest.raises(FolderRefused, match=r"of undertow \d.*this is 9.9.9.*may differ"):
        CellStore(tmp_path, ABOUT)


def test_headers_torn_foreign_or_impossible(tmp_path):
    cells = CellStore(tmp_path / "a", ABOUT)
    cells.put("1", value("1"))
    header = tmp_path / "a" / HEADER
    text = header.read_bytes()
    header.write_bytes(text[:20])
    assert CellStore(tmp_path / "a", ABOUT).get("1") is not None and header.read_bytes() == text
    # A torn header hides what the cells are of, but they say so themselves.
    header.write_bytes(text[:20])
    assert CellStore(tmp_path / "a", {**ABOUT, "weights": "v"}).get("1") is None
    header.write_text('{"learning_rate": 0.1}')
    with pytest.raises(FolderRefused, match="not that of a sweep"):
        CellStore(tmp_path / "a", ABOUT)
    (tmp_path / "file").write_text("")
    with pytest.raises(FolderRefused, match="cannot hold a sweep"):
        CellStore(tmp_path / "file", ABOUT)


def test_of_two_first_processes_with_other_models_one_is_refused(tmp_path):
    def start(weights, at):
        time.sleep(max(0.0, at - time.time()))
        try:
            CellStore(tmp_path / "a", {**ABOUT, "weights": weights})
        except FolderRefused:
            os._exit(3)

    at = time.time() + 0.2
    both = [FORK.Process(target=start, args=(weights, at)) for weights in "vw"]
    for process in both:
        process.start()
    for process in both:
        process.join()
    assert sorted(process.exitcode for process in both) == [0, 3]
    assert [path.name for path in (tmp_path / "a").iterdir()] == [HEADER]
