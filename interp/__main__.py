"""The command line: `python -m interp doctor MODEL`."""

import json
import os
import sys
import traceback
import warnings
from pathlib import Path
from typing import Annotated, Optional

import typer

app = typer.Typer(
    add_completion=False, no_args_is_help=True, pretty_exceptions_enable=False,
    rich_markup_mode=None, help="Attention in language and vision-language models.",
)


@app.callback()
def main() -> None:
    """Attention in language and vision-language models."""


@app.command()
def doctor(
    model: Annotated[str, typer.Argument(help="A bundled model, a folder or a hub id.")],
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of text.")] = False,
    out: Annotated[Optional[Path], typer.Option(
        help="Write doctor.json, doctor.txt and the picture of image tokens there.")] = None,
    lane: Annotated[Optional[list[str]], typer.Option(
        help="A lane that must do everything; may be repeated. By default all lanes are tried, and "
        "what one of them can do counts as possible.")] = None,
    device: Annotated[Optional[str], typer.Option(help="cpu, cuda, cuda:1, auto, ...")] = None,
    dtype: Annotated[Optional[str], typer.Option(help="float32, bfloat16 or float16.")] = None,
    trust_remote_code: Annotated[bool, typer.Option(
        "--trust-remote-code", help="Run modeling code that comes with the model.")] = False,
    quick: Annotated[bool, typer.Option("--quick", help="Fewer proofs, in less time.")] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show tracebacks.")] = False,
) -> None:
    """Say what works on a model, what does not, and what it will cost.

    The exit code is 0 if all is right, 1 if the model works with limits (which are listed first),
    2 if it cannot be opened.
    """
    if not sys.stderr.isatty():  # before a library with progress bars is imported
        os.environ.setdefault("TQDM_DISABLE", "1")
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    from interp.core.result import write_atomically
    from interp.doctor import CLOSED, Report, examine, write
    from interp.models.model import LANES

    for name in lane or ():
        if name not in LANES:
            typer.echo(f"there is no lane {name!r}; choose {', '.join(LANES)}.", err=True)
            raise typer.Exit(CLOSED)
    try:
        if out is not None:
            out.mkdir(parents=True, exist_ok=True)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            report = examine(model, out=out, device=device, dtype=dtype, quick=quick,
                             trust_remote_code=trust_remote_code, lanes=lane or None)
    except KeyboardInterrupt:
        typer.echo("Interrupted.", err=True)
        raise typer.Exit(130) from None
    except Exception as error:
        if debug:
            traceback.print_exc()
        report = Report(model, refused=f"{type(error).__name__}: {error}")
    text = json.dumps(report.to_dict(), indent=1)
    if out is not None:
        write_atomically(out / "doctor.json", text + "\n")
        write_atomically(out / "doctor.txt", write(report) + "\n")
    typer.echo(text if as_json else write(report))
    raise typer.Exit(report.exit_code)


if __name__ == "__main__":
    app()
