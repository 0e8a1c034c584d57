"""Sweep directories that are being written, read a little at a time: what the dashboard knows.

`Runs` lists the sweeps of a directory; a `LiveSweep` follows one. `refresh` looks at file times and reads
only what is new: whole lines that metrics.jsonl and pruning.jsonl have gained, records whose file is another
one. Versions grow with every change, so that a page need not be told the same thing twice. Reads only.
"""

import math
import os
import re
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from analysis.lines import (
    EVAL,
    STEP,
    GrowingFile,
    Metrics,
    is_locked,
    number_or_none,
    parse_lines,
    signature,
)
from analysis.readable import read_checked_trial
from sweeps.ledger import TrialRecord
from sweeps.requests import is_running
from training.exceptions import LoraloomError
from training.paths import SweepPaths, TrialPaths

SILENT_S = 120.0
"""After so long without a new line, a trial of a sweep that nobody runs counts as stopped."""
_TRIAL_NAME = re.compile(r"[0-9]{1,9}")


@dataclass
class LiveTrial:
    """One trial directory."""

    paths: TrialPaths
    metrics: Metrics
    lock: Path
    """Held by an agent while it trains the trial."""
    record: TrialRecord | None = None
    problem: str | None = None
    """Why there is no record, in one line."""
    is_abandoned: bool = False
    """It has no result, and nobody is at it any more."""
    version: int = 0
    """Grows with its metrics."""
    _stat: tuple[Any, ...] = ()

    @property
    def number(self) -> int:
        return self.record.number if self.record else int(self.paths.root.name)

    @property
    def state(self) -> str:
        if self.record is None:
            return "damaged"
        return "stopped" if self.is_abandoned else self.record.state

    @property
    def changed_s(self) -> float:
        times = [part[1] / 1e9 for part in self._stat if part]
        return max([*times, self.metrics.file.changed_s], default=0.0)

    @property
    def began_s(self) -> float:
        """When config.json was written."""
        return self._stat[0][1] / 1e9 if self._stat and self._stat[0] else math.inf

    @property
    def loss(self) -> float | None:
        """Of an ended trial its result's; of a running one the lowest so far. The base model has none."""
        if self.record and self.record.result:
            return number_or_none(self.record.loss)
        rows = self.metrics.series(EVAL)
        losses = rows[rows[:, STEP] > 0, EVAL]
        return float(losses.min()) if len(losses) else None

    @property
    def num_steps(self) -> int:
        done = number_or_none(self.record.result.get("num_steps")) if self.record else None
        steps = self.metrics.table[:, STEP]
        return int(done if done is not None else steps.max() if len(steps) else 0)

    @property
    def steps_saved(self) -> int | None:
        """Steps that it took from a stage or another trial; None while nobody has said."""
        if not self.record or not self.record.result:
            return None
        return int(number_or_none(self.record.result.get("steps_saved")) or 0)

    def refresh_record(self) -> bool:
        """Reads config.json and result.json if one of them is another file; False if not."""
        stat = (signature(self.paths.config), signature(self.paths.result))
        if stat == self._stat:
            return False
        self._stat = stat
        self.record, self.problem = None, None
        try:
            self.record = read_checked_trial(self.paths)
        except (LoraloomError, OSError) as error:
            self.problem = str(error)
        return True

    def refresh_state(self, *, is_running: bool) -> bool:
        """Sees whether somebody still trains it; False if nothing has changed."""
        before, is_open = self.is_abandoned, self.record is not None and not self.record.result
        is_silent = is_open and not is_running and time.time() - self.changed_s > SILENT_S
        self.is_abandoned = is_silent and not is_locked(self.lock)
        return before != self.is_abandoned


