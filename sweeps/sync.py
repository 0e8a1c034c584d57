"""Sends to W&B what it does not have of a sweep: an offline sweep becomes an online one, at any time.

    python -m sweeps.sync runs/quickstart

Each trial is the W&B run whose id its config.json has, in the sweep's group. A run that is there in part is
sent its missing rows, one that is whole (wandb.json beside its result says so) nothing: again is as good as
once. The report, if there is one, goes to a run of its own.
"""

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import wandb

from sweeps.ledger import SweepRecord, TrialRecord, read_sweep
from sweeps.terminal import first_line, make_console
from sweeps.wandb_sweep import connect
from training.cli import make_parser, parse, run_command
from training.exceptions import SweepError
from training.paths import read_json, write_json
from training.tracking import (
    FINISH_TIMEOUT_S,
    LogModel,
    Tracker,
    WandbRun,
    WandbTracker,
    artifact_name,
)

_LOG_MODEL = ("none", "best", "all")
AT_ONCE = 4
"""Runs that are sent side by side."""


@dataclass(kw_only=True)
class SyncOptions:
    """Options of `python -m sweeps.sync`."""

    project: str | None = field(
        default=None,
        metadata={"help": "W&B project; without it the definition's own, or loraloom."},
    )
    entity: str | None = field(
        default=None, metadata={"help": "W&B user or team; without it the API key's own."}
    )
    log_model: LogModel = field(
        default="none",
        metadata={"help": "Upload the adapters of every trial (all), or of the best."},
    )
    link_promoted: str | None = field(
        default=None,
        metadata={
            "help": "Upload the promoted version and link it there, e.g. wandb-registry-model/NAME."
        },
    )


def main() -> None:
    parser = make_parser(
        "sweeps.sync", "Send a sweep to W&B, or what is missing there.", [SyncOptions]
    )
    parser.add_argument("sweep", help="sweep directory, e.g. runs/quickstart")
    options, positional = parse(parser)
    sync_sweep(read_sweep(Path(positional.sweep)), options)


def sync_sweep(record: SweepRecord, options: SyncOptions) -> None:
    """Sends every trial that has ended, and the report.

    Raises:
        ConfigError: nobody has logged in to W&B.
        SweepError: W&B did not take a run.
    """
    connect()
    console = make_console()
    ended = [trial for trial in record.all_trials if trial.result]
    left = [trial for trial in ended if not is_there(trial, options)]
    running = len(record.all_trials) - len(ended)
    shown = f", {running} have not ended" if running else ""
    console.print(
        f"sweep {record.name}: {len(ended) - len(left)} runs are there, {len(left)} to send{shown}"
    )
    num_sent = 0
    for batch in _batches(left):
        trackers = [(trial, _tracker(trial, record, options)) for trial in batch]
        for trial, tracker in trackers:
            tell_again(tracker, trial)
        problems = [_wait(tracker) for _, tracker in trackers]
        for (trial, _), problem in zip(trackers, problems, strict=True):
            if problem or not trial.paths.wandb_receipt.is_file():
                raise SweepError(
                    f"{trial.paths.root}: not sent: {problem}; the same command goes on"
                )
            num_sent += 1
            url = read_json(trial.paths.wandb_receipt)["url"]
            console.print(f"trial {trial.number} {trial.name} ({num_sent} of {len(left)}): {url}")
    for send in (_send_report, _send_promoted):
        try:
            if line := send(record, options):
                console.print(line)
        except Exception as error:
            raise SweepError(f"{record.paths.root}: W&B: {first_line(error)}") from error


def is_there(trial: TrialRecord, options: SyncOptions) -> bool:
    """Whether W&B has all of the trial, in that project."""
    if not trial.paths.wandb_receipt.is_file():
        return False
    receipt = read_json(trial.paths.wandb_receipt)
    entity, project, _ = receipt["run"].split("/")
    is_in = (options.project or project, options.entity or entity) == (project, entity)
    has_model = _LOG_MODEL.index(receipt["log_model"]) >= _LOG_MODEL.index(options.log_model)
    return is_in and has_model


def tell_again(tracker: Tracker, trial: TrialRecord) -> None:
    """Tells all that the trial's files say; what W&B has already, the tracker leaves out."""
    for row, line in enumerate(trial.metrics()):
        tracker.log(row, line)
    tracker.finish(trial.result)


