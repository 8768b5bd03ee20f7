"""Labels, tables and files of sink levels: the released counts, and a round trip."""

import json
from collections import Counter
from pathlib import Path

import pytest

from interp.core.errors import OutOfRange, ResultCorrupted
from interp.sinks import levels, secondary
from interp.sinks.levels import SinkLevels

RELEASED = Path(__file__).parents[3] / "shared/reference/secondary_sinks"
needs_reference = pytest.mark.skipif(
    not RELEASED.exists(), reason="the reference data lie outside the repository"
)
FILES = {
    "sink_detection_n_1_deepseek-14b.jsonl":
        (48, {"primary": 90, "secondary": 39, "noise": 2}),
    "sink_detection_qwen3-4b-base_use_chat_template.jsonl":
        (36, {"primary": 30, "secondary": 21}),
}


@needs_reference
@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("rule", ["stored", "official", "relative"])
def test_label_counts_of_the_released_files(name, rule):
    depth, expected = FILES[name]
    rows = secondary.read_released(RELEASED / name)
    assert len(rows) == 30 and {row.n_layers for row in rows} == {depth}
    counts, same = Counter(), 0
    for row in rows:
        found = row.levels if rule == "stored" else levels.relabel(row.levels, depth, rule)
        counts.update(label for _, label in found.values())
        same += found == row.levels
    assert counts == expected and same == 30


@needs_reference
def test_released_primary_sinks_form_one_level_and_secondaries_start_mid_network():
    deep, base = (secondary.read_released(RELEASED / name) for name in FILES)
    assert all(row.of("primary") == (0, 1, 2) for row in deep)
    assert levels.level_table(deep, "primary").values.tolist() == [[4, 43, 90, 1]]
    assert levels.level_table(base, "primary").values.tolist() == [[6, 29, 30, 1]]
    table = levels.level_table(deep, merge=2)
    assert set(table["onset"]) == {22} and levels.n_levels(table) == 1
    assert levels.level_table(base).values.tolist() == [[16, 18, 21, 1]]
    assert sum(bool(row.of("secondary")) for row in base) == 12


@needs_reference
@pytest.mark.parametrize("name", FILES)
def test_writing_what_was_read_gives_the_file_again(name, tmp_path):
    rows = secondary.read_released(RELEASED / name)
    secondary.write_released(rows, tmp_path / "copy.jsonl")
    assert secondary.read_released(tmp_path / "copy.jsonl") == rows
    for ours, theirs in zip((tmp_path / "copy.jsonl").open(), (RELEASED / name).open()):
        assert json.loads(ours) == json.loads(theirs.replace('"cliff"', '"secondary"'))
    assert [path.name for path in tmp_path.iterdir()] == ["copy.jsonl"]


def test_the_official_rule_has_the_paper_boundaries():
    def label(lifetime, depth):
        return levels.relabel({0: range(lifetime)}, depth)[0][1]

    assert [label(n, 48) for n in (4, 5, 32, 33)] == ["noise", "secondary", "secondary", "primary"]
    assert "secondary" not in {label(n, 20) for n in range(1, 21)}
    assert {n for n in range(1, 22) if label(n, 21) == "secondary"} == {5}
    assert label(1, 15) == "primary"


def test_the_relative_rule_scales_with_depth():
    def labels(depth, spans):
        found = levels.relabel({p: range(*span) for p, span in spans.items()}, depth, "relative")
        return [found[p][1] for p in spans]

    spans = {0: (1, 12), 4: (2, 12), 5: (3, 12), 6: (3, 5), 7: (3, 4), 8: (2, 6)}
    assert labels(12, spans) == ["primary", "primary", "secondary", "secondary", "noise", "noise"]


def test_merging_joins_only_near_lifetimes_of_one_onset():
    rows = [SinkLevels({i: (tuple(range(22, 22 + n)), "secondary")}, 48)
            for i, n in enumerate([23] * 5 + [22] * 3 + [18, 6])]
    rows.append(SinkLevels({9: (tuple(range(23, 46)), "secondary")}, 48))
    assert len(levels.level_table(rows)) == 5
    merged = levels.level_table(rows, merge=2)
    assert merged.values.tolist()[0][:3] == [22, 23, 8] and len(merged) == 4
    assert levels.n_levels(merged, 0.8) == 2 and levels.n_levels(levels.level_table([])) == 0


def test_a_gap_shortens_the_run_but_not_the_lifetime():
    found = SinkLevels({3: ((4, 5, 8, 9, 10), "secondary")}, 20)
    assert (found.lifetime[3], found.longest_run[3]) == (5, 3)
    row = found.to_dataframe().iloc[0]
    assert (row["onset"], row["lifetime"], row["longest_run"]) == (4, 5, 3)


@pytest.mark.parametrize("line", [
    "not json", "{}", '{"candidate_sinks": {"0": {"layer": [1], "sink_type": "odd"}}}',
    '{"candidate_sinks": {"0": {"layer": [], "sink_type": "noise"}}}', "[1]",
])
def test_a_broken_file_is_refused_with_its_line(tmp_path, line):
    good = '{"candidate_sinks": {"0": {"layer": [1], "sink_type": "noise"}}}\n'
    (tmp_path / "sinks.jsonl").write_text(good + line + "\n")
    with pytest.raises(ResultCorrupted, match=r"line 2 of sinks\.jsonl"):
        secondary.read_released(tmp_path / "sinks.jsonl")


def test_a_failed_write_leaves_the_old_file(tmp_path):
    target = tmp_path / "sinks.jsonl"
    target.write_text("old")
    with pytest.raises(KeyError):
        levels.write_released([SinkLevels({0: ((1,), "no such label")}, 4)], target)
    assert target.read_text() == "old" and len(list(tmp_path.iterdir())) == 1


def test_bad_input_is_named():
    with pytest.raises(OutOfRange, match="layer 40, but the model has layers 0 to 35"):
        levels.relabel({0: range(5, 41)}, 36)
    with pytest.raises(ValueError, match="position 3 has no layers"):
        levels.relabel({3: ()}, 36)
