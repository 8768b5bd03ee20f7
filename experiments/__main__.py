"""The command line: `python -m experiments list`, `run PAPER...`, `report`."""

import os
import sys
import traceback
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import Annotated, Optional

import matplotlib
import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from experiments._outcome import Outcome, find
from experiments._output import execute, finished, tidy
from experiments._paper import Experiment, Settings, SettingsError, check_names, load, names
from experiments._place import DEFAULT, alike, place
from experiments._side_by_side import Child
from interp.core import Claim, UndertowError
from interp.core.result import write_atomically
from interp.figures import report as html
from interp.organisms import registry

PAGE = "report.html"
CLAIMS_PAGE = "claims.md"
TOGETHER = 3
"""Claims that cannot be tested for one reason, from this many on, are one row of the table."""
LOOKS = {"supported": "bold green", "refuted": "bold red", "inconclusive": "bold yellow",
         "not testable": "dim"}

app = typer.Typer(
    add_completion=False, no_args_is_help=True, pretty_exceptions_enable=False,
    help="Reproduce the papers: figures, data, and claims whose verdicts are computed.",
)


def _console() -> Console:
    # A log has no width of its own; 80 columns would break every sentence.
    return Console(width=None if sys.stdout.isatty() or "COLUMNS" in os.environ else 120)


def _fail(error: BaseException, debug: bool, where: str = "") -> None:
    """One sentence for an error that was foreseen; for others also where it happened."""
    if debug:
        traceback.print_exception(error)
    if isinstance(error, (UndertowError, OSError)):
        sentence = str(error)
    else:
        frames = traceback.extract_tb(error.__traceback__)
        place = f" ({Path(frames[-1].filename).name}, line {frames[-1].lineno})" if frames else ""
        hint = "" if debug else " Run it with --debug to see the whole traceback."
        text = " ".join(str(error).split()).rstrip(".")
        sentence = f"{type(error).__name__}: {text}{place}.{hint}"
    typer.echo(f"{where}: {sentence}" if where else sentence, err=True)


@app.command("list")
def list_() -> None:
    """Show every experiment: what it asks, which figures it draws, what it runs on."""
    table = Table(show_lines=True)
    for column in ("name", "paper", "question", "figures", "models"):
        table.add_column(column, overflow="fold")
    failed, made = False, False
    for name in names():
        try:
            paper = load(name).paper
        except Exception as error:  # one broken module must not hide the others
            _fail(error, False, name)
            failed = True
            continue
        title = "\n".join([paper.title, *paper.sources])
        models = [model if _is_kept(model) else f"{model} *" for model in paper.models]
        made = made or any(model.endswith(" *") for model in models)
        cells = (name, title, paper.question, "\n".join(paper.figures), "\n".join(models))
        table.add_row(*map(Text, cells))
    _console().print(table)
    if made:
        typer.echo("* made on the spot by the experiment: open_model and the doctor do not know it")
    raise typer.Exit(1 if failed else 0)


def _is_kept(model: str) -> bool:
    """Whether `interp.open_model` knows the name: bundled, from an installed package, or the hub's."""
    from interp.models.open import PACKAGED  # slow to import, and only `list` asks for it

    return model in registry.names() or model in PACKAGED or "/" in model


