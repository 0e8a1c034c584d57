"""How a running sweep shows on the terminal: the texts of its lines and the table at its end."""

from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from sweeps.ledger import METRIC, StepCount, SweepRecord
from sweeps.ties import describe_seeds


def print_summary(record: SweepRecord, console: Console) -> None:
    """The trials that count, the best one, and the command to go on with."""
    table = Table(
        title=f"sweep {record.name}",
        title_justify="left",
        box=box.SIMPLE_HEAD,
        collapse_padding=True,
        pad_edge=False,
    )
    names = list(dict.fromkeys(name for trial in record.trials for name in trial.params))
    for column in ["trial", "name", *names, METRIC, "min", "state"]:
        # Headers of two lines: three varied settings then fit into 80 columns.
        header = column.replace("_", "_\n", 1).replace("/", "/\n", 1)
        left = column in ("name", "state")
        table.add_column(header, justify="left" if left else "right", no_wrap=True)
    best = record.best() if any(trial.loss is not None for trial in record.finished) else None
    for trial in record.trials:
        result = trial.result
        state = trial.state if "same_as" not in result else f"same as {result['same_as']}"
        row = [
            str(trial.number),
            trial.name,
            *(_value_text(trial.params.get(name)) for name in names),
            "" if trial.loss is None else f"{trial.loss:.4f}",
            f"{result['train_time_s'] / 60:.1f}" if result.get("train_time_s") is not None else "",
            state,
        ]
        table.add_row(*row, style="bold" if best and trial.number == best.number else "")
    console.print(table, soft_wrap=False)
    if best:
        step, base = best.result.get("best_step"), best.result.get(f"base_{METRIC}")
        shown = f" at step {step}" if step is not None else ""
        shown += f"; the base model has {base:.4f}" if base is not None else ""
        console.print(f"best: trial {best.number} {best.name}, {METRIC} {best.loss:.4f}{shown}")
    for line in [steps_text(record), *describe_seeds(record)]:
        console.print(line)
    num_failed = sum(trial.state == "failed" for trial in record.trials)
    if num_failed:
        console.print(f"{num_failed} failed (see trial.log there); the same command tries again")
    console.print(f"next: python -m analysis.report {record.paths.root}")


def steps_text(record: SweepRecord) -> str:
    """`steps: 251 trained, 44 saved by stages, 0 by pruning`."""
    steps = StepCount()
    for trial in record.all_trials:
        if trial.result:
            steps.add(trial.result, trial.settings["max_steps"])
    return (
        f"steps: {steps.trained:,} trained, {steps.saved:,} saved by stages, "
        f"{steps.pruned:,} by pruning"
    )


def make_console() -> Console:
    """Console as wide as the terminal, which shows every text as it is."""
    # A file or a pipe has no width of its own, and Rich would cut the table at 80 columns.
    width = None if Console().is_terminal else 140
    # An error's text may have brackets or colons, which Rich would read as its own markup or emoji.
    return Console(highlight=False, soft_wrap=True, markup=False, emoji=False, width=width)


def params_text(params: dict[str, Any]) -> str:
    """`max_steps=60 learning_rate=0.0002`."""
    return " ".join(f"{name}={_value_text(value)}" for name, value in params.items())


def first_line(error: Exception) -> str:
    """The error's text up to its first line break."""
    return next(iter(str(error).strip().splitlines()), "no message")


def _value_text(value: Any) -> str:
    if value is None:
        return ""
    return f"{value:.4g}" if isinstance(value, float) else str(value)
