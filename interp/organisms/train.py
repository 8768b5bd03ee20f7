"""Training of the bundled models: one loop, fresh data every step, resumable to the bit.

A `Recipe` says everything that decides the result; `train` runs it. A run folder holds
`checkpoint-XXXXXXXX/` (safetensors for model and optimizer, JSON for the rest, never pickle)
and, once the last step is done, `model/` (what `save_pretrained` writes, the tokenizer, the card).
"""

import json
import math
import os
import platform
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor
from tqdm.auto import tqdm

_CHECKPOINT = "checkpoint-"
# Changing one of these in the middle of a run is legitimate; changing anything else is another run.
_MAY_CHANGE = ("steps", "evaluate_every", "checkpoint_every", "notes", "data")


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """Everything that decides a trained model, apart from its seed.

    Example:
        >>> from interp.organisms.train import Recipe
        >>> sorted(Recipe.__dataclass_fields__)[:3]
        ['betas', 'build', 'checkpoint_every']

    `loss` draws its own fresh batch from the generator it is given. `evaluate` returns the
    accuracy per task on held-out data of the given seed; `observe` (optional) what else goes into
    the card. Weight decay acts on matrices and embeddings only (`decay="matrices"`: parameters
    with two axes or more) or on every parameter, norms and biases included (`decay="all"`, what
    the papers reproduced here did). The learning rate rises linearly over `warmup` steps, then
    stays or follows a cosine to `final_lr * lr`.
    """

    name: str
    build: Callable[[int], torch.nn.Module]
    loss: Callable[[torch.nn.Module, np.random.Generator, int], Tensor]
    evaluate: Callable[[torch.nn.Module, int], dict[str, float]]
    export: Callable[[torch.nn.Module, Path], object]
    observe: Callable[[torch.nn.Module, int], dict[str, float]] | None = None
    steps: int
    lr: float
    weight_decay: float = 0.0
    decay: Literal["matrices", "all"] = "matrices"
    betas: tuple[float, float] = (0.9, 0.95)
    eps: float = 1e-8
    momentum: float = 0.9
    warmup: int = 100
    schedule: Literal["cosine", "constant"] = "cosine"
    final_lr: float = 0.05
    clip: float | None = 1.0
    optimizer: Literal["adamw", "sgd"] = "adamw"
    evaluate_every: int = 0
    checkpoint_every: int = 200
    notes: str = ""
    data: str = ""

    def rate(self, step: int) -> float:
        """The learning rate of a step, counted from 0."""
        if step < self.warmup:
            return self.lr * (step + 1) / self.warmup
        if self.schedule == "constant":
            return self.lr
        done = min(1.0, (step - self.warmup) / max(1, self.steps - self.warmup))
        return self.lr * (self.final_lr + (1 - self.final_lr) * 0.5 * (1 + math.cos(math.pi * done)))

    def settings(self) -> dict[str, Any]:
        """The recipe's numbers and words, without its functions."""
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        return {k: list(v) if isinstance(v, tuple) else v for k, v in values.items() if not callable(v)}


def _optimizer(recipe: Recipe, model: torch.nn.Module) -> torch.optim.Optimizer:
    named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    decayed = [p for _, p in named if recipe.decay == "all" or p.ndim >= 2]
    spared = [p for _, p in named if not (recipe.decay == "all" or p.ndim >= 2)]
    groups = [{"params": decayed, "weight_decay": recipe.weight_decay}]
    if spared:
        groups.append({"params": spared, "weight_decay": 0.0})
    if recipe.optimizer == "sgd":
        return torch.optim.SGD(groups, lr=recipe.lr, momentum=recipe.momentum)
    return torch.optim.AdamW(groups, lr=recipe.lr, betas=recipe.betas, eps=recipe.eps, fused=True)


def _write(path: Path, text: str) -> None:
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(text, encoding="utf-8")
    os.replace(temporary, path)


def replace_folder(new: Path, final: Path) -> None:
    """Put a finished folder in its place; what stood there is only removed once the new one is in.

    Example:
        >>> import tempfile
        >>> from pathlib import Path
        >>> from interp.organisms.train import replace_folder
        >>> with tempfile.TemporaryDirectory() as here:
        ...     new, final = Path(here) / "a.tmp", Path(here) / "a"
        ...     new.mkdir()
        ...     replace_folder(new, final)
        ...     final.is_dir(), new.exists()
        (True, False)
    """
    old = final.with_name(final.name + ".old")
    shutil.rmtree(old, ignore_errors=True)
    if final.exists():
        os.replace(final, old)
    os.replace(new, final)
    shutil.rmtree(old, ignore_errors=True)


