"""The harness of the benchmarks: it measures what is there, and says what went wrong."""

import json

import numpy as np
import pytest
import torch
import xarray as xr
from typer.testing import CliRunner

from benchmarks import _fresh, _report, _tables, attention_length
from benchmarks.__main__ import app, names
from benchmarks._race import Contender, OutOfMemory, Target, measure


class Clock:
    """Time that passes only when it is told to, with some noise."""

    def __init__(self):
        self.now, self.rng, self.order = 0.0, np.random.default_rng(3), []

    def __call__(self):
        return self.now

    def working(self, name, seconds, result=None):
        def run():
            self.order.append(name)
            self.now += seconds * self.rng.uniform(0.95, 1.05)
            return result
        return Contender(name, run)


def race(clock, *more, **options):
    return measure("a race", [clock.working("floor", 1.0, {"a": [1.0, 2.0]}), *more], "floor",
                   clock=clock, **{"rounds": 9, **options})


def test_a_contender_twice_as_slow_is_measured_as_that():
    clock = Clock()
    done = race(clock, clock.working("slow", 2.0, {"a": [1.0, 2.0]}),
                clock.working("equal", 1.0, {"a": [1.0, 2.0]}))
    slow, equal = done.ratio("slow", "floor"), done.ratio("equal", "floor")
    assert slow.value == pytest.approx(2.0, rel=0.05)
    assert slow.interval[0] > 1.8 and slow.interval[1] < 2.2
    assert equal.interval[0] < 1.0 < equal.interval[1]
    assert done.fastest(["slow", "equal"]) == "equal"
    assert [len(line.seconds) for line in done.lines.values()] == [9, 9, 9]
    # After the warm-up, every round runs all of them, not always in the same order.
    rounds = [tuple(clock.order[i : i + 3]) for i in range(3, len(clock.order), 3)]
    assert all(len(set(one)) == 3 for one in rounds) and len(set(rounds)) > 1


def test_a_round_budget_ends_the_race_early_but_not_before_three():
    clock = Clock()
    assert len(race(clock, seconds=0.5).lines["floor"].seconds) == 3


def test_a_wrong_result_is_flagged_and_does_not_count():
    clock = Clock()
    done = race(
        clock, clock.working("wrong", 0.1, {"a": [1.0, 2.001]}),
        clock.working("close", 1.5, {"a": [1.0, 2.000001]}),
        clock.working("nan", 0.1, {"a": [1.0, float("nan")]}),
        clock.working("cut", 0.1, {"a": [1.0]}), clock.working("plain", 0.5))
    assert done.lines["wrong"].difference == pytest.approx(1e-3)
    assert "differ" in done.lines["wrong"].wrong and "differ" in done.lines["nan"].wrong
    assert "shapes" in done.lines["cut"].wrong
    assert done.lines["close"].wrong is None and done.lines["plain"].wrong is None
    assert done.fastest(["wrong", "close", "nan", "cut"]) == "close"
    verdict = Target("x", at_most=1, race="a race", of="wrong", to="floor").judge({"a race": done})
    assert verdict["verdict"] == "not measured" and "differ" in verdict["reason"]


def test_results_may_be_tensors_and_labelled_arrays_with_nan_in_the_same_places():
    values = [[1.0, float("nan")], [float("-inf"), 4.0]]
    kinds = [torch.tensor(values), np.array(values), xr.DataArray(values, dims=("a", "b"))]
    done = measure("kinds", [Contender(str(i), lambda x=x: [x]) for i, x in enumerate(kinds)], "0",
                   rounds=1)
    assert [line.difference for line in done.lines.values()] == [0.0, 0.0, 0.0]


def test_a_failing_or_missing_contender_does_not_stop_the_run():
    clock, calls = Clock(), []

    def breaks_later():
        calls.append(1)
        if len(calls) > 4:
            raise RuntimeError("no more\nof this")

    def missing():
        raise ImportError("No module named 'peer'")

    done = race(clock, Contender("late", breaks_later), Contender("peer", make=missing),
                clock.working("good", 1.0, {"a": [1.0, 2.0]}))
    assert done.lines["late"].failed == "RuntimeError: no more of this"
    assert done.lines["peer"].failed == "not installed: No module named 'peer'"
    assert len(done.lines["good"].seconds) == len(done.lines["floor"].seconds) == 9
    with pytest.raises(LookupError, match="not installed"):
        done.ratio("peer", "floor")
    cells = {row[0]: row for row in _tables.rows(done)}
    assert "no more" in cells["late"][1] and cells["good"][2]


