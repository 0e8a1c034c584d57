"""One trial, from settings to `result.json`: what a sweep calls, and what a plain `wandb agent` launches.

config.json first, then data, base model, training with evaluations, and the result last: a directory
without a result is a trial that has not ended.
"""

import contextlib
import os
import shutil
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from training.cli import make_parser, parse, run_command
from training.config import TrialConfig
from training.exceptions import ConfigError, SweepError
from training.interrupts import stops_gently
from training.job import Engine, Job, JobOptions, Outcome, Trials
from training.paths import TrialPaths, read_json
from training.tracking import INTERRUPTED_TIMEOUT_S, LogModel, ReportTo, new_run_id

PROJECT = "loraloom"

_DESCRIPTION = """\
Train one trial: a LoRA adapter on a frozen base model. Setting names are TRL's and Transformers' own.

  python -m training.run --max_steps 30 --per_device_train_batch_size 2    the demo model and data
  python -m training.run --model_name_or_path meta-llama/Llama-3.2-1B-Instruct \\
      --dataset_name mlabonne/FineTome-100k --load_in_4bit --learning_rate 2e-4 --lora_r 16

Losses are means over supervised tokens, in nats. The adapter kept is the one of the best evaluation."""


@dataclass(kw_only=True)
class RunOptions:
    """Options of `python -m training.run` that are not settings of the trial."""

    output_dir: str = field(
        default="",
        metadata={"help": "The trial's directory; empty is runs/trials/ and the date and time."},
    )
    report_to: ReportTo = field(
        default="wandb", metadata={"help": "Tracker, besides the files that are always written."}
    )
    project: str = field(default=PROJECT, metadata={"help": "W&B project."})
    log_model: LogModel = field(
        default="none",
        metadata={"help": "Upload the adapter to W&B: of every trial (all), or if none is better."},
    )
    engine: Engine = field(
        default="packed",
        metadata={"help": "packed, or trl: SFTTrainer, the slower reference for every model."},
    )
    num_samples: int = field(
        default=0,
        metadata={"help": "Validation prompts answered at every evaluation, kept in samples/."},
    )


def main() -> None:
    config, options = parse(make_parser("training.run", _DESCRIPTION, [TrialConfig, RunOptions]))
    config.check("--")
    if options.num_samples < 0:
        raise ConfigError(f"--num_samples is {options.num_samples}, but must be >= 0")
    paths = TrialPaths(Path(options.output_dir or _default_directory()))
    with _locked(paths):
        result = _known_result(config, paths)
        if result is None:
            print(f"trial {paths.root} (to continue it: --output_dir {paths.root})", flush=True)
            result = run_trial(
                config,
                paths,
                report_to=options.report_to,
                project=options.project,
                engine=options.engine,
                log_model=options.log_model,
                num_samples=options.num_samples,
            )
        else:
            print(f"{paths.root}: is trained already")
    if result["state"] == "failed":
        print(f"failed: {result['reason']}", file=sys.stderr)
        sys.exit(1)
    print(
        f"eval/loss {result['eval/loss']:.4f} at step {result['best_step']}, "
        f"base model {result['base_eval/loss']:.4f}; {result['num_steps']} steps in "
        f"{result['train_time_s']:.0f} s\nadapter: {paths.adapter}"
    )


def run_trial(
    config: TrialConfig,
    paths: TrialPaths,
    *,
    info: dict[str, Any] | None = None,
    report_to: ReportTo = "wandb",
    group: str | None = None,
    project: str = PROJECT,
    engine: Engine = "packed",
    log_model: LogModel = "none",
    num_samples: int = 0,
) -> dict[str, Any]:
    """Trains one trial and writes its directory.

    Args:
        config: the trial's settings.
        paths: its directory; the packed engine goes on from the state that an earlier attempt left there.
        info: more for config.json: `number`, `name`, `params` (what the sweep varies), `retry_of`,
            `sweep`.
        report_to: tracker besides the local files.
        group: W&B's group, the sweep's name.
        project: W&B's project.
        engine: `packed`, or `trl` for the reference.
        log_model: whether the adapter is uploaded to W&B.
        num_samples: validation prompts that are answered at every evaluation.

    Returns:
        The content of result.json; `state` is `complete`, or `failed` if a loss was not finite.

    Raises:
        LoraloomError: the data, the model or a setting cannot be used.
        Exception: any other fault; both are in result.json and trial.log as well. A full disk and
            Ctrl-C leave no result.json, so that the trial counts as unfinished.
    """
    if info is None:
        info = {"number": 0, "name": paths.root.name, "params": {}, "retry_of": None}
    info = {"wandb_id": _run_id(paths), **info}
    trial = _OneTrial(Job(config=config, paths=paths, info=info))
    options = JobOptions(
        slots=1,
        report_to=report_to,
        group=group,
        project=project,
        log_model=log_model,
        num_samples=num_samples,
    )
    with stops_gently(options.stop):
        run_jobs(trial, engine=engine, options=options)
    assert trial.outcome is not None
    if isinstance(trial.outcome, Exception):
        raise trial.outcome
    return trial.outcome