def _save(
    folder: Path, model: torch.nn.Module, optimizer: torch.optim.Optimizer, state: dict[str, Any]
) -> None:
    step = state["step"]
    final = folder / f"{_CHECKPOINT}{step:08d}"
    new = folder / f"{final.name}.tmp"
    shutil.rmtree(new, ignore_errors=True)
    new.mkdir(parents=True)
    # Tied weights are stored twice: safetensors refuses tensors that share memory.
    save_file(
        {k: v.detach().cpu().clone().contiguous() for k, v in model.state_dict().items()},
        new / "model.safetensors",
    )
    moments = {
        f"{index}.{key}": value.detach().cpu().clone().contiguous()
        for index, entry in optimizer.state_dict()["state"].items()
        for key, value in entry.items()
        if isinstance(value, Tensor)
    }
    save_file(moments, new / "optimizer.safetensors")
    random = {"torch": torch.get_rng_state()}
    if torch.cuda.is_available():
        random["cuda"] = torch.cuda.get_rng_state()
    save_file(random, new / "random.safetensors")
    _write(new / "state.json", json.dumps(state))
    replace_folder(new, final)
    for other in folder.glob(_CHECKPOINT + "*"):
        if other != final:
            shutil.rmtree(other, ignore_errors=True)


def _latest(folder: Path) -> Path | None:
    found = [p for p in folder.glob(_CHECKPOINT + "*") if p.name[len(_CHECKPOINT) :].isdigit()]
    return max(found, key=lambda p: p.name, default=None)


