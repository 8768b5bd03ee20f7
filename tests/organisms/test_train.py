"""The training loop: resumed equals uninterrupted, and a model appears complete or not at all."""

import json
import os
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from interp.core.errors import ModelNotFound
from interp.organisms import backcopy, registry
from interp.organisms.__main__ import main
from interp.organisms.train import Recipe, evaluate, train

ROOT = Path(__file__).resolve().parents[2]


def tiny(**changes) -> Recipe:
    recipe = backcopy.recipe(layers=1, d_model=12, length=10, batch=3, steps=30, lr=1e-2)
    return replace(recipe, **{"checkpoint_every": 4, "evaluate_every": 6, **changes})


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model" / "model.safetensors")


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[k], other[k]) for k in one)


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    folder = tmp_path_factory.mktemp("uninterrupted")
    return folder, train(tiny(), folder, progress=False, device="cpu")


KILLED = """
import sys
sys.path[:0] = [{root!r}, {tests!r}]
from pathlib import Path
from test_train import tiny
from interp.organisms.train import train

def say(step, model, loss):
    print(step, flush=True)

train(tiny(), Path({folder!r}), progress=False, device="cpu", on_step=say)
"""


def test_a_run_killed_without_warning_and_resumed_equals_the_uninterrupted_one(
    uninterrupted, tmp_path
):
    script = KILLED.format(root=str(ROOT), tests=str(Path(__file__).parent), folder=str(tmp_path))
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    with subprocess.Popen(
        [sys.executable, "-c", script], stdout=subprocess.PIPE, text=True, env=environment
    ) as process:
        for line in process.stdout:
            if (
                int(line) == 15
            ):  # between two checkpoints: steps 13 to 15 are lost and must be done again
                os.kill(process.pid, signal.SIGKILL)
                break
    assert process.wait() == -signal.SIGKILL
    assert not (tmp_path / "model").exists()
    done = []
    result = train(
        tiny(),
        tmp_path,
        progress=False,
        device="cpu",
        on_step=lambda step, model, loss: done.append(step),
    )
    folder, expected = uninterrupted
    assert done[0] > 1 and done[-1] == 30
    assert same(weights(tmp_path), weights(folder))
    assert result["log"] == expected["log"] and result["evaluations"] == expected["evaluations"]
    assert result["accuracy"] == expected["accuracy"]


def test_a_run_in_two_parts_equals_one_run(uninterrupted, tmp_path):
    first = train(tiny(), tmp_path, steps=9, progress=False, device="cpu")
    assert (first["step"], first["finished"]) == (9, False) and not (tmp_path / "model").exists()
    second = train(tiny(), tmp_path, progress=False, device="cpu")
    assert second["finished"]
    assert same(weights(tmp_path), weights(uninterrupted[0]))


def test_momentum_survives_a_resumed_run_of_plain_gradient_descent(tmp_path):
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    train(tiny(optimizer="sgd"), whole, progress=False, device="cpu")
    train(tiny(optimizer="sgd"), parts, steps=7, progress=False, device="cpu")
    train(tiny(optimizer="sgd"), parts, progress=False, device="cpu")
    assert same(weights(whole), weights(parts))


def test_the_seed_decides_the_weights_and_nothing_else_does(uninterrupted, tmp_path):
    torch.manual_seed(99)
    np.random.seed(99)
    before = torch.get_rng_state()
    train(tiny(), tmp_path / "again", progress=False, device="cpu")
    assert torch.equal(torch.get_rng_state(), before)  # the caller's random numbers are left alone
    train(tiny(), tmp_path / "other", seed=1, progress=False, device="cpu")
    assert same(weights(tmp_path / "again"), weights(uninterrupted[0]))
    assert not same(weights(tmp_path / "other"), weights(uninterrupted[0]))


def test_weight_decay_spares_norms_only_when_told_so(tmp_path):
    def idle(model, rng, step):  # no gradient anywhere: only decay moves a parameter
        return sum(p.sum() for p in model.parameters()) * 0.0

    still = {
        "loss": idle,
        "weight_decay": 0.5,
        "evaluate_every": 0,
        "steps": 5,
        "schedule": "constant",
    }
    for decay, moves in (("matrices", False), ("all", True)):
        train(tiny(decay=decay, **still), tmp_path / decay, progress=False, device="cpu")
        found = weights(tmp_path / decay)
        assert bool((found["model.decoder.final_layer_norm.weight"] != 1).any()) is moves
        assert found["lm_head.weight"].norm() < tiny().build(0).lm_head.weight.norm()


def test_the_learning_rate_warms_up_and_falls():
    recipe = tiny(warmup=10, steps=110, lr=1.0, final_lr=0.1, schedule="cosine")
    rates = [recipe.rate(step) for step in range(110)]
    assert rates[:10] == pytest.approx([(i + 1) / 10 for i in range(10)])
    assert all(a >= b for a, b in zip(rates[10:], rates[11:])) and rates[60] == pytest.approx(0.55)
    assert replace(recipe, schedule="constant").rate(109) == 1.0


