"""Brings a W&B sweep here as a sweep directory, so that reports and promotion work on it as on any other.

    python -m sweeps.pull ENTITY/PROJECT/SWEEP_ID

Runs that have ended and are not here yet become trials: settings, every row of the history, the result, and,
where the run has uploaded them (`--log_model`), adapter and per-example losses. Again brings what is new.
"""

import shutil
from collections.abc import Iterable
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from sweeps.directory import allocate_trial
from sweeps.ledger import SweepRecord, read_sweep
from sweeps.terminal import first_line, make_console, params_text
from sweeps.wandb_sweep import connect, open_directory, read_wandb_sweep
from training.cli import make_parser, parse, run_command
from training.config import TrialConfig
from training.exceptions import ConfigError, SweepError
from training.paths import TrialPaths, write_directory, write_json, write_text
from training.recorder import METRIC_KEYS, metrics_line
from training.tracking import ADAPTER_KEY, SUMMARY_KEYS

_STATES = {"finished": "complete", "failed": "failed", "crashed": "failed", "killed": "pruned"}


@dataclass(kw_only=True)
class PullOptions:
    """Options of `python -m sweeps.pull`."""

    output_dir: str = field(default="runs", metadata={"help": "Directory of sweep directories."})


def main() -> None:
    parser = make_parser(
        "sweeps.pull", "Bring a W&B sweep here as a sweep directory.", [PullOptions]
    )
    parser.add_argument("sweep", help="ENTITY/PROJECT/SWEEP_ID, as `wandb sweep` prints it")
    options, positional = parse(parser)
    record = pull_sweep(positional.sweep, Path(options.output_dir))
    make_console().print(f"next: python -m analysis.report {record.paths.root}")


def pull_sweep(path: str, output_dir: Path) -> SweepRecord:
    """Brings what is new of the sweep; returns its directory read back.

    Raises:
        ConfigError: nobody is logged in, or there is no such sweep of ours.
        SweepError: W&B did not give a run, or the directory is another sweep's.
    """
    api = connect()
    sweep = read_wandb_sweep(path, api)
    paths = open_directory(sweep, output_dir)
    known = {trial.wandb_id for trial in read_sweep(paths.root).all_trials}
    console = make_console()
    num_new = num_running = 0
    try:
        for run in api.sweep(sweep.path).runs:
            if run.id in known:
                continue
            if run.state not in _STATES:
                num_running += 1
                continue
            trial = paths.trial(allocate_trial(paths))
            _bring(run, trial, list(sweep.definition.varied))
            num_new += 1
            console.print(f"trial {int(trial.root.name)} {run.name} (run {run.id}, {run.state})")
    except ConfigError as error:
        raise SweepError(f"{sweep.path}: {error}") from error
    except Exception as error:
        raise SweepError(f"{sweep.path}: W&B cannot give its runs: {first_line(error)}") from error
    running = f"; {num_running} have not ended" if num_running else ""
    console.print(f"{paths.root}: {num_new} new runs, {len(known)} were there{running}")
    return read_sweep(paths.root)


def _bring(run: Any, final: TrialPaths, varied: Iterable[str]) -> None:
    """All files of a trial, or none."""
    write_directory(final.root, lambda root: _write(run, TrialPaths(root), final, varied))


def _write(run: Any, trial: TrialPaths, final: TrialPaths, varied: Iterable[str]) -> None:
    names = {setting.name for setting in fields(TrialConfig)}
    settings = {name: value for name, value in dict(run.config).items() if name in names}
    config = TrialConfig.from_dict(settings, f"run {run.id}")
    params = {name: settings[name] for name in varied if name in settings}
    info = {
        "number": int(final.root.name),
        "name": params_text(params) or run.name,
        "params": params,
        "retry_of": None,
        "sweep": final.root.parents[1].name,
        "wandb_id": run.id,
    }
    write_json(trial.config, {"settings": config.to_dict(), "engine": "wandb", **info})
    rows = run.scan_history()  # all of them; run.history() is a sample
    write_text(trial.metrics, "".join(_metrics_line(row) for row in rows if "step" in row))
    summary = dict(run.summary_metrics)
    result = {key: summary[key] for key in SUMMARY_KEYS if key in summary}
    state = result.get("state")
    if state not in ("complete", "pruned", "failed"):
        result |= {"state": _STATES[run.state], "reason": f"the W&B run is {run.state}"}
    if name := summary.get(ADAPTER_KEY):
        _download(run, name, trial)
    write_json(trial.result, result)
    write_json(trial.wandb_receipt, {"run": "/".join(run.path), "url": run.url, "log_model": "all"})


def _metrics_line(row: dict[str, Any]) -> str:
    values = {name: row[name] for name in METRIC_KEYS if name in row}
    return metrics_line(int(row["step"]), row.get("_timestamp", 0.0), values)


def _download(run: Any, name: str, trial: TrialPaths) -> None:
    """The artifact of `training.tracking.log_adapter`."""
    import wandb

    entity, project, _ = run.path
    copy = trial.root / ".artifact"
    wandb.Api().artifact(f"{entity}/{project}/{name}").download(str(copy))
    for part in (trial.adapter, trial.evaluations):
        if (copy / part.name).is_dir():
            shutil.move(copy / part.name, part)
    shutil.rmtree(copy)


if __name__ == "__main__":
    run_command(main)
