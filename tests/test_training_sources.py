import json
from pathlib import Path

import pandas as pd
import pytest

from training.config import TrialConfig
from training.exceptions import DataError
from training.sources import iter_records

RECORDS = [
    {"prompt": "Why?", "completion": "Bécause."},
    {"prompt": "How?", "completion": "So, so."},
]


def records_of(path: Path) -> list[dict]:
    return [dict(record) for _, record in iter_records(TrialConfig(dataset_name=str(path)))]


def test_every_file_format_gives_the_same_records(tmp_path: Path) -> None:
    frame = pd.DataFrame(RECORDS)
    frame.to_csv(tmp_path / "x.csv", index=False)
    frame.to_parquet(tmp_path / "x.parquet")
    (tmp_path / "x.json").write_text(json.dumps(RECORDS), encoding="utf-8")
    lines = "\n".join(json.dumps(record, ensure_ascii=False) for record in RECORDS)
    (tmp_path / "x.jsonl").write_text(lines, encoding="utf-8")
    (tmp_path / "lines.json").write_text(lines, encoding="utf-8")
    for name in ("x.csv", "x.parquet", "x.json", "x.jsonl", "lines.json"):
        assert records_of(tmp_path / name) == RECORDS, name


def test_a_csv_with_line_breaks_counts_lines_of_the_file(tmp_path: Path) -> None:
    path = tmp_path / "x.csv"
    path.write_text('prompt,completion\n"a\nb",c\nd,e\n')
    places = [where for where, _ in iter_records(TrialConfig(dataset_name=str(path)))]
    assert places == [f"{path}: line 3", f"{path}: line 4"]


@pytest.mark.parametrize(
    ("name", "content", "must"),
    [
        ("x.jsonl", '{"text": "a"}\n\n{"text"\n', "x.jsonl: line 3: is not JSON"),
        ("x.jsonl", '"a"\n', "x.jsonl: line 1: is str, but must be a record"),
        ("x.json", '[{"text": "a"}, 3]', "x.json: record 2: is int, but must be a record"),
        ("x.json", "3", "x.json holds int, but must be a list of records"),
        ("x.csv", "text,b\na,c\nd\n", "x.csv: line 3: the number of values is not"),
        ("x.csv", 'text\n"a"b\n', "x.csv: line 2: "),
        ("x.parquet", "text", "x.parquet: is not a Parquet file"),
        ("x.txt", "text", r"x.txt, but must be a file ending in .jsonl, .json, .csv or .parquet"),
    ],
)
def test_a_broken_file_is_named_with_the_line(
    tmp_path: Path, name: str, content: str, must: str
) -> None:
    path = tmp_path / name
    path.write_text(content)
    with pytest.raises(DataError, match=must):
        records_of(path)


def test_a_missing_file_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"gone.jsonl, but there is no such file"):
        records_of(tmp_path / "gone.jsonl")


def test_a_hub_dataset_that_cannot_be_reached_is_one_line() -> None:
    with pytest.raises(
        DataError, match=r"dataset_name is nobody/nothing, which cannot be loaded: .+"
    ):
        list(iter_records(TrialConfig(dataset_name="nobody/nothing")))


@pytest.mark.network
def test_a_hub_dataset_is_read() -> None:
    config = TrialConfig(dataset_name="mlabonne/FineTome-100k")
    where, record = next(iter(iter_records(config)))
    assert where == "mlabonne/FineTome-100k: train record 1"
    assert record["conversations"][0]["from"] == "human"
