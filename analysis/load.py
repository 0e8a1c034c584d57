"""A sweep directory, or a CSV of runs done by hand -> `Results`, which everything else here works on.

The CSV has the columns `name,steps,lr,rank,loss,minutes`; its `loss` is the final train loss, as there is
no held-out data to have another one.
"""

import csv
import math
import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd

from sweeps.ledger import SweepRecord, TrialRecord, read_sweep
from training.config import TrialConfig
from training.exceptions import DataError, nearest

CSV_COLUMNS = {"steps": "max_steps", "lr": "learning_rate", "rank": "lora_r"}
"""Column of a CSV -> TRL's name of the setting."""

BASELINE = "baseline"
WANDB = "wandb:"
"""Before ENTITY/PROJECT/SWEEP_ID: a sweep on W&B's server."""


@dataclass(frozen=True)
class Trial:
    """One trial as the report sees it; None is "not known"."""

    number: int
    name: str
    params: dict[str, Any]
    """The settings that vary between trials."""
    state: str
    loss: float | None
    """What trials are compared by: eval/loss at the best step, or a CSV's loss."""
    minutes: float | None
    num_steps: int | None = None
    best_step: int | None = None
    base_loss: float | None = None
    train_loss: float | None = None
    same_as: int | None = None
    """Number of the trial that this one is a copy of."""
    reason: str | None = None
    record: TrialRecord | None = None

    @property
    def examples(self) -> str | None:
        """Hash of the validation examples: another max_length, say, makes others."""
        return self.record.result.get("validation_hash") if self.record else None

    @property
    def is_scored(self) -> bool:
        return self.state == "complete" and self.loss is not None

    def metrics(self) -> list[dict[str, Any]]:
        """Lines of metrics.jsonl that are a step's; none of a file that is no text."""
        try:
            lines = self.record.metrics() if self.record else []
        except (OSError, ValueError):
            return []
        return [line for line in lines if isinstance(line.get("step"), int)]

    def example_losses(self) -> pd.DataFrame | None:
        """Per-example validation losses at the best step, or None."""
        return self._losses_at(self.best_step)

    def base_example_losses(self) -> pd.DataFrame | None:
        """Per-example validation losses of the base model, or None."""
        return self._losses_at(0)

    def last_example_losses(self) -> pd.DataFrame | None:
        """Per-example validation losses at the last step, or None."""
        return self._losses_at(self.num_steps)

    def _losses_at(self, step: int | None) -> pd.DataFrame | None:
        if self.record is None or step is None:
            return None
        if not self.record.paths.eval_losses(step).is_file():
            return None
        try:
            return self.record.eval_losses(step)
        except (OSError, ValueError):  # a torn file: the trial keeps its loss, but has no interval
            return None


@dataclass(frozen=True)
class Results:
    """All trials of one source, in their order."""

    name: str
    source: Path
    trials: list[Trial]
    settings: list[str]
    """Names of the settings that vary."""
    sweep: SweepRecord | None
    """None for a CSV."""

    @property
    def scored(self) -> list[Trial]:
        return [trial for trial in self.trials if trial.is_scored]

    @property
    def compared(self) -> list[Trial]:
        """The scored trials that can be ranked: those of the validation set that most have."""
        sizes = Counter(trial.examples for trial in self.scored)
        return [
            trial for trial in self.scored if trial.examples == max(sizes, key=sizes.__getitem__)
        ]

    @property
    def ranked(self) -> list[Trial]:
        """Compared trials, the lowest loss first; the first of equals."""
        return sorted(self.compared, key=lambda trial: (trial.loss, trial.number))

    @property
    def best(self) -> Trial:
        return self.ranked[0]

    @property
    def baseline(self) -> Trial:
        """The trial called baseline; where it cannot be compared, the first one that can."""
        compared = self.compared
        return next((trial for trial in self._called_baseline if trial in compared), compared[0])

    @property
    def baseline_note(self) -> str | None:
        """Why another trial stands in for the baseline; None where it is itself."""
        called, baseline = self._called_baseline, self.baseline
        if baseline in called:
            return None
        if not called:
            return f"No trial is called baseline: {baseline.name} stands in for it."
        first = called[0]
        problem = "was scored on other examples" if first.is_scored else f"is {first.state}"
        return f"The baseline, {first.name}, {problem}: {baseline.name} stands in for it."

    @property
    def _called_baseline(self) -> list[Trial]:
        exact = [trial for trial in self.trials if trial.name.lower() == BASELINE]
        return exact or [trial for trial in self.trials if _has_word(trial.name, BASELINE)]

    @property
    def minutes(self) -> float:
        """Time of all trials; a copy took none."""
        return sum(trial.minutes or 0 for trial in self.trials if trial.same_as is None)