def test_targets_are_judged_on_the_measured_number():
    clock = Clock()
    done = {"a race": race(clock, clock.working("peer", 3.0), clock.working("other", 5.0))}
    best = dict(race="a race", of=("peer", "other", "absent"), to="floor")
    assert Target("faster", at_least=2.8, **best).judge(done)["verdict"] == "met"
    assert Target("faster", at_least=3.3, **best).judge(done)["verdict"] == "missed"
    assert Target("slower", at_most=3.3, **best).judge(done)["verdict"] == "met"
    assert Target("slower", at_most=2.8, **best).judge(done)["verdict"] == "missed"
    assert Target("other", at_most=2.8, race="b").judge(done)["verdict"] == "not measured"
    own = Target("own", at_most=6.0, value=lambda races: len(races["a race"].lines))
    assert own.judge(done)["measured"] == 3.0


def test_the_share_of_the_floor_refers_to_the_rate_of_the_same_rounds():
    a = torch.rand(1024, 1024)
    done = measure("floor", [Contender("once", lambda: a @ a), Contender("twice", lambda: a @ a @ a)],
                   "once", rounds=3, tolerance=1e9, flops=2 * 1024**3)
    once, twice = done.lines["once"].floor_share, done.lines["twice"].floor_share
    assert 0.6 < once < 1.6 and 0.3 < twice < 0.8 and done.matrix_rate > 1e8


def test_memory_is_that_of_a_fresh_process_under_a_limit():
    here = ("tests.benchmarks.holding", "holding")
    found = _fresh.fresh(*here, {"megabytes": 600}, 4e9)
    assert 480e6 < found["peak"] - found["before"] < 660e6
    with pytest.raises(OutOfMemory, match="out of memory at 1 GB"):
        _fresh.fresh(*here, {"megabytes": 2000}, 1e9)


def test_records_are_read_back_and_fill_the_page(tmp_path):
    clock = Clock()
    done = race(clock, clock.working("slow", 2.0, {"a": [1.0, 2.0]}))
    target = Target("slow to floor", at_most=1.5, race="a race", of="slow", to="floor")
    path = _tables.save(tmp_path, _tables.record("toy", [done], [target], True, "cpu"))
    assert json.loads(path.read_text())["targets"][0]["verdict"] == "missed"
    again = _tables.load(path)["races"][0]
    assert again.ratio("slow", "floor").value == pytest.approx(2.0, rel=0.05)
    page = tmp_path / "page.md"
    page.write_text(f"Before.\n{_report.BEGIN}\nold\n{_report.END}\nAfter.\n")
    for _ in range(2):
        _report.write(tmp_path, page)
    text = page.read_text()
    assert text.startswith("Before.") and text.endswith("After.\n") and "old" not in text
    assert text.count("| slow |") == 1 and "missed" in text
    page.write_text("nothing")
    with pytest.raises(ValueError, match="no marks"):
        _report.write(tmp_path, page)


def test_an_unknown_benchmark_is_one_sentence():
    found = CliRunner().invoke(app, ["no_such"])
    assert found.exit_code == 2 and "there is no benchmark 'no_such'" in found.output
    assert all(not name.startswith("_") for name in names())


def test_the_race_for_a_gpu_runs_anywhere_in_a_small_shape(monkeypatch):
    monkeypatch.setattr(attention_length, "peak_memory", lambda *_: 7.0)
    shape = {"num_hidden_layers": 2, "hidden_size": 64, "intermediate_size": 96, "vocab_size": 1000,
             "num_attention_heads": 4, "num_key_value_heads": 2, "dtype": "bfloat16"}
    done = attention_length.many_heads(96, "cpu", shape, limit=4e9)
    assert {line.failed for line in done.lines.values()} == {None}
    assert done.lines[attention_length.OURS].difference == 0  # both in tiles where there is no GPU
    assert done.memory(attention_length.OURS) == 7.0
