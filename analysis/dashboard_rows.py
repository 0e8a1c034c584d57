"""Trials as rows: their order, the settings that vary, numbers as text, and the table as CSV.

`dashboard_views` puts these texts into the page.
"""

import csv
import io
import math
import time
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from analysis.dashboard_statistics import Statistics
from analysis.findings import interval_text, value_text
from analysis.lines import TIME, number_or_none
from analysis.live import LiveSweep, LiveTrial

NUM_LEADERS = 10
"""Trials whose curves are shown while nobody has chosen others."""


def ranked(trials: Sequence[LiveTrial]) -> list[LiveTrial]:
    """The lowest loss first, those without one last."""
    return sorted(trials, key=lambda t: (t.loss is None, t.loss or 0.0, t.number))


def shown_trials(
    trials: Sequence[LiveTrial], chosen: Iterable[int], *, everyone: bool
) -> list[LiveTrial]:
    """Trials whose curves are drawn: all, the chosen ones, or what trains now and the leaders."""
    if everyone:
        return list(trials)
    wanted = set(chosen)
    if wanted:
        return [trial for trial in trials if trial.number in wanted]
    running = [t for t in trials if t.state == "running" and len(t.metrics.table)]
    leaders = running[: NUM_LEADERS // 2] + ranked(trials)
    first = list(dict.fromkeys(trial.number for trial in leaders))[:NUM_LEADERS]
    return [trial for trial in trials if trial.number in first]


def varied(trials: Sequence[LiveTrial]) -> list[str]:
    """Settings in which the trials differ."""
    params = [trial.record.params for trial in trials if trial.record]
    names = list(dict.fromkeys(name for each in params for name in each))
    return [name for name in names if len({repr(p.get(name)) for p in params}) > 1] or names


def trials_csv(sweep: LiveSweep, statistics: Statistics) -> str:
    """The leaderboard as CSV, ranked."""
    trials = sweep.counted
    settings = varied(trials)
    file = io.StringIO()
    writer = csv.writer(file, lineterminator="\n")
    writer.writerow(
        ["trial", "name", *settings, "state", "num_steps", "eval/loss", "difference", "low_95",
         "high_95", "minutes"]
    )  # fmt: skip
    for trial in ranked(trials):
        interval = statistics.intervals.get(trial.number)
        ends = (interval.estimate, interval.low, interval.high) if interval else ("", "", "")
        params = trial.record.params if trial.record else {}
        name = trial.record.name if trial.record else ""
        cells = [
            trial.number, name, *(params.get(setting, "") for setting in settings), trial.state,
            trial.num_steps, trial.loss, *ends, minutes(trial),
        ]  # fmt: skip
        writer.writerow([_cell(cell) for cell in cells])
    return file.getvalue()


def minutes(trial: LiveTrial) -> float | None:
    """Training time; of a running trial, how long it has been at it."""
    if trial.record and trial.record.result:
        time_s = number_or_none(trial.record.result.get("train_time_s"))
        return None if time_s is None else time_s / 60
    times = trial.metrics.series(TIME)[:, TIME]
    return float(times.max() - times.min()) / 60 if len(times) else None


def label(trial: LiveTrial) -> str:
    return f"{trial.number} {trial.record.name if trial.record else 'damaged'}"


def reason(trial: LiveTrial) -> str:
    if trial.problem:
        return trial.problem
    return text_form(trial.record.result.get("reason")) if trial.record else ""


def origin(trial: LiveTrial) -> str:
    """Whose steps the first ones are."""
    result = trial.record.result if trial.record else {}
    forked, copied = result.get("forked_from"), number_or_none(result.get("same_as"))
    if copied is not None:
        return f"trial {int(copied)}, which is the same"
    name = forked.get("trial") if isinstance(forked, Mapping) else None
    return f"trial {name}" if name is not None else "another trial"


def max_steps_text(trial: LiveTrial) -> str:
    steps = number_or_none(trial.record.settings.get("max_steps")) if trial.record else None
    return "?" if steps is None else f"{int(steps):,}"


def loss_text(trial: LiveTrial) -> str:
    if trial.loss is None:
        return ""
    return f"{trial.loss:.4f}" + (" so far" if trial.state in ("running", "stopped") else "")


def difference_text(trial: LiveTrial, trials: Sequence[LiveTrial], statistics: Statistics) -> str:
    if trial.number == statistics.best:
        return "best"
    interval = statistics.intervals.get(trial.number)
    if interval is not None:
        return interval_text(interval)
    best = next((t.loss for t in trials if t.number == statistics.best), None)
    if best is None or trial.loss is None:
        return ""
    return f"{trial.loss - best:+.4f}"


def number_text(value: float | None, form: str) -> str:
    return "" if value is None else format(value, form)


def value_form(value: Any) -> str:
    """A setting or a result as text."""
    if value is None:
        return ""
    if isinstance(value, Mapping):
        return ", ".join(f"{key} {value_form(item)}" for key, item in value.items())
    if isinstance(value, float) and math.isfinite(value):
        return value_text(value) if abs(value) < 0.01 else f"{value:.6g}"
    return value_text(value)


def text_form(value: Any) -> str:
    return "" if value is None else str(value)


def clock(time_s: float) -> str:
    """Local time; the date, too, if it is not today's."""
    if not 0 < time_s < 1e11:
        return ""
    local, now = time.localtime(time_s), time.localtime()
    form = "%H:%M:%S" if local[:3] == now[:3] else "%Y-%m-%d %H:%M"
    return time.strftime(form, local)


def _cell(value: Any) -> Any:
    # A spreadsheet runs a text that begins so as a formula.
    is_formula = isinstance(value, str) and value.startswith(("=", "+", "-", "@", "\t"))
    return f"'{value}" if is_formula else value
