"""What a terminal shows while trials train: a table, a row a trial; in a file, one line an evaluation.

slot  trial     step  done       train  eval         rung  s/step      left
   1  trial 3  30/60  ====----  2.3100  2.7400 best     1     2.4   1.2 min

Engines tell a `Progress` what its trial does, at every step, so telling is cheap; the table is drawn from
what the trials know by a thread of its own, a few times a second.
"""

import time
from collections.abc import Callable
from typing import Self

from rich.cells import cell_len, set_cell_size
from rich.console import Console, ConsoleOptions, RenderResult
from rich.live import Live
from rich.text import Text

_DROPPED_FIRST = ("done", "rung", "slot", "s/step", "left", "train")
"""Columns that a narrow terminal goes without, the least needed one first."""
_WIDTHS = {"train": 6, "eval": len("2.7400 best"), "s/step": 6, "left": len("12.5 min")}
"""Of texts that come and go: with less, columns would jump or be dropped and come back."""
_LEFT_ALIGNED = ("trial", "done", "eval")
_LONGEST_LABEL = 24
_BAR_WIDTH = 8
_GAP = "  "
_NUM_OTHER_LINES = 5
"""That the table needs besides its rows: header, number of rows left out, footer, cursor."""


class Display:
    """The trials that train at the moment; use it as a context, within another use of it, too.

    Args:
        console: where to print; by default standard output.
    """

    def __init__(self, console: Console | None = None):
        self.console = console or Console(highlight=False, soft_wrap=True, markup=False)
        self.trials: list[Progress] = []
        self.num_steps = 0
        """Steps of all trials so far."""
        self.footer: Callable[[], str] = lambda: ""
        """Text of the line below the table; called by the thread that trains, at most once a second."""
        self.live: Live | None = None
        """The table, while it is shown; a file has none, nor has a terminal that cannot go back a line."""
        self._num_entered = 0
        self._footer_text = ""
        self._footer_due = 0.0

    def __enter__(self) -> Self:
        if self._num_entered == 0 and self.console.is_interactive:
            self.live = Live(self, console=self.console, transient=True, refresh_per_second=4)
            self.live.start()
        self._num_entered += 1
        return self

    def __exit__(self, *error: object) -> None:
        self._num_entered -= 1
        if self._num_entered == 0 and self.live:
            self.live.stop()
            self.live = None

    def add(self, label: str, num_steps: int) -> "Progress":
        """A trial that begins; `label` is its name in the table and stands before its lines."""
        taken = {trial.slot for trial in self.trials}
        slot = next(number for number in range(1, len(taken) + 2) if number not in taken)
        trial = Progress(self, label, num_steps, slot)
        self.trials.append(trial)
        return trial

    def update(self) -> None:
        """A trial has told something; cheap, for the table is drawn elsewhere."""
        # The footer may ask a study, which is not for the thread that draws.
        if self.live and time.monotonic() >= self._footer_due:
            self._footer_text = self.footer()
            self._footer_due = time.monotonic() + 1

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        # `sorted` takes a copy: the thread that trains adds and removes trials meanwhile.
        trials = sorted(self.trials, key=lambda trial: trial.slot)
        shown = trials[: max(1, options.max_height - _NUM_OTHER_LINES)]
        if shown:
            yield _table(shown, options.max_width)
        if len(shown) < len(trials):
            yield Text(f"and {len(trials) - len(shown)} more")
        if self._footer_text:
            # Set here, because a console that leaves long lines alone would have it cut off.
            yield Text(self._footer_text, style="dim", no_wrap=False, overflow="fold")


