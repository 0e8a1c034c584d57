"""Everything that a trial leaves behind: settings, metrics, evaluations, the best adapter, result or fault.

An engine calls `log_step` after each step and `log_eval` with each evaluation; the recorder writes the
trial's files, tells the tracker and the terminal, and knows which step is the best.
"""

import errno
import json
import math
import time
import traceback
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pandas as pd

from training.config import TrialConfig
from training.evaluate import mean_loss
from training.paths import TrialPaths, write_atomic, write_directory, write_json, write_text
from training.progress import Progress
from training.tracking import Tracker

_RECORD = (
    "num_steps",
    "tokens",
    "train_time_s",
    "train_loss",
    "last_loss",
    "best_step",
    "best_loss",
    "last_eval_step",
    "forked_from",
    "steps_saved",
)


METRIC_KEYS = ("train/loss", "eval/loss", "learning_rate", "grad_norm", "tokens_per_second")
"""Metrics of a line of metrics.jsonl, beside `step` and `time`."""


class TrialRecorder:
    """Records one trial; `result()` is its `result.json`.

    Args:
        paths: the trial's files.
        tracker: is told every metric.
        progress: the terminal's view.
        base_losses: per-example validation losses of the base model, step 0.
        record: `record()` of an earlier process; what the files say beyond its step is forgotten.
    """

    def __init__(
        self,
        paths: TrialPaths,
        tracker: Tracker,
        progress: Progress,
        base_losses: pd.DataFrame,
        record: Mapping[str, Any] | None = None,
    ):
        self.paths, self.tracker, self.progress = paths, tracker, progress
        self.num_steps = 0
        self.tokens = 0
        self.train_time_s = 0.0
        self.train_loss: float | None = None
        self.base_loss = mean_loss(base_losses)
        self.last_loss: float | None = None
        self.best_step: int | None = None
        self.best_loss = math.inf
        self.last_eval_step = 0
        self.forked_from: dict[str, Any] | None = None
        self.steps_saved = 0
        paths.root.mkdir(parents=True, exist_ok=True)
        if record is not None:
            vars(self).update({name: record[name] for name in _RECORD})
            self.best_loss = math.inf if self.best_loss is None else self.best_loss
            _forget_after(paths.metrics, self.num_steps)
            progress.resumed(self.num_steps, self.train_loss or math.nan)
        self.num_rows = 0
        self._tell_history()
        self.file = open(paths.metrics, "a", encoding="utf-8", buffering=1)  # noqa: SIM115
        if record is None:
            write_atomic(paths.eval_losses(0), base_losses.to_parquet)
            self._log(0, {"eval/loss": self.base_loss})

    def record(self) -> dict[str, Any]:
        """What a process that continues the trial has to know; its values fit into JSON."""
        return {name: getattr(self, name) for name in _RECORD} | {
            "best_loss": _finite(self.best_loss)
        }

    def log_step(
        self,
        step: int,
        *,
        train_loss: float,
        learning_rate: float,
        num_tokens: int,
        step_time_s: float,
        grad_norm: float | None,
    ) -> None:
        """One optimizer step.

        Args:
            step: counted from 1.
            train_loss: of this step's batch, nats a supervised token.
            learning_rate: that the step used.
            num_tokens: in the step's sequences, padding not counted.
            step_time_s: seconds that the step took, pack-mates included.
            grad_norm: before clipping; None where nothing measures it.
        """
        self.num_steps, self.train_loss = step, train_loss
        self.tokens += num_tokens
        metrics = {"train/loss": train_loss, "learning_rate": learning_rate}
        if grad_norm is not None:
            metrics["grad_norm"] = grad_norm
        metrics["tokens_per_second"] = num_tokens / max(step_time_s, 1e-9)
        self._log(step, metrics)
        self.progress.step(step, train_loss)

    def log_eval(
        self, step: int, losses: pd.DataFrame, save_adapter: Callable[[Path], None]
    ) -> None:
        """One evaluation on the validation split; `save_adapter(directory)` is called if it is the best."""
        loss = mean_loss(losses)
        self.last_loss, self.last_eval_step = loss, step
        write_atomic(self.paths.eval_losses(step), losses.to_parquet)
        self._log(step, {"eval/loss": loss})
        is_best = loss < self.best_loss
        if is_best:
            write_directory(self.paths.adapter, save_adapter)
            self.best_step, self.best_loss = step, loss
        self.progress.evaluated(step, loss, is_best=is_best)

    def result(self, state: str, reason: str | None = None) -> dict[str, Any]:
        """The trial's final record."""
        return {
            "state": state,
            "reason": reason,
            "best_step": self.best_step,
            "eval/loss": _finite(self.best_loss),
            "base_eval/loss": _finite(self.base_loss),
            "last_eval/loss": _finite(self.last_loss),
            "train/loss": _finite(self.train_loss),
            "num_steps": self.num_steps,
            "train_time_s": round(self.train_time_s, 3),
            "tokens": self.tokens,
            "forked_from": self.forked_from,
            "steps_saved": self.steps_saved,
        }

    def close(self) -> None:
        self.file.close()
        self.progress.close()

    def _tell_history(self) -> None:
        """Tells the tracker what a stage or an earlier process has measured; it knows what it has."""
        if self.paths.metrics.is_file():
            for line in self.paths.metrics.read_text("utf-8").splitlines():
                self._tell(json.loads(line))

    def _tell(self, line: Mapping[str, Any]) -> None:
        self.tracker.log(self.num_rows, line)
        self.num_rows += 1

    def _log(self, step: int, metrics: Mapping[str, float]) -> None:
        line = metrics_line(step, time.time(), metrics)
        self.file.write(line)
        self._tell(json.loads(line))


def metrics_line(step: int, time_s: float, metrics: Mapping[str, float | None]) -> str:
    """A line of metrics.jsonl; `time_s` is in Unix seconds."""
    # A loss that is not a number is not JSON, either: the line then says null.
    values = {name: _finite(value) for name, value in metrics.items()}
    return json.dumps({"step": step, "time": round(time_s, 3), **values}, allow_nan=False) + "\n"


def begin_trial(
    config: TrialConfig, paths: TrialPaths, info: Mapping[str, Any] | None, engine: str
) -> None:
    """Writes config.json, before anything can fail."""
    info = info or {"number": 0, "name": paths.root.name, "params": {}, "retry_of": None}
    write_json(paths.config, {"settings": config.to_dict(), "engine": engine, **info})


def end_with_fault(error: BaseException, paths: TrialPaths, tracker: Tracker | None) -> None:
    """Writes result.json and trial.log for a trial that a fault has ended.

    After Ctrl-C and on a full disk there is no result, so that the trial counts as unfinished.
    """
    if is_disk_full(error) or not isinstance(error, Exception):
        result = {"state": "interrupted"}
    else:
        reason = next(iter(str(error).strip().splitlines()), "") or type(error).__name__
        result = {"state": "failed", "reason": reason}
        write_text(paths.log, "".join(traceback.format_exception(error)))
        write_json(paths.result, result)
    if tracker is not None:
        tracker.finish(result)


def is_disk_full(error: BaseException) -> bool:
    return isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT)


def _forget_after(path: Path, step: int) -> None:
    """Drops the lines of a metrics.jsonl that are torn or belong to later steps."""
    kept = []
    for line in path.read_text("utf-8").splitlines() if path.is_file() else []:
        try:
            if json.loads(line)["step"] <= step:
                kept.append(line + "\n")
        except (ValueError, KeyError, TypeError):
            continue
    write_text(path, "".join(kept))


def _finite(value: float | None) -> float | None:
    return value if value is not None and math.isfinite(value) else None
