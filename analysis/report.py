"""A sweep -> what it says: a table and findings in the terminal, and the same as files to keep.

`python -m analysis.report runs/quickstart` writes EXPERIMENT_REPORT.md, report.html, trials.csv and the
pictures into the sweep's `report/`. A CSV of runs done by hand is reported on in the same way.
"""

from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from training.cli import make_parser, parse, run_command

if TYPE_CHECKING:
    from plotly.graph_objects import Figure
    from rich.table import Table as RichTable

    from analysis.findings import Findings
    from analysis.load import Results
    from analysis.page import Page
    from analysis.tables import Table

_DESCRIPTION = """\
Report on a sweep: which trial is the best, how sure that is, and what each setting does.

  python -m analysis.report runs/quickstart             a sweep's directory
  python -m analysis.report tests/data/nine_runs.csv    a CSV: name,steps,lr,rank,loss,minutes
  python -m analysis.report wandb:ENTITY/PROJECT/ID     a W&B sweep, brought to runs/ first"""


@dataclass(kw_only=True)
class ReportOptions:
    """Options of `python -m analysis.report`."""

    output_dir: str = field(
        default="",
        metadata={
            "help": "Where the files go; empty is SWEEP/report, or runs/NAME/report for NAME.csv."
        },
    )
    image_format: Literal["png", "svg"] = field(
        default="png", metadata={"help": "Of the figures' files; report.html draws its own."}
    )


def main() -> None:
    parser = make_parser("analysis.report", _DESCRIPTION, [ReportOptions])
    parser.add_argument(
        "source",
        help="a sweep's directory (runs/NAME), a CSV file, or wandb:ENTITY/PROJECT/SWEEP_ID",
    )
    options, positional = parse(parser)
    output_dir = Path(options.output_dir) if options.output_dir else None
    report(positional.source, output_dir, options.image_format)


@dataclass(frozen=True)
class Report:
    """A report; as the last line of a notebook's cell it shows itself."""

    page: "Page"
    figures: "dict[str, Figure]"
    directory: Path
    """Where its files are."""

    def _repr_html_(self) -> str:
        from html import escape

        from analysis.page import to_html

        # In a frame of its own: the page's style is not the notebook's, and its script runs anywhere.
        page = escape(to_html(self.page, self.figures), quote=True)
        return f'<iframe srcdoc="{page}" style="width:100%; height:900px; border:0"></iframe>'


def report(
    source: str | Path,
    output_dir: Path | None = None,
    image_format: Literal["png", "svg"] = "png",
) -> Report:
    """Prints the report and writes its files.

    Raises:
        SweepError, DataError: the source cannot be read, or has no finished trial.
    """
    from analysis.figures import make_figures, write_images
    from analysis.findings import find
    from analysis.load import load_source
    from analysis.next_sweep import next_sweep
    from analysis.page import to_html, to_markdown
    from analysis.tables import trials_csv
    from training.exceptions import DataError
    from training.paths import SweepPaths, write_text

    results = load_source(source)
    root = results.sweep.paths if results.sweep else SweepPaths(Path("runs") / results.name)
    directory = output_dir or root.report
    try:
        directory.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError, PermissionError) as error:
        raise DataError(
            f"--output_dir is {directory}, but must be a directory to write to: {error.strerror}"
        ) from None
    findings = find(results)
    page = _make_page(results, findings)
    _print_page(page)
    figures = make_figures(results, findings)
    write_text(directory / "trials.csv", trials_csv(results))
    following = next_sweep(results, findings.undetected)
    if following:
        write_text(directory / "next_sweep.yaml", following)
        page.next_commands.append(f"python -m sweeps.run {directory / 'next_sweep.yaml'}")
    _print_next(page)
    write_text(directory / "report.html", to_html(page, figures))
    # First without pictures: whatever drawing them does, the text is there.
    write_text(directory / "EXPERIMENT_REPORT.md", to_markdown(page, []))
    problem = write_images(figures, directory, image_format)
    images = [] if problem else [f"{name}.{image_format}" for name in figures]
    if problem:
        print(problem)
    else:
        write_text(directory / "EXPERIMENT_REPORT.md", to_markdown(page, images))
    print(
        f"report: {directory / 'report.html'} (also {', '.join(['EXPERIMENT_REPORT.md', *images])})"
    )
    return Report(page, figures, directory)


def _make_page(results: "Results", findings: "Findings") -> "Page":
    from analysis.cost import cost_rows
    from analysis.page import Page
    from analysis.replay import replay_command, replay_notes, replay_template
    from analysis.tables import answers, seed_runs_table, seeds_table, trials_table

    best, cost = results.best, findings.cost
    is_sweep = results.sweep is not None
    if best.record:
        config = best.record.config
        replay, notes = replay_command(config), replay_notes(config)
    else:
        replay = replay_template(best.params)
        notes = ["A CSV tells no more than that: put in your model, data and other settings."]
    count = f"{len(results.scored)} of {len(results.trials)} trials finished"
    minutes = results.minutes if cost is None else cost.train_s / 60
    return Page(
        title=f"LoRA sweep: {results.name}",
        subtitle=f"{count}, {minutes:.1f} minutes in all. "
        + ("Loss is eval/loss at each trial's best step." if is_sweep else "Loss is train loss."),
        trials=trials_table(results, findings.against_baseline),
        best_row=results.trials.index(best),
        seeds=seeds_table(results),
        seed_runs=seed_runs_table(results),
        findings=findings.summary,
        caveats=findings.caveats,
        cost=cost_rows(results, cost),
        answers=answers(results),
        replay=replay,
        replay_notes=notes,
        next_commands=[_promote_command(results)] if is_sweep else [],
    )


def _promote_command(results: "Results") -> str:
    command = f"python -m deploy.promote {results.source}"
    # Promotion does not choose among trials that were scored on different examples.
    all_same = len(results.compared) == len(results.scored)
    return command if all_same else f"{command} --trial {results.best.number}"


def _print_page(page: "Page") -> None:
    from rich.console import Console
    from rich.text import Text

    console = Console(highlight=False)
    if not console.is_terminal:
        console = Console(highlight=False, width=160)  # a pipe has no width of its own
    console.print(_drawn(page.trials, page.title, page.best_row))
    console.print(Text(page.subtitle + "\n"))
    for table, title in ((page.seeds, "Over seeds"), (page.seed_runs, "Each seed")):
        if table:
            console.print(_drawn(table, title))
    for text in page.findings:
        console.print(Text(f"- {text}"))
    console.print(Text("\nWhat this does not show"))
    for text in page.caveats:
        console.print(Text(f"- {text}"))
    console.print(Text("\nCost"))
    for what, amount in page.cost:
        console.print(Text(f"- {what}: {amount}"))
    console.print(Text(f"\nThe best trial in plain TRL\n{page.replay}\n"), soft_wrap=True)
    for text in page.replay_notes:
        console.print(Text(f"- {text}"))
    console.print()


def _drawn(table: "Table", title: str, bold_row: int | None = None) -> "RichTable":
    from rich import box
    from rich.table import Table as RichTable
    from rich.text import Text

    drawn = RichTable(title=title, box=box.SIMPLE_HEAD, title_justify="left")
    for number, name in enumerate(table.header):
        drawn.add_column(name, justify="left" if number == 1 else "right")
    for number, row in enumerate(table.rows):
        drawn.add_row(*(Text(cell) for cell in row), style="bold" if number == bold_row else "")
    return drawn


def _print_next(page: "Page") -> None:
    for command in page.next_commands:
        print(f"next: {command}")


if __name__ == "__main__":
    run_command(main)