def load_source(path: str | Path) -> Results:
    """Reads a sweep directory, a CSV, or (`wandb:ENTITY/PROJECT/SWEEP_ID`) a sweep on W&B's server.

    The last is brought to runs/ first, whole histories and all: its source is that directory.

    Raises:
        SweepError: a directory that is not a sweep's, or W&B does not give the runs.
        ConfigError: nobody is logged in to W&B, or it has no such sweep.
        DataError: a CSV that cannot be read, or no trial to report on.
    """
    if str(path).startswith(WANDB):
        from sweeps.pull import pull_sweep

        path = pull_sweep(str(path).removeprefix(WANDB), Path("runs")).paths.root
    path = Path(path)
    if path.is_dir():
        results = from_sweep(read_sweep(path))
    elif path.is_file():
        results = _from_csv(path)
    else:
        raise DataError(f"{path} is not there, but must be a sweep's directory or a CSV file")
    if not results.scored:
        raise DataError(f"{path}: no trial has finished, so there is nothing to report on")
    return results


def from_sweep(sweep: SweepRecord) -> Results:
    """Results of a sweep that has been read; there may be none that is scored."""
    # Further seeds are in `sweep.seed_losses`; as rows of their own the luckiest would be the best trial.
    trials = [_from_record(record) for record in sweep.trials if record.seed_of is None]
    settings = list(dict.fromkeys(name for trial in trials for name in trial.params))
    varied = [name for name in settings if len({repr(t.params.get(name)) for t in trials}) > 1]
    return Results(sweep.name, sweep.paths.root, trials, varied or settings, sweep)


def _has_word(name: str, word: str) -> bool:
    # A trial without a name of its own is called by its parameters: dataset_name=baseline_v2.
    return "=" not in name and word in re.split(r"[^a-z]+", name.lower())


def _from_record(record: TrialRecord) -> Trial:
    result = record.result
    loss = record.loss
    time_s = result.get("train_time_s")
    return Trial(
        number=record.number,
        name=record.name,
        params=record.params,
        state=record.state,
        loss=loss if loss is not None and math.isfinite(loss) else None,
        minutes=None if time_s is None else time_s / 60,
        num_steps=result.get("num_steps"),
        best_step=result.get("best_step"),
        base_loss=result.get("base_eval/loss"),
        train_loss=result.get("train/loss"),
        same_as=result.get("same_as"),
        reason=result.get("reason"),
        record=record,
    )


def _from_csv(path: Path) -> Results:
    trials = []
    with open(path, encoding="utf-8-sig", newline="") as file:
        reader = csv.DictReader(file, strict=True)
        try:
            _check_header(path, reader.fieldnames or [])
            for row in reader:
                trials.append(_from_row(row, len(trials), f"{path}: line {reader.line_num}"))
        except (csv.Error, UnicodeDecodeError) as error:
            raise DataError(f"{path}: line {reader.reader.line_num}: {error}") from None
    return Results(path.stem, path, trials, list(CSV_COLUMNS.values()), None)


def _check_header(path: Path, found: Any) -> None:
    expected = ["name", *CSV_COLUMNS, "loss", "minutes"]
    for column in expected:
        if column not in found:
            raise DataError(
                f"{path}: line 1: column {column} is missing, but there must be "
                f"{','.join(expected)}{nearest(column, found)}"
            )
    for column in found:
        if column not in expected or found.count(column) > 1:
            problem = "is there twice" if column in expected else "is not known"
            raise DataError(
                f"{path}: line 1: column {column} {problem}, but there must be {','.join(expected)}"
            )


def _from_row(row: Mapping[str, Any], number: int, where: str) -> Trial:
    if None in row or None in row.values():
        # A comma too many is a decimal comma more often than not: 1,1774.
        raise DataError(f"{where}: has too {'many' if None in row else 'few'} values")
    # The settings are checked as a trial's own: a rank of 0 is as wrong here.
    settings = {name: row[column] for column, name in CSV_COLUMNS.items()}
    config = TrialConfig.from_dict(settings, where)
    return Trial(
        number=number,
        name=row["name"] or f"run {number}",
        params={name: getattr(config, name) for name in settings},
        state="complete",
        loss=_number(row, "loss", where, above_zero=True),
        minutes=_number(row, "minutes", where),
        num_steps=config.max_steps,
    )


def _number(row: Mapping[str, Any], column: str, where: str, *, above_zero: bool = False) -> float:
    try:
        value = float(row[column])
    except (TypeError, ValueError):
        value = math.nan
    if not (math.isfinite(value) and (value > 0 if above_zero else value >= 0)):
        limit = "> 0" if above_zero else ">= 0"
        raise DataError(f"{where}: {column} is {row[column]!r}, but must be a number {limit}")
    return value
