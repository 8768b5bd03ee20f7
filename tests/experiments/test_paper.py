"""Papers, settings, discovery; what a run leaves behind, and what it leaves alone."""

import hashlib
import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
import xarray as xr
from matplotlib.figure import Figure
from PIL import Image

import experiments
from experiments import _output
from experiments._outcome import Outcome
from experiments._output import Output, execute, tidy
from experiments._paper import Paper, Settings, SettingsError, check_names, load, names
from interp.core import Claim, Prompt, Result, ResultCorrupted, ablate

ROOT = Path(experiments.__file__).resolve().parents[1]


def paper(**changes):
    content = dict(key="sinks", title="Sinks", arxiv=("2410.10781",), question="Where?",
                   figures={"heads": "Heads.", "levels": "Levels."})
    return Paper(**{**content, **changes})


def snapshot(folder):
    """Every path below a folder, hidden ones too, with its content."""
    return {p.relative_to(folder).as_posix(): p.read_bytes() if p.is_file() else None
            for p in sorted(folder.rglob("*"))}


def run(lab, name, out, **settings):
    sys.modules.pop(f"experiments.{name}", None)
    return execute(load(name), Settings.of(out=out, **settings))


def result(value=1.0):
    return Result(xr.Dataset({"x": ("layer", [value, 2.0])}))


# ---- papers, settings, discovery ------------------------------------------------------------


@pytest.mark.parametrize("changes, sentence", [
    (dict(key="Sinks!"), "module name"),
    (dict(arxiv=("arXiv:2410.10781",)), "arXiv id"),
    (dict(question="Where."), "question mark"),
    (dict(figures={"heads": ""}), "caption"),
    (dict(figures={"../heads": "x"}), "plain name"),
])
def test_a_paper_that_is_not_well_described_is_refused(changes, sentence):
    with pytest.raises(ValueError, match=sentence):
        paper(**changes)


@pytest.mark.parametrize("values, sentence", [
    (dict(seed=-1), "seed cannot be '-1': input should be greater than or equal to 0."),
    (dict(device="gpu"), "device cannot be 'gpu': write cpu, mps, cuda or cuda:NUMBER."),
    (dict(dtype="half"), "dtype cannot be 'half': choose one of: float32, bfloat16, float16."),
    (dict(model=[" "]), "a name is empty."),
    (dict(mode=["x"]), "there is no setting 'mode'; the settings are: model, out, seed"),
    (dict(out=Path(__file__)), "there is a file of that name; give a folder."),
])
def test_a_wrong_setting_is_one_sentence(values, sentence):
    with pytest.raises(SettingsError) as caught:
        Settings.of(**values)
    assert sentence in str(caught.value)
    assert "\n" not in str(caught.value)


def test_settings_choose_models_sizes_and_figures():
    default, asked = Settings.of(), Settings.of(model=["a", "b", "a"], figure=["heads"], tiny=True)
    known = paper(models=("bundled",))
    assert default.models(known) == ("bundled",) and asked.models(known) == ("a", "b")
    assert default.pick(200, tiny=8) == 200 and asked.pick(200, tiny=8) == 8
    assert default.wants("levels") and not asked.wants("levels") and asked.wants("heads")


def test_random_streams_depend_on_the_seed_and_on_nothing_else():
    def draw(seed, *stream):
        return Settings.of(seed=seed).rng(*stream).integers(2**62)

    assert draw(1, 5) == draw(1, 5)
    assert len({draw(1), draw(1, 5), draw(1, 6), draw(2), draw(2, 5)}) == 5


def test_experiments_are_the_public_modules_and_are_found_without_importing_them(lab):
    lab.add("beta", "raise RuntimeError('imported')")
    lab.add("alpha", "raise RuntimeError('imported')")
    lab.add("_private", "raise RuntimeError('imported')")
    assert names() == ("alpha", "beta")
    assert check_names(["all"]) == ("alpha", "beta")
    assert check_names(["beta", "all"]) == ("beta", "alpha")


def test_an_unknown_experiment_is_answered_with_those_there_are(lab):
    lab.add("alpha")
    with pytest.raises(SettingsError, match="no experiment 'aleph'; there are: alpha, or all"):
        check_names(["alpha", "aleph"])