@app.command()
def run(
    papers: Annotated[list[str], typer.Argument(metavar="PAPER...", help="Names, or 'all'.")],
    model: Annotated[Optional[list[str]], typer.Option(
        help="A bundled model, a folder or a hub id; may be repeated.")] = None,
    out: Annotated[Optional[Path], typer.Option(
        help="Results go to OUT/PAPER, in place of what is there. By default to figures/PAPER, or "
        "to a subfolder of figures for a run with --model, --tiny or --figure; two models of one "
        "name get two.", show_default=False)] = None,
    seed: Annotated[int, typer.Option(help="Of everything that is drawn at random.")] = 0,
    tiny: Annotated[bool, typer.Option("--tiny", help="Seconds instead of minutes.")] = False,
    train: Annotated[bool, typer.Option("--train", help="Train from scratch where the paper "
                                        "does.")] = False,
    figure: Annotated[Optional[list[str]], typer.Option(
        help="Only this figure; may be repeated.")] = None,
    device: Annotated[Optional[str], typer.Option(help="cpu, mps, cuda or cuda:NUMBER.")] = None,
    dtype: Annotated[Optional[str], typer.Option(help="float32, bfloat16 or float16.")] = None,
    jobs: Annotated[int, typer.Option(
        min=1, help="Experiments that run at a time, each in a process of its own.")] = 1,
    resume: Annotated[bool, typer.Option("--resume", help="Go on after an interruption: do not "
                                         "run again what is finished in OUT, if the settings and "
                                         "the code are still the same.")] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show tracebacks.")] = False,
) -> None:
    """Run experiments: draw the figures, save the data, and compute the verdict of every claim."""
    matplotlib.use("Agg")
    try:
        refusal = alike(model or ())
        if refusal:
            raise SettingsError(refusal)
        where, notice = (out, "") if out else place(model or (), tiny, figure or ())
        settings = Settings.of(model=model, out=where, seed=seed, tiny=tiny, train=train,
                               figure=figure, device=device, dtype=dtype)
        chosen = _choose(check_names(papers), settings, debug)
    except SettingsError as error:
        _fail(error, debug)
        raise typer.Exit(2) from None
    if notice:
        typer.echo(notice, err=True)
    failed = [name for name, experiment in chosen.items() if experiment is None]
    order = list(chosen)
    done: list[Outcome] = []
    if resume:
        done = [found for name in order if (found := finished(name, settings)) is not None]
        for outcome in done:
            typer.echo(f"{outcome.key}: finished before, left as it is", err=True)
            del chosen[outcome.key]
    if jobs > 1 and len(chosen) > 1:
        wanted = [name for name, experiment in chosen.items() if experiment is not None]
        options = ["--out", str(settings.out), "--seed", str(seed)]
        for option, values in (("--model", model), ("--figure", figure)):
            options += [word for value in values or () for word in (option, value)]
        for option, value in (("--device", device), ("--dtype", dtype)):
            options += [] if value is None else [option, value]
        for option, given in (("--tiny", tiny), ("--train", train), ("--debug", debug)):
            options += [option] * given
        for name, outcome in _side_by_side(wanted, options, settings.out, jobs):
            if outcome is None:
                failed.append(name)
            else:
                done.append(outcome)
        chosen = {}
    for i, (name, experiment) in enumerate(chosen.items(), 1):
        if experiment is None:
            continue
        typer.echo(f"[{i}/{len(chosen)}] {name}: {experiment.paper.title}", err=True)
        try:
            done.append(execute(experiment, settings))
        except KeyboardInterrupt:
            typer.echo(f"\nInterrupted: {settings.out / name} is as it was before.", err=True)
            _show(done, settings.out)
            raise typer.Exit(130) from None
        except Exception as error:
            _fail(error, debug, name)
            failed.append(name)
    _show(sorted(done, key=lambda outcome: order.index(outcome.key)), settings.out)
    if failed:
        typer.echo(f"Failed: {', '.join(failed)}.", err=True)
        raise typer.Exit(1)