def _run_id(paths: TrialPaths) -> str:
    """Of the trial's W&B run: that of an earlier attempt, or the one that `wandb agent` has given."""
    with contextlib.suppress(OSError, ValueError):
        known = read_json(paths.config).get("wandb_id")
        if known:
            return known
    return os.environ.get("WANDB_RUN_ID") or new_run_id()


class _OneTrial(Trials):
    def __init__(self, job: Job):
        self.job: Job | None = job
        self.outcome: Outcome | None = None

    def next_job(self) -> Job | None:
        job, self.job = self.job, None
        return job

    def done(self, job: Job, outcome: Outcome) -> None:
        self.outcome = outcome


def run_jobs(trials: Trials, *, engine: Engine, options: JobOptions) -> int:
    """Trains until `trials` has nothing: in one pack, or through TRL one trial after the other.

    Args:
        trials: gives jobs and is told of them; an exception that it raises ends the run, and the trials
            in flight are left unfinished.
        engine: `packed` or `trl`; the latter neither shares stages nor ends trials early.
        options: slots, tracker, terminal.

    Returns:
        The number of runs that the tracker has not taken.
    """
    try:
        if engine == "packed":
            from training.pack import run_pack  # torch and transformers take seconds to import

            run_pack(trials, options)
        else:
            from training.trl_engine import run_with_trl

            run_with_trl(trials, options)
    except BaseException:
        _forget()
        options.close_trackers(INTERRUPTED_TIMEOUT_S)
        raise
    return options.close_trackers()


def _forget() -> None:
    """After a fault the base model may not be what it was."""
    prepared = sys.modules.get("training.prepared")
    if prepared is not None and hasattr(prepared, "forget"):
        prepared.forget()


def _default_directory() -> str:
    # Under `wandb agent` several machines may start in the same second.
    name = os.environ.get("WANDB_RUN_ID") or f"{time.strftime('%Y%m%d-%H%M%S')}-{os.getpid()}"
    return os.path.join("runs", "trials", name)


@contextlib.contextmanager
def _locked(paths: TrialPaths) -> Iterator[None]:
    """Two processes in one directory would mix their files."""
    lock = paths.root.with_name(f".{paths.root.name}.lock")
    lock.parent.mkdir(parents=True, exist_ok=True)
    try:
        with FileLock(lock, timeout=0):
            yield
    except Timeout:
        raise SweepError(
            f"--output_dir is {paths.root}, in which another process is training"
        ) from None


def _known_result(config: TrialConfig, paths: TrialPaths) -> dict[str, Any] | None:
    """The result, if this very trial has ended; a failed one is cleared away.

    Raises:
        SweepError: the directory holds something else.
    """
    if paths.root.exists() and not paths.root.is_dir():
        raise SweepError(f"--output_dir is {paths.root}, which is a file, but must be a directory")
    # What begins with a dot is a draft that a killed process left.
    if not paths.root.exists() or all(path.name[0] == "." for path in paths.root.iterdir()):
        return None
    try:
        settings = read_json(paths.config)["settings"]
    except (OSError, ValueError, KeyError, TypeError):
        raise SweepError(
            f"--output_dir is {paths.root}, which has files, but is not a trial's"
        ) from None
    for name, value in config.to_dict().items():
        if settings.get(name) != value:
            raise SweepError(
                f"--output_dir is {paths.root}, which holds a trial with {name} "
                f"{settings.get(name)}, but this one has {value}"
            )
    if paths.result.is_file():
        result = read_json(paths.result)
        if result["state"] == "complete":
            return result
        shutil.rmtree(paths.root)
    return None


if __name__ == "__main__":
    run_command(main)