@pytest.mark.parametrize("changes, sentence", [
    ({"PAPER = Paper(": "OTHER = Paper("}, "must define PAPER and run"),
    ({"def run(": "def walk("}, "must define PAPER and run"),
    ({'"alpha", "Sinks': '"omega", "Sinks'}, "calls itself 'omega'"),
])
def test_a_module_that_is_no_experiment_is_refused_by_name(lab, changes, sentence):
    lab.add("alpha", **changes)
    with pytest.raises(SettingsError, match=sentence):
        load("alpha")


def test_importing_the_package_does_not_import_torch():
    code = "import experiments, sys; sys.exit('torch' in sys.modules or 'interp' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0


@pytest.mark.parametrize("name", names() or [
    pytest.param("", marks=pytest.mark.skip(reason="there are no experiments yet"))])
def test_every_module_of_the_package_is_an_experiment(name):
    assert load(name).paper.key == name


# ---- what a run leaves ------------------------------------------------------------------------


def test_a_run_leaves_figures_data_tables_claims_and_a_manifest(lab, tmp_path):
    lab.add("alpha")
    outcome = run(lab, "alpha", tmp_path / "out", seed=3)
    folder = tmp_path / "out" / "alpha"
    assert sorted(p for p, content in snapshot(folder).items() if content is not None) == sorted([
        "claims.json", "claims.md", "manifest.json", "data/scores/data.nc",
        "data/scores/manifest.json", "tables/heads.parquet",
        "heads.png", "heads.pdf", "levels.tiny-model.png", "levels.tiny-model.pdf",
    ])
    assert [p.name for p in (tmp_path / "out").iterdir()] == ["alpha"]

    with Image.open(folder / "heads.png") as picture:
        assert picture.info["dpi"] == pytest.approx((150, 150), abs=0.1)
    assert (folder / "heads.pdf").read_bytes().startswith(b"%PDF")
    expected = np.random.default_rng([3]).random((3, 4))
    np.testing.assert_array_equal(outcome.result("scores")["score"], expected)
    assert list(outcome.table("heads")["score"]) == [0.5, 0.25]

    manifest = json.loads((folder / "manifest.json").read_text())
    assert manifest["paper"]["arxiv"] == ["2410.10781", "2512.22213"]
    assert manifest["models"] == [{"name": "tiny-model", "revision": "abc", "lane": "hf",
                                   "dtype": "float32", "tokenizer": "words"}]
    assert manifest["prompts"]["prompts"]["count"] == 1
    assert manifest["prompts"]["prompts"]["tokens"] == 3
    assert manifest["seed"] == 3 and manifest["settings"]["seed"] == 3
    assert manifest["wall_seconds"] >= 0
    assert "numpy" in manifest["environment"]["versions"]
    assert set(manifest["files"]) == set(snapshot(folder)) - {
        "manifest.json", "data", "data/scores", "tables"}
    for name, checksum in manifest["files"].items():
        assert hashlib.sha256((folder / name).read_bytes()).hexdigest() == checksum
    assert str(tmp_path) not in (folder / "manifest.json").read_text()


def test_claims_are_written_with_the_verdict_they_compute(lab, tmp_path):
    lab.add("alpha")
    outcome = run(lab, "alpha", tmp_path)
    written = json.loads((tmp_path / "alpha" / "claims.json").read_text())
    assert [claim["verdict"] for claim in written] == ["supported", "refuted", "not testable"]
    assert [claim.verdict for claim in outcome.claims] == [c["verdict"] for c in written]
    assert written[0]["details"] == {"model": "tiny-model"}
    assert outcome.manifest["verdicts"] == {
        "supported": 1, "refuted": 1, "inconclusive": 0, "not testable": 1}
    table = (tmp_path / "alpha" / "claims.md").read_text(encoding="utf-8").splitlines()
    assert len(table) == 2 + 3 and all(row.count(" | ") == 8 for row in table)


def test_claims_keep_numpy_numbers_and_nan_through_a_file(tmp_path):
    claim = Claim("s", "arXiv:2410.10781", float("nan"), 0.0, (float("nan"), float("nan")),
                  details={"layers": np.arange(3), "p": np.float32(0.5), "n": np.int64(4)})
    with Output(paper(figures={}), Settings.of(out=tmp_path)) as out:
        out.claim(claim)
    (read,) = Outcome.load(tmp_path / "sinks").claims
    assert read.verdict == "inconclusive"
    assert read.details == {"layers": [0, 1, 2], "p": 0.5, "n": 4}


