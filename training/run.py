"""One trial, from settings to `result.json`: what a sweep calls, and what a plain `wandb agent` launches.

config.json first, then data, base model, training with evaluations, and the result last: a directory
without a result is a trial that has not ended.
"""

import errno
import os
import shutil
import sys
import time
import traceback
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from training.cli import make_parser, parse, run_command
from training.config import TrialConfig
from training.exceptions import SweepError
from training.paths import TrialPaths, read_json, write_json, write_text
from training.tracking import ReportTo, Tracker, make_tracker

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


def main() -> None:
    config, options = parse(make_parser("training.run", _DESCRIPTION, [TrialConfig, RunOptions]))
    config.check("--")
    paths = TrialPaths(Path(options.output_dir or _default_directory()))
    result = _known_result(config, paths)
    if result is None:
        print(f"trial {paths.root}", flush=True)
        result = run_trial(config, paths, report_to=options.report_to, project=options.project)
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
) -> dict[str, Any]:
    """Trains one trial and writes its directory.

    Args:
        config: the trial's settings.
        paths: its directory; what an earlier attempt left there should be gone.
        info: more for config.json: `number`, `name`, `params` (what the sweep varies), `retry_of`,
            `sweep`.
        report_to: tracker besides the local files.
        group: W&B's group, the sweep's name.
        project: W&B's project.

    Returns:
        The content of result.json; `state` is `complete`, or `failed` if a loss was not finite.

    Raises:
        LoraloomError: the data, the model or a setting cannot be used.
        Exception: any other fault; both are in result.json and trial.log as well. A full disk and
            Ctrl-C leave no result.json, so that the trial counts as unfinished.
    """
    info = info or {"number": 0, "name": paths.root.name, "params": {}, "retry_of": None}
    write_json(paths.config, {"settings": config.to_dict(), "engine": "trl", **info})
    tracker: Tracker | None = None
    try:
        from training.prepared import prepare  # torch and transformers take seconds to import

        prepared = prepare(config)
        tracker = make_tracker(
            report_to,
            paths.root,
            group=group,
            name=info["name"],
            config=config.to_dict(),
            project=project,
        )
        result = _train(config, paths, prepared, tracker)
    except BaseException as error:
        _forget()
        _record_fault(error, paths, tracker)
        raise
    write_json(paths.result, result)
    tracker.finish(result)
    return result


def _train(config: TrialConfig, paths: TrialPaths, prepared: Any, tracker: Tracker) -> dict:
    from training.progress import Progress
    from training.recorder import TrialRecorder
    from training.trl_engine import train_with_trl

    recorder = TrialRecorder(paths, tracker, Progress(config.max_steps), prepared.base_losses)
    try:
        failure = train_with_trl(config, prepared, paths, recorder)
        state = "failed" if failure else "complete"
        return {**recorder.result(state, failure), **prepared.splits.hashes}
    finally:
        recorder.close()
        shutil.rmtree(paths.state, ignore_errors=True)


def _record_fault(error: BaseException, paths: TrialPaths, tracker: Tracker | None) -> None:
    is_full = isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT)
    if is_full or not isinstance(error, Exception):
        result = {"state": "interrupted"}
    else:
        reason = next(iter(str(error).strip().splitlines()), "") or type(error).__name__
        result = {"state": "failed", "reason": reason}
        write_text(paths.log, "".join(traceback.format_exception(error)))
        write_json(paths.result, result)
    if tracker is not None:
        tracker.finish(result)


def _forget() -> None:
    from training.prepared import forget

    forget()


def _default_directory() -> str:
    # Under `wandb agent` several machines may start in the same second.
    name = os.environ.get("WANDB_RUN_ID") or time.strftime("%Y%m%d-%H%M%S")
    return os.path.join("runs", "trials", name)


def _known_result(config: TrialConfig, paths: TrialPaths) -> dict[str, Any] | None:
    """The result, if this very trial has ended; an unfinished or failed one is cleared away.

    Raises:
        SweepError: the directory holds something else.
    """
    if not paths.root.exists() or (paths.root.is_dir() and not any(paths.root.iterdir())):
        return None
    if not paths.config.is_file():
        raise SweepError(f"--output_dir is {paths.root}, which has files, but is not a trial's")
    settings = read_json(paths.config)["settings"]
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
