"""What each trial of a sweep measured over its steps, and which of those steps it trained itself.

`read_histories(sweep)` -> `History` by trial number. The metrics of a fork begin with the lines of the trial
that it was forked from: whoever draws or counts trials takes `own`, so that a shared step is there once.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from analysis.lines import EVAL, STEP, TIME, TRAIN, parse_metrics
from sweeps.ledger import SweepRecord, TrialRecord

_LONG_BREAK_S = 60.0


@dataclass(frozen=True)
class History:
    """A trial's metrics.jsonl as a table, a row a line; what a line does not say is NaN."""

    number: int
    name: str
    state: str
    table: np.ndarray
    """Columns as `analysis.lines.COLUMNS`."""
    saved: int = 0
    """Steps that another trial trained for it."""
    parent: int | None = None
    """Number of the trial that trained them; None if there are none, or it is not known."""
    best_step: int | None = None
    same_as: int | None = None

    @property
    def train(self) -> np.ndarray:
        return self.table[np.isfinite(self.table[:, TRAIN])]

    @property
    def evaluated(self) -> np.ndarray:
        return self.table[np.isfinite(self.table[:, EVAL])]

    @property
    def num_steps(self) -> int:
        return int(self.table[:, STEP].max()) if len(self.table) else 0

    def own(self, rows: np.ndarray) -> np.ndarray:
        """Those of the rows that the trial measured itself."""
        return rows[rows[:, STEP] > self.saved] if self.saved else rows

    def stints(self) -> list[tuple[float, float]]:
        """Begin and end, Unix seconds, of each time without a long break in which it was trained."""
        times = self.own(self.table)[:, TIME]
        times = np.sort(times[np.isfinite(times)])
        if not len(times):
            return []
        gaps = np.diff(times)
        usual = float(np.median(gaps)) if len(gaps) else 0.0
        breaks = np.flatnonzero(gaps > max(_LONG_BREAK_S, 20 * usual)) + 1
        # A line has the time at which its step ended; that of step 0 began the trial.
        lead = usual if self.saved else 0.0
        parts = np.split(times, breaks)
        return [
            (float(part[0]) - (usual if index else lead), float(part[-1]))
            for index, part in enumerate(parts)
        ]


def read_histories(sweep: SweepRecord | None) -> dict[int, History]:
    """Histories of all trials that count, further seeds among them; none of a CSV."""
    if sweep is None:
        return {}
    read = {record.number: _read(record) for record in sweep.trials}
    groups: dict[tuple[float, ...], list[History]] = {}
    for history in read.values():
        first = history.train[:1]
        if len(first) and np.isfinite(first[0, TIME]):
            # A fork has its leader's line of step 0, too; mates of a pack have written theirs apart.
            began = history.table[:1, TIME]
            key = (*began.tolist(), first[0, TIME], first[0, TRAIN])
            groups.setdefault(key, []).append(history)
    known = {record.number for record in sweep.trials if "steps_saved" in record.result}
    for group in groups.values():
        for history in group:
            if history.number not in known and len(group) > 1:
                read[history.number] = _inferred(history, group, known)
    return read


def _read(record: TrialRecord) -> History:
    result = record.result
    source = result.get("forked_from") or {}
    parent = str(source.get("trial", "")) if isinstance(source, Mapping) else ""
    same_as = result.get("same_as")
    return History(
        number=record.number,
        name=record.name,
        state=record.state,
        table=_table(record.paths.metrics),
        saved=result.get("steps_saved") or 0,
        parent=same_as if same_as is not None else int(parent) if parent.isdecimal() else None,
        best_step=result.get("best_step"),
        same_as=same_as,
    )


def _table(path: Path) -> np.ndarray:
    try:
        data = path.read_bytes()
    except OSError:
        return parse_metrics(b"")
    end = data.rfind(b"\n") + 1
    # A torn last line would send all others to the slow parser.
    parts = [parse_metrics(part) for part in (data[:end], data[end:]) if part]
    return np.concatenate(parts) if parts else parse_metrics(b"")


def _inferred(history: History, group: list[History], known: set[int]) -> History:
    """A trial without a result does not say what it took: the lines that another one trained are not its."""
    saved, parent = 0, None
    for other in group:
        if other.number == history.number:
            continue
        shared = _num_same(history.train, other.train)
        is_theirs = shared > other.saved and (
            other.number in known or other.number < history.number
        )
        if is_theirs and shared > saved:
            saved, parent = shared, other.number
    return replace(history, saved=saved, parent=parent)


def _num_same(a: np.ndarray, b: np.ndarray) -> int:
    """Last of the steps that both have with the same time and loss."""
    length = min(len(a), len(b))
    columns = [STEP, TIME, TRAIN]
    differ = np.flatnonzero((a[:length, columns] != b[:length, columns]).any(1))
    count = int(differ[0]) if len(differ) else length
    return int(a[count - 1, STEP]) if count else 0
