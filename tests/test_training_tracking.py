import json
import struct
import threading
import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import wandb
from wandb.proto import wandb_internal_pb2

from training.config import TrialConfig
from training.paths import TrialPaths, read_json, write_json
from training.run import run_trial
from training.tracking import WandbRun, WandbTracker, is_best_so_far, make_tracker


def read_ended_run(directory: Path) -> dict[str, Any]:
    """The run, once W&B's own process has written its end: under load that is after `finish`."""
    deadline = time.monotonic() + 60
    while (run := read_run(directory))["exit"] is None and time.monotonic() < deadline:
        time.sleep(0.1)
    return run


def read_run(directory: Path) -> dict[str, Any]:
    """What the offline run's file holds: that is what `wandb sync` sends."""
    (path,) = directory.glob("wandb/offline-run-*/run-*.wandb")
    found: dict[str, Any] = {"history": [], "summary": {}, "config": {}, "run": None, "exit": None}
    for data in _read_leveldb_log(path.read_bytes()):
        record = wandb_internal_pb2.Record()  # pyright: ignore[reportAttributeAccessIssue]
        record.ParseFromString(data)
        kind = record.WhichOneof("record_type")
        if kind == "run":
            found["run"] = record.run
            found["config"] |= _items(record.run.config.update)
        elif kind == "history":
            found["history"].append(_items(record.history.item))
        elif kind == "summary":
            found["summary"] |= _items(record.summary.update)
        elif kind == "exit":
            found["exit"] = record.exit.exit_code
    return found


def _read_leveldb_log(data: bytes) -> Iterator[bytes]:
    """Records of a LevelDB log (blocks of 32 KiB; header: checksum, length, type), W&B's file format."""
    position, record = 7, b""  # behind ":W&B" and the version
    while position + 7 <= len(data):
        if (left := 32768 - position % 32768) < 7:
            position += left
            continue
        length, kind = struct.unpack_from("<HB", data, position + 4)
        record += data[position + 7 : position + 7 + length]
        position += 7 + length
        if kind in (1, 4):  # a whole record, or its last part
            yield record
            record = b""


def _items(items: Any) -> dict[str, Any]:
    return {item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in items}


@pytest.fixture(scope="module")
def tracked(
    tiny_settings: dict[str, Any], tmp_path_factory: pytest.TempPathFactory
) -> tuple[TrialPaths, dict[str, Any], dict[str, Any]]:
    paths = TrialPaths(tmp_path_factory.mktemp("tracked") / "0000")
    config = TrialConfig.from_dict({**tiny_settings, "max_steps": 4, "eval_steps": 2})
    info = {"number": 0, "name": "baseline", "params": {}, "retry_of": None}
    result = run_trial(config, paths, info=info, group="my-sweep", project="my-project")
    return paths, result, read_ended_run(paths.root)


def test_a_run_without_a_key_is_kept_offline_with_every_setting(
    tracked: tuple[TrialPaths, dict[str, Any], dict[str, Any]],
) -> None:
    paths, _, run = tracked
    assert run["run"].display_name == "baseline"
    assert run["run"].run_group == "my-sweep"
    assert run["run"].project == "my-project"
    settings = json.loads(paths.config.read_text())["settings"]
    assert {name: run["config"][name] for name in settings} == settings


def test_the_history_has_every_metric_of_the_local_file(
    tracked: tuple[TrialPaths, dict[str, Any], dict[str, Any]],
) -> None:
    paths, _, run = tracked
    local = [json.loads(line) for line in paths.metrics.read_text().splitlines()]
    remote = [
        {name: value for name, value in line.items() if not name.startswith("_")}
        for line in run["history"]
    ]
    assert remote == [
        {name: value for name, value in line.items() if name != "time"} for line in local
    ]
    names = {name for line in remote for name in line}
    assert names == {
        "step", "eval/loss", "train/loss", "learning_rate", "grad_norm", "tokens_per_second",
    }  # fmt: skip


def test_the_summary_is_the_result_at_the_best_step(
    tracked: tuple[TrialPaths, dict[str, Any], dict[str, Any]],
) -> None:
    _, result, run = tracked
    assert run["summary"]["eval/loss"] == result["eval/loss"]
    assert run["summary"]["best_step"] == result["best_step"]
    assert run["summary"]["base_eval/loss"] == result["base_eval/loss"]
    assert run["exit"] == 0


def test_a_failed_trial_is_a_failed_run(tiny_settings: dict[str, Any], tmp_path: Path) -> None:
    settings = {**tiny_settings, "max_steps": 4, "learning_rate": 1e30, "max_grad_norm": 0}
    run_trial(TrialConfig.from_dict(settings), TrialPaths(tmp_path))
    run = read_run(tmp_path)
    assert run["exit"] == 1
    assert "/loss is " in run["summary"]["reason"]


def make(directory: Path, project: str = "loraloom") -> WandbTracker:
    tracker = make_tracker("wandb", directory, WandbRun(project=project, name="x", config={"a": 1}))
    assert isinstance(tracker, WandbTracker)
    return tracker


def row(step: int) -> dict[str, Any]:
    return {"step": step, "time": 1e9 + step, "train/loss": 1.0}


def test_an_error_of_wandb_is_one_warning_and_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(self: Any, *args: Any, **kwargs: Any) -> None:
        raise OSError("the service has gone")

    monkeypatch.setattr("wandb.sdk.wandb_run.Run.log", fail)
    tracker = make(tmp_path)
    tracker.log(0, row(0))
    with pytest.warns(RuntimeWarning, match="W&B is not told any more: the service has gone"):
        assert tracker.wait(60)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        tracker.log(1, row(1))
        tracker.finish({"state": "complete"})


def test_a_tracker_that_cannot_start_is_one_warning(tmp_path: Path) -> None:
    tracker = make(tmp_path, project="a/b")
    with pytest.warns(RuntimeWarning, match="W&B is not told: .*project name"):
        assert tracker.wait(60)


def test_a_slow_tracker_holds_up_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    opened = threading.Event()
    init = wandb.init

    def slow(**settings: Any) -> Any:
        assert opened.wait(60)
        return init(**settings)

    monkeypatch.setattr(wandb, "init", slow)
    tracker = make(tmp_path)
    for step in range(1000):  # none of these may wait: nobody opens the run before they are through
        tracker.log(step, row(step))
    tracker.finish({"state": "complete"})
    opened.set()
    assert tracker.wait(60)
    assert [line["step"] for line in read_ended_run(tmp_path)["history"]] == list(range(1000))


def test_report_to_none_opens_no_run(tmp_path: Path) -> None:
    tracker = make_tracker("none", tmp_path, WandbRun(project="p"))
    tracker.log(0, row(0))
    tracker.finish({"state": "complete"})
    assert wandb.run is None


def test_the_best_so_far_has_no_better_one_beside_it(tmp_path: Path) -> None:
    for number, loss in enumerate((2.0, 1.5, 1.8)):
        write_json(TrialPaths(tmp_path / f"{number:04d}").result, {"eval/loss": loss})
    best = [
        is_best_so_far(paths := TrialPaths(tmp_path / f"{number:04d}"), read_json(paths.result))
        for number in range(3)
    ]
    assert best == [False, True, False]
