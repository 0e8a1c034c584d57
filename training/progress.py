"""What a terminal shows while trials train: a moving line a trial, or in a file one line an evaluation.

trial 3  step 30/60  train 2.31  eval 2.74 (best)  2.4 s/step, 1.2 min left
"""

import time
from typing import Self

from rich.console import Console
from rich.live import Live
from rich.text import Text


class Display:
    """The trials that train at the moment; use it as a context.

    Args:
        console: where to print; by default standard output.
    """

    def __init__(self, console: Console | None = None):
        self.console = console or Console(highlight=False, soft_wrap=True, markup=False)
        self.trials: list[Progress] = []
        self.num_steps = 0
        """Steps of all trials so far."""
        self.started = time.monotonic()
        self.live: Live | None = None

    def __enter__(self) -> Self:
        if self.console.is_terminal:
            self.live = Live(Text(""), console=self.console, transient=True, refresh_per_second=4)
            self.live.start()
        return self

    def __exit__(self, *error: object) -> None:
        if self.live:
            self.live.stop()

    def add(self, label: str, num_steps: int) -> "Progress":
        """A trial that begins; `label` stands before its lines."""
        trial = Progress(self, label, num_steps)
        self.trials.append(trial)
        return trial

    def update(self) -> None:
        if self.live:
            self.live.update(Text("\n".join(trial.line() for trial in self.trials)))


class Progress:
    """Progress of one trial; made by `Display.add`."""

    def __init__(self, display: Display, label: str, num_steps: int):
        self.display, self.label, self.num_steps = display, label, num_steps
        self.started = time.monotonic()
        self.first_step = self.num_done = 0
        self.train_loss = float("nan")

    def resumed(self, step: int) -> None:
        """The trial goes on after `step`, which an earlier process trained."""
        self.first_step = self.num_done = step

    def step(self, step: int, train_loss: float) -> None:
        self.num_done, self.train_loss = step, train_loss
        self.display.num_steps += 1
        self.display.update()

    def evaluated(self, step: int, eval_loss: float, *, is_best: bool) -> None:
        mark = " (best)" if is_best else ""
        self.display.console.print(f"{self._head()}  eval {eval_loss:.4f}{mark}{self._pace()}")

    def close(self) -> None:
        self.display.trials.remove(self)
        self.display.update()

    def line(self) -> str:
        return self._head() + self._pace()

    def _head(self) -> str:
        label = f"{self.label}  " if self.label else ""
        return f"  {label}step {self.num_done}/{self.num_steps}  train {self.train_loss:.4f}"

    def _pace(self) -> str:
        # Evaluations are in it: the time left has them, too.
        pace_s = (time.monotonic() - self.started) / max(1, self.num_done - self.first_step)
        left_s = pace_s * (self.num_steps - self.num_done)
        left = f", {duration(left_s)} left" if self.num_done < self.num_steps else ""
        return f"  {pace_s:.2g} s/step{left}"


def duration(time_s: float) -> str:
    """`45 s`, or `12.5 min` from 90 seconds on, or `3.2 h` from 90 minutes on."""
    if time_s < 90:
        return f"{time_s:.0f} s"
    return f"{time_s / 60:.1f} min" if time_s < 5400 else f"{time_s / 3600:.1f} h"
