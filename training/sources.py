"""Where examples come from: a hub id, a local JSON/JSONL/CSV/Parquet file, or the built-in demo set.

`iter_records(config)` gives each record with the place it stands at, for an error's sake.
"""

import csv
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from training.config import DEMO, TrialConfig
from training.demo_data import demo_records
from training.exceptions import DataError

SUFFIXES = (".jsonl", ".json", ".csv", ".parquet")

Record = tuple[str, Mapping[str, Any]]


def iter_records(config: TrialConfig) -> Iterator[Record]:
    """`(where, record)` of every record, in the source's order.

    Raises:
        DataError: the dataset is missing or cannot be read, with the line where there is one.
    """
    name = config.dataset_name
    if name == DEMO:
        return ((f"demo set: record {n}", record) for n, record in enumerate(demo_records(), 1))
    path = local_file(config)
    if path is None:
        return _read_hub(name, config.dataset_train_split)
    readers = {".jsonl": _read_jsonl, ".json": _read_json, ".csv": _read_csv}
    return readers.get(path.suffix, _read_parquet)(path)


def local_file(config: TrialConfig) -> Path | None:
    """The file that `dataset_name` names; None if it is a hub id or the demo set."""
    name = config.dataset_name
    path = Path(name).expanduser()
    looks_local = path.suffix in SUFFIXES or name.startswith((".", "/", "~")) or path.exists()
    if name == DEMO or not looks_local:
        return None
    if not path.exists():
        raise DataError(f"dataset_name is {name}, but there is no such file")
    if not path.is_file() or path.suffix not in SUFFIXES:
        raise DataError(f"dataset_name is {name}, but must be a file ending in {_or(SUFFIXES)}")
    return path


def _read_jsonl(path: Path) -> Iterator[Record]:
    with open(path, "rb") as file:
        for number, line in enumerate(file, 1):
            if line.strip():
                where = f"{path}: line {number}"
                yield where, _record(_parse_json(line, where), where)


def _read_json(path: Path) -> Iterator[Record]:
    """A JSON array of records; a file that begins with `{` holds one record a line."""
    content = path.read_bytes()
    if content.lstrip()[:1] == b"{":
        yield from _read_jsonl(path)
        return
    records = _parse_json(content, str(path)) if content.strip() else []
    if not isinstance(records, list):
        raise DataError(f"{path} holds {type(records).__name__}, but must be a list of records")
    for number, record in enumerate(records, 1):
        where = f"{path}: record {number}"
        yield where, _record(record, where)


def _read_csv(path: Path) -> Iterator[Record]:
    with open(path, encoding="utf-8-sig", newline="") as file:
        # Strict, so that a stray quote is an error with its line instead of a swallowed rest.
        reader = csv.DictReader(file, strict=True)
        try:
            for record in reader:
                where = f"{path}: line {reader.line_num}"
                if None in record or None in record.values():
                    raise DataError(f"{where}: the number of values is not that of the header")
                yield where, record
        except (csv.Error, UnicodeDecodeError) as error:
            raise DataError(f"{path}: line {reader.reader.line_num}: {error}") from None


def _read_parquet(path: Path) -> Iterator[Record]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        with pq.ParquetFile(path) as file:
            number = 0
            for batch in file.iter_batches(1000):
                for record in batch.to_pylist():
                    number += 1
                    yield f"{path}: record {number}", record
    except pa.ArrowException as error:
        raise DataError(f"{path}: is not a Parquet file: {str(error).splitlines()[0]}") from error


def _read_hub(name: str, split: str) -> Iterator[Record]:
    import datasets
    from datasets.exceptions import DatasetsError

    try:
        dataset = datasets.load_dataset(name, split=split)
    except (OSError, ValueError, DatasetsError) as error:
        cause = str(error).strip().splitlines()[0]
        raise DataError(f"dataset_name is {name}, which cannot be loaded: {cause}") from error
    for number, record in enumerate(dataset, 1):
        where = f"{name}: {split} record {number}"
        yield where, _record(record, where)


def _parse_json(text: bytes, where: str) -> Any:
    try:
        return json.loads(text)
    except ValueError as error:  # UnicodeDecodeError is one, too
        raise DataError(f"{where}: is not JSON: {error}") from None


def _record(value: Any, where: str) -> Mapping[str, Any]:
    if not isinstance(value, Mapping):
        raise DataError(f"{where}: is {type(value).__name__}, but must be a record (an object)")
    return value


def _or(names: tuple[str, ...]) -> str:
    return f"{', '.join(names[:-1])} or {names[-1]}"
