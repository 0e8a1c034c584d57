"""What a terminal shows while a trial trains: a moving line, or in a file one line an evaluation.

step 30/60  train 2.31  eval 2.74 (best)  2.4 s/step, 1.2 min left
"""

import time

from rich.console import Console
from rich.live import Live
from rich.text import Text


class Progress:
    """Progress of one trial.

    Args:
        num_steps: steps that the trial will train.
        console: where to print; by default standard output.
    """

    def __init__(self, num_steps: int, console: Console | None = None):
        self.num_steps = num_steps
        self.console = console or Console(highlight=False, soft_wrap=True)
        self.started = time.monotonic()
        self.train_loss = float("nan")
        self.live: Live | None = None
        if self.console.is_terminal:
            self.live = Live(Text(""), console=self.console, transient=True, refresh_per_second=4)
            self.live.start()

    def step(self, step: int, train_loss: float) -> None:
        self.train_loss = train_loss
        if self.live:
            self.live.update(Text(f"  {self._head(step)}{self._pace(step)}"))

    def evaluated(self, step: int, eval_loss: float, *, is_best: bool) -> None:
        mark = " (best)" if is_best else ""
        line = f"  {self._head(step)}  eval {eval_loss:.4f}{mark}{self._pace(step)}"
        self.console.print(Text(line))

    def close(self) -> None:
        if self.live:
            self.live.stop()

    def _head(self, step: int) -> str:
        return f"step {step}/{self.num_steps}  train {self.train_loss:.4f}"

    def _pace(self, step: int) -> str:
        # Evaluations are in it: the time left has them, too.
        pace_s = (time.monotonic() - self.started) / max(1, step)
        left_s = pace_s * (self.num_steps - step)
        left = f", {duration(left_s)} left" if step < self.num_steps else ""
        return f"  {pace_s:.2g} s/step{left}"


def duration(time_s: float) -> str:
    """`45 s`, or `12.5 min` from 90 seconds on, or `3.2 h` from 90 minutes on."""
    if time_s < 90:
        return f"{time_s:.0f} s"
    return f"{time_s / 60:.1f} min" if time_s < 5400 else f"{time_s / 3600:.1f} h"