class Progress:
    """Progress of one trial; made by `Display.add`."""

    def __init__(self, display: Display, label: str, num_steps: int, slot: int):
        self.display, self.label, self.num_steps, self.slot = display, label, num_steps, slot
        self.started = self.told = time.monotonic()
        self.first_step = self.num_done = self.num_evals = 0
        self.train_loss = float("nan")
        self.eval_loss: float | None = None
        self.is_best = False

    def resumed(self, step: int, train_loss: float) -> None:
        """The trial goes on after `step`, which an earlier process or another trial trained."""
        self.first_step = self.num_done = step
        self.train_loss = train_loss

    def step(self, step: int, train_loss: float) -> None:
        self.num_done, self.train_loss = step, train_loss
        self.told = time.monotonic()
        self.display.num_steps += 1
        self.display.update()

    def evaluated(self, step: int, eval_loss: float, *, is_best: bool) -> None:
        self.num_evals += 1
        self.eval_loss, self.is_best = eval_loss, is_best
        self.told = time.monotonic()
        if self.display.live is None:
            # As Text, none of it is read as markup; soft, a long one stays one line.
            self.display.console.print(Text(self._line()), soft_wrap=True)
        self.display.update()

    def close(self) -> None:
        # Without `update`: a trial is closed after a fault of the study, too, which the footer would meet.
        self.display.trials.remove(self)

    def cells(self) -> dict[str, str]:
        """The trial's row of the table, by column."""
        total = str(self.num_steps)
        num_filled = _BAR_WIDTH * self.num_done // max(1, self.num_steps)
        mark = " best" if self.is_best else ""
        has_pace = self.num_done > self.first_step
        return {
            "slot": str(self.slot),
            "trial": _shortened(self.label),
            "step": f"{self.num_done:>{len(total)}}/{total}",
            "done": ("=" * num_filled).ljust(_BAR_WIDTH, "-"),
            "train": f"{self.train_loss:.4f}" if has_pace else "",
            "eval": "" if self.eval_loss is None else f"{self.eval_loss:6.4f}{mark}",
            "rung": str(self.num_evals),
            "s/step": _number(self._pace_s()) if has_pace else "",
            "left": duration(self._left_s()) if has_pace else "",
        }

    def _line(self) -> str:
        label = f"{self.label}  " if self.label else ""
        mark = " (best)" if self.is_best else ""
        left = f", {duration(self._left_s())} left" if self.num_done < self.num_steps else ""
        return (
            f"  {label}step {self.num_done}/{self.num_steps}  train {self.train_loss:.4f}"
            f"  eval {self.eval_loss:.4f}{mark}  {_number(self._pace_s())} s/step{left}"
        )

    def _pace_s(self) -> float:
        # Up to what was told last, or it would rise and fall with every step. Evaluations are in it:
        # the time left has them, too.
        return (self.told - self.started) / max(1, self.num_done - self.first_step)

    def _left_s(self) -> float:
        return self._pace_s() * (self.num_steps - self.num_done)


def duration(time_s: float) -> str:
    """`45 s`, or `12.5 min` from 90 seconds on, or `3.2 h` from 90 minutes on."""
    if time_s < 90:
        return f"{time_s:.0f} s"
    return f"{time_s / 60:.1f} min" if time_s < 5400 else f"{time_s / 3600:.1f} h"


def _number(value: float) -> str:
    """Two digits, and no exponent where there are more."""
    return f"{value:.2g}" if value < 10 else f"{value:.0f}"


def _shortened(label: str) -> str:
    label = " ".join(label.split())  # a line break would break the table
    fits = cell_len(label) <= _LONGEST_LABEL
    return label if fits else set_cell_size(label, _LONGEST_LABEL - 3) + "..."


def _table(trials: list[Progress], max_width: int) -> Text:
    # As one text: rich's Table takes 6 ms of the trainer's core for eight trials, this 0.3.
    rows = [trial.cells() for trial in trials]
    widths = {
        name: max(len(name), _WIDTHS.get(name, 0), *(cell_len(row[name]) for row in rows))
        for name in rows[0]
    }
    for name in _DROPPED_FIRST:
        if sum(widths.values()) + len(_GAP) * (len(widths) - 1) <= max_width:
            break
        del widths[name]
    header, *lines = (
        _GAP.join(
            set_cell_size(row[name], width) if name in _LEFT_ALIGNED else row[name].rjust(width)
            for name, width in widths.items()
        )
        for row in ({name: name for name in widths}, *rows)
    )
    table = Text(no_wrap=True, overflow="crop")
    return table.append(header, "bold").append("".join("\n" + line for line in lines))
