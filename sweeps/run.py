"""Runs a sweep here, or continues it: the same command after a crash.

definition -> study -> `TrialQueue` -> worker processes, each with a pack of trials -> result.json -> study.
"""

import contextlib
import os
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Literal

import optuna
from filelock import FileLock

from sweeps.directory import check_directory, locked, write_definition
from sweeps.ledger import SweepRecord, read_sweep
from sweeps.pool import find_gpus, train_in_workers
from sweeps.seeds import queue_final_round
from sweeps.shared import SharedStudy
from sweeps.spec import SweepDefinition, read_definition
from sweeps.study import close_study, open_study, planned_points
from sweeps.terminal import make_console, print_summary
from sweeps.trial_queue import TrialQueue
from training.cli import make_parser, parse, run_command
from training.exceptions import ConfigError, SweepError
from training.interrupts import stops_gently
from training.job import Engine, JobOptions
from training.paths import SweepPaths
from training.progress import Display
from training.tracking import LogModel

_DESCRIPTION = """\
Run the sweep that a YAML file defines, or continue it: the same command after a crash or Ctrl-C
trains exactly what is unfinished or failed. Results go to OUTPUT_DIR/NAME/.

  python -m sweeps.run sweeps/configs/quickstart.yaml"""


@dataclass(kw_only=True)
class RunOptions:
    """Options of `python -m sweeps.run`."""

    output_dir: str = field(default="runs", metadata={"help": "Directory of sweep directories."})
    storage: str | None = field(
        default=None,
        metadata={
            "help": "URL of a database, e.g. postgresql://HOST/DB, whose study several machines share: each "
            "runs this command on the same --output_dir. Without it, the sweep's own study.db."
        },
    )
    num_trials: int | None = field(
        default=None,
        metadata={
            "help": "Trials in all; needed for random and bayes without run_cap, otherwise a limit."
        },
    )
    report_to: Literal["wandb", "none"] = field(
        default="wandb", metadata={"help": "Tracker, besides the files that are always written."}
    )
    engine: Engine = field(
        default="packed",
        metadata={"help": "packed trains several trials at once; trl is SFTTrainer, one by one."},
    )
    slots: int = field(
        default=0,
        metadata={
            "help": "Most trials at once in a worker; 0 is as many as memory and device make sense of."
        },
    )
    workers: int | None = field(
        default=None,
        metadata={
            "help": "Processes that train; without it one per visible GPU, or one. 0 trains in this one."
        },
    )
    timeout: float | None = field(
        default=None,
        metadata={
            "help": "Seconds after which the sweep stops, its trials saved; the same command goes on."
        },
    )
    num_seeds: int = field(
        default=1,
        metadata={"help": "Seeds that each setting is trained with; the sampler sees their mean."},
    )
    final_seeds: int = field(
        default=0,
        metadata={
            "help": "Fresh seeds for the best trial, and for all that are not significantly worse, "
            "once the others have ended."
        },
    )
    log_model: LogModel = field(
        default="none",
        metadata={
            "help": "Adapters uploaded to W&B: of every trial (all), or when one is the best."
        },
    )
    num_samples: int = field(
        default=0,
        metadata={
            "help": "Validation prompts that a trial answers at each evaluation at which its loss is the "
            "lowest so far; its answers and the base model's are kept in its samples/. 0 is none."
        },
    )
    project: str | None = field(
        default=None,
        metadata={"help": "W&B project; without it the definition's own, or loraloom."},
    )


def main() -> None:
    parser = make_parser("sweeps.run", _DESCRIPTION, [RunOptions])
    parser.add_argument("config", help="sweep definition, e.g. sweeps/configs/quickstart.yaml")
    options, positional = parse(parser)
    run_sweep(read_definition(positional.config), options)