def test_the_same_seed_writes_the_same_files_and_another_seed_others(lab, tmp_path):
    lab.add("alpha")
    first, again, other = (run(lab, "alpha", tmp_path / f"{i}", seed=seed).manifest["files"]
                           for i, seed in enumerate((1, 1, 2)))
    pictures = [name for name in first if name.endswith((".png", ".pdf", ".parquet", ".json"))]
    assert {n: first[n] for n in pictures} == {n: again[n] for n in pictures}
    assert first["heads.png"] != other["heads.png"]


def test_only_the_figures_asked_for_are_drawn(lab, tmp_path):
    lab.add("alpha")
    outcome = run(lab, "alpha", tmp_path, figure=["levels"])
    assert [figure.name for figure in outcome.figures] == ["levels"]
    assert not (tmp_path / "alpha" / "heads.png").exists()
    assert len(outcome.claims) == 3


def test_a_figure_that_was_not_drawn_is_listed_with_the_reason(tmp_path):
    with Output(paper(), Settings.of(out=tmp_path)) as out:
        out.no_figure("levels", "the model has one block.")
        out.claim(Claim.untestable("s", "arXiv:2410.10781", "too small"))
    figures = Outcome.load(tmp_path / "sinks").figures
    assert [(f.name, f.reason, f.png) for f in figures] == [
        ("heads", "this run did not draw it.", b""), ("levels", "the model has one block.", b"")]


@pytest.mark.parametrize("act, sentence", [
    (lambda out: out.figure("sizes", Figure()), "no figure 'sizes'; it lists: heads, levels"),
    (lambda out: [out.figure("heads", Figure()) for _ in range(2)], "a figure 'heads' already"),
    (lambda out: [out.save("x", result()) for _ in range(2)], "a result 'x' already"),
    (lambda out: out.save("../x", result()), "no plain name"),
    (lambda out: out.no_figure("heads", ""), "say why"),
    (lambda out: out.claim(Claim.untestable("s", "a", "r", figure="sizes")), "no figure 'sizes'"),
    (lambda out: None, "neither a figure nor a claim"),
])
def test_misuse_is_a_sentence_and_leaves_nothing(tmp_path, act, sentence):
    with pytest.raises(ValueError, match=sentence):
        with Output(paper(), Settings.of(out=tmp_path)) as out:
            act(out)
    assert list(tmp_path.iterdir()) == []


def test_the_manifest_tells_prompts_apart(tmp_path):
    digests = []
    for ids in ([1, 2, 3], [1, 2, 3], [1, 2, 4]):
        with Output(paper(), Settings.of(out=tmp_path)) as out:
            out.record(prompts=[Prompt.from_tokens(ids)], name="text")
            out.claim(Claim.untestable("s", "arXiv:2410.10781", "too small"))
        manifest = Outcome.load(tmp_path / "sinks").manifest
        digests.append(manifest["prompts"]["text"]["digest"])
    assert digests[0] == digests[1] != digests[2]


# ---- what a run leaves alone ------------------------------------------------------------------


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt, SystemExit])
def test_a_run_that_does_not_finish_leaves_the_previous_result_untouched(lab, tmp_path, error):
    out = tmp_path / "out"
    lab.fails_with("alpha", f"{error.__name__}('stop')")
    with pytest.raises(error, match="stop"):
        run(lab, "alpha", out)
    assert not out.exists()

    lab.add("alpha")
    run(lab, "alpha", out, seed=1)
    before = snapshot(out)
    lab.fails_with("alpha", f"{error.__name__}('stop')")
    with pytest.raises(error, match="stop"):
        run(lab, "alpha", out, seed=2)
    assert snapshot(out) == before


def test_a_finished_run_replaces_the_previous_result_whole(lab, tmp_path):
    lab.add("alpha")
    run(lab, "alpha", tmp_path)
    stray = tmp_path / "alpha" / "stray.txt"
    stray.write_text("left by hand")
    run(lab, "alpha", tmp_path, figure=["heads"])
    assert not stray.exists() and not (tmp_path / "alpha" / "levels.tiny-model.png").exists()
    assert [p.name for p in tmp_path.iterdir() if p.name.startswith(".")] == []


