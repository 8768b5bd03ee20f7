"""Sweeps: a planted necessary head is told from its controls; killed sweeps go on."""

import copy
import os
import signal
import subprocess
import sys
import textwrap
import time
import warnings

import numpy as np
import pytest
import torch

import interp
from interp.causal import cells, sweep
from interp.causal.ablate import keep_only, mean_output
from interp.causal.metrics import AnswerAccuracy, AnswerLogProb, TextLoss
from interp.core.errors import FolderRefused, NotEnoughMemory, OutOfRange, PromptError
from interp.models.model import Model

NEEDED = "L1H3"


@pytest.fixture(scope="module")
def model(tiny):
    """A Llama in which one head writes far more than the others."""
    hf = copy.deepcopy(tiny("llama"))
    with torch.no_grad():
        attention = hf.model.layers[1].self_attn
        width = attention.head_dim
        attention.o_proj.weight[:, 3 * width : 4 * width] *= 25.0
    return Model(hf, "planted")


def prompts(count=8, length=10):
    rng = np.random.default_rng(0)
    return [interp.Prompt.from_tokens(rng.integers(3, 90, length)) for _ in range(count)]


@pytest.fixture(scope="module")
def answers(model):
    """What the model itself says: its own head is then needed for it."""
    return model.generate(prompts(), 1)


def test_the_planted_head_is_needed_and_its_controls_are_not(model, answers):
    found = sweep.ablation_sweep(
        model, prompts(), [AnswerLogProb(answers), AnswerAccuracy(answers)], [NEEDED, "L0H1"],
        counts=(0, 1))
    assert found["log_prob"].sizes == {"condition": 2, "seed": 5, "count": 2, "prompt": 8}
    assert (found["accuracy"].sel(count=0) == 1).all()
    gap = sweep.difference(found, "log_prob", 1)
    assert gap.interval[1] < 0 and gap.value < -0.5
    assert sweep.effect(found, "log_prob", 1).value < sweep.effect(
        found, "log_prob", 1, "random").value
    # In the matched control nothing is needed: a ranking that names another head of the layer.
    wrong = sweep.ablation_sweep(model, prompts(), AnswerLogProb(answers), ["L1H0"], counts=(0, 1),
                                 exclude=[])
    assert sweep.difference(wrong, "log_prob", 1).value > -0.2


def test_controls_are_in_the_manifest_match_the_layers_and_avoid_the_top(model, answers):
    ranking = interp.HeadScores.of(np.random.default_rng(1).random((3, 6)))
    found = sweep.ablation_sweep(model, prompts(2), AnswerLogProb(answers[:2]), ranking,
                                 counts=(1, 2), seeds=6)
    top = set(found.manifest["top"])
    assert found.manifest["top"] == [str(h) for h in ranking.top(2)]
    for mark, names in found.manifest["random"].items():
        assert not set(names) & top and len(names) == int(mark.split("/")[1])
    assert found["layer_matched"].all()
    assert sweep.random_sets(found, 1) > 1
    # Three of six leave the other three, whatever is drawn.
    alone = sweep.ablation_sweep(model, prompts(2), AnswerLogProb(answers[:2]),
                                 [f"L1H{i}" for i in range(3)], counts=(3,), seeds=5)
    assert alone["layer_matched"].all() and sweep.random_sets(alone, 3) == 1
    # Five heads of one layer of six cannot have five matched controls, and that is said.
    crowded = sweep.ablation_sweep(model, prompts(2), AnswerLogProb(answers[:2]),
                                   [f"L1H{i}" for i in range(5)], counts=(5,), seeds=5)
    assert not crowded["layer_matched"].any()


def test_the_printed_difference_says_what_the_control_was_and_warns_where_it_is_little(model, answers):
    metric = AnswerAccuracy(answers)
    wide = sweep.ablation_sweep(model, prompts(), metric, [NEEDED, "L0H1"], counts=(0, 2), seeds=12)
    sets = sweep.random_sets(wide, 2)
    assert sets >= 5
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        said = str(sweep.difference(wide, "accuracy", 2))
        assert str(sweep.difference(wide, "accuracy", 0)).endswith(
            "all 8 differences are equal: no interval)")  # nothing is ablated: no control, either
    assert said.endswith(f"; control: {sets} different random sets of heads, layer-matched)")
    # Three of six heads leave one set; five of six leave none in the layer.
    narrow = [f"L1H{i}" for i in range(5)]
    found = sweep.ablation_sweep(model, prompts(), metric, narrow, counts=(3,))
    with pytest.warns(UserWarning, match=r"only 1 different random set stands .* count 3 \(layer-m"):
        assert "control: 1 different random set of heads, layer-matched" in str(
            sweep.difference(found, "accuracy", 3))
    found = sweep.ablation_sweep(model, prompts(), metric, narrow, counts=(5,))
    assert "random sets of heads, from all layers, as the layers have too few other heads" in str(
        sweep.difference(found, "accuracy", 5))
    few = sweep.ablation_sweep(model, prompts(), metric, [NEEDED, "L0H1"], counts=(2,), seeds=2)
    with pytest.warns(UserWarning, match="only 2 different random sets stand"):
        sweep.difference(few, "accuracy", 2)