def _side_by_side(
    wanted: Sequence[str], options: Sequence[str], out: Path, jobs: int
) -> Iterator[tuple[str, Optional[Outcome]]]:
    """Run every experiment in a process of its own; gives results as they are ready.

    What a process prints is shown when it has failed. Ctrl-C ends all of them.
    """
    running: list[Child] = []
    threads = str(max(1, (os.cpu_count() or 1) // jobs))

    def one(name: str) -> tuple[str, int, str]:
        process = _start(["run", name, *options], threads)
        running.append(process)
        said, _ = process.communicate()
        return name, process.returncode, said

    with ThreadPoolExecutor(jobs) as pool:
        try:
            # The long ones first, so that none of them is left alone at the end.
            tasks = [pool.submit(one, name) for name in
                     sorted(wanted, key=lambda name: not load(name).paper.long)]
            for number, task in enumerate(as_completed(tasks), 1):
                name, code, said = task.result()
                typer.echo(f"[{number}/{len(wanted)}] {name}: {'failed' if code else 'done'}", err=True)
                if code:
                    typer.echo(said, err=True)
                yield name, None if code else Outcome.load(out / name)
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            for process in running:
                process.terminate()
            raise


def _start(words: Sequence[str], threads: str) -> Child:
    """This program once more, with other words; what it says is kept for the one who waits."""
    return Child(words, threads, [f"experiments.{words[1]}"])


def _choose(
    asked: tuple[str, ...], settings: Settings, debug: bool
) -> dict[str, Optional[Experiment]]:
    """The experiments to run; None for one that cannot be imported, which is reported here."""
    chosen: dict[str, Optional[Experiment]] = {}
    for name in asked:
        try:
            chosen[name] = load(name)
        except SettingsError:
            raise
        except Exception as error:
            _fail(error, debug, name)
            chosen[name] = None
    papers = [experiment.paper for experiment in chosen.values() if experiment]
    if settings.figure:
        have = dict.fromkeys(name for paper in papers for name in paper.figures)
        for name in settings.figure:
            if name not in have:
                raise SettingsError(f"there is no figure {name!r} in {', '.join(asked)}; there "
                                    f"are: {', '.join(have) or 'none'}.")
        chosen = {name: e for name, e in chosen.items()
                  if e is None or any(settings.wants(f) for f in e.paper.figures)}
    if settings.train and papers and not any(paper.trains for paper in papers):
        raise SettingsError(f"--train means nothing to {', '.join(asked)}: it trains no model.")
    return chosen


def _show(done: list[Outcome], out: Path) -> None:
    """The claims table, and where the figures are."""
    if not done:
        return
    console = _console()
    claims = [claim for outcome in done for claim in outcome.claims]
    for outcome in done:
        if not outcome.claims:
            continue
        table = Table(title=f"{outcome.key}: claims", title_justify="left", show_lines=True)
        for column, ratio in (("claim", 5), ("paper", 2), ("measured", 2), ("interval", 2),
                              ("expected", 2), ("verdict", 2)):
            table.add_column(column, ratio=ratio, overflow="fold")
        for claims_of_a_row in _rows(outcome.claims):
            claim = claims_of_a_row[0]
            if len(claims_of_a_row) > 1:
                table.add_row(Text(f"{len(claims_of_a_row)} claims{_on(claim)}: {claim.reason} "
                                   f"(each of them stands in {CLAIMS_PAGE})"), *["–"] * 4,
                              Text(claim.verdict, style=LOOKS[claim.verdict]))
                continue
            sentence = claim.sentence + _on(claim)
            if claim.reason:
                sentence += f" ({claim.reason})"
            table.add_row(
                Text(sentence), Text(html.published(claim)), Text(html.measured(claim)),
                Text(html.interval(claim)), Text(html.expected(claim)),
                Text(claim.verdict, style=LOOKS[claim.verdict]),
            )
        console.print(table)
    for outcome in done:
        drawn = sum(bool(figure.files) for figure in outcome.figures)
        typer.echo(f"{outcome.key}: {drawn} figures in {outcome.folder}"
                   f" ({outcome.manifest['wall_seconds']:.0f} s)")
        for reason, stems in _not_drawn(outcome).items():
            typer.echo(f"  not drawn: {', '.join(stems)}: {reason}")
    words = ", ".join(f"{count} {word}" for word, count in html.counts(claims).items())
    typer.echo(f"{len(claims)} claims: {words}.")
    typer.echo(f"As one page: python -m experiments report --out {out}")


def _on(claim: Claim) -> str:
    model = claim.details.get("model")
    return f" [{model}]" if model else ""


def _rows(claims: Sequence[Claim]) -> list[list[Claim]]:
    """Claims row by row, in order: three or more of one model with one reason share a row."""
    rows: dict[object, list[Claim]] = {}
    for number, claim in enumerate(claims):
        key = (claim.reason, claim.details.get("model")) if claim.reason else number
        rows.setdefault(key, []).append(claim)
    return [part for row in rows.values()
            for part in ([row] if len(row) >= TOGETHER else [[one] for one in row])]


def _not_drawn(outcome: Outcome) -> dict[str, list[str]]:
    """Figures without files, by the reason."""
    found: dict[str, list[str]] = {}
    for figure in outcome.figures:
        if not figure.files:
            name = f"{figure.name} of {figure.of}" if figure.of else figure.name
            found.setdefault(figure.reason.rstrip("."), []).append(name)
    return found


@app.command()
def report(
    out: Annotated[Path, typer.Option(help="The folder with the results.")] = DEFAULT,
    debug: Annotated[bool, typer.Option("--debug", help="Show tracebacks.")] = False,
) -> None:
    """Write one self-contained HTML page of every result in a folder."""
    hint = "run 'python -m experiments run all' first, or name the folder with --out."
    if not out.is_dir():
        typer.echo(f"there is no folder {out}; {hint}", err=True)
        raise typer.Exit(1)
    tidy(out)
    sections, problems, seen = [], [], set()
    for folder in find(out, names()):
        seen.add(folder.name)
        try:
            sections.append(_section(Outcome.load(folder), folder.relative_to(out).as_posix()))
        except (UndertowError, OSError, KeyError, TypeError) as error:
            if debug:
                traceback.print_exception(error)
            # The page may be passed on: it names files as seen from its own folder.
            sentence = str(error).replace(f"{out}{os.sep}", "")
            problems.append(html.Problem(folder.relative_to(out).as_posix(), sentence))
    if not sections and not problems:
        typer.echo(f"there are no results in {out}; {hint}", err=True)
        raise typer.Exit(1)
    absent = [name for name in names() if name not in seen]
    write_atomically(out / PAGE, html.page(sections, problems, absent=absent))
    typer.echo(f"{out / PAGE}: results: {len(sections)}, broken: {len(problems)}, not run yet: "
               f"{len(absent)}.")
    for problem in problems:
        typer.echo(f"  {problem.name}: {problem.sentence}", err=True)


def _section(outcome: Outcome, name: str) -> html.Section:
    paper, settings = outcome.manifest["paper"], outcome.manifest.get("settings", {})
    pictures = tuple(
        html.Picture(f"{f.name}.{f.of}" if f.of else f.name, f.caption, f.png, f.reason)
        for f in outcome.figures
    )
    remark = "A tiny run, to see that everything works: do not quote its numbers." * bool(
        settings.get("tiny"))
    return html.Section(
        name, paper["title"], paper["question"], tuple(paper["arxiv"]), outcome.models, pictures,
        outcome.claims, outcome.manifest, remark,
    )


def main() -> None:
    """Run the command line; Ctrl-C outside a run ends it without a traceback."""
    try:
        app()
    except KeyboardInterrupt:
        typer.echo("Interrupted.", err=True)
        sys.exit(130)


if __name__ == "__main__":
    main()
