"""Everything that a trial leaves behind while it trains: metrics, evaluations, the best adapter, the result.

An engine calls `log_step` after each step and `log_eval` with each evaluation; the recorder writes the
trial's files, tells the tracker and the terminal, and knows which step is the best.
"""

import json
import math
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pandas as pd

from training.evaluate import mean_loss
from training.paths import TrialPaths, write_atomic, write_directory
from training.progress import Progress
from training.tracking import Tracker


class TrialRecorder:
    """Records one trial; `result()` is its `result.json`.

    Args:
        paths: the trial's files.
        tracker: is told every metric.
        progress: the terminal's view.
        base_losses: per-example validation losses of the base model, step 0.
    """

    def __init__(
        self, paths: TrialPaths, tracker: Tracker, progress: Progress, base_losses: pd.DataFrame
    ):
        self.paths, self.tracker, self.progress = paths, tracker, progress
        self.started = time.monotonic()
        self.num_steps = 0
        self.tokens = 0
        self.train_loss: float | None = None
        self.base_loss = mean_loss(base_losses)
        self.last_loss: float | None = None
        self.best_step: int | None = None
        self.best_loss = math.inf
        paths.root.mkdir(parents=True, exist_ok=True)
        self.file = open(paths.metrics, "a", encoding="utf-8", buffering=1)  # noqa: SIM115
        write_atomic(paths.eval_losses(0), base_losses.to_parquet)
        self._log(0, {"eval/loss": self.base_loss})

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
            step_time_s: seconds that the step took.
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
        self.last_loss = loss
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
            "train_time_s": round(time.monotonic() - self.started, 3),
            "tokens": self.tokens,
            "forked_from": None,
            "steps_saved": 0,
        }

    def close(self) -> None:
        self.file.close()
        self.progress.close()

    def _log(self, step: int, metrics: Mapping[str, float]) -> None:
        # A loss that is not a number is not JSON, either: the line then says null.
        values = {name: _finite(value) for name, value in metrics.items()}
        line = {"step": step, "time": round(time.time(), 3), **values}
        self.file.write(json.dumps(line, allow_nan=False) + "\n")
        self.tracker.log(step, metrics)


def _finite(value: float | None) -> float | None:
    return value if value is not None and math.isfinite(value) else None