def test_a_count_or_metric_that_the_sweep_lacks_is_named(model, answers):
    found = sweep.ablation_sweep(model, prompts(), AnswerAccuracy(answers), [NEEDED], counts=(0, 1))
    with pytest.raises(OutOfRange, match="no count 7; its counts are: 0, 1"):
        sweep.difference(found, "accuracy", 7)
    with pytest.raises(OutOfRange, match="no count 7"):
        sweep.effect(found, "accuracy", 7)
    with pytest.raises(OutOfRange, match="no metric 'acuracy'; it has: accuracy. Did you mean"):
        sweep.difference(found, "acuracy", 1)


@pytest.mark.parametrize("by", ["zero", "mean", "uniform"])
def test_kinds_of_ablation_give_different_numbers_and_neutral_text_is_beside(model, answers, by):
    neutral = prompts(5, 12)
    found = sweep.ablation_sweep(
        model, prompts(), [AnswerLogProb(answers), TextLoss(neutral)], [NEEDED], counts=(0, 1),
        by=by, seeds=5)
    assert found["text_loss"].dims == ("condition", "seed", "count", "sample")
    value = mean_output(model, prompts()) if by == "mean" else None
    direct = AnswerLogProb(answers)(model, prompts(), interp.ablate(NEEDED, by, value=value))
    assert np.allclose(found["log_prob"].sel(condition="top", seed=0, count=1), direct)


def test_the_area_is_the_mean_along_the_curve(model, answers):
    found = sweep.ablation_sweep(model, prompts(), AnswerLogProb(answers), [NEEDED, "L0H1", "L2H2"],
                                 counts=(0, 1, 3))
    one = found["log_prob"].sel(condition="top", seed=0)
    expected = (one.sel(count=0) + one.sel(count=1)) / 2 + one.sel(count=1) + one.sel(count=3)
    assert np.allclose(sweep.area(found, "log_prob", "top"), expected.values / 3)


def test_keeping_only_all_heads_is_the_model_and_mean_outputs_are_means(model):
    one = prompts(1)[0]
    everything = [f"L{a}H{b}" for a in range(3) for b in range(6)]
    with pytest.raises(ValueError, match="no heads"):
        keep_only(everything, 3, 6, by="zero")
    cut = keep_only(everything[1:], 3, 6, by="zero")
    assert [str(h) for h in cut.heads] == ["L0H0"]
    given = [prompts(1, 7)[0], prompts(1, 12)[0]]
    z = [model.run(p, read="z").reads["z"].values[0] for p in given]
    expected = np.concatenate(z, 1).mean(1)
    assert np.allclose(mean_output(model, given), expected, atol=1e-5)
    assert not torch.allclose(model.run(one, write=cut).logits[0], model.run(one).logits[0])


def test_cells_are_kept_and_a_damaged_one_is_computed_again(model, answers, tmp_path, monkeypatch):
    def run():
        return sweep.ablation_sweep(model, prompts(), AnswerLogProb(answers), [NEEDED],
                                    counts=(0, 1), folder=tmp_path)["log_prob"].values

    first, passes = run(), []
    honest = AnswerLogProb.passes
    monkeypatch.setattr(AnswerLogProb, "passes",
                        lambda self, *a: passes.append(1) or honest(self, *a))
    assert np.array_equal(run(), first) and not passes
    damaged = sorted(set(tmp_path.glob("*.json")) - {tmp_path / cells.HEADER})[0]
    damaged.write_text(damaged.read_text()[:5])
    assert np.array_equal(run(), first) and len(passes) == 1
    # Other weights, same name: nothing of it is used, and nothing is put beside it.
    kept = {path: path.read_bytes() for path in tmp_path.iterdir()}
    with torch.no_grad():
        model.hf.model.norm.weight[0] += 1.0
    try:
        with pytest.raises(FolderRefused, match="'planted' with other weights: choose another"):
            run()
    finally:
        with torch.no_grad():
            model.hf.model.norm.weight[0] -= 1.0
    assert kept == {path: path.read_bytes() for path in tmp_path.iterdir()}


