"""`python -m interp.organisms list | card NAME | train NAME | evaluate NAME`."""

import argparse
import json
import shutil
import sys
from dataclasses import replace
from pathlib import Path

from interp.core.errors import UndertowError
from interp.organisms import registry


def _train(arguments: argparse.Namespace) -> None:
    from interp.organisms.train import train

    recipe = registry.recipe(arguments.name)
    if arguments.steps is not None:
        if arguments.steps < 1:
            raise ValueError(f"--steps must be at least 1, not {arguments.steps}.")
        recipe = replace(recipe, steps=arguments.steps)
    folder = arguments.out or Path("organisms") / arguments.name
    result = train(
        recipe,
        folder,
        seed=arguments.seed,
        device=arguments.device,
        resume=not arguments.fresh,
        max_minutes=arguments.minutes,
    )
    if not result["finished"]:
        print(
            f"{arguments.name}: stopped at step {result['step']} of {recipe.steps}; "
            "the same command goes on from there."
        )
        return
    where = Path(str(result["model"]))
    if arguments.install:
        where = install(arguments.name, where)
    print(f"{arguments.name}: trained {result['step']} steps, model in {where}")
    print(json.dumps(result["accuracy"], indent=1))


def install(name: str, model: Path) -> Path:
    """Copy an exported model to the place from which its name opens it, all of it or nothing.

    Example:
        >>> from interp.organisms.__main__ import install
        >>> install.__name__
        'install'
    """
    from interp.organisms.train import replace_folder

    final = registry.WEIGHTS / name
    new = final.with_name(final.name + ".tmp")
    shutil.rmtree(new, ignore_errors=True)
    shutil.copytree(model, new)
    replace_folder(new, final)
    return final


def _evaluate(arguments: argparse.Namespace) -> None:
    import transformers

    from interp.organisms.train import evaluate

    folder = arguments.folder or registry.path(arguments.name)
    recipe = registry.recipe(arguments.name)
    trained = json.loads((folder / "card.json").read_text(encoding="utf-8"))
    seed = int(trained["held_out_seed"]) if arguments.seed is None else arguments.seed
    model = getattr(transformers, trained["architecture"]).from_pretrained(folder)
    if arguments.device:
        model = model.to(arguments.device)
    accuracy = evaluate(recipe, model, seed)
    if arguments.json:
        print(
            json.dumps(
                {
                    "name": arguments.name,
                    "training_seed": trained["seed"],
                    "held_out_seed": seed,
                    "accuracy": accuracy,
                }
            )
        )
        return
    print(f"{arguments.name}, held-out data of seed {seed}")
    for task, value in accuracy.items():
        print(f"  {task:<28} {value:.4f}")


def _list(arguments: argparse.Namespace) -> None:
    for name in registry.names():
        try:
            about = json.loads((registry.path(name) / "card.json").read_text(encoding="utf-8"))
            print(f"{name:<12} {about['architecture']:<32} {about['parameters']:>10,} parameters")
        except UndertowError:
            print(f"{name:<12} (no weights in this installation)")


def main(words: list[str] | None = None) -> int:
    """Run one command; 0 if it worked, 2 with a sentence on stderr if it could not.

    Example:
        >>> from interp.organisms.__main__ import main
        >>> main(["card", "nobody"])
        2
    """
    parser = argparse.ArgumentParser(
        prog="python -m interp.organisms", description="The bundled models: train, evaluate, list."
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    one = commands.add_parser("list", help="names, architectures, sizes")
    one.set_defaults(run=_list)
    one = commands.add_parser("card", help="how a model was trained and what was measured")
    one.add_argument("name")
    one.set_defaults(run=lambda arguments: print(registry.card(arguments.name)))
    one = commands.add_parser(
        "train", help="train a model from scratch, or go on where a run was stopped"
    )
    one.add_argument("name")
    one.add_argument("--seed", type=int, default=0)
    one.add_argument("--device", help="cpu, cuda, cuda:1, ... (default: a GPU if there is one)")
    one.add_argument("--steps", type=int, help="train this many steps instead of the recipe's")
    one.add_argument("--out", type=Path, help="the run's folder (default: organisms/NAME)")
    one.add_argument("--minutes", type=float, help="stop after this time, resumable")
    one.add_argument(
        "--fresh", action="store_true", help="do not go on from a checkpoint in the folder"
    )
    one.add_argument(
        "--install", action="store_true", help="make the result the bundled model of this name"
    )
    one.set_defaults(run=_train)
    one = commands.add_parser("evaluate", help="accuracy per task on held-out data")
    one.add_argument("name")
    one.add_argument("--seed", type=int, help="of the held-out data (default: the card's)")
    one.add_argument("--json", action="store_true")
    one.add_argument("--device")
    one.add_argument(
        "--folder", type=Path, help="another folder with this model (default: the bundled weights)"
    )
    one.set_defaults(run=_evaluate)
    arguments = parser.parse_args(words)
    try:
        arguments.run(arguments)
    except (UndertowError, ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