def test_a_killed_run_is_cleaned_up_by_the_next_one(lab, tmp_path):
    out = tmp_path / "out"
    lab.add("alpha")
    run(lab, "alpha", out)
    before = snapshot(out)
    lab.fails_with("alpha", "__import__('os')._exit(9)")
    code = (f"import experiments; experiments.__path__.insert(0, {str(lab.folder)!r})\n"
            "from experiments._paper import Settings, load\n"
            "from experiments._output import execute\n"
            f"execute(load('alpha'), Settings.of(out={str(out)!r}))")
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 9
    left = set(snapshot(out)) - set(before)
    assert any(name.endswith("heads.png") for name in left)
    assert {name: snapshot(out)[name] for name in before} == before
    assert len(Outcome.load(out / "alpha").claims) == 3
    tidy(out)
    assert snapshot(out) == before


def test_a_run_that_is_still_alive_is_not_cleaned_up(tmp_path):
    with Output(paper(), Settings.of(out=tmp_path)) as out:
        tidy(tmp_path)
        with Output(paper(key="other"), Settings.of(out=tmp_path)) as second:
            second.claim(Claim.untestable("s", "arXiv:2410.10781", "too small"))
        out.claim(Claim.untestable("s", "arXiv:2410.10781", "too small"))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["other", "sinks"]


def test_a_result_caught_between_two_renames_is_put_back(lab, tmp_path):
    lab.add("alpha")
    run(lab, "alpha", tmp_path / "out")
    before = snapshot(tmp_path / "out")
    (tmp_path / "out" / "alpha").rename(tmp_path / "out" / ".alpha.elsewhere-1-0123abcd.old")
    tidy(tmp_path / "out")
    assert snapshot(tmp_path / "out") == before


@pytest.mark.parametrize("error", [OSError("the disk is full"), KeyboardInterrupt()])
def test_the_previous_result_comes_back_when_putting_the_new_one_fails(
    lab, tmp_path, monkeypatch, error
):
    lab.add("alpha")
    run(lab, "alpha", tmp_path / "out")
    before = snapshot(tmp_path / "out")
    rename = os.rename

    def failing(source, target):
        if str(source).endswith(".partial"):
            raise error
        rename(source, target)

    monkeypatch.setattr(_output.os, "rename", failing)
    with pytest.raises(type(error)):
        run(lab, "alpha", tmp_path / "out", seed=2)
    assert snapshot(tmp_path / "out") == before


def test_two_runs_that_finish_together_leave_the_later_one(lab, tmp_path, monkeypatch):
    lab.add("alpha")
    run(lab, "alpha", tmp_path / "out")
    rename, rival = os.rename, []

    def raced(source, target):
        if str(source).endswith(".partial") and not rival:
            rival.append(target)
            target.mkdir()
            (target / "manifest.json").write_text("of the rival")
        rename(source, target)

    monkeypatch.setattr(_output.os, "rename", raced)
    assert run(lab, "alpha", tmp_path / "out", seed=5).manifest["seed"] == 5
    assert rival and [p.name for p in (tmp_path / "out").iterdir()] == ["alpha"]


# ---- reading back -----------------------------------------------------------------------------


