"""The command line: what it prints, where it writes, and how it fails."""

import os
import re
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from typer.testing import CliRunner

import experiments.__main__ as cli
from experiments._outcome import Outcome


@pytest.fixture
def call(monkeypatch, tmp_path):
    """Runs a command line in an empty folder, on a wide terminal."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "160")

    def run(*words):
        return CliRunner().invoke(cli.app, [str(word) for word in words])

    return run


def sentences(text):
    return [line for line in text.splitlines() if line.strip()]


def test_list_shows_every_experiment_and_what_it_asks(lab, call):
    lab.add("alpha")
    lab.add("beta")
    found = call("list")
    assert found.exit_code == 0
    for text in ("alpha", "beta", "Sinks & <b>other</b> tokens", "arXiv:2410.10781",
                 "Where are they?", "heads", "levels", "backcopy-1l"):
        assert text in found.stdout
    assert "*" not in found.stdout


def test_list_marks_the_models_that_only_the_experiment_can_make(lab, call):
    lab.add("alpha", **{'models=("backcopy-1l",)':
                        'models=("reader", "all-minilm-l6-v2", "org/model", "planted")'})
    found = call("list").stdout
    assert "planted *" in found and found.count(" *") == 1
    assert "* made on the spot by the experiment" in found


def test_list_names_a_broken_experiment_and_shows_the_others(lab, call):
    lab.add("alpha")
    lab.add("broken", "import no_such_module")
    found = call("list")
    assert found.exit_code == 1 and "alpha" in found.stdout
    assert "broken: ModuleNotFoundError: No module named 'no_such_module'" in found.stderr


def test_run_prints_the_claims_and_where_the_figures_are(lab, call, tmp_path):
    lab.add("alpha")
    found = call("run", "alpha", "--seed", 3)
    assert found.exit_code == 0, found.output
    flat = re.sub(r"[\s│┃]+", " ", found.stdout)
    for text in ("Token 0 is a <sink>. [tiny-model]", "18.2 % (paper)", "0.9", "0.786 to 0.957",
                 "above 0.1", "supported", "refuted", "not testable",
                 "It needs depth. (the model has 3 blocks)",
                 "alpha: 2 figures in figures/alpha",
                 "3 claims: 1 supported, 1 refuted, 0 inconclusive, 1 not testable."):
        assert text in flat
    assert Outcome.load(tmp_path / "figures" / "alpha").manifest["seed"] == 3


def test_run_all_runs_every_experiment_once(lab, call, tmp_path):
    lab.add("alpha")
    lab.add("beta")
    assert call("run", "beta", "all", "--out", "here").exit_code == 0
    assert sorted(p.name for p in (tmp_path / "here").iterdir()) == ["alpha", "beta"]


def test_experiments_run_side_by_side_in_processes_of_their_own(call, tmp_path):
    """Two real ones; both fail, and what each of them said is shown."""
    found = call("run", "all_for_one", "ocr_heads", "--tiny", "--jobs", 2, "--out", tmp_path / "two",
                 "--model", "no-such-model")
    assert found.exit_code == 1
    assert all(f"{name}: failed" in found.stderr for name in ("all_for_one", "ocr_heads"))
    assert found.stderr.count("no-such-model") >= 2


def test_results_of_other_processes_are_shown_in_the_order_asked_for(
    lab, call, tmp_path, monkeypatch
):
    """Threads stand in for the processes here; the experiment asked for last is ready first."""
    lab.add("alpha")
    lab.add("beta")
    asked, alpha_is_ready = [], threading.Event()

    class Process:
        def __init__(self, words, threads):
            self.words = words
            asked.append(words)

        def communicate(self):
            name, self.returncode = self.words[1], 0
            if name == "beta":
                alpha_is_ready.wait(60)
            settings = cli.Settings.of(out=tmp_path / "two", seed=3, tiny=True)
            cli.execute(cli.load(name), settings)
            if name == "alpha":
                alpha_is_ready.set()
            return "", None

    monkeypatch.setattr(cli, "_start", Process)
    found = call("run", "beta", "alpha", "--jobs", 2, "--seed", 3, "--tiny", "--out", tmp_path / "two")
    assert found.exit_code == 0, found.output
    assert found.stdout.index("beta: claims") < found.stdout.index("alpha: claims")
    assert sorted(words[1] for words in asked) == ["alpha", "beta"]
    for words in asked:
        assert words[0] == "run" and {"--tiny", "3", str(tmp_path / "two")} <= set(words)
        assert "--jobs" not in words


def test_a_killed_run_of_several_goes_on_with_resume(lab, call, tmp_path):
    """A real process is killed in its second experiment; the first is then not run again."""
    out, marks = tmp_path / "out", tmp_path / "marks"
    for name in ("alpha", "beta", "gamma"):
        lab.add(name, **{"    rng = settings.rng()": f"""    import os, pathlib, time
    with open({str(marks)!r}, "a") as file:
        file.write("{name}\\n")
    if "{name}" == "beta" and os.environ.get("STAY"):
        time.sleep(300)
    rng = settings.rng()"""})
    code = ("import sys, experiments; sys.path.insert(0, '.')\n"
            f"experiments.__path__ = [{str(lab.folder)!r}]\n"
            f"sys.argv = ['x', 'run', 'all', '--seed', '3', '--out', {str(out)!r}]\n"
            "cli.main()")
    code = "import experiments.__main__ as cli\n" + code
    root = Path(cli.__file__).resolve().parents[1]
    running = subprocess.Popen([sys.executable, "-c", code], cwd=root, stdout=subprocess.DEVNULL,
                               stderr=subprocess.DEVNULL, env={**os.environ, "STAY": "1"})
    deadline = time.monotonic() + 300
    while not (marks.exists() and "beta" in marks.read_text()) and time.monotonic() < deadline:
        assert running.poll() is None
        time.sleep(0.05)
    running.send_signal(signal.SIGKILL)
    running.wait()
    first = {p: p.read_bytes() for p in (out / "alpha").rglob("*") if p.is_file()}
    assert first and not (out / "beta").exists()
    found = call("run", "all", "--seed", 3, "--out", out, "--resume")
    assert found.exit_code == 0, found.output
    assert marks.read_text().split() == ["alpha", "beta", "beta", "gamma"]
    assert first == {p: p.read_bytes() for p in (out / "alpha").rglob("*") if p.is_file()}
    assert "alpha: finished before, left as it is" in found.stderr
    assert re.search("9 claims", found.stdout) and found.stdout.index("alpha: claims") < (
        found.stdout.index("beta: claims"))
    assert sorted(p.name for p in out.iterdir()) == ["alpha", "beta", "gamma"]
    # Damaged, or of other settings: run again. Without --resume everything is.
    claims = out / "beta" / "claims.json"
    claims.write_text(claims.read_text()[:40])
    assert call("run", "all", "--seed", 3, "--out", out, "--resume").exit_code == 0
    assert marks.read_text().split()[4:] == ["beta"]
    assert call("run", "alpha", "--seed", 4, "--out", out, "--resume").exit_code == 0
    assert call("run", "gamma", "--seed", 3, "--out", out).exit_code == 0
    assert marks.read_text().split()[5:] == ["alpha", "gamma"]


@pytest.mark.parametrize("words, sentence", [
    (["aleph"], "there is no experiment 'aleph'; there are: alpha, or all."),
    (["alpha", "--figure", "sizes"], "there is no figure 'sizes' in alpha; there are: heads, lev"),
    (["alpha", "--seed", "-1"], "seed cannot be '-1'"),
    (["alpha", "--device", "gpu"], "device cannot be 'gpu'"),
    (["alpha", "--dtype", "half"], "dtype cannot be 'half'"),
    (["alpha", "--train"], "--train means nothing to alpha"),
])
def test_what_cannot_be_asked_is_answered_in_one_sentence(lab, call, tmp_path, words, sentence):
    lab.add("alpha")
    found = call("run", *words)
    assert found.exit_code == 2
    (line,) = sentences(found.stderr)
    assert sentence in line and found.stdout == ""
    assert not (tmp_path / "figures").exists()


def test_a_module_without_a_paper_is_named(lab, call):
    lab.add("alpha", "x = 1")
    found = call("run", "alpha")
    assert found.exit_code == 2 and "must define PAPER and run" in found.stderr


@pytest.mark.parametrize("error, sentence", [
    ("__import__('interp').core.ModelNotFound('no model of that name.')", "no model of that name."),
    ("__import__('interp').core.SegmentNotFound('no such segment.')", "no such segment."),
])
def test_an_error_of_the_package_is_one_sentence(lab, call, error, sentence):
    lab.fails_with("alpha", error)
    found = call("run", "alpha")
    assert found.exit_code == 1
    assert sentences(found.stderr)[1:] == [f"alpha: {sentence}", "Failed: alpha."]
    traced = call("run", "alpha", "--debug")
    assert traced.exit_code == 1 and "Traceback" in traced.stderr


def test_an_unforeseen_error_says_where_it_happened(lab, call):
    lab.fails_with("alpha", "KeyError('x')")
    found = call("run", "alpha")
    assert found.exit_code == 1 and "Traceback" not in found.stderr
    assert re.search(r"alpha: KeyError: 'x' \(alpha.py, line \d+\). Run it with --debug",
                     found.stderr)


def test_one_failure_does_not_stop_the_others(lab, call, tmp_path):
    lab.fails_with("alpha", "RuntimeError('x')")
    lab.add("beta")
    lab.add("gamma", "import no_such_module")
    found = call("run", "all")
    assert found.exit_code == 1
    assert "Failed: gamma, alpha." in found.stderr and "beta: 2 figures" in found.stdout
    assert [p.name for p in (tmp_path / "figures").iterdir()] == ["beta"]


def test_an_interruption_stops_everything_and_leaves_what_was_there(lab, call, tmp_path):
    lab.add("alpha")
    lab.fails_with("beta", "KeyboardInterrupt()")
    lab.add("gamma")
    found = call("run", "all")
    assert found.exit_code == 130
    assert "Interrupted: figures/beta is as it was before." in found.stderr
    assert "Traceback" not in found.stderr and "alpha: 2 figures" in found.stdout
    assert [p.name for p in (tmp_path / "figures").iterdir()] == ["alpha"]


@pytest.mark.parametrize("words, folder", [
    ([], "figures"),
    (["--tiny"], "figures/tiny"),
    (["--model", "Qwen/Qwen3-4B"], "figures/Qwen3-4B"),
    (["--model", "a", "--model", "/models/b/", "--tiny"], "figures/a-b/tiny"),
    (["--figure", "heads"], "figures/only-heads"),
    (["--tiny", "--out", "here"], "here"),
])
def test_a_partial_run_does_not_land_on_the_whole_one(lab, call, tmp_path, words, folder):
    lab.add("alpha")
    assert call("run", "alpha", *words).exit_code == 0
    assert [p.parent.relative_to(tmp_path) for p in tmp_path.rglob("claims.json")] == [
        Path(folder) / "alpha"]


def folders_of_models(tmp_path, *names):
    """Folders that exist; the experiments of the laboratory never open them."""
    for name in names:
        (tmp_path / name).mkdir(parents=True)
    return names


def test_models_of_one_name_do_not_replace_each_other(lab, call, tmp_path):
    """Two folders and a hub model of one name; each run again lands on its own results."""
    lab.add("alpha")
    lab.add("beta")
    first, second = folders_of_models(tmp_path, "run1/final", "run2/final")
    homes = {}
    for model in (first, second, "org/final"):
        found = call("run", "alpha", "--model", model, "--tiny")
        assert found.exit_code == 0, found.output
        (new,) = {p.parents[2] for p in tmp_path.glob("figures/*/tiny/alpha/claims.json")
                  } - set(homes.values())
        homes[model] = new
        assert (f"these results go to figures/{new.name}." in found.stderr) == (model != first)
        assert f"2 figures in figures/{new.name}/tiny/alpha" in found.stdout
    assert homes[first].name == "final" and homes[second].name.startswith("final-")
    assert str(tmp_path.name) not in homes[second].name
    before = {p: p.read_bytes() for p in tmp_path.glob("figures/*/tiny/alpha/manifest.json")}
    # The same folder by another path, with another experiment and with --resume.
    (tmp_path / "link").symlink_to(tmp_path / "run2")
    assert call("run", "beta", "--model", "link/final", "--tiny").exit_code == 0
    assert (homes[second] / "tiny" / "beta" / "claims.json").is_file()
    again = call("run", "alpha", "--model", second, "--tiny", "--resume")
    assert "alpha: finished before, left as it is" in again.stderr
    assert before == {p: p.read_bytes() for p in tmp_path.glob("figures/*/tiny/alpha/manifest.json")}
    assert call("run", "alpha", "--model", first, "--seed", 1).exit_code == 0
    assert (homes[first] / "alpha" / "claims.json").is_file()
    report = call("report")
    assert "results: 5, broken: 0" in report.stdout, report.output


def test_a_folder_with_the_name_of_a_bundled_model_leaves_its_place_free(lab, call, tmp_path):
    lab.add("alpha")
    (folder,) = folders_of_models(tmp_path, "mine/reader")
    assert call("run", "alpha", "--model", folder).exit_code == 0
    assert not (tmp_path / "figures" / "reader").exists()
    assert call("run", "alpha", "--model", "reader").exit_code == 0
    assert (tmp_path / "figures" / "reader" / "alpha" / "claims.json").is_file()


def test_models_of_one_name_are_not_run_together(lab, call, tmp_path):
    lab.add("alpha")
    first, second = folders_of_models(tmp_path, "run1/final", "run2/final")
    found = call("run", "alpha", "--model", first, "--model", second)
    assert found.exit_code == 2 and "'run1/final' and 'run2/final' are both called" in found.stderr
    assert call("run", "alpha", "--model", first, "--model", f"{first}/").exit_code == 0


def test_a_failed_run_leaves_no_empty_folder(lab, call, tmp_path):
    lab.fails_with("alpha", "RuntimeError('x')")
    assert call("run", "alpha", "--model", "org/final", "--tiny").exit_code == 1
    assert not (tmp_path / "figures").exists()


def test_claims_that_one_reason_keeps_from_being_tested_are_one_row(lab, call, tmp_path):
    lab.add("alpha", **{'    out.claim(Claim.untestable("It needs depth."': '''
    for i in range(37):
        out.claim(Claim.untestable(f"Sentence {i}.", "arXiv:2512.22213", "too few blocks"), "m")
    out.claim(Claim.untestable("It needs depth."'''})
    found = call("run", "alpha")
    flat = re.sub(r"[\s│┃]+", " ", found.stdout)
    assert "37 claims [m]: too few blocks" in flat and "Sentence 7" not in flat
    assert "It needs depth. (the model has 3 blocks)" in flat and "38 not testable" in flat
    assert "Sentence 36." in (tmp_path / "figures" / "alpha" / "claims.md").read_text()


def test_why_a_figure_was_not_drawn_stands_beside_the_count(lab, call):
    lab.add("alpha", **{'out.figure("heads", figure)': 'out.no_figure("heads", "no head is left.")'})
    found = call("run", "alpha", "--figure", "heads")
    assert found.exit_code == 0
    assert "alpha: 0 figures in figures/only-heads/alpha" in found.stdout
    assert "not drawn: heads: no head is left" in found.stdout


def test_a_figure_runs_only_the_experiments_that_draw_it(lab, call, tmp_path):
    lab.add("alpha")
    lab.add("beta")
    path = lab.folder / "beta.py"
    path.write_text(path.read_text().replace('"levels"', '"sizes"'))
    found = call("run", "all", "--figure", "levels", "--out", "here")
    assert found.exit_code == 0, found.output
    assert [p.name for p in (tmp_path / "here").iterdir()] == ["alpha"]


def test_settings_reach_the_experiment(lab, call, tmp_path):
    lab.add("alpha", **{"    rng = settings.rng()": "    rng = settings.rng()\n"
                        "    assert settings.opening() == {'device': 'cpu', 'dtype': 'float32'}\n"
                        "    assert settings.models(PAPER) == ('m', 'n') and settings.tiny"})
    found = call("run", "alpha", "--model", "m", "--model", "n", "--tiny", "--device", "cpu",
                 "--dtype", "float32", "--out", "here")
    assert found.exit_code == 0, found.output
    settings = Outcome.load(tmp_path / "here" / "alpha").manifest["settings"]
    assert settings == {"model": ["m", "n"], "seed": 0, "tiny": True, "train": False,
                        "figure": None, "device": "cpu", "dtype": "float32"}