def run_sweep(definition: SweepDefinition, options: RunOptions) -> SweepRecord:
    """Runs or continues the sweep; returns its directory read back.

    Raises:
        ConfigError: the definition does not say how many trials there are.
        SweepError: the directory is in use or another sweep's, or trials failed in a row.
    """
    _check(options)
    paths = SweepPaths(Path(options.output_dir) / definition.name)
    check_directory(definition, paths, is_shared=options.storage is not None)
    console = make_console()
    is_shared = options.storage is not None
    with locked(paths, is_shared=is_shared) as lock, contextlib.ExitStack() as stack:
        deciding = FileLock(paths.decision_lock) if is_shared else contextlib.nullcontext()
        with deciding:  # two that start at the same time make one study
            study = open_study(definition, paths, options.storage)
        shared = SharedStudy(study, paths) if is_shared else None
        if shared:
            stack.enter_context(shared.beating())
        try:
            num_trials = _num_trials(definition, study, options)
            write_definition(definition, paths)
            queue = TrialQueue(
                definition=definition,
                paths=paths,
                study=study,
                shared=shared,
                num_trials=num_trials,
                is_capped=options.num_trials is not None or definition.run_cap is not None,
                num_seeds=options.num_seeds,
                shares_stages=options.engine == "packed",
                console=console,
                display=Display(console),
            )
            console.print(f"sweep {definition.name}: {paths.root}")
            try:
                queue.resume()
                _train(queue, options, lock)
            finally:
                queue.give_back()
        except optuna.exceptions.StorageInternalError as error:
            reason = str(error.__cause__ or error).splitlines()[0]
            where = "--storage" if is_shared else paths.study
            raise SweepError(f"{where}: cannot be written: {reason}") from error
        finally:
            close_study(study)
    record = read_sweep(paths.root)
    print_summary(record, console)
    return record


def _train(queue: TrialQueue, options: RunOptions, lock: IO[str]) -> None:
    """Trains until the queue has nothing, then the final round; returns early when the time is up."""
    definition = queue.definition
    queue.display.footer = queue.footer
    job_options = JobOptions(
        slots=options.slots,
        report_to=options.report_to,
        group=definition.name,
        project=options.project or definition.config.get("project") or "loraloom",
        entity=os.environ.get("WANDB_ENTITY") or definition.config.get("entity"),
        log_model=options.log_model,
        num_samples=options.num_samples,
        display=queue.display,
    )
    with _time_limit(options.timeout, queue, job_options.stop), stops_gently(job_options.stop):
        _train_queue(queue, options, job_options, lock)
        if options.final_seeds and queue_final_round(queue, options.final_seeds):
            _train_queue(queue, options, job_options, lock)


def _train_queue(
    queue: TrialQueue, options: RunOptions, job_options: JobOptions, lock: IO[str]
) -> None:
    num_workers = options.workers
    if num_workers is None:
        num_workers = max(1, len(find_gpus()))
    if num_workers:
        train_in_workers(queue, options.engine, job_options, num_workers, lock)
    else:
        from training.run import run_jobs  # loads torch and transformers: only when training

        run_jobs(queue, engine=options.engine, options=job_options)


@contextlib.contextmanager
def _time_limit(
    timeout_s: float | None, queue: TrialQueue, stop: threading.Event
) -> Iterator[None]:
    """Stops the sweep in the context after `timeout_s`, its trials saved; that is no error."""
    if timeout_s is None:
        yield
        return

    def end() -> None:
        queue.closed = True
        stop.set()

    timer = threading.Timer(timeout_s, end)
    timer.start()
    try:
        yield
    except KeyboardInterrupt:
        if not queue.closed:
            raise
        queue.console.print(f"--timeout {timeout_s:g} s is over; the same command goes on")
    finally:
        timer.cancel()


def _check(options: RunOptions) -> None:
    least_of = {"slots": 0, "workers": 0, "num_seeds": 1, "final_seeds": 0, "num_samples": 0}
    for name, least in least_of.items():
        value = getattr(options, name)
        if value is not None and value < least:
            raise ConfigError(f"--{name} is {value}, but must be >= {least}")
    if options.timeout is not None and not options.timeout > 0:
        raise ConfigError(f"--timeout is {options.timeout:g}, but must be > 0")
    if options.num_trials is not None and options.num_trials < 1:
        raise ConfigError(f"--num_trials is {options.num_trials}, but must be >= 1")


def _num_trials(
    definition: SweepDefinition, study: optuna.Study, options: RunOptions
) -> int | None:
    """How many trials the sweep has in all; None if only its sampler knows."""
    limit = options.num_trials if options.num_trials is not None else definition.run_cap
    planned = planned_points(study, definition)
    if planned is not None:
        return min(len(planned), limit or len(planned))
    if limit is None and not hasattr(study.sampler, "is_exhausted"):
        raise ConfigError(
            f"{definition.path}: run_cap is missing, but method {definition.method} needs it "
            "(or --num_trials) to end"
        )
    return limit


if __name__ == "__main__":
    run_command(main)
