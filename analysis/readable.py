"""A sweep of which some files are damaged: what can still be read, and a line for every trial left out.

The report refuses such a sweep; a page that is watched goes on without the trial, and says so.
"""

from pathlib import Path
from typing import Any

import pandas as pd
import yaml

from analysis.load import Results, from_sweep
from sweeps.ledger import METRIC, SweepRecord, TrialRecord, read_trial
from training.exceptions import LoraloomError, SweepError
from training.paths import SweepPaths, TrialPaths

_LOSS_COLUMNS = ("example_id", "loss_sum", "num_tokens")
_NUMBERS = (METRIC, "base_eval/loss", "train/loss", "train_time_s")
_COUNTS = ("best_step", "num_steps", "steps_saved")


def load_readable(root: Path) -> tuple[Results, list[str]]:
    """The sweep in `root` without its damaged trials, and for each of those a line that names the file.

    Raises:
        SweepError: the directory is gone.
    """
    paths = SweepPaths(root)
    if not root.is_dir():
        raise SweepError(f"{root} is not a directory, but must be a sweep's (runs/NAME)")
    definition, left_out = _definition(paths)
    records = []
    for directory in sorted(paths.trials.glob("[0-9]*")):
        if not TrialPaths(directory).config.is_file():
            continue
        try:
            record = read_checked_trial(TrialPaths(directory))
            _check_losses(record)
        except (LoraloomError, OSError) as error:
            left_out.append(str(error))
        else:
            records.append(record)
    records.sort(key=lambda record: record.number)
    return from_sweep(SweepRecord(paths, definition, records)), left_out


def read_checked_trial(paths: TrialPaths) -> TrialRecord:
    """A trial's record, its values of the kinds that pages and statistics count on.

    Raises:
        SweepError: a file is damaged, or not a trial's.
    """
    try:
        record = read_trial(paths)
    except (KeyError, TypeError, ValueError, AttributeError, RecursionError):
        raise SweepError(f"{paths.config}: is not a trial's, but must be") from None
    if not (isinstance(record.settings, dict) and isinstance(record.params, dict)):
        raise SweepError(f"{paths.config}: is not a trial's, but must be")
    result = record.result
    if not (isinstance(record.name, str) and isinstance(record.state, str) and _is_result(result)):
        raise SweepError(f"{paths.result}: is not a trial's result, but must be")
    return record


def _is_result(result: Any) -> bool:
    kinds = {**dict.fromkeys(_NUMBERS, int | float), **dict.fromkeys(_COUNTS, int)}
    return isinstance(result, dict) and all(
        result.get(name) is None or isinstance(result[name], kind) for name, kind in kinds.items()
    )


def _check_losses(record: TrialRecord) -> None:
    """Raises SweepError where per-example losses that the findings need cannot be read."""
    steps = (record.result.get("best_step"), 0, record.result.get("num_steps"))
    for step in dict.fromkeys(steps):
        path = record.paths.eval_losses(step) if record.result and step is not None else None
        if path is None or not path.is_file():
            continue
        try:
            columns = pd.read_parquet(path).columns
        except (OSError, ValueError):
            raise SweepError(f"{path}: is damaged, but must be a whole Parquet file") from None
        for name in _LOSS_COLUMNS:
            if name not in columns:
                raise SweepError(f"{path}: has no column {name}, but must have it")


def _definition(paths: SweepPaths) -> tuple[dict[str, Any], list[str]]:
    try:
        definition = yaml.safe_load(paths.definition.read_text("utf-8"))
    except (OSError, ValueError, yaml.YAMLError):
        definition = None
    if isinstance(definition, dict):
        return definition, []
    return {}, [f"{paths.definition}: is damaged, but must be the sweep's definition"]