def _batches(trials: list[TrialRecord]) -> Iterator[list[TrialRecord]]:
    for start in range(0, len(trials), AT_ONCE):
        yield trials[start : start + AT_ONCE]


def _tracker(trial: TrialRecord, record: SweepRecord, options: SyncOptions) -> WandbTracker:
    run = WandbRun(
        **_where(record, options),
        name=trial.name,
        id=trial.wandb_id or _made_id(trial),
        sweep_id=_sweep_id(record),
        config=trial.settings,
        log_model=options.log_model,
        must_be_online=True,
    )
    return WandbTracker(trial.paths.root, run)


def _wait(tracker: WandbTracker) -> str | None:
    """What went wrong, once the run has been sent."""
    tracker.thread.join(2 * FINISH_TIMEOUT_S)
    return tracker.problem or ("W&B takes too long" if tracker.thread.is_alive() else None)


def _where(record: SweepRecord, options: SyncOptions) -> dict[str, Any]:
    definition = record.definition
    return {
        "project": options.project or definition.get("project") or "loraloom",
        "entity": options.entity or definition.get("entity"),
        "group": record.name,
    }


def _sweep_id(record: SweepRecord) -> str | None:
    """Of a W&B sweep that agents have trained here."""
    path = read_json(record.paths.environment).get("wandb_sweep") or ""
    return path.split("/")[-1] or None


def _made_id(trial: TrialRecord) -> str:
    """For a trial of a version that gave none; the same each time."""
    return hashlib.sha256(trial.paths.config.read_bytes()).hexdigest()[:8]


def _open_run(record: SweepRecord, options: SyncOptions, job_type: str, what: str) -> Any:
    """A run of the sweep that is no trial; the same one each time."""
    first = record.all_trials[0]
    base_id = (first.wandb_id or _made_id(first)).split("-")[0]
    return wandb.init(
        **_where(record, options),
        id=f"{base_id}-{what.replace(' ', '-')}",
        name=f"{record.name} {what}",
        job_type=job_type,
        resume="allow",
        dir=record.paths.root,
        reinit="create_new",
        settings=wandb.Settings(silent=True, console="off", disable_git=True),
    )


def _send_report(record: SweepRecord, options: SyncOptions) -> str | None:
    """The report and its pictures, in a run of their own; None if W&B has them or there is none."""
    root = record.paths.report
    files = sorted(path for path in root.glob("*") if path.is_file() and path.suffix != ".json")
    if not files or not record.all_trials:
        return None
    digest = hashlib.sha256(b"".join(path.read_bytes() for path in files)).hexdigest()
    receipt = root / "wandb.json"
    if receipt.is_file() and read_json(receipt)["sha256"] == digest:
        return None
    with _open_run(record, options, "report", "report") as run:
        artifact = wandb.Artifact(artifact_name(f"{record.name}-report"), type="report")
        media: dict[str, Any] = {}
        for path in files:
            artifact.add_file(str(path))
            if path.suffix == ".html":  # with its pictures in it
                media[path.stem] = wandb.Html(str(path), inject=False)
        run.log(media)
        run.log_artifact(artifact)
        url = run.url
    write_json(receipt, {"sha256": digest, "url": url})
    return f"report: {url}"


def _send_promoted(record: SweepRecord, options: SyncOptions) -> str | None:
    """The promoted version in use, linked to the registry; None if that is not asked for."""
    if options.link_promoted is None:
        return None
    current = record.paths.current_promotion
    if not current.is_file():
        raise SweepError(f"{record.paths.promoted}: nothing is promoted, so nothing can be linked")
    version = record.paths.promotion(int(current.read_text()))
    with _open_run(record, options, "promotion", f"promoted {version.root.name}") as run:
        artifact = wandb.Artifact(artifact_name(f"{record.name}-promoted"), type="model")
        artifact.add_dir(str(version.root))
        logged = run.log_artifact(artifact, aliases=["latest", version.root.name])
        run.link_artifact(logged, options.link_promoted)
    return f"promoted {version.root.name}: linked to {options.link_promoted}"


if __name__ == "__main__":
    run_command(main)
