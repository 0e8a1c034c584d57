"""Intervals and findings of a sweep for the dashboard, computed beside it in a process of low priority.

They take seconds where there are many trials, and are done again when a trial ends; until then a page shows
those of before. In a thread they would hold up every answer. At most a tenth of the time goes into them.
"""

import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from analysis.findings import compare, find
from analysis.history import read_histories
from analysis.live import LiveSweep
from analysis.outlook import may_be_best
from analysis.readable import load_readable
from analysis.run_figures import run_figures
from analysis.slice_figures import slice_figures
from analysis.stats import Interval
from training.exceptions import LoraloomError

FIGURES = {
    "slices": "Loss by each setting. Bars, where there are losses of examples: the 95 % interval of each "
    "trial's own loss. They are not of differences: trials whose bars overlap may well differ.",
    "contour": "Two settings together; points are trials, of several at one place the lowest",
    "stage_tree": "Which steps were trained once for several trials",
}
_REST = 9
"""Times as long as the last computation took, nothing new is begun."""
_GAP_S = 1.0
_NICENESS = 10


@dataclass(frozen=True)
class Statistics:
    """What is known; replaced as a whole."""

    version: int = 0
    best: int | None = None
    """Number of the best trial."""
    intervals: Mapping[int, Interval] = field(default_factory=dict)
    """Loss minus the best one's, by the trial's number."""
    tied: tuple[int, ...] = ()
    """Numbers of the trials that may be the best one, the best first; empty while that is not known."""
    findings: tuple[str, ...] = ()
    caveats: tuple[str, ...] = ()
    figures: Mapping[str, Any] = field(default_factory=dict)
    """The report's figures that a page has no live ones for, as JSON, by name."""
    figures_version: int = 0
    """`version` that brought them."""
    left_out: tuple[str, ...] = ()
    """A line for each trial that has a damaged file and is not in all this."""
    problem: str | None = None
    """Why there are no findings."""


class StatisticsWorker:
    """Statistics of one sweep."""

    def __init__(self, sweep: LiveSweep):
        self.sweep = sweep
        self.known = Statistics()
        self._computed = -1
        """The sweep's `records_version` that they are of."""
        self._not_before = 0.0
        self._thread: threading.Thread | None = None
        self._lock = threading.Lock()

    def current(self) -> Statistics:
        """What is known now; begins to compute what is missing."""
        with self._lock:
            is_idle = self._thread is None or not self._thread.is_alive()
            is_due = time.monotonic() >= self._not_before
            if is_idle and is_due and self.sweep.records_version != self._computed:
                self._thread = threading.Thread(target=self._compute, daemon=True)
                self._thread.start()
        return self.known

    def complete(self, wait_s: float = 60.0) -> Statistics:
        """Those of now, waited for."""
        self.current()
        if self._thread is not None:
            self._thread.join(wait_s)
        return self.known

    def _compute(self) -> None:
        begin, self._computed = time.monotonic(), self.sweep.records_version
        command = [
            sys.executable,
            "-m",
            "analysis.dashboard_statistics",
            str(self.sweep.paths.root),
        ]
        with subprocess.Popen(
            command,
            cwd=Path(__file__).parents[1],
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        ) as process:
            last = None
            for line in process.stdout or ():
                last = _decoded(line)
                if not self.known.findings:  # else those of before stay until all is there
                    self._publish(last)
            if last is not None and not process.wait():
                self._publish(last)
        if process.returncode:
            problem = "they could not be computed from these files"
            self.known = replace(self.known, version=self.known.version + 1, problem=problem)
        self._not_before = time.monotonic() + _GAP_S + _REST * (time.monotonic() - begin)

    def _publish(self, known: Statistics) -> None:
        version = self.known.version + 1
        same = known.figures == self.known.figures
        figures_version = self.known.figures_version if same else version
        self.known = replace(known, version=version, figures_version=figures_version)


def compute(root: Path) -> Iterator[Statistics]:
    """What is known after each part of the work."""
    try:
        results, left_out = load_readable(root)
    except LoraloomError as error:
        yield Statistics(problem=str(error))
        return
    known = Statistics(left_out=tuple(left_out))
    if not results.scored:
        yield replace(
            known, problem=f"{root}: no trial has finished, so there is nothing to report on"
        )
        return
    best = results.best
    known = replace(known, best=best.number)
    yield known
    intervals = {}
    for trial in results.ranked:
        if trial is not best and trial.same_as != best.number:
            interval = compare(trial, best)
            if interval is not None:
                intervals[trial.number] = interval
    known = replace(known, intervals=intervals)
    yield known
    found = find(results)
    known = replace(known, findings=tuple(found.summary), caveats=tuple(found.caveats))
    yield known
    tied = may_be_best(results, found.table) or ()
    known = replace(known, tied=tuple(trial.number for trial in tied))
    yield known
    figures = slice_figures(results, found)
    figures |= run_figures(results, read_histories(results.sweep))
    drawn = {name: json.loads(figures[name].to_json() or "") for name in FIGURES if name in figures}
    yield replace(known, figures=drawn)


def _encoded(statistics: Statistics) -> str:
    return json.dumps(asdict(statistics))


def _decoded(line: str) -> Statistics:
    values: dict[str, Any] = json.loads(line)
    intervals = {int(key): Interval(**value) for key, value in values["intervals"].items()}
    texts = {name: tuple(values[name]) for name in ("tied", "findings", "caveats", "left_out")}
    return Statistics(**{**values, "intervals": intervals, **texts})


def main() -> None:
    if hasattr(os, "nice"):
        os.nice(_NICENESS)
    for statistics in compute(Path(sys.argv[1])):
        print(_encoded(statistics), flush=True)


if __name__ == "__main__":
    main()