class LiveSweep:
    """One sweep directory, followed while pages look at it."""

    def __init__(self, paths: SweepPaths):
        self.paths = paths
        self.trials: dict[str, LiveTrial] = {}
        """By the name of the directory, in order."""
        self.decisions: list[dict[str, Any]] = []
        self.version = 0
        """Grows with every change."""
        self.records_version = 0
        """Grows when a trial begins or ends."""
        self.is_running = False
        """Whether a process runs the sweep."""
        self._decisions = GrowingFile(paths.decisions)
        self._lock = threading.Lock()
        self._catching_up: threading.Thread | None = None

    @property
    def name(self) -> str:
        return self.paths.root.name

    @property
    def changed_s(self) -> float:
        """Unix time of the last change."""
        own = [stat[1] / 1e9 for stat in [signature(self.paths.definition)] if stat]
        return max([*own, *(trial.changed_s for trial in list(self.trials.values()))], default=0.0)

    @property
    def counted(self) -> list[LiveTrial]:
        """Trials by number, without failed ones that another trial repeats."""
        trials = list(self.trials.values())
        repeated = {trial.record.retry_of for trial in trials if trial.record}
        kept = [trial for trial in trials if not trial.record or trial.number not in repeated]
        return sorted(kept, key=lambda trial: trial.number)

    def trial(self, number: int) -> LiveTrial | None:
        return next((t for t in list(self.trials.values()) if t.number == number), None)

    def refresh(self, budget_s: float = math.inf, *, with_metrics: bool = True) -> bool:
        """Reads what is new, for about `budget_s` seconds; False if something is left to read."""
        end = time.monotonic() + budget_s
        with self._lock:
            is_whole = self._refresh_records(end)
            if with_metrics:
                is_whole = self._refresh_metrics(end) and is_whole
            return is_whole

    def follow(self, budget_s: float, *, with_metrics: bool = True) -> bool:
        """`refresh`, which goes on in the background with what is left."""
        if self.refresh(budget_s, with_metrics=with_metrics):
            return True
        if self._catching_up is None or not self._catching_up.is_alive():
            self._catching_up = threading.Thread(
                target=self._catch_up, args=(with_metrics,), daemon=True
            )
            self._catching_up.start()
        return False

    def _catch_up(self, with_metrics: bool) -> None:
        while not self.refresh(0.05, with_metrics=with_metrics):
            time.sleep(0.005)  # a page that waits for the lock comes first

    def _refresh_records(self, end: float) -> bool:
        names = _trial_names(self.paths.trials)
        self.is_running = is_running(self.paths)
        changed = [self.trials.pop(name) for name in set(self.trials) - set(names)] != []
        for name in names:
            if name not in self.trials:
                if time.monotonic() > end:
                    break
                paths = TrialPaths(self.paths.trials / name)
                if not paths.config.is_file():
                    continue  # begins in a moment
                lock = self.paths.trial_lock(int(name))
                self.trials[name] = LiveTrial(paths, Metrics(GrowingFile(paths.metrics)), lock)
            changed |= self.trials[name].refresh_record()
            changed |= self.trials[name].refresh_state(is_running=self.is_running)
        else:
            if changed:
                self._grow(records=True)
            return True
        self._grow(records=True)
        return False

    def _refresh_metrics(self, end: float) -> bool:
        for trial in self.trials.values():
            if time.monotonic() > end:
                return False
            if trial.metrics.refresh():
                trial.version += 1
                self._grow()
        if self._decisions.has_changed():
            data, is_anew = self._decisions.read()
            found = [record for record in parse_lines(data) if _is_decision(record)]
            self.decisions = found if is_anew else self.decisions + found
            self._grow()
        return True

    def _grow(self, *, records: bool = False) -> None:
        self.version += 1
        self.records_version += records


class Runs:
    """A directory of sweeps, or one sweep's own directory."""

    def __init__(self, root: Path):
        self.root = root.resolve()
        self._sweeps: dict[str, LiveSweep] = {}
        self._lock = threading.Lock()

    def sweeps(self) -> list[LiveSweep]:
        """Sweeps by name; those that are gone are forgotten."""
        found = {path.name: path for path in self._directories()}
        with self._lock:
            for name in set(self._sweeps) - set(found):
                del self._sweeps[name]
            for name, path in found.items():
                if name not in self._sweeps:
                    self._sweeps[name] = LiveSweep(SweepPaths(path))
            return [self._sweeps[name] for name in sorted(found)]

    def sweep(self, name: str) -> LiveSweep | None:
        """The listed sweep of that name: a text from outside never becomes a path."""
        return next((sweep for sweep in self.sweeps() if sweep.name == name), None)

    def _directories(self) -> list[Path]:
        if SweepPaths(self.root).definition.is_file():
            return [self.root]
        try:
            paths = [Path(entry.path) for entry in os.scandir(self.root) if entry.is_dir()]
        except OSError:  # deleted while the page is open
            return []
        return [
            path
            for path in paths
            if not path.name.startswith(".") and SweepPaths(path).definition.is_file()
        ]


def _is_decision(record: dict[str, Any]) -> bool:
    return all(number_or_none(record.get(name)) is not None for name in ("trial", "step"))


def _trial_names(directory: Path) -> list[str]:
    try:
        return sorted(name for name in os.listdir(directory) if _TRIAL_NAME.fullmatch(name))
    except OSError:
        return []
