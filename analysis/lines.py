"""Files of lines that a sweep appends to, read a little at a time: metrics as numbers, and JSON objects.

Only whole lines that are new are read. What is no record of ours is left out: a file may say anything.
"""

import fcntl
import io
import json
import math
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.json

from sweeps.ledger import METRIC

COLUMNS = ("step", "time", "train/loss", METRIC, "learning_rate", "grad_norm")
"""Of a table of metrics, a row a line; what a line does not say is NaN."""
STEP, TIME, TRAIN, EVAL, RATE, NORM = range(len(COLUMNS))

_EMPTY = np.empty((0, len(COLUMNS)))
_BULK = 1 << 16
"""From so many bytes on Arrow is the faster parser."""
_SCHEMA = pa.schema([(name, pa.float64()) for name in COLUMNS])
_NUM_CHECKED = 64


@dataclass
class GrowingFile:
    """A file of lines that others append to."""

    path: Path
    offset: int = 0
    """Bytes read; always the end of a whole line."""
    _stat: tuple[int, ...] = ()
    _last: bytes = b""

    def has_changed(self) -> bool:
        """Whether `read` would look into the file: one `stat`, nothing else."""
        return signature(self.path) != self._stat

    @property
    def changed_s(self) -> float:
        """When the file was last written, as far as it was read; 0 if it is not there."""
        return self._stat[1] / 1e9 if self._stat else 0.0

    def read(self) -> tuple[bytes, bool]:
        """New whole lines, and whether they are all there is: then what was read before is void."""
        before, self._stat = self._stat, signature(self.path)
        if not self._stat:
            is_anew, self.offset, self._last = self.offset > 0, 0, b""
            return b"", is_anew
        try:
            with open(self.path, "rb") as file:
                is_anew = self.offset > 0 and not self._continues(file, before)
                if is_anew:
                    self.offset, self._last = 0, b""
                file.seek(self.offset)
                data = file.read()
        except OSError:  # gone, or not to be read, since it was looked at
            return b"", False
        whole = data[: data.rfind(b"\n") + 1]  # a torn last line waits for its rest
        self.offset += len(whole)
        self._last = (self._last + whole)[-_NUM_CHECKED:]
        return whole, is_anew

    def _continues(self, file: io.BufferedReader, before: tuple[int, ...]) -> bool:
        """Whether what was read still stands there: a resumed trial has another, shorter file."""
        if self._stat[0] != before[0] or self._stat[2] < self.offset:
            return False
        file.seek(self.offset - len(self._last))
        return file.read(len(self._last)) == self._last


@dataclass
class Metrics:
    """Numbers of a metrics.jsonl."""

    file: GrowingFile
    table: np.ndarray = field(default_factory=lambda: _EMPTY)
    """Never changed in place: who holds one may go on reading."""
    _series: dict[int, np.ndarray] = field(default_factory=dict)

    def refresh(self) -> bool:
        """Reads what is new; False if nothing is."""
        if not self.file.has_changed():
            return False
        data, is_anew = self.file.read()
        rows = parse_metrics(data)
        if not is_anew and not len(rows):
            return False
        self.table = rows if is_anew else np.concatenate([self.table, rows])
        self._series = {}
        return True

    def series(self, column: int) -> np.ndarray:
        """Rows where `column` is a finite number."""
        kept = self._series
        if column not in kept:
            table = self.table
            kept[column] = table[np.isfinite(table[:, column])]
        return kept[column]


def parse_metrics(data: bytes) -> np.ndarray:
    """Whole lines of a metrics.jsonl -> a table; lines that are no records of a step are left out."""
    table = _parse_bulk(data) if len(data) >= _BULK else None
    if table is None:
        rows = [
            [number_or_nan(record.get(name)) for name in COLUMNS] for record in parse_lines(data)
        ]
        table = np.array(rows) if rows else _EMPTY
    return table[np.isfinite(table[:, STEP])]


def parse_lines(data: bytes) -> list[dict[str, Any]]:
    """JSON objects, one a line; other lines are left out."""
    records = []
    for line in data.splitlines():
        try:
            record = json.loads(line)
        except (ValueError, RecursionError):
            continue
        if isinstance(record, dict):
            records.append(record)
    return records


def number_or_none(value: Any) -> float | None:
    """A finite number, or None: a file may say anything."""
    number = number_or_nan(value)
    return number if math.isfinite(number) else None


def number_or_nan(value: Any) -> float:
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    try:
        return float(value) if is_number else math.nan
    except OverflowError:
        return math.nan


def signature(path: Path) -> tuple[int, ...]:
    """Which file it is and when it was written; empty if it is not there."""
    try:
        stat = os.stat(path)
    except OSError:
        return ()
    return stat.st_ino, stat.st_mtime_ns, stat.st_size


def file_end(path: Path, num_bytes: int) -> str:
    """The last bytes of a text file; empty if it is not there."""
    try:
        with open(path, "rb") as file:
            file.seek(0, 2)
            file.seek(max(0, file.tell() - num_bytes))
            return file.read().decode("utf-8", "replace")
    except OSError:
        return ""


def is_locked(path: Path) -> bool:
    """Whether a process holds the lock file."""
    try:
        with open(path, encoding="utf-8") as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:  # there is none
        return False
    return False


def _parse_bulk(data: bytes) -> np.ndarray | None:
    """None where a line is not as we write them, so that each has to be looked at."""
    try:
        table = pyarrow.json.read_json(
            io.BytesIO(data),
            # Training goes on beside this: one thread is enough.
            pyarrow.json.ReadOptions(use_threads=False, block_size=1 << 22),
            pyarrow.json.ParseOptions(explicit_schema=_SCHEMA, unexpected_field_behavior="ignore"),
        )
    except pa.ArrowInvalid:
        return None
    columns = [table.column(name).to_numpy() for name in COLUMNS]
    return np.column_stack(columns)
