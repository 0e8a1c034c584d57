"""A sweep -> what it says: a table and findings in the terminal, and the same as files to keep.

`python -m analysis.report runs/quickstart` writes EXPERIMENT_REPORT.md, report.html, trials.csv and the
pictures into the sweep's `report/`. A CSV of runs done by hand is reported on in the same way.
"""

from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from training.cli import make_parser, parse, run_command

if TYPE_CHECKING:
    from analysis.findings import Findings
    from analysis.load import Results, Trial
    from analysis.page import Page

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


def main() -> None:
    parser = make_parser("analysis.report", _DESCRIPTION, [ReportOptions])
    parser.add_argument(
        "source",
        help="a sweep's directory (runs/NAME), a CSV file, or wandb:ENTITY/PROJECT/SWEEP_ID",
    )
    options, positional = parse(parser)
    report(positional.source, Path(options.output_dir) if options.output_dir else None)


def report(source: str | Path, output_dir: Path | None = None) -> Path:
    """Prints the report and writes its files; returns the directory they are in.

    Raises:
        SweepError, DataError: the source cannot be read, or has no finished trial.
    """
    from analysis.figures import make_figures, write_images
    from analysis.findings import find
    from analysis.load import load_source
    from analysis.next_sweep import next_sweep
    from analysis.page import to_html, to_markdown
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
    write_text(directory / "trials.csv", _trials_csv(results))
    following = next_sweep(results, findings.undetected)
    if following:
        write_text(directory / "next_sweep.yaml", following)
        page.next_commands.append(f"python -m sweeps.run {directory / 'next_sweep.yaml'}")
    _print_next(page)
    write_text(directory / "report.html", to_html(page, figures))
    # First without pictures: whatever drawing them does, the text is there.
    write_text(directory / "EXPERIMENT_REPORT.md", to_markdown(page, []))
    problem = write_images(figures, directory)
    images = [] if problem else [f"{name}.png" for name in figures]
    if problem:
        print(problem)
    else:
        write_text(directory / "EXPERIMENT_REPORT.md", to_markdown(page, images))
    print(
        f"report: {directory / 'report.html'} (also {', '.join(['EXPERIMENT_REPORT.md', *images])})"
    )
    return directory


def _make_page(results: "Results", findings: "Findings") -> "Page":
    from analysis.page import Page
    from analysis.replay import replay_command, replay_notes, replay_template

    best = results.best
    is_sweep = results.sweep is not None
    if best.record:
        config = best.record.config
        replay, notes = replay_command(config), replay_notes(config)
    else:
        replay = replay_template(best.params)
        notes = ["A CSV tells no more than that: put in your model, data and other settings."]
    count = f"{len(results.scored)} of {len(results.trials)} trials finished"
    return Page(
        title=f"LoRA sweep: {results.name}",
        subtitle=f"{count}, {results.minutes:.1f} minutes in all. "
        + ("Loss is eval/loss at each trial's best step." if is_sweep else "Loss is train loss."),
        header=_header(results),
        rows=[_row(results, trial) for trial in results.trials],
        best_row=results.trials.index(best),
        findings=findings.summary,
        caveats=findings.caveats,
        replay=replay,
        replay_notes=notes,
        next_commands=[_promote_command(results)] if is_sweep else [],
    )


def _promote_command(results: "Results") -> str:
    command = f"python -m deploy.promote {results.source}"
    # Promotion does not choose among trials that were scored on different examples.
    all_same = len(results.compared) == len(results.scored)
    return command if all_same else f"{command} --trial {results.best.number}"


def _header(results: "Results") -> list[str]:
    names = ["#", "trial", *results.settings, "loss"]
    if results.sweep:
        names += ["against baseline, 95 %", "best step"]
    return [*names, "improvement %", "minutes"]


def _row(results: "Results", trial: "Trial") -> list[str]:
    from analysis.findings import compare, interval_text, value_text

    baseline = results.baseline
    cells = [str(trial.number), trial.name]
    cells += [value_text(trial.params.get(name, "")) for name in results.settings]
    cells.append(f"{trial.loss:.4f}" if trial.is_scored else trial.state)
    if results.sweep:
        interval = compare(trial, baseline) if trial.is_scored and trial is not baseline else None
        cells.append(interval_text(interval) if interval else "")
        cells.append("" if trial.best_step is None else f"{trial.best_step:,}")
    gain = _improvement(results, trial)
    cells.append("baseline" if trial is baseline else "" if gain is None else f"{gain:.1f}")
    if trial.same_as is not None:
        cells.append(f"as trial {trial.same_as}")
    else:
        cells.append("" if trial.minutes is None else f"{trial.minutes:.1f}")
    return cells


def _improvement(results: "Results", trial: "Trial") -> float | None:
    """Percent against the baseline, of trials that can be compared with it."""
    from analysis.stats import improvement

    loss, baseline = trial.loss, results.baseline.loss
    if trial not in results.compared or loss is None or baseline is None:
        return None
    return improvement(loss, baseline)


def _print_page(page: "Page") -> None:
    from rich import box
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    console = Console(highlight=False)
    if not console.is_terminal:
        console = Console(highlight=False, width=160)  # a pipe has no width of its own
    table = Table(title=page.title, box=box.SIMPLE_HEAD, title_justify="left")
    for number, name in enumerate(page.header):
        table.add_column(name, justify="left" if number == 1 else "right")
    for number, row in enumerate(page.rows):
        table.add_row(
            *(Text(cell) for cell in row), style="bold" if number == page.best_row else ""
        )
    console.print(table)
    console.print(Text(page.subtitle + "\n"))
    for text in page.findings:
        console.print(Text(f"- {text}"))
    console.print(Text("\nWhat this does not show"))
    for text in page.caveats:
        console.print(Text(f"- {text}"))
    console.print(Text(f"\nThe best trial in plain TRL\n{page.replay}\n"), soft_wrap=True)
    for text in page.replay_notes:
        console.print(Text(f"- {text}"))
    console.print()


def _print_next(page: "Page") -> None:
    for command in page.next_commands:
        print(f"next: {command}")


def _trials_csv(results: "Results") -> str:
    import pandas as pd

    rows = [
        {
            "number": trial.number,
            "name": trial.name,
            **{name: trial.params.get(name) for name in results.settings},
            "state": trial.state,
            "loss": trial.loss,
            "improvement_percent": _improvement(results, trial),
            "best_step": trial.best_step,
            "num_steps": trial.num_steps,
            "base_loss": trial.base_loss,
            "train_loss": trial.train_loss,
            "minutes": trial.minutes,
            "same_as": trial.same_as,
        }
        for trial in results.trials
    ]
    return pd.DataFrame(rows).to_csv(index=False)


if __name__ == "__main__":
    run_command(main)