def flip(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(bytes(content))


@pytest.mark.parametrize("damage, sentence", [
    (lambda f: (f / "heads.png").unlink(), "heads.png is missing"),
    (lambda f: flip(f / "levels.tiny-model.pdf"), "levels.tiny-model.pdf does not match"),
    (lambda f: flip(f / "data" / "scores" / "data.nc"), "data.nc does not match"),
    (lambda f: (f / "claims.json").write_text("[]"), "claims.json does not match"),
    (lambda f: (f / "manifest.json").write_text('{"format": 1, '), "not readable JSON"),
    (lambda f: (f / "manifest.json").write_text("{}"), "lacks 'format'"),
    (lambda f: (f / "manifest.json").write_text("[1]"), "lacks 'format'"),
    (lambda f: (f / "manifest.json").unlink(), "holds no manifest.json"),
    (lambda f: (f / "manifest.json").write_text(
        (f / "manifest.json").read_text().replace('"format": 1', '"format": 99')), "format 99"),
    (lambda f: (f / "manifest.json").write_text(
        (f / "manifest.json").read_text().replace('"claims.json"', '"claims.md"', 1)),
     "claims.json"),
])
def test_a_damaged_result_is_refused_and_the_file_is_named(lab, tmp_path, damage, sentence):
    lab.add("alpha")
    run(lab, "alpha", tmp_path)
    Outcome.load(tmp_path / "alpha")
    damage(tmp_path / "alpha")
    with pytest.raises(ResultCorrupted) as caught:
        Outcome.load(tmp_path / "alpha")
    assert sentence in str(caught.value) and "again" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_an_unknown_result_or_table_is_answered_with_those_there_are(lab, tmp_path):
    lab.add("alpha")
    outcome = run(lab, "alpha", tmp_path)
    with pytest.raises(KeyError, match="no result 'score'; it has: scores"):
        outcome.result("score")
    with pytest.raises(KeyError, match="no table 'scores'; it has: heads"):
        outcome.table("scores")


# ---- the cache --------------------------------------------------------------------------------


@dataclass(frozen=True)
class Setup:
    layers: tuple[int, ...]


KEYS = [
    {"seed": 1}, {"seed": 2}, {"seed": 1, "n": None}, {"seed": 1.5}, {"seed": "1"},
    {"values": np.arange(2000)}, {"values": np.where(np.arange(2000) == 999, -1, np.arange(2000))},
    {"values": np.arange(2000).reshape(2, 1000)}, {"values": np.arange(2000).astype(np.int32)},
    {"prompt": [Prompt.from_tokens([1, 2])]}, {"prompt": [Prompt.from_tokens([1, 3])]},
    {"write": ablate("L1H2")}, {"write": ablate("L1H3")}, {"setup": Setup((1, 2))},
    {"setup": Setup((1, 3))}, {"values": torch.ones(3)}, {"values": torch.ones(3).bfloat16()},
    {"values": torch.tensor([1.0, 1.0, 1.5]).bfloat16()},
]


def test_the_cache_answers_equal_content_and_only_that(tmp_path):
    out = Output(paper(), Settings.of(out=tmp_path))
    for i, key in enumerate(KEYS):
        assert float(out.cached("sweep", key, lambda i=i: result(float(i)))["x"][0]) == i
    for i, key in enumerate(KEYS):
        found = out.cached("sweep", key, lambda: pytest.fail("computed again"))
        assert float(found["x"][0]) == i
    assert float(out.cached("other", KEYS[0], lambda: result(7.0))["x"][0]) == 7.0


def test_the_cache_forgets_when_the_code_changes_or_an_entry_is_damaged(tmp_path, monkeypatch):
    out = Output(paper(), Settings.of(out=tmp_path))
    out.cached("sweep", {}, lambda: result(1.0))
    (entry,) = out.cache.iterdir()
    flip(entry / "data.nc")
    assert float(out.cached("sweep", {}, lambda: result(2.0))["x"][0]) == 2.0
    monkeypatch.setattr(_output, "_code", lambda: "edited")
    assert float(out.cached("sweep", {}, lambda: result(3.0))["x"][0]) == 3.0


def test_the_cache_outlives_a_run_that_fails(lab, tmp_path):
    lab.add("alpha", **{"    scores = rng.random((3, 4))": (
        "    scores = out.cached('s', {'seed': settings.seed}, lambda: Result(xr.Dataset("
        "{'s': (('layer', 'head'), rng.random((3, 4)))})))['s'].values\n"
        "    if not (settings.out / 'go').exists(): raise RuntimeError('stop')")})
    with pytest.raises(RuntimeError, match="stop"):
        run(lab, "alpha", tmp_path)
    (tmp_path / "go").touch()
    (entry,) = (tmp_path / "cache" / "alpha").iterdir()
    written = (entry / "data.nc").stat().st_mtime_ns
    run(lab, "alpha", tmp_path)
    assert (entry / "data.nc").stat().st_mtime_ns == written


def test_what_has_no_content_cannot_be_a_cache_key(tmp_path):
    out = Output(paper(), Settings.of(out=tmp_path))
    with pytest.raises(TypeError, match="a object cannot be part of a cache key"):
        out.cached("sweep", {"model": object()}, result)