class Hungry(AnswerLogProb):
    """Runs out of memory for batches above a size."""

    fits, tried = 2, []

    def passes(self, model, prompts, write):
        self.tried.append(self.batch_size)
        if min(self.batch_size, len(prompts)) > self.fits:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
        return super().passes(model, prompts, write)


def test_batches_are_halved_where_memory_runs_out_and_stay_so(model, answers, monkeypatch):
    given, writes = prompts(), [(), interp.ablate(NEEDED)]
    expected = sweep.evaluate(model, given, [AnswerLogProb(answers)], writes)["log_prob"]
    monkeypatch.setattr(Hungry, "tried", [])
    metric = Hungry(answers)
    found = sweep.evaluate(model, given, [metric], writes)["log_prob"]
    assert np.allclose(found, expected, atol=1e-5) and Hungry.tried == [8, 4, 2, 2]
    assert metric.batch_size == 8  # what was given is as it was


def test_no_memory_for_even_one_cell_is_one_sentence_and_loses_nothing(
        model, answers, tmp_path, monkeypatch):
    given = prompts()
    kept = sweep.evaluate(model, given, [AnswerLogProb(answers)], [()], folder=tmp_path)
    monkeypatch.setattr(Hungry, "fits", 0)
    with pytest.raises(NotEnoughMemory, match="even one cell, a prompt of up to 10 tokens.*smaller "
                                              "dtype.*Tried to allocate") as caught:
        sweep.evaluate(model, given, [Hungry(answers)], [(), interp.ablate(NEEDED)], folder=tmp_path)
    assert "\n" not in str(caught.value) and not list(tmp_path.glob("*.lock"))
    again = sweep.evaluate(model, given, [Hungry(answers)], [()], folder=tmp_path)
    assert np.array_equal(again["log_prob"], kept["log_prob"])
    monkeypatch.setattr(Hungry, "passes", lambda *_: [][0])
    with pytest.raises(IndexError):  # any other error is what it is
        sweep.evaluate(model, given, [Hungry(answers)], [()])


@pytest.mark.slow
def test_a_killed_sweep_goes_on_and_equals_an_uninterrupted_one(tmp_path):
    code = textwrap.dedent("""
        import sys, time
        import numpy as np
        import interp
        from interp.causal import cells, sweep
        from interp.causal.metrics import AnswerLogProb
        honest = AnswerLogProb.passes
        def slow(self, *given):
            time.sleep(float(sys.argv[2]))
            return honest(self, *given)
        AnswerLogProb.passes = slow
        model = interp.open_model("reader")
        prompts = [interp.Prompt.from_tokens(range(3, 12))]
        found = sweep.ablation_sweep(model, prompts, AnswerLogProb([[5]]),
                                     ["L0H0", "L1H0", "L2H0"], counts=(0, 1, 2), folder=sys.argv[1])
        print(found["log_prob"].values.tolist())
    """)

    def start(folder, pause):
        return subprocess.Popen([sys.executable, "-c", code, str(folder), str(pause)],
                                stdout=subprocess.PIPE, text=True, env=dict(os.environ))

    killed = start(tmp_path / "a", 0.5)
    deadline = time.monotonic() + 90
    while len(list((tmp_path / "a").glob("*.json"))) < 3 and time.monotonic() < deadline:
        time.sleep(0.02)
    killed.send_signal(signal.SIGKILL)
    killed.wait()
    kept = {p.name for p in (tmp_path / "a").glob("*.json")}
    resumed, whole = start(tmp_path / "a", 0), start(tmp_path / "b", 0)
    assert resumed.communicate()[0] == whole.communicate()[0] != ""
    finished = {p.name for p in (tmp_path / "a").glob("*.json")}
    assert 3 <= len(kept) < len(finished) and kept < finished


def test_what_cannot_be_swept_is_one_sentence(model, answers):
    metric = AnswerLogProb(answers)
    with pytest.raises(OutOfRange, match="cannot ablate 3 heads: the ranking has 1"):
        sweep.ablation_sweep(model, prompts(), metric, [NEEDED], counts=(0, 3))
    with pytest.raises(OutOfRange, match="L8H0 does not exist"):
        sweep.ablation_sweep(model, prompts(), metric, ["L8H0"], counts=(0, 1))
    with pytest.raises(PromptError, match="no prompts"):
        sweep.evaluate(model, [], [metric], [()])
    with pytest.raises(PromptError, match="names of their own"):
        sweep.evaluate(model, prompts(), [metric, metric], [()])