def _load(folder: Path, model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    try:
        state = json.loads((folder / "state.json").read_text(encoding="utf-8"))
        model.load_state_dict(load_file(folder / "model.safetensors"))
        moments = load_file(folder / "optimizer.safetensors")
        random = load_file(folder / "random.safetensors")
    except Exception as error:
        raise ValueError(
            f"cannot resume from {folder}: {error}. Remove that folder, or pass resume=False."
        ) from error
    content = optimizer.state_dict()
    for name, value in moments.items():
        index, key = name.split(".", 1)
        content["state"].setdefault(int(index), {})[key] = value
    optimizer.load_state_dict(content)
    torch.set_rng_state(random["torch"])
    if "cuda" in random and torch.cuda.is_available():
        torch.cuda.set_rng_state(random["cuda"])
    return state


def _check(recipe: Recipe, seed: int, state: dict[str, Any], folder: Path) -> None:
    stored, wanted = dict(state["recipe"]), recipe.settings()
    for key in _MAY_CHANGE:
        stored.pop(key, None)
        wanted.pop(key, None)
    stored["seed"], wanted["seed"] = state["seed"], seed
    different = sorted(k for k in stored.keys() | wanted.keys() if stored.get(k) != wanted.get(k))
    if different:
        said = ", ".join(f"{k}: {stored.get(k)!r} there, {wanted.get(k)!r} asked for" for k in different)
        raise ValueError(
            f"cannot resume {recipe.name!r} from {folder}: it was started with other settings "
            f"({said}). "
            "Use another folder, or pass resume=False."
        )


def evaluate(recipe: Recipe, model: torch.nn.Module, seed: int) -> dict[str, float]:
    """The recipe's accuracy per task on held-out data of `seed`, leaving mode and generator alone.

    Example:
        >>> from interp.organisms import backcopy, train
        >>> recipe = backcopy.recipe(d_model=16, length=8)
        >>> sorted(train.evaluate(recipe, recipe.build(0), seed=1))[0]
        'bigram_excess_risk'
    """
    training = model.training
    model.eval()
    try:
        with torch.no_grad(), torch.random.fork_rng():
            return {task: float(value) for task, value in recipe.evaluate(model, seed).items()}
    finally:
        model.train(training)


def train(
    recipe: Recipe,
    folder: Path,
    *,
    seed: int = 0,
    device: str | None = None,
    steps: int | None = None,
    resume: bool = True,
    progress: bool = True,
    max_minutes: float | None = None,
    on_step: Callable[[int, torch.nn.Module, float], None] | None = None,
) -> dict[str, Any]:
    """Run a recipe in a folder, from its last checkpoint if there is one.

    Example:
        >>> import tempfile
        >>> from pathlib import Path
        >>> from interp.organisms import backcopy, train
        >>> recipe = backcopy.recipe(layers=1, d_model=16, length=8, batch=4, steps=2)
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     result = train.train(recipe, Path(folder), progress=False)
        >>> result["step"], result["finished"]
        (2, True)

    `steps` stops earlier than `recipe.steps` (the schedule stays laid out over `recipe.steps`, so
    a run in two parts equals one run); `max_minutes` stops this call after that time, at a
    checkpoint. `on_step(step, model, loss)` is called after every update, `step` counted from 1.
    Returns the run's state: `step`, `finished`, `seconds`, `log` (`step`, mean `loss` since the
    entry before, `lr`), `evaluations`, and with the last step done `accuracy`, `observed` and
    `model` (the exported folder). Raises ValueError for a checkpoint of other settings, an
    unreadable checkpoint, or a loss that is not finite.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    where = (
        torch.device(device) if device else torch.device("cuda" if torch.cuda.is_available() else "cpu")
    )
    stop = recipe.steps if steps is None else min(steps, recipe.steps)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = recipe.build(seed).to(where)
        optimizer = _optimizer(recipe, model)
        torch.manual_seed(seed)
        rng = np.random.default_rng(seed)
        state: dict[str, Any] = {
            "step": 0,
            "seconds": 0.0,
            "recent": [],
            "log": [],
            "evaluations": [],
        }
        latest = _latest(folder) if resume else None
        if latest is not None:
            state = _load(latest, model, optimizer)
            _check(recipe, seed, state, latest)
            rng.bit_generator.state = state["numpy"]
        state.update(recipe=recipe.settings(), seed=seed, device=str(where))
        begun, before = time.monotonic(), float(state["seconds"])

        def checkpoint() -> None:
            state.update(numpy=rng.bit_generator.state, seconds=before + time.monotonic() - begun)
            _save(folder, model, optimizer, state)

        model.train()
        bar = tqdm(
            total=stop,
            initial=int(state["step"]),
            desc=recipe.name,
            unit="step",
            disable=not progress,
            mininterval=1.0 if os.isatty(2) else 30.0,
        )
        try:
            while state["step"] < stop:
                step = int(state["step"])
                for group in optimizer.param_groups:
                    group["lr"] = recipe.rate(step)
                loss = recipe.loss(model, rng, step)
                value = float(loss.detach())
                if not math.isfinite(value):
                    raise ValueError(
                        f"the loss of {recipe.name!r} is {value} at step {step}. "
                        f"Lower its learning rate "
                        f"({recipe.lr}); the last checkpoint in {folder} is intact."
                    )
                optimizer.zero_grad(set_to_none=True)
                loss.backward()
                if recipe.clip is not None:
                    torch.nn.utils.clip_grad_norm_(model.parameters(), recipe.clip)
                optimizer.step()
                step += 1
                state["step"] = step
                state["recent"].append(value)
                bar.update()
                if step % 20 == 0:
                    mean = float(np.mean(state["recent"]))
                    state["log"].append({"step": step, "loss": mean, "lr": recipe.rate(step - 1)})
                    state["recent"] = []
                    bar.set_postfix(loss=f"{mean:.4f}", refresh=False)
                if on_step is not None:
                    on_step(step, model, value)
                if recipe.evaluate_every and step % recipe.evaluate_every == 0 and step < recipe.steps:
                    measured = evaluate(recipe, model, seed + 1)
                    state["evaluations"].append({"step": step, **measured})
                    if progress:
                        tqdm.write(
                            f"{recipe.name} step {step} loss {value:.4f} "
                            + " ".join(f"{k}={v:.3f}" for k, v in measured.items())
                        )
                if step % recipe.checkpoint_every == 0 and step < stop:
                    checkpoint()
                if max_minutes is not None and time.monotonic() - begun > 60 * max_minutes:
                    break
        finally:
            bar.close()
        checkpoint()
        result = {key: state[key] for key in ("step", "seconds", "log", "evaluations", "seed", "device")}
        result["finished"] = state["step"] >= recipe.steps
        if result["finished"]:
            result["model"] = export(recipe, model, folder / "model", result)
            card = json.loads((folder / "model" / "card.json").read_text(encoding="utf-8"))
            result.update(accuracy=card["accuracy"], observed=card["observed"])
    return result


def export(recipe: Recipe, model: Any, folder: Path, result: dict[str, Any]) -> Path:
    """Write the finished model, its tokenizer and its measured card, all of the folder or nothing.

    Example:
        >>> import tempfile
        >>> from pathlib import Path
        >>> from interp.organisms import backcopy, train
        >>> recipe = backcopy.recipe(d_model=16, length=8, batch=4)
        >>> result = {"seed": 0, "step": 0, "seconds": 0.0, "device": "cpu", "evaluations": []}
        >>> with tempfile.TemporaryDirectory() as here:
        ...     folder = train.export(recipe, recipe.build(0), Path(here) / "model", result)
        ...     (folder / "model.safetensors").is_file(), (folder / "card.md").is_file()
        (True, True)
    """
    held_out = int(result["seed"]) + 1
    model.eval()
    accuracy = evaluate(recipe, model, held_out)
    with torch.no_grad(), torch.random.fork_rng():
        observed = (
            {}
            if recipe.observe is None
            else {k: float(v) for k, v in recipe.observe(model, held_out).items()}
        )
    card = {
        "name": recipe.name,
        "architecture": type(model).__name__,
        "parameters": sum(p.numel() for p in model.parameters()),
        "seed": result["seed"],
        "held_out_seed": held_out,
        "steps": result["step"],
        "minutes": round(float(result["seconds"]) / 60, 1),
        "device": result["device"],
        "accuracy": accuracy,
        "observed": observed,
        "recipe": recipe.settings(),
        "evaluations": result["evaluations"],
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__.split("+")[0],
            "transformers": transformers.__version__,
            "numpy": np.__version__,
        },
    }
    new = folder.with_name(folder.name + ".tmp")
    shutil.rmtree(new, ignore_errors=True)
    new.mkdir(parents=True)
    model.save_pretrained(new)
    recipe.export(model, new)
    _write(new / "card.json", json.dumps(card, indent=1))
    _write(new / "card.md", card_text(card))
    for file in new.iterdir():  # safetensors makes its files readable by their owner only
        file.chmod(0o644)
    replace_folder(new, folder)
    return folder


def card_text(card: dict[str, Any]) -> str:
    """A card as Markdown: what the model is, how it was trained, what was measured.

    Example:
        >>> from interp.organisms.train import card_text
        >>> card = {"name": "toy", "architecture": "LlamaForCausalLM", "parameters": 10, "seed": 0,
        ...         "held_out_seed": 1, "steps": 2, "minutes": 0.1, "device": "cpu",
        ...         "accuracy": {"needle": 0.5}, "observed": {},
        ...         "recipe": {"notes": "A toy.", "data": "None."}}
        >>> print(card_text(card).splitlines()[0])
        # toy
    """
    recipe = dict(card["recipe"])
    notes, data = recipe.pop("notes", ""), recipe.pop("data", "")
    table = "\n".join(f"| {task} | {value:.4g} |" for task, value in card["accuracy"].items())
    lines = [
        f"# {card['name']}",
        "",
        str(notes),
        "",
        f"{card['architecture']}, {card['parameters']:,} parameters, "
        f"trained from scratch for {card['steps']:,} steps "
        f"({card['minutes']} minutes on {card['device']}), seed {card['seed']}.",
        "",
        "## Data",
        "",
        str(data),
        "",
        f"## Measured on held-out data (seed {card['held_out_seed']})",
        "",
        "| task | value |",
        "| --- | --- |",
        table,
        "",
    ]
    if card.get("history"):
        lines += ["## History", "", str(card["history"]), ""]
    if card["observed"]:
        lines += [
            "## Observed",
            "",
            "| quantity | value |",
            "| --- | --- |",
            *(f"| {key} | {value:.4g} |" for key, value in card["observed"].items()),
            "",
        ]
    lines += [
        "## Recipe",
        "",
        "| setting | value |",
        "| --- | --- |",
        *(f"| {k} | {v} |" for k, v in recipe.items()),
        "",
    ]
    return "\n".join(lines)