def test_the_exported_folder_opens_as_any_model_and_its_card_says_what_was_measured(uninterrupted):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder, result = uninterrupted
    model = AutoModelForCausalLM.from_pretrained(folder / "model")
    encoded = AutoTokenizer.from_pretrained(folder / "model")("ab", return_tensors="pt").input_ids
    assert encoded[0, 0] == backcopy.BOS and model(encoded).logits.shape == (
        1,
        3,
        backcopy.VOCABULARY,
    )
    card = json.loads((folder / "model" / "card.json").read_text())
    assert card["accuracy"] == result["accuracy"] == evaluate(tiny(), model, card["held_out_seed"])
    assert card["held_out_seed"] != card["seed"] and card["steps"] == 30
    text = (folder / "model" / "card.md").read_text()
    assert "| copy_risk |" in text and "## Recipe" in text
    assert not [p for p in folder.rglob("*") if p.suffix in (".bin", ".pt", ".pkl", ".tmp", ".old")]


def test_a_checkpoint_of_other_settings_is_refused_by_name(uninterrupted, tmp_path):
    train(tiny(), tmp_path, steps=2, progress=False, device="cpu")
    with pytest.raises(ValueError, match=r"lr: 0.01 there, 0.5 asked for.*resume=False"):
        train(tiny(lr=0.5), tmp_path, progress=False, device="cpu")
    with pytest.raises(ValueError, match="seed: 0 there, 3 asked for"):
        train(tiny(), tmp_path, seed=3, progress=False, device="cpu")
    assert (
        train(tiny(lr=0.5), tmp_path, steps=1, resume=False, progress=False, device="cpu")["step"]
        == 1
    )


def test_a_damaged_checkpoint_is_named(tmp_path):
    train(tiny(), tmp_path, steps=2, progress=False, device="cpu")
    (tmp_path / "checkpoint-00000002" / "model.safetensors").write_bytes(b"damaged")
    with pytest.raises(ValueError, match="cannot resume from .*checkpoint-00000002"):
        train(tiny(), tmp_path, progress=False, device="cpu")


def test_a_loss_that_is_not_finite_stops_the_run_and_keeps_the_checkpoint(tmp_path):
    fine = tiny().loss

    def breaks(model, rng, step):
        return fine(model, rng, step) * (float("nan") if step == 6 else 1.0)

    with pytest.raises(ValueError, match="is nan at step 6. Lower its learning rate"):
        train(tiny(loss=breaks), tmp_path, progress=False, device="cpu")
    assert [p.name for p in tmp_path.glob("checkpoint-*")] == ["checkpoint-00000004"]


def test_a_time_limit_stops_at_a_checkpoint(tmp_path):
    result = train(tiny(), tmp_path, max_minutes=0.0, progress=False, device="cpu")
    assert (result["step"], result["finished"]) == (1, False)
    assert train(tiny(), tmp_path, progress=False, device="cpu")["finished"]


def test_unknown_names_list_the_known_ones(capsys):
    for call in (registry.path, registry.recipe, registry.card):
        with pytest.raises(
            ModelNotFound, match="unknown bundled model 'redaer'. Choose one of: backcopy-1l"
        ):
            call("redaer")
    assert main(["train", "redaer"]) == 2
    assert "unknown bundled model 'redaer'" in capsys.readouterr().err


def test_weights_that_are_missing_are_said_to_be_missing(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(registry, "WEIGHTS", tmp_path)
    with pytest.raises(ModelNotFound, match="python -m interp.organisms train reader --install"):
        registry.path("reader")
    assert main(["list"]) == 0 and "no weights" in capsys.readouterr().out


def test_the_command_line_trains_installs_and_evaluates(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(registry, "WEIGHTS", tmp_path / "weights")
    monkeypatch.setattr(registry, "recipe", lambda name: tiny(name=name))
    command = [
        "train",
        "backcopy-1l",
        "--seed",
        "5",
        "--device",
        "cpu",
        "--out",
        str(tmp_path / "run"),
    ]
    assert main([*command, "--steps", "0"]) == 2
    assert "--steps must be at least 1" in capsys.readouterr().err
    assert main([*command, "--steps", "6", "--install"]) == 0
    assert (registry.path("backcopy-1l") / "model.safetensors").is_file()
    capsys.readouterr()
    assert main(["evaluate", "backcopy-1l", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    card = json.loads((registry.path("backcopy-1l") / "card.json").read_text())
    assert (found["training_seed"], found["held_out_seed"]) == (5, 6) and found["accuracy"] == card[
        "accuracy"
    ]
    assert main(["evaluate", "backcopy-1l", "--json", "--seed", "77"]) == 0
    other = json.loads(capsys.readouterr().out)
    assert other["held_out_seed"] == 77 and other["accuracy"] != card["accuracy"]
